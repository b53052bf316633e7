"""How fast pictures come: python bench/loader.py SAMPLE.tar [--json FILE]

SAMPLE.tar holds JPEGs as .../train/<class>/<file>, such as imagenet_sample.tar. One process and one thread, random resized crop to 224
and flip, uint8 out, files in the system's cache; the loaders take turns, each reads the whole sample in a turn, and the median of the
turns counts. Rates of one process are pictures per second of its own processor time, which other work on the machine changes little.
A row tells what is left to a worker where a GPU decodes. Then one worker against two (by the clock), the same with a GPU that decodes
where there is one, what re-encoding costs in picture quality, and memory while 20,000 pictures (copies) go through two workers.
"""
import argparse
import io
import json
import platform
import re
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torchvision
from PIL import Image
from simplejpeg import decode_jpeg, decode_jpeg_header
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2.functional import center_crop

from mae_nb.data.crops import resize
from mae_nb.data.datasets import ImageSet, folder_sets, load_source
from mae_nb.data.images import read_image
from mae_nb.data.loader import get_dls
from mae_nb.training.presets import RECIPES
from mae_nb.training.recipes import override
from mae_nb.data.archives import Files, Part
from mae_nb.data.shards import pack

SIDE, QUALITY = 320, 90

def rate(batches, clock=time.process_time):
    "Pictures a second of one pass."
    start, n = clock(), 0
    for x, *_ in batches:
        assert x.dtype == torch.uint8 and x.shape[1:] == (3, 224, 224)
        n += len(x)
    return n / (clock() - start)

