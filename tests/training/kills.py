"""SIGKILLs at random moments of every command that can resume: `python tests/training/kills.py --kills 150`.

A run is killed once or more often, each time at a moment drawn from the seed: one in five in the first tenth of what
is left of it, one in five at its end, the others anywhere. Moments are counted in processor seconds of the first
process, so that they are spread over the run on a busy machine, too. The last life runs to its end. Then the whole run
must equal the one that nobody disturbed: checkpoints with the optimizer's state, tables, weights, shards, features.
Each life must begin at the step that the newest checkpoint holds. One row for each kill:

seconds    the moment, in processor seconds of the life
reached    steps (shards, parts of features) that were done at the kill, in the order of the undisturbed run
saved      of these, what the disk held
resumed    where the next life began
repeated   reached - saved: what the kill cost
equal      whether the finished run equals the undisturbed one

The exit code is 1 if any run differs or began at another place. bench/results/kills.json has the numbers of
`python tests/training/kills.py --kills 150 --json bench/results/kills.json`, kills_seed1.json those with `--seed 1`.
"""
import argparse
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ['OMP_NUM_THREADS'] = '1'
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from ranks import free_port
from support import fork
from tiny_runs import learner, state_of, wait_for

from mae_nb import command_line, commands
from mae_nb.base.devices import machine
from mae_nb.base.processes import process_group, rank
from mae_nb.data import shards
from mae_nb.data.datasets import SOURCES, load_source
from mae_nb.model.mae import create_mae
from mae_nb.tasks import demo, embed, finetune, study
from mae_nb.tasks.demo import DemoPlan
from mae_nb.tasks.features import Readout
from mae_nb.tasks.study_measures import Cost
from mae_nb.training import runs
from mae_nb.training.guard import Guard
from mae_nb.training.presets import RECIPES
from mae_nb.training.recipes import override
from mae_nb.training.state import newest_checkpoint, same_bits
from mae_nb.weights.loading import save_model

PATIENCE = 3600   # seconds of a life that is not killed, on a machine that is busy


def note(log, *words):
    "Append a line to a file."
    with open(log, 'a') as f:
        f.write(' '.join(map(str, words)) + '\n')


def noted(log): return log.read_text().splitlines() if log.exists() else []


