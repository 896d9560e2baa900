"""
What must be true of evaluate.py:  python -m pytest tests/test_evaluate.py

Twenty questions per task, made here in the publishers' formats and served from this machine. The comparison
with lm-evaluation-harness itself is skipped where lm_eval, transformers and tokenizers are not installed.
"""
import io
import json
import math
import random
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import evaluate
from model import GPT, GPTConfig
from pretrained import build, tokenizer
from runtime import save_checkpoint
from test_data import site                  # noqa: F401, a fixture
from test_scripts import complaint, place, run          # noqa: F401, place is a fixture

TASKS = list(evaluate.SOURCES)
WORDS = 'The a cat dog, house; tree 12 of under naïve über quickly "well" (said) and then not 3.5 it: so'
WORDS = [*WORDS.split(), 'a\u2028b']
EXACT = torch.autocast('cpu', enabled=False)
LABELS = [random.Random(i).randrange(2) for i in range(20)]            # of PIQA
BYTES = dict(encoding='bytes', vocab_size=256, dtype='uint8')

def rows_of(task):
    """Twenty questions as their publisher writes them, with what has to be cleaned and cut."""
    rng = random.Random(task)

    def text(few=3, many=9):
        return ' '.join(rng.choice(WORDS) for _ in range(rng.randint(few, many)))

    def row(i):
        if task == 'piqa':
            return dict(goal=text(), sol1=text(1, 5), sol2=text(1, 5))
        if task == 'winogrande':
            return dict(sentence=f'{text()} _ {text()} .', option1=text(1, 2), option2=text(1, 2),
                        answer=rng.choice('12'))
        if task == 'hellaswag':
            return dict(activity_label=text(1, 2), ctx_a=f'[header] {text()} [title] {text()}.',
                        ctx_b=rng.choice(['', text()]), label=rng.randrange(4),
                        endings=[f'{text(1, 5)}  [step] {text(1, 4)} ' for _ in range(4)])
        labels = '1234' if i % 7 == 0 else 'ABC' if i % 5 == 0 and task != 'openbookqa' else 'ABCD'
        asked = dict(stem=text(), choices=[dict(text=text(1, 4), label=label) for label in labels])
        return dict(question=asked, answerKey=rng.choice(labels))

    return [row(i) for i in range(20)]

def published():
    """Name -> content of all files, under the names that they get in data/tasks."""
    def lines(rows):
        return ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows).encode()

    def archive(*tasks):
        file = io.BytesIO()
        with zipfile.ZipFile(file, 'w') as out:
            for task in tasks:
                member = evaluate.SOURCES[task][0].partition('#')[2]
                out.writestr(f'__MACOSX/{member}', b'of no use')
                out.writestr(member, lines(rows_of(task)))
        return file.getvalue()

    return {
        'piqa-valid.jsonl': lines(rows_of('piqa')),
        'piqa-valid-labels.lst': ''.join(f'{label}\n' for label in LABELS).encode(),
        'arc-ARC-V1-Feb2018.zip': archive('arc_easy', 'arc_challenge'),
        'openbookqa-OpenBookQA-V1-Sep2018.zip': archive('openbookqa'),
        'winogrande-winogrande_1.1.zip': archive('winogrande'),
        'hellaswag-hellaswag_val.jsonl': lines(rows_of('hellaswag')),
    }

def put(folder):
    (folder / 'data' / 'tasks').mkdir(parents=True, exist_ok=True)
    for name, content in published().items():
        (folder / 'data' / 'tasks' / name).write_bytes(content)

def small(**fields):
    torch.manual_seed(0)
    sizes = dict(block_size=128, vocab_size=256, n_layer=2, n_head=2, n_embd=32)
    model = GPT(GPTConfig(**{**sizes, **fields})).eval()
    for weight in model.parameters():
        weight.data *= 6
    return model

def pairs_of(task, encode):
    asked = [pair for pairs, _, _ in evaluate.questions(task) for pair in pairs]
    return [evaluate.tokens_of_pair(encode, *pair) for pair in asked]

def accuracy(task, model, meta):
    both = SimpleNamespace(batch_size=5, autocast=EXACT)
    return evaluate.accuracy(task, model, meta, both, both)

# -----------------------------------------------------------------------------
# questions

def test_questions_are_downloaded_once(site, tmp_path, monkeypatch):    # noqa: F811
    monkeypatch.chdir(tmp_path)
    site.files = {f"/{name.partition('-')[2]}": content for name, content in published().items()}
    for task, sources in evaluate.SOURCES.items():
        own = []
        for source in sources:
            url, mark, member = source.partition('#')
            own.append(f"{site.url}/{url.rpartition('/')[2]}{mark}{member}")
        monkeypatch.setitem(evaluate.SOURCES, task, own)
    first = {task: evaluate.questions(task) for task in TASKS}
    assert {path.name for path in (tmp_path / 'data' / 'tasks').iterdir()} == published().keys()
    site.files = {}
    for task in TASKS:
        assert first[task] == evaluate.questions(task) and len(first[task]) == 20

