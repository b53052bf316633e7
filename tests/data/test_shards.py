"""Packed data: the same samples as from the files, whatever is cut off, flipped or missing."""
import io
import json
import os
import re
import shutil
import signal
import tarfile
import threading
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from support import begin_command
from fastai.callback.core import Callback
from PIL import Image
from scipy.io import savemat
from torch.utils.data import DataLoader

from mae_nb import commands as cli
from mae_nb.data.crops import train_transform
from mae_nb.data.datasets import folder_sets, load_source
from mae_nb.data.images import read_image
from mae_nb.data.loader import Loader, Samples, collate, get_dls
from mae_nb.training.runs import make_run
from mae_nb.weights.building import load_mae
from mae_nb.model.mae import create_mae
from mae_nb.tasks.pretrain import pretrain_learner
from mae_nb.training.presets import RECIPES
from mae_nb.training.recipes import override
from mae_nb.data.archives import DEVKIT, TRAIN_TAR, VAL_TAR, Files, Part
from mae_nb.data.shards import check_shards, open_pack, pack, read_index

pa = pytest.importorskip('pyarrow')
RECIPE = override(RECIPES['pretrain'], dict(batch_size=16))

def model_parts(folder, name='train'):
    images, _ = folder_sets(folder)
    return {name: Part(Files(images.items, folder), images.labels, images.classes)}

def contents(folder): return {f.name: f.read_bytes() for f in sorted(folder.iterdir())}

def batches(source, workers, seed, epochs=2):
    dls = get_dls(source, RECIPE, img_size=24, seed=seed, num_workers=workers, device='cpu')
    found = []
    for epoch in range(epochs):
        dls.train.set_epoch(epoch)
        found += [tuple(t.clone() for t in b) for b in dls.train]
    return found

def same(a, b): return len(a) == len(b) and all(torch.equal(x, y) for p, q in zip(a, b) for x, y in zip(p, q))

@pytest.mark.parametrize('seed, per_shard, workers', [(0, 7, 0), (1, 50, 1), (2, 4096, 2)])
def test_packed_is_the_folder_batch_for_batch(photos, tmp_path, seed, per_shard, workers):
    pack(model_parts(photos), tmp_path/'packed', read=read_image, per_shard=per_shard)
    assert same(batches(photos, 0, seed), batches(tmp_path/'packed', workers, seed))

def test_training_from_packed_is_training_from_the_folder(forked, photos, tmp_path):
    assert forked('mae-pack', 'photos', 'packed', '--per-shard', '50', '--num-workers', '0').code == 0
    for data, out in (('photos', 'a'), ('packed', 'b')):
        got = forked('mae-pretrain', data, '--model', 'mae_vit_nano_patch4_32', '--set', 'amp=False', '--max-steps', '2', '--bs', '20', '--num-workers', '0', '--out', out)
        assert got.code == 0, got.err
    a, b = (load_mae(tmp_path/x).state_dict() for x in 'ab')
    assert all(torch.equal(v, b[k]) for k, v in a.items())

@pytest.mark.parametrize('how', ['fork', 'spawn'])
def test_workers_however_they_start(photos, tmp_path, how):
    "A set that was read from before its workers start; each opens its own files."
    pack(model_parts(photos), tmp_path/'packed', read=read_image, per_shard=50)
    samples = Samples(load_source(tmp_path/'packed')[0], (24, 24), 0, train_transform)
    order = [[(0, int(i)) for i in ids] for ids in np.random.default_rng(0).permutation(120).reshape(6, 20)]
    here = [collate([samples[w] for w in batch]) for batch in order]
    there = list(DataLoader(samples, batch_sampler=order, num_workers=2 if how == 'fork' else 1, collate_fn=collate, multiprocessing_context=how))
    assert same([b[:3] for b in here], [b[:3] for b in there])

