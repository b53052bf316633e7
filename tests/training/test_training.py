"""Each protocol trains what the paper says, at the rate it says, and nothing else."""
import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from mae_nb.probes import (
    AttentiveHead,
    FrozenProbe,
    LinearHead,
    attentive_probe_learner,
    freeze_below,
    linear_probe_learner,
    partial_learner,
)
from PIL import Image
from torch import nn

from mae_nb.data.datasets import load_source
from mae_nb.data.loader import get_dls
from mae_nb.model.classifier import create_classifier
from mae_nb.model.mae import create_mae
from mae_nb.tasks.finetune import finetune_learner
from mae_nb.tasks.pretrain import pretrain_learner
from mae_nb.training.optim import finetune_groups, lars, param_groups, pretrain_groups
from mae_nb.training.presets import RECIPES
from mae_nb.training.recipes import AttentiveRecipe, LinearRecipe, PartialRecipe, ScratchRecipe, override
from mae_nb.training.runs import make_run
from mae_nb.weights.building import classifier_from

# ---- who is in which group: name, learning-rate scale, weight decay; '-' is frozen ---------------------------------

TABLES = {
'pretrain': '''
encoder.cls_token                    1  .05
encoder.patch_embed.proj.weight      1  .05
encoder.patch_embed.proj.bias        1  0
encoder.pos_embed                    -  -
encoder.blocks.0.norm1.weight        1  0
encoder.blocks.0.norm1.bias          1  0
encoder.blocks.0.attn.qkv.weight     1  .05
encoder.blocks.0.attn.qkv.bias       1  0
encoder.blocks.0.attn.proj.weight    1  .05
encoder.blocks.0.attn.proj.bias      1  0
encoder.blocks.11.norm2.weight       1  0
encoder.blocks.11.mlp.fc1.weight     1  .05
encoder.blocks.11.mlp.fc1.bias       1  0
encoder.blocks.11.mlp.fc2.weight     1  .05
encoder.norm.weight                  1  0
encoder.norm.bias                    1  0
decoder.mask_token                   1  .05
decoder.pos_embed                    -  -
decoder.embed.weight                 1  .05
decoder.embed.bias                   1  0
decoder.blocks.7.attn.qkv.weight     1  .05
decoder.blocks.7.mlp.fc2.bias        1  0
decoder.norm.weight                  1  0
decoder.pred.weight                  1  .05
decoder.pred.bias                    1  0
''',
'finetune_code_b': '''
cls_token                            .003697205891  0
pos_embed                            .003697205891  0
patch_embed.proj.weight              .003697205891  .05
patch_embed.proj.bias                .003697205891  0
blocks.0.norm1.weight                .005688009063  0
blocks.0.attn.qkv.weight             .005688009063  .05
blocks.0.attn.qkv.bias               .005688009063  0
blocks.0.mlp.fc2.weight              .005688009063  .05
blocks.1.attn.proj.weight            .008750783174  .05
blocks.2.attn.proj.bias              .01346274334   0
blocks.3.mlp.fc1.weight              .02071191284   .05
blocks.4.norm2.bias                  .03186448129   0
blocks.5.mlp.fc2.weight              .04902227891   .05
blocks.6.attn.qkv.weight             .07541889063   .05
blocks.7.attn.qkv.bias               .1160290625    0
blocks.8.norm1.bias                  .17850625      0
blocks.9.mlp.fc1.weight              .274625        .05
blocks.10.attn.proj.weight           .4225          .05
blocks.11.norm2.weight               .65            0
blocks.11.mlp.fc1.weight             .65            .05
blocks.11.mlp.fc1.bias               .65            0
fc_norm.weight                       1              0
fc_norm.bias                         1              0
head.weight                          1              .05
head.bias                            1              0
''',
'finetune_paper_b': '''
cls_token                            .02375726402   0
pos_embed                            .02375726402   0
patch_embed.proj.weight              .02375726402   .05
patch_embed.proj.bias                .02375726402   0
blocks.0.norm1.bias                  .03167635202   0
blocks.0.attn.qkv.weight             .03167635202   .05
blocks.1.attn.qkv.bias               .0422351360    0
blocks.2.mlp.fc1.weight              .0563135147    .05
blocks.3.mlp.fc2.bias                .07508468628   0
blocks.4.attn.proj.weight            .1001129150    .05
blocks.5.norm2.weight                .1334838867    0
blocks.6.attn.qkv.weight             .1779785156    .05
blocks.7.mlp.fc2.weight              .2373046875    .05
blocks.8.attn.proj.bias              .31640625      0
blocks.9.norm1.weight                .421875        0
blocks.10.mlp.fc1.weight             .5625          .05
blocks.11.attn.qkv.weight            .75            .05
blocks.11.mlp.fc2.bias               .75            0
norm.weight                          1              0
norm.bias                            1              0
head.weight                          1              .05
head.bias                            1              0
''',
'scratch': '''
cls_token                            1  0
pos_embed                            1  0
patch_embed.proj.weight              1  .3
patch_embed.proj.bias                1  0
blocks.0.norm1.weight                1  0
blocks.0.norm1.bias                  1  0
blocks.0.attn.qkv.weight             1  .3
blocks.0.attn.qkv.bias               1  0
blocks.0.attn.proj.weight            1  .3
blocks.0.attn.proj.bias              1  0
blocks.5.norm2.weight                1  0
blocks.5.mlp.fc1.weight              1  .3
blocks.5.mlp.fc1.bias                1  0
blocks.5.mlp.fc2.weight              1  .3
blocks.11.attn.qkv.weight            1  .3
blocks.11.mlp.fc2.bias               1  0
fc_norm.weight                       1  0
fc_norm.bias                         1  0
head.weight                          1  .3
head.bias                            1  0
''',
'linear': '''
encoder.cls_token                    -  -
encoder.pos_embed                    -  -
encoder.patch_embed.proj.weight      -  -
encoder.patch_embed.proj.bias        -  -
encoder.blocks.0.norm1.weight        -  -
encoder.blocks.0.attn.qkv.weight     -  -
encoder.blocks.0.attn.qkv.bias       -  -
encoder.blocks.0.attn.proj.weight    -  -
encoder.blocks.0.mlp.fc1.weight      -  -
encoder.blocks.0.mlp.fc2.bias        -  -
encoder.blocks.6.norm2.weight        -  -
encoder.blocks.6.attn.qkv.weight     -  -
encoder.blocks.6.mlp.fc1.bias        -  -
encoder.blocks.11.norm1.bias         -  -
encoder.blocks.11.attn.proj.weight   -  -
encoder.blocks.11.mlp.fc1.weight     -  -
encoder.blocks.11.mlp.fc2.weight     -  -
encoder.norm.weight                  -  -
encoder.norm.bias                    -  -
head.linear.weight                   1  0
head.linear.bias                     1  0
''',
'attentive': '''
encoder.cls_token                    -  -
encoder.pos_embed                    -  -
encoder.patch_embed.proj.weight      -  -
encoder.patch_embed.proj.bias        -  -
encoder.blocks.0.norm1.weight        -  -
encoder.blocks.0.attn.qkv.weight     -  -
encoder.blocks.0.mlp.fc1.weight      -  -
encoder.blocks.3.attn.proj.bias      -  -
encoder.blocks.5.norm2.weight        -  -
encoder.blocks.7.mlp.fc2.weight      -  -
encoder.blocks.9.attn.qkv.bias       -  -
encoder.blocks.10.mlp.fc1.bias       -  -
encoder.blocks.11.norm1.weight       -  -
encoder.blocks.11.attn.qkv.weight    -  -
encoder.blocks.11.mlp.fc2.weight     -  -
encoder.norm.weight                  -  -
encoder.norm.bias                    -  -
head.query                           1  .05
head.value.weight                    1  .05
head.value.bias                      1  0
head.linear.weight                   1  .05
head.linear.bias                     1  0
''',
'partial': '''
cls_token                            -     -
pos_embed                            -     -
patch_embed.proj.weight              -     -
patch_embed.proj.bias                -     -
blocks.0.norm1.weight                -     -
blocks.0.attn.qkv.weight             -     -
blocks.5.mlp.fc1.bias                -     -
blocks.9.attn.proj.weight            -     -
blocks.9.mlp.fc2.weight              -     -
blocks.10.norm1.weight               .5625 0
blocks.10.norm2.bias                 .5625 0
blocks.10.attn.qkv.weight            .5625 .05
blocks.10.attn.qkv.bias              .5625 0
blocks.10.mlp.fc1.weight             .5625 .05
blocks.11.norm1.weight               .75   0
blocks.11.attn.qkv.weight            .75   .05
blocks.11.attn.proj.bias             .75   0
blocks.11.mlp.fc2.weight             .75   .05
fc_norm.weight                       1     0
fc_norm.bias                         1     0
head.weight                          1     .05
head.bias                            1     0
'''}

