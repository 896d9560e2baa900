"""
What reversibility costs and saves, compared with a standard GPT that stores its activations, or checkpoints them (evaluates every
block again in the backward pass). All have the same weights and tokens.

    python bench.py depth --shape=gpt2              # memory against the number of layers
    python bench.py batch --shape=gpt2 --budget_gb=[24,80]          # the largest batch under a budget of memory
    python bench.py length --shape=gpt2 --budget_gb=24              # the longest context, at a batch of one
    python bench.py frontier --shape=gpt2           # memory against work, for seven numbers of stored layers
    python bench.py curve --shape=gpt2              # memory over time, within one step
    python bench.py check --shape=gpt2              # counted memory beside what a fresh process takes
    python bench.py throughput                      # tokens/s at equal batch; with --budget_gb at the largest of each
    torchrun --standalone --nproc_per_node=8 bench.py throughput ...            # the batch of each GPU

On a GPU memory is measured: it is what torch allocates, and a budget is a hard limit. Elsewhere it is counted (Count in
runtime.py): live bytes of two steps of AdamW, eager. An allocator's gaps, CUDA and work spaces are not in the count. GB and MB are
10^9 and 10^6 bytes. For time the cases take turns, and a ratio compares neighbouring turns. --json=FILE keeps the rows.
"""
import os
os.environ.setdefault('PYTORCH_CUDA_ALLOC_CONF', 'expandable_segments:True')    # or gaps count as memory

import gc
import importlib.util
import math
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import model as model_py
from configurator import configure
from model import GPT, GPTConfig
from runtime import (adamw, all_reduce, compile_parts, count_two_steps, fail, leave, local_rank, main, open_table,
                     provenance, rank, say, start, world)

@dataclass
class Knobs:
    cases: str = ''                 # those to run, such as standard,checkpointed,leapfrog/half; '': all that the mode has
    shape: str = ''                 # one of SHAPES, in place of block_size to bias
    batch_size: int = 8             # sequences, on each GPU
    block_size: int = 256
    n_layer: int = 12
    n_head: int = 4
    n_embd: int = 256
    vocab_size: int = 256
    bias: bool = True
    layers: list | None = None      # depth, batch, frontier, curve: the numbers of layers; None: 12, 24, 48 in depth, else n_layer
    budget_gb: float | list | None = None       # batch, length, throughput: GB that may be used; the first two need it
    chunked_loss: bool = True       # False: all logits at once, by ordinary autograd
    slice_tokens: int = 8192        # tokens that f sees at a time, about
    repeats: int = 7                # throughput: timed turns, after one turn to warm up
    processor_time: bool = False    # throughput: CPU seconds of forward and backward only; for one thread
    json: str | None = None         # a file for the rows
    compile: bool = False
    device: str = 'auto'            # 'cuda', 'cpu'
    dtype: str = 'bfloat16'         # 'float32', 'bfloat16', 'float16'

LLAMA = dict(norm='rmsnorm', mlp='swiglu', bias=False)
SHAPES = {
    'gpt2': dict(n_layer=12, n_head=12, n_embd=768, vocab_size=50304, block_size=1024),
    'gpt2-large': dict(n_layer=36, n_head=20, n_embd=1280, vocab_size=50304, block_size=1024),
    'paper': dict(n_layer=16, n_head=8, n_embd=512, vocab_size=50304, block_size=1024),         # its table 4
    'smollm2-135m': dict(n_layer=30, n_head=9, n_kv_head=3, n_embd=576, n_inner=1536, vocab_size=49152, block_size=2048,
                         rope_theta=1e5, **LLAMA),
    'smollm2-1.7b': dict(n_layer=24, n_head=32, n_embd=2048, n_inner=8192, vocab_size=49152, block_size=2048,
                         rope_theta=1.3e5, **LLAMA),
    'tinyllama': dict(n_layer=22, n_head=32, n_kv_head=4, n_embd=2048, n_inner=5632, vocab_size=32000, block_size=2048,
                      rope_theta=1e4, tied=False, **LLAMA)}

