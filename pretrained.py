"""
Weights and tokenizers of pretrained models: where they are found, and how their tensors map to ours.

    model = GPT.from_pretrained('gpt2')                                 # also gpt2-medium, gpt2-large, gpt2-xl
    model = GPT.from_pretrained('HuggingFaceTB/SmolLM2-135M')           # any organization/name whose model is a GPT-2 or
                                                                        # a Llama, such as TinyLlama/TinyLlama-1.1B-Chat-v1.0
    model = GPT.from_pretrained('some/folder')                          # as transformers' save_pretrained writes it
    model = GPT.from_pretrained('ckpt.pt', scheme='leapfrog', h=0.25)   # of nanoGPT; fields of GPTConfig to change

    python pretrained.py out/best.pt some/folder                        # the way back: a folder for transformers,
    python pretrained.py out/best.pt ckpt.pt                            # or for nanoGPT's sample.py, of a standard model

Files in the cache of the Hugging Face hub (HF_HOME) are used where they are. Downloads go to the folder weights/. They come from
https://huggingface.co or whatever the environment's HF_ENDPOINT says. HF_TOKEN is used if it is set. With HF_HUB_OFFLINE=1 nothing is
downloaded. A problem with a model raises one ValueError; a download that fails ends the program (SystemExit).
"""
import json
import math
import os
import re
import shutil
import sys
import tempfile
from dataclasses import asdict, replace
from functools import partial

import numpy as np
import requests
import torch
from jinja2 import TemplateError                # torch brings it along
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data.download import download, gpt2_encoding, in_a_sentence, publish, write_atomically
from model import GPT, GPTConfig
from runtime import OURS, load_checkpoint, save_checkpoint

# -----------------------------------------------------------------------------
# from a name to its files

def local(name, file):
    """Where a file of a model is, or will be when it has been downloaded."""
    if os.path.isdir(name):
        return os.path.join(name, file)
    path = os.path.join('weights', *hub_name(name).split('/'), file)
    cached = in_the_hubs_cache(name, file)
    return cached if cached and not os.path.exists(path) else path

def in_the_hubs_cache(name, file):
    """Where the package huggingface_hub has put this file, in its newest version; None if it has not."""
    home = os.environ.get('HF_HOME') or os.path.join('~', '.cache', 'huggingface')
    folder = os.path.join(os.path.expanduser(home), 'hub', f"models--{hub_name(name).replace('/', '--')}")
    if os.path.isfile(main := os.path.join(folder, 'refs', 'main')):
        with open(main) as ref:
            path = os.path.join(folder, 'snapshots', ref.read().strip(), file)
        return path if os.path.exists(path) else None

def hub_name(name):
    if name in ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl'):
        name = f'openai-community/{name}'
    if not re.fullmatch(r'\w[\w.-]*/\w[\w.-]*', name):
        raise ValueError(f"'{name}' is neither a folder nor a model of the hub: give organization/name, such as "
                         'HuggingFaceTB/SmolLM2-135M, or gpt2, gpt2-medium, gpt2-large or gpt2-xl')
    return name

def offline():
    return os.environ.get('HF_HUB_OFFLINE', '').lower() in ('1', 'true', 'yes', 'on')

def find(name, file):
    """The path of a model's file, in its folder or downloaded into weights/; None if the model has no such file."""
    path = local(name, file)
    if not os.path.exists(path):
        if os.path.isdir(name) or offline():
            return None
        host = os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/')
        url, token = f'{host}/{hub_name(name)}/resolve/main/{file}', os.environ.get('HF_TOKEN')
        try:
            status = requests.head(url, headers={'Authorization': f'Bearer {token}'} if token else {}, allow_redirects=True,
                                   timeout=30).status_code
        except requests.RequestException as error:
            sys.exit(f'cannot reach {url} ({type(error).__name__}): check the connection and run the command again, or set '
                     'HF_HUB_OFFLINE=1 to use only the files that are here')
        if status == 404:
            return None
        if status in (401, 403):                # the hub also answers this for models that do not exist
            raise ValueError(f'{name} is no folder here, and the hub shows no such model: check the name; if the model is '
                             'private or gated, set HF_TOKEN to a token that may read it')
        download(url, path, token=token)
    return path

