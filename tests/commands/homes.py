"""The folder of somebody who follows README and tutorials: photographs, ImageNet's tars, and runs of a few steps."""
import io
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
from command_lines import NANO, PACKED, QUICK
from PIL import Image
from scipy.io import savemat

from mae_nb.data.archives import DEVKIT, TRAIN_TAR, VAL_TAR

WNIDS = 'n00000001', 'n00000002'
SICK = '''
from fastai.callback.core import Callback
from mae_nb.tasks.pretrain import PretrainOptions, pretrain_setup

class Break(Callback):
    "Makes one weight infinite."
    def before_fit(self):
        self.model.encoder.blocks[1].mlp.fc2.weight.data[0, 0] = float('inf')

learn = pretrain_setup(PretrainOptions('path/to/photos', model='mae_vit_nano_patch4_32', bs=2, num_workers=0,
                                       out='runs/big'))
learn.add_cb(Break())
try:
    learn.fit_recipe()
except FloatingPointError:   # as it should
    pass
'''


def photograph(i: int, rows: int = 72, columns: int = 96) -> Image.Image:
    "A smooth picture of many colours."
    tone = np.random.default_rng(i).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(tone).resize((columns, rows), Image.BICUBIC)


def save_folder(folder: Path, count: int):
    "Photographs in two classes."
    for i in range(count):
        place = folder/('cats' if i % 2 else 'dogs')
        place.mkdir(parents=True, exist_ok=True)
        photograph(i).save(place/f'{i:03}.jpg')


def save_pairs(folder: Path, count: int):
    "Photographs, and masks of the numbers 0, 1 and 2."
    for part in ('images', 'masks'):
        (folder/part).mkdir(parents=True)
    for i in range(count):
        photograph(i).save(folder/'images'/f'{i:03}.jpg')
        numbers = np.kron(np.random.default_rng(i).integers(0, 3, (6, 8), dtype=np.uint8), np.ones((12, 12), np.uint8))
        Image.fromarray(numbers).save(folder/'masks'/f'{i:03}.png')


def _add(tar: tarfile.TarFile, name: str, data: bytes):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _jpeg(i: int) -> bytes:
    file = io.BytesIO()
    photograph(i, 40, 48).save(file, 'jpeg')
    return file.getvalue()


def save_ilsvrc(folder: Path, train: int = 12, val: int = 4):
    "ImageNet's three files, with two classes of so many pictures each."
    folder.mkdir(parents=True)
    with tarfile.open(folder/TRAIN_TAR, 'w') as tar:
        for number, wnid in enumerate(WNIDS):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode='w') as class_tar:
                for i in range(train):
                    _add(class_tar, f'{wnid}_{i}.JPEG', _jpeg(100 * number + i))
            _add(tar, f'{wnid}.tar', inner.getvalue())
    with tarfile.open(folder/VAL_TAR, 'w') as tar:
        for i in range(2 * val):
            _add(tar, f'ILSVRC2012_val_{i + 1:08}.JPEG', _jpeg(1000 + i))
    table = io.BytesIO()
    savemat(table, dict(synsets=np.array([(2, WNIDS[0]), (1, WNIDS[1])], [('ILSVRC2012_ID', 'O'), ('WNID', 'O')])))
    with tarfile.open(folder/DEVKIT, 'w:gz') as kit:
        _add(kit, 'ILSVRC2012_devkit_t12/data/meta.mat', table.getvalue())
        _add(kit, 'ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt', b'2\n1\n' * val)


def make_home(home: Path, watcher):
    "Everything that a shown command line reads; the runs are made by the commands themselves."
    for place in ('path/to/photos', 'path/to/labelled', 'path/to/imagenet/train', 'data/imagenet'):
        save_folder(home/place, 24)
    for i, name in enumerate(('one.jpg', 'another.png')):
        photograph(i).save(home/name)
    save_ilsvrc(home/'data'/'ilsvrc')
    save_pairs(home/'path'/'to'/'pairs', 20)

    def run(*words):
        got = watcher.run(words, home, terminal=False)
        assert got.code == 0, got.err

    few = QUICK.split()
    run('python', SICK)
    steps = home/'runs'/'big'/'bad_steps'
    next(steps.iterdir()).rename(steps/'epoch-3-batch-120')
    run('mae-pack', 'data/ilsvrc', 'data/packed', '--num-workers', '0')
    shutil.copytree(home/'data'/'packed', home/'packed')
    tiny = '--model', 'mae_vit_tiny_patch16', '--recipe', 'pretrain_small'
    run('mae-pretrain', 'path/to/photos', *tiny, *few, '--out', 'of_photos')
    run('mae-pretrain', 'fashion', '--bs', '50', '--max-steps', '2', '--set', 'warmup_epochs=0', '--out', 'of_fashion')
    run('mae-pretrain', 'data/packed', *PACKED.split(), '--out', 'runs/base')
    run('mae-finetune', 'data/packed', 'runs/base', *few, '--out', 'runs/base-ft')
    run('mae-finetune', 'path/to/labelled', '--from-scratch', *NANO.split(), *few, '--out', 'runs/finetune-1')
    run('mae-segment', 'path/to/pairs', '--from-scratch', *NANO.split(), *few, '--recipe', 'segment_small', '--head',
        'linear', '--out', 'runs/segment-1')
    for name in ('photos.parquet', 'photos.npy'):
        run('mae-embed', 'path/to/photos', 'of_photos', '--out', name, '--num-workers', '0')
    for name in ('large', 'huge'):
        shutil.copytree(home/'runs'/'base', home/'runs'/name)
    assert NANO.split()[1] in (home/'runs'/'base'/'config.json').read_text()


def copy_home(home: Path, folder: Path, words: list) -> Path:
    "A home for one command: `runs/pretrain-1` is of its data, and what it will write does not exist."
    shutil.copytree(home, folder, dirs_exist_ok=True, copy_function=os.link)
    kind = 'of_fashion' if 'fashion' in words else 'of_photos'
    shutil.copytree(home/kind, folder/'runs'/'pretrain-1')
    shutil.copytree(home/'runs'/'big'/'bad_steps', folder/'runs'/'pretrain-1'/'bad_steps')
    written = [words[words.index('--out') + 1]] if '--out' in words else []
    written += words[2:3] if words[0] in ('mae-pack', 'mae-convert') else []
    for place in written:
        if (folder/place).is_dir():
            shutil.rmtree(folder/place)
        (folder/place).unlink(missing_ok=True)
    return folder
