"""
Weights and tokenizers of pretrained models: where they are found, and which of their tensors are which of ours.

    model = GPT.from_pretrained('gpt2')                                 # also gpt2-medium, gpt2-large, gpt2-xl
    model = GPT.from_pretrained('HuggingFaceTB/SmolLM2-135M')           # -360M, -1.7B
    model = GPT.from_pretrained('TinyLlama/TinyLlama-1.1B-Chat-v1.0')   # and the other TinyLlama 1.1B releases
    model = GPT.from_pretrained('some/folder')                          # as transformers' save_pretrained writes it
    model = GPT.from_pretrained('ckpt.pt', scheme='leapfrog', h=0.25)   # of nanoGPT; fields of GPTConfig to change

Downloads go to the folder weights/, from https://huggingface.co or whatever the environment's HF_ENDPOINT says. What is
wrong with a model is said in one ValueError; a download that fails ends the program (SystemExit).
"""
import json
import os
import sys

import requests
import torch

from data.download import download, gpt2_encoding
from model import GPT, GPTConfig, load_checkpoint

# -----------------------------------------------------------------------------
# from a name to its files

def find(name, file):
    """The path of a model's file, in its folder or downloaded into weights/; None if the model has no such file."""
    if os.path.isdir(name):
        path = os.path.join(name, file)
        return path if os.path.exists(path) else None
    if name in ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl'):
        name = f'openai-community/{name}'
    if not name.startswith(('openai-community/gpt2', 'TinyLlama/TinyLlama-1.1B', 'HuggingFaceTB/SmolLM2-')):
        raise ValueError(f"'{name}' is neither a folder nor a model known here: gpt2, gpt2-medium, gpt2-large, gpt2-xl, "
                         'TinyLlama/TinyLlama-1.1B..., HuggingFaceTB/SmolLM2-135M, -360M or -1.7B')
    path = os.path.join('weights', *name.split('/'), file)
    if not os.path.exists(path):
        url = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/')}/{name}/resolve/main/{file}"
        try:
            if requests.head(url, allow_redirects=True, timeout=30).status_code == 404:
                return None
        except requests.RequestException as error:
            sys.exit(f'cannot reach {url} ({type(error).__name__}): check the connection and run the command again')
        download(url, path)
    return path

def need(name, file):
    path = find(name, file)
    if path is None:
        raise ValueError(f'{name} has no {file}')
    return path

def read_json(path):
    with open(path, encoding='utf-8') as file:
        try:
            return json.load(file)
        except ValueError:
            raise ValueError(f'{path} is damaged: delete it and fetch it again') from None

# -----------------------------------------------------------------------------
# files of weights

DTYPES = {'F64': torch.float64, 'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16, 'I64': torch.int64,
          'U8': torch.uint8, 'BOOL': torch.bool}

def read_safetensors(path):
    """Name -> tensor. The format: 8 bytes with the length of a JSON header, the header, and the tensors' raw bytes."""
    size = os.path.getsize(path)
    with open(path, 'rb') as file:
        length = int.from_bytes(file.read(8), 'little')
        try:
            header = json.loads(file.read(length)) if 8 + length <= size else None
            header.pop('__metadata__', None)
            whole = size == 8 + length + max(entry['data_offsets'][1] for entry in header.values())
        except (ValueError, AttributeError, TypeError, KeyError):
            raise ValueError(f'{path} is no safetensors file, or cut off: download it again') from None
        if not whole:
            raise ValueError(f'{path} has {size} bytes, which is not what its header says: download it again')
        tensors = {}
        for name, entry in header.items():
            if entry['dtype'] not in DTYPES:
                raise ValueError(f"{path}: {name} is of the unknown type {entry['dtype']}")
            start, end = entry['data_offsets']
            file.seek(8 + length + start)
            raw = torch.frombuffer(bytearray(file.read(end - start)), dtype=DTYPES[entry['dtype']])
            tensors[name] = raw.view(entry['shape'])
    return tensors

def read_weights(name):
    """All tensors of a model, from one file or from the shards of an index."""
    index = find(name, 'model.safetensors.index.json')
    files = sorted(set(read_json(index)['weight_map'].values())) if index else ['model.safetensors']
    tensors = {}
    for file in files:
        tensors.update(read_safetensors(need(name, file)))
    return tensors

# -----------------------------------------------------------------------------
# from their names to ours: of a name between dots, those whose tensors are laid one under the other

GPT2 = {'transformer.wte': ['wte'], 'transformer.wpe': ['wpe'], 'transformer.ln_f': ['ln_f'], 'lm_head': ['lm_head'],
        **{part: [part] for part in ('ln_1', 'attn.c_attn', 'attn.c_proj', 'ln_2', 'mlp.c_fc', 'mlp.c_proj')}}
LLAMA = {'transformer.wte': ['embed_tokens'], 'transformer.ln_f': ['norm'], 'lm_head': ['lm_head'],
         'ln_1': ['input_layernorm'], 'attn.c_proj': ['self_attn.o_proj'],
         'attn.c_attn': ['self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj'],
         'ln_2': ['post_attention_layernorm'], 'mlp.c_proj': ['mlp.down_proj'],
         'mlp.c_fc': ['mlp.gate_proj', 'mlp.up_proj']}
FAMILIES = {'gpt2': (GPT2, 'h'), 'llama': (LLAMA, 'layers')}
# buffers that older versions of transformers saved with the weights
BUFFERS = '.attn.bias', '.attn.masked_bias', '.rotary_emb.inv_freq'

def shapes(config):
    """Our names and shapes of the weights of this config."""
    with torch.device('meta'):
        return {name: weight.shape for name, weight in GPT(GPTConfig(**config)).state_dict().items()}

