"""A run in several processes resumes as exactly as one in one, with the same number of processes or another."""
import hashlib
import json
import os
import signal
import subprocess
import time
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fastai.callback.core import Callback
from support import BIN
from tiny_runs import Steps, check_same, event, fork_ranks, half_a_save, learner, steps_of

from mae_nb.base.processes import process_group, rank
from mae_nb.training.state import newest_checkpoint

pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='kills forked processes, which Windows lacks')

def digest(t): return hashlib.sha256(t.numpy().tobytes()).hexdigest()[:12]

class Seen(Callback):
    "Note each trained sample: where it came, its number, its pixels and its mask's or drop path's noise."
    order, run_valid = -5, False
    def __init__(self, file): self.file = file
    def before_batch(self):
        rows = zip(self.yb[0].tolist(), *(map(digest, x) for x in self.xb if isinstance(x, torch.Tensor)))
        with open(self.file, 'a') as f:
            f.writelines(f'{json.dumps([self.epoch, self.iter, rank(), *row])}\n' for row in rows)

def double(x): return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

class Double(Callback):
    "Train in float64."
    order = -4
    def before_batch(self): self.learn.xb = tuple(map(double, self.xb))

def parallel(task, out, log, n, kills=None):
    "One life of a run in n processes; `kills` are {rank: moment}. Their exit codes."
    def process(r, port):
        os.environ.update(RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE=str(n), MASTER_ADDR='127.0.0.1',
                          MASTER_PORT=str(port))
        torch.set_default_dtype(torch.float64)
        killers = (kills or {}).get(r, lambda: None)() or []
        notes = [Steps(log.with_suffix('.steps'))] if r == 0 else []
        more = {} if task == 'linear' else dict(accumulate=2)
        with process_group():
            cbs = [*notes, Seen(log.with_suffix(f'.seen{r}')), Double(), *killers]
            learner(task, out, cbs=cbs, parts=n, more=more, max_steps=12).fit_recipe()
    return fork_ranks(n, process, log)

def seen(*logs):
    "The trained samples, in order; a later life's batches replace an earlier one's."
    batches = {}
    for log in logs:
        life = {}
        files = [f for r in (0, 1) if (f := log.with_suffix(f'.seen{r}')).exists()]
        for line in (line for f in files for line in f.read_text().splitlines()):
            epoch, i, part, *sample = json.loads(line)
            life.setdefault((epoch, i), {}).setdefault(part, []).append(sample)
        batches |= life
    in_order = [samples for _, parts in sorted(batches.items()) for _, samples in sorted(parts.items())]
    return [sample for samples in in_order for sample in samples]

def output(log): return ''.join(f.read_text() for f in log.parent.glob(f'{log.stem}.log*'))

@pytest.fixture(scope='module')
def straight_parallel(tmp_path_factory):
    @cache
    def run(task, n):
        folder = tmp_path_factory.mktemp('parallel')
        log = folder/'a'
        assert parallel(task, folder/'run', log, n) == [0] * n, output(log)
        return SimpleNamespace(out=folder/'run', steps=steps_of(folder/'a.steps'), samples=seen(log))
    return run

def check_near(out, whole):
    "Weights and optimizer state are equal, except for the order of sums."
    ours, theirs = (newest_checkpoint(run/'checkpoints')[1] for run in (out, whole))
    for name, t in theirs.items():
        if name.startswith(('model.', 'opt.')):
            largest = max(t.abs().max().item(), 1)
            assert (ours[name].double() - t.double()).abs().max() <= 1e-9 * largest, name

def lives_in_parallel(task, lives, straight_parallel, tmp_path, same):
    "Lives of (processes, kills); at the end the same samples were trained, and the weights are the same."
    out, everything, whole = tmp_path/'run', [], straight_parallel(task, same)
    for i, (n, kills) in enumerate(lives):
        saved, log = newest_checkpoint(out/'checkpoints'), tmp_path/str(i)
        begin = sum(s < saved[2]['run']['step'] for s in whole.steps) if saved else 0
        codes = parallel(task, out, log, n, kills)
        if kills:
            assert -signal.SIGKILL in codes and 0 not in codes, output(log)
        else:
            assert codes == [0] * n, output(log)
        done = steps_of(tmp_path/f'{i}.steps')
        assert done == whole.steps[begin:begin + len(done)] and (begin > 0 or i == 0)
        everything += done
    assert sorted(set(everything)) == whole.steps
    assert len(everything) <= len(whole.steps) + 5 * (len(lives) - 1)
    assert seen(*(tmp_path/str(i) for i in range(len(lives)))) == whole.samples
    check = check_same if {n for n, _ in lives} == {same} else check_near
    check(out, whole.out)

one = {1: event('after_backward', 9)}
first = {0: event('after_step', 6)}
both = {0: half_a_save(3), 1: event('before_batch', 10)}

def test_two_processes_go_on(straight_parallel, tmp_path):
    lives_in_parallel('pretrain', [(2, one), (2, None)], straight_parallel, tmp_path, 2)

@pytest.mark.slow
@pytest.mark.parametrize('kills', [one, first, both], ids=['one', 'first', 'both'])
@pytest.mark.parametrize('task', ['pretrain', 'finetune', 'linear'])
def test_two_processes_killed(task, kills, straight_parallel, tmp_path):
    lives_in_parallel(task, [(2, kills), (2, None)], straight_parallel, tmp_path, 2)

@pytest.mark.slow
@pytest.mark.parametrize('task', ['pretrain', 'repeated pretrain', 'plain finetune'])
def test_from_two_processes_to_one_and_back(task, straight_parallel, tmp_path):
    lives = [(2, one), (1, {0: event('before_batch', 5)}), (2, None)]
    lives_in_parallel(task, lives, straight_parallel, tmp_path, 1)

@pytest.mark.slow
def test_from_one_process_to_two_and_back(straight_parallel, tmp_path):
    lives = [(1, {0: event('after_loss', 9)}), (2, {0: event('after_pred', 5)}), (1, None)]
    lives_in_parallel('pretrain', lives, straight_parallel, tmp_path, 2)

# ---- torchrun ------------------------------------------------------------------------------------------------------

def begin_torchrun(folder, out):
    "Begin a pretraining in two processes, which torchrun restarts; its output goes to a file."
    options = '--standalone', '--nproc-per-node', '2', '--max-restarts', '3'
    words = ('photos', '--model', 'mae_vit_nano_patch4_32', '--set', 'amp=False', '--bs', '20', '--epochs', '8',
             '--num-workers', '0', '--save-every', '2', '--out', out, '--resume', 'auto')
    command = [BIN/'torchrun', *options, BIN/'mae-pretrain', *words]
    with open(folder/f'{out}.log', 'w') as log:
        return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)

@pytest.mark.slow
def test_torchrun_begins_again_by_itself(photos, tmp_path):
    "A killed worker: torchrun starts all of them anew, and they go on."
    assert begin_torchrun(tmp_path, 'straight').wait(300) == 0, (tmp_path/'straight.log').read_text()
    run, log, end = begin_torchrun(tmp_path, 'run'), tmp_path/'run.log', time.time() + 120
    while newest_checkpoint(tmp_path/'run'/'checkpoints') is None and time.time() < end:
        time.sleep(.05)
    threads = Path(f'/proc/{run.pid}/task').iterdir()
    workers = [int(pid) for thread in threads for pid in (thread/'children').read_text().split()]
    os.kill(workers[1], signal.SIGKILL)
    assert run.wait(300) == 0 and 'resumes at epoch' in log.read_text(), log.read_text()
    check_same(tmp_path/'run', tmp_path/'straight')
