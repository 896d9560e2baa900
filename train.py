"""
Trains a GPT, standard or reversible, on one process or many.

    python train.py config/python_rev.py                                # two CPU cores, some minutes
    python train.py config/gpt2_rev.py                                  # one GPU
    torchrun --standalone --nproc_per_node=8 train.py config/gpt2_rev.py            # eight GPUs of one machine
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=FIRST_MACHINE:29500 \\
        --rdzv_id=NAME --max_restarts=3 train.py config/gpt2_rev.py --batch_size=30 --gradient_accumulation_steps=16        # both share out_dir
    python train.py config/python_rev.py --init_from=resume             # continues where it stopped, bit for bit
    python train.py --init_from=gpt2 --dataset=shakespeare ...          # trains a pretrained or retrofitted model further

It writes log.csv, last.pt (at every evaluation after step 0, at the end, and on Ctrl-C or SIGTERM) and best.pt to out_dir.
When torchrun restarts the processes, or is itself started again with the same --rdzv_id, the run continues from its last.pt.
A resumed run equals an uninterrupted one bit for bit if kernels are deterministic, as they are on a CPU. On a GPU the backward pass
of attention adds in another order each time, so that not even two runs from the same start are equal.
The data of a step depend on seed and step alone: not on the number of processes, nor on how a step is cut into micro-batches,
nor on how often the model is evaluated.
"""
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, fields, replace

import torch
from torch.nn.parallel import DistributedDataParallel

from configurator import configure
from model import GPT, GPTConfig
from pretrained import build, load, reversible, same_tokens
from runtime import (adamw, agree, all_reduce, catch_signals, compile_parts, cosine, count_parameters, duration, fail, leave, load_checkpoint, local_rank, main,
                     most_stored_layers, open_data, open_log, peak_memory, restarted, save_checkpoint, say, seed_step, start,
                     training_batch, validation_loss, world)

@dataclass
class Knobs(GPTConfig):                     # all fields of GPTConfig in model.py are knobs too
    vocab_size: int | None = None           # None: what the data needs, rounded up to a multiple of 64
    stored_layers: int | str | None = None  # 'auto': as many as fit into memory_gb; otherwise as in GPTConfig
    memory_gb: float | None = None          # GB that stored_layers = 'auto' may use; None: nine tenths of the GPU's memory
    bias: bool = False                      # nanoGPT's choice: a bit faster, and no worse
    scheme: str | None = None               # None: leapfrog from scratch, midpoint_a with bits or a, else init_from's (standard after BDIA)
    bits: int | float | None = None         # makes a trained standard model reversible: midpoint_a with a = -1 / 2^bits
    out_dir: str = 'out'
    init_from: str = 'scratch'              # 'resume': continue from last.pt in out_dir. Otherwise a checkpoint, or anything
                                            # GPT.from_pretrained takes, to train further. A standard model becomes
                                            # reversible with bits, or with scheme and a or h
    seed: int = 1337
    # data
    dataset: str = 'python'                 # a folder of data/
    batch_size: int = 12                    # sequences of block_size tokens in a micro-batch
    gradient_accumulation_steps: int = 40   # micro-batches per step, over all processes together
    # optimizer: AdamW, with a warm-up and a cosine
    learning_rate: float = 6e-4
    max_iters: int = 600000                 # steps
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0                  # the largest norm of the gradient; 0: no limit
    zero: bool = False                      # ZeRO stage 1: each of N processes keeps 8 / N instead of 8 bytes of moments per weight
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

    def __post_init__(self):
        pass                                # GPTConfig looks at its fields when the model is built

knobs = configure(Knobs, sys.argv[1:])

here = start(knobs)
meta, train_data, val_data = open_data(knobs)

# -----------------------------------------------------------------------------
# model, optimizer, checkpoint

