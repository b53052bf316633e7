"""Numbers in the book's prose are those of the paper, of the result files and of the kept outputs."""
import json
import math
import re

import pytest
from support import ROOT

from mae_nb.tasks.paper import PAPER

PAGES = sorted([*(ROOT/'nbs').rglob('*.ipynb'), *(ROOT/'tutorials').glob('*.ipynb')])
PAGES = [f for f in PAGES if '.ipynb_checkpoints' not in f.parts]
SOURCE = re.compile(r'\b(Figure|Table|Tables|Figures) (\d+)(?!\d|\.\d)([a-f]?)(?: (?:to|and) (\d*)([a-f]?))?')
TEXT = re.compile(r'\b(section 4(?![\d.]\d)|section 4\.2|appendix A\.2)\b', re.I)   # numbers that are in the text alone
ACCURACY = re.compile(r'(?<![\d.,±])([3-9]\d\.\d)(?![\d]|\.\d| points)')   # 84.9, as the paper prints it
ELSEWHERE = re.compile(r'issue \d|arXiv|\.md\b|mae-\w|python ')   # a sentence that names another source


def name(file):
    return str(file.relative_to(ROOT).with_suffix(''))


def cells(file, kind):
    return [c for c in json.loads(file.read_text())['cells'] if c['cell_type'] == kind]


def paragraphs(file):
    "A page's prose: paragraphs, items of lists, and whole tables."
    texts = [''.join(c['source']) for c in cells(file, 'markdown')]
    return [part for text in texts for part in re.split(r'\n\s*\n|\n(?=- |\d+\. )', text) if part.strip()]


def sentences(paragraph):
    "Its sentences, or the rows of a table."
    return [s for line in paragraph.splitlines() for s in re.split(r'(?<=[.:;!?)])\s+(?=[A-Z(*"`])', line)]


def tables(text):
    "The paper's tables, figures and sections that a text names: 'Tables 1a to 1f' are six."
    named = set()
    for word, number, letter, last, last_letter in SOURCE.findall(text):
        kind = word.rstrip('s')
        letters = [letter]
        if letter and last_letter:
            letters = [chr(c) for c in range(ord(letter), ord(last_letter) + 1)]
        named |= {f'{kind} {number}{one}' for one in letters}
        if last and last != number:
            named.add(f'{kind} {last}{last_letter}')
    named |= {source[0].upper() + source[1:] for source in TEXT.findall(text)}
    return named & PAPER.keys()


def claims(paragraph):
    "Numbers like 84.9 with the paper's tables that the paragraph has named by then, sentence by sentence."
    named, found = set(), []
    for sentence in sentences(paragraph):
        named |= tables(sentence)
        if named and not ELSEWHERE.search(sentence):
            found += [(number, frozenset(named)) for number in ACCURACY.findall(sentence)]
    return found


def wrong_numbers(paragraph):
    "Those that are in none of the tables."
    return [n for n, named in claims(paragraph) if not any(float(n) in PAPER[table].numbers() for table in named)]


def test_a_wrong_number_of_the_paper_is_found():
    assert tables('Tables 1a to 1c and Figure 5, or Tables 4 and 5') == {
        'Table 1a', 'Table 1b', 'Table 1c', 'Figure 5', 'Table 4', 'Table 5'}
    assert tables('Figure 5.2 and Figure 15.12 are the book\'s own') == set()
    assert tables('(section 4), section 4.1 and appendix A.2') == {'Section 4', 'Appendix A.2'}
    assert wrong_numbers('Ours is 40.1. Theirs reaches 84.8 (Table 1a), 44.7 points more. In issue 9 it is 77.7.') == []
    assert wrong_numbers('Table 1a varies the depth. One block reaches 84.7.') == ['84.7']
    assert wrong_numbers('One block reaches 84.7 (Table 1a).') == ['84.7']
    assert wrong_numbers('| 1 | 84.8 | 65.6 | Table 1a |') == ['65.6']


@pytest.mark.parametrize('file', PAGES, ids=name)
def test_the_papers_numbers_are_the_papers(file):
    "Where a paragraph has named a table or figure of the paper, an accuracy is in it, or names its other source."
    assert [(p[:80], wrong) for p in paragraphs(file) if (wrong := wrong_numbers(p))] == []


