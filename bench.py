"""
What reversibility costs and saves, beside a standard GPT that stores its activations, or checkpoints them
(evaluates every block again in the backward pass). All have the same weights and tokens.

    python bench.py depth --shape=gpt2              # memory against the number of layers
    python bench.py batch --shape=gpt2 --budget_gb=[24,80]          # the largest batch under a budget
    python bench.py length --shape=gpt2 --budget_gb=24              # the longest context, at a batch of one
    python bench.py frontier --shape=gpt2           # memory against work, for seven numbers of stored layers
    python bench.py curve --shape=gpt2              # memory over time, within one step
    python bench.py check --shape=gpt2 --device=cpu # counted memory beside what a process takes, on Linux
    python bench.py throughput                      # tokens/s at equal batch; with --budget_gb at the largest
    python bench.py throughput --cases=nanogpt,standard --nanogpt=../nanoGPT/model.py       # its own code

On a GPU memory is measured, and a budget is a hard limit. Elsewhere, and in frontier, curve and check, it is
counted (memory.py): live bytes of two steps of AdamW, eager. For time the cases take turns.
"""
import ctypes
import gc
import math
import subprocess
import sys
import time
from bisect import bisect_right
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from itertools import product

import numpy as np
import torch

from configurator import configure
from memory import Count, count_two_steps
from model import GPT, GPTConfig
from results.rivals import checkpoint_in_slices, nanogpt, revlib
from results.table import open_table, provenance, spread
from runtime import adamw, count_parameters, start

@dataclass
class Knobs:
    cases: str = 'standard,checkpointed,checkpointed/sliced,checkpointed/bf16,leapfrog'
    shape: str = ''                 # a key of SHAPES, in place of block_size to vocab_size
    batch_size: int = 8
    block_size: int = 256
    n_layer: int = 12
    n_head: int = 4
    n_embd: int = 256
    vocab_size: int = 256
    layers: list | None = None      # depth, batch, frontier, curve: the numbers of layers
    budget_gb: float | list | None = None       # batch, length (None: 24), throughput: GB that may be used
    search: bool = True             # on a GPU; False: the largest batch is the counted one, and not tried
    chunked_loss: bool = True       # False: all logits at once
    slice_tokens: int = 8192        # tokens that f sees at a time, about
    repeats: int = 7                # throughput: timed turns, after one turn to warm up
    processor_time: bool = False    # throughput: CPU seconds of forward and backward only, for one thread
    nanogpt: str = ''               # nanoGPT's model.py, for the case of this name
    json: str | None = None         # a file for the rows
    compile: bool = False           # what is measured; what is counted is eager
    device: str = 'auto'
    dtype: str = 'bfloat16'

LLAMA = dict(norm='rmsnorm', mlp='swiglu', bias=False, vocab_size=49152, block_size=2048)
SHAPES = {
    'gpt2': dict(n_layer=12, n_head=12, n_embd=768, vocab_size=50304, block_size=1024),
    'gpt2-large': dict(n_layer=36, n_head=20, n_embd=1280, vocab_size=50304, block_size=1024),
    'paper': dict(n_layer=16, n_head=8, n_embd=512, vocab_size=50304, block_size=1024),     # its table 4
    'smollm2-135m': dict(LLAMA, n_layer=30, n_head=9, n_kv_head=3, n_embd=576, n_inner=1536, rope_theta=1e5),
    'smollm2-1.7b': dict(LLAMA, n_layer=24, n_head=32, n_embd=2048, n_inner=8192, rope_theta=1.3e5),
    'tinyllama': dict(LLAMA, n_layer=22, n_head=32, n_kv_head=4, n_embd=2048, n_inner=5632, rope_theta=1e4,
                      tied=False, vocab_size=32000)}
