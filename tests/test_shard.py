"""
What must be true of --shard=True (FSDP2):  python -m pytest tests/test_shard.py

This file is also the program that torchrun starts, two processes or four. Each of its cases trains two models
with the same weights and data, one under DistributedDataParallel and one sharded, and compares them.
"""
import json
import os
import re
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import runtime
from model import GPT, GPTConfig, unkick
from pretrained import build, empty, new
from runtime import (adamw, agree, clip, distributed, fill, load_checkpoint, load_run, local, save_run, start,
                     save_checkpoint, validation_loss)
from test_scripts import SMALL, assert_same_weights, command, complaint, place, rows, weights

TINY = dict(block_size=32, vocab_size=67, n_layer=3, n_head=2, n_embd=16, slice_tokens=64)
LLAMA = dict(norm='rmsnorm', mlp='swiglu', rope_theta=1e4, n_kv_head=1, n_inner=24, bias=False)
STEPS = 10
CASES = {
    'leapfrog': dict(scheme='leapfrog'),
    'midpoint': dict(scheme='midpoint', dropout=0.1),
    'symplectic': dict(scheme='symplectic'),
    'midpoint_a': dict(scheme='midpoint_a', a=[-1 / 16, 0.75, -1.25]),
    'standard': dict(scheme='standard', dropout=0.1),
    'standard checkpointed': dict(scheme='standard', stored_layers=1),
    'stored layers': dict(scheme='midpoint_a', a=-1 / 16, stored_layers=2, dropout=0.1),
    'untied Llama': dict(LLAMA, scheme='leapfrog', tied=False),
    'frozen layers': dict(scheme='leapfrog', frozen='h.0.|wte|ln_1'),
    'no rows left for the last process': dict(scheme='leapfrog', vocab_size=65),
    'accumulation': dict(scheme='leapfrog', micro_batches=3),
    'compiled': dict(scheme='leapfrog', compile=True),
}

# -----------------------------------------------------------------------------
# the program

def here_of(dtype, shard):
    kind = SimpleNamespace(device='cpu', dtype=dtype, shard=shard)
    group = dist.is_initialized()
    with pytest.MonkeyPatch.context() as change:
        if group:                               # one group serves all cases
            change.setattr(dist, 'init_process_group', lambda backend, **how: None)
        return start(kind)

def trained(dtype, shard, frozen=None, micro_batches=1, compile=False, amplify=8, steps=STEPS, **fields):
    """(its whole weights, model, optimizer, here) after some steps from the weights of seed 0."""
    here = here_of(dtype, shard)
    torch.manual_seed(0)
    source = GPT(GPTConfig(**{**TINY, **fields}))
    model = empty(source.config, here)
    for weight, its in zip(model.parameters(), source.parameters()):
        fill(weight, its * amplify if its.dim() == 2 else its)
    for name, weight in model.named_parameters():
        weight.requires_grad_(not re.search(frozen or 'no name', name))
    optimizer = adamw(model, learning_rate=1e-3)
    if compile:
        model.compile_parts()
    parallel = distributed(model, here)
    for step in range(steps):
        torch.manual_seed(100 * step + runtime.rank)
        for micro in range(micro_batches):
            parallel.require_backward_grad_sync = micro == micro_batches - 1
            x = torch.randint(TINY['vocab_size'] - 2, (8, TINY['block_size']))
            with here.autocast:
                loss = parallel(x, x.roll(1, 1))[1] / micro_batches
            here.scaler.scale(loss).backward()
        here.scaler.unscale_(optimizer)
        norm = clip(model, 0.5, here)
        agree(step, loss.detach(), norm, model.mismatches, model.largest, here)
        here.scaler.step(optimizer)
        here.scaler.update()
        optimizer.zero_grad()
    return model, optimizer, here

def compare(dtype, **case):
    """The largest difference of weights and moments, sharded and not."""
    tensors = []
    for shard in (False, True):
        model, optimizer, _ = trained(dtype, shard, **case)
        moments = [x for state in optimizer.state.values() for x in state.values() if x.dim()]
        tensors.append([gathered(x.detach()) for x in (*model.parameters(), *moments)])
        if shard:
            assert all(isinstance(x, DTensor) for x in (*model.parameters(), *moments))
    assert any(x.abs().max() > 0 for x in tensors[0])
    return max(float((x - y).abs().max()) for x, y in zip(*tensors))

def gathered(x):
    return x.full_tensor() if isinstance(x, DTensor) else x

