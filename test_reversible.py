"""
What must be true of the hand-written backward, in about a minute on two CPU cores:  python -m pytest test_reversible.py

1. exact: gradients with stored and with rebuilt activations are equal bit for bit, and so is every rebuilt state; a step
   notices by itself if one bit of one layer was not
2. right: they are also the gradients of the recurrence, by an independent autograd version and by finite differences
3. these checks can fail: each fault planted in a copy of model.py must be noticed
4. small: between forward and backward nothing lives that grows with depth, except k bits per element where a = n / 2^k

tests/test_model.py has the rest of what one expects of a GPT.
"""
import gc
import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

import model as model_py
from runtime import compile_parts, recorded_states

B, T, V, L = 2, 16, 65, 4
SHAPE = dict(block_size=T, vocab_size=V, n_layer=L, n_head=4, n_embd=32, slice_tokens=T)     # two slices of one sequence
SCHEMES = [dict(scheme='midpoint'), dict(scheme='leapfrog'), dict(scheme='symplectic'), dict(scheme='midpoint_a'),
           dict(scheme='midpoint_a', a=[0.5, -0.5, 1 / 16, -1.25], h=[0.7, 1.3, 1.0, 1.1]),
           dict(scheme='midpoint_a', a=[0.75, 3 / 256, 1.0, -1.0]), dict(scheme='midpoint_sum'),
           dict(scheme='midpoint_a', a='bdia'),
           dict(scheme='midpoint_a', a=0.5, h=[1.0, 1.5, 1.5, 1.5], norm='rmsnorm', mlp='swiglu', n_inner=48, n_kv_head=2,
                rope_theta=1e4, tied=False, bias=False)]                                    # a Llama, as retrofitted
LEAPFROG, BDIA = SCHEMES[1], SCHEMES[7]
every_scheme = pytest.mark.parametrize(
    'scheme', SCHEMES, ids=lambda s: 'Llama' if 'norm' in s else ' '.join(str(v) for v in s.values()))

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
    results = []
    with recorded_states(module.ReversibleStep) as (forward_states, rebuilt_states):
        for stored_layers in (L, 1, 0):
            model = build(module, amplify, dropout=dropout, stored_layers=stored_layers, **scheme)
            if compiled:
                compile_parts(model)
            results.append(gradients(model, dtype))
            steps = 2 * L if scheme['scheme'] == 'symplectic' else L
            assert len(forward_states) == len(rebuilt_states) == steps
            while forward_states:
                assert torch.equal(forward_states.pop(), rebuilt_states.pop(0)), 'a rebuilt state differs'
    for result in results[1:]:
        for name, grad in results[0].items():
            assert grad.isfinite().all() and torch.equal(grad, result[name]), f'the gradient of {name} differs'
    assert model.mismatches == 0

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

@every_scheme
def test_the_whole_batch_as_one_slice_is_exact_too_and_has_the_same_gradients(scheme):
    sliced = gradients(build(amplify=8, **scheme))
    whole = dict(scheme, slice_tokens=B * T)
    check_exact(model_py, whole, torch.bfloat16, dropout=0.1, amplify=8)
    assert 0 < error(gradients(build(amplify=8, **whole)), sliced) < 1e-5

def plant_one_bit(model, step):
    """When this step is undone, in the first of its two slices, one element of p_next is 2^-32 too large or too small."""
    calls, (advance, rebuild) = [], model.recurrence

    def faulty_rebuild(p_next, *args):
        calls.append(0)
        if len(calls) == 2 * (len(list(model.steps())) - 1 - step) + 1:
            p_next[0, 3, 5] ^= 1
        return rebuild(p_next, *args)
    model.recurrence = advance, faulty_rebuild

@every_scheme
@pytest.mark.parametrize('dtype, dropout, amplify', [(torch.float32, 0.0, 1), (torch.bfloat16, 0.1, 8)])
@pytest.mark.parametrize('stored_layers', [0, L])
@pytest.mark.parametrize('step', [0, 1, L - 1])
def test_a_step_notices_one_wrong_bit_in_one_layer(scheme, step, stored_layers, dtype, dropout, amplify):
    model = build(amplify=amplify, dropout=dropout, stored_layers=stored_layers, **scheme)
    sound = model.recurrence
    plant_one_bit(model, step)
    gradients(model, dtype)
    assert model.mismatches > 0
    model.mismatches, model.recurrence = 0, sound
    gradients(model, dtype)
    assert model.mismatches == 0

