"""A run is a function of its config and seed, whatever happens to the machine."""
import os
import random
import shutil
import signal
import time
from functools import partial

import pytest
from support import exit_code, fork
from tiny_runs import (
    MOMENTS,
    check_same,
    event,
    in_fork,
    live,
    step_in_name,
    steps_of,
    worker_dies,
    worker_kills,
)

from mae_nb.training.state import newest_checkpoint
from mae_nb.weights.reading import checkpoints_in

pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='kills forked processes, which Windows lacks')
TASKS = 'pretrain', 'finetune', 'linear'

def end_life(pid, moment, log, seconds):
    "Wait for a life's end, or kill it at its time; its exit code must fit."
    if isinstance(moment, float):
        time.sleep(moment * seconds)
        os.kill(pid, signal.SIGKILL)
    code = exit_code(pid)
    if isinstance(moment, float):
        expected = -signal.SIGKILL, 0   # 0: it was quicker
    else:
        expected = (0 if moment is None else 1 if moment is worker_dies else -signal.SIGKILL),
    assert code in expected, (code, log.read_text())

def batches_saved(out):
    newest = newest_checkpoint(out/'checkpoints')
    return newest[2]['run']['step'] if newest else 0

def killed_and_resumed(task, lives, straight, tmp_path, after=None):
    "Kill a run at each life's moment and let the last one finish; prove that each resumed from the newest checkpoint."
    whole, out, repeated = straight(task), tmp_path/'run', 0
    steps_before = lambda batches: sum(s < batches for s in whole.steps)
    last = None, lives[-1][1] if after is None else after
    for i, (moment, workers) in enumerate([*lives, last]):
        saved, steps, log = batches_saved(out), tmp_path/f'{i}.steps', tmp_path/f'{i}.log'
        begin = steps_before(saved)
        pid = fork(partial(live, task, out, steps, None if isinstance(moment, float) else moment, workers), log)
        end_life(pid, moment, log, whole.seconds)
        done = steps_of(steps)
        assert done == whole.steps[begin:begin + len(done)], (i, saved, done)   # never from the start again
        if saved and done:
            assert 'resumes at epoch' in log.read_text()
        lost = begin + len(done) - steps_before(batches_saved(out))
        # two steps to the next checkpoint, two while the last one was being written, and the one cut off
        assert 0 <= lost <= 5, (i, lost)
        repeated += lost
    everything = [s for i in range(len(lives) + 1) for s in steps_of(tmp_path/f'{i}.steps')]
    assert len(everything) == len(whole.steps) + repeated and sorted(set(everything)) == whole.steps
    check_same(out, whole.out)

@pytest.mark.parametrize('task, lives, after', [
    ('finetune', [(MOMENTS['after the gradient'], 0)], 0),
    ('finetune', [(worker_kills, 2)], 0),
    ('pretrain', [(MOMENTS['in a save'], 0), (MOMENTS['epoch ends, row written'], 0)], 0),
    ('linear', [(MOMENTS['in a row'], 0)], 2),
    ('repeated pretrain', [(MOMENTS['after the gradient'], 0)], 2),
], ids=['step', 'loader', 'save and epoch', 'row', 'repeats'])
def test_a_killed_run_goes_on(task, lives, after, straight, tmp_path):
    killed_and_resumed(task, lives, straight, tmp_path, after)

@pytest.mark.slow
@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('moment', MOMENTS)
def test_killed_at_every_kind_of_moment(moment, workers, straight, tmp_path):
    task = TASKS[(list(MOMENTS).index(moment) + workers) % 3]
    if moment == 'in the loader' and workers:
        pytest.skip('see test_a_killed_run_goes_on')
    killed_and_resumed(task, [(MOMENTS[moment], workers)], straight, tmp_path)

# ---- several kills in a row, and at any time -----------------------------------------------------------------------

def some_moments(seed, count):
    "Moments drawn by seed, early enough in a life that each one is reached."
    draw = random.Random(seed)
    events = 'before_batch', 'after_pred', 'after_loss', 'after_backward', 'after_batch'
    moment = lambda: event(draw.choice(events), draw.randint(1, 18), draw.choice((-99, 64, 99)))
    return [(moment(), draw.choice((0, 2))) for _ in range(count)]

@pytest.mark.slow
@pytest.mark.parametrize('seed', range(12))
def test_killed_again_and_again(seed, straight, tmp_path):
    "At random steps, with another number of workers in each life."
    killed_and_resumed(TASKS[seed % 3], some_moments(seed, 2 + seed % 2), straight, tmp_path, after=seed % 2)

@pytest.mark.slow
@pytest.mark.parametrize('seed', range(12))
def test_killed_at_random_times(seed, straight, tmp_path):
    draw = random.Random(seed)
    lives = [(draw.uniform(.02, .9), draw.choice((0, 2))) for _ in range(3)]
    killed_and_resumed(TASKS[seed % 3], lives, straight, tmp_path)

@pytest.mark.slow
def test_a_worker_that_dies_ends_the_run_and_it_goes_on(straight, tmp_path):
    killed_and_resumed('finetune', [(worker_dies, 2)], straight, tmp_path)
    assert 'DataLoader worker' in (tmp_path/'0.log').read_text()

# ---- finished runs -------------------------------------------------------------------------------------------------

def test_a_finished_run_is_left_as_it_is(straight, tmp_path):
    out = tmp_path/'run'
    in_fork(partial(live, 'pretrain', out, tmp_path/'0.steps'), tmp_path/'0.log')
    files = [f for f in sorted(out.rglob('*')) if f.is_file() and f.suffix != '.png' and 'tfevents' not in f.name]
    before = {f: f.read_bytes() for f in files}
    in_fork(partial(live, 'pretrain', out, tmp_path/'1.steps'), tmp_path/'1.log')
    assert not steps_of(tmp_path/'1.steps') and 'finished already' in (tmp_path/'1.log').read_text()
    for f in files:
        assert f.read_bytes() == before[f], f

def test_a_finished_run_whose_newest_checkpoint_breaks(straight, tmp_path):
    "It is not taken for finished with older weights: the missing steps are done again."
    whole = straight('pretrain')
    shutil.copytree(whole.out, tmp_path/'run')
    newest = checkpoints_in(tmp_path/'run'/'checkpoints')[0]
    newest.write_bytes(newest.read_bytes()[:-1])
    in_fork(partial(live, 'pretrain', tmp_path/'run', tmp_path/'0.steps'), tmp_path/'0.log')
    second = step_in_name(checkpoints_in(whole.out/'checkpoints')[1])
    assert steps_of(tmp_path/'0.steps') == [s for s in whole.steps if s >= second]
    check_same(tmp_path/'run', whole.out)
