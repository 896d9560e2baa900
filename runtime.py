"""
What the scripts share around their loops: processes, data, AdamW, checkpoints, the log. It knows no model.
Every process runs the same lines; only the first prints and writes.
"""
import csv
import errno
import gc
import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import sys
import tempfile
import zipfile
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from data.download import crc32, crc32_of_fields, fcntl, publish

rank = int(os.environ.get('RANK', 0))
world = int(os.environ.get('WORLD_SIZE', 1))
local_rank = int(os.environ.get('LOCAL_RANK', 0))
main = rank == 0                            # this one prints and writes
signals = []                                # those that asked this process to stop; torchrun forwards its own
GPT2_TOKENS = dict(encoding='gpt2', vocab_size=50257, dtype='uint16')       # as nanoGPT writes them

# -----------------------------------------------------------------------------
# processes, device and dtype

# torch.compile keeps code on the disk by a key without the width of the processor's vectors: where two kinds
# share a folder, the numbers may be wrong (torch 2.13). So each kind has its own
owner = getattr(os, 'getuid', lambda: '')()         # Windows has none
code = f'torchinductor_{owner}_{torch.backends.cpu.get_cpu_capability()}'
os.environ.setdefault('TORCHINDUCTOR_CACHE_DIR', os.path.join(tempfile.gettempdir(), code))

def say(*args):
    if main:
        try:
            print(*args, flush=True)
        except BrokenPipeError:             # nobody reads on, as in train.py | head: like Ctrl-C
            sys.stdout = open(os.devnull, 'w')
            signals.append('SIGPIPE')

def catch_signals():
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: signals.append(number))

def start(knobs):
    """Joins the processes, and returns what they compute with: device, dtype, autocast, gradient scaler."""
    present = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    kind = next(name for name in present if present[name]) if knobs.device == 'auto' else knobs.device
    if not present[kind]:
        raise ValueError(f"device = '{kind}' is not on this machine: try --device=cpu")
    dtype = 'float32' if knobs.dtype == 'auto' else knobs.dtype
    if kind == 'cuda':
        torch.cuda.set_device(local_rank)
        torch.set_float32_matmul_precision('high')      # TF32 for what stays in float32
        if knobs.dtype == 'auto':                       # GPUs before Ampere compute in float16 only
            dtype = 'bfloat16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'float16'
    say(f'device {kind} ({knobs.device}), dtype {dtype} ({knobs.dtype})')
    shard = vars(knobs).get('shard', False)
    if shard and world == 1:
        raise ValueError('--shard=True needs several processes: start the script with torchrun')
    if world > 1:
        # the others wait while the first process writes a checkpoint
        dist.init_process_group('nccl' if kind == 'cuda' else 'gloo', timeout=timedelta(hours=1))
        torch._dynamo.config.optimize_ddp = False       # it would split compiled blocks, and gain nothing
    mesh = dist.init_device_mesh(kind, (world,)) if shard else None
    return SimpleNamespace(kind=kind, device=torch.device(kind), dtype=dtype, skipped=0, mesh=mesh,
                           autocast=torch.autocast(kind, getattr(torch, dtype), enabled=dtype != 'float32'),
                           scaler=torch.amp.GradScaler(kind, enabled=dtype == 'float16'))

def leave():
    """Leaves the process group, which a DistributedDataParallel model would keep alive: delete that first."""
    gc.collect()                            # or threads of gloo, which outlive Python, abort now and then
    if world > 1:
        dist.destroy_process_group()

def all_reduce(*numbers, how='SUM'):
    """The sums over all processes, or with how='MAX' the largest."""
    kind = 'cuda' if world > 1 and dist.get_backend() == 'nccl' else 'cpu'
    numbers = torch.tensor(numbers, dtype=torch.float64, device=kind)
    if world > 1:
        dist.all_reduce(numbers, getattr(dist.ReduceOp, how))
    return numbers.tolist()

# -----------------------------------------------------------------------------
# training, and validation

