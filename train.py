"""
Trains a GPT, standard or reversible, on one process or many.

    python train.py config/python_rev.py                                # two CPU cores, some minutes
    python train.py config/gpt2_rev.py                                  # one GPU
    torchrun --standalone --nproc_per_node=8 train.py config/gpt2_rev.py            # eight GPUs of one machine
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py config/gpt2_rev.py
    python train.py config/python_rev.py --init_from=resume             # goes on where it stopped, bit for bit

It writes log.csv, last.pt (at every evaluation, at the end, and on Ctrl-C or SIGTERM) and best.pt to out_dir.
What it trains on is a function of seed and step alone: neither the number of processes, nor how a step is cut into
micro-batches, nor how often it evaluates changes the data.
"""
import csv
import json
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from configurator import configure, machine
from model import GPT, GPTConfig, load_checkpoint, save_checkpoint

@dataclass
class Knobs:
    out_dir: str = 'out'
    init_from: str = 'scratch'              # or 'resume': from last.pt in out_dir
    seed: int = 1337
    # data
    dataset: str = 'python'                 # a folder of data/
    batch_size: int = 12                    # sequences in a micro-batch
    gradient_accumulation_steps: int = 40   # micro-batches a step, over all processes together
    block_size: int = 1024                  # tokens in a sequence
    # model: see GPTConfig in model.py
    vocab_size: int | None = None           # None: what the data needs, rounded up to a multiple of 64
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = False                      # nanoGPT's choice: a bit faster, and no worse
    scheme: str = 'leapfrog'
    h: float | list | None = None
    a: float | list | str | None = None
    stored_layers: int | None = None
    exact: bool = True
    # optimizer: AdamW, with a warm-up and a cosine
    learning_rate: float = 6e-4
    max_iters: int = 600000                 # steps
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0                  # the largest norm of the gradient; 0: no limit
    decay_lr: bool = True
    warmup_iters: int = 2000
    lr_decay_iters: int | None = None       # None: max_iters
    min_lr: float = 6e-5
    # evaluation: always the same windows of the validation data, spread evenly over it
    eval_interval: int = 2000
    eval_windows: int = 2400                # sequences of block_size
    log_interval: int = 10
    # machine
    device: str = 'auto'                    # 'cuda', 'mps', 'cpu'
    dtype: str = 'auto'                     # 'float32', 'bfloat16', 'float16'
    compile: bool = False                   # torch.compile of the blocks: worth its minute on a GPU

knobs = configure(Knobs, sys.argv[1:])

# -----------------------------------------------------------------------------
# processes, device, dtype

rank, world, local_rank = (int(os.environ.get(name, default)) for name, default in
                           (('RANK', 0), ('WORLD_SIZE', 1), ('LOCAL_RANK', 0)))
main = rank == 0                            # this one prints and writes

def say(*args):
    if main:
        print(*args, flush=True)

kind, dtype, reasons = machine(knobs.device, knobs.dtype)
say(reasons)
device = torch.device(kind, local_rank) if kind == 'cuda' else torch.device(kind)
if kind == 'cuda':
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision('high')      # TF32 for what stays in float32
if world > 1:
    dist.init_process_group('nccl' if kind == 'cuda' else 'gloo')
autocast = torch.autocast(kind, getattr(torch, dtype), enabled=dtype != 'float32')
scaler = torch.amp.GradScaler(kind, enabled=dtype == 'float16')

def all_reduce(*numbers):
    """The sums over all processes."""
    numbers = torch.tensor(numbers, dtype=torch.float64, device='cpu' if kind != 'cuda' else device)
    if world > 1:
        dist.all_reduce(numbers)
    return numbers.tolist()

def fail(sentence):
    sys.exit(sentence if local_rank == 0 else 1)        # once on every machine: one alone may be at fault

for name in ('batch_size', 'gradient_accumulation_steps', 'block_size', 'max_iters', 'eval_interval', 'eval_windows',
             'log_interval', 'vocab_size', 'lr_decay_iters'):
    if getattr(knobs, name) is not None and getattr(knobs, name) < 1:
        fail(f'{name} = {getattr(knobs, name)} must be 1 or more')