@pytest.mark.parametrize('how', ['verify=False', 'exact=False', 'frozen'])
def test_where_nothing_can_be_compared_nothing_is(how):
    model = build(**({'verify': False} if how == 'verify=False' else {'exact': False} if how == 'exact=False' else {}))
    if how == 'frozen':
        for module in (model.transformer.wte, model.transformer.wpe, model.transformer.h[0]):
            module.requires_grad_(False)
    if how != 'exact=False':
        plant_one_bit(model, L - 1)
    gradients(model)
    assert type(model.mismatches) is int and model.mismatches == 0

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
    before = None
    for block in model.transformer.h:
        def attention(x, block=block):
            return block.attn(block.ln_1(x))

        def mlp(x, block=block):
            return block.mlp(block.ln_2(x))

        if model.config.scheme == 'symplectic':
            yield from (attention, mlp)
        elif model.config.scheme == 'midpoint_sum':
            def both(x, attention=attention, mlp=mlp, before=before):
                fx = attention(x) + mlp(x + attention(x))
                return fx if before is None else fx + before(x)

            yield both
            before = lambda x, attention=attention, mlp=mlp: attention(x) + mlp(x + attention(x))
        else:
            yield lambda x, attention=attention, mlp=mlp: attention(x) + mlp(x + attention(x))

def autograd_loss(model, scheme, exact):
    """The paper's equations as they are written there, the states in float64, on a grid of 2^-32 where exact."""
    def grid(x, down=False):
        return StraightThrough.apply(x, lambda y: (y * 2**32).floor() / 2**32 if down
                                     else (y * 2**32).round() / 2**32) if exact else x

    dtype = model.lm_head.weight.dtype
    idx, targets = batch()
    x = model.transformer.wte(idx)
    if model.config.rope_theta is None:
        x = x + model.transformer.wpe(torch.arange(T))
    h = model.config.h if isinstance(model.config.h, list) else [model.config.h] * L
    a = model.config.a if isinstance(model.config.a, list) else [model.config.a] * L
    if 'bdia' in a:
        torch.manual_seed(2)                # as gradients() has it
        a = [step.n / 2**step.bits for step in model.config.coefficients()]
        assert {abs(x) for x in a} == {0.5}
        h = [1 + x for x in a]
    old = new = grid(x.double())
    for j, f in enumerate(increments(model)):
        fx = f(new.to(dtype)).double()
        if scheme['scheme'] == 'midpoint':
            following = old + grid(2 * h[j] * fx)
        elif scheme['scheme'] == 'leapfrog':
            following = 2 * new - old + grid(h[j]**2 * fx)
        elif scheme['scheme'] in ('symplectic', 'midpoint_sum'):
            following = old + grid(fx)
        else:
            following = grid(a[j] * old + (1 - a[j]) * new, down=True) + grid(h[j] * fx)
        old, new = new, following
    x = model.transformer.ln_f(new.to(dtype))
    return F.cross_entropy(F.linear(x, model.lm_head.weight).flatten(0, 1), targets.flatten())

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

@pytest.mark.parametrize('amplify', [1, 8])
@pytest.mark.parametrize('scheme', [*SCHEMES, dict(scheme='midpoint_a', a=[1.25, -1.0, -1.5, 1.0])], ids=str)
def test_float64_gradients_equal_autograd(scheme, amplify):
    model = build(**scheme)
    damped = any(abs(step.n) < 2**step.bits for step in model.coefficients)    # |a| < 1: the float inverse amplifies errors
    for stored_layers in [L] if damped else [0, 1, L]:
        model = build(amplify=amplify, exact=False, stored_layers=stored_layers, **scheme).double()
        got = gradients(model)
        reference = build(amplify=amplify, exact=False, **scheme).double()
        autograd_loss(reference, scheme, exact=False).backward()
        assert error(got, {name: weight.grad for name, weight in reference.named_parameters()}) < 1e-10

@every_scheme
@pytest.mark.parametrize('stored_layers', [0, 1, L])
def test_directional_derivative_by_finite_differences(scheme, stored_layers):
    model = build(amplify=4, stored_layers=stored_layers, **scheme).double()
    grads, direction, eps = gradients(model), {}, 1e-5
    floats = build(exact=False, **scheme).double()      # the same function, without the steps of its grid
    losses = []
    with torch.no_grad():
        for name, weight in model.named_parameters():
            direction[name] = torch.randn(weight.shape, dtype=weight.dtype) * weight.std()
        for step in (eps, -eps):
            for name, weight in model.named_parameters():
                floats.get_parameter(name).copy_(weight + step * direction[name])
            torch.manual_seed(2)            # as gradients() has it
            losses.append(floats(*batch())[1])
    slope = sum((grads[name] * direction[name]).sum() for name in grads)
    assert abs((losses[0] - losses[1]) / (2 * eps) - slope) < 1e-6 * abs(slope)

