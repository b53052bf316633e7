"""A run is a function of its config and seed, whatever happens to the machine."""
import os
import random
import signal
import sys
import time
import traceback
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from fastai.callback.core import Callback

from mae_nb import checkpoints
from mae_nb.checkpoints import newest_checkpoint
from mae_nb.classifier import create_classifier, seeded
from mae_nb.data import Samples, get_dls, load_source
from mae_nb.engine import RunWriter, make_run
from mae_nb.finetune import finetune_learner
from mae_nb.mae import create_mae
from mae_nb.pretrain import pretrain_learner
from mae_nb.probes import linear_probe_learner
from mae_nb.recipes import RECIPES, change

pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='kills forked processes')

# ---- tiny runs, each life of one in a process of its own ----------------------------------------------------------------------------

@cache
def sets():
    train, test = load_source('fashion')
    return train.take(range(220)), test.take(range(50))

TINY = dict(in_chans=1, dim=32, depth=2, num_heads=2)
RUN = dict(epochs=3, warmup_epochs=1, batch_size=40, accumulate=4)   # 22 batches an epoch, of which the last two make a smaller step

def tiny_mae(): return seeded(0, create_mae, 'mae_vit_nano_patch4_28', target='pixels', decoder_dim=32, **TINY)

def learner(task, out, workers=0, **kwargs):
    "A run that goes on where its folder stops."
    out = make_run(out, dict(task=task), resume=True)
    torch.manual_seed(os.getpid())   # which must not matter
    more = dict(pretrain=dict(RUN, clip=1.), finetune=dict(RUN, ema=.9, mixup=.8, cutmix=1., drop_path=.1, erase=.25), linear=dict(epochs=3, warmup_epochs=1, batch_size=20))[task]
    r = change(RECIPES[f'{task}_fashion'], more)
    dls = get_dls(sets(), r, img_size=28, bs=r.batch_size // more.get('accumulate', 1), num_workers=workers)
    kwargs = dict(save_every=2, out=out) | kwargs
    if task == 'pretrain': return pretrain_learner(dls, tiny_mae(), r, **kwargs)
    if task == 'linear': return linear_probe_learner(dls, tiny_mae(), r, **kwargs)
    return finetune_learner(dls, seeded(0, create_classifier, 'mae_vit_nano_patch4_28', 10, drop_path=.1, **TINY), r, **kwargs)

def start(func, log):
    "Run a function in a fork of this process, and return the fork's number."
    sys.stdout.flush(); sys.stderr.flush()
    if pid := os.fork(): return pid
    code = 1
    try:
        for fd in (1, 2): os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)
        sys.stdout, sys.stderr = os.fdopen(1, 'w'), os.fdopen(2, 'w')
        func()
        code = 0
    except BaseException: traceback.print_exc()
    finally:
        sys.stdout.flush(); sys.stderr.flush()
        os._exit(code)

def end(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])   # negative: the signal that has killed it
def in_fork(func, log): assert end(start(func, log)) == 0, log.read_text()

class Steps(Callback):
    "Append each optimizer step's last batch to a file."
    order, run_valid = 50, False
    def __init__(self, file): self.file = file
    def after_step(self):
        with open(self.file, 'a') as f: f.write(f'{self.train_iter}\n')

def steps_of(file): return [int(x) for x in file.read_text().split()] if file.exists() else []

def live(task, out, steps, moment=None, workers=0, **kwargs):
    "One life of a run: all of it, or until a moment comes."
    killers = moment() if moment else None
    learner(task, out, workers, cbs=[Steps(steps), *(killers or [])], **kwargs).fit_recipe()

def state_of(out):
    "All that a finished run must have in common with another one."
    file, tensors, config = newest_checkpoint(out/'checkpoints')
    run = config['run']
    files = {f: (out/f).read_bytes() for f in ('model.safetensors', 'metrics.csv', *(['classes.csv'] if (out/'classes.csv').exists() else []))}
    return files, tensors, config | dict(run=run | dict(files={k: v for k, v in run['files'].items() if k != 'timing.csv'}))

def check_same(out, straight):
    (files, tensors, config), (files0, tensors0, config0) = state_of(out), state_of(straight)
    assert config == config0 and tensors.keys() == tensors0.keys()
    for k, v in tensors.items(): assert checkpoints._same(v, tensors0[k]), k
    assert any(k.startswith('opt.') for k in tensors)
    for name in files0: assert files[name] == files0[name], name
    assert not list(out.rglob('*.part'))

@pytest.fixture(scope='module')
def straight(tmp_path_factory):
    "The run that nobody disturbs, made once for each task: its folder, and its steps."
    @cache
    def run(task):
        out = tmp_path_factory.mktemp('straight')/task
        in_fork(partial(live, task, out, out.with_suffix('.steps')), out.with_suffix('.log'))
        return out, steps_of(out.with_suffix('.steps'))
    return run

