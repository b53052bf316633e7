"""The course's questions as a page of the book: `python tests/questions.py` writes nbs/course/questions.ipynb."""
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
QUESTIONS = ROOT/'tests'/'project'/'course_questions.json'
PAGE = ROOT/'nbs'/'course'/'questions.ipynb'
HEAD = """# questions

> What a reader of the course should be able to answer, and where the answers are

A reference page, for self-tests and for teachers. Answer first, in two sentences, and then look. A test checks that \
each answer is where this list says (`tests/project/test_course.py`).

"""


def sections(file: Path) -> list[tuple[str, str, str]]:
    "The parts of a chapter's prose: the cell, the heading that a part is under, and its text."
    parts, heading = [], ''
    for cell in json.loads(file.read_text())['cells']:
        if cell['cell_type'] == 'markdown':
            for text in re.split(r'^(?=#+ )', ''.join(cell['source']), flags=re.M):
                found = re.match(r'#+ (.+)', text)
                heading = found[1] if found else heading
                parts.append((cell['id'], heading, text.lower()))
    return parts


def section_of(item: dict) -> tuple[str, str]:
    "The title of a question's chapter, and the section of its cell that holds the most of its key terms."
    parts = sections(ROOT/item['chapter'])
    own = [(heading, text) for cell, heading, text in parts if cell == item['cell']]
    heading, _ = max(own, key=lambda part: sum(term.lower() in part[1] for term in item['terms']))
    return next(heading for _, heading, _ in parts if heading), heading


def page_text() -> str:
    "The page's Markdown: the questions in the list's order."
    lines = []
    for number, item in enumerate(json.loads(QUESTIONS.read_text()), 1):
        file = ROOT/item['chapter']
        chapter, section = section_of(item)
        folder = '' if file.parent == PAGE.parent else f'../{file.parent.name}/'
        lines.append(f'{number}. {item["question"]} *[{chapter}]({folder}{file.name}), {section}*')
    return HEAD + '\n'.join(lines)


def page_notebook() -> str:
    "The page as a notebook."
    cell = dict(cell_type='markdown', id='5e1f7e57', metadata={}, source=page_text().splitlines(keepends=True))
    kernel = dict(display_name='python3', language='python', name='python3')
    notebook = dict(cells=[cell], metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)
    return json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + '\n'


if __name__ == '__main__':
    PAGE.write_text(page_notebook())
