"""What the README shows does what it says."""
import re
from importlib.metadata import entry_points

from support import ROOT

from mae_nb.data.datasets import SOURCES, load_source
from mae_nb.training.presets import RECIPES
from mae_nb.training.recipes import override

README = (ROOT/'README.md').read_text()


def test_the_python_example_runs(monkeypatch):
    "The block as it is, with a shorter recipe and a tenth of the images."
    code, = re.findall(r'```python\n(.*?)```', README, re.S)
    shorter = override(RECIPES['pretrain_fashion'], dict(epochs=1, warmup_epochs=0, batch_size=100))
    monkeypatch.setitem(RECIPES, 'pretrain_fashion', shorter)
    few = tuple(images.take(range(len(images) // 10)) for images in load_source('fashion'))
    monkeypatch.setitem(SOURCES, 'fashion', lambda: few)
    names = {}
    exec(code, names)
    assert len(names['learn'].recorder.losses) == 10


def test_every_command_it_names_exists():
    installed = {e.name for e in entry_points(group='console_scripts') if e.value.startswith('mae_nb.')}
    named = set(re.findall(r'(?:^|`|&& )(mae-[a-z]+)', README, re.M))
    assert {'mae-demo', 'mae-convert'} <= named <= installed
