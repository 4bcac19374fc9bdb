"""Probe every embedding on every task of a dataset: the numbers of the evaluation, as a dict for JSON.

n rows of the dataset   u rows that some task scores   m rows of one task   d draws   D width of an embedding

The layout of an entry is in the docstring of hear_distill/evaluation_report.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from joblib import Parallel, delayed
from tqdm import tqdm

from hear_distill import metrics
from hear_distill.bootstrap import NUM_DRAWS, draw_groups, interval, retained_percent
from hear_distill.ensemble import ENSEMBLE, FAMILIES, RANDOM_PROBES, classifier_fit
from hear_distill.neighbours import neighbour_votes
from hear_distill.paper_probe import by_participant, fit_paper_classifier, fit_paper_ridge
from hear_distill.probes import Fit, NotMeasurable, class_scores, fit_ridge, scores_of_masks
from hear_distill.splits import SEEDS, Plan, Rows, draw_columns, plan_of
from hear_distill.tasks import Task

TEACHER = "teacher"  # the name of the embeddings that others are compared with
PAPER = "paper"
PROBES = (*FAMILIES, ENSEMBLE, PAPER)
PRIMARY = {"binary": "ap", "multiclass": "macro_f1", "regression": "spearman"}
CHANCE_AUROC = 0.5

Results = dict[str, Any]
Draws = dict[str, np.ndarray]  # metric -> [d]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Entries for the report, and the draws of the binary tasks for means over several datasets."""

    entries: list[Results]
    draws: dict[str, dict[str, Draws]]
    """task -> model -> metric -> [d]; only binary tasks that could be measured"""


def measure(
    tasks: Mapping[str, Task],
    rows: Rows,
    embeddings: Mapping[str, np.ndarray],
    probe: str,
    seed: int,
    workers: int = 1,
) -> Measured:
    """Tasks by name, embeddings [n, D] by model -> one entry per task, those not measurable with their `problem`.

    Where there is randomness, which is in our own folds and in some probes, a metric is the mean over SEEDS seeds, and
    its interval is that of the mean. One set of draws serves all tasks and models. Probes are fitted in `workers`
    processes; the numbers do not depend on how many.

    Raises:
        Leak: a group is on both sides of the split that `rows` prescribes.
    """
    plans: dict[str, Plan] = {}
    problems: dict[str, str] = {}
    for name, task in tasks.items():
        try:
            plans[name] = plan_of(task, rows, seed)
        except NotMeasurable as e:
            problems[name] = str(e)
    scores = score_all(plans, embeddings, probe, seed, workers)
    for name in list(plans):
        refused = [found for of in scores[name].values() for found in of if isinstance(found, NotMeasurable)]
        if refused:
            problems[name] = str(refused[0])
            del plans[name]
    weights = _weights(list(plans.values()), rows.groups, seed) if plans else np.zeros((1, len(rows.groups)))
    entries: list[Results] = []
    draws = {}
    for name, task in tasks.items():
        if name in problems:
            entries.append({"task": name, "kind": task.kind, "problem": problems[name]})
            continue
        entry, means = entry_of(plans[name], scores[name], embeddings, weights, probe)
        entries.append({"task": name, **entry})
        if task.kind == "binary":
            draws[name] = means
    return Measured(entries=entries, draws=draws)


def score_all(
    plans: Mapping[str, Plan], embeddings: Mapping[str, np.ndarray], probe: str, seed: int, workers: int
) -> dict[str, dict[str, list[Any]]]:
    """Task -> model -> for each seed the scores, as score_seed has them, or NotMeasurable."""
    jobs = [(name, model, i) for name in plans for model in embeddings for i in range(num_seeds(plans[name], probe))]
    calls = (delayed(_score_or_reason)(plans[name], embeddings[model], probe, seed, i) for name, model, i in jobs)
    found: dict[str, dict[str, list[Any]]] = {name: {model: [] for model in embeddings} for name in plans}
    results = Parallel(n_jobs=workers, return_as="generator")(calls)
    bar = tqdm(results, total=len(jobs), desc="probing", unit="probe", disable=None)  # None: only on a terminal
    for (name, model, _), result in zip(jobs, bar, strict=True):
        found[name][model].append(result)
    return found


def _score_or_reason(plan: Plan, features: np.ndarray, probe: str, seed: int, i: int) -> np.ndarray | NotMeasurable:
    """One task that cannot be measured must not stop the others."""
    try:
        return score_seed(plan, features, probe, seed, i)
    except NotMeasurable as e:
        return e


def num_seeds(plan: Plan, probe: str) -> int:
    """One where the split is prescribed and the probe has no randomness of its own."""
    is_random = not plan.is_prescribed or (probe in RANDOM_PROBES and plan.kind != "regression")
    return SEEDS if is_random else 1


