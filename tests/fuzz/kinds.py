"""What is damaged: how valid ones are made, and who reads them."""
import io
import json
import sys
import tarfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from mae_nb import commands
from mae_nb.base.tables import add_row, read_metrics, start_table
from mae_nb.data.archives import TRAIN_TAR
from mae_nb.data.datasets import read_source
from mae_nb.data.fingerprint import list_data, read_listing
from mae_nb.data.images import jpeg_head, read_image
from mae_nb.data.packing import pack_source, packable_parts
from mae_nb.model.mae import create_mae
from mae_nb.tasks.pretrain import PretrainOptions
from mae_nb.training.presets import RECIPES
from mae_nb.training.runs import make_run, read_options
from mae_nb.training.state import read_checkpoint, save_checkpoint
from mae_nb.weights.building import load_encoder
from mae_nb.weights.convert import convert

NANO = dict(img_size=32, dim=16, depth=1, num_heads=2, decoder_dim=16, decoder_depth=1, decoder_heads=2)


@dataclass
class Kind:
    "Valid inputs, and the function that reads a damaged one."
    make: Callable      # folder -> files, or lists of words
    read: Callable      # file, or words -> anything
    is_checked: bool = False   # a checksum of ours must tell any damage: what is read is what was written
    is_named: bool = True   # errors name the file
    words: bool = False


def picture(seed=0, mode='RGB', size=(48, 40)):
    "Smooth colours and a little noise, as photographs have."
    rng = np.random.default_rng(seed)
    x, y = np.meshgrid(np.linspace(0, 6, size[0]), np.linspace(0, 5, size[1]))
    planes = [127 + 90 * np.sin(x * (k + 1) + y) + rng.normal(0, 4, x.shape) for k in range(3)]
    return Image.fromarray(np.stack(planes, -1).clip(0, 255).astype(np.uint8)).convert(mode)


def encoded(seed=0, form='JPEG', mode='RGB', **options):
    file = io.BytesIO()
    picture(seed, mode).save(file, form, **options)
    return file.getvalue()


# ---- pictures -------------------------------------------------------------------------------------------------------

def make_pictures(folder):
    turned = Image.Exif()
    turned[0x112] = 6
    wide = Image.fromarray((np.asarray(picture(1, 'L')).astype(np.uint16) * 256))
    wide.save(folder/'wide.png')
    forms = [('plain.jpg', 'JPEG', 'RGB', {}), ('progressive.jpg', 'JPEG', 'RGB', dict(progressive=True)),
             ('grey.jpg', 'JPEG', 'L', {}), ('cmyk.jpg', 'JPEG', 'CMYK', {}),
             ('turned.jpg', 'JPEG', 'RGB', dict(exif=turned)),
             ('plain.png', 'PNG', 'RGB', {}), ('alpha.png', 'PNG', 'RGBA', {}), ('palette.png', 'PNG', 'P', {}),
             ('plain.webp', 'WEBP', 'RGB', {}), ('plain.gif', 'GIF', 'P', {}), ('plain.bmp', 'BMP', 'RGB', {}),
             ('plain.tif', 'TIFF', 'RGB', {}), ('packed.tif', 'TIFF', 'RGB', dict(compression='tiff_lzw'))]
    for n, (name, form, mode, options) in enumerate(forms):
        (folder/name).write_bytes(encoded(n, form, mode, **options))
    return sorted(folder.iterdir())


def read_picture(file):
    data = file.read_bytes()
    if data[:2] == b'\xff\xd8':
        jpeg_head(data)
    for channels in (1, 3):
        image = read_image(io.BytesIO(data), channels, lambda whole: 2)
        assert image.dtype == torch.uint8 and image.ndim == 3 and len(image) == channels, image.shape


# ---- data sets ------------------------------------------------------------------------------------------------------

def read_all(folder):
    "A set with every picture; one that cannot be read is its loader's affair."
    for images in filter(None, read_source(folder)):
        for i in range(len(images)):
            try:
                images.read(i)
            except (OSError, ValueError):
                images.file(i)


def add_bytes(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def make_tar(folder):
    with tarfile.open(folder/TRAIN_TAR, 'w') as outer:
        for wnid in ('n01440764', 'n01443537'):
            inside = io.BytesIO()
            with tarfile.open(fileobj=inside, mode='w') as inner:
                for i in range(2):
                    add_bytes(inner, f'{wnid}_{i}.JPEG', encoded(i))
            add_bytes(outer, f'{wnid}.tar', inside.getvalue())
    return [folder/TRAIN_TAR]


def make_parquet(folder):
    import pyarrow as pa
    import pyarrow.parquet as pq
    rows = [dict(bytes=encoded(i), path=f'{i}.jpg') for i in range(4)]
    pq.write_table(pa.table(dict(image=rows, label=[0, 1, 1, 0])), folder/'train.parquet')
    return [folder/'train.parquet']


def read_parquet(file):
    for part in packable_parts(file.parent).values():
        for i in range(len(part.items)):
            part.items[i]


def make_pack(folder):
    for i in range(4):
        file = folder/'photos'/'ab'[i % 2]/f'{i}.jpg'
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(i))
    pack_source(folder/'photos', folder/'packed', per_shard=2, num_workers=0)
    return sorted(f for f in (folder/'packed').iterdir() if f.suffix in ('.json', '.arrow'))


