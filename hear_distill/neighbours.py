"""A score that needs no training: what the nearest recordings of other groups are.

n rows   m rows that are scored at a time   D width of an embedding   C classes

Of every row the 10 most similar rows by cosine vote for their class with weight exp(similarity / 0.07), as in X-ARES
(k = 10, T = 0.07). Nothing is chosen or fitted, so it can follow a training run and nothing in it can be overfitted.
"""

from collections.abc import Sequence

import numpy as np

from hear_distill.probes import require_no_leak

NUM_NEIGHBOURS = 10
TEMPERATURE = 0.07
BLOCK_ROWS = 1024  # rows of similarities in memory at a time


def neighbour_votes(
    features: np.ndarray, classes: np.ndarray, groups: np.ndarray, masks: Sequence[np.ndarray] | None = None
) -> np.ndarray:
    """[n, D], [n] numbers of classes -> [n, C] votes that sum to 1.

    Without masks each row asks all rows of other groups; with the masks of a split (hear_distill/probes.py) the rows of
    a mask ask those outside of it, and rows in no mask get NaN.

    Raises:
        Leak: a group is in a mask and outside of it.
        ValueError: some row has fewer than 10 rows to ask, or an embedding that is zero or not finite.
    """
    length = np.linalg.norm(features, axis=1, keepdims=True)
    if not (np.isfinite(length).all() and (length > 0).all()):
        raise ValueError(f"{int((~(length > 0)).sum())} of {len(length)} embeddings are zero or not finite")
    unit = features / length
    belongs = np.eye(classes.max() + 1)[classes]  # [n, C]
    votes = np.full(belongs.shape, np.nan)
    require_no_leak(groups, masks or [])
    _, group = np.unique(groups, return_inverse=True)  # numbers compare faster than text
    for mask in [np.ones(len(groups), dtype=bool)] if masks is None else masks:
        asked = np.arange(len(groups)) if masks is None else np.flatnonzero(~mask)
        for rows in np.split(np.flatnonzero(mask), range(BLOCK_ROWS, mask.sum(), BLOCK_ROWS)):
            similarity = unit[rows] @ unit[asked].T  # [m, asked]
            similarity[group[rows][:, None] == group[asked]] = -np.inf
            votes[rows] = _vote(similarity, belongs[asked])
    return votes


def _vote(similarity: np.ndarray, belongs: np.ndarray) -> np.ndarray:
    """[m, asked], [asked, C] -> [m, C]"""
    fewest = int(np.isfinite(similarity).sum(axis=1).min())
    if fewest < NUM_NEIGHBOURS:
        raise ValueError(f"a row has {fewest} rows of other groups to ask, at least {NUM_NEIGHBOURS} needed")
    nearest = np.argpartition(-similarity, NUM_NEIGHBOURS - 1, axis=1)[:, :NUM_NEIGHBOURS]
    logits = np.take_along_axis(similarity, nearest, axis=1) / TEMPERATURE
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (weights[:, :, None] * belongs[nearest]).sum(axis=1) / weights.sum(axis=1, keepdims=True)


def neighbour_accuracy(
    features: np.ndarray, classes: np.ndarray, groups: np.ndarray, masks: Sequence[np.ndarray] | None = None
) -> float:
    """Share of the scored rows whose class gets the most votes."""
    votes = neighbour_votes(features, classes, groups, masks)
    is_scored = np.isfinite(votes[:, 0])
    return float((votes[is_scored].argmax(axis=1) == classes[is_scored]).mean())
