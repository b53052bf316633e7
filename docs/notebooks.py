"""A notebook as a page of Markdown: outputs as they are kept, pictures with their alternative texts."""
import base64
import html
import json
import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HIDDEN = re.compile(r'^#\| ?(hide|default_exp)\b', re.M)
DIRECTIVE = re.compile(r'^#\|.*\n?', re.M)
LINK = re.compile(r'(!?\[(?:[^\[\]]|\[[^\]]*\])*\])\((?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)')
CODE_OR_LINK = re.compile(rf'(?P<code>```.*?```|`[^`\n]+`)|{LINK.pattern}', re.S)   # a link in code is none


def all_notebooks() -> list[Path]:
    "Every chapter and tutorial."
    files = [*(ROOT/'nbs').rglob('*.ipynb'), *(ROOT/'tutorials').glob('*.ipynb')]
    return sorted(f for f in files if '.ipynb_checkpoints' not in f.parts)


def page_of(file: Path) -> Path:
    "The place of a notebook's page in the site: folders as in the project, without `nbs`."
    place = file.relative_to(ROOT).with_suffix('.md')
    return place.relative_to('nbs') if place.parts[0] == 'nbs' else place


def source(cell: dict) -> str:
    return ''.join(cell['source'])


def plain(text: str) -> str:
    "Markdown without its marks, for an alternative text."
    text = re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', text)
    return re.sub(r'[*_`#>|$]', '', text)


def alternative_text(cell: dict, before: str) -> str:
    "What a cell's `fig-alt` says, else the sentence that leads to the picture."
    if found := re.match(r'#\| fig-alt: >\n((?:#\|   .+\n?)+)', source(cell)):
        return ' '.join(line.removeprefix('#|').strip() for line in found[1].splitlines())
    lines = [line for line in plain(before).splitlines() if line.strip()]
    sentences = re.split(r'(?<=[.:?!])\s', lines[-1].strip()) if lines else ['']
    return f'Figure: {sentences[-1].strip().rstrip(":.")}'


class Page:
    "A notebook on its way into the site's source folder."
    def __init__(self, file: Path, staged: Path, repo: str | None):
        self.file, self.repo = file, repo
        self.place = page_of(file)
        self.staged, self.pictures = staged, 0

    def text(self) -> str:
        "The whole page; its pictures are written beside it."
        parts, before = [], ''
        for cell in json.loads(self.file.read_text())['cells']:
            if cell['cell_type'] == 'markdown':
                before = source(cell)
                parts.append(self.with_links(before))
            elif cell['cell_type'] == 'code' and not HIDDEN.search(source(cell)):
                parts += self.code(cell, before)
        return '\n\n'.join(parts) + '\n'

    def with_links(self, text: str) -> str:
        "Links to notebooks lead to pages; what is no page is linked where the project is published, or only named."
        def changed(found):
            return found[0] if found['code'] else LINK.sub(self.link, found[0])
        return CODE_OR_LINK.sub(changed, text)

    def link(self, found) -> str:
        label, target = found[1], (self.file.parent/found[2]).resolve()
        if target.suffix == '.ipynb' and target in all_pages():
            return f'{label}({self.relative(page_of(target))}{found[3] or ""})'
        if label.startswith('!') or target.suffix == '.png':
            place = Path('pictures')/target.relative_to(ROOT)
            (self.staged/place).parent.mkdir(parents=True, exist_ok=True)
            (self.staged/place).write_bytes(target.read_bytes())
            return f'{label}({self.relative(place)})'
        if self.repo:
            return f'{label}(https://github.com/{self.repo}/blob/HEAD/{target.relative_to(ROOT).as_posix()})'
        return label[1:-1]

    def relative(self, place: Path) -> str:
        return Path(os.path.relpath(place, self.place.parent)).as_posix()

    def code(self, cell: dict, before: str) -> list[str]:
        "A code cell: what it says, and its outputs."
        text = DIRECTIVE.sub('', source(cell)).strip('\n')
        fence = '`' * max(3, 1 + max(map(len, re.findall(r'`+', text)), default=0))
        parts = [f'{fence}python\n{text}\n{fence}'] if text else []
        return parts + [self.output(output, cell, before) for output in cell.get('outputs', [])]

    def output(self, output: dict, cell: dict, before: str) -> str:
        "One output, the richest form that needs no program behind it."
        data = {kind: ''.join(content) for kind, content in output.get('data', {}).items()}
        if 'image/png' in data:
            return self.picture(data['image/png'], alternative_text(cell, before))
        if 'text/markdown' in data:
            return self.with_links(data['text/markdown'])
        if 'text/html' in data:
            lines = [line.strip() for line in data['text/html'].splitlines() if line.strip()]
            return '<div class="output">\n' + '\n'.join(lines) + '\n</div>'
        text = data.get('text/plain') or ''.join(output.get('text', ''))
        lines = html.escape(text.rstrip('\n')).replace('\n\n', '\n&#8203;\n')   # an empty line would end the block
        return f'<pre class="output">{lines}</pre>'

    def picture(self, content: str, alt: str) -> str:
        self.pictures += 1
        file = self.place.with_name(f'{self.place.stem}-{self.pictures}.png')
        (self.staged/file).parent.mkdir(parents=True, exist_ok=True)
        (self.staged/file).write_bytes(base64.b64decode(content))
        text = re.sub(r'([\[\]])', r'\\\1', alt)
        return f'![{text}]({file.name}){{ loading=lazy }}'


def all_pages() -> set[Path]:
    return set(all_notebooks())


def runnable(file: Path, repo: str) -> dict:
    "A notebook for Colab: its first cell fetches the project, installs it and goes to the chapter's folder."
    notebook = json.loads(file.read_text())
    folder = file.parent.relative_to(ROOT).as_posix()
    lines = [f'!git clone --quiet --depth 1 https://github.com/{repo} project\n',
             '%pip install --quiet -e "project[widgets]"\n', f'%cd project/{folder}\n',
             'import sys\n', 'sys.path.insert(0, "/content/project")   # the kernel started before the installation']
    first = dict(cell_type='code', id='install0', metadata={}, execution_count=None, outputs=[], source=lines)
    notebook['cells'].insert(0, first)
    return notebook