def score_seed(plan: Plan, features: np.ndarray, probe: str, seed: int, i: int) -> np.ndarray:
    """[n, D] -> [m] of the i-th seed, or [m, C] of several classes; NaN for rows that are trained on only."""
    one = class_scores if plan.kind == "multiclass" else scores_of_masks
    fit = fit_of(plan.kind, probe, seed + i)
    return one(features[plan.rows], plan.target, plan.groups, _masks(plan, i), fit)


def entry_of(
    plan: Plan,
    scores: Mapping[str, Sequence[np.ndarray]],
    embeddings: Mapping[str, np.ndarray],
    weights: np.ndarray,
    probe: str,
) -> tuple[Results, dict[str, Draws]]:
    """Scores by model and seed, weights [d, n] -> the entry of a task, and its draws by model."""
    of_scored = weights[:, plan.rows[plan.is_scored]]
    of_models = {model: draws_over_seeds(plan, of_seeds, of_scored, probe) for model, of_seeds in scores.items()}
    means = {model: _mean_over_seeds(of_seeds) for model, of_seeds in of_models.items()}
    models = {
        model: {
            **_summary(of_models[model]),
            **shares(plan.kind, means, model),
            **details(plan, scores[model]),
            **_nearest(plan, features),
        }
        for model, features in embeddings.items()
    }
    return {**_counts(plan), "problem": None, "primary": PRIMARY[plan.kind], "models": models}, means


def _weights(plans: list[Plan], groups: np.ndarray, seed: int) -> np.ndarray:
    """[d, n]: draws among the groups with a scored row; other rows count 0."""
    columns = draw_columns(plans, len(groups))
    is_scored = columns.any(axis=1)
    weights = np.zeros((1 + NUM_DRAWS, len(groups)), dtype=np.int32)
    weights[:, is_scored] = draw_groups(columns[is_scored], groups[is_scored], NUM_DRAWS, seed)
    return weights


def fit_of(kind: str, probe: str, seed: int) -> Fit:
    """What is fitted for a task of this kind; ridge regression for a quantity, whatever the probe of the others."""
    if kind == "regression":
        return fit_paper_ridge if probe == PAPER else partial(fit_ridge, seed=seed)
    return fit_paper_classifier if probe == PAPER else classifier_fit(probe, seed)


def _masks(plan: Plan, i: int) -> list[np.ndarray]:
    """Those of the seed, or the prescribed ones."""
    return plan.splits[0] if plan.is_prescribed else plan.splits[i]


def draws_over_seeds(plan: Plan, scores: Sequence[np.ndarray], weights: np.ndarray, probe: str) -> list[Draws]:
    """Scores of each seed and weights [d, scored rows] -> for each seed all metrics of this kind of task."""
    target, groups = plan.target[plan.is_scored], plan.groups[plan.is_scored]
    found = []
    for of_seed in scores:
        scored = of_seed[plan.is_scored]
        if plan.kind == "regression":
            found.append(metrics.regression_metrics(target, scored, weights))
        elif plan.kind == "multiclass":
            matrix = metrics.confusion(target, scored.argmax(axis=1), len(plan.classes), weights)
            by_class = dict(zip((f"f1 {name}" for name in plan.classes), metrics.f1_by_class(matrix).T, strict=True))
            found.append({**metrics.multiclass_metrics(matrix), **by_class})
        else:
            found.append(metrics.binary_metrics(target, scored, weights))
            if probe == PAPER and _one_label_each(target, groups):
                label, probability, first = by_participant(target, scored, groups)
                found[-1]["auroc_by_group"] = metrics.auroc(label, probability, weights[:, first])
    return found


def _one_label_each(is_positive: np.ndarray, groups: np.ndarray) -> bool:
    """Whether groups are people with a label, not recordings that hold several events."""
    return not np.intersect1d(groups[is_positive], groups[~is_positive]).size


def _mean_over_seeds(of_seeds: Sequence[Draws]) -> Draws:
    return {name: np.mean([found[name] for found in of_seeds], axis=0) for name in of_seeds[0]}


def _summary(of_seeds: Sequence[Draws]) -> Results:
    """Metrics with intervals, and the standard deviation over seeds, None where nothing is random."""
    values = {name: [float(found[name][0]) for found in of_seeds] for name in of_seeds[0]}
    spread = {name: float(np.std(found, ddof=1)) for name, found in values.items()} if len(of_seeds) > 1 else None
    means = _mean_over_seeds(of_seeds)
    return {"metrics": {name: interval(draws)._asdict() for name, draws in means.items()}, "seed_std": spread}


