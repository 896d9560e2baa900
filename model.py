"""
A GPT whose backward pass rebuilds its activations instead of storing them. All of the mathematics is in this file.

In GPT-2 a block adds its output to the state p: p_next = p + f(p). From p_next alone p cannot be recovered,
so backpropagation stores all activations. Now let depth be time, and keep two states, which both start as the
embedding:

    p_next = a * p_prev + b * p + c * f(p)              forward: advance() below
    p_prev = (p_next - b * p - c * f(p)) / a            backward: rebuild() below

The second line is the first, solved for p_prev. So the forward pass keeps only the last two states. The backward pass walks
down the steps, evaluates f(p) once per step, and uses it twice: to rebuild p_prev, and for the gradients. Rounding would make
rebuilt states drift from the true ones. So states are fixed-point numbers in int64: adding integers can be undone exactly.

The schemes are those of Gal, Eliasof, Turek, Ascher, Treister and Haber, "Reversing Large Language Models for Efficient
Training and Fine-Tuning" (arXiv 2512.02056), "the paper" below. The transformer is nanoGPT's, or Llama's.
"""
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from configurator import check_config

# -----------------------------------------------------------------------------
# the schemes: (a, h) of a layer -> (a, b, c) of the recurrence, with a + b = 1. h is the step size. Only midpoint_a has an a to choose

SCHEMES = {
    'standard':   lambda a, h: (0, 1, 1),          # forward Euler, p + f(p): GPT-2 itself, not reversible
    'midpoint':   lambda a, h: (1, 0, 2 * h),      # paper eq. 2.4
    'midpoint_a': lambda a, h: (a, 1 - a, h),      # paper eq. 3.6
    'leapfrog':   lambda a, h: (-1, 2, h * h),     # paper eq. 2.6: the wave equation, p'' = f(p)
    'symplectic': lambda a, h: (1, 0, 1),          # paper eq. 2.8, 2.9: two steps per layer, f is attention, then MLP
    'midpoint_sum': lambda a, h: (1, 0, 1),        # paper section 4, for trained nets: f is the previous block plus this one
}
DEFAULT_H = {'midpoint': 0.125, 'midpoint_a': 0.25, 'leapfrog': 0.25}        # at 12 layers; the evidence for them is weak: see RESULTS.md

class Coefficients(NamedTuple):
    """
    The coefficients of one step: a = n / 2^bits, b = m / 2^bits, and c. States are integers, so n and m are whole. bits is 0
    except in midpoint_a, where a may be a fraction. Dividing n * p_prev + m * p by 2^bits cuts off that many bits per element.
    rebuild() needs these bits, so ctx.saved keeps them. For a = -3/4: n = -3, bits = 2, and as b = 1 - a = 7/4, m = 7.
    """
    n: int          # with float states (exact=False) n is a itself, m is b, and bits is 0
    m: int
    c: float
    bits: int
    inverse: float  # 1 / n; for integer states an integer, modulo 2^64