def open_data(knobs):
    """How text became tokens, the tokens for training, and those for validation."""
    folder = Path('data', knobs.dataset)
    prepare = folder / 'prepare.py'
    if knobs.dataset == 'text' or not prepare.exists():
        prepare = f'data/text/prepare.py FILES --name={knobs.dataset}'
    sound = False
    meta = read_meta(folder)
    with unless_damaged():
        paths = folder / 'train.bin', folder / 'val.bin'
        train, val = (np.memmap(path, meta['dtype'], 'r') for path in paths)
        sound = local_rank > 0              # one process per machine reads all: some seconds per gigabyte
        if not sound:
            sums = dict(meta=crc32_of_fields(meta), train=crc32(paths[0]), val=crc32(paths[1]))
            sound = (meta.get('crc32') or sums) == sums and max(train.max(), val.max()) < meta['vocab_size']
    if not sound:
        raise ValueError(f'no data, or {folder} is not as it was prepared: run "python {prepare}" first'
                         + " (or add a meta.pkl: its tokens are not GPT-2's)" * (meta == GPT2_TOKENS))
    chars, model = meta.get('chars'), meta.get('model')
    known = dict(bytes=meta['vocab_size'] <= 256, gpt2=True, unknown=True)
    known['chars'] = isinstance(chars, str) and len(chars) == meta['vocab_size']
    known['tokenizer.json'] = isinstance(model, str)
    if not known.get(meta.get('encoding')):
        raise ValueError(f'{folder}/meta.json must have an "encoding": "bytes", "gpt2", "tokenizer.json" '
                         'with its "model", or "chars" with "chars", all vocab_size of them in one text')
    if min(len(train), len(val)) <= knobs.block_size:
        raise ValueError(f'{folder} has too few tokens for block_size = {knobs.block_size}: choose less')
    return meta, train, val

def read_meta(folder):
    """How text became tokens: meta.json, or what nanoGPT's prepare.py leaves. {} if there is neither."""
    with unless_damaged():
        if there(folder / 'meta.json'):
            return dict(json.loads((folder / 'meta.json').read_bytes()))
    if not there(folder / 'meta.pkl'):
        return GPT2_TOKENS if there(folder / 'train.bin') and not there(folder / 'meta.json') else {}
    chars = []
    with unless_damaged(), open(folder / 'meta.pkl', 'rb') as file:
        theirs = PlainUnpickler(file).load()
        chars = [theirs['itos'][i] for i in range(theirs['vocab_size'])]
    if not chars or any(type(c) is not str or len(c) != 1 for c in chars):
        raise ValueError(f'{folder}/meta.pkl must be a dict with vocab_size and itos, one character for each '
                         'token: write a meta.json for other tokens')
    return dict(encoding='chars', vocab_size=len(chars), dtype='uint16', chars=''.join(chars))

class PlainUnpickler(pickle.Unpickler):
    """Of dict, str and int alone: a pickle could call anything."""
    def find_class(self, module, name):
        raise pickle.UnpicklingError(f'{module}.{name}')

def windows(data, starts, T, device):
    """Inputs and targets, both (rows, T), from these positions in the data."""
    x = torch.from_numpy(np.stack([data[i:i + T + 1] for i in starts]).astype(np.int64))
    if device.type == 'cuda':
        x = x.pin_memory().to(device, non_blocking=True)
    return x[:, :-1].to(device), x[:, 1:].to(device)

def micro_batches(knobs):
    """How many micro-batches of a step are this process's own."""
    if knobs.gradient_accumulation_steps % world:
        raise ValueError(f'gradient_accumulation_steps must be divisible by {world}, the number of processes')
    return knobs.gradient_accumulation_steps // world

def training_batches(data, knobs, step, device):
    """Yields this process's micro-batches. Seed, step and i decide where row i of a step begins."""
    places = len(data) - knobs.block_size
    for step in itertools.count(step):
        for micro in range(rank, knobs.gradient_accumulation_steps, world):
            rows = range(micro * knobs.batch_size, (micro + 1) * knobs.batch_size)
            starts = [np.random.default_rng((knobs.seed, step, i)).integers(places) for i in rows]
            yield windows(data, starts, knobs.block_size, device)

