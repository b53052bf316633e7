"""One thread a worker, real development data, and commands run as a terminal runs them."""
import os

os.environ['OMP_NUM_THREADS'] = '1'

import subprocess  # noqa: E402
import sys  # noqa: E402
import traceback  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

torch.set_num_threads(1)
BIN = Path(sys.executable).parent

@dataclass
class Said:
    "What a command printed, complained of, and its exit code."
    out: str
    err: str
    code: int

    @property
    def line(self):
        "The one line on the error stream; more than one is a failure."
        lines = [x for x in self.err.splitlines() if x.strip()]
        assert len(lines) == 1, self.err
        return lines[0]

@pytest.fixture
def shared_data():
    "The development data beside the checkout, or a skip that says so."
    folder = Path(__file__).resolve().parents[2]/'shared'/'data'
    if not folder.is_dir(): pytest.skip('no development data beside the checkout (../shared/data)')
    return folder

@pytest.fixture
def terminal(tmp_path):
    "Run a console script in a process of its own, in a temporary folder."
    def run(*words, **env):
        done = subprocess.run([BIN/words[0], *map(str, words[1:])], capture_output=True, text=True, cwd=tmp_path, env=os.environ | env)
        return Said(done.stdout, done.stderr, done.returncode)
    return run

def fork(func, out, err=None):
    "Run a function in a fork of this process, which has imported everything; what it prints goes to files. The fork's number."
    sys.stdout.flush(); sys.stderr.flush()
    if pid := os.fork(): return pid
    code = 1
    try:
        for file, fd in ((out, 1), (err or out, 2)): os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)
        sys.stdout, sys.stderr = (os.fdopen(fd, 'w', closefd=False) for fd in (1, 2))
        func()
        code = 0
    except SystemExit as e: code = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException: traceback.print_exc()
    finally:
        sys.stdout.flush(); sys.stderr.flush()
        os._exit(code)

def exit_code(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])   # negative: the signal that has ended it

def begin_command(folder, name, *words, before=None, **env):
    "Begin a command in a fork, in a folder: its number, and a function that waits for what it said. `before` is called in the fork first."
    from fastcore.script import _run_cli

    from mae_nb import cli
    out, err = folder/'.out', folder/'.err'
    for f in (out, err): f.unlink(missing_ok=True)
    def run():
        os.chdir(folder); os.environ.update(env)
        sys.argv = [name, *map(str, words)]
        if before: before()
        _run_cli(getattr(cli, name.replace('-', '_')).__wrapped__, False)
    pid = fork(run, out, err)
    def said():
        code = exit_code(pid)
        return Said(out.read_text(), err.read_text(), code)
    return pid, said

@pytest.fixture
def forked(tmp_path):
    "Run a command in a fork of this process: the same parser and exit codes, without the wait."
    return lambda *words, **env: begin_command(tmp_path, *words, **env)[1]()

@pytest.fixture
def photos(tmp_path):
    "A hundred and twenty small pictures in two classes."
    for i in range(120):
        folder = tmp_path/'photos'/('odd' if i % 2 else 'even'); folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 255, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder/f'{i:03}.png')
    return tmp_path/'photos'
