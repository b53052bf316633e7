"""Every named size and every option of Table 1: trains, traces, and leaves no parameter out."""
import itertools

import pytest
import torch
from PIL import Image

from mae_nb.weights.building import load_mae
from mae_nb.weights.loading import save_model
from mae_nb.model.mae import MASKS, SIZES, create_mae
from mae_nb.model.patches import patchify
from mae_nb.model.targets import TokenTarget

SMALL = dict(img_size=28, in_chans=3, dim=32, depth=2, num_heads=2, decoder_dim=16, decoder_depth=2, decoder_heads=2)

def make(name='mae_vit_nano_patch4_28', **options):
    "A model, its target fitted on noise where it needs fitting."
    torch.manual_seed(0)
    model = create_mae(name, **options)
    if not model.target.fitted: model.target.fit(torch.randn(600, model.encoder.patch_size**2 * model.encoder.in_chans))
    return model

def check_step(model):
    "One step: a finite loss, and a finite gradient for every parameter that is trained."
    imgs = torch.randn(2, model.encoder.in_chans, *model.encoder.img_size)
    model.train()(imgs, noise=torch.rand(2, model.num_patches)).loss.backward()
    for name, p in model.named_parameters():
        if not p.requires_grad: assert name.endswith('pos_embed') or name.startswith('target.'), name
        else: assert p.grad is not None and p.grad.isfinite().all() and (p.grad != 0).any(), name

TARGETS = [dict(target='pixels'), dict(target='norm_pixels'), dict(target='pca', target_size=16), dict(target='tokens', target_size=32)]
PARTS = [dict(), dict(encoder_mask_tokens=True), dict(decoder='cross'), dict(decoder='cross', decode_ratio=.25), dict(loss_on='all'), dict(loss_on='all', encoder_mask_tokens=True)]
MIXES = [a | b | dict(mask=m) for a, b, m in itertools.product(TARGETS, PARTS, MASKS)]

@pytest.mark.parametrize('options', MIXES, ids=lambda o: '-'.join(str(v) for v in o.values()))
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
    check_step(make(**SMALL | dict(img_size=size, in_chans=chans), decoder=decoder, mask_ratio=.5))

@pytest.mark.parametrize('options', [dict(mask=m) for m in MASKS] + PARTS[1:4], ids=lambda o: '-'.join(str(v) for v in o.values()))
def test_traces_without_a_graph_break(options):
    "fullgraph=True raises at the first break; the traced model gives the same loss and gradients."
    model = make(**SMALL, **options).train()
    imgs, noise = torch.randn(2, 3, 28, 28), torch.rand(2, 49)
    eager = model(imgs, noise=noise); eager.loss.backward()
    grads = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(); torch._dynamo.reset()
    traced = torch.compile(model, fullgraph=True, backend='aot_eager')(imgs, noise=noise); traced.loss.backward()
    assert torch.equal(traced.mask, eager.mask) and torch.allclose(traced.pred, eager.pred, atol=1e-5)
    for k, p in model.named_parameters():
        if k in grads: assert torch.allclose(p.grad, grads[k], atol=1e-5), k

def test_a_mask_is_the_same_whatever_the_batch():
    noise = torch.rand(6, 196)
    for sampler in MASKS.values():
        whole, part = sampler(noise, (14, 14), .75), sampler(noise[3:5], (14, 14), .75)
        assert all(torch.equal(a[3:5], b) for a, b in zip(whole, part))

def test_nothing_hidden_leaks_into_the_encoder():
    "With mask tokens too, hidden pixels change nothing but the loss."
    for options in (dict(), dict(encoder_mask_tokens=True), dict(decoder='cross')):
        model = make(**SMALL, **options).eval()
        imgs, noise = torch.randn(2, 3, 28, 28), torch.rand(2, 49)
        out = model(imgs, noise=noise)
        hidden = out.mask.view(2, 1, 7, 1, 7, 1).expand(2, 3, 7, 4, 7, 4).reshape(imgs.shape).bool()
        assert torch.equal(model(torch.where(hidden, 9., imgs), noise=noise).pred, out.pred)
        assert patchify(hidden.float(), 4).mean(-1).eq(out.mask).all()

@pytest.mark.parametrize('options', [('target=pca', 'target_size=8'), ('target=tokens', 'target_size=16', 'mask=block', 'mask_ratio=.5'),
                                     ('decoder=cross', 'decode_ratio=.5', 'mask=grid'), ('encoder_mask_tokens=True', 'loss_on=all', 'decoder_depth=2', 'decoder_dim=32')])
def test_every_option_is_a_flag_of_the_command(forked, tmp_path, photos, options):
    "Trained, written, read again, shown."
    flags = [x for o in options for x in ('--set', o)]
    got = forked('mae-pretrain', 'photos', '--model', 'mae_vit_nano_patch4_32', '--set', 'amp=False', *flags, '--max-steps', '2', '--bs', '20', '--num-workers', '0', '--out', 'run')
    assert got.code == 0 and ('fitted on' in got.out) == ('target_size' in str(options)), got
    config = load_mae(tmp_path/'run').config
    for o in options: assert str(config[o.split('=')[0]]).lstrip('0') == o.split('=')[1].lstrip('0')
    Image.new('RGB', (40, 40), 'red').save(tmp_path/'a.png')
    got = forked('mae-show', 'run', 'a.png', '--out', 'shown.png')
    assert got.code == 0 and (tmp_path/'shown.png').stat().st_size > 1000, got.err

def test_a_published_tokenizer_plugs_in(tmp_path):
    "The discrete VAE of DALL-E, as transformers has it: BEiT's teacher, behind the small interface of targets. Its weights cannot be had here."
    from transformers import FlavaImageCodebook, FlavaImageCodebookConfig

    class Dvae(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.codebook = FlavaImageCodebook(FlavaImageCodebookConfig(hidden_size=16, num_blocks_per_group=1, vocab_size=64)).eval()
            self.vocab_size = 64
        def forward(self, imgs):   # eight pixels a token: the image at half its size for patches of 16
            half = torch.nn.functional.interpolate(imgs, scale_factor=.5, mode='bicubic', antialias=True)
            return self.codebook.get_codebook_indices(half).flatten(1)

    torch.manual_seed(0)
    options = dict(img_size=(64, 96), dim=32, depth=1, num_heads=2, decoder_dim=16, decoder_depth=1, decoder_heads=2)
    model = create_mae('mae_vit_base_patch16', target=TokenTarget(16, 3, tokenizer=Dvae()), **options)
    imgs = torch.randn(2, 3, 64, 96)
    assert model.target(imgs).shape == (2, 24) and model(imgs).pred.shape == (2, 24, 64)
    check_step(model)
    save_model(model, tmp_path/'m.safetensors')
    again = load_mae(tmp_path/'m.safetensors', target=TokenTarget(16, 3, tokenizer=Dvae()))
    assert torch.equal(again.target(imgs), model.target(imgs))
    with pytest.raises(ValueError, match='decoder.pred.weight has shape'): load_mae(tmp_path/'m.safetensors')   # our own codebook is no stand-in
