"""A save that is interrupted, at each call, each byte and each system call, harms no older checkpoint."""
import errno
import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import exit_code, fork
from tiny_runs import call, numbered

from mae_nb.training import checkpoints, state
from mae_nb.training.checkpoints import Checkpoints
from mae_nb.training.state import newest_checkpoint
from mae_nb.weights.reading import checkpoints_in

resource = pytest.importorskip('resource', reason='kills forked processes, which Windows lacks')

def write(run, step, before=lambda: None, **kwargs):
    "Write one more checkpoint of a run, in a fork: exit code 3 for an `OSError`."
    saver = Checkpoints(run, **kwargs)
    before()
    try:
        saver.write(step, dict(w=torch.full((500,), float(step))), dict(run=dict(fit=-1, step=step)))
    except OSError:
        os._exit(3)

def check_newest(folder, old):
    "A whole checkpoint is found, and no older one is harmed: its step."
    _, tensors, config = newest_checkpoint(folder)
    step = config['run']['step']
    assert step in (3, 4) and torch.equal(tensors['w'], torch.full((500,), float(step)))
    for file, content in old.items():
        pruned = step == 4 and '000001-' in file.name and not file.exists()
        assert pruned or file.read_bytes() == content
    return step

def start_again(run):
    "The next start removes what an interrupted save has left."
    saver = Checkpoints(run)
    saver.before_fit()
    assert not list((run/'checkpoints').glob('*.part'))

def test_each_fit_waits_once_before_its_validation_has_workers(tmp_path):
    "An error in an earlier fit ends the workers: the next fit forks them anew."
    saver = Checkpoints(tmp_path)
    saver.learn, waits = SimpleNamespace(unsettled=None), []
    saver.wait = lambda: waits.append(1)
    for fit in (1, 2):
        saver.before_fit()
        for _ in range(3):
            saver.before_validate()
        assert len(waits) == fit

def interrupted_save(tmp_path, fault):
    "Save a fourth checkpoint of which three are kept, with a fault: exit code, and the step of the newest one."
    run = tmp_path/'run'
    numbered(run/'checkpoints', 1, 2, 3)
    old = {f: f.read_bytes() for f in (run/'checkpoints').iterdir()}
    code = exit_code(fork(lambda: write(run, 4, fault, keep=3), tmp_path/'log'))
    step = check_newest(run/'checkpoints', old)
    start_again(run)
    return code, step

def fails(owner, name, n, number):
    def fail(): raise OSError(number, os.strerror(number))
    return call(owner, name, n, do=fail)

CALLS = [(state, 'write_tensors', 1), (state.Snapshot, 'read', 1), (os, 'open', 1), (os, 'fsync', 1), (os, 'close', 1),
         (state.safetensors, 'safe_open', 1), (state, 'sha256', 1), (os, 'replace', 1), (os, 'open', 2),
         (os, 'fsync', 2), (os, 'close', 2), (Path, 'unlink', 1), (checkpoints, 'prune', 1), (Path, 'unlink', 2)]

@pytest.mark.parametrize('owner, name, n', CALLS, ids=[f'{name} {n}' for _, name, n in CALLS])
def test_a_save_interrupted_at_each_call(owner, name, n, tmp_path):
    faults = ((fails(owner, name, n, errno.ENOSPC), 3), (fails(owner, name, n, errno.EIO), 3),
              (call(owner, name, n), -signal.SIGKILL), (call(owner, name, n, after=True), -signal.SIGKILL))
    for i, (fault, expected) in enumerate(faults):
        place = tmp_path/str(i)
        place.mkdir()
        code, _ = interrupted_save(place, fault)
        assert code == expected, (place/'log').read_text()

def limit(size, kill):
    "No file may grow beyond a size: writing there fails, or kills."
    def fault():
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if kill else signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return fault

@pytest.mark.parametrize('step', [499, pytest.param(23, marks=pytest.mark.slow)])
def test_a_save_interrupted_at_each_byte(step, tmp_path):
    numbered(tmp_path, 4)
    size = next(tmp_path.glob('step-*')).stat().st_size
    for k in [*range(0, size, step), size - 1, size]:
        for kill in (False, True):
            place = tmp_path/f'{k}-{kill}'
            place.mkdir()
            result = interrupted_save(place, limit(k, kill))
            cut = (-signal.SIGXFSZ if kill else 3), 3
            assert result == ((0, 4) if k >= size else cut), (k, kill)

# ---- strace --------------------------------------------------------------------------------------------------------

def traced(place, *inject):
    "A save under strace, which injects a fault: exit code, and the step of the newest checkpoint."
    run = place/'run'
    numbered(run/'checkpoints', 1, 2, 3)
    old = {f: f.read_bytes() for f in (run/'checkpoints').iterdir()}
    here, there = os.pipe()
    pid = fork(lambda: write(run, 4, lambda: os.read(here, 1), keep=3), place/'log')
    command = ['strace', '-f', '-q', '-p', str(pid), '-o', place/'trace', *inject]
    strace = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    attached = lambda: 'TracerPid:\t0' not in Path(f'/proc/{pid}/status').read_text()
    end = time.time() + 20
    while not attached() and time.time() < end and strace.poll() is None:
        time.sleep(.01)
    refused = strace.poll() is not None
    if not refused:
        os.write(there, b'x')
    os.close(there)
    os.close(here)
    code = exit_code(pid)
    strace.wait()
    if refused:
        pytest.skip('strace may not trace here')
    step = check_newest(run/'checkpoints', old)
    start_again(run)
    return code, step

CALLED = ('open', 'openat', 'write', 'pwrite64', 'writev', 'ftruncate', 'fallocate', 'fsync', 'rename', 'unlink',
          'chmod', 'fchmodat', 'close')

@pytest.mark.slow
def test_a_save_interrupted_at_each_system_call(tmp_path):
    "strace makes each one fail, or kills the process there."
    if not shutil.which('strace'):
        pytest.skip('needs strace')
    assert traced(tmp_path/'all') == (0, 4)
    counts = Counter(re.findall(r'^\d+ +(\w+)\(', (tmp_path/'all'/'trace').read_text(), re.MULTILINE))
    assert counts['fsync'] and counts['rename'] and counts['write']
    interrupted = 0
    for name in CALLED:
        for n in range(1, counts[name] + 1):
            for fault in ('error=EIO', 'error=ENOSPC', 'signal=KILL'):
                place = tmp_path/f'{name}-{n}-{fault}'
                code, step = traced(place, '-e', f'inject={name}:{fault}:when={n}')
                expected = (-signal.SIGKILL,) if 'KILL' in fault else (0, 3)
                assert code in expected, (name, n, fault, code, (place/'log').read_text())
                assert code != 0 or step == 4
                interrupted += 1
    print(f'{interrupted} interrupted system calls')

# ---- pruning -------------------------------------------------------------------------------------------------------

def test_broken_checkpoints_are_not_kept_for_whole_ones(tmp_path):
    folder = tmp_path/'checkpoints'
    numbered(folder, 2, 4, 6)
    for file in checkpoints_in(folder)[:2]:
        file.write_bytes(b'')
    write(tmp_path, 3, keep=1)   # the run resumed from 2
    assert newest_checkpoint(folder)[2]['run']['step'] == 3
