"""
What must be true of bench.py, of the scripts in results/ and of assets/figures.py:  python -m pytest tests/test_bench.py

They measure what they say, on models so small that figures mean nothing: a row for every case, one for what does not fit,
and a file that keeps what was found before an interruption. Nothing here depends on how fast anything is.
"""
import glob
import importlib.util
import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stdout

import pytest
import torch

import model as model_py
import runtime
from model import GPT, GPTConfig
from test_scripts import ROOT, Screen, complaint, place, run, whole      # noqa: F401, place and whole are fixtures

needs_proc = pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='memory is read from Linux /proc')
TINY = dict(n_layer=2, n_head=2, n_embd=32, block_size=32, batch_size=2, device='cpu')

def command(mode, **flags):
    return [os.path.join(ROOT, 'bench.py'), mode, *(f'--{name}={value}' for name, value in {**TINY, **flags}.items())]

def bench(place, mode, **flags):
    """(rows of its file, what it has written)."""
    with pytest.MonkeyPatch.context() as here, redirect_stdout(Screen()) as screen:
        here.chdir(place)
        here.setattr(sys, 'argv', command(mode, json='rows.json', **flags))
        runpy.run_path(os.path.join(ROOT, 'bench.py'), run_name='__main__')
    return json.loads((place / 'rows.json').read_text())['rows'], screen.getvalue()

SCHEMES = [dict(scheme='standard'), dict(scheme='standard', stored_layers=0), dict(scheme='midpoint'), dict(scheme='leapfrog'),
           dict(scheme='symplectic'), dict(scheme='midpoint_a', a=0.5), dict(scheme='midpoint_sum'), dict(scheme='leapfrog', exact=False),
           dict(scheme='leapfrog', stored_layers=2), dict(scheme='midpoint', dropout=0.1),
           dict(scheme='midpoint_a', a=-1 / 16, norm='rmsnorm', mlp='swiglu', n_kv_head=1, rope_theta=1e4, tied=False, bias=False)]

@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
@pytest.mark.parametrize('scheme', SCHEMES, ids=str)
def test_what_is_counted_without_memory_is_there_in_real_tensors_byte_for_byte(scheme, dtype):
    config = GPTConfig(n_layer=3, n_head=2, n_embd=32, block_size=32, vocab_size=64, slice_tokens=64, **scheme)
    found = []
    for fake in (True, False):
        count = runtime.count_two_steps(lambda: GPT(config), 6, 32, dtype, fake)
        curve = count.curve()
        found.append((curve.max(), count.at(curve.argmax()), count.work, sorted((x.size, x.kind) for x in count.storages)))
    assert found[0] == found[1]
    parameters = runtime.count_parameters(GPT(config))
    assert found[0][1]['weights'] == 4 * parameters and 8 * parameters <= found[0][1]['optimizer'] < 8 * parameters + 1000

def test_the_counter_sees_a_state_that_is_kept(monkeypatch):
    """A planted fault: a step that saves its state makes memory grow with depth."""
    def slope():
        few, many = (runtime.count_two_steps(lambda: GPT(GPTConfig(n_layer=n, n_head=2, n_embd=32, block_size=32, vocab_size=64)),
                                             64, 32, 'float32') for n in (2, 6))
        return (many.curve().max() - few.curve().max()) / 4 - 16 * 12 * 32**2           # but for weights, about

    flat, forward = slope(), model_py.ReversibleStep.forward

    def keeping(ctx, handle, tape, *args):
        ctx.kept = tape.lower.clone()
        return forward(ctx, handle, tape, *args)

    monkeypatch.setattr(model_py.ReversibleStep, 'forward', staticmethod(keeping))
    assert flat < 0.2 * 8 * 64 * 32 * 32 and slope() > 0.9 * 8 * 64 * 32 * 32

