"""Features in a file: the same bytes after a kill, with several workers and processes, and one line on errors."""
import os
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import results, spread
from support import BIN, begin_command, exit_code, fork
from torch import nn

from mae_nb.data.datasets import folder_set
from mae_nb.model.classifier import create_classifier
from mae_nb.model.mae import create_mae
from mae_nb.tasks.embed import EmbedOptions, Parts, embed, read_embeddings
from mae_nb.tasks.features import extract_features
from mae_nb.weights.loading import save_model

SIZE = dict(in_chans=3, depth=2, dim=32, num_heads=2)
WORDS = '--device', 'cpu', '--num-workers', '0', '--bs', '2', '--tokens', 'patches', '--block', '0'


@pytest.fixture
def weights(tmp_path):
    "A narrow masked autoencoder with random weights."
    torch.manual_seed(0)
    model = create_mae('mae_vit_nano_patch4_28', **SIZE, decoder_dim=16, decoder_depth=1, decoder_heads=2)
    save_model(model, tmp_path/'nano.safetensors', dict(name='made', mean=[.5] * 3, std=[.25] * 3, classes=[]))
    return tmp_path/'nano.safetensors'


@pytest.fixture
def small_parts(monkeypatch):
    "Parts of two batches, also in forks of this process."
    from mae_nb.tasks import embed as module
    monkeypatch.setattr(module, 'PART_BYTES', 2 * 2 * 49 * 32 * 4)


def write_slowly():
    "So that a job is not over before it can be killed."
    from mae_nb.tasks import embed as module
    write = module.Parts.write

    def slow(self, number, features):
        write(self, number, features)
        time.sleep(.05)

    module.Parts.write = slow


def kill_with_parts(count, folder, *words):
    "Start a command, and kill it (SIGKILL) as soon as some parts are written; their number."
    pid, result = begin_command(folder, *words, before=write_slowly)
    end = time.monotonic() + 60
    while len(list(folder.glob('*.parts/*.npy'))) < count and time.monotonic() < end:
        time.sleep(.01)
    os.kill(pid, signal.SIGKILL)
    assert result().code == -signal.SIGKILL
    return len(list(folder.glob('*.parts/*.npy')))


@pytest.mark.parametrize('ending', ['npy', 'parquet'])
def test_a_killed_job_continues_to_the_same_file(photos, weights, small_parts, forked, tmp_path, ending):
    "Killed twice; then it runs to its end."
    whole, killed = tmp_path/f'whole.{ending}', tmp_path/f'killed.{ending}'
    assert forked('mae-embed', photos, weights, '--out', whole, *WORDS).code == 0
    folder, kept = tmp_path/f'killed.{ending}.parts', 0
    for _ in range(2):
        before = kept
        kept = kill_with_parts(before + 3, tmp_path, 'mae-embed', photos, weights, '--out', killed, *WORDS)
        assert before < kept < 30 and not killed.exists()
    (folder/'000029.npy.part').write_bytes(b'half')   # what a kill in the middle of a write leaves
    done = forked('mae-embed', photos, weights, '--out', killed, *WORDS)
    assert done.code == 0 and f'{kept} of 30 parts exist already' in done.out
    assert killed.read_bytes() == whole.read_bytes() and not folder.exists()
    if ending == 'npy':
        assert killed.with_suffix('.csv').read_bytes() == whole.with_suffix('.csv').read_bytes()


def test_a_job_killed_while_its_parts_are_removed_is_finished(tmp_path):
    "Half a folder of parts would belong to a job that can neither continue nor begin."
    parts = Parts(tmp_path/'x.npy', 4, 2, (3,), 'float32')
    parts.folder.mkdir()
    for name in ('000000.npy', 'job.json', 'data.npz'):
        (parts.folder/name).write_bytes(b'content')

    def cut(folder):
        (folder/'data.npz').unlink()
        os.kill(os.getpid(), signal.SIGKILL)

    def remove():
        shutil.rmtree = cut
        parts.remove()

    assert exit_code(fork(remove, tmp_path/'log')) == -signal.SIGKILL, (tmp_path/'log').read_text()
    assert not parts.folder.exists() and parts.used.is_dir()


@pytest.mark.parametrize('launcher', ['forks', pytest.param('torchrun', marks=pytest.mark.slow)])
def test_workers_and_processes_change_nothing(photos, weights, tmp_path, monkeypatch, launcher):
    def options(name, workers):
        return EmbedOptions(str(photos), str(weights), str(tmp_path/name), bs=2, num_workers=workers, device='cpu')

    embed(options('one.npy', 0))
    embed(options('workers.npy', 2))
    if launcher == 'forks':
        monkeypatch.setattr('mae_nb.tasks.embed.PART_BYTES', 1024)
        results(spread(2, lambda: bool(embed(options('two.npy', 1))), tmp_path/'ranks'))
    else:
        script = tmp_path/'mae-embed'
        script.write_text('from mae_nb.tasks import embed\nembed.PART_BYTES = 1024\n'
                          'from mae_nb.commands import mae_embed\nmae_embed()\n')
        words = [photos, weights, '--out', 'two.npy', '--bs', '2', '--num-workers', '1', '--device', 'cpu']
        subprocess.run([BIN/'torchrun', '--nproc-per-node', '2', script, *words], cwd=tmp_path, check=True)
    first, *others = [(tmp_path/name).read_bytes() for name in ('one.npy', 'workers.npy', 'two.npy')]
    assert others == [first, first]


