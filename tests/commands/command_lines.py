"""The command lines that the project shows, and the small variant of each that a test runs."""
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from support import ROOT

from mae_nb import commands

NANO = '--model mae_vit_nano_patch4_32'
QUICK = '--bs 8 --num-workers 0 --max-steps 2 --set warmup_epochs=0'
PACKED = f'{NANO} {QUICK} --set target=pixels'
STUDY = (f'{NANO} --bs 8 --epochs 1 --seeds 1 --labels 2 --num-workers 0 --set warmup_epochs=0 '
         '--tune epochs=1 --tune warmup_epochs=0')

# The beginning of a line, and what a test changes in it: words replaced, and words added at the end, where the last
# of two values holds. The first row that fits counts. A line without a row runs as it stands.
SMALL = [
    ('mae-pretrain --resume', {}, ''),
    ('mae-pretrain fashion', {}, '--bs 50 --max-steps 2 --set warmup_epochs=0'),
    ('mae-pretrain path/to/photos --model', {}, QUICK),
    ('mae-pretrain path/to/photos --out', {}, f'{NANO} {QUICK}'),
    ('mae-pretrain data/packed', {}, f'{PACKED} --set accumulate=1'),
    ('mae-pretrain data/imagenet', {}, PACKED),
    ('mae-finetune fashion --from-scratch --epochs', {}, '--bs 50 --max-steps 2 --set warmup_epochs=0'),
    ('mae-finetune fashion --from-scratch', {'fashion': 'path/to/labelled'}, f'{NANO} {QUICK}'),
    ('mae-finetune fashion', {'fashion': 'path/to/labelled'}, QUICK),
    ('mae-finetune path/to/labelled --from-scratch', {}, f'{NANO} {QUICK}'),
    ('mae-finetune path/to/labelled mae_pretrain_vit_base', {'mae_pretrain_vit_base': 'runs/pretrain-1'}, QUICK),
    ('mae-finetune path/to/labelled', {}, QUICK),
    ('mae-finetune data/packed', {}, QUICK),
    ('mae-probe linear fashion runs/pretrain-1 --fast', {'fashion': 'path/to/labelled'}, '--num-workers 0 --bs 8'),
    ('mae-probe knn', {'fashion': 'path/to/labelled'}, '--num-workers 0 --bs 8 --set k=2'),
    ('mae-probe', {'fashion': 'path/to/labelled'}, QUICK),
    ('mae-show facebook/vit-mae-base', {'facebook/vit-mae-base': 'runs/base'}, ''),   # 0.4 GB from the hub
    ('mae-pack', {}, '--num-workers 0'),
    ('mae-check path/to/scenes', {'path/to/scenes': 'path/to/photos'}, '--num-workers 0'),
    ('mae-check path', {}, '--num-workers 0'),
    ('mae-bench step', {}, f'{NANO} --bs 2 --pairs 2 --steps 1'),
    ('mae-bench loader', {}, '--bs 8 --steps 2 --num-workers 0'),
    ('mae-plan finetune', {}, ''),
    ('mae-plan pretrain --model', {}, NANO),
    ('mae-plan pretrain_1600 --model mae_vit_large_patch16', {}, NANO),
    ('mae-plan', {}, ''),
    ('mae-study mask-ratio', {'cifar10': 'path/to/labelled'}, f'{STUDY} --points .5,.75'),
    ('mae-study own', {}, f'{STUDY} --data path/to/labelled'),
    ('mae-demo', {}, '--epochs 1'),
    ('mae-check', {}, ''),
    ('mae-show', {}, ''),
    ('mae-convert runs/finetune-1 program --format onnx --quantize', {'fashion': 'path/to/labelled'}, ''),
    ('mae-convert', {}, ''),
    ('mae-eval path/to/imagenet/val', {'path/to/imagenet/val': 'path/to/labelled'}, '--num-workers 0 --bs 8'),
    ('mae-eval path/to/labelled', {'vit_b_16.pth': 'runs/finetune-1'}, '--num-workers 0 --bs 8'),
    ('mae-embed', {'mae_pretrain_vit_base.pth': 'runs/pretrain-1'}, '--num-workers 0 --bs 8'),
    ('mae-neighbours', {'cats/12.jpg': 'cats/001.jpg'}, ''),
    ('mae-segment path/to/ADEChallengeData2016', {'path/to/ADEChallengeData2016': 'path/to/pairs',
                                                  'mae_pretrain_vit_base.pth': 'runs/pretrain-1'},
     f'{QUICK} --head linear --img-size 64'),
    ('mae-segment', {}, ''),
    ('mae-replay', {}, ''),
    ('mae-course', {}, ''),
]
# torchrun's own words: two processes in one machine
PROCESSES = {'--nproc-per-node': '2', '--nnodes': '1', '--rdzv-endpoint': 'localhost:0'}

