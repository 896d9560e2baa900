"""
What must be true of README.md, RESULTS.md and results/:  python -m pytest tests/test_results.py

No link is dead, RESULTS.md stays short, every file of results/ is named on a page, and the method in the
README has the gradients of model.py.
"""
import os
import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from test_reversible import LEAPFROG, MIDPOINT, T, batch, build, error, gradients, name_of

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*ROOT.glob('*.md'), *ROOT.glob('results/*.md'), *ROOT.glob('data/*/readme.md')]
PAGES.sort()                                # glob promises no order, and workers of pytest-xdist must agree

def prose(page):
    """The text of a page without its blocks of code, where brackets and # mean something else."""
    text = re.sub(r'^```.*?^```', '', page.read_text(), flags=re.M | re.S)
    return re.sub(r'^ {4}.*$', '', text, flags=re.M)

def anchors(page):
    """GitHub's rule: lower case, no punctuation, hyphens for spaces, a number where a heading is repeated."""
    names = []
    for heading in re.findall(r'^#+ (.+)$', prose(page), re.M):
        names.append(re.sub(r'[^\w\- ]', '', heading.strip().lower()).replace(' ', '-'))
    return [name + f'-{names[:i].count(name)}' * (name in names[:i]) for i, name in enumerate(names)]

def dead_links(page):
    text = re.sub(r'`[^`\n]*`', '', prose(page))
    for link in re.findall(r'\]\(([^)\s]+)\)', text):
        if '://' in link:                   # a test does not use the network
            continue
        path, _, anchor = link.partition('#')
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or anchor and anchor not in anchors(target):
            yield link

@pytest.mark.parametrize('page', PAGES, ids=lambda page: os.path.relpath(page, ROOT))
def test_no_link_is_dead(page):
    assert not list(dead_links(page))

def test_results_are_short_and_every_row_leads_to_its_section():
    text = (ROOT / 'RESULTS.md').read_text()
    assert len(text.splitlines()) <= 150
    for title in ('what was found', 'what was not reached, or is open'):
        rows = re.search(rf'^\| {title} \|.*\n\|[-|]+\n((?:\|.*\n)+)', text, re.M)[1].splitlines()
        assert len(rows) > 10 and all(re.search(r'\]\([^)]*#[^)]+\)', row) for row in rows)

def test_every_file_of_results_is_named_on_a_page():
    text = ''.join(page.read_text() for page in PAGES)
    for path in (ROOT / 'results').iterdir():
        if path.is_dir() and path.name != '__pycache__':
            assert f'{path.name}/' in text, path.name
        if path.suffix in ('.json', '.csv', '.py', '.sh', '.md'):
            assert re.search(rf'(?<![\w.-]){re.escape(path.name)}\b', text), path.name

def method_of_the_readme():
    """What the README's Python code defines."""
    method = {}
    exec((ROOT / 'README.md').read_text().split('```python\n')[1].split('```')[0], method)
    return method

def test_the_readme_is_short_and_its_lines_too():
    lines = (ROOT / 'README.md').read_text().splitlines()
    assert len(lines) <= 170
    assert max(len(line) for line in lines if not line.startswith(('|', '    '))) <= 300

@pytest.mark.parametrize('amplify', [1, 8])
@pytest.mark.parametrize('scheme', [MIDPOINT, LEAPFROG, dict(scheme='midpoint_a', a=-1.0)], ids=name_of)
def test_the_method_in_the_readme_has_the_same_gradients(scheme, amplify):
    model = build(amplify, exact=False, **scheme).double()
    want = gradients(model)
    idx, targets = batch()
    method = method_of_the_readme()
    a, c, *_ = model.config.coefficients()[0]
    method.update(a=a, c=c)
    model.zero_grad()
    x = model.transformer.wte(idx) + model.transformer.wpe(torch.arange(T))
    p, v = method['forward'](x, model.transformer.h)
    logits = model.lm_head(model.transformer.ln_f(p.requires_grad_()))
    F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    x.backward(method['backward'](p.detach(), v, p.grad, model.transformer.h))
    assert error({name: weight.grad for name, weight in model.named_parameters()}, want) < 1e-10
