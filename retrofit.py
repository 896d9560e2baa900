"""
Turns a trained standard model, the teacher, into a reversible one, the student, and tunes the student to the teacher's outputs.

    python retrofit.py config/retrofit_python.py                        # a demonstration, minutes on a CPU
    python retrofit.py config/retrofit_gpt2.py                          # GPT-2, on a GPU
    python retrofit.py config/retrofit_gpt2.py --bits=0                 # instead of 2 per element and layer: much harder
    torchrun --standalone --nproc_per_node=8 retrofit.py config/retrofit_gpt2.py
    python retrofit.py config/retrofit_gpt2.py --init_from=resume       # continues where it stopped, bit for bit
    python train.py --init_from=out_retrofit_gpt2/midpoint_a_2bit/last.pt ...    # more training on text of your own

A trained net is p_next = p + f(p), which is midpoint(a) at a = 0:

    p_next = a * p_prev + (1 - a) * p + h * f(p)                (paper eq. 3.6; pretrained.py derives h from a)

With |a| = 2^-k a layer remembers k bits per element. --bits is a budget, the mean over the layers. The script measures how much
the bits of each layer change the output, and gives most bits to the layers that need them most. At 0 bits |a| is 1, and nothing is
remembered: only then does memory not grow with depth. The student is tuned to the teacher's distribution; in the first
--anneal_part of the steps the budget falls from --anneal_from to --bits. The report has the validation losses, in nats per token.
--max_iters=0 writes the student untuned.
"""
import functools
import math
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from configurator import configure
from model import GPT, cross_entropy, head
from pretrained import build, reversible, same_tokens
from runtime import (adamw, agree, all_reduce, catch_signals, compile_parts, cosine, count_parameters, duration, fail, leave, load_checkpoint, local_rank, main,
                     open_data, open_log, peak_memory, rank, restarted, save_checkpoint, say, seed_step, signals, start, training_batch,
                     validation_loss, windows, world)

@dataclass
class Knobs:
    out_dir: str = 'out_retrofit'           # each conversion gets a folder in it
    init_from: str = 'teacher'              # or 'resume': continue the conversions in out_dir
    teacher: str = 'gpt2'                   # a checkpoint of train.py, or anything GPT.from_pretrained takes
    teacher_config: str | None = None       # if there is no teacher, train.py makes it with this config
    seed: int = 1337
    seeds: list | None = None               # make each student once with each of these seeds; None: with seed alone
    # conversion
    conversion: str = 'midpoint_a'          # or 'symplectic', or 'midpoint_sum': the paper's estimate of p_prev, twice
                                            # the work; 'all': the full table, with rows that are measured but not tuned
    bits: int | float | list = 0            # midpoint_a: bits per element, the mean over the layers; a list: one student each
    spread: bool = True                     # the bits go where they matter; False: all layers have the same, |a| = 2^-bits
    spread_windows: int = 4                 # training sequences on which the need for bits is measured
    sign: int = -1                          # of a
    anneal_from: int | float = 2            # bits in the first step, if more than --bits: they fall to --bits
    anneal_part: float = 0.35               # over this part of the steps
    # tuning
    dataset: str = 'openwebtext'            # a folder of data/
    batch_size: int = 8                     # sequences in a micro-batch
    gradient_accumulation_steps: int = 8    # micro-batches per step, over all processes together
    block_size: int = 1024                  # tokens in a sequence
    temperature: float = 1.0                # of both distributions
    data_weight: float = 0.0                # weight of the text's own cross entropy; the rest is the divergence from the teacher
    learning_rate: float = 1e-4
    min_lr: float = 1e-5
    max_iters: int = 2000                   # steps
    warmup_iters: int = 100
    lr_decay_iters: int | None = None       # None: max_iters
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0                  # the largest norm of the gradient; 0: no limit
    zero: bool = False                      # ZeRO stage 1: each of N processes keeps 8 / N instead of 8 bytes of moments per weight
    # evaluation and machine, as in train.py
    eval_interval: int = 500
    eval_windows: int = 400
    log_interval: int = 10
    stored_layers: int = 0                  # of the student
    device: str = 'auto'
    dtype: str = 'auto'
    compile: bool = False

