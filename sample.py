"""
Writes text with a model that train.py has trained.

    python sample.py --init_from=out_python/best.pt --prompt="def main(" --max_new_tokens=300
    python sample.py --temperature=0            # always the likeliest token
"""
import sys
from dataclasses import dataclass

import torch

from configurator import configure, machine
from model import GPT, GPTConfig, load_checkpoint

@dataclass
class Knobs:
    init_from: str = 'out/best.pt'          # a checkpoint of train.py
    prompt: str = '\n'
    num_samples: int = 1
    max_new_tokens: int = 300
    temperature: float = 0.8                # below 1: safer, above: wilder, 0: always the likeliest token
    top_k: int | None = 200                 # draw from the k likeliest tokens alone; None: from all
    seed: int = 1337
    device: str = 'auto'                    # 'cuda', 'mps', 'cpu'
    dtype: str = 'auto'                     # 'float32', 'bfloat16', 'float16'

def tokenizer(meta):
    """(text -> tokens, tokens -> text), as the data set was encoded; meta is its meta.json."""
    if meta['encoding'] == 'bytes':
        return lambda text: list(text.encode(errors='surrogateescape')), lambda tokens: bytes(tokens).decode(errors='replace')
    if meta['encoding'] == 'chars':
        chars = meta['chars']
        return lambda text: [chars.index(c) for c in text], lambda tokens: ''.join(chars[i] for i in tokens)
    import requests
    import tiktoken
    try:
        gpt2 = tiktoken.get_encoding('gpt2')
    except requests.RequestException as error:
        sys.exit(f"GPT-2's vocabulary could not be downloaded ({type(error).__name__}): sample once while connected")
    return lambda text: gpt2.encode(text, allowed_special='all'), gpt2.decode

if __name__ == '__main__':
    knobs = configure(Knobs, sys.argv[1:])
    kind, dtype, reasons = machine(knobs.device, knobs.dtype)
    print(reasons)
    try:
        checkpoint = load_checkpoint(knobs.init_from)
    except ValueError as error:
        sys.exit(f'{error}; name another with --init_from=...')
    meta = checkpoint['meta']
    if not knobs.prompt:
        sys.exit('the prompt is empty: give at least one character, such as a newline')
    if meta['encoding'] == 'chars' and (unknown := set(knobs.prompt) - set(meta['chars'])):
        sys.exit(f"the model knows no {', '.join(map(repr, sorted(unknown)))}: its characters are {meta['chars']!r}")
    if knobs.temperature < 0 or knobs.top_k is not None and knobs.top_k < 1:
        sys.exit('temperature must be 0 or more, and top_k 1 or more, or None')
    if knobs.num_samples < 1 or knobs.max_new_tokens < 1:
        sys.exit('num_samples and max_new_tokens must be 1 or more')

    model = GPT(GPTConfig(**checkpoint['config'])).to(kind).eval()
    model.load_state_dict(checkpoint['model'])
    torch.manual_seed(knobs.seed)
    encode, decode = tokenizer(meta)
    idx = torch.tensor([encode(knobs.prompt)] * knobs.num_samples, device=kind)         # (num_samples, T)
    with torch.autocast(kind, getattr(torch, dtype), enabled=dtype != 'float32'):
        idx = model.generate(idx, knobs.max_new_tokens, knobs.temperature, knobs.top_k, meta['vocab_size'])
    for tokens in idx.tolist():
        print('-' * 80)
        print(decode(tokens))
