"""Nearest pictures by faiss and by PyTorch, the map by UMAP where it is installed, and one line on errors."""
import numpy as np
import pytest
import torch

from mae_nb.model.mae import create_mae
from mae_nb.tasks import neighbours as module
from mae_nb.tasks.embed import EmbedOptions, embed
from mae_nb.tasks.neighbours import NeighbourOptions, flatten, nearest, neighbours
from mae_nb.weights.loading import save_model


def points(n=300, d=24):
    return np.random.default_rng(0).normal(size=(n, d)).astype(np.float32)


def test_faiss_and_torch_find_the_same():
    pytest.importorskip('faiss')
    x = points()
    ours, theirs = (nearest(x, x[:50], 7, engine) for engine in ('torch', 'faiss'))
    assert np.array_equal(ours[0], theirs[0])
    assert np.abs(ours[1] - theirs[1]).max() < 1e-5


def test_blocks_of_the_search_change_nothing():
    "More vectors than one block has."
    x = np.concatenate([points(150_000, 4), points(7, 4) + 9])
    found = nearest(x, x[-3:], 6, 'torch')
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    table = unit[-3:] @ unit.T
    assert np.abs(found[1] - -np.sort(-table, axis=1)[:, :6]).max() < 1e-5
    assert np.abs(np.take_along_axis(table, found[0], 1) - found[1]).max() < 1e-5


def test_a_map_by_umap_keeps_groups_apart():
    pytest.importorskip('umap')
    x = np.concatenate([points(40, 8) + 9 * np.eye(8)[k] for k in range(3)])
    places = flatten(x, 'umap')
    centres = [places[40 * k:40 * k + 40].mean(axis=0) for k in range(3)]
    spread = max(np.linalg.norm(places[40 * k:40 * k + 40] - c, axis=1).mean() for k, c in enumerate(centres))
    assert spread < min(np.linalg.norm(centres[a] - centres[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


def test_umap_that_is_not_installed_is_named(monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, 'umap', None)
    with pytest.raises(ImportError, match=r'umap is not installed: .* pip install -e "\.\[maps\]"'):
        module.flatten(points(), 'umap')


@pytest.fixture
def features(photos, tmp_path):
    "Of the photographs, by a narrow encoder with random weights."
    torch.manual_seed(0)
    model = create_mae('mae_vit_nano_patch4_28', in_chans=3, depth=1, dim=32, num_heads=2, decoder_dim=16,
                       decoder_depth=1, decoder_heads=2)
    save_model(model, tmp_path/'nano.safetensors', dict(name='made', mean=[.5] * 3, std=[.25] * 3, classes=[]))
    return embed(EmbedOptions(str(photos), str(tmp_path/'nano.safetensors'), str(tmp_path/'x.parquet'), tokens='avg',
                              device='cpu', num_workers=0))


def test_a_copy_is_the_nearest_picture(photos, tmp_path, features):
    "A picture twice under two names, embedded anew."
    import shutil
    shutil.copy(photos/'odd'/'007.png', photos/'even'/'copy.png')
    again = embed(EmbedOptions(str(photos), str(tmp_path/'nano.safetensors'), str(tmp_path/'again.npy'), tokens='avg',
                               device='cpu', num_workers=0))
    found = neighbours(NeighbourOptions(str(again), str(photos), ('even/copy.png',), k=3, out=str(tmp_path/'sheet.png'),
                                        map=str(tmp_path/'map.png')))
    name, cosine = found['even/copy.png'][0]
    assert name == 'odd/007.png' and cosine > .999999
    assert (tmp_path/'sheet.png').is_file() and (tmp_path/'map.png').is_file()


def test_wrong_arguments_get_one_line(forked, photos, features):
    cases = [
        ((), 'name the features'), ((features,), 'name the data'),
        (('no.npy', photos), 'no such file of features: no.npy'),
        ((features, photos, '--query', 'odd/008.png'), "unknown picture 'odd/008.png'"),
        ((features, photos, '--k', '0'), '--k must be a whole number, at least 1'),
        ((features, photos, '--map-by', 'tsne'), "unknown map 'tsne'"),
        ((features, photos/'odd'), 'name the data that they were made of'),
    ]
    for words, message in cases:
        got = forked('mae-neighbours', *words)
        assert got.code == 2 and message in got.line, (words, got)
