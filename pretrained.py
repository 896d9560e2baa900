"""
Weights and tokenizers of pretrained models: where they are found, and how their tensors map to ours.

    model = from_pretrained('gpt2')                                 # also gpt2-medium, gpt2-large, gpt2-xl
    model = from_pretrained('HuggingFaceTB/SmolLM2-135M')           # any GPT-2 or Llama of the hub
    model = from_pretrained('some/folder')                          # as transformers writes it
    model = from_pretrained('ckpt.pt', scheme='leapfrog', h=0.25)   # nanoGPT's or ours; fields of GPTConfig

Files in the cache of the Hugging Face hub (HF_HOME) are used where they are. Others are downloaded, to
weights/, from https://huggingface.co or HF_ENDPOINT, with HF_TOKEN if it is set, unless HF_HUB_OFFLINE=1.
"""
import hashlib
import json
import math
import os
import re
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment        # torch brings it along

from data.download import download, gpt2_encoding, read_text
from model import GPT, GPTConfig, step_sizes
from runtime import fill, load_checkpoint, read_meta, say, shard

def find(name, *files, needed=True):
    """The path of the first of these files that a model has, here or on the hub; None if it has none."""
    places = [Path(name)]
    if not places[0].is_dir():
        name = re.sub('^gpt2(-medium|-large|-xl)?$', r'openai-community/\g<0>', name)
        if places[0].exists() or not re.fullmatch(r'\w[\w.-]*/\w[\w.-]*', name):
            raise ValueError(f"'{name}' is neither a folder nor a model of the hub: give organization/name")
        home = Path(os.environ.get('XDG_CACHE_HOME', '~/.cache'), 'huggingface')
        hub = os.environ.get('HF_HUB_CACHE', Path(os.environ.get('HF_HOME', home), 'hub'))
        newest = Path(hub, f"models--{name.replace('/', '--')}/refs/main").expanduser()
        snapshot = newest.read_text().strip() if newest.is_file() else 'none'
        places = [Path('weights', name), newest.parents[1] / 'snapshots' / snapshot]
    for path in [place / file for file in files for place in places]:
        if path.exists():
            return path
    host = os.environ.get('HF_ENDPOINT', 'https://huggingface.co')
    # a cache of the hub has what its library wanted: other files are not looked for, as it may be offline
    complete = len(places) == 2 and not needed and (places[1] / 'config.json').exists()
    online = len(places) == 2 and not complete and os.environ.get('HF_HUB_OFFLINE') != '1'
    for file in files if online else ():
        try:
            download(f'{host}/{name}/resolve/main/{file}', places[0] / file, token=os.environ.get('HF_TOKEN'))
            return places[0] / file
        except ValueError as error:
            if 'status 404' not in str(error):
                advice = 'without one set HF_HUB_OFFLINE=1; a private or gated model needs HF_TOKEN'
                raise ValueError(f'{error}; {advice}') from None
    if needed:
        raise ValueError(f'{places[0]} has no {files[-1]}: check the name, and whether HF_HUB_OFFLINE is set')

@contextmanager
def sound(what):
    """Around code that reads this: damage may raise anything, and becomes one sentence."""
    try:
        yield
    except OSError:                         # of a file that cannot be read now, which may be whole
        raise
    except Exception as error:
        reason = str(error).partition('\n')[0]
        raise ValueError(f'{what} cannot be read ({reason}): fetch it again, or use another model') from None

def read_json(path):
    with sound(path):
        return dict(json.loads(path.read_bytes()))

def read_weights(name):
    """Name -> tensor, mapped from its file: using it loads it into memory, and deleting it frees that."""
    files = ['model.safetensors']
    path = find(name, *files, 'model.safetensors.index.json')
    if path.suffix == '.json':
        with sound(path):                       # .name: a path might leave the folder
            files = {Path(file).name for file in json.loads(path.read_bytes())['weight_map'].values()}
    tensors = {}
    for path in [find(name, file) for file in files]:
        with sound(path), open(path, 'rb') as file:
            length = int.from_bytes(file.read(8), 'little')     # of the JSON header, which the tensors follow
            header = json.loads(file.read(length))
            header = {key: x for key, x in header.items() if not key.endswith(('__metadata__', *BUFFERS))}
            foreign = {x['dtype'] for x in header.values()} - DTYPES.keys()
            for key in header if not foreign else ():
                start, end = header[key]['data_offsets']
                content = torch.from_numpy(np.memmap(file, np.uint8, 'c', 8 + length + start, end - start))
                tensors[key] = content.view(DTYPES[header[key]['dtype']]).view(header[key]['shape'])
        if foreign:
            raise ValueError(f'{path} has tensors of {min(foreign)}, as quantized models have: use the model '
                             'that was quantized')
    return tensors

