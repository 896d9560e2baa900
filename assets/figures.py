"""
The figures in assets/, drawn from what is in results/ by one command:

    pip install matplotlib && python assets/figures.py

results/NAME.json, written by bench.py, results/drift.py or results/stability.py, becomes assets/NAME.png; largest batches and
contexts are tables in RESULTS.md. results/loss/SCHEME_h_SEED.csv, the log.csv
of runs of config/compare.py, become assets/loss.png.
"""
import csv
import glob
import json
import os
import statistics
import sys
from collections import defaultdict

try:
    import matplotlib
except ImportError:
    sys.exit('assets/figures.py needs matplotlib: pip install matplotlib')
matplotlib.use('Agg')
import matplotlib.pyplot as plt

plt.rcParams.update({'font.size': 9, 'axes.grid': True, 'grid.alpha': 0.3, 'figure.constrained_layout.use': True,
                     'axes.spines.top': False, 'axes.spines.right': False, 'legend.frameon': False, 'svg.hashsalt': '0'})
COLORS = dict(standard='black', checkpointed='gray', midpoint='tab:blue', leapfrog='tab:green', symplectic='tab:orange',
              midpoint_a='tab:purple', midpoint_sum='tab:red', revlib='tab:brown')

def color(case):
    return COLORS[case.replace(',', '/').split('/')[0]]

def style(case):
    return dict(color=color(case), linestyle={'half': '--', 'all': ':', 'float': '-.'}.get(case.split('/')[-1], '-'))

def depth(rows, axes):
    last = rows[0]['layers'][-1]
    top = 1.05 * max(row[f'{last} layers'] for row in rows if row['case'] != 'standard') / 1e3      # which leaves the picture
    for row, line in zip(rows, ('-', '-', '--', ':', '-')):
        peaks = [row[f'{n} layers'] / 1e3 for n in row['layers']]
        axes.plot(row['layers'], peaks, line, color=color(row['case']))
        if peaks[-1] > top:
            axes.annotate(row['case'], (row['layers'][0] + (top - peaks[0]) / (row['MB per layer'] / 1e3), top), xytext=(4, -9),
                          textcoords='offset points', color=color(row['case']))
        else:
            axes.annotate(row['case'], (last, peaks[-1]), xytext=(4, 0), textcoords='offset points', va='center',
                          color=color(row['case']), annotation_clip=False)
    axes.set(xlabel='layers', ylabel='GB of activations', xlim=(0, 1.35 * last), ylim=(0, top))

def curve(rows, axes):
    for axis, n in zip(axes, dict.fromkeys(row['layers'] for row in rows)):
        for row in [row for row in rows if row['layers'] == n]:
            places = [i / len(row['highest']) for i in range(len(row['highest']))]
            axis.fill_between(places, [x / 1e3 for x in row['highest']], color=color(row['case']), alpha=0.8, linewidth=0,
                              label=f"{row['case']}: {row['peak MB'] / 1e3:.1f} GB")
        axis.set(title=f'{n} layers', xlabel='one step: forward, then backward', xticks=[])
        axis.legend()
    axes[0].set_ylabel('GB above weights and AdamW')

def frontier(rows, axes):
    for name in dict.fromkeys(row['case'] for row in rows):
        points = [(row['work'], row['MB per sequence']) for row in rows if row['case'] == name]
        label = {'standard': 'standard, the rest checkpointed'}.get(name, name)
        axes.plot(*zip(*points), marker='o', color=color(name), label=label)
    axes.set(xlabel='work of a step, standard = 1', ylabel='MB per sequence', ylim=0, title=f"{rows[0]['layers']} layers")
    axes.legend()

def throughput(rows, axes):
    rows = [row for row in rows if row['tokens/s']]
    names = [f"{row['case']}, {row['stored layers']} stored, batch {row['batch']}"
             + (f", {row['GB']:g} GB" if row['GB'] else '') for row in rows]
    axes.barh(names, [row['tokens/s'] for row in rows], color=[color(row['case']) for row in rows], xerr=[
        [row['tokens/s'] - row['lowest'] for row in rows], [row['highest'] - row['tokens/s'] for row in rows]])
    axes.invert_yaxis()
    axes.set(xlabel='tokens/s: median, lowest and highest turn')

