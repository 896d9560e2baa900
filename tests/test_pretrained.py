"""
What must be true of pretrained.py, export.py and data/text:  python -m pytest tests/test_pretrained.py

Small random models, written here as the public ones are. Tests that compare with transformers and tokenizers
are skipped where these packages are missing.
"""
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from data.text.prepare import prepare as prepare_text
from export import export
from model import GPT, GPTConfig
from pretrained import build, conversation, ends_of_text, from_pretrained, same_tokens, tokenizer, tokens_of
from runtime import save_checkpoint
from test_data import site                                              # noqa: F401, a fixture

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LLAMA = dict(model_type='llama', vocab_size=97, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-4,
             rope_theta=5000.0, tie_word_embeddings=False, hidden_act='silu')
GPT2 = dict(model_type='gpt2', n_layer=1, n_head=1, n_embd=8, n_positions=8, vocab_size=50257,
            layer_norm_epsilon=1e-5)

def write_safetensors(path, tensors):
    """As the format says: length, header, bytes."""
    header = {}
    raw = b''
    for name, tensor in tensors.items():
        content = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        dtype = {torch.float32: 'F32', torch.bfloat16: 'BF16'}[tensor.dtype]
        offsets = [len(raw), len(raw) + len(content)]
        header[name] = dict(dtype=dtype, shape=list(tensor.shape), data_offsets=offsets)
        raw += content
    header = json.dumps(header).encode()
    path.write_bytes(len(header).to_bytes(8, 'little') + header + raw)

def llama_tensors(dtype=torch.float32):
    torch.manual_seed(0)
    layer = {'input_layernorm': (32,), 'post_attention_layernorm': (32,), 'self_attn.q_proj': (32, 32),
             'self_attn.k_proj': (16, 32), 'self_attn.v_proj': (16, 32), 'self_attn.o_proj': (32, 32),
             'mlp.gate_proj': (40, 32), 'mlp.up_proj': (40, 32), 'mlp.down_proj': (32, 40)}
    shapes = {'model.embed_tokens': (97, 32), 'model.norm': (32,), 'lm_head': (97, 32)}
    for j in range(2):
        shapes.update({f'model.layers.{j}.{part}': shape for part, shape in layer.items()})
    return {f'{name}.weight': torch.randn(shape).to(dtype) for name, shape in shapes.items()}

def llama_folder(folder, tensors=None, **changes):
    folder.mkdir(exist_ok=True, parents=True)
    (folder / 'config.json').write_text(json.dumps({**LLAMA, **changes}))
    write_safetensors(folder / 'model.safetensors', tensors or llama_tensors())
    return str(folder)

def words_of(folder):
    """Writes a tokenizer of a few words."""
    tokenizers = pytest.importorskip('tokenizers')
    vocabulary = {'<unk>': 0, 'to': 1, 'be': 2, 'or': 3, '<s>': 4}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token='<unk>'))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.enable_truncation(3)
    words.save(str(folder / 'tokenizer.json'))
    return words

def amplify(model):
    """Weights as large as trained ones."""
    for weight in model.parameters():
        weight.data = 3 * weight.data if weight.dim() == 2 else weight.data + 0.1 * torch.randn(weight.shape)
    return model.eval()

IDX = torch.randint(97, (2, 48), generator=torch.Generator().manual_seed(1))

@torch.no_grad()
def logits(model):
    return model.lm_head(model.hidden(IDX))

def error(one, other):
    """The largest difference, as a part of the largest value."""
    return ((one - other).abs().max() / other.abs().max()).item()

# -----------------------------------------------------------------------------
# models of others

def against_transformers(theirs, folder, **how):
    amplify(theirs).save_pretrained(folder, **how)
    ours = from_pretrained(str(folder)).eval()
    with torch.no_grad():
        assert error(logits(ours), theirs(IDX).logits) <= 1e-4
    theirs.generation_config.eos_token_id = None    # no token ends a text
    greedy = theirs.generate(IDX[:, :5], attention_mask=torch.ones(2, 5), max_new_tokens=40, do_sample=False,
                             pad_token_id=0)
    assert torch.equal(ours.generate(IDX[:, :5], 40, temperature=0), greedy)

