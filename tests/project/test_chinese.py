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
AMOUNT = re.compile(rf'(\d+(?:\.\d+)?) ?({"|".join(UNITS)})')
NUMBER = re.compile(r'\d+(?:[.,]\d+)*')


CHINESE = '[\u4e00-\u9fff]'
HALF_WIDTH = re.compile(f'{CHINESE}[,;:!?(]|[,;:!?)]{CHINESE}')   # punctuation of the other script
STARS = re.compile(r'\*{1,3}')


def name(file):
    return str(file.relative_to(build.ZH).with_suffix(''))


def plain_amounts(text):
    "300 million and 3 亿 as the same number."
    return AMOUNT.sub(lambda m: f'{float(m[1]) * UNITS[m[2]]:.0f}', text)


def take(pattern, text):
    "What matches, counted, and the text without it."
    return Counter(m[0] for m in pattern.finditer(text)), pattern.sub(' ', text)


def facts(text):
    "What a translation must share with its original, counted; tables by the order of their links."
    found = {'paragraph': len(re.split(r'\n\s*\n', text.strip()))}
    found['links of rows'] = [LINK_TARGET.findall(line) for line in text.splitlines() if line.startswith('|')]
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


# ---- terms -----------------------------------------------------------------------------------------------------------

SHORT = {'head': '头', 'hidden patch': '被遮', 'mixed precision': '混合精度', 'seed': '种子', 'student': '学生',
         'target': '目标', 'teacher': '教师', 'visible patch': '可见'}
OTHER_SENSE = {'be000006': 'head', '2d699ced': 'head', 'f0a6600b': 'view', '2f116156': 'view', 'cf98636c': 'patch'}
NAMES_AND_TITLES = 'bibliography'


def glossary():
    "Each English term of the glossary with its Chinese ones, long terms first."
    text = '\n'.join(build.english(build.NBS/'course'/'glossary.ipynb').values())
    found = {}
    for english, chinese in re.findall(r'^\| ([^|]+) \| ([^|]+) \| [^|]+ \| \[.+ \|$', text, re.M):
        words = re.split(r' / |、', re.sub(r'（[^）]+）', '', chinese))
        for term in re.sub(r' \([^)]+\)', '', english).split(', '):
            found[term] = [SHORT.get(term, re.sub(r' 函数$', '', word)) for word in words]
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


def absent_terms(original, translation, terms):
    "Terms in an English text whose translation has neither a Chinese term of the glossary nor the English one."
    original, translation = prose(original), prose(translation)
    absent = []
    for term, words in terms.items():
        original, times = re.subn(rf'\b{re.escape(term)}s?\b', ' ', original, flags=re.I)
        english = re.search(re.escape(term), translation, re.I)
        if times and not english and not any(word in translation for word in words):
            absent.append(term)
    return absent


@pytest.mark.parametrize('file', [f for f in TRANSLATED if f.stem != NAMES_AND_TITLES], ids=name)
def test_terms_are_those_of_the_glossary(file):
    terms = glossary()
    absent = {cell: absent_terms(original, text, terms) for cell, original, text in pairs(file)}
    assert {cell: found for cell, found in absent.items() if found not in ([], [OTHER_SENSE.get(cell)])} == {}


# ---- the tests find what they are for --------------------------------------------------------------------------------

def test_a_lost_fact_is_found():
    english = '## A head\n\nIt has 300 million `weights`, $n^2$ of [them](a.ipynb).'
    chinese = '## 头\n\n它有 3 亿个 `weights`，[其中](a.ipynb) $n^2$ 个。'
    assert differences(english, chinese) == {}
    assert differences(f'{english}\n\nMore.', chinese) == {'paragraph': (3, 2)}
    for old, new in (('3 亿', '3 万'), ('`weights`', '权重'), ('a.ipynb', 'b.ipynb'), ('$n^2$', '$n$'), ('##', '#')):
        assert len(differences(english, chinese.replace(old, new))) == 1


def test_a_fault_of_form_is_found():
    assert faults_of_form('**头**（head）：`f(x)` 的值，*不*变。') == []
    assert faults_of_form('一,二') == ['一,']
    assert len(faults_of_form('**头。**它')) == 1


def test_another_term_is_found():
    terms = {'mask token': ['掩码词元'], 'token': ['词元']}
    assert absent_terms('A mask token.', '一个掩码词元。', terms) == []
    assert absent_terms('A mask token.', '一个遮罩。', terms) == ['mask token']


# ---- the builder -----------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def book(tmp_path_factory):
    "The Chinese book in a folder elsewhere."
    out = tmp_path_factory.mktemp('zh')
    build.build(out)
    return out


def test_code_and_outputs_are_those_of_the_english_book(book):
    for file in build.notebooks():
        english, chinese = (json.loads(f.read_text()) for f in (file, book/file.relative_to(build.NBS)))
        assert [c['id'] for c in english['cells']] == [c['id'] for c in chinese['cells']]
        for cell, same in zip(english['cells'], chinese['cells']):
            assert cell == same or cell['cell_type'] == 'markdown'
        english.pop('cells'), chinese.pop('cells')
        assert english == chinese


