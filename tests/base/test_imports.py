"""What every command needs is light, and modules import from above only."""
import subprocess
import sys

HEAVY = 'torch', 'numpy', 'fastai', 'timm', 'torchvision', 'matplotlib', 'PIL'

def imported(*modules):
    "The heavy packages that a new Python has loaded after importing modules of base."
    names = ', '.join(f'mae_nb.base.{module}' for module in modules)
    code = f'import sys, {names}; print(*(name for name in {HEAVY} if name in sys.modules))'
    return subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True).stdout.split()

def test_the_base_of_every_command_is_light():
    assert imported('errors', 'names', 'files', 'settings') == []

def test_the_rest_of_the_base_needs_torch_alone():
    used = imported('keyed', 'processes', 'devices')   # torch imports numpy where it is installed
    assert set(used) <= {'torch', 'numpy'}
