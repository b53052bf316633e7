"""What the list of an ImageNet costs: memory in each of the loader's workers, and the time to make it.

    python bench/listing.py [--files 1281167] [--workers 2] [--listed 128117] [--json FILE]

The names are made up, so no images are needed: 1,281,167 of them, in 1,000 classes, as ImageNet has them.
Each worker looks at every name and label once. Its memory is what the kernel counts as private to it.
A real folder is listed too, of empty files with such names.
To measure another checkout, put it first on PYTHONPATH; earlier layouts of the package are understood.
"""
import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

CLASSES = 1000


def layout() -> tuple:
    "The package's `ImageSet`, `folder_set`, and what makes a list of paths."
    try:
        from mae_nb.data.datasets import ImageSet, folder_set
    except ImportError:
        from mae_nb.data import ImageSet, folder_set
    try:
        from mae_nb.data.inventory import Names, Paths
    except ImportError:
        return ImageSet, folder_set, lambda root, names: [Path(root)/name for name in names]
    return ImageSet, folder_set, lambda root, names: Paths(root, Names(names))


def made_names(n: int):
    for i in range(n):
        c = i * CLASSES // n
        yield f'n{c:08}/n{c:08}_{i}.JPEG'


def made_set(n: int):
    "An image set of that many files that do not exist."
    image_set, _, paths = layout()
    labels = np.arange(n, dtype=np.int64) * CLASSES // n
    return image_set('made', paths('/data/imagenet/train', made_names(n)), labels, [f'{c:08}' for c in range(CLASSES)])


def private_bytes() -> int:
    "Memory that this process has written and no other shares; pages of a mapped file belong to all."
    rows = [line.split() for line in Path('/proc/self/smaps_rollup').read_text().splitlines()]
    return 1024 * sum(int(row[1]) for row in rows if row[0] == 'Private_Dirty:')


class Touch(Dataset):
    "Each worker looks at all names and labels, and reports the memory that it has gained."
    def __init__(self, images, workers: int):
        self.images, self.workers = images, workers

    def __len__(self):
        return self.workers

    def __getitem__(self, worker):
        before, total = private_bytes(), 0
        for i in range(len(self.images)):
            total += len(self.images.file(i)) + int(self.images.labels[i])
        return private_bytes() - before, before, total, time.time()


def memory(n: int, workers: int, method: str) -> dict:
    "Bytes a file and worker, and seconds until the workers have begun."
    images = made_set(n)
    start = time.time()
    loader = DataLoader(Touch(images, workers), batch_size=None, num_workers=workers, multiprocessing_context=method)
    rows = list(loader)
    tiny = DataLoader(Touch(made_set(CLASSES), workers), batch_size=None, num_workers=workers,
                      multiprocessing_context=method)
    base = list(tiny)   # the same without the names: what a worker needs anyway
    # a started worker has got its names before it looks; a forked one's pages are its parent's until it writes
    gained = [a[0] - b[0] + (a[1] - b[1]) * (method != 'fork') for a, b in zip(rows, base)]
    return dict(bytes_per_file_and_worker=round(max(gained) / n, 3), seconds_with_looking=round(time.time() - start, 1))


def listing(n: int, folder: Path) -> dict:
    "Seconds of this process to list a folder of empty files."
    for c in range(CLASSES):
        (folder/f'n{c:08}').mkdir()
    for name in made_names(n):
        (folder/name).touch()
    _, folder_set, _ = layout()
    start, clock = time.process_time(), time.perf_counter()
    images = folder_set(folder)
    assert len(images) == n and len(images.classes) == CLASSES
    return dict(files=n, cpu_seconds=round(time.process_time() - start, 2),
                seconds=round(time.perf_counter() - clock, 2))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--files', type=int, default=1_281_167, help='names in the index')
    parser.add_argument('--workers', type=int, default=2)
    parser.add_argument('--listed', type=int, default=128_117, help='files of a real folder')
    parser.add_argument('--methods', default='fork,spawn', help='how workers start')
    parser.add_argument('--json', help='also write the result to this file')
    a = parser.parse_args()
    start = time.process_time()
    made_set(a.files)
    result = dict(files=a.files, workers=a.workers, index_cpu_seconds=round(time.process_time() - start, 2))
    for method in a.methods.split(','):
        result[method] = memory(a.files, a.workers, method)
    place = '/dev/shm' if os.access('/dev/shm', os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place) as folder:
        result['listing'] = listing(a.listed, Path(folder))
    result['machine'] = dict(system=platform.platform(), python=platform.python_version(), torch=torch.__version__,
                             cores=os.cpu_count())
    print(json.dumps(result, indent=1))
    if a.json:
        Path(a.json).write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__':
    main()
