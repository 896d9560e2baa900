# After a validation, FSDP2's root has gathered parameters, and an optimizer made then does not train them.
#
# Expected: after a forward pass under torch.no_grad(), model.parameters() yields the same shards as before,
# since no backward pass follows. Found with torch 2.13.0, in 2 processes over gloo on a CPU: it does not, if
# fully_shard(root) has its defaults. Parameters of the root that are in no sharded submodule are plain
# tensors then, the gathered ones. Parameters of a sharded submodule are shards (DTensor).
#
#     fully_shard(root)                               root's weight       trained by an optimizer made then
#     defaults                                        plain tensor        no
#     defaults, optimizer made before validation      plain tensor        yes
#     defaults, root.reshard() after validation       shard               yes
#     reshard_after_forward=True                      shard               yes
#
# In the first row the gradient goes to the shard, which the optimizer does not have. The gathered tensor gets
# none, so step() skips it. Torch raises no error and gives no warning. Torch documents that the root keeps
# gathered parameters by default, for the backward pass, but not what an optimizer does with them.
#
# So make the optimizer before the first validation, or call root.reshard() after each one, or pass
# reshard_after_forward=True for the root. This script exits with 1 if that has changed.
#
#     bash findings/fsdp2_root_after_validation.sh
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q torch==2.13.0 numpy==2.3.5
OMP_NUM_THREADS=1 "$place/venv/bin/python" - "$place" <<'PYTHON'
import sys
import warnings
from datetime import timedelta
import torch
from torch import distributed, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

def trial(early=False, reshard=False, **options):
    """of the submodule's and of the root's weight: a shard after validation?, has it a gradient?, trained?"""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    mesh = init_device_mesh('cpu', (2,))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh, **options)
    shards = list(model.parameters())
    before = [shard.to_local().detach().clone() for shard in shards]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if early else None
    with torch.no_grad():
        model(torch.ones(2, 4))
    if reshard:
        model.reshard()
    validated = list(model.parameters())
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(2, 4)).square().mean().backward()
    optimizer.step()
    assert all(a is b for a, b in zip(model.parameters(), shards))
    assert all(shard.grad is not None for shard in shards)
    return [(isinstance(after, DTensor) and after is shard, after.grad is not None,
             not torch.equal(shard.to_local(), old)) for after, shard, old in zip(validated, shards, before)]

trials = {
    'defaults': {},
    'defaults, optimizer made before validation': {'early': True},
    'defaults, root.reshard() after validation': {'reshard': True},
    'reshard_after_forward=True': {'reshard_after_forward': True},
}

def process(rank, place, queue):
    distributed.init_process_group('gloo', init_method=f'file://{place}/meeting', rank=rank, world_size=2,
                                   timeout=timedelta(seconds=60))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        found = [trial(**options) for options in trials.values()]
    queue.put((rank, found, [str(warning.message) for warning in caught]))
    distributed.destroy_process_group()

queue = multiprocessing.get_context('fork').SimpleQueue()
multiprocessing.start_processes(process, (sys.argv[1], queue), 2, daemon=True, start_method='fork')
shard = (True, True, True)
expected = [[shard, (False, False, False)], [shard, (False, False, True)], [shard, shard], [shard, shard]]
print('torch', torch.__version__)
same = True
for rank, found, caught in sorted(queue.get() for _ in range(2)):
    print(f'process {rank}, warnings: {caught}')
    for name, (submodule, root) in zip(trials, found):
        for part, (is_shard, gradient, trained) in (('submodule', submodule), ('root', root)):
            print(f'  {name}: {part} has {"a shard" if is_shard else "a plain tensor"}, '
                  f'{"with" if gradient else "without"} gradient; shard {"" if trained else "not "}trained')
    same = same and found == expected and not caught
sys.exit(not same)
PYTHON
