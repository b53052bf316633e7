"""Pictures that are cut, damaged or hostile: each is read whole or named, and nothing hangs."""
import csv
import io
import re
import signal
import tarfile
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from mae_nb.data.datasets import ImageSet, folder_set
from mae_nb.data.images import read_image, to_rgb_or_grey
from mae_nb.data.loader import Loader, Samples

KINDS = {'JPEG': [{}, dict(progressive=True), dict(subsampling=0, quality=95), dict(restart_marker_blocks=4)], 'PNG': [{}], 'WEBP': [{}, dict(lossless=True)],
         'GIF': [{}], 'BMP': [{}], 'TIFF': [{}, dict(compression='tiff_lzw'), dict(compression='tiff_deflate')]}

@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings(): warnings.simplefilter('ignore'); yield

def picture(seed=0, rows=60, cols=90):
    "A smooth picture with some noise."
    rng, y, x = np.random.default_rng(seed), *np.mgrid[:rows, :cols]
    waves = [128 + 90 * np.sin(x / rng.uniform(5, 30) + y / rng.uniform(5, 30)) for _ in range(3)]
    return Image.fromarray((np.stack(waves, -1) + rng.normal(0, 8, (rows, cols, 3))).clip(0, 255).astype(np.uint8))

def encoded(im, kind, **options):
    im.save(out := io.BytesIO(), kind, **options)
    return out.getvalue()

def seeds(): return [encoded(picture(i), kind, **o) for i, (kind, options) in enumerate(KINDS.items()) for o in options]

def read(data, seconds=5):
    "The picture or the error; more than so many seconds is a failure."
    def late(*_): raise TimeoutError
    before = signal.signal(signal.SIGALRM, late); signal.alarm(seconds)
    try: return read_image(io.BytesIO(data))
    except TimeoutError: pytest.fail(f'more than {seconds} s for {len(data)} bytes')
    except Exception as e: return e
    finally: signal.alarm(0); signal.signal(signal.SIGALRM, before)

def mutated(data, others, rng):
    "Bits flipped, bytes cut, another file's header, or grown."
    data, how = bytearray(data), rng.integers(5)
    if how == 0:
        for i in rng.integers(0, len(data), rng.integers(1, 20)): data[i] ^= 1 << rng.integers(8)
    elif how == 1: del data[rng.integers(0, len(data)):]
    elif how == 2:
        n = rng.integers(2, min(200, len(data))); data[:n] = others[rng.integers(len(others))][:n]
    elif how == 3:
        i = rng.integers(0, len(data)); data[i:i] = rng.integers(0, 256, rng.integers(1, 2000), dtype=np.uint8).tobytes()
    else:
        i = rng.integers(0, len(data)); del data[i:i + rng.integers(1, 500)]
    return how, bytes(data)

def check_mutated(count, originals):
    rng, named = np.random.default_rng(0), 0
    whole = [read(d) for d in originals]
    for n in range(count):
        k = n % len(originals)
        how, data = mutated(originals[k], originals, rng)
        got = read(data)
        if isinstance(got, Exception): named += 1; assert str(got).strip() or type(got).__name__; continue
        assert got.dtype == torch.uint8 and got.ndim == 3 and got.shape[0] == 3
        if how == 1: assert torch.equal(got, whole[k]), f'a cut picture was taken: {originals[k][:8]} at {len(data)} of {len(originals[k])}'
    assert count * .4 < named < count
    return named

def test_mutated_images(): check_mutated(300, seeds())

@pytest.mark.slow
def test_many_mutated_images(shared_data):
    with tarfile.open(shared_data/'imagenet_sample.tar') as tar:
        photos = [tar.extractfile(m).read() for m in tar if m.name.endswith('.JPEG') and m.size < 60_000][:15]
    named = check_mutated(2000, seeds() + photos)
    print(f'2,000 mutated files, {named} named')

@pytest.mark.parametrize('options', KINDS['JPEG'], ids=str)
@pytest.mark.parametrize('mode', ['RGB', 'L', 'CMYK'])
def test_a_cut_jpeg_is_named_wherever_it_was_cut(options, mode):
    data = encoded(picture().convert(mode), 'JPEG', **options)
    assert isinstance(read(data), torch.Tensor)
    end = data.rindex(b'\xff\xd9')
    scans = [m.start() for m in re.finditer(rb'\xff\xda', data)]
    for at in {*range(2, end, 37), *range(end - 12, end), *scans, *(s + 12 for s in scans if s + 12 < end)}:
        for tail in (b'', b'\xff\xd9'):
            assert isinstance(read(data[:at] + tail), ValueError | OSError), (at, tail)

