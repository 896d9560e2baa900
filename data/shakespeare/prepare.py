"""
Tiny Shakespeare in the tokens of GPT-2, for finetuning and retrofitting a pretrained model.

    python data/shakespeare/prepare.py

It downloads input.txt and writes train.bin, val.bin (the last tenth of the characters) and meta.json beside
itself. Expected:

    train.bin  301,966 tokens
    val.bin     36,059 tokens
"""
import sys
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[2])) # the root of the repository
from configurator import explain
from data.download import download, gpt2_encoding, publish_dataset
from data.shakespeare_char.prepare import SHA256, URL # the same text

HERE = Path(__file__).resolve().parent

def prepare(folder=HERE, url=URL, sha256=SHA256):
    download(url, folder / 'input.txt', sha256=sha256)
    text = (folder / 'input.txt').read_text(encoding='utf-8')
    gpt2 = gpt2_encoding()

    n = len(text) * 9 // 10
    for split, part in (('train', text[:n]), ('val', text[n:])):
        np.array(gpt2.encode_ordinary(part), dtype=np.uint16).tofile(folder / f'{split}.bin.part')
    publish_dataset(folder, encoding='gpt2', vocab_size=gpt2.n_vocab, dtype='uint16')

if __name__ == '__main__':
    sys.excepthook = explain
    prepare()
