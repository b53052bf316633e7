"""Studies: each one's mechanics on sixty images, a killed one, several jobs at a time, other methods, wrong use."""
import json
import os
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from matplotlib.figure import Figure
from support import begin_command

from mae_nb.base.errors import UsageError, require
from mae_nb.data.datasets import SOURCES, load_source
from mae_nb.tasks import study as module
from mae_nb.tasks.study import run_study
from mae_nb.tasks.study_figures import UNTESTED
from mae_nb.tasks.study_measures import Cost
from mae_nb.tasks.study_points import STUDIES, Point, choose_points
from mae_nb.tasks.study_runs import StudyOptions, pretrain_point

FLAGS = ('--epochs', 1, '--set', 'batch_size=30', '--labels', 5, '--tune', 'epochs=1', '--device', 'cpu',
         '--out', 'study')


@pytest.fixture
def toy(monkeypatch):
    "FashionMNIST with sixty images to train and forty to test."
    sets = tuple(images.shots(k) for images, k in zip(load_source('fashion'), (6, 4)))
    monkeypatch.setitem(SOURCES, 'fashion', lambda: sets)
    return sets


@pytest.fixture
def untimed(monkeypatch):
    "Without the timing at the beginning, and without the pictures of each run."
    monkeypatch.setattr(module, 'measure_cost', lambda *_: Cost(1., 1.))
    monkeypatch.setattr('mae_nb.training.runs.plot_metrics', lambda _: Figure())
    monkeypatch.setattr('mae_nb.tasks.finetune._draw_confusion', lambda *_: None)


def options(tmp_path, study, **changes):
    known = dict(seeds=1, epochs=1, set=('batch_size=30',), labels=5, tune=('epochs=1', 'batch_size=50'), device='cpu')
    return StudyOptions('fashion', study=study, out=str(tmp_path/'study'), **known | changes)


WANTED = {'mask-ratio': '.5,.9', 'decoder-depth': '2', 'decoder-width': '.125', 'mask-token': None,
          'target': 'pca,tokens', 'augmentation': 'fixed,jitter', 'sampling': 'block 50%,grid 75%',
          'schedule': '.125,2', 'partial': '0,.5,3', 'methods': 'mae'}


@pytest.mark.parametrize('name', STUDIES)
def test_each_study_trains_measures_and_reports(name, toy, untimed, tmp_path):
    asked = options(tmp_path, name, points=WANTED[name], epochs=8 if name == 'schedule' else 1)
    result = run_study(asked)
    points = [p.name for p in choose_points(STUDIES[name], asked.size | dict(in_chans=1), WANTED[name])]
    expected = [(metric, point) for metric in STUDIES[name].metrics for point in points]
    assert [(p['metric'], p['point']) for p in result['points']] == expected
    assert all(0 <= p['mean'] <= 1 and p['spread'] is None for p in result['points'])
    assert {t['verdict'] for t in result['trends']} <= {UNTESTED}   # one seed
    assert (tmp_path/'study'/'figures'/'study.png').stat().st_size > 10_000
    runs = {p.parent.name for p in (tmp_path/'study'/'points').glob('*/result.json')}
    assert len(runs) == (1 if name == 'partial' else len(points))


def test_a_killed_study_resumes_to_the_same_table(toy, untimed, tmp_path, forked):
    "Killed in the second of two points; the first is kept, the second resumes from its checkpoint."
    flags = ('--points', '.5,.9', '--seeds', 1, *FLAGS[2:], '--epochs', 4, '--save-every', 1)
    straight = forked('mae-study', 'mask-ratio', *flags)
    assert straight.code == 0, straight
    whole = (tmp_path/'study'/'points.csv').read_bytes()
    (tmp_path/'study').rename(tmp_path/'whole')
    pid, result = begin_command(tmp_path, 'mae-study', 'mask-ratio', *flags)
    second, deadline = tmp_path/'study'/'points'/'0.9-seed0', time.time() + 120
    while len(list(second.glob('checkpoints/*.safetensors'))) < 2:
        assert time.time() < deadline
        time.sleep(.01)
    os.kill(pid, signal.SIGKILL)
    assert result().code == -signal.SIGKILL
    first = (tmp_path/'study'/'points'/'0.5-seed0'/'result.json').stat().st_mtime_ns
    got = forked('mae-study', '--resume', 'study')
    assert got.code == 0 and '1 of 2 pretrainings are finished already' in got.out, got
    assert 'resumes at epoch' in second.with_name('0.9-seed0.log').read_text()
    assert (tmp_path/'study'/'points.csv').read_bytes() == whole
    assert (tmp_path/'study'/'points'/'0.5-seed0'/'result.json').stat().st_mtime_ns == first


