"""
What must be true of model.py, on two CPU cores in about two minutes:  python -m pytest test_reversible.py

1. exact: gradients with stored and with rebuilt activations are equal bit for bit, and so is every rebuilt state
2. right: they are also the gradients of the recurrence, by an independent autograd version and by finite differences
3. these checks can fail: each fault planted in a copy of model.py must be noticed
4. small: between forward and backward nothing lives that grows with depth, except k bits an element where a = n / 2^k
5. and the rest of what one expects of a GPT: the loss, causality, dtypes, compile, DistributedDataParallel, messages
"""
import gc
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from torch.nn import functional as F

import model as model_py

B, T, V, L = 2, 16, 65, 4
SHAPE = dict(block_size=T, vocab_size=V, n_layer=L, n_head=4, n_embd=32)
SCHEMES = [dict(scheme='midpoint'), dict(scheme='leapfrog'), dict(scheme='symplectic'), dict(scheme='midpoint_a'),
           dict(scheme='midpoint_a', a=[0.5, -0.5, 1 / 16, -1.25], h=[0.7, 1.3, 1.0, 1.1]),
           dict(scheme='midpoint_a', a=[0.75, 3 / 256, 1.0, -1.0])]
LEAPFROG = SCHEMES[1]
every_scheme = pytest.mark.parametrize('scheme', SCHEMES, ids=lambda s: ' '.join(str(v) for v in s.values()))

def build(module=model_py, amplify=1, **kwargs):
    """The same random weights at every call, with the blocks' matrices amplified to behave as trained ones do."""
    torch.manual_seed(0)
    model = module.GPT(module.GPTConfig(**{**SHAPE, **kwargs}))
    with torch.no_grad():
        for name, weight in model.transformer.h.named_parameters():
            weight.mul_(amplify) if weight.dim() == 2 else weight.add_(0.1 * torch.randn(weight.shape))
    return model

def batch(rows=B):
    tokens = torch.randint(V, (rows, T + 1), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:]

def gradients(model, dtype=torch.float32, seed=2):
    torch.manual_seed(seed)
    with torch.autocast('cpu', dtype=dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
        loss = model(*batch())[1]
    loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters()}

def error(got, want):
    """The largest relative error of any weight's gradient, by its norm."""
    assert got.keys() == want.keys()
    return max(float((got[name] - want[name]).norm() / want[name].norm()) for name in want)

# -----------------------------------------------------------------------------
# 1. stored and rebuilt, bit for bit

def check_exact(module, scheme, dtype=torch.float32, dropout=0.0, amplify=1, compiled=False):
    forward_states, rebuilt_states, results = [], [], []
    advance, rebuild = module.advance, module.rebuild

    def recording_advance(p_prev, *args):
        forward_states.append(p_prev.clone())
        return advance(p_prev, *args)

    def recording_rebuild(*args):
        rebuilt_states.append(rebuild(*args).clone())
        return rebuilt_states[-1].clone()

    module.advance, module.rebuild = recording_advance, recording_rebuild
    try:
        for stored_layers in (L, 1, 0):
            model = build(module, amplify, dropout=dropout, stored_layers=stored_layers, **scheme)
            if compiled:
                model.compile()
            results.append(gradients(model, dtype))
            steps = 2 * L if scheme['scheme'] == 'symplectic' else L
            assert len(forward_states) == len(rebuilt_states) == steps
            while forward_states:
                assert torch.equal(forward_states.pop(), rebuilt_states.pop(0)), 'a rebuilt state differs'
    finally:
        module.advance, module.rebuild = advance, rebuild
    for result in results[1:]:
        for name, grad in results[0].items():
            assert grad.isfinite().all() and torch.equal(grad, result[name]), f'the gradient of {name} differs'

@every_scheme
@pytest.mark.parametrize('amplify', [1, 8])
@pytest.mark.parametrize('dropout', [0.0, 0.1])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_stored_and_rebuilt_gradients_are_the_same_bits(scheme, dtype, dropout, amplify):
    if dtype == torch.float64:
        torch.set_default_dtype(dtype)
    try:
        check_exact(model_py, scheme, dtype, dropout, amplify)
    finally:
        torch.set_default_dtype(torch.float32)

# -----------------------------------------------------------------------------
# 2. the right gradients: a recurrence written again, here, for ordinary autograd

