"""
OpenWebText, the dataset of the paper: 8 million web pages that Reddit linked to, in the tokens of GPT-2.

    python data/openwebtext/prepare.py                  # all of it: 13 GB to download, 18 GB to write
    python data/openwebtext/prepare.py --subsets=1      # one of its 21 equal parts
"""
import argparse
import hashlib
import io
import multiprocessing
import re
import sys
import tarfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[2])) # the root of the repository
from configurator import explain
from data.download import download, gpt2_encoding, publish_dataset

URL = ('https://huggingface.co/datasets/Skylion007/openwebtext/resolve/'
       '8cfd553694d06979cfec29248b200468786f0294/subsets')

def held_out(document): # one in 2000, chosen by its bytes: exact copies of a page fall on the same side
    return int(hashlib.sha256(document).hexdigest(), 16) % 2000 == 0

def encode(archive):
    """The train and val tokens of one .tar.xz of some 400 documents, in a worker."""
    gpt2 = gpt2_encoding()
    found = [], []
    with tarfile.open(fileobj=io.BytesIO(archive), mode='r:xz') as tar:
        for member in tar:
            if member.name.endswith('.txt'):
                document = tar.extractfile(member).read() # in memory: on disk, its name could do harm
                text = re.sub('\n{3,}', '\n\n', document.decode()).strip() # as its usual loader does
                found[held_out(document)].extend([*gpt2.encode_ordinary(text), gpt2.eot_token])
    return [np.array(tokens, dtype=np.uint16) for tokens in found]

def prepare(folder=Path(__file__).resolve().parent, url=URL, subsets=21, workers=None):
    gpt2 = gpt2_encoding() # fetched once here, not by all workers at once
    with (open(folder / 'train.bin.part', 'wb') as train, open(folder / 'val.bin.part', 'wb') as val,
          multiprocessing.get_context('spawn').Pool(workers) as pool):
        for i in range(subsets):
            name = f'urlsf_subset{i:02d}.tar'
            download(f'{url}/{name}', folder / name)
            with tarfile.open(folder / name) as tar:
                archives = (tar.extractfile(member).read() for member in tar if member.name.endswith('.xz'))
                for a, b in tqdm(pool.imap(encode, archives), desc=f'encode {name}'):
                    train.write(a)
                    val.write(b)
    publish_dataset(folder, encoding='gpt2', vocab_size=gpt2.n_vocab, dtype='uint16')

if __name__ == '__main__':
    sys.excepthook = explain
    parser = argparse.ArgumentParser()
    parser.add_argument('--subsets', type=int, default=21, choices=range(1, 22), help='from the first')
    parser.add_argument('--workers', type=int, help='processes that encode; otherwise one for each core')
    prepare(**vars(parser.parse_args()))
