"""ViT-B/16 at 224 pixels on real photographs, for a few steps."""
import tarfile

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def losses(run):
    "The loss at each step, from the run's TensorBoard events."
    board = EventAccumulator(str(run)); board.Reload()
    return [e.value for e in board.Scalars('step_loss')]

@pytest.mark.slow
def test_pretrain_and_finetune(terminal, tmp_path, shared_data):
    with tarfile.open(shared_data/'imagenet_sample.tar') as tar: tar.extractall(tmp_path, filter='data')
    common = '--max-steps', 10, '--bs', 8, '--set', 'warmup_epochs=0', '--num-workers', 1
    got = terminal('mae-pretrain', 'imagenet_sample', *common, '--set', 'base_lr=3e-3', '--out', 'run')
    assert got.code == 0, got.err
    print(got.out)
    seen = losses(tmp_path/'run')
    assert len(seen) == 10 and sum(seen[-3:]) < sum(seen[:3])
    got = terminal('mae-finetune', 'imagenet_sample', 'run', *common, '--set', 'base_lr=1e-1', '--set', 'label_smoothing=0.', '--set', 'drop_path=0.', '--out', 'tuned')
    assert got.code == 0, got.err
    print(got.out)
    assert len(losses(tmp_path/'tuned')) == 10 and 'peak memory' in got.out