def rename(theirs, family, config, where):
    """Our state dict, from the tensors of a family. Every one of ours is found in the right shape, none is left over."""
    table, layers = FAMILIES[family]
    theirs = {name.removeprefix('transformer.').removeprefix('model.'): tensor for name, tensor in theirs.items()
              if not name.endswith(BUFFERS)}
    ours, used = {}, set()
    for name, shape in shapes(config).items():
        part, kind = name.rsplit('.', 1)
        prefix = ''
        if part.startswith('transformer.h.'):
            _, _, layer, part = part.split('.', 3)
            prefix = f'{layers}.{layer}.'
        sources = [f'{prefix}{source}.{kind}' for source in table[part]]
        if name == 'lm_head.weight' and config['tied']:
            used.update(sources)                    # there or not: it is the embedding
            sources = [f"{table['transformer.wte'][0]}.weight"]
        for source in sources:
            if source not in theirs:
                raise ValueError(f'{where} has no tensor {source}')
        used.update(sources)
        tensor = torch.cat([theirs[source].float() for source in sources])
        if family == 'gpt2' and '.h.' in name and tensor.dim() == 2:
            tensor = tensor.t()                     # OpenAI's Conv1D keeps its matrices as (in, out)
        if tensor.shape != shape:
            raise ValueError(f'{where}: {sources[0]} has shape {tuple(tensor.shape)}, and config.json says {tuple(shape)}')
        ours[name] = tensor
    for name in theirs:
        if name not in used:
            raise ValueError(f'{where} has a tensor {name} which this architecture does not use')
    return ours

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
            rope = theirs.get('rope_parameters') or {}          # where transformers 5 writes what 4 wrote beside it
            must('hidden_act', 'silu')
            must('attention_bias', False)
            must('mlp_bias', False)
            must('rope_scaling', None)
            must('head_dim', theirs['hidden_size'] // theirs['num_attention_heads'], None)
            if rope.get('rope_type', 'default') != 'default':
                raise ValueError(f"{where}: rope scaling of type {rope['rope_type']!r} is not supported")
            return family, dict(
                block_size=theirs['max_position_embeddings'], vocab_size=theirs['vocab_size'],
                n_layer=theirs['num_hidden_layers'], n_head=theirs['num_attention_heads'], n_embd=theirs['hidden_size'],
                n_inner=theirs['intermediate_size'], n_kv_head=theirs.get('num_key_value_heads'),
                norm_eps=theirs.get('rms_norm_eps', 1e-6), tied=theirs.get('tie_word_embeddings', False),
                rope_theta=float(rope.get('rope_theta') or theirs.get('rope_theta', 10000.0)),
                norm='rmsnorm', mlp='swiglu', bias=False, scheme='standard')
    except KeyError as error:
        raise ValueError(f'{where} lacks {error}') from None
    raise ValueError(f'{where}: the architecture {family!r} is not supported, only gpt2 and llama')

def load(name):
    """(fields of GPTConfig, state dict, how its text became tokens) of a name, a folder or a checkpoint."""
    if name.endswith('.pt'):
        return load_checkpoint_of_any(name)
    path = need(name, 'config.json')
    family, config = config_of(read_json(path), path)
    return config, rename(read_weights(name), family, config, name), tokens_of(name)

def load_checkpoint_of_any(path):
    """As load(), of a checkpoint of train.py, of retrofit.py or of nanoGPT."""
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
        nano = 'model_args' in checkpoint
    except Exception:
        nano = False                            # load_checkpoint() says what is wrong
    if not nano:
        checkpoint = load_checkpoint(path)
        return checkpoint['config'], checkpoint['model'], checkpoint['meta']
    config, weights = dict(checkpoint['model_args'], scheme='standard'), checkpoint['model']
    weights = {name.removeprefix('_orig_mod.'): tensor for name, tensor in weights.items()}     # of a compiled model
    for name, shape in shapes(config).items():
        if name not in weights:
            raise ValueError(f'{path} has no tensor {name}')
        if weights[name].shape != shape:
            raise ValueError(f'{path}: {name} has shape {tuple(weights[name].shape)}, not {tuple(shape)}')
    return config, weights, dict(encoding='gpt2', vocab_size=50257)     # as of all its data sets but the characters

def build(name, **overrides):
    """(model, how its text became tokens) of a name, a folder or a checkpoint, with fields of GPTConfig to change."""
    config, weights, meta = load(name)
    model = GPT(GPTConfig(**{**config, **overrides}))
    if 'transformer.wpe.weight' in weights:     # learned positions may be cut to a shorter context
        weights['transformer.wpe.weight'] = weights['transformer.wpe.weight'][:model.config.block_size]
    model.load_state_dict(weights)
    return model, meta

# -----------------------------------------------------------------------------
# tokens

def tokens_of(name):
    """How text becomes tokens for a pretrained model, as meta.json says it of a data set."""
    path = need(name, 'config.json')
    family, config = config_of(read_json(path), path)
    if family == 'gpt2':
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
        own = tokenizers.Tokenizer.from_file(need(meta['model'], 'tokenizer.json'))
        return lambda text: own.encode(text).ids, own.decode
    gpt2 = gpt2_encoding()
    return lambda text: gpt2.encode(text, allowed_special='all'), gpt2.decode

def same_tokens(name, one, other_name, other):
    """ValueError unless both metas say that text became tokens in the same way."""
    for key in ('encoding', 'chars', 'model'):
        if one.get(key) != other.get(key):
            raise ValueError(f"{name} reads tokens of {key} {one.get(key)!r}, and {other_name} has {other.get(key)!r}: "
                             'encode the data with the tokenizer of the model')
