"""Which rows take part in a task, and who is scored by whom."""

import numpy as np
import pytest

from hear_distill.probes import Leak, NotMeasurable
from hear_distill.splits import SEEDS, Plan, Rows, draw_columns, plan_of
from hear_distill.tasks import Task

GROUPS = np.array([f"person {i // 3:02}" for i in range(120)])  # 40 people of three rows
EVERYONE = np.ones(120, dtype=bool)


def task(kind: str, target: np.ndarray, takes_part: np.ndarray = EVERYONE) -> Task:
    return Task(kind=kind, labels=target, takes_part=takes_part)


def by_person(values: list) -> np.ndarray:
    return np.array(values).repeat(3)


def test_our_own_folds_differ_between_seeds_and_score_every_row_once():
    plan = plan_of(task("binary", by_person([i % 4 == 0 for i in range(40)])), Rows(groups=GROUPS), seed=3)
    assert len(plan.splits) == SEEDS and not plan.is_prescribed and plan.is_scored.all()
    for masks in plan.splits:
        assert (np.sum(masks, axis=0) == 1).all() and len(masks) == 5
        assert all(plan.target[mask].sum() == 6 for mask in masks)
    assert any((plan.splits[0][0] != plan.splits[i][0]).any() for i in range(1, SEEDS))


def test_an_official_test_part_is_scored_once_and_nothing_else_is():
    is_test = by_person([i % 5 < 2 for i in range(40)])
    takes_part = np.arange(120) % 7 != 0
    plan = plan_of(
        task("binary", by_person([i % 4 == 0 for i in range(40)]), takes_part), Rows(groups=GROUPS, is_test=is_test), 0
    )
    assert plan.is_prescribed and len(plan.splits) == 1
    np.testing.assert_array_equal(plan.rows, np.flatnonzero(takes_part))
    np.testing.assert_array_equal(plan.is_scored, is_test[takes_part])


def test_prescribed_folds_are_taken_as_they_are():
    folds = by_person([f"fold {i % 3}" for i in range(40)])
    plan = plan_of(task("binary", by_person([i % 4 == 0 for i in range(40)])), Rows(groups=GROUPS, folds=folds), 0)
    for mask, name in zip(plan.splits[0], ("fold 0", "fold 1", "fold 2"), strict=True):
        np.testing.assert_array_equal(mask, folds == name)


@pytest.mark.parametrize("prescribed", ["folds", "is_test"])
@pytest.mark.parametrize("kind", ["binary", "multiclass", "regression"])
def test_a_planted_leak_is_refused(kind, prescribed):
    values = {"binary": [i % 4 == 0 for i in range(40)], "multiclass": list("abcd" * 10), "regression": [*range(40)]}
    side = by_person([i % 2 for i in range(40)])
    side[61] = 1 - side[61]  # one recording of person 20
    side = side.astype(bool) if prescribed == "is_test" else side
    with pytest.raises(Leak, match="1 of 40 groups are on both sides of a split, such as person 20"):
        plan_of(task(kind, by_person(values[kind])), Rows(groups=GROUPS, **{prescribed: side}), 0)


def test_classes_in_too_few_groups_are_left_out_with_their_rows_and_named():
    diagnoses = by_person(["rare"] * 4 + ["COPD"] * 20 + ["healthy"] * 16)
    plan = plan_of(task("multiclass", diagnoses), Rows(groups=GROUPS), 0)
    assert plan.classes == ["COPD", "healthy"]
    assert plan.left_out == {"rare": "groups that hold this label: 4, at least 5 needed"}
    np.testing.assert_array_equal(plan.rows, np.arange(12, 120))
    assert [np.bincount(plan.target[mask]).tolist() for mask in plan.splits[0]].count([12, 9]) >= 3


def test_every_fold_holds_every_class_even_where_a_group_holds_several():
    diagnoses = by_person(list("aaaaaaaabbbbbbbbbbcccccdddddddddddddddddd")[:40])
    diagnoses[::5] = "d"
    plan = plan_of(task("multiclass", diagnoses), Rows(groups=GROUPS), 0)
    assert all(len(set(plan.target[mask])) == 4 for masks in plan.splits for mask in masks)


@pytest.mark.parametrize(
    ("made", "rows", "reason"),
    [
        (task("binary", EVERYONE, ~EVERYONE), Rows(groups=GROUPS), "no row takes part"),
        (task("binary", np.arange(120) < 12), Rows(groups=GROUPS), "hold this label: 4, at least 5 needed"),
        (
            task("binary", np.arange(120) < 30),
            Rows(groups=GROUPS, is_test=(np.arange(120) < 27) | (np.arange(120) > 89)),
            "in the training part: 1, at least 2 needed",
        ),
        (
            task("binary", np.arange(120) < 30),
            Rows(groups=GROUPS, is_test=np.arange(120) >= 27),
            "in the test part: 1, at least 2 needed",
        ),
        (task("multiclass", by_person(["a"] * 36 + ["b"] * 4)), Rows(groups=GROUPS), "hold other rows: 4|0 classes"),
        (task("regression", np.ones(120)), Rows(groups=GROUPS), "40 groups with 1 values, at least 5 of each needed"),
        (task("regression", np.arange(120.0), np.arange(120) < 12), Rows(groups=GROUPS), "4 groups with 12 values"),
        (
            task("regression", np.arange(120.0)),
            Rows(groups=GROUPS, is_test=np.arange(120) < 3),
            "fewer than 2 groups to fit on or to score",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_with_its_reason(made, rows, reason):
    with pytest.raises(NotMeasurable, match=reason):
        plan_of(made, rows, 0)


def test_two_prescribed_splits_are_one_too_many():
    with pytest.raises(ValueError, match="folds and is_test are two splits"):
        Rows(groups=GROUPS, folds=np.arange(120), is_test=EVERYONE)


def test_a_draw_must_hold_every_kind_of_scored_row_of_every_task():
    is_test = by_person([i % 5 < 2 for i in range(40)])
    rows = Rows(groups=GROUPS, is_test=is_test)
    is_positive = by_person([i % 4 == 0 for i in range(40)])
    classes = by_person(list("abcd" * 10))
    plans: list[Plan] = [plan_of(task("binary", is_positive), rows, 0), plan_of(task("multiclass", classes), rows, 0)]
    plans.append(plan_of(task("regression", np.arange(120.0), np.arange(120) > 9), rows, 0))

    found = draw_columns(plans, 120)

    expected = [~is_positive & is_test, is_positive & is_test, *(is_test & (classes == kind) for kind in "abcd")]
    np.testing.assert_array_equal(found.T, [*expected, is_test & (np.arange(120) > 9)])
