"""
Tests of data/: downloads from a real server on this machine, which can misbehave, and every prepare script on
tiny made-up inputs, from its arguments to its last byte. No network.

    pytest tests/test_data.py     # some seconds

Some need the BPE files of GPT-2 or the real Tiny Shakespeare in ../shared/data, and are skipped without.
"""
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import tiktoken

import data.download
from data.download import CHUNK, download
from data.fineweb.prepare import prepare as prepare_fineweb
from data.openwebtext.prepare import held_out, prepare as prepare_openwebtext
from data.shakespeare.prepare import prepare as prepare_shakespeare
from data.shakespeare_char.prepare import prepare as prepare_shakespeare_char

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / 'shared' / 'data'
BODY = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(BODY).hexdigest()
bpe = pytest.mark.skipif(not (SHARED / 'tiktoken').exists(), reason='no ../shared/data/tiktoken')
play = pytest.mark.skipif(not (SHARED / 'tinyshakespeare.txt').exists(), reason='no ../shared/data')

# -----------------------------------------------------------------------------
# a server with switches

class Site(ThreadingHTTPServer):
    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self.server_port}'
        self.files = {'/file': BODY}
        self.ranges = [] # of the requests so far, None for the whole file
        self.tokens = [] # that came with them
        self.refused = [] # paths for which a token is needed
        self.errors = [] # statuses to answer first
        self.cuts = [] # bytes after which the first answers break off
        self.ignore_range = False
        self.etag = None # announced by a redirect, as hugging face does

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        site, path = self.server, self.path
        if path.startswith('/redirect'):
            to = path.removeprefix('/redirect')
            return self.answer(302, {'Location': to, 'X-Linked-ETag': f'"{site.etag}"'})
        assert self.headers['Accept-Encoding'] == 'identity'
        asked = self.headers['Range']
        site.ranges.append(asked)
        site.tokens.append(self.headers['Authorization'])
        if site.errors:
            return self.answer(site.errors.pop(0))
        if path not in site.files:
            return self.answer(404)
        body, total = site.files[path], len(site.files[path])
        if asked is None or site.ignore_range:
            return self.answer(200, {}, body)
        start = int(asked.removeprefix('bytes=').removesuffix('-'))
        if start >= total:
            return self.answer(416, {'Content-Range': f'bytes */{total}'})
        self.answer(206, {'Content-Range': f'bytes {start}-{total - 1}/{total}'}, body[start:])

    def do_HEAD(self):
        refused = self.path in self.server.refused and self.headers['Authorization'] != 'Bearer secret'
        self.answer(401 if refused else 200 if self.path in self.server.files else 404)

    def answer(self, status, headers={}, body=b''):
        self.send_response(status)
        for name, value in {'Content-Length': len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body[:self.server.cuts.pop(0)] if body and self.server.cuts else body)

    log_message = lambda *args: None

@pytest.fixture
def site(monkeypatch):
    monkeypatch.setattr(data.download, 'PAUSES', (0, 0))
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    with Site() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()

@pytest.fixture
def gpt2(monkeypatch):
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(SHARED / 'tiktoken'))
    return tiktoken.get_encoding('gpt2')

# -----------------------------------------------------------------------------
# download

@pytest.mark.skipif(data.download.fcntl is None, reason='Windows has no flock')
def test_downloads_of_one_file_take_turns(site, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(download, [site.url + '/file'] * 4, [tmp_path / 'file'] * 4))
    assert (tmp_path / 'file').read_bytes() == BODY and site.ranges == [None] # one fetched it for all
    assert [path.name for path in tmp_path.iterdir()] == ['file']

@pytest.mark.parametrize('path', ['/file', '/redirect/file'])
def test_download_whole(site, tmp_path, path):
    download(site.url + path, tmp_path / 'new' / 'f', sha256=SHA256)
    assert (tmp_path / 'new' / 'f').read_bytes() == BODY
    assert [p.name for p in (tmp_path / 'new').iterdir()] == ['f'] # and no .part

