"""A checkpoint holds its own step, whenever the writer reads the state.

The writer is held back: of each save it reads some tensors at once, and the others only when somebody waits for the
file, which is two optimizer steps later, after a validation, or at the end. Each file must have the bytes that the
safetensors library makes of a copy of the whole state, taken when the save began.
"""
import concurrent.futures
import contextlib
import errno
import io
import json
import threading
from functools import partial
from types import MethodType

import numpy as np
import pytest
import safetensors.torch
import tiny_runs
import torch
from fastai.callback.core import Callback
from tiny_runs import NANO, OPTIONS, TINY, check_same, learner, sets, step_in_name
from torch import nn

from mae_nb.base.keyed import seeded
from mae_nb.data.loader import get_dls
from mae_nb.model.mae import create_mae
from mae_nb.tasks.masks import MaskSet
from mae_nb.tasks.probes import attentive_probe_learner
from mae_nb.tasks.segment import mask_dls, segment_learner
from mae_nb.tasks.segmenters import create_segmenter
from mae_nb.training import state
from mae_nb.training.checkpoints import Checkpoints
from mae_nb.training.presets import RECIPES
from mae_nb.training.recipes import override
from mae_nb.training.runs import make_run
from mae_nb.training.state import Snapshot, is_known, same_bits

# ---- runs of each kind ---------------------------------------------------------------------------------------------

KEPT = dict(save_every=2, keep=99)
FEW = dict(batch_size=20, warmup_epochs=1, epochs=3)   # 60 images: three steps an epoch

def trained(task, out, more=(), **kwargs):
    more = FEW | (dict(more, accumulate=2) if task in ('pretrain', 'finetune') else {})
    return learner(task, out, more=more, **KEPT | kwargs)

def attentive(out, **kwargs):
    recipe = override(RECIPES['attentive_fashion'], dict(FEW, queries=4))
    model = seeded(0, create_mae, NANO, target='pixels', decoder_dim=32, **TINY)
    dls = get_dls(tiny_runs.sets(), recipe, img_size=28, bs=20, num_workers=0)
    return attentive_probe_learner(dls, model, recipe, out=make_run(out, {}), **KEPT | kwargs)

def segmentation(out, **kwargs):
    "With batch norms in the head, whose buffers move in each forward pass."
    draw = np.random.default_rng(0)
    pixels, masks = (draw.integers(0, n, (24, 16, 16, *c), dtype=np.uint8) for n, c in ((255, (3,)), (3, ())))
    images = MaskSet('noise', pixels, classes=['a', 'b', 'c'], masks=masks)
    recipe = override(RECIPES['segment_small'], dict(FEW, batch_size=8, ema=.9))
    model = seeded(0, create_segmenter, 'mae_vit_nano_patch4_28', 3, 'pyramid', img_size=16, dim=16, depth=4,
                   num_heads=2, in_chans=3)
    dls = mask_dls((images, images.take(range(4))), recipe, img_size=16, num_workers=0)
    return segment_learner(dls, model, recipe, out=make_run(out, {}), **KEPT | kwargs)

KINDS = {
    'pretrain': partial(trained, 'pretrain', more=dict(clip=1.)),
    'finetune': partial(trained, 'finetune', more=dict(clip=.1)),
    'linear': partial(trained, 'linear'),
    'attentive': attentive,
    'segment': segmentation,
}
assert OPTIONS['finetune']['ema']

@pytest.fixture(autouse=True)
def few(monkeypatch):
    train, test = sets()
    monkeypatch.setattr(tiny_runs, 'sets', lambda: (train.take(range(60)), test.take(range(10))))

# ---- the writer is held --------------------------------------------------------------------------------------------

class Held:
    "Holds the writer of each save back after some reads, until somebody waits for it; what the files should be."
    def __init__(self, monkeypatch, reads=0):
        self.reads, self.count, self.files, self.rests, self.live = reads, 0, {}, [], []
        self.open, self.reached = threading.Event(), threading.Event()
        for owner, name in ((Checkpoints, 'state'), (Checkpoints, 'save'), (Checkpoints, 'wait'), (Snapshot, 'read'),
                            (Snapshot, 'settle')):
            monkeypatch.setattr(owner, name, self.around(getattr(owner, name), getattr(self, name)))

    def around(self, plain, own):
        "A method that calls ours with the plain one."
        return lambda *args, **kwargs: own(plain, *args, **kwargs)

    def state(self, plain, cb, in_parts=False):
        step, snapshot, config = plain(cb, in_parts)
        whole = {name: t.clone() for name, t in (snapshot.live | snapshot.copies).items()}
        note = json.dumps(config | dict(step=step), sort_keys=True)
        self.files[step] = safetensors.torch.save(whole, {'config': note})
        self.live.append(len(snapshot.live))
        self.count = 0
        self.open.clear()
        self.reached.clear()
        return step, snapshot, config

    def save(self, plain, cb):
        plain(cb)
        assert self.reached.wait(60)

    def wait(self, plain, cb):
        self.open.set()
        plain(cb)

    def read(self, plain, snapshot, name, buffer):
        if self.count >= self.reads:
            self.reached.set()
            assert self.open.wait(60)
        self.count += 1
        return plain(snapshot, name, buffer)

    def settle(self, plain, snapshot):
        rest = plain(snapshot)
        self.rests.append(rest)
        return rest

