"""
How reversible engines behave in situations that can break a training run: ours, and revlib's if that package
is there, on the same blocks with the same weights. Each is compared with itself, with all its graphs stored.

    pip install revlib && python results/peers.py --json=results/peers.json
"""
import os
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from configurator import configure
from model import GPT, GPTConfig
from results.table import open_table, provenance
from runtime import start

B = 4
T = 64
V = 65
SHAPE = dict(block_size=T, vocab_size=V, n_layer=12, n_head=4, n_embd=64, tied=False)
idx = torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(1))

def ours(scheme, stored, **change):
    return GPT(GPTConfig(**SHAPE, scheme=scheme, stored_layers=SHAPE['n_layer'] * stored, **change))

def revlib(stored, **change):
    import revlib                           # an optional package: midpoint, h = 1/2
    model = GPT(GPTConfig(**SHAPE, scheme='standard', **change))
    mode = revlib.MemoryModes.no_savings if stored else revlib.MemoryModes.autograd_function
    stack = revlib.ReversibleSequential(*model.transformer.h, split_dim=-1, memory_mode=mode)
    model.integrate = lambda x, cache: stack(torch.cat((x, x), dim=-1)).chunk(2, dim=-1)[1]
    return model

def loss_of(model):
    return model(idx[:, :-1], idx[:, 1:])[1]

def build(make, stored=False, amplify=1, **change):
    torch.manual_seed(0)
    model = make(stored, **change)
    with torch.no_grad():
        for weight in model.transformer.h.parameters():
            if weight.dim() == 2:
                weight.mul_(amplify)
    return model

def gradients(model, autocast=False):
    torch.manual_seed(2)
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        loss = loss_of(model)
    loss.backward()
    return torch.cat([torch.zeros_like(w).flatten() if w.grad is None else w.grad.flatten()
                      for w in model.parameters()])

def error(make, autocast=False, **change):
    """|rebuilt - stored| / |stored|, of the gradient of all weights."""
    stored, rebuilt = (gradients(build(make, stored, **change), autocast) for stored in (True, False))
    return float((rebuilt - stored).norm() / stored.norm())

# -----------------------------------------------------------------------------
# situations: each returns what a user would see

def outcome(situation, make, **change):
    """What it returns, or the first words of its error: of any kind, as only whether it fails matters."""
    try:
        return situation(make, **change)
    except Exception as error:
        return 'stops: ' + str(error).split('\n')[0][:60]

def frozen(make):
    """Whether the blocks learn where the embedding is frozen."""
    model = build(make)
    for name, weight in model.named_parameters():
        weight.requires_grad_('wte' not in name and 'wpe' not in name)
    loss_of(model).backward()
    learnt = all(w.grad is not None for w in model.transformer.h.parameters())
    return 'gradients' if learnt else 'blocks get no gradient, silently'

def changed(make):
    """Weights change between forward and backward, as by a careless update."""
    model = build(make)
    loss = loss_of(model)
    with torch.no_grad():
        next(model.transformer.h[3].parameters()).mul_(1.5)
    loss.backward()
    return 'wrong gradients, silently'

def overflow(make):
    """One block's output is infinite."""
    model = build(make)
    with torch.no_grad():
        for weight in model.transformer.h[3].parameters():
            weight.mul_(1e30)
    loss = loss_of(model)
    return 'finite loss, silently' if loss.isfinite() else f'loss {loss.item()}'

def autograd_grad(make):
    """torch.autograd.grad() for the weights of blocks."""
    model = build(make)
    found = torch.autograd.grad(loss_of(model), list(model.transformer.h.parameters()))
    return 'gradients' if all(g is not None for g in found) else 'None'

def parallel(make):
    """DistributedDataParallel of one process: does it see every weight's gradient, and in time?"""
    want = gradients(build(make))
    same = torch.equal(gradients(DistributedDataParallel(build(make))), want)
    return 'gradients' if same else 'other gradients'

def table(engines, row):
    for name, make in engines.items():
        row(name, **{
            'error': error(make), 'error x8 bf16': error(make, amplify=8, autocast=True),
            'error x8 dropout': outcome(error, make, amplify=8, dropout=0.1),
            'frozen embedding': outcome(frozen, make), 'changed weights': outcome(changed, make),
            'overflow': outcome(overflow, make), 'autograd.grad': outcome(autograd_grad, make),
            'DDP': outcome(parallel, make)})

@dataclass
class Knobs:
    json: str | None = None         # a file for the rows
    device: str = 'cpu'
    dtype: str = 'float32'

if __name__ == '__main__':
    knobs = configure(Knobs, sys.argv[1:])
    here = start(knobs)
    meeting = f'file://{tempfile.mkdtemp()}/meeting'
    dist.init_process_group('gloo', init_method=meeting, rank=0, world_size=1)
    schemes = 'midpoint', 'leapfrog', 'symplectic', 'midpoint_a', 'midpoint_sum'
    engines = {scheme: partial(ours, scheme) for scheme in schemes}
    if find_spec('revlib'):
        engines['revlib'] = revlib
    table(engines, open_table(knobs.json, provenance(here, knobs)))
    dist.destroy_process_group()
