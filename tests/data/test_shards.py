"""Packing: the same shards, whatever is interrupted, damaged or missing, and from every container."""
import io
import json
import os
import signal
import tarfile
import threading
import time

import numpy as np
import pytest
import torch
from made_images import equal_batches, loaded_batches, sample_files
from PIL import Image
from scipy.io import savemat
from support import begin_command
from torch.nn.functional import interpolate

from mae_nb.data import shards
from mae_nb.data.archives import DEVKIT, TRAIN_TAR, VAL_TAR
from mae_nb.data.datasets import folder_sets, load_source
from mae_nb.data.packing import pack_source, packable_parts
from mae_nb.data.shards import check_shards, open_pack, pack, read_index
from mae_nb.training.presets import RECIPES
from mae_nb.training.recipes import override

pa = pytest.importorskip('pyarrow')
RECIPE = override(RECIPES['pretrain'], dict(batch_size=16))

def contents(folder):
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir())}

@pytest.mark.parametrize('seed, per_shard, workers', [(0, 7, 0), (1, 50, 1), (2, 4096, 2)])
def test_packed_is_the_folder_batch_for_batch(photos, tmp_path, seed, per_shard, workers):
    pack(packable_parts(photos), tmp_path/'packed', per_shard=per_shard)
    plain, packed = loaded_batches(photos, RECIPE, 0, seed), loaded_batches(tmp_path/'packed', RECIPE, workers, seed)
    assert equal_batches(plain, packed)

def slow_reencode(seconds):
    "Make packing slow; so many seconds after the first image the process is killed, if not 0."
    main, begun, plain = os.getpid(), [], shards.reencode
    def slow(raw, **options):
        if seconds and not begun:
            begun.append(threading.Timer(seconds, os.kill, (main, signal.SIGKILL)))
            begun[0].start()
        time.sleep(.003)
        return plain(raw, **options)
    shards.reencode = slow

def test_a_cut_at_ten_random_moments_changes_nothing(photos, tmp_path):
    def pack_slowly(out, workers=0, seconds=0):
        words = 'photos', out, '--per-shard', 8, '--max-side', 30, '--num-workers', workers
        _, wait = begin_command(tmp_path, 'mae-pack', *words, before=lambda: slow_reencode(seconds))
        return wait().code

    assert pack_slowly('whole') == 0
    rng, done, cut = np.random.default_rng(0), [], tmp_path/'cut'
    for n in range(10):
        code = pack_slowly('cut', 2 if n % 5 == 4 else 0, rng.uniform(.01, .15))
        assert code in (-signal.SIGKILL, 0)   # 0: it was quicker
        index = read_index(cut)
        done.append(len(index['shards']))
        assert all((cut/f).stat().st_size == row['bytes'] for f, row in index['shards'].items())
        if not index['complete']:
            with pytest.raises(ValueError, match='is not finished: run the same mae-pack again'):
                open_pack(cut)
    print(f'shards after each cut: {done} of 15')
    assert done == sorted(done) and done[0] < 15   # every start resumes where the last one ended
    assert pack_slowly('cut') == 0
    assert contents(cut) == contents(tmp_path/'whole')

def test_a_flipped_bit_anywhere_in_a_shard_is_found_and_named(forked, photos, tmp_path):
    packed = tmp_path/'packed'
    pack(packable_parts(photos), packed, per_shard=50)
    shard, rng = packed/'train-00001.arrow', np.random.default_rng(0)
    good = shard.read_bytes()
    fault = 'train-00001.arrow is not what was written'
    for place in (0, len(good) - 1, *rng.integers(0, len(good), 6)):
        shard.write_bytes(good[:place] + bytes([good[place] ^ 1 << rng.integers(8)]) + good[place + 1:])
        with pytest.raises(ValueError, match=f'1 of 3 shards in .* are damaged: {fault}'):
            check_shards(packed, read_index(packed))
    said = forked('mae-pack', 'packed')
    assert said.code == 2 and fault in said.line
    shard.unlink()
    said = forked('mae-pretrain', 'packed', '--max-steps', '1')
    assert said.code == 2 and 'lacks 1 of its 3 shards' in said.line