# stored: the part of the layers whose graph is stored; 'dial': as many as fit into the memory of checkpointing. rival:
# checkpointing that sees as many tokens at a time as ours, with a residual stream in this dtype
CASES = {'standard': dict(scheme='standard', stored=1), 'standard/half': dict(scheme='standard', stored=0.5),
         'checkpointed': dict(scheme='standard', stored=0),
         'checkpointed/sliced': dict(scheme='standard', stored=0, rival=torch.float32),
         'checkpointed/bf16': dict(scheme='standard', stored=0, rival=torch.bfloat16)}
SCHEMES = dict(midpoint={}, leapfrog={}, symplectic={}, midpoint_a=dict(a=0.5), midpoint_sum={})
ENDS = {'': dict(stored=0), '/half': dict(stored=0.5), '/all': dict(stored=1), '/dial': dict(stored='dial'),
        '/float': dict(stored=0, exact=False)}
if importlib.util.find_spec('revlib'):           # pip install revlib: a library of float states, here on our blocks
    CASES['revlib'] = dict(scheme='standard', stored=0, rival='revlib')
for name, scheme in SCHEMES.items():
    CASES |= {name + end: dict(scheme=name, **scheme, **change) for end, change in ENDS.items()}
CASES |= {f'midpoint_a/{bits}bits': dict(scheme='midpoint_a', a=1 / 2**bits, stored=0) for bits in (4, 0)}      # midpoint_a has 1 bit

MODES = dict(depth='standard,checkpointed,leapfrog,midpoint_a', frontier='standard,checkpointed/sliced,checkpointed/bf16,leapfrog',
             batch='standard,checkpointed,checkpointed/sliced,checkpointed/bf16,midpoint,leapfrog,symplectic',
             length='standard,checkpointed,checkpointed/sliced,leapfrog', curve='standard,checkpointed,leapfrog',
             check='standard,checkpointed,leapfrog', resident='standard', throughput=','.join(
                 ['standard', 'standard/half', 'checkpointed', 'revlib', *(a + b for a in SCHEMES for b in ENDS)]))
mode = sys.argv[1] if len(sys.argv) > 1 else ''
knobs = configure(Knobs, sys.argv[1:] if mode.startswith('-') else sys.argv[2:])
if mode not in MODES:
    sys.exit(f"unknown mode '{mode}': write python bench.py and one of {', '.join(name for name in MODES if name != 'resident')}")
budgets = knobs.budget_gb if isinstance(knobs.budget_gb, list) else [knobs.budget_gb] if knobs.budget_gb else []
# left out of a mode's cases; revlib's backward pass runs outside autocast
left_out = ['/dial'] * bool(budgets) + ['/bf16'] * (knobs.dtype != 'bfloat16') + ['revlib'] * (knobs.dtype != 'float32')
cases = (knobs.cases or ','.join(name for name in MODES[mode].split(',')
                                 if name in CASES and not name.endswith(tuple(left_out)))).split(',')
shape = SHAPES.get(knobs.shape) or {key: getattr(knobs, key) for key in (
    'block_size', 'n_layer', 'n_head', 'n_embd', 'vocab_size', 'bias')}
T, layers = shape['block_size'], knobs.layers or ([12, 24, 48] if mode == 'depth' else [shape['n_layer']])
for what, given, known in (('shape', [knobs.shape or 'gpt2'], SHAPES), ('case', cases, CASES)):
    if unknown := [name for name in given if name not in known]:
        sys.exit(f"unknown {what} '{unknown[0]}': choose among {', '.join(known)}")
if (mode != 'throughput' or budgets) and (wrong := [name for name in cases if name.endswith('/dial')]):
    sys.exit(f'{wrong[0]} is a case of throughput at equal batch alone: use the mode throughput, without --budget_gb')
if 'checkpointed/bf16' in cases and knobs.dtype != 'bfloat16':
    sys.exit(f'checkpointed/bf16 needs --dtype=bfloat16, not {knobs.dtype}')
if not all(type(n) is int and n > 0 for n in layers) or mode == 'depth' and len(set(layers)) < 2:
    sys.exit(f'layers = {layers} must be whole numbers above 0, for depth two or more that differ, as in --layers=[12,48]')