@dataclass
class GPTConfig:
    block_size: int = 1024                  # longest context, in tokens
    vocab_size: int = 50304                 # GPT-2's 50257, padded to a multiple of 64 for speed
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True                       # biases in linear layers and layer norms, as in GPT-2
    norm: str = 'layernorm'                 # GPT-2's; Llama's is 'rmsnorm'
    norm_eps: float = 1e-5
    mlp: str = 'gelu'                       # GPT-2's; Llama's is 'swiglu'
    n_inner: int | None = None              # width of the MLP; None: 4 * n_embd
    n_kv_head: int | None = None            # key and value heads, if fewer than query heads (grouped-query attention); None: n_head
    rope_theta: float | None = None         # base of rotary positions (Llama); None: learned positions (GPT-2)
    tied: bool = True                       # the embedding matrix is also the output head's (weight tying)
    scheme: str = 'leapfrog'                # a key of SCHEMES
    h: float | list | None = None           # step size, a number or one per layer; None: DEFAULT_H, if the scheme has h
    a: float | list | str | None = None     # midpoint_a: a number, or one per layer; None or 'random': drawn as in the paper; or 'bdia'
    stored_layers: int | None = None        # how many of the last layers store their activations; None: all in 'standard', else 0
    exact: bool = True                      # states are integers, rebuilt bit for bit; False: floats
    verify: bool = True                     # after backward, compare the two rebuilt first states (not if embedding and layer 0 are frozen)
    slice_tokens: int = 8192                # f sees about this many tokens per call, in whole sequences: the graph of f takes the most memory

    def __post_init__(self):
        self.n_inner, self.n_kv_head = self.n_inner or 4 * self.n_embd, self.n_kv_head or self.n_head
        if self.stored_layers is None:
            self.stored_layers = self.n_layer if self.scheme == 'standard' else 0
        self.h = DEFAULT_H.get(self.scheme) if self.h is None and self.a != 'bdia' else self.h
        self.a = 'random' if self.a is None and self.scheme == 'midpoint_a' else self.a
        check_config(self, SCHEMES, DEFAULT_H)                  # ValueError if the settings are invalid
        if self.a == 'random':                  # drawn here, once; paper section 3: E[a] = 0, forward Euler on average
            sign = torch.randint(2, (self.n_layer,), device='cpu') * 2 - 1
            a = sign + torch.rand(self.n_layer, device='cpu') - 0.5
            self.a = (a * 4).round().div(4).tolist()            # the paper does not round to quarters: 0 to 2 bits per element

    def coefficients(self):
        """
        The Coefficients of every layer. In BDIA (arXiv 2407.09093) a is 1/2 or -1/2 at random, and h = 1 + a. Here every call
        draws one a per layer, so the sequences of a micro-batch share it; in the BDIA paper every sequence has its own.
        """
        result, a, h = [], self.a, self.h
        if a == 'bdia':
            a = (torch.randint(2, (self.n_layer,), device='cpu') - 0.5).tolist()
            h = [1 + x for x in a]
        for a, h in zip(*(v if isinstance(v, list) else [v] * self.n_layer for v in (a, h))):
            a, b, c = SCHEMES[self.scheme](a, h)
            n, denominator = float(a).as_integer_ratio() if self.exact else (a, 1)      # denominator: a power of two; n: odd, or 0
            m = int(b * denominator) if self.exact else b
            inverse = (integer_inverse(n) if self.exact else 1 / n) if n else 0             # standard cannot be undone
            result.append(Coefficients(n, m, c, denominator.bit_length() - 1, inverse))
        return result

# -----------------------------------------------------------------------------
# the transformer: GPT-2, with nanoGPT's names, and Llama

def rotate(x, theta, first):
    """
    Rotary positions (arXiv 2104.09864) for x (B, nh, T, hs), whose first token has position first. At position t, channels i
    and i + hs/2, paired as in transformers' Llama, are rotated by the angle t * theta^(-2i / hs).
    """
    T, hs = x.shape[-2:]
    frequency = theta ** (-torch.arange(0, hs, 2, device=x.device).float() / hs)                # (hs/2)
    angle = torch.arange(first, first + T, device=x.device)[:, None] * frequency                # (T, hs/2)
    cos, sin = angle.cos(), angle.sin()
    x1, x2 = x.chunk(2, dim=-1)                                                                 # (B, nh, T, hs/2) each
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)

