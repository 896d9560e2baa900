# llama.cpp's converter fails on a GPT-2 that transformers writes, for want of n_ctx, and drops other fields.
#
# Expected: convert_hf_to_gguf.py takes a GPT-2 that transformers 5.24.0 writes, and llama.cpp has its logits;
# or it says which field it does not know. Found, with the converter in llama-cpp-python 0.3.36, the llama.cpp
# in xllamacpp 2026.10.11549, and random models of 4 layers, whose blocks have matrices 8 times as large as
# those of new models. The last column is of the log-probabilities of all 50,257 tokens that may follow a text
# of 40. Their standard deviation is 0.16:
#
#     config.json                                 converter           largest difference
#     as transformers writes it                   KeyError: 'n_ctx'
#     with n_ctx, which OpenAI's own has:
#     nothing else changed                        converts            5e-4
#     activation_function 'gelu'                  converts            6e-4
#     layer_norm_epsilon 0.01                     converts            3e-4
#     tie_word_embeddings false                   converts            5e-4
#     activation_function 'relu'                  converts            0.19: computed with the default
#     scale_attn_by_inverse_layer_idx true        converts            0.16: computed with the default
#     scale_attn_weights false                    converts            0.68: computed with the default
#     n_inner 128, where 4 * n_embd is 256        converts            none: the file cannot be loaded
#
# "With the default": transformers has llama.cpp's numbers for these weights with the default config, to 1e-3.
# So the config.json of a GPT-2 of your own needs a line "n_ctx", with the value of n_positions. Keep the
# defaults of activation_function, n_inner and scale_attn_*, if it shall run in llama.cpp.
# This script exits with 1 if that has changed.
#
#     bash findings/llama_cpp_gpt2_fields.sh
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q torch==2.13.0 numpy==2.3.5 safetensors==0.8.0 transformers==5.24.0 \
    tokenizers==0.23.3 huggingface_hub==2.4.0 sentencepiece==0.2.3 tiktoken==0.14.0 \
    xllamacpp==2026.10.11549
# two sources: the converter of llama.cpp, and GPT-2's tokens. It knows a tokenizer by its tokens of one text
"$place/venv/bin/pip" download -q --no-deps --no-binary llama-cpp-python,openai-whisper -d "$place" \
    llama-cpp-python==0.3.36 openai-whisper==20250625
cd "$place"
for source in llama_cpp_python-*.tar.gz openai_whisper-*.tar.gz; do tar xzf "$source"; done
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 "$place/venv/bin/python" - <<'PYTHON'
import glob
import json
import subprocess
import sys
from pathlib import Path
import torch
import transformers
import xllamacpp
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

transformers.utils.logging.disable_progress_bar()
[converter] = glob.glob('llama_cpp_python-*/vendor/llama.cpp/convert_hf_to_gguf.py')
[tokens] = glob.glob('openai_whisper-*/whisper/assets/gpt2.tiktoken')
gpt2s = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
backend = TikTokenConverter(tokens, pattern=gpt2s, extra_special_tokens=['<|endoftext|>']).converted()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=backend, bos_token='<|endoftext|>', eos_token='<|endoftext|>')
text = torch.randint(50000, (40,), generator=torch.Generator().manual_seed(0))

def written(**fields):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(
        n_layer=4, n_head=2, n_embd=64, vocab_size=50257, n_positions=64, bos_token_id=50256,
        eos_token_id=50256, **fields)).eval()
    with torch.no_grad():
        for weight in model.transformer.h.parameters():
            if weight.dim() == 2:
                weight.mul_(8)
    model.save_pretrained('model')
    tokenizer.save_pretrained('model')
    return model

def theirs(model):
    with torch.no_grad():
        return model(text[None]).logits[0, -1].log_softmax(0)

def converted():
    Path('model.gguf').unlink(missing_ok=True)
    how = [sys.executable, converter, 'model', '--outtype', 'f32', '--outfile', 'model.gguf']
    return subprocess.run(how, capture_output=True, text=True)

def log_probabilities():
    """Of every token that may follow the text, by llama.cpp. A bias makes it write token 0, a '!'."""
    how = xllamacpp.CommonParams()
    how.model.path = 'model.gguf'
    how.n_ctx = 256
    how.n_parallel = 1
    how.verbosity = 0
    how.cache_type_k = how.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    how.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    answer = xllamacpp.Server(how).handle_completions(
        dict(prompt=text.tolist(), n_predict=1, n_probs=50257, logit_bias=[[0, 1000.0]]))
    found = torch.full((50257,), torch.nan)
    for token in answer['choices'][0]['logprobs']['content'][0]['top_logprobs']:
        found[token['id']] = token['logprob']
    return found

print('transformers', transformers.__version__, 'xllamacpp', xllamacpp.__version__, converter.split('/')[0])
written()
run = converted()
print('  as transformers writes it:', run.stderr.strip().splitlines()[-1])
same = run.returncode != 0 and "KeyError: 'n_ctx'" in run.stderr
kept = [{}, dict(activation_function='gelu'), dict(layer_norm_epsilon=0.01), dict(tie_word_embeddings=False)]
lost = [dict(activation_function='relu'), dict(scale_attn_by_inverse_layer_idx=True),
        dict(scale_attn_weights=False)]
for fields in [*kept, *lost, dict(n_inner=128)]:
    model = written(**fields)
    config = json.load(open('model/config.json'))
    json.dump(dict(config, n_ctx=64), open('model/config.json', 'w'))
    run = converted()
    if run.returncode:
        sys.exit(f'{fields}: ' + run.stderr.strip().splitlines()[-1])
    if 'n_inner' in fields:
        try:
            log_probabilities()
            same = False
        except RuntimeError as error:
            print(f'  with n_ctx, {fields}: {error}')
        continue
    found = log_probabilities()
    differ = (found - theirs(model)).abs().max().item()
    print(f'  with n_ctx, {fields}: {differ:.2g}, where the deviation is {theirs(model).std():.2g}')
    if fields in kept:
        same = same and differ < 2e-3
    else:                                   # the same weights, with the default config
        differ_then = (found - theirs(written())).abs().max().item()
        print(f'      and from those of the default config: {differ_then:.2g}')
        same = same and differ > 0.03 and differ_then < 2e-3
sys.exit(not same)
PYTHON