FIELDS = {field.name for field in fields(GPTConfig)}
auto = knobs.stored_layers == 'auto'
if isinstance(knobs.stored_layers, str) and not auto:
    fail(f"stored_layers = '{knobs.stored_layers}': give a number, None or 'auto'")
PASSING = dict(dropout=knobs.dropout, exact=knobs.exact, verify=knobs.verify, slice_tokens=knobs.slice_tokens,  # may change on the way
               stored_layers=None if auto else knobs.stored_layers)
checkpoint, step, best_val_loss = None, 0, math.inf
last, best = (os.path.join(knobs.out_dir, name) for name in ('last.pt', 'best.pt'))
torch.manual_seed(knobs.seed)

def fitting(config):
    """The config, if this machine can hold such a model. On a CPU that lacks the memory it ends the program; on a GPU CUDA says so."""
    with torch.device('meta'):              # no memory yet
        n = count_parameters(GPT(config))
    there = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') if hasattr(os, 'sysconf') else math.inf
    if here.kind == 'cpu' and 16 * n > there:
        fail(f'{n:,} weights take {16 * n / 1e9:,.0f} GB with gradients and moments, and this machine has {there / 1e9:.0f} GB: '
             'choose a smaller model')
    return config

try:
    if restarted(last):
        knobs.init_from = 'resume'
    if knobs.init_from == 'scratch':
        knobs.scheme = knobs.scheme or 'leapfrog'
    if knobs.bits is not None and (knobs.init_from == 'scratch' or knobs.bits not in range(9) or knobs.a is not None or knobs.scheme):
        fail(f'bits = {knobs.bits}: with --init_from of a trained standard model give a whole number from 0 to 8 instead of scheme and '
             'a; for other budgets run retrofit.py --max_iters=0, and give train.py its checkpoint as --init_from')
    if knobs.init_from == 'scratch':
        vocab_size = knobs.vocab_size or math.ceil(meta['vocab_size'] / 64) * 64
        raw_model = GPT(fitting(GPTConfig(**{**{name: getattr(knobs, name) for name in FIELDS}, **PASSING, 'vocab_size': vocab_size})))
    elif knobs.init_from == 'resume':
        checkpoint = load_checkpoint(last)
        if 'knobs' not in checkpoint:
            fail(f'{last} was not written by train.py: start from it with --init_from={last} and another --out_dir')
        if checkpoint['meta'] != meta:
            fail(f'{last} was trained on other tokens than those of data/{knobs.dataset}: give the --dataset it had')
        for name in sorted(FIELDS - set(PASSING)):
            if getattr(knobs, name) != checkpoint['knobs'][name] and (name, knobs.scheme) != ('scheme', None):
                fail(f"{name} = {getattr(knobs, name)}, but {last} was trained with {name} = "
                     f"{checkpoint['knobs'][name]}: resume with the config file and flags it was trained with")
        raw_model = GPT(fitting(replace(GPTConfig(**checkpoint['config']), **PASSING)))
    else:
        source, a = fitting(GPTConfig(**load(knobs.init_from)[0])), knobs.a if knobs.bits is None else -1 / 2**knobs.bits
        scheme, change = knobs.scheme or ('midpoint_a' if a is not None else source.scheme), {}
        if source.scheme == 'standard' != scheme:
            converted = reversible(source, scheme, a, knobs.h)
            change = {name: getattr(converted, name) for name in ('scheme', 'a', 'h')}
        raw_model, its_meta = build(knobs.init_from, **PASSING, **change)
        if knobs.bits is not None and not change:
            fail(f'bits = {knobs.bits}, but {knobs.init_from} has scheme = {source.scheme}, and keeps it: leave bits out')
        for name in sorted(FIELDS - {*PASSING, *change, 'block_size'}):
            if getattr(knobs, name) not in (getattr(Knobs, name), getattr(raw_model.config, name)):
                fail(f'{name} = {getattr(knobs, name)}, but {knobs.init_from} has {name} = '
                     f'{getattr(raw_model.config, name)}, and keeps it: leave {name} out')
        same_tokens(knobs.init_from, its_meta, f'data/{knobs.dataset}', meta)
