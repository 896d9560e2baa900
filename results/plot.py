"""
Draws runs of train.py or retrofit.py side by side: training and validation loss, tokens/s and memory.

    pip install matplotlib && python results/plot.py out_a/log.csv out_b/log.csv        # writes runs.png
    python results/plot.py out_*/log.csv --out=comparison.png

A line per run, named by its folder; where a log lacks a column, there is no line. Losses begin at a tenth of
the shortest run: their first fall would flatten the rest. Many rows of training loss become 50 means.
"""
import csv
import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np

sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from configurator import explain

PANELS = dict(loss='training loss, averaged', val_loss='validation loss', tokens_per_s='tokens/s',
              peak_gb='peak memory, GB')
# the palette of Okabe and Ito, which colour-blind people can tell apart, with grey for its pale yellow
COLORS = '#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000', '#808080'

sys.excepthook = explain
out = 'runs.png'
runs = {}                                   # name -> rows
for word in sys.argv[1:]:
    if word.startswith('--out=') and word.endswith('.png'):
        out = word.removeprefix('--out=')
        continue
    if not os.path.isfile(word):
        raise ValueError(f'there is no file {word}: give logs, as out_a/log.csv, and perhaps --out=FILE.png')
    text = Path(word).read_text(encoding='latin-1')         # as train.py writes it
    if not text.startswith('step,loss,'):
        raise ValueError(f'{word} is no log of train.py or retrofit.py: give logs, as out_a/log.csv')
    lines = re.findall(r'^(?:step|\d+),[ -~]*\n', text, re.M)       # a crash may leave half a line
    runs[word.removesuffix('/log.csv')] = list(csv.DictReader(lines))
if not runs:
    raise ValueError('give the logs of runs: python results/plot.py out_a/log.csv out_b/log.csv')
if not find_spec('matplotlib'):             # no training needs it
    raise ValueError('drawing needs a package: pip install matplotlib')
import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt

plt.rcParams.update({
    'font.size': 13, 'axes.titlesize': 13, 'figure.labelsize': 13, 'axes.grid': True, 'grid.alpha': 0.3,
    'figure.constrained_layout.use': True, 'axes.spines.top': False, 'axes.spines.right': False,
    'axes.prop_cycle': plt.cycler(linestyle=['-', '--', ':']) * plt.cycler(color=COLORS)})
figure, axes = plt.subplots(2, 2, figsize=(10, 6.7 + 0.27 * len(runs)), sharex=True)
start = min((int(row['step']) for rows in runs.values() for row in rows[-1:]), default=0) / 10
for axis, (column, title) in zip(axes.flat, PANELS.items()):
    for rows in runs.values():
        points = [(int(row['step']), float(row[column])) for row in rows if row.get(column)]
        if 'loss' in column:
            points = [(step, loss) for step, loss in points if step >= start]
        if column == 'loss':
            points = [part.mean(0) for part in np.array_split(points, 50) if len(part)]
        # a line of one point would not be seen; a line of none keeps the colours in step
        axis.plot([x for x, _ in points], [y for _, y in points], marker='.' if len(points) < 30 else '')
    axis.set_title(title)
    if 'loss' not in column:
        axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
figure.supxlabel(f'steps; losses from step {start:.0f} on')
figure.legend(axes[0, 0].lines, runs, loc='outside upper center', frameon=False)
figure.savefig(out, dpi=110)
print(out)
