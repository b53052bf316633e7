"""Segmentation: what is refused in one line, other people's weights and head, runs that end in mid-epoch, processes."""
import json
import os
import signal

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mae_nb.base.errors import UsageError
from mae_nb.base.keyed import key
from mae_nb.model.encoder import Encoder
from mae_nb.tasks.masks import IGNORE, CropPair, WholePair, open_masks, read_mask
from mae_nb.tasks.pixels import class_ious, count_pixels
from mae_nb.tasks.segment import SegmentOptions, segment, segment_setup
from mae_nb.tasks.segmenters import create_segmenter, load_segmenter, segmenter_from, slide, window_starts
from mae_nb.weights.building import load_encoder
from mae_nb.weights.loading import save_model

TINY = dict(name='mae_vit_nano_patch4_28', in_chans=3, dim=16, depth=2, num_heads=2, img_size=16)


def write_pairs(folder, n=12, size=(18, 24)):
    "Dark pictures with a bright box, and its mask."
    for part in ('images', 'masks'):
        (folder/part).mkdir(parents=True, exist_ok=True)
    for i in range(n):
        draw = np.random.default_rng(i)
        pixels, mask = draw.integers(0, 80, (*size, 3), dtype=np.uint8), np.zeros(size, np.uint8)
        top, left = draw.integers(0, 8, 2)
        mask[top:top + 9, left:left + 9] = 1
        pixels[mask > 0] += 120
        Image.fromarray(pixels).save(folder/'images'/f'{i:02}.png')
        Image.fromarray(mask).save(folder/'masks'/f'{i:02}.png')
    return folder


def write_encoder(file):
    torch.manual_seed(0)
    options = {k: v for k, v in TINY.items() if k != 'name'}
    save_model(Encoder(patch_size=4, config=TINY, **options), file)
    return file


@pytest.fixture
def pairs(tmp_path):
    return write_pairs(tmp_path/'pairs')


@pytest.fixture
def encoder(tmp_path):
    return write_encoder(tmp_path/'encoder.safetensors')


def small_run(pairs, encoder, out, **changes):
    common = dict(recipe='segment_small', epochs=2, bs=4, head='linear', num_workers=0, device='cpu', save_every=1)
    return SegmentOptions(str(pairs), weights=str(encoder), out=str(out), **common | changes)


# ---- one line for what cannot work -----------------------------------------------------------------------------------

def damage(pairs, kind):
    "Make one kind of mistake in a folder; the words that its error must have."
    mask, picture = pairs/'masks'/'03.png', pairs/'images'/'03.png'
    if kind == 'size':
        Image.new('L', (24, 17)).save(mask)
        return '03.png has 18 x 24 pixels (rows x columns) and its mask 17 x 24: they must be the same'
    if kind == 'turned':   # a viewer shows the picture upright, its mask is not turned
        exif = Image.Exif()
        exif[0x112] = 6
        Image.open(picture).save(picture.with_suffix('.jpg'), exif=exif)
        picture.unlink()
        return '03.jpg has 24 x 18 pixels (rows x columns) and its mask 18 x 24'
    if kind == 'missing':
        mask.unlink()
        return '03.png has no mask: expected'
    if kind == 'label':
        (pairs/'classes.txt').write_text('ground\n')
        return 'holds the number 1, and'
    if kind == 'colour':
        Image.new('RGB', (24, 18)).save(mask)
        return '03.png holds colours (RGB) and no class numbers'
    if kind == 'broken':
        mask.write_bytes(mask.read_bytes()[:40])
        return '03.png cannot be read as a mask'
    (pairs/'masks').rename(pairs/'labels')
    return 'has no folders images and masks (or annotations) side by side'


KINDS = ('size', 'turned', 'missing', 'label', 'colour', 'broken', 'layout')


@pytest.mark.parametrize('kind', KINDS)
def test_a_wrong_folder_is_one_line(forked, pairs, encoder, tmp_path, kind):
    words = damage(pairs, kind)
    done = forked('mae-segment', pairs, encoder, '--recipe', 'segment_small', '--out', tmp_path/'run')
    assert done.code == 2
    assert words in done.line
    assert not (tmp_path/'run').exists()