class StraightThrough(torch.autograd.Function):
    """Any rounding of x, with the gradient of the identity."""

    @staticmethod
    def forward(ctx, x, rounding):
        return rounding(x)

    @staticmethod
    def backward(ctx, g):
        return g, None

def increments(model):
    for block in model.transformer.h:
        def attention(x, block=block):
            return block.attn(block.ln_1(x))

        def mlp(x, block=block):
            return block.mlp(block.ln_2(x))

        if model.config.scheme == 'symplectic':
            yield from (attention, mlp)
        else:
            yield lambda x, attention=attention, mlp=mlp: attention(x) + mlp(x + attention(x))

def autograd_loss(model, scheme, exact):
    """The paper's equations as they are written there, the states in float64, on a grid of 2^-32 where exact."""
    def grid(x, down=False):
        return StraightThrough.apply(x, lambda y: (y * 2**32).floor() / 2**32 if down
                                     else (y * 2**32).round() / 2**32) if exact else x

    dtype = model.lm_head.weight.dtype
    idx, targets = batch()
    x = model.transformer.wte(idx) + model.transformer.wpe(torch.arange(T))
    h = model.config.h if isinstance(model.config.h, list) else [model.config.h] * L
    a = model.config.a if isinstance(model.config.a, list) else [model.config.a] * L
    old = new = grid(x.double())
    for j, f in enumerate(increments(model)):
        fx = f(new.to(dtype)).double()
        if scheme['scheme'] == 'midpoint':
            following = old + grid(2 * h[j] * fx)
        elif scheme['scheme'] == 'leapfrog':
            following = 2 * new - old + grid(h[j]**2 * fx)
        elif scheme['scheme'] == 'symplectic':
            following = old + grid(fx)
        else:
            following = grid(a[j] * old + (1 - a[j]) * new, down=True) + grid(h[j] * fx)
        old, new = new, following
    x = model.transformer.ln_f(new.to(dtype))
    return F.cross_entropy(F.linear(x, model.transformer.wte.weight).flatten(0, 1), targets.flatten())

def check_against_autograd(module, scheme, stored_layers=0, amplify=1):
    model = build(module, amplify, stored_layers=stored_layers, **scheme)
    got = gradients(model)
    reference = build(module, amplify, **scheme)
    autograd_loss(reference, scheme, exact=True).backward()
    assert error(got, {name: weight.grad for name, weight in reference.named_parameters()}) < 1e-5

@every_scheme
@pytest.mark.parametrize('amplify', [1, 8])
@pytest.mark.parametrize('stored_layers', [0, 1, L])
def test_exact_gradients_are_those_of_the_recurrence(scheme, stored_layers, amplify):
    check_against_autograd(model_py, scheme, stored_layers, amplify)

@every_scheme
@pytest.mark.parametrize('amplify', [1, 8])
def test_float64_gradients_equal_autograd(scheme, amplify):
    damped = scheme['scheme'] == 'midpoint_a'       # |a| < 1 amplifies the error of a float inverse: rebuild nothing
    for stored_layers in [L] if damped else [0, 1, L]:
        model = build(amplify=amplify, exact=False, stored_layers=stored_layers, **scheme).double()
        got = gradients(model)
        reference = build(amplify=amplify, exact=False, **scheme).double()
        autograd_loss(reference, scheme, exact=False).backward()
        assert error(got, {name: weight.grad for name, weight in reference.named_parameters()}) < 1e-10

@every_scheme
def test_directional_derivative_by_finite_differences(scheme):
    model = build(amplify=4, exact=False, stored_layers=L, **scheme).double()
    grads, direction, eps = gradients(model), {}, 1e-5
    with torch.no_grad():
        for name, weight in model.named_parameters():
            direction[name] = torch.randn(weight.shape, dtype=weight.dtype) * weight.std()
        losses = []
        for step in (eps, -2 * eps):
            for name, weight in model.named_parameters():
                weight += step * direction[name]
            losses.append(model(*batch())[1])
    slope = sum((grads[name] * direction[name]).sum() for name in grads)
    assert abs((losses[0] - losses[1]) / (2 * eps) - slope) < 1e-6 * abs(slope)

# -----------------------------------------------------------------------------
# 3. planted faults

