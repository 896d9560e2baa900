"""
What must be true of pretrained.py, retrofit.py and data/text:  python -m pytest test_retrofit.py

Small random models, written here as the public ones are written. Those that compare with transformers and tokenizers
are skipped where these packages are not installed. The conversions' gradients are in test_reversible.py.
"""
import json
import signal
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from data.text.prepare import prepare as prepare_text
import model as model_py
from model import GPT, GPTConfig, load_checkpoint
from pretrained import build, same_tokens, tokenizer
from test_data import site                                              # noqa: F401, a fixture
from test_reversible import L, check_exact
from test_scripts import command, complaint, knobs_of, place, run     # noqa: F401, place is a fixture

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
    folder.mkdir(exist_ok=True)
    (folder / 'config.json').write_text(json.dumps({**LLAMA, **changes}))
    write_safetensors(folder / 'model.safetensors', tensors or llama_tensors())
    return str(folder)

# -----------------------------------------------------------------------------
# the weights of others

def against_transformers(theirs, folder, **how):
    for weight in theirs.parameters():              # amplified, as trained ones are
        weight.data = 3 * weight.data if weight.dim() == 2 else weight.data + 0.1 * torch.randn(weight.shape)
    theirs.eval().save_pretrained(folder, **how)
    ours = GPT.from_pretrained(str(folder)).eval()
    idx = torch.randint(theirs.config.vocab_size, (2, 48))
    with torch.no_grad():
        want, got = theirs(idx).logits, ours.lm_head(ours.hidden(idx))
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()
    greedy = theirs.generate(idx[:, :5], attention_mask=torch.ones(2, 5), max_new_tokens=40, min_new_tokens=40,
                             do_sample=False, pad_token_id=0)
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
    'no heads': (dict(num_attention_heads=0), {}, 'a size is no number, or 0'),
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
        with pytest.raises(ValueError, match='model.safetensors is cut off, or no safetensors file'):
            GPT.from_pretrained(folder)
    path.unlink()
    with pytest.raises(ValueError, match='has no model.safetensors'):
        GPT.from_pretrained(folder)
    (tmp_path / 'model' / 'config.json').write_text('{')
    with pytest.raises(ValueError, match='config.json is damaged'):
        GPT.from_pretrained(folder)
    with pytest.raises(ValueError, match='neither a folder nor a model known here'):
        GPT.from_pretrained('gpt5')
    (tmp_path / 'ckpt.pt').write_bytes(content)
    with pytest.raises(ValueError, match='is damaged, cut off or no checkpoint'):
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
    with pytest.raises(ValueError, match='encode the data with the tokenizer of the model'):
        same_tokens('model', build(folder)[1], 'data', dict(encoding='gpt2'))
    with pytest.raises(SystemExit, match='No such file'):
        prepare_text([str(tmp_path / 'none.txt')], folder, tmp_path)

# -----------------------------------------------------------------------------
# retrofit.py

retrofit = knobs_of('retrofit.py', whole=True)      # its functions; nothing of it has run

def pair():
    """A teacher and a student whose outputs differ."""
    config = GPTConfig(block_size=16, vocab_size=65, n_layer=4, n_head=4, n_embd=32, scheme='standard')
    torch.manual_seed(0)
    teacher, student = GPT(config), GPT(GPTConfig(**{**vars(config), 'scheme': 'midpoint_sum', 'stored_layers': 0}))
    return teacher.requires_grad_(False), student

@pytest.mark.parametrize('t, data_weight', [(1.0, 0.0), (2.0, 0.3)])
def test_chunked_divergence_equals_the_plain_one(t, data_weight):
    idx = torch.randint(65, (3, 17), generator=torch.Generator().manual_seed(1))
    x, y, results = idx[:, :-1], idx[:, 1:], []
    for chunk in (None, 7):
        teacher, student = pair()
        hidden, wanted = student.hidden(x), teacher.lm_head(teacher.hidden(x)).flatten(0, 1)
        if chunk:
            loss = student.loss(hidden, y, chunk, retrofit.distillation(teacher, teacher.hidden(x), y, t, data_weight))
        else:
            logits = student.lm_head(hidden).flatten(0, 1)
            p, q = F.softmax(wanted / t, -1), F.softmax(logits / t, -1)
            kl = (p * (p.log() - q.log())).sum(-1).mean() * t**2
            loss = (1 - data_weight) * kl + data_weight * F.cross_entropy(logits, y.flatten())
        loss.backward()
        results.append((loss.detach(), {name: weight.grad for name, weight in student.named_parameters()}))
    (plain, want), (chunked, got) = results
    assert abs(plain - chunked) <= 1e-5 * plain
    for name in want:
        assert (want[name] - got[name]).norm() <= 1e-5 * want[name].norm(), name

