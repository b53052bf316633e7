"""What the README shows does what it says."""
import re
from pathlib import Path

from mae_nb.training.presets import RECIPES
from mae_nb.training.recipes import override

README = (Path(__file__).resolve().parents[2]/'README.md').read_text()

def test_the_python_example_runs(monkeypatch):
    "The block as it stands, with a shorter recipe."
    code, = re.findall(r'```python\n(.*?)```', README, re.S)
    monkeypatch.setitem(RECIPES, 'pretrain_fashion', override(RECIPES['pretrain_fashion'], dict(epochs=1, warmup_epochs=0, batch_size=1000)))
    found = {}
    exec(code, found)
    assert len(found['learn'].recorder.losses) == 10

def test_every_command_it_names_is_there():
    from importlib.metadata import entry_points
    there = {e.name for e in entry_points(group='console_scripts') if e.value.startswith('mae_nb.')}
    named = set(re.findall(r'(?:^|`|&& )(mae-[a-z]+)', README, re.M))
    assert {'mae-demo', 'mae-convert'} <= named <= there