def groups_of(protocol):
    "ViT-B's parameter groups as the learners make them, and its model."
    r = RECIPES[protocol]
    with torch.device('meta'):
        mae = create_mae('mae_vit_base_patch16')
        if protocol == 'pretrain': return mae, pretrain_groups(mae, r.weight_decay)
        if protocol in ('linear', 'attentive'):
            mae.encoder.config = mae.config
            head = LinearHead(768, 1000) if protocol == 'linear' else AttentiveHead(768, 1000, r.queries)
            probe = FrozenProbe(mae.encoder, head)
            return probe, param_groups(probe, r.weight_decay, lambda name, p: p.ndim <= 1)
        model = create_classifier('mae_vit_base_patch16', 1000, r.pool)
        if protocol == 'partial': freeze_below(model, 2)
        return model, finetune_groups(model, r.weight_decay, r.layer_decay)

@pytest.mark.parametrize('protocol', TABLES)
def test_vit_b_groups(protocol):
    model, groups = groups_of(protocol)
    found = {name: (g['lr_scale'], g['weight_decay']) for g in groups for name in g['names']}
    rows = [line.split() for line in TABLES[protocol].strip().splitlines()]
    names = {name for name, _ in model.named_parameters()}
    assert len(rows) >= 20 and {row[0] for row in rows} <= names
    for name, scale, wd in rows:
        if scale == '-': assert name not in found, name
        else: assert found[name] == (pytest.approx(float(scale), rel=1e-8), float(wd)), name
    seen = [id(p) for g in groups for p in g['params']]
    assert sorted(seen) == sorted(id(p) for p in model.parameters() if p.requires_grad)    # each one once

