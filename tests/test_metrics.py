"""Metrics of weighted rows against scikit-learn and SciPy on the rows written out, random and tied scores alike."""

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as library
from sklearn.metrics import average_precision_score

from hear_distill import metrics
from hear_distill.metrics import average_precision, once
from tests.reference import metrics as by_the_book


@pytest.mark.parametrize("num_levels", [2, 7, 10**9], ids=["two scores", "many ties", "hardly a tie"])
@pytest.mark.parametrize("seed", range(5))
def test_average_precision_is_the_sum_over_thresholds(num_levels, seed):
    rng = np.random.default_rng(seed)
    is_positive = rng.random(83) < 0.2
    scores = rng.integers(num_levels, size=83) - num_levels / 3

    found = average_precision(is_positive, scores, once(83)).item()

    assert found == pytest.approx(by_the_book.average_precision(is_positive, scores), abs=1e-12)
    assert found == pytest.approx(average_precision_score(is_positive, scores), abs=1e-12)


def test_a_row_of_weight_k_counts_as_k_rows():
    rng = np.random.default_rng(0)
    is_positive, scores = rng.random(50) < 0.3, rng.integers(12, size=50) / 7
    weights = rng.integers(4, size=(20, 50))  # a quarter of the rows is left out of each draw

    found = average_precision(is_positive, scores, weights)

    expected = [by_the_book.average_precision(is_positive.repeat(w), scores.repeat(w)) for w in weights]
    np.testing.assert_allclose(found, expected, atol=1e-12)


LEVELS = pytest.mark.parametrize("num_levels", [2, 7, 10**9], ids=["two scores", "many ties", "hardly a tie"])


def drawn(num_levels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, scores around 0 that know something, ties of both kinds of rows, and 30 draws that hold both kinds."""
    rng = np.random.default_rng(num_levels)
    is_positive = rng.random(61) < 0.3
    scores = (rng.integers(num_levels, size=61) + num_levels // 2 * is_positive) / num_levels - 0.6
    weights = rng.integers(4, size=(30, 61))
    weights[:, [is_positive.argmax(), is_positive.argmin()]] = 1
    return is_positive, scores, weights


@LEVELS
def test_binary_metrics_are_those_of_scikit_learn(num_levels):
    is_positive, scores, weights = drawn(num_levels)

    found = metrics.binary_metrics(is_positive, scores, weights)

    for i, weight in enumerate(weights):
        actual, score = is_positive.repeat(weight), scores.repeat(weight)
        expected = {
            "ap": library.average_precision_score(actual, score),
            "auroc": library.roc_auc_score(actual, score),
            "balanced_accuracy": library.balanced_accuracy_score(actual, score > 0),
            "f1": library.f1_score(actual, score > 0, zero_division=0),
        }
        assert {name: values[i] for name, values in found.items()} == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_perfect_order_scores_one_and_its_opposite_zero(sign):
    is_positive = np.arange(20) >= 13
    found = metrics.binary_metrics(is_positive, sign * (np.arange(20) - 12.5), once(20))
    assert found["auroc"] == found["balanced_accuracy"] == found["f1"] == (sign + 1) / 2
    assert found["ap"] == 1 if sign == 1 else found["ap"] < 0.3


def test_scores_that_are_all_equal_have_chance_auroc_and_the_ap_of_the_share_of_positives():
    found = metrics.binary_metrics(np.arange(20) < 7, np.zeros(20), once(20))
    assert (found["auroc"], found["ap"]) == (0.5, 0.35)


def test_multiclass_metrics_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    actual = rng.integers(3, size=50)
    predicted = np.where(rng.random(50) < 0.6, actual, rng.integers(3, size=50))
    weights = rng.integers(1, 4, size=(10, 50))

    matrix = metrics.confusion(actual, predicted, 3, weights)

    found, by_class = metrics.multiclass_metrics(matrix), metrics.f1_by_class(matrix)
    for i, weight in enumerate(weights):
        a, p = actual.repeat(weight), predicted.repeat(weight)
        np.testing.assert_array_equal(matrix[i], library.confusion_matrix(a, p))
        np.testing.assert_allclose(by_class[i], library.f1_score(a, p, average=None))
        assert found["macro_f1"][i] == pytest.approx(library.f1_score(a, p, average="macro"))
        assert found["balanced_accuracy"][i] == pytest.approx(library.balanced_accuracy_score(a, p))
        assert found["accuracy"][i] == pytest.approx(library.accuracy_score(a, p))


@LEVELS
def test_regression_metrics_are_those_of_scikit_learn_and_scipy(num_levels):
    _, predicted, weights = drawn(num_levels)
    target = np.random.default_rng(1).integers(9, size=61) + 3 * predicted + 40

    found = metrics.regression_metrics(target, predicted, weights)

    for i, weight in enumerate(weights):
        t, p = target.repeat(weight), predicted.repeat(weight)
        assert found["mae"][i] == pytest.approx(library.mean_absolute_error(t, p))
        assert found["pearson"][i] == pytest.approx(stats.pearsonr(t, p).statistic)
        assert found["spearman"][i] == pytest.approx(stats.spearmanr(t, p).statistic)


def test_a_constant_prediction_correlates_with_nothing():
    found = metrics.regression_metrics(np.arange(9.0), np.full(9, 0.1), once(9))
    assert (found["pearson"], found["spearman"]) == (0, 0)


def test_a_thinned_curve_keeps_its_ends_and_lies_on_the_whole_one():
    rng = np.random.default_rng(0)
    is_positive = rng.random(3000) < 0.3
    scores = rng.normal(size=3000) + is_positive
    precision, recall, _ = library.precision_recall_curve(is_positive, scores)

    found = metrics.curve(is_positive, scores)

    assert len(found["recall"]) == len(found["precision"]) == metrics.MAX_CURVE_POINTS
    assert (found["recall"][0], found["precision"][0], found["recall"][-1]) == (0, 1, 1)
    assert found["recall"] == sorted(found["recall"])
    points = set(zip(recall.round(5).tolist(), precision.round(5).tolist(), strict=True))
    assert points.issuperset(zip(found["recall"], found["precision"], strict=True))
