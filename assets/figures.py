"""
The figures in assets/, drawn from what is in results/ by one command:

    pip install matplotlib && python assets/figures.py

FIGURES lists all but states, loss and bits, each with its file in results/. Files of GPU runs are drawn, too.
"""
import csv
import glob
import json
import os
import re
import statistics
from collections import defaultdict

import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt

plt.rcParams.update({
    'font.size': 11, 'axes.grid': True, 'grid.alpha': 0.3, 'figure.constrained_layout.use': True,
    'axes.spines.top': False, 'axes.spines.right': False})
# the palette of Okabe and Ito, which colour-blind people can tell apart
COLORS = dict(standard='#000000', checkpointed='#808080', midpoint='#0072B2', leapfrog='#009E73',
              symplectic='#E69F00', midpoint_a='#CC79A7', midpoint_sum='#D55E00', bdia='#56B4E9')
NAMES = {'checkpointed/sliced': 'checkpointed, in slices', 'checkpointed/bf16': 'checkpointed, bf16 stream',
         'checkpointed/host': 'checkpointed, kept on the host', 'leapfrog': 'reversible'}
PAPER = {'standard': 6, 'midpoint': 58}     # the paper's largest batches of GPT-2 small in 24 GB

def read(path):
    with open(path) as file:
        return json.load(file)

def read_csv(path):
    with open(path, newline='') as file:
        return list(csv.DictReader(file))

def color(case):
    return COLORS[case.replace(',', '/').split('/')[0]]

def ink(case):
    """The same colour for words, a quarter darker: lines can be paler than letters."""
    return [0.75 * part for part in matplotlib.colors.to_rgb(color(case))]

def name_of(case):
    return NAMES.get(case, case)

def note(axes, text, point, place, **style):
    """Words beside a point, so many points of print away from it."""
    axes.annotate(text, point, xytext=place, textcoords='offset points', va='center', **style)

def label_ends(axes, ends):
    """Names beside the ends of lines, name -> (x, y), moved apart until none covers another."""
    low, high = axes.get_ylim()
    gap = 0.055 * (high - low)
    names = sorted(ends, key=lambda name: ends[name][1])
    heights = [ends[name][1] for name in names]
    for _ in range(100):
        for i in range(1, len(heights)):
            short = max(0, gap - (heights[i] - heights[i - 1]))
            heights[i - 1] -= short / 2
            heights[i] += short / 2
    for name, height in zip(names, heights):
        note(axes, name, (ends[name][0], height), (5, 0), color=ink(name))

# -----------------------------------------------------------------------------
# memory and time, of bench.py

def depth(rows, axes):
    first, *_, last = rows[0]['layers']
    others = [row[f'{last} layers'] for row in rows if row['case'] != 'standard']
    top = 1.05 * max(others) / 1e3          # standard leaves the picture
    for row, line in zip(rows, ('-', '-', '--', ':', '-.', '-'), strict=True):
        peaks = [row[f'{n} layers'] / 1e3 for n in row['layers']]
        axes.plot(row['layers'], peaks, line, color=color(row['case']), linewidth=2)
        end = last, peaks[-1]
        if peaks[-1] > top:
            end = first + (top - peaks[0]) / (row['MB per layer'] / 1e3), 0.97 * top
        note(axes, name_of(row['case']), end, (5, 0), color=ink(row['case']), annotation_clip=False)
    axes.set(xlabel='layers', ylabel='GB of activations', xlim=(0, 1.5 * last), xticks=range(0, last + 1, 6),
             ylim=(0, top))

def curve(rows, axes):
    for axis, n in zip(axes, dict.fromkeys(row['layers'] for row in rows)):
        for row, height in zip([row for row in rows if row['layers'] == n], (0.9, 0.75, 0.6)):
            heights = [x / 1e3 for x in row['highest']]
            places = [i / len(heights) for i in range(len(heights))]
            axis.fill_between(places, heights, color=color(row['case']), linewidth=0)
            axis.text(1, height, f"{name_of(row['case'])}: peak {row['peak MB'] / 1e3:.1f} GB", ha='right',
                      color=ink(row['case']), weight='bold', transform=axis.transAxes)
        axis.set(title=f'{n} layers', xlabel='forward, then backward, in the order of allocations', xticks=[],
                 xlim=(0, 1.15), ylim=0)
    axes[0].set_ylabel('GB, without weights and optimizer state')

