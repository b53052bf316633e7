"""The Chinese book: no translation is older than its original, and none loses a number, a link or a formula."""
import json
import re
import unicodedata
from collections import Counter

import pytest
from support import ROOT

from zh import build

TRANSLATED = build.translations()
UNTRANSLATED = {}   # chapter: cells that are still to be translated
CODE_BLOCK = re.compile(r'^```.*?^```$', re.M | re.S)
IMAGE = re.compile(r'!\[[^\]]*\]\(([^)]+)\)')
LINK_TARGET = re.compile(r'(?<=\])\(([^)\s]+)\)')
FORMULA = re.compile(r'\$\$.+?\$\$|\$[^$\n]+\$', re.S)
CODE = re.compile(r'``.+?``|`[^`\n]+`')
UNITS = {'million': 1e6, 'billion': 1e9, '万': 1e4, '亿': 1e8}
NUMBER = re.compile(r'\d+(?:[.,]\d+)*')


CHINESE = '[\u4e00-\u9fff]'
HALF_WIDTH = re.compile(f'{CHINESE}[,;:!?(]|[,;:!?)]{CHINESE}')   # punctuation of the other script
STARS = re.compile(r'\*{1,3}')


def name(file):
    return str(file.relative_to(build.ZH).with_suffix(''))


def plain_amounts(text):
    "300 million and 3 亿 as the same number."
    for unit, value in UNITS.items():
        text = re.sub(rf'(\d+(?:\.\d+)?) ?{unit}', lambda m: f'{float(m[1]) * value:.0f}', text)
    return text


def take(pattern, text):
    "What matches, counted, and the text without it."
    return Counter(m[0] for m in pattern.finditer(text)), pattern.sub(' ', text)


def facts(text):
    "What a translation must share with its original, counted; tables by the order of their links."
    found = {}
    for kind, pattern in (('code block', CODE_BLOCK), ('image', IMAGE), ('link', LINK_TARGET), ('code', CODE),
                          ('formula', FORMULA)):
        if kind == 'image':
            found[kind] = Counter(IMAGE.findall(text))
            text = re.sub(r'!(\[[^\]]*\])\([^)]+\)', r'\1', text)
        else:
            found[kind], text = take(pattern, text)
    found['heading'] = re.findall(r'^#+(?= )', text, re.M)
    found['exercise'] = re.findall(r'^\*\*\d+\.\*\*', text, re.M)
    found['table row'] = [line.count('|') for line in text.splitlines() if line.startswith('|')]
    found['item'] = len(re.findall(r'^(?:-|\d+\.) ', text, re.M))
    found['number'] = Counter(NUMBER.findall(plain_amounts(text)))
    return found


def differences(original, translation):
    "Facts that one of two texts has and the other one lacks."
    first, second = facts(original), facts(translation)
    return {kind: (first[kind] - second[kind], second[kind] - first[kind]) if isinstance(first[kind], Counter)
            else (first[kind], second[kind]) for kind in first if first[kind] != second[kind]}


def pairs(file):
    "English text and translation of each translated cell that still exists."
    originals = build.english(build.notebook_file(file))
    return [(cell, originals[cell], s.text) for cell, s in build.sections(file).items() if cell in originals]


@pytest.mark.parametrize('file', TRANSLATED, ids=name)
def test_no_translation_is_older_than_its_original(file):
    "`python zh/build.py --status` lists them; translate them anew, write `new` for the fingerprint, and --stamp."
    assert build.stale(file) == []


@pytest.mark.parametrize('file', TRANSLATED, ids=name)
def test_a_chapter_is_translated_whole(file):
    assert build.untranslated(file) == UNTRANSLATED.get(name(file), [])


@pytest.mark.parametrize('file', TRANSLATED, ids=name)
def test_a_translation_keeps_every_fact(file):
    changed = {cell: differences(original, text) for cell, original, text in pairs(file)}
    assert {cell: found for cell, found in changed.items() if found} == {}


def prose(text):
    "A text without code, formulas and the targets of links."
    for pattern in (CODE_BLOCK, LINK_TARGET, CODE, FORMULA):
        text = pattern.sub('x', text)
    return text


def is_mark(character):
    "Whether Markdown takes a character for punctuation."
    return unicodedata.category(character)[0] in 'PS'


def unseen_emphasis(text):
    "Stars that Markdown does not read as the beginning or the end of emphasis, as in `**text.**` before a character."
    wrong = []
    for paragraph in re.split(r'\n\s*\n|\n(?=- |\||\d+\. )', prose(text)):
        for number, stars in enumerate(STARS.finditer(paragraph)):
            around = f'\n{paragraph}\n'[stars.start()], f'\n{paragraph}\n'[stars.end() + 1]
            outside, inside = around if number % 2 == 0 else around[::-1]
            if inside.isspace() or (is_mark(inside) and not outside.isspace() and not is_mark(outside)):
                wrong.append(paragraph[max(stars.start() - 8, 0):stars.end() + 8])
    return wrong


def faults_of_form(text):
    "Half-width punctuation beside a Chinese character, and emphasis that would show its stars."
    return [m[0] for m in HALF_WIDTH.finditer(prose(text))] + unseen_emphasis(text)


@pytest.mark.parametrize('file', TRANSLATED, ids=name)
def test_a_translation_is_set_as_chinese_is(file):
    wrong = {cell: faults_of_form(text) for cell, _, text in pairs(file)}
    assert {cell: found for cell, found in wrong.items() if found} == {}
