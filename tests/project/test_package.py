"""The package as people install it: wheel and sdist, in an environment of their own, away from the checkout."""
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest
from support import ROOT

from mae_nb.weights.published import SHIPPED

CLEAN = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "The wheel and the sdist."
    out = tmp_path_factory.mktemp('dist')
    subprocess.run([sys.executable, '-m', 'build', '--outdir', out, ROOT], check=True, capture_output=True)
    return out


def install(package, where):
    "A fresh environment with this one's heavy dependencies, but not its mae_nb; its folder of commands."
    venv.create(where)   # this one's pip installs into it
    site = next(where.glob('lib/python*/site-packages'))
    (site/'borrowed.pth').write_text(sysconfig.get_path('purelib') + '\n')
    words = [sys.executable, '-m', 'pip', '--python', where/'bin'/'python', 'install', '-q', '--no-deps', package]
    subprocess.run([*words, '--force-reinstall'], check=True, capture_output=True, env=CLEAN)
    return where/'bin'


def run(words, folder):
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, env=CLEAN)


@pytest.mark.parametrize('kind', ['*.whl', pytest.param('*.tar.gz', marks=pytest.mark.slow)])
def test_pretrains_with_the_data_it_carries(built, tmp_path, kind):
    "`python -m build` makes the wheel from the sdist, so that the wheel lacks what the sdist lacks."
    commands = install(next(built.glob(kind)), tmp_path/'venv')
    place = run([commands/'python', '-c', 'import mae_nb; print(mae_nb.__file__)'], tmp_path).stdout
    assert place.startswith(str(tmp_path)), place
    done = run([commands/'mae-pretrain', 'fashion', '--max-steps', '3', '--out', 'run'], tmp_path)
    assert done.returncode == 0 and (tmp_path/'run'/'model.safetensors').is_file(), done.stderr


def test_the_wheel_holds_every_module_data_licence_and_script(built):
    names = set(zipfile.ZipFile(next(built.glob('*.whl'))).namelist())
    modules = {str(f.relative_to(ROOT)) for f in (ROOT/'mae_nb').rglob('*.py')}
    assert modules <= names
    files = ['fashion.npz', 'LICENSE.fashion-mnist', 'make_fashion.py', 'make_model.py', 'unpack_fashion.py']
    for model in SHIPPED:
        files += [f'{model}.safetensors', f'{model}.md']
    assert {f'mae_nb/data_files/{file}' for file in files} <= names
    assert (ROOT/'mae_nb'/'data_files'/'fashion.npz').stat().st_size < 6e6


@pytest.mark.slow
def test_the_demo_runs_from_the_wheel(built, tmp_path):
    commands = install(next(built.glob('*.whl')), tmp_path/'venv')
    done = run([commands/'mae-demo', '--epochs', '3', '--out', 'demo'], tmp_path)
    assert done.returncode == 0 and 'finetuned' in done.stdout, done.stderr
