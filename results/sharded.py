"""
How much memory weights, gradients and moments take in each of N processes, with --zero=True and without,
counted at true sizes.

    python results/sharded.py --json=results/sharded.json

Two steps of the optimizer on fake tensors, among N processes that do not exist (torch's "fake" process
group). A weight is never cut, so shares differ: the largest is what a card must hold.
"""
import os
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import runtime
from configurator import configure
from memory import Count
from model import GPT, GPTConfig
from results.table import open_table, provenance
from runtime import adamw, count_parameters, start

LLAMA = dict(bias=False, norm='rmsnorm', mlp='swiglu')
SHAPES = {
    'GPT-2 XL': dict(n_layer=48, n_head=25, n_embd=1600, vocab_size=50257),
    'TinyLlama 1.1B': dict(LLAMA, n_layer=22, n_head=32, n_kv_head=4, n_embd=2048, n_inner=5632,
                           vocab_size=32000, rope_theta=1e4, tied=False),
    'SmolLM2-1.7B': dict(LLAMA, n_layer=24, n_head=32, n_embd=2048, n_inner=8192, vocab_size=49152,
                         rope_theta=1.3e5),
}

@dataclass
class Knobs:
    json: str | None = None                 # a file for the rows
    device: str = 'cpu'
    dtype: str = 'float32'

def bytes_of(shape, rank, processes):
    """(bytes by kind when the optimizer has made two steps, parameters) in one of the processes."""
    zero = processes > 1
    runtime.world = processes               # for adamw()
    dist.init_process_group('fake', store=FakeStore(), rank=rank, world_size=processes)
    with FakeTensorMode(), Count() as count:
        model = GPT(GPTConfig(**shape))
        weights = list(model.parameters())
        count.mark('weights', weights)
        optimizer = adamw(model, zero=zero)
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        count.mark('gradients', [weight.grad for weight in weights])
        for _ in range(2):
            optimizer.step()
        own = optimizer.optim if zero else optimizer            # what is in this process
        count.mark('optimizer', (x for state in own.state.values() for x in state.values()))
        kinds = count.at(-1)
    dist.destroy_process_group()
    runtime.world = 1
    return kinds, count_parameters(model)

if __name__ == '__main__':
    knobs = configure(Knobs, sys.argv[1:])
    row = open_table(knobs.json, provenance(start(knobs), knobs))
    for name, shape in SHAPES.items():
        for processes in (1, 2, 4, 8):
            shares = [bytes_of(shape, rank, processes) for rank in range(processes)]
            kinds, parameters = max(shares, key=lambda share: share[0]['optimizer'])
            total = sum(kinds.values())
            each = {f'{kind} GB': kinds[kind] / 1e9 for kind in ('weights', 'gradients', 'optimizer')}
            row(name, processes=processes, parameters=parameters, **each,
                **{'GB': total / 1e9, 'bytes per parameter': total / parameters})
