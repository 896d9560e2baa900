"""
When a scheme is stable, in both directions of depth.

    python results/stability.py                         # the roots of each recurrence
    python results/stability.py --trained=out_a/best.pt,out_b/best.pt --json=FILE       # and trained models

A step is p_next = p + v_next, with v_next = -a v + c f(p) and v = p - p_prev. For f(p) = lambda * p it acts
on (p_prev, p) as a 2 x 2 matrix. Forward, a perturbation grows by the largest |r| of its eigenvalues r per
layer; backward, by the largest 1 / |r|. The product of the r is -a, so both stay at 1 only if |a| = 1. If |a|
< 1, forward damps some perturbation, which backward must amplify.

In a trained model a small random perturbation of the embedding is followed up to the last state, and one of
the last two states down to the embedding. Both runs are float64, not fixed point. They show how errors grow,
whatever their source.
"""
import os
import sys
from dataclasses import dataclass

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.append(ROOT)
from configurator import configure
from model import SCHEMES
from pretrained import from_pretrained
from results.table import open_table, provenance
from runtime import start

@dataclass
class Knobs:
    trained: str = ''               # checkpoints, such as out_a/best.pt,out_b/best.pt
    sequences: int = 8              # of tokens, each with a perturbation of its own
    points: int = 141               # of z on its axis
    json: str | None = None         # a file for the results
    device: str = 'cpu'             # or 'cuda'
    dtype: str = 'float32'          # all is in float64 here

knobs = configure(Knobs, sys.argv[1:])
here = start(knobs)
row = open_table(knobs.json, provenance(here, knobs))

# -----------------------------------------------------------------------------
# roots. z is h lambda, for the wave equation h^2 lambda, and for symplectic the product of both halves'
# lambdas

AXES = [('standard', None, 'real', -3, 1), ('midpoint', None, 'imaginary', 0, 2),
        ('midpoint_a', 0.5, 'imaginary', 0, 2), ('midpoint_a', 0.5, 'real', -3, 1),
        ('leapfrog', None, 'real', -6, 1), ('symplectic', None, 'real', -6, 1)]

def growth(scheme, a, z):
    """The largest |r| and 1 / |r|, of a layer."""
    a, c = SCHEMES[scheme](a, 1)
    lambdas = (z, 1) if scheme == 'symplectic' else (z,)                # attention and MLP in turn: two steps
    layer = torch.eye(2, dtype=torch.complex128)
    for x in lambdas:                                                   # (p_prev, p) -> (p, p_next)
        layer = torch.tensor([[0, 1], [a, 1 - a + c * x]], dtype=torch.complex128) @ layer
    r = torch.linalg.eigvals(layer).abs()
    backward = None if scheme == 'standard' else float(1 / r.min())     # it forgets p_prev
    return float(r.max()), backward

def stable(places, *directions):
    """Where z lies while no perturbation grows in these directions. None of a rate: it cannot be reversed."""
    inside = []
    for x, *rates in zip(places, *directions):
        if None not in rates and max(rates) < 1 + 1e-6:
            inside.append(x)
    return f'{inside[0]:g} to {inside[-1]:g}' if inside else 'nowhere'

for scheme, a, axis, low, high in AXES:
    places = torch.linspace(low, high, knobs.points, dtype=torch.float64).round(decimals=6).add(0.0).tolist()
    z = [complex(0, x) if axis == 'imaginary' else complex(x, 0) for x in places]
    forward, backward = zip(*(growth(scheme, a, each) for each in z))
    row(f'{scheme}, a = {a}' if a else scheme, **{
        'z is': axis, 'stable forward': stable(places, forward), 'stable backward': stable(places, backward),
        'stable in both': stable(places, forward, backward)}, z=places, up=list(forward), down=list(backward))

# -----------------------------------------------------------------------------
# trained models

def both(below, block):
    return lambda x: below(x) + block(x)

def steps(model):
    """(f, a, c) of every step, from the bottom to the top."""
    blocks = model.transformer.h
    found = []
    for j, (a, c, *_) in enumerate(model.config.coefficients()):
        halves = [blocks[j]]
        if model.config.scheme == 'symplectic':
            halves = [blocks[j].attention, blocks[j].feedforward]
        if model.config.scheme == 'midpoint_sum' and j:
            halves = [both(blocks[j - 1], blocks[j])]
        found += [(f, a, c) for f in halves]
    return found

def up(model, x):
    """All pairs (p_prev, p), from the embedding x (B, T, C) on."""
    pairs = [(x, x)]
    for f, a, c in steps(model):
        p_prev, p = pairs[-1]
        v = -a * (p - p_prev) + c * f(p)
        pairs.append((p, p + v))
    return pairs

def down(model, p, p_next):
    """The same pairs, from the last one on."""
    pairs = [(p, p_next)]
    for f, a, c in reversed(steps(model)):
        p, p_next = pairs[-1]
        v = (p_next - p - c * f(p)) / -a
        pairs.append((p - v, p))
    return pairs

def noise(like):
    return 1e-6 * like.std() * torch.randn_like(like)

def growths(pairs, others):
    """The distance of each pair from its other, in units of the first distance."""
    norms = [float((torch.stack(one) - torch.stack(other)).norm()) for one, other in zip(pairs, others)]
    return [norm / norms[0] for norm in norms]

@torch.no_grad()
def perturb(model, idx):
    """How a perturbation of (p_prev, p) grows: up from the embedding, and down from the last pair."""
    x = model.transformer.wte(idx)
    if model.config.rope_theta is None:
        x = x + model.transformer.wpe(torch.arange(idx.size(1), device=here.device))
    torch.manual_seed(0)
    pairs = up(model, x)
    upward = growths(up(model, x + noise(x)), pairs)
    if model.config.scheme == 'standard':
        return upward, []
    p, p_next = pairs[-1]
    return upward, growths(down(model, p + noise(p), p_next + noise(p_next)), down(model, p, p_next))

for path in filter(None, knobs.trained.split(',')):
    model = from_pretrained(path, exact=False).to(here.device).double().eval()
    T = model.config.block_size
    with open(os.path.join(ROOT, 'LICENSE'), 'rb') as file:
        text = torch.tensor(list(file.read()), device=here.device) % model.config.vocab_size
    idx = torch.stack([text.roll(-101 * i).repeat(T // len(text) + 1)[:T] for i in range(knobs.sequences)])
    upward, downward = perturb(model, idx)
    row(model.config.scheme, **{'h': str(model.config.h), 'forward grows by': upward[-1],
                                'backward grows by': downward[-1] if downward else None},
        up=upward, down=downward, checkpoint=[path])
