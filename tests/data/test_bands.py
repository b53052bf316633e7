"""Pictures of many bands and 16 bits: the numbers of the file, whatever its layout, through crops to the model."""
import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_image

from mae_nb.base.errors import MissingPackage, UsageError
from mae_nb.data.bands import band_layout, read_bands, read_picture
from mae_nb.data.channels import with_channels
from mae_nb.data.check import check_source, keep_stats
from mae_nb.data.crops import eval_transform
from mae_nb.data.datasets import folder_set, load_source, read_source
from mae_nb.data.images import read_image, standardize
from mae_nb.data.loader import get_dls
from mae_nb.data.packing import pack_source
from mae_nb.training.presets import RECIPES
from mae_nb.training.recipes import override

tifffile = pytest.importorskip('tifffile')
LAYOUTS = st.fixed_dictionaries(dict(
    planarconfig=st.sampled_from(['separate', 'contig', None]), tile=st.sampled_from([None, (16, 16), (32, 16)]),
    compression=st.sampled_from([None, 'zlib', 'lzw', 'packbits', 'zstd']), predictor=st.booleans(),
    byteorder=st.sampled_from('<>'), bigtiff=st.booleans(), rowsperstrip=st.sampled_from([None, 1, 7])))
PRETRAIN = override(RECIPES['pretrain'], dict(batch_size=4))


def scene(seed, bands=13, rows=40, columns=48):
    "Bands of 16 bits: mixtures of a photograph's colours, made, in shares of reflectance times 10,000."
    rng = np.random.default_rng(seed)
    top, left = rng.integers(0, 300, 2)
    photo = load_sample_image('china.jpg')[top:top + rows, left:left + columns].astype(float)
    weights = np.random.default_rng(7).dirichlet([1, 1, 1], bands) * np.linspace(4, 40, bands)[:, None]
    return (np.einsum('hwk,ck->chw', photo, weights) + 1000).round().astype(np.uint16)


def write_scene(file, pixels, **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    as_saved = np.moveaxis(pixels, 0, -1) if options.get('planarconfig') == 'contig' else pixels
    tifffile.imwrite(file, as_saved, photometric='minisblack', **options)


def write_scenes(root, bands=13, count=8):
    "A training and a validation set, half of the files planar, half in compressed tiles."
    kinds = dict(planarconfig='separate'), dict(planarconfig='contig', tile=(16, 16), compression='zlib')
    for part, n in (('train', count), ('val', 4)):
        for i in range(n):
            file = root/part/('even' if i % 2 == 0 else 'odd')/f'{i}.tif'
            write_scene(file, scene(i + 100 * (part == 'val'), bands), **kinds[i // 2 % 2])
    return root


@settings(max_examples=60, deadline=None)
@given(LAYOUTS, st.integers(1, 15), st.integers(1, 40), st.integers(1, 40), st.sampled_from([np.uint8, np.uint16]))
def test_every_layout_holds_the_same_numbers(layout, bands, rows, columns, dtype):
    pixels = np.random.default_rng(bands + rows).integers(0, np.iinfo(dtype).max + 1, (bands, rows, columns), dtype)
    options = {k: v for k, v in layout.items() if v not in (None, False)}
    if layout['tile']:
        options.pop('rowsperstrip', None)
    if layout['compression'] in (None, 'packbits'):
        options.pop('predictor', None)
    as_saved = pixels
    if layout['planarconfig'] == 'contig' and bands > 1:
        as_saved = np.moveaxis(pixels, 0, -1)
    elif bands == 1:
        options.pop('planarconfig', None)
        as_saved = pixels[0]
    file = io.BytesIO()
    tifffile.imwrite(file, as_saved, photometric='minisblack', metadata=None, **options)
    read = read_bands(file.getvalue(), bands, 8 * pixels.itemsize)
    assert read.numpy().dtype == dtype and (read.numpy() == pixels).all()


def test_grey_and_colour_are_as_pil_has_them(tmp_path):
    deep = scene(0)[0]
    Image.fromarray(deep).save(tmp_path/'grey.tif')
    Image.fromarray(deep).save(tmp_path/'grey.png')
    for name in ('grey.tif', 'grey.png'):
        assert (read_picture(tmp_path/name, 1, bits=16)[0].numpy() == np.array(Image.open(tmp_path/name))).all()
    colours = load_sample_image('flower.jpg')[:50, :60]
    Image.fromarray(colours).save(tmp_path/'colour.tif', compression='tiff_lzw')
    data = (tmp_path/'colour.tif').read_bytes()
    assert read_bands(data, 3, 8).equal(read_image(io.BytesIO(data)))


def test_bands_are_not_lost_by_a_reader_of_pictures(tmp_path):
    "PIL reads the first of compressed planes as a grey picture, and says nothing."
    write_scene(tmp_path/'planes.tif', scene(0), planarconfig='separate', compression='zlib')
    assert np.array(Image.open(tmp_path/'planes.tif')).ndim == 2
    with pytest.raises(ValueError, match='a TIFF of 13 bands of 16-bit integer pixels: .* with in_chans=13'):
        read_image(tmp_path/'planes.tif')


@pytest.mark.parametrize('options, pixels, message', [
    (dict(), np.zeros((13, 8, 8), np.float32), 'floating-point pixels have no agreed range'),
    (dict(), np.zeros((13, 8, 8), np.int16), 'signed pixels have no agreed range'),
    (dict(photometric='minisblack', planarconfig='contig'), np.zeros((2, 8, 8, 13), np.uint16), 'one page for each'),
    (dict(photometric='palette', colormap=np.zeros((3, 256), np.uint16)), np.zeros((8, 8), np.uint8), 'a palette')])
def test_what_is_no_measurement_is_refused(options, pixels, message):
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, **options)
    with pytest.raises(ValueError, match=message):
        read_bands(file.getvalue())


def test_pages_of_several_sizes_are_refused_and_reduced_ones_left_out():
    sizes, overview = io.BytesIO(), io.BytesIO()
    with tifffile.TiffWriter(sizes) as tiff:
        tiff.write(scene(0)[0], metadata=None)
        tiff.write(scene(0)[0, ::2, ::2], metadata=None)
    with pytest.raises(ValueError, match='pages of several sizes'):
        read_bands(sizes.getvalue())
    with tifffile.TiffWriter(overview) as tiff:
        options = dict(photometric='minisblack', planarconfig='separate', metadata=None)
        tiff.write(scene(0), **options)
        tiff.write(scene(0)[:, ::2, ::2], subfiletype=1, **options)
    assert (read_bands(overview.getvalue(), 13, 16).numpy() == scene(0)).all()


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=1, max_size=40), st.floats(0, 1), st.sampled_from(['tif', 'npy']))
def test_damage_is_an_error_or_harmless(noise, place, kind):
    file = io.BytesIO()
    if kind == 'npy':
        np.save(file, scene(0))
    else:
        tifffile.imwrite(file, scene(0), photometric='minisblack', planarconfig='separate', compression='zlib')
    data = bytearray(file.getvalue())
    at = int(place * (len(data) - 1))
    data[at:at + len(noise)] = noise
    try:
        read = read_bands(bytes(data), 13, 16)
    except (ValueError, MissingPackage) as e:
        assert str(e)
        return
    assert read.dtype == torch.uint16 and len(read) == 13


