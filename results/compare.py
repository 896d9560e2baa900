"""
Schemes compared: each with the learning rate and step size h that do best for it on one seed, then on three.

    python data/python/prepare.py && OMP_NUM_THREADS=1 python results/compare.py   # ten hours on one core
    OMP_NUM_THREADS=1 python results/compare.py --from=middle       # a second process, for a second core
    python results/compare.py --table                               # of the finished runs, which are kept

A run is train.py with config/compare.py and some flags. Its folder in out_compare/ is named after them. Its
last validation loss goes to results/compare.csv (inf if it diverged), its whole log to results/compare/. The
work, in this order:

1. For each scheme, seed 1: from START it moves to the first of these neighbours that does better: rate / 2, 2
   rate, h / 2, 2 h, rate / 4. It ends where all five do worse. Then seeds 2, 3 and 4 there.
2. Twice as deep, with half the tokens, seed 1. h is halved there: h times the number of layers is the time
   that is integrated over.
3. Leapfrog's h by depth, with a quarter of the tokens, at its best rate of part 1, for several values of that
   time: h is the power of 2 next to time / layers. Two values of h are tried at all depths. Three seeds.

The counterpart of h in standard is a factor before f, which no flag of train.py sets.
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
from functools import partial
from itertools import combinations
from time import sleep

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TABLE = os.path.join(ROOT, 'results', 'compare.csv')
COLUMNS = 'scheme', 'h', 'lr', 'seed', 'layers', 'steps', 'val_loss'
START = {'standard': (1.0, 8e-3), 'midpoint': (0.125, 8e-3), 'leapfrog': (0.25, 8e-3),
         'symplectic': (None, 8e-3), 'midpoint_a': (0.25, 8e-3)}            # (h, learning rate)
SEEDS = 2, 3, 4
LAYERS = 12
LENGTH = 1465                               # steps of 2048 tokens: 3.0M
DEEP = 2 * LAYERS, LENGTH // 2
DEPTHS = 4, 8, 16, 12, 32
SHORT = LENGTH // 4
GRID_SEEDS = 1, 2, 3
RULES = {}                                  # leapfrog's h by depth: name -> {layers: h}
for size in (0.125, 0.25):                  # 0.25 is the default
    RULES[f'{size:g}'] = dict.fromkeys(DEPTHS, size)
for time in (0.5, 1, 2, 4):
    RULES[f'{time:g} / layers'] = {layers: 2.0 ** round(math.log2(time / layers)) for layers in DEPTHS}

# the standard model computes x + h * f(x)
SCALED = '''import runpy, model
f = model.Block.forward
model.Block.forward = lambda block, x, cache=None: {h} * f(block, x, cache)
runpy.run_path("train.py", run_name="__main__")'''

# -----------------------------------------------------------------------------
# runs. A key is (scheme, h, rate, seed, layers, steps)

def name_of(scheme, h, rate, seed, layers, steps):
    size = '' if h is None else f'_h{h:g}'
    return f'{scheme}{size}_lr{rate:g}_{layers}layers_{steps}steps_seed{seed}'

def command(scheme, h, rate, seed, layers, steps):
    folder = os.path.join('out_compare', name_of(scheme, h, rate, seed, layers, steps))
    flags = dict(scheme=scheme, learning_rate=rate, min_lr=rate / 10, seed=seed, n_layer=layers,
                 stored_layers=layers, max_iters=steps, warmup_iters=steps // 15, lr_decay_iters=steps,
                 eval_interval=steps // 5, out_dir=folder)
    script = ['train.py']
    if scheme == 'standard':
        script = ['-c', SCALED.format(h=h)]
    elif h is not None:
        flags['h'] = h
    flags = [f'--{name}={value}' for name, value in flags.items()]
    return [sys.executable, *script, 'config/compare.py', *flags]

def found():
    """Key -> validation loss in nats per byte."""
    if not os.path.exists(TABLE):
        return {}
    losses = {}
    with open(TABLE, newline='') as file:
        for row in csv.DictReader(file):
            h = float(row['h']) if row['h'] else None
            numbers = (int(row[name]) for name in ('seed', 'layers', 'steps'))
            losses[row['scheme'], h, float(row['lr']), *numbers] = float(row['val_loss'])
    return losses

def made(*key):
    """The loss of a run, which is made if it is not there. BlockingIOError if another process is at it."""
    folder = os.path.join(ROOT, 'out_compare', name_of(*key))
    os.makedirs(folder, exist_ok=True)
    with open(f'{folder}.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        losses = found()
        if key in losses:
            return losses[key]
        result = subprocess.run(command(*key), cwd=ROOT, capture_output=True, text=True)
        if result.returncode == 0:
            loss = last_loss(folder, key[-1])
        elif 'loss is' in result.stderr:    # train.py's sentence about inf and NaN
            loss = math.inf
        else:
            raise RuntimeError(f'{name_of(*key)} ended with status {result.returncode}: {result.stderr}')
        keep(folder, key, loss)
    print(name_of(*key), loss, flush=True)
    return loss

def last_loss(folder, step):
    with open(os.path.join(folder, 'log.csv'), newline='') as file:
        rows = [row for row in csv.DictReader(file) if row['step'] == str(step) and row['val_loss']]
    return float(rows[-1]['val_loss'])

def keep(folder, key, loss):
    logs = TABLE.removesuffix('.csv')
    os.makedirs(logs, exist_ok=True)
    shutil.copyfile(os.path.join(folder, 'log.csv'), os.path.join(logs, f'{name_of(*key)}.csv'))
    with open(TABLE, 'a', newline='') as file:
        writer = csv.writer(file)
        if not file.tell():
            writer.writerow(COLUMNS)
        writer.writerow(['' if value is None else value for value in (*key, loss)])

# -----------------------------------------------------------------------------
# the work. loss: a key -> its loss, which is made, or looked up

def climb(loss, scheme, h, rate):
    """(h, rate) of the lowest loss on seed 1: on to the first neighbour that is better, until none is."""
    here = loss(scheme, h, rate, 1, LAYERS, LENGTH)
    sizes = [] if h is None else [(h / 2, rate), (2 * h, rate)]
    for point in [(h, rate / 2), (h, 2 * rate), *sizes, (h, rate / 4)]:
        if loss(scheme, *point, 1, LAYERS, LENGTH) < here:
            return climb(loss, scheme, *point)
    return h, rate

def best(loss, scheme):
    return climb(loss, scheme, *START[scheme])

def seeds(loss, scheme):
    return [loss(scheme, *best(loss, scheme), seed, LAYERS, LENGTH) for seed in SEEDS]

def deep(loss, scheme):
    """(key, loss) of the run of part 2."""
    h, rate = best(loss, scheme)
    key = scheme, h and h / 2, rate, 1, *DEEP
    return key, loss(*key)

def leapfrog(loss, h, layers):
    """Losses of part 3, by seed."""
    _, rate = best(loss, 'leapfrog')
    return [loss('leapfrog', h, rate, seed, layers, SHORT) for seed in GRID_SEEDS]

def work():
    """Functions that make runs."""
    schemes = list(START)
    middle = len(schemes) // 2 if '--from=middle' in sys.argv else 0
    for scheme in schemes[middle:] + schemes[:middle]:
        yield partial(seeds, made, scheme)
    for scheme in schemes:
        yield partial(deep, made, scheme)
    for layers in DEPTHS:
        for h_of in RULES.values():
            yield partial(leapfrog, made, h_of[layers], layers)

# -----------------------------------------------------------------------------
# tests of differences

def two_sided(t, degrees):
    """p of Student's t, for two or more degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(abs(t) / math.sqrt(degrees))
    odd = degrees % 2
    term = total = math.cos(angle) ** odd
    for k in range(2 + odd, degrees - 1, 2):
        term *= (k - 1) / k * math.cos(angle) ** 2
        total += term
    return 1 - (2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total)

