"""
Trains a GPT, standard or reversible, on one process or many.

    python train.py config/python_rev.py                                # two CPU cores, some minutes
    python train.py config/gpt2_rev.py                                  # one GPU
    torchrun --standalone --nproc_per_node=8 train.py config/gpt2_rev.py        # eight GPUs of one machine
    torchrun ... train.py config/finetune_llama.py      # the same, for a model that is larger than a GPU
    python train.py config/python_rev.py --init_from=resume             # goes on where it stopped
    python train.py --init_from=gpt2 --dataset=shakespeare ...          # trains a pretrained model further

It writes log.csv to out_dir, last.pt at every evaluation, at the end, on Ctrl-C and on SIGTERM, and best.pt
when the validation loss falls. A run that torchrun restarts goes on by itself, if it has its own --rdzv_id.
The data of a step depend on seed and step alone. On a CPU resumed runs equal uninterrupted ones bit for bit.
"""
import math
import sys
import time
from dataclasses import dataclass, replace

import torch

from configurator import configure
from memory import fitting, most_stored_layers, peak_memory
from model import GPTConfig
from pretrained import as_standard, build, chosen, fit_range, landed, new, same_tokens
from runtime import (adamw, agree, catch_signals, clip, cosine, count_parameters, distributed, leave,
                     load_run, make_room, micro_batches, open_data, open_log, pace, resumed, save_run, say,
                     seed_step, start, training_batches, validation_loss, windows, world)

@dataclass
class Knobs:
    out_dir: str = 'out'
    init_from: str = 'scratch'              # or 'resume', or a checkpoint, or what from_pretrained() takes
    seed: int = 1337
    # data
    dataset: str = 'python'                 # a folder of data/
    batch_size: int = 12                    # sequences of block_size tokens in a micro-batch
    gradient_accumulation_steps: int = 40   # micro-batches per step, over all processes together
    block_size: int = 1024                  # tokens of a sequence
    # model
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = False                      # in linear layers and layer norms
    vocab_size: int | None = None           # None: what the data need, rounded up to a multiple of 64
    norm: str = 'layernorm'                 # this and the next eight as in GPTConfig
    norm_eps: float = 1e-5
    mlp: str = 'gelu'
    gelu: str = 'erf'
    n_inner: int | None = None
    n_kv_head: int | None = None
    rope_theta: float | None = None
    tied: bool = True
    slice_tokens: int = 8192
    # reversibility
    scheme: str | None = None               # None: leapfrog from scratch, else that of init_from
    h: float | list | str | None = None     # step size; 'once' of midpoint_a: each output arrives once
    a: float | list | str | None = None     # of midpoint_a
    bits: int | None = None                 # makes a trained standard model reversible, with a = -1 / 2^bits
    land_part: float = 0.0                  # the last part of the steps, in which a and the rate fall to 0
    stored_layers: int | str | None = None  # the last layers, which keep their graphs; 'auto': as many as fit
    memory_gb: float | None = None          # GB for 'auto'; None: nine tenths of the GPU's memory
    exact: bool = True                      # integer states; False: floats, as in the paper
    state_bits: int | None = None           # of integer states, 32 or 64; None: 32, or as init_from has them
    fractional_bits: int | None = None      # of these, after the point: fewer have a wider range
    verify: bool = True                     # stop if the backward pass has rebuilt other states
    # optimizer: AdamW, with a warm-up and a cosine
    learning_rate: float = 6e-4
    min_lr: float = 6e-5                    # half of learning_rate in a run that lands
    max_iters: int = 600000                 # steps
    warmup_iters: int = 2000
    lr_decay_iters: int | None = None       # None: max_iters
    decay_lr: bool = True
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0                  # the largest norm of the gradient; 0: no limit
    # evaluation: always the same windows of the validation data, spread evenly over it
    eval_interval: int = 2000
    eval_windows: int = 2400                # sequences of block_size
    log_interval: int = 10
    # machine
    device: str = 'auto'                    # 'cuda', 'mps', 'cpu'
    dtype: str = 'auto'                     # 'float32', 'bfloat16', 'float16'
    compile: bool = False                   # torch.compile of the blocks: worth its minute on a GPU
    shard: bool = False                     # split weights, gradients and moments over the processes (FSDP2)

