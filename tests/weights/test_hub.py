"""A run pushed to a stand-in for the hub, loaded back by name in three libraries, and what fails in one line."""
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from hub_stand_in import Hub

from mae_nb.data.datasets import load_source
from mae_nb.model.classifier import create_classifier
from mae_nb.model.mae import create_mae
from mae_nb.tasks.finetune import finetune_run
from mae_nb.tasks.pretrain import pretrain_run
from mae_nb.training.presets import RECIPES
from mae_nb.training.recipes import override
from mae_nb.training.runs import RunOptions
from mae_nb.weights.building import load_classifier
from mae_nb.weights.hub import load_model

pytest.importorskip('huggingface_hub')
NANO, TINY = 'mae_vit_nano_patch4_28', dict(in_chans=1, dim=32, depth=2, num_heads=2)
SHORT = dict(epochs=2, warmup_epochs=0., batch_size=40)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "A pretraining, and a fine-tuning with the files of its command that the card reads."
    folder, (train, test) = tmp_path_factory.mktemp('runs'), load_source('fashion')
    sets = train.take(range(80)), test.take(range(40))
    recipe = override(RECIPES['pretrain_fashion'], SHORT)
    model = create_mae(NANO, target='pixels', decoder_dim=32, decoder_heads=2, **TINY)
    pretrain_run(sets, model, recipe, RunOptions('fashion', out=str(folder/'pretrain'))).fit_recipe()
    recipe = override(RECIPES['finetune_fashion'], SHORT)
    model = create_classifier(NANO, 10, pool=recipe.pool, **TINY)
    learn = finetune_run(sets, model, recipe, RunOptions('fashion', out=str(folder/'finetune')),
                         config=dict(options=dict(weights=str(folder/'pretrain'))))
    learn.fit_recipe()
    top1 = float(learn.final_record[2])
    (folder/'finetune'/'results.json').write_text(json.dumps(
        dict(task='finetune', data='/data/of/mine/fashion', weights='pretrain', samples=40, top1=top1)))
    return folder


@pytest.fixture(scope='module')
def hub():
    server = Hub()
    yield server
    server.shutdown()


def child(hub, folder, code, **env):
    "Run Python against the stand-in; huggingface_hub reads its address when it is imported."
    known = {name: value for name, value in os.environ.items() if not name.startswith('HF_')}
    ours = dict(HF_ENDPOINT=hub.address, HF_HOME=str(folder/'home'), HF_TOKEN='hf_good', HF_HUB_DISABLE_XET='1',
                NO_PROXY='127.0.0.1', HF_HUB_DISABLE_TELEMETRY='1')
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True,
                          env=known | ours | env, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


PUSH = """
from mae_nb.weights.hub import from_pretrained, push_run
from huggingface_hub.utils import disable_progress_bars
disable_progress_bars()
print(push_run('pretrain', 'me/first', licence='cc-by-4.0', probes=['finetune']))
push_run('finetune', 'me/second', licence='apache-2.0')

def attempt(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
        print('no error')
    except Exception as e:
        print(type(e).__name__, str(e))

attempt(push_run, 'pretrain', 'first', licence='apache-2.0')
attempt(push_run, 'pretrain', 'me/cut', licence='apache-2.0')
attempt(push_run, 'pretrain', 'me/first', licence='apache-2.0', token='hf_bad')
attempt(from_pretrained, 'me/nothing')
attempt(from_pretrained, 'no name/at all')
import os
del os.environ['HF_TOKEN']
attempt(push_run, 'pretrain', 'me/first', licence='apache-2.0')
"""


@pytest.fixture(scope='module')
def pushed(hub, runs):
    return child(hub, runs, PUSH).splitlines()


def test_a_push_makes_a_repository(pushed, hub, runs):
    assert pushed[0] == f'{hub.address}/me/first/commit/{"c" * 40}'
    files = hub.repositories['me/first']
    assert {'README.md', 'config.json', 'curves.png', 'metrics.csv', 'model.safetensors', 'timm/model.safetensors',
            'transformers/model.safetensors', 'transformers/config.json'} <= files.keys()
    assert files['model.safetensors'] == (runs/'pretrain'/'model.safetensors').read_bytes()
    assert 'POST /me/first.git/info/lfs/objects/batch' in hub.calls and 'PUT /lfs/' in hub.calls


