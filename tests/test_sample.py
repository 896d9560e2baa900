"""
What must be true of sample.py:  python -m pytest tests/test_sample.py

test_model.py has that its text is that of a full recomputation, for every scheme.
"""
import os
import runpy
import sys

import pytest
import torch
from torch.nn import functional as F

import model as model_py
import pretrained
from pretrained import ends_of_text, tokenizer
from runtime import save_checkpoint
from test_scripts import ROOT, Screen, command, complaint, place, run, whole    # noqa: F401, two are fixtures

def test_sample_is_a_function_of_its_seed(place, whole):
    flags = dict(init_from='whole/best.pt', start='abc', max_new_tokens=20, num_samples=2)
    first = run(place, 'sample.py', seed=1, **flags)
    assert first.count('\nabc') == 2
    assert first == run(place, 'sample.py', seed=1, **flags) != run(place, 'sample.py', seed=2, **flags)

def test_tokenizers():
    encode, decode = tokenizer(dict(encoding='bytes'))
    assert decode(encode('né')) == 'né'
    encode, decode = tokenizer(dict(encoding='chars', chars='abc'))
    assert encode('cab') == [2, 0, 1] and decode([2, 0, 1]) == 'cab'
    vocabulary = os.path.join(ROOT, '..', 'shared', 'data', 'tiktoken')
    if not os.path.exists(vocabulary):
        pytest.skip("GPT-2's BPE files are not beside this checkout")
    os.environ['TIKTOKEN_CACHE_DIR'] = vocabulary
    encode, decode = tokenizer(dict(encoding='gpt2'))
    assert encode('Hello world<|endoftext|>') == [15496, 995, 50256] and decode([15496, 995]) == 'Hello world'

def test_sample_complains_in_a_sentence(place, whole):
    assert 'there is no checkpoint none.pt' in complaint(place, 'sample.py', init_from='none.pt')
    assert 'the start is empty' in complaint(place, 'sample.py', init_from='whole/best.pt', start='')
    encode, _ = tokenizer(dict(encoding='chars', chars='abc'))
    with pytest.raises(ValueError, match="the model has no token for 'd', only for 'abc'"):
        encode('abcde')

def screens(place, monkeypatch, tokens=None, ends=(), **flags):         # noqa: F811
    """The text on the screen after each change, if the model yields these tokens."""
    class Watched(Screen):
        def flush(self):
            _, bar, text = self.getvalue().rpartition('-' * 80 + '\n')
            if bar:
                found.append(text)

    found = []
    with monkeypatch.context() as here:
        here.chdir(place)
        here.setattr(pretrained, 'ends_of_text', lambda meta: ends)
        if tokens is not None:
            logits = 1e4 * F.one_hot(torch.tensor(list(tokens)), 256)
            logits = iter(logits.view(-1, 1, 1, 256))                   # (B, 1, V) each
            here.setattr(model_py.GPT, 'forward', lambda *args, **_: (next(logits), None))
            flags = dict(flags, max_new_tokens=len(tokens))
        here.setattr(sys, 'argv', command('sample.py', init_from='whole/best.pt', start='ab', **flags)[1:])
        here.setattr(sys, 'excepthook', sys.excepthook)
        here.setattr(sys, 'stdout', Watched())
        runpy.run_path(os.path.join(ROOT, 'sample.py'), run_name='__main__')
        sys.stdout.flush()
    return found

def test_text_appears_as_it_is_sampled(place, whole, monkeypatch):      # noqa: F811
    found = screens(place, monkeypatch, 'c€d'.encode())
    assert found == ['abc', 'abc€', 'abc€d', 'abc€d\n']     # a character of three tokens is shown whole
    found = screens(place, monkeypatch, 'c€'.encode()[:-1])
    assert found == ['abc', 'abc\ufffd\n']                  # but what there is of one, at the end

def test_a_sample_ends_with_its_text(place, whole, monkeypatch):        # noqa: F811
    assert screens(place, monkeypatch, b'cde', ends=[ord('d')])[-1] == 'abc\n'
    assert screens(place, monkeypatch, ends=range(256))[-1] == 'ab\n'

def test_the_padding_of_a_vocabulary_is_never_written(place):           # noqa: F811
    model = model_py.GPT(model_py.GPTConfig(block_size=64, vocab_size=960, n_layer=1, n_head=1, n_embd=8))
    meta = dict(encoding='bytes', vocab_size=256)
    checkpoint = dict(model=model.state_dict(), config=vars(model.config), meta=meta)
    save_checkpoint([str(place / 'wide.pt')], checkpoint)
    run(place, 'sample.py', init_from='wide.pt', start='a', max_new_tokens=40, temperature=9.0, top_k='None')

def test_ends_of_text(tmp_path):
    assert ends_of_text(dict(encoding='gpt2')) == [50256] and ends_of_text(dict(encoding='bytes')) == []
    for written, wanted in (('2', [2]), ('[2, 7]', [2, 7])):
        (tmp_path / 'config.json').write_text(f'{{"eos_token_id": {written}}}')
        assert ends_of_text(dict(encoding='tokenizer.json', model=str(tmp_path))) == wanted

def test_beyond_block_size_it_says_what_it_does(place, whole):          # noqa: F811
    said = 'each new token is computed from the last 16 alone, without the cache'
    flags = dict(init_from='whole/best.pt', start='abc')
    assert said in run(place, 'sample.py', max_new_tokens=15, **flags)
    assert said not in run(place, 'sample.py', max_new_tokens=14, **flags)
