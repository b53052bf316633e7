"""Weights in and out: parity with timm and transformers in both directions, round trips bit for bit, and wrong weights."""
import argparse
import http.server
import json
import pathlib
import pickle
import threading
import zipfile

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.models import adapt_input_conv
from timm.models.vision_transformer import Block, PatchEmbed, VisionTransformer
from torch import nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification, ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel

from mae_nb.model.classifier import create_classifier
from mae_nb.weights.layouts import *
from mae_nb.weights.published import *
from mae_nb.weights.reading import *
from mae_nb.weights.loading import *
from mae_nb.weights.building import *
from mae_nb.weights.convert import *
from mae_nb.weights.hub import *
from mae_nb.model.mae import create_mae

DTYPES = pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=['float32', 'float64'])
SIZE = dict(patch_size=16, dim=96, depth=3, num_heads=3)              # a base model, narrowed
DECODER = dict(decoder_dim=64, decoder_depth=2, decoder_heads=4)

def relative(a, b): return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()
def same(a, b): return sorted(a) == sorted(b) and all(torch.equal(a[k], b[k]) for k in a)
def snapshot(model): return {k: v.clone() for k, v in model.state_dict().items()}

def shaken(model, dtype=torch.float32):
    "Every weight moved a little: biases and norms too must differ from their initial values."
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn_like(p), alpha=.05)
    return model.to(dtype).eval()

def small_mae(**kwargs): return create_mae('mae_vit_base_patch16', **SIZE | DECODER | kwargs)
def small_classifier(num_classes=10, **kwargs): return create_classifier('mae_vit_base_patch16', num_classes, **SIZE | kwargs)

def vit_config(img_size=224, **kwargs):
    return dict(image_size=img_size, patch_size=16, hidden_size=96, num_hidden_layers=3, num_attention_heads=3, intermediate_size=384, layer_norm_eps=1e-6) | kwargs

def hf_mae(img_size=224, cls=ViTMAEForPreTraining, **kwargs):
    return cls(ViTMAEConfig(**vit_config(img_size, decoder_hidden_size=64, decoder_num_hidden_layers=2, decoder_num_attention_heads=4, decoder_intermediate_size=256, **kwargs)))

def timm_vit(img_size=224, num_classes=0, pool='token', **kwargs):
    return VisionTransformer(**dict(img_size=img_size, patch_size=16, embed_dim=96, depth=3, num_heads=3, num_classes=num_classes,
                                    global_pool=pool, fc_norm=pool == 'avg') | kwargs)

