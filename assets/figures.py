"""
The figures in assets/, drawn from what is in results/ by one command:

    pip install matplotlib && python assets/figures.py

FIGURES lists all but states, loss and bits, each with its file in results/; files of GPU runs are drawn too.
"""
import csv
import glob
import json
import os
import re
import statistics
import sys
from collections import defaultdict

try:
    import matplotlib
except ImportError:
    sys.exit('assets/figures.py needs matplotlib: pip install matplotlib')
matplotlib.use('Agg')
import matplotlib.pyplot as plt

plt.rcParams.update({'font.size': 11, 'axes.grid': True, 'grid.alpha': 0.3, 'figure.constrained_layout.use': True,
                     'axes.spines.top': False, 'axes.spines.right': False, 'legend.frameon': False, 'svg.hashsalt': '0'})
# the palette of Okabe and Ito, which colour-blind people can tell apart
COLORS = dict(standard='#000000', checkpointed='#999999', midpoint='#0072B2', leapfrog='#009E73', symplectic='#E69F00',
              midpoint_a='#CC79A7', midpoint_sum='#D55E00', revlib='#56B4E9', bdia='#56B4E9')
NAMES = {'checkpointed/sliced': 'checkpointed, in slices', 'checkpointed/bf16': 'checkpointed, bf16 stream', 'leapfrog': 'reversible'}

def color(case):
    return COLORS[case.replace(',', '/').split('/')[0]]

def depth(rows, axes):
    last = rows[0]['layers'][-1]
    top = 1.05 * max(row[f'{last} layers'] for row in rows if row['case'] != 'standard') / 1e3      # standard leaves the picture
    for row, line in zip(rows, ('-', '-', '--', ':', '-')):
        peaks = [row[f'{n} layers'] / 1e3 for n in row['layers']]
        axes.plot(row['layers'], peaks, line, color=color(row['case']), linewidth=2)
        end = (last, peaks[-1]) if peaks[-1] <= top else (row['layers'][0] + (top - peaks[0]) / (row['MB per layer'] / 1e3), 0.97 * top)
        axes.annotate(NAMES.get(row['case'], row['case']), end, xytext=(5, 0), textcoords='offset points', va='center',
                      color=color(row['case']), annotation_clip=False)
    axes.set(xlabel='layers', ylabel='GB of activations', xlim=(0, 1.5 * last), xticks=range(0, last + 1, 6), ylim=(0, top))

def curve(rows, axes):
    for axis, n in zip(axes, dict.fromkeys(row['layers'] for row in rows)):
        for row, height in zip([row for row in rows if row['layers'] == n], (0.9, 0.75, 0.6)):
            places = [i / len(row['highest']) for i in range(len(row['highest']))]
            axis.fill_between(places, [x / 1e3 for x in row['highest']], color=color(row['case']), alpha=0.85, linewidth=0)
            axis.text(1, height, f"{NAMES.get(row['case'], row['case'])}: {row['peak MB'] / 1e3:.1f} GB", ha='right', color=color(row['case']),
                      weight='bold', transform=axis.transAxes)
        axis.set(title=f'{n} layers', xlabel='one step: forward, then backward', xticks=[], ylim=0)
    axes[0].set_ylabel('GB above weights and optimizer state')

def batch(rows, axes):
    rows = [row for row in rows if row['GB'] == 24]
    bars = [(NAMES.get(row['case'], row['case']), row['batch'], color(row['case'])) for row in rows if row['case'] not in ('midpoint', 'symplectic')]
    bars += [(f"the paper's {row['case']}", row["the paper's"], color(row['case'])) for row in rows if row["the paper's"]]
    names, sizes, colors = zip(*bars)
    axes.barh(names, sizes, color=colors)
    for i, size in enumerate(sizes):
        axes.text(size, i, f' {size:,}', va='center')
    axes.invert_yaxis()
    axes.grid(False)
    axes.set(xlabel='largest batch in 24 GB: sequences of 1024 tokens', xlim=(0, 1.15 * max(sizes)))

def frontier(rows, axes):
    for name, text, place, side in (('standard', 'standard, checkpointed', (-6, -14), 'right'), ('leapfrog', 'reversible', (4, 6), 'left')):
        points = [(row['work'], row['MB per sequence']) for row in rows if row['case'] == name]
        axes.plot(*zip(*points), marker='o', color=color(name))
        axes.annotate(text, max(points), xytext=place, textcoords='offset points', ha=side, color=color(name))
    axes.annotate('all layers stored', (1, points[-1][1]), xytext=(8, 4), textcoords='offset points')
    axes.set(xlabel='operations of a step, standard = 1', ylabel='MB per sequence', ylim=0, xlim=(None, 1.3))

