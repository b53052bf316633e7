"""The campaign of damaged inputs finds what it looks for, and a small one of every kind finds nothing."""
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from campaign import GOOD, attempt, campaign
from damage import damage, damage_words
from kinds import KINDS, Kind, make_lines

pytestmark = pytest.mark.skipif(sys.platform == 'win32', reason='forks')


@pytest.mark.parametrize('inputs', [20, pytest.param(2200, marks=pytest.mark.slow)])
@pytest.mark.parametrize('kind', KINDS)
def test_damaged_inputs_are_read_or_refused(kind, inputs):
    counts, faults = campaign(kind, seed=1, first=0, inputs=inputs)
    assert sum(counts.values()) == inputs and set(counts) <= set(GOOD), faults[:5]


def raises(error):
    def read(file): raise error
    return read


@pytest.mark.parametrize('read, is_checked, outcome', [
    (lambda file: file.read_bytes()[:0], True, 'read'),
    (lambda file: file.read_bytes(), True, 'accepted'),
    (raises(KeyError('names')), False, 'unclear'),
    (raises(ValueError('wrong')), False, 'unnamed'),
])
def test_what_comes_of_an_input(tmp_path, read, is_checked, outcome):
    file, rng = tmp_path/'file', np.random.default_rng(0)
    file.write_bytes(b'as it was')
    valid = read(file) if is_checked else None
    assert attempt(Kind(None, read, is_checked), file, b'as it was', valid, rng)['outcome'] == outcome
    assert file.read_bytes() == b'as it was'


def test_damage_comes_from_the_seed():
    inputs = (b'{"a": [1, 2]}', damage), (b'\xff\xd8' * 40, damage), (make_lines(None)[0], damage_words)
    for original, change in inputs:
        changed = [change(original, np.random.default_rng(n))[0] for n in range(30)]
        assert changed == [change(original, np.random.default_rng(n))[0] for n in range(30)]
        assert change is damage_words or original not in changed
