"""Tars of samples, as webdataset's own library writes and reads them."""
import io

import numpy as np
import pytest
from made_images import encode, made_image

from mae_nb.base.errors import UsageError
from mae_nb.data.datasets import read_source
from mae_nb.data.packing import pack_source
from mae_nb.data.webdataset import tar_samples, webdataset_parts

webdataset = pytest.importorskip('webdataset')


def write_shards(folder, part, count, per_tar=5):
    "Samples with keys in folders and with dots behind them, as `ShardWriter` puts them into tars."
    folder.mkdir(parents=True, exist_ok=True)
    pattern = str(folder/f'{part}-%04d.tar')
    with webdataset.ShardWriter(pattern, maxcount=per_tar, verbose=0) as sink:
        for i in range(count):
            rest = {'json': dict(i=i), 'seg.png': encode(made_image(i, 8, 8), 'PNG')}
            sink.write({'__key__': f'set/{i:05}', 'jpg': encode(made_image(i, 20, 24)), 'cls': i % 3} | rest)


def test_the_library_and_this_package_read_the_same_samples(tmp_path):
    write_shards(tmp_path, 'train', 12)
    write_shards(tmp_path, 'val', 4)
    train, valid = read_source(tmp_path)
    tars = sorted(map(str, tmp_path.glob('train-*.tar')))
    theirs = list(webdataset.WebDataset(tars, shardshuffle=False, empty_check=False))
    assert len(train) == len(theirs) == 12 and len(valid) == 4
    for i, sample in enumerate(theirs):
        assert train.data(i) == sample['jpg'] and train.labels[i] == int(sample['cls'])
        assert train.file(i).endswith(sample['__key__'] + '.jpg')
    assert train.classes == ['0', '1', '2'] and train.read(3).shape == (3, 20, 24)
    few = train.take([7, 2])
    assert few.data(0) == theirs[7]['jpg']   # in any order


def test_a_tar_alone_and_folders_of_parts_are_sources(tmp_path):
    write_shards(tmp_path/'train', 'a', 6)
    write_shards(tmp_path/'validation', 'b', 3)
    assert [len(images) for images in read_source(tmp_path)] == [6, 3]
    alone, none = read_source(tmp_path/'train'/'a-0000.tar')
    assert len(alone) == 5 and none is None
    pack_source(tmp_path, tmp_path/'packed', num_workers=0)
    assert read_source(tmp_path/'packed')[0].data(4) == alone.data(4)


def test_labels_of_validation_are_classes_of_training(tmp_path):
    write_shards(tmp_path, 'train', 2)
    write_shards(tmp_path, 'val', 3)
    with pytest.raises(UsageError, match='label 2 of val-0000.tar/set/00002.jpg: .* they must be from 0 to 1'):
        webdataset_parts(tmp_path)


def test_bands_of_sixteen_bits_in_a_tar(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 65_536, (3, 5, 12, 16), dtype=np.uint16)
    with webdataset.TarWriter(str(tmp_path/'scenes.tar')) as sink:
        for i, scene in enumerate(pixels):
            file = io.BytesIO()
            np.save(file, scene)
            sink.write({'__key__': f'{i}', 'npy': file.getvalue()})
    images, _ = read_source(tmp_path/'scenes.tar')
    assert (images.in_chans, images.bits, images.labels) == (5, 16, None)
    assert all((images.read(i).numpy() == scene).all() for i, scene in enumerate(pixels))


def test_a_compressed_tar_is_refused(tmp_path):
    with webdataset.TarWriter(str(tmp_path/'a.tar'), compress=True) as sink:
        sink.write({'__key__': '1', 'jpg': encode(made_image(0, 8, 8))})
    with pytest.raises(UsageError, match='a.tar cannot be read as an uncompressed tar: unpack its compression'):
        tar_samples(tmp_path/'a.tar')