def test_what_is_there_is_kept(site, tmp_path):
    (tmp_path / 'f').write_bytes(b'mine')
    download(site.url + '/file', tmp_path / 'f')
    with pytest.raises(ValueError, match='delete it'):
        download(site.url + '/file', tmp_path / 'f', sha256=SHA256)
    assert (tmp_path / 'f').read_bytes() == b'mine' and site.ranges == []

@pytest.mark.parametrize('have', [0, 1, 123_456, len(BODY) - 1, len(BODY)])
def test_resume_fetches_only_the_rest(site, tmp_path, have):
    (tmp_path / 'f.part').write_bytes(BODY[:have])
    download(site.url + '/file', tmp_path / 'f')
    assert (tmp_path / 'f').read_bytes() == BODY
    assert site.ranges == [f'bytes={have}-' if have else None]

def test_resume_where_ranges_are_ignored(site, tmp_path):
    site.ignore_range = True
    (tmp_path / 'f.part').write_bytes(b'x' * 1000) # kept, these would be seen in the result
    download(site.url + '/file', tmp_path / 'f')
    assert (tmp_path / 'f').read_bytes() == BODY and len(site.ranges) == 1

def test_part_longer_than_the_file_starts_over(site, tmp_path):
    (tmp_path / 'f.part').write_bytes(BODY + b'x')
    download(site.url + '/file', tmp_path / 'f')
    assert (tmp_path / 'f').read_bytes() == BODY and site.ranges == [f'bytes={len(BODY) + 1}-', None]

def test_cut_connections_and_errors_are_retried(site, tmp_path):
    site.errors, site.cuts = [500], [CHUNK]
    download(site.url + '/file', tmp_path / 'f')
    assert (tmp_path / 'f').read_bytes() == BODY and site.ranges == [None, None, f'bytes={CHUNK}-']

def test_no_half_file_after_a_failure_and_the_next_run_goes_on(site, tmp_path):
    site.cuts = [CHUNK, CHUNK, 3]
    with pytest.raises(ValueError, match=f'cannot download {site.url}/file .* check the connection'):
        download(site.url + '/file', tmp_path / 'f')
    assert not (tmp_path / 'f').exists() and (tmp_path / 'f.part').read_bytes() == BODY[:2 * CHUNK]
    download(site.url + '/file', tmp_path / 'f')
    assert (tmp_path / 'f').read_bytes() == BODY and site.ranges[-1] == f'bytes={2 * CHUNK}-'

def test_no_file_before_it_is_verified(site, tmp_path, monkeypatch):
    monkeypatch.delattr(data.download, 'digest') # a crash at the moment of verification
    with pytest.raises(NameError):
        download(site.url + '/file', tmp_path / 'f', sha256=SHA256)
    assert [path.name for path in tmp_path.iterdir()] == ['f.part']

@pytest.mark.parametrize('path, etag', [('/file', None), ('/redirect/file', SHA256)])
def test_wrong_bytes_are_deleted(site, tmp_path, path, etag):
    site.etag = etag
    site.files['/file'] = BODY[:-1] + b'?'
    with pytest.raises(ValueError, match='wrong sha256'):
        download(site.url + path, tmp_path / 'f', sha256=None if etag else SHA256)
    assert list(tmp_path.iterdir()) == []

def test_an_etag_that_is_no_sha256_is_not_one(site, tmp_path):
    site.etag = 'a' * 40 # small files of hugging face: a git hash
    download(site.url + '/redirect/file', tmp_path / 'f')
    site.etag = SHA256
    download(site.url + '/redirect/file', tmp_path / 'g')
    assert (tmp_path / 'f').read_bytes() == (tmp_path / 'g').read_bytes() == BODY

def test_hopeless_downloads_end_in_one_sentence(site, tmp_path):
    with pytest.raises(ValueError, match=f'{site.url}/nowhere .status 404.: check the address'):
        download(site.url + '/nowhere', tmp_path / 'f')
    assert len(site.ranges) == 1 # no retry
    with pytest.raises(ValueError, match='http://127.0.0.1:9/f .ConnectionError.: check the connection'):
        download('http://127.0.0.1:9/f', tmp_path / 'f') # nobody listens there
    assert list(tmp_path.iterdir()) == []

# -----------------------------------------------------------------------------
# the prepare scripts

