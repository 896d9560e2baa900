"""
What must be true of the hand-written backward pass, as a lesson:  python -m pytest test_reversible.py

1. up and down: the states of a few steps, undone one by one
2. exact: gradients of stored and of rebuilt activations are equal bit for bit, and so is every rebuilt state
3. right: they are the gradients of the paper's equations, by ordinary autograd and by finite differences
4. these checks can fail: each fault planted in model.py must be noticed

tests/test_memory.py shows what lives between the two passes: little that grows with depth.
"""
from contextlib import contextmanager

import pytest
import torch
from torch.nn import functional as F

import model as model_py
from model import GPT, GPTConfig, Tape, kick, unkick

B, T, V, L = 2, 16, 65, 4
SHAPE = dict(block_size=T, vocab_size=V, n_layer=L, n_head=4, n_embd=32, slice_tokens=T)     # two slices

def test_a_step_up_and_down_is_where_it_was():
    p = torch.randint(-2**28, 2**28, (B, T, 32), dtype=torch.int32)     # the embedding, in steps of 2^-18
    v = torch.zeros_like(p)
    start = p.clone()
    layers = [torch.nn.Linear(32, 32) for _ in range(L)]
    steps = GPTConfig(n_layer=L, scheme='midpoint_a', a=[0.75, -1.0, 1.0, 3 / 256], h=0.5).coefficients()
    cut_off = []
    for f, step in zip(layers, steps):                          # up
        cut_off.append(kick(v, f(p.float() / 2**18), step))     # v = -a * v + c * f(p)
        p += v                                                  # p = p + v
    assert (p - start).abs().max() > 2**20 and v.count_nonzero()
    for f, step in zip(layers[::-1], steps[::-1]):              # and down
        p -= v                                                  # p = p - v
        unkick(v, f(p.float() / 2**18), cut_off.pop(), step)    # v = (v - c * f(p)) / -a
    assert torch.equal(p, start) and not v.count_nonzero()

# -----------------------------------------------------------------------------
# models, tokens and gradients for the tests below

MIDPOINT, LEAPFROG, SYMPLECTIC = (dict(scheme=name) for name in ('midpoint', 'leapfrog', 'symplectic'))
BITS = dict(scheme='midpoint_a', a=[0.5, -0.5, 1 / 16, -1.25], h=[0.7, 1.3, 1.0, 1.1])
LLAMA = dict(norm='rmsnorm', mlp='swiglu', n_inner=48, n_kv_head=2, rope_theta=1e4, tied=False, bias=False)
SCHEMES = [MIDPOINT, LEAPFROG, SYMPLECTIC, dict(scheme='midpoint_a'), BITS,
           dict(scheme='midpoint_a', a=[0.75, 3 / 256, 1.0, -1.0]), dict(scheme='midpoint_sum'),
           dict(scheme='midpoint_a', a=-0.5, h=[0.58, 0.57, 0.67, 1.0], **LLAMA)]           # as retrofitted

def name_of(scheme):
    return 'Llama' if 'norm' in scheme else ' '.join(str(value) for value in scheme.values())

every_scheme = pytest.mark.parametrize('scheme', SCHEMES, ids=name_of)

def build(amplify=1, **fields):
    """The same random weights at every call; amplified, the blocks' matrices behave as trained ones do."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SHAPE, **fields}))
    with torch.no_grad():
        for weight in model.transformer.h.parameters():
            if weight.dim() == 2:
                weight.mul_(amplify)
            else:
                weight.add_(0.1 * torch.randn(weight.shape))
    return model

def batch(rows=B):
    tokens = torch.randint(V, (rows, T + 1), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:]

def gradients(model, dtype=torch.float32):
    torch.manual_seed(2)
    with torch.autocast('cpu', dtype=dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
        loss = model(*batch())[1]
    loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters()}

def error(got, want):
    """The largest relative error of any weight's gradient, by its norm."""
    assert got.keys() == want.keys()
    return max(float((got[name] - want[name]).norm() / want[name].norm()) for name in want)

@contextmanager
def recorded():
    """A list of the p (tokens, C) that f sees: of all slices up, and of those down that are not stored."""
    states = []
    evaluate = Tape.evaluate

    def recording(tape, f, p):
        states.append(p.clone().view(-1, p.size(-1)))
        return evaluate(tape, f, p)

    Tape.evaluate = recording
    yield states
    Tape.evaluate = evaluate

# -----------------------------------------------------------------------------
# 2. stored and rebuilt, bit for bit

def check_exact(scheme, dtype=torch.float32, dropout=0.0, amplify=1, compiled=False):
    results = []
    for stored_layers in (L, 1, 0):
        model = build(amplify, dropout=dropout, stored_layers=stored_layers, **scheme)
        if dtype == torch.float64:
            model.double()
        if compiled:
            model.compile_parts()
        with recorded() as states:
            results.append(gradients(model, dtype))
        assert model.mismatches == 0, 'v is not 0 again'
    up, down = torch.cat(states).view(2, -1, B * T, model.config.n_embd)        # the last model rebuilds all
    assert torch.equal(up.flip(0), down), 'a rebuilt state differs'
    for result in results[1:]:
        for name, grad in results[0].items():
            assert grad.isfinite().all() and torch.equal(grad, result[name]), f'{name} has another gradient'