class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head, self.hs = config.n_head, config.n_kv_head, config.n_embd // config.n_head
        heads = config.n_head + 2 * config.n_kv_head            # of queries, keys and values, in this order
        self.c_attn = nn.Linear(config.n_embd, heads * self.hs, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.theta, self.dropout = config.rope_theta, config.dropout

    def forward(self, x, cache=None):
        B, T, C = x.size()                                      # sequences, tokens, channels: GPT-2 has T 1024, C 768
        first = cache.tokens if cache else 0                    # a cache holds earlier keys and values: sample.py
        qkv = self.c_attn(x).view(B, T, -1, self.hs).transpose(1, 2)                            # (B, heads, T, hs)
        q, k, v = qkv.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=1)               # (B, nh or nkv, T, hs)
        if self.theta is not None:
            q, k = rotate(q, self.theta, first), rotate(k, self.theta, first)
        if cache:
            k, v = cache.extend(k, v)
        if self.n_kv_head < self.n_head:                        # each head of keys and values serves a group of queries
            k, v = (y.repeat_interleave(self.n_head // self.n_kv_head, dim=1) for y in (k, v))  # (B, nh, T, hs)
        # if a cache holds earlier tokens, there is a single new one, and it sees all of them; otherwise attention is causal
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout * self.training, is_causal=first == 0)
        y = self.c_proj(y.transpose(1, 2).flatten(2))           # (B, nh, T, hs) -> (B, T, C): heads side by side again
        return F.dropout(y, self.dropout, self.training)

class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gated, self.dropout = config.mlp == 'swiglu', config.dropout
        self.c_fc = nn.Linear(config.n_embd, (1 + self.gated) * config.n_inner, bias=config.bias)
        self.c_proj = nn.Linear(config.n_inner, config.n_embd, bias=config.bias)

    def forward(self, x):
        x = self.c_fc(x)                                        # (B, T, n_inner), twice that if gated
        if self.gated:
            gate, x = x.chunk(2, dim=-1)                        # (B, T, n_inner) each
            x = F.silu(gate) * x                                # SwiGLU, arXiv 2002.05202
        else:
            x = F.gelu(x, approximate='tanh')                   # GPT-2's GELU is the tanh approximation
        return F.dropout(self.c_proj(x), self.dropout, self.training)

def norm(config):
    return (nn.RMSNorm(config.n_embd, config.norm_eps) if config.norm == 'rmsnorm' else
            nn.LayerNorm(config.n_embd, config.norm_eps, bias=config.bias))

class Block(nn.Module):
    """nanoGPT's Block minus the residual: f(p) = Attn(LN1(p)) + MLP(LN2(p + Attn(LN1(p)))), which is paper eq. 2.5."""
    def __init__(self, config):
        super().__init__()
        self.ln_1 = norm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = norm(config)
        self.mlp = MLP(config)

    def attention(self, x, cache=None):
        return self.attn(self.ln_1(x), cache)

    def feedforward(self, x, cache=None):                       # the cache is for attention alone
        return self.mlp(self.ln_2(x))

    def forward(self, x, cache=None):
        y = self.attention(x, cache)
        return y + self.feedforward(x + y)                      # nanoGPT's Block also adds x

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.coefficients = config.coefficients()
        self.recurrence, self.chunk_loss = (advance, rebuild), chunk_loss       # runtime.py's compile_parts() replaces them
        self.mismatches = 0                                     # wrong elements, counted by verify(), read by agree() of runtime.py
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            **({} if config.rope_theta else dict(wpe=nn.Embedding(config.block_size, config.n_embd))),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),      # GPT-2's name: config.h is a step size
            ln_f=norm(config),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.transformer.wte.weight   # one matrix embeds tokens and makes logits
        for name, weight in self.named_parameters():            # GPT-2's initialisation
            if name.endswith('bias'):
                nn.init.zeros_(weight)
            elif weight.dim() == 2:                             # c_proj: GPT-2 adds up the outputs of 2 n_layer of them
                deep = math.sqrt(2 * config.n_layer) if name.endswith('c_proj.weight') else 1.0
                nn.init.normal_(weight, std=0.02 / deep)

    def forward(self, idx, targets=None, *criterion, cache=None):
        """
        idx (B, T) tokens -> (logits of the last position (B, 1, V), None). With targets (B, T), where -1 is ignored:
        (None, mean cross entropy in nats per target), or the mean of another criterion: see loss().
        """
        x = self.last_state(idx, cache)                                                     # (B, T, C)
        if targets is None:
            return self.lm_head(self.transformer.ln_f(x[:, -1:])), None
        return None, self.loss(x, targets, *criterion)

    def hidden(self, idx):
        """idx (B, T) tokens -> (B, T, C) after the final norm; lm_head turns them into logits."""
        return self.transformer.ln_f(self.last_state(idx))

    def last_state(self, idx, cache=None):
        """idx (B, T) tokens -> (B, T, C) before the final norm. With a filled cache (of sample.py) idx is one token."""
        first, T = cache.tokens if cache else 0, idx.size(1)
        if first + T > self.config.block_size:
            raise ValueError(f'a sequence of {first + T} tokens is longer than block_size = {self.config.block_size}')
        x = self.transformer.wte(idx)                                                       # (B, T, C)
        if self.config.rope_theta is None:
            x = x + self.transformer.wpe(torch.arange(first, first + T, device=idx.device))
        return self.integrate(self.transformer.drop(x), cache)

    @torch.compiler.disable     # it cannot trace states that change in place; runtime.py compiles the parts
    def integrate(self, x, cache=None):
        """From the embedding to the last state, both (B, T, C): nanoGPT's loop over the blocks."""
        config, with_grad = self.config, torch.is_grad_enabled()
        first_stored = config.n_layer - config.stored_layers
        if config.scheme == 'standard' or (config.a == 'bdia' and not self.training):   # evaluated, BDIA has E[a] = 0, h = 1
            for j, f, _ in self.steps():                        # checkpoint() drops the graph of f, and builds it again in backward
                x = x + (f(x, cache) if j >= first_stored or not with_grad else checkpoint(f, x, use_reentrant=False))
            return x

        if config.a == 'bdia':
            self.coefficients = config.coefficients()           # drawn anew
        # The tape holds states and gradients. Autograd sees only a chain of handles, x and then dummy zeros, which fixes the order:
        # LastState.backward() puts dL/dp on the tape, each step's backward() moves it one layer down, the first step's returns dL/dx.
        tape = Tape(self, x, cache)
        handle = x
        for j, f, modules in self.steps():
            weights = [w for module in modules for w in module.parameters() if with_grad and w.requires_grad]
            handle = ReversibleStep.apply(handle, tape, f, self.coefficients[j], j >= first_stored and with_grad, *weights)
        return LastState.apply(handle, tape)

    def steps(self):
        """(layer, f, the modules with f's weights) of every step, in the order of depth."""
        blocks = self.transformer.h
        for j, (block, before) in enumerate(zip(blocks, [None, *blocks])):
            if self.config.scheme == 'symplectic':
                yield j, block.attention, (block.ln_1, block.attn)
                yield j, block.feedforward, (block.ln_2, block.mlp)
            elif self.config.scheme == 'midpoint_sum' and before:
                # f(p) = p_next - p_prev is the sum of two blocks. The defaults hold this step's blocks: the loop goes on
                yield j, lambda x, cache=None, f=before, g=block: f(x, cache) + g(x, cache), (before, block)
            else:
                yield j, block, (block,)

    def loss(self, x, targets, criterion=None, *others, chunk=1024):
        """
        Mean loss of x (B, T, C) from last_state(). A criterion maps (logits (N, V), targets (N), *others (N, ...)) to the sum of
        N losses. Adding one number to all logits of a row must not change it: see head(). others are (B, T, ...) here.
        """
        norm, with_grad = self.transformer.ln_f, torch.is_grad_enabled()
        return ChunkedLoss.apply(x.flatten(0, 1), self.lm_head.weight, [y.flatten(0, 1) for y in (targets, *others)],
                                 lambda *chunks: self.chunk_loss(norm, criterion or cross_entropy, *chunks),
                                 (targets != -1).sum(), chunk, with_grad,
                                 *(w for w in norm.parameters() if with_grad and w.requires_grad))

    @classmethod
    def from_pretrained(cls, name_or_folder, **overrides):
        """A model from the Hugging Face hub, a folder of save_pretrained(), or a checkpoint (ours or nanoGPT's): see pretrained.py."""
        from pretrained import build
        return build(name_or_folder, **overrides)[0]

    def generate(self, idx, max_new_tokens, **kwargs):
        """
        idx (B, T) tokens -> (B, T + max_new_tokens): idx, then the tokens of stream() in sample.py. Call model.eval() first: in
        training mode dropout is active, and BDIA draws its a at random.
        """
        from sample import stream
        return torch.cat((idx, *stream(self, idx, max_new_tokens, **kwargs)), dim=1)