@torch.no_grad()
def validation_loss(model, data, knobs, here, loss=None):
    """The mean of the model's loss, or of another, over windows spread evenly over the data."""
    model.eval()
    places = len(data) - knobs.block_size
    starts = np.linspace(0, places - 1, min(knobs.eval_windows, places)).astype(int)
    total = 0.0
    for i in range(0, math.ceil(len(starts) / world), knobs.batch_size):        # as often in all processes
        ours = starts[rank::world][i:i + knobs.batch_size]
        x, y = windows(data, ours if len(ours) else starts[:1], knobs.block_size, here.device)
        with here.autocast:
            mean = loss(x, y) if loss else model(x, y)[1]
        total += mean.item() * len(ours)
    model.train()
    [total] = all_reduce(total)
    if not math.isfinite(total):
        raise ValueError(f'the validation loss is {total}: try a lower --learning_rate, --dtype=float32, '
                         'or fewer --fractional_bits')
    return total / len(starts)

def count_parameters(model):
    return sum(weight.numel() for weight in model.parameters())

def distributed(model, here):
    """The model, or what also adds up the gradients of all processes."""
    if world == 1 or here.mesh:             # FSDP2 does that itself
        return model
    gpus = [local_rank] if here.kind == 'cuda' else None
    return DistributedDataParallel(model, gpus, gradient_as_bucket_view=True)       # no copy of all gradients

