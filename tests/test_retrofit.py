"""
What must be true of retrofit.py:  python -m pytest tests/test_retrofit.py

Its criterion; a and the bits; the gradients of its students, bit for bit; and the script, as a user runs it.
"""
import contextlib
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from data.text.prepare import prepare as prepare_text
from model import GPT, GPTConfig
from pretrained import fit_range, reversible
from runtime import load_checkpoint
from test_reversible import L, LLAMA, SHAPE, build, check_exact
from test_scripts import ROOT, command, complaint, knobs_of, place, run     # noqa: F401, place is a fixture

retrofit = knobs_of('retrofit.py', whole=True)      # its functions; nothing of it has run

def a_teacher(**shape):
    torch.manual_seed(0)
    retrofit.teacher = GPT(GPTConfig(scheme='standard', **(shape or SHAPE))).requires_grad_(False)
    return retrofit.teacher

def a_student(teacher, a, conversion='midpoint_a'):
    """The untuned student, of retrofit.converted()."""
    retrofit.knobs = retrofit.Knobs(conversion=conversion)
    student = GPT(retrofit.converted(a)).to(teacher.lm_head.weight.dtype)
    student.load_state_dict(teacher.state_dict())
    return student

def pair():
    """A teacher and a student whose outputs differ."""
    return a_teacher(), GPT(GPTConfig(scheme='midpoint_sum', **SHAPE))

# -----------------------------------------------------------------------------
# the divergence

@pytest.mark.parametrize('t, data_weight', [(1.0, 0.0), (2.0, 0.3)])
def test_chunked_divergence_equals_the_plain_one(t, data_weight):
    idx = torch.randint(65, (3, 17), generator=torch.Generator().manual_seed(1))
    x = idx[:, :-1]
    y = idx[:, 1:]
    results = []
    for chunk in (None, 7):
        teacher, student = pair()
        state = student.last_state(x)
        hidden = teacher.hidden(x)
        if chunk:
            loss = student.loss(state, (y, hidden), retrofit.distillation(t, data_weight), chunk)
        else:
            logits = student.lm_head(student.transformer.ln_f(state)).flatten(0, 1)
            p = F.softmax(teacher.lm_head(hidden).flatten(0, 1) / t, -1)
            q = F.softmax(logits / t, -1)
            kl = (p * (p.log() - q.log())).sum(-1).mean() * t**2
            loss = (1 - data_weight) * kl + data_weight * F.cross_entropy(logits, y.flatten())
        loss.backward()
        results.append((loss.detach(), {name: weight.grad for name, weight in student.named_parameters()}))
    (plain, want), (chunked, got) = results
    assert abs(plain - chunked) <= 1e-5 * plain
    for name in want:
        assert (want[name] - got[name]).norm() <= 1e-5 * want[name].norm(), name

@pytest.mark.skipif(not any(map(shutil.which, ('g++', 'clang++', 'c++'))), reason='it compiles C++')
def test_the_divergence_too_is_compiled_into_one_graph_for_all_chunks():
    teacher, plain = pair()
    _, student = pair()
    student.compile_parts()
    graphs = torch._dynamo.utils.counters['stats']
    before = graphs['unique_graphs']
    x = torch.randint(65, (3, 16))
    state = plain.last_state(x).detach()
    criterion = retrofit.distillation(2.0, 0.3)
    for model in (plain, student):
        model.loss(state, (x, teacher.hidden(x)), criterion, chunk=8).backward()
    assert graphs['unique_graphs'] == before + 1
    for name in ('lm_head.weight', 'transformer.ln_f.weight'):
        torch.testing.assert_close(student.get_parameter(name).grad, plain.get_parameter(name).grad)

def test_divergence_in_bfloat16_survives_an_offset_of_the_logits():
    """GPT-2's logits lie far below 0, where steps of bfloat16 are coarser than what tuning has to see."""
    teacher, student = pair()
    student.transformer.ln_f = torch.nn.Identity()          # or it would take the offset away
    with torch.no_grad():
        student.lm_head.weight.copy_(teacher.lm_head.weight + 0.01 * torch.randn(65, 32))
    idx = torch.randint(65, (8, 16), generator=torch.Generator().manual_seed(1))
    x = torch.randn(8, 16, 32, generator=torch.Generator().manual_seed(2)) + 4
    losses = []
    for offset, enabled in ((0, False), (-1, False), (-1, True)):       # near -128 in every logit
        for model in (teacher, student):
            model.lm_head.weight.data += offset
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            losses.append(student.loss(x, (idx, x), retrofit.distillation(1.0, 0.0), chunk=7).item())
        for model in (teacher, student):
            model.lm_head.weight.data -= offset
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    assert losses[2] == pytest.approx(losses[0], rel=0.1)