# -----------------------------------------------------------------------------
# from their models to ours. Our names are nanoGPT's, and but for a prefix those of GPT-2

DTYPES = dict(F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16, U8=torch.uint8)
LLAMA = {'h.': 'layers.', 'wte': 'embed_tokens', 'ln_f': 'norm', 'ln_1': 'input_layernorm',
         'ln_2': 'post_attention_layernorm', '.attn.': '.self_attn.', 'self_attn.c_proj': 'self_attn.o_proj',
         'mlp.c_proj': 'mlp.down_proj'}
STACKED = dict(c_attn=('q_proj', 'k_proj', 'v_proj'), c_fc=('gate_proj', 'up_proj'))
PREFIX = re.compile(r'^((_orig_mod|module)\.)*(transformer\.|model\.)?')      # compiled, or in a DDP
BUFFERS = '.attn.bias', '.attn.masked_bias', '.rotary_emb.inv_freq'     # in files of older versions
FIELDS = 'block_size vocab_size n_layer n_head n_embd n_inner norm_eps tied n_kv_head rope_theta'.split()
THEIRS = dict(                                  # names of these fields in config.json
    gpt2='n_positions vocab_size n_layer n_head n_embd n_inner layer_norm_epsilon tie_word_embeddings',
    llama='max_position_embeddings vocab_size num_hidden_layers num_attention_heads hidden_size '
          'intermediate_size rms_norm_eps tie_word_embeddings num_key_value_heads rope_theta')
OPENAI = dict(encoding='gpt2', vocab_size=50257)        # the meta of their tokens
OPENAI_SHA256 = '82d484ef560b28771489fef813b6815e19c204e503103af020aa2467f0d62ce5'
OPENAI_NAMES = r'(openai-community/)?gpt2(-medium|-large|-xl)?'
GELU = dict(gelu_new='tanh', gelu_pytorch_tanh='tanh', gelu='erf')

def tensors_of(model, family):
    """Yields (name of a tensor of theirs, our weight that has it, the rows there, whether it is turned)."""
    attn = model.transformer.h[0].attn
    rows = dict(c_attn=[n * attn.hs for n in attn.heads], c_fc=[model.config.n_inner] * 2)
    for name, weight in model.named_parameters():
        name = PREFIX.sub('', name)             # such as h.3.attn.c_attn.weight
        if family == 'llama':
            for ours, theirs in LLAMA.items():
                name = name.replace(ours, theirs)
            part = name.split('.')[-2]
            first = 0
            for source, n in zip(STACKED.get(part, [part]), rows.get(part, [len(weight)])):
                yield name.replace(part, source), weight, slice(first, first + n), False
                first += n
        else:                                   # OpenAI's matrices are (in, out)
            turned = family == 'gpt2' and name.startswith('h.') and weight.dim() == 2
            yield name, weight, slice(0, len(weight)), turned

def read_config(name):
    """(family, fields of GPTConfig) of a model's config.json. ValueError for what model.py cannot compute."""
    theirs = read_json(find(name, 'config.json'))
    with sound(f'the config.json of {name}'):
        family = theirs['model_type']
        scaling = theirs.get('rope_scaling') or {}              # of transformers 4
        rope = theirs.get('rope_parameters') or {}              # of transformers 5, which reads both
        theirs = dict(n_inner=None, num_key_value_heads=None, rope_theta=1e4, activation_function='gelu_new',
                      tie_word_embeddings=family == 'gpt2') | theirs | scaling | rope
        kinds = {x.get('rope_type', x.get('type', 'default')) for x in (scaling, rope)} - {'default'}
        theirs['rope_type'] = max(kinds, default='default')
        only = dict(scale_attn_weights=[True], scale_attn_by_inverse_layer_idx=[False], rope_type=['default'],
                    hidden_act=['silu', 'swish'], activation_function=list(GELU))
        other = {key: theirs[key] for key in only if key in theirs and theirs[key] not in only[key]}
        supported = family in THEIRS and not other
        if supported:
            config = {ours: theirs[key] for ours, key in zip(FIELDS, THEIRS[family].split())}
    if not supported:
        raise ValueError(f'{name}: {family} {other} is not supported, use another model')
    if family == 'llama':
        return family, dict(config, norm='rmsnorm', mlp='swiglu', bias=False, scheme='standard')
    return family, dict(config, gelu=GELU[theirs['activation_function']], scheme='standard')

