"""Linear probes on embeddings whose answer is known."""

from functools import partial

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import average_precision_score
from sklearn.pipeline import Pipeline

from hear_distill import probes
from hear_distill.metrics import average_precision
from hear_distill.probes import (
    PENALTIES,
    Leak,
    choose_and_fit,
    fit_ridge,
    grouped_folds,
    linear_probe,
    logistic_path,
    masks_of,
    scores_of_masks,
)
from tests.reference import metrics as by_the_book

FIT = partial(choose_and_fit, seed=0)


def plain_ap(is_positive: np.ndarray, scores: np.ndarray) -> float:
    return average_precision(is_positive, scores, np.ones((1, len(scores)), dtype=int)).item()


def probed_ap(features: np.ndarray, is_positive: np.ndarray, groups: np.ndarray) -> float:
    folds = grouped_folds(is_positive, groups, 5, seed=0)
    return plain_ap(is_positive, scores_of_masks(features, is_positive, groups, masks_of(folds), FIT))


def test_an_embedding_that_holds_the_label_scores_one():
    rng = np.random.default_rng(0)
    labels, groups = rng.integers(3, size=60), np.arange(60) // 2
    features = np.eye(3)[labels] * [0.01, 1, 300] + [7, 0, -2]

    assert [probed_ap(features, labels == label, groups) for label in range(3)] == [1.0] * 3


def test_an_embedding_that_knows_nothing_scores_as_a_random_order_does():
    """Folds that hold more positives than others must be neither ahead nor behind when the scores are pooled."""
    rng = np.random.default_rng(0)
    groups, folds = np.arange(120) // 2, np.minimum(np.arange(120) // 12, 4)  # folds of 12, 12, 12, 12 and 72 rows
    found, expected = [], []
    for _ in range(60):
        is_positive = np.isin(groups, rng.choice(60, 15, replace=False))
        features = rng.normal(3, 2, (120, 6))
        found.append(
            plain_ap(is_positive, scores_of_masks(features, is_positive, groups, masks_of(folds), fit_weakest))
        )
        expected.append(by_the_book.average_precision(is_positive, rng.permutation(120)))

    spread = np.hypot(np.std(found), np.std(expected)) / 60**0.5
    assert np.mean(found) == pytest.approx(np.mean(expected), abs=3 * spread)


def fit_weakest(features: np.ndarray, is_positive: np.ndarray, _: np.ndarray) -> Pipeline:
    return linear_probe(features, is_positive, PENALTIES[0])


