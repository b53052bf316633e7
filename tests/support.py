"""What tests share: commands run as a terminal runs them, and forks of this process."""
import gc
import os
import re
import sys
import traceback
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
# what commands import, some of it when they run: an optimizer imports torch._dynamo, a resumed run state_dict
LIBRARIES = ('mae_nb', 'matplotlib.pyplot', 'torch._dynamo', 'torch.distributed.checkpoint.state_dict',
             'torch.utils.tensorboard', 'mae_nb.data.check', 'mae_nb.data.packing', 'mae_nb.measure.bench',
             'mae_nb.measure.plan', 'mae_nb.tasks.demo', 'mae_nb.tasks.probes', 'mae_nb.tasks.replay',
             'mae_nb.tasks.study', 'mae_nb.weights.convert')   # mae_nb first: it hides a warning of fastai's import
SIGN = re.compile(r' {3}(working( in \w+)?|loading libraries) for \d+ s')   # of life, on a busy machine


@dataclass
class Said:
    "What a command printed, its error stream, and its exit code."
    out: str
    err: str
    code: int

    @property
    def line(self):
        "The one line on the error stream; more than one is a failure."
        lines = [x for x in self.err.splitlines() if x.strip() and not SIGN.fullmatch(x)]
        assert len(lines) == 1, self.err
        return lines[0]


@cache
def load_libraries():
    "Import once what every fork of this process that runs a command would import again."
    for name in LIBRARIES:
        import_module(name)


def redirect(file, descriptor):
    "Let a file descriptor of this process write to the end of a file."
    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)


def in_fork(child):
    "Call `child`, which returns an exit code, in a fork of this process that ends with it. Returns the fork's number."
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    code = 1
    gc.freeze()   # what the parent has left, such as a session with threads, is not for a fork to free
    try:
        code = child()
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def fork(func, out, err=None):
    "Run a function in a fork of this process; its output goes to files. Returns the number of the fork."
    def child():
        redirect(out, 1)
        redirect(err or out, 2)
        sys.stdout, sys.stderr = (os.fdopen(fd, 'w', closefd=False) for fd in (1, 2))
        func()
        return 0
    return in_fork(child)


def exit_code(pid):
    "How a fork ended; negative: the signal that ended it."
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def begin_command(folder, name, *words, before=None, **env):
    """Start a command in a fork, in a folder. Returns its number, and a function that waits for its result.

    `before` is called in the fork first."""
    load_libraries()
    from mae_nb import command_line, commands
    out, err = folder/'.out', folder/'.err'
    for file in (out, err):
        file.unlink(missing_ok=True)

    def run():
        os.chdir(folder)
        os.environ.update(env)
        sys.argv = [name, *map(str, words)]
        if before:
            before()
        command_line.main(getattr(commands, name.replace('-', '_')).__wrapped__)

    pid = fork(run, out, err)

    def result():
        code = exit_code(pid)
        return Said(out.read_text(), err.read_text(), code)

    return pid, result