class OfficialShape(nn.Module):
    "The tensors of the official model under the official names, made of timm's layers; it is never run."
    def __init__(self, dim=96, depth=3, decoder_dim=64, decoder_depth=2, patch=16, img_size=224, chans=3):
        super().__init__()
        n, heads = (img_size // patch)**2, 1
        self.cls_token, self.pos_embed = nn.Parameter(torch.randn(1, 1, dim)), nn.Parameter(torch.randn(1, n + 1, dim))
        self.patch_embed = PatchEmbed(img_size, patch, chans, dim)
        self.blocks, self.norm = nn.ModuleList(Block(dim, heads, qkv_bias=True) for _ in range(depth)), nn.LayerNorm(dim)
        self.decoder_embed, self.mask_token = nn.Linear(dim, decoder_dim), nn.Parameter(torch.randn(1, 1, decoder_dim))
        self.decoder_pos_embed = nn.Parameter(torch.randn(1, n + 1, decoder_dim))
        self.decoder_blocks = nn.ModuleList(Block(decoder_dim, heads, qkv_bias=True) for _ in range(decoder_depth))
        self.decoder_norm, self.decoder_pred = nn.LayerNorm(decoder_dim), nn.Linear(decoder_dim, patch**2 * chans)

@pytest.fixture(scope='module')
def official_state(): return {k: v.clone() for k, v in shaken(OfficialShape()).state_dict().items()}

ARGS = argparse.Namespace(model='mae_vit_base_patch16', norm_pix_loss=True, mask_ratio=.75, input_size=224, batch_size=64, blr=1.5e-4, device='cuda',
                          data_path='/data/imagenet', output_dir=pathlib.PosixPath('/checkpoint/mae'), distributed=True, gpu=0)

def official_file(path, state, zipped=True, **args):
    "A checkpoint as the official training script leaves it: tensors, optimizer, loss scaler and the command line."
    optimizer = dict(state={0: dict(step=7, exp_avg=torch.ones(3), exp_avg_sq=torch.ones(3))}, param_groups=[dict(lr=.1, betas=(.9, .95), params=[0])])
    torch.save(dict(model=state, optimizer=optimizer, epoch=799, scaler=dict(scale=65536., growth_factor=2.), args=argparse.Namespace(**vars(ARGS) | args)), path,
               _use_new_zipfile_serialization=zipped)
    return path

# parity, weights copied both ways

def both_ways(ours, theirs, copy_here, copy_there):
    "The two models once with their weights and once with ours."
    copy_here(ours, theirs); yield ours, theirs
    shaken(ours, next(ours.parameters()).dtype)
    copy_there(ours, theirs); yield ours, theirs

def hf_here(ours, theirs): assert not (r := load_hf(ours, theirs.state_dict(), strict=True)).changed, r
def timm_here(ours, theirs): assert not (r := load_timm(ours, theirs.state_dict(), strict=True)).changed, r
def timm_there(ours, theirs): theirs.load_state_dict(to_timm(our_state(ours))[0], strict=True)
def hf_there(folder):
    "Through a folder that transformers itself reads."
    def copy(ours, theirs):
        save_hf(ours, folder)
        read, said = type(theirs).from_pretrained(folder, output_loading_info=True, dtype=next(theirs.parameters()).dtype)
        assert not any(said[k] for k in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
        assert read.config.layer_norm_eps == 1e-6
        theirs.load_state_dict(read.state_dict())
    return copy

@DTYPES
@pytest.mark.parametrize('target', ['norm_pixels', 'pixels'])
def test_transformers_mae(target, dtype, tolerance, tmp_path):
    "Loss, predictions, mask and every gradient."
    theirs = shaken(hf_mae(norm_pix_loss=target == 'norm_pixels'), dtype)
    ours = small_mae(target=target).to(dtype).eval()
    torch.manual_seed(0)
    imgs, noise = torch.randn(2, 3, 224, 224, dtype=dtype), torch.rand(2, 196, dtype=dtype)
    for mine, other in both_ways(ours, theirs, hf_here, hf_there(tmp_path)):
        for m in (mine, other): m.zero_grad()
        a, b = mine(imgs, noise=noise), other(imgs, noise=noise)
        assert torch.equal(a.mask, b.mask.to(a.mask.dtype))
        assert relative(a.loss, b.loss) < tolerance and relative(a.pred, b.logits) < tolerance
        a.loss.backward(); b.loss.backward()
        grads = from_hf({k: p.grad for k, p in other.named_parameters() if p.grad is not None})
        worst = max((relative(p.grad, grads[k]), k) for k, p in mine.named_parameters() if p.requires_grad)
        assert worst[0] < tolerance, worst

@DTYPES
@pytest.mark.parametrize('img_size', [224, 448])
def test_transformers_encoder(img_size, dtype, tolerance, tmp_path):
    theirs = shaken(hf_mae(img_size, ViTMAEModel), dtype)
    ours = small_mae(img_size=img_size).to(dtype).eval()
    n = (img_size // 16)**2
    imgs, noise = torch.randn(1, 3, img_size, img_size, dtype=dtype), torch.rand(1, n, dtype=dtype)
    for mine, other in both_ways(ours.encoder, theirs, hf_here, hf_there(tmp_path)):
        mask = ours.make_mask(imgs, noise=noise)
        with torch.no_grad(): assert relative(mine(imgs, mask), other(imgs, noise=noise).last_hidden_state) < tolerance

@DTYPES
@pytest.mark.parametrize('img_size', [224, 448])
def test_transformers_classifier(img_size, dtype, tolerance, tmp_path):
    theirs = shaken(ViTForImageClassification(ViTConfig(**vit_config(img_size, num_labels=10))), dtype)
    imgs = torch.randn(1, 3, img_size, img_size, dtype=dtype)
    for mine, other in both_ways(small_classifier(pool='cls', img_size=img_size).to(dtype).eval(), theirs, hf_here, hf_there(tmp_path)):
        with torch.no_grad(): assert relative(mine(imgs), other(imgs).logits) < tolerance

@DTYPES
@pytest.mark.parametrize('img_size', [224, 448])
@pytest.mark.parametrize('pool', ['encoder', 'avg', 'cls'])
def test_timm(pool, img_size, dtype, tolerance):
    "The encoder's features, and logits and gradients of classifiers with both poolings."
    encoder, size = pool == 'encoder', dict(img_size=img_size)
    theirs = shaken(timm_vit(num_classes=0 if encoder else 10, pool='avg' if pool == 'avg' else 'token', **size), dtype)
    ours = (small_mae(**size).encoder if encoder else small_classifier(pool=pool, **size)).to(dtype).eval()
    imgs = torch.randn(2, 3, img_size, img_size, dtype=dtype)
    for mine, other in both_ways(ours, theirs, timm_here, timm_there):
        for m in (mine, other): m.zero_grad()
        a, b = mine(imgs), other.forward_features(imgs) if encoder else other(imgs)
        assert relative(a, b) < tolerance
        a.square().mean().backward(); b.square().mean().backward()
        grads = {k: p.grad for k, p in other.named_parameters()}
        worst = max((relative(p.grad, grads[k]), k) for k, p in mine.named_parameters() if p.requires_grad)
        assert worst[0] < tolerance, worst

@pytest.mark.parametrize('pool', ['avg', 'cls'])
def test_timm_base(pool, tmp_path):
    "The whole ViT-B classifier, by files, in both directions."
    theirs = timm.create_model('vit_base_patch16_224', global_pool='avg' if pool == 'avg' else 'token', num_classes=1000)
    shaken(theirs)
    save_file({k: v.contiguous() for k, v in theirs.state_dict().items()}, tmp_path/'timm.safetensors')
    options = model_options(tmp_path/'timm.safetensors')
    assert options == dict(name='mae_vit_base_patch16', img_size=(224, 224), in_chans=3, num_classes=1000, pool=pool)
    ours = create_classifier(**options).eval()
    load_timm(ours, tmp_path/'timm.safetensors', strict=True)
    imgs = torch.randn(1, 3, 224, 224)
    with torch.no_grad(): assert relative(ours(imgs), theirs(imgs)) < 1e-5
    assert save_timm(ours, tmp_path/'back.safetensors') == []
    assert same(read_weights(tmp_path/'back.safetensors'), theirs.state_dict())
    with torch.no_grad(): assert relative(ours.double()(imgs.double()), theirs.double()(imgs.double())) < 1e-10

# round trips

@pytest.mark.parametrize('name, tensors', [('mae_vit_base_patch16', 254), ('mae_vit_large_patch16', 398), ('mae_vit_huge_patch14', 494)])
def test_official_names_of_the_paper(name, tensors):
    "As many tensors as the official models have, under the names and in the shapes of timm's layers."
    size = SIZES[name]
    with torch.device('meta'):
        ours = to_official(create_mae(name).state_dict())
        theirs = OfficialShape(size['dim'], size['depth'], 512, 8, size['patch_size']).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()} and len(ours) == tensors

@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'before torch 1.6'])
def test_official_round_trip(zipped, official_state, tmp_path):
    file = official_file(tmp_path/'checkpoint-799.pth', official_state, zipped)
    ours = small_mae()
    report = load_official(ours, file, strict=True)
    assert len(report.loaded) == len(official_state) and ours.not_loaded == []
    save_official(ours, tmp_path/'back.pth')
    assert same(torch.load(tmp_path/'back.pth', weights_only=True)['model'], official_state)   # by torch's reader as it is