def work_for(seconds):
    "Keep the processor busy."
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def processor_seconds(pid):
    "What a process has used so far; None when it is over."
    try:
        fields = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
    except OSError:
        return None
    used = (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')
    return None if fields[0] in 'ZX' else used


# ---- what a life notes, and what the disk holds --------------------------------------------------------------------

def note_steps(place, log):
    "Let each optimizer step of the first process note its run's folder and last batch."
    def after_step(self):
        if self.out is not None and not rank():
            note(log, self.out.resolve().relative_to(place), self.train_iter)

    Guard.after_step = after_step


def saved_steps(place, whole):
    "How many steps of the undisturbed run are in the checkpoints below a folder."
    known = 0
    for folder in place.rglob('checkpoints'):
        newest, run = newest_checkpoint(folder), str(folder.parent.relative_to(place))
        for i, (name, batch) in enumerate(line.split() for line in whole):
            if newest and name == run and int(batch) < newest[2]['run']['step']:
                known = max(known, i + 1)
    return known


def note_shards(place, log):
    "Pack slowly, and note each shard when it is on the list."
    plain, write, calls = shards.reencode, shards._write_index, []

    def slow(raw, **options):
        work_for(.004)
        return plain(raw, **options)

    def written(out, index):
        write(out, index)
        if calls and not index['complete']:   # the first call writes the list as it was
            note(log, list(index['shards'])[-1])
        calls.append(index)

    shards.reencode, shards._write_index = slow, written


def saved_shards(place, whole):
    return len(shards.read_index(place/'run')['shards']) if (place/'run'/shards.INDEX).exists() else 0


def note_parts(place, log):
    "Embed slowly in small parts, and note each of them."
    embed.PART_BYTES, plain = 2 * 2 * 49 * 32 * 4, embed.Parts.write

    def written(self, number, features):
        plain(self, number, features)
        note(log, number)
        work_for(.02)

    embed.Parts.write = written


def saved_parts(place, whole):
    return len(whole) if (place/'run.npy').exists() else len(list(place.glob('*.parts/*.npy')))


# ---- kinds of runs -------------------------------------------------------------------------------------------------

@dataclass
class Kind:
    "Something that can be killed and resumed."
    name: str
    live: Callable           # place, log, number of the process: one life, in a fork
    processes: int = 1
    workers: int = 0
    watch: Callable = note_steps   # place, log: lets a life note what it does
    saved: Callable = saved_steps  # place, notes of the undisturbed run: how many of them the disk holds
    files: tuple = ()        # patterns of files that must be equal, next to checkpoints, tables and weights

    def start(self, place, log):
        "Begin a life in a folder: its processes."
        place.mkdir(exist_ok=True)
        port = free_port()

        def live(number):
            if self.processes > 1:
                os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(self.processes),
                                  MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
            os.chdir(place)
            self.watch(place, log)
            begin = time.process_time()
            try:
                with process_group():
                    self.live(place, self.workers)
            finally:
                if number == 0:
                    note(log.with_suffix('.seconds'), time.process_time() - begin)

        return [fork(partial(live, r), log.with_suffix(f'.out{r}')) for r in range(self.processes)]

    def compare(self, place, straight):
        "Raise an error where a finished run differs from the undisturbed one."
        for folder in straight.rglob('checkpoints'):
            run = folder.parent.relative_to(straight)
            compare_training(place/run, straight/run)
        for pattern in self.files:
            found = list(straight.rglob(pattern))
            assert found, pattern
            for file in found:
                assert content(place/file.relative_to(straight)) == content(file), file.name
        left = [f for f in place.rglob('*') if f.suffix == '.part' or f.name.startswith('.tmp')]
        assert not left, left


def compare_training(out, straight):
    "Checkpoints, tables and weights."
    (files, tensors, config), (files0, tensors0, config0) = state_of(out), state_of(straight)
    assert config == config0 and tensors.keys() == tensors0.keys(), out
    for name, tensor in tensors.items():
        assert same_bits(tensor, tensors0[name]), (out, name)
    assert files == files0, out


def content(file):
    "A file's bytes; of a JSON file what does not depend on the clock or on the number of lives."
    if file.suffix != '.json':
        return file.read_bytes()
    passing = 'minutes', 'seconds', 'resumed', 'machine', 'versions'
    return {k: v for k, v in json.loads(file.read_text()).items() if k not in passing}


def training(task, workers, processes):
    "A learner of `tiny_runs`."
    more = dict(accumulate=2) if processes > 1 and task != 'linear' else {}
    live = lambda place, workers: learner(task, place/'run', workers, processes, more).fit_recipe()
    return Kind(task, live, processes, workers)


def command(name, *words, again=(), before=None, **options):
    "A console script; `again` are the words of a later life, if they differ."
    def live(place, workers):
        if before:
            before()
        later = again and (place/'run').exists() and any((place/'run').iterdir())
        chosen = again if later else (*words, '--num-workers', workers)
        sys.argv = [name, *map(str, chosen)]
        command_line.main(getattr(commands, name.replace('-', '_')).__wrapped__)

    return Kind(name, live, **options)


def small_set(train, test):
    images = tuple(part.shots(k) for part, k in zip(load_source('fashion'), (train, test)))
    SOURCES['fashion'] = lambda: images


def small_demo():
    "Two epochs on two hundred images."
    small_set(20, 10)
    demo.DEMOS['fashion'] = DemoPlan(Readout((-1,), 2), {5: 2, 20: 1}, (5,))
    for name in ('demo_fashion', 'scratch_fashion', 'finetune_fashion'):
        RECIPES[name] = override(RECIPES[name], dict(epochs=2, warmup_epochs=.1, batch_size=25))


def small_study():
    "Two points on sixty images."
    small_set(6, 4)
    study.measure_cost = lambda *_: Cost(1., 1.)
    runs.plot_metrics = lambda _: Figure()
    finetune._draw_confusion = lambda *_: None


def make_inputs(folder):
    "Pictures and a narrow masked autoencoder."
    for i in range(120):
        place = folder/'photos'/('odd' if i % 2 else 'even')
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 255, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place/f'{i:03}.png')
    torch.manual_seed(0)
    model = create_mae('mae_vit_nano_patch4_28', in_chans=3, depth=2, dim=32, num_heads=2, decoder_dim=16,
                       decoder_depth=1, decoder_heads=2)
    save_model(model, folder/'nano.safetensors', dict(name='made', mean=[.5] * 3, std=[.25] * 3, classes=[]))


