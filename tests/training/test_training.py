"""Each protocol trains at the rate that the paper says, measures exactly, and leaves the rest alone."""
import copy
import importlib.util
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from PIL import Image
from support import ROOT
from torch import nn

from mae_nb.data.datasets import load_source
from mae_nb.data.images import standardize
from mae_nb.data.loader import get_dls
from mae_nb.model.classifier import create_classifier
from mae_nb.model.mae import create_mae
from mae_nb.tasks.finetune import finetune_learner, freeze_below, partial_learner
from mae_nb.tasks.pretrain import pretrain_learner
from mae_nb.tasks.probes import attentive_probe_learner, linear_probe_learner
from mae_nb.training.optim import finetune_groups
from mae_nb.training.presets import RECIPES
from mae_nb.training.recipes import AttentiveRecipe, LinearRecipe, PartialRecipe, ScratchRecipe, override
from mae_nb.training.runs import make_run
from mae_nb.weights.building import classifier_from

# ---- the schedule, step by step -------------------------------------------------------------------------------------

NANO, TINY = 'mae_vit_nano_patch4_28', dict(dim=16, depth=3, num_heads=2)
MAE_TINY = TINY | dict(decoder_dim=16)
PLAIN = dict(randaugment='', mixup=0., cutmix=0., erase=0., amp=False)

@pytest.fixture(scope='module')
def sets():
    train, test = load_source('fashion')
    return train.shots(20), test.shots(11).take(range(101))    # 101: batches of 50 leave one sample over

def tiny_mae():
    torch.manual_seed(0)
    return create_mae(NANO, in_chans=1, target='pixels', **MAE_TINY)

def tiny_classifier(**kwargs):
    torch.manual_seed(0)
    return create_classifier(NANO, 10, in_chans=1, **TINY, **kwargs)

def flat(model): return torch.cat([p.detach().double().flatten() for p in model.parameters() if p.requires_grad])

class Spy(Callback):
    "Notes the rates of each optimizer step, and the weights after it."
    order, run_valid = 90, False
    def before_fit(self): self.rates, self.weights = [], [flat(self.model)]
    def before_step(self): self.rates.append([(g['lr'], g['lr_scale']) for g in self.opt.opt.param_groups])
    def after_step(self): self.weights.append(flat(self.model))

