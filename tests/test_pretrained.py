"""
What must be true of pretrained.py and data/text:  python -m pytest tests/test_pretrained.py

Small random models, written here as the public ones are written. Those that compare with transformers and tokenizers
are skipped where these packages are not installed.
"""
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from data.text.prepare import prepare as prepare_text
from model import GPT, GPTConfig
from pretrained import build, conversation, ends_of_text, export, same_tokens, tokenizer, tokens_of
from runtime import save_checkpoint
from test_data import site                                              # noqa: F401, a fixture

LLAMA = dict(model_type='llama', vocab_size=97, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-4,
             rope_theta=5000.0, tie_word_embeddings=False, hidden_act='silu')

def write_safetensors(path, tensors):
    """As the format says: length, header, bytes."""
    header, raw = {}, b''
    for name, tensor in tensors.items():
        content = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        header[name] = dict(dtype={torch.float32: 'F32', torch.bfloat16: 'BF16'}[tensor.dtype],
                            shape=list(tensor.shape), data_offsets=[len(raw), len(raw) + len(content)])
        raw += content
    header = json.dumps(header).encode()
    path.write_bytes(len(header).to_bytes(8, 'little') + header + raw)

def llama_tensors(dtype=torch.float32):
    torch.manual_seed(0)
    shapes = {'model.embed_tokens': (97, 32), 'model.norm': (32,), 'lm_head': (97, 32)}
    for j in range(2):
        for part, shape in (('input_layernorm', (32,)), ('post_attention_layernorm', (32,)), ('self_attn.q_proj', (32, 32)),
                            ('self_attn.k_proj', (16, 32)), ('self_attn.v_proj', (16, 32)), ('self_attn.o_proj', (32, 32)),
                            ('mlp.gate_proj', (40, 32)), ('mlp.up_proj', (40, 32)), ('mlp.down_proj', (32, 40))):
            shapes[f'model.layers.{j}.{part}'] = shape
    return {f'{name}.weight': torch.randn(shape).to(dtype) for name, shape in shapes.items()}

def llama_folder(folder, tensors=None, **changes):
    folder.mkdir(exist_ok=True, parents=True)
    (folder / 'config.json').write_text(json.dumps({**LLAMA, **changes}))
    write_safetensors(folder / 'model.safetensors', tensors or llama_tensors())
    return str(folder)

def against_transformers(theirs, folder, **how):
    for weight in theirs.parameters():              # amplified, as trained ones are
        weight.data = 3 * weight.data if weight.dim() == 2 else weight.data + 0.1 * torch.randn(weight.shape)
    theirs.eval().save_pretrained(folder, **how)
    ours = GPT.from_pretrained(str(folder)).eval()
    idx = torch.randint(theirs.config.vocab_size, (2, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want, got = theirs(idx).logits, ours.lm_head(ours.hidden(idx))
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()
    theirs.generation_config.eos_token_id = None    # no token ends a text
    greedy = theirs.generate(idx[:, :5], attention_mask=torch.ones(2, 5), max_new_tokens=40, do_sample=False, pad_token_id=0)
    assert torch.equal(ours.generate(idx[:, :5], 40, temperature=0), greedy)

@pytest.mark.parametrize('options', [{}, dict(n_inner=50, layer_norm_epsilon=1e-3), dict(tie_word_embeddings=False)], ids=str)
def test_gpt2_of_transformers(options, tmp_path):
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    against_transformers(transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=97, n_positions=64, n_embd=32, n_layer=3, n_head=4, eos_token_id=96, bos_token_id=96, **options)), tmp_path)

@pytest.mark.parametrize('options', [
    dict(num_key_value_heads=2), dict(num_key_value_heads=8, tie_word_embeddings=True),         # SmolLM2's 135M and 1.7B
    dict(num_key_value_heads=1, rope_parameters=dict(rope_type='default', rope_theta=130000.0), rms_norm_eps=1e-3),
], ids=str)
def test_llama_of_transformers(options, tmp_path):
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    against_transformers(transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=100, num_hidden_layers=3, num_attention_heads=8,
        max_position_embeddings=64, **options)), tmp_path, max_shard_size='60KB')               # several files, an index
    assert (tmp_path / 'model.safetensors.index.json').exists()

