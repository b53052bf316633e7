"""Runs that nobody disturbs, made once for all tests that compare with them."""
import time
from functools import cache, partial
from types import SimpleNamespace

import pytest
from tiny_runs import WORDS, in_fork, live, run_command, steps_of


@pytest.fixture(scope='session')
def straight(tmp_path_factory):
    "The run that nobody disturbs, made once for each task: its folder, its steps, and the seconds it took."
    @cache
    def run(task):
        out = tmp_path_factory.mktemp('straight')/task
        begin = time.time()
        in_fork(partial(live, task, out, out.with_suffix('.steps')), out.with_suffix('.log'))
        return SimpleNamespace(out=out, steps=steps_of(out.with_suffix('.steps')), seconds=time.time() - begin)
    return run

@pytest.fixture(scope='session')
def undisturbed(tmp_path_factory):
    "The command's run that nobody disturbs, and its steps."
    folder = tmp_path_factory.mktemp('command')
    got, steps = run_command(folder, folder/'steps', *WORDS, '--out', 'run')
    assert got.code == 0, got.err
    return folder/'run', steps

@pytest.fixture
def pretrain(tmp_path):
    "Run `mae-pretrain`, note its steps in a file of this name, and give its output and the steps."
    return lambda log, *words, **kwargs: run_command(tmp_path, tmp_path/f'{log}.steps', *words, **kwargs)
