"""
CPU time of one whole step of training (data, forward, backward, AdamW) beside that of nanoGPT's own train.py.

    git clone https://github.com/karpathy/nanoGPT
    python data/python/prepare.py && python results/nanogpt.py --nanogpt=nanoGPT --json=results/nanogpt.json

Both scripts run as they are, in a config's shape and on its tokens: one thread, float32, no torch.compile. A
long run minus a short one leaves out the start, the evaluation and the checkpoint. The scripts take turns.
"""
import math
import os
import pickle
import resource
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from configurator import configure, read_file
from results.table import ROOT, open_table, provenance, spread
from runtime import open_data, start

@dataclass
class Knobs:
    nanogpt: str = 'nanoGPT'                # a checkout of it
    config: str = 'config/python_rev.py'
    schemes: str = 'standard'               # ours
    few: int = 40                           # steps of a short run
    many: int = 240                         # and of a long one
    repeats: int = 15                       # turns
    json: str | None = None                 # a file for the rows
    device: str = 'cpu'
    dtype: str = 'float32'

SAME = ('batch_size gradient_accumulation_steps block_size n_layer n_head n_embd learning_rate min_lr '
        'warmup_iters beta2').split()

def copy_with_our_tokens(folder, config):
    """nanoGPT in this folder, with the config's dataset, in its own format, as data/ours."""
    shutil.copytree(knobs.nanogpt, folder, ignore=shutil.ignore_patterns('.git'))
    meta, train, val = open_data(SimpleNamespace(**config))
    data = folder / 'data' / 'ours'
    data.mkdir(parents=True)
    train.astype(np.uint16).tofile(data / 'train.bin')
    val.astype(np.uint16).tofile(data / 'val.bin')
    vocab_size = math.ceil(meta['vocab_size'] / 64) * 64        # as our train.py rounds it
    (data / 'meta.pkl').write_bytes(pickle.dumps(dict(vocab_size=vocab_size)))

def seconds(command, folder, **flags):
    """CPU seconds, user's and system's, of a run of train.py in this folder."""
    flags = dict(flags, device='cpu', dtype='float32', compile=False, eval_interval=10**8, log_interval=10**8)
    command = [sys.executable, *command, *(f'--{name}={value}' for name, value in flags.items())]
    environment = dict(os.environ, OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore')
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

knobs = configure(Knobs, sys.argv[1:])
torch.set_num_threads(1)                    # for the record: the runs are told themselves
row = open_table(knobs.json, provenance(start(knobs), knobs))
config = read_file(knobs.config, [*SAME, 'dataset'])
with tempfile.TemporaryDirectory() as place:
    theirs = Path(place, 'nanoGPT')
    copy_with_our_tokens(theirs, config)
    flags = {name: config[name] for name in SAME if name in config}
    cases = {'nanogpt': (['train.py'], theirs, dict(flags, dataset='ours', eval_iters=1))}
    for scheme in knobs.schemes.split(','):
        ours = dict(scheme=scheme, rope_theta=None, eval_windows=1, out_dir=f'{place}/{scheme}')
        if scheme == 'standard':
            ours['h'] = None                # the config's h is for its own scheme
        cases[scheme] = [f'{ROOT}/train.py', os.path.abspath(knobs.config)], os.getcwd(), ours
    times = {name: [] for name in cases}    # milliseconds of a step, one number per turn
    for turn in range(knobs.repeats):
        for name in list(cases)[::1 if turn % 2 else -1]:
            command, folder, flags = cases[name]
            few, many = (seconds(command, folder, max_iters=n, **flags) for n in (knobs.few, knobs.many))
            times[name].append(1000 * (many - few) / (knobs.many - knobs.few))
for name, ms in times.items():
    ratios = [x / y for x, y in zip(ms, times['nanogpt'])]
    row(name, **spread(['ms of a step', 'lowest', 'highest'], ms),
        **spread(['time to nanogpt', 'lower quartile', 'upper quartile'], ratios, 0.25), all_ms=ms)
