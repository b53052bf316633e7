"""The whole table of a GPU in one call: images/s, MFU and memory for each switch, against transformers and timm, and
the ten longest kernels.

    python bench/gpu/step.py [--json FILE] [--table FILE] [--budget 520] [--models B L H] [--turns 5]
    python bench/gpu/step.py --models nano --device cpu      (a few seconds: does the script still work?)

The most important rows come first. The table lists the rows for which the budget left no time.
"""
import argparse
import gc
import json
import statistics
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from mae_nb.base.devices import machine, peak_flops
from mae_nb.measure.pairs import fastest_dtype, in_turn, timm_twin, train_step, transformers_twin
from mae_nb.model.classifier import create_classifier
from mae_nb.model.costs import step_flops, step_memory
from mae_nb.model.mae import MAE, SIZES, create_mae
from mae_nb.tasks.features import get_encoder
from mae_nb.tasks.probes import FrozenProbe, LinearHead
from mae_nb.training.switches import DTYPES

MODELS = dict(B='mae_vit_base_patch16', L='mae_vit_large_patch16', H='mae_vit_huge_patch14',
              nano='mae_vit_nano_patch4_32')
BATCH = dict(B=(256, 128), L=(256, 64), H=(128, 32), nano=(4, 4))   # of pretraining; of what sees all patches

def cross(name):
    return create_mae(name, decoder='cross', decode_ratio=.25)

def classifier(name):
    return create_classifier(name, 1000)

def probe(name):
    return FrozenProbe(create_mae(name).encoder, LinearHead(SIZES[name]['dim'], 1000))

BF16 = dict(dtype='bfloat16')
COMPILED = BF16 | dict(compile='blocks')
SWITCHES = {   # row -> (model, somebody else's code for it, options of `train_step`)
    'bf16, blocks compiled':               (create_mae, None, COMPILED),
    'transformers, bf16':                  (create_mae, transformers_twin, BF16),
    'bf16':                                (create_mae, None, BF16),
    'cross decoder 25 %, blocks compiled': (cross, None, COMPILED),
    'float32':                             (create_mae, None, dict(dtype='float32')),
    'bf16, AdamW not fused':               (create_mae, None, BF16 | dict(fused=False)),
    'bf16, activation checkpointing':      (create_mae, None, BF16 | dict(checkpointing=True)),
    'fine-tuning, blocks compiled':        (classifier, None, COMPILED),
    'fine-tuning, timm, bf16':             (classifier, timm_twin, BF16),
    'linear probe, bf16':                  (probe, None, BF16),
    'bf16, compiled whole':                (create_mae, None, BF16 | dict(compile='whole')),
    'bf16, CUDA graphs':                   (create_mae, None, BF16 | dict(compile='graphs')),
    'float8, blocks compiled':             (create_mae, None, COMPILED | dict(fp8=True)),
    'transformers, blocks compiled':       (create_mae, transformers_twin, COMPILED),
    'fine-tuning, bf16':                   (classifier, None, BF16),
}

def prepare(size, switch, device):
    "The step of a row, and its numbers that need no measurement."
    make, twin, options = SWITCHES[switch]
    with torch.device(device):
        model = make(MODELS[size])
    encoder, labelled = get_encoder(model), not isinstance(model, MAE)
    bs = BATCH[size][labelled]
    planned = step_memory(model, bs, amp=options['dtype'] == 'bfloat16',
                          checkpointing=options.get('checkpointing', False))
    row = dict(model=size, switch=switch, bs=bs, gflop_per_image=step_flops(model) / 1e9,
               gib_planned=planned.total / 2**30)
    imgs = torch.randn(bs, encoder.in_chans, *encoder.img_size, device=device)
    labels = torch.arange(bs, device=device) if labelled else None
    return train_step(twin(model) if twin else model, imgs, labels, **options), row

def measure(size, switch, device, turns, steps, peak):
    "One row: images a second, MFU, memory; `peak`: operations a second of the device by type."
    step, row = prepare(size, switch, device)
    cuda = device.type == 'cuda'
    if cuda:
        gc.collect()   # our model, beside which theirs was made
        torch.cuda.reset_peak_memory_stats()
    times = in_turn(dict(ours=step), turns, steps, device)['ours']
    rate = row['bs'] / statistics.median(times)
    mfu = rate * row['gflop_per_image'] * 1e9 / peak[SWITCHES[switch][2]['dtype']]
    gib = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    return row | dict(images_per_second=rate, slowest=row['bs'] / max(times), fastest=row['bs'] / min(times),
                      mfu=mfu, gib=gib)

def kernels(size, switch, device):
    "The ten kernels that take the most time, and their share of the step."
    cuda, rounds = device.type == 'cuda', 3
    step, _ = prepare(size, switch, device)
    for _ in range(rounds):
        step()
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as profiled:
        for _ in range(rounds):
            step()
        if cuda:
            torch.cuda.synchronize()

    def spent(event):   # microseconds
        return event.self_device_time_total if cuda else event.self_cpu_time_total

    events = sorted(profiled.key_averages(), key=spent, reverse=True)
    total = sum(map(spent, events))
    return [dict(kernel=e.key[:90], share=spent(e) / total, ms_a_step=spent(e) / rounds / 1e3,
                 calls_a_step=e.count / rounds) for e in events[:10]]

