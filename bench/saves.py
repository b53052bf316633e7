"""Saves in a run of ViT-L, here and in another checkout, in turn: training's pause, the write, and the extra memory.

    python bench/saves.py --before CHECKOUT [--model NAME] [--bs 8] [--pairs 2] [--saves 3] [--json FILE]

Each turn is a process of its own, with one build, that pretrains on noise on the CPU and saves after every second
optimizer step. The pause is all that training waits for because of a save: what happens between the two steps, and what
is copied just before the next optimizer step; not the wait for a file that is still being written, which is `wait`, and
which two saves in so few steps make longer than in life. `pause_cpu` is the same in processor seconds of training's
thread, `step` the seconds of a step between two saves, with its batch, and `rest_mib` what was copied before the
optimizer step. The write happens in the background; its seconds are those of this disk beside the training. Extra
memory is how much higher the process's own pages (RssAnon) ever are than they were before the first save, in two whole
steps. A turn's first save takes new memory for its copies, the others take the same again. bench/results/saves.json has
ViT-L, saves_short_step.json ViT-B with --bs 1 --pairs 1 --saves 2, on a busy machine.
"""
import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


# name -> its modules in this build and in an earlier layout of the package
PLACES = dict(create_mae=('model.mae', 'mae'), ImageSet=('data.datasets', 'data'), get_dls=('data.loader', 'data'),
              RECIPES=('training.presets', 'recipes'), make_run=('training.runs', 'engine'),
              TaskLearner=('training.engine', 'engine'), Checkpoints=('training.checkpoints', 'checkpoints'),
              pretrain_learner=('tasks.pretrain', 'pretrain'), Snapshot=('training.state', 'checkpoints'))


def find(name: str):
    "A name of the build on the path; None where it has none."
    for place in PLACES[name]:
        try:
            return getattr(import_module(f'mae_nb.{place}'), name, None)
        except ModuleNotFoundError:
            continue


def own_mib():
    "Memory of this process that is no file's, MiB."
    rows = Path('/proc/self/status').read_text().splitlines()
    return int(next(row for row in rows if row.startswith('RssAnon')).split()[1]) / 1024


class Peak:
    "The most memory while entered, looked at every 5 ms by a thread."
    def __enter__(self):
        self.most, self.ended = own_mib(), threading.Event()
        self.thread = threading.Thread(target=self.look)
        self.thread.start()
        return self

    def look(self):
        while not self.ended.wait(.005):
            self.most = max(self.most, own_mib())

    def __exit__(self, *_):
        self.ended.set()
        self.thread.join()


class Clock:
    "Notes what a run's saves and steps take."
    def __init__(self, peak: Peak, steps: int):
        self.peak, self.steps, self.saves, self.starts, self.usual = peak, steps, [], [], None
        own = dict(Checkpoints=('save', 'wait', 'settle', 'write'), TaskLearner=('one_batch',), Snapshot=('settle',))
        for owner, names in own.items():
            for name in names:
                if hasattr(find(owner), name):
                    self.put_around(find(owner), name, getattr(self, f'{owner}_{name}'))

    def put_around(self, owner, name: str, act):
        plain = getattr(owner, name)
        setattr(owner, name, lambda *args, **kwargs: act(lambda: plain(*args, **kwargs)))

    def timed(self, call, kind: str):
        "Call something, and add its seconds to those of the present save."
        save, start, cpu = self.saves[-1], time.perf_counter(), time.thread_time()
        result = call()
        save[kind] = save.get(kind, 0.) + time.perf_counter() - start
        save[f'{kind}_cpu'] = save.get(f'{kind}_cpu', 0.) + time.thread_time() - cpu
        return result

    def Checkpoints_save(self, call):
        if self.usual is None:
            self.usual = self.peak.most
        self.saves.append(dict(steps=len(self.starts)))
        self.timed(call, 'save')
        self.saves[-1]['end'] = time.perf_counter()

    def Checkpoints_wait(self, call):
        "A wait in `save` is part of it, and taken off again."
        if self.saves and 'end' not in self.saves[-1]:
            return self.timed(call, 'wait')
        return call()

    def Checkpoints_settle(self, call): return self.timed(call, 'settle') if self.saves else call()

    def Checkpoints_write(self, call):
        save, start = self.saves[-1], time.perf_counter()
        call()
        save['write'] = time.perf_counter() - start

    def Snapshot_settle(self, call):
        rest = call()
        self.saves[-1]['rest'] = self.saves[-1].get('rest', 0) + rest

    def TaskLearner_one_batch(self, call):
        from fastai.callback.core import CancelFitException
        self.starts.append(time.perf_counter())
        if len(self.starts) > self.steps:
            raise CancelFitException()
        call()

    def rows(self) -> list[dict]:
        "A row for each save."
        rows = []
        for save in self.saves:
            pause, cpu = (save[f'save{kind}'] - save.get(f'wait{kind}', 0.) + save.get(f'settle{kind}', 0.)
                          for kind in ('', '_cpu'))
            step = self.starts[save['steps'] + 1] - save['end']
            rows.append(dict(pause=pause, pause_cpu=cpu, wait=save.get('wait', 0.), write=save['write'],
                             rest_mib=save.get('rest', 0) / 2**20, step=step))
        return rows


