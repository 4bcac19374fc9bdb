"""Which options of the student and of the trainer earn their place: small distillations, one option changed at a time.

in:   a folder of WebDataset tars, a teacher (from make_teacher.py), a labelled table to probe with
out:  one JSON line for each run in --out; with --table, the Markdown table of those that are there
cost: --budget-minutes of CPU; a run of 3,072 clips takes half a minute to a minute

    python experiments/ablate.py --source DIR --teacher DIR --probe esc10.parquet --out ablation.jsonl
    python experiments/ablate.py --out ablation.jsonl --table

Each arm sees the same clips. Its learning rate is the best of three, tried with the first seed; then it runs with two
more seeds at that rate. Arms go in the order of ARMS until the budget is spent; a second call goes on where the
first stopped. Intervals are of the mean difference to the arm that it is compared with, paired by seed, 95 % by
Student's t.
"""

import fcntl
import json
import math
import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import tyro
from scipy.stats import t as student_t
from small_run import CHUNK, CHUNKS, LOSS, STUDENT, Arm, Material, load, make_material, run
from sounds import Probe

SEEDS = (0, 1, 2)  # the first tunes the rate
TUNED_BY = "whole_explained_variance"
COLUMNS = {
    "whole_explained_variance": "EV",
    "whole_explained_variance_16": "EV of 16",
    "padded_explained_variance": "EV, cut short",
    "whole_knn_overlap": "k-NN overlap",
    "probe_map": "probe mAP",
}
PUBLISHED = {"relational": 0.5, "contrastive": 0.5}


def _and(name: str) -> Arm:
    return Arm(name=f"and {name}", question="terms of the loss", loss={name: 0.5})


ARMS = (
    Arm(name="best", question="the recipe of `best`, at this size"),
    Arm(name="kernel 5", question="Canon", model={"canon_kernel": 5}),
    Arm(name="no Canon", question="Canon", model={"canon": "none"}),
    Arm(name="circular padding", question="Canon", is_circular=True),
    Arm(name="positions", question="Canon", model={"positions": "learned"}),
    Arm(
        name="no Canon, positions",
        question="Canon",
        against="no Canon",
        model={"canon": "none", "positions": "learned"},
    ),
    Arm(name="no patch term", question="patch term", loss={"patch": 0.0}),
    *(_and(name) for name in ("relational", "contrastive", "prototype")),
    Arm(name="published terms", question="terms of the loss", loss=PUBLISHED),
    Arm(
        name="negatives of the batch",
        question="negatives",
        against="published terms",
        loss=PUBLISHED | {"negatives": "batch"},
    ),
    Arm(name="no clips cut short", question="--pad-share", pad_share=0.0),
    Arm(name="controller ema-batch", question="controller", controller="ema-batch"),
    Arm(name="controller batch", question="controller", controller="batch"),
    Arm(name="controller seesaw", question="controller", controller="seesaw"),
    Arm(name="shallow-wide", question="shape", model={"width": 64, "blocks": 7, "heads": 4, "mlp_width": 256}),
    Arm(
        name="deep-thin",
        question="shape",
        against="shallow-wide",
        model={"width": 32, "blocks": 25, "heads": 2, "mlp_width": 128},
    ),
    Arm(name="1D Canon, 9 tokens", question="Canon", model={"canon_dims": 1, "canon_kernel": 9}),
    Arm(
        name="kernel 5, positions",
        question="Canon",
        against="kernel 5",
        model={"canon_kernel": 5, "positions": "learned"},
    ),
)

Record = dict[str, Any]  # a line of the file


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags."""

    out: Path
    """JSON lines; a file that is there is gone on with"""
    source: Path | None = None
    """folder of tars to learn from"""
    teacher: Path | None = None
    """folder of the teacher"""
    probe: Path | None = None
    """labelled recordings with a column fold; none leaves the probe out"""
    test_fold: str = "5"
    """of the probe's table: the one that the source has no recording of"""
    num_clips: int = 3072
    """that each run learns from, once each"""
    budget_minutes: float = 120.0
    """of CPU, over all runs in --out; no run begins after that"""
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    """that each arm tries with the first seed; one alone saves two runs of five"""
    workers: int = 2
    """processes of one thread"""
    table: bool = False
    """run nothing, print the table of what is in --out"""


def records_in(path: Path) -> list[Record]:
    """All lines, in the order of their runs; none if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, record: Record) -> None:
    """One line, whole, whichever process writes at the same time."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def is_better(one: Record, other: Record) -> bool:
    """By what the rate is tuned by; a student that is not a number is worse than any."""
    values = [-math.inf if math.isnan(r[TUNED_BY]) else r[TUNED_BY] for r in (one, other)]
    return values[0] > values[1]


def tried_in(records: Sequence[Record], arm: str) -> list[Record]:
    """The runs of the first seed, by rate."""
    return sorted((r for r in records if r["arm"] == arm and r["seed"] == SEEDS[0]), key=lambda r: r["rate"])


def best_rate(records: Sequence[Record], arm: str) -> float:
    """The rate of the best run of the first seed, of which there must be one."""
    best, *others = tried_in(records, arm)
    for other in others:
        best = other if is_better(other, best) else best
    return best["rate"]


def next_run(records: Sequence[Record], arm: str, rates: Sequence[float]) -> tuple[float, int] | None:
    """Rate and seed of what is missing first in an arm; None if it is complete."""
    done = {(r["rate"], r["seed"]) for r in records if r["arm"] == arm}
    wanted = [(rate, SEEDS[0]) for rate in rates]
    if done.issuperset(wanted):
        wanted = [(best_rate(records, arm), seed) for seed in SEEDS]
    return next((run for run in wanted if run not in done), None)