def throughput(rows, axes):
    rows = [row for row in rows if row['tokens/s'] and row['case'] in SHOWN]
    names = [row['case'].replace('/', ', ') + ' stored' * ('/' in row['case']) + (f", {row['GB']:g} GB" if row['GB'] else '') for row in rows]
    axes.barh(names, [row['tokens/s'] for row in rows],
              color=[color(row['case']) for row in rows], xerr=[[row['tokens/s'] - row['lowest'] for row in rows],
                                                                [row['highest'] - row['tokens/s'] for row in rows]])
    axes.invert_yaxis()
    axes.grid(False)
    axes.set(xlabel='tokens/s: median, lowest and highest turn')

SHOWN = ('standard', 'checkpointed', 'midpoint', 'leapfrog', 'leapfrog/half', 'leapfrog/all', 'symplectic', 'midpoint_a', 'midpoint_sum')

def drift(rows, axes):
    for row in rows:
        if row['dtype'] == 'bfloat16' and row['states'] == 'float' and row['weights'] in ('x8', 'trained') and row['case'] != 'midpoint_a':
            errors = row['gradient_errors']
            axes.plot([j / len(errors) for j in range(len(errors))], errors, color=color(row['case']),
                      linestyle='-' if row['weights'] == 'trained' else '--')
    for y, scheme in zip((0.95, 0.88, 0.81), ('leapfrog', 'midpoint', 'symplectic')):
        axes.text(0.98, y, scheme, ha='right', va='top', transform=axes.transAxes, color=COLORS[scheme])
    axes.text(0.17, 0.25, 'weights x8')
    axes.text(0.02, 1e-3, 'trained weights')
    axes.set(xlabel='depth of the layer, 0: the first', ylabel='relative error of its gradient', yscale='log', ylim=(1e-5, 3))

def stability(rows, axes):
    for axis, row in zip(axes, [row for row in rows if 'z' in row]):
        for direction, line in (('up', '-'), ('down', '--')):
            if None not in row[direction]:
                axis.plot(row['z'], row[direction], line, color=color(row['case']),
                          label='forward' if direction == 'up' else 'backward')
        axis.set(title=row['case'], xlabel={'leapfrog': 'h²λ', 'symplectic': 'λ₁λ₂'}.get(row['case'], 'hλ') + f", {row['z is']}",
                 ylabel='growth per layer', ylim=(0, 4))
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
    """The comparison: each scheme at its best learning rate and h, seeds 2 to 4."""
    runs = defaultdict(list)
    for path in paths:
        scheme = re.match(r'(\w+?)(_h[\d.]+)?_lr', os.path.basename(path))[1]
        with open(path, newline='') as file:
            curve = [(int(row['step']), float(row['val_loss'])) for row in csv.DictReader(file) if row['val_loss']][1:]
        runs[scheme].append(curve)
    for name in sorted(runs, key=lambda name: statistics.mean(run[-1][1] for run in runs[name])):
        last = [run[-1][1] for run in runs[name]]
        axes[0].plot(*zip(*[(points[0][0], statistics.mean(loss for _, loss in points)) for points in zip(*runs[name])]), color=COLORS[name])
        axes[1].plot(last, [name] * len(last), 'o', alpha=0.6, color=COLORS[name])
        axes[1].plot(statistics.mean(last), name, '|', markersize=22, markeredgewidth=2.5, color=COLORS[name])
    axes[0].set(xlabel='steps', ylabel='validation loss, nats per byte', title='means of three seeds')
    axes[1].invert_yaxis()
    axes[1].set(xlabel='at the end: each run, and the mean', title='12 layers, 3.0M tokens')
    for label in axes[1].get_yticklabels():
        label.set_color(COLORS[label.get_text()])