def test_a_cut_at_ten_random_moments_changes_nothing(photos, tmp_path):
    def begin(out, workers=0, seconds=None):
        "Pack slowly; after so many seconds from the first picture on the process is killed."
        def prepare():
            main, begun = os.getpid(), []
            def slow(raw):
                if seconds and not begun: begun.append(threading.Timer(seconds, os.kill, (main, signal.SIGKILL))); begun[0].start()
                time.sleep(.003); return read_image(raw)
            cli.read_image = slow
        return begin_command(tmp_path, 'mae-pack', 'photos', out, '--per-shard', 8, '--max-side', 30, '--num-workers', workers, before=prepare)[1]()
    assert begin('whole').code == 0
    rng, done = np.random.default_rng(0), []
    for cut in range(10):
        assert begin('cut', 2 if cut % 5 == 4 else 0, rng.uniform(.01, .15)).code in (-signal.SIGKILL, 0)   # 0: it was quicker
        index = read_index(tmp_path/'cut')
        done.append(len(index['shards'])); assert all((tmp_path/'cut'/f).stat().st_size == row['bytes'] for f, row in index['shards'].items())
        if not index['complete']:
            with pytest.raises(ValueError, match='is not finished: run the same mae-pack again'): open_pack(tmp_path/'cut')
    print(f'shards after each cut: {done} of 15')
    assert done == sorted(done) and done[0] < 15   # every start goes on where the last one ended
    assert begin('cut').code == 0
    assert contents(tmp_path/'cut') == contents(tmp_path/'whole')

def test_a_flipped_bit_anywhere_in_a_shard_is_found_and_named(forked, photos, tmp_path):
    pack(model_parts(photos), tmp_path/'packed', read=read_image, per_shard=50)
    shard, rng = tmp_path/'packed'/'train-00001.arrow', np.random.default_rng(0)
    good = shard.read_bytes()
    for place in (0, len(good) - 1, *rng.integers(0, len(good), 6)):
        shard.write_bytes(good[:place] + bytes([good[place] ^ 1 << rng.integers(8)]) + good[place + 1:])
        with pytest.raises(ValueError, match='1 of 3 shards in .* are damaged: train-00001.arrow is not what was written'): check_shards(tmp_path/'packed', read_index(tmp_path/'packed'))
    got = forked('mae-pack', 'packed')
    assert got.code == 2 and 'train-00001.arrow is not what was written' in got.line
    shard.unlink()
    got = forked('mae-pretrain', 'packed', '--max-steps', '1')
    assert got.code == 2 and 'lacks 1 of its 3 shards' in got.line

def test_bad_pictures_are_refused_by_name_or_left_out_and_listed(forked, photos, tmp_path):
    (photos/'odd'/'005.png').write_bytes(b'garbage'); (photos/'even'/'010.png').write_bytes((photos/'even'/'010.png').read_bytes()[:900])
    got = forked('mae-pack', 'photos', 'packed', '--num-workers', '1', '--per-shard', '50')
    assert got.code == 2 and '2 pictures cannot be read, the first is even/010.png' in got.line and 'cannot read odd/005.png' in got.out
    got = forked('mae-pretrain', 'packed')
    assert got.code == 2 and 'packed is not finished' in got.line
    got = forked('mae-pack', 'photos', 'packed', '--num-workers', '1', '--per-shard', '50', '--skip-bad')
    assert got.code == 0 and 'left out odd/005.png' in got.out and '118 images' in got.out, got
    plain, packed = (load_source(tmp_path/x)[0] for x in ('photos', 'packed'))
    kept = [i for i in range(120) if i not in (5, 62)]
    assert packed.labels.tolist() == plain.labels[kept].tolist()
    assert torch.equal(packed.read(62), plain.read(kept[62]))
    got = forked('mae-pack', 'photos', 'packed', '--max-side', '20')
    assert got.code == 2 and 'begun from another source or with other options (max_side, per_shard, quality)' in got.line

def test_a_bad_picture_in_a_shard_is_called_by_its_name(photos, tmp_path, capsys):
    (photos/'odd'/'005.png').write_bytes(b'garbage')
    pack(model_parts(photos), tmp_path/'packed', read=lambda raw: None)
    loader = Loader(Samples(load_source(tmp_path/'packed')[0], (24, 24)), 20)
    assert sum(len(i) for _, i, _ in loader) == 120
    assert 'could not read odd/005.png in ' in capsys.readouterr().out

