# Over gloo, all_reduce ignores strides: it sums memory, not elements, and returns wrong sums.
#
# Expected: all_reduce adds element by element, or raises an error for a tensor that is not contiguous. Found
# with torch 2.13.0, in 2 processes on a CPU: it takes as many numbers as the tensor has elements, one after
# another from the tensor's first one in memory, and adds those. It raises no error and gives no warning.
# With [[1, 2, 3], [4, 5, 6]] in process 0, and ten times that in process 1:
#
#     process 0      process 1      process 0 gets                  process 1 gets
#     contiguous     contiguous     [[11, 22, 33], [44, 55, 66]]    the same; this is right
#     transposed     transposed     [[11, 22, 33], [44, 55, 66]]    the same; this is right
#     contiguous     transposed     [[11, 42, 23], [54, 35, 66]]    [[11, 23, 35], [42, 54, 66]]
#     x[:, ::2]      x[:, ::2]      [[11, 22, 33], [4, 5, 6]]       [[11, 22, 33], [40, 50, 60]]
#
# Transposed means y.t() with a contiguous y. In the third row each sum but the first and last has elements of
# different places, and the processes get different tensors. In the fourth row the last half is not summed.
# There x changes where x[:, ::2] does not reach: x's first row is summed in the odd columns too.
#
# So call contiguous() before all_reduce, and copy the result back. Or see to it that all processes have the
# same strides, and no gaps. This script exits with 1 if that has changed.
#
#     bash findings/gloo_all_reduce_strides.sh
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
from torch import distributed, multiprocessing

def values(rank):
    """[[1, 2, 3], [4, 5, 6]], in process 1 times ten."""
    return torch.tensor([[1, 2, 3], [4, 5, 6]]) * 10 ** rank

def transposed(rank):
    """The same values, but columns lie one after another in memory."""
    return values(rank).t().contiguous().t()

def gaps(rank):
    """The same values in even columns, and 100 in process 0 and 200 in process 1 in odd columns."""
    wide = torch.full((2, 6), 100 * (rank + 1))
    wide[:, ::2] = values(rank)
    return wide

def process(rank, place, queue):
    distributed.init_process_group('gloo', init_method=f'file://{place}/meeting', rank=rank, world_size=2,
                                   timeout=timedelta(seconds=60))
    wide = gaps(rank)
    tensors = [values(rank), transposed(rank), transposed(rank) if rank else values(rank), wide[:, ::2]]
    assert all(torch.equal(tensor, values(rank)) for tensor in tensors)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        for tensor in tensors:
            distributed.all_reduce(tensor)
    found = [tensor.tolist() for tensor in tensors] + [wide.tolist()]
    queue.put((rank, found, [str(warning.message) for warning in caught]))
    distributed.destroy_process_group()

queue = multiprocessing.get_context('fork').SimpleQueue()
multiprocessing.start_processes(process, (sys.argv[1], queue), 2, daemon=True, start_method='fork')
right = [[11, 22, 33], [44, 55, 66]]
row = [11, 300, 22, 300, 33, 300]
expected = [
    [right, right, [[11, 42, 23], [54, 35, 66]], [[11, 22, 33], [4, 5, 6]], [row, [4, 100, 5, 100, 6, 100]]],
    [right, right, [[11, 23, 35], [42, 54, 66]], [[11, 22, 33], [40, 50, 60]],
     [row, [40, 200, 50, 200, 60, 200]]],
]
names = ['both contiguous', 'both transposed', 'contiguous and transposed', 'both x[:, ::2]', '  x then']
print('torch', torch.__version__)
same = True
for rank, found, caught in sorted(queue.get() for _ in range(2)):
    print(f'process {rank}, warnings: {caught}')
    for name, sums in zip(names, found):
        print(f'  {name}: {sums}')
    same = same and found == expected[rank] and not caught
sys.exit(not same)
PYTHON
