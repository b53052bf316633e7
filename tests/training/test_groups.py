"""Each protocol trains the parameters that the paper says, at its rate and decay; LARS and layer decay against timm."""
import pytest
import torch
from torch import nn

from mae_nb.model.classifier import create_classifier
from mae_nb.model.mae import create_mae
from mae_nb.tasks.finetune import freeze_below
from mae_nb.tasks.probes import AttentiveHead, FrozenProbe, LinearHead
from mae_nb.training.optim import finetune_groups, lars, param_groups, pretrain_groups
from mae_nb.training.presets import RECIPES

# ---- who is in which group: name, learning-rate scale, weight decay; '-' is frozen ----------------------------------

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
    "ViT-B and its parameter groups as the learners make them."
    r = RECIPES[protocol]
    with torch.device('meta'):
        mae = create_mae('mae_vit_base_patch16')
        if protocol == 'pretrain':
            return mae, pretrain_groups(mae, r.weight_decay)
        if protocol in ('linear', 'attentive'):
            head = LinearHead(768, 1000) if protocol == 'linear' else AttentiveHead(768, 1000, r.queries)
            probe = FrozenProbe(mae.encoder, head)
            return probe, param_groups(probe, r.weight_decay, lambda name, p: p.ndim <= 1)
        model = create_classifier('mae_vit_base_patch16', 1000, r.pool)
        if protocol == 'partial':
            freeze_below(model, 2)
        return model, finetune_groups(model, r.weight_decay, r.layer_decay)

@pytest.mark.parametrize('protocol', TABLES)
def test_vit_b_groups(protocol):
    model, groups = groups_of(protocol)
    actual = {name: (g['lr_scale'], g['weight_decay']) for g in groups for name in g['names']}
    rows = [line.split() for line in TABLES[protocol].strip().splitlines()]
    names = {name for name, _ in model.named_parameters()}
    assert len(rows) >= 20 and {row[0] for row in rows} <= names
    for name, scale, decay in rows:
        if scale == '-':
            assert name not in actual, name
        else:
            assert actual[name] == (pytest.approx(float(scale), rel=1e-8), float(decay)), name
    grouped = sorted(id(p) for g in groups for p in g['params'])
    assert grouped == sorted(id(p) for p in model.parameters() if p.requires_grad)   # each one once

# ---- other people's code --------------------------------------------------------------------------------------------

def trained_layer(make, gradients):
    "Weight and bias of a small layer after steps with these gradients."
    torch.manual_seed(0)
    layer = nn.Linear(6, 4)
    opt = make(layer)
    for pair in gradients:
        for p, g in zip(layer.parameters(), pair):
            p.grad = g.clone()
        opt.step()
    return layer.weight.detach(), layer.bias.detach()

def test_lars_against_timm_and_where_they_differ():
    from timm.optim import Lars
    gradients = [[torch.randn(4, 6), torch.randn(4)] for _ in range(20)]
    run = lambda make: trained_layer(make, gradients)
    ours = run(lambda m: lars(param_groups(m, 0., lambda n, p: False), 2.))
    adapting = run(lambda m: Lars(m.parameters(), lr=2., momentum=.9, always_adapt=True))
    asleep = run(lambda m: Lars(m.parameters(), lr=2., momentum=.9))
    sgd = run(lambda m: torch.optim.SGD(m.parameters(), lr=2., momentum=.9))
    assert torch.allclose(ours[0], adapting[0], atol=1e-6)       # the matrix: the same
    assert not torch.allclose(ours[1], adapting[1], atol=1e-3)   # timm adapts the bias too ...
    assert torch.allclose(ours[1], sgd[1], atol=1e-5)            # ... the official code does not
    assert torch.allclose(asleep[0], sgd[0], atol=1e-5)          # without always_adapt timm adapts nothing at decay 0

@pytest.mark.parametrize('pool', ['avg', 'cls'])
def test_layer_decay_against_timm_and_where_they_differ(pool):
    import timm
    from timm.optim import param_groups_layer_decay
    with torch.device('meta'):
        theirs = timm.create_model('vit_base_patch16_224', global_pool='avg' if pool == 'avg' else 'token')
        ours = create_classifier('mae_vit_base_patch16', 1000, pool)
    names = {id(p): n for n, p in theirs.named_parameters()}
    groups = param_groups_layer_decay(theirs, .05, theirs.no_weight_decay(), layer_decay=.75)
    want = {names[id(p)]: (g['lr_scale'], g['weight_decay']) for g in groups for p in g['params']}
    got = {n: (g['lr_scale'], g['weight_decay']) for g in finetune_groups(ours, .05, .75) for n in g['names']}
    assert want.keys() == got.keys()
    different = {n for n in want if got[n] != pytest.approx(want[n])}
    # timm scales the last norm by one step, the official code does not
    assert different == (set() if pool == 'avg' else {'norm.weight', 'norm.bias'})
    for n in different:
        assert (got[n][0], want[n][0]) == (1., pytest.approx(.75))