def test_from_the_hub(site, tmp_path, monkeypatch):                     # noqa: F811
    """Downloaded once, in bfloat16 and in two shards, from a server of this machine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HF_ENDPOINT', site.url)
    name = 'HuggingFaceTB/SmolLM2-135M'
    tensors = llama_tensors(torch.bfloat16)
    names, files = list(tensors), {}
    for i, part in enumerate((names[:9], names[9:])):
        write_safetensors(tmp_path / 'part', {n: tensors[n] for n in part})
        files[f'{i}.safetensors'] = (tmp_path / 'part').read_bytes()
    index = dict(weight_map={n: f'{int(i >= 9)}.safetensors' for i, n in enumerate(names)})
    files.update({'config.json': json.dumps(LLAMA).encode(), 'model.safetensors.index.json': json.dumps(index).encode()})
    site.files = {f'/{name}/resolve/main/{file}': content for file, content in files.items()}
    model = GPT.from_pretrained(name, scheme='leapfrog', h=0.25)
    assert model.config.scheme == 'leapfrog' and model.config.h == 0.25
    block = model.transformer.h[1]
    assert torch.equal(block.attn.c_attn.weight, torch.cat([tensors[f'model.layers.1.self_attn.{x}_proj.weight']
                                                            for x in 'qkv']).float())
    assert torch.equal(block.mlp.c_fc.weight[:40], tensors['model.layers.1.mlp.gate_proj.weight'].float())
    assert torch.equal(model.lm_head.weight, tensors['lm_head.weight'].float())
    monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')         # nobody there
    for file in (tmp_path / 'weights' / name).glob('*safetensors*'):
        file.unlink()
    write_safetensors(tmp_path / 'weights' / name / 'model.safetensors', tensors)
    GPT.from_pretrained(name)                       # all of it is here: no network is needed
    with pytest.raises(ValueError, match='do not fit a model with'):
        GPT.from_pretrained(name, n_layer=1)

def test_any_model_of_the_hub_with_a_token_if_it_needs_one(site, tmp_path, monkeypatch):          # noqa: F811
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HF_ENDPOINT', site.url)
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'nothing'))
    monkeypatch.delenv('HF_TOKEN', raising=False)
    llama_folder(tmp_path / 'model')
    site.files = {f'/some.one/their-model/resolve/main/{path.name}': path.read_bytes() for path in (tmp_path / 'model').iterdir()}
    site.refused = list(site.files)
    with pytest.raises(ValueError, match='set HF_TOKEN to a token that may read it'):
        GPT.from_pretrained('some.one/their-model')
    monkeypatch.setenv('HF_TOKEN', 'secret')
    model = GPT.from_pretrained('some.one/their-model')
    assert torch.equal(model.lm_head.weight, llama_tensors()['lm_head.weight']) and set(site.tokens) == {'Bearer secret'}
    with pytest.raises(ValueError, match='some.one/other is no folder here, and on the hub it has no config.json'):
        GPT.from_pretrained('some.one/other')
    for wrong in ('../secret', 'a/../b', '/etc/passwd', 'a/b/c'):
        with pytest.raises(ValueError, match='neither a folder nor a model of the hub'):
            GPT.from_pretrained(wrong)

def test_files_of_the_hubs_own_cache_are_used_where_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')         # nobody there
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'home'))
    kept = tmp_path / 'home' / 'hub' / 'models--some--model'
    (kept / 'refs').mkdir(parents=True)
    (kept / 'refs' / 'main').write_text('abc123')
    (kept / 'snapshots').mkdir()
    llama_folder(kept / 'snapshots' / 'abc123')
    assert torch.equal(GPT.from_pretrained('some/model').lm_head.weight, llama_tensors()['lm_head.weight'])
    assert not (tmp_path / 'weights').exists()

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
print(status('VmHWM') - before, sum(w.nbytes for w in model.parameters()), max(w.nbytes for w in model.parameters()))
"""

@pytest.mark.skipif(not os.path.exists('/proc/self/clear_refs'), reason='peak resident memory is read from Linux /proc')
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_loading_takes_the_memory_of_the_weights_and_of_one_more_tensor(tmp_path, dtype):
    small = llama_folder(tmp_path / 'small')
    large = {name: torch.zeros(*[16 * n for n in tensor.shape], dtype=dtype) for name, tensor in llama_tensors().items()}
    large = llama_folder(tmp_path / 'large', large, vocab_size=16 * 97, hidden_size=512, intermediate_size=640)
    output = subprocess.run([sys.executable, '-c', PEAK, small, large], check=True, capture_output=True, text=True,
                            cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__)))).stdout
    peak, weights, largest = map(int, output.split())
    assert weights < peak < weights + largest + 3e6         # Linux counts to a megabyte or two

