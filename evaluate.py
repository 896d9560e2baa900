"""
Zero-shot accuracy on multiple-choice questions, and validation loss, of one model or several side by side.

    python evaluate.py --init_from=gpt2 --tasks=piqa,arc_easy,arc_challenge,openbookqa,winogrande,hellaswag
    python evaluate.py --init_from=gpt2,out_retrofit_gpt2/midpoint_a_2bit/last.pt --tasks=piqa
    python evaluate.py --init_from=out_python/best.pt --datasets=python         # loss and perplexity on data/python
    torchrun --standalone --nproc_per_node=8 evaluate.py --init_from=gpt2-xl --tasks=hellaswag

A question is answered with the continuation that the model finds likeliest: the sum of its tokens' log-probabilities (acc),
or that sum divided by the length of the answer in bytes (acc_norm). Prompts and scoring are those of lm-evaluation-harness
(https://github.com/EleutherAI/lm-evaluation-harness, version 0.4), which calls our acc_norm acc_bytes. Its own acc_norm divides by
characters, which is the same for ASCII text. The questions are downloaded once, into data/tasks.
"""
import json
import math
import os
import re
import statistics
import sys
import zipfile
import zlib
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch.nn import functional as F
from tqdm import tqdm

from configurator import configure
from data.download import download, write_atomically
from pretrained import build, same_tokens, tokenizer
from runtime import all_reduce, fail, leave, main, open_data, rank, say, start, validation_loss, world

@dataclass
class Knobs:
    init_from: str = 'out/best.pt'          # checkpoints or anything GPT.from_pretrained takes, commas between them
    tasks: str = ''                         # some of piqa,arc_easy,arc_challenge,openbookqa,winogrande,hellaswag, commas between them
    datasets: str = ''                      # folders of data/ whose validation loss is computed, commas between them
    json: str = 'evaluation.json'           # the file that gets all results
    batch_size: int = 16                    # sequences
    block_size: int | None = None           # tokens of a window of validation data; None: all the model sees
    eval_windows: int = 400                 # such windows
    device: str = 'auto'                    # 'cuda', 'mps', 'cpu'
    dtype: str = 'auto'                     # 'float32', 'bfloat16', 'float16'

# -----------------------------------------------------------------------------
# the questions, from their publishers

AI2 = 'https://ai2-public-datasets.s3.amazonaws.com'
SOURCES = {
    'piqa': ['https://yonatanbisk.com/piqa/data/valid.jsonl', 'https://yonatanbisk.com/piqa/data/valid-labels.lst'],
    'arc_easy': [f'{AI2}/arc/ARC-V1-Feb2018.zip'],
    'arc_challenge': [f'{AI2}/arc/ARC-V1-Feb2018.zip'],
    'openbookqa': [f'{AI2}/open-book-qa/OpenBookQA-V1-Sep2018.zip'],
    'winogrande': ['https://storage.googleapis.com/ai2-mosaic/public/winogrande/winogrande_1.1.zip'],
    'hellaswag': ['https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl'],
}
MEMBERS = {'arc_easy': 'ARC-Easy-Test.jsonl', 'arc_challenge': 'ARC-Challenge-Test.jsonl',
           'openbookqa': 'Main/test.jsonl', 'winogrande': 'winogrande_1.1/dev.jsonl'}       # of the archives

def lines_of(task):
    """The lines of the task's files, downloaded if need be: a list for each file."""
    result = []
    for url in SOURCES[task]:
        path = os.path.join('data', 'tasks', f"{task.split('_')[0]}-{url.rpartition('/')[2]}")
        download(url, path)
        try:
            if task in MEMBERS:
                with zipfile.ZipFile(path) as archive:
                    name = next(name for name in archive.namelist()
                                if f'/{name}'.endswith(f'/{MEMBERS[task]}') and not name.startswith('__MACOSX'))
                    if archive.getinfo(name).file_size > 2**28:     # that would not be these questions
                        raise zipfile.BadZipFile
                    content = archive.read(name)                    # and its checksum
            else:
                with open(path, 'rb') as file:
                    content = file.read()
            result.append([line for line in content.decode().split('\n') if line.strip()])
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, StopIteration, UnicodeDecodeError):
            fail(f'{path} is not what {task} publishes: delete it and run the command again')
    return result

