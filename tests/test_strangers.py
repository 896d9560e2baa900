"""
What people bring with them, from nanoGPT, the hub and other disks:  python -m pytest tests/test_strangers.py

Small inputs, written here as others write them. What needs tokenizers, transformers, or GPT-2's BPE files is
skipped where these are missing.
"""
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluate
import runtime
from configurator import configure
from data.download import alone_in, read_text
from data.text import prepare as text_prepare
from export import export
from model import GPT, GPTConfig
from pretrained import (OPENAI, build, chosen, conversation, ends_of_text, from_pretrained, load, tokenizer,
                        tokens_of)
from runtime import PlainUnpickler, load_checkpoint, open_data, restarted
from test_data import SHARED, bpe, gpt2                                 # noqa: F401, a fixture
from test_pretrained import (GPT2, LAYERNORM, LLAMA, NANO, RMSNORM, llama_folder, llama_tensors, words_of,
                             write_safetensors, written)
from test_scripts import ROOT, SMALL, command, complaint, knobs_of, place, run, train, whole  # noqa: F401

CHARS = 'abcdefgh '
PIPES = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
NANOGPT_CONFIGS = {                         # the names and values that matter here, of its config/
    'train_shakespeare_char': 'eval_iters = 200\nalways_save_checkpoint = False\nwandb_log = False\n'
                              "gradient_accumulation_steps = 5 * 8\nbeta2 = 0.99 # a comment\nn_embd = 384\n",
    'finetune_shakespeare': "import time\nwandb_run_name = 'ft-' + str(time.time())\ndecay_lr = False\n"}

# -----------------------------------------------------------------------------
# a file that cannot be read now is not damaged

@pytest.mark.skipif(not hasattr(os, 'geteuid'), reason='Windows has other rights')
def test_a_run_that_cannot_read_its_checkpoint_now_does_not_begin_anew(tmp_path, monkeypatch):
    """A link that leads in a circle raises OSError even for root, as a stale handle of a network does."""
    last = tmp_path / 'last.pt'
    last.symlink_to(last)
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'mine')
    with pytest.raises(OSError, match='symbolic links'):
        restarted(str(last))
    with pytest.raises(OSError, match='symbolic links'):
        load_checkpoint(str(last))
    last.unlink()
    assert not restarted(str(last))

def test_a_restarted_run_touches_nothing_that_it_cannot_read(place, monkeypatch):      # noqa: F811
    flags = dict(SMALL, out_dir='unreadable')
    run(place, 'train.py', **flags)
    folder = place / 'unreadable'
    log = (folder / 'log.csv').read_bytes()
    (folder / 'last.pt').unlink()
    (folder / 'last.pt').symlink_to(folder / 'last.pt')
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'mine')
    assert 'symbolic links' in complaint(place, 'train.py', **flags)
    assert (folder / 'log.csv').read_bytes() == log and (folder / 'last.pt').is_symlink()

def test_data_that_cannot_be_read_now_are_not_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('data/one').mkdir(parents=True)
    Path('data/one/meta.json').symlink_to('meta.json')
    with pytest.raises(OSError, match='symbolic links'):
        open_data(SimpleNamespace(dataset='one', block_size=4))

@pytest.mark.parametrize('what, words', [
    (dict(model={}, config=dict(a=np.float64(1)), meta={}), r'holds Python objects \(numpy.*scalar\), which'),
    (dict(weight=torch.zeros(1)), 'holds weights alone'),
    (dict(model={}, meta={}), 'is no checkpoint of these scripts, it has no config'),
    (b'abc', 'is damaged, cut off, or not written by torch.save')], ids=str)
def test_four_kinds_of_file_get_four_sentences(tmp_path, what, words):
    path = tmp_path / 'last.pt'
    if isinstance(what, bytes):
        path.write_bytes(what)
    else:
        torch.save(what, path)
    with pytest.raises(ValueError, match=words):
        load_checkpoint(str(path))

# -----------------------------------------------------------------------------
# which tokens a model has

def openais_files():
    vocab, merges = (next(path for path in (SHARED / 'tiktoken').iterdir() if path.stat().st_size == size)
                     for size in (1042301, 456318))
    return vocab, merges