def a_at(step, run, table):
    """
    a of every layer at a step. During annealing the budget of bits falls linearly. With a table, the layers that need their bits least
    lose them first. Without one, a is the same in all layers, rounded to n / 256, so that it can be undone exactly.
    """
    if run.conversion != 'midpoint_a':
        return None
    way = run.anneal_part * (run.max_iters - 1)             # in steps; the last step of all is made with run.bits
    left = max(0.0, 1 - step / way) if way > 0 else 0.0
    bits = run.bits + left * max(0.0, run.anneal_from - run.bits)
    if table:
        return [run.sign / 2**k for k in assign(table, bits)]
    return run.sign * round(256 / 2**bits) / 256

def converted(config, conversion, a, stored_layers):
    """The config of a student, from that of its teacher."""
    return replace(reversible(config, conversion, a), stored_layers=stored_layers, exact=True)

def divergence(student, data, n):
    """KL(teacher, student) in nats per token, over n windows of the data; the same number in all processes."""
    with here.autocast:
        criterion = distillation(teacher, 1.0, 0.0)
    return validation_loss(student, data, replace(knobs, eval_windows=n), here, lambda x: (criterion, teacher.hidden(x)))

# -----------------------------------------------------------------------------
# bits where they matter

CHOICES = 0, 1, 2, 4, 8                     # bits of a layer; between them, pack() of model.py would waste some

def bits_of(model):
    """Bits per element of the state, the mean over the layers."""
    return sum(coefficients.bits for coefficients in model.coefficients) / model.config.n_layer

@functools.cache
def sensitivity():
    """
    {bits: for each layer, KL(teacher, student) in nats per token when it has that many and all others have 8}. A layer's h depends on
    the a of those above it, so changing a layer changes the h of the layers below it, too.
    """
    n_layer = teacher.config.n_layer
    student = GPT(converted(teacher.config, 'midpoint_a', [1.0] * n_layer, 0)).to(here.device)
    student.load_state_dict(teacher.state_dict())

    def with_bits(bits):
        if signals:
            sys.exit('stopped before the bits were spread over the layers: run the command again')
        student.config = converted(teacher.config, 'midpoint_a', [knobs.sign / 2**k for k in bits], 0)
        student.coefficients = student.config.coefficients()
        return divergence(student, train_data, knobs.spread_windows)

    most = with_bits([8] * n_layer)
    table = {k: [most if k == 8 else with_bits([8] * j + [k] + [8] * (n_layer - 1 - j)) for j in tqdm(
        range(n_layer), f'{k} bits', leave=False, disable=not main)] for k in CHOICES}
    say('\nKL(teacher, student) in nats per token. The layer of the row has the bits of the column, every other layer has 8\n'
        f'{"layer":>5}' + ''.join(f'{f"{k} bits":>10}' for k in CHOICES))
    for j in range(n_layer):
        say(f'{j:>5}' + ''.join(f'{table[k][j]:10.5f}' for k in CHOICES))
    return table

def assign(table, budget):
    """
    Bits per layer, at most budget on average: greedy, the largest gain per bit first. From a budget of 1 on, every layer but the
    first has at least one bit: tuning hardly mends a layer without any. The first one needs none, as its two states are equal.
    """
    layers = range(len(table[0]))
    bits, choices = ([0] + [1] * (len(layers) - 1), CHOICES) if budget >= 1 else ([0] * len(layers), (0, 1))
    while True:
        left = budget * len(layers) - sum(bits) + 1e-9
        gain, j, k = max((((table[bits[j]][j] - table[k][j]) / (k - bits[j]), j, k) for j in layers
                          for k in choices if 0 < k - bits[j] <= left), default=(0, 0, 0))
        if gain <= 0:
            return bits
        bits[j] = k

def distillation(teacher, t, data_weight):
    """
    A criterion for GPT.loss(): the divergence KL(teacher, student), in nats per token, both at temperature t and scaled by
    t^2 as in Hinton et al. (arXiv 1503.02531), mixed with the text's own cross entropy. It takes what teacher.hidden()
    gave as its third argument: the teacher's logits too exist one chunk at a time.
    """
    teacher_head = head(teacher.lm_head.weight)

    def criterion(logits, targets, hidden):                 # logits (chunk, V), targets (chunk), hidden (chunk, C)
        wanted = F.log_softmax(F.linear(hidden, teacher_head).to(logits.dtype) / t, dim=-1)
        loss = F.kl_div(F.log_softmax(logits / t, dim=-1), wanted, reduction='sum', log_target=True) * t**2
        if data_weight:
            loss = (1 - data_weight) * loss + data_weight * cross_entropy(logits, targets)
        return loss
    return criterion

