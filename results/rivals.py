"""
What bench.py sets beside the reversible model: checkpointing in slices, nanoGPT's own model, and revlib.
"""
import runpy
from contextlib import nullcontext
from functools import partial

import torch
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.checkpoint import checkpoint

from model import n_slices

def checkpoint_in_slices(model, slice_tokens, dtype, host, x, cache):
    """
    GPT.integrate() of standard, x (B, T, C) -> (B, T, C), with a residual stream of this dtype. Each block is
    evaluated again for one slice at a time. What is kept for that, x, may be moved to the host meanwhile.
    """
    keep = nullcontext()
    if host:
        keep = save_on_cpu(pin_memory=True)
        count = _get_current_dispatch_mode()                    # None, unless this step is counted
        if count:
            keep = saved_tensors_hooks(partial(count.move, 'host'), partial(count.move, 'activations'))
    # no bench has dropout, so no state of random numbers need be kept
    checkpointed = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    x = x.to(dtype)
    slices = n_slices(*x.shape[:2], slice_tokens)
    for j, block in enumerate(model.transformer.h):
        if j >= model.config.n_layer - model.config.stored_layers:
            x = x + block(x)
        else:
            with keep:
                x = x + torch.cat([checkpointed(block, part) for part in x.tensor_split(slices)])
        torch.clear_autocast_cache()            # or the cast weights of all blocks would stay for the loss
    return x

def revlib(model):
    """The GPT.integrate() of the package revlib, with our blocks:  pip install revlib"""
    import revlib
    stack = revlib.ReversibleSequential(*model.transformer.h, split_dim=-1)
    return lambda x, cache: stack(torch.cat((x, x), dim=-1)).chunk(2, dim=-1)[1]

def nanogpt(path, config):
    """The GPT of nanoGPT's model.py, which is there. Its weights have our names."""
    its = runpy.run_path(path)
    names = vars(its['GPTConfig']())
    model = its['GPT'](its['GPTConfig'](**{name: getattr(config, name) for name in names}))
    model.config = config
    model.compile_parts = model.compile         # its train.py compiles the whole
    return model