def known(callback):
    "Let a callback of this file pass for one of the package, before which nothing is settled."
    callback.__module__ = 'mae_nb.training.test'
    return callback

def train(kind, out, cbs=(), change=None, **kwargs):
    "Nine optimizer steps of a run, in three epochs: its output."
    with contextlib.redirect_stdout(io.StringIO()) as log:
        learn = KINDS[kind](out, cbs=[*cbs], **kwargs)
        if change:
            change(learn)
        learn.fit_recipe()
    return log.getvalue()

def kinds(fast):
    "All kinds of runs, of which one is always tested."
    return [kind if kind == fast else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]

def files_of(out): return {step_in_name(f): f.read_bytes() for f in (out/'checkpoints').glob('step-*.safetensors')}

@known
class Poison(Callback):
    "Infinite gradients in some steps: the guard skips them."
    order, run_valid = 8, False
    def after_backward(self):
        if self.train_iter in (5, 6, 11):
            next(p.grad for p in self.model.parameters() if p.grad is not None).view(-1)[0] = float('inf')

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('reads', [9, pytest.param(0, marks=pytest.mark.slow)])
def test_each_file_is_of_its_step(kind, reads, tmp_path, monkeypatch):
    held, learners = Held(monkeypatch, reads), []
    train(kind, tmp_path/'run', change=learners.append)
    assert all(map(is_known, learners[0].cbs))   # none has them settled before the step
    assert len(held.files) == 6 and files_of(tmp_path/'run') == held.files
    assert min(held.live) > reads and sum(rest > 0 for rest in held.rests) >= 3   # they were left to the next step

@pytest.mark.parametrize('kind', kinds(fast='finetune'))
def test_skipped_steps(kind, tmp_path, monkeypatch):
    held = Held(monkeypatch, 5)
    log = train(kind, tmp_path/'run', [Poison()])
    assert files_of(tmp_path/'run') == held.files and 'the step is skipped' in log and max(held.rests) > 0

@pytest.mark.parametrize('kind', kinds(fast='pretrain'))
def test_without_the_hook_files_are_wrong(kind, tmp_path, monkeypatch):
    "These tests see a change that comes too early."
    monkeypatch.setattr(Checkpoints, 'settle', lambda *_: None)
    held = Held(monkeypatch)
    train(kind, tmp_path/'run')
    assert files_of(tmp_path/'run') != held.files

# ---- code from elsewhere -------------------------------------------------------------------------------------------

class Shrink(Callback):
    "Changes weights between two steps, as torch does not count it."
    run_valid = False
    def before_batch(self):
        for p in self.model.parameters():
            p.data.mul_(.999)

class ShrinkingLinear(nn.Linear):
    "Changes its weight in the forward pass."
    def forward(self, x):
        self.weight.data.mul_(.999)
        return super().forward(x)

def shrinking(learn): learn.model.decoder.pred.__class__ = ShrinkingLinear

class Hooks(Callback):
    "Puts a function into the backward pass, which changes a weight as torch does not count it, and is done."
    def before_fit(self):
        bias = self.model.decoder.pred.bias
        def shrink(_):
            bias.data.mul_(.999)
        bias.register_hook(shrink)

class NewOptimizer(Callback):
    "Makes another optimizer in the second epoch."
    def before_epoch(self):
        if self.epoch == 1:
            self.learn.create_opt()

def replaced(learn):
    "A callback of the package, of which one method is another."
    learn.standardize.after_pred = lambda: Shrink.before_batch(learn.standardize)

def unhooked(learn):
    "An optimizer whose step calls no hooks."
    learn.create_opt()
    learn.opt.opt.step = MethodType(type(learn.opt.opt).step.__wrapped__, learn.opt.opt)

OTHERS = dict(callback=([Shrink], None), module=([], shrinking), hook=([Hooks], None), optimizer=([NewOptimizer], None),
              method=([], replaced), step=([], unhooked))

@pytest.mark.parametrize('name', OTHERS)
def test_other_code_may_change_weights_at_any_time(name, tmp_path, monkeypatch):
    "Before a callback the state is settled; with such a module or hook all is copied at once."
    cbs, change = OTHERS[name]
    held = Held(monkeypatch)
    train('pretrain', tmp_path/'run', [cb() for cb in cbs], change)
    assert files_of(tmp_path/'run') == held.files and (max(held.live) == 0) == (name in ('module', 'hook'))

