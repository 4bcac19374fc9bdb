"""Probes of other kinds, and the mean of their probabilities."""

from functools import partial

import numpy as np
import pytest
from scipy.special import expit
from sklearn.metrics import average_precision_score
from test_probes import example

from hear_distill.ensemble import ENSEMBLE, FAMILIES, Ensemble, classifier_fit, fit_ensemble
from hear_distill.probes import grouped_folds, masks_of, scores_of_masks


def ring(num_rows: int = 240) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[n, 2]: no line separates the two kinds of rows, any neighbourhood does."""
    rng = np.random.default_rng(0)
    is_positive = rng.random(num_rows // 2).repeat(2) < 0.4
    angle, radius = rng.uniform(0, 2 * np.pi, num_rows), np.where(is_positive, 1, 3) + rng.normal(0, 0.2, num_rows)
    return radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1), is_positive, np.arange(num_rows) // 2


def held_out_ap(probe: str, features: np.ndarray, is_positive: np.ndarray, groups: np.ndarray) -> float:
    masks = masks_of(grouped_folds(is_positive, groups, 3, seed=0))
    return average_precision_score(
        is_positive, scores_of_masks(features, is_positive, groups, masks, classifier_fit(probe, 0))
    )


@pytest.mark.parametrize(("probe", "is_curved"), [("logistic", False), ("svm", False), ("knn", True), ("mlp", True)])
def test_linear_probes_see_no_ring_and_the_others_do(probe, is_curved):
    found = held_out_ap(probe, *ring())
    assert found > 0.95 if is_curved else found < 0.6


@pytest.mark.parametrize("probe", FAMILIES)
def test_every_probe_reads_what_one_feature_says(probe):
    rng = np.random.default_rng(0)
    groups = np.arange(90) // 2
    is_positive = rng.random(45)[groups] < 0.3
    features = rng.normal([0, 7, 0], [1, 1, 100], (90, 3))
    features[:, 0] += 6 * is_positive
    assert held_out_ap(probe, features, is_positive, groups) > 0.95


@pytest.mark.parametrize("probe", FAMILIES)
def test_probabilities_of_every_member_are_for_classes_of_equal_weight(probe):
    """A fifth of the rows is positive; features know nothing; so a probe must say one half, not one fifth."""
    rng = np.random.default_rng(0)
    is_positive = np.arange(150) % 5 == 0
    found = classifier_fit(probe, 0)(rng.normal(size=(150, 4)), is_positive, np.arange(150))
    assert expit(found.decision_function(rng.normal(size=(400, 4)))).mean() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("probe", ["logistic", "svm", "mlp"])
def test_where_there_is_nothing_to_learn_a_rare_class_weighs_as_much_as_the_other(probe):
    """Before the calibration, which starts from log-odds that must not lie near an end."""
    path, strengths = FAMILIES[probe]
    found = next(path(np.ones((150, 2)), np.arange(150) % 5 == 0, strengths, 0)).decision_function(np.ones((1, 2)))
    assert found == pytest.approx(0, abs=0.05)


def test_the_ensemble_is_the_mean_of_its_members_probabilities():
    features, is_positive, groups = example()
    found = fit_ensemble(features, is_positive, groups, seed=0)

    assert set(found.members) == {"logistic", "svm", "knn", "mlp"}
    members = [expit(member.decision_function(features)) for member in found.members.values()]
    np.testing.assert_allclose(expit(found.decision_function(features)), np.mean(members, axis=0), rtol=1e-9)
    assert np.ptp(members, axis=0).max() > 0.1  # they do not all say the same


def test_members_that_are_sure_beyond_doubt_still_give_finite_log_odds():
    class Sure:
        def decision_function(self, features):
            return np.array([-2000.0, 2000.0])

    found = Ensemble({"one": Sure(), "other": Sure()}).decision_function(np.zeros((2, 1)))
    assert np.isfinite(found).all() and found[0] < -30 < 30 < found[1]


@pytest.mark.parametrize(("probe", "depends"), [("mlp", True), ("svm", False), ("knn", False)])
def test_what_is_random_is_the_same_again_under_its_seed_and_only_the_network_is(probe, depends):
    features, is_positive, _ = example()
    path, strengths = FAMILIES[probe]
    scores = [next(path(features, is_positive, strengths, seed)).decision_function(features) for seed in (0, 0, 1)]
    assert (scores[0] == scores[1]).all()
    assert (scores[0] != scores[2]).any() == depends


def test_a_probe_of_neighbours_works_on_fewer_rows_than_it_would_ask():
    fit = partial(classifier_fit("knn", 0))
    is_positive = np.arange(8) % 2 == 0
    assert np.isfinite(fit(is_positive[:, None] * 3.0, is_positive, np.arange(8)).decision_function(np.eye(1))).all()


def test_the_names_of_probes_are_those_of_the_families_and_the_ensemble():
    with pytest.raises(KeyError, match="forest"):
        classifier_fit("forest", 0)
    assert classifier_fit(ENSEMBLE, 0).func is fit_ensemble
