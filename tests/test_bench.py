"""
What must be true of memory.py, bench.py, results/ and assets/:  python -m pytest tests/test_bench.py

They measure what they say, on models so small that figures mean nothing: a row for every case, one for what
does not fit, and a file that keeps its rows at any time. Nothing here depends on how fast anything is.
"""
import glob
import importlib
import io
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

import memory
from memory import count_two_steps
from model import GPT, GPTConfig, Tape
from results.table import open_table, spread
from runtime import count_parameters
from test_scripts import ROOT, SMALL, complaint, place, run, train, whole      # noqa: F401, two are fixtures

TINY = dict(n_layer=2, n_head=2, n_embd=32, block_size=32, slice_tokens=512)

def count(B, T=32, dtype='float32', fake=False, micro_batches=1, **fields):
    """The Count of such a model. Small ones are counted on real tensors sooner than on fake ones."""
    config = GPTConfig(**{**TINY, 'vocab_size': 64, **fields})
    return count_two_steps(lambda: GPT(config), B, T, dtype, fake, micro_batches)

# -----------------------------------------------------------------------------
# memory.py

LLAMA = dict(norm='rmsnorm', mlp='swiglu', n_kv_head=1, rope_theta=1e4, tied=False, bias=False)
SCHEMES = [
    dict(scheme='standard'), dict(scheme='standard', stored_layers=0), dict(scheme='midpoint'),
    dict(scheme='leapfrog'), dict(scheme='symplectic'), dict(scheme='midpoint_a', a=0.5),
    dict(scheme='midpoint_sum'), dict(scheme='leapfrog', exact=False), dict(stored_layers=2),
    dict(scheme='midpoint', dropout=0.1), dict(scheme='midpoint_a', a=-1 / 16, **LLAMA)]

@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('scheme', SCHEMES, ids=str)
def test_what_is_counted_without_memory_is_there_in_real_tensors_byte_for_byte(scheme, dtype):
    found = []
    for fake in (True, False):
        counted = count(32, dtype=dtype, fake=fake, **scheme)
        curve = counted.curve()
        births = sorted((x.size, x.kind) for sign, x in counted.events if sign == 1)
        found.append((curve.max(), counted.at(curve.argmax()), counted.work, births))
    assert found[0] == found[1]
    peak, kinds, _, _ = found[0]
    weights = kinds['weights']
    assert sum(kinds.values()) == peak and 2 * weights <= kinds['optimizer'] < 2 * weights + 1000
    assert weights == 4 * count_parameters(GPT(GPTConfig(**{**TINY, 'vocab_size': 64, **scheme})))

def test_the_counter_sees_a_state_that_is_kept(monkeypatch):
    """A planted fault: a step that saves its state makes memory grow with depth."""
    def slope():
        few, many = (count(32, n_layer=n) for n in (1, 3))
        weights = 16 * 12 * 32**2               # of a layer, with gradients and moments, about
        return (many.curve().max() - few.curve().max()) / 2 - weights

    flat = slope()
    evaluate = Tape.evaluate
    kept = []

    def keeping(tape, f, p):
        kept.append(p.clone())
        return evaluate(tape, f, p)

    monkeypatch.setattr(Tape, 'evaluate', keeping)
    state = 8 * 32 * 32 * 32
    assert flat < 0.2 * state and slope() > 0.9 * state

@pytest.mark.parametrize('heads', [2, 1])
@pytest.mark.parametrize('scheme, forward_passes', [('standard', 1), ('leapfrog', 2)])
def test_attention_and_matrix_products_are_counted(scheme, forward_passes, heads):
    """By hand: 2 operations per multiplication. Backward has twice forward's products, attention's 5 to 2."""
    B, T, C, V, L = 3, 32, 32, 64, 2
    blocks = 2 * B * T * C * C * L * (10 + heads)               # a head of keys, and of values, is half of C
    head = 2 * B * T * V * C
    attention = 4 * B * T * T * C * L
    work = count(B, T, scheme=scheme, n_kv_head=heads).work
    assert work == blocks * (forward_passes + 2) + head * 3 + attention * (forward_passes + 2.5)