MAY_CHANGE = {'out_dir', 'init_from', 'seeds', 'teacher_config', 'eval_interval', 'eval_windows', 'log_interval',
              'stored_layers', 'zero', 'device', 'compile'}         # of the knobs, when a run is resumed

def tune(name, conversion, bits, seed):
    """Makes and tunes a student: (loss before, loss after, divergence after), or None if it was asked to stop."""
    run = replace(knobs, conversion=conversion, bits=bits, seed=seed)
    folder = os.path.join(knobs.out_dir, name)
    last, step, checkpoint = os.path.join(folder, 'last.pt'), 0, None
    try:
        if (knobs.init_from == 'resume' or restarted(last)) and os.path.exists(last):
            checkpoint = load_checkpoint(last)
    except ValueError as error:
        fail(str(error))
    if checkpoint:
        if 'retrofit' not in checkpoint:
            fail(f'{last} was not written by retrofit.py: choose another --out_dir')
        if checkpoint['meta'] != meta:
            fail(f'{last} was tuned on other tokens than those of data/{knobs.dataset}: give the --dataset it had')
        for knob, value in checkpoint['retrofit'].items():
            if getattr(run, knob) != value:
                fail(f'{knob} = {getattr(run, knob)}, but {last} was made with {knob} = {value}: resume with the '
                     'config file and flags it was made with')
        step, before, after = (checkpoint[key] for key in ('step', 'before', 'after'))
    if all_reduce(step)[0] != step * world:
        fail(f'the machines have {last} of different steps: copy that of the first machine to the others')
    table = checkpoint['table'] if checkpoint else sensitivity() if conversion == 'midpoint_a' and knobs.spread else None
    a = a_at(step, run, table)
    student = GPT(converted(teacher.config, conversion, a, knobs.stored_layers)).to(here.device)
    student.load_state_dict(checkpoint['model'] if checkpoint else teacher.state_dict())
    zero = knobs.zero and world > 1
    optimizer = adamw(student, knobs.weight_decay, knobs.learning_rate, (knobs.beta1, knobs.beta2), zero)
    if checkpoint:
        optimizer.load_state_dict(checkpoint['optimizer'])
        if checkpoint['scaler']:            # empty, unless the run was in float16
            here.scaler.load_state_dict(checkpoint['scaler'])
    else:
        before, after = validation_loss(student, val_data, knobs, here), None
        say(f'{name}: validation loss {before:.4f} before tuning, with {bits_of(student):.3g} bits per element and layer')
        if table:
            say('its layers have ' + ' '.join(str(coefficients.bits) for coefficients in student.coefficients))
    checkpoint = None                       # free its memory
    if knobs.compile:
        compile_parts(student)
    model = student
    if world > 1:
        model = DistributedDataParallel(student, device_ids=[local_rank] if here.kind == 'cuda' else None,
                                        gradient_as_bucket_view=True)
    record = open_log(folder, ['step', 'loss', 'lr', 'grad_norm', 'bits', 'tokens_per_s', 'peak_gb', 'val_loss'], step)

    def save():
        if zero:
            optimizer.consolidate_state_dict()
        if main:
            save_checkpoint([last], dict(
                model=student.state_dict(), optimizer=optimizer.state_dict(), scaler=here.scaler.state_dict(), step=step,
                config=asdict(student.config), meta=meta, table=table, before=before, after=after,
                retrofit={knob: value for knob, value in asdict(run).items() if knob not in MAY_CHANGE}))

    if not knobs.max_iters:
        save()
    if here.kind == 'cuda':
        torch.cuda.reset_peak_memory_stats()
    tokens_per_step = knobs.batch_size * knobs.gradient_accumulation_steps * knobs.block_size
    accumulation = knobs.gradient_accumulation_steps // world       # micro-batches of this process
    began, first_step = time.time(), step
    clock, clock_step = began, step
    with here.autocast:                     # whose dtype the teacher's head gets
        criterion = distillation(teacher, knobs.temperature, knobs.data_weight)
    x, y = training_batch(train_data, run, step, 0, here.device)                            # (B, T) each
    while step < knobs.max_iters:
        a, before_it = a_at(step, run, table), a
        if a != before_it:                  # between two steps, never between forward and backward
            student.config = converted(teacher.config, conversion, a, knobs.stored_layers)
            student.coefficients = student.config.coefficients()
        lr = cosine(knobs, step)
        for group in optimizer.param_groups:
            group['lr'] = lr
        seed_step(run, step)                # the step itself is that of train.py, but for the criterion
        loss = 0.0
        for micro in range(accumulation):
            if world > 1:                   # the gradients of all processes meet once, in the last micro-batch
                model.require_backward_grad_sync = micro == accumulation - 1
            with here.autocast:
                with torch.no_grad():
                    hidden = teacher.hidden(x)                                              # (B, T, C)
                micro_loss = model(x, y, criterion, hidden)[1] / accumulation
            here.scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()
            following = (step, micro + 1) if micro + 1 < accumulation else (step + 1, 0)
            x, y = training_batch(train_data, run, *following, here.device)
        here.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), knobs.grad_clip or math.inf)
        loss, norm, stop = agree(step, loss, norm, student, here)
        if stop:                            # this step is not taken: the weights are those after the previous step
            save()
            say(f'stopped at step {step} of {name}: continue with --init_from=resume')
            return None
        here.scaler.step(optimizer)
        here.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step += 1

        if step % knobs.log_interval == 0 or step == knobs.max_iters:
            now = time.time()
            speed = tokens_per_step * (step - clock_step) / (now - clock)
            left = (now - began) / (step - first_step) * (knobs.max_iters - step)
            clock, clock_step = now, step
            say(f'{name}, step {step}: loss {loss:.4f}, lr {lr:.2e}, norm {norm:.2f}' + (f', {bits_of(student):.3g} bits' if a else '')
                + f', {speed:,.0f} tokens/s, peak {peak_memory(here.kind):.2f} GB, {duration(left)} left')
            record(step=step, loss=loss, lr=lr, grad_norm=norm, bits=bits_of(student), tokens_per_s=round(speed),
                   peak_gb=round(peak_memory(here.kind), 3))
        if step % knobs.eval_interval == 0 or step == knobs.max_iters:
            pause = time.time()
            val_loss = validation_loss(student, val_data, knobs, here)
            if not math.isfinite(val_loss):
                fail(f'{name}, step {step}: the validation loss is {val_loss}; stopped without writing a checkpoint: try a lower --learning_rate')
            say(f'{name}, step {step}: validation loss {val_loss:.4f}')
            record(step=step, val_loss=val_loss)
            after = val_loss if step == knobs.max_iters else None
            save()
            clock += time.time() - pause
    return before, after, divergence(student, val_data, knobs.eval_windows)

