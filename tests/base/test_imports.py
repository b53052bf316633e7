"""What every command needs is light, and modules import from above only."""
import subprocess
import sys

import pytest

HEAVY = 'torch', 'numpy', 'fastai', 'timm', 'torchvision', 'matplotlib', 'PIL'

def imported(module):
    "The heavy packages that a new Python has loaded after importing a module."
    code = f'import sys, {module}; print(*(name for name in {HEAVY} if name in sys.modules))'
    return subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True).stdout.split()

@pytest.mark.parametrize('name', ['errors', 'names', 'files', 'settings'])
def test_the_base_of_every_command_is_light(name):
    assert imported(f'mae_nb.base.{name}') == []

@pytest.mark.parametrize('name', ['keyed', 'processes', 'devices'])
def test_the_rest_of_the_base_needs_torch_alone(name):
    assert set(imported(f'mae_nb.base.{name}')) <= {'torch', 'numpy'}   # torch imports numpy where it is installed
