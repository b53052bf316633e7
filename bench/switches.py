"""What each switch gains on a CPU: images/s of a training step, all taken in turn in one process, against transformers.

    python bench/switches.py [--model mae_vit_nano_patch4_32] [--bs 128] [--pairs 9] [--only NAME ...] [--json FILE]

transformers' model has the same size. Matrix products of 1024 x 1024 take turns too: the MFU is the share of their rate
in the same turn. bench/results/switches.json has the numbers of two calls, which the chapter `pairs` names.
For a GPU: bench/gpu/step.py.
"""
import argparse
import json
import statistics
from pathlib import Path

import torch

from mae_nb.base.devices import get_device, machine
from mae_nb.measure.pairs import PRODUCTS, in_turn, products, train_step, transformers_twin
from mae_nb.model.costs import step_flops
from mae_nb.model.mae import create_mae

CROSS = dict(decoder='cross', decode_ratio=.25)
SWITCHES = {   # row -> (options of `create_mae`, of `train_step`)
    'plain':                        ({}, {}),
    'AdamW not fused':              ({}, dict(fused=False)),
    'checkpointing':                ({}, dict(checkpointing=True)),
    'blocks compiled':              ({}, dict(compile='blocks')),
    'compiled whole':               ({}, dict(compile='whole')),
    'bfloat16':                     ({}, dict(dtype='bfloat16')),
    'bfloat16, compiled whole':     ({}, dict(dtype='bfloat16', compile='whole')),
    'cross decoder 25 %':           (CROSS, {}),
    'cross 25 %, compiled whole':   (CROSS, dict(compile='whole')),
}

def parse(words):
    "The command line."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='mae_vit_nano_patch4_32')
    parser.add_argument('--bs', type=int, default=128)
    parser.add_argument('--pairs', type=int, default=9)
    parser.add_argument('--only', nargs='+', choices=SWITCHES, default=list(SWITCHES))
    parser.add_argument('--json')
    return parser.parse_args(words)

def steps_of(name, bs, only):
    "The models by row, and a step for each; transformers' first."
    theirs = create_mae(name)
    models = dict(transformers=theirs)
    imgs = torch.randn(bs, theirs.encoder.in_chans, *theirs.encoder.img_size)
    steps = dict(transformers=train_step(transformers_twin(theirs), imgs))
    for row in only:
        model_options, step_options = SWITCHES[row]
        models[row] = create_mae(name, **model_options)
        steps[row] = train_step(models[row], imgs, **step_options)
    return models, steps

def measure(models, steps, bs, pairs):
    "The rows of the table, and the rate of matrix products."
    times = in_turn(steps | dict(products=products()), pairs)
    peaks = [PRODUCTS / t for t in times.pop('products')]
    rows = {}
    for row, seconds in times.items():
        flops = step_flops(models[row])
        ratios = [theirs / ours for theirs, ours in zip(times['transformers'], seconds)]
        mfus = [bs * flops / s / peak for s, peak in zip(seconds, peaks)]
        rows[row] = dict(images_per_second=bs / statistics.median(seconds), ratio=statistics.median(ratios),
                         ratio_min=min(ratios), ratio_max=max(ratios), gflop_per_image=flops / 1e9,
                         mfu=statistics.median(mfus))
    return rows, statistics.median(peaks)

def table(rows):
    "The rows as Markdown."
    lines = ['| | images/s | of transformers | (range) | GFLOP an image | MFU |', '|---|---|---|---|---|---|']
    for name, r in rows.items():
        spread = f"{r['ratio_min']:.2f}-{r['ratio_max']:.2f}"
        lines.append(f"| {name} | {r['images_per_second']:,.3g} | {r['ratio']:.2f} | {spread} | "
                     f"{r['gflop_per_image']:.3g} | {r['mfu']:.0%} |")
    return '\n'.join(lines)

def main(words=None):
    args = parse(words)
    get_device('cpu')   # as the commands do: freed memory is kept
    models, steps = steps_of(args.model, args.bs, args.only)
    rows, rate = measure(models, steps, args.bs, args.pairs)
    about = machine(packages=('transformers',))
    print(table(rows))
    print(f"\n{args.model}, {args.bs} images; {about['device_name']}, {about['threads']} threads, "
          f"matrix products at {rate / 1e9:.0f} GFLOPS, torch {about['versions']['torch']}")
    if args.json:
        result = dict(rows=rows, model=args.model, bs=args.bs, pairs=args.pairs) | about
        Path(args.json).write_text(json.dumps(result, indent=1) + '\n')

if __name__ == '__main__':
    main()
