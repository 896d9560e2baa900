"""
Seconds to write text with cached keys and values, and without, beside transformers' generate() on the same weights, if that
package is there. GPT-2 small's shape, random weights, a prompt of one token, greedy.

    pip install transformers && python results/sampling.py --device=cpu --dtype=float32 --repeats=3
"""
import importlib.util
import os
import statistics
import sys
import time
from dataclasses import dataclass
from functools import partial

import torch
from tqdm import tqdm

sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))        # the root of the repository
from configurator import configure
from model import GPT, GPTConfig
from pretrained import turn_weights
from runtime import fail, open_table, provenance, start

@dataclass
class Knobs:
    new_tokens: int = 512
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
if knobs.new_tokens >= knobs.block_size or knobs.new_tokens < 1 or knobs.repeats < 1:
    fail(f'new_tokens = {knobs.new_tokens} must be below block_size = {knobs.block_size}; new_tokens and repeats must be 1 or more')

def build(scheme):
    torch.manual_seed(0)
    try:
        return GPT(GPTConfig(scheme=scheme, **{name: getattr(knobs, name) for name in (
            'n_layer', 'n_head', 'n_embd', 'vocab_size', 'block_size')})).to(here.device).eval()
    except ValueError as error:
        fail(str(error))

def of_transformers(model):
    """The same weights in transformers' GPT-2."""
    import transformers
    config = transformers.GPT2Config(vocab_size=knobs.vocab_size, n_positions=knobs.block_size, n_embd=knobs.n_embd,
                                     n_layer=knobs.n_layer, n_head=knobs.n_head, eos_token_id=None, bos_token_id=None)
    theirs = transformers.GPT2LMHeadModel(config).to(here.device).eval()
    theirs.load_state_dict({name: weight.t() if '.h.' in name and weight.dim() == 2 else weight      # Conv1D: (in, out)
                            for name, weight in model.state_dict().items()})
    return theirs

row = open_table(knobs.json, provenance(here, knobs))
torch.backends.cuda.enable_cudnn_sdp(False)         # as sample.py does, and below
models = {scheme: build(scheme) for scheme in ('standard', 'leapfrog', 'symplectic')}
standard = models['standard']
theirs = of_transformers(standard) if importlib.util.find_spec('transformers') else None
if here.kind == 'cpu':
    for model in models.values():
        turn_weights(model)
idx = torch.zeros(1, 1, dtype=torch.long, device=here.device)
writers = {f'{scheme}, cached': partial(model.generate, idx, knobs.new_tokens, temperature=0)
           for scheme, model in models.items()}
writers['standard, not cached'] = partial(standard.generate, idx, knobs.new_tokens, temperature=0, cached=False)
if theirs:
    writers['transformers'] = lambda: theirs.generate(
        idx, attention_mask=torch.ones_like(idx), max_new_tokens=knobs.new_tokens, do_sample=False, pad_token_id=0)
times, texts = {name: [] for name in writers}, {}
for turn in tqdm(range(1 + knobs.repeats), leave=False):
    for name in list(writers)[::1 if turn % 2 else -1]:
        if 'not' in name and turn != 1:     # it takes minutes
            continue
        began = time.perf_counter()
        with here.autocast:
            texts[name] = writers[name]().tolist()
        times[name] += [time.perf_counter() - began] * (turn > 0)
reference = 'transformers' if theirs else 'standard, cached'
for name, seconds in times.items():
    ratios = [a / b for a, b in zip(seconds, times[reference])]
    row(name, **{'seconds': statistics.median(seconds), 'tokens/s': knobs.new_tokens / statistics.median(seconds),
                 f'time to {reference}': statistics.median(ratios), 'lowest': min(ratios), 'highest': max(ratios)},
        all_seconds=seconds)
same = all(texts[name] == texts['standard, cached'] for name in texts if name.startswith(('standard', 'transformers')))
print('the tokens of standard, cached or not, and of transformers are ' + ('the same' if same else 'NOT the same'))
