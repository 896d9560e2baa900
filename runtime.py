"""
What the scripts share around their loops: processes, device and dtype, data, AdamW and its schedule, checkpoint files,
validation, the log, tables.

Parameters called knobs are the Knobs of the calling script. Every process runs the same lines; only the first prints and writes.
"""
import csv
import gc
import inspect
import json
import math
import os
import pathlib
import platform
import shutil
import signal
import subprocess
import sys
import time
import weakref
import zipfile
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from tqdm import tqdm

from configurator import machine
from data.download import NO_ROOM, crc32, crc32_of_fields, fcntl
from model import GPT, advance, chunk_loss, rebuild

# -----------------------------------------------------------------------------
# processes

rank, world, local_rank = (int(os.environ.get(name, default)) for name, default in
                           (('RANK', 0), ('WORLD_SIZE', 1), ('LOCAL_RANK', 0)))
main = rank == 0                            # this one prints and writes

def say(*args):
    if main:
        print(*args, flush=True)

def fail(sentence):
    sys.exit(sentence if local_rank == 0 else 1)        # printed once per machine, since only one machine may be at fault

def start(knobs):
    """Checks the knobs and joins the processes; returns device, autocast and gradient scaler."""
    knob = vars(knobs).get                  # not every script has all of these
    for name in ('batch_size', 'gradient_accumulation_steps', 'block_size', 'eval_interval', 'eval_windows', 'log_interval',
                 'vocab_size', 'lr_decay_iters', 'spread_windows'):
        if knob(name) is not None and knob(name) < 1:
            fail(f'{name} = {knob(name)} must be 1 or more')
    for name in ('seed', 'learning_rate', 'min_lr', 'weight_decay', 'max_iters', 'warmup_iters', 'grad_clip'):
        if not 0 <= knob(name, 0) < math.inf:           # nor nan
            fail(f'{name} = {knob(name)} must be 0 or more, and finite')
    for name in ('beta1', 'beta2'):
        if not 0 <= knob(name, 0) < 1:
            fail(f'{name} = {knob(name)} must be 0 or more, and below 1')
    if knob('gradient_accumulation_steps', world) % world:
        fail(f'gradient_accumulation_steps = {knobs.gradient_accumulation_steps} must be divisible by {world} processes')

    kind, dtype, reasons = machine(knobs.device, knobs.dtype)
    sys.excepthook = explain
    say(reasons)
    device = torch.device(kind, local_rank) if kind == 'cuda' else torch.device(kind)
    if kind == 'cuda':
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')      # TF32 for what stays in float32
    if world > 1:
        dist.init_process_group('nccl' if kind == 'cuda' else 'gloo')
        torch._dynamo.config.optimize_ddp = False       # it would split compiled blocks, though a block's gradients arrive all at once
    return SimpleNamespace(kind=kind, device=device, dtype=dtype,
                           autocast=torch.autocast(kind, getattr(torch, dtype), enabled=dtype != 'float32'),
                           scaler=torch.amp.GradScaler(kind, enabled=dtype == 'float16'), skipped=0)

NO_MEMORY = "can't allocate memory", 'not enough memory', 'out of memory'      # as Linux, Windows and CUDA say it

def explain(kind, error, traceback):
    """A sys.excepthook: lack of memory, a full disk and a lost process are one sentence each; other errors are shown as usual."""
    said = str(error).lower()
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(words in said for words in NO_MEMORY):
        print('out of memory: try a smaller --batch_size, with more --gradient_accumulation_steps, or a smaller model', file=sys.stderr)
    elif isinstance(error, OSError) and error.errno in NO_ROOM:
        print(f'there is no room to write ({error.strerror}): make room, and run the command again', file=sys.stderr)
    elif world > 1 and (isinstance(error, dist.DistError) or 'connection' in said or 'timed out' in said):
        print(f'process {rank} has lost the others: look for the process that torchrun reports as the first to fail', file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)

