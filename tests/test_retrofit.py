"""
What must be true of retrofit.py:  python -m pytest tests/test_retrofit.py

The gradients of its students, stored and rebuilt, bit for bit; its own criterion; and the script, as a user runs it.
"""
import math
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from data.text.prepare import prepare as prepare_text
import model as model_py
from model import GPT, GPTConfig
from pretrained import reversible
from runtime import compile_parts, load_checkpoint
from test_reversible import L, check_exact
from test_model import compiler
from test_scripts import ROOT, command, complaint, knobs_of, place, run     # noqa: F401, place is a fixture

retrofit = knobs_of('retrofit.py', whole=True)      # its functions; nothing of it has run

def pair():
    """A teacher and a student whose outputs differ."""
    config = GPTConfig(block_size=16, vocab_size=65, n_layer=4, n_head=4, n_embd=32, scheme='standard')
    torch.manual_seed(0)
    teacher, student = GPT(config), GPT(GPTConfig(**{**vars(config), 'scheme': 'midpoint_sum', 'stored_layers': 0}))
    return teacher.requires_grad_(False), student

@pytest.mark.parametrize('t, data_weight', [(1.0, 0.0), (2.0, 0.3)])
def test_chunked_divergence_equals_the_plain_one(t, data_weight):
    idx = torch.randint(65, (3, 17), generator=torch.Generator().manual_seed(1))
    x, y, results = idx[:, :-1], idx[:, 1:], []
    for chunk in (None, 7):
        teacher, student = pair()
        state, wanted = student.last_state(x), teacher.lm_head(teacher.hidden(x)).flatten(0, 1)
        if chunk:
            loss = student.loss(state, y, retrofit.distillation(teacher, t, data_weight), teacher.hidden(x), chunk=chunk)
        else:
            logits = student.lm_head(student.transformer.ln_f(state)).flatten(0, 1)
            p, q = F.softmax(wanted / t, -1), F.softmax(logits / t, -1)
            kl = (p * (p.log() - q.log())).sum(-1).mean() * t**2
            loss = (1 - data_weight) * kl + data_weight * F.cross_entropy(logits, y.flatten())
        loss.backward()
        results.append((loss.detach(), {name: weight.grad for name, weight in student.named_parameters()}))
    (plain, want), (chunked, got) = results
    assert abs(plain - chunked) <= 1e-5 * plain
    for name in want:
        assert (want[name] - got[name]).norm() <= 1e-5 * want[name].norm(), name

@compiler
def test_the_divergence_too_is_compiled_into_one_graph_for_all_chunks():
    (teacher, plain), (_, student), x = pair(), pair(), torch.randint(65, (3, 16))
    compile_parts(student)
    graphs = torch._dynamo.utils.counters['stats']
    before = graphs['unique_graphs']
    state, criterion, hidden = plain.last_state(x).detach(), retrofit.distillation(teacher, 2.0, 0.3), teacher.hidden(x)
    for model in (plain, student):
        model.loss(state, x, criterion, hidden, chunk=8).backward()
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
    for offset, enabled in ((0, False), (-1, False), (-1, True)):       # in every channel: -128 in every logit, or so
        for model in (teacher, student):
            model.lm_head.weight.data += offset
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            losses.append(student.loss(x, idx, retrofit.distillation(teacher, 1.0, 0.0), x, chunk=7).item())
        for model in (teacher, student):
            model.lm_head.weight.data -= offset
    assert losses[1] == pytest.approx(losses[0], rel=1e-2) and losses[2] == pytest.approx(losses[0], rel=0.1)

