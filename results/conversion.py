"""
How far a converted model is from its teacher before any tuning: KL(teacher, student) in nats per token, for a of both signs,
and for more and more layers at a = -1 or a = 1, in order of how little each changes the output.

    python results/conversion.py --teacher=HuggingFaceTB/SmolLM2-135M-Instruct --dataset=both --json=results/conversion.json

The recurrence runs in floats here, since nothing is rebuilt. h is 1 / S of step_sizes() in pretrained.py where a < 0, and
1 + a elsewhere. "mean" reads the output from the mean of the last two states.
"""
import os
import sys
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from configurator import configure
from pretrained import build, step_sizes
from runtime import open_data, open_table, provenance, start, windows

@dataclass
class Knobs:
    teacher: str = 'HuggingFaceTB/SmolLM2-135M-Instruct'        # anything GPT.from_pretrained takes
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
model = build(knobs.teacher)[0].to(here.device).eval().requires_grad_(False)
blocks, x = model.transformer.h, model.transformer.wte(windows(data, rows, knobs.block_size, here.device)[0])        # (B, T, C)
if model.config.rope_theta is None:
    x = x + model.transformer.wpe.weight[:knobs.block_size]

def log_p(state):
    return F.log_softmax(model.lm_head(model.transformer.ln_f(state)), dim=-1)                  # (B, T, V)

def divergence(a, h=None):
    """KL(teacher, student) of the last state, and of the mean of the last two, for a (and h) of every layer."""
    p_prev = p = x
    for f, a_j, h_j in zip(blocks, a, h or step_sizes(a)):
        p_prev, p = p, a_j * p_prev + (1 - a_j) * p + h_j * f(p)
    return {read: (wanted.exp() * (wanted - log_p(state))).sum(-1).mean().item() for read, state in (('last', p), ('mean', (p_prev + p) / 2))}

row, L, p = open_table(knobs.json, provenance(here, knobs)), len(blocks), x
for f in blocks:
    p = p + f(p)
wanted = log_p(p)
for a in (1 / 16, 1 / 4, 1 / 2):
    row(f'a = {a:g}', **divergence([a] * L))
    row(f'a = {-a:g}', **divergence([-a] * L))
    row(f'a = {-a:g}, h = 1 + a', **divergence([-a] * L, [1 - a] * L))
order = sorted(range(L), key=lambda j: divergence([-float(i == j) for i in range(L)])['last'])
for n in sorted({*range(5, L, 5), L - 2, L - 1, L}):
    for sign in (-1.0, 1.0):
        row(f'{n} layers at a = {sign:g}', **divergence([sign * (j in order[:n]) for j in range(L)]))
