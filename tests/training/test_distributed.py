"""Several processes train the model that one would have trained, and end together whatever happens.

Two of them here, and four in a run that goes on with others; every task with four, and compiled models:
`pytest -m slow tests/training/test_distributed.py`."""
import os
import signal
import time
from functools import partial, partialmethod
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from fastai.callback.core import Callback
from ranks import assert_same_metrics, results, spread, starter
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.functional import cross_entropy

from mae_nb.base.keyed import seeded
from mae_nb.base.processes import gather_values, processes, rank, sum_over_processes
from mae_nb.data.datasets import fashion
from mae_nb.data.loader import get_dls, loader_batch
from mae_nb.model.classifier import create_classifier
from mae_nb.model.mae import create_mae
from mae_nb.tasks.finetune import finetune_learner, partial_learner
from mae_nb.tasks.pretrain import pretrain_learner
from mae_nb.tasks.probes import linear_probe_learner
from mae_nb.training.distributed import PARALLEL
from mae_nb.training.presets import RECIPES
from mae_nb.training.recipes import override
from mae_nb.training.runs import make_run
from mae_nb.training.state import newest_checkpoint, whole_tensor
from mae_nb.training.switches import compile_model

pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='forks processes, which Windows cannot')
SMALL, NAME = dict(in_chans=1, dim=32, depth=2, num_heads=2), 'mae_vit_nano_patch4_28'

# ---- the same training, in whichever number of processes ------------------------------------------------------------

def double(x): return x.double() if torch.is_tensor(x) and x.is_floating_point() else x

class Double(Callback):
    "Train in float64, so that differences do not drown in rounding."
    order = -6
    def before_batch(self): self.learn.xb = tuple(map(double, self.xb))

class CountReduces(Callback):
    """Count how often gradients travel: DDP's all-reduces; with FSDP the batches after which
    the weights' parts have a gradient."""
    order, count = 91, 0
    def before_train(self):
        if self.epoch == 0 and hasattr(self.learn, 'parallel'):
            self.parallel.wrapped.register_comm_hook(self, self.hook)

    @staticmethod
    def hook(self, bucket):
        self.count += 1
        return allreduce_hook(None, bucket)

    def after_backward(self):
        if hasattr(self.learn, 'sharded'):
            self.count += any(p.grad is not None for p in self.model.parameters())

OPTIONS = {
    'pretrain': dict(accumulate=2, clip=1.),
    'finetune': dict(accumulate=2, ema=.9, drop_path=.1, mixup=0, cutmix=0),
    'partial': dict(accumulate=2, ema=.9, drop_path=.1, mixup=0, cutmix=0),
    'linear': {},
}
LEARNERS = dict(pretrain=pretrain_learner, finetune=finetune_learner, partial=partial_learner,
                linear=linear_probe_learner)

def learner(task, out=None, steps=20, cbs=(), **kwargs):
    "220 samples in batches of 20, two for each step: eleven batches, so an epoch's last step has one."
    train, test = fashion()
    options = dict(epochs=4, warmup_epochs=1, batch_size=40) | OPTIONS[task]
    r = override(RECIPES[f'{task}_fashion'], options)
    sets = train.take(range(220)), test.take(range(51))
    dls = get_dls(sets, r, img_size=28, bs=loader_batch(r, processes()), device='cpu')
    if task in ('pretrain', 'linear'):
        model = seeded(0, create_mae, NAME, target='pixels', decoder_dim=32, **SMALL)
    else:
        model = seeded(0, create_classifier, NAME, 10, drop_path=.1, **SMALL)
    learn = LEARNERS[task](dls, model.double(), r, out=out, max_steps=steps, cbs=[Double(), *cbs], **kwargs)
    if task != 'pretrain':   # the recipe's own loss rounds to float32
        learn.loss_func = lambda logits, _, labels: cross_entropy(
            logits, labels, label_smoothing=r.label_smoothing * torch.is_grad_enabled())
    return learn

def trained(task, out=None, change_model=lambda m: None, parallel='ddp'):
    "Weights, the metrics of each epoch, those of a validation afterwards, and how often gradients were reduced."
    torch.set_default_dtype(torch.float64)
    counts = [CountReduces()] if processes() > 1 else []
    learn = learner(task, out, cbs=counts, parallel=parallel)
    change_model(learn.model)
    learn.fit_recipe()
    rows, batches = [[float(v) for v in row] for row in learn.recorder.values], learn.train_iter
    again = [float(v) for v in learn.validate()]
    state = {k: whole_tensor(v).clone() for k, v in learn.model.state_dict().items()}
    opt = learn.opt.opt
    steps = opt.state[opt.param_groups[0]['params'][0]].get('step')
    reduces = counts[0].count if counts else 0
    return SimpleNamespace(state=state, rows=rows, again=again, batches=batches, steps=steps, reduces=reduces)

