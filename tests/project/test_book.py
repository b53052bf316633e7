"""Every chapter has the shape that the book promises."""
import json
import re

import pytest
from support import ROOT

INTRODUCTION = ROOT/'nbs'/'course'/'00_introduction.ipynb'
CHAPTERS = [*sorted((ROOT/'nbs').glob('*/[0-9]*.ipynb')),
            *(ROOT/'nbs'/f'{name}.ipynb' for name in ('command_line', 'model_commands', 'commands'))]
TUTORIALS = sorted((ROOT/'tutorials').glob('*.ipynb'))
SECTIONS = '## The idea', '## What it costs', '## Try it', '## What comes next'


def name(file):
    return str(file.relative_to(ROOT).with_suffix(''))


def cells(file):
    return json.loads(file.read_text())['cells']


def source(cell):
    return ''.join(cell['source'])


def prose(file):
    return '\n'.join(source(c) for c in cells(file) if c['cell_type'] == 'markdown')


def exports(cell):
    return cell['cell_type'] == 'code' and re.match(r'#\| ?export', source(cell)) is not None


def pictures(file):
    return sum('image/png' in o.get('data', {}) for c in cells(file) for o in c.get('outputs', []))


def exercises(file):
    return len(re.findall(r'^\*\*\d+\.\*\*', prose(file), re.M))


@pytest.mark.parametrize('file', CHAPTERS, ids=name)
def test_a_chapter_has_its_parts(file):
    assert pictures(file) >= 1
    assert exercises(file) >= 2
    if file != INTRODUCTION:
        text = prose(file)
        assert '**Where we are.**' in text
        assert [s for s in SECTIONS if s not in text] == []


def test_a_page_with_code_shows_what_it_does():
    "Reference pages, too, can be read without running them."
    for file in [f for f in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in f.parts]:
        code = [c for c in json.loads(file.read_text())['cells'] if c['cell_type'] == 'code']
        assert not code or (pictures(file) and any(c['outputs'] for c in code)), name(file)


@pytest.mark.parametrize('file', [f for f in CHAPTERS if f.parent.name == 'model'], ids=name)
def test_a_chapter_of_the_model_has_more(file):
    "By hand first, and at least three exercises."
    assert '## By hand' in prose(file)
    assert exercises(file) >= 3


@pytest.mark.parametrize('file', CHAPTERS, ids=name)
def test_every_definition_is_followed_by_its_checks(file):
    "A definition, or several in a row, and then a cell that checks; one cell that sets it up may come between."
    code = [c for c in cells(file) if c['cell_type'] == 'code']
    for i, cell in enumerate(code):
        if exports(cell) and re.search(r'^(@|def |class |[A-Z_]+ *=)', source(cell), re.M):
            after = [source(c) for c in code[i + 1:] if not exports(c)][:2]
            checked = re.search(r'\b(assert|test_\w+|raises)\b', '\n'.join(after))
            assert checked, f'no check after {source(cell).splitlines()[1]}'


@pytest.mark.parametrize('file', [*CHAPTERS, *TUTORIALS], ids=name)
def test_outputs_are_kept_and_clean(file):
    "Outputs are in the notebook, without errors, warnings, or the machine they were made on."
    outputs = [o for c in cells(file) for o in c.get('outputs', [])]
    assert outputs
    for output in outputs:
        assert output['output_type'] != 'error'
        text = json.dumps({k: v for k, v in output.get('data', output).items() if 'image' not in k})
        assert not re.search(r'Warning|/tmp/|/home/|/root/|/work/|site-packages', text), text[:200]
