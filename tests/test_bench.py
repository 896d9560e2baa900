"""
What must be true of bench.py, results/stability.py and assets/figures.py:  python -m pytest tests/test_bench.py

They measure what they say, on models so small that figures mean nothing: a row for every case, one for what does not fit,
and a file that keeps what was found before an interruption. Nothing here depends on how fast anything is.
"""
import importlib.util
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stdout

import pytest
import torch

from test_scripts import ROOT, Screen, complaint, place, run, whole      # noqa: F401, place and whole are fixtures

needs_proc = pytest.mark.skipif(not os.path.exists('/proc/self/clear_refs'), reason='memory is read from Linux /proc')
TINY = dict(n_layer=2, n_head=2, n_embd=32, block_size=32, batch_size=2, device='cpu')

def command(mode, **flags):
    return [os.path.join(ROOT, 'bench.py'), mode, *(f'--{name}={value}' for name, value in {**TINY, **flags}.items())]

def bench(place, mode, **flags):
    """(rows of its file, what it has written)."""
    with pytest.MonkeyPatch.context() as here, redirect_stdout(Screen()) as screen:
        here.chdir(place)
        here.setattr(sys, 'argv', command(mode, json='rows.json', **flags))
        try:
            runpy.run_path(os.path.join(ROOT, 'bench.py'), run_name='__main__')
        finally:
            torch.use_deterministic_algorithms(False)
    return json.loads((place / 'rows.json').read_text())['rows'], screen.getvalue()

@needs_proc
def test_depth_finds_what_it_predicts(place):
    rows, _ = bench(place, 'depth', cases='standard,leapfrog', layers='[2,6]', n_embd=128, block_size=128, batch_size=16)
    standard, leapfrog = rows
    weights = 4 * (12 * 128**2 + 13 * 128) / 1e6                # of a block: 12 C^2 + 13 C
    for row in rows:
        assert row['all_predicted'][0]['weights'] == row['all_predicted'][0]['gradients'] == pytest.approx(weights)
        assert row['all_predicted'][0]['optimizer'] == pytest.approx(2 * weights)
        assert row['weights MB'] + row['gradients MB'] + row['optimizer MB'] == pytest.approx(4 * weights, rel=0.5)
    assert standard['activations MB'] == pytest.approx(standard['predicted'], rel=0.25)
    assert leapfrog['predicted'] == 0 and leapfrog['of standard'] < 0.1

@needs_proc
def test_batch_and_length_under_a_budget(place):
    flags = dict(cases='standard,leapfrog', n_layer=8, n_embd=64, block_size=64)
    rows, _ = bench(place, 'batch', budget_gb='[0.0001,0.02]', **flags)
    assert [row['batch'] for row in rows[:2]] == ['does not fit', 'does not fit']
    assert 1 <= rows[2]['batch'] < rows[3]['batch'] and rows[3]['to standard'] == rows[3]['batch'] / rows[2]['batch']
    rows, _ = bench(place, 'batch', budget_gb=0.02, vary='length', chunked_loss=False, **flags)
    assert all(row['length'] == 'does not fit' or row['length'] % 128 == 0 for row in rows)

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

@needs_proc
def test_throughput_at_the_largest_batch(place):
    rows, _ = bench(place, 'throughput', cases='leapfrog', repeats=1, budget_gb=0.015)
    assert all(row['GB'] == 0.015 and row['batch'] > 1 and row['tokens/s'] > 0 for row in rows) and len(rows) == 1

def test_drift_is_zero_in_exact_states_and_only_there(place, whole):
    rows, _ = bench(place, 'drift', trained='whole/best.pt', n_layer=4)
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
    with subprocess.Popen([sys.executable, *command('drift', json=path, batch_size=16, n_layer=24)], cwd=place, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert any('exact' in line for line in process.stdout)          # the first row is there
        process.send_signal(signal.SIGINT)
        assert 'interrupted: the rows above are all there is' in process.communicate()[1] and process.returncode
    rows = json.loads(path.read_text())['rows']
    assert 1 <= len(rows) < 90 and rows[0]['case'] == 'midpoint'

@pytest.mark.parametrize('arguments, sentence', [
    ('', "unknown mode ''"), ('speed', "unknown mode 'speed'"), ('depth --cases=euler', "unknown case 'euler': choose among"),
    ('depth --layers=[3]', 'layers = [3] must be different'), ('batch', 'Give --budget_gb=24'), ('batch --budget_gb=-1', 'Give --budget_gb=24'),
    ('batch --budget_gb=1 --cases=leapfrog/dial', 'leapfrog/dial is a case of throughput at equal batch alone'),
    ('batch --budget_gb=1 --vary=depth', "vary = 'depth'"), ('throughput --vary=length', "vary = 'length'"),
    ('batch --budget_gb=1 --json=data', 'data cannot be written'), ('sample --compile=True', 'compile False'), ('throughput --repeats=0', 'repeats = 0'),
    ('throughput --n_embd=30 --n_head=4', 'n_embd = 30 must be divisible'), ('drift --trained=none.pt', 'there is no checkpoint none.pt')])
def test_bench_complains_in_a_sentence(place, arguments, sentence, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, 'argv', ['bench.py', *arguments.split()])
    with pytest.raises(SystemExit) as stop, redirect_stdout(Screen()):
        runpy.run_path(os.path.join(ROOT, 'bench.py'), run_name='__main__')
    torch.use_deterministic_algorithms(False)
    assert sentence in stop.value.code

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
    names = {os.path.splitext(name)[0] for name in os.listdir(tmp_path / 'results') if name.endswith('.json')}
    assert names and all(f'assets/{name}.png' in output and (tmp_path / 'assets' / f'{name}.png').exists() for name in {*names, 'loss'})