def assert_near(a, b, tolerance=1e-9):
    near = partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)
    for name, t in a.state.items():
        near(t, b.state[name], msg=lambda text, name=name: f'{name}: {text}')
    near(torch.tensor(a.rows), torch.tensor(b.rows))
    near(torch.tensor(a.again), torch.tensor(b.again))

TASKS = 'pretrain', 'finetune', 'partial'

@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    "What one process makes of each task."
    return results(spread(1, lambda: {t: trained(t) for t in TASKS}, tmp_path_factory.mktemp('alone')))[0]

@pytest.mark.parametrize('n, parallel', [
    *[(2, parallel) for parallel in PARALLEL],
    *[pytest.param(4, parallel, marks=pytest.mark.slow) for parallel in PARALLEL],
])
def test_many_processes_train_what_one_does(alone, tmp_path, n, parallel):
    "Float64, 20 steps of two batches, to 1e-9: weights and, on 51 samples, metrics; gradients travel once a step."
    for got in results(spread(n, lambda: {t: trained(t, parallel=parallel) for t in TASKS}, tmp_path)):
        for t in TASKS:
            assert_near(alone[t], got[t])
            assert alone[t].batches == got[t].batches == 37 and got[t].steps == 20
            assert got[t].reduces == 20, (t, got[t].reduces)

def compiled(model, how):
    "`compile_model` with a backend that needs no compiler."
    with patch.object(nn.Module, 'compile', partialmethod(nn.Module.compile, backend='aot_eager')):
        compile_model(model, how)

@pytest.mark.slow
@pytest.mark.parametrize('parallel', PARALLEL)
@pytest.mark.parametrize('how', ['blocks', 'whole'])
def test_compiled_models_train_as_eager_ones(alone, tmp_path, how, parallel):
    make = lambda: trained('pretrain', change_model=lambda m: compiled(m, how), parallel=parallel)
    for got in results(spread(2, make, tmp_path)):
        assert_near(alone['pretrain'], got)
        assert got.reduces == 20

@pytest.mark.slow
@pytest.mark.parametrize('parallel', PARALLEL)
def test_a_frozen_encoder(tmp_path, parallel):
    make = lambda: trained('pretrain', change_model=lambda m: m.encoder.requires_grad_(False), parallel=parallel)
    once, = results(spread(1, make, tmp_path/'one'))
    for got in results(spread(2, make, tmp_path/'two')):
        assert_near(once, got)
        assert got.reduces == 20

def test_a_batch_norm_sees_its_own_part_and_the_first_one_counts(tmp_path):
    "The linear probe: equal weights in all processes, averages of the first, exact metrics for them."
    first, second = results(spread(2, lambda: trained('linear', make_run(tmp_path/'run', {})), tmp_path/'two'))
    assert_near(first, second, 0)
    assert first.rows[-1][1:] == pytest.approx(first.again, abs=1e-12)
    def measure():
        torch.set_default_dtype(torch.float64)
        learn = learner('linear')
        learn.model.load_state_dict(first.state)
        return [float(v) for v in learn.validate()]
    assert results(spread(1, measure, tmp_path/'one'))[0] == pytest.approx(first.again, abs=1e-9)
    alone = results(spread(1, lambda: trained('linear'), tmp_path/'alone'))[0]
    # near, and no more: batches of 20 were normed, not of 40
    assert first.rows[-1][0] == pytest.approx(alone.rows[-1][0], rel=.2)

def test_sums_are_over_all_and_the_empty_handed_take_part(tmp_path):
    def sums():
        total = sum_over_processes(torch.tensor(rank() + 1.), 0 if rank() else 3).tolist()
        return total, gather_values(rank() or None)
    assert results(spread(3, sums, tmp_path)) == [([6., 3.], [None, 1, 2])] * 3

# ---- what a run leaves, and how it resumes --------------------------------------------------------------------------

class Leave(Callback):
    "Fail behind the checkpoint of a batch."
    order = 66
    def __init__(self, batch): self.batch = batch
    def after_batch(self):
        if self.training and self.train_iter == self.batch:
            raise EOFError('enough for now')

