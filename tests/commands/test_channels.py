"""Grey pictures with weights of three channels, and the reverse: a flag, and one line that names it without."""
import json

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
