"""A run that resumes on other data than it was started with says so."""
import shutil

import numpy as np
import pytest
from PIL import Image
from support import begin_command
from tiny_runs import WORDS  # noqa: F401  imports what forks would import again

TINY = ('--model', 'mae_vit_nano_patch4_32', '--set', 'amp=False', '--set', 'warmup_epochs=0', '--num-workers', '0',
        '--bs', '10')

@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "A folder with 40 photos in three classes, a validation set, and a run; and next to it a copy, as it was."
    place, rng = tmp_path_factory.mktemp('data')/'here', np.random.default_rng(0)
    for i in range(46):
        part, name = ('train', ('ant', 'bee', 'cat')[i % 3]) if i < 40 else ('val', 'ant')
        file = place/'photos'/part/name/f'{i}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(file)
    got = begin_command(place, 'mae-pretrain', 'photos', *TINY, '--epochs', '2', '--out', 'run')[1]()
    assert got.code == 0, got.err
    (place/'run'/'checkpoints'/'fit-1.done').unlink()   # ended behind its last checkpoint
    shutil.copytree(place, place.parent/'kept')
    return place

@pytest.fixture
def tmp_path(place):
    "The same folder for all tests here, each time as it was: a run knows where its data is."
    shutil.rmtree(place)
    return shutil.copytree(place.parent/'kept', place)

@pytest.fixture
def stopped(tmp_path):
    return tmp_path/'photos'

def replace(photos): (photos/'train'/'ant'/'0.png').write_bytes((photos/'train'/'bee'/'1.png').read_bytes() + b'x')
def move(photos): (photos/'train'/'ant'/'0.png').rename(photos/'train'/'bee'/'0.png')
def drop(photos): shutil.rmtree(photos/'val')
def rename(photos): (photos/'train'/'bee').rename(photos/'train'/'wasp')
def remove(photos): (photos/'train'/'ant'/'0.png').unlink()
def nothing(photos): pass

@pytest.mark.parametrize('change, words, way', [
    (replace, '1 file changed', 'accept'),
    (move, '1 file moved', 'accept'),
    (rename, 'photos/train/bee renamed to photos/train/wasp', 'accept'),
    (drop, 'no photos/val/ant any more, 6 files removed', 'accept'),
    (remove, '1 file removed', 'start a new run'),
    (nothing, '', ''),
])
def test_another_data_set_is_refused_in_one_line_or_accepted(forked, stopped, change, words, way):
    change(stopped)
    got = forked('mae-pretrain', '--resume', 'run')
    if change is nothing:
        assert got.code == 0, got.err
        return
    assert got.code == 2 and f'the data of run is not what it was started with: {words}: put it back' in got.line
    if way == 'accept':
        assert "or resume with --data-check accept" in got.line
        got = forked('mae-pretrain', '--resume', 'run', '--data-check', 'accept')
        assert got.code == 0 and f'accepted that the data has changed: {words}' in got.out, got.err
        assert forked('mae-pretrain', '--resume', 'run').code == 0   # it is what the run knows now
    else:
        assert got.line.endswith(way)

def test_contents_are_compared_by_choice(forked, stopped):
    forked('mae-pretrain', '--resume', 'run', '--data-check', 'contents')   # noted now
    file = stopped/'train'/'ant'/'0.png'
    raw = bytearray(file.read_bytes())
    raw[60] ^= 1
    file.write_bytes(raw)
    got = forked('mae-pretrain', '--resume', 'run', '--data-check', 'contents')
    assert got.code == 2 and '1 file changed' in got.line
    assert forked('mae-pretrain', '--resume', 'run').code == 0

def test_a_run_of_an_earlier_version_notes_its_data(forked, stopped, tmp_path):
    (tmp_path/'run'/'data.npz').unlink()
    got = forked('mae-pretrain', '--resume', 'run')
    assert got.code == 0 and 'started by a version that did not note its data' in got.out
    assert (tmp_path/'run'/'data.npz').exists()

def test_what_is_handed_on_carries_no_path(stopped, tmp_path):
    "The weights and checkpoints; `data.npz` neither."
    for file in ((tmp_path/'run'/'model.safetensors'), *(tmp_path/'run'/'checkpoints').glob('*.safetensors'),
                 tmp_path/'run'/'data.npz'):
        content = file.read_bytes()
        texts = [str(tmp_path).encode(code) for code in ('utf-8', 'utf-32-le')]   # NumPy writes the second
        assert not any(text in content for text in texts), file
