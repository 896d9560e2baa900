"""
What reversibility costs and saves, against what one would use instead: a standard GPT with the same weights on the same
tokens, that stores its activations, or checkpoints them (every block is evaluated again in the backward pass).

    python bench.py depth                       # memory against the number of layers, and what it consists of
    python bench.py batch --budget_gb=24        # the largest batch under a budget of memory; several: --budget_gb=[24,40]
    python bench.py batch --vary=length         # the longest context, at a batch of one
    python bench.py throughput                  # tokens/s at equal batch; with --budget_gb at the largest of each
    python bench.py drift                       # how wrong rebuilt states, and gradients from them, are: layer by layer
    python bench.py sample --n_layer=12 --n_head=12 --n_embd=768 --vocab_size=50257 --block_size=1024 --dtype=float32
    torchrun --standalone --nproc_per_node=8 bench.py throughput ...            # or batch: the batch of each GPU

--json=FILE keeps the rows, each as soon as it is there. Models take turns, and a ratio is between neighbours in time,
because a shared machine changes its speed. GB and MB are 10^9 and 10^6 bytes. On a GPU they are what torch allocates, of
which a budget is a hard limit (CUDA itself takes some more); on a CPU (Linux) what is resident above what the process had
before, and a run that went beyond the budget counts as one that does not fit. A GPU multiplies float32 in TF32, as when it
trains. `sample` writes text with cached keys and values, and without, beside transformers' generate() on the same weights
if that package is there.
"""
import os
os.environ.setdefault('PYTORCH_CUDA_ALLOC_CONF', 'expandable_segments:True')    # or gaps count as memory
os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')                     # drift: what deterministic kernels need

import ctypes
import gc
import importlib.util
import inspect
import json
import math
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import model as model_py
from configurator import configure
from model import GPT, GPTConfig
from pretrained import build as load
from pretrained import turn_weights
from runtime import (adamw, all_reduce, compile_parts, fail, leave, local_rank, main, open_table, provenance, rank, recorded_states, say, start,
                     world)

@dataclass
class Knobs:
    cases: str = ''                 # those to run, such as standard,checkpointed,leapfrog/half; '': all that the mode has
    batch_size: int = 8             # sequences, on each GPU
    block_size: int = 256
    n_layer: int = 12
    n_head: int = 4
    n_embd: int = 256
    vocab_size: int = 256
    bias: bool = True
    layers: list | None = None      # depth: the numbers of layers, two or more; None: 4, 8, 12
    budget_gb: float | list | None = None       # batch, throughput: GB a process may use; batch needs it
    vary: str = 'batch'             # batch: the 'batch', or the 'length' of its one sequence, in steps of 128 tokens
    chunked_loss: bool = True       # False: all logits at once, by ordinary autograd
    trained: str = ''               # drift: checkpoints, such as out/best.pt,out2/best.pt, as further weights
    repeats: int = 7                # throughput, sample: turns that count, after one that does not
    new_tokens: int = 512           # sample: after a prompt of one
    json: str | None = None         # a file for the rows
    compile: bool = False
    device: str = 'auto'            # 'cuda', 'cpu'
    dtype: str = 'bfloat16'         # 'float32', 'bfloat16', 'float16'; drift goes through all

# stored: the part of the layers whose graph is stored; 'dial': as many as fit into the memory of checkpointing
CASES = {'standard': dict(scheme='standard', stored=1), 'standard/half': dict(scheme='standard', stored=0.5),
         'checkpointed': dict(scheme='standard', stored=0)}
for scheme in (dict(scheme='midpoint'), dict(scheme='leapfrog'), dict(scheme='symplectic'), dict(scheme='midpoint_a', a=0.5),
               dict(scheme='midpoint_sum')):
    for name, change in (('', dict(stored=0)), ('/half', dict(stored=0.5)), ('/all', dict(stored=1)),
                         ('/dial', dict(stored='dial')), ('/float', dict(stored=0, exact=False))):
        CASES[scheme['scheme'] + name] = {**scheme, **change}