def bits(folder, axes):
    """SmolLM2's loss above its teacher's, the mean of two texts: untuned from retrofit.py's tables, tuned from evaluate.py's report."""
    lines = defaultdict(lambda: defaultdict(list))                      # which line -> bits -> nats above the teacher, one per text
    for path in glob.glob(f'{folder}/untuned_*.txt'):
        with open(path) as file:
            content = file.read()
        teacher = float(re.search(r'^teacher, not reversible +all +(\S+)$', content, re.M)[1])
        # 8 bits are as good as all, and nothing has no place on this axis
        for title, k, loss in re.findall(r'^midpoint\(a\), (\S+ = -?|bits where they matter)\S* +(\S+) +(\S+)', content, re.M):
            if float(k) < 8:
                lines[title][float(k)].append(float(loss) - teacher)
    with open(f'{folder}/scores.json') as file:
        scores = {name: [text['loss'] for text in found['datasets'].values()] for name, found in json.load(file).items()}
    teacher = next(losses for name, losses in scores.items() if not name.endswith('.pt'))
    for name, losses in scores.items():
        if k := re.search(r'out_retrofit_smollm2/midpoint_a_([\d.]+)bit/', name):
            lines['tuned'][float(k[1])] += [loss - other for loss, other in zip(losses, teacher)]
    for title, text, place, scheme in (
            ('a = ', 'a > 0', (24, 0), 'checkpointed'), ('a = -', 'a < 0', (24, 0), 'midpoint'),
            ('bits where they matter', 'a < 0, bits\nwhere they\nmatter', (-4, -28), 'symplectic'),
            ('tuned', 'the same, tuned', (58, 0), 'leapfrog')):
        points = sorted((k, statistics.mean(losses)) for k, losses in lines[title].items())
        axes.plot(*zip(*points), marker='o', color=COLORS[scheme])
        axes.annotate(text, points[-1], xytext=place, textcoords='offset points', ha='center', va='center', color=COLORS[scheme])
    axes.set(xlabel='bits kept per element and layer', ylabel="nats per token above the teacher's", yscale='log', xlim=(-0.2, 4.4))

def states(_, axes):
    """The walk of two states: up, each step from the last two; down, the same by the line solved for p_prev."""
    for k in range(6):
        for y, direction in ((1, 1), (0, -1)):
            alive = k >= 4 if direction > 0 else k <= 1
            axes.text(k, y, f'$p_{k}$', ha='center', va='center', size=14, color='white' if alive else 'black', bbox=dict(
                boxstyle='circle', facecolor=COLORS['leapfrog'] if alive else 'white', edgecolor=COLORS['leapfrog'], linewidth=2))
        if k < 5:
            for y, (start, end) in ((1, (k, k + 1)), (0, (k + 1, k))):
                axes.annotate('', (end + 0.2 * (start - end), y), (start + 0.2 * (end - start), y), arrowprops=dict(arrowstyle='->', linewidth=1.5))
                axes.text(k + 0.5, y + 0.13, f'$f_{k + 1}$', ha='center', size=11)
    axes.text(-0.25, 0.5, '$p_{-1} = p_0$: the embedding', va='center')
    axes.text(5.5, 1, 'forward: only the last\ntwo states are kept', va='center')
    axes.text(5.5, 0, 'backward: each state is\nrebuilt from the two above it,\nand its gradient is taken', va='center')
    axes.set(xlim=(-0.6, 8), ylim=(-0.5, 1.5))
    axes.axis('off')

FIGURES = {         # name: (file in results/, lines, columns, width, height)
    'curve': ('curve_gpt2_counted', 1, 2, 10, 4), 'depth': ('depth_gpt2_counted', 1, 1, 8, 4), 'batch': ('batch_gpt2_counted', 1, 1, 8, 3.5),
    'frontier': ('frontier_gpt2_counted', 1, 1, 7, 4), 'throughput': ('throughput_cpu', 1, 1, 8, 4), 'drift': ('drift_cpu', 1, 1, 7, 4),
    'stability': ('stability', 2, 4, 14, 7)}

def draw(name, found, lines=1, columns=1, width=7, height=4):
    figure, axes = plt.subplots(lines, columns, figsize=(width, height))
    globals()[name.removesuffix('_gpu')](found, axes.flat if lines * columns > 1 else axes)
    os.makedirs('assets', exist_ok=True)
    figure.savefig(f'assets/{name}.png', dpi=110, metadata={'Software': None})
    plt.close(figure)
    print(f'assets/{name}.png')

if not os.path.isdir('results'):
    sys.exit('there is no folder results here: run it from the root of the repository')
draw('states', None, width=9, height=3)
for figure, (file, *size) in FIGURES.items():
    for name, path in ((figure, f'results/{file}.json'), (f'{figure}_gpu', f'results/{figure}_gpu.json')):
        if os.path.exists(path):
            with open(path) as content:
                draw(name, json.load(content)['rows'], *size)
if logs := sorted(glob.glob('results/compare/*_12layers_1465steps_seed[234].csv')):
    draw('loss', logs, 1, 2, 10, 4)
if os.path.exists('results/smollm2/scores.json'):
    draw('bits', 'results/smollm2')
