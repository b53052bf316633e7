"""Peak memory of a training step on a CPU, each version in a process of its own: ours, and transformers' twin.

    python bench/memory.py [--models NAME ...] [--bs 8 16] [--json FILE]

Float32, forward, backward and AdamW; two steps, since the moments are made in the first. A row is the peak of the
process less what it held before the model was made. Weights, gradients and two moments, 16 bytes a parameter, are the
same for every version: `fixed`. bench/results/memory.json has ViT-B.
"""
import argparse
import json
import subprocess
import sys
from pathlib import Path

VERSIONS = {   # row -> (transformers' twin, options of `train_step`)
    'transformers': (True, {}),
    'ours': (False, {}),
    'ours, checkpointing': (False, dict(checkpointing=True)),
}

def measure_here(model, bs, version):
    "Two steps in this process: bytes of the peak, and of weights, gradients and moments."
    import torch

    from mae_nb.base.devices import memory_gib
    from mae_nb.base.errors import require
    from mae_nb.measure.pairs import train_step, transformers_twin
    from mae_nb.model.mae import create_mae

    twin, options = VERSIONS[version]
    if twin:
        require('transformers.models.vit_mae.modeling_vit_mae')   # its code is no part of the step
    cpu = torch.device('cpu')
    before = memory_gib(cpu)
    ours = create_mae(model)
    net = transformers_twin(ours) if twin else ours
    fixed = 16 * sum(p.numel() for p in net.parameters() if p.requires_grad)
    imgs = torch.randn(bs, ours.encoder.in_chans, *ours.encoder.img_size)
    if twin:
        del ours
    step = train_step(net, imgs, **options)
    step()
    step()
    return dict(gib=memory_gib(cpu) - before, fixed_gib=fixed / 2**30)

def measure(model, bs, version):
    "The same in a new process."
    words = [sys.executable, __file__, '--here', json.dumps([model, bs, version])]
    return json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()[-1])

def parse(words):
    "The command line."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=['mae_vit_base_patch16', 'mae_vit_large_patch16'])
    parser.add_argument('--bs', nargs='+', type=int, default=[8, 16])
    parser.add_argument('--json')
    parser.add_argument('--here', help=argparse.SUPPRESS)
    return parser.parse_args(words)

def main(words=None):
    args = parse(words)
    if args.here:
        return print(json.dumps(measure_here(*json.loads(args.here))))
    from mae_nb.base.devices import machine
    print('| model | images | version | GiB | of transformers | without what is fixed |\n|---|---|---|---|---|---|')
    rows = []
    for model in args.models:
        for bs in args.bs:
            found = {version: measure(model, bs, version) for version in VERSIONS}
            theirs = found['transformers']
            for version, row in found.items():
                ratio = row['gib'] / theirs['gib']
                free = (row['gib'] - row['fixed_gib']) / (theirs['gib'] - theirs['fixed_gib'])
                rows.append(dict(model=model, bs=bs, version=version, ratio=ratio, ratio_without_fixed=free) | row)
                print(f"| {model} | {bs} | {version} | {row['gib']:.2f} | {ratio:.2f} | {free:.2f} |", flush=True)
    if args.json:
        result = dict(rows=rows) | machine(packages=('transformers',))
        Path(args.json).write_text(json.dumps(result, indent=1) + '\n')

if __name__ == '__main__':
    main()
