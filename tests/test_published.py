"""Published numbers: their own means agree with them, and names of ours find theirs."""

import numpy as np
import pytest

from hear_distill.published import (
    AP,
    COLUMNS,
    DIAGNOSIS_F1,
    MEAN_AP,
    STATED_RETAINED_PERCENT,
    columns_beside,
    is_complete,
    published_ap,
    published_f1,
    published_mean_ap,
)

ALL = [(dataset, task) for dataset, tasks in AP.items() for task in tasks]


def mean_of(column: str) -> float:
    """Over the tasks that the column has."""
    values = [published_ap(*task)[column] for task in ALL]
    return float(np.mean([value for value in values if value is not None]))


@pytest.mark.parametrize("column", [column for column in COLUMNS if column != "HeAR-s full"])
def test_the_published_mean_is_that_of_the_published_tasks(column):
    assert mean_of(column) == pytest.approx(MEAN_AP[COLUMNS.index(column)], abs=0.00051)


def test_the_one_published_mean_that_its_tasks_do_not_give_is_known():
    assert MEAN_AP[COLUMNS.index("HeAR-s full")] == 0.595
    assert mean_of("HeAR-s full") == pytest.approx(0.6006, abs=5e-5)


def test_the_share_that_the_release_states_is_a_third_of_a_percent_above_what_its_columns_give():
    without = [task for task in ALL if task[1] != "Respiratory sounds"]
    means = published_mean_ap(without)
    assert 100 * means["HeAR-s"] / means["HeAR"] == pytest.approx(95.0, abs=0.05)
    assert STATED_RETAINED_PERCENT == 95.3


def test_thirteen_tasks_of_two_datasets_and_seven_diagnoses_are_known():
    assert {dataset: len(tasks) for dataset, tasks in AP.items()} == {"fsd50k": 6, "flusense": 7}
    assert all(len(values) == len(COLUMNS) for tasks in AP.values() for values in tasks.values())
    assert sum(map(len, DIAGNOSIS_F1.values())) == 7


@pytest.mark.parametrize(
    ("dataset", "task", "column", "expected"),
    [
        ("fsd50k", "Respiratory_sounds", "HeAR", 0.670),
        ("fsd50k", "Respiratory sounds", "HeAR-s", None),
        ("flusense", "breathe", "HeAR-s", 0.366),
        ("FluSense", "throat-clearing", "CLAP (48k)", 0.169),
        ("flusense", "Cough", "TRILL", 0.903),
        ("fsd50k", "Cough", "TRILL", 0.450),
        ("flusense", "sniffle", "HeAR full", 0.836),
    ],
)
def test_a_task_is_found_under_our_spelling_and_in_its_own_dataset(dataset, task, column, expected):
    assert published_ap(dataset, task)[column] == expected


def test_what_nobody_published_has_no_columns():
    assert published_ap("fsd50k", "Gasp") == {} == published_ap("coswara", "Cough")
    assert published_f1("icbhi", "Asthma") is None and published_f1("coswara", "COPD") is None
    assert published_mean_ap([("fsd50k", "Cough"), ("fsd50k", "Gasp")]) == {} == published_mean_ap([])


def test_a_mean_is_over_just_the_tasks_that_were_measured():
    found = published_mean_ap([("fsd50k", "Cough"), ("flusense", "gasp"), ("fsd50k", "Respiratory sounds")])
    assert found["TRILL"] == pytest.approx((0.450 + 0.466 + 0.539) / 3)
    assert found["HeAR-s"] is None  # it lacks one of them: its mean over the others would not compare


def test_all_tasks_but_one_are_in_every_column():
    assert [f"{d}/{t}" for d, t in ALL if not is_complete(f"{d}/{t}")] == ["fsd50k/Respiratory sounds"]
    assert not is_complete("coswara/covid") and not is_complete("fsd50k/Gasp")


def test_diagnoses_have_a_mean_and_a_deviation():
    assert published_f1("icbhi", "copd") == (0.888, 0.058)
    assert published_f1("circor", "Heart murmur") == published_f1("CirCor", "murmur") == (0.582, 0.017)


def test_whole_clip_columns_stand_beside_squeeze_only():
    assert set(columns_beside("squeeze")) == {*COLUMNS} - {"HeAR-s"}
    assert set(columns_beside("windows")) == set(columns_beside("event")) == {*COLUMNS[:5], "HeAR-s"}