FREE = 'dropout exact verify slice_tokens stored_layers'.split()        # these may change from run to run
STATES = 'state_bits', 'fractional_bits'                                # and these, if they are given
FIXED = [name for name in GPTConfig.__dataclass_fields__ if name not in (*FREE, *STATES)]

# dense bf16 operations per second, by NVIDIA's data sheets; a longer name stands before a part of it
PEAK_FLOPS = {'B200': 2250e12, 'H200 NVL': 835e12, 'H200': 989e12, 'H100 NVL': 835e12, 'H100 PCIe': 756e12,
              'H100': 989e12, 'A100': 312e12, 'L40S': 362e12, 'L40': 181e12, 'L4': 121e12}

# -----------------------------------------------------------------------------
# set-up

knobs = configure(Knobs, sys.argv[1:])
here = start(knobs)
meta, train_data, val_data = open_data(knobs)
accumulation = micro_batches(knobs)
torch.manual_seed(knobs.seed)
last = f'{knobs.out_dir}/last.pt'
best = f'{knobs.out_dir}/best.pt'
checkpoint = resumed(last, knobs, meta, ['seed', 'dataset', 'bits', *FIXED])       # {} for a new run
step = checkpoint.get('step', 0)
best_val_loss = checkpoint.get('best_val_loss', math.inf)

given = {name: getattr(knobs, name) for name in FREE + FIXED}           # the knobs of the model
# training may have lowered fractional_bits: a knob that the run had from its start does not undo that
before = checkpoint.get('knobs', {})
states = {name: getattr(knobs, name) for name in STATES}
states = {name: x for name, x in states.items() if x not in (None, before.get(name))}
if 'state_bits' in states:                  # without fractional_bits they have those of a new model
    states['fractional_bits'] = knobs.fractional_bits
auto = knobs.stored_layers == 'auto'
if auto:                                    # counted below: the model has to be there
    given['stored_layers'] = None
if checkpoint:
    config = GPTConfig(**dict(state_bits=64) | checkpoint['config'])    # older ones do not say so
elif knobs.init_from == 'scratch':
    if knobs.bits is not None:
        raise ValueError('bits are for a trained standard model: give --init_from, or --scheme and --a')
    given['scheme'] = knobs.scheme or 'leapfrog'
    given['vocab_size'] = knobs.vocab_size or math.ceil(meta['vocab_size'] / 64) * 64
    config = GPTConfig(**given, **states)
else:
    config = chosen(knobs)
    for name in sorted(set(FIXED) - {'block_size'}):        # what was given must not contradict the model
        value = given[name]
        its = getattr(config, name)
        if value != getattr(Knobs, name) and its not in (value, [value] * config.n_layer):
            raise ValueError(f'{name} = {value}, but {knobs.init_from} keeps {its}: leave {name} out')
config = replace(config, **{name: given[name] for name in FREE}, **states)
fitting(config, here)
theirs = not checkpoint and knobs.init_from != 'scratch'                # the weights come from another run
if theirs:
    model, its_meta = build(knobs.init_from, here, **vars(config))
    same_tokens(knobs.init_from, its_meta, f'data/{knobs.dataset}', meta)
else:
    model = new(config, here)
config = model.config                       # with the a that was drawn
landing = knobs.land_part * knobs.max_iters     # steps
departure = checkpoint.get('departure', config.a)
if knobs.max_iters - step >= landing:       # not in the middle of a landing
    departure = config.a
if landing:
    as_standard(config)                     # this and the next raise an error if there is no way down
    ground = landed(config, config.a, 0)    # 8 bits in all layers
    if landing < 2:
        raise ValueError(f'land_part = {knobs.land_part} is {landing:.3g} steps: a landing takes 2 or more')
    knobs.min_lr = knobs.learning_rate / 2  # the net changes while it lands: that takes a rate to learn by
if config.vocab_size < meta['vocab_size'] or config.block_size < knobs.block_size:
    raise ValueError(f'vocab_size = {config.vocab_size} or block_size = {config.block_size} is too small: '
                     f"needed are {meta['vocab_size']} and {knobs.block_size}")
if auto:
    config.stored_layers = most_stored_layers(ground if landing else config, knobs, here)
if theirs and config.scheme != 'standard' and config.exact and knobs.fractional_bits is None:
    fit_range(model, windows(val_data, [0], knobs.block_size, here.device)[0], here)
    config = model.config
