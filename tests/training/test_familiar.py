"""fastai's Learner as its users know it: each public method and each callback works, or says in one line why not."""
import importlib
import inspect
import json
import pkgutil

import fastai.callback
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import CSVLogger
from fastai.callback.schedule import ParamScheduler, SchedLin
from fastai.callback.tensorboard import TensorBoardCallback
from fastai.callback.tracker import EarlyStoppingCallback
from fastai.callback.training import GradientClip, ShortEpochCallback
from fastai.interpret import ClassificationInterpretation
from fastai.learner import Learner
from fastai.metrics import F1Score, accuracy
from fastai.optimizer import Adam, OptimWrapper
from PIL import Image

from mae_nb.base.errors import UsageError
from mae_nb.data.datasets import load_source
from mae_nb.data.loader import get_dls
from mae_nb.model.classifier import create_classifier
from mae_nb.model.mae import create_mae
from mae_nb.tasks.finetune import finetune_learner, partial_learner
from mae_nb.tasks.pretrain import pretrain_learner
from mae_nb.tasks.probes import linear_probe_learner
from mae_nb.training.presets import RECIPES
from mae_nb.training.recipes import override
from mae_nb.training.runs import make_run

NANO, TINY = 'mae_vit_nano_patch4_28', dict(in_chans=1, dim=16, depth=2, num_heads=2)
SHORT = dict(epochs=1, warmup_epochs=0., batch_size=20)


@pytest.fixture(scope='module')
def sets():
    train, test = load_source('fashion')
    return train.shots(6), test.shots(3)


def pretraining(sets, **kwargs):
    recipe = override(RECIPES['pretrain_fashion'], SHORT)
    model = create_mae(NANO, target='pixels', decoder_dim=16, **TINY)
    return pretrain_learner(get_dls(sets, recipe, img_size=28), model, recipe, **kwargs)


def finetuning(sets, more=(), **kwargs):
    recipe = override(RECIPES['finetune_fashion'], SHORT | dict(layer_decay=.65) | dict(more))
    return finetune_learner(get_dls(sets, recipe, img_size=28), create_classifier(NANO, 10, **TINY), recipe, **kwargs)


MAKERS = {'pretrain': pretraining, 'finetune': finetuning}


@pytest.fixture(params=MAKERS, autouse=True)
def task(request):
    return request.param


@pytest.fixture
def learn(task, sets):
    torch.manual_seed(0)
    return MAKERS[task](sets)


def weights(learn):
    return [t.detach().clone() for t in learn.model.state_dict().values()]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ---- every method and every callback --------------------------------------------------------------------------------

