"""Nothing given disappears: files, labels and pixels are used, reported or refused."""
import errno
import io
import os
import pickle
import shutil
import string
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_images import encode, made_image
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from mae_nb.base.errors import UsageError
from mae_nb.data.archives import parquet_parts
from mae_nb.data.check import check_source, check_table
from mae_nb.data.datasets import ImageSet, folder_set, folder_sets, load_source, read_source, split_labelled
from mae_nb.data.formats import image_endings
from mae_nb.data.images import read_image
from mae_nb.data.inventory import Names, Paths, is_hidden, read_labels, take_inventory
from mae_nb.data.loader import get_dls
from mae_nb.data.packing import pack_source
from mae_nb.training.presets import RECIPES

JPEG = encode(made_image(0, 16, 16))
WORDS = st.text(string.ascii_lowercase + '-.', min_size=1, max_size=4).filter(lambda w: w not in ('.', '..'))
FILES = st.tuples(WORDS, st.sampled_from(['.jpg', '.PNG', '.txt', '.psd', '']))


def fill(folder, *names, data=JPEG):
    for name in names:
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        (folder/name).write_bytes(data)
    return folder


def printed(capsys):
    return capsys.readouterr().out


# ---- files ----------------------------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.lists(WORDS, max_size=2), FILES), max_size=12))
def test_every_file_is_an_image_or_counted(given_files):
    folder = Path(tempfile.mkdtemp())
    try:
        for places, (stem, ending) in given_files:
            try:
                (folder/'/'.join(places)).mkdir(parents=True, exist_ok=True)
                (folder/'/'.join([*places, stem + ending])).touch()
            except OSError:   # a file is where the folder should be, or the reverse
                pass
        everything = sorted(f.relative_to(folder) for f in folder.rglob('*'))
        seen = [f for f in everything if not any(is_hidden(part) for part in f.parts)]
        under_hidden = [f for f in everything if is_hidden(f.name) and not any(map(is_hidden, f.parts[:-1]))]
        files = [f for f in seen if (folder/f).is_file()]
        wanted = [f for f in files if f.suffix.lower() in ('.jpg', '.png') and os.path.splitext(f)[1]]
        try:
            found = take_inventory(folder, frozenset({'.jpg', '.png'}))
        except UsageError as e:
            assert 'would vanish' in str(e) and any(f.suffix == '.psd' for f in files)
            return
        assert list(found.images) == sorted(folder/f for f in wanted)   # also their order
        assert len(found.images) + found.passed.total() == len(files) and found.hidden == len(under_hidden)
        assert sum(found.classes.values()) + found.loose == len(found.images)
        assert set(found.classes) == {f.parts[0] for f in seen if (folder/f.parts[0]).is_dir()}
        assert set(found.unused) == {c for c, n in found.classes.items() if not n}
    finally:
        shutil.rmtree(folder)


def test_other_endings_and_empty_classes_are_reported(tmp_path, capsys):
    fill(tmp_path, 'a/1.jpg', 'a/2.CR2', 'b/3.jpg', 'b/4.psd', 'd/notes.txt')
    assert load_source(tmp_path)[0].classes == ['a', 'b']
    out = printed(capsys)
    assert '3 files (1 .cr2, 1 .psd, 1 .txt) passed over' in out and 'the folder d has no images' in out
    fill(tmp_path, 'c/5.CR2')
    with pytest.raises(UsageError, match=r'the class c in .* would vanish: .*1 file \(1 .cr2\)'):
        load_source(tmp_path)


def test_the_check_reports_what_was_passed_over(tmp_path):
    fill(tmp_path, 'a/1.jpg', 'a/2.CR2', 'b/3.jpg')
    Image.new('L', (20, 20), 7).save(tmp_path/'a'/'flat.png')
    frames = [Image.fromarray(np.random.default_rng(i).integers(0, 9, (20, 20), dtype=np.uint8)) for i in range(3)]
    frames[0].save(tmp_path/'b'/'pages.tiff', save_all=True, append_images=frames[1:])
    report = check_source(tmp_path, 0)
    part = report['parts']['train']
    assert [Path(f).name for f in part['flat']] == ['flat.png'] and part['frames'][0]['frames'] == 3
    assert [Path(f).name for f in part['dark']] == ['pages.tiff'] and part['labels'] == (0, 1)
    text = check_table(report)
    for line in ('1 .cr2', 'of one value', 'nearly black', 'pages.tiff: 3', 'labels from 0 to 1'):
        assert line in text


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    fill(tmp_path, 'a/1.jpg', 'b/2.jpg')
    scandir = os.scandir

    def refuse(place):
        if str(place).endswith('/b'):
            raise PermissionError(errno.EACCES, 'Permission denied', place)
        return scandir(place)
    monkeypatch.setattr(os, 'scandir', refuse)
    with pytest.raises(UsageError, match='/b cannot be read .Permission denied.'):
        folder_set(tmp_path)