def test_gradients_of_an_earlier_micro_batch_are_there_at_the_peak():
    def peak(micro_batches):
        counted = count(1, n_layer=8, n_embd=128, micro_batches=micro_batches)
        return int(counted.curve('gradients', 'activations').max())

    assert peak(1) < peak(2) == peak(3)

def test_a_model_that_no_cpu_holds_is_a_sentence():
    config = GPTConfig(n_embd=12 * 2**13, n_layer=96)
    with pytest.raises(ValueError, match=r'take 1[\d,]+ GB, and this machine has \d+ GB: choose'):
        memory.fitting(config, SimpleNamespace(kind='cpu', mesh=None))
    memory.fitting(config, SimpleNamespace(kind='cuda', mesh=None))
    memory.fitting(GPTConfig(**TINY), SimpleNamespace(kind='cpu', mesh=None))

# -----------------------------------------------------------------------------
# bench.py

def bench(place, mode, fake=False, **flags):
    """The rows of its file."""
    flags = {**TINY, 'batch_size': 2, 'device': 'cpu', 'json': 'rows.json', **flags}
    with pytest.MonkeyPatch.context() as here, redirect_stdout(io.StringIO()):
        here.chdir(place)
        here.setattr(sys, 'argv', ['bench.py', mode, *(f'--{name}={value}' for name, value in flags.items())])
        here.setattr(sys, 'excepthook', sys.excepthook)
        here.setattr(memory, 'count_two_steps', partial(count_two_steps, fake=fake))
        runpy.run_path(os.path.join(ROOT, 'bench.py'), run_name='__main__')
    return json.loads((place / 'rows.json').read_text())['rows']

def test_depth_finds_no_activations_per_layer(place):
    rows = bench(place, 'depth', cases='standard,leapfrog', layers='[2,4,6]', n_embd=64, batch_size=64)
    standard, leapfrog = (row['MB per layer'] for row in rows)
    assert abs(leapfrog) < 0.01 * standard
    two, four, six = (rows[0][f'{n} layers'] for n in (2, 4, 6))
    assert six - four == pytest.approx(four - two)

# two sequences of 32 tokens in slices of 8: a slice is a sequence, and a tile of the MLP 8 tokens
RIVALS = ['checkpointed', 'checkpointed/sliced', 'checkpointed/bf16', 'checkpointed/bf16/tiled',
          'checkpointed/host']
LONG = dict(slice_tokens=8, n_embd=64)

def test_rivals_are_counted_without_memory_as_in_real_tensors(place):
    flags = dict(LONG, cases=','.join(RIVALS), layers='[1,3]')
    fake, real = (bench(place, 'depth', fake, **flags) for fake in (True, False))
    assert len({str(dict(row, case='')) for row in fake}) == len(RIVALS)                # no two are the same
    for one, other in zip(fake, real):
        assert one.keys() == other.keys()
        # byte for byte, but for mean and deviation of two layer norms: for bf16 and float32 together a CPU
        # has them in float32, and fake ones are in bf16
        slack = 0 if one['case'] in RIVALS[:2] else 2 * 32 * 2 * 2 / 1e6
        for name, value in one.items():
            assert name == 'case' or value == pytest.approx(other[name], rel=0, abs=slack + 1e-9)

def test_what_checkpointing_keeps_grows_with_depth_unless_it_is_on_the_host(place):
    """In bytes, per layer: checkpointing keeps x alone, and of its elements float32 has 4, bf16 2."""
    rows = bench(place, 'depth', cases=','.join(RIVALS[1:]), layers='[2,4,6]', n_embd=64, batch_size=64)
    x = 32 * 64                                 # elements per sequence
    for row, size in zip(rows, (4, 2, 2, 0)):
        for two, four in ((2, 4), (4, 6)):
            more = row[f'{four} layers'] - row[f'{two} layers']
            assert more == pytest.approx(2 * 64 * x * size / 1e6, abs=1e-9), row['case']
    host = rows[-1]
    assert host['host MB per sequence'] == pytest.approx(6 * x * 2 / 1e6)
    assert host['moved MB per sequence'] == pytest.approx(2 * 6 * x * 2 / 1e6)          # there and back
    assert not any('host MB per sequence' in row for row in rows[:-1])