def test_bad_pictures_are_refused_by_name_or_left_out_and_listed(forked, photos, tmp_path):
    (photos/'odd'/'005.png').write_bytes(b'garbage')
    cut = photos/'even'/'010.png'
    cut.write_bytes(cut.read_bytes()[:900])
    words = 'mae-pack', 'photos', 'packed', '--num-workers', '1', '--per-shard', '50'
    said = forked(*words)
    assert said.code == 2 and '2 pictures cannot be read, the first is even/010.png' in said.line
    assert 'leave them out with --skip-bad' in said.line and 'cannot read odd/005.png' in said.out
    said = forked('mae-pretrain', 'packed')
    assert said.code == 2 and 'packed is not finished' in said.line
    said = forked(*words, '--skip-bad')
    assert said.code == 0 and 'left out odd/005.png' in said.out and '118 images' in said.out, said
    plain, packed = (load_source(tmp_path/name)[0] for name in ('photos', 'packed'))
    kept = [i for i in range(120) if i not in (5, 62)]
    assert packed.labels.tolist() == plain.labels[kept].tolist()
    assert torch.equal(packed.read(62), plain.read(kept[62]))
    said = forked('mae-pack', 'photos', 'packed', '--max-side', '20')
    assert said.code == 2
    assert 'started from another source or with other options (max_side, per_shard, quality)' in said.line

def test_reencoding_never_enlarges_and_shows_what_was_meant(tmp_path):
    rng, folder = np.random.default_rng(0), tmp_path/'odd'
    colour = Image.fromarray(rng.integers(90, 170, (6, 9, 3), dtype=np.uint8)).resize((90, 60), Image.BICUBIC)
    small = colour.resize((30, 20))
    exif = Image.Exif()
    exif[0x0112] = 6   # "rotate me by a quarter"
    folder.mkdir()
    colour.save(folder/'a_large.jpg')
    colour.convert('CMYK').save(folder/'b_cmyk.jpg')
    colour.convert('L').save(folder/'c_grey.png')
    colour.save(folder/'d_turned.jpg', exif=exif)
    colour.convert('RGBA').save(folder/'e_alpha.png')
    small.save(folder/'f_small.jpg')
    small.save(folder/'g_small.png')
    pack(packable_parts(folder), tmp_path/'packed', max_side=45, quality=95)
    plain, packed = (load_source(place)[0] for place in (folder, tmp_path/'packed'))
    sizes = [tuple(packed.read(i).shape[1:]) for i in range(7)]
    assert sizes == [(30, 45), (30, 45), (30, 45), (45, 30), (30, 45), (20, 30), (20, 30)]
    assert packed.items[5] == (folder/'f_small.jpg').read_bytes()   # small and a JPEG: not encoded twice
    for i, size in enumerate(sizes):
        scaled = interpolate(plain.read(i)[None].float(), size, mode='bicubic', antialias=True)[0]
        brightness = (packed.read(i) - scaled).mean(0)   # colours are kept at half the resolution
        assert brightness.abs().mean() < 3

@pytest.fixture
def few(shared_data, tmp_path):
    "Sixteen real files of eight classes as an ImageFolder: two of each in `train`, and one again in `val`."
    folder, raws = tmp_path/'folder', sample_files(shared_data)[:16]
    with tarfile.open(shared_data/'imagenet_sample.tar') as tar:
        classes = [m.name.split('/')[-2] for m in tar if m.name.endswith('.JPEG')][:8]
    files = {folder/'train'/classes[i % 8]/f'{classes[i % 8]}_{i}.JPEG': raw for i, raw in enumerate(raws)}
    for i, c in enumerate(reversed(classes)):
        files[folder/'val'/c/f'ILSVRC2012_val_{i + 1:08}.JPEG'] = raws[i]
    for file, raw in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(raw)
    return folder

