"""The whole table of a GPU in one call: images/s, MFU and memory for each switch, against transformers and timm, and the ten longest kernels.

    python bench/gpu.py [--json FILE] [--table FILE] [--budget 520] [--models B L H] [--turns 5]
    python bench/gpu.py --models nano --device cpu      (a few seconds: does the script still work?)

What the budget leaves no time for is named. The rows that matter most come first.
"""
import argparse
import gc
import json
import statistics
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from mae_nb.model.classifier import create_classifier
from mae_nb.model.mae import SIZES, create_mae
from mae_nb.tasks.probes import FrozenProbe, LinearHead
from mae_nb.base.devices import machine, peak_flops
from mae_nb.measure.bench import in_turn, timm_twin, transformers_twin, train_step
from mae_nb.model.costs import step_flops
from mae_nb.training.switches import DTYPES
from mae_nb.model.costs import step_memory as planned

MODELS = dict(B='mae_vit_base_patch16', L='mae_vit_large_patch16', H='mae_vit_huge_patch14', nano='mae_vit_nano_patch4_32')
BATCH = dict(B=(256, 128), L=(256, 64), H=(128, 32), nano=(4, 4))   # of pretraining; of what sees all patches

def cross(name): return create_mae(name, decoder='cross', decode_ratio=.25)
def classes(name): return create_classifier(name, 1000)
def probe(name): return FrozenProbe(create_mae(name).encoder, LinearHead(SIZES[name]['dim'], 1000))

BF16 = dict(dtype='bfloat16')
SWITCHES = {   # row -> (model, somebody else's code for it, options of `train_step`)
    'bf16, blocks compiled':               (create_mae, None, BF16 | dict(compile='blocks')),
    'transformers, bf16':                  (create_mae, transformers_twin, BF16),
    'bf16':                                (create_mae, None, BF16),
    'cross decoder 25 %, blocks compiled': (cross, None, BF16 | dict(compile='blocks')),
    'float32':                             (create_mae, None, dict(dtype='float32')),
    'bf16, AdamW not fused':               (create_mae, None, BF16 | dict(fused=False)),
    'bf16, activation checkpointing':      (create_mae, None, BF16 | dict(checkpointing=True)),
    'fine-tuning, blocks compiled':        (classes, None, BF16 | dict(compile='blocks')),
    'fine-tuning, timm, bf16':             (classes, timm_twin, BF16),
    'linear probe, bf16':                  (probe, None, BF16),
    'bf16, compiled whole':                (create_mae, None, BF16 | dict(compile='whole')),
    'bf16, CUDA graphs':                   (create_mae, None, BF16 | dict(compile='graphs')),
    'float8, blocks compiled':             (create_mae, None, BF16 | dict(compile='blocks', fp8=True)),
    'transformers, blocks compiled':       (create_mae, transformers_twin, BF16 | dict(compile='blocks')),
    'fine-tuning, bf16':                   (classes, None, BF16),
}

def prepared(size, switch, device):
    "The step of a row, and what is known of it without measuring."
    make, like, options = SWITCHES[switch]
    with torch.device(device): model = make(MODELS[size])
    encoder, labelled = getattr(model, 'encoder', model), hasattr(model, 'head')
    bs, amp = BATCH[size][labelled], options['dtype'] == 'bfloat16'
    told = dict(model=size, switch=switch, bs=bs, gflop_per_image=step_flops(model) / 1e9,
                gib_planned=planned(model, bs, amp=amp, checkpointing=options.get('checkpointing', False)).total / 2**30)
    imgs = torch.randn(bs, encoder.in_chans, *encoder.img_size, device=device)
    return train_step(like(model) if like else model, imgs, torch.arange(bs, device=device) if labelled else None, **options), told

def measure(size, switch, device, turns, steps, peak):
    "One row: images a second, MFU, memory; `peak`: operations a second of the device by type."
    step, told = prepared(size, switch, device)
    cuda = device.type == 'cuda'
    if cuda: gc.collect(); torch.cuda.reset_peak_memory_stats()   # our model beside theirs is gone
    times = in_turn(dict(ours=step), turns, steps, device)['ours']
    rate = told['bs'] / statistics.median(times)
    return told | dict(images_per_second=rate, slowest=told['bs'] / max(times), fastest=told['bs'] / min(times), mfu=rate * told['gflop_per_image'] * 1e9 / peak[SWITCHES[switch][2]['dtype']],
                       gib=torch.cuda.max_memory_allocated() / 2**30 if cuda else None)

