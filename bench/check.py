"""`mae-check` here and in another checkout, in turn: files a second on some cores.

    python bench/check.py FOLDER --before CHECKOUT [--copies 20000] [--pairs 5] [--workers 2] [--json FILE]

FOLDER has one folder of images for each class. With --copies it is read through so many hard links to its files, so
that neither disk nor memory has to hold them; every file is read, hashed and decoded each time that it is met.
Each build runs in a process of its own, which has imported everything and read the folder once. They take turns.
A machine that does other work at the same time delays both: compare the ratio of CPU seconds, too.
Files a second count the wall time of the check alone, without the imports.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def serve(folder: str, workers: int):
    "In a build's process: a check for each line that comes; the answer is its wall time, CPU seconds and report."
    try:
        from mae_nb.data.check import check_data
        from mae_nb.data.datasets import folder_set
    except ImportError:   # an earlier layout of the package
        from mae_nb.cli import check_data

        from mae_nb.data import folder_set
    images = folder_set(Path(folder))
    for _ in sys.stdin:
        start, before = time.perf_counter(), os.times()
        report = check_data(dict(train=images), workers)
        now, part = os.times(), report['parts']['train']
        cpu = sum(now[:4]) - sum(before[:4])
        kinds = sorted({*report, *part})
        print(json.dumps(dict(seconds=time.perf_counter() - start, cpu_seconds=cpu, images=part['images'],
                              bad=len(part['bad']), duplicates=len(report['duplicates']), reports=kinds)), flush=True)


class Build:
    "A checkout, with a process that runs its check."
    def __init__(self, checkout: Path, folder: Path, workers: int):
        words = [sys.executable, __file__, str(folder), '--workers', str(workers), '--serve']
        env = os.environ | dict(PYTHONPATH=str(checkout), OMP_NUM_THREADS='1')
        self.process = subprocess.Popen(words, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def check(self) -> dict:
        self.process.stdin.write('\n')
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def link_copies(folder: Path, copies: int, place: Path) -> Path:
    "A folder with so many hard links to the files of another one, in the same classes."
    files = sorted(f for f in folder.rglob('*') if f.is_file())
    for i in range(copies):
        file = files[i % len(files)]
        (place/file.parent.name).mkdir(parents=True, exist_ok=True)
        os.link(file, place/file.parent.name/f'{i}_{file.name}')
    return place


def summary(turns: list[dict]) -> dict:
    "A build's numbers: medians over its turns."
    seconds, cpu = (statistics.median(turn[name] for turn in turns) for name in ('seconds', 'cpu_seconds'))
    n, same = turns[0]['images'], ('images', 'bad', 'duplicates', 'reports')
    assert all(turn[name] == turns[0][name] for turn in turns for name in same)
    return dict(files_per_second=round(n / seconds, 1), files_per_cpu_second=round(n / cpu, 1),
                **{name: turns[0][name] for name in same})


def compare(folder: Path, before: Path, pairs: int, workers: int) -> dict:
    "Both builds in turn; the ratios are medians of the pairs'."
    builds = dict(before=Build(before, folder, workers), now=Build(ROOT, folder, workers))
    for build in builds.values():
        build.check()   # from here on both have their imports and the files are in memory
    turns = dict(before=[], now=[])
    for i in range(pairs):
        for name in list(builds)[::1 if i % 2 else -1]:
            turns[name].append(builds[name].check())
    for build in builds.values():
        build.close()
    ratios = {f'times_{name}': [b[key] / a[key] for b, a in zip(turns['before'], turns['now'])]
              for name, key in (('files_per_second', 'seconds'), ('files_per_cpu_second', 'cpu_seconds'))}
    medians = {name: round(statistics.median(values), 3) for name, values in ratios.items()}
    spread = {f'{name}_range': [round(min(values), 3), round(max(values), 3)] for name, values in ratios.items()}
    return {name: summary(of) for name, of in turns.items()} | medians | spread


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('folder', type=Path, help='a folder of images for each class')
    parser.add_argument('--before', type=Path, help='the other checkout')
    parser.add_argument('--copies', type=int, default=0, help='read so many links to the files')
    parser.add_argument('--pairs', type=int, default=5)
    parser.add_argument('--workers', type=int, default=2)
    parser.add_argument('--json', type=Path, help='add the result to this file')
    parser.add_argument('--serve', action='store_true', help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.serve:
        return serve(str(a.folder), a.workers)
    if a.before is None:
        parser.error('--before is missing: the checkout to compare with')
    from mae_nb.base.devices import machine
    with tempfile.TemporaryDirectory(dir=a.folder.parent) as place:
        folder = link_copies(a.folder, a.copies, Path(place)) if a.copies else a.folder
        result = compare(folder, a.before, a.pairs, a.workers)
    commit = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], cwd=a.before, capture_output=True, text=True)
    result = dict(pairs=a.pairs, workers=a.workers, before_commit=commit.stdout.strip()) | result
    result['machine'] = machine()
    print(json.dumps(result, indent=1))
    if a.json:
        known = json.loads(a.json.read_text()) if a.json.exists() else {}
        name = f'{a.copies} links to the files' if a.copies else 'the files'
        a.json.write_text(json.dumps(known | {name: result}, indent=1) + '\n')


if __name__ == '__main__':
    main()