# -----------------------------------------------------------------------------
# teacher, students, report

knobs = configure(Knobs, sys.argv[1:])
here = start(knobs)
if any(type(seed) is not int or not 0 <= seed < 2**63 for seed in knobs.seeds or []):
    fail(f'seeds = {knobs.seeds}: give a list of whole numbers')
for name, choices in (('init_from', ('teacher', 'resume')), ('sign', (1, -1)),
                      ('conversion', ('midpoint_a', 'midpoint_sum', 'symplectic', 'all'))):
    if getattr(knobs, name) not in choices:
        fail(f'{name} = {getattr(knobs, name)!r}: choose one of {", ".join(map(str, choices))}')
bits = knobs.bits if isinstance(knobs.bits, list) else [knobs.bits]
if not bits or any(type(k) not in (int, float) or not 0 <= k <= 8 or k not in CHOICES and not knobs.spread for k in bits):
    fail(f'bits = {knobs.bits}: give a number from 0 to 8, or a list of them' + ', of 0, 1, 2, 4 and 8' * (not knobs.spread))
if not 0 <= knobs.anneal_from <= 8 or not 0 <= knobs.anneal_part <= 1:
    fail(f'anneal_from = {knobs.anneal_from} must lie between 0 and 8, and anneal_part = {knobs.anneal_part} between 0 and 1')
if not knobs.temperature > 0 or not 0 <= knobs.data_weight <= 1:
    fail(f'temperature = {knobs.temperature} must be above 0, data_weight = {knobs.data_weight} between 0 and 1')
meta, train_data, val_data = open_data(knobs)