def questions(task):
    """A list of (pairs of context and continuation, one for each answer; bytes of each answer; index of the right one)."""
    files = lines_of(task)
    try:
        rows = [json.loads(line) for line in files[0]]
        if task == 'piqa':
            asked = [choices(f"Question: {row['goal']}\nAnswer:", [row['sol1'], row['sol2']], int(label))
                     for row, label in zip(rows, files[1], strict=True)]
        elif task == 'winogrande':
            asked = [partial_choices(row['sentence'], [row['option1'], row['option2']], int(row['answer']) - 1)
                     for row in rows]
        elif task == 'hellaswag':
            asked = [choices(plain(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"),
                             [plain(ending) for ending in row['endings']], int(row['label'])) for row in rows]
        else:
            template = '{}' if task == 'openbookqa' else 'Question: {}\nAnswer:'
            asked = [choices(template.format(row['question']['stem']), [x['text'] for x in row['question']['choices']],
                             [x['label'] for x in row['question']['choices']].index(row['answerKey'].strip()))
                     for row in rows]
        if not asked or any(not 0 <= gold < len(pairs) for pairs, _, gold in asked):
            raise ValueError
        return asked
    except (ValueError, KeyError, TypeError, AttributeError):
        fail(f'the questions of {task} are damaged: delete data/tasks and run the command again')

def choices(context, answers, gold):
    return [(context, f' {answer}') for answer in answers], [len(answer.encode()) for answer in answers], gold

def partial_choices(sentence, options, gold):
    """WinoGrande: each option fills the gap, and the rest of the sentence is scored."""
    before, after = sentence.split('_', 1)
    contexts = [before + option for option in options]
    return [(context, f' {after.strip()}') for context in contexts], [len(x.encode()) for x in contexts], gold

def plain(text):
    """HellaSwag's texts are from WikiHow, with its markup."""
    text = re.sub(r'\[.*?\]', '', text.strip().replace(' [title]', '. '))
    return text.replace('  ', ' ')

# -----------------------------------------------------------------------------
# scoring

def tokens_of_pair(encode, context, continuation):
    """Tokens of both, as the whole text has them; spaces that end the context belong to the continuation."""
    end = len(context.rstrip())
    context, continuation = context[:end], context[end:] + continuation
    before = encode(context)
    return before, encode(context + continuation)[len(before):]

CHUNK = 1024        # tokens whose logits exist at one time, as in the loss

@torch.no_grad()
def log_likelihoods(model, pairs, batch_size, autocast, bar=None):
    """
    The log-probability, in nats, of each continuation after its context; pairs of lists of tokens. The longest come first,
    so that the rows of a batch are alike in length. A text longer than the model sees is cut on the left. ValueError for a
    pair that leaves nothing to score, or a continuation longer than the model sees.
    """
    if any(not (context and 0 < len(continuation) <= model.config.block_size) for context, continuation in pairs):
        raise ValueError(f'a question or an answer has no token, or an answer is longer than the {model.config.block_size} '
                         'tokens that the model sees')
    device = model.lm_head.weight.device
    result = [0.0] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
    for start_at in range(0, len(order), batch_size):
        batch = order[start_at:start_at + batch_size]
        texts = [(pairs[i][0] + pairs[i][1])[-model.config.block_size - 1:] for i in batch]
        idx = torch.zeros(len(batch), max(map(len, texts)) - 1, dtype=torch.long)           # (B, T), 0 behind the ends
        for row, text in zip(idx, texts):
            row[:len(text) - 1] = torch.tensor(text[:-1])
        with autocast:
            x = model.hidden(idx.to(device))                                                # (B, T, C)
        counts = [len(pairs[i][1]) for i in batch]
        wanted = torch.tensor([token for i in batch for token in pairs[i][1]]).to(device)
        x = torch.cat([row[len(text) - 1 - n:len(text) - 1] for row, text, n in zip(x, texts, counts)])     # (N, C)
        losses = torch.cat([F.cross_entropy(F.linear(x_i.float(), model.lm_head.weight.float()), wanted_i, reduction='none')
                            for x_i, wanted_i in zip(x.split(CHUNK), wanted.split(CHUNK))])                 # (N)
        for i, loss in zip(batch, losses.split(counts)):
            result[i] = -loss.sum().item()
        if bar is not None:
            bar.update(len(batch))
    return result

def accuracy(task, model, encode, batch_size, autocast):
    """A task's row of the table, for one model. Each process takes its share of the texts."""
    asked = questions(task)
    pairs = [tokens_of_pair(encode, *pair) for pairs, _, _ in asked for pair in pairs]
    cut = sum(len(context) + len(continuation) > model.config.block_size + 1 for context, continuation in pairs)
    own = range(rank, len(pairs), world)
    scores = [0.0] * len(pairs)
    with tqdm(total=len(own), desc=task, leave=False, disable=not main) as bar:
        for i, score in zip(own, log_likelihoods(model, [pairs[i] for i in own], batch_size, autocast, bar)):
            scores[i] = score
    scores = all_reduce(*scores)
    if not all(map(math.isfinite, scores)):
        raise ValueError(f'{task}: the log-likelihoods are not finite; try --dtype=float32')
    scores = iter(scores)
    acc, acc_norm = [], []
    for answers, lengths, gold in asked:
        found = [next(scores) for _ in answers]
        acc.append(found.index(max(found)) == gold)
        per_byte = [score / length if length else -math.inf for score, length in zip(found, lengths)]
        acc_norm.append(per_byte.index(max(per_byte)) == gold)
    result = dict(n=len(asked), texts_cut=cut, acc=statistics.mean(acc), acc_stderr=standard_error(acc))
    if task != 'winogrande':                    # whose continuations are all the same
        result.update(acc_norm=statistics.mean(acc_norm), acc_norm_stderr=standard_error(acc_norm))
    return result

def standard_error(right):
    """Of the mean: the sample's standard deviation over the root of its size."""
    return statistics.stdev(map(float, right)) / math.sqrt(len(right)) if len(right) > 1 else math.nan

# -----------------------------------------------------------------------------
# the report

def split(names):
    return list(dict.fromkeys(name.strip() for name in names.split(',') if name.strip()))       # each once

if __name__ == '__main__':
    knobs = configure(Knobs, sys.argv[1:])
    here = start(knobs)
    torch.backends.cuda.enable_cudnn_sdp(False)     # cuDNN's attention makes a plan for every new length, and texts have many lengths
    models, tasks, datasets = (split(names) for names in (knobs.init_from, knobs.tasks, knobs.datasets))
    for task in tasks:
        if task not in SOURCES:
            fail(f"unknown task '{task}': choose some of {','.join(SOURCES)}")
    if not models or not tasks + datasets:
        fail('there is nothing to do: give --init_from=... and --tasks=... or --datasets=...')
    for name in models:                         # before an hour is spent on the first
        if name.endswith('.pt') and not os.path.exists(name):
            fail(f'there is no checkpoint {name}')

    report = {}                                 # model -> tasks or datasets -> name -> numbers

    def keep():
        """The results so far: it may have taken hours."""
        if main:
            try:
                write_atomically(knobs.json, json.dumps(report, indent=1).encode())
            except OSError as error:
                fail(f'{knobs.json} cannot be written ({error.strerror}): choose another --json')

    keep()
    for name in models:
        try:
            model, meta = build(name, dropout=0.0)
            if tasks and meta['encoding'] == 'chars':
                fail(f'{name} knows only the characters of its own text: give --datasets instead of --tasks')
            encode = tokenizer(meta)[0] if tasks else None
            model.to(here.device).eval()
            report[name] = dict(tasks={}, datasets={})
            for task in tasks:
                found = report[name]['tasks'][task] = accuracy(task, model, encode, knobs.batch_size, here.autocast)
                if found['texts_cut']:
                    say(f"{name}, {task}: {found['texts_cut']} texts are longer than the model's "
                        f'{model.config.block_size} tokens, and were cut on the left')
                keep()
            for dataset in datasets:
                windows = SimpleNamespace(**{**vars(knobs), 'dataset': dataset,
                                             'block_size': knobs.block_size or model.config.block_size})
                its_meta, _, val_data = open_data(windows)
                same_tokens(name, meta, f'data/{dataset}', its_meta)
                if windows.block_size > model.config.block_size:
                    fail(f'block_size = {windows.block_size}: {name} sees {model.config.block_size} tokens at most')
                loss = validation_loss(model, val_data, windows, here, bar=True)
                if not loss < 700:
                    fail(f'{name}, {dataset}: the loss is {loss}: try --dtype=float32')
                report[name]['datasets'][dataset] = dict(loss=loss, perplexity=math.exp(loss))
                keep()
        except ValueError as error:
            fail(str(error))

    for j, name in enumerate(models):
        say(f'[{j + 1}] {name}')
    heads = ''.join(f'{f"[{j + 1}] acc":>11}{"error":>8}{"acc_norm":>10}{"error":>8}' for j in range(len(models)))
    if tasks:
        say(f'\n{"zero-shot":16}{"n":>7}{heads}')
    for task in tasks:
        columns = [report[name]['tasks'][task] for name in models]
        say(f'{task:16}{columns[0]["n"]:>7}' + ''.join(
            f'{x["acc"]:11.4f}{x["acc_stderr"]:8.4f}'
            + (f'{x["acc_norm"]:10.4f}{x["acc_norm_stderr"]:8.4f}' if 'acc_norm' in x else ' ' * 18) for x in columns))
    if datasets:
        say(f'\n{"validation":23}' + ''.join(f'{f"[{j + 1}] loss":>11}{"perplexity":>18}' for j in range(len(models))))
    for dataset in datasets:
        columns = [report[name]['datasets'][dataset] for name in models]
        say(f'{dataset:23}' + ''.join(f'{x["loss"]:11.4f}{x["perplexity"]:18.2f}' for x in columns))
    leave()