@pytest.mark.parametrize('cls, make', [(ViTMAEForPreTraining, lambda: small_mae(target='pixels')), (ViTMAEModel, lambda: small_mae().encoder),
                                       (ViTForImageClassification, lambda: small_classifier(pool='cls'))])
def test_transformers_round_trip(cls, make, tmp_path):
    theirs = shaken(cls(ViTConfig(**vit_config(num_labels=10))) if cls is ViTForImageClassification else hf_mae(cls=cls))
    theirs.save_pretrained(tmp_path/'theirs')                       # transformers 5's own names on disk
    ours = make()
    load_hf(ours, tmp_path/'theirs', strict=True)
    save_hf(ours, tmp_path/'ours')
    assert same(cls.from_pretrained(tmp_path/'ours').state_dict(), theirs.state_dict())
    assert len(read_weights(tmp_path/'ours')) == len(theirs.state_dict())
    written = json.loads((tmp_path/'ours'/'config.json').read_text())
    theirs_config = json.loads((tmp_path/'theirs'/'config.json').read_text())
    assert {k: theirs_config[k] for k in written if k in theirs_config} == {k: written[k] for k in written if k in theirs_config}

def test_timm_round_trip(tmp_path):
    for theirs, ours in ((timm_vit(), small_mae().encoder), (timm_vit(num_classes=10, pool='avg'), small_classifier()), (timm_vit(num_classes=10), small_classifier(pool='cls'))):
        load_timm(ours, shaken(theirs).state_dict(), strict=True)
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
    for name in CHECKPOINTS:
        if not name.startswith('timm/'): continue
        cfg = timm.get_pretrained_cfg(name.removeprefix('timm/'))
        assert cfg.hf_hub_id == name and cfg.license == 'cc-by-nc-4.0' and cfg.url == CHECKPOINTS[cfg.url.split('/')[-1].removesuffix('.pth')].url