def turn(model: str, bs: int, saves: int) -> dict:
    "In a build's process: a short run, with a save after every second step."
    import numpy as np
    import torch
    torch.set_num_threads(1)
    create, images, get_dls, recipes, make_run, learner = (find(name) for name in (
        'create_mae', 'ImageSet', 'get_dls', 'RECIPES', 'make_run', 'pretrain_learner'))
    mae, steps = create(model), 2 * saves + 1
    side = mae.encoder.img_size
    pixels = np.random.default_rng(0).integers(0, 255, (bs * (steps + 2), *side, 3), dtype=np.uint8)
    recipe = replace(recipes['pretrain'], batch_size=bs, epochs=1, warmup_epochs=0, amp=False)
    dls = get_dls((images('noise', pixels), None), recipe, img_size=side, num_workers=0, device='cpu')
    with tempfile.TemporaryDirectory() as folder, Peak() as peak:
        clock = Clock(peak, steps)
        learn = learner(dls, mae, recipe, out=make_run(Path(folder)/'run', {}), save_every=2, keep=1)
        with contextlib.redirect_stdout(sys.stderr):
            learn.fit_recipe()
        mib = max(file.stat().st_size for file in Path(folder).rglob('step-*')) / 2**20
    return dict(saves=clock.rows(), extra_mib=peak.most - clock.usual, usual_mib=clock.usual, file_mib=mib)


def run_turn(checkout: Path, model: str, bs: int, saves: int) -> dict:
    "One turn of a build, in a process."
    words = [sys.executable, __file__, '--model', model, '--bs', str(bs), '--saves', str(saves), '--turn']
    env = os.environ | dict(PYTHONPATH=str(checkout), OMP_NUM_THREADS='1')
    done = subprocess.run(words, env=env, stdout=subprocess.PIPE, text=True, check=True, cwd=checkout)
    return json.loads(done.stdout.splitlines()[-1])


def summary(turns: list) -> dict:
    "A build's numbers: medians over its turns."
    middle = lambda values: round(statistics.median(values), 3)
    every = [save for t in turns for save in t['saves']]
    later = [save for t in turns for save in t['saves'][1:]]
    medians = {f'first_{k}': middle(t['saves'][0][k] for t in turns) for k in ('pause', 'pause_cpu', 'rest_mib')}
    medians |= {k: middle(save[k] for save in later) for k in ('pause', 'pause_cpu', 'rest_mib', 'wait')}
    medians |= {k: middle(save[k] for save in every) for k in ('write', 'step')}
    return medians | {k: middle(t[k] for t in turns) for k in ('extra_mib', 'usual_mib', 'file_mib')}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--before', type=Path, help='the other checkout')
    parser.add_argument('--model', default='mae_vit_large_patch16')
    parser.add_argument('--bs', type=int, default=8, help='images in a step')
    parser.add_argument('--pairs', type=int, default=2)
    parser.add_argument('--saves', type=int, default=3, help='in each turn')
    parser.add_argument('--json', type=Path)
    parser.add_argument('--turn', action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.turn:
        return print(json.dumps(turn(args.model, args.bs, args.saves)))
    if args.before is None:
        parser.error('--before is missing: the checkout to compare with')
    from mae_nb.base.devices import machine
    checkouts, turns = dict(before=args.before.resolve(), now=ROOT), dict(before=[], now=[])
    for i in range(args.pairs):
        for name in list(checkouts)[::1 if i % 2 else -1]:
            turns[name].append(run_turn(checkouts[name], args.model, args.bs, args.saves))
    rows = {name: summary(some) for name, some in turns.items()}
    ratios = {f'{key}_ratio': round(rows['now'][key] / rows['before'][key], 3)
              for key in ('first_pause', 'pause', 'pause_cpu', 'write', 'step', 'extra_mib')}
    commit = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], cwd=args.before, capture_output=True, text=True)
    result = dict(model=args.model, bs=args.bs, pairs=args.pairs, saves=args.saves,
                  before_commit=commit.stdout.strip(), **rows, **ratios, machine=machine())
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__':
    main()
