"""
A GPT whose backward pass rebuilds its activations instead of storing them. All of the model is in this file.

Depth is time: p_j, of shape (B, T, C), is the state that enters layer j, and f is what a transformer block adds to it.
Every scheme is the same two-step recurrence, and what steps forward can be solved for where it came from:

    p_next = a * p_prev + b * p + c * f(p)              forward: advance() below
    p_prev = (p_next - b * p - c * f(p)) / a            backward: rebuild() beneath it

So only the last two states are kept. The backward pass walks down the stack, evaluates f once a layer, and uses that
one value twice: to rebuild p_prev, and for the gradients.

The schemes are those of Gal, Eliasof, Turek, Ascher, Treister and Haber, "Reversing Large Language Models for
Efficient Training and Fine-Tuning" (arXiv 2512.02056), "the paper" below; the shape of the code is nanoGPT's.
"""
import math
import os
import zipfile
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn as nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# -----------------------------------------------------------------------------
# the schemes: (a, b, c) of the recurrence, from the a and the step size h that a layer is given

SCHEMES = {
    'standard':   lambda a, h: (0, 1, 1),          # forward Euler, p + f(p): GPT-2 itself, not reversible
    'midpoint':   lambda a, h: (1, 0, 2 * h),      # paper eq. 2.4
    'midpoint_a': lambda a, h: (a, 1 - a, h),      # paper eq. 3.6
    'leapfrog':   lambda a, h: (-1, 2, h * h),     # paper eq. 2.6: the wave equation, p'' = f(p)
    'symplectic': lambda a, h: (1, 0, 1),          # paper eq. 2.8 and 2.9: f is attention and MLP in turn
    'midpoint_sum': lambda a, h: (1, 0, 1),        # paper section 4, to convert trained nets: f is the sum of two blocks
}
DEFAULT_H = {'midpoint': 0.125, 'midpoint_a': 0.25, 'leapfrog': 0.25}        # the best of RESULTS.md's comparison