def test_reencoding_never_enlarges_and_shows_what_was_meant(tmp_path):
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(90, 170, (6, 9, 3), dtype=np.uint8)).resize((90, 60), Image.BICUBIC)
    exif = Image.Exif(); exif[0x0112] = 6   # "turn me by a quarter"
    folder = tmp_path/'odd'; folder.mkdir()
    colour.save(folder/'a_large.jpg'); colour.convert('CMYK').save(folder/'b_cmyk.jpg'); colour.convert('L').save(folder/'c_grey.png')
    colour.save(folder/'d_turned.jpg', exif=exif); colour.convert('RGBA').save(folder/'e_alpha.png'); colour.resize((30, 20)).save(folder/'f_small.jpg')
    colour.resize((30, 20)).save(folder/'g_small.png')
    pack(model_parts(folder), tmp_path/'packed', read=read_image, max_side=45, quality=95)
    packed = load_source(tmp_path/'packed')[0]
    assert [tuple(packed.read(i).shape[1:]) for i in range(7)] == [(30, 45), (30, 45), (30, 45), (45, 30), (30, 45), (20, 30), (20, 30)]
    assert packed.items[5] == (folder/'f_small.jpg').read_bytes()   # small and a JPEG: not encoded twice
    plain = load_source(folder)[0]
    for i in range(7):
        want = torch.nn.functional.interpolate(plain.read(i)[None].float(), tuple(packed.read(i).shape[1:]), mode='bicubic', antialias=True)[0]
        assert (packed.read(i) - want).mean(0).abs().mean() < 3   # brightness: colours are kept at half the resolution

@pytest.fixture
def few(shared_data, tmp_path):
    "Sixteen real files of eight classes as an ImageFolder: two of each in `train`, and one again in `val`."
    with tarfile.open(shared_data/'imagenet_sample.tar') as tar:
        names = [m for m in tar if m.name.endswith('.JPEG')]
        raw = [tar.extractfile(m).read() for m in names[:16]]; wnids = [m.name.split('/')[-2] for m in names[:8]]
    for i, data in enumerate(raw):
        file = tmp_path/'folder'/'train'/wnids[i % 8]/f'{wnids[i % 8]}_{i}.JPEG'; file.parent.mkdir(parents=True, exist_ok=True); file.write_bytes(data)
    for i, w in enumerate(reversed(wnids)):
        file = tmp_path/'folder'/'val'/w/f'ILSVRC2012_val_{i + 1:08}.JPEG'; file.parent.mkdir(parents=True, exist_ok=True); file.write_bytes(raw[i])
    return tmp_path/'folder'

def add(tar, name, data):
    info = tarfile.TarInfo(name); info.size = len(data); tar.addfile(info, io.BytesIO(data))

def as_tars(folder, out):
    "The folder in the layout of the challenge's downloads."
    out.mkdir(); classes = sorted(d.name for d in (folder/'train').iterdir())
    with tarfile.open(out/TRAIN_TAR, 'w') as outer:
        for c in reversed(classes):
            with tarfile.open(fileobj=(inner := io.BytesIO()), mode='w') as t:
                for f in sorted((folder/'train'/c).iterdir()): add(t, f.name, f.read_bytes())
            add(outer, f'{c}.tar', inner.getvalue())
    val = sorted((folder/'val').rglob('*.JPEG'), key=lambda f: f.name)
    with tarfile.open(out/VAL_TAR, 'w') as t:
        for f in val: add(t, f.name, f.read_bytes())
    ids = dict(zip(classes, np.random.default_rng(0).permutation(len(classes)) + 1))
    savemat(meta := io.BytesIO(), dict(synsets=np.array([(i, c) for c, i in ids.items()], dtype=[('ILSVRC2012_ID', 'O'), ('WNID', 'O')])))
    with tarfile.open(out/DEVKIT, 'w:gz') as t:
        add(t, 'ILSVRC2012_devkit_t12/data/meta.mat', meta.getvalue())
        add(t, 'ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt', '\n'.join(str(ids[f.parent.name]) for f in val).encode() + b'\n')

def as_parquet(folder, out):
    "The folder in the layout of the hub."
    from pyarrow.parquet import write_table
    (out/'data').mkdir(parents=True)
    for part, images in zip(('train', 'validation'), folder_sets(folder)):
        notes = {'huggingface': json.dumps({'info': {'features': {'label': {'names': images.classes, '_type': 'ClassLabel'}}}})}
        for n, ids in enumerate(np.array_split(np.arange(len(images)), 2)):
            rows = [dict(bytes=images.items[i].read_bytes(), path=images.items[i].name) for i in ids]
            write_table(pa.table(dict(image=rows, label=images.labels[ids])).replace_schema_metadata(notes), out/'data'/f'{part}-{n:05}-of-00002.parquet', row_group_size=3)

def by_content(images): return sorted((images.read(i).sum().item(), images.classes[images.labels[i]]) for i in range(len(images)))

