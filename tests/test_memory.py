"""
What lives between forward and backward, and what a pass takes:  python -m pytest tests/test_memory.py

Nothing grows with depth, except k bits per element where a = n / 2^k, and the gradients of weights.
"""
import gc
import os
import subprocess
import sys

import pytest
import torch

import model as model_py
from test_reversible import LEAPFROG, MIDPOINT, SCHEMES, SYMPLECTIC, B, T, batch, build

LLAMA = SCHEMES[7]

class Saved:
    """Stands in for a saved tensor in autograd's graph, so that one can count those that are still held."""

    def __init__(self, tensor):
        self.tensor = tensor.detach()           # otherwise it would hold the graph that holds this

def alive(scheme, n_layer):
    """Bytes that are alive after forward: int32 states, packed bits, RNG states, and all else but weights."""
    model = build(n_layer=n_layer, dropout=0.1, **scheme)
    gc.collect()
    kinds = torch.Tensor, torch.nn.Parameter
    known = {x.untyped_storage().data_ptr() for x in gc.get_objects() if type(x) in kinds}
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        loss = model(*batch())[1]
    objects = gc.get_objects()
    found = [x for x in objects if type(x) is torch.Tensor] + [x.tensor for x in objects if type(x) is Saved]
    sizes = dict(states=0, bits=0, rng=0, others=0)
    for storage, x in {x.untyped_storage().data_ptr(): x for x in found}.items():
        if storage not in known:
            kind = 'others'
            if x.dtype == torch.int32 and x.shape == (B, T, 32):
                kind = 'states'
            elif x.dtype == torch.uint8:
                kind = 'rng' if x.nbytes == torch.get_rng_state().nbytes else 'bits'
            sizes[kind] += x.nbytes
    loss.backward()
    return sizes

@pytest.mark.parametrize('scheme, k', [(MIDPOINT, 0), (LEAPFROG, 0), (SYMPLECTIC, 0), (SCHEMES[6], 0),
                                       (dict(LLAMA, h=1.5), 1),
                                       *[(dict(scheme='midpoint_a', a=1 / 2**k), k) for k in (1, 2, 4, 8)]])
def test_only_the_two_states_and_the_bits_live_until_backward(scheme, k):
    few = alive(scheme, 2)
    many = alive(scheme, 12)
    elements = B * T * 32
    assert few['states'] == many['states'] == 2 * 4 * elements
    assert (few['bits'], many['bits']) == (elements * k // 8, 11 * elements * k // 8)   # the first has v = 0
    assert many['rng'] == 6 * few['rng']            # one per step
    assert few['others'] == many['others']          # what embedding, final norm and loss keep

def test_the_count_sees_what_ordinary_autograd_and_checkpointing_keep():
    state = 4 * B * T * 32
    stored = [alive(dict(scheme='standard'), n)['others'] for n in (2, 12)]
    checkpointed = [alive(dict(scheme='standard', stored_layers=0), n)['others'] for n in (2, 12)]
    assert stored[1] - stored[0] > 10 * 10 * state
    assert 10 * state <= checkpointed[1] - checkpointed[0] < 10 * 2 * state

PEAK = """
import sys, torch, model
def status(key):
    with open('/proc/self/status') as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) * 1024
configs = eval(sys.argv[1])
for kwargs in (configs[0], *configs):           # the first pays for what torch does at its first use
    gpt = model.GPT(model.GPTConfig(block_size=256, vocab_size=256, n_head=4, n_embd=128, **kwargs))
    idx = torch.randint(256, (12, 256))
    with open('/proc/self/clear_refs', 'w') as file:
        file.write('5')                         # resets the peak
    before = status('VmRSS')
    gpt(idx, idx)[1].backward()
    print(status('VmHWM') - before)
    del gpt
"""

needs_proc = pytest.mark.skipif(not os.path.exists('/proc/self/clear_refs'), reason='there is no Linux /proc')

def peaks(*configs):
    """Bytes that a forward and backward pass takes in a fresh process, for each of these configs."""
    # glibc keeps freed blocks of less than this for reuse, which would hide how flat the curve is
    environment = dict(os.environ, MALLOC_MMAP_THRESHOLD_='65536')
    root = os.path.dirname(model_py.__file__)
    command = [sys.executable, '-c', PEAK, str(configs)]
    output = subprocess.run(command, check=True, env=environment, cwd=root, capture_output=True).stdout
    return [int(line) for line in output.split()][1:]

@needs_proc
def test_peak_memory_does_not_grow_with_depth():
    gradients = 4 * sum(w.numel() for w in build(n_embd=128).transformer.h[0].parameters())
    bits = 12 * 256 * 128 // 8                  # of a layer, one per element
    limits = [1.2 * gradients, 1.2 * gradients, 1.2 * gradients + bits]
    schemes = [LEAPFROG, SYMPLECTIC, dict(scheme='midpoint_a', a=-0.5)]
    lowest = [float('inf')] * 3
    for _ in range(3):                          # Linux counts to a megabyte or two
        few = peaks(*[dict(scheme, n_layer=2) for scheme in schemes])
        many = peaks(*[dict(scheme, n_layer=12) for scheme in schemes])
        lowest = [min(before, (b - a) / 10) for before, a, b in zip(lowest, few, many)]
        if all(slope < limit for slope, limit in zip(lowest, limits)):
            break
    else:
        raise AssertionError(f'bytes per layer {lowest}, gradients of weights {gradients}')
    two, four = peaks(dict(scheme='standard', n_layer=2), dict(scheme='standard', n_layer=4))
    assert (four - two) / 2 > 20 * gradients

@needs_proc
def test_slices_make_a_layer_at_work_smaller():
    whole, sliced = peaks(*[dict(LEAPFROG, n_layer=2, slice_tokens=n * 256) for n in (12, 2)])
    assert sliced < 0.65 * whole
