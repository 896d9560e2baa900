# A Llama of transformers 5 has another rope_theta in 4.57.6, and what that saves has another one in 5 again.
#
# Expected: 4.57.6 finds rope_theta in a config.json of 5.24.0, or raises an error, or warns. And both read
# alike what it saves again. Found: 5.24.0 writes rope_theta into "rope_parameters" only. 4.57.6 does not look
# there, computes with its default, 10000, and says nothing. But it keeps the entry that it does not know, and
# so writes two thetas that differ. With a Llama of theta 500000, and the same folder throughout:
#
#     done to the folder       config.json then has                                  angles are computed with
#     saved by 5.24.0          rope_parameters.rope_theta 500000                     500000 by 5.24.0
#     loaded by 4.57.6                                                               10000 by 4.57.6
#     saved by 4.57.6          rope_theta 10000, rope_parameters.rope_theta 500000   10000 by 4.57.6
#     loaded by 5.24.0                                                               500000 by 5.24.0
#
# So 4.57.6 fine-tunes such a model's weights for 10000, and evaluates them with it. 5.24.0 computes another
# function of the same weights, and so has another loss.
#
# So write rope_theta in both places for older readers, and ask where the two differ: in config.json nothing
# but "transformers_version" hints at which one the weights are for. This script exits with 1 if that has
# changed.
#
#     bash findings/rope_theta_two_versions.sh
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q torch==2.13.0 numpy==2.3.5 requests==2.32.5 safetensors==0.8.0 \
    transformers==5.24.0 tokenizers==0.23.3 huggingface_hub==2.4.0
"$place/venv/bin/pip" install -q --no-deps --target "$place/old" \
    transformers==4.57.6 tokenizers==0.22.2 huggingface_hub==0.36.0
cat > "$place/script.py" <<'PYTHON'
import json
import logging
import sys
import warnings
from pathlib import Path
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig

folder, version, what, *expected = sys.argv[1:]
assert version == transformers.__version__
transformers.utils.logging.disable_progress_bar()
logged = []
handler = logging.Handler()
handler.emit = lambda record: logged.append(record.getMessage())
logging.getLogger('transformers').handlers = [handler]
tokens = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]])
torch.manual_seed(0)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    if what == 'made':
        model = AutoModelForCausalLM.from_config(LlamaConfig(
            vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            initializer_range=0.5, bos_token_id=0, eos_token_id=0,
            rope_parameters=dict(rope_type='default', rope_theta=5e5)))
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        loss = model(tokens, labels=tokens).loss.item()
    model.save_pretrained(folder)
logged += [str(warning.message) for warning in caught]
theta = model.model.rotary_emb.inv_freq[1].item() ** -4     # inv_freq is theta ^ (-2 i / 8)
config = json.loads(Path(folder, 'config.json').read_text())
nested = (config.get('rope_parameters') or {}).get('rope_theta')
print(f'transformers {version}, {what}: angles of theta {theta:.0f}, loss {loss:.4f}')
found = [f'{theta:.0f}', str(config.get('rope_theta')), str(nested)]
print(f'  saved: rope_theta {found[1]}, rope_parameters.rope_theta {nested}; messages: {logged}')
sys.exit(found != expected or bool(logged))
PYTHON
export OMP_NUM_THREADS=1
old() { PYTHONPATH="$place/old" "$place/venv/bin/python" "$place/script.py" "$place/model" 4.57.6 "$@"; }
new() { "$place/venv/bin/python" "$place/script.py" "$place/model" 5.24.0 "$@"; }
new made 500000 None 500000.0
old loaded 10000 10000.0 500000.0
old 'loaded again' 10000 10000.0 500000.0
new loaded 500000 None 500000.0