def test_a_path_that_is_too_long_is_named(tmp_path, monkeypatch):
    fill(tmp_path, 'a/1.jpg')
    monkeypatch.chdir(tmp_path/'a')
    for _ in range(20):
        os.mkdir('x' * 250)
        os.chdir('x' * 250)
    with pytest.raises(UsageError, match='cannot be read .File name too long.'):
        folder_set(tmp_path)


def test_two_classes_in_one_folder_are_refused(tmp_path):
    fill(tmp_path, 'cat/1.jpg', 'dog/2.jpg')
    (tmp_path/'puss').symlink_to(tmp_path/'cat', target_is_directory=True)
    with pytest.raises(UsageError, match='cat and puss in .* are one folder'):
        folder_set(tmp_path)


def test_a_class_inside_of_another_class_is_refused(tmp_path):
    "Whichever of the two names comes first."
    for place in ('cat/more', 'eel/more'):
        fill(tmp_path/place[:3], 'cat/1.jpg', 'dog/2.jpg', 'eel/3.jpg')
        (tmp_path/place[:3]/place).symlink_to(tmp_path/place[:3]/'dog', target_is_directory=True)
        with pytest.raises(UsageError, match='are one folder'):
            folder_set(tmp_path/place[:3])


@pytest.mark.parametrize('train, valid', [('Train', 'Test'), ('training', 'testing'), ('train', 'dev'),
                                          ('train', 'EVAL'), ('train', 'validation')])
def test_parts_go_by_many_names(tmp_path, train, valid):
    fill(tmp_path, f'{train}/a/1.jpg', f'{train}/b/2.jpg', f'{valid}/a/3.jpg', '__MACOSX/a/4.jpg')
    first, second = folder_sets(tmp_path)
    assert (len(first), len(second), first.classes, second.classes) == (2, 1, ['a', 'b'], ['a', 'b'])


@pytest.mark.parametrize('names, message', [
    (['val/a/1.jpg', 'test/a/2.jpg'], 'has val, test and no folder train'),
    (['val/a/1.jpg'], 'has val and no folder train'),
    (['a/1.jpg', 'b/2.jpg', 'test/a/3.jpg'], 'has a folder test with folders in it beside a, b'),
    (['train/a/1.jpg', 'Train/a/1.jpg'], 'several folders of training images'),
    (['shard-0.tar', 'shard-1.tar'], 'shard-0.tar cannot be read as an uncompressed tar')])
def test_folders_that_would_be_misread_are_refused(tmp_path, names, message):
    with pytest.raises(UsageError, match=message):
        load_source(fill(tmp_path, *names))


# ---- labels ---------------------------------------------------------------------------------------------------------
@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.integers(-2, 5), st.none(), st.floats(), st.sampled_from(['a', 'b', 'z'])), max_size=6),
       st.sampled_from(['', 'ab', 'abcd']), st.booleans())
def test_every_label_is_a_class_or_refused(values, classes, derive):
    try:
        numbers, known = read_labels(values, classes, 'item {}'.format, derive)
    except UsageError as e:
        assert len(str(e).splitlines()) == 1
        return
    if numbers is None:
        assert values and all(v == -1 for v in values)   # withheld
    elif all(isinstance(v, str) for v in values):
        assert [known[n] for n in numbers] == values
    else:
        assert numbers.tolist() == values and all(0 <= n < len(known) for n in numbers)


def parquet(file, images=None, metadata=None, **columns):
    pa, pq = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    n = len(next(iter(columns.values()))) if columns else 3
    rows = images or [dict(bytes=encode(made_image(i, 16, 16)), path=f'{i}.jpg') for i in range(n)]
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(dict(image=rows, **columns)).replace_schema_metadata(metadata), file)


PATHS_ONLY = [dict(bytes=None, path=f'{i}.jpg') for i in range(3)]


