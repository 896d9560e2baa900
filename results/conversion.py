"""
How far a converted model is from its teacher before any tuning: KL(teacher, student) in nats per token. For a
of both signs, and for more and more layers at a = -1 or a = 1, in order of how little each changes the
output.

    python results/conversion.py --dataset=both --json=results/conversion.json

The recurrence runs in floats here, since nothing is rebuilt. h is 1 / S of step_sizes() in model.py
where a < 0, and 1 + a elsewhere. "mean" reads the output from the mean of the last two states.
"""
import os
import sys
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from configurator import configure
from model import step_sizes
from pretrained import build
from results.table import open_table, provenance
from runtime import open_data, start, windows

@dataclass
class Knobs:
    teacher: str = 'HuggingFaceTB/SmolLM2-135M-Instruct'        # or anything that from_pretrained() takes
    dataset: str = 'both'           # a folder of data/
    batch_size: int = 2             # windows of the validation data, spread evenly over it
    block_size: int = 256
    json: str | None = None         # a file for the rows
    device: str = 'auto'
    dtype: str = 'float32'

knobs = configure(Knobs, sys.argv[1:])
here = start(knobs)
_, _, data = open_data(knobs)
rows = np.linspace(0, len(data) - knobs.block_size - 1, knobs.batch_size).astype(int)
idx, _ = windows(data, rows, knobs.block_size, here.device)
model, _ = build(knobs.teacher)
model.to(here.device).eval().requires_grad_(False)
blocks = model.transformer.h
L = len(blocks)
x = model.transformer.wte(idx)                                                  # (B, T, C)
if model.config.rope_theta is None:
    x = x + model.transformer.wpe.weight[:knobs.block_size]

def log_p(state):
    return F.log_softmax(model.lm_head(model.transformer.ln_f(state)), dim=-1)  # (B, T, V)

def divergence(a, h=None):
    """KL(teacher, student) of the last state and of the mean of the last two, for a (and h) per layer."""
    p = p_prev = x
    for f, a_j, h_j in zip(blocks, a, h or step_sizes(a)):
        p_prev, p = p, a_j * p_prev + (1 - a_j) * p + h_j * f(p)
    found = {}
    for read, state in (('last', p), ('mean', (p_prev + p) / 2)):
        found[read] = (wanted.exp() * (wanted - log_p(state))).sum(-1).mean().item()
    return found

row = open_table(knobs.json, provenance(here, knobs))
wanted = log_p(model.integrate(x))
for a in (1 / 16, 1 / 4, 1 / 2):
    row(f'a = {a:g}', **divergence([a] * L))
    row(f'a = {-a:g}', **divergence([-a] * L))
    row(f'a = {-a:g}, h = 1 + a', **divergence([-a] * L, [1 - a] * L))
order = sorted(range(L), key=lambda j: divergence([-float(i == j) for i in range(L)])['last'])
for n in sorted({*range(5, L, 5), L - 2, L - 1, L}):
    for sign in (-1.0, 1.0):
        row(f'{n} layers at a = {sign:g}', **divergence([sign * (j in order[:n]) for j in range(L)]))
