"""A run is a function of its config and seed, whatever happens to the machine."""
import csv
import ctypes
import errno
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from collections import Counter
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from support import BIN, begin_command, exit_code, fork
from fastai.callback.core import Callback

from mae_nb import commands as cli
from mae_nb.training import checkpoints
from mae_nb.training.checkpoints import BadCheckpoint, newest_checkpoint, read_checkpoint
from mae_nb.weights.reading import checkpoints_in
from mae_nb.base.keyed import seeded
from mae_nb.model.classifier import create_classifier
from mae_nb.data.datasets import load_source
from mae_nb.data.loader import KeyedBatches, Samples, get_dls
from mae_nb.base.processes import rank, process_group
from mae_nb.training.guard import Guard
from mae_nb.training.runs import RunWriter, make_run
from mae_nb.tasks.finetune import finetune_learner
from mae_nb.model.mae import create_mae
from mae_nb.tasks.pretrain import pretrain_learner
from mae_nb.tasks.probes import linear_probe_learner
from mae_nb.data.loader import loader_batch
from mae_nb.training.presets import RECIPES
from mae_nb.training.recipes import override

resource = pytest.importorskip('resource', reason='kills forked processes, which Windows lacks')

# ---- tiny runs, each life of one in a process of its own ----------------------------------------------------------------------------

@cache
def sets():
    train, test = load_source('fashion')
    return train.take(range(220)), test.take(range(50))

TINY = dict(in_chans=1, dim=32, depth=2, num_heads=2)
RUN = dict(epochs=3, warmup_epochs=1, batch_size=40, accumulate=4)   # 22 batches an epoch, of which the last two make a smaller step

OPTIONS = {'pretrain': dict(RUN, clip=1.), 'repeated pretrain': dict(RUN, repeats=2, crop_scale=(.3, 1.)), 'finetune': dict(RUN, ema=.9, mixup=.8, cutmix=1., drop_path=.1, erase=.25), 'plain finetune': dict(RUN, ema=.9, drop_path=.1),
           'linear': dict(epochs=3, warmup_epochs=1, batch_size=20)}

def learner(task, out, workers=0, parts=1, more=(), **kwargs):
    "A run that goes on where its folder stops; its models have the default type."
    out = make_run(out, dict(task=task), resume=True)
    torch.manual_seed(os.getpid())   # which must not matter
    r = override(RECIPES[f'{task.split()[-1]}_fashion'], OPTIONS[task] | dict(more))
    dls = get_dls(sets(), r, img_size=28, bs=loader_batch(r, parts), num_workers=workers)
    if 'finetune' in task: make, model = finetune_learner, seeded(0, create_classifier, 'mae_vit_nano_patch4_28', 10, drop_path=.1, **TINY)
    else: make, model = dict(pretrain=pretrain_learner, linear=linear_probe_learner)[task.split()[-1]], seeded(0, create_mae, 'mae_vit_nano_patch4_28', target='pixels', decoder_dim=32, **TINY)
    return make(dls, model.to(torch.get_default_dtype()), r, **dict(save_every=2, out=out) | kwargs)

def in_fork(func, log): assert exit_code(fork(func, log)) == 0, log.read_text()

class Steps(Callback):
    "Append each optimizer step's last batch to a file."
    order, run_valid = 50, False
    def __init__(self, file): self.file = file
    def after_step(self): self.note(self.train_iter)
    def note(self, batch):
        with open(self.file, 'a') as f: f.write(f'{batch}\n')

def steps_of(file): return [int(x) for x in file.read_text().split()] if file.exists() else []

def live(task, out, steps, moment=None, workers=0, **kwargs):
    "One life of a run: all of it, or until a moment comes."
    killers = moment() if moment else None
    learner(task, out, workers, cbs=[Steps(steps), *(killers or [])], **kwargs).fit_recipe()

def state_of(out):
    "All that a finished run must have in common with another one."
    _, tensors, config = newest_checkpoint(out/'checkpoints')
    run = config['run']
    files = {f: (out/f).read_bytes() for f in ('model.safetensors', 'metrics.csv', *(['classes.csv'] if (out/'classes.csv').exists() else []))}
    return files, tensors, config | dict(run=run | dict(files={k: v for k, v in run['files'].items() if k != 'timing.csv'}))

def step_of_name(file): return int(file.stem.split('-')[1])   # batches

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
        begin = time.time()
        in_fork(partial(live, task, out, out.with_suffix('.steps')), out.with_suffix('.log'))
        run.seconds = time.time() - begin
        return out, steps_of(out.with_suffix('.steps'))
    return run

def killed_and_resumed(task, lives, straight, tmp_path, after=None):
    "Kill a run at each life's moment and let the last life finish; prove that each one went on from the newest checkpoint."
    (whole, all_steps), out, again = straight(task), tmp_path/'run', 0
    for i, (moment, workers) in enumerate([*lives, (None, after if after is not None else lives[-1][1])]):
        found, steps, log = newest_checkpoint(out/'checkpoints'), tmp_path/f'{i}.steps', tmp_path/f'{i}.log'
        batches = found[2]['run']['step'] if found else 0
        begin = sum(s < batches for s in all_steps)
        pid = fork(partial(live, task, out, steps, None if isinstance(moment, float) else moment, workers), log)
        if isinstance(moment, float): time.sleep(moment * straight.seconds); os.kill(pid, signal.SIGKILL)
        code = exit_code(pid)
        if moment is None: assert code == 0, log.read_text()
        elif isinstance(moment, float): assert code in (-signal.SIGKILL, 0), (code, log.read_text())   # 0: it was quicker
        else: assert code == (1 if moment is worker_dies else -signal.SIGKILL), (code, log.read_text())
        done = steps_of(steps)
        assert done == all_steps[begin:begin + len(done)], (i, batches, done)   # never from the start again
        if found and done: assert 'goes on at epoch' in log.read_text()
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
worker_kills = call(Samples, 'visit', 150, do=kill_main)   # counted in each worker
worker_dies = call(Samples, 'visit', 150)

