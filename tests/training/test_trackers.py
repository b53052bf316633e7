"""A record in a tracker survives kills, costs a run nothing when it fails, and leaves the machine only when asked to.

wandb, trackio and mlflow are tested where they are installed: pip install -e ".[wandb,trackio,mlflow]". Seven of the
cases are MLflow's. Each has up to four lives, in processes of their own, and each of these imports MLflow and makes the
tables of a new database or compares those of an old one with its migrations: some three seconds of one core a life, 55
in all. They start no server and no thread that they would wait for.
"""
import json
import os
import socket
import sqlite3
import threading
from functools import partial
from importlib.util import find_spec

import pytest
from support import exit_code, fork
from tiny_runs import WORDS, call, check_same, event, in_fork, learner, run_command, signals

from mae_nb.base.tables import log_records, read_metrics
from mae_nb.training import trackers
from mae_nb.training.trackers import TRACKERS, Tracker, Trackers, tracker_callbacks

pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='kills forked processes, which Windows lacks')
BATCHES = 22   # an epoch of the tiny runs, which have three


class Lines(Tracker):
    "Rows as lines of a file in the run folder."
    package, extra = 'json', 'lines'
    def start(self, config, out, name):
        self.file = out/'rows.jsonl'
        return name or f'of process {os.getpid()}', max([row['step'] for row in read_lines(out)], default=0)

    def scalars(self, rows):
        with open(self.file, 'a') as f:
            f.writelines(json.dumps(dict(step=step) | values) + '\n' for step, values in rows.items())

    def picture(self, name, file, step): self.note(f'picture {name}')
    def finish(self, done): self.note(f'finish {done}')

    def note(self, text):
        with open(self.file.with_suffix('.notes'), 'a') as f:
            f.write(f'{text}\n')


class Away(Lines):
    "A server that nobody reaches."
    def scalars(self, rows): raise ConnectionError('no route to host')
    picture = finish = scalars


class Full(Lines):
    def start(self, config, out, name): raise OSError(28, 'No space left on device', str(out/'tracker.db'))


def read_lines(out):
    file = out/'rows.jsonl'
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def read_trackio(out):
    file, = out.parent.glob('trackio/*.db')
    with sqlite3.connect(file) as db:
        found = db.execute('select step, metrics from metrics where run_name = ? order by id', [id_of(out, 'trackio')])
        rows = [dict(step=step) | json.loads(values) for step, values in found]
    return [row for row in rows if 'step_loss' in row]   # and not the pictures' rows


def read_mlflow(out):
    rows = {}
    with sqlite3.connect(out/'mlflow.db') as db:
        assert db.execute('select count(distinct run_uuid) from metrics').fetchone() == (1,)
        found = db.execute('select key, value, step from metrics where run_uuid = ?', [id_of(out, 'mlflow')]).fetchall()
    assert len({(key, step) for key, _, step in found}) == len(found)   # no number twice
    for key, value, step in found:
        rows.setdefault(step, dict(step=step))[key] = value
    return [rows[step] for step in sorted(rows)]


def read_wandb(out):
    from wandb.proto.wandb_internal_pb2 import Record
    rows = []
    for file in sorted(out.glob(f'wandb/offline-run-*/run-{id_of(out, "wandb")}.wandb')):
        for data in log_records(file.read_bytes(), 7):
            record = Record.FromString(data)
            if record.HasField('history'):
                row = {'.'.join(item.nested_key) or item.key: json.loads(item.value_json)
                       for item in record.history.item}
                rows.append(dict(step=row['_step']) | row)
    return [row for row in rows if 'step_loss' in row]   # and not the pictures' rows


def id_of(out, name): return json.loads((out/'trackers.json').read_text())[name]


READERS = dict(lines=read_lines, wandb=read_wandb, trackio=read_trackio, mlflow=read_mlflow)


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    "No choice of the user's own; a home and a database for this test."
    for name in os.environ:
        if name.startswith(('WANDB_', 'MLFLOW_', 'TRACKIO_', 'HF_')):
            monkeypatch.delenv(name)
    monkeypatch.setenv('TRACKIO_DIR', str(tmp_path/'trackio'))
    monkeypatch.setitem(TRACKERS, 'lines', Lines)


@pytest.fixture(params=READERS)
def name(request):
    if find_spec(TRACKERS[request.param].package) is None:
        pytest.skip(f'{request.param} is not installed')
    return request.param


def life(out, moment, **kwargs):
    killers = moment() if moment else None
    learn = learner('plain finetune', out, cbs=killers or [], **kwargs)
    learn.fit_recipe()
    if learn.find_callback('trackers'):
        learn.trackers.finish()

