"""Every chapter has the shape that the book promises."""
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHAPTERS = [f for f in sorted((ROOT/'nbs').glob('[0-9]*.ipynb')) if not f.stem.endswith('_all')]   # that one is a list of imports
TUTORIALS = sorted((ROOT/'tutorials').glob('*.ipynb'))
SECTIONS = '## The idea', '## By hand', '## What it costs', '## Try it', '## What comes next'

def cells(file): return json.loads(file.read_text())['cells']
def source(cell): return ''.join(cell['source'])
def exports(cell): return cell['cell_type'] == 'code' and re.match(r'#\| ?export', source(cell)) is not None
def pictures(file): return sum('image/png' in o.get('data', {}) for c in cells(file) for o in c.get('outputs', []))

@pytest.mark.parametrize('file', CHAPTERS, ids=lambda f: f.stem)
def test_a_chapter_has_its_parts(file):
    text = '\n'.join(source(c) for c in cells(file) if c['cell_type'] == 'markdown')
    assert pictures(file) >= 2
    assert len(re.findall(r'^\*\*\d+\.\*\*', text, re.M)) >= 3, 'fewer than three exercises'
    if file.stem == '00_introduction': return
    assert '**Where we are.**' in text
    assert [s for s in SECTIONS if s not in text] == []

@pytest.mark.parametrize('file', CHAPTERS, ids=lambda f: f.stem)
def test_every_definition_is_followed_by_its_checks(file):
    code = [c for c in cells(file) if c['cell_type'] == 'code']
    for i, cell in enumerate(code):
        if not exports(cell) or not re.search(r'^(@|def |class |[A-Z_]+ *=)', source(cell), re.M): continue
        after = source(code[i + 1]) if i + 1 < len(code) else ''
        assert re.search(r'\b(assert|test_\w+|raises)\b', after), f'no check behind {source(cell).splitlines()[1]}'

@pytest.mark.parametrize('file', [*CHAPTERS, *TUTORIALS], ids=lambda f: f.stem)
def test_outputs_are_kept_and_clean(file):
    "Outputs stand in the notebook, without errors, warnings, or the machine they were made on."
    shown = [o for c in cells(file) for o in c.get('outputs', [])]
    assert shown and pictures(file) >= 2
    for o in shown:
        assert o['output_type'] != 'error'
        text = json.dumps({k: v for k, v in o.get('data', o).items() if 'image' not in k})
        assert not re.search(r'Warning|/tmp/|/home/|/root/|/work/|site-packages', text), text[:200]
