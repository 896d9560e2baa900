"""
What must be true of a landing, from midpoint_a to the standard net:  python -m pytest tests/test_landing.py
"""
import csv
import json
import signal
import subprocess

import pytest
import torch

from export import export
from model import GPT, GPTConfig, step_sizes
from pretrained import as_standard, build, landed, reversible
from runtime import load_checkpoint
from test_reversible import batch, build as tiny, error, gradients
from test_scripts import SMALL, assert_same_weights, command, complaint, place, rows, run, train

FLY = dict(SMALL, scheme='midpoint_a', a=-1, h='once', n_layer=3, dropout=0.1)
LAND = dict(FLY, land_part=0.5, learning_rate=1e-3)

def test_once_is_one_over_the_layers_above_at_zero_bits():
    config = GPTConfig(scheme='midpoint_a', a=-1, h='once', n_layer=4)
    assert config.h == pytest.approx([1 / 4, 1 / 3, 1 / 2, 1])
    for a in ('random', [-1.0, 1.0, -1.0, -1.0]):           # 1 + a would be 0 in a layer
        with pytest.raises(ValueError, match="h = 'once' needs an a of one sign, such as --a=-1"):
            GPTConfig(scheme='midpoint_a', a=a, h='once', n_layer=4)

def test_a_trained_model_may_get_an_a_of_both_signs():
    config = reversible(GPTConfig(scheme='standard', n_layer=3), a=[0.5, -0.5, 0.5])
    assert config.h == [1.5, 0.5, 1.5]

@pytest.mark.parametrize('a', [-1.0, -1 / 16, [-1.0, -0.5, -0.25]], ids=str)
def test_a_landing_falls_on_a_grid_that_can_be_undone(a):
    config = GPTConfig(scheme='midpoint_a', a=a, h='once', n_layer=3)
    sizes = []
    for part in range(101):
        now = landed(config, config.a, 1 - part / 100)
        sizes.append([abs(x) for x in now.a])
        assert now.h == step_sizes(now.a) and all(x < 0 for x in now.a)
        assert all(step.bits <= 8 and abs(step.n) <= 8 for step in now.coefficients())
    assert sizes[0] == [abs(x) for x in config.per_layer('a')] and sizes[-1] == [1 / 256] * 3
    assert all(x >= y for one, other in zip(sizes, sizes[1:]) for x, y in zip(one, other))
    assert max(x - y for one, other in zip(sizes, sizes[1:]) for x, y in zip(one, other)) <= 0.125

@pytest.mark.parametrize('left', [0.9, 0.4, 0.1, 0.0])
def test_gradients_on_the_way_are_equal_bit_for_bit(left):
    """Stored and rebuilt, weights x8."""
    config = landed(GPTConfig(scheme='midpoint_a', a=-1, h='once', n_layer=3), -1, left)
    fields = dict(scheme='midpoint_a', a=config.a, h=config.h, n_layer=3)
    assert error(gradients(tiny(8, **fields)), gradients(tiny(8, stored_layers=3, **fields))) == 0

def test_near_the_ground_it_is_the_standard_net():
    """Weights x4: the logits of |a| = 1 / 256 are near those of the standard net, those of a = -1 are not."""
    far = tiny(4, scheme='midpoint_a', a=-1, h='once').eval()
    idx = batch()[0]
    logits = far(idx)[0]
    ground = far.config
    far.config = landed(ground, -1, 0)
    near = far(idx)[0]
    far.config = as_standard(ground)
    standard = far(idx)[0]
    assert (near - standard).norm() < 0.02 * standard.norm() < 0.2 * (logits - standard).norm()

def logged(place, name):
    with open(place / name / 'log.csv', newline='') as file:
        return list(csv.DictReader(file))

