"""
Writes a standard model in a form that other programs read.

    python export.py out/best.pt some/folder        # for from_pretrained() of transformers, and for ours
    python export.py out/best.pt ckpt.pt            # for sample.py of nanoGPT: GPT-2's tokens, or characters
    python export.py out/last.pt some/folder --as_standard=True     # midpoint_a, as the standard net

The model is anything that our from_pretrained() takes. train.py of nanoGPT resumes only its own checkpoints.
"""
import json
import math
import os
import pickle
import shutil
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch

from configurator import explain
from data.download import write_atomically
from pretrained import FIELDS, THEIRS, as_standard, build, find, is_checkpoint, read_json, tensors_of
from runtime import load_checkpoint, open_data, read_meta, save_checkpoint, validation_loss

ARCHITECTURES = dict(gpt2=('transformer.', 'GPT2LMHeadModel'), llama=('model.', 'LlamaForCausalLM'))
TOKENIZER = ['tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json', 'chat_template.jinja',
             'generation_config.json']

def export(source, target, standard=False):
    """Writes the model source to target, a new folder or .pt, and returns a sentence for the user."""
    target = os.path.normpath(target)
    if os.path.exists(target):
        raise ValueError(f'{target} exists already: choose another name, or delete it')
    model, meta = build(source)
    config = model.config
    if standard:
        config = as_standard(config)
        compare_losses(source, model, config, meta)
        model.config = config
    if config.scheme != 'standard':
        advice = 'try --as_standard=True' if config.scheme == 'midpoint_a' else 'use it here'
        raise ValueError(f'no other program computes the scheme {config.scheme} of {source}: {advice}')
    gpt2 = config.norm == 'layernorm' and config.mlp == 'gelu' and config.n_kv_head == config.n_head
    llama = config.norm == 'rmsnorm' and config.mlp == 'swiglu' and not config.bias
    if gpt2 == llama or gpt2 != (config.rope_theta is None):
        raise ValueError(f'{source} mixes features of GPT-2 and Llama: no other program has such a model')
    os.makedirs(os.path.dirname(target) or '.', exist_ok=True)
    if not target.endswith('.pt'):
        return to_transformers(model, meta, source, target)
    if llama or not config.tied or config.n_inner != 4 * config.n_embd or config.norm_eps != 1e-5:
        raise ValueError(f'{source} is no model of nanoGPT: name a folder instead, for transformers')
    names = 'n_layer n_head n_embd block_size bias vocab_size dropout'.split()
    weights = model.state_dict()
    arguments = {name: getattr(config, name) for name in names}
    chars = meta['chars'] if meta['encoding'] == 'chars' else None
    data = Path(target).stem
    if chars:                                   # sample.py draws from all tokens, so padding has to go
        arguments['vocab_size'] = len(chars)
        for name in ('transformer.wte.weight', 'lm_head.weight'):
            weights[name] = weights[name][:len(chars)]
    save_checkpoint([target], dict(model=weights, model_args=arguments, iter_num=0, best_val_loss=math.inf,
                                   config=dict(dataset=data) if chars else {}))
    said = f'{target} is written'
    if config.gelu == 'tanh':
        said += ': nanoGPT computes GELU by erf, not by tanh, so logits agree to 1e-4'
    if chars:
        itos = dict(enumerate(chars))
        theirs = dict(vocab_size=len(itos), itos=itos, stoi={c: i for i, c in itos.items()})
        write_atomically(f'{target}.pkl', pickle.dumps(theirs))
        said += f". nanoGPT's sample.py needs {target}.pkl, with the characters, as its data/{data}/meta.pkl"
    return said

