"""How the house is built: sizes, density, names, imports and start-up of a checkout, beside another one.

    python bench/structure.py [--against FOLDER] [--rounds 5] [--json FILE]

The other checkout is, for instance, a clone of an earlier commit.
Start-up is measured in turn, each run in a process of its own.
"""
import argparse
import ast
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# an import goes up this list only
PACKAGES = ('base', 'model', 'data', 'weights', 'training', 'tasks', 'measure', 'command_line',
            'model_commands', 'commands', 'all')
COMMANDS = ('demo', 'pretrain', 'finetune', 'probe', 'show', 'convert', 'replay', 'pack', 'bench', 'plan', 'check',
            'study')


def module_files(folder: Path) -> list[Path]:
    "The exported modules of a checkout."
    files = sorted((folder/'mae_nb').rglob('*.py'))
    return [f for f in files if not f.name.startswith('_') and 'data_files' not in f.parts]


def is_docstring(node) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def functions(source: str) -> list[tuple]:
    "(name, lines, syntax nodes) of each function's body; blank lines and comments do not count."
    tree, text, rows = ast.parse(source), source.splitlines(), []
    holders = [tree, *(n for n in ast.walk(tree) if isinstance(n, ast.ClassDef))]
    for node in (n for holder in holders for n in holder.body):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        body = node.body[1:] if is_docstring(node.body[0]) else node.body
        if not body:
            continue
        lines = [line.strip() for line in text[body[0].lineno - 1:body[-1].end_lineno]]
        count = sum(bool(line) and not line.startswith('#') for line in lines)
        rows.append((node.name, count, sum(1 for statement in body for _ in ast.walk(statement))))
    return rows


def notebook_number(file: Path) -> str:
    "The name of the notebook that a module is exported from, which begins with its number; empty without one."
    for line in file.read_text().splitlines():
        if 'File to edit:' in line:
            stem = line.rsplit('/', 1)[-1]
            return stem if stem[:2].isdigit() else ''
    return ''


def place(folder: Path, file: Path) -> tuple[int, str]:
    "Where a module stands: its package in `PACKAGES`, and its notebook in the package."
    package = file.relative_to(folder/'mae_nb').with_suffix('').parts[0]
    return PACKAGES.index(package), notebook_number(file)


def imported_modules(folder: Path, file: Path) -> list[Path]:
    "The modules of the same package tree that a module imports."
    parts = file.relative_to(folder).with_suffix('').parts
    nodes = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.ImportFrom) and n.level]
    targets = [folder.joinpath(*parts[:len(parts) - n.level], *(n.module or '').split('.')) for n in nodes]
    return [t.with_suffix('.py') for t in targets if t.with_suffix('.py').is_file()]


def imports_against_the_table(folder: Path) -> list[str]:
    "Imports that go down: from a module to one that stands below it."
    pairs = [(file, target) for file in module_files(folder) for target in imported_modules(folder, file)]
    wrong = [(file, target) for file, target in pairs if place(folder, target) >= place(folder, file)]
    return [f'{file.relative_to(folder)} imports {target.relative_to(folder)}' for file, target in wrong]


def without_all(text: str) -> str:
    "A module without the list of names that nbdev writes."
    return re.sub(r"^__all__ = \[.*?\]\n", '', text, flags=re.M | re.S)


def structure(folder: Path) -> dict:
    "Sizes of modules and functions."
    texts = {str(f.relative_to(folder/'mae_nb')): without_all(f.read_text()) for f in module_files(folder)}
    lines = {name: len(text.splitlines()) for name, text in texts.items()}
    widths = [len(line) for text in texts.values() for line in text.splitlines()]
    rows = [row for text in texts.values() for row in functions(text)]
    longest = max(rows, key=lambda row: row[1])
    largest = max(lines, key=lines.get)
    return dict(
        modules=len(lines), lines=sum(lines.values()),
        largest_module=f'{largest}: {lines[largest]}', modules_over_350=sum(n > 350 for n in lines.values()),
        widest_line=max(widths), lines_over_120=sum(n > 120 for n in widths),
        functions=len(rows), longest_function=f'{longest[0]}: {longest[1]}',
        functions_over_40=sum(row[1] > 40 for row in rows),
        nodes_a_line=sum(row[2] for row in rows) / sum(row[1] for row in rows))


def run_python(folder: Path, code: str) -> subprocess.CompletedProcess:
    "Run code in a process of its own, with a checkout's package."
    start = f'import sys; sys.path.insert(0, {str(folder)!r}); sys.argv = ["x", "--help"]\n'
    env = os.environ | dict(OMP_NUM_THREADS='1')
    words = [sys.executable, '-c', start + code]
    return subprocess.run(words, capture_output=True, text=True, cwd='/', env=env, check=True)


def timed_process(folder: Path, code: str) -> tuple[float, float]:
    "CPU seconds and peak MiB of a Python process that runs some code."
    measure = ('import resource, sys; r = resource.getrusage(resource.RUSAGE_SELF)\n'
               'print(r.ru_utime + r.ru_stime, r.ru_maxrss / 1024, file=sys.stderr)')
    done = run_python(folder, f'{code}\n{measure}')
    seconds, mib = map(float, done.stderr.split()[-2:])
    return seconds, mib


def start_ups(folder: Path) -> dict:
    "What to run -> code, for a checkout of this layout or of the flat one before it."
    module = 'mae_nb.commands' if (folder/'mae_nb'/'commands.py').is_file() else 'mae_nb.cli'
    runs = {}
    for command in COMMANDS:
        runs[f'mae-{command} --help'] = (
            f'from {module} import mae_{command} as command\nfrom fastcore import script\n'
            'try: script._run_cli(command.__wrapped__, False)\nexcept SystemExit: pass')
    return runs | {'import mae_nb': 'import mae_nb', 'from mae_nb.all import *': 'from mae_nb.all import *'}


def public_names(folder: Path) -> int:
    return int(run_python(folder, 'import mae_nb.all as a; print(len(a.__all__))').stdout)


def median_start_ups(folders: dict, rounds: int) -> dict:
    "What was run -> name of the checkout -> median CPU seconds and MiB; the checkouts take turns."
    result = {}
    for run in start_ups(ROOT):
        times = {name: [] for name in folders}
        for _ in range(rounds):
            for name, folder in folders.items():
                times[name].append(timed_process(folder, start_ups(folder)[run]))
        result[run] = {name: [statistics.median(column) for column in zip(*rows)] for name, rows in times.items()}
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--against', type=Path)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--json', type=Path)
    args = parser.parse_args()
    folders = {'this': ROOT} | ({'other': args.against.resolve()} if args.against else {})
    sizes = {name: structure(f) | dict(public_names=public_names(f)) for name, f in folders.items()}
    for key in sizes['this']:
        values = [sizes[name][key] for name in folders]
        print(f'{key:26}', *(f'{v:.1f}'.rjust(26) if isinstance(v, float) else str(v).rjust(26) for v in values))
    against = imports_against_the_table(ROOT)
    print(f'{"imports_against_the_table":26} {len(against):26}')
    starts = median_start_ups(folders, args.rounds)
    print('\nmedian CPU seconds and MiB')
    for run, medians in starts.items():
        print(f'{run:26}', *(f'{seconds:.3f} s {mib:8.0f} MiB'.rjust(26) for seconds, mib in medians.values()))
    if args.json:
        report = dict(sizes=sizes, imports_against_the_table=against, start_ups=starts)
        args.json.write_text(json.dumps(report, indent=1) + '\n')


if __name__ == '__main__':
    main()
