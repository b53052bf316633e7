"""MAE's rivals: first losses, gradients, teachers, exact resumption, and agreement with lightly's own code."""
import math
import os
import signal
import sys
from dataclasses import replace
from functools import cache

import pytest
import torch
from fastai.callback.core import Callback
from support import exit_code, fork
from torch.nn import functional as F

from mae_nb.base.errors import MissingPackage, UsageError
from mae_nb.data.datasets import load_source
from mae_nb.data.loader import get_dls
from mae_nb.model.costs import known_flops
from mae_nb.tasks.colours import ColourViews
from mae_nb.tasks.rival_recipes import RIVALS, rival_recipe
from mae_nb.tasks.rivals import rival_learner, rival_model
from mae_nb.tasks.view_rivals import DINO, contrast, half_cosine
from mae_nb.training.runs import make_run
from mae_nb.training.state import newest_checkpoint, same_bits

pytestmark = pytest.mark.filterwarnings('ignore:`torch.nn.utils.weight_norm` is deprecated')
NANO, SIZE = 'mae_vit_nano_patch4_28', dict(dim=32, depth=2, num_heads=2)
SMALL = {
    'dae': {}, 'simmim': dict(drop_path=.1), 'beit': dict(target_size=24, drop_path=.1),
    'moco': dict(hidden=48, out=32, drop_path=.1),
    'dino': dict(hidden=48, bottleneck=64, out=512, local_views=2, drop_path=.1),
    'supervised': dict(drop_path=.1),
}


@cache
def sets():
    train, test = load_source('fashion')
    return train.take(range(80)), test.take(range(20))


def learner(name, workers=0, augment='crop', valid=True, recipe=None, **kwargs):
    "A run of five batches an epoch; the global generator must not matter."
    torch.manual_seed(os.getpid())
    chosen = dict(epochs=3, warmup_epochs=1, batch_size=16) | SMALL[name] | (recipe or {})
    recipe = rival_recipe(name, NANO, **chosen)
    dls = get_dls(sets() if valid else (sets()[0], None), recipe, img_size=28, num_workers=workers)
    return rival_learner(name, dls, NANO, recipe, augment=augment, size=SIZE, **kwargs)


class First(Callback):
    "Keep the first batch's loss and gradients, and end."
    order = 8   # before the step
    def before_step(self):
        self.learn.first_loss = self.learn.loss.item()
        self.learn.first_grads = {n: p.grad.abs().sum().item() for n, p in self.model.named_parameters()
                                  if p.grad is not None}


@pytest.mark.parametrize('name', RIVALS)
def test_the_first_loss_is_the_theory_s_and_reaches_the_whole_encoder(name):
    wide = dict(moco=dict(batch_size=64, out=128), dino=dict(bottleneck=256, out=4096)).get(name, {})
    learn = learner(name, valid=False, recipe=wide, cbs=[First()], max_steps=1)
    learn.fit_recipe()
    imgs = torch.stack([learn.dls.train.dataset[0, i][0] for i in range(80)]).float() / 255
    images = learn.dls.train.dataset.images
    imgs = (imgs - images.mean[0]) / images.std[0]
    variance = 1 / 256   # of the cosine of two directions in 256 dimensions
    theory = {
        'dae': imgs.pow(2).mean().item(), 'simmim': imgs.abs().mean().item(), 'beit': math.log(24),
        'moco': 2 * 2 * .2 * math.log(64), 'supervised': math.log(10),
        # uniform outputs give log K; outputs of that variance, the same for student and teacher, this:
        'dino': math.log(4096) + variance / (2 * .1**2) - variance / (.1 * .04),
    }[name]
    assert learn.first_loss == pytest.approx(theory, rel=.2 if name in ('dae', 'simmim', 'moco') else .05)
    student = 'fast_encoder.' if name == 'dino' else 'encoder.'
    learning = {n for n, p in learn.model.named_parameters() if n.startswith(student) and p.requires_grad}
    assert len(learning) >= 26
    assert {n for n, size in learn.first_grads.items() if size > 0} >= learning


