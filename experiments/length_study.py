"""How accuracy changes with the length of a clip: HeAR, and students that tell places by Canon, by positions, or both.

in:   labelled recordings, checkpoints of students, a teacher
out:  <out>/{length_study.json, length_study.md, length_study.png}: mAP by length, of a probe fitted at 2 s and refitted
cost: more than 3 min of CPU for the 400 recordings of ESC-10, four small models and one test fold

    python experiments/length_study.py --dataset table=esc10.parquet --test-fold 5 --teacher DIR --out results/length \\
        --checkpoint canon=canon.pt positions=positions.pt both=both.pt

A clip of s seconds is cut from each recording around its loudest 50 ms, as far as the recording allows, and goes
through the model in one forward; learned positions, the teacher's too, are stretched linearly along time. 1 s is
completed with zeros to 2 s, as in training. Only recordings of at least the longest length take part, and no recording
is repeated to make it longer: lengths that half of the recordings do not have are left out, and the output says which.

n recordings   W width of an embedding   d draws of the bootstrap
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from matplotlib.figure import Figure

from hear_distill.audio import SAMPLE_RATE
from hear_distill.bootstrap import NUM_DRAWS, draw_groups, interval
from hear_distill.embedders import Embedder, load_embedder
from hear_distill.eval_datasets import load_dataset
from hear_distill.files import atomic_write, write_json
from hear_distill.measure import fit_of
from hear_distill.metrics import average_precision
from hear_distill.probes import NotMeasurable, scores_of_masks
from hear_distill.protocols import embed, peak_middle
from hear_distill.splits import Plan, Rows, draw_columns, plan_of
from hear_distill.tasks import GROUPED, NEITHER, TEST, Dataset

FITTED_S = 2  # what HeAR and the students were trained on
MIN_SHARE = 0.5  # of the recordings that must be as long as a length
MODES = {"fitted": f"probe fitted at {FITTED_S} s", "refitted": "probe refitted at each length"}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags."""

    dataset: str
    """as for the evaluator: table=FILE.parquet, or a name and perhaps =PATH"""
    checkpoint: tuple[str, ...]
    """students, as NAME=FILE each"""
    out: Path
    """folder of the results, which are replaced"""
    teacher: str = ""
    """hub id or folder; none without"""
    test_fold: str = ""
    """the fold of the table that is scored, by probes of all others; without: every fold in turn"""
    lengths: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
    """seconds"""
    device: str = "cpu"
    """of the models"""
    batch_size: int = 32
    """clips of 2 s in one forward, or as much in longer ones"""
    seed: int = 0
    """of folds and bootstrap"""

    def __post_init__(self) -> None:
        if FITTED_S not in self.lengths or min(self.lengths) < 1:
            raise ValueError(f"--lengths must be whole seconds from 1 on, and {FITTED_S} among them")
        if not all("=" in name for name in self.checkpoint):
            raise ValueError("--checkpoint takes NAME=FILE, so that the plot can name the student")