@pytest.mark.parametrize('layout', [as_tars, as_parquet])
def test_the_layouts_of_imagenet_pack_like_the_folder(forked, few, tmp_path, layout):
    layout(few, tmp_path/'source')
    got = forked('mae-pack', 'source', 'packed', '--per-shard', '5', '--num-workers', '2')
    assert got.code == 0 and '24 images' in got.out, got
    plain, packed = load_source(few), load_source(tmp_path/'packed')
    for a, b in zip(plain, packed): assert b.classes == a.classes and by_content(a) == by_content(b)
    assert [*packed[0].items] == [f.read_bytes() for f in plain[0].items] and packed[0].labels.tolist() == plain[0].labels.tolist()
    if layout == as_tars: assert same(batches(few, 0, 3), batches(tmp_path/'source', 1, 3))   # tars are read where they stand, too
    else:
        with pytest.raises(ValueError, match='pack them first with mae-pack'): load_source(tmp_path/'source')

def test_a_split_of_a_packed_set_reads_nothing(photos, tmp_path):
    pack(model_parts(photos), tmp_path/'packed', read=read_image)
    images = load_source(tmp_path/'packed')[0]
    some = images.take([7, 119, 0])
    assert images.items.opened == {} and torch.equal(some.read(1), images.read(119)) and some.labels.tolist() == [0, 1, 0]

@pytest.fixture(params=['file', 'memory'])
def bucket(request, photos, tmp_path):
    "A packed folder, and its address as pyarrow knows it or as fsspec does; the folder's files are the store's."
    pack(model_parts(photos), tmp_path/'bucket', read=read_image, per_shard=50)
    if request.param == 'file': yield f'file://{tmp_path}/bucket', lambda name, data: (tmp_path/'bucket'/name).write_bytes(data); return
    store = fsspec.filesystem('memory')
    store.put(str(tmp_path/'bucket'), '/bucket', recursive=True)
    yield 'memory://bucket', lambda name, data: store.pipe(f'/bucket/{name}', data)
    store.rm('/bucket', recursive=True)

def test_an_object_store_s_shards_are_cached_and_checked(bucket, tmp_path):
    (uri, write), cache, here = bucket, tmp_path/'cache', open_pack(tmp_path/'bucket')['train'].items
    items = open_pack(uri, cache)['train'].items
    first, raw = here[0], here[60]
    assert items[60] == raw and [f.name for f in cache.rglob('*.arrow')] == ['train-00001.arrow']
    good = (tmp_path/'bucket'/'train-00000.arrow').read_bytes(); write('train-00000.arrow', good[:-1] + b'?')
    with pytest.raises(ValueError, match='train-00000.arrow is not what was packed'): items[0]
    write('train-00000.arrow', good); write('train-00001.arrow', b'')
    assert (items[0], items[60]) == (first, raw)   # the second is in the cache

def test_training_from_an_object_store_is_training_from_the_folder(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv('MAE_NB_DOWNLOADS', str(tmp_path/'downloads'))
    assert same(batches(bucket[0], 2, 1), batches(tmp_path/'bucket', 0, 1))
    assert len(list((tmp_path/'downloads').rglob('*.arrow'))) == 3

def test_an_address_that_nobody_knows_is_told(forked):
    for address, said in (('bucket://x/y', 'bucket'), ('memory://not/there', 'not/there')):
        got = forked('mae-pretrain', address)
        assert got.code == 2 and said in got.line, got

@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='tells its memory only on Linux')
def test_memory_stays_flat(photos, tmp_path):
    pack(model_parts(photos), tmp_path/'packed', read=read_image, per_shard=8)
    items = open_pack(tmp_path/'packed')['train'].items
    rss = lambda: int(next(x for x in Path('/proc/self/status').read_text().splitlines() if x.startswith('VmRSS')).split()[1]) / 1024
    for i in range(120): items[i]
    before = rss()
    for _ in range(50):
        for i in range(120): items[i]
    assert rss() - before < 5   # MiB, of 35 MB read