def batch(rows, axes):
    rows = [row for row in rows if row['GB'] == 24]
    bars = [(name_of(row['case']), row['batch'], color(row['case'])) for row in rows
            if row['case'] not in ('midpoint', 'symplectic')]
    bars += [(f"the paper's {case}", size, color(case)) for case, size in PAPER.items()]
    names, sizes, colors = zip(*bars)
    axes.barh(names, sizes, color=colors)
    for i, size in enumerate(sizes):
        axes.text(size, i, f' {size:,}', va='center')
    axes.invert_yaxis()
    axes.grid(False)
    axes.set(xlabel='largest batch in 24 GB: sequences of 1024 tokens', xlim=(0, 1.15 * max(sizes)))

def frontier(rows, axes):
    for case, line, text, end, place, side in (                 # end: 0, all layers stored; -1, none
            ('standard', '-', 'checkpointed', 0, (-8, 0), 'right'),
            ('checkpointed/sliced', '--', 'in slices', -1, (7, 0), 'left'),
            ('checkpointed/bf16', ':', 'bf16 stream', -1, (-8, 0), 'right'),
            ('leapfrog', '-', 'reversible', 0, (-8, 0), 'right')):
        points = sorted((row['work'], row['MB per sequence']) for row in rows if row['case'] == case)
        its = case if case == 'leapfrog' else 'checkpointed'
        axes.plot(*zip(*points), line, marker='o', color=color(its))
        note(axes, text, points[end], place, ha=side, color=ink(its))
    axes.annotate('all layers stored', (1, points[0][1]), xytext=(8, 4), textcoords='offset points')
    note(axes, 'none', points[-1], (8, 0))
    axes.set(xlabel='operations of a step, standard = 1', ylabel='MB per sequence', ylim=0, xlim=(0.92, 1.27),
             xticks=(1, 1.1, 1.2))

SHOWN = ('standard', 'checkpointed', 'midpoint', 'leapfrog', 'leapfrog/half', 'leapfrog/all', 'symplectic',
         'midpoint_a', 'midpoint_sum')

def throughput(rows, axes):
    for row in rows:
        if row['case'] not in SHOWN or not row['tokens/s']:
            continue
        name = row['case'].replace('/', ', ')
        if '/' in row['case']:
            name += ' stored'
        if row['GB']:
            name += f", {row['GB']:g} GB"
        axes.plot([row['lowest'], row['highest']], [name] * 2, linewidth=2, color=color(row['case']))
        axes.plot(row['tokens/s'], name, 'o', markersize=9, color=color(row['case']))
    axes.invert_yaxis()
    axes.set(xlabel='tokens/s: median, lowest and highest turn', xlim=0)

# -----------------------------------------------------------------------------
# exactness and schemes

def drift(rows, axes):
    for row in rows:
        if row['dtype'] != 'bfloat16' or row['states'] != 'float' or row['case'] == 'midpoint_a':
            continue
        if row['weights'] in ('x8', 'trained'):
            errors = row['gradient_errors']
            axes.plot([j / len(errors) for j in range(len(errors))], errors, color=color(row['case']),
                      linestyle='-' if row['weights'] == 'trained' else '--')
    for y, scheme in zip((0.95, 0.88, 0.81), ('leapfrog', 'midpoint', 'symplectic')):
        axes.text(0.98, y, scheme, ha='right', va='top', transform=axes.transAxes, color=ink(scheme))
    axes.text(0.17, 0.25, 'weights x8')
    axes.text(0.02, 1e-3, 'trained weights')
    axes.set(xlabel='depth of the layer, 0: the first', ylabel='relative error of its gradient', yscale='log',
             ylim=(1e-5, 3), title='float states, bfloat16')

def stability(rows, axes):
    """The growth of a perturbation through trained models."""
    trained = [row for row in rows if 'checkpoint' in row]
    layers = min(len(row['up']) for row in trained) - 1                 # symplectic has two steps per layer
    for axis, direction, title, label in (
            (axes[0], 'up', 'forward', 'layers, from the embedding up'),
            (axes[1], 'down', 'backward', 'layers, from the last states down')):
        lines = {row['case']: row[direction] for row in trained if row[direction]}
        for case, line in lines.items():
            axis.plot([layers * j / (len(line) - 1) for j in range(len(line))], line, color=color(case))
        axis.set(title=title, xlabel=label, xticks=range(0, layers + 1, 3), xlim=(0, 1.3 * layers), ylim=0)
        label_ends(axis, {case: (layers, line[-1]) for case, line in lines.items()})
    axes[0].set_ylabel('a perturbation grows by a factor of')

