"""
Turns a trained standard model, the teacher, into a reversible one, the student, and tunes it to the teacher.

    python retrofit.py config/retrofit_python.py                        # a demonstration, minutes on a CPU
    python retrofit.py config/retrofit_gpt2.py                          # GPT-2, on a GPU
    torchrun --standalone --nproc_per_node=8 retrofit.py config/retrofit_gpt2.py
    python retrofit.py config/retrofit_gpt2.py --init_from=resume       # goes on where it stopped
    python train.py --init_from=out_retrofit_gpt2/last.pt ...           # more training, on text of your own

The teacher's p_next = p + f(p) is p_next = a * p_prev + (1 - a) * p + h * f(p) at a = 0 (paper eq. 3.6). A
layer with |a| = 2^-k remembers k bits per element. --bits is the mean over the layers: those that need bits
most get most. Memory does not grow with depth only at 0 bits, where |a| is 1. Tuning begins with more bits,
--anneal_from. It writes the student to out_dir/last.pt; --max_iters=0 leaves it untuned.
"""
import sys
import time
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from configurator import configure
from memory import peak_memory
from model import cross_entropy, head
from pretrained import build, empty, fit_range, reversible, same_tokens
from runtime import (adamw, agree, catch_signals, clip, cosine, distributed, leave, load_run, make_room,
                     micro_batches, open_data, open_log, pace, resumed, save_run, say, seed_step, start,
                     training_batches, validation_loss, whole, windows)

@dataclass
class Knobs:
    out_dir: str = 'out_retrofit'
    init_from: str = 'teacher'              # or 'resume'
    teacher: str = 'gpt2'                   # a checkpoint, or what from_pretrained() takes
    seed: int = 1337
    # conversion
    conversion: str = 'midpoint_a'          # or 'symplectic', or 'midpoint_sum': the paper's, twice the work
    bits: int | float = 0                   # midpoint_a: bits per element, the mean over the layers
    spread: bool = True                     # where they matter; False: the same in all but the first layer
    spread_windows: int = 4                 # training sequences on which the need for bits is measured
    sign: int = -1                          # of a
    anneal_from: int | float = 2            # bits in the first step, if more than --bits: they fall to --bits
    anneal_part: float = 0.35               # over this part of the steps
    state_bits: int = 32                    # of a state, 32 or 64
    fractional_bits: int | None = None      # of these, after the point; None: chosen by the largest state
    # tuning
    dataset: str = 'openwebtext'            # a folder of data/
    batch_size: int = 8                     # sequences in a micro-batch
    gradient_accumulation_steps: int = 8    # micro-batches per step, over all processes together
    block_size: int = 1024                  # tokens in a sequence
    temperature: float = 1.0                # of both distributions
    data_weight: float = 0.0                # of the text's own cross entropy; the rest: the divergence
    learning_rate: float = 1e-4
    min_lr: float = 1e-5
    max_iters: int = 2000                   # steps
    warmup_iters: int = 100
    lr_decay_iters: int | None = None       # None: max_iters
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0                  # the largest norm of the gradient; 0: no limit
    # evaluation and machine, as in train.py
    eval_interval: int = 500
    eval_windows: int = 400
    log_interval: int = 10
    stored_layers: int = 0                  # of the student
    device: str = 'auto'
    dtype: str = 'auto'
    compile: bool = False
    shard: bool = False                     # both models: FSDP2

FREE = ('out_dir init_from shard eval_interval eval_windows log_interval stored_layers fractional_bits '
        'device compile').split()
RESUMED_ALIKE = [name for name in Knobs.__dataclass_fields__ if name not in FREE]

# -----------------------------------------------------------------------------
# the student, and the bits where they matter

CHOICES = 0, 1, 2, 4, 8                     # bits of a layer: pack() of model.py would waste some in between

def converted(a):
    """The config of a student, with this a, a number or one per layer; None: the conversion has none."""
    config = reversible(teacher.config, knobs.conversion, a)
    return replace(config, stored_layers=knobs.stored_layers, exact=True, verify=True,
                   state_bits=knobs.state_bits, fractional_bits=knobs.fractional_bits)

def convert(student, a):
    """Gives a student of midpoint_a another a; never between a forward and its backward pass."""
    student.config = replace(converted(a), fractional_bits=student.config.fractional_bits)