def all_kinds(folder):
    "Every kind of run, with its workers and processes."
    kinds = [training(task, workers, processes) for task in ('pretrain', 'finetune', 'linear')
             for processes in (1, 2) for workers in (0, 2)]
    photos, weights = folder/'photos', folder/'nano.safetensors'
    for workers in (0, 2):
        kinds.append(command('mae-pack', photos, 'run', '--per-shard', 8, '--max-side', 30, workers=workers,
                             watch=note_shards, saved=saved_shards, files=('*.arrow', '*.json')))
        kinds.append(command('mae-embed', photos, weights, '--out', 'run.npy', '--device', 'cpu', '--bs', 2, '--tokens',
                             'patches', '--block', 0, workers=workers, watch=note_parts, saved=saved_parts,
                             files=('run.npy', 'run.csv')))
    kinds.append(command('mae-demo', '--data', 'fashion', '--out', 'run', before=small_demo,
                         again=('--data', 'fashion', '--resume', 'run'), files=('results.json',)))
    kinds.append(command('mae-study', 'mask-ratio', '--points', '.5,.9', '--seeds', 1, '--set', 'batch_size=30',
                         '--labels', 5, '--tune', 'epochs=1', '--device', 'cpu', '--out', 'run', '--epochs', 4,
                         '--save-every', 1, again=('--resume', 'run'), before=small_study, files=('points.csv',)))
    return kinds


# ---- the campaign --------------------------------------------------------------------------------------------------

@dataclass
class Straight:
    "The run that nobody disturbed."
    place: Path
    notes: list      # its steps
    seconds: float   # of the processor, of its first process


def undisturbed(kind, folder):
    log = folder/'straight.log'
    codes = wait_for(kind.start(folder/'straight', log), PATIENCE)
    assert codes == [0] * kind.processes, outputs(log)
    notes = noted(log)
    assert len(notes) == len(set(notes)) > 3, notes
    return Straight(folder/'straight', notes, float(noted(log.with_suffix('.seconds'))[0]))


def outputs(log): return ''.join(f.read_text() for f in sorted(log.parent.glob(f'{log.stem}.out*')))


def is_finished(codes, log):
    "Whether a life came to its end; mae-embed reports a job that was finished already as a file that exists."
    return set(codes) == {0} or 'run.npy exists already' in outputs(log)


def draw_moment(draw, expected):
    "When a life of so many seconds is killed: at its beginning, at its end, or anywhere."
    zone = draw.choice(('first', 'any', 'any', 'any', 'last'))
    low, high = dict(first=(0., .1), any=(0., 1.), last=(.85, 1.))[zone]
    return zone, draw.uniform(low, high) * expected


def cut_life(kind, pids, moment, draw, log):
    "Kill a life at its moment: who was killed, or None if it was over by then."
    used = 0.
    while used is not None and used < moment:
        time.sleep(.002)
        used = processor_seconds(pids[0])
    victims = draw.choice(([0], [1], [0, 1])) if kind.processes > 1 else [0]
    for i in victims:
        os.kill(pids[i], signal.SIGKILL)
    codes = wait_for(pids, 20)   # what one that waits for a dead one in vain is given
    assert -signal.SIGKILL in codes or is_finished(codes, log), outputs(log)
    return [i for i in victims if codes[i] == -signal.SIGKILL]


