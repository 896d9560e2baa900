"""
When a scheme is stable, in both directions of depth.

    python results/stability.py                                                 # the roots of each recurrence
    python results/stability.py --trained=out_a/best.pt,out_b/best.pt --json=FILE       # and perturbations in trained models

For f(p) = lambda * p the recurrence is p_next = (b + c lambda) p + a p_prev, which acts on (p_prev, p) as a 2 x 2 matrix.
Forward, a perturbation grows by the largest |r| of its eigenvalues r per layer; backward, by the largest 1 / |r|. The product of
the r is -a, so both stay at 1 only if |a| = 1. If |a| < 1, forward damps some perturbation, which backward must amplify.

In a trained model a small random perturbation of the embedding is followed up to the last state, and one of the last two
states down to the embedding. Both runs are float64, not fixed point. They show how errors grow, whatever their source.
"""
import os
import sys
from dataclasses import dataclass

import torch
from tqdm import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.append(ROOT)
from configurator import configure
from model import SCHEMES, advance, rebuild
from pretrained import build
from runtime import fail, open_table, provenance, start

@dataclass
class Knobs:
    trained: str = ''               # checkpoints, such as out_a/best.pt,out_b/best.pt
    sequences: int = 8              # of tokens, each with a perturbation of its own
    points: int = 141               # of z on its axis
    json: str | None = None         # a file for the results
    device: str = 'cpu'             # or 'cuda'

knobs = configure(Knobs, sys.argv[1:])
if knobs.sequences < 1 or knobs.points < 2:
    sys.exit(f'sequences = {knobs.sequences} must be 1 or more, points = {knobs.points} 2 or more')
knobs.dtype = 'float32'             # of start(); here all is in float64
here = start(knobs)
row = open_table(knobs.json, provenance(here, knobs))

# -----------------------------------------------------------------------------
# the roots. z is h lambda, for the wave equation h^2 lambda, and for symplectic the product of both halves' lambdas

AXES = [('standard', None, 'real', -3, 1), ('midpoint', None, 'imaginary', 0, 2), ('midpoint_a', 0.5, 'imaginary', 0, 2),
        ('midpoint_a', 0.5, 'real', -3, 1), ('leapfrog', None, 'real', -6, 1), ('symplectic', None, 'real', -6, 1)]

def growth(scheme, a, z):
    """The largest |r| and 1 / |r|, of a layer."""
    a, b, c = SCHEMES[scheme](a, 1)
    lambdas = (z, 1) if scheme == 'symplectic' else (z,)                # attention and MLP in turn: two steps per layer
    layer = torch.eye(2, dtype=torch.complex128)
    for x in lambdas:
        layer = torch.tensor([[0, 1], [a, b + c * x]], dtype=torch.complex128) @ layer      # (p_prev, p) -> (p, p_next)
    r = torch.linalg.eigvals(layer).abs()
    return float(r.max()), float(1 / r.min()) if scheme != 'standard' else None             # it forgets p_prev

for scheme, a, axis, low, high in AXES:
    places = torch.linspace(low, high, knobs.points, dtype=torch.float64).round(decimals=6).add(0.0).tolist()
    forward, backward = zip(*(growth(scheme, a, complex(0, x) if axis == 'imaginary' else complex(x, 0)) for x in places))
    def stable(*directions):
        inside = [x for x, *rates in zip(places, *directions) if all(rate is not None and rate < 1 + 1e-6 for rate in rates)]
        return f'{inside[0]:g} to {inside[-1]:g}' if inside else 'nowhere'

    row(scheme + (f', a = {a}' if a else ''), **{'z is': axis, 'stable forward': stable(forward), 'stable backward': stable(backward),
        'stable in both': stable(forward, backward)}, z=places, up=list(forward), down=list(backward))

# -----------------------------------------------------------------------------
# trained models

@torch.no_grad()
def perturb(model, idx):
    """How the norm of a perturbation of (p_prev, p) grows from pair to pair: up from the embedding, and down from the last pair."""
    steps = [(f, model.coefficients[j]) for j, f, _ in model.steps()]
    x = model.transformer.wte(idx)
    if model.config.rope_theta is None:
        x = x + model.transformer.wpe(torch.arange(idx.size(1), device=here.device))
    torch.manual_seed(0)

    def noise(like):
        return 1e-6 * like.std() * torch.randn_like(like)

    def norms(pairs, others):
        return [float((torch.stack(one) - torch.stack(other)).norm()) for one, other in zip(pairs, others)]

    def up(x):
        pairs = [(x, x)]
        for f, coefficients in steps:
            p_prev, p = pairs[-1]
            pairs.append((p, advance(p_prev.clone(), p, f(p), coefficients)[0]))
        return pairs

    def down(p, p_next):
        pairs = [(p, p_next)]
        for f, coefficients in reversed(steps):
            p, p_next = pairs[-1]
            pairs.append((rebuild(p_next.clone(), p, f(p), None, coefficients), p))
        return pairs

    pairs = up(x)
    found = [norms(up(x + noise(x)), pairs)]
    if model.config.scheme != 'standard':
        last = pairs[-1]
        found.append(norms(down(last[0] + noise(last[0]), last[1] + noise(last[1])), down(*last)))
    return [[each / norms[0] for each in norms] for norms in found]

for path in tqdm([path for path in knobs.trained.split(',') if path], leave=False):
    try:
        model = build(path, exact=False)[0].to(here.device).double().eval()
    except ValueError as error:
        fail(str(error))
    T = model.config.block_size
    with open(os.path.join(ROOT, 'LICENSE'), 'rb') as file:
        text = torch.tensor(list(file.read()), device=here.device) % model.config.vocab_size
    idx = torch.stack([text.roll(-101 * i).repeat(T // len(text) + 1)[:T] for i in range(knobs.sequences)])
    upward, *downward = perturb(model, idx)
    row(model.config.scheme, **{'h': str(model.config.h), 'forward grows by': upward[-1],
                                'backward grows by': downward[0][-1] if downward else None},
        up=upward, down=downward[0] if downward else [], checkpoint=[path])