mode = sys.argv[1] if len(sys.argv) > 1 else ''
knobs = configure(Knobs, sys.argv[1:] if mode.startswith('-') else sys.argv[2:])
if mode not in ('depth', 'batch', 'throughput', 'drift', 'sample', 'memory'):
    sys.exit(f"unknown mode '{mode}': write python bench.py depth, batch, throughput, drift or sample")
budgets = knobs.budget_gb if isinstance(knobs.budget_gb, list) else [knobs.budget_gb] if knobs.budget_gb else []
left_out = ('/dial', '/float') if mode in ('depth', 'batch') else ('/dial',) if mode != 'throughput' or budgets else ()
cases = [name for name in knobs.cases.split(',') if name] or [
    name for name in CASES if not left_out or not name.endswith(left_out)]
layers = knobs.layers or [4, 8, 12]
if unknown := [name for name in cases if name not in CASES]:
    sys.exit(f"unknown case '{unknown[0]}': choose among {', '.join(CASES)}")
if (mode != 'throughput' or budgets) and (wrong := [name for name in cases if name.endswith('/dial')]):
    sys.exit(f'{wrong[0]} is a case of throughput at equal batch alone')
if not all(type(n) is int and n > 1 for n in layers) or len(set(layers)) < 2:
    sys.exit(f'layers = {layers} must be different whole numbers, 2 or more, as in --layers=[2,12]')
if knobs.repeats < 1 or knobs.vary not in (('batch', 'length') if mode == 'batch' else ('batch',)):
    sys.exit(f"repeats = {knobs.repeats} must be 1 or more, and vary = '{knobs.vary}' 'batch' or, in the mode batch, 'length'")
if mode == 'batch' and not budgets or not all(isinstance(gb, (int, float)) and gb > 0 for gb in budgets):
    sys.exit('how much memory may be used? Give --budget_gb=24, or a list such as --budget_gb=[24,80]')
if world > 1 and mode not in ('batch', 'throughput'):
    sys.exit(f'{mode} measures one process: start it without torchrun')
here = start(knobs)
if mode not in ('sample', 'drift') and here.kind != 'cuda' and not os.path.exists('/proc/self/clear_refs'):
    fail('memory is measured on an NVIDIA GPU, or on Linux')

# -----------------------------------------------------------------------------
# models, tokens, a step

def build(name, weights=None, **change):
    """The model of this case, its weights from this seed, or those of another model: shared, not copied."""
    options = {**{key: getattr(knobs, key) for key in ('block_size', 'n_layer', 'n_head', 'n_embd', 'vocab_size', 'bias')},
               **CASES[name], **change}
    part = options.pop('stored')
    options.setdefault('stored_layers', int(part * options['n_layer']) if part != 'dial' else 0)
    torch.manual_seed(0)
    try:
        with torch.device('meta' if weights else here.device):
            model = GPT(GPTConfig(**options))
    except ValueError as error:
        fail(str(error))
    if weights:
        model.load_state_dict(weights.state_dict(keep_vars=True), assign=True)
    if not knobs.chunked_loss:
        model.forward = lambda idx, targets: (None, F.cross_entropy(
            model.lm_head(model.hidden(idx)).flatten(0, 1), targets.flatten()))
    if knobs.compile:
        compile_parts(model, **MANY_GRAPHS)
    return model

# There is a graph for each case and shape, and that many must be asked for. The backward pass has threads of its own: in torch
# 2.11 the setting holds in all of them, in 2.13 in this one alone, but the argument in all.
torch.compiler.config.recompile_limit = 1000
MANY_GRAPHS = {'recompile_limit': 1000} if 'recompile_limit' in inspect.signature(torch.compile).parameters else {}

def tokens(B, T, vocab_size=knobs.vocab_size):
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
    synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        with here.autocast:
            loss = model(x, y)[1]
        here.scaler.scale(loss).backward()
        here.scaler.step(optimizer)
        here.scaler.update()
        optimizer.zero_grad(set_to_none=True)
    synchronize()
    return time.perf_counter() - began