def test_features_are_the_encoders(photos, weights, tmp_path):
    "Each row belongs to the picture that it names."
    from mae_nb.weights.building import load_encoder
    embed(EmbedOptions(str(photos), str(weights), str(tmp_path/'x.parquet'), tokens='avg', device='cpu', num_workers=0))
    found = read_embeddings(tmp_path/'x.parquet')
    images = folder_set(photos)
    images.mean, images.std = (.5,) * 3, (.25,) * 3
    wanted = extract_features(load_encoder(weights)[0], images)['avg']
    assert np.abs(found.features - wanted).max() < 1e-5
    assert found.names == [str(images.items[i].relative_to(photos)) for i in range(120)]
    assert found.classes == [name.split('/')[0] for name in found.names]


def test_a_classifier_with_mean_pooling_has_no_norm_behind_its_blocks(photos, tmp_path):
    torch.manual_seed(0)
    model = create_classifier('mae_vit_nano_patch4_28', 2, **SIZE).eval()
    nn.init.normal_(model.fc_norm.bias)
    save_model(model, tmp_path/'tuned.safetensors', dict(name='made', mean=[.5] * 3, std=[.25] * 3, classes=['a', 'b']))
    weights, out = str(tmp_path/'tuned.safetensors'), str(tmp_path/'x.npy')
    embed(EmbedOptions(str(photos), weights, out, tokens='avg', device='cpu', num_workers=0))
    images = folder_set(photos)
    images.mean, images.std = (.5,) * 3, (.25,) * 3
    wanted = extract_features(model, images)['avg']
    assert np.abs(np.load(tmp_path/'x.npy') - wanted).max() < 1e-5


def test_another_job_in_the_same_place_is_refused(photos, weights, small_parts, forked, tmp_path):
    kill_with_parts(2, tmp_path, 'mae-embed', photos, weights, '--out', 'x.npy', *WORDS)
    got = forked('mae-embed', photos, weights, '--out', 'x.npy', *WORDS, '--half')
    assert got.code == 2 and 'x.npy.parts was started with half = False, and now half = True' in got.line
    Image.new('RGB', (40, 48)).save(photos/'odd'/'new.png')
    got = forked('mae-embed', photos, weights, '--out', 'x.npy', *WORDS)
    assert got.code == 2 and 'x.npy.parts was started on other data' in got.line


def test_what_cannot_be_embedded_gets_one_line(forked, photos, weights, tmp_path):
    cases = [
        ((), 'name a data set or a folder of images'), ((photos,), 'name the weights'),
        ((photos, weights), 'name the file to write with --out'),
        ((photos, weights, '--out', 'x.txt'), '--out x.txt must end with .npy or .parquet'),
        ((photos, weights, '--out', 'x.npy', '--tokens', 'mean'), "unknown tokens 'mean'"),
        ((photos, weights, '--out', 'x.npy', '--block', '7'), 'block'),
        ((photos, weights, '--out', 'x.npy', '--crop', 'middle'), '--crop middle is no evaluation crop'),
        ((photos, weights, '--out', 'x.npy', '--bs', '0'), '--bs must be a whole number'),
        (('fashion', weights, '--out', 'x.npy'), 'takes 3 channels and fashion has 1'),
        (('nowhere/at/all', weights, '--out', 'x.npy'), 'no such folder: nowhere/at/all'),
        ((photos, 'nowhere.pth', '--out', 'x.npy'), 'no such weights file: nowhere.pth'),
    ]
    for words, message in cases:
        got = forked('mae-embed', *words, '--device', 'cpu')
        assert got.code == 2 and message in got.line, (words, got)
    assert not list(tmp_path.glob('*.parts'))
    (tmp_path/'there.npy').touch()
    got = forked('mae-embed', photos, weights, '--out', 'there.npy', '--device', 'cpu')
    assert got.code == 2 and 'there.npy exists already: choose another --out' in got.line
    shutil.copy(photos/'odd'/'001.png', photos/'odd'/'bad.png')
    (photos/'odd'/'bad.png').write_bytes(b'nothing')
    got = forked('mae-embed', photos, weights, '--out', 'x.npy', '--device', 'cpu', '--num-workers', '0')
    assert got.code == 2 and 'odd/bad.png cannot be read as an image' in got.line