except ValueError as error:
    fail(str(error))
config = raw_model.config
if config.vocab_size < meta['vocab_size']:
    fail(f"vocab_size = {config.vocab_size} is too small: data/{knobs.dataset} has {meta['vocab_size']} different tokens")
if config.block_size < knobs.block_size:
    fail(f'block_size = {knobs.block_size}: {knobs.init_from} sees {config.block_size} tokens at most')
if auto:
    config.stored_layers = most_stored_layers(config, knobs, here)

raw_model.to(here.device)
zero = knobs.zero and world > 1
optimizer = adamw(raw_model, knobs.weight_decay, knobs.learning_rate, (knobs.beta1, knobs.beta2), zero)
if checkpoint:
    raw_model.load_state_dict(checkpoint['model'])
    for its, ours in zip(checkpoint['optimizer']['param_groups'], optimizer.param_groups):
        its.update({key: value for key, value in ours.items() if key != 'params'})      # weight decay and betas of the knobs
    optimizer.load_state_dict(checkpoint['optimizer'])
    if checkpoint['scaler']:                # empty, unless the run was in float16
        here.scaler.load_state_dict(checkpoint['scaler'])
    step, best_val_loss = checkpoint['step'], checkpoint['best_val_loss']
    checkpoint = None                       # free its memory
if all_reduce(step)[0] != step * world:
    fail(f'the machines have {last} of different steps: copy that of the first machine to the others')
if knobs.compile:
    compile_parts(raw_model)
model = raw_model
if world > 1:
    model = DistributedDataParallel(raw_model, device_ids=[local_rank] if here.kind == 'cuda' else None,
                                    gradient_as_bucket_view=True)           # avoids a second copy of all gradients

def save(*paths):
    if zero:
        optimizer.consolidate_state_dict()  # sends all moments to the first process, so that any number of processes can resume
    if main:
        save_checkpoint(paths, dict(
            model=raw_model.state_dict(), optimizer=optimizer.state_dict(), scaler=here.scaler.state_dict(), step=step,
            best_val_loss=best_val_loss, config=asdict(raw_model.config), meta=meta, knobs=asdict(knobs)))

# dense bf16 and fp16 operations per second, from the vendor's data sheets; other devices get no MFU
PEAK_FLOPS = {'NVIDIA H200': 989e12, 'NVIDIA H100 80GB HBM3': 989e12, 'NVIDIA A100-SXM4-80GB': 312e12,
              'NVIDIA A100-SXM4-40GB': 312e12, 'NVIDIA A100 80GB PCIe': 312e12, 'NVIDIA A100-PCIE-40GB': 312e12,
              'NVIDIA H100 PCIe': 756e12, 'NVIDIA H100 NVL': 835e12, 'NVIDIA GH200 480GB': 989e12, 'NVIDIA B200': 2250e12,
              'NVIDIA L40S': 362e12, 'NVIDIA L4': 121e12, 'Tesla V100-SXM2-16GB': 125e12, 'Tesla T4': 65e12}
peak_flops = (PEAK_FLOPS.get(torch.cuda.get_device_name())
              if here.kind == 'cuda' and here.dtype != 'float32' else None)
# 6 operations per weight and token, and 12 per pair of tokens and channel of attention; recomputation in the backward
# pass is not counted, so that the MFU of different schemes can be compared
lookups = [raw_model.get_parameter(f'transformer.{name}.weight').numel()         # tables that multiply nothing
           for name, there in (('wpe', config.rope_theta is None), ('wte', not config.tied)) if there]
flops_per_token = (6 * (count_parameters(raw_model) - sum(lookups))
                   + 12 * config.n_layer * config.n_embd * knobs.block_size)

# -----------------------------------------------------------------------------
# training

