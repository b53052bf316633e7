"""The paper's numbers are the same wherever the package keeps them, and a study's summary is read as it is written."""
import pytest

from mae_nb.tasks.paper import MEASURES, PAPER, Measured, read_study

COLUMNS = dict(finetune='fine-tuning', linear='linear probe', partial='MAE')   # a study's metric -> the paper's column


def test_studies_have_the_papers_numbers():
    STUDIES = pytest.importorskip('mae_nb.tasks.study_points').STUDIES
    compared = 0
    for name, table in ((table.study, table) for table in PAPER.values() if table.study):
        study = STUDIES[name]   # every table's study exists
        assert study.source == table.source
        for metric, values in study.paper.items():
            assert list(values.values()) == list(table.column(COLUMNS[metric]).values()), (name, metric)
            compared += len(values)
    assert compared > 80


def test_a_summary_is_read_as_it_is_written(tmp_path):
    study_points = pytest.importorskip('mae_nb.tasks.study_points')
    study_figures = pytest.importorskip('mae_nb.tasks.study_figures')
    half = study_points.Point('0.5', .5)
    summaries = [study_figures.Summary('finetune', half, {0: .5, 1: .75}, 84.9),
                 study_figures.Summary('linear', half, {0: .25}, 69.9)]
    study_figures.write_summary(tmp_path/'summary.csv', summaries)
    metrics = read_study(tmp_path/'summary.csv')
    assert metrics['finetune']['0.5'] == Measured(2, 62.5, pytest.approx(17.678, abs=1e-3))
    assert metrics['linear']['0.5'] == Measured(1, 25., None)
    assert MEASURES.keys() == study_figures.WORDS.keys()


def test_a_table_is_the_same_from_every_side():
    "A number that the paper prints twice is the same twice: the baseline of 800 epochs, the models of 1,600."
    for source in ('Table 1a', 'Table 1b', 'Table 1c', 'Table 1d', 'Table 1e', 'Table 1f', 'Figure 5', 'Figure 7'):
        assert PAPER[source].rows[PAPER[source].default] == (84.9, 73.5)
    assert PAPER['Table 3'].rows['MAE'] == (83.6, 85.9, 86.9, 87.8)
    assert PAPER['Figure 8'].rows['MAE'] == PAPER['Table 3'].rows['MAE'][:3]
