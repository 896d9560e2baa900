"""
The errors of rebuilt states, and of gradients computed from them, layer by layer, with exact and with float states.

    python results/drift.py --json=results/drift_cpu.json               # every scheme, weights x1, x4 and x8, three dtypes
    python results/drift.py --trained=out_python/best.pt --schemes=leapfrog         # and weights that were trained
    python results/drift.py --compile=True --n_layer=12 --n_head=12 --n_embd=768 --vocab_size=50304 --block_size=1024

Each row compares gradients of stored and of rebuilt states of one model on the same tokens, relative, by the norm; control
compares two runs with stored states. Kernels are deterministic, so that 0 means that the bits are equal. cuDNN's attention, which
a Hopper GPU takes by default, is not: --deterministic=False leaves it in, and compares the rebuilt states alone.
"""
import os
os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')             # what deterministic kernels need

import signal
import sys
from dataclasses import dataclass

import torch
from tqdm import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.append(ROOT)
import model as model_py
from configurator import configure
from model import GPT, GPTConfig
from pretrained import build as load
from runtime import compile_parts, fail, open_table, provenance, recorded_states, start

@dataclass
class Knobs:
    schemes: str = 'midpoint,leapfrog,symplectic,midpoint_a,midpoint_sum'
    trained: str = ''               # checkpoints, such as out/best.pt,out2/best.pt, as further weights
    batch_size: int = 8             # sequences
    block_size: int = 256
    n_layer: int = 12
    n_head: int = 4
    n_embd: int = 256
    vocab_size: int = 256
    compile: bool = False
    deterministic: bool = True      # False: the kernels that training takes; states alone are compared
    json: str | None = None         # a file for the rows
    device: str = 'auto'            # 'cuda', 'cpu'

knobs = configure(Knobs, sys.argv[1:])
knobs.dtype = 'float32'             # of start(); the rows go through three
here = start(knobs)

def build(scheme, stored, exact):
    torch.manual_seed(0)
    try:
        with torch.device(here.device):
            model = GPT(GPTConfig(scheme=scheme, a=0.5 if scheme == 'midpoint_a' else None, exact=exact,
                                  stored_layers=stored * knobs.n_layer, **{key: getattr(knobs, key) for key in (
                                      'block_size', 'n_layer', 'n_head', 'n_embd', 'vocab_size')}))
    except ValueError as error:
        fail(str(error))
    return model

def tokens(model):
    """(B, T) inputs and targets: the bytes of LICENSE."""
    B, T = knobs.batch_size, min(knobs.block_size, model.config.block_size)
    with open(os.path.join(ROOT, 'LICENSE'), 'rb') as file:
        text = torch.tensor(list(file.read())) % model.config.vocab_size
    x = torch.stack([text[(997 * i + torch.arange(T + 1)) % len(text)] for i in range(B)]).to(here.device)
    return x[:, :-1].contiguous(), x[:, 1:].contiguous()

def gradients_and_states(model, x, y, dtype):
    """Gradients layer by layer, then of all else; p_prev of every step, from bottom to top; and the same as rebuilt."""
    torch.manual_seed(0)                        # of dropout, in trained models
    with recorded_states(model_py.ReversibleStep) as (forward_states, rebuilt):
        with torch.autocast(here.kind, getattr(torch, dtype), enabled=dtype != 'float32'):
            loss = model(x, y)[1]
        loss.backward()
    blocks = [list(block.parameters()) for block in model.transformer.h]
    inside = {weight for block in blocks for weight in block}
    rest = [weight for weight in model.parameters() if weight not in inside]
    return [torch.cat([weight.grad.flatten() for weight in group]) for group in (*blocks, rest)], forward_states, rebuilt[::-1]

def errors(got, want):
    """Relative, by the norm, layer by layer."""
    return [float((a - b).double().norm() / b.double().norm()) for a, b in zip(got, want)]

def worst(found):
    return float(torch.tensor(found).max()) if found else None          # nan, if there is one

def drift():
    torch.use_deterministic_algorithms(knobs.deterministic)
    trained = [path for path in knobs.trained.split(',') if path]
    wanted = [(None, path) for path in trained] + [
        (scheme, factor) for scheme in knobs.schemes.split(',') if scheme for factor in (1, 4, 8)]
    for scheme, weights in tqdm(wanted, leave=False):
        for dtype in ('float32', 'bfloat16', 'float16'):
            for exact in (True, False):
                results = []
                for stored in (1, 1, 0):
                    if scheme:
                        model = build(scheme, stored, exact)
                        with torch.no_grad():
                            for weight in model.transformer.h.parameters():
                                weight.mul_(weights if weight.dim() == 2 else 1)
                    else:
                        try:
                            model = load(weights, exact=exact, stored_layers=0)[0].to(here.device)
                        except ValueError as error:
                            fail(str(error))
                    if model.config.scheme == 'standard':
                        fail(f'{weights if not scheme else scheme} is a standard model, which rebuilds nothing: leave it out')
                    model.config.stored_layers = stored * model.config.n_layer
                    if knobs.compile:
                        compile_parts(model)
                    results.append(gradients_and_states(model, *tokens(model), dtype))
                stored, again, rebuilt = results
                states = errors(rebuilt[2], rebuilt[1])
                grads, control = (errors(found[0], stored[0]) if knobs.deterministic else [] for found in (rebuilt, again))
                row(scheme or model.config.scheme, weights=f'x{weights}' if scheme else 'trained', dtype=dtype,
                    states='exact' if exact else 'float', control=worst(control),
                    **{'embedding, rebuilt': states[0], 'worst state': worst(states), 'worst gradient': worst(grads)},
                    state_errors=states, gradient_errors=grads[:-1], checkpoint=[weights] if not scheme else [])

row = open_table(knobs.json, provenance(here, knobs))
signal.signal(signal.SIGINT, signal.default_int_handler)        # a shell may have a job in the background ignore Ctrl-C
try:
    drift()
except KeyboardInterrupt:
    sys.exit('interrupted: the rows above are all there is')