# -----------------------------------------------------------------------------
# the reversible step, with its backward pass written by hand

class ReversibleStep(torch.autograd.Function):
    """
    One step of the recurrence: handle = ReversibleStep.apply(handle, tape, f, coefficients, store_graph, *weights of f).

    The tape has two states, and in the backward pass their gradients g = dL/dp. With J = df/dp, a step computes

        g_prev  = a * g_next
        g      += b * g_next + c * J^T g_next       one vector-Jacobian product; it yields the weights' gradients too

    It is += because p was the p_prev of the step above, which has left its g_prev in g. The weights are arguments so that autograd
    gets their gradients step by step, even if the embedding is frozen: DistributedDataParallel sends some while others are computed.
    """

    @staticmethod
    def forward(ctx, handle, tape, f, coefficients, store_graph, *weights):
        ctx.tape, ctx.depth, ctx.f, ctx.coefficients = tape, tape.depth, f, coefficients
        ctx.autocast = tape.autocast(weights)
        ctx.rng_state = tape.generator.get_rng_state() if tape.dropout else None
        ctx.save_for_backward(*weights)         # no copies; autograd raises an error if they change before backward
        ctx.saved = []                          # per slice: the graph of f, if it is stored, and the bits that were cut off
        for p_prev, p in tape.slices(tape.lower, tape.upper):                   # (S, T, C) each: S sequences
            x, fx = build_graph(ctx, p)                                         # p as floats and f(p), (S, T, C) each
            tape.watch(coefficients, fx.detach())
            _, cut_off = tape.advance(p_prev, p, fx.detach(), coefficients)     # p_next, in the memory of p_prev
            ctx.saved.append(((x, fx) if store_graph else None, cut_off))
            del x, fx                           # frees the graph, unless it is stored, before the next one is built
        # (lower, upper) was (p_prev, p) before the loop, and is (p, p_next) after this swap
        tape.lower, tape.upper, tape.depth = tape.upper, tape.lower, ctx.depth + 1
        return handle.new_zeros(())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, zero):
        tape, weights, (n, m, c, bits, _) = ctx.tape, ctx.saved_tensors, ctx.coefficients
        if tape.depth != ctx.depth + 1:
            raise RuntimeError('an earlier backward pass has used up these states: run forward again')
        a, b, g_weights = n / 2**bits, m / 2**bits, None
        if tape.g_lower is None:                # the top step comes first: nothing has been added to the gradient of its p yet
            tape.g_lower = torch.zeros_like(tape.g_upper)
        with torch.random.fork_rng([zero.device] * (tape.kind != 'cpu'), enabled=tape.dropout, device_type=tape.kind):
            if tape.dropout:                    # draw the same masks again; fork_rng() then restores the generator
                tape.generator.set_rng_state(ctx.rng_state)
            slices = tape.slices(tape.lower, tape.upper, tape.g_lower, tape.g_upper)
            for (graph, cut_off), (p, p_next, g, g_next) in zip(ctx.saved, slices):             # (S, T, C) each
                x, fx = graph or build_graph(ctx, p)                            # f(p), once per step
                tape.rebuild(p_next, p, fx.detach(), cut_off, ctx.coefficients)     # p_prev, in the memory of p_next
                c_vjp, *g_w = torch.autograd.grad(fx, (x, *weights), (c * g_next).to(fx.dtype))     # c * J^T g_next
                g += c_vjp.add_(g_next, alpha=b) if b else c_vjp                # g += b * g_next + c * J^T g_next
                if a != 1: g_next *= a                                          # g_prev, in the memory of g_next
                g_weights = [one + other for one, other in zip(g_weights, g_w)] if g_weights else g_w
        # (lower, upper) was (p, p_next) before the loop, and is (p_prev, p) after this swap; likewise the gradients
        tape.lower, tape.upper, tape.depth = tape.upper, tape.lower, ctx.depth
        tape.g_lower, tape.g_upper = tape.g_upper, tape.g_lower
        ctx.saved = None                        # the loss may outlive this pass, and would keep these alive
        g_handle = zero
        if not ctx.needs_input_grad[0] or ctx.depth == 0:       # the bottom step: all below is frozen, or x was both states, p_{-1} and p_0
            g_handle = tape.g_upper.add_(tape.g_lower)
            if ctx.depth == 0: tape.verify()
            tape.lower = tape.upper = tape.g_lower = tape.g_upper = None        # for the same reason as ctx.saved
        return g_handle, None, None, None, None, *g_weights