@pytest.mark.parametrize('mode', ['batch', 'length'])
def test_what_is_on_the_host_is_in_every_table(place, mode):
    row, = bench(place, mode, cases='checkpointed/host', budget_gb=0.01)
    tokens = 32 if mode == 'batch' else row['length']
    assert row['host MB per sequence'] == pytest.approx(TINY['n_layer'] * tokens * TINY['n_embd'] * 2 / 1e6)
    assert row['moved MB per sequence'] == 2 * row['host MB per sequence']

def test_a_copy_on_the_host_is_not_on_the_device():
    with memory.Count() as counted:
        x = torch.zeros(10)
        there = counted.move('host', x)
        back = counted.move('activations', there)
        del there, back
    assert counted.curve().tolist() == [0, 40, 40, 80, 80, 40]
    assert counted.curve('host').tolist() == [0, 0, 40, 40, 0, 0] and counted.moved == 80

def test_the_largest_batch_fits_and_the_next_does_not(place):
    rows = bench(place, 'batch', budget_gb='[0.0001,0.01]')
    found = {row['case']: row['batch'] for row in rows[5:]}
    assert [row['batch'] for row in rows[:5]] == ['does not fit'] * 5
    schemes = {'standard': {}, 'checkpointed': dict(stored_layers=0), 'leapfrog': dict(scheme='leapfrog')}
    for case, fields in schemes.items():
        more = found[case] + 1
        if case == 'leapfrog':                  # a slice may be smaller: the next batch of whole ones
            more = 16 * (found[case] // 16 + 1)
        fields = {'scheme': 'standard', 'vocab_size': 256, **fields}
        peaks = [count(B, dtype='bfloat16', **fields).curve().max() for B in (found[case], more)]
        assert peaks[0] <= 0.01e9 < peaks[1], (case, peaks)
    assert found['standard'] < found['checkpointed'] < found['checkpointed/sliced'] <= found['leapfrog']
    assert found['leapfrog'] < found['checkpointed/bf16']               # at two layers alone
    assert rows[-1]['to standard'] == found['leapfrog'] / found['standard']

def test_a_large_batch_is_known_from_small_ones_where_the_peak_moves_in_between(place):
    """Small batches have it at the end of backward, with gradients; large ones at its start, with bits."""
    sizes = dict(n_embd=128, block_size=64)
    row, = bench(place, 'batch', cases='midpoint_a/4bits', budget_gb=0.1, **sizes)
    element = 4 + 4 + 4 + 4 + 4 / 8             # two states, two gradients, bits of the second layer
    assert row['MB per sequence'] == 64 * (128 * element + 8) / 1e6                     # and tokens

def test_the_longest_context(place):
    standard, leapfrog = bench(place, 'length', cases='standard,leapfrog', budget_gb=0.01, slice_tokens=64)
    assert standard['length'] < leapfrog['length'] and leapfrog['length'] % 128 == 0

def test_tiles_and_the_host_make_contexts_longer(place):
    flags = dict(cases=','.join(RIVALS[2:]), budget_gb=0.2, n_layer=4, n_embd=64, block_size=4096)
    bf16, tiled, host = (row['length'] for row in bench(place, 'length', **flags))
    assert 1.2 * bf16 < tiled and 1.1 * tiled < host

def test_memory_against_work(place):
    lean = 'standard', 'checkpointed/sliced', 'checkpointed/bf16'
    rows = bench(place, 'frontier', n_layer=1, cases=','.join(lean) + ',leapfrog')
    work, memory = ({(row['case'], row['stored layers']): row[name] for row in rows}
                    for name in ('work', 'MB per sequence'))
    assert {work[case, 1] for case in (*lean, 'leapfrog')} == {1}
    assert len({work[case, 0] for case in lean}) == 1 < work['standard', 0] < work['leapfrog', 0]
    assert memory['checkpointed/sliced', 1] == memory['standard', 1] > memory['checkpointed/bf16', 1]
    assert memory['checkpointed/bf16', 1] > memory['checkpointed/bf16', 0]

def test_memory_over_time(place):
    for row in bench(place, 'curve', cases='checkpointed,leapfrog', n_layer=1):
        assert max(row['highest']) == row['peak MB'] and min(row['lowest']) >= 0 and 0 < row['forward'] < 1

@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='not on Linux')
def test_check_compares_with_a_new_process(place):
    row, = bench(place, 'check', cases='leapfrog', n_embd=256, block_size=256, batch_size=8)
    assert row['counted MB'] > 20 and 0.5 < row['ratio'] < 3    # libraries take some MB more

