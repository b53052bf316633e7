"""What the commands report and leave behind, whatever goes wrong."""
import os
import shutil
import signal
import subprocess
import time

import pytest
import torch
from PIL import Image
from support import BIN, Said, begin_command

from mae_nb.weights.building import load_mae
from mae_nb.weights.reading import read_config

NANO = '--model', 'mae_vit_nano_patch4_32', '--set', 'amp=False'
QUICK = *NANO, '--max-steps', '2', '--bs', '20', '--num-workers', '0'
TWENTY = '--bs', '20', '--set', 'warmup_epochs=0'
PARTS = ('config.json', 'metrics.csv', 'timing.csv', 'model.safetensors', 'figures/curves.png',
         'figures/reconstructions.png')

@pytest.mark.parametrize('words, message', [
    (('nowhere/at-all',), 'no such folder: nowhere/at-all'),
    (('empty',), 'no images in empty'),
    (('fashon',), "did you mean 'fashion'"),
    (('fashion', '--set', 'mask_ration=.5'), "did you mean 'mask_ratio'"),
    (('fashion', '--set', 'epochs=many'), 'epochs takes a value like'),
    (('fashion', '--set', 'epochs'), 'expected field=value'),
    (('fashion', '--set', 'mask_ratio=1.'), 'mask_ratio must be between 0 and 1'),
    (('fashion', '--set', 'mask_ratio=.999'), 'keeps 0 of 49 patches'),
    (('fashion', '--model', 'mae_vit_bass_patch16'), "did you mean 'mae_vit_base_patch16'"),
    (('fashion', '--img-size', '30'), '30x30 pixels is not divisible by patch size 4'),
    (('fashion', '--recipe', 'pretrain_fashon'), "did you mean 'pretrain_fashion'"),
    (('fashion', '--bs', '10001'), 'use --bs 10000 or less'),
    (('fashion', '--bs', '0'), '--bs must be a whole number, at least 1'),
    (('fashion', '--device', 'toaster'), '--device toaster cannot be used'),
    (('fashion', '--out', 'full'), 'full exists already and is not empty'),
])
def test_a_wrong_argument_gets_one_line_and_exit_code_2(forked, tmp_path, words, message):
    for folder in ('empty', 'full'):
        (tmp_path/folder).mkdir()
    (tmp_path/'full'/'file').touch()
    got = forked('mae-pretrain', *words, '--max-steps', '1')
    assert got.code == 2 and message in got.line, got

def test_settings_that_nobody_knows(forked, tmp_path):
    got = forked('mae-pretrain', 'fashion', MAE_NB_FOO='1')
    assert got.code == 2 and "'foo'" in got.line
    (tmp_path/'settings.ini').write_text('[mae_nb]\nrums = x\n')
    got = forked('mae-pretrain', 'fashion')
    assert got.code == 2 and "did you mean 'runs'" in got.line and 'settings.ini' in got.line

def test_an_unknown_flag(terminal):
    got = terminal('mae-pretrain', 'fashion', '--epoch-count', '3')
    assert got.code == 2 and 'unknown flag --epoch-count, did you mean --epochs?' in got.line

def test_a_folder_without_a_readable_image(forked, tmp_path):
    (tmp_path/'bad').mkdir()
    for i in range(30):
        (tmp_path/'bad'/f'{i}.jpg').write_bytes(b'garbage')
    got = forked('mae-pretrain', 'bad', *QUICK)
    assert got.code == 1 and 'could not be read, more than 1%' in got.line

def test_one_bad_file_is_replaced_named_once_and_counted(forked, photos):
    (photos/'odd'/'005.png').write_bytes(b'garbage')
    got = forked('mae-pretrain', 'photos', *NANO, *TWENTY, '--epochs', '2', '--num-workers', '1', '--out', 'run')
    assert got.code == 0, got.err
    assert got.out.count('could not read') == 1 and '005.png' in got.out and '1 files could not be read' in got.out

def test_too_many_bad_files_stop_the_run(forked, photos):
    for i in range(1, 41, 2):
        (photos/'odd'/f'{i:03}.png').write_bytes(b'garbage')
    got = forked('mae-pretrain', 'photos', *QUICK, '--epochs', '1', '--max-steps', '6', '--out', 'run')
    assert got.code == 1 and 'more than 1%' in got.line and 'what was done so far is in run' in got.line

def test_a_run_folder_is_whole_and_can_be_shown_and_fine_tuned(forked, tmp_path, photos):
    got = forked('mae-pretrain', 'photos', *QUICK, '--out', 'run', pictures=True)
    assert got.code == 0, got.err
    for part in PARTS:
        assert (tmp_path/'run'/part).stat().st_size > 0, part
    assert list((tmp_path/'run').glob('events.out.tfevents.*'))
    for name, mode in (('grey', 'L'), ('clear', 'RGBA')):
        Image.new(mode, (50, 90)).save(tmp_path/f'{name}.png')
    got = forked('mae-show', 'run', 'grey.png', 'clear.png', '--out', 'shown.png', pictures=True)
    assert got.code == 0 and Image.open(tmp_path/'shown.png').size[0] > 100, got.err
    brief = '--max-steps', '2', '--bs', '20', '--num-workers', '0'
    got = forked('mae-finetune', 'photos', 'run', *brief, '--out', 'tuned')
    assert got.code == 0 and '12 of its 120 images' in got.out, got.err
    assert read_config(tmp_path/'tuned'/'model.safetensors')['model']['num_classes'] == 2
    got = forked('mae-show', 'tuned', 'grey.png')
    assert got.code == 2 and 'holds a classifier' in got.line
    got = forked('mae-finetune', 'fashion', 'run', '--max-steps', '1', '--out', 'other')
    assert got.code == 2 and 'images of 1 channels and the model takes 3' in got.line