FAULTS = {
    'a sign in the inverse': (
        's = p_next.sub_(cf)', 's = p_next.add_(cf)', lambda m: check_exact(m, LEAPFROG)),
    'another dropout mask': (
        'generator.set_rng_state(ctx.rng_state)', 'pass', lambda m: check_exact(m, LEAPFROG, dropout=0.1)),
    'the remembered bits lost': (
        '.bitwise_or_(unpack(bits, k, s.shape))', '', lambda m: check_exact(m, SCHEMES[4])),
    'f evaluated again outside autocast': (
        'ctx.dtype), ctx.autocast)', 'ctx.dtype), dict(ctx.autocast, enabled=False))',
        lambda m: check_exact(m, LEAPFROG, torch.bfloat16)),
    'the embedding not rounded': (
        'x + (to_float(tape.p, x.dtype) - x).detach()', 'x', lambda m: [check_exact(m, scheme) for scheme in SCHEMES]),
    'b dropped from the adjoint': (
        'combine(1, g_f, b, g_next)', 'g_f', lambda m: check_against_autograd(m, LEAPFROG)),
    'a flipped in the adjoint': (
        'g_next if a == 1 else a * g_next', '-a * g_next', lambda m: check_against_autograd(m, LEAPFROG)),
    'dL/dx without g_{-1}': (
        'p, ReversibleStep.apply(p_prev, p, tape', 'p, ReversibleStep.apply(p_prev.detach() if p_prev is p else p_prev, p, tape',
        lambda m: check_against_autograd(m, SCHEMES[0])),
    'dL/dx without g_0': (
        'p, ReversibleStep.apply(p_prev, p, tape', 'p, ReversibleStep.apply(p_prev, p.detach() if p_prev is p else p, tape',
        lambda m: check_against_autograd(m, SCHEMES[0])),
}

@pytest.mark.parametrize('fault', FAULTS)
def test_planted_fault_is_noticed(fault, tmp_path):
    right, wrong, check = FAULTS[fault]
    with open(model_py.__file__) as file:
        source = file.read()
    assert source.count(right) == 1, f'model.py has changed: plant this fault anew ({right})'
    path = tmp_path / 'faulty.py'
    path.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location('faulty', path)
    faulty = importlib.util.module_from_spec(spec)
    sys.modules['faulty'] = faulty                  # where dataclass looks for the module
    spec.loader.exec_module(faulty)
    with pytest.raises(AssertionError):
        check(faulty)

# -----------------------------------------------------------------------------
# 4. what lives between forward and backward

class Saved:
    """What autograd holds in place of a saved tensor, so that one can count those which are still held."""

    def __init__(self, tensor):
        self.tensor = tensor.detach()     # not to hold the graph that holds this

def alive(scheme, n_layer):
    """Bytes of int64 states, packed bits, RNG states and all else but weights, that live when forward has ended."""
    model = build(n_layer=n_layer, dropout=0.1, **scheme)
    idx, targets = batch()
    gc.collect()
    known = {x.untyped_storage().data_ptr() for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)}
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        loss = model(idx, targets)[1]
    objects = gc.get_objects()
    found = [x for x in objects if type(x) is torch.Tensor] + [x.tensor for x in objects if type(x) is Saved]
    sizes = dict(states=0, bits=0, rng=0, others=0)
    for storage, x in {x.untyped_storage().data_ptr(): x for x in found}.items():
        if storage in known:
            continue
        kind = ('states' if x.dtype == torch.int64 and x.shape == (B, T, 32) else 'others' if x.dtype != torch.uint8
                else 'rng' if x.nbytes == torch.get_rng_state().nbytes else 'bits')
        sizes[kind] += x.nbytes
    loss.backward()
    return sizes

@pytest.mark.parametrize('scheme, k', [(SCHEMES[0], 0), (LEAPFROG, 0), (SCHEMES[2], 0),
                                       *[(dict(scheme='midpoint_a', a=1 / 2**k), k) for k in (1, 2, 4, 8)]])