def test_the_book_quotes_the_paper_often_enough_for_this_to_mean_something():
    checked = [claim for f in PAGES for p in paragraphs(f) for claim in claims(p)]
    assert len(checked) > 60


# ---- our own results: what the prose says, and the file that a named command has written -----------------------------

SWITCHES = json.loads((ROOT/'bench'/'results'/'switches.json').read_text())
STUDY = json.loads((ROOT/'tutorials'/'cifar_protocols.json').read_text())


def switch(row, field, model='base'):
    return SWITCHES[model]['rows'][row][field]


CLAIMS = [   # page, what its prose says with a group for each number, the numbers, and how they are written
    ('nbs/index', r'the ratio lies between ([\d.]+) and ([\d.]+),',
     [switch('plain', 'ratio_min'), switch('plain', 'ratio_max')], '{:.2f}'),
    ('nbs/index', r'medians are ([\d.]+) and ([\d.]+) images a second, and the median of the paired ratios is ([\d.]+)',
     [switch('plain', 'images_per_second'), switch('transformers', 'images_per_second'), switch('plain', 'ratio')],
     '{:.2f}'),
    ('nbs/index', r'Ours reaches (\d+ %) of .* transformers (\d+ %)\.',
     [switch('plain', 'mfu'), switch('transformers', 'mfu')], '{:.0%}'),
    ('nbs/index', r'the rate is ([\d.]+) images a second',
     [switch('cross decoder 25 %', 'images_per_second')], '{:.1f}'),
    ('nbs/index', r"second, ([\d.]+) times transformers' \(([\d.]+) to ([\d.]+)\)",
     [switch('cross decoder 25 %', k) for k in ('ratio', 'ratio_min', 'ratio_max')], '{:.2f}'),
    ('nbs/measure/00_pairs', r"is at ([\d.]+) although .* is ([\d.]+) images a second and transformers' is ([\d.]+):",
     [switch('plain', 'ratio'), switch('plain', 'images_per_second'), switch('transformers', 'images_per_second')],
     '{:.2f}'),
    ('nbs/measure/00_pairs', r'five of them range from ([\d.]+) to ([\d.]+)\.',
     [switch('plain', 'ratio_min'), switch('plain', 'ratio_max')], '{:.2f}'),
    ('nbs/measure/00_pairs', r'ViT-B comes to (\d+ %), transformers to (\d+ %)',
     [switch('plain', 'mfu'), switch('transformers', 'mfu')], '{:.0%}'),
    ('nbs/measure/00_pairs', r"where twice transformers' rate would be (\d+ %)",
     [2 * switch('transformers', 'mfu', 'nano')], '{:.0%}'),
]


@pytest.mark.parametrize('page, pattern, numbers, form', CLAIMS, ids=[f'{c[0]}-{i}' for i, c in enumerate(CLAIMS)])
def test_prose_agrees_with_the_results(page, pattern, numbers, form):
    text = '\n'.join(paragraphs(ROOT/f'{page}.ipynb'))
    stated, = re.findall(pattern, text)
    stated = [stated] if isinstance(stated, str) else list(stated)
    assert stated == [form.format(number).replace('%', ' %') for number in numbers]


def test_readme_says_it_again():
    "README.md is made from the index, numbers included."
    pattern = r'the median of the paired ratios is ([\d.]+)\)'
    assert re.search(pattern, (ROOT/'README.md').read_text())[1] == f'{switch("plain", "ratio"):.2f}'


# ---- kept outputs ----------------------------------------------------------------------------------------------------

def outputs(file):
    "The kept output of each code cell as text."
    for cell in cells(file, 'code'):
        yield ''.join(''.join(o.get('text', ())) for o in cell['outputs'])


