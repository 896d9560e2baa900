# Layer norm's mean and deviation have another dtype on a CPU, on fake tensors and on meta tensors.
#
# Expected: the three agree, since fake and meta tensors exist to say what a real run would give. Found with
# torch 2.13.0: they do not, if the input is bfloat16.
#
#     weights    CPU         FakeTensorMode on a CPU     meta
#     float32    float32     bfloat16                    float32
#     bfloat16   bfloat16    bfloat16                    float32
#
# So memory that is counted on fake tensors misses 4 bytes per token and norm under autocast, where weights
# are float32 and a bfloat16 residual stream goes into the norm. This script exits with 1 if that has changed.
#
#     bash findings/layer_norm_statistics.sh
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q torch==2.13.0 numpy==2.3.5
"$place/venv/bin/python" - <<'PYTHON'
import sys
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

def statistics(device, dtype):
    """dtypes of mean and 1 / deviation, for a bfloat16 input and weights of this dtype."""
    x = torch.zeros(4, 8, dtype=torch.bfloat16, device=device)
    weight, bias = torch.ones(8, dtype=dtype, device=device), torch.zeros(8, dtype=dtype, device=device)
    _, mean, rstd = torch.native_layer_norm(x, [8], weight, bias, 1e-5)
    return mean.dtype, rstd.dtype

f32, bf16 = torch.float32, torch.bfloat16
expected = {f32: [(f32, f32), (bf16, bf16), (f32, f32)], bf16: [(bf16, bf16), (bf16, bf16), (f32, f32)]}
print('torch', torch.__version__)
same = True
for dtype, wanted in expected.items():
    with FakeTensorMode():
        fake = statistics('cpu', dtype)
    found = [statistics('cpu', dtype), fake, statistics('meta', dtype)]
    print(f'weights {dtype}: CPU {found[0]}, fake {found[1]}, meta {found[2]}')
    same = same and found == wanted
sys.exit(not same)
PYTHON