MOMENTS = {
    'before a batch': event('before_batch', 30, -99), 'before the forward pass': event('before_batch', 9), 'after the forward pass': event('after_pred', 14),
    'after the loss': event('after_loss', 31), 'after the gradient': event('after_backward', 29), 'before the first step': event('before_step', 1),
    'before a step': event('before_step', 28, 8), 'after a step': event('after_step', 7), 'after the last step': event('after_step', 18),
    'after a batch, not saved yet': event('after_batch', 15, 64), 'after a batch, being saved': event('after_batch', 32, 66),
    'before a save': call(checkpoints, 'save_file', 3), 'in a save': half_a_save(4), 'written, not flushed': call(checkpoints, 'save_file', 2, True),
    'in the first save': half_a_save(1), 'before fsync': call(checkpoints, 'to_disk', 7), 'after fsync': call(checkpoints, 'to_disk', 9, True),
    'before rename': call(checkpoints.os, 'replace', 5), 'after rename': call(checkpoints.os, 'replace', 4, True),
    'before pruning': call(checkpoints, 'prune', 5), 'while pruning': call(Path, 'unlink', 9, True),
    'between training and validation': event('after_train', 1), 'before validation': event('before_validate', 2), 'in validation': event('after_pred', 24),
    'after validation': event('after_validate', 1), 'epoch ends, row not written': event('after_epoch', 1, 54), 'epoch ends, row written': event('after_epoch', 2, 57),
    'in a row': half_a_row(3), 'between rows': call(RunWriter, 'row', 5, True),
    'in after_fit, nothing written': event('after_fit', 1, 50), 'in after_fit, weights written': event('after_fit', 1, 57), 'after the end': event('after_fit', 1),
    'in the loader': call(Samples, 'visit', 300), 'before fit': event('before_fit', 1, -99), 'ready to begin': event('before_fit', 1),
}
assert len(MOMENTS) >= 30

@pytest.mark.parametrize('task, lives, after', [
    ('finetune', [(MOMENTS['after the gradient'], 0)], 0),
    ('finetune', [(worker_kills, 2)], 0),
    ('pretrain', [(MOMENTS['in a save'], 0), (MOMENTS['epoch ends, row written'], 0)], 0),
    ('linear', [(MOMENTS['in a row'], 0)], 2),
    ('repeated pretrain', [(MOMENTS['after the gradient'], 0)], 2),
], ids=['step', 'loader', 'save and epoch', 'row', 'repeats'])
def test_a_killed_run_goes_on(task, lives, after, straight, tmp_path): killed_and_resumed(task, lives, straight, tmp_path, after)


@pytest.mark.slow
@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('moment', MOMENTS)
def test_killed_at_every_kind_of_moment(moment, workers, straight, tmp_path):
    task = ('pretrain', 'finetune', 'linear')[(list(MOMENTS).index(moment) + workers) % 3]
    if moment == 'in the loader' and workers: pytest.skip('the next test')
    killed_and_resumed(task, [(MOMENTS[moment], workers)], straight, tmp_path)

# ---- several kills in a row, and at any time ----------------------------------------------------------------------------------------

def some_moments(seed, count):
    "Moments drawn by seed, early enough in a life that each one is reached."
    draw = random.Random(seed)
    events = 'before_batch', 'after_pred', 'after_loss', 'after_backward', 'after_batch'
    return [(event(draw.choice(events), draw.randint(1, 18), draw.choice((-99, 64, 99))), draw.choice((0, 2))) for _ in range(count)]

@pytest.mark.slow
@pytest.mark.parametrize('seed', range(12))
def test_killed_again_and_again(seed, straight, tmp_path):
    "At random steps, with another number of workers in each life."
    killed_and_resumed(('pretrain', 'finetune', 'linear')[seed % 3], some_moments(seed, 2 + seed % 2), straight, tmp_path, after=seed % 2)

@pytest.mark.slow
@pytest.mark.parametrize('seed', range(12))
def test_killed_at_random_times(seed, straight, tmp_path):
    draw = random.Random(seed)
    lives = [(draw.uniform(.02, .9), draw.choice((0, 2))) for _ in range(3)]
    killed_and_resumed(('pretrain', 'finetune', 'linear')[seed % 3], lives, straight, tmp_path)

@pytest.mark.slow
def test_a_worker_that_dies_ends_the_run_and_it_goes_on(straight, tmp_path):
    killed_and_resumed('finetune', [(worker_dies, 2)], straight, tmp_path)
    assert 'DataLoader worker' in (tmp_path/'0.log').read_text()

def test_a_finished_run_is_left_as_it_is(straight, tmp_path):
    out = tmp_path/'run'
    in_fork(partial(live, 'pretrain', out, tmp_path/'0.steps'), tmp_path/'0.log')
    files = [f for f in sorted(out.rglob('*')) if f.is_file() and f.suffix != '.png' and 'tfevents' not in f.name]
    before = {f: f.read_bytes() for f in files}
    in_fork(partial(live, 'pretrain', out, tmp_path/'1.steps'), tmp_path/'1.log')
    assert not steps_of(tmp_path/'1.steps') and 'finished already' in (tmp_path/'1.log').read_text()
    for f in files: assert f.read_bytes() == before[f], f

def test_a_finished_run_whose_newest_checkpoint_breaks(straight, tmp_path):
    "It is not taken for finished with older weights: what is missing is done again."
    whole, steps = straight('pretrain')
    shutil.copytree(whole, tmp_path/'run')
    (newest := checkpoints_in(tmp_path/'run'/'checkpoints')[0]).write_bytes(newest.read_bytes()[:-1])
    in_fork(partial(live, 'pretrain', tmp_path/'run', tmp_path/'0.steps'), tmp_path/'0.log')
    assert steps_of(tmp_path/'0.steps') == steps[sum(s < step_of_name(checkpoints_in(whole/'checkpoints')[1]) for s in steps):]
    check_same(tmp_path/'run', whole)

