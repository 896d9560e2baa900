"""
A few tries of each row of the campaign of faults:  python -m pytest tests/test_faults.py

python tests/faults.py makes many more of them.
"""
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip('resource', reason='faults.py limits processes as Linux does')
import faults
from model import GPT, GPTConfig
from runtime import agree, open_data, restarted, save_checkpoint, training_batch

pytestmark = pytest.mark.skipif(not sys.platform.startswith('linux'), reason='faults.py limits processes as Linux does')

@pytest.fixture(scope='module')
def workshop(tmp_path_factory):
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp('workshop'))
    faults.workshop()
    yield
    os.chdir(before)

@pytest.mark.parametrize('row, tries', [
    (faults.kill_train, 1), (faults.kill_prepare, 1), (faults.a_process_of_two_dies, 10),
    (faults.out_of_memory_in_one_of_two, 10), (faults.kill_retrofit, 1), (faults.kill_download, 2), (faults.full_disk_train, 3), (faults.full_disk_prepare, 6),
    (faults.damaged_checkpoint, 2), (faults.damaged_data, 2), (faults.damaged_safetensors, 2), (faults.damaged_tokenizer, 2),
    (faults.command_lines, 2), (faults.hostile_files, 1), (faults.two_runs_in_one_folder, 1)], ids=lambda x: getattr(x, '__name__', None))
def test_nothing_is_lost(workshop, monkeypatch, row, tries):
    monkeypatch.setattr(faults, 'TRIES', tries)
    monkeypatch.setitem(faults.TRAIN, 'max_iters', 20)
    monkeypatch.setitem(faults.RETROFIT, 'max_iters', 10)
    tried, good = row()
    assert tried == good

def test_damage_that_nobody_notices_is_counted(workshop, monkeypatch):
    """The campaign can fail: weights that are read without checksums."""
    monkeypatch.setattr(faults, 'TRIES', 3)
    read = lambda: [weight.tolist() for weight in torch.load('sound.pt', weights_only=True)['model'].values()]
    tried, good = faults.damage(Path('sound.pt'), read, read())
    assert good < tried

def test_a_token_beyond_the_vocabulary_is_a_sentence(workshop):
    knobs = SimpleNamespace(dataset='tiny', block_size=16, batch_size=4, seed=0)
    _, train, _ = open_data(knobs)
    assert training_batch(train, knobs, 0, 0, torch.device('cpu'))[0].max() > 40
    train.vocab_size = 40
    with pytest.raises(SystemExit, match='has a token .., and its meta.json says that there are 40: prepare it again'):
        training_batch(train, knobs, 0, 0, torch.device('cpu'))

def test_a_changed_field_of_meta_json_is_a_sentence(workshop):
    path = Path('data/tiny/meta.json')
    content = path.read_text()
    path.write_text(content.replace('"vocab_size": 256', '"vocab_size": 255'))
    with pytest.raises(SystemExit, match='tiny/meta.json is not as it was prepared'):
        open_data(SimpleNamespace(dataset='tiny', block_size=16))
    path.write_text(content)

def test_a_run_of_torchrun_knows_its_own_checkpoint(tmp_path, monkeypatch):
    last = str(tmp_path / 'last.pt')
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'mine')
    assert not restarted(last)
    save_checkpoint([last], dict(model={}, config={}, meta={}))
    assert restarted(last)
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'other')
    assert not restarted(last)
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'none')
    assert not restarted(last)
    monkeypatch.setenv('TORCHELASTIC_MAX_RESTARTS', '3')
    with pytest.raises(SystemExit, match='give it as --rdzv_id=NAME'):
        restarted(last)
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'mine')
    Path(last).write_bytes(b'damaged')
    assert not restarted(last)                  # a first start begins anew
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '1')
    with pytest.raises(ValueError, match='is damaged'):
        restarted(last)

def test_gradients_that_stay_infinite_in_float16_end_the_run():
    model = GPT(GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=1, n_embd=8))
    here = SimpleNamespace(scaler=torch.amp.GradScaler('cpu'), skipped=0)
    one = torch.ones(())
    for _ in range(3):                      # a step that is made begins the count anew
        for step in range(49):
            agree(step, one, one / 0, model, here)
        agree(49, one, one, model, here)
    with pytest.raises(SystemExit, match='the gradients of the last 50 steps were inf or NaN in float16'):
        for step in range(50):
            agree(step, one, one / 0, model, here)