# ---- the schedule, step by step ------------------------------------------------------------------------------------

TINY = dict(dim=16, depth=3, num_heads=2)
MAE_TINY = TINY | dict(decoder_dim=16)
PLAIN = dict(randaugment='', mixup=0., cutmix=0., erase=0., amp=False)

@pytest.fixture(scope='module')
def sets():
    train, test = load_source('fashion')
    return train.shots(20), test.shots(11).take(range(101))    # 101: batches of 50 leave one sample over

def tiny_mae(): torch.manual_seed(0); return create_mae('mae_vit_nano_patch4_28', in_chans=1, target='pixels', **MAE_TINY)
def tiny_classifier(**kwargs): torch.manual_seed(0); return create_classifier('mae_vit_nano_patch4_28', 10, in_chans=1, **TINY, **kwargs)

class Spy(Callback):
    "Notes what each optimizer step uses, and the weights after it."
    order, run_valid = 90, False
    def before_fit(self): self.rates, self.weights = [], [self.flat()]
    def flat(self): return torch.cat([p.detach().double().flatten() for p in self.model.parameters() if p.requires_grad])
    def before_step(self): self.rates.append([(g['lr'], g['lr_scale']) for g in self.opt.opt.param_groups])
    def after_step(self): self.weights.append(self.flat())