class LastState(torch.autograd.Function):
    """The last handle -> the last state (B, T, C), as floats. backward() puts its gradient on the tape."""

    @staticmethod
    def forward(ctx, handle, tape):
        ctx.tape = tape
        return tape.last_state()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        ctx.tape.g_upper = g.clone()            # a copy: autograd may still need g, and the steps change g_upper in place
        return g.new_zeros(()), None

def build_graph(ctx, p):
    """
    (x, f(x)), where x is the state p (S, T, C) as floats. Forward builds the graph between them even if it is not stored: without
    a graph, attention and torch.compile may choose kernels that round differently, and backward would get other bits.
    """
    x = to_float(p, ctx.tape.dtype).requires_grad_()
    with torch.enable_grad(), torch.autocast(**ctx.autocast):
        return x, ctx.f(x, ctx.tape.cache)

def n_slices(B, T, slice_tokens):
    """The number of slices: equal ones if fewer than twice the least number will do, since torch.compile compiles once per size."""
    least = min(B, math.ceil(B * T / slice_tokens))
    return next((n for n in range(least, 2 * least) if B % n == 0), least)

class Tape:
    """
    The two states, and their gradients. The forward pass moves the pair up through the layers, the backward pass down again. f
    treats each sequence on its own, so a step goes slice by slice. Unless it is stored, a graph of f exists for one slice at a time.
    """
    def __init__(self, model, x, cache):
        self.model, self.cache = model, cache
        self.lower = to_state(1, x, torch.int64 if model.config.exact else wide(x.dtype))
        self.upper, self.depth = self.lower.clone(), 0          # (B, T, C). The paper does not define p_{-1}: it is p_0 here
        self.g_lower, self.g_upper, self.dtype = None, None, x.dtype
        (self.advance, self.rebuild), self.dropout = model.recurrence, model.config.dropout > 0 and model.training
        self.kind = x.device.type
        self.generator = torch if self.kind == 'cpu' else torch.get_device_module(self.kind)        # has get_rng_state(), set_rng_state()
        self.n_slices = 1 if cache else n_slices(*x.shape[:2], model.config.slice_tokens)   # a cache covers the whole batch
        self.norms = [(None, torch.linalg.vector_norm(x.detach(), dtype=wide(x.dtype)))]    # of p_0, then of every f(p)

    def slices(self, *tensors):
        return zip(*(x.tensor_split(self.n_slices) for x in tensors))

    def autocast(self, weights):
        """Autocast's settings, for backward, which runs outside it. In training its cache is off: it would keep all cast weights alive."""
        return dict(device_type=self.kind, dtype=torch.get_autocast_dtype(self.kind), cache_enabled=not weights,
                    enabled=torch.is_autocast_enabled(self.kind))

    def watch(self, coefficients, fx):
        """Integers have no inf or NaN, and wrap silently. So the norms of f(p) are recorded, as floats."""
        if self.lower.dtype == torch.int64:
            self.norms.append((coefficients, torch.linalg.vector_norm(fx, dtype=wide(fx.dtype))))

    def verify(self):
        """Both states began as p_0, so with the first step undone they must be equal. Steps are one-to-one: a wrong bit cannot vanish."""
        if self.model.config.verify and self.lower.dtype == torch.int64:
            self.model.mismatches += sum((p_prev != p).sum() for p_prev, p in self.slices(self.lower, self.upper))

    def last_state(self):
        """The last state as floats (B, T, C): NaN if an f(p) was inf or NaN, or if an element may have left the range of integers."""
        last = to_float(self.upper, self.dtype)
        if self.upper.dtype == torch.int64:
            last.add_(torch.where(self.bound() < 2**31, 0.0, math.nan))         # an if would wait for the GPU
        self.norms.clear()
        return last

    def bound(self):
        """
        No element of a state, or of n * p_prev + m * p, is larger than this in absolute value. The norm of f(p) bounds its elements.
        As a + b = 1, the difference d = p - p_prev becomes d_next = -a * d + c * f(p), and a state is p_0 plus all differences so far.
        So one f(p) adds at most |c| * gain * its norm to any state: gain is 1 in the last step, else 1 + |a| * gain of the step above.
        """
        (_, bound), *norms = self.norms         # norms has one entry per slice and step
        gain, a_above, widest = 1.0, 0.0, 1
        for i in reversed(range(0, len(norms), self.n_slices)):                 # the first slice of every step
            n, m, c, bits, _ = norms[i][0]
            gain, a_above, widest = 1 + a_above * gain, abs(n) / 2**bits, max(widest, abs(n) + abs(m))
            bound = bound + abs(c) * gain * torch.stack([norm for _, norm in norms[i:i + self.n_slices]]).max()
        return widest * bound

