"""
What the scripts share: a file gets its final name when it is whole and verified, not before.

    from data.download import download
    download(url, 'weights.bin')

An interrupted run leaves weights.bin.part, and the next one continues from it. Every data/NAME/prepare.py
writes train.bin.part and val.bin.part, then calls publish_dataset().
"""
import hashlib
import json
import os
import re
import sys
import time
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import requests
import tiktoken
from tqdm import tqdm

try:
    import fcntl
except ImportError:
    fcntl = None # on Windows

PAUSES = (1, 2, 4, 8) # seconds between tries; there is one more try than pauses
CHUNK = 1 << 16 # bytes; a connection that breaks loses the chunk it was in

# -----------------------------------------------------------------------------
# from the network to a file

def download(url, path, sha256=None, token=None):
    """
    Fetches url to path, unless it is there. Its sha256 (hex) is verified if you give it, or if the server
    publishes it. Some servers ask for a token.
    """
    path = Path(path)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with alone_in(path.parent):
            if not path.exists(): # another process may have fetched it meanwhile
                fetch_verified(url, path, sha256, token)
    elif sha256 and digest(path) != sha256:
        raise ValueError(f'{path} is not the file published at {url}: delete it and run the command again')

@contextmanager
def alone_in(folder):
    """One process at a time, as those of torchrun start together. Without such locks, all at once."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError): # some file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)

def fetch_verified(url, path, sha256, token):
    part = Path(f'{path}.part')
    for pause in (*PAUSES, None):
        try:
            published = fetch(url, part, token)
            break
        except requests.RequestException as error:
            status = error.response.status_code if error.response is not None else 0
            reason = f'status {status}' if status else type(error).__name__
        if 400 <= status < 500 and status not in (408, 429): # these two mean: try later
            raise ValueError(f'cannot download {url} ({reason}): check the address')
        if pause is None:
            raise ValueError(f'cannot download {url} ({reason}): check the connection, and run this again')
        print(f'{path.name}: {reason}, trying again in {pause} s', file=sys.stderr)
        time.sleep(pause)

    sha256 = sha256 or published
    if sha256 and digest(part) != sha256:
        part.unlink() # the next run would only resume it and end here again
        raise ValueError(f'{url} arrived with a wrong sha256 and was deleted: run the command again')
    publish(part, path)

def fetch(url, part, token):
    """One request for what part still lacks. Returns the sha256 that the server publishes, or None."""
    have = part.stat().st_size if part.exists() else 0
    headers = {'Accept-Encoding': 'identity'} # the lengths of a compressed answer are not those of the file
    if token:
        headers['Authorization'] = f'Bearer {token}' # requests does not pass it on to another host
    if have:
        headers['Range'] = f'bytes={have}-'

    with requests.get(url, headers=headers, stream=True, timeout=30) as response:
        status = response.status_code # 206: the rest, 200: all from the start, 416: nothing lies beyond have
        total = published_size(response)
        if status == 200:
            have = 0
        if status != 416:
            response.raise_for_status()
            with open(part, 'ab' if have else 'wb') as f, tqdm(
                    desc=part.stem, total=total, initial=have, unit='B', unit_scale=True) as bar:
                for chunk in response.iter_content(CHUNK):
                    have += f.write(chunk)
                    bar.update(len(chunk))

    if total is None and status == 200:
        total = have # no length was promised, and the answer ended cleanly
    if have != total:
        if total is None or have > total:
            part.unlink() # not a beginning of this file: start over
        raise requests.ConnectionError(f'{have} bytes of {total}')
    return published_sha256(response)

def published_size(response):
    """The bytes of the whole file, or None if the server does not say."""
    total = response.headers.get('Content-Range', '').rpartition('/')[2] # bytes 5-9/10, with a 416 bytes */10
    total = total or response.headers.get('Content-Length')
    return int(total) if total else None

def published_sha256(response):
    """Hugging Face gives it for large files, in the redirect to its storage."""
    for answer in (*response.history, response):
        tag = answer.headers.get('X-Linked-ETag', '').strip('"')
        if re.fullmatch('[0-9a-f]{64}', tag):
            return tag

def digest(path):
    sha256 = hashlib.sha256()
    with open(path, 'rb') as f:
        while chunk := f.read(CHUNK):
            sha256.update(chunk)
    return sha256.hexdigest()

def gpt2_encoding():
    """GPT-2's tokens, which tiktoken downloads once."""
    try:
        return tiktoken.get_encoding('gpt2')
    except requests.RequestException:
        raise ValueError("GPT-2's vocabulary could not be downloaded: check the connection") from None

def read_text(path):
    """A text file, without the mark that some editors write first."""
    try:
        return Path(path).read_text(encoding='utf-8-sig')
    except UnicodeDecodeError:
        raise ValueError(f'{path} is not text in UTF-8: convert it first') from None

# -----------------------------------------------------------------------------
# from a .part to its final name

def publish(part, path):
    with open(part, 'rb+') as f:
        os.fsync(f.fileno()) # the name must not reach the disk before the bytes do
    os.replace(part, path)

def write_atomically(path, data):
    with open(f'{path}.part', 'wb') as f:
        f.write(data)
    publish(f'{path}.part', path)

def publish_dataset(folder, **meta):
    """The two .part are written: names them, writes meta.json last, and prints the counts."""
    write_atomically(folder / 'meta.json', b'{}') # until then nothing must describe these files
    meta['crc32'] = dict(meta=crc32_of_fields(meta))
    paths = [folder / 'train.bin', folder / 'val.bin']
    for path in paths:
        publish(f'{path}.part', path)
        meta['crc32'][path.stem] = crc32(path)
    write_atomically(folder / 'meta.json', json.dumps(meta).encode())
    for path in paths:
        tokens = path.stat().st_size // np.dtype(meta['dtype']).itemsize
        print(f'{folder.name}/{path.name}: {tokens:,} tokens')

def crc32(path):
    value = 0
    with open(path, 'rb') as f:
        while chunk := f.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value

def crc32_of_fields(meta):
    """The CRC-32 of everything in meta.json except the checksums."""
    fields = {key: value for key, value in meta.items() if key != 'crc32'}
    return zlib.crc32(json.dumps(fields, sort_keys=True).encode())
