"""A newcomer's first hour: every command line that README, tutorials, chapters and helps show does its work.

Each runs in a terminal of 80 columns and with its output in a file: nothing wraps, nothing is silent for more than
five seconds, and no other library's warning appears. The table in `command_lines` shows what is changed in a line so
that it takes seconds; a new line is run without a change, or fails here.
"""
import os
import re
import shlex

import pytest
import tomllib
from command_lines import ELSEWHERE, SMALL, shown_lines, small_row, small_words
from homes import copy_home, make_home
from support import BIN, ROOT
from watching import Watcher

pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='runs commands in forks, which Windows lacks')
LINES = list({shown.line: shown for shown in shown_lines()}.values())
OURS = [shown for shown in LINES if shown.line not in ELSEWHERE]
ALONE = [shown for shown in OURS if not shown.line.startswith('torchrun')]
# slow: what takes long, and what the lines of other pages do with the same words
LONG = ('mae-demo', 'mae-study', 'mae-plan pretrain --model', 'mae-plan pretrain_1600 --model mae_vit_large_patch16',
        'mae-convert runs/pretrain-1 features', 'mae-probe partial fashion', 'mae-finetune fashion runs',
        'mae-finetune fashion --from-scratch')
# with a new process each, as a newcomer starts them, and whether in a terminal
REAL = [('mae-check path/to/photos', True), ('mae-convert runs/pretrain-1 vit-mae --format hf', False)]


@pytest.fixture(scope='session')
def watcher():
    watcher = Watcher()
    yield watcher
    watcher.close()


@pytest.fixture(scope='session')
def home(tmp_path_factory, watcher):
    home = tmp_path_factory.mktemp('home')
    make_home(home, watcher)
    return home


def faults_of(shown, home, folder, watcher, terminal, **options):
    launcher, words = small_words(shown.line)
    folder = copy_home(home, folder, words)
    options |= dict(own_process=True) if launcher else {}
    if launcher:
        words = [*launcher, BIN/words[0], *words[1:]]
    return watcher.run(words, folder, terminal, **options).faults()


def cases(lines):
    return [pytest.param(shown, marks=[pytest.mark.slow] * shown.line.startswith(LONG), id=shown.line)
            for shown in lines]


def test_every_line_is_known():
    "A command of ours with a row in the table, or one that sets up a machine and is tested elsewhere."
    assert [str(shown) for shown in OURS if small_row(shown.line) is None] == []


def test_no_row_of_the_tables_is_out_of_date():
    used = {small_row(shown.line)[0] for shown in OURS}
    assert {row[0] for row in SMALL} == used
    assert set(ELSEWHERE) <= {shown.line for shown in LINES}


def test_an_extra_that_is_named_exists():
    extras = tomllib.loads((ROOT/'pyproject.toml').read_text())['project']['optional-dependencies']
    named = [name for shown in LINES for name in re.findall(r'\.\[(\w+)\]', shown.line)]
    assert len(named) > 1 and set(named) <= set(extras)


@pytest.mark.parametrize('shown', cases(ALONE))
def test_in_a_terminal(shown, home, tmp_path, watcher):
    assert faults_of(shown, home, tmp_path, watcher, terminal=True, seconds=300) == []


@pytest.mark.slow
@pytest.mark.parametrize('shown', cases(ALONE))
def test_in_a_file(shown, home, tmp_path, watcher):
    assert faults_of(shown, home, tmp_path, watcher, terminal=False, seconds=300) == []


@pytest.mark.parametrize('line, terminal', REAL)
def test_in_a_process_of_its_own(line, terminal, home, tmp_path, watcher):
    "Nothing is imported yet: no silence while it is, no warning of what is."
    shown, = [shown for shown in OURS if shown.line == line]
    assert faults_of(shown, home, tmp_path, watcher, terminal, own_process=True) == []


@pytest.mark.slow
@pytest.mark.parametrize('terminal', [True, False], ids=['terminal', 'file'])
@pytest.mark.parametrize('shown', cases([shown for shown in OURS if shown not in ALONE]))
def test_under_torchrun(shown, terminal, home, tmp_path, watcher):
    assert faults_of(shown, home, tmp_path, watcher, terminal, seconds=180) == []


def test_lines_in_the_text_are_parsed():
    "Commands in running text: their words are flags and values that the parser takes."
    from mae_nb import command_line, commands
    texts = [(ROOT/'README.md').read_text(), *(f.read_text() for f in sorted((ROOT/'nbs').rglob('*.ipynb')))]
    texts += [f.read_text() for f in sorted((ROOT/'tutorials').glob('*.ipynb'))]
    lines = {line for text in texts for line in re.findall(r'`(mae-[a-z]+ [^`\\]+)`', text)}
    whole = sorted(line for line in lines if not re.search(r'\.\.\.|\b[A-Z]{2,}\b|\||--[a-z-]+$', line))
    assert len(whole) > 3
    for line in whole:
        name, *words = shlex.split(line)
        if '--help' not in words:
            command_line.anno_parser(getattr(commands, name.replace('-', '_')).__wrapped__).parse_args(words)
