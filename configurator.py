"""
The command line and the choice of device, shared by the scripts. The knobs of a script are the fields of one flat dataclass.
Files and flags set them, in the order given; the last one wins:

    python train.py config/gpt2_rev.py                          # a file of lines "name = value"
    python train.py config/gpt2_rev.py --batch_size=8           # and one of its values changed
    python train.py --scheme=midpoint_a --a=[0.5,0.5,1,1]       # lists without spaces, text without quotes
    python train.py --help                                      # the knobs, their defaults and what they mean

Nothing is executed: a config file may hold comments and literal values, and nothing else.
"""
import ast
import difflib
import inspect
import math
import os
import sys
from dataclasses import fields
from typing import get_args

import torch

def configure(knobs, argv):
    """An instance of the dataclass knobs with the values from argv. An error in argv ends the program with one sentence."""
    types, values = {field.name: field.type for field in fields(knobs)}, {}
    for arg in argv:
        if arg in ('-h', '--help'):
            print_help(knobs)
            sys.exit()
        if not arg.startswith('--'):
            settings = read_file(arg)
        elif '=' not in arg:
            sys.exit(f'{arg} has no value: write {arg}=VALUE')
        else:
            name, text = arg[2:].split('=', 1)
            settings = [(name, text if types.get(name) is str else literal(text))]
        for name, value in settings:
            if name not in types:
                near = difflib.get_close_matches(name, types, n=1, cutoff=0)
                sys.exit(f"unknown name '{name}' in {arg}: did you mean '{near[0]}'? --help lists them all")
            values[name] = checked(name, value, types[name])
    return knobs(**values)

def print_help(knobs):
    """Prints the fields of the class and then those that it inherits, with their comments, as the source has them."""
    shown = set()
    for cls in knobs.__mro__[:-1]:
        for line in inspect.getsource(cls).split('\n    def ')[0].splitlines():
            if line.split(':')[0].strip() not in shown:
                print(line)
        shown |= cls.__annotations__.keys()

def literal(text):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):       # of literals too long or too deep
        return text                 # text without quotes, such as the scheme's name

