"""Packed data: read by any process from any place, the same samples as from the files."""
import json
import re
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from made_images import equal_batches, loaded_batches
from PIL import Image
from torch.utils.data import DataLoader

from mae_nb.base.stores import StoreError
from mae_nb.data.archives import Part
from mae_nb.data.crops import train_transform
from mae_nb.data.datasets import load_source
from mae_nb.data.loader import Loader, Samples, collate, get_dls
from mae_nb.data.packing import packable_parts
from mae_nb.data.shards import open_pack, pack
from mae_nb.model.mae import create_mae
from mae_nb.tasks.pretrain import pretrain_learner
from mae_nb.training.presets import RECIPES
from mae_nb.training.recipes import override
from mae_nb.training.runs import make_run
from mae_nb.weights.building import load_mae

pytest.importorskip('pyarrow')
RECIPE = override(RECIPES['pretrain'], dict(batch_size=16))

@pytest.fixture
def packed(photos, tmp_path):
    "The photos in three shards."
    pack(packable_parts(photos), tmp_path/'packed', per_shard=50)
    return tmp_path/'packed'

def test_training_from_packed_is_training_from_the_folder(forked, photos, tmp_path):
    assert forked('mae-pack', 'photos', 'packed', '--per-shard', '50', '--num-workers', '0').code == 0
    words = '--model', 'mae_vit_nano_patch4_32', '--set', 'amp=False', '--max-steps', '2', '--bs', '20'
    for data in ('photos', 'packed'):
        said = forked('mae-pretrain', data, *words, '--num-workers', '0', '--out', f'run-{data}')
        assert said.code == 0, said.err
    a, b = (load_mae(tmp_path/f'run-{data}').state_dict() for data in ('photos', 'packed'))
    assert all(torch.equal(v, b[k]) for k, v in a.items())

@pytest.mark.parametrize('how', ['fork', 'spawn'])
def test_workers_however_they_start(packed, how):
    "A set that was read from before its workers start; each opens its own files."
    samples = Samples(load_source(packed)[0], (24, 24), 0, train_transform)
    order = [[(0, int(i)) for i in ids] for ids in np.random.default_rng(0).permutation(120).reshape(6, 20)]
    here = [collate([samples[place] for place in batch]) for batch in order]
    there = DataLoader(samples, batch_sampler=order, num_workers=2 if how == 'fork' else 1, collate_fn=collate,
                       multiprocessing_context=how)
    assert equal_batches([batch[:3] for batch in here], [batch[:3] for batch in there])

def test_a_bad_picture_in_a_shard_is_called_by_its_name(photos, tmp_path, capsys):
    (photos/'odd'/'005.png').write_bytes(b'garbage')
    pack(packable_parts(photos), tmp_path/'packed', read=lambda raw: None)   # unchecked
    loader = Loader(Samples(load_source(tmp_path/'packed')[0], (24, 24)), 20)
    assert sum(len(index) for _, index, _ in loader) == 120
    assert 'could not read odd/005.png in ' in capsys.readouterr().out

def test_a_split_of_a_packed_set_reads_nothing(packed):
    images = load_source(packed)[0]
    looked = set(images.items.opened)   # its first record tells how many channels it has
    some = images.take([7, 119, 0])
    assert looked == set(images.items.opened) == {0} and not some.items.opened
    assert torch.equal(some.read(1), images.read(119)) and some.labels.tolist() == [0, 1, 0]

@pytest.fixture(params=['file', 'memory'])
def bucket(request, packed):
    "The packed folder's address in an object store, as pyarrow knows it or as fsspec does; and how to write there."
    if request.param == 'file':
        yield f'file://{packed}', lambda name, data: (packed/name).write_bytes(data)
        return
    store = fsspec.filesystem('memory')
    store.put(str(packed), '/bucket', recursive=True)
    yield 'memory://bucket', lambda name, data: store.pipe(f'/bucket/{name}', data)
    store.rm('/bucket', recursive=True)

def test_an_object_store_s_shards_are_cached_and_checked(bucket, packed, tmp_path):
    (uri, write), cache, here = bucket, tmp_path/'cache', open_pack(packed)['train'].items
    items = open_pack(uri, cache)['train'].items
    first, other = here[0], here[60]
    assert items[60] == other and [f.name for f in cache.rglob('*.arrow')] == ['train-00001.arrow']
    good = (packed/'train-00000.arrow').read_bytes()
    write('train-00000.arrow', good[:-1] + b'?')
    with pytest.raises(StoreError, match='train-00000.arrow is not what was packed'):
        items[0]
    write('train-00000.arrow', good)
    write('train-00001.arrow', b'')
    assert (items[0], items[60]) == (first, other)   # the second is in the cache

def test_training_from_an_object_store_is_training_from_the_folder(bucket, packed, tmp_path, monkeypatch):
    monkeypatch.setenv('MAE_NB_DOWNLOADS', str(tmp_path/'downloads'))
    assert equal_batches(loaded_batches(bucket[0], RECIPE, 2, 1), loaded_batches(packed, RECIPE, 0, 1))
    assert len(list((tmp_path/'downloads').rglob('*.arrow'))) == 3

def test_an_address_that_nobody_knows_is_told(forked):
    for address, message in (('bucket://x/y', 'bucket'), ('memory://not/there', 'not/there')):
        said = forked('mae-pretrain', address)
        assert said.code == 2 and message in said.line, said

def resident_mib():
    lines = Path('/proc/self/status').read_text().splitlines()
    return int(next(line for line in lines if line.startswith('VmRSS')).split()[1]) / 1024