def test_throughput_at_equal_batch(place):
    cases = 'standard,checkpointed,checkpointed/sliced,checkpointed/bf16,leapfrog/dial,leapfrog/float'
    rows = bench(place, 'throughput', cases=cases, repeats=2)
    assert [row['case'] for row in rows] == cases.split(',')
    for row in rows:
        speeds = sorted(2 * 32 / seconds for seconds in row['all_seconds'])
        assert speeds == pytest.approx([row['lowest'], row['highest']])
        assert row['lowest'] <= row['tokens/s'] <= row['highest']
    assert rows[0]['time to standard'] == rows[1]['time to checkpointed'] == 1
    assert [row['stored layers'] for row in rows[:2]] == [2, 0]

def test_throughput_at_the_largest_batch(place):
    row, = bench(place, 'throughput', cases='leapfrog', repeats=1, budget_gb=0.004, processor_time=True)
    assert row['GB'] == 0.004 and row['batch'] > 1 and row['tokens/s'] > 0

NANOGPT = """
from dataclasses import dataclass
import model

@dataclass
class GPTConfig:                                # the names are nanoGPT's
    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True

class GPT(model.GPT):
    def __init__(self, config):
        super().__init__(model.GPTConfig(scheme='standard', **vars(config)))
"""

STAND_IN = NANOGPT + """
        for weight in self.parameters():        # bench.py gives it those of the others
            weight.data.zero_()

    def forward(self, idx, targets=None):
        with open('seen', 'a') as file:
            loss = super().forward(idx, targets)[1]
            print(*idx.shape, idx.sum().item(), len(self.transformer.h), loss.item(), file=file)
        return None, loss
"""

def test_nanogpt_runs_beside_ours(place, tmp_path):
    """Or rather what stands in for it."""
    path = tmp_path / 'model.py'
    path.write_text(STAND_IN)
    (place / 'seen').unlink(missing_ok=True)
    flags = dict(cases='standard,nanogpt', nanogpt=path, repeats=3, processor_time=True, dtype='float32')
    ours, its = bench(place, 'throughput', **flags)
    assert its['time to nanogpt'] == its['upper quartile'] == 1 and its['stored layers'] == 2
    assert 0 < ours['lower quartile'] <= ours['time to nanogpt'] <= ours['upper quartile']
    seen = (place / 'seen').read_text().splitlines()
    assert len(seen) == 4 * 4 and len(set(seen)) == 1 and seen[0].startswith('2 32 ')   # the same tokens
    torch.manual_seed(0)
    model = GPT(GPTConfig(scheme='standard', vocab_size=256, **TINY))
    torch.manual_seed(0)
    tokens = torch.randint(256, (2, 2, 32))
    assert seen[0].endswith(f' 2 {model(*tokens)[1].item()}')                           # and weights

@pytest.mark.skipif(not find_spec('revlib'), reason='revlib is not installed')
def test_another_library_runs_beside_ours(place):
    rows = bench(place, 'throughput', cases='standard,revlib', repeats=1, dtype='float32')
    assert rows[1]['least'] == rows[1]['time to standard'] > 0

