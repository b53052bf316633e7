"""Commands that are interrupted by signals or a full disk resume exactly; a run resumes only as the run that it is."""
import ctypes
import errno
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from support import begin_command, exit_code, fork
from tiny_runs import WORDS, check_same, few, run_command, signals, step_in_name, steps_of

from mae_nb.training.state import newest_checkpoint, read_checkpoint
from mae_nb.weights.reading import checkpoints_in

pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='kills forked processes, which Windows lacks')
slow = pytest.mark.slow

# ---- signals -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('signum, code', [
    (signal.SIGTERM, 143),
    pytest.param(signal.SIGINT, 130, marks=slow),
    pytest.param(signal.SIGUSR1, 138, marks=slow),
])
def test_a_signal_finishes_the_step_and_saves_it(pretrain, undisturbed, tmp_path, signum, code):
    whole, steps = undisturbed
    # the signal comes while the second step's gradients add up
    got, done = pretrain('a', *WORDS, '--out', 'run', before=[signals(7, signum)])
    assert got.code == code and got.line.endswith('what was done so far is in run; resume it with --resume run'), got
    assert f'{signum.name}: finishing the step' in got.out
    assert done == steps[:2]
    assert newest_checkpoint(tmp_path/'run'/'checkpoints')[2]['run']['step'] == steps[1] + 1
    got, rest = pretrain('b', '--resume', 'run')
    assert got.code == 0 and done + rest == steps and 'resumes at epoch 0, batch 8 of 22' in got.out, got
    check_same(tmp_path/'run', whole)

@pytest.mark.parametrize('signum, code', [
    (signal.SIGTERM, -signal.SIGTERM),
    (signal.SIGINT, 130),
    pytest.param(signal.SIGUSR1, -signal.SIGUSR1, marks=slow),
])
def test_a_second_signal_ends_at_once(pretrain, tmp_path, signum, code):
    got, done = pretrain('a', *WORDS, '--out', 'run', before=[signals(7, signum, signum)])
    assert got.code == code and len(done) == 1, got
    assert not checkpoints_in(tmp_path/'run'/'checkpoints')
    if code == 130:
        assert got.line == 'mae-pretrain: interrupted; what was done so far is in run'