def killed_and_resumed(task, lives, straight, tmp_path, after=None):
    "Kill a run at each life's moment and let the last life finish; prove that each one went on from the newest checkpoint."
    (whole, all_steps), out, again = straight(task), tmp_path/'run', 0
    for i, (moment, workers) in enumerate([*lives, (None, after if after is not None else lives[-1][1])]):
        found, steps, log = newest_checkpoint(out/'checkpoints'), tmp_path/f'{i}.steps', tmp_path/f'{i}.log'
        batches = found[2]['run']['step'] if found else 0
        begin = sum(s < batches for s in all_steps)
        pid = start(partial(live, task, out, steps, None if isinstance(moment, float) else moment, workers), log)
        if isinstance(moment, float): time.sleep(moment); os.kill(pid, signal.SIGKILL)
        code = end(pid)
        if moment is None: assert code == 0, log.read_text()
        else: assert code in (-signal.SIGKILL, 1 if moment in WORKER_DIES else -signal.SIGKILL), (code, log.read_text())
        done = steps_of(steps)
        assert done == all_steps[begin:begin + len(done)], (i, batches, done)   # never from the start again
        if found: assert 'goes on at epoch' in log.read_text()
        saved = newest_checkpoint(out/'checkpoints')
        lost = begin + len(done) - sum(s < (saved[2]['run']['step'] if saved else 0) for s in all_steps)
        assert 0 <= lost <= 5, (i, lost)   # two steps to the next checkpoint, two while the last one was being written, and the one cut off
        again += lost
    everything = [s for i in range(len(lives) + 1) for s in steps_of(tmp_path/f'{i}.steps')]
    assert len(everything) == len(all_steps) + again and sorted(set(everything)) == all_steps
    check_same(out, whole)

# ---- moments ------------------------------------------------------------------------------------------------------------------------

def die(): os.kill(os.getpid(), signal.SIGKILL)

class At(Callback):
    "Die the n-th time that an event comes, before or after the other callbacks by order."
    def __init__(self, event, n, order=99, do=die): self.n, self.do, self.order = n, do, order; setattr(self, event, self.count)
    def count(self):
        self.n -= 1
        if self.n == 0: self.do()

def event(name, n, order=99): return lambda: [At(name, n, order)]

def call(owner, name, n, after=False, do=die):
    "Die before or after the n-th call of a function."
    def moment():
        real, left = getattr(owner, name), [n]
        def counted(*args, **kwargs):
            left[0] -= 1; now = left[0] == 0
            if now and not after: do()
            found = real(*args, **kwargs)
            if now and after: do()
            return found
        setattr(owner, name, counted)
    return moment

def half_a_save(n):
    "Die when the n-th checkpoint is written in half."
    def moment():
        real, left = checkpoints.save_file, [n]
        def cut(tensors, file, **kwargs):
            real(tensors, file, **kwargs)
            left[0] -= 1
            if left[0] == 0: os.truncate(file, os.path.getsize(file) // 2); die()
        checkpoints.save_file = cut
    return moment

def half_a_row(n):
    "Die when the n-th row of the tables is written in half."
    def moment():
        real, left = RunWriter.row, [n]
        def cut(self, file, values):
            left[0] -= 1
            if left[0]: return real(self, file, values)
            with open(self.out/file, 'a') as f: f.write('0,0.12')
            die()
        RunWriter.row = cut
    return moment

def kill_main(): os.kill(os.getppid(), signal.SIGKILL)
worker_kills = call(Samples, '__getitem__', 150, do=kill_main)   # counted in each worker
worker_dies = call(Samples, '__getitem__', 150)
WORKER_DIES = (worker_dies,)

MOMENTS = {
    'before a batch': event('before_batch', 30, -99), 'before the forward pass': event('before_batch', 9), 'after the forward pass': event('after_pred', 14),
    'after the loss': event('after_loss', 31), 'after the gradient': event('after_backward', 29), 'before the first step': event('before_step', 1),
    'before a step': event('before_step', 28), 'after a step': event('after_step', 7), 'after the last step': event('after_step', 18),
    'after a batch, not saved yet': event('after_batch', 15, 64), 'after a batch, being saved': event('after_batch', 32, 66),
    'before a save': call(checkpoints, 'save_file', 3), 'in a save': half_a_save(4), 'written, not flushed': call(checkpoints, 'save_file', 2, True),
    'in the first save': half_a_save(1), 'before fsync': call(checkpoints, 'to_disk', 7), 'after fsync': call(checkpoints, 'to_disk', 9, True),
    'before rename': call(checkpoints.os, 'replace', 5), 'after rename': call(checkpoints.os, 'replace', 4, True),
    'before pruning': call(checkpoints, 'prune', 5), 'while pruning': call(Path, 'unlink', 9, True),
    'between training and validation': event('after_train', 1), 'before validation': event('before_validate', 2), 'in validation': event('after_pred', 24),
    'after validation': event('after_validate', 1), 'epoch ends, row not written': event('after_epoch', 1, 54), 'epoch ends, row written': event('after_epoch', 2, 57),
    'in a row': half_a_row(3), 'between rows': call(RunWriter, 'row', 5, True),
    'in after_fit, nothing written': event('after_fit', 1, 50), 'in after_fit, weights written': event('after_fit', 1, 57), 'after the end': event('after_fit', 1),
    'in the loader': call(Samples, '__getitem__', 300), 'before fit': event('before_fit', 1, -99), 'ready to begin': event('before_fit', 1),
}
assert len(MOMENTS) >= 30

@pytest.mark.parametrize('task, lives, after', [
    ('finetune', [(MOMENTS['after the gradient'], 0)], 0),
    ('finetune', [(worker_kills, 2)], 0),
    ('pretrain', [(MOMENTS['in a save'], 0), (MOMENTS['epoch ends, row written'], 0)], 0),
    ('linear', [(MOMENTS['in a row'], 0)], 2),
], ids=['step', 'loader', 'save and epoch', 'row'])
def test_a_killed_run_goes_on(task, lives, after, straight, tmp_path): killed_and_resumed(task, lives, straight, tmp_path, after)

@pytest.mark.slow
@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('moment', MOMENTS)
def test_killed_at_every_kind_of_moment(moment, workers, straight, tmp_path):
    task = ('pretrain', 'finetune', 'linear')[(list(MOMENTS).index(moment) + workers) % 3]
    if moment == 'in the loader' and workers: pytest.skip('the next test')
    killed_and_resumed(task, [(MOMENTS[moment], workers)], straight, tmp_path)
