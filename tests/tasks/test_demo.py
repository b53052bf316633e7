"An interrupted demo resumes and ends with the table that it would have had."
import inspect

import pytest

from mae_nb.data.datasets import SOURCES, load_source
from mae_nb.model.mae import create_mae
from mae_nb.tasks import demo as room
from mae_nb.tasks.demo import DEMOS, DemoPlan, demo
from mae_nb.tasks.features import Readout, linear_probe
from mae_nb.training.presets import RECIPES
from mae_nb.training.recipes import override


def shorten(patch):
    "Two hundred images, and two epochs of everything."
    train, test = (images.shots(k) for images, k in zip(load_source('fashion'), (20, 10)))
    patch.setitem(SOURCES, 'fashion', lambda: (train, test))
    patch.setitem(DEMOS, 'fashion', DemoPlan(Readout((-1,), 2), {5: 2, 20: 1}, (5,), (1., .01)))
    for name in ('demo_fashion', 'scratch_fashion', 'finetune_fashion'):
        short = override(RECIPES[name], dict(epochs=2, warmup_epochs=.1, batch_size=25))
        patch.setitem(RECIPES, name, short)


@pytest.fixture
def small(monkeypatch):
    shorten(monkeypatch)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "A demo that nobody disturbs."
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        return demo('fashion', seed=1, out=tmp_path_factory.mktemp('demo')/'whole')


def test_an_interrupted_demo_resumes_and_gives_the_same_table(small, whole, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        def interrupt(*args, **kwargs):
            raise KeyboardInterrupt
        patch.setattr(room, '_train_part', interrupt)
        with pytest.raises(KeyboardInterrupt):
            demo('fashion', seed=1, out=tmp_path/'part')
    capsys.readouterr()
    resumed = demo('fashion', seed=1, resume=tmp_path/'part')
    assert 'resumes at epoch' in capsys.readouterr().out
    assert (whole['resumed'], resumed['resumed']) == (False, True)
    assert resumed['table'] == whole['table']


def test_several_seeds_make_one_table(small, whole, tmp_path):
    "The second of two seeds has the numbers that it has alone."
    both = demo('fashion', seed=0, seeds=2, out=tmp_path/'both')
    assert {entry['seed'] for entry in both['table']} == {0, 1}
    assert [entry for entry in both['table'] if entry['seed'] == 1] == whole['table']


def test_every_row_of_a_probe_reads_the_same_images_with_the_same_choice_of_penalties(small, monkeypatch):
    calls = []
    probe = room.linear_probe

    def spy(train, labels, test, test_labels, penalties, **options):
        calls.append((tuple(labels), penalties, options['seed'], options['folds'], options['standardise']))
        return probe(train, labels, test, test_labels, penalties, **options)

    monkeypatch.setattr(room, 'linear_probe', spy)
    encoders = {row: create_mae('mae_vit_nano_patch4_28', in_chans=1).encoder for row in ('untrained', 'learned')}
    room.compare_features(*load_source('fashion'), encoders, DEMOS['fashion'])
    a_row = len(calls) // 3
    assert a_row == 3 and calls[:a_row] == calls[a_row:2 * a_row] == calls[2 * a_row:]


def test_penalties_are_chosen_with_all_labels():
    "One chosen with a fifth of CIFAR-10's labels was too strong, and cost two points."
    tune_on = inspect.signature(linear_probe).parameters['tune_on'].default
    assert tune_on >= max(10 * max(plan.draws) for plan in DEMOS.values())   # of ten classes
