"""Weights in and out: parity with timm and transformers in both directions, and round trips bit for bit."""
import json

import pytest
import timm
import torch
from foreign_models import (
    OfficialShape,
    hf_mae,
    official_file,
    relative,
    same,
    shaken,
    small_classifier,
    small_mae,
    timm_vit,
    vit_config,
)
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.models import adapt_input_conv
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification, ViTMAEForPreTraining, ViTMAEModel

from mae_nb.model.classifier import create_classifier
from mae_nb.model.mae import SIZES, create_mae
from mae_nb.weights.building import load_mae, model_options
from mae_nb.weights.convert import convert, save_hf, save_official, save_timm
from mae_nb.weights.layouts import from_hf, layout_of, our_state, to_official, to_ours, to_timm
from mae_nb.weights.loading import fit_channels, load_hf, load_official, load_timm, load_weights, save_model
from mae_nb.weights.published import CHECKPOINTS
from mae_nb.weights.reading import read_weights

TOLERANCES = [(torch.float32, 1e-5), (torch.float64, 1e-10)]
DTYPES = pytest.mark.parametrize('dtype, tolerance', TOLERANCES, ids=['float32', 'float64'])

# parity, weights copied both ways

def both_ways(ours, theirs, copy_here, copy_there):
    "The two models once with their weights and once with ours."
    copy_here(ours, theirs)
    yield ours, theirs
    shaken(ours, next(ours.parameters()).dtype)
    copy_there(ours, theirs)
    yield ours, theirs

def hf_here(ours, theirs):
    "transformers' weights into our model."
    report = load_hf(ours, theirs.state_dict(), strict=True)
    assert not report.changed, report

def timm_here(ours, theirs):
    "timm's weights into our model."
    report = load_timm(ours, theirs.state_dict(), strict=True)
    assert not report.changed, report

def timm_there(ours, theirs):
    "Our weights into timm's model."
    theirs.load_state_dict(to_timm(our_state(ours))[0], strict=True)

