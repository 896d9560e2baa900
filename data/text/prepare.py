"""
Text of your own, in the tokens of the model that is to read it, or one token per character.

    python data/text/prepare.py my.txt books/                                       # GPT-2's tokens
    python data/text/prepare.py my.txt --tokenizer=HuggingFaceTB/SmolLM2-135M       # those of a hub model
    python data/text/prepare.py my.txt --tokenizer=some/folder --name=mine          # for --dataset=mine
    python data/text/prepare.py my.txt --tokenizer=out_python/best.pt               # those of a checkpoint
    python data/text/prepare.py my.txt --chars                                      # its own characters

A folder stands for all its .txt files. The script writes train.bin, val.bin (the last tenth of the text) and
meta.json beside itself, or into data/mine, without tokens that a tokenizer would add around a text. A Llama
also needs: pip install tokenizers.
"""
import argparse
import re
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[2])) # the root of the repository
from configurator import explain
from data.download import publish_dataset, read_text
from pretrained import tokenizer, tokens_of

HERE = Path(__file__).resolve().parent
PIECE = 1 << 20 # characters encoded at a time, about

def borders(text):
    """Where to cut a text: after a newline that has no white space on either side, as tokens end there."""
    cuts = [0]
    while len(text) - cuts[-1] > PIECE:
        lines = re.compile(r'(?<=\S)\n(?=\S)').finditer(text, cuts[-1] + PIECE // 2, cuts[-1] + PIECE)
        cuts.append(max((line.end() for line in lines), default=cuts[-1] + PIECE))
    return [*cuts, len(text)]

def encoded(text, encode, title=None):
    """The tokens of a text, piece by piece. Some tokenizers put a space before a text: hence the newline."""
    newline = encode('\n', False)
    for start, end in tqdm(list(pairwise(borders(text))), title):
        tokens = encode('\n' + text[start:end], False)
        apart = start > 0 and tokens[:len(newline)] == newline
        yield tokens[len(newline):] if apart else encode(text[start:end], False)

def prepare(inputs, tokenizer_name='gpt2', folder=HERE, chars=False):
    paths = []
    for path in map(Path, inputs):
        paths += sorted(path.rglob('*.txt')) if path.is_dir() else [path]
    if not paths:
        raise ValueError(f"there is no .txt file in {' '.join(inputs)}: name files, or folders with some")
    text = '\n\n'.join(map(read_text, paths))
    if chars:
        own = ''.join(sorted(set(text)))
        meta = dict(encoding='chars', vocab_size=len(own), chars=own)
    else:
        meta = tokens_of(tokenizer_name)
    encode, _ = tokenizer(meta)
    dtype = np.min_scalar_type(meta['vocab_size'] - 1).name
    n = len(text) * 9 // 10
    for split, part in (('train', text[:n]), ('val', text[n:])):
        with open(folder / f'{split}.bin.part', 'wb') as file:
            for tokens in encoded(part, encode, f'encode {split}'):
                np.array(tokens, dtype=dtype).tofile(file)
    publish_dataset(folder, **{**meta, 'dtype': dtype})

if __name__ == '__main__':
    sys.excepthook = explain
    parser = argparse.ArgumentParser(description='text of your own, in the tokens of a pretrained model')
    parser.add_argument('inputs', nargs='+', help='text files, or folders of .txt files')
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument('--tokenizer', default='gpt2', help='a model, as from_pretrained takes it')
    kind.add_argument('--chars', action='store_true', help='one token for each character of the text')
    parser.add_argument('--name', default='text', help='the folder of data/ that is written')
    args = parser.parse_args()
    folder = HERE.parent / args.name
    folder.mkdir(exist_ok=True)
    prepare(args.inputs, args.tokenizer, folder, args.chars)
