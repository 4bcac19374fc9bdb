"""Pictures of a run.

in:   <run>/metrics.jsonl, <run>/config.json
out:  <run>/loss.png
"""

import json
from pathlib import Path

from hear_distill.files import UserError, atomic_write
from hear_distill.runlog import read_metrics

# Title, scale of the y axis, and what is drawn if the run has it.
PANELS = (
    ("loss and its terms (unweighted)", "log", ("loss", "mse", "relational", "contrastive", "prototype", "patch")),
    (
        "held out: explained variance, mAP of the quick probe",
        "linear",
        ("anchor_explained_variance", "anchor_padded_explained_variance", "recent_explained_variance", "probe_map"),
    ),
    ("learning rate", "linear", ("lr", "critical_rate")),
    ("noise batch and batch, clips", "log", ("noise_batch", "adam_noise_batch", "batch_size")),
    ("clips per second", "linear", ("clips_per_s",)),
    ("seconds waited for data, in all", "linear", ("waited_s",)),
)


def draw_curves(out: Path) -> None:
    """metrics.jsonl -> loss.png: six panels over the clips seen. Raises UserError where there is no run."""
    from matplotlib.figure import Figure  # no pyplot: nothing here needs a display

    if not (out / "config.json").exists():
        raise UserError(f"no run in {out}; name its folder with --out")
    lines, config = read_metrics(out), json.loads((out / "config.json").read_text())
    figure = Figure(figsize=(15, 8), layout="constrained")
    for axes, (title, scale, names) in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        for name in names:
            points = [(line["samples"], line[name]) for line in lines if line.get(name) is not None]
            points = [point for point in points if scale == "linear" or point[1] > 0]
            if points:
                axes.plot(*zip(*points, strict=True), label=name.replace("_", " "))
                axes.legend()
        axes.set(title=title, xlabel="clips", yscale=scale if axes.lines else "linear")
        axes.grid(alpha=0.3)
    figure.suptitle(f"{out}, {'stand-in teacher' if config['is_stand_in'] else config['teacher']}")
    with atomic_write(out / "loss.png") as f:
        figure.savefig(f, format="png", dpi=100)
