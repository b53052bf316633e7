"""The course answers its questions, shows its pictures to everybody, and says how long it takes."""
import json
import re

import matplotlib.pyplot as plt
import pytest
from questions import PAGE, page_notebook, section_of
from reading import INDEX, INTRODUCTION, NBS, TOTAL, counts, course, exact_minutes, is_read, map_rows, minutes, updated
from support import ROOT

from mae_nb.tasks.paper import PAPER, Measured, draw_table

QUESTIONS = json.loads((ROOT/'tests'/'project'/'course_questions.json').read_text())
PICTURED = ('00_introduction', '01_before', '01_features', '01_results', '02_after', '03_loop', 'notation', 'projects',
            'slides')
TRANSFORMER = ROOT/'nbs'/'model'/'04_transformer.ipynb'
DESCRIBED = [TRANSFORMER, *(ROOT/'nbs'/'course'/f'{name}.ipynb' for name in PICTURED)]


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
    exact = sum(exact_minutes(NBS/file) for file in map_rows(course(text)))
    assert abs(int(TOTAL.search(text)[2]) - exact) <= 10
    for part in ('200 a minute', 'half a minute for every 15 lines', 'a quarter for each picture', 'six seconds',
                 'for the curious', 'three each'):   # the formula of reading.py
        assert part in text


def test_minutes_follow_from_words_code_and_exercises(tmp_path):
    def text(words):
        return dict(cell_type='markdown', source=[words])

    def code(words, **outputs):
        return dict(cell_type='code', source=[words], **outputs)

    picture = dict(outputs=[dict(data={'image/png': ''})])
    chapter = [
        text('word ' * 2000), *[code('1 + 1')] * 8, code('x = 1\n' * 31), code('draw()', **picture), code('assert x'),
        code('import math\nfrom os import path'), code('#| hide\nx = 1'),
        text('## Details (for the curious)\n\nwords that are left out'), code('y = 1'), text('### Deeper\n\nand these'),
        text('## Try it'), text('**1.** two exercises'), text('**2.** it is')]
    file = tmp_path/'chapter.ipynb'
    file.write_text(json.dumps(dict(cells=chapter)))
    assert [is_read(c) for c in chapter[10:14]] == [True, True, False, False]
    found = counts(file)
    assert (found.words, found.cells, found.pictures, found.checks, found.exercises) == (2009, 11, 1, 1, 2)
    assert found.reading == pytest.approx(2009 / 200 + 5.5 + .25 + .1)
    assert minutes(file) == 20   # 16 to read, 6 for the exercises
    opening = code("#| fig-alt: >\n#|   The whole model.\nyou_are_here('masking')", **picture)
    for name, pictures in (('chapter.ipynb', 1), (INTRODUCTION, 2)):   # counted once in the whole course
        (tmp_path/name).write_text(json.dumps(dict(cells=[opening, *chapter])))
        assert counts(tmp_path/name).pictures == pictures
    chapter[-2:] = [text('**1.** one\n\n<!-- teacher, 4 minutes: So. -->'), code('left = out'),
                    text('**2.** (For the curious.) two\n\n<!-- teacher, 9 minutes: So. -->')]
    file.write_text(json.dumps(dict(cells=chapter)))
    stated = counts(file)
    assert (stated.words, stated.cells, stated.practising) == (2000, 11, 4)   # their own words and code are in it


def test_the_map_shows_minutes_and_their_sum():
    rows = '| 1 | [mae](model/08_mae.ipynb) | x | |\n| | the whole course | | |\n'
    old = f'### The course\n{rows}### The engineering part'
    new = updated(old)
    shown = map_rows(new)['model/08_mae.ipynb']
    assert int(TOTAL.search(new)[2]) == shown == minutes(NBS/'model'/'08_mae.ipynb')
