"""CIFAR-10 in minutes on one GPU: pretraining, a linear probe, k-NN and fine-tuning, with what each took.

    python bench/gpu/cifar.py --out OUT [--deadline 300] [--workers 14] [--json FILE]

Both trainings get as many epochs as fit before the deadline, from a pace measured first. `OUT` keeps the masked
autoencoder's weights and its features of all images in half precision; `pace` holds images a second for each way to
compile.
"""
import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch

from mae_nb.base.devices import machine
from mae_nb.base.keyed import seeded
from mae_nb.data.datasets import load_source
from mae_nb.model.mae import create_mae
from mae_nb.tasks.features import extract_features, knn_votes, linear_probe
from mae_nb.tasks.finetune import finetune_run
from mae_nb.tasks.pretrain import pretrain_run
from mae_nb.tasks.visualize import save_reconstructions
from mae_nb.training.presets import RECIPES
from mae_nb.training.recipes import as_config, mae_options, override
from mae_nb.training.runs import RunOptions, last_metrics
from mae_nb.weights.building import classifier_from
from mae_nb.weights.loading import write_own

MODEL = dict(name='mae_vit_tiny_patch2_32', mlp_ratio=2., decoder_dim=128, decoder_depth=2, decoder_heads=4)
TINY = MODEL | dict(depth=1, dim=48, decoder_dim=32, decoder_depth=1, patch_size=4)   # does the script still work?
PRETRAIN = dict(batch_size=1024, base_lr=5e-4, weight_decay=.05, crop_scale=(.4, 1.), amp=True, target='pixels')
FINETUNE = dict(batch_size=512, base_lr=1e-3, warmup_epochs=3, layer_decay=.8, drop_path=.05, mixup=0., cutmix=0.,
                label_smoothing=.1, crop_scale=(.5, 1.), amp=True, epochs=40)   # mixing pays in long trainings only
TIMED = 96, 137   # steps of a timing, of pretraining and fine-tuning: the last epoch's are counted
PRETRAINING, RESERVE = .62, 20   # share of the time that is left; seconds for the features

