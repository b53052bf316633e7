"""The names that users star-import and the commands' flags are frozen: a change is a decision.

After a deliberate change, `python tests/commands/test_public_names.py` writes the list anew.
"""
import json
import subprocess
import sys
from importlib import import_module
from inspect import signature
from pathlib import Path

import tomllib
from fastcore.docments import docments

ROOT = Path(__file__).resolve().parents[2]
LIST = Path(__file__).with_name('public_names.json')
HEAVY = 'torch', 'fastai', 'numpy', 'matplotlib', 'sklearn', 'timm', 'torchvision'

def scripts() -> dict:
    "Each command and its function's name."
    project = tomllib.loads((ROOT/'pyproject.toml').read_text())['project']
    return {name: entry.partition(':')[2] for name, entry in project['scripts'].items()}

def flags(function:str) -> dict:
    "A command's parameters with their defaults, in order."
    parameters = signature(getattr(import_module('mae_nb.commands'), function)).parameters.values()
    return {p.name: None if p.default is p.empty else repr(p.default) for p in parameters}

def current() -> dict:
    "What the package offers now."
    names = import_module('mae_nb.all').__all__
    return dict(names=sorted(names), commands={name: flags(function) for name, function in sorted(scripts().items())})

def test_the_public_names_and_the_commands_are_these():
    assert current() == json.loads(LIST.read_text())

def test_no_public_name_replaces_one_of_fastai_s():
    names = vars(import_module('fastai.vision.all'))
    assert not [name for name in current()['names'] if name in names]

def test_every_public_name_exists_once():
    names, every = current()['names'], import_module('mae_nb.all')
    assert len(names) == len({*names}) and set(names) <= {*dir(every)}
    for name in names:
        assert getattr(every, name) is not None, name

def test_every_flag_has_help():
    for name, function in scripts().items():
        helps = docments(getattr(import_module('mae_nb.commands'), function))
        assert all(helps[flag] for flag in flags(function)), name

def test_commands_and_package_import_nothing_heavy():
    code = f'import sys, mae_nb.commands; sys.exit(bool({{*sys.modules}} & {{*{HEAVY!r}}}))'
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0

if __name__ == '__main__':
    LIST.write_text(json.dumps(current(), indent=1) + '\n')
