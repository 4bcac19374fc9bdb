"""Probes that never saw the groups they score: splits, the search for a strength inside a training part, scores.

n rows   D width of an embedding   G groups   C classes   S strengths

A split is a list of masks [n]: the rows of a mask are scored by a probe that is fitted on the rows outside of it. So
five folds are five masks, and an official test part is one; rows in no mask are trained on only.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from hear_distill.files import UserError
from hear_distill.metrics import average_precision, once

NUM_FOLDS = 5  # of a table that prescribes none, and of the search for the penalty inside a training part
# Weight of half the squared norm beside the mean loss of a row, so that it means the same for any number of rows.
PENALTIES = (10.0, 1.0, 0.1, 0.01, 0.001, 0.0001)
CALIBRATION_PENALTY = 0.01  # keeps the slope finite where the scores separate the classes
MAX_ITERATIONS = 10_000

Fit = Callable[[np.ndarray, np.ndarray, np.ndarray], Any]  # features, target, groups -> has a decision_function
Path = Callable[[np.ndarray, np.ndarray, Sequence[float], int], Iterator[Any]]  # features, is_positive, strengths, seed


class NotMeasurable(Exception):
    """A task with too few groups. The text is the reason, for the report."""


class Leak(UserError):
    """A group on both sides of a split."""


class Family(NamedTuple):
    """A kind of probe: `path` gives one, fitted and with a decision_function, for each of the strengths in turn."""

    path: Path
    strengths: tuple[float, ...]


def count_groups(is_positive: np.ndarray, groups: np.ndarray) -> tuple[int, int]:
    """Groups that hold a positive row, and groups that hold a negative one; many hold both."""
    return len(np.unique(groups[is_positive])), len(np.unique(groups[~is_positive]))


def require_groups(is_positive: np.ndarray, groups: np.ndarray, needed: int, where: str) -> None:
    """Raise NotMeasurable where the label, or its absence, is in fewer groups than needed."""
    for found, what in zip(count_groups(is_positive, groups), ("this label", "other rows"), strict=True):
        if found < needed:
            raise NotMeasurable(f"groups that hold {what}{where}: {found}, at least {needed} needed")


def grouped_folds(target: np.ndarray, groups: np.ndarray, num_folds: int, seed: int) -> np.ndarray:
    """[n] fold of each row: groups in the order of their mean target, equals shuffled, are dealt out in turn.

    Groups with a positive row are neighbours in that order, and so are groups with a negative one. So every fold gets
    both kinds of rows if `num_folds` groups hold them, which StratifiedGroupKFold of scikit-learn does not promise.
    The same holds for each class of a group with one class number, and folds of a quantity get equal shares of its
    range.
    """
    names, index = np.unique(groups, return_inverse=True)
    mean = np.bincount(index, target) / np.bincount(index)  # [G]
    order = np.lexsort((np.random.default_rng(seed).permutation(len(names)), mean))
    folds = np.empty(len(names), dtype=int)
    folds[order] = np.arange(len(names)) % num_folds
    return folds[index]


def masks_of(folds: np.ndarray) -> list[np.ndarray]:
    """[n] -> the split of a column of folds: every row is scored once."""
    return [folds == fold for fold in np.unique(folds)]


def require_no_leak(groups: np.ndarray, masks: Sequence[np.ndarray]) -> None:
    """Raise Leak where a group is both scored and trained on."""
    for mask in masks:
        torn = np.intersect1d(groups[mask], groups[~mask])
        if len(torn):
            raise Leak(
                f"{len(torn)} of {len(np.unique(groups))} groups are on both sides of a split, such as {torn[0]}: a "
                f"probe would be tested on what it was trained on; put each group on one side, or leave the split to "
                f"the evaluator"
            )


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
    return next(logistic_path(features, is_positive, (penalty,), 0))


def logistic_path(
    features: np.ndarray, is_positive: np.ndarray, penalties: Sequence[float], _: int
) -> Iterator[Pipeline]:
    """The linear probe for each penalty; a fit begins where the one before ended, so descending ones are fastest."""
    scaler = StandardScaler().fit(features)
    scaled = scaler.transform(features)
    regression = LogisticRegression(class_weight="balanced", max_iter=MAX_ITERATIONS, warm_start=True)
    for penalty in penalties:
        regression.set_params(C=1 / (penalty * len(scaled))).fit(scaled, is_positive)
        yield make_pipeline(scaler, copy.deepcopy(regression))


@dataclass(frozen=True)
class CalibratedProbe:
    """A probe, and the map from its scores to log-odds: without it those of a strong penalty are much the smaller."""

    penalty: float
    probe: Any
    calibration: Pipeline

    def decision_function(self, features: np.ndarray) -> np.ndarray:
        """[n, D] -> [n] log-odds, for classes of equal weight."""
        return self.calibration.decision_function(self.probe.decision_function(features)[:, None])


@threadpool_limits.wrap(limits=1, user_api="blas")
def choose_and_fit(
    features: np.ndarray, is_positive: np.ndarray, groups: np.ndarray, seed: int, family: Family | None = None
) -> CalibratedProbe:
    """The probe of one training part: the strength with the best AP in a cross-validation grouped inside this part.

    Of equally good ones the first, the strongest, is taken, and refitted on all rows. The calibration, in one
    dimension, is fitted on the scores of that cross-validation, as the refitted probe is too sure of the rows that it
    has seen. Without a family: logistic regression.
    """
    path, strengths = family or Family(logistic_path, PENALTIES)
    folds = grouped_folds(is_positive, groups, min(NUM_FOLDS, *count_groups(is_positive, groups)), seed)
    scores = np.empty((len(strengths), len(features)))  # [S, n]
    for mask in masks_of(folds):
        for i, probe in enumerate(path(features[~mask], is_positive[~mask], strengths, seed)):
            scores[i, mask] = probe.decision_function(features[mask])
    weights = once(len(groups))
    best = int(np.argmax([average_precision(is_positive, of_one, weights).item() for of_one in scores]))
    calibration = linear_probe(scores[best][:, None], is_positive, CALIBRATION_PENALTY)
    refitted = next(path(features, is_positive, (strengths[best],), seed))
    return CalibratedProbe(strengths[best], refitted, calibration)


@dataclass(frozen=True)
class RidgeProbe:
    """Least squares on standardised features, with the penalty that a search inside the training part found best."""

    search: GridSearchCV

    def decision_function(self, features: np.ndarray) -> np.ndarray:
        """[n, D] -> [n] in the unit of the target."""
        return self.search.predict(features)


@threadpool_limits.wrap(limits=1, user_api="blas")
def fit_ridge(features: np.ndarray, target: np.ndarray, groups: np.ndarray, seed: int) -> RidgeProbe:
    """Ridge regression of one training part; the penalty is that with the lowest absolute error, by grouped folds."""
    folds = grouped_folds(target, groups, min(NUM_FOLDS, len(np.unique(groups))), seed)
    splits = [(np.flatnonzero(~mask), np.flatnonzero(mask)) for mask in masks_of(folds)]
    grid = {"ridge__alpha": [penalty * len(features) for penalty in PENALTIES]}
    model = make_pipeline(StandardScaler(), Ridge())
    return RidgeProbe(GridSearchCV(model, grid, scoring="neg_mean_absolute_error", cv=splits).fit(features, target))


def scores_of_masks(
    features: np.ndarray, target: np.ndarray, groups: np.ndarray, masks: Sequence[np.ndarray], fit: Fit
) -> np.ndarray:
    """[n, D] -> [n]: each row of a mask is scored by the probe that `fit` makes of the rows outside; NaN for others.

    The scores are pooled into one AP per task. A mean over folds would rate a fold of two positives like one of twenty,
    could not be resampled by group, as a draw may empty a fold, and is higher for the same probes, as the AP of few
    rows is: 0.70 against 0.65 for a random student on the ten classes of ESC-10.

    Raises:
        Leak: a group is in a mask and outside of it.
    """
    require_no_leak(groups, masks)
    scores = np.full(len(features), np.nan)
    for mask in masks:
        probe = fit(features[~mask], target[~mask], groups[~mask])
        scores[mask] = probe.decision_function(features[mask])
    return scores


def class_scores(
    features: np.ndarray, classes: np.ndarray, groups: np.ndarray, masks: Sequence[np.ndarray], fit: Fit
) -> np.ndarray:
    """[n, D], [n] numbers of classes -> [n, C]: one probe for each class against the rest, so that log-odds compare."""
    kinds = range(classes.max() + 1)
    return np.stack([scores_of_masks(features, classes == kind, groups, masks, fit) for kind in kinds], axis=1)
