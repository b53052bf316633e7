"""What tests share: commands run as a terminal runs them, and forks of this process."""
import gc
import os
import re
import sys
import traceback
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
# what commands import, some of it when they run: an optimizer imports torch._dynamo, RandAugment all of timm;
# mae_nb first: it hides a warning of fastai's import
LIBRARIES = ('mae_nb', 'matplotlib.pyplot', 'torch._dynamo', 'torch.distributed.checkpoint.state_dict',
             'torch.utils.flop_counter', 'torch.utils.tensorboard', 'torchvision.transforms.v2', 'timm.data',
             'timm.optim', 'scipy.stats', 'sklearn.cluster', 'sklearn.decomposition', 'mae_nb.data.check',
             'mae_nb.data.packing',
             'mae_nb.measure.bench', 'mae_nb.measure.plan', 'mae_nb.tasks.demo', 'mae_nb.tasks.embed',
             'mae_nb.tasks.evaluate', 'mae_nb.tasks.neighbours', 'mae_nb.tasks.pixels', 'mae_nb.tasks.probes',
             'mae_nb.tasks.replay', 'mae_nb.tasks.segment', 'mae_nb.tasks.study', 'mae_nb.weights.export')
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
    with suppress(ImportError):   # of an extra
        import_module('pyarrow.parquet')
    from mae_nb.data.formats import readable_formats
    readable_formats()   # imports PIL's readers, and is remembered


def redirect(file, descriptor):
    "Let a file descriptor of this process write to the end of a file."
    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)


def in_fork(child):
    "Call `child`, which returns an exit code, in a fork of this process that ends with it. Returns the fork's number."
    load_libraries()
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


def leave_pictures_blank():
    "Write pictures of the right size with nothing on them: to draw them takes a third of a short training."
    from matplotlib.figure import Figure
    from PIL import Image
    draw = Figure.savefig

    def save(figure, file, format='png', dpi=100, **options):
        if format != 'png':
            return draw(figure, file, format=format, dpi=dpi, **options)
        Image.new('RGB', [round(inches * dpi) for inches in figure.get_size_inches()], 'white').save(file, format)
    Figure.savefig = save


def fork(func, out, err=None, pictures=False):
    """Run a function in a fork of this process; its output goes to files. Returns the number of the fork.

    Its `pictures` are blank unless a test looks at them: notebooks, and every line of test_first_hour, draw theirs."""
    def child():
        redirect(out, 1)
        redirect(err or out, 2)
        sys.stdout, sys.stderr = (os.fdopen(fd, 'w', closefd=False) for fd in (1, 2))
        if not pictures:
            leave_pictures_blank()
        func()
        return 0
    return in_fork(child)


def exit_code(pid):
    "How a fork ended; negative: the signal that ended it."
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def begin_command(folder, name, *words, before=None, pictures=False, **env):
    """Start a command in a fork, in a folder. Returns its number, and a function that waits for its result.

    `before` is called in the fork first; see `fork` for `pictures`."""
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

    pid = fork(run, out, err, pictures)

    def result():
        code = exit_code(pid)
        return Said(out.read_text(), err.read_text(), code)

    return pid, result
