"""Metrics of scored rows, for all draws of a bootstrap at once: a draw is a whole-number weight for each row.

n rows   d draws   C classes

scikit-learn has each of them for one draw, at a cost of about a millisecond in checking arguments; the tests compare.
Of a draw that lacks one of the two kinds of rows they say nothing: hear_distill/bootstrap.py makes none.
"""

from collections.abc import Mapping

import numpy as np
from sklearn.metrics import precision_recall_curve

MAX_CURVE_POINTS = 201  # of a precision-recall curve in a JSON file; a picture shows no more


def once(num_rows: int) -> np.ndarray:
    """[1, n]: the one draw in which each row counts once."""
    return np.ones((1, num_rows), dtype=int)


def average_precision(is_positive: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[n], [n], [d, n] -> [d]: AP as scikit-learn defines it, with one weight per row in each draw.

    Sum over thresholds of (gain in recall) x (precision there); rows of equal score pass a threshold together.
    A thousand draws of scikit-learn's function cost about a second per task, nearly all of it in checking arguments.
    """
    above, hits = _passed(is_positive, scores, weights)
    precision = hits / np.maximum(above, 1)  # weights are whole numbers; where nothing is above, there is no hit either
    return (np.diff(hits, axis=1, prepend=0) * precision).sum(axis=1) / hits[:, -1]


def auroc(is_positive: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[n], [n], [d, n] -> [d]: share of the pairs of a positive and a negative in which the positive scores higher.

    A tie counts half. This is the trapezoid under the ROC curve.
    """
    above, hits = _passed(is_positive, scores, weights)
    misses = above - hits
    height = hits - np.diff(hits, axis=1, prepend=0) / 2  # mean of the hits before and after each step to the right
    area = (np.diff(misses, axis=1, prepend=0) * height).sum(axis=1)
    return area / (hits[:, -1] * misses[:, -1])


def _passed(is_positive: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows, and positive rows, at or above each distinct score from the highest down: two of [d, thresholds]."""
    order = np.argsort(-scores, kind="stable")
    is_threshold = np.append(np.diff(scores[order]) != 0, True)
    ordered = weights[:, order]
    return ordered.cumsum(axis=1)[:, is_threshold], (ordered * is_positive[order]).cumsum(axis=1)[:, is_threshold]


def confusion(actual: np.ndarray, predicted: np.ndarray, num_classes: int, weights: np.ndarray) -> np.ndarray:
    """[n], [n] class numbers, [d, n] -> [d, C, C] weight of the rows of an actual class (first) and a predicted one."""
    cells = actual * num_classes + predicted
    counts = np.stack([weights[:, cells == cell].sum(axis=1) for cell in range(num_classes**2)], axis=1)
    return counts.reshape(-1, num_classes, num_classes)


def f1_by_class(matrix: np.ndarray) -> np.ndarray:
    """[d, C, C] -> [d, C]: 2 TP / (2 TP + FP + FN) of each class against the rest; 0 for one that never occurs."""
    hits = np.diagonal(matrix, axis1=1, axis2=2)
    return 2 * hits / np.maximum(matrix.sum(axis=1) + matrix.sum(axis=2), 1)


def recall_by_class(matrix: np.ndarray) -> np.ndarray:
    """[d, C, C] -> [d, C]: their mean is the balanced accuracy."""
    return np.diagonal(matrix, axis1=1, axis2=2) / matrix.sum(axis=2)


def binary_metrics(is_positive: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """[n], [n] log-odds, [d, n] -> metric -> [d]. Balanced accuracy and F1 call positive what has log-odds above 0."""
    matrix = confusion(is_positive.astype(int), (scores > 0).astype(int), 2, weights)
    return {
        "ap": average_precision(is_positive, scores, weights),
        "auroc": auroc(is_positive, scores, weights),
        "balanced_accuracy": recall_by_class(matrix).mean(axis=1),
        "f1": f1_by_class(matrix)[:, 1],
    }


def multiclass_metrics(matrix: np.ndarray) -> dict[str, np.ndarray]:
    """[d, C, C] -> metric -> [d]."""
    return {
        "macro_f1": f1_by_class(matrix).mean(axis=1),
        "balanced_accuracy": recall_by_class(matrix).mean(axis=1),
        "accuracy": np.trace(matrix, axis1=1, axis2=2) / matrix.sum(axis=(1, 2)),
    }


def regression_metrics(target: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """[n], [n], [d, n] -> metric -> [d]; mae in the unit of the target, lower is better."""
    ranks = _midranks(target, weights), _midranks(predicted, weights)
    same = np.broadcast_to(target, weights.shape), np.broadcast_to(predicted, weights.shape)
    return {
        "mae": (weights * np.abs(target - predicted)).sum(axis=1) / weights.sum(axis=1),
        "pearson": _correlation(*same, weights),
        "spearman": _correlation(*ranks, weights),
    }


def _midranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[n], [d, n] -> [d, n]: rank of each row among those drawn, a row of weight k counting as k; ties share theirs."""
    distinct, index = np.unique(values, return_inverse=True)
    counts = np.zeros((len(distinct), len(weights)))
    np.add.at(counts, index, weights.T)
    below = counts.cumsum(axis=0) - counts
    return (below + (counts + 1) / 2)[index].T


def _correlation(a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[d, n] x 3 -> [d]: Pearson's; 0 where one side does not vary, as it then tells nothing about the other."""
    total = weights.sum(axis=1, keepdims=True)
    a = a - (weights * a).sum(axis=1, keepdims=True) / total
    b = b - (weights * b).sum(axis=1, keepdims=True) / total
    spread = np.sqrt((weights * a**2).sum(axis=1) * (weights * b**2).sum(axis=1))
    product = (weights * a * b).sum(axis=1)
    return np.divide(product, spread, out=np.zeros_like(spread), where=spread > 1e-12 * total[:, 0])


def curve(is_positive: np.ndarray, scores: np.ndarray) -> Mapping[str, list[float]]:
    """Precision and recall over the thresholds, recall ascending from 0, thinned evenly to MAX_CURVE_POINTS."""
    precision, recall, _ = precision_recall_curve(is_positive, scores)
    keep = np.unique(np.linspace(0, len(recall) - 1, MAX_CURVE_POINTS).round().astype(int))[::-1]
    return {"recall": recall[keep].round(5).tolist(), "precision": precision[keep].round(5).tolist()}
