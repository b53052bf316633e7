"""The package as people install it: wheel and sdist, in an environment of their own, away from the checkout."""
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "The wheel and the sdist."
    out = tmp_path_factory.mktemp('dist')
    subprocess.run([sys.executable, '-m', 'build', '--outdir', out, ROOT], check=True, capture_output=True)
    return out

def install(package, where):
    "A fresh environment that borrows the heavy dependencies of this one, but not mae_nb; its folder of commands."
    venv.create(where, with_pip=True)
    site = next(where.glob('lib/python*/site-packages'))
    (site/'borrowed.pth').write_text(sysconfig.get_path('purelib') + '\n')
    subprocess.run([where/'bin'/'python', '-m', 'pip', 'install', '-q', '--no-deps', '--force-reinstall', package], check=True, capture_output=True)
    return where/'bin'

@pytest.mark.parametrize('kind', ['*.whl', '*.tar.gz'])
def test_pretrains_with_the_data_it_carries(built, tmp_path, kind):
    bin = install(next(built.glob(kind)), tmp_path/'venv')
    found = subprocess.run([bin/'python', '-c', 'import mae_nb; print(mae_nb.__file__)'], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert found.startswith(str(tmp_path)), found
    done = subprocess.run([bin/'mae-pretrain', 'fashion', '--max-steps', '3', '--out', 'run'], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path/'run'/'model.safetensors').is_file(), done.stderr

def test_the_wheel_holds_data_licence_and_script(built):
    names = zipfile.ZipFile(next(built.glob('*.whl'))).namelist()
    for f in ('fashion.npz', 'LICENSE.fashion-mnist', 'make_fashion.py'): assert f'mae_nb/data_files/{f}' in names
    assert (ROOT/'mae_nb'/'data_files'/'fashion.npz').stat().st_size < 6e6

@pytest.mark.slow
def test_the_demo_runs_from_the_wheel(built, tmp_path):
    bin = install(next(built.glob('*.whl')), tmp_path/'venv')
    done = subprocess.run([bin/'mae-demo', '--epochs', '3', '--out', 'demo'], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and 'learned encoder fine-tuned on 500 labels' in done.stdout, done.stderr
