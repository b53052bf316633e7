"""JPEGs decoded on the device that trains show what those decoded on the CPU show. Without a GPU the CPU is the device: all is the same but nvJPEG."""
import csv
import io
import json
import tarfile
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from test_bad_data import encoded, mutated, picture, read, seeds
from test_crops import photo

from mae_nb import data
from mae_nb.data.loader import augment_dls
from mae_nb.data.datasets import ImageSet
from mae_nb.data.images import read_image
from mae_nb.data.loader import get_dls
from mae_nb.training.presets import RECIPES
from mae_nb.training.recipes import override
from mae_nb.data.archives import Files, Part
from mae_nb.data.shards import pack

RECIPE = override(RECIPES['pretrain'], dict(batch_size=25))
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason='nvJPEG needs a GPU')
LOOSE = dict(cpu=1, cuda=2)   # nvJPEG scales up colours in a way of its own; how far off that may be is a guess until a GPU has run this
DEVICES = ['cpu', pytest.param('cuda', marks=CUDA)]

class Bytes(list):
    "Pictures as bytes."

def pictures(raws): return ImageSet('some', Bytes(raws), np.arange(len(raws)), list(range(len(raws))))

def batches(images, decode, device, recipe=RECIPE, workers=0, size=224, epoch=0, valid=None):
    dls = get_dls((images, valid), recipe, img_size=size, num_workers=workers, device=device, decode=decode)
    augment_dls(dls, recipe)
    loader = dls.train if valid is None else dls.valid
    loader.set_epoch(epoch)
    return [(x.cpu(), i, y) for x, i, y in loader], loader

def differences(raws, device, **told):
    "Mean difference in grey levels of each sample, between its two ways."
    found = []
    for (x, i, a), (y, j, b) in zip(batches(pictures(raws), 'device', device, **told)[0], batches(pictures(raws), 'cpu', 'cpu', **told)[0], strict=True):
        assert x.dtype == torch.uint8 and x.shape == y.shape and torch.equal(i, j) and torch.equal(a, b)
        found.append((x.float() - y).abs().mean((1, 2, 3)))
    return torch.cat(found).numpy()

@pytest.mark.parametrize('device', DEVICES)
def test_real_photographs(shared_data, device):
    with tarfile.open(shared_data/'imagenet_sample.tar') as tar: raws = [tar.extractfile(m).read() for m in tar if m.name.endswith('.JPEG')]
    found = differences(raws, device)
    print(f'{device}: {found.mean():.3f} grey levels on average, {found.max():.2f} in the worst of {len(found)} crops')
    assert len(found) == len(raws) and (found / LOOSE[device]).mean() < 1 and np.quantile(found, .99) < 2 * LOOSE[device] and found.max() < 5 * LOOSE[device]   # the worst were decoded at a half on the CPU

@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('mode, side', [('RGB', 400), ('RGB', 1203), ('RGB', 2401), ('L', 400), ('L', 1203), ('CMYK', 400)])
def test_made_photographs(device, mode, side):
    found = differences([photo(mode, turn, side) for turn in (1, 3, 6, 8)], device, recipe=override(RECIPE, dict(batch_size=2)))
    print(f'{mode} {side}: {found.mean():.3f} grey levels, worst {found.max():.2f}')
    assert found.max() < 2 * LOOSE[device]

@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('kind', ['progressive', 'restarts', 'full colour', 'a film behind it', 'camera notes', 'odd sides', 'one channel wanted'])
def test_kinds_of_jpegs(device, kind):
    options = {'progressive': dict(progressive=True), 'restarts': dict(restart_marker_blocks=4), 'full colour': dict(subsampling=0)}.get(kind, {})
    if kind == 'camera notes': options['exif'] = Image.Exif(); options['exif'][0x10f] = 'a camera'
    raws = [encoded(picture(i, 301, 455 if kind == 'odd sides' else 400), 'JPEG', quality=90, **options) + b'a film' * (kind == 'a film behind it') for i in range(4)]
    images = pictures(raws)
    if kind == 'one channel wanted': images = replace(images, mean=(.5,), std=(.5,))
    told = dict(recipe=override(RECIPE, dict(batch_size=2)), size=(96, 128))
    for (x, *_), (y, *_) in zip(batches(images, 'device', device, **told)[0], batches(images, 'cpu', 'cpu', **told)[0]): assert (x.float() - y).abs().mean() < 2 * LOOSE[device]