def test_only_the_last_pair_and_the_bits_live_until_backward(scheme, k):
    few, many, elements = alive(scheme, 2), alive(scheme, 12), B * T * 32
    assert few['states'] == many['states'] == 2 * 8 * elements
    assert (few['bits'], many['bits']) == (2 * elements * k // 8, 12 * elements * k // 8)
    assert many['rng'] == 6 * few['rng']            # one a step
    assert few['others'] == many['others']          # what embedding, final norm and loss keep
    standard = alive(dict(scheme='standard'), 12)['others'] - alive(dict(scheme='standard'), 2)['others']
    assert standard > 10 * 10 * 4 * elements        # that the count sees what ordinary autograd keeps

PEAK = """
import sys, torch
from model import GPT, GPTConfig
model = GPT(GPTConfig(block_size=256, vocab_size=256, n_head=4, n_embd=128, **eval(sys.argv[1])))
idx = torch.randint(256, (48, 256))
def status(key):
    with open('/proc/self/status') as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) * 1024
before = status('VmRSS')
model(idx, idx)[1].backward()
print(status('VmHWM') - before)
"""

@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='peak resident memory is read from Linux /proc')
def test_peak_memory_does_not_grow_with_depth():
    def slope(few, many, **kwargs):
        # glibc keeps freed blocks of less than this for reuse, which would hide how flat the curve is
        environment = dict(os.environ, MALLOC_MMAP_THRESHOLD_='65536')
        peaks = [int(subprocess.run([sys.executable, '-c', PEAK, str(dict(kwargs, n_layer=n_layer))], check=True,
                                    cwd=os.path.dirname(model_py.__file__), env=environment,
                                    capture_output=True).stdout) for n_layer in (few, many)]
        return (peaks[1] - peaks[0]) / (many - few)

    weight_gradients = 4 * sum(w.numel() for w in build(n_embd=128).transformer.h[0].parameters())
    elements = 48 * 256 * 128
    for scheme, k in (LEAPFROG, 0), (SCHEMES[0], 0), (SCHEMES[2], 0), (dict(scheme='midpoint_a', a=-0.5), 1):
        assert slope(2, 12, **scheme) < 1.2 * weight_gradients + k / 8 * elements, scheme
    assert slope(2, 4, scheme='standard') > 20 * weight_gradients

# -----------------------------------------------------------------------------
# 5. a GPT as one expects it

@pytest.mark.parametrize('chunk', [1, 7, B * T, 1000])
@pytest.mark.parametrize('frozen', [False, True])
def test_chunked_loss_equals_the_plain_one(chunk, frozen):
    torch.manual_seed(0)
    model = build().requires_grad_(not frozen)
    targets = batch()[1].clone()
    targets[0, 3:9] = targets[1, -1] = -1
    results = []
    for plain in (True, False):
        x = torch.randn(B, T, 32, generator=torch.Generator().manual_seed(3)).requires_grad_()
        if plain:
            loss = F.cross_entropy(model.lm_head(x).flatten(0, 1), targets.flatten(), ignore_index=-1)
        else:
            loss = model.loss(x, targets, chunk)
        (3 * loss).backward()
        results.append((loss.detach(), x.grad, model.lm_head.weight.grad))
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch.testing.assert_close(model.loss(x, targets, chunk), loss.detach(), rtol=1e-5, atol=0)
    for plain, chunked in zip(*results):
        assert (plain is None) == (chunked is None) == (frozen and plain is None)
        assert plain is None or (plain - chunked).norm() <= 1e-5 * plain.norm()