def method_of_the_readme():
    """The README's Python code, run as a module."""
    with open(os.path.join(os.path.dirname(model_py.__file__), 'README.md')) as file:
        code = file.read().split('```python\n')[1].split('```')[0]
    method = {'__name__': 'method'}
    exec(code, method)
    return code, method

@pytest.mark.parametrize('amplify', [1, 8])
@pytest.mark.parametrize('scheme', [SCHEMES[0], SCHEMES[1], SCHEMES[2], dict(scheme='midpoint_a', a=-1.0)], ids=str)
def test_the_method_in_the_readme_has_the_same_gradients(scheme, amplify):
    model = build(amplify=amplify, exact=False, **scheme).double()
    want = gradients(model)
    idx, targets = batch()
    code, method = method_of_the_readme()
    step = model.coefficients[0]
    method.update(a=step.n, b=step.m, c=step.c)
    layers = [f for _, f, _ in model.steps()]
    model.zero_grad()
    x = model.transformer.wte(idx) + model.transformer.wpe(torch.arange(T))
    p_prev, p = method['forward'](x, layers)
    F.cross_entropy(model.lm_head(model.transformer.ln_f(p.requires_grad_())).flatten(0, 1), targets.flatten()).backward()
    x.backward(method['backward'](p_prev, p.detach(), p.grad, layers))
    assert error({name: weight.grad for name, weight in model.named_parameters()}, want) < 1e-10

def test_the_example_in_the_readme_learns(capsys):
    code, _ = method_of_the_readme()
    torch.manual_seed(0)
    exec(code, {'__name__': '__main__'})
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 20 and losses[-1] < 0.5 * losses[0]

# -----------------------------------------------------------------------------
# 3. planted faults

