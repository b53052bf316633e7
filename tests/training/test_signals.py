"""Signals to the whole process group, a worker that is stuck, and an output that nobody reads."""
import os
import re
import signal
import subprocess
import time
from contextlib import suppress

import pytest
from support import BIN
from tiny_runs import WORDS  # noqa: F401

TINY = ('--model', 'mae_vit_nano_patch4_32', '--set', 'amp=False', '--set', 'warmup_epochs=0', '--bs', '10',
        '--epochs', '10000')

@pytest.fixture
def started(photos, tmp_path):
    "A pretraining with two workers, in a process group of its own; killed at the end."
    log = tmp_path/'log'
    with open(log, 'w') as f:
        command = [BIN/'mae-pretrain', 'photos', *TINY, '--num-workers', '2', '--out', 'run']
        run = subprocess.Popen(command, cwd=tmp_path, stdout=f, stderr=f, start_new_session=True)
    end, metrics = time.time() + 300, tmp_path/'run'/'metrics.csv'
    try:
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 2:
            assert run.poll() is None and time.time() < end, log.read_text()
            time.sleep(.05)
        yield run, log
    finally:
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()

def workers_of(pid):
    listed = subprocess.run(['ps', '-o', 'pid=', '--ppid', str(pid)], capture_output=True, text=True)
    return [int(p) for p in listed.stdout.split()]

def steps(folder): return sorted(int(f.name.split('-')[1]) for f in (folder/'checkpoints').glob('*.safetensors'))

@pytest.mark.parametrize('signum, code', [
    (signal.SIGTERM, 143),
    pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),   # as in tests/commands/test_commands.py
])
def test_a_signal_to_the_process_group_saves_the_step(started, tmp_path, signum, code):
    run, log = started
    os.killpg(run.pid, signum)
    assert run.wait(30) == code, log.read_text()
    text = log.read_text()
    assert 'finishing the step and saving' in text and 'Traceback' not in text and 'killed by signal' not in text, text
    assert 'resume it with --resume run' in text

def test_a_stopped_worker_is_named_and_not_waited_for(started, tmp_path):
    run, log = started
    worker = workers_of(run.pid)[0]
    os.kill(worker, signal.SIGSTOP)
    time.sleep(1)
    os.kill(run.pid, signal.SIGTERM)
    assert run.wait(120) == 143, log.read_text()   # 10 seconds on a machine that has nothing else to do
    text = log.read_text()
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