def hf_there(folder):
    "Our weights into transformers' model, through a folder that transformers itself reads."
    def copy(ours, theirs):
        save_hf(ours, folder)
        dtype = next(theirs.parameters()).dtype
        read, info = type(theirs).from_pretrained(folder, output_loading_info=True, dtype=dtype)
        assert not any(info[k] for k in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
        assert read.config.layer_norm_eps == 1e-6
        theirs.load_state_dict(read.state_dict())
    return copy

def check_gradients(ours, grads, tolerance):
    "Every gradient of our model agrees."
    distances = {k: relative(p.grad, grads[k]) for k, p in ours.named_parameters() if p.requires_grad}
    worst = max(distances, key=distances.get)
    assert distances[worst] < tolerance, (worst, distances[worst])

@DTYPES
@pytest.mark.parametrize('target', ['norm_pixels', 'pixels'])
def test_transformers_mae(target, dtype, tolerance, tmp_path):
    "Loss, predictions, mask and every gradient."
    theirs = shaken(hf_mae(norm_pix_loss=target == 'norm_pixels'), dtype)
    ours = small_mae(target=target).to(dtype).eval()
    torch.manual_seed(0)
    imgs, noise = torch.randn(2, 3, 224, 224, dtype=dtype), torch.rand(2, 196, dtype=dtype)
    for mine, other in both_ways(ours, theirs, hf_here, hf_there(tmp_path)):
        for m in (mine, other):
            m.zero_grad()
        a, b = mine(imgs, noise=noise), other(imgs, noise=noise)
        assert torch.equal(a.mask, b.mask.to(a.mask.dtype))
        assert relative(a.loss, b.loss) < tolerance and relative(a.pred, b.logits) < tolerance
        a.loss.backward()
        b.loss.backward()
        grads = from_hf({k: p.grad for k, p in other.named_parameters() if p.grad is not None})
        check_gradients(mine, grads, tolerance)

@DTYPES
@pytest.mark.parametrize('img_size', [64, 128])
def test_transformers_encoder(img_size, dtype, tolerance, tmp_path):
    theirs = shaken(hf_mae(img_size, ViTMAEModel), dtype)
    ours = small_mae(img_size=img_size).to(dtype).eval()
    n = (img_size // 16)**2
    imgs, noise = torch.randn(1, 3, img_size, img_size, dtype=dtype), torch.rand(1, n, dtype=dtype)
    for mine, other in both_ways(ours.encoder, theirs, hf_here, hf_there(tmp_path)):
        mask = ours.make_mask(imgs, noise=noise)
        with torch.no_grad():
            assert relative(mine(imgs, mask), other(imgs, noise=noise).last_hidden_state) < tolerance

@DTYPES
@pytest.mark.parametrize('img_size', [64, 128])
def test_transformers_classifier(img_size, dtype, tolerance, tmp_path):
    theirs = shaken(ViTForImageClassification(ViTConfig(**vit_config(img_size, num_labels=10))), dtype)
    ours = small_classifier(pool='cls', img_size=img_size).to(dtype).eval()
    imgs = torch.randn(1, 3, img_size, img_size, dtype=dtype)
    for mine, other in both_ways(ours, theirs, hf_here, hf_there(tmp_path)):
        with torch.no_grad():
            assert relative(mine(imgs), other(imgs).logits) < tolerance

@DTYPES
@pytest.mark.parametrize('img_size', [64, 128])
@pytest.mark.parametrize('pool', ['encoder', 'avg', 'cls'])
def test_timm(pool, img_size, dtype, tolerance):
    "The encoder's features, and logits and gradients of classifiers with both poolings."
    encoder, size = pool == 'encoder', dict(img_size=img_size)
    timm_pool = 'avg' if pool == 'avg' else 'token'
    theirs = shaken(timm_vit(num_classes=0 if encoder else 10, pool=timm_pool, **size), dtype)
    ours = (small_mae(**size).encoder if encoder else small_classifier(pool=pool, **size)).to(dtype).eval()
    imgs = torch.randn(2, 3, img_size, img_size, dtype=dtype)
    for mine, other in both_ways(ours, theirs, timm_here, timm_there):
        for m in (mine, other):
            m.zero_grad()
        a, b = mine(imgs), other.forward_features(imgs) if encoder else other(imgs)
        assert relative(a, b) < tolerance
        a.square().mean().backward()
        b.square().mean().backward()
        check_gradients(mine, {k: p.grad for k, p in other.named_parameters()}, tolerance)

@pytest.mark.slow   # of full size; the same paths at a small size are tested above
@pytest.mark.parametrize('pool', ['avg', 'cls'])
def test_timm_base(pool, tmp_path):
    "The whole ViT-B classifier, by files, in both directions."
    timm_pool = 'avg' if pool == 'avg' else 'token'
    theirs = shaken(timm.create_model('vit_base_patch16_224', global_pool=timm_pool, num_classes=1000))
    save_file({k: v.contiguous() for k, v in theirs.state_dict().items()}, tmp_path/'timm.safetensors')
    options = model_options(tmp_path/'timm.safetensors')
    assert options == dict(name='mae_vit_base_patch16', img_size=(224, 224), in_chans=3, num_classes=1000, pool=pool)
    ours = create_classifier(**options).eval()
    load_timm(ours, tmp_path/'timm.safetensors', strict=True)
    imgs = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert relative(ours(imgs), theirs(imgs)) < 1e-5
    assert save_timm(ours, tmp_path/'back.safetensors') == []
    assert same(read_weights(tmp_path/'back.safetensors'), theirs.state_dict())
    with torch.no_grad():
        assert relative(ours.double()(imgs.double()), theirs.double()(imgs.double())) < 1e-10

# round trips

@pytest.mark.parametrize('name, tensors', [('mae_vit_base_patch16', 254), ('mae_vit_large_patch16', 398),
                                           ('mae_vit_huge_patch14', 494)])
def test_official_names_of_the_paper(name, tensors):
    "As many tensors as the official models have, under the names and in the shapes of timm's layers."
    size = SIZES[name]
    with torch.device('meta'):
        ours = to_official(create_mae(name).state_dict())
        theirs = OfficialShape(size['dim'], size['depth'], 512, 8, size['patch_size']).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    assert len(ours) == tensors

@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'before torch 1.6'])
def test_official_round_trip(zipped, official_state, tmp_path):
    file = official_file(tmp_path/'checkpoint-799.pth', official_state, zipped)
    ours = small_mae()
    report = load_official(ours, file, strict=True)
    assert len(report.loaded) == len(official_state) and ours.not_loaded == []
    save_official(ours, tmp_path/'back.pth')
    assert same(torch.load(tmp_path/'back.pth', weights_only=True)['model'], official_state)   # by torch's own reader

HF_TWINS = [
    (ViTMAEForPreTraining, lambda: small_mae(target='pixels')),
    (ViTMAEModel, lambda: small_mae().encoder),
    (ViTForImageClassification, lambda: small_classifier(pool='cls')),
]

@pytest.mark.parametrize('cls, make', HF_TWINS)
def test_transformers_round_trip(cls, make, tmp_path):
    is_classifier = cls is ViTForImageClassification
    theirs = shaken(cls(ViTConfig(**vit_config(num_labels=10))) if is_classifier else hf_mae(cls=cls))
    theirs.save_pretrained(tmp_path/'theirs')                       # transformers 5's own names on disk
    ours = make()
    load_hf(ours, tmp_path/'theirs', strict=True)
    save_hf(ours, tmp_path/'ours')
    assert same(cls.from_pretrained(tmp_path/'ours').state_dict(), theirs.state_dict())
    assert len(read_weights(tmp_path/'ours')) == len(theirs.state_dict())
    written, wanted = (json.loads((tmp_path/name/'config.json').read_text()) for name in ('ours', 'theirs'))
    shared = [k for k in written if k in wanted]
    assert {k: wanted[k] for k in shared} == {k: written[k] for k in shared}