def optimizer_of(model):
    return adamw(model, weight_decay=0.1, learning_rate=1e-4, betas=(0.9, 0.95))

# -----------------------------------------------------------------------------
# memory, in bytes

def status(key):
    """Of Linux's account of this process."""
    with open('/proc/self/status') as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) * 1024

def used():
    return torch.cuda.memory_allocated() if here.kind == 'cuda' else status('VmRSS')

def reuse(size):
    """On a CPU: glibc keeps free blocks up to this size, which is fast, and looks like use of memory."""
    if here.kind == 'cpu':
        ctypes.CDLL(None).mallopt(-3, size)             # M_MMAP_THRESHOLD
        ctypes.CDLL(None).mallopt(-1, 2 * size)         # M_TRIM_THRESHOLD

def clear():
    """Gives back what is free, and forgets the peak."""
    gc.collect()
    if here.kind == 'cuda':
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)
        with open('/proc/self/clear_refs', 'w') as file:
            file.write('5')

def peak():
    return torch.cuda.max_memory_allocated() if here.kind == 'cuda' else status('VmHWM')

def cap(gigabytes):
    """From now on torch refuses to allocate more on the GPU."""
    if here.kind == 'cuda':
        total = torch.cuda.get_device_properties(here.device).total_memory
        if gigabytes * 1e9 > total:
            fail(f'budget_gb = {gigabytes}: this GPU has {total / 1e9:.1f}')
        torch.cuda.set_per_process_memory_fraction(gigabytes * 1e9 / total)

def needs(name, B, T, steps, **change):
    """The peak, in bytes, of so many steps of the optimizer, the highest of all processes: inf if one runs out of memory."""
    x, y = tokens(B, T)
    torch._dynamo.reset()
    reuse(2**16)
    clear()
    before = used()
    try:
        model = build(name, block_size=T, **change)
        optimizer, model = optimizer_of(model), parallel(model, alone)
        train(model, optimizer, x, y, steps)
        highest = peak() - before
    except torch.OutOfMemoryError:
        highest = math.inf
    model = optimizer = None
    clear()
    reuse(2**25)
    return max(all_reduce(*[highest if r == rank else 0 for r in range(world)]))

def largest(memory_of, limit, top=10**9):
    """The largest n up to top for which memory_of(n), which grows with n, is within the limit."""
    fits, fails, points, guess, tries = 0, top + 1, [], 1, 0
    with tqdm(leave=False, disable=not main) as bar:
        while fails - fits > 1:
            bar.set_description(f'{fits} fits, trying {guess}')
            memory, tries = memory_of(guess), tries + 1
            bar.update()
            fits, fails = (guess, fails) if memory <= limit else (fits, guess)
            if memory < math.inf:
                points = [*points, (guess, memory)][-2:]
            slope = (points[1][1] - points[0][1]) / (points[1][0] - points[0][0]) if len(points) == 2 else 0
            guess = points[1][0] + int((limit - points[1][1]) // slope) if slope > 0 else 2 * fits
            if tries > 8 and fails <= top:              # where memory is noisy, predictions may come nearer by one at a time
                guess = (fits + fails) // 2
            guess = max(fits + 1, min(guess, fails - 1, 8 * max(fits, 1)))
    return fits

# -----------------------------------------------------------------------------
# the modes

def measure():
    """Bytes that one case takes, and what its second layer should take."""
    reuse(2**16)
    start_bytes, x, y = used(), *tokens(knobs.batch_size, knobs.block_size)
    model = build(cases[0])
    found = dict(weights=used() - start_bytes)
    for turn in range(2):               # the second time the gradients and the state of the optimizer are there
        clear()
        before = used()
        with here.autocast:
            loss = model(x, y)[1]
        here.scaler.scale(loss).backward()
        loss = None
        found |= dict(activations=peak() - before) if turn else dict(gradients=used() - before)
        if not turn:
            optimizer, before = optimizer_of(model), used()
            here.scaler.step(optimizer)
            found['optimizer'] = used() - before
    config, kept, stored = model.config, {}, 0
    state = torch.randn(knobs.batch_size, knobs.block_size, config.n_embd, device=here.device)

    def keep(saved):
        kept[saved.untyped_storage().data_ptr()] = saved            # the tensor too, or its place may be given away
        return saved

    for j, f, modules in model.steps():
        if j == 1:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved), here.autocast:
                kept.clear()
                fx = f(state.clone().requires_grad_())
            own = {weight.untyped_storage().data_ptr() for module in modules for weight in module.parameters()}
            stored += sum(saved.untyped_storage().nbytes() for place, saved in kept.items() if place not in own)
            stored += fx.nbytes if config.scheme != 'standard' else 0       # which rebuilds the state before
            always = state.nbytes if config.scheme == 'standard' else state.numel() * model.coefficients[j].bits / 8
    bytes_of_weights = sum(weight.nbytes for weight in model.transformer.h[1].parameters())
    part = CASES[cases[0]]['stored']
    return dict(found=found, predicted=dict(
        weights=bytes_of_weights, gradients=bytes_of_weights, optimizer=2 * bytes_of_weights,
        activations=part * stored + (1 - part if config.scheme == 'standard' else 1) * always))

