"""
States of 32 bits: how large they become, what they cost in loss, and how many bits gradients need.

    python data/python/prepare.py && OMP_NUM_THREADS=1 python results/states.py     # two hours on one core
    python results/states.py --table            # of the finished runs, which are kept: results/states.csv
    python results/states.py --gradients        # of new models, and of those that these runs have trained

A run is train.py with config/compare.py, at the rate and h that results/compare.py found best for its
scheme. At 12 layers its losses stand beside those of states of 64 bits, 32 of them fractional, on the same
data from the same weights: these are in compare.csv, but for midpoint_a, whose a was drawn otherwise then. A
second process started beside the first takes other runs.
"""
import csv
import fcntl
import os
import re
import statistics
import subprocess
import sys
from dataclasses import replace

import numpy as np
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.append(ROOT)
from model import GPT, GPTConfig
from pretrained import build

TABLE = os.path.join(ROOT, 'results', 'states.csv')
WIDE = os.path.join(ROOT, 'results', 'compare.csv')
COLUMNS = ('scheme', 'h', 'lr', 'seed', 'layers', 'steps', 'state_bits', 'val_loss', 'largest',
           'fractional_bits')
BEST = {'leapfrog': (0.125, 8e-3), 'symplectic': (None, 8e-3), 'midpoint_a': (0.125, 4e-3),
        'midpoint': (0.0625, 4e-3)}             # (h, learning rate)
SEEDS = 2, 3, 4
RUNS = [(scheme, h, lr, seed, 12, 1465, 32) for seed in SEEDS for scheme, (h, lr) in BEST.items()]
RUNS += [('midpoint_a', *BEST['midpoint_a'], seed, 12, 1465, 64) for seed in SEEDS]
RUNS += [(scheme, h and h / 2, lr, 1, 24, 732, 32) for scheme, (h, lr) in BEST.items()]
RUNS += [('midpoint_sum', None, 8e-3, 1, 12, 1465, 32), ('midpoint_sum', None, 8e-3, 1, 24, 366, 32)]

def folder_of(scheme, h, lr, seed, layers, steps, state_bits):
    name = f'{scheme}_{layers}layers_{steps}steps_seed{seed}_{state_bits}bits'
    return os.path.join(ROOT, 'out_states', name)

def rows(path):
    """Key -> row of a table."""
    if not os.path.exists(path):
        return {}
    with open(path, newline='') as file:
        found = list(csv.DictReader(file))
    return {(row['scheme'], float(row['h']) if row['h'] else None, float(row['lr']),
             *(int(row.get(name, 64)) for name in ('seed', 'layers', 'steps', 'state_bits'))): row
            for row in found}

def make(key):
    """A run, and its row: the largest value that any step had to hold, and the bits at the end."""
    scheme, h, lr, seed, layers, steps, state_bits = key
    flags = dict(scheme=scheme, learning_rate=lr, min_lr=lr / 10, seed=seed, n_layer=layers, gelu='tanh',
                 stored_layers=layers, max_iters=steps, warmup_iters=steps // 15, lr_decay_iters=steps,
                 eval_interval=steps, log_interval=1, state_bits=state_bits, out_dir=folder_of(*key))
    if h is not None:
        flags['h'] = h
    command = [sys.executable, 'train.py', 'config/compare.py', *(f'--{k}={v}' for k, v in flags.items())]
    output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    bits = GPTConfig(state_bits=state_bits).fractional_bits
    left = bits
    largest = 0.0
    for line in output.splitlines():
        lowered = re.search(r'(\d+) fractional bits', line)
        used = re.search(r'range_used (\S+)', line)
        if used:
            largest = max(largest, float(used[1]) * 2.0**(state_bits - 1 - bits))
            bits = left
        if lowered:                         # from the next step on: its own line comes after this one
            left = int(lowered[1])
    loss = float(re.search(rf'step {steps}: val_loss (\S+)', output)[1])       # not of a run that was stopped
    with open(TABLE, 'a', newline='') as file:
        writer = csv.writer(file)
        if not file.tell():
            writer.writerow(COLUMNS)
        writer.writerow(['' if value is None else value for value in (*key, loss, round(largest, 3), bits)])
    print(*key, loss, largest, flush=True)

