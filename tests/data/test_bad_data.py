"""Images that are cut, damaged or hostile: each is read whole or named, and nothing hangs."""
import csv
import io
import re
import warnings

import numpy as np
import pytest
import torch
from made_images import (
    CUT,
    KINDS,
    damage,
    encode,
    files_of_all_kinds,
    made_image,
    read_in_time,
    sample_files,
    turned,
)
from PIL import Image

from mae_nb.data.datasets import ImageSet, folder_set
from mae_nb.data.images import read_image, to_rgb_or_grey
from mae_nb.data.loader import Loader, Samples

MODES = ['RGB', 'L', 'CMYK']

@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield

def check_damaged(count, originals):
    "Damage files in many ways; the number of those that were named."
    rng, named = np.random.default_rng(0), 0
    whole = [read_in_time(data) for data in originals]
    for n in range(count):
        i = n % len(originals)
        kind, data = damage(originals[i], originals, rng)
        img = read_in_time(data)
        if isinstance(img, Exception):
            named += 1
            assert str(img).strip() or type(img).__name__
            continue
        assert img.dtype == torch.uint8 and img.ndim == 3 and img.shape[0] == 3
        if kind == CUT:
            equal = torch.equal(img, whole[i])
            assert equal, f'a cut image was taken: {originals[i][:8]} at {len(data)} of {len(originals[i])}'
    assert count * .4 < named < count
    return named

def test_damaged_images():
    check_damaged(300, files_of_all_kinds())

@pytest.mark.slow
def test_many_damaged_images(shared_data):
    photos = [data for data in sample_files(shared_data) if len(data) < 60_000][:15]
    named = check_damaged(2000, files_of_all_kinds() + photos)
    print(f'2,000 damaged files, {named} named')

@pytest.mark.parametrize('options', KINDS['JPEG'], ids=str)
@pytest.mark.parametrize('mode', MODES)
def test_a_cut_jpeg_is_named_wherever_it_was_cut(options, mode):
    data = encode(made_image().convert(mode), **options)
    assert isinstance(read_in_time(data), torch.Tensor)
    end = data.rindex(b'\xff\xd9')
    scans = [m.start() for m in re.finditer(rb'\xff\xda', data)]
    behind_scans = [s + 12 for s in scans if s + 12 < end]
    for at in {*range(2, end, 37), *range(end - 12, end), *scans, *behind_scans}:
        for tail in (b'', b'\xff\xd9'):
            assert isinstance(read_in_time(data[:at] + tail), ValueError | OSError), (at, tail)

@pytest.mark.parametrize('options', KINDS['JPEG'], ids=str)
def test_harmless_faults_cost_no_file(options):
    data = encode(made_image(), **options)
    whole, scan = read_in_time(data), data.index(b'\xff\xda')
    other_jfif, other_scan = bytearray(data), bytearray(data)
    other_jfif[data.index(b'JFIF') + 5] = 2
    if not options.get('progressive'):
        parameters = scan + 4 + data[scan + 4] * 2 + 1
        other_scan[parameters:parameters + 3] = bytes(3)
    for file in (data + b'a film', data[:-2] + b'stray' + data[-2:], bytes(other_jfif), bytes(other_scan)):
        img = read_in_time(file)
        assert isinstance(img, torch.Tensor), img
        assert torch.equal(img, whole)

@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('turn', [1, 3, 6, 8])
@pytest.mark.parametrize('in_chans', [1, 3])
def test_pixels_equal_pils(mode, turn, in_chans):
    data = encode(made_image().convert(mode), exif=turned(turn))
    size = (90, 60) if turn > 4 else (60, 90)
    theirs = np.asarray(to_rgb_or_grey(Image.open(io.BytesIO(data)), in_chans)).reshape(*size, in_chans)
    ours = read_image(io.BytesIO(data), in_chans).permute(1, 2, 0).numpy()
    assert ours.shape == theirs.shape and abs(ours.astype(int) - theirs).mean() <= 2

def test_real_photographs_are_all_read(shared_data):
    files = sample_files(shared_data)
    assert len(files) == 500
    for data in files[::5]:
        theirs = np.asarray(to_rgb_or_grey(Image.open(io.BytesIO(data)), 3))
        ours = read_image(io.BytesIO(data)).permute(1, 2, 0).numpy()
        assert abs(ours.astype(int) - theirs).mean() <= 2

@pytest.mark.parametrize('workers', [0, 1])
def test_a_runs_bad_files_are_listed_once(tmp_path, capsys, workers):
    folder = tmp_path/'photos'
    folder.mkdir()
    for i in range(300):
        made_image(i, 12, 12).save(folder/f'{i:03}.png')
    bad = folder/'007.png', folder/'100.png'
    bad[0].write_bytes(b'')
    bad[1].write_bytes(encode(made_image(), 'PNG')[:900])
    for _ in range(2):   # the second is a run that is resumed
        loader = Loader(Samples(folder_set(folder), (12, 12)), 50, num_workers=workers)
        loader.record = tmp_path/'bad_samples.csv'
        for epoch in range(2):
            loader.set_epoch(epoch)
            list(loader)
    header, *rows = csv.reader(open(loader.record))
    assert header == ['file', 'reason'] and sorted(name for name, _ in rows) == [str(f) for f in bad]
    assert all(reason for _, reason in rows)
    assert capsys.readouterr().out.count('could not read') == 4

def test_a_bomb_is_named_before_memory_is_taken(tmp_path):
    bomb, good = tmp_path/'bomb.png', tmp_path/'good.png'
    Image.new('1', (20_000, 20_000)).save(bomb)
    with pytest.raises(ValueError, match='more than 89,478,485'):
        read_image(bomb)
    made_image().save(good)
    *_, bad = Samples(ImageSet('one', [bomb, good]), (8, 8))[0, 0]
    assert bad[0][0] == 0

def test_check_lists_what_a_run_would_stumble_on(forked, photos):
    assert forked('mae-check', photos, '--num-workers', 0).code == 0
    (photos/'odd'/'001.png').write_bytes(b'')
    said = forked('mae-check', photos, '--num-workers', 1, '--json', 'report.json')
    assert said.code == 1 and '001.png: ValueError: the file is empty' in said.out
    assert forked('mae-check', 'nowhere').code == 2