class Job:
    "The data, options and result file of the whole run."
    def __init__(self, args):
        self.args, self.out = args, Path(args.out)
        self.device = torch.device(args.device)
        self.out.mkdir(parents=True, exist_ok=True)
        self.model = TINY if args.tiny else MODEL
        self.fields = dict(batch_size=64) if args.tiny else {}
        self.result = dict(machine=machine(self.device, torch.bfloat16, ('fastai',)), model=self.model, pace={})
        self.start = time.time()
        self.sets = load_source('cifar10')
        if args.tiny:
            self.sets = tuple(s.take(range(0, len(s), 100)) for s in self.sets)
        self.note(data_seconds=time.time() - self.start)

    def note(self, **numbers):
        "Add to the results, and write them: these count even if the call is cut off."
        self.result |= numbers
        self.result['seconds'] = time.time() - self.start
        Path(self.args.json or self.out/'cifar.json').write_text(json.dumps(self.result, indent=1) + '\n')
        print(json.dumps({k: v for k, v in numbers.items() if k != 'rows'}), flush=True)

    def options(self, **more):
        return RunOptions('cifar10', num_workers=self.args.workers, device=self.args.device, save_every=10**6, **more)

    def new_model(self, recipe):
        return seeded(0, create_mae, **self.model, **mae_options(recipe)).to(self.device)

    def pretrain_recipe(self, **more):
        return override(RECIPES['pretrain_cifar10'], PRETRAIN | self.fields | more)

    def learner(self, model, recipe, steps=None):
        return pretrain_run(self.sets, model, recipe, self.options(max_steps=steps), valid_every=20)

    def time_ways(self, ways):
        "Images a second of pretraining, for each way to compile."
        for way in ways:
            recipe = self.pretrain_recipe(compile=way, warmup_epochs=0, epochs=1)
            model, begun = self.new_model(recipe), time.time()
            try:
                self.learner(model, recipe, 4).fit_recipe()   # compiles
                compiled = time.time() - begun
                learn = self.learner(model, recipe, 4 if self.args.tiny else TIMED[0])
                learn.fit_recipe()
                self.result['pace'][way] = learn.pace.report | dict(first_seconds=compiled)
            except Exception as e:   # the others still count
                self.result['pace'][way] = dict(error=f'{type(e).__name__}: {str(e)[:400]}')
            self.note(last_timed=way, pace=self.result['pace'])

    def epochs(self, share, pace, least=1):
        "As many epochs as fit into a share of the time that is left."
        left = self.args.deadline - RESERVE - (time.time() - self.start)
        return max(least, int(share * left * pace / len(self.sets[0])))

    def pretrain(self):
        "Pretrain as long as the seconds allow; the model."
        paces = {way: row['images_per_second'] for way, row in self.result['pace'].items() if 'error' not in row}
        way = max(paces, key=paces.get)
        epochs = 1 if self.args.tiny else self.epochs(PRETRAINING, paces[way])
        recipe = self.pretrain_recipe(compile=way, epochs=epochs, warmup_epochs=max(1, epochs // 20))
        learn, begun = self.learner(self.new_model(recipe), recipe), time.time()
        learn.fit_recipe()
        seconds = time.time() - begun
        images = self.sets[0]
        data = dict(name=images.name, mean=images.mean, std=images.std, classes=list(images.classes))
        half = {name: tensor.detach().cpu().half() for name, tensor in learn.model.state_dict().items()}
        write_own(half, self.out/'pretrained.safetensors', learn.model.config, data)
        rows = [list(row) for row in learn.recorder.values]
        self.note(pretrain_recipe=as_config(recipe), pretrain_seconds=seconds, pretrain_pace=learn.pace.report,
                  rows=rows, last=rows[-1])
        model = self.new_model(recipe)   # not compiled: what follows has other shapes
        model.load_state_dict(learn.model.state_dict())
        return model, way

    def finetune(self, model, way):
        "Fine-tune all of it, again as long as the seconds allow, compiled in the same `way`."
        recipe = override(RECIPES['finetune'], FINETUNE | self.fields | dict(compile=way))
        if self.args.tiny:
            recipe = override(recipe, dict(epochs=1, warmup_epochs=0))
        else:
            pace = self.finetune_pace(model, recipe)
            epochs = self.epochs(.95, pace, 5)
            recipe = override(recipe, dict(epochs=epochs, warmup_epochs=min(5, epochs / 8)))
        learn, begun = self.tuner(model, recipe), time.time()
        learn.fit_recipe()
        self.note(finetune_recipe=as_config(recipe), finetune_seconds=time.time() - begun,
                  finetune=last_metrics(learn), finetune_pace=learn.pace.report)

    def tuner(self, model, recipe, steps=None):
        classifier, _ = seeded(0, classifier_from, model, len(self.sets[0].classes), recipe.pool, recipe.drop_path)
        return finetune_run(self.sets, classifier, recipe, self.options(max_steps=steps), valid_every=10)

    def finetune_pace(self, model, recipe):
        "Images a second of fine-tuning."
        short = override(recipe, dict(epochs=1, warmup_epochs=0))
        train, valid = self.sets
        few = train, valid.take(range(0, len(valid), 20))
        classifier, _ = seeded(0, classifier_from, model, len(train.classes), recipe.pool, recipe.drop_path)
        learn = finetune_run(few, classifier, short, self.options(max_steps=TIMED[1]))
        learn.fit_recipe()
        self.note(finetune_timed=learn.pace.report)
        return learn.pace.report['images_per_second']

    def probe(self, model):
        "Nearest neighbours and a linear probe on frozen features."
        train, test = self.sets
        features, test_features = (extract_features(model.encoder, images)['avg'] for images in self.sets)
        half = len(features) // 2
        for name, part in (('train_a', features[:half]), ('train_b', features[half:]), ('test', test_features)):
            np.save(self.out/f'features_{name}.npy', part.astype(np.float16))
        on_device = lambda x: torch.as_tensor(x, device=self.device)
        votes = knn_votes(on_device(features), on_device(train.labels), on_device(test_features), len(train.classes))
        right = votes.argmax(dim=1).cpu().numpy() == test.labels
        self.note(knn=float(right.mean()))
        probe = linear_probe(features, train.labels, test_features, test.labels)
        self.note(linear_probe=probe.accuracy, penalty=probe.penalty)

def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', required=True)
    parser.add_argument('--deadline', type=float, default=300, help='seconds from the start')
    parser.add_argument('--timing', action='store_true', help='only the pace of each way to compile')
    parser.add_argument('--ways', nargs='+', default=['blocks'], help='to compile; the fastest one trains')
    parser.add_argument('--workers', type=int, default=max((os.cpu_count() or 2) - 2, 0))
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--tiny', action='store_true', help='a few seconds: does the script still work?')
    parser.add_argument('--json')
    job = Job(parser.parse_args(words))
    job.time_ways(job.args.ways)
    if job.args.timing:
        return job.result
    model, way = job.pretrain()
    try:
        job.finetune(model, way)
    except Exception as e:   # the features still count
        job.note(finetune_error=f'{type(e).__name__}: {str(e)[:400]}')
    job.probe(model)
    save_reconstructions(model, job.sets[1], job.out/'reconstructions.png')
    return job.result

if __name__ == '__main__':
    main()