def loss(paths, axes):
    """The comparison: each scheme at its best learning rate and h, seeds 2 to 4."""
    runs = defaultdict(list)
    for path in paths:
        scheme = re.match(r'(\w+?)(_h[\d.]+)?_lr', os.path.basename(path))[1]
        points = [(int(row['step']), float(row['val_loss'])) for row in read_csv(path) if row['val_loss']]
        runs[scheme].append(points[1:])                                 # not before the first step
    means = {}
    for name, curves in runs.items():
        means[name] = [(points[0][0], statistics.mean(y for _, y in points)) for points in zip(*curves)]
    for name in sorted(means, key=lambda name: means[name][-1][1]):
        axes[0].plot(*zip(*means[name]), color=COLORS[name])
        last = [points[-1][1] for points in runs[name]]
        axes[1].plot(last, [name] * len(last), 'o', alpha=0.6, color=COLORS[name])
        axes[1].plot(means[name][-1][1], name, '|', markersize=22, markeredgewidth=2.5, color=COLORS[name])
    axes[0].set(xlabel='steps', ylabel='validation loss, nats per byte', title='means of three seeds',
                xlim=(250, 1850), xticks=range(300, 1501, 300), ylim=(1.45, None))
    label_ends(axes[0], {name: points[-1] for name, points in means.items()})
    axes[1].margins(y=0.1)
    axes[1].invert_yaxis()
    axes[1].set(xlabel='at the end: each run, and the mean', title='12 layers, 3.0M tokens')
    for label in axes[1].get_yticklabels():
        label.set_color(ink(label.get_text()))

def landing(folder, axes):
    """The loss of each step above the standard net's on the same data, mean of 50 steps; |a|, the rate."""
    def read_run(name):
        rows = [row for row in read_csv(f'{folder}/{name}.csv') if row['loss']]
        return {int(row['step']): [float(row[key] or 1) for key in ('loss', 'a', 'lr')] for row in rows}

    standard = read_run('12_standard_2_0.1')
    for name, text, case in (('12_land_2_0.2', '0 bits, 20%', 'midpoint'),
                             ('12_land_2_0.1', '0 bits, 10%', 'leapfrog'),
                             ('12_land1_2_0.1', '1 bit, 10%', 'symplectic')):
        run = read_run(name)
        steps = [step for step in run if step > 900 and step in standard]
        above = [run[step][0] - standard[step][0] for step in steps]
        smooth = [statistics.mean(above[max(0, i - 9):i + 1]) for i in range(len(above))]
        axes[0].plot(steps, smooth, color=COLORS[case])
        axes[1].plot(steps, [run[step][1] for step in steps], color=COLORS[case])
        axes[1].plot(steps, [run[step][2] / 8e-3 for step in steps], ':', color=COLORS[case])
        note(axes[0], text, (steps[-1], smooth[-1]), (5, 0), color=ink(case))
    axes[0].axhline(0, color='black', linewidth=1)
    axes[0].set(xlabel='steps', ylabel="training loss above standard's", ylim=(-0.05, 0.12), xlim=(900, 1600))
    axes[1].set(xlabel='steps', ylabel='|a|; dotted: the rate over its peak', ylim=(0, 1.1))

# -----------------------------------------------------------------------------
# conversion, and the walk of the states

def losses_of_bits(folder):
    """
    Which line -> bits -> nats above the teacher, one per text: untuned from the tables that smollm2.sh has
    written, tuned from evaluate.py's report.
    """
    lines = defaultdict(lambda: defaultdict(list))
    for path in glob.glob(f'{folder}/untuned_*.txt'):
        with open(path) as file:
            content = file.read()
        teacher = float(re.search(r'^teacher, not reversible +all +(\S+)$', content, re.M)[1])
        # 8 bits are as good as all, and 0 cannot be drawn on a log axis
        row = r'^midpoint\(a\), (\S+ = -?|bits where they matter)\S* +(\S+) +(\S+)'
        for title, k, loss in re.findall(row, content, re.M):
            if float(k) < 8:
                lines[title][float(k)].append(float(loss) - teacher)
    scores = {}
    for name, found in read(f'{folder}/scores.json').items():
        scores[name] = [text['loss'] for text in found['datasets'].values()]
    teacher = next(losses for name, losses in scores.items() if not name.endswith('.pt'))
    for name, losses in scores.items():
        bits = re.search(r'out_retrofit_smollm2/midpoint_a_([\d.]+)bit/', name)
        if bits:
            lines['tuned'][float(bits[1])] += [loss - other for loss, other in zip(losses, teacher)]
    return lines

