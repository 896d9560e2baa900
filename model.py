"""
A GPT whose backward pass rebuilds its activations instead of storing them. All of the mathematics is here.

In GPT-2 a block adds its output to the state, p = p + f(p). The old p cannot be computed from the new one, so
backpropagation stores all activations. Here depth is time, and the state is a position p, which starts as
the embedding, and a velocity v, which starts at 0. Each of these lines can be undone:

    v = -a * v + c * f(p)           forward, up through the layers
    p = p + v

    p = p - v                       backward, down again: the same lines undone, the last one first
    v = (v - c * f(p)) / -a

So the forward pass keeps only the last p and v, and the few bits that are cut off where a is a fraction. The
backward pass evaluates f(p) once per step, and uses it twice: to rebuild v, and for the gradients. Adding
floats rounds, so rebuilt states would drift. Integers do not: p and v are fixed-point numbers in int32. At
the bottom v must be 0 again. If any f(p) differs from that of the forward pass, v is almost surely not 0.

The schemes are those of Gal, Eliasof, Turek, Ascher, Treister and Haber, "Reversing Large Language Models for
Efficient Training and Fine-Tuning" (arXiv 2512.02056), "the paper" below. Blocks are nanoGPT's, or Llama's.
"""
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# -----------------------------------------------------------------------------
# the schemes: (a, h) of a layer -> (a, c) of its step, with h the step size. p_prev is p - v

SCHEMES = {
    'standard': lambda a, h: (0, 1),        # p_next = p + f(p): forward Euler, GPT-2 itself, not reversible
    'midpoint': lambda a, h: (1, 2 * h),    # p_next = p_prev + 2h f(p)                     paper eq. 2.4
    'midpoint_a': lambda a, h: (a, h),      # p_next = a p_prev + (1 - a) p + h f(p)        eq. 3.6
    'leapfrog': lambda a, h: (-1, h * h),   # p_next = 2p - p_prev + h^2 f(p)               eq. 2.6
    'symplectic': lambda a, h: (1, 1),      # p_next = p_prev + f(p), two steps per layer   eq. 2.8, 2.9
    'midpoint_sum': lambda a, h: (1, 1),    # p_next = p_prev + f_below(p) + f(p)           section 4
}
FRACTIONAL_BITS = {32: 18, 64: 32}          # by state_bits; why: results/states.md
# of the schemes that have an h; the evidence is weak: results/schemes.md
DEFAULT_H = {'midpoint': 0.125, 'midpoint_a': 0.25, 'leapfrog': 0.25}

class Coefficients(NamedTuple):
    """Of one step. In integers a = n / 2^bits: -3/4 has n = -3, bits = 2. In floats n is a, and bits is 0."""
    a: float
    c: float
    n: float
    bits: int               # bits per element that dividing by 2^bits cuts off; the backward pass needs them
    inverse: float          # 1 / -n, of integers modulo 2^32 or 2^64
    one: float              # the number 1 as a state: 2^fractional_bits, or 1 in floats

