"""Damaged tensors, configurations and indexes: one clear line for each, and what only looks damaged is read."""
import json

import pytest
import torch
from foreign_models import official_file, same, shaken, small_classifier, small_mae, timm_vit
from PIL import Image
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torchvision.models import VisionTransformer as TorchvisionTransformer

from mae_nb.base.errors import UsageError
from mae_nb.model.classifier import Classifier, create_classifier
from mae_nb.model.mae import create_mae
from mae_nb.tasks.finetune import FinetuneOptions, finetune_setup
from mae_nb.tasks.visualize import show
from mae_nb.weights import building, reading
from mae_nb.weights.building import classifier_from, keep_head, load_classifier, load_encoder, load_mae
from mae_nb.weights.convert import convert, save_hf
from mae_nb.weights.hub import load_model
from mae_nb.weights.layouts import to_hf
from mae_nb.weights.loading import fill, load_weights, save_model, write_own
from mae_nb.weights.reading import INDEXES, open_weights

# tensors

def timm_classifier(**changes):
    "timm's small classifier with LayerScale, under its own names, with some tensors changed; None removes one."
    state = timm_vit(num_classes=10, init_values=.1).state_dict()
    return {k: v for k, v in (state | changes).items() if v is not None}

DAMAGED = {   # what is wrong -> the state dict, and what the error says
    'gamma alone': (lambda: timm_classifier(**{'blocks.0.attn.proj.weight': None}), 'no .*attn.proj.weight with'),
    'gamma short': (lambda: timm_classifier(**{'blocks.0.ls1.gamma': torch.ones(5)}), 'has 5 factors'),
    'gamma flat': (lambda: timm_classifier(**{'blocks.0.ls1.gamma': torch.tensor(1.)}), 'expected 1 axes'),
    'bias short': (lambda: timm_classifier(**{'blocks.0.mlp.fc2.bias': torch.ones(5)}), 'fc2.bias has 5 numbers'),
    'positions flat': (lambda: timm_classifier(pos_embed=torch.ones(96)), 'pos_embed has shape .* expected 3 axes'),
    'positions empty': (lambda: timm_classifier(pos_embed=torch.ones(1, 0, 96)), 'pos_embed has shape'),
    'patch flat': (lambda: timm_classifier(**{'patch_embed.proj.weight': torch.ones(96, 3)}), 'expected 4 axes'),
    'patch empty': (lambda: timm_classifier(**{'patch_embed.proj.weight': torch.ones(96, 3, 16, 0)}), 'has shape'),
    'head flat': (lambda: timm_classifier(**{'head.weight': torch.tensor(1.)}), 'head.weight has shape .* 2 axes'),
    'layer flat': (lambda: timm_classifier(**{'blocks.0.mlp.fc1.weight': torch.tensor(1.)}), 'fc1.weight has shape'),
    'norm flat': (lambda: timm_classifier(**{'norm.weight': torch.tensor(1.)}), 'norm.weight has shape'),
    'query short': (lambda: to_hf(small_mae().state_dict()) | {
        'vit.encoder.layer.0.attention.attention.query.weight': torch.ones(96, 95)}, 'expected the same one'),
}

@pytest.mark.parametrize('damage', DAMAGED)
@pytest.mark.parametrize('load', [load_model, load_encoder, lambda x: load_weights(small_classifier(), x),
                                  lambda x: keep_head(small_classifier(), x, list(range(10)))],
                         ids=['model', 'encoder', 'weights', 'head'])
def test_damaged_tensors_are_one_line(damage, load):
    make, words = DAMAGED[damage]
    with pytest.raises(UsageError, match=words) as e:
        load(make())
    assert len(str(e.value).splitlines()) == 1

@pytest.mark.parametrize('name', ['encoder.pos_embed', 'encoder.patch_embed.proj.weight', 'decoder.embed.weight'])
def test_damaged_tensors_of_our_own_file(name, tmp_path):
    state = small_mae().state_dict() | {name: torch.ones(1)}
    save_model(small_mae(), tmp_path/'own.safetensors', state=state)
    for load in (load_mae, load_encoder, lambda x: convert(x, tmp_path/'new.safetensors', 'safetensors')):
        with pytest.raises(UsageError, match=f'{name} has shape .1,., expected') as e:
            load(tmp_path/'own.safetensors')
        assert str(tmp_path/'own.safetensors') in str(e.value)

# indexes and configurations

TABLES = [{}, []] + [{'a': name} for name in ('', '.', '..', 'x\0y', 'x/y', 3)]

@pytest.mark.parametrize('table', TABLES, ids=str)
def test_an_index_without_files(table, tmp_path):
    "An empty one used to be read for ever."
    for index in INDEXES:
        (tmp_path/index).write_text(json.dumps(dict(weight_map=table)))
        with pytest.raises(UsageError, match='is not an index of shards in its folder'):
            open_weights(tmp_path/index)

@pytest.mark.parametrize('name', ['config.json', 'preprocessor_config.json'])
def test_a_configuration_that_is_not_utf_8(name, tmp_path):
    save_hf(small_mae(), tmp_path/'hf')
    (tmp_path/'hf'/name).write_bytes(b'{"image_size": "\xff\xfe"}')
    with pytest.raises(UsageError, match=f'{name} is not JSON'):
        open_weights(tmp_path/'hf')

