"""Our encoder in torchvision's detectors: the same tokens, any size, a loss that falls, and COCO's own measure."""
import numpy as np
import pytest
import torch

from mae_nb.base.errors import MissingPackage
from mae_nb.model.encoder import Encoder
from mae_nb.model.mae import create_mae
from mae_nb.tasks.detect import DetectionBackbone, any_size_map, average_precision, detector, detector_groups
from mae_nb.weights.building import load_encoder
from mae_nb.weights.loading import save_model

SMALL = dict(img_size=(32, 32), width=8, rpn_pre_nms_top_n_train=100, rpn_post_nms_top_n_train=40,
             rpn_pre_nms_top_n_test=50, rpn_post_nms_top_n_test=20, rpn_batch_size_per_image=32,
             box_batch_size_per_image=16, box_detections_per_img=5)


def tiny_encoder():
    torch.manual_seed(0)
    return Encoder(img_size=32, patch_size=8, in_chans=3, dim=16, depth=2, num_heads=2)


def scene(i):
    "A bright square on dark ground, and its box."
    draw = np.random.default_rng(i)
    left, top, side = draw.integers(2, 12), draw.integers(2, 12), draw.integers(12, 18)
    picture = torch.full((3, 32, 32), .1)
    picture[:, top:top + side, left:left + side] = .9
    box = torch.tensor([[left, top, left + side, top + side]], dtype=torch.float32)
    return picture, dict(boxes=box, labels=torch.tensor([1]))


def test_a_detector_learns_and_is_measured():
    "Its loss falls, and pycocotools finds it better than before."
    pytest.importorskip('pycocotools')
    model = detector(tiny_encoder(), 1, **SMALL)
    pictures, targets = map(list, zip(*map(scene, range(8))))

    def measured():
        with torch.no_grad():
            return average_precision(model.eval()(pictures), targets)['ap50']

    before, losses = measured(), []
    groups = detector_groups(model, .05, .8)
    optimizer = torch.optim.AdamW([dict(group, lr=3e-3 * group['lr_scale']) for group in groups])
    torch.manual_seed(1)
    model.train()
    for _ in range(30):
        loss = sum(model(pictures, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < .6 * np.mean(losses[:5])
    assert measured() > before + .2


def test_every_weight_of_the_encoder_learns():
    model = detector(tiny_encoder(), 2, 'retinanet', img_size=(32, 48), width=8)
    pictures, targets = map(list, zip(*map(scene, range(2))))
    sum(model.train()(pictures, targets).values()).backward()
    assert [name for name, p in model.backbone.named_parameters() if p.grad is None] == []
    names = [name for group in detector_groups(model, .05, .8) for name in group['names']]
    assert len(names) == len({*names}) == len([p for p in model.parameters() if p.requires_grad])


def test_weights_of_a_run_and_of_a_whole_autoencoder_are_taken(tmp_path):
    mae = create_mae('mae_vit_nano_patch4_32', dim=16, depth=1, num_heads=2)
    save_model(mae, tmp_path/'mae.safetensors')
    encoder, _ = load_encoder(tmp_path/'mae.safetensors')
    imgs = torch.rand(1, 3, 24, 40)
    with torch.no_grad():
        ours, theirs = (DetectionBackbone(x, 8).eval().encoder for x in (mae, encoder))
        assert any_size_map(ours, imgs).equal(any_size_map(theirs, imgs))


def test_a_missing_extra_is_named(monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, 'pycocotools', None)
    with pytest.raises(MissingPackage, match=r'pycocotools is not installed: .* pip install -e "\.\[detect\]"'):
        average_precision([], [])