def gpt2_folder(folder, **changes):
    folder.mkdir(exist_ok=True)
    (folder / 'config.json').write_text(json.dumps(GPT2 | changes))
    return folder

@bpe
def test_only_openais_own_tokens_are_gpt2s(tmp_path):
    tokenizers = pytest.importorskip('tokenizers')
    vocab, merges = openais_files()
    folder = gpt2_folder(tmp_path)
    assert tokens_of(str(folder))['encoding'] == 'unknown'              # 50,257 say nothing
    shutil.copy(vocab, folder / 'vocab.json')
    shutil.copy(merges, folder / 'merges.txt')
    assert tokens_of(str(folder))['encoding'] == 'unknown'              # there may be others beside them
    with pytest.raises(ValueError, match='how its text became tokens: save its tokenizer.json there'):
        tokenizer(tokens_of(str(folder)))
    own = tokenizers.ByteLevelBPETokenizer(str(vocab), str(merges))
    own.add_special_tokens(['<|endoftext|>'])
    own.save(str(folder / 'tokenizer.json'))
    assert tokens_of(str(folder)) == OPENAI                             # as the hub has it
    (folder / 'generation_config.json').write_text('{"eos_token_id": [198, 50256]}')
    assert ends_of_text(tokens_of(str(folder))) == [198, 50256]
    (folder / 'generation_config.json').unlink()
    content = json.loads((folder / 'tokenizer.json').read_text())
    turned = dict(content['model']['vocab'])
    turned['Ġthe'], turned['Ġof'] = turned['Ġof'], turned['Ġthe']
    for part, value in (('model', dict(content['model'], vocab=turned)), ('normalizer', dict(type='NFC')),
                        ('post_processor', dict(type='TemplateProcessing')), ('pre_tokenizer', None),
                        ('model', dict(type='Unigram', vocab=[['a', 0.0]]))):
        (folder / 'tokenizer.json').write_text(json.dumps(content | {part: value}))
        assert tokens_of(str(folder))['encoding'] == 'tokenizer.json', part
    own.add_special_tokens(['<|im_end|>'])
    own.save(str(folder / 'tokenizer.json'))
    gpt2_folder(folder, vocab_size=50258, eos_token_id=50257)
    meta = tokens_of(str(folder))
    assert meta['encoding'] == 'tokenizer.json' and ends_of_text(meta) == [50257]
    assert tokenizer(meta)[0]('hello<|im_end|>') == [31373, 50257]

def test_gpt2_by_its_name_needs_no_file(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    assert tokens_of('gpt2') == tokens_of('openai-community/gpt2-xl') == OPENAI

@pytest.mark.parametrize('vocab_size, encoding', [
    (50257, 'gpt2'), (50304, 'gpt2'), (60000, 'unknown'), (100277, 'unknown')])
def test_a_checkpoint_of_nanogpt_with_other_sizes_is_not_gpt2s(tmp_path, vocab_size, encoding):
    model = GPT(GPTConfig(**dict(NANO, vocab_size=vocab_size, n_layer=1, n_embd=8), scheme='standard'))
    arguments = dict(NANO, vocab_size=vocab_size, n_layer=1, n_embd=8)
    torch.save(dict(model=model.state_dict(), model_args=arguments, config={}), tmp_path / 'ckpt.pt')
    assert load(str(tmp_path / 'ckpt.pt'))[2]['encoding'] == encoding

def test_a_token_beyond_the_model_is_a_sentence(tmp_path):
    tokenizers = pytest.importorskip('tokenizers')
    folder = llama_folder(tmp_path, vocab_size=97)
    words = words_of(tmp_path)
    words.add_special_tokens([f'<{i}>' for i in range(97 - 5)] + ['<pad>'])
    words.save(str(tmp_path / 'tokenizer.json'))
    encode, _ = tokenizer(tokens_of(folder))
    assert encode('to <91> be') == [1, 96, 2] and tokenizers
    with pytest.raises(ValueError, match="'<pad>' is token 97, and the model has only 97: take it out"):
        encode('to <pad> be')

def test_an_end_of_text_that_stands_in_generation_config(tmp_path):
    meta = dict(encoding='tokenizer.json', model=str(tmp_path))
    (tmp_path / 'config.json').write_text('{"eos_token_id": 7}')
    for content, wanted in (('{"eos_token_id": [0, 9]}', [0, 9]), ('{"eos_token_id": 0}', [0]), ('{}', [7])):
        (tmp_path / 'generation_config.json').write_text(content)
        assert ends_of_text(meta) == wanted

# -----------------------------------------------------------------------------
# two beginnings, and pieces

def with_beginning(folder):
    """A tokenizer that puts <s> before every text, as Llama's do."""
    tokenizers = pytest.importorskip('tokenizers')
    words = words_of(folder)
    words.add_special_tokens(['<s>'])
    words.post_processor = tokenizers.processors.TemplateProcessing('<s> $A', special_tokens=[('<s>', 4)])
    words.save(str(folder / 'tokenizer.json'))
    return llama_folder(folder, bos_token_id=4)

def test_a_template_that_writes_the_first_token_gets_no_second(tmp_path, monkeypatch):
    folder = with_beginning(tmp_path)
    settings = dict(chat_template='{{ bos_token }} {{ messages[0].content }}', bos_token='<s>')
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(settings))
    meta = tokens_of(folder)
    encode, _ = tokenizer(meta)
    assert encode('to be') == [4, 1, 2]
    assert encode(conversation(meta, 'to be'), False) == [4, 1, 2]      # as sample.py does
    said = run(tmp_path, 'sample.py', init_from=folder, chat=True, start='to be', max_new_tokens=1)
    assert said.split('-' * 80 + '\n')[1].split()[:2] == ['to', 'be']

