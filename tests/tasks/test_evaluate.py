"""Evaluation against other people's code and counts made by hand, on real pictures, in one process and in several."""
import csv
import json
import subprocess
import tarfile
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import results, spread
from support import BIN
from torch import nn
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

from mae_nb.data.datasets import ImageSet, folder_set
from mae_nb.data.images import IMAGENET_MEAN, IMAGENET_STD
from mae_nb.model.classifier import create_classifier
from mae_nb.tasks.batches import all_batches, crop_by_name, image_batches
from mae_nb.tasks.evaluate import EvalOptions, Predictions, calibration, classify, evaluate
from mae_nb.tasks.variants import ALEXNET_ERRORS, SEVERITIES, VARIANTS, imagenet_wnids, match_classes, name_classes
from mae_nb.weights.building import load_classifier
from mae_nb.weights.loading import save_model

WNIDS = imagenet_wnids()
NORM = partial(nn.LayerNorm, eps=1e-6)
SMALL = dict(patch_size=16, embed_dim=64, depth=2, num_heads=4, num_classes=1000)


@pytest.fixture(scope='module')
def photographs(tmp_path_factory):
    "The sample's folder of classes: a photograph of each of 500 of the 1,000."
    from support import ROOT
    archive = ROOT.parent/'shared'/'data'/'imagenet_sample.tar'
    if not archive.is_file():
        pytest.skip('no development data beside the checkout (../shared/data)')
    folder = tmp_path_factory.mktemp('sample')
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter='data')
    return folder/'imagenet_sample'/'train'


def official_vit(**options):
    "The official fine-tuning model: timm's, with the mean of the patches behind a norm, as models_vit.py has it."
    from timm.models.vision_transformer import VisionTransformer

    class Official(VisionTransformer):
        def forward(self, x):
            x = self.patch_embed(x)
            x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1) + self.pos_embed
            for block in self.blocks:
                x = block(x)
            return self.head(self.fc_norm(x[:, 1:, :].mean(dim=1)))

    torch.manual_seed(0)
    model = Official(**SMALL | options, global_pool='avg', fc_norm=True, norm_layer=NORM)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=.05)
    return model.eval()


def torchvision_pixels(files):
    "The official evaluation's own transforms."
    transform = Compose([Resize(256, interpolation=InterpolationMode.BICUBIC), CenterCrop(224), ToTensor(),
                         Normalize(IMAGENET_MEAN, IMAGENET_STD)])
    return torch.stack([transform(Image.open(file).convert('RGB')) for file in files])


def our_logits(model, images, n):
    batches = image_batches(images.take(range(n)), model.img_size, all_batches(n, 5), num_workers=0)
    with torch.no_grad():
        return torch.cat([model(imgs) for imgs, _ in batches])


def test_logits_are_the_official_models_timms_and_onnxruntimes(photographs, tmp_path):
    "On the same photographs, each through its own pixels: ours by our loader, theirs by torchvision and PIL."
    from timm.models.vision_transformer import VisionTransformer
    official = official_vit()
    torch.save(dict(model=official.state_dict()), tmp_path/'finetuned.pth')
    ours = load_classifier(tmp_path/'finetuned.pth', num_heads=4, img_size=224)
    images, n = folder_set(photographs), 12
    files = [images.items[i] for i in range(n)]
    pixels = torchvision_pixels(files)
    timm = VisionTransformer(**SMALL, global_pool='avg', fc_norm=True, norm_layer=NORM)
    timm.load_state_dict(official.state_dict())
    with torch.no_grad():
        wanted, timms, same_pixels = official(pixels), timm.eval()(pixels), ours(pixels)
    scale = wanted.abs().max()
    assert (same_pixels - wanted).abs().max() / scale < 2e-6
    assert (same_pixels - timms).abs().max() / scale < 2e-6
    logits = our_logits(ours, images, n)
    assert (logits - wanted).abs().max() / scale < 2e-3   # pixels of some JPEGs differ by one of 255
    assert torch.equal(logits.argmax(dim=1), wanted.argmax(dim=1))
    runtime = pytest.importorskip('onnxruntime')
    torch.onnx.export(official, (pixels,), tmp_path/'official.onnx', dynamo=True, verbose=False)
    session = runtime.InferenceSession(tmp_path/'official.onnx', providers=['CPUExecutionProvider'])
    theirs = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: pixels.numpy()})[0])
    assert (same_pixels - theirs).abs().max() / scale < 2e-5