@known
class Disguised(Callback):
    "Changes a weight between two steps, once, in spite of the rule."
    run_valid = False
    @torch.no_grad()
    def before_batch(self):
        if self.train_iter == 4:   # the first checkpoint is of the first four batches
            self.model.decoder.pred.bias.add_(1.)

def test_a_change_against_the_rule_is_no_checkpoint(tmp_path, monkeypatch):
    "The file is left out and the next ones are copied at once."
    held = Held(monkeypatch)
    log = train('pretrain', tmp_path/'run', [Disguised()])
    assert log.count('model.decoder.pred.bias was changed before it was saved') == 1
    del held.files[4]
    assert files_of(tmp_path/'run') == held.files and held.live[0] > 0 and not any(held.live[1:])

@known
class Fail(Callback):
    "An error in the forward pass after a save."
    run_valid = False
    def before_batch(self):
        if self.train_iter == 4:
            raise RuntimeError('out of memory')

def test_an_error_before_the_next_step_leaves_the_whole_file(tmp_path, monkeypatch):
    held = Held(monkeypatch)
    with pytest.raises(RuntimeError, match='out of memory'):
        train('finetune', tmp_path/'run', [Fail()])
    assert held.files and files_of(tmp_path/'run') == held.files and not any(held.rests)

# ---- who waits for a save ------------------------------------------------------------------------------------------

def test_nothing_is_copied_for_a_save_that_has_failed(tmp_path, monkeypatch):
    "On a full disk a run that continues pays for no copies."
    def full(*_): raise OSError(errno.ENOSPC, 'No space left on device')
    def save(cb, plain=Checkpoints.save):
        plain(cb)
        concurrent.futures.wait([cb.job])
    rests = []
    def settle(snapshot, plain=Snapshot.settle): rests.append(plain(snapshot))
    monkeypatch.setattr(state, 'write_tensors', full)
    monkeypatch.setattr(Checkpoints, 'save', save)
    monkeypatch.setattr(Snapshot, 'settle', settle)
    log = train('pretrain', tmp_path/'run', if_full='continue')
    assert log.count('training continues without') == 6 and not any(rests)

def test_the_weights_are_the_user_s_after_a_second_ctrl_c(tmp_path, monkeypatch):
    "It ends the wait for a save whose thread still writes: neither the user nor the next fit changes what is written."
    train('pretrain', tmp_path/'straight')
    is_open, read, result = threading.Event(), Snapshot.read, concurrent.futures.Future.result

    def press(*_): raise KeyboardInterrupt
    def open_and_wait(future, timeout=None): return is_open.set() or result(future, timeout)

    monkeypatch.setattr(Snapshot, 'read', lambda *args: is_open.wait(300) and read(*args))
    with contextlib.redirect_stdout(io.StringIO()):
        learn = KINDS['pretrain'](tmp_path/'run', cbs=[fail := Fail()])
        with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
            patch.setattr(concurrent.futures.Future, 'result', press)
            learn.fit_recipe()
        for p in learn.model.parameters():
            p.data.mul_(.5)
        assert not files_of(tmp_path/'run')
        learn.remove_cb(fail)
        monkeypatch.setattr(concurrent.futures.Future, 'result', open_and_wait)
        learn.fit_recipe()
    assert learn.checkpoints.snapshot is None and not learn.checkpoints.copies   # nor is their memory kept
    check_same(tmp_path/'run', tmp_path/'straight')
    files = [next((tmp_path/name/'checkpoints').glob('step-*4-*')) for name in ('run', 'straight')]
    first, expected = (safetensors.torch.load_file(file) for file in files)
    assert all(same_bits(first[name], expected[name]) for name in first if name != 'table.timing.csv')

# ---- the snapshot alone --------------------------------------------------------------------------------------------

@pytest.mark.parametrize('reads', range(0, 21, 4))
def test_a_writer_and_a_step_at_the_same_time(reads):
    "Tensors are changed as soon as they are settled, while another thread reads them."
    before = {f't{i}': torch.full((500,), float(i)) for i in range(20)}
    for _ in range(20):
        live, seen, reached = {name: t.clone() for name, t in before.items()}, {}, threading.Event()
        snapshot, buffer = Snapshot(live, steady=live), torch.empty(2000, dtype=torch.uint8)

        def read(snapshot=snapshot, buffer=buffer, seen=seen, reached=reached):
            for i, name in enumerate(before):
                if i == reads:
                    reached.set()
                seen[name] = snapshot.read(name, buffer).clone()
            reached.set()

        reader = threading.Thread(target=read)
        reader.start()
        reached.wait(60)
        snapshot.settle()
        for t in live.values():
            t.neg_()
        reader.join(60)
        assert snapshot.changed is None and all(same_bits(seen[name], t) for name, t in before.items())
