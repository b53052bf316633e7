"""Losses and gradients that are not numbers: skipped, counted, kept for a second look; spikes are noted."""
import csv
import json
import math
import os
import signal

import pytest
import torch
from fastai.callback.core import Callback
from tiny_runs import WORDS, in_fork, learner, signals, step_in_name

from mae_nb.data.loader import KeyedBatches
from mae_nb.training.state import newest_checkpoint, optimizer_states, same_bits, save_checkpoint

pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='trains in forked processes, which Windows lacks')

class Poison(Callback):
    "NaN in the loss or a gradient of some steps."
    order, run_valid = 8, False
    def __init__(self, where, batches): self.where, self.batches = where, batches
    def after_loss(self):
        if self.where == 'loss' and self.train_iter in self.batches:
            self.learn.loss, self.learn.loss_grad = self.loss * math.nan, self.loss_grad * math.nan

    def after_backward(self):
        if self.where == 'gradient' and self.train_iter in self.batches:
            next(p.grad for p in self.model.parameters() if p.grad is not None).view(-1)[-1] = math.nan

class Moved(Callback):
    "Note whether a step has changed any bit of weights and optimizer state."
    order, run_valid = 12, False
    def __init__(self, moved): self.moved = moved
    def tensors(self):
        tensors = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        for name, _, state in optimizer_states(self.opt.opt):
            tensors |= {f'{name}.{k}': v.clone() for k, v in state.items() if isinstance(v, torch.Tensor)}
        return tensors

    def before_step(self): self.old = self.tensors()
    def after_step(self):
        same = [same_bits(self.old.get(k, torch.zeros_like(v)), v) for k, v in self.tensors().items()]
        self.moved.append(not all(same))

SLOW = ('pretrain', 'loss'), ('linear', 'gradient'), ('finetune', 'gradient'), ('finetune', 'loss')

@pytest.mark.parametrize('task, where', [('pretrain', 'gradient'), ('linear', 'loss'),
                                         *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_a_bad_step_is_skipped_and_counted(task, where, straight, tmp_path):
    "AdamW and LARS: nothing moves in it, not even a counter. Also in the first step, and where gradients add up."
    steps, bad = straight(task).steps, {0, 7, 9}
    poison = Poison(where, [steps[i] for i in bad])
    def run():
        moved = []
        learn = learner(task, tmp_path/'run', cbs=[poison, Moved(moved)])
        learn.fit_recipe()
        assert [i for i, m in enumerate(moved) if not m] == sorted(bad), moved
        assert all(p.isfinite().all() for p in learn.model.parameters()) and learn.guard.skipped == 3
        assert all(math.isfinite(v) for row in learn.recorder.values for v in row)
    in_fork(run, tmp_path/'log')
    header, *rows = (tmp_path/'run'/'metrics.csv').read_text().splitlines()
    assert header.endswith('skipped')
    per_epoch = len(steps) // 3
    skipped = [sum(i < per_epoch * (epoch + 1) for i in bad) for epoch in range(3)]
    assert [int(row.split(',')[-1]) for row in rows] == skipped
    assert (tmp_path/'log').read_text().count('the step is skipped') == 3

@pytest.fixture
def sick_run(pretrain, tmp_path):
    "A run with a NaN in a weight of its second block: the newest checkpoint's tensors."
    words = (*WORDS[:2], '3', *WORDS[3:])
    got, _ = pretrain('a', *words, '--out', 'run', before=[signals(7, signal.SIGTERM)])
    assert got.code == 143, got
    file, tensors, config = newest_checkpoint(tmp_path/'run'/'checkpoints')
    tensors['model.encoder.blocks.1.mlp.fc1.weight'][3, 5] = math.nan
    file.unlink()
    save_checkpoint(file.parent, step_in_name(file), tensors, config)
    return tensors

def test_bad_steps_in_a_row_end_the_run_and_one_can_be_seen_again(sick_run, pretrain, tmp_path):
    "The run stops with one line, and mae-replay finds the layer."
    got, rest = pretrain('b', '--resume', 'run')
    where = 'run/bad_steps/epoch-1-batch-20'   # the tenth of them is the epoch's last, smaller step
    reason = '10 steps in a row had a loss or gradient that is not a number, the last one at epoch 1, batch 20'
    assert got.code == 1 and reason in got.line and f'mae-replay {where}' in got.line, got
    assert len(rest) == 10 and got.out.count('the step is skipped') == 10
    step = json.loads((tmp_path/where/'step.json').read_text())
    order = KeyedBatches(220, 10).whole(1)
    assert step['samples'] == torch.cat(order[20:22]).tolist() and step['batches'] == 2
    got, _ = pretrain('c', where, '--json', 'replay.json', name='mae-replay')
    replay = json.loads((tmp_path/'replay.json').read_text())
    assert got.code == 0 and replay['first_bad_module'] == 'encoder.blocks.1.mlp.fc1', got
    assert 'encoder.blocks.1.mlp.fc1, of type Linear' in got.out and ', '.join(map(str, step['samples'])) in got.out
    assert len(replay['losses']) == 2 and all(map(math.isnan, replay['losses'])) and replay['bad_gradients']
    for name, t in newest_checkpoint(tmp_path/where/'checkpoints')[1].items():
        if name.startswith('model.'):
            assert same_bits(t, sick_run[name]), name   # no bad step has moved anything

def test_a_spike_is_noted_with_its_samples(tmp_path):
    class Spike(Callback):
        order, run_valid = 8, False
        def after_loss(self):
            if self.train_iter == 120:
                self.learn.loss = self.loss + 50
                (tmp_path/'samples').write_text(' '.join(map(str, self.yb[0].tolist())))

    more = dict(batch_size=10, accumulate=1, epochs=6)
    in_fork(lambda: learner('pretrain', tmp_path/'run', more=more, cbs=[Spike()]).fit_recipe(), tmp_path/'log')
    (row,) = csv.DictReader((tmp_path/'run'/'spikes.csv').open())
    assert (row['epoch'], row['batch'], row['samples']) == ('5', '10', (tmp_path/'samples').read_text())
    assert float(row['loss']) > 50 > float(row['usual']) > 0
