"""Several processes that train together, forked from this one, which has imported everything."""
import os
import signal
import socket
import sys
import time
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from support import in_fork

from mae_nb import command_line, commands
from mae_nb.base.processes import process_group
from mae_nb.training.runs import read_metrics

SLOW = 'torch.distributed.device_mesh', 'torch.distributed.fsdp', 'torch.distributed.tensor'   # every fork needs them


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

def starter(name, *words):
    "A function that runs a command, for `spread`."
    def start():
        sys.argv = [name, *words]
        command_line.main(getattr(commands, name.replace('-', '_')).__wrapped__)
    return start

def spread(n, func, folder, seconds=100):
    "Run `func` in `n` processes that train together: the result, the output and the exit code of each."
    for name in SLOW:
        import_module(name)
    folder.mkdir(exist_ok=True, parents=True)
    address = dict(WORLD_SIZE=n, LOCAL_WORLD_SIZE=n, MASTER_ADDR='127.0.0.1', MASTER_PORT=free_port())
    sys.stdout.flush()
    sys.stderr.flush()
    pids = [_fork(func, folder/f'{i}', dict(address, RANK=i, LOCAL_RANK=i)) for i in range(n)]
    codes = _wait(pids, seconds)
    load = lambda f: torch.load(f, weights_only=False) if f.exists() else None
    return [SimpleNamespace(result=load(folder/f'{i}.pt'), output=(folder/f'{i}.txt').read_text(), code=codes.get(pid))
            for i, pid in enumerate(pids)]

def _wait(pids, seconds):
    "Exit codes by process, without those that have to be killed when the time is over."
    end, codes = time.time() + seconds, {}
    while len(codes) < len(pids) and time.time() < end:
        for pid in set(pids) - set(codes):
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        time.sleep(.02)
    for pid in set(pids) - set(codes):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return codes

def _fork(func, file, env):
    "Run `func` as one of several processes; its result and output go to files."
    def child():
        torch.set_num_threads(1)   # makes the thread pool anew, which later two threads might do at once
        fd = os.open(f'{file}.txt', os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        sys.stdout, sys.stderr = os.fdopen(1, 'w'), os.fdopen(2, 'w')
        os.environ.update({k: str(v) for k, v in env.items()})
        with process_group():
            torch.save(func(), f'{file}.pt')
        return 0
    return in_fork(child)

def results(runs):
    "The results of processes that have all ended well."
    assert [r.code for r in runs] == [0] * len(runs), '\n'.join(r.output for r in runs)
    return [r.result for r in runs]

def assert_same_metrics(a, b, rel=1e-4):
    a, b = read_metrics(a), read_metrics(b)
    assert a.keys() == b.keys() and all(a[k] == pytest.approx(b[k], rel=rel, nan_ok=True) for k in a), (a, b)
