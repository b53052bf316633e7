"""ViT-B/16 at 224 pixels on real photographs, for a few steps."""
import shutil

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def losses(run):
    "The loss at each step, from the run's TensorBoard events."
    board = EventAccumulator(str(run))
    board.Reload()
    return [e.value for e in board.Scalars('step_loss')]

@pytest.mark.slow
def test_pretrain_and_finetune(terminal, tmp_path, shared_data):
    shutil.unpack_archive(shared_data/'imagenet_sample.tar', tmp_path)
    common = '--max-steps', 10, '--bs', 8, '--set', 'warmup_epochs=0', '--num-workers', 1
    got = terminal('mae-pretrain', 'imagenet_sample', *common, '--set', 'base_lr=3e-3', '--out', 'run')
    assert got.code == 0, got.err
    print(got.out)
    seen = losses(tmp_path/'run')
    print([round(x, 3) for x in seen])
    assert len(seen) == 10 and sum(seen[-3:]) < sum(seen[:3])
    few = sorted((tmp_path/'imagenet_sample'/'train').iterdir())[:8]   # one image a class: ten steps can memorise these
    for part in ('train', 'val'):
        for c in few:
            shutil.copytree(c, tmp_path/'few'/part/c.name)
    plain = ('base_lr=3e-2', 'label_smoothing=0.', 'drop_path=0.', 'mixup=0.', 'cutmix=0.', 'erase=0.', 'randaugment=')
    settings = [word for field in plain for word in ('--set', field)]
    got = terminal('mae-finetune', 'few', 'run', *common, *settings, '--out', 'tuned')
    assert got.code == 0, got.err
    print(got.out)
    seen = losses(tmp_path/'tuned')
    print([round(x, 3) for x in seen])
    assert len(seen) == 10 and sum(seen[-3:]) < sum(seen[:3]) and 'peak memory' in got.out
    for run in ('run', 'tuned'):
        for part in ('config.json', 'metrics.csv', 'timing.csv', 'model.safetensors', 'figures/curves.png'):
            assert (tmp_path/run/part).stat().st_size > 0, part