def test_meta_comes_last_and_never_describes_other_files(tmp_path):
    meta = {'encoding': 'bytes', 'vocab_size': 256, 'dtype': 'uint8'}
    (tmp_path / 'train.bin.part').write_bytes(b'abc')
    (tmp_path / 'val.bin.part').write_bytes(b'd')
    data.download.publish_dataset(tmp_path, **meta)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['meta.json', 'train.bin', 'val.bin']
    (tmp_path / 'train.bin.part').write_bytes(b'another')
    with pytest.raises(FileNotFoundError): # a second run breaks off between the two files
        data.download.publish_dataset(tmp_path, **meta)
    assert (tmp_path / 'meta.json').read_text() == '{}'

def load(folder):
    meta = json.loads((folder / 'meta.json').read_text())
    train, val = (np.fromfile(folder / f'{split}.bin', dtype=meta['dtype']) for split in ('train', 'val'))
    sums = meta.pop('crc32')
    assert sums.pop('meta') == zlib.crc32(json.dumps(dict(sorted(meta.items()))).encode())
    assert sums == {split: zlib.crc32((folder / f'{split}.bin').read_bytes()) for split in ('train', 'val')}
    assert not list(folder.glob('*.part')) and max(train.max(), val.max(initial=0)) < meta['vocab_size']
    return train, val, meta

def run(script, folder, *arguments):
    return subprocess.run([sys.executable, script, *arguments], cwd=folder, capture_output=True, text=True)

def test_python_by_its_command(tmp_path):
    folder = tmp_path / 'data' / 'python' # a copy, as the script writes beside itself
    folder.mkdir(parents=True)
    shutil.copy(ROOT / 'configurator.py', tmp_path)
    shutil.copy(ROOT / 'data' / 'download.py', folder.parent)
    shutil.copy(ROOT / 'data' / 'python' / 'prepare.py', folder)
    out = run(folder / 'prepare.py', tmp_path)
    assert out.returncode == 0, out.stderr
    train, val, meta = load(folder)
    assert meta == {'encoding': 'bytes', 'vocab_size': 256, 'dtype': 'uint8'}
    assert 5e6 < len(train) + len(val) < 30e6 and len(train) == (len(train) + len(val)) * 9 // 10
    assert f'train.bin: {len(train):,} tokens' in out.stdout and f'val.bin: {len(val):,} tokens' in out.stdout
    text = bytes(np.concatenate([train, val])).decode('utf-8')
    assert Path(tarfile.__file__).read_text(encoding='utf-8') in text

def test_shakespeare_char(site, tmp_path):
    text = 'to be, or not to be\n' * 50
    site.files['/input.txt'] = text.encode()
    with pytest.raises(ValueError, match='wrong sha256'): # this is not Tiny Shakespeare
        prepare_shakespeare_char(tmp_path, f'{site.url}/input.txt')
    prepare_shakespeare_char(tmp_path, f'{site.url}/input.txt', sha256=None)
    train, val, meta = load(tmp_path)
    assert (len(train), len(val)) == (900, 100)
    assert meta == {'encoding': 'chars', 'vocab_size': 9, 'dtype': 'uint8', 'chars': '\n ,benort'}
    assert ''.join(meta['chars'][i] for i in (*train, *val)) == text

@play
def test_shakespeare_char_has_the_counts_of_nanogpt(site, tmp_path):
    site.files['/input.txt'] = (SHARED / 'tinyshakespeare.txt').read_bytes()
    prepare_shakespeare_char(tmp_path, f'{site.url}/input.txt')
    train, val, meta = load(tmp_path)
    assert (len(train), len(val), meta['vocab_size']) == (1_003_854, 111_540, 65)

@play
@bpe
def test_shakespeare(site, tmp_path, gpt2):
    text = site.files['/input.txt'] = (SHARED / 'tinyshakespeare.txt').read_bytes()
    prepare_shakespeare(tmp_path, f'{site.url}/input.txt')
    train, val, meta = load(tmp_path)
    assert meta == {'encoding': 'gpt2', 'vocab_size': 50257, 'dtype': 'uint16'}
    assert (len(train), len(val)) == (301_966, 36_059) # those of nanoGPT
    assert (gpt2.decode(train) + gpt2.decode(val)).encode() == text