def test_convert_every_pair(tmp_path):
    "Each layout to each other, and back: not one bit changes, and what is left out is said."
    model = shaken(small_mae()); save_model(model, tmp_path/'start.safetensors')
    more = dict(num_heads=3, decoder_heads=4)
    end = dict(official='.pth', timm='.safetensors', hf='', safetensors='.safetensors')
    for a in ('official', 'hf', 'safetensors'):
        first = tmp_path/f'1_{a}{end[a]}'
        convert(tmp_path/'start.safetensors', first, a)
        for b in ('official', 'hf', 'safetensors'):
            second = tmp_path/f'2_{a}_{b}{end[b]}'
            convert(first, second, b, **more if a == 'official' else {})
            assert same(to_ours(read_weights(second)), model.state_dict()), (a, b)
        said = convert(first, tmp_path/f'3_{a}.safetensors', 'timm')
        assert 'left out, as timm has no place for them: 32 tensors (decoder.' in said
        assert same(read_weights(tmp_path/f'3_{a}.safetensors'), model.encoder.state_dict())
    assert not list(tmp_path.rglob('*.part'))

def test_a_converted_classifier(tmp_path):
    clf = shaken(small_classifier(pool='cls')); save_model(clf, tmp_path/'clf.safetensors', dict(name='mine', mean=[.5], std=[.5]))
    convert(tmp_path/'clf.safetensors', tmp_path/'hf', 'hf')
    convert(tmp_path/'hf', tmp_path/'back.safetensors', 'safetensors')
    again = create_classifier(**model_options(tmp_path/'back.safetensors'))
    load_weights(again, tmp_path/'back.safetensors', strict=True)
    assert same(again.state_dict(), clf.state_dict())

@pytest.mark.parametrize('odd', [dict(mlp_ratio=2.), dict(patch_size=8, img_size=64), dict(in_chans=1), dict(depth=1, decoder_depth=1), dict(img_size=(96, 96)),
                                 dict(decoder_dim=32, decoder_heads=2), dict(dim=64, num_heads=8)], ids=str)