def kernels(size, switch, device):
    "The ten kernels that take the most time, and their share of the step."
    step = prepared(size, switch, device)[0]
    for _ in range(3): step()
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == 'cuda')) as found:
        for _ in range(3): step()
        if device.type == 'cuda': torch.cuda.synchronize()
    spent = lambda e: e.self_device_time_total if device.type == 'cuda' else e.self_cpu_time_total   # us
    events = sorted(found.key_averages(), key=spent, reverse=True)
    total = sum(map(spent, events))
    return [dict(kernel=e.key[:90], share=spent(e) / total, ms_a_step=spent(e) / 3e3, calls_a_step=e.count / 3) for e in events[:10]]

def table(result):
    "The rows as Markdown."
    against = {r['model']: r['images_per_second'] for r in result['rows'] if r['switch'] == 'transformers, bf16'}
    lines = ['| model | switch | batch | images/s | MFU | GiB | planned GiB | of transformers\' bf16 |', '|---|---|---|---|---|---|---|---|']
    for r in result['rows']:
        ratio = '' if 'fine' in r['switch'] or 'probe' in r['switch'] or r['model'] not in against else f"{r['images_per_second'] / against[r['model']]:.2f}"
        lines.append(f"| {r['model']} | {r['switch']} | {r['bs']} | {r['images_per_second']:,.0f} | {r['mfu']:.1%} | {'' if r['gib'] is None else format(r['gib'], '.1f')} | {r['gib_planned']:.1f} | {ratio} |")
    lines += ['', f"{result['machine']['device_name']}, torch {result['machine']['versions']['torch']}, {result['seconds']:.0f} s in all"]
    lines += [f"left out: {x['model']} {x['switch']}: {x['why']}" for x in result['left_out']]
    for size, rows in result['kernels'].items():
        lines += ['', f'ten longest kernels, {size}', '', '| kernel | share | ms a step | calls |', '|---|---|---|---|']
        lines += [f"| {k['kernel']} | {k['share']:.1%} | {k['ms_a_step']:.2f} | {k['calls_a_step']:.0f} |" for k in rows]
    return '\n'.join(lines) + '\n'

def main(words=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--models', nargs='+', choices=MODELS, default=['B', 'L', 'H'])
    p.add_argument('--budget', type=float, default=520, help='seconds after which no row is begun')
    p.add_argument('--turns', type=int, default=5)
    p.add_argument('--steps', type=int, help='in a turn; by default as many as take half a second')
    p.add_argument('--device', help='by default the GPU if there is one')
    p.add_argument('--json'); p.add_argument('--table')
    args = p.parse_args(words)
    start, device = time.time(), torch.device(args.device or ('cuda' if torch.cuda.is_available() else 'cpu'))
    compiles = device.type == 'cuda'   # on a CPU a compilation alone takes longer than all else
    result = dict(machine=machine(device, torch.bfloat16 if compiles else torch.float32, ('transformers', 'timm')), budget=args.budget, rows=[], left_out=[], kernels={})
    peak = {k: peak_flops(device, v) for k, v in DTYPES.items()}
    left = lambda: args.budget - (time.time() - start)
    jobs = [(switch, size) for switch in list(SWITCHES)[:4] for size in args.models] + [('kernels', args.models[0])]
    jobs += [(switch, size) for switch in list(SWITCHES)[4:] for size in args.models]
    for switch, size in jobs:
        compiled = SWITCHES.get(switch, (0, 0, dict(compile='blocks')))[2].get('compile')
        why = 'only on a GPU' if compiled and not compiles and switch != 'kernels' else 'no time left' if left() < (75 if compiled and compiles else 15 if compiles else 1) else None
        if why is None:
            try:
                if switch == 'kernels': result['kernels'][size] = kernels(size, list(SWITCHES)[0 if compiles else 2], device)
                else:
                    result['rows'].append(measure(size, switch, device, args.turns, args.steps, peak))
                    print(f"{left():5.0f} s left  {size:5} {switch:40} {result['rows'][-1]['images_per_second']:10,.1f} images/s", flush=True)
            except torch.OutOfMemoryError: why = 'out of memory'
            except ValueError as e: why = str(e)   # torchao is not there
            torch.compiler.reset(); gc.collect()
            if compiles: torch.cuda.empty_cache()
        if why: result['left_out'].append(dict(model=size, switch=switch, why=why))
        result['seconds'] = time.time() - start
        if args.json: Path(args.json).write_text(json.dumps(result, indent=1) + '\n')   # after each row: what is there counts even if the call is cut off
        if args.table: Path(args.table).write_text(table(result))
    print('\n' + table(result))

if __name__ == '__main__': main()