def pooled_variance(rows):
    """
    (variance, its degrees of freedom) of all rows together: of the losses less the means of their rows and of
    their seeds (an analysis of variance with blocks).
    """
    n = len(next(iter(rows.values())))
    everything = statistics.mean(sum(rows.values(), []))
    of_seed = [statistics.mean(column) for column in zip(*rows.values())]
    degrees = (len(rows) - 1) * (n - 1)
    squares = 0.0
    for row in rows.values():
        mean = statistics.mean(row)
        squares += sum((value - mean - seed + everything) ** 2 for value, seed in zip(row, of_seed))
    return squares / degrees, degrees

def pairs(rows):
    """
    (one, other, difference of their means, p of a paired t-test, p after Holm, p, p after Holm) for all pairs
    of rows: name -> losses, in the same order of seeds (or depths). Runs of a seed share their data. With
    three seeds a paired test of two schemes alone has 2 degrees of freedom. The second p pools the variance
    of all rows. That needs rows of like variance, so a claim should survive both tests. Holm's correction is
    for the number of pairs.
    """
    variance, degrees = pooled_variance(rows)
    result = []
    for one, other in combinations(rows, 2):
        differences = [x - y for x, y in zip(rows[one], rows[other])]
        n = len(differences)
        mean = statistics.mean(differences)
        deviation = statistics.stdev(differences)
        paired = two_sided(mean / (deviation / math.sqrt(n)), n - 1) if deviation else 1.0
        result.append((one, other, mean, paired, two_sided(mean / math.sqrt(2 * variance / n), degrees)))
    ones, others, means, paired, pooled = zip(*result)
    return list(zip(ones, others, means, paired, holm(paired), pooled, holm(pooled)))