@pytest.mark.parametrize('options', [
    {}, dict(n_inner=50, layer_norm_epsilon=1e-3, tie_word_embeddings=False), dict(activation_function='gelu')
], ids=str)
def test_gpt2_of_transformers(options, tmp_path):
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=3, n_head=4,
                                     eos_token_id=96, bos_token_id=96, **options)
    against_transformers(transformers.GPT2LMHeadModel(config), tmp_path)

@pytest.mark.parametrize('options', [
    dict(num_key_value_heads=2), dict(num_key_value_heads=8, tie_word_embeddings=True),
    dict(num_key_value_heads=1, rope_parameters=dict(rope_type='default', rope_theta=1e5), rms_norm_eps=1e-3),
], ids=str)
def test_llama_of_transformers(options, tmp_path):
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=97, hidden_size=64, num_attention_heads=8,
                                      num_hidden_layers=3, intermediate_size=100,
                                      max_position_embeddings=64, **options)
    against_transformers(transformers.LlamaForCausalLM(config), tmp_path, max_shard_size='60KB')
    assert (tmp_path / 'model.safetensors.index.json').exists()         # several files

def test_from_the_hub(site, tmp_path, monkeypatch):                     # noqa: F811
    """Downloaded once, in bfloat16 and in two shards, from a server here that asks for a token."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HF_ENDPOINT', site.url)
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'nothing'))
    monkeypatch.delenv('HF_TOKEN', raising=False)
    name = 'some.one/their-model'
    tensors = llama_tensors(torch.bfloat16)
    files = {'config.json': json.dumps(LLAMA).encode()}
    index = {}
    for file, part in (('0.safetensors', list(tensors)[:9]), ('1.safetensors', list(tensors)[9:])):
        write_safetensors(tmp_path / 'part', {key: tensors[key] for key in part})
        files[file] = (tmp_path / 'part').read_bytes()
        index.update(dict.fromkeys(part, file))
    files['model.safetensors.index.json'] = json.dumps(dict(weight_map=index)).encode()
    site.files = {f'/{name}/resolve/main/{file}': content for file, content in files.items()}
    site.errors = [401]
    with pytest.raises(ValueError, match='status 401.*; a private or gated model needs HF_TOKEN'):
        from_pretrained(name)
    site.tokens.clear()
    monkeypatch.setenv('HF_TOKEN', 'secret')
    model = from_pretrained(name, scheme='leapfrog', h=0.25)
    assert set(site.tokens) == {'Bearer secret'}
    assert model.config.scheme == 'leapfrog' and model.config.h == 0.25
    block = model.transformer.h[1]
    parts = [tensors[f'model.layers.1.self_attn.{x}_proj.weight'] for x in 'qkv']
    assert torch.equal(block.attn.c_attn.weight, torch.cat(parts).float())
    assert torch.equal(block.mlp.c_fc.weight[:40], tensors['model.layers.1.mlp.gate_proj.weight'].float())
    assert torch.equal(model.lm_head.weight, tensors['lm_head.weight'].float())
    with pytest.raises(ValueError, match='weights/some.one/other has no config.json: check the name'):
        from_pretrained('some.one/other')
    monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')             # nobody there
    with pytest.raises(ValueError, match='has a tensor layers.1.input_layernorm.weight, but'):
        from_pretrained(name, n_layer=1)                                # all of it is here
    for wrong in ('../secret', 'a/../b', '/etc', 'a/b/c', 'gpt5'):
        with pytest.raises(ValueError, match='neither a folder nor a model of the hub|has no config.json'):
            from_pretrained(wrong)
    site.ranges.clear()
    (tmp_path / 'some.one').mkdir()
    (tmp_path / 'some.one' / 'weights').write_bytes(b'?')               # a file is not looked up on the hub
    with pytest.raises(ValueError, match='some.one/weights is damaged, cut off, or not written by'):
        from_pretrained('some.one/weights')
    assert not site.ranges

def test_files_that_are_here_will_do_as_those_in_the_cache_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')             # nobody there
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'home'))
    kept = tmp_path / 'home' / 'hub' / 'models--some--model'
    (kept / 'refs').mkdir(parents=True)
    (kept / 'refs' / 'main').write_text('abc123')
    llama_folder(kept / 'snapshots' / 'abc123')
    assert torch.equal(from_pretrained('some/model').lm_head.weight, llama_tensors()['lm_head.weight'])
    assert not (tmp_path / 'weights').exists()
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    with pytest.raises(ValueError, match='weights/a/model has no config.json: .* HF_HUB_OFFLINE is set'):
        build('a/model')
    llama_folder(tmp_path / 'weights' / 'a' / 'model')
    assert build('a/model')[1]['model'] == 'a/model'

PEAK = """
import sys
from pretrained import build
def status(key):
    with open('/proc/self/status') as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) * 1024
