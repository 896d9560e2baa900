"""
The command line of the scripts. Files and flags set the knobs, fields of a dataclass; the last one wins:

    python train.py config/gpt2_rev.py --batch_size=8       # a file of lines "name = value", then a flag
    python train.py --scheme=midpoint_a --a=[0.5,1]         # lists without spaces, text without quotes
    python train.py --help                                  # the knobs, their defaults and what they mean
"""
import ast
import difflib
import inspect
import operator
import os
import re
import sys
import traceback
from contextlib import suppress
from pathlib import Path

RANGES = [              # the least and the largest value of these knobs
    (1, 10**8, 'batch_size block_size gradient_accumulation_steps eval_interval eval_windows log_interval'),
    (1, 10**8, 'vocab_size n_head n_embd n_inner n_kv_head slice_tokens spread_windows top_k'),
    (1, 10**5, 'n_layer num_samples max_new_tokens repeats'),
    (1e-9, 1e12, 'lr_decay_iters rope_theta memory_gb'),
    (0, 10**12, 'max_iters warmup_iters'),
    (0, 1e30, 'learning_rate min_lr weight_decay grad_clip temperature seed'),
    (0, 0.99999, 'beta1 beta2 dropout'),
    (0, 1, 'anneal_part data_weight land_part'),
    (0, 8, 'bits anneal_from'),
]
CHOICES = dict(device=['auto', 'cuda', 'mps', 'cpu'], dtype=['auto', 'float32', 'bfloat16', 'float16'],
               norm=['layernorm', 'rmsnorm'], mlp=['gelu', 'swiglu'], gelu=['erf', 'tanh'], sign=[1, -1],
               conversion=['midpoint_a', 'midpoint_sum', 'symplectic'])
INSTEAD = dict(         # of names in nanoGPT, and in older versions of this repository
    eval_iters='eval_windows, in sequences', eval_only='evaluate.py', wandb_log='log.csv of out_dir',
    prompt='start', always_save_checkpoint='', wandb_project='', wandb_run_name='', backend='', compile='')

def configure(Knobs, argv):
    """An instance of the dataclass Knobs with the values from argv."""
    sys.excepthook = explain
    if '--help' in argv or '-h' in argv:
        sys.exit(print(inspect.getsource(Knobs)))
    types = inspect.get_annotations(Knobs)
    values = {}
    for arg in argv:
        values.update(read_flag(arg, types) if arg.startswith('--') else read_file(arg, types))
    unknown = [advice(name, types) for name in values if name not in types]
    if unknown:
        raise ValueError(f"unknown here: {', '.join(unknown)}; --help lists what is known")
    return Knobs(**{name: checked(name, value, types[name]) for name, value in values.items()})

def advice(name, types):
    if name in INSTEAD:
        here = re.split(r'[ ,]', INSTEAD[name])[0]                      # a knob of this script, or a file
        return f'{name} (use {INSTEAD[name]})' if here in types or '.' in here else f'{name} (leave it out)'
    near = difflib.get_close_matches(name, [*types, *INSTEAD], n=1, cutoff=0.8)     # a slip, not another word
    return f'{name} (did you mean {near[0]}?)' if near else name

def read_flag(arg, types):
    name, equals, value = arg[2:].partition('=')
    if not equals:
        raise ValueError(f'{arg} has no value: write {arg}=VALUE')
    if types.get(name) is not str:
        with suppress(Exception):           # what is no number, list or such stays text
            value = ast.literal_eval(value)
    return {name: value}

def read_file(path, types):
    """The names and values of a config file, which is not executed."""
    if not Path(path).is_file():
        raise ValueError(f'there is no config file {path}: flags start with --, as in --batch_size=8')
    content = Path(path).read_bytes()
    values = {}
    number = None
    try:
        code = ast.parse(content)
        for line in code.body[1:] if ast.get_docstring(code) else code.body:
            number = line.lineno
            if not isinstance(line, ast.Import):            # which nothing here needs
                for target in line.targets:
                    values[target.id] = value_of(line.value) if target.id in types else None
    except Exception as error:              # other code may raise anything here
        where = f'line {number or getattr(error, "lineno", 1)} of {path}'
        raise ValueError(f'{where} is not of the kind "n_layer = 8", as all but comments must be') from None
    return values

def value_of(node):
    """A literal, or a product of numbers such as 5 * 8."""
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Mult):
        return ast.literal_eval(node)
    return operator.index(value_of(node.left)) * operator.index(value_of(node.right))

def checked(name, value, right):
    """The value, if it is of the right type and in its range. A whole number will do for a float."""
    if type(value) is int and value.bit_length() > 63:
        raise ValueError(f'{name} is too large: whole numbers must be below 2^63')
    if type(value) is int and not isinstance(value, right) and isinstance(1.0, right):
        value = float(value)
    if not isinstance(value, right) or (type(value) is bool and right is not bool):
        expected = inspect.formatannotation(right)
        raise ValueError(f'{name} = {value!r:.60} is of type {type(value).__name__}: expected {expected}')
    for least, most, names in RANGES:
        if name in names.split() and isinstance(value, (int, float)) and not least <= value <= most:
            raise ValueError(f'{name} = {value:.9g} must be from {least} to {most:.9g}')
    if value not in CHOICES.get(name, [value]):
        raise ValueError(f'{name} = {value!r}: choose one of {CHOICES[name]}')
    return value

def explain(kind, error, trace):
    """The sys.excepthook of all scripts: a sentence for what a user can mend, a traceback for all else."""
    if isinstance(error, BrokenPipeError):  # nobody reads on, as in sample.py | head
        return os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    place = traceback.extract_tb(trace)[-1]
    root = os.path.dirname(os.path.realpath(__file__))
    ours = os.path.realpath(place.filename).startswith(root) and 'site-packages' not in place.filename
    sentence = kind is ValueError and ours and place.line.startswith('raise ')
    said = str(error)
    if isinstance(error, MemoryError) or 'out of memory' in said or 'CPUAllocator' in said:
        said = 'out of memory: try a smaller --batch_size, with more --gradient_accumulation_steps'
    elif sentence or isinstance(error, OSError):
        pass
    elif re.search(r'C(\+\+)? compiler|working triton', said):
        said = 'torch.compile needs a C++ compiler, on a GPU also Triton: install them, or --compile=False'
    elif kind.__name__.startswith('Dist') or 'onnection' in said or 'imed out' in said:
        said = 'this process has lost the others: look for the first that failed in the report of torchrun'
    else:
        return sys.__excepthook__(kind, error, trace)
    if not sentence or os.environ.get('LOCAL_RANK', '0') == '0':    # all processes say it: once will do
        print(said, file=sys.stderr)