def need(name, file):
    path = find(name, file)
    if path is None:
        raise ValueError(f'{name} has no {file}' if os.path.isdir(name) else
                         f'{local(name, file)} is not there, and HF_HUB_OFFLINE=1 forbids downloading it' if offline() else
                         f'{name} is no folder here, and on the hub it has no {file}')
    return path

def read_json(path):
    with open(path, encoding='utf-8') as file:
        try:
            return dict(json.load(file))
        except (ValueError, TypeError, RecursionError):
            raise ValueError(f'{path} is damaged: delete it and fetch it again') from None

# -----------------------------------------------------------------------------
# files of weights

DTYPES = {'F64': torch.float64, 'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16, 'I64': torch.int64,
          'U8': torch.uint8, 'BOOL': torch.bool}

def read_safetensors(path):
    """
    Name -> (shape, a function that reads the tensor), so that one is in memory at a time. The format: 8 bytes with the
    length of a JSON header, the header, and the tensors' raw bytes. Read here, not by the library safetensors: that saves a package,
    and a damaged file gives one sentence.
    """
    def read(start, n, dtype, shape):
        return torch.from_numpy(np.fromfile(path, np.uint8, n, offset=start)).view(dtype).view(shape)

    size, tensors = os.path.getsize(path), {}
    with open(path, 'rb') as file:
        length = int.from_bytes(file.read(8), 'little')
        try:
            header = json.loads(file.read(length)) if 8 + length <= size else None
            header.pop('__metadata__', None)
            if size != 8 + length + max(entry['data_offsets'][1] for entry in header.values()):
                raise ValueError
            for name, entry in header.items():
                (start, end), dtype, shape = entry['data_offsets'], DTYPES[entry['dtype']], torch.Size(entry['shape'])
                if not type(start) is type(end) is int or start < 0 or end - start != shape.numel() * dtype.itemsize:
                    raise ValueError
                tensors[name] = shape, partial(read, 8 + length + start, end - start, dtype, shape)
        except (ValueError, AttributeError, TypeError, KeyError, RuntimeError, RecursionError):
            raise ValueError(f'{path} is cut off, or not a safetensors file: delete it and fetch it again') from None
    return tensors

def read_weights(name):
    """As read_safetensors(), from one file or from the shards of an index."""
    files = ['model.safetensors']
    if not os.path.exists(local(name, files[0])) and (index := find(name, 'model.safetensors.index.json')):
        shards = read_json(index).get('weight_map')
        # refuse a path that leaves the folder
        if not isinstance(shards, dict) or not all(isinstance(file, str) and re.fullmatch(r'\w[\w.-]*', file) for file in shards.values()):
            raise ValueError(f'{index} is damaged: delete it and fetch it again')
        files = sorted(set(shards.values()))
    tensors = {}
    for file in files:
        tensors.update(read_safetensors(need(name, file)))
    return tensors

# -----------------------------------------------------------------------------
# our names -> theirs; the tensors of several are stacked in this order to make ours

GPT2 = {'transformer.wte': ['wte'], 'transformer.wpe': ['wpe'], 'transformer.ln_f': ['ln_f'], 'lm_head': ['lm_head'],
        **{part: [part] for part in ('ln_1', 'attn.c_attn', 'attn.c_proj', 'ln_2', 'mlp.c_fc', 'mlp.c_proj')}}
LLAMA = {'transformer.wte': ['embed_tokens'], 'transformer.ln_f': ['norm'], 'lm_head': ['lm_head'],
         'ln_1': ['input_layernorm'], 'attn.c_proj': ['self_attn.o_proj'],
         'attn.c_attn': ['self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj'],
         'ln_2': ['post_attention_layernorm'], 'mlp.c_proj': ['mlp.down_proj'],
         'mlp.c_fc': ['mlp.gate_proj', 'mlp.up_proj']}
FAMILIES = {'gpt2': (GPT2, 'h'), 'llama': (LLAMA, 'layers')}
NANOGPTS = {'model', 'model_args'}          # dicts in its checkpoints
# buffers that older versions of transformers saved with the weights
BUFFERS = '.attn.bias', '.attn.masked_bias', '.rotary_emb.inv_freq'