def test_flags_without_meaning_are_errors(forked, pairs, encoder):
    done = forked('mae-segment', pairs, encoder, '--predict', '--epochs', 3)
    assert done.code == 2
    assert '--epochs has no meaning with --predict' in done.line
    done = forked('mae-segment', pairs, encoder, '--evaluate')
    assert done.code == 2
    assert 'holds no segmentation model' in done.line


# ---- masks -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('mode', ['P', 'L', '1', 'I;16'])
def test_numbers_come_back_from_every_kind_of_file(tmp_path, mode):
    numbers = np.random.default_rng(0).integers(0, 2 if mode == '1' else 7, (9, 11), dtype=np.uint8)
    if mode == 'P':
        im = Image.fromarray(numbers)
        im.putpalette(np.random.default_rng(1).integers(0, 256, 768).tolist())   # colours say nothing
    else:
        im = Image.fromarray(dict(L=numbers, **{'1': numbers > 0, 'I;16': numbers.astype(np.uint16)})[mode])
    im.save(tmp_path/'mask.png')
    assert np.array_equal(read_mask(tmp_path/'mask.png'), numbers)


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(3, 70), columns=st.integers(3, 70), height=st.integers(4, 40), width=st.integers(4, 40),
       scale=st.sampled_from([(.3, .5), (.5, 2.), (1., 1.), (2., 6.)]), index=st.integers(0, 10**6))
def test_a_crop_never_makes_a_class(rows, columns, height, width, scale, index):
    "Whatever the sizes: only numbers of the mask and `IGNORE`, and at factors from 1 nothing is ignored."
    sample = torch.zeros(2, rows, columns, dtype=torch.uint8)
    sample[1, rows // 2:], sample[1, :, columns // 2:] = 3, 9
    crop = CropPair((.5,), scale)
    result = crop(sample, lambda purpose: key(0, 0, index, purpose), (height, width))
    assert result.shape == (2, height, width)
    assert set(result[1].unique().tolist()) <= {0, 3, 9, IGNORE}
    assert (result[1] != IGNORE).any()
    if scale[0] >= 1:
        assert (result[1] != IGNORE).all()
    shown = WholePair((.5,))(sample, None, (height, width))
    assert set(shown[1].unique().tolist()) <= {0, 3, 9, IGNORE}


@settings(max_examples=40, deadline=None)
@given(whole=st.integers(1, 300), side=st.integers(1, 60), share=st.floats(.05, 1))
def test_windows_cover_every_pixel(whole, side, share):
    side = min(side, whole)
    starts = window_starts(whole, side, max(round(side * share), 1))
    seen = {pixel for start in starts for pixel in range(start, start + side)}
    assert seen == set(range(whole))


def test_ious_are_those_of_scikit_learn():
    from sklearn.metrics import jaccard_score
    draw = np.random.default_rng(0)
    truth, answers = draw.integers(0, 5, 400), draw.integers(0, 5, 400)
    table = count_pixels(torch.from_numpy(answers), torch.from_numpy(truth), 5)
    assert np.allclose(class_ious(table), jaccard_score(truth, answers, average=None))


# ---- models ----------------------------------------------------------------------------------------------------------

def test_uper_net_of_transformers_is_a_head(tmp_path):
    pytest.importorskip('transformers')
    torch.manual_seed(0)
    model = create_segmenter(num_classes=4, head='upernet', **TINY).eval()
    imgs = torch.randn(2, 3, 16, 16)
    save_model(model, tmp_path/'model.safetensors')
    with torch.no_grad():
        assert load_segmenter(tmp_path/'model.safetensors')(imgs).equal(model(imgs))
        assert slide(model, torch.randn(3, 20, 30)).shape == (4, 20, 30)
    assert model.step_flops() > 0


def test_weights_of_timm_start_a_segmentation(tmp_path):
    "Positions are fitted to larger pictures, and the encoder's answers are timm's."
    import timm
    torch.manual_seed(0)
    theirs = timm.create_model('vit_tiny_patch16_224', num_classes=0, img_size=32, depth=2).eval()
    torch.save(theirs.state_dict(), tmp_path/'timm.pth')
    encoder, _ = load_encoder(tmp_path/'timm.pth', num_heads=3, name='mae_vit_tiny_patch16')
    model, report = segmenter_from(encoder, 5, head='linear')
    assert not report.missing
    imgs = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        ours = model.eval().encoder(imgs)
        assert torch.allclose(ours, theirs.forward_features(imgs), atol=1e-4)
    larger, _ = load_encoder(tmp_path/'timm.pth', num_heads=3, name='mae_vit_tiny_patch16', img_size=(48, 64))
    assert segmenter_from(larger, 5)[0](torch.randn(1, 3, 48, 64)).shape == (1, 5, 48, 64)


# ---- runs ------------------------------------------------------------------------------------------------------------

class KillAfter(Callback):
    "End this process without a word, as the system does when memory is short."
    order = 69
    def after_batch(self):
        if self.training and self.train_iter == 4:
            self.learn.checkpoints.wait()
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='forks processes, which Windows cannot')
def test_a_killed_run_resumes_to_the_same_bytes(pairs, encoder, tmp_path):
    from support import exit_code, fork

    def run_and_die():
        learn = segment_setup(small_run(pairs, encoder, tmp_path/'cut'))
        learn.add_cb(KillAfter())
        learn.fit_recipe()

    segment(small_run(pairs, encoder, tmp_path/'whole'))
    assert exit_code(fork(run_and_die, tmp_path/'said.txt')) == -signal.SIGKILL
    assert len((tmp_path/'cut'/'metrics.csv').read_text().splitlines()) < 3
    encoder.unlink()   # the checkpoint has all weights
    segment(SegmentOptions(resume=str(tmp_path/'cut'), num_workers=0))
    for name in ('metrics.csv', 'model.safetensors', 'results.json', 'classes.csv'):
        assert (tmp_path/'whole'/name).read_bytes() == (tmp_path/'cut'/name).read_bytes(), name
    assert json.loads((tmp_path/'whole'/'results.json').read_text())['miou'] > 0


