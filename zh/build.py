"""The book in Chinese: `python zh/build.py` writes the notebooks to nbs_zh/.

A file `zh/<chapter>.md` has a section for each markdown cell of `nbs/<chapter>.ipynb`: a line
`<!-- cell ID FINGERPRINT -->`, then the translation. The fingerprint is that of the English text it was made from.
A translator writes `new` in its place, and `python zh/build.py --stamp` puts the fingerprint of today's text there.
When an English cell has changed, `--changes` shows what, from git's history.
Code and outputs are those of the English notebooks.

For a class: `mae-course student --out class`, then `python zh/build.py --book class --out class_zh`."""
import argparse
import difflib
import hashlib
import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

ZH = Path(__file__).resolve().parent
ROOT = ZH.parent
NBS = ROOT/'nbs'
README = ROOT/'README.zh.md'
SECTION = re.compile(r'^<!-- cell (\S+) (\S+) -->\n', re.M)
LINK = re.compile(r'\]\((?!https?:|#|mailto:|attachment:)([^)\s#]+)')
MAP = '### The course'   # the index's cell with the map of the book has it
MINUTES = re.compile(r'^(\|.*\|) (\d+) \|$', re.M)   # a row of the map: minutes last
NO_MINUTES = re.compile(r'^(\|.*\|) \|$', re.M)
CHAPTER_LINK = re.compile(r'\[([^\]]+)\]\(([^):]+\.ipynb)\)')
NOTE = re.compile(r'\n*<!-- teacher, \d+ minutes: (.*?) -->', re.S)   # with an exercise, for `mae-course`
NO_CHAPTER = '> *本章尚无中文译文,以下为英文原文。*'
NO_CELL = '> *这一段尚无中文译文。*'
OLD_CELL = '> *这一段的英文原文在翻译之后有改动。*'


@dataclass
class Section:
    "The translation of a cell, and the fingerprint of the English text that it was made from."
    made_from: str
    text: str


def source(cell: dict) -> str:
    return ''.join(cell['source'])


def without_minutes(text: str) -> str:
    "A text that a translator has to follow: the index's map without its minutes, which a program computes."
    return MINUTES.sub(r'\1 |', text) if MAP in text else text


def english(file: Path) -> dict[str, str]:
    "The markdown cells of a notebook by id."
    cells = json.loads(file.read_text())['cells']
    return {c['id']: without_minutes(source(c)) for c in cells if c['cell_type'] == 'markdown'}


