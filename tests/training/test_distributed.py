"""Several processes train the model that one would have trained, and end together whatever happens."""
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from functools import partial, partialmethod
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from fastai.callback.core import Callback
from fastcore.script import _run_cli
from safetensors.torch import load_file
from support import BIN, Said
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.functional import cross_entropy

from mae_nb import commands as cli
from mae_nb.base.keyed import seeded
from mae_nb.base.processes import gather_values, process_group, processes, rank, sum_over_processes
from mae_nb.data.datasets import fashion
from mae_nb.data.loader import get_dls, loader_batch
from mae_nb.model.classifier import create_classifier
from mae_nb.model.mae import create_mae
from mae_nb.tasks.finetune import finetune_learner, partial_learner
from mae_nb.tasks.pretrain import pretrain_learner
from mae_nb.tasks.probes import linear_probe_learner
from mae_nb.training.checkpoints import newest_checkpoint, whole_tensor
from mae_nb.training.distributed import PARALLEL, submit
from mae_nb.training.presets import RECIPES
from mae_nb.training.recipes import override
from mae_nb.training.runs import make_run, read_metrics
from mae_nb.training.switches import compile_model

SMALL = dict(in_chans=1, dim=32, depth=2, num_heads=2)
NAME = 'mae_vit_nano_patch4_28'
NANO = '--model', 'mae_vit_nano_patch4_32', '--set', 'amp=False', '--set', 'warmup_epochs=1', '--num-workers', '0', '--epochs', '2', '--bs', '20'

# ---- processes that are forked from this one, which has imported everything ----------------------------------------

def free_port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]

def spread(n, func, folder, seconds=100):
    "Run `func` in `n` processes that train together: what each returned, printed and its exit code."
    folder.mkdir(exist_ok=True, parents=True)
    where = dict(WORLD_SIZE=n, LOCAL_WORLD_SIZE=n, MASTER_ADDR='127.0.0.1', MASTER_PORT=free_port())
    sys.stdout.flush(); sys.stderr.flush()
    pids = [fork(func, folder/f'{i}', dict(where, RANK=i, LOCAL_RANK=i)) for i in range(n)]
    end, codes = time.time() + seconds, {}
    while len(codes) < n and time.time() < end:
        for pid in set(pids) - set(codes):
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT): codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        time.sleep(.02)
    for pid in set(pids) - set(codes): os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
    load = lambda f: torch.load(f, weights_only=False) if f.exists() else None
    return [SimpleNamespace(result=load(folder/f'{i}.pt'), said=(folder/f'{i}.txt').read_text(), code=codes.get(pid)) for i, pid in enumerate(pids)]

