"""
What reversibility costs and saves, against what one would use instead: a standard GPT with the same weights on the same
tokens, that stores its activations, or checkpoints them (stored_layers=0: every block is evaluated again).

    python bench.py step            # time of forward and backward at equal batch, as ratios to stored standard
    python bench.py depth           # peak memory against the number of layers
    python bench.py sample --n_layer=12 --n_head=12 --n_embd=768 --vocab_size=50257 --block_size=1024 --dtype=float32
    python bench.py step --vocab_size=50304 --n_layer=24        # any of the knobs below

The models take turns, and each ratio is between neighbours in time, because a shared machine changes its speed. On a
CPU memory is that of a fresh process, above what it had just before the forward pass. `sample` writes text, with cached
keys and values and without, beside transformers' generate() on the same weights where that package is installed.
"""
import importlib.util
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial

import torch
from tqdm import tqdm

from configurator import configure, machine
from model import GPT, GPTConfig
from pretrained import turn_weights

@dataclass
class Knobs:
    batch_size: int = 8
    block_size: int = 256
    n_layer: int = 12
    n_head: int = 4
    n_embd: int = 256
    vocab_size: int = 256
    bias: bool = True
    layers: list | None = None      # depth: the numbers of layers, two or more; None: 2, 4, 8, 16
    repeats: int = 15               # step, sample: turns that count, after three that do not, or one
    new_tokens: int = 512           # sample: after a prompt of one
    compile: bool = False
    device: str = 'auto'            # 'cuda', 'mps', 'cpu'
    dtype: str = 'bfloat16'         # 'float32', 'bfloat16', 'float16'

CASES = {
    'standard, stored': dict(scheme='standard'),
    'standard, checkpointed': dict(scheme='standard', stored_layers=0),
    'midpoint': dict(scheme='midpoint'),
    'midpoint, float states': dict(scheme='midpoint', exact=False),
    'leapfrog': dict(scheme='leapfrog'),
    'leapfrog, float states': dict(scheme='leapfrog', exact=False),
    'symplectic': dict(scheme='symplectic'),
    'symplectic, float states': dict(scheme='symplectic', exact=False),
    'midpoint_a, a = 1/2': dict(scheme='midpoint_a', a=0.5),
}

mode = sys.argv[1] if len(sys.argv) > 1 else ''
knobs = configure(Knobs, sys.argv[1:] if mode.startswith('-') else sys.argv[2:])
if knobs.layers is not None and len(knobs.layers) < 2:
    sys.exit(f'layers = {knobs.layers}: give two numbers or more, as in --layers=[2,12]')
kind, dtype, reasons = machine(knobs.device, knobs.dtype)
shape = {name: getattr(knobs, name) for name in ('block_size', 'n_layer', 'n_head', 'n_embd', 'vocab_size', 'bias')}

def build(**case):
    torch.manual_seed(0)
    try:
        model = GPT(GPTConfig(**{**shape, **case})).to(kind)
    except ValueError as error:
        sys.exit(str(error))
    if knobs.compile:
        model.compile()
    return model

def forward_backward(model):
    """Of one batch of random tokens: the loss does not matter here, the work is the same."""
    torch.manual_seed(1)
    idx = torch.randint(knobs.vocab_size, (knobs.batch_size, knobs.block_size), device=kind)
    with torch.autocast(kind, getattr(torch, dtype), enabled=dtype != 'float32'):
        loss = model(idx, idx)[1]
    loss.backward()

def seconds(model):
    model.zero_grad(set_to_none=True)
    start = time.perf_counter()
    forward_backward(model)
    if kind == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter() - start

def step():
    models = {name: build(**case) for name, case in CASES.items()}
    times = {name: [] for name in models}
    for turn in tqdm(range(3 + knobs.repeats), leave=False):
        for name in list(models)[::1 if turn % 2 else -1]:
            times[name].append(seconds(models[name]))
    times = {name: values[3:] for name, values in times.items()}
    print(f'{"":26}{"seconds":>9}{"ratio":>8}   lowest to highest ratio of {knobs.repeats} turns')
    for name, values in times.items():
        ratios = [a / b for a, b in zip(values, times['standard, stored'])]
        print(f'{name:26}{statistics.median(values):9.3f}{statistics.median(ratios):8.3f}   '
              f'{min(ratios):.3f} to {max(ratios):.3f}')
    for scheme in ('midpoint', 'leapfrog', 'symplectic'):
        ratio = statistics.median(a / b for a, b in zip(times[scheme], times[f'{scheme}, float states']))
        print(f'{scheme}: exact takes {ratio:.3f} of the time of float states')

def status(key):
    """Bytes, from Linux's account of this process."""
    with open('/proc/self/status') as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) * 1024

def peak(name):
    """Bytes that one forward and backward pass of this case needs above the weights, measured in this process."""
    model = build(**CASES[name])
    if kind == 'cuda':
        forward_backward(model)             # the first one also allocates the libraries' work spaces
        model.zero_grad(set_to_none=True)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        forward_backward(model)
        return torch.cuda.max_memory_allocated() - before
    before = status('VmRSS')
    forward_backward(model)
    return status('VmHWM') - before

