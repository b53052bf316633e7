"""Grey pictures with weights of three channels, and the reverse: a flag, and one line that names it without."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

from mae_nb.weights.reading import read_config

NANO = '--model', 'mae_vit_nano_patch4_32'
QUICK = '--max-steps', '2', '--bs', '20', '--num-workers', '0', '--set', 'amp=False', '--set', 'warmup_epochs=0'


def config_of(run):
    return json.loads((run/'config.json').read_text())


def test_weights_of_three_channels_and_grey_pictures(forked, tmp_path, photos):
    assert forked('mae-pretrain', 'photos', *NANO, *QUICK, '--out', 'colour').code == 0
    assert not {'in_chans', 'mean', 'std'} & config_of(tmp_path/'colour').keys()   # as always
    assert not {'in_chans', 'mean', 'std'} & config_of(tmp_path/'colour')['options'].keys()
    got = forked('mae-finetune', 'fashion', 'colour', *QUICK)
    assert got.code == 2 and 'create the model with --in-chans 1, or read the images with --in-chans 3' in got.line
    got = forked('mae-finetune', 'fashion', 'colour', *QUICK, '--in-chans', '1', '--out', 'summed')
    assert got.code == 0 and 'summed over its 3 channels' in got.out, got
    got = forked('mae-finetune', 'fashion', 'colour', *QUICK, '--in-chans', '3', '--out', 'repeated')
    assert got.code == 0 and 'summed' not in got.out, got
    data = {name: read_config(tmp_path/name/'model.safetensors')['data'] for name in ('summed', 'repeated')}
    assert [len(data[name]['mean']) for name in data] == [1, 3]
    got = forked('mae-finetune', '--resume', 'summed')
    assert got.code == 0, got


def test_grey_weights_and_colour_pictures(forked, tmp_path, photos):
    got = forked('mae-pretrain', 'photos', *NANO, *QUICK, '--in-chans', '1', '--mean', '.5', '--out', 'grey')
    assert got.code == 0, got
    config = config_of(tmp_path/'grey')
    assert config['in_chans'] == 1 and config['mean'] == [.5] and 'std' not in config
    assert read_config(tmp_path/'grey'/'model.safetensors')['data']['mean'] == [.5]
    got = forked('mae-probe', 'knn', 'photos', 'grey', '--num-workers', '0')
    assert got.code == 2 and 'create the model with --in-chans 3, or read the images with --in-chans 1' in got.line
    for channels in (1, 3):
        got = forked('mae-probe', 'knn', 'photos', 'grey', '--num-workers', '0', '--in-chans', channels, '--bs', '20',
                     '--set', 'k=3', '--out', f'knn{channels}')
        assert got.code == 0, got
    Image.new('RGB', (40, 40), 'red').save(tmp_path/'red.png')
    assert forked('mae-show', 'grey', 'red.png').code == 0
    got = forked('mae-show', 'grey', 'red.png', '--std', '.2,.3')
    assert got.code == 2 and '--std has 2 numbers and the model 1 channels' in got.line
    assert forked('mae-pretrain', '--resume', 'grey').code == 0


def test_files_are_read_as_pixels_in_memory_are_converted(photos):
    "Grey by the decoder and grey by `with_channels`: the same bytes."
    from mae_nb.data.channels import with_channels
    from mae_nb.data.datasets import ImageSet, folder_set
    images = folder_set(photos)
    in_memory = ImageSet('in memory', torch.stack([images.read(i) for i in range(9)]).permute(0, 2, 3, 1).numpy())
    from_files, converted = with_channels((images, in_memory), in_chans=1)
    assert all(from_files.read(i).equal(converted.read(i)) for i in range(9))
    assert from_files.mean == converted.mean and len(from_files.mean) == 1


@pytest.mark.parametrize('words, message', [
    (('--in-chans', '4'), '--in-chans must be 1 or 3, got 4'),
    (('--mean', '2'), '--mean must be a number from 0 to 1'),
    (('--std', '0'), '--std must be a number between 0 and 1'),
    (('--mean', '.5,.5'), '--mean has 2 numbers and the images have 1 channels: give one for each channel'),
])
def test_a_wrong_number_is_one_line(forked, words, message):
    got = forked('mae-pretrain', 'fashion', '--max-steps', '1', *words)
    assert got.code == 2 and message in got.line, got


def test_no_list_of_numbers(terminal):
    got = terminal('mae-pretrain', 'fashion', '--mean', 'bright')
    assert got.code == 2 and "--mean takes a number, or several with commas, got 'bright'" in got.line


def write_scenes(root, bands=13):
    "Made scenes of 16 bits in two classes, planar and in compressed tiles."
    tifffile = pytest.importorskip('tifffile')
    for i in range(16):
        file = root/('train' if i < 12 else 'val')/('low' if i % 2 else 'high')/f'{i}.tif'
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = np.linspace(0, 3000, 40)[None, :, None] * np.linspace(.5, 2, bands)[:, None, None]
        noise = np.random.default_rng(i).integers(0, 500, (bands, 40, 36))
        pixels = (rows + noise + (500 if i % 2 else 2000)).astype(np.uint16)
        if i % 4 < 2:
            tifffile.imwrite(file, pixels, photometric='minisblack', planarconfig='separate')
        else:
            tifffile.imwrite(file, np.moveaxis(pixels, 0, -1), photometric='minisblack', planarconfig='contig',
                             tile=(16, 16), compression='zlib')
    return root


def test_thirteen_bands_of_sixteen_bits_from_statistics_to_an_export(forked, tmp_path):
    write_scenes(tmp_path/'scenes')
    got = forked('mae-pretrain', 'scenes', *NANO, *QUICK, '--set', 'batch_size=6')
    assert got.code == 2 and 'mean and deviation are not known: run mae-check with --stats' in got.line, got
    got = forked('mae-check', 'scenes', '--stats', '--num-workers', '0')
    assert got.code == 0 and 'statistics of 12 images, 17,280 pixels of 13 channels, 16 bits' in got.out, got
    quick = *QUICK[:2], '--bs', '6', *QUICK[4:]
    got = forked('mae-pretrain', 'scenes', *NANO, *quick, '--bands', '3,2,1', '--out', 'run', pictures=True)
    assert got.code == 0 and (tmp_path/'run'/'figures'/'reconstructions.png').stat().st_size > 5000, got
    config, stats = config_of(tmp_path/'run'), json.loads((tmp_path/'scenes'/'mae_stats.json').read_text())
    assert (config['mean'], config['std'], config['bits']) == (stats['mean'], stats['std'], 16)   # to the last digit
    assert read_config(tmp_path/'run'/'model.safetensors')['data']['bits'] == 16
    (tmp_path/'scenes'/'mae_stats.json').write_text(json.dumps(stats | dict(mean=[.5] * 13)))
    assert forked('mae-pretrain', '--resume', 'run').code == 0   # with its own numbers
    for command, words in dict(probe=('knn', 'scenes', 'run', '--set', 'k=3', '--bs', '6'),
                               show=('run', 'scenes/val/low/13.tif', '--bands', '4,3,2'),
                               embed=('scenes', 'run', '--out', 'features.npy')).items():
        got = forked(f'mae-{command}', *words, *(() if command == 'show' else ('--num-workers', '0')))
        assert got.code == 0, got
    assert np.isfinite(np.load(tmp_path/'features.npy')).all()
    for words, message in (('12,1', '--bands takes one or three channels from 0 to 12'), ('1,2,13', 'from 0 to 12')):
        got = forked('mae-show', 'run', 'scenes/val/low/13.tif', '--bands', words)
        assert got.code == 2 and message in got.line, got
    got = forked('mae-convert', 'run', 'out.pth', '--format', 'official')
    assert got.code == 0, got


def test_channels_that_differ_from_the_models_are_one_line(forked, tmp_path, photos):
    write_scenes(tmp_path/'scenes', bands=5)
    assert forked('mae-check', 'scenes', '--stats', '--num-workers', '0').code == 0
    assert forked('mae-pretrain', 'photos', *NANO, *QUICK, '--out', 'colour').code == 0
    for words, message in (
        (('mae-probe', 'knn', 'scenes', 'colour', '--num-workers', '0'), 'of 5 channels and the model takes 3'),
        (('mae-embed', 'scenes', 'colour', '--out', 'x.npy'), 'takes 3 channels and scenes/val has 5'),
        (('mae-show', 'colour', 'scenes/val/low/13.tif'), '13.tif cannot be read as an image: a TIFF of 5 bands'),
        (('mae-finetune', 'scenes', 'colour', *QUICK[:2], '--bs', '6', '--in-chans', '5'), "RandAugment"),
    ):
        got = forked(*words)
        assert got.code == 2 and message in got.line, got
