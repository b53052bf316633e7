"""What each switch gains on a CPU: images/s of a training step, all taken in turn in one process, against transformers' model of the same size.

    python bench/switches.py [--model mae_vit_nano_patch4_32] [--bs 128] [--pairs 9] [--only NAME ...] [--json FILE]

Matrix products of 1024 x 1024 take turns too: the MFU is the share of their rate in the same turn. For a GPU: bench/gpu.py.
"""
import argparse
import json
import statistics
from pathlib import Path

import torch

from mae_nb.base.devices import get_device
from mae_nb.model.mae import create_mae
from mae_nb.base.devices import machine
from mae_nb.measure.bench import PRODUCTS, in_turn, transformers_twin, products, train_step
from mae_nb.model.costs import step_flops

SWITCHES = {   # row -> (options of `create_mae`, of `train_step`)
    'plain':                        ({}, {}),
    'AdamW not fused':              ({}, dict(fused=False)),
    'checkpointing':                ({}, dict(checkpointing=True)),
    'blocks compiled':              ({}, dict(compile='blocks')),
    'compiled whole':               ({}, dict(compile='whole')),
    'bfloat16':                     ({}, dict(dtype='bfloat16')),
    'bfloat16, compiled whole':     ({}, dict(dtype='bfloat16', compile='whole')),
    'cross decoder 25 %':           (dict(decoder='cross', decode_ratio=.25), {}),
    'cross 25 %, compiled whole':   (dict(decoder='cross', decode_ratio=.25), dict(compile='whole')),
}

def main(words=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--model', default='mae_vit_nano_patch4_32'); p.add_argument('--bs', type=int, default=128)
    p.add_argument('--pairs', type=int, default=9); p.add_argument('--only', nargs='+', choices=SWITCHES, default=list(SWITCHES)); p.add_argument('--json')
    args = p.parse_args(words)
    get_device('cpu')   # as the commands do: freed memory is kept
    made = {k: (create_mae(args.model, **SWITCHES[k][0]), SWITCHES[k][1]) for k in args.only}
    size = create_mae(args.model)
    imgs = torch.randn(args.bs, 3, *size.encoder.img_size)
    runs = dict(transformers=train_step(transformers_twin(size), imgs)) | {k: train_step(m, imgs, **options) for k, (m, options) in made.items()}
    times = in_turn(runs | dict(products=products()), args.pairs)
    median, peaks, theirs = statistics.median, [PRODUCTS / t for t in times.pop('products')], times['transformers']
    rows = {}
    for k, seconds in times.items():
        flops = step_flops(made[k][0] if k in made else size)
        ratios = [t / s for t, s in zip(theirs, seconds)]
        rows[k] = dict(images_per_second=args.bs / median(seconds), ratio=median(ratios), ratio_min=min(ratios), ratio_max=max(ratios), gflop_per_image=flops / 1e9,
                       mfu=median(args.bs * flops / s / peak for s, peak in zip(seconds, peaks)))
    told = machine(packages=('transformers',))
    print('| | images/s | of transformers | (range) | GFLOP an image | MFU |\n|---|---|---|---|---|---|')
    for k, r in rows.items(): print(f"| {k} | {r['images_per_second']:,.3g} | {r['ratio']:.2f} | {r['ratio_min']:.2f}-{r['ratio_max']:.2f} | {r['gflop_per_image']:.3g} | {r['mfu']:.0%} |")
    print(f"\n{args.model}, {args.bs} images; {told['device_name']}, {told['threads']} threads, matrix products at {median(peaks) / 1e9:.0f} GFLOPS, torch {told['versions']['torch']}")
    if args.json: Path(args.json).write_text(json.dumps(dict(rows=rows, model=args.model, bs=args.bs, pairs=args.pairs) | told, indent=1) + '\n')

if __name__ == '__main__': main()