def memory():
    """What depth calls, in a process of its own."""
    try:
        print(json.dumps(measure()))
    except torch.OutOfMemoryError:
        print('null')

def depth():
    stored_standard = None
    for name in cases:
        results = []
        for n in tqdm(layers, name, leave=False):
            flags = [arg for arg in sys.argv[2:] if not arg.startswith(('--layers', '--cases', '--json'))]
            child = subprocess.run([sys.executable, __file__, 'memory', *flags, f'--cases={name}', f'--n_layer={n}'],
                                   stdout=subprocess.PIPE, text=True)
            if child.returncode not in (0, -signal.SIGKILL):            # which is how Linux says that memory has run out
                fail(f'{name} with {n} layers did not get through: what it says stands above')
            results.append(json.loads(child.stdout.splitlines()[-1]) if child.returncode == 0 else None)
        if None in results:
            row(name, layers=layers, activations=f'does not fit with {layers[results.index(None)]} layers')
            continue
        mean = statistics.mean(layers)
        slopes = {key: sum((n - mean) * result['found'][key] for n, result in zip(layers, results))
                  / sum((n - mean)**2 for n in layers) / 1e6 for key in results[0]['found']}
        stored_standard = slopes['activations'] if name == 'standard' else stored_standard
        predicted = {key: value / 1e6 for key, value in results[-1]['predicted'].items()}
        row(name, layers=layers, found=[result['found'] for result in results],
            **{f'{key} MB': slopes[key] for key in ('weights', 'gradients', 'optimizer', 'activations')},
            **{'predicted': predicted['activations']}, all_predicted=[predicted],
            **{'of standard': slopes['activations'] / stored_standard if stored_standard else None},
            **{f'{n} layers': result['found']['activations'] / 1e6 for n, result in zip(layers, results)})
    say('MB a layer, the activations also for each number of layers, beside their prediction')

# the paper's table 3, as it is quoted: the largest batches of GPT-2 small, T = 1024, by gigabytes
PAPER = {gb: dict(standard=a, midpoint=b) for gb, a, b in ((24, 6, 58), (40, 12, 119), (48, 15, 140), (80, 26, 257))}
GPT2_SMALL = (knobs.n_layer, knobs.n_embd, knobs.block_size, knobs.vary) == (12, 768, 1024, 'batch')

def search(name, gigabytes):
    """The largest batch that survives three steps under this budget, or in units of 128 tokens the longest sequence."""
    cap(gigabytes)
    budget = gigabytes * 1e9
    needs(name, 1, knobs.block_size, 1)             # libraries allocate work spaces of their own the first time
    return largest(lambda n: needs(name, *((n, knobs.block_size) if knobs.vary == 'batch' else (1, 128 * n)), 3), budget)