def fingerprint(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def translation_file(notebook: Path) -> Path:
    return ZH/notebook.relative_to(NBS).with_suffix('.md')


def notebook_file(translation: Path) -> Path:
    return NBS/translation.relative_to(ZH).with_suffix('.ipynb')


def translations() -> list[Path]:
    return sorted(ZH.rglob('*.md'))


def notebooks(book: Path = NBS) -> list[Path]:
    return [f for f in sorted(book.rglob('*.ipynb')) if '.ipynb_checkpoints' not in f.parts]


def sections(translation: Path) -> dict[str, Section]:
    "The sections of a file by the id of their cell."
    _, *parts = SECTION.split(translation.read_text())
    ids, made_from, texts = parts[::3], parts[1::3], parts[2::3]
    twice = sorted({cell for cell in ids if ids.count(cell) > 1})
    if twice:
        raise ValueError(f'{translation}: more than one section for {", ".join(twice)}')
    return {cell: Section(old, text.strip()) for cell, old, text in zip(ids, made_from, texts)}


def stale(translation: Path) -> list[str]:
    "Cells whose English text has changed since the translation, or no longer exists."
    now = english(notebook_file(translation))
    return [cell for cell, s in sections(translation).items()
            if cell not in now or s.made_from != fingerprint(now[cell])]


def untranslated(translation: Path) -> list[str]:
    "Cells that have no section."
    return [cell for cell in english(notebook_file(translation)) if cell not in sections(translation)]


def stamp(translation: Path) -> int:
    "Give sections marked `new` the fingerprint of today's English text; returns how many there were."
    now = english(notebook_file(translation))

    def marked(match):
        cell, old = match.groups()
        if old == 'new' and cell not in now:
            raise ValueError(f'{translation}: {notebook_file(translation)} has no markdown cell {cell}')
        return f'<!-- cell {cell} {fingerprint(now[cell]) if old == "new" else old} -->\n'

    text = translation.read_text()
    translation.write_text(SECTION.sub(marked, text))
    return len(re.findall(r'^<!-- cell \S+ new -->$', text, re.M))


def chapter_of(row: str) -> str:
    "The notebook that a row of the map links to; empty for the row of the sum."
    link = LINK.search(row)
    return link[1] if link else ''


def with_minutes(text: str, original: str) -> str:
    "A translation; the index's map with the minutes of the English one."
    if MAP not in original:
        return text
    minutes = {chapter_of(row[1]): row[2] for row in MINUTES.finditer(original)}
    return NO_MINUTES.sub(lambda row: f'{row[1]} {minutes.get(chapter_of(row[1]), "")} |', text)


def translated(cell: dict, chapter: dict[str, Section]) -> str:
    "A markdown cell's Chinese text, with a remark where it is missing or older than the English text."
    text = source(cell)
    section = chapter.get(cell['id'])
    if section is None:
        return f'{NO_CELL}\n\n{text}'
    chinese = with_minutes(section.text, text)
    return chinese if section.made_from == fingerprint(without_minutes(text)) else f'{OLD_CELL}\n\n{chinese}'


def bare(text: str) -> str:
    "A text without notes for teachers, and with the words of a link to a chapter only."
    return CHAPTER_LINK.sub(r'\1', NOTE.sub('', text))


def as_in(text: str, original: str, chinese: str) -> str:
    """The Chinese for a cell of a version of the book, which may lack notes for teachers and links to chapters, and may
    have lines at its end; the cell as it is if it has another text, such as a blank for an answer."""
    if text == original:
        return chinese
    if not bare(text).startswith(bare(original)):
        return text
    targets = {link[2] for link in CHAPTER_LINK.finditer(text)}
    chinese = CHAPTER_LINK.sub(lambda link: link[0] if link[2] in targets else link[1], chinese)
    return (chinese if NOTE.search(text) else NOTE.sub('', chinese)) + bare(text)[len(bare(original)):]


def moved_links(text: str, old: Path, new: Path, book: Path) -> str:
    "Links out of the book as they are from the folder `new`; links inside stay, because the whole book moves."
    def moved(match):
        target = (old/match[1]).resolve()
        if target.is_relative_to(book):
            return match[0]
        return f']({Path(os.path.relpath(target, new)).as_posix()}'
    return LINK.sub(moved, text)


def chinese_notebook(file: Path, folder: Path, book: Path) -> dict:
    "A notebook with its prose in Chinese, for a place in `folder`; code and outputs are untouched."
    notebook = json.loads(file.read_text())
    prose = [c for c in notebook['cells'] if c['cell_type'] == 'markdown']
    original = NBS/file.relative_to(book)
    translation = translation_file(original)
    chapter = sections(translation) if translation.exists() else None
    originals = {c['id']: c for c in json.loads(original.read_text())['cells']} if chapter else {}
    for i, cell in enumerate(prose):
        text = source(cell)
        if cell['id'] in originals:
            first = originals[cell['id']]
            text = as_in(text, source(first), translated(first, chapter))
        elif chapter is None and i == 0:
            text = f'{NO_CHAPTER}\n\n{text}'
        cell['source'] = moved_links(text, file.parent, folder, book).splitlines(keepends=True)
    return notebook


def build(out: Path, book: Path = NBS):
    "Write the whole book, with the pictures that its prose shows."
    for file in notebooks(book):
        new = out/file.relative_to(book)
        new.parent.mkdir(parents=True, exist_ok=True)
        notebook = chinese_notebook(file, new.parent, book)
        new.write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + '\n')
    if (book/'images').is_dir():
        shutil.copytree(book/'images', out/'images', dirs_exist_ok=True)


