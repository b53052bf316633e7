"""Does the data keep up with the GPU?

Pretraining from packed JPEGs, decoded on the CPU or on the GPU, against the same training on one batch that is on the
device already.

    python bench/feed.py SAMPLE.tar [--json FILE] [--workers 16] [--model mae_vit_base_patch16] [--bs 256] [--steps 40]

A few seconds, to see whether the script still works:

    python bench/feed.py SAMPLE.tar --device cpu --model mae_vit_nano_patch4_32 --bs 4 --steps 2 --workers 1

SAMPLE.tar holds JPEGs as .../train/<class>/<file>, such as imagenet_sample.tar; they are read again and again, from the
system's cache. Each row is a fit of the real `Learner`: ten steps to warm up, then the clock runs.
"""
import argparse
import io
import json
import os
import shutil
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch
from fastai.callback.core import Callback

from mae_nb.base.devices import machine
from mae_nb.data.datasets import ImageSet, load_source
from mae_nb.data.loader import Loader, get_dls
from mae_nb.data.packing import packable_parts
from mae_nb.data.shards import pack
from mae_nb.model.mae import create_mae
from mae_nb.tasks.pretrain import pretrain_learner
from mae_nb.training.presets import RECIPES
from mae_nb.training.recipes import override

WARM, GOAL = 10, .95

class Synthetic(Loader):
    "One batch of noise that is on the device already."
    def __iter__(self):
        shape = self.bs, 3, *self.dataset.size
        imgs = torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device)
        for batch in self.batches:
            index = torch.tensor([i for _, i in batch], device=self.device)
            yield imgs, index, index * 0

class Clock(Callback):
    "What the learner's `Pace` reports of the steps after the warm-up."
    order, run_valid = 65, False   # before the step count that ends the fit
    def after_batch(self):
        if self.train_iter not in (WARM, self.learn.max_steps):
            return
        if self.dls.device.type == 'cuda':
            torch.cuda.synchronize(self.dls.device)
        if self.train_iter == WARM:
            self.began = self.learn.pace.mark()
        else:
            self.report = self.learn.pace.since(self.began)

def fit(images, args, decode):
    "One row: images a second, and the share of the time spent waiting for data."
    is_cuda, is_synthetic = args.device.type == 'cuda', decode == 'synthetic'
    fields = dict(batch_size=args.bs, epochs=1, warmup_epochs=0, amp=is_cuda, compile='blocks' if is_cuda else 'none')
    recipe, model, clock = override(RECIPES['pretrain'], fields), create_mae(args.model), Clock()
    dls = get_dls((images, None), recipe, img_size=model.encoder.img_size, num_workers=args.workers,
                  device=args.device, decode='cpu' if is_synthetic else decode)
    if is_synthetic:
        dls.train.__class__ = Synthetic
    learn = pretrain_learner(dls, model, recipe, max_steps=WARM + args.steps, cbs=[clock])
    with redirect_stdout(io.StringIO()) as log:
        learn.fit_recipe()
    for line in log.getvalue().splitlines():
        if line.startswith(('note', 'could not read')):
            print(line, flush=True)
    return clock.report

def table(result):
    "The rows as Markdown, and whether the goal is reached."
    rows, best, about = result['rows'], result['rows'][0]['images_per_second'], result['machine']
    lines = ['| data | images/s | of synthetic | waiting for data |', '|---|---|---|---|']
    for row in rows:
        rate = row['images_per_second']
        lines.append(f"| {row['row']} | {rate:,.1f} | {rate / best:.1%} | {row['data_wait']:.1%} |")
    reached = [row['row'] for row in rows[1:] if row['images_per_second'] >= GOAL * best]
    verdict = f"reached by {'; '.join(reached)}" if reached else 'not reached'
    lines += ['', f"goal, {GOAL:.0%} of the synthetic rate with 16 cores: {verdict} "
                  f"(here {about['cores']} cores and {result['workers']} workers)",
              f"{result['model']}, batch {result['bs']}, {result['steps']} steps, {about['device_name']}, "
              f"torch {about['versions']['torch']}, torchvision {about['versions']['torchvision']}"]
    return '\n'.join(lines) + '\n'

def jobs_of(device):
    "(row, longest side of the files, who decodes)"
    jobs = [('synthetic', None, 'synthetic')]
    for side, files in ((None, 'original JPEGs'), (320, 'of 320 pixels')):
        jobs.append((f'{files}, decoded by the workers', side, 'cpu'))
        jobs.append((f'{files}, decoded on {device.type}', side, 'device'))
    return jobs

def pack_many(sample, d, args):
    "The sample packed, by the longest side; repeated for all steps."
    shutil.unpack_archive(sample, d)
    parts = {'train': packable_parts(next(d.rglob('train')).parent)['train']}
    many = {}
    for side in (None, 320):
        pack(parts, d/f'packed{side}', max_side=side, num_workers=args.workers)
        items = load_source(d/f'packed{side}')[0].items
        many[side] = ImageSet('many', items[np.arange(args.bs * (WARM + args.steps + 1)) % len(items)])
    return many

def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('sample')
    parser.add_argument('--model', default='mae_vit_base_patch16')
    parser.add_argument('--bs', type=int, default=256)
    parser.add_argument('--steps', type=int, default=40)
    parser.add_argument('--workers', type=int, default=min(os.cpu_count() or 1, 16))
    parser.add_argument('--device', help='by default the GPU if there is one')
    parser.add_argument('--json')
    args = parser.parse_args(words)
    args.device = torch.device(args.device or ('cuda' if torch.cuda.is_available() else 'cpu'))
    dtype = torch.bfloat16 if args.device.type == 'cuda' else torch.float32
    result = dict(machine=machine(args.device, dtype, ('torchvision',)), model=args.model, bs=args.bs,
                  steps=args.steps, workers=args.workers, rows=[])
    with tempfile.TemporaryDirectory() as d:
        many = pack_many(args.sample, Path(d), args)
        for row, side, decode in jobs_of(args.device):
            result['rows'].append(dict(row=row) | fit(many[side], args, decode))
            print(f"{result['rows'][-1]['images_per_second']:10,.1f} images/s  {row}", flush=True)
            if args.json:   # after each row: finished rows count even if the call is interrupted
                Path(args.json).write_text(json.dumps(result, indent=1) + '\n')
    print('\n' + table(result))
    return result

if __name__ == '__main__':
    main()