def details(plan: Plan, scores: Sequence[np.ndarray]) -> Results:
    """What has no interval: precision-recall curve, confusion matrix of the first seed, F1 by fold."""
    is_scored = plan.is_scored
    target, first = plan.target[is_scored], scores[0][is_scored]
    if plan.kind == "regression":
        return {}
    if plan.kind == "binary":
        return {"curve": metrics.curve(target, first), "f1_over_folds": _over_folds(plan, scores).get("1")}
    matrix = metrics.confusion(target, first.argmax(axis=1), len(plan.classes), metrics.once(len(target)))[0]
    by_number = _over_folds(plan, scores)
    by_class = {name: by_number.get(str(number)) for number, name in enumerate(plan.classes)}
    return {"confusion": matrix.tolist(), "f1_over_folds": by_class}


def _over_folds(plan: Plan, scores: Sequence[np.ndarray]) -> Results:
    """Number of a class -> mean and standard deviation of its F1 over the folds of all seeds that hold the class.

    Empty for an official test part, which is one.
    """
    if len(plan.splits[0]) == 1:
        return {}
    found: dict[str, list[float]] = {}
    for i, of_seed in enumerate(scores):
        predicted = of_seed.argmax(axis=1) if of_seed.ndim == 2 else (of_seed > 0).astype(int)
        target = plan.target.astype(int)
        for mask in _masks(plan, i):
            weights = metrics.once(int(mask.sum()))
            matrix = metrics.confusion(target[mask], predicted[mask], target.max() + 1, weights)
            for number, value in enumerate(metrics.f1_by_class(matrix)[0]):
                if matrix[0, number].sum():
                    found.setdefault(str(number), []).append(float(value))
    return {
        number: {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)), "folds": len(values)}
        for number, values in found.items()
        if len(values) > 1
    }


def _nearest(plan: Plan, features: np.ndarray) -> Results:
    """The score without training: AP, or the share of right classes, from the nearest rows of the first split."""
    if plan.kind == "regression":
        return {"neighbours": None}
    classes = plan.target.astype(int)
    try:
        votes = neighbour_votes(features[plan.rows], classes, plan.groups, plan.splits[0])[plan.is_scored]
    except ValueError as e:
        return {"neighbours": None, "neighbours_problem": str(e)}
    target = plan.target[plan.is_scored]
    if plan.kind == "multiclass":
        return {"neighbours": float((votes.argmax(axis=1) == target).mean())}
    return {"neighbours": metrics.average_precision(target, votes[:, 1], metrics.once(len(target))).item()}


def _counts(plan: Plan) -> Results:
    """What the task is made of; shares are of the scored rows."""
    scored, groups = plan.target[plan.is_scored], plan.groups[plan.is_scored]
    counts = {
        "kind": plan.kind,
        "rows": len(plan.rows),
        "scored_rows": len(scored),
        "groups": len(np.unique(groups)),
        "classes": plan.classes,
        "left_out": plan.left_out,
    }
    if plan.kind == "binary":
        positive_groups = len(np.unique(groups[scored]))
        counts |= {"positives": int(scored.sum()), "positive_groups": positive_groups}
        counts |= {"share_of_positives": float(scored.mean())}
    return counts


def shares(kind: str, means: Mapping[str, Draws], model: str) -> Results:
    """Paired shares of the teacher's value that a model keeps; None for itself, without it, or where it has none."""
    found: Results = {"retained_percent": None, "above_chance_percent": None}
    if TEACHER in means and model != TEACHER:
        one, teacher = means[model], means[TEACHER]
        found["retained_percent"] = _as_dict(retained_percent(one[PRIMARY[kind]], teacher[PRIMARY[kind]]))
        if kind == "binary":
            share = retained_percent(one["auroc"], teacher["auroc"], CHANCE_AUROC)
            found["above_chance_percent"] = _as_dict(share)
    return found


def _as_dict(share: Any) -> Results | None:
    return None if share is None else share._asdict()


def mean_entry(draws: Mapping[str, Mapping[str, Draws]]) -> Results | None:
    """Mean over binary tasks, of one dataset or of several whose draws were merged; None without a task.

    Draws of two datasets are independent, so that any pairing of theirs is as good as another.
    """
    if not draws:
        return None
    models = next(iter(draws.values())).keys()
    names = ("ap", "auroc", "balanced_accuracy", "f1")
    means = {m: {name: np.mean([of[m][name] for of in draws.values()], axis=0) for name in names} for m in models}
    found = {
        model: {
            "metrics": {name: interval(values)._asdict() for name, values in of.items()},
            **shares("binary", means, model),
        }
        for model, of in means.items()
    }
    return {"tasks": list(draws), "models": found}


def merged(by_dataset: Mapping[str, Measured]) -> dict[str, dict[str, Draws]]:
    """Draws of several datasets, as mean_entry takes them; a task is then called 'fsd50k/Cough'."""
    return {f"{name}/{task}": of for name, measured in by_dataset.items() for task, of in measured.draws.items()}