@dataclass
class GPTConfig:
    block_size: int = 1024                  # longest context, in tokens
    vocab_size: int = 50304                 # GPT-2's 50257, padded to a multiple of 64 for speed
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True                       # in linear layers and layer norms, as GPT-2 has them
    norm: str = 'layernorm'                 # this and the next six describe GPT-2; Llama has 'rmsnorm',
    norm_eps: float = 1e-5
    mlp: str = 'gelu'                       # 'swiglu',
    n_inner: int | None = None              # another width of the MLP; None: 4 * n_embd
    n_kv_head: int | None = None            # fewer heads for keys and values than for queries; None: n_head
    rope_theta: float | None = None         # rotary positions to this base; None: learned positions
    tied: bool = True                       # and sometimes a head of its own, not tied to the embedding
    scheme: str = 'leapfrog'                # a key of SCHEMES
    h: float | list | None = None           # step size, a number or one a layer; None: the scheme's DEFAULT_H
    a: float | list | str | None = None     # midpoint_a: a number or one a layer; None is 'random', as in the paper
    stored_layers: int | None = None        # the last k layers keep their graph; None: 0, and all of 'standard'
    exact: bool = True                      # states in fixed point, rebuilt bit for bit; False: in floats

    def __post_init__(self):
        if self.scheme not in SCHEMES:
            raise ValueError(f"unknown scheme '{self.scheme}': choose one of {', '.join(SCHEMES)}")
        self.n_inner, self.n_kv_head = self.n_inner or 4 * self.n_embd, self.n_kv_head or self.n_head
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'n_inner', 'n_kv_head'):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f'{name} = {getattr(self, name)!r} must be a whole number, 1 or more')
        if not 0 <= self.dropout < 1:
            raise ValueError(f'dropout = {self.dropout} must be 0 or more, and below 1')
        if self.n_embd % self.n_head:
            raise ValueError(f'n_embd = {self.n_embd} must be divisible by n_head = {self.n_head}')
        if self.n_head % self.n_kv_head:
            raise ValueError(f'n_head = {self.n_head} must be divisible by n_kv_head = {self.n_kv_head}')
        if self.rope_theta is not None and (self.n_embd // self.n_head % 2 or not self.rope_theta > 0):
            raise ValueError(f'rotary positions need an even n_embd / n_head, not {self.n_embd // self.n_head}, and a '
                             f'rope_theta above 0, not {self.rope_theta}')
        for name, choices in (('norm', ('layernorm', 'rmsnorm')), ('mlp', ('gelu', 'swiglu'))):
            if getattr(self, name) not in choices:
                raise ValueError(f"unknown {name} '{getattr(self, name)}': choose {' or '.join(choices)}")
        if self.stored_layers is None:
            self.stored_layers = self.n_layer if self.scheme == 'standard' else 0
        if not 0 <= self.stored_layers <= self.n_layer:
            raise ValueError(f'stored_layers = {self.stored_layers} must lie between 0 and n_layer = {self.n_layer}')
        if self.h is not None and self.scheme not in DEFAULT_H:
            raise ValueError(f"scheme '{self.scheme}' has no step size: leave h out")
        if self.a is not None and self.scheme != 'midpoint_a':
            raise ValueError(f"scheme '{self.scheme}' has a fixed a: leave a out, or use scheme 'midpoint_a'")
        self.h = DEFAULT_H.get(self.scheme) if self.h is None else self.h
        self.a = 'random' if self.a is None and self.scheme == 'midpoint_a' else self.a
        for name, value in (('h', self.h), ('a', self.a)):
            numbers = value if isinstance(value, list) else [value] * self.n_layer
            if len(numbers) != self.n_layer:
                raise ValueError(f'{name} has {len(numbers)} numbers: give one, or n_layer = {self.n_layer} of them')
            if value not in (None, 'random' if name == 'a' else None) and not all(
                    isinstance(x, (int, float)) and math.isfinite(x) for x in numbers):
                raise ValueError(f"{name} = {value!r}: give a number or a list of them" + ", or 'random'" * (name == 'a'))
        if self.a != 'random':
            self.coefficients()             # complains about an a that cannot be undone

    def coefficients(self):
        """(n, m, k, c) of every layer, for advance(): a = n / 2^k, b = m / 2^k. ValueError if a has no such form."""
        result = []
        for a, h in zip(*(v if isinstance(v, list) else [v] * self.n_layer for v in (self.a, self.h))):
            a, b, c = SCHEMES[self.scheme](a, h)
            n, m, k = a, b, 0
            if self.exact and self.scheme != 'standard':
                n, denominator = float(a).as_integer_ratio()    # in lowest terms; of a float it is a power of two
                m, k = int(b * denominator), denominator.bit_length() - 1
                if n % 2 == 0 or k > 8:
                    raise ValueError(f'a = {a} cannot be undone exactly: it must be an odd number over a power of two '
                                     'up to 256, such as 1, -0.5 = -1/2 or 0.75 = 3/4')
            elif a == 0 and self.scheme != 'standard':
                raise ValueError('a = 0 forgets p_prev, and no backward pass can rebuild it')
            result.append((n, m, k, c))
        return result

# -----------------------------------------------------------------------------
# the states: int64 with 32 fractional bits, because floats cannot undo an addition and integers can.
# The functions take float states (exact=False) as well; the rebuilt ones then drift, as the paper's do.

ONE = 2**32         # the number 1 in fixed point: a state spans -2^31 to 2^31 in steps of 2^-32

def to_state(c, x, dtype):
    """c * x in the states' dtype, in memory of its own."""
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32), copy=True)
    return x.mul_(c * ONE).round_().long() if dtype == torch.int64 else x.mul_(c)

def to_float(p, dtype):
    wide = torch.promote_types(dtype, torch.float32)        # float16 ends at 65504, long before 2^32
    return (p * torch.tensor(1 / ONE, dtype=wide)).to(dtype) if p.dtype == torch.int64 else p.to(dtype, copy=True)

