"""All protocols on CIFAR-10 with a small model: one pretraining, three evaluation seeds, frozen prefixes computed once.

    python bench/cifar_protocols.py --minutes 90 --out runs/protocols

Writes `results.json` and `figure9.png`. Epochs are chosen to fill the time, from speeds measured first, and are written down with the
results: compare rows of one run with each other, not runs of different machines. Our CIFAR-10 is JPEG with halved chroma: figures of
others, from the original pixels, are not the same task.
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

from mae_nb.base.keyed import seeded
from mae_nb.model.classifier import create_classifier
from mae_nb.weights.building import classifier_from
from mae_nb.data.datasets import load_source
from mae_nb.data.loader import get_dls
from mae_nb.training.runs import make_run
from mae_nb.tasks.finetune import finetune_learner
from mae_nb.base.keyed import generator, key
from mae_nb.model.mae import create_mae
from mae_nb.training.optim import adamw, finetune_groups, lars, param_groups, warmup_cosine
from mae_nb.model.patches import patchify
from mae_nb.tasks.pretrain import pretrain_learner
from mae_nb.tasks.features import knn_votes
from mae_nb.tasks.finetune import freeze_below
from mae_nb.tasks.probes import AttentiveHead, LinearHead
from mae_nb.training.presets import RECIPES
from mae_nb.training.recipes import as_config, override
from mae_nb.data.images import standardize

PAPER = {0: 73.5, .5: 79.1, 1: 81., 2: 83.1, 4: 84.2, 6: 84.4, 12: 84.6, 18: 84.7, 24: 84.9}   # Figure 9, ViT-L
DEPTH, BATCH, RATES = 6, 50, (.3, 1., 3.)   # blocks; labelled images a step; factors on a recipe's rate to choose from
quiet = lambda: contextlib.redirect_stdout(io.StringIO())

# ---- one look at the images, and what a frozen prefix makes of them -----------------------------------------------------------------

def views(images, device):
    "All images and their mirror images, standardised."
    x = standardize(torch.stack([images.read(i) for i in range(len(images))]).to(device), images.mean, images.std)
    return x, x.flip(-1)

@torch.no_grad()
def prefixes(encoder, imgs, stops, bs=500):
    "Tokens after so many blocks, for each of `stops`; float16."
    found = {s: [] for s in stops}
    for part in imgs.split(bs):
        x = encoder.patch_embed(patchify(part, encoder.patch_size)) + encoder.pos_embed[:, 1:]
        x = torch.cat([(encoder.cls_token + encoder.pos_embed[:, :1]).expand(len(x), -1, -1), x], dim=1)
        for i in range(DEPTH + 1):
            if i in found: found[i].append(x.half())
            if i < DEPTH: x = encoder.blocks[i](x)
    return {s: torch.cat(v) for s, v in found.items()}

def tail(model, start, x):
    "The rest of a classifier, from block `start` on."
    for block in model.blocks[start:]: x = block(x)
    return model.head(model.fc_norm(model.norm(x)[:, 1:].mean(dim=1)))

# ---- training on what is computed already -------------------------------------------------------------------------------------------

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
        x = torch.where(mirrored[ids].view(-1, 1, 1).to(train[0].device), train[1][ids], train[0][ids]).float()
        for g in opt.opt.param_groups: g['lr'] = warmup_cosine(step, total, warmup, peak, min_lr) * g['lr_scale']
        F.cross_entropy(forward(x), labels[ids], label_smoothing=smoothing).backward()
        opt.step(); opt.zero_grad()
    module.eval()
    with torch.no_grad(): right = [(forward(x.float()).argmax(dim=1) == y).sum() for x, y in zip(test.split(500), test_labels.split(500))]
    return torch.stack(right).sum().item() / len(test_labels)

# ---- the study ----------------------------------------------------------------------------------------------------------------------

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--minutes', type=float, default=90, help='for everything together')
    p.add_argument('--out', default='runs/protocols', help='a folder, new or empty')
    p.add_argument('--data', default='cifar10'); p.add_argument('--model', default='mae_vit_nano_patch4_32')
    p.add_argument('--labels', type=int, default=200, help='labelled training images a class')
    p.add_argument('--test', type=int, default=500, help='test images a class')
    p.add_argument('--seeds', type=int, default=3); p.add_argument('--device', default='cpu')
    a = p.parse_args()
    begun, out, seeds = time.time(), make_run(a.out, vars(a)), range(a.seeds)
    say = lambda text: print(f'{(time.time() - begun) / 60:6.1f} min  {text}', flush=True)
    full, test_all = load_source(a.data)
    few, shown = full.shots(a.labels), test_all.shots(a.test)
    size = dict(in_chans=full.in_chans, depth=DEPTH)

    # speeds, measured; a third of the time goes to pretraining, half to the rows
    base = override(RECIPES[f'pretrain_{a.data}'], dict(warmup_epochs=0.))
    tune = override(RECIPES[f'finetune_{a.data}'], dict(crop_scale=(1., 1.), base_lr=4e-3, batch_size=BATCH))
    fresh = override(RECIPES[f'scratch_{a.data}'], dict(crop_scale=(1., 1.), base_lr=2e-3, batch_size=BATCH))
    linear, attentive = (override(RECIPES[f'{k}_{a.data}'], dict(batch_size=BATCH)) for k in ('linear', 'attentive'))
    mae = seeded(0, create_mae, a.model, target=base.target, **size)
    img_size, classes = mae.encoder.img_size, len(full.classes)
    loaders = lambda images, r, seed=0: get_dls((images, None), r, img_size=img_size, seed=seed, device=a.device)
    def seconds(learn, steps=6):
        with quiet(): learn.fit_recipe(); t = time.time(); learn.fit_recipe()
        return (time.time() - t) / steps
    step = {'pretrain': seconds(pretrain_learner(loaders(full, base), seeded(0, create_mae, a.model, target=base.target, **size), base, max_steps=6)),
            'tune': seconds(finetune_learner(loaders(few, tune), create_classifier(a.model, classes, **size), tune, max_steps=6))}
    budget = a.minutes * 60
    pre_epochs = max(1, int(.35 * budget / (step['pretrain'] * (len(full) // base.batch_size))))
    # a seed costs about two whole fine-tunings, and a little more than a third of one for all cached rows at once
    epochs = max(2, int(.55 * budget / (a.seeds + .25 * len(RATES)) / (4 * step['tune'] * (len(few) // tune.batch_size))))
    say(f'a step takes {step["pretrain"] * 1e3:.0f} ms in pretraining, {step["tune"] * 1e3:.0f} ms in fine-tuning: {pre_epochs} and {epochs} epochs')

    pre = override(base, dict(epochs=pre_epochs, warmup_epochs=pre_epochs / 10))
    learn = pretrain_learner(loaders(full, pre), mae, pre, out=out)
    with quiet(): learn.fit_recipe()
    mae = learn.model.eval()
    mae.encoder.config = mae.config
    say(f'pretrained, loss {learn.final_record[0]:.4f}')

    device = torch.device(a.device)
    y, ty = (torch.as_tensor(s.labels, device=device) for s in (few, shown))
    ks = {0: 0, .5: .5, 1: 1, 2: 2, 4: 4}
    stops = sorted({DEPTH - int(np.ceil(k)) for k in ks.values()} | {DEPTH})
    one, two = (prefixes(mae.encoder, v, stops) for v in views(few, device))
    last = prefixes(mae.encoder, views(shown, device)[0], stops)
    norm = lambda x: mae.encoder.norm(x.float())
    with torch.no_grad():
        for d in (one, two, last): d['norm'] = torch.cat([norm(x) for x in d[DEPTH].split(500)]).half()
    say('frozen prefixes computed')

    def head(make, r, rate, seed, train, test, epochs):
        "A head on the frozen encoder's tokens."
        module = seeded(seed, make).to(device)
        groups = param_groups(module, r.weight_decay, lambda n, q: q.ndim <= 1)
        opt = lars(groups, rate, r.momentum) if r is linear else adamw(groups, rate, r.betas)
        return fit(module, module, opt, rate, r.min_lr, *part(train, 'norm'), *part(test, 'norm', 1), epochs, BATCH, seed)
    def some(k, rate, seed, train, test, epochs):
        "The last blocks, on the tokens that the frozen ones give."
        model, start = seeded(seed, classifier_from, mae, classes, 'avg')[0], DEPTH - int(np.ceil(k))
        freeze_below(model.to(device), k)
        opt = adamw(finetune_groups(model, tune.weight_decay, tune.layer_decay if k else 1.), rate, tune.betas)
        return fit(model, lambda x: tail(model, start, x), opt, rate, tune.min_lr, *part(train, start), *part(test, start, 1), epochs, BATCH, seed, tune.label_smoothing)
    def whole(make, r, rate, seed, train, test, epochs):
        "The whole classifier, from images."
        r = override(r, dict(epochs=epochs, warmup_epochs=epochs / 10, base_lr=rate * 256 / BATCH))
        images = [{'few': few, 'test': shown}[name].take(ids) for name, ids in (train, test)]
        learn = finetune_learner(get_dls(images, r, img_size=img_size, seed=seed, device=a.device), seeded(seed, make), r, seed=seed, valid_every=epochs)
        with quiet(): learn.fit_recipe()
        return learn.final_record[2]
    def part(which, at, views=2):
        "Cached tokens and labels of some images."
        name, ids = which
        found = tuple(d[at][ids] for d in ((one, two) if name == 'few' else (last,)))[:views]
        return found if views == 2 else found[0], (y if name == 'few' else ty)[ids]

    todo = {'linear': (linear, partial(head, lambda: LinearHead(mae.encoder.dim, classes), linear)),
            'attentive': (attentive, partial(head, lambda: AttentiveHead(mae.encoder.dim, classes, 8), attentive)),
            **{f'partial {k}': (tune, partial(some, k)) for k in ks},
            'partial all': (tune, partial(whole, lambda: classifier_from(mae, classes, 'avg')[0], tune)),
            'from scratch': (fresh, partial(whole, lambda: create_classifier(a.model, classes, **size), fresh))}
    everything = ('few', np.arange(len(few))), ('test', np.arange(len(shown)))
    fifth = np.random.default_rng(0).permutation(len(few))   # rates are chosen on labelled training images
    choose = ('few', np.sort(fifth[len(few) // 5:])), ('few', np.sort(fifth[:len(few) // 5]))
    rates, rows = {}, {'k-NN': [(knn_votes(one['norm'][:, 0].float(), y, last['norm'][:, 0].float(), classes).argmax(1) == ty).double().mean().item()]}
    for name, (r, run) in todo.items():
        tried = {f * r.learning_rate(BATCH): run(f * r.learning_rate(BATCH), 0, *choose, max(2, epochs // 4)) for f in RATES}
        rates[name] = dict(chosen=max(tried, key=tried.get), tried=tried)
        say(f'{name:15} ' + ', '.join(f'rate {k:.2g}: {v:.1%}' for k, v in tried.items()))
    for seed in seeds:
        for name, (_, run) in todo.items():
            rows.setdefault(name, []).append(run(rates[name]['chosen'], seed, *everything, epochs))
            say(f'seed {seed}  {name:15} {rows[name][-1]:.1%}')
    result = dict(data=a.data, model=a.model, depth=DEPTH, labels=len(few), test=len(shown), pretrain_images=len(full), pretrain_epochs=pre_epochs, epochs=epochs, seeds=a.seeds, rates=rates,
                  minutes=round((time.time() - begun) / 60, 1), machine=f'{platform.machine()}, {torch.get_num_threads()} threads, {a.device}', top1=rows,
                  note='flips only; frozen prefixes computed once, in half precision; partial all = full fine-tuning',
                  recipes={k: as_config(r) for k, r in dict(pretrain=pre, finetune=tune, scratch=fresh, linear=linear, attentive=attentive).items()})
    (out/'results.json').write_text(json.dumps(result, indent=1) + '\n')
    draw(result, out/'figure9.png')
    say(f'written: {out/"results.json"}, {out/"figure9.png"}')

def draw(result, file):
    "Figure 9, ours beside the paper's."
    rows = {k: np.array(v) * 100 for k, v in result['top1'].items()}
    fig, axs = plt.subplots(1, 2, figsize=(11, 3.8), layout='constrained')
    ours = [k for k in rows if k.startswith('partial ')]
    axs[0].errorbar(range(len(ours)), [rows[k].mean() for k in ours], [rows[k].std() for k in ours], marker='o', capsize=3, label='partial fine-tuning')
    axs[0].set_xticks(range(len(ours)), [k.removeprefix('partial ') for k in ours])
    for i, k in enumerate(('linear', 'attentive', 'k-NN', 'from scratch')): axs[0].axhline(rows[k].mean(), ls='--', color=f'C{i + 1}', label=k)
    axs[0].set_title(f'{result["data"]}, {result["labels"]} labels, {result["pretrain_epochs"]} epochs of pretraining', fontsize=10)
    axs[1].plot(range(len(PAPER)), PAPER.values(), marker='o'); axs[1].set_xticks(range(len(PAPER)), map(str, PAPER)); axs[1].set_title("the paper's Figure 9: ViT-L on ImageNet", fontsize=10)
    for ax in axs: ax.set_xlabel('blocks that learn'); ax.set_ylabel('top-1, %'); ax.grid(alpha=.3)
    axs[0].legend(fontsize=8, frameon=False)
    fig.savefig(file, dpi=120); plt.close(fig)

if __name__ == '__main__': main()