def table():
    narrow = rows(TABLE)
    wide = {**rows(WIDE), **{key: row for key, row in narrow.items() if key[6] == 64}}
    print('largest value of any step')
    for key, row in narrow.items():
        print(f'  {key[0]:<13}{key[4]:>3} layers, seed {key[3]}, {key[6]} bits: {row["largest"]:>9}, '
              f'{row["fractional_bits"]} fractional bits')
    print('validation loss, seeds 2, 3, 4')
    for scheme, (h, lr) in BEST.items():
        keys = [(scheme, h, lr, seed, 12, 1465) for seed in SEEDS]
        if all((*key, 32) in narrow and (*key, 64) in wide for key in keys):
            pairs = [(float(narrow[*key, 32]['val_loss']), float(wide[*key, 64]['val_loss'])) for key in keys]
            print(f'  {scheme:<13}' + ', '.join(f'{x:.4f} ({y:.4f})' for x, y in pairs), end='; ')
            means = [statistics.mean(numbers) for numbers in zip(*pairs)]
            deviations = [statistics.stdev(numbers) for numbers in zip(*pairs)]
            print('means {:.3f} ({:.3f}), deviations {:.3f} ({:.3f})'.format(*means, *deviations))

# -----------------------------------------------------------------------------
# gradients

def gradients(model, x, y, dtype):
    model.zero_grad()
    with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = model(x, y)[1]
    loss.backward()
    return [weight.grad for weight in model.parameters()]

def difference(one, other):
    """The largest relative difference of a weight's gradient, by its norm."""
    return max(float((x - y).norm() / y.norm()) for x, y in zip(one, other))

def gradient_table():
    """Relative errors by fractional bits, and how much bfloat16 changes the same gradient."""
    torch.set_num_threads(1)
    data = np.fromfile(os.path.join(ROOT, 'data', 'python', 'val.bin'), dtype=np.uint8)
    windows = torch.from_numpy(np.stack([data[i:i + 129] for i in range(0, 80000, 5000)]).astype(np.int64))
    x, y = windows[:, :-1], windows[:, 1:]
    for scheme, (h, lr) in BEST.items():
        trained = build(os.path.join(folder_of(scheme, h, lr, 2, 12, 1465, 32), 'last.pt'))[0]
        deep = replace(trained.config, n_layer=24, stored_layers=None, a=None, h=h and h / 2)
        torch.manual_seed(0)
        models = {'new, 12 layers': GPT(trained.config), 'new, 24 layers': GPT(deep),
                  'trained, 12 layers': trained}
        for name, model in models.items():
            config = replace(model.config, stored_layers=0)
            model.config = replace(config, state_bits=64, fractional_bits=40)
            exact = gradients(model, x, y, torch.float32)
            errors = [difference(gradients(model, x, y, torch.bfloat16), exact)]
            for bits in (20, 18, 16, 14, 12):
                model.config = replace(config, state_bits=32, fractional_bits=bits)
                errors.append(difference(gradients(model, x, y, torch.float32), exact))
            print(f'{scheme:<11}{name:<20}' + ''.join(f'{x:>9.1e}' for x in errors), flush=True)

if '--table' in sys.argv:
    table()
elif '--gradients' in sys.argv:
    print('bfloat16, then 20, 18, 16, 14, 12 fractional bits in float32')
    gradient_table()
else:
    for key in RUNS:
        os.makedirs(folder_of(*key), exist_ok=True)
        with open(folder_of(*key) + '.lock', 'w') as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:         # another process is at it
                continue
            if key not in rows(TABLE):
                make(key)
    table()