def theirs(folder, bs):
    "torchvision's ImageFolder and PIL, as its references have it."
    crop = [v2.RandomResizedCrop(224, (.2, 1.), interpolation=InterpolationMode.BICUBIC), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    return DataLoader(torchvision.datasets.ImageFolder(folder/'train', v2.Compose(crop)), bs, shuffle=True, drop_last=True)

def ours(source, bs, workers=0, repeats=1, **told):
    return get_dls(source, override(RECIPES['pretrain'], dict(repeats=repeats)), img_size=224, bs=bs, num_workers=workers, **dict(device='cpu') | told).train

def left_to_worker(source, bs):
    "Pictures a second of a worker's part where a device decodes: files read, headers looked at, crops drawn."
    start, batches = time.process_time(), list(ours(source, bs, decode='device').dl)
    return sum(len(index) for _, index, *_ in batches) / (time.process_time() - start)

def on_gpu(images, bs, workers):
    "Pictures a second by the clock, decoded on the GPU."
    dl = ours((images, None), bs, workers, device='cuda', decode='device')
    next(iter(dl))
    return median(rate(dl, time.perf_counter) for _ in range(3))

def decode_rate(raws):
    "Pictures a second of libjpeg-turbo alone, from memory."
    start = time.process_time()
    for raw in raws: decode_jpeg(raw, 'RGB')
    return len(raws) / (time.process_time() - start)

def decodable(raws):
    "Those that libjpeg-turbo turns into RGB, which are not those in CMYK."
    return [r for r in raws if decode_jpeg_header(r)[2] not in ('CMYK', 'YCCK')]

def psnr(a, b): return float(10 * np.log10(255**2 / np.mean((np.asarray(a, float) - np.asarray(b, float))**2)))

def quality(plain, small):
    "PSNR in dB, median over the pictures: of the JPEG against the same pixels before, and of the middle 224 of 256 against the original file's."
    jpeg, crop = [], []
    for a, b in zip(plain.items, small.items):
        if a == b: continue
        was, now = (read_image(io.BytesIO(x)) for x in (a, b))
        im = Image.fromarray(was.permute(1, 2, 0).numpy()); im.thumbnail((SIDE, SIDE), Image.LANCZOS)
        size = [round(n * 256 / min(was.shape[1:])) for n in was.shape[1:]]   # the same for both: a rounded side would move the crop
        jpeg.append(psnr(im, now.permute(1, 2, 0))); crop.append(psnr(*(center_crop(resize(x, size), 224) for x in (was, now))))
    return dict(pictures=len(jpeg), jpeg=median(jpeg), crop=median(crop), crop_worst=min(crop))

def memory(dl):
    "MiB of this process and its workers, shared pages counted once, after every 2,000 pictures."
    def now():
        pids = ['self', *(w.pid for w in dl.dl._iterator._workers)]
        return sum(int(re.search(r'^Pss: +(\d+)', Path(f'/proc/{p}/smaps_rollup').read_text(), re.M)[1]) for p in pids) / 1024
    got, n = [], 0
    for x, *_ in dl:
        if (n + len(x)) // 2000 > n // 2000: got.append(round(now()))
        n += len(x)
    return got

def main(sample, rounds, bs, file):
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        shutil.unpack_archive(sample, d)
        folder = next(d.rglob('train')).parent
        s = folder_sets(folder)[0]
        part = Part(Files(s.items, folder), s.labels, s.classes)
        for out, side in (('packed', None), ('small', SIDE)): pack({'train': part}, d/out, read=read_image, max_side=side, quality=QUALITY)
        (plain, _), (small, _) = load_source(d/'packed'), load_source(d/'small')
        raws = {k: decodable([*x.items]) for k, x in (('packed', plain), ('small', small))}
        sources = {'ours, the same files': folder, 'ours, packed, original bytes': d/'packed', f'ours, packed, {SIDE} pixels, quality {QUALITY}': d/'small'}
        turns = {'ImageFolder + PIL': lambda: rate(theirs(folder, bs))} | {k: partial(lambda x: rate(ours(x, bs)), v) for k, v in sources.items()}
        turns |= {'ours, the same files, 4 crops of each': lambda: rate(ours(folder, bs, repeats=4))}
        turns |= {'left to a worker where a GPU decodes, packed': partial(left_to_worker, d/'packed', bs)}
        turns |= {'decoding alone': lambda: decode_rate(raws['packed']), f'decoding alone, {SIDE} pixels': lambda: decode_rate(raws['small'])}
        got = {k: [] for k in turns}
        for _ in range(rounds):
            for k, turn in turns.items(): got[k].append(turn())
        rates = {k: median(v) for k, v in got.items()}
        told = dict(machine=f'{platform.machine()}, 1 thread', torch=torch.__version__, torchvision=torchvision.__version__, pictures=len(s), rounds=rounds)
        print(f'{len(s)} pictures, {told["machine"]}, torch {told["torch"]}, median of {rounds} turns\n\n| | pictures a CPU second | times ImageFolder |\n|---|---|---|')
        for k, v in rates.items(): print(f'| {k} | {v:,.0f} | {v / rates["ImageFolder + PIL"]:.2f} |')
        share = {k: rates[k] / rates[f'decoding alone, {SIDE} pixels' if x == d/'small' else 'decoding alone'] for k, x in sources.items()}
        print('\nshare of decoding alone: ' + ', '.join(f'{k} {v:.0%}' for k, v in share.items()))
        sizes = {k: sum(map(len, x.items)) / len(x) / 1000 for k, x in (('original', plain), ('re-encoded', small))}
        loss = quality(plain, small)
        print('KB a picture: {original:.1f}, re-encoded {re-encoded:.1f}'.format(**sizes))
        print('PSNR of the re-encoded: {jpeg:.1f} dB for the JPEG, {crop:.1f} dB for the middle crop of 224 (worst {crop_worst:.1f})'.format(**loss))
        many = Part(small.items[np.arange(20_000) % len(small)])
        pack({'train': many}, d/'many', read=lambda raw: torch.zeros(3, 1, 1))
        grow = {}
        for n in (1, 2):
            dl = ours((ImageSet('many', load_source(d/'many')[0].items[:2000]), None), bs, n)
            next(iter(dl)); grow[n] = median(rate(dl, time.perf_counter) for _ in range(3))
        print(f'workers, re-encoded: 1 gives {grow[1]:,.0f} pictures/s, 2 give {grow[2]:,.0f} ({grow[2] / grow[1]:.2f} times)')
        gpu = {k: {n: on_gpu(ImageSet('many', load_source(x)[0].items[np.arange(5000) % len(s)]), bs, n) for n in (1, 2, 4)} for k, x in (('original', d/'packed'), ('re-encoded', d/'small'))} if torch.cuda.is_available() else None
        for k, found in (gpu or {}).items(): print(f'decoded on {torch.cuda.get_device_name()}, {k}: ' + ', '.join(f'{n} workers {v:,.0f} pictures/s' for n, v in found.items()))
        if gpu is None: print('decoded on a GPU: left out, there is none')
        rss = memory(ours(d/'many', bs, 2))
        print(f'memory of three processes after every 2,000 of 20,000 pictures, 2 workers: {rss} MiB')
    if file: Path(file).write_text(json.dumps(told | dict(rates=rates, share_of_decoding=share, kb=sizes, psnr=loss, workers=grow, gpu=gpu, memory_mib=rss), indent=1) + '\n')

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('sample'); p.add_argument('--json')
    for flag, default in (('rounds', 5), ('bs', 50)): p.add_argument(f'--{flag}', type=int, default=default)
    a = p.parse_args()
    main(a.sample, a.rounds, a.bs, a.json)
