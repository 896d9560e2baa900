"""
Schemes compared: each with the learning rate and the step size h that do best for it on one seed, then on three other seeds.

    python data/python/prepare.py && OMP_NUM_THREADS=1 python results/compare.py        # ten hours on one core; finished runs are kept
    OMP_NUM_THREADS=1 python results/compare.py --from=middle                           # a second process, for a second core
    python results/compare.py --table                                                   # of the finished runs

A run is train.py with config/compare.py and some flags. Its folder in out_compare/ is named after them. Its last validation loss
goes to results/compare.csv (inf if it diverged), its whole log to results/compare/. The work, in this order:

1. For each scheme, seed 1: from START it moves to the first of these neighbours that does better: rate / 2, 2 rate, h / 2, 2 h,
   rate / 4. It ends where all five do worse. Then seeds 2, 3 and 4 there.
2. All but BDIA, twice as deep, with half the tokens, seed 1. h is halved there: h times the number of layers is the time that is
   integrated over.
3. Leapfrog's h by depth, with a quarter of the tokens, at its best rate of part 1, for several values of that time: h is the power
   of 2 next to time / layers. Two values of h are tried at all depths. Three seeds.

BDIA is midpoint_a whose a is drawn anew for each micro-batch and layer. The counterpart of h in standard is a factor before f, which
no flag of train.py sets.
"""
import csv
import fcntl
import math
import os
import shutil
import statistics
import subprocess
import sys
from contextlib import suppress
from itertools import combinations
from time import sleep

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TABLE = os.path.join(ROOT, 'results', 'compare.csv')
START = {'standard': (1.0, 8e-3), 'midpoint': (0.125, 8e-3), 'leapfrog': (0.25, 8e-3), 'symplectic': (None, 8e-3),
         'midpoint_a': (0.25, 8e-3), 'bdia': (None, 4e-3)}             # (h, learning rate)
SEEDS = 2, 3, 4
LAYERS, LENGTH = 12, 1465                   # steps of 2048 tokens: 3.0M
DEEP = 2 * LAYERS, LENGTH // 2
DEPTHS, TIMES, SHORT, GRID_SEEDS = (4, 8, 16, 12, 32), (0.5, 1, 2, 4), LENGTH // 4, (1, 2, 3)
RULES = {f'{h:g}': lambda layers, h=h: h for h in (0.125, 0.25)}            # leapfrog's h by depth; 0.25 is the default
RULES |= {f'{time:g} / layers': lambda layers, time=time: 2.0 ** round(math.log2(time / layers)) for time in TIMES}

def name_of(scheme, h, rate, seed, layers, steps):
    size = '' if h is None else f'_h{h:g}'
    return f'{scheme}{size}_lr{rate:g}_{layers}layers_{steps}steps_seed{seed}'

def command(scheme, h, rate, seed, layers, steps):
    flags = dict(scheme=scheme, h=h, learning_rate=rate, min_lr=rate / 10, seed=seed, n_layer=layers, stored_layers=layers, max_iters=steps,
                 warmup_iters=steps // 15, lr_decay_iters=steps, eval_interval=steps // 5,
                 out_dir=os.path.join('out_compare', name_of(scheme, h, rate, seed, layers, steps)))
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