def test_all_logits_at_once_take_more(place):
    flags = dict(cases='standard', budget_gb=0.05, vocab_size=2000, n_layer=1)
    chunked, whole = (bench(place, 'batch', chunked_loss=chunked, **flags) for chunked in (True, False))
    assert chunked[0]['batch'] > 5 * whole[0]['batch']

@pytest.mark.parametrize('mode, flags, sentence', [
    ('speed', {}, "unknown name 'speed': choose one of depth, batch"),
    ('depth', dict(cases='euler'), "unknown name 'euler': choose one of standard,"),
    ('batch', dict(shape='gpt9'), "unknown name 'gpt9': choose one of gpt2,"),
    ('throughput', dict(cases='nanogpt'), "'nanogpt' needs nanoGPT's model: give it as --nanogpt="),
    ('depth', dict(n_embd=30, n_head=4), 'n_embd must be divisible by n_head')])
def test_bench_complains_in_a_sentence(place, mode, flags, sentence):
    with pytest.raises(ValueError, match=sentence):
        bench(place, mode, **flags)

# -----------------------------------------------------------------------------
# results/

def test_a_table_keeps_its_rows_at_any_time(tmp_path, capsys):
    path = tmp_path / 'new' / 'table.json'
    row = open_table(str(path), dict(command='x'))
    row('one', size=1.5, seconds=None, all_seconds=[1, 2])
    row('two', size=12345.6, seconds=1e-5, all_seconds=[])
    rows = [dict(case='one', size=1.5, seconds=None, all_seconds=[1, 2]),
            dict(case='two', size=12345.6, seconds=1e-5, all_seconds=[])]
    assert json.loads(path.read_text()) == dict(command='x', rows=rows)
    names, one, two = (line.split() for line in capsys.readouterr().out.splitlines())
    assert (names, one, two) == (['size', 'seconds'], ['one', '1.5', '-'], ['two', '12,346', '1.0e-05'])
    assert spread('ab', [3, 1, 2]) == dict(a=2, b=1) and spread('ab', []) == dict(a=None, b=None)
    assert spread('abc', [5, 1, 2, 4, 3], 0.25) == dict(a=3, b=2, c=4)
    with pytest.raises(OSError):                # now, and not after hours of work
        open_table(str(tmp_path), {})

DRIFT = dict(n_head=2, n_embd=32, block_size=32, device='cpu')

@pytest.fixture
def nondeterministic():
    """drift.py asks for deterministic kernels, and later tests shall not."""
    yield
    torch.use_deterministic_algorithms(False)

def test_drift_is_zero_in_exact_states_and_only_there(place, whole, nondeterministic):
    flags = dict(DRIFT, schemes='leapfrog,symplectic', n_layer=4, batch_size=2, json='drift.json')
    run(place, 'results/drift.py', trained='whole/best.pt', **flags)
    rows = json.loads((place / 'drift.json').read_text())['rows']
    assert {row['weights'] for row in rows} == {'x1', 'x4', 'x8', 'trained'}
    assert {row['dtype'] for row in rows} == {'float32', 'bfloat16', 'float16'}
    for row in rows:
        layers = 2 if row['weights'] == 'trained' else 4
        steps = 2 * layers if row['case'] == 'symplectic' else layers
        assert len(row['gradient_errors']) == layers and len(row['state_errors']) == steps
        assert row['control'] == 0
        if row['states'] == 'exact':
            assert row['worst state'] == row['worst gradient'] == 0
        else:
            assert row['worst state'] > 0 and row['worst gradient'] > 0

def test_drift_complains_in_a_sentence(place, nondeterministic):
    assert 'none.pt' in complaint(place, 'results/drift.py', trained='none.pt', **DRIFT)
    assert 'rebuilds nothing' in complaint(place, 'results/drift.py', schemes='standard', **DRIFT)