def adamw(model, weight_decay=0.1, learning_rate=1e-4, betas=(0.9, 0.95)):
    """AdamW with weight decay for matrices only."""
    weights = [w for w in model.parameters() if w.requires_grad]
    groups = [dict(params=[w for w in weights if w.dim() >= 2], weight_decay=weight_decay),
              dict(params=[w for w in weights if w.dim() < 2], weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=weights[0].device.type == 'cuda')

@torch.no_grad()
def clip(model, most, here):
    """Scales the gradient so that its norm is at most this; 0: no limit. Returns the norm from before."""
    grads = [local(w.grad) for w in model.parameters() if w.grad is not None]
    dtype = torch.float32 if here.kind == 'mps' else torch.float64      # where a sum's order does not show
    pieces = [piece for g in grads for piece in g.flatten().split(2**22)]       # of which it makes a copy
    square = sum(torch.linalg.vector_norm(piece, dtype=dtype)**2 for piece in pieces)
    if here.mesh:
        dist.all_reduce(square)
    norm = square.sqrt().float()
    if most:
        factor = (most / (norm + 1e-6)).clamp(max=1.0)
        for g in grads:
            g.mul_(factor)
    return norm

def cosine(knobs, step):
    """The learning rate: linear warm-up, then a cosine down to min_lr."""
    if step < knobs.warmup_iters:
        return knobs.learning_rate * (step + 1) / (knobs.warmup_iters + 1)
    steps = max(1, (knobs.lr_decay_iters or knobs.max_iters) - knobs.warmup_iters)
    ratio = min(1.0, (step - knobs.warmup_iters) / steps)
    return knobs.min_lr + 0.5 * (1 + math.cos(math.pi * ratio)) * (knobs.learning_rate - knobs.min_lr)

def seed_step(knobs, step):
    """Seeds dropout: another seed for each step and process, so that no state needs to be saved."""
    torch.manual_seed(int(np.random.default_rng((knobs.seed, step, rank, 1)).integers(2**63)))

def pace(knobs, step, seconds):
    """(tokens per second, time left), from the seconds that each of the last steps took."""
    mean = sum(seconds) / len(seconds)
    tokens = knobs.batch_size * knobs.gradient_accumulation_steps * knobs.block_size
    return round(tokens / mean), timedelta(seconds=round(mean * (knobs.max_iters - step)))

def agree(step, loss, norm, mismatches, largest, here):
    """
    All processes' mean loss, norm of the gradient, whether to stop, and the part of their range that states
    used: beyond 0.999 the step must not be taken. Raises an error before a step does harm.
    """
    loss, norm, mismatches, stop = (x / world for x in all_reduce(loss, norm, mismatches, len(signals)))
    [largest] = all_reduce(largest, how='MAX')
    where = f'step {step + 1} was stopped before the weights, and last.pt is unchanged'
    if mismatches:
        raise ValueError(f'{where}: the rebuilt states are not those of the forward pass: try '
                         '--compile=False, then another machine; --verify=False trains on regardless')
    here.skipped = 0 if math.isfinite(norm) else here.skipped + 1
    scaled = here.scaler.is_enabled() and here.skipped < 50         # it mends a norm, by halving its scale
    wrapped = 0.999 < largest < math.inf            # so the loss is NaN, and the caller knows what to do
    if not wrapped and (not math.isfinite(loss) or not (math.isfinite(norm) or scaled)):
        raise ValueError(f'{where}: the loss is {loss}, the norm {norm}: try a lower --learning_rate')
    return loss, norm, stop > 0, largest

def make_room(step, used, config):
    """A quarter of their range is used: states get one fractional bit less. All of it: raises an error."""
    if used > 0.999:
        all_reduce(0)                       # until the first process has written its checkpoint
        bits = config.fractional_bits - math.ceil(math.log2(8 * used))
        advice = f'--fractional_bits={bits}' if bits >= 8 else '--state_bits=64'
        raise ValueError(f'stopped at step {step}: a state would leave its range: continue with '
                         f'--init_from=resume {advice}')
    if used > 0.25 and config.fractional_bits > 0:
        config.fractional_bits -= 1
        say(f'step {step}: a state used {used:.0%} of its range: {config.fractional_bits} fractional bits')

# -----------------------------------------------------------------------------
# FSDP2: each process keeps some rows of every weight, of its gradient and of its moments

def shard(model, here):
    """
    Gives each process 1 / N of the rows of every weight (torch's fully_shard, arXiv 2304.11277). Those of a
    block are gathered around its step. Under bfloat16 autocast matrices travel in that format, which they get
    anyway.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method    # takes a second
    if model.config.scheme == 'midpoint_sum':
        raise ValueError('a step of midpoint_sum needs two blocks at once: leave --shard out')
    if world > model.config.n_embd:
        raise ValueError(f'{world} processes cannot share {model.config.n_embd} rows: start fewer')
    for block in model.transformer.h:
        fully_shard(block, mesh=here.mesh)
        register_fsdp_forward_method(block, 'step')
    # else its parameters would be the gathered ones after a validation: an optimizer made then trains nothing
    fully_shard(model, mesh=here.mesh, reshard_after_forward=True)
    register_fsdp_forward_method(model, 'hidden')
    model.to_empty(device=here.device)
    if here.dtype == 'bfloat16':
        for weight in model.transformer.h.parameters():
            if weight.dim() == 2:
                halve_traffic(weight)

def halve_traffic(weight):
    """Lets a weight travel as bfloat16: FSDP2 calls these two methods of a shard, if it has them."""
    part = weight._local_tensor             # itself: to_local() is a view

    def fsdp_pre_all_gather(mesh):
        missing = math.ceil(len(weight) / world) - len(part)        # all processes must send as many rows
        return [F.pad(part, (0, 0, 0, missing)).bfloat16()], None

    def fsdp_post_all_gather(outputs, metadata, dtype, *, out=None):
        if out is None:                     # the first time
            whole = outputs[0].to(dtype)
            return whole, [whole]
        out.data.copy_(outputs[0][:len(out)])           # .data: autograd shall not take it for a change

    part.fsdp_pre_all_gather = fsdp_pre_all_gather
    part.fsdp_post_all_gather = fsdp_post_all_gather

def local(x):
    """The rows of a tensor that this process has: all, if it is not sharded."""
    return x.to_local() if hasattr(x, 'to_local') else x

@torch.no_grad()
def fill(weight, rows, first=0):
    """Sets these rows of a weight, from the first on, as far as this process has them. Returns the weight."""
    ours = local(weight)
    begin = 0 if ours is weight else rank * math.ceil(len(weight) / world)
    least = max(first, begin)
    most = min(first + len(rows), begin + len(ours))
    if least < most:
        ours[least - begin:most - begin] = rows[least - first:most - first]
    return weight

def whole(x):
    """All rows of a tensor: gathered, if it is sharded."""
    return x.full_tensor() if hasattr(x, 'full_tensor') else x

# -----------------------------------------------------------------------------
# checkpoints, and the log

def save_checkpoint(paths, checkpoint):
    """Writes the dict under another name first: no file is ever half. All paths name the same file."""
    part = Path(f'{paths[0]}.part')
    try:
        part.unlink(missing_ok=True)        # that of a killed run may be another name of a checkpoint
        with open(part, 'wb') as file:
            torch.save(dict(checkpoint, run=os.environ.get('TORCHELASTIC_RUN_ID')), file)
        publish(part, paths[-1])
        for path in paths[:-1]:             # last.pt is the last: a kill in between loses steps, not best.pt
            try:
                os.link(paths[-1], part)
            except OSError:                 # some file systems know no second name
                shutil.copyfile(paths[-1], part)
            publish(part, path)
    except (OSError, RuntimeError) as error:            # on a full disk torch.save() raises either
        part.unlink(missing_ok=True)
        raise ValueError(f'{paths[0]} cannot be written ({error}): make room; what was there is unchanged')

def load_checkpoint(path, dicts=('model', 'config', 'meta')):
    """The dict of save_checkpoint(), which must hold these dicts. OSError if the file cannot be read now."""
    if not there(path):
        raise ValueError(f'there is no checkpoint {path}')
    checkpoint = None
    said = f'{path} is damaged, cut off, or not written by torch.save: use another one'
    with unless_damaged():
        with open(path, 'rb') as file:
            file.seek(-1, os.SEEK_END)      # an error of the disk shows here: to zipfile each is damage
            file.read(1)
        with zipfile.ZipFile(path) as file:
            packed = any(entry.compress_type for entry in file.infolist())      # it might grow to any size
            damaged = local_rank == 0 and file.testzip()            # torch.load looks at no checksums
        if not packed and not damaged:
            try:
                checkpoint = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
            except pickle.UnpicklingError as error:
                what = re.findall(r'GLOBAL ([\w.]+)', str(error)) or ['unknown']
                said = f'{path} holds Python objects ({what[0]}), which are not loaded: save plain values'
    if checkpoint is None:
        raise ValueError(said)
    found = checkpoint if isinstance(checkpoint, dict) else {}
    if found and all(isinstance(x, torch.Tensor) for x in found.values()):
        raise ValueError(f'{path} holds weights alone, without their config: use a checkpoint of train.py')
    missing = [name for name in dicts if not isinstance(found.get(name), dict)]
    if missing:
        raise ValueError(f'{path} is no checkpoint of these scripts, it has no {missing[0]}: use another one')
    return checkpoint

@contextmanager
def unless_damaged():
    """Passes over what damage raises, which may be anything. An unreadable file is not a damaged one."""
    try:
        yield
    except OSError as error:                # damage may send a reader to before the first byte: EINVAL
        if error.errno not in (errno.ENOENT, errno.EINVAL):
            raise
    except Exception as error:
        if isinstance(error, MemoryError) or re.search('Too many open files|unable to mmap', str(error)):
            raise OSError(str(error) or 'out of memory') from None

def there(path):
    """Whether a file or folder exists. OSError if that cannot be known now: it must not pass for missing."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True

def restarted(last):
    """Whether this run of torchrun, by its id, wrote the checkpoint last, and should continue from it."""
    run = os.environ.get('TORCHELASTIC_RUN_ID', 'none')
    if run == 'none' and int(os.environ.get('TORCHELASTIC_MAX_RESTARTS', 0)):
        raise ValueError('with --max_restarts torchrun needs a name for this run: give it as --rdzv_id=NAME')
    return run != 'none' and there(last) and load_checkpoint(last).get('run') == run

def resumed(last, knobs, meta, names):
    """The checkpoint last, or {} for a new run. Its data and these of its knobs must be those of now."""
    if knobs.init_from != 'resume' and not restarted(last):
        return {}
    checkpoint = load_checkpoint(last, ('model', 'config', 'meta', 'knobs'))
    if checkpoint['meta'] != meta:
        raise ValueError(f'{last} has seen other tokens than data/{knobs.dataset}: give its own --dataset')
    for name in names:
        before = checkpoint['knobs'].get(name)
        if getattr(knobs, name) != before:
            raise ValueError(f'{name} = {getattr(knobs, name)}, but {last} was made with {name} = {before}')
    if all_reduce(checkpoint['step'])[0] != checkpoint['step'] * world:
        raise ValueError(f'the machines have {last} of different steps: copy that of the first to the others')
    return checkpoint

def free_memory():
    """Bytes that the main memory of this machine still has."""
    with suppress(OSError):                 # only Linux says so
        return 1024 * int(re.search(r'MemAvailable: *(\d+)', Path('/proc/meminfo').read_text())[1])
    return math.inf

def room_to_save(model, optimizer):
    """ValueError if the first process cannot hold the weights and moments of a sharded model."""
    moments = [x for state in optimizer.state.values() for x in state.values()]
    needed = 4 * sum(x.numel() for x in (*model.parameters(), *moments))
    [free] = all_reduce(free_memory() if main else 0)
    if needed > free:
        raise ValueError(f'a checkpoint takes {needed / 1e9:.3g} GB of main memory in the first process, and '
                         f'{free / 1e9:.3g} GB are left there: make room; what was saved is unchanged')

def save_run(paths, model, optimizer, here, knobs, **more):
    """Writes a checkpoint from which any number of processes can resume."""
    def keep(x):                            # the first process collects shards in its main memory
        if not here.mesh or not isinstance(x, torch.Tensor):
            return x
        x = whole(x)
        return x.cpu() if main else None

    if here.mesh:
        room_to_save(model, optimizer)
    tensors = {weight: keep(weight.detach()) for weight in model.parameters()}          # tied ones once
    weights = {name: tensors[weight] for name, weight in model.named_parameters(remove_duplicate=False)}
    states = tree_map(keep, optimizer.state_dict())
    if main:
        save_checkpoint(paths, dict(model=weights, config=vars(model.config), optimizer=states,
                                    scaler=here.scaler.state_dict(), knobs=vars(knobs), **more))

def load_run(checkpoint, model, optimizer, here):
    """What save_run() saved, but for the optimizer's knobs: they are those of now."""
    weights = checkpoint.pop('model')       # mapped from its file, as the moments
    if {name: x.shape for name, x in weights.items()} != {n: x.shape for n, x in model.state_dict().items()}:
        raise ValueError('the weights of the checkpoint are not those of its config: use another one')
    for name, weight in model.named_parameters():
        fill(weight, weights[name])
    states = optimizer.state_dict()         # with the knobs, and the weights in this order
    weights = [weight for group in optimizer.param_groups for weight in group['params']]
    for i, moments in checkpoint.pop('optimizer')['state'].items():
        states['state'][i] = {name: fill(torch.zeros_like(weights[i]), x) if x.dim() else x
                              for name, x in moments.items()}
    optimizer.load_state_dict(states)
    if checkpoint['scaler']:                # empty, unless the run was in float16
        here.scaler.load_state_dict(checkpoint['scaler'])

def open_log(folder, columns, step):
    """record(step, **values): prints, and adds a row to log.csv. No other run can use the folder then."""
    if not main:
        return lambda step, **values: None
    os.makedirs(folder, exist_ok=True)
    log = open(os.path.join(folder, 'log.csv'), 'a+', newline='', encoding='latin-1', buffering=1)
    try:
        if fcntl:                           # Windows has no such locks
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f'{folder} is in use by another run: choose another --out_dir') from None
    except OSError:                         # some file systems have none either
        pass
    log.seek(0)
    text = log.read()
    rows = re.finditer(r'(?m)^(\d+),[ -~]*\r?\n', text) if step else []
    kept = [row.end() for row in rows if int(row[1]) <= step]       # a killed run has logged later steps
    log.truncate(max(kept, default=0))
    columns = text.splitlines()[0].split(',') if kept else columns.split()     # an older run may have fewer
    writer = csv.DictWriter(log, columns, extrasaction='ignore')
    if not kept:
        writer.writeheader()

    def record(step, **values):
        shown = {name: f'{x:.5g}' if isinstance(x, float) else x for name, x in values.items()}
        say(f'step {step}: ' + ', '.join(f'{name} {x}' for name, x in shown.items() if x is not None))
        writer.writerow(dict(values, step=step))
    return record