def readme() -> str:
    "README.zh.md: the index in Chinese, with links from the top of the project."
    cells = json.loads((NBS/'index.ipynb').read_text())['cells']
    chapter = sections(ZH/'index.md')
    text = '\n\n'.join(translated(c, chapter) for c in cells)
    text = re.sub(r'\]\((?!https?:|\.\./|#)', '](nbs/', text)
    return '[English](README.md)\n\n' + re.sub(r'\]\(\.\./', '](', text).strip() + '\n'


def status() -> list[str]:
    "A line for each translated chapter: cells translated of cells in all, and those that are missing or stale."
    lines = []
    for file in translations():
        number, old, missing = len(english(notebook_file(file))), stale(file), untranslated(file)
        line = f'{file.relative_to(ZH).with_suffix("")}: {number - len(missing)} of {number} cells'
        line += f', stale: {" ".join(old)}' if old else ''
        lines.append(line + (f', missing: {" ".join(missing)}' if missing else ''))
    return lines


def git(*words: str) -> str:
    "What a git command prints about this project."
    return subprocess.run(['git', '-C', str(ROOT), *words], capture_output=True, text=True, check=True).stdout


def earlier_text(notebook: Path, cell: str, made_from: str) -> str | None:
    "The English text that a translation was made from, if git's history has it."
    path = notebook.relative_to(ROOT).as_posix()
    for commit in git('log', '--format=%H', '--', path).split():
        cells = json.loads(git('show', f'{commit}:{path}'))['cells']
        texts = [without_minutes(source(c)) for c in cells if c['id'] == cell]
        if texts and fingerprint(texts[0]) == made_from:
            return texts[0]
    return None


def changes() -> list[str]:
    "What has changed in the English cells since they were translated, and cells that have no translation."
    lines = []
    for file in translations():
        notebook = notebook_file(file)
        now, chapter = english(notebook), sections(file)
        for cell in stale(file):
            lines += ['', f'{file.relative_to(ROOT)}, cell {cell}' + ('' if cell in now else ' no longer exists')]
            old = earlier_text(notebook, cell, chapter[cell].made_from)
            new = now.get(cell, '')
            lines += new.split('\n') if old is None else difflib.unified_diff(
                old.split('\n'), new.split('\n'), 'translated', 'today', lineterm='', n=0)
        for cell in untranslated(file):
            lines += ['', f'{file.relative_to(ROOT)}, cell {cell} has no translation', *now[cell].split('\n')]
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', type=Path, default=ROOT/'nbs_zh', help='folder for the notebooks')
    parser.add_argument('--book', type=Path, default=NBS, help='folder of the notebooks: nbs/, or a version of it')
    parser.add_argument('--stamp', action='store_true', help='give new sections their fingerprint; build nothing')
    parser.add_argument('--status', action='store_true', help='list what is translated; build nothing')
    parser.add_argument('--changes', action='store_true', help='show what has to be translated; build nothing')
    parser.add_argument('--readme', action='store_true', help='write README.zh.md; build nothing')
    args = parser.parse_args()
    out, book = args.out.resolve(), args.book.resolve()
    if out.is_relative_to(NBS):
        parser.error(f'--out {args.out} is inside nbs/, where nbdev would export it again: choose another folder')
    if out.is_relative_to(book) or book.is_relative_to(out):
        parser.error(f'--out {args.out} and --book {args.book} contain each other: choose another folder')
    unknown = [f for f in notebooks(book) if not (NBS/f.relative_to(book)).exists()]
    if unknown or not notebooks(book):
        parser.error(f'--book {args.book} is not a version of nbs/: {unknown[0] if unknown else "no notebooks"}')
    if args.stamp:
        print(sum(stamp(file) for file in translations()), 'sections stamped')
    if args.readme:
        README.write_text(readme())
    if args.status:
        print('\n'.join(status()))
    if args.changes:
        print('\n'.join(changes()))
    if not (args.stamp or args.readme or args.status or args.changes):
        build(out, book)
        done = sum(translation_file(NBS/f.relative_to(book)).exists() for f in notebooks(book))
        print(f'{out}: {len(notebooks(book))} notebooks, of which {done} are translated')


if __name__ == '__main__':
    main()