def restarted(last):
    """
    Whether this same run of torchrun wrote the checkpoint last, and should continue from it. torchrun gives each run an id: a new one
    with --standalone, else that of --rdzv_id, else 'none'. ValueError if this is a restart, and last is damaged.
    """
    run, restarts, most = (os.environ.get(f'TORCHELASTIC_{name}', default) for name, default in
                           (('RUN_ID', 'none'), ('RESTART_COUNT', 0), ('MAX_RESTARTS', 0)))
    if run == 'none' and int(most):
        fail('with --max_restarts torchrun needs a name for this run, too: give it as --rdzv_id=NAME')
    if run == 'none' or not os.path.exists(last):
        return False
    try:
        same = load_checkpoint(last).get('run') == run
    except ValueError:
        if int(restarts):
            raise
        return False                            # a first start, where something else has been
    if same:
        say(f'{last} is of this run, {run}: continuing from it')
    return same

def leave():
    """
    Leaves the process group. First delete every variable that holds a DistributedDataParallel model: it keeps the group alive, in a
    reference cycle too, and threads of gloo that outlive Python's own end abort now and then (torch 2.13).
    """
    gc.collect()
    if world > 1:
        dist.destroy_process_group()

def all_reduce(*numbers):
    """The sums over all processes."""
    if world == 1:
        return list(numbers)
    numbers = torch.tensor(numbers, dtype=torch.float64, device='cuda' if dist.get_backend() == 'nccl' else 'cpu')
    dist.all_reduce(numbers)
    return numbers.tolist()

signals = []                                # that asked this process to stop; torchrun forwards those that it gets

def catch_signals():
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: signals.append(number))

# -----------------------------------------------------------------------------
# data

def open_data(knobs):
    """meta.json (how text became tokens: sample.py needs it too), and the tokens for training and for validation."""
    folder = os.path.join('data', knobs.dataset)
    own = os.path.exists(os.path.join(folder, 'prepare.py'))
    prepare = f'python {folder}/prepare.py' if own else f'python data/text/prepare.py FILES --name={knobs.dataset}'
    try:
        with open(os.path.join(folder, 'meta.json'), encoding='utf-8') as file:
            meta = json.load(file)
        train, val = (np.memmap(os.path.join(folder, f'{split}.bin'), dtype=meta['dtype'], mode='r')
                      for split in ('train', 'val'))
        train.vocab_size = val.vocab_size = int(meta['vocab_size'])
        # one process per machine reads all of it, at some seconds per gigabyte, to make sure that it is what was prepared
        sums = meta.get('crc32', {})
        damaged = [f'{split}.bin' for split in ('train', 'val') if local_rank == 0 and split in sums
                   and crc32(os.path.join(folder, f'{split}.bin')) != sums[split]]
        damaged += ['meta.json'] * ('meta' in sums and crc32_of_fields(meta) != sums['meta'])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        fail(f'there is no data in {folder}, or not all of it: run "{prepare}" first')
    if damaged:
        fail(f'{folder}/{damaged[0]} is not as it was prepared: run "{prepare}" again')
    if min(len(train), len(val)) <= knobs.block_size:
        fail(f'{folder} has {len(train)} training and {len(val)} validation tokens, too few for '
             f'block_size = {knobs.block_size}: choose a smaller block_size')
    return meta, train, val

def windows(data, starts, T, device):
    """Inputs and targets, both (rows, T), from these positions in the data."""
    x = torch.from_numpy(np.stack([data[i:i + T + 1] for i in starts]).astype(np.int64))
    if (largest := int(x.max())) >= data.vocab_size:
        sys.exit(f'{data.filename} has a token {largest}, and its meta.json says that there are {data.vocab_size}: prepare it again')
    if device.type == 'cuda':
        x = x.pin_memory().to(device, non_blocking=True)
    return x[:, :-1].to(device), x[:, 1:].to(device)

def training_batch(data, knobs, step, micro, device):
    """This process's rows of a micro-batch. Seed, step and i decide at which position row i of a step starts."""
    first = (micro * world + rank) * knobs.batch_size
    return windows(data, [np.random.default_rng((knobs.seed, step, i)).integers(len(data) - knobs.block_size)
                          for i in range(first, first + knobs.batch_size)], knobs.block_size, device)

