#!/usr/bin/env bash
# fastai 2.8.12 (torch 2.14.1): ReduceLROnPlateau lowers the rate of fastai's own optimizers only. With an optimizer of
# PyTorch in fastai's OptimWrapper the rate stays as it is, without a word: the callback writes into OptimWrapper.hypers,
# which is made anew at each access. Seen below: a plateau from the first epoch on, five epochs, rates per epoch.
# The installation takes some gigabytes.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 fastai==2.8.12
"$place/venv/bin/python" -W ignore - <<'P'
from functools import partial

import torch
from fastai.callback.core import Callback
from fastai.callback.tracker import ReduceLROnPlateau
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.optimizer import Adam, OptimWrapper

pairs = list(zip(torch.randn(32, 4), torch.randn(32, 1)))
loader = DataLoader(pairs, bs=8)

class Rates(Callback):
    "Keeps the rate that each epoch ends with."
    def __init__(self):
        self.seen = []

    def after_epoch(self):
        opt = self.learn.opt
        self.seen.append(opt.opt.param_groups[0]['lr'] if isinstance(opt, OptimWrapper) else opt.hypers[0]['lr'])

def rates(opt_func):
    watch = Rates()
    plateau = ReduceLROnPlateau(patience=1, factor=10, min_delta=1e9)   # every epoch is a plateau
    learn = Learner(DataLoaders(loader, loader), torch.nn.Linear(4, 1), loss_func=torch.nn.MSELoss(),
                    opt_func=opt_func, cbs=[plateau, watch])
    with learn.no_bar(), learn.no_logging():
        learn.fit(5, lr=.01)
    return watch.seen

own, wrapped = rates(Adam), rates(partial(OptimWrapper, opt=torch.optim.AdamW))
print("fastai's Adam", own)
print("PyTorch's AdamW", wrapped)
assert own[-1] < 2e-5
assert wrapped == [.01] * 5
P