@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/smaps_rollup').exists(), reason='tells its memory only on Linux')
def test_memory_stays_flat_over_20_000_photographs_and_two_workers(shared_data, tmp_path):
    shutil.unpack_archive(shared_data/'imagenet_sample.tar', tmp_path)
    pack(model_parts(tmp_path/'imagenet_sample'/'train'), tmp_path/'small', read=read_image, max_side=320)
    copies = Part(open_pack(tmp_path/'small')['train'].items[np.arange(20_000) % 500])
    pack(dict(train=copies), tmp_path/'many', read=lambda raw: torch.zeros(3, 1, 1))
    dl = get_dls(tmp_path/'many', override(RECIPES['pretrain'], dict(batch_size=50)), img_size=224, num_workers=2, device='cpu').train
    def mib(): return sum(int(re.search(r'^Pss: +(\d+)', Path(f'/proc/{p}/smaps_rollup').read_text(), re.M)[1]) for p in ('self', *(w.pid for w in dl.dl._iterator._workers))) / 1024
    found = [mib() for n, _ in enumerate(dl) if n % 40 == 39]
    print(f'MiB of three processes after every 2,000 photographs: {[round(x) for x in found]}')
    assert len(found) == 10 and max(found[1:]) - found[0] < 25

def test_a_packed_set_is_checked_like_its_folder(forked, photos, tmp_path):
    pack(model_parts(photos), tmp_path/'packed', read=read_image, per_shard=50)
    (photos/'odd'/'005.png').write_bytes((photos/'odd'/'007.png').read_bytes())
    found = {}
    for data in ('photos', 'packed'):
        got = forked('mae-check', data, '--num-workers', '0', '--json', f'{data}.json')
        assert got.code == 0, got.err
        found[data] = json.loads((tmp_path/f'{data}.json').read_text())
    assert [len(f['duplicates']) for f in found.values()] == [1, 0]
    assert found['packed']['parts']['train']['classes'] == {'even': 60, 'odd': 60}

def test_a_bad_step_on_packed_data_names_its_pictures(photos, tmp_path):
    class Poison(Callback):
        def after_backward(self): next(p for p in self.model.parameters() if p.grad is not None).grad.fill_(float('nan'))
    pack(model_parts(photos), tmp_path/'packed', read=read_image, per_shard=50)
    recipe = override(RECIPES['pretrain_cifar10'], dict(batch_size=10, target='pixels'))
    model = create_mae('mae_vit_nano_patch4_32', target='pixels', dim=32, depth=1, num_heads=2, decoder_dim=32, decoder_depth=1)
    dls = get_dls(tmp_path/'packed', recipe, img_size=32, num_workers=0, device='cpu')
    with pytest.raises(FloatingPointError, match='10 steps in a row'): pretrain_learner(dls, model, recipe, out=make_run(tmp_path/'run', {}), cbs=[Poison()]).fit(1)
    step = json.loads(next((tmp_path/'run'/'bad_steps').glob('*/step.json')).read_text())
    assert len(step['files']) == 10 and all('.png in ' in f for f in step['files'])

@pytest.mark.parametrize('how', ['folder', 'packed'])
def test_labels_and_sizes_that_cannot_work_are_told(forked, tmp_path, how):
    "Of a folder or packed: the same line either way, by the first command that meets it."
    rng = np.random.default_rng(0)
    def make(name, *where):
        for place in where:
            for i in range(3):
                (tmp_path/name/place).mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(tmp_path/name/place/f'{i}.png')
    make('flat', 'train'); make('one', 'train/cat'); make('more', 'train/cat', 'train/dog', 'val/owl'); make('two', 'train/cat', 'train/dog', 'val/dog')
    words = '--model', 'mae_vit_nano_patch4_32', '--max-steps', '1', '--set', 'amp=False', '--num-workers', '0'
    def told(command, name, *more):
        if how == 'packed':
            got = forked('mae-pack', name, f'{name}-packed', '--num-workers', '0')
            if got.code: return got
        return forked(command, name if how == 'folder' else f'{name}-packed', *words, *more, '--out', f'run-{command}-{name}')
    for name, bs, line in (('flat', 2, 'has no labels'), ('one', 2, "has one class only, 'cat'"), ('more', 2, 'holds classes that the training set lacks: owl'), ('two', 8, 'use --bs 6 or less')):
        got = told('mae-finetune', name, '--from-scratch', '--bs', bs)
        assert got.code == 2 and line in got.line, got
    for name in ('flat', 'one'): assert told('mae-pretrain', name, '--bs', 2).code == 0   # needs no labels
    got = told('mae-finetune', 'two', '--from-scratch', '--bs', 2)                          # three in val: the last batch has one
    assert got.code == 0, got