def test_prompts():
    assert evaluate.plain(' [header] A [title] b  c ') == ' A. b c'
    assert evaluate.choices('Q', ['é', 'no'], 1) == ([('Q', ' é'), ('Q', ' no')], ['é', 'no'], 1)
    line = json.dumps(dict(sentence='As _ was _ here.', option1='he', option2='it', answer='2'))
    pairs = [('As he', ' was _ here.'), ('As it', ' was _ here.')]
    assert evaluate.question('winogrande', line) == (pairs, ['As he', 'As it'], 1)
    pair = evaluate.tokens_of_pair(lambda text: list(text.encode()), 'ab ', ' c')
    assert pair == (list(b'ab'), list(b'  c'))

# -----------------------------------------------------------------------------
# scoring

@pytest.mark.parametrize('task', TASKS)
def test_against_the_harness(task, tmp_path, monkeypatch):
    """Identical choices, and log-likelihoods within 1e-4, in batches of two sizes. Some texts are cut."""
    datasets, lm_eval, tokenizers, transformers, huggingface = map(pytest.importorskip, (
        'datasets', 'lm_eval', 'tokenizers', 'transformers', 'lm_eval.models.huggingface'))
    monkeypatch.chdir(tmp_path)
    put(tmp_path)
    rows = rows_of(task)
    texts = [json.dumps(row, ensure_ascii=False) for row in rows]
    own = tokenizers.ByteLevelBPETokenizer()
    own.train_from_iterator(texts, vocab_size=400, show_progress=False)
    pairs = pairs_of(task, lambda text: own.encode(text).ids)
    # tokens the model sees: half of the texts are longer, where all answers fit
    median = int(np.median([len(context + answer) for context, answer in pairs]))
    length = max(median, *(len(answer) for _, answer in pairs))
    ends = dict(eos_token='!', bos_token='!')
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=own._tokenizer, **ends)
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=length, bos_token_id=0, eos_token_id=0)).eval()
    for weight in theirs.parameters():
        weight.data *= 6 if weight.dim() == 2 else 1
    theirs.save_pretrained(tmp_path / 'model')
    wrapped.save_pretrained(tmp_path / 'model')

    def row_of_the_hub(row, label):
        if task == 'piqa':
            return dict(row, label=label)
        if task == 'hellaswag':
            return dict(row, label=str(row['label']))
        if task == 'winogrande':
            return row
        stem = row['question']['stem']
        choices = {key: [x[key] for x in row['question']['choices']] for key in ('text', 'label')}
        return dict(question=stem, question_stem=stem, answerKey=row['answerKey'], choices=choices)

    def load_dataset(**_):
        found = datasets.Dataset.from_list([row_of_the_hub(*both) for both in zip(rows, LABELS)])
        return dict(train=found, validation=found, test=found)

    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
    limits = dict(max_length=length, batch_size=4, device='cpu')
    harness = huggingface.HFLM(pretrained=theirs, tokenizer=wrapped, **limits)
    want = lm_eval.simple_evaluate(harness, tasks=[task], bootstrap_iters=2)
    samples = sorted(want['samples'][task], key=lambda sample: sample['doc_id'])
    want_scores = [score for sample in samples for score, _ in sample['filtered_resps']]
    model, meta = build(str(tmp_path / 'model'))
    encode, _ = tokenizer(meta)
    for batch_size in (1, 7):
        found = evaluate.log_likelihoods(model.eval(), pairs_of(task, encode), batch_size, EXACT)
        assert found == pytest.approx(want_scores, abs=1e-4)
    got = accuracy(task, model, meta)
    numbers = want['results'][task]
    assert (got['n'], got['acc']) == (20, numbers['acc,none'])
    assert got['acc_stderr'] == pytest.approx(numbers['acc_stderr,none'])
    asked = evaluate.questions(task)
    scores = iter(found)
    if task != 'winogrande':                    # its acc_norm counts characters
        best = [np.argmax([next(scores) / len(answer) for answer in answers]) for _, answers, _ in asked]
        assert np.mean([i == gold for i, (_, _, gold) in zip(best, asked)]) == numbers['acc_norm,none']
    cut = sum(len(encode(''.join(pair))) > length + 1 for pairs, _, _ in asked for pair in pairs)
    assert 0 < got['acc'] < 1 and 0 < got['texts_cut'] == cut < len(want_scores)