@dataclass
class GPTConfig:
    block_size: int = 1024                  # longest context, in tokens
    vocab_size: int = 50304                 # GPT-2's 50257, padded to a multiple of 64 for speed
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True                       # biases in linear layers and layer norms, as in GPT-2
    norm: str = 'layernorm'                 # Llama's is 'rmsnorm'
    norm_eps: float = 1e-5
    mlp: str = 'gelu'                       # Llama's is 'swiglu'
    gelu: str = 'erf'                       # the exact one, as in nanoGPT; GPT-2's approximation is 'tanh'
    n_inner: int | None = None              # width of the MLP; None: 4 * n_embd
    n_kv_head: int | None = None            # heads of keys and values, if fewer than n_head (grouped queries)
    rope_theta: float | None = None         # base of rotary positions (Llama); None: learned ones (GPT-2)
    tied: bool = True                       # one matrix embeds tokens and makes logits
    scheme: str = 'leapfrog'                # a key of SCHEMES
    h: float | list | str | None = None     # step size, a number or one per layer; 'once': see step_sizes()
    a: float | list | str | None = None     # midpoint_a: a number or one per layer; None or 'random': see GPT
    stored_layers: int | None = None        # the last layers, which keep their graphs; None: 0, standard: all
    exact: bool = True                      # states are integers; False: floats, which drift, as in the paper
    state_bits: int = 32                    # of a state: 32 or 64. Weights of float64 have 64 in any case
    fractional_bits: int | None = None      # of these, after the point; None: 18 of 32, or 32 of 64
    verify: bool = True                     # count the elements of v that are not 0 after the backward pass
    slice_tokens: int = 8192                # f processes about so many at a time: its graph dominates memory

    def __post_init__(self):
        def must(condition, sentence):
            if not condition:
                raise ValueError(sentence)

        self.n_inner = self.n_inner or 4 * self.n_embd
        self.n_kv_head = self.n_kv_head or self.n_head
        if self.fractional_bits is None:
            self.fractional_bits = FRACTIONAL_BITS.get(self.state_bits)
        if self.stored_layers is None:
            self.stored_layers = self.n_layer if self.scheme == 'standard' else 0
        if self.h is None:
            self.h = DEFAULT_H.get(self.scheme)
        if self.a is None and self.scheme == 'midpoint_a':
            self.a = 'random'
        must(self.scheme in SCHEMES, f"unknown scheme '{self.scheme}': choose one of {', '.join(SCHEMES)}")
        must(self.n_embd % self.n_head == 0, 'n_embd must be divisible by n_head')
        must(self.n_head % self.n_kv_head == 0, 'n_head must be divisible by n_kv_head')
        even = self.n_embd // self.n_head % 2 == 0
        must(even or self.rope_theta is None, 'rotary positions need an even n_embd / n_head')
        must(self.state_bits in FRACTIONAL_BITS, 'state_bits must be 32 or 64')
        room = range(self.state_bits - 1)
        must(self.fractional_bits in room, f'fractional_bits must be from 0 to {self.state_bits - 2}')
        must(self.stored_layers in range(self.n_layer + 1), 'stored_layers must be from 0 to n_layer')
        must(self.h is None or self.scheme in DEFAULT_H, f'{self.scheme} has no h to choose: leave h out')
        must(self.a is None or self.scheme == 'midpoint_a', f'{self.scheme} has no a to choose: leave a out')
        for name, word in ('a', 'random'), ('h', 'once'):       # a is drawn later, and h follows from a
            numbers = self.per_layer(name)
            later = self.scheme == 'midpoint_a' and getattr(self, name) == word
            unset = numbers == [None] * self.n_layer or later
            finite = all(type(x) in (int, float) and abs(x) < 1e9 for x in numbers)
            right = unset or (finite and len(numbers) == self.n_layer)
            must(right, f"{name} must be a finite number, n_layer of them, or of midpoint_a '{word}'")
        for a in self.per_layer('a'):
            if a not in (None, 'random'):
                n, denominator = float(a).as_integer_ratio()    # in lowest terms, over a power of two
                exact = n % 2 == 1 and denominator <= 256
                must(exact or (a != 0 and not self.exact), f'a = {a} cannot be undone exactly: give n / 2^k, '
                     'with n odd and k up to 8, such as 1, -0.5 or 0.75')
        if self.h == 'once':
            signs = {'random' if a == 'random' else a > 0 for a in self.per_layer('a')}
            must(len(signs) == 1 and signs != {'random'}, "h = 'once' needs an a of one sign, such as --a=-1")
            self.h = step_sizes(self.per_layer('a'))

    def per_layer(self, name):
        value = getattr(self, name)
        return value if isinstance(value, list) else [value] * self.n_layer

    def state_type(self, dtype):
        """(dtype of the states, the number 1 as a state), if the embedding has this dtype."""
        if not self.exact:
            return wide(dtype), 1.0
        if dtype == torch.float64 and self.state_bits == 32:
            return torch.int64, 2.0**FRACTIONAL_BITS[64]
        return (torch.int32 if self.state_bits == 32 else torch.int64), 2.0**self.fractional_bits

    def coefficients(self, dtype=torch.float32):
        """The Coefficients of each layer, if the embedding has this dtype."""
        state, one = self.state_type(dtype)
        result = []
        for chosen, h in zip(self.per_layer('a'), self.per_layer('h')):
            a, c = SCHEMES[self.scheme](chosen, h)
            n, denominator = float(a).as_integer_ratio() if self.exact else (a, 1)
            if self.exact and a and not result:
                n, denominator = 1, 1                           # v is 0, so a does not matter: no bits
            inverse = 0                                         # of standard, which is never undone
            if a:
                inverse = integer_inverse(-n, state) if self.exact else -1 / a
            result.append(Coefficients(a, c, n, denominator.bit_length() - 1, inverse, one))
        return result