@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='tells its memory only on Linux')
def test_memory_stays_flat(photos, tmp_path):
    pack(packable_parts(photos), tmp_path/'packed', per_shard=8)
    items = open_pack(tmp_path/'packed')['train'].items
    list(items)
    before = resident_mib()
    for _ in range(50):
        for i in range(120):
            items[i]
    assert resident_mib() - before < 5   # of 35 MB read

def proportional_mib(pids):
    "The memory of some processes together, shared pages counted once."
    reports = [Path(f'/proc/{pid}/smaps_rollup').read_text() for pid in pids]
    return sum(int(re.search(r'^Pss: +(\d+)', report, re.M)[1]) for report in reports) / 1024

@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/smaps_rollup').exists(), reason='tells its memory only on Linux')
def test_memory_stays_flat_over_20_000_photographs_and_two_workers(shared_data, tmp_path):
    shutil.unpack_archive(shared_data/'imagenet_sample.tar', tmp_path)
    pack(packable_parts(tmp_path/'imagenet_sample'/'train'), tmp_path/'small', max_side=320)
    copies = Part(open_pack(tmp_path/'small')['train'].items[np.arange(20_000) % 500])
    pack(dict(train=copies), tmp_path/'many', read=lambda raw: torch.zeros(3, 1, 1))
    recipe = override(RECIPES['pretrain'], dict(batch_size=50))
    loader = get_dls(tmp_path/'many', recipe, img_size=224, num_workers=2, device='cpu').train
    mib = []
    for n, _ in enumerate(loader):
        if n % 40 == 39:
            workers = loader.dl._iterator._workers
            mib.append(proportional_mib(['self', *(w.pid for w in workers)]))
    print(f'MiB of three processes after every 2,000 photographs: {[round(x) for x in mib]}')
    assert len(mib) == 10 and max(mib[1:]) - mib[0] < 25

def test_a_packed_set_is_checked_like_its_folder(forked, photos, packed, tmp_path):
    (photos/'odd'/'005.png').write_bytes((photos/'odd'/'007.png').read_bytes())
    reports = {}
    for data in ('photos', 'packed'):
        said = forked('mae-check', data, '--num-workers', '0', '--json', f'{data}.json')
        assert said.code == 0, said.err
        reports[data] = json.loads((tmp_path/f'{data}.json').read_text())
    assert [len(report['duplicates']) for report in reports.values()] == [1, 0]
    assert reports['packed']['parts']['train']['classes'] == {'even': 60, 'odd': 60}

class Poison(Callback):
    "Makes a gradient a NaN in every step."
    def after_backward(self):
        next(p for p in self.model.parameters() if p.grad is not None).grad.fill_(float('nan'))

def test_a_bad_step_on_packed_data_names_its_pictures(packed, tmp_path):
    recipe = override(RECIPES['pretrain_cifar10'], dict(batch_size=10, target='pixels'))
    sizes = dict(dim=32, depth=1, num_heads=2, decoder_dim=32, decoder_depth=1)
    model = create_mae('mae_vit_nano_patch4_32', target='pixels', **sizes)
    dls = get_dls(packed, recipe, img_size=32, num_workers=0, device='cpu')
    learn = pretrain_learner(dls, model, recipe, out=make_run(tmp_path/'run', {}), cbs=[Poison()])
    with pytest.raises(FloatingPointError, match='10 steps in a row'):
        learn.fit(1)
    step = json.loads(next((tmp_path/'run'/'bad_steps').glob('*/step.json')).read_text())
    assert len(step['files']) == 10 and all('.png in ' in file for file in step['files'])

FOLDERS = dict(flat=['train'], one=['train/cat'], more=['train/cat', 'train/dog', 'val/owl'],
               two=['train/cat', 'train/dog', 'val/dog'])

def make_folders(root):
    "For each of `FOLDERS` three images in each of its places."
    rng = np.random.default_rng(0)
    for name, places in FOLDERS.items():
        for place in places:
            (root/name/place).mkdir(parents=True, exist_ok=True)
            for i in range(3):
                pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root/name/place/f'{i}.png')

@pytest.mark.parametrize('how', ['folder', 'packed'])
def test_labels_and_sizes_that_cannot_work_are_told(forked, tmp_path, how):
    "Of a folder or packed: the same line either way, by the first command that meets it."
    make_folders(tmp_path)
    words = '--model', 'mae_vit_nano_patch4_32', '--max-steps', '1', '--set', 'amp=False', '--num-workers', '0'
    def train(command, name, *more):
        if how == 'packed':
            said = forked('mae-pack', name, f'{name}-packed', '--num-workers', '0')
            if said.code:
                return said
        data = name if how == 'folder' else f'{name}-packed'
        return forked(command, data, *words, *more, '--out', f'run-{command}-{name}')

    refused = dict(flat=(2, 'has no labels'), one=(2, "has one class only, 'cat'"), two=(8, 'use --bs 6 or less'),
                   more=(2, 'holds classes that the training set lacks: owl'))
    for name, (bs, message) in refused.items():
        said = train('mae-finetune', name, '--from-scratch', '--bs', bs)
        assert said.code == 2 and message in said.line, said
    for name in ('flat', 'one'):   # pretraining needs no labels
        assert train('mae-pretrain', name, '--bs', 2).code == 0
    said = train('mae-finetune', 'two', '--from-scratch', '--bs', 2)   # three in val: the last batch has one
    assert said.code == 0, said
