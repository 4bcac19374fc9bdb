"""The probe of HeAR's authors, as their public code describes it, so that numbers can be laid beside theirs.

n rows, one for each 2 s clip   P participants, who are the groups   D width of an embedding

Source: Google-Health/google-health, health_acoustic_representations/eval_utils.py and hear_cidrz_demo.ipynb; written
anew from a description. What differs from hear_distill/probes.py: features are not standardised; the strength is one
of 50 from 1e-5 to 1e5, by the mean over five folds of participants of the AUROC (or of the absolute error); nothing is
calibrated; every clip is a row with its participant's label; a participant's score is the mean of its clips'.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.special import expit
from sklearn import config_context
from sklearn.linear_model import LogisticRegression, Ridge, SGDClassifier
from sklearn.model_selection import GridSearchCV, KFold, StratifiedKFold
from threadpoolctl import threadpool_limits

from hear_distill.metrics import auroc, once
from hear_distill.probes import NotMeasurable, require_groups

STRENGTHS = np.logspace(-5, 5, 50)
NUM_FOLDS = 5
FOLD_SEED, FIT_SEED = 43, 42


@dataclass(frozen=True)
class PaperProbe:
    """Fitted on all rows with the strength that the search found best."""

    model: SGDClassifier | LogisticRegression | Ridge
    strength: float
    """alpha of SGD and ridge, C of logistic regression; these are inverse scales"""

    def decision_function(self, features: np.ndarray) -> np.ndarray:
        """[n, D] -> [n] log-odds, or the predicted quantity."""
        is_classifier = hasattr(self.model, "decision_function")
        return self.model.decision_function(features) if is_classifier else self.model.predict(features)


@threadpool_limits.wrap(limits=1, user_api="blas")
def fit_paper_classifier(
    features: np.ndarray, is_positive: np.ndarray, groups: np.ndarray, solver: Literal["sgd", "logistic"] = "sgd"
) -> PaperProbe:
    """Raises NotMeasurable for a label in fewer participants than folds: its AUROC would be undefined in some."""
    require_groups(is_positive, groups, NUM_FOLDS, " in the training part")
    sgd = SGDClassifier(loss="log_loss", class_weight="balanced", max_iter=10**6, tol=1e-3, random_state=FIT_SEED)
    logistic = LogisticRegression(class_weight="balanced", max_iter=10**7)
    model, name = (sgd, "alpha") if solver == "sgd" else (logistic, "C")
    aurocs = np.zeros((len(STRENGTHS), NUM_FOLDS))
    # Not GridSearchCV: it finds the same, but its own work took three fifths of the time, 251 fits in all. For the same
    # reason the numbers are checked once, not at each fit.
    assert np.isfinite(features).all()
    with config_context(assume_finite=True, skip_parameter_validation=True):
        for fold, (fitted, scored) in enumerate(participant_folds(groups, is_positive)):
            inside, outside, weights = features[fitted], features[scored], once(len(scored))
            for i, strength in enumerate(STRENGTHS):
                model.set_params(**{name: strength}).fit(inside, is_positive[fitted])
                scores = model.decision_function(outside)
                aurocs[i, fold] = auroc(is_positive[scored], scores, weights).item()
        best = float(STRENGTHS[aurocs.mean(axis=1).argmax()])  # the first of equally good ones
        return PaperProbe(model.set_params(**{name: best}).fit(features, is_positive), best)


@threadpool_limits.wrap(limits=1, user_api="blas")
def fit_paper_ridge(features: np.ndarray, target: np.ndarray, groups: np.ndarray) -> PaperProbe:
    """The strength with the lowest mean absolute error over the folds."""
    if len(np.unique(groups)) < NUM_FOLDS:
        raise NotMeasurable(f"{len(np.unique(groups))} groups in the training part, at least {NUM_FOLDS} needed")
    search = GridSearchCV(
        Ridge(), {"alpha": STRENGTHS}, scoring="neg_mean_absolute_error", cv=participant_folds(groups, None)
    )
    search.fit(features, target)
    return PaperProbe(search.best_estimator_, search.best_params_["alpha"])


def participant_folds(groups: np.ndarray, is_positive: np.ndarray | None) -> list[tuple[Any, Any]]:
    """Rows to fit on and rows to score of each fold; stratified on whether a participant has a positive clip."""
    participants, index = np.unique(groups, return_inverse=True)
    label = np.zeros(len(participants), dtype=bool)
    if is_positive is not None:
        np.logical_or.at(label, index, is_positive)
    splitter = (KFold if is_positive is None else StratifiedKFold)(NUM_FOLDS, shuffle=True, random_state=FOLD_SEED)
    splits = splitter.split(participants, label)
    return [(np.flatnonzero(np.isin(index, fit)), np.flatnonzero(np.isin(index, score))) for fit, score in splits]


def by_participant(is_positive: np.ndarray, scores: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, ...]:
    """[n] x 3 -> [P] x 3: whether any clip is positive, mean probability less 0.5, the first row."""
    _, first, index = np.unique(groups, return_index=True, return_inverse=True)
    label = np.zeros(len(first), dtype=bool)
    np.logical_or.at(label, index, is_positive)
    probability = np.bincount(index, expit(scores)) / np.bincount(index)
    return label, probability - 0.5, first
