"""
Schemes compared: each with the learning rate and the step size h that do best for it on one seed, then on three other seeds.

    python data/python/prepare.py && OMP_NUM_THREADS=1 python results/compare.py        # many hours; it goes on where it stopped
    OMP_NUM_THREADS=1 python results/compare.py --share=0/2 & OMP_NUM_THREADS=1 python results/compare.py --share=1/2
    python results/compare.py --table                                                   # of what is there

A run is train.py with config/compare.py and the flags that its folder in out_compare/ is named after. A run's validation losses
go to results/compare.csv. A stage begins when every run of those before it is there: each learning rate at the first h on seed 1;
each h at the best of these rates; the best of both on seeds 2 to 4; 24 layers, seed 1; h by depth and by length of training, leapfrog. BDIA is
midpoint_a whose a is drawn anew at every step. The counterpart of h in standard is a factor before f, which no flag of train.py sets.
"""
import csv
import math
import os
import statistics
import subprocess
import sys
from itertools import product

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TABLE = os.path.join(ROOT, 'results', 'compare.csv')
RATES = 1e-3, 2e-3, 4e-3, 8e-3
SIZES = {'standard': (1.0, 0.25, 0.5), 'midpoint': (0.125, 0.0625, 0.25), 'leapfrog': (0.25, 0.125, 0.5), 'symplectic': (None,),
         'midpoint_a': (0.25, 0.125, 0.5), 'bdia': (None,)}        # h: the rates are tried with the first
SEEDS = 2, 3, 4
DEPTHS = {4: (0.25, 0.5, 1.0), 8: (0.25, 0.5, 1.0), 16: (0.125, 0.25, 0.5), 32: (0.0625, 0.125, 0.25)}      # leapfrog's h, by layers
LENGTH = 1465                               # steps of 2048 tokens: 3.0M

def name_of(scheme, h, rate, seed, layers, steps):
    size = '' if h is None else f'_h{h:g}'
    return f'{scheme}{size}_lr{rate:g}_{layers}layers_{steps}steps_seed{seed}'

