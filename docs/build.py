"""The site of the book in one command, without a network: python docs/build.py [--repo owner/name] [--out FOLDER]

Needs `pip install -e ".[site]"`. The pages are the notebooks with the outputs that they keep; nothing is run.
With a repository, each chapter links to itself in Colab and Binder."""
import argparse
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from notebooks import ROOT, Page, all_notebooks, page_of, runnable, source  # noqa: E402
from reference import api_page, chapter_of, commands_page, modules  # noqa: E402

STAGED = ROOT/'_site_src'


def add_buttons(text: str, file: Path, repo: str) -> str:
    "The page with its links to Colab and Binder below the title."
    place = file.relative_to(ROOT).as_posix()
    colab = f'https://colab.research.google.com/github/{repo}/blob/gh-pages/colab/{place}'
    binder = f'https://mybinder.org/v2/gh/{repo}/HEAD?urlpath=lab/tree/{place}'
    buttons = f'[Open in Colab]({colab}){{ .open-in }} · [Open in Binder]({binder}){{ .open-in }}'
    return re.sub(r'^(# .+)$', lambda title: f'{title[1]}\n\n{buttons}', text, count=1, flags=re.M)


def write(place: Path, text: str):
    (STAGED/place).parent.mkdir(parents=True, exist_ok=True)
    (STAGED/place).write_text(text)


def stage_notebooks(repo: str | None):
    "A page for each notebook; with a repository also a copy for Colab."
    for file in all_notebooks():
        text = Page(file, STAGED, repo).text()
        if repo:
            text = add_buttons(text, file, repo)
            write(Path('colab')/file.relative_to(ROOT), json.dumps(runnable(file, repo), ensure_ascii=False))
        write(page_of(file), text)


def stage_reference():
    "The pages of the API and the commands."
    for name in modules():
        place = Path('api', *name.split('.')[1:]).with_suffix('.md')
        write(place, api_page(name, os.path.relpath(page_of(chapter_of(name)), place.parent)))
    write(Path('reference/commands.md'), commands_page())


def map_sections() -> tuple[list, dict]:
    "The course in its order, and the chapters of the engineering part by package, as the front page maps them."
    text = '\n'.join(source(c) for c in json.loads((ROOT/'nbs'/'index.ipynb').read_text())['cells'])
    course, engineering = text.split('### The course')[1].split('### The engineering part')
    rows = re.findall(r'^\| \d+ \| \[([^\]]+)\]\(([^)]+)\.ipynb\)', course, re.M)
    packages, package = {}, ''
    row = re.compile(r'^\| (?:\*\*(\w+)\*\*)? ?\| \[([^\]]+)\]\(([^)]+)\.ipynb\)', re.M)
    for shown, title, file in row.findall(engineering):
        package = shown or package
        packages.setdefault(package, []).append({title: f'{file}.md'})
    return [{title: f'{file}.md'} for title, file in rows], packages


def title_of(file: Path) -> str:
    "The first heading of a notebook."
    cells = json.loads(file.read_text())['cells']
    text = next(source(c) for c in cells if c['cell_type'] == 'markdown')
    return re.search(r'^# (.+)', text, re.M)[1]


def navigation() -> list:
    "The site's sections: the two doors of the book, tutorials, commands, API, and every other page by its folder."
    course, packages = map_sections()
    shown = {place for row in [*course, *sum(packages.values(), [])] for place in row.values()} | {'index.md'}
    rest = {}
    for file in all_notebooks():
        if (place := page_of(file)).as_posix() not in shown:
            rest.setdefault(place.parts[0], []).append({title_of(file): place.as_posix()})
    api = {}
    for name in modules():
        first, *others = name.split('.')[1:]
        api.setdefault(first if others else 'mae_nb', []).append({'.'.join([first, *others]): '/'.join(
            ['api', first, *others]) + '.md'})
    tutorials, reference = rest.pop('tutorials', []), rest.pop('course', [])
    return [{'Home': 'index.md'}, {'Course': [*course, {'for reference': reference}]},
            {'Engineering': [{package: rows} for package, rows in packages.items()]}, {'Tutorials': tutorials},
            {'Commands': 'reference/commands.md'}, {'API': [{package: rows} for package, rows in api.items()]},
            *({folder: rows} for folder, rows in rest.items())]


def build(out: Path, repo: str | None = None):
    "Stage everything, and let mkdocs build it; a link that leads nowhere is an error."
    from mkdocs.commands.build import build as mkdocs_build
    from mkdocs.config import load_config
    shutil.rmtree(STAGED, ignore_errors=True)
    stage_notebooks(repo)
    stage_reference()
    shutil.copy(ROOT/'docs'/'extra.css', STAGED)
    config = load_config(str(ROOT/'docs'/'mkdocs.yml'), docs_dir=str(STAGED), site_dir=str(out), strict=True,
                         nav=navigation())
    mkdocs_build(config)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--repo', default=os.environ.get('GITHUB_REPOSITORY'), help='owner/name at GitHub, for badges')
    parser.add_argument('--out', type=Path, default=ROOT/'_site', help='the folder to write')
    arguments = parser.parse_args()
    start = time.time()
    build(arguments.out.resolve(), arguments.repo)
    files = [f for f in arguments.out.rglob('*') if f.is_file()]
    pages, size = sum(f.suffix == '.html' for f in files), sum(f.stat().st_size for f in files)
    print(f'{pages} pages, {size / 1e6:.0f} MB, in {time.time() - start:.0f} s: {arguments.out}')


if __name__ == '__main__':
    main()
