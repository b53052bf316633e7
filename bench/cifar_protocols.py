"""All protocols on CIFAR-10 with a small model: one pretraining, three evaluation seeds, frozen prefixes computed once.

    python bench/cifar_protocols.py --minutes 90 --out runs/protocols

Writes `results.json` and `figure9.png`. Epochs are chosen to fill the time, from speeds measured first, and are
recorded with the results: compare rows of one run with each other, not runs of different machines. Our CIFAR-10 is
JPEG with halved chroma: results of others, from the original pixels, are not for the same task.
"""
import argparse
import contextlib
import io
import json
import platform
import time
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.nn import functional as F

from mae_nb.base.keyed import generator, key, seeded
from mae_nb.data.datasets import load_source
from mae_nb.data.images import standardize
from mae_nb.data.loader import get_dls
from mae_nb.model.classifier import create_classifier
from mae_nb.model.mae import create_mae
from mae_nb.model.patches import patchify
from mae_nb.tasks.features import knn_votes
from mae_nb.tasks.finetune import finetune_learner, freeze_below
from mae_nb.tasks.paper import PAPER
from mae_nb.tasks.pretrain import pretrain_learner
from mae_nb.tasks.probes import AttentiveHead, LinearHead
from mae_nb.training.optim import adamw, finetune_groups, lars, param_groups, warmup_cosine
from mae_nb.training.presets import RECIPES
from mae_nb.training.recipes import as_config, override
from mae_nb.training.runs import make_run
from mae_nb.weights.building import classifier_from

DEPTH, BATCH, RATES = 6, 50, (.3, 1., 3.)   # blocks; labelled images a step; factors on a recipe's rate to choose from
NOTE = 'flips only; frozen prefixes computed once, in half precision; partial all = full fine-tuning'
LAST_BLOCKS = {0: 0, .5: .5, 1: 1, 2: 2, 4: 4}   # partial fine-tuning: row -> blocks that learn

def quiet():
    "Swallow what a run prints."
    return contextlib.redirect_stdout(io.StringIO())

# ---- one look at the images, and the tokens behind a frozen prefix -------------------------------------------------

def views(images, device):
    "All images and their mirror images, standardised."
    x = torch.stack([images.read(i) for i in range(len(images))]).to(device)
    x = standardize(x, images.mean, images.std)
    return x, x.flip(-1)

@torch.no_grad()
def prefixes(encoder, imgs, stops, bs=500):
    "Tokens after so many blocks, for each of `stops`, and behind the norm; float16."
    tokens = {stop: [] for stop in stops}
    for part in imgs.split(bs):
        x = encoder.patch_embed(patchify(part, encoder.patch_size)) + encoder.pos_embed[:, 1:]
        cls_token = encoder.cls_token + encoder.pos_embed[:, :1]
        x = torch.cat([cls_token.expand(len(x), -1, -1), x], dim=1)
        for i in range(DEPTH + 1):
            if i in tokens:
                tokens[i].append(x.half())
            if i < DEPTH:
                x = encoder.blocks[i](x)
    tokens = {stop: torch.cat(parts) for stop, parts in tokens.items()}
    tokens['norm'] = torch.cat([encoder.norm(x.float()) for x in tokens[DEPTH].split(500)]).half()
    return tokens

def tail(model, start, x):
    "The rest of a classifier, from block `start` on."
    for block in model.blocks[start:]:
        x = block(x)
    return model.head(model.fc_norm(model.norm(x)[:, 1:].mean(dim=1)))

# ---- training on tokens that are computed already --------------------------------------------------------------------