# -----------------------------------------------------------------------------
# AdamW, its schedule, and what processes agree on at each step

def adamw(model, weight_decay, learning_rate, betas, zero=False):
    """
    AdamW with weight decay for matrices only, not for biases and norms. With zero, each process keeps the moments of only a share of
    the weights, and sends the updated share to the others (ZeRO stage 1, arXiv 1910.02054).
    """
    weights = [w for w in model.parameters() if w.requires_grad]
    groups = [dict(params=[w for w in weights if w.dim() >= 2], weight_decay=weight_decay),
              dict(params=[w for w in weights if w.dim() < 2], weight_decay=0.0)]
    settings = dict(lr=learning_rate, betas=betas, fused=weights[0].device.type == 'cuda')
    if zero:
        from torch.distributed.optim import ZeroRedundancyOptimizer         # importing it takes a second
        return ZeroRedundancyOptimizer(groups, torch.optim.AdamW, **settings)
    return torch.optim.AdamW(groups, **settings)

def count_parameters(model):
    return sum(weight.numel() for weight in model.parameters())

def compile_parts(model):
    """torch.compile for every f of a GPT, for a chunk of the loss, and for the recurrence, which becomes one kernel per direction."""
    # The backward pass has threads of its own. In torch 2.11 the configured limit holds in all of them; in 2.13 only in the
    # thread that sets it, while the argument, which 2.11 lacks, holds in all.
    torch.compiler.config.recompile_limit = 1000
    limit = {'recompile_limit': 1000} if 'recompile_limit' in inspect.signature(torch.compile).parameters else {}
    # f must round the same way in both passes. With dynamic=None a kernel for all shapes could be compiled between them, and take over.
    # Beyond the limit, and at a graph break, eager code would take over: fullgraph raises an error instead.
    for block in model.transformer.h:
        for name in ('attention', 'feedforward') if model.config.scheme == 'symplectic' else ('forward',):
            setattr(block, name, torch.compile(getattr(block, name), dynamic=False, fullgraph=True, **limit))
    model.chunk_loss = torch.compile(chunk_loss, dynamic=False, fullgraph=True, **limit)
    # the recurrence has the same bits in every kernel, so all a that have the same number of remembered bits share one
    model.recurrence = [torch.compile(f, **limit) for f in (advance, rebuild)]

def cosine(knobs, step):
    """The learning rate: linear warm-up, then a cosine down to min_lr."""
    if step < knobs.warmup_iters:
        return knobs.learning_rate * (step + 1) / (knobs.warmup_iters + 1)
    ratio = min(1.0, (step - knobs.warmup_iters) / max(1, (knobs.lr_decay_iters or knobs.max_iters) - knobs.warmup_iters))
    return knobs.min_lr + 0.5 * (1 + math.cos(math.pi * ratio)) * (knobs.learning_rate - knobs.min_lr)

def seed_step(knobs, step):
    """Seeds the random numbers of a step, for dropout and BDIA: another seed for each step and process."""
    torch.manual_seed(int(np.random.default_rng((knobs.seed, step, rank, 1)).integers(2**63)))

