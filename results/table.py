"""
Rows of figures, on the screen and in a file, and what made them: for bench.py and the scripts in results/.
"""
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import asdict

import numpy as np
import torch
from tqdm import tqdm

from runtime import main, world

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

def git(*words):
    if not shutil.which('git'):
        return ''
    return subprocess.run(['git', *words], capture_output=True, text=True, cwd=ROOT).stdout.strip()

def provenance(here, knobs):
    """Command, commit, hardware and versions."""
    processor = platform.processor()
    if os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo') as file:
            names = [line.split(':')[1].strip() for line in file if line.startswith('model name')]
        processor = names[0] if names else processor
    hardware = f'{torch.get_num_threads()} threads, {processor}'
    if here.kind == 'cuda':
        hardware = torch.cuda.get_device_name()
    changed = ', changed' if git('status', '--short', '-uno') else ''
    return dict(command=' '.join(['python', os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
                date=time.strftime('%Y-%m-%d'), commit=git('rev-parse', '--short', 'HEAD') + changed,
                hardware=hardware, processes=world, torch=torch.__version__, python=platform.python_version(),
                knobs=asdict(knobs))

def spread(names, values, part=0):
    """
    The median of these values, and those that this part of them is below and above (0: the lowest and the
    highest), under these names; None of no values.
    """
    found = np.quantile(values, (0.5, part, 1 - part)).tolist() if values else (None, None, None)
    return dict(zip(names, found))

def text(value):
    if value is None:
        return '-'
    if not isinstance(value, float):
        return str(value)
    if 0 < abs(value) < 1e-2:
        return f'{value:.1e}'
    return f'{value:,.0f}' if abs(value) >= 1e4 else f'{value:.4g}'

def open_table(path, about):
    """
    row(case, **values), which prints a row, and writes `about` and all rows so far to this file, if there is
    one: an interrupted run keeps them. Lists go to the file only.
    """
    rows = []
    if path and main:                       # complains before hours of work, not after
        os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
        open(path, 'a').close()

    def row(case, **values):
        rows.append(dict(case=case, **values))
        if not main:
            return
        if path:
            with open(f'{path}.part', 'w') as file:
                json.dump(dict(about, rows=rows), file, indent=1)
            os.replace(f'{path}.part', path)
        shown = {name: text(value) for name, value in values.items() if not isinstance(value, list)}
        width = {name: max(11, len(name) + 2) for name in shown}
        if len(rows) == 1 or rows[-2].keys() != rows[-1].keys():
            tqdm.write(' ' * 24 + ''.join(name.rjust(width[name]) for name in shown))
        tqdm.write(case.ljust(24) + ''.join(value.rjust(width[name]) for name, value in shown.items()))
    return row
