"""
What one expects of any GPT, of this one too:  python -m pytest tests/test_model.py  (half a minute on a CPU)

The loss, numbers out of range, GPT-2's architecture, what autograd and several processes ask of a backward
pass, torch.compile, sampling. That gradients are exact and right is in test_reversible.py.
"""
import gc
import os
import shutil
import weakref
from dataclasses import asdict

import pytest
import torch
from torch.nn import functional as F

import model as model_py
from model import GPT, GPTConfig, cross_entropy
from pretrained import turn_weights
from runtime import adamw
from test_reversible import (LEAPFROG, LLAMA, SCHEMES, SHAPE, B, L, T, V, batch, build, check_exact, error,
                             every_scheme, gradients)

FLOATS = [dict(scheme='standard'), *[dict(scheme, exact=False) for scheme in SCHEMES[:4]]]

def grads_of(model):
    return {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}

@pytest.mark.parametrize('chunk', [1, 7, B * T, 1000])
@pytest.mark.parametrize('frozen', [False, True])
def test_chunked_loss_equals_the_plain_one(frozen, chunk):
    """The criterion gets two more rows per target, as in distillation: a weight, and probabilities (V)."""
    def criterion(logits, targets, weights, wanted):
        return weights @ F.cross_entropy(logits, wanted, reduction='none') + cross_entropy(logits, targets)

    idx = batch()[0]
    targets = batch()[1].index_fill(1, torch.arange(3, 9), -1)
    rows = targets, torch.rand(B, T), torch.rand(B, T, V).softmax(-1)
    plain, model = (build() for _ in range(2))
    for each in (plain, model):
        each.transformer.ln_f.requires_grad_(not frozen)
        each.lm_head.requires_grad_(not frozen)
    logits = plain.lm_head(plain.hidden(idx)).flatten(0, 1)
    usual = F.cross_entropy(logits, targets.flatten(), ignore_index=-1)
    torch.testing.assert_close(model(idx, targets), (None, usual))
    want = criterion(logits, *(row.flatten(0, 1) for row in rows)) / (targets != -1).sum()
    loss = model.loss(model.last_state(idx), rows, criterion, chunk)
    with torch.no_grad():
        again = model.loss(model.last_state(idx), rows, criterion, chunk)
    torch.testing.assert_close((loss, again), (want, want))
    (3 * loss).backward()
    (3 * want).backward()
    assert error(grads_of(model), grads_of(plain)) < 1e-5

def test_logits_are_never_whole_in_memory():
    """Of 3 x 1024 tokens and a vocabulary of 4096, no tensor of forward and backward has all the logits."""
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            leaves = torch.utils._pytree.tree_leaves(result)
            sizes.extend(x.numel() for x in leaves if isinstance(x, torch.Tensor))
            return result

    idx = torch.randint(4096, (3, 1024))
    with Watch():
        build(vocab_size=4096, block_size=1024)(idx, idx)[1].backward()
    assert max(sizes) == 1024 * 4096

def test_no_chunk_of_the_loss_outlives_itself_in_autocast():
    model = build()
    chunks = []
    model.transformer.ln_f.register_forward_pre_hook(lambda ln_f, args: chunks.append(weakref.ref(args[0])))
    with torch.autocast('cpu', torch.bfloat16):
        loss = model.loss(torch.randn(B, T, 32), batch()[1], chunk=7)
        assert loss.requires_grad and [chunk() for chunk in chunks] == [None] * 5

@pytest.mark.parametrize('value', [float('inf'), float('-inf'), float('nan')])
@pytest.mark.parametrize('scheme', SCHEMES + FLOATS, ids=str)
def test_an_increment_that_is_not_finite_reaches_the_loss(scheme, value):
    idx, targets = batch()
    for layer in (0, L - 1):
        model = build(**scheme)
        model.transformer.h[layer].mlp.c_proj.weight.data[5, 0] = value
        loss = model(idx, targets)[1]
        assert not loss.isfinite() and not model(idx)[0].isfinite().any()
        loss.backward()
        assert not model.transformer.wte.weight.grad[idx].isfinite().any()  # rows of tokens not seen are 0