def agree(step, loss, norm, model, here):
    """
    (the loss, averaged over all processes; the norm of the gradient; whether a process was asked to stop), the same in every
    process. Ends the program if the loss is not finite, if the norm is not (in float16: 50 times in a row), or if the backward pass
    has rebuilt other states than the forward pass had. When it returns, the loss is finite and the weights are still unchanged.
    """
    zero = torch.zeros_like(loss)
    numbers = torch.stack([loss, norm, zero + model.mismatches, zero + len(signals)]) / world
    if world > 1:
        dist.all_reduce(numbers)
    loss, norm, mismatches, stop = numbers.tolist()
    model.mismatches = 0
    if mismatches:
        fail(f'step {step + 1}: the backward pass has rebuilt states that are not those of the forward pass, because a block gave two '
             'results for one input; stopped before that reaches the weights. Try --compile=False, then another machine: the memory '
             'of this one may be faulty. --verify=False trains on regardless')
    if not math.isfinite(loss) or not (math.isfinite(norm) or here.scaler.is_enabled()):        # a scaler mends its own
        fail(f'step {step + 1}: the loss is {loss} and the gradient norm {norm}; stopped before they reach the weights, '
             'and last.pt, if there is one, is unchanged: try a lower --learning_rate')
    here.skipped = 0 if math.isfinite(norm) else here.skipped + 1                               # consecutive steps
    if here.skipped == 50:                  # the scale has been halved so often that it cannot be the reason
        fail(f'step {step + 1}: the gradients of the last 50 steps were inf or NaN in float16: try a lower learning rate, or '
             '--dtype=float32')
    return loss, norm, stop > 0