def is_checkpoint(name):
    return Path(name).is_file() or name.endswith('.pt') and not Path(name).is_dir()

def load(name):
    """(fields of GPTConfig, (family, tensors), how text became tokens) of a model of any kind."""
    if is_checkpoint(name):
        checkpoint = load_checkpoint(name, ('model', 'config'))
        family = 'nanogpt'
        tensors = checkpoint['model']
        if 'model_args' in checkpoint:          # of nanoGPT
            config = dict(checkpoint['model_args'], scheme='standard', gelu='erf')
            meta = tokens_of_nanogpt(config['vocab_size'], checkpoint['config'].get('dataset') or 'NAME')
        else:                                   # of ours. Older ones do not say that they have these
            config = dict(gelu='tanh') | checkpoint['config'] | dict(stored_layers=None)
            if config['scheme'] != 'standard':
                config.setdefault('state_bits', 64)
            meta = checkpoint['meta']
    else:
        family, config = read_config(name)
        tensors = read_weights(name)
        meta = tokens_of(name)
    tensors = {PREFIX.sub('', key): tensor for key, tensor in tensors.items() if not key.endswith(BUFFERS)}
    if config.get('tied', True) and 'lm_head.weight' in tensors:        # a file may have one of the two, or
        head = tensors['lm_head.weight']                                # both, and these need not be equal
        embedding = 'embed_tokens.weight' if family == 'llama' else 'wte.weight'
        config['tied'] = torch.equal(tensors.setdefault(embedding, head), head)
    return config, (family, tensors), meta

def empty(config, here=None):
    """A GPT whose weights are not set yet, on the device; with --shard, this process's part of it."""
    with torch.device('meta'):                  # no memory yet, and no random weights
        model = GPT(config)
    if here and here.mesh:
        shard(model, here)
    else:
        model.to_empty(device=here.device if here else 'cpu')
    if model.config.tied:                       # there are two of them now
        model.lm_head.weight = model.transformer.wte.weight
    return model

def new(config, here):
    """GPT(config) on the device; with --shard, this process's part of it, with the same random numbers."""
    if not here.mesh:
        return GPT(config).to(here.device)
    model = empty(config, here)
    for name, weight in model.named_parameters(remove_duplicate=False):
        if 'wte' in name or 'wpe' in name:      # what torch draws when GPT() makes its parts
            torch.empty(weight.shape).normal_()
        elif 'ln_' not in name:
            torch.empty(weight.shape).uniform_()
    for name, weight in model.named_parameters():
        fill(weight, model.initialize(name, torch.empty(weight.shape)))
    return model

def build(name, here=None, **overrides):
    """(model, how its text became tokens) of what load() takes, with fields of GPTConfig to change."""
    config, (family, tensors), meta = load(name)
    model = empty(GPTConfig(**{**config, **overrides}), here)
    if model.config.tied:
        tensors.pop('lm_head.weight', None)
    for source, weight, rows, turned in tensors_of(model, family):
        part = tensors.pop(source, torch.empty(0))      # in memory are the model, and one of these at a time
        part = part.t() if turned and part.dim() == 2 else part
        if source == 'wpe.weight':
            part = part[rows]
        shape = rows.stop - rows.start, *weight.shape[1:]
        if part.shape != shape:
            shape = shape[::-1] if turned else shape
            raise ValueError(f'{name} has no tensor {source} of shape {shape}: use another model')
        fill(weight, part, rows.start)
    if tensors:
        raise ValueError(f'{name} has a tensor {min(tensors)}, but its config has not: use another model')
    return model, meta

def from_pretrained(name, **overrides):
    """A GPT with the weights of what load() takes: a name on the hub, a folder, a checkpoint."""
    return build(name, **overrides)[0]

def reversible(config, scheme='midpoint_a', a=None, h=None):
    """The GPTConfig of a reversible net with the weights of a standard one, whose config this is."""
    config = replace(config, scheme=scheme, a=a, h=h, stored_layers=None)
    if config.a == 'random':
        raise ValueError('midpoint_a of a trained model needs its a: give --bits=4, or --a=-0.0625')
    if scheme == 'midpoint_a' and h is None:
        a = config.per_layer('a')
        return replace(config, a=a, h=step_sizes(a))
    return config

