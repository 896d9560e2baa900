"""
What must be true of train.py and the configs, as a user runs them:  python -m pytest tests/test_scripts.py

Small models on a small data set made here: resuming, stopping, two processes, and one clear sentence, without
a traceback, for what a user can get wrong.
"""
import csv
import gc
import glob
import importlib.util
import io
import json
import os
import re
import runpy
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import model as model_py
import runtime
from configurator import configure
from model import GPT, GPTConfig
from pretrained import step_sizes
from runtime import load_checkpoint, save_checkpoint

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SMALL = dict(dataset='tiny', batch_size=4, gradient_accumulation_steps=2, block_size=16, n_layer=2, n_head=2,
             n_embd=16, dropout=0.1, max_iters=8, warmup_iters=2, eval_interval=4, eval_windows=9,
             log_interval=1, device='cpu')

@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A folder with data/tiny, whose tokens are bytes, to run scripts in."""
    place = tmp_path_factory.mktemp('place')
    folder = place / 'data' / 'tiny'
    folder.mkdir(parents=True)
    text = np.random.default_rng(0).choice(list(b'abcdefgh '), 3000).astype(np.uint8)
    text[:2000].tofile(folder / 'train.bin')
    text[2000:].tofile(folder / 'val.bin')
    (folder / 'meta.json').write_text(json.dumps(dict(encoding='bytes', vocab_size=256, dtype='uint8')))
    return place

def command(script, processes=1, **flags):
    launch = []
    if processes > 1:
        launch = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    flags = [f'--{name}={value}' for name, value in flags.items()]
    return [sys.executable, *launch, os.path.join(ROOT, script), *flags]

class Screen(io.StringIO):
    def reconfigure(self, **_):
        pass

def run_here(place, script, **flags):
    """(the sentence it ends with, or None; what it writes) of a script in this process, which has torch."""
    sentence = None
    with pytest.MonkeyPatch.context() as here, redirect_stdout(Screen()) as screen:
        here.chdir(place)
        here.setattr(sys, 'argv', command(script, **flags)[1:])
        here.setattr(sys, 'excepthook', sys.excepthook)
        here.setattr(runtime, 'catch_signals', lambda: None)    # pytest goes on stopping at Ctrl-C
        try:
            runpy.run_path(os.path.join(ROOT, script), run_name='__main__')
        except (ValueError, OSError) as error:
            sentence = str(error)
    gc.collect()                            # what a script leaves in cycles holds the lock on its out_dir
    return sentence, screen.getvalue()

def run(place, script, processes=1, **flags):
    """What a script writes."""
    if processes == 1:
        sentence, output = run_here(place, script, **flags)
        assert not sentence, sentence
        return output
    words = command(script, processes, **flags)
    result = subprocess.run(words, cwd=place, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout

def complaint(place, script, **flags):
    """The sentence a script ends with."""
    sentence, _ = run_here(place, script, **flags)
    assert sentence and len(sentence.splitlines()) == 1
    return sentence

def train(place, out_dir, **flags):
    """The rows of its log."""
    run(place, 'train.py', out_dir=out_dir, **{**SMALL, **flags})
    return rows(place, out_dir)

def rows(place, out_dir):
    """The columns of the log that do not depend on the clock, per step."""
    names = 'step', 'loss', 'lr', 'grad_norm', 'val_loss'
    with open(place / out_dir / 'log.csv', newline='') as file:
        return [tuple(row[name] for name in names) for row in csv.DictReader(file)]

def weights(place, out_dir):
    return load_checkpoint(str(place / out_dir / 'last.pt'))['model']

def assert_same_weights(place, one, other):
    other = weights(place, other)
    for name, weight in weights(place, one).items():
        assert torch.equal(weight, other[name]), name

@pytest.fixture(scope='module')
def whole(place):
    return train(place, 'whole')

# -----------------------------------------------------------------------------
# train.py

def test_a_stopped_run_resumes_bit_for_bit(place, whole):
    for sent in (signal.SIGTERM, signal.SIGINT):
        out = f'stopped{sent}'
        flags = dict(SMALL, out_dir=out)
        words = command('train.py', **flags)
        with subprocess.Popen(words, cwd=place, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                if line.startswith('step 2: loss'):
                    process.send_signal(sent)
            assert 'stopped at step' in line, 'it was too fast to be stopped'
        assert process.returncode == 0
        assert int(rows(place, out)[-1][0]) < SMALL['max_iters']
        assert train(place, out, init_from='resume') == whole
        assert_same_weights(place, 'whole', out)

GROWING = dict(fractional_bits=30, weight_decay=0.0, lr_decay_iters=8)      # states from -2 to 2

def test_states_that_grow_get_fewer_fractional_bits_and_resume_bit_for_bit(place):
    one = train(place, 'growing', learning_rate=0.1, **GROWING)
    train(place, 'growing_stopped', learning_rate=0.1, **{**GROWING, 'max_iters': 4})
    bits = [load_checkpoint(str(place / out / 'last.pt'))['config']['fractional_bits']
            for out in ('growing_stopped', 'growing')]
    assert 30 > bits[0] > bits[1] > 20
    assert train(place, 'growing_stopped', learning_rate=0.1, init_from='resume', **GROWING) == one
    assert_same_weights(place, 'growing', 'growing_stopped')

def test_a_state_that_leaves_its_range_stops_before_the_weights_change_and_goes_on_with_fewer_bits(place):
    flags = dict(SMALL, out_dir='full', learning_rate=0.5, **GROWING)
    sentence = complaint(place, 'train.py', **flags)
    words = r'stopped at step (\d): a state would leave its range: continue with --init_from=resume (\S+)'
    step, advice = re.fullmatch(words, sentence).groups()
    checkpoint = load_checkpoint(str(place / 'full' / 'last.pt'))
    assert checkpoint['step'] == int(step) > 0
    assert all(weight.isfinite().all() for weight in checkpoint['model'].values())
    flags['init_from'] = 'resume'
    assert complaint(place, 'train.py', **flags) == sentence
    name, bits = advice.removeprefix('--').split('=')
    run(place, 'train.py', **{**flags, name: bits})
    assert int(rows(place, 'full')[-1][0]) == 8
    run(place, 'train.py', **{**flags, 'max_iters': 9, 'lr_decay_iters': 8, 'state_bits': 64})
    assert load_checkpoint(str(place / 'full' / 'last.pt'))['config']['state_bits'] == 64

def test_steps_after_the_last_checkpoint_are_run_and_logged_once(place, whole):
    """As after a power cut: the log knows steps that last.pt does not."""
    train(place, 'killed', lr_decay_iters=8, max_iters=4)
    log = place / 'killed' / 'log.csv'
    log.write_text(log.read_text() + '5,9.9,1e-4,1.0,1,1,,\n')
    assert train(place, 'killed', init_from='resume') == whole
    log.write_bytes(b'step,loss\n1,\xff\n\n\0\0\0')             # a damaged log stops no run
    train(place, 'killed', init_from='resume')

def test_the_log_of_an_older_run_keeps_its_columns(place, whole):
    train(place, 'older', lr_decay_iters=8, max_iters=4)
    log = place / 'older' / 'log.csv'
    with open(log, newline='') as file:
        found = list(csv.DictReader(file))
    fewer = 'step loss lr grad_norm tokens_per_s val_loss'.split()
    with open(log, 'w', newline='') as file:
        writer = csv.DictWriter(file, fewer, extrasaction='ignore')
        writer.writeheader()
        writer.writerows(found)
    assert train(place, 'older', init_from='resume') == whole

def test_evaluation_does_not_change_training(place, whole):
    often = train(place, 'often', eval_interval=1, eval_windows=30)
    assert [row[:4] for row in often if row[1]] == [row[:4] for row in whole if row[1]]

def test_accumulation_and_processes_do_not_change_the_data(place):
    flags = dict(dropout=0.0, max_iters=4)
    one = train(place, 'one', batch_size=8, gradient_accumulation_steps=1, **flags)
    flags.update(batch_size=2, gradient_accumulation_steps=4)
    for other in (train(place, 'accumulated', **flags), train(place, 'two', processes=2, **flags)):
        assert len(one) == len(other)
        for a, b in zip(one, other):
            for x, y in zip(a, b):
                assert x == y == '' or float(x) == pytest.approx(float(y), rel=1e-5)

def test_validation_loss_is_that_of_the_saved_model(place, whole):
    checkpoint = load_checkpoint(str(place / 'whole' / 'last.pt'))
    model = GPT(GPTConfig(**checkpoint['config'])).eval()
    model.load_state_dict(checkpoint['model'])
    val = np.fromfile(place / 'data' / 'tiny' / 'val.bin', np.uint8)
    losses = [model(*(torch.tensor(val[None, i + j:i + j + 16].astype(int)) for j in (0, 1)))[1].item()
              for i in np.linspace(0, len(val) - 17, 9).astype(int)]
    assert np.mean(losses) == pytest.approx(float(whole[-1][-1]), rel=1e-5)

def test_validation_windows_are_spread_over_the_processes(monkeypatch):
    rows, knobs = [], SimpleNamespace(block_size=4, eval_windows=9, batch_size=2)
    here = SimpleNamespace(device=torch.device('cpu'), autocast=torch.autocast('cpu', enabled=False))

    class Model(torch.nn.Module):
        def forward(self, x, y):
            rows.extend(x[:, 0].tolist())
            return None, x[:, 0].float().mean()

    means = []
    for monkey, world in ((0, 1), (0, 2), (1, 2)):
        monkeypatch.setattr(runtime, 'rank', monkey)
        monkeypatch.setattr(runtime, 'world', world)
        monkeypatch.setattr(runtime, 'all_reduce', lambda *numbers: list(numbers))
        means.append(runtime.validation_loss(Model(), np.arange(1000), knobs, here))
    assert len(set(rows[:9])) == 9 and sorted(rows[:9]) == sorted(rows[9:18])
    assert len(rows) == 19                  # one more, of no weight: FSDP2 needs as many passes everywhere
    assert means[0] == np.mean(rows[:9]) and means[1] == sum(rows[9:14]) / 9

def test_learning_rate_and_gradient_norm(place, whole):
    warm, low, high = [6e-4 / 3, 6e-4 * 2 / 3], 6e-5, 6e-4
    cosine = [low + (high - low) * (1 + np.cos(np.pi * i / 6)) / 2 for i in range(6)]
    assert [float(row[2]) for row in whole if row[1]] == pytest.approx(warm + cosine)
    train(place, 'clipped', max_iters=2, grad_clip=1e-12, weight_decay=0.0, dropout=0.0)
    train(place, 'moved', max_iters=2, weight_decay=0.0, dropout=0.0)
    train(place, 'first', max_iters=1, learning_rate=0.0, min_lr=0.0, weight_decay=0.0, dropout=0.0)
    first = weights(place, 'first')
    clipped, moved = (max((w - first[name]).abs().max() for name, w in weights(place, out).items())
                      for out in ('clipped', 'moved'))
    assert clipped < 1e-7 < 1e-4 < moved

def test_weights_that_are_not_those_of_the_config_are_a_sentence(place):
    train(place, 'cut', max_iters=1)
    path = str(place / 'cut' / 'last.pt')
    checkpoint = load_checkpoint(path)
    name = 'transformer.h.0.mlp.c_fc.weight'
    for weights in (checkpoint['model'] | {name: checkpoint['model'][name][:10].clone()},
                    {key: x for key, x in checkpoint['model'].items() if key != name}):
        save_checkpoint([path], dict(checkpoint, model=weights))
        sentence = complaint(place, 'train.py', **dict(SMALL, out_dir='cut', init_from='resume'))
        assert 'the weights of the checkpoint are not those of its config' in sentence

def test_a_loss_that_is_not_finite_stops_the_run(place):
    train(place, 'broken', max_iters=4)
    before = (place / 'broken' / 'last.pt').read_bytes()
    sentence = complaint(place, 'train.py', out_dir='broken', init_from='resume',
                         **{**SMALL, 'learning_rate': 1e20, 'min_lr': 1e20})
    assert 'step 6 was stopped' in sentence and 'last.pt is unchanged: the loss is nan' in sentence
    assert (place / 'broken' / 'last.pt').read_bytes() == before

def test_a_step_whose_states_were_rebuilt_wrong_stops_the_run(place, monkeypatch):
    """A planted fault: one bit of one element, in a single call."""
    train(place, 'faulty', max_iters=4)
    before = (place / 'faulty' / 'last.pt').read_bytes()
    calls = []
    sound = model_py.unkick

    def unkick(v, *args):
        calls.append(0)
        if len(calls) == 9:                 # a step is 2 micro-batches x 2 layers
            v[0, 0, 0] ^= 1
        return sound(v, *args)

    monkeypatch.setattr(model_py, 'unkick', unkick)
    flags = dict(SMALL, out_dir='faulty', init_from='resume')
    sentence = complaint(place, 'train.py', **flags)
    assert 'step 7 was stopped' in sentence and 'states are not those of the forward pass' in sentence
    assert (place / 'faulty' / 'last.pt').read_bytes() == before
    calls.clear()
    run(place, 'train.py', **flags, verify=False)

def test_the_best_checkpoint_is_not_written_twice(place):
    train(place, 'first', max_iters=1, eval_interval=1)
    last, best = (place / 'first' / f'{name}.pt' for name in ('last', 'best'))
    content = best.read_bytes()
    assert last.samefile(best)
    train(place, 'first', init_from='resume', max_iters=2, learning_rate=3.0, min_lr=3.0)
    assert best.read_bytes() == content != last.read_bytes()

def test_a_validation_loss_that_is_not_finite_is_not_saved(place):
    train(place, 'broken2', max_iters=4)
    before = (place / 'broken2' / 'last.pt').read_bytes()
    flags = dict(SMALL, out_dir='broken2', init_from='resume', learning_rate=1e20, min_lr=1e20)
    flags['eval_interval'] = 1
    assert 'the validation loss is' in complaint(place, 'train.py', **flags)
    assert (place / 'broken2' / 'last.pt').read_bytes() == before

def test_float16_with_its_scaler(place):
    losses = [float(row[1]) for row in train(place, 'half', dtype='float16') if row[1]]
    assert np.isfinite(losses).all()
    assert load_checkpoint(str(place / 'half' / 'last.pt'))['scaler']['scale'] > 0

def test_auto_stores_what_fits_and_changes_no_bit(place):
    found = {}
    for gigabytes in (0.0008, 0.001, 0.1):
        flags = dict(stored_layers='auto', memory_gb=gigabytes, n_layer=6, max_iters=3, eval_interval=3)
        output = run(place, 'train.py', out_dir=f'auto{gigabytes}', **{**SMALL, **flags})
        found[gigabytes] = int(re.search(r'stored_layers = (\d) of 6: ', output)[1])
        assert f'{found[gigabytes]} of 6 layers stored' in output
    assert 0 < found[0.0008] < found[0.001] < found[0.1] == 6
    for gigabytes in (0.0008, 0.001):
        assert_same_weights(place, 'auto0.1', f'auto{gigabytes}')

# -----------------------------------------------------------------------------
# one clear sentence

@pytest.mark.parametrize('flags, words', [
    (dict(dataset='nowhere'), 'run "python data/text/prepare.py FILES --name=nowhere" first'),
    (dict(vocab_size=100), 'is too small: needed are 256 and 16'),
    (dict(stored_layers='auto'), 'memory_gb'),
    (dict(stored_layers='auto', memory_gb=0.001, batch_size=64), 'memory_gb is 0.001'),
    (dict(stored_layers='auto', memory_gb=0.0), 'memory_gb = 0 must be from'),
    (dict(stored_layers='most'), 'stored_layers must be from 0 to n_layer'),
    (dict(block_size=1500), 'too few tokens for block_size = 1500'),
    (dict(scheme='euler'), "unknown scheme 'euler'"),
    (dict(init_from='resume'), 'there is no checkpoint'),
    (dict(init_from='elsewhere'), 'elsewhere'),
    (dict(batch_size=0), 'batch_size = 0 must be from 1 to'),
    (dict(learning_rate='nan'), "learning_rate = 'nan' is of type str: expected float"),
    (dict(out_dir='data/tiny/train.bin'), 'File exists'),
    (dict(device='abacus'), "device = 'abacus'"),
    (dict(dtype='float8'), "dtype = 'float8'"),
    (dict(bits=4), 'bits are for a trained standard model'),
    (dict(bits=9), 'bits = 9 must be from 0 to 8'),
], ids=str)
def test_train_complains_in_a_sentence(place, flags, words):
    assert words in complaint(place, 'train.py', **{**SMALL, 'out_dir': 'none', **flags})

@pytest.mark.parametrize('value', ['9' * 5000, '0x' + 'f' * 5000, '1' + '0' * 400, '[' * 100000, '1e400'],
                         ids=lambda value: value[:4])
@pytest.mark.parametrize('name', 'n_layer n_embd block_size vocab_size learning_rate a seed dropout'.split())
def test_numbers_without_end_are_a_sentence(place, name, value):
    assert name in complaint(place, 'train.py', **{**SMALL, 'out_dir': 'none', name: value})

def test_a_trained_standard_model_becomes_reversible_on_the_way_in(place):
    train(place, 'standard', scheme='standard', n_layer=4)
    trained = load_checkpoint(str(place / 'standard' / 'last.pt'))['model']

    def goes_on(out_dir, **flags):
        flags = {'init_from': 'standard/last.pt', **flags}
        rows = train(place, out_dir, n_layer=4, max_iters=2, eval_interval=2, **flags)
        return float(rows[0][-1]), load_checkpoint(str(place / out_dir / 'last.pt'))['config']

    before, config = goes_on('finetuned')
    assert config['scheme'] == 'standard'
    losses = {}
    for bits in (1, 4, 8):
        losses[bits], config = goes_on(f'finetuned{bits}', bits=bits)
        assert (config['scheme'], config['stored_layers']) == ('midpoint_a', 0)
        assert config['a'] == [-1 / 2**bits] * 4
        assert config['h'] == step_sizes(config['a'])
    assert 0 < abs(losses[8] - before) < abs(losses[1] - before) < 0.1
    assert goes_on('finetuned_leapfrog', scheme='leapfrog', h=0.5)[1]['h'] == 0.5
    assert goes_on('finetuned_a', a=0.5)[1]['h'] == [1.5] * 4
    assert set(trained) == set(weights(place, 'finetuned1'))
    train(place, 'finetuned1', init_from='resume', n_layer=4, max_iters=3, eval_interval=2, bits=1)
    assert load_checkpoint(str(place / 'finetuned1' / 'last.pt'))['config']['a'] == [-0.5] * 4
    for flags, words in ((dict(bits=1.5), 'expected int'), (dict(scheme='midpoint_a'), 'needs its a'),
                         (dict(scheme='leapfrog', a=0.5), 'leapfrog has no a to choose'),
                         (dict(h=0.5), 'h = 0.5, but standard/last.pt keeps'),
                         (dict(bits=1, init_from='finetuned4/last.pt'), 'leave bits out'),
                         (dict(scheme='leapfrog', init_from='finetuned4/last.pt'), 'scheme = leapfrog, but')):
        flags = {**SMALL, 'n_layer': 4, 'out_dir': 'none', 'init_from': 'standard/last.pt', **flags}
        assert words in complaint(place, 'train.py', **flags)

def test_resume_refuses_another_model_and_takes_the_other_knobs(place, whole):
    (place / 'changed').mkdir()
    (place / 'changed' / 'last.pt').write_bytes((place / 'whole' / 'last.pt').read_bytes())
    flags = dict(SMALL, out_dir='changed', init_from='resume')
    sentence = complaint(place, 'train.py', **flags, h=1.0)
    assert 'h = 1.0, but changed/last.pt was made with h = None' in sentence
    train(place, 'changed', init_from='resume', max_iters=9, weight_decay=0.5, dropout=0.2)
    checkpoint = load_checkpoint(str(place / 'changed' / 'last.pt'))
    assert [group['weight_decay'] for group in checkpoint['optimizer']['param_groups']] == [0.5, 0.0]
    assert checkpoint['config']['dropout'] == 0.2

@pytest.mark.parametrize('fields, words', [
    (dict(scheme='euler'), "unknown scheme 'euler': choose one of standard, midpoint"),
    (dict(n_head=5), 'n_embd must be divisible by n_head'),
    (dict(scheme='midpoint_a', a=0.3), 'a = 0.3 cannot be undone exactly'),
    (dict(scheme='midpoint_a', a=2), 'a = 2 cannot be undone exactly'),
    (dict(scheme='midpoint_a', a=0.0), 'a = 0.0 cannot be undone exactly'),
    (dict(scheme='midpoint_a', a=1 / 512), 'k up to 8'),
    (dict(scheme='midpoint_a', a=[0.5]),
     "a must be a finite number, n_layer of them, or of midpoint_a 'random'"),
    (dict(scheme='symplectic', h=0.5), 'symplectic has no h to choose'),
    (dict(scheme='standard', h=0.5), 'standard has no h to choose'),
    (dict(scheme='leapfrog', a=0.5), 'leapfrog has no a to choose'),
    (dict(stored_layers=13), 'stored_layers must be from 0 to n_layer'),
], ids=str)
def test_config_complains_in_a_sentence(fields, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        GPTConfig(**fields)

def test_damage_anywhere_is_a_sentence(place, whole, tmp_path):
    content = (place / 'whole' / 'last.pt').read_bytes()
    path = tmp_path / 'last.pt'
    sound = load_checkpoint(str(place / 'whole' / 'last.pt'))['model']
    size = len(content)
    for position in [*range(0, 200, 7), *range(size - 900, size, 7), *range(0, size, 9973)]:
        path.write_bytes(content[:position] + bytes([content[position] ^ 16]) + content[position + 1:])
        try:
            found = load_checkpoint(str(path))['model']         # a bit that says nothing, such as padding
        except ValueError as error:
            assert 'use another one' in str(error)
        else:
            assert all(torch.equal(found[name], sound[name]) for name in sound)

@pytest.mark.parametrize('renames', [0, 1])
def test_killed_between_two_renames_both_checkpoints_are_whole(tmp_path, monkeypatch, renames):
    last, best = (str(tmp_path / name) for name in ('last.pt', 'best.pt'))
    save_checkpoint([last, best], dict(model=dict(n=1), config={}, meta={}))
    replace, done = os.replace, []

    def killed(source, target):
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(replace(source, target))

    monkeypatch.setattr(os, 'replace', killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint([last, best], dict(model=dict(n=2), config={}, meta={}))
    monkeypatch.undo()
    kept = load_checkpoint(best)['model']
    save_checkpoint([last], dict(model=dict(n=3), config={}, meta={}))
    assert (load_checkpoint(last)['model'], load_checkpoint(best)['model']) == (dict(n=3), kept)
    save_checkpoint([last, best], dict(model=dict(n=4), config={}, meta={}))
    assert load_checkpoint(last)['model'] == load_checkpoint(best)['model'] == dict(n=4)

def test_a_checkpoint_runs_no_code(tmp_path):
    class Malice:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'done'),)

    torch.save(dict(model={}, config={}, meta=Malice()), tmp_path / 'last.pt')
    with pytest.raises(ValueError, match='holds Python objects .*, which are not loaded'):
        load_checkpoint(str(tmp_path / 'last.pt'))
    assert not (tmp_path / 'done').exists()

@pytest.mark.parametrize('damage', ['cut off', 'one bit', 'empty', 'text'])
def test_damaged_checkpoints_are_refused_and_kept(place, whole, damage):
    content = bytearray((place / 'whole' / 'last.pt').read_bytes())
    if damage == 'one bit':
        content[len(content) // 2] ^= 4
    content = dict(zip(['cut off', 'one bit', 'empty', 'text'],
                       [content[:len(content) // 2], content, b'', b'not a checkpoint']))[damage]
    (place / 'damaged').mkdir(exist_ok=True)
    (place / 'damaged' / 'last.pt').write_bytes(content)
    with pytest.raises(ValueError, match='is damaged, cut off, or not written'):
        load_checkpoint(str(place / 'damaged' / 'last.pt'))
    if damage == 'cut off':
        assert 'damaged' in complaint(place, 'train.py', **dict(SMALL, out_dir='damaged', init_from='resume'))
        assert 'damaged' in complaint(place, 'sample.py', init_from='damaged/last.pt')
    assert (place / 'damaged' / 'last.pt').read_bytes() == content

def test_a_checkpoint_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path, one = str(tmp_path / 'last.pt'), dict(step=1, model={}, config={}, meta={})
    save_checkpoint([path], one)

    def torn(checkpoint, file):
        file.write(b'half')
        raise OSError('no space left on device')

    monkeypatch.setattr(torch, 'save', torn)
    with pytest.raises(ValueError, match='no space left on device.: make room; what was there is unchanged'):
        save_checkpoint([path], dict(one, step=2))
    assert load_checkpoint(path) == dict(one, run=None) and os.listdir(tmp_path) == ['last.pt']

# -----------------------------------------------------------------------------
# configurator.py and config/

def knobs_of(script, whole=False):
    """Its dataclass, or all it defines, without running the script."""
    name = 'definitions_of_' + os.path.splitext(script)[0]          # torch.compile finds globals by this name
    spec = importlib.util.spec_from_file_location(name, os.path.join(ROOT, script))
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    with open(os.path.join(ROOT, script)) as file:
        source = file.read()
    exec(compile(source[:source.index('knobs = configure')], script, 'exec'), module.__dict__)
    return module if whole else module.Knobs

def test_command_line(tmp_path, capsys):
    Knobs = knobs_of('train.py')
    file = tmp_path / 'some.py'
    file.write_text('"""Purpose."""\nbatch_size = 3     # comment\nscheme = "midpoint_a"\na = [0.5, 1]\n')
    knobs = configure(Knobs, [str(file), '--learning_rate=1', '--h=2', '--out_dir=7', '--batch_size=5'])
    assert (knobs.batch_size, knobs.scheme, knobs.a, knobs.out_dir) == (5, 'midpoint_a', [0.5, 1], '7')
    assert (type(knobs.learning_rate), type(knobs.h), knobs.bias) == (float, float, False)
    with pytest.raises(SystemExit) as stop:
        configure(Knobs, ['--help'])
    assert not stop.value.code and 'batch_size: int = 12' in capsys.readouterr().out
    for argument, words in [('--batchsize=8', 'mean batch_size'), ('--batch_size=8.0', 'expected int'),
                            ('--batch_size=True', 'expected int'), ('--compile=1', 'expected bool'),
                            ('--dropout=none', 'expected float'), ('--compile', 'write --compile=VALUE'),
                            ('absent.py', 'there is no config file')]:
        with pytest.raises(ValueError, match=words):
            configure(Knobs, [argument])
    file.write_text('print(1)\n')
    with pytest.raises(ValueError, match='line 1 of .*some.py is not of the kind "n_layer = 8"'):
        configure(Knobs, [str(file)])

@pytest.mark.parametrize('path', sorted(glob.glob(f'{ROOT}/config/*.py')), ids=os.path.basename)
def test_every_config_builds(path):
    if os.path.basename(path).startswith('retrofit'):
        assert configure(knobs_of('retrofit.py'), [path]).dataset
        return
    knobs = configure(knobs_of('train.py'), [path])
    fields = {name: getattr(knobs, name) for name in GPTConfig.__dataclass_fields__}
    assert fields['stored_layers'] in ('auto', None) or 'compare' in path
    fields.update(scheme=knobs.scheme or 'leapfrog', vocab_size=knobs.vocab_size or 50304, stored_layers=None,
                  state_bits=knobs.state_bits or 32)
    with torch.device('meta'):
        GPT(GPTConfig(**fields))
    assert knobs.gradient_accumulation_steps % 8 == 0 or 'gpt2' not in path     # eight GPUs share it evenly