CLASSES = [('cat', 'must be a list'), (dict(a=1), 'must be a list'), ([['a']], 'a class is named'), ([None], 'a class'),
           (['x' * 1001], 'a class is named'), ([1.5], 'a class is named'),
           (['a', 'b'], 'names 2 classes, and its model has 3')]

@pytest.mark.parametrize('classes, words', CLASSES, ids=lambda x: str(x)[:20])
def test_classes_that_are_no_names(classes, words, tmp_path):
    data = dict(name='mine', mean=[.5] * 3, std=[.5] * 3, classes=classes)
    save_model(small_classifier(3), tmp_path/'own.safetensors', data)
    with pytest.raises(UsageError, match=words) as e:
        open_weights(tmp_path/'own.safetensors')
    assert str(tmp_path/'own.safetensors') in str(e.value) and len(str(e.value).splitlines()) == 1

def test_two_classes_of_one_name(tmp_path):
    "ImageNet has two cranes: a warning, and a model."
    data = dict(name='mine', mean=[.5] * 3, std=[.5] * 3, classes=['crane', 'crane', 'emu'])
    save_model(small_classifier(3), tmp_path/'own.safetensors', data)
    with pytest.warns(UserWarning, match='1 names stand for more than one class, such as .crane.'):
        assert open_weights(tmp_path/'own.safetensors').data == data

def test_the_size_of_a_name_is_not_that_of_the_training(tmp_path):
    "timm's script trains vit_small_patch16_224 at any --img-size; its tensors show which."
    theirs = VisionTransformer(img_size=96, patch_size=16, embed_dim=384, depth=1, num_heads=6, num_classes=3)
    torch.save(dict(state_dict=theirs.state_dict(), arch='vit_small_patch16_224', epoch=3), tmp_path/'x.pth.tar')
    model = load_classifier(tmp_path/'x.pth.tar')
    assert model.img_size == (96, 96) and model.blocks[0].attn.num_heads == 6

@pytest.mark.parametrize('count', [0, None])
def test_a_command_line_without_classes(count, official_state, tmp_path):
    file = official_file(tmp_path/'x.pth', official_state, nb_classes=count)
    assert 'num_classes' not in open_weights(file).options
    assert load_encoder(file, num_heads=3)[0].dim == 96   # whatever the heads of its decoder

def test_a_config_with_an_option_of_none(tmp_path):
    "As earlier versions wrote it, and as it is given now."
    model = small_mae(decoder_mlp_ratio=None, norm_eps=None)
    assert not {'decoder_mlp_ratio', 'norm_eps'} & {*model.config}
    assert 'patch_size' not in create_classifier('mae_vit_base_patch16', 3, patch_size=None, depth=1).config
    write_own(model.state_dict(), tmp_path/'old.safetensors', model.config | dict(decoder_mlp_ratio=None), None)
    assert same(load_mae(tmp_path/'old.safetensors').state_dict(), model.state_dict())

# what is read

def test_a_head_is_kept_with_one_filling(tmp_path, monkeypatch):
    "Once, however many tensors were missing, and also where none was."
    trained, fills = small_classifier(3), []
    data = dict(name='mine', mean=[.5] * 3, std=[.5] * 3, classes=list('abc'))
    save_model(shaken(trained), tmp_path/'own.safetensors', data)
    monkeypatch.setattr(building, 'fill', lambda *args, **kwargs: fills.append(args) or fill(*args, **kwargs))
    model, _ = classifier_from(load_encoder(tmp_path/'own.safetensors')[0], 3)
    for missing in (model.not_loaded, []):
        fills.clear()
        torch.nn.init.zeros_(model.head.weight)
        model.not_loaded = missing
        assert 'is kept' in keep_head(model, tmp_path/'own.safetensors', list('abc'))
        assert len(fills) == 1 and not model.not_loaded and torch.equal(model.head.weight, trained.head.weight)

def test_an_incomplete_encoder_names_its_file(tmp_path):
    "The weights file in the run folder, not the folder."
    incomplete = {k: v for k, v in small_mae().state_dict().items() if k != 'encoder.patch_embed.proj.bias'}
    save_model(small_mae(), tmp_path/'model.safetensors', state=incomplete)
    with pytest.raises(UsageError, match=f'^{tmp_path}/model.safetensors lacks 1 of the encoder'):
        load_encoder(tmp_path)

@pytest.mark.filterwarnings('ignore')
def test_weights_are_read_once(tmp_path, monkeypatch):
    "By the commands that need a model and what else its file states."
    reads, model = [], create_mae('mae_vit_nano_patch4_28', in_chans=1)
    monkeypatch.setattr(reading, 'load_file', lambda file: reads.append(file) or load_file(file))
    save_model(model, tmp_path/'own.safetensors', dict(name='mine', mean=[.5], std=[.5], classes=[]))
    Image.new('L', (28, 28)).save(tmp_path/'x.png')
    show(tmp_path/'own.safetensors', [tmp_path/'x.png'], tmp_path/'out.png')
    assert len(reads) == 1
    finetune_setup(FinetuneOptions('fashion', weights=str(tmp_path/'own.safetensors'), num_workers=0))
    assert len(reads) == 2

def test_a_classifier_of_torchvision_is_one():
    theirs = TorchvisionTransformer(32, 16, 1, 3, 96, 384, num_classes=3).state_dict()
    assert isinstance(load_model(theirs, num_heads=3), Classifier)