def test_a_terminated_study_says_how_to_resume(toy, untimed, tmp_path):
    pid, result = begin_command(tmp_path, 'mae-study', 'mask-ratio', '--points', '.5', *FLAGS[2:], '--epochs', 500)
    deadline = time.time() + 120
    while not list((tmp_path/'study').glob('points/*/checkpoints/*.safetensors')):
        assert time.time() < deadline
        time.sleep(.01)
    os.kill(pid, signal.SIGTERM)
    got = result()
    assert got.code == 143 and got.line.endswith('what was done so far is in study; resume it with --resume study')


def test_two_jobs_at_a_time_give_the_same_table(toy, untimed, tmp_path):
    one = options(tmp_path, 'mask-ratio', points='.5,.9')
    run_study(one)
    run_study(replace(one, jobs=2, out=str(tmp_path/'two')))
    tables = [(tmp_path/name/'points.csv').read_text() for name in ('study', 'two')]
    assert tables[0] == tables[1]


def test_a_process_of_a_study_that_is_killed_is_reported():
    killed = [SimpleNamespace(exitcode=None), SimpleNamespace(exitcode=-9)]

    def get(timeout):
        raise module.Empty
    with pytest.raises(RuntimeError, match='has ended with exit code -9, .* use fewer `jobs`'):
        module._next_result(SimpleNamespace(get=get), killed)


def test_other_methods_are_measured_alike(toy, untimed, tmp_path):
    "Real rivals: one that predicts pixels, with colours, and the one that learns from labels."
    points = ('mae', 'simmim colours', 'supervised')
    result = run_study(options(tmp_path, 'methods', points='mae,simmim colours,supervised'))
    assert {p['point'] for p in result['points']} == set(points)
    config = json.loads((tmp_path/'study'/'points'/'simmim_colours-seed0'/'config.json').read_text())
    assert (config['task'], config['augment'], config['seed']) == ('rival', 'crop+colour', 0)
    assert [(t['trend']['first'], t['trend']['second']) for t in result['trends']] == [('mae', 'supervised')]


def test_what_learns_from_labels_sees_those_of_fine_tuning(toy, tmp_path):
    asked = options(tmp_path, 'methods')
    learn = pretrain_point(toy, asked, Point('supervised', method='supervised'), 0, 1)
    few = toy[0].shots(asked.labels, 0)
    assert len(few) == 50 and len(toy[0]) == 60
    assert (learn.dls.train.dataset.images.items == few.items).all()


def test_a_method_that_lacks_a_package_is_an_error_before_anything_is_trained(toy, tmp_path, monkeypatch):
    monkeypatch.setattr('mae_nb.tasks.rivals.rival_run', lambda *_, **__: require('no_such_package', 'rivals'))
    with pytest.raises(UsageError, match='point moco of methods: no_such_package is not installed: '
                                         'in the folder of mae_nb, pip install -e "..rivals."'):
        run_study(options(tmp_path, 'methods', points='moco'))
    assert not (tmp_path/'study').exists()


def test_wrong_use_is_one_line(toy, untimed, forked, tmp_path, photos):
    flat = tmp_path/'flat'
    flat.mkdir()
    for file in photos.glob('even/*'):
        file.rename(flat/file.name)
    cases = {
        ('mask_ratio', *FLAGS): "unknown study 'mask_ratio': did you mean 'mask-ratio'?",
        ('mask-ratio', '--points', '.55', *FLAGS): "unknown point '0.55'",
        ('mask-ratio', '--points', '.5', '--minutes', 1e-7, *FLAGS[2:]): '--minutes 1e-07 is too small for the point',
        ('mask-ratio', '--minutes', 1, *FLAGS): '--minutes makes the time equal and --epochs the epochs',
        ('mask-ratio', '--data', 'flat', '--device', 'cpu'): 'flat has no labels: put the images of each class into',
        ('own', *FLAGS): 'such as --set mask_ratio=.5,.6,.75, and got 0',
        ('methods', '--points', 'mocov3', *FLAGS): "unknown point 'mocov3'",
        ('mask-ratio', *FLAGS, '--out', 'photos'): 'photos exists already and is not empty',
    }
    for words, line in cases.items():
        got = forked('mae-study', *words)
        assert got.code == 2 and line in got.line, (words, got)
    got = forked('mae-pretrain', 'fashion', '--set', 'mask_ratio=.1,.2,.3')
    assert got.code == 2 and 'to compare several, mae-study own --set mask_ratio=.1,.2,.3' in got.line


def test_a_folder_of_another_study_is_refused(toy, untimed, tmp_path, forked):
    flags = ('mask-ratio', '--points', '.5', '--seeds', 1, *FLAGS)
    assert forked('mae-study', *flags).code == 0
    got = forked('mae-study', *flags, '--labels', 4, '--resume', 'auto')
    assert got.code == 2 and 'study was started with labels = 5, and now labels = 4' in got.line
    got = forked('mae-study', 'sampling', *FLAGS, '--resume', 'auto')
    assert got.code == 2 and 'study was started without the point' in got.line
    got = forked('mae-study', '--resume', str(tmp_path/'study'/'points'/'0.5-seed0'))
    assert got.code == 2 and 'was made by mae-pretrain: resume it with that command' in got.line