def test_no_logits_are_whole_in_memory():
    """At GPT-2's vocabulary, teacher and student both: no tensor is larger than the logits of a chunk."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            largest = max(largest, *(x.numel() for x in torch.utils._pytree.tree_leaves(result)
                                     if isinstance(x, torch.Tensor)), 0)
            return result

    config = GPTConfig(block_size=512, vocab_size=50304, n_layer=2, n_head=2, n_embd=8, scheme='standard')
    teacher, student = GPT(config).requires_grad_(False), GPT(retrofit.converted(config, 'midpoint_a', 1.0, 0))
    idx = torch.randint(50304, (4, 512))
    with Watch():
        hidden = teacher.hidden(idx)
        student(idx, idx, retrofit.distillation(teacher, 1.0, 0.0), hidden)[1].backward()
    assert largest == 1024 * 50304

PEAK = """
import sys, torch
sys.path.append('tests')
from model import GPT, GPTConfig
from test_scripts import knobs_of
retrofit = knobs_of('retrofit.py', whole=True)
config = GPTConfig(block_size=512, vocab_size=50304, n_layer=2, n_head=2, n_embd=8, scheme='standard')
teacher, student = GPT(config).requires_grad_(False), GPT(retrofit.converted(config, 'midpoint_a', 1.0, 0))
idx = torch.randint(50304, (int(sys.argv[1]), 512))
def status(key):
    with open('/proc/self/status') as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) * 1024
before = status('VmRSS')
hidden = teacher.hidden(idx)
student(idx, idx, retrofit.distillation(teacher, 1.0, 0.0), hidden)[1].backward()
print(status('VmHWM') - before)
"""

@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='peak resident memory is read from Linux /proc')
def test_peak_memory_does_not_grow_with_the_logits():
    few, many = (int(subprocess.run([sys.executable, '-c', PEAK, str(rows)], check=True, cwd=ROOT, capture_output=True,
                                    env=dict(os.environ, MALLOC_MMAP_THRESHOLD_='65536')).stdout) for rows in (2, 5))
    assert many - few < 0.1 * 4 * (5 - 2) * 512 * 50304         # bytes of one tensor of the added tokens' logits

def test_the_way_to_the_bits():
    knobs = SimpleNamespace(conversion='midpoint_a', bits=0, sign=1, anneal_from=2, anneal_part=0.6, max_iters=101)
    way = [retrofit.a_at(step, knobs, None) for step in range(101)]
    assert way[0] == 0.25 and way == sorted(way) and way[30] == 0.5 and set(way[60:]) == {1.0} and way[59] < 1
    assert all(a * 256 == round(a * 256) for a in way)
    knobs.bits, knobs.sign = 4, -1                                      # more than where the way begins: at once
    assert {retrofit.a_at(step, knobs, None) for step in range(101)} == {-1 / 16}
    knobs.max_iters = 0
    assert retrofit.a_at(0, knobs, None) == -1 / 16

def test_the_bits_fall_where_they_matter_least():
    knobs = SimpleNamespace(conversion='midpoint_a', bits=0, sign=-1, anneal_from=2, anneal_part=0.6, max_iters=101)
    table = {k: [weight / 4**k for weight in (1, 8, 64)] for k in retrofit.CHOICES}
    way = [[-math.log2(-a) for a in retrofit.a_at(step, knobs, table)] for step in range(101)]
    assert sum(way[0]) <= 6 < sum(way[0]) + 1 and way[60] == way[100] == [0, 0, 0] != way[49]
    assert all(bits == sorted(bits) for bits in way) and [0, 0, 1] in way and [0, 1, 2] in way
    assert all(sum(before) >= sum(after) for before, after in zip(way, way[1:]))

def test_a_student_begins_at_its_teacher():
    config = GPTConfig(block_size=16, vocab_size=65, n_layer=3, n_head=4, n_embd=32, scheme='standard')
    torch.manual_seed(0)
    teacher = GPT(config)
    idx = torch.randint(65, (2, 16))
    for a, close in ((1 / 256, 1e-2), (-1 / 256, 1e-2), (1 / 4, 1), (-1 / 4, 1)):
        student = GPT(retrofit.converted(config, 'midpoint_a', a, 0))
        student.load_state_dict(teacher.state_dict())
        difference = (student.hidden(idx) - teacher.hidden(idx)).abs().max()
        assert 0 < difference < close

@pytest.mark.parametrize('a', [[-0.5] * 4, [-1.0] * 4, [-1.0, -1 / 16, -0.5, -1 / 4]], ids=str)
def test_every_output_arrives_once(a):
    """For a linear f that reads one half of the channels and writes the other: there the last state is the teacher's, to rounding."""
    config = GPTConfig(block_size=16, vocab_size=65, n_layer=4, n_head=4, n_embd=32, scheme='standard')
    torch.manual_seed(0)
    teacher = GPT(config).double()
    for block in teacher.transformer.h:
        weight = torch.zeros(32, 32, dtype=torch.float64)
        weight[16:, :16] = torch.randn(16, 16) / 4
        block.forward = lambda x, cache=None, weight=weight: x @ weight.T
    student = GPT(retrofit.converted(config, 'midpoint_a', a, 0)).double()
    student.load_state_dict(teacher.state_dict())
    for block, linear in zip(student.transformer.h, teacher.transformer.h):
        block.forward = linear.forward
    idx = torch.randint(65, (2, 16))
    wanted = teacher.last_state(idx)
    assert (wanted - teacher.transformer.wte(idx)).norm() > 0.1
    assert torch.allclose(student.last_state(idx), wanted, rtol=0, atol=1e-8)
    student.coefficients = [step._replace(c=1 - x) for step, x in zip(student.coefficients, a)]     # the fault to catch
    assert not torch.allclose(student.last_state(idx), wanted, rtol=0, atol=1e-2)