def test_models_are_built_from_their_files(odd, tmp_path):
    "Every size comes back from a file of transformers, and from an official one with the heads said; the same numbers come out."
    model = shaken(small_mae(**dict(img_size=64) | odd))
    save_hf(model, tmp_path/'hf'); convert(tmp_path/'hf', tmp_path/'x.safetensors', 'safetensors')
    torch.save(to_official(model.state_dict()), tmp_path/'official.pth')
    heads = dict(num_heads=model.config.get('num_heads', 12), decoder_heads=model.config.get('decoder_heads', 16), target='norm_pixels')
    imgs, noise = torch.randn(2, model.encoder.in_chans, *model.encoder.img_size), torch.rand(2, model.num_patches)
    for again in (load_mae(tmp_path/'hf'), load_mae(tmp_path/'x.safetensors'), load_mae(tmp_path/'official.pth', **heads)):
        assert same(again.state_dict(), model.state_dict())
        with torch.no_grad(): assert torch.equal(again(imgs, noise=noise).pred, model(imgs, noise=noise).pred)

# sizes and channels

def test_positions_by_the_official_rule(official_state):
    "224 -> 448 for every table: class row kept, the others bicubic with align_corners off."
    def by_hand(table):
        grid = table[0, 1:].reshape(14, 14, -1).permute(2, 0, 1)[None]
        grid = F.interpolate(grid, size=(28, 28), mode='bicubic', align_corners=False)
        return torch.cat([table[:, :1], grid[0].permute(1, 2, 0).reshape(1, 784, -1)], dim=1)
    mae, clf = small_mae(img_size=448), small_classifier(img_size=448)
    report = load_official(mae, official_state)
    assert not report.missing and report.changed == {f'{k}.pos_embed': 'resized from 14x14 to 28x28 patches' for k in ('encoder', 'decoder')}
    assert torch.equal(mae.encoder.pos_embed, by_hand(official_state['pos_embed'])) and torch.equal(mae.decoder.pos_embed, by_hand(official_state['decoder_pos_embed']))
    load_official(clf, official_state)
    assert torch.equal(clf.pos_embed, by_hand(official_state['pos_embed'])) and clf.pos_embed.requires_grad
    assert mae(torch.randn(1, 3, 448, 448)).loss.isfinite()

def test_larger_images_as_timm_does_it():
    "A 224 classifier of timm at 448: its resizing, with the antialiasing off that the official rule does not have, and ours give the same logits."
    small, imgs = shaken(timm_vit(num_classes=10, pool='avg')), torch.randn(1, 3, 448, 448)
    ours = small_classifier(img_size=448).eval(); load_timm(ours, small.state_dict())
    theirs = timm_vit(448, num_classes=10, pool='avg').eval()
    apart = {}
    for antialias in (False, True):
        table = resample_abs_pos_embed(small.pos_embed.detach(), [28, 28], antialias=antialias)
        theirs.load_state_dict(small.state_dict() | {'pos_embed': table})
        with torch.no_grad(): apart[antialias] = relative(ours(imgs), theirs(imgs))
    assert apart[False] < 1e-5 < apart[True] < 1e-2    # timm's default is another cubic: close, and not the same

def test_larger_images_as_transformers_does_it():
    "A 224 classifier of transformers at 448: its interpolation of positions and ours give the same logits."
    theirs, imgs = shaken(ViTForImageClassification(ViTConfig(**vit_config(num_labels=10)))), torch.randn(1, 3, 448, 448)
    ours = small_classifier(pool='cls', img_size=448).eval(); load_hf(ours, theirs.state_dict())
    with torch.no_grad(): assert relative(ours(imgs), theirs(imgs, interpolate_pos_encoding=True).logits) < 1e-5

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
    with pytest.raises(ValueError, match='do not fit the model exactly'): load_official(small_mae(in_chans=1), official_state, strict=True)