CALLS = {   # what a user would type; a context is entered
    'add_cb': lambda learn, _: learn.add_cb(Callback()),
    'add_cbs': lambda learn, _: learn.add_cbs([Callback()]),
    'added_cbs': lambda learn, _: learn.added_cbs([Callback()]),
    'all_batches': None, 'one_batch': None,   # a fit calls them
    'create_opt': lambda learn, _: learn.create_opt(),
    'export': lambda learn, folder: learn.export(folder/'learner.pkl'),
    'fine_tune': lambda learn, _: learn.fine_tune(1),
    'fit': lambda learn, _: learn.fit(1),
    'fit_flat_cos': lambda learn, _: learn.fit_flat_cos(1, 1e-3),
    'fit_one_cycle': lambda learn, _: learn.fit_one_cycle(1, 1e-3),
    'fit_sgdr': lambda learn, _: learn.fit_sgdr(1, 1, 1e-3),
    'freeze': lambda learn, _: learn.freeze(),
    'freeze_to': lambda learn, _: learn.freeze_to(-2),
    'get_preds': lambda learn, _: learn.get_preds(),
    'load': lambda learn, folder: learn.load(learn.save(folder/'weights').with_suffix('')),
    'loss_not_reduced': lambda learn, _: learn.loss_not_reduced(),
    'lr_find': lambda learn, _: learn.lr_find(num_it=60),
    'no_bar': lambda learn, _: learn.no_bar(),
    'no_logging': lambda learn, _: learn.no_logging(),
    'no_mbar': lambda learn, _: learn.no_mbar(),
    'ordered_cbs': lambda learn, _: learn.ordered_cbs('after_batch'),
    'predict': lambda learn, _: learn.predict(learn.dls.valid.dataset.images.items[0]),
    'remove_cb': lambda learn, _: learn.remove_cb(learn.progress),
    'remove_cbs': lambda learn, _: learn.remove_cbs([learn.progress]),
    'removed_cbs': lambda learn, _: learn.removed_cbs([learn.progress]),
    'save': lambda learn, folder: learn.save(folder/'weights'),
    'show_results': lambda learn, _: learn.show_results(max_n=4),
    'show_training_loop': lambda learn, _: learn.show_training_loop(),
    'summary': lambda learn, _: learn.summary(),
    'to_bf16': lambda learn, _: learn.to_bf16(),
    'to_channelslast': lambda learn, _: learn.to_channelslast(),
    'to_contiguous': lambda learn, _: learn.to_contiguous(),
    'to_detach': lambda learn, _: learn.to_detach(torch.ones(2, requires_grad=True)),
    'to_fp16': lambda learn, _: learn.to_fp16(),
    'to_fp32': lambda learn, _: learn.to_fp32(),
    'to_non_native_fp16': lambda learn, _: learn.to_non_native_fp16(),
    'to_non_native_fp32': lambda learn, _: learn.to_non_native_fp32(),
    'tta': lambda learn, _: learn.tta(),
    'unfreeze': lambda learn, _: learn.unfreeze(),
    'validate': lambda learn, _: learn.validate(),
    'validation_context': None,   # of get_preds and validate
}
ONE_LINE = {
    'pretrain': {'export', 'predict', 'to_bf16', 'to_channelslast', 'to_fp16', 'to_non_native_fp16', 'tta'},
    'finetune': {'export', 'to_bf16', 'to_channelslast', 'to_fp16', 'to_non_native_fp16', 'tta'},
}
FIT_TOO = ('freeze', 'freeze_to', 'lr_find', 'get_preds', 'validate', 'summary', 'show_results', 'remove_cb', 'load')


def public_methods():
    import fastai.callback.all  # noqa: F401  they patch the Learner
    return {name for name in dir(Learner) if not name.startswith('_') and callable(getattr(Learner, name))}


def works_or_one_line(do):
    "True if it works; False if it answers with one line of ours; anything else is raised."
    try:
        result = do()
        if hasattr(result, '__enter__') and not isinstance(result, Learner):
            with result:
                pass
        return True
    except UsageError as e:
        assert '\n' not in str(e).strip() and len(str(e)) < 250, e
        return False


def test_each_method_of_the_learner(task, sets, tmp_path):
    assert public_methods() <= CALLS.keys(), 'a new fastai has more: add them here'
    answers = set()
    for name, call in CALLS.items():
        if call is None:
            continue
        learn = MAKERS[task](sets)
        if not works_or_one_line(lambda call=call, learn=learn: call(learn, tmp_path)):
            answers.add(name)
        if name in FIT_TOO:
            learn.fit(1, 1e-4)   # nothing is left behind that hinders a fit
    assert answers == ONE_LINE[task]


CALLBACKS = {   # how a user makes those that need arguments
    'ParamScheduler': lambda: ParamScheduler({'lr': SchedLin(1e-3, 1e-4)}),
    'TensorBoardCallback': lambda: TensorBoardCallback(trace_model=False, log_preds=False),
    'EarlyStoppingCallback': lambda: EarlyStoppingCallback(patience=1),
    'CSVLogger': lambda: CSVLogger('history.csv'),
    'ShortEpochCallback': lambda: ShortEpochCallback(.5, short_valid=False),
    'GradientClip': lambda: GradientClip(1.),
}
NOT_ADDED = {'HookCallback', 'TensorBoardBaseCallback', 'Callback', 'GatherPredsCallback'}   # bases and fastai's own
REFUSED = {'MixUp', 'CutMix', 'MixHandler', 'GradientAccumulation', 'MixedPrecision', 'ModelToHalf', 'ChannelsLast',
           'NonNativeMixedPrecision', 'ProgressCallback', 'Recorder', 'TrainEvalCallback', 'LRFinder', 'SkipToEpoch',
           'ReduceLROnPlateau', 'MCDropoutCallback', 'ModelResetter', 'RNNCallback', 'RNNRegularizer',
           'TensorBoardProjectorCallback'}