def test_logits_are_never_whole_in_memory():
    """Of 3 x 1024 tokens and a vocabulary of 4096, no tensor made between forward and backward has all the logits."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            largest = max(largest, *(x.numel() for x in torch.utils._pytree.tree_leaves(result)
                                     if isinstance(x, torch.Tensor)), 0)
            return result

    model = build(vocab_size=4096, block_size=1024)
    idx = torch.randint(4096, (3, 1024))
    with Watch():
        model(idx, idx)[1].backward()
    assert largest == 1024 * 4096

@every_scheme
@pytest.mark.parametrize('value', [float('inf'), float('-inf'), float('nan'), 1e30])
def test_an_increment_that_is_not_finite_reaches_the_loss(scheme, value):
    """1e30 is finite, but does not fit into a state."""
    for layer in (0, L - 1):
        model = build(**scheme)
        model.transformer.h[layer].mlp.c_proj.bias.data[5] = value
        loss = model(*batch())[1]
        assert not loss.isfinite()
        assert not model(batch()[0])[0].isfinite().any()
        loss.backward()
        assert not model.transformer.wte.weight.grad.isfinite().any()

def test_float16_recovers_with_its_scaler():
    """An overflow in the scaled backward pass skips the step and lowers the scale; then training goes on."""
    model = build(amplify=8, **LEAPFROG)
    optimizer = model.optimizer(0.1, 1e-3, (0.9, 0.99))
    scaler = torch.amp.GradScaler('cpu', init_scale=2.0**40)
    before = model.transformer.wte.weight.detach().clone()
    for _ in range(40):
        with torch.autocast('cpu', torch.float16):
            loss = model(*batch())[1]
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert 1 < scaler.get_scale() < 2**30 and not torch.equal(before, model.transformer.wte.weight)
    assert loss.isfinite()

def test_backward_does_not_touch_the_random_number_generator():
    """Or the masks of the next micro-batch would depend on stored_layers."""
    model = build(dropout=0.1, **LEAPFROG)
    torch.manual_seed(5)
    loss = model(*batch())[1]
    state = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), state)

def test_gelu_is_the_tanh_one_and_deep_projections_start_small():
    mlp, x = build().transformer.h[0].mlp, torch.randn(3, 32)
    y = mlp.c_fc(x)
    y = 0.5 * y * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3)))
    torch.testing.assert_close(mlp(x), mlp.c_proj(y))
    model = model_py.GPT(model_py.GPTConfig(**{**SHAPE, 'n_embd': 256}))
    assert model.transformer.h[0].attn.c_attn.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.transformer.h[0].mlp.c_proj.weight.std().item() == pytest.approx(0.02 / (2 * L) ** 0.5, rel=0.05)

@pytest.mark.parametrize('exact', [True, False])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_whole_models_in_half_precision(dtype, exact):
    assert model_py.GPT(model_py.GPTConfig(**SHAPE, exact=exact)).to(dtype)(*batch())[1].isfinite()

@every_scheme
def test_a_frozen_embedding_leaves_the_other_gradients_as_they_are(scheme):
    want = gradients(build(**scheme))
    model = build(**scheme)
    model.transformer.wte.weight.requires_grad_(False)
    model.transformer.wpe.weight.requires_grad_(False)
    model.transformer.h[1].mlp.requires_grad_(False)
    got = gradients(model)
    for name, grad in got.items():
        if 'wte' in name or 'wpe' in name or 'h.1.mlp' in name:
            assert grad is None
        else:
            assert torch.equal(grad, want[name]), name

def test_gradients_are_also_to_be_had_by_autograd_grad():
    model, want = build(**LEAPFROG), gradients(build(**LEAPFROG))
    got = torch.autograd.grad(model(*batch())[1], list(model.parameters()))
    for grad, name in zip(got, want):
        assert torch.equal(grad, want[name])

def test_what_a_backward_pass_cannot_do_it_refuses():
    model = build(**LEAPFROG)
    loss = model(*batch())[1]
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match='run forward again'):
        loss.backward()
    loss = model(*batch())[1]
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.add_(1)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        loss.backward()

@pytest.mark.parametrize('scheme', [dict(scheme='standard'), *SCHEMES], ids=str)
def test_no_position_sees_a_later_one(scheme):
    model = build(amplify=8, **scheme).eval()
    idx = batch()[0]
    changed = idx.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % V
    with torch.no_grad():
        one, other = model.hidden(idx), model.hidden(changed)
    assert torch.equal(one[:, :9], other[:, :9])
    assert (one[:, 9:] != other[:, 9:]).any(-1).all()

def test_standard_is_gpt2_with_the_state_dict_of_nanogpt():
    model = build(scheme='standard')
    names = ['transformer.wte.weight', 'transformer.wpe.weight']
    for j in range(L):
        for part in ('ln_1', 'attn.c_attn', 'attn.c_proj', 'ln_2', 'mlp.c_fc', 'mlp.c_proj'):
            names += [f'transformer.h.{j}.{part}.{kind}' for kind in ('weight', 'bias')]
    names += ['transformer.ln_f.weight', 'transformer.ln_f.bias', 'lm_head.weight']
    assert list(model.state_dict()) == names
    assert model.lm_head.weight is model.transformer.wte.weight
    idx = batch()[0]
    x = model.transformer.wte(idx) + model.transformer.wpe.weight[:T]
    for block in model.transformer.h:
        x = x + block.attn(block.ln_1(x))
        x = x + block.mlp(block.ln_2(x))
    logits, loss = model(idx)
    assert loss is None and logits.shape == (B, 1, V)
    torch.testing.assert_close(logits, model.lm_head(model.transformer.ln_f(x))[:, [-1]])
    # every scheme has the same weights: any of them loads this state dict
    build(**LEAPFROG).load_state_dict(model.state_dict())

def test_standard_with_checkpointing_has_the_same_gradients():
    want = gradients(build(scheme='standard', dropout=0.1))
    got = gradients(build(scheme='standard', dropout=0.1, stored_layers=1))
    for name in want:
        assert torch.equal(got[name], want[name]), name

def test_random_a_is_drawn_once_in_quarters():
    model = build(scheme='midpoint_a', a='random', n_layer=64)
    a = torch.tensor(model.config.a)
    assert torch.equal((a * 4).round() / 4, a) and a.abs().min() >= 0.5 and a.abs().max() <= 1.5
    assert abs(a.mean()) < 0.5 and len(set(model.config.a)) > 6
    again = model_py.GPT(model_py.GPTConfig(**asdict(model.config)))
    assert again.config == model.config

def test_states_may_overflow_and_are_rebuilt_all_the_same():
    """int64 wraps around, and dividing by n is a multiplication modulo 2^64: nothing that wraps is lost."""
    for n, m, k in [(1, 0, 0), (-1, 2, 0), (3, 1, 2), (-5, 9, 2), (255, 1, 8), (7, 9, 4), (-3, 35, 5)]:
        p_prev, p, cf = torch.randint(-2**63, 2**63 - 1, (3, 2, 3, 5))
        p_next, bits = model_py.advance(p_prev.clone(), p, cf, n, m, k)
        assert torch.equal(model_py.rebuild(p_next, p, cf, bits, n, m, k), p_prev)

def test_accumulated_gradients_equal_those_of_a_large_batch():
    idx, targets = batch(rows=8)
    whole, parts = build(**LEAPFROG), build(**LEAPFROG)
    whole(idx, targets)[1].backward()
    for i in range(0, 8, 2):
        (parts(idx[i:i + 2], targets[i:i + 2])[1] / 4).backward()
    named = [{name: weight.grad for name, weight in model.named_parameters()} for model in (parts, whole)]
    assert error(*named) < 1e-5

def check_ddp(rank, scheme, frozen, unused):
    idx, targets = batch(rows=8)
    half = slice(4 * rank, 4 * rank + 4)
    whole, model = build(**scheme), build(**scheme)
    for each in (whole, model):
        each.transformer.wte.weight.requires_grad_(not frozen)
    whole(idx, targets)[1].backward()
    ddp = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)
    for _ in range(2):
        model.zero_grad()
        ddp(idx[half], targets[half])[1].backward()
    named = [{name: weight.grad for name, weight in m.named_parameters() if weight.requires_grad} for m in (model, whole)]
    assert error(*named) < 1e-5

def two_processes(rank, port):
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE='2')
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo')
    for scheme in [dict(scheme='standard'), *SCHEMES[:4]]:
        for frozen, unused in ((False, False), (True, False), (True, True)):
            check_ddp(rank, scheme, frozen, unused)
    torch.distributed.destroy_process_group()

def test_two_processes_equal_one_with_the_whole_batch():
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(two_processes, (port,), nprocs=2)

compiler = pytest.mark.skipif(not any(map(shutil.which, ('g++', 'clang++', 'c++'))),
                              reason='torch.compile needs a C++ compiler on a CPU')

@compiler
@pytest.mark.parametrize('scheme', [LEAPFROG, SCHEMES[2]], ids=str)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_compiled_blocks_are_exact_too(scheme, dtype):
    torch._dynamo.reset()
    check_exact(model_py, scheme, dtype, dropout=0.1, amplify=8, compiled=True)

@compiler
def test_a_model_compiled_from_outside_is_right():
    want = gradients(build(**LEAPFROG))
    model = build(**LEAPFROG)
    torch.compile(model)(*batch())[1].backward()
    assert error({name: weight.grad for name, weight in model.named_parameters()}, want) < 1e-5

def test_generate_draws_from_the_top_and_never_from_the_padding():
    model = build(amplify=4, **LEAPFROG).eval()
    prompt = batch()[0][:, :3]
    greedy = model.generate(prompt, 20, temperature=0)
    assert greedy.shape == (B, 23) and torch.equal(greedy, model.generate(prompt, 20, top_k=1))
    for i in range(3, 23):
        x = model.hidden(greedy[:, max(0, i - T):i])[:, -1]
        assert torch.equal(model.lm_head(x).argmax(-1), greedy[:, i])
    assert model.generate(prompt, 50, temperature=100.0, vocab_size=10)[:, 3:].max() < 10