# Lines that set up a machine or need ImageNet's thousand classes, and where they are tested.
ELSEWHERE = {
    'python3 -m venv .venv': 'needs no package of ours',
    '. .venv/bin/activate': 'needs no package of ours',
    'pip install -e .': 'test_package installs the project',
    "pip install -e '.[dev]'": 'test_package installs the project; the extra is looked up here',
    "pip install -e '.[book]'": 'test_package installs the project; the extra is looked up here',
    'python tests/check.py': 'runs this test',
    'mae-eval path/to/imagenet-c mae_finetuned_vit_base.pth --variant imagenet-c': 'test_evaluate',
    'mae-eval path/to/imagenet-r mae_finetuned_vit_base.pth --variant imagenet-r': 'test_evaluate',
    'jupyter lab --ServerApp.root_dir=. nbs/course/00_introduction.ipynb': 'test_browser opens the book',
    'jupyter lab --ServerApp.root_dir=. nbs_zh/course/00_introduction.ipynb': 'test_browser opens the English book',
    'python zh/build.py': 'test_chinese builds the Chinese book',
    'pip install -e ".[wandb,mlflow]"': 'test_package installs the project; the extras are looked up here',
    'mae-pretrain fashion --epochs 5 --log wandb,mlflow --out runs/first': 'test_trackers, where they are installed',
    'mae-pretrain --resume runs/first': 'test_trackers, where they are installed',
    'wandb sync runs/first/wandb/offline-run-*': 'a command of wandb, which sends',
    'mlflow ui --backend-store-uri sqlite:///runs/first/mlflow.db': 'a command of mlflow, which serves on',
}


@dataclass(frozen=True)
class Shown:
    "A command line, and the page that shows it."
    page: str
    line: str

    def __str__(self):
        return f'{self.page}: {self.line}'


def page_lines(page: Path) -> list[str]:
    "The command lines in the shell blocks of a page, each alone and without its comment."
    if page.suffix == '.ipynb':
        cells = json.loads(page.read_text())['cells']
        text = '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
    else:
        text = page.read_text()
    lines = []
    for block in re.findall(r'```(?:sh|bash|shell|console)\n(.*?)```', text, re.S):
        for line in block.replace('\\\n', ' ').splitlines():
            line = re.sub(r'(^|\s)#.*', '', line)
            lines += [' '.join(part.split()) for part in line.split('&&') if part.strip()]
    return lines


def shown_lines() -> list[Shown]:
    "Every command line of README, tutorials, chapters and the commands' own help."
    pages = [ROOT/'README.md', *sorted((ROOT/'tutorials').glob('*.ipynb')), *sorted((ROOT/'nbs').rglob('*.ipynb'))]
    pages = [page for page in pages if page.name != 'index.ipynb']   # README is made from it
    shown = [Shown(str(page.relative_to(ROOT)), line) for page in pages for line in page_lines(page)]
    for name, function in vars(commands).items():
        if name.startswith('mae_'):
            command = name.replace('_', '-')
            shown += [Shown(f'{command} --help', f'{command} {words}'.strip()) for words in function.examples]
    return shown


def small_row(line: str) -> tuple | None:
    "The row of `SMALL` for a line of one of our commands, with or without torchrun."
    return next((row for row in SMALL if _own_words(line).startswith(row[0])), None)


def _own_words(line: str) -> str:
    return re.sub(r'^torchrun .*?\$\(which ([a-z-]+)\)', r'\1', line)


def small_words(line: str) -> tuple[list[str], list[str]]:
    "torchrun's words, if the line has any, and the command's: as they stand, but for what `SMALL` changes."
    launch = re.match(r'torchrun (.*?) \$\(which ', line)
    launcher = ['torchrun', *shlex.split(launch[1])] if launch else []
    for flag, value in PROCESSES.items():
        if flag in launcher:
            launcher[launcher.index(flag) + 1] = value
    _, swaps, added = small_row(line)
    return launcher, [swaps.get(word, word) for word in shlex.split(_own_words(line))] + shlex.split(added)
