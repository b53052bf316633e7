"""How long a chapter takes to read; `python tests/reading.py` writes it into the map in nbs/index.ipynb."""
import json
import re
from pathlib import Path

NBS = Path(__file__).resolve().parents[1]/'nbs'
INDEX = NBS/'index.ipynb'
WORDS_A_MINUTE = 200
MINUTES_A_CELL = .5       # a code cell that a reader sees, with its output
MINUTES_AN_EXERCISE = 3
ROW = re.compile(r'^(\|.*\]\(([^)]+\.ipynb)\).*\|) *(\d*) *\|$', re.M)       # a chapter of the map, minutes last
TOTAL = re.compile(r'^(\| *\| the whole course \|.*\|) *(\d*) *\|$', re.M)


def source(cell: dict) -> str:
    return ''.join(cell['source'])


def is_read(cell: dict) -> bool:
    "Whether a reader stops at a code cell: hidden ones and imports are passed over."
    lines = [line for line in source(cell).splitlines() if line and not line.startswith('#|')]
    hidden = re.match(r'#\| ?(hide|default_exp)', source(cell))
    return not hidden and any(not line.startswith(('import ', 'from ')) for line in lines)


def counts(file: Path) -> tuple[int, int, int]:
    "Words of prose, code cells that are read, and exercises."
    cells = json.loads(file.read_text())['cells']
    prose = '\n'.join(source(c) for c in cells if c['cell_type'] == 'markdown')
    code = sum(c['cell_type'] == 'code' and is_read(c) for c in cells)
    return len(prose.split()), code, len(re.findall(r'^\*\*\d+\.\*\*', prose, re.M))


def minutes(file: Path) -> int:
    "Reading minutes, rounded to five."
    words, code, exercises = counts(file)
    exact = words / WORDS_A_MINUTE + code * MINUTES_A_CELL + exercises * MINUTES_AN_EXERCISE
    return max(5 * round(exact / 5), 5)


def map_rows(text: str) -> dict[str, int]:
    "The chapters of a map, and the minutes that it shows (0 where it shows none)."
    return {file: int(shown or 0) for _, file, shown in ROW.findall(text)}


def course(text: str) -> str:
    "The map's first part."
    return text[text.index('### The course'):text.index('### The engineering part')]


def updated(text: str) -> str:
    "A map with the minutes of today's chapters."
    text = ROW.sub(lambda row: f'{row[1]} {minutes(NBS/row[2])} |', text)
    total = sum(map_rows(course(text)).values())
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
