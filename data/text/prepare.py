"""
Text of your own, in the tokens of the model that is to read it.

    python data/text/prepare.py my.txt books/                                           # GPT-2's tokens
    python data/text/prepare.py my.txt --tokenizer=HuggingFaceTB/SmolLM2-135M           # those of a hub's model,
    python data/text/prepare.py my.txt --tokenizer=some/folder                          # of one in a folder,
    python data/text/prepare.py my.txt --tokenizer=out_python/best.pt                   # of a checkpoint

    python data/text/prepare.py my.txt --name=mine                                      # into data/mine: --dataset=mine

A folder stands for all its .txt files. The script writes train.bin, val.bin (the last tenth of the characters, in the order
given) and meta.json beside itself, or into the folder of data/ that --name names. A Llama's tokenizer needs one more package: pip install tokenizers.
"""
import argparse
import re
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[2])) # the root of the repository
from data.download import in_a_sentence, publish_dataset
from pretrained import tokenizer, tokens_of

HERE = Path(__file__).resolve().parent
PIECE = 1 << 20 # characters encoded at a time

def prepare(inputs, tokenizer_name='gpt2', folder=HERE):
    paths = []
    for path in map(Path, inputs):
        paths += sorted(path.rglob('*.txt')) if path.is_dir() else [path]
    if not paths:
        sys.exit(f"there is no .txt file in {' '.join(inputs)}: name text files, or folders that hold .txt files")
    try:
        text = '\n\n'.join(path.read_text(encoding='utf-8') for path in paths)
        meta = tokens_of(tokenizer_name)
        encode, _ = tokenizer(meta)
        if meta['encoding'] == 'chars' and (unknown := set(text) - set(meta['chars'])):
            raise ValueError(f"{tokenizer_name} has no token for {', '.join(map(repr, sorted(unknown)))}: its characters are "
                             f"{meta['chars']!r}")
    except (OSError, ValueError) as error:
        sys.exit(f'{error}')
    dtype = 'uint8' if meta['vocab_size'] <= 2**8 else 'uint16' if meta['vocab_size'] <= 2**16 else 'uint32'
    n = len(text) * 9 // 10
    for split, part in (('train', text[:n]), ('val', text[n:])):
        with open(folder / f'{split}.bin.part', 'wb') as file:
            for i in tqdm(range(0, len(part), PIECE), desc=f'encode {split}'):
                np.array(encode(part[i:i + PIECE]), dtype=dtype).tofile(file)
    publish_dataset(folder, **{**meta, 'dtype': dtype})

if __name__ == '__main__':
    sys.excepthook = in_a_sentence
    parser = argparse.ArgumentParser(description='text of your own, in the tokens of a pretrained model')
    parser.add_argument('inputs', nargs='+', help='text files, or folders of .txt files')
    parser.add_argument('--tokenizer', default='gpt2', help='a model or a folder, as GPT.from_pretrained takes it')
    parser.add_argument('--name', default='text', help='the folder of data/ that is written')
    args = parser.parse_args()
    if not re.fullmatch(r'[\w-]+', args.name):
        parser.error(f'--name={args.name}: give the name of a folder of data/, of letters, digits, - and _')
    folder = HERE.parent / args.name
    folder.mkdir(exist_ok=True)
    prepare(args.inputs, args.tokenizer, folder)
