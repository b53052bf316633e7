"""The base model against transformers' ViT-MAE: weights copied over, same noise.

Each target in one precision; both targets in both: `pytest -m slow tests/model/test_parity.py`."""
import pytest
import torch
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from mae_nb.model.mae import create_mae
from mae_nb.weights.layouts import from_hf
from mae_nb.weights.loading import load_hf


def relative(a, b):
    "The norm of the difference over the norm of the second."
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()

@pytest.fixture(scope='module')
def theirs(request):
    "transformers' base model, every parameter moved away from its initial value, positions and tokens included."
    torch.manual_seed(0)
    model = ViTMAEForPreTraining(ViTMAEConfig(layer_norm_eps=1e-6)).to(request.param).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=.02)
    return model

@pytest.mark.parametrize('theirs, target', [
    (torch.float32, 'pixels'),
    (torch.float64, 'norm_pixels'),
    pytest.param(torch.float32, 'norm_pixels', marks=pytest.mark.slow),
    pytest.param(torch.float64, 'pixels', marks=pytest.mark.slow),
], indirect=['theirs'], ids=str)
def test_forward_and_gradients(target, theirs):
    "Loss, prediction, mask and every gradient of the base model."
    dtype, tolerance = theirs.dtype, {torch.float32: 1e-5, torch.float64: 1e-10}[theirs.dtype]
    theirs.config.norm_pix_loss = target == 'norm_pixels'
    theirs.zero_grad()
    torch.manual_seed(1)
    ours = create_mae('mae_vit_base_patch16', target=target).to(dtype).eval()
    report = load_hf(ours, theirs.state_dict())
    assert not report.missing and not report.unused, report

    imgs, noise = torch.randn(2, 3, 224, 224, dtype=dtype), torch.rand(2, 196, dtype=dtype)
    a, b = ours(imgs, noise=noise), theirs(imgs, noise=noise)
    assert torch.equal(a.mask, b.mask.to(a.mask.dtype))
    assert relative(a.loss, b.loss) < tolerance
    assert relative(a.pred, b.logits) < tolerance

    a.loss.backward()
    b.loss.backward()
    grads = from_hf({name: p.grad for name, p in theirs.named_parameters() if p.grad is not None})
    for name, p in ours.named_parameters():
        if p.requires_grad:
            assert relative(p.grad, grads[name]) < tolerance, name
