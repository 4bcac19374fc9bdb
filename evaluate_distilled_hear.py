"""Compare a student with HeAR on labelled recordings: what a linear probe can read from either embedding.

in:   a checkpoint of the trainer, HeAR or a folder like it, a Parquet table (audio, label, group and perhaps fold)
out:  <out>/{results.json, table.md, student_vs_teacher.png}, and the table on stdout
cost: 73 s for the 420 recordings of the demo on two busy cores (`time python evaluate_distilled_hear.py demo`)

    python evaluate_distilled_hear.py --table TABLE.parquet                  # runs/hear-vit-s/best.pt against HeAR
    python evaluate_distilled_hear.py demo                                   # the demo's student, no network

Exit code 1 says that some label has too few groups to be measured; the other labels are.

B windows in a batch   n = 32,000 samples of one   r rows of the table   D width of an embedding   K tasks
d draws of the bootstrap, the first of which is the table as it stands
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from hear_distill import cli, demo
from hear_distill.audio import DecodeError, decode
from hear_distill.files import UserError, atomic_write, write_json
from hear_distill.frontend import MelPcen
from hear_distill.probes import (
    NUM_DRAWS,
    NotMeasurable,
    average_precision,
    choose_and_fit,
    draw_groups,
    held_out_scores,
    interval,
    task_folds,
)
from hear_distill.runlog import git_revision
from hear_distill.student import load_student
from hear_distill.tasks import Table, load_table, windows
from hear_distill.teacher import HEAR, load_teacher


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of the evaluator."""

    checkpoint: Path = Path("runs/hear-vit-s/best.pt")
    """student to evaluate"""
    teacher: str = HEAR
    """hub id or folder of HeAR; none leaves it out"""
    table: Path = Path("data/table.parquet")
    """labelled recordings: columns audio, label, group and perhaps fold"""
    out: Path = Path("results/hear-vit-s")
    """folder of the results, which are replaced"""
    device: Literal["cuda", "cpu"] = "cuda"
    """of both models; the probes run on the CPU"""
    batch_size: int = 64
    """windows of 2 s in one forward"""
    seed: int = 0
    """of the folds, where the table prescribes none, and of the bootstrap"""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.seed < 0:
            raise ValueError("--batch-size must be at least 1 and --seed at least 0")


PRESETS = {
    "real": Config(),
    "demo": Config(
        checkpoint=demo.DEMO / "run" / "latest.pt",
        teacher=str(demo.TEACHER),
        table=demo.TABLE,
        out=demo.DEMO / "results",
        device="cpu",
    ),
}
STUDENT, TEACHER = "student", "teacher"
NO_TEACHER = "none"
MAX_UNREADABLE_SHARE = 0.5
PROTOCOL = "windows: 2 s, one every second, the last flush with the end; an embedding is their mean"
METHOD = (
    "AP of one linear probe per label, each row scored by a probe that saw no row of its group. In brackets the 95 % "
    f"interval over {NUM_DRAWS} draws of groups, the same for both models. Groups counted are those with a positive."
)

Results = dict[str, Any]  # what results.json holds; table and picture are made from it alone


