"""The pages for reference know what the book uses."""
import json
import re

from support import ROOT

COURSE = ROOT/'nbs'/'course'
PAGES = [f for f in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in f.parts]
PAGES += sorted((ROOT/'tutorials').glob('*.ipynb'))


def prose(file):
    cells = json.loads(file.read_text())['cells']
    return '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')


def test_every_arxiv_number_of_the_book_is_in_the_bibliography():
    listed = set(re.findall(r'arxiv\.org/abs/([\d.]+\d)', prose(COURSE/'bibliography.ipynb')))
    for file in PAGES:
        cited = set(re.findall(r'(?:arXiv |arxiv\.org/abs/)(\d{4}\.\d{4,5})', prose(file)))
        assert cited <= listed, file
    assert len(listed) > 30


def test_the_bibliography_is_numbered_and_names_each_work_once():
    text = prose(COURSE/'bibliography.ipynb')
    numbers = [int(n) for n in re.findall(r'^(\d+)\. ', text, re.M)]
    assert numbers == [*range(1, len(numbers) + 1)]
    links = re.findall(r'\[arXiv ([\d.]+)\]\(https://arxiv.org/abs/([\d.]+)\)', text)
    assert all(shown == linked for shown, linked in links)
    assert len(set(links)) == len(links)


def test_the_glossary_is_in_order_and_has_both_languages():
    rows = re.findall(r'^\| ([^|]+) \| ([^|]+) \| ([^|]+) \| (\[.+) \|$', prose(COURSE/'glossary.ipynb'), re.M)
    terms = [row[0].lower() for row in rows]
    assert len(terms) > 40 and terms == sorted(set(terms))
    assert all(re.search(r'[\u4e00-\u9fff]', chinese) for _, chinese, _, _ in rows)
    assert not any(re.search(r'[\u4e00-\u9fff]', word) for row in rows for word in (row[0], *row[2:]))