def test_nanogpt(tmp_path):
    ours = GPT(GPTConfig(block_size=32, vocab_size=97, n_layer=2, n_head=2, n_embd=32, bias=False, scheme='standard'))
    args = dict(n_layer=2, n_head=2, n_embd=32, block_size=32, bias=False, vocab_size=97, dropout=0.0)
    weights = {f'_orig_mod.{name}': weight for name, weight in ours.state_dict().items()}
    weights['transformer.h.0.attn.bias'] = torch.ones(1, 1, 32, 32)     # a buffer, without flash attention
    torch.save(dict(model=weights, model_args=args, iter_num=7, config={}), tmp_path / 'ckpt.pt')
    model = GPT.from_pretrained(str(tmp_path / 'ckpt.pt'), block_size=16, scheme='midpoint')
    assert torch.equal(model.transformer.wpe.weight, ours.transformer.wpe.weight[:16])
    for name, weight in model.state_dict().items():
        assert 'wpe' in name or torch.equal(weight, ours.state_dict()[name])
    same_tokens('ckpt.pt', build(str(tmp_path / 'ckpt.pt'))[1], 'data', dict(encoding='bytes'))     # it does not say
    weights['extra'] = torch.ones(1)
    torch.save(dict(model=weights, model_args=args), tmp_path / 'ckpt.pt')
    with pytest.raises(ValueError, match='has a tensor extra which'):
        GPT.from_pretrained(str(tmp_path / 'ckpt.pt'))
    content = bytearray((tmp_path / 'ckpt.pt').read_bytes())
    content[content.index(weights['_orig_mod.lm_head.weight'].numpy().tobytes()) + 100] ^= 1        # torch reads no checksums
    (tmp_path / 'ckpt.pt').write_bytes(content)
    with pytest.raises(ValueError, match='ckpt.pt is damaged, cut off, or not a checkpoint of these scripts'):
        GPT.from_pretrained(str(tmp_path / 'ckpt.pt'))

@pytest.mark.parametrize('change, words', [
    (lambda c: c['model'].pop('lm_head.weight'), 'has no tensor lm_head.weight'), (lambda c: c['config'].update(colour=3), 'has a field colour of the config'),
    (lambda c: c['model'].update(more=torch.ones(1)), 'has a tensor more which'), (lambda c: c.update(meta=None), 'is damaged, cut off, or not'),
    (lambda c: c['config'].update(n_embd=64), 'has shape'), (lambda c: c['config'].update(n_layer='2'), "n_layer = '2' must be a whole number")])
def test_a_checkpoint_that_does_not_fit_itself_is_a_sentence(tmp_path, change, words):
    path, _ = written(tmp_path, GPT2_LIKE)
    change(checkpoint := torch.load(path))
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=words):
        build(path)

BAD = {
    'an architecture': (dict(model_type='mamba'), {}, "the architecture 'mamba' is not supported"),
    'rope scaling': (dict(rope_scaling=dict(type='linear', factor=2.0)), {}, 'rope_scaling ='),
    'rope scaling, as of transformers 5': (dict(rope_parameters=dict(rope_type='yarn')), {}, "rope scaling of type 'yarn'"),
    'a bias': (dict(attention_bias=True), {}, 'attention_bias = True is not supported'),
    'wide heads': (dict(head_dim=64), {}, 'head_dim = 64 is not supported'),
    'a missing tensor': ({}, {'model.norm.weight': None}, 'has no tensor norm.weight'),
    'an extra tensor': ({}, {'model.extra.weight': torch.zeros(3)}, 'has a tensor extra.weight which'),
    'a wrong shape': ({}, {'model.norm.weight': torch.zeros(31)}, 'norm.weight has shape (31,)'),
    'a wrong shape of a part': ({}, {'model.layers.0.self_attn.k_proj.weight': torch.zeros(16, 31)},
                                'layers.0.self_attn.k_proj.weight has shape (16, 31), and config.json says (16, 32)'),
    'shapes that add up': ({}, {'model.layers.0.self_attn.k_proj.weight': torch.zeros(20, 32),
                                'model.layers.0.self_attn.v_proj.weight': torch.zeros(12, 32)}, 'k_proj.weight has shape (20'),
    'rope scaling, of an older name': (dict(rope_parameters=dict(type='linear', factor=2)), {}, "scaling of type 'linear'"),
    'a size in quotes': (dict(num_hidden_layers='2'), {}, "n_layer = '2' must be a whole number"),
    'rope parameters in a list': (dict(rope_parameters=[1]), {}, 'a size is 0, or not a number'),
    'a rope that turns nothing': (dict(rope_theta=0), {}, 'a rope_theta above 0, not 0.0'),
    'no heads': (dict(num_attention_heads=0), {}, 'a size is 0, or not a number'),
    'a config that lacks': (dict(hidden_size=None), {}, "lacks 'hidden_size'"),
}