def duration(seconds):
    """Such as 2 h 05 min, or 3 min 20 s."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours} h {minutes:02} min' if hours else f'{minutes} min {seconds:02} s' if minutes else f'{seconds} s'

# -----------------------------------------------------------------------------
# checkpoints

def save_checkpoint(paths, checkpoint):
    """
    Writes the dict under another name, and renames it once it is on the disk: there is never half a checkpoint. Further paths
    become names of the same file, which is never changed, only replaced. A disk that is full ends the program in a sentence.
    """
    part = f'{paths[0]}.part'
    try:
        for path in paths:                  # a run that was killed below may have left this name on the file of a checkpoint
            pathlib.Path(f'{path}.part').unlink(missing_ok=True)
        with open(part, 'wb') as file:
            torch.save(dict(checkpoint, run=os.environ.get('TORCHELASTIC_RUN_ID')), file)
            file.flush()
            os.fsync(file.fileno())
        for path in paths[1:]:
            try:
                os.link(part, f'{path}.part')
            except OSError:                 # some file systems know no second name
                shutil.copyfile(part, f'{path}.part')
            os.replace(f'{path}.part', path)
        os.replace(part, paths[0])
    except (OSError, RuntimeError) as error:            # on a full disk torch.save() raises either
        for path in paths:
            pathlib.Path(f'{path}.part').unlink(missing_ok=True)
        fail(f'{paths[0]} cannot be written ({str(error).splitlines()[0]}): make room; an older checkpoint there is unchanged')

OURS = {'model', 'config', 'meta'}         # dicts that each checkpoint has

def load_checkpoint(path, *kinds):
    """The dict of save_checkpoint(). It must hold all dicts that one of the kinds names (default: OURS). ValueError if missing or damaged."""
    if not os.path.isfile(path):
        raise ValueError(f'there is no checkpoint {path}')
    try:                                    # damage may raise anything; torch.load verifies no checksums
        with zipfile.ZipFile(path) as file: # one process per machine verifies all of it; mmap keeps one copy in memory
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in file.infolist()):     # it might unpack to any size
                raise ValueError
            broken = local_rank == 0 and file.testzip()
        checkpoint = None if broken else torch.load(path, map_location='cpu', weights_only=True, mmap=True)
    except Exception:
        checkpoint = None
    if not isinstance(checkpoint, dict) or not any(all(isinstance(checkpoint.get(key), dict) for key in kind) for kind in kinds or [OURS]):
        raise ValueError(f'{path} is damaged, cut off, or not a checkpoint of these scripts: use another one')
    return checkpoint

# -----------------------------------------------------------------------------
# what is measured

@torch.no_grad()
def validation_loss(model, data, knobs, here, criterion=lambda x: (), bar=False):
    """
    Mean loss in nats per token over windows spread evenly over the data, each process taking its share. criterion(x) gives
    further arguments of the model's forward() for these tokens, if the loss is not cross entropy.
    """
    model.eval()
    places = len(data) - knobs.block_size
    starts = np.linspace(0, places - 1, min(knobs.eval_windows, places)).astype(int)[rank::world]
    total = 0.0
    for i in tqdm(range(0, len(starts), knobs.batch_size), 'validation', leave=False, disable=not (bar and main)):
        rows = starts[i:i + knobs.batch_size]
        x, y = windows(data, rows, knobs.block_size, here.device)                           # (b, T) each
        with here.autocast:
            total += model(x, y, *criterion(x))[1].item() * len(rows)
    model.train()
    total, count = all_reduce(total, len(starts))
    return total / count

def peak_memory(kind):
    """Peak memory in GB: allocated on a CUDA GPU, or resident in this process. An Apple GPU reports only its present memory."""
    if kind == 'cuda':
        return torch.cuda.max_memory_allocated() / 1e9
    if kind == 'mps':
        return torch.mps.driver_allocated_memory() / 1e9
    if sys.platform == 'win32':             # which has no resource module
        return math.nan
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024) / 1e9

def open_log(folder, columns, step):
    """
    Makes the folder and its log.csv, and returns record(**values), which adds a row. Rows of steps after this one are dropped. As long
    as record() lives, no other run can use the folder.
    """
    def record(**values):
        if main:
            try:
                with open(path, 'a', newline='') as file:
                    csv.DictWriter(file, columns).writerow(values)
            except OSError as error:
                fail(f'{path} cannot be written to ({error.strerror}): make room, and continue with --init_from=resume')

    path = os.path.join(folder, 'log.csv')
    if main:
        rows = []
        if step and os.path.exists(path):   # a run that was killed has logged steps that its checkpoint does not know
            with open(path, newline='', errors='replace') as file:
                text = file.read().replace('\0', '').splitlines()       # a power cut may leave zero bytes
            rows = [row for row in csv.DictReader(text, quoting=csv.QUOTE_NONE) if (row.get('step') or '').isdecimal() and int(row['step']) <= step]
        try:
            os.makedirs(folder, exist_ok=True)
            if fcntl:                       # Windows has no such locks
                descriptor = os.open(folder, os.O_RDONLY)
                weakref.finalize(record, os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with open(f'{path}.part', 'w', newline='') as file:
                writer = csv.DictWriter(file, columns, extrasaction='ignore')
                writer.writeheader()
                writer.writerows(rows)
            os.replace(f'{path}.part', path)
        except BlockingIOError:
            fail(f'{folder} is in use by another run: wait until it ends, or choose another --out_dir')
        except OSError as error:
            fail(f'{folder} cannot be written to ({error.strerror}): choose another --out_dir')
    return record

# -----------------------------------------------------------------------------
# memory and work, counted

ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

class Count(TorchDispatchMode):
    """
    Follows the storage of every tensor from its birth to its end, and adds up the operations of matrix products and
    attention (a multiplication and an addition are two). Under FakeTensorMode nothing is computed or allocated, so that
    any size can be counted anywhere, and the numbers are the same. Not seen: memory of the allocator, CUDA and kernels
    themselves, and a storage that is resized after its birth.
    """

    def __init__(self):
        super().__init__()
        self.storages, self.alive, self.marks, self.clock, self.work = [], {}, [], 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result, op = func(*args, **(kwargs or {})), func.overloadpacket
        if op in flop_registry:
            self.work += flop_registry[op](*args, **(kwargs or {}), out_val=result)
        elif op in ATTENTION:                   # its arguments begin with q, k, v; those of its backward with the output's gradient
            shapes = [x.shape for x in args[:3 + (op is ATTENTION[1])]]
            self.work += (sdpa_flop_count if op is ATTENTION[0] else sdpa_backward_flop_count)(*shapes)
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and (key := x.untyped_storage()._cdata) not in self.alive:
                self.clock += 1
                self.alive[key] = entry = SimpleNamespace(size=x.untyped_storage().nbytes(), born=self.clock, died=math.inf,
                                                          kind='activations')
                self.storages.append(entry)
                weakref.finalize(x.untyped_storage(), self.end, key).atexit = False
        return result

    def end(self, key):
        self.clock += 1
        self.alive.pop(key).died = self.clock

    def mark(self, kind, tensors=()):
        """Says of which kind these tensors are, and records the time."""
        self.marks.append((kind, self.clock))
        for x in tensors:
            self.alive[x.untyped_storage()._cdata].kind = kind

    def curve(self, *kinds):
        """Live bytes at every time, from 0 on: of these kinds, or of all."""
        change = np.zeros(self.clock + 2, np.int64)
        for entry in self.storages:
            if not kinds or entry.kind in kinds:
                change[entry.born] += entry.size
                change[min(entry.died, self.clock + 1)] -= entry.size
        return change[:-1].cumsum()

    def at(self, time):
        """Live bytes at this time by kind."""
        kinds = dict.fromkeys(('weights', 'gradients', 'optimizer', 'activations'), 0)
        for entry in self.storages:
            kinds[entry.kind] += entry.size * (entry.born <= time < entry.died)
        return kinds

def count_two_steps(build, B, T, dtype, fake=True, micro_batches=1):
    """The Count of two steps of AdamW, each of some micro-batches (B, T) of tokens, with build()'s model, on a CPU."""
    with (FakeTensorMode() if fake else nullcontext()), Count() as count:
        model = build()
        count.mark('weights', model.parameters())
        for weight in model.parameters():
            if weight.requires_grad:            # one mark per gradient, so a backward pass has as many phases as gradients
                weight.register_post_accumulate_grad_hook(lambda weight: count.mark('gradients', [weight.grad]))
        optimizer = adamw(model, weight_decay=0.1, learning_rate=1e-4, betas=(0.9, 0.95))
        idx = torch.zeros(B, T, dtype=torch.long)
        for _ in range(2):
            count.work = 0
            for _ in range(micro_batches):
                with torch.autocast('cpu', getattr(torch, dtype), enabled=dtype != 'float32'):
                    loss = model(idx, idx)[1]
                count.mark('backward')
                loss.backward()
                loss = None
            optimizer.step()
            count.mark('optimizer', (x for state in optimizer.state.values() for x in state.values()))
            optimizer.zero_grad(set_to_none=True)
            count.mark('step')
    return count

