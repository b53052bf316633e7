"""Every picture of the course has a number and a caption, and what the text calls `Figure N.M` exists.

A caption is the first line of the cell that follows its picture: `**Figure 5.2.** What it shows.` The first number is
the chapter's in the map of nbs/index.ipynb. `Figure 5` without a dot is the paper's. The drawing of the whole model
that opens a chapter (`you_are_here`) has no number."""
import json
import re

import pytest
from reading import INDEX, NBS, OPENING, course, source

CAPTION = re.compile(r'\*\*Figure (\d+)\.(\d+)\.\*\* \S')
REFERENCE = re.compile(r'\bFigures? (\d+\.\d+)(?:(?:, | and | to )(\d+\.\d+))*')
NUMBER = re.compile(r'\d+\.\d+')
NUMBERED = re.compile(r'^\| (\d+) \| \[[^\]]+\]\(([^)]+\.ipynb)\)', re.M)   # a row of the course's map


def cells(file):
    return json.loads(file.read_text())['cells']


def chapter_numbers():
    "Chapter -> its number in the map."
    text = next(source(cell) for cell in cells(INDEX) if '### The course' in source(cell))
    return {file: int(number) for number, file in NUMBERED.findall(course(text))}


NUMBERS = chapter_numbers()
CHAPTERS = list(NUMBERS)


def is_picture(cell):
    "Whether a cell keeps a picture other than the drawing of the whole model."
    kept = any('image/png' in output.get('data', {}) for output in cell.get('outputs', []))
    return kept and not OPENING.search(source(cell))


def caption(cell):
    "The number (N, M) of the caption that begins a cell; None if none does."
    found = CAPTION.match(source(cell)) if cell and cell['cell_type'] == 'markdown' else None
    return (int(found[1]), int(found[2])) if found else None


def captions(chapter):
    "The number of each picture's caption, None where it lacks one."
    return [caption(after) for cell, after in zip(chapter, [*chapter[1:], None]) if is_picture(cell)]


def texts(chapter):
    return [source(cell) for cell in chapter if cell['cell_type'] == 'markdown']


def references(chapter):
    "The numbers that a chapter's text names, captions included."
    return {number for text in texts(chapter) for found in REFERENCE.finditer(text)
            for number in NUMBER.findall(found[0])}


def all_numbers():
    "The figures of the whole course, as they are written."
    return {f'{n}.{m}' for file in NUMBERS for text in texts(cells(NBS/file)) for n, m in CAPTION.findall(text)}


def test_the_map_numbers_the_course():
    assert list(NUMBERS.values()) == list(range(1, len(NUMBERS) + 1)) and len(NUMBERS) >= 19


@pytest.mark.parametrize('file', CHAPTERS)
def test_every_picture_has_its_caption(file):
    chapter = cells(NBS/file)
    found = captions(chapter)
    assert found == [(NUMBERS[file], i + 1) for i in range(len(found))]
    assert sum(len(CAPTION.findall(text)) for text in texts(chapter)) == len(found), 'a caption without a picture'


@pytest.mark.parametrize('file', CHAPTERS)
def test_one_line_opens_a_chapter_with_the_whole_model(file):
    openings = [cell for cell in cells(NBS/file) if cell['cell_type'] == 'code' and OPENING.search(source(cell))]
    assert len(openings) == 1
    lines = [line for line in source(openings[0]).splitlines() if not line.startswith('#|')]
    assert len(lines) == 1 and openings[0]['outputs']


def test_what_the_text_names_exists():
    known = all_numbers()
    pages = [f for f in NBS.rglob('*.ipynb') if '.ipynb_checkpoints' not in f.parts]
    missing = {str(f.relative_to(NBS)): sorted(lost) for f in pages if (lost := references(cells(f)) - known)}
    assert missing == {}


def test_a_missing_caption_and_a_wrong_number_are_found():
    def text(words):
        return dict(cell_type='markdown', source=[words])

    picture = dict(cell_type='code', source=['plot()'], outputs=[dict(data={'image/png': ''})])
    opening = picture | dict(source=["you_are_here('masking')"])
    first, second = text('**Figure 5.1.** A mask.\n\nText.'), text('**Figure 5.2.** Another.')
    assert captions([opening, picture, first, picture, second]) == [(5, 1), (5, 2)]
    assert captions([picture, text('Figure 5.1. Plain.'), picture]) == [None, None]
    assert captions([picture, dict(cell_type='code', source=['x']), first]) == [None]
    assert references([text('In Figure 5.1, Figures 5.2 and 5.3, and Figure 5 of the paper')]) == {'5.1', '5.2', '5.3'}
