"""
What must be true of results/plot.py:  python -m pytest tests/test_plot.py

The drawn lines have the values of the logs. What a user can get wrong ends with one sentence.
"""
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from runtime import open_log

ROOT = Path(__file__).resolve().parent.parent
PLOT = str(ROOT / 'results' / 'plot.py')
OLD = 'step loss lr grad_norm val_loss'     # a log with fewer columns

def columns_of(script):
    return re.search(r"^columns = '(.*)'$", (ROOT / script).read_text(), re.M)[1]

def write_log(folder, columns, steps, speed=1000):
    """A log whose loss is the square of the step, with evaluations at the start and at even steps."""
    record = open_log(folder, columns, 0)
    record(0, val_loss=7.5)
    for step in range(1, steps + 1):
        known = dict(loss=float(step**2), tokens_per_s=speed + step, peak_gb=step / 8, left='0:21:47')
        record(step, **{name: x for name, x in known.items() if name in columns.split()})
        if step % 2 == 0:
            record(step, val_loss=1 / step)

def draw(folder, *words):
    """The script's figure, and column -> a list of points for each run."""
    matplotlib = pytest.importorskip('matplotlib')
    with pytest.MonkeyPatch.context() as here, matplotlib.rc_context():
        here.chdir(folder)
        here.setattr(sys, 'argv', [PLOT, *words])
        here.setattr(sys, 'excepthook', sys.excepthook)
        left = runpy.run_path(PLOT, run_name='__main__')
    left['plt'].close(left['figure'])
    lines = {}
    for column, axis in zip(left['PANELS'], left['axes'].flat):
        lines[column] = [list(zip(*line.get_data())) for line in axis.lines]
    return left['figure'], lines

@pytest.mark.parametrize('script', ['train.py', 'retrofit.py'])
def test_the_lines_have_the_values_of_the_logs(tmp_path, script):
    write_log(tmp_path / 'out_a', columns_of(script), 20)
    write_log(tmp_path / 'out_b', columns_of(script), 40, speed=3000)
    figure, lines = draw(tmp_path, 'out_a/log.csv', 'out_b/log.csv')
    for i, (steps, speed) in enumerate([(20, 1000), (40, 3000)]):
        assert lines['loss'][i] == [(step, step**2) for step in range(2, steps + 1)]
        assert lines['val_loss'][i] == [(step, 1 / step) for step in range(2, steps + 1, 2)]
        assert lines['tokens_per_s'][i] == [(step, speed + step) for step in range(1, steps + 1)]
        assert lines['peak_gb'][i] == [(step, step / 8) for step in range(1, steps + 1)]
    assert [text.get_text() for text in figure.legends[0].texts] == ['out_a', 'out_b']
    assert figure.get_supxlabel() == 'steps; losses from step 2 on'
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ['training loss, averaged', 'validation loss', 'tokens/s', 'peak memory, GB']
    for axis in figure.axes:                # all points are in the picture
        (left, right), (low, high) = axis.get_xlim(), axis.get_ylim()
        for line in axis.lines:
            assert all(left < x < right and low < y < high for x, y in zip(*line.get_data()))
    assert [axis.get_ylim()[0] for axis in figure.axes[2:]] == [0, 0]

def test_many_rows_of_training_loss_become_50_means_and_nothing_else_does(tmp_path):
    write_log(tmp_path / 'out', columns_of('train.py'), 200)
    _, lines = draw(tmp_path, 'out/log.csv')
    assert [len(lines[column][0]) for column in lines] == [50, 91, 200, 200]
    assert lines['loss'][0][0] == (21.5, (20**2 + 21**2 + 22**2 + 23**2) / 4)
    assert lines['loss'][0][-1] == pytest.approx((199, (198**2 + 199**2 + 200**2) / 3))

def test_a_log_without_a_column_lacks_that_line_and_colours_stay(tmp_path):
    write_log(tmp_path / 'out_old', OLD, 20)
    write_log(tmp_path / 'out_new', columns_of('train.py'), 20)
    figure, lines = draw(tmp_path, 'out_old/log.csv', 'out_new/log.csv')
    assert lines['loss'][0] == lines['loss'][1] and lines['val_loss'][0] == lines['val_loss'][1]
    assert lines['tokens_per_s'][0] == lines['peak_gb'][0] == []
    assert len(lines['tokens_per_s'][1]) == len(lines['peak_gb'][1]) == 20
    handles = [line.get_color() for line in figure.legends[0].get_lines()]
    assert all([line.get_color() for line in axis.lines] == handles for axis in figure.axes)

def test_more_runs_than_colours_can_be_told_apart(tmp_path):
    for i in range(10):
        write_log(tmp_path / f'out_{i}', OLD, 3)
    figure, _ = draw(tmp_path, *(f'out_{i}/log.csv' for i in range(10)))
    assert len({(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines}) == 10

def test_a_run_that_has_just_begun_or_was_cut_off_is_drawn(tmp_path):
    write_log(tmp_path / 'out', OLD, 3)
    with open(tmp_path / 'out' / 'log.csv', 'a') as log:
        log.write('4,1')                    # of 4,16.0
    (tmp_path / 'log.csv').write_text('step,loss,lr,val_loss\n')
    figure, lines = draw(tmp_path, 'out/log.csv', 'log.csv')
    assert lines['loss'] == [[(1, 1), (2, 4), (3, 9)], []]
    assert lines['val_loss'] == [[(2, 0.5)], []]
    assert figure.axes[1].lines[0].get_marker() == '.'      # a single point has no line
    assert draw(tmp_path, 'log.csv')[1]['loss'] == [[]]

def test_the_picture_is_written_where_it_is_said(tmp_path, capsys):
    write_log(tmp_path / 'out', OLD, 3)
    capsys.readouterr()
    for words, name in (([], 'runs.png'), (['--out=comparison.png'], 'comparison.png')):
        draw(tmp_path, 'out/log.csv', *words)
        assert capsys.readouterr().out == f'{name}\n'
        assert (tmp_path / name).read_bytes().startswith(b'\x89PNG')

@pytest.mark.parametrize('words, sentence', [
    ([], 'give the logs of runs: python results/plot.py out_a/log.csv out_b/log.csv'),
    (['--out=a.png'], 'give the logs of runs: python results/plot.py out_a/log.csv out_b/log.csv'),
    (['no/log.csv'], 'there is no file no/log.csv: give logs, as out_a/log.csv, and perhaps --out=FILE.png'),
    (['.'], 'there is no file .: give logs, as out_a/log.csv, and perhaps --out=FILE.png'),
    (['--out=a'], 'there is no file --out=a: give logs, as out_a/log.csv, and perhaps --out=FILE.png'),
    (['other.csv'], 'other.csv is no log of train.py or retrofit.py: give logs, as out_a/log.csv')])
def test_one_sentence_for_what_is_no_log(tmp_path, words, sentence):
    (tmp_path / 'other.csv').write_bytes(b'scheme,loss\n\xff,1\n')
    done = subprocess.run([sys.executable, PLOT, *words], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, '', sentence + '\n')

def test_one_sentence_where_matplotlib_is_missing(tmp_path, monkeypatch):
    write_log(tmp_path / 'out', OLD, 3)
    monkeypatch.setitem(sys.modules, 'matplotlib', None)        # as if it were not installed
    monkeypatch.setattr(sys, 'argv', [PLOT, str(tmp_path / 'out' / 'log.csv')])
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    with pytest.raises(ValueError, match='^drawing needs a package: pip install matplotlib$'):
        runpy.run_path(PLOT, run_name='__main__')
