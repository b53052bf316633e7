"""The house keeps its shape: imports go up, modules and functions stay short, what is heavy loads late."""
import ast

from support import ROOT

from bench.structure import functions, imports_against_the_table, module_files, without_all

FILES = module_files(ROOT)
TEXTS = {str(f.relative_to(ROOT/'mae_nb')): f.read_text() for f in FILES}
HEAVY = {'sklearn', 'timm', 'tensorboard', 'matplotlib', 'torchvision', 'transformers', 'scipy', 'pyarrow', 'torchao'}


def top_imports(text: str) -> list[str]:
    "The packages that a module imports at its top."
    packages = []
    for node in ast.parse(text).body:
        if isinstance(node, ast.Import):
            packages += [a.name.split('.')[0] for a in node.names]
        if isinstance(node, ast.ImportFrom) and not node.level:
            packages.append(node.module.split('.')[0])
    return packages


def test_an_import_goes_up_the_table_only():
    assert len(FILES) > 40
    assert imports_against_the_table(ROOT) == []


def test_modules_and_lines_are_short():
    sizes = {name: len(t.splitlines()) for name, t in TEXTS.items()}
    assert sizes.pop('commands.py') <= 430   # twelve commands, with a line of help for each flag
    assert {name: n for name, n in sizes.items() if n > 350} == {}
    lines = [(name, line) for name, t in TEXTS.items() for line in without_all(t).splitlines()]
    assert [(name, line) for name, line in lines if len(line) > 120] == []


def test_functions_are_short():
    rows = [(name, *row) for name, t in TEXTS.items() for row in functions(t)]
    assert [row for row in rows if row[2] > 40] == []


def test_no_private_name_crosses_modules():
    for name, text in TEXTS.items():
        nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom) and n.level]
        names = [a.name for n in nodes for a in n.names]
        assert [n for n in names if n.startswith('_') and n != '__version__'] == [], name


def test_what_is_heavy_loads_only_when_it_is_used():
    heavy = {name: sorted(HEAVY.intersection(top_imports(t))) for name, t in TEXTS.items()}
    assert {name: packages for name, packages in heavy.items() if packages} == {}


def test_commands_import_nothing_heavy():
    "At its top there are the standard library and fastcore only."
    import sys
    allowed = sys.stdlib_module_names | {'fastcore', '__future__'}
    for name in ('model_commands.py', 'commands.py'):
        assert set(top_imports(TEXTS[name])) <= allowed
