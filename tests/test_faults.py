"""
A few tries of each row of the campaign of faults:  python -m pytest tests/test_faults.py

python tests/faults.py makes many more of them.
"""
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip('resource', reason='faults.py limits processes as Linux does')
import faults
from runtime import agree, open_data, restarted, save_checkpoint

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='faults.py limits processes as Linux does')

@pytest.fixture(scope='module')
def workshop(tmp_path_factory):
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp('workshop'))
    faults.workshop()
    yield
    os.chdir(before)

@pytest.mark.parametrize('row, tries', [
    (faults.kill_train, 1), (faults.kill_train_that_lands, 1), (faults.kill_retrofit, 1),
    (faults.kill_prepare, 1), (faults.kill_download, 2),
    (faults.full_disk_train, 3), (faults.full_disk_retrofit, 3), (faults.full_disk_prepare, 6),
    (faults.damaged_checkpoint, 2), (faults.damaged_data, 2), (faults.damaged_safetensors, 2),
    (faults.damaged_tokenizer, 2), (faults.command_lines, 2), (faults.hostile_files, 1),
    (faults.two_runs_in_one_folder, 1), (faults.a_process_of_two_dies, 10),
    (faults.out_of_memory_in_one_of_two, 10)], ids=lambda x: getattr(x, '__name__', None))
def test_nothing_is_lost(workshop, monkeypatch, row, tries):
    monkeypatch.setattr(faults, 'TRIES', tries)
    monkeypatch.setitem(faults.TRAIN, 'max_iters', 20)
    monkeypatch.setitem(faults.RETROFIT, 'max_iters', 10)
    tried, good = row()
    assert tried == good

def test_damage_that_nobody_notices_is_counted(workshop, monkeypatch):
    """The campaign can fail: weights that are read without checksums."""
    def read():
        return [weight.tolist() for weight in torch.load('sound.pt', weights_only=True)['model'].values()]

    monkeypatch.setattr(faults, 'TRIES', 3)
    tried, good = faults.damage(Path('sound.pt'), read)
    assert good < tried

@pytest.mark.parametrize('change', [dict(vocab_size=255), dict(vocab_size=40, crc32={})], ids=str)
def test_data_that_are_not_as_they_were_prepared_are_a_sentence(workshop, change):
    path = Path('data/tiny/meta.json')
    content = path.read_text()
    path.write_text(json.dumps(json.loads(content) | change))
    with pytest.raises(ValueError, match='data/tiny is not as it was prepared: run "python data/'):
        open_data(SimpleNamespace(dataset='tiny', block_size=16))
    path.write_text(content)

def test_a_run_of_torchrun_knows_its_own_checkpoint(tmp_path, monkeypatch):
    last = tmp_path / 'last.pt'
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'mine')
    assert not restarted(str(last))
    save_checkpoint([str(last)], dict(model={}, config={}, meta={}))
    for run in ('mine', 'other', 'none'):
        monkeypatch.setenv('TORCHELASTIC_RUN_ID', run)
        assert restarted(str(last)) == (run == 'mine')
    monkeypatch.setenv('TORCHELASTIC_MAX_RESTARTS', '3')
    with pytest.raises(ValueError, match='give it as --rdzv_id=NAME'):
        restarted(str(last))
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'mine')
    last.write_bytes(b'damaged')
    with pytest.raises(ValueError, match='is damaged'):
        restarted(str(last))

def test_gradients_that_stay_infinite_in_float16_end_the_run():
    here = SimpleNamespace(scaler=torch.amp.GradScaler('cpu'), skipped=0)
    one = torch.ones(())
    for _ in range(3):                      # a step that is made begins the count anew
        for step in range(49):
            agree(step, one, one / 0, 0, 0.0, here)
        agree(49, one, one, 0, 0.0, here)
    with pytest.raises(ValueError, match='step 50 was stopped .* norm inf'):
        for step in range(50):
            agree(step, one, one / 0, 0, 0.0, here)
