"""Linear probes that never saw the groups they score, average precision, and a bootstrap over groups.

n rows   D width of an embedding   K tasks   d draws of the bootstrap, the first of which is the table as it stands
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

NUM_FOLDS = 5  # of a table that prescribes none, and of the search for the penalty inside a training part
# Weight of half the squared norm beside the mean loss of a row, so that it means the same for any number of rows.
PENALTIES = (10.0, 1.0, 0.1, 0.01, 0.001, 0.0001)
CALIBRATION_PENALTY = 0.01  # keeps the slope finite where the scores separate the classes
MAX_ITERATIONS = 10_000
NUM_DRAWS = 1000
PERCENTILES = (2.5, 97.5)

Fit = Callable[[np.ndarray, np.ndarray, np.ndarray], Any]  # features, is_positive, groups -> has a decision_function


class NotMeasurable(Exception):
    """A task with too few groups. The text is the reason, for the report."""


class Interval(NamedTuple):
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


def task_folds(is_positive: np.ndarray, groups: np.ndarray, prescribed: np.ndarray | None, seed: int) -> np.ndarray:
    """[n] the fold of each row: the prescribed ones, else NUM_FOLDS over groups, stratified for this task.

    Raises:
        NotMeasurable: the label, or its absence, is in fewer groups than there are folds; or outside some prescribed
            fold in fewer than the two that the choice of a penalty takes.
    """
    num_folds = NUM_FOLDS if prescribed is None else len(np.unique(prescribed))
    _require_groups(is_positive, groups, num_folds, "")
    if prescribed is None:
        return grouped_folds(is_positive, groups, num_folds, seed)
    for fold in np.unique(prescribed):
        rest = prescribed != fold
        _require_groups(is_positive[rest], groups[rest], 2, f" outside fold {fold}")
    return prescribed


def count_groups(is_positive: np.ndarray, groups: np.ndarray) -> tuple[int, int]:
    """Groups that hold a positive row, and groups that hold a negative one; many hold both."""
    return len(np.unique(groups[is_positive])), len(np.unique(groups[~is_positive]))


def _require_groups(is_positive: np.ndarray, groups: np.ndarray, needed: int, where: str) -> None:
    for found, what in zip(count_groups(is_positive, groups), ("this label", "other rows"), strict=True):
        if found < needed:
            raise NotMeasurable(f"groups that hold {what}{where}: {found}, at least {needed} needed")


def grouped_folds(is_positive: np.ndarray, groups: np.ndarray, num_folds: int, seed: int) -> np.ndarray:
    """[n] fold of each row: groups in the order of their share of positives, equals shuffled, are dealt out in turn.

    Groups with a positive row are neighbours in that order, and so are groups with a negative one. So every fold gets
    both kinds of rows if `num_folds` groups hold them, which StratifiedGroupKFold of scikit-learn does not promise.
    """
    names, index = np.unique(groups, return_inverse=True)
    share = np.bincount(index, is_positive) / np.bincount(index)  # [groups]
    order = np.lexsort((np.random.default_rng(seed).permutation(len(names)), share))
    folds = np.empty(len(names), dtype=int)
    folds[order] = np.arange(len(names)) % num_folds
    return folds[index]


# A fit takes milliseconds: threads of BLAS gain little, and where other programs use the cores they wait for one
# another. 105 rows, 7 tasks, embeddings of 96 and 512, two cores with two busy processes beside: 16 s with one, 313 s
# with two threads.
@threadpool_limits.wrap(limits=1, user_api="blas")
def linear_probe(features: np.ndarray, is_positive: np.ndarray, penalty: float) -> Pipeline:
    """Logistic regression on standardised features, for classes of equal weight; both are fitted on these rows.

    Of equal weight, so that scores of different folds can be pooled. Else the intercept tells how many positives a
    training part held, and so, inverted, how many are in the fold that it scores. Over folds of unequal size, features
    that know nothing then had an AP of 0.22 under strong penalties; with equal weights 0.27, as a random order has.
    """
    regression = LogisticRegression(C=1 / (penalty * len(features)), class_weight="balanced", max_iter=MAX_ITERATIONS)
    return make_pipeline(StandardScaler(), regression).fit(features, is_positive)


@dataclass(frozen=True)
class CalibratedProbe:
    """A probe, and the map from its scores to log-odds: without it those of a strong penalty are much the smaller."""

    penalty: float
    probe: Pipeline
    calibration: Pipeline

    def decision_function(self, features: np.ndarray) -> np.ndarray:
        """[n, D] -> [n] log-odds, for classes of equal weight."""
        return self.calibration.decision_function(self.probe.decision_function(features)[:, None])


def choose_and_fit(features: np.ndarray, is_positive: np.ndarray, groups: np.ndarray, seed: int) -> CalibratedProbe:
    """The probe of one training part: the penalty with the best AP in a cross-validation grouped inside this part.

    Of equally good ones the strongest is taken, and refitted on all rows. The calibration, in one dimension, is fitted
    on the scores of that cross-validation, as the refitted probe is too sure of the rows that it has seen.
    """
    folds = grouped_folds(is_positive, groups, min(NUM_FOLDS, *count_groups(is_positive, groups)), seed)
    scores, precisions = [], []
    for penalty in PENALTIES:
        fit = partial(_fit_ignoring_groups, penalty=penalty)
        scores.append(held_out_scores(features, is_positive, groups, folds, fit))
        precisions.append(average_precision(is_positive, scores[-1], np.ones((1, len(groups)), dtype=int)).item())
    best = int(np.argmax(precisions))
    calibration = linear_probe(scores[best][:, None], is_positive, CALIBRATION_PENALTY)
    return CalibratedProbe(PENALTIES[best], linear_probe(features, is_positive, PENALTIES[best]), calibration)


def _fit_ignoring_groups(features: np.ndarray, is_positive: np.ndarray, _: np.ndarray, *, penalty: float) -> Pipeline:
    return linear_probe(features, is_positive, penalty)


def held_out_scores(
    features: np.ndarray, is_positive: np.ndarray, groups: np.ndarray, folds: np.ndarray, fit: Fit
) -> np.ndarray:
    """[n, D] -> [n]: each row is scored once, by the probe that `fit` makes of all other folds.

    The scores are pooled into one AP per task. A mean over folds would rate a fold of two positives like one of twenty,
    could not be resampled by group, as a draw may empty a fold, and is higher for the same probes, as the AP of few
    rows is: 0.70 against 0.65 for a random student on the ten classes of ESC-10.
    """
    scores = np.empty(len(features))
    for fold in np.unique(folds):
        held_out = folds == fold
        assert not np.isin(groups[held_out], groups[~held_out]).any(), f"a group is in fold {fold} and in another"
        probe = fit(features[~held_out], is_positive[~held_out], groups[~held_out])
        scores[held_out] = probe.decision_function(features[held_out])
    return scores


def average_precision(is_positive: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[n], [n], [d, n] -> [d]: AP as scikit-learn defines it, with one weight per row in each draw.

    Sum over thresholds of (gain in recall) x (precision there); rows of equal score pass a threshold together.
    A thousand draws of scikit-learn's function cost about a second per task, nearly all of it in checking arguments.
    """
    order = np.argsort(-scores, kind="stable")
    is_threshold = np.append(np.diff(scores[order]) != 0, True)
    above = weights[:, order].cumsum(axis=1)[:, is_threshold]  # [d, thresholds]
    hits = (weights[:, order] * is_positive[order]).cumsum(axis=1)[:, is_threshold]  # [d, thresholds]
    precision = hits / np.maximum(above, 1)  # weights are whole numbers; where nothing is above, there is no hit either
    return (np.diff(hits, axis=1, prepend=0) * precision).sum(axis=1) / hits[:, -1]


