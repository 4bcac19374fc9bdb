"""Pictures of a run.

in:   <run>/metrics.jsonl, <run>/config.json
out:  <run>/loss.png
"""

import json
from pathlib import Path

from hear_distill.files import atomic_write
from hear_distill.runlog import read_metrics


def draw_losses(out: Path) -> None:
    """metrics.jsonl -> loss.png: the loss, its terms, and the held-out explained variance over the steps."""
    from matplotlib.figure import Figure  # no pyplot: nothing here needs a display

    lines, config = read_metrics(out), json.loads((out / "config.json").read_text())
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, names in (
        (left, ("loss", "mse", "relational", "contrastive")),
        (right, ("anchor_explained_variance", "recent_explained_variance")),
    ):
        for name in names:
            points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), label=name.replace("_", " "))
                axes.legend()
        axes.set_xlabel("optimiser step")
        axes.grid(alpha=0.3)
    left.set(title="training loss and its terms (unweighted)", yscale="log")
    right.set(title="explained variance of the teacher's embedding, held out")
    figure.suptitle(f"{out}, {'stand-in teacher' if config['is_stand_in'] else config['teacher']}")
    with atomic_write(out / "loss.png") as f:
        figure.savefig(f, format="png", dpi=120)
