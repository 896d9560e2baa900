"""
Text of your own, in the tokens of the model that is to read it.

    python data/text/prepare.py my.txt books/                                       # GPT-2's tokens
    python data/text/prepare.py my.txt --tokenizer=HuggingFaceTB/SmolLM2-135M       # those of a hub model
    python data/text/prepare.py my.txt --tokenizer=some/folder --name=mine          # for --dataset=mine
    python data/text/prepare.py my.txt --tokenizer=out_python/best.pt               # those of a checkpoint

A folder stands for all its .txt files. The script writes train.bin, val.bin (the last tenth of the text) and
meta.json beside itself, or into data/mine. A Llama also needs: pip install tokenizers.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[2])) # the root of the repository
from configurator import explain
from data.download import publish_dataset
from pretrained import tokenizer, tokens_of

HERE = Path(__file__).resolve().parent
PIECE = 1 << 20 # characters encoded at a time

def prepare(inputs, tokenizer_name='gpt2', folder=HERE):
    paths = []
    for path in map(Path, inputs):
        paths += sorted(path.rglob('*.txt')) if path.is_dir() else [path]
    if not paths:
        raise ValueError(f"there is no .txt file in {' '.join(inputs)}: name files, or folders with some")
    texts = []
    for path in paths:
        try:
            texts.append(path.read_text(encoding='utf-8'))
        except UnicodeDecodeError:
            raise ValueError(f'{path} is not text in UTF-8: convert it first') from None
    text = '\n\n'.join(texts)
    meta = tokens_of(tokenizer_name)
    encode, _ = tokenizer(meta)
    dtype = np.min_scalar_type(meta['vocab_size'] - 1).name
    n = len(text) * 9 // 10
    for split, part in (('train', text[:n]), ('val', text[n:])):
        with open(folder / f'{split}.bin.part', 'wb') as file:
            for i in tqdm(range(0, len(part), PIECE), desc=f'encode {split}'):
                np.array(encode(part[i:i + PIECE]), dtype=dtype).tofile(file)
    publish_dataset(folder, **{**meta, 'dtype': dtype})

if __name__ == '__main__':
    sys.excepthook = explain
    parser = argparse.ArgumentParser(description='text of your own, in the tokens of a pretrained model')
    parser.add_argument('inputs', nargs='+', help='text files, or folders of .txt files')
    parser.add_argument('--tokenizer', default='gpt2', help='a model, as from_pretrained takes it')
    parser.add_argument('--name', default='text', help='the folder of data/ that is written')
    args = parser.parse_args()
    folder = HERE.parent / args.name
    folder.mkdir(exist_ok=True)
    prepare(args.inputs, args.tokenizer, folder)