def test_the_prose_is_chinese_and_its_links_lead_somewhere(book):
    for file in TRANSLATED:
        notebook = book/file.relative_to(build.ZH).with_suffix('.ipynb')
        cells = [build.source(c) for c in json.loads(notebook.read_text())['cells'] if c['cell_type'] == 'markdown']
        assert all(re.search(CHINESE, text) for text in cells)
        assert not any(mark in text for text in cells for mark in (build.NO_CHAPTER, build.NO_CELL, build.OLD_CELL))
        links = [link for text in cells for link in build.LINK.findall(text)]
        assert [link for link in links if not (notebook.parent/link).exists()] == []


def test_the_index_has_todays_minutes(book):
    english, chinese = (json.loads(f.read_text())['cells'] for f in (build.NBS/'index.ipynb', book/'index.ipynb'))
    minutes = [[m[2] for c in cells for m in build.MINUTES.finditer(build.source(c))] for cells in (english, chinese)]
    assert minutes[0] == minutes[1] and len(minutes[0]) > 80


def test_a_map_that_is_behind_can_be_built():
    "A chapter more in English, and one less: the others keep their minutes."
    row = '| 1 | [{}]({}.ipynb) | x | {} |'
    english = '\n'.join(['### The course', row.format('a', 'a', 5), row.format('b', 'b', 10), '| | sum | | 15 |'])
    chinese = '\n'.join([row.format('乙', 'b', '').replace('  ', ' '), row.format('丙', 'c', '').replace('  ', ' ')])
    text = build.with_minutes(f'{chinese}\n| | 合计 | | |', english)
    assert text.split('\n') == [row.format('乙', 'b', 10), row.format('丙', 'c', ''), '| | 合计 | | 15 |']


def test_what_is_missing_or_old_is_marked():
    cell = dict(id='a', source=['# New\n', 'text'])
    assert build.translated(cell, {}).startswith(build.NO_CELL)
    now, old = (build.fingerprint(text) for text in ('# New\ntext', '# Old\ntext'))
    assert build.translated(cell, {'a': build.Section(now, '# 新')}) == '# 新'
    assert build.translated(cell, {'a': build.Section(old, '# 旧')}) == f'{build.OLD_CELL}\n\n# 旧'


def test_a_version_for_a_class_is_translated_too():
    "Without notes for teachers, without links to pages that are left out, with lines added, or with a blank."
    note = '<!-- teacher, 2 minutes: {} -->'
    english = f'**1.** *Think.* See [a](a.ipynb), [b](b.ipynb).\n\n{note.format("Yes.")}'
    chinese = f'**1.** *思考。* 见 [甲](a.ipynb)、[乙](b.ipynb)。\n\n{note.format("是。")}'
    assert build.as_in(english, english, chinese) == chinese
    student = '**1.** *Think.* See a, [b](b.ipynb).'
    assert build.as_in(student, english, chinese) == '**1.** *思考。* 见 甲、[乙](b.ipynb)。'
    assert build.as_in(f'{student}\n\n> 2 minutes', english, chinese).endswith('(b.ipynb)。\n\n> 2 minutes')
    assert build.as_in('YOUR ANSWER HERE', english, chinese) == 'YOUR ANSWER HERE'


@pytest.mark.parametrize('out, book, message', [
    (build.NBS/'zh', build.NBS, 'is inside nbs/'), (ROOT, build.NBS, 'contain each other'),
    (ROOT/'nbs_zh', ROOT/'tutorials', 'is not a version of nbs/')])
def test_folders_that_cannot_work_are_refused(monkeypatch, capsys, out, book, message):
    monkeypatch.setattr('sys.argv', ['build.py', '--out', str(out), '--book', str(book)])
    with pytest.raises(SystemExit) as stopped:
        build.main()
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_a_translator_sees_what_has_changed(tmp_path, monkeypatch):
    "From git's history: the lines that changed, and cells without a translation."
    for name, folder in (('ROOT', tmp_path), ('NBS', tmp_path/'nbs'), ('ZH', tmp_path/'zh')):
        monkeypatch.setattr(build, name, folder)
        folder.mkdir(exist_ok=True)
    who = ['-c', 'user.name=a', '-c', 'user.email=a@b.c']
    build.git('init', '-q')
    old = ['# One\n', '\n', 'kept\n', 'old']
    for number, text in enumerate((old, [*old[:3], 'new'])):
        cells = [dict(id='a', cell_type='markdown', source=text), dict(id='b', cell_type='markdown', source=['second'])]
        (tmp_path/'nbs'/'one.ipynb').write_text(json.dumps(dict(cells=cells)))
        build.git('add', 'nbs')
        build.git(*who, 'commit', '-qm', str(number))
    (tmp_path/'zh'/'one.md').write_text(f'<!-- cell a {build.fingerprint("".join(old))} -->\n# 一\n')
    assert build.status() == ['one: 1 of 2 cells, stale: a, missing: b']
    text = '\n'.join(build.changes())
    assert '\n-old\n+new\n' in text and 'kept' not in text and 'cell b has no translation\nsecond' in text
    (tmp_path/'zh'/'one.md').write_text('<!-- cell a new -->\n# 一\n\n<!-- cell b new -->\n二\n')
    assert build.stamp(tmp_path/'zh'/'one.md') == 2
    assert build.status() == ['one: 2 of 2 cells'] and build.changes() == []


def test_the_chinese_readme_is_made_from_the_index():
    "`python zh/build.py --readme` writes it."
    assert build.README.read_text() == build.readme()
    links = build.LINK.findall(build.README.read_text())
    assert [link for link in links if not (ROOT/link).exists()] == []