def test_no_piece_of_a_long_text_begins_anew(tmp_path, monkeypatch):
    folder = with_beginning(tmp_path)
    monkeypatch.setattr(text_prepare, 'PIECE', 40)
    (tmp_path / 'my.txt').write_text('to be or\nnot to be\n\n  or to\n' * 20)
    text_prepare.prepare([str(tmp_path / 'my.txt')], folder, tmp_path)
    assert 4 not in np.fromfile(tmp_path / 'train.bin', np.uint8)

@pytest.mark.parametrize('kind', ['bytes', 'words with a space before', 'a space before the text'])
def test_pieces_of_a_text_have_the_tokens_of_the_whole(kind, monkeypatch):
    """As GPT-2 and Llama 3 encode; as Llama's newer ones do; and as Llama 2 does."""
    tokenizers = pytest.importorskip('tokenizers')
    text = 'def f(x):\n    return  x\n\n\nclass  A:\n\tpass\n' * 40
    own = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True))
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, show_progress=False, initial_alphabet=['\n'])
    if kind == 'bytes':
        own.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif kind == 'words with a space before':
        own.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme='first')
    else:
        own.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.Prepend('▁'),
                                                          tokenizers.normalizers.Replace(' ', '▁')])
        own.pre_tokenizer = tokenizers.pre_tokenizers.Split('\n', 'isolated')
    own.train_from_iterator(text.split('\n'), trainer)
    monkeypatch.setattr(text_prepare, 'PIECE', 50)
    pieces = list(text_prepare.encoded(text, lambda text, special=True: own.encode(text).ids))
    assert len(pieces) > 20
    assert [token for piece in pieces for token in piece] == own.encode(text).ids

@bpe
def test_pieces_of_a_text_have_gpt2s_tokens_too(gpt2, monkeypatch):
    text = 'def f(x):\n    return  x\n\n\nclass  A:\n\tpass\nfoo\n\nbar\n' * 40
    monkeypatch.setattr(text_prepare, 'PIECE', 120)
    encode, _ = tokenizer(OPENAI)
    tokens = [token for piece in text_prepare.encoded(text, encode) for token in piece]
    assert tokens == gpt2.encode(text)

def test_a_token_that_spans_question_and_answer_belongs_to_the_answer():
    def encode(text):                       # ': C' is a token, as in a tokenizer that was reported
        return [ord(c) for c in text.replace(': C', '€')]

    context, answer = evaluate.tokens_of_pair(encode, 'Answer:', ' Cat')
    assert context == list(b'Answer') and answer == [ord('€'), *b'at']
    assert evaluate.tokens_of_pair(encode, 'Answer:', ' Dog') == (list(b'Answer:'), list(b' Dog'))

# -----------------------------------------------------------------------------
# tensors