optimizer = adamw(model, knobs.weight_decay, knobs.learning_rate, (knobs.beta1, knobs.beta2))
if checkpoint:
    load_run(checkpoint, model, optimizer, here)
if knobs.compile:
    model.compile_parts()
parallel = distributed(model, here)
batches = training_batches(train_data, knobs, step, here.device)
columns = 'step loss lr grad_norm range_used a tokens_per_s peak_gb mfu left val_loss'
record = open_log(knobs.out_dir, columns, step)
catch_signals()

# 6 operations per weight of a matrix product, and 12 per pair of tokens and channel of attention. What is
# evaluated a second time does not count, so that the MFU of all schemes can be compared
products = sum(part.weight.numel() for part in model.modules() if isinstance(part, torch.nn.Linear))
flops_per_token = 6 * products + 12 * config.n_layer * config.n_embd * knobs.block_size
gpu = torch.cuda.get_device_name() if here.dtype == 'bfloat16' and here.kind == 'cuda' else ''
peak_flops = next((flops for name, flops in PEAK_FLOPS.items() if name in gpu), None)

def save(*paths):
    save_run(paths, model, optimizer, here, knobs, meta=meta, step=step, best_val_loss=best_val_loss,
             departure=departure)

# -----------------------------------------------------------------------------
# training

say(f'{count_parameters(model):,} parameters, scheme {config.scheme}, '
    f'{config.stored_layers} of {config.n_layer} layers stored\n'
    f'tokens per step: {world} processes x {accumulation} micro-batches x '
    f'{knobs.batch_size} x {knobs.block_size}')
if step == 0:
    record(step, val_loss=validation_loss(model, val_data, knobs, here))
seconds = []                                # of the steps since the last line of the log
x, y = next(batches)                        # (B, T) each
while step < knobs.max_iters:
    began = time.time()
    lr = cosine(knobs, step) if knobs.decay_lr else knobs.learning_rate
    ahead = (knobs.max_iters - step) / landing if landing else math.inf
    if ahead <= 1:
        lr *= ahead
        config = landed(config, departure, max(0.0, 2 * ahead - 1))
        model.config = config
    for group in optimizer.param_groups:
        group['lr'] = lr
    seed_step(knobs, step)
    model.largest = 0.0
    loss = 0.0
    for micro in range(accumulation):       # gradients of all processes meet once, in the last one
        parallel.require_backward_grad_sync = micro == accumulation - 1
        with here.autocast:
            micro_loss = parallel(x, y)[1] / accumulation
        here.scaler.scale(micro_loss).backward()
        loss += micro_loss.detach()
        x, y = next(batches)                # while a GPU is still at work
    here.scaler.unscale_(optimizer)
    norm = clip(model, knobs.grad_clip, here)
    # the only wait for the GPU. It raises an error if states were rebuilt wrong; stop: a process was told to
    loss, norm, stop, used = agree(step, loss, norm, model.mismatches, model.largest, here)
    if stop or used > 0.999:                # this step is not taken: the weights are those of the last one
        save(last)
        if used > 0.999:
            make_room(step, used, config)
        say(f'stopped at step {step}: continue with --init_from=resume')
        break
    here.scaler.step(optimizer)
    here.scaler.update()
    optimizer.zero_grad(set_to_none=True)
    step += 1
    seconds.append(time.time() - began)     # without evaluations
    make_room(step, used, config)

    if step % knobs.log_interval == 0 or step == knobs.max_iters:
        speed, left = pace(knobs, step, seconds)
        seconds = []
        mfu = speed * flops_per_token / (peak_flops * world) if peak_flops else None
        size_of_a = max(abs(x or 0) for x in config.per_layer('a')) if landing else None
        record(step, loss=loss, lr=lr, grad_norm=norm, tokens_per_s=speed, peak_gb=peak_memory(here.kind),
               mfu=mfu, left=left, range_used=used, a=size_of_a)
    if step % knobs.eval_interval == 0 or step == knobs.max_iters:
        val_loss = validation_loss(model, val_data, knobs, here)
        record(step, val_loss=val_loss)
        paths = [last]
        if val_loss < best_val_loss:
            best_val_loss = val_loss
            paths.append(best)
        save(*paths)

if landing and step == knobs.max_iters:
    model.config = as_standard(config)
    say(f'as the standard net: val_loss {validation_loss(model, val_data, knobs, here):.4f}')
del parallel                                # which would keep the process group alive
leave()
