# On a CPU, weights that transformers or safetensors has loaded change when their file is written to.
#
# Expected: from_pretrained() and load_file() read a file, and what happens to it later is of no concern. And
# at least weights that an optimizer has changed are the process's own. Found with transformers 5.24.0, and
# safetensors 0.8.0 and 0.7.0, on Linux: the tensors are views of the mapped file. Copy another checkpoint of
# the same shape over it, as with shutil.copyfile(), and the loaded weights become those of the other one. A
# model trained in between loses its training: the copy empties the file first, and then Linux drops the pages
# that the optimizer has written to.
#
#     loaded with                    then written with     what was loaded becomes
#     from_pretrained()              copyfile()            the other model
#     from_pretrained(), a step      copyfile()            the other model, without the step
#     from_pretrained(), bfloat16    copyfile()            not changed: the conversion has made a copy
#     load_file() of 0.8.0           copyfile()            the other model
#     load_file() of 0.8.0           save_file()           not changed: it writes a new file, and renames it
#     load_file() of 0.7.0           save_file()           the other model
#
# No error is raised, and no warning comes. So an evaluation on a CPU, of a folder into which a training run
# copies its newest weights, ends with other weights than it began with. And with 0.7.0, who loads weights,
# saves others in their place and compares the two finds no difference.
#
# So copy a checkpoint to a new name and rename it over the old one, or clone what was loaded. This script
# exits with 1 if that has changed.
#
#     bash findings/loaded_weights_follow_file.sh
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q torch==2.13.0 numpy==2.3.5 safetensors==0.8.0 \
    transformers==5.24.0 tokenizers==0.23.3 huggingface_hub==2.4.0
"$place/venv/bin/pip" install -q --no-deps --target "$place/old" safetensors==0.7.0
cat > "$place/script.py" <<'PYTHON'
import sys
import warnings
from pathlib import Path
from shutil import copyfile
import safetensors
import torch
from safetensors.torch import load_file, save_file

place, version = Path(sys.argv[1], sys.argv[2]), sys.argv[2]
assert version == safetensors.__version__
place.mkdir()
same = True

def report(what, found, expected):
    global same
    print(f'  {what}: {found}')
    same = same and found == expected

def of_file(write):
    """What a loaded tensor of ones is after this has written twos to its file."""
    save_file(dict(x=torch.ones(4)), place / 'one')
    save_file(dict(x=torch.ones(4) * 2), place / 'two')
    x = load_file(place / 'one')['x']
    write()
    assert load_file(place / 'one')['x'].tolist() == [2] * 4
    return x.tolist()

def of_model(step=False, **options):
    """Which one the first of two models is, after the file of the second was copied over its own."""
    from transformers import AutoModelForCausalLM, LlamaConfig
    for seed, name in enumerate('ab'):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(LlamaConfig(
            vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            bos_token_id=0, eos_token_id=0)).save_pretrained(place / name)
    model, other = [AutoModelForCausalLM.from_pretrained(place / name, **options) for name in 'ab']
    if step:
        tokens = torch.tensor([[1, 2, 3]])
        model(tokens, labels=tokens).loss.backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    before = [weight.detach().clone() for weight in model.parameters()]
    copyfile(place / 'b/model.safetensors', place / 'a/model.safetensors')
    def equal(weights):
        return all(torch.equal(one, two) for one, two in zip(model.parameters(), weights))
    return 'not changed' if equal(before) else 'the other model' if equal(other.parameters()) else 'a mixture'

print('safetensors', version)
one, two = [1] * 4, [2] * 4
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    report('load_file(), copyfile()', of_file(lambda: copyfile(place / 'two', place / 'one')), two)
    report('load_file(), save_file()', of_file(lambda: save_file(dict(x=torch.ones(4) * 2), place / 'one')),
           one if version == '0.8.0' else two)
    if version == '0.8.0':
        import transformers
        transformers.utils.logging.disable_progress_bar()
        print('transformers', transformers.__version__)
        report('from_pretrained(), copyfile()', of_model(), 'the other model')
        report('from_pretrained(), a step, copyfile()', of_model(step=True), 'the other model')
        report('from_pretrained(), bfloat16, copyfile()', of_model(dtype=torch.bfloat16), 'not changed')
print('  warnings:', [str(warning.message) for warning in caught])
sys.exit(not same or bool(caught))
PYTHON
export OMP_NUM_THREADS=1
PYTHONPATH="$place/old" "$place/venv/bin/python" "$place/script.py" "$place" 0.7.0
"$place/venv/bin/python" "$place/script.py" "$place" 0.8.0
