"""Tiny runs, each life of one in a process of its own; moments at which a life ends; and what two runs must share."""
import os
import sys
import time
from functools import cache, partial
from pathlib import Path
from signal import SIGKILL

import torch
from fastai.callback.core import Callback
from ranks import free_port
from support import begin_command, exit_code, fork
from torch.distributed.checkpoint import state_dict  # noqa: F401  every fork would import it again when it resumes

from mae_nb.base.keyed import seeded
from mae_nb.data.datasets import load_source
from mae_nb.data.loader import Samples, get_dls, loader_batch
from mae_nb.model.classifier import create_classifier
from mae_nb.model.mae import create_mae
from mae_nb.tasks.finetune import finetune_learner
from mae_nb.tasks.pretrain import pretrain_learner
from mae_nb.tasks.probes import linear_probe_learner
from mae_nb.training import checkpoints, runs, state
from mae_nb.training.guard import Guard
from mae_nb.training.presets import RECIPES
from mae_nb.training.recipes import override
from mae_nb.training.runs import make_run
from mae_nb.training.state import newest_checkpoint, same_bits, save_checkpoint

# ---- a run and its lives -------------------------------------------------------------------------------------------

@cache
def sets():
    train, test = load_source('fashion')
    return train.take(range(220)), test.take(range(50))

NANO, TINY = 'mae_vit_nano_patch4_28', dict(in_chans=1, dim=32, depth=2, num_heads=2)
RUN = dict(epochs=3, warmup_epochs=1, batch_size=40, accumulate=4)   # 22 batches an epoch; the last two: a smaller step

OPTIONS = {
    'pretrain': dict(RUN, clip=1.),
    'repeated pretrain': dict(RUN, repeats=2, crop_scale=(.3, 1.)),
    'finetune': dict(RUN, ema=.9, mixup=.8, cutmix=1., drop_path=.1, erase=.25),
    'plain finetune': dict(RUN, ema=.9, drop_path=.1),
    'linear': dict(epochs=3, warmup_epochs=1, batch_size=20),
}

def learner(task, out, workers=0, parts=1, more=(), **kwargs):
    "A run that resumes where its folder stops; its models have the default type."
    out = make_run(out, dict(task=task), resume=True)
    torch.manual_seed(os.getpid())   # which must not matter
    kind = task.split()[-1]
    recipe = override(RECIPES[f'{kind}_fashion'], OPTIONS[task] | dict(more))
    dls = get_dls(sets(), recipe, img_size=28, bs=loader_batch(recipe, parts), num_workers=workers)
    make = dict(pretrain=pretrain_learner, finetune=finetune_learner, linear=linear_probe_learner)[kind]
    if kind == 'finetune':
        model = seeded(0, create_classifier, NANO, 10, drop_path=.1, **TINY)
    else:
        model = seeded(0, create_mae, NANO, target='pixels', decoder_dim=32, **TINY)
    return make(dls, model.to(torch.get_default_dtype()), recipe, **dict(save_every=2, out=out) | kwargs)

def in_fork(func, log):
    assert exit_code(fork(func, log)) == 0, log.read_text()

class Steps(Callback):
    "Append each optimizer step's last batch to a file."
    order, run_valid = 50, False
    def __init__(self, file): self.file = file
    def after_step(self): self.note(self.train_iter)
    def note(self, batch):
        with open(self.file, 'a') as f:
            f.write(f'{batch}\n')

def steps_of(file): return [int(x) for x in file.read_text().split()] if file.exists() else []

def live(task, out, steps, moment=None, workers=0, **kwargs):
    "One life of a run: all of it, or until a moment comes."
    killers = moment() if moment else None
    learner(task, out, workers, cbs=[Steps(steps), *(killers or [])], **kwargs).fit_recipe()

# ---- what two runs must share --------------------------------------------------------------------------------------

def state_of(out):
    "All that a finished run must share with another one."
    _, tensors, config = newest_checkpoint(out/'checkpoints')
    tables = [f for f in ('model.safetensors', 'metrics.csv', 'classes.csv') if (out/f).exists()]
    del tensors['table.timing.csv']
    return {f: (out/f).read_bytes() for f in tables}, tensors, config | dict(run=config['run'] | dict(clock=None))

def step_in_name(file): return int(file.stem.split('-')[1])   # batches

def check_same(out, straight):
    (files, tensors, config), (files0, tensors0, config0) = state_of(out), state_of(straight)
    assert config == config0 and tensors.keys() == tensors0.keys()
    for name, t in tensors.items():
        assert same_bits(t, tensors0[name]), name
    assert any(name.startswith('opt.') for name in tensors)
    assert {'model.safetensors', 'metrics.csv'} <= files0.keys() and files.keys() == files0.keys()
    for name in files0:
        assert files[name] == files0[name], name
    assert not list(out.rglob('*.part'))

def numbered(folder, *steps):
    "Small checkpoints, whose numbers tell their step."
    folder.mkdir(parents=True, exist_ok=True)
    for step in steps:
        save_checkpoint(folder, step, dict(w=torch.full((500,), float(step))), dict(run=dict(fit=-1, step=step)))

# ---- moments at which a life ends ----------------------------------------------------------------------------------

def die(): os.kill(os.getpid(), SIGKILL)
def kill_main(): os.kill(os.getppid(), SIGKILL)