def test_broken_checkpoints_are_not_kept_for_whole_ones(tmp_path):
    numbered(tmp_path/'checkpoints', 2, 4, 6)
    for f in checkpoints_in(tmp_path/'checkpoints')[:2]: f.write_bytes(b'')
    checkpoints.Checkpoints(tmp_path, keep=1).write(3, dict(w=torch.full((500,), 3.)), dict(run=dict(fit=-1, step=3)))   # it went on from 2
    assert newest_checkpoint(tmp_path/'checkpoints')[2]['run']['step'] == 3

# ---- a save that is interrupted at every call ---------------------------------------------------------------------------------------

def numbered(folder, *steps):
    "Small checkpoints, whose numbers tell their step."
    folder.mkdir(parents=True, exist_ok=True)
    for step in steps: checkpoints.save_checkpoint(folder, step, dict(w=torch.full((500,), float(step))), dict(run=dict(fit=-1, step=step)))

def interrupted_save(tmp_path, fault):
    "Save a fourth checkpoint of which three are kept, with a fault: 0 if nothing was wrong, 3 for an OSError, or the signal."
    folder = tmp_path/'run'/'checkpoints'
    numbered(folder, 1, 2, 3)
    old = {f: f.read_bytes() for f in folder.iterdir()}
    def save():
        saver = checkpoints.Checkpoints(tmp_path/'run', keep=3)
        fault()
        try: saver.write(4, dict(w=torch.full((500,), 4.)), dict(run=dict(fit=-1, step=4)))
        except OSError: os._exit(3)
    code = exit_code(fork(save, tmp_path/'log'))
    found = check_found(folder, old)
    checkpoints.Checkpoints(tmp_path/'run').before_fit()   # the next start
    assert not list(folder.glob('*.part'))
    return code, found

def check_found(folder, old):
    "A whole checkpoint is found, and no older one is harmed."
    file, tensors, config = newest_checkpoint(folder)
    step = config['run']['step']
    assert step in (3, 4) and torch.equal(tensors['w'], torch.full((500,), float(step)))
    for f, data in old.items():
        if step == 4 and '000001-' in f.name and not f.exists(): continue   # pruned
        assert f.read_bytes() == data
    return step

def fails(owner, name, n, number):
    def fail(): raise OSError(number, os.strerror(number))
    return call(owner, name, n, do=fail)

CALLS = [(checkpoints, 'save_file', 1), (Path, 'chmod', 1), (os, 'open', 1), (os, 'fsync', 1), (os, 'close', 1), (checkpoints.safetensors, 'safe_open', 1),
         (checkpoints, 'sha256', 1), (os, 'replace', 1), (os, 'open', 2), (os, 'fsync', 2), (os, 'close', 2), (Path, 'unlink', 1), (checkpoints, 'prune', 1), (Path, 'unlink', 2)]

@pytest.mark.parametrize('owner, name, n', CALLS, ids=[f'{name} {n}' for _, name, n in CALLS])
def test_a_save_interrupted_at_each_call(owner, name, n, tmp_path):
    for i, (fault, want) in enumerate(((fails(owner, name, n, errno.ENOSPC), 3), (fails(owner, name, n, errno.EIO), 3),
                                       (call(owner, name, n), -signal.SIGKILL), (call(owner, name, n, after=True), -signal.SIGKILL))):
        place = tmp_path/str(i); place.mkdir()
        code, _ = interrupted_save(place, fault)
        assert code == want, (place/'log').read_text()

def limit(size, kill):
    "No file may grow beyond a size: writing there fails, or kills."
    def fault():
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if kill else signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return fault

@pytest.mark.parametrize('step', [499, pytest.param(23, marks=pytest.mark.slow)])
def test_a_save_interrupted_at_each_byte(step, tmp_path):
    numbered(tmp_path, 4)
    size = next(tmp_path.glob('step-*')).stat().st_size
    for k in [*range(0, size, step), size - 1, size]:
        for kill in (False, True):
            place = tmp_path/f'{k}-{kill}'; place.mkdir()
            code, found = interrupted_save(place, limit(k, kill))
            assert (code, found) == ((0, 4) if k >= size else (-signal.SIGXFSZ if kill else 3, 3)), (k, kill, code, found)