def read_file(path):
    """The (name, value) lines of a config file."""
    if not os.path.isfile(path):
        sys.exit(f'there is no config file {path}: flags start with --, as in --batch_size=8')
    with open(path, encoding='utf-8') as file:
        try:
            return [(target.id, ast.literal_eval(line.value)) for line in ast.parse(file.read()).body
                    if not (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))    # a docstring
                    for target in line.targets]
        except (AttributeError, ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            sys.exit(f'{path} may hold comments and lines such as "batch_size = 8", and nothing else')

def checked(name, value, kind):
    """The value, if it is of this kind (a type or a union of types); a whole number will do for a float."""
    kinds = get_args(kind) or (kind,)
    if any(type(x) is int and x.bit_length() > 63 for x in (value if isinstance(value, list) else [value])):
        sys.exit(f'{name} is too large: whole numbers must be below 2^63')
    if type(value) is int and int not in kinds and float in kinds:
        return float(value)
    if type(value) not in kinds:
        expected = ' or '.join('None' if k is type(None) else k.__name__ for k in kinds)
        sys.exit(f'{name} = {value!r} is of type {type(value).__name__}: expected {expected}')
    return value

def machine(device, dtype):
    """The names of device and dtype, with 'auto' decided, and a line that says why they are what they are."""
    why_device = why_dtype = 'as asked'
    if device == 'auto':
        device, why_device = (('cuda', 'there is a GPU') if torch.cuda.is_available() else
                              ('mps', 'there is an Apple GPU') if torch.backends.mps.is_available() else
                              ('cpu', 'there is no GPU'))
    for name, value, choices in (('device', device, ('cuda', 'mps', 'cpu')),
                                 ('dtype', dtype, ('auto', 'float32', 'bfloat16', 'float16'))):
        if value not in choices:
            sys.exit(f"{name} = '{value}': choose one of {', '.join(choices)}")
    if device == 'cuda' and not torch.cuda.is_available() or device == 'mps' and not torch.backends.mps.is_available():
        sys.exit(f"device = '{device}' is not on this machine, or this torch was built without it: try --device=cpu")
    if dtype == 'auto':
        dtype, why_dtype = (('float32', f'the safe choice on {device}') if device != 'cuda' else
                            ('bfloat16', 'this GPU computes in it') if torch.cuda.get_device_capability() >= (8, 0) else
                            ('float16', 'with a gradient scaler: this GPU does not compute in bfloat16'))
    return device, dtype, f'device {device} ({why_device}), dtype {dtype} ({why_dtype})'

def check_config(config, schemes, default_h):
    """Raises a ValueError of one sentence if no model can have this GPTConfig: checks the sizes, and what the scheme needs."""
    def must(right, sentence):
        if not right:
            raise ValueError(sentence)

    must(config.scheme in schemes, f"unknown scheme '{config.scheme}': choose one of {', '.join(schemes)}")
    for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'n_inner', 'n_kv_head', 'slice_tokens'):
        size = getattr(config, name)
        must(isinstance(size, int) and size >= 1, f'{name} = {size!r} must be a whole number, 1 or more')
    must(0 <= config.dropout < 1, f'dropout = {config.dropout} must be 0 or more, and below 1')
    for name, parts in (('n_embd', 'n_head'), ('n_head', 'n_kv_head')):
        size, n = getattr(config, name), getattr(config, parts)
        must(size % n == 0, f'{name} = {size} must be divisible by {parts} = {n}')
    weights = config.n_embd * (config.n_layer * (2 * config.n_embd + 2 * config.n_inner) + config.vocab_size + config.block_size)
    must(config.n_layer <= 10000, f'n_layer = {config.n_layer} must be 10000 or less')
    must(weights < 2**40, f'n_layer = {config.n_layer}, n_embd = {config.n_embd}, n_inner = {config.n_inner}, '
         f'vocab_size = {config.vocab_size}, block_size = {config.block_size}: too many weights for any machine, choose smaller sizes')
    hs = config.n_embd // config.n_head
    must(config.rope_theta is None or hs % 2 == 0 and config.rope_theta > 0,
         f'rotary positions need an even n_embd / n_head, not {hs}, and a rope_theta above 0, not {config.rope_theta}')
    for name, choices in (('norm', ('layernorm', 'rmsnorm')), ('mlp', ('gelu', 'swiglu'))):
        must(getattr(config, name) in choices, f"unknown {name} '{getattr(config, name)}': choose {' or '.join(choices)}")
    must(0 <= config.stored_layers <= config.n_layer,
         f'stored_layers = {config.stored_layers} must lie between 0 and n_layer = {config.n_layer}')
    must(config.h is None or config.scheme in default_h, f"scheme '{config.scheme}' has no step size: leave h out")
    must(config.h is None or config.a != 'bdia', "a = 'bdia' has h = 1 + a: leave h out")
    must(config.a is None or config.scheme == 'midpoint_a',
         f"scheme '{config.scheme}' has a fixed a: leave a out, or use scheme 'midpoint_a'")
    for name, value in (('h', config.h), ('a', config.a)):
        numbers = value if isinstance(value, list) else [value] * config.n_layer
        must(len(numbers) == config.n_layer,
             f'{name} has {len(numbers)} numbers: give one, or n_layer = {config.n_layer} of them')
        if value is None or name == 'a' and value in ('random', 'bdia'):
            continue
        must(all(isinstance(x, (int, float)) and math.isfinite(x) for x in numbers),
             f"{name} = {value!r}: give a number or a list of them" + ", or 'random' or 'bdia'" * (name == 'a'))
        for a in numbers if name == 'a' else ():
            n, power = float(a).as_integer_ratio()              # in lowest terms; of a float it is over a power of two
            must(not config.exact or n % 2 == 1 and power <= 256,
                 f'a = {a} cannot be undone exactly: it must be an odd number over a power of two up to 256, such as 1, '
                 '-0.5 = -1/2 or 0.75 = 3/4')
            must(a != 0, 'a = 0 forgets p_prev, so no backward pass can rebuild it: give another a')
