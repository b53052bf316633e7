"""Every named size and every option of Table 1: trains, traces, and leaves no parameter out."""
import itertools

import pytest
import torch
from PIL import Image

from mae_nb.model.mae import MASKS, SIZES, create_mae
from mae_nb.model.patches import patchify
from mae_nb.model.targets import TokenTarget
from mae_nb.weights.building import load_mae
from mae_nb.weights.loading import save_model

SMALL = dict(
    img_size=28, in_chans=3, dim=32, depth=2, num_heads=2, decoder_dim=16, decoder_depth=2, decoder_heads=2)

def make(name='mae_vit_nano_patch4_28', **options):
    "A model, its target fitted on noise where it needs fitting."
    torch.manual_seed(0)
    model = create_mae(name, **options)
    if not model.target.fitted:
        numbers = model.encoder.patch_size**2 * model.encoder.in_chans
        model.target.fit(torch.randn(600, numbers))
    return model

def check_step(model):
    "One step: a finite loss, and a finite gradient for every parameter that is trained."
    imgs = torch.randn(2, model.encoder.in_chans, *model.encoder.img_size)
    model.train()(imgs, noise=torch.rand(2, model.num_patches)).loss.backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None and p.grad.isfinite().all() and (p.grad != 0).any(), name
        else:
            assert name.endswith('pos_embed') or name.startswith('target.'), name

def values(options):
    "A test's id: the values of its options."
    return '-'.join(map(str, options.values()))

TARGETS = [
    dict(target='pixels'),
    dict(target='norm_pixels'),
    dict(target='pca', target_size=16),
    dict(target='tokens', target_size=32)]
PARTS = [
    dict(),
    dict(encoder_mask_tokens=True),
    dict(decoder='cross'),
    dict(decoder='cross', decode_ratio=.25),
    dict(loss_on='all'),
    dict(loss_on='all', encoder_mask_tokens=True)]
MIXES = [target | part | dict(mask=mask) for target, part, mask in itertools.product(TARGETS, PARTS, MASKS)]

@pytest.mark.parametrize('options', MIXES, ids=values)
def test_every_mix_of_options_trains(options):
    check_step(make(**SMALL, **options))

@pytest.mark.parametrize('name', SIZES)
@pytest.mark.parametrize('decoder', ['self', 'cross'])
def test_every_named_size_trains(name, decoder):
    "At full width, two blocks deep."
    check_step(make(name, depth=2, decoder_depth=2, decoder=decoder))

@pytest.mark.slow
@pytest.mark.parametrize('name', SIZES)
def test_every_named_size_trains_at_full_depth(name):
    check_step(make(name))

@pytest.mark.parametrize('size, chans', [((28, 44), 1), ((8, 4), 5), ((64, 20), 4)])
@pytest.mark.parametrize('decoder', ['self', 'cross'])
def test_any_shape_and_number_of_channels(size, chans, decoder):
    options = SMALL | dict(img_size=size, in_chans=chans)
    check_step(make(**options, decoder=decoder, mask_ratio=.5))

def grads_of(model):
    "Gradients by name."
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

@pytest.mark.parametrize('options', [dict(mask=mask) for mask in MASKS] + PARTS[1:4], ids=values)
def test_traces_without_a_graph_break(options):
    "fullgraph=True raises at the first break; the traced model gives the same loss and gradients."
    model = make(**SMALL | dict(depth=1, decoder_depth=1), **options).train()
    imgs, noise = torch.randn(2, 3, 28, 28), torch.rand(2, 49)
    eager = model(imgs, noise=noise)
    eager.loss.backward()
    grads = grads_of(model)
    model.zero_grad()
    torch._dynamo.reset()
    traced = torch.compile(model, fullgraph=True, backend='aot_eager')(imgs, noise=noise)
    traced.loss.backward()
    assert torch.equal(traced.mask, eager.mask)
    assert torch.allclose(traced.pred, eager.pred, atol=1e-5)
    traced_grads = grads_of(model)
    for name, grad in grads.items():
        assert torch.allclose(traced_grads[name], grad, atol=1e-5), name