@slow
@pytest.mark.parametrize('signum', [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize('delay', [0., .3, .8])
def test_a_signal_from_outside_at_any_time(pretrain, undisturbed, tmp_path, signum, delay):
    log = tmp_path/'a.steps'
    pid, result = begin_command(tmp_path, 'mae-pretrain', *WORDS, '--out', 'run', before=few(log))
    end = time.time() + 60
    while not steps_of(log) and time.time() < end:
        time.sleep(.01)
    time.sleep(delay)
    os.kill(pid, signum)
    got = result()
    assert got.code == 128 + signum and 'resume it with --resume run' in got.line, got
    got, rest = pretrain('b', '--resume', 'run')
    assert got.code == 0 and steps_of(log) + rest == undisturbed[1]
    check_same(tmp_path/'run', undisturbed[0])

def test_slurm_s_warning_puts_the_job_back_and_resume_auto_goes_on(pretrain, undisturbed, tmp_path):
    "The same line in a launch script, each time: begin, go on, find it finished."
    whole, steps = undisturbed
    fake = tmp_path/'bin'/'scontrol'
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/requeued\n')
    fake.chmod(0o755)
    env = dict(PATH=f'{fake.parent}{os.pathsep}{os.environ["PATH"]}', SLURM_JOB_ID='4711')
    words = (*WORDS, '--out', 'run', '--resume', 'auto')
    got, first = pretrain('a', *words, before=[signals(18, signal.SIGUSR1)], **env)
    assert got.code == 138 and (tmp_path/'requeued').read_text() == 'requeue 4711\n', got
    got, second = pretrain('b', *words, **env)
    assert got.code == 0 and first + second == steps, got
    check_same(tmp_path/'run', whole)
    weights = (tmp_path/'run'/'model.safetensors').read_bytes()
    got, third = pretrain('c', *words, **env)
    assert got.code == 0 and not third and 'finished already' in got.out
    assert (tmp_path/'run'/'model.safetensors').read_bytes() == weights
    assert (tmp_path/'requeued').read_text().count('requeue') == 1

# ---- the run that it is --------------------------------------------------------------------------------------------

@pytest.mark.parametrize('epochs', [1, pytest.param(2, marks=slow)])
def test_a_finished_probe_keeps_its_results(pretrain, undisturbed, tmp_path, epochs):
    words = ('linear', 'fashion', undisturbed[0], '--epochs', epochs, '--set', 'warmup_epochs=0', '--bs', '20',
             '--num-workers', '0', '--out', 'probe')
    pretrain('a', *words, name='mae-probe')
    results = (tmp_path/'probe'/'results.json').read_text()
    got, steps = pretrain('b', '--resume', 'probe', name='mae-probe')
    assert got.code == 0 and not steps and (tmp_path/'probe'/'results.json').read_text() == results, got

@pytest.mark.parametrize('name, kind', [
    ('mae-probe', ['linear']),
    pytest.param('mae-probe', ['attentive'], marks=slow),
    pytest.param('mae-probe', ['partial'], marks=slow),
    ('mae-finetune', []),
])
def test_a_run_resumes_without_the_weights_it_began_with(pretrain, undisturbed, tmp_path, name, kind):
    shutil.copytree(undisturbed[0], tmp_path/'weights')
    words = *kind, 'fashion', 'weights', '--epochs', '1', '--set', 'warmup_epochs=0', '--bs', '20', '--num-workers', '0'
    got, done = pretrain('a', *words, '--out', 'cut', name=name, before=[signals(3, signal.SIGTERM)])
    assert got.code == 143 and done, got
    shutil.rmtree(tmp_path/'weights')
    got, rest = pretrain('b', '--resume', 'cut', name=name)
    assert got.code == 0 and rest and rest[0] > done[-1], got
    shutil.copytree(undisturbed[0], tmp_path/'weights')
    pretrain('c', *words, '--out', 'whole', name=name)
    files = [(tmp_path/run/'model.safetensors').read_bytes() for run in ('cut', 'whole')]
    assert files[0] == files[1]

AUTO = '--out', 'run', '--resume', 'auto'
REFUSED = [
    ('mae-pretrain', (*WORDS, *AUTO, '--seed', '1'), 'run was started with seed = 0, and now seed = 1'),
    ('mae-pretrain', (*WORDS, *AUTO, '--max-steps', '3'),
     'run was started with max_steps = None, and now max_steps = 3'),
    ('mae-pretrain', (*WORDS, *AUTO, '--epochs', '3'), 'run was started with recipe = '),
    ('mae-pretrain', ('--resume', 'run', '--epochs', '3'), '--epochs has no effect with --resume run'),
    ('mae-pretrain', ('fashion', '--resume', 'run'), '--data has no effect with --resume run'),
    ('mae-pretrain', ('--resume', 'run', '--out', 'other'), '--out has no effect with --resume run'),
    ('mae-pretrain', ('--resume', 'nowhere'), 'nowhere is no run folder'),
    ('mae-pretrain', (*WORDS, '--resume', 'auto'), '--resume auto needs --out'),
    ('mae-pretrain', (*WORDS, '--out', 'run'), 'run exists already and is not empty'),
    ('mae-finetune', ('--resume', 'run'), 'run was made by mae-pretrain: resume it with that command'),
    ('mae-probe', ('linear', 'fashion', 'run', '--num-workers', '0', *AUTO),
     'run was made by mae-pretrain: resume it with that command'),
]

def test_a_run_goes_on_as_the_run_it_is(pretrain, undisturbed, tmp_path):
    "Another config, command or flag: one line that names it, and the folder is left alone."
    run = tmp_path/'run'
    shutil.copytree(undisturbed[0], run)
    contents = lambda: {f: f.read_bytes() for f in run.rglob('*') if f.is_file()}
    before = contents()
    for name, words, message in REFUSED:
        got, steps = pretrain('a', *words, name=name)
        assert got.code == 2 and message in got.line and not steps, (words, got)
    assert contents() == before

# ---- a full disk ---------------------------------------------------------------------------------------------------

REMOUNT, NEW_USER, NEW_MOUNTS = 32, 0x10000000, 0x20000   # MS_REMOUNT, CLONE_NEWUSER, CLONE_NEWNS

def small_disk(place, size, flags=0):
    "Mount a small disk, or return why there can be none."
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b'tmpfs', str(place).encode(), b'tmpfs', flags, f'size={size}'.encode()):
        return f'no small disk here: {os.strerror(ctypes.get_errno())}'

def own_mounts():
    "Enter a user namespace in which this process and its forks may mount, or return why there can be none."
    libc, uid, gid = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()
    if not hasattr(libc, 'unshare'):
        return 'no user namespaces here'
    if libc.unshare(NEW_USER | NEW_MOUNTS):
        return f'no user namespaces here: {os.strerror(ctypes.get_errno())}'
    for file, text in (('setgroups', 'deny'), ('uid_map', f'0 {uid} 1'), ('gid_map', f'0 {gid} 1')):
        Path(f'/proc/self/{file}').write_text(text)

def fill_a_disk(tmp_path, whole, steps):
    "The story of a run on a small disk, in a fork; exit code 77 where there can be none."
    disk = tmp_path/'disk'
    run = disk/'run'
    if problem := own_mounts() or small_disk(disk, '20m'):
        print(problem)
        os._exit(77)
    command = lambda log, *words: run_command(tmp_path, tmp_path/log, *words)
    got, done = command('a', *WORDS, '--out', 'disk/run')
    full = ('no space left on the disk for a checkpoint in disk/run/checkpoints; '
            'the older ones there are whole: free some')
    assert got.code == 1 and full in got.line and got.line.endswith('resume it with --resume disk/run'), got
    files = checkpoints_in(run/'checkpoints')
    assert len(files) == 2 and 0 < len(done) < len(steps) and all(read_checkpoint(f) for f in files)
    got, _ = command('b', '--resume', 'disk/run')   # no room yet
    assert got.code == 1 and 'no space left on the disk' in got.line and all(read_checkpoint(f) for f in files), got
    assert not small_disk(disk, '60m', REMOUNT)
    got, rest = command('c', '--resume', 'disk/run')
    assert got.code == 0 and rest == [s for s in steps if s >= step_in_name(files[0])], got
    check_same(run, whole)
    shutil.rmtree(run)
    assert not small_disk(disk, '20m', REMOUNT)
    got, done = command('d', *WORDS, '--out', 'disk/run', '--if-full', 'continue')
    assert 'training continues without' in got.out and done == steps and got.code == 0, got
    assert (run/'model.safetensors').read_bytes() == (whole/'model.safetensors').read_bytes()

def test_a_disk_of_20_mb_that_fills_up(undisturbed, tmp_path):
    """Two checkpoints of 8 MB fit. The third stops the run, which resumes bit for bit when there is room,
    or trains on without it where `--if-full continue` asks for that."""
    (tmp_path/'disk').mkdir()
    code = exit_code(fork(lambda: fill_a_disk(tmp_path, *undisturbed), tmp_path/'log'))
    if code == 77:
        pytest.skip((tmp_path/'log').read_text().strip())
    assert code == 0, (tmp_path/'log').read_text()

def test_a_full_disk_when_the_record_is_written(pretrain, monkeypatch):
    "TensorBoard writes in a thread of its own, whose error is told once."
    def full(*_): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr('tensorboard.summary.writer.record_writer.RecordWriter.write', full)
    got, _ = pretrain('a', *WORDS, '--out', 'run')
    assert got.code == 1 and 'no space left on the disk' in got.line, got