@pytest.mark.parametrize('augment', ['random', 'fixed', 'none'])
def test_every_crop_that_numbers_tell(augment):
    raws = [encoded(picture(i, 120, 160), 'JPEG') for i in range(8)]
    assert differences(raws, 'cpu', recipe=override(RECIPE, dict(batch_size=4, augment=augment)), size=64).max() < 2
    valid = pictures(raws)
    for size in (64, 256):
        one, two = (batches(pictures(raws), d, 'cpu', recipe=override(RECIPE, dict(batch_size=4)), size=size, valid=valid)[0] for d in ('device', 'cpu'))
        for (x, i, _), (y, j, _) in zip(one, two, strict=True): assert (x.float() - y).abs().mean() < 1 and torch.equal(i, j)

def mixed(folder):
    "JPEGs and other files, some of them turned, in two classes."
    exif = Image.Exif(); exif[0x112] = 6
    for i in range(120):
        place = folder/('odd' if i % 2 else 'even'); place.mkdir(parents=True, exist_ok=True)
        kind, options = ('PNG', {}) if i % 10 == 3 else ('JPEG', dict(exif=exif)) if i % 10 == 4 else ('JPEG', {})
        (place/f'{i:03}.{kind.lower()}').write_bytes(encoded(picture(i, 50, 64), kind, **options))
    return folder

def test_the_same_bytes_for_any_number_of_workers(tmp_path):
    images = data.folder_set(mixed(tmp_path/'photos'))
    runs = [batches(images, 'device', 'cpu', override(RECIPE, dict(repeats=2)), workers, 32, 3)[0] for workers in (0, 1, 2)]
    for a, *others in zip(*runs, strict=True):
        assert a[0].shape == (50, 3, 32, 32)
        for b in others: assert all(torch.equal(x, y) for x, y in zip(a, b))
    loader = get_dls((images, None), override(RECIPE, dict(repeats=2)), img_size=32, num_workers=0, device='cpu', decode='device').train
    loader.set_epoch(3, 2)   # a run that goes on
    for a, b in zip(runs[0][2:], loader, strict=True): assert all(torch.equal(x, y) for x, y in zip(a, b))

def test_processes_share_the_same_samples(tmp_path):
    images, recipe = data.folder_set(mixed(tmp_path/'photos')), override(RECIPE, dict(batch_size=20))
    whole = batches(images, 'device', 'cpu', recipe, size=32)[0]
    parts = []
    for part in (0, 1):
        loader = get_dls((images, None), recipe, img_size=32, bs=10, num_workers=0, device='cpu', decode='device').train
        loader.share(part, 2); parts.append([x for x, *_ in loader])
    for (x, *_), a, b in zip(whole, *parts, strict=True): assert torch.equal(x, torch.cat([a, b]))

def damaged(raw):
    "Without its first table of steps: what is wrong shows when its pixels are decoded."
    at = raw.index(b'\xff\xdb')
    return raw[:at] + raw[at + 2 + int.from_bytes(raw[at + 2:at + 4], 'big'):]

@pytest.mark.parametrize('repeats', [1, 2])
@pytest.mark.parametrize('workers', [0, 1])
def test_bad_files_have_the_same_stand_ins_and_are_named_once(tmp_path, capsys, workers, repeats, monkeypatch):
    folder = mixed(tmp_path/'photos')
    for name, cut in (('even/010.jpeg', 500), ('odd/011.jpeg', -1)): (folder/name).write_bytes((folder/name).read_bytes()[:cut])   # in its header, and amid its pixels
    (folder/'odd'/'021.jpeg').write_bytes(damaged((folder/'odd'/'021.jpeg').read_bytes()))
    assert data.device_jpeg((folder/'odd'/'021.jpeg').read_bytes(), (32, 32))   # the device is tried
    images, seen = data.folder_set(folder), {}
    monkeypatch.setattr(data.Loader, 'max_bad', .05)
    for d in ('cpu', 'device'):
        dls = get_dls((images, None), override(RECIPE, dict(batch_size=20, repeats=repeats)), img_size=32, num_workers=workers, device='cpu', decode=d)
        dls.train.record = tmp_path/f'{d}.csv'
        seen[d] = [b for epoch in (0, 1) for b in (dls.train.set_epoch(epoch), *dls.train)[1:]]   # the count stays the same
        said = capsys.readouterr().out
        assert said.count('could not read') == 3 and len(dls.train.bad) == 3 and 'note' not in said
    for (x, i, a), (y, j, b) in zip(*seen.values(), strict=True): assert torch.equal(i, j) and torch.equal(a, b) and (x.float() - y).abs().mean((1, 2, 3)).max() < 4
    listed = [sorted(row for row in csv.reader(open(tmp_path/f'{d}.csv'))) for d in seen]
    assert listed[0] == listed[1] and len(listed[0]) == 4

