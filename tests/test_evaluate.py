"""
What must be true of evaluate.py:  python -m pytest tests/test_evaluate.py

Twenty questions per task, made here in the publishers' formats and served from this machine. The comparison with
lm-evaluation-harness itself is skipped where lm_eval, transformers and tokenizers are not installed.
"""
import io
import json
import math
import random
import zipfile

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import evaluate
from model import GPT, GPTConfig
from runtime import save_checkpoint
from pretrained import build, tokenizer
from test_data import site                                              # noqa: F401, a fixture
from test_scripts import complaint, place, run                 # noqa: F401, place is a fixture

TASKS = list(evaluate.SOURCES)
WORDS = 'The a cat dog, house; tree 12 runs sees of under naïve über quickly "well" (said) and then was not 3.5 it: so'.split() + ['a\u2028b']

def rows_of(task):
    """Twenty questions as their publisher writes them, with what has to be cleaned and cut."""
    rng = random.Random(task)

    def text(few=3, many=9):
        return ' '.join(rng.choice(WORDS) for _ in range(rng.randint(few, many)))

    if task == 'piqa':
        return [dict(goal=text(), sol1=text(1, 5), sol2=text(1, 5)) for _ in range(20)]
    if task == 'winogrande':
        return [dict(sentence=f'{text()} _ {text()} .', option1=text(1, 2), option2=text(1, 2), answer=rng.choice('12'))
                for _ in range(20)]
    if task == 'hellaswag':
        return [dict(activity_label=text(1, 2), ctx_a=f'[header] {text()} [title] {text()}.', ctx_b=rng.choice(['', text()]),
                     endings=[f'{text(1, 5)}  [step] {text(1, 4)} ' for _ in range(4)], label=rng.randrange(4))
                for _ in range(20)]
    result = []
    for i in range(20):
        labels = '1234' if i % 7 == 0 else 'ABC' if i % 5 == 0 and task != 'openbookqa' else 'ABCD'
        result.append(dict(question=dict(stem=text(), choices=[dict(text=text(1, 4), label=label) for label in labels]),
                           answerKey=rng.choice(labels)))
    return result

def labels_of_piqa():
    return [random.Random(i).randrange(2) for i in range(20)]

def published():
    """Name -> content of all files, under the names that they get in data/tasks."""
    def lines(rows):
        return ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows).encode()

    def archive(**members):
        file = io.BytesIO()
        with zipfile.ZipFile(file, 'w') as out:
            for name, content in members.items():
                out.writestr(f'__MACOSX/{name}', b'of no use')
                out.writestr(name, content)
        return file.getvalue()

    return {
        'piqa-valid.jsonl': lines(rows_of('piqa')),
        'piqa-valid-labels.lst': ''.join(f'{label}\n' for label in labels_of_piqa()).encode(),
        'arc-ARC-V1-Feb2018.zip': archive(**{f'ARC-V1-Feb2018-2/ARC-{name}/ARC-{name}-{split}.jsonl':
                                             lines(rows_of(f'arc_{name.lower()}') if split == 'Test' else [])
                                             for name in ('Easy', 'Challenge') for split in ('Dev', 'Test')}),
        'openbookqa-OpenBookQA-V1-Sep2018.zip': archive(**{
            'OpenBookQA-V1-Sep2018/Data/Additional/test.jsonl': b'',
            'OpenBookQA-V1-Sep2018/Data/Main/test.jsonl': lines(rows_of('openbookqa'))}),
        'winogrande-winogrande_1.1.zip': archive(**{'winogrande_1.1/dev.jsonl': lines(rows_of('winogrande'))}),
        'hellaswag-hellaswag_val.jsonl': lines(rows_of('hellaswag')),
    }

def put(folder, files):
    (folder / 'data' / 'tasks').mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / 'data' / 'tasks' / name).write_bytes(content)

def small(**fields):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**dict(block_size=128, vocab_size=256, n_layer=2, n_head=2, n_embd=32), **fields})).eval()
    for weight in model.parameters():
        weight.data *= 6
    return model