def end(out, moment, output, **kwargs):
    "A life of a run that is killed at a moment, or ends."
    pid = fork(partial(life, out, moment, **kwargs), output)
    assert exit_code(pid) == (0 if moment is None else -9), output.read_text()


def whole_record(out, name):
    "The record's rows by step; none is missing, and none has two values."
    rows = {}
    for row in READERS[name](out):
        curve = {key: value for key, value in row.items() if key in ('step_loss', 'lr', 'train_loss', 'valid_loss')}
        assert rows.setdefault(row['step'], curve) == curve
    assert sorted(rows) == list(range(1, 3 * BATCHES + 1))
    return rows


LIVES = {   # and the last one is not disturbed
    'in the second epoch': [event('before_step', 8)],
    'rows handed over': [event('after_epoch', 1, 58)],
    'record opened, its name not written': [call(Trackers, 'write_names', 1)],
    'row of the table written, not handed over': [event('after_epoch', 2, 56), event('before_batch', 5)],
}


@pytest.mark.parametrize('lives', LIVES)
def test_the_record_of_a_killed_run_is_whole(name, lives, straight, tmp_path):
    out = tmp_path/'run'
    for number, moment in enumerate([*LIVES[lives], None]):
        end(out, moment, tmp_path/f'{number}.log', log=name)
    rows, table = whole_record(out, name), read_metrics(out)
    for epoch in range(3):
        row = rows[(epoch + 1) * BATCHES]
        assert row['train_loss'] == pytest.approx(table['train_loss'][epoch], abs=1e-12)
        assert row['valid_loss'] == pytest.approx(table['valid_loss'][epoch], abs=1e-12)
        losses = [rows[epoch * BATCHES + i]['step_loss'] for i in range(1, BATCHES + 1)]
        assert sum(losses) / BATCHES == pytest.approx(table['train_loss'][epoch], rel=.05)
    assert 'fails' not in (tmp_path/f'{number}.log').read_text()
    check_same(out, straight('plain finetune').out)   # the tracker has changed nothing


def test_a_tracker_that_is_new_to_a_resumed_run_gets_the_whole_curve(tmp_path):
    out = tmp_path/'run'
    end(out, event('before_step', 14), tmp_path/'0.log')
    end(out, None, tmp_path/'1.log', log='lines')
    whole_record(out, 'lines')


@pytest.mark.parametrize('kind, reason', [(Away, 'no route to host'), (Full, 'no space left on the disk')])
def test_a_tracker_that_fails_costs_nothing(kind, reason, monkeypatch, straight, tmp_path):
    monkeypatch.setitem(TRACKERS, 'lines', kind)
    end(tmp_path/'run', None, tmp_path/'log', log='lines')
    lines = [line for line in (tmp_path/'log').read_text().splitlines() if 'lines fails' in line]
    assert len(lines) == 1 and reason in lines[0] and 'training continues' in lines[0]
    check_same(tmp_path/'run', straight('plain finetune').out)


def test_a_server_that_is_away_is_one_line(monkeypatch, tmp_path):
    "MLflow's client raises; W&B's and trackio's own processes and threads try on by themselves."
    if find_spec('mlflow') is None:
        pytest.skip('mlflow is not installed')
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        monkeypatch.setenv('MLFLOW_TRACKING_URI', f'http://127.0.0.1:{free.getsockname()[1]}')
    end(tmp_path/'run', None, tmp_path/'log', log='mlflow')
    lines = [line for line in (tmp_path/'log').read_text().splitlines() if 'mlflow fails' in line]
    assert len(lines) == 1 and len(read_metrics(tmp_path/'run')['epoch']) == 3


# ---- nothing leaves the machine -------------------------------------------------------------------------------------

class Proxy:
    "On the way to the network: notes who calls, and hangs up."
    def __init__(self):
        self.calls, self.server = [], socket.create_server(('127.0.0.1', 0))
        self.address = f'http://127.0.0.1:{self.server.getsockname()[1]}'
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self):
        while True:
            try:
                caller, _ = self.server.accept()
            except OSError:
                return
            with caller:
                caller.settimeout(5)
                self.calls.append(caller.recv(200).split(b'\r\n')[0].decode())