@pytest.mark.parametrize('case', BAD)
def test_a_model_that_does_not_fit_is_refused_in_a_sentence(case, tmp_path):
    changes, tensors, words = BAD[case]
    folder = llama_folder(tmp_path / 'model', {name: tensor for name, tensor in {**llama_tensors(), **tensors}.items()
                                               if tensor is not None}, **changes)
    if None in changes.values():
        config = {name: value for name, value in LLAMA.items() if name not in changes}
        (tmp_path / 'model' / 'config.json').write_text(json.dumps(config))
    with pytest.raises(ValueError) as error:
        GPT.from_pretrained(folder)
    assert words in str(error.value) and '\n' not in str(error.value)

def test_files_that_are_damaged_are_refused_in_a_sentence(tmp_path):
    folder = llama_folder(tmp_path / 'model')
    path = tmp_path / 'model' / 'model.safetensors'
    content = path.read_bytes()
    for damaged in (content[:-1], content[:100], content[:5], b'', content + b'0', b'x' * 500):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match='model.safetensors is cut off, or not a safetensors file'):
            GPT.from_pretrained(folder)
    path.unlink()
    with pytest.raises(ValueError, match='has no model.safetensors'):
        GPT.from_pretrained(folder)
    (tmp_path / 'model' / 'model.safetensors.index.json').write_text('{"weight_map": []}')
    with pytest.raises(ValueError, match='index.json is damaged'):
        GPT.from_pretrained(folder)
    (tmp_path / 'model' / 'config.json').write_text('{')
    with pytest.raises(ValueError, match='config.json is damaged'):
        GPT.from_pretrained(folder)
    with pytest.raises(ValueError, match='neither a folder nor a model of the hub'):
        GPT.from_pretrained('gpt5')
    (tmp_path / 'ckpt.pt').write_bytes(content)
    with pytest.raises(ValueError, match='is damaged, cut off, or not a checkpoint'):
        GPT.from_pretrained(str(tmp_path / 'ckpt.pt'))
    torch.save(dict(model_args={}), tmp_path / 'ckpt.pt')
    with pytest.raises(ValueError, match='is damaged, cut off, or not a checkpoint'):
        GPT.from_pretrained(str(tmp_path / 'ckpt.pt'))

def test_text_in_the_tokens_of_a_llama(tmp_path):
    tokenizers = pytest.importorskip('tokenizers')
    folder = llama_folder(tmp_path / 'model')
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({'<unk>': 0, 'to': 1, 'be': 2, 'or': 3}, unk_token='<unk>'))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.enable_truncation(3)
    words.save(str(tmp_path / 'model' / 'tokenizer.json'))
    (tmp_path / 'text.txt').write_text('to be or ' * 10)
    prepare_text([str(tmp_path / 'text.txt')], folder, tmp_path)
    assert np.fromfile(tmp_path / 'train.bin', np.uint8).tolist() == [1, 2, 3] * 9
    assert np.fromfile(tmp_path / 'val.bin', np.uint8).tolist() == [1, 2, 3]
    meta = json.loads((tmp_path / 'meta.json').read_text())
    encode, decode = tokenizer(meta)
    assert decode(encode('be to')) == 'be to'
    same_tokens('model', build(folder)[1], 'data', meta)
    same_tokens('model', build(folder)[1], 'data', dict(meta, model=f'{folder}/'))      # the same folder
    with pytest.raises(ValueError, match='encode the data with the tokenizer of the model'):
        same_tokens('model', build(folder)[1], 'data', dict(encoding='gpt2'))
    with pytest.raises(SystemExit, match='No such file'):
        prepare_text([str(tmp_path / 'none.txt')], folder, tmp_path)

