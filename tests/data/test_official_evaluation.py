"""The pixels and the metric of the official evaluation: torchvision's transforms on PIL's images, timm's accuracy."""
import io
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_images import Bytes, encode, made_image, sample_files
from PIL import Image
from torchvision.transforms import CenterCrop as TorchvisionCrop
from torchvision.transforms import Compose, InterpolationMode, Resize

from mae_nb.data.crops import eval_crop, eval_spec
from mae_nb.data.datasets import ImageSet
from mae_nb.data.loader import Samples, get_dls
from mae_nb.model.classifier import create_classifier
from mae_nb.tasks.finetune import finetune_learner
from mae_nb.training.presets import RECIPES
from mae_nb.training.recipes import override

SIZES = st.sampled_from([224, 384, 448])
SIDES = st.integers(32, 1024)


def official(size):
    "As `build_transform` of the official code has it, for evaluation, before the pixels become floats."
    share = 224 / 256 if size <= 224 else 1.
    return Compose([Resize(int(size / share), interpolation=InterpolationMode.BICUBIC), TorchvisionCrop(size)])


@cache
def noise():
    return np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), dtype=np.uint8)


def difference(im, img, size):
    theirs = np.asarray(official(size)(im)).reshape(size, size, -1)
    ours = eval_crop(img, None, (size, size)).permute(1, 2, 0).numpy()
    return np.abs(ours.astype(int) - theirs).max()


@settings(max_examples=25, deadline=None)
@given(rows=SIDES, columns=SIDES, size=SIZES, grey=st.booleans())
def test_every_size_gives_the_official_pixels(rows, columns, size, grey):
    pixels = noise()[:rows, :columns]
    im = Image.fromarray(pixels).convert('L' if grey else 'RGB')
    img = torch.from_numpy(np.array(im).reshape(rows, columns, -1)).permute(2, 0, 1)
    assert difference(im, img, size) <= 1


@settings(max_examples=300, deadline=None)
@given(rows=SIDES, columns=SIDES, size=SIZES)
def test_every_size_is_scaled_to_the_official_size(rows, columns, size):
    "By the size alone, so many can be tried."
    shape = Resize(256 if size == 224 else size)(torch.empty(1, rows, columns, device='meta')).shape[1:]
    assert eval_spec((rows, columns), (size, size), 224 / 256 if size == 224 else 1.)[4:6] == shape


@pytest.mark.parametrize('rows, columns', [(427, 640), (640, 427), (500, 229), (500, 375), (224, 224), (918, 350)])
def test_sizes_that_rounding_gets_wrong(rows, columns):
    pixels = noise()[:rows, :columns]
    img = torch.from_numpy(pixels).permute(2, 0, 1)
    assert difference(Image.fromarray(pixels), img, 224) == 0


@settings(max_examples=60, deadline=None)
@given(rows=SIDES, columns=SIDES, height=st.integers(64, 448), width=st.integers(64, 448))
def test_a_sample_that_is_no_square_lies_inside_the_scaled_image(rows, columns, height, width):
    spec = eval_spec((rows, columns), (height, width))
    assert spec.height >= height and spec.width >= width
    assert 0 <= spec.down <= spec.height - height and 0 <= spec.right <= spec.width - width


@pytest.mark.parametrize('size', [224, 384])
def test_decoded_photographs_give_the_official_pixels(shared_data, size):
    raws = sample_files(shared_data)[::50]
    samples = Samples(ImageSet('photos', Bytes(raws)), (size, size), transform=eval_crop)
    for i, raw in enumerate(raws):
        theirs = np.asarray(official(size)(Image.open(io.BytesIO(raw)).convert('RGB')))
        ours = samples[0, i][0].permute(1, 2, 0).numpy()
        assert np.abs(ours.astype(int) - theirs).max() <= 1


def test_accuracy_is_timms_over_the_whole_set():
    "Also where the last batch is smaller than the others."
    from timm.utils import accuracy
    raws = [encode(made_image(i, 40, 52), 'PNG') for i in range(22)]
    labels = np.arange(22) % 7
    images = ImageSet('made', Bytes(raws), labels, [str(i) for i in range(7)])
    recipe = override(RECIPES['finetune'], dict(batch_size=10, mixup=0., cutmix=0.))
    dls = get_dls((images, images), recipe, img_size=28, bs=10, num_workers=0, device='cpu')
    torch.manual_seed(0)
    learn = finetune_learner(dls, create_classifier('mae_vit_nano_patch4_28', 7, img_size=28, in_chans=3), recipe)
    measured = [float(v) for v in learn.validate()]
    learn.model.eval()
    with torch.no_grad():
        mean, std = (torch.tensor(v)[:, None, None] for v in (images.mean, images.std))
        batches = [(((imgs.float() / 255) - mean) / std, y) for imgs, _, y in dls.valid]
        outputs = torch.cat([learn.model(x) for x, _ in batches])
    top1, top5 = (a.item() / 100 for a in accuracy(outputs, torch.cat([y for _, y in batches]), topk=(1, 5)))
    assert 0 < top5 < 1
    assert any(abs(v - top1) < 1e-6 for v in measured) and any(abs(v - top5) < 1e-6 for v in measured)
