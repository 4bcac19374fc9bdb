"""Other probes than the logistic one, and their average, as the published table of lungs and heart has it.

n rows   D width of an embedding

All of them choose their strength and calibrate their scores in the same way (choose_and_fit of
hear_distill/probes.py), so that what is averaged are probabilities for classes of equal weight, each learnt from
recordings that the member did not see.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from scipy.special import expit, logit
from sklearn.exceptions import ConvergenceWarning
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from sklearn.utils.class_weight import compute_sample_weight

from hear_distill.probes import PENALTIES, CalibratedProbe, Family, Fit, choose_and_fit, logistic_path

NEIGHBOURS = (30.0, 10.0, 3.0)  # from the strongest smoothing down, as penalties are
MLP_PENALTIES = (1.0,)  # what scikit-learn calls alpha; a search over it would double the cost of an ensemble
MLP_HIDDEN, MLP_EPOCHS = 64, 100
SMALLEST_SHARE = 1e-3  # a share of votes or a probability is kept this far from 0 and 1, where its log-odds end


@dataclass(frozen=True)
class LogOdds:
    """A classifier that only has probabilities."""

    classifier: Pipeline

    def decision_function(self, features: np.ndarray) -> np.ndarray:
        """[n, D] -> [n]"""
        return logit(self.classifier.predict_proba(features)[:, 1].clip(SMALLEST_SHARE, 1 - SMALLEST_SHARE))


def svm_path(features: np.ndarray, is_positive: np.ndarray, penalties: Sequence[float], _: int) -> Iterator[Pipeline]:
    """Linear support vector machines, in the primal: there is no randomness in it, and it converges for any penalty."""
    for penalty in penalties:
        machine = LinearSVC(C=1 / (penalty * len(features)), class_weight="balanced", dual=False, max_iter=10_000)
        yield make_pipeline(StandardScaler(), machine).fit(features, is_positive)


def knn_path(features: np.ndarray, is_positive: np.ndarray, neighbours: Sequence[float], _: int) -> Iterator[LogOdds]:
    """Share of positives among the nearest rows, near ones counting more; at most half of the rows are neighbours."""
    for count in neighbours:
        nearest = KNeighborsClassifier(max(1, min(int(count), len(features) // 2)), weights="distance")
        yield LogOdds(make_pipeline(StandardScaler(), nearest).fit(features, is_positive))


def mlp_path(features: np.ndarray, is_positive: np.ndarray, penalties: Sequence[float], seed: int) -> Iterator[LogOdds]:
    """One hidden layer, for classes of equal weight. The number of epochs is fixed: more of them is not better here."""
    weights = compute_sample_weight("balanced", is_positive)
    for penalty in penalties:
        network = MLPClassifier((MLP_HIDDEN,), alpha=penalty, max_iter=MLP_EPOCHS, random_state=seed)
        model = make_pipeline(StandardScaler(), network)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # says only that the epochs were used up
            yield LogOdds(model.fit(features, is_positive, mlpclassifier__sample_weight=weights))


FAMILIES = {
    "logistic": Family(logistic_path, PENALTIES),
    "svm": Family(svm_path, PENALTIES),
    "knn": Family(knn_path, NEIGHBOURS),
    "mlp": Family(mlp_path, MLP_PENALTIES),
}
ENSEMBLE = "ensemble"
RANDOM_PROBES = ("mlp", ENSEMBLE)  # what depends on a seed even where the split is prescribed


@dataclass(frozen=True)
class Ensemble:
    """Probes whose probabilities are averaged."""

    members: dict[str, CalibratedProbe]

    def decision_function(self, features: np.ndarray) -> np.ndarray:
        """[n, D] -> [n] log-odds of the mean probability."""
        mean = np.mean([expit(member.decision_function(features)) for member in self.members.values()], axis=0)
        return logit(mean.clip(np.finfo(float).tiny, 1 - np.finfo(float).eps))


def fit_ensemble(features: np.ndarray, is_positive: np.ndarray, groups: np.ndarray, seed: int) -> Ensemble:
    """One member of each family, all of one training part."""
    found = {name: choose_and_fit(features, is_positive, groups, seed, family) for name, family in FAMILIES.items()}
    return Ensemble(found)


def classifier_fit(probe: str, seed: int) -> Fit:
    """What scores_of_masks of hear_distill/probes.py takes, by the name of a family or 'ensemble'."""
    fit: Any = fit_ensemble if probe == ENSEMBLE else partial(choose_and_fit, family=FAMILIES[probe])
    return partial(fit, seed=seed)
