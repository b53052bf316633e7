"""Packs of uncompressed pixels: files that everybody reads, read here without PIL and with the same outcome.

`pytest -m slow tests/data/test_uncompressed.py` compares the crops of 500 ImageNet files with those of PIL's reading.
"""
import io
import re
from functools import partial

import numpy as np
import pytest
import torch
from made_images import Bytes, encode, made_image, made_photograph, sample_files
from PIL import Image

from mae_nb.data import bands
from mae_nb.data.bands import read_picture
from mae_nb.data.crops import Crop
from mae_nb.data.datasets import ImageSet, load_source
from mae_nb.data.images import read_image
from mae_nb.data.loader import Samples
from mae_nb.data.shards import reencode


def stored(raw, side=64):
    return reencode(raw, side, None)

def outcome(read):
    "Pixels, or the error in words."
    try:
        return read()
    except Exception as e:
        return f'{type(e).__name__}: {e}'

def same(a, b):
    return a == b if isinstance(a, str) or isinstance(b, str) else torch.equal(a, b)

@pytest.mark.parametrize('mode, magic', [('RGB', b'P6'), ('L', b'P5')])
@pytest.mark.parametrize('rows, columns', [(90, 133), (133, 90), (64, 64), (20, 31), (1, 5)])
def test_any_reader_finds_the_scaled_image(mode, magic, rows, columns):
    im = made_image(rows, rows, columns).convert(mode)
    raw = stored(encode(im, 'PNG'))
    im.thumbnail((64, 64), Image.LANCZOS)
    assert raw[:2] == magic and np.array_equal(np.asarray(Image.open(io.BytesIO(raw))), np.asarray(im))
    for in_chans in (1, 3):
        ours, by_pil = (read(io.BytesIO(raw), in_chans) for read in (read_picture, read_image))
        assert torch.equal(ours, by_pil) and ours.stride() == by_pil.stride()
        ours[:] = 0   # a tensor of its own
    assert torch.equal(read_picture(io.BytesIO(raw)), read_image(io.BytesIO(raw)))

def test_a_small_jpeg_keeps_its_pixels_and_a_turned_one_is_upright():
    small, photo = encode(made_image(1, 20, 30)), made_photograph('RGB', 6, 60)
    assert torch.equal(read_picture(io.BytesIO(stored(small))), read_image(io.BytesIO(small)))
    assert read_picture(io.BytesIO(stored(photo, 100))).shape == read_image(io.BytesIO(photo)).shape == (3, 80, 60)

ODD = [b'P6\n3 2\n255\n' + bytes(18), b'P6\n3 2\n255\n' + bytes(17), b'P6\n3 2\n255\n' + bytes(19), b'P6\n0 2\n255\n',
       b'P6 3 2 255\n' + bytes(18), b'P6\n3 2\n100\n' + bytes(18), b'P6\n3 2\n65535\n' + bytes(36), b'P6\n3 2\n255\n',
       b'P6\n# a note\n3 2\n255\n' + bytes(18), b'P5\n9000 2\n255\n' + bytes(18000), b'P6\n999999 999999\n255\n', b'P6',
       b'P5\n3 2\n255\n' + bytes(range(6)), b'P4\n3 2\n' + bytes(2), b'P6\n3 2\n255\n\n' + bytes(18), b'P7\n3 2\n255\n']

@pytest.mark.parametrize('in_chans', [1, 3])
@pytest.mark.parametrize('raw', ODD, ids=range(len(ODD)))
def test_odd_files_of_this_kind_are_read_as_by_pil(raw, in_chans):
    assert same(*(outcome(partial(read, io.BytesIO(raw), in_chans)) for read in (read_picture, read_image)))

def test_the_limits_of_all_files_hold(monkeypatch):
    raw = stored(encode(made_image(1, 60, 90)))
    monkeypatch.setattr('mae_nb.data.images.MAX_PIXELS', 1000)
    assert 'more than 1,000' in outcome(lambda: read_picture(io.BytesIO(raw)))

def test_a_pack_of_pixels(photos, forked):
    pytest.importorskip('pyarrow')
    words = 'photos', 'pixels', '--max-side', '24', '--num-workers', '0', '--per-shard', '50'
    assert forked('mae-pack', *words, '--uncompressed').code == 0
    said = forked('mae-pack', *words)
    assert said.code == 2 and 'with other options (quality)' in said.line
    plain, packed = (load_source(photos.parent/name)[0] for name in (photos.name, 'pixels'))
    assert packed.labels.tolist() == plain.labels.tolist() and packed.in_chans == plain.in_chans
    for i in (0, 77):
        im = Image.fromarray(plain.read(i).permute(1, 2, 0).numpy())
        im.thumbnail((24, 24), Image.LANCZOS)
        assert np.array_equal(packed.read(i).permute(1, 2, 0).numpy(), np.asarray(im))
    for wrong, message in ((('photos', 'x', '--uncompressed'), r'--uncompressed needs --max-side'),
                           ((*words, '--uncompressed', '--quality', '80'), r'--quality has no meaning with')):
        said = forked('mae-pack', *wrong)
        assert said.code == 2 and re.search(message, said.line), said.line

@pytest.mark.slow
def test_crops_of_imagenet_files(shared_data, monkeypatch):
    images = ImageSet('pixels', Bytes(stored(raw, 320) for raw in sample_files(shared_data)))
    samples = Samples(images, (224, 224), 3, Crop())
    ours = [samples[0, i][0] for i in range(len(images))]
    monkeypatch.setattr(bands, '_stored_pixels', lambda *args: None)
    assert all(torch.equal(img, samples[0, i][0]) for i, img in enumerate(ours))