class At(Callback):
    "Die the n-th time that an event comes, before or after the other callbacks by order."
    def __init__(self, event, n, order=99, do=die):
        self.n, self.do, self.order = n, do, order
        setattr(self, event, self.count)

    def count(self):
        self.n -= 1
        if self.n == 0:
            self.do()

def event(name, n, order=99): return lambda: [At(name, n, order)]

def call(owner, name, n, after=False, do=die):
    "Die before or after the n-th call of a function."
    def moment():
        real, left = getattr(owner, name), [n]
        def counted(*args, **kwargs):
            left[0] -= 1
            now = left[0] == 0   # of this call: the function may call itself
            if now and not after:
                do()
            result = real(*args, **kwargs)
            if now and after:
                do()
            return result
        setattr(owner, name, counted)
    return moment

def half_a_save(n):
    "Die when the n-th checkpoint is written in half."
    def moment():
        real, left = state.write_tensors, [n]
        def cut(snapshot, file, note):
            digest = real(snapshot, file, note)
            left[0] -= 1
            if left[0] == 0:
                os.truncate(file, os.path.getsize(file) // 2)
                die()
            return digest
        state.write_tensors = cut
    return moment

def half_a_row(n):
    "Die when the n-th row of the tables is written in half."
    def moment():
        real, left = runs.add_row, [n]
        def cut(file, values):
            left[0] -= 1
            if left[0]:
                return real(file, values)
            with open(file, 'a') as f:
                f.write('0,0.12')
            die()
        runs.add_row = cut
    return moment

worker_kills = call(Samples, 'visit', 150, do=kill_main)   # counted in each worker
worker_dies = call(Samples, 'visit', 150)

MOMENTS = {
    'before a batch': event('before_batch', 30, -99),
    'before the forward pass': event('before_batch', 9),
    'after the forward pass': event('after_pred', 14),
    'after the loss': event('after_loss', 31),
    'after the gradient': event('after_backward', 29),
    'before the first step': event('before_step', 1),
    'before a step': event('before_step', 28, 8),
    'after a step': event('after_step', 7),
    'after the last step': event('after_step', 18),
    'after a batch, not saved yet': event('after_batch', 15, 64),
    'after a batch, being saved': event('after_batch', 32, 66),
    'before a save': call(state, 'write_tensors', 3),
    'in a save': half_a_save(4),
    'written, not flushed': call(state, 'write_tensors', 2, True),
    'in the first save': half_a_save(1),
    'before fsync': call(state, 'flush_to_disk', 7),
    'after fsync': call(state, 'flush_to_disk', 9, True),
    'before rename': call(os, 'replace', 5),
    'after rename': call(os, 'replace', 4, True),
    'before pruning': call(checkpoints, 'prune', 5),
    'while pruning': call(Path, 'unlink', 9, True),
    'between training and validation': event('after_train', 1),
    'before validation': event('before_validate', 2),
    'in validation': event('after_pred', 24),
    'after validation': event('after_validate', 1),
    'epoch ends, row not written': event('after_epoch', 1, 54),
    'epoch ends, row written': event('after_epoch', 2, 57),
    'in a row': half_a_row(3),
    'between rows': call(runs, 'add_row', 3, True),
    'in after_fit, nothing written': event('after_fit', 1, 50),
    'in after_fit, weights written': event('after_fit', 1, 57),
    'after the end': event('after_fit', 1),
    'in the loader': call(Samples, 'visit', 300),
    'before fit': event('before_fit', 1, -99),
    'ready to begin': event('before_fit', 1),
}
assert len(MOMENTS) >= 30

# ---- commands ------------------------------------------------------------------------------------------------------

WORDS = ('fashion', '--epochs', '2', '--set', 'warmup_epochs=1', '--set', 'accumulate=4', '--bs', '40',
         '--num-workers', '0', '--save-every', '2')

def few(log, *more):
    "Before a command: 220 images instead of 10,000; note each step's last batch; then whatever else."
    def before():
        for name, module in list(sys.modules.items()):   # wherever it was imported to
            if name.startswith('mae_nb.') and 'load_source' in vars(module):
                module.load_source = lambda _: sets()
        Guard.after_step = lambda self: Steps(log).note(self.train_iter)
        for change in more:
            change()
    return before

def signals(n, *signums):
    "Send this very process signals in its n-th batch."
    return call(Guard, 'before_batch', n, do=lambda: [os.kill(os.getpid(), s) for s in signums])

def run_command(folder, log, *words, before=(), name='mae-pretrain', **env):
    "Run a command in a fork: its output, and the steps that it noted in a file."
    log.unlink(missing_ok=True)
    _, result = begin_command(folder, name, *words, before=few(log, *before), **env)
    return result(), steps_of(log)

# ---- several processes ---------------------------------------------------------------------------------------------

def wait_for(pids, seconds=90):
    "Exit codes of forks; those that have not ended in time, or wait for a dead one, are killed."
    running = lambda pid: os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None
    end = time.time() + seconds
    while time.time() < end and any(map(running, pids)):
        time.sleep(.02)
    for pid in pids:
        os.kill(pid, SIGKILL)
    return [exit_code(pid) for pid in pids]

def fork_ranks(n, process, log):
    "Run `process(rank, port)` in n forks that train together: their exit codes."
    port = free_port()
    return wait_for([fork(partial(process, r, port), log.with_suffix(f'.log{r}')) for r in range(n)])