def as_standard(config):
    """The GPTConfig of the standard net with the same weights: midpoint_a is near to it if h is 'once'."""
    if config.scheme == 'standard':
        return config
    if config.scheme != 'midpoint_a' or config.h != step_sizes(config.per_layer('a')):
        raise ValueError(f"{config.scheme} is near no standard net: only midpoint_a with h = 'once' is, as "
                         "train.py --bits, --h=once and retrofit.py have it")
    return replace(config, scheme='standard', a=None, h=None, stored_layers=None)

def landed(config, departure, left):
    """
    The GPTConfig of midpoint_a with left times the |a| of its departure, 1 / 256 at least, and at most what
    it has. It is rounded to n / 2^k with n up to 8: so it can be undone, a step needs few bits more than the
    one before, and n * v stays in its range. A standard net stays as it is.
    """
    if config.scheme == 'standard':
        return config

    def lowered(x, first):
        size = max(abs(first) * left, 1 / 256)
        grid = max(2.0**(math.ceil(math.log2(size)) - 3), 1 / 256)
        return math.copysign(min(abs(x), round(size / grid) * grid), x)

    first = replace(config, a=departure).per_layer('a')
    return replace(config, a=list(map(lowered, config.per_layer('a'), first)), h='once')

@torch.no_grad()
def fit_range(model, idx, here):
    """Fractional bits that let the states of these tokens (B, T) use an eighth of their range at most."""
    config = model.config
    model.config = replace(config, state_bits=64, fractional_bits=20)       # the range is wide enough for all
    model.largest = 0.0
    with here.autocast:
        model(idx)
    largest = float(model.largest) * 2.0**(63 - 20)
    if not math.isfinite(largest):
        raise ValueError('a weight of the model is not finite: use another model')
    bits = config.state_bits - 1 - math.ceil(math.log2(8 * largest + 1))
    model.config = replace(config, fractional_bits=max(0, min(bits, config.fractional_bits)))
    say(f'the largest state is {largest:.4g}: states get {model.config.fractional_bits} fractional bits')

def chosen(knobs):
    """The GPTConfig of the model init_from, made reversible where scheme, a or bits say so."""
    config = GPTConfig(**load(knobs.init_from)[0])
    a = knobs.a if knobs.bits is None else -1 / 2**knobs.bits
    scheme = knobs.scheme or ('standard' if a is None else 'midpoint_a')
    if config.scheme == 'standard' != scheme:
        return reversible(config, scheme, a, knobs.h)
    if knobs.bits is not None:
        raise ValueError(f'{knobs.init_from} keeps its scheme, {config.scheme}: leave bits out')
    return config

# -----------------------------------------------------------------------------
# tokens

def tokens_of(name):
    """How text becomes tokens for a model, as meta.json says it of a data set."""
    if is_checkpoint(name):
        return load(name)[2]
    if re.fullmatch(OPENAI_NAMES, name) and not Path(name).is_dir():
        return OPENAI
    family, config = read_config(name)
    if Path(name, 'meta.json').exists():        # of export.py
        return read_json(Path(name, 'meta.json'))
    if family == 'gpt2':
        own = find(name, 'tokenizer.json', needed=False)
        if not own:
            return dict(encoding='unknown', advice='save its tokenizer.json there, with transformers')
        if config['vocab_size'] >= 50257 and openais(own) and ends_of(name) in ([], [50256]):
            return OPENAI
    return dict(encoding='tokenizer.json', model=Path(name).as_posix(), vocab_size=config['vocab_size'])

def openais(path):
    """Whether a tokenizer.json is GPT-2's own: its vocabulary, merges and end of text, and nothing else."""
    end = dict(id=50256, content='<|endoftext|>', lstrip=False, rstrip=False)
    with sound(path):
        content = json.loads(path.read_bytes())
        model, before, after = (content.get(x) or {} for x in ('model', 'pre_tokenizer', 'post_processor'))
        kinds = model['type'], before.get('type'), after.get('type', 'ByteLevel'), content.get('normalizer')
        added = [{key: token[key] for key in end} for token in content['added_tokens']]
        if kinds != ('BPE', 'ByteLevel', 'ByteLevel', None) or before['add_prefix_space'] or added != [end]:
            return False
        merges = [merge if isinstance(merge, str) else ' '.join(merge) for merge in model['merges']]
        tokens = sorted(model['vocab'].keys() - {end['content']}, key=model['vocab'].get)
        return hashlib.sha256(json.dumps([tokens, merges]).encode()).hexdigest() == OPENAI_SHA256

