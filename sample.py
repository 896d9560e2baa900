"""
Writes text with a model of train.py or retrofit.py, or with a pretrained one, token by token, until its text ends.

    python sample.py --init_from=out_python/best.pt --prompt="def main(" --max_new_tokens=300
    python sample.py --init_from=gpt2 --prompt="Once upon a time" --temperature=0       # always the likeliest token
    python sample.py --init_from=HuggingFaceTB/SmolLM2-135M-Instruct --prompt="What is a leap year?" --chat=True
"""
import math
import sys
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from configurator import configure, machine

@dataclass
class Knobs:
    init_from: str = 'out/best.pt'          # a checkpoint, or anything GPT.from_pretrained takes, such as gpt2
    prompt: str = '\n'
    chat: bool = False                      # the prompt is a question to a chat model, and gets the model's own template
    num_samples: int = 1
    max_new_tokens: int = 300
    temperature: float = 0.8                # below 1: safer, above: wilder, 0: always the likeliest token
    top_k: int | None = 200                 # draw from the k likeliest tokens alone; None: from all
    seed: int = 1337
    device: str = 'auto'                    # 'cuda', 'mps', 'cpu'
    dtype: str = 'auto'                     # 'float32', 'bfloat16', 'float16'

class Cache:
    """
    The KV cache for sampling: keys and values of all tokens so far, one entry per evaluation of attention, in the order of depth.
    In any scheme, a token's states depend on other tokens only through these.
    """

    def __init__(self, length):
        self.length, self.tokens, self.depth, self.layers = length, 0, 0, []

    def extend(self, *new):
        """Keys and values (B, nkv, T, hs) of the next T tokens -> those of all tokens so far."""
        if self.tokens and new[0].size(2) > 1:
            raise ValueError('the cache already holds tokens: give one new token at a time')
        if self.depth == len(self.layers):
            self.layers.append([x.new_empty(*x.shape[:2], self.length, x.size(3)) for x in new])
        layer, end = self.layers[self.depth], self.tokens + new[0].size(2)
        for kept, x in zip(layer, new):
            kept[:, :, self.tokens:end] = x.detach()
        self.depth += 1
        return [kept[:, :, :end] for kept in layer]

    def step(self, T):
        """After a forward pass: T more tokens are in the cache, and the next pass begins at depth 0."""
        self.tokens, self.depth = self.tokens + T, 0

@torch.no_grad()
def stream(model, idx, max_new_tokens, temperature=1.0, top_k=None, vocab_size=None, cached=True):
    """
    Yields max_new_tokens tokens (B, 1) that continue idx (B, T), one after the other. Temperature 0 takes the
    likeliest token, top_k draws from the k likeliest; tokens from vocab_size on, which only pad the vocabulary, are
    never drawn. Keys and values are cached up to block_size tokens. Beyond that, or with cached=False, every new token is
    computed from the last block_size tokens without a cache: when the window moves, all positions in it change.
    """
    block_size, new = model.config.block_size, idx
    cache = Cache(min(block_size, idx.size(1) + max_new_tokens))
    for _ in range(max_new_tokens):
        if cached and idx.size(1) <= block_size:
            logits = model(new, cache=cache)[0]
            cache.step(new.size(1))
        else:
            logits = model(idx[:, -block_size:])[0]
        logits = logits[:, -1, :vocab_size]                                             # (B, V)
        if top_k is not None:
            kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
            logits = logits.masked_fill(logits < kth, -math.inf)
        if temperature == 0:
            new = logits.argmax(-1, keepdim=True)
        else:
            logits = logits.float() - logits.max(-1, keepdim=True).values       # so that none overflows at a low temperature
            new = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1)
        idx = torch.cat((idx, new), dim=1)
        yield new

if __name__ == '__main__':
    from data.download import in_a_sentence                     # here: GPT.generate() needs only what is above
    from pretrained import build, conversation, ends_of_text, tokenizer, turn_weights
    knobs = configure(Knobs, sys.argv[1:])
    sys.excepthook = in_a_sentence              # its output may go to a full disk
    kind, dtype, reasons = machine(knobs.device, knobs.dtype)
    print(reasons)
    if not knobs.prompt:
        sys.exit('the prompt is empty: give at least one character, such as a newline')
    try:
        model, meta = build(knobs.init_from)
        encode, decode = tokenizer(meta)
        ends = ends_of_text(meta)
        if meta['encoding'] == 'chars' and (unknown := set(knobs.prompt) - set(meta['chars'])):
            sys.exit(f"the model has no token for {', '.join(map(repr, sorted(unknown)))}: its characters are {meta['chars']!r}")
        prompt = encode(conversation(meta, knobs.prompt) if knobs.chat else knobs.prompt)
    except ValueError as error:
        sys.exit(f'{error}; name another with --init_from=...')
    if knobs.temperature < 0 or knobs.top_k is not None and knobs.top_k < 1:
        sys.exit('temperature must be 0 or more, and top_k 1 or more, or None')
    if knobs.num_samples < 1 or knobs.max_new_tokens < 1:
        sys.exit('num_samples and max_new_tokens must be 1 or more')
    if not 0 <= knobs.seed < 2**63:
        sys.exit(f'seed = {knobs.seed} must be 0 or more, and below 2^63')

    model.to(kind).eval()
    torch.backends.cuda.enable_cudnn_sdp(False)     # cuDNN's attention makes a plan for every new length, and texts have many lengths
    if kind == 'cpu':
        turn_weights(model)
    sys.stdout.reconfigure(errors='replace')    # a terminal may lack some characters
    torch.manual_seed(knobs.seed)
    if len(prompt) + knobs.max_new_tokens > model.config.block_size + 1:
        print(f'the model sees {model.config.block_size} tokens: once the text is longer, each new token is computed from '
              f'the last {model.config.block_size} alone, without the cache')
    for _ in range(knobs.num_samples):
        print('-' * 80)
        tokens, shown = list(prompt), ''
        with torch.autocast(kind, getattr(torch, dtype), enabled=dtype != 'float32'):
            for token in stream(model, torch.tensor([prompt], device=kind), knobs.max_new_tokens, knobs.temperature,
                                      knobs.top_k, meta.get('vocab_size')):
                if token.item() in ends:
                    break
                tokens.append(token.item())
                text = decode(tokens)
                # a character may take several tokens: until it is complete, the text may end in \ufffd or change further back
                if text.startswith(shown) and not text.endswith('\ufffd'):
                    print(text[len(shown):], end='', flush=True)
                    shown = text
        print(decode(tokens)[len(shown):])