def holm(values):
    """p -> p corrected for their number."""
    corrected = {}
    highest = 0.0
    for i, p in enumerate(sorted(values)):
        highest = max(highest, min(1.0, (len(values) - i) * p))
        corrected[p] = highest
    return [corrected[p] for p in values]

# -----------------------------------------------------------------------------
# the table

def numbers(values, width=9):
    return ''.join(f'{value:{width}.4f}' for value in values)

def spread(row):
    return statistics.mean(row), statistics.stdev(row)

def print_climb(losses, scheme):
    runs = [key for key in losses if key[0] == scheme and key[3:] == (1, LAYERS, LENGTH)]
    for h in sorted({key[1] for key in runs}, key=lambda h: h or 0):
        rates = sorted(key[2] for key in runs if key[1] == h)
        row = ''.join(f'{rate:10g}:{losses[scheme, h, rate, 1, LAYERS, LENGTH]:7.4f}' for rate in rates)
        print(f'{scheme:12}{"" if h is None else h:>8}{row}')

def print_pairs(rows):
    print('each pair: difference of the means, p of a paired t-test, the same after Holm, p by the variance '
          'of all, the same after Holm')
    for one, other, *values in pairs(rows) if len(rows) > 1 else ():
        print(f'{one:14}{other:14}' + numbers(values))

def table():
    losses = found()
    gone = {key[0] for key in losses} - START.keys()
    if gone:
        print(f"left out, as train.py has it no longer: {', '.join(gone)}")

    def loss(*key):
        return losses[key]                  # KeyError of a run that is not there yet

    for scheme in START:
        print_climb(losses, scheme)
    print('\nthe best of each, seeds 2 to 4: mean and standard deviation')
    rows = {}
    for scheme in START:
        with suppress(KeyError):
            row = seeds(loss, scheme)
            if max(row) == math.inf:
                print(f'{scheme:12}{best(loss, scheme)} diverged on a seed')
                continue
            rows[scheme] = row
            print(f'{scheme:12}{best(loss, scheme)}' + numbers(row) + ' ' + numbers(spread(row)))
    print_pairs(rows)
    print('\ntwice as deep, half the tokens, seed 1')
    for scheme in START:
        with suppress(KeyError):
            key, value = deep(loss, scheme)
            print(f'{name_of(*key):60}{value:9.4f}')
    print_depths(loss)

def print_depths(loss):
    print('\nleapfrog: h by depth, mean and standard deviation of three seeds')
    rows = {rule: [] for rule in RULES}     # a mean of seeds per depth
    for layers in sorted(DEPTHS):
        with suppress(KeyError):
            here = {rule: leapfrog(loss, h_of[layers], layers) for rule, h_of in RULES.items()}
            by_h = {RULES[rule][layers]: row for rule, row in here.items() if max(row) < math.inf}
            shown = ['{:g}: {:.4f} {:.4f}'.format(h, *spread(by_h[h])) for h in sorted(by_h)]
            print(f'{layers:2} layers: ' + ', '.join(shown))
            for rule, row in here.items():
                rows[rule].append(statistics.mean(row))
    if len(rows['0.25']) > 1:
        for rule, row in rows.items():
            print(f'h = {rule:12}' + numbers(row) + ' ' + numbers([statistics.mean(row)]))
        print_pairs({rule: row for rule, row in rows.items() if max(row) < math.inf})

if __name__ == '__main__':
    unknown = set(sys.argv[1:]) - {'--table', '--from=middle'}
    if unknown:
        raise ValueError(f'{min(unknown)} is not known: give --table, --from=middle or nothing')
    left = [] if '--table' in sys.argv else list(work())
    while left:
        for piece in list(left):
            with suppress(BlockingIOError):             # the other process is at it: come back later
                piece()
                left.remove(piece)
        sleep(5)
    table()