def test_wrong_weights_and_pictures(forked, tmp_path, photos):
    got = forked('mae-show', 'missing.safetensors', 'a.png')
    assert got.code == 2 and 'missing.safetensors' in got.line
    (tmp_path/'cut.safetensors').write_bytes(b'\x10\0\0\0\0\0\0\0{"a"')
    got = forked('mae-show', 'cut.safetensors', 'a.png')
    assert got.code == 2 and 'cut.safetensors is not a weights file' in got.line
    assert forked('mae-pretrain', 'photos', *QUICK, '--out', 'run').code == 0
    (tmp_path/'a.png').write_bytes(b'garbage')
    got = forked('mae-show', 'run', 'a.png')
    assert got.code == 2 and 'a.png cannot be read as an image' in got.line
    got = forked('mae-show', 'run')
    assert got.code == 2 and 'name at least one image' in got.line

LONG = 'photos', *NANO, *TWENTY, '--epochs', '5000', '--num-workers', '1', '--out', 'run'

def wait_for_rows(run):
    "Until the first epoch is done, and a little longer."
    rows, end = run/'metrics.csv', time.time() + 120
    while not (rows.exists() and len(rows.read_text().splitlines()) > 1) and time.time() < end:
        time.sleep(.1)
    time.sleep(1)

def check_what_was_done(got, code, run):
    assert got.code == code, got
    assert 'what was done so far is in run' in got.line
    assert len((run/'metrics.csv').read_text().splitlines()) >= 2
    assert load_mae(run).encode(torch.zeros(1, 3, 32, 32)).isfinite().all()

def test_ctrl_c_leaves_what_was_done(tmp_path, photos):
    "In mid-training, in a process of its own: the finished epochs' rows and weights are there, and can be loaded."
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen([BIN/'mae-pretrain', *LONG], cwd=tmp_path, start_new_session=True, **pipes)
    wait_for_rows(tmp_path/'run')
    os.killpg(process.pid, signal.SIGINT)   # as a terminal does: to the workers too
    err = process.communicate(timeout=120)[1]
    check_what_was_done(Said('', err, process.returncode), 130, tmp_path/'run')

def test_sigterm_leaves_what_was_done(tmp_path, photos):
    "The same in a fork, without the wait for imports."
    pid, result = begin_command(tmp_path, 'mae-pretrain', *LONG, before=lambda: signal.alarm(300))   # a deadline
    wait_for_rows(tmp_path/'run')
    os.kill(pid, signal.SIGTERM)
    check_what_was_done(result(), 143, tmp_path/'run')

def test_a_full_disk(forked, tmp_path, photos):
    "One line, and what was written before is whole."
    disk = tmp_path/'disk'
    disk.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=4m', 'tmpfs', disk]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('a small disk of its own needs root and mount')
    try:
        words = *NANO, *TWENTY, '--epochs', '3', '--num-workers', '0', '--out', 'disk/run'
        got = forked('mae-pretrain', 'photos', *words)
        assert got.code == 1 and 'no space left on the disk' in got.line, got
        assert (disk/'run'/'config.json').read_text().endswith('}\n')
        for f in (disk/'run').rglob('*.safetensors'):
            load_mae(f)
        assert not list((disk/'run').rglob('*.part'))
    finally:
        subprocess.run(['umount', disk], check=True)
        shutil.rmtree(disk, ignore_errors=True)

def test_messages_name_flags(forked, tmp_path):
    "The library names parameters; a command names what is typed."
    for words, message in ((('fashion', '--resume', 'auto'), '--resume auto needs --out'),
                           (('--resume', 'nowhere'), 'nowhere is no run folder'),
                           ((), 'name a data set or a folder of images, or --resume RUN')):
        got = forked('mae-pretrain', *words)
        assert got.code == 2 and message in got.line, got
    got = forked('mae-probe', 'knn', 'fashion', 'run', '--max-steps', '3')
    assert got.code == 2 and '--max-steps has no meaning for this probe' in got.line, got
    got = forked('mae-probe', 'linear', 'fashion', 'run', '--recipe', 'knn')
    assert got.code == 2 and '--recipe knn is for knn, not for linear: use one of linear, ' in got.line, got

def test_a_damaged_file_of_ours_is_no_wrong_argument(forked, tmp_path):
    (tmp_path/'run').mkdir()
    (tmp_path/'run'/'config.json').write_text('{"task": ')
    got = forked('mae-pretrain', '--resume', 'run')
    assert got.code == 1 and 'run/config.json is damaged: it is not JSON' in got.line, got
