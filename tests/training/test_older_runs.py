"""Runs that an earlier version has made can be resumed and read."""
import json
import shutil

import pytest
import torch
from support import ROOT

from mae_nb.all import (
    RECIPES,
    create_mae,
    fashion,
    get_dls,
    load_mae,
    mae_options,
    make_run,
    override,
    pretrain_learner,
    read_metrics,
)
from mae_nb.base.keyed import seeded
from mae_nb.training.recipes import as_config, from_config
from mae_nb.weights.reading import read_weights

OLD = ROOT/'tests'/'training'/'run_of_flat_modules'
SIZE = dict(dim=32, depth=1, num_heads=2, decoder_dim=16, decoder_heads=2)


def resumed_learner(out):
    "The learner of the run in `stopped`, as a user of today writes it."
    train, test = fashion()
    recipe = override(RECIPES['pretrain_fashion'], dict(batch_size=20, epochs=3, warmup_epochs=1, clip=1.))
    model = seeded(0, create_mae, 'mae_vit_nano_patch4_28', in_chans=1, **SIZE, **mae_options(recipe))
    dls = get_dls((train.shots(10), test.shots(2)), recipe, img_size=28, num_workers=0, device='cpu')
    config = dict(task='pretrain', data='fashion', model=model.config, recipe=as_config(recipe), seed=0)
    make_run(out, config, resume=True)
    return pretrain_learner(dls, model, recipe, out=out)


def test_a_stopped_run_is_resumed(tmp_path, capsys):
    "It starts at batch 7 and ends where the whole run ended; on the machine that made it, with the same bits."
    run = tmp_path/'run'
    shutil.copytree(OLD/'stopped', run)
    (run/'figures').mkdir()
    resumed_learner(run).fit_recipe()
    assert 'epoch 1, batch 2' in capsys.readouterr().out
    whole, ours = read_weights(OLD/'whole_model.safetensors'), read_weights(run/'model.safetensors')
    assert list(whole) == list(ours)
    assert all(torch.allclose(v, ours[k], atol=1e-4) for k, v in whole.items())
    expected = (OLD/'whole_metrics.csv').read_text().splitlines()
    rows = (run/'metrics.csv').read_text().splitlines()
    assert rows[0] == expected[0] and len(rows) == len(expected)
    for row, other in zip(rows[1:], expected[1:]):
        assert [float(x) for x in row.split(',')] == pytest.approx([float(x) for x in other.split(',')], abs=1e-4)


def test_a_run_begun_by_a_command_is_resumed(forked, tmp_path):
    "A run that was killed before its first checkpoint: its config alone says how it was begun."
    shutil.copytree(OLD/'command', tmp_path/'run')
    for folder in ('checkpoints', 'figures'):
        (tmp_path/'run'/folder).mkdir()
    got = forked('mae-pretrain', '--resume', 'run')
    assert got.code == 0, got.err
    assert '3 steps of 40 images' in got.out
    assert load_mae(tmp_path/'run').config['name'] == 'mae_vit_nano_patch4_28'
    got = forked('mae-pretrain', '--resume', 'run', '--bs', '20')
    assert got.code == 2 and '--bs has no effect with --resume' in got.line


def test_configs_and_weights_are_read():
    config = json.loads((OLD/'command'/'config.json').read_text())
    assert from_config(config['recipe']) == override(RECIPES['pretrain_fashion'], dict(batch_size=40, warmup_epochs=0))
    assert load_mae(OLD/'whole_model.safetensors').config['dim'] == 32
    assert len(read_metrics(OLD/'stopped')['train_loss']) == 1
