"""
How reversible engines behave in situations that can break a training run: ours, and revlib's if that package is there, on the same
blocks with the same weights. Each is compared with itself, with all its graphs stored.

    pip install revlib && python results/peers.py --json=results/peers.json
"""
import importlib.util
import os
import sys
import tempfile
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))        # the root of the repository
from configurator import configure
from model import GPT, GPTConfig
from runtime import open_table, provenance, start

B, T, V = 4, 64, 65
SHAPE = dict(block_size=T, vocab_size=V, n_layer=12, n_head=4, n_embd=64, tied=False)
idx = torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(1))

def ours(scheme, stored, **change):
    model = GPT(GPTConfig(**SHAPE, scheme=scheme, stored_layers=SHAPE['n_layer'] * stored, **change))
    return model, lambda: model(idx[:, :-1], idx[:, 1:])[1], model.transformer.h

def revlib(stored, **change):
    import revlib
    model = GPT(GPTConfig(**SHAPE, scheme='standard', **change))
    mode = revlib.MemoryModes.no_savings if stored else revlib.MemoryModes.autograd_function
    stack = revlib.ReversibleSequential(*model.transformer.h, split_dim=-1, memory_mode=mode)
    model.integrate = lambda x, cache=None: stack(torch.cat((x, x), dim=-1)).chunk(2, dim=-1)[1]        # midpoint, h = 1/2
    return model, lambda: model(idx[:, :-1], idx[:, 1:])[1], model.transformer.h

def build(make, stored=False, amplify=1, **change):
    torch.manual_seed(0)
    model, loss, blocks = make(stored, **change)
    with torch.no_grad():
        for weight in blocks.parameters():
            if weight.dim() == 2:
                weight.mul_(amplify)
    return model, loss, blocks

def gradients(built, autocast=False):
    model, loss, _ = built
    torch.manual_seed(2)
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        value = loss()
    value.backward()
    return torch.cat([torch.zeros(w.numel()) if w.grad is None else w.grad.flatten() for w in model.parameters()])

def error(make, autocast=False, **change):
    """|rebuilt - stored| / |stored|, of the gradient of all weights."""
    stored, rebuilt = (gradients(build(make, stored, **change), autocast) for stored in (True, False))
    return float((rebuilt - stored).norm() / stored.norm())

def outcome(attempt):
    """What a user sees: the first words of an error, or what the attempt returns."""
    try:
        return attempt()
    except Exception as error:              # of any kind: only whether it fails matters
        return 'stops: ' + str(error).split('\n')[0][:60]

def frozen(make):
    """Whether the blocks learn where the embedding is frozen."""
    model, loss, blocks = build(make)
    for name, weight in model.named_parameters():
        weight.requires_grad_('wte' not in name and 'wpe' not in name)
    loss().backward()
    return 'gradients' if all(w.grad is not None for w in blocks.parameters()) else 'blocks get no gradient, silently'

def changed(make):
    """Weights change between forward and backward, as by a careless update."""
    _, loss, blocks = build(make)
    value = loss()
    with torch.no_grad():
        next(iter(blocks[3].parameters())).mul_(1.5)
    value.backward()
    return 'wrong gradients, silently'

def overflow(make):
    """One block's output is infinite."""
    _, loss, blocks = build(make)
    with torch.no_grad():
        for weight in blocks[3].parameters():
            weight.mul_(1e30)
    value = loss()
    return 'finite loss, silently' if value.isfinite() else f'loss {value.item()}'

def autograd_grad(make):
    """torch.autograd.grad() for the weights of blocks."""
    _, loss, blocks = build(make)
    return 'gradients' if all(g is not None for g in torch.autograd.grad(loss(), list(blocks.parameters()))) else 'None'

def parallel(make):
    """DistributedDataParallel of one process: does it see every weight's gradient, and in time?"""
    want = gradients(build(make))
    model, loss, blocks = build(make)
    wrapped = DistributedDataParallel(torch.nn.ModuleDict(dict(model=model)))
    wrapped.module.forward = lambda: loss()
    return 'gradients' if torch.equal(gradients((wrapped, wrapped, blocks)), want) else 'other gradients'

def table(engines, row):
    for name, make in engines.items():
        row(name, **{
            'error': error(make), 'error x8 bf16': error(make, amplify=8, autocast=True),
            'error x8 dropout': outcome(lambda: error(make, amplify=8, dropout=0.1)),
            'frozen embedding': outcome(lambda: frozen(make)), 'changed weights': outcome(lambda: changed(make)),
            'overflow': outcome(lambda: overflow(make)), 'autograd.grad': outcome(lambda: autograd_grad(make)),
            'DDP': outcome(lambda: parallel(make))})

@dataclass
class Knobs:
    json: str | None = None         # a file for the rows
    device: str = 'cpu'
    dtype: str = 'float32'

if __name__ == '__main__':
    knobs = configure(Knobs, sys.argv[1:])
    here = start(knobs)
    dist.init_process_group('gloo', init_method=f'file://{tempfile.mkdtemp()}/meeting', rank=0, world_size=1)
    engines = {scheme: lambda stored, scheme=scheme, **change: ours(scheme, stored, **change)
               for scheme in ('midpoint', 'leapfrog', 'symplectic', 'midpoint_a', 'midpoint_sum')}
    if importlib.util.find_spec('revlib'):
        engines['revlib'] = revlib
    table(engines, open_table(knobs.json, provenance(here, knobs)))
    dist.destroy_process_group()