def test_a_missing_codec_is_named(monkeypatch):
    file = io.BytesIO()
    tifffile.imwrite(file, scene(0), photometric='minisblack', planarconfig='separate', compression='lzw')

    def fail(*args, **kwargs):
        raise ValueError("<COMPRESSION.LZW: 5> requires the 'imagecodecs' package")
    monkeypatch.setattr(tifffile.TiffPageSeries, 'asarray', fail)
    with pytest.raises(MissingPackage, match='compressed by LZW needs another package: pip install imagecodecs'):
        read_bands(file.getvalue())


# ---- sets -----------------------------------------------------------------------------------------------------------
def test_a_set_has_the_channels_of_its_files_and_the_statistics_of_its_pixels(tmp_path, capsys):
    write_scenes(tmp_path/'scenes')
    train, valid = load_source(tmp_path/'scenes')
    assert (train.in_chans, train.bits, train.has_stats, valid.bits) == (13, 16, False, 16)
    assert '13 channels of 16 bits' in capsys.readouterr().out
    with pytest.raises(UsageError, match='13 channels of 16 bits, whose mean and deviation are not known'):
        get_dls((train, valid), PRETRAIN, img_size=32, num_workers=0, device='cpu')
    assert '13 channels, 16 bits' in keep_stats(tmp_path/'scenes', 0).replace('of 13 channels', '13 channels')
    train, valid = load_source(tmp_path/'scenes')
    pixels = np.stack([scene(i) for i in range(8)]).astype(np.float64) / 65_535
    np.testing.assert_allclose(train.mean, pixels.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(train.std, pixels.std(axis=(0, 2, 3)), rtol=1e-12)
    assert valid.mean == train.mean   # nothing of the validation images is known
    (tmp_path/'scenes'/'train'/'odd'/'7.tif').unlink()
    assert any('counted over 8 images, and there are 7' in note for note in read_source(tmp_path/'scenes')[0].notes)


def test_no_value_is_cut_to_eight_bits_on_the_way_to_the_model(tmp_path):
    write_scenes(tmp_path/'scenes')
    keep_stats(tmp_path/'scenes', 0)
    loaders = [get_dls(tmp_path/'scenes', PRETRAIN, img_size=(40, 48), num_workers=n, device='cpu') for n in (0, 2)]
    train, valid = loaders[0].train, loaders[0].valid
    imgs, index, _ = next(iter(valid))
    assert imgs.dtype == torch.uint16
    order = [int(valid.dataset.images.file(i)[-5]) for i in index.tolist()]
    assert all((imgs[n].numpy() == scene(100 + i)).all() for n, i in enumerate(order))   # whole pictures, untouched
    images = train.dataset.images
    x = standardize(torch.stack([images.read(i) for i in range(8)]), images.mean, images.std)
    assert abs(x.mean()) < 1e-4 and abs(x.std(correction=0) - 1) < 1e-3 and len(x[:, 0].unique()) > 256
    batches = [[batch[0] for batch in loader.train] for loader in loaders]
    assert all(a.equal(b) for a, b in zip(*batches, strict=True))   # workers make no difference
    small = eval_transform(imgs[0], (16, 16))
    assert small.dtype == torch.uint16 and 1000 <= small.int().min() and small.int().max() <= 12_000


def test_arrays_are_a_set_where_there_are_no_pictures(tmp_path):
    for i in range(4):
        (tmp_path/'a').mkdir(exist_ok=True)
        np.save(tmp_path/'a'/f'{i}.npy', np.moveaxis(scene(i, 5), 0, -1))
    images = folder_set(tmp_path)
    assert (len(images), images.in_chans, images.bits) == (4, 5, 16) and (images.read(2).numpy() == scene(2, 5)).all()
    Image.new('RGB', (8, 8)).save(tmp_path/'a'/'picture.png')
    assert len(folder_set(tmp_path)) == 1   # as ever: a set of pictures, and what lies beside them is counted


@pytest.mark.parametrize('options, message', [
    (dict(in_chans=12), 'has 13 channels, and only 1 or 3 can be made 12'),
    (dict(bits=8), 'has 16 bits a channel, and 8 are wanted'), (dict(bits=12), '`bits` must be 8 or 16, got 12'),
    (dict(mean=(.1, .2)), '`mean` has 2 numbers and the images have 13 channels')])
def test_other_channels_are_one_line(tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        with_channels(read_source(write_scenes(tmp_path, count=4)), **options)


def test_pages_and_deep_grey_are_read_when_they_are_asked_for(tmp_path):
    for i in range(3):
        write_scene(tmp_path/'pages'/f'{i}.tif', scene(i, 5), metadata=None)
        Image.fromarray(scene(i)[0]).save(tmp_path/'pages'/f'{i}.png')
    for i in range(3):
        (tmp_path/'grey').mkdir(exist_ok=True)
        (tmp_path/'pages'/f'{i}.png').rename(tmp_path/'grey'/f'{i}.png')
    pages, _ = with_channels(read_source(tmp_path/'pages'), in_chans=5, bits=16, mean=.1, std=.1)
    assert pages.has_stats and (pages.read(1).numpy() == scene(1, 5)).all()
    with pytest.raises(UsageError, match='0.png: .*has 1 channels of 16 bits, and 5 channels are wanted'):
        with_channels(read_source(tmp_path/'grey'), in_chans=5, bits=16)
    grey, _ = with_channels(read_source(tmp_path/'grey'), in_chans=1, bits=16)
    assert not grey.has_stats and (grey.read(1)[0].numpy() == scene(1)[0]).all()
    keep_stats(tmp_path/'grey', 0, in_chans=1, bits=16)
    kept, _ = read_source(tmp_path/'grey')
    assert (kept.in_chans, kept.bits) == (1, 16) and (kept.read(2)[0].numpy() == scene(2)[0]).all()


@pytest.mark.parametrize('recipe, fields, message', [
    ('finetune', {}, 'RandAugment .turn it off: randaugment=..'),
    ('pretrain', dict(augment='jitter'), 'colour jitter .choose another')])
def test_what_needs_colours_is_refused(tmp_path, recipe, fields, message):
    keep_stats(write_scenes(tmp_path, count=4), 0)
    wanted = override(RECIPES[recipe], dict(batch_size=4) | fields)
    with pytest.raises(UsageError, match=f'13 channels of 16 bits, and {message}'):
        get_dls(tmp_path, wanted, img_size=32, num_workers=0, device='cpu')
    with pytest.raises(UsageError, match="decode='device' has no effect on .* 13 channels of 16 bits: leave it out"):
        get_dls(tmp_path, PRETRAIN, img_size=32, num_workers=0, device='cpu', decode='device')


def test_a_packed_set_keeps_its_bands(tmp_path):
    write_scenes(tmp_path/'scenes', count=4)
    pack_source(tmp_path/'scenes', tmp_path/'packed', num_workers=0)
    train, _ = read_source(tmp_path/'packed')
    assert (train.in_chans, train.bits) == (13, 16) and (train.read(0).numpy() == scene(0)).all()


def test_the_check_reads_bands_and_reports_georeferences(tmp_path):
    place = [(33550, 'd', 3, (10., 10., 0.), True)]
    for i in range(3):
        write_scene(tmp_path/f'{i}.tif', scene(i), planarconfig='separate', extratags=place)
    (tmp_path/'3.tif').write_bytes((tmp_path/'0.tif').read_bytes()[:9000])
    part = check_source(tmp_path, 0, 32)['parts']['train']
    assert part['georeferenced'] == 3 and len(part['bad']) == 1 and part['smallest'] == (40, 48) and not part['dark']
    assert band_layout((tmp_path/'0.tif').read_bytes()).georeferenced
