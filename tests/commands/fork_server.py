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
from support import exit_code, in_fork, load_libraries


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
    load_libraries()   # not at the top: a job of a command may import this module again
    import torch
    torch.set_num_threads(1)
    print('ready', flush=True)
    for line in sys.stdin:
        print(answer(json.loads(line)), flush=True)