def cases():
    for name, case in CASES.items():
        for dtype in ('float32', 'bfloat16', 'float16'):
            if dtype == 'float32' or name in ('leapfrog', 'standard', 'untied Llama', 'stored layers'):
                yield f'{name}, {dtype}', compare(dtype, **case)

def one_case():
    yield 'leapfrog, float32', compare('float32', scheme='leapfrog')

def flipped():
    """A bit that is flipped in one process stops them all."""
    def faulty(v, *args):
        v[0, 0, 0] ^= runtime.main
        return unkick(v, *args)

    here = here_of('float32', True)
    model = new(GPTConfig(**TINY), here)
    model.unkick = faulty
    x = torch.zeros(8, 32, dtype=torch.long)
    loss = model(x, x)[1]
    loss.backward()
    try:
        agree(4, loss.detach(), clip(model, 0.0, here), model.mismatches, model.largest, here)
    except ValueError as error:
        yield 'flipped', str(error)

def drawn():
    """A seed gives a sharded model the weights of GPT(config)."""
    here = here_of('float32', True)
    same = []
    for fields in (dict(TINY), dict(TINY, tied=False, **LLAMA)):
        torch.manual_seed(5)
        sharded = new(GPTConfig(**fields), here)
        torch.manual_seed(5)
        plain = GPT(GPTConfig(**fields))
        pairs = zip(sharded.parameters(), plain.parameters())
        same += [torch.equal(gathered(x.detach()), y) for x, y in pairs]
    yield 'drawn', all(same)

def infinite():
    """In float16, an inf in the gradient of one process: its step is skipped by all."""
    model, optimizer, here = trained('float16', True, steps=1)
    before = [gathered(x).clone() for x in model.parameters()]
    x = torch.zeros(8, 32, dtype=torch.long)
    with here.autocast:
        loss = model(x, x)[1]
    here.scaler.scale(loss).backward()
    if runtime.main:
        local(next(model.parameters()).grad)[0, 0] = float('inf')
    here.scaler.unscale_(optimizer)
    clip(model, 1.0, here)
    here.scaler.step(optimizer)
    scale = here.scaler.get_scale()
    here.scaler.update()
    same = all(torch.equal(x, gathered(y)) for x, y in zip(before, model.parameters()))
    yield 'infinite', [same, here.scaler.get_scale() / scale]

def traps():
    """Of torch 2.13. After a validation the parameters are the shards; and a gradient's strides matter."""
    here = here_of('float32', True)
    model = trained('float32', True, steps=1)[0]
    before = list(model.parameters())
    knobs = SimpleNamespace(block_size=32, eval_windows=3, batch_size=1)
    validation_loss(model, np.arange(2000) % 65, knobs, here)
    yield 'validated', all(x is y and isinstance(x, DTensor) for x, y in zip(before, model.parameters()))
    strides = []
    reduce = dist.all_reduce

    def watched(x, *args):
        strides.append(x.is_contiguous())
        return reduce(x, *args)

    with pytest.MonkeyPatch.context() as change:
        change.setattr(dist, 'all_reduce', watched)
        model = trained('float32', True, steps=1)[0]
    yield 'contiguous', [len(strides) > 0, all(strides)]

def gathered_bytes():
    """What a process gives to the others for a block, per weight: in float32, and under bfloat16."""
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if 'allgather' in str(func):
                sizes.append(sum(x.nbytes for x in tree_leaves(args[1:]) if isinstance(x, torch.Tensor)))
            return func(*args, **(kwargs or {}))

    for dtype in ('float32', 'bfloat16'):
        here = here_of(dtype, True)
        model = trained(dtype, True, steps=1, n_embd=64)[0]
        sizes = []
        with Watch(), here.autocast:
            model(torch.zeros(2, 32, dtype=torch.long))
        weights = sum(weight.numel() for weight in model.transformer.h[0].parameters())
        yield f'gathered in {dtype}', 2 * max(sizes[1:]) / weights          # the root has the first

def too_little_memory(path):
    """For a checkpoint, in the first process: a sentence in all of them."""
    model, optimizer, here = trained('float32', True, steps=1)
    runtime.free_memory = lambda: 1e3
    try:
        save_run([path], model, optimizer, here, SimpleNamespace())
    except ValueError as error:
        yield 'memory', str(error)