record = open_log(knobs.out_dir, ['step', 'loss', 'lr', 'grad_norm', 'tokens_per_s', 'peak_gb', 'mfu', 'val_loss'], step)
catch_signals()
tokens_per_step = knobs.batch_size * knobs.gradient_accumulation_steps * knobs.block_size
say(f'{count_parameters(raw_model):,} parameters, scheme {config.scheme}, '
    f'{config.stored_layers} of {config.n_layer} layers stored')
say(f'{tokens_per_step:,} tokens per step: {world} processes x {knobs.gradient_accumulation_steps // world} '
    f'micro-batches x {knobs.batch_size} x {knobs.block_size}')

def evaluate_and_save():
    global best_val_loss
    val_loss = validation_loss(raw_model, val_data, knobs, here)
    if not math.isfinite(val_loss):
        fail(f'step {step}: the validation loss is {val_loss}; stopped without writing a checkpoint: try a lower --learning_rate')
    say(f'step {step}: validation loss {val_loss:.4f}')
    record(step=step, val_loss=val_loss)
    if step == 0:                           # nothing is learnt yet, and an earlier run may have left its last.pt here
        return
    if val_loss < best_val_loss:
        best_val_loss = val_loss
        save(last, best)
    else:
        save(last)

if step == 0:
    evaluate_and_save()
if step >= knobs.max_iters:
    say(f'all {step} steps have been made already: give a larger --max_iters to continue')
accumulation = knobs.gradient_accumulation_steps // world       # micro-batches of this process
began, first_step = time.time(), step
clock, clock_step = began, step
x, y = training_batch(train_data, knobs, step, 0, here.device)                  # (B, T) each
while step < knobs.max_iters:
    lr = cosine(knobs, step) if knobs.decay_lr else knobs.learning_rate
    for group in optimizer.param_groups:
        group['lr'] = lr
    seed_step(knobs, step)                  # dropout and BDIA depend on seed, step and rank alone: no state of theirs is saved
    loss = 0.0
    for micro in range(accumulation):
        if world > 1:                       # the gradients of all processes meet once, in the last micro-batch
            model.require_backward_grad_sync = micro == accumulation - 1
        with here.autocast:
            micro_loss = model(x, y)[1] / accumulation
        here.scaler.scale(micro_loss).backward()
        loss += micro_loss.detach()
        following = (step, micro + 1) if micro + 1 < accumulation else (step + 1, 0)
        x, y = training_batch(train_data, knobs, *following, here.device)       # while a GPU is still at work
    here.scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), knobs.grad_clip or math.inf)
    loss, norm, stop = agree(step, loss, norm, raw_model, here)                 # the only place that waits for the GPU
    if stop:                                # this step is not taken: the weights are those after the previous step
        save(last)
        say(f'stopped at step {step}: continue with --init_from=resume')
        break
    here.scaler.step(optimizer)
    here.scaler.update()
    optimizer.zero_grad(set_to_none=True)
    step += 1

    if step % knobs.log_interval == 0 or step == knobs.max_iters:
        now = time.time()
        speed = tokens_per_step * (step - clock_step) / (now - clock)
        left = (now - began) / (step - first_step) * (knobs.max_iters - step)
        clock, clock_step = now, step
        mfu = speed * flops_per_token / (peak_flops * world) if peak_flops else None
        say(f'step {step}: loss {loss:.4f}, lr {lr:.2e}, norm {norm:.2f}, {speed:,.0f} tokens/s, '
            f'peak {peak_memory(here.kind):.2f} GB' + (f', MFU {mfu:.1%}' if mfu else '') + f', {duration(left)} left')
        record(step=step, loss=loss, lr=lr, grad_norm=norm, tokens_per_s=round(speed),
               peak_gb=round(peak_memory(here.kind), 3), mfu=mfu)
    if step % knobs.eval_interval == 0 or step == knobs.max_iters:
        pause = time.time()
        evaluate_and_save()
        clock += time.time() - pause        # not counted in tokens/s

del model
leave()