def test_no_cut_file_is_sent_and_no_good_one_is_lost():
    originals, rng = [d for d in seeds() if d[:2] == b'\xff\xd8'], np.random.default_rng(0)
    for n in range(400):
        how, raw = mutated(originals[n % len(originals)], originals, rng)
        good = isinstance(read(raw), torch.Tensor)
        try: sent = data.device_jpeg(raw, (64, 64))
        except Exception: sent = None; assert not good
        assert not (sent and how == 1 and not good)
        if good: assert sent and next(data.device_pixels([torch.frombuffer(bytearray(sent[0]), dtype=torch.uint8)], [sent[1:]], 3, 'cpu')) is not None

def refuse_on_device(monkeypatch, *raws):
    "A device that takes no batch with these files in it."
    plain, refused = torchvision.io.decode_jpeg, {data.bare_jpeg(r)[0] for r in raws if r[:2] == b'\xff\xd8'}
    def refusing(files, *args):
        if any(bytes(f.numpy()) in refused for f in files): raise RuntimeError('not this one')
        return plain(files, *args)
    monkeypatch.setattr(torchvision.io, 'decode_jpeg', refusing)

def test_what_only_the_cpu_can_decode_is_told_and_read(tmp_path, capsys, monkeypatch):
    folder = mixed(tmp_path/'photos'); images = data.folder_set(folder)
    refuse_on_device(monkeypatch, *(images.data(i) for i in range(0, 120, 7)))
    got, loader = batches(images, 'device', 'cpu', size=32)
    want, _ = batches(images, 'cpu', 'cpu', size=32)
    for (x, *_), (y, *_) in zip(got, want, strict=True): assert (x.float() - y).abs().mean() < 2
    said = capsys.readouterr().out
    assert said.count('note: cpu cannot decode') == 1 and 'the CPU does; others like it are not told' in said and not loader.bad

def test_no_more_memory_than_a_call_may_take(monkeypatch):
    raws, calls, plain = [encoded(picture(i, 100, 100), 'JPEG') for i in range(9)], [], torchvision.io.decode_jpeg
    monkeypatch.setattr(data, 'MAX_AT_ONCE', 30_000)
    monkeypatch.setattr(torchvision.io, 'decode_jpeg', lambda files, *args: (calls.append(len(files)), plain(files, *args))[1])
    batches(pictures(raws), 'device', 'cpu', override(RECIPE, dict(batch_size=9)), size=32)
    assert sum(calls[1:]) == 9 and max(calls) <= 3   # the first is `get_dls`'s trial
    def full(files, *args): raise torch.OutOfMemoryError('full')
    monkeypatch.setattr(torchvision.io, 'decode_jpeg', full)
    with pytest.raises(torch.OutOfMemoryError): list(data.device_pixels([torch.zeros(3, dtype=torch.uint8)] * 2, [(1, 1)] * 2, 3, 'cpu'))

def test_a_training_that_stops_early_leaves_no_thread(tmp_path):
    images, before = data.folder_set(mixed(tmp_path/'photos')), threading.active_count()
    loader = get_dls((images, None), RECIPE, img_size=32, num_workers=0, device='cpu', decode='device').train
    next(iter(loader))
    assert threading.active_count() == before

NANO = '--model', 'mae_vit_nano_patch4_32', '--set', 'amp=False'

