"""
Code that would fail on a GPU is found without a GPU:  python -m pytest tests/test_device.py

Fake tensors know their device and shape, and have no memory. Operations on tensors of two devices fail as on
a GPU, so a tensor that was made on the CPU by mistake is found. Values, kernels and autocast are not tested.
"""
import os
import re
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from model import GPT, GPTConfig
from runtime import adamw
from test_reversible import LEAPFROG, LLAMA

registration = pytest.importorskip('torch.utils.backend_registration')
setup = getattr(registration, '_setup_privateuseone_for_python_backend', None)
pytestmark = pytest.mark.skipif(setup is None, reason='this torch cannot register a device from Python')
# autograd takes no further device once it has run: these tests need a process in which no other test has
ALONE = 'TEST_DEVICE_ALONE' in os.environ
alone = pytest.mark.skipif(not ALONE, reason='runs in a process of its own: see the test at the end')
DEVICE = 'fakegpu'
SHAPE = dict(block_size=16, vocab_size=65, n_layer=2, n_head=4, n_embd=32, dropout=0.1, slice_tokens=16)

@pytest.fixture(scope='module', autouse=True)
def device():
    if not ALONE:
        return
    setup(DEVICE)
    module = torch.get_device_module(DEVICE)
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]
    module.get_rng_state = lambda device=None: torch.zeros(16, dtype=torch.uint8)
    module.set_rng_state = lambda state, device=None: None

@pytest.fixture(autouse=True)
def values(monkeypatch):
    monkeypatch.setattr(torch.Tensor, 'item', lambda x: 0.5)            # there are no values

def steps(fields):
    """Two micro-batches and a step of AdamW; then the loss without gradients, and sampling."""
    with FakeTensorMode():
        with torch.device(DEVICE):
            model = GPT(GPTConfig(**{**SHAPE, **fields}))
        optimizer = adamw(model, 0.1, 1e-3, (0.9, 0.95))
        idx = torch.zeros(3, 16, dtype=torch.long, device=DEVICE)
        for _ in range(2):
            loss = model(idx, idx)[1]
            loss.backward()
        assert all(w.grad.device.type == DEVICE and w.grad.shape == w.shape for w in model.parameters())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.eval()
        with torch.no_grad():
            assert model(idx, idx)[1].device.type == DEVICE
        tokens = list(model.stream(idx[:1, :14], 4, top_k=10))
        assert [token.shape for token in tokens] == [(1, 1)] * 4

MODELS = [dict(scheme='standard'), dict(scheme='standard', stored_layers=1), LEAPFROG,
          dict(scheme='midpoint'), dict(scheme='symplectic'), dict(scheme='midpoint_sum'),
          dict(scheme='midpoint_a'), dict(scheme='midpoint_a', a=[0.75, 1 / 256]),
          dict(LEAPFROG, exact=False, dropout=0.0), dict(LEAPFROG, stored_layers=1, **LLAMA)]
WITH_BITS = dict(scheme='midpoint_a', a=-0.5, **LLAMA)

@alone
@pytest.mark.parametrize('fields', [*MODELS, WITH_BITS], ids=str)
def test_every_tensor_of_a_step_is_on_the_device(fields):
    steps(fields)

@alone
@pytest.mark.parametrize('fields', [MODELS[0], LEAPFROG, WITH_BITS], ids=str)
def test_a_tensor_that_is_left_on_the_cpu_is_noticed(fields, monkeypatch):
    """A planted fault: arange() forgets the device it is given."""
    arange = torch.arange
    monkeypatch.setattr(torch, 'arange', lambda *args, device=None, **how: arange(*args, device='cpu', **how))
    with pytest.raises(RuntimeError, match='device'):
        steps(fields)

@pytest.mark.skipif(ALONE, reason='is that process')
def test_all_of_these_in_a_process_of_their_own():
    result = subprocess.run([sys.executable, '-m', 'pytest', '-q', __file__], capture_output=True, text=True,
                            env=dict(os.environ, TEST_DEVICE_ALONE='1'), timeout=280)
    assert result.returncode == 0 and not re.search('failed|error|no tests', result.stdout), result.stdout
    assert '1 skipped' in result.stdout