def test_what_hurts_other_engines_does_not_hurt_ours(monkeypatch):
    peers = importlib.import_module('results.peers')
    rows = []
    monkeypatch.setattr(peers, 'parallel', lambda make: 'gradients')        # needs a group: see test_model.py
    peers.table(dict(leapfrog=partial(peers.ours, 'leapfrog')), lambda case, **values: rows.append(values))
    row, = rows
    assert row['error'] == row['error x8 bf16'] == row['error x8 dropout'] == 0
    assert row['frozen embedding'] == row['autograd.grad'] == 'gradients' and row['overflow'] == 'loss nan'
    assert row['changed weights'].startswith('stops: one of the variables needed')

def test_the_comparison_finds_the_lowest_loss():
    compare = importlib.import_module('results.compare')
    tried = set()

    def loss(scheme, h, rate, *_):
        tried.add((h, rate))
        return (math.log2(rate / 4e-3) - math.log2(h / 0.5) / 2) ** 2 + math.log2(h / 0.0625) ** 2

    h, rate = compare.best(loss, 'leapfrog')
    for near in ((h / 2, rate), (2 * h, rate), (h, rate / 2), (h, 2 * rate)):
        assert loss('leapfrog', h, rate) <= loss('leapfrog', *near)
    assert len({x for y, x in tried if y == h}) >= 4 and len({y for y, x in tried if x == rate}) >= 3
    assert [compare.RULES['2 / layers'][layers] for layers in (4, 12, 32)] == [0.5, 0.125, 0.0625]

def test_the_comparison_believes_no_noise():
    compare = importlib.import_module('results.compare')
    assert compare.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    for t, degrees in ((4.303, 2), (3.182, 3), (2.776, 4), (2.228, 10), (2.201, 11)):
        assert compare.two_sided(t, degrees) == pytest.approx(0.05, abs=1e-4)
    rows = dict(standard=[1.0, 1.1, 1.2], leapfrog=[0.9, 1.01, 1.1], midpoint=[1.01, 1.1, 1.19])
    found = {(one, other): values for one, other, *values in compare.pairs(rows)}
    mean, *p = found['standard', 'leapfrog']
    assert mean == pytest.approx(0.29 / 3) and max(p) < 0.01
    assert min(found['standard', 'midpoint'][1:]) > 0.3

def test_the_table_of_the_comparison_is_made_of_the_runs_that_are_kept(capsys):
    compare = importlib.import_module('results.compare')
    compare.table()
    output = capsys.readouterr().out
    assert 'as train.py has it no longer: bdia' in output and '12 layers: ' in output
    assert re.search(r'^leapfrog +\(0\.\d+, 0\.\d+\) +1\.\d+ +1\.\d+ +1\.\d+ +1\.6667', output, re.M)

ITS_TRAIN = """
import pickle, sys
import numpy as np
flags = dict(arg[2:].split('=') for arg in sys.argv[1:])
tokens = [np.fromfile(f"data/{flags['dataset']}/{name}.bin", np.uint16).tolist() for name in ('train', 'val')]
with open('data/ours/meta.pkl', 'rb') as file, open(PLACE + '/seen.txt', 'a') as seen:
    print(pickle.load(file), len(tokens[0]), len(tokens[1]), max(tokens[0]), *(flags[name] for name in (
        'n_embd', 'max_iters', 'device', 'compile')), file=seen)
"""

def test_steps_of_nanogpt_and_ours_are_timed_on_the_same_tokens(place, tmp_path):
    (tmp_path / 'train.py').write_text(f'PLACE = {str(tmp_path)!r}\n' + ITS_TRAIN)
    config = dict(SMALL, scheme='leapfrog', h=0.5)
    (place / 'small.py').write_text(''.join(f'{name} = {value!r}\n' for name, value in config.items()))
    flags = dict(nanogpt=tmp_path, config='small.py', few=1, many=3, repeats=1, json='steps.json')
    run(place, 'results/nanogpt.py', **flags)
    its, ours = json.loads((place / 'steps.json').read_text())['rows']
    assert its['case'] == 'nanogpt' and its['time to nanogpt'] == 1
    assert ours['case'] == 'standard' and len(ours['all_ms']) == 1
    what = "{'vocab_size': 256} 2000 1000 104 16"
    assert (tmp_path / 'seen.txt').read_text() == f'{what} 1 cpu False\n{what} 3 cpu False\n'

