"""One thread a worker: two workers share two cores."""
import os

os.environ.setdefault('OMP_NUM_THREADS', '1')

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

@pytest.fixture
def shared_data():
    "The development data beside the checkout, or a skip that says so."
    folder = Path(__file__).resolve().parents[2]/'shared'/'data'
    if not folder.is_dir(): pytest.skip('no development data beside the checkout (../shared/data)')
    return folder