@pytest.mark.parametrize('files, message', [
    (dict(train=dict(label=[0, 1, None])), r'row 2 of .*train.parquet has no label \(1 of 3'),
    (dict(train=dict(label=[0, 1, -1])), r'label -1 of row 2 of .*train.parquet: the labels are from -1 to 1'),
    (dict(train=dict(label=[0, 1, 2]), validation=dict(label=[0, 7, 1])), 'label 7 of row 1 of .*validation.parquet'),
    (dict(train=dict(labels=[0, 1, 2])), 'has no column label, but labels: rename'),
    (dict(train=dict(images=PATHS_ONLY, label=[0, 1, 2])), 'holds the paths of images and not their bytes'),
    (dict(test=dict(label=[0, 1, 2])), 'are for test, and none is for training'),
    ({'validation-0': dict(label=[0, 1, 2])}, 'are for val, and none is for training'),
    (dict(train=dict(label=[0, 1, 2]), extra=dict(label=[0, 1, 2])), 'name no part, such as extra.parquet'),
    (dict(train=dict(label=['b', 'a', 'b']), test=dict(label=['a', 'c', 'a'])), "label 'c' of row 1 of .*test.parquet"),
])
def test_parquet_that_would_be_misread_is_refused(tmp_path, files, message):
    for name, content in files.items():
        parquet(tmp_path/'hub'/f'{name}.parquet', **content)
    with pytest.raises(UsageError, match=message):
        pack_source(tmp_path/'hub', tmp_path/'packed', num_workers=0)
    assert not (tmp_path/'packed').exists()   # told before anything is written


@pytest.mark.parametrize('train, valid', [
    ('train-0', 'eval-0'), ('Train-0', 'Test-0'), ('train/0000', 'validation/0000'), ('data/train-0', 'data/dev-0'),
    ('default/train/0000', 'default/test/0000')])
def test_parquet_parts_go_by_many_names(tmp_path, train, valid):
    parquet(tmp_path/f'{train}.parquet', label=[0, 1, 2])
    parquet(tmp_path/f'{valid}.parquet', label=[2, 1])
    parts = parquet_parts(tmp_path)
    assert {name: part.labels.tolist() for name, part in parts.items()} == dict(train=[0, 1, 2], val=[2, 1])


def test_labels_as_texts_become_classes_and_withheld_ones_none(tmp_path, capsys):
    parquet(tmp_path/'hub'/'train-0.parquet', label=['dog', 'cat', 'dog'])
    parquet(tmp_path/'hub'/'test-0.parquet', label=[-1, -1])
    pack_source(tmp_path/'hub', tmp_path/'packed', num_workers=0)
    assert 'all labels of val are -1' in printed(capsys)
    train, valid = load_source(tmp_path/'packed')
    assert (train.classes, train.labels.tolist(), valid.labels) == (['cat', 'dog'], [1, 0, 1], None)
    with pytest.raises(UsageError, match='has no labels, so nothing can be measured on it'):
        split_labelled((train, valid), 0)


# ---- pixels and sets ------------------------------------------------------------------------------------------------
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)


