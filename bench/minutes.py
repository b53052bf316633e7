"""Minutes of pretraining until a linear probe on CIFAR-10 passes 50, 55 and 60 %, here and in an earlier checkout.

    python bench/minutes.py --before CHECKOUT --work FOLDER [--json FILE]

Each build pretrains the demo's model by its own recipe, on one thread, and keeps the weights of every epoch; then each
reads them by its demo's own linear probe with the labels of all training images: the earlier one the mean of the
patch tokens, this one a grid of them. This build's probe also reads the earlier build's last weights, which tells
better features from a better probe. Epoch 0 is the untrained encoder. Minutes are processor time of the training
process, which other work on the machine changes little. FOLDER keeps weights and answers: the same command goes on
where it was stopped.
"""
import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MARKS = .50, .55, .60
NANO = 'mae_vit_nano_patch4_32'


def keep_epochs(learn, folder: Path):
    "Train; keep each epoch's weights and the processor time until then."
    import torch
    from fastai.callback.core import Callback

    class Keep(Callback):
        order = 90

        def after_epoch(self):
            torch.save(self.learn.model.state_dict(), folder/f'epoch-{self.epoch + 1:02}.pt')
            times = json.loads((folder/'times.json').read_text())
            times[self.epoch + 1] = (time.process_time() - begin) / 60
            (folder/'times.json').write_text(json.dumps(times))

    torch.save(learn.model.state_dict(), folder/'epoch-00.pt')
    (folder/'times.json').write_text('{"0": 0.0}')
    learn.add_cb(Keep())
    begin = time.process_time()
    learn.fit_recipe()


def train_now(folder: Path):
    "Pretrain in this build by its demo's recipe."
    from mae_nb.base.keyed import seeded
    from mae_nb.data.datasets import load_source
    from mae_nb.model.mae import create_mae
    from mae_nb.tasks.pretrain import pretrain_run
    from mae_nb.training.presets import RECIPES
    from mae_nb.training.recipes import mae_options
    from mae_nb.training.runs import RunOptions
    recipe = RECIPES['demo_cifar10']
    model = seeded(0, create_mae, NANO, **mae_options(recipe))
    keep_epochs(pretrain_run(load_source('cifar10'), model, recipe, RunOptions('cifar10', device='cpu')), folder)


def train_before(folder: Path):
    "Pretrain in the earlier build by its demo's recipe."
    from mae_nb.cli import pretrain
    from mae_nb.recipes import RECIPES

    from mae_nb.data import load_source
    recipe = RECIPES['pretrain_cifar10']
    keep_epochs(pretrain(load_source('cifar10'), NANO, recipe, None, device='cpu', train=False), folder)


def probe_now(weights: Path) -> float:
    "Top-1 of this build's probe."
    import torch

    from mae_nb.data.datasets import load_source
    from mae_nb.model.mae import create_mae
    from mae_nb.tasks.demo import DEMOS
    from mae_nb.tasks.features import linear_probe, principal_features, read_features
    model = create_mae(NANO, target='pixels')
    model.load_state_dict(torch.load(weights, weights_only=True))
    (train, test), plan = load_source('cifar10'), DEMOS['cifar10']
    own, others = principal_features(*(read_features(model.encoder, part, plan.readout) for part in (train, test)))
    return linear_probe(own, train.labels, others, test.labels, plan.penalties, standardise=False).accuracy


def probe_before(weights: Path) -> float:
    "Top-1 of the earlier build's probe."
    import torch
    from mae_nb.mae import create_mae
    from mae_nb.probes import features, linear_probe

    from mae_nb.data import load_source
    model = create_mae(NANO, target='pixels')
    model.load_state_dict(torch.load(weights, weights_only=True))
    train, test = load_source('cifar10')
    own, others = features(model.encoder, train)['avg'], features(model.encoder, test)['avg']
    return linear_probe(own, train.labels, others, test.labels).accuracy


PARTS = dict(train_now=train_now, train_before=train_before, probe_now=probe_now, probe_before=probe_before)


def run_part(name: str, argument: Path, checkout: Path) -> str:
    "A part in a process with a build of its own; what it printed last."
    env = os.environ | dict(PYTHONPATH=str(checkout), OMP_NUM_THREADS='1')
    done = subprocess.run([sys.executable, __file__, '--part', name, str(argument)], env=env, stdout=subprocess.PIPE,
                          text=True, check=True)
    return done.stdout.strip().splitlines()[-1]


def probe(name: str, weights: Path, checkout: Path) -> float:
    "A probe's answer, from the folder if it is known."
    file = weights.with_suffix(f'.{name}.json')
    if not file.exists():
        file.write_text(run_part(name, weights, checkout))
    return json.loads(file.read_text())


def passed(rows: list[dict], column: str) -> dict:
    "Minutes until each mark is passed, or None."
    return {f'{mark:.0%}': next((row['minutes'] for row in rows if row[column] >= mark), None) for mark in MARKS}


def measure(build: str, checkout: Path, args) -> dict:
    "A build's epochs: minutes, and what each probe reads."
    folder = args.work/build
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder/'trained').exists():
        run_part(f'train_{build}', folder, checkout)
        (folder/'trained').touch()
    times, own = json.loads((folder/'times.json').read_text()), f'probe_{build}'
    rows = []
    for epoch, minutes in times.items():
        weights = folder/f'epoch-{int(epoch):02}.pt'
        rows.append(dict(epoch=int(epoch), minutes=minutes) | {own: probe(own, weights, checkout)})
        print(build, rows[-1], flush=True)
    rows[-1]['probe_now'] = probe('probe_now', weights, ROOT)
    return dict(rows=rows, minutes_to=passed(rows, own))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--before', type=Path, help='a checkout of the earlier build')
    parser.add_argument('--work', type=Path, help='keeps weights and answers')
    parser.add_argument('--json', type=Path)
    parser.add_argument('--part', nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        name, argument = args.part
        print(json.dumps(PARTS[name](Path(argument))))
        return
    result = dict(now=measure('now', ROOT, args), before=measure('before', args.before.resolve(), args))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__':
    main()