if knobs.repeats < 1:
    sys.exit(f'repeats = {knobs.repeats} must be 1 or more')
if mode in ('batch', 'length') and not budgets or not all(isinstance(gb, (int, float)) and 0 < gb < math.inf for gb in budgets):
    sys.exit('how much memory may be used? Give --budget_gb=24, or a list such as --budget_gb=[24,80]')
if world > 1 and mode not in ('batch', 'throughput'):
    sys.exit(f'{mode} measures one process: start it without torchrun')
here = start(knobs)
if mode in ('check', 'resident') and here.kind != 'cpu':
    fail(f'{mode} measures the resident memory of a process on a CPU: give --device=cpu')
if knobs.compile and (mode in ('frontier', 'curve', 'check') or here.kind != 'cuda' and (mode != 'throughput' or budgets)):
    fail('this mode counts an eager model: leave --compile out')

# -----------------------------------------------------------------------------
# models, tokens, a step

def build(name, weights=None, device=None, **change):
    """The model of this case, with weights from this seed, or those of another model: shared, not copied."""
    options = {**shape, **CASES[name], 'slice_tokens': knobs.slice_tokens, **change}
    part, rival = options.pop('stored'), options.pop('rival', None)
    options.setdefault('stored_layers', int(part * options['n_layer']) if part != 'dial' else 0)
    torch.manual_seed(0)
    try:
        config = GPTConfig(**options)
    except ValueError as error:
        fail(str(error))
    with torch.device('meta' if weights else device or here.device):
        model = GPT(config)
    if weights:
        model.load_state_dict(weights.state_dict(keep_vars=True), assign=True)
    if rival == 'revlib':
        stack = importlib.import_module('revlib').ReversibleSequential(*model.transformer.h, split_dim=-1)
        model.integrate = lambda x, cache=None: stack(torch.cat((x, x), dim=-1)).chunk(2, dim=-1)[1]
    elif rival:
        model.integrate = partial(checkpoint_in_slices, model, rival)
    if not knobs.chunked_loss:
        model.forward = lambda idx, y: (None, F.cross_entropy(model.lm_head(model.hidden(idx)).flatten(0, 1), y.flatten()))
    if knobs.compile:
        compile_parts(model)
    return model

def checkpoint_in_slices(model, dtype, x, cache=None):
    """GPT.integrate() of standard, with checkpointing in slices: x (B, T, C) -> (B, T, C)."""
    x, first_stored, n = x.to(dtype), model.config.n_layer - model.config.stored_layers, model_py.n_slices(*x.shape[:2], knobs.slice_tokens)
    for j, f, _ in model.steps():
        x = x + (f(x) if j >= first_stored else torch.cat([checkpoint(f, s, use_reentrant=False) for s in x.tensor_split(n)]))
    return x

def tokens(B, T, vocab_size=shape['vocab_size']):
    """(B, T) inputs and targets: the bytes of model.py, from other places in other processes."""
    with open(model_py.__file__, 'rb') as file:
        text = torch.tensor(list(file.read())) % vocab_size
    x = torch.stack([text[(997 * (rank * B + i) + torch.arange(T + 1)) % len(text)] for i in range(B)]).to(here.device)
    return x[:, :-1].contiguous(), x[:, 1:].contiguous()

def parallel(model, group=None):
    return model if world == 1 else DistributedDataParallel(
        model, [local_rank] if here.kind == 'cuda' else None, process_group=group, gradient_as_bucket_view=True)

def train(model, optimizer, x, y, steps):
    """Seconds that these steps take."""
    synchronize = torch.cuda.synchronize if here.kind == 'cuda' else lambda: None
    clock = time.process_time if knobs.processor_time else time.perf_counter
    synchronize()
    began = clock()
    for _ in range(steps):
        with here.autocast:
            loss = model(x, y)[1]
        here.scaler.scale(loss).backward()
        if not knobs.processor_time:
            here.scaler.step(optimizer)
            here.scaler.update()
        optimizer.zero_grad(set_to_none=True)
    synchronize()
    return clock() - began