def require_inputs(config: Config) -> None:
    """Raise UserError for what can be told at once; loading HeAR takes minutes."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch finds no GPU; add --device cpu")
    if not config.checkpoint.is_file():
        raise UserError(
            f"no checkpoint at {config.checkpoint}; name one with --checkpoint\n"
            f"  or train a small one in minutes: python datalake/run_lake.py demo"
        )


def load_models(config: Config) -> tuple[dict[str, nn.Module], Results]:
    """The models by name, the student first, and where they are from."""
    models: dict[str, nn.Module] = {STUDENT: load_student(config.checkpoint).to(config.device)}
    sources: Results = {STUDENT: {"checkpoint": str(config.checkpoint), "sha256": sha256(config.checkpoint)}}
    sources[TEACHER] = None
    if config.teacher != NO_TEACHER:
        models[TEACHER] = teacher = load_teacher(config.teacher, device=config.device)
        sources[TEACHER] = {"name": teacher.name, "revision": teacher.revision, "is_stand_in": teacher.is_stand_in}
    return models, sources


def sha256(path: Path) -> str:
    """Of the file, as `sha256sum` prints it."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def window_batches(
    audio: Sequence[bytes | None], batch_size: int, unreadable: Counter[str]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Decode each row once: [B, n] int16 windows and the row [B] of each. Rows that cannot be decoded are counted."""
    pending: list[np.ndarray] = []
    owners: list[int] = []
    for row, data in enumerate(tqdm(audio, desc="embedding", unit="row", disable=None)):  # None: only on a terminal
        try:
            cut = windows(decode(data or b""))
        except DecodeError as e:
            unreadable[e.reason] += 1
            continue
        pending += list(cut)
        owners += [row] * len(cut)
        while len(pending) >= batch_size:
            yield np.stack(pending[:batch_size]), np.array(owners[:batch_size])
            del pending[:batch_size], owners[:batch_size]
    if pending:
        yield np.stack(pending), np.array(owners)


@torch.inference_mode()
def embed(
    table: Table, models: Mapping[str, nn.Module], config: Config
) -> tuple[dict[str, np.ndarray], np.ndarray, Counter[str]]:
    """Mean embedding of the windows of each row, from all models at once: they see the same spectrograms.

    Returns:
        [rows that were read, D] float64 by model; [r] whether a row was read; the number of the others by reason.

    Raises:
        UserError: more than half of the rows are unreadable, or a model gives NaN or infinity.
    """
    num_windows = np.zeros(len(table.audio), dtype=int)
    sums: dict[str, np.ndarray] = {}
    unreadable: Counter[str] = Counter()
    frontend = MelPcen().to(config.device)
    for samples, rows in window_batches(table.audio, config.batch_size, unreadable):
        audio = torch.from_numpy(samples).to(config.device).float() / 32768  # [B, n], the scale of the trainer
        spectrogram = frontend(audio)  # [B, 1, 192, 128]
        np.add.at(num_windows, rows, 1)
        for name, model in models.items():
            embeddings = model(spectrogram).double().cpu().numpy()  # [B, D]
            np.add.at(sums.setdefault(name, np.zeros((len(num_windows), embeddings.shape[1]))), rows, embeddings)
    if unreadable.total() > MAX_UNREADABLE_SHARE * len(table.audio):
        raise UserError(
            f"{unreadable.total()} of {len(table.audio)} rows of {table.name} are unreadable ({in_words(unreadable)}); "
            f"expected WAV, FLAC, OGG or MP3 files in the column audio"
        )
    for name, total in sums.items():
        if not np.isfinite(total).all():
            raise UserError(f"embeddings of the {name} are not finite; its weights are broken, name another one")
    is_read = num_windows > 0
    return {name: total[is_read] / num_windows[is_read, None] for name, total in sums.items()}, is_read, unreadable


def in_words(items: Mapping[str, Any]) -> str:
    """'undecodable: 2, empty: 1'"""
    return ", ".join(f"{name}: {value}" for name, value in items.items())


def probe(
    tasks: Mapping[str, np.ndarray],
    groups: np.ndarray,
    prescribed: np.ndarray | None,
    embeddings: Mapping[str, np.ndarray],
    seed: int,
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, str]]:
    """Scores [r] of every row by task and model, and what is wrong with the tasks that cannot be measured."""
    scores, problems = {}, {}
    for name, is_positive in tqdm(tasks.items(), desc="probing", unit="task", disable=None):
        try:
            folds = task_folds(is_positive, groups, prescribed, seed)
        except NotMeasurable as e:
            problems[name] = str(e)
            continue
        fit = partial(choose_and_fit, seed=seed)
        scores[name] = {
            model: held_out_scores(features, is_positive, groups, folds, fit) for model, features in embeddings.items()
        }
    if not scores:
        raise UserError(f"no label can be measured ({in_words(problems)}); add recordings of other groups")
    return scores, problems


def measure(table: Table, is_read: np.ndarray, embeddings: Mapping[str, np.ndarray], seed: int) -> Results:
    """Probe every label on every embedding [r, D]: the entries `tasks` and `mean` of the results."""
    tasks = {name: is_positive[is_read] for name, is_positive in table.tasks().items()}
    groups = table.groups[is_read]
    prescribed = None if table.folds is None else table.folds[is_read]
    scores, problems = probe(tasks, groups, prescribed, embeddings, seed)
    weights = draw_groups(np.stack([tasks[name] for name in scores], axis=1), groups, NUM_DRAWS, seed)  # [d, r]
    draws = {
        name: {model: average_precision(tasks[name], values, weights) for model, values in of_models.items()}
        for name, of_models in scores.items()
    }  # each [d]
    entries = [
        {
            "task": name,
            "positives": int(is_positive.sum()),
            "groups": len(np.unique(groups[is_positive])),
            "share_of_positives": float(is_positive.mean()),
            "problem": problems.get(name),
            **summary(draws.get(name, {})),
        }
        for name, is_positive in tasks.items()
    ]
    mean = {model: np.mean([of_task[model] for of_task in draws.values()], axis=0) for model in embeddings}  # each [d]
    return {"tasks": entries, "mean": {"num_tasks": len(draws), **summary(mean)}}


def summary(draws: Mapping[str, np.ndarray]) -> Results:
    """[d] AP by model -> AP of each model and the share of the teacher's that the student keeps, with intervals."""
    ap = {model: interval(values)._asdict() for model, values in draws.items()}
    retained = interval(draws[STUDENT] / draws[TEACHER] * 100)._asdict() if TEACHER in draws else None
    return {"ap": ap, "retained_percent": retained}