@pytest.mark.parametrize('last, encoding', [('Ġgazed', 'gpt2'), ('ordenador', 'tokenizer.json'), (None, 'gpt2')])
def test_a_gpt2_may_have_tokens_of_its_own(tmp_path, last, encoding):
    (tmp_path / 'config.json').write_text(json.dumps(dict(model_type='gpt2', n_layer=1, n_head=1, n_embd=8, n_positions=8, vocab_size=50257)))
    if last:
        (tmp_path / 'tokenizer.json').write_text(json.dumps(dict(model=dict(type='BPE', vocab={last: 50255}))))
    assert tokens_of(str(tmp_path))['encoding'] == encoding

def test_a_question_in_the_models_own_template(tmp_path):
    transformers = pytest.importorskip('transformers')
    tokenizers = pytest.importorskip('tokenizers')
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({'<unk>': 0, '<s>': 1}, unk_token='<unk>'))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token='<unk>', bos_token='<s>')
    theirs.chat_template = ('{{ bos_token }}{% for message in messages %}\n    {% if message.role == "user" %}\n[{{ message.role }}] '
                            '{{ message.content }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}[answer]\n{% endif %}')
    theirs.save_pretrained(tmp_path)
    wanted = theirs.apply_chat_template([dict(role='user', content='to be?')], tokenize=False, add_generation_prompt=True)
    meta = dict(encoding='tokenizer.json', model=str(tmp_path))
    assert '<s>' in wanted and 'to be?' in wanted and conversation(meta, 'to be?') == wanted
    (tmp_path / 'chat_template.jinja').write_text("{{ ''.__class__.__mro__ }}")         # a way out of the sandbox
    with pytest.raises(ValueError, match='the chat template of .* fails'):
        conversation(meta, 'to be?')
    with pytest.raises(ValueError, match='the model has no chat template: leave --chat out'):
        conversation(dict(encoding='gpt2'), 'to be?')