def scores(model, encode, task, batch_size=16):
    pairs = [evaluate.tokens_of_pair(encode, *pair) for pairs, _, _ in evaluate.questions(task) for pair in pairs]
    return evaluate.log_likelihoods(model, pairs, batch_size, torch.autocast('cpu', enabled=False))

# -----------------------------------------------------------------------------
# questions

def test_questions_are_downloaded_once(site, tmp_path, monkeypatch):    # noqa: F811
    monkeypatch.chdir(tmp_path)
    for task, urls in evaluate.SOURCES.items():
        monkeypatch.setitem(evaluate.SOURCES, task, [f"{site.url}/{url.rpartition('/')[2]}" for url in urls])
    site.files = {f"/{name.partition('-')[2]}": content for name, content in published().items()}
    first = {task: evaluate.questions(task) for task in TASKS}
    assert {path.name for path in (tmp_path / 'data' / 'tasks').iterdir()} == published().keys()
    site.files = {}
    for task in TASKS:
        assert first[task] == evaluate.questions(task) and len(first[task]) == 20

def test_prompts():
    assert evaluate.plain(' [header] A [title] b  c ') == ' A. b c'
    assert evaluate.choices('Q', ['é', 'no'], 1) == ([('Q', ' é'), ('Q', ' no')], [2, 2], 1)
    assert evaluate.partial_choices('As _ was here.', ['he', 'it'], 0)[0] == [('As he', ' was here.'), ('As it', ' was here.')]
    assert evaluate.partial_choices('a _ b _ c', ['x', 'y'], 0)[0][1] == ('a y', ' b _ c')
    pair = evaluate.tokens_of_pair(lambda text: list(text.encode()), 'ab ', ' c')
    assert pair == (list(b'ab'), list(b'  c'))

# -----------------------------------------------------------------------------
# scoring

@pytest.mark.parametrize('task', TASKS)
def test_against_the_harness(task, tmp_path, monkeypatch):
    """Identical choices, and log-likelihoods within 1e-4, in batches of several sizes; some texts have to be cut."""
    for package in ('lm_eval', 'transformers', 'tokenizers', 'datasets'):
        pytest.importorskip(package)
    import datasets
    import lm_eval
    import tokenizers
    import transformers
    from lm_eval.models.huggingface import HFLM

    monkeypatch.chdir(tmp_path)
    put(tmp_path, published())
    rows = rows_of(task)
    own = tokenizers.ByteLevelBPETokenizer()
    own.train_from_iterator([json.dumps(row, ensure_ascii=False) for row in rows], vocab_size=400, show_progress=False)
    pairs = [evaluate.tokens_of_pair(lambda text: own.encode(text).ids, *pair)
             for pairs, _, _ in evaluate.questions(task) for pair in pairs]
    # tokens the model sees: half of the texts are longer, where all answers fit
    length = max(max(len(answer) for _, answer in pairs), int(np.median([len(a) + len(b) for a, b in pairs])))
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=own._tokenizer, eos_token='!', bos_token='!')
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=length, bos_token_id=0, eos_token_id=0)).eval()
    for weight in theirs.parameters():
        weight.data *= 6 if weight.dim() == 2 else 1
    theirs.save_pretrained(tmp_path / 'model')
    wrapped.save_pretrained(tmp_path / 'model')

    def harness_rows(**_):                      # as the hub has them
        if task == 'piqa':
            found = [dict(row, label=label) for row, label in zip(rows, labels_of_piqa())]
        elif task == 'hellaswag':
            found = [dict(row, label=str(row['label'])) for row in rows]
        elif task == 'winogrande':
            found = rows
        else:
            found = [dict(question=row['question']['stem'], question_stem=row['question']['stem'], answerKey=row['answerKey'],
                          choices={key: [x[key] for x in row['question']['choices']] for key in ('text', 'label')})
                     for row in rows]
        return {split: datasets.Dataset.from_list(found) for split in ('train', 'validation', 'test')}

    monkeypatch.setattr(datasets, 'load_dataset', harness_rows)
    want = lm_eval.simple_evaluate(HFLM(pretrained=theirs, tokenizer=wrapped, max_length=length, batch_size=4, device='cpu'),
                                   tasks=[task], bootstrap_iters=2)
    samples = sorted(want['samples'][task], key=lambda sample: sample['doc_id'])
    want_scores = [score for sample in samples for score, _ in sample['filtered_resps']]
    model, meta = build(str(tmp_path / 'model'))
    encode, _ = tokenizer(meta)
    for batch_size in (1, 7):
        found = scores(model.eval(), encode, task, batch_size)
        assert found == pytest.approx(want_scores, abs=1e-4)
    got, numbers = evaluate.accuracy(task, model, encode, 5, torch.autocast('cpu', enabled=False)), want['results'][task]
    assert (got['n'], got['acc']) == (20, numbers['acc,none'])
    assert got['acc_stderr'] == pytest.approx(numbers['acc_stderr,none'])
    asked, found = evaluate.questions(task), iter(found)
    if task != 'winogrande':                    # its acc_norm counts characters
        right = [np.argmax([next(found) / (len(answer) - 1) for _, answer in pairs]) == gold for pairs, _, gold in asked]
        assert np.mean(right) == numbers['acc_norm,none']
    assert got['texts_cut'] == sum(len(encode(''.join(pair))) > length + 1 for pairs, _, _ in asked for pair in pairs)
    assert 0 < got['acc'] < 1 and 0 < got['texts_cut'] < len(want_scores)

