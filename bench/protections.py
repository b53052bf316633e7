"""What a run's protections cost: a training step with and without them, in turn in one run.

    python bench/protections.py [--model mae_vit_nano_patch4_28] [--bs 128] [--steps 200] [--json FILE]

One learner trains in a run folder. Every second step it does without what guards a step: the guard (a finite loss and
gradient, spikes), the signals' phases and monitor, the checkpoints' look at each step, the watch. The rest stays: the
same data, records and progress. Seconds are from one batch's beginning to the next one's, the wait for data included.
The ratio is the median over neighbouring steps, of processor seconds and of wall seconds; on a busy machine only the
first says much. A save is counted apart: its processor seconds, copy and write, shared by the steps from one to the
next (--save-every). bench/results/protections.json has a nano model and ViT-B.
"""
import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from fastai.callback.core import Callback

from mae_nb.base.devices import machine
from mae_nb.base.keyed import seeded
from mae_nb.data.datasets import ImageSet
from mae_nb.data.loader import get_dls
from mae_nb.model.mae import create_mae
from mae_nb.tasks.pretrain import pretrain_learner
from mae_nb.training.checkpoints import Checkpoints, Watch
from mae_nb.training.guard import Guard
from mae_nb.training.presets import RECIPES
from mae_nb.training.recipes import override
from mae_nb.training.runs import make_run

HOOKS = {Guard: ('before_batch', 'before_step', 'after_batch'), Checkpoints: ('after_batch',), Watch: ('after_batch',)}
WARM_UP = 10   # steps that are not counted


def nothing(*_): pass


class Alternate(Callback):
    "Switch the protections off before every second step, and note what each step took."
    order, run_valid = -99, False   # before all others

    def before_fit(self):
        self.marks, self.off = [], []

    def before_batch(self):
        self.marks.append((time.perf_counter(), time.process_time()))
        if len(self.marks) % 2:
            self.switch_on()
        else:
            self.switch_off()

    def switch_off(self):
        for cb in self.learn.cbs:
            for name in HOOKS.get(type(cb), ()):
                setattr(cb, name, nothing)
                self.off.append((cb, name))
        self.learn.signals.at = nothing
        self.off.append((self.learn.signals, 'at'))
        self.opt.opt.__dict__.pop('found_inf', None)   # the optimizer's own look at it

    def switch_on(self):
        for owner, name in self.off:
            vars(owner).pop(name, None)
        self.off = []

    def after_train(self): self.switch_on()   # an epoch's last step is saved


def measure(name: str, bs: int, steps: int, save_every: int) -> dict:
    "Seconds of steps with and without protections, and of a save."
    model = seeded(0, create_mae, name, **(dict(in_chans=1) if name.endswith('_28') else {}))
    side, chans = model.encoder.img_size, model.encoder.in_chans
    pixels = np.random.default_rng(0).integers(0, 255, (bs * steps, *side, chans), dtype=np.uint8)
    images = ImageSet('noise', pixels, mean=(.5,) * chans, std=(.25,) * chans)
    recipe = override(RECIPES['pretrain'], dict(batch_size=bs, epochs=1, warmup_epochs=0, amp=False))
    dls = get_dls((images, None), recipe, img_size=side, num_workers=0, device='cpu')
    with tempfile.TemporaryDirectory() as folder:
        alternate = Alternate()
        learn = pretrain_learner(dls, model, recipe, out=make_run(Path(folder)/'run', {}), cbs=[alternate])
        learn.fit_recipe()
        save = time_of_save(learn)
    marks = np.diff(np.array(alternate.marks), axis=0)[WARM_UP:]
    rows = {}
    for kind, values in zip(('wall', 'processor'), marks.T):
        pairs = values[:len(values) // 2 * 2].reshape(-1, 2)   # with, without
        ratios = pairs[:, 0] / pairs[:, 1]
        low, high = np.quantile(ratios, (.25, .75))
        rows[kind] = dict(ms_with=1e3 * float(np.median(pairs[:, 0])), ms_without=1e3 * float(np.median(pairs[:, 1])),
                          ratio=float(np.median(ratios)), ratio_quartiles=[float(low), float(high)])
    per_step = save / save_every
    return dict(model=name, bs=bs, pairs=len(pairs), **rows, save_seconds=save, save_every=save_every,
                save_share=per_step / (rows['processor']['ms_without'] / 1e3))


def time_of_save(learn) -> float:
    "Processor seconds of a save, copy and write: the median of three."
    cb, times = learn.checkpoints, []
    cb.folder.mkdir(exist_ok=True)
    for _ in range(3):
        start = time.process_time()
        cb.write(*cb.state())
        times.append(time.process_time() - start)
    return statistics.median(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='mae_vit_nano_patch4_28')
    parser.add_argument('--bs', type=int, default=128)
    parser.add_argument('--steps', type=int, default=200)
    parser.add_argument('--save-every', type=int, default=500)
    parser.add_argument('--json', type=Path, help='add the result to this file')
    args = parser.parse_args()
    row = measure(args.model, args.bs, args.steps, args.save_every) | dict(machine=machine())
    print(json.dumps(row, indent=1))
    for kind in ('processor', 'wall'):
        r = row[kind]
        print(f"{args.model}, {kind} time: {r['ms_with']:.1f} ms a step with protections, {r['ms_without']:.1f} "
              f"without, {r['ratio'] - 1:+.2%} (median of {row['pairs']} pairs); saves {row['save_share']:.2%} more")
    if args.json:
        known = json.loads(args.json.read_text()) if args.json.exists() else {}
        args.json.write_text(json.dumps(known | {args.model: row}, indent=1) + '\n')


if __name__ == '__main__':
    main()