def steps_lacking():
    """How many steps of the teacher's training are missing; None if there is no teacher, and its training has not begun."""
    path = os.path.join(os.path.dirname(knobs.teacher), 'last.pt')
    if os.path.exists(path) and 'knobs' in (checkpoint := load_checkpoint(path)):      # and thus written by train.py
        return checkpoint['knobs']['max_iters'] - checkpoint['step']
    return 0 if os.path.exists(knobs.teacher) else None

catch_signals()
try:
    if knobs.teacher_config and knobs.teacher.endswith('.pt') and (lacking := steps_lacking()) != 0:
        if world > 1:
            fail(f'{knobs.teacher} does not exist, or is not trained to the end: train it first, with torchrun train.py {knobs.teacher_config}')
        say(f'training {knobs.teacher} with {knobs.teacher_config}')
        script = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'train.py')
        training = subprocess.Popen([
            sys.executable, script, knobs.teacher_config, f'--out_dir={os.path.dirname(knobs.teacher)}',
            f'--device={here.kind}', f'--init_from={"scratch" if lacking is None else "resume"}'])
        while training.poll() is None:
            if signals:                     # it saves what it has, and stops
                training.terminate()
            time.sleep(0.2)
        if steps_lacking() != 0:
            fail(f'{knobs.teacher} is not done: run the command again')
    teacher, teacher_meta = build(knobs.teacher, dropout=0.0)
    if teacher.config.scheme != 'standard':
        fail(f'{knobs.teacher} is of scheme {teacher.config.scheme}: the teacher must be a standard model')
    same_tokens(knobs.teacher, teacher_meta, f'data/{knobs.dataset}', meta)
    converted(teacher.config, 'symplectic', None, knobs.stored_layers)      # complains if there are not so many layers
except ValueError as error:
    fail(str(error))
if knobs.block_size > teacher.config.block_size:
    fail(f'block_size = {knobs.block_size}: {knobs.teacher} sees {teacher.config.block_size} tokens at most')
teacher.to(here.device).requires_grad_(False)
if knobs.compile:
    compile_parts(teacher)

# what is tuned, and what is only measured beside it
students = [('midpoint_a', k) for k in bits] if knobs.conversion in ('midpoint_a', 'all') else []
students += [(name, 0) for name in ('midpoint_sum', 'symplectic') if knobs.conversion in (name, 'all')]
others = [sign / 2**k for k in CHOICES for sign in (1, -1)] if knobs.conversion == 'all' else []

teacher_loss = validation_loss(teacher, val_data, knobs, here)
say(f'{knobs.teacher}: {count_parameters(teacher):,} parameters, validation loss {teacher_loss:.4f}')
table = []
for conversion, k in students:
    title = {'midpoint_a': 'midpoint(a), bits where they matter' if knobs.spread else f'midpoint(a), a = {knobs.sign / 2**k:g}',
             'midpoint_sum': 'midpoint, f of two blocks', 'symplectic': 'symplectic'}[conversion]
    for seed in knobs.seeds or [knobs.seed]:
        name = f'{conversion}_{k}bit' + f'_{seed}' * bool(knobs.seeds)
        losses = tune(name, conversion, k, seed)
        if losses is None:
            leave()
            sys.exit()
        table.append((title + f', seed {seed}' * bool(knobs.seeds), k, *losses))
for a in others:
    student = GPT(converted(teacher.config, 'midpoint_a', a, knobs.stored_layers)).to(here.device)
    student.load_state_dict(teacher.state_dict())
    table.append((f'midpoint(a), a = {a:g}', bits_of(student), validation_loss(student, val_data, knobs, here), None, None))

say(f'\nvalidation loss in nats per token, {knobs.max_iters} steps of tuning\n'
    f'{"":42}{"bits":>6}{"before":>10}{"after":>10}{"to teacher":>12}{"KL":>10}\n'
    f'{"teacher, not reversible":42}{"all":>6}{teacher_loss:10.4f}')
for title, k, before, after, kl in table:
    say(f'{title:42}{k:>6.3g}{before:10.4f}' + (f'{after:10.4f}{after - teacher_loss:+12.4f}' if after else ' ' * 22) + (f'{kl:10.4f}' if kl is not None else ''))
say('bits: remembered per element of the state and layer, on average. With 0, and only then, memory does not grow with depth, '
    'if no layer is stored.\nbefore: with the bits of the first step.')
leave()
