"""A newcomer's mistakes, with photographs of his own: each ends in one line with what, where and what to do.

`test_commands` has those with recipes, models and run folders.
"""
import shutil
import zipfile

import pytest
from PIL import Image
from support import begin_command

from mae_nb.data import check, packing  # noqa: F401  a fork then need not import them
from mae_nb.tasks import finetune, pretrain, probes, replay, visualize  # noqa: F401
from mae_nb.weights import convert  # noqa: F401

NANO = '--model', 'mae_vit_nano_patch4_32', '--bs', '8', '--max-steps', '2', '--num-workers', '0'


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "Photographs in two classes, one of them turned, a PDF and others that are none, and a run."
    home = tmp_path_factory.mktemp('home')
    for i in range(24):
        for place in (home/'photos'/('cats' if i % 2 else 'dogs'), home/'flat', home/'one_class'/'cats'):
            place.mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (48, 40), (10 * i, 255 - 10 * i, 99)).save(place/f'IMG_{i:04}.JPG')
    turned = Image.new('RGB', (64, 40), 'red')
    turned.getexif()[0x112] = 6
    (home/'mine').mkdir()
    turned.save(home/'mine'/'turned.jpg', exif=turned.getexif())
    for name, data in (('bill.pdf', b'%PDF-1.4\n'), ('scan.jpg', b'%PDF-1.4\n'), ('web.png', b'<html>404</html>'),
                       ('phone.jpg', b'\0\0\0\x18ftypheic' + bytes(99)), ('IMG_1.CR2', bytes(99))):
        (home/'mine'/name).write_bytes(data)
    (home/'empty').mkdir()
    with zipfile.ZipFile(home/'photos.zip', 'w') as archive:
        archive.write(home/'flat'/'IMG_0001.JPG', 'IMG_0001.JPG')
    (home/'notes.txt').write_text('hello')
    got = begin_command(home, 'mae-pretrain', 'photos', *NANO, '--out', 'runs/pretrain-1')[1]()
    assert got.code == 0, got
    return home


MISTAKES = [
    ('mae-pretrain fotos', "'fotos': did you mean 'photos'?"),
    ('mae-pretrain my-pictures', "'my-pictures': known: 'fashion', 'cifar10', 'stl10', "),
    ('mae-pretrain ./foto', "no such folder: ./foto: did you mean 'photos'?"),
    ('mae-pretrain photos.zip', 'photos.zip is a file and no folder: unpack it, and name the folder'),
    ('mae-check photos.zip', 'photos.zip is a file and no folder: unpack it'),
    ('mae-pretrain flat/IMG_0001.JPG', 'flat/IMG_0001.JPG is a file and no folder: name the folder that it is in'),
    ('mae-check empty', 'no images in empty: expected files such as .jpg'),
    ('mae-finetune flat runs/pretrain-1', 'flat has no labels: put the images of each class into a folder of its own'),
    ('mae-finetune one_class runs/pretrain-1', "one_class has one class only, 'cats': there is nothing to tell apart"),
    ('mae-pretrain photos --epohcs 3', 'unknown flag --epohcs, did you mean --epochs?; see mae-pretrain --help'),
    ('mae-pretrain photos --epochs', '--epochs needs a whole number behind it; see mae-pretrain --help'),
    ('mae-pretrain photos --epochs ten', "--epochs takes a whole number, got 'ten'"),
    ('mae-pretrain photos --img-size big', "--img-size takes a number of pixels, or rows,columns, got 'big'"),
    ('mae-pretrain photos more', "there is no place for the word 'more': paths with spaces need quotes"),
    ('mae-convert runs/pretrain-1', 'to is missing: the file to write, or for hf, onnx and torch-export the'),
    ('mae-pretrain photos --model vit_base', "unknown model 'vit_base': did you mean 'mae_vit_base_patch16'?"),
    ('mae-pretrain photos --img-size 225 --bs 8', '225x225 pixels is not divisible by patch size 16: use a multiple'),
    ('mae-finetune photos runs/pretrain-1 --img-size 30', '30x30 pixels is not divisible by patch size 4'),
    ('mae-pretrain --resume photos', 'photos is no run folder: it has no config.json'),
    ('mae-pretrain --resume runs/pretrian-1', 'runs/pretrian-1 is no run folder: it does not exist'),
    ('mae-finetune photos', 'name either the weights to start from or --from-scratch'),
    ('mae-finetune photos flat/IMG_0001.JPG', 'no file of torch.save, or holds more than tensors: name a run'),
    ('mae-finetune photos notes.txt', 'notes.txt cannot be read as weights: it is no file of torch.save: name a run'),
    ('mae-finetune photos runs', 'runs holds no model.safetensors and no checkpoint: name a run'),
    ('mae-finetune runs/pretrain-1 photos', 'photos holds no model.safetensors and no checkpoint: name a run folder'),
    ('mae-probe photos runs/pretrain-1', "unknown probe 'photos': known: 'linear', 'partial', 'attentive', 'knn'"),
    ('mae-show runs/pretrain-1', 'name at least one image file'),
    ('mae-show runs/pretrain-1 photos', 'photos is a folder: name image files in it, such as photos/*.jpg'),
    ('mae-show runs/pretrain-1 nowhere.jpg', 'no such image file: nowhere.jpg'),
    ('mae-show runs/pretrain-1 mine/bill.pdf', 'mine/bill.pdf cannot be read as an image: a PDF document'),
    ('mae-show runs/pretrain-1 mine/phone.jpg',
     'a HEIC picture, damaged or without its reader (the extra heic): save it as JPEG or PNG'),
    ('mae-show mine/turned.jpg runs/pretrain-1', 'mine/turned.jpg cannot be read as weights: it is no'),
    ('mae-pack flat', 'flat is not packed, so it cannot be checked: name the folder to pack it into, such'),
    ('mae-pack photos photos', 'photos exists already and is not empty: name another folder'),
    ('mae-replay runs/pretrain-1', "holds no step: it has no step.json: name a folder in a run's bad_steps"),
]


@pytest.mark.parametrize('line, message', MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_is_one_line_that_says_what_to_do(line, message, home):
    name, *words = line.split()
    got = begin_command(home, name, *words)[1]()
    assert got.code == 2 and message in got.line, got


def test_photographs_with_other_files_among_them(home):
    "What is passed over is counted, what cannot be read is named with what it is, what is turned is upright."
    got = begin_command(home, 'mae-check', 'mine', '--json', 'mine.json')[1]()
    assert got.code == 1 and not got.err, got
    assert 'smallest 64 x 40, largest 64 x 40' in got.out   # turned
    assert '2 files (1 .cr2, 1 .pdf) passed over' in got.out
    for line in ('mine/scan.jpg: ValueError: a PDF document', 'mine/web.png: ValueError: a web page and no picture'):
        assert line in got.out, got.out


def test_a_disk_quota(home, tmp_path):
    "A file that may not grow, as on a disk whose quota is used up: one line, exit code 1, nothing half written."
    import resource

    shutil.copytree(home/'photos', tmp_path/'photos')

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
    got = begin_command(tmp_path, 'mae-pretrain', 'photos', *NANO, '--out', 'run', before=limit)[1]()
    assert got.code == 1 and 'no space left on the disk' in got.line, got
    assert not list((tmp_path/'run').rglob('*.part')) and (tmp_path/'run'/'config.json').read_text().endswith('}\n')