def depth():
    layers = knobs.layers or [2, 4, 8, 16]
    print(f'{"MB above the weights":26}' + ''.join(f'{n:>7} layers' for n in layers) + f'{"a layer":>10}')
    gradients = 4 * sum(w.numel() for w in build(n_layer=1, scheme='standard').transformer.h[0].parameters())
    for name in (name for name in CASES if 'float' not in name):
        peaks = []
        for n in tqdm(layers, leave=False):
            # glibc keeps freed blocks smaller than this for reuse, which would look like use
            environment = dict(os.environ, MALLOC_MMAP_THRESHOLD_='65536')
            flags = [arg for arg in sys.argv[2:] if not arg.startswith('--layers')] + [f'--n_layer={n}']
            output = subprocess.run([sys.executable, __file__, f'peak:{name}', *flags], env=environment, check=True,
                                    capture_output=True, text=True).stdout
            peaks.append(int(output.split()[-1]))
        slope = (peaks[-1] - peaks[0]) / (layers[-1] - layers[0])
        print(f'{name:26}' + ''.join(f'{x / 1e6:14.1f}' for x in peaks) + f'{slope / 1e6:10.2f}')
    print(f'of which the gradients of the weights of a layer: {gradients / 1e6:.2f}')

def of_transformers(model):
    """The same weights in transformers' GPT-2."""
    import transformers
    config = transformers.GPT2Config(vocab_size=knobs.vocab_size, n_positions=knobs.block_size, n_embd=knobs.n_embd,
                                     n_layer=knobs.n_layer, n_head=knobs.n_head, eos_token_id=None, bos_token_id=None)
    theirs = transformers.GPT2LMHeadModel(config).to(kind).eval()
    theirs.load_state_dict({name: weight.t() if '.h.' in name and weight.dim() == 2 else weight      # Conv1D: (in, out)
                            for name, weight in model.state_dict().items()})
    return theirs

def sample():
    if knobs.new_tokens >= knobs.block_size or knobs.repeats < 1 or not knobs.bias:
        sys.exit(f'new_tokens = {knobs.new_tokens} must be below block_size = {knobs.block_size}, repeats 1 or more, and bias '
                 'True, as in GPT-2')
    models = {scheme: build(scheme=scheme).eval() for scheme in ('standard', 'leapfrog', 'symplectic')}
    model = models['standard']
    theirs = of_transformers(model) if importlib.util.find_spec('transformers') else None
    if kind == 'cpu':                       # as sample.py does
        for one in models.values():
            turn_weights(one)
    idx = torch.zeros(1, 1, dtype=torch.long, device=kind)
    cases = {'standard, cached': lambda: model.generate(idx, knobs.new_tokens, temperature=0),
             'standard, not cached': lambda: model.generate(idx, knobs.new_tokens, temperature=0, cached=False)}
    for scheme in ('leapfrog', 'symplectic'):
        cases[f'{scheme}, cached'] = partial(models[scheme].generate, idx, knobs.new_tokens, temperature=0)
    if theirs:
        cases['transformers, cached'] = lambda: theirs.generate(
            idx, attention_mask=torch.ones_like(idx), max_new_tokens=knobs.new_tokens, do_sample=False, pad_token_id=0)
    times, texts = {name: [] for name in cases}, {}
    for turn in tqdm(range(1 + knobs.repeats), leave=False):
        for name in list(cases)[::1 if turn % 2 else -1]:
            if 'not' in name and turn != 1:         # it takes minutes
                continue
            start = time.perf_counter()
            with torch.autocast(kind, getattr(torch, dtype), enabled=dtype != 'float32'):
                texts[name] = cases[name]().tolist()
            if turn:
                times[name].append(time.perf_counter() - start)
    reference = 'transformers, cached' if 'transformers, cached' in cases else 'standard, cached'
    print(f'{"":26}{"seconds":>9}{"tokens/s":>10}{"ratio":>8}   to {reference}; lowest to highest of {knobs.repeats} turns, not cached: 1')
    for name, values in times.items():
        ratios = [a / b for a, b in zip(values, times[reference])]
        print(f'{name:26}{statistics.median(values):9.2f}{knobs.new_tokens / statistics.median(values):10.1f}'
              f'{statistics.median(ratios):8.3f}   {min(ratios):.3f} to {max(ratios):.3f}')
    same = all(texts[name] == texts['standard, cached'] for name in texts if name.startswith(('standard', 'transformers')))
    print('the tokens of standard, cached or not, and of transformers are ' + ('the same' if same else 'NOT the same'))

if mode.removeprefix('peak:') in CASES:         # what depth calls
    print(peak(mode.removeprefix('peak:')))
elif mode in ('step', 'depth', 'sample'):
    print(reasons)
    {'step': step, 'depth': depth, 'sample': sample}[mode]()
else:
    sys.exit(f"unknown mode '{mode}': write python bench.py step, depth or sample")