@every_scheme
def test_a_state_that_leaves_the_range_is_noticed_before_it_wraps(scheme, monkeypatch):
    """The MLPs grow by powers of two. At each kick the tape has a bound already, up to 8 times too large."""
    watch = model_py.Tape.watch
    tapes = []
    values = []

    def watched(tape, *args):
        tapes.append(tape)
        watch(tape, *args)

    def kick(v, fx, step):
        p = tapes[-1].p.double().view(v.shape)
        kicked = -step.a * v.double() + step.c * step.one * fx.double()
        values.extend(x.abs().max() for x in (p, step.n * v.double(), kicked, p + kicked))
        assert max(values) < 1.0001 * 2**31 * tapes[-1].largest() < 8 * max(values)
        return model_py.kick(v, fx, step)

    monkeypatch.setattr(model_py.Tape, 'watch', watched)
    for power in range(60):
        model = build(slice_tokens=B * T, **scheme)
        model.kick = kick
        for block in model.transformer.h:
            block.mlp.c_proj.weight.data.mul_(2.0**power)
        values.clear()
        state = model.last_state(batch()[0])
        wraps = state.isnan().all()
        assert wraps or state.isfinite().all()
        assert (max(values) > 2.0**28 or not wraps) and (max(values) < 2.0**31 or wraps)
        assert wraps == (model.largest > 0.999)
    assert wraps

def check_undone(kick, unkick, a, state_bits=32):
    """Integers wrap around, and dividing by n is a multiplication modulo 2^32: nothing that wraps is lost."""
    step = GPTConfig(scheme='midpoint_a', a=a, h=1.5, state_bits=state_bits).coefficients()[0]
    half = 2**(state_bits - 1)
    v = torch.randint(-half, half - 1, (3, 5, 7), dtype=torch.int32 if state_bits == 32 else torch.int64)
    fx = half / step.one / 20 * torch.randn(3, 5, 7)
    plain, moved = (v.clone() for _ in range(2))
    model_py.kick(plain, fx, step)
    cut_off = kick(moved, fx, step)
    assert torch.equal(moved, plain) and not torch.equal(moved, v)
    unkick(moved, fx, cut_off, step)
    assert torch.equal(moved, v)

@every_scheme
def test_states_of_64_bits_are_exact_too(scheme):
    check_exact(dict(scheme, state_bits=64), torch.bfloat16, dropout=0.1, amplify=8)

@pytest.mark.parametrize('scheme', [dict(scheme='standard', stored_layers=0), *SCHEMES], ids=str)
def test_the_mlp_of_a_long_sequence_goes_tile_by_tile(scheme):
    """Tiles of at most 5 tokens. Gradients differ in rounding alone, and stored layers change no bit."""
    tiled = dict(scheme, slice_tokens=5)
    tokens = []
    model = build(4, **tiled)
    for block in model.transformer.h:
        count = lambda layer, args, result: tokens.append(result[..., 0].numel())
        block.mlp.c_fc.register_forward_hook(count)
    got = gradients(model)
    if scheme['scheme'] == 'standard':
        assert max(tokens) == 5 * B
    else:
        assert 4 <= max(tokens) <= 5
        check_exact(tiled, torch.bfloat16, dropout=0.1, amplify=8)
    assert error(got, gradients(build(4, **scheme))) < 1e-5

def test_states_that_wrap_around_are_undone_all_the_same():
    for a in (1, -1, 0.75, -1.25, 255 / 256, 7 / 16, -3 / 32):
        check_undone(model_py.kick, model_py.unkick, a)
        check_undone(model_py.kick, model_py.unkick, a, state_bits=64)

def test_float16_recovers_with_its_scaler():
    """An overflow in the scaled backward pass skips the step and lowers the scale; then training goes on."""
    model = build(amplify=8, **LEAPFROG)
    optimizer = adamw(model, 0.1, 1e-3, (0.9, 0.99))
    scaler = torch.amp.GradScaler('cpu', init_scale=2.0**40)
    for _ in range(40):
        with torch.autocast('cpu', torch.float16):
            loss = model(*batch())[1]
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    steps = optimizer.state[model.transformer.wte.weight]['step']
    assert loss.isfinite() and 1 < scaler.get_scale() < 2**30 and 10 < steps < 40

@pytest.mark.parametrize('exact', [True, False])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_whole_models_in_half_precision(dtype, exact):
    assert GPT(GPTConfig(**SHAPE, exact=exact)).to(dtype)(*batch())[1].isfinite()

def test_a_model_that_cannot_be_is_refused_in_a_sentence():
    for wrong, sentence in [(dict(n_embd=30), 'n_embd must be divisible by n_head'),
                            (dict(scheme='midpoint_a', a=0.3), 'a = 0.3 cannot be undone exactly: give n')]:
        with pytest.raises(ValueError, match=sentence):
            GPTConfig(**{**SHAPE, **wrong})

