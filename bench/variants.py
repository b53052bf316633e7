"""What each variant of the model costs: operations, memory, and forward + backward time, measured in turn in one run.

    python bench/variants.py [--bs 4] [--rounds 5] [--threads 2] [--device cpu] [--json FILE]
"""
import argparse
import json
import platform
import time
from statistics import median

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mae_nb.model.mae import create_mae

BASE, PAPER = 'mae_vit_base_patch16', 'decoder 8 blocks (the paper)'
VARIANTS = {   # row -> options of `create_mae`
    PAPER: {},
    'mask tokens in the encoder': dict(encoder_mask_tokens=True),
    'decoder 1 block': dict(decoder_depth=1),
    **{f'decoder {depth} blocks': dict(decoder_depth=depth) for depth in (2, 4, 12)},
    **{f'cross-attention, {share:.0%}': dict(decoder='cross', decode_ratio=share) for share in (.25, .5, 1.)},
}

def gflop(name, **options):
    "Forward operations for one image, counted on the meta device."
    with torch.device('meta'):
        model = create_mae(name, **options).train()
        imgs, noise = torch.empty(1, 3, *model.encoder.img_size), torch.empty(1, model.num_patches)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(imgs, noise=noise)
    return counter.get_total_flops() / 1e9

def kept_mib(model, imgs, noise):
    "Activations kept for the backward pass, MiB an image: every storage once, weights left out."
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes = {}
    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(imgs, noise=noise)
    mib = sum(sizes.values()) / 2**20 / len(imgs)
    del output   # until here it has kept the storages, and so their addresses, alive
    return mib

def seconds(model, imgs, noise):
    "One forward and backward pass."
    synchronize = torch.cuda.synchronize if imgs.is_cuda else lambda: None
    synchronize()
    start = time.perf_counter()
    model(imgs, noise=noise).loss.backward()
    synchronize()
    took = time.perf_counter() - start
    model.zero_grad()
    return took

def measure(bs, rounds, device):
    "The rows of the variants: operations, time and memory."
    imgs, noise = torch.randn(bs, 3, 224, 224, device=device), torch.rand(bs, 196, device=device)
    models = {}
    for name, options in VARIANTS.items():
        torch.manual_seed(0)
        models[name] = create_mae(BASE, **options).to(device).train()
    kept = {name: kept_mib(model, imgs, noise) for name, model in models.items()}   # warms up, too
    times = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            times[name].append(seconds(model, imgs, noise))
    paper, rows = median(times[PAPER]), {}
    for name, options in VARIANTS.items():
        typical = median(times[name])
        rows[name] = dict(gflop=gflop(BASE, **options), ms=typical / bs * 1e3, ratio=typical / paper,
                          kept_mib=kept[name])
    return rows

def count_sizes():
    "Operations of the paper's sizes, and with mask tokens in the encoder."
    sizes = {}
    for name in (BASE, 'mae_vit_large_patch16', 'mae_vit_huge_patch14'):
        plain, full = gflop(name), gflop(name, encoder_mask_tokens=True)
        sizes[name] = dict(gflop=plain, with_mask_tokens=full, ratio=full / plain)
    return sizes

def main(bs, rounds, threads, device, file):
    torch.set_num_threads(threads)
    cpu = f'{platform.machine()} CPU, {threads} threads'
    about = {'device': torch.cuda.get_device_name() if device.startswith('cuda') else cpu,
             'torch': torch.__version__, 'bs': bs}
    print(f'{BASE} at 224 pixels, float32, batch {bs}, median of {rounds} rounds in turn, {about["device"]}, '
          f'torch {about["torch"]}')
    rows = measure(bs, rounds, device)
    print("\n| variant | GFLOP forward | ms forward + backward | times the paper's | kept MiB |\n|---|---|---|---|---|")
    for name, row in rows.items():
        print('| {} | {gflop:.1f} | {ms:.0f} | {ratio:.2f} | {kept_mib:.0f} |'.format(name, **row))
    sizes = count_sizes()
    print('\n| size | GFLOP forward | with mask tokens in the encoder | times |\n|---|---|---|---|')
    for name, row in sizes.items():
        print('| {} | {gflop:.1f} | {with_mask_tokens:.1f} | {ratio:.1f} |'.format(name, **row))
    if file:
        with open(file, 'w') as f:
            json.dump(about | dict(variants=rows, sizes=sizes), f, indent=1)

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--bs', type=int, default=4)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--json')
    args = parser.parse_args()
    main(args.bs, args.rounds, args.threads, args.device, args.json)
