"""JPEGs decoded on the device that trains show what those decoded on the CPU show.

Without a GPU the CPU is the device: all is the same but nvJPEG.
"""
import csv
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision
from made_images import (
    CUT,
    damage,
    encode,
    files_of_all_kinds,
    image_set,
    made_image,
    made_photograph,
    mixed_folder,
    read_in_time,
    sample_files,
)
from PIL import Image

from mae_nb.data import device_jpeg as module
from mae_nb.data.datasets import folder_set
from mae_nb.data.device_jpeg import device_jpeg, device_pixels
from mae_nb.data.images import bare_jpeg
from mae_nb.data.loader import Loader, get_dls
from mae_nb.training.presets import RECIPES
from mae_nb.training.recipes import override

RECIPE = override(RECIPES['pretrain'], dict(batch_size=25))
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason='nvJPEG needs a GPU')
DEVICES = ['cpu', pytest.param('cuda', marks=CUDA)]
LOOSE = dict(cpu=1, cuda=2)   # nvJPEG scales colours up in its own way; its factor is a guess until a GPU has run this

def recipe_of(**fields):
    return override(RECIPE, fields)

def make_loader(images, decode='device', device='cpu', recipe=RECIPE, workers=0, size=224, valid=None, **options):
    "The training loader, or that of a validation set."
    dls = get_dls((images, valid), recipe, img_size=size, num_workers=workers, device=device, decode=decode, **options)
    return dls.train if valid is None else dls.valid

def batches(images, *args, epoch=0, **options):
    loader = make_loader(images, *args, **options)
    loader.set_epoch(epoch)
    return [(imgs.cpu(), index, labels) for imgs, index, labels in loader]

def distance(a, b):
    "Mean difference of each image, in grey levels."
    return (a.float() - b).abs().mean((1, 2, 3))

def differences(raws, device, **options):
    "Mean difference in grey levels of each sample, between its two ways."
    images = image_set(raws, labels=True)
    there = batches(images, 'device', device, **options)
    here = batches(images, 'cpu', 'cpu', **options)
    means = []
    for (x, i, a), (y, j, b) in zip(there, here, strict=True):
        assert x.dtype == torch.uint8 and x.shape == y.shape
        assert torch.equal(i, j) and torch.equal(a, b)
        means.append(distance(x, y))
    return torch.cat(means).numpy()

@pytest.mark.parametrize('device', DEVICES)
def test_real_photographs(shared_data, device):
    raws = sample_files(shared_data)
    means = differences(raws, device)
    print(f'{device}: {means.mean():.3f} grey levels on average, {means.max():.2f} in the worst of {len(means)} crops')
    assert len(means) == len(raws)
    means = means / LOOSE[device]
    assert means.mean() < 1 and np.quantile(means, .99) < 2
    assert means.max() < 5   # the worst were decoded at 1/2 scale on the CPU

CASES = [('RGB', 400), ('RGB', 1203), ('RGB', 2401), ('L', 400), ('L', 1203), ('CMYK', 400)]

@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('mode, side', CASES)
def test_made_photographs(device, mode, side):
    turns = (1, 6) if side > 2000 else (1, 3, 6, 8)
    raws = [made_photograph(mode, turn, side) for turn in turns]
    means = differences(raws, device, recipe=recipe_of(batch_size=2))
    print(f'{mode} {side}: {means.mean():.3f} grey levels, worst {means.max():.2f}')
    assert means.max() < 2 * LOOSE[device]

NOTES = Image.Exif()
NOTES[0x10f] = 'a camera'
JPEG_KINDS = {'progressive': dict(progressive=True), 'restarts': dict(restart_marker_blocks=4),
              'full colour': dict(subsampling=0), 'camera notes': dict(exif=NOTES), 'a film behind it': {},
              'odd sides': {}, 'one channel wanted': {}}

