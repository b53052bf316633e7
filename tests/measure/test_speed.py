"""Counts of operations are PyTorch's, and no switch changes what a model learns."""
import platform
import subprocess
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mae_nb.base.devices import keep_freed_memory
from mae_nb.data.loader import get_dls
from mae_nb.measure.bench import random_images
from mae_nb.measure.pairs import train_step
from mae_nb.model.costs import forward_flops, step_flops
from mae_nb.model.mae import create_mae
from mae_nb.tasks.pretrain import pretrain_learner
from mae_nb.training.presets import RECIPES
from mae_nb.training.recipes import override
from mae_nb.training.switches import float8_linears

NANO = 'mae_vit_nano_patch4_32'

def counted(run):
    "Operations of matrix products, as PyTorch counts them."
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()

@pytest.mark.parametrize('name, options', [
    ('mae_vit_base_patch16', {}),
    ('mae_vit_huge_patch14', {}),
    ('mae_vit_tiny_patch2_32', {}),
    ('mae_vit_base_patch16', dict(decoder='cross', decode_ratio=.25)),
    ('mae_vit_base_patch16', dict(encoder_mask_tokens=True)),
    ('mae_vit_base_patch16', dict(decoder_depth=1, mask_ratio=.5)),
], ids=str)
def test_operations_as_pytorch_counts_them(name, options):
    with torch.device('meta'):
        model = create_mae(name, **options)
        imgs, noise = torch.empty(1, 3, *model.encoder.img_size), torch.empty(1, model.num_patches)
        assert counted(lambda: model(imgs, noise=noise)) == forward_flops(model)
        assert counted(lambda: model(imgs, noise=noise).loss.backward()) == step_flops(model)

def test_the_papers_base_takes_58_gflop_an_image():
    with torch.device('meta'):
        model = create_mae('mae_vit_base_patch16')
    assert abs(step_flops(model) / 1e9 - 58.2) < .2

def losses(steps=20, before=lambda: None, **options):
    "Losses from the same start with the same images and masks."
    torch.manual_seed(0)
    model, imgs = create_mae(NANO), torch.randn(8, 3, 32, 32)
    before()
    step = train_step(model, imgs, lr=1e-3, **options)
    return torch.stack([step() for _ in range(steps)])

def test_no_switch_changes_what_is_learned():
    "Twenty steps against plain eager float32."
    plain = losses(fused=False)
    assert plain[-1] < .97 * plain[0]
    assert torch.allclose(losses(), plain, rtol=0, atol=1e-5)
    assert torch.equal(losses(before=keep_freed_memory), losses())
    assert torch.equal(losses(checkpointing=True), losses())
    assert torch.allclose(losses(dtype='bfloat16'), plain, rtol=0, atol=1e-2)

@pytest.mark.slow
@pytest.mark.parametrize('how', ['blocks', 'whole'])
@pytest.mark.parametrize('checkpointing', [False, True])
def test_compiled_models_learn_the_same(how, checkpointing):
    compiled = losses(compile=how, checkpointing=checkpointing)
    assert torch.allclose(compiled, losses(), rtol=0, atol=1e-5)

def learned(**switches):
    "Losses of twenty steps of a `Learner`, from the same start with the same masks."
    changes = dict(epochs=1, warmup_epochs=0., batch_size=8) | switches
    recipe = override(RECIPES['pretrain_cifar10'], changes)
    torch.manual_seed(0)
    noise = random_images(160, (32, 32))
    dls = get_dls((noise, None), recipe, img_size=32, num_workers=0, device='cpu')
    learn = pretrain_learner(dls, create_mae(NANO, target='pixels'), recipe)
    learn.fit_recipe()
    return torch.tensor(learn.recorder.losses)

def test_a_learner_applies_the_switches_of_its_recipe():
    plain = learned()
    assert len(plain) == 20 and plain[-1] < plain[0]
    assert torch.equal(learned(checkpointing=True), plain)
    with pytest.raises(ValueError, match='fp8 needs a GPU'):
        learned(fp8=True)

@pytest.mark.slow
@pytest.mark.parametrize('how', ['blocks', 'whole'])
def test_a_compiled_learner_learns_the_same(how):
    assert torch.allclose(learned(compile=how), learned(), rtol=0, atol=1e-5)

def test_float8_learns_nearly_the_same():
    "By torchao's emulation, which rounds as a GPU does."
    pytest.importorskip('torchao')
    plain = losses(dtype='bfloat16')
    torch.manual_seed(0)
    model, imgs = create_mae(NANO), torch.randn(8, 3, 32, 32)
    names = list(model.state_dict())
    float8_linears(model, emulate=True)
    assert sum(type(m).__name__ == 'Float8Linear' for m in model.modules()) == 16
    assert list(model.state_dict()) == names
    step = train_step(model, imgs, dtype='bfloat16', lr=1e-3)
    assert torch.allclose(torch.stack([step() for _ in range(20)]), plain, rtol=0, atol=.05)

COUNT_FAULTS = """
import resource
import torch
from mae_nb.base.devices import keep_freed_memory

def faults():
    "Page faults of 40 blocks of 64 MiB, one after the other: above 32 MiB, glibc gives freed memory back at once."
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(40):
        torch.empty(2**24).fill_(1.)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

plain, _ = faults(), keep_freed_memory()
print(plain, faults())
"""

def test_kept_memory_spares_page_faults():
    "In a new process: what a heap does depends on its past."
    if platform.libc_ver()[0] != 'glibc':
        pytest.skip('only glibc has the setting')
    run = subprocess.run([sys.executable, '-c', COUNT_FAULTS], check=True, capture_output=True, text=True)
    plain, kept = map(int, run.stdout.split())
    if plain == kept == 0:
        pytest.skip('this kernel counts no page faults')
    assert plain > 40 * 64 * 2**20 / 65536   # pages of at most 64 KiB
    assert kept < .4 * plain   # the heap grows three to six times until an aligned block fits, and then no more