# stored: the part of the layers that keep their graphs; dial: as many as fit into checkpointing's memory.
# stream: checkpointing works in slices, as ours, on a residual stream of this dtype, and what it keeps may be
# moved to the host. WHOLE: the MLP sees whole sequences; else tiles of those that are longer than a slice
WHOLE = dict(scheme='standard', slice_tokens=10**9)
BF16 = dict(scheme='standard', stream=torch.bfloat16)
CASES = {'standard': dict(WHOLE, stored=1), 'standard/half': dict(WHOLE, stored=0.5), 'checkpointed': WHOLE,
         'checkpointed/sliced': dict(WHOLE, stream=torch.float32), 'checkpointed/bf16': WHOLE | BF16,
         'checkpointed/bf16/tiled': BF16, 'checkpointed/host': dict(BF16, host=True),
         'nanogpt': dict(WHOLE, stored=1), 'revlib': WHOLE}
ENDS = {'': {}, '/half': dict(stored=0.5), '/all': dict(stored=1), '/float': dict(exact=False), '/dial': {}}
for scheme in ('midpoint', 'leapfrog', 'symplectic', 'midpoint_a', 'midpoint_sum'):
    a = 0.5 if scheme == 'midpoint_a' else None
    CASES |= {scheme + end: dict(fields, scheme=scheme, a=a) for end, fields in ENDS.items()}
CASES |= {f'midpoint_a/{bits}bits': dict(scheme='midpoint_a', a=1 / 2**bits) for bits in (8, 4, 2, 0)}
MODES = 'depth', 'batch', 'length', 'frontier', 'curve', 'check', 'throughput', 'resident'

mode = next((arg for arg in sys.argv[1:] if not arg.startswith('-')), '')
knobs = configure(Knobs, [arg for arg in sys.argv[1:] if arg != mode])
cases = knobs.cases.split(',')
for name, known in [(mode, MODES), (knobs.shape or 'gpt2', SHAPES), *((case, CASES) for case in cases)]:
    if name not in known:
        raise ValueError(f"unknown name '{name}': choose one of {', '.join(known)}")
if 'nanogpt' in cases and not knobs.nanogpt:
    raise ValueError("the case 'nanogpt' needs nanoGPT's model: give it as --nanogpt=../nanoGPT/model.py")
own = {name: value for name, value in vars(knobs).items() if name in GPTConfig.__dataclass_fields__}
shape = {**own, **SHAPES.get(knobs.shape, {})}
layers = knobs.layers or ([12, 24, 48] if mode == 'depth' else [shape['n_layer']])
budgets = [knobs.budget_gb] if isinstance(knobs.budget_gb, float) else knobs.budget_gb
here = start(knobs)
row = open_table(knobs.json, provenance(here, knobs))

# -----------------------------------------------------------------------------
# models, steps, and the bytes that they take

def build(name, device=None, **change):
    """The model of this case, with weights from a seed."""
    fields = {**shape, **CASES[name], **change}
    stream = fields.pop('stream', None)
    host = fields.pop('host', False)
    stored_layers = int(fields.pop('stored', 0) * fields['n_layer'])
    if name.endswith('/dial'):
        key = lambda n: needs(name.removesuffix('/dial'), stored_layers=n)
        stored_layers = bisect_right(range(1, shape['n_layer'] + 1), needs('checkpointed'), key=key)
    fields.setdefault('stored_layers', stored_layers)
    config = GPTConfig(**fields)
    torch.manual_seed(0)
    with torch.device(device or here.device):
        model = nanogpt(knobs.nanogpt, config) if name == 'nanogpt' else GPT(config)
    if name == 'revlib':
        model.integrate = revlib(model)
    if stream:
        model.integrate = partial(checkpoint_in_slices, model, knobs.slice_tokens, stream, host)
    if not knobs.chunked_loss and name != 'nanogpt':
        model.loss = partial(model.loss, chunk=10**9)
    if knobs.compile and device is None:
        model.compile_parts()
    return model

def size(n):
    return (1, 128 * n) if mode == 'length' else (n, shape['block_size'])               # (B, T)