class Campaign:
    "Kills of all kinds of runs, in turn."
    def __init__(self, folder, seed, names=None):
        make_inputs(folder)
        self.folder, self.seed, self.straights, self.rows = folder, seed, {}, []
        self.kinds = [kind for kind in all_kinds(folder) if not names or kind.name in names]

    def run(self, kills, show=print):
        "So many kills, spread over the kinds; the rows have what each of them cost."
        number = 0
        while len(self.rows) < kills:
            kind = self.kinds[number % len(self.kinds)]
            rows = self.one_run(kind, number, kills - len(self.rows))
            show(f"{len(self.rows) + len(rows)} of {kills}: {kind.name}, {kind.workers} workers, {kind.processes} "
                 f"processes: " + ', '.join(f"{r['zone']} {r['reached']}/{r['saved']}/{r['resumed']}" for r in rows)
                 + ('' if all(r['equal'] for r in rows) else f"  NOT EQUAL: {rows[0]['fault']}"))
            self.rows += rows
            number += 1
        return self.rows

    def straight(self, kind):
        key = f'{kind.name}-{kind.processes}'
        if key not in self.straights:
            (self.folder/key).mkdir()
            self.straights[key] = undisturbed(kind, self.folder/key)
        return self.straights[key]

    def one_run(self, kind, number, most):
        "Kill a run up to three times, let it finish, and compare it: a row for each kill."
        draw, whole = random.Random(f'{self.seed} {number}'), self.straight(kind)
        place, rows, fault = self.folder/f'run{number}', [], ''
        place.mkdir()
        lives = draw.randint(1, min(3, most))
        for life in range(lives + 1):
            log = self.folder/f'run{number}-{life}.log'
            saved = kind.saved(place, whole.notes)
            expected = whole.seconds * max(1 - saved / len(whole.notes), .15)
            pids = kind.start(place, log)
            last = life == lives
            if last:
                zone, moment, victims = '', 0., []
                codes = wait_for(pids, PATIENCE)
                fault = fault or ('' if is_finished(codes, log) else f'exit codes {codes}: {outputs(log)[-500:]}')
            else:
                zone, moment = draw_moment(draw, expected)
                victims = cut_life(kind, pids, moment, draw, log)
            fault = fault or check_life(whole.notes, noted(log), saved)
            if rows and 'resumed' not in rows[-1]:
                rows[-1]['resumed'] = saved if not noted(log) else whole.notes.index(noted(log)[0])
            if victims:
                now = kind.saved(place, whole.notes)
                reached = max(saved + len(noted(log)), now)
                rows.append(dict(kind=kind.name, workers=kind.workers, processes=kind.processes, run=number, zone=zone,
                                 seconds=round(moment, 3), of_seconds=round(expected, 3), victims=victims,
                                 steps=len(whole.notes), reached=reached, saved=now, repeated=reached - now))
        fault = fault or difference(kind, place, whole)
        assert rows or not fault, fault   # a run that was over before each kill
        for row in rows:
            row['equal'] = not fault
            row['fault'] = fault
        if not fault:
            shutil.rmtree(place)
        return rows


def check_life(whole, notes, saved):
    "What is wrong with where a life began and what it did, if anything."
    expected = whole[saved:saved + len(notes)]
    return '' if notes == expected else f'a life from {saved} saved steps did {notes[:3]}, not {expected[:3]}'


def difference(kind, place, whole):
    "How a finished run differs from the undisturbed one, if it does."
    try:
        kind.compare(place, whole.place)
    except Exception as e:
        return ' '.join(f'{type(e).__name__}: {e}'.split())[:500]
    return ''


def summary(rows):
    "The table: a line for each kind of run."
    groups = {}
    for row in rows:
        groups.setdefault((row['kind'], row['processes'], row['workers']), []).append(row)
    table = []
    for (kind, processes, workers), some in sorted(groups.items()):
        lost = [row['repeated'] for row in some]
        table.append(dict(kind=kind, processes=processes, workers=workers, kills=len(some),
                          resumed=sum(row['resumed'] == row['saved'] for row in some),
                          equal=sum(row['equal'] for row in some), median_repeated=statistics.median(lost),
                          most_repeated=max(lost)))
    return table


def show_table(table):
    names = list(table[0])
    print('| ' + ' | '.join(names).replace('_', ' ') + ' |\n' + '|---' * len(names) + '|')
    for row in table:
        print('| ' + ' | '.join(str(row[name]) for name in names) + ' |')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=150)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--only', nargs='+', help='kinds of runs, such as pretrain mae-pack')
    parser.add_argument('--json', type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    start, folder = time.time(), Path(tempfile.mkdtemp())
    campaign = Campaign(folder, args.seed, args.only)
    rows = campaign.run(args.kills, partial(print, flush=True))
    table = summary(rows)
    show_table(table)
    faults = [row for row in rows if not row['equal'] or row['resumed'] != row['saved']]
    print(f'{len(rows)} kills, {len(rows) - len(faults)} resumed where they were saved and ended equal, '
          f'{time.time() - start:.0f} s')
    if args.json:
        result = dict(kills=len(rows), seed=args.seed, faults=len(faults), table=table, rows=rows, machine=machine())
        args.json.write_text(json.dumps(result, indent=1) + '\n')
    if not faults:
        shutil.rmtree(folder)
    sys.exit(bool(faults))


if __name__ == '__main__':
    main()
