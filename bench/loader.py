"""How fast images come: python bench/loader.py SAMPLE.tar [--json FILE] [--only-rates]

SAMPLE.tar holds JPEGs as .../train/<class>/<file>, such as imagenet_sample.tar. One process and one thread, random
resized crop to 224 and flip, uint8 out, files in the system's cache. The loaders take turns, each reads the whole
sample in a turn, and the median of the turns counts. Rates of one process are images per second of its own processor
time, which other work on the machine changes little. One row is a worker's part if a GPU decodes. At 1/8 scale and
in grey libjpeg-turbo has all bits to read and nearly no pixels to make: this part no decoder can leave out.

Then, without --only-rates: one worker against two (by the clock), the same with a GPU that decodes if there is one,
the price of re-encoding in image quality, and memory while 20,000 images (copies) go through two workers.
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

from mae_nb.data.archives import Part
from mae_nb.data.crops import resize
from mae_nb.data.datasets import ImageSet, load_source
from mae_nb.data.images import read_image
from mae_nb.data.loader import get_dls
from mae_nb.data.packing import packable_parts
from mae_nb.data.shards import pack
from mae_nb.training.presets import RECIPES
from mae_nb.training.recipes import override

SIDE, QUALITY = 320, 90
FIRST, ALONE, ALONE_SMALL = 'ImageFolder + PIL', 'decoding alone', f'decoding alone, {SIDE} pixels'
BITS, BITS_SMALL = 'its bits alone', f'its bits alone, {SIDE} pixels'
PIXELS = f'ours, packed, {SIDE} pixels, uncompressed'
FILES, PACKED, SMALL = ('ours, the same files', 'ours, packed, original bytes',
                        f'ours, packed, {SIDE} pixels, quality {QUALITY}')

def rate(batches, clock=time.process_time):
    "Images a second of one pass."
    start, n = clock(), 0
    for imgs, *_ in batches:
        assert imgs.dtype == torch.uint8 and imgs.shape[1:] == (3, 224, 224)
        n += len(imgs)
    return n / (clock() - start)

def image_folder(folder, bs):
    "torchvision's ImageFolder and PIL, as its references have it."
    crop = v2.RandomResizedCrop(224, (.2, 1.), interpolation=InterpolationMode.BICUBIC)
    transform = v2.Compose([crop, v2.RandomHorizontalFlip(), v2.PILToTensor()])
    return DataLoader(torchvision.datasets.ImageFolder(folder/'train', transform), bs, shuffle=True, drop_last=True)

def ours(source, bs, workers=0, repeats=1, device='cpu', decode='cpu'):
    recipe = override(RECIPES['pretrain'], dict(repeats=repeats))
    return get_dls(source, recipe, img_size=224, bs=bs, num_workers=workers, device=device, decode=decode).train

def workers_part(source, bs):
    "Images a second of a worker's part if a device decodes: files read, headers looked at, crops drawn."
    start = time.process_time()
    batches = list(ours(source, bs, decode='device').dl)
    return sum(len(index) for _, index, *_ in batches) / (time.process_time() - start)

def clock_rate(loader):
    "Images a second by the clock, once the workers run."
    next(iter(loader))
    return median(rate(loader, time.perf_counter) for _ in range(3))

def decode_rate(raws, colours='RGB', **options):
    "Images a second of libjpeg-turbo alone, from memory."
    start = time.process_time()
    for raw in raws:
        decode_jpeg(raw, colours, **options)
    return len(raws) / (time.process_time() - start)

def bits_rate(raws):
    "Images a second of libjpeg-turbo's entropy decoding, and of little else."
    return decode_rate(raws, 'GRAY', min_height=1, min_width=1, min_factor=8)

def decodable(raws):
    "The files that libjpeg-turbo turns into RGB, which are those not in CMYK."
    return [raw for raw in raws if decode_jpeg_header(raw)[2] not in ('CMYK', 'YCCK')]

def psnr(a, b):
    "Peak signal-to-noise ratio in dB of two images with values from 0 to 255."
    return float(10 * np.log10(255**2 / np.mean((np.asarray(a, float) - np.asarray(b, float))**2)))

def quality(plain, small):
    "Median PSNR in dB: of the JPEG against the pixels before, and of the middle 224 of 256 against the original's."
    jpeg, crop = [], []
    for original, encoded in zip(plain.items, small.items):
        if original == encoded:
            continue
        before, after = (read_image(io.BytesIO(raw)) for raw in (original, encoded))
        scaled = Image.fromarray(before.permute(1, 2, 0).numpy())
        scaled.thumbnail((SIDE, SIDE), Image.LANCZOS)
        jpeg.append(psnr(scaled, after.permute(1, 2, 0)))
        # the same size for both: a rounded side would move the crop
        size = [round(n * 256 / min(before.shape[1:])) for n in before.shape[1:]]
        crop.append(psnr(*(center_crop(resize(img, size), 224) for img in (before, after))))
    return dict(pictures=len(jpeg), jpeg=median(jpeg), crop=median(crop), crop_worst=min(crop))

def memory(loader):
    "MiB of this process and its workers, shared pages counted once, after every 2,000 images."
    def now():
        pids = ['self', *(w.pid for w in loader.dl._iterator._workers)]
        reports = [Path(f'/proc/{pid}/smaps_rollup').read_text() for pid in pids]
        return sum(int(re.search(r'^Pss: +(\d+)', report, re.M)[1]) for report in reports) / 1024

    mib, n = [], 0
    for imgs, *_ in loader:
        if (n + len(imgs)) // 2000 > n // 2000:
            mib.append(round(now()))
        n += len(imgs)
    return mib

def measure_rates(folder, d, plain, small, rounds, bs):
    "Images a CPU second of every loader, and of decoding alone; the median of the turns."
    raws, small_raws = decodable([*plain.items]), decodable([*small.items])
    turns = {
        FIRST: lambda: rate(image_folder(folder, bs)),
        FILES: lambda: rate(ours(folder, bs)),
        PACKED: lambda: rate(ours(d/'packed', bs)),
        SMALL: lambda: rate(ours(d/'small', bs)),
        PIXELS: lambda: rate(ours(d/'pixels', bs)),
        'ours, the same files, 4 crops of each': lambda: rate(ours(folder, bs, repeats=4)),
        'left to a worker where a GPU decodes, packed': partial(workers_part, d/'packed', bs),
        ALONE: lambda: decode_rate(raws),
        ALONE_SMALL: lambda: decode_rate(small_raws),
        BITS: lambda: bits_rate(raws),
        BITS_SMALL: lambda: bits_rate(small_raws),
    }
    rates = {name: [] for name in turns}
    for _ in range(rounds):
        for name, turn in turns.items():
            rates[name].append(turn())
    return {name: median(values) for name, values in rates.items()}

def measure_gpu(d, n, bs):
    "Images a second by the clock, decoded on the GPU, by source and workers; None without a GPU."
    if not torch.cuda.is_available():
        print('decoded on a GPU: left out, there is none')
        return None
    rates = {}
    for name, packed in (('original', d/'packed'), ('re-encoded', d/'small')):
        images = ImageSet('many', load_source(packed)[0].items[np.arange(5000) % n])
        options = dict(device='cuda', decode='device')
        rates[name] = {w: clock_rate(ours((images, None), bs, w, **options)) for w in (1, 2, 4)}
        text = ', '.join(f'{w} workers {r:,.0f} pictures/s' for w, r in rates[name].items())
        print(f'decoded on {torch.cuda.get_device_name()}, {name}: {text}')
    return rates

def measure_many(small, d, bs):
    "With 20,000 copies of the small images: images a second of one and of two workers, and MiB of three processes."
    many = Part(small.items[np.arange(20_000) % len(small)])
    pack({'train': many}, d/'many', read=lambda raw: torch.zeros(3, 1, 1))
    images = ImageSet('many', load_source(d/'many')[0].items[:2000])
    workers = {n: clock_rate(ours((images, None), bs, n)) for n in (1, 2)}
    print(f'workers, re-encoded: 1 gives {workers[1]:,.0f} pictures/s, 2 give {workers[2]:,.0f} '
          f'({workers[2] / workers[1]:.2f} times)')
    mib = memory(ours(d/'many', bs, 2))
    print(f'memory of three processes after every 2,000 of 20,000 pictures, 2 workers: {mib} MiB')
    return workers, mib

def print_rates(rates, about):
    "The rates as a Markdown table; the share of decoding alone."
    print(f'{about["pictures"]} pictures, {about["machine"]}, torch {about["torch"]}, '
          f'median of {about["rounds"]} turns\n')
    print('| | pictures a CPU second | times ImageFolder |\n|---|---|---|')
    for name, value in rates.items():
        print(f'| {name} | {value:,.0f} | {value / rates[FIRST]:.2f} |')
    shares = {FILES: rates[FILES] / rates[ALONE], PACKED: rates[PACKED] / rates[ALONE],
              SMALL: rates[SMALL] / rates[ALONE_SMALL]}
    print('\nshare of decoding alone: ' + ', '.join(f'{name} {share:.0%}' for name, share in shares.items()))
    return shares

def bounds(rates):
    "How many times ImageFolder's rate ours would have if decoding took no more than reading the bits."
    pairs = {FILES: (ALONE, BITS), PACKED: (ALONE, BITS), SMALL: (ALONE_SMALL, BITS_SMALL)}
    seconds = {name: 1 / value for name, value in rates.items()}
    return {name: seconds[FIRST] / (seconds[name] - seconds[alone] + seconds[bits])
            for name, (alone, bits) in pairs.items()}

def measure_rest(d, plain, small, bs):
    "The price of re-encoding in image quality, and what the clock and the memory of several processes show."
    loss = quality(plain, small)
    print(f'PSNR of the re-encoded: {loss["jpeg"]:.1f} dB for the JPEG, {loss["crop"]:.1f} dB for the middle crop '
          f'of 224 (worst {loss["crop_worst"]:.1f})')
    workers, mib = measure_many(small, d, bs)
    return dict(psnr=loss, workers=workers, gpu=measure_gpu(d, len(plain), bs), memory_mib=mib)

def main(sample, rounds, bs, file, only_rates):
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        shutil.unpack_archive(sample, d)
        folder = next(d.rglob('train')).parent
        parts = {'train': packable_parts(folder)['train']}
        for out, side, jpeg in (('packed', None, QUALITY), ('small', SIDE, QUALITY), ('pixels', SIDE, None)):
            pack(parts, d/out, max_side=side, quality=jpeg)
        plain, small, pixels = (load_source(d/name)[0] for name in ('packed', 'small', 'pixels'))
        about = dict(machine=f'{platform.machine()}, 1 thread', torch=torch.__version__,
                     torchvision=torchvision.__version__, pictures=len(plain), rounds=rounds)
        rates = measure_rates(folder, d, plain, small, rounds, bs)
        shares = print_rates(rates, about)
        limits = bounds(rates)
        print('times ImageFolder if decoding were reading the bits: '
              + ', '.join(f'{name} {limit:.2f}' for name, limit in limits.items()))
        sets = {'original': plain, 're-encoded': small, 'uncompressed': pixels}
        sizes = {name: sum(map(len, images.items)) / len(images) / 1000 for name, images in sets.items()}
        print('KB a picture: ' + ', '.join(f'{name} {size:.1f}' for name, size in sizes.items()))
        rest = {} if only_rates else measure_rest(d, plain, small, bs)
    if file:
        result = about | dict(rates=rates, share_of_decoding=shares, bounds=limits, kb=sizes) | rest
        Path(file).write_text(json.dumps(result, indent=1) + '\n')

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('sample')
    parser.add_argument('--json')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--bs', type=int, default=50)
    parser.add_argument('--only-rates', action='store_true')
    args = parser.parse_args()
    main(args.sample, args.rounds, args.bs, args.json, args.only_rates)