def batch():
    for gigabytes in budgets:
        reference = None
        for name in cases:
            n = search(name, gigabytes) * (1 if knobs.vary == 'batch' else 128)
            reference = n if name == 'standard' else reference
            paper = PAPER.get(gigabytes, {}).get(name) if GPT2_SMALL else None
            row(name, **{'GB': gigabytes, knobs.vary: n or 'does not fit', 'to standard': n / reference if reference else None,
                         "the paper's": paper})

def throughput():
    if world > 1:
        say(f'{world} processes: the batch is that of each, tokens/s are those of all')
    for gigabytes in budgets or [None]:
        take_turns(gigabytes)

def take_turns(gigabytes):
    sizes, models, times, interrupted, T = {}, {}, {}, False, knobs.block_size
    changes = {name: {} for name in cases}
    try:
        for name in cases:
            sizes[name] = search(name, gigabytes) if gigabytes else (
                knobs.batch_size if needs(name, knobs.batch_size, T, 2) < math.inf else 0)
            if CASES[name]['stored'] == 'dial' and sizes[name]:
                room = needs('checkpointed', sizes[name], T, 2)
                layers_stored = largest(lambda k: needs(name, sizes[name], T, 2, stored_layers=k), room, knobs.n_layer)
                changes[name] = dict(stored_layers=layers_stored)
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
    except KeyboardInterrupt:
        interrupted = True
    for name in sizes:
        speeds = {each: [sizes[each] * T * world / seconds for seconds in times.get(each, [])]
                  for each in (name, 'standard', 'checkpointed')}
        ratios = {other: [b / a for a, b in zip(speeds[name], speeds[other])] for other in ('standard', 'checkpointed')}
        row(name, GB=gigabytes, batch=sizes[name] or 'does not fit', **{
            'stored layers': models[name].config.stored_layers if name in models else None,
            'tokens/s': statistics.median(speeds[name]) if speeds[name] else None,
            'lowest': min(speeds[name], default=None), 'highest': max(speeds[name], default=None),
            **{f'time to {other}': statistics.median(found) if found else None for other, found in ratios.items()}},
            all_seconds=times.get(name, []))
    for name in times if not gigabytes else ():
        if name.endswith('/float') and times.get(name[:-6]):
            ratios = [a / b for a, b in zip(times[name[:-6]], times[name])]
            say(f'{name[:-6]}: exact takes {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) of the '
                'time of float states')
    if interrupted:
        raise KeyboardInterrupt

def gradients_and_states(model, x, y, dtype):
    """Gradients layer by layer, then of all else; p_prev of every step, from bottom to top; and the same as rebuilt."""
    torch.manual_seed(0)                        # of dropout, in trained models
    with recorded_states(model_py.ReversibleStep) as (forward_states, rebuilt):
        with torch.autocast(here.kind, getattr(torch, dtype), enabled=dtype != 'float32'):
            loss = model(x, y)[1]
        loss.backward()
    blocks = [list(block.parameters()) for block in model.transformer.h]
    inside = {weight for block in blocks for weight in block}
    rest = [weight for weight in model.parameters() if weight not in inside]
    return [torch.cat([weight.grad.flatten() for weight in group]) for group in (*blocks, rest)], forward_states, rebuilt[::-1]

def errors(got, want):
    """Relative, by the norm, layer by layer."""
    return [float((a - b).double().norm() / b.double().norm()) for a, b in zip(got, want)]

def worst(found):
    return float(torch.tensor(found).max())             # nan, if there is one

