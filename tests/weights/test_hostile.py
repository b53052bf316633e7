"""Weights and configurations from elsewhere: read whole, or refused in one line before memory is taken."""
import io
import json
import pickle
import signal
import time
import warnings
import zipfile

import numpy as np
import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

from mae_nb.model.mae import create_mae
from mae_nb.training.recipes import PretrainRecipe, as_config, from_config
from mae_nb.weights.building import load_mae
from mae_nb.weights.convert import save_official
from mae_nb.weights.loading import save_model
from mae_nb.weights.published import url_to_path
from mae_nb.weights.reading import open_weights

SMALL = dict(dim=16, depth=1, num_heads=2, decoder_dim=16, decoder_depth=1, decoder_heads=2)
DATA = dict(name='x', mean=[.5], std=[.5], classes=[])

@pytest.fixture
def model():
    "A masked autoencoder that is built in no time."
    return create_mae('mae_vit_nano_patch4_28', in_chans=1, target='pixels', **SMALL)

def within(seconds, f, *args):
    "What a call returns or its error; taking longer is a failure."
    def late(*_):
        raise BaseException(f'more than {seconds} s')
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            return f(*args)
    except Exception as e:
        return e
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)

def rewrite_config(file, change):
    "Give our file another configuration."
    with safetensors.safe_open(file, 'pt') as f:
        config = json.loads(f.metadata()['config'])
    change(config)
    save_file(load_file(file), file, metadata={'config': json.dumps(config)})

# mutations, each of a file that is whole

ODD_VALUES = [10**9, 10**30, -1, 0, 1.5, None, 'x' * 1000, [1, 2, 3], {}, True, float('nan'),
              '__import__("os").system("true")', '../../x']

def mutate_config(file, data, rng):
    "Another value in a field of the configuration."
    file.write_bytes(data)
    def change(config):
        part = config['model'] if rng.integers(3) else config['data']
        part[list(part)[rng.integers(len(part))]] = ODD_VALUES[rng.integers(len(ODD_VALUES))]
    rewrite_config(file, change)

def mutate_pickle(file, data, rng):
    "A byte of the pickle inside the archive, with its checksum put right."
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, 'w') as new:
        for p in old.infolist():
            part = bytearray(old.read(p))
            if p.filename.endswith('data.pkl'):
                part[rng.integers(len(part))] = rng.integers(256)
            new.writestr(p, bytes(part))

def mutate_bytes(file, data, rng):
    "A cut, a flipped bit near the beginning, or another end."
    part, kind = bytearray(data), rng.integers(3)
    if kind == 0:
        del part[rng.integers(len(part)):]
    elif kind == 1:
        part[rng.integers(min(len(part), 3000))] ^= 1 << rng.integers(8)
    else:
        part[rng.integers(len(part)):] = rng.integers(0, 256, 300, dtype=np.uint8).tobytes()
    file.write_bytes(part)

def check_mutated(model, folder, count):
    "Each mutated file is read or refused in one line, in time; returns how many were refused."
    rng, refused = np.random.default_rng(0), 0
    save_model(model, folder/'a.safetensors', DATA)
    save_official(model, folder/'b.pth')
    originals = [(f, f.read_bytes()) for f in (folder/'a.safetensors', folder/'b.pth')]
    for n in range(count):
        file, data = originals[n % 2]
        mutate = {2: mutate_config, 3: mutate_pickle}.get(n % 4, mutate_bytes)
        mutate(file, data, rng)
        result = within(10, load_mae, file)
        if isinstance(result, Exception):
            refused += 1
            assert isinstance(result, (ValueError, OSError)), (n, type(result), result)
            assert '\n' not in str(result) and len(str(result)) < 2000, result
    assert refused > count / 3
    return refused

def test_mutated_weights(model, tmp_path):
    check_mutated(model, tmp_path, 100)

@pytest.mark.slow
def test_many_mutated_weights(model, tmp_path):
    print(f'500 mutated files, {check_mutated(model, tmp_path, 500)} refused')