def a_step_at_the_vocabulary_of_gpt2(rows, watch=contextlib.nullcontext()):
    teacher = a_teacher(block_size=512, vocab_size=50304, n_layer=2, n_head=2, n_embd=8)
    student = a_student(teacher, 1.0)
    idx = torch.randint(50304, (rows, 512))
    with watch:
        hidden = teacher.hidden(idx)
        student(idx, (idx, hidden), retrofit.distillation(1.0, 0.0))[1].backward()

def test_no_logits_are_whole_in_memory():
    """Neither the teacher's nor the student's: no tensor is larger than the logits of a chunk."""
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            leaves = torch.utils._pytree.tree_leaves(result)
            sizes.extend(x.numel() for x in leaves if isinstance(x, torch.Tensor))
            return result

    a_step_at_the_vocabulary_of_gpt2(4, Watch())
    assert max(sizes) == 1024 * 50304

PEAK = """
import sys
from types import SimpleNamespace
sys.path.append('tests')
from test_retrofit import a_step_at_the_vocabulary_of_gpt2
a_step_at_the_vocabulary_of_gpt2(rows=int(sys.argv[1]))
with open('/proc/self/status') as file:
    print(next(line.split()[1] for line in file if line.startswith('VmHWM')))
"""

@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='it reads /proc of Linux')
def test_peak_memory_does_not_grow_with_the_logits():
    environment = dict(os.environ, MALLOC_MMAP_THRESHOLD_='65536')
    how = dict(check=True, cwd=ROOT, capture_output=True, env=environment)
    few, many = (int(subprocess.run([sys.executable, '-c', PEAK, rows], **how).stdout) for rows in '25')
    assert many - few < 0.1 * 4 * (5 - 2) * 512 * 50304 / 1024      # kB, a tenth of the added logits

# -----------------------------------------------------------------------------
# a and the bits

def way(**knobs):
    """a at each of 101 steps."""
    retrofit.knobs = retrofit.Knobs(anneal_part=0.6, max_iters=101, **knobs)
    return [retrofit.a_at(step) for step in range(101)]

def test_the_way_to_the_bits():
    a = way(sign=1, spread=False)
    assert a[0] == 0.25 and a == sorted(a) and a[30] == 0.5 and set(a[60:]) == {1.0} and a[59] < 1
    assert all(x * 256 == round(x * 256) for x in a)
    assert set(way(bits=4, spread=False)) == {-1 / 16}      # more than where the way begins: at once
    retrofit.knobs.max_iters = 0
    assert retrofit.a_at(0) == -1 / 16

def test_the_bits_fall_where_they_matter_least():
    retrofit.table = {k: [weight / 4**k for weight in (1, 8, 64)] for k in retrofit.CHOICES}
    bits = [[-math.log2(-a) for a in layers] for layers in way()]
    assert sum(bits[0]) <= 6 < sum(bits[0]) + 1 and bits[60] == bits[100] == [0, 0, 0] != bits[49]
    assert all(layers == sorted(layers) for layers in bits) and [0, 0, 1] in bits and [0, 1, 2] in bits
    assert all(sum(before) >= sum(after) for before, after in zip(bits, bits[1:]))

def test_bits_go_where_they_buy_most():
    harm = [0.0, 1.0, 0.1, 0.1]                             # of a layer at 0 bits; a quarter with each bit
    table = {k: [x / 4**k for x in harm] for k in retrofit.CHOICES}
    assert retrofit.assign(table, 0) == [0, 0, 0, 0]
    assert retrofit.assign(table, 0.25) == [0, 1, 0, 0]
    assert retrofit.assign(table, 1) == [0, 2, 1, 1]
    assert retrofit.assign(table, 8) == [0, 8, 8, 8]        # bits without a gain are not bought
    for budget in (0.7, 1.5, 2.3):
        assert sum(retrofit.assign(table, budget)) <= 4 * budget
    table[1][1] = 2.0                                       # one bit would do harm, two would not
    assert retrofit.assign(table, 0.75) == [0, 0, 1, 1]     # below a budget of 1 a layer has one bit or none
    assert retrofit.assign(table, 1.25) == [0, 2, 1, 2]

@pytest.mark.parametrize('a, close', [(1 / 256, 1e-2), (-1 / 256, 1e-2), (1 / 4, 1), (-1 / 4, 1)])
def test_a_student_begins_at_its_teacher(a, close):
    teacher = a_teacher()
    idx = torch.randint(65, (2, 16))
    difference = (a_student(teacher, a).hidden(idx) - teacher.hidden(idx)).abs().max()
    assert 0 < difference < close

