"""The functions that a value passes through, from the command line on, in the order of their calls.

    python bench/walk.py [--folder CHECKOUT] [--list]

Three values are followed through one step of `mae-pretrain fashion`: a mask ratio and a seed that occur nowhere else,
and one image (the functions that are called to fetch one batch). A stop is a function of ours that gets the value as an
argument: bare, in a short string, a list or a dict; each function counts once, where it is met first. A record that
carries the value along (options, a recipe, a data set) makes no stop, and the tools of `base` are none either.
A return is a stop in a module that the walk had left before.
"""
import argparse
import contextlib
import io
import os
import sys
import tempfile
from importlib import import_module
from pathlib import Path

RATIO, SEED = 0.6125, 918273
TOOLS = ('base/', 'keyed', 'settings', 'distributed')   # today's package, and the flat modules before it


def holds(value, marker, depth=3) -> bool:
    "Whether a value is the marker or contains it."
    if isinstance(value, str):
        return len(value) < 50 and str(marker) in value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value == marker
    if depth == 0:
        return False
    if isinstance(value, dict):
        return any(holds(v, marker, depth - 1) for v in value.values())
    if isinstance(value, (list, tuple)):
        return any(holds(v, marker, depth - 1) for v in value)
    return False


class Walk:
    "Notes the stops of a value while it is entered; with no marker, every function of ours."
    def __init__(self, folder: Path, marker=None):
        self.root, self.marker, self.stops = str(folder/'mae_nb'), marker, []

    def __enter__(self):
        sys.setprofile(self.note)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)

    def note(self, frame, event, arg):
        code = frame.f_code
        if event != 'call' or not code.co_filename.startswith(self.root) or code.co_name.startswith('<'):
            return
        count = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 4) + bool(code.co_flags & 8)
        given = {k: frame.f_locals.get(k) for k in code.co_varnames[:count] if k != 'self'}
        if self.marker is None or any(holds(v, self.marker) for v in given.values()):
            module = code.co_filename.removeprefix(self.root).strip('/').removesuffix('.py')
            stop = module, getattr(code, 'co_qualname', code.co_name)
            if stop not in self.stops and stop != ('mae', 'pick') and not module.startswith(TOOLS):
                self.stops.append(stop)

    def returns(self) -> int:
        "Stops in a module that the walk had left before."
        seen, count = [], 0
        for module, _ in self.stops:
            if seen and seen[-1] != module:
                count += module in seen
            seen.append(module)
        return count


def pretrain_once(folder: Path, marker):
    "One step of `mae-pretrain`, in this process."
    from fastcore.script import _run_cli
    flat = not (folder/'mae_nb'/'commands.py').is_file()   # the version before packages
    commands = import_module('mae_nb.cli' if flat else 'mae_nb.commands')
    sys.argv = ['mae-pretrain', 'fashion', '--max-steps', '1', '--bs', '16', '--seed', str(SEED), '--num-workers', '0',
                '--set', f'mask_ratio={RATIO}', '--out', 'run', '--device', 'cpu']
    with Walk(folder, marker) as walk, contextlib.redirect_stdout(io.StringIO()):
        _run_cli(commands.mae_pretrain.__wrapped__, False)
    return walk


def fetch_one(folder: Path):
    "One batch of one image."
    from mae_nb.all import RECIPES, PretrainRecipe, get_dls, load_source
    assert PretrainRecipe
    train, _ = load_source('fashion')
    dls = get_dls((train.take([0]), None), RECIPES['pretrain_fashion'], img_size=28, bs=1, num_workers=0, device='cpu')
    with Walk(folder) as walk:
        next(iter(dls.train))
    return walk


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--folder', type=Path, default=Path(__file__).resolve().parents[1])
    parser.add_argument('--list', action='store_true')
    args = parser.parse_args()
    folder = args.folder.resolve()
    sys.path.insert(0, str(folder))
    runs = {
        'mask_ratio': lambda: pretrain_once(folder, RATIO),
        'seed': lambda: pretrain_once(folder, SEED),
        'one image': lambda: fetch_one(folder)}
    for name, run in runs.items():
        with tempfile.TemporaryDirectory() as place:
            os.chdir(place)
            walk = run()
        modules = len({module for module, _ in walk.stops})
        print(f'{name}: {len(walk.stops)} stops in {modules} modules, {walk.returns()} returns')
        for module, function in walk.stops if args.list else ():
            print(f'    {module:28} {function}')


if __name__ == '__main__':
    main()