@pytest.mark.parametrize('a', ['random', 'all', '-1/16', ['x'] * 4], ids=str)
def test_an_a_that_is_no_number_is_refused(a):
    with pytest.raises(ValueError, match='needs to know its a|give a number or a list of them'):
        reversible(GPTConfig(n_layer=4, scheme='standard'), 'midpoint_a', a)

def test_bits_go_where_they_buy_most():
    harm = [0.0, 1.0, 0.1, 0.1]                                         # of a layer at 0 bits; a quarter with each bit
    table = {k: [x / 4**k for x in harm] for k in retrofit.CHOICES}
    assert retrofit.assign(table, 0) == [0, 0, 0, 0]
    assert retrofit.assign(table, 0.25) == [0, 1, 0, 0]
    assert retrofit.assign(table, 1) == [0, 2, 1, 1]
    assert retrofit.assign(table, 8) == [0, 8, 8, 8]                    # bits without a gain are not bought
    for budget in (0.7, 1.5, 2.3):
        assert sum(retrofit.assign(table, budget)) <= 4 * budget
    table[1][1] = 2.0                                                   # one bit would do harm, two would not
    assert retrofit.assign(table, 0.75) == [0, 0, 1, 1]                 # below a budget of 1 a layer has one bit or none
    assert retrofit.assign(table, 1.25) == [0, 2, 1, 2]

GPT2_SHAPE = dict(block_size=16, vocab_size=65, n_layer=L, n_head=4, n_embd=32)
LLAMA_SHAPE = dict(GPT2_SHAPE, norm='rmsnorm', mlp='swiglu', n_inner=48, n_kv_head=2, rope_theta=1e4, tied=False,
                   bias=False)

@pytest.mark.parametrize('shape', [GPT2_SHAPE, LLAMA_SHAPE], ids=['gpt2', 'llama'])
@pytest.mark.parametrize('conversion, a', [*[('midpoint_a', a) for a in (1.0, 0.5, -1 / 16, 77 / 256)],
                                           ('midpoint_sum', None), ('symplectic', None), ('leapfrog', None)], ids=str)
def test_students_are_exact(shape, conversion, a):
    """At 0, 1, 4 and, on the way, 8 bits: stored against rebuilt, bit for bit, weights amplified."""
    config = retrofit.converted(GPTConfig(scheme='standard', **shape), conversion, a, 0)
    for dtype in (torch.float32, torch.bfloat16):
        check_exact(model_py, dict(shape, scheme=conversion, a=config.a, h=config.h), dtype, dropout=0.1, amplify=8)