def test_divergence_in_bfloat16_survives_an_offset_of_the_logits():
    """GPT-2's logits lie far below 0, where steps of bfloat16 are coarser than what tuning has to see."""
    teacher, student = pair()
    with torch.no_grad():
        student.lm_head.weight.copy_(teacher.lm_head.weight + 0.01 * torch.randn(65, 32))
    idx = torch.randint(65, (8, 16), generator=torch.Generator().manual_seed(1))
    x = torch.randn(8, 16, 32, generator=torch.Generator().manual_seed(2)) + 4
    losses = []
    for offset, enabled in ((0, False), (-1, False), (-1, True)):       # in every channel: -128 in every logit, or so
        for model in (teacher, student):
            model.lm_head.weight.data += offset
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            losses.append(student.loss(x, idx, 7, retrofit.distillation(teacher, x, idx, 1.0, 0.0)).item())
        for model in (teacher, student):
            model.lm_head.weight.data -= offset
    assert losses[1] == pytest.approx(losses[0], rel=1e-2) and losses[2] == pytest.approx(losses[0], rel=0.1)

def test_no_logits_are_whole_in_memory():
    """At GPT-2's vocabulary, teacher and student both: no tensor is larger than the logits of a chunk."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            largest = max(largest, *(x.numel() for x in torch.utils._pytree.tree_leaves(result)
                                     if isinstance(x, torch.Tensor)), 0)
            return result

    config = GPTConfig(block_size=512, vocab_size=50304, n_layer=2, n_head=2, n_embd=8, scheme='standard')
    teacher, student = GPT(config).requires_grad_(False), GPT(retrofit.converted(config, 'midpoint_a', 1.0, 0))
    idx = torch.randint(50304, (4, 512))
    with Watch():
        hidden = teacher.hidden(idx)
        student(idx, idx, retrofit.distillation(teacher, hidden, idx, 1.0, 0.0))[1].backward()
    assert largest == 1024 * 50304

def test_the_way_to_a():
    knobs = SimpleNamespace(conversion='midpoint_a', bits=0, sign=1, anneal_from=0.25, anneal_part=0.6, max_iters=101)
    way = [retrofit.a_at(step, knobs) for step in range(101)]
    assert way[0] == 0.25 and way == sorted(way) and way[30] == pytest.approx(0.5, abs=1 / 256) and set(way[60:]) == {1.0}
    assert all(a * 256 == round(a * 256) for a in way)
    knobs.bits, knobs.sign = 2, -1
    assert {retrofit.a_at(step, knobs) for step in range(101)} == {-0.25}
    config = GPTConfig(block_size=16, vocab_size=65, n_layer=3, n_head=4, n_embd=32, scheme='standard')
    for a in (1.0, -0.5, 3 / 256):
        student = GPT(retrofit.converted(config, 'midpoint_a', a, 0))
        assert [c for _, _, _, c in student.coefficients] == [1, 1 + a, 1 + a]
    torch.manual_seed(0)
    teacher = GPT(config)
    idx = torch.randint(65, (2, 16))
    for a, close in ((1 / 256, 1e-2), (1 / 4, 1)):      # a path that begins at the teacher
        student = GPT(retrofit.converted(config, 'midpoint_a', a, 0))
        student.load_state_dict(teacher.state_dict())
        difference = (student.hidden(idx) - teacher.hidden(idx)).abs().max()
        assert 0 < difference < close

GPT2_SHAPE = dict(block_size=16, vocab_size=65, n_layer=L, n_head=4, n_embd=32)
LLAMA_SHAPE = dict(GPT2_SHAPE, norm='rmsnorm', mlp='swiglu', n_inner=48, n_kv_head=2, rope_theta=1e4, tied=False,
                   bias=False)

@pytest.mark.parametrize('shape', [GPT2_SHAPE, LLAMA_SHAPE], ids=['gpt2', 'llama'])
@pytest.mark.parametrize('conversion, a', [*[('midpoint_a', a) for a in (1.0, 0.5, -1 / 16, 77 / 256)],
                                           ('midpoint_sum', None), ('symplectic', None), ('leapfrog', None)], ids=str)
def test_students_are_exact(shape, conversion, a):
    """At 0, 1, 4 and, on the way, 8 bits: stored against rebuilt, bit for bit, weights amplified."""
    config = retrofit.converted(GPTConfig(scheme='standard', **shape), conversion, a, 0)
    for dtype in (torch.float32, torch.bfloat16):
        check_exact(model_py, dict(shape, scheme=conversion, a=config.a, h=config.h), dtype, dropout=0.1, amplify=8)

SMALL = dict(dataset='tiny', batch_size=4, gradient_accumulation_steps=2, block_size=16, max_iters=6, warmup_iters=1,
             eval_interval=3, eval_windows=9, log_interval=1, device='cpu', learning_rate=1e-3)
TEACHER = dict(dataset='tiny', batch_size=4, gradient_accumulation_steps=1, block_size=16, n_layer=3, n_head=2, n_embd=16,
               max_iters=4, warmup_iters=1, eval_windows=9, device='cpu', scheme='standard')

@pytest.fixture(scope='module')
def workshop(place):                                                    # noqa: F811
    """A place with a teacher, trained by retrofit.py on the spot, and two students of it."""
    (place / 'teacher.py').write_text(''.join(f'{name} = {value!r}\n' for name, value in TEACHER.items()))
    output = run(place, 'retrofit.py', teacher='taught/best.pt', teacher_config='teacher.py', out_dir='students',
                 bits='[0,1]', **SMALL)
    assert 'training taught/best.pt with teacher.py' in output
    lines = [line.split() for line in output.splitlines() if line.startswith(('teacher', 'midpoint(a), a'))]
    assert [line[-2] for line in lines[1:3]] != lines[0][-1] and len(lines) == 9
    return place

def final(place, path):                                                 # noqa: F811
    return load_checkpoint(str(place / path))

def test_a_stopped_retrofit_resumes_bit_for_bit(workshop):
    flags = dict(SMALL, teacher='taught/best.pt', out_dir='stopped')
    with subprocess.Popen(command('retrofit.py', **flags), cwd=workshop, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if 'step 2: loss' in line:
                process.send_signal(signal.SIGTERM)
            if 'stopped at step' in line:
                break
        else:
            pytest.fail('it was too fast to be stopped')
    assert process.returncode == 0
    run(workshop, 'retrofit.py', **flags, init_from='resume')
    one, other = final(workshop, 'students/midpoint_a_0bit/last.pt'), final(workshop, 'stopped/midpoint_a_0bit/last.pt')
    assert (one['before'], one['after']) == (other['before'], other['after'])
    assert one['config']['a'] == other['config']['a'] == 1.0
    for name, weight in one['model'].items():
        assert torch.equal(weight, other['model'][name]), name
    assert 'seed = 5, but' in complaint(workshop, 'retrofit.py', **flags, init_from='resume', seed=5)

def test_its_checkpoints_are_sampled_and_trained_on_text_of_ones_own(workshop):
    assert run(workshop, 'sample.py', init_from='students/midpoint_a_1bit/last.pt', max_new_tokens=5, prompt='ab')
    (workshop / 'own.txt').write_text('abc cab ' * 50)
    (workshop / 'data' / 'own').mkdir()
    prepare_text([str(workshop / 'own.txt')], str(workshop / 'students' / 'midpoint_a_1bit' / 'last.pt'),
                 workshop / 'data' / 'own')
    assert (workshop / 'data' / 'own' / 'val.bin').read_bytes() == b'abc cab ' * 5
    run(workshop, 'train.py', **dict(TEACHER, scheme='leapfrog', dataset='own'),
        init_from='students/midpoint_a_1bit/last.pt', out_dir='more')
    config = final(workshop, 'more/last.pt')['config']
    assert (config['scheme'], config['a'], config['stored_layers']) == ('midpoint_a', 0.5, 0)

def test_two_processes_retrofit_alike(workshop):
    flags = dict(SMALL, teacher='taught/best.pt', out_dir='two', batch_size=2, gradient_accumulation_steps=4)
    run(workshop, 'retrofit.py', processes=2, **flags)
    one, two = final(workshop, 'students/midpoint_a_0bit/last.pt'), final(workshop, 'two/midpoint_a_0bit/last.pt')
    assert one['after'] == pytest.approx(two['after'], rel=1e-5)

@pytest.mark.parametrize('flags, words', [
    (dict(conversion='magic'), "conversion = 'magic': choose one of midpoint_a"),
    (dict(bits=9), 'bits = 9: give a whole number from 0 to 8'),
    (dict(teacher='none.pt'), 'there is no checkpoint none.pt'),
    (dict(teacher='students/midpoint_a_0bit/last.pt'), 'the teacher must be a standard model'),
    (dict(block_size=17), 'block_size = 17: taught/best.pt sees 16 tokens at most'),
], ids=str)
def test_retrofit_complains_in_a_sentence(workshop, flags, words):
    assert words in complaint(workshop, 'retrofit.py', **{**SMALL, 'teacher': 'taught/best.pt', 'out_dir': 'none', **flags})