def teacher_name(results: Results) -> str:
    """What every table and picture calls it: nobody shall take a stand-in for HeAR."""
    teacher = results[TEACHER]
    return "stand-in teacher" if teacher and teacher["is_stand_in"] else TEACHER


def cell(value: Mapping[str, float] | None, digits: int) -> str:
    """'0.842 [0.801, 0.880]'"""
    if value is None:
        return "not measured"
    return "{value:.{d}f} [{low:.{d}f}, {high:.{d}f}]".format(**value, d=digits)


def as_text(results: Results) -> str:
    """The report: a Markdown table that is aligned, so that it can be read as it is, and the result in words."""
    mean = results["mean"]
    table = [["task", "positives", "groups", f"{teacher_name(results)} AP", "student AP", "retained %"]]
    for task in results["tasks"]:
        table.append([task["task"], str(task["positives"]), str(task["groups"]), *cells(task)])
    table.append([f"mAP, {mean['num_tasks']} tasks", "", "", *cells(mean)])
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    table.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    lines = [f"# {title(results)}", ""]
    for first, *others in table:
        aligned = [text.rjust(width) for text, width in zip(others, widths[1:], strict=True)]
        lines.append(f"| {' | '.join([first.ljust(widths[0]), *aligned])} |")
    lines += ["", METHOD]
    lines += [f"Not measurable: {task['task']}, {task['problem']}." for task in results["tasks"] if task["problem"]]
    if results["table"]["unreadable"]:
        lines.append(f"Left out of {results['table']['rows']} rows: {in_words(results['table']['unreadable'])}.")
    return "\n".join([*lines, "", conclusion(results)]) + "\n"


def cells(entry: Results) -> list[str]:
    """The last three columns of a task or of the mean."""
    if entry.get("problem"):
        return ["not measurable"] * 3
    ap = entry["ap"]
    return [cell(ap.get(TEACHER), 3), cell(ap[STUDENT], 3), cell(entry["retained_percent"], 1)]


def title(results: Results) -> str:
    """The head of table and picture."""
    against = f" and the {teacher_name(results)}" if results[TEACHER] else ""
    return f"Linear probes of the student{against} on {results['table']['name']}"