@pytest.mark.parametrize('family', ['llama', 'gpt2'])
def test_another_head_in_a_tied_file_is_taken(tmp_path, family):
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    sizes = dict(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4) if family == 'gpt2' else {
        **LLAMA, 'tie_word_embeddings': True}
    sizes.pop('model_type', None)
    config, model = dict(gpt2=(transformers.GPT2Config, transformers.GPT2LMHeadModel),
                         llama=(transformers.LlamaConfig, transformers.LlamaForCausalLM))[family]
    theirs = model(config(**{**sizes, 'tie_word_embeddings': False})).eval()
    theirs.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps(settings | dict(tie_word_embeddings=True)))
    ours = from_pretrained(str(tmp_path)).eval()
    idx = torch.randint(97, (2, 16))
    with torch.no_grad():
        assert torch.allclose(ours(idx)[0][:, -1], theirs(idx).logits[:, -1], atol=1e-5)
    assert not ours.config.tied
    knobs = SimpleNamespace(init_from=str(tmp_path), a=None, bits=4, scheme=None, h=None)
    assert not chosen(knobs).tied           # as train.py and retrofit.py have it

def test_a_tied_file_may_hold_the_head_alone(tmp_path):
    tensors = llama_tensors()
    del tensors['model.embed_tokens.weight']
    model = from_pretrained(llama_folder(tmp_path, tensors, tie_word_embeddings=True))
    assert model.config.tied and torch.equal(model.transformer.wte.weight, tensors['lm_head.weight'])

def test_prefixes_of_a_compiled_model_in_a_ddp(tmp_path):
    ours = GPT(GPTConfig(**NANO, scheme='standard'))
    weights = {f'module._orig_mod.{name}': weight for name, weight in ours.state_dict().items()}
    torch.save(dict(model=weights, model_args=NANO, config={}), tmp_path / 'ckpt.pt')
    model = from_pretrained(str(tmp_path / 'ckpt.pt'))
    assert torch.equal(model.lm_head.weight, ours.lm_head.weight)

@pytest.mark.parametrize('changes', [
    dict(rope_scaling=dict(type='default', factor=1.0)), dict(hidden_act='swish'),
    dict(rope_theta=None, rope_scaling=dict(rope_type='default', rope_theta=5000.0)),
    dict(rope_parameters=dict(rope_type='default', rope_theta=5000.0))], ids=str)
def test_what_is_harmless_in_a_config_is_not_refused(tmp_path, changes):
    plain = from_pretrained(llama_folder(tmp_path / 'plain'))
    other = from_pretrained(llama_folder(tmp_path / 'other', **changes))
    assert vars(plain.config) == vars(other.config)

@pytest.mark.parametrize('dtype', ['I32', 'F8_E4M3', 'I8'])
def test_a_quantized_model_is_not_called_damaged(tmp_path, dtype):
    folder = llama_folder(tmp_path)
    path = tmp_path / 'model.safetensors'
    content = path.read_bytes()
    length = int.from_bytes(content[:8], 'little')
    header = content[8:8 + length].replace(b'"F32"', f'"{dtype}"'.encode(), 1)
    path.write_bytes(len(header).to_bytes(8, 'little') + header + content[8 + length:])
    with pytest.raises(ValueError, match=f'has tensors of {dtype}, as quantized models have: use the model'):
        build(folder)

def test_a_tokenizer_of_a_newer_version_is_not_called_damaged(tmp_path):
    tokenizers = pytest.importorskip('tokenizers')
    folder = llama_folder(tmp_path)
    words_of(tmp_path)
    path = tmp_path / 'tokenizer.json'
    content = json.loads(path.read_text())
    content['pre_tokenizer'] = dict(type='OfTheNextVersion')
    path.write_text(json.dumps(content))
    version = tokenizers.__version__
    with pytest.raises(ValueError, match=f'tokenizers {version} cannot read .*: pip install -U'):
        tokenizer(tokens_of(folder))

@pytest.mark.parametrize('names', [
    ['HF_HUB_CACHE'], ['HF_HOME', 'hub'], ['XDG_CACHE_HOME', 'huggingface', 'hub']])