def test_attention_and_matrix_products_are_counted():
    """By hand: 2 operations per multiplication, backward twice forward; attention's backward has 5 products to forward's 2."""
    B, T, C, V, L = 3, 32, 32, 64, 2
    products, attention = 2 * B * T * (12 * C * C * L + V * C), 4 * B * T * T * C * L
    for scheme, blocks in (('standard', 3), ('leapfrog', 4)):
        count = runtime.count_two_steps(lambda: GPT(GPTConfig(n_layer=L, n_head=2, n_embd=C, block_size=T, vocab_size=V, scheme=scheme)),
                                        B, T, 'float32')
        assert count.work == products * 3 + 2 * B * T * 12 * C * C * L * (blocks - 3) + attention * (2.5 + blocks - 2)

def test_gradients_of_an_earlier_micro_batch_are_there_at_the_peak():
    def peak(micro_batches):
        count = runtime.count_two_steps(lambda: GPT(GPTConfig(n_layer=8, n_head=2, n_embd=128, block_size=32, vocab_size=64)), 1, 32,
                                        'float32', micro_batches=micro_batches).curve('gradients', 'activations')
        return int(count.max())
    assert peak(1) < peak(2) == peak(3)

def test_depth_finds_no_activations_per_layer(place):
    rows, _ = bench(place, 'depth', cases='standard,leapfrog', layers='[2,4,6]', n_embd=64, batch_size=512)
    standard, leapfrog = (row['MB per layer'] for row in rows)
    assert 0 <= leapfrog < 0.01 * standard
    assert rows[0]['6 layers'] - rows[0]['4 layers'] == pytest.approx(rows[0]['4 layers'] - rows[0]['2 layers'])

def test_the_largest_batch_fits_and_the_next_does_not(place):
    rows, _ = bench(place, 'batch', cases='standard,checkpointed,leapfrog', budget_gb='[0.0001,0.05]')
    assert [row['batch'] for row in rows[:3]] == ['does not fit'] * 3
    config = dict(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=256)
    for row, scheme in zip(rows[3:], (dict(scheme='standard'), dict(scheme='standard', stored_layers=0), dict(scheme='leapfrog'))):
        # a few sequences more may make slices smaller, and need less: the next batch that is cut into whole ones does not
        more = row['batch'] + 1 if scheme['scheme'] == 'standard' else 256 * (row['batch'] // 256 + 1)
        peaks = [int(runtime.count_two_steps(lambda: GPT(GPTConfig(**config, **scheme)), B, 32, 'bfloat16').curve().max())
                 for B in (row['batch'], more)]
        assert peaks[0] <= 0.05e9 < peaks[1], (row, peaks)
    assert rows[3]['batch'] < rows[4]['batch'] < rows[5]['batch'] and rows[5]['to standard'] == rows[5]['batch'] / rows[3]['batch']

def test_a_large_batch_is_known_from_small_ones_where_the_peak_moves_in_between(place):
    """Small batches have it at the end of backward, with all gradients of weights; large ones at its start, with all bits."""
    rows, _ = bench(place, 'batch', cases='midpoint_a/4bits', budget_gb=0.1, n_embd=128, block_size=64, slice_tokens=1024)
    assert rows[0]['MB per sequence'] == 64 * (128 * (8 + 8 + 4 + 4 + 2 * 4 / 8) + 8) / 1e6     # states, gradients, bits; tokens

def test_length_frontier_and_curve(place):
    rows, _ = bench(place, 'length', cases='standard,leapfrog', budget_gb=0.01)
    assert rows[0]['length'] < rows[1]['length'] and rows[1]['length'] % 128 == 0
    rows, _ = bench(place, 'frontier', n_layer=1)
    work, memory = ({(row['case'], row['stored layers']): row[key] for row in rows} for key in ('work', 'MB per sequence'))
    assert work['standard', 1] == work['checkpointed/sliced', 1] == work['checkpointed/bf16', 1] == work['leapfrog', 1] == 1
    assert 1 < work['standard', 0] == work['checkpointed/sliced', 0] == work['checkpointed/bf16', 0] < work['leapfrog', 0]
    assert memory['checkpointed/sliced', 1] == memory['standard', 1] > memory['checkpointed/bf16', 1] > memory['checkpointed/bf16', 0]
    rows, _ = bench(place, 'curve', cases='checkpointed,leapfrog', n_layer=1)
    assert all(max(row['highest']) == row['peak MB'] and 0 < row['forward'] < 1 and min(row['lowest']) >= 0 for row in rows)

@needs_proc
def test_check_compares_with_a_fresh_process(place):
    rows, _ = bench(place, 'check', cases='leapfrog', n_embd=256, block_size=256, batch_size=8)
    assert sum(rows[0][f'{kind} MB'] for kind in ('weights', 'gradients', 'optimizer', 'activations')) == pytest.approx(rows[0]['counted MB'])
    assert rows[0]['counted MB'] > 20 and 0.5 < rows[0]['ratio'] < 3    # libraries take a few MB more: large models show how close

@needs_proc
def test_throughput_of_two_processes_counts_the_tokens_of_both(place):
    path = place / 'two.json'
    output = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', *command(
        'throughput', cases='standard,checkpointed,leapfrog,leapfrog/dial,leapfrog/float', repeats=2, json=path)], check=True,
        cwd=place, timeout=120, capture_output=True, text=True).stdout
    assert 'leapfrog: exact takes' in output
    result = json.loads(path.read_text())
    assert result['processes'] == 2 and result['hardware'] and result['torch'] == torch.__version__
    commit = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert result['commit'].removesuffix(', changed') == commit
    assert [row['case'] for row in result['rows']] == result['knobs']['cases'].split(',')
    for row in result['rows']:
        assert sorted(2 * 2 * 32 / seconds for seconds in row['all_seconds']) == pytest.approx([row['lowest'], row['highest']])
        assert row['lowest'] <= row['tokens/s'] <= row['highest']
    assert result['rows'][0]['time to standard'] == 1 and result['rows'][0]['stored layers'] == 2