@pytest.mark.parametrize('accumulate', [1, 3])
def test_the_schedule_at_each_step(sets, accumulate):
    r = override(RECIPES['finetune'], dict(PLAIN, epochs=5, warmup_epochs=2, batch_size=30, accumulate=accumulate,
                                           drop_path=0.))
    dls = get_dls((sets[0], None), r, img_size=28, bs=30 // accumulate)
    finetune_learner(dls, tiny_classifier(), r, cbs=[spy := Spy()]).fit_recipe()
    per_epoch = -(-(200 // (30 // accumulate)) // accumulate)
    assert len(spy.rates) == 5 * per_epoch
    peak = 1e-3 * 30 / 256
    for step, groups in enumerate(spy.rates):
        epoch = step / per_epoch                # fractional, as in the official lr_sched.py
        cosine = .5 * (1 + math.cos(math.pi * (epoch - 2) / 3))
        want = peak * epoch / 2 if epoch < 2 else 1e-6 + (peak - 1e-6) * cosine
        for lr, scale in groups:
            assert lr == pytest.approx(want * scale, rel=1e-12, abs=1e-18)
    assert len({scale for _, scale in spy.rates[0]}) == 5    # embedding, three blocks, head

# ---- accumulation, clipping, average --------------------------------------------------------------------------------

class Double(Callback):
    "Images in double precision."
    order = -5
    def before_batch(self): self.learn.xb = (self.xb[0].double(), *self.xb[1:])

@pytest.mark.parametrize('clip', [0., .05])
def test_accumulation_equals_the_big_batch(sets, clip):
    """20 steps of 40 images, each epoch's last of 20: as one batch, and as batches of 10;
    masks and crops belong to the samples."""
    r = override(RECIPES['pretrain'], dict(epochs=4, warmup_epochs=1, batch_size=40, base_lr=1e-2, target='pixels',
                                           amp=False, clip=clip))
    def run(bs, accumulate):
        recipe = override(r, dict(accumulate=accumulate))
        dls = get_dls((sets[0].take(range(180)), None), recipe, img_size=28, bs=bs)
        dls.train.batches.drop_last = False
        pretrain_learner(dls, tiny_mae().double(), recipe, cbs=[Double(), spy := Spy()]).fit_recipe()
        return spy
    big, small = run(40, 1), run(10, 4)
    assert len(big.rates) == len(small.rates) == 20
    assert big.rates == small.rates
    for a, b in zip(big.weights, small.weights, strict=True):
        assert (a - b).abs().max() < 1e-9
    assert (big.weights[0] - big.weights[-1]).abs().max() > 1e-3

def test_a_batch_that_does_not_fit_accumulation_is_an_error(sets):
    r = override(RECIPES['finetune_fashion'], dict(batch_size=50, accumulate=4))
    message = '50 images a batch x 1 processes x 4 accumulated are 200 a step, the recipe says batch_size=50'
    with pytest.raises(ValueError, match=message):
        finetune_learner(get_dls(sets, r, img_size=28, bs=50), tiny_classifier(), r)

def test_the_average_is_its_closed_form_and_is_what_is_evaluated(sets, tmp_path):
    r = override(ScratchRecipe(), dict(PLAIN, epochs=4, warmup_epochs=1, batch_size=50, base_lr=1e-2, drop_path=0.,
                                       ema=.8))
    dls, out = get_dls(sets, r, img_size=28), make_run(tmp_path/'run', {})
    learn = finetune_learner(dls, tiny_classifier(), r, out=out, cbs=[spy := Spy()])
    learn.fit_recipe()
    weights, t = torch.stack(spy.weights), 16
    closed = .8**t * weights[0] + .2 * sum(.8**(t - i) * weights[i] for i in range(1, t + 1))
    average = learn.weight_ema.average.module
    assert (torch.cat([p.detach().double().flatten() for p in average.parameters()]) - closed).abs().max() < 1e-6
    x, y = whole(sets[1])
    with torch.no_grad():
        accuracy = (average.eval()(x).argmax(1) == y).double().mean().item()
    assert learn.final_record[2] == pytest.approx(accuracy, abs=1e-12)
    assert learn.validate()[1] == pytest.approx(accuracy, abs=1e-12)

def test_an_average_that_is_too_slow_for_the_run_is_noted(sets, capsys):
    r = override(ScratchRecipe(), dict(PLAIN, epochs=1, warmup_epochs=0, batch_size=50, drop_path=0., ema=.9999))
    finetune_learner(get_dls(sets, r, img_size=28), tiny_classifier(), r).fit_recipe()
    assert 'the first weights are still in it' in capsys.readouterr().out

# ---- evaluation, mixing, frozen parameters --------------------------------------------------------------------------

def whole(images):
    "All images of a set, standardised, and their labels."
    imgs = torch.stack([images.read(i) for i in range(len(images))])
    return standardize(imgs, images.mean, images.std), torch.from_numpy(images.labels)

def test_evaluation_is_exact_with_a_single_sample_left_over(sets):
    r = override(RECIPES['finetune_fashion'], dict(epochs=2, warmup_epochs=0))
    learn = finetune_learner(get_dls(sets, r, img_size=28), tiny_classifier(), r)
    assert [len(b[0]) for b in learn.dls.valid] == [50, 50, 1]
    learn.fit_recipe()
    x, y = whole(sets[1])
    with torch.no_grad():
        logits = learn.model.eval()(x)
    top1 = logits.argmax(1) == y
    top5 = (logits.topk(5).indices == y[:, None]).any(1)
    want = nn.functional.cross_entropy(logits, y), top1.double().mean(), top5.double().mean()
    assert list(learn.validate()) == pytest.approx([v.item() for v in want], rel=1e-6)

class Targets(Callback):
    "Collects the targets that the loss sees."
    order, run_valid = 50, False
    def before_fit(self): self.seen = []
    def before_batch(self): self.seen.append(self.yb[1])

def test_mixed_targets_sum_to_one_and_depend_on_seed_and_step(sets):
    r = override(RECIPES['finetune_fashion'], dict(epochs=3, warmup_epochs=1, mixup=.8, cutmix=1., label_smoothing=.1))
    def run(seed):
        dls = get_dls((sets[0], None), r, img_size=28, seed=seed)
        learn = finetune_learner(dls, tiny_classifier(), r, cbs=[targets := Targets()])
        np.random.seed(seed)      # whatever the global generators say
        learn.fit_recipe()
        return torch.stack(targets.seen)
    a, b, c = run(0), run(0), run(1)
    assert a.shape == (12, 50, 10) and torch.allclose(a.sum(-1), torch.ones(12, 50), atol=1e-5)
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert a.amax(-1).min() < .85 and (a > 0).all()    # mixed, and smooth

def test_another_seed_than_the_loaders_is_an_error(sets):
    r = RECIPES['finetune_fashion']
    with pytest.raises(ValueError, match='made with seed=0, the learner with seed=1'):
        finetune_learner(get_dls(sets, r, img_size=28), tiny_classifier(), r, seed=1)

TOPS = {0: (), .5: ('blocks.2.mlp.',), 1: ('blocks.2.',), 2: ('blocks.1.', 'blocks.2.')}

@pytest.mark.parametrize('blocks', TOPS)
def test_frozen_is_bit_identical_and_costs_nothing(sets, blocks):
    r = override(PartialRecipe(), dict(PLAIN, mixup=.8, cutmix=1., epochs=2, warmup_epochs=1, batch_size=50,
                                       base_lr=1e-2, drop_path=.3))
    model, _ = classifier_from(tiny_mae(), 10, 'avg', .3)
    before = copy.deepcopy(model.state_dict())
    learn = partial_learner(get_dls((sets[0], None), r, img_size=28), model, r, blocks=blocks)
    learn.fit_recipe()
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {k for k in before if k.startswith((*TOPS[blocks], 'fc_norm.', 'head.'))}
    parameters = dict(model.named_parameters())
    assert {id(p) for p in learn.opt.opt.state} == {id(p) for n, p in parameters.items() if n in moved}
    assert all(p.grad is None for n, p in parameters.items() if n not in moved)
    below = model.blocks[2 - int(blocks)] if blocks < 1 else model.blocks[3 - int(blocks)]
    reached = []
    below.register_forward_pre_hook(lambda m, args: reached.append(args[0].requires_grad))
    model(torch.zeros(2, 1, 28, 28))
    assert reached == [False]    # nothing below keeps an activation

@pytest.mark.parametrize('learner, recipe', [
    (linear_probe_learner, LinearRecipe()),
    (attentive_probe_learner, AttentiveRecipe(queries=4)),
])
def test_probes_leave_the_encoder_alone(sets, learner, recipe):
    r = override(recipe, dict(epochs=2, warmup_epochs=1, batch_size=50, base_lr=1., amp=False))
    mae = tiny_mae()
    before = copy.deepcopy(mae.state_dict())
    learn = learner(get_dls(sets, r, img_size=28), mae, r)
    learn.fit_recipe()
    assert all(torch.equal(v, before[k]) for k, v in mae.state_dict().items())
    assert all(p.requires_grad for p in mae.encoder.blocks.parameters())
    assert all(torch.equal(v, before[f'encoder.{k}']) for k, v in learn.model.encoder.state_dict().items())
    assert not learn.model.head.norm.affine and learn.model.head.norm.eps == 1e-6

# ---- the same with workers, and what cannot work --------------------------------------------------------------------

def test_the_whole_recipe_is_a_function_of_the_seed(sets):
    "RandAugment, erasing, mixup, drop path: two workers or none, the same losses."
    r = override(RECIPES['finetune'], dict(epochs=2, warmup_epochs=1, batch_size=50, drop_path=.2, amp=False))
    def run(workers):
        dls = get_dls(sets, r, img_size=28, num_workers=workers)
        learn = finetune_learner(dls, tiny_classifier(drop_path=.2), r)
        torch.manual_seed(workers)
        learn.fit_recipe()
        return learn.recorder.losses, learn.final_record
    assert run(0) == run(2)

def folders(root, train, valid=()):
    "Pictures of random pixels, four a class."
    places = [root/part/name for part, names in (('train', train), ('val', valid)) for name in names]
    for place in places:
        place.mkdir(parents=True)
        for i in range(4):
            pixels = np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place/f'{i}.png')
    return root

def test_what_cannot_work_is_an_error(sets, tmp_path):
    r = override(RECIPES['finetune_fashion'], dict(batch_size=4))
    nano = lambda n: create_classifier('mae_vit_nano_patch4_32', n, **TINY)
    error = lambda message: pytest.raises(ValueError, match=message)
    one = get_dls(folders(tmp_path/'one', ['cat']), r, img_size=32, num_workers=0)
    with error("has one class only, 'cat'"):
        finetune_learner(one, nano(1), r)
    with error('holds classes that the training set lacks: owl'):
        get_dls(folders(tmp_path/'more', ['cat', 'dog'], ['dog', 'owl']), r, img_size=32)
    two = get_dls(folders(tmp_path/'two', ['cat', 'dog'], ['dog']), r, img_size=32, num_workers=0)
    finetune_learner(two, nano(2), r)                       # a class that validation lacks is no fault
    with error('has 2 classes, the head only 1'):
        finetune_learner(two, nano(1), r)
    unlabelled = get_dls((sets[0], replace(sets[1], labels=None)), r, img_size=28)
    with error('has no labels'):
        finetune_learner(unlabelled, tiny_classifier(), r)
    with error('batch of 300 is larger than fashion with 200 images: use .*bs[= ]200 or less'):
        get_dls(sets, r, img_size=28, bs=300)
    frozen = tiny_classifier()
    freeze_below(frozen, 0)
    with error('layer_decay=0.75 matches no parameter'):
        finetune_groups(frozen, .05, .75)

def test_an_epoch_whose_leftover_is_a_single_batch_of_one(sets):
    r = override(RECIPES['finetune_fashion'], dict(epochs=2, warmup_epochs=0, batch_size=5, accumulate=5))
    dls = get_dls((sets[0].take(range(11)), None), r, img_size=28, bs=1)
    learn = finetune_learner(dls, tiny_classifier(), r, cbs=[spy := Spy()])
    learn.fit_recipe()
    assert len(spy.rates) == 2 * 3 and all(math.isfinite(x) for x in learn.recorder.losses)

# ---- commands -------------------------------------------------------------------------------------------------------

PROBES = ('linear', ()), ('attentive', ('--set', 'queries=8')), ('partial', ('--blocks', '0.5'))
REFUSED = [
    (('mae-finetune', 'pets'), 'name either the weights to start from or --from-scratch'),
    (('mae-probe', 'liner', 'pets', 'scratch'), "did you mean 'linear'"),
    (('mae-probe', 'partial', 'pets', 'scratch', '--blocks', '7', '--bs', '4'),
     "blocks must be 0, 0.5, a whole number up to 3, or 'all', got 7"),
    (('mae-probe', 'linear', 'pets', 'nowhere.safetensors'), 'nowhere.safetensors'),
    (('mae-finetune', 'pets', 'scratch', '--bs', '3'), 'use an even --bs'),
    (('mae-finetune', 'pets', 'scratch', '--bs', '40'), 'use --bs 8 or less'),
]

def test_commands(forked, tmp_path):
    folders(tmp_path/'pets', ['cat', 'dog'], ['cat', 'dog'])
    quick = '--bs', '4', '--num-workers', '0', '--max-steps', '2', '--set', 'amp=False'
    scratch = '--from-scratch', '--model', 'mae_vit_nano_patch4_32', '--out', 'scratch'
    got = forked('mae-finetune', 'pets', *scratch, *quick)
    assert got.code == 0 and (tmp_path/'scratch'/'classes.csv').is_file(), got.err
    for kind, flags in PROBES:
        got = forked('mae-probe', kind, 'pets', 'scratch', *quick, *flags, '--out', kind, '--json', f'{kind}.json')
        assert got.code == 0 and (tmp_path/f'{kind}.json').is_file(), got.err
        assert (tmp_path/kind/'figures'/'confusion.png').is_file()
    got = forked('mae-probe', 'knn', 'pets', 'scratch', '--num-workers', '0', '--out', 'knn')
    assert got.code == 0 and 'top1' in got.out, got.err
    for words, message in REFUSED:
        got = forked(*words, '--out', 'never')
        assert got.code == 2 and message in got.line and not (tmp_path/'never').exists(), got

# ---- the study's shortcut -------------------------------------------------------------------------------------------

def test_the_study_s_cached_prefixes_are_the_model(sets):
    """bench/cifar_protocols.py trains the last blocks on tokens that are computed once:
    the same answers as the whole classifier's."""
    spec = importlib.util.spec_from_file_location('cifar_protocols', ROOT/'bench'/'cifar_protocols.py')
    study = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(study)
    mae = create_mae(NANO, in_chans=1, **MAE_TINY | dict(depth=study.DEPTH)).eval()
    model = classifier_from(mae, 10)[0].eval()
    x, mirrored = study.views(sets[1].take(range(20)), 'cpu')
    assert torch.equal(mirrored, x.flip(-1))
    cached = study.prefixes(mae.encoder, x, [0, 2, 5, 6], bs=7)
    normed = cached.pop('norm')   # behind the encoder's norm, for the probes
    assert torch.equal(normed, mae.encoder.norm(cached[study.DEPTH].float()).half())
    with torch.no_grad():
        want = model(x)
        for start, tokens in cached.items():
            difference = study.tail(model, start, tokens.float()) - want
            assert difference.abs().max() < .01 * want.abs().max(), start
