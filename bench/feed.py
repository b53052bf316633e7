"""Does the data keep up with the GPU? Pretraining from packed JPEGs, decoded on the CPU or on the GPU, against the same training on one batch that is there already.

    python bench/feed.py SAMPLE.tar [--json FILE] [--workers 16] [--model mae_vit_base_patch16] [--bs 256] [--steps 40]
    python bench/feed.py SAMPLE.tar --device cpu --model mae_vit_nano_patch4_32 --bs 4 --steps 2 --workers 1      (a few seconds: does the script still work?)

SAMPLE.tar holds JPEGs as .../train/<class>/<file>, such as imagenet_sample.tar; they are read again and again, from the system's cache.
Each row is a fit of the real `Learner`: ten steps to warm up, then the clock runs.
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

from mae_nb.data.datasets import ImageSet, folder_sets, load_source
from mae_nb.data.images import read_image
from mae_nb.data.loader import Loader, get_dls
from mae_nb.model.mae import create_mae
from mae_nb.tasks.pretrain import pretrain_learner
from mae_nb.training.presets import RECIPES
from mae_nb.training.recipes import override
from mae_nb.data.archives import Files, Part
from mae_nb.data.shards import pack
from mae_nb.base.devices import machine

WARM, GOAL = 10, .95

class Synthetic(Loader):
    "One batch of noise that is on the device already."
    def __iter__(self):
        imgs = torch.randint(0, 256, (self.bs, 3, *self.dataset.size), dtype=torch.uint8, device=self.device)
        for batch in self.batches:
            index = torch.tensor([i for _, i in batch], device=self.device)
            yield imgs, index, index * 0

class Clock(Callback):
    "What the learner's `Pace` tells of the steps after the warm-up."
    order, run_valid = 65, False   # before the step count that ends the fit
    def after_batch(self):
        if self.train_iter not in (WARM, self.learn.max_steps): return
        if self.dls.device.type == 'cuda': torch.cuda.synchronize(self.dls.device)
        if self.train_iter == WARM: self.began = self.learn.pace.mark()
        else: self.told = self.learn.pace.since(self.began)

def fit(images, args, decode):
    "One row: images a second, and the share of the time spent waiting for data."
    cuda = args.device.type == 'cuda'
    told = dict(batch_size=args.bs, epochs=1, warmup_epochs=0, amp=cuda, compile='blocks' if cuda else 'none')
    recipe, model = override(RECIPES['pretrain'], told), create_mae(args.model)
    dls = get_dls((images, None), recipe, img_size=model.encoder.img_size, num_workers=args.workers, device=args.device, decode='cpu' if decode == 'synthetic' else decode)
    if decode == 'synthetic': dls.train.__class__ = Synthetic
    learn = pretrain_learner(dls, model, recipe, max_steps=WARM + args.steps, cbs=[clock := Clock()])
    with redirect_stdout(said := io.StringIO()): learn.fit_recipe()
    for line in said.getvalue().splitlines():
        if line.startswith(('note', 'could not read')): print(line, flush=True)
    return clock.told

def table(result):
    "The rows as Markdown, and whether the goal is reached."
    rows, best = result['rows'], result['rows'][0]['images_per_second']
    lines = ['| data | images/s | of synthetic | waiting for data |', '|---|---|---|---|']
    lines += [f"| {r['row']} | {r['images_per_second']:,.1f} | {r['images_per_second'] / best:.1%} | {r['data_wait']:.1%} |" for r in rows]
    reached = [r['row'] for r in rows[1:] if r['images_per_second'] >= GOAL * best]
    about = result['machine']
    lines += ['', f"goal, {GOAL:.0%} of the synthetic rate with 16 cores: " + (f"reached by {'; '.join(reached)}" if reached else 'not reached') + f" (here {about['cores']} cores and {result['workers']} workers)",
              f"{result['model']}, batch {result['bs']}, {result['steps']} steps, {about['device_name']}, torch {about['versions']['torch']}, torchvision {about['versions']['torchvision']}"]
    return '\n'.join(lines) + '\n'

def main(words=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('sample')
    p.add_argument('--model', default='mae_vit_base_patch16')
    p.add_argument('--bs', type=int, default=256); p.add_argument('--steps', type=int, default=40)
    p.add_argument('--workers', type=int, default=min(os.cpu_count() or 1, 16))
    p.add_argument('--device', help='by default the GPU if there is one')
    p.add_argument('--json')
    args = p.parse_args(words)
    args.device = torch.device(args.device or ('cuda' if torch.cuda.is_available() else 'cpu'))
    result = dict(machine=machine(args.device, torch.bfloat16 if args.device.type == 'cuda' else torch.float32, ('torchvision',)), model=args.model, bs=args.bs, steps=args.steps, workers=args.workers, rows=[])
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        shutil.unpack_archive(args.sample, d)
        s = folder_sets(next(d.rglob('train')).parent)[0]
        part = Part(Files(s.items, s.name), s.labels, s.classes)
        packed = {}
        for side in (None, 320):
            pack({'train': part}, d/f'packed{side}', read=read_image, max_side=side, num_workers=args.workers)
            items = load_source(d/f'packed{side}')[0].items
            packed[side] = ImageSet('many', items[np.arange(args.bs * (WARM + args.steps + 1)) % len(items)])
        jobs = [('synthetic', None, 'synthetic')] + [(f'{what}, decoded {where}', side, decode) for side, what in ((None, 'original JPEGs'), (320, 'of 320 pixels')) for decode, where in (('cpu', 'by the workers'), ('device', f'on {args.device.type}'))]
        for row, side, decode in jobs:
            result['rows'].append(dict(row=row) | fit(packed[side], args, decode))
            print(f"{result['rows'][-1]['images_per_second']:10,.1f} images/s  {row}", flush=True)
            if args.json: Path(args.json).write_text(json.dumps(result, indent=1) + '\n')   # after each row: what is there counts even if the call is cut off
    print('\n' + table(result))
    return result

if __name__ == '__main__': main()
