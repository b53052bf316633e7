"""Exported programs: every part and format, at two sizes of batch and image, with preprocessing that others read."""
import itertools
import json

import numpy as np
import pytest
import torch
from foreign_models import shaken
from PIL import Image

from mae_nb.base.errors import UsageError
from mae_nb.data.crops import eval_transform
from mae_nb.data.datasets import ImageSet, fashion
from mae_nb.data.images import standardize
from mae_nb.model.classifier import create_classifier
from mae_nb.model.mae import create_mae
from mae_nb.weights.building import load_encoder, load_mae
from mae_nb.weights.export import export, export_model
from mae_nb.weights.loading import save_model
from mae_nb.weights.programs import example_inputs, largest_difference, open_program

for package in ('onnx', 'onnxscript', 'onnxruntime'):
    pytest.importorskip(package, reason=f'{package} is not installed: pip install "mae_nb[export]"')

NANO, BASE = 'mae_vit_nano_patch4_28', 'mae_vit_base_patch16'
SMALL = dict(dim=32, depth=1, num_heads=2)
DECODER = dict(decoder_dim=16, decoder_depth=1, decoder_heads=2)
DATA = dict(name='mine', mean=[.4, .5, .6], std=[.2, .3, .25], classes=['cat', 'dog', 'emu'])
FILES = {'onnx': 'model.onnx', 'torch-export': 'model.pt2'}

def make(part, name, **size):
    "A model of a part, with outputs that are not all zero."
    if part == 'classifier':
        return shaken(create_classifier(name, 3, **size))
    model = shaken(create_mae(name, **size))
    return model.encoder if part == 'encoder' else model

def check_export(part, format, folder, name, img_size, **size):
    "The file alone computes what PyTorch does, at two batch sizes that it was not recorded with."
    model = make(part, name, img_size=img_size, **size)
    report = export_model(model, folder, format, DATA)
    run = open_program(folder/FILES[format])
    assert report.part == part and report.difference == largest_difference(run, model) < 1e-4
    assert largest_difference(run, model, batches=(1, 5)) < 1e-4
    assert not run(**example_inputs(model, 4))[0].isnan().any()
    described = json.loads((folder/'config.json').read_text())['mae_nb']
    assert described['inputs'] == {k: ['batch', *x.shape[1:]] for k, x in example_inputs(model, 1).items()}

CASES = list(itertools.product(('encoder', 'classifier', 'mae'), FILES, (28, (20, 36))))
FEW = [case for case in CASES if (case[1] == 'onnx') == (case[2] != 28)]   # each part, format and size

@pytest.mark.parametrize('part, format, size', [
    case if case in FEW else pytest.param(*case, marks=pytest.mark.slow) for case in CASES])
def test_a_nano(part, format, size, tmp_path, recwarn):
    "And of the exporters' many warnings none comes through."
    check_export(part, format, tmp_path/'x', NANO, size, **SMALL, **({} if part == 'classifier' else DECODER))
    assert all("transformers' preprocessing" in str(warning.message) for warning in recwarn)

@pytest.mark.slow
@pytest.mark.parametrize('size', [224, 160])
@pytest.mark.parametrize('format', FILES)
@pytest.mark.parametrize('part', ['encoder', 'classifier', 'mae'])
def test_a_base(part, format, size, tmp_path):
    check_export(part, format, tmp_path/'x', BASE, size)

@pytest.mark.slow
def test_a_base_in_int8(tmp_path):
    "A quarter of the size, up to embedding and head."
    report = export_model(make('classifier', BASE), tmp_path/'x', quantize='int8')
    sizes = [(tmp_path/'x'/name).stat().st_size for name in ('model.onnx', 'model_quantized.onnx')]
    assert sizes[1] < .3 * sizes[0] and report.quantized['difference'] < .5

def test_tensors_in_a_file_of_their_own(tmp_path, monkeypatch):
    "As of a model above 2 GB: both files are found after the folder has got its name."
    save = torch.onnx.ONNXProgram.save
    monkeypatch.setattr(torch.onnx.ONNXProgram, 'save', lambda self, file: save(self, file, external_data=True))
    model = make('classifier', NANO, **SMALL)
    report = export_model(model, tmp_path/'x', quantize='int8')
    names = ('model.onnx', 'model_quantized.onnx')
    assert {f'{name}{end}' for name in names for end in ('', '.data')} <= {f.name for f in (tmp_path/'x').iterdir()}
    runs = [open_program(tmp_path/'x'/name) for name in names]
    wanted = [report.difference, report.quantized['difference']]
    assert [largest_difference(run, model) for run in runs] == wanted