def draw_groups(is_positive: np.ndarray, groups: np.ndarray, num_draws: int, seed: int) -> np.ndarray:
    """[n, K] -> [1 + num_draws, n] int: how often each row counts; first once each, then in draws of groups.

    As many groups as there are, with replacement, and each with all its rows: rows of one group resemble each other,
    and drawing rows would make the intervals too narrow. One set of draws serves all tasks and models, so that they can
    be compared draw by draw. A draw that leaves a task without positives says nothing about it and is made again.
    The probes are not refitted: the interval is about the recordings that are scored, not about those trained on.
    """
    names, index = np.unique(groups, return_inverse=True)
    positives = np.zeros((len(names), is_positive.shape[1]), dtype=int)  # [groups, K]
    np.add.at(positives, index, is_positive)
    rng = np.random.default_rng(seed)
    draws = [np.ones(len(groups), dtype=int)]
    while len(draws) < 1 + num_draws:
        times = rng.multinomial(len(names), np.full(len(names), 1 / len(names)))
        if (times @ positives > 0).all():
            draws.append(times[index])
    return np.stack(draws)


def interval(draws: np.ndarray) -> Interval:
    """[d] -> the first, which is the table as it stands, between percentiles of the others."""
    return Interval(*map(float, (draws[0], *np.percentile(draws[1:], PERCENTILES))))