def step_sizes(a):
    """
    h of midpoint_a with which each layer's output arrives once, as in a standard net. Layer j reaches the
    last state h_j S_j times, where S_j is 1 - a_{j+1} S_{j+1}, and 1 in the last layer: so h_j = 1 / S_j. At
    a = -1 that is 1 / (L - j), from j = 0 on. Where a > 0, S_j may be near 0: then h = 1 + a, the inverse of
    S where it no longer changes with j.
    """
    if max(a) > 0:
        return [1 + x for x in a]
    h = [1.0]                                   # from the last layer down
    for x in reversed(a[1:]):
        h.append(1 / (1 - x / h[-1]))
    return h[::-1]

# -----------------------------------------------------------------------------
# the transformer: GPT-2, with nanoGPT's names, and Llama

def rotate(x, theta, first):
    """Rotary positions of x (B, nh, T, hs), from first on. Channels i and i + hs/2 pair, as in Llama."""
    T, hs = x.shape[-2:]
    frequency = theta ** (-torch.arange(0, hs, 2, device=x.device).float() / hs)    # (hs/2)
    angle = torch.arange(first, first + T, device=x.device)[:, None] * frequency    # (T, hs/2)
    cos, sin = angle.cos(), angle.sin()
    x1, x2 = x.chunk(2, dim=-1)                                                     # (B, nh, T, hs/2) each
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)

class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.n_head, config.n_kv_head, config.n_kv_head      # of queries, keys and values
        self.hs = config.n_embd // config.n_head
        self.theta = config.rope_theta
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, sum(self.heads) * self.hs, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, cache=None):
        B, T, C = x.size()          # sequences, tokens, channels: T 1024, C 768 = nh 12 x hs 64 in GPT-2
        first = cache.tokens if cache else 0
        qkv = self.c_attn(x).view(B, T, -1, self.hs).split(self.heads, dim=2)
        q, k, v = (y.transpose(1, 2) for y in qkv)                          # (B, nh or nkv, T, hs) each
        if self.theta is not None:
            q = rotate(q, self.theta, first)
            k = rotate(k, self.theta, first)
        if cache:
            k, v = cache.extend(k, v)
        causal = first == 0         # later there is one new token per pass, which sees all tokens
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal, enable_gqa=True)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))                 # heads side by side again
        return F.dropout(y, self.dropout, self.training)

class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gated = config.mlp == 'swiglu'
        self.approximate = 'tanh' if config.gelu == 'tanh' else 'none'
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, (1 + self.gated) * config.n_inner, bias=config.bias)
        self.c_proj = nn.Linear(config.n_inner, config.n_embd, bias=config.bias)

    def forward(self, x):
        x = self.c_fc(x)                                                    # (B, T, n_inner), or twice that
        if self.gated:
            gate, x = x.chunk(2, dim=-1)                                    # (B, T, n_inner) each
            x = F.silu(gate) * x                                            # SwiGLU, arXiv 2002.05202
        else:
            x = F.gelu(x, approximate=self.approximate)
        return F.dropout(self.c_proj(x), self.dropout, self.training)

def norm(config):
    if config.norm == 'rmsnorm':
        return nn.RMSNorm(config.n_embd, config.norm_eps)
    return nn.LayerNorm(config.n_embd, config.norm_eps, bias=config.bias)

