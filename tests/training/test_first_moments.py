"""Whatever moment a run is ended in first, `resume` goes on from what it left; and two starters are never two runs."""
import errno
import json
import os
import shutil
import subprocess
import sys
import time

import pytest
from support import exit_code, fork
from tiny_runs import check_same, die, live

from mae_nb.base import files
from mae_nb.base.files import LOCK, BadFile, FolderInUse, lock_folder, unlock_folder
from mae_nb.base.tables import read_metrics
from mae_nb.training.runs import make_run

CONFIG = dict(task='pretrain', seed=3)
STEPS = 'mkdir', 'open', 'unlink', 'replace', 'write', 'ftruncate', 'fsync'   # what a first moment consists of


class Moments:
    "Ends the process before the n-th operation on files."
    def __init__(self, n):
        self.left = n

    def watch(self):
        for name in STEPS:
            setattr(os, name, self.counted(getattr(os, name)))

    def counted(self, real):
        def call(*args, **kwargs):
            if self.left == 0:
                die()
            self.left -= 1
            return real(*args, **kwargs)
        return call


def begin(out, n):
    Moments(n).watch()
    make_run(out, CONFIG, resume=True)


def test_every_first_moment_can_be_resumed(tmp_path):
    "A life is ended before its first, second, ... operation, until one needs no more of them."
    states, n, code = set(), 0, -9
    while code:
        out = tmp_path/f'run{n}'
        code = exit_code(fork(lambda out=out, n=n: begin(out, n), tmp_path/'log'))
        assert code in (0, -9), (tmp_path/'log').read_text()
        states.add(tuple(sorted(f.name for f in out.iterdir())) if out.exists() else None)
        make_run(out, CONFIG, resume=True)
        unlock_folder(out)
        assert json.loads((out/'config.json').read_text())['seed'] == 3
        assert {f.name for f in out.iterdir()} == {'checkpoints', 'figures', 'config.json'} | (
            {'config.json.part'} & {f.name for f in out.iterdir()})
        n += 1
    assert n > 10 and len(states) > 4, states

def test_what_is_no_leftover_is_in_the_way(tmp_path):
    (tmp_path/'photos').mkdir()
    (tmp_path/'photos'/'a.jpg').write_bytes(b'a picture')
    with pytest.raises(ValueError, match='photos exists already and is not empty'):
        make_run(tmp_path/'photos', CONFIG, resume=True)
    assert [f.name for f in (tmp_path/'photos').iterdir()] == ['a.jpg']   # not even a lock

@pytest.mark.parametrize('name, content', [
    ('metrics.csv', ''), ('metrics.csv', 'epoch,tra'), ('timing.csv', ''), ('metrics.csv', '0,0.12,0.13,0.001,0\r\n')])
def test_tables_without_a_header_are_repaired(straight, tmp_path, name, content):
    "As a full disk or a kill leaves them, before the first checkpoint."
    out = tmp_path/'run'
    make_run(out, dict(task='pretrain'))
    (out/name).write_text(content)
    unlock_folder(out)
    code = exit_code(fork(lambda: live('pretrain', out, tmp_path/'steps'), tmp_path/'log'))
    assert code == 0, (tmp_path/'log').read_text()
    check_same(out, straight('pretrain').out)
    assert (out/'timing.csv').read_text().startswith('epoch,train_seconds')

def test_leftovers_of_killed_saves_are_removed(straight, tmp_path):
    out = tmp_path/'run'
    shutil.copytree(straight('pretrain').out, out)
    for place in ('.tmpa1B2c3', 'checkpoints/.tmpXyZ012', 'checkpoints/step-000000099.part', 'figures/curves.png.part'):
        (out/place).write_bytes(b'half')
    assert exit_code(fork(lambda: live('pretrain', out, tmp_path/'steps'), tmp_path/'log')) == 0
    assert not [f for f in out.rglob('*') if f.name.endswith('.part') or f.name.startswith('.tmp')]
    check_same(out, straight('pretrain').out)

# ---- damaged records ------------------------------------------------------------------------------------------------

def test_damaged_files_of_a_run_are_named(tmp_path):
    out = make_run(tmp_path/'run', CONFIG)
    for content in ('{"task": ', '[3]', '\xff'):
        (out/'config.json').write_bytes(content.encode('latin1'))
        with pytest.raises(BadFile, match='run/config.json is damaged'):
            make_run(out, CONFIG, resume=True)
    for content, reason in (('', 'no header'), ('epoch,loss\n0,1,2\n', 'line 2'), ('epoch,loss\n0,x\n', "'x'")):
        (out/'metrics.csv').write_text(content)
        with pytest.raises(BadFile, match=f'run/metrics.csv is damaged: .*{reason}'):
            read_metrics(out)

@pytest.mark.parametrize('content', ['', '{"step": 66', '{"step": 66}', '[]'])
def test_a_damaged_note_of_the_end_is_named_and_the_end_done_again(straight, tmp_path, content):
    out, log = tmp_path/'run', tmp_path/'log'
    shutil.copytree(straight('pretrain').out, out)
    (out/'checkpoints'/'fit-1.done').write_text(content)
    assert exit_code(fork(lambda: live('pretrain', out, tmp_path/'steps'), log)) == 0, log.read_text()
    assert 'fit-1.done is damaged' in log.read_text() and 'the end of the fit is done again' in log.read_text()
    check_same(out, straight('pretrain').out)