def drift(rows, axes):
    exact = max((max(row['worst state'], row['worst gradient']) for row in rows if row['states'] == 'exact'), default=None)
    for axis, (what, key) in zip(axes, (('state', 'state_errors'), ('gradient', 'gradient_errors'))):
        for row in rows:
            if row['dtype'] == 'bfloat16' and row['states'] == 'float' and row['weights'] in ('x1', 'x8', 'trained'):
                errors = [max(error, 1e-12) for error in row[key]]
                axis.plot([j / len(errors) for j in range(len(errors))], errors, color=color(row['case']),
                          linestyle={'x1': ':', 'x8': '--', 'trained': '-'}[row['weights']], label=f"{row['case']}, {row['weights']}")
        axis.set(xlabel='depth, 0: the embedding', ylabel=f'relative error of the {what}', yscale='log',
                 title=f'{what}s, float states in bfloat16' + (f' (exact states: {exact:g})' if exact is not None else ''))
    axes[1].legend(fontsize=7, ncols=2)

def stability(rows, axes):
    for axis, row in zip(axes, [row for row in rows if 'z' in row]):
        for direction, line in (('up', '-'), ('down', '--')):
            if None not in row[direction]:
                axis.plot(row['z'], row[direction], line, color=color(row['case']),
                          label='forward' if direction == 'up' else 'backward')
        axis.set(title=row['case'], xlabel={'leapfrog': 'h²λ', 'symplectic': 'λ₁λ₂'}.get(row['case'], 'hλ') + f", {row['z is']}",
                 ylabel='growth a layer', ylim=(0, 4))
        axis.legend(fontsize=7)
    for axis, direction in zip(axes[6:], ('up', 'down')):
        for row in rows:
            if 'checkpoint' in row and row[direction]:
                axis.plot([j / (len(row[direction]) - 1) for j in range(len(row[direction]))], row[direction],
                          color=color(row['case']), label=f"{row['case']}, h = {row['h']}".replace(', h = None', ''))
        axis.set(yscale='log', ylabel='a perturbation grows by', title='trained models, ' + (
            'forward' if direction == 'up' else 'backward'), xlabel='from the embedding to the last state' if direction == 'up'
                 else 'from the last states to the embedding')
        axis.legend(fontsize=7)

def loss(paths, axes):
    curves = defaultdict(list)
    for path in paths:
        with open(path, newline='') as file:
            found = [(int(row['step']), float(row['val_loss'])) for row in csv.DictReader(file) if row['val_loss']]
        curves[os.path.basename(path).removesuffix('.csv').rsplit('_', 1)[0]].append(found[1:])
    order = sorted(curves, key=lambda name: statistics.mean(run[-1][1] for run in curves[name]))
    seen = set()
    for name in order:
        scheme = name.removeprefix('mean_').removeprefix('quarter_').split('_h')[0]
        label = '1 seed, ' * (len(curves[name]) == 1) + name.replace('_h', ', h = ')
        label = label.replace('mean_', 'mean of two: ').replace('quarter_', 'f / 4: ')
        axes[1].plot([run[-1][1] for run in curves[name]], [label] * len(curves[name]), 'o', alpha=0.7, color=COLORS[scheme])
        if len(curves[name]) > 1 and scheme not in seen and name.startswith(scheme):       # each scheme's best
            seen.add(scheme)
            points = [(steps[0][0], statistics.mean(loss for _, loss in steps)) for steps in zip(*curves[name])]
            axes[0].plot(*zip(*points), marker='.', color=COLORS[scheme], label=label)
    axes[0].set(xlabel='steps', ylabel='validation loss, nats per byte', title='means of three seeds')
    axes[0].legend()
    axes[1].invert_yaxis()
    axes[1].set(xlabel='validation loss at the end, each run', title='ranking')

SIZES = dict(depth=(1, 1, 7, 4), curve=(1, 2, 10, 4), frontier=(1, 1, 6, 4), throughput=(1, 1, 8, 5), drift=(1, 2, 11, 4.5),
             stability=(2, 4, 13, 6), loss=(1, 2, 11, 4.5))

def draw(kind, found, name):
    lines, columns, width, height = SIZES[kind]
    figure, axes = plt.subplots(lines, columns, figsize=(width, height))
    globals()[kind](found, axes.flat if lines * columns > 1 else axes)
    os.makedirs('assets', exist_ok=True)
    figure.savefig(f'assets/{name}.png', dpi=110, metadata={'Software': None})
    plt.close(figure)
    print(f'assets/{name}.png')

if not os.path.isdir('results'):
    sys.exit('there is no folder results here: run it from the root of the repository')
for path in sorted(glob.glob('results/*.json')):
    with open(path) as file:
        result = json.load(file)
    words = result['command'].split()
    kind = words[2] if words[1] == 'bench.py' else os.path.basename(words[1]).removesuffix('.py')
    if kind in SIZES and result['rows']:
        draw(kind, result['rows'], os.path.basename(path).removesuffix('.json'))
if logs := sorted(glob.glob('results/loss/*.csv')):
    draw('loss', logs, 'loss')
