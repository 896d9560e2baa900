"""
What one expects of any GPT, of this one too:  python -m pytest tests/test_model.py      (half a minute on two CPU cores)

The loss, what is not finite, dtypes, frozen weights, causality, GPT-2's architecture and nanoGPT's names, accumulation,
DistributedDataParallel, torch.compile, sampling. That the backward pass is exact and right is in test_reversible.py.
"""
import os
import shutil
import socket
import weakref
from dataclasses import asdict

import pytest
import torch
from torch.nn import functional as F

import model as model_py
from pretrained import turn_weights
from runtime import adamw, compile_parts
from test_reversible import (LEAPFROG, SCHEMES, SHAPE, B, L, T, V, batch, build, check_exact, error, every_scheme, gradients)

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
            loss = F.cross_entropy(model.lm_head(model.transformer.ln_f(x)).flatten(0, 1), targets.flatten(), ignore_index=-1)
        else:
            loss = model.loss(x, targets, chunk=chunk)
        (3 * loss).backward()
        results.append((loss.detach(), x.grad, model.lm_head.weight.grad, *(w.grad for w in model.transformer.ln_f.parameters())))
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch.testing.assert_close(model.loss(x, targets, chunk=chunk), loss.detach(), rtol=1e-5, atol=0)
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

def test_no_chunk_of_the_loss_outlives_itself_in_autocast():
    model, (idx, targets), chunks = build(), batch(), []

    def criterion(logits, targets):
        leaf = logits.grad_fn
        while not hasattr(leaf, 'variable'):
            leaf = leaf.next_functions[0][0]
        chunks.append(weakref.ref(leaf.variable))
        return F.cross_entropy(logits, targets, reduction='sum')

    with torch.autocast('cpu', torch.bfloat16):
        model.loss(model.last_state(idx), targets, criterion, chunk=7)
        assert len(chunks) > 2 and not any(chunk() is not None for chunk in chunks)

FLOATS = [dict(scheme='standard'), *[dict(scheme, exact=False) for scheme in SCHEMES[:4]]]
NOT_FINITE = [float('inf'), float('-inf'), float('nan')]

@pytest.mark.parametrize('scheme, value', [*[(s, x) for s in SCHEMES + FLOATS for x in NOT_FINITE],
                                           *[(s, 1e30) for s in SCHEMES]], ids=str)     # finite, but no state holds it
def test_an_increment_that_is_not_finite_reaches_the_loss(scheme, value):
    for layer in (0, L - 1):
        model = build(**scheme)
        model.transformer.h[layer].mlp.c_proj.weight.data[5, 0] = value
        loss = model(*batch())[1]
        assert not loss.isfinite()
        assert not model(batch()[0])[0].isfinite().any()
        loss.backward()
        assert not model.transformer.wte.weight.grad[batch()[0]].isfinite().any()     # rows of tokens not seen are 0

def test_float16_recovers_with_its_scaler():
    """An overflow in the scaled backward pass skips the step and lowers the scale; then training goes on."""
    model = build(amplify=8, **LEAPFROG)
    optimizer = adamw(model, 0.1, 1e-3, (0.9, 0.99))
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

def test_dropout_is_where_gpt2_has_it():
    model = build(dropout=0.5, **LEAPFROG)
    attn, mlp, x = model.transformer.h[0].attn, model.transformer.h[0].mlp, torch.randn(8, T, 32)
    for part in (attn, mlp):
        y = part.train()(x)
        assert 0.4 < (y == 0).float().mean() < 0.6
        survivors_are_plain = torch.allclose(y[y != 0], 2 * part.eval()(x)[y != 0], rtol=1e-4, atol=1e-5)
        assert survivors_are_plain == (part is mlp)     # attention's weights were dropped before its output was
    seen = []
    model.integrate = lambda x, cache: seen.append(x) or x
    model.hidden(batch()[0])
    assert 0.4 < (seen[0] == 0).float().mean() < 0.6

def test_weight_decay_is_for_matrices():
    model = build(**LEAPFROG)
    model.transformer.wpe.weight.requires_grad_(False)
    decayed, left = adamw(model, 0.1, 1e-3, (0.9, 0.99)).param_groups
    assert (decayed['weight_decay'], left['weight_decay']) == (0.1, 0.0)
    assert len(decayed['params']) == 1 + 4 * L and all(w.dim() == 2 for w in decayed['params'])
    assert len(left['params']) == 2 + 8 * L and all(w.dim() == 1 for w in left['params'])

@pytest.mark.parametrize('exact', [True, False])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_whole_models_in_half_precision(dtype, exact):
    assert model_py.GPT(model_py.GPTConfig(**SHAPE, exact=exact)).to(dtype)(*batch())[1].isfinite()