def most_stored_layers(config, knobs, here):
    """The largest number of layers that can be stored if a process may use memory_gb, by counting the memory of its micro-batches."""
    gigabytes = knobs.memory_gb
    if gigabytes is None:
        if here.kind != 'cuda':
            fail("stored_layers = 'auto' needs to know the memory of this machine: give it as --memory_gb=16")
        # the rest is for CUDA itself, work spaces of kernels and gaps between tensors
        gigabytes = 0.9 * torch.cuda.get_device_properties(here.device).total_memory / 1e9
    if not gigabytes > 0:
        fail(f'memory_gb = {gigabytes} must be above 0')
    say("stored_layers = 'auto': memory is counted for several numbers of layers, within a minute or two")

    with torch.device('meta'):                  # DistributedDataParallel keeps its buckets of gradients all the time: at most one copy more
        copies = 4 * count_parameters(GPT(config)) * (world > 1)

    @cache
    def needs(stored_layers, B=knobs.batch_size):
        def build():
            drawn = dict(a=0.5, h=1.5) if config.a == 'bdia' else {}       # fake tensors have no numbers to draw
            model = GPT(replace(config, stored_layers=stored_layers, **drawn))
            if here.kind != 'cpu':              # attention's dropout mask (T, T) is in memory on a CPU, but not on a GPU
                for block in model.transformer.h:
                    block.attn.dropout = 0.0
            return model
        # in the second micro-batch there are gradients from the first one
        peak = count_two_steps(build, B, knobs.block_size, here.dtype,
                               micro_batches=min(2, knobs.gradient_accumulation_steps // world)).curve().max()
        return int(peak + copies) / 1e9

    def most(needs, fits, fails):
        """By bisection: the largest n for which needs(n) is within gigabytes, if it is for n = fits, and is not for n = fails."""
        while fails - fits > 1:
            middle = (fits + fails) // 2
            fits, fails = (middle, fails) if needs(middle) <= gigabytes else (fits, middle)
        return fits

    if (least := needs(0)) > gigabytes:
        batch = most(lambda B: needs(0, B), 0, knobs.batch_size)
        fail(f'batch_size = {knobs.batch_size} needs {least:.3g} GB even with no layer stored, and memory_gb is {gigabytes:.3g}: '
             + (f'--batch_size={batch} fits' if batch else 'not even --batch_size=1 fits'))
    layers = most(needs, 0, config.n_layer + 1)
    say(f'stored_layers = {layers} of {config.n_layer}: {needs(layers):.3g} GB are counted, of {gigabytes:.3g} GB'
        + (f', and {layers + 1} would need {needs(layers + 1):.3g}' if layers < config.n_layer else ''))
    return layers

# -----------------------------------------------------------------------------
# states and tables, for bench.py and results/

@contextmanager
def recorded_states(step):
    """Yields two lists of the p_prev of every step of a ReversibleStep class: as forward had them, and as backward rebuilt them."""
    forward, backward, up, down = step.forward, step.backward, [], []

    def recording_forward(ctx, handle, tape, *args):
        up.append(tape.lower.clone())
        return forward(ctx, handle, tape, *args)

    def recording_backward(ctx, zero):
        slices, rebuild = [], ctx.tape.rebuild
        ctx.tape.rebuild = lambda *args: slices.append(rebuild(*args).clone())
        result = backward(ctx, zero)
        ctx.tape.rebuild = rebuild
        down.append(torch.cat(slices))
        return result

    step.forward, step.backward = staticmethod(recording_forward), staticmethod(recording_backward)
    try:
        yield up, down
    finally:
        step.forward, step.backward = staticmethod(forward), staticmethod(backward)

def provenance(here, knobs):
    """Command, commit, hardware and versions."""
    root = os.path.dirname(os.path.abspath(__file__))

    def git(*words):
        return subprocess.run(['git', *words], capture_output=True, text=True, cwd=root).stdout.strip() if shutil.which('git') else ''

    processor = platform.processor()
    if os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo') as file:
            processor = next((line.split(':')[1].strip() for line in file if line.startswith('model name')), processor)
    return dict(command=' '.join(['python', os.path.relpath(sys.argv[0], root), *sys.argv[1:]]),
                date=time.strftime('%Y-%m-%d'),
                commit=git('rev-parse', '--short', 'HEAD') + ', changed' * bool(git('status', '--short', '-uno')),
                hardware=torch.cuda.get_device_name() if here.kind == 'cuda' else f'{torch.get_num_threads()} threads, {processor}',
                processes=world, torch=torch.__version__, python=platform.python_version(), knobs=asdict(knobs))

def open_table(path, about):
    """row(case, **values), which prints a row, and writes `about` and all rows to this file, if there is one; lists go to the file only."""
    rows = []
    if path and main:
        try:
            os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
            open(path, 'a').close()
        except OSError as error:
            fail(f'{path} cannot be written ({error.strerror}): choose another --json')

    def text(value):
        if not isinstance(value, float):
            return '-' if value is None else str(value)
        return f'{value:.1e}' if 0 < abs(value) < 1e-2 else f'{value:,.0f}' if abs(value) >= 1e4 else f'{value:.4g}'

    def row(case, **values):
        rows.append(dict(case=case, **values))
        if not main:
            return
        if path:
            with open(f'{path}.part', 'w') as file:
                json.dump(dict(about, rows=rows), file, indent=1)
            os.replace(f'{path}.part', path)
        shown = {key: text(value) for key, value in values.items() if not isinstance(value, list)}
        if len(rows) == 1 or rows[-2].keys() != rows[-1].keys():
            tqdm.write(f'{"":24}' + ''.join(f'{key:>{max(11, len(key) + 2)}}' for key in shown))
        tqdm.write(f'{case:24}' + ''.join(f'{value:>{max(11, len(key) + 2)}}' for key, value in shown.items()))
    return row