def shapes(config):
    """Our names and shapes of the weights of this config."""
    with torch.device('meta'):
        return {name: weight.shape for name, weight in GPT(GPTConfig(**config)).state_dict().items()}

def layout(family, config):
    """
    For each of our weights: (our name, its shape, [(their name, rows)] of its parts, which are stacked in this order,
    whether they keep it transposed).
    """
    table, layers = FAMILIES[family]
    hs = config['n_embd'] // config['n_head']
    rows = {'self_attn.q_proj': config['n_embd'], 'self_attn.k_proj': (config.get('n_kv_head') or config['n_head']) * hs,
            'mlp.gate_proj': config['n_inner'], 'mlp.up_proj': config['n_inner']}       # of the parts of a fused matrix
    rows['self_attn.v_proj'] = rows['self_attn.k_proj']
    for name, shape in shapes(config).items():
        part, kind = name.rsplit('.', 1)
        prefix = ''
        if part.startswith('transformer.h.'):
            _, _, layer, part = part.split('.', 3)
            prefix = f'{layers}.{layer}.'
        sources = table['transformer.wte' if part == 'lm_head' and config['tied'] else part]
        yield (name, shape, [(f'{prefix}{source}.{kind}', rows.get(source, shape[0])) for source in sources],
               family == 'gpt2' and bool(prefix) and len(shape) == 2)           # OpenAI's Conv1D: (in, out)

def rename(theirs, family, config, where):
    """Our name -> functions that read its parts from a family's tensors. ValueError if one of ours is missing, or one of theirs is left over."""
    theirs = {name.removeprefix('transformer.').removeprefix('model.'): tensor for name, tensor in theirs.items()
              if not name.endswith(BUFFERS)}
    ours, used = {}, {'lm_head.weight'} if config['tied'] else set()            # may be there or not: it equals the embedding
    for name, shape, sources, transposed in layout(family, config):
        ours[name] = []
        for source, rows in sources:
            found, read = theirs.get(source, (None, None))
            wanted = shape[::-1] if transposed else torch.Size((rows, *shape[1:]))
            if found is None:
                raise ValueError(f'{where} has no tensor {source}')
            if found != wanted:
                raise ValueError(f'{where}: {source} has shape {tuple(found)}, and config.json says {tuple(wanted)}')
            used.add(source)
            ours[name].append((lambda read=read: read().t()) if transposed else read)
    nothing_left(theirs.keys() - used, where)
    return ours

def nothing_left(names, where):
    if names:
        raise ValueError(f'{where} has a tensor {min(names)} which this architecture does not use')

# -----------------------------------------------------------------------------
# from their config to ours