@pytest.mark.parametrize('options', KINDS['JPEG'], ids=str)
def test_harmless_faults_cost_no_file(options):
    data = encoded(picture(), 'JPEG', **options)
    whole, scan = read(data), data.index(b'\xff\xda')
    jfif, sos = bytearray(data), bytearray(data)
    jfif[data.index(b'JFIF') + 5] = 2
    if not options.get('progressive'): sos[scan + 4 + data[scan + 4] * 2 + 1:scan + 4 + data[scan + 4] * 2 + 4] = bytes(3)
    for odd in (data + b'a film', data[:-2] + b'stray' + data[-2:], bytes(jfif), bytes(sos)):
        got = read(odd)
        assert isinstance(got, torch.Tensor), got
        assert torch.equal(got, whole)

@pytest.mark.parametrize('mode', ['RGB', 'L', 'CMYK'])
@pytest.mark.parametrize('turn', [1, 3, 6, 8])
@pytest.mark.parametrize('in_chans', [1, 3])
def test_pixels_equal_pils(mode, turn, in_chans):
    exif = Image.Exif(); exif[0x112] = turn
    data = encoded(picture().convert(mode), 'JPEG', exif=exif)
    theirs = np.asarray(to_rgb_or_grey(Image.open(io.BytesIO(data)), in_chans)).reshape(*((90, 60) if turn > 4 else (60, 90)), in_chans)
    ours = read_image(io.BytesIO(data), in_chans).permute(1, 2, 0).numpy()
    assert ours.shape == theirs.shape and abs(ours.astype(int) - theirs).mean() <= 2

def test_real_photographs_are_all_read(shared_data):
    with tarfile.open(shared_data/'imagenet_sample.tar') as tar:
        files = [tar.extractfile(m).read() for m in tar if m.name.endswith('.JPEG')]
    assert len(files) == 500
    for data in files[::5]:
        theirs = np.asarray(to_rgb_or_grey(Image.open(io.BytesIO(data)), 3))
        assert abs(read_image(io.BytesIO(data)).permute(1, 2, 0).numpy().astype(int) - theirs).mean() <= 2

@pytest.mark.parametrize('workers', [0, 1])
def test_a_runs_bad_files_are_listed_once(tmp_path, capsys, workers):
    folder = tmp_path/'photos'; folder.mkdir()
    for i in range(300): picture(i, 12, 12).save(folder/f'{i:03}.png')
    (folder/'007.png').write_bytes(b''); (folder/'100.png').write_bytes(encoded(picture(), 'PNG')[:900])
    for _ in range(2):   # the second is a run that goes on
        loader = Loader(Samples(folder_set(folder), (12, 12)), 50, num_workers=workers)
        loader.record = tmp_path/'bad_samples.csv'
        for epoch in range(2): loader.set_epoch(epoch); list(loader)
    rows = list(csv.reader(open(loader.record)))
    assert rows[0] == ['file', 'reason'] and sorted(r[0] for r in rows[1:]) == [str(folder/'007.png'), str(folder/'100.png')]
    assert all(r[1] for r in rows[1:]) and capsys.readouterr().out.count('could not read') == 4

def test_a_bomb_is_named_before_memory_is_taken(tmp_path):
    Image.new('1', (20_000, 20_000)).save(tmp_path/'bomb.png')
    with pytest.raises(ValueError, match='more than 89,478,485'): read_image(tmp_path/'bomb.png')
    samples = Samples(ImageSet('one', [tmp_path/'bomb.png', tmp_path/'good.png']), (8, 8))
    picture().save(tmp_path/'good.png')
    assert samples[0, 0][3][0][0] == 0

def test_check_lists_what_a_run_would_stumble_on(forked, photos):
    assert forked('mae-check', photos, '--num-workers', 0).code == 0
    (photos/'odd'/'001.png').write_bytes(b'')
    said = forked('mae-check', photos, '--num-workers', 1, '--json', 'found.json')
    assert said.code == 1 and '001.png: ValueError: the file is empty' in said.out
    assert forked('mae-check', 'nowhere').code == 2