def bits(folder, axes):
    """SmolLM2's loss above its teacher's, the mean of two texts."""
    lines = losses_of_bits(folder)
    for title, text, place, scheme in (
            ('a = ', 'a > 0', (24, 0), 'checkpointed'), ('a = -', 'a < 0', (24, 0), 'midpoint'),
            ('bits where they matter', 'a < 0, bits\nwhere they\nmatter', (-4, -28), 'symplectic'),
            ('tuned', 'the same, tuned', (58, 0), 'leapfrog')):
        points = sorted((k, statistics.mean(losses)) for k, losses in lines[title].items())
        axes.plot(*zip(*points), marker='o', color=COLORS[scheme])
        note(axes, text, points[-1], place, ha='center', color=ink(scheme))
    axes.set(xlabel='bits kept per element and layer', ylabel="nats per token above the teacher's",
             yscale='log', xlim=(-0.2, 4.4))

def states(_, axes):
    """The walk of position and velocity: up, f kicks v and v moves p; down, the same lines undone."""
    green = COLORS['leapfrog']
    kick = dict(arrowstyle='->', color='#808080', connectionstyle='arc3,rad=0.3')
    for y, way in ((1, 1), (0, -1)):
        for k in range(6):
            inside, letters = (green, 'white') if k == 5 else ('white', 'black')        # the last p is kept
            circle = dict(boxstyle='circle', facecolor=inside, edgecolor=green, linewidth=2)
            axes.text(k, y, f'$p_{k}$', ha='center', va='center', size=14, color=letters, bbox=circle)
        for k in range(5):                      # f at p_k turns v_k into v_{k+1}, which leads to p_{k+1}
            width, shade, letters = (3, green, ink('leapfrog')) if k == 4 else (1.5, 'black', 'black')
            arrow = dict(arrowstyle='->', linewidth=width, color=shade)
            axes.annotate('', (k + 0.5 + 0.3 * way, y), (k + 0.5 - 0.3 * way, y), arrowprops=arrow)
            axes.text(k + 0.5, y + 0.13, f'$v_{k + 1}$', ha='center', va='bottom', size=12, color=letters)
            axes.annotate('', (k + 0.5, y - 0.06), (k + 0.1, y - 0.2), arrowprops=kick)
            axes.text(k + 0.42, y - 0.33, f'$f_{k + 1}(p_{k})$', ha='center', va='center', size=10,
                      color='#606060')
    axes.text(5.5, 1, 'forward: $f$ changes $v$, and $v$ moves $p$.\nOnly the last $p$ and $v$ are kept',
              va='center')
    axes.text(5.5, 0, 'backward: $p$ steps back by $v$, then $f$ at\nthat $p$ gives back the $v$ before. '
              'At the\nembedding $p_0$ the velocity is 0', va='center')
    axes.set(xlim=(-0.5, 8.6), ylim=(-0.6, 1.5))
    axes.axis('off')

FIGURES = {         # name: (file in results/, columns, width, height)
    'curve': ('curve_gpt2_counted', 2, 10, 4), 'depth': ('depth_gpt2_counted', 1, 8, 4),
    'batch': ('batch_gpt2_counted', 1, 8, 3.5), 'frontier': ('frontier_gpt2_counted', 1, 7, 4),
    'throughput': ('throughput_cpu', 1, 8, 4), 'drift': ('drift_cpu', 1, 7, 4),
    'stability': ('stability', 2, 10, 4)}

def draw(name, found, columns=1, width=7, height=4):
    figure, axes = plt.subplots(1, columns, figsize=(width, height))
    globals()[name.removesuffix('_gpu')](found, axes)
    os.makedirs('assets', exist_ok=True)
    figure.savefig(f'assets/{name}.png', dpi=110, metadata={'Software': None})
    plt.close(figure)
    print(f'assets/{name}.png')

draw('states', None, width=9, height=3)
for name, (file, *size) in FIGURES.items():
    draw(name, read(f'results/{file}.json')['rows'], *size)
    if os.path.exists(f'results/{name}_gpu.json'):
        draw(f'{name}_gpu', read(f'results/{name}_gpu.json')['rows'], *size)
draw('loss', sorted(glob.glob('results/compare/*_12layers_1465steps_seed[234].csv')), 2, 10, 4)
draw('bits', 'results/smollm2')
draw('landing', 'results/landing', 2, 10, 4)
