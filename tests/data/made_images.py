"""Images that the tests of data make: files of many kinds, damaged ones, folders of them."""
import io
import signal
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from mae_nb.data.datasets import ImageSet
from mae_nb.data.images import read_image
from mae_nb.data.loader import get_dls

KINDS = {
    'JPEG': [{}, dict(progressive=True), dict(subsampling=0, quality=95), dict(restart_marker_blocks=4)],
    'PNG': [{}],
    'WEBP': [{}, dict(lossless=True)],
    'GIF': [{}],
    'BMP': [{}],
    'TIFF': [{}, dict(compression='tiff_lzw'), dict(compression='tiff_deflate')],
}

class Bytes(list):
    "Image files as bytes, as the items of an `ImageSet`."

def made_image(seed=0, rows=60, cols=90):
    "A smooth image with some noise."
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:rows, :cols]
    waves = [128 + 90 * np.sin(x / rng.uniform(5, 30) + y / rng.uniform(5, 30)) for _ in range(3)]
    pixels = np.stack(waves, -1) + rng.normal(0, 8, (rows, cols, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))

def encode(im, kind='JPEG', **options):
    "The bytes of an image file."
    out = io.BytesIO()
    im.save(out, kind, **options)
    return out.getvalue()

def turned(orientation):
    "EXIF notes with an orientation, from 1 = upright to 8."
    exif = Image.Exif()
    exif[0x112] = orientation
    return exif

def made_photograph(mode, turn, side, quality=92):
    "A soft image with edges, as a JPEG of some mode with an orientation."
    rng = np.random.default_rng(side)
    y, x = np.mgrid[:side, :side * 4 // 3] / side
    waves = [128 + 90 * np.sin(rng.uniform(3, 40) * x + rng.uniform(3, 40) * y) for _ in range(3)]
    pixels = np.stack(waves, -1)
    pixels[side // 3:side // 2, side // 4:side // 2] = 220, 30, 60
    im = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode)
    return encode(im, quality=quality, exif=turned(turn))

def files_of_all_kinds():
    return [encode(made_image(i), kind, **o) for i, (kind, options) in enumerate(KINDS.items()) for o in options]

def sample_files(shared_data):
    "The JPEGs of the ImageNet sample, in order."
    with tarfile.open(shared_data/'imagenet_sample.tar') as tar:
        return [tar.extractfile(m).read() for m in tar if m.name.endswith('.JPEG')]

def image_set(raws, labels=False):
    "A set of image files in memory; each is a class of its own if labels are wanted."
    numbers = list(range(len(raws)))
    return ImageSet('some', Bytes(raws), np.arange(len(raws)) if labels else None, numbers if labels else [])

def mixed_folder(folder):
    "120 JPEGs and other files, some of them turned, in two classes."
    for i in range(120):
        place = folder/('odd' if i % 2 else 'even')
        place.mkdir(parents=True, exist_ok=True)
        kind = 'PNG' if i % 10 == 3 else 'JPEG'
        options = dict(exif=turned(6)) if i % 10 == 4 else {}
        (place/f'{i:03}.{kind.lower()}').write_bytes(encode(made_image(i, 50, 64), kind, **options))
    return folder

def read_in_time(data, seconds=5):
    "The image or the error; more than so many seconds is a failure."
    def stop(*_):
        raise TimeoutError
    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        return read_image(io.BytesIO(data))
    except TimeoutError:
        pytest.fail(f'more than {seconds} s for {len(data)} bytes')
    except Exception as e:
        return e
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)

CUT = 1   # of the five kinds of damage

def damage(data, others, rng):
    "The kind of damage, and the bytes: some flipped, the end cut, another file's header, bytes added or removed."
    data, kind = bytearray(data), rng.integers(5)
    if kind == 0:
        for i in rng.integers(0, len(data), rng.integers(1, 20)):
            data[i] ^= 1 << rng.integers(8)
    elif kind == CUT:
        del data[rng.integers(0, len(data)):]
    elif kind == 2:
        n = rng.integers(2, min(200, len(data)))
        data[:n] = others[rng.integers(len(others))][:n]
    elif kind == 3:
        i = rng.integers(0, len(data))
        data[i:i] = rng.integers(0, 256, rng.integers(1, 2000), dtype=np.uint8).tobytes()
    else:
        i = rng.integers(0, len(data))
        del data[i:i + rng.integers(1, 500)]
    return kind, bytes(data)

def loaded_batches(source, recipe, workers=0, seed=0, epochs=2):
    "All batches of some epochs."
    loader = get_dls(source, recipe, img_size=24, seed=seed, num_workers=workers, device='cpu').train
    found = []
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        found += [tuple(t.clone() for t in batch) for batch in loader]
    return found

def equal_batches(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for p, q in zip(a, b) for x, y in zip(p, q))
