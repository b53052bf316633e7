"""Links of README, notebooks and tutorials lead to files that exist."""
import json
import re
from pathlib import Path

import pytest
from support import ROOT

PAGES = [ROOT/'README.md', *sorted((ROOT/'nbs').rglob('*.ipynb')), *sorted((ROOT/'tutorials').glob('*.ipynb'))]
PAGES = [f for f in PAGES if '.ipynb_checkpoints' not in f.parts]


def page_text(file: Path) -> str:
    "A page's prose."
    if file.suffix != '.ipynb':
        return file.read_text()
    cells = json.loads(file.read_text())['cells']
    return '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')


@pytest.mark.parametrize('file', PAGES, ids=lambda f: str(f.relative_to(ROOT)))
def test_links_lead_somewhere(file):
    links = re.findall(r'\]\((?!https?:|#|mailto:|attachment:)([^)\s#]+)', page_text(file))
    assert [link for link in links if not (file.parent/link).exists()] == []


def test_the_book_is_on_the_map():
    "Each chapter is linked from README's map."
    text = (ROOT/'README.md').read_text()
    chapters = [f for f in PAGES if f.suffix == '.ipynb' and f.name != 'index.ipynb']
    missing = [f for f in chapters if f']({f.relative_to(ROOT)})' not in text]
    assert missing == []