class Block(nn.Module):
    """nanoGPT's Block minus the residual: f(p) = Attn(LN1(p)) + MLP(LN2(p + Attn(LN1(p)))), paper eq. 2.5."""
    def __init__(self, config):
        super().__init__()
        self.scheme = config.scheme
        self.tile = config.slice_tokens
        self.ln_1 = norm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = norm(config)
        self.mlp = MLP(config)

    def attention(self, x, cache=None):
        return self.attn(self.ln_1(x), cache)

    def feedforward(self, x, cache=None):                                   # all f take (x, cache)
        return self.mlp(self.ln_2(x))

    def forward(self, x, cache=None):
        def tail(x, y):
            return y + self.feedforward(x + y)                              # nanoGPT's Block also adds x

        y = self.attention(x, cache)
        if x.size(1) <= self.tile:
            return tail(x, y)
        # one sequence is longer than a slice. The MLP has most of the graph: of it, keep that of one tile
        tiles = zip(x.split(self.tile, dim=1), y.split(self.tile, dim=1))
        return torch.cat([checkpoint(tail, *tile, use_reentrant=False) for tile in tiles], dim=1)

    def step(self, handle, tape, coefficients, store_graph, below):
        """Takes the tape one layer up, by one step or two. GPT.integrate() says what handle and below are."""
        def both(x, cache=None):
            return below(x, cache) + self(x, cache)

        if self.scheme == 'symplectic':
            handle = tape.step(handle, self.attention, (self.ln_1, self.attn), coefficients, store_graph)
            mlp = self.ln_2, self.mlp
            return tape.step(handle, self.feedforward, mlp, coefficients, store_graph, by_token=True)
        if self.scheme == 'midpoint_sum' and below:
            return tape.step(handle, both, (below, self), coefficients, store_graph)
        return tape.step(handle, self.forward, (self,), coefficients, store_graph)

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        if config.a == 'random':    # paper section 3: a = +-1 + U(-1/2, 1/2); here rounded to quarters
            sign = torch.randint(2, (config.n_layer,), device='cpu') * 2 - 1
            a = sign + torch.rand(config.n_layer, device='cpu') - 0.5
            config = replace(config, a=(a * 4).round().div(4).tolist())
        self.config = config
        self.kick = kick            # compile_parts() replaces these three
        self.unkick = unkick
        self.chunk_loss = chunk_loss
        self.mismatches = 0         # elements of v that were not 0 again. train.py checks this, and the next:
        self.largest = 0.0          # the largest value that a step had to hold, as a part of its range
        self.transformer = nn.ModuleDict()
        self.transformer.wte = nn.Embedding(config.vocab_size, config.n_embd)
        if config.rope_theta is None:
            self.transformer.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.transformer.drop = nn.Dropout(config.dropout)
        self.transformer.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.transformer.ln_f = norm(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.transformer.wte.weight
        for name, weight in self.named_parameters():
            self.initialize(name, weight)

    def initialize(self, name, weight):
        """GPT-2's initialisation of the weight of this name, in place."""
        if name.endswith('bias'):
            return nn.init.zeros_(weight)
        if weight.dim() == 1:                                               # of a norm
            return nn.init.ones_(weight)
        deep = math.sqrt(2 * self.config.n_layer) if name.endswith('c_proj.weight') else 1.0
        return nn.init.normal_(weight, std=0.02 / deep)

    def forward(self, idx, targets=None, criterion=None, cache=None):
        """idx (B, T) -> (logits (B, 1, V) of the last position, None), or with targets (None, mean loss)."""
        x = self.last_state(idx, cache)                                     # (B, T, C)
        if targets is None:
            return self.lm_head(self.transformer.ln_f(x[:, -1:])), None
        return None, self.loss(x, targets, criterion)

    def hidden(self, idx):
        """idx (B, T) tokens -> (B, T, C) after the final norm; lm_head turns them into logits."""
        return self.transformer.ln_f(self.last_state(idx))

    def last_state(self, idx, cache=None):
        """idx (B, T) tokens -> (B, T, C) before the final norm. If a cache holds tokens already, T is 1."""
        first = cache.tokens if cache else 0
        end = first + idx.size(1)
        if end > self.config.block_size:
            raise ValueError(f'{end} tokens are longer than block_size = {self.config.block_size}')
        x = self.transformer.wte(idx)                                       # (B, T, C)
        if self.config.rope_theta is None:
            x = x + self.transformer.wpe(torch.arange(first, end, device=idx.device))
        x = self.integrate(self.transformer.drop(x), cache)
        if cache:
            cache.tokens = end
        return x

    @torch.compiler.disable         # it cannot trace states that change in place: see compile_parts()
    def integrate(self, x, cache=None):
        """The loop over the blocks, from the embedding to the last state, both (B, T, C)."""
        blocks = self.transformer.h
        with_grad = torch.is_grad_enabled()
        first_stored = self.config.n_layer - self.config.stored_layers
        if self.config.scheme == 'standard':
            for j, block in enumerate(blocks):
                inside = x.view_as(x)           # gradients in the block add up first, as under FSDP2
                if j >= first_stored or not with_grad:
                    x = x + block(inside, cache)
                else:               # keeps x alone; the backward pass evaluates the block again
                    x = x + checkpoint(block, inside, cache, use_reentrant=False)
            return x

        # p, v and their gradients are on the tape. Autograd sees a chain of handles: x, and then dummy zeros
        #     x -> block.step -> handle -> block.step -> handle -> ... -> tape.last -> last p -> loss
        # and takes it from right to left: tape.last gets dL/dp, each step goes down again and returns the
        # gradients of its weights, and the lowest one returns dL/dx
        tape = Tape(self, x, cache)
        handle = x
        steps = self.config.coefficients(x.dtype)
        for j, block in enumerate(blocks):
            store_graph = j >= first_stored and with_grad
            below = blocks[j - 1] if j else None                            # the block before, for its f
            handle = block.step(handle, tape, steps[j], store_graph, below)
        return tape.last(handle)

    def loss(self, x, targets, criterion=None, chunk=1024):
        """
        Mean loss of x (B, T, C) from last_state(), in nats per target; targets (B, T) of -1 do not count. The
        criterion, cross entropy by default, maps logits (N, V) and targets (N), or the rows of a tuple, to a
        sum. It must not change if a number is added to all logits of a token. The gradients of a chunk are
        computed while its logits exist: those of all tokens at once would be the largest tensor of all.
        """
        targets = targets if isinstance(targets, tuple) else (targets,)
        x, *rows = (y.flatten(0, 1) for y in (x, *targets))                 # (N, C), and N rows each
        count = (rows[0] != -1).sum()
        ln_f = self.transformer.ln_f
        weight = head(self.lm_head.weight)
        weights = [w for w in (self.lm_head.weight, *ln_f.parameters()) if w.requires_grad]
        leaves = [weight if w is self.lm_head.weight else w for w in weights]
        grads = [torch.zeros_like(w, dtype=wide(w.dtype)) for w in (x, *weights)]
        total = 0
        for x_i, g_i, *rows_i in zip(*(y.split(chunk) for y in (x, grads[0], *rows))):
            x_i = x_i.detach().requires_grad_()
            loss = self.chunk_loss(ln_f, criterion or cross_entropy, x_i, weight, *rows_i)
            total = total + loss.detach()
            if torch.is_grad_enabled():
                g_i[:], *new = torch.autograd.grad(loss, (x_i, *leaves))
                for grad, g in zip(grads[1:], new):
                    grad += g

        def scaled(g):
            return [grad.mul_(g / count) for grad in grads]     # in place: they may be the largest tensors

        return Backward.apply(total / count, scaled, x, *weights)

    def compile_parts(self):
        """torch.compile for every f, for a chunk of the loss, and for the recurrence."""
        # the limit must hold in autograd's thread, too: torch 2.13 has an argument for it, 2.11 a setting.
        # torch.__version__ compares as a version, not as a string
        torch.compiler.config.recompile_limit = 1000
        limit = dict(recompile_limit=1000) if torch.__version__ >= '2.12' else {}
        # f must round alike in both passes: no kernel for all shapes, and no eager code, may take over later
        how = dict(limit, dynamic=False, fullgraph=True)
        for block in self.transformer.h:
            for name in ('attention', 'feedforward') if self.config.scheme == 'symplectic' else ('forward',):
                setattr(block, name, torch.compile(getattr(block, name), **how))
        self.chunk_loss = torch.compile(chunk_loss, **how)
        self.kick = torch.compile(kick, **limit)        # one kernel per number of bits, whatever n
        self.unkick = torch.compile(unkick, **limit)

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, vocab_size=None):
        """
        Yields the tokens (B, 1) that continue idx (B, T). Temperature 0 takes the likeliest, top_k draws from
        the k likeliest; those from vocab_size on are padding, and never drawn. Call model.eval() first.
        """
        cache = Cache()
        new = idx
        for _ in range(max_new_tokens):
            if idx.size(1) > self.config.block_size:    # all positions move, so a cache is of no use
                new = idx[:, -self.config.block_size:]
                cache = None
            logits, _ = self(new, cache=cache)
            logits = logits[:, -1, :vocab_size].float()                     # (B, V)
            if not logits.isfinite().all().item():
                raise ValueError('the logits are not finite: a weight is not, or a state has left its range')
            if top_k is not None:
                kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                logits = logits.masked_fill(logits < kth, -math.inf)
            new = logits.argmax(-1, keepdim=True)
            if temperature > 0:
                logits = logits - logits.amax(-1, keepdim=True)             # or they may overflow
                new = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1)
            idx = torch.cat((idx, new), dim=1)
            yield new

    def generate(self, idx, max_new_tokens, **how):
        """idx (B, T) -> (B, T + max_new_tokens): idx, and the tokens of stream()."""
        return torch.cat((idx, *self.stream(idx, max_new_tokens, **how)), dim=1)

