"""Counts, plans and benchmarks tell the truth."""
import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mae_nb.measure.bench import random_images
from mae_nb.data.loader import get_dls
from mae_nb.model.mae import create_mae
from mae_nb.tasks.pretrain import pretrain_learner
from mae_nb.training.presets import RECIPES
from mae_nb.training.recipes import override
from mae_nb.base.devices import keep_freed_memory
from mae_nb.measure.bench import train_step
from mae_nb.model.costs import forward_flops, step_flops
from mae_nb.training.switches import float8_linears

ROOT = Path(__file__).resolve().parents[2]
NANO = 'mae_vit_nano_patch4_32'

def counted(run):
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter: run()
    return counter.get_total_flops()

@pytest.mark.parametrize('name, options', [('mae_vit_base_patch16', {}), ('mae_vit_huge_patch14', {}), ('mae_vit_tiny_patch2_32', {}), ('mae_vit_base_patch16', dict(decoder='cross', decode_ratio=.25)),
                                           ('mae_vit_base_patch16', dict(encoder_mask_tokens=True)), ('mae_vit_base_patch16', dict(decoder_depth=1, mask_ratio=.5))], ids=str)
def test_operations_as_pytorch_counts_them(name, options):
    with torch.device('meta'):
        model = create_mae(name, **options)
        imgs, noise = torch.empty(1, 3, *model.encoder.img_size), torch.empty(1, model.num_patches)
        assert counted(lambda: model(imgs, noise=noise)) == forward_flops(model)
        assert counted(lambda: model(imgs, noise=noise).loss.backward()) == step_flops(model)

def test_the_papers_base_takes_58_gflop_an_image():
    with torch.device('meta'): model = create_mae('mae_vit_base_patch16')
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
    assert torch.allclose(losses(compile=how, checkpointing=checkpointing), losses(), rtol=0, atol=1e-5)

def learned(**switches):
    "Losses of twenty steps of a `Learner`, from the same start with the same masks."
    recipe = override(RECIPES['pretrain_cifar10'], dict(epochs=1, warmup_epochs=0., batch_size=8) | switches)
    torch.manual_seed(0)
    learn = pretrain_learner(get_dls((random_images(160, (32, 32)), None), recipe, img_size=32, num_workers=0, device='cpu'), create_mae(NANO, target='pixels'), recipe)
    learn.fit_recipe()
    return torch.tensor(learn.recorder.losses)

def test_a_learner_throws_the_switches_of_its_recipe():
    plain = learned()
    assert len(plain) == 20 and plain[-1] < plain[0] and torch.equal(learned(checkpointing=True), plain)
    with pytest.raises(ValueError, match='fp8 needs a GPU'): learned(fp8=True)

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
    assert sum(type(m).__name__ == 'Float8Linear' for m in model.modules()) == 16 and list(model.state_dict()) == names
    step = train_step(model, imgs, dtype='bfloat16', lr=1e-3)
    assert torch.allclose(torch.stack([step() for _ in range(20)]), plain, rtol=0, atol=.05)

@pytest.mark.parametrize('words, fields', [
    (('step', '--against', 'transformers', '--pairs', '2', '--steps', '1'), {'ours', 'theirs', 'ratio', 'ratio_min', 'ratio_max', 'mfu', 'gflop_per_image'}),
    (('step', '--against', 'transformers', '--pairs', '1', '--steps', '1', '--set', 'decoder=cross', '--set', 'decode_ratio=.25'), {'ours', 'theirs', 'ratio'}),
    (('step', '--task', 'finetune', '--against', 'timm', '--pairs', '1', '--steps', '1'), {'ours', 'theirs', 'ratio'}),
    (('loader', '--steps', '2'), {'ours'}),
    (('learner', '--pairs', '1', '--steps', '3'), {'ours', 'theirs', 'ratio', 'learner_ms', 'bare_ms', 'more_ms'}),
    (('save', '--pairs', '1', '--folder', '.'), {'gb', 'first_copy_seconds', 'copy_seconds', 'write_seconds', 'read_seconds'}),
])
def test_a_benchmark_writes_its_numbers(forked, tmp_path, words, fields):
    got = forked('mae-bench', *words, '--model', NANO, '--bs', '8', '--device', 'cpu', '--json', 'found.json')
    assert got.code == 0, got.err
    found = json.loads((tmp_path/'found.json').read_text())
    assert fields | {'bench', 'model', 'bs', 'versions', 'device', 'device_name', 'threads', 'matmul_gflops'} <= found.keys()
    assert all(found[k] > 0 for k in fields - {'more_ms'}) and found['threads'] == 1