def drift():
    torch.use_deterministic_algorithms(True)
    trained = [path for path in knobs.trained.split(',') if path]
    schemes = [name for name in cases if '/' not in name and CASES[name]['scheme'] != 'standard']
    wanted = [(None, path) for path in trained] + [(name, weights) for name in schemes for weights in (1, 4, 8)]
    for name, weights in tqdm(wanted, leave=False):
        for dtype in ('float32', 'bfloat16', 'float16'):
            for exact in (True, False):
                results = []
                for stored in (1, 1, 0):
                    if name:
                        model = build(name, stored=stored, exact=exact)
                        with torch.no_grad():
                            for weight in model.transformer.h.parameters():
                                weight.mul_(weights if weight.dim() == 2 else 1)
                    else:
                        try:
                            model = load(weights, exact=exact, stored_layers=0)[0].to(here.device)
                        except ValueError as error:
                            fail(str(error))
                        if model.config.scheme == 'standard':
                            fail(f'{weights} is a standard model, which rebuilds nothing: leave it out')
                        model.config.stored_layers = stored * model.config.n_layer
                        if knobs.compile:
                            compile_parts(model, **MANY_GRAPHS)
                    x, y = tokens(knobs.batch_size, min(knobs.block_size, model.config.block_size), model.config.vocab_size)
                    results.append(gradients_and_states(model, x, y, dtype))
                stored, again, rebuilt = results
                states, grads = errors(rebuilt[2], rebuilt[1]), errors(rebuilt[0], stored[0])
                row(name or model.config.scheme, weights=f'x{weights}' if name else 'trained', dtype=dtype,
                    states='exact' if exact else 'float', control=worst(errors(again[0], stored[0])),
                    **{'embedding, rebuilt': states[0], 'worst state': worst(states), 'worst gradient': worst(grads)},
                    state_errors=states, gradient_errors=grads[:-1], checkpoint=[weights] if not name else [])

def of_transformers(model):
    """The same weights in transformers' GPT-2."""
    import transformers
    config = transformers.GPT2Config(vocab_size=knobs.vocab_size, n_positions=knobs.block_size, n_embd=knobs.n_embd,
                                     n_layer=knobs.n_layer, n_head=knobs.n_head, eos_token_id=None, bos_token_id=None)
    theirs = transformers.GPT2LMHeadModel(config).to(here.device).eval()
    theirs.load_state_dict({name: weight.t() if '.h.' in name and weight.dim() == 2 else weight      # Conv1D: (in, out)
                            for name, weight in model.state_dict().items()})
    return theirs

def sample():
    if knobs.new_tokens >= knobs.block_size or not knobs.bias or knobs.compile:
        fail(f'new_tokens = {knobs.new_tokens} must be below block_size = {knobs.block_size}, bias True, as in GPT-2, and '
             'compile False')
    torch.backends.cuda.enable_cudnn_sdp(False)         # as sample.py does, and below
    models = {scheme: build(scheme).eval() for scheme in ('standard', 'leapfrog', 'symplectic')}
    model = models['standard']
    theirs = of_transformers(model) if importlib.util.find_spec('transformers') else None
    if here.kind == 'cpu':
        for one in models.values():
            turn_weights(one)
    idx = torch.zeros(1, 1, dtype=torch.long, device=here.device)
    writers = {f'{scheme}, cached': partial(one.generate, idx, knobs.new_tokens, temperature=0)
               for scheme, one in models.items()}
    writers['standard, not cached'] = partial(model.generate, idx, knobs.new_tokens, temperature=0, cached=False)
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
    say('the tokens of standard, cached or not, and of transformers are ' + ('the same' if same else 'NOT the same'))

row = open_table(knobs.json, provenance(here, knobs))
signal.signal(signal.SIGINT, signal.default_int_handler)        # a shell may have a job in the background ignore Ctrl-C
alone = [dist.new_group([r]) for r in range(world)][rank] if world > 1 else None     # where running out of memory hangs nobody
try:
    dict(depth=depth, batch=batch, throughput=throughput, drift=drift, sample=sample, memory=memory)[mode]()
except KeyboardInterrupt:
    sys.exit('interrupted: the rows above are all there is')
leave()
