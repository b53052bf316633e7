"""Signals to the whole process group, a worker that is stuck, and an output that nobody reads."""
import os
import re
import signal
import subprocess
import time
from contextlib import suppress
from functools import cache

import pytest
from support import BIN, begin_command
from tiny_runs import WORDS  # noqa: F401

TINY = ('--model', 'mae_vit_nano_patch4_32', '--set', 'amp=False', '--set', 'warmup_epochs=0', '--bs', '10',
        '--epochs', '10000')

@pytest.fixture
def started(photos, tmp_path):
    """A pretraining with two workers, in a fork with a process group of its own: its number, and what waits for its
    result; killed at the end."""
    words = 'photos', *TINY, '--num-workers', '2', '--out', 'run'
    pid, result = begin_command(tmp_path, 'mae-pretrain', *words, before=begin_group)
    metrics, result = tmp_path/'run'/'metrics.csv', cache(result)
    try:
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 2:
            assert os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None, result()
            time.sleep(.05)
        yield pid, result
    finally:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        result()

def begin_group():
    "In the fork: as a shell starts a job; with a deadline for all of it."
    os.setsid()
    signal.alarm(300)

def workers_of(pid):
    listed = subprocess.run(['ps', '-o', 'pid=', '--ppid', str(pid)], capture_output=True, text=True)
    return [int(p) for p in listed.stdout.split()]

def steps(folder): return sorted(int(f.name.split('-')[1]) for f in (folder/'checkpoints').glob('*.safetensors'))

@pytest.mark.parametrize('signum, code', [
    (signal.SIGTERM, 143),
    pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),   # as in tests/commands/test_commands.py
])
def test_a_signal_to_the_process_group_saves_the_step(started, signum, code):
    pid, result = started
    os.killpg(pid, signum)
    got = result()
    text = got.out + got.err
    assert got.code == code, got
    assert 'finishing the step and saving' in text and 'Traceback' not in text and 'killed by signal' not in text, text
    assert 'resume it with --resume run' in text

def test_a_stopped_worker_is_named_and_not_waited_for(started):
    pid, result = started
    worker = workers_of(pid)[0]
    os.kill(worker, signal.SIGSTOP)
    time.sleep(1)
    os.kill(pid, signal.SIGTERM)
    got = result()   # after 10 seconds on a machine that has nothing else to do
    text = got.out + got.err
    assert got.code == 143, got
    named = rf"ends without this step, which waits for the loader's worker \d \(process {worker}, stopped"
    assert re.search(named, text), text
    assert 'Traceback' not in text
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)

def test_an_output_that_nobody_reads_ends_no_run(photos, tmp_path):
    command = [BIN/'mae-pretrain', 'photos', *TINY[:-1], '1', '--num-workers', '0', '--out', 'run']
    run = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run.stdout.readline()
    run.stdout.close()
    assert run.wait(120) == 0, run.stderr.read()
    assert (tmp_path/'run'/'model.safetensors').exists()

def test_a_name_that_is_too_long_is_one_line(forked):
    got = forked('mae-pretrain', 'fashion', '--max-steps', '1', '--bs', '20', '--out', 'x' * 300)
    assert got.code in (1, 2) and 'name too long' in got.line