def tar(members, mode='w'):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()

@bpe
def test_openwebtext(site, tmp_path, gpt2):
    pages = [f'page {i}\n\n\n\n\nof élan <|endoftext|>\n'.encode() for i in range(4000)]
    for i in range(2): # two subsets of ten archives of 200 pages, and things that must be passed over
        archives = []
        for j in range(2000 * i, 2000 * (i + 1), 200):
            texts = [(f'../../{k}.txt', pages[k]) for k in range(j, j + 200)] # names that no one should trust
            archives.append((f'openwebtext/{j}_data.xz', tar([('readme', b'no page'), *texts], 'w:xz')))
        site.files[f'/urlsf_subset{i:02d}.tar'] = tar([('openwebtext/lock', b''), *archives])

    for workers in (1, 2):
        (tmp_path / f'{workers}').mkdir()
        prepare_openwebtext(tmp_path / f'{workers}', site.url, subsets=2, workers=workers)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in '12')
    assert one == two and len(one) == 5 # train, val, meta and the two tars: nothing was extracted
    train, val, meta = load(tmp_path / '1')
    assert meta == {'encoding': 'gpt2', 'vocab_size': 50257, 'dtype': 'uint16'}
    for tokens, side in ((train, False), (val, True)):
        texts = [f'page {i}\n\nof élan <|endoftext|>' for i in range(4000) if held_out(pages[i]) == side]
        assert texts and gpt2.decode(tokens) == ''.join(text + '<|endoftext|>' for text in texts)
        assert (tokens == 50256).sum() == len(texts) # in a page, <|endoftext|> is text
    assert 70 < sum(held_out(f'document {i}'.encode()) for i in range(200_000)) < 130 # of 100

def shard(tokens, magic=20240520, version=1, count=None):
    header = np.zeros(256, dtype='<i4')
    header[:3] = magic, version, len(tokens) if count is None else count
    return header.tobytes() + np.array(tokens, dtype='<u2').tobytes()

def test_fineweb(site, tmp_path):
    shards = {'val_000000': [50256, 7], 'train_000001': [1, 2, 3], 'train_000002': [50000, 5]}
    site.files = {f'/fineweb_{name}.bin': shard(tokens) for name, tokens in shards.items()}
    prepare_fineweb(tmp_path, site.url, shards=1)
    assert load(tmp_path)[0].tolist() == [1, 2, 3] and len(site.ranges) == 2
    prepare_fineweb(tmp_path, site.url, shards=2)
    assert len(site.ranges) == 3 # only the new one
    train, val, meta = load(tmp_path)
    assert train.tolist() == [1, 2, 3, 50000, 5] and val.tolist() == [50256, 7]
    assert meta == {'encoding': 'gpt2', 'vocab_size': 50257, 'dtype': 'uint16'}

@pytest.mark.parametrize('bad', [shard([1, 2], magic=1), shard([1, 2], version=2), shard([1, 2], count=3),
                                 shard([1, 2])[:-1], shard([1, 2]) + b'x', shard([])[:100], b''])
def test_fineweb_refuses_what_is_no_shard(site, tmp_path, bad):
    site.files = {'/fineweb_val_000000.bin': shard([1]), '/fineweb_train_000001.bin': bad}
    with pytest.raises(ValueError, match='fineweb_train_000001.bin is not a whole shard .* delete it'):
        prepare_fineweb(tmp_path, site.url, shards=1)
    assert [path.name for path in tmp_path.iterdir()] == ['shards']

def test_a_count_that_is_not_there_is_one_sentence(tmp_path):
    out = run(ROOT / 'data' / 'fineweb' / 'prepare.py', tmp_path, '--shards=104')
    assert out.returncode == 1 and out.stderr == '--shards=104: choose from 1 to 103\n'
    out = run(ROOT / 'data' / 'openwebtext' / 'prepare.py', tmp_path, '--subsets=0')
    assert out.returncode == 2 and 'invalid choice: 0 (choose from 1, 2, 3' in out.stderr
