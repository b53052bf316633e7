"""The paper's numbers are the same wherever the package keeps them, and a study's summary is read as it is written."""
import pytest

from mae_nb.model.mae import SIZES
from mae_nb.tasks.paper import MEASURES, PAPER, Measured, read_study
from mae_nb.tasks.study_figures import Summary, write_summary
from mae_nb.tasks.study_points import STUDIES, Point

COLUMNS = dict(finetune='fine-tuning', linear='linear probe', partial='MAE')   # a study's metric -> the paper's column
LARGE = SIZES['mae_vit_large_patch16'] | dict(in_chans=3)   # the model of the paper's ablations


def test_points_of_a_study_stand_beside_the_papers_numbers():
    compared = 0
    for table in [table for table in PAPER.values() if table.study]:
        study = STUDIES[table.study]   # every table's study exists
        assert study.source == table.source
        points = study.points(LARGE)
        for metric, values in study.paper.items():
            beside = [value for point in points if (value := study.paper_value(metric, point)) is not None]
            if metric == 'partial':   # ours has other numbers of blocks as well
                assert len(beside) > 6 and set(beside) <= set(values.values())
            else:
                assert beside == list(values.values())
            assert list(values.values()) == list(table.column(COLUMNS[metric]).values()), (table.study, metric)
            compared += len(values)
    assert compared > 80


def test_a_summary_is_read_as_it_is_written(tmp_path):
    half = Point('0.5', .5)
    summaries = [Summary('finetune', half, {0: .5, 1: .75}, 84.9),
                 Summary('linear', half, {0: .25}, 69.9)]
    write_summary(tmp_path/'summary.csv', summaries)
    metrics = read_study(tmp_path/'summary.csv')
    assert metrics['finetune']['0.5'] == Measured(2, 62.5, pytest.approx(17.678, abs=1e-3))
    assert metrics['linear']['0.5'] == Measured(1, 25., None)


def test_every_measure_of_a_study_has_a_name():
    assert {metric for study in STUDIES.values() for metric in study.metrics} == set(MEASURES)


def test_a_table_is_the_same_from_every_side():
    "A number that the paper prints twice is the same twice: the baseline of 800 epochs, the models of 1,600."
    for source in ('Table 1a', 'Table 1b', 'Table 1c', 'Table 1d', 'Table 1e', 'Table 1f', 'Figure 5', 'Figure 7'):
        assert PAPER[source].rows[PAPER[source].default] == (84.9, 73.5)
    assert PAPER['Table 3'].rows['MAE'] == (83.6, 85.9, 86.9, 87.8)
    assert PAPER['Figure 8'].rows['MAE'] == PAPER['Table 3'].rows['MAE'][:3]