@pytest.mark.slow
def test_a_save_interrupted_at_each_system_call(tmp_path):
    "strace makes each one fail, or kills the process there."
    if not shutil.which('strace'): pytest.skip('needs strace')
    def traced(place, *inject):
        place.mkdir()
        here, there = os.pipe()
        folder = place/'run'/'checkpoints'
        def save():
            os.read(here, 1)
            try: checkpoints.Checkpoints(place/'run', keep=3).write(4, dict(w=torch.full((500,), 4.)), dict(run=dict(fit=-1, step=4)))
            except OSError: os._exit(3)
        numbered(folder, 1, 2, 3)
        old = {f: f.read_bytes() for f in folder.iterdir()}
        pid = fork(save, place/'log')
        strace = subprocess.Popen(['strace', '-f', '-q', '-p', str(pid), '-o', place/'trace', *inject], stderr=subprocess.DEVNULL)
        until = time.time() + 20
        while 'TracerPid:\t0' in Path(f'/proc/{pid}/status').read_text() and time.time() < until and strace.poll() is None: time.sleep(.01)
        if strace.poll() is not None: os.close(there); exit_code(pid); pytest.skip('strace may not trace here')
        os.write(there, b'x'); os.close(there); os.close(here)
        code = exit_code(pid); strace.wait()
        found = check_found(folder, old)
        checkpoints.Checkpoints(place/'run').before_fit()
        assert not list(folder.glob('*.part'))
        return code, found
    assert traced(tmp_path/'all') == (0, 4)
    counts = Counter(re.findall(r'^\d+ +(\w+)\(', (tmp_path/'all'/'trace').read_text(), re.MULTILINE))
    names = [n for n in ('open', 'openat', 'write', 'pwrite64', 'writev', 'ftruncate', 'fallocate', 'fsync', 'rename', 'unlink', 'chmod', 'fchmodat', 'close') if counts[n]]
    assert {'fsync', 'rename', 'write'} <= {*names}
    done = 0
    for name in names:
        for n in range(1, counts[name] + 1):
            for what in ('error=EIO', 'error=ENOSPC', 'signal=KILL'):
                code, found = traced(tmp_path/f'{name}-{n}-{what}', '-e', f'inject={name}:{what}:when={n}')
                assert code in ((-signal.SIGKILL,) if 'KILL' in what else (0, 3)), (name, n, what, code, (tmp_path/f'{name}-{n}-{what}'/'log').read_text())
                if code == 0: assert found == 4
                done += 1
    print(f'{done} interrupted system calls')

# ---- checkpoints that are not what was written --------------------------------------------------------------------------------------

def mutated(data, other, draw):
    "A file's bytes with flipped bits, cut, grown, or with another file's header."
    data = bytearray(data)
    kind = draw.choice(('flip', 'cut', 'grow', 'header', 'length'))
    if kind == 'flip':
        for _ in range(draw.randint(1, 8)): data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    if kind == 'cut': del data[draw.randrange(len(data)):]
    if kind == 'grow': data[(at := draw.randrange(len(data) + 1)):at] = draw.randbytes(draw.randint(1, 3000))
    if kind == 'header': n = 8 + int.from_bytes(other[:8], 'little'); data[:n] = other[:n]
    if kind == 'length': data[:8] = draw.choice((0, 2, 2**20, 2**40, 2**63, 2**64 - 1)).to_bytes(8, 'little')
    return bytes(data)

@pytest.mark.parametrize('count', [40, pytest.param(500, marks=pytest.mark.slow)])
def test_mutated_checkpoints(count, tmp_path, capsys):
    numbered(tmp_path, 1, 2)
    first, second = reversed(checkpoints_in(tmp_path))
    good, other, draw = second.read_bytes(), first.read_bytes(), random.Random(0)
    for i in range(count):
        bad = good
        while bad == good: bad = mutated(good, other, draw)
        second.write_bytes(bad)
        with pytest.raises(BadCheckpoint, match=second.name): read_checkpoint(second)
        assert newest_checkpoint(tmp_path)[0] == first and second.name in capsys.readouterr().out, i
        named = tmp_path/'named'/f'step-000000002-{hashlib.sha256(bad).hexdigest()[:16]}.safetensors'   # someone who gives it the right name too
        named.parent.mkdir(exist_ok=True); named.write_bytes(bad)
        try: tensors, config = read_checkpoint(named)
        except BadCheckpoint: pass
        else: assert isinstance(config, dict) and all(isinstance(v, torch.Tensor) for v in tensors.values())
        named.unlink()
    second.write_bytes(good)
    for name in ('step-000000003-0123456789abcdef', 'step-000000003-' + first.stem[-16:]):
        renamed = second.with_name(f'{name}.safetensors'); renamed.write_bytes(good)
        assert newest_checkpoint(tmp_path)[0] == second and name in capsys.readouterr().out
        renamed.unlink()
    for f in (first, second): f.write_bytes(b'')
    with pytest.raises(BadCheckpoint, match='none of its 2 checkpoints is whole'): newest_checkpoint(tmp_path)

def header(text, body=b''): return len(text).to_bytes(8, 'little') + text + body
def config(text): return header(json.dumps({'__metadata__': {'config': text}}).encode())

@pytest.fixture
def offer(tmp_path):
    "Read bytes as a checkpoint whose name fits them: they must be refused."
    def refused(data):
        file = tmp_path/f'step-000000001-{hashlib.sha256(data).hexdigest()[:16]}.safetensors'
        file.write_bytes(data)
        with pytest.raises(BadCheckpoint): read_checkpoint(file)
        file.unlink()
    return refused

@pytest.mark.parametrize('text', ['[' * 100_000, '{"a":' * 50_000, '3', '[]', 'null', '"x"'], ids=lambda x: x[:6])
def test_a_config_that_is_no_table(text, offer): offer(config(text))

def test_checkpoints_from_someone_else(offer, tmp_path):
    "Pickles, folders, absurd shapes and configs under a name that fits: one kind of error, and nothing is run."
    class Boom:
        def __reduce__(self): return os._exit, (9,)
    torch.save(Boom(), tmp_path/'pickle'); offer((tmp_path/'pickle').read_bytes())
    for text in ('', 'nonsense', '\ud800'): offer(config(text))
    offer(header(b'{"w":{"dtype":"F32","shape":[4000000000,4000000000],"data_offsets":[0,64000000000000000000]}}'))
    offer(header(b'{"w":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]},"__metadata__":{"config":"{}"}}'))
    offer(header(b'{}')); offer(header(b'[]')); offer(header(b'{"__metadata__":{"x":"1"}}')); offer(b'')
    folder = tmp_path/'step-000000001-0123456789abcdef.safetensors'; folder.mkdir()
    with pytest.raises(BadCheckpoint): read_checkpoint(folder)
    folder.rmdir(); folder.symlink_to(folder)
    with pytest.raises(BadCheckpoint): read_checkpoint(folder)

# ---- commands: signals, a full disk, numbers that are none, other flags -------------------------------------------------------------