def clip_around_peak(samples: np.ndarray, length: int) -> np.ndarray:
    """[n] -> [length] with the loudest 50 ms in its middle, as far as a recording of n >= length samples allows."""
    start = min(max(peak_middle(samples) - length // 2, 0), len(samples) - length)
    return samples[start : start + length]


def lengths_that_fit(num_samples: Sequence[int], lengths: Sequence[int]) -> list[int]:
    """Those of the lengths, in seconds, that at least half of the recordings have."""
    return [s for s in lengths if np.mean(np.array(num_samples) >= s * SAMPLE_RATE) >= MIN_SHARE]


def load_models(config: Config) -> list[Embedder]:
    """The teacher first."""
    specs = dict(spec.split("=", 1) for spec in config.checkpoint)
    named = {"teacher": config.teacher, **specs} if config.teacher else specs
    models = [replace(load_embedder(spec, config.device), name=name) for name, spec in named.items()]
    return [replace(model, name=f"stand-in {model.name}") if model.is_stand_in else model for model in models]


def plans_of(dataset: Dataset, test_fold: str, is_long: np.ndarray, seed: int) -> dict[str, Plan]:
    """Its binary tasks over the recordings that are long enough. Raises NotMeasurable if there is none."""
    split, rows = dataset.split_names[0], Rows(groups=dataset.groups)
    parts = None if split == GROUPED else dataset.splits[split].parts
    if test_fold and (parts is None or test_fold not in parts):
        raise ValueError(f"{dataset.name} has no fold {test_fold!r}")
    if parts is not None and (test_fold or dataset.splits[split].kind == "holdout"):
        rows = replace(rows, is_test=parts == (test_fold or TEST))
    elif parts is not None:
        rows = replace(rows, folds=parts)
    takes_part = is_long if parts is None else is_long & (parts != NEITHER)
    plans = {}
    for name, task in dataset.tasks.items():
        if task.kind == "binary":
            try:
                plans[name] = plan_of(replace(task, takes_part=task.takes_part & takes_part), rows, seed)
            except NotMeasurable as e:
                print(f"not measurable: {name}, {e}")
    if not plans:
        raise NotMeasurable(f"no task of {dataset.name} can be measured")
    return plans


def score(plan: Plan, fitted_at: np.ndarray, scored_at: np.ndarray, seed: int) -> np.ndarray:
    """[n, W] x 2 -> [scored rows]: probes of the training rows of the first, asked about test rows of the second."""
    if fitted_at is scored_at:
        features = fitted_at[plan.rows]
        found = scores_of_masks(features, plan.target, plan.groups, plan.splits[0], fit_of("binary", "logistic", seed))
        return found[plan.is_scored]
    found = np.full(len(plan.rows), np.nan)
    fit = fit_of("binary", "logistic", seed)
    for mask in plan.splits[0]:
        probe = fit(fitted_at[plan.rows][~mask], plan.target[~mask], plan.groups[~mask])
        found[mask] = probe.decision_function(scored_at[plan.rows][mask])
    return found[plan.is_scored]


def study(
    embeddings: Mapping[int, Mapping[str, np.ndarray]], plans: Mapping[str, Plan], groups: np.ndarray, seed: int
) -> dict[str, Any]:
    """[n, W] by length and model -> mode -> model -> length -> mAP with its interval, and AP by task."""
    columns = draw_columns(list(plans.values()), len(groups))
    is_scored = columns.any(axis=1)
    weights = np.zeros((1 + NUM_DRAWS, len(groups)), dtype=np.int32)  # [d, n], the same for all lengths and models
    weights[:, is_scored] = draw_groups(columns[is_scored], groups[is_scored], NUM_DRAWS, seed)
    found: dict[str, Any] = {mode: {model: {} for model in embeddings[FITTED_S]} for mode in MODES}
    for mode, of_models in found.items():
        for model, of_lengths in of_models.items():
            for length in embeddings:
                scored_at = embeddings[length][model]
                fitted_at = embeddings[FITTED_S][model] if mode == "fitted" else scored_at
                of_tasks = {}
                for name, plan in plans.items():
                    scores = score(plan, fitted_at, scored_at, seed)
                    rows = plan.rows[plan.is_scored]
                    of_tasks[name] = average_precision(plan.target[plan.is_scored], scores, weights[:, rows])  # [d]
                mean = np.mean(list(of_tasks.values()), axis=0)
                of_lengths[length] = {
                    "map": interval(mean)._asdict(),
                    "ap": {name: float(draws[0]) for name, draws in of_tasks.items()},
                }
    return found


def as_markdown(results: Mapping[str, Any]) -> str:
    """A table for each mode: a row for each model."""
    lengths = results["lengths"]
    lines = [f"# mAP by length of the clip, {results['dataset']}", "", results["about"], ""]
    for mode, title in MODES.items():
        lines += [
            f"## {title}",
            "",
            f"| model | {' | '.join(f'{s} s' for s in lengths)} |",
            "|---" * (len(lengths) + 1),
        ]
        lines[-1] += "|"
        for model, of_lengths in results["modes"][mode].items():
            cells = ["{value:.3f} [{low:.3f}, {high:.3f}]".format(**of_lengths[s]["map"]) for s in lengths]
            lines.append(f"| {model} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def plot(results: Mapping[str, Any]) -> Figure:
    """A panel for each mode, a line for each model, the bars over the 95 % interval."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    lengths = np.array(results["lengths"])
    panels = figure.subplots(1, len(MODES), sharey=True)
    for axes, (mode, title) in zip(panels, MODES.items(), strict=True):
        of_models = results["modes"][mode]
        for i, (model, of_lengths) in enumerate(of_models.items()):
            value, low, high = np.array([list(of_lengths[int(s)]["map"].values()) for s in lengths]).T
            at = lengths + 0.04 * (i - (len(of_models) - 1) / 2)  # side by side, so that no bar hides another
            axes.errorbar(at, value, [value - low, high - value], marker="o", capsize=2, linewidth=1.5, label=model)
        axes.axvline(FITTED_S, color="grey", linestyle=":", linewidth=1)
        axes.set(title=title, xlabel="length of the clip, s", xticks=lengths)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("mAP")
    panels[0].legend(frameon=False, fontsize=9)
    return figure


def main(config: Config) -> None:
    dataset = load_dataset(config.dataset)
    sounds = {row: samples for row, samples in dataset.recordings() if not isinstance(samples, str) and len(samples)}
    lengths = lengths_that_fit([len(samples) for samples in sounds.values()], sorted(set(config.lengths)))
    if FITTED_S not in lengths:
        raise ValueError(f"most recordings of {dataset.name} are shorter than {FITTED_S} s: nothing to compare with")
    is_long = np.zeros(len(dataset.groups), dtype=bool)
    is_long[[row for row, samples in sounds.items() if len(samples) >= lengths[-1] * SAMPLE_RATE]] = True
    plans = plans_of(dataset, config.test_fold, is_long, config.seed)
    models = load_models(config)
    embeddings = {}
    for length in lengths:
        clips = ((row, clip_around_peak(sounds[row], length * SAMPLE_RATE)) for row in np.flatnonzero(is_long).tolist())
        embeddings[length] = embed(models, "full", clips, len(is_long), batch_size=config.batch_size)
    left_out = [s for s in sorted(set(config.lengths)) if s not in lengths]
    about = (
        f"{int(is_long.sum())} of {len(is_long)} recordings, those of {lengths[-1]} s or more; {len(plans)} tasks; "
        f"scored: {f'fold {config.test_fold}' if config.test_fold else 'every fold'}. In brackets the 95 % interval."
        + (f" Not measured, as most recordings are shorter: {', '.join(map(str, left_out))} s." if left_out else "")
    )
    results = {
        "config": asdict(config),
        "dataset": dataset.title,
        "revision": dataset.revision,
        "models": {model.name: model.fingerprint for model in models},
        "lengths": lengths,
        "about": about,
        "modes": study(embeddings, plans, dataset.groups, config.seed),
    }
    write_json(config.out / "length_study.json", results)
    with atomic_write(config.out / "length_study.md") as f:
        f.write(as_markdown(results).encode())
    with atomic_write(config.out / "length_study.png") as f:
        plot(results).savefig(f, format="png", dpi=150)
    print(as_markdown(results))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