TIMM_TWINS = [
    (lambda: timm_vit(), lambda: small_mae().encoder),
    (lambda: timm_vit(num_classes=10, pool='avg'), small_classifier),
    (lambda: timm_vit(num_classes=10), lambda: small_classifier(pool='cls')),
]

@pytest.mark.parametrize('make_theirs, make_ours', TIMM_TWINS, ids=['encoder', 'avg', 'cls'])
def test_timm_round_trip(make_theirs, make_ours, tmp_path):
    theirs, ours = shaken(make_theirs()), make_ours()
    load_timm(ours, theirs.state_dict(), strict=True)
    for name in ('x.pth', 'x.safetensors'):
        assert save_timm(ours, tmp_path/name) == []
        assert same(read_weights(tmp_path/name), theirs.state_dict())

def test_timms_mae_checkpoints_are_encoders():
    "The names of `vit_*.mae`, and where timm says they come from."
    theirs = timm.create_model('vit_base_patch16_224.mae', depth=1)
    assert layout_of(theirs.state_dict()) == 'timm'
    ours = create_mae('mae_vit_base_patch16', depth=1, decoder_depth=1)
    report = load_timm(ours, theirs.state_dict())
    assert not report.unused and ours.not_loaded == [k for k in ours.state_dict() if k.startswith('decoder.')]
    for name in [k for k in CHECKPOINTS if k.startswith('timm/')]:
        cfg = timm.get_pretrained_cfg(name.removeprefix('timm/'))
        assert cfg.hf_hub_id == name and cfg.license == 'cc-by-nc-4.0'
        assert cfg.url == CHECKPOINTS[cfg.url.split('/')[-1].removesuffix('.pth')].url

def test_convert_every_pair(tmp_path):
    "Each layout to each other, and back: not one bit changes, and what is left out is reported."
    model = shaken(small_mae())
    save_model(model, tmp_path/'start.safetensors')
    end = dict(official='.pth', hf='', safetensors='.safetensors')
    for a in end:
        first = tmp_path/f'1_{a}{end[a]}'
        convert(tmp_path/'start.safetensors', first, a)
        for b in end:
            second = tmp_path/f'2_{a}_{b}{end[b]}'
            convert(first, second, b, **dict(num_heads=3, decoder_heads=4) if a == 'official' else {})
            assert same(to_ours(read_weights(second)), model.state_dict()), (a, b)
        report = convert(first, tmp_path/f'3_{a}.safetensors', 'timm')
        assert 'left out, as timm has no place for them: 32 tensors (decoder.' in report
        assert same(read_weights(tmp_path/f'3_{a}.safetensors'), model.encoder.state_dict())
    assert not list(tmp_path.rglob('*.part'))

def test_a_converted_classifier(tmp_path):
    clf = shaken(small_classifier(pool='cls'))
    save_model(clf, tmp_path/'clf.safetensors', dict(name='mine', mean=[.5], std=[.5]))
    convert(tmp_path/'clf.safetensors', tmp_path/'hf', 'hf')
    convert(tmp_path/'hf', tmp_path/'back.safetensors', 'safetensors')
    again = create_classifier(**model_options(tmp_path/'back.safetensors'))
    load_weights(again, tmp_path/'back.safetensors', strict=True)
    assert same(again.state_dict(), clf.state_dict())

OTHER_SIZES = [
    dict(mlp_ratio=2.), dict(patch_size=8, img_size=64), dict(in_chans=1), dict(depth=1, decoder_depth=1),
    dict(img_size=(96, 96)), dict(decoder_dim=32, decoder_heads=2), dict(dim=64, num_heads=8),
]

@pytest.mark.parametrize('other', OTHER_SIZES, ids=str)
def test_models_are_built_from_their_files(other, tmp_path):
    "Every size comes back from a file of transformers, and from an official one with the heads given."
    model = shaken(small_mae(**dict(img_size=64) | other))
    save_hf(model, tmp_path/'hf')
    convert(tmp_path/'hf', tmp_path/'x.safetensors', 'safetensors')
    torch.save(to_official(model.state_dict()), tmp_path/'official.pth')
    stated = dict(num_heads=model.config.get('num_heads', 12), decoder_heads=model.config.get('decoder_heads', 16),
                  target='norm_pixels')
    imgs, noise = torch.randn(2, model.encoder.in_chans, *model.encoder.img_size), torch.rand(2, model.num_patches)
    for source, changes in (('hf', {}), ('x.safetensors', {}), ('official.pth', stated)):
        again = load_mae(tmp_path/source, **changes)
        assert same(again.state_dict(), model.state_dict())
        with torch.no_grad():
            assert torch.equal(again(imgs, noise=noise).pred, model(imgs, noise=noise).pred)

