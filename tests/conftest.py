"""One thread a worker, real development data, and commands run as a terminal runs them."""
import os

os.environ['OMP_NUM_THREADS'] = '1'

import subprocess  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from support import BIN, ROOT, Said, begin_command  # noqa: E402

torch.set_num_threads(1)
# autograd's engine begins without a device's threads; begun after torch.compile it has some, and no fork can train
torch.ones(1, requires_grad=True).backward()


# Tests of a file run in one worker (`--dist loadfile`): the longest first, as one that begins last leaves a core idle.
LONGEST = ('kernel', 'first_hour', 'distributed', 'torchrun', 'package', 'site', 'decode', 'decode_commands', 'study',
           'resume', 'resume_commands', 'familiar', 'exported_files', 'variants', 'export', 'commands', 'channels',
           'signals', 'rivals', 'hub', 'demo', 'exercises', 'speed', 'parity', 'training', 'saves', 'snapshots')


def pytest_collection_modifyitems(items):
    order = {f'test_{name}.py': i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture
def shared_data():
    "The development data beside the checkout, or a skip that says so."
    folder = ROOT.parent/'shared'/'data'
    if not folder.is_dir():
        pytest.skip('no development data beside the checkout (../shared/data)')
    return folder


@pytest.fixture
def terminal(tmp_path):
    "Run a console script in a process of its own, in a temporary folder."
    def run(*words, **env):
        command = [BIN/words[0], *map(str, words[1:])]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | env)
        return Said(done.stdout, done.stderr, done.returncode)
    return run


@pytest.fixture
def forked(tmp_path):
    "Run a command in a fork of this process: the same parser and exit codes, without the wait."
    def run(*words, **env):
        _, result = begin_command(tmp_path, *words, **env)
        return result()
    return run


@pytest.fixture
def photos(tmp_path):
    "A hundred and twenty small pictures in two classes."
    for i in range(120):
        folder = tmp_path/'photos'/('odd' if i % 2 else 'even')
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 255, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder/f'{i:03}.png')
    return tmp_path/'photos'
