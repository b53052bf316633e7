"""Nothing that other libraries' files state or hold disappears: it is used, reported or refused."""
import argparse
import collections
import datetime
import json
import warnings

import numpy as np
import pytest
import torch
from foreign_models import relative, same, shaken
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torchvision.models import VisionTransformer as TorchvisionTransformer
from transformers import (
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    pipeline,
)

from mae_nb.base.errors import UsageError
from mae_nb.data.crops import eval_transform
from mae_nb.data.images import standardize
from mae_nb.model.classifier import create_classifier
from mae_nb.model.mae import create_mae
from mae_nb.model.positions import resize_positions
from mae_nb.weights.building import load_classifier, load_encoder, load_mae
from mae_nb.weights.convert import convert, save_hf, save_timm
from mae_nb.weights.layouts import from_hf
from mae_nb.weights.loading import load_weights, save_model
from mae_nb.weights.reading import open_weights
from mae_nb.weights.stated import stated_by_checkpoint, stated_by_hf, stated_by_timm

NANO = 'mae_vit_nano_patch4_28'
SIZE = dict(in_chans=3, dim=32, depth=2, num_heads=2)
HF = dict(image_size=28, patch_size=4, num_channels=3, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
          intermediate_size=128)
HF_DECODER = dict(decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
                  decoder_intermediate_size=64)
TIMM = dict(img_size=28, patch_size=4, in_chans=3, embed_dim=32, depth=2, num_heads=2, num_classes=0)
IMGS = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
NOISE = torch.rand(2, 49, generator=torch.Generator().manual_seed(1))

def tiny_mae(**options):
    return create_mae(NANO, **SIZE | dict(decoder_dim=16, decoder_depth=1, decoder_heads=2) | options)

def hf_mae(folder, **options):
    "transformers' masked autoencoder with every parameter moved, and its folder."
    theirs = shaken(ViTMAEForPreTraining(ViTMAEConfig(**HF | HF_DECODER | options)))
    theirs.save_pretrained(folder)
    return theirs

# words that change numbers

@pytest.mark.parametrize('eps', [1e-12, 1e-6, 1e-5, 1e-3, .1])
def test_the_epsilon_is_carried_over(tmp_path, eps):
    "Into a model built from the folder, one that exists, a file of ours, and back to transformers."
    theirs = hf_mae(tmp_path/'hf', layer_norm_eps=eps)
    built, filled = load_mae(tmp_path/'hf'), tiny_mae(target='pixels').eval()
    report = load_weights(filled, tmp_path/'hf')
    assert ('norm_eps' in report.changed) == (eps != 1e-6) == ('norm_eps changed from 1e-06' in str(report))
    save_model(built, tmp_path/'own.safetensors')
    save_hf(built, tmp_path/'back')
    own = load_mae(tmp_path/'own.safetensors')
    with torch.no_grad():
        wanted = theirs(IMGS, noise=NOISE).logits
        for model in (built, filled, own):
            assert relative(model(IMGS, noise=NOISE).pred, wanted) < 1e-5
        back = ViTMAEForPreTraining.from_pretrained(tmp_path/'back').eval()
        assert relative(back(IMGS, noise=NOISE).logits, wanted) < 1e-5
    assert filled.config.get('norm_eps', 1e-6) == eps
    encoder = load_encoder(tmp_path/'hf')[0]
    assert {m.eps for m in encoder.modules() if hasattr(m, 'eps')} == {eps}
    if eps != 1e-6:
        with pytest.warns(UserWarning, match='predictions will differ'):
            save_timm(built, tmp_path/'t.safetensors')

def test_a_decoder_with_another_mlp(tmp_path):
    theirs = hf_mae(tmp_path/'hf', decoder_intermediate_size=50, layer_norm_eps=1e-6)
    ours = load_mae(tmp_path/'hf')
    with torch.no_grad():
        assert relative(ours(IMGS, noise=NOISE).pred, theirs(IMGS, noise=NOISE).logits) < 1e-5
    save_model(ours, tmp_path/'own.safetensors')
    assert same(load_mae(tmp_path/'own.safetensors').state_dict(), ours.state_dict())

WRONG = [dict(hidden_act='relu'), dict(hidden_act='gelu_new'), dict(hidden_size=64), dict(patch_size=2),
         dict(num_hidden_layers=3), dict(intermediate_size=64), dict(num_channels=1), dict(image_size=32),
         dict(decoder_hidden_size=8), dict(decoder_intermediate_size=8), dict(decoder_num_hidden_layers=2),
         dict(model_type='dinov2'), dict(quantization_config=dict(bits=4)), dict(layer_norm_eps='x')]

