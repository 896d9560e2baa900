"""
Exported models in llama.cpp: its loss with weights of 8 bits (q8_0, which rounds what they multiply too), and
its log-probabilities with weights in float32. Run it from the root of the repository.

    pip install -r requirements.txt transformers==5.24.0 sentencepiece==0.2.3 xllamacpp==2026.10.11549
    python results/llamacpp.py CONVERTER debian FOLDER ...

CONVERTER is llama.cpp's convert_hf_to_gguf.py, and the folders are those of export.py. The losses are of 24
windows of 512 tokens of data/debian, beside those of transformers. The log-probabilities are those of every
token that may follow the first window. It writes results/landing/llamacpp.json.
"""
import json
import os
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from types import SimpleNamespace

import torch
import xllamacpp
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from runtime import open_data, validation_loss, windows

def serve(folder, kind, path):
    """llama.cpp with the folder's weights of this kind; what it keeps of earlier tokens is in float32."""
    subprocess.run([sys.executable, converter, folder, '--outtype', kind, '--outfile', path], check=True)
    its = xllamacpp.CommonParams()
    its.model.path = path
    its.n_ctx = 1024
    its.n_parallel = 1
    its.cpuparams.n_threads = torch.get_num_threads()
    its.verbosity = 0
    its.cache_type_k = xllamacpp.ggml_type.GGML_TYPE_F32
    its.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    its.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(its)

def forced(server, tokens, token, n_probs):
    """
    What the server says about this token, which a bias forces it to write after the others, and about the
    likeliest n_probs tokens. Its log-probabilities are those without the bias.
    """
    answer = server.handle_completions(
        dict(prompt=tokens, n_predict=1, n_probs=n_probs, logit_bias=[[token, 1000.0]]))
    said = (answer.get('choices') or [answer])[0].get('logprobs')
    if not said or said['content'][0]['id'] != token:      # it says nothing of a part of a character
        raise ValueError(f'llama.cpp does not say how likely token {token} is: {str(answer):.200}')
    return said['content'][0]

converter, dataset, *folders = sys.argv[1:]
knobs = SimpleNamespace(dataset=dataset, block_size=512, eval_windows=24, batch_size=1)
here = SimpleNamespace(device=torch.device('cpu'), autocast=nullcontext())
_, _, data = open_data(knobs)
first, targets = windows(data, [0], knobs.block_size, here.device)              # (1, T) each
rows = []
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def their_loss(x, y):
        return F.cross_entropy(model(x).logits[0], y[0])

    def loss(x, y):
        """The server has no loss of a text. So it is asked token by token."""
        text = x[0].tolist()
        said = [forced(server, text[:i + 1], token, 1) for i, token in enumerate(y[0].tolist())]
        return -torch.tensor([token['logprob'] for token in said]).mean()

    with tempfile.TemporaryDirectory() as place, torch.no_grad():
        theirs = model(first).logits[0, -1].log_softmax(0)                      # (V)
        server = serve(folder, 'f32', f'{place}/f32.gguf')
        found = torch.full_like(theirs, torch.nan)          # a token that is not named stays NaN
        for token in forced(server, first[0].tolist(), targets[0, -1].item(), len(theirs))['top_logprobs']:
            found[token['id']] = token['logprob']
        del server
        server = serve(folder, 'q8_0', f'{place}/q8_0.gguf')
        row = dict(model=folder, differ=(found - theirs).abs().max().item(),
                   float32=validation_loss(model, data, knobs, here, their_loss),
                   q8_0=validation_loss(model, data, knobs, here, loss))
    print(row, flush=True)
    rows.append(row)
json.dump(rows, open('results/landing/llamacpp.json', 'w'), indent=1)