@pytest.fixture
def proxy(monkeypatch, tmp_path):
    watched = Proxy()
    for variable in ('HTTP_PROXY', 'HTTPS_PROXY', 'ALL_PROXY'):
        monkeypatch.setenv(variable, watched.address)
        monkeypatch.setenv(variable.lower(), watched.address)
    for variable in ('NO_PROXY', 'no_proxy', 'DO_NOT_TRACK', 'CI'):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv('HF_TOKEN', 'hf_' + 'a' * 34)   # a user who has logged in
    (tmp_path/'netrc').write_text(f'machine api.wandb.ai\n  login user\n  password {"a" * 40}\n')
    (tmp_path/'netrc').chmod(0o600)
    monkeypatch.setenv('NETRC', str(tmp_path/'netrc'))
    yield watched
    watched.server.close()


def test_the_proxy_sees_a_call(proxy, tmp_path):
    def ask():
        from huggingface_hub import whoami
        with pytest.raises(Exception):   # noqa: B017  whatever the library makes of it
            whoami()
    pytest.importorskip('huggingface_hub')
    in_fork(ask, tmp_path/'log')
    assert any('huggingface.co' in line for line in proxy.calls)


def test_nothing_leaves_the_machine(name, proxy, tmp_path):
    "Though the user has logged in; an offline mode of the user's own surroundings is not needed."
    end(tmp_path/'run', event('after_epoch', 1, 58), tmp_path/'0.log', log=name)
    end(tmp_path/'run', None, tmp_path/'1.log', log=name)
    assert proxy.calls == []
    whole_record(tmp_path/'run', name)


@pytest.mark.parametrize('variable, value', [('WANDB_MODE', 'online'), ('MLFLOW_TRACKING_URI', 'http://tracker.test'),
                                             ('TRACKIO_SERVER_URL', 'http://tracker.test/?write_token=a')])
def test_the_user_s_own_environment_decides(variable, value, proxy, monkeypatch, tmp_path):
    library = variable.partition('_')[0].lower()
    if find_spec(library) is None:
        pytest.skip(f'{library} is not installed')
    monkeypatch.setenv(variable, value)
    monkeypatch.setenv('WANDB_INIT_TIMEOUT', '3')
    end(tmp_path/'run', None, tmp_path/'log', log=library)
    assert proxy.calls and len(read_metrics(tmp_path/'run')['epoch']) == 3


# ---- commands -------------------------------------------------------------------------------------------------------

def test_a_command_resumes_the_record(tmp_path):
    words = *WORDS, '--out', 'run', '--log', 'lines'
    first, _ = run_command(tmp_path, tmp_path/'0.steps', *words, before=[signals(30, 15)])
    assert first.code == 143, first.err
    known = id_of(tmp_path/'run', 'lines')
    assert json.loads((tmp_path/'run'/'config.json').read_text())['options']['log'] == ['lines']
    second, _ = run_command(tmp_path, tmp_path/'1.steps', '--resume', 'run')
    assert second.code == 0, second.err
    assert [row['step'] for row in read_lines(tmp_path/'run')] == list(range(1, 2 * BATCHES + 1))
    assert id_of(tmp_path/'run', 'lines') == known
    notes = (tmp_path/'run'/'rows.notes').read_text().splitlines()
    assert notes == ['finish False', 'picture curves', 'picture reconstructions', 'finish True']


def test_a_run_without_trackers_has_none_in_its_config(undisturbed):
    out, _ = undisturbed
    assert 'log' not in json.loads((out/'config.json').read_text())['options']
    assert not (out/'trackers.json').exists()


@pytest.mark.parametrize('log, text', [
    ('lines', 'lines is not installed: in the folder of mae_nb, pip install -e ".[lines]"'),
    ('wandbb', "did you mean 'wandb'"), ('tensorboard', '--log tensorboard has no effect'),
    ('none,wandb', 'excludes others')])
def test_what_cannot_work_is_one_line_before_anything_is_read(log, text, monkeypatch, forked, tmp_path):
    monkeypatch.setattr(Lines, 'package', 'not_there')
    got = forked('mae-pretrain', 'fashion', '--out', 'run', '--log', log)
    assert got.code == 2 and text in got.line
    assert not (tmp_path/'run').exists()


def test_a_probe_that_trains_nothing_logs_nothing(forked):
    got = forked('mae-probe', 'knn', 'fashion', 'weights', '--log', 'lines')
    assert got.code == 2 and '--log has no meaning for this probe' in got.line


def test_only_the_first_process_logs(monkeypatch, tmp_path):
    assert len(tracker_callbacks('lines', tmp_path)) == 1
    monkeypatch.setattr(trackers, 'rank', lambda: 1)
    assert tracker_callbacks('lines', tmp_path) == []