def exported_callbacks():
    "fastai's callbacks by name; modules that need another package are left out."
    found = {}
    for module in pkgutil.iter_modules(fastai.callback.__path__):
        try:
            names = vars(importlib.import_module(f'fastai.callback.{module.name}'))
        except ModuleNotFoundError:
            continue
        found |= {name: kind for name, kind in names.items() if inspect.isclass(kind) and issubclass(kind, Callback)}
    return {name: kind for name, kind in found.items() if name not in NOT_ADDED}


def test_each_callback_of_fastai(task, sets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused = set()
    for name, kind in exported_callbacks().items():
        def fit(name=name, kind=kind):
            cb = CALLBACKS[name]() if name in CALLBACKS else kind if name in REFUSED else kind()
            MAKERS[task](sets, cbs=[cb]).fit(2, 1e-3)
        if not works_or_one_line(fit):
            refused.add(name)
    assert refused == REFUSED
    assert len((tmp_path/'history.csv').read_text().splitlines()) == 3
    assert (tmp_path/'models'/'model.pth').is_file()      # SaveModelCallback's


# ---- each thing does what its name says -----------------------------------------------------------------------------

def test_a_trial_of_rates_leaves_no_trace(learn):
    before = weights(learn)
    suggested = learn.lr_find(num_it=60)
    assert 1e-7 < suggested.valley < 10 and same(before, weights(learn)) and learn.opt is None

    class Breaks(Callback):
        order = 61
        def after_batch(self):
            if self.train_iter == 5:
                raise ZeroDivisionError('somebody else')
    learn.add_cb(Breaks())
    with pytest.raises(ZeroDivisionError):
        learn.lr_find(num_it=60)
    assert same(before, weights(learn))


def test_freezing_freezes_layers(task, learn):
    learn.freeze()
    moved, before = set(), {name: p.detach().clone() for name, p in learn.model.named_parameters()}
    learn.fit(1, 1e-2)
    for name, p in learn.model.named_parameters():
        if not torch.equal(p, before[name]):
            moved.add(name.split('.')[0])
    assert moved == ({'decoder'} if task == 'pretrain' else {'fc_norm', 'head'})
    learn.unfreeze()
    learn.fit(1, 1e-2)
    blocks = [p for name, p in learn.model.named_parameters() if 'blocks.0.' in name and 'decoder' not in name]
    assert all(p.requires_grad for p in blocks)


class Rates(Callback):
    "The groups' rates over their scales, in each step."
    order = 70
    def before_fit(self): self.seen = []
    def before_step(self):
        groups = self.opt.opt.param_groups
        self.seen.append([(g['lr'] / g['lr_scale'], g['weight_decay']) for g in groups])


FITS = {'fit': lambda learn: learn.fit(1, 1e-3), 'one cycle': lambda learn: learn.fit_one_cycle(1, 1e-3),
        'flat cosine': lambda learn: learn.fit_flat_cos(1, 1e-3), 'sgdr': lambda learn: learn.fit_sgdr(1, 1, 1e-3),
        'fine tune': lambda learn: learn.fine_tune(1, 1e-3), 'recipe': lambda learn: learn.fit_recipe(),
        'one cycle with decay': lambda learn: learn.fit_one_cycle(1, 1e-3, wd=.3)}


@pytest.mark.parametrize('way', FITS)
def test_groups_keep_their_ratios_in_every_way_of_fitting(learn, way):
    learn.add_cb(rates := Rates())
    FITS[way](learn)
    assert rates.seen
    for step in rates.seen:
        base = [rate for rate, _ in step]
        assert max(base) - min(base) <= 1e-9 * max(base)
        assert {decay for _, decay in step} == {0., .3 if 'decay' in way else .05}


OPTIMIZERS = {name: getattr(torch.optim, name) for name in ('AdamW', 'Adam', 'SGD', 'Adagrad', 'Adafactor', 'NAdam')}
OPTIMIZERS['wrapped'] = lambda groups, lr: OptimWrapper(groups, torch.optim.AdamW, convert_groups=False, lr=lr)


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_any_optimizer_of_torch_trains_and_skips_a_bad_step(task, sets, name):
    class Spoil(Callback):
        "The first loss and the third are no numbers; the weights after each step."
        order = 5
        def before_fit(self): self.after = [weights(self.learn)]
        def after_loss(self):
            if self.training and self.train_iter in (0, 2):
                self.learn.loss_grad = self.loss_grad * float('nan')
        def after_step(self): self.after.append(weights(self.learn))
    learn = MAKERS[task](sets, opt_func=OPTIMIZERS[name], cbs=[spoil := Spoil()])
    learn.fit(2, 1e-2)
    moved = [not same(a, b) for a, b in zip(spoil.after, spoil.after[1:])]
    assert moved == [False, True, False, True, True, True]
    assert all(t.isfinite().all() for t in weights(learn)) and learn.guard.skipped == 2


def test_fastai_s_own_optimizer_is_refused_at_once(task, sets):
    with pytest.raises(UsageError, match="Adam is fastai's own"):
        MAKERS[task](sets, opt_func=Adam)


# ---- a DataBlock, or a data set of PyTorch --------------------------------------------------------------------------

class Shots(torch.utils.data.Dataset):
    "Arrays and labels, as a data set of PyTorch."
    def __init__(self, images): self.images, self.targets, self.classes = images, images.labels, images.classes
    def __len__(self): return len(self.images)
    def __getitem__(self, i): return self.images.items[i], self.targets[i]


def of_a_data_block(sets, folder):
    from fastai.data.block import CategoryBlock, DataBlock
    from fastai.data.transforms import GrandparentSplitter, Normalize, get_image_files, parent_label
    from fastai.vision.augment import Resize
    from fastai.vision.core import PILImageBW
    from fastai.vision.data import ImageBlock
    for part, images in zip(('train', 'valid'), sets):
        for i, (pixels, label) in enumerate(zip(images.items, images.labels)):
            (folder/part/f'{label}').mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[..., 0]).save(folder/part/f'{label}'/f'{i}.png')
    normalize = Normalize.from_stats([.3], [.35], cuda=False)
    block = DataBlock((ImageBlock(PILImageBW), CategoryBlock), get_items=get_image_files, get_y=parent_label,
                      splitter=GrandparentSplitter(), item_tfms=Resize(28), batch_tfms=normalize)
    return block.dataloaders(folder, bs=20, num_workers=0)