@pytest.mark.parametrize('scheme', ['standard', 'leapfrog', 'symplectic'])
def test_log_likelihoods_are_those_of_one_text_at_a_time(scheme):
    model = small(scheme=scheme, block_size=64)
    rng = random.Random(0)

    def tokens(most):
        return [rng.randrange(256) for _ in range(rng.randint(1, most))]

    pairs = [(tokens(90), tokens(9)) for _ in range(23)]
    got = evaluate.log_likelihoods(model, pairs, 4, EXACT)
    for (context, continuation), score in zip(pairs, got):
        text = (context + continuation)[-65:]
        with torch.no_grad():
            logp = F.log_softmax(model.lm_head(model.hidden(torch.tensor([text[:-1]]))), -1)[0]
        want = sum(logp[i - len(continuation), token] for i, token in enumerate(continuation))
        assert score == pytest.approx(want.item(), abs=1e-4)
    with pytest.raises(ValueError, match='an answer is longer than the 64 tokens'):
        evaluate.log_likelihoods(model, [([1], [2] * 65)], 4, EXACT)

def test_the_shortest_of_equals_wins_by_bytes(monkeypatch):
    asked = [evaluate.choices('Question', ['é' * 10, 'a' * 12], 0)] * 2
    asked += [evaluate.choices('Question', ['b' * 30, 'c' * 6], 0)]
    monkeypatch.setattr(evaluate, 'questions', lambda task: asked)
    monkeypatch.setattr(evaluate, 'log_likelihoods', lambda *_: [-10.0, -7.0, -10.0, -7.0, -9.0, -8.0])
    got = accuracy('piqa', small(), BYTES)
    # -10 / 20 against -7 / 12, in characters it would be -10 / 10 against -7 / 12
    assert (got['acc'], got['acc_norm']) == (0.0, 1.0)
    assert (got['acc_stderr'], got['acc_norm_stderr']) == (0.0, 0.0)
    assert evaluate.share('x', [True, False, False, True])['x_stderr'] == pytest.approx(math.sqrt(0.25 / 3))

# -----------------------------------------------------------------------------
# the script

@pytest.fixture
def models(place):                                                      # noqa: F811
    made = dict(one=small(scheme='standard'), two=small(scheme='leapfrog', block_size=96), nan=small())
    made['nan'].transformer.h[1].mlp.c_proj.weight.data[0, 0] = math.nan
    for name, model in made.items():
        checkpoint = dict(model=model.state_dict(), config=vars(model.config), meta=BYTES)
        save_checkpoint([str(place / f'{name}.pt')], checkpoint)
    put(place)
    return place

def test_the_script_in_one_process_and_in_two(models):
    """Both find the same; the JSON holds what the table shows."""
    flags = dict(tasks=','.join(TASKS), datasets='tiny', init_from='one.pt,two.pt', device='cpu')
    run(models, 'evaluate.py', json='one.json', **flags)
    output = run(models, 'evaluate.py', json='two.json', processes=2, **flags)
    one, two = (json.loads((models / f'{name}.json').read_text()) for name in ('one', 'two'))
    assert one.keys() == {'one.pt', 'two.pt'} and one['one.pt']['tasks'].keys() == {*TASKS}
    for name in one:
        for task in TASKS:
            assert one[name]['tasks'][task] == pytest.approx(two[name]['tasks'][task])
            assert f'{one[name]["tasks"][task]["acc"]:11.4f}' in output
        assert one[name]['datasets']['tiny'] == pytest.approx(two[name]['datasets']['tiny'], rel=1e-5)
    assert 'texts are cut on the left to the 96 tokens' in output
    val = torch.from_numpy(np.fromfile(models / 'data' / 'tiny' / 'val.bin', np.uint8)).long()
    model = small(scheme='leapfrog', block_size=96)
    losses = [model(val[None, i:i + 96], val[None, i + 1:i + 97])[1].item()
              for i in np.linspace(0, len(val) - 97, 400).astype(int)]
    found = one['two.pt']['datasets']['tiny']
    assert found['loss'] == pytest.approx(np.mean(losses), rel=1e-5)
    assert found['perplexity'] == pytest.approx(math.exp(found['loss']))

@pytest.mark.parametrize('flags, words', [
    (dict(init_from='none.pt', tasks='piqa'), 'there is no checkpoint none.pt'),
    (dict(init_from='one.pt', tasks='pica'), 'some of piqa,arc_easy'),
    (dict(init_from='one.pt'), 'give --datasets=..., or --tasks=...'),
    (dict(init_from='one.pt', datasets='tiny', json='none/x.json'), 'none/x.json'),
    (dict(init_from='nan.pt', tasks='winogrande'), 'the log-likelihoods are not finite'),
    (dict(init_from='nan.pt', datasets='tiny'), 'the validation loss is nan'),
    (dict(init_from='one.pt', datasets='nowhere'), 'no data, or'),
    (dict(init_from='one.pt', datasets='tiny', block_size=129), 'longer than block_size = 128'),
], ids=str)
def test_evaluate_complains_in_a_sentence(models, flags, words):
    assert words in complaint(models, 'evaluate.py', **flags)