for name in ('seed', 'learning_rate', 'min_lr', 'weight_decay', 'warmup_iters', 'grad_clip'):
    if not getattr(knobs, name) >= 0:       # nor nan
        fail(f'{name} = {getattr(knobs, name)} must be 0 or more')
for name in ('beta1', 'beta2'):
    if not 0 <= getattr(knobs, name) < 1:
        fail(f'{name} = {getattr(knobs, name)} must be 0 or more, and below 1')

# -----------------------------------------------------------------------------
# data

folder = os.path.join('data', knobs.dataset)
try:
    with open(os.path.join(folder, 'meta.json'), encoding='utf-8') as file:
        meta = json.load(file)              # how text became tokens: sample.py needs it too
    train_data, val_data = (np.memmap(os.path.join(folder, f'{split}.bin'), dtype=meta['dtype'], mode='r')
                            for split in ('train', 'val'))
except (OSError, ValueError, KeyError):
    fail(f'there is no data in {folder}, or not all of it: run "python {folder}/prepare.py" first')
T = knobs.block_size
if min(len(train_data), len(val_data)) <= T:
    fail(f'{folder} has {len(train_data)} training and {len(val_data)} validation tokens, too few for '
         f'block_size = {T}: choose a smaller block_size')
if knobs.gradient_accumulation_steps % world:
    fail(f'gradient_accumulation_steps = {knobs.gradient_accumulation_steps} must be divisible by {world} processes')
accumulation = knobs.gradient_accumulation_steps // world      # of this process
rows_per_step = knobs.batch_size * knobs.gradient_accumulation_steps

def windows(data, starts):
    """Inputs and targets, both (rows, T), from these places of the data."""
    x = torch.from_numpy(np.stack([data[i:i + T + 1] for i in starts]).astype(np.int64))
    if kind == 'cuda':
        x = x.pin_memory().to(device, non_blocking=True)
    return x[:, :-1].to(device), x[:, 1:].to(device)

def train_batch(step, micro):
    """This process's rows of a micro-batch. Row i of a step starts at a place that seed, step and i decide."""
    first = (micro * world + rank) * knobs.batch_size
    return windows(train_data, [np.random.default_rng((knobs.seed, step, i)).integers(len(train_data) - T)
                                for i in range(first, first + knobs.batch_size)])

# -----------------------------------------------------------------------------
# model, optimizer, checkpoint

FIXED = 'block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'bias', 'scheme', 'h', 'a'    # once it has trained
checkpoint, step, best_val_loss = None, 0, math.inf
last, best, log = (os.path.join(knobs.out_dir, name) for name in ('last.pt', 'best.pt', 'log.csv'))
try:
    if knobs.init_from == 'resume':
        checkpoint = load_checkpoint(last)
        if checkpoint['meta'] != meta:
            fail(f'{last} was trained on other tokens than those of {folder}: give the --dataset it had')
        for name in FIXED:
            if getattr(knobs, name) != checkpoint['knobs'][name]:
                fail(f"{name} = {getattr(knobs, name)}, but {last} was trained with {name} = "
                     f"{checkpoint['knobs'][name]}: resume with the config file and flags it was trained with")
        config = replace(GPTConfig(**checkpoint['config']), dropout=knobs.dropout, exact=knobs.exact,
                         stored_layers=knobs.stored_layers)
    elif knobs.init_from == 'scratch':
        shared = {field.name: getattr(knobs, field.name) for field in fields(GPTConfig)}
        shared['vocab_size'] = knobs.vocab_size or math.ceil(meta['vocab_size'] / 64) * 64
        config = GPTConfig(**shared)
    else:
        fail(f"init_from = '{knobs.init_from}': choose scratch or resume")
except ValueError as error:
    fail(str(error))
if config.vocab_size < meta['vocab_size']:
    fail(f"vocab_size = {config.vocab_size} is too small: {folder} has {meta['vocab_size']} different tokens")

