"""What only a GPU can show: the same masks, losses and gradients as on the CPU, however the model is compiled."""
import pytest
import torch

from mae_nb.base.keyed import key, seeded, uniform
from mae_nb.model.classifier import create_classifier
from mae_nb.model.costs import step_memory
from mae_nb.model.mae import create_mae
from mae_nb.training.switches import apply_switches

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')]
NANO = 'mae_vit_nano_patch4_32'

@pytest.fixture(autouse=True)
def exact():
    "Matrix products in whole float32, and nothing left compiled."
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('highest')
    yield
    torch.set_float32_matmul_precision(before)
    torch.compiler.reset()

def a_batch(device, bs=8):
    "Images and the masks' noise, the same numbers on every device."
    numbers = uniform(key(0, 0, torch.arange(bs), 'crop'), 3 * 32 * 32).reshape(bs, 3, 32, 32) - .5
    noise = uniform(key(0, 0, torch.arange(bs), 'mask'), 64)
    return numbers.to(device), noise.to(device)

def step(device, **switches):
    "Loss, mask and gradients of a step."
    model = apply_switches(seeded(0, create_mae, NANO).to(device), **switches)
    imgs, noise = a_batch(device)
    output = model(imgs, noise=noise)
    output.loss.backward()
    grads = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return output.loss.item(), output.mask.cpu(), grads

def test_keyed_numbers_are_the_same_bits():
    keys = key(3, 5, torch.arange(1000), 'mask')
    assert torch.equal(uniform(keys, 196), uniform(keys.cuda(), 196).cpu())

def test_step_equals_the_cpu_s():
    (loss, mask, grads), (there, its_mask, its_grads) = step('cpu'), step('cuda')
    assert torch.equal(mask, its_mask)
    assert abs(loss - there) < 1e-5 * loss
    for name, grad in grads.items():
        assert (grad - its_grads[name]).norm() <= 1e-4 * grad.norm() + 1e-7, name

@pytest.mark.parametrize('switches', [
    dict(compile='blocks'), dict(compile='whole'), dict(compile='graphs'), dict(checkpointing=True),
    dict(compile='blocks', checkpointing=True)], ids=str)
def test_switches_do_not_change_a_step(switches):
    (loss, mask, grads), (there, its_mask, its_grads) = step('cuda'), step('cuda', **switches)
    assert torch.equal(mask, its_mask)
    assert abs(loss - there) < 1e-5 * loss
    for name, grad in grads.items():
        assert (grad - its_grads[name]).norm() <= 1e-4 * grad.norm() + 1e-7, name

def test_float8_step_is_near():
    pytest.importorskip('torchao')
    losses = []
    for fp8 in (False, True):
        model = seeded(0, create_mae, 'mae_vit_tiny_patch2_32').cuda()
        model = apply_switches(model, compile='blocks', fp8=fp8)
        imgs = a_batch('cuda')[0]
        noise = uniform(key(0, 0, torch.arange(len(imgs)).cuda(), 'mask'), 256)
        with torch.autocast('cuda', dtype=torch.bfloat16):
            output = model(imgs, noise=noise)
        output.loss.backward()
        losses.append(output.loss.item())
    assert abs(losses[1] - losses[0]) < .02 * losses[0]

@pytest.mark.parametrize('make, bs', [(create_mae, 64), (lambda name: create_classifier(name, 1000), 32)],
                         ids=['pretraining', 'fine-tuning'])
def test_planned_memory_is_used(make, bs):
    "The plan of a step's memory is at most 25 % beside the allocator's peak."
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = make('mae_vit_base_patch16').cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    imgs = torch.randn(bs, 3, 224, 224, device='cuda')
    for _ in range(2):
        with torch.autocast('cuda', dtype=torch.bfloat16):
            output = model(imgs)
            loss = output.loss if hasattr(output, 'loss') else output.logsumexp(dim=1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    used = torch.cuda.max_memory_allocated() - before
    planned = step_memory(model, bs, amp=True).total
    print(f'planned {planned / 2**30:.2f} GiB, used {used / 2**30:.2f} GiB')
    assert abs(used - planned) < .25 * used