TOY = dict(epochs=6, warmup_epochs=1, batch_size=16, base_lr=2e-2, drop_path=0., clip=0.)


@pytest.mark.parametrize('name', [name for name in RIVALS if name != 'dino'])
def test_the_loss_falls(name):
    learn = learner(name, recipe=TOY, valid=False)
    learn.fit_recipe()
    losses = torch.tensor(list(learn.recorder.losses))
    assert len(losses) == 30
    assert losses[-5:].mean() < losses[:3].mean()
    if name != 'supervised':
        assert learn.spread.values[-1] > .1   # and no collapse makes it fall


def test_dino_s_student_learns_what_its_teacher_says():
    "The loss itself rises at first, while the centre moves; so the first and the last student face the last teacher."
    learn = learner('dino', recipe=TOY, valid=False)
    model = learn.model
    first = {k: v.clone() for k, v in model.state_dict().items() if k.startswith('fast_')}
    learn.fit_recipe()
    assert learn.spread.values[-1] > .1
    images = learn.dls.train.dataset.images
    batch = next(iter(learn.dls.train))[0].float() / 255
    sample = (batch - images.mean[0]) / images.std[0]
    model.eval()
    with torch.no_grad():
        trained = model(sample)[0]
        model.load_state_dict(first, strict=False)
        untrained = model(sample)[0]
    assert trained < untrained - .05


@pytest.mark.parametrize('name', ['moco', 'dino'])
def test_the_teacher_is_the_weighted_sum_of_all_students(name):
    class Students(Callback):
        order = 100
        def before_fit(self):
            self.kept, self.first = [], [slow.detach().clone() for slow in self.parts(1)]
        def parts(self, which):
            return [p for pair in self.model.pairs() for p in pair[which].parameters()]
        def after_step(self):
            self.kept.append([p.detach().clone() for p in self.parts(0)])

    learn = learner(name, cbs=[Students()], max_steps=7, valid=False)
    learn.fit_recipe()
    students = learn.students
    assert len(students.kept) == 7
    momenta = [half_cosine(learn.model.momentum, 1., step / 7) for step in range(7)]
    weights = [(1 - m) * math.prod(momenta[i + 1:]) for i, m in enumerate(momenta)]
    for i, slow in enumerate(students.parts(1)):
        wanted = math.prod(momenta) * students.first[i]
        for weight, kept in zip(weights, students.kept):
            wanted = wanted + weight * kept[i]
        assert torch.allclose(slow, wanted, atol=1e-6)
    assert sum(weights) + math.prod(momenta) == pytest.approx(1)


class Die(Callback):
    "Kill this process after so many batches."
    order = 60
    def __init__(self, batches): self.batches = batches
    def after_batch(self):
        if self.training and self.train_iter == self.batches:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize('name, workers', [('moco', 1), ('dino', 0), ('simmim', 0)])
def test_a_killed_run_resumes_exactly(name, workers, tmp_path):
    def life(folder, *cbs, workers=0):
        out = make_run(tmp_path/folder, dict(task=name), resume=True)
        learner(name, workers, 'crop+colour', out=out, save_every=1, cbs=list(cbs)).fit_recipe()

    pid = fork(lambda: life('killed', Die(8)), tmp_path/'log')
    assert exit_code(pid) == -signal.SIGKILL
    _, before, config = newest_checkpoint(tmp_path/'killed'/'checkpoints')
    assert 5 <= config['run']['step'] < 15
    life('killed', workers=workers)
    life('straight')
    (_, tensors, _), (_, wanted, _) = (newest_checkpoint(tmp_path/f/'checkpoints') for f in ('killed', 'straight'))
    for timed in (tensors, wanted):
        del timed['table.timing.csv']   # the clock's
    assert tensors.keys() == wanted.keys()
    assert [k for k in wanted if not same_bits(tensors[k], wanted[k])] == []
    moved = [k for k in before if k.startswith('model.') and not same_bits(before[k], wanted[k])]
    assert any('slow_' in k or k.startswith('model.encoder.') for k in moved)
    rows = [(tmp_path/f/'metrics.csv').read_text() for f in ('killed', 'straight')]
    assert rows[0] == rows[1]
    assert 'spread' in rows[0].splitlines()[0]