build(sys.argv[1])
before = status('VmRSS')
with open('/proc/self/clear_refs', 'w') as file:
    file.write('5')                                         # the peak begins anew
model, _ = build(sys.argv[2])
sizes = [w.nbytes for w in model.parameters()]
print(status('VmHWM') - before, sum(sizes), max(sizes))
"""

@pytest.mark.skipif(not os.path.exists('/proc/self/clear_refs'), reason='Linux tells the peak, in /proc')
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_loading_takes_the_memory_of_the_weights_and_of_one_more_tensor(tmp_path, dtype):
    small = llama_folder(tmp_path / 'small')
    large = {}
    for name, tensor in llama_tensors().items():
        large[name] = torch.zeros(*[16 * n for n in tensor.shape], dtype=dtype)
    how = dict(vocab_size=16 * 97, hidden_size=512, intermediate_size=640)
    command = [sys.executable, '-c', PEAK, small, llama_folder(tmp_path / 'large', large, **how)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout
    peak, weights, largest = map(int, output.split())
    assert weights < peak < weights + largest + 3e6         # Linux counts to a megabyte or two

NANO = dict(n_layer=3, n_head=4, n_embd=32, block_size=64, bias=True, vocab_size=97, dropout=0.0)
LAYERNORM = dict(scheme='standard')
RMSNORM = dict(scheme='standard', norm='rmsnorm', mlp='swiglu', bias=False, rope_theta=5e3, n_inner=40)
BYTES = dict(encoding='bytes', vocab_size=256)

def written(folder, config, meta=BYTES, vocab_size=97):
    """A checkpoint of ours with random weights, and the model."""
    torch.manual_seed(0)
    config = GPTConfig(block_size=64, vocab_size=vocab_size, n_layer=3, n_head=4, n_embd=32, **config)
    model = amplify(GPT(config))
    checkpoint = dict(model=model.state_dict(), config=vars(model.config), meta=meta)
    save_checkpoint([str(folder / 'best.pt')], checkpoint)
    return str(folder / 'best.pt'), model

def nanogpt(weights):
    """The logits that nanoGPT computes with these weights."""
    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], weights[f'{name}.weight'], weights[f'{name}.bias'], 1e-5)

    def linear(x, name):
        return F.linear(x, weights[f'{name}.weight'], weights[f'{name}.bias'])

    x = weights['transformer.wte.weight'][IDX] + weights['transformer.wpe.weight'][:48]
    for j in range(3):
        block = f'transformer.h.{j}'
        qkv = linear(norm(x, f'{block}.ln_1'), f'{block}.attn.c_attn').split(32, dim=2)
        q, k, v = (y.view(2, 48, 4, 8).transpose(1, 2) for y in qkv)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(2, 48, 32)
        x = x + linear(y, f'{block}.attn.c_proj')
        hidden = F.gelu(linear(norm(x, f'{block}.ln_2'), f'{block}.mlp.c_fc'))
        x = x + linear(hidden, f'{block}.mlp.c_proj')
    return norm(x, 'transformer.ln_f') @ weights['lm_head.weight'].t()

def test_nanogpt_computes_gelu_by_erf(tmp_path):
    _, ours = written(tmp_path, LAYERNORM)
    path = str(tmp_path / 'ckpt.pt')
    torch.save(dict(model=ours.state_dict(), model_args=NANO, config={}), path)
    want = nanogpt(ours.state_dict())
    assert error(logits(from_pretrained(path).eval()), want) <= 1e-6
    assert error(logits(from_pretrained(path, gelu='tanh').eval()), want) > 1e-5        # it does matter

def test_our_checkpoints_name_their_gelu_and_older_ones_mean_tanh(tmp_path):
    path, _ = written(tmp_path, LAYERNORM)
    assert from_pretrained(path).config.gelu == 'erf'
    checkpoint = torch.load(path)
    del checkpoint['config']['gelu']
    torch.save(checkpoint, path)
    assert from_pretrained(path).config.gelu == 'tanh'
    assert from_pretrained(path, scheme='leapfrog', h=0.25).config.stored_layers == 0

def test_nanogpt(tmp_path):
    path = tmp_path / 'ckpt.pt'
    ours = GPT(GPTConfig(**NANO, scheme='standard')).state_dict()
    weights = {f'_orig_mod.{name}': weight for name, weight in ours.items()}
    weights['transformer.h.0.attn.bias'] = torch.ones(1, 1, 64, 64)     # a buffer, without flash attention
    torch.save(dict(model=weights, model_args=NANO, iter_num=7, config={}), path)
    model, meta = build(str(path), block_size=16, scheme='midpoint')
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, ours[name][:len(weight)])            # of 64 positions 16 are left
    same_tokens('ckpt.pt', meta, 'data', dict(encoding='bytes'))        # it does not say
    content = bytearray(path.read_bytes())
    content[content.index(ours['lm_head.weight'].numpy().tobytes()) + 100] ^= 1
    path.write_bytes(content)                                           # torch reads no checksums
    with pytest.raises(ValueError, match='ckpt.pt is damaged, cut off, or not written by torch.save'):
        build(str(path))

@pytest.mark.parametrize('change, words', [
    (lambda c: c['model'].pop('transformer.ln_f.bias'), 'has no tensor ln_f.bias of shape .32,.'),
    (lambda c: c['model'].update(more=torch.ones(1)), 'has a tensor more, but its config has not'),
    (lambda c: c['config'].update(n_embd=64), 'has no tensor wte.weight of shape .97, 64.')])
def test_a_checkpoint_that_does_not_fit_itself_is_a_sentence(tmp_path, change, words):
    path, _ = written(tmp_path, LAYERNORM)
    checkpoint = torch.load(path)
    change(checkpoint)
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=words):
        build(path)

K = 'layers.0.self_attn.k_proj.weight'
V = 'layers.0.self_attn.v_proj.weight'
BAD = {
    'an architecture': (dict(model_type='mamba'), {}, 'mamba {} is not supported'),
    'an activation': (dict(hidden_act='gelu'), {}, "{'hidden_act': 'gelu'}"),
    'an activation of GPT-2': (dict(GPT2, activation_function='relu'), {}, "{'activation_function': 'relu'}"),
    'rope scaling': (dict(rope_scaling=dict(type='linear', factor=2)), {}, "{'rope_type': 'linear'}"),
    'two kinds of rope': (dict(rope_parameters=dict(rope_theta=1e4), rope_scaling=dict(type='linear')), {},
                          "{'rope_type': 'linear'}"),
    'rope scaling by name': (dict(rope_parameters=dict(rope_type='yarn')), {}, "{'rope_type': 'yarn'}"),
    'a missing field': (dict(hidden_size=None), {}, "('hidden_size')"),
    'a missing tensor': ({}, {'norm.weight': None}, 'has no tensor norm.weight of shape (32,)'),
    'an extra tensor': ({}, {'extra.weight': torch.zeros(3)}, 'has a tensor extra.weight, but'),
    'a wrong shape': ({}, {'norm.weight': torch.zeros(31)}, 'has no tensor norm.weight of shape (32,)'),
    'a wrong part': ({}, {K: torch.zeros(16, 31)}, f'has no tensor {K} of shape (16, 32)'),
    'shapes that add up': ({}, {K: torch.zeros(20, 32), V: torch.zeros(12, 32)}, f'{K} of shape (16, 32)'),
}

@pytest.mark.parametrize('case', BAD)
def test_a_model_that_does_not_fit_is_refused_in_a_sentence(case, tmp_path):
    changes, others, words = BAD[case]
    tensors = llama_tensors() | {f'model.{name}': tensor for name, tensor in others.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    folder = llama_folder(tmp_path, tensors)
    config = {name: value for name, value in (LLAMA | changes).items() if value is not None}
    (tmp_path / 'config.json').write_text(json.dumps(config))
    with pytest.raises(ValueError) as refusal:
        from_pretrained(folder)
    assert words in str(refusal.value) and '\n' not in str(refusal.value)

def test_files_that_are_damaged_are_refused_in_a_sentence(tmp_path):
    def refused(file, content, words):
        (tmp_path / file).write_bytes(content)
        with pytest.raises(ValueError, match=words):
            from_pretrained(name)

    name = llama_folder(tmp_path)
    content = (tmp_path / 'model.safetensors').read_bytes()
    long = b'\xff' * 7 + b'\x7f' + content[8:]
    wrong = content.replace(b'[32, 40]', b'[32, 41]')
    for damaged in (content[:-1], content[:100], content[:5], b'', b'x' * 500, long, wrong):
        refused('model.safetensors', damaged, 'model.safetensors cannot be read')
    (tmp_path / 'model.safetensors').unlink()
    write_safetensors(tmp_path.parent / 'stranger.safetensors', llama_tensors())        # beside the folder
    index = dict(weight_map=dict.fromkeys(llama_tensors(), '../stranger.safetensors'))
    refused('model.safetensors.index.json', json.dumps(index).encode(), 'has no stranger.safetensors')
    refused('model.safetensors.index.json', b'{"weight_map": []}', 'index.json cannot be read')
    (tmp_path / 'model.safetensors.index.json').unlink()
    refused('tokenizer.json', b'', 'has no model.safetensors')
    refused('config.json', b'{', 'config.json cannot be read')
    name = str(tmp_path / 'ckpt.pt')
    refused('ckpt.pt', content, 'is damaged, cut off, or not written')

def test_text_in_the_tokens_of_a_llama(tmp_path):
    folder = llama_folder(tmp_path / 'model')
    words_of(tmp_path / 'model')
    (tmp_path / 'text.txt').write_text('to be or ' * 10)
    prepare_text([str(tmp_path / 'text.txt')], folder, tmp_path)
    assert np.fromfile(tmp_path / 'train.bin', np.uint8).tolist() == [1, 2, 3] * 9
    assert np.fromfile(tmp_path / 'val.bin', np.uint8).tolist() == [1, 2, 3]
    meta = json.loads((tmp_path / 'meta.json').read_text())
    encode, decode = tokenizer(meta)
    assert decode(encode('be to')) == 'be to'
    same_tokens('model', build(folder)[1], 'data', meta)
    same_tokens('model', tokens_of(f'{folder}/'), 'data', meta)         # the same folder
    with pytest.raises(ValueError, match='encode the data with its tokenizer'):
        same_tokens('model', meta, 'data', dict(encoding='gpt2'))
    with pytest.raises(OSError, match='No such file'):
        prepare_text([str(tmp_path / 'none.txt')], folder, tmp_path)
    (tmp_path / 'text.txt').write_bytes(b'caf\xe9')
    with pytest.raises(ValueError, match='text.txt is not text in UTF-8'):
        prepare_text([str(tmp_path / 'text.txt')], folder, tmp_path)
    (tmp_path / 'model' / 'tokenizer.json').write_bytes(b'')
    with pytest.raises(ValueError, match='tokenizer.json cannot be read'):
        tokenizer(meta)

TEMPLATE = '''{{ bos_token }}{% for message in messages %}
    {% if message.role == "user" %}
[{{ message.role }}] {{ message.content }}
    {% endif %}{% endfor %}{% if add_generation_prompt %}[answer]
{% endif %}'''

def test_a_question_in_the_models_own_template(tmp_path):
    transformers = pytest.importorskip('transformers')
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=words_of(tmp_path), bos_token='<s>')
    theirs.chat_template = TEMPLATE
    theirs.save_pretrained(tmp_path)
    question = dict(role='user', content='to be?')
    wanted = theirs.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
    meta = dict(encoding='tokenizer.json', model=str(tmp_path))
    assert wanted.startswith('<s>[user] to be?') and conversation(meta, 'to be?') == wanted
    settings = tmp_path / 'tokenizer_config.json'                       # as older versions write it
    settings.write_text(json.dumps(dict(chat_template=TEMPLATE, bos_token=dict(content='<s>', lstrip=False))))
    assert conversation(meta, 'to be?') == wanted
    for bad in ("{{ ''.__class__.__mro__ }}", '{% if %}'):              # the first leads out of the sandbox
        settings.write_text(json.dumps(dict(chat_template=bad)))
        with pytest.raises(ValueError, match=r'\Athe chat template cannot be read .*\Z'):
            conversation(meta, 'to be?')
    with pytest.raises(ValueError, match='the model has no chat template: leave --chat out'):
        conversation(dict(encoding='gpt2'), 'to be?')

# -----------------------------------------------------------------------------
# export

@pytest.mark.parametrize('config', [
    LAYERNORM, dict(LAYERNORM, bias=False, gelu='tanh'), dict(LAYERNORM, tied=False, n_inner=50),
    RMSNORM, dict(RMSNORM, n_kv_head=2, tied=False), dict(RMSNORM, n_kv_head=1, norm_eps=1e-3)], ids=str)
def test_transformers_reads_what_is_written(config, tmp_path):
    transformers = pytest.importorskip('transformers')
    path, ours = written(tmp_path, config)
    folder = str(tmp_path / 'folder')
    export(path, folder)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
    again = from_pretrained(folder).eval()
    with torch.no_grad():
        assert error(theirs.eval()(IDX).logits, logits(ours)) <= 1e-5
    assert error(logits(again), logits(ours)) <= 1e-5
    for name in ('block_size', 'tied', 'scheme', 'gelu'):
        assert getattr(again.config, name) == getattr(ours.config, name)
    their_config = json.loads((tmp_path / 'folder' / 'config.json').read_text())
    # llama.cpp's converter wants n_ctx of a GPT-2
    assert their_config['model_type'] == 'llama' or their_config['n_ctx'] == ours.config.block_size

def test_its_tokenizer_goes_along(tmp_path, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    folder = llama_folder(tmp_path / 'model', eos_token_id=[3, 5], bos_token_id=1)
    words_of(tmp_path / 'model')
    path, _ = written(tmp_path, RMSNORM, dict(encoding='tokenizer.json', model=folder, vocab_size=97))
    export(path, str(tmp_path / 'folder'))
    _, meta = build(str(tmp_path / 'folder'))
    assert ends_of_text(meta) == [3, 5] and tokenizer(meta)[0]('be') == [2]
    transformers = pytest.importorskip('transformers')
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / 'folder')('be')['input_ids'] == [2]
    assert transformers.AutoConfig.from_pretrained(tmp_path / 'folder').bos_token_id == 1

def test_gpt2s_tokenizer_goes_along_too(tmp_path):
    path, _ = written(tmp_path, LAYERNORM, dict(encoding='gpt2', vocab_size=50257), vocab_size=50257)
    assert 'without a tokenizer: its tokens are of the kind gpt2' in export(path, str(tmp_path / 'one'))
    (tmp_path / 'one' / 'tokenizer.json').write_text('{"Ġgazed": 50255}')
    assert export(str(tmp_path / 'one'), str(tmp_path / 'two')).endswith('two is written')
    assert (tmp_path / 'two' / 'tokenizer.json').read_text() == '{"Ġgazed": 50255}'

@pytest.mark.parametrize('meta', [BYTES, dict(encoding='chars', chars=['a', 'b'], vocab_size=2)], ids=str)
def test_tokens_that_no_library_has_are_those_of_before(tmp_path, meta):
    path, _ = written(tmp_path, LAYERNORM, meta)
    export(path, str(tmp_path / 'folder'))
    assert build(str(tmp_path / 'folder'))[1] == meta
    (tmp_path / 'folder' / 'meta.json').unlink()
    with pytest.raises(ValueError, match='the model does not say how its text became tokens'):
        tokenizer(build(str(tmp_path / 'folder'))[1])

def test_nothing_that_is_there_is_overwritten(tmp_path):
    path, _ = written(tmp_path, LAYERNORM)
    before = (tmp_path / 'best.pt').read_bytes()
    for target in (path, str(tmp_path)):
        with pytest.raises(ValueError, match='exists already: choose another name, or delete it'):
            export(path, target)
    assert (tmp_path / 'best.pt').read_bytes() == before and os.listdir(tmp_path) == ['best.pt']
    export(path, str(tmp_path / 'new' / 'ckpt.pt'))

@pytest.mark.parametrize('gelu', ['erf', 'tanh'])
def test_nanogpt_reads_what_is_written(gelu, tmp_path):
    """Its train.py and sample.py take these two keys of ckpt.pt; the names of the weights are ours."""
    path, ours = written(tmp_path, dict(LAYERNORM, gelu=gelu))
    said = export(path, str(tmp_path / 'ckpt.pt'))
    assert ('logits agree to 1e-4' in said) == (gelu == 'tanh')
    nano = torch.load(tmp_path / 'ckpt.pt', weights_only=True)
    weights = nano['model']
    assert nano['model_args'] == NANO and {'iter_num', 'best_val_loss', 'config'} < nano.keys()
    assert weights.keys() == ours.state_dict().keys()
    assert weights['lm_head.weight'].data_ptr() == weights['transformer.wte.weight'].data_ptr()     # tied
    assert error(nanogpt(weights), logits(ours)) <= dict(erf=1e-6, tanh=1e-4)[gelu]

@pytest.mark.parametrize('config, target, words', [
    (dict(scheme='leapfrog'), 'folder', 'no other program computes the scheme leapfrog'),
    (dict(LAYERNORM, norm='rmsnorm'), 'folder', 'mixes features of GPT-2 and Llama'),
    (dict(LAYERNORM, rope_theta=1e4), 'folder', 'mixes features of GPT-2 and Llama'),
    (dict(RMSNORM, bias=True), 'folder', 'mixes features of GPT-2 and Llama'),
    (RMSNORM, 'ckpt.pt', 'is no model of nanoGPT'),
    (dict(LAYERNORM, tied=False), 'ckpt.pt', 'is no model of nanoGPT')], ids=str)
def test_what_nobody_reads_is_not_written(tmp_path, config, target, words):
    path, _ = written(tmp_path, config)
    with pytest.raises(ValueError, match=words):
        export(path, str(tmp_path / target))
    assert not (tmp_path / target).exists()

def test_a_script_ends_with_the_sentence_alone(tmp_path):
    (tmp_path / 'config.json').write_text('{')
    command = [sys.executable, os.path.join(ROOT, 'export.py'), '.', 'target']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith('config.json cannot be read (') and done.stderr.count('\n') == 1
