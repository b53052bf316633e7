"""Every model leaves this library: exported for any batch, traced, compiled, copied, pickled, with the same numbers."""
import copy
import pickle

import pytest
import torch
from torch import nn
from torch.export import Dim

from mae_nb.model.classifier import create_classifier
from mae_nb.model.mae import MASKS, create_mae
from mae_nb.model.masking import stable_order
from mae_nb.model.patches import patchify

SIZE = dict(in_chans=3, dim=32, depth=1, num_heads=2)
DECODER = dict(decoder_dim=16, decoder_depth=1, decoder_heads=2)
NAME = 'mae_vit_nano_patch4_28'
IMGS = torch.randn(7, 3, 28, 28, generator=torch.Generator().manual_seed(0))
NOISE = torch.randint(0, 20, (7, 49), generator=torch.Generator().manual_seed(1)) / 20   # with many equal numbers

class Plain(nn.Module):
    "A masked autoencoder with its noise as an input, and a tuple as its output."
    def __init__(self, mae):
        super().__init__()
        self.mae = mae
        self.eval()

    def forward(self, imgs, noise):
        return tuple(self.mae(imgs, noise=noise))

def make_mae(**options):
    "A masked autoencoder that is built in no time."
    torch.manual_seed(0)
    model = create_mae(NAME, **SIZE, **DECODER, **options).eval()
    if 'target_size' in options:
        model.target.fit(patchify(IMGS, 4).flatten(0, 1))
    return model

def make_classifier(pool='avg'):
    "A classifier whose logits are not all zero."
    torch.manual_seed(0)
    model = create_classifier(NAME, 5, pool, **SIZE).eval()
    nn.init.normal_(model.head.weight)
    return model

MAES = {mask: dict(mask=mask) for mask in MASKS} | dict(
    cross=dict(decoder='cross'), tokens=dict(encoder_mask_tokens=True), every=dict(loss_on='all'),
    pixels=dict(target='pixels'), components=dict(target='pca', target_size=8),
    words=dict(target='tokens', target_size=16))
MODELS = dict(encoder=lambda: make_mae().encoder, avg=make_classifier, cls=lambda: make_classifier('cls'))
MODELS |= {name: lambda options=options: Plain(make_mae(**options)) for name, options in MAES.items()}
EVERY = pytest.mark.parametrize('name', MODELS)
def some(*names):
    "Of a slow way out these models; the others with `pytest -m slow tests/model/test_export.py`."
    return pytest.mark.parametrize('name', [
        name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in MODELS])

def arguments(model, batch):
    "What a model takes, of some batch."
    return (IMGS[:batch], NOISE[:batch]) if isinstance(model, Plain) else (IMGS[:batch],)

def check_same(outputs, wanted):
    "The same shapes and, up to the last digits, the same numbers; a mask bit for bit."
    outputs, wanted = ((x,) if isinstance(x, torch.Tensor) else tuple(x) for x in (outputs, wanted))
    assert len(outputs) == len(wanted)
    for a, b in zip(outputs, wanted):
        torch.testing.assert_close(torch.as_tensor(a), b, rtol=1e-4, atol=1e-5)
    if len(wanted) == 3:
        assert torch.equal(torch.as_tensor(outputs[2]), wanted[2])

def check_batches(run, model):
    "Batches that the model was not exported with."
    for batch in (1, 2, 7):
        with torch.no_grad():
            check_same(run(*arguments(model, batch)), model(*arguments(model, batch)))

def dynamic(model):
    "The first axis of every input is free."
    batch = Dim('batch')
    return tuple({0: batch} for _ in arguments(model, 3))

@EVERY
def test_export_for_any_batch(name):
    model = MODELS[name]()
    program = torch.export.export(model, arguments(model, 3), dynamic_shapes=dynamic(model))
    check_batches(program.module(), model)

def test_an_exported_model_draws_its_own_masks():
    model = make_mae()
    program = torch.export.export(model, (IMGS[:3],), dynamic_shapes=({0: Dim('batch')},))
    masks = program.module()(IMGS)[2], program.module()(IMGS)[2]
    assert not torch.equal(*masks)
    assert all((m.sum(dim=1) == 37).all() for m in masks)

@some('avg', 'random', 'block')
@pytest.mark.filterwarnings('ignore:# The axis name')   # both inputs share the batch, as they should
def test_onnx_for_any_batch(name, tmp_path):
    for package in ('onnx', 'onnxscript', 'onnxruntime'):
        pytest.importorskip(package, reason=f'{package} is not installed: pip install "mae_nb[export]"')
    import onnxruntime
    model, inputs = MODELS[name](), ('imgs', 'noise')
    arg_names = inputs[:len(arguments(model, 3))]
    program = torch.onnx.export(model, arguments(model, 3), input_names=arg_names, dynamic_shapes=dynamic(model),
                                dynamo=True, verbose=False)
    program.save(tmp_path/'model.onnx')
    session = onnxruntime.InferenceSession(tmp_path/'model.onnx')

    def run(*args):
        outputs = session.run(None, {k: v.numpy() for k, v in zip(arg_names, args)})
        return outputs[0] if len(outputs) == 1 else outputs
    check_batches(lambda *args: as_tensors(run(*args)), model)

def as_tensors(outputs):
    "Arrays as tensors."
    return tuple(map(torch.as_tensor, outputs)) if isinstance(outputs, list) else torch.as_tensor(outputs)

@EVERY
@pytest.mark.filterwarnings('ignore')   # the tracer warns of every comparison of shapes
def test_trace_for_any_batch(name):
    model = MODELS[name]()
    check_batches(torch.jit.trace(model, arguments(model, 3)), model)

@some('avg')
def test_compile(name):
    "Without a graph break; eager kernels, for time. Masked autoencoders: test_variants, with gradients."
    model = MODELS[name]()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend='eager')
    with torch.no_grad():
        check_same(compiled(*arguments(model, 2)), model(*arguments(model, 2)))

@EVERY
def test_copies_and_pickles_are_the_same_model(name):
    "And they share nothing: the copy is changed, the model stays."
    model = MODELS[name]()
    with torch.no_grad():
        before = model(*arguments(model, 2))
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            after = again(*arguments(model, 2))
            assert all(torch.equal(a, b) for a, b in zip(after, before))
            next(again.parameters()).add_(1.)
            assert all(torch.equal(a, b) for a, b in zip(model(*arguments(model, 2)), before))
            assert getattr(again, 'mae', again).config == getattr(model, 'mae', model).config

@pytest.mark.parametrize('numbers', [2, 5, 1000])
def test_the_exported_order_is_the_stable_sort(numbers):
    "Bit for bit, with equal numbers and with infinite ones."
    x = torch.randint(0, numbers, (20, 64)).float()
    x[:, ::9] = float('inf')

    class Order(nn.Module):
        def forward(self, x):
            return stable_order(x)
    exported = torch.export.export(Order(), (x,)).module()
    assert torch.equal(exported(x), x.argsort(dim=1, stable=True))
