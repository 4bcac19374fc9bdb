"""A quick look at what the student's embedding is good for: mAP of linear probes on some rows of a labelled table.

in:   a Parquet file with columns audio, label, group and perhaps fold; the student
out:  one number; chance is the mean share of the labels, 1 is perfect
cost: the table is decoded once; a look is a forward pass of NUM_ROWS x NUM_WINDOWS clips at most, and the probes

For a curve over training, not for a report: one fixed penalty, few recordings, no interval. evaluate_distilled_hear.py
makes the report.

r rows   w windows of 2 s   D width of the trunk's embedding
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hear_distill.audio import DecodeError, decode, windows
from hear_distill.eval_datasets import load_dataset
from hear_distill.metrics import average_precision
from hear_distill.probes import NotMeasurable, linear_probe, scores_of_masks
from hear_distill.splits import Plan, Rows, plan_of
from hear_distill.tasks import Dataset, DatasetError, Task, labels_of

NUM_ROWS = 400  # of the table, as equally many of each label as there are
NUM_WINDOWS = 2  # of a recording, evenly spread; the embedding of the recording is their mean
PENALTY = 0.01  # of 10, 1, ..., 0.001 the best, or nearly, for three untrained embeddings on ESC-10
PART = 256  # windows at a time
SEED = 0  # not the run's: every run is measured on the same rows
MAX_UNREADABLE_SHARE = 0.5

Embed = Callable[[np.ndarray], Tensor]  # [w, 32000] int16 -> [w, D]


class QuickProbe:
    """The rows that are probed, decoded, and their tasks with their folds. Says what it found."""

    def __init__(self, path: Path) -> None:
        """Raises DatasetError for a table that cannot be read, has mostly broken audio, or no label to be measured."""
        table = load_dataset(f"table={path}")
        chosen = spread_rows(labels_of(table))
        unreadable: Counter[str] = Counter()
        samples, rows = [], []
        for (row,), data in table.read():
            if row not in chosen:
                continue
            try:
                found = windows(decode(data or b""))
            except DecodeError as e:
                unreadable[e.reason] += 1
                continue
            samples.append(found[np.linspace(0, len(found) - 1, min(NUM_WINDOWS, len(found))).round().astype(int)])
            rows.append(row)
        if unreadable.total() > MAX_UNREADABLE_SHARE * len(chosen):
            raise DatasetError(
                f"{unreadable.total()} of {len(chosen)} rows of {path} are unreadable: {dict(unreadable)}"
            )
        self.samples = np.concatenate(samples)  # [w, 32000] int16
        self.owners = np.repeat(np.arange(len(rows)), [len(part) for part in samples])  # [w] place among the rows
        self.plans = plans_of(table, np.array(rows))
        left_out = f", {unreadable.total()} of them unreadable" if unreadable else ""
        print(f"quick probe: {len(chosen)} rows of {path}{left_out}, {len(self.plans)} labels")

    def measure(self, embed: Embed) -> float:
        """Mean AP of the labels; NaN for embeddings that are not finite."""
        parts = [embed(self.samples[begin : begin + PART]) for begin in range(0, len(self.samples), PART)]
        embeddings = torch.cat(parts).double().cpu().numpy()  # [w, D]
        if not np.isfinite(embeddings).all():
            return float("nan")
        features = np.zeros((self.owners[-1] + 1, embeddings.shape[1]))  # [r, D]
        np.add.at(features, self.owners, embeddings)
        features /= np.bincount(self.owners)[:, None]
        once = np.ones((1, len(features)), dtype=int)
        precisions = []
        for plan in self.plans:
            scores = scores_of_masks(features, plan.target, plan.groups, plan.splits[0], fit)  # [r]
            precisions.append(average_precision(plan.target, scores, once).item())
        return float(np.mean(precisions))


def plans_of(table: Dataset, rows: np.ndarray) -> list[Plan]:
    """The tasks that these rows suffice for, with their folds. Raises DatasetError if there is none."""
    folds = table.splits["folds"].parts[rows] if "folds" in table.splits else None
    plans, problem = [], ""
    for name, task in table.tasks.items():
        part = Task(kind="binary", labels=task.labels[rows], takes_part=np.ones(len(rows), bool))
        try:
            plans.append(plan_of(part, Rows(groups=table.groups[rows], folds=folds), SEED))
        except NotMeasurable as e:
            problem = f"{name}: {e}"
    if not plans:
        raise DatasetError(f"no label of {table.name} can be probed, such as {problem}; name another --probe-table")
    return plans


def fit(features: np.ndarray, is_positive: np.ndarray, _: np.ndarray) -> object:
    """[r, D] -> the probe of one training part."""
    return linear_probe(features, is_positive, PENALTY)


def spread_rows(labels: np.ndarray) -> np.ndarray:
    """[r] labels -> the rows to probe, ascending: NUM_ROWS at most, as equally many of each label as there are."""
    shuffled = np.random.default_rng(SEED).permutation(len(labels))
    seen: Counter[str] = Counter()
    rank = np.empty(len(labels), dtype=int)  # of the row among those of its label
    for row in shuffled:
        rank[row] = seen[labels[row]]
        seen[labels[row]] += 1
    return np.sort(shuffled[np.argsort(rank[shuffled], kind="stable")][:NUM_ROWS])