def test_the_cache_of_the_hub_is_where_these_say(tmp_path, monkeypatch, names):
    for name in ('HF_HUB_CACHE', 'HF_HOME', 'XDG_CACHE_HOME'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setenv(names[0], str(tmp_path / 'cache'))
    kept = Path(tmp_path, 'cache', *names[1:], 'models--some--model')
    (kept / 'refs').mkdir(parents=True)
    (kept / 'refs' / 'main').write_text('abc123')
    llama_folder(kept / 'snapshots' / 'abc123')
    assert from_pretrained('some/model').config.n_layer == 2

# -----------------------------------------------------------------------------
# machines

def test_a_file_system_without_locks_will_do(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(95, 'Operation not supported')

    monkeypatch.setattr('fcntl.flock', flock)
    with alone_in(tmp_path):
        runtime.open_log(str(tmp_path / 'out'), 'step loss', 0)(1, loss=2.0)
    assert '1,2.0' in (tmp_path / 'out' / 'log.csv').read_text()

def test_code_of_another_processor_is_not_taken():
    words = [sys.executable, '-c', 'import os, runtime; print(os.environ["TORCHINDUCTOR_CACHE_DIR"])']
    environment = {key: x for key, x in os.environ.items() if key != 'TORCHINDUCTOR_CACHE_DIR'}
    found = [subprocess.run(words, cwd=ROOT, env=dict(environment, **more), capture_output=True, text=True)
             .stdout.strip() for more in ({}, dict(ATEN_CPU_CAPABILITY='default'),
                                          dict(TORCHINDUCTOR_CACHE_DIR='mine'))]
    assert found[0] != found[1] and found[1].endswith('DEFAULT') and found[2] == 'mine'

@pytest.mark.skipif(sys.platform != 'linux', reason='PATH and CXX are those of Linux')
def test_no_compiler_is_a_sentence(place):                              # noqa: F811
    environment = dict(os.environ, PATH='/nowhere', CXX='/nowhere/c++')
    environment['TORCHINDUCTOR_CACHE_DIR'] = str(place / 'code')
    words = command('train.py', **dict(SMALL, out_dir='uncompiled', compile=True))
    result = subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith('torch.compile needs a C++ compiler')
    assert 'Traceback' not in result.stderr

def test_a_run_whose_output_nobody_reads_saves_and_ends(place):         # noqa: F811
    words = command('train.py', **dict(SMALL, out_dir='unread', max_iters=10**6, eval_interval=10**6))
    with subprocess.Popen(words, cwd=place, **PIPES) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=120) == 0 and process.stderr.read() == ''
    assert load_checkpoint(str(place / 'unread' / 'last.pt'))['step'] < 10**6

def test_a_sample_that_nobody_reads_ends_quietly(place, whole):         # noqa: F811
    words = command('sample.py', out_dir='whole', max_new_tokens=3000)
    with subprocess.Popen(words, cwd=place, **PIPES) as process:
        process.stdout.readline()
        process.stdout.close()
        process.wait(timeout=120)
        assert process.stderr.read() == ''

# -----------------------------------------------------------------------------
# texts and data sets

def test_texts_are_named_and_lose_their_mark(tmp_path):
    (tmp_path / 'one.txt').write_bytes(b'\xef\xbb\xbfab')
    assert read_text(tmp_path / 'one.txt') == 'ab'
    (tmp_path / 'two.txt').write_bytes(b'caf\xe9')
    with pytest.raises(ValueError, match='two.txt is not text in UTF-8: convert it first'):
        read_text(tmp_path / 'two.txt')

def test_characters_of_a_text_of_ones_own(tmp_path):
    (tmp_path / 'my.txt').write_text('naïve ☃\n' * 50)
    text_prepare.prepare([str(tmp_path / 'my.txt')], folder=tmp_path, chars=True)
    meta = json.loads((tmp_path / 'meta.json').read_text())
    assert meta['chars'] == ''.join(sorted(set('naïve ☃\n'))) and meta['vocab_size'] == 8
    _, decode = tokenizer(meta)
    assert decode(np.fromfile(tmp_path / 'train.bin', np.uint8)) == ('naïve ☃\n' * 50)[:360]

def nanogpts_data(folder, chars=CHARS):
    """As its prepare.py leaves it: tokens in uint16, and a pickle of three entries, or none."""
    folder.mkdir(parents=True)
    tokens = np.random.default_rng(0).integers(len(chars or range(50257)), size=3000).astype(np.uint16)
    tokens[:2000].tofile(folder / 'train.bin')
    tokens[2000:].tofile(folder / 'val.bin')
    if chars:
        itos = dict(enumerate(chars))
        meta = dict(vocab_size=len(chars), itos=itos, stoi={c: i for i, c in itos.items()})
        (folder / 'meta.pkl').write_bytes(pickle.dumps(meta))
    return tokens

def test_a_data_folder_of_nanogpt_trains_and_samples(tmp_path):
    nanogpts_data(tmp_path / 'data' / 'mine')
    train(tmp_path, 'out', dataset='mine')
    said = run(tmp_path, 'sample.py', out_dir='out', start='abc', max_new_tokens=20)
    assert set(said.split('-' * 80 + '\n')[1]) <= set(CHARS + '\n')

def test_a_data_folder_of_nanogpt_without_characters_is_gpt2s(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokens = nanogpts_data(tmp_path / 'data' / 'owt', chars=None)
    knobs = SimpleNamespace(dataset='owt', block_size=8)
    meta, data, _ = open_data(knobs)
    assert meta['encoding'] == 'gpt2' and data.tolist() == tokens[:2000].tolist()
    tokens[7] = 50257
    tokens[:2000].tofile('data/owt/train.bin')
    with pytest.raises(ValueError, match=r"\(or add a meta.pkl: its tokens are not GPT-2's\)"):
        open_data(knobs)

def test_a_pickle_may_hold_nothing_but_dict_str_and_int(tmp_path):
    path = tmp_path / 'meta.pkl'
    path.write_bytes(pickle.dumps(dict(itos={0: 'a'}, vocab_size=1)))
    with open(path, 'rb') as file:
        assert PlainUnpickler(file).load() == dict(itos={0: 'a'}, vocab_size=1)
    path.write_bytes(pickle.dumps(dict(vocab_size=np.int64(1))))        # harmless, but an object
    with open(path, 'rb') as file, pytest.raises(pickle.UnpicklingError, match='numpy'):
        PlainUnpickler(file).load()

@pytest.mark.parametrize('itos', [{0: 'a', 1: 'the '}, {0: b'a', 1: b'b'}, {}], ids=str)
def test_a_meta_pkl_of_other_tokens_is_a_sentence(tmp_path, monkeypatch, itos):
    monkeypatch.chdir(tmp_path)
    nanogpts_data(tmp_path / 'data' / 'mine')
    Path('data/mine/meta.pkl').write_bytes(pickle.dumps(dict(vocab_size=2, itos=itos)))
    with pytest.raises(ValueError, match='data/mine/meta.pkl must be a dict with vocab_size and itos'):
        open_data(SimpleNamespace(dataset='mine', block_size=8))

@pytest.mark.parametrize('change', [
    dict(encoding=None), dict(encoding='utf-8'), dict(encoding='chars', chars={'a': 0}),
    dict(encoding='chars'), dict(encoding='chars', chars='ab'), dict(encoding='tokenizer.json')], ids=str)
def test_a_meta_json_by_hand_is_checked_where_data_are_opened(tmp_path, monkeypatch, change):
    monkeypatch.chdir(tmp_path)
    nanogpts_data(tmp_path / 'data' / 'mine')
    meta = dict(vocab_size=9, dtype='uint16', **change)
    Path('data/mine/meta.json').write_text(json.dumps({key: x for key, x in meta.items() if x}))
    with pytest.raises(ValueError, match='data/mine/meta.json must have an "encoding": "bytes", "gpt2", '):
        open_data(SimpleNamespace(dataset='mine', block_size=8))

def test_the_command_that_is_suggested_for_texts_has_its_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match='python data/text/prepare.py FILES --name=text'):
        open_data(SimpleNamespace(dataset='text', block_size=8))

# -----------------------------------------------------------------------------
# nanoGPT's checkpoints, names and config files

def test_a_checkpoint_of_nanogpt_finds_its_characters(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = dict(NANO, vocab_size=len(CHARS))
    model = GPT(GPTConfig(**arguments, scheme='standard'))
    Path('out').mkdir()
    checkpoint = dict(model=model.state_dict(), model_args=arguments, config=dict(dataset='mine'))
    torch.save(checkpoint, 'out/ckpt.pt')
    assert "copy nanoGPT's folder data/mine, with meta.pkl" in complaint(tmp_path, 'sample.py', out_dir='out')
    nanogpts_data(tmp_path / 'data' / 'mine')
    said = run(tmp_path, 'sample.py', out_dir='out', start='abc', max_new_tokens=20)
    assert set(said.split('-' * 80 + '\n')[1]) <= set(CHARS + '\n')

def test_export_says_what_nanogpts_sample_needs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    meta = dict(encoding='chars', chars=CHARS, vocab_size=len(CHARS))
    path, ours = written(tmp_path, LAYERNORM, meta)                     # whose vocabulary has 97: padding
    said = export(path, 'mine.pt')
    assert said.endswith("sample.py needs mine.pt.pkl, with the characters, as its data/mine/meta.pkl")
    found = torch.load('mine.pt', weights_only=True)
    assert found['config'] == dict(dataset='mine') and found['model_args']['vocab_size'] == len(CHARS)
    for name in ('transformer.wte.weight', 'lm_head.weight'):
        assert torch.equal(found['model'][name], ours.lm_head.weight[:len(CHARS)])
    with open('mine.pt.pkl', 'rb') as file:
        theirs = PlainUnpickler(file).load()
    assert theirs['vocab_size'] == 9 and theirs['itos'][1] == 'b' and theirs['stoi']['b'] == 1
    Path('data/mine').mkdir(parents=True)
    shutil.move('mine.pt.pkl', 'data/mine/meta.pkl')
    again, its_meta = build('mine.pt')                                  # ours reads it, too
    assert its_meta['chars'] == CHARS and again.config.vocab_size == len(CHARS)

def test_start_may_be_a_file(place, whole):                             # noqa: F811
    (place / 'prompt.txt').write_text('abc')
    flags = dict(out_dir='whole', max_new_tokens=9)
    said = run(place, 'sample.py', start='FILE:prompt.txt', **flags)
    assert said == run(place, 'sample.py', start='abc', **flags)

def test_config_files_of_nanogpt(tmp_path):
    Knobs = knobs_of('train.py')
    path = tmp_path / 'config.py'
    path.write_text(NANOGPT_CONFIGS['train_shakespeare_char'])
    with pytest.raises(ValueError) as refusal:
        configure(Knobs, [str(path), '--eval_iters=20'])
    said = str(refusal.value)
    assert said.startswith('unknown here: eval_iters (use eval_windows, in sequences), always_save_')
    assert 'checkpoint (leave it out), wandb_log (use log.csv of out_dir);' in said and '\n' not in said
    known = [line for line in path.read_text().split('\n') if line[:3] in ('gra', 'bet', 'n_e')]
    path.write_text('\n'.join(known))
    knobs = configure(Knobs, [str(path)])
    assert (knobs.gradient_accumulation_steps, knobs.beta2, knobs.n_embd) == (40, 0.99, 384)
    path.write_text(NANOGPT_CONFIGS['finetune_shakespeare'])
    with pytest.raises(ValueError, match=r'\Aunknown here: wandb_run_name \(leave it out\); --help'):
        configure(Knobs, [str(path)])

@pytest.mark.parametrize('flag, words', [
    ('--learning_rat=1', r'learning_rat \(did you mean learning_rate\?\)'),
    ('--eval_iter=1', r'eval_iter \(did you mean eval_iters\?\)'), ('--prompt=a', r'prompt \(leave it out\)'),
    ('--width=8', 'unknown here: width;')])
def test_no_neighbour_that_means_something_else_is_suggested(flag, words):
    with pytest.raises(ValueError, match=words):
        configure(knobs_of('train.py'), [flag])

def test_a_wrong_line_of_a_config_file_has_its_number(tmp_path):
    path = tmp_path / 'config.py'
    for content, line in (('n_layer = 8\n\nn_head = min(1, 2)\n', 3), ('n_layer = 8\nn_head 4\n', 2)):
        path.write_text(content)
        with pytest.raises(ValueError, match=f'line {line} of .*config.py is not of the kind "n_layer = 8"'):
            configure(knobs_of('train.py'), [str(path)])