def tokens_of_nanogpt(vocab_size, dataset):
    """nanoGPT names its data, whose folder has the characters, and pads GPT-2's tokens to 50304."""
    meta = read_meta(Path('data', dataset))
    if meta.get('encoding') == 'chars' and meta['vocab_size'] == vocab_size:
        return meta
    if vocab_size in (50257, 50304):
        return OPENAI
    return dict(encoding='unknown', advice=f"copy nanoGPT's folder data/{dataset}, with meta.pkl, to data/")

def tokenizer(meta):
    """(text -> tokens, tokens -> text), as a data set was encoded; meta is its meta.json."""
    if meta['encoding'] == 'bytes':
        return (lambda text, special=True: list(text.encode(errors='surrogateescape')),
                lambda tokens: bytes(tokens).decode(errors='replace'))
    if meta['encoding'] == 'chars':
        ids = {c: i for i, c in enumerate(meta['chars'])}
        def encode(text, special=True):
            for c in sorted(set(text) - ids.keys()):
                raise ValueError(f"the model has no token for {c!r}, only for {meta['chars']!r}")
            return [ids[c] for c in text]
        return encode, lambda tokens: ''.join(meta['chars'][i] for i in tokens)
    if meta['encoding'] == 'tokenizer.json':
        path = find(meta['model'], 'tokenizer.json')
        if not find_spec('tokenizers'):         # nothing else needs it
            raise ValueError(f"the tokenizer of {meta['model']} needs a package: pip install tokenizers")
        import tokenizers
        read_json(path)
        try:
            own = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:              # it has no other kind
            raise ValueError(f'tokenizers {tokenizers.__version__} cannot read {path} ({error}): '
                             'pip install -U tokenizers, or fetch the file again') from None
        own.no_truncation()                     # which fine-tuning scripts leave behind
        own.no_padding()
        def encode(text, special=True):
            tokens = own.encode(text, add_special_tokens=special).ids
            last = max(tokens, default=0)
            if last >= meta['vocab_size']:
                raise ValueError(f"{own.id_to_token(last)!r} is token {last}, and the model has only "
                                 f"{meta['vocab_size']}: take it out of the text")
            return tokens
        return encode, own.decode
    if meta['encoding'] != 'gpt2':
        raise ValueError('the model does not say how its text became tokens: '
                         + meta.get('advice', 'use another model'))
    gpt2 = gpt2_encoding()
    return lambda text, special=True: gpt2.encode(text, allowed_special='all'), gpt2.decode

def conversation(meta, question):
    """The text that asks a chat model a question, in its own template, up to where its answer begins."""
    if 'model' not in meta:
        raise ValueError('the model has no chat template: leave --chat out')
    settings = read_json(find(meta['model'], 'tokenizer_config.json'))
    template = settings.get('chat_template') or read_text(find(meta['model'], 'chat_template.jinja'))
    older = find(meta['model'], 'special_tokens_map.json', needed=False)
    settings = (read_json(older) if older else {}) | settings
    own = {key: value.get('content') if isinstance(value, dict) else value for key, value in settings.items()
           if value is not None}
    with sound('the chat template'):            # a stranger's program: hence a sandbox
        chat = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(template)
        return chat.render(messages=[dict(role='user', content=question)], add_generation_prompt=True, **own)

def ends_of(name):
    paths = [find(name, f'{file}.json', needed=False) for file in ('generation_config', 'config')]
    ends = [read_json(path).get('eos_token_id') for path in filter(None, paths)]    # a chat model has several
    end = next((end for end in ends if end is not None), [])
    return end if isinstance(end, list) else [end]

def ends_of_text(meta):
    """The tokens, if there are any, that say that a text has ended."""
    if meta['encoding'] == 'tokenizer.json':
        return ends_of(meta['model'])
    return [50256] if meta['encoding'] == 'gpt2' else []

def same_tokens(name, one, other_name, other):
    """ValueError unless both metas say that text became tokens in the same way."""
    for key in ('encoding', 'chars', 'model') if one['encoding'] != 'unknown' else ():
        if one.get(key) != other.get(key):
            raise ValueError(f'{name} and {other_name} differ in {key}: encode the data with its tokenizer')

def turn_weights(model):
    """For sampling on a CPU: stores tall matrices by column, which makes a matrix-vector product faster."""
    for weight in model.parameters():
        if weight.dim() == 2 and weight.size(0) > weight.size(1):
            weight.data = weight.data.t().contiguous().t()