def table(result):
    "The rows as Markdown."
    theirs = {r['model']: r['images_per_second'] for r in result['rows'] if r['switch'] == 'transformers, bf16'}
    lines = ["| model | switch | batch | images/s | MFU | GiB | planned GiB | of transformers' bf16 |",
             '|---|---|---|---|---|---|---|---|']
    for r in result['rows']:
        comparable = r['model'] in theirs and 'fine' not in r['switch'] and 'probe' not in r['switch']
        ratio = f"{r['images_per_second'] / theirs[r['model']]:.2f}" if comparable else ''
        gib = '' if r['gib'] is None else f"{r['gib']:.1f}"
        lines.append(f"| {r['model']} | {r['switch']} | {r['bs']} | {r['images_per_second']:,.0f} | {r['mfu']:.1%} | "
                     f"{gib} | {r['gib_planned']:.1f} | {ratio} |")
    about = result['machine']
    lines += ['', f"{about['device_name']}, torch {about['versions']['torch']}, {result['seconds']:.0f} s in all"]
    lines += [f"left out: {x['model']} {x['switch']}: {x['why']}" for x in result['left_out']]
    for size, rows in result['kernels'].items():
        lines += kernel_table(size, rows)
    return '\n'.join(lines) + '\n'

def kernel_table(size, rows):
    "The longest kernels of a model, as Markdown lines."
    lines = ['', f'ten longest kernels, {size}', '', '| kernel | share | ms a step | calls |', '|---|---|---|---|']
    for r in rows:
        lines.append(f"| {r['kernel']} | {r['share']:.1%} | {r['ms_a_step']:.2f} | {r['calls_a_step']:.0f} |")
    return lines

def parse(words):
    "The command line."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', choices=MODELS, default=['B', 'L', 'H'])
    parser.add_argument('--rows', nargs='+', choices=[*SWITCHES, 'kernels'], help='all of them by default')
    parser.add_argument('--budget', type=float, default=520, help='seconds after which no row is begun')
    parser.add_argument('--turns', type=int, default=5)
    parser.add_argument('--steps', type=int, help='in a turn; by default as many as take half a second')
    parser.add_argument('--device', help='by default the GPU if there is one')
    parser.add_argument('--json')
    parser.add_argument('--table')
    return parser.parse_args(words)

def reason_against(switch, left, cuda):
    "Why a row is not begun, or None. A compilation takes long: on a CPU longer than everything else together."
    profiled = switch == 'kernels'
    compiled = profiled or 'compile' in SWITCHES[switch][2]
    if compiled and not cuda and not profiled:
        return 'only on a GPU'
    least = (30 if compiled else 10) if cuda else 1   # seconds
    return None if left >= least else 'no time left'

def run_row(result, size, switch, device, args, peak):
    "Measure a row into the result; the reason if it is not possible."
    try:
        if switch == 'kernels':
            result['kernels'][size] = kernels(size, list(SWITCHES)[0 if device.type == 'cuda' else 2], device)
        else:
            result['rows'].append(measure(size, switch, device, args.turns, args.steps, peak))
    except torch.OutOfMemoryError:
        return 'out of memory'
    except ValueError as e:   # no float8 on this device, or torchao is not installed
        return str(e)

def clean_up(device):
    "Free what a row has left, compiled code included."
    torch.compiler.reset()
    gc.collect()
    if device.type == 'cuda':
        torch.cuda.empty_cache()

def main(words=None):
    args, start = parse(words), time.time()
    device = torch.device(args.device or ('cuda' if torch.cuda.is_available() else 'cpu'))
    cuda = device.type == 'cuda'
    about = machine(device, torch.bfloat16 if cuda else torch.float32, ('transformers', 'timm'))
    result = dict(machine=about, budget=args.budget, rows=[], left_out=[], kernels={})
    peak = {name: peak_flops(device, fastest_dtype(dtype, device)) for name, dtype in DTYPES.items()}
    first, later = list(SWITCHES)[:4], list(SWITCHES)[4:]
    jobs = [(switch, size) for switch in first for size in args.models]
    jobs.append(('kernels', args.models[0]))
    jobs += [(switch, size) for switch in later for size in args.models]
    wanted = args.rows or [*SWITCHES, 'kernels']
    for switch, size in [job for job in jobs if job[0] in wanted]:
        left = args.budget - (time.time() - start)
        why = reason_against(switch, left, cuda)
        if why is None:
            why = run_row(result, size, switch, device, args, peak)
            clean_up(device)
        if why:
            result['left_out'].append(dict(model=size, switch=switch, why=why))
        elif switch != 'kernels':
            left = args.budget - (time.time() - start)
            rate = result['rows'][-1]['images_per_second']
            print(f'{left:5.0f} s left  {size:5} {switch:40} {rate:10,.1f} images/s', flush=True)
        result['seconds'] = time.time() - start
        if args.json:   # after each row: these rows count even if the call is cut off
            Path(args.json).write_text(json.dumps(result, indent=1) + '\n')
        if args.table:
            Path(args.table).write_text(table(result))
    print('\n' + table(result))

if __name__ == '__main__':
    main()