@pytest.mark.parametrize('scheme', ['standard', 'leapfrog', 'symplectic'])
def test_log_likelihoods_are_those_of_one_text_at_a_time(scheme):
    model, rng = small(scheme=scheme, block_size=64), random.Random(0)
    for pair in (([], [1]), ([1], []), ([1], [2] * 65)):
        with pytest.raises(ValueError, match='a question or an answer has no token'):
            evaluate.log_likelihoods(model, [pair], 4, torch.autocast('cpu', enabled=False))
    pairs = [([rng.randrange(256) for _ in range(rng.randint(1, 90))], [rng.randrange(256) for _ in range(rng.randint(1, 9))])
             for _ in range(23)]
    got = evaluate.log_likelihoods(model, pairs, 4, torch.autocast('cpu', enabled=False))
    for (context, continuation), score in zip(pairs, got):
        text = (context + continuation)[-65:]
        idx = torch.tensor([text])
        with torch.no_grad():
            logp = F.log_softmax(model.lm_head(model.hidden(idx[:, :-1])), -1)[0]
        want = sum(logp[len(text) - len(continuation) - 1 + i, token] for i, token in enumerate(continuation))
        assert score == pytest.approx(want.item(), abs=1e-4)

def test_the_shortest_of_equals_wins_by_bytes(monkeypatch):
    asked = [(*evaluate.choices('Question', ['é' * 10, 'a' * 12], 0)[:2], 0)] * 2 + [
        evaluate.choices('Question', ['b' * 30, 'c' * 6], 0)]
    monkeypatch.setattr(evaluate, 'questions', lambda task: asked)
    monkeypatch.setattr(evaluate, 'log_likelihoods', lambda model, pairs, *_: [-10.0, -7.0, -10.0, -7.0, -9.0, -8.0])
    got = evaluate.accuracy('piqa', small(), lambda text: list(text.encode()), 4, None)
    # -10 / 20 against -7 / 12, in characters it would be -10 / 10 against -7 / 12
    assert (got['acc'], got['acc_norm']) == (0.0, 1.0)
    assert (got['acc_stderr'], got['acc_norm_stderr']) == (0.0, 0.0)
    assert evaluate.standard_error([True, False, False, True]) == pytest.approx(math.sqrt(0.25 / 3))

# -----------------------------------------------------------------------------
# the script

