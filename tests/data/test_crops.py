"""The crops that a loader makes are those of PIL and torchvision, and are the same bytes each time."""
import io
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from mae_nb.data.crops import Crop, crop_box
from mae_nb.data.datasets import ImageSet
from mae_nb.data.images import to_rgb_or_grey
from mae_nb.data.loader import Samples, collate
from mae_nb.base.keyed import key, nth_uniform

SIZE = 224, 224

class Files(list):
    "Pictures as bytes."

def theirs(raw, k, crop, turn=1):
    "The same box by PIL and torchvision (bicubic, antialiased), and by how much ours was decoded smaller."
    im = to_rgb_or_grey(Image.open(io.BytesIO(raw)), 3)
    f = 1 if Image.open(io.BytesIO(raw)).mode == 'CMYK' else crop.shrink(k, SIZE, im.height, im.width)
    less = -(-im.height // f), -(-im.width // f)
    t, l, h, w = (f * x for x in crop_box(less, crop.crop_scale, k('crop')))
    if turn in (3, 8): t -= f * less[0] - im.height   # the half-filled last row of a file that is turned comes first
    if turn in (3, 6): l -= f * less[1] - im.width
    box = max(t, 0), max(l, 0), min(t + h, im.height), min(l + w, im.width)
    out = TF.resized_crop(im, *box[:2], box[2] - box[0], box[3] - box[1], list(SIZE), InterpolationMode.BICUBIC)
    return TF.pil_to_tensor(TF.horizontal_flip(out) if nth_uniform(k('flip'), 0) < .5 else out), f

def differences(raws, epochs=1, turns=None):
    "Mean difference of each crop in grey levels, and how often pictures were decoded at 1/1, 1/2, ... of their size."
    crop, found, scales = Crop(), [], Counter()
    samples = Samples(ImageSet('some', Files(raws)), SIZE, 3, crop)
    for epoch in range(epochs):
        for i, raw in enumerate(raws):
            ours, again = samples[epoch, i][0], samples[epoch, i][0]
            assert ours.dtype == torch.uint8 and torch.equal(ours, again)
            want, f = theirs(raw, lambda purpose, i=i, epoch=epoch: key(3, epoch, i, purpose), crop, turns[i] if turns else 1)
            found.append((ours.float() - want).abs().mean().item()); scales[f] += 1
    return np.array(found), scales

def test_real_photographs(shared_data):
    with tarfile.open(shared_data/'imagenet_sample.tar') as tar: raws = [tar.extractfile(m).read() for m in tar if m.name.endswith('.JPEG')]
    found, scales = differences(raws)
    print(f'{found.mean():.3f} grey levels on average, {found.max():.2f} in the worst of {len(raws)} crops, decoded at {dict(scales)}')
    assert found.mean() < .2 and found.max() < 5 and scales[2] and scales[1] > .9 * len(raws)

def photo(mode, turn, side, quality=92):
    "A soft picture with edges, as a JPEG of some mode that says how to turn it."
    rng, (y, x) = np.random.default_rng(side), np.mgrid[:side, :side * 4 // 3] / side
    a = np.stack([128 + 90 * np.sin(rng.uniform(3, 40) * x + rng.uniform(3, 40) * y) for _ in range(3)], -1)
    a[side // 3:side // 2, side // 4:side // 2] = 220, 30, 60
    exif = Image.Exif(); exif[0x112] = turn
    Image.fromarray(a.clip(0, 255).astype(np.uint8)).convert(mode).save(out := io.BytesIO(), 'JPEG', quality=quality, exif=exif)
    return out.getvalue()

@pytest.mark.parametrize('mode, side', [('RGB', 400), ('RGB', 1203), ('RGB', 2401), ('L', 400), ('L', 1203), ('CMYK', 400), ('CMYK', 1203)])
def test_made_photographs(mode, side):
    turns = 1, 3, 6, 8
    found, scales = differences([photo(mode, turn, side) for turn in turns], 2, turns)
    print(f'{mode} {side}: {found.mean():.3f} grey levels, worst {found.max():.2f}, {dict(scales)}')
    assert found.mean() < 2 and (max(scales) > 1) == (side > 1000 and mode != 'CMYK')

def test_repeats_are_crops_of_their_own_and_the_first_is_the_plain_one(photos):
    images = ImageSet('photos', sorted(photos.rglob('*.png')))
    plain, three = (Samples(images, (24, 24), 5, Crop(), n) for n in (1, 3))
    a, b = (collate(s.__getitems__([(2, 7), (2, 100)])) for s in (plain, three))
    assert b[1].tolist() == [7] * 3 + [100] * 3 and torch.equal(b[0][::3], a[0]) and len({x.numpy().tobytes() for x in b[0]}) == 6
    for n, crop in enumerate(b[0][:3]): assert torch.equal(crop, Crop()(images.read(7), lambda purpose, n=n: key(5, 2, 7, purpose, n), (24, 24)))

def test_a_bad_file_s_stand_in_is_repeated_and_told_once(photos):
    (photos/'odd'/'005.png').write_bytes(b'')
    images = ImageSet('photos', sorted(photos.rglob('*.png')))
    at = [f.name for f in images.items].index('005.png')
    got = Samples(images, (24, 24), 5, Crop(), 2).visit(0, at)
    assert [len(bad) for *_, bad in got] == [1, 0] and not torch.equal(got[0][0], got[1][0])