def stop_in_the_air(place, name, **flags):
    """A run that is told to stop while |a| falls."""
    words = command('train.py', **dict(LAND, out_dir=name, **flags))
    with subprocess.Popen(words, cwd=place, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith('step 5: loss'):
                process.send_signal(signal.SIGTERM)
        assert 'stopped at step' in line, 'it was too fast to be stopped'
    checkpoint = load_checkpoint(str(place / name / 'last.pt'))
    assert checkpoint['departure'] == -1 and -1 < checkpoint['config']['a'][0] < -1 / 256

def test_a_landing_resumes_bit_for_bit_and_ends_near_the_standard_net(place):
    said = run(place, 'train.py', out_dir='landed', **LAND)
    config = load_checkpoint(str(place / 'landed' / 'last.pt'))['config']
    assert config['a'] == [-1 / 256] * 3
    last = float(rows(place, 'landed')[-1][-1])
    standard = float(said.split('as the standard net: val_loss ')[1].split()[0])
    assert standard == pytest.approx(last, abs=2e-3)
    steps = [row for row in logged(place, 'landed') if row['a']]
    sizes = [float(row['a']) for row in steps]
    assert sizes[:5] == [1.0] * 5 and sizes[-2:] == [1 / 256] * 2 and sizes == sorted(sizes, reverse=True)
    rates = [8.75e-4, 0.75 * 7.5e-4, 0.5 * 6.25e-4, 0.25 * 5.335e-4]    # a cosine to half, falling to 0
    assert [float(row['lr']) for row in steps[4:]] == pytest.approx(rates, rel=1e-4)
    stop_in_the_air(place, 'stopped')
    assert train(place, 'stopped', **{**LAND, 'init_from': 'resume'}) == rows(place, 'landed')
    assert_same_weights(place, 'landed', 'stopped')

def test_of_a_standard_net_only_the_rate_lands(place):
    """The baseline of a landing: the same steps, the same rates."""
    run(place, 'train.py', out_dir='landed', **LAND)
    run(place, 'train.py', out_dir='standard', **dict(LAND, scheme='standard', a=None, h=None))
    landed, standard = ([row['lr'] for row in logged(place, name)] for name in ('landed', 'standard'))
    assert landed == standard

@pytest.mark.parametrize('steps', [11, 16])
def test_what_has_landed_stays_down_if_it_goes_on(place, steps):
    """With more steps it lands again, from where it is. It does not go back to its first a."""
    name = f'on{steps}'
    run(place, 'train.py', out_dir=name, **LAND)
    run(place, 'train.py', **dict(LAND, out_dir=name, init_from='resume', max_iters=steps))
    sizes = [float(row['a']) for row in logged(place, name) if row['a']]
    assert sizes[0] == 1 and len(sizes) == steps and set(sizes[8:]) == {1 / 256}

def test_a_landing_goes_on_with_another_number_of_processes(place):
    """Within rounding: two processes add up their gradients in another order."""
    flags = dict(LAND, dropout=0.0, gradient_accumulation_steps=2)
    run(place, 'train.py', out_dir='alone', **flags)
    stop_in_the_air(place, 'passed_on', dropout=0.0)
    run(place, 'train.py', **dict(flags, out_dir='passed_on', init_from='resume', processes=2))
    alone, passed_on = (load_checkpoint(str(place / name / 'last.pt')) for name in ('alone', 'passed_on'))
    assert passed_on['config']['a'] == alone['config']['a'] == [-1 / 256] * 3
    for name, weight in alone['model'].items():
        assert torch.allclose(weight, passed_on['model'][name], atol=1e-5), name

def test_processes_and_shards_land_alike(place):
    flags = dict(LAND, processes=2, gradient_accumulation_steps=2)
    said = [run(place, 'train.py', out_dir=name, shard=name == 'shards', **flags)
            for name in ('ddp', 'shards')]
    assert_same_weights(place, 'ddp', 'shards')
    assert len({text.split('as the standard net: ')[1] for text in said}) == 1

@pytest.mark.parametrize('flags, words', [
    (dict(scheme='leapfrog', a=None, h=None), "leapfrog is near no standard net: only midpoint_a with h ="),
    (dict(h=0.25), "only midpoint_a with h = 'once' is"),
    (dict(a='random', h=0.25), "only midpoint_a with h = 'once' is"),
    (dict(a=[0.5, -0.5, 0.5], h=[1.5, 0.5, 1.5]), "h = 'once' needs an a of one sign"),
    (dict(land_part=0.2), 'land_part = 0.2 is 1.6 steps: a landing takes 2 or more'),
    (dict(land_part=1.5), 'land_part = 1.5 must be from 0 to 1')])
def test_what_cannot_land_is_one_sentence(place, flags, words):
    assert words in complaint(place, 'train.py', **{**LAND, 'out_dir': 'refused', **flags})
    assert not (place / 'refused').exists()                 # not after half of the run

def test_export_as_the_standard_net_says_both_losses(place, tmp_path, capsys, monkeypatch):
    transformers = pytest.importorskip('transformers')
    train(place, 'to_export', **LAND)
    monkeypatch.chdir(place)
    with pytest.raises(ValueError, match='no other program computes .*: try --as_standard=True'):
        export('to_export/last.pt', 'refused')
    export('to_export/last.pt', 'deployed', standard=True)
    said = capsys.readouterr().out
    monkeypatch.chdir(tmp_path)             # where other data have this name
    (tmp_path / 'data' / 'tiny').mkdir(parents=True)
    (tmp_path / 'data' / 'tiny' / 'meta.json').write_text('{"encoding": "gpt2"}')
    export(str(place / 'to_export' / 'last.pt'), 'elsewhere', standard=True)
    assert 'the data that it was trained on are not here' in capsys.readouterr().out
    monkeypatch.chdir(place)
    assert 'validation loss on data/tiny: ' in said and 'as the standard net' in said
    ours, _ = build('deployed')
    theirs = transformers.AutoModelForCausalLM.from_pretrained('deployed').eval()
    idx = torch.randint(256, (2, 12))
    with torch.no_grad():
        assert torch.allclose(ours.eval()(idx)[0][:, 0, :256], theirs(idx).logits[:, -1, :256], atol=1e-5)
        greedy = theirs.generate(idx[:1], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert greedy.tolist() == ours.generate(idx[:1], 4, temperature=0, vocab_size=256).tolist()
    model = GPT(GPTConfig(scheme='leapfrog', n_layer=1, n_embd=16, n_head=2, vocab_size=8))
    with pytest.raises(ValueError, match='leapfrog is near no standard net'):
        as_standard(model.config)

def test_evaluation_as_the_standard_net(place, tmp_path):
    """Both losses are in the report. Where there is no standard net, it says so before any work."""
    train(place, 'to_judge', **LAND)
    report = tmp_path / 'report.json'
    flags = dict(datasets='tiny', eval_windows=4, as_standard=True, json=report)
    run(place, 'evaluate.py', init_from='to_judge/last.pt', **flags)
    near, standard = (row['datasets']['tiny']['loss'] for row in json.loads(report.read_text()).values())
    assert near != standard == pytest.approx(near, abs=2e-3)
    train(place, 'leapfrog', **dict(SMALL, scheme='leapfrog'))
    said = complaint(place, 'evaluate.py', init_from='leapfrog/last.pt', **flags)
    assert 'leapfrog is near no standard net' in said
    assert json.loads(report.read_text()) == {}