@pytest.mark.parametrize('mask', MASKS)
def test_a_mask_is_the_same_whatever_the_batch(mask):
    noise = torch.rand(6, 196)
    whole = MASKS[mask](noise, (14, 14), .75)
    part = MASKS[mask](noise[3:5], (14, 14), .75)
    for a, b in zip(whole, part):
        assert torch.equal(a[3:5], b)

@pytest.mark.parametrize('options', PARTS[:3], ids=values)
def test_nothing_hidden_leaks_into_the_encoder(options):
    "With mask tokens too, hidden pixels change nothing but the loss."
    model = make(**SMALL, **options).eval()
    imgs, noise = torch.randn(2, 3, 28, 28), torch.rand(2, 49)
    out = model(imgs, noise=noise)
    hidden = out.mask.view(2, 1, 7, 1, 7, 1).expand(2, 3, 7, 4, 7, 4).reshape(imgs.shape).bool()
    assert patchify(hidden.float(), 4).mean(-1).eq(out.mask).all()
    changed = torch.where(hidden, 9., imgs)
    assert torch.equal(model(changed, noise=noise).pred, out.pred)

COMMAND_OPTIONS = [
    dict(target='pca', target_size='8'),
    dict(target='tokens', target_size='16', mask='block', mask_ratio='.5'),
    dict(decoder='cross', decode_ratio='.5', mask='grid'),
    dict(encoder_mask_tokens='True', loss_on='all', decoder_depth='2', decoder_dim='32')]

@pytest.mark.parametrize('options', COMMAND_OPTIONS, ids=values)
def test_every_option_is_a_flag_of_the_command(forked, tmp_path, photos, options):
    "Trained, written, read again, shown."
    settings = ('amp=False', *(f'{name}={value}' for name, value in options.items()))
    flags = [word for setting in settings for word in ('--set', setting)]
    short = '--max-steps', '2', '--bs', '20', '--num-workers', '0'
    trained = forked('mae-pretrain', 'photos', '--model', 'mae_vit_nano_patch4_32', *flags, *short, '--out', 'run')
    assert trained.code == 0, trained
    assert ('fitted on' in trained.out) == ('target_size' in options)
    config = load_mae(tmp_path/'run').config
    for name, value in options.items():
        assert str(config[name]).lstrip('0') == value
    Image.new('RGB', (40, 40), 'red').save(tmp_path/'a.png')
    shown = forked('mae-show', 'run', 'a.png', '--out', 'shown.png', pictures=True)
    assert shown.code == 0, shown.err
    assert (tmp_path/'shown.png').stat().st_size > 1000

class Dvae(torch.nn.Module):
    "The discrete VAE of DALL-E as transformers has it, BEiT's teacher, behind the small interface of targets."
    def __init__(self):
        super().__init__()
        from transformers import FlavaImageCodebook, FlavaImageCodebookConfig
        config = FlavaImageCodebookConfig(hidden_size=16, num_blocks_per_group=1, vocab_size=64)
        self.codebook = FlavaImageCodebook(config).eval()
        self.vocab_size = 64

    def forward(self, imgs):
        "Eight pixels a token: for patches of 16 the image at half its size."
        half = torch.nn.functional.interpolate(imgs, scale_factor=.5, mode='bicubic', antialias=True)
        return self.codebook.get_codebook_indices(half).flatten(1)

def test_a_published_tokenizer_plugs_in(tmp_path):
    "With random weights: the published ones are not available here."
    torch.manual_seed(0)
    size = dict(img_size=(64, 96), dim=32, depth=1, num_heads=2, decoder_dim=16, decoder_depth=1, decoder_heads=2)
    model = create_mae('mae_vit_base_patch16', target=TokenTarget(16, 3, tokenizer=Dvae()), **size)
    imgs = torch.randn(2, 3, 64, 96)
    assert model.target(imgs).shape == (2, 24)
    assert model(imgs).pred.shape == (2, 24, 64)
    check_step(model)

    file = tmp_path/'m.safetensors'
    save_model(model, file)
    again = load_mae(file, target=TokenTarget(16, 3, tokenizer=Dvae()))
    assert torch.equal(again.target(imgs), model.target(imgs))
    with pytest.raises(ValueError, match='decoder.pred.weight has shape'):
        load_mae(file)   # our own codebook does not fit in its place