WORDS = ('fashion', '--epochs', '2', '--set', 'warmup_epochs=1', '--set', 'accumulate=4', '--bs', '40', '--num-workers', '0', '--save-every', '2')

def few(log, *more):
    "Before a command: 220 images instead of 10,000; note each step's last batch; then whatever else."
    def before():
        cli.load_source = lambda _: sets()
        Guard.after_step = lambda self: Steps(log).note(self.train_iter)
        for m in more: m()
    return before

def signals(n, *signums):
    "Send this very process signals in its n-th batch."
    return call(Guard, 'before_batch', n, do=lambda: [os.kill(os.getpid(), s) for s in signums])

@pytest.fixture
def pretrain(tmp_path):
    "Run `mae-pretrain`, note its steps, and give what it said and the steps."
    def run(log, *words, before=(), name='mae-pretrain', **env):
        (file := tmp_path/f'{log}.steps').unlink(missing_ok=True)
        got = begin_command(tmp_path, name, *words, before=few(file, *before), **env)[1]()
        return got, steps_of(file)
    return run

@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    "The command's run that nobody disturbs, and its steps."
    folder = tmp_path_factory.mktemp('command')
    got = begin_command(folder, 'mae-pretrain', *WORDS, '--out', 'run', before=few(folder/'steps'))[1]()
    assert got.code == 0, got.err
    return folder/'run', steps_of(folder/'steps')

@pytest.mark.parametrize('signum, code', [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), pytest.param(signal.SIGUSR1, 138, marks=pytest.mark.slow)])
def test_a_signal_finishes_the_step_and_saves_it(pretrain, undisturbed, tmp_path, signum, code):
    whole, steps = undisturbed
    got, done = pretrain('a', *WORDS, '--out', 'run', before=[signals(7, signum)])   # while the second step's gradients add up
    assert got.code == code and got.line.endswith('what was done so far is in run; go on with --resume run'), got
    assert f'{signum.name}: finishing the step' in got.out
    assert done == steps[:2] and newest_checkpoint(tmp_path/'run'/'checkpoints')[2]['run']['step'] == steps[1] + 1
    got, rest = pretrain('b', '--resume', 'run')
    assert got.code == 0 and done + rest == steps and 'goes on at epoch 0, batch 8 of 22' in got.out, got
    check_same(tmp_path/'run', whole)