@pytest.fixture
def models(place):                                                      # noqa: F811
    for name, fields in (('one', dict(scheme='standard')), ('two', dict(scheme='leapfrog', block_size=96)),
                         ('nan', dict(scheme='midpoint'))):
        model = small(**fields)
        if name == 'nan':
            model.transformer.h[1].mlp.c_proj.weight.data[0, 0] = math.nan
        save_checkpoint([str(place / f'{name}.pt')], dict(model=model.state_dict(), config=vars(model.config),
                                                        meta=dict(encoding='bytes', vocab_size=256, dtype='uint8')))
    return place

def test_the_script_in_one_process_and_in_two(models):
    """Both find the same; the JSON holds what the table shows."""
    put(models, published())
    reports = []
    for processes in (1, 2):
        output = run(models, 'evaluate.py', processes=processes, tasks=','.join(TASKS), init_from='one.pt,two.pt',
                     datasets='tiny', device='cpu')
        reports.append(json.loads((models / 'evaluation.json').read_text()))
    one, two = reports
    assert one.keys() == {'one.pt', 'two.pt'} and one['one.pt']['tasks'].keys() == {*TASKS}
    for name in one:
        for task in TASKS:
            assert one[name]['tasks'][task] == pytest.approx(two[name]['tasks'][task])
            assert f'{one[name]["tasks"][task]["acc"]:11.4f}' in output
        assert one[name]['datasets']['tiny'] == pytest.approx(two[name]['datasets']['tiny'], rel=1e-5)
    assert 'two.pt, hellaswag' in output and 'cut on the left' in output
    val = np.fromfile(models / 'data' / 'tiny' / 'val.bin', np.uint8).astype(int)
    model = small(scheme='leapfrog', block_size=96)
    losses = [model(torch.tensor(val[None, i:i + 96]), torch.tensor(val[None, i + 1:i + 97]))[1].item()
              for i in np.linspace(0, len(val) - 97, 400).astype(int)]
    assert one['two.pt']['datasets']['tiny']['loss'] == pytest.approx(np.mean(losses), rel=1e-5)
    assert one['two.pt']['datasets']['tiny']['perplexity'] == pytest.approx(math.exp(one['two.pt']['datasets']['tiny']['loss']))

@pytest.mark.parametrize('flags, words', [
    (dict(init_from='none.pt', tasks='piqa'), 'there is no checkpoint none.pt'),
    (dict(init_from='one.pt', tasks='pica'), "unknown task 'pica': choose some of piqa,arc_easy"),
    (dict(init_from='one.pt'), 'there is nothing to do'),
    (dict(init_from='one.pt', datasets='tiny', json='none/x.json'), 'none/x.json cannot be written'),
    (dict(init_from='nan.pt', tasks='winogrande'), 'the log-likelihoods are not finite'),
    (dict(init_from='nan.pt', datasets='tiny'), 'the loss is nan'),
    (dict(init_from='one.pt', tasks='openbookqa'), 'is not what openbookqa publishes'),
    (dict(init_from='one.pt', datasets='nowhere'), 'there is no data in'),
    (dict(init_from='one.pt', datasets='tiny', block_size=129), 'one.pt sees 128 tokens at most'),
    (dict(init_from='one.pt', tasks='piqa'), 'is not what piqa publishes'),
    (dict(init_from='one.pt', tasks='arc_easy'), 'is not what arc_easy publishes'),
    (dict(init_from='one.pt', tasks='hellaswag'), 'the questions of hellaswag are damaged'),
], ids=str)
def test_evaluate_complains_in_a_sentence(models, flags, words):
    damaged = bytearray(published()['openbookqa-OpenBookQA-V1-Sep2018.zip'])
    damaged[-300:-200] = bytes(100)             # the archive's table of contents
    put(models, {**published(), 'openbookqa-OpenBookQA-V1-Sep2018.zip': damaged, 'piqa-valid.jsonl': b'\xff', 'piqa-valid-labels.lst': b'0', 'arc-ARC-V1-Feb2018.zip': b'PK',
                 'hellaswag-hellaswag_val.jsonl': b'{"ctx_a": 1}'})
    assert words in complaint(models, 'evaluate.py', **flags)