torch.manual_seed(knobs.seed)
raw_model = GPT(config).to(device)
optimizer = raw_model.optimizer(knobs.weight_decay, knobs.learning_rate, (knobs.beta1, knobs.beta2))
if checkpoint:
    raw_model.load_state_dict(checkpoint['model'])
    # its moments; weight decay and betas are those of the knobs
    optimizer.load_state_dict(dict(optimizer.state_dict(), state=checkpoint['optimizer']['state']))
    if checkpoint['scaler']:                # empty, unless the run was in float16
        scaler.load_state_dict(checkpoint['scaler'])
    step, best_val_loss = checkpoint['step'], checkpoint['best_val_loss']
    checkpoint = None                       # free its memory
if all_reduce(step)[0] != step * world:
    fail(f'{last} is of different steps on different machines: copy that of the first machine to the others')
if knobs.compile:
    raw_model.compile()
model = raw_model
if world > 1:
    model = DistributedDataParallel(raw_model, device_ids=[local_rank] if kind == 'cuda' else None)

def save(path):
    if main:
        save_checkpoint(path, dict(
            model=raw_model.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), step=step,
            best_val_loss=best_val_loss, config=asdict(raw_model.config), meta=meta, knobs=asdict(knobs)))

# -----------------------------------------------------------------------------
# what is measured

@torch.no_grad()
def validation_loss():
    """Mean loss in nats per token over the fixed windows, each process taking its share."""
    raw_model.eval()
    starts = np.linspace(0, len(val_data) - T - 1, min(knobs.eval_windows, len(val_data) - T)).astype(int)[rank::world]
    total = 0.0
    for i in range(0, len(starts), knobs.batch_size):
        rows = starts[i:i + knobs.batch_size]
        with autocast:
            total += raw_model(*windows(val_data, rows))[1].item() * len(rows)
    raw_model.train()
    total, count = all_reduce(total, len(starts))
    return total / count

def learning_rate(step):
    """Linear warm-up, then a cosine down to min_lr."""
    if not knobs.decay_lr:
        return knobs.learning_rate
    if step < knobs.warmup_iters:
        return knobs.learning_rate * (step + 1) / (knobs.warmup_iters + 1)
    end = knobs.lr_decay_iters or knobs.max_iters
    ratio = min(1.0, (step - knobs.warmup_iters) / max(1, end - knobs.warmup_iters))
    return knobs.min_lr + 0.5 * (1 + math.cos(math.pi * ratio)) * (knobs.learning_rate - knobs.min_lr)

def peak_memory():
    """Gigabytes: allocated on the GPU, or resident in this process."""
    if kind == 'cuda':
        return torch.cuda.max_memory_allocated() / 1e9
    if kind == 'mps':
        return torch.mps.driver_allocated_memory() / 1e9
    if sys.platform == 'win32':             # which has no resource module
        return math.nan
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024) / 1e9

# dense bf16 and fp16 operations a second, from the vendor's data sheets; of no other device is MFU known
PEAK_FLOPS = {'NVIDIA H200': 989e12, 'NVIDIA H100 80GB HBM3': 989e12, 'NVIDIA A100-SXM4-80GB': 312e12,
              'NVIDIA A100-SXM4-40GB': 312e12, 'NVIDIA A100 80GB PCIe': 312e12, 'NVIDIA A100-PCIE-40GB': 312e12,
              'NVIDIA L40S': 362e12, 'NVIDIA L4': 121e12, 'Tesla V100-SXM2-16GB': 125e12, 'Tesla T4': 65e12}
peak_flops = PEAK_FLOPS.get(torch.cuda.get_device_name()) if kind == 'cuda' and dtype != 'float32' else None
# 6 operations a weight and token, and 12 for each pair of tokens and channel in attention; what is computed a second
# time in the backward pass is not counted, so that schemes compare
matrices = raw_model.count_parameters() - config.block_size * config.n_embd
flops_per_token = 6 * matrices + 12 * config.n_layer * config.n_embd * T

# -----------------------------------------------------------------------------
# training

