"""
Writes text with a model of train.py or retrofit.py, or with a pretrained one, token by token.

    python sample.py --out_dir=out_python --start="def main(" --max_new_tokens=300
    python sample.py --init_from=gpt2 --start="Once upon a time" --temperature=0        # the likeliest tokens
    python sample.py --init_from=gpt2 --start=FILE:prompt.txt
    python sample.py --init_from=HuggingFaceTB/SmolLM2-135M-Instruct --chat=True --start="What is gold?"
"""
import sys
from dataclasses import dataclass

import torch

import runtime
from configurator import configure
from data.download import read_text
from pretrained import build, conversation, ends_of_text, tokenizer, turn_weights

@dataclass
class Knobs:
    init_from: str = 'resume'               # the best model of out_dir, or what from_pretrained takes: gpt2
    out_dir: str = 'out'
    start: str = '\n'                       # how the text starts; FILE:prompt.txt: as that file says
    chat: bool = False                      # start is a question to a chat model, in its own template
    num_samples: int = 1
    max_new_tokens: int = 300
    temperature: float = 0.8                # below 1: safer, above: wilder, 0: always the likeliest token
    top_k: int | None = 200                 # draw from the k likeliest tokens alone; None: from all
    seed: int = 1337
    device: str = 'auto'                    # 'cuda', 'mps', 'cpu'
    dtype: str = 'auto'                     # 'float32', 'bfloat16', 'float16'

knobs = configure(Knobs, sys.argv[1:])
here = runtime.start(knobs)
source = knobs.init_from
if source == 'resume':                      # the last is nanoGPT's
    names = [f'{knobs.out_dir}/{name}.pt' for name in ('best', 'last', 'ckpt')]
    source = next(filter(runtime.there, names), names[0])
model, meta = build(source)
model.to(here.device).eval()
encode, decode = tokenizer(meta)
ends = ends_of_text(meta)
text = read_text(knobs.start[5:]) if knobs.start.startswith('FILE:') else knobs.start
if knobs.chat:
    text = conversation(meta, text)
prompt = encode(text, not knobs.chat)       # a template has the first token already
if not prompt:
    raise ValueError('the start is empty: give at least one character, such as a newline')
block_size = model.config.block_size
if len(prompt) + knobs.max_new_tokens > block_size + 1:
    print(f'the model sees {block_size} tokens: once the text is longer, each new token is computed from the '
          f'last {block_size} alone, without the cache')

idx = torch.tensor([prompt], device=here.device)                            # (1, T)
how = knobs.max_new_tokens, knobs.temperature, knobs.top_k, meta.get('vocab_size')
torch.manual_seed(knobs.seed)
torch.backends.cuda.enable_cudnn_sdp(False) # it would make a plan for every length of the text
sys.stdout.reconfigure(errors='replace')    # a terminal may lack some characters
if here.kind == 'cpu':
    turn_weights(model)
for _ in range(knobs.num_samples):
    print('-' * 80)
    tokens = list(prompt)
    shown = ''
    with here.autocast:
        for token in model.stream(idx, *how):
            if token.item() in ends:
                break
            tokens.append(token.item())
            text = decode(tokens)
            # a character may take several tokens: an incomplete one is \ufffd, or changes text before it
            if text.startswith(shown) and not text.endswith('\ufffd'):
                print(text[len(shown):], end='', flush=True)
                shown = text
    print(decode(tokens)[len(shown):])