@pytest.mark.parametrize('words, said', [
    (('mae-bench', 'stop'), "did you mean 'step'"),
    (('mae-bench', 'step', '--against', 'tim'), "unknown --against 'tim': did you mean 'timm'"),
    (('mae-bench', 'step', '--against', 'timm'), 'timm has no masked autoencoder'),
    (('mae-bench', 'save', '--against', 'timm'), '--against has no meaning for save'),
    (('mae-bench', 'step', '--bs', '0'), '--bs must be at least 1'),
    (('mae-bench', 'step', '--pairs', '0'), 'at least one turn'),
    (('mae-bench', 'step', '--set', 'compile=all'), 'compile must be one of none, blocks, whole, graphs'),
    (('mae-bench', 'step', '--set', 'compile=graphs'), 'needs a GPU'),
    (('mae-bench', 'step', '--set', 'fp8=True'), 'fp8 needs a GPU of compute capability 8.9'),
    (('mae-bench', 'step', '--task', 'finetune', '--set', 'mixup=0.'), '--set mixup=0. has no meaning for step --task finetune'),
    (('mae-bench', 'loader', '--set', 'compile=blocks'), '--set compile=blocks has no meaning for loader'),
    (('mae-bench', 'step', '--dtype', 'float16'), "did you mean 'bfloat16'"),
    (('mae-bench', 'loader', '--data', 'nowhere/at-all'), 'no such folder'),
    (('mae-plan', 'pretrian'), "did you mean 'pretrain'"),
    (('mae-plan', 'pretrain', '--rate', 'fast'), '--rate takes auto or a number'),
    (('mae-plan', 'pretrain', '--gpus', '0'), '--gpus must be at least 1'),
    (('mae-plan', 'pretrain', '--gpus', '3', '--rate', '10'), 'batch_size 4096 does not divide into 3 parts'),
    (('mae-plan', 'pretrain', '--memory', '1', '--rate', '10', '--model', 'mae_vit_base_patch16'), 'the model does not fit'),
    (('mae-plan', 'pretrain', '--data', 'imagenot', '--rate', '10'), "did you mean 'imagenet'"),
    (('mae-plan', 'pretrain', '--data', '100', '--rate', '10'), 'larger than the 100 images'),
    (('mae-plan', 'knn', '--rate', '10'), 'can be planned'),
])
def test_a_wrong_argument_gets_one_line_and_exit_code_2(forked, words, said):
    got = forked(words[0], *words[1:], *(() if '--model' in words else ('--model', NANO)), '--device', 'cpu')
    assert got.code == 2 and said in got.line, got

def test_a_plan_for_imagenet(forked, tmp_path):
    got = forked('mae-plan', 'pretrain', '--gpus', '8', '--rate', '2000', '--price', '2.5', '--memory', '80', '--device', 'cpu', '--json', 'plan.json')
    assert got.code == 0 and 'cost' in got.out, got.err
    plan = json.loads((tmp_path/'plan.json').read_text())
    assert plan['model'] == 'mae_vit_base_patch16' and plan['batch_per_gpu'] * plan['accumulate'] * 8 == 4096 and plan['memory_gib'] < 80
    assert plan['cost'] == pytest.approx(2.5 * 8 * plan['hours']) and 17 < plan['hours'] < 19