COLUMNS = ['step', 'loss', 'lr', 'grad_norm', 'tokens_per_s', 'peak_gb', 'mfu', 'val_loss']
if main:
    try:
        os.makedirs(knobs.out_dir, exist_ok=True)
    except OSError as error:
        fail(f'{knobs.out_dir} cannot be made: {error.strerror}; choose another --out_dir')
    rows = []
    if step and os.path.exists(log):        # a run that was killed has logged steps that its checkpoint does not know
        with open(log, newline='') as file:
            rows = [row for row in csv.DictReader(file) if row['step'].isdigit() and int(row['step']) <= step]
    with open(f'{log}.part', 'w', newline='') as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(f'{log}.part', log)

def record(**values):
    if main:
        with open(log, 'a', newline='') as file:
            csv.DictWriter(file, COLUMNS).writerow(values)

signals = []                                # that asked this process to stop; torchrun passes on what it gets itself
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: signals.append(number))

tokens_per_step = rows_per_step * T
say(f'{raw_model.count_parameters():,} parameters, scheme {config.scheme}, '
    f'{config.stored_layers} of {config.n_layer} layers stored')
say(f'{tokens_per_step:,} tokens a step: {world} processes x {accumulation} micro-batches x {knobs.batch_size} x {T}')

def evaluate_and_save():
    global best_val_loss
    val_loss = validation_loss()
    if not math.isfinite(val_loss):
        fail(f'step {step}: the validation loss is {val_loss}; stopped, and no checkpoint is written')
    say(f'step {step}: validation loss {val_loss:.4f}')
    record(step=step, val_loss=val_loss)
    if step == 0:                           # nothing is learnt yet, and an earlier run may have left its last.pt here
        return
    if val_loss < best_val_loss:
        best_val_loss = val_loss
        save(best)
    save(last)

if step == 0:
    evaluate_and_save()
clock, steps_timed = time.time(), 0
while step < knobs.max_iters:
    lr = learning_rate(step)
    for group in optimizer.param_groups:
        group['lr'] = lr
    # dropout too depends on the step alone, so that nothing of it need be saved
    torch.manual_seed(int(np.random.default_rng((knobs.seed, step, rank, 1)).integers(2**63)))
    loss = 0.0
    for micro in range(accumulation):
        x, y = train_batch(step, micro)
        last_one = micro == accumulation - 1
        with nullcontext() if last_one or world == 1 else model.no_sync():      # gradients are reduced once
            with autocast:
                micro_loss = model(x, y)[1] / accumulation
            scaler.scale(micro_loss).backward()
        loss += micro_loss.item()
    loss, stop = all_reduce(loss / world, len(signals))        # all processes stop at the same step
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), knobs.grad_clip or math.inf).item()
    if not math.isfinite(loss) or not (math.isfinite(norm) or scaler.is_enabled()):     # a scaler mends its own
        fail(f'step {step}: the loss is {loss} and the gradient norm {norm}; stopped before they reach the weights'
             + (f', and {last} is as it was' if os.path.exists(last) else ''))
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    step += 1
    steps_timed += 1

    if step % knobs.log_interval == 0 or step == knobs.max_iters:
        speed = tokens_per_step * steps_timed / (time.time() - clock)
        clock, steps_timed = time.time(), 0
        mfu = speed * flops_per_token / (peak_flops * world) if peak_flops else None
        say(f'step {step}: loss {loss:.4f}, lr {lr:.2e}, norm {norm:.2f}, {speed:,.0f} tokens/s, '
            f'peak {peak_memory():.2f} GB' + (f', MFU {mfu:.1%}' if mfu else ''))
        record(step=step, loss=loss, lr=lr, grad_norm=norm, tokens_per_s=round(speed), peak_gb=round(peak_memory(), 3),
               mfu=mfu)
    if step % knobs.eval_interval == 0 or step == knobs.max_iters:
        pause = time.time()
        evaluate_and_save()
        clock += time.time() - pause
    if stop:
        save(last)
        say(f'stopped at step {step}: go on with --init_from=resume')
        break

if world > 1:
    dist.destroy_process_group()