def combine(n, x, m, y):
    """n * x + m * y in the memory of x. It is passes over memory that cost, so 1 * x and 0 * y are left out."""
    x = x if n == 1 else x.mul_(n)
    return x if m == 0 else x.add_(y, alpha=m)

def advance(p_prev, p, fx, n, m, k, c):
    """
    p_next = a * p_prev + b * p + c * f(p), in the memory of p_prev, and the bits that the way back needs.
    a = n / 2^k and b = m / 2^k. Where a is a fraction, the sum s is divided by 2^k with a shift; the k bits of each
    element that fall off its end are kept.
    """
    s = combine(n, p_prev, m, p)
    bits = pack(s, k) if k else None
    return (s.bitwise_right_shift_(k) if k else s).add_(to_state(c, fx, s.dtype)), bits

def rebuild(p_next, p, fx, bits, n, m, k, c):
    """
    p_prev = (p_next - b * p - c * f(p)) / a, in the memory of p_next: advance() undone, last operation first.
    int64 computes modulo 2^64, where every odd n has an inverse: the division by n is a multiplication, and exact.
    """
    s = p_next.sub_(to_state(c, fx, p.dtype))
    s = s.bitwise_left_shift_(k).bitwise_or_(unpack(bits, k, s.shape)) if k else s
    return combine(signed(pow(n, -1, 2**64)) if s.dtype == torch.int64 else 1 / n, combine(1, s, -m, p), 0, p)

def signed(n):
    """The integer n modulo 2^64, as int64 holds it."""
    return (n + 2**63) % 2**64 - 2**63