def fit(module, forward, opt, peak, min_lr, train, labels, test, test_labels, epochs, bs, seed, smoothing=0.):
    "Train on cached tokens, each epoch one of two views of each image; top-1 on the test set at the end."
    per_epoch = len(labels) // bs
    total, warmup = epochs * per_epoch, epochs * per_epoch // 10
    module.train()
    for step in range(total):
        epoch, i = divmod(step, per_epoch)
        if i == 0:
            order = torch.randperm(len(labels), generator=generator(key(seed, epoch, 0, 'order')))
            mirrored = torch.rand(len(labels), generator=generator(key(seed, epoch, 0, 'flip'))) < .5
        ids = order[i * bs:(i + 1) * bs]
        chosen = mirrored[ids].view(-1, 1, 1).to(train[0].device)
        x = torch.where(chosen, train[1][ids], train[0][ids]).float()
        rate = warmup_cosine(step, total, warmup, peak, min_lr)
        for group in opt.opt.param_groups:
            group['lr'] = rate * group['lr_scale']
        F.cross_entropy(forward(x), labels[ids], label_smoothing=smoothing).backward()
        opt.step()
        opt.zero_grad()
    module.eval()
    with torch.no_grad():
        right = [(forward(x.float()).argmax(dim=1) == y).sum() for x, y in zip(test.split(500), test_labels.split(500))]
    return torch.stack(right).sum().item() / len(test_labels)

class Protocols:
    "The rows of the study, on one pretrained encoder: each trains for some epochs and gives a top-1."
    def __init__(self, a, mae, few, test, recipes):
        self.a, self.mae, self.recipes = a, mae, recipes
        self.images, self.device = dict(few=few, test=test), torch.device(a.device)
        self.classes = len(few.classes)
        self.labels = {k: torch.as_tensor(s.labels, device=self.device) for k, s in self.images.items()}
        stops = sorted({DEPTH - int(np.ceil(k)) for k in LAST_BLOCKS.values()} | {DEPTH})
        self.tokens = dict(few=[prefixes(mae.encoder, view, stops) for view in views(few, self.device)],
                           test=[prefixes(mae.encoder, views(test, self.device)[0], stops)])

    def part(self, which, at):
        "Cached tokens of some images, in each of their views, and their labels."
        name, ids = which
        return [view[at][ids] for view in self.tokens[name]], self.labels[name][ids]

    def cached(self, at, module, forward, opt, rate, min_lr, seed, train, test, epochs, smoothing=0.):
        "Train a module on tokens behind the prefix `at`."
        x, y = self.part(train, at)
        test_x, test_y = self.part(test, at)
        return fit(module, forward, opt, rate, min_lr, x, y, test_x[0], test_y, epochs, BATCH, seed, smoothing)

    def head(self, make, recipe, rate, seed, train, test, epochs):
        "A head on the frozen encoder's tokens."
        module = seeded(seed, make).to(self.device)
        groups = param_groups(module, recipe.weight_decay, lambda name, p: p.ndim <= 1)
        opt = lars(groups, rate, recipe.momentum) if recipe.task == 'linear' else adamw(groups, rate, recipe.betas)
        return self.cached('norm', module, module, opt, rate, recipe.min_lr, seed, train, test, epochs)

    def last_blocks(self, k, rate, seed, train, test, epochs):
        "The last blocks, on the tokens that the frozen ones give."
        recipe, start = self.recipes['finetune'], DEPTH - int(np.ceil(k))
        model = seeded(seed, classifier_from, self.mae, self.classes, 'avg')[0].to(self.device)
        freeze_below(model, k)
        groups = finetune_groups(model, recipe.weight_decay, recipe.layer_decay if k else 1.)
        opt = adamw(groups, rate, recipe.betas)
        return self.cached(start, model, partial(tail, model, start), opt, rate, recipe.min_lr, seed, train, test,
                           epochs, recipe.label_smoothing)

    def whole(self, make, recipe, rate, seed, train, test, epochs):
        "The whole classifier, from images."
        recipe = override(recipe, dict(epochs=epochs, warmup_epochs=epochs / 10, base_lr=rate * 256 / BATCH))
        images = [self.images[name].take(ids) for name, ids in (train, test)]
        dls = get_dls(images, recipe, img_size=self.mae.encoder.img_size, seed=seed, device=self.a.device)
        learn = finetune_learner(dls, seeded(seed, make), recipe, valid_every=epochs)
        with quiet():
            learn.fit_recipe()
        return learn.final_record[2]

    def rows(self):
        "Row's name -> (recipe, function of rate, seed, training part, test part, epochs)."
        r, width, classes = self.recipes, self.mae.encoder.dim, self.classes
        linear, attentive = lambda: LinearHead(width, classes), lambda: AttentiveHead(width, classes, 8)
        pretrained = lambda: classifier_from(self.mae, classes, 'avg')[0]
        fresh = lambda: new_classifier(self.a, self.images['few'])
        partials = {f'partial {k}': (r['finetune'], partial(self.last_blocks, k)) for k in LAST_BLOCKS}
        return {'linear': (r['linear'], partial(self.head, linear, r['linear'])),
                'attentive': (r['attentive'], partial(self.head, attentive, r['attentive'])), **partials,
                'partial all': (r['finetune'], partial(self.whole, pretrained, r['finetune'])),
                'from scratch': (r['scratch'], partial(self.whole, fresh, r['scratch']))}

    def knn(self):
        "Top-1 of the nearest neighbours, which learn nothing."
        (features, *_), labels = self.part(('few', slice(None)), 'norm')
        (queries,), truth = self.part(('test', slice(None)), 'norm')
        votes = knn_votes(features[:, 0].float(), labels, queries[:, 0].float(), self.classes)
        return (votes.argmax(1) == truth).double().mean().item()