def test_torchvisions_classifier_is_read_and_measured(photographs, tmp_path):
    from torchvision.models import VisionTransformer
    torch.manual_seed(0)
    theirs = VisionTransformer(224, 32, 2, 4, 64, 256, num_classes=1000).eval()
    nn.init.normal_(theirs.heads.head.weight)
    torch.save(theirs.state_dict(), tmp_path/'vit.pth')
    ours = load_classifier(tmp_path/'vit.pth', num_heads=4)
    images = folder_set(photographs)
    with torch.no_grad():
        wanted = theirs(torchvision_pixels([images.items[i] for i in range(6)]))
    assert (our_logits(ours, images, 6) - wanted).abs().max() / wanted.abs().max() < 2e-3


def test_transformers_classifier_is_read_and_measured(photographs, tmp_path):
    "Its names are no wnids, so the usual order of the 1,000 holds, and the result says so."
    from transformers import ViTConfig, ViTForImageClassification
    torch.manual_seed(0)
    theirs = ViTForImageClassification(ViTConfig(
        image_size=224, patch_size=32, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=256, layer_norm_eps=1e-6, num_labels=1000)).eval()
    nn.init.normal_(theirs.classifier.weight)
    theirs.save_pretrained(tmp_path/'vit')
    images = folder_set(photographs)
    with torch.no_grad():
        wanted = theirs(torchvision_pixels([images.items[i] for i in range(6)])).logits
    assert (our_logits(load_classifier(tmp_path/'vit'), images, 6) - wanted).abs().max() / wanted.abs().max() < 2e-3
    (tmp_path/'few').mkdir()
    for wnid in images.classes[3:5]:
        (tmp_path/'few'/wnid).symlink_to(photographs/wnid)
    result = evaluate(EvalOptions(str(tmp_path/'few'), str(tmp_path/'vit'), out=str(tmp_path/'out'), device='cpu'))
    assert (result['samples'], result['outputs']) == (2, 1000) and 'by wnid' in result['matched']


def test_packed_and_plain_data_give_the_same_numbers(photos, tmp_path):
    "One row for each picture, under the same name."
    from mae_nb.data.packing import pack_source
    weights = small_model(tmp_path, ['even', 'odd'])
    pack_source(str(photos), str(tmp_path/'packed'), num_workers=0)
    tables = []
    for source in ('photos', 'packed'):
        out = tmp_path/f'of_{source}'
        evaluate(EvalOptions(str(tmp_path/source), str(weights), out=str(out), num_workers=0, device='cpu'))
        tables.append((out/'predictions.csv').read_text())
    assert tables[0] == tables[1] and 'odd/001.png' in tables[0]


class ByNumber(nn.Module):
    "Made-up logits: a row of a table for each picture, which a set of one-coloured pictures numbers."
    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, imgs):
        low, high = ((imgs[:, c, 0, 0] * IMAGENET_STD[c] + IMAGENET_MEAN[c]) * 255 for c in (0, 1))
        return self.table[low.round().long() + 256 * high.round().long()]


