"""The GPU's script runs on a CPU, too, and so stays ready; its results make the chapter's table."""
import json
import os
import subprocess

import pytest
from support import ROOT


def test_results_of_the_card_make_the_table(capsys):
    from bench.gpu import table
    table.main([])
    text = capsys.readouterr().out
    steps = json.loads((ROOT/'bench'/'results'/'gpu'/'steps.json').read_text())
    for row in steps['rows']:
        assert f"| {row['model']} | {row['switch']} | {row['bs']} | {row['images_per_second']:,.0f} |" in text
    assert 'the same bits' in text
    chapter = (ROOT/'nbs'/'measure'/'00_pairs.ipynb').read_text()
    best = {r['model']: r['images_per_second'] for r in steps['rows'] if r['switch'] == 'bf16, blocks compiled'}
    assert all(f'{rate:,.0f} images/s' in chapter for rate in best.values())


@pytest.mark.slow
def test_every_part_runs_on_a_cpu(shared_data, tmp_path):
    command = ['bash', str(ROOT/'bench'/'gpu'/'run.sh'), str(tmp_path), str(shared_data)]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | dict(TINY='1'))
    parts = ('tests', 'learners', 'cifar', 'steps', 'feed')
    assert [line for line in run.stdout.splitlines() if ': exit' in line and ': exit 0' not in line] == [], run.stdout
    assert all(f'{part}: exit 0' in run.stdout for part in parts)
    learners = json.loads((tmp_path/'learners.json').read_text())['rows']
    assert all(row.get('finite', True) and 'error' not in row for row in learners)
    assert learners[-1]['same_bits']