@pytest.mark.parametrize('a', [[-0.5] * L, [-1.0] * L, [-1.0, -1 / 16, -0.5, -1 / 4]], ids=str)
def test_every_output_arrives_once(a):
    """For a linear f from half of the channels to the others, the last state is that of the teacher."""
    teacher = a_teacher().double()
    student = a_student(teacher, a)
    for ours, theirs in zip(student.transformer.h, teacher.transformer.h):
        weight = torch.zeros(32, 32, dtype=torch.float64)
        weight[16:, :16] = torch.randn(16, 16) / 4
        linear = torch.nn.Linear(32, 32, bias=False).double()
        linear.weight.data = weight
        ours.forward = theirs.forward = lambda x, cache=None, linear=linear: linear(x)
    idx = torch.randint(65, (2, 16))
    wanted = teacher.last_state(idx)
    assert (wanted - teacher.transformer.wte(idx)).norm() > 0.1
    assert torch.allclose(student.last_state(idx), wanted, rtol=0, atol=1e-8)
    student.config.h = [1 - a for a in student.config.a]        # a planted fault
    assert not torch.allclose(student.last_state(idx), wanted, rtol=0, atol=1e-2)

@pytest.mark.parametrize('scheme', [dict(scheme='midpoint_a', a=-1 / 16), dict(scheme='midpoint_a', a=0.75),
                                    dict(scheme='symplectic')], ids=str)
@pytest.mark.parametrize('factor, least, most', [(1, 18, 18), (2.0**20, 4, 17), (2.0**40, 0, 0)])
def test_a_conversion_gets_fractional_bits_by_its_largest_state(scheme, factor, least, most):
    idx = torch.randint(65, (2, 16))
    model = build(**scheme)
    for block in model.transformer.h:
        block.mlp.c_proj.weight.data.mul_(factor)
    fit_range(model, idx, SimpleNamespace(autocast=contextlib.nullcontext()))
    model.largest = 0.0
    state = model.last_state(idx)
    assert least <= model.config.fractional_bits <= most
    if factor == 2.0**20:
        assert state.isfinite().all() and 1 / 17 < model.largest <= 1 / 8
    assert state.isfinite().all() == (factor < 2.0**40)         # which no 32 bits hold

@pytest.mark.parametrize('a', [None, 'random', '-1/16', ['x'] * 4, []], ids=str)
def test_an_a_that_is_no_number_is_refused(a):
    with pytest.raises(ValueError, match='its a: give|must be a finite number'):
        reversible(GPTConfig(n_layer=4, scheme='standard'), 'midpoint_a', a)

@pytest.mark.parametrize('shape', [{}, LLAMA], ids=['gpt2', 'llama'])
@pytest.mark.parametrize('conversion, a', [
    *[('midpoint_a', a) for a in (1.0, 0.5, -1 / 16, 77 / 256)],
    ('midpoint_sum', None), ('symplectic', None), ('leapfrog', None)], ids=str)
def test_students_are_exact(shape, conversion, a):
    """At 0, 1, 4 and, on the way, 8 bits: stored against rebuilt, bit for bit, weights amplified."""
    config = a_student(a_teacher(**SHAPE, **shape), a, conversion).config
    for dtype in (torch.float32, torch.bfloat16):
        check_exact(dict(shape, scheme=conversion, a=config.a, h=config.h), dtype, dropout=0.1, amplify=8)

# -----------------------------------------------------------------------------
# the script

BOTH = dict(dataset='tiny', batch_size=4, block_size=16, warmup_iters=1, eval_windows=9, device='cpu')
TEACHER = dict(BOTH, gradient_accumulation_steps=1, n_layer=3, n_head=2, n_embd=16, max_iters=4)
SMALL = dict(BOTH, gradient_accumulation_steps=2, teacher='taught/best.pt', spread_windows=3, max_iters=6,
             eval_interval=3, log_interval=1, learning_rate=1e-3)

@pytest.fixture(scope='module')
def workshop(place):                                                    # noqa: F811
    """A place with a teacher and two students of it."""
    run(place, 'train.py', scheme='standard', out_dir='taught', **TEACHER)
    before = (place / 'taught' / 'best.pt').read_bytes()
    for bits in 0, 1:
        output = run(place, 'retrofit.py', out_dir=f'student{bits}', bits=bits, **SMALL)
        losses = final(place, f'student{bits}')['losses']
        report = ', '.join(f'{name} {losses[name]:.4f}' for name in ('teacher', 'before', 'after'))
        assert f'validation loss in nats per token: {report}; KL(teacher, student)' in output
        assert losses['before'] != losses['after'] and output.count('KL(teacher, student)') == 2
    assert (place / 'taught' / 'best.pt').read_bytes() == before
    return place

