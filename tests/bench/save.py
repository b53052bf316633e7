"""What a checkpoint of a run costs: the pause for the copy, and the writing beside the training.

    python tests/bench/save.py --model mae_vit_base_patch16 --out /path/on/the/disk

Prints one line: the bytes, the seconds of the copy, of writing with reading back and hashing, and of reading with the check.
"""
import argparse
import json
import tempfile
import time
from types import SimpleNamespace

import torch

from mae_nb.checkpoints import read_checkpoint, run_state, save_checkpoint
from mae_nb.mae import create_mae
from mae_nb.optim import adamw, pretrain_groups


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--model', default='mae_vit_base_patch16'); p.add_argument('--out', default=None, help='a folder on the disk to measure')
    a = p.parse_args()
    model = create_mae(a.model)
    opt = adamw(pretrain_groups(model, .05), 1e-4, (.9, .95))
    for q in model.parameters(): q.grad = torch.zeros_like(q)
    opt.step(); opt.zero_grad()
    learn = SimpleNamespace(model=model, opt=opt, cbs=[], train_iter=1, recorder=SimpleNamespace(values=[], iters=[]))
    found = dict(model=a.model, torch=torch.__version__, threads=torch.get_num_threads())
    with tempfile.TemporaryDirectory(dir=a.out) as folder:
        tensors = {}
        for what in ('first_copy_s', 'copy_s'):   # the first time the memory is new
            t = time.perf_counter(); tensors, _ = run_state(learn, tensors); found[what] = time.perf_counter() - t
        t = time.perf_counter(); file = save_checkpoint(folder, 1, tensors, {}); found['write_s'] = time.perf_counter() - t
        found['gb'] = file.stat().st_size / 1e9
        del tensors
        t = time.perf_counter(); read_checkpoint(file); found['read_s'] = time.perf_counter() - t
    print(json.dumps({k: round(v, 2) if isinstance(v, float) else v for k, v in found.items()}))

if __name__ == '__main__': main()
