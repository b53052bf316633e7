"""How long a chapter takes; `python tests/reading.py` writes it into the map in nbs/index.ipynb.

Reading: the words of the prose at 200 a minute, half a minute for every 15 lines of a code cell that defines or
computes something, a quarter for a picture, six seconds for a cell of checks. Imports, hidden cells and sections
marked "for the curious" count nothing. The drawing of the whole model that opens each chapter (`you_are_here`) is the
same one everywhere: it counts once, in the introduction. Exercises of the course: the minutes that are stated for
teachers; of other chapters: three each.
"""
import json
import re
from dataclasses import dataclass
from math import ceil
from pathlib import Path

NBS = Path(__file__).resolve().parents[1]/'nbs'
INDEX = NBS/'index.ipynb'
INTRODUCTION = '00_introduction.ipynb'
WORDS_A_MINUTE = 200
MINUTES_A_CELL = .5       # up to 15 lines of code that define or compute something, with their output
LINES_A_CELL = 15
MINUTES_A_PICTURE = .25   # its drawing is passed over
MINUTES_A_CHECK = .1      # a glance
MINUTES_AN_EXERCISE = 3   # where none are stated
LONGEST = 30              # minutes of reading of a chapter of the course
COURSE = 7 * 60           # minutes of the course, with its exercises
CURIOUS = '(for the curious)'
ROW = re.compile(r'^(\|.*\]\(([^)]+\.ipynb)\).*\|) *(\d*) *\|$', re.M)       # a chapter of the map, minutes last
TOTAL = re.compile(r'^(\| *\| the whole course \|.*\|) *(\d*) *\|$', re.M)
OPENING = re.compile(r'^you_are_here\(', re.M)   # draws the whole model, with the chapter's place in it
NOTE = re.compile(r'<!-- teacher, (\d+) minutes: .*?-->', re.S)
EXERCISE = re.compile(r'^\*\*\d+\.\*\*', re.M)


@dataclass
class Counts:
    "What a reader meets in a chapter."
    words: int = 0
    cells: int = 0       # up to 15 lines that define or compute something
    pictures: int = 0
    checks: int = 0
    exercises: int = 0
    stated: int = 0      # minutes of the exercises, as stated

    @property
    def reading(self) -> float:
        "Minutes without exercises."
        return (self.words / WORDS_A_MINUTE + self.cells * MINUTES_A_CELL + self.pictures * MINUTES_A_PICTURE
                + self.checks * MINUTES_A_CHECK)

    @property
    def practising(self) -> float:
        "Minutes of the exercises."
        return self.stated or self.exercises * MINUTES_AN_EXERCISE


def source(cell: dict) -> str:
    return ''.join(cell['source'])


def is_read(cell: dict) -> bool:
    "Whether a reader stops at a code cell: hidden ones and imports are passed over."
    lines = [line for line in source(cell).splitlines() if line and not line.startswith('#|')]
    hidden = re.match(r'#\| ?(hide|default_exp)', source(cell))
    return not hidden and any(not line.startswith(('import ', 'from ')) for line in lines)


def kind(cell: dict) -> str:
    "The field of `Counts` that a code cell counts in."
    exported = re.match(r'#\| ?export', source(cell))
    if any('image/png' in output.get('data', {}) for output in cell.get('outputs', [])):
        return 'pictures'
    checks = re.search(r'\b(test_\w+\(|assert\b|raises\()', source(cell))
    return 'checks' if checks and not exported and not cell.get('outputs') else 'cells'


def parts(file: Path) -> list[tuple[str, dict | None, str]]:
    "(section, code cell or None, text) of a chapter, without the sections for the curious."
    found, section, skipped = [], '', 0   # the level of the heading that is skipped, 0: none
    for cell in json.loads(file.read_text())['cells']:
        pieces = [source(cell)] if cell['cell_type'] == 'code' else re.split(r'^(?=#+ )', source(cell), flags=re.M)
        for text in pieces:
            heading = None if cell['cell_type'] == 'code' else re.match(r'(#+) (.*)', text)
            if heading and not (skipped and len(heading[1]) > skipped):
                skipped = len(heading[1]) if heading[2].endswith(CURIOUS) else 0
            if heading and len(heading[1]) <= 2:
                section = heading[2]
            if not skipped:
                found.append((section, cell if cell['cell_type'] == 'code' else None, text))
    return found


def counts(file: Path) -> Counts:
    "What is read and practised; the prose and code of exercises are part of their own minutes, where these are stated."
    total, chapter = Counts(), parts(file)
    total.stated = sum(int(minutes) for _, _, text in chapter if '(For the curious.)' not in text
                       for minutes in NOTE.findall(text))
    for section, cell, text in chapter:
        exercise = section == 'Try it'
        if cell is None:
            total.exercises += len(EXERCISE.findall(text))
        if exercise and total.stated:
            continue
        if cell is None:
            total.words += len(NOTE.sub('', text).split())
        elif is_read(cell) and (file.name == INTRODUCTION or not OPENING.search(text)):
            pieces = ceil(len(text.splitlines()) / LINES_A_CELL) if kind(cell) == 'cells' else 1
            setattr(total, kind(cell), getattr(total, kind(cell)) + pieces)
    return total


def exact_minutes(file: Path) -> float:
    "Minutes of a chapter, with its exercises."
    found = counts(file)
    return found.reading + found.practising


def minutes(file: Path) -> int:
    "The same, rounded to five."
    return max(5 * round(exact_minutes(file) / 5), 5)


def map_rows(text: str) -> dict[str, int]:
    "The chapters of a map, and the minutes that it shows (0 where it shows none)."
    return {file: int(shown or 0) for _, file, shown in ROW.findall(text)}


def course(text: str) -> str:
    "The map's first part."
    return text[text.index('### The course'):text.index('### The engineering part')]


def updated(text: str) -> str:
    "A map with the minutes of today's chapters."
    text = ROW.sub(lambda row: f'{row[1]} {minutes(NBS/row[2])} |', text)
    total = 5 * round(sum(exact_minutes(NBS/file) for file in map_rows(course(text))) / 5)
    return TOTAL.sub(lambda row: f'{row[1]} {total} |', text)


def update_index():
    "Write the minutes into the index."
    notebook = json.loads(INDEX.read_text())
    for cell in notebook['cells']:
        if '### The course' in source(cell):
            cell['source'] = updated(source(cell)).splitlines(keepends=True)
    INDEX.write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + '\n')


if __name__ == '__main__':
    update_index()
    text = next(source(c) for c in json.loads(INDEX.read_text())['cells'] if '### The course' in source(c))
    for file in map_rows(course(text)):
        found = counts(NBS/file)
        print(f'{file:30} {found.reading:5.1f} to read, {found.practising:3.0f} to practise   {found}')