def final(place, out_dir):                                              # noqa: F811
    return load_checkpoint(str(place / out_dir / 'last.pt'))

def test_a_stopped_retrofit_resumes_bit_for_bit(workshop):
    flags = dict(SMALL, out_dir='stopped')
    start = command('retrofit.py', **flags)
    with subprocess.Popen(start, cwd=workshop, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith('step 2: loss'):
                process.send_signal(signal.SIGTERM)
        assert 'stopped at step' in line, 'it was too fast to be stopped'
    assert process.returncode == 0
    run(workshop, 'retrofit.py', **flags, init_from='resume')
    one = final(workshop, 'student0')
    other = final(workshop, 'stopped')
    assert one['losses'] == other['losses'] and one['table'] == other['table']
    assert one['config']['a'] == other['config']['a'] == [-1.0, -1.0, -1.0]
    for name, weight in one['model'].items():
        assert torch.equal(weight, other['model'][name]), name
    assert 'seed = 5, but' in complaint(workshop, 'retrofit.py', **flags, init_from='resume', seed=5)

def test_its_checkpoints_are_sampled_and_trained_on_text_of_ones_own(workshop):
    source = 'student1/last.pt'
    assert run(workshop, 'sample.py', init_from=source, max_new_tokens=5, start='ab')
    (workshop / 'own.txt').write_text('abc cab ' * 50)
    own = workshop / 'data' / 'own'
    own.mkdir()
    prepare_text([str(workshop / 'own.txt')], str(workshop / source), own)
    assert (own / 'val.bin').read_bytes() == b'abc cab ' * 5
    flags = dict(TEACHER, dataset='own', init_from=source, out_dir='more')
    run(workshop, 'train.py', **flags, scheme='midpoint_a')
    assert 'keeps midpoint_a' in complaint(workshop, 'train.py', **flags, scheme='symplectic')
    config = final(workshop, 'more')['config']
    assert (config['scheme'], config['stored_layers']) == ('midpoint_a', 0)
    assert config['a'] == final(workshop, 'student1')['config']['a']

def test_a_budget_is_spread_and_train_goes_on(workshop):
    output = run(workshop, 'retrofit.py', **dict(SMALL, out_dir='untuned', bits=1.5, max_iters=0))
    checkpoint = final(workshop, 'untuned')
    bits = [int(k) for k in re.search('layers have ([0-9 ]+)', output)[1].split()]
    assert checkpoint['config']['a'] == [-1 / 2**k for k in bits] and 0 < sum(bits) <= 4.5
    taught = final(workshop, 'taught')['model']
    assert all(torch.equal(weight, taught[name]) for name, weight in checkpoint['model'].items())
    run(workshop, 'train.py', **TEACHER, init_from='untuned/last.pt', out_dir='on')
    assert final(workshop, 'on')['config']['a'] == checkpoint['config']['a']

def test_two_processes_retrofit_alike(workshop):
    flags = dict(SMALL, out_dir='two', batch_size=2, gradient_accumulation_steps=4)
    run(workshop, 'retrofit.py', processes=2, **flags)
    assert final(workshop, 'student0')['losses'] == pytest.approx(final(workshop, 'two')['losses'], rel=1e-5)

@pytest.mark.parametrize('flags, words', [
    (dict(conversion='magic'), "conversion = 'magic': choose one of"),
    (dict(bits=9), 'bits = 9 must be from 0 to 8'),
    (dict(bits=-0.5), 'bits = -0.5 must be from 0 to 8'),
    (dict(bits=1.5, spread=False), 'cannot be the same in all layers: give 0, 1, 2, 4 or 8'),
    (dict(anneal_from=9), 'anneal_from = 9 must be from 0 to 8'),
    (dict(spread_windows=0), 'spread_windows = 0 must be from 1'),
    (dict(teacher='none.pt'), 'there is no checkpoint none.pt'),
    (dict(teacher='student0/last.pt'), 'the teacher must be standard'),
    (dict(block_size=17), 'block_size = 17: the teacher sees 16 tokens'),
], ids=str)
def test_retrofit_complains_in_a_sentence(workshop, flags, words):
    assert words in complaint(workshop, 'retrofit.py', **{**SMALL, 'out_dir': 'none', **flags})
