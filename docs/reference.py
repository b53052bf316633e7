"""Pages made from the code: the API with its docments, and the commands with their help."""
import ast
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def modules() -> list[str]:
    "The package's modules that a notebook exports, by name."
    files = sorted((ROOT/'mae_nb').rglob('*.py'))
    found = [f for f in files if 'File to edit:' in f.read_text()]
    return ['.'.join(f.relative_to(ROOT).with_suffix('').parts) for f in found]


def chapter_of(module: str) -> Path:
    "The notebook that exports a module."
    file = ROOT/Path(*module.split('.')).with_suffix('.py')
    return (file.parent/re.search(r'File to edit: (\S+\.ipynb)', file.read_text())[1]).resolve()


def signature(lines: list[str], node) -> str:
    "The lines of a definition up to its body, with the comment of each parameter; of a class, also its fields."
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    inside = [n for n in node.body if not isinstance(n, ast.FunctionDef) and not is_docstring(n)]
    if isinstance(node, ast.ClassDef):
        head = lines[first - 1:node.body[0].lineno - 1] or lines[first - 1:node.lineno]
        fields = [n for n in inside if isinstance(n, ast.AnnAssign)]
        return '\n'.join([*head, *(line for n in fields for line in lines[n.lineno - 1:n.end_lineno])])
    text = '\n'.join(lines[first - 1:node.body[0].lineno - 1] or lines[first - 1:node.lineno])
    return textwrap.dedent(text)


def is_docstring(node) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def definition(name: str, lines: list[str], node, level: str) -> str:
    "A function, class or method: its sentence, and its signature as the chapter writes it."
    return f'{level} {name}\n\n{ast.get_docstring(node) or ""}\n\n```python\n{signature(lines, node)}\n```'


def class_parts(name: str, lines: list[str], node: ast.ClassDef) -> list[str]:
    "A class, how it is made, and its public methods that have a docstring."
    functions = [n for n in node.body if isinstance(n, ast.FunctionDef)]
    made = [f'```python\n{signature(lines, n)}\n```' for n in functions if n.name == '__init__']
    methods = [n for n in functions if not n.name.startswith('_') and ast.get_docstring(n)]
    return [definition(name, lines, node, '##'), *made,
            *(definition(f'{name}.{n.name}', lines, n, '###') for n in methods)]


def api_page(name: str, chapter: str) -> str:
    "One module, read and not imported."
    text = (ROOT/Path(*name.split('.')).with_suffix('.py')).read_text()
    lines, tree = text.splitlines(), ast.parse(text)
    parts = [f'# {name}', ast.get_docstring(tree) or '', f'Made and checked in [{Path(chapter).stem}]({chapter}).']
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith('_'):
            parts.append(definition(node.name, lines, node, '##'))
        if isinstance(node, ast.ClassDef) and not node.name.startswith('_'):
            parts += class_parts(node.name, lines, node)
    names = [target.id for node in tree.body if isinstance(node, ast.Assign) for target in node.targets
             if isinstance(target, ast.Name) and target.id.isupper() and not target.id.startswith('_')]
    if names:
        parts.append('## Constants\n\n' + ', '.join(f'`{item}`' for item in names))
    return '\n\n'.join(parts) + '\n'


def commands() -> dict[str, str]:
    "Command -> the function behind it, as module:function."
    text = (ROOT/'pyproject.toml').read_text()
    return dict(re.findall(r'^(mae-[\w-]+) = "([\w.:]+)"$', text, re.M))


def commands_page() -> str:
    "Every command with the help that it prints."
    parts = ['# Commands', 'Each command as its `--help` prints it. The [chapter](../commands.md) makes them.']
    for command, place in commands().items():
        module, function = place.split(':')
        code = f'import sys; sys.argv = ["{command}", "--help"]; from {module} import {function} as f; f()'
        done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, cwd=ROOT,
                              env=os.environ | dict(COLUMNS='100'), check=True)
        parts.append(f'## {command}\n\n```text\n{done.stdout.strip()}\n```')
    return '\n\n'.join(parts) + '\n'
