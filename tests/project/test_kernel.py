"""Notebooks as people run them: in a Jupyter kernel, from top to bottom."""
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]

@pytest.mark.parametrize('notebook', ['nbs/model/01_patches.ipynb', 'tutorials/01_pretrain_and_probe.ipynb', 'tutorials/02_finetune_and_probe.ipynb', 'tutorials/03_imagenet_at_scale.ipynb'])
def test_in_a_kernel(notebook, tmp_path):
    nb = nbformat.read(ROOT/notebook, 4)
    for f in (ROOT/notebook).parent.glob('*.json'): shutil.copy(f, tmp_path)   # what it reads
    NotebookClient(nb, timeout=1200, kernel_name='python3', resources=dict(metadata=dict(path=str(tmp_path)))).execute()   # an error in a cell raises
    shown = [o for c in nb.cells if c.cell_type == 'code' for o in c.outputs]
    assert sum('image/png' in o.get('data', {}) for o in shown) >= 2
