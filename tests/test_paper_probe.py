"""The probe of HeAR's authors against their recipe written out as loops."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge, SGDClassifier
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold

from hear_distill import paper_probe
from hear_distill.paper_probe import by_participant, fit_paper_classifier, fit_paper_ridge, participant_folds
from hear_distill.probes import NotMeasurable


def participants() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[90, 3] clips, labels by participant, and 30 participants of three clips who are not in order."""
    rng = np.random.default_rng(0)
    groups = rng.permutation(np.arange(30).repeat(3))
    is_positive = (np.arange(30) % 3 == 0)[groups]
    features = rng.normal([0, 2, 0], [1, 1, 3], (90, 3))
    features[:, 0] += 1.2 * is_positive
    return features, is_positive, groups


def test_the_grid_is_fifty_strengths_from_1e_minus_5_to_1e5():
    strengths = paper_probe.STRENGTHS
    assert (len(strengths), strengths[0], strengths[-1]) == (50, pytest.approx(1e-5), pytest.approx(1e5))
    np.testing.assert_allclose(strengths[1:] / strengths[:-1], strengths[1] / strengths[0])


def test_folds_are_of_participants_stratified_on_their_label():
    _, is_positive, groups = participants()
    folds = participant_folds(groups, is_positive)
    assert sorted(row for _, scored in folds for row in scored) == list(range(90))
    for fitted, scored in folds:
        assert set(groups[fitted]).isdisjoint(groups[scored]) and len(fitted) + len(scored) == 90
        assert is_positive[scored].sum() == 6 and len(scored) == 18


@pytest.mark.parametrize("solver", ["sgd", "logistic"])
def test_the_strength_is_that_of_the_best_mean_auroc_on_raw_features(solver, monkeypatch):
    monkeypatch.setattr(paper_probe, "STRENGTHS", np.array([1e-5, 1e-3, 0.1, 10.0, 1e3]))
    features, is_positive, groups = participants()

    def model(strength: float):
        if solver == "sgd":
            return SGDClassifier(
                loss="log_loss", alpha=strength, class_weight="balanced", random_state=42, max_iter=10**6
            )
        return LogisticRegression(C=strength, class_weight="balanced", max_iter=10**7)

    label = np.array([is_positive[groups == person].max() for person in range(30)])
    means = {}
    for strength in (1e-5, 1e-3, 0.1, 10.0, 1e3):
        aurocs = []
        for fit, score in StratifiedKFold(5, shuffle=True, random_state=43).split(np.arange(30), label):
            inside, outside = np.isin(groups, fit), np.isin(groups, score)
            fitted = model(strength).fit(features[inside], is_positive[inside])
            aurocs.append(roc_auc_score(is_positive[outside], fitted.decision_function(features[outside])))
        means[strength] = np.mean(aurocs)
    best = max(means, key=means.get)
    expected = model(best).fit(features, is_positive).decision_function(features)

    found = fit_paper_classifier(features, is_positive, groups, solver)

    assert len({round(mean, 6) for mean in means.values()}) > 1
    assert found.strength == best
    np.testing.assert_array_equal(found.decision_function(features), expected)


def test_ridge_takes_the_strength_with_the_lowest_absolute_error():
    features, _, groups = participants()
    target = 50 + 9 * features[:, 0] + np.random.default_rng(1).normal(0, 3, 90)

    found = fit_paper_ridge(features, target, groups)

    expected = Ridge(alpha=found.strength).fit(features, target).predict(features)
    np.testing.assert_allclose(found.decision_function(features), expected)
    errors = []
    for strength in paper_probe.STRENGTHS:
        parts = []
        for fit, score in participant_folds(groups, None):
            predicted = Ridge(alpha=strength).fit(features[fit], target[fit]).predict(features[score])
            parts.append(np.abs(predicted - target[score]).mean())
        errors.append(np.mean(parts))
    assert paper_probe.STRENGTHS[np.argmin(errors)] == found.strength < 1e3
    assert np.abs(expected - target).mean() < 3


def test_too_few_participants_are_named():
    features, is_positive, groups = participants()
    few = np.isin(groups, [0, 3, 6, 9])  # four participants with the label
    with pytest.raises(NotMeasurable, match="groups that hold this label in the training part: 4, at least 5"):
        fit_paper_classifier(features[few | ~is_positive], is_positive[few | ~is_positive], groups[few | ~is_positive])
    with pytest.raises(NotMeasurable, match="4 groups in the training part, at least 5"):
        fit_paper_ridge(features[few], features[few, 0], groups[few])


def test_a_participant_scores_the_mean_probability_of_the_clips_and_is_positive_if_one_of_them_is():
    log_odds = np.log([0.9 / 0.1, 0.2 / 0.8, 0.6 / 0.4, 0.3 / 0.7])
    label, score, first = by_participant(np.array([False, True, False, False]), log_odds, np.array([7, 2, 7, 2]))
    np.testing.assert_allclose(score, [0.25 - 0.5, 0.75 - 0.5])
    assert label.tolist() == [True, False] and first.tolist() == [1, 0]