# ---- the study -------------------------------------------------------------------------------------------------------

def new_classifier(a, images):
    return create_classifier(a.model, len(images.classes), in_chans=images.in_chans, depth=DEPTH)

def study_recipes(data):
    "The recipes of the rows; short runs need no warm-up in epochs, and flips are all that cached tokens can vary."
    flips = dict(crop_scale=(1., 1.), batch_size=BATCH)
    return dict(pretrain=override(RECIPES[f'pretrain_{data}'], dict(warmup_epochs=0.)),
                finetune=override(RECIPES[f'finetune_{data}'], flips | dict(base_lr=4e-3)),
                scratch=override(RECIPES[f'scratch_{data}'], flips | dict(base_lr=2e-3)),
                linear=override(RECIPES[f'linear_{data}'], dict(batch_size=BATCH)),
                attentive=override(RECIPES[f'attentive_{data}'], dict(batch_size=BATCH)))

def step_seconds(a, full, few, recipes, new_mae):
    "Seconds of a pretraining and of a fine-tuning step, measured."
    mae = new_mae()
    def seconds(learner, images, model, recipe, steps=6):
        dls = get_dls((images, None), recipe, img_size=mae.encoder.img_size, device=a.device)
        learn = learner(dls, model, recipe, max_steps=steps)
        with quiet():
            learn.fit_recipe()
            start = time.time()
            learn.fit_recipe()
        return (time.time() - start) / steps
    return (seconds(pretrain_learner, full, mae, recipes['pretrain']),
            seconds(finetune_learner, few, new_classifier(a, few), recipes['finetune']))

def pretrained(a, mae, images, recipe, out):
    "The learner after the one pretraining."
    dls = get_dls((images, None), recipe, img_size=mae.encoder.img_size, device=a.device)
    learn = pretrain_learner(dls, mae, recipe, out=out)
    with quiet():
        learn.fit_recipe()
    return learn