@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('kind', JPEG_KINDS)
def test_kinds_of_jpegs(device, kind):
    cols = 455 if kind == 'odd sides' else 400
    raws = [encode(made_image(i, 301, cols), quality=90, **JPEG_KINDS[kind]) for i in range(4)]
    if kind == 'a film behind it':
        raws = [raw + b'a film' for raw in raws]
    images = image_set(raws, labels=True)
    if kind == 'one channel wanted':
        images = replace(images, mean=(.5,), std=(.5,))
    options = dict(recipe=recipe_of(batch_size=2), size=(96, 128))
    there, here = batches(images, 'device', device, **options), batches(images, 'cpu', 'cpu', **options)
    for (x, *_), (y, *_) in zip(there, here, strict=True):
        assert (x.float() - y).abs().mean() < 2 * LOOSE[device]

@pytest.mark.parametrize('augment', ['random', 'fixed', 'none'])
def test_every_crop_that_numbers_tell(augment):
    raws = [encode(made_image(i, 120, 160)) for i in range(8)]
    assert differences(raws, 'cpu', recipe=recipe_of(batch_size=4, augment=augment), size=64).max() < 2

@pytest.mark.parametrize('size', [64, 256])
def test_the_crop_of_validation(size):
    images = image_set([encode(made_image(i, 120, 160)) for i in range(8)], labels=True)
    options = dict(recipe=recipe_of(batch_size=4), size=size, valid=images)
    there, here = (batches(images, decode, 'cpu', **options) for decode in ('device', 'cpu'))
    for (x, i, _), (y, j, _) in zip(there, here, strict=True):
        assert (x.float() - y).abs().mean() < 1 and torch.equal(i, j)

def test_the_same_bytes_for_any_number_of_workers(tmp_path):
    images, recipe = folder_set(mixed_folder(tmp_path/'photos')), recipe_of(repeats=2)
    runs = [batches(images, recipe=recipe, workers=workers, size=32, epoch=3) for workers in (0, 1, 2)]
    for alone, *others in zip(*runs, strict=True):
        assert alone[0].shape == (50, 3, 32, 32)
        for other in others:
            assert all(torch.equal(x, y) for x, y in zip(alone, other))
    loader = make_loader(images, recipe=recipe, size=32)
    loader.set_epoch(3, 2)   # a run that is resumed
    for before, after in zip(runs[0][2:], loader, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(before, after))

def test_processes_share_the_same_samples(tmp_path):
    images, recipe = folder_set(mixed_folder(tmp_path/'photos')), recipe_of(batch_size=20)
    whole = batches(images, recipe=recipe, size=32)
    parts = []
    for part in (0, 1):
        loader = make_loader(images, recipe=recipe, size=32, bs=10)
        loader.share(part, 2)
        parts.append([imgs for imgs, *_ in loader])
    for (imgs, *_), a, b in zip(whole, *parts, strict=True):
        assert torch.equal(imgs, torch.cat([a, b]))

def without_quantisation(raw):
    "A JPEG without its first table of steps: the fault shows when its pixels are decoded."
    at = raw.index(b'\xff\xdb')
    return raw[:at] + raw[at + 2 + int.from_bytes(raw[at + 2:at + 4], 'big'):]

@pytest.mark.parametrize('repeats', [1, 2])
@pytest.mark.parametrize('workers', [0, 1])
def test_bad_files_have_the_same_stand_ins_and_are_named_once(tmp_path, capsys, workers, repeats, monkeypatch):
    folder = mixed_folder(tmp_path/'photos')
    for name, length in (('even/010.jpeg', 500), ('odd/011.jpeg', -1)):   # cut in its header, and amid its pixels
        (folder/name).write_bytes((folder/name).read_bytes()[:length])
    fault = folder/'odd'/'021.jpeg'
    fault.write_bytes(without_quantisation(fault.read_bytes()))
    assert device_jpeg(fault.read_bytes(), (32, 32), (0, 0))   # the device is tried
    monkeypatch.setattr(Loader, 'max_bad', .05)
    recipe, seen = recipe_of(batch_size=20, repeats=repeats), {}
    for decode in ('cpu', 'device'):
        loader = make_loader(folder_set(folder), decode, recipe=recipe, workers=workers, size=32)
        loader.record = tmp_path/f'{decode}.csv'
        seen[decode] = []
        for epoch in (0, 1):   # the count stays the same
            loader.set_epoch(epoch)
            seen[decode] += loader
        log = capsys.readouterr().out
        assert log.count('could not read') == 3 and len(loader.bad) == 3 and 'note' not in log
    for (x, i, a), (y, j, b) in zip(*seen.values(), strict=True):
        assert torch.equal(i, j) and torch.equal(a, b) and distance(x, y).max() < 4
    here, there = (sorted(csv.reader(open(tmp_path/f'{decode}.csv'))) for decode in seen)
    assert here == there and len(here) == 4