@every_scheme
def test_a_frozen_embedding_leaves_the_other_gradients_as_they_are(scheme):
    want = gradients(build(**scheme))
    model = build(**scheme)
    for name, weight in model.named_parameters():
        weight.requires_grad_('wte' not in name and 'wpe' not in name)
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
    x = model.last_state(batch()[0])
    grads = torch.autograd.grad((x**2).sum(), list(model.transformer.h.parameters()), create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable|does not require grad'):       # there are no second derivatives
        sum(grad.sum() for grad in grads).backward()

@pytest.mark.parametrize('frozen', [0, 1, 3])
def test_nothing_stays_on_the_tape_while_the_loss_lives(frozen):
    model = build(dropout=0.1, **LEAPFROG)
    if frozen:
        for module in (model.transformer.wte, model.transformer.wpe, *model.transformer.h[:frozen]):
            module.requires_grad_(False)
    x = model.last_state(batch()[0])
    tape = x.grad_fn.tape
    loss = model.loss(x, batch()[1])
    loss.backward()
    assert tape.lower is tape.upper is tape.g_lower is tape.g_upper is None

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

def test_bdia_draws_signs_in_training_and_is_the_standard_net_otherwise():
    model, standard = build(scheme='midpoint_a', a='bdia', dropout=0.1), build(scheme='standard', dropout=0.1)
    standard.load_state_dict(model.state_dict())
    drawn = set()
    for seed in range(20):
        torch.manual_seed(seed)
        model(*batch())
        drawn.add(tuple(step.n for step in model.coefficients))
        assert all((step.bits, step.m, step.c) == (1, 2 - step.n, 1 + step.n / 2) for step in model.coefficients)
    assert len(drawn) > 6 and {n for signs in drawn for n in signs} == {-1, 1}
    model.eval(), standard.eval()
    idx = batch()[0]
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
            assert torch.equal(model(*batch())[1], standard(*batch())[1]) and torch.equal(model.hidden(idx), standard.hidden(idx))
    assert torch.equal(model.generate(idx[:, :5], 8, temperature=0), standard.generate(idx[:, :5], 8, temperature=0))

def test_states_may_overflow_and_are_rebuilt_all_the_same():
    """int64 wraps around, and dividing by n is a multiplication modulo 2^64: nothing that wraps is lost."""
    for n, m, bits in [(1, 0, 0), (-1, 2, 0), (3, 1, 2), (-5, 9, 2), (255, 1, 8), (7, 9, 4), (-3, 35, 5)]:
        p_prev, p = torch.randint(-2**63, 2**63 - 1, (2, 2, 3, 5))
        fx = 1e9 * torch.randn(2, 3, 5)
        step = model_py.Coefficients(n, m, 1, bits, model_py.integer_inverse(n))
        p_next, cut_off = model_py.advance(p_prev.clone(), p, fx, step)
        assert torch.equal(model_py.rebuild(p_next, p, fx, cut_off, step), p_prev)

@pytest.mark.parametrize('scheme', [s for s in SCHEMES if 'norm' not in s], ids=str)
@pytest.mark.parametrize('large, finite', [(2.0**13, True), (2.0**33, False)])
def test_a_state_that_finite_increments_carry_out_of_range_is_nan(scheme, large, finite):
    """f is the same everywhere, so that nothing cancels; each increment alone is within the range."""
    model = build(**dict(scheme, n_layer=16, **({'a': -0.5, 'h': None} if isinstance(scheme.get('a'), list) else {})))
    for name, weight in model.transformer.h.named_parameters():
        torch.nn.init.zeros_(weight)
        if name.endswith('mlp.c_proj.bias'):
            weight.data[0] = large / 16
    state = model.last_state(batch()[0])
    assert state.isfinite().all() == finite and finite == (not state.isnan().all())

@pytest.mark.parametrize('scheme', SCHEMES, ids=str)
def test_no_state_is_beyond_its_bound(scheme, monkeypatch):
    model, largest, bounds = build(amplify=8, **scheme), [], []
    (advance, rebuild), bound = model.recurrence, model_py.Tape.bound

    def watched(p_prev, p, fx, coefficients):
        largest.append(max(abs(coefficients.n) * p_prev.abs().max() + abs(coefficients.m) * p.abs().max(), p.abs().max()))
        result = advance(p_prev, p, fx, coefficients)
        largest.append(result[0].abs().max())
        return result

    model.recurrence = watched, rebuild
    monkeypatch.setattr(model_py.Tape, 'bound', lambda tape: bounds.append(bound(tape)) or bounds[0])
    model.last_state(batch()[0])
    assert 0 < max(largest) / model_py.ONE <= bounds[0]

def test_slices_are_of_equal_size_where_up_to_twice_as_many_will_do():
    for (B, T), sizes in {(60, 1024): [6] * 10, (8, 1024): [8], (64, 1024): [8] * 8, (2, 16384): [1, 1], (59, 1024): [8] * 3 + [7] * 5,
                          (1, 10**6): [1], (8, 256): [8]}.items():
        parts = torch.empty(B, 1).tensor_split(model_py.n_slices(B, T, 8192))
        assert [len(part) for part in parts] == sizes, (B, T)

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
        each.transformer.wpe.weight.requires_grad_(not frozen)
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
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('scheme', SCHEMES, ids=str)
def test_compiled_blocks_are_exact_too(scheme, dtype):
    few = [(LEAPFROG, torch.float32), (SCHEMES[2], torch.bfloat16), (SCHEMES[4], torch.bfloat16)]
    if (scheme, dtype) not in few and 'COMPILE_ALL' not in os.environ:
        pytest.skip('it takes half a minute: COMPILE_ALL=1 python -m pytest tests/test_model.py -k compiled_blocks')
    torch._dynamo.reset()
    check_exact(model_py, scheme, dtype, dropout=0.1, amplify=8, compiled=True)

@compiler
def test_annealing_compiles_one_recurrence_for_all_a_of_as_many_bits():
    """In retrofit.py a takes up to 193 values on its way to 1."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = build(**LEAPFROG)
    compile_parts(model)
    advance, rebuild = model.recurrence
    p_prev, p = torch.randint(-2**40, 2**40, (2, 3, 5, 7))
    for n in (65, 67, 101, 255):
        step = model_py.Coefficients(n, 256 - n, 1 + n / 256, 8, model_py.integer_inverse(n))
        fx = torch.randn(3, 5, 7)
        p_next, cut_off = advance(p_prev.clone(), p, fx, step)
        assert torch.equal(p_next, model_py.advance(p_prev.clone(), p, fx, step)[0])
        assert torch.equal(rebuild(p_next, p, fx, cut_off, step), p_prev)
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] <= 4         # the first a, and all others: each way

@compiler
def test_a_compiled_chunk_of_the_loss_is_one_graph_for_all_chunks():
    model, plain, (idx, targets) = build(), build(), batch()
    compile_parts(model)
    frames = torch._dynamo.utils.counters['stats']
    before = frames['unique_graphs']
    for each in (plain, model):
        each.loss(torch.randn(B, T, 32, generator=torch.Generator().manual_seed(3)).requires_grad_(), targets, chunk=8).backward()
    assert frames['unique_graphs'] == before + 1
    for name in ('lm_head.weight', 'transformer.ln_f.weight'):
        torch.testing.assert_close(model.get_parameter(name).grad, plain.get_parameter(name).grad)

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

def test_turned_weights_are_the_same_weights():
    model = build(amplify=4, n_inner=48, **LEAPFROG).eval()
    want, weights = model(batch()[0])[0], {name: weight.clone() for name, weight in model.state_dict().items()}
    turn_weights(model)
    assert torch.allclose(model(batch()[0])[0], want, rtol=1e-4, atol=1e-5)
    turned = {name for name, weight in model.state_dict().items() if not weight.is_contiguous()}
    assert {'lm_head.weight', 'transformer.wte.weight', 'transformer.h.0.attn.c_attn.weight'} <= turned
    assert 'transformer.h.0.mlp.c_proj.weight' not in turned
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())

LLAMA = dict(norm='rmsnorm', mlp='swiglu', n_inner=48, n_kv_head=2, rope_theta=1e4, tied=False, bias=False)

@pytest.mark.parametrize('family', [{}, LLAMA], ids=['gpt2', 'llama'])
@pytest.mark.parametrize('scheme', [*FLOATS, LEAPFROG, SCHEMES[0], SCHEMES[2], dict(scheme='midpoint_sum'),
                                    dict(scheme='midpoint_a', a=[0.75, -0.5, 1.0, -1.25])], ids=str)
def test_cached_tokens_are_those_of_a_full_recomputation(scheme, family):
    """Greedy and drawn, from a prompt of several tokens, to beyond block_size; and a token is computed once up to there."""
    model, seen = build(amplify=4, **{**family, **scheme}).eval(), []
    model.transformer.wte.register_forward_hook(lambda module, args, result: seen.append(args[0].size(1)))
    prompt = batch()[0][:, :3]
    for how in (dict(temperature=0), dict(temperature=1.0, top_k=20)):
        texts = []
        for cached in (True, False):
            torch.manual_seed(3)
            texts.append(model.generate(prompt, T + 4, cached=cached, **how))
        assert torch.equal(*texts)
    assert seen[:T + 4] == [3, *[1] * (T - 3), *[T] * 6]
    assert len(texts[0].unique()) > 5                               # not one token forever