SMALL = dict(spread_windows=3, dataset='tiny', batch_size=4, gradient_accumulation_steps=2, block_size=16, max_iters=6, warmup_iters=1,
             eval_interval=3, eval_windows=9, log_interval=1, device='cpu', learning_rate=1e-3)
TEACHER = dict(dataset='tiny', batch_size=4, gradient_accumulation_steps=1, block_size=16, n_layer=3, n_head=2, n_embd=16,
               max_iters=4, warmup_iters=1, eval_windows=9, device='cpu', scheme='standard')

@pytest.fixture(scope='module')
def workshop(place):                                                    # noqa: F811
    """A place with a teacher, trained by retrofit.py on the spot, and two students of it."""
    (place / 'teacher.py').write_text(''.join(f'{name} = {value!r}\n' for name, value in TEACHER.items()))
    output = run(place, 'retrofit.py', teacher='taught/best.pt', teacher_config='teacher.py', out_dir='students',
                 bits='[0,1]', **SMALL)
    assert 'training taught/best.pt with teacher.py' in output
    lines = [line.split() for line in output.splitlines() if line.startswith(('teacher', 'midpoint(a), '))]
    assert [line[-2] for line in lines[1:]] != lines[0][-1] and len(lines) == 3
    assert output.count('The layer of the row has the bits of the column') == 1 and output.count('its layers have') == 2
    return place

def final(place, path):                                                 # noqa: F811
    return load_checkpoint(str(place / path))