def written(folder, config, encoding=dict(encoding='bytes', vocab_size=256), vocab_size=97):
    """A checkpoint with random weights, amplified as trained ones are; and the model."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=vocab_size, n_layer=3, n_head=4, n_embd=32, **config)).eval()
    for weight in model.parameters():
        weight.data = 3 * weight.data if weight.dim() == 2 else weight.data + 0.1 * torch.randn(weight.shape)
    save_checkpoint([str(folder / 'best.pt')], dict(model=model.state_dict(), config=vars(model.config), meta=encoding))
    return str(folder / 'best.pt'), model

GPT2_LIKE = dict(scheme='standard')
LLAMA_LIKE = dict(scheme='standard', norm='rmsnorm', mlp='swiglu', bias=False, rope_theta=5000.0, n_inner=40, norm_eps=1e-4)

@pytest.mark.parametrize('config', [
    GPT2_LIKE, dict(GPT2_LIKE, bias=False), dict(GPT2_LIKE, tied=False, n_inner=50, norm_eps=1e-3), dict(scheme='midpoint_a', a='bdia'),
    LLAMA_LIKE, dict(LLAMA_LIKE, n_kv_head=2, tied=False), dict(LLAMA_LIKE, scheme='midpoint_a', a='bdia', n_kv_head=1)], ids=str)
def test_transformers_reads_what_is_written(config, tmp_path):
    transformers = pytest.importorskip('transformers')
    path, ours = written(tmp_path, config)
    export(path, str(tmp_path / 'folder'))
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'folder', output_loading_info=True)
    assert not any(report[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
    again = GPT.from_pretrained(str(tmp_path / 'folder')).eval()
    idx = torch.randint(97, (2, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = ours.lm_head(ours.hidden(idx))
        assert (theirs.eval()(idx).logits - want).abs().max() <= 1e-5 * want.abs().max()
        assert (again.lm_head(again.hidden(idx)) - want).abs().max() <= 1e-5 * want.abs().max()
    assert again.config.block_size == 64 and again.config.tied == ours.config.tied and again.config.scheme == 'standard'

def test_its_tokenizer_goes_along(tmp_path, monkeypatch):
    tokenizers = pytest.importorskip('tokenizers')
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    folder = llama_folder(tmp_path / 'model', eos_token_id=[3, 5], bos_token_id=1)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({'<unk>': 0, 'to': 1, 'be': 2, 'or': 3}, unk_token='<unk>'))
    words.save(str(tmp_path / 'model' / 'tokenizer.json'))
    path, _ = written(tmp_path, LLAMA_LIKE, dict(encoding='tokenizer.json', model=folder, vocab_size=97))
    export(path, str(tmp_path / 'folder'))
    model, meta = build(str(tmp_path / 'folder'))
    assert ends_of_text(meta) == [3, 5] and tokenizer(meta)[0]('be') == [2]
    transformers = pytest.importorskip('transformers')
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / 'folder')('be')['input_ids'] == [2]
    assert transformers.AutoConfig.from_pretrained(tmp_path / 'folder').bos_token_id == 1

def test_gpt2s_tokenizer_goes_along_too(tmp_path):
    path, _ = written(tmp_path, GPT2_LIKE, dict(encoding='gpt2', vocab_size=50257), vocab_size=50257)
    assert "take AutoTokenizer.from_pretrained('gpt2')" in export(path, str(tmp_path / 'one'))
    (tmp_path / 'one' / 'tokenizer.json').write_text('{"Ġgazed": 50255}')
    assert export(str(tmp_path / 'one'), str(tmp_path / 'two')).endswith('two is written')
    assert (tmp_path / 'two' / 'tokenizer.json').read_text() == '{"Ġgazed": 50255}'

@pytest.mark.parametrize('encoding', [dict(encoding='bytes', vocab_size=256), dict(encoding='chars', chars=['a', 'b'], vocab_size=2)], ids=str)
def test_tokens_that_no_library_has_are_those_of_before(tmp_path, encoding):
    path, _ = written(tmp_path, GPT2_LIKE, encoding)
    export(path, str(tmp_path / 'folder'))
    assert build(str(tmp_path / 'folder'))[1] == encoding
    (tmp_path / 'folder' / 'meta.json').unlink()
    with pytest.raises(ValueError, match='the model does not say how its text became tokens'):
        tokenizer(build(str(tmp_path / 'folder'))[1])

def test_nothing_that_is_there_is_overwritten(tmp_path):
    path, _ = written(tmp_path, GPT2_LIKE)
    before = (tmp_path / 'best.pt').read_bytes()
    for target in (path, str(tmp_path)):
        with pytest.raises(ValueError, match='exists already: choose another name, or delete it'):
            export(path, target)
    assert (tmp_path / 'best.pt').read_bytes() == before and os.listdir(tmp_path) == ['best.pt']
    export(path, str(tmp_path / 'new' / 'ckpt.pt'))

def test_without_a_network_the_files_that_are_here_will_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    with pytest.raises(ValueError, match='weights/some/model/config.json is not there, and HF_HUB_OFFLINE=1 forbids downloading it'):
        build('some/model')
    llama_folder(tmp_path / 'weights' / 'some' / 'model')
    assert build('some/model')[1]['model'] == 'some/model'

def test_nanogpt_reads_what_is_written(tmp_path):
    """Its train.py and sample.py take these two keys of ckpt.pt; the names of the weights are ours."""
    path, ours = written(tmp_path, dict(GPT2_LIKE, bias=False), dict(encoding='gpt2', vocab_size=50257))
    export(path, str(tmp_path / 'ckpt.pt'))
    nano = torch.load(tmp_path / 'ckpt.pt', weights_only=True)
    assert nano['model_args'] == dict(n_layer=3, n_head=4, n_embd=32, block_size=64, bias=False, vocab_size=97, dropout=0.0)
    assert {'iter_num', 'best_val_loss', 'config'} < nano.keys() and nano['model'].keys() == ours.state_dict().keys()
    assert nano['model']['lm_head.weight'].data_ptr() == nano['model']['transformer.wte.weight'].data_ptr()     # one matrix, once in the file
    again = GPT.from_pretrained(str(tmp_path / 'ckpt.pt'))
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in ours.state_dict().items())

@pytest.mark.parametrize('config, target, words', [
    (dict(scheme='leapfrog'), 'folder', 'is of scheme leapfrog, which no other program computes'),
    (dict(scheme='midpoint_a', a=-0.5), 'ckpt.pt', 'is of scheme midpoint_a'),
    (dict(GPT2_LIKE, norm='rmsnorm'), 'folder', 'mixes features of GPT-2 and Llama'),
    (dict(LLAMA_LIKE, bias=True), 'folder', 'mixes features of GPT-2 and Llama'),
    (LLAMA_LIKE, 'ckpt.pt', "is not of nanoGPT's architecture"), (dict(GPT2_LIKE, tied=False), 'ckpt.pt', "is not of nanoGPT's")], ids=str)
def test_what_nobody_reads_is_not_written(tmp_path, config, target, words):
    path, _ = written(tmp_path, config)
    with pytest.raises(ValueError, match=words):
        export(path, str(tmp_path / target))
    assert not (tmp_path / target).exists()