def pack(s, k):
    """The low k bits of every element of s, in slots of 1, 2, 4 or 8 bits, several slots to a byte."""
    slot = 1 << (k - 1).bit_length()
    low = (s & (2**k - 1)).to(torch.uint8).flatten()
    low = F.pad(low, (0, -low.numel() % (8 // slot))).view(-1, 8 // slot)
    return (low << torch.arange(0, 8, slot, dtype=torch.uint8, device=s.device)).sum(1, dtype=torch.uint8)

def unpack(bits, k, shape):
    """The int64 tensor of this shape whose elements are the k-bit numbers that pack() packed."""
    slot = 1 << (k - 1).bit_length()
    low = bits[:, None] >> torch.arange(0, 8, slot, dtype=torch.uint8, device=bits.device)
    return (low & (2**k - 1)).flatten()[:math.prod(shape)].view(shape).long()

# -----------------------------------------------------------------------------
# the hand-written backward

def rng(device):
    """The module that holds the random number generator of this kind of device."""
    return torch if device.type == 'cpu' else torch.get_device_module(device)

def evaluate(f, p, autocast):
    """
    p as the leaf of a graph of its own, and f(p) on top of it. The forward pass builds that graph too, only to drop
    it: attention and torch.compile may choose other kernels, with other rounding, where no gradient is wanted.
    """
    p = p.detach().requires_grad_()
    with torch.enable_grad(), torch.autocast(**autocast):
        return p, f(p)

SLICE = 8192        # tokens, about: the batch is cut into this many of them, in whole sequences, and f sees one slice at a time

class ReversibleStep(torch.autograd.Function):
    """
    One step: p_next = ReversibleStep.apply(p_prev, p, tape, f, (n, m, k, c), keep_graph, dropout, *weights of f).

    The states are on the tape, which holds two of them at any time: forward moves the pair up by one layer, backward
    moves it down again. The arguments p_prev and p, and the result, stand for them in autograd's eyes: (B, T, C) floats
    whose values nobody reads. With g for dL/dp, the adjoint of the recurrence is

        g_prev += a * g_next
        g      += b * g_next + c * J^T g_next          J = df/dp: one vector-Jacobian product

    and each += is autograd's own: p is an argument of this step and of the next, and the embedding is both p_prev and
    p of the first. The weights are arguments so that their gradients leave layer by layer: DistributedDataParallel
    then sends them while the layers below are still at work, and a frozen embedding changes nothing.

    A layer at work mostly needs memory for the graph of f. Sequences do not see each other in f, and g_next is known
    beforehand, so the batch goes through in slices, with the graph of one at a time.
    """

    @staticmethod
    def forward(ctx, p_prev, p, tape, f, coefficients, keep_graph, dropout, *weights):
        ctx.tape, ctx.f, ctx.coefficients, ctx.depth, ctx.dtype = tape, f, coefficients, tape.depth, p.dtype
        # What chooses the kernels must be the same when f is evaluated again. No cache in training: autocast would keep
        # a cast copy of every layer's weights until the script leaves its context.
        kind = p.device.type
        ctx.autocast = dict(device_type=kind, dtype=torch.get_autocast_dtype(kind),
                            enabled=torch.is_autocast_enabled(kind), cache_enabled=not weights)
        ctx.rng_state = rng(p.device).get_rng_state() if dropout else None
        # Saving the weights copies nothing. It makes autograd refuse a backward pass after they have been changed.
        ctx.save_for_backward(*weights)

        (n, m, k, c), ctx.slices = coefficients, []
        for s_prev, s in zip(tape.p_prev.chunk(tape.slices), tape.p.chunk(tape.slices)):
            x, fx = evaluate(f, to_float(s, p.dtype), ctx.autocast)
            tape.extremes += [c * extreme.float() for extreme in fx.detach().aminmax()] if s.dtype == torch.int64 else []
            _, bits = tape.advance(s_prev, s, fx.detach(), n, m, k, c)
            ctx.slices.append(((x, fx) if keep_graph else None, bits))
            del x, fx                       # the graph, before there is the next one
        tape.p_prev, tape.p, tape.depth = tape.p, tape.p_prev, tape.depth + 1
        return p.new_zeros(()).expand_as(p)         # of the size of one number

    @staticmethod
    @once_differentiable
    def backward(ctx, g_next):
        tape, weights, (n, m, k, c) = ctx.tape, ctx.saved_tensors, ctx.coefficients
        if tape.depth != ctx.depth + 1:
            raise RuntimeError('an earlier backward pass has used up these states: run forward again')
        generator = rng(g_next.device)
        if ctx.rng_state is not None:
            now = generator.get_rng_state()
            generator.set_rng_state(ctx.rng_state)
        g, g_weights, a, b = torch.empty_like(g_next), None, n / 2**k, m / 2**k
        for (graph, bits), s_next, s, g_s, g_s_next in zip(
                ctx.slices, *(whole.chunk(tape.slices) for whole in (tape.p, tape.p_prev, g, g_next))):
            x, fx = graph or evaluate(ctx.f, to_float(s, ctx.dtype), ctx.autocast)
            tape.rebuild(s_next, s, fx.detach(), bits, n, m, k, c)
            g_f, *new = torch.autograd.grad(fx, (x, *weights), (c * g_s_next).to(fx.dtype))
            torch.add(g_f, g_s_next, alpha=b, out=g_s)
            g_weights = [one + other for one, other in zip(g_weights, new)] if g_weights else new
        if ctx.rng_state is not None:
            generator.set_rng_state(now)
        tape.p_prev, tape.p, tape.depth = tape.p, tape.p_prev, ctx.depth
        ctx.slices = None                   # the loss may outlive this pass, and would keep them
        return g_next if a == 1 else a * g_next, g, None, None, None, None, None, *g_weights

# -----------------------------------------------------------------------------
# the loss: the logits of 1024 tokens at GPT-2's vocabulary take 200 MB in float32, many times the states

LOSS_CHUNK = 1024   # tokens whose logits exist at one time

def head(weight):
    """
    The weight (V, C) of a softmax's logits as a constant, in autocast's dtype. There it goes without the mean of its rows:
    that moves all logits of a token alike, which softmax does not see, and bfloat16 keeps more digits of the rest.
    """
    kind, weight = weight.device.type, weight.detach()
    if not torch.is_autocast_enabled(kind) or weight.dtype == torch.float64:        # which autocast leaves alone
        return weight
    return (weight - weight.mean(0)).to(torch.get_autocast_dtype(kind))

class ChunkedLoss(torch.autograd.Function):
    """
    The sum over chunks of criterion(logits of the chunk, its rows), divided by count. The logits are x @ weight.T, x (N, C),
    weight (V, C), up to a number for each row that softmax does not see; rows is a slice of N. The gradients of a chunk
    are computed while its logits are there, so no logits outlive their chunk and none are computed twice. Sums are in
    float32 (or wider), and divided at the very end. x is cast by hand: autocast's cache would keep each chunk's gradient.
    """

    @staticmethod
    def forward(ctx, x, weight, criterion, count, chunk, with_grad):
        wide = torch.promote_types(x.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=x.device)
        grad_x = torch.zeros_like(x, dtype=wide) if with_grad else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if with_grad and weight.requires_grad else None
        w = head(weight).requires_grad_(grad_weight is not None)
        for i in range(0, len(x), chunk):
            rows = slice(i, i + chunk)
            with torch.set_grad_enabled(with_grad):
                x_i = x[rows].detach().requires_grad_(with_grad)
                loss = criterion(F.linear(x_i.to(w.dtype), w).to(wide), rows)               # logits (chunk, V)
            total += loss.detach()
            if with_grad:
                loss.backward(inputs=[x_i] + [w] * w.requires_grad)
                grad_x[rows] = x_i.grad
                if grad_weight is not None:
                    grad_weight += w.grad
                    w.grad = None
        if with_grad:
            ctx.save_for_backward(*(None if g is None else g.div_(count) for g in (grad_x, grad_weight)))
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        grad_x, grad_weight = ctx.saved_tensors
        return g * grad_x, None if grad_weight is None else g * grad_weight, None, None, None, None

# -----------------------------------------------------------------------------
# GPT-2, with nanoGPT's names, and Llama

def rotate(x, theta, first):
    """
    Rotary positions (arXiv 2104.09864) of x (B, nh, T, hs), the first of which is given: at position t, channels i and
    i + hs/2 turn by the angle t * theta^(-2i / hs). Which channels make a pair is a matter of convention; this is that of
    Llama's public weights.
    """
    T, hs = x.shape[-2:]
    frequency = theta ** (-torch.arange(0, hs, 2, device=x.device).float() / hs)                # (hs/2)
    angle = torch.arange(first, first + T, device=x.device)[:, None] * frequency                # (T, hs/2)
    cos, sin = angle.cos(), angle.sin()
    x1, x2 = x.chunk(2, dim=-1)                                                                 # (B, nh, T, hs/2) each
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)

class Cache:
    """
    For sampling: the keys and values of all tokens so far, of every evaluation of attention in the order of depth. What
    a token's states are, in any scheme, depends on other tokens through these alone.
    """

    def __init__(self, length):
        self.length, self.tokens, self.depth, self.layers = length, 0, 0, []

    def extend(self, *new):
        """Keys and values (B, nkv, T, hs) of the next T tokens -> those of all tokens so far."""
        if self.depth == len(self.layers):
            self.layers.append([x.new_empty(*x.shape[:2], self.length, x.size(3)) for x in new])
        layer, end = self.layers[self.depth], self.tokens + new[0].size(2)
        for kept, x in zip(layer, new):
            kept[:, :, self.tokens:end] = x.detach()
        self.depth += 1
        return [kept[:, :, :end] for kept in layer]

class CausalSelfAttention(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head, self.hs = config.n_head, config.n_kv_head, config.n_embd // config.n_head
        heads = config.n_head + 2 * config.n_kv_head            # of queries, keys and values, in this order
        self.c_attn = nn.Linear(config.n_embd, heads * self.hs, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.theta, self.dropout = config.rope_theta, config.dropout

    def forward(self, x, cache=None):
        B, T, _ = x.size()                                      # batch, tokens: 12, 1024 in GPT-2
        first = cache.tokens if cache else 0                    # position of the first
        qkv = self.c_attn(x).view(B, T, -1, self.hs).transpose(1, 2)                            # (B, heads, T, hs)
        q, k, v = qkv.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=1)               # (B, nh or nkv, T, hs)
        if self.theta is not None:
            q, k = rotate(q, self.theta, first), rotate(k, self.theta, first)
        if cache:
            k, v = cache.extend(k, v)
        if self.n_kv_head < self.n_head:                        # each head of keys and values serves a group of queries
            k, v = (y.repeat_interleave(self.n_head // self.n_kv_head, dim=1) for y in (k, v))  # (B, nh, T, hs)
        dropout = self.dropout if self.training else 0.0
        # without a past every token sees those before it; with one there is one new token, and it sees all
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=first == 0)    # (B, nh, T, hs)
        y = self.c_proj(y.transpose(1, 2).flatten(2))           # (B, T, C): the heads side by side again
        return F.dropout(y, self.dropout, self.training)

class MLP(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.gated, self.dropout = config.mlp == 'swiglu', config.dropout
        self.c_fc = nn.Linear(config.n_embd, (1 + self.gated) * config.n_inner, bias=config.bias)
        self.c_proj = nn.Linear(config.n_inner, config.n_embd, bias=config.bias)

    def forward(self, x):
        x = self.c_fc(x)                                        # (B, T, 4C)
        if self.gated:
            gate, x = x.chunk(2, dim=-1)                        # (B, T, n_inner) each
            x = F.silu(gate) * x                                # SwiGLU, arXiv 2002.05202
        else:
            x = F.gelu(x, approximate='tanh')                   # GPT-2's GELU is the tanh one
        return F.dropout(self.c_proj(x), self.dropout, self.training)

def norm(config):
    if config.norm == 'rmsnorm':
        return nn.RMSNorm(config.n_embd, config.norm_eps)
    return nn.LayerNorm(config.n_embd, config.norm_eps, bias=config.bias)

class Block(nn.Module):
    """A pre-norm block as the increment f(p) = Attn(LN1(p)) + MLP(LN2(p + Attn(LN1(p)))): paper eq. 2.5."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = norm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = norm(config)
        self.mlp = MLP(config)

    def attention(self, x, cache=None):
        return self.attn(self.ln_1(x), cache)

    def feedforward(self, x):
        return self.mlp(self.ln_2(x))

    def forward(self, x, cache=None):
        y = self.attention(x, cache)
        return y + self.feedforward(x + y)

class GPT(nn.Module):

    advance, rebuild = staticmethod(advance), staticmethod(rebuild)     # compile() puts fused kernels in their places

    def __init__(self, config):
        super().__init__()
        if config.a == 'random':                                # paper section 3: E[a] = 0, forward Euler on average
            sign = torch.randint(2, (config.n_layer,)) * 2 - 1
            a = sign + torch.rand(config.n_layer) - 0.5
            config = replace(config, a=(a * 4).round().div(4).tolist())                 # quarters: two bits an element
        self.config = config
        self.coefficients = config.coefficients()
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            **({} if config.rope_theta else dict(wpe=nn.Embedding(config.block_size, config.n_embd))),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=norm(config),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.transformer.wte.weight   # one matrix reads tokens in and out
        for name, weight in self.named_parameters():            # GPT-2's initialisation
            if name.endswith('bias'):
                nn.init.zeros_(weight)
            elif weight.dim() == 2:                             # 2 n_layer outputs are added up into the last state
                deep = math.sqrt(2 * config.n_layer) if name.endswith('c_proj.weight') else 1.0
                nn.init.normal_(weight, std=0.02 / deep)

    def steps(self, cache):
        """(f, its weights, its coefficients, its layer) of every step, in the order of depth."""
        for j, (block, coefficients) in enumerate(zip(self.transformer.h, self.coefficients)):
            if self.config.scheme == 'symplectic':
                attention = partial(block.attention, cache=cache)
                yield attention, (*block.ln_1.parameters(), *block.attn.parameters()), coefficients, j
                yield block.feedforward, (*block.ln_2.parameters(), *block.mlp.parameters()), coefficients, j
            elif self.config.scheme == 'midpoint_sum' and j:
                def f(x, pair=(self.transformer.h[j - 1], block)):
                    return pair[0].forward(x, cache) + pair[1].forward(x, cache)

                yield f, (*self.transformer.h[j - 1].parameters(), *block.parameters()), coefficients, j
            else:
                yield partial(block.forward, cache=cache), tuple(block.parameters()), coefficients, j

    @torch.compiler.disable
    def integrate(self, x, cache=None):
        """From the embedding to the last state, both (B, T, C)."""
        config, grad = self.config, torch.is_grad_enabled()
        first_stored = config.n_layer - config.stored_layers
        if config.scheme == 'standard':
            for f, _, _, j in self.steps(cache):
                x = x + (f(x) if j >= first_stored or not grad else checkpoint(f, x, use_reentrant=False))
            return x

        dtype = torch.int64 if config.exact else torch.promote_types(x.dtype, torch.float32)
        tape = SimpleNamespace(p_prev=to_state(1, x, dtype), p=to_state(1, x, dtype), depth=0,
                               extremes=[x.detach().float().abs().max()], advance=self.advance, rebuild=self.rebuild,
                               slices=1 if cache else math.ceil(x.size(0) * x.size(1) / SLICE))     # a cache is of all rows
        p_prev = p = x                      # the paper leaves p_{-1} open: p_{-1} = p_0
        for f, weights, coefficients, j in self.steps(cache):
            weights = [w for w in weights if grad and w.requires_grad]
            p_prev, p = p, ReversibleStep.apply(p_prev, p, tape, f, coefficients, grad and j >= first_stored,
                                                config.dropout > 0 and self.training, *weights)
        # integers know neither inf nor NaN: an increment that was one, or is beyond 2^31, makes all of p NaN. A state
        # that finite increments carry beyond 2^31 (2^31 / n where a = n / 2^k) wraps around, and is not noticed
        last, largest = to_float(tape.p, x.dtype), torch.stack(tape.extremes).abs().max()
        tape.extremes.clear()
        return p + (last.add_(torch.where(largest < 2**31, 0.0, math.nan)) if config.exact else last)

    def hidden(self, idx, cache=None):
        """
        idx (B, T) tokens -> (B, T, C) after the final norm; logits of all positions are lm_head of it. With a cache, idx
        goes on where the last call stopped: any number of tokens at first, one at a time from then on.
        """
        B, T = idx.size()
        first = cache.tokens if cache else 0
        if first and T > 1:
            raise ValueError('with a past in the cache, give one token at a time')
        if first + T > self.config.block_size:
            raise ValueError(f'a sequence of {first + T} tokens is longer than block_size = {self.config.block_size}')
        x = self.transformer.wte(idx)                                                       # (B, T, C)
        if self.config.rope_theta is None:
            x = x + self.transformer.wpe(torch.arange(first, first + T, device=idx.device))
        x = self.transformer.ln_f(self.integrate(self.transformer.drop(x), cache))
        if cache:
            cache.tokens, cache.depth = first + T, 0
        return x

    def forward(self, idx, targets=None, criterion=None, cache=None):
        """
        idx (B, T) -> (logits of the last position (B, 1, V), None); with targets (B, T), of which those of -1 are
        left out, (None, mean cross entropy in nats per target), or the mean of another criterion, as loss() takes it.
        """
        x = self.hidden(idx, cache)
        if targets is None:
            return self.lm_head(x[:, [-1]]), None
        return None, self.loss(x, targets, criterion=criterion)

    def loss(self, x, targets, chunk=LOSS_CHUNK, criterion=None):
        """Mean loss of x (B, T, C) from hidden(). A criterion has (logits (N, V), slice of B * T) -> sum of losses."""
        targets = targets.flatten()
        criterion = criterion or (lambda logits, rows: F.cross_entropy(logits, targets[rows], ignore_index=-1,
                                                                       reduction='sum'))
        return ChunkedLoss.apply(x.flatten(0, 1), self.lm_head.weight, criterion, (targets != -1).sum(), chunk,
                                 torch.is_grad_enabled())

    @classmethod
    def from_pretrained(cls, name_or_folder, **overrides):
        """GPT-2, TinyLlama or SmolLM2 from the hub, a folder of save_pretrained, or nanoGPT's ckpt.pt: pretrained.py."""
        from pretrained import build
        return build(name_or_folder, **overrides)[0]

    def compile(self, **kwargs):
        """torch.compile of every f, and of the recurrence, a dozen small operations, into one kernel each way."""
        # with dynamic=None a kernel for all shapes, compiled on the way, may take over from the one that forward began with
        for block in self.transformer.h:
            for name in ('attention', 'feedforward') if self.config.scheme == 'symplectic' else ('forward',):
                setattr(block, name, torch.compile(getattr(block, name), dynamic=False, **kwargs))
        self.advance, self.rebuild = (torch.compile(f, dynamic=False, **kwargs) for f in (advance, rebuild))

    def count_parameters(self):
        return sum(weight.numel() for weight in self.parameters())

    def optimizer(self, weight_decay, learning_rate, betas, **kwargs):
        """AdamW that decays matrices and leaves biases and norms alone."""
        weights = [w for w in self.parameters() if w.requires_grad]
        groups = [dict(params=[w for w in weights if w.dim() >= 2], weight_decay=weight_decay),
                  dict(params=[w for w in weights if w.dim() < 2], weight_decay=0.0)]
        fused = weights[0].device.type == 'cuda'
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused, **kwargs)

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, vocab_size=None, cached=True):
        """
        Yields the max_new_tokens tokens (B, 1) that go on from idx (B, T), one after the other. Temperature 0 takes the
        likeliest token, top_k draws from the k likeliest; tokens from vocab_size on, which only pad the vocabulary, are
        never drawn. Keys and values are cached up to block_size tokens. Beyond, or with cached=False, the last block_size
        tokens are computed anew for each, since the window moves, and with it everything in it.
        """
        block_size, new = self.config.block_size, idx
        cache = Cache(min(block_size, idx.size(1) + max_new_tokens))
        for _ in range(max_new_tokens):
            if cached and idx.size(1) <= block_size:
                logits = self(new, cache=cache)[0]
            else:
                logits = self(idx[:, -block_size:])[0]
            logits = logits[:, -1, :vocab_size]                                             # (B, V)
            if top_k is not None:
                kth = logits.topk(min(top_k, logits.size(-1))).values[:, [-1]]
                logits = logits.masked_fill(logits < kth, -math.inf)
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)
            else:
                logits = logits.float() - logits.max(-1, keepdim=True).values       # none overflows, however cold
                new = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1)
            idx = torch.cat((idx, new), dim=1)
            yield new

    def generate(self, idx, max_new_tokens, **kwargs):
        """idx (B, T) tokens -> (B, T + max_new_tokens): idx, and what stream() yields."""
        return torch.cat((idx, *self.stream(idx, max_new_tokens, **kwargs)), dim=1)

# -----------------------------------------------------------------------------
# checkpoints

def save_checkpoint(path, checkpoint):
    """Writes the dict under another name, and renames it once it is on the disk: there is never half a checkpoint."""
    with open(f'{path}.part', 'wb') as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f'{path}.part', path)

def load_checkpoint(path, device='cpu'):
    """The dict of save_checkpoint. ValueError if there is no such file, or if not all of it is as it was written."""
    if not os.path.isfile(path):
        raise ValueError(f'there is no checkpoint {path}')
    try:                                    # what damage raises depends on the byte; torch.load reads no checksums
        with zipfile.ZipFile(path) as file:
            checkpoint = None if file.testzip() else torch.load(path, map_location=device, weights_only=True)
    except Exception:
        checkpoint = None
    if not isinstance(checkpoint, dict) or not {'model', 'config', 'meta'} <= checkpoint.keys():
        raise ValueError(f'{path} is damaged, cut off or no checkpoint of ours: use another one')
    return checkpoint
