"""
The errors of rebuilt states, and of gradients computed from them, by layer, with exact and with float states.

    python results/drift.py --json=results/drift_cpu.json       # every scheme, weights x1, x4, x8
    python results/drift.py --trained=out_python_rev/best.pt --schemes=leapfrog     # and trained weights
    python results/drift.py --compile=True --n_layer=12 --n_head=12 --n_embd=768 --vocab_size=50304

Each row compares gradients of stored and of rebuilt states of one model on the same tokens, relative, by the
norm; control compares two runs with stored states. Kernels are deterministic, so that 0 means that the bits
are equal. cuDNN's attention, which a Hopper GPU takes by default, is not: --deterministic=False leaves it in,
and compares the rebuilt states alone.
"""
import os
os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')             # what deterministic kernels need

import sys
from dataclasses import dataclass
from functools import partial

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.append(ROOT)
from configurator import configure
from model import GPT, GPTConfig, Tape, n_slices
from pretrained import from_pretrained
from results.table import open_table, provenance
from runtime import start

@dataclass
class Knobs:
    schemes: str = 'midpoint,leapfrog,symplectic,midpoint_a,midpoint_sum'
    dtypes: str = 'float32,bfloat16,float16'    # of autocast
    trained: str = ''               # checkpoints of reversible models, such as out/best.pt,out2/best.pt
    batch_size: int = 8             # sequences
    block_size: int = 256
    n_layer: int = 12
    n_head: int = 4
    n_embd: int = 256
    vocab_size: int = 256
    compile: bool = False
    deterministic: bool = True      # False: the kernels that training takes; states alone are compared
    json: str | None = None         # a file for the rows
    device: str = 'auto'
    dtype: str = 'float32'          # of the weights

knobs = configure(Knobs, sys.argv[1:])
here = start(knobs)
torch.use_deterministic_algorithms(knobs.deterministic)

def build(scheme, factor, exact):
    """A model from a seed, its matrices times a factor."""
    sizes = {name: getattr(knobs, name) for name in 'block_size n_layer n_head n_embd vocab_size'.split()}
    a = 0.5 if scheme == 'midpoint_a' else None
    torch.manual_seed(0)
    with torch.device(here.device):
        model = GPT(GPTConfig(scheme=scheme, a=a, exact=exact, **sizes))
    with torch.no_grad():
        for weight in model.transformer.h.parameters():
            if weight.dim() == 2:
                weight.mul_(factor)
    return model

def tokens(model):
    """(B, T) inputs and targets: the bytes of LICENSE."""
    T = min(knobs.block_size, model.config.block_size)
    with open(os.path.join(ROOT, 'LICENSE'), 'rb') as file:
        text = torch.tensor(list(file.read())) % model.config.vocab_size
    places = 997 * torch.arange(knobs.batch_size)[:, None] + torch.arange(T + 1)
    x = text[places % len(text)].to(here.device)                        # (B, T + 1)
    return x[:, :-1].contiguous(), x[:, 1:].contiguous()

def gradients_and_states(model, dtype):
    """
    Gradients by layer, then of all else; p of every step, from the bottom to the top; and the same as
    rebuilt. Every step calls Tape.evaluate(f, p) for each slice on its way up, and again on its way down if
    it stores no graph.
    """
    found = []
    evaluate = Tape.evaluate

    def recording(tape, f, p):
        found.append(p.clone())
        return evaluate(tape, f, p)

    x, y = tokens(model)
    torch.manual_seed(0)                        # of dropout, in trained models
    Tape.evaluate = recording
    try:
        with torch.autocast(here.kind, getattr(torch, dtype), enabled=dtype != 'float32'):
            loss = model(x, y)[1]
        n = len(found)
        loss.backward()
    finally:
        Tape.evaluate = evaluate
    blocks = [list(block.parameters()) for block in model.transformer.h]
    inside = {weight for block in blocks for weight in block}
    rest = [weight for weight in model.parameters() if weight not in inside]
    grads = [torch.cat([weight.grad.flatten() for weight in group]) for group in (*blocks, rest)]
    slices = n_slices(*x.shape, model.config.slice_tokens)
    states = [torch.cat(found[i:i + slices]) for i in range(0, len(found), slices)]
    n = n // slices                             # steps on the way up
    return grads, states[:n], states[n:][::-1]

def errors(got, want):
    """Relative, by the norm, layer by layer."""
    return [float((a - b).double().norm() / b.double().norm()) for a, b in zip(got, want)]

def worst(found):
    return float(torch.tensor(found).max()) if found else None          # nan, if there is one

def drift(weights, load, checkpoint=()):
    """Rows of the model that load(exact) makes, for all dtypes, and for exact and for float states."""
    for dtype in knobs.dtypes.split(','):
        for exact in (True, False):
            results = []
            for stored in (True, True, False):
                model = load(exact)
                if model.config.scheme == 'standard':
                    raise ValueError('a standard model rebuilds nothing: leave it out')
                model.config.stored_layers = model.config.n_layer if stored else 0
                if knobs.compile:
                    model.compile_parts()
                results.append(gradients_and_states(model, dtype))
            stored, again, rebuilt = results
            states = errors(rebuilt[2], rebuilt[1])
            grads = control = []
            if knobs.deterministic:
                grads = errors(rebuilt[0], stored[0])
                control = errors(again[0], stored[0])
            row(model.config.scheme, weights=weights, dtype=dtype, states='exact' if exact else 'float',
                **{'control': worst(control), 'embedding, rebuilt': states[0], 'worst state': worst(states),
                   'worst gradient': worst(grads)},
                state_errors=states, gradient_errors=grads[:-1], checkpoint=list(checkpoint))

def trained(path, exact):
    return from_pretrained(path, exact=exact).to(here.device)

row = open_table(knobs.json, provenance(here, knobs))
for path in filter(None, knobs.trained.split(',')):
    drift('trained', partial(trained, path), [path])
for scheme in filter(None, knobs.schemes.split(',')):
    for factor in (1, 4, 8):
        drift(f'x{factor}', partial(build, scheme, factor))
