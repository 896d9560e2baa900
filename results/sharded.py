"""
What --shard=True (FSDP2) saves and costs. Alone it counts the memory of each of N processes at true sizes, on
fake tensors and among processes that do not exist (torch's "fake" process group):

    python results/sharded.py --json=results/sharded.json

Under torchrun it measures steps: bytes that a process sends, and time, beside DistributedDataParallel. The
bytes are those of the loopback device, so nothing else may use it:

    export OMP_NUM_THREADS=1
    torchrun --standalone --nproc_per_node=2 results/sharded.py --json=results/sharded_step.json

With --processes it measures the memory of one of N, on one card: NCCL wants a card for each process.

    python results/sharded.py --processes=8 --shape="Llama-2 7B" --batch_size=16 --device=cuda
"""
import os
import statistics
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.testing._internal.distributed.fake_pg import FakeStore

sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import runtime
from configurator import configure
from memory import Count, count_two_steps, peak_memory, shard_curve
from model import GPT, GPTConfig
from pretrained import empty
from results.rivals import checkpoint_in_slices
from results.table import open_table, provenance, spread
from runtime import adamw, clip, count_parameters, distributed, fill, leave, local, start, world

LLAMA = dict(bias=False, norm='rmsnorm', mlp='swiglu', block_size=2048, scheme='midpoint_a', a=-1 / 16)
SHAPES = {
    'GPT-2 XL': dict(n_layer=48, n_head=25, n_embd=1600, vocab_size=50304),
    'TinyLlama 1.1B': dict(LLAMA, n_layer=22, n_head=32, n_kv_head=4, n_embd=2048, n_inner=5632,
                           vocab_size=32000, rope_theta=1e4, tied=False),
    'SmolLM2-1.7B': dict(LLAMA, n_layer=24, n_head=32, n_embd=2048, n_inner=8192, vocab_size=49152,
                         rope_theta=1.3e5),
    'Llama-2 7B': dict(LLAMA, n_layer=32, n_head=32, n_embd=4096, n_inner=11008, vocab_size=32000,
                       rope_theta=1e4, tied=False),
}
PROCESSES = 1, 2, 4, 8
BUDGETS = 24, 80

@dataclass
class Knobs:
    json: str | None = None                 # a file for the rows
    device: str = 'cpu'
    dtype: str = 'bfloat16'
    repeats: int = 15                       # timed turns
    processes: int = 0                      # one of so many is measured; the others do not exist
    shape: str = ''                         # its shape, a key of SHAPES, in place of n_layer and n_embd
    n_layer: int = 12                       # of the measured model
    n_embd: int = 256
    batch_size: int = 8                     # sequences in each process, of 256 tokens without a shape

# -----------------------------------------------------------------------------
# one of N processes, of which the others do not exist

@contextmanager
def one_of(processes, rank, kind):
    """What a process of this rank computes with. Nothing arrives from the others."""
    runtime.world = processes
    runtime.rank = rank
    dist.init_process_group('fake', store=FakeStore(), rank=rank, world_size=processes)
    yield SimpleNamespace(kind=kind, device=torch.device(kind), dtype='bfloat16',
                          mesh=dist.init_device_mesh(kind, (processes,)))
    dist.destroy_process_group()
    runtime.world = 1
    runtime.rank = 0

def two_steps(shape, B, T, here, mark=lambda kind: None):
    model = empty(GPTConfig(**shape), here)
    optimizer = adamw(model)
    idx = torch.zeros(B, T, dtype=torch.long, device=here.device)
    for _ in range(2):
        with torch.autocast(here.kind, torch.bfloat16):
            loss = model(idx, idx)[1]
        loss.backward()
        loss = None
        mark('rest')
        optimizer.step()
        optimizer.zero_grad()

def one_alone(here):
    """Its peak of memory. The weights that it gathers are not set, so its loss means nothing."""
    shape = dict(n_layer=knobs.n_layer, n_embd=knobs.n_embd, n_head=4, vocab_size=256, block_size=256)
    if knobs.shape:
        shape = SHAPES[knobs.shape]
    with one_of(knobs.processes, 0, here.kind) as its:
        two_steps(dict(shape, slice_tokens=SLICE), knobs.batch_size, shape.get('block_size', 1024), its)
    row(knobs.shape or 'GPT', processes=knobs.processes, sequences=knobs.batch_size,
        **{'GB at the peak': peak_memory(here.kind)})

# -----------------------------------------------------------------------------
# counted

def sharded_steps(shape, processes, B, T, rank=0):
    """The Count of two steps of AdamW in one of N processes."""
    def resizing(resize, x):
        """FSDP2 frees and allocates storages in place, which no operation shows."""
        storage = x.untyped_storage()
        before = storage.nbytes()
        resize(x)
        if storage.nbytes() != before and storage._cdata in count.alive:
            old = count.alive[storage._cdata]
            new = SimpleNamespace(size=storage.nbytes(), kind=old.kind)
            count.events += (-1, old), (1, new)
            count.alive[storage._cdata] = new

    with one_of(processes, rank, 'cpu') as here, \
            patch.object(_fsdp_param, 'alloc_storage', partial(resizing, _fsdp_param.alloc_storage)), \
            patch.object(_fsdp_param, 'free_storage', partial(resizing, _fsdp_param.free_storage)), \
            FakeTensorMode(), Count() as count:
        two_steps(shape, B, T, here, count.mark)
    return count

