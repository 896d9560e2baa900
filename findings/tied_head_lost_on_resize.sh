# transformers keeps a head that config.json calls tied, and resize_token_embeddings() then drops it.
#
# Expected: of a checkpoint with "tie_word_embeddings": true whose file has another lm_head.weight than
# embeddings, from_pretrained() takes the embeddings for both, as transformers 4 does. Or it keeps the head,
# and then the head stays. Found with transformers 5.24.0, for Llama and GPT-2: neither.
#
#     done to the model                                  its head          config says    saved are
#     4.57.6: from_pretrained()                          the embeddings    tied           embeddings
#     5.24.0: from_pretrained()                          its own           tied           both
#     5.24.0: then resize_token_embeddings(its size)     the embeddings    tied           embeddings
#     5.24.0: then resize_token_embeddings(1 more)       the embeddings    tied           embeddings
#     5.24.0: then tie_weights()                         the embeddings    tied           embeddings
#
# 5.24.0 warns in the second row, once, that it will not tie. It says nothing of that in the later rows, where
# the head is lost from memory and from what is saved, even if the size stays as it was. Scripts call
# resize_token_embeddings(len(tokenizer)) as a matter of course: so a score before and after it differs.
#
# So set tie_word_embeddings to false, in config.json or as model.config.tie_word_embeddings, if the two
# differ: then the head stays. This script exits with 1 if that has changed.
#
#     bash findings/tied_head_lost_on_resize.sh
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
from pathlib import Path
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

place, version = Path(sys.argv[1], sys.argv[2]), transformers.__version__
assert version == sys.argv[2]
transformers.utils.logging.disable_progress_bar()
size = dict(vocab_size=16, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False)
configs = {
    'Llama': LlamaConfig(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                         **size),
    'GPT-2': GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=16, **size),
}
changes = {'from_pretrained()': lambda model: None}
if version == '5.24.0':
    changes |= {
        'resize_token_embeddings(its size)': lambda model: model.resize_token_embeddings(16),
        'resize_token_embeddings(1 more)': lambda model: model.resize_token_embeddings(17),
        'tie_weights()': lambda model: model.tie_weights(),
        'config false, resize_token_embeddings(its size)': lambda model: (
            setattr(model.config, 'tie_word_embeddings', False), model.resize_token_embeddings(16)),
    }
logged = []
handler = logging.Handler()
handler.emit = lambda record: logged.append(record.getMessage())
logging.getLogger('transformers').handlers = [handler]

def trial(name, change):
    """(has the model its own head?, config.tie_word_embeddings, saved, messages about ties)"""
    torch.manual_seed(0)
    folder = place / name
    AutoModelForCausalLM.from_config(configs[name]).save_pretrained(folder)
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps(dict(config, tie_word_embeddings=True)))
    weights = load_file(folder / 'model.safetensors')
    embeddings, = [key for key in weights if 'embed_tokens' in key or 'wte' in key]
    logged.clear()
    model = AutoModelForCausalLM.from_pretrained(folder)
    loading = sum(' tie ' in message for message in logged)
    logged.clear()
    change(model)
    later = sum(' tie' in message for message in logged)
    head = model.get_output_embeddings().weight[:16]
    assert torch.equal(model.get_input_embeddings().weight[:16], weights[embeddings])
    own = torch.equal(head, weights['lm_head.weight'])
    assert own != torch.equal(head, weights[embeddings])
    model.save_pretrained(folder / 'saved')
    saved = sorted({'lm_head.weight', embeddings} & set(load_file(folder / 'saved/model.safetensors')))
    return own, model.config.tie_word_embeddings, len(saved), loading, later

print('transformers', version)
new = int(version == '5.24.0')
expected = [(bool(new), True, 1 + new, new, 0)] + [(False, True, 1, 1, 0)] * 3 + [(True, False, 2, 1, 0)]
same = True
for name in configs:
    found = [trial(name, change) for change in changes.values()]
    for what, (own, tied, saved, loading, later) in zip(changes, found):
        print(f'  {name}, {what}: head {"its own" if own else "the embeddings"}, config says tied: {tied}, '
              f'saved {saved} of the two; messages of ties: {loading} in loading, {later} later')
    same = same and found == expected[:len(changes)]
sys.exit(not same)
PYTHON
export OMP_NUM_THREADS=1
PYTHONPATH="$place/old" "$place/venv/bin/python" "$place/script.py" "$place" 4.57.6
"$place/venv/bin/python" "$place/script.py" "$place" 5.24.0