def loading(path):
    """MB that build() takes at its peak, above what was there before; and those of this process's share."""
    here = here_of('float32', True)
    empty(GPTConfig(**TINY), here)              # torch's modules are imported now
    before = anonymous()
    peaks = [0.0]
    done = []

    def watch():
        while not done:
            peaks.append(anonymous() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = build(path, here)[0]
    done.append(True)
    watcher.join()
    yield 'loading', [max(peaks), sum(4 * local(x).numel() for x in model.parameters()) / 1e6]

def faults(folder):
    for one in (drawn(), flipped(), infinite(), traps(), gathered_bytes(),
                too_little_memory(f'{folder}/last.pt'), loading(f'{folder}/big.pt')):
        yield from one

def anonymous():
    """MB of memory that is not a view of a file."""
    with open('/proc/self/status') as file:
        return next(1.024e-3 * int(line.split()[1]) for line in file if line.startswith('RssAnon'))

if __name__ == '__main__':
    torch.set_num_threads(1)
    runtime.say = lambda *args: None            # what it prints would get between the lines of the others
    name, *arguments = sys.argv[1:]
    for key, value in globals()[name](*arguments):
        os.write(1, f'{json.dumps([key, runtime.rank, value])}\n'.encode())     # one write: two processes
    runtime.leave()

# -----------------------------------------------------------------------------
# the tests

def torchrun(*arguments, processes=2):
    """What the program says, by case and process."""
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    result = subprocess.run([*launch, __file__, *arguments], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('["')]
    return {(key, rank): value for key, rank, value in lines}

@pytest.fixture(scope='module')
def compared():
    return torchrun('cases')

@pytest.mark.parametrize('name', CASES)
def test_weights_and_moments_after_ten_steps_are_those_of_ddp_bit_for_bit(compared, name):
    """With several micro-batches sums have another order: FSDP2 adds up over processes first."""
    differences = {key: x for (key, _), x in compared.items() if key.startswith(f'{name}, ')}
    assert f'{name}, float32' in differences
    if name == 'accumulation':
        assert 0 < max(differences.values()) < 1e-4
    else:
        assert set(differences.values()) == {0.0}

def test_four_processes_differ_by_the_order_of_a_sum():
    """gloo adds up four gradients in another order for a whole tensor than for its parts."""
    differences = torchrun('one_case', processes=4)
    assert 0 < differences['leapfrog, float32', 0] < 1e-4

@pytest.fixture(scope='module')
def faulty(tmp_path_factory):
    """What two processes say of faults, each as a list; and their folder."""
    folder = tmp_path_factory.mktemp('faulty')
    (folder / 'last.pt').write_bytes(b'the old one')
    config = dict(TINY, n_embd=512, n_layer=4, vocab_size=8000, scheme='standard')
    torch.manual_seed(0)
    save_checkpoint([folder / 'big.pt'], dict(model=GPT(GPTConfig(**config)).state_dict(), config=config,
                                              meta=dict(encoding='bytes')))
    said = torchrun('faults', str(folder))
    return {name: [said[name, rank] for rank in range(2)] for name, _ in said}, folder

def test_a_bit_that_is_flipped_in_one_process_stops_all(faulty):
    assert all('not those of the forward pass' in sentence for sentence in faulty[0]['flipped'])

def test_a_seed_draws_the_same_weights(faulty):
    assert faulty[0]['drawn'] == [True] * 2

def test_an_inf_in_the_gradient_of_one_process_skips_the_step_in_all(faulty):
    assert faulty[0]['infinite'] == [[True, 0.5]] * 2

def test_the_parameters_after_a_validation_are_the_shards(faulty):
    """The root's would be the gathered ones, if it were not resharded: torch 2.13."""
    assert faulty[0]['validated'] == [True] * 2

def test_what_is_added_up_over_processes_is_contiguous(faulty):
    """gloo's all_reduce ignores strides: torch 2.13."""
    assert faulty[0]['contiguous'] == [[True, True]] * 2

def test_matrices_travel_in_bfloat16_where_autocast_makes_them_that(faulty):
    assert faulty[0]['gathered in float32'] == [4.0] * 2
    assert all(2.0 < each < 2.1 for each in faulty[0]['gathered in bfloat16'])

def test_too_little_memory_for_a_checkpoint_is_a_sentence_and_changes_no_file(faulty):
    assert all('of main memory in the first process' in sentence for sentence in faulty[0]['memory'])
    assert (faulty[1] / 'last.pt').read_bytes() == b'the old one' and len(list(faulty[1].iterdir())) == 2

def test_each_process_reads_its_part_of_a_model(faulty):
    """MB of anonymous memory: of a file, each process maps what it reads."""
    for peak, share in faulty[0]['loading']:
        assert 20 < share and 0.5 * share < peak < share + 4 * 512 * 8000 / 1e6

SHARD = dict(SMALL, dropout=0.0, batch_size=2, gradient_accumulation_steps=2, lr_decay_iters=6, max_iters=4,
             eval_interval=2)

def train(place, out_dir, script='train.py', **flags):
    words = command(script, **{'processes': 2, 'out_dir': out_dir, **flags})
    result = subprocess.run(words, cwd=place, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout

def assert_same_checkpoints(place, one, other):
    assert_same_weights(place, one, other)
    one, other = (load_checkpoint(str(place / name / 'last.pt'))['optimizer'] for name in (one, other))
    assert one['state'].keys() == other['state'].keys()
    for index, moments in one['state'].items():
        assert all(torch.equal(x, other['state'][index][name]) for name, x in moments.items())

def test_checkpoints_are_those_of_ddp_and_each_continues_the_other(place):
    train(place, 'ddp', **SHARD)
    for first in (False, True):
        name = f'sharded_first_{first}'
        train(place, name, shard=first, **dict(SHARD, max_iters=2))
        train(place, name, shard=not first, init_from='resume', **SHARD)
        assert_same_checkpoints(place, 'ddp', name)
        assert rows(place, 'ddp') == rows(place, name)
    said = train(place, 'auto', shard=True, stored_layers='auto', memory_gb=1, **SHARD)
    assert 'stored_layers = 2 of 2' in said
    assert_same_checkpoints(place, 'ddp', 'auto')

def test_other_numbers_of_processes_go_on(place):
    train(place, 'four', processes=4, shard=True, **dict(SHARD, gradient_accumulation_steps=4))
    flags = dict(SHARD, gradient_accumulation_steps=4, max_iters=6, weight_decay=0.05, init_from='resume')
    for processes in (2, 1):
        folder = place / f'four_then_{processes}'
        folder.mkdir()
        (folder / 'last.pt').write_bytes((place / 'four' / 'last.pt').read_bytes())
        train(place, folder.name, processes=processes, shard=processes > 1, **flags)
        groups = load_checkpoint(str(folder / 'last.pt'))['optimizer']['param_groups']
        assert [group['weight_decay'] for group in groups] == [0.05, 0.0]
    for name, weight in weights(place, 'four_then_1').items():
        assert torch.allclose(weight, weights(place, 'four_then_2')[name], rtol=0, atol=1e-5), name

def test_retrofit(place):
    train(place, 'teacher', scheme='standard', **SHARD)
    flags = dict(teacher='teacher/last.pt', dataset='tiny', block_size=16, batch_size=2, bits=1,
                 gradient_accumulation_steps=2, spread_windows=2, max_iters=4, eval_interval=4,
                 eval_windows=9, warmup_iters=1, device='cpu')
    for shard in (False, True):
        train(place, f'student{shard}', script='retrofit.py', shard=shard, **flags)
    assert_same_checkpoints(place, 'studentFalse', 'studentTrue')

def test_a_checkpoint_that_is_cut_off_is_one_sentence(place):
    train(place, 'cut_off', processes=1, **dict(SHARD, max_iters=1))
    path = place / 'cut_off' / 'last.pt'
    path.write_bytes(path.read_bytes()[:-1000])
    start = command('train.py', **dict(SHARD, shard=True, out_dir='cut_off', init_from='resume', processes=2))
    result = subprocess.run(start, cwd=place, capture_output=True, text=True, timeout=120)
    said = [line for line in result.stderr.splitlines() if 'cut_off/last.pt is damaged, cut off, or' in line]
    assert result.returncode == 1 and len(said) == 1, result.stderr

def test_what_cannot_be_sharded_is_one_sentence(place, monkeypatch):
    assert 'needs several processes: start the script' in complaint(place, 'train.py', **SHARD, shard=True)
    here = SimpleNamespace(mesh=True)
    with pytest.raises(ValueError, match='midpoint_sum needs two blocks at once: leave --shard out'):
        empty(GPTConfig(**TINY, scheme='midpoint_sum'), here)
    monkeypatch.setattr(runtime, 'world', 17)
    with pytest.raises(ValueError, match='17 processes cannot share 16 rows: start fewer'):
        empty(GPTConfig(**TINY), here)