def a_at(step):
    """a at a step. At first the budget of bits falls linearly, and leaves where it matters least."""
    if knobs.conversion != 'midpoint_a':
        return None
    way = knobs.anneal_part * (knobs.max_iters - 1)         # in steps; the last step of all has knobs.bits
    left = max(0.0, 1 - step / way) if way > 0 else 0.0
    bits = knobs.bits + left * max(0.0, knobs.anneal_from - knobs.bits)
    if knobs.spread and table:
        return [knobs.sign / 2**k for k in assign(table, bits)]
    return knobs.sign * round(256 / 2**bits) / 256          # which can be undone exactly

def bits_of(model):
    """Bits per element of the state, the mean over the layers."""
    return sum(step.bits for step in model.config.coefficients()) / model.config.n_layer

def divergence(student, data, windows):
    """KL(teacher, student) in nats per token, over so many windows of the data."""
    with here.autocast:
        criterion = distillation(1.0, 0.0)
    def loss(x, y):
        return student(x, (y, teacher.hidden(x)), criterion)[1]
    return validation_loss(student, data, replace(knobs, eval_windows=windows), here, loss)

def sensitivity(student):
    """{bits: per layer, KL(teacher, student) in nats per token if it has so many, and all others have 8}."""
    table = {k: [] for k in CHOICES}
    say('\nKL(teacher, student) in nats per token, if a layer has the bits of the column, and all others 8')
    say('layer' + ''.join(f'{k:>5} bits' for k in CHOICES))
    for j in range(teacher.config.n_layer):
        for k in CHOICES:
            bits = [8] * teacher.config.n_layer
            bits[j] = k
            convert(student, [knobs.sign / 2**n for n in bits])
            table[k].append(divergence(student, train_data, knobs.spread_windows))
        say(f'{j:>5}' + ''.join(f'{table[k][j]:10.5f}' for k in CHOICES))
    return table

def assign(table, budget):
    """Bits per layer, at most budget on average: greedy, the largest gain per bit first."""
    layers = range(len(table[0]))
    bits = [0] * len(layers)
    choices = [0, 1]
    if budget >= 1:                         # tuning hardly mends a layer without a bit; the first has v = 0
        bits[1:] = [1] * (len(layers) - 1)
        choices = CHOICES
    while True:
        left = budget * len(layers) - sum(bits) + 1e-9
        gains = [((table[bits[j]][j] - table[k][j]) / (k - bits[j]), j, k)
                 for j in layers for k in choices if 0 < k - bits[j] <= left]
        gain, j, k = max(gains, default=(0, 0, 0))
        if gain <= 0:
            return bits
        bits[j] = k

def distillation(t, data_weight):
    """For GPT.loss(): t^2 KL(teacher, student) at temperature t (arXiv 1503.02531), and cross entropy."""
    teacher_head = head(whole(teacher.lm_head.weight))

    def criterion(logits, targets, hidden):                 # (N, V), (N), (N, C) of teacher.hidden(): a chunk
        wanted = F.log_softmax(F.linear(hidden, teacher_head).to(logits.dtype) / t, dim=-1)
        got = F.log_softmax(logits / t, dim=-1)
        loss = F.kl_div(got, wanted, reduction='sum', log_target=True) * t**2
        if data_weight:
            loss = (1 - data_weight) * loss + data_weight * cross_entropy(logits, targets)
        return loss
    return criterion

# -----------------------------------------------------------------------------
# set-up

knobs = configure(Knobs, sys.argv[1:])
here = start(knobs)
meta, train_data, val_data = open_data(knobs)
accumulation = micro_batches(knobs)
if knobs.init_from not in ('teacher', 'resume'):
    raise ValueError(f"init_from = '{knobs.init_from}': choose teacher or resume")
if knobs.conversion == 'midpoint_a' and not knobs.spread and knobs.bits not in CHOICES:
    raise ValueError(f'bits = {knobs.bits} cannot be the same in all layers: give 0, 1, 2, 4 or 8')
teacher, its_meta = build(knobs.teacher, here, dropout=0.0)
same_tokens(knobs.teacher, its_meta, f'data/{knobs.dataset}', meta)
if teacher.config.scheme != 'standard':
    raise ValueError(f'{knobs.teacher} is of scheme {teacher.config.scheme}: the teacher must be standard')
if teacher.config.block_size < knobs.block_size:
    raise ValueError(f'block_size = {knobs.block_size}: the teacher sees {teacher.config.block_size} tokens')