@pytest.mark.parametrize('change', WRONG, ids=str)
def test_a_configuration_that_its_tensors_deny(tmp_path, change):
    hf_mae(tmp_path/'hf')
    file = tmp_path/'hf'/'config.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    model = tiny_mae(target='pixels')
    for load in (load_mae, lambda folder: load_weights(model, folder)):
        with pytest.raises(UsageError) as e:
            load(tmp_path/'hf')
        assert str(tmp_path/'hf') in str(e.value) and len(str(e.value).splitlines()) == 1

# the rule against silence

plain = st.one_of(st.none(), st.booleans(), st.integers(-5, 500), st.floats(0, 1), st.text(max_size=5),
                  st.lists(st.integers(0, 3), max_size=3), st.just({}))
FIELDS = dict(
    hf=(stated_by_hf, ViTMAEConfig(id2label={0: 'a', 1: 'b'}).to_dict()),
    vit=(stated_by_hf, ViTConfig().to_dict()),
    timm=(stated_by_timm, dict(architecture='vit_small_patch16_224', num_classes=3, num_features=384,
                               global_pool='avg', model_args={}, pretrained_cfg={}, label_names=['a'])))

@pytest.mark.parametrize('kind', FIELDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_field_is_used_reported_or_refused(kind, data):
    read, known = FIELDS[kind]
    chosen = data.draw(st.sets(st.sampled_from(sorted(known))))
    changed = data.draw(st.dictionaries(st.one_of(st.sampled_from(sorted(known)), st.text(max_size=8)), plain,
                                        max_size=3))
    config = {k: known[k] for k in chosen} | changed
    if kind != 'timm':
        config['model_type'] = known['model_type']
    try:
        stated = read(config, 'FILE')
    except UsageError as e:
        assert 'FILE' in str(e)
        return
    for name in config:
        assert (f'FILE: {name}' in stated.used) != (f'FILE: {name}' in stated.ignored), name

@settings(max_examples=60, deadline=None)
@given(args=st.dictionaries(st.text(min_size=1, max_size=8), plain, max_size=4),
       beside=st.dictionaries(st.text(min_size=1, max_size=8), plain, max_size=4))
def test_everything_beside_the_tensors_is_named(args, beside):
    content = beside | dict(args=argparse.Namespace(**args), epoch=3)
    try:
        stated = stated_by_checkpoint(content)
    except UsageError:
        return
    accounted = stated.used + stated.ignored
    assert all(f'args: {k}' in accounted for k in args)
    assert all(k in accounted for k in content if k not in ('args', 'mae_nb'))

# grids

def test_as_many_patches_of_another_grid():
    "A learned table of 4 x 4 patches into a model of 2 x 8: resized, and said."
    table = torch.randn(1, 17, 32)
    theirs = VisionTransformer(**TIMM | dict(img_size=16)).state_dict() | {'pos_embed': table}
    model = create_classifier(NANO, 3, 'cls', **SIZE, img_size=(8, 32))
    with pytest.warns(UserWarning, match='may be of 4x4 or of 2x8 patches: the square is assumed'):
        report = load_weights(model, theirs)
    assert report.changed == {'pos_embed': 'resized from 4x4 to 2x8 patches'}
    assert torch.equal(model.pos_embed[0], resize_positions(table[0], (4, 4), (2, 8)))
    kept = load_weights(model, theirs, old_grid=(2, 8))
    assert not kept.changed and torch.equal(model.pos_embed, table)

def test_an_official_file_whose_name_states_the_grid(tmp_path):
    state = VisionTransformer(**TIMM).state_dict()
    torch.save(dict(model=state, args=argparse.Namespace(model=NANO)), tmp_path/'official.pth')
    model = tiny_mae(img_size=(4, 196)).encoder
    assert load_weights(model, tmp_path/'official.pth').changed == {'pos_embed': 'resized from 7x7 to 1x49 patches'}

def test_a_fixed_table_shows_its_grid():
    "Our own state dict states no size; its sines do."
    wide, other = tiny_mae(img_size=(8, 32)), tiny_mae(img_size=(16, 16))
    assert not load_weights(tiny_mae(img_size=(8, 32)), wide.state_dict()).changed
    assert load_weights(other, wide.state_dict()).changed['encoder.pos_embed'] == 'resized from 2x8 to 4x4 patches'

def test_a_table_of_no_grid_is_refused():
    state = VisionTransformer(**TIMM | dict(img_size=(8, 12))).state_dict()
    model = create_classifier(NANO, 3, 'cls', **SIZE, img_size=(12, 8))
    with pytest.raises(UsageError, match='has 6 positions, which is not a square grid: pass old_grid='):
        load_weights(model, state)

# parts

RELATIVES = [dict(), dict(init_values=.5), dict(no_embed_class=True), dict(qkv_bias=False)]

@pytest.mark.parametrize('options', RELATIVES, ids=str)
@pytest.mark.parametrize('pool', ['avg', 'token'])
def test_timms_relatives(options, pool, tmp_path):
    "Loaded, with a report, and the same logits; by file and by model."
    theirs = shaken(VisionTransformer(**TIMM | options | dict(num_classes=3, global_pool=pool)))
    save_file(theirs.state_dict(), tmp_path/'x.safetensors')
    ours = load_classifier(tmp_path/'x.safetensors', num_heads=2)
    filled = create_classifier(NANO, 3, 'avg' if pool == 'avg' else 'cls', **SIZE).eval()
    report = load_weights(filled, tmp_path/'x.safetensors', strict=True)
    assert bool(report.changed) == bool(options)
    with torch.no_grad():
        for model in (ours, filled):
            assert relative(model(IMGS), theirs(IMGS)) < 1e-5

NO_PLACE = dict(reg_tokens=2), dict(class_token=False, global_pool='avg'), dict(pre_norm=True), dict(qk_norm=True)

@pytest.mark.parametrize('options', NO_PLACE, ids=str)
def test_parts_without_a_place(options):
    model = create_classifier(NANO, 3, 'cls', **SIZE)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = VisionTransformer(**TIMM | options).state_dict()
    for load in (lambda: load_weights(model, state), lambda: load_encoder(state, num_heads=2)):
        with pytest.raises(UsageError, match='not supported') as e:
            load()
        assert len(str(e.value).splitlines()) == 1
    assert same(before, model.state_dict())

def test_a_video_model():
    state = tiny_mae().encoder.state_dict() | {'patch_embed.proj.weight': torch.ones(32, 3, 2, 4, 4)}
    with pytest.raises(UsageError, match='a video or multi-time model'):
        load_mae(state, num_heads=2)

def test_torchvision(tmp_path):
    theirs = shaken(TorchvisionTransformer(28, 4, 2, 2, 32, 128, num_classes=3))
    torch.save(theirs.state_dict(), tmp_path/'vit_b_16.pth')
    ours = load_classifier(tmp_path/'vit_b_16.pth', num_heads=2)
    with torch.no_grad():
        assert relative(ours(IMGS), theirs(IMGS)) < 1e-5

def test_lightly(tmp_path):
    "Its names around timm's encoder and the official decoder; the encoder's own mask token is reported."
    ours = shaken(tiny_mae(target='pixels'))
    state = {'backbone.mask_token': torch.zeros(1, 1, 32)}
    for name, tensor in ours.state_dict().items():
        if name != 'decoder.mask_token':
            part, _, rest = name.partition('.')
            name = dict(encoder='backbone.vit.', decoder='decoder.decoder_')[part] + rest
        state[name] = tensor
    torch.save(dict(state_dict={f'model.{k}': v for k, v in state.items()}), tmp_path/'lightly.ckpt')
    model = tiny_mae(target='pixels').eval()
    report = load_weights(model, tmp_path/'lightly.ckpt')
    assert not report.missing and report.unused == ['backbone.mask_token']
    assert same(model.state_dict(), ours.state_dict())

# wrappers and containers

PREFIXES = '', 'module.', '_orig_mod.', 'backbone.', 'model.', 'module._orig_mod.model.'
CONTAINERS = 'model', 'state_dict', 'model_state_dict', 'state_dict_ema'

@pytest.mark.parametrize('prefix', PREFIXES)
@pytest.mark.parametrize('container', CONTAINERS)
def test_the_same_weights_however_wrapped(prefix, container, tmp_path):
    theirs = hf_mae(tmp_path/'hf') if prefix == 'model.' else None
    state = theirs.state_dict() if theirs else tiny_mae(target='pixels').encoder.state_dict()
    table = collections.defaultdict(list)
    table['loss'].append(.5)
    beside = dict(best=np.float64(.3), history=np.arange(3), table=table, day=datetime.date(2026, 1, 1), epoch=3)
    wrapped = {f'{prefix}{k}': v for k, v in state.items()} | ({'projector.weight': torch.ones(2)} if prefix else {})
    if prefix.startswith(('module', '_orig')):
        del wrapped['projector.weight']
    torch.save({container: wrapped} | beside, tmp_path/'x.pth')
    model = tiny_mae(target='pixels')
    report = load_weights(model, tmp_path/'x.pth')
    assert {*beside} <= {*report.ignored}
    assert ('projector.weight' in report.ignored + report.unused) == ('projector.weight' in wrapped)
    wanted = from_hf(state) if theirs else {f'encoder.{k}': v for k, v in state.items()}
    assert all(torch.equal(model.state_dict()[k], v) for k, v in wanted.items())

@pytest.mark.parametrize('ending', ['.pth', '.safetensors', 'own', 'hf', 'dict'])
@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_numbers_that_are_not_finite(ending, value, tmp_path):
    model = tiny_mae()
    with torch.no_grad():
        model.encoder.blocks[1].mlp.fc1.weight[3, 4] = value
    source = tmp_path/f'x{ending}'
    if ending == '.pth':
        torch.save(model.state_dict(), source)
    elif ending == '.safetensors':
        save_file(model.state_dict(), source)
    elif ending == 'own':
        source = tmp_path/'own.safetensors'
        save_model(model, source)
    elif ending == 'hf':
        save_hf(model, source)
    else:
        source = model.state_dict()
    loaders = [load_mae, load_encoder, lambda s: load_weights(tiny_mae(), s), open_weights]
    if ending != 'dict':
        loaders.append(lambda s: convert(s, tmp_path/'new.safetensors', 'safetensors'))
    words = r'1\.(mlp\.fc1|intermediate\.dense)\.weight holds 1 of 4096 .* not finite'
    for load in loaders:
        with pytest.raises(UsageError, match=words):
            load(source)

# complete folders

DATA = dict(name='mine', mean=[.4, .5, .6], std=[.2, .3, .25], classes=['cat', 'dog', 'emu', 'fox'])

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('pool', ['cls', 'avg'])
@pytest.mark.parametrize('side, picture', [(28, (28, 28)), (28, (40, 57)), (64, (90, 131))])
def test_a_pipeline_gives_the_run_s_predictions(pool, side, picture, tmp_path):
    "transformers alone, from the folder: names, order and shares."
    model = shaken(create_classifier(NANO, 4, pool, **SIZE, img_size=side))
    save_model(model, tmp_path/'model.safetensors', DATA)
    convert(tmp_path/'model.safetensors', tmp_path/'hf', 'hf')
    coarse = np.random.default_rng(0).integers(0, 255, (5, 6, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize(picture[::-1], Image.Resampling.BICUBIC)
    pixels = eval_transform(torch.from_numpy(np.array(image)).permute(2, 0, 1), (side, side))
    with torch.no_grad():
        shares = model(standardize(pixels[None], DATA['mean'], DATA['std'])).softmax(dim=1)[0]
    result = pipeline('image-classification', model=str(tmp_path/'hf'), top_k=4)(image)
    assert {r['label'] for r in result} == {*DATA['classes']}
    assert result[0]['label'] == DATA['classes'][shares.argmax()]
    for r in result:
        assert abs(r['score'] - shares[DATA['classes'].index(r['label'])]) < (1e-4 if picture == (28, 28) else .02)

def test_the_folder_comes_back_with_its_classes(tmp_path):
    for pool in ('cls', 'avg'):
        save_hf(create_classifier(NANO, 4, pool, **SIZE), tmp_path/pool, DATA)
        data = open_weights(tmp_path/pool).data
        assert {k: data[k] for k in ('mean', 'std', 'classes')} == {k: DATA[k] for k in ('mean', 'std', 'classes')}

def test_transformers_own_classifier_names_its_classes(tmp_path):
    config = ViTConfig(**HF, id2label={0: 'a', 1: 'b', 2: 'c'})
    theirs = shaken(ViTForImageClassification(config))
    theirs.save_pretrained(tmp_path/'hf')
    ours = load_classifier(tmp_path/'hf')
    with torch.no_grad(), warnings.catch_warnings():
        assert relative(ours(IMGS), theirs(IMGS).logits) < 1e-5
