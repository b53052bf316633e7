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

WAITING = '_local_scalar_dense', 'nonzero', 'masked_select', 'unique_dim', '_unique2', 'equal'

class Counter(TorchDispatchMode):
    "Counts what would make a GPU wait: numbers fetched, and shapes that depend on values."
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in WAITING:
            self.seen.append(func)
        return func(*args, **(kwargs or {}))

class Watch(Callback):
    "Counts over whole training steps, from batch to batch."
    order, run_valid = -100, False
    def __init__(self): self.counts = {}
    def before_batch(self):
        self.mode = Counter()
        self.mode.__enter__()

class Unwatch(Callback):
    "Ends the count of a step."
    order, run_valid = 100, False
    def after_batch(self):
        self.watch.mode.__exit__(None, None, None)
        self.watch.counts[self.train_iter] = list(self.watch.mode.seen)

# the last one: what Table 11 and more can ask for
MORE = {
    'pretrain': {},
    'finetune': dict(drop_path=.1),
    'everything': dict(drop_path=.1, mixup=.8, cutmix=1., erase=.25, ema=.9, clip=1., accumulate=2, batch_size=20),
}

@pytest.mark.parametrize('task', MORE)
def test_no_copy_between_log_lines(task):
    train, _ = load_source('fashion')
    kind = 'pretrain' if task == 'pretrain' else 'finetune'
    options = dict(batch_size=10, epochs=1, warmup_epochs=0, amp=True) | MORE[task]
    recipe = override(RECIPES[f'{kind}_fashion'], options)
    dls = get_dls((train.shots(50), None), recipe, img_size=28, bs=10)
    if kind == 'pretrain':
        make, model = pretrain_learner, create_mae('mae_vit_nano_patch4_28', in_chans=1, target='pixels')
    else:
        make, model = finetune_learner, create_classifier('mae_vit_nano_patch4_28', 10, in_chans=1, drop_path=.1)
    learn = make(dls, model, recipe, cbs=[Watch(), Unwatch()])
    learn.fit_recipe()
    counts = learn.watch.counts
    assert len(counts) == 50
    assert {step: seen for step, seen in counts.items() if seen and step % Progress.every} == {}
    assert any(counts[step] for step in (20, 40))   # the watch works: a log line does fetch the loss
