"""Where a training step's time goes on a CPU, by torch's profiler: ours, and transformers' model of the same size.

    python bench/shares.py [--model mae_vit_nano_patch4_32] [--bs 128] [--steps 40] [--json FILE]

The last column is what a step would gain if everything but its matrix products took no time at all: the bound of any
faster version of the same mathematics. bench/results/shares.json has the numbers that the chapter `pairs` shows.
"""
import argparse
import json
from collections import Counter
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from mae_nb.base.devices import get_device, machine
from mae_nb.measure.pairs import train_step, transformers_twin
from mae_nb.model.mae import create_mae

PARTS = {   # part of a step -> the beginnings of its operations' names
    'matrix products': ('aten::mm', 'aten::addmm', 'aten::bmm', 'aten::mkldnn_conv', 'aten::convolution_backward'),
    'attention': ('aten::_scaled_dot_product',),
    'GELU': ('aten::gelu',),
    'layer norm': ('aten::native_layer_norm',),
    'AdamW': ('aten::_fused_adamw', 'Optimizer.'),
}
REST = 'copies, sums, masks, autograd'

def part_of(operation):
    "The part that an operation belongs to."
    found = [part for part, names in PARTS.items() if operation.startswith(names)]
    return found[0] if found else REST

def profiled(step, steps):
    "Milliseconds by part of the fastest of many steps: in a slower one, another program had the machine."
    for _ in range(5):
        step()
    times = [_one_step(step) for _ in range(steps)]
    return min(times, key=lambda parts: sum(parts.values()))

def _one_step(step):
    "Milliseconds by part of one step."
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    parts = Counter()
    for row in profiler.key_averages():
        parts[part_of(row.key)] += row.self_cpu_time_total / 1e3
    return {part: parts[part] for part in (*PARTS, REST)}

def parse(words):
    "The command line."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='mae_vit_nano_patch4_32')
    parser.add_argument('--bs', type=int, default=128)
    parser.add_argument('--steps', type=int, default=40)
    parser.add_argument('--json')
    return parser.parse_args(words)

def main(words=None):
    args = parse(words)
    get_device('cpu')   # as the commands do: freed memory is kept
    ours = create_mae(args.model)
    imgs = torch.randn(args.bs, ours.encoder.in_chans, *ours.encoder.img_size)
    models = dict(ours=ours, transformers=transformers_twin(ours))
    rows = {name: profiled(train_step(model, imgs), args.steps) for name, model in models.items()}
    print('| | ' + ' | '.join((*PARTS, REST)) + ' | ms a step | bound |')
    print('|---|' + '---|' * (len(PARTS) + 3))
    for name, parts in rows.items():
        total = sum(parts.values())
        shares = ' | '.join(f'{ms / total:.0%}' for ms in parts.values())
        print(f"| {name} | {shares} | {total:.0f} | {total / parts['matrix products']:.2f} |")
    if args.json:
        result = dict(rows=rows, model=args.model, bs=args.bs, steps=args.steps) | machine(packages=('transformers',))
        Path(args.json).write_text(json.dumps(result, indent=1) + '\n')

if __name__ == '__main__':
    main()