def train(model, optimizer, n, steps):
    """Seconds that these steps take, on random tokens."""
    torch.manual_seed(0)                        # the same for all cases
    x, y = torch.randint(shape['vocab_size'], (2, *size(n)), device=here.device)
    clock = time.process_time if knobs.processor_time else time.perf_counter
    began = clock()
    for _ in range(steps):
        with here.autocast:
            loss = model(x, y)[1]
        loss.backward()
        if not knobs.processor_time:
            optimizer.step()
        optimizer.zero_grad()
    if here.kind == 'cuda':
        torch.cuda.synchronize()
    return clock() - began

@lru_cache(maxsize=16)
def counted(name, n=knobs.batch_size, **change):
    B, T = size(n)
    return count_two_steps(partial(build, name, device='cpu', block_size=T, **change), B, T, knobs.dtype)

def needs(name, n=knobs.batch_size, **change):
    """Bytes at the peak: counted, or of a step on a GPU; inf if it runs out of memory."""
    if here.kind != 'cuda':
        return counted(name, n, **change).curve().max()
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        model = build(name, block_size=size(n)[1], **change)
        optimizer = adamw(model)
        train(model, optimizer, 1, 1)           # makes AdamW's moments: then a single step has the peak
        train(model, optimizer, n, 1)
    except torch.OutOfMemoryError:
        return math.inf
    return torch.cuda.max_memory_allocated()