@every_scheme
@pytest.mark.parametrize('amplify', [1, 8])
@pytest.mark.parametrize('dropout', [0.0, 0.1])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_stored_and_rebuilt_gradients_are_the_same_bits(scheme, dtype, dropout, amplify):
    check_exact(scheme, dtype, dropout, amplify)

@every_scheme
def test_the_whole_batch_as_one_slice_is_exact_too_and_has_the_same_gradients(scheme):
    whole = dict(scheme, slice_tokens=B * T)
    check_exact(whole, torch.bfloat16, dropout=0.1, amplify=8)
    sliced = gradients(build(8, **scheme))
    assert 0 < error(gradients(build(8, **whole)), sliced) < 1e-5

def plant_one_bit(model, step):
    """When the first slice of this step is undone, one element of v is 2^-18 too large or too small."""
    steps = 2 * L if model.config.scheme == 'symplectic' else L
    calls = []

    def faulty_unkick(v, *args):
        calls.append(0)
        if len(calls) == 2 * (steps - 1 - step) + 1:
            v.view(-1, v.size(-1))[3, 5] ^= 1
        unkick(v, *args)
    model.unkick = faulty_unkick

@every_scheme
@pytest.mark.parametrize('dtype, dropout, amplify', [(torch.float32, 0.0, 1), (torch.bfloat16, 0.1, 8)])
@pytest.mark.parametrize('stored_layers', [0, L])
@pytest.mark.parametrize('step', [0, 1, L - 1])
def test_a_step_notices_one_wrong_bit_in_one_layer(scheme, step, stored_layers, dtype, dropout, amplify):
    model = build(amplify, dropout=dropout, stored_layers=stored_layers, **scheme)
    plant_one_bit(model, step)
    gradients(model, dtype)
    assert model.mismatches > 0
    model.mismatches = 0
    model.unkick = unkick
    gradients(model, dtype)
    assert model.mismatches == 0

@pytest.mark.parametrize('fields', [dict(verify=False), dict(exact=False), dict(frozen=True)], ids=str)
def test_where_nothing_can_be_compared_nothing_is(fields):
    frozen = fields.pop('frozen', False)
    model = build(**fields)
    if frozen:
        for module in (model.transformer.wte, model.transformer.wpe, model.transformer.h[0]):
            module.requires_grad_(False)
    if 'exact' not in fields:                   # floats have no bits to flip
        plant_one_bit(model, L - 1)
    gradients(model)
    assert type(model.mismatches) is int and model.mismatches == 0

# -----------------------------------------------------------------------------
# 3. the right gradients: the paper's equations with p_prev and p, written again for ordinary autograd

def increments(model):
    """f of each step; each is called before the loop goes on."""
    blocks = model.transformer.h
    for j, block in enumerate(blocks):
        if model.config.scheme == 'symplectic':
            yield lambda x: block.attn(block.ln_1(x))
            yield lambda x: block.mlp(block.ln_2(x))
        elif model.config.scheme == 'midpoint_sum' and j > 0:
            yield lambda x: increment(block, x) + increment(blocks[j - 1], x)
        else:
            yield lambda x: increment(block, x)

def increment(block, x):
    y = block.attn(block.ln_1(x))
    return y + block.mlp(block.ln_2(x + y))

def autograd_gradients(model, exact):
    """The states in float64, on a grid of 2^-18 where exact; of 2^-32 if the weights are float64, too."""
    def nearest(x):                             # rounds, with the gradient of the identity
        return x + ((x * one).round() / one - x).detach() * exact

    def below(x):
        return x + ((x * one).floor() / one - x).detach() * exact

    scheme = model.config.scheme
    dtype = model.lm_head.weight.dtype
    one = 2.0**18 if dtype == torch.float32 else 2.0**32
    idx, targets = batch()
    x = model.transformer.wte(idx)
    if model.config.rope_theta is None:
        x = x + model.transformer.wpe(torch.arange(T))
    p_prev = p = nearest(x.double())
    layers = sorted([*range(L)] * (2 if scheme == 'symplectic' else 1))     # symplectic: 0 0 1 1 2 2 3 3
    for j, f in zip(layers, increments(model)):
        a = model.config.per_layer('a')[j]
        h = model.config.per_layer('h')[j]
        fp = f(p.to(dtype)).double()
        if scheme == 'midpoint':
            p_next = p_prev + nearest(2 * h * fp)
        elif scheme == 'leapfrog':
            p_next = 2 * p - p_prev + nearest(h**2 * fp)
        elif scheme == 'midpoint_a':
            p_next = below(a * p_prev + (1 - a) * p) + nearest(h * fp)
        else:
            p_next = p_prev + nearest(fp)
        p_prev, p = p, p_next
    logits = model.lm_head(model.transformer.ln_f(p.to(dtype)))
    F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    return {name: weight.grad for name, weight in model.named_parameters()}

