"""
Zero-shot accuracy on multiple-choice questions, and validation loss, of one model or several side by side.

    python evaluate.py --init_from=gpt2 --tasks=piqa,arc_easy,arc_challenge,openbookqa,winogrande,hellaswag
    python evaluate.py --init_from=gpt2,out_retrofit_gpt2/last.pt --tasks=piqa
    python evaluate.py --init_from=out_python/best.pt --datasets=python         # loss and perplexity
    python evaluate.py --init_from=out_finetune/last.pt --datasets=text --as_standard=True
    torchrun --standalone --nproc_per_node=8 evaluate.py --init_from=gpt2-xl --tasks=hellaswag

A question is answered with the continuation that the model finds likeliest: the sum of its tokens'
log-probabilities (acc), or that sum divided by the length of the answer in bytes (acc_norm). Prompts and
scoring are those of EleutherAI's lm-evaluation-harness 0.4, which calls our acc_norm acc_bytes. Its own
acc_norm divides by characters: the same for ASCII text. A token that has letters of both question and answer
is scored here; there the answer loses it. The questions are downloaded once, into data/tasks.
"""
import json
import os
import re
import sys
import zipfile
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from configurator import configure
from data.download import download, write_atomically
from pretrained import as_standard, build, same_tokens, tokenizer
from runtime import all_reduce, leave, main, open_data, rank, say, start, validation_loss, world

@dataclass
class Knobs:
    init_from: str = 'out/best.pt'          # checkpoints, folders or models of the hub, commas between them
    tasks: str = ''                         # some of the six above, commas between them
    datasets: str = ''                      # folders of data/ whose validation loss is computed, likewise
    json: str = 'evaluation.json'           # the file that gets all results
    batch_size: int = 16                    # sequences
    as_standard: bool = False               # each model also as the standard net that it is near to
    block_size: int | None = None           # tokens of a window of validation data; None: all the model sees
    eval_windows: int = 400                 # such windows
    device: str = 'auto'                    # 'cuda', 'mps', 'cpu'
    dtype: str = 'auto'                     # 'float32', 'bfloat16', 'float16'

# -----------------------------------------------------------------------------
# the questions, from their publishers

S3 = 'https://ai2-public-datasets.s3.amazonaws.com'
SOURCES = {                                 # behind a #: the file in an archive
    'piqa': ['https://yonatanbisk.com/piqa/data/valid.jsonl',
             'https://yonatanbisk.com/piqa/data/valid-labels.lst'],
    'arc_easy': [f'{S3}/arc/ARC-V1-Feb2018.zip#ARC-V1-Feb2018-2/ARC-Easy/ARC-Easy-Test.jsonl'],
    'arc_challenge': [f'{S3}/arc/ARC-V1-Feb2018.zip#ARC-V1-Feb2018-2/ARC-Challenge/ARC-Challenge-Test.jsonl'],
    'openbookqa': [f'{S3}/open-book-qa/OpenBookQA-V1-Sep2018.zip#OpenBookQA-V1-Sep2018/Data/Main/test.jsonl'],
    'winogrande': ['https://storage.googleapis.com/ai2-mosaic/public/winogrande/winogrande_1.1.zip'
                   '#winogrande_1.1/dev.jsonl'],
    'hellaswag': ['https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl'],
}

def lines_of(task, source):
    """The lines of one file of a task, downloaded if need be."""
    url, _, member = source.partition('#')
    path = os.path.join('data', 'tasks', f"{task.split('_')[0]}-{os.path.basename(url)}")
    download(url, path)
    file = zipfile.ZipFile(path).open(member) if member else open(path, 'rb')
    with file:
        return [line for line in file.read().decode().split('\n') if line.strip()]

def questions(task):
    """A list of (pairs of context and continuation, one for each answer; answers; index of the right one)."""
    files = [lines_of(task, source) for source in SOURCES[task]]
    return [question(task, *lines) for lines in zip(*files, strict=True)]