@pytest.mark.parametrize('items, labels, classes, message', [
    (PIXELS / 255, None, [], 'got float64: multiply by 255'),
    (PIXELS.transpose(0, 3, 1, 2), None, [], 'the channels come last'),
    (PIXELS[..., 0], None, [], 'got shape'),
    (PIXELS // 200, None, [], 'the largest here is 1'),
    (PIXELS, [1, 2, 3, 1, 2, 3], list('abc'), 'label 3 of image 2 of made: the labels are from 1 to 3, they must be'),
    (PIXELS, [0, 1, 2, 0, 1, 2], [], 'and there are no class names'),
    (PIXELS, [0, 1], list('ab'), '6 images and 2 labels')])
def test_a_set_checks_what_it_is_given(items, labels, classes, message):
    with pytest.raises(UsageError, match=message):
        ImageSet('made', items, labels, classes)


def test_two_sets_that_number_their_classes_differently_are_refused():
    a, b = (ImageSet('made', PIXELS, np.arange(6) % 2, classes) for classes in (['x', 'y'], ['y', 'x']))
    with pytest.raises(UsageError, match='other classes than made, or in another order'):
        get_dls((a, b), RECIPES['finetune'], img_size=8, bs=2, num_workers=0, device='cpu')


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(0, 3))
def test_a_split_takes_from_each_class_by_its_size(counts, seed):
    labels = np.repeat(np.arange(len(counts)), counts)
    images = ImageSet('made', np.zeros((len(labels), 2, 2, 3), np.uint8), labels, [str(i) for i in range(len(counts))])
    n = max(len(labels) // 10, 1)
    if max(counts) == 1:
        return
    train, valid = split_labelled((images, None), seed)
    kept, held = (np.bincount(part.labels, minlength=len(counts)) for part in (train, valid))
    assert (kept + held == counts).all() and held.sum() == n and (kept > 0).all()
    assert np.abs(held - np.array(counts) * n / len(labels)).max() <= 1 + (np.array(counts) == 1).any()


def test_tiny_classes_keep_a_training_image_and_are_named(capsys):
    labels = np.repeat([0, 1, 2], [200, 6, 6])
    images = ImageSet('made', np.zeros((212, 2, 2, 3), np.uint8), labels, list('abc'))
    for seed in range(30):
        train, _ = split_labelled((images, None), seed)
        assert set(train.labels) == {0, 1, 2}
    assert 'c (6)' in printed(capsys)


# ---- one buffer for all workers -------------------------------------------------------------------------------------
@given(st.lists(st.text(st.characters(codec=None), max_size=8), max_size=8))
def test_names_come_back(texts):
    names = Names(texts)
    assert list(names) == texts and list(pickle.loads(pickle.dumps(names))) == texts


class NamesOf(Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return str(self.images.items[i]), int(self.images.labels[i]), type(self.images.labels.base).__name__


def test_a_worker_that_is_started_anew_maps_the_names(tmp_path):
    paths = Paths('/data', Names(f'{i}.jpg' for i in range(5)))[[4, 0, 2]]
    images = ImageSet('made', paths, [1, 0, 1], ['a', 'b'])
    loader = DataLoader(NamesOf(images), batch_size=None, num_workers=1, multiprocessing_context='spawn')
    rows = [tuple(row) for row in loader]
    assert [row[:2] for row in rows] == [('/data/4.jpg', 1), ('/data/0.jpg', 0), ('/data/2.jpg', 1)]
    assert len(pickle.dumps(images)) < 2000


# ---- pictures that would be read wrongly ----------------------------------------------------------------------------
def tiff(bands, bits, form, data):
    "A TIFF of 2 x 2 pixels with any number of bands."
    tags = {256: 2, 257: 2, 258: bits, 259: 1, 262: 1, 273: 0, 277: bands, 278: 2, 279: len(data), 339: form}
    start = 8 + 2 + 12 * len(tags) + 4
    rows = b''.join(tag.to_bytes(2, 'little') + (4).to_bytes(2, 'little') + (1).to_bytes(4, 'little')
                    + (start if tag == 273 else value).to_bytes(4, 'little') for tag, value in tags.items())
    return b'II*\0' + (8).to_bytes(4, 'little') + len(tags).to_bytes(2, 'little') + rows + bytes(4) + data


@pytest.mark.parametrize('data, message', [
    (tiff(5, 8, 1, bytes(20)), 'a TIFF of 5 bands of 8-bit integer pixels: save it with 1 or 3 bands'),
    (tiff(1, 64, 3, bytes(32)), 'a TIFF of 1 band of 64-bit floating-point pixels'),
    (tiff(1, 32, 1, bytes(16)), '32-bit or signed pixels have no agreed range'),
    (b'II*\0junk', 'a damaged TIFF')])
def test_tiffs_that_are_not_read_say_why(data, message):
    with pytest.raises(ValueError, match=message):
        read_image(io.BytesIO(data))


def lossless_jpeg(pixels):
    "A grey lossless JPEG (SOF3): each pixel as its difference from the one on its left."
    h, w = pixels.shape
    frame = b'\xff\xc3\0\x0b\x08' + h.to_bytes(2, 'big') + w.to_bytes(2, 'big') + b'\x01\x01\x11\0'
    codes = b'\xff\xc4\0\x1c\0' + bytes([0, 0, 0, 9] + [0] * 12) + bytes(range(9))
    bits = ''
    for y, x in np.ndindex(h, w):
        left = pixels[y, x - 1] if x else pixels[y - 1, 0] if y else 128
        step = int(pixels[y, x]) - int(left)
        size = abs(step).bit_length()
        bits += f'{size:04b}' + (f'{step if step > 0 else step + (1 << size) - 1:0{size}b}' if size else '')
    bits += '1' * (-len(bits) % 8)
    body = int(bits, 2).to_bytes(len(bits) // 8, 'big').replace(b'\xff', b'\xff\0')
    return b'\xff\xd8' + frame + codes + b'\xff\xda\0\x08\x01\x01\0\x01\0\0' + body + b'\xff\xd9'


@pytest.mark.parametrize('shrink', [None, lambda size: 8])
@pytest.mark.parametrize('in_chans', [1, 3])
def test_a_lossless_jpeg_is_read_at_full_scale(in_chans, shrink):
    pixels = np.random.default_rng(0).integers(100, 140, (24, 32)).astype(np.uint8)
    img = read_image(io.BytesIO(lossless_jpeg(pixels)), in_chans, shrink)
    assert torch.equal(img, torch.from_numpy(pixels).expand(in_chans, -1, -1))


def test_sets_in_the_book_have_nothing_to_report():
    assert [images.notes for images in read_source('fashion')] == [[], []] and '.jpg' in image_endings()