# -----------------------------------------------------------------------------
# the states: int64 with 32 fractional bits, because floats cannot undo an addition and integers can.
# The functions take float states (exact=False) as well; rebuilt states then drift, as in the paper.

ONE = 2**32         # the number 1: a state spans -2^31 to 2^31 in steps of 2^-32

def advance(p_prev, p, fx, coefficients):
    """p_next = a * p_prev + b * p + c * f(p) in the memory of p_prev, and the bits that were cut off; states (S, T, C)."""
    n, m, c, bits, _ = coefficients
    s = p_prev                                              # each line is one pass over memory: the ifs skip multiplying by 1 and adding 0
    if n == -1: s.neg_()                                    # n * p_prev; on integers neg_ is four times as fast as mul_
    elif n != 1: s.mul_(n)
    if m != 0: s.add_(p, alpha=m)                           # + m * p
    cut_off = pack(s, bits) if bits else None
    if bits: s.bitwise_right_shift_(bits)                   # / 2^bits
    return s.add_(to_state(c, fx, s.dtype)), cut_off        # + c * f(p)

def rebuild(p_next, p, fx, cut_off, coefficients):
    """p_prev = (p_next - b * p - c * f(p)) / a in the memory of p_next: advance() undone, its last line first."""
    n, m, c, bits, inverse = coefficients
    s = p_next.sub_(to_state(c, fx, p_next.dtype))          # - c * f(p)
    if bits: s.bitwise_left_shift_(bits).bitwise_or_(unpack(cut_off, bits, s.shape))       # * 2^bits
    if m != 0: s.sub_(p, alpha=m)                           # - m * p
    if n == -1: s.neg_()                                    # / n
    elif n != 1: s.mul_(inverse)
    return s