FAULTS = {
    'a sign in the inverse': (
        's = p_next.sub_(', 's = p_next.add_(', lambda m: check_exact(m, LEAPFROG)),
    'b * p added instead of subtracted': (
        's.sub_(p, alpha=m)', 's.add_(p, alpha=m)', lambda m: check_exact(m, LEAPFROG)),
    'n not divided by': (
        's.mul_(inverse)', 's.mul_(1)', lambda m: check_exact(m, SCHEMES[5])),
    'the pair of states not swapped': (
        'tape.upper, tape.lower, ctx.depth + 1', 'tape.lower, tape.upper, ctx.depth + 1', lambda m: check_against_autograd(m, LEAPFROG)),
    'another dropout mask': (
        'tape.generator.set_rng_state(ctx.rng_state)', 'pass', lambda m: check_exact(m, LEAPFROG, dropout=0.1)),
    'other signs in the backward pass of BDIA': (
        'cut_off, ctx.coefficients)', 'cut_off, tape.model.config.coefficients()[ctx.depth])', lambda m: check_exact(m, BDIA)),
    'other signs in the gradients of BDIA': (
        'ctx.saved_tensors, ctx.coefficients', 'ctx.saved_tensors, ctx.tape.model.config.coefficients()[ctx.depth]',
        lambda m: check_against_autograd(m, BDIA)),
    'the remembered bits lost': (
        '.bitwise_or_(unpack(cut_off, bits, s.shape))', '', lambda m: check_exact(m, SCHEMES[4])),
    'f evaluated again outside autocast': (
        'graph or build_graph(ctx, p)', "graph or (ctx.autocast.update(enabled=False), build_graph(ctx, p))[1]",
        lambda m: check_exact(m, LEAPFROG, torch.bfloat16)),
    'the weight gradients of one slice lost': (
        '[one + other for one, other in zip(g_weights, g_w)] if g_weights else g_w', 'g_w',
        lambda m: check_against_autograd(m, LEAPFROG)),
    'b dropped from the adjoint': (
        'alpha=b', 'alpha=0', lambda m: check_against_autograd(m, LEAPFROG)),
    'a flipped in the adjoint': (
        'g_next *= a', 'g_next *= -a', lambda m: check_against_autograd(m, LEAPFROG)),
    'the gradient of p overwritten, not added to': (
        'g += c_vjp', 'g[:] = c_vjp', lambda m: check_against_autograd(m, LEAPFROG)),
    'dL/dx without g_{-1}': (
        'tape.g_upper.add_(tape.g_lower)', 'tape.g_upper', lambda m: check_against_autograd(m, SCHEMES[0])),
    'dL/dx without g_0': (
        'tape.g_upper.add_(tape.g_lower)', 'tape.g_lower', lambda m: check_against_autograd(m, SCHEMES[0])),
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
    """Stands in for a saved tensor in autograd's graph, so that one can count those that are still held."""

    def __init__(self, tensor):
        self.tensor = tensor.detach()     # otherwise it would hold the graph that holds this

def alive(scheme, n_layer):
    """Bytes that are alive after forward: int64 states, packed bits, RNG states, and everything else but weights."""
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

@pytest.mark.parametrize('scheme, k', [*[(scheme, 0) for scheme in SCHEMES[:3]], (SCHEMES[6], 0), (BDIA, 1), (dict(SCHEMES[8], h=1.5), 1),
                                       *[(dict(scheme='midpoint_a', a=1 / 2**k), k) for k in (1, 2, 4, 8)]])
def test_only_the_last_pair_and_the_bits_live_until_backward(scheme, k):
    few, many, elements = alive(scheme, 2), alive(scheme, 12), B * T * 32
    assert few['states'] == many['states'] == 2 * 8 * elements
    assert (few['bits'], many['bits']) == (2 * elements * k // 8, 12 * elements * k // 8)
    assert many['rng'] == 6 * few['rng']            # one per step
    assert few['others'] == many['others']          # what embedding, final norm and loss keep

def test_the_count_sees_what_ordinary_autograd_and_checkpointing_keep():
    state = 4 * B * T * 32
    stored, checkpointed = ([alive(dict(scheme='standard', stored_layers=k and n), n)['others'] for n in (2, 12)]
                            for k in (True, False))
    assert stored[1] - stored[0] > 10 * 10 * state
    assert 10 * state <= checkpointed[1] - checkpointed[0] < 10 * 2 * state

PEAK = """
import sys, torch, model
def status(key):
    with open('/proc/self/status') as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) * 1024
configs = eval(sys.argv[1])
for kwargs in (configs[0], *configs):                       # the first pays for what torch does at its first use
    gpt = model.GPT(model.GPTConfig(block_size=256, vocab_size=256, n_head=4, n_embd=128, **kwargs))
    idx = torch.randint(256, (12, 256))
    with open('/proc/self/clear_refs', 'w') as file:
        file.write('5')                                     # resets the peak
    before = status('VmRSS')
    gpt(idx, idx)[1].backward()
    print(status('VmHWM') - before)
    del gpt
"""

needs_proc = pytest.mark.skipif(not os.path.exists('/proc/self/clear_refs'), reason='peak resident memory is read from Linux /proc')

def peaks_in_a_fresh_process(*configs):
    """Bytes that a forward and backward pass takes, for each of these configs."""
    # glibc keeps freed blocks of less than this for reuse, which would hide how flat the curve is
    environment = dict(os.environ, MALLOC_MMAP_THRESHOLD_='65536')
    output = subprocess.run([sys.executable, '-c', PEAK, str(configs)], check=True, env=environment,
                            cwd=os.path.dirname(model_py.__file__), capture_output=True).stdout
    return [int(line) for line in output.split()][1:]

@needs_proc
def test_peak_memory_does_not_grow_with_depth():
    weight_gradients = 4 * sum(w.numel() for w in build(n_embd=128).transformer.h[0].parameters())
    elements = 12 * 256 * 128
    configs, bits = [LEAPFROG, SCHEMES[2], dict(scheme='midpoint_a', a=-0.5)], [0, 0, 1]
    lowest = [float('inf')] * 3
    for _ in range(3):                                      # Linux counts to a megabyte or two
        *peaks, two, four = peaks_in_a_fresh_process(*(dict(config, n_layer=n_layer) for n_layer in (2, 12) for config in configs),
                                                     *(dict(scheme='standard', n_layer=n_layer) for n_layer in (2, 4)))
        lowest = [min(before, (many - few) / 10) for before, few, many in zip(lowest, peaks, peaks[3:])]
        if all(slope < 1.2 * weight_gradients + k / 8 * elements for slope, k in zip(lowest, bits)):
            break
    else:
        raise AssertionError(f'bytes per layer {lowest}, gradients of weights {weight_gradients}')
    assert (four - two) / 2 > 20 * weight_gradients

@needs_proc
def test_slices_make_a_layer_at_work_smaller():
    whole, sliced = peaks_in_a_fresh_process(*(dict(LEAPFROG, n_layer=2, slice_tokens=tokens) for tokens in (12 * 256, 2 * 256)))
    assert sliced < 0.65 * whole
