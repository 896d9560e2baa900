# CTranslate2 converts a GPT-2 without three fields of its config, and says nothing: it then has other logits.
#
# Expected: the converter of CTranslate2 4.8.5 takes over what a GPT-2's config.json says, as it does for
# Llama's rms_norm_eps, or refuses what it does not know, as it does for the types of rotary positions. Found,
# with small random models that transformers 5.24.0 writes:
#
#     in config.json                              largest difference of logits, which reach 5
#     the defaults                                4e-6
#     activation_function 'gelu'                  4e-6
#     n_inner 40                                  4e-6
#     tie_word_embeddings false                   4e-6
#     layer_norm_epsilon 0.1                      2.1: computed with 1e-5
#     scale_attn_by_inverse_layer_idx true        1.6: computed without it
#     scale_attn_weights false                    3.4: computed with it
#
# With these three set back to their defaults, transformers has the logits of CTranslate2, to 4e-6. So before
# you serve a GPT-2 with it, see that its config has the defaults: a net of your own may have another epsilon.
# This script exits with 1 if that has changed.
#
#     bash findings/ctranslate2_gpt2_fields.sh
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q torch==2.13.0 numpy==2.3.5 safetensors==0.8.0 transformers==5.24.0 \
    tokenizers==0.23.3 huggingface_hub==2.4.0 ctranslate2==4.8.5
cd "$place"
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 "$place/venv/bin/python" - <<'PYTHON'
import sys
import tempfile
import ctranslate2
import numpy as np
import torch
import transformers
from ctranslate2.converters import TransformersConverter
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

transformers.utils.logging.disable_progress_bar()
tokenizer = Tokenizer(WordLevel({f't{i}': i for i in range(64)}, unk_token='t0'))
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, unk_token='t0', bos_token='t0', eos_token='t0')
kept = [{}, dict(activation_function='gelu'), dict(n_inner=40), dict(tie_word_embeddings=False)]
lost = [dict(layer_norm_epsilon=0.1), dict(scale_attn_by_inverse_layer_idx=True),
        dict(scale_attn_weights=False)]

def net(**fields):
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(
        n_layer=3, n_head=2, n_embd=32, vocab_size=64, n_positions=32, bos_token_id=0, eos_token_id=0,
        initializer_range=0.3, **fields)).eval()

tokens = torch.arange(1, 17)[None] * 7 % 64
print('ctranslate2', ctranslate2.__version__, 'transformers', transformers.__version__)
same = True
for fields in kept + lost:
    model = net(**fields)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(f'{folder}/theirs')
        tokenizer.save_pretrained(f'{folder}/theirs')
        TransformersConverter(f'{folder}/theirs').convert(f'{folder}/converted')
        answer = ctranslate2.Generator(f'{folder}/converted').forward_batch(tokens.tolist())
        logits = torch.tensor(np.array(answer))
        theirs = model(tokens).logits
        differ = (logits - theirs).abs().max().item()
        print(f'  {fields}: logits of up to {theirs.abs().max():.2g} differ by {differ:.2g}')
        if fields in kept:
            same = same and differ < 1e-4
        else:                               # the same weights, with the defaults
            as_default = (logits - net()(tokens).logits).abs().max().item()
            print(f'      and from those of the default config by {as_default:.2g}')
            same = same and differ > 0.1 and as_default < 1e-4
sys.exit(not same)
PYTHON