teacher.requires_grad_(False)
table = None                                # not measured yet
student = empty(converted(a_at(0)), here)
for weight, its in zip(student.parameters(), teacher.parameters()):
    weight.data.copy_(its)
optimizer = adamw(student, knobs.weight_decay, knobs.learning_rate, (knobs.beta1, knobs.beta2))
last = f'{knobs.out_dir}/last.pt'
checkpoint = resumed(last, knobs, meta, RESUMED_ALIKE)
step = checkpoint.get('step', 0)
losses = checkpoint.get('losses')
if checkpoint:
    load_run(checkpoint, student, optimizer, here)
    table = checkpoint['table']
    if knobs.fractional_bits in (None, checkpoint['knobs']['fractional_bits']):
        student.config.fractional_bits = checkpoint['config']['fractional_bits']
elif knobs.fractional_bits is None:
    fit_range(student, windows(val_data, [0], knobs.block_size, here.device)[0], here)
if not checkpoint and knobs.conversion == 'midpoint_a' and knobs.spread:
    table = sensitivity(student)
convert(student, a_at(step))
if not losses:
    losses = dict(teacher=validation_loss(teacher, val_data, knobs, here),
                  before=validation_loss(student, val_data, knobs, here))
say(f'validation loss: teacher {losses["teacher"]:.4f}, student {losses["before"]:.4f} before tuning; its '
    'layers have ' + ' '.join(str(layer.bits) for layer in student.config.coefficients()) + ' bits')
if knobs.compile:
    teacher.compile_parts()
    student.compile_parts()
parallel = distributed(student, here)
batches = training_batches(train_data, knobs, step, here.device)
columns = 'step loss lr grad_norm range_used bits tokens_per_s peak_gb left val_loss'
record = open_log(knobs.out_dir, columns, step)
catch_signals()

def save():
    save_run([last], student, optimizer, here, knobs, meta=meta, step=step, table=table, losses=losses)

# -----------------------------------------------------------------------------
# tuning: the steps are those of train.py, but for a and the criterion

with here.autocast:                         # whose dtype the teacher's head gets
    criterion = distillation(knobs.temperature, knobs.data_weight)
seconds = []                                # of the steps since the last line of the log
if knobs.max_iters == 0:
    save()
while step < knobs.max_iters:
    began = time.time()
    convert(student, a_at(step))
    lr = cosine(knobs, step)
    for group in optimizer.param_groups:
        group['lr'] = lr
    seed_step(knobs, step)
    student.largest = 0.0
    loss = 0.0
    for micro, (x, y) in zip(range(accumulation), batches):                 # (B, T) each
        parallel.require_backward_grad_sync = micro == accumulation - 1
        with here.autocast:
            micro_loss = parallel(x, (y, teacher.hidden(x)), criterion)[1] / accumulation
        here.scaler.scale(micro_loss).backward()
        loss += micro_loss.detach()
    here.scaler.unscale_(optimizer)
    norm = clip(student, knobs.grad_clip, here)
    loss, norm, stop, used = agree(step, loss, norm, student.mismatches, student.largest, here)
    if stop or used > 0.999:                # this step is not taken
        save()
        if used > 0.999:
            make_room(step, used, student.config)
        say(f'stopped at step {step}: continue with --init_from=resume')
        break
    here.scaler.step(optimizer)
    here.scaler.update()
    optimizer.zero_grad(set_to_none=True)
    step += 1
    seconds.append(time.time() - began)
    make_room(step, used, student.config)

    if step % knobs.log_interval == 0 or step == knobs.max_iters:
        speed, left = pace(knobs, step, seconds)
        seconds = []
        record(step, loss=loss, lr=lr, grad_norm=norm, bits=bits_of(student), tokens_per_s=speed,
               peak_gb=peak_memory(here.kind), left=left, range_used=used)
    if step % knobs.eval_interval == 0 or step == knobs.max_iters:
        losses['after'] = validation_loss(student, val_data, knobs, here)
        record(step, val_loss=losses['after'])
        save()
else:                                       # it was not stopped
    kl = divergence(student, val_data, knobs.eval_windows)
    say('\nvalidation loss in nats per token: ' + ', '.join(f'{name} {x:.4f}' for name, x in losses.items())
        + f'; KL(teacher, student) {kl:.4f}, {bits_of(student):.3g} bits per element and layer')
del parallel
leave()
