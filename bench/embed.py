"""How fast features come: python bench/embed.py SAMPLE.tar [--model NAME] [--pictures N] [--json FILE]

SAMPLE.tar holds JPEGs as .../train/<class>/<file>, such as imagenet_sample.tar. Three ways take turns on the same
pictures with the same weights, and the median of the turns counts, as does the median of the turns' ratios:

- bare: the encoder alone on the same batches, which are in memory already;
- ours: `mae-embed` without the start, that is reading, encoding, writing the parts and joining them;
- theirs: transformers' `pipeline('image-feature-extraction')` on the same files, with batches of one, its default, and
  with ours; the faster one counts.

Rates are by the clock, and beside them per second of the main process's own processor time, which other work on the
machine changes little: it is the rate where the workers have cores of their own. On a GPU only the clock counts.
"""
import argparse
import json
import shutil
import statistics
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import pipeline

from mae_nb.base.devices import get_device, machine, timed
from mae_nb.data.images import IMAGENET_MEAN, IMAGENET_STD
from mae_nb.model.classifier import create_classifier
from mae_nb.model.mae import SIZES
from mae_nb.tasks.batches import all_batches, image_batches, open_images
from mae_nb.tasks.embed import EmbedOptions, Parts, feature_shape, fill_parts, join_parts, token_features
from mae_nb.weights.building import load_encoder
from mae_nb.weights.convert import save_hf


def unpack(archive: Path, folder: Path, count: int) -> Path:
    "The first pictures of the sample, in their folders of classes."
    with tarfile.open(archive) as tar:
        members = [m for m in tar if m.isfile() and '/train/' in m.name][:count]
        tar.extractall(folder, members, filter='data')
    return next(folder.glob('*/train'))


def save_weights(folder: Path, name: str) -> Path:
    "Random weights as transformers' ViT, which sees every patch; its ViT-MAE would remove three quarters."
    torch.manual_seed(0)
    model = create_classifier(name, 2, pool='cls', img_size=224, in_chans=3)
    about = dict(name='imagenet', mean=list(IMAGENET_MEAN), std=list(IMAGENET_STD), classes=['a', 'b'])
    save_hf(model, folder/'weights', data=about)
    return folder/'weights'


def ours(encoder, images, options, folder) -> np.ndarray:
    "A whole job after its start; the features."
    parts = Parts(folder/'ours.npy', len(images), options.bs, feature_shape(encoder, options.tokens), 'float32')
    parts.folder.mkdir()
    fill_parts(parts, encoder, images, options)
    join_parts(parts, images, folder/'ours.npy', {})
    shutil.rmtree(parts.folder)
    return np.load(folder/'ours.npy')


def run_timed(run, device) -> tuple[float, float, object]:
    "Seconds by the clock and of this process, and the result."
    results, start = [], time.process_time()
    seconds = timed(lambda: results.append(run()), device)
    return seconds, time.process_time() - start, results[0]


def measure(args, folder: Path) -> dict:
    "Images a second of each way, and the ratios."
    device = get_device(args.device)
    place = unpack(args.sample, folder, args.pictures)
    weights = save_weights(folder, args.model)
    encoder = load_encoder(weights)[0].to(device)
    images = open_images(place)
    options = EmbedOptions(str(place), str(weights), 'x.npy', bs=args.bs, num_workers=args.num_workers)
    batches = [imgs for imgs, _ in image_batches(images, encoder.img_size, all_batches(len(images), args.bs),
                                                 num_workers=args.num_workers, device=device)]
    pipe = pipeline('image-feature-extraction', model=str(weights), device=device)
    files = [str(images.items[i]) for i in range(len(images))]

    @torch.inference_mode()
    def bare():
        return torch.cat([token_features(encoder, imgs) for imgs in batches]).cpu().numpy()

    runs = dict(bare=bare, ours=lambda: ours(encoder, images, options, folder),
                pipeline_of_one=lambda: [x[0][0] for x in pipe(files)],
                pipeline=lambda: [x[0][0] for x in pipe(files, batch_size=args.bs)])
    clock, own, features = {name: [] for name in runs}, {name: [] for name in runs}, {}
    for turn in range(args.turns + 1):   # the first one warms up
        for name, run in runs.items():
            spent, processor, features[name] = run_timed(run, device)
            if turn:
                clock[name].append(spent)
                own[name].append(processor)
            print(f'turn {turn}: {name} {len(files) / spent:.2f} images a second, {len(files) / processor:.2f} of the '
                  "process's own", flush=True)
    check(features)
    rows = dict(clock=report(clock, len(files)), processor_time=report(own, len(files)))
    return rows | dict(machine=machine(device, packages=('transformers',)))


def check(features: dict):
    "All ways give the same class tokens: ours to the last digits, theirs up to its own scaling of pictures."
    wanted = features['bare']
    scale = np.abs(wanted).max()
    assert np.abs(features['ours'] - wanted).max() / scale < 1e-4
    theirs = np.array(features['pipeline'])
    cosine = (theirs * wanted).sum(axis=1) / np.linalg.norm(theirs, axis=1) / np.linalg.norm(wanted, axis=1)
    assert np.median(cosine) > .99 and cosine.min() > .95, cosine   # a random network takes small differences seriously


def report(seconds: dict, count: int) -> dict:
    "Medians and their range."
    theirs = min(('pipeline_of_one', 'pipeline'), key=lambda name: statistics.median(seconds[name]))
    rates = {name: count / statistics.median(times) for name, times in seconds.items()}
    result = dict(images_per_second=rates, faster_pipeline=theirs)
    for name, other in (('of_bare', 'bare'), ('of_pipeline', theirs)):
        ratios = [b / a for a, b in zip(seconds['ours'], seconds[other])]
        result[name] = dict(ratio=statistics.median(ratios), smallest=min(ratios), largest=max(ratios))
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('sample', type=Path)
    parser.add_argument('--model', default='mae_vit_base_patch16', choices=list(SIZES))
    parser.add_argument('--pictures', type=int, default=500)
    parser.add_argument('--bs', type=int, default=16)
    parser.add_argument('--turns', type=int, default=3)
    parser.add_argument('--num-workers', type=int, default=1)
    parser.add_argument('--device')
    parser.add_argument('--json', type=Path, help='rows of other models and devices in it are kept')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        row = measure(args, Path(folder))
    row |= {name: getattr(args, name) for name in ('model', 'pictures', 'bs', 'turns', 'num_workers')}
    print(json.dumps(row, indent=1))
    if args.json:
        rows = json.loads(args.json.read_text()) if args.json.is_file() else {}
        rows[f'{args.model} on {row["machine"]["device"]}'] = row
        args.json.write_text(json.dumps(rows, indent=1) + '\n')


if __name__ == '__main__':
    main()