def test_sampling_writes_the_same_tokens_as_transformers(place):
    sizes = dict(n_layer=2, n_head=2, n_embd=32, vocab_size=65, block_size=32)
    flags = dict(sizes, new_tokens=20, repeats=1, device='cpu', dtype='float32')
    output = run(place, 'results/sampling.py', **flags)
    assert 'transformers are the same' in output and 'leapfrog, cached' in output

def test_stability_finds_the_intervals_of_the_theory(place, whole):
    run(place, 'results/stability.py', trained='whole/best.pt', json='stability.json', device='cpu')
    rows = json.loads((place / 'stability.json').read_text())['rows']
    both = {f"{row['case']} {row['z is']}": row['stable in both'] for row in rows[:-1]}
    assert both == {
        'standard real': 'nowhere', 'midpoint imaginary': '0 to 1', 'leapfrog real': '-4 to 0',
        'symplectic real': '-4 to 0', 'midpoint_a, a = 0.5 real': 'nowhere',
        'midpoint_a, a = 0.5 imaginary': 'nowhere'}
    damped = next(row for row in rows if 'a = 0.5' in row['case'])
    assert all(down >= 2 - 1e-9 for down in damped['down'])             # 1 / |a|
    trained = rows[-1]
    assert len(trained['up']) == len(trained['down']) == 3 and trained['up'][0] == trained['down'][0] == 1

def test_a_conversion_with_many_bits_is_near_its_teacher(place):
    train(place, 'teacher', scheme='standard', n_layer=6, max_iters=2)
    flags = dict(teacher='teacher/best.pt', dataset='tiny', block_size=16, device='cpu')
    run(place, 'results/conversion.py', json='conversion.json', **flags)
    found = {row['case']: row['last'] for row in json.loads((place / 'conversion.json').read_text())['rows']}
    assert -1e-6 < found['a = -0.0625'] < found['a = -0.25'] < found['a = -0.5']
    assert {'4 layers at a = -1', '6 layers at a = 1'} <= found.keys()

def test_shares_of_a_sharded_model_add_up_and_are_known_without_sharding_it():
    sharded = importlib.import_module('results.sharded')
    shape = dict(n_layer=6, n_head=2, n_embd=64, vocab_size=64, block_size=32)
    config = GPTConfig(**shape)
    parameters = count_parameters(GPT(config))
    for B in (1, 64):                       # the peak is at the end of the backward pass, or at its start
        counts = [sharded.sharded_steps(shape, 2, B, 32, rank) for rank in range(2)]
        rest = sum(count.curve()[count.marks[-1][1]] for count in counts)
        assert 16 * parameters <= rest < 16.2 * parameters
        plain = memory.count_two_steps(lambda: GPT(config), B, 32, 'bfloat16')
        guess = memory.shard_curve(plain, config, 2).max()
        assert counts[0].curve().max() == pytest.approx(guess, rel=0.1)

@pytest.mark.skipif(not find_spec('matplotlib'), reason='matplotlib is not installed')
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
    environment = dict(os.environ, PATH=f"{tmp_path}:{os.environ['PATH']}")
    script = ['bash', os.path.join(ROOT, 'results', 'gpu.sh')]
    lines = subprocess.check_output(script, cwd=tmp_path, text=True, env=environment).splitlines()
    assert len(lines) > 10 and lines[-1] == 'assets/figures.py'
    assert len({line.split('--json=')[1] for line in lines[:-1]}) == len(lines) - 1
    for line in lines[:-1]:
        script, *arguments = line.split()
        with open(os.path.join(ROOT, script)) as file:
            source = file.read()
        for name in [argument[2:].split('=')[0] for argument in arguments if argument.startswith('--')]:
            assert re.search(rf'^    {name}:', source, re.M), line