@pytest.mark.parametrize('signum, code', [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130), pytest.param(signal.SIGUSR1, -signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_second_signal_ends_at_once(pretrain, tmp_path, signum, code):
    got, done = pretrain('a', *WORDS, '--out', 'run', before=[signals(7, signum, signum)])
    assert got.code == code and len(done) == 1, got
    assert not checkpoints_in(tmp_path/'run'/'checkpoints')
    if code == 130: assert got.line == 'mae-pretrain: interrupted; what was done so far is in run'

@pytest.mark.slow
@pytest.mark.parametrize('signum', [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize('delay', [0., .3, .8])
def test_a_signal_from_outside_at_any_time(pretrain, undisturbed, tmp_path, signum, delay):
    pid, said = begin_command(tmp_path, 'mae-pretrain', *WORDS, '--out', 'run', before=few(tmp_path/'a.steps'))
    until = time.time() + 60
    while not steps_of(tmp_path/'a.steps') and time.time() < until: time.sleep(.01)
    time.sleep(delay); os.kill(pid, signum)
    got = said()
    assert got.code == 128 + signum and 'go on with --resume run' in got.line, got
    got, rest = pretrain('b', '--resume', 'run')
    assert got.code == 0 and steps_of(tmp_path/'a.steps') + rest == undisturbed[1]
    check_same(tmp_path/'run', undisturbed[0])

@pytest.mark.parametrize('epochs', [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_finished_probe_keeps_its_results(pretrain, undisturbed, tmp_path, epochs):
    got, _ = pretrain('a', 'linear', 'fashion', undisturbed[0], '--epochs', epochs, '--set', 'warmup_epochs=0', '--bs', '20', '--num-workers', '0', '--out', 'probe', name='mae-probe')
    results = (tmp_path/'probe'/'results.json').read_text()
    got, steps = pretrain('b', '--resume', 'probe', name='mae-probe')
    assert got.code == 0 and not steps and (tmp_path/'probe'/'results.json').read_text() == results, got

def test_slurm_s_warning_puts_the_job_back_and_resume_auto_goes_on(pretrain, undisturbed, tmp_path):
    "The same line in a launch script, each time: begin, go on, find it finished."
    whole, steps = undisturbed
    (fake := tmp_path/'bin'/'scontrol').parent.mkdir()
    fake.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/requeued\n'); fake.chmod(0o755)
    env = dict(PATH=f'{fake.parent}{os.pathsep}{os.environ["PATH"]}', SLURM_JOB_ID='4711')
    words = (*WORDS, '--out', 'run', '--resume', 'auto')
    got, first = pretrain('a', *words, before=[signals(18, signal.SIGUSR1)], **env)
    assert got.code == 138 and (tmp_path/'requeued').read_text() == 'requeue 4711\n', got
    got, second = pretrain('b', *words, **env)
    assert got.code == 0 and first + second == steps, got
    check_same(tmp_path/'run', whole)
    weights = (tmp_path/'run'/'model.safetensors').read_bytes()
    got, third = pretrain('c', *words, **env)
    assert got.code == 0 and not third and 'finished already' in got.out and (tmp_path/'run'/'model.safetensors').read_bytes() == weights
    assert (tmp_path/'requeued').read_text().count('requeue') == 1

def test_a_run_goes_on_as_the_run_it_is(pretrain, undisturbed, tmp_path):
    "Another config, command or flag: one line that names it, and the folder is left alone."
    shutil.copytree(undisturbed[0], tmp_path/'run')
    before = {f: f.read_bytes() for f in (tmp_path/'run').rglob('*') if f.is_file()}
    auto = '--out', 'run', '--resume', 'auto'
    for name, words, said in (('mae-pretrain', (*WORDS, *auto, '--seed', '1'), 'run was begun with seed = 0, and now seed = 1'),
                              ('mae-pretrain', (*WORDS, *auto, '--max-steps', '3'), 'run was begun with max_steps = None, and now max_steps = 3'),
                              ('mae-pretrain', (*WORDS, *auto, '--epochs', '3'), 'run was begun with recipe = '),
                              ('mae-pretrain', ('--resume', 'run', '--epochs', '3'), '--epochs has no effect with --resume run'),
                              ('mae-pretrain', ('fashion', '--resume', 'run'), '--data has no effect with --resume run'),
                              ('mae-pretrain', ('--resume', 'run', '--out', 'other'), '--out has no effect with --resume run'),
                              ('mae-pretrain', ('--resume', 'nowhere'), 'nowhere is no run folder'),
                              ('mae-pretrain', (*WORDS, '--resume', 'auto'), '--resume auto needs --out'),
                              ('mae-pretrain', (*WORDS, '--out', 'run'), 'run is there already and not empty'),
                              ('mae-finetune', ('--resume', 'run'), 'run was made by mae-pretrain: go on with that command'),
                              ('mae-probe', ('linear', 'fashion', 'run', '--num-workers', '0', *auto), 'run was begun with task = ')):
        got, steps = pretrain('a', *words, name=name)
        assert got.code == 2 and said in got.line and not steps, (words, got)
    assert {f: f.read_bytes() for f in (tmp_path/'run').rglob('*') if f.is_file()} == before

LIBC = ctypes.CDLL(None, use_errno=True)

def small_disk(place, size, flags=0):
    "Mount a small disk, or say why there can be none."
    if LIBC.mount(b'tmpfs', str(place).encode(), b'tmpfs', flags, f'size={size}'.encode()): return f'no small disk here: {os.strerror(ctypes.get_errno())}'

def own_mounts():
    "A user namespace in which this process and its forks may mount, or why there can be none."
    ids = os.getuid(), os.getgid()
    if not hasattr(LIBC, 'unshare'): return 'no user namespaces here'
    if LIBC.unshare(0x10000000 | 0x20000): return f'no user namespaces here: {os.strerror(ctypes.get_errno())}'   # CLONE_NEWUSER, CLONE_NEWNS
    for file, text in (('setgroups', 'deny'), ('uid_map', f'0 {ids[0]} 1'), ('gid_map', f'0 {ids[1]} 1')): Path(f'/proc/self/{file}').write_text(text)

def test_a_disk_of_20_mb_that_fills_up(undisturbed, tmp_path):
    "Two checkpoints of 8 MB fit. The third stops the run, which goes on bit for bit when there is room, or trains on without where it was told to."
    (whole, steps), disk = undisturbed, tmp_path/'disk'
    disk.mkdir()
    def pretrain(log, *words):
        got = begin_command(tmp_path, 'mae-pretrain', *words, before=few(tmp_path/log))[1]()
        return got, steps_of(tmp_path/log)
    def story():
        if why := own_mounts() or small_disk(disk, '20m'): print(why); os._exit(77)
        got, done = pretrain('a', *WORDS, '--out', 'disk/run')
        assert got.code == 1 and 'no space left on the disk for a checkpoint in disk/run/checkpoints; the older ones there are whole: free some' in got.line and got.line.endswith('go on with --resume disk/run'), got
        found = checkpoints_in(disk/'run'/'checkpoints')
        assert len(found) == 2 and 0 < len(done) < len(steps) and all(read_checkpoint(f) for f in found)
        got, _ = pretrain('b', '--resume', 'disk/run')   # no room yet
        assert got.code == 1 and 'no space left on the disk' in got.line and all(read_checkpoint(f) for f in found), got
        assert not small_disk(disk, '60m', 32)           # MS_REMOUNT
        got, rest = pretrain('c', '--resume', 'disk/run')
        assert got.code == 0 and rest == steps[sum(s < step_of_name(found[0]) for s in steps):], got
        check_same(disk/'run', whole)
        shutil.rmtree(disk/'run'); assert not small_disk(disk, '20m', 32)
        got, done = pretrain('d', *WORDS, '--out', 'disk/run', '--if-full', 'continue')
        assert 'training goes on without' in got.out and done == steps and got.code == 0, got
        assert (disk/'run'/'model.safetensors').read_bytes() == (whole/'model.safetensors').read_bytes()
    code = exit_code(fork(story, tmp_path/'log'))
    if code == 77: pytest.skip((tmp_path/'log').read_text().strip())
    assert code == 0, (tmp_path/'log').read_text()

# ---- several processes --------------------------------------------------------------------------------------------------------------

class Seen(Callback):
    "Note each trained sample: where it came, its number, its pixels and its mask's or drop path's noise."
    order, run_valid = -5, False
    def __init__(self, file): self.file = file
    def before_batch(self):
        digest = lambda x: hashlib.sha256(x.numpy().tobytes()).hexdigest()[:12]
        rows = zip(self.yb[0].tolist(), *(map(digest, x) for x in self.xb if isinstance(x, torch.Tensor)))
        with open(self.file, 'a') as f: f.writelines(f'{json.dumps([self.epoch, self.iter, rank(), *row])}\n' for row in rows)

class Double(Callback):
    "Train in float64."
    order = -4
    def before_batch(self): self.learn.xb = tuple(x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in self.xb)

def free_port():
    with socket.socket() as s: s.bind(('localhost', 0)); return s.getsockname()[1]

def parallel(task, out, log, n, kills=None):
    "One life of a run in n processes; `kills` are {rank: moment}. Their exit codes."
    def process(r, port):
        os.environ.update(RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE=str(n), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
        torch.set_default_dtype(torch.float64)
        killers = (kills or {}).get(r, lambda: None)()
        notes = [Steps(log.with_suffix('.steps'))] if r == 0 else []
        with process_group():
            learn = learner(task, out, cbs=[*notes, Seen(log.with_suffix(f'.seen{r}')), Double(), *(killers or [])], parts=n, more={} if task == 'linear' else dict(accumulate=2), max_steps=12)
            learn.fit_recipe()
    port = free_port()
    pids = [fork(partial(process, r, port), log.with_suffix(f'.log{r}')) for r in range(n)]
    until = time.time() + 90
    while time.time() < until and any(os.waitid(os.P_PID, p, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None for p in pids): time.sleep(.02)
    for p in pids: os.kill(p, signal.SIGKILL)   # whoever waits for a dead one
    return [exit_code(p) for p in pids]

def seen(*logs):
    "What was trained, in order; a later life's batches stand for an earlier one's."
    found = {}
    for log in logs:
        life = {}
        for r in (0, 1):
            if not (file := log.with_suffix(f'.seen{r}')).exists(): continue
            for epoch, i, part, *sample in map(json.loads, file.read_text().splitlines()): life.setdefault((epoch, i), {}).setdefault(part, []).append(sample)
        found |= life
    return [sample for where in sorted(found) for part in sorted(found[where]) for sample in found[where][part]]

def said(log): return ''.join(f.read_text() for f in log.parent.glob(f'{log.stem}.log*'))

@pytest.fixture(scope='module')
def straight_parallel(tmp_path_factory):
    @cache
    def run(task, n):
        folder = tmp_path_factory.mktemp('parallel')
        assert parallel(task, folder/'run', folder/'a', n) == [0] * n, said(folder/'a')
        return folder/'run', steps_of(folder/'a.steps'), seen(folder/'a')
    return run

def lives_in_parallel(task, lives, straight_parallel, tmp_path, same):
    "Lives of (processes, kills); at the end the same samples were trained, and the weights are the same."
    out, everything = tmp_path/'run', []
    whole, steps, samples = straight_parallel(task, same)
    for i, (n, kills) in enumerate(lives):
        found = newest_checkpoint(out/'checkpoints')
        begin = sum(s < found[2]['run']['step'] for s in steps) if found else 0
        codes = parallel(task, out, tmp_path/str(i), n, kills)
        if kills: assert -signal.SIGKILL in codes and 0 not in codes, said(tmp_path/str(i))
        else: assert codes == [0] * n, said(tmp_path/str(i))
        done = steps_of(tmp_path/f'{i}.steps')
        assert done == steps[begin:begin + len(done)] and (begin > 0 or i == 0)
        everything += done
    assert sorted(set(everything)) == steps and len(everything) <= len(steps) + 5 * (len(lives) - 1)
    assert seen(*(tmp_path/str(i) for i in range(len(lives)))) == samples
    if len({n for n, _ in lives} | {same}) == 1: check_same(out, whole)
    else:
        ours, theirs = (newest_checkpoint(x/'checkpoints')[1] for x in (out, whole))
        for k, v in theirs.items():
            if k.startswith(('model.', 'opt.')): assert (ours[k].double() - v.double()).abs().max() <= 1e-9 * max(v.abs().max().item(), 1), k

one = {1: event('after_backward', 9)}
first = {0: event('after_step', 6)}
both = {0: half_a_save(3), 1: event('before_batch', 10)}

def test_two_processes_go_on(straight_parallel, tmp_path): lives_in_parallel('pretrain', [(2, one), (2, None)], straight_parallel, tmp_path, 2)

@pytest.mark.slow
@pytest.mark.parametrize('kills', [one, first, both], ids=['one', 'first', 'both'])
@pytest.mark.parametrize('task', ['pretrain', 'finetune', 'linear'])
def test_two_processes_killed(task, kills, straight_parallel, tmp_path): lives_in_parallel(task, [(2, kills), (2, None)], straight_parallel, tmp_path, 2)

@pytest.mark.slow
@pytest.mark.parametrize('task', ['pretrain', 'repeated pretrain', 'plain finetune'])
def test_from_two_processes_to_one_and_back(task, straight_parallel, tmp_path):
    lives_in_parallel(task, [(2, one), (1, {0: event('before_batch', 5)}), (2, None)], straight_parallel, tmp_path, 1)

@pytest.mark.slow
def test_from_one_process_to_two_and_back(straight_parallel, tmp_path):
    lives_in_parallel('pretrain', [(1, {0: event('after_loss', 9)}), (2, {0: event('after_pred', 5)}), (1, None)], straight_parallel, tmp_path, 2)

@pytest.mark.slow
def test_torchrun_begins_again_by_itself(photos, tmp_path):
    "A killed worker: torchrun starts all of them anew, and they go on."
    def begin(out):
        words = BIN/'mae-pretrain', 'photos', '--model', 'mae_vit_nano_patch4_32', '--set', 'amp=False', '--bs', '20', '--epochs', '8', '--num-workers', '0', '--save-every', '2'
        with open(tmp_path/f'{out}.log', 'w') as log:
            return subprocess.Popen([BIN/'torchrun', '--standalone', '--nproc-per-node', '2', '--max-restarts', '3', *words, '--out', out, '--resume', 'auto'], cwd=tmp_path, stdout=log, stderr=log)
    assert begin('straight').wait(300) == 0, (tmp_path/'straight.log').read_text()
    run, until = begin('run'), time.time() + 120
    while (newest_checkpoint(tmp_path/'run'/'checkpoints') or [None])[0] is None and time.time() < until: time.sleep(.05)
    workers = [int(x) for t in Path(f'/proc/{run.pid}/task').iterdir() for x in (t/'children').read_text().split()]
    os.kill(workers[1], signal.SIGKILL)
    assert run.wait(300) == 0 and 'goes on at epoch' in (tmp_path/'run.log').read_text(), (tmp_path/'run.log').read_text()
    check_same(tmp_path/'run', tmp_path/'straight')

# ---- numbers that are none ----------------------------------------------------------------------------------------------------------

class Poison(Callback):
    "Not a number: in the loss or a gradient of some steps."
    order, run_valid = 8, False
    def __init__(self, what, batches): self.what, self.batches = what, batches
    def after_loss(self):
        if self.what == 'loss' and self.train_iter in self.batches: self.learn.loss, self.learn.loss_grad = self.loss * math.nan, self.loss_grad * math.nan
    def after_backward(self):
        if self.what == 'gradient' and self.train_iter in self.batches: next(p.grad for p in self.model.parameters() if p.grad is not None).view(-1)[-1] = math.nan

class Moved(Callback):
    "Note whether a step has changed any bit of weights and optimizer state."
    order, run_valid = 12, False
    def __init__(self, moved): self.moved = moved
    def bits(self):
        weights = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        return weights | {f'{n}.{k}': v.clone() for n, _, state in checkpoints._moments(self.opt.opt) for k, v in state.items() if isinstance(v, torch.Tensor)}
    def before_step(self): self.old = self.bits()
    def after_step(self): self.moved.append(any(not checkpoints._same(self.old.get(k, torch.zeros_like(v)), v) for k, v in self.bits().items()))

@pytest.mark.parametrize('task, what', [('pretrain', 'gradient'), ('linear', 'loss'), *(pytest.param(*x, marks=pytest.mark.slow) for x in (('pretrain', 'loss'), ('linear', 'gradient'), ('finetune', 'gradient'), ('finetune', 'loss')))])
def test_a_bad_step_is_skipped_and_counted(task, what, straight, tmp_path):
    "AdamW and LARS: nothing moves in it, not even a counter. Also in the first step, and where gradients add up."
    steps = straight(task)[1]
    bad = {0, 7, 9}
    poisoned = Poison(what, [steps[i] for i in bad])
    def run():
        moved = []
        learn = learner(task, tmp_path/'run', cbs=[poisoned, Moved(moved)])
        learn.fit_recipe()
        assert [i for i, m in enumerate(moved) if not m] == sorted(bad), moved
        assert all(p.isfinite().all() for p in learn.model.parameters()) and learn.guard.skipped == 3
        assert all(math.isfinite(v) for row in learn.recorder.values for v in row)
    in_fork(run, tmp_path/'log')
    per_epoch = len(steps) // 3
    rows = (tmp_path/'run'/'metrics.csv').read_text().splitlines()
    assert [int(r.split(',')[-1]) for r in rows[1:]] == [sum(b < per_epoch * (e + 1) for b in bad) for e in range(3)] and rows[0].endswith('skipped')
    assert (tmp_path/'log').read_text().count('the step is skipped') == 3

def test_bad_steps_in_a_row_end_the_run_and_one_can_be_seen_again(pretrain, tmp_path):
    "A weight that is no number in the second block: the run stops with one line, and mae-replay finds the layer."
    words = (*WORDS[:2], '3', *WORDS[3:])
    got, done = pretrain('a', *words, '--out', 'run', before=[signals(7, signal.SIGTERM)])
    assert got.code == 143
    file, tensors, config = newest_checkpoint(tmp_path/'run'/'checkpoints')
    tensors['model.encoder.blocks.1.mlp.fc1.weight'][3, 5] = math.nan
    file.unlink()
    checkpoints.save_checkpoint(file.parent, step_of_name(file), tensors, config)
    got, rest = pretrain('b', '--resume', 'run')
    where = 'run/bad_steps/epoch-1-batch-20'   # the tenth of them is the epoch's last, smaller step
    assert got.code == 1 and '10 steps in a row had a loss or gradient that is not a number, the last one at epoch 1, batch 20' in got.line and f'mae-replay {where}' in got.line, got
    assert len(rest) == 10 and got.out.count('the step is skipped') == 10
    told = json.loads((tmp_path/where/'step.json').read_text())
    order = KeyedBatches(220, 10).whole(1)
    assert told['samples'] == torch.cat(order[20:22]).tolist() and told['batches'] == 2
    got, _ = pretrain('c', where, '--json', 'found.json', name='mae-replay')
    found = json.loads((tmp_path/'found.json').read_text())
    assert got.code == 0 and found['first_bad_module'] == 'encoder.blocks.1.mlp.fc1' and 'encoder.blocks.1.mlp.fc1, of type Linear' in got.out, got
    assert len(found['losses']) == 2 and all(map(math.isnan, found['losses'])) and found['bad_gradients'] and ', '.join(map(str, told['samples'])) in got.out
    weights = checkpoints.newest_checkpoint(tmp_path/where/'checkpoints')[1]
    for k, v in weights.items():
        if k.startswith('model.'): assert checkpoints._same(v, tensors[k]), k   # no bad step has moved anything

def test_a_spike_is_noted_with_its_samples(tmp_path):
    class Spike(Callback):
        order, run_valid = 8, False
        def after_loss(self):
            if self.train_iter == 120: self.learn.loss = self.loss + 50; (tmp_path/'samples').write_text(' '.join(map(str, self.yb[0].tolist())))
    in_fork(lambda: learner('pretrain', tmp_path/'run', more=dict(batch_size=10, accumulate=1, epochs=6), cbs=[Spike()]).fit_recipe(), tmp_path/'log')
    (row,) = csv.DictReader((tmp_path/'run'/'spikes.csv').open())
    assert (row['epoch'], row['batch'], row['samples']) == ('5', '10', (tmp_path/'samples').read_text()) and float(row['loss']) > 50 > float(row['usual']) > 0
