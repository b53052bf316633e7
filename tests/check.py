"""Every check of the project in one command: `python tests/check.py`; `--fix` rewrites what notebooks make."""
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from questions import PAGE, page_notebook
from reading import update_index

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent   # the commands of this very environment
ENV = os.environ | dict(OMP_NUM_THREADS='1', PATH=f'{BIN}{os.pathsep}{os.environ["PATH"]}')
WORKERS = str(min(os.cpu_count() or 1, 4) + 1)   # one more than cores: tests often wait for other processes
FAILED = []


def run(*words):
    "Run a command in the project's folder; note it if it fails, and go on, so that one run names all faults."
    start = time.time()
    print('\n$', *words, flush=True)
    code = subprocess.run(words, cwd=ROOT, env=ENV).returncode
    if code:
        FAILED.append(f'{" ".join(words)} (exit code {code})')
    print(f'  took {time.time() - start:.0f} s', flush=True)


def fail(message):
    sys.exit(f'check failed: {message}')


def snapshot():
    "The content of the notebooks and of the files that are made from them."
    files = [f for folder in ('nbs', 'tutorials', 'mae_nb') for f in (ROOT/folder).rglob('*')]
    return {f: f.read_bytes() for f in files if f.suffix in ('.ipynb', '.py', '.txt')}


def check_sync():
    "Exports and notebooks are what nbdev makes of them, and every module still has its notebook."
    before = snapshot()
    run('nbdev-export')
    run('nbdev-clean', '--fname', 'nbs')
    run('nbdev-clean', '--fname', 'tutorials')
    after = snapshot()
    changed = [str(f.relative_to(ROOT)) for f in sorted(before | after) if before.get(f) != after.get(f)]
    if changed:
        fail(f'out of sync and now corrected, look at them and commit: {", ".join(changed)}')
    for file in sorted((ROOT/'mae_nb').rglob('*.py')):
        source = re.search(r'File to edit: (\S+\.ipynb)', file.read_text())
        if source and not (file.parent/source[1]).exists():
            fail(f'{file.relative_to(ROOT)} was exported from {source[1]}, which does not exist any more: delete it')


def readme():
    "README.md as nbs/index.ipynb makes it: links and pictures from the top of the project."
    import nbformat
    from nbconvert import MarkdownExporter
    text, _ = MarkdownExporter().from_notebook_node(nbformat.read(ROOT/'nbs'/'index.ipynb', 4))
    text = re.sub(r'\]\((?!https?:|\.\./|#)', '](nbs/', text)
    return re.sub(r'\]\(\.\./', '](', text).strip() + '\n'


def summary(notebook):
    "Title and first sentence of a notebook."
    cells = json.loads(notebook.read_text())['cells']
    text = next(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
    title = re.search(r'^# (.+)', text, re.M)[1]
    about = re.search(r'^> (.+)', text, re.M) or re.search(r'\n\n(.+?[.:])(?:\s|$)', text)
    return f'{title}: {about[1]}'


def llms():
    "nbs/llms.txt: what exists, for a reader that is a machine."
    chapters = sorted((ROOT/'nbs').rglob('[0-9]*.ipynb'))
    chapters += [ROOT/'nbs'/f'{name}.ipynb' for name in ('model_commands', 'commands', 'all')]
    chapters += sorted((ROOT/'nbs'/'course').glob('[a-z]*.ipynb'))   # pages for reference
    lines = ['# mae_nb', '', '> Masked autoencoders, taught in notebooks and trained with fastai', '']
    lines += ['A chapter `nbs/package/NN_module.ipynb` exports the module `mae_nb.package.module`.', '']
    lines += ['## Chapters', '']
    lines += [f'- [{f.relative_to(ROOT)}]({f.relative_to(ROOT/"nbs")}): {summary(f)}' for f in chapters]
    lines += ['', '## Tutorials', '']
    tutorials = sorted((ROOT/'tutorials').glob('*.ipynb'))
    lines += [f'- [tutorials/{f.name}](../tutorials/{f.name}): {summary(f)}' for f in tutorials]
    return '\n'.join(lines) + '\n'


def check_made_from_notebooks():
    "README.md and llms.txt are in sync with the notebooks."
    if '--fix' in sys.argv:
        update_index()
        PAGE.write_text(page_notebook())
        run(sys.executable, 'zh/build.py', '--readme')
    for file, text in ((ROOT/'README.md', readme()), (ROOT/'nbs'/'llms.txt', llms())):
        if '--fix' in sys.argv:
            file.write_text(text)
        if file.read_text() != text:
            fail(f'{file.name} does not match the notebooks: run python tests/check.py --fix')


def check():
    check_sync()
    check_made_from_notebooks()
    run('ruff', 'check')
    run('nbdev-test', 'nbs', '--n-workers', WORKERS, '--cell-timeout', '300')
    # a file stays with one worker, which makes what its tests share once; tests/conftest.py puts the longest first
    run('pytest', '-n', WORKERS, '--dist', 'loadfile', '--no-loadscope-reorder', '--durations', '10')


if __name__ == '__main__':
    with tempfile.TemporaryDirectory(prefix='check', ignore_cleanup_errors=True) as folder:
        ENV['TMPDIR'] = folder   # chapters and tests leave gigabytes in it
        check()
    if FAILED:
        fail('; '.join(FAILED))
    print('all checks passed')