# configurations

GREEDY = [('depth', 10**9), ('img_size', 10**6), ('dim', 2**40), ('decoder_depth', 200), ('depth', 250),
          ('dim', 16_000), ('patch_size', 2)]

@pytest.mark.parametrize('field, value', GREEDY)
def test_a_configuration_that_would_fill_the_memory(model, tmp_path, field, value):
    save_model(model, tmp_path/'a.safetensors')
    rewrite_config(tmp_path/'a.safetensors', lambda c: c['model'].update({field: value}))
    start, result = time.time(), within(5, load_mae, tmp_path/'a.safetensors')
    assert isinstance(result, ValueError) and field in str(result) and time.time() - start < 1, result

@pytest.mark.parametrize('field, value', [('img_size', [8192, 8192]), ('img_size', [32, 28]), ('in_chans', 3)])
def test_a_plausible_configuration_that_the_tensors_deny(model, tmp_path, field, value):
    save_model(model, tmp_path/'a.safetensors', DATA)
    rewrite_config(tmp_path/'a.safetensors', lambda c: c['model'].update({field: value}))
    e = within(5, load_mae, tmp_path/'a.safetensors')
    assert isinstance(e, ValueError) and 'its configuration states' in str(e) and 'and its tensors' in str(e), e

def test_nested_json_is_an_error_and_not_a_crash(model, tmp_path):
    save_file(model.state_dict(), tmp_path/'a.safetensors', metadata={'config': '[' * 100_000})
    with pytest.raises(ValueError, match='not JSON'):
        open_weights(tmp_path/'a.safetensors')

ODD_FIELDS = [('kind', ['x']), ('epochs', '__import__("os")'), ('decoder_depth', 10**9), ('betas', ['a', 'b']),
              ('betas', [[1], None]), ('base_lr', float('inf')), ('crop_scale', None), ('epochs', 10**30),
              ('nonsense', 1)]

@pytest.mark.parametrize('field, value', ODD_FIELDS)
def test_a_recipe_from_elsewhere(field, value):
    with pytest.raises(ValueError):
        from_config(as_config(PretrainRecipe()) | {field: value})
    with pytest.raises(ValueError):
        from_config([field])

# tensors, archives, pickles, addresses

def test_tensors_that_say_more_than_they_hold(tmp_path):
    torch.save({'model': {'cls_token': torch.zeros(1).expand(10**9)}}, tmp_path/'a.pth')
    save_file({'cls_token': torch.zeros(10**9, 0)}, tmp_path/'a.safetensors')
    for name in ('a.pth', 'a.safetensors'):
        with pytest.raises(ValueError, match='holds fewer numbers than its shape needs'):
            open_weights(tmp_path/name)

def test_a_compressed_checkpoint_is_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path/'bomb.pth', 'w', zipfile.ZIP_DEFLATED) as z:
        z.writestr('archive/data/0', bytes(50_000_000))
    with pytest.raises(ValueError, match='unpacks to more than the file holds'):
        open_weights(tmp_path/'bomb.pth')

def test_code_in_a_pickle_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path/'made'), 'w'))
    for save in (lambda f: torch.save({'model': Evil()}, f), lambda f: f.write_bytes(pickle.dumps(Evil()))):
        save(tmp_path/'a.pth')
        with pytest.raises(ValueError, match='a.pth'):
            open_weights(tmp_path/'a.pth')
        assert not (tmp_path/'made').exists()

ADDRESSES = ['http://h/../../x.pth', 'http://../x.pth', 'http://h/%2e%2e/%2e%2e/x.pth', 'http://h/x.pth?..',
             'http://h/x.pth?../..']

@pytest.mark.parametrize('url', ADDRESSES)
def test_an_address_stays_below_the_folder_for_weights(url):
    assert '..' not in url_to_path(url).parts and not url_to_path(url).is_absolute()