def chosen_rates(rows, few, epochs, say):
    "Each row's rate, chosen on a fifth of the labelled training images."
    order = np.random.default_rng(0).permutation(len(few))
    held, rest = (('few', np.sort(ids)) for ids in (order[:len(few) // 5], order[len(few) // 5:]))
    rates = {}
    for name, (recipe, run) in rows.items():
        base = recipe.base_lr * BATCH / 256
        tried = {f * base: run(f * base, 0, rest, held, max(2, epochs // 4)) for f in RATES}
        rates[name] = dict(chosen=max(tried, key=tried.get), tried=tried)
        say(f'{name:15} ' + ', '.join(f'rate {rate:.2g}: {top1:.1%}' for rate, top1 in tried.items()))
    return rates

def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--minutes', type=float, default=90, help='for everything together')
    p.add_argument('--out', default='runs/protocols', help='a folder, new or empty')
    p.add_argument('--data', default='cifar10')
    p.add_argument('--model', default='mae_vit_nano_patch4_32')
    p.add_argument('--labels', type=int, default=200, help='labelled training images a class')
    p.add_argument('--test', type=int, default=500, help='test images a class')
    p.add_argument('--seeds', type=int, default=3)
    p.add_argument('--device', default='cpu')
    return p.parse_args()

def main():
    a = arguments()
    begun, out = time.time(), make_run(a.out, vars(a))
    minutes = lambda: (time.time() - begun) / 60
    say = lambda text: print(f'{minutes():6.1f} min  {text}', flush=True)
    full, test_all = load_source(a.data)
    few, test, recipes = full.shots(a.labels), test_all.shots(a.test), study_recipes(a.data)
    new_mae = partial(seeded, 0, create_mae, a.model, target=recipes['pretrain'].target, in_chans=full.in_chans,
                      depth=DEPTH)
    mae = new_mae()

    # a third of the time goes to pretraining, half to the rows; a seed costs about two whole fine-tunings, and a
    # little more than a third of one for all cached rows together
    pretrain_step, tune_step = step_seconds(a, full, few, recipes, new_mae)
    budget, steps = a.minutes * 60, len(full) // recipes['pretrain'].batch_size
    pretrain_epochs = max(1, int(.35 * budget / (pretrain_step * steps)))
    epochs = max(2, int(.55 * budget / (a.seeds + .25 * len(RATES)) / (4 * tune_step * (len(few) // BATCH))))
    say(f'a step takes {pretrain_step * 1e3:.0f} ms in pretraining, {tune_step * 1e3:.0f} ms in fine-tuning: '
        f'{pretrain_epochs} and {epochs} epochs')

    longer = dict(epochs=pretrain_epochs, warmup_epochs=pretrain_epochs / 10)
    recipes['pretrain'] = override(recipes['pretrain'], longer)
    learn = pretrained(a, mae, full, recipes['pretrain'], out)
    say(f'pretrained, loss {learn.final_record[0]:.4f}')

    study = Protocols(a, learn.model.eval(), few, test, recipes)
    say('frozen prefixes computed')
    rows = study.rows()
    rates = chosen_rates(rows, few, epochs, say)
    top1, everything = {'k-NN': [study.knn()]}, [(name, np.arange(len(s))) for name, s in study.images.items()]
    for seed in range(a.seeds):
        for name, (_, run) in rows.items():
            top1.setdefault(name, []).append(run(rates[name]['chosen'], seed, *everything, epochs))
            say(f'seed {seed}  {name:15} {top1[name][-1]:.1%}')
    machine = f'{platform.machine()}, {torch.get_num_threads()} threads, {a.device}'
    result = dict(data=a.data, model=a.model, depth=DEPTH, labels=len(few), test=len(test), pretrain_images=len(full),
                  pretrain_epochs=pretrain_epochs, epochs=epochs, seeds=a.seeds, rates=rates,
                  minutes=round(minutes(), 1), machine=machine, top1=top1, note=NOTE,
                  recipes={name: as_config(recipe) for name, recipe in recipes.items()})
    (out/'results.json').write_text(json.dumps(result, indent=1) + '\n')
    draw(result, out/'figure9.png')
    say(f'written: {out/"results.json"}, {out/"figure9.png"}')

def draw(result, file):
    "Figure 9, ours next to the paper's."
    rows = {name: np.array(top1) * 100 for name, top1 in result['top1'].items()}
    ours = [name for name in rows if name.startswith('partial ')]
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout='constrained')
    means, spread = ([f(rows[name]) for name in ours] for f in (np.mean, np.std))
    left.errorbar(range(len(ours)), means, spread, marker='o', capsize=3, label='partial fine-tuning')
    left.set_xticks(range(len(ours)), [name.removeprefix('partial ') for name in ours])
    for i, name in enumerate(('linear', 'attentive', 'k-NN', 'from scratch'), 1):
        left.axhline(rows[name].mean(), ls='--', color=f'C{i}', label=name)
    left.set_title(f'{result["data"]}, {result["labels"]} labels, {result["pretrain_epochs"]} epochs of pretraining',
                   fontsize=10)
    paper = PAPER['Figure 9'].column('MAE')
    right.plot(range(len(paper)), list(paper.values()), marker='o')
    right.set_xticks(range(len(paper)), map(str, paper))
    right.set_title("the paper's Figure 9: ViT-L on ImageNet", fontsize=10)
    for ax in (left, right):
        ax.set_xlabel('blocks that learn')
        ax.set_ylabel('top-1, %')
        ax.grid(alpha=.3)
    left.legend(fontsize=8, frameon=False)
    fig.savefig(file, dpi=120)
    plt.close(fig)

if __name__ == '__main__':
    main()