def test_no_cut_file_is_sent_and_no_good_one_is_lost():
    originals = [data for data in files_of_all_kinds() if data[:2] == b'\xff\xd8']
    rng = np.random.default_rng(0)
    for n in range(400):
        kind, raw = damage(originals[n % len(originals)], originals, rng)
        is_good = isinstance(read_in_time(raw), torch.Tensor)
        try:
            jpeg = device_jpeg(raw, (64, 64), (0, 0))
        except Exception:
            jpeg = None
            assert not is_good
        assert not (jpeg and kind == CUT and not is_good)
        if is_good:
            data = torch.frombuffer(bytearray(jpeg.data), dtype=torch.uint8)
            assert next(device_pixels([data], [jpeg.whole], 3, 'cpu')) is not None

def refuse_on_device(monkeypatch, *raws):
    "A device that takes no batch with these files in it."
    plain = torchvision.io.decode_jpeg
    refused = {bare_jpeg(raw)[0] for raw in raws if raw[:2] == b'\xff\xd8'}
    def refusing(files, *args):
        if any(bytes(f.numpy()) in refused for f in files):
            raise RuntimeError('not this one')
        return plain(files, *args)
    monkeypatch.setattr(torchvision.io, 'decode_jpeg', refusing)

def test_what_only_the_cpu_can_decode_is_told_and_read(tmp_path, capsys, monkeypatch):
    images = folder_set(mixed_folder(tmp_path/'photos'))
    refuse_on_device(monkeypatch, *(images.data(i) for i in range(0, 120, 7)))
    loader = make_loader(images, size=32)
    for (x, *_), (y, *_) in zip(loader, batches(images, 'cpu', 'cpu', size=32), strict=True):
        assert (x.float() - y).abs().mean() < 2
    log = capsys.readouterr().out
    assert log.count('note: cpu cannot decode') == 1 and 'the CPU does; others like it are not reported' in log
    assert not loader.bad

def test_no_more_memory_than_a_call_may_take(monkeypatch):
    raws, calls, plain = [encode(made_image(i, 100, 100)) for i in range(9)], [], torchvision.io.decode_jpeg
    def counting(files, *args):
        calls.append(len(files))
        return plain(files, *args)
    monkeypatch.setattr(module, 'MAX_AT_ONCE', 30_000)
    monkeypatch.setattr(torchvision.io, 'decode_jpeg', counting)
    batches(image_set(raws, labels=True), recipe=recipe_of(batch_size=9), size=32)
    assert sum(calls[1:]) == 9 and max(calls) <= 3   # the first is the trial of `get_dls`

def test_a_full_memory_is_no_bad_file(monkeypatch):
    def full(files, *args):
        raise torch.OutOfMemoryError('full')
    monkeypatch.setattr(torchvision.io, 'decode_jpeg', full)
    files = [torch.zeros(3, dtype=torch.uint8)] * 2
    with pytest.raises(torch.OutOfMemoryError):
        list(device_pixels(files, [(1, 1)] * 2, 3, 'cpu'))

def test_a_training_that_stops_early_leaves_no_thread(tmp_path):
    images, before = folder_set(mixed_folder(tmp_path/'photos')), threading.active_count()
    next(iter(make_loader(images, size=32)))
    assert threading.active_count() == before