def conclusion(results: Results) -> str:
    """'the student keeps 97.1 % [94.0, 99.8] of the teacher's mAP (0.842 of 0.867)'"""
    ap, retained = results["mean"]["ap"], results["mean"]["retained_percent"]
    if retained is None:
        return f"the student has an mAP of {cell(ap[STUDENT], 3)}; what it keeps of a teacher was not measured"
    share = "{value:.1f} % [{low:.1f}, {high:.1f}]".format(**retained)
    values = f"{ap[STUDENT]['value']:.3f} of {ap[TEACHER]['value']:.3f}"
    return f"the student keeps {share} of the {teacher_name(results)}'s mAP ({values})"


def plot(results: Results, path: Path) -> None:
    """Bars of the AP of each task and of the mean, a line over the 95 % interval, a tick at the share of positives."""
    from matplotlib.figure import Figure  # no pyplot: nothing here needs a display

    mean = results["mean"]
    entries = [*results["tasks"], {"task": f"mAP, {mean['num_tasks']} tasks", **mean}]
    styles = {TEACHER: (teacher_name(results), "#8d99ae"), STUDENT: (STUDENT, "#0b7a75")}
    models = [model for model in styles if results[model]]
    height = 0.8 / len(models)
    figure = Figure(figsize=(9, 2 + 0.5 * len(entries)), layout="constrained")
    axes = figure.add_subplot()
    measured = [(y, entry["ap"]) for y, entry in enumerate(entries) if not entry.get("problem")]
    for i, model in enumerate(models):
        name, colour = styles[model]
        bars = [(y + height * (i - (len(models) - 1) / 2), ap[model]) for y, ap in measured]
        axes.barh([y for y, _ in bars], [ap["value"] for _, ap in bars], height, color=colour, label=name)
        for y, ap in bars:
            axes.plot([ap["low"], ap["high"]], [y, y], color="black", linewidth=1)
            axes.text(1.01, y, f"{ap['value']:.3f}", va="center", fontsize=8)
    for y, task in enumerate(results["tasks"]):
        if task["problem"]:
            axes.text(0.01, y, f"not measurable: {task['problem']}", va="center", fontsize=8)
    measurable = [(y, task["share_of_positives"]) for y, task in enumerate(results["tasks"]) if not task["problem"]]
    rows, shares = np.array(measurable).T
    axes.vlines(shares, rows - 0.4, rows + 0.4, color="#d1495b", label="share of positives: chance")
    axes.axhline(len(entries) - 1.5, color="black", linewidth=0.6)  # between the tasks and their mean
    axes.set_yticks(range(len(entries)), [entry["task"] for entry in entries])
    axes.set_xlim(0, 1)
    axes.set_ylim(len(entries) - 0.5, -0.5)
    axes.set_xlabel("average precision (line: 95 % interval over groups)")
    axes.set_title(f"{title(results)}\n{conclusion(results)}", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    with atomic_write(path) as f:
        figure.savefig(f, format="png", dpi=150)


def main(config: Config) -> int:
    require_inputs(config)
    demo.prepare(config.table)
    demo.prepare(config.teacher)
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # convolutions alone default to TF32, which is not float32
    table = load_table(config.table)
    models, sources = load_models(config)
    print(f"embedding {len(table.audio)} recordings of {table.name}: {' and '.join(models)}")
    embeddings, is_read, unreadable = embed(table, models, config)
    results = {
        "protocol": PROTOCOL,
        "config": asdict(config),
        "code": git_revision(),
        **sources,
        "table": {
            "name": table.name,
            "sha256": sha256(config.table),
            "rows": len(is_read),
            "unreadable": unreadable,
            "groups": len(np.unique(table.groups[is_read])),
            "has_folds": table.folds is not None,
        },
        **measure(table, is_read, embeddings, config.seed),
    }

    text = as_text(results)
    write_json(config.out / "results.json", results)
    with atomic_write(config.out / "table.md") as f:
        f.write(text.encode())
    plot(results, config.out / "student_vs_teacher.png")
    print(f"wrote results.json, table.md and student_vs_teacher.png to {config.out}\n\n{text}", end="")
    return 1 if any(task["problem"] for task in results["tasks"]) else 0


if __name__ == "__main__":
    cli.run(main, PRESETS, __doc__)
