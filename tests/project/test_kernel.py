"""Notebooks as people run them: in a Jupyter kernel, from top to bottom.

nbdev-test runs the chapters, and test_exercises two of them in a kernel; one more is slow:
`pytest -m slow tests/project/test_kernel.py`."""
import shutil

import nbformat
import pytest
from nbclient import NotebookClient
from support import ROOT

NOTEBOOKS = [
    pytest.param('nbs/model/01_patches.ipynb', marks=pytest.mark.slow),
    'tutorials/01_pretrain_and_probe.ipynb',
    'tutorials/02_finetune_and_probe.ipynb',
    'tutorials/03_imagenet_at_scale.ipynb',
    'tutorials/04_demo_search.ipynb']


@pytest.mark.parametrize('notebook', NOTEBOOKS)
def test_in_a_kernel(notebook, tmp_path):
    "An error in a cell fails the test."
    nb = nbformat.read(ROOT/notebook, 4)
    for file in (ROOT/notebook).parent.glob('*.[jc]s*'):   # the JSON and CSV files that notebooks read
        shutil.copy(file, tmp_path)
    resources = dict(metadata=dict(path=str(tmp_path)))
    NotebookClient(nb, timeout=1200, kernel_name='python3', resources=resources).execute()
    outputs = [o for c in nb.cells if c.cell_type == 'code' for o in c.outputs]
    assert sum('image/png' in o.get('data', {}) for o in outputs) >= 2
