"""Each task's `Learner` on real images: finite losses, no waiting between log lines, and the same run after a kill.

    python bench/gpu/learners.py [--data cifar10] [--steps 30] [--device cuda] [--json FILE]

`waits` counts the operations that made the host wait for the GPU, by step; log lines are allowed to. The last row kills
a `mae-pretrain` with SIGKILL, resumes it, and compares its weights with those of a run that nobody killed.
"""
import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from fastai.callback.core import Callback
from safetensors.torch import load_file

from mae_nb.base.devices import machine
from mae_nb.commands import mae_pretrain
from mae_nb.data.datasets import load_source
from mae_nb.data.loader import get_dls
from mae_nb.model.classifier import create_classifier
from mae_nb.model.mae import create_mae
from mae_nb.tasks.finetune import finetune_learner, partial_learner
from mae_nb.tasks.pretrain import pretrain_learner
from mae_nb.tasks.probes import attentive_probe_learner, linear_probe_learner
from mae_nb.training.presets import RECIPES
from mae_nb.training.progress import Progress
from mae_nb.training.recipes import override

MODEL, BATCH = 'mae_vit_nano_patch4_32', 64
TASKS = ('pretrain', 'finetune', 'linear', 'partial', 'attentive')
OPTIONS = {   # row -> (task, fields of its recipe)
    'pretrain': ('pretrain', dict(amp=True)),
    'pretrain, blocks compiled': ('pretrain', dict(amp=True, compile='blocks')),
    'pretrain, CUDA graphs': ('pretrain', dict(amp=True, compile='graphs')),
    'finetune': ('finetune', dict(amp=True, mixup=.8, cutmix=1., erase=.25, drop_path=.1, clip=1.)),
    'finetune, averaged and accumulated': ('finetune', dict(amp=True, ema=.9, accumulate=2, batch_size=2 * BATCH)),
    'linear': ('linear', dict(amp=True)),
    'partial': ('partial', dict(amp=True)),
    'attentive': ('attentive', dict(amp=True)),
}

class Waits(Callback):
    "Let PyTorch warn where the host waits for the GPU, and count by step."
    order, run_valid = -100, False
    def __init__(self):
        self.steps, self.losses = {}, []

    def before_batch(self):
        self.caught = warnings.catch_warnings(record=True)
        self.list = self.caught.__enter__()
        warnings.simplefilter('always')
        if self.dls.device.type == 'cuda':
            torch.cuda.set_sync_debug_mode('warn')

class EndWaits(Callback):
    "Ends the count of a step."
    order, run_valid = 100, False
    def after_batch(self):
        if self.dls.device.type == 'cuda':
            torch.cuda.set_sync_debug_mode('default')
        waits = self.learn.waits
        waits.caught.__exit__(None, None, None)
        texts = [f'{w.filename.split("site-packages/")[-1]}:{w.lineno}' for w in waits.list
                 if 'synchroniz' in str(w.message)]
        if texts:
            waits.steps[self.train_iter] = texts
        waits.losses.append(self.learn.loss.detach())

def make_learner(task, recipe, sets, device):
    "The task's learner with a new small model."
    dls = get_dls(sets, recipe, img_size=32, num_workers=0, device=device)
    cbs, options = [Waits(), EndWaits()], dict(max_steps=None)
    if task == 'pretrain':
        return pretrain_learner(dls, create_mae(MODEL, target=recipe.target), recipe, cbs=cbs, **options)
    if task in ('finetune', 'partial'):
        model = create_classifier(MODEL, 10, pool=recipe.pool, drop_path=recipe.drop_path)
        learner = finetune_learner if task == 'finetune' else partial_learner
        return learner(dls, model, recipe, cbs=cbs, **options)
    learner = linear_probe_learner if task == 'linear' else attentive_probe_learner
    return learner(dls, create_mae(MODEL).encoder, recipe, cbs=cbs, **options)

def run_row(name, sets, steps, device):
    "Train so many steps; what its losses and waits were."
    task, fields = OPTIONS[name]
    fields = dict(batch_size=BATCH, epochs=1, warmup_epochs=0) | fields
    recipe = override(RECIPES[f'{task}_cifar10'], fields)
    spread = len(sets[0]) // (steps * BATCH)   # over all classes, which follow one another
    train = sets[0].take(range(0, steps * BATCH * spread, spread))
    learn = make_learner(task, recipe, (train, None), device)
    learn.fit_recipe()
    losses = torch.stack(learn.waits.losses).float().cpu()
    between = {step: texts for step, texts in learn.waits.steps.items() if step % Progress.every and step > 3}
    return dict(row=name, steps=len(losses), finite=bool(losses.isfinite().all()), first=float(losses[:5].mean()),
                last=float(losses[-5:].mean()), waits_at_log_lines=len(learn.waits.steps) - len(between),
                waits={str(step): texts for step, texts in list(between.items())[:5]}, waiting_steps=len(between))

def pretraining(out, device, steps):
    "The command line of a short pretraining on the images that ship with the package."
    words = ['fashion', '--out', str(out), '--device', device, '--max-steps', str(steps)]
    return [sys.executable, __file__, 'mae-pretrain', *words, '--save-every', '10', '--set', 'amp=True', '--bs', '256']

def kill_and_resume(steps, device):
    "Kill a run, resume it, and compare its weights with a run that was left alone."
    with tempfile.TemporaryDirectory() as d:
        whole, killed = Path(d)/'whole', Path(d)/'killed'
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        first = subprocess.Popen(pretraining(killed, device, steps), **quiet)
        while first.poll() is None and not list(killed.glob('checkpoints/*.safetensors')):
            time.sleep(.02)
        first.send_signal(signal.SIGKILL)
        first.wait()
        kept = sorted(p.name for p in killed.glob('checkpoints/*'))
        for out, more in ((whole, []), (killed, ['--resume', 'auto'])):
            run = subprocess.run([*pretraining(out, device, steps), *more], **quiet)
            if run.returncode:
                return dict(row='killed and resumed', error=run.stderr.splitlines()[-1:])
        a, b = (load_file(out/'model.safetensors') for out in (whole, killed))
        furthest = max(float((a[k].float() - b[k].float()).abs().max()) for k in a)
        return dict(row='killed and resumed', steps=steps, killed_with=kept, signal=first.returncode,
                    same_bits=all(torch.equal(a[k], b[k]) for k in a), largest_difference=furthest)

def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', default='cifar10')
    parser.add_argument('--rows', nargs='+', choices=OPTIONS, default=list(OPTIONS))
    parser.add_argument('--steps', type=int, default=30)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--json')
    args = parser.parse_args(words)
    device = torch.device(args.device)
    sets = load_source(args.data)
    result = dict(machine=machine(device, torch.bfloat16, ('fastai',)), rows=[])
    jobs = [lambda name=name: run_row(name, sets, args.steps, device) for name in args.rows]
    jobs.append(lambda: kill_and_resume(4 * args.steps, args.device))
    for name, job in zip([*args.rows, 'killed and resumed'], jobs):
        start = time.time()
        try:
            row = job()
        except Exception as e:   # the other rows still count
            row = dict(row=name, error=f'{type(e).__name__}: {str(e)[:600]}')
        result['rows'].append(row | dict(seconds=round(time.time() - start, 1)))
        print(json.dumps(result['rows'][-1]), flush=True)
        if args.json:
            Path(args.json).write_text(json.dumps(result, indent=1) + '\n')
    return result

if __name__ == '__main__':
    if sys.argv[1:2] == ['mae-pretrain']:   # the command of this very package, installed or not
        sys.argv.pop(1)
        mae_pretrain()
    else:
        main()