def test_a_stopped_retrofit_resumes_bit_for_bit(workshop):
    flags = dict(SMALL, teacher='taught/best.pt', out_dir='stopped')
    with subprocess.Popen(command('retrofit.py', **flags), cwd=workshop, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if 'step 2: loss' in line:
                process.send_signal(signal.SIGTERM)
            if 'stopped at step' in line:
                break
        else:
            pytest.fail('it was too fast to be stopped')
    assert process.returncode == 0
    run(workshop, 'retrofit.py', **flags, init_from='resume')
    one, other = final(workshop, 'students/midpoint_a_0bit/last.pt'), final(workshop, 'stopped/midpoint_a_0bit/last.pt')
    assert (one['before'], one['after']) == (other['before'], other['after'])
    assert one['config']['a'] == other['config']['a'] == [-1.0, -1.0, -1.0]
    for name, weight in one['model'].items():
        assert torch.equal(weight, other['model'][name]), name
    assert 'seed = 5, but' in complaint(workshop, 'retrofit.py', **flags, init_from='resume', seed=5)

def test_its_checkpoints_are_sampled_and_trained_on_text_of_ones_own(workshop):
    assert run(workshop, 'sample.py', init_from='students/midpoint_a_1bit/last.pt', max_new_tokens=5, prompt='ab')
    (workshop / 'own.txt').write_text('abc cab ' * 50)
    (workshop / 'data' / 'own').mkdir()
    prepare_text([str(workshop / 'own.txt')], str(workshop / 'students' / 'midpoint_a_1bit' / 'last.pt'),
                 workshop / 'data' / 'own')
    assert (workshop / 'data' / 'own' / 'val.bin').read_bytes() == b'abc cab ' * 5
    flags = dict(TEACHER, dataset='own', scheme='midpoint_a', init_from='students/midpoint_a_1bit/last.pt', out_dir='more')
    run(workshop, 'train.py', **flags)
    assert 'has scheme = midpoint_a, and keeps it' in complaint(workshop, 'train.py', **dict(flags, scheme='symplectic'))
    config = final(workshop, 'more/last.pt')['config']
    assert (config['scheme'], config['stored_layers']) == ('midpoint_a', 0) and set(config['a']) <= {-1 / 2**k for k in retrofit.CHOICES}

def test_a_teacher_that_is_there_is_taken_as_it_is(workshop):
    (workshop / 'mine').mkdir()
    content = (workshop / 'taught' / 'best.pt').read_bytes()
    (workshop / 'mine' / 'best.pt').write_bytes(content)                # and no last.pt
    flags = dict(SMALL, teacher='mine/best.pt', teacher_config='teacher.py', out_dir='of_mine', max_iters=1)
    assert 'training' not in run(workshop, 'retrofit.py', **flags)
    assert (workshop / 'mine' / 'best.pt').read_bytes() == content and len(list((workshop / 'mine').iterdir())) == 1

def test_stopped_while_the_teacher_is_trained(workshop):
    slow = dict(TEACHER, max_iters=2000, eval_interval=2000, log_interval=1)
    (workshop / 'slow.py').write_text(''.join(f'{name} = {value!r}\n' for name, value in slow.items()))
    flags = dict(SMALL, teacher='slow/best.pt', teacher_config='slow.py', out_dir='of_slow')
    with subprocess.Popen(command('retrofit.py', **flags), cwd=workshop, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        for line in process.stdout:
            if 'step 2: loss' in line:
                process.send_signal(signal.SIGTERM)
        assert 'is not done: run the command again' in process.stderr.read()        # and its training has ended
    assert 2 <= final(workshop, 'slow/last.pt')['step'] < 2000

def test_a_budget_is_spread_and_train_goes_on(workshop):
    flags = dict(SMALL, teacher='taught/best.pt', out_dir='untuned', bits=1.5, max_iters=0)
    output = run(workshop, 'retrofit.py', **flags)
    checkpoint = final(workshop, 'untuned/midpoint_a_1.5bit/last.pt')
    got = [int(k) for k in output.split('its layers have ')[1].splitlines()[0].split()]
    assert checkpoint['config']['a'] == [-1 / 2**k for k in got] and 0 < sum(got) <= 4.5
    taught = final(workshop, 'taught/best.pt')['model']
    assert all(torch.equal(weight, taught[name]) for name, weight in checkpoint['model'].items())
    run(workshop, 'train.py', **dict(TEACHER, scheme='midpoint_a', init_from='untuned/midpoint_a_1.5bit/last.pt', out_dir='on'))
    assert final(workshop, 'on/last.pt')['config']['a'] == checkpoint['config']['a']

def test_two_processes_retrofit_alike(workshop):
    flags = dict(SMALL, teacher='taught/best.pt', out_dir='two', batch_size=2, gradient_accumulation_steps=4)
    run(workshop, 'retrofit.py', processes=2, **flags)
    one, two = final(workshop, 'students/midpoint_a_0bit/last.pt'), final(workshop, 'two/midpoint_a_0bit/last.pt')
    assert one['after'] == pytest.approx(two['after'], rel=1e-5)

@pytest.mark.parametrize('flags, words', [
    (dict(conversion='magic'), "conversion = 'magic': choose one of midpoint_a"),
    (dict(bits=9), 'bits = 9: give a number from 0 to 8'), (dict(bits=-0.5), 'bits = -0.5: give a number from 0 to 8'),
    (dict(bits=1.5, spread=False), 'or a list of them, of 0, 1, 2, 4 and 8'),
    (dict(anneal_from=9), 'anneal_from = 9 must lie between 0 and 8'), (dict(spread_windows=0), 'spread_windows = 0 must be 1 or more'),
    (dict(teacher='none.pt'), 'there is no checkpoint none.pt'),
    (dict(teacher='students/midpoint_a_0bit/last.pt'), 'the teacher must be a standard model'),
    (dict(block_size=17), 'block_size = 17: taught/best.pt sees 16 tokens at most'),
], ids=str)
def test_retrofit_complains_in_a_sentence(workshop, flags, words):
    assert words in complaint(workshop, 'retrofit.py', **{**SMALL, 'teacher': 'taught/best.pt', 'out_dir': 'none', **flags})