@pytest.mark.slow
@pytest.mark.parametrize('size, images, bs', [('mae_vit_nano_patch4_32', 4000, 128), ('mae_vit_tiny_patch2_32', 160, 16), ('mae_vit_base_patch16', 32, 8)])
def test_a_plan_is_what_a_run_takes(tmp_path, size, images, bs):
    "Memory within 15 %, hours within 20 %, on noise in memory; each in a process of its own, for the peak's sake."
    code = f'''
import json, sys, time
from mae_nb.all import *
train, name = random_images({images}, (224, 224) if 'base' in {size!r} else (32, 32)), {size!r}
recipe = change(RECIPES['pretrain_cifar10'], dict(epochs=1, warmup_epochs=0, batch_size={bs}))
keep_freed_memory()
if sys.argv[1] == 'plan': found = mae_plan('pretrain_cifar10', model=name, data='{images}', epochs=1, bs={bs}, set=['warmup_epochs=0'], device='cpu')
else:
    learn = pretrain((train, None), name, recipe, Path('run'), device='cpu', num_workers=0)
    seconds = float((Path('run')/'timing.csv').read_text().splitlines()[1].split(',')[1])
    found = dict(memory_gib=memory_gib(learn.dls.device), hours=seconds / 3600)
Path(sys.argv[1] + '.json').write_text(json.dumps(found))
'''
    for part in ('plan', 'run'): subprocess.run([sys.executable, '-c', 'from pathlib import Path\n' + code, part], cwd=tmp_path, check=True, capture_output=True)
    plan, run = (json.loads((tmp_path/f'{part}.json').read_text()) for part in ('plan', 'run'))
    assert plan['memory_gib'] == pytest.approx(run['memory_gib'], rel=.15), (plan, run)
    assert plan['hours'] == pytest.approx(run['hours'], rel=.2), (plan, run)

def test_the_switches_script_works(tmp_path, capsys):
    file = tmp_path/'found.json'
    from bench import switches
    switches.main(['--bs', '4', '--pairs', '1', '--only', 'plain', 'cross decoder 25 %', '--json', str(file)])
    rows = json.loads(file.read_text())['rows']
    assert list(rows) == ['transformers', 'plain', 'cross decoder 25 %'] and rows['transformers']['ratio'] == 1
    assert all(r['images_per_second'] > 0 and 0 < r['mfu'] < 2 for r in rows.values()) and '| plain |' in capsys.readouterr().out

def test_the_gpu_script_works_on_a_cpu(tmp_path, capsys):
    from bench import gpu
    file, words = tmp_path/'found.json', ['--models', 'nano', '--device', 'cpu', '--turns', '1', '--steps', '1']
    gpu.main([*words, '--json', str(file), '--table', str(tmp_path/'table.md')])
    found = json.loads(file.read_text())
    assert {r['switch'] for r in found['rows']} >= {'bf16', 'transformers, bf16', 'float32', 'linear probe, bf16', 'bf16, activation checkpointing'}
    assert all(r['images_per_second'] > 0 and r['mfu'] > 0 for r in found['rows']) and len(found['kernels']['nano']) == 10
    assert next(r for r in found['rows'] if r['switch'] == 'float32')['mfu'] < 2   # many CPUs have no bfloat16, and no rate of it that means anything
    assert {x['why'] for x in found['left_out']} == {'only on a GPU'}
    assert '| nano | bf16 |' in (tmp_path/'table.md').read_text()
    gpu.main([*words, '--budget', '0', '--json', str(file)])
    assert not json.loads(file.read_text())['rows'] and 'nano float32: no time left' in capsys.readouterr().out

def test_kept_memory_spares_page_faults():
    "In a new process: what a heap does hangs on its past."
    if platform.libc_ver()[0] != 'glibc': pytest.skip('glibc alone knows how')
    code = """
import resource
import torch
from mae_nb.model.mae import create_mae
from mae_nb.base.devices import keep_freed_memory
from mae_nb.measure.bench import train_step
model = create_mae('mae_vit_base_patch16', dim=384, depth=2, num_heads=6, decoder_dim=256, decoder_depth=2, decoder_heads=8)
step = train_step(model, torch.randn(16, 3, 224, 224))
def faults():
    for _ in range(3): step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt; step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
plain, _ = faults(), keep_freed_memory()
print(plain, faults())
"""
    plain, kept = map(int, subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True).stdout.split())
    assert kept < .2 * plain