@pytest.mark.skipif(not importlib.util.find_spec('revlib'), reason='revlib is not installed')
def test_another_library_runs_beside_ours(place):
    rows, _ = bench(place, 'throughput', cases='standard,revlib', repeats=1, dtype='float32', processor_time=True)
    assert [row['case'] for row in rows] == ['standard', 'revlib'] and rows[1]['least'] == rows[1]['time to standard'] > 0

def test_throughput_at_the_largest_batch(place):
    rows, _ = bench(place, 'throughput', cases='leapfrog', repeats=1, budget_gb=0.02)
    assert all(row['GB'] == 0.02 and row['batch'] > 1 and row['tokens/s'] > 0 for row in rows) and len(rows) == 1

DRIFT = dict(n_head=2, n_embd=32, block_size=32, device='cpu')

def test_drift_is_zero_in_exact_states_and_only_there(place, whole):
    try:
        run(place, 'results/drift.py', trained='whole/best.pt', n_layer=4, batch_size=2, json='drift.json', **DRIFT)
    finally:
        torch.use_deterministic_algorithms(False)
    rows = json.loads((place / 'drift.json').read_text())['rows']
    assert {row['weights'] for row in rows} == {'x1', 'x4', 'x8', 'trained'}
    assert {row['dtype'] for row in rows} == {'float32', 'bfloat16', 'float16'}
    for row in rows:
        layers = 2 if row['weights'] == 'trained' else 4
        assert len(row['gradient_errors']) == layers and row['control'] == 0
        assert len(row['state_errors']) == layers * (1 + (row['case'] == 'symplectic'))
        if row['states'] == 'exact':
            assert row['worst state'] == row['worst gradient'] == 0
        else:
            assert row['worst state'] > 0 and row['worst gradient'] > 0

