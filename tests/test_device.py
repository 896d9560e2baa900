"""
Code that would fail on a GPU is found without a GPU:  python -m pytest tests/test_device.py

Fake tensors know their device and shape, and have no memory. Operations on tensors of two devices fail as they would on a
GPU, so a tensor that was made on the CPU by mistake is found. Values, kernels and autocast are not tested here.
"""
import os
import re
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from evaluate import log_likelihoods
from model import GPT, GPTConfig
from runtime import adamw
from sample import stream
from test_model import LLAMA
from test_reversible import SCHEMES

registration = pytest.importorskip('torch.utils.backend_registration')
setup = getattr(registration, '_setup_privateuseone_for_python_backend', None)
pytestmark = pytest.mark.skipif(setup is None, reason='this torch cannot register a device from Python')
# autograd takes no further device once it has run: these tests need a process in which no other test has
ALONE = 'TEST_DEVICE_ALONE' in os.environ
alone = pytest.mark.skipif(not ALONE, reason='runs in a process of its own: see the test at the end')
DEVICE = 'fakegpu'
SHAPE = dict(block_size=16, vocab_size=65, n_layer=3, n_head=4, n_embd=32, slice_tokens=16)

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

def steps(config):
    """Two micro-batches and a step of AdamW; then evaluation and sampling."""
    with FakeTensorMode():
        with torch.device(DEVICE):
            model = GPT(config)
        optimizer = adamw(model, 0.1, 1e-3, (0.9, 0.95))
        idx = torch.zeros(3, 16, dtype=torch.long, device=DEVICE)
        for _ in range(2):
            loss = model(idx, idx)[1]
            loss.backward()
        assert all(w.grad.device.type == DEVICE and w.grad.shape == w.shape for w in model.parameters())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.eval()
        assert [token.shape for token in stream(model, idx[:1, :14], 4, top_k=10)] == [(1, 1)] * 4
        assert len(log_likelihoods(model, [([1, 2, 3], [4]), ([5], [6, 7])], 2, nullcontext())) == 2

CONFIGS = [GPTConfig(**SHAPE, **{'dropout': 0.1, **scheme}) for scheme in [
    dict(scheme='standard'), dict(scheme='standard', stored_layers=1), *[s for s in SCHEMES if s.get('a') is None],
    dict(scheme='midpoint_a', a=[0.75, -0.5, 1 / 256]), dict(scheme='midpoint_a', a='bdia'), dict(scheme='midpoint_a', a=-0.5, **LLAMA),
    dict(scheme='leapfrog', stored_layers=2, **LLAMA), dict(scheme='leapfrog', exact=False), dict(scheme='leapfrog', dropout=0.0)]]

@alone
@pytest.mark.parametrize('config', CONFIGS, ids=lambda c: f'{c.scheme} {c.norm} {c.stored_layers} {c.exact} {c.dropout}')
def test_every_tensor_of_a_step_is_on_the_device(config):
    steps(config)

@alone
@pytest.mark.parametrize('config', [CONFIGS[0], CONFIGS[3], CONFIGS[-4]], ids=['positions', 'leapfrog', 'packed bits, rotary positions'])
def test_a_tensor_that_is_left_on_the_cpu_is_noticed(config, monkeypatch):
    """A planted fault: arange() forgets the device it is given."""
    arange = torch.arange
    monkeypatch.setattr(torch, 'arange', lambda *args, device=None, **kwargs: arange(*args, device='cpu', **kwargs))
    with pytest.raises(RuntimeError, match='device'):
        steps(config)

@pytest.mark.skipif(ALONE, reason='is that process')
def test_all_of_these_in_a_process_of_their_own():
    result = subprocess.run([sys.executable, '-m', 'pytest', '-q', __file__], env=dict(os.environ, TEST_DEVICE_ALONE='1'),
                            capture_output=True, text=True, timeout=280)
    assert result.returncode == 0 and not re.search('failed|error|no tests', result.stdout), result.stdout[-3000:]
    assert '1 skipped' in result.stdout