# sizes and channels

def test_positions_by_the_official_rule(official_state):
    "224 -> 448 for every table: class row kept, the others bicubic with align_corners off."
    def by_hand(table):
        grid = table[0, 1:].reshape(14, 14, -1).permute(2, 0, 1)[None]
        grid = F.interpolate(grid, size=(28, 28), mode='bicubic', align_corners=False)
        return torch.cat([table[:, :1], grid[0].permute(1, 2, 0).reshape(1, 784, -1)], dim=1)
    mae, clf = small_mae(img_size=448), small_classifier(img_size=448)
    report = load_official(mae, official_state)
    change = 'resized from 14x14 to 28x28 patches'
    assert not report.missing and report.changed == {f'{k}.pos_embed': change for k in ('encoder', 'decoder')}
    assert torch.equal(mae.encoder.pos_embed, by_hand(official_state['pos_embed']))
    assert torch.equal(mae.decoder.pos_embed, by_hand(official_state['decoder_pos_embed']))
    load_official(clf, official_state)
    assert torch.equal(clf.pos_embed, by_hand(official_state['pos_embed'])) and clf.pos_embed.requires_grad
    assert mae(torch.randn(1, 3, 448, 448)).loss.isfinite()

def test_larger_images_as_timm_does_it():
    "A 224 classifier of timm at 448, resized without antialiasing as in the official rule: the logits are ours."
    small, imgs = shaken(timm_vit(num_classes=10, pool='avg')), torch.randn(1, 3, 448, 448)
    ours = small_classifier(img_size=448).eval()
    load_timm(ours, small.state_dict())
    theirs = timm_vit(448, num_classes=10, pool='avg').eval()
    distances = {}
    for antialias in (False, True):
        table = resample_abs_pos_embed(small.pos_embed.detach(), [28, 28], antialias=antialias)
        theirs.load_state_dict(small.state_dict() | {'pos_embed': table})
        with torch.no_grad():
            distances[antialias] = relative(ours(imgs), theirs(imgs))
    assert distances[False] < 1e-5 < distances[True] < 1e-2    # timm's default is another cubic: close, not the same

def test_larger_images_as_transformers_does_it():
    "A 224 classifier of transformers at 448: its interpolation of positions and ours give the same logits."
    theirs = shaken(ViTForImageClassification(ViTConfig(**vit_config(num_labels=10))))
    imgs = torch.randn(1, 3, 448, 448)
    ours = small_classifier(pool='cls', img_size=448).eval()
    load_hf(ours, theirs.state_dict())
    with torch.no_grad():
        assert relative(ours(imgs), theirs(imgs, interpolate_pos_encoding=True).logits) < 1e-5

@pytest.mark.parametrize('in_chans', [1, 2, 4, 5, 6, 13])
def test_channels_as_timm_does_it(in_chans):
    weight = torch.randn(8, 3, 4, 4)
    assert relative(fit_channels(weight, in_chans)[0], adapt_input_conv(in_chans, weight)) < 1e-6

def test_another_number_of_channels(official_state):
    clf = small_classifier(in_chans=5)
    report = load_official(clf, official_state)
    assert report.changed == {'patch_embed.proj.weight': 'inflated from 3 to 5 channels'}
    assert clf(torch.randn(1, 5, 224, 224)).isfinite().all()
    mae = small_mae(in_chans=1)
    report = load_official(mae, official_state)
    assert report.missing == ['decoder.pred.weight', 'decoder.pred.bias'] == mae.not_loaded == report.unused
    with pytest.raises(ValueError, match='do not fit the model exactly'):
        load_official(small_mae(in_chans=1), official_state, strict=True)

def test_load_mae_at_another_size(official_state, tmp_path):
    file = official_file(tmp_path/'checkpoint.pth', official_state)
    with pytest.raises(ValueError, match='not of the size of mae_vit_base_patch16, .* pass num_heads'):
        load_mae(file)                                                       # base by its name, but narrower
    heads = dict(num_heads=3, decoder_heads=4)
    model = load_mae(file, img_size=(224, 448), **heads)
    assert model.encoder.grid == (14, 28) and model.config['target'] == 'norm_pixels' and not model.training
    save_model(model, tmp_path/'wide.safetensors')
    assert load_mae(tmp_path/'wide.safetensors', img_size=448).encoder.grid == (28, 28)
    raw = load_mae(official_file(tmp_path/'raw.pth', official_state, norm_pix_loss=False), **heads)
    assert raw.config['target'] == 'pixels'
