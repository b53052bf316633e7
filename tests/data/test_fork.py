"""A loader's workers are forks: what the main process has thrown away is not theirs to free."""
import os

import pytest

from mae_nb.data.datasets import load_source
from mae_nb.data.loader import get_dls
from mae_nb.training.presets import RECIPES
from mae_nb.training.recipes import override


class Witness:
    "Writes down the process that frees it, as a GPU's memory would notice."
    def __init__(self, file):
        self.file, self.itself = file, self   # only the garbage collector can free it

    def __del__(self):
        with open(self.file, 'a') as f:
            f.write(f'{os.getpid()}\n')

def collect(batch):
    "Force the collector in a worker, as many allocations would."
    import gc
    gc.collect()
    return batch

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='workers are forked only where the system can')
def test_workers_free_nothing_of_the_main_process(tmp_path):
    train, _ = load_source('fashion')
    recipe = override(RECIPES['pretrain_fashion'], dict(batch_size=4))
    dls = get_dls((train.take(range(16)), None), recipe, img_size=28, num_workers=1, device='cpu')
    transform = dls.train.dataset.transform
    dls.train.dataset.transform = lambda *args: collect(transform(*args))
    Witness(tmp_path/'freed')
    keep = Witness(tmp_path/'freed')
    batches = iter(dls.train)
    next(batches)
    del keep
    list(batches)
    freed = (tmp_path/'freed').read_text().split() if (tmp_path/'freed').exists() else []
    assert set(freed) <= {str(os.getpid())}
    assert freed   # the first one, before the fork