@pytest.mark.filterwarnings('ignore')
def test_transformers_prepares_its_pictures(tmp_path):
    "The processor of the folder, and the program: the logits of our own evaluation."
    from transformers import AutoImageProcessor
    model = shaken(create_classifier(NANO, 3, 'cls', **SMALL))
    export_model(model, tmp_path/'x', 'torch-export', DATA)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (28, 28, 3), dtype=np.uint8))
    inputs = AutoImageProcessor.from_pretrained(tmp_path/'x')(picture, return_tensors='pt')
    logits, = open_program(tmp_path/'x'/'model.pt2')(**inputs)
    ours = eval_transform(torch.from_numpy(np.array(picture)).permute(2, 0, 1), (28, 28))
    with torch.no_grad():
        wanted = model(standardize(ours[None], DATA['mean'], DATA['std']))
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    config = json.loads((tmp_path/'x'/'config.json').read_text())
    assert config['id2label'] == {'0': 'cat', '1': 'dog', '2': 'emu'} and config['mae_nb']['classes'] == DATA['classes']

def test_what_transformers_lacks_is_exported_all_the_same(tmp_path):
    "Another target, and a decoder with cross-attention."
    options = dict(target='tokens', target_size=16, decoder='cross')
    model = shaken(create_mae(NANO, **SMALL, **DECODER, **options))
    model.target.fit(torch.randn(1000, 48))
    assert export_model(model, tmp_path/'x', 'torch-export').difference < 1e-5
    config = json.loads((tmp_path/'x'/'config.json').read_text())
    assert list(config) == ['mae_nb'] and config['mae_nb']['model']['target'] == 'tokens'
    assert not (tmp_path/'x'/'preprocessor_config.json').exists()

def test_the_masks_are_those_of_pytorch(tmp_path):
    "Whatever noise: with many equal numbers, and with infinite ones."
    model = create_mae(NANO, **SMALL, mask='block', **DECODER)
    save_model(model, tmp_path/'own.safetensors', DATA)
    export(tmp_path/'own.safetensors', tmp_path/'x', 'torch-export')
    run, model = open_program(tmp_path/'x'/'model.pt2'), load_mae(tmp_path/'own.safetensors')
    imgs = torch.randn(4, 3, 28, 28)
    coarse = torch.randint(0, 3, (4, 49), generator=torch.Generator().manual_seed(0)).float()
    for noise in (coarse, torch.full((4, 49), torch.inf), -coarse / 0):
        noise = noise.nan_to_num(0., torch.inf, -torch.inf)
        with torch.no_grad():
            assert torch.equal(run(pixel_values=imgs, noise=noise)[2], model(imgs, noise=noise).mask)

def test_the_model_is_left_alone(tmp_path):
    model = make('classifier', NANO, **SMALL).bfloat16().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    export_model(model, tmp_path/'x', 'torch-export')
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

def test_images_that_cannot_measure(tmp_path):
    model = make('classifier', NANO, in_chans=1, **SMALL)
    pixels = np.zeros((6, 28, 28, 1), np.uint8)
    grey = dict(mean=(.5,), std=(.5,))
    wrong = {'has no labels': ImageSet('x', pixels, **grey),
             'has 2 classes': ImageSet('x', pixels, np.arange(6) % 2, ['a', 'b'], **grey),
             'has 3 channels': ImageSet('x', pixels.repeat(3, -1), np.arange(6) % 3, ['a', 'b', 'c'])}
    for words, images in wrong.items():
        with pytest.raises(UsageError, match=words):
            export_model(model, tmp_path/'x', quantize='int8', images=images)
    assert not list(tmp_path.iterdir())

def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch):
    from mae_nb.weights import export as module
    def interrupted(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(module, 'largest_difference', interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_model(make('encoder', NANO, **SMALL), tmp_path/'x', 'torch-export')
    assert not list(tmp_path.iterdir())

def test_an_encoder_from_other_libraries(tmp_path):
    "timm's weights, at another size than theirs, and what is not known is said."
    from timm.models.vision_transformer import VisionTransformer
    theirs = VisionTransformer(img_size=28, patch_size=4, embed_dim=32, depth=1, num_heads=2, num_classes=0)
    torch.save(theirs.state_dict(), tmp_path/'timm.pth')
    text = export(tmp_path/'timm.pth', tmp_path/'x', 'torch-export', num_heads=2, img_size=36)
    assert 'mean and deviation of the images are not known' in text
    run = open_program(tmp_path/'x'/'model.pt2')
    encoder, _ = load_encoder(tmp_path/'timm.pth', num_heads=2, img_size=36)
    imgs = torch.randn(2, 3, 36, 36)
    with torch.no_grad():
        torch.testing.assert_close(run(pixel_values=imgs)[0], encoder(imgs), rtol=1e-4, atol=1e-5)

def test_the_measured_cost_is_that_of_the_files(tmp_path):
    "On the named data set, through the command's own function."
    train, _ = fashion()
    about = dict(name='fashion', mean=train.mean, std=train.std, classes=train.classes)
    save_model(shaken(create_classifier(NANO, 10, in_chans=1, **SMALL)), tmp_path/'own.safetensors', about)
    text = export(tmp_path/'own.safetensors', tmp_path/'x', quantize='int8', data='fashion')
    cost = json.loads((tmp_path/'x'/'config.json').read_text())['mae_nb']['quantized']
    assert cost['images'] == 2000 and f'{cost["top1"]:.2%} in int8' in text
    assert abs(cost['top1'] - cost['top1_float32']) <= cost['changed'] / 2000
