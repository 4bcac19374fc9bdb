"""Draws of groups with replacement, the intervals they give, and the share of a teacher that a student keeps.

n rows   G groups   K columns of rows that must not be missing   d draws, the first of which is the table as it stands
"""

from typing import NamedTuple

import numpy as np

NUM_DRAWS = 1000
PERCENTILES = (2.5, 97.5)


class Interval(NamedTuple):
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


def draw_groups(is_positive: np.ndarray, groups: np.ndarray, num_draws: int, seed: int) -> np.ndarray:
    """[n, K] -> [1 + num_draws, n] int: how often each row counts; first once each, then in draws of groups.

    As many groups as there are, with replacement, and each with all its rows: rows of one group resemble each other,
    and drawing rows would make the intervals too narrow. One set of draws serves all tasks and models, so that they can
    be compared draw by draw. A draw that leaves a task without positives says nothing about it and is made again; so
    for every column, and a task that needs negatives too brings a column for them.
    The probes are not refitted: the interval is about the recordings that are scored, not about those trained on.

    Raises:
        ValueError: a column is empty, so that no draw could ever serve.
    """
    if not is_positive.any(axis=0).all():
        raise ValueError(f"columns without a row: {np.flatnonzero(~is_positive.any(axis=0)).tolist()}; leave them out")
    names, index = np.unique(groups, return_inverse=True)
    positives = np.zeros((len(names), is_positive.shape[1]), dtype=int)  # [G, K]
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


def retained_percent(student: np.ndarray, teacher: np.ndarray, chance: float = 0.0) -> Interval | None:
    """[d], [d] of the same draws -> 100 (student - chance) / (teacher - chance), paired draw by draw.

    None where the teacher's own interval reaches down to chance: a share of nothing is no number.
    """
    if min(interval(teacher).low, teacher[0]) <= chance:
        return None
    is_sound = teacher > chance  # the few draws below the interval's end have no share
    return interval((student[is_sound] - chance) / (teacher[is_sound] - chance) * 100)