def question(task, line, label=None):
    row = json.loads(line)
    if task == 'piqa':                      # its labels are in a file of their own
        return choices(f"Question: {row['goal']}\nAnswer:", [row['sol1'], row['sol2']], int(label))
    if task == 'winogrande':                # each option fills the gap, and the rest is scored
        before, after = row['sentence'].split('_', 1)
        filled = [before + row['option1'], before + row['option2']]
        return [(context, f' {after.strip()}') for context in filled], filled, int(row['answer']) - 1
    if task == 'hellaswag':
        context = plain(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
        return choices(context, [plain(ending) for ending in row['endings']], int(row['label']))
    stem = row['question']['stem']
    answers = row['question']['choices']
    labels = [answer['label'] for answer in answers]
    context = stem if task == 'openbookqa' else f'Question: {stem}\nAnswer:'
    return choices(context, [answer['text'] for answer in answers], labels.index(row['answerKey'].strip()))

def choices(context, answers, gold):
    return [(context, f' {answer}') for answer in answers], answers, gold

def plain(text):
    """HellaSwag's texts are from WikiHow, with its markup."""
    text = re.sub(r'\[.*?\]', '', text.strip().replace(' [title]', '. '))
    return text.replace('  ', ' ')

# -----------------------------------------------------------------------------
# scoring

def tokens_of_pair(encode, context, continuation):
    """
    Tokens of both, as the whole text has them. A token that has characters of both, or spaces that end the
    context, belongs to the continuation.
    """
    before = encode(context.rstrip())
    tokens = encode(context + continuation)
    differ = [j for j, (one, other) in enumerate(zip(before, tokens)) if one != other]
    n = max(1, min([len(before), *differ]))
    return tokens[:n], tokens[n:]

@torch.no_grad()
def log_likelihoods(model, pairs, batch_size, autocast, title=''):
    """The log-probability, in nats, of each answer after its context. Too long a text loses its start."""
    seen = model.config.block_size
    if any(len(answer) > seen for _, answer in pairs):
        raise ValueError(f'an answer is longer than the {seen} tokens that the model sees: try another task')
    inputs = [torch.tensor((context + answer)[:-1][-seen:]) for context, answer in pairs]
    targets = [torch.tensor(([-1] * (len(context) - 1) + answer)[-seen:]) for context, answer in pairs]
    head = model.lm_head.weight.float()                                         # (V, C)
    order = sorted(range(len(pairs)), key=lambda i: -len(inputs[i]))            # a batch is of like lengths
    result = [0.0] * len(pairs)
    for first in tqdm(range(0, len(order), batch_size), desc=title, leave=False, disable=not main):
        batch = order[first:first + batch_size]
        x = pad_sequence([inputs[i] for i in batch], batch_first=True).to(head.device)          # (B, T)
        y = pad_sequence([targets[i] for i in batch], batch_first=True, padding_value=-1).to(head.device)
        with autocast:
            x = model.hidden(x)[y != -1]                                        # (N, C)
        chunks = zip(x.split(1024), y[y != -1].split(1024))                     # never all logits at a time
        losses = [F.cross_entropy(F.linear(x_i.float(), head), y_i, reduction='none') for x_i, y_i in chunks]
        for i, loss in zip(batch, torch.cat(losses).split([len(pairs[i][1]) for i in batch])):
            result[i] = -loss.sum().item()
    return result

def accuracy(task, model, meta, knobs, here):
    """A task's row of the table, for one model. Each process takes its share of the texts."""
    if meta['encoding'] == 'chars':
        raise ValueError('this model knows only the characters of its own text: give --datasets, not --tasks')
    encode, _ = tokenizer(meta)
    asked = questions(task)
    texts = [tokens_of_pair(encode, *pair) for pairs, _, _ in asked for pair in pairs]
    cut = sum(len(context + continuation) > model.config.block_size + 1 for context, continuation in texts)
    if cut:
        say(f'{task}: {cut} texts are cut on the left to the {model.config.block_size} tokens of this model')
    scores = np.zeros(len(texts))
    scores[rank::world] = log_likelihoods(model, texts[rank::world], knobs.batch_size, here.autocast, task)
    scores = np.array(all_reduce(*scores))
    if not np.isfinite(scores).all():
        raise ValueError(f'{task}: the log-likelihoods are not finite: try --dtype=float32')
    acc = []
    acc_norm = []
    for pairs, answers, gold in asked:
        own, scores = np.split(scores, [len(pairs)])
        acc.append(np.argmax(own) == gold)
        acc_norm.append(np.argmax(own / [len(answer.encode()) for answer in answers]) == gold)
    result = dict(n=len(asked), texts_cut=cut, **share('acc', acc))
    if task != 'winogrande':                # whose continuations are all the same
        result.update(share('acc_norm', acc_norm))
    return result

def share(name, right):
    """Of right answers, with its standard error: the sample's deviation over the root of its size."""
    return {name: np.mean(right), f'{name}_stderr': np.std(right, ddof=1) / len(right) ** 0.5}

def validation(dataset, name, model, meta, knobs, here):
    """A data set's row of the table, for one model."""
    windows = SimpleNamespace(dataset=dataset, block_size=knobs.block_size or model.config.block_size,
                              eval_windows=knobs.eval_windows, batch_size=knobs.batch_size)
    its_meta, _, data = open_data(windows)
    same_tokens(name, meta, f'data/{dataset}', its_meta)
    loss = validation_loss(model, data, windows, here)
    return dict(loss=loss, perplexity=float(np.exp(loss)))

# -----------------------------------------------------------------------------
# the report

def keep(report, path):
    if main:
        write_atomically(path, json.dumps(report, indent=1).encode())

def show(report, tasks, datasets):
    """The tables: a row for each task or data set, and columns for each model."""
    numbers = range(1, len(report) + 1)
    if tasks:
        say('\nzero-shot             n', *[f'{f"[{j}] acc":>10}   error  acc_norm   error' for j in numbers])
    for task in tasks:
        found = [model['tasks'][task] for model in report.values()]
        say(f'{task:16}{found[0]["n"]:7}', *[columns(x) for x in found])
    if datasets:
        say('\nvalidation             ', *[f'{f"[{j}] loss":>10}        perplexity' for j in numbers])
    for dataset in datasets:
        found = [model['datasets'][dataset] for model in report.values()]
        say(f'{dataset:23}', *[f'{x["loss"]:10.4f}{x["perplexity"]:18.2f}' for x in found])

def columns(x):
    acc = f'{x["acc"]:10.4f}{x["acc_stderr"]:8.4f}'
    return acc + (f'{x["acc_norm"]:10.4f}{x["acc_norm_stderr"]:8.4f}' if 'acc_norm' in x else ' ' * 18)

if __name__ == '__main__':
    knobs = configure(Knobs, sys.argv[1:])
    here = start(knobs)
    torch.backends.cuda.enable_cudnn_sdp(False)         # it makes a plan for every new length of a text
    models = [(name, standard) for name in knobs.init_from.split(',')
              for standard in ([False, True] if knobs.as_standard else [False])]
    tasks = [task for task in knobs.tasks.split(',') if task]
    datasets = [dataset for dataset in knobs.datasets.split(',') if dataset]
    if not tasks + datasets or set(tasks) - set(SOURCES):
        raise ValueError(f"give --datasets=..., or --tasks=... with some of {','.join(SOURCES)}")

    report = {}                                         # model -> 'tasks' or 'datasets' -> name -> numbers
    keep(report, knobs.json)
    for j, (source, standard) in enumerate(models, 1):
        name = source + (' as the standard net' if standard else '')
        say(f'[{j}] {name}')
        model, meta = build(source, dropout=0.0)
        model.to(here.device).eval()
        if knobs.as_standard:
            nearest = as_standard(model.config)         # raises an error before hours of work
        if standard:
            model.config = nearest
        report[name] = dict(tasks={}, datasets={})
        for task in tasks:
            report[name]['tasks'][task] = accuracy(task, model, meta, knobs, here)
            keep(report, knobs.json)                    # all of it may take hours
        for dataset in datasets:
            report[name]['datasets'][dataset] = validation(dataset, name, model, meta, knobs, here)
            keep(report, knobs.json)
    show(report, tasks, datasets)
    leave()