def test_a_seed_that_was_edited_in_the_config_is_noticed(forked, tmp_path):
    "In all its places: the checkpoint knows better."
    words = 'fashion', '--epochs', '1', '--max-steps', '1', '--bs', '20'
    assert forked('mae-pretrain', *words, '--out', 'run').code == 0
    (tmp_path/'run'/'checkpoints'/'fit-1.done').unlink()
    config = tmp_path/'run'/'config.json'
    config.write_text(config.read_text().replace('"seed": 0', '"seed": 1'))
    got = forked('mae-pretrain', '--resume', 'run')
    assert got.code == 2 and 'was started with seed = 0, and now seed = 1' in got.line

# ---- one folder, one run --------------------------------------------------------------------------------------------

WORK = """
import sys, time
from mae_nb.base.files import FolderInUse, lock_folder, unlock_folder
out, seconds = sys.argv[1], float(sys.argv[2])
try:
    lock_folder(out, wait=0)
except FolderInUse as e:
    print(e)
    sys.exit(1)
with open(out + '/rows', 'a') as f:      # what two at a time would mix
    for _ in range(5):
        print(time.monotonic(), file=f, flush=True)
        time.sleep(seconds / 5)
unlock_folder(out)
"""

def race(folder, n, seconds=.2):
    "Several starters of one folder at once: their exit codes."
    def start():
        sys.argv = ['work', str(folder), str(seconds)]
        exec(compile(WORK, 'work', 'exec'), {})

    return [exit_code(pid) for pid in [fork(start, folder/f'.log{i}') for i in range(n)]]

def check_races(tmp_path, races, starters):
    for number in range(races):
        folder = tmp_path/f'{starters}-{number}'
        folder.mkdir()
        codes = race(folder, starters)
        rows = (folder/'rows').read_text().split()
        assert codes.count(0) == len(rows) // 5 >= 1 and set(codes) <= {0, 1}, codes
        times = [float(row) for row in rows]
        assert times == sorted(times), 'two at once'
        for i, code in enumerate(codes):
            said = (folder/f'.log{i}').read_text()
            assert code == 0 or 'is in use by ' in said and len(said.splitlines()) == 1, said

@pytest.mark.parametrize('starters', [2, 5])
def test_of_several_starters_one_runs(tmp_path, starters):
    check_races(tmp_path, 4, starters)

@pytest.mark.slow
@pytest.mark.parametrize('starters', [2, 5])
def test_fifty_races_have_one_winner_each(tmp_path, starters):
    check_races(tmp_path, 50, starters)

def test_a_second_command_ends_with_one_line(forked, tmp_path):
    "While a process holds the folder, and no longer."
    run = tmp_path/'run'
    run.mkdir()
    code = f'from mae_nb.base.files import lock_folder; import time; lock_folder({str(run)!r}); print(1, flush=True)'
    holder = subprocess.Popen([sys.executable, '-c', code + '; time.sleep(99)'], stdout=subprocess.PIPE)
    holder.stdout.readline()
    words = 'mae-pretrain', 'fashion', '--max-steps', '1', '--bs', '20', '--out', 'run', '--resume', 'auto'
    got = forked(*words)
    assert got.code == 1 and f'run is in use by process {holder.pid} on ' in got.line and 'since 20' in got.line
    holder.kill()
    holder.wait()
    assert forked(*words).code == 0
    assert not (run/LOCK).exists()

def test_a_lock_ends_with_its_process_not_with_its_workers(tmp_path):
    "A forked child that outlives its parent keeps nothing."
    def parent():
        lock_folder(tmp_path)
        if os.fork() == 0:
            time.sleep(20)
            os._exit(0)
        die()

    assert exit_code(fork(parent, tmp_path/'log')) == -9
    lock_folder(tmp_path, wait=1.)
    unlock_folder(tmp_path)

@pytest.mark.skipif(shutil.which('unshare') is None, reason='no unshare')
def test_a_lock_reaches_over_network_namespaces(tmp_path):
    "Two processes that share a folder and no network."
    command = ['unshare', '--user', '--map-root-user', '--net', sys.executable, '-c']
    code = f'from mae_nb.base.files import lock_folder; import time; lock_folder({str(tmp_path)!r}, wait=0); '
    holder = subprocess.Popen([*command, code + 'print(1, flush=True); time.sleep(99)'], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True)
    if not holder.stdout.readline():
        pytest.skip(f'no namespaces here: {holder.stderr.read()}')
    second = subprocess.run([*command, code], capture_output=True, text=True)
    assert second.returncode == 1 and 'FolderInUse: ' in second.stderr
    holder.kill()
    holder.wait()
    assert subprocess.run([*command, code]).returncode == 0

def test_a_file_system_without_locks_is_reported(tmp_path, monkeypatch, capsys):
    def refuse(fd):
        raise OSError(errno.ENOLCK, 'no locks')

    monkeypatch.setattr(files, '_lock_descriptor', refuse)
    lock_folder(tmp_path)
    assert 'has no locks: start no second process there' in capsys.readouterr().out
    unlock_folder(tmp_path)

def test_a_lock_is_not_taken_from_a_file_that_was_removed(tmp_path, monkeypatch):
    "Its owner unlocks between another one's opening and locking: the file that is locked then has no name any more."
    real = files._lock_descriptor

    def late(fd):
        (tmp_path/LOCK).unlink()
        real(fd)

    monkeypatch.setattr(files, '_lock_descriptor', late)
    with pytest.raises(FolderInUse):
        lock_folder(tmp_path, wait=0)
    monkeypatch.setattr(files, '_lock_descriptor', real)
    lock_folder(tmp_path, wait=0)
    assert (tmp_path/LOCK).read_text().startswith(f'process {os.getpid()} on ')
    unlock_folder(tmp_path)
