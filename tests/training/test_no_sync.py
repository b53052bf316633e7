"""Between log lines a training step copies nothing to the host."""
import pytest
from fastai.callback.core import Callback
from torch.utils._python_dispatch import TorchDispatchMode

from mae_nb.data.datasets import load_source
from mae_nb.data.loader import get_dls
from mae_nb.model.classifier import create_classifier
from mae_nb.model.mae import create_mae
from mae_nb.tasks.finetune import finetune_learner
from mae_nb.tasks.pretrain import pretrain_learner
from mae_nb.training.presets import RECIPES
from mae_nb.training.progress import Progress
from mae_nb.training.recipes import override


class Counter(TorchDispatchMode):
    "Counts what would make a GPU wait: numbers fetched, and shapes that hang on values."
    def __init__(self): super().__init__(); self.seen = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ('_local_scalar_dense', 'nonzero', 'masked_select', 'unique_dim', '_unique2', 'equal'): self.seen.append(func)
        return func(*args, **(kwargs or {}))

class Watch(Callback):
    "Counts over whole steps, from batch to batch, and leaves out those in which a log line is due."
    order = -100
    def __init__(self): self.counts = {}
    def before_batch(self):
        if self.training: self.mode = Counter(); self.mode.__enter__()

class Unwatch(Callback):
    order = 100
    def after_batch(self):
        if self.training: self.watch.mode.__exit__(None, None, None); self.watch.counts[self.train_iter] = list(self.watch.mode.seen)

EVERYTHING = dict(mixup=.8, cutmix=1., erase=.25, ema=.9, clip=1., accumulate=2, batch_size=20)   # what Table 11 and more can ask for

@pytest.mark.parametrize('task', ['pretrain', 'finetune', 'everything'])
def test_no_copy_between_log_lines(task):
    train, test = load_source('fashion')
    more = dict(pretrain={}, finetune=dict(drop_path=.1), everything=dict(drop_path=.1) | EVERYTHING)[task]
    recipe = override(RECIPES['pretrain_fashion' if task == 'pretrain' else 'finetune_fashion'], dict(batch_size=10, epochs=1, warmup_epochs=0, amp=True) | more)
    dls = get_dls((train.shots(50), None), recipe, img_size=28, bs=10)
    if task == 'pretrain': learn = pretrain_learner(dls, create_mae('mae_vit_nano_patch4_28', in_chans=1, target='pixels'), recipe, cbs=[Watch(), Unwatch()])
    else: learn = finetune_learner(dls, create_classifier('mae_vit_nano_patch4_28', 10, in_chans=1, drop_path=.1), recipe, cbs=[Watch(), Unwatch()])
    learn.fit_recipe()
    counts = learn.watch.counts
    assert len(counts) == 50
    assert {step: seen for step, seen in counts.items() if seen and step % Progress.every} == {}
    assert any(counts[step] for step in (20, 40))   # the watch sees: a log line does fetch the loss
