# The local tensor of a parameter's shard is a new view in each call of to_local(), even without gradients.
#
# Expected: under torch.no_grad(), to_local() of a DTensor is the tensor that it holds, _local_tensor. So a
# method set on it stays. Found with torch 2.13.0, in 2 processes over gloo on a CPU: that is so for a plain
# DTensor, but not for an nn.Parameter. There to_local() makes a new view of the same memory in each call, and
# torch marks that view as a parameter.
#
# FSDP2 looks for its all-gather extension (fsdp_pre_all_gather and fsdp_post_all_gather) on _local_tensor.
# In two forward passes with backward passes of a linear layer, FSDP2 calls each of these methods
#
#     0 times    if they are set on weight.to_local(), with or without torch.no_grad()
#     0 times    if they are set on weight.detach().to_local()
#     2 times    if they are set on weight._local_tensor
#
# It raises no error and gives no warning: in the first two rows weights are gathered without the extension.
#
# So set these methods on _local_tensor, and count calls in a test. This script exits with 1 if that has
# changed.
#
#     bash findings/dtensor_parameter_to_local.sh
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

def without_gradients(weight):
    with torch.no_grad():
        return weight.to_local()

ways = {
    'weight.to_local(), no_grad': without_gradients,
    'weight.to_local()': lambda weight: weight.to_local(),
    'weight.detach().to_local()': lambda weight: weight.detach().to_local(),
    'weight._local_tensor': lambda weight: weight._local_tensor,
}

def trial(mesh, way):
    """(is the way's tensor the held one?, calls of fsdp_pre_all_gather, calls of fsdp_post_all_gather)"""
    model = nn.Linear(4, 4, bias=False)
    fully_shard(model, mesh=mesh)
    weight, calls = model.weight, []
    tensor = way(weight)
    assert isinstance(weight, nn.Parameter) and isinstance(weight, DTensor)
    assert tensor.data_ptr() == weight._local_tensor.data_ptr()
    assert (way(weight) is tensor) == (tensor is weight._local_tensor)

    def fsdp_pre_all_gather(mesh):
        calls.append('before')
        return (weight._local_tensor,), None

    def fsdp_post_all_gather(outputs, metadata, dtype, *, out=None):
        calls.append('after')
        return None if out is not None else (outputs[0].view(4, 4), outputs)

    tensor.fsdp_pre_all_gather, tensor.fsdp_post_all_gather = fsdp_pre_all_gather, fsdp_post_all_gather
    for _ in range(2):
        model(torch.ones(2, 4)).sum().backward()
    return tensor is weight._local_tensor, calls.count('before'), calls.count('after')

def process(rank, place, queue):
    distributed.init_process_group('gloo', init_method=f'file://{place}/meeting', rank=rank, world_size=2,
                                   timeout=timedelta(seconds=60))
    mesh = init_device_mesh('cpu', (2,))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        found = [trial(mesh, way) for way in ways.values()]
        data = DTensor.from_local(torch.zeros(2), mesh)
        with torch.no_grad():
            held = [tensor.to_local() is tensor._local_tensor for tensor in (data, nn.Parameter(data))]
    queue.put((rank, found, held, [str(warning.message) for warning in caught]))
    distributed.destroy_process_group()

queue = multiprocessing.get_context('fork').SimpleQueue()
multiprocessing.start_processes(process, (sys.argv[1], queue), 2, daemon=True, start_method='fork')
print('torch', torch.__version__)
same = True
for rank, found, held, caught in sorted(queue.get() for _ in range(2)):
    print(f'process {rank}, warnings: {caught}')
    print(f'  no_grad, to_local() is _local_tensor: DTensor {held[0]}, DTensor that is a Parameter {held[1]}')
    for name, (is_held, before, after) in zip(ways, found):
        print(f'  methods set on {name} (is _local_tensor: {is_held}): calls {before} and {after}')
    same = same and held == [True, False] and not caught
    # detach() makes another DTensor, with another tensor in it
    same = same and found == [(False, 0, 0), (False, 0, 0), (False, 0, 0), (True, 2, 2)]
sys.exit(not same)
PYTHON
