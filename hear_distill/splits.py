"""A task on the rows of a dataset: which rows take part, what is asked of them, and who is scored by whom.

n rows of the dataset   m rows that take part   C classes
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from hear_distill.probes import NUM_FOLDS, NotMeasurable, grouped_folds, masks_of, require_groups, require_no_leak
from hear_distill.tasks import Task

NEEDED_GROUPS = 2  # of each kind on each side of an official split: fewer allow neither a search nor a draw
SEEDS = 5  # of what is random


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Who belongs together, and the split if one is prescribed: folds or an official test part, not both."""

    groups: np.ndarray
    """[n] text: a person, or a recording that several rows were cut from"""
    folds: np.ndarray | None = None
    """[n]"""
    is_test: np.ndarray | None = None
    """[n] bool: scored; the others are trained on"""

    def __post_init__(self) -> None:
        if self.folds is not None and self.is_test is not None:
            raise ValueError("folds and is_test are two splits, expected one")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is fitted and scored, for each seed."""

    kind: str
    rows: np.ndarray
    """[m] numbers of the rows of the dataset"""
    target: np.ndarray
    """[m] bool, number of a class, or float"""
    groups: np.ndarray
    """[m]"""
    splits: list[list[np.ndarray]]
    """for each seed the masks [m]: one where the split is prescribed"""
    classes: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    """classes that cannot be measured, whose rows take no part, and why"""

    @property
    def is_scored(self) -> np.ndarray:
        """[m]: the same for every seed."""
        return np.any(self.splits[0], axis=0)

    @property
    def is_prescribed(self) -> bool:
        """Whether the split is not ours."""
        return len(self.splits) == 1


def plan_of(task: Task, rows: Rows, seed: int) -> Plan:
    """The rows that take part and their split.

    Raises:
        NotMeasurable: too few groups hold the label, or its absence, or any two classes.
        Leak: a group is on both sides of a prescribed split.
    """
    if not task.takes_part.any():
        raise NotMeasurable("no row takes part: none is labelled and readable")
    kept = np.flatnonzero(task.takes_part)
    require_no_leak(rows.groups[kept], _prescribed(kept, rows) or [])
    if task.kind == "multiclass":
        return _multiclass_plan(task.labels, kept, rows, seed)
    target, groups = task.labels[kept], rows.groups[kept]
    if task.kind == "binary":
        target = target.astype(bool)
        _require_both_kinds(target, kept, rows)
        return Plan(kind="binary", rows=kept, target=target, groups=groups, splits=_splits(target, kept, rows, seed))
    found = len(np.unique(groups))
    if found < NUM_FOLDS or len(np.unique(target)) < NUM_FOLDS:
        raise NotMeasurable(f"{found} groups with {len(np.unique(target))} values, at least {NUM_FOLDS} of each needed")
    splits = _splits(target.astype(float), kept, rows, seed)
    if not all(_has_rest(groups, mask) for mask in splits[0]):
        raise NotMeasurable(f"fewer than {NEEDED_GROUPS} groups to fit on or to score in a part of the split")
    return Plan(kind="regression", rows=kept, target=target.astype(float), groups=groups, splits=splits)


def _has_rest(groups: np.ndarray, mask: np.ndarray) -> bool:
    return min(len(np.unique(groups[mask])), len(np.unique(groups[~mask]))) >= NEEDED_GROUPS


def _multiclass_plan(labels: np.ndarray, kept: np.ndarray, rows: Rows, seed: int) -> Plan:
    left_out = {}
    for name in np.unique(labels[kept]):
        try:
            _require_both_kinds(labels[kept] == name, kept, rows)
        except NotMeasurable as e:
            left_out[str(name)] = str(e)
    kept = kept[~np.isin(labels[kept], list(left_out))]
    names, target = np.unique(labels[kept], return_inverse=True)
    if len(names) < 2:
        raise NotMeasurable(f"{len(names)} classes in enough groups, at least 2 needed ({left_out})")
    usual = _usual_class(target, rows.groups[kept])
    return Plan(
        kind="multiclass",
        rows=kept,
        target=target,
        groups=rows.groups[kept],
        splits=_splits(usual, kept, rows, seed),
        classes=[str(name) for name in names],
        left_out=left_out,
    )


def _usual_class(target: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """[m] the most frequent class of each row's group: mostly its only one, as a person has one diagnosis."""
    _, index = np.unique(groups, return_inverse=True)
    counts = np.zeros((index.max() + 1, target.max() + 1), dtype=int)
    np.add.at(counts, (index, target), 1)
    return counts.argmax(axis=1)[index]


def _require_both_kinds(is_positive: np.ndarray, kept: np.ndarray, rows: Rows) -> None:
    """Raise NotMeasurable unless every part can be scored and every rest searched."""
    groups = rows.groups[kept]
    if rows.is_test is not None:
        is_test = rows.is_test[kept]
        require_groups(is_positive[is_test], groups[is_test], NEEDED_GROUPS, " in the test part")
        require_groups(is_positive[~is_test], groups[~is_test], NEEDED_GROUPS, " in the training part")
    elif rows.folds is None:
        require_groups(is_positive, groups, NUM_FOLDS, "")
    else:
        folds = rows.folds[kept]
        require_groups(is_positive, groups, len(np.unique(folds)), "")
        for fold in np.unique(folds):
            rest = folds != fold
            require_groups(is_positive[rest], groups[rest], NEEDED_GROUPS, f" outside fold {fold}")


def _prescribed(kept: np.ndarray, rows: Rows) -> list[np.ndarray] | None:
    """The masks [m] of the split that the dataset brings, None where it leaves the split to us."""
    if rows.is_test is not None:
        return [rows.is_test[kept]]
    return None if rows.folds is None else masks_of(rows.folds[kept])


def _splits(target: np.ndarray, kept: np.ndarray, rows: Rows, seed: int) -> list[list[np.ndarray]]:
    """The prescribed split alone, or for each of the seeds folds of our own."""
    prescribed = _prescribed(kept, rows)
    if prescribed is not None:
        return [prescribed]
    return [masks_of(grouped_folds(target, rows.groups[kept], NUM_FOLDS, seed + i)) for i in range(SEEDS)]


def draw_columns(plans: Sequence[Plan], num_rows: int) -> np.ndarray:
    """[n, K]: for each kind of row that a draw must not lack, the scored rows of that kind."""
    columns = []
    for plan in plans:
        kinds = [np.ones(len(plan.rows), dtype=bool)]
        if plan.kind != "regression":
            kinds = [plan.target == value for value in np.unique(plan.target)]
        for kind in kinds:
            column = np.zeros(num_rows, dtype=bool)
            column[plan.rows[kind & plan.is_scored]] = True
            columns.append(column)
    return np.stack(columns, axis=1)
