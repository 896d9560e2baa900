"""
OpenWebText, the dataset of the paper: 8 million web pages that Reddit linked to, in the tokens of GPT-2.

    python data/openwebtext/prepare.py                  # all of it: 13 GB to download, 18 GB to write
    python data/openwebtext/prepare.py --subsets=1      # one of its 21 equal parts

It writes train.bin, val.bin (one document in 2000) and meta.json beside itself. Which document goes where,
and in which order, does not depend on --workers. nanoGPT reports, for its own split of the same documents,

    train.bin  9,035,582,198 tokens
    val.bin        4,434,897 tokens

and ours should come to about the same total; --subsets=1 to about a 21st of it.
"""
import argparse
import hashlib
import io
import multiprocessing
import os
import re
import sys
import tarfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[2])) # the root of the repository
from data.download import download, gpt2_encoding, in_a_sentence, publish_dataset

HERE = Path(__file__).resolve().parent
REVISION = '8cfd553694d06979cfec29248b200468786f0294'
URL = f'https://huggingface.co/datasets/Skylion007/openwebtext/resolve/{REVISION}/subsets'
SUBSETS = 21

def held_out(document):
    """one document in 2000, chosen by a hash of its bytes: exact copies of a page fall on the same side"""
    return int(hashlib.sha256(document).hexdigest(), 16) % 2000 == 0

def documents(archive):
    """the .txt files of a .tar.xz; none is written to disk, where the name of a member could do harm"""
    with tarfile.open(fileobj=io.BytesIO(archive), mode='r:xz') as tar:
        for member in tar:
            if member.isfile() and member.name.endswith('.txt'):
                yield tar.extractfile(member).read()

def encode(archive):
    """the train and val tokens of one archive of some 400 documents, in a worker"""
    gpt2 = gpt2_encoding()
    train, val = [], []
    for document in documents(archive):
        text = re.sub('\n{3,}', '\n\n', document.decode('utf-8')).strip() # as its usual loader does
        tokens = val if held_out(document) else train
        tokens += gpt2.encode_ordinary(text)
        tokens.append(gpt2.eot_token)
    return np.array(train, dtype=np.uint16), np.array(val, dtype=np.uint16)

def prepare(folder=HERE, url=URL, subsets=SUBSETS, workers=os.cpu_count()):
    if not 1 <= subsets <= SUBSETS:
        sys.exit(f'--subsets={subsets}: choose from 1 to {SUBSETS}')
    gpt2 = gpt2_encoding() # fetched once here, not by all workers at once

    with (open(folder / 'train.bin.part', 'wb') as train, open(folder / 'val.bin.part', 'wb') as val,
          multiprocessing.get_context('spawn').Pool(workers) as pool):
        for i in range(subsets):
            name = f'urlsf_subset{i:02d}.tar'
            download(f'{url}/{name}', folder / name)
            with tarfile.open(folder / name) as tar:
                members = [member for member in tar if member.isfile() and member.name.endswith('.xz')]
                archives = (tar.extractfile(member).read() for member in members) # read when needed
                for a, b in tqdm(pool.imap(encode, archives), desc=f'encode {name}', total=len(members)):
                    train.write(a)
                    val.write(b)
    publish_dataset(folder, encoding='gpt2', vocab_size=gpt2.n_vocab, dtype='uint16')

if __name__ == '__main__':
    sys.excepthook = in_a_sentence
    parser = argparse.ArgumentParser()
    parser.add_argument('--subsets', type=int, default=SUBSETS, help='how many of the 21, from the first')
    parser.add_argument('--workers', type=int, default=os.cpu_count(), help='processes that encode')
    prepare(**vars(parser.parse_args()))