def test_standard_is_gpt2_with_the_state_dict_of_nanogpt():
    model = build(scheme='standard')
    parts = ('ln_1', 'attn.c_attn', 'attn.c_proj', 'ln_2', 'mlp.c_fc', 'mlp.c_proj')
    modules = [*(f'h.{j}.{part}' for j in range(L) for part in parts), 'ln_f']
    names = [f'transformer.{module}.{kind}' for module in modules for kind in ('weight', 'bias')]
    names = ['transformer.wte.weight', 'transformer.wpe.weight', *names, 'lm_head.weight']
    assert list(model.state_dict()) == names
    assert model.lm_head.weight is model.transformer.wte.weight
    build(**LEAPFROG).load_state_dict(model.state_dict())       # every scheme has the same weights
    assert model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.transformer.h[0].mlp.c_proj.weight.std().item() == pytest.approx(0.02 / 8**0.5, rel=0.05)
    idx = batch()[0]
    x = model.transformer.wte(idx) + model.transformer.wpe.weight[:T]
    for block in model.transformer.h:
        x = x + block.attn(block.ln_1(x))
        x = x + block.mlp(block.ln_2(x))
    logits = model.lm_head(model.transformer.ln_f(x))
    torch.testing.assert_close(model(idx), (logits[:, [-1]], None))

def test_gelu_is_the_exact_one_of_nanogpt_or_the_approximation_of_gpt2():
    x = torch.randn(3, 32)
    for fields in ({}, dict(gelu='erf'), dict(gelu='tanh')):
        mlp = build(amplify=4, **fields).transformer.h[0].mlp
        y = mlp.c_fc(x)
        sigmoid = torch.erf(y / 2**0.5)
        if fields == dict(gelu='tanh'):
            sigmoid = torch.tanh((2 / torch.pi)**0.5 * (y + 0.044715 * y**3))
        torch.testing.assert_close(mlp(x), mlp.c_proj(0.5 * y * (1 + sigmoid)), rtol=1e-5, atol=1e-6)

def test_dropout_is_where_gpt2_has_it():
    model = build(dropout=0.5, **LEAPFROG)
    x = torch.randn(8, T, 32)
    for part in (model.transformer.h[0].attn, model.transformer.h[0].mlp):
        y = part.train()(x)
        assert 0.4 < (y == 0).float().mean() < 0.6
        plain = torch.allclose(y, 2 * part.eval()(x) * (y != 0), rtol=1e-4, atol=1e-5)
        assert plain == isinstance(part, model_py.MLP)          # attention has dropped weights, too
    model.integrate = lambda x, cache: x
    assert 0.4 < (model.last_state(batch()[0]) == 0).float().mean() < 0.6

@pytest.mark.parametrize('scheme', [dict(scheme='standard'), *SCHEMES], ids=str)
def test_no_position_sees_a_later_one(scheme):
    model = build(amplify=8, **scheme).eval()
    idx = batch()[0]
    changed = torch.cat((idx[:, :9], (idx[:, 9:] + 1) % V), dim=1)
    one, other = (model.hidden(tokens) for tokens in (idx, changed))
    assert torch.equal(one[:, :9], other[:, :9])
    assert (one[:, 9:] != other[:, 9:]).any(-1).all()

def test_random_a_is_drawn_once_in_quarters():
    config = build(scheme='midpoint_a', a='random', n_layer=64).config
    a = torch.tensor(config.a)
    assert torch.equal((a * 4).round() / 4, a) and 0.5 <= a.abs().min() and a.abs().max() <= 1.5
    assert abs(a.mean()) < 0.5 and len(set(config.a)) > 6
    assert GPT(GPTConfig(**asdict(config))).config == config

def test_slices_are_of_equal_size_where_up_to_twice_as_many_will_do():
    for rows, tokens, slices in [(60, 1024, 10), (8, 1024, 1), (64, 1024, 8), (59, 1024, 8), (2, 16384, 2)]:
        assert model_py.n_slices(rows, tokens, 8192) == slices

def test_weight_decay_is_for_matrices():
    model = build(**LEAPFROG)
    model.transformer.wpe.weight.requires_grad_(False)
    decayed, left = adamw(model, 0.1, 1e-3, (0.9, 0.99)).param_groups
    assert (decayed['weight_decay'], left['weight_decay']) == (0.1, 0.0)
    assert [w.dim() for w in decayed['params']] == [2] * (1 + 4 * L)
    assert [w.dim() for w in left['params']] == [1] * (2 + 8 * L)