def test_a_run_notices_that_a_mask_has_changed(pairs, encoder, tmp_path):
    options = small_run(pairs, encoder, tmp_path/'run', max_steps=1)
    segment_setup(options).fit_recipe()
    from mae_nb.base.files import unlock_folder
    unlock_folder(tmp_path/'run')
    (pairs/'masks'/'05.png').write_bytes((pairs/'masks'/'05.png').read_bytes() + b'more')
    with pytest.raises(UsageError, match='1 file changed'):
        segment(SegmentOptions(resume=str(tmp_path/'run'), num_workers=0))


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='forks processes, which Windows cannot')
def test_two_processes_measure_what_one_measures(pairs, encoder, tmp_path):
    "The same pictures, crops and draws: the rows agree to rounding, and the counts of pixels to the last one."
    from ranks import results, spread

    def run():
        learn = segment(small_run(pairs, encoder, tmp_path/'two', epochs=1))
        return learn.final_record

    alone = segment(small_run(pairs, encoder, tmp_path/'one', epochs=1)).final_record
    both = results(spread(2, run, tmp_path/'said', seconds=900))
    assert both[0] == both[1]
    assert np.allclose(alone, both[0], rtol=1e-4)
    one, two = (json.loads((tmp_path/name/'results.json').read_text()) for name in ('one', 'two'))
    assert one['samples'] == two['samples'] == 1
    assert abs(one['pixel_accuracy'] - two['pixel_accuracy']) < .02


def test_ade20k_s_own_layout_is_read(tmp_path):
    "`annotations`, `training` and `validation`, `objectInfo150.txt`, and 0 for nothing."
    for part in ('training', 'validation'):
        write_pairs(tmp_path/part, 3)
        for ours, theirs in (('images', 'images'), ('masks', 'annotations')):
            place = tmp_path/'ade'/theirs/part
            place.parent.mkdir(parents=True, exist_ok=True)
            (tmp_path/part/ours).rename(place)
    (tmp_path/'ade'/'objectInfo150.txt').write_text('Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t0.1\t1\t1\t1\twall\n'
                                                    '2\t0.1\t1\t1\t1\tbuilding, edifice\n')
    with pytest.raises(UsageError, match='two classes are needed'):
        open_masks(tmp_path/'ade', ignore=[0])
    train, valid = open_masks(tmp_path/'ade')
    assert train.classes == ['wall', 'building, edifice']
    assert (len(train), len(valid)) == (3, 3)
    assert set(np.unique(train.mask(0))) == {0, 1}
