"""A run is a function of its config and seed."""
import pytest

from mae_nb.data.datasets import SOURCES, load_source

NANO = '--model', 'mae_vit_nano_patch4_32', '--set', 'warmup_epochs=0'

@pytest.fixture
def fashion(monkeypatch):
    "FashionMNIST with 120 images to train, as there are photos, and thirty to test."
    sets = tuple(images.take(range(n)) for images, n in zip(load_source('fashion'), (120, 30)))
    monkeypatch.setitem(SOURCES, 'fashion', lambda: sets)

def weights(forked, tmp_path, data, workers, seed, *more):
    out = tmp_path/f'{workers}-{seed}'
    words = '--max-steps', '6', '--bs', '24', '--seed', seed, '--num-workers', workers, '--out', out   # into epoch 2
    got = forked('mae-pretrain', data, *words, *more)
    assert got.code == 0, got.err
    return (out/'model.safetensors').read_bytes(), (out/'metrics.csv').read_text()

@pytest.mark.parametrize('data, more', [('fashion', ()), ('photos', NANO), ('photos', (*NANO, '--set', 'repeats=2'))])
def test_the_number_of_workers_changes_nothing(forked, tmp_path, fashion, photos, data, more):
    "The same seed gives the same model.safetensors, byte for byte, with 0, 1 and 3 loader workers."
    a, b, c = (weights(forked, tmp_path, data, n, 3, *more) for n in (0, 1, 3))
    assert a == b == c
    assert weights(forked, tmp_path, data, 0, 4, *more)[0] != a[0]
