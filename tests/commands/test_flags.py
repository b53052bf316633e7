"""Each number has a range, each help tells what its parser takes, each flag and field has an effect or an error."""
import re
import shlex
from dataclasses import fields
from inspect import signature

import pytest

from mae_nb import command_line, commands
from mae_nb.base.errors import UsageError
from mae_nb.base.names import RANGES
from mae_nb.tasks import pretrain, probes, visualize  # noqa: F401  a fork then need not import them
from mae_nb.training.presets import RECIPES
from mae_nb.training.recipes import UNSET, override

NAMES = sorted(name for name in vars(commands) if name.startswith('mae_'))
NEEDED = {   # words that a command cannot do without
    'mae_pretrain': ['fashion'], 'mae_finetune': ['fashion', '--from-scratch'],
    'mae_probe': ['partial', 'fashion', 'w'],
    'mae_show': ['w', 'one.jpg'], 'mae_convert': ['w', 'to'], 'mae_pack': ['photos', 'to'], 'mae_check': ['fashion'],
    'mae_study': ['mask-ratio', '--data', 'fashion'],
    'mae_bench': ['step'], 'mae_plan': ['partial'], 'mae_replay': ['step'], 'mae_demo': [],
    'mae_eval': ['fashion', 'w'], 'mae_embed': ['fashion', 'w', '--out', 'x.npy'],
    'mae_neighbours': ['x.npy', 'fashion'], 'mae_course': ['student', '--out', 'x'],
    'mae_segment': ['pairs', 'w'],
}


def parser_of(name):
    return command_line.anno_parser(getattr(commands, name).__wrapped__)


def numbers_of(name):
    "The flags of a command that take a number, with how each is read."
    readers = {action.dest: action.type for action in parser_of(name)._actions}
    numeric = (int, float, command_line._size, command_line._blocks, command_line._numbers)
    return {flag: reader for flag, reader in readers.items() if reader in numeric}


def test_every_number_of_every_command_has_a_range():
    numbers = {(name, flag) for name in NAMES for flag in numbers_of(name)}
    assert len(numbers) > 30
    assert {flag for _, flag in numbers} <= RANGES.keys()


@pytest.mark.parametrize('name', NAMES)
def test_a_number_out_of_its_range_is_an_error_that_names_it(name):
    "Below the smallest and above the largest, before anything is read or written."
    words = parser_of(name).parse_args(NEEDED[name])
    given = {k: v for k, v in vars(words).items() if k not in ('pdb', 'xtra', 'images')}
    images = [vars(words)['images']] if 'images' in vars(words) else []
    for flag in numbers_of(name):
        smallest, largest, whole = RANGES[flag]
        for value in (0 if 0 < smallest < 1 else smallest - 1, largest + 1):
            options = given | {flag: value}
            first = [options.pop('where'), *images] if images else []
            with pytest.raises(UsageError, match=f'`{flag}` must be'):
                getattr(commands, name)(*first, **options)


@pytest.mark.parametrize('name', NAMES)
def test_a_help_has_subjects_an_example_and_questions(name, monkeypatch):
    monkeypatch.setenv('COLUMNS', '80')
    text = command_line.help_text(getattr(commands, name))
    assert 'examples:' in text and '--version' in text
    for flag in signature(getattr(commands, name)).parameters:
        assert flag in text or f'--{flag.replace("_", "-")}' in text, flag
    body = text.partition('examples:')[0]
    assert max(map(len, body.splitlines())) <= 80


@pytest.mark.parametrize('name', NAMES)
def test_examples_are_read_by_their_parser(name):
    "And the values that a help names in words are values that the parser takes."
    parser = parser_of(name)
    for example in getattr(commands, name).examples:
        parser.parse_args(shlex.split(example))
    if '--blocks' in parser.format_help():
        assert parser.parse_args([*NEEDED[name], '--blocks', 'all']).blocks == 'all'
        assert parser.parse_args([*NEEDED[name], '--blocks', '0.5']).blocks == .5
    if '--img-size' in parser.format_help():
        assert parser.parse_args([*NEEDED[name], '--img-size', '160,224']).img_size == (160, 224)


def test_names_can_be_listed(forked):
    models = forked('mae-pretrain', '--list-models')
    assert models.code == 0 and 'mae_vit_small_patch16' in models.out
    recipes = forked('mae-pretrain', '--list-recipes')
    assert {line.split()[0] for line in recipes.out.splitlines()} == set(RECIPES)
    fields_of = forked('mae-pretrain', '--list-recipes', 'pretrain')
    assert 'mask_ratio' in fields_of.out
    assert re.fullmatch(r'mae_nb \d+\.\d+\S*', forked('mae-plan', '--version').out.strip())


# ---- recipes --------------------------------------------------------------------------------------------------------

WRONG = {int: [-1, 10**30], float: [float('nan'), float('inf'), -1e-3], tuple: [(2., 3.), (-1., .5)],
         str: ['no_such_name']}
OF_EACH_TASK = {recipe.task: recipe for recipe in RECIPES.values()}


@pytest.mark.parametrize('task', OF_EACH_TASK)
def test_every_field_of_a_recipe_has_a_range(task):
    recipe = OF_EACH_TASK[task]
    for f in fields(recipe):
        for value in WRONG.get(f.type, []):
            if (task, f.name) == ('segment', 'crop_scale'):   # factors, which may be above 1
                value = value[::-1]
            with pytest.raises(UsageError, match=f.name):
                override(recipe, {f.name: value})


@pytest.mark.parametrize('name', UNSET)
def test_zero_is_no_silent_default(name):
    with pytest.raises(UsageError, match=f'{name} must be above 0'):
        override(RECIPES['pretrain'], [f'{name}=0'])


def test_a_recipe_of_another_task_is_one_line(forked):
    got = forked('mae-pretrain', 'fashion', '--recipe', 'finetune')
    assert got.code == 2 and '--recipe finetune is for finetune, not for pretrain' in got.line


@pytest.mark.parametrize('words, part', [
    (['mae-pretrain', 'fashion', '--out', '/proc/xx'], '/proc/xx: '),
    (['mae-pretrain', 'fashion', '--set', 'decoder_depth=0'], 'decoder_depth'),
    (['mae-show', 'no_such_folder', 'one.jpg'], 'no_such_folder'),
    (['mae-bench', 'loader', '--pairs', '3'], '--pairs has no meaning for loader'),
    (['mae-plan', 'finetune', '--blocks', '2'], '--blocks has no meaning for finetune'),
    (['mae-plan', 'knn'], 'no run to plan'),
])
def test_what_cannot_work_is_one_line_that_names_it(words, part, forked):
    got = forked(*words)
    assert got.code in (1, 2) and part in got.line and '[Errno' not in got.line


def test_options_of_a_model_are_suggested_from_the_whole_list():
    from mae_nb.model.mae import create_mae
    with pytest.raises(UsageError, match="did you mean 'mask_ratio'"):
        create_mae('mae_vit_nano_patch4_28', mask_ration=.5)