def fork(func, file, env):
    if pid := os.fork(): return pid
    torch.set_num_threads(1)   # makes the thread pool anew, which later two threads might do at once
    code = 1
    try:
        fd = os.open(f'{file}.txt', os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(fd, 1); os.dup2(fd, 2); sys.stdout, sys.stderr = os.fdopen(1, 'w'), os.fdopen(2, 'w')
        os.environ.update({k: str(v) for k, v in env.items()})
        with process_group(): torch.save(func(), f'{file}.pt')
        code = 0
    except BaseException: traceback.print_exc()
    finally:
        sys.stdout.flush(); sys.stderr.flush()
        os._exit(code)

def results(runs):
    assert [r.code for r in runs] == [0] * len(runs), '\n'.join(r.said for r in runs)
    return [r.result for r in runs]

# ---- the same training, in whichever number of processes -----------------------------------------------------------

class Double(Callback):
    "Train in float64, so that what differs does not drown in rounding."
    order = -6
    def before_batch(self): self.learn.xb = tuple(x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in self.xb)

class CountReduces(Callback):
    "Count how often gradients travel: DDP's all-reduces; with FSDP the batches after which the weights' parts have a gradient."
    order, count = 91, 0
    def before_train(self):
        if self.epoch == 0 and hasattr(self.learn, 'parallel'): self.parallel.wrapped.register_comm_hook(self, self.hook)
    @staticmethod
    def hook(self, bucket): self.count += 1; return allreduce_hook(None, bucket)
    def after_backward(self):
        if hasattr(self.learn, 'sharded'): self.count += any(p.grad is not None for p in self.model.parameters())

def learner(task, out=None, steps=20, cbs=(), **kwargs):
    "220 samples in batches of 20, two for each step: eleven batches, so an epoch's last step has one."
    train, test = fashion()
    own = dict(epochs=4, warmup_epochs=1, batch_size=40)
    if task != 'linear': own |= dict(accumulate=2)
    if task in ('finetune', 'partial'): own |= dict(ema=.9, drop_path=.1, mixup=0, cutmix=0)
    if task == 'pretrain': own |= dict(clip=1.)
    r = override(RECIPES[f'{task}_fashion'], own)
    dls = get_dls((train.take(range(220)), test.take(range(51))), r, img_size=28, bs=loader_batch(r, processes()), device='cpu')
    smoothing = getattr(r, 'label_smoothing', 0.)
    mae = seeded(0, create_mae, NAME, target='pixels', decoder_dim=32, **SMALL).double()
    classifier = seeded(0, create_classifier, NAME, 10, drop_path=.1, **SMALL).double()
    make = dict(pretrain=(pretrain_learner, mae), finetune=(finetune_learner, classifier), partial=(partial_learner, classifier), linear=(linear_probe_learner, mae))
    func, model = make[task]
    learn = func(dls, model, r, out=out, max_steps=steps, cbs=[Double(), *cbs], **kwargs)
    if task != 'pretrain': learn.loss_func = lambda logits, _, labels: cross_entropy(logits, labels, label_smoothing=smoothing * torch.is_grad_enabled())   # the recipe's rounds to float32
    return learn

def trained(task, out=None, change_model=lambda m: None, parallel='ddp'):
    "Weights, the metrics of each epoch, those of a validation afterwards, and how often gradients were reduced."
    torch.set_default_dtype(torch.float64)
    counts = [CountReduces()] if processes() > 1 else []
    learn = learner(task, out, cbs=counts, parallel=parallel)
    change_model(learn.model)
    learn.fit_recipe()
    rows, batches, again = [[float(v) for v in row] for row in learn.recorder.values], learn.train_iter, [float(v) for v in learn.validate()]
    state = {k: whole_tensor(v).clone() for k, v in learn.model.state_dict().items()}
    return SimpleNamespace(state=state, rows=rows, again=again, batches=batches, steps=learn.opt.opt.state[learn.opt.opt.param_groups[0]['params'][0]].get('step'), reduces=counts[0].count if counts else 0)

def assert_near(a, b, tolerance=1e-9):
    for k, v in a.state.items(): torch.testing.assert_close(v, b.state[k], rtol=tolerance, atol=tolerance, msg=lambda m, k=k: f'{k}: {m}')
    torch.testing.assert_close(torch.tensor(a.rows), torch.tensor(b.rows), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(torch.tensor(a.again), torch.tensor(b.again), rtol=tolerance, atol=tolerance)

TASKS = 'pretrain', 'finetune', 'partial'

@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    "What one process makes of each task."
    return results(spread(1, lambda: {t: trained(t) for t in TASKS}, tmp_path_factory.mktemp('alone')))[0]

@pytest.mark.parametrize('n', [2, 4])
@pytest.mark.parametrize('parallel', PARALLEL)
def test_many_processes_train_what_one_does(alone, tmp_path, n, parallel):
    "Float64, 20 steps of two batches, to 1e-9: weights and, on 51 samples, metrics; gradients travel once a step."
    for got in results(spread(n, lambda: {t: trained(t, parallel=parallel) for t in TASKS}, tmp_path)):
        for t in TASKS:
            assert_near(alone[t], got[t])
            assert alone[t].batches == got[t].batches == 37 and got[t].steps == 20
            assert got[t].reduces == 20, (t, got[t].reduces)

class Leave(Callback):
    "Fail behind the checkpoint of a batch."
    order = 66
    def __init__(self, batch): self.batch = batch
    def after_batch(self):
        if self.training and self.train_iter == self.batch: raise EOFError('enough for now')

def test_a_run_goes_on_with_other_processes(tmp_path):
    "Cut over four processes, copied in two, cut over two from before a validation, alone: what is kept is one process's."
    def go_on(out, leave, parallel):
        torch.set_default_dtype(torch.float64)
        learner('finetune', make_run(out, {}, resume=True), cbs=[Leave(leave)], parallel=parallel, save_every=1).fit_recipe()
    for i, (n, parallel, leave) in enumerate([(4, 'fsdp', 8), (2, 'ddp', 22), (2, 'fsdp', 30), (1, 'ddp', None)]):
        for r in spread(n, partial(go_on, tmp_path/'run', leave, parallel), tmp_path/f'{i}'):
            assert r.code == (leave is not None) and ('enough for now' in r.said) == (leave is not None), r.said
    results(spread(1, lambda: go_on(tmp_path/'once', None, 'ddp'), tmp_path/'say'))
    (_, run, config), (_, once, same) = (newest_checkpoint(tmp_path/f/'checkpoints') for f in ('run', 'once'))
    assert config['run']['step'] == same['run']['step'] == 37 and run.keys() == once.keys()
    for k, v in run.items(): torch.testing.assert_close(v, once[k], rtol=1e-9, atol=1e-9, msg=lambda m, k=k: f'{k}: {m}')
    assert_same_metrics(tmp_path/'run', tmp_path/'once', 1e-9)
    run, once = (load_file(tmp_path/f/'model.safetensors') for f in ('run', 'once'))
    assert run.keys() == once.keys() and all(torch.allclose(v, once[k], rtol=1e-9, atol=1e-9) for k, v in run.items())

def test_what_a_cut_model_leaves(tmp_path):
    "The weights' file is the average's; afterwards one process alone may use the model, and a second fit goes on, as watchful as the first."
    def train():
        torch.set_default_dtype(torch.float64)
        learn = learner('finetune', make_run(tmp_path/'run', {}), steps=4, parallel='fsdp')
        learn.fit_recipe()
        images, file = torch.rand(2, 1, 28, 28), load_file(tmp_path/'run'/'model.safetensors') if rank() == 0 else None
        with torch.no_grad(): one = learn.model.eval()(images) if rank() == 0 else None
        average = {k: whole_tensor(v) for k, v in learn.weight_ema.average.module.state_dict().items()}
        weights = {k: whole_tensor(v).clone() for k, v in learn.model.state_dict().items()}
        spoil(learn, {1})
        learn.fit(1, lr=1e-3)
        return SimpleNamespace(skipped=int(learn.guard.skipped), images=images, file=file, one=one, average=average, weights=weights, moved={k: whole_tensor(v) for k, v in learn.model.state_dict().items()})
    first, second = results(spread(2, train, tmp_path/'say'))
    assert (first.skipped, second.skipped) == (1, 1)
    model = seeded(0, create_classifier, NAME, 10, drop_path=.1, **SMALL).double().eval()
    model.load_state_dict(first.weights)
    with torch.no_grad(): torch.testing.assert_close(model(first.images), first.one)
    assert first.file.keys() == first.average.keys() and all(torch.equal(v, first.average[k]) for k, v in first.file.items())
    assert all(torch.equal(v, second.moved[k]) for k, v in first.moved.items()) and not torch.equal(first.moved['head.weight'], first.weights['head.weight'])

def spoil(learn, batches):
    "Make the last process's loss in some batches infinite."
    class Spoil(Callback):
        order, run_valid = 5, False
        def after_loss(self):
            if self.train_iter in batches and rank() == processes() - 1: self.learn.loss_grad = self.loss_grad * float('inf')
    learn.add_cb(Spoil())

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
    assert first.code == second.code == 1 and '2 steps in a row had a loss or gradient that is not a number' in first.said, first.said
    assert 'epoch 0, batch 3: loss or gradient is not a number, the step is skipped (1 so far)' in first.said and 'skipped' not in second.said
    bad, = (tmp_path/'run'/'bad_steps').iterdir()
    _, tensors, _ = newest_checkpoint(bad/'checkpoints')
    assert all(v.isfinite().all() for v in tensors.values() if v.is_floating_point())
    assert tensors['opt.encoder.cls_token.step'] == 3   # the second step of four was skipped, then came the two

def compiled(model, how):
    "`compile_model` with a backend that needs no compiler."
    with patch.object(nn.Module, 'compile', partialmethod(nn.Module.compile, backend='aot_eager')): compile_model(model, how)

@pytest.mark.slow
@pytest.mark.parametrize('parallel', PARALLEL)
@pytest.mark.parametrize('how', ['blocks', 'whole'])
def test_compiled_models_train_as_eager_ones(alone, tmp_path, how, parallel):
    for got in results(spread(2, lambda: trained('pretrain', change_model=lambda m: compiled(m, how), parallel=parallel), tmp_path)):
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
    def judge():
        torch.set_default_dtype(torch.float64)
        learn = learner('linear'); learn.model.load_state_dict(first.state)
        return [float(v) for v in learn.validate()]
    assert results(spread(1, judge, tmp_path/'one'))[0] == pytest.approx(first.again, abs=1e-9)
    alone = results(spread(1, lambda: trained('linear'), tmp_path/'alone'))[0]
    assert first.rows[-1][0] == pytest.approx(alone.rows[-1][0], rel=.2)   # near, and no more: batches of 20 were normed, not of 40

def test_sums_are_over_all_and_the_empty_handed_take_part(tmp_path):
    def sums(): return sum_over_processes(torch.tensor(rank() + 1.), 0 if rank() else 3).tolist(), gather_values(rank() or None)
    assert results(spread(3, sums, tmp_path)) == [([6., 3.], [None, 1, 2])] * 3

# ---- when something goes wrong in one of them ----------------------------------------------------------------------

class InLast(Callback):
    "Do something in the last process, in the middle of a step of the first epoch."
    order = 5
    def __init__(self, what): self.what = what
    def after_pred(self):
        if self.training and self.iter == 4 and rank() == processes() - 1: self.what()

def fail(): raise OSError('the disk of the last one is on fire')

@pytest.mark.parametrize('parallel', PARALLEL)
@pytest.mark.parametrize('what, code, said', [(lambda: os.kill(os.getpid(), signal.SIGKILL), -9, ''), (fail, 1, 'the disk of the last one is on fire')], ids=['killed', 'error'])
def test_one_that_ends_takes_the_others_along(tmp_path, what, code, said, parallel):
    start = time.time()
    *others, last = spread(4, lambda: learner('pretrain', make_run(tmp_path/'run', {}), cbs=[InLast(what)], parallel=parallel).fit_recipe(), tmp_path/'say', 60)
    assert time.time() - start < 30
    assert last.code == code and said in last.said
    assert all(r.code == 1 and 'another process has ended' in r.said for r in others), [r.said for r in others]

def test_an_error_before_the_first_step(tmp_path):
    "The last one does not come as far as the run folder."
    def begin():
        if rank() == 1: raise FileNotFoundError('no weights on this machine')
        make_run(tmp_path/'run', {}); learner('pretrain', tmp_path/'run').fit_recipe()
    start = time.time()
    first, second = spread(2, begin, tmp_path/'say', 60)
    assert first.code == second.code == 1 and time.time() - start < 30
    assert 'no weights on this machine' in second.said and 'another process has ended' in first.said

def test_a_run_folder_that_is_taken_is_told_to_all(tmp_path):
    (tmp_path/'run').mkdir(); (tmp_path/'run'/'mine').touch()
    for r in spread(2, lambda: make_run(tmp_path/'run', {}), tmp_path/'say', 60): assert r.code == 1 and 'there already and not empty' in r.said

def test_a_full_disk_of_the_one_that_writes(tmp_path, monkeypatch):
    def full(*_): raise OSError(28, 'No space left on device')
    monkeypatch.setattr('mae_nb.training.checkpoints.save_checkpoint', full)
    start = time.time()
    first, second = spread(2, lambda: learner('pretrain', make_run(tmp_path/'run', {})).fit_recipe(), tmp_path/'say', 60)
    assert first.code == second.code == 1 and time.time() - start < 30
    assert 'no space left on the disk for a checkpoint' in first.said

def test_processes_that_would_go_on_from_different_steps_are_stopped(tmp_path):
    "Two machines without a common disk: only the first one has its run."
    results(spread(1, lambda: learner('pretrain', make_run(tmp_path/'0', {}), steps=3).fit_recipe(), tmp_path/'before'))
    (tmp_path/'0'/'checkpoints'/'fit-1.done').unlink()
    def go_on():
        make_run(tmp_path/'0', {}, resume=True)
        learner('pretrain', tmp_path/f'{rank()}', steps=3).fit_recipe()
    for r in spread(2, go_on, tmp_path/'say', 60): assert r.code == 1 and 'do not start at the same step' in r.said, r.said

def test_bad_files_end_all_with_one_line(photos, tmp_path, monkeypatch):
    "Whichever process meets too many of them says so."
    monkeypatch.chdir(tmp_path)
    for i in (5, 7, 9, 11, 13): (photos/'odd'/f'{i:03}.png').write_bytes(b'garbage')
    def command():
        sys.argv = ['mae-pretrain', 'photos', *NANO]
        _run_cli(cli.mae_pretrain.__wrapped__, False)
    start, runs = time.time(), spread(2, command, tmp_path/'say', 60)
    assert time.time() - start < 30 and [r.code for r in runs] == [1, 1]
    assert any('mae-pretrain: error: ' in r.said and 'could not be read, more than 1%' in r.said for r in runs), [r.said for r in runs]

# ---- the commands, as torchrun starts them -------------------------------------------------------------------------

@pytest.fixture
def torchrun(tmp_path):
    "Run a command in several processes."
    def run(*words, options=('--nproc-per-node', '2'), **env):
        if '--rdzv-backend' not in options: options = *options, '--master-port', str(free_port())
        done = subprocess.run([BIN/'torchrun', *options, BIN/words[0], *map(str, words[1:])], capture_output=True, text=True, cwd=tmp_path, env=os.environ | env, timeout=120)
        return Said(done.stdout, done.stderr, done.returncode)
    return run

def assert_same_metrics(a, b, rel=1e-4):
    a, b = read_metrics(a), read_metrics(b)
    assert a.keys() == b.keys() and all(a[k] == pytest.approx(b[k], rel=rel, nan_ok=True) for k in a), (a, b)

def once(text, *words): assert [text.count(w) for w in words] == [1] * len(words), text

@pytest.mark.parametrize('parallel', ['ddp', pytest.param('fsdp', marks=pytest.mark.slow)])
def test_pretraining_under_torchrun(torchrun, forked, photos, tmp_path, parallel):
    got = torchrun('mae-pretrain', 'photos', *NANO, '--parallel', parallel)
    assert got.code == 0, got.err
    assert [f.name for f in (tmp_path/'runs').iterdir()] == ['pretrain-1']
    once(got.out, 'pretraining mae_vit_nano', 'train_loss', '(10 a batch x 2 processes x 1 accumulated)', 'peak memory')
    assert len((tmp_path/'runs'/'pretrain-1'/'metrics.csv').read_text().splitlines()) == 3
    assert forked('mae-pretrain', 'photos', *NANO, '--out', 'one').code == 0
    assert_same_metrics(tmp_path/'runs'/'pretrain-1', tmp_path/'one')

@pytest.mark.slow
@pytest.mark.parametrize('parallel', PARALLEL)
def test_finetuning_and_probing_under_torchrun(torchrun, forked, photos, tmp_path, parallel):
    assert forked('mae-pretrain', 'photos', *NANO, '--out', 'mae').code == 0
    for words in (('mae-finetune', 'photos', 'mae', '--set', 'mixup=0', '--set', 'cutmix=0', *NANO[2:]), ('mae-probe', 'linear', 'photos', 'mae', *NANO[2:])):
        name = words[0].removeprefix('mae-')
        got = torchrun(*words, *(['--parallel', parallel] if name == 'finetune' else []), '--out', name, '--json' if name == 'probe' else '--seed', 'told.json' if name == 'probe' else '0')
        assert got.code == 0, got.err
        once(got.out, 'train_loss', 'peak memory', 'has no validation set')
        assert {'classes.csv', 'metrics.csv', 'model.safetensors', 'config.json'} <= {f.name for f in (tmp_path/name).iterdir()}
        assert sum(int(line.split(',')[1]) for line in (tmp_path/name/'classes.csv').read_text().splitlines()[1:]) == 12   # each image of the validation once
        assert forked(*words, '--out', f'{name}-alone').code == 0
        if name == 'finetune': assert_same_metrics(tmp_path/name, tmp_path/f'{name}-alone')   # a probe's batch norm sees its own part
    assert (tmp_path/'told.json').is_file()

@pytest.mark.parametrize('words, said', [
    (('mae-pretrain', 'photos', *NANO, '--bs', '21'), 'batch_size 21 does not divide into 2 parts'),
    (('mae-pretrain', 'photos', *NANO, '--out', 'photos'), 'photos is there already and not empty'),
    (('mae-finetune', 'photos', 'gone.safetensors', '--epochs', '1'), 'gone.safetensors'),
])
@pytest.mark.slow
def test_wrong_arguments_under_torchrun(torchrun, photos, words, said):
    start, got = time.time(), torchrun(*words)
    assert got.code == 1 and said in got.err and time.time() - start < 40, got.err

def children(pid):
    "The processes that a process has started."
    return [int(p) for p in subprocess.run(['ps', '-o', 'pid=', '--ppid', str(pid)], capture_output=True, text=True).stdout.split()]

@pytest.fixture
def kill_one(photos, tmp_path):
    "A pretraining in two processes, one of which is killed after an epoch: torchrun's exit code, what was said, and the seconds it took to end."
    def run(epochs, *options, **env):
        with open(tmp_path/'said', 'w') as said:
            agent = subprocess.Popen([BIN/'torchrun', '--standalone', '--nproc-per-node', '2', *options, BIN/'mae-pretrain', 'photos', *NANO, '--epochs', str(epochs), '--out', 'run', '--resume', 'auto'],
                                     cwd=tmp_path, stdout=said, stderr=said, env=os.environ | env)
            end = time.time() + 100
            while not (tmp_path/'run'/'metrics.csv').exists() or len((tmp_path/'run'/'metrics.csv').read_text().splitlines()) < 2:
                assert time.time() < end and agent.poll() is None, (tmp_path/'said').read_text()
                time.sleep(.1)
            start = time.time()
            os.kill(children(agent.pid)[-1], signal.SIGKILL)
            return agent.wait(120), (tmp_path/'said').read_text(), time.time() - start
    return run

def test_a_killed_process_ends_torchrun(kill_one):
    code, said, seconds = kill_one(1000)
    assert code == 1 and 'Signal 9 (SIGKILL)' in said and seconds < 30, said

@pytest.mark.slow
def test_torchrun_starts_a_run_again(kill_one, tmp_path):
    code, said, _ = kill_one(40, '--max-restarts', '1', TORCH_DISABLE_SHARE_RDZV_TCP_STORE='1')   # else the new processes find the old ones' addresses
    assert code == 0 and 'goes on at epoch' in said, said
    assert len((tmp_path/'run'/'metrics.csv').read_text().splitlines()) == 41

@pytest.mark.slow
@pytest.mark.parametrize('parallel', PARALLEL)
def test_two_machines_train_one_model(forked, photos, tmp_path, parallel):
    "Two torchrun agents that find each other by address alone."
    options = ['--nnodes', '2', '--nproc-per-node', '1', '--rdzv-backend', 'c10d', '--rdzv-endpoint', f'localhost:{free_port()}', '--rdzv-id', 'run']
    start = lambda: subprocess.Popen([BIN/'torchrun', *options, BIN/'mae-pretrain', 'photos', *NANO, '--out', 'two', '--parallel', parallel], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    machines = [start(), start()]
    said = [m.communicate(timeout=150)[0] for m in machines]
    assert [m.returncode for m in machines] == [0, 0], said
    once(''.join(said), 'train_loss', '2 processes', 'peak memory')
    assert forked('mae-pretrain', 'photos', *NANO, '--out', 'one').code == 0
    assert_same_metrics(tmp_path/'two', tmp_path/'one')

# ---- from a notebook, and through Slurm's queue --------------------------------------------------------------------

@pytest.mark.slow
def test_a_notebook_that_has_trained_starts_two_processes(tmp_path):
    "accelerate's launcher forks a kernel whose threads have worked already."
    pytest.importorskip('accelerate'); nbformat, nbclient = pytest.importorskip('nbformat'), pytest.importorskip('nbclient')
    words = f"""
import warnings; warnings.filterwarnings('ignore')
import torch
torch.set_num_threads(2)
from accelerate import notebook_launcher
from mae_nb.all import *
def train(out):
    with together():
        images, test = fashion()
        r = change(RECIPES['pretrain_fashion'], dict(epochs=2, warmup_epochs=1, batch_size=40))
        dls = get_dls((images.take(range(220)), test.take(range(51))), r, img_size=28, bs=loader_batch(r, processes()), device='cpu')
        model = seeded(0, create_mae, 'mae_vit_nano_patch4_28', in_chans=1, **mae_options(r))
        pretrain_learner(dls, model, r, out=make_run(out, dict(processes=processes()))).fit_recipe()
train('one')
notebook_launcher(train, ('two',), num_processes=2, use_port='{free_port()}')"""
    nbclient.NotebookClient(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(words)]), timeout=100, kernel_name='python3', resources=dict(metadata=dict(path=str(tmp_path)))).execute()
    assert '"processes": 2' in (tmp_path/'two'/'config.json').read_text()
    assert_same_metrics(tmp_path/'one', tmp_path/'two')

@pytest.mark.slow
def test_a_job_for_slurm(photos, forked, tmp_path, monkeypatch):
    "submitit's local executor: two processes train, are preempted, come back, and go on."
    pytest.importorskip('submitit')
    monkeypatch.chdir(tmp_path)
    words = [BIN/'mae-pretrain', 'photos', *NANO, '--epochs', '40', '--resume', 'auto']
    job = submit([*words, '--out', 'two'], tmp_path/'slurm', per_node=2, cluster='local', gpus_per_node=0)
    end = time.time() + 60
    while not (tmp_path/'two'/'metrics.csv').exists() or len((tmp_path/'two'/'metrics.csv').read_text().splitlines()) < 4: assert time.time() < end and job.state == 'RUNNING', job.stderr(); time.sleep(.1)
    for task in children(job._process.pid):   # Slurm signals each process of a job
        for p in (task, *children(task)): os.kill(p, signal.SIGUSR2)
    job.results()
    assert 'goes on at epoch' in job.stdout() + job.task(0).stdout(), job.stderr()
    assert forked(*map(str, ['mae-pretrain', *words[1:], '--out', 'one'])).code == 0
    assert_same_metrics(tmp_path/'two', tmp_path/'one')
