"""The crops that a loader makes are those of PIL and torchvision, and are the same bytes each time."""
import io
from collections import Counter

import numpy as np
import pytest
import torch
from made_images import image_set, made_photograph, sample_files
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from mae_nb.base.keyed import key, nth_uniform
from mae_nb.data.crops import Crop, crop_box, scaled_size
from mae_nb.data.datasets import ImageSet
from mae_nb.data.images import to_rgb_or_grey
from mae_nb.data.loader import Samples, collate

SIZE = 224, 224
SEED = 3

def keys(epoch, index, seed=SEED, repeat=0):
    return lambda purpose: key(seed, epoch, index, purpose, repeat)

def by_torchvision(raw, k, crop, turn=1):
    "The same box by PIL and torchvision (bicubic, antialiased), and the scale at which ours was decoded."
    opened = Image.open(io.BytesIO(raw))
    im = to_rgb_or_grey(opened, 3)
    whole = im.height, im.width
    factor = 1 if opened.mode == 'CMYK' else crop.shrink(whole, k, SIZE)
    less = scaled_size(whole, factor)
    top, left, rows, columns = (factor * x for x in crop_box(less, crop.crop_scale, k('crop')))
    if turn in (3, 8):   # the half-filled last row of a file that is turned comes first
        top -= factor * less[0] - im.height
    if turn in (3, 6):
        left -= factor * less[1] - im.width
    bottom, right = min(top + rows, im.height), min(left + columns, im.width)
    top, left = max(top, 0), max(left, 0)
    sample = TF.resized_crop(im, top, left, bottom - top, right - left, list(SIZE), InterpolationMode.BICUBIC)
    if nth_uniform(k('flip'), 0) < .5:
        sample = TF.horizontal_flip(sample)
    return TF.pil_to_tensor(sample), factor

def differences(raws, epochs=1, turns=None):
    "Mean difference of each crop in grey levels, and how many images were decoded at 1/1, 1/2, ... scale."
    crop, means, scales = Crop(), [], Counter()
    samples = Samples(image_set(raws), SIZE, SEED, crop)
    for epoch in range(epochs):
        for i, raw in enumerate(raws):
            ours, again = samples[epoch, i][0], samples[epoch, i][0]
            assert ours.dtype == torch.uint8 and torch.equal(ours, again)
            theirs, factor = by_torchvision(raw, keys(epoch, i), crop, turns[i] if turns else 1)
            means.append((ours.float() - theirs).abs().mean().item())
            scales[factor] += 1
    return np.array(means), scales

def test_real_photographs(shared_data):
    raws = sample_files(shared_data)
    means, scales = differences(raws)
    print(f'{means.mean():.3f} grey levels on average, {means.max():.2f} in the worst of {len(raws)} crops, '
          f'decoded at {dict(scales)}')
    assert means.mean() < .2 and means.max() < 5 and scales[2] and scales[1] > .9 * len(raws)

CASES = [('RGB', 400), ('RGB', 1203), ('RGB', 2401), ('L', 400), ('L', 1203), ('CMYK', 400), ('CMYK', 1203)]

@pytest.mark.parametrize('mode, side', CASES)
def test_made_photographs(mode, side):
    turns = 1, 3, 6, 8
    means, scales = differences([made_photograph(mode, turn, side) for turn in turns], 2, turns)
    print(f'{mode} {side}: {means.mean():.3f} grey levels, worst {means.max():.2f}, {dict(scales)}')
    assert means.mean() < 2
    assert (max(scales) > 1) == (side > 1000 and mode != 'CMYK')

def test_repeats_are_crops_of_their_own_and_the_first_is_the_plain_one(photos):
    images = ImageSet('photos', sorted(photos.rglob('*.png')))
    one, three = (collate(Samples(images, (24, 24), 5, Crop(), repeats).__getitems__([(2, 7), (2, 100)]))
                  for repeats in (1, 3))
    imgs, index, *_ = three
    assert index.tolist() == [7] * 3 + [100] * 3
    assert torch.equal(imgs[::3], one[0]) and len({img.numpy().tobytes() for img in imgs}) == 6
    for repeat in range(3):
        assert torch.equal(imgs[repeat], Crop()(images.read(7), keys(2, 7, 5, repeat), (24, 24)))

def test_a_bad_file_s_stand_in_is_repeated_and_told_once(photos):
    (photos/'odd'/'005.png').write_bytes(b'')
    images = ImageSet('photos', sorted(photos.rglob('*.png')))
    number = [f.name for f in images.items].index('005.png')
    first, second = Samples(images, (24, 24), 5, Crop(), 2).visit(0, number)
    assert (len(first[3]), len(second[3])) == (1, 0)
    assert not torch.equal(first[0], second[0])