def line(name, **change):
    """
    Fixed bytes, and bytes per n, of each phase of two steps; backward has one per gradient. Beyond a few
    slices, each further one adds the same to a phase, so two n determine the line.
    """
    few = 4 * max(1, knobs.slice_tokens // math.prod(size(1)))
    counts = [counted(name, n, **change) for n in (few, 2 * few)]
    one, two = (np.maximum.reduceat(x.curve(), [0, *(time for _, time in x.marks)]) for x in counts)
    return 2 * one - two, (two - one) / few

def on_host(name, n, **change):
    """MB that a case keeps in its host's memory, and those that a step moves: both are in proportion to n."""
    if not CASES[name].get('host'):
        return {}
    one = counted(name, 1, **change)
    return {'host MB per sequence': n * one.curve('host').max() / 1e6,
            'moved MB per sequence': n * one.moved / 1e6}

@cache
def largest(name, gigabytes, **change):
    """The largest n whose counted peak fits; or on a GPU, to a 32nd, that survives a step."""
    fixed, each = line(name, **change)
    room = gigabytes * 1e9
    n = int(((room - fixed)[each > 0] // each[each > 0]).min())
    if here.kind == 'cuda' and knobs.search:     # near the counted n: a large batch takes a minute to try
        torch.cuda.set_per_process_memory_fraction(room / torch.cuda.mem_get_info()[1])
        survives = cache(lambda n: needs(name, n, **change) <= room)
        step = max(1, n // 32)
        while n > 0 and not survives(n):
            n -= step
        while n > 0 and survives(n + step):
            n += step
    return max(0, n)

# -----------------------------------------------------------------------------
# the modes

def depth():
    for name in cases:
        if here.kind == 'cuda':                  # all but weights, gradients and moments
            fixed = [16 * count_parameters(build(name, 'meta', n_layer=n)) for n in layers]
            peaks = [needs(name, n_layer=n) - each for n, each in zip(layers, fixed)]
        else:
            peaks = [counted(name, n_layer=n).curve('activations').max() for n in layers]
        row(name, **{'MB per layer': round(np.polyfit(layers, peaks, 1)[0]) / 1e6},
            **{f'{n} layers': peak / 1e6 for n, peak in zip(layers, peaks)},
            **on_host(name, 1, n_layer=max(layers)), layers=layers)

def batch():
    for n, gigabytes, name in product(layers, budgets or [24.0], cases):
        found = largest(name, gigabytes, n_layer=n)
        standard = largest('standard', gigabytes, n_layer=n)
        row(name, **{'layers': n, 'GB': gigabytes, 'batch': found or 'does not fit',
                     'MB per sequence': line(name, n_layer=n)[1].max() / 1e6,
                     'to standard': found / standard if standard else None}, **on_host(name, 1, n_layer=n))

def length():
    for gigabytes, name in product(budgets or [24.0], cases):
        found = largest(name, gigabytes)
        row(name, GB=gigabytes, length=128 * found or 'does not fit', **on_host(name, found))

def frontier():
    for n, name in product(layers, cases):
        standard = counted('standard', n_layer=n)
        for stored in sorted({round(n * part / 6) for part in range(7)}):
            row(name, **{'layers': n, 'stored layers': stored,
                         'MB per sequence': line(name, n_layer=n, stored_layers=stored)[1].max() / 1e6,
                         'work': counted(name, n_layer=n, stored_layers=stored).work / standard.work})

def curve():
    """Memory above weights and optimizer, over the second step."""
    for n, name in product(layers, cases):
        count = counted(name, n_layer=n)
        first, last = (time for kind, time in count.marks if kind == 'step')
        _, turn = (time for kind, time in count.marks if kind == 'backward')
        live = (count.curve('gradients', 'activations')[first:last] / 1e6).tolist()
        width = math.ceil(len(live) / 300)
        pieces = [live[i:i + width] for i in range(0, len(live), width)]
        row(name, **{'layers': n, 'peak MB': max(live), 'forward': (turn - first) / len(live)},
            lowest=[min(piece) for piece in pieces], highest=[max(piece) for piece in pieces])

def check():
    """Counted memory beside the peak of a new process, above what it had before its model."""
    for name in cases:
        child = [sys.executable, __file__, 'resident', *sys.argv[2:], f'--cases={name}', '--json=None']
        found = int(subprocess.check_output(child, text=True).split()[-1])
        expected = counted(name).curve(*Count.DEVICE, 'host').max()
        row(name, **{'counted MB': expected / 1e6, 'resident MB': found / 1e6, 'ratio': found / expected})

def resident():
    ctypes.CDLL(None).mallopt(-3, 65536)        # or glibc keeps free blocks of this size and more for reuse
    before = status('VmRSS')
    model = build(cases[0])
    train(model, adamw(model), knobs.batch_size, 2)
    print(status('VmHWM') - before)

def status(key):
    with open('/proc/self/status') as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(key))

def throughput():
    for gigabytes in budgets or [None]:
        sizes = {name: largest(name, gigabytes) if gigabytes else knobs.batch_size for name in cases}
        weights = build('standard').state_dict(keep_vars=True)
        models = {name: build(name) for name in cases}
        for model in models.values():           # all models share their weights
            model.load_state_dict(weights, assign=True)
        optimizer = adamw(model)
        # seconds per token; the first three stay empty if they are no cases
        times = {name: [] for name in ('standard', 'checkpointed', 'nanogpt', *cases)}
        for turn in range(1 + knobs.repeats):
            for name in [name for name in cases[::1 if turn % 2 else -1] if sizes[name]]:
                torch.cuda.empty_cache()
                train(models[name], optimizer, sizes[name], 1)      # fills the allocator, and compiles
                seconds = train(models[name], optimizer, sizes[name], 3)
                if turn:
                    times[name].append(seconds / (3 * sizes[name] * shape['block_size']))
        for name in cases:
            ratio = {other: [x / y for x, y in zip(times[name], times[other])] for other in times}   # by turn
            row(name, GB=gigabytes, batch=sizes[name] or 'does not fit',
                **{'stored layers': models[name].config.stored_layers},
                **spread(['tokens/s', 'lowest', 'highest'], [1 / x for x in times[name]]),
                **spread(['time to standard', 'least', 'most'], ratio['standard']),
                **spread(['time to checkpointed'], ratio['checkpointed']),
                **spread(['time to nanogpt', 'lower quartile', 'upper quartile'], ratio['nanogpt'], 0.25),
                all_seconds=[x * sizes[name] * shape['block_size'] for x in times[name]])
        models = model = optimizer = weights = None     # leaves the GPU to the next budget

globals()[mode]()