@every_scheme
def test_a_frozen_embedding_leaves_the_other_gradients_as_they_are(scheme):
    want = gradients(build(**scheme))
    model = build(**scheme)
    frozen = [name for name in want if 'wte' in name or 'wpe' in name or 'h.1.mlp' in name]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    got = gradients(model)
    assert all(got.pop(name) is None for name in frozen)
    assert all(torch.equal(grad, want[name]) for name, grad in got.items())

def test_gradients_are_also_to_be_had_by_autograd_grad():
    model = build(**LEAPFROG)
    want = gradients(build(**LEAPFROG))
    got = torch.autograd.grad(model(*batch())[1], list(model.parameters()))
    assert error(dict(zip(want, got, strict=True)), want) == 0

def test_standard_with_checkpointing_has_the_same_gradients():
    got = gradients(build(scheme='standard', dropout=0.1, stored_layers=1))
    assert error(got, gradients(build(scheme='standard', dropout=0.1))) == 0

def test_what_a_backward_pass_cannot_do_it_refuses():
    model = build(**LEAPFROG)
    for result in (model(*batch())[1], model.last_state(batch()[0]).sum()):
        result.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match='run forward again'):
            result.backward()
    loss = model(*batch())[1]
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.add_(1)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        loss.backward()
    x = model.last_state(batch()[0])                            # there are no second derivatives
    grads = torch.autograd.grad((x**2).sum(), list(model.transformer.h.parameters()), create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable|does not require grad'):
        sum(grad.sum() for grad in grads).backward()

@pytest.mark.parametrize('frozen', [0, 3, 5])
def test_backward_leaves_nothing_on_the_tape_and_random_numbers_as_they_were(frozen):
    def states():
        gc.collect()
        tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor]
        return [x for x in tensors if x.shape in ((B, T, 32), (1, T, 32), (B * T, 32))]

    model = build(dropout=0.1, **LEAPFROG)
    for module in [model.transformer.wte, model.transformer.wpe, *model.transformer.h][:frozen]:
        module.requires_grad_(False)
    before = states()
    loss = model(*batch())[1]               # it may outlive its backward pass
    assert len(states()) > len(before) + 2
    random = torch.get_rng_state()
    loss.backward()
    assert len(states()) == len(before)
    assert torch.equal(torch.get_rng_state(), random)           # which stored_layers must not change

def test_accumulated_gradients_equal_those_of_a_large_batch():
    idx, targets = batch(rows=8)
    whole, parts = (build(**LEAPFROG) for _ in range(2))
    whole(idx, targets)[1].backward()
    for i in range(0, 8, 2):
        (parts(idx[i:i + 2], targets[i:i + 2])[1] / 4).backward()
    assert error(grads_of(parts), grads_of(whole)) < 1e-5

def check_ddp(rank, scheme, frozen, unused):
    idx, targets = batch(rows=8)
    whole, model = (build(**scheme) for _ in range(2))
    for each in (whole, model):
        each.transformer.wte.weight.requires_grad_(not frozen)
        each.transformer.wpe.weight.requires_grad_(not frozen)
    whole(idx, targets)[1].backward()
    ddp = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)
    for _ in range(2):
        model.zero_grad()
        ddp(idx[rank::2], targets[rank::2])[1].backward()
    assert error(grads_of(model), grads_of(whole)) < 1e-5

def two_processes(rank, file):
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', f'file://{file}', rank=rank, world_size=2)
    for scheme in [dict(scheme='standard'), *SCHEMES[:4]]:
        for frozen, unused in ((False, False), (True, False), (True, True)):
            check_ddp(rank, scheme, frozen, unused)
    torch.distributed.destroy_process_group()

def test_two_processes_equal_one_with_the_whole_batch(tmp_path):
    torch.multiprocessing.spawn(two_processes, (tmp_path / 'meet',), nprocs=2)

compiler = pytest.mark.skipif(not any(map(shutil.which, ('g++', 'clang++', 'c++'))),
                              reason='torch.compile needs a C++ compiler on a CPU')

@compiler
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@every_scheme
def test_compiled_blocks_are_exact_too(scheme, dtype):
    few = [(LEAPFROG, torch.float32), (SCHEMES[2], torch.bfloat16), (SCHEMES[4], torch.bfloat16)]
    if (scheme, dtype) not in few and 'COMPILE_ALL' not in os.environ:
        pytest.skip('half a minute: COMPILE_ALL=1 python -m pytest tests/test_model.py -k compiled_blocks')
    torch._dynamo.reset()
    check_exact(scheme, dtype, dropout=0.1, amplify=8, compiled=True)