def test_pretraining(forked, tmp_path):
    mixed(tmp_path/'photos')
    s = data.folder_set(tmp_path/'photos')
    pack({'train': Part(Files(s.items, tmp_path), s.labels, s.classes)}, tmp_path/'packed', read=read_image)
    words = *NANO, '--epochs', '1', '--set', 'warmup_epochs=0', '--bs', '20', '--num-workers', '1', '--device', 'cpu'
    runs = {}
    for name, source, more in (('cpu', 'packed', ()), ('one', 'packed', ('--decode', 'device')), ('two', 'packed', ('--decode', 'device', '--num-workers', '0'))):
        got = forked('mae-pretrain', source, *words, *more, '--out', name)
        assert got.code == 0, got.err
        runs[name] = (tmp_path/name/'metrics.csv').read_text()
    assert runs['one'] == runs['two'] != runs['cpu']
    assert json.loads((tmp_path/'one'/'config.json').read_text())['decode'] == 'device' and 'decode' not in json.loads((tmp_path/'cpu'/'config.json').read_text())
    loss = lambda name: float(list(csv.DictReader(io.StringIO(runs[name])))[0]['train_loss'])
    assert abs(loss('one') - loss('cpu')) < .01 * loss('cpu')
    said = forked('mae-pretrain', '--resume', 'cpu', '--decode', 'device')
    assert said.code == 2 and '--decode has no effect with --resume cpu' in said.line
    said = forked('mae-pretrain', 'packed', *words, '--out', 'one', '--resume', 'auto')
    assert said.code == 2 and "one was begun with decode = 'device', and now decode = None" in said.line

def test_the_loader_is_measured(forked, tmp_path):
    mixed(tmp_path/'photos')
    got = forked('mae-bench', 'loader', '--data', 'photos', '--model', NANO[1], '--decode', 'device', '--bs', '8', '--device', 'cpu', '--num-workers', '0', '--steps', '3', '--json', 'found.json')
    assert got.code == 0, got.err
    found = json.loads((tmp_path/'found.json').read_text())
    assert found['decode'] == 'device' and found['ours'] > 0

def test_what_cannot_be_done_is_told_in_one_line(forked, tmp_path):
    mixed(tmp_path/'photos')
    few = '--max-steps', '1', '--bs', '20', '--device', 'cpu', '--num-workers', '0', '--decode'
    for words, what in ((('mae-finetune', 'photos', '--from-scratch', *NANO, '--recipe', 'finetune', *few, 'device'), 'RandAugment needs the pixels on the CPU: use --decode cpu'),
                        (('mae-pretrain', 'photos', *NANO, '--set', 'augment=jitter', *few, 'device'), 'colour jitter needs the pixels on the CPU: use --decode cpu'),
                        (('mae-pretrain', 'fashion', *few, 'device'), '--decode device has no effect on fashion'),
                        (('mae-pretrain', 'photos', *NANO, *few, 'gpu'), "unknown decode 'gpu'")):
        said = forked(*words, '--out', f'run-{len(what)}')
        assert said.code == 2 and what in said.line, said.err

def test_the_benchmark_still_works(tmp_path, capsys):
    place = tmp_path/'train'/'few'; place.mkdir(parents=True)
    for i in range(8): (place/f'{i}.JPEG').write_bytes(encoded(picture(i, 50, 64), 'JPEG'))
    with tarfile.open(tmp_path/'some.tar', 'w') as tar: tar.add(tmp_path/'train', 'some/train')
    from bench import feed
    found = feed.main([str(tmp_path/'some.tar'), *'--device cpu --model mae_vit_nano_patch4_32 --bs 4 --steps 2 --workers 1 --json'.split(), str(tmp_path/'found.json')])
    assert [r['row'] for r in found['rows']] == ['synthetic', *(f'{x}, decoded {where}' for x in ('original JPEGs', 'of 320 pixels') for where in ('by the workers', 'on cpu'))]
    assert all(r['images_per_second'] > 0 and 0 <= r['data_wait'] < 1 for r in found['rows']) and 'goal, 95% of the synthetic rate with 16 cores' in capsys.readouterr().out
    assert json.loads((tmp_path/'found.json').read_text())['rows'] == found['rows']
