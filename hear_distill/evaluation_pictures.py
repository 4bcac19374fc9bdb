"""Pictures of an evaluation, and all its files, from the dict that hear_distill/evaluation_report.py describes.

out:  <out>/{table.md, student_vs_teacher.png, precision_recall.png, confusion.png, protocols.png}
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # no pyplot: nothing here needs a display

from hear_distill.evaluation_report import STUDENT, TITLES, as_markdown, conclusions, model_name, models_of, views
from hear_distill.files import atomic_write
from hear_distill.measure import TEACHER, Results

# By role; several of one role take turns.
COLOURS = {
    TEACHER: ("#8d99ae",),
    STUDENT: ("#0b7a75", "#3a86ff", "#8338ec", "#2b2d42", "#80b918", "#ff7096"),
    "baseline": ("#d9a441", "#9c6644"),
}
CHANCE_COLOUR = "#d1495b"
CURVE_COLUMNS = 3


def write_report(results: Results, out: Path) -> list[str]:
    """table.md and the pictures of which there is something to see; their names."""
    with atomic_write(out / "table.md") as f:
        f.write(as_markdown(results).encode())
    names = ["table.md"]
    for name, figure in pictures(results).items():
        with atomic_write(out / name) as f:
            figure.savefig(f, format="png", dpi=150)
        names.append(name)
    return names


def pictures(results: Results) -> dict[str, Figure]:
    """File name -> figure, of the main protocol; a kind of which there is nothing to see is left out."""
    main = views(results)[0]
    drawn = {"student_vs_teacher.png": bars(main), "precision_recall.png": curves(main)}
    drawn |= {"confusion.png": confusions(main), "protocols.png": protocols(results)}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def colour_of(results: Results, model: str) -> str:
    """The same in all pictures."""
    role = results["models"][model]["role"]
    return COLOURS[role][models_of(results, role).index(model) % len(COLOURS[role])]


def entries_of(results: Results, kind: str) -> Iterator[tuple[str, Results]]:
    """Measured tasks of a kind, each with the name that tells it from others."""
    for dataset in results["datasets"]:
        for entry in dataset["tasks"]:
            if not entry["problem"] and entry["kind"] == kind:
                yield f"{dataset['label']}: {entry['task']}", entry


def protocols(results: Results) -> Figure | None:
    """mAP of each model by protocol, with intervals; nothing where there is one protocol alone."""
    measured = [view for view in views(results) if view["mean"]]
    if len(measured) < 2:
        return None
    models = models_of(results)
    width = 0.8 / len(models)
    figure = Figure(figsize=(2 + 2 * len(measured), 4.5), layout="constrained")
    axes = figure.add_subplot()
    for i, model in enumerate(models):
        found = [view["mean"]["models"][model]["metrics"]["ap"] for view in measured]
        at = np.arange(len(measured)) + width * (i - (len(models) - 1) / 2)
        values = [ap["value"] for ap in found]
        colour, name = colour_of(results, model), model_name(results, model)
        axes.bar(at, values, width, color=colour, label=name)
        for x, ap in zip(at, found, strict=True):
            axes.plot([x, x], [ap["low"], ap["high"]], color="black", linewidth=1)
            axes.text(x, 0.01, f"{ap['value']:.3f}", ha="center", rotation=90, color="white", fontsize=8)
    axes.set_xticks(range(len(measured)), [view["protocol"] for view in measured])
    axes.set(ylim=(0, 1), ylabel="mAP; line: 95 % interval over groups")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure


def bars(results: Results) -> Figure | None:
    """The main metric of each task and the mAP: a line over the 95 % interval, a tick at the share of positives."""
    rows = [
        (
            f"{name}, {TITLES[entry['primary']]}",
            {m: of["metrics"][entry["primary"]] for m, of in entry["models"].items()},
            entry,
        )
        for kind in ("binary", "multiclass", "regression")
        for name, entry in entries_of(results, kind)
    ]
    if not rows:
        return None
    if results["mean"]:
        mean = results["mean"]
        of_models = {model: of["metrics"]["ap"] for model, of in mean["models"].items()}
        rows.append((f"mAP, {len(mean['tasks'])} tasks", of_models, {}))
    models = models_of(results)
    height = 0.8 / len(models)
    figure = Figure(figsize=(10, 2 + 0.5 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for i, model in enumerate(models):
        offset = height * (i - (len(models) - 1) / 2)
        values = [of[model]["value"] for _, of, _ in rows]
        name = model_name(results, model)
        axes.barh(np.arange(len(rows)) + offset, values, height, color=colour_of(results, model), label=name)
        for y, (_, of, _) in enumerate(rows):
            axes.plot([of[model]["low"], of[model]["high"]], [y + offset] * 2, color="black", linewidth=1)
            axes.text(1.01, y + offset, f"{of[model]['value']:.3f}", va="center", fontsize=8)
    shares = [(y, e["share_of_positives"]) for y, (_, _, e) in enumerate(rows) if "share_of_positives" in e]
    if shares:
        at, chance = np.array(shares).T
        axes.vlines(chance, at - 0.4, at + 0.4, color=CHANCE_COLOUR, label="share of positives: chance")
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    lowest = min(of[model]["low"] for _, of, _ in rows for model in models)
    axes.set(xlim=(min(0, lowest), 1), ylim=(len(rows) - 0.5, -0.5), xlabel="line: 95 % interval over groups")
    axes.set_title("\n".join(conclusions(results)), loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure


def curves(results: Results) -> Figure | None:
    """Precision over recall of each binary task; the dashed line is the share of positives."""
    entries = list(entries_of(results, "binary"))
    if not entries:
        return None
    num_rows = -(-len(entries) // CURVE_COLUMNS)
    figure = Figure(figsize=(4 * CURVE_COLUMNS, 1 + 3.2 * num_rows), layout="constrained")
    panels = list(figure.subplots(num_rows, CURVE_COLUMNS, squeeze=False).flat)
    for (name, entry), axes in zip(entries, panels, strict=False):
        for model in models_of(results):
            curve = entry["models"][model]["curve"]
            colour, ap = colour_of(results, model), entry["models"][model]["metrics"]["ap"]["value"]
            label = f"{model_name(results, model)} {ap:.3f}"
            axes.step(curve["recall"], curve["precision"], where="pre", color=colour, label=label)
        axes.axhline(entry["share_of_positives"], color=CHANCE_COLOUR, linestyle="--", linewidth=1)
        axes.set(title=name, xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
        axes.legend(fontsize=8, frameon=False)
    for axes in panels[len(entries) :]:
        axes.set_axis_off()
    return figure


def confusions(results: Results) -> Figure | None:
    """A matrix for each task of several classes and each model, in percent of the actual class."""
    entries, models = list(entries_of(results, "multiclass")), models_of(results)
    if not entries:
        return None
    figure = Figure(figsize=(5 * len(models), 1 + 4.5 * len(entries)), layout="constrained")
    grid = figure.subplots(len(entries), len(models), squeeze=False)
    for row, (name, entry) in zip(grid, entries, strict=True):
        for axes, model in zip(row, models, strict=True):
            draw_matrix(axes, np.array(entry["models"][model]["confusion"]), entry["classes"])
            axes.set_title(f"{name}, {model_name(results, model)}", fontsize=9)
    return figure


def draw_matrix(axes: Axes, matrix: np.ndarray, classes: list[str]) -> None:
    """[C, C] counts: colour is the share of the actual class, text the count."""
    share = matrix / matrix.sum(axis=1, keepdims=True)
    axes.imshow(share, vmin=0, vmax=1, cmap="Blues")
    for (i, j), count in np.ndenumerate(matrix):
        axes.text(j, i, str(count), ha="center", va="center", color="white" if share[i, j] > 0.5 else "black")
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    axes.set_yticks(range(len(classes)), classes)
    axes.set(xlabel="predicted", ylabel="actual")
