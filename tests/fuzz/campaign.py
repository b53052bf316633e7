"""Damaged inputs, by the thousand: `python tests/fuzz/campaign.py --inputs 20000`.

Each input is a valid file of ours or a command line, damaged by chance. The chance is drawn from the seed and the
input's number, so `--kind weights --first 417 --inputs 1` repeats a single one. What comes of it is counted:

read      it was read, and nothing says that it should not have been
refused   an error that says what is wrong, in one line
unclear   an error of Python's own, such as a KeyError, that does not say what is wrong with the file
unnamed   an error that does not name the file or its folder
accepted  it was read although a checksum of ours must have told
large     it took more than a GiB of memory
hung      it took more than twenty seconds
crashed   the process ended

All but the first two are faults; the exit code is 1 if there is any.
"""
import argparse
import json
import os
import resource
import select
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from damage import damage, damage_words
from kinds import KINDS

GOOD = 'read', 'refused'   # every other outcome is a fault
UNCLEAR = (KeyError, IndexError, TypeError, AttributeError, AssertionError, ArithmeticError, RecursionError,
           NotImplementedError, NameError, StopIteration)
SELF = 9       # exit code of a child that could not read valid inputs
SECONDS = 20   # until an input has hung
GIB = 2**20    # in the units of `ru_maxrss`


def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def attempt(kind, file, original, valid, rng):
    "Damage one file, or one command line; read it; and name what comes of it, with the error's text."
    change = damage_words if kind.words else damage
    damaged, how = change(original, rng)
    before = peak()
    if file is not None:
        file.write_bytes(damaged)
    try:
        value = kind.read(damaged if file is None else file)
        outcome, text = 'accepted' if kind.is_checked and value != valid else 'read', ''
    except UNCLEAR as e:
        outcome, text = 'unclear', f'{type(e).__name__}: {e}'
    except Exception as e:
        outcome, text = 'refused', f'{type(e).__name__}: {e}'
        if kind.is_named and str(file.parent) not in text:
            outcome = 'unnamed'
    finally:
        if file is not None:
            file.write_bytes(original)
    if peak() - before > GIB:
        outcome = 'large'
    return dict(outcome=outcome, how=how, file=None if file is None else file.name, text=' '.join(text.split())[:300])


def work(kind, folder, seed, first, last, pipe):
    "In a child: one line of JSON for each input."
    files = kind.make(folder)
    originals = [f if isinstance(f, list) else f.read_bytes() for f in files]
    valid = [kind.read(file) for file in files]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    for number in range(first, last):
        rng = np.random.default_rng([seed, number])
        pick = int(rng.integers(len(files)))
        file = None if kind.words else files[pick]
        row = attempt(kind, file, originals[pick], valid[pick], rng)
        os.write(pipe, (json.dumps(dict(number=number) | row) + '\n').encode())


def rows_of(pid, pipe):
    "The child's lines as they come; at its end, or when it hangs, how it ended."
    rest = b''
    while True:
        if not select.select([pipe], [], [], SECONDS)[0]:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            yield dict(outcome='hung')
            return
        data = os.read(pipe, 2**16)
        if not data:
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            if code == SELF:
                sys.exit('the campaign itself is at fault')
            if code:
                yield dict(outcome='crashed', text=f'exit code {code}')
            return
        *lines, rest = (rest + data).split(b'\n')
        yield from map(json.loads, lines)


def campaign(name, seed, first, inputs):
    "All inputs of a kind, in children: one more after each crash."
    number, last, faults, counts = first, first + inputs, [], Counter()
    while number < last:
        with tempfile.TemporaryDirectory() as folder:
            out, into = os.pipe()
            pid = os.fork()
            if not pid:
                try:
                    work(KINDS[name], Path(folder), seed, number, last, into)
                    os._exit(0)
                except BaseException as e:
                    os.write(2, f'{name}: {e!r}\n'.encode())
                    os._exit(SELF)
            os.close(into)
            for row in rows_of(pid, out):
                row = dict(number=number) | row
                number = row['number'] + 1
                counts[row['outcome']] += 1
                if row['outcome'] not in GOOD:
                    faults.append(dict(kind=name) | row)
            os.close(out)
    return counts, faults


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--inputs', type=int, default=20_000, help='in all, shared by the kinds')
    parser.add_argument('--first', type=int, default=0, help='number of the first input of each kind')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--kind', choices=sorted(KINDS), help='one kind alone')
    parser.add_argument('--json', help='also write counts and faults to this file')
    options = parser.parse_args()
    names = [options.kind] if options.kind else list(KINDS)
    each = -(-options.inputs // len(names))
    table, all_faults = {}, []
    for name in names:
        start = time.time()
        counts, faults = campaign(name, options.seed, options.first, each)
        table[name] = dict(counts)
        all_faults += faults
        print(f'{name:12} {dict(counts)}  {time.time() - start:.0f} s', flush=True)
    for fault in all_faults[:50]:
        print(fault)
    if options.json:
        result = dict(seed=options.seed, table=table, faults=all_faults)
        Path(options.json).write_text(json.dumps(result, indent=1) + '\n')
    sys.exit(bool(all_faults))


if __name__ == '__main__':
    main()
