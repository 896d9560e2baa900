"""
Seconds to write text with cached keys and values, and without, beside transformers' generate() on the same
weights, if that package is there. GPT-2 small's shape, random weights, a prompt of one token, greedy.

    pip install transformers && python results/sampling.py --device=cpu --dtype=float32 --repeats=3
"""
import os
import sys
import time
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
from tqdm import tqdm

sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from configurator import configure
from model import GPT, GPTConfig
from pretrained import turn_weights
from results.table import open_table, provenance, spread
from runtime import start

@dataclass
class Knobs:
    new_tokens: int = 512           # below block_size
    repeats: int = 7                # timed turns, after one turn to warm up
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    vocab_size: int = 50257
    block_size: int = 1024
    json: str | None = None         # a file for the rows
    device: str = 'auto'            # 'cuda', 'cpu'
    dtype: str = 'bfloat16'         # 'float32', 'bfloat16', 'float16'

knobs = configure(Knobs, sys.argv[1:])
here = start(knobs)

def build(scheme):
    sizes = {name: getattr(knobs, name) for name in 'n_layer n_head n_embd vocab_size block_size'.split()}
    torch.manual_seed(0)                    # below: GPT-2's GELU
    return GPT(GPTConfig(scheme=scheme, gelu='tanh', **sizes)).to(here.device).eval()

def not_cached(model, idx):
    """generate() without a cache: every token is computed from all tokens."""
    with torch.no_grad():
        for _ in range(knobs.new_tokens):
            logits, _ = model(idx)                                                      # (B, 1, V)
            idx = torch.cat((idx, logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    return idx

def of_transformers(model):
    """The same weights in transformers' GPT-2."""
    import transformers                     # an optional package
    config = transformers.GPT2Config(
        vocab_size=knobs.vocab_size, n_positions=knobs.block_size, n_embd=knobs.n_embd, n_layer=knobs.n_layer,
        n_head=knobs.n_head, eos_token_id=None, bos_token_id=None)
    weights = model.state_dict()
    for name, weight in weights.items():
        if '.h.' in name and weight.dim() == 2:
            weights[name] = weight.t()      # its Conv1D: (in, out)
    theirs = transformers.GPT2LMHeadModel(config).to(here.device).eval()
    theirs.load_state_dict(weights)
    return theirs

row = open_table(knobs.json, provenance(here, knobs))
torch.backends.cuda.enable_cudnn_sdp(False)         # as sample.py does, and below
models = {scheme: build(scheme) for scheme in ('standard', 'leapfrog', 'symplectic')}
theirs = of_transformers(models['standard']) if find_spec('transformers') else None
if here.kind == 'cpu':
    for model in models.values():
        turn_weights(model)
idx = torch.zeros(1, 1, dtype=torch.long, device=here.device)
writers = {f'{scheme}, cached': partial(model.generate, idx, knobs.new_tokens, temperature=0)
           for scheme, model in models.items()}
writers['standard, not cached'] = partial(not_cached, models['standard'], idx)
reference = 'standard, cached'
if theirs:
    reference = 'transformers'
    writers['transformers'] = partial(
        theirs.generate, idx, attention_mask=torch.ones_like(idx), max_new_tokens=knobs.new_tokens,
        do_sample=False, pad_token_id=0)
times = {name: [] for name in writers}
texts = {}
for turn in tqdm(range(1 + knobs.repeats), leave=False):
    for name in list(writers)[::1 if turn % 2 else -1]:
        if name == 'standard, not cached' and turn != 1:        # it takes minutes
            continue
        began = time.perf_counter()
        with here.autocast:
            texts[name] = writers[name]().tolist()
        if turn:
            times[name].append(time.perf_counter() - began)
for name, seconds in times.items():
    ratios = [a / b for a, b in zip(seconds, times[reference])]
    row(name, **spread(['seconds'], seconds), **spread(['tokens/s'], [knobs.new_tokens / x for x in seconds]),
        **spread([f'time to {reference}', 'lowest', 'highest'], ratios), all_seconds=seconds)
same = all(texts[name] == texts['standard, cached'] for name in ('standard, not cached', reference))
verdict = 'the same' if same else 'NOT the same'
print(f'the tokens of standard, cached or not, and of transformers are {verdict}')