def go_on(out, leave, parallel):
    "Train until a batch, or to the end, from where the folder stops."
    torch.set_default_dtype(torch.float64)
    out = make_run(out, {}, resume=True)
    learner('finetune', out, cbs=[Leave(leave)], parallel=parallel, save_every=1).fit_recipe()

def test_a_run_goes_on_with_other_processes(tmp_path):
    "Cut over four processes, copied in two, cut over two from before a validation, alone: the files are one process's."
    run, once = tmp_path/'run', tmp_path/'once'
    for i, (n, parallel, leave) in enumerate([(4, 'fsdp', 8), (2, 'ddp', 22), (2, 'fsdp', 30), (1, 'ddp', None)]):
        for r in spread(n, partial(go_on, run, leave, parallel), tmp_path/f'{i}'):
            assert r.code == (leave is not None) and ('enough for now' in r.output) == (leave is not None), r.output
    results(spread(1, lambda: go_on(once, None, 'ddp'), tmp_path/'say'))
    (_, a, config), (_, b, same) = (newest_checkpoint(folder/'checkpoints') for folder in (run, once))
    assert config['run']['step'] == same['run']['step'] == 37 and a.keys() == b.keys()
    for name in [name for name in a if not name.startswith('table.')]:   # tables are compared below
        first, second = a[name], b[name]
        torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f'{name}: {text}')
    assert_same_metrics(run, once, 1e-9)
    a, b = (load_file(folder/'model.safetensors') for folder in (run, once))
    assert a.keys() == b.keys() and all(torch.allclose(v, b[k], rtol=1e-9, atol=1e-9) for k, v in a.items())

def spoil(learn, batches):
    "Make the last process's loss in some batches infinite."
    class Spoil(Callback):
        order, run_valid = 5, False
        def after_loss(self):
            if self.train_iter in batches and rank() == processes() - 1:
                self.learn.loss_grad = self.loss_grad * float('inf')
    learn.add_cb(Spoil())

def whole_state(model): return {k: whole_tensor(v).clone() for k, v in model.state_dict().items()}

def test_what_a_cut_model_leaves(tmp_path):
    """The weights' file is the average's; afterwards one process alone may use the model,
    and a second fit goes on, as watchful as the first."""
    def train():
        torch.set_default_dtype(torch.float64)
        learn = learner('finetune', make_run(tmp_path/'run', {}), steps=4, parallel='fsdp')
        learn.fit_recipe()
        first, images = rank() == 0, torch.rand(2, 1, 28, 28)
        file = load_file(tmp_path/'run'/'model.safetensors') if first else None
        with torch.no_grad():
            one = learn.model.eval()(images) if first else None
        average, weights = whole_state(learn.weight_ema.average.module), whole_state(learn.model)
        spoil(learn, {1})
        learn.fit(1, lr=1e-3)
        return SimpleNamespace(skipped=int(learn.guard.skipped), images=images, file=file, one=one, average=average,
                               weights=weights, moved=whole_state(learn.model))
    first, second = results(spread(2, train, tmp_path/'say'))
    assert (first.skipped, second.skipped) == (1, 1)
    model = seeded(0, create_classifier, NAME, 10, drop_path=.1, **SMALL).double().eval()
    model.load_state_dict(first.weights)
    with torch.no_grad():
        torch.testing.assert_close(model(first.images), first.one)
    assert first.file.keys() == first.average.keys()
    assert all(torch.equal(v, first.average[k]) for k, v in first.file.items())
    assert all(torch.equal(v, second.moved[k]) for k, v in first.moved.items())
    assert not torch.equal(first.moved['head.weight'], first.weights['head.weight'])

# ---- when something goes wrong in one of them -----------------------------------------------------------------------

@pytest.mark.parametrize('parallel', PARALLEL)
def test_a_bad_gradient_of_one_is_skipped_by_all(tmp_path, parallel):
    "Then too many in a row end the run, and leave the state before them."
    def train():
        torch.set_default_dtype(torch.float64)
        learn = learner('pretrain', make_run(tmp_path/'run', {}), parallel=parallel)
        learn.guard.patience = 2
        spoil(learn, {2, 8, 9, 10, 11, 12, 13})
        learn.fit_recipe()
    first, second = spread(2, train, tmp_path/'say')
    reason = '2 steps in a row had a loss or gradient that is not a number'
    assert first.code == second.code == 1 and reason in first.output, first.output
    line = 'epoch 0, batch 3: loss or gradient is not a number, the step is skipped (1 so far)'
    assert line in first.output and 'skipped' not in second.output
    bad, = (tmp_path/'run'/'bad_steps').iterdir()
    _, tensors, _ = newest_checkpoint(bad/'checkpoints')
    assert all(v.isfinite().all() for v in tensors.values() if v.is_floating_point())
    assert tensors['opt.encoder.cls_token.step'] == 3   # the second step of four was skipped, then came the two

