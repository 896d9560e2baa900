"""
Exported models in another program: CTranslate2 converts them, and computes their loss in float32 and in int8,
where it rounds the weights and what they multiply. Run it from the root of the repository.

    pip install -r requirements.txt transformers==5.24.0 ctranslate2==4.8.5
    python results/int8.py data/debian FOLDER ...

The folders are those of export.py. It prints the loss of 24 windows of 512 tokens of val.bin, and how far the
logits of the first one are from those of transformers. It writes results/landing/int8.json.
"""
import json
import sys
import tempfile

import ctranslate2
import numpy as np
import torch
from ctranslate2.converters import TransformersConverter
from transformers import AutoModelForCausalLM

T = 512
data, *folders = sys.argv[1:]
meta = json.load(open(f'{data}/meta.json'))
tokens = np.memmap(f'{data}/val.bin', meta['dtype'], 'r').astype(int)
starts = np.linspace(0, len(tokens) - T - 1, 24).astype(int)
windows = torch.tensor(np.stack([tokens[i:i + T + 1] for i in starts]))         # (24, T + 1)
rows = []
for folder in folders:
    with tempfile.TemporaryDirectory() as place, torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(windows[:1, :-1]).logits
        row = dict(model=folder, largest=theirs.abs().max().item())
        TransformersConverter(folder).convert(place, force=True)
        for kind in 'float32', 'int8':
            generator = ctranslate2.Generator(place, compute_type=kind)
            total = 0.0
            for i, window in enumerate(windows):
                answer = generator.forward_batch([window[:-1].tolist()])
                logits = torch.tensor(np.array(answer))                         # (1, T, V)
                total += torch.nn.functional.cross_entropy(logits[0], window[1:]).item()
                if i == 0:
                    row[f'{kind} logits differ'] = (logits - theirs).abs().max().item()
            row[kind] = total / len(windows)
    print(row)
    rows.append(row)
json.dump(rows, open('results/landing/int8.json', 'w'), indent=1)
