"""The commands with `--decode device`: the same losses, one-line refusals, a benchmark that runs."""
import csv
import io
import json
import tarfile

import pytest
from made_images import encode, made_image, mixed_folder

from mae_nb.data.packing import pack_source

NANO = '--model', 'mae_vit_nano_patch4_32', '--set', 'amp=False'

@pytest.fixture
def mixed(tmp_path):
    return mixed_folder(tmp_path/'photos')

def test_pretraining(forked, mixed, tmp_path):
    pack_source(mixed, tmp_path/'packed', num_workers=0)
    words = *NANO, '--epochs', 1, '--set', 'warmup_epochs=0', '--bs', 20, '--num-workers', 1, '--device', 'cpu'
    device = '--decode', 'device'
    runs = {}
    for name, more in (('cpu', ()), ('one', device), ('two', (*device, '--num-workers', 0))):
        said = forked('mae-pretrain', 'packed', *words, *more, '--out', name)
        assert said.code == 0, said.err
        runs[name] = (tmp_path/name/'metrics.csv').read_text()
    assert runs['one'] == runs['two'] != runs['cpu']
    configs = {name: json.loads((tmp_path/name/'config.json').read_text()) for name in runs}
    assert configs['one']['decode'] == 'device' and 'decode' not in configs['cpu']
    losses = {name: float(next(csv.DictReader(io.StringIO(run)))['train_loss']) for name, run in runs.items()}
    assert abs(losses['one'] - losses['cpu']) < .01 * losses['cpu']
    said = forked('mae-pretrain', '--resume', 'cpu', *device)
    assert said.code == 2 and '--decode has no effect with --resume cpu' in said.line
    said = forked('mae-pretrain', 'packed', *words, '--out', 'one', '--resume', 'auto')
    assert said.code == 2 and "one was started with decode = 'device', and now decode = None" in said.line

def test_the_loader_is_measured(forked, mixed, tmp_path):
    words = '--data', 'photos', '--model', NANO[1], '--decode', 'device', '--bs', 8, '--device', 'cpu'
    said = forked('mae-bench', 'loader', *words, '--num-workers', 0, '--steps', 3, '--json', 'rates.json')
    assert said.code == 0, said.err
    rates = json.loads((tmp_path/'rates.json').read_text())
    assert rates['decode'] == 'device' and rates['ours'] > 0

FINETUNE = 'mae-finetune', 'photos', '--from-scratch', *NANO, '--recipe', 'finetune'
REFUSED = {
    'RandAugment needs the pixels on the CPU: use --decode cpu': (*FINETUNE, '--decode', 'device'),
    'colour jitter needs the pixels on the CPU: use --decode cpu':
        ('mae-pretrain', 'photos', *NANO, '--set', 'augment=jitter', '--decode', 'device'),
    '--decode device has no effect on fashion': ('mae-pretrain', 'fashion', '--decode', 'device'),
    "unknown decode 'gpu'": ('mae-pretrain', 'photos', *NANO, '--decode', 'gpu'),
}

@pytest.mark.parametrize('message', REFUSED)
def test_what_cannot_be_done_is_told_in_one_line(forked, mixed, message):
    few = '--max-steps', 1, '--bs', 20, '--device', 'cpu', '--num-workers', 0
    said = forked(*REFUSED[message], *few, '--out', 'run')
    assert said.code == 2 and message in said.line, said.err

def test_the_benchmark_still_works(tmp_path, capsys):
    place = tmp_path/'train'/'few'
    place.mkdir(parents=True)
    for i in range(8):
        (place/f'{i}.JPEG').write_bytes(encode(made_image(i, 50, 64)))
    with tarfile.open(tmp_path/'some.tar', 'w') as tar:
        tar.add(tmp_path/'train', 'some/train')
    from bench import feed
    words = '--device cpu --model mae_vit_nano_patch4_32 --bs 4 --steps 2 --workers 1'.split()
    result = feed.main([str(tmp_path/'some.tar'), *words, '--json', str(tmp_path/'feed.json')])
    sources = [f'{files}, decoded {place}' for files in ('original JPEGs', 'of 320 pixels')
               for place in ('by the workers', 'on cpu')]
    assert [row['row'] for row in result['rows']] == ['synthetic', *sources]
    assert all(row['images_per_second'] > 0 and 0 <= row['data_wait'] < 1 for row in result['rows'])
    assert 'goal, 95% of the synthetic rate with 16 cores' in capsys.readouterr().out
    assert json.loads((tmp_path/'feed.json').read_text())['rows'] == result['rows']
