"""Draws of groups, intervals, and shares of a teacher's value."""

import numpy as np
import pytest
from test_probes import example

from hear_distill.bootstrap import draw_groups, interval, retained_percent
from hear_distill.metrics import average_precision, once


def plain_ap(is_positive: np.ndarray, scores: np.ndarray) -> float:
    return average_precision(is_positive, scores, once(len(scores))).item()


def test_a_draw_takes_whole_groups_with_replacement_and_is_the_same_again_under_its_seed():
    _, is_positive, groups = example()
    draws = draw_groups(is_positive[:, None], groups, 300, seed=3)

    assert (draws[0] == 1).all() and draws.shape == (301, 72)
    by_group = draws[1:].reshape(300, 24, 3)  # the rows of one group lie side by side
    assert (by_group == by_group[:, :, :1]).all()
    assert (by_group[:, :, 0].sum(axis=1) == 24).all() and by_group.max() > 2
    assert (draws == draw_groups(is_positive[:, None], groups, 300, seed=3)).all()
    assert (draws != draw_groups(is_positive[:, None], groups, 300, seed=4)).any()


def test_every_draw_holds_positives_of_every_task():
    groups = np.arange(30)
    tasks = np.stack([groups == 4, groups > 27], axis=1)  # a third of all draws lacks the first of them
    assert (draw_groups(tasks, groups, 200, seed=0) @ tasks > 0).all()


def test_the_interval_over_groups_covers_the_truth_and_that_over_rows_does_not():
    """25 people of 8 nearly equal recordings each: 200 rows, but not 200 pieces of evidence."""
    rng = np.random.default_rng(0)

    def population(num_people: int) -> tuple[np.ndarray, np.ndarray]:
        is_ill = np.arange(num_people) % 3 == 0
        score = rng.normal(1.2 * is_ill)
        return is_ill.repeat(8), (score.repeat(8) + rng.normal(0, 0.1, 8 * num_people))

    truth = plain_ap(*population(200_000))
    covered = {"groups": 0, "rows": 0}
    for seed in range(100):
        is_positive, scores = population(25)
        for unit, groups in (("groups", np.arange(200) // 8), ("rows", np.arange(200))):
            draws = draw_groups(is_positive[:, None], groups, 200, seed)
            found = interval(average_precision(is_positive, scores, draws))
            covered[unit] += found.low <= truth <= found.high

    assert covered["groups"] >= 85  # 95 in the limit of many people
    assert covered["rows"] <= 65


def test_the_interval_is_the_first_draw_between_the_percentiles_of_the_others():
    assert interval(np.array([7.0, *range(201)])) == (7.0, 5.0, 195.0)


def test_a_column_without_a_row_is_refused_instead_of_drawn_for_ever():
    with pytest.raises(ValueError, match=r"columns without a row: \[1\]"):
        draw_groups(np.array([[True, False], [False, False]]), np.arange(2), 10, seed=0)


def test_a_share_is_paired_draw_by_draw():
    """Both models suffer from the same hard draws, so their ratio hardly varies."""
    teacher = np.array([0.8, *np.random.default_rng(0).uniform(0.5, 0.9, 500)])
    found = retained_percent(0.9 * teacher, teacher)
    assert (found.value, found.low, found.high) == pytest.approx((90, 90, 90))
    shuffled = np.concatenate([teacher[:1], np.random.default_rng(1).permutation(teacher[1:])])
    assert retained_percent(0.9 * shuffled, teacher).high > 110


def test_a_share_above_chance_counts_from_chance():
    teacher, student = np.full(5, 0.9), np.full(5, 0.6)
    assert retained_percent(student, teacher, 0.5).value == pytest.approx(25)
    assert retained_percent(student, teacher).value == pytest.approx(200 / 3)


def test_a_teacher_that_may_know_nothing_has_no_share_to_keep():
    teacher = np.array([0.55, *np.linspace(0.45, 0.65, 200)])
    assert retained_percent(teacher, teacher, 0.5) is None
    assert retained_percent(teacher, teacher, 0.4).value == pytest.approx(100)