optimizer_of = partial(adamw, weight_decay=0.1, learning_rate=1e-4, betas=(0.9, 0.95))

# -----------------------------------------------------------------------------
# memory, in bytes

def clear():
    gc.collect()
    if here.kind == 'cuda':
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

@cache
def counted(name, B, T, n_layer, **change):
    """(bytes at the peak of two steps, of activations alone, peaks of all their phases, operations of a step, bytes by kind), counted."""
    count = count_two_steps(partial(build, name, device='cpu', n_layer=n_layer, block_size=T, **change), B, T, knobs.dtype)
    curve = count.curve()
    ends = [0, *(time for _, time in count.marks), count.clock]
    phases = [int(curve[a:b + 1].max()) for a, b in zip(ends, ends[1:])]
    return int(curve.max()), int(count.curve('activations').max()), phases, count.work, count.at(curve.argmax())

def measured(name, B, T, **change):
    """The peak of three steps on a GPU, the highest of all processes: inf if one runs out of memory."""
    x, y = tokens(B, T)
    torch._dynamo.reset()
    clear()
    before = torch.cuda.memory_allocated()
    try:
        model = build(name, block_size=T, **change)
        optimizer, model = optimizer_of(model), parallel(model, alone)
        train(model, optimizer, x, y, 3)
        highest = torch.cuda.max_memory_allocated() - before
    except torch.OutOfMemoryError:
        highest = math.inf
    model = optimizer = None
    clear()
    return max(all_reduce(*[highest if r == rank else 0 for r in range(world)]))

def needs(name, B, T, n_layer=shape['n_layer'], **change):
    """The peak of training this case on B sequences of T tokens."""
    if here.kind == 'cuda':
        return measured(name, B, T, n_layer=n_layer, **change)
    return counted(name, B, T, n_layer, **change)[0]

