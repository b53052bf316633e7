"""The models that come with the package: small, found by name, trained, and as good as their cards state."""
import json
import re

import pytest
import torch
from support import ROOT

from mae_nb.base.keyed import key, seeded, uniform
from mae_nb.data.datasets import cifar10, load_source
from mae_nb.data.images import standardize
from mae_nb.model.mae import create_mae
from mae_nb.weights.building import load_mae
from mae_nb.weights.published import SHIPPED, shipped_file
from mae_nb.weights.reading import open_weights, read_weights

PLACES = pytest.mark.parametrize('name', SHIPPED)


def images_of(name, request):
    "Training and test images of the kind that a shipped model saw; CIFAR-10 lies beside the checkout or not at all."
    if open_weights(name).data['name'] == 'cifar10':
        return cifar10(request.getfixturevalue('shared_data'))
    return load_source('fashion')


@PLACES
def test_it_is_small_in_half_precision_and_complete(name):
    file = shipped_file(name)
    model = load_mae(name)
    assert sum(p.numel() for p in model.parameters()) <= 4e6 and file.stat().st_size <= 8e6
    assert {tensor.dtype for tensor in read_weights(name).values()} == {torch.float16}
    assert {p.dtype for p in model.parameters()} == {torch.float32} and not model.training and not model.not_loaded


@PLACES
def test_it_reconstructs_far_better_than_an_untrained_one(name, request):
    model = load_mae(name)
    untrained = seeded(0, create_mae, **model.config)
    test = images_of(name, request)[1].take(range(200))
    imgs = torch.stack([test.read(i) for i in range(len(test))])
    noise = uniform(key(0, 0, torch.arange(len(test)), 'mask'), model.num_patches)
    with torch.no_grad():
        imgs = standardize(imgs, test.mean, test.std)
        ours, theirs = (each(imgs, noise=noise).loss.item() for each in (model, untrained))
    assert ours < .5 * theirs and ours < .5   # predicting the mean of all pixels has a loss of about 1


@pytest.mark.slow
@PLACES
def test_the_numbers_of_the_card_are_what_its_commands_give(name, request, terminal, tmp_path):
    images_of(name, request)   # skips where they are not available
    card = shipped_file(name).with_suffix('.md').read_text()
    rows = re.findall(r'^\| `(mae-probe [^`]+)` +\| +([\d.]+) % +\|$', card, re.M)
    assert rows
    for number, (command, stated) in enumerate(rows):
        file = tmp_path/f'{number}.json'
        said = terminal(*command.split(), '--json', file, MAE_NB_DATA=str(ROOT.parent/'shared'/'data'))
        assert said.code == 0, said.err
        top1 = 100 * json.loads(file.read_text())['top1']
        assert top1 == pytest.approx(float(stated), abs=.15), command   # other processors round otherwise