def command(scheme, h, rate, seed, layers, steps):
    flags = dict(scheme=scheme, h=h, learning_rate=rate, min_lr=rate / 10, seed=seed, n_layer=layers, stored_layers=layers, max_iters=steps,
                 lr_decay_iters=steps, eval_interval=steps // 3, out_dir=os.path.join('out_compare', name_of(scheme, h, rate, seed, layers, steps)))
    script = ['train.py']
    if scheme == 'bdia':
        flags.update(scheme='midpoint_a', a='bdia')
    if scheme == 'standard':                # x + h * f(x)
        script = ['-c', f'import runpy, model; f = model.Block.forward; '
                  f'model.Block.forward = lambda block, x, cache=None: {h} * f(block, x, cache); runpy.run_path("train.py", run_name="__main__")']
        del flags['h']
    return [sys.executable, *script, 'config/compare.py', *(f'--{key}={value}' for key, value in flags.items() if value is not None)]

def found():
    """(scheme, h, rate, seed, layers, steps) -> validation loss in nats per byte."""
    if not os.path.exists(TABLE):
        return {}
    with open(TABLE, newline='') as file:
        return {(row['scheme'], float(row['h']) if row['h'] else None, float(row['lr']), int(row['seed']), int(row['layers']), int(row['steps'])):
                float(row['val_loss']) for row in csv.DictReader(file)}

def best_rate(losses, scheme):
    """Of the lowest loss on seed 1, at the first h."""
    return min(RATES, key=lambda rate: losses[scheme, SIZES[scheme][0], rate, 1, 12, LENGTH])

def best(losses, scheme):
    """(h, rate) of the lowest loss on seed 1."""
    rate = best_rate(losses, scheme)
    return min(SIZES[scheme], key=lambda h: losses[scheme, h, rate, 1, 12, LENGTH]), rate

def stages():
    """Lists of runs; each list follows from the losses of those before it."""
    yield [(scheme, sizes[0], rate, 1, 12, LENGTH) for scheme, sizes in SIZES.items() for rate in RATES]
    losses = found()
    yield [(scheme, h, best_rate(losses, scheme), 1, 12, LENGTH) for scheme, sizes in SIZES.items() for h in sizes]
    losses = found()
    yield [(scheme, *best(losses, scheme), seed, 12, LENGTH) for seed, scheme in product(SEEDS, SIZES)]
    # twice as deep: the step size is halved, as h * layers is what leapfrog and midpoint integrate over
    yield [(scheme, h if scheme == 'standard' else h and h / 2, rate, 1, 24, LENGTH) for scheme in SIZES for h, rate in [best(losses, scheme)]]
    rate = best(losses, 'leapfrog')[1]
    yield [('leapfrog', h, rate, 1, layers, LENGTH // 2) for layers, sizes in DEPTHS.items() for h in sizes]
    yield [('leapfrog', h, rate, 1, 12, steps) for steps, h in product((LENGTH // 4, LENGTH), (0.25, 0.5, 1.0))]

def run(key):
    subprocess.run(command(*key), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    log = os.path.join(ROOT, 'out_compare', name_of(*key), 'log.csv')
    with open(log, newline='') as file:
        loss = [row['val_loss'] for row in csv.DictReader(file) if row['val_loss']][-1]
    new = not os.path.exists(TABLE)
    with open(TABLE, 'a', newline='') as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(['scheme', 'h', 'lr', 'seed', 'layers', 'steps', 'val_loss'])
        writer.writerow(['' if value is None else value for value in key] + [loss])
    print(name_of(*key), loss, flush=True)

def table():
    losses = found()
    print('seed 1, every learning rate')
    for scheme in SIZES:
        for h in SIZES[scheme]:
            row = [losses.get((scheme, h, rate, 1, 12, LENGTH)) for rate in RATES]
            print(f'{scheme:12}{h if h is not None else "":>8}' + ''.join(f'{loss:10.4f}' if loss else f'{"-":>10}' for loss in row))
    try:
        chosen = {scheme: [losses[scheme, *best(losses, scheme), seed, 12, LENGTH] for seed in SEEDS] for scheme in SIZES}
    except KeyError:
        return
    print('\nthe best of each on seeds 2 to 4: mean, standard deviation, difference to standard with its own, p of a paired t-test')
    for scheme, row in chosen.items():
        differences = [one - other for one, other in zip(row, chosen['standard'])]
        mean, spread = statistics.mean(differences), statistics.stdev(differences)
        t = mean / (spread / math.sqrt(3)) if spread else 0.0
        print(f'{scheme:12}{best(losses, scheme)}' + ''.join(f'{loss:9.4f}' for loss in row) + f'{statistics.mean(row):10.4f}'
              f'{statistics.stdev(row):9.4f}{mean:+10.4f}{spread:9.4f}{1 - abs(t) / math.sqrt(2 + t * t):8.3f}')      # two-sided, 2 degrees of freedom
    print('\nother depths and lengths, seed 1')
    for (scheme, h, rate, _, layers, steps), loss in losses.items():
        if (layers, steps) != (12, LENGTH):
            print(f'{scheme:12} h {h}, learning rate {rate:g}, {layers} layers, {steps} steps: {loss:.4f}')

if __name__ == '__main__':
    share, of = map(int, next((arg for arg in sys.argv[1:] if arg.startswith('--share=')), '--share=0/1')[8:].split('/'))
    for stage in [] if '--table' in sys.argv else stages():
        stage = list(dict.fromkeys(stage))
        for key in stage[share::of]:
            if key not in found():
                run(key)
        if missing := [key for key in stage if key not in found()]:
            sys.exit(f'{len(missing)} runs of this stage are another process\'s: run this again when it has made them')
    table()