class Cache:
    """Keys and values of all tokens so far: a queue, with one entry per attention, in the order of depth."""
    def __init__(self):
        self.tokens = 0
        self.entries = []

    def extend(self, k, v):
        """Keys and values (B, nkv, T, hs) of the next T tokens -> those of all tokens so far."""
        if self.tokens:
            k, v = (torch.cat(pair, dim=2) for pair in zip(self.entries.pop(0), (k, v)))
        self.entries.append((k.detach(), v.detach()))
        return k, v

# -----------------------------------------------------------------------------
# the states: integers with fractional bits; float states (exact=False) work as well.
# test_reversible.py finds lines here and below by their comments

def kick(v, fx, coefficients):
    """v = -a * v + c * f(p), in place, both (S, T, C). Returns the bits that dividing cut off, or None."""
    _, c, n, bits, _, one = coefficients
    multiply(v, -n)                                         # -a * v
    cut_off = pack(v, bits) if bits else None
    if bits:
        v.bitwise_right_shift_(bits)                        # / 2^bits
    v.add_(to_state(fx, c * one, v.dtype))                  # + c * f(p)
    return cut_off

def unkick(v, fx, cut_off, coefficients):
    """v = (v - c * f(p)) / -a, in place: kick() undone, its last line first."""
    _, c, _, bits, inverse, one = coefficients
    v.sub_(to_state(fx, c * one, v.dtype))                  # - c * f(p)
    if bits:
        v.bitwise_left_shift_(bits)                         # * 2^bits
        v.bitwise_or_(unpack(cut_off, bits, v.shape))       # the bits again
    multiply(v, inverse)                                    # / -a