def test_an_interrupted_run_keeps_its_rows(place):
    path = place / 'kept.json'
    flags = [f'--{name}={value}' for name, value in dict(DRIFT, json=path, batch_size=16, n_layer=24).items()]
    with subprocess.Popen([sys.executable, os.path.join(ROOT, 'results', 'drift.py'), *flags], cwd=place, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert any('exact' in line for line in process.stdout)          # the first row is there
        process.send_signal(signal.SIGINT)
        assert 'interrupted: the rows above are all there is' in process.communicate()[1] and process.returncode
    rows = json.loads(path.read_text())['rows']
    assert 1 <= len(rows) < 90 and rows[0]['case'] == 'midpoint'

@pytest.mark.parametrize('arguments, sentence', [
    ('', "unknown mode ''"), ('speed', "unknown mode 'speed'"), ('depth --cases=euler', "unknown case 'euler': choose among"),
    ('depth --layers=[3]', 'layers = [3] must be whole numbers above 0, for depth two or more'), ('batch', 'Give --budget_gb=24'),
    ('batch --budget_gb=-1', 'Give --budget_gb=24'), ('batch --shape=gpt9', "unknown shape 'gpt9': choose among gpt2,"),
    ('batch --budget_gb=1 --cases=leapfrog/dial', 'leapfrog/dial is a case of throughput at equal batch alone'),
    ('depth --compile=True', 'this mode counts an eager model'), ('curve --compile=True', 'this mode counts an eager model'),
    ('batch --budget_gb=1e999', 'Give --budget_gb=24'), ('depth --dtype=float32 --cases=checkpointed/bf16', 'needs --dtype=bfloat16'),
    ('batch --budget_gb=1 --json=data', 'data cannot be written'), ('throughput --repeats=0', 'repeats = 0'),
    ('depth --n_embd=30 --n_head=4', 'n_embd = 30 must be divisible')])
def test_bench_complains_in_a_sentence(place, arguments, sentence, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, 'argv', ['bench.py', *arguments.split()])
    with pytest.raises(SystemExit) as stop, redirect_stdout(Screen()):
        runpy.run_path(os.path.join(ROOT, 'bench.py'), run_name='__main__')
    assert sentence in stop.value.code

@pytest.mark.parametrize('script, flags, sentence', [
    ('results/drift.py', dict(trained='none.pt'), 'there is no checkpoint none.pt'),
    ('results/drift.py', dict(schemes='standard'), 'standard is a standard model, which rebuilds nothing'),
    ('results/sampling.py', dict(new_tokens=64, block_size=32), 'new_tokens = 64 must be below block_size = 32')])
def test_other_measurements_complain_in_a_sentence(place, script, flags, sentence):
    try:
        assert sentence in complaint(place, script, device='cpu', **flags)
    finally:
        torch.use_deterministic_algorithms(False)

def test_what_hurts_other_engines_does_not_hurt_ours(monkeypatch):
    monkeypatch.syspath_prepend(os.path.join(ROOT, 'results'))
    peers, rows = importlib.import_module('peers'), []
    monkeypatch.setattr(peers, 'parallel', lambda make: 'gradients')        # needs a group of processes: see test_model.py
    peers.table(dict(leapfrog=lambda stored, **change: peers.ours('leapfrog', stored, **change)),
                lambda case, **values: rows.append(values))
    assert rows[0]['error'] == rows[0]['error x8 bf16'] == rows[0]['error x8 dropout'] == 0
    assert rows[0]['frozen embedding'] == rows[0]['autograd.grad'] == 'gradients' and rows[0]['overflow'] == 'loss nan'
    assert rows[0]['changed weights'].startswith('stops: one of the variables needed')

def test_the_comparison_finds_the_lowest_loss_and_believes_no_noise(monkeypatch):
    monkeypatch.syspath_prepend(os.path.join(ROOT, 'results'))
    compare, tried = importlib.import_module('compare'), set()

    def loss(scheme, h, rate, *_):
        tried.add((h, rate))
        return (math.log2(rate / 4e-3) - math.log2(h / 0.5) / 2) ** 2 + math.log2(h / 0.0625) ** 2
    h, rate = compare.best(loss, 'leapfrog')
    assert all(loss('leapfrog', h, rate) <= loss('leapfrog', *near) for near in ((h / 2, rate), (2 * h, rate), (h, rate / 2), (h, 2 * rate)))
    assert len({x for y, x in tried if y == h}) >= 4 and len({y for y, x in tried if x == rate}) >= 3
    assert [compare.RULES['2 / layers'](layers) for layers in (4, 12, 32)] == [0.5, 0.125, 0.0625]
    assert compare.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    for t, degrees in ((4.303, 2), (3.182, 3), (2.776, 4), (2.228, 10), (2.201, 11)):       # of the tables of Student's t, at 5%
        assert compare.two_sided(t, degrees) == pytest.approx(0.05, abs=1e-4)
    rows = dict(standard=[1.0, 1.1, 1.2], leapfrog=[0.9, 1.01, 1.1], midpoint=[1.01, 1.1, 1.19])
    found = {(one, other): (mean, *p) for one, other, mean, *p in compare.pairs(rows)}
    assert found['standard', 'leapfrog'][0] == pytest.approx(0.29 / 3) and max(found['standard', 'leapfrog'][1:]) < 0.01
    assert min(found['standard', 'midpoint'][1:]) > 0.3

def test_sampling_writes_the_same_tokens_as_transformers(place):
    output = run(place, 'results/sampling.py', new_tokens=20, repeats=1, n_layer=2, n_head=2, n_embd=32, vocab_size=65,
                 block_size=32, device='cpu', dtype='float32')
    assert 'transformers are the same' in output and 'leapfrog, cached' in output

def test_stability_finds_the_intervals_of_the_theory(place, whole):
    run(place, 'results/stability.py', trained='whole/best.pt', json='stability.json', device='cpu')
    rows = {f"{row['case']} {row.get('z is')}": row for row in json.loads((place / 'stability.json').read_text())['rows']}
    both = {name: row['stable in both'] for name, row in rows.items() if 'z is' in row}
    assert both == {'standard real': 'nowhere', 'midpoint imaginary': '0 to 1', 'midpoint_a, a = 0.5 imaginary': 'nowhere',
                    'midpoint_a, a = 0.5 real': 'nowhere', 'leapfrog real': '-4 to 0', 'symplectic real': '-4 to 0'}
    damped = rows['midpoint_a, a = 0.5 imaginary']
    assert all(down >= 2 - 1e-9 for down in damped['down'])             # 1 / |a|
    trained = rows['leapfrog None']
    assert len(trained['up']) == len(trained['down']) == 3 and trained['up'][0] == trained['down'][0] == 1
    assert 'there is no checkpoint none.pt' in complaint(place, 'results/stability.py', trained='none.pt', device='cpu')

@pytest.mark.skipif(not importlib.util.find_spec('matplotlib'), reason='matplotlib is not installed')
def test_figures_are_drawn_from_the_files(tmp_path):
    shutil.copytree(os.path.join(ROOT, 'results'), tmp_path / 'results')
    output = run(tmp_path, 'assets/figures.py')
    named = set()
    for page in ('README.md', 'RESULTS.md', *glob.glob('results/*.md', root_dir=ROOT)):
        with open(os.path.join(ROOT, page)) as file:
            named |= set(re.findall(r'assets/(\w+)\.png\)', file.read()))
    drawn = {name.removesuffix('.png') for name in os.listdir(tmp_path / 'assets')}
    assert {'curve', 'states'} <= named == drawn and all(f'assets/{name}.png' in output for name in drawn)

@pytest.mark.skipif(not shutil.which('bash'), reason='there is no bash')
def test_the_open_rows_of_a_gpu_are_commands_that_exist(tmp_path):
    """results/gpu.sh, with a python that only writes down what it is called with."""
    (tmp_path / 'python').write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / 'python').chmod(0o755)
    lines = subprocess.run(['bash', os.path.join(ROOT, 'results', 'gpu.sh')], cwd=tmp_path, capture_output=True, text=True, check=True,
                           env=dict(os.environ, PATH=f"{tmp_path}:{os.environ['PATH']}")).stdout.splitlines()
    assert len(lines) > 10 and lines[-1] == 'assets/figures.py'
    assert len({line.split('--json=')[1] for line in lines[:-1]}) == len(lines) - 1
    for line in lines[:-1]:
        script, *arguments = line.split()
        with open(os.path.join(ROOT, script)) as file:
            source = file.read()
        for name in [argument[2:].split('=')[0] for argument in arguments if argument.startswith('--')]:
            assert re.search(rf'^    {name}:', source, re.M), line
