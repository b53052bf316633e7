"""A save of ViT-L's run here and in another checkout, in turn: the pause of training, the write, and the extra memory.

    python bench/saves.py --before CHECKOUT [--model mae_vit_large_patch16] [--pairs 2] [--saves 3] [--json FILE]

Each turn is a process of its own, with one build: a model and an AdamW that has made a step's moments, on the CPU. The
pause is what training waits for: the copy of weights and moments. The write happens in the background; its seconds are
those of this disk. Extra memory is the most that the process's own pages (RssAnon) grow above what they were before the
first save. A turn's first save takes new memory for the copies, the others take the same again.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]


def functions():
    "`create_mae`, `run_state` and `save_checkpoint` of the build on the path."
    try:
        from mae_nb.model.mae import create_mae
        from mae_nb.training.state import run_state, save_checkpoint
    except ImportError:   # an earlier layout of the package
        from mae_nb.checkpoints import run_state, save_checkpoint
        from mae_nb.mae import create_mae
    return create_mae, run_state, save_checkpoint


def own_mib():
    "Memory of this process that is no file's, MiB."
    rows = Path('/proc/self/status').read_text().splitlines()
    return int(next(row for row in rows if row.startswith('RssAnon')).split()[1]) / 1024


class Peak:
    "The most memory while entered, above what it was at the beginning; looked at every 5 ms by a thread."
    def __enter__(self):
        self.begin = self.most = own_mib()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.look)
        self.thread.start()
        return self

    def look(self):
        while not self.ended.wait(.005):
            self.most = max(self.most, own_mib())

    def __exit__(self, *_):
        self.ended.set()
        self.thread.join()
        self.extra = self.most - self.begin


def fake_learner(model):
    "What `run_state` reads of a learner: weights, and an optimizer after its first step."
    import torch
    names, params = zip(*model.named_parameters())
    opt = torch.optim.AdamW([dict(params=list(params), names=list(names))], lr=1e-4)
    for p in params:
        opt.state[p] = dict(step=torch.ones(()), exp_avg=torch.full_like(p, .1), exp_avg_sq=torch.full_like(p, .01))
    recorder = SimpleNamespace(values=[], iters=[])
    return SimpleNamespace(model=model, opt=SimpleNamespace(opt=opt), cbs=[], recorder=recorder, train_iter=1)


def turn(model: str, saves: int) -> dict:
    "In a build's process: some saves, one after the other."
    import torch
    create_mae, run_state, save_checkpoint = functions()
    torch.set_num_threads(1)
    learn, copies, rows = fake_learner(create_mae(model)), {}, []
    with tempfile.TemporaryDirectory() as folder, Peak() as peak:
        for step in range(1, saves + 1):
            start, cpu = time.perf_counter(), time.process_time()
            copies, plain = run_state(learn, copies)
            pause, pause_cpu = time.perf_counter() - start, time.process_time() - cpu
            start = time.perf_counter()
            file = save_checkpoint(Path(folder), step, copies, dict(run=plain))
            rows.append(dict(pause=pause, pause_cpu=pause_cpu, write=time.perf_counter() - start))
            mib = file.stat().st_size / 2**20
            file.unlink()
    return dict(saves=rows, extra_mib=peak.extra, file_mib=mib)


def run_turn(checkout: Path, model: str, saves: int) -> dict:
    "One turn of a build, in a process."
    words = [sys.executable, __file__, '--model', model, '--saves', str(saves), '--turn']
    env = os.environ | dict(PYTHONPATH=str(checkout), OMP_NUM_THREADS='1')
    done = subprocess.run(words, env=env, stdout=subprocess.PIPE, text=True, check=True, cwd=checkout)
    return json.loads(done.stdout.splitlines()[-1])


def summary(turns: list) -> dict:
    "A build's numbers: medians over its turns."
    later = [save for t in turns for save in t['saves'][1:]]
    middle = lambda values: round(statistics.median(values), 3)
    return dict(first_pause=middle(t['saves'][0]['pause'] for t in turns), pause=middle(s['pause'] for s in later),
                pause_cpu=middle(s['pause_cpu'] for s in later), write=middle(s['write'] for s in later),
                extra_mib=middle(t['extra_mib'] for t in turns), file_mib=middle(t['file_mib'] for t in turns))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--before', type=Path, help='the other checkout')
    parser.add_argument('--model', default='mae_vit_large_patch16')
    parser.add_argument('--pairs', type=int, default=2)
    parser.add_argument('--saves', type=int, default=3, help='in each turn')
    parser.add_argument('--json', type=Path)
    parser.add_argument('--turn', action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.turn:
        return print(json.dumps(turn(args.model, args.saves)))
    if args.before is None:
        parser.error('--before is missing: the checkout to compare with')
    from mae_nb.base.devices import machine
    checkouts, turns = dict(before=args.before.resolve(), now=ROOT), dict(before=[], now=[])
    for i in range(args.pairs):
        for name in list(checkouts)[::1 if i % 2 else -1]:
            turns[name].append(run_turn(checkouts[name], args.model, args.saves))
    rows = {name: summary(some) for name, some in turns.items()}
    ratios = {f'{key}_ratio': round(rows['now'][key] / rows['before'][key], 3)
              for key in ('first_pause', 'pause', 'pause_cpu', 'write', 'extra_mib')}
    commit = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], cwd=args.before, capture_output=True, text=True)
    result = dict(model=args.model, pairs=args.pairs, saves=args.saves, before_commit=commit.stdout.strip(), **rows,
                  **ratios, machine=machine())
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__':
    main()