def integer_inverse(n):
    """1 / n in int64, which computes modulo 2^64: every odd n has an inverse there (check_config refuses even ones)."""
    return (pow(n, -1, 2**64) + 2**63) % 2**64 - 2**63

def wide(dtype):
    return torch.promote_types(dtype, torch.float32)        # at least float32: states would overflow float16

def to_state(c, x, dtype):
    """c * x as a state, in new memory."""
    x = x.detach().to(wide(x.dtype), copy=True).mul_(c * ONE if dtype == torch.int64 else c)
    return x.round_().long() if dtype == torch.int64 else x

def to_float(p, dtype):
    return p.to(wide(dtype)).mul_(1 / ONE).to(dtype) if p.dtype == torch.int64 else p.to(dtype, copy=True)

def pack(s, bits):
    """The low bits of every element of s, in slots of 1, 2, 4 or 8 bits, several slots to a byte."""
    slot = 1 << (bits - 1).bit_length()
    low = (s & (2**bits - 1)).to(torch.uint8).flatten()
    low = F.pad(low, (0, -low.numel() % (8 // slot))).view(-1, 8 // slot)
    return (low << torch.arange(0, 8, slot, dtype=torch.uint8, device=s.device)).sum(1, dtype=torch.uint8)      # slots do not overlap

def unpack(packed, bits, shape):
    """What pack() packed, as int64 of this shape."""
    slot = 1 << (bits - 1).bit_length()
    low = packed[:, None] >> torch.arange(0, 8, slot, dtype=torch.uint8, device=packed.device)
    return (low & (2**bits - 1)).flatten()[:math.prod(shape)].view(shape).long()

# -----------------------------------------------------------------------------
# the loss: the logits of 1024 tokens at GPT-2's vocabulary take 200 MB in float32, many times the states

def head(weight):
    """
    The weight (V, C) of the logits, detached. Under autocast its mean row is subtracted, and it has autocast's dtype. That shifts all
    logits of a token by the same number, so loss and gradients do not change. Logits near -100, as in GPT-2, have steps of 0.5 in bfloat16.
    """
    kind, weight = weight.device.type, weight.detach()
    if not torch.is_autocast_enabled(kind) or weight.dtype == torch.float64:        # autocast leaves float64 alone
        return weight
    return (weight - weight.mean(0)).to(torch.get_autocast_dtype(kind))

def cross_entropy(logits, targets):
    return F.cross_entropy(logits, targets, ignore_index=-1, reduction='sum')

def chunk_loss(norm, criterion, x, weight, *rows):              # x (n, C), weight (V, C), rows (n, ...)
    return criterion(F.linear(norm(x), weight).to(wide(x.dtype)), *rows)                    # logits (n, V)

class ChunkedLoss(torch.autograd.Function):
    """
    The sum of f(x, weight, *rows) over chunks of x (N, C) and rows (N, ...), divided by count. The gradients of a chunk are
    computed while its logits exist: logits never outlive their chunk, and are never computed twice. Sums are in float32 or wider.
    """

    @staticmethod
    def forward(ctx, x, weight, rows, f, count, chunk, with_grad, *norm_weights):
        w, dtype = head(weight), wide(x.dtype)
        leaves = [w.requires_grad_(), *norm_weights] if with_grad and weight.requires_grad else norm_weights
        total = torch.zeros((), dtype=dtype, device=x.device)
        grad_x = torch.empty_like(x, dtype=dtype) if with_grad else None
        grads = [torch.zeros_like(leaf, dtype=dtype) for leaf in leaves]
        for i in range(0, len(x), chunk):
            x_i = x[i:i + chunk].detach().requires_grad_(with_grad)
            with torch.set_grad_enabled(with_grad):
                loss = f(x_i, w, *(y[i:i + chunk] for y in rows))                           # of one chunk
            total += loss.detach()
            if with_grad:
                grad_x[i:i + chunk], *new = torch.autograd.grad(loss, (x_i, *leaves))
                for grad, g in zip(grads, new):
                    grad += g
        ctx.grads = [g.div_(count) for g in (grad_x, *grads)] if with_grad else None
        return total / count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        if ctx.grads is None:
            raise RuntimeError('an earlier backward pass has used up these gradients: run forward again')
        grad_x, *grads = (grad.mul_(g) for grad in ctx.grads)   # in place: they may be the largest tensors of all
        ctx.grads = None
        return grad_x, grads.pop(0) if ctx.needs_input_grad[1] else None, None, None, None, None, None, *grads