def check_against_autograd(scheme, stored_layers=0, amplify=1):
    got = gradients(build(amplify, stored_layers=stored_layers, **scheme))
    assert error(got, autograd_gradients(build(amplify, **scheme), exact=True)) < 1e-5

@every_scheme
@pytest.mark.parametrize('amplify', [1, 8])
@pytest.mark.parametrize('stored_layers', [0, 1, L])
def test_exact_gradients_are_those_of_the_equations(scheme, stored_layers, amplify):
    check_against_autograd(scheme, stored_layers, amplify)

@pytest.mark.parametrize('amplify', [1, 8])
@pytest.mark.parametrize('scheme', [*SCHEMES, dict(scheme='midpoint_a', a=[1.25, -1.0, -1.5, 1.0])], ids=str)
def test_float64_gradients_equal_autograd(scheme, amplify):
    steps = build(**scheme).config.coefficients()
    damped = any(abs(step.a) < 1 for step in steps)             # floats amplify errors there
    for stored_layers in [L] if damped else [0, 1, L]:
        got = gradients(build(amplify, exact=False, stored_layers=stored_layers, **scheme).double())
        want = autograd_gradients(build(amplify, exact=False, **scheme).double(), exact=False)
        assert error(got, want) < 1e-10

@every_scheme
@pytest.mark.parametrize('stored_layers', [0, 1, L])
def test_directional_derivative_by_finite_differences(scheme, stored_layers):
    model = build(4, stored_layers=stored_layers, **scheme).double()
    grads = gradients(model)
    direction = {name: torch.randn_like(w) * w.std() for name, w in model.named_parameters()}
    floats = build(exact=False, **scheme).double()      # the same function, without the steps of its grid
    losses = []
    with torch.no_grad():
        for eps in (1e-5, -1e-5):
            for name, w in floats.named_parameters():
                w.copy_(model.get_parameter(name) + eps * direction[name])
            losses.append(floats(*batch())[1])
    slope = sum((grads[name] * direction[name]).sum() for name in grads)
    assert abs((losses[0] - losses[1]) / 2e-5 - slope) < 1e-6 * abs(slope)

# -----------------------------------------------------------------------------
# 4. planted faults: a line of model.py is found by its comment, and its code is replaced

EXACT = lambda: check_exact(LEAPFROG)
RIGHT = lambda: check_against_autograd(LEAPFROG)
FAULTS = {
    'f added on the way down': (EXACT, {'# - c * f(p)': 'v.add_(to_state(fx, c * one, v.dtype))'}),
    'v added on the way down': (EXACT, {'# p = p - v': 'p.add_(v)'}),
    'v not divided by a': (lambda: check_exact(SCHEMES[5]), {'# / -a': 'pass'}),
    'the remembered bits lost': (lambda: check_exact(BITS), {'# the bits again': 'pass'}),
    'another dropout mask': (lambda: check_exact(LEAPFROG, dropout=0.1), {'# the same masks again': 'pass'}),
    'f evaluated again outside autocast': (lambda: check_exact(LEAPFROG, torch.bfloat16), {
        '# f(p), once per step': 'self.autocast["enabled"] = False; x, fx = graph or self.evaluate(f, p)'}),
    'v not started at 0': (EXACT, {'so v is 0': 'self.v = self.p.clone()'}),
    'p replaced by v': (RIGHT, {'# p = p + v': 'p.copy_(v)'}),
    '-a on the wrong side': (lambda: check_against_autograd(MIDPOINT), {
        '# -a * v': 'pass', '# + c * f(p)': 'v.add_(to_state(fx, c * one, v.dtype)).mul_(-n)'}),
    'the weight gradients of one slice lost': (RIGHT, {'# of all slices': 'g_weights = g_w'}),
    'g_p not added to g_v': (RIGHT, {'# g_v = g_v + g_p': 'pass'}),
    'g_p added to g_v after the product': (RIGHT, {
        '# g_v = g_v + g_p': 'pass', '# g_p = g_p + c * J^T g_v': 'g_p.add_(g_x); g_v.add_(g_p)'}),
    'g_p overwritten': (RIGHT, {'# g_p = g_p + c * J^T g_v': 'g_p.copy_(g_x)'}),
    'a sign in the gradient of v': (RIGHT, {'# g_v = -a * g_v': 'multiply(g_v, a)'}),
    'dL/dx taken from v': (RIGHT, {'# dL/dx': 'g_handle = self.g_v'}),
}

@pytest.mark.parametrize('fault', FAULTS)
def test_planted_fault_is_noticed(fault, monkeypatch):
    check, changes = FAULTS[fault]
    with open(model_py.__file__) as file:
        source = file.read()
    for comment, code in changes.items():
        lines = source.splitlines()
        places = [i for i, line in enumerate(lines) if line.endswith(comment)]
        assert len(places) == 1, f'one line of model.py must end with "{comment}"'
        line = lines[places[0]]
        lines[places[0]] = line[:len(line) - len(line.lstrip())] + code
        source = '\n'.join(lines)
    faulty = dict(__name__='model')
    exec(source, faulty)
    for name in ('GPT', 'GPTConfig', 'Tape'):
        monkeypatch.setitem(globals(), name, faulty[name])
    with pytest.raises(AssertionError):
        check()