class InLast(Callback):
    "Do something in the last process, in the middle of a step of the first epoch."
    order = 5
    def __init__(self, action): self.action = action
    def after_pred(self):
        if self.training and self.iter == 4 and rank() == processes() - 1:
            self.action()

def fail(): raise OSError('the disk of the last one is on fire')
def die(): os.kill(os.getpid(), signal.SIGKILL)

@pytest.mark.parametrize('parallel', PARALLEL)
@pytest.mark.parametrize('action, code, message', [(die, -9, ''), (fail, 1, 'the disk of the last one is on fire')],
                         ids=['killed', 'error'])
def test_one_that_ends_takes_the_others_along(tmp_path, action, code, message, parallel):
    start = time.time()
    def train():
        learner('pretrain', make_run(tmp_path/'run', {}), cbs=[InLast(action)], parallel=parallel).fit_recipe()
    *others, last = spread(4, train, tmp_path/'say', 60)
    assert time.time() - start < 30
    assert last.code == code and message in last.output
    assert all(r.code == 1 and 'another process has ended' in r.output for r in others), [r.output for r in others]

def test_an_error_before_the_first_step(tmp_path):
    "The last one does not come as far as the run folder."
    def begin():
        if rank() == 1:
            raise FileNotFoundError('no weights on this machine')
        learner('pretrain', make_run(tmp_path/'run', {})).fit_recipe()
    start = time.time()
    first, second = spread(2, begin, tmp_path/'say', 60)
    assert first.code == second.code == 1 and time.time() - start < 30
    assert 'no weights on this machine' in second.output and 'another process has ended' in first.output

def test_all_learn_that_a_run_folder_is_taken(tmp_path):
    (tmp_path/'run').mkdir()
    (tmp_path/'run'/'mine').touch()
    for r in spread(2, lambda: make_run(tmp_path/'run', {}), tmp_path/'say', 60):
        assert r.code == 1 and 'exists already and is not empty' in r.output

def test_a_full_disk_of_the_one_that_writes(tmp_path, monkeypatch):
    def full(*_): raise OSError(28, 'No space left on device')
    monkeypatch.setattr('mae_nb.training.checkpoints.save_checkpoint', full)
    start = time.time()
    train = lambda: learner('pretrain', make_run(tmp_path/'run', {})).fit_recipe()
    first, second = spread(2, train, tmp_path/'say', 60)
    assert first.code == second.code == 1 and time.time() - start < 30
    assert 'no space left on the disk for a checkpoint' in first.output

def test_processes_that_would_go_on_from_different_steps_are_stopped(tmp_path):
    "Two machines without a common disk: only the first one has its run."
    begin = lambda: learner('pretrain', make_run(tmp_path/'0', {}), steps=3).fit_recipe()
    results(spread(1, begin, tmp_path/'before'))
    (tmp_path/'0'/'checkpoints'/'fit-1.done').unlink()
    def resume():
        make_run(tmp_path/'0', {}, resume=True)
        learner('pretrain', tmp_path/f'{rank()}', steps=3).fit_recipe()
    for r in spread(2, resume, tmp_path/'say', 60):
        assert r.code == 1 and 'do not start at the same step' in r.output, r.output

def test_bad_files_end_all_with_one_line(photos, tmp_path, monkeypatch):
    "Whichever process meets too many of them reports it."
    monkeypatch.chdir(tmp_path)
    for i in range(5, 45, 2):
        (photos/'odd'/f'{i:03}.png').write_bytes(b'garbage')
    words = ('--model', 'mae_vit_nano_patch4_32', '--set', 'amp=False', '--set', 'warmup_epochs=1',
             '--num-workers', '0', '--epochs', '2', '--bs', '20')
    start, runs = time.time(), spread(2, starter('mae-pretrain', 'photos', *words), tmp_path/'say', 60)
    assert time.time() - start < 30 and [r.code for r in runs] == [1, 1]
    line = 'could not be read, more than 1%'
    assert any('mae-pretrain: error: ' in r.output and line in r.output for r in runs), [r.output for r in runs]