SLICE = 2048                                # tokens, for the batches: one sequence of Llama

def plain_steps(shape, stream, B, T):
    """The Count of two steps in one process: ours, or checkpointing with a residual stream in bfloat16."""
    def build():
        if not stream:
            return GPT(GPTConfig(**shape, slice_tokens=SLICE))
        config = GPTConfig(**dict(shape, scheme='standard', a=None, stored_layers=0, slice_tokens=10**9))
        model = GPT(config)
        model.integrate = partial(checkpoint_in_slices, model, SLICE, torch.bfloat16, False)
        return model
    return count_two_steps(build, B, T, 'bfloat16')

def largest_batches(shape, stream, processes):
    """
    How many sequences fit into each budget, per process, and the GB of 16 of them, the batch of
    config/finetune_llama.py. Bytes are linear in sequences, phase by phase.
    """
    few = 4 * max(1, SLICE // shape['block_size'])
    counts = [plain_steps(shape, stream, B, shape['block_size']) for B in (few, 2 * few)]
    curves = [shard_curve(count, GPTConfig(**shape), processes) for count in counts]
    one, two = (np.maximum.reduceat(curve, [0, *(time for _, time in count.marks)])
                for curve, count in zip(curves, counts))
    fixed = 2 * one - two
    each = (two - one) / few
    growing = each > 0
    batches = [max(0, int(((1e9 * budget - fixed)[growing] // each[growing]).min())) for budget in BUDGETS]
    return batches, (fixed + 16 * each).max() / 1e9

def count():
    for name, shape in SHAPES.items():
        with torch.device('meta'):
            model = GPT(GPTConfig(**shape))
        parameters = count_parameters(model)
        others = count_parameters(model.transformer.h[1:])      # blocks that are not gathered with the first
        for processes in PROCESSES:
            if processes == 1:
                row(name, processes=1, parameters=parameters, **{'GB at rest': 16 * parameters / 1e9})
                continue
            count = sharded_steps(shape, processes, 1, 8)       # of the first process, which has most rows
            rest = count.curve()[count.marks[-1][1]]
            row(name, processes=processes, parameters=parameters, **{
                'GB at rest': rest / 1e9, 'GB with a block': (rest + 4 * (parameters - others)) / 1e9,
                'GB at the peak': count.curve().max() / 1e9})
    shape = SHAPES['Llama-2 7B']
    for case, stream in (('midpoint_a, 4 bits', False), ('checkpointed/bf16', True)):
        found, gigabytes = largest_batches(shape, stream, 8)
        row(case, processes=8, **{f'sequences in {budget} GB': n for budget, n in zip(BUDGETS, found)},
            **{'GB of 16 sequences': gigabytes})

# -----------------------------------------------------------------------------
# measured

def sent():
    """Bytes that all processes of this machine have sent one another so far."""
    with open('/proc/net/dev') as file:
        return next(int(line.split()[9]) for line in file if line.strip().startswith('lo:'))

def measure(here):
    """Steps of DDP, and sharded, with weights that travel in float32 and in bfloat16; they take turns."""
    config = GPTConfig(n_layer=knobs.n_layer, n_embd=knobs.n_embd, n_head=4, vocab_size=256, block_size=256)
    runs = {}
    for name, shard, dtype in (('DDP', False, 'float32'), ('shard', True, 'float32'),
                               ('shard, bfloat16', True, 'bfloat16')):
        its = SimpleNamespace(**{**vars(here), 'dtype': dtype, 'mesh': here.mesh if shard else None})
        torch.manual_seed(0)
        model = empty(config, its)
        for key, weight in model.named_parameters():
            fill(weight, model.initialize(key, torch.empty(weight.shape)))
        runs[name] = model, distributed(model, its), adamw(model), its
    traffic = {name: [] for name in runs}
    seconds = {name: [] for name in runs}
    x = torch.randint(256, (knobs.batch_size, 256))
    for turn in range(1 + knobs.repeats):
        for name, (model, parallel, optimizer, its) in list(runs.items())[::1 if turn % 2 else -1]:
            dist.barrier()
            before = sent()
            began = time.perf_counter()
            with here.autocast:
                loss = parallel(x, x)[1]
            loss.backward()
            clip(model, 1.0, its)
            optimizer.step()
            optimizer.zero_grad()
            dist.barrier()
            if turn:                        # the first one also compares shapes, and so on
                seconds[name].append(time.perf_counter() - began)
                traffic[name].append((sent() - before) / world)
    for name, (model, *_) in runs.items():
        ratios = [x / y for x, y in zip(seconds[name], seconds['DDP'])]
        row(name, parameters=count_parameters(model),
            **{'bytes sent per weight': statistics.median(traffic[name]) / count_parameters(model)},
            **spread(['time to DDP', 'lower quartile', 'upper quartile'], ratios, 0.25))

if __name__ == '__main__':
    knobs = configure(Knobs, sys.argv[1:])
    here = start(SimpleNamespace(**vars(knobs), shard=world > 1))
    row = open_table(knobs.json, provenance(here, knobs))
    if knobs.processes:
        one_alone(here)
    elif world == 1:
        count()
    else:
        measure(here)
        leave()
