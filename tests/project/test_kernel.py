"""Notebooks as people run them: in a Jupyter kernel, from top to bottom.

Every cell of the tutorials runs. Two of them train a dozen models; the check trains these on fewer images and for fewer
epochs, as `SHORTER` says. The tutorials as they stand, those on segmentation and detection, and one chapter (nbdev-test
runs all chapters, test_exercises two in a kernel): `pytest -m slow tests/project/test_kernel.py`, some ten minutes of
one core."""
import shutil

import pytest
from support import ROOT

# What a tutorial's cells say, each once, and what the check runs instead.
SHORTER = {
    'tutorials/01_pretrain_and_probe.ipynb': {
        'train, test = load_source(data)':
            'train, test = (images.shots(k, seed) for images, k in zip(load_source(data), (200, 40)))',
        'draws={10: 3, 50: 3}': 'draws={10: 1, 50: 1}',
        'train.shots(100, seed), test, encoders': 'train.shots(50, seed), test, encoders',
        'few = train.shots(50, seed)': 'few = train.shots(20, seed)',
        'dict(epochs=5, warmup_epochs=.5)': 'dict(epochs=3, warmup_epochs=.5)'},
    'tutorials/02_finetune_and_probe.ipynb': {
        'train.shots(50, seed), test.shots(100, seed)': 'train.shots(20, seed), test.shots(20, seed)',
        'dict(epochs=6, warmup_epochs=1)': 'dict(epochs=1, warmup_epochs=.2)'},
}
SHORT = [*SHORTER, 'tutorials/03_imagenet_at_scale.ipynb', 'tutorials/04_demo_search.ipynb']
WHOLE = [*SHORTER, 'tutorials/05_segmentation.ipynb', 'tutorials/06_detection.ipynb', 'nbs/model/01_patches.ipynb']


def shorten(nb, changes):
    "Replace what cells say; a line that is not there any more, or twice, is an error."
    for words, others in changes.items():
        cell, = (c for c in nb.cells if c.cell_type == 'code' and words in c.source)
        assert cell.source.count(words) == 1
        cell.source = cell.source.replace(words, others)


def run_in_a_kernel(notebook, folder, changes):
    "An error in a cell fails the test."
    import nbformat  # slow to import, as in test_exercises
    from nbclient import NotebookClient
    nb = nbformat.read(ROOT/notebook, 4)
    shorten(nb, changes)
    for file in (ROOT/notebook).parent.glob('*.[jc]s*'):   # the JSON and CSV files that notebooks read
        shutil.copy(file, folder)
    resources = dict(metadata=dict(path=str(folder)))
    NotebookClient(nb, timeout=1200, kernel_name='python3', resources=resources).execute()
    outputs = [o for c in nb.cells if c.cell_type == 'code' for o in c.outputs]
    assert sum('image/png' in o.get('data', {}) for o in outputs) >= 2


@pytest.mark.parametrize('notebook', SHORT)
def test_each_cell_of_a_tutorial_in_a_kernel(notebook, tmp_path):
    run_in_a_kernel(notebook, tmp_path, SHORTER.get(notebook, {}))


@pytest.mark.slow
@pytest.mark.parametrize('notebook', WHOLE)
def test_a_notebook_as_it_stands_in_a_kernel(notebook, tmp_path):
    run_in_a_kernel(notebook, tmp_path, {})
