# lm_eval scores the answers A), B), C) and D) alike behind a '(', if '(A' to '(D' are tokens: A) always wins.
#
# Expected: where a token of the whole text reaches across the border of context and continuation, lm_eval
# scores that token, or the continuation's own tokens, or raises an error. Found with lm_eval 0.4.13 and
# transformers 5.24.0: it encodes the context, encodes the whole, and takes as the answer what the whole has
# after as many tokens as the context has. Here text is cut into words much as in Llama 3, where a sign and
# the letters behind it are one word. A small model has learned four questions with answers B, C, D and B:
#
#     context ends with    answers         tokens scored behind the context     the four scores    accuracy
#     '(D) snow\n'         '(A)' to '(D)'  '\n' '(A' ')' and so on              differ             1
#     '(D) snow\n('        'A)' to 'D)'    ')' for each of them                 equal              0
#
# The text is the same in both rows. In the second one the letter is in no token: the model sees '(' and then
# ')'. All scores are equal, the first answer is taken, and the accuracy is the share of A among the right
# answers, for every model. No error is raised, and no warning comes. That an answer without ')' has no token
# left, which raises an AssertionError, is known upstream (pull request 4055, open).
#
# So end a context in front of such a sign, or take as context tokens only those that the whole text begins
# with, and count questions whose answers all have the same tokens. This script exits with 1 if that has
# changed.
#
#     bash findings/lm_eval_equal_answers.sh
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q torch==2.13.0 numpy==2.3.5 safetensors==0.8.0 transformers==5.24.0 \
    tokenizers==0.23.3 huggingface_hub==2.4.0 lm_eval==0.4.13 accelerate==1.15.0 peft==0.21.2 \
    datasets==5.2.0
cd "$place"
HF_HOME="$place/cache" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 "$place/venv/bin/python" - "$place" <<'PYTHON'
import json
import sys
from importlib.metadata import version
from pathlib import Path
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from tokenizers import Regex, Tokenizer, decoders, models, trainers
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

place = Path(sys.argv[1])
questions = [
    ('What is red?\n(A) the sky\n(B) a rose\n(C) grass\n(D) snow\n', 'B'),
    ('What is green?\n(A) the sky\n(B) a rose\n(C) grass\n(D) snow\n', 'C'),
    ('What is white?\n(A) the sky\n(B) a rose\n(C) grass\n(D) snow\n', 'D'),
    ('What is cold?\n(A) the sun\n(B) ice\n(C) fire\n(D) tea\n', 'B'),
]
texts = [f'{question}({answer})' for question, answer in questions]
words = Regex(r'[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+')
own = Tokenizer(models.BPE())
own.pre_tokenizer = Sequence([Split(words, 'isolated'), ByteLevel(add_prefix_space=False, use_regex=False)])
own.decoder = decoders.ByteLevel()
own.train_from_iterator(texts * 9, trainers.BpeTrainer(
    vocab_size=340, special_tokens=['<|end|>'], initial_alphabet=ByteLevel.alphabet(), show_progress=False))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, eos_token='<|end|>')

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, bos_token_id=0, eos_token_id=0))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for step in range(200):
    for text in texts:
        tokens = tokenizer(text, return_tensors='pt')['input_ids']
        model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()

(place / 'test.jsonl').write_text(''.join(
    json.dumps(dict(question=question, gold='ABCD'.index(answer))) + '\n' for question, answer in questions))
tasks = [dict(
    task=name, dataset_path='json', dataset_kwargs=dict(data_files=dict(test=str(place / 'test.jsonl'))),
    test_split='test', output_type='multiple_choice', doc_to_text='{{question}}' + end, doc_to_target='gold',
    doc_to_choice=choices, target_delimiter='',
) for name, end, choices in (('outside', '', ['(A)', '(B)', '(C)', '(D)']),
                             ('inside', '(', ['A)', 'B)', 'C)', 'D)']))]
lm = HFLM(pretrained=model.eval(), tokenizer=tokenizer, device='cpu', batch_size=4)
result = simple_evaluate(lm, tasks=tasks, bootstrap_iters=0)
print('lm_eval', version('lm_eval'), 'transformers', version('transformers'))
same = True
for name, end, first, accuracy in (('outside', '', '(', 1), ('inside', '(', '', 0)):
    equal = []
    for sample in result['samples'][name]:
        equal.append(len({score for score, _ in sample['filtered_resps']}) == 1)
        print(f'  {name}, scores:', [f'{score:.3f}' for score, _ in sample['filtered_resps']])
    pairs = [lm._encode_pair(questions[0][0] + end, f'{first}{letter})') for letter in 'ABCD']
    for before, answer in pairs:
        print(f'  {name}: ...', *tokenizer.convert_ids_to_tokens(before)[-2:], '|',
              *tokenizer.convert_ids_to_tokens(answer))
    found = result['results'][name]['acc,none']
    print(f'  {name}, accuracy: {found}')
    same = same and found == accuracy and equal == [name == 'inside'] * 4
    same = same and len({tuple(answer) for _, answer in pairs}) == (1 if name == 'inside' else 4)
sys.exit(not same)
PYTHON
