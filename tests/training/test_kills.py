"""A small campaign of kills; the large one is `python tests/training/kills.py --kills 150`."""
import os

import pytest

if not hasattr(os, 'fork'):
    pytest.skip('kills forked processes, which Windows lacks', allow_module_level=True)

from kills import Campaign, summary  # noqa: E402  the skip comes first


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['pretrain', 'mae-pack', 'mae-embed', 'mae-demo', 'mae-study'])
def test_some_kills_of_each_kind(kind, tmp_path):
    rows = Campaign(tmp_path, 7, [kind]).run(4)
    assert len(rows) == 4 and all(row['equal'] and row['resumed'] == row['saved'] for row in rows), rows
    assert sum(row['kills'] for row in summary(rows)) == 4