def test_load_mae_at_another_size(official_state, tmp_path):
    file = official_file(tmp_path/'checkpoint.pth', official_state)
    with pytest.raises(ValueError, match='not of the size of mae_vit_base_patch16, .* pass num_heads'): load_mae(file)           # base by its name, but narrower
    model = load_mae(file, img_size=(224, 448), num_heads=3, decoder_heads=4)
    assert model.encoder.grid == (14, 28) and model.config['target'] == 'norm_pixels' and not model.training
    save_model(model, tmp_path/'wide.safetensors')
    assert load_mae(tmp_path/'wide.safetensors', img_size=448).encoder.grid == (28, 28)
    raw = load_mae(official_file(tmp_path/'raw.pth', official_state, norm_pix_loss=False), num_heads=3, decoder_heads=4)
    assert raw.config['target'] == 'pixels'

# wrong weights

class Trap:
    "Unpickling this runs code."
    def __init__(self, file): self.file = str(file)
    def __reduce__(self): return exec, (f'open({self.file!r}, "w").close()',)

def corrupted(path, start, end):
    "The same file with some bytes zero."
    data = bytearray(path.read_bytes()); data[start:end] = bytes(end - start); path.write_bytes(data)
    return path

def wrong_files(folder, state):
    "Name -> (file, what the error says)."
    good = official_file(folder/'good.pth', state)
    save_file(state, folder/'good.safetensors')
    cut = folder/'cut.pth'; cut.write_bytes(good.read_bytes()[:20_000])
    short = folder/'short.safetensors'; short.write_bytes((folder/'good.safetensors').read_bytes()[:-100])
    header = corrupted(pathlib.Path(folder/'header.safetensors'), 10, 60) if (folder/'header.safetensors').write_bytes((folder/'good.safetensors').read_bytes()) else None
    damaged = folder/'damaged.pth'; damaged.write_bytes(good.read_bytes()); corrupted(damaged, 0, 200)
    trap = folder/'trap.pth'; torch.save(dict(model=state, args=argparse.Namespace(model=Trap(folder/'ran'))), trap)
    old_trap = folder/'old_trap.pth'; old_trap.write_bytes(pickle.dumps(dict(model=Trap(folder/'ran')), protocol=2))
    text = folder/'text.pth'; text.write_text('<html>404 Not Found</html>')
    archive = folder/'archive.pth'
    with zipfile.ZipFile(archive, 'w') as z: z.writestr('data', 'nothing')
    bit = folder/'bit.pth'; data = bytearray(good.read_bytes()); data[len(data) // 2] ^= 1; bit.write_bytes(data)
    torch.save(dict(model=OfficialShape(dim=64).state_dict()), folder/'narrow.pth')
    torch.save(dict(model=OfficialShape(depth=5).state_dict()), folder/'deep.pth')
    torch.save(OfficialShape(chans=4, patch=8).state_dict(), folder/'patch.pth')
    torch.save(timm.create_model('resnet18').state_dict(), folder/'resnet.pth')
    torch.save(state | {'blocks.0.attn.qkv.weight': 'text'}, folder/'words.pth')
    torch.save(state | {'blocks.0.norm1.weight': torch.zeros(96, dtype=torch.long)}, folder/'integers.pth')
    return dict(cut=(cut, 'cannot be read'), bit=(bit, 'the checksum of .* is wrong'), short=(short, 'cannot be read'), header=(header, 'cannot be read'), damaged=(damaged, 'cannot be read'),
                trap=(trap, 'is not opened: it wants to call .*exec'), old_trap=(old_trap, 'is not opened: it wants to call .*exec'), text=(text, 'cannot be read'),
                archive=(archive, 'cannot be read'), narrow=(folder/'narrow.pth', 'create the model with the size'), deep=(folder/'deep.pth', 'blocks: 5 in the weights and 3 in the model'),
                patch=(folder/'patch.pth', 'has shape'), resnet=(folder/'resnet.pth', 'none of the .* tensors has a name'),
                words=(folder/'words.pth', 'holds no state dict'), integers=(folder/'integers.pth', 'no tensor of numbers'),
                gone=(folder/'gone.pth', 'no such weights file'), empty=(folder/'empty', 'holds no model.safetensors'))

@pytest.mark.parametrize('make', [small_mae, lambda: small_mae().encoder, small_classifier], ids=['mae', 'encoder', 'classifier'])
def test_wrong_weights_change_nothing(make, official_state, tmp_path):
    "One line that names the file, and every tensor as it was."
    (tmp_path/'empty').mkdir()
    model, load = make(), load_weights
    before, mode = snapshot(model), {k: p.requires_grad for k, p in model.named_parameters()}
    for name, (file, says) in wrong_files(tmp_path, official_state).items():
        with pytest.raises((ValueError, FileNotFoundError), match=says) as e: load(model, file)
        assert str(file) in str(e.value) and len(str(e.value).splitlines()) == 1, name
        assert same(before, model.state_dict()) and not hasattr(model, 'not_loaded'), name
    assert mode == {k: p.requires_grad for k, p in model.named_parameters()}
    assert not (tmp_path/'ran').exists()
    pickle.loads((tmp_path/'old_trap.pth').read_bytes()); assert (tmp_path/'ran').exists()       # the trap was a real one

def test_another_target_is_refused(official_state, tmp_path):
    "A file that says what it predicts goes into no model that predicts something else, but its encoder goes anywhere."
    save_model(small_mae(target='pixels'), tmp_path/'ours.safetensors'); save_hf(small_mae(target='pixels'), tmp_path/'hf')
    official_file(tmp_path/'official.pth', official_state, norm_pix_loss=False)
    torch.save(dict(model=official_state), tmp_path/'mae_visualize_vit_base.pth')                # a published name
    model = small_mae(); before = snapshot(model)
    for file in ('ours.safetensors', 'hf', 'official.pth', 'mae_visualize_vit_base.pth'):
        heads = r'(attention heads|predict pixels and the model norm_pixels)'
        with pytest.raises(ValueError, match=heads) as e: load_weights(model, tmp_path/file)
        assert len(str(e.value).splitlines()) == 1
        assert same(before, model.state_dict())
    load_weights(small_mae(target='pixels').encoder, tmp_path/'hf')

def test_a_head_behind_another_pooling_is_refused(tmp_path):
    for pool, other in (('avg', 'cls'), ('cls', 'avg')):
        theirs, model = timm_vit(num_classes=10, pool='avg' if pool == 'avg' else 'token'), small_classifier(pool=other)
        before = snapshot(model)
        with pytest.raises(ValueError, match=f"with another pooling, .* create it with pool='{pool}'"): load_timm(model, theirs.state_dict())
        assert same(before, model.state_dict())
        assert load_timm(model, theirs.state_dict(), skip='head.').missing[-2:] == ['head.weight', 'head.bias']

def test_other_heads_are_refused(tmp_path):
    "The same shapes mean another model with another number of heads."
    save_hf(small_mae(), tmp_path/'hf'); save_model(small_mae(), tmp_path/'ours.safetensors')
    for file in ('hf', 'ours.safetensors'):
        with pytest.raises(ValueError, match='3 attention heads and the model has 6'): load_weights(small_mae(num_heads=6), tmp_path/file)
        with pytest.raises(ValueError, match='4 attention heads in the decoder and the model has 8'): load_weights(small_mae(decoder_heads=8), tmp_path/file)

def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    model, file = small_mae(), tmp_path/'x.pth'
    save_official(model, file); first = file.read_bytes()
    def full(*args, **kwargs): raise OSError('No space left on device')
    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(OSError, match='No space'): save_official(model, file)
    assert file.read_bytes() == first and [f.name for f in tmp_path.iterdir()] == ['x.pth']

def test_what_other_libraries_have_no_place_for(tmp_path):
    state = small_mae().state_dict()
    for extra in ('encoder.mask_token', 'target.basis', 'decoder.blocks.0.cross.kv.weight'):
        for to in (to_official, to_hf):
            with pytest.raises(ValueError, match=f'{extra} has no place'): to(state | {extra: torch.zeros(1)})
    wide = small_mae(img_size=(224, 448))
    with pytest.raises(ValueError, match='knows square images only'): save_hf(wide, tmp_path/'hf')
    with pytest.raises(ValueError, match='has no average pooling'): save_hf(small_classifier(pool='avg'), tmp_path/'hf')
    clf = shaken(small_classifier(pool='cls', img_size=(224, 448)))                              # transformers' ViT knows these
    save_hf(clf, tmp_path/'hf')
    imgs = torch.randn(1, 3, 224, 448)
    with torch.no_grad(): assert relative(ViTForImageClassification.from_pretrained(tmp_path/'hf').eval()(imgs).logits, clf(imgs)) < 1e-5

# the registry

def test_a_published_checkpoint_in_one_line(tmp_path, monkeypatch):
    "load_mae(name): fetched over a line that breaks, checked, and the target known from the name."
    nano = create_mae('mae_vit_nano_patch4_28', target='pixels')
    data_file = tmp_path/'remote'/'x.pth'; data_file.parent.mkdir()
    torch.save(dict(model=to_official(nano.state_dict())), data_file)
    data, starts = data_file.read_bytes(), []
    class Line(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args): pass
        def do_GET(self):
            start = int((self.headers.get('Range') or 'bytes=0-')[6:-1]); starts.append(start)
            self.send_response(206 if start else 200); self.send_header('Content-Length', str(len(data) - start)); self.end_headers()
            self.wfile.write(data[start:start + len(data) // 2 + 1])
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Line)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv('MAE_NB_WEIGHTS', str(tmp_path/'weights'))
    url = f'http://127.0.0.1:{server.server_port}/x.pth'
    entry = lambda md5: Checkpoint(url, 'official', 'mae', 'mae_vit_nano_patch4_28', 'pixels', 'none', md5, 'here', 'mae_small.pth')
    monkeypatch.setitem(CHECKPOINTS, 'mae_small', entry('ffffff' if not md5(data_file).startswith('ffffff') else '000000'))
    with pytest.raises(ValueError, match='is not the file of mae_small: its MD5 begins'): load_mae('mae_small')
    assert list((tmp_path/'weights').iterdir()) == []                                           # a wrong file is not kept
    monkeypatch.setitem(CHECKPOINTS, 'mae_small', entry(md5(data_file)[:6]))
    model = load_mae('mae_small', img_size=28)
    assert model.config['target'] == 'pixels' and same(model.state_dict(), nano.state_dict())
    assert starts == [0, len(data) // 2 + 1] * 2
    server.shutdown(); server.server_close()
    assert same(load_mae('mae_small', img_size=28).state_dict(), nano.state_dict())             # from disk, with no server
    assert open_weights('mae_small').said == dict(name='mae_vit_nano_patch4_28', target='pixels')

def test_registry_says_what_is_not_known():
    assert {c.md5 for k, c in CHECKPOINTS.items() if '_full' in k or 'visualize' in k or '/' in k} == {None}
    assert all('Apache 2.0' in c.licence and 'CC BY-NC 4.0' in c.licence for k, c in CHECKPOINTS.items() if k.startswith('facebook/'))
    assert all(c.target == ('pixels' if 'visualize' in k or 'facebook/' in k else None if 'finetuned' in k else 'norm_pixels') for k, c in CHECKPOINTS.items())

def test_from_official_leaves_the_model_alone_on_partial_fill(official_state):
    "An encoder that loads without its decoder: the decoder stays as it was, and is named."
    model = small_mae(); before = snapshot(model)
    report = fill(model, {k: v for k, v in from_official(official_state).items() if k.startswith('encoder.')})
    assert report.missing == model.not_loaded and all(torch.equal(model.state_dict()[k], before[k]) for k in report.missing)
