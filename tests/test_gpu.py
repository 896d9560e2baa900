"""
What must be true of results/gpu.sh, found out without a GPU:  python -m pytest tests/test_gpu.py
"""
import io
import json
import math
import os
import runpy
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from types import SimpleNamespace

import pytest
import torch

import runtime
from test_bench import NANOGPT, ROOT, bench, nondeterministic, place         # noqa: F401, two are fixtures

pytestmark = pytest.mark.skipif(not shutil.which('bash') or not shutil.which('timeout'),
                                reason='there is no bash, or no timeout')

def program(path, text):
    path.write_text(f'#!/bin/sh\n{text}')
    path.chmod(0o755)

def call(place, *words, **environment):
    """(the files in out, the rows that run) of a call of gpu.sh, which finds its programs in this folder."""
    environment = dict(os.environ, PATH=f"{place}:{os.environ['PATH']}", OUT=str(place / 'out'),
                       NANOGPT=str(place), **environment)
    result = subprocess.run(['bash', 'results/gpu.sh', *words], cwd=ROOT, env=environment, text=True,
                            capture_output=True)
    files = {path.name: path.read_text() for path in (place / 'out').iterdir()}
    return files, [line.split(':')[0] for line in result.stderr.splitlines() if ': up to' in line]

# instead of its rows, a command leaves its words: each on a line
INSTEAD = """
for last; do :; done
printf '%s\\n' "$@" > "${last#--json=}"
"""

def numbers(x):
    if isinstance(x, (dict, list)):
        return [number for part in (x.values() if isinstance(x, dict) else x) for number in numbers(part)]
    return [x] if isinstance(x, (int, float)) else []

def test_a_dry_run_makes_every_row_once(tmp_path, monkeypatch, nondeterministic):       # noqa: F811
    """One row by Python itself. The commands of the others run here, where torch is there already."""
    out = tmp_path / 'out'
    out.mkdir()
    (tmp_path / 'model.py').write_text(NANOGPT)
    program(tmp_path / 'python', f'case "$*" in *sharded*) exec {sys.executable} "$@";; esac\n{INSTEAD}')
    files, ran = call(tmp_path, 'tiny')
    assert len(ran) == 10 and set(files) == {f'{name}.json' for name in ran}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    for name in set(files) - {'sharded_gpu.json'}:
        monkeypatch.setattr(sys, 'argv', [*files[name].splitlines()[:-1], f'--json={out / name}'])
        with redirect_stdout(io.StringIO()):
            runpy.run_path(sys.argv[0], run_name='__main__')
    for name in files:
        knobs, rows = (json.loads((out / name).read_text())[key] for key in ('knobs', 'rows'))
        cases = knobs.get('cases') or knobs.get('schemes') or 'GPT'
        assert {row['case'] for row in rows} == set(cases.split(',')), name
        assert all(numbers(row) for row in rows) and all(map(math.isfinite, numbers(rows))), name
        assert 'does not fit' not in str(rows), name
    files, ran = call(tmp_path, 'tiny')
    assert not ran
    (out / 'depth_gpu.json').unlink()
    again, ran = call(tmp_path, 'tiny')
    assert ran == ['depth_gpu'] and again.keys() == files.keys()
    assert [name for name in files if again[name] != files[name]] == ['depth_gpu.json']

def test_a_row_that_takes_too_long_keeps_its_lines_and_begins_again(tmp_path):
    program(tmp_path / 'timeout', f"""
echo $3 >> {tmp_path}/seconds                   # it follows --foreground and --kill-after
shift 3
exec {shutil.which('timeout')} --foreground 2 "$@"
""")
    slow = f'case "$last" in */batch_gpu.*) [ -e {tmp_path}/fast ] || exec sleep 60;; esac\n'
    program(tmp_path / 'python', INSTEAD + slow)
    (tmp_path / 'out').mkdir()
    files, ran = call(tmp_path)
    assert len(ran) == 10
    assert set(files) == {f'{name}.json' for name in ran} - {'batch_gpu.json'} | {'batch_gpu.unfinished'}
    assert 'bench.py\nbatch\n' in files['batch_gpu.unfinished']
    seconds = [int(line) for line in (tmp_path / 'seconds').read_text().split()]
    assert len(seconds) == 10 and sum(seconds) <= 900
    (tmp_path / 'fast').touch()
    files, ran = call(tmp_path, TIMES='4')
    assert ran == ['batch_gpu'] and len(files) == 10 and 'batch_gpu.json' in files
    assert int((tmp_path / 'seconds').read_text().split()[-1]) == 4 * seconds[2]

def test_the_largest_batch_of_a_card_is_found_near_the_counted_one(place, monkeypatch):         # noqa: F811
    """The card is made up: it has memory for so many sequences."""
    flags = dict(cases='standard', budget_gb=0.02)
    counted = bench(place, 'batch', **flags)[0]['batch']
    tried = []
    randint = torch.randint

    def tokens(high, size, **how):
        tried.append(size[1])
        if size[1] > room:
            raise torch.OutOfMemoryError
        return randint(high, size, **how)

    here = SimpleNamespace(kind='cuda', device=torch.device('cpu'),
                           autocast=torch.autocast('cpu', torch.bfloat16))
    monkeypatch.setattr(runtime, 'start', lambda knobs: here)
    monkeypatch.setattr(torch, 'randint', tokens)
    for name, answer in dict(mem_get_info=(0, 1e9), max_memory_allocated=0, get_device_name='none').items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    for name in ('set_per_process_memory_fraction', 'reset_peak_memory_stats', 'empty_cache', 'synchronize'):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    step = counted // 32
    for room in (counted - 3 * step, counted, counted + 3 * step + 1):
        tried.clear()
        found = bench(place, 'batch', **flags)[0]['batch']
        assert step > 1 and room - step < found <= room and len(tried) <= 2 * 5
    tried.clear()
    assert bench(place, 'batch', search=False, **flags)[0]['batch'] == counted and not tried
