"""
Exported models in another program: CTranslate2 converts them, and computes their loss in float32 and in int8,
where it rounds the weights and what they multiply. Run it from the root of the repository.

    pip install -r requirements.txt transformers==5.24.0 ctranslate2==4.8.5
    python results/int8.py debian FOLDER ...

The folders are those of export.py. It prints the loss of 24 windows of 512 tokens of data/debian, and how far
the logits of the first one are from those of transformers. It writes results/landing/int8.json.
"""
import json
import os
import sys
import tempfile
from contextlib import nullcontext
from types import SimpleNamespace

import ctranslate2
import numpy as np
import torch
from ctranslate2.converters import TransformersConverter
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from runtime import open_data, validation_loss, windows

dataset, *folders = sys.argv[1:]
knobs = SimpleNamespace(dataset=dataset, block_size=512, eval_windows=24, batch_size=1)
here = SimpleNamespace(device=torch.device('cpu'), autocast=nullcontext())
_, _, tokens = open_data(knobs)
first, _ = windows(tokens, [0], knobs.block_size, here.device)                  # (1, T)
rows = []
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as place, torch.no_grad():
        theirs = model(first).logits                                            # (1, T, V)
        row = dict(model=folder, largest=theirs.abs().max().item())
        TransformersConverter(folder).convert(place, force=True)
        for kind in 'float32', 'int8':
            generator = ctranslate2.Generator(place, compute_type=kind)

            def logits(x):
                return torch.tensor(np.array(generator.forward_batch(x.tolist())))

            def loss(x, y):
                return F.cross_entropy(logits(x)[0], y[0])

            row[f'{kind} logits differ'] = (logits(first) - theirs).abs().max().item()
            row[kind] = validation_loss(model, tokens, knobs, here, loss)
    print(row)
    rows.append(row)
json.dump(rows, open('results/landing/int8.json', 'w'), indent=1)