def numbered(n):
    "Pictures whose first two channels are their number."
    pixels = np.zeros((n, 8, 8, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(n)[:, None, None] % 256, np.arange(n)[:, None, None] // 256
    return pixels


def scored(variant, classes, labels, table):
    "A variant's numbers for made-up logits."
    images = name_classes(ImageSet('made', numbered(len(labels)), labels, classes), VARIANTS[variant])
    stated = VARIANTS[variant]
    matching = match_classes(images, 1000, subset=stated.classes if stated.subset else None)
    return classify(ByNumber(table), images, matching, size=(8, 8), bs=64)


@pytest.mark.parametrize('variant', ['imagenet-a', 'imagenet-r', 'imagenet-sketch', 'imagenet-v2'])
def test_a_variants_score_is_that_of_an_independent_count(photographs, variant):
    "The sample's own 500 classes, as far as the variant has them; the count works on names and knows no class numbers."
    present = sorted(p.name for p in photographs.iterdir())
    wanted = [w for w in present if w in VARIANTS[variant].classes]
    assert len(wanted) > 60
    folders = sorted(str(WNIDS.index(w)) for w in wanted) if variant == 'imagenet-v2' else wanted
    names = [WNIDS[int(f)] for f in folders] if variant == 'imagenet-v2' else folders
    rng = np.random.default_rng(0)
    labels = np.arange(3 * len(folders)) % len(folders)
    table = torch.from_numpy(rng.normal(size=(len(labels), 1000))).float()
    for i in range(0, len(labels), 2):   # half of the pictures have a good chance
        table[i, WNIDS.index(names[labels[i]])] += 2.5
    predictions = scored(variant, folders, labels, table)
    competing = sorted(VARIANTS[variant].classes)
    right, top5, losses = [], [], []
    for i, label in enumerate(labels):
        logits = dict(zip(WNIDS, table[i].tolist()))
        ranked = sorted(competing, key=lambda w: -logits[w])
        right.append(ranked[0] == names[label])
        top5.append(names[label] in ranked[:5])
        losses.append(np.log(sum(np.exp(logits[w]) for w in competing)) - logits[names[label]])
    numbers = predictions.numbers()
    assert (numbers['top1'], numbers['top5'], numbers['samples']) == (np.mean(right), np.mean(top5), len(labels))
    assert abs(numbers['loss'] - np.mean(losses)) < 1e-6
    assert 0 < numbers['top1'] < numbers['top5'] < 1


def test_the_subsets_outputs_are_those_of_the_authors_evaluation():
    "The first and last outputs that eval.py of hendrycks/natural-adv-examples keeps for ImageNet-A."
    places = [WNIDS.index(w) for w in imagenet_wnids('a')]
    assert places[:12] == [6, 11, 13, 15, 17, 22, 23, 27, 30, 37, 39, 42]
    assert places[-12:] == [954, 956, 957, 959, 971, 972, 980, 981, 984, 986, 987, 988] and len(places) == 200


def test_calibration_is_torchmetrics():
    metric = pytest.importorskip('torchmetrics.functional.classification').multiclass_calibration_error
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(500, 7, generator=generator)
    labels = torch.randint(0, 7, (500,), generator=generator)
    confidence, predicted = logits.double().softmax(dim=1).max(dim=1)
    predictions = Predictions(labels.numpy(), predicted.numpy(), np.ones(500, bool), np.ones(500), confidence.numpy())
    theirs = metric(logits.double().softmax(dim=1), labels, 7, n_bins=15, norm='l1').item()
    assert abs(calibration(predictions)[1] - theirs) < 1e-6


def small_model(folder, classes, in_chans=3):
    "A nano classifier with random weights, in a file that states its classes."
    torch.manual_seed(0)
    model = create_classifier('mae_vit_nano_patch4_28', len(classes), in_chans=in_chans, depth=1, dim=32, num_heads=2)
    nn.init.normal_(model.head.weight)
    about = dict(name='made', mean=[.5] * in_chans, std=[.25] * in_chans, classes=list(classes))
    save_model(model, folder/'model.safetensors', about)
    return folder/'model.safetensors'


@pytest.mark.parametrize('launcher', ['forks', pytest.param('torchrun', marks=pytest.mark.slow)])
def test_several_processes_write_the_same_files(photos, tmp_path, launcher):
    "The last batch is smaller, and one process has a batch more than the other."
    weights = small_model(tmp_path, ['even', 'odd'])
    options = EvalOptions(str(photos), str(weights), out=str(tmp_path/'one'), bs=7, num_workers=0, device='cpu')
    evaluate(options)
    if launcher == 'forks':
        two = replace(options, out=str(tmp_path/'two'), num_workers=1)
        results(spread(2, lambda: bool(evaluate(two)), tmp_path/'ranks'))
    else:
        script = tmp_path/'mae-eval'
        script.write_text('from mae_nb.commands import mae_eval\nmae_eval()\n')
        words = [photos, weights, '--out', 'two', '--bs', '7', '--num-workers', '1', '--device', 'cpu']
        subprocess.run([BIN/'torchrun', '--nproc-per-node', '2', script, *words], cwd=tmp_path, check=True)
    for name in ('results.json', 'predictions.csv', 'classes.csv'):
        assert (tmp_path/'one'/name).read_bytes() == (tmp_path/'two'/name).read_bytes(), name
    assert json.loads((tmp_path/'one'/'results.json').read_text())['samples'] == 120


def test_another_crop_changes_the_pixels_as_timm_does(photographs):
    from timm.data import create_transform
    images = folder_set(photographs)
    for share in (.9, .95):
        theirs = create_transform((3, 224, 224), interpolation='bicubic', crop_pct=share)
        for i in (3, 77):
            pixels = theirs(Image.open(images.items[i]).convert('RGB'))
            ours = crop_by_name(str(share))(images.read(i), None, (224, 224)).float() / 255
            mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
            assert ((ours - mean) / std - pixels).abs().max() < 1.01 / 255 / .224


def test_what_cannot_be_measured_gets_one_line(forked, photos, tmp_path):
    weights = small_model(tmp_path, ['even', 'odd'])
    thousand = tmp_path/'thousand'
    thousand.mkdir()
    thousand = small_model(thousand, WNIDS)
    (tmp_path/'loose').mkdir()
    Image.new('RGB', (30, 30)).save(tmp_path/'loose'/'one.png')
    cases = [
        ((photos, weights, '--variant', 'imagenet-a'), 'is not ImageNet-A, which has folders of 200 wnids: 2 of its 2'),
        ((photos, weights, '--variant', 'imagenet-c'), 'is not ImageNet-C: it lacks 75 of 75 folders'),
        ((photos, weights, '--variant', 'imagenet-v2'), 'is not ImageNet-V2, which has folders 0 to 999'),
        ((photos, weights, '--variant', 'imagenet-b'), "unknown variant of ImageNet 'imagenet-b'"),
        ((photos, thousand), '2 of the 2 classes in'),
        (('loose', weights), 'loose has no labels'),
        ((photos, weights, '--crop', 'middle'), '--crop middle is no evaluation crop'),
        ((photos, weights, '--part', 'val', '--variant', 'imagenet-a'), '--part has no meaning with --variant'),
        ((photos,), 'name the weights'), ((photos, 'nowhere.pth'), 'no such weights file: nowhere.pth'),
        ((photos, weights, '--out', 'loose'), 'loose exists already and is not empty: choose another --out'),
    ]
    for words, message in cases:
        got = forked('mae-eval', *words, '--device', 'cpu', '--num-workers', '0')
        assert got.code == 2 and message in got.line, (words, got)
    (photos/'odd'/'001.png').write_bytes(b'nothing')
    got = forked('mae-eval', photos, weights, '--device', 'cpu', '--num-workers', '0', '--out', 'begun')
    assert got.code == 2 and 'odd/001.png cannot be read as an image' in got.line
    assert not any((tmp_path/'begun').iterdir())   # so that the same command works once the picture is mended


def test_imagenet_c_from_its_folders(tmp_path):
    "Every set's error goes into the mean at its own place; the count by hand reads the table of pictures."
    weights, rng = small_model(tmp_path, WNIDS), np.random.default_rng(0)
    for corruption in ALEXNET_ERRORS:
        for severity in SEVERITIES:
            for wnid in WNIDS[:2]:
                place = tmp_path/'c'/'all'/corruption/str(severity)/wnid
                place.mkdir(parents=True)
                Image.fromarray(rng.integers(0, 255, (28, 28, 3), dtype=np.uint8)).save(place/'one.png')
    result = evaluate(EvalOptions(str(tmp_path/'c'), str(weights), 'imagenet-c', out=str(tmp_path/'out'), bs=8,
                                  num_workers=0, device='cpu'))
    with open(tmp_path/'out'/'corruptions.csv') as f:
        rows = list(csv.DictReader(f))
    errors = {c: [float(r['error']) for r in rows if r['corruption'] == c] for c in ALEXNET_ERRORS}
    assert all(len(values) == 5 for values in errors.values())
    assert abs(result['mce'] - sum(sum(v) / 5 / ALEXNET_ERRORS[c] for c, v in errors.items()) / 15) < 1e-12
    assert abs(result['top1'] - (1 - result['mean_error'])) < 1e-12
    assert result['crop'] == 'whole' and (tmp_path/'out'/'figures'/'corruptions.png').is_file()