def made(*key):
    """The loss of a run, which is made if it is not there. BlockingIOError if another process is making it."""
    folder = os.path.join(ROOT, 'out_compare', name_of(*key))
    os.makedirs(folder, exist_ok=True)
    with open(f'{folder}.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if (loss := found().get(key)) is not None:
            return loss
        result = subprocess.run(command(*key), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if result.returncode == 1 and 'loss is' in result.stderr:           # train.py's sentence about inf and NaN
            loss = math.inf
        elif result.returncode:
            sys.exit(f'{name_of(*key)} ended with status {result.returncode}: {result.stderr}')
        else:
            with open(os.path.join(folder, 'log.csv'), newline='') as file:
                loss = float([row for row in csv.DictReader(file) if row['step'] == str(key[-1]) and row['val_loss']][-1]['val_loss'])
        os.makedirs(TABLE.removesuffix('.csv'), exist_ok=True)
        shutil.copyfile(os.path.join(folder, 'log.csv'), os.path.join(TABLE.removesuffix('.csv'), f'{name_of(*key)}.csv'))
        with open(TABLE, 'a', newline='') as file:
            writer = csv.writer(file)
            if not file.tell():
                writer.writerow(['scheme', 'h', 'lr', 'seed', 'layers', 'steps', 'val_loss'])
            writer.writerow(['' if value is None else value for value in (*key, loss)])
    print(name_of(*key), loss, flush=True)
    return loss

def climb(loss, scheme, h, rate):
    """(h, rate) of the lowest loss on seed 1: from here to the first neighbour that is better, until none is."""
    here = loss(scheme, h, rate, 1, LAYERS, LENGTH)
    for point in ((h, rate / 2), (h, 2 * rate), *((h * k, rate) for k in (1 / 2, 2) if h), (h, rate / 4)):
        if loss(scheme, *point, 1, LAYERS, LENGTH) < here:
            return climb(loss, scheme, *point)
    return h, rate

def best(loss, scheme):
    return climb(loss, scheme, *START[scheme])

def deep(loss, scheme):
    """The run of part 2."""
    h, rate = best(loss, scheme)
    return scheme, h and h / 2, rate, 1, *DEEP

def leapfrog(loss, h, layers):
    """Losses of part 3, by seed."""
    rate = best(loss, 'leapfrog')[1]
    return [loss('leapfrog', h, rate, seed, layers, SHORT) for seed in GRID_SEEDS]

def seeds(loss, scheme):
    return [loss(scheme, *best(loss, scheme), seed, LAYERS, LENGTH) for seed in SEEDS]

def work():
    """Functions that make runs."""
    schemes = [*START]
    middle = len(schemes) // 2 * ('--from=middle' in sys.argv)
    for scheme in schemes[middle:] + schemes[:middle]:
        yield lambda scheme=scheme: seeds(made, scheme)
    for scheme in schemes[:-1]:             # all but BDIA
        yield lambda scheme=scheme: made(*deep(made, scheme))
    for layers in DEPTHS:
        for rule in RULES.values():
            yield lambda layers=layers, rule=rule: leapfrog(made, rule(layers), layers)

def two_sided(t, degrees):
    """p of Student's t, for two or more degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle, odd = math.atan(abs(t) / math.sqrt(degrees)), degrees % 2
    term = total = math.cos(angle) ** odd
    for k in range(2 + odd, degrees - 1, 2):
        term *= (k - 1) / k * math.cos(angle) ** 2
        total += term
    return 1 - (2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total)

def table():
    losses = found()
    loss = lambda *key: losses[key]
    for scheme in START:
        runs = {key: value for key, value in losses.items() if key[0] == scheme and key[3:] == (1, LAYERS, LENGTH)}
        for h in sorted({key[1] for key in runs}, key=lambda h: h or 0):
            print(f'{scheme:12}{"" if h is None else h:>8}' + ''.join(f'{rate:10g}:{value:7.4f}' for (_, its_h, rate, *_), value in sorted(
                runs.items(), key=lambda run: run[0][2]) if its_h == h))
    print('\nthe best of each, seeds 2 to 4: mean and standard deviation')
    rows = {}
    for scheme in START:
        with suppress(KeyError):            # of a run that is not there yet
            row = seeds(loss, scheme)
            if max(row) < math.inf:
                rows[scheme] = row
                print(f'{scheme:12}{best(loss, scheme)}' + ''.join(f'{value:9.4f}' for value in row)
                      + f'{statistics.mean(row):10.4f}{statistics.stdev(row):9.4f}')
            else:
                print(f'{scheme:12}{best(loss, scheme)} diverged on a seed')
    print_pairs({scheme: row for scheme, row in rows.items() if scheme != 'bdia'})
    print('\nwith BDIA, whose variance is far larger: only the paired tests count')
    print_pairs(rows)
    print('\ntwice as deep, half the tokens, seed 1')
    for scheme in START:
        with suppress(KeyError):
            print(f'{name_of(*deep(loss, scheme)):60}{loss(*deep(loss, scheme)):9.4f}')
    print('\nleapfrog: h by depth, mean and standard deviation of three seeds')
    rows = {rule: [] for rule in RULES}     # a mean of seeds per depth
    for layers in sorted(DEPTHS):
        with suppress(KeyError):
            here = {rule: leapfrog(loss, h_of(layers), layers) for rule, h_of in RULES.items()}
            print(f'{layers:2} layers: ' + ', '.join(f'{h:g}: {statistics.mean(row):.4f} {statistics.stdev(row):.4f}' for h, row in sorted(
                {h_of(layers): here[rule] for rule, h_of in RULES.items()}.items()) if max(row) < math.inf))
            for rule, row in here.items():
                rows[rule].append(statistics.mean(row))
    if len(rows['0.25']) > 1:
        for rule, row in rows.items():
            print(f'h = {rule:12}' + ''.join(f'{value:9.4f}' for value in row) + f'{statistics.mean(row):10.4f}')
        print_pairs({rule: row for rule, row in rows.items() if max(row) < math.inf})

def print_pairs(rows):
    print('each pair: difference of the means, p of a paired t-test, the same after Holm, p by the variance of all, the same after Holm')
    for one, other, *values in pairs(rows) if len(rows) > 1 else ():
        print(f'{one:14}{other:14}' + ''.join(f'{value:9.4f}' for value in values))

def pairs(rows):
    """
    (one, other, difference of their means, p of a paired t-test, p after Holm, p, p after Holm) for all pairs of rows: name -> losses,
    in the same order of seeds (or depths). Runs of a seed share their data. With three seeds a paired test of two schemes alone has
    2 degrees of freedom. The second p pools the variance of all rows: the losses less the means of their rows and of their seeds
    (an analysis of variance with blocks). That needs rows of like variance, so a claim should survive both tests. Holm's correction
    is for the number of pairs.
    """
    n, everything = len(next(iter(rows.values()))), statistics.mean(sum(rows.values(), []))
    of_seed = [statistics.mean(column) for column in zip(*rows.values())]
    degrees = (len(rows) - 1) * (n - 1)
    variance = sum((value - statistics.mean(row) - seed + everything) ** 2 for row in rows.values() for value, seed in zip(row, of_seed)) / degrees
    result = []
    for one, other in combinations(rows, 2):
        differences = [x - y for x, y in zip(rows[one], rows[other])]
        mean, deviation = statistics.mean(differences), statistics.stdev(differences)
        result.append((one, other, mean, two_sided(mean / (deviation / math.sqrt(n)), n - 1) if deviation else 1.0,
                       two_sided(mean / math.sqrt(2 * variance / n), degrees)))
    ones, others, means, *both = zip(*result)
    return list(zip(ones, others, means, both[0], holm(both[0]), both[1], holm(both[1])))

def holm(values):
    """p -> p corrected for their number."""
    corrected, highest = {}, 0.0
    for i, p in enumerate(sorted(values)):
        corrected[p] = highest = max(highest, min(1.0, (len(values) - i) * p))
    return [corrected[p] for p in values]

if __name__ == '__main__':
    if unknown := set(sys.argv[1:]) - {'--table', '--from=middle'}:
        sys.exit(f'{min(unknown)} is not known: give --table, --from=middle or nothing')
    left = [] if '--table' in sys.argv else list(work())
    while left:
        for piece in list(left):
            with suppress(BlockingIOError):             # the other process is at it: come back later
                piece()
                left.remove(piece)
        sleep(5)
    table()