def is_spent(records: Sequence[Record], budget_minutes: float) -> bool:
    """Whether the runs so far took the budget."""
    return sum(r["cpu_s"] for r in records) >= 60 * budget_minutes


def setting_of(config: Config, revision: str) -> dict[str, Any]:
    """What all runs of a file must have in common."""
    return {
        "teacher": revision,
        "num_clips": config.num_clips,
        "batch": CHUNK * CHUNKS,
        "student": STUDENT,
        "loss": LOSS,
    }


def check_setting(records: Sequence[Record], setting: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError if the file holds runs that cannot be compared with those to come."""
    for record in records:
        if record["setting"] != setting:
            raise ValueError(f"{path} holds runs with {record['setting']}, expected {setting}; choose another --out")


def work(arms: "multiprocessing.SimpleQueue[Arm | None]", material: Material, config: Config, setting: Record) -> None:
    """One process: take arm after arm, run what is missing in each, until none is left or the budget is spent."""
    while (arm := arms.get()) is not None:
        while missing := next_run(records_in(config.out), arm.name, config.rates):
            if is_spent(records_in(config.out), config.budget_minutes):
                return
            record = run(material, arm, *missing)
            append(config.out, {**record, "setting": setting})
            print(f"{arm.name}, rate {record['rate']}, seed {record['seed']}: EV {record[TUNED_BY]:.4f}", flush=True)


def run_all(config: Config) -> None:
    """Run what is missing, in --workers processes that share the material."""
    if config.source is None or config.teacher is None:
        raise ValueError("--source and --teacher are needed, unless --table only prints what is in --out")
    teacher = load(config.teacher)
    setting = setting_of(config, teacher.revision)
    check_setting(records_in(config.out), setting, config.out)
    probe = Probe(config.probe, config.test_fold, every=2) if config.probe else None
    material = make_material(config.source, teacher, config.num_clips, [arm.pad_share for arm in ARMS], probe)

    context = multiprocessing.get_context("fork")  # the children share the memory of the material
    arms = context.SimpleQueue()
    for arm in (*ARMS, *[None] * config.workers):
        arms.put(arm)
    workers = [context.Process(target=work, args=(arms, material, config, setting)) for _ in range(config.workers)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise RuntimeError("a worker failed; its error stands above")


# ------------------------------------------------------------------------------------------------------------ the table


def interval(values: Sequence[float]) -> float:
    """Half the width of the 95 % interval of the mean, by Student's t; NaN of fewer than two."""
    if len(values) < 2:
        return math.nan
    return float(student_t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))


def finished(records: Sequence[Record]) -> dict[str, dict[int, Record]]:
    """The runs at the best rate, by seed, of each arm that is complete."""
    found = {}
    for arm in (arm for arm in ARMS if tried_in(records, arm.name)):
        rate = best_rate(records, arm.name)
        by_seed = {r["seed"]: r for r in records if r["arm"] == arm.name and r["rate"] == rate}
        if by_seed.keys() >= set(SEEDS):
            found[arm.name] = by_seed
    return found


def difference(runs: Mapping[int, Record], others: Mapping[int, Record], column: str) -> str:
    """'+0.012 ± 0.008', paired by seed; with a star where the interval leaves out zero."""
    gaps = [runs[seed][column] - others[seed][column] for seed in SEEDS]
    star = " *" if abs(mean(gaps)) > interval(gaps) else ""
    return f"{mean(gaps):+.3f} ± {interval(gaps):.3f}{star}"


def rows(records: Sequence[Record]) -> Iterator[list[str]]:
    """The cells of the table: its head, then a row for each arm that is complete."""
    complete = finished(records)
    columns = {key: name for key, name in COLUMNS.items() if all(key in r for r in records)}
    yield ["arm", "rate", "s", *columns.values(), "against", *(f"Δ {name}" for name in columns.values())]
    for arm in (arm for arm in ARMS if arm.name in complete):
        runs = complete[arm.name]
        rate = runs[SEEDS[0]]["rate"]
        tried = [r["rate"] for r in tried_in(records, arm.name)]
        border = " (border)" if rate in (tried[0], tried[-1]) else ""
        values = [f"{mean(runs[seed][key] for seed in SEEDS):.3f}" for key in columns]
        seconds = f"{mean(runs[seed]['cpu_s'] for seed in SEEDS):.0f}"
        others = complete.get(arm.against) if arm.against != arm.name else None
        gaps = [difference(runs, others, key) if others else "" for key in columns]
        yield [
            arm.name,
            f"{rate:g}{border if len(tried) > 1 else ' (only)'}",
            seconds,
            *values,
            arm.against if others else "",
            *gaps,
        ]


def as_markdown(records: Sequence[Record]) -> str:
    """The table, and what is not in it."""
    head, *body = rows(records)
    lines = [head, ["---"] * len(head), *body]
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    complete = finished(records)
    missing = [arm.name for arm in ARMS if arm.name not in complete]
    spent = sum(r["cpu_s"] for r in records) / 60
    return f"{text}\n\n{len(records)} runs, {spent:.0f} min of CPU. Not run: {', '.join(missing) or 'none'}."


def main(config: Config) -> None:
    if not config.table:
        run_all(config)
    print(as_markdown(records_in(config.out)))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
