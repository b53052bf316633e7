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

BASE = 'mae_vit_base_patch16'
VARIANTS = {
    'decoder 8 blocks (the paper)': {},
    'mask tokens in the encoder': dict(encoder_mask_tokens=True),
    **{f'decoder {d} block{"s" * (d > 1)}': dict(decoder_depth=d) for d in (1, 2, 4, 12)},
    **{f'cross-attention, {r:.0%}': dict(decoder='cross', decode_ratio=r) for r in (.25, .5, 1.)},
}

def gflop(name, **options):
    "Forward operations for one image, counted on the meta device."
    with torch.device('meta'):
        model = create_mae(name, **options).train()
        imgs, noise = torch.empty(1, 3, *model.encoder.img_size), torch.empty(1, model.num_patches)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter: model(imgs, noise=noise)
    return counter.get_total_flops() / 1e9

def kept_mib(model, imgs, noise):
    "Activations kept for the backward pass, MiB an image: every storage once, weights left out."
    weights, seen = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}
    def keep(t):
        s = t.untyped_storage()
        if s.data_ptr() not in weights: seen[s.data_ptr()] = s.nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t): out = model(imgs, noise=noise)   # `out` keeps the storages alive
    return sum(seen.values()) / 2**20 / len(imgs) + 0 * out.loss.item()

def seconds(model, imgs, noise):
    "One forward and backward pass."
    sync = torch.cuda.synchronize if imgs.is_cuda else lambda: None
    sync(); start = time.perf_counter()
    model(imgs, noise=noise).loss.backward()
    sync(); took = time.perf_counter() - start
    model.zero_grad()
    return took

def main(bs, rounds, threads, device, file):
    torch.set_num_threads(threads)
    told = {'device': torch.cuda.get_device_name() if device.startswith('cuda') else f'{platform.machine()} CPU, {threads} threads', 'torch': torch.__version__, 'bs': bs}
    print(f'{BASE} at 224 pixels, float32, batch {bs}, median of {rounds} rounds in turn, {told["device"]}, torch {told["torch"]}')
    imgs, noise = torch.randn(bs, 3, 224, 224, device=device), torch.rand(bs, 196, device=device)
    models = {}
    for name, options in VARIANTS.items(): torch.manual_seed(0); models[name] = create_mae(BASE, **options).to(device).train()
    kept = {name: kept_mib(m, imgs, noise) for name, m in models.items()}   # warms up, too
    times = {name: [] for name in models}
    for _ in range(rounds):
        for name, m in models.items(): times[name].append(seconds(m, imgs, noise))
    rows, paper = {}, median(times['decoder 8 blocks (the paper)'])
    print("\n| variant | GFLOP forward | ms forward + backward | times the paper's | kept MiB |\n|---|---|---|---|---|")
    for name, options in VARIANTS.items():
        t = median(times[name])
        rows[name] = dict(gflop=gflop(BASE, **options), ms=t / bs * 1e3, ratio=t / paper, kept_mib=kept[name])
        print('| {} | {gflop:.1f} | {ms:.0f} | {ratio:.2f} | {kept_mib:.0f} |'.format(name, **rows[name]))
    print('\n| size | GFLOP forward | with mask tokens in the encoder | times |\n|---|---|---|---|')
    sizes = {}
    for name in (BASE, 'mae_vit_large_patch16', 'mae_vit_huge_patch14'):
        a, b = gflop(name), gflop(name, encoder_mask_tokens=True)
        sizes[name] = dict(gflop=a, with_mask_tokens=b, ratio=b / a)
        print(f'| {name} | {a:.1f} | {b:.1f} | {b / a:.1f} |')
    if file:
        with open(file, 'w') as f: json.dump(told | dict(variants=rows, sizes=sizes), f, indent=1)

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for flag, kind, default in (('bs', int, 4), ('rounds', int, 5), ('threads', int, 2), ('device', str, 'cpu'), ('json', str, None)): p.add_argument(f'--{flag}', type=kind, default=default)
    a = p.parse_args()
    main(a.bs, a.rounds, a.threads, a.device, a.json)