def test_a_missing_extra_is_one_clear_line(monkeypatch):
    for module in [m for m in sys.modules if m.split('.')[0] == 'lightly']:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, 'lightly', None)
    for name in ('moco', 'dino'):
        with pytest.raises(MissingPackage) as caught:
            rival_model(name, NANO, rival_recipe(name, NANO), in_chans=1)
        assert str(caught.value) == 'lightly is not installed: in the folder of mae_nb, pip install -e ".[rivals]"'
    assert {name for name, rival in RIVALS.items() if rival.extra == 'rivals'} == {'moco', 'dino'}
    rival_model('simmim', NANO, rival_recipe('simmim', NANO), in_chans=1)   # the others do without


def test_moco_s_loss_is_lightly_s_with_the_batch_s_other_keys_as_its_memory():
    from lightly.loss import NTXentLoss
    queries, keys = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))
    losses = []
    for i in range(9):
        theirs = NTXentLoss(temperature=.2, memory_bank_size=(8, 16))
        others = torch.cat([keys[:i], keys[i + 1:]])
        theirs.memory_bank.bank = F.normalize(others, dim=1)
        losses.append(theirs(queries[i:i + 1], keys[i:i + 1]))
    assert torch.allclose(contrast(queries, keys, .2), 2 * .2 * torch.stack(losses).mean(), atol=1e-6)


def test_dino_s_loss_is_lightly_s_step_by_step():
    from lightly.loss import DINOLoss

    from mae_nb.model.encoder import Encoder
    model = DINO(Encoder(28, 4, 1, **SIZE), hidden=48, bottleneck=32, out=40, local_views=2, local_side=12)
    theirs = DINOLoss(40, teacher_temp=.04, student_temp=.1, center_momentum=.9)
    dice = torch.Generator().manual_seed(0)
    for _ in range(3):   # the centre moves alike
        student = [torch.randn(6, 40, generator=dice) for _ in range(4)]
        teacher = [torch.randn(6, 40, generator=dice) for _ in range(2)]
        assert torch.equal(model.agreement(teacher, student), theirs(teacher, student))
        assert torch.equal(model.criterion.center, theirs.center)


def test_colours_change_views_and_nothing_else():
    plain, coloured = learner('moco'), learner('moco', augment='crop+colour')
    kinds = [[type(cb).__name__ for cb in learn.cbs] for learn in (plain, coloured)]
    assert 'ColourViews' not in kinds[0]
    assert [k for k in kinds[1] if k != 'ColourViews'] == kinds[0]
    cb = next(cb for cb in coloured.cbs if isinstance(cb, ColourViews))
    assert [colours.blur for _, colours in cb.views] == [1., .1]
    batches = [next(iter(learn.dls.train))[0] for learn in (plain, coloured)]
    assert torch.equal(*batches)
    for a, b in zip(plain.model.state_dict().values(), coloured.model.state_dict().values()):
        assert torch.equal(a, b)


def test_the_engine_counts_all_passes():
    moco, dino, simmim = (learner(name).model for name in ('moco', 'dino', 'simmim'))
    assert known_flops(moco) == moco.step_flops() > 2 * known_flops(simmim)
    assert known_flops(dino) == dino.step_flops() > 2 * known_flops(simmim)


def test_supervised_learns_from_labels_alone():
    train = sets()[0]
    for missing in (dict(labels=None), dict(labels=None, classes=[])):
        recipe = rival_recipe('supervised', NANO, batch_size=16)
        dls = get_dls((replace(train, **missing), None), recipe, img_size=28)
        with pytest.raises(UsageError, match='has no labels'):
            rival_learner('supervised', dls, NANO, recipe, size=SIZE)