def test_logs_have_the_columns_of_this_version():
    "A kept log that was not made again would show the columns of an older one."
    headers = [line.split() for f in PAGES for text in outputs(f) for line in text.splitlines()
               if line.split()[:2] == ['epoch', 'train_loss']]
    assert len(headers) > 10
    source = (ROOT/'mae_nb'/'training'/'progress.py').read_text()
    columns = re.findall(r"'([^']+)'", re.search(r'self\.row\(self\.recorder\.metric_names, \((.*?)\)\)', source)[1])
    columns = tuple(columns)
    ends = [tuple(word for word in header if word in columns) for header in headers]
    assert columns and set(ends) <= {columns, columns[-1:]}, 'a brief log shows the time left only'
    assert all(tuple(header[-len(end):]) == end for header, end in zip(headers, ends))
    assert {tuple(header[:-len(end)]) for header, end in zip(headers, ends)} <= {
        ('epoch', 'train_loss', 'valid_loss'),
        ('epoch', 'train_loss', 'valid_loss', 'top1', 'top5'),
        ('epoch', 'train_loss', 'valid_loss', 'accuracy')}   # of a metric of fastai


def number(text):
    return float(text.replace(',', '').replace(' ', '').rstrip('%'))


KEPT = [   # page, what its prose says, page, what a kept output or another page's prose says
    ('nbs/course/01_features', r'There are (\d+) such queries, and (\d+) the other way round',
     'nbs/course/01_features', r'(\d+) queries such as these, (\d+) the other way round'),
    ('nbs/course/01_features', r'learning adds (\d\.\d) points', 'nbs/course/01_features', r'pixels: (\d\.\d) points'),
    ('nbs/course/01_features', r'only (\d+ %) of what', 'nbs/course/01_features', r'learned +(\d+%) of the variance'),
    ('nbs/course/01_features', r'instead of (0\.\d+)', 'nbs/course/01_features', r'of these eight (0\.\d+)'),
    ('nbs/course/01_features', r'mean loss of (0\.\d+)', 'nbs/course/01_features', r'with other masks (0\.\d+)'),
    ('nbs/tasks/03_finetune', r'Do not take (\d+) %', 'nbs/tasks/03_finetune', r'^ +8(?: +[\d.]+){2} +0\.(\d\d)00 '),
    ('tutorials/03_imagenet_at_scale', r'([\d,]+) pictures a second and core from the original bytes and ([\d,]+) from',
     'nbs/data/03_shards', r'packed, original bytes \| ([\d,]+) \|[^#]*? quality 90 \| ([\d,]+) \|'),
]


@pytest.mark.parametrize('page, prose, source, kept', KEPT, ids=[f'{c[0]}-{i}' for i, c in enumerate(KEPT)])
def test_prose_agrees_with_what_was_kept(page, prose, source, kept):
    text = '\n\n'.join(paragraphs(ROOT/f'{page}.ipynb'))
    source = ROOT/f'{source}.ipynb'
    evidence = '\n'.join([*outputs(source), *paragraphs(source)])
    stated, seen = re.search(prose, text), re.search(kept, evidence, re.M)
    assert stated and seen
    assert [number(n) for n in stated.groups()] == [number(n) for n in seen.groups()]


def test_cores_for_eight_gpus():
    "The tutorial's cores follow from the rates beside them."
    text = '\n\n'.join(paragraphs(ROOT/'tutorials'/'03_imagenet_at_scale.ipynb'))
    pattern = (r'([\d,]+) pictures a second and core from the original bytes and ([\d,]+) from `packed320`, '
               r'eight GPUs that take ([\d,]+) each need (\d+) cores, or (\d+)')
    first, second, each, cores, fewer = map(number, re.search(pattern, text).groups())
    assert [cores, fewer] == [math.ceil(8 * each / rate) for rate in (first, second)]


def test_the_demos_numbers_are_stated_in_one_place():
    "Results of `mae-demo` are stated by its own chapter and the README only; elsewhere they would go stale."
    own = {'nbs/tasks/06_demo', 'nbs/index', 'tutorials/01_pretrain_and_probe'}
    for file in PAGES:
        if name(file) not in own:
            stale = [p for p in paragraphs(file) if 'mae-demo' in p and re.search(r'\d\d(\.\d)? ?%', p)]
            assert stale == [], name(file)




def test_the_presets_are_counted():
    from mae_nb.training.presets import RECIPES
    text = '\n'.join(paragraphs(ROOT/'nbs'/'training'/'02_presets.ipynb'))
    assert re.search(r'A dictionary of (\d+) frozen objects', text)[1] == str(len(RECIPES))