@compiler
def test_annealing_compiles_one_recurrence_for_all_a_of_as_many_bits():
    """In retrofit.py a takes up to 193 values on its way to 1."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = build()
    model.compile_parts()
    for n in (65, 67, 101, 255):
        check_undone(model.kick, model.unkick, n / 256)
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] <= 4  # one for the first a

@compiler
def test_a_compiled_chunk_of_the_loss_is_one_graph_for_all_chunks():
    plain, model = (build() for _ in range(2))
    model.compile_parts()
    before = torch._dynamo.utils.counters['stats']['unique_graphs']
    x = torch.randn(B, T, 32)
    for each in (plain, model):
        each.loss(x, batch()[1], chunk=8).backward()
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == before + 1
    torch.testing.assert_close(model.lm_head.weight.grad, plain.lm_head.weight.grad)

@compiler
def test_a_model_compiled_from_outside_is_right():
    model = build(**LEAPFROG)
    torch.compile(model)(*batch())[1].backward()
    assert error(grads_of(model), gradients(build(**LEAPFROG))) < 1e-5

@torch.no_grad()
def recomputed(model, idx, max_new_tokens, temperature, top_k):
    """What generate() returns, with a forward pass over all tokens for each new one."""
    for _ in range(max_new_tokens):
        logits = model.lm_head(model.hidden(idx[:, -T:])[:, -1])                # (B, V)
        values, tokens = logits.topk(top_k)                                     # (B, k)
        probabilities = torch.zeros_like(logits).scatter(-1, tokens, (values / temperature).softmax(-1))
        idx = torch.cat((idx, torch.multinomial(probabilities, 1)), dim=1)
    return idx

@pytest.mark.parametrize('family', [{}, LLAMA], ids=['gpt2', 'llama'])
@pytest.mark.parametrize('scheme', [*FLOATS, *SCHEMES[:3], *SCHEMES[5:7]], ids=str)
def test_cached_tokens_are_those_of_a_full_recomputation(scheme, family):
    """From a prompt of several tokens to beyond block_size. Up to there each token is computed once."""
    model = build(amplify=4, **{**family, **scheme}).eval()
    prompt = batch()[0][:, :3]
    counts = []
    model.transformer.wte.register_forward_hook(lambda wte, args, result: counts.append(args[0].size(1)))
    for how in (dict(temperature=1.0, top_k=1), dict(temperature=0.8, top_k=20)):
        torch.manual_seed(3)
        text = model.generate(prompt, T + 4, **how)
        torch.manual_seed(3)
        assert torch.equal(text, recomputed(model, prompt, T + 4, **how))
    assert counts[:T + 4] == [3, *[1] * (T - 3), *[T] * 6]
    assert len(text.unique()) > 5                                               # not one token forever

def test_states_beyond_their_range_write_no_text():
    model = build(amplify=8, **LEAPFROG).eval()
    model.config.fractional_bits = 30
    model.transformer.h[0].mlp.c_proj.weight.data.mul_(100)
    with pytest.raises(ValueError, match='the logits are not finite'):
        model.generate(batch()[0][:, :3], 2, temperature=0)

def test_generate_draws_from_the_top_and_never_from_the_padding():
    model = build(amplify=4, **LEAPFROG).eval()
    prompt = batch()[0][:, :3]
    likeliest = recomputed(model, prompt, 20, temperature=1.0, top_k=1)
    for how in (dict(temperature=0), dict(temperature=1e-42), dict(top_k=1)):
        assert torch.equal(model.generate(prompt, 20, **how), likeliest)
    assert model.generate(prompt, 50, temperature=100.0, vocab_size=10)[:, 3:].max() < 10

def test_turned_weights_are_the_same_weights():
    model, turned = (build(amplify=4, n_inner=48).eval() for _ in range(2))
    turn_weights(turned)
    torch.testing.assert_close(turned(batch()[0])[0], model(batch()[0])[0], rtol=1e-4, atol=1e-5)
    for weight, original in zip(turned.parameters(), model.parameters()):
        tall = weight.dim() == 2 and weight.size(0) > weight.size(1)
        assert torch.equal(weight, original) and weight.is_contiguous() == (not tall)