def read_pack(file):
    "As `mae-pack FOLDER` checks it."
    return pack_source(file.parent)


# ---- weights --------------------------------------------------------------------------------------------------------

def nano():
    torch.manual_seed(0)
    return create_mae('mae_vit_nano_patch4_32', **NANO)


def make_weights(folder):
    save_file(nano().state_dict(), folder/'model.safetensors', metadata=dict(config=json.dumps(nano().config)))
    torch.save(dict(model=nano().state_dict(), epoch=3), folder/'plain.pth')
    return sorted(folder.iterdir())


def make_configs(folder):
    save_file(nano().state_dict(), folder/'ours.safetensors', metadata=dict(config=json.dumps(nano().config)))
    convert(folder/'ours.safetensors', folder/'hf', 'hf', 'pixels', num_heads=2, decoder_heads=2)
    return sorted((folder/'hf').glob('*.json'))


def make_checkpoints(folder):
    config = dict(run=dict(fit=0, step=7), model=nano().config)
    return [save_checkpoint(folder, 7, nano().state_dict(), config)]


def read_saved(file):
    tensors, config = read_checkpoint(file)
    return {name: t.tolist() for name, t in tensors.items()}, config


# ---- runs -----------------------------------------------------------------------------------------------------------

def make_record(folder):
    options = PretrainOptions(str(folder/'photos'), epochs=2)
    recipe = asdict(RECIPES['pretrain_fashion'])
    run = make_run(folder/'run', dict(task='pretrain', options=options.as_config(), recipe=recipe, model=nano().config))
    start_table(run/'metrics.csv', ['epoch', 'train_loss', 'valid_loss', 'lr', 'skipped'])
    for epoch in range(3):
        add_row(run/'metrics.csv', [epoch, .9 - .1 * epoch, .8, 1e-3, 0])
    for i in range(4):
        file = folder/'photos'/'ab'[i % 2]/f'{i}.jpg'
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(i))
    list_data([read_source(folder/'photos')[0]]).save(run/'data.npz')
    return [run/'config.json', run/'metrics.csv', run/'data.npz']


def read_record(file):
    readers = dict(config=lambda: read_options(file.parent), metrics=lambda: read_metrics(file.parent),
                   data=lambda: read_listing(file))
    readers[file.stem]()


# ---- command lines --------------------------------------------------------------------------------------------------

LINES = """
mae-plan pretrain --model mae_vit_base_patch16 --gpus 8 --rate H100 --bs 4096 --epochs 800 --price 2.5
mae-plan finetune --rate H100 --memory 80 --img-size 224,448 --set drop_path=.2
mae-pretrain fashion --epochs 2 --bs 64 --set mask_ratio=.6 --set warmup_epochs=1 --seed 3 --num-workers 0
mae-finetune fashion weights --epochs 3 --bs 32 --set layer_decay=.75 --device cpu
mae-probe linear fashion weights --fast --set pool=avg
mae-probe partial fashion weights --blocks .5 --epochs 2
"""


def make_lines(folder): return [line.split() for line in LINES.strip().splitlines()]


def only_read(options):
    "In place of a task: all that is done before its data are opened."
    options.read_recipe()
    if hasattr(options, 'check'):
        options.check()


def read_line(words):
    "A command that ends in anything but 0 has told why in one line."
    tasks = ('mae_nb.tasks.pretrain.pretrain', 'mae_nb.tasks.finetune.finetune', 'mae_nb.tasks.probes.probe')
    name, said = words[0].replace('-', '_'), io.StringIO()
    caller = {'__name__': '__main__', 'command': getattr(commands, name)}
    with ExitStack() as changes:
        for name, value in (('argv', words), ('stderr', said), ('stdout', io.StringIO())):
            changes.enter_context(patch.object(sys, name, value))
        for task in tasks:
            changes.enter_context(patch(task, only_read))
        try:
            exec('command()', caller)
            code = 0
        except SystemExit as e:
            code = e.code
    lines = [line for line in said.getvalue().splitlines() if line.strip()]
    errors = [line for line in lines if ': error: ' in line]
    if code and (len(errors) != 1 or errors[0].endswith(('Error', "'")) and len(errors[0]) < 40):
        raise KeyError(f'exit code {code}: {lines}')
    if code:
        raise ValueError(errors[0])


KINDS = dict(
    pictures=Kind(make_pictures, read_picture, is_named=False),
    tar=Kind(make_tar, lambda file: read_all(file.parent)),
    parquet=Kind(make_parquet, read_parquet),
    pack=Kind(make_pack, read_pack, is_checked=True),
    weights=Kind(make_weights, lambda file: load_encoder(file, num_heads=2, decoder_heads=2)),
    configs=Kind(make_configs, lambda file: load_encoder(file.parent)),
    checkpoints=Kind(make_checkpoints, read_saved, is_checked=True),
    record=Kind(make_record, read_record),
    lines=Kind(make_lines, read_line, is_named=False, words=True),
)