def add_file(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))

def as_tars(folder, out):
    "The folder in the layout of the challenge's downloads."
    out.mkdir()
    classes = sorted(d.name for d in (folder/'train').iterdir())
    with tarfile.open(out/TRAIN_TAR, 'w') as outer:
        for c in reversed(classes):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode='w') as tar:
                for f in sorted((folder/'train'/c).iterdir()):
                    add_file(tar, f.name, f.read_bytes())
            add_file(outer, f'{c}.tar', inner.getvalue())
    val = sorted((folder/'val').rglob('*.JPEG'), key=lambda f: f.name)
    with tarfile.open(out/VAL_TAR, 'w') as tar:
        for f in val:
            add_file(tar, f.name, f.read_bytes())
    numbers = dict(zip(classes, np.random.default_rng(0).permutation(len(classes)) + 1))
    rows = np.array([(n, c) for c, n in numbers.items()], dtype=[('ILSVRC2012_ID', 'O'), ('WNID', 'O')])
    table, truth = io.BytesIO(), '\n'.join(str(numbers[f.parent.name]) for f in val)
    savemat(table, dict(synsets=rows))
    with tarfile.open(out/DEVKIT, 'w:gz') as tar:
        data = 'ILSVRC2012_devkit_t12/data'
        add_file(tar, f'{data}/meta.mat', table.getvalue())
        add_file(tar, f'{data}/ILSVRC2012_validation_ground_truth.txt', truth.encode() + b'\n')

def as_parquet(folder, out):
    "The folder in the layout of the hub."
    from pyarrow.parquet import write_table
    (out/'data').mkdir(parents=True)
    for part, images in zip(('train', 'validation'), folder_sets(folder)):
        label = dict(names=images.classes, _type='ClassLabel')
        notes = dict(huggingface=json.dumps(dict(info=dict(features=dict(label=label)))))
        for n, ids in enumerate(np.array_split(np.arange(len(images)), 2)):
            rows = [dict(bytes=images.items[i].read_bytes(), path=images.items[i].name) for i in ids]
            table = pa.table(dict(image=rows, label=images.labels[ids])).replace_schema_metadata(notes)
            write_table(table, out/'data'/f'{part}-{n:05}-of-00002.parquet', row_group_size=3)

def by_content(images):
    return sorted((images.read(i).sum().item(), images.classes[images.labels[i]]) for i in range(len(images)))

@pytest.mark.parametrize('layout', [as_tars, as_parquet])
def test_the_layouts_of_imagenet_pack_like_the_folder(forked, few, tmp_path, layout):
    source = tmp_path/'source'
    layout(few, source)
    said = forked('mae-pack', 'source', 'packed', '--per-shard', '5', '--num-workers', '2')
    assert said.code == 0 and '24 images' in said.out, said
    plain, packed = load_source(few), load_source(tmp_path/'packed')
    for a, b in zip(plain, packed):
        assert b.classes == a.classes and by_content(a) == by_content(b)
    assert [*packed[0].items] == [f.read_bytes() for f in plain[0].items]
    assert packed[0].labels.tolist() == plain[0].labels.tolist()
    if layout == as_tars:   # tars are read in place, too
        assert equal_batches(loaded_batches(few, RECIPE, 0, 3), loaded_batches(source, RECIPE, 1, 3))
    else:
        with pytest.raises(ValueError, match='pack them first with mae-pack'):
            load_source(source)

def test_options_that_cannot_work_are_told(photos, tmp_path):
    for options, message in ((dict(quality=90), '`quality` has no meaning without `max_side`'),
                             (dict(max_side=0), '`max_side` must be a whole number, at least 1, got 0')):
        with pytest.raises(ValueError, match=message):
            pack_source(photos, tmp_path/'packed', **options)
    assert not (tmp_path/'packed').exists()