def test_each_failure_is_one_line(pushed):
    name, cut, bad, nothing, no_name, no_token = pushed[1:]
    assert name.startswith("UsageError 'first' is no name of a repository: owner/name")
    assert cut.startswith('OSError me/cut was not uploaded: ') and 'push it again' in cut
    assert bad.startswith('OSError me/first was not uploaded: ') and '401' in bad
    assert nothing.startswith('OSError me/nothing is no folder and is not available from the hub: 404')
    assert no_name.startswith("UsageError 'no name/at all' is no folder and no name of a repository")
    assert no_token.startswith('UsageError there is no token for the hub: call `hf auth login`')
    assert all(len(line) < 400 for line in pushed)


def test_the_card_has_the_run_s_numbers(pushed, hub, runs):
    card = hub.repositories['me/first']['README.md'].decode()
    lines = (runs/'pretrain'/'metrics.csv').read_text().splitlines()
    first, last = (dict(zip(lines[0].split(','), line.split(','))) for line in (lines[1], lines[-1]))
    for name in ('train_loss', 'valid_loss'):
        assert f'| {name} | {float(first[name]):.4f} | {float(last[name]):.4f} |' in card
    top1 = json.loads((runs/'finetune'/'results.json').read_text())['top1']
    assert f'| finetune | fashion | 40 | {top1:.2%} |' in card
    config = json.loads((runs/'pretrain'/'config.json').read_text())
    assert all(f'| {name} | {value} |' in card for name, value in config['recipe'].items())
    assert 'license: cc-by-4.0' in card and '/data/of/mine' not in card and str(runs) not in card
    assert 'pipeline_tag: image-classification' in hub.repositories['me/second']['README.md'].decode()


LOAD = """
results = {}
for name, code in blocks.items():
    space = {}
    exec(code, space)
    results[name] = space['model'].eval()
images = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
noise = torch.rand(3, 49, generator=torch.Generator().manual_seed(1))
with torch.no_grad():
    out = {}
    if kind == 'mae':
        out['ours'] = results['ours'].encode(images)
        out['timm'] = results['timm'].forward_features(images)
        out['loss'] = results['ours'](images, noise=noise).loss
        out['hf loss'] = results['transformers'](images, noise=noise).loss
    else:
        out = dict(ours=results['ours'](images), timm=results['timm'](images),
                   transformers=results['transformers'](images).logits)
torch.save(out, f'{kind}.pt')
torch.save({k: v.clone() for k, v in results['ours'].state_dict().items()}, f'{kind}.weights.pt')
"""


@pytest.fixture(scope='module')
def loaded(pushed, hub, runs):
    "A folder with what both cards' code has loaded, in one process that has imported the three libraries."
    pytest.importorskip('transformers')
    code = 'import torch\n'
    for kind, repo in (('mae', 'me/first'), ('classifier', 'me/second')):
        card = hub.repositories[repo]['README.md'].decode()
        codes = re.findall(r'```python\n(.*?)```', card, re.S)
        blocks = dict(zip(('ours', 'timm', 'transformers'), codes, strict=True))
        assert all(library in blocks[library] for library in ('timm', 'transformers'))
        code += f'blocks, kind = {blocks!r}, {kind!r}\n{LOAD}'
    child(hub, runs, code)
    return runs


@pytest.mark.parametrize('kind, run', [('mae', 'pretrain'), ('classifier', 'finetune')])
def test_the_code_of_the_card_loads_the_same_model(kind, run, loaded, runs):
    out = torch.load(loaded/f'{kind}.pt')
    if kind == 'mae':
        assert torch.allclose(out['ours'], out['timm'], atol=1e-5)
        assert torch.allclose(out['loss'], out['hf loss'], atol=1e-5)
    else:
        assert torch.allclose(out['ours'], out['timm'], atol=1e-5)
        assert torch.allclose(out['ours'], out['transformers'], atol=1e-5)
    trained, again = load_model(runs/run).state_dict(), torch.load(runs/f'{kind}.weights.pt')
    assert trained.keys() == again.keys() and all(torch.equal(trained[name], again[name]) for name in trained)
    if kind == 'classifier':
        assert load_classifier(runs/run).head.out_features == 10