def of_data_sets(sets, folder): return tuple(map(Shots, sets))


@pytest.fixture(params=[of_a_data_block, of_data_sets])
def given(request, task, sets, tmp_path, capsys):
    "A learner of somebody else's data; the note about it is one line."
    dls = request.param(sets, tmp_path/'data')
    recipe = override(RECIPES[f'{task}_fashion'], SHORT)
    if task == 'pretrain':
        model, make = create_mae(NANO, target='pixels', decoder_dim=16, **TINY), pretrain_learner
    else:
        model, make = create_classifier(NANO, 10, **TINY), finetune_learner
    learn = make(dls, model, recipe, seed=3, out=make_run(tmp_path/'run', {}))
    note, = capsys.readouterr().out.splitlines()
    assert note.startswith('note: ') and 'a resumed run gets other pixels' in note
    assert ('batch transforms are left out' in note) == (request.param is of_a_data_block)
    assert learn.dls.seed == 3 and learn.data_config['mean'] == ((.3,) if request.param is of_a_data_block else
                                                                 pytest.approx((.449,), abs=1e-3))
    return learn


def test_a_learner_of_somebody_else_s_data_is_like_any_other(given, task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answers = set()
    for name in ('lr_find', 'summary', 'show_results', 'get_preds', 'export', 'predict', 'fine_tune', 'validate'):
        call = CALLS[name]
        if name == 'predict':   # an item of the data set, which is no file
            call = lambda learn, _: learn.predict(learn.dls.valid.dataset.images.read(0))
        if not works_or_one_line(lambda call=call: call(given, tmp_path)):
            answers.add(name)
    assert answers == {'pretrain': {'export', 'predict'}, 'finetune': {'export'}}[task]
    assert len(given.dls.show_batch(max_n=4).axes) == 4
    assert (tmp_path/'run'/'model.safetensors').is_file()


def test_callbacks_of_fastai_on_somebody_else_s_data(given, tmp_path, monkeypatch):
    from fastai.callback.tracker import SaveModelCallback
    monkeypatch.chdir(tmp_path)
    given.fit_one_cycle(2, 1e-3, cbs=[SaveModelCallback(), EarlyStoppingCallback(patience=3), CSVLogger('h.csv')])
    assert len((tmp_path/'run'/'h.csv').read_text().splitlines()) == 3


def test_the_same_pictures_train_the_same_model(task, sets):
    "However the data come: an array of ours, or a data set of PyTorch."
    if task != 'finetune':
        pytest.skip('one task is enough')
    train, valid = sets
    learners = []
    for make in (lambda recipe: get_dls(sets, recipe, img_size=28), lambda recipe: (Shots(train), Shots(valid))):
        torch.manual_seed(0)
        recipe = override(RECIPES['finetune_fashion'], SHORT)
        learn = finetune_learner(make(recipe), create_classifier(NANO, 10, **TINY), recipe)
        for loader in learn.dls.loaders:   # only our own set knows its mean
            loader.dataset.images.mean, loader.dataset.images.std = train.mean, train.std
        learn.standardize.mean, learn.standardize.std = torch.tensor(train.mean), torch.tensor(train.std)
        learn.fit(1, 1e-3)
        learners.append(learn)
    assert same(*map(weights, learners))


def test_what_is_no_data_is_refused_in_one_line(task, photos):
    from fastai.vision.augment import Resize
    from fastai.vision.data import ImageDataLoaders
    recipe = RECIPES[f'{task}_fashion']
    dls = ImageDataLoaders.from_folder(photos, valid_pct=.2, item_tfms=Resize(28), bs=4, num_workers=0)
    model = create_mae(NANO, target='pixels', decoder_dim=16, **TINY) if task == 'pretrain' else create_classifier(
        NANO, 10, **TINY)
    make = pretrain_learner if task == 'pretrain' else finetune_learner
    for wrong, text in ((dls, 'has images of 3 channels and the model takes 1'), ([1], 'got list'),
                        (torch.utils.data.DataLoader([1]), 'got DataLoader')):
        with pytest.raises(UsageError, match=text):
            make(wrong, model, recipe)


def test_batches_can_be_looked_at(learn):
    imgs, index, labels = learn.dls.one_batch()
    assert imgs.shape == (20, 1, 28, 28) and len(index) == len(labels) == 20
    assert len(learn.dls.show_batch(max_n=5).axes) == 5
    assert len(learn.show_results(max_n=3).axes) >= 3
    assert list(learn.dls.vocab) == learn.dls.train.dataset.images.classes


# ---- with labels ----------------------------------------------------------------------------------------------------

@pytest.fixture
def labelled(task, sets):
    if task != 'finetune':
        pytest.skip('of learners with labels')
    return finetuning(sets, metrics=[accuracy, F1Score(average='macro')])


def test_metrics_of_fastai(labelled):
    labelled.fit(1, 1e-3)
    names = list(labelled.recorder.metric_names)
    assert names == ['epoch', 'train_loss', 'valid_loss', 'top1', 'top5', 'accuracy', 'f1_score']
    values = dict(zip(names[1:], labelled.final_record))
    assert values['accuracy'] == pytest.approx(values['top1'], abs=1e-6)


def test_predictions_agree_everywhere(labelled):
    labelled.fit(1, 1e-2)
    images = labelled.dls.valid.dataset.images
    inputs, preds, labels, classes, losses = labelled.get_preds(with_input=True, with_decoded=True, with_loss=True)
    assert inputs.shape == (30, 1, 28, 28) and labels.tolist() == images.labels.tolist()
    assert preds.sum(1).allclose(torch.ones(30)) and torch.equal(classes, preds.argmax(1))
    assert losses.mean().item() == pytest.approx(labelled.final_record[1], abs=1e-5)
    for i in (0, 17):
        name, number, probabilities = labelled.predict(images.items[i])
        assert name == images.classes[number] and torch.allclose(probabilities, preds[i], atol=1e-5)
    report = ClassificationInterpretation.from_learner(labelled)
    matrix = report.confusion_matrix()
    assert matrix.sum() == 30 and np.trace(matrix) / 30 == pytest.approx(labelled.final_record[2])
    report.plot_confusion_matrix()
    assert len(report.top_losses(3)[0]) == 3
    with pytest.raises(UsageError):
        labelled.predict(np.zeros((28, 28, 3), np.uint8))


def test_an_average_predicts_as_it_is_validated(task, sets):
    if task != 'finetune':
        pytest.skip('of learners with labels')
    learn = finetuning(sets, dict(ema=.5))
    learn.fit(2, 1e-2)
    preds, labels = learn.get_preds()
    assert (preds.argmax(1) == labels).double().mean().item() == pytest.approx(learn.final_record[2])
    item = learn.dls.valid.dataset.images.items[3]
    assert torch.allclose(learn.predict(item)[2], preds[3], atol=1e-5)


@pytest.mark.parametrize('make', ['probe', 'partial'])
def test_freezing_a_probe_leaves_its_encoder_alone(task, sets, make):
    if task != 'finetune':
        pytest.skip('of learners with labels')
    if make == 'probe':
        recipe = override(RECIPES['linear_fashion'], SHORT)
        model = create_mae(NANO, target='pixels', decoder_dim=16, **TINY)
        learn = linear_probe_learner(get_dls(sets, recipe, img_size=28), model, recipe)
    else:
        recipe = override(RECIPES['partial_fashion'], SHORT)
        learn = partial_learner(get_dls(sets, recipe, img_size=28), create_classifier(NANO, 10, **TINY), recipe, 1)
    before = {name for name, p in learn.model.named_parameters() if p.requires_grad}
    learn.fine_tune(1)
    assert {name for name, p in learn.model.named_parameters() if p.requires_grad} == before


# ---- in a run folder ------------------------------------------------------------------------------------------------

def test_a_run_folder_is_left_alone_by_what_is_beside_the_run(task, sets, tmp_path):
    def content():
        return {f: f.read_bytes() for f in (tmp_path/'run').rglob('*') if f.is_file() and 'events' not in f.name}

    learn = MAKERS[task](sets, out=make_run(tmp_path/'run', {}))
    for fits in range(2):   # before the first fit, and after one
        before = content()
        learn.lr_find(num_it=60)
        learn.get_preds()
        learn.validate()
        learn.summary()
        assert content() == before
        if not fits:
            learn.fit(1, 1e-3)


def test_fine_tune_in_a_run_folder(task, sets, tmp_path):
    learn = MAKERS[task](sets, out=make_run(tmp_path/'run', {}))
    learn.fine_tune(1)
    assert len((tmp_path/'run'/'metrics.csv').read_text().splitlines()) == 3
    again = MAKERS[task](sets, out=make_run(tmp_path/'run', {}, resume=True))
    again.fine_tune(1)
    assert same(weights(learn), weights(again))


def test_stars_of_both_do_not_clash():
    "What both packages export under one name is known, and is the same idea."
    import fastai.vision.all as theirs

    import mae_nb.all as ours
    clash = {name for name in ours.__all__ if name in getattr(theirs, '__all__', dir(theirs))}
    assert clash <= {'save_model'}, json.dumps(sorted(clash))