def compare_losses(source, model, standard, meta):
    """Prints the validation loss of the model, and that as this standard net, if its data are here."""
    knobs = load_checkpoint(source, ('model', 'config')).get('knobs', {}) if is_checkpoint(source) else {}
    dataset = knobs.get('dataset', '')
    if read_meta(Path('data', dataset)) != meta:
        return print('the two losses are not compared: the data that it was trained on are not here')
    how = SimpleNamespace(dataset=dataset, block_size=knobs['block_size'], eval_windows=48, batch_size=4)
    here = SimpleNamespace(device=torch.device('cpu'), autocast=nullcontext())
    _, _, data = open_data(how)
    losses = []
    for config in (model.config, standard):
        model.config = config
        losses.append(validation_loss(model, data, how, here))
    print('validation loss on data/{}: {:.4f}, as the standard net {:.4f}'.format(dataset, *losses))

def to_transformers(model, meta, source, target):
    config = model.config
    encoding = meta['encoding']
    home = meta.get('model', source)            # where its tokenizer is, if it has one
    copies = []
    if encoding in ('tokenizer.json', 'gpt2') and not is_checkpoint(home):
        copies = [find(home, file, needed=False) for file in TOKENIZER]
    ends = dict(bos_token_id=50256, eos_token_id=50256) if encoding == 'gpt2' else {}
    if encoding == 'tokenizer.json':
        ends = read_json(find(home, 'config.json'))
    family = 'gpt2' if config.norm == 'layernorm' else 'llama'
    prefix, architecture = ARCHITECTURES[family]
    own = dict(model_type=family, architectures=[architecture], dtype='float32',
               bos_token_id=ends.get('bos_token_id'), eos_token_id=ends.get('eos_token_id'))
    if family == 'gpt2':
        own['activation_function'] = 'gelu_new' if config.gelu == 'tanh' else 'gelu'
        own['n_ctx'] = config.block_size        # OpenAI's has it; llama.cpp's converter wants it
        own.update(dict.fromkeys(('attn_pdrop', 'embd_pdrop', 'resid_pdrop'), config.dropout))
        for module in model.transformer.modules():
            if getattr(module, 'bias', 0) is None:              # theirs has biases everywhere
                module.bias = torch.nn.Parameter(torch.zeros(len(module.weight)))
    own.update((theirs, getattr(config, ours)) for ours, theirs in zip(FIELDS, THEIRS[family].split()))
    tensors = {prefix + name: weight[rows].t() if turned else weight[rows]
               for name, weight, rows, turned in tensors_of(model, family)}
    tensors = {name.replace(f'{prefix}lm_head', 'lm_head'): view for name, view in tensors.items()}
    with tempfile.TemporaryDirectory(dir=os.path.dirname(target) or '.') as folder:
        part = Path(folder, 'part')             # renamed to target when it is complete
        part.mkdir()
        write_safetensors(part / 'model.safetensors', tensors)
        (part / 'config.json').write_text(json.dumps(own, indent=2))
        if encoding != 'tokenizer.json':        # tokens_of() reads it
            (part / 'meta.json').write_text(json.dumps(meta, indent=2))
        for path in filter(None, copies):
            shutil.copy(path, part)
        os.replace(part, target)
    if any(copies):
        return f'{target} is written'
    return f'{target} is written, without a tokenizer: its tokens are of the kind {encoding}'

def write_safetensors(path, tensors):
    """Writes this dict in float32. The library safetensors takes no views, and would need copies of all."""
    header = dict(__metadata__=dict(format='pt'))
    end = 0
    for name, tensor in tensors.items():
        start = end
        end += 4 * tensor.numel()
        header[name] = dict(dtype='F32', shape=list(tensor.shape), data_offsets=[start, end])
    header = json.dumps(header).encode()
    header += b' ' * (-len(header) % 8)         # the tensors begin at a multiple of 8
    with open(path, 'wb') as file:
        file.write(len(header).to_bytes(8, 'little') + header)
        for tensor in tensors.values():
            tensor.detach().contiguous().numpy().tofile(file)

if __name__ == '__main__':
    sys.excepthook = explain
    words = [word for word in sys.argv[1:] if word != '--as_standard=True']
    if len(words) != 2:
        raise ValueError('give a model and where to write it: python export.py out/best.pt some/folder')
    print(export(*words, standard=len(words) < len(sys.argv[1:])))