@pytest.mark.parametrize('accumulate', [1, 3])
def test_the_schedule_at_each_step(sets, accumulate):
    r = override(RECIPES['finetune'], dict(PLAIN, epochs=5, warmup_epochs=2, batch_size=30, accumulate=accumulate, drop_path=0.))
    dls = get_dls((sets[0], None), r, img_size=28, bs=30 // accumulate)
    finetune_learner(dls, tiny_classifier(), r, cbs=[spy := Spy()]).fit_recipe()
    per_epoch = -(-(200 // (30 // accumulate)) // accumulate)
    assert len(spy.rates) == 5 * per_epoch
    peak = 1e-3 * 30 / 256
    for step, groups in enumerate(spy.rates):
        epoch = step / per_epoch                # fractional, as in the official lr_sched.py
        want = peak * epoch / 2 if epoch < 2 else 1e-6 + (peak - 1e-6) * .5 * (1 + math.cos(math.pi * (epoch - 2) / 3))
        for lr, scale in groups: assert lr == pytest.approx(want * scale, rel=1e-12, abs=1e-18)
    assert len({scale for _, scale in spy.rates[0]}) == 5    # embedding, three blocks, head

# ---- accumulation, clipping, average -------------------------------------------------------------------------------

class Double(Callback):
    "Images in double precision."
    order = -5
    def before_batch(self): self.learn.xb = (self.xb[0].double(), *self.xb[1:])

@pytest.mark.parametrize('clip', [0., .05])
def test_accumulation_equals_the_big_batch(sets, clip):
    "20 steps of 40 images, each epoch's last of 20: as one batch, and as batches of 10; masks and crops are the samples' own."
    r = override(RECIPES['pretrain'], dict(epochs=4, warmup_epochs=1, batch_size=40, base_lr=1e-2, target='pixels', amp=False, clip=clip))
    def run(bs, accumulate):
        recipe = override(r, dict(accumulate=accumulate))
        dls = get_dls((sets[0].take(range(180)), None), recipe, img_size=28, bs=bs)
        dls.train.batches.drop_last = False
        learn = pretrain_learner(dls, tiny_mae().double(), recipe, cbs=[Double(), spy := Spy()])
        learn.fit_recipe()
        return spy
    big, small = run(40, 1), run(10, 4)
    assert len(big.rates) == len(small.rates) == 20
    assert big.rates == small.rates
    for a, b in zip(big.weights, small.weights, strict=True): assert (a - b).abs().max() < 1e-9
    assert (big.weights[0] - big.weights[-1]).abs().max() > 1e-3

def test_what_accumulation_forgets_is_told(sets):
    r = override(RECIPES['finetune_fashion'], dict(accumulate=4))
    with pytest.raises(ValueError, match='50 images a batch x 1 processes x 4 accumulated are 200 a step, the recipe says batch_size=50'):
        finetune_learner(get_dls(sets, r, img_size=28), tiny_classifier(), r)

def test_the_average_is_its_closed_form_and_is_what_is_evaluated(sets, tmp_path, capsys):
    r = override(ScratchRecipe(), dict(PLAIN, epochs=4, warmup_epochs=1, batch_size=50, base_lr=1e-2, drop_path=0., ema=.8))
    learn = finetune_learner(get_dls(sets, r, img_size=28), tiny_classifier(), r, out=make_run(tmp_path/'run', {}), cbs=[spy := Spy()])
    learn.fit_recipe()
    w, t = torch.stack(spy.weights), 16
    closed = .8**t * w[0] + .2 * sum(.8**(t - i) * w[i] for i in range(1, t + 1))
    average = learn.weight_ema.average.module
    assert (torch.cat([p.detach().double().flatten() for p in average.parameters()]) - closed).abs().max() < 1e-6
    x, y = whole(sets[1])
    with torch.no_grad(): right = (average.eval()(x).argmax(1) == y).double().mean().item()
    assert learn.final_record[2] == pytest.approx(right, abs=1e-12) and learn.validate()[1] == pytest.approx(right, abs=1e-12)
    late = override(r, dict(ema=.9999, epochs=1, warmup_epochs=0))
    finetune_learner(get_dls(sets, late, img_size=28), tiny_classifier(), late).fit_recipe()
    assert 'the first weights are still in it' in capsys.readouterr().out

# ---- evaluation, mixing, frozen parameters -------------------------------------------------------------------------

def whole(images):
    from mae_nb.data.images import standardize
    return standardize(torch.stack([images.read(i) for i in range(len(images))]), images.mean, images.std), torch.from_numpy(images.labels)

def test_evaluation_is_exact_with_a_single_sample_left_over(sets):
    r = override(RECIPES['finetune_fashion'], dict(epochs=2, warmup_epochs=0))
    learn = finetune_learner(get_dls(sets, r, img_size=28), tiny_classifier(), r)
    assert [len(b[0]) for b in learn.dls.valid] == [50, 50, 1]
    learn.fit_recipe()
    x, y = whole(sets[1])
    with torch.no_grad(): z = learn.model.eval()(x)
    want = nn.functional.cross_entropy(z, y).item(), (z.argmax(1) == y).double().mean().item(), (z.topk(5).indices == y[:, None]).any(1).double().mean().item()
    assert list(learn.validate()) == pytest.approx(want, rel=1e-6)

class Targets(Callback):
    "Collects the targets that the loss sees."
    order, run_valid = 50, False
    def before_fit(self): self.seen = []
    def before_batch(self): self.seen.append(self.yb[1])

def test_mixed_targets_sum_to_one_and_hang_on_seed_and_step(sets):
    r = override(RECIPES['finetune_fashion'], dict(epochs=3, warmup_epochs=1, mixup=.8, cutmix=1., label_smoothing=.1))
    def run(seed):
        learn = finetune_learner(get_dls((sets[0], None), r, img_size=28), tiny_classifier(), r, seed=seed, cbs=[t := Targets()])
        np.random.seed(seed); learn.fit_recipe()      # whatever the global generators say
        return torch.stack(t.seen)
    a, b, c = run(0), run(0), run(1)
    assert a.shape == (12, 50, 10) and torch.allclose(a.sum(-1), torch.ones(12, 50), atol=1e-5)
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert a.amax(-1).min() < .85 and (a > 0).all()    # mixed, and smooth

@pytest.mark.parametrize('blocks', [0, .5, 1, 2])
def test_frozen_is_bit_identical_and_costs_nothing(sets, blocks):
    r = override(PartialRecipe(), dict(PLAIN, mixup=.8, cutmix=1., epochs=2, warmup_epochs=1, batch_size=50, base_lr=1e-2, drop_path=.3))
    model, _ = classifier_from(tiny_mae(), 10, 'avg', .3)
    before = copy.deepcopy(model.state_dict())
    learn = partial_learner(get_dls((sets[0], None), r, img_size=28), model, r, blocks=blocks)
    learn.fit_recipe()
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    tops = {0: (), .5: ('blocks.2.mlp.',), 1: ('blocks.2.',), 2: ('blocks.1.', 'blocks.2.')}[blocks]
    assert moved == {k for k in before if k.startswith((*tops, 'fc_norm.', 'head.'))}
    assert {id(p) for p in learn.opt.opt.state} == {id(p) for n, p in model.named_parameters() if n in moved}
    assert all(p.grad is None for n, p in model.named_parameters() if n not in moved)
    below = model.blocks[2 - int(blocks)] if blocks < 1 else model.blocks[3 - int(blocks)]
    reached = []
    below.register_forward_pre_hook(lambda m, args: reached.append(args[0].requires_grad))
    model(torch.zeros(2, 1, 28, 28)); assert reached == [False]    # nothing below keeps an activation

@pytest.mark.parametrize('learner, recipe', [(linear_probe_learner, LinearRecipe), (attentive_probe_learner, AttentiveRecipe)])
def test_probes_leave_the_encoder_alone(sets, learner, recipe):
    r = override(recipe(), dict(epochs=2, warmup_epochs=1, batch_size=50, base_lr=1., amp=False) | (dict(queries=4) if recipe is AttentiveRecipe else {}))
    mae = tiny_mae()
    before = copy.deepcopy(mae.state_dict())
    learn = learner(get_dls(sets, r, img_size=28), mae, r)
    learn.fit_recipe()
    assert all(torch.equal(v, before[k]) for k, v in mae.state_dict().items()) and all(p.requires_grad for p in mae.encoder.blocks.parameters())
    assert all(torch.equal(v, before[f'encoder.{k}']) for k, v in learn.model.encoder.state_dict().items())
    assert not learn.model.head.norm.affine and learn.model.head.norm.eps == 1e-6

# ---- other people's code -------------------------------------------------------------------------------------------

def test_lars_against_timm_and_where_they_differ():
    from timm.optim import Lars
    grads = [[torch.randn(4, 6), torch.randn(4)] for _ in range(20)]
    def run(make):
        torch.manual_seed(0)
        layer = nn.Linear(6, 4)
        opt = make(layer)
        for gs in grads:
            for p, g in zip(layer.parameters(), gs): p.grad = g.clone()
            opt.step()
        return layer.weight.detach(), layer.bias.detach()
    ours = run(lambda m: lars(param_groups(m, 0., lambda n, p: False), 2.))
    adapting = run(lambda m: Lars(m.parameters(), lr=2., momentum=.9, always_adapt=True))
    asleep = run(lambda m: Lars(m.parameters(), lr=2., momentum=.9))
    sgd = run(lambda m: torch.optim.SGD(m.parameters(), lr=2., momentum=.9))
    assert torch.allclose(ours[0], adapting[0], atol=1e-6)          # the matrix: the same
    assert not torch.allclose(ours[1], adapting[1], atol=1e-3)      # timm adapts the bias too ...
    assert torch.allclose(ours[1], sgd[1], atol=1e-5)               # ... the official code does not
    assert torch.allclose(asleep[0], sgd[0], atol=1e-5)             # and without always_adapt timm adapts nothing at weight decay 0

@pytest.mark.parametrize('pool', ['avg', 'cls'])
def test_layer_decay_against_timm_and_where_they_differ(pool):
    import timm
    from timm.optim import param_groups_layer_decay
    with torch.device('meta'):
        theirs = timm.create_model('vit_base_patch16_224', global_pool='avg' if pool == 'avg' else 'token')
        ours = create_classifier('mae_vit_base_patch16', 1000, pool)
    name_of = {id(p): n for n, p in theirs.named_parameters()}
    want = {name_of[id(p)]: (g['lr_scale'], g['weight_decay']) for g in param_groups_layer_decay(theirs, .05, theirs.no_weight_decay(), layer_decay=.75) for p in g['params']}
    got = {n: (g['lr_scale'], g['weight_decay']) for g in finetune_groups(ours, .05, .75) for n in g['names']}
    differ = {n for n in want if got[n] != pytest.approx(want[n])}
    assert want.keys() == got.keys()
    assert differ == (set() if pool == 'avg' else {'norm.weight', 'norm.bias'})    # timm scales the last norm by one step, the official code does not
    for n in differ: assert (got[n][0], want[n][0]) == (1., pytest.approx(.75))

# ---- the same with workers, and what cannot work -------------------------------------------------------------------

def test_the_whole_recipe_is_a_function_of_the_seed(sets):
    "RandAugment, erasing, mixup, drop path: two workers or none, the same losses."
    r = override(RECIPES['finetune'], dict(epochs=2, warmup_epochs=1, batch_size=50, drop_path=.2, amp=False))
    def run(workers):
        learn = finetune_learner(get_dls(sets, r, img_size=28, num_workers=workers), tiny_classifier(drop_path=.2), r)
        torch.manual_seed(workers); learn.fit_recipe()
        return learn.recorder.losses, learn.final_record
    assert run(0) == run(2)

def folders(root, train, valid=()):
    for part, classes in (('train', train), ('val', valid)):
        for c in classes:
            (root/part/c).mkdir(parents=True)
            for i in range(4): Image.fromarray(np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(root/part/c/f'{i}.png')
    return root

def test_what_cannot_work_is_told(sets, tmp_path):
    r = override(RECIPES['finetune_fashion'], dict(batch_size=4))
    nano = lambda n: create_classifier('mae_vit_nano_patch4_32', n, **TINY)
    one = get_dls(folders(tmp_path/'one', ['cat']), r, img_size=32, num_workers=0)
    with pytest.raises(ValueError, match="has one class only, 'cat'"): finetune_learner(one, nano(1), r)
    with pytest.raises(ValueError, match='holds classes that the training set lacks: owl'): get_dls(folders(tmp_path/'more', ['cat', 'dog'], ['dog', 'owl']), r, img_size=32)
    two = get_dls(folders(tmp_path/'two', ['cat', 'dog'], ['dog']), r, img_size=32, num_workers=0)
    finetune_learner(two, nano(2), r)                       # a class that validation lacks is no fault
    with pytest.raises(ValueError, match='has 2 classes, the head only 1'): finetune_learner(two, nano(1), r)
    with pytest.raises(ValueError, match='has no labels'): finetune_learner(get_dls((sets[0], replace(sets[1], labels=None)), r, img_size=28), tiny_classifier(), r)
    with pytest.raises(ValueError, match='batch of 300 is larger than fashion with 200 images: use --bs 200 or less'): get_dls(sets, r, img_size=28, bs=300)
    with pytest.raises(ValueError, match='layer_decay=0.75 matches no parameter'): finetune_groups(tiny_frozen(), .05, .75)

def tiny_frozen():
    model = tiny_classifier()
    freeze_below(model, 0)
    return model

def test_an_epoch_whose_leftover_is_a_single_batch_of_one(sets):
    r = override(RECIPES['finetune_fashion'], dict(epochs=2, warmup_epochs=0, batch_size=5, accumulate=5))
    learn = finetune_learner(get_dls((sets[0].take(range(11)), None), r, img_size=28, bs=1), tiny_classifier(), r, cbs=[spy := Spy()])
    learn.fit_recipe()
    assert len(spy.rates) == 2 * 3 and all(math.isfinite(x) for x in learn.recorder.losses)

# ---- commands ------------------------------------------------------------------------------------------------------

def test_commands(forked, tmp_path):
    folders(tmp_path/'pets', ['cat', 'dog'], ['cat', 'dog'])
    quick = '--num-workers', '0', '--max-steps', '2', '--set', 'amp=False'
    got = forked('mae-finetune', 'pets', '--from-scratch', '--model', 'mae_vit_nano_patch4_32', '--bs', '4', *quick, '--out', 'scratch')
    assert got.code == 0 and (tmp_path/'scratch'/'classes.csv').is_file(), got.err
    for kind, flags in (('linear', ()), ('attentive', ('--set', 'queries=8')), ('partial', ('--blocks', '0.5'))):
        got = forked('mae-probe', kind, 'pets', 'scratch', '--bs', '4', *quick, *flags, '--out', kind, '--json', f'{kind}.json')
        assert got.code == 0 and (tmp_path/f'{kind}.json').is_file() and (tmp_path/kind/'figures'/'confusion.png').is_file(), got.err
    got = forked('mae-probe', 'knn', 'pets', 'scratch', '--num-workers', '0', '--out', 'knn')
    assert got.code == 0 and 'top1' in got.out, got.err
    for words, said in ((('mae-finetune', 'pets'), 'name either the weights to start from or --from-scratch'),
                        (('mae-probe', 'liner', 'pets', 'scratch'), "did you mean 'linear'"),
                        (('mae-probe', 'partial', 'pets', 'scratch', '--blocks', '7', '--bs', '4'), 'blocks must be 0, 0.5 or a whole number up to 3'),
                        (('mae-probe', 'linear', 'pets', 'nowhere.safetensors'), 'nowhere.safetensors'),
                        (('mae-finetune', 'pets', 'scratch', '--bs', '3'), 'use an even --bs'),
                        (('mae-finetune', 'pets', 'scratch', '--bs', '40'), 'use --bs 8 or less')):
        got = forked(*words, '--out', 'never')
        assert got.code == 2 and said in got.line and not (tmp_path/'never').exists(), got

# ---- the study's shortcut ------------------------------------------------------------------------------------------

def test_the_study_s_cached_prefixes_are_the_model(sets):
    "bench/cifar_protocols.py trains the last blocks on tokens computed once: the same answers as the whole classifier's."
    import importlib.util
    from pathlib import Path
    spec = importlib.util.spec_from_file_location('cifar_protocols', Path(__file__).resolve().parents[2]/'bench'/'cifar_protocols.py')
    study = importlib.util.module_from_spec(spec); spec.loader.exec_module(study)
    mae = create_mae('mae_vit_nano_patch4_28', in_chans=1, **MAE_TINY | dict(depth=study.DEPTH)).eval()
    model = classifier_from(mae, 10)[0].eval()
    x, mirrored = study.views(sets[1].take(range(20)), 'cpu')
    assert torch.equal(mirrored, x.flip(-1))
    cached = study.prefixes(mae.encoder, x, [0, 2, 5, 6], bs=7)
    with torch.no_grad():
        want = model(x)
        for start, tokens in cached.items(): assert (study.tail(model, start, tokens.float()) - want).abs().max() < .01 * want.abs().max(), start