def multiply(v, n):
    """In place. Most n are 1 or -1: nothing to do, or neg_, which is faster than mul_."""
    if n == -1:
        v.neg_()
    elif n != 1:
        v.mul_(n)

def integer_inverse(n, dtype):
    """1 / n in integers, which compute modulo 2^32 or 2^64: every odd n has an inverse there."""
    modulus = 2**torch.iinfo(dtype).bits
    return (pow(n, -1, modulus) + modulus // 2) % modulus - modulus // 2

def wide(dtype):
    return torch.promote_types(dtype, torch.float32)        # at least float32: states would overflow float16

def to_state(x, scale, dtype):
    """scale * x as a state, in new memory."""
    x = x.detach().to(wide(x.dtype)).mul(scale)
    return x if dtype.is_floating_point else x.round_().to(dtype)

def to_float(p, one, dtype):
    return p.to(wide(dtype), copy=True).mul_(1 / one).to(dtype)

def pack(v, bits):
    """The low bits of every element, in slots of 1, 2, 4 or 8 bits, several slots to a byte."""
    slot = 1 << (bits - 1).bit_length()
    low = (v & (2**bits - 1)).to(torch.uint8).flatten()
    low = F.pad(low, (0, -low.numel() % (8 // slot))).view(-1, 8 // slot)
    return (low << torch.arange(0, 8, slot, dtype=torch.uint8, device=v.device)).sum(1, dtype=torch.uint8)

def unpack(packed, bits, shape):
    """What pack() packed, in this shape."""
    slot = 1 << (bits - 1).bit_length()
    low = packed[:, None] >> torch.arange(0, 8, slot, dtype=torch.uint8, device=packed.device)
    return (low & (2**bits - 1)).flatten()[:math.prod(shape)].view(shape)

# -----------------------------------------------------------------------------
# the two states, and a backward pass written by hand

class Backward(torch.autograd.Function):
    """A value with a hand-written backward pass: a function dL/dvalue -> dL/dinput of each input."""
    @staticmethod
    def forward(ctx, value, ours, *inputs):
        ctx.ours = ours
        ctx.mark_dirty(value)       # it is returned itself, not a view of it
        ctx.save_for_backward(*(x for x in inputs if x.is_leaf and x.requires_grad))    # weights, not copied
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        if ctx.ours is None:
            raise RuntimeError('an earlier backward pass has used up what this one needs: run forward again')
        ctx.saved_tensors           # raises an error if a weight has changed since the forward pass
        grads = ctx.ours(g)
        ctx.ours = None             # the loss may outlive this pass, and would keep its tensors alive
        return None, None, *grads

class Tape:
    """
    The two states, and in the backward pass their gradients, all (B, T, C). f sees each sequence alone, so a
    step goes slice by slice: unless it is stored, a graph of f exists for one slice at a time. The MLP sees
    each token alone: in symplectic its slices may cut a sequence anywhere.
    """
    def __init__(self, model, x, cache):
        kind = x.device.type
        self.model = model
        self.cache = cache
        self.dtype = x.dtype
        state, self.one = model.config.state_type(x.dtype)
        self.p = to_state(x, self.one, state)
        self.v = torch.zeros_like(self.p)       # the paper leaves p_{-1} open: it is p_0, so v is 0
        self.g_p = None
        self.g_v = None
        self.depth = 0                          # steps up so far
        self.looks = []                         # see watch()
        self.bounds = []
        x = x.detach()
        self.watch(x, x, x, [[self.one, 0, 0], [0, 0, 0]])      # the embedding has to fit, too
        self.dropout = model.config.dropout > 0 and model.training
        self.rng = torch if kind == 'cpu' else torch.get_device_module(kind)
        # backward runs outside autocast. In training autocast's own cache would keep all cast weights alive
        self.autocast = dict(
            device_type=kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind),
            cache_enabled=not torch.is_grad_enabled())

    def step(self, handle, f, modules, coefficients, store_graph, by_token=False):
        """
        One step up, and in the backward pass down again. There, with J = df/dp, g_p = dL/dp and g_v = dL/dv,

            g_v = g_v + g_p
            g_p = g_p + c * J^T g_v     one vector-Jacobian product, which yields the weights' gradients, too
            g_v = -a * g_v

        Rounding to integers counts as the identity.
        Weights are inputs of each step, so DistributedDataParallel sends some while others are computed.
        """
        a, c, n, *_, one = coefficients
        weights = [w for module in modules for w in module.parameters() if w.requires_grad]
        rng_state = self.rng.get_rng_state() if self.dropout else None
        saved = []                              # per slice: the graph of f, if stored, and the bits cut off
        for p, v in self.slices(by_token, self.p, self.v):                  # (S, T, C) each: S sequences
            x, fx = self.evaluate(f, p)
            self.watch(p, v, fx.detach(), [[0, abs(n), 0], [1, abs(a), abs(c) * one]])
            cut_off = self.model.kick(v, fx.detach(), coefficients)         # v = -a * v + c * f(p)
            p.add_(v)                                                       # p = p + v
            saved.append(((x, fx) if store_graph else None, cut_off))
            del x, fx                           # frees the graph, unless it is stored, before the next one
        self.depth += 1
        depth = self.depth

        def down(g_handle):
            if self.dropout:
                rng_state_now = self.rng.get_rng_state()
                self.rng.set_rng_state(rng_state)                           # the same masks again
            if self.g_v is None:                # in the top step; in turn() g would still take memory
                self.g_v = torch.zeros_like(self.g_p)
            g_weights = [None] * len(weights)
            for p, v, g_p, g_v in self.slices(by_token, self.p, self.v, self.g_p, self.g_v):
                graph, cut_off = saved.pop(0)
                p.sub_(v)                                                   # p = p - v
                x, fx = graph or self.evaluate(f, p)                        # f(p), once per step
                self.model.unkick(v, fx.detach(), cut_off, coefficients)    # v = (v - c * f(p)) / -a
                g_v.add_(g_p)                                               # g_v = g_v + g_p
                with torch.enable_grad():       # a root that makes c * g_v when it is due, and keeps none
                    root = Backward.apply(fx.new_zeros(()), lambda g: [(c * g_v).to(g.dtype)], fx)
                del fx, graph
                g_x, *g_w = torch.autograd.grad(root, (x, *weights))
                g_p.add_(g_x)                                               # g_p = g_p + c * J^T g_v
                multiply(g_v, -a)                                           # g_v = -a * g_v
                pairs = zip(g_weights, g_w)
                g_weights = [more if g is None else g.add_(more) for g, more in pairs]  # of all slices
                del g_w
            if self.dropout:
                self.rng.set_rng_state(rng_state_now)
            if depth == 1:                                                  # at the bottom
                self.end()
                g_handle = self.g_p                                         # dL/dx
            return g_handle, *g_weights

        return Backward.apply(handle.new_zeros(()), down, handle, *weights)

    def last(self, handle):
        """The last p as floats (B, T, C); NaN if an f(p) was not finite, or a state may have wrapped."""
        def turn(g):
            # autograd may still need g, and the steps change g_p in place
            self.g_p = g.clone(memory_format=torch.contiguous_format)
            return [g.new_zeros(())]

        last = to_float(self.p, self.one, self.dtype)
        if not self.p.dtype.is_floating_point:
            largest = self.largest()
            del self.looks, self.bounds         # the tape outlives this call
            self.model.largest = largest.clamp(min=self.model.largest)
            last.add_(torch.where(largest <= 0.999, 0.0, math.nan))         # an if would wait for the GPU
        return Backward.apply(last, turn, handle)

    def slices(self, by_token, *tensors):
        """Views: what changes them changes the whole."""
        if by_token:
            tensors = [x.view(-1, 1, x.size(2)) for x in tensors]           # sequences of one token
        n = 1 if self.cache else n_slices(*tensors[0].shape[:2], self.model.config.slice_tokens)
        return zip(*(x.tensor_split(n) for x in tensors))

    def evaluate(self, f, p):
        """
        (x, f(x)), where x is p (S, T, C) as floats. The way up builds the graph too: without it attention and
        torch.compile may choose kernels that round differently from those of the way down.
        """
        x = to_float(p, self.one, self.dtype).requires_grad_()
        with torch.enable_grad(), torch.autocast(**self.autocast):
            return x, f(x, self.cache)

    def watch(self, p, v, fx, bounds):
        """
        Integers wrap silently, and know no inf or NaN. So this looks at what goes into a step. Two rows of
        bounds, factors of |p|, |v| and |f(p)|, give two sums that have to fit.
        """
        if not self.p.dtype.is_floating_point:
            self.looks += *p.aminmax(), *v.aminmax(), *fx.aminmax()
            self.bounds.append(bounds)

    def largest(self):
        """The largest |n v| or |p| + |a v| + |c f(p)| of all steps, as a part of the integers' range."""
        like = torch.zeros((), dtype=wide(self.dtype), device=self.p.device)
        looks = torch.stack((*self.looks, like))[:-1]                       # min and max of p, v and f(p)
        sizes = looks.abs().view(-1, 1, 3, 2).amax(-1)                      # (looks, 1, 3)
        bounds = torch.tensor(self.bounds, dtype=like.dtype).to(like.device, non_blocking=True)
        return (bounds * sizes).sum(-1).amax() / 2**(torch.iinfo(self.p.dtype).bits - 1)

    def end(self):
        """v is 0 again, unless an f(p) was other than on the way up: the steps below cannot undo that."""
        if self.model.config.verify and self.model.config.exact:
            self.model.mismatches += self.v.count_nonzero()

def n_slices(B, T, slice_tokens):
    """B * T / slice_tokens, and at most B; up to twice that, if then all are equal: one size to compile."""
    least = min(B, math.ceil(B * T / slice_tokens))
    return next((n for n in range(least, 2 * least) if B % n == 0), least)

# -----------------------------------------------------------------------------
# what the loss is made of

def cross_entropy(logits, targets):
    return F.cross_entropy(logits, targets, ignore_index=-1, reduction='sum')

def chunk_loss(ln_f, criterion, x, weight, *rows):          # x (n, C), weight (V, C), rows (n, ...)
    return criterion(F.linear(ln_f(x), weight).to(wide(x.dtype)), *rows)            # logits (n, V)

def head(weight):
    """
    The weight (V, C) of the logits, a leaf. Under autocast it is cast, without its mean row: that moves all
    logits of a token alike, so the loss is the same. GPT-2's lie near -100, where bfloat16 has steps of 0.5.
    """
    kind = weight.device.type
    leaf = weight.detach()
    if torch.is_autocast_enabled(kind) and weight.dtype != torch.float64:       # autocast leaves that alone
        leaf = (leaf - leaf.mean(0)).to(torch.get_autocast_dtype(kind))
    return leaf.requires_grad_(weight.requires_grad)
