"""Runs commands in forks of one process that has imported everything: `python fork_server.py`, a request a line.

A request is JSON: `words`, `folder`, `out` and `err`, files or a terminal's name. The answers are the number of the
fork and, when it has ended, its exit code.
Nothing of a test's own process (its handlers, its filters of warnings) reaches a command.
"""
import fcntl
import json
import os
import sys
import termios
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import exit_code, in_fork


def load():
    "Import what commands import; not when a job of a command imports this module again."
    from importlib import import_module

    import mae_nb  # noqa: F401  first: it hides a warning of fastai's import
    for name in ('matplotlib.pyplot', 'fastai.vision.all', 'torch.utils.tensorboard', 'mae_nb.measure.bench',
                 'mae_nb.measure.plan', 'mae_nb.tasks.demo', 'mae_nb.tasks.replay', 'mae_nb.tasks.study',
                 'mae_nb.tasks.visualize', 'mae_nb.weights.convert', 'mae_nb.data.check', 'mae_nb.data.packing'):
        import_module(name)
    import torch
    torch.set_num_threads(1)


def answer(request: dict) -> int:
    "Run a command in a fork; its exit code, negative for a signal."
    pid = in_fork(partial(run, request))
    print(pid, flush=True)
    return exit_code(pid)


def run(request: dict) -> int:
    "In the fork: the command, with the streams that the interpreter would give it."
    from mae_nb import command_line, commands
    os.setsid()
    for number, file in ((1, request['out']), (2, request['err'])):
        opened = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        if os.isatty(opened):
            fcntl.ioctl(opened, termios.TIOCSCTTY, 0)
        os.dup2(opened, number)
    sys.stdout = os.fdopen(1, 'w', buffering=1 if os.isatty(1) else -1, closefd=False)
    sys.stderr = os.fdopen(2, 'w', buffering=1, closefd=False)
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
    os.chdir(request['folder'])
    name, *words = request['words']
    sys.argv = [name, *words]
    if name == 'python':   # code, to prepare something
        exec(words[0], dict(__name__='prepare'))
        return 0
    command_line.main(getattr(commands, name.replace('-', '_')).__wrapped__)
    return 0


if __name__ == '__main__':
    load()
    print('ready', flush=True)
    for line in sys.stdin:
        print(answer(json.loads(line)), flush=True)