def example(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[72, 5] features that know something, labels, and 24 groups of three rows, some of which are of both kinds."""
    rng = np.random.default_rng(seed)
    groups = np.arange(72) // 3
    is_positive = rng.random(72) < 0.1 + 0.5 * (groups % 3 == 0)
    features = rng.normal([0, 5, 0, 0, 0], [1, 1, 20, 1, 1], (72, 5))
    features[:, 0] += 1.5 * is_positive
    return features, is_positive, groups


def test_the_score_of_a_row_does_not_depend_on_the_other_rows_of_its_fold():
    features, is_positive, groups = example()
    folds = groups % 4
    before = scores_of_masks(features, is_positive, groups, masks_of(folds), FIT)
    mates = (folds == 2) & (np.arange(72) != 6)  # row 6 itself stays as it is
    features[mates] = 1e3 * features[mates] - 500
    is_positive[mates] = ~is_positive[mates]

    after = scores_of_masks(features, is_positive, groups, masks_of(folds), FIT)

    assert folds[6] == 2 and after[6] == before[6]
    assert (after[mates] != before[mates]).all() and (after[folds != 2] != before[folds != 2]).all()


@pytest.mark.parametrize(("seed", "expected"), [(0, 0.1), (1, 1.0), (2, 0.01)])
def test_the_penalty_is_what_a_search_inside_the_training_part_finds_best(seed, expected):
    features, is_positive, groups = example(seed)
    folds = grouped_folds(is_positive, groups, 5, seed=0)
    by_penalty = {}
    for penalty in PENALTIES:
        scores = np.empty(72)
        for fold in range(5):
            x, y = features[folds != fold], is_positive[folds != fold]
            mean, deviation = x.mean(axis=0), x.std(axis=0)
            weights = np.where(y, len(y) / (2 * y.sum()), len(y) / (2 * (~y).sum()))
            by_hand = LogisticRegression(C=1 / (penalty * len(y))).fit((x - mean) / deviation, y, weights)
            scores[folds == fold] = by_hand.decision_function((features[folds == fold] - mean) / deviation)
        by_penalty[penalty] = average_precision_score(is_positive, scores)

    found = choose_and_fit(features, is_positive, groups, seed=0)

    assert found.penalty == max(by_penalty, key=by_penalty.get) == expected
    assert found.probe[0].n_samples_seen_ == 72  # refitted on the whole training part


def test_of_equally_good_penalties_the_strongest_is_taken():
    rows = np.arange(72)
    assert FIT(rows[:, None] // 36 + 0.5, rows >= 36, rows // 3).penalty == 10.0


def test_scores_of_a_strong_and_of_a_weak_penalty_are_on_one_scale(monkeypatch):
    features, is_positive, groups = example()
    raw, calibrated = {}, {}
    for penalty in (10.0, 0.0001):
        monkeypatch.setattr(probes, "PENALTIES", (penalty,))
        found = FIT(features, is_positive, groups)
        raw[penalty] = found.probe.decision_function(features).std()
        calibrated[penalty] = found.decision_function(features).std()

    assert raw[0.0001] > 20 * raw[10.0]
    assert 0.5 < calibrated[0.0001] / calibrated[10.0] < 2


def test_a_probe_of_noise_is_sure_of_nothing_even_where_it_fits_its_training_rows_perfectly(monkeypatch):
    monkeypatch.setattr(probes, "PENALTIES", (0.0001,))
    rng = np.random.default_rng(0)
    is_positive = rng.random(72) < 0.3
    found = FIT(rng.normal(size=(72, 100)), is_positive, np.arange(72) // 3)

    log_odds = found.decision_function(rng.normal(size=(500, 100)))
    assert np.abs(log_odds).mean() < 1


def test_a_group_in_two_folds_is_refused():
    features, is_positive, groups = example()
    folds = groups % 4
    folds[30] += 1
    with pytest.raises(Leak, match="1 of 24 groups are on both sides of a split, such as 10"):
        scores_of_masks(features, is_positive, groups, masks_of(folds), FIT)


@pytest.mark.parametrize("seed", range(10))
def test_each_group_lies_in_one_fold_and_each_fold_holds_both_kinds_of_rows(seed):
    """Five of twelve groups hold a positive row, two of them nothing else; sizes are as unequal as in real tables."""
    rng = np.random.default_rng(seed)
    groups = rng.permutation(12).repeat(rng.permutation([1, 40, 3, 80, 17, 5, 5, 5, 5, 5, 9, 2]))
    is_positive = np.isin(groups, [0, 7])
    is_positive[[np.flatnonzero(groups == group)[0] for group in (3, 5, 11)]] = True

    folds = grouped_folds(is_positive, groups, 5, seed)

    assert all(len(set(folds[groups == group])) == 1 for group in range(12))
    assert set(folds[is_positive]) == set(folds[~is_positive]) == {0, 1, 2, 3, 4}
    assert any((grouped_folds(is_positive, groups, 5, other) != folds).any() for other in range(100, 103))


def test_a_warm_start_ends_where_a_cold_one_does():
    features, is_positive, _ = example()
    warm = list(logistic_path(features, is_positive, PENALTIES, 0))
    for penalty, probe in zip(PENALTIES, warm, strict=True):
        mean, deviation = features.mean(axis=0), features.std(axis=0)
        cold = LogisticRegression(C=1 / (penalty * 72), class_weight="balanced", tol=1e-9, max_iter=10_000)
        expected = cold.fit((features - mean) / deviation, is_positive).decision_function((features - mean) / deviation)
        np.testing.assert_allclose(probe.decision_function(features), expected, atol=0.02 * np.abs(expected).max())
    assert len({float(probe[1].coef_[0, 0]) for probe in warm}) == len(PENALTIES)  # not one object six times


def test_rows_of_an_official_test_part_are_scored_by_a_probe_of_the_others_and_only_these_are():
    features, is_positive, groups = example()
    is_test = groups % 3 == 1

    scores = scores_of_masks(features, is_positive, groups, [is_test], FIT)

    expected = FIT(features[~is_test], is_positive[~is_test], groups[~is_test]).decision_function(features[is_test])
    np.testing.assert_array_equal(scores[is_test], expected)
    assert np.isnan(scores[~is_test]).all()
    is_test[groups == 6] = [True, False, True]
    with pytest.raises(Leak, match="1 of 24 groups are on both sides"):
        scores_of_masks(features, is_positive, groups, [is_test], FIT)


def test_ridge_takes_the_penalty_with_the_lowest_absolute_error_over_grouped_folds():
    rng = np.random.default_rng(0)
    groups = np.arange(90) // 3
    features = rng.normal([0, 5, 0], [1, 1, 200], (90, 3))
    target = 3 + 2 * features[:, 0] - 0.01 * features[:, 2] + rng.normal(0, 2, 90)
    folds = grouped_folds(target, groups, 5, seed=0)
    errors = {}
    for penalty in PENALTIES:
        errors[penalty] = []
        for fold in range(5):
            x, y = features[folds != fold], target[folds != fold]
            mean, deviation = x.mean(axis=0), x.std(axis=0)
            model = Ridge(alpha=penalty * 90).fit((x - mean) / deviation, y)
            predicted = model.predict((features[folds == fold] - mean) / deviation)
            errors[penalty].append(np.abs(predicted - target[folds == fold]).mean())
        errors[penalty] = np.mean(errors[penalty])

    found = fit_ridge(features, target, groups, seed=0)

    assert found.search.best_params_["ridge__alpha"] / 90 == pytest.approx(min(errors, key=errors.get))
    assert np.corrcoef(found.decision_function(features), target)[0, 1] > 0.7


def test_folds_of_a_quantity_hold_equal_shares_of_its_range_and_of_each_class():
    groups = np.arange(100).repeat(2)
    age = np.random.default_rng(0).permutation(100).repeat(2).astype(float)
    folds = grouped_folds(age, groups, 5, seed=0)
    assert all(abs(age[folds == fold].mean() - 49.5) < 3 for fold in range(5))
    folds = grouped_folds(age // 20, groups, 5, seed=0)  # five classes of twenty groups
    assert all((age[folds == fold] // 20 == kind).sum() == 8 for fold in range(5) for kind in range(5))
