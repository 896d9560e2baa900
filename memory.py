"""
What a training step takes, counted without running it: bytes and operations. stored_layers = 'auto' needs it.
"""
import os
import sys
import weakref
from bisect import bisect_right
from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from model import GPT
from runtime import adamw, count_parameters, local, say

class Count(TorchDispatchMode):
    """
    Follows every tensor's storage from birth to end, and adds up the operations of matrix products and
    attention, two per multiplication and addition. Not seen: what CUDA, kernels and allocators take.
    """
    DEVICE = 'weights', 'gradients', 'optimizer', 'activations'         # the kinds, without 'host'

    def __init__(self):
        super().__init__()
        self.alive = {}                     # the storages of now, by address: size and kind
        self.events = []                    # births (1, storage) and ends (-1, storage): a clock
        self.marks = []                     # (kind, time)
        self.work = 0                       # operations
        self.moved = 0                      # bytes, from the device to its host and back

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        op = func.overloadpacket
        if op in flop_registry:
            self.work += flop_registry[op](*args, **kwargs, out_val=result)
        elif 'flash_attention_for_cpu' in str(op):
            products = 5 if 'backward' in str(op) else 2        # of (T, hs) and (T, T) matrices, or as large
            B, nh, T, hs = args[0].shape    # of q, or of the output's gradient: k and v may have fewer heads
            self.work += products * 2 * B * nh * T * T * hs
        for x in map(local, tree_leaves(result)):
            if not isinstance(x, torch.Tensor) or x.device.type == 'meta':      # which takes no memory
                continue
            storage = x.untyped_storage()
            if storage._cdata not in self.alive:
                self.alive[storage._cdata] = SimpleNamespace(size=storage.nbytes(), kind='activations')
                self.events.append((1, self.alive[storage._cdata]))
                weakref.finalize(storage, self.end, storage._cdata).atexit = False
        return result

    def end(self, address):
        self.events.append((-1, self.alive.pop(address)))

    def mark(self, kind, tensors=()):
        """Says of which kind these tensors are, and records the time."""
        self.marks.append((kind, len(self.events)))
        for x in tensors:
            self.alive[x.untyped_storage()._cdata].kind = kind

    def move(self, kind, x):
        """A copy of this kind: on the 'host', whose memory is the same here, or back."""
        copy = x.clone()
        self.alive[copy.untyped_storage()._cdata].kind = kind
        self.moved += copy.nbytes
        return copy

    def curve(self, *kinds):
        """Live bytes at every time, from 0 on: of these kinds, or of all that are on the device."""
        changes = [sign * x.size * (x.kind in (kinds or self.DEVICE)) for sign, x in self.events]
        return np.cumsum([0, *changes])

    def at(self, time):
        """Live bytes on the device at this time, by kind."""
        return {kind: int(self.curve(kind)[time]) for kind in self.DEVICE}

def count_two_steps(build, B, T, dtype, fake=True, micro_batches=1):
    """The Count of two steps of AdamW on a CPU, of micro-batches (B, T) of tokens, with build()'s model."""
    with FakeTensorMode() if fake else torch.enable_grad(), Count() as count:       # fake: computes nothing
        model = build()
        count.mark('weights', model.parameters())
        for weight in model.parameters():   # one mark per gradient: a backward pass has as many phases
            weight.register_post_accumulate_grad_hook(lambda weight: count.mark('gradients', [weight.grad]))
        optimizer = adamw(model)
        idx = torch.zeros(B, T, dtype=torch.long)
        for _ in range(2):
            count.work = count.moved = 0
            for _ in range(micro_batches):
                with torch.autocast('cpu', getattr(torch, dtype), enabled=dtype != 'float32'):
                    loss = model(idx, idx)[1]
                count.mark('backward')
                loss.backward()
                loss = None
            optimizer.step()
            count.mark('optimizer', (x for state in optimizer.state.values() for x in state.values()))
            optimizer.zero_grad()
            count.mark('step')
    return count

def shard_curve(count, config, processes):
    """
    The curve of a Count, if the model were sharded (FSDP2): two blocks are gathered at a time, and the other
    weights and their gradients are whole. Checked against real counts: results/processes.md.
    """
    with torch.device('meta'):              # takes no memory
        model = GPT(config)
    blocks = 4 * count_parameters(model.transformer.h)
    others = 4 * count_parameters(model) - blocks
    split = 3 * (blocks + others)           # the weights, and AdamW's two moments
    split = split + (count.curve('gradients') - others).clip(0)
    return count.curve() - (1 - 1 / processes) * split + others + 2 * blocks / config.n_layer

def most_stored_layers(config, knobs, here):
    """How many layers can be stored at most, if a process may use memory_gb. Its steps are counted."""
    if knobs.memory_gb is None and here.kind != 'cuda':
        raise ValueError("stored_layers = 'auto' needs to know the memory of this machine: give it as "
                         '--memory_gb=16')
    # the other tenth is for CUDA itself, work spaces of kernels and gaps between tensors
    room = knobs.memory_gb or 0.9 * torch.cuda.get_device_properties(here.device).total_memory / 1e9
    say("stored_layers = 'auto': memory is counted for several numbers of layers, within a minute or two")
    micro_batches = min(2, knobs.gradient_accumulation_steps)   # the second finds gradients of the first
    dropout = config.dropout if here.kind == 'cpu' else 0.0     # on a GPU attention keeps no mask (T, T)

    @cache
    def needs(layers, B=knobs.batch_size):
        build = partial(GPT, replace(config, stored_layers=layers, dropout=dropout))
        count = count_two_steps(build, B, knobs.block_size, here.dtype, micro_batches=micro_batches)
        curve = shard_curve(count, config, here.mesh.size()) if here.mesh else count.curve()
        return curve.max() / 1e9

    if needs(0) > room:
        B = bisect_right(range(1, knobs.batch_size), room, key=lambda B: needs(0, B))
        advice = f'--batch_size={B} fits' if B else 'not even --batch_size=1 fits'
        raise ValueError(f'batch_size = {knobs.batch_size} needs {needs(0):.3g} GB even with no layer stored,'
                         f' and memory_gb is {room:.3g}: {advice}')
    most = bisect_right(range(1, config.n_layer + 1), room, key=needs)
    more = f', and {most + 1} would need {needs(most + 1):.3g}' if most < config.n_layer else ''
    say(f'stored_layers = {most} of {config.n_layer}: {needs(most):.3g} GB are counted, of {room:.3g}{more}')
    return most

def fitting(config, here):
    """ValueError if a CPU lacks the memory for such a model. A GPU says so itself."""
    with torch.device('meta'):              # takes no memory
        needed = 16 * count_parameters(GPT(config)) / 1e9
    if here.mesh:
        needed *= int(os.environ.get('LOCAL_WORLD_SIZE', 1)) / here.mesh.size()         # of this machine
    if here.kind == 'cpu' and hasattr(os, 'sysconf'):
        there = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1e9
        if needed > there:
            raise ValueError(f'weights, gradients and moments take {needed:,.0f} GB, and this machine has '
                             f'{there:.0f} GB: choose a smaller model')

def peak_memory(kind):
    """Peak memory in GB: allocated on a CUDA GPU, resident on a CPU. An Apple GPU tells only that of now."""
    if kind == 'cuda':
        return torch.cuda.max_memory_allocated() / 1e9
    if kind == 'mps':
        return torch.mps.driver_allocated_memory() / 1e9
    if sys.platform == 'win32':
        return float('nan')
    import resource                         # a module that Windows lacks
    unit = 1 if sys.platform == 'darwin' else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9
