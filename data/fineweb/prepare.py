"""
FineWeb: web pages filtered for quality, which others have already encoded with GPT-2's tokenizer.

    python data/fineweb/prepare.py                  # 10 shards of 100M tokens, 200 MB each
    python data/fineweb/prepare.py --shards=103     # all of them: 10B tokens

It downloads to shards/, where a later run with more shards finds the earlier ones, and writes train.bin,
val.bin and meta.json beside itself: twice the disk of the download in all. Expected for the default:

    train.bin  1,000,000,000 tokens
    val.bin      100,000,000 tokens
"""
import argparse
import shutil
import sys
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[2])) # the root of the repository
from configurator import explain
from data.download import download, publish_dataset

HERE = Path(__file__).resolve().parent
URL = 'https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main'
SHARDS = 103
HEADER = 1024 # bytes: 256 int32, of which the first three are magic, version and the count of tokens

def fetch_shard(folder, url, name):
    path = folder / 'shards' / name
    download(f'{url}/{name}', path)
    tokens = (path.stat().st_size - HEADER) / 2 # two bytes each
    if np.fromfile(path, dtype='<i4', count=3).tolist() != [20240520, 1, tokens]:
        raise ValueError(f'{path} is not a whole shard of GPT-2 tokens: delete it and run the command again')
    return path

def join(shards, path):
    with open(path, 'wb') as out:
        for shard in shards:
            with open(shard, 'rb') as f:
                f.seek(HEADER)
                shutil.copyfileobj(f, out)

def prepare(folder=HERE, url=URL, shards=10):
    if not 1 <= shards <= SHARDS:
        raise ValueError(f'--shards={shards}: choose from 1 to {SHARDS}')
    val = [fetch_shard(folder, url, 'fineweb_val_000000.bin')]
    train = [fetch_shard(folder, url, f'fineweb_train_{i:06d}.bin') for i in range(1, shards + 1)]
    join(train, folder / 'train.bin.part')
    join(val, folder / 'val.bin.part')
    publish_dataset(folder, encoding='gpt2', vocab_size=50257, dtype='uint16')

if __name__ == '__main__':
    sys.excepthook = explain
    parser = argparse.ArgumentParser()
    parser.add_argument('--shards', type=int, default=10, help='how many of the 103, 100M tokens each')
    prepare(**vars(parser.parse_args()))