def line(name, n_layer, **change):
    """
    (fixed bytes, bytes per sequence) of each phase of training; a backward pass has one phase per gradient. Beyond a few slices, every
    further slice adds the same to a phase, so two batches determine the line. A test compares with a third batch.
    """
    few = 4 * max(1, knobs.slice_tokens // T)
    phases = [counted(name, B, T, n_layer, **change)[2] for B in (few, 2 * few)]
    return [(2 * a - b, (b - a) / few) for a, b in zip(*phases)]

def largest(memory_of, limit, top=10**9):
    """The largest n up to top for which memory_of(n), which grows with n, is within the limit; by secants."""
    fits, fails, points, guess = 0, top + 1, [], 1
    with tqdm(leave=False, disable=not main) as bar:
        while fails - fits > 1:
            bar.set_description(f'{fits} fits, trying {guess}')
            memory = memory_of(guess)
            fits, fails = (guess, fails) if memory <= limit else (fits, guess)
            points = [*points, (guess, memory)][-2:] if memory < math.inf else points
            slope = (points[1][1] - points[0][1]) / (points[1][0] - points[0][0]) if len(points) == 2 else 0
            guess = points[1][0] + int((limit - points[1][1]) // slope) if slope > 0 else 2 * fits
            guess = max(fits + 1, min(guess, fails - 1, 8 * max(fits, 1)))
    return fits

# -----------------------------------------------------------------------------
# the modes

def cap(gigabytes):
    """From now on torch refuses to allocate more than this on the GPU."""
    total = torch.cuda.get_device_properties(here.device).total_memory
    if gigabytes * 1e9 > total:
        fail(f'budget_gb = {gigabytes}: this GPU has {total / 1e9:.1f}')
    torch.cuda.set_per_process_memory_fraction(gigabytes * 1e9 / total)

def search(name, gigabytes, n_layer=shape['n_layer']):
    """The largest batch under this budget: on a GPU one that survives three steps, elsewhere one whose counted peak fits."""
    if here.kind != 'cuda':
        return max(0, min(int((gigabytes * 1e9 - fixed) // each) for fixed, each in line(name, n_layer) if each > 0))
    cap(gigabytes)
    needs(name, 1, T, n_layer)                      # libraries allocate work spaces of their own the first time
    return largest(lambda B: needs(name, B, T, n_layer), gigabytes * 1e9)

def depth():
    for name in cases:
        peaks = []
        for n in tqdm(layers, name, leave=False, disable=not main):
            weights = sum(w.numel() for w in build(name, n_layer=n).parameters()) if here.kind == 'cuda' else 0
            peaks.append(needs(name, knobs.batch_size, T, n) - 16 * weights if weights else
                         counted(name, knobs.batch_size, T, n)[1])
        row(name, **{'MB per layer': statistics.linear_regression(layers, peaks).slope / 1e6},
            **{f'{n} layers': p / 1e6 for n, p in zip(layers, peaks)}, layers=layers)

# the paper's largest batches: for GPT-2 small at T = 1024 by budget in GB, for C = 512 under 80 GB by number of layers
PAPER = {('gpt2', gb, 12): dict(standard=a, midpoint=b) for gb, a, b in ((24, 6, 58), (40, 12, 119), (48, 15, 140), (80, 26, 257))}
PAPER |= {('paper', 80, n): dict(standard=a, midpoint=b)
          for n, a, b in ((16, 326, 1550), (32, 176, 1374), (64, 88, 1076), (96, 52, 874))}

def batch():
    for n_layer in layers:
        for gigabytes in budgets:
            reference = None
            for name in cases:
                n = search(name, gigabytes, n_layer)
                reference = n if name == 'standard' else reference
                row(name, **{'layers': n_layer, 'GB': gigabytes, 'batch': n or 'does not fit',
                             'MB per sequence': max(each for _, each in line(name, n_layer)) / 1e6 if here.kind != 'cuda' else None,
                             'to standard': n / reference if reference else None,
                             "the paper's": PAPER.get((knobs.shape, gigabytes, n_layer), {}).get(name)})

def length():
    for gigabytes in budgets:
        for name in cases:
            if here.kind == 'cuda':
                cap(gigabytes)
            n = 128 * largest(lambda n: needs(name, 1, 128 * n), gigabytes * 1e9)
            row(name, GB=gigabytes, length=n or 'does not fit')

def frontier():
    """Memory against work, from no stored layer to all."""
    for n in layers:
        reference = counted('standard', knobs.batch_size, T, n)[3]
        for name in cases:
            for stored in sorted({round(n * part / 6) for part in range(7)}):
                row(name, **{'layers': n, 'stored layers': stored,
                             'MB per sequence': max(each for _, each in line(name, n, stored_layers=stored)) / 1e6,
                             'work': counted(name, knobs.batch_size, T, n, stored_layers=stored)[3] / reference})

def curve():
    """Memory above weights and optimizer, over the second step."""
    for n in layers:
        for name in cases:
            count = count_two_steps(partial(build, name, device='cpu', n_layer=n), knobs.batch_size, T, knobs.dtype)
            start_of, end = (time for kind, time in count.marks if kind == 'step')
            turn = [time for kind, time in count.marks if kind == 'backward'][1]
            live = count.curve('gradients', 'activations')[start_of:end]
            pieces = [live[i:i + math.ceil(len(live) / 300)] for i in range(0, len(live), math.ceil(len(live) / 300))]
            row(name, **{'layers': n, 'peak MB': int(live.max()) / 1e6, 'forward': (turn - start_of) / len(live)},
                lowest=[int(piece.min()) / 1e6 for piece in pieces], highest=[int(piece.max()) / 1e6 for piece in pieces])

def check():
    """Counted memory beside the peak of a fresh process, above what it had before its model."""
    for name in cases:
        flags = [arg for arg in sys.argv[2:] if not arg.startswith(('--cases', '--json'))]
        # glibc keeps smaller free blocks for reuse; from this size on it must give them back
        child = subprocess.run([sys.executable, __file__, 'resident', *flags, f'--cases={name}'], stdout=subprocess.PIPE,
                               text=True, env=dict(os.environ, MALLOC_MMAP_THRESHOLD_='65536'))
        if child.returncode:
            fail(f'{name} failed: its own message is above')
        found, (expected, *_, kinds) = int(child.stdout.split()[-1]), counted(name, knobs.batch_size, T, shape['n_layer'])
        row(name, batch=knobs.batch_size, **{'counted MB': expected / 1e6, 'resident MB': found / 1e6, 'ratio': found / expected,
                                               **{f'{kind} MB': size / 1e6 for kind, size in kinds.items()}})

def resident():
    """The child process of check(), on Linux: prints the bytes of its peak above what it had before the model."""
    def status(key):
        with open('/proc/self/status') as file:
            return next(int(line.split()[1]) for line in file if line.startswith(key)) * 1024

    x, y = tokens(knobs.batch_size, T)
    before = status('VmRSS')
    model = build(cases[0])
    train(model, optimizer_of(model), x, y, 2)
    print(status('VmHWM') - before)

def spread(values):
    return (statistics.median(values), min(values), max(values)) if values else (None,) * 3

def throughput():
    if world > 1:
        say(f'{world} processes: batch is per process, tokens/s is the sum of all')
    for gigabytes in budgets or [None]:
        take_turns(gigabytes)

def take_turns(gigabytes):
    sizes, models, times, changes = {}, {}, {}, {name: {} for name in cases}
    try:
        for name in cases:
            sizes[name] = search(name, gigabytes) if gigabytes else knobs.batch_size
            if CASES[name]['stored'] == 'dial':
                room = needs('checkpointed', sizes[name], T)
                changes[name] = dict(stored_layers=largest(
                    lambda n: needs(name, sizes[name], T, stored_layers=n), room, shape['n_layer']))
        weights = build('standard')
        optimizer = optimizer_of(weights)
        models = {name: build(name, weights, **changes[name]) for name in cases if sizes[name]}
        times = {name: [] for name in models}
        for turn in tqdm(range(1 + knobs.repeats), leave=False, disable=not main):
            for name in list(models)[::1 if turn % 2 else -1]:
                clear()
                seconds = math.inf
                try:
                    model = parallel(models[name])
                    train(model, optimizer, *tokens(sizes[name], T), 2)     # fills the allocator, and compiles
                    seconds = train(model, optimizer, *tokens(sizes[name], T), 2) / 2
                except torch.OutOfMemoryError:
                    optimizer.zero_grad(set_to_none=True)
                model = None
                if max(all_reduce(seconds)) == math.inf:
                    sizes[name] = 0
                    del models[name], times[name]
                else:
                    times[name] += [seconds] * (turn > 0)
    finally:                                    # also of an interrupted run, as far as it got
        for name in sizes:
            speeds = {each: [sizes[each] * T * world / seconds for seconds in times.get(each, [])]
                      for each in (name, 'standard', 'checkpointed', name.replace('/float', ''))}
            ratios = {other: [b / a for a, b in zip(speeds[name], speeds[other])] for other in speeds}
            row(name, GB=gigabytes, batch=sizes[name] or 'does not fit', **dict(zip(
                ('stored layers', 'tokens/s', 'lowest', 'highest', 'time to standard', 'least', 'most', 'time to checkpointed'),
                (models[name].config.stored_layers if name in models else None, *spread(speeds[name]),
                 *spread(ratios['standard']), spread(ratios['checkpointed'])[0]))), all_seconds=times.get(name, []))
            if name.endswith('/float') and ratios[name[:-6]]:
                say('{}: exact takes {:.3f} ({:.3f} to {:.3f}) of the time of float states'.format(
                    name[:-6], *spread([1 / ratio for ratio in ratios[name[:-6]]])))

row = open_table(knobs.json, provenance(here, knobs))
signal.signal(signal.SIGINT, signal.default_int_handler)        # a shell may have a job in the background ignore Ctrl-C
alone = [dist.new_group([r]) for r in range(world)][rank] if world > 1 else None     # so that no process waits for one that runs out of memory
try:
    globals()[mode]()
except KeyboardInterrupt:
    sys.exit('interrupted: the rows above are all there is')
leave()