def config_of(theirs, where):
    """(family, fields of GPTConfig) of a config.json; ValueError for what model.py does not compute."""
    family = theirs.get('model_type')

    def must(name, *allowed):
        if theirs.get(name, allowed[0]) not in allowed:
            raise ValueError(f'{where}: {name} = {theirs[name]!r} is not supported, only {allowed[0]!r}')

    try:
        if family == 'gpt2':
            must('activation_function', 'gelu_new', 'gelu_pytorch_tanh')
            must('scale_attn_weights', True)
            must('scale_attn_by_inverse_layer_idx', False)
            must('add_cross_attention', False)
            return family, dict(
                block_size=theirs['n_positions'], vocab_size=theirs['vocab_size'], n_layer=theirs['n_layer'],
                n_head=theirs['n_head'], n_embd=theirs['n_embd'], n_inner=theirs.get('n_inner'),
                norm_eps=theirs.get('layer_norm_epsilon', 1e-5), tied=theirs.get('tie_word_embeddings', True),
                bias=True, scheme='standard')
        if family == 'llama':
            rope = theirs.get('rope_parameters') or {}          # transformers 5 writes here what 4 wrote at the top level
            must('hidden_act', 'silu')
            must('attention_bias', False)
            must('mlp_bias', False)
            must('rope_scaling', None)
            must('head_dim', theirs['hidden_size'] // theirs['num_attention_heads'], None)
            kind = rope.get('rope_type', rope.get('type', 'default'))
            if kind != 'default' or 'factor' in rope:
                raise ValueError(f'{where}: rope scaling of type {kind!r} is not supported')
            return family, dict(
                block_size=theirs['max_position_embeddings'], vocab_size=theirs['vocab_size'],
                n_layer=theirs['num_hidden_layers'], n_head=theirs['num_attention_heads'], n_embd=theirs['hidden_size'],
                n_inner=theirs['intermediate_size'], n_kv_head=theirs.get('num_key_value_heads'),
                norm_eps=theirs.get('rms_norm_eps', 1e-6), tied=theirs.get('tie_word_embeddings', False),
                rope_theta=float(rope.get('rope_theta') or theirs.get('rope_theta', 10000.0)),
                norm='rmsnorm', mlp='swiglu', bias=False, scheme='standard')
    except KeyError as error:
        raise ValueError(f'{where} lacks {error}') from None
    except (TypeError, AttributeError, ZeroDivisionError):
        raise ValueError(f'{where}: a size is 0, or not a number') from None
    raise ValueError(f'{where}: the architecture {family!r} is not supported, only gpt2 and llama')

def load(name):
    """(fields of GPTConfig, weights as rename() gives them, how its text became tokens) of a name, a folder or a checkpoint."""
    if name.endswith('.pt'):
        return load_checkpoint_of_any(name)
    path = need(name, 'config.json')
    family, config = config_of(read_json(path), path)
    GPTConfig(**config)                         # complains about sizes that do not go together
    return config, rename(read_weights(name), family, config, name), tokens_of(name)

def load_checkpoint_of_any(path):
    """As load(), of a checkpoint of train.py, of retrofit.py or of nanoGPT."""
    checkpoint = load_checkpoint(path, OURS, NANOGPTS)
    weights = checkpoint['model']
    if OURS <= checkpoint.keys():
        config, meta = checkpoint['config'], checkpoint['meta']
        if config.get('a') == 'bdia':           # which trains a standard model
            config = dict(config, scheme='standard', a=None, stored_layers=None)
    else:
        config = dict(checkpoint['model_args'], scheme='standard')
        weights = {name.removeprefix('_orig_mod.'): tensor for name, tensor in weights.items()      # of a compiled model
                   if not name.endswith(BUFFERS)}
        # nanoGPT's checkpoints do not name the encoding: a vocabulary of this size is GPT-2's
        meta = dict(encoding='gpt2', vocab_size=50257) if config.get('vocab_size') in range(50257, 2**32) else dict(encoding='unknown')
    if unknown := config.keys() - GPTConfig.__dataclass_fields__.keys():
        raise ValueError(f'{path} has a field {min(unknown)} of the config which is not known here')
    try:
        wanted, there = shapes(config), {name: tuple(weight.shape) for name, weight in weights.items()}
    except (TypeError, AttributeError):
        raise ValueError(f'{path} has a config or weights of a wrong type: use another one') from None
    for name, shape in wanted.items():
        if name not in there:
            raise ValueError(f'{path} has no tensor {name}')
        if there[name] != shape:
            raise ValueError(f'{path}: {name} has shape {there[name]}, not {tuple(shape)}')
    nothing_left(there.keys() - wanted.keys(), path)
    return config, one_part_each(weights), meta

def one_part_each(weights):
    return {name: [lambda tensor=tensor: tensor] for name, tensor in weights.items()}

def step_sizes(a):
    """
    h of midpoint(a) for the weights of a standard net, from a of every layer. With d_j = p_{j+1} - p_j a step of the
    recurrence is d_j = -a_j d_{j-1} + h_j f_j, and the last state is p_0 + the sum of all d: so f_j arrives there h_j S_j times,
    where S_j = 1 - a_{j+1} S_{j+1}, and S is 1 in the last layer. In a standard net it arrives once, hence h_j = 1 / S_j.
    Where some a > 0, S_j may come close to 0. Then h = 1 + a, the inverse of S where it no longer changes with j: p' = f(p) again.
    """
    if max(a) > 0:
        return [1 + x for x in a]
    h = [1.0]                                   # of the last layer, then of those before it: S_j = 1 - a_{j+1} / h_{j+1}
    for x in reversed(a[1:]):
        h.append(1 / (1 - x / h[-1]))
    return h[::-1]

def reversible(config, scheme='midpoint_a', a=None, h=None):
    """The GPTConfig of a reversible net with the weights of a standard one, whose config this is."""
    if scheme == 'midpoint_a' and a in (None, 'random'):
        raise ValueError('midpoint_a of a trained model needs to know its a: give --bits=4, or --a=-0.0625')
    if scheme == 'midpoint_a' and h is None and a != 'bdia':
        a = a if isinstance(a, list) else [a] * config.n_layer
        h = step_sizes(a) if all(isinstance(x, (int, float)) for x in a) else None      # None: GPTConfig says what a must be
    return replace(config, scheme=scheme, a=a, h=h, stored_layers=None)

def build(name, **overrides):
    """(model, how its text became tokens) of a name, a folder or a checkpoint, with fields of GPTConfig to change."""
    config, weights, meta = load(name)
    with torch.device('meta'):                  # no memory yet, and no random weights
        model = GPT(GPTConfig(**{**config, **overrides}))
    found = shapes(dict(config, block_size=min(config['block_size'], model.config.block_size)))    # learned positions may be cut
    if found != {key: weight.shape for key, weight in model.state_dict().items()} or GPTConfig(**config).tied != model.config.tied:
        raise ValueError(f'the weights of {name} do not fit a model with {overrides}')
    model.to_empty(device='cpu')
    if model.config.tied:
        model.lm_head.weight = model.transformer.wte.weight
    with torch.no_grad():
        for key, weight in model.named_parameters():
            first = 0
            for read in weights[key]:           # in memory at a time: the model, and one tensor of the source
                part = read()[:len(weight) - first]
                weight[first:first + len(part)] = part
                first += len(part)
    return model, meta

# -----------------------------------------------------------------------------
# from ours to theirs

def export(source, target):
    """
    Writes a standard model, source as for load(), in a form that other programs read: a folder for transformers'
    from_pretrained(), or, if target ends in .pt, a checkpoint for nanoGPT's sample.py, which takes all tokens for GPT-2's. Returns
    a sentence for the user. ValueError if the other program has no such architecture, or target exists. nanoGPT's train.py resumes
    only its own checkpoints. nanoGPT computes GELU exactly, this model by GPT-2's tanh approximation: there the logits agree to 1e-4.
    """
    config, weights, meta = load(source)
    config, target = GPTConfig(**config), os.path.normpath(target)
    if os.path.exists(target):
        raise ValueError(f'{target} exists already: choose another name, or delete it')
    if config.scheme != 'standard':
        raise ValueError(f'{source} is of scheme {config.scheme}, which no other program computes: sample, evaluate and train it here. '
                         "A model trained with --a=bdia is a standard one, and can be written")
    gpt2 = config.norm == 'layernorm' and config.mlp == 'gelu' and config.rope_theta is None and config.n_kv_head == config.n_head
    llama = config.norm == 'rmsnorm' and config.mlp == 'swiglu' and config.rope_theta is not None and not config.bias
    nano = gpt2 and config.tied and config.n_inner == 4 * config.n_embd and config.norm_eps == 1e-5
    if target.endswith('.pt'):
        if not nano:
            raise ValueError(f'{source} is not of nanoGPT\'s architecture: name a folder instead of {target}, for transformers')
        args = {name: getattr(config, name) for name in ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')}
        os.makedirs(os.path.dirname(target) or '.', exist_ok=True)
        save_checkpoint([target], dict(model=build(source)[0].state_dict(), model_args=args, iter_num=0, best_val_loss=math.inf, config={}))
        return f'{target} is written'
    if not gpt2 and not llama:
        raise ValueError(f'{source} mixes features of GPT-2 and Llama: transformers has no such model')
    encoding = meta['encoding']
    own, ends, said = encoding == 'tokenizer.json', {}, f', without a tokenizer: transformers has none for {encoding}'
    files = {}
    if own:
        ends, said = read_json(need(meta['model'], 'config.json')), ''
        need(meta['model'], 'tokenizer.json')
        files = {file: find(meta['model'], file) for file in TOKENIZER}
    elif encoding == 'gpt2' and config.vocab_size >= 50257:
        ends, said = dict(bos_token_id=50256, eos_token_id=50256), ", without a tokenizer: take AutoTokenizer.from_pretrained('gpt2')"
        if os.path.isdir(source) and find(source, 'tokenizer.json'):
            files, said = {file: find(source, file) for file in TOKENIZER}, ''
    kept = dict(vocab_size=config.vocab_size, tie_word_embeddings=config.tied, dtype='float32',
                bos_token_id=ends.get('bos_token_id'), eos_token_id=ends.get('eos_token_id'))
    if gpt2:
        family, prefix = 'gpt2', 'transformer.'
        kept.update(
            model_type='gpt2', architectures=['GPT2LMHeadModel'], n_positions=config.block_size, n_embd=config.n_embd, n_layer=config.n_layer,
            n_head=config.n_head, n_inner=config.n_inner, activation_function='gelu_new', layer_norm_epsilon=config.norm_eps,
            resid_pdrop=config.dropout, embd_pdrop=config.dropout, attn_pdrop=config.dropout)
    else:
        family, prefix = 'llama', 'model.'
        kept.update(
            model_type='llama', architectures=['LlamaForCausalLM'], max_position_embeddings=config.block_size, hidden_size=config.n_embd,
            num_hidden_layers=config.n_layer, num_attention_heads=config.n_head, num_key_value_heads=config.n_kv_head,
            intermediate_size=config.n_inner, hidden_act='silu', rms_norm_eps=config.norm_eps, rope_theta=config.rope_theta)
    # transformers' GPT-2 has biases everywhere: those that ours lacks are 0
    tensors, everything = {}, asdict(replace(config, bias=gpt2))
    for name, shape, sources, transposed in layout(family, everything):
        first = 0
        for their_name, rows in sources:
            if name == 'lm_head.weight' and config.tied:
                continue
            def read(name=name, rows=slice(first, first + rows), shape=(rows, *shape[1:]), transposed=transposed):
                whole = torch.cat([part() for part in weights[name]])[rows].float() if name in weights else torch.zeros(shape)
                return whole.t() if transposed else whole
            tensors[their_name if name == 'lm_head.weight' else prefix + their_name] = (
                shape[::-1] if transposed else (rows, *shape[1:]), read)
            first += rows
    os.makedirs(os.path.dirname(target) or '.', exist_ok=True)
    with tempfile.TemporaryDirectory(dir=os.path.dirname(target) or '.') as folder:
        part = os.path.join(folder, 'part')     # renamed to target when it is complete
        os.mkdir(part)
        write_safetensors(os.path.join(part, 'model.safetensors'), tensors)
        for file, path in files.items():
            if path:
                shutil.copyfile(path, os.path.join(part, file))
        for file, fields in (('config.json', kept), *[('meta.json', meta)] * (not own)):     # meta.json: for tokens_of()
            write_atomically(os.path.join(part, file), json.dumps(fields, indent=2).encode())
        os.replace(part, target)
    return f'{target} is written{said}'

TOKENIZER = 'tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json', 'chat_template.jinja', 'generation_config.json'

def write_safetensors(path, tensors):
    """
    Writes float32 tensors, name -> (shape, a function that reads the tensor): one is in memory at a time, where the library
    safetensors wants them all at once.
    """
    header, end = dict(__metadata__=dict(format='pt')), 0
    for name, (shape, _) in tensors.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = dict(dtype='F32', shape=list(shape), data_offsets=[start, end])
    header = json.dumps(header).encode()
    header += b' ' * (-len(header) % 8)                     # the tensors begin at a multiple of 8
    with open(f'{path}.part', 'wb') as file:
        file.write(len(header).to_bytes(8, 'little') + header)
        for _, read in tensors.values():
            read().contiguous().numpy().tofile(file)
    publish(f'{path}.part', path)

# -----------------------------------------------------------------------------
# tokens

def tokens_of(name):
    """How text becomes tokens for a model, as meta.json says it of a data set."""
    if name.endswith('.pt'):
        return load_checkpoint_of_any(name)[2]
    path = need(name, 'config.json')
    family, config = config_of(read_json(path), path)
    if os.path.exists(path := os.path.join(name, 'meta.json')) and 'encoding' in (meta := read_json(path)):         # of export()
        return meta
    if family == 'gpt2':                        # with a tokenizer of its own, or with OpenAI's, which has the token ' gazed' at 50255
        own = None if not os.path.isdir(name) and hub_name(name).startswith('openai-community/') else find(name, 'tokenizer.json')
        if own is None and config['vocab_size'] < 50257:
            return dict(encoding='unknown')
        if own is None or '"Ġgazed": 50255' in json.dumps(read_json(own), ensure_ascii=False):
            return dict(encoding='gpt2', vocab_size=50257)
    return dict(encoding='tokenizer.json', model=name, vocab_size=config['vocab_size'])

def tokenizer(meta):
    """(text -> tokens, tokens -> text), as a data set was encoded; meta is its meta.json."""
    if meta['encoding'] == 'bytes':
        return lambda text: list(text.encode(errors='surrogateescape')), lambda x: bytes(x).decode(errors='replace')
    if meta['encoding'] == 'chars':
        chars = meta['chars']
        return lambda text: [chars.index(c) for c in text], lambda tokens: ''.join(chars[i] for i in tokens)
    if meta['encoding'] == 'tokenizer.json':    # of a pretrained model
        try:
            import tokenizers
        except ImportError:
            sys.exit(f"the tokenizer of {meta['model']} needs one more package: pip install tokenizers")
        path = need(meta['model'], 'tokenizer.json')
        try:
            own = tokenizers.Tokenizer.from_file(path)
        except Exception:                       # the package raises Exception itself
            raise ValueError(f'{path} is damaged: delete it and fetch it again') from None
        own.no_truncation()                     # which fine-tuning scripts leave behind
        own.no_padding()
        return lambda text: own.encode(text).ids, own.decode
    if meta['encoding'] != 'gpt2':
        raise ValueError('the model does not say how its text became tokens')
    gpt2 = gpt2_encoding()
    return lambda text: gpt2.encode(text, allowed_special='all'), gpt2.decode

def conversation(meta, question):
    """The text that asks a chat model a question, in the model's own template, up to where its answer begins."""
    name = meta.get('model')
    settings = read_json(path) if name and (path := find(name, 'tokenizer_config.json')) else {}
    template = settings.get('chat_template')
    if template is None and name and (path := find(name, 'chat_template.jinja')):
        with open(path, encoding='utf-8') as file:
            template = file.read()
    if not isinstance(template, str):
        raise ValueError('the model has no chat template: leave --chat out')
    tokens = {key: value['content'] if isinstance(value, dict) else value for key, value in settings.items() if key.endswith('_token')}
    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)       # a template is a stranger's program
    try:
        return sandbox.from_string(template).render(messages=[dict(role='user', content=question)], add_generation_prompt=True, **tokens)
    except (TemplateError, TypeError, KeyError) as error:
        raise ValueError(f'the chat template of {name} fails ({error}): leave --chat out') from None

def ends_of_text(meta):
    """The tokens, if there are any, that say a text has ended; meta is as for tokenizer()."""
    if meta['encoding'] == 'tokenizer.json':
        end = read_json(need(meta['model'], 'config.json')).get('eos_token_id')
        return end if isinstance(end, list) else [end]
    return [50256] if meta['encoding'] == 'gpt2' else []

def same_tokens(name, one, other_name, other):
    """ValueError unless both metas say that text became tokens in the same way."""
    def place(value):                           # a folder may be written in more than one way
        return os.path.abspath(value) if isinstance(value, str) and os.path.isdir(value) else value

    for key in ('encoding', 'chars', 'model') if one['encoding'] != 'unknown' else ():
        if place(one.get(key)) != place(other.get(key)):
            raise ValueError(f"{name} reads tokens of {key} {one.get(key)!r}, and {other_name} has {other.get(key)!r}: "
                             'encode the data with the tokenizer of the model')

def turn_weights(model):
    """For sampling on a CPU: stores tall matrices column by column, which makes a matrix-vector product faster."""
    for weight in model.parameters():
        if weight.dim() == 2 and weight.size(0) > weight.size(1):
            weight.data = weight.data.t().contiguous().t()

if __name__ == '__main__':
    if len(sys.argv) != 3:
        sys.exit('give a model and where to write it: python pretrained.py out/best.pt some/folder')
    sys.excepthook = in_a_sentence              # a disk that is full
    try:
        print(export(*sys.argv[1:]))
    except ValueError as error:
        sys.exit(str(error))
