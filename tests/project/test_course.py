"""The course answers its questions, shows its pictures to everybody, and says how long it takes."""
import json
import re

import matplotlib.pyplot as plt
import pytest
from questions import PAGE, page_notebook, section_of
from reading import INDEX, NBS, TOTAL, counts, course, is_read, map_rows, minutes, updated
from support import ROOT

from mae_nb.tasks.paper import PAPER, Measured, draw_table

QUESTIONS = json.loads((ROOT/'tests'/'project'/'course_questions.json').read_text())
LESSONS = '00_introduction', '01_before', '01_results', '02_after'
PICTURED = *LESSONS, 'notation'
TRANSFORMER = ROOT/'nbs'/'model'/'04_transformer.ipynb'
DESCRIBED = [TRANSFORMER, *(ROOT/'nbs'/'course'/f'{name}.ipynb' for name in PICTURED)]
THREE_KINDS = [TRANSFORMER, *(ROOT/'nbs'/'course'/f'{name}.ipynb' for name in LESSONS)]


def cells(file):
    return json.loads(file.read_text())['cells']


def source(cell):
    return ''.join(cell['source'])


def the_map():
    "The index's cell with the map of the book."
    return next(source(c) for c in cells(INDEX) if '### The course' in source(c))


# ---- questions that the paper and its successors answer ------------------------------------------------------------

def absent_terms(item):
    "The key terms that the named cell lacks; all of them if there is no such cell."
    cell = next((c for c in cells(ROOT/item['chapter']) if c['id'] == item['cell']), None)
    text = source(cell).lower() if cell and cell['cell_type'] == 'markdown' else ''
    return [term for term in item['terms'] if term.lower() not in text]


@pytest.mark.parametrize('item', QUESTIONS, ids=lambda item: item['question'][:50])
def test_a_question_is_answered_where_the_list_says(item):
    assert absent_terms(item) == []


def test_the_questions_are_many_and_the_course_answers_them():
    assert len({item['question'] for item in QUESTIONS}) == len(QUESTIONS) >= 40
    assert all(len(item['terms']) >= 2 for item in QUESTIONS)
    chapters = {f'nbs/{file}' for file in map_rows(course(the_map()))}
    assert {item['chapter'] for item in QUESTIONS} <= chapters


def test_the_page_of_questions_is_made_from_the_list():
    "`python tests/questions.py` writes it."
    assert PAGE.read_text() == page_notebook()
    assert section_of(dict(chapter='nbs/model/04_transformer.ipynb', cell='04a0000d', terms=['deviation'])) == (
        'transformer', 'Why the root of d')


def test_a_question_without_an_answer_is_found():
    item = dict(QUESTIONS[0])
    assert absent_terms(item | dict(terms=['three quarters', 'no chapter says this'])) == ['no chapter says this']
    assert absent_terms(item | dict(cell='nowhere')) == item['terms']


# ---- pictures ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('file', DESCRIBED, ids=lambda file: file.stem)
def test_a_picture_has_a_text_for_those_who_do_not_see_it(file):
    pictures = [c for c in cells(file) if any('image/png' in o.get('data', {}) for o in c.get('outputs', []))]
    assert pictures
    for cell in pictures:
        text = re.match(r'#\| fig-alt: >\n((?:#\|   .+\n)+)', source(cell))   # folded: a colon in it is no mapping
        assert text, cell['id']
        assert len(text[1].split()) >= 8, cell['id']
        assert not re.search(r'(?:font|label)size=[1-7]\b', source(cell)), f'{cell["id"]}: text below 8 points'


def test_the_paper_s_tables_are_drawn_in_readable_type():
    study = {'finetune': {'0.5': Measured(3, 80., 1.), '0.75': Measured(3, 82., 1.)}}
    fig = draw_table(PAPER['Figure 5'], study)
    texts = [text for text in fig.findobj(plt.Text) if text.get_text()]
    assert len(texts) > 40
    assert {text.get_text(): text.get_fontsize() for text in texts if text.get_fontsize() < 8} == {}


@pytest.mark.parametrize('file', THREE_KINDS, ids=lambda file: file.stem)
def test_exercises_are_of_three_kinds(file):
    "To predict, to fill in, to think; the answer to a question that needs thought is in a cell of its own."
    texts = [source(c) for c in cells(file) if c['cell_type'] == 'markdown']
    for kind in ('Predict, then run', 'Fill in the code', 'Think'):
        assert len(re.findall(rf'^\*\*\d+\.\*\* \*{kind}\.\*', '\n'.join(texts), re.M)) == 1, kind
    thinking, = [i for i, text in enumerate(texts) if '*Think.*' in text]
    assert '*Answer.*' not in texts[thinking] and texts[thinking + 1].startswith('*Answer.*')


# ---- the map -------------------------------------------------------------------------------------------------------

def test_the_map_has_every_chapter_once():
    rows = re.findall(r'^\|.*\]\(([^)]+\.ipynb)\).*\|$', the_map(), re.M)
    numbered = {str(f.relative_to(NBS)) for f in NBS.glob('*/[0-9]*.ipynb')}
    assert len(rows) == len(set(rows))
    assert numbered <= set(rows)
    assert list(map_rows(the_map())) == rows, 'a row without a column for minutes'


COURSE = list(map_rows(course(the_map())))


@pytest.mark.parametrize('file, following', list(zip(COURSE, COURSE[1:])), ids=COURSE[:-1])
def test_a_chapter_leads_to_the_next_one_of_the_course(file, following):
    last, = [source(c) for c in cells(NBS/file) if '## What comes next' in source(c)]
    links = re.findall(r'\]\(([^)]+\.ipynb)\)', last.split('## What comes next')[1])
    assert (NBS/following).resolve() in [((NBS/file).parent/link).resolve() for link in links]


def test_minutes_are_those_of_the_chapters():
    "Within five minutes, so that a small edit leaves the map alone; `python tests/reading.py` computes them anew."
    text = the_map()
    assert {file: shown for file, shown in map_rows(text).items() if abs(shown - minutes(NBS/file)) > 5} == {}
    assert int(TOTAL.search(text)[2]) == sum(map_rows(course(text)).values())
    for number in ('200 a minute', 'half a minute', 'three for each exercise'):   # the formula of reading.py
        assert number in text


def test_minutes_follow_from_words_cells_and_exercises(tmp_path):
    prose = dict(cell_type='markdown', source=['word ' * 1994, '\n**1.** two exercises\n', '**2.** it is'])
    shown = dict(cell_type='code', source=['1 + 1'])
    imports = dict(cell_type='code', source=['import math\n', 'from os import path'])
    hidden = dict(cell_type='code', source=['#| hide\n', 'x = 1'])
    file = tmp_path/'chapter.ipynb'
    file.write_text(json.dumps(dict(cells=[prose, *[shown] * 8, imports, hidden])))
    assert [is_read(c) for c in (shown, imports, hidden)] == [True, False, False]
    assert counts(file) == (2000, 8, 2)
    assert minutes(file) == 20   # 10 of words, 4 of code, 6 of exercises
    rows = '| 1 | [mae](model/08_mae.ipynb) | x | |\n| | the whole course | | |\n'
    old = f'### The course\n{rows}### The engineering part'
    new = updated(old)
    assert int(TOTAL.search(new)[2]) == map_rows(new)['model/08_mae.ipynb'] == minutes(NBS/'model'/'08_mae.ipynb')
