"""Every check of the project in one command: `python tests/check.py`; `--fix` also rewrites README.md."""
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent   # the commands of this very environment
ENV = os.environ | dict(OMP_NUM_THREADS='1', PATH=f'{BIN}{os.pathsep}{os.environ["PATH"]}')

def run(*cmd):
    "Run a command in the project's folder; stop at the first one that fails."
    start = time.time()
    print('\n$', *cmd, flush=True)
    if code := subprocess.run(cmd, cwd=ROOT, env=ENV).returncode: sys.exit(f'check failed: {" ".join(cmd)} (exit code {code})')
    print(f'  took {time.time() - start:.0f} s', flush=True)

def fail(message): sys.exit(f'check failed: {message}')

def snapshot():
    "What stands in the notebooks and in what is made from them."
    return {f: f.read_bytes() for d in ('nbs', 'tutorials', 'mae_nb') for f in (ROOT/d).rglob('*') if f.suffix in ('.ipynb', '.py', '.txt')}

def check_sync():
    "Exports and notebooks are just what nbdev makes of them, and every module still has its notebook."
    before = snapshot()
    run('nbdev-export')
    run('nbdev-clean', '--fname', 'nbs')
    run('nbdev-clean', '--fname', 'tutorials')
    after = snapshot()
    changed = [str(f.relative_to(ROOT)) for f in sorted(before | after) if before.get(f) != after.get(f)]
    if changed: fail(f'out of sync, now mended, look at them and commit: {", ".join(changed)}')
    for f in sorted((ROOT/'mae_nb').rglob('*.py')):
        named = re.search(r'File to edit: (\S+\.ipynb)', f.read_text())
        if named and not (f.parent/named[1]).exists(): fail(f'{f.name} was exported from {named[1]}, which is gone: delete it')

def readme():
    "README.md as nbs/index.ipynb makes it: links and pictures from the top of the project."
    import nbformat
    from nbconvert import MarkdownExporter
    text, _ = MarkdownExporter().from_notebook_node(nbformat.read(ROOT/'nbs'/'index.ipynb', 4))
    text = re.sub(r'\]\((?!https?:|\.\./|#)', '](nbs/', text)
    return re.sub(r'\]\(\.\./', '](', text).strip() + '\n'

def check_readme():
    "README.md is in sync with its notebook."
    file = ROOT/'README.md'
    if '--fix' in sys.argv: file.write_text(readme())
    if file.read_text() != readme(): fail('README.md does not match nbs/index.ipynb: run python tests/check.py --fix')

if __name__ == '__main__':
    check_sync()
    check_readme()
    run('ruff', 'check')
    run('nbdev-test', 'nbs', '--n-workers', '2', '--cell-timeout', '300')
    run('pytest', '-n', '2', '--dist', 'worksteal')   # the tutorial is as long as all else
    print('all checks passed')
