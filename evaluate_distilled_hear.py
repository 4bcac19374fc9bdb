"""Compare students with HeAR on labelled recordings: what a probe can read from each embedding.

in:   checkpoints of the trainer, HeAR or a folder like it, baselines without weights; labelled datasets
out:  <out>/{results.json, table.md, *.png}, and one screen of numbers on stdout
cost: 47 s of CPU for the 420 recordings of the demo (`time python evaluate_distilled_hear.py demo`)

    python evaluate_distilled_hear.py --dataset fsd50k --dataset flusense    # runs/hear-vit-s/best.pt against HeAR
    python evaluate_distilled_hear.py demo                                   # the demo's student, no network

A column is an embedder under a protocol, which says how a recording becomes clips: `event` is one window of 2 s on the
event, `windows` the mean over windows, `full` the whole recording in one forward, `squeeze` the published full-clip
mode. `--protocol paper` is the window of `event` under the probe of HeAR's authors, in place of --probe.

Exit code 1: something could not be read or measured, which table.md names; the rest was. 2: nothing was.

n rows of a dataset   W width of an embedding
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import soundfile
import soxr
import torch

from hear_distill import checkpoint, cli, demo, published
from hear_distill.embedders import BASELINES, Embedder, load_embedder
from hear_distill.embedding_cache import describe, through_cache
from hear_distill.eval_datasets import load_dataset
from hear_distill.evaluation_pictures import write_report
from hear_distill.evaluation_report import STUDENT, models_of, one_screen
from hear_distill.files import UserError, atomic_write, write_json
from hear_distill.measure import PAPER, TEACHER, Measured, mean_entry, measure, merged
from hear_distill.probes import NUM_FOLDS
from hear_distill.protocols import PROTOCOLS, embed
from hear_distill.runlog import git_revision
from hear_distill.splits import SEEDS, Rows
from hear_distill.tasks import COPY, GROUPED, NEITHER, TEST, Dataset, DatasetError, Task
from hear_distill.teacher import HEAR, TeacherError


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of the evaluator. Those of several values may repeat."""

    checkpoint: tuple[str, ...] = ()
    """students: FILE or run folder, or NAME=FILE to choose the name of the column; none: runs/hear-vit-s/best.pt"""
    every_checkpoint: Path | None = None
    """a run folder: all its checkpoints, and a copy of the best of them as best.pt in --out"""
    output: Literal["trunk", "projection"] = "trunk"
    """of the students: the embedding they are made for, or that in HeAR's space"""
    teacher: str = "auto"
    """hub id or folder of HeAR; none leaves it out; auto takes it from the hub or its cache, if it can be had"""
    baseline: tuple[Literal["logmel", "mfcc"], ...] = ()
    """embeddings that nothing was learned for: the floor of a table"""
    dataset: tuple[str, ...] = ("fsd50k", "flusense")
    """fsd50k, flusense, coswara, from the hub; or one of these, icbhi or circor =PATH; or table=FILE.parquet"""
    protocol: tuple[Literal["event", "windows", "full", "squeeze", "paper"], ...] = ("event", "windows")
    """how a recording is embedded; the first is the main one, of which pictures and conclusion are"""
    probe: Literal["logistic", "svm", "knn", "mlp", "ensemble"] = "logistic"
    """what is fitted on the embeddings; ensemble averages the others"""
    out: Path = Path("results/hear-vit-s")
    """folder of the results, which are replaced"""
    cache: Path = Path("results/cache")
    """folder of embeddings that were computed before"""
    device: Literal["cuda", "cpu"] = "cuda"
    """of all models; the probes run on the CPU"""
    batch_size: int = 64
    """windows of 2 s in one forward, or as much sound in longer ones"""
    workers: int = os.cpu_count() or 1
    """processes that fit probes; the numbers do not depend on it"""
    seed: int = 0
    """of the folds, where a dataset prescribes none, of random probes and of the bootstrap"""

    def __post_init__(self) -> None:
        if min(self.batch_size, self.workers) < 1 or self.seed < 0:
            raise ValueError("--batch-size and --workers must be at least 1, --seed at least 0")
        if not (self.dataset and self.protocol):
            raise ValueError("--dataset and --protocol must name one or more")


PRESETS = {
    "real": Config(),
    "demo": Config(
        checkpoint=(str(demo.DEMO / "run" / "latest.pt"),),
        teacher=str(demo.TEACHER),
        dataset=(f"table={demo.TABLE}",),
        protocol=("windows",),
        out=demo.DEMO / "results",
        cache=demo.DEMO / "results" / "cache",
        device="cpu",
    ),
}
BEST_OF_TRAINER = "runs/hear-vit-s/best.pt"
AUTO, NO_TEACHER = "auto", "none"
MAX_UNREADABLE_SHARE = 0.5
MAX_NAMED_ROWS = 5
DECODER = f"libsndfile {soundfile.__libsndfile_version__}, soxr {soxr.__libsoxr_version__}"

Results = dict[str, Any]  # what results.json holds, laid out as hear_distill/evaluation_report.py says


# ------------------------------------------------------------------------------------------------------------ models


def require_inputs(config: Config) -> None:
    """Raise UserError for what can be told at once; loading HeAR takes minutes."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch finds no GPU; add --device cpu")
    for path in student_files(config).values():
        if path.endswith(".pt") and not Path(path).is_file():
            raise UserError(
                f"no checkpoint at {path}; name one with --checkpoint\n"
                f"  or train a small one in minutes: python datalake/run_lake.py demo"
            )


def student_files(config: Config) -> dict[str, str]:
    """Name of the column -> checkpoint file, or folder or hub id of HeAR's kind. One student alone is `student`."""
    specs = list(config.checkpoint)
    if config.every_checkpoint:
        found = sorted(config.every_checkpoint.glob("*.pt"))
        if not found:
            raise UserError(f"no checkpoint (*.pt) in {config.every_checkpoint}; expected the folder of a run")
        specs += map(str, found)
    named: list[tuple[str, str]] = []
    for spec in specs or [BEST_OF_TRAINER]:
        name, separator, path = spec.partition("=")
        is_named = bool(separator) and "/" not in name
        named.append((name, in_run(path)) if is_named else ("", in_run(spec)))
    if len(named) == 1:
        return {named[0][0] or STUDENT: named[0][1]}
    stems = Counter(Path(path).stem for _, path in named)
    names = [name or (Path(path).stem if stems[Path(path).stem] == 1 else path) for name, path in named]
    twice = [name for name, count in Counter([*names, TEACHER, *BASELINES]).items() if count > 1]
    if twice:
        raise UserError(f"two columns would be called {twice[0]}; name them: --checkpoint NAME=FILE")
    return dict(zip(names, (path for _, path in named), strict=True))


def in_run(path: str) -> str:
    """The best or newest checkpoint of a run folder; any other path is returned as it is."""
    for name in (checkpoint.BEST, checkpoint.LATEST):
        if (Path(path) / name).is_file():
            return str(Path(path) / name)
    return path


def load_models(config: Config) -> tuple[dict[str, Embedder], Results]:
    """The embedders by the name of their column, and what results.json says of them.

    Checkpoints of one run with the same weights are loaded once. Raises UserError for a student or for a teacher that
    was asked for; without --teacher, one line says that it is not to be had.
    """
    models: dict[str, Embedder] = {}
    facts: Results = {}

    def add(name: str, role: str, spec: str) -> None:
        embedder = load_embedder(spec, config.device)
        if config.every_checkpoint and embedder.fingerprint in {other.fingerprint for other in models.values()}:
            print(f"{name} has the weights of another checkpoint and is left out")
            return
        models[name] = replace(embedder, name=name)
        facts[name] = {"role": role, "spec": spec, "width": embedder.width, "is_stand_in": embedder.is_stand_in}
        facts[name]["fingerprint"] = embedder.fingerprint

    for name, path in student_files(config).items():
        add(name, STUDENT, f"{path}:{config.output}" if Path(path).is_file() else path)
    if config.teacher != NO_TEACHER:
        try:
            add(TEACHER, TEACHER, HEAR if config.teacher == AUTO else config.teacher)
        except TeacherError as e:
            if config.teacher != AUTO:
                raise
            print(f"the teacher is not measured: {str(e).splitlines()[0]}")
    for name in dict.fromkeys(config.baseline):
        add(name, "baseline", name)
    return models, facts


# ---------------------------------------------------------------------------------------------------------- datasets


def load_datasets(specs: Sequence[str], problems: list[str]) -> dict[str, Dataset]:
    """By a short name of their own. One that cannot be had becomes a problem; if all are so, the first is raised."""
    found: dict[str, Dataset] = {}
    errors = []
    for spec in dict.fromkeys(specs):
        demo.prepare(spec.partition("=")[2])
        try:
            dataset = load_dataset(spec)
        except DatasetError as e:
            errors.append(e)
            problems.append(f"dataset {spec}: {' '.join(str(e).split())}")
            continue
        label = dataset.name
        while label in found:
            label += "'"
        found[label] = dataset
        problems += [f"{label}, {what}: {why}" for what, why in dataset.problems.items()]
    if not found:
        raise errors[0]
    return found


def embed_dataset(
    dataset: Dataset, models: dict[str, Embedder], protocol: str, config: Config
) -> tuple[dict[str, np.ndarray], dict[int, str]]:
    """[n, W] by model, NaN where a row could not be read, and why by row. Raises DatasetError if most could not."""
    clip = f"event-{dataset.event}" if protocol in ("event", PAPER) else protocol
    about = {
        "dataset": dataset.name,
        "revision": dataset.revision,
        "preprocessing": f"{dataset.preprocessing}; {DECODER}",
        "num_rows": len(dataset.groups),
    }
    text = PROTOCOLS[clip].text
    keys = {name: describe(fingerprint=m.fingerprint, protocol=text, **about) for name, m in models.items()}
    unread: dict[int, str] = {}

    def readable() -> Iterator[tuple[int, np.ndarray]]:
        for row, samples in dataset.recordings():
            if isinstance(samples, str) or len(samples) == 0:
                unread[row] = samples if isinstance(samples, str) else "empty"
            else:
                yield row, samples

    def compute(names: list[str]) -> dict[str, np.ndarray]:
        print(f"embedding {len(dataset.groups)} recordings of {dataset.name}, {clip}: {', '.join(names)}")
        chosen = [models[name] for name in names]
        return embed(chosen, clip, readable(), len(dataset.groups), batch_size=config.batch_size)

    embeddings = through_cache(config.cache, keys, compute)
    missing = np.isnan(next(iter(embeddings.values()))[:, 0])
    if missing.any() and not unread:  # all from the cache, which does not hold the reasons: reading is fast
        for _ in readable():
            pass
    if missing.mean() > MAX_UNREADABLE_SHARE:
        raise DatasetError(
            f"{len(unread)} of {len(missing)} rows are unreadable ({in_words(Counter(unread.values()))}); "
            f"expected WAV, FLAC, OGG or MP3 files"
        )
    return embeddings, unread


def in_words(counts: Counter[str]) -> str:
    """'undecodable: 2, empty: 1'"""
    return ", ".join(f"{name}: {count}" for name, count in counts.items())


def unread_in_words(unread: dict[int, str], num_rows: int) -> str:
    """'3 of 19 rows are unreadable (undecodable: 3), such as rows 4, 7 and 18'"""
    named = ", ".join(str(row) for row in list(unread)[:MAX_NAMED_ROWS])
    return f"{len(unread)} of {num_rows} rows are left out ({in_words(Counter(unread.values()))}), such as {named}"


def rows_and_tasks(dataset: Dataset, split: str, is_read: np.ndarray) -> tuple[Rows, dict[str, Task]]:
    """A split of the dataset, and its tasks on the rows that are in it and could be read."""
    takes_part = is_read
    rows = Rows(groups=dataset.groups)
    if split != GROUPED:
        found = dataset.splits[split]
        takes_part = is_read & (found.parts != NEITHER)
        is_holdout = found.kind == "holdout"
        rows = replace(rows, is_test=found.parts == TEST) if is_holdout else replace(rows, folds=found.parts)
    tasks = {name: replace(task, takes_part=task.takes_part & takes_part) for name, task in dataset.tasks.items()}
    return rows, tasks


def split_in_words(dataset: Dataset, split: str) -> str:
    """For the table."""
    if split == GROUPED:
        return f"{NUM_FOLDS} folds of our own over {dataset.group_word}s; the mean of {SEEDS} deals, by seed"
    if dataset.splits[split].kind == "folds":
        return f"the {len(dataset.splits[split].names)} folds of the dataset"
    return "the training and the test part of the dataset"


# ------------------------------------------------------------------------------------------------------- measurement


def measure_protocol(
    protocol: str, datasets: dict[str, Dataset], models: dict[str, Embedder], config: Config, problems: list[str]
) -> Results:
    """One section of the results: every dataset, by each split that it wants. Only its main one counts in the mean."""
    probe = PAPER if protocol == PAPER else config.probe
    entries: list[Results] = []
    main: dict[str, Measured] = {}
    for label, dataset in datasets.items():
        try:
            embeddings, unread = embed_dataset(dataset, models, protocol, config)
        except DatasetError as e:
            problems.append(f"{label}: {e}")
            continue
        if unread:
            problems.append(f"{label}: {unread_in_words(unread, len(dataset.groups))}")
        is_read = ~np.isin(np.arange(len(dataset.groups)), list(unread))
        for split in dataset.split_names:
            rows, tasks = rows_and_tasks(dataset, split, is_read)
            found = measure(tasks, rows, embeddings, probe, config.seed, config.workers)
            is_main = split == dataset.split_names[0]
            if is_main:
                main[label] = found
            entries.append(
                {
                    "name": dataset.name,
                    "label": label if is_main else f"{label}, {split}",
                    "title": dataset.title,
                    "split": split_in_words(dataset, split),
                    "tasks": found.entries,
                    "mean": mean_entry(found.draws),
                }
            )
    for entry in entries:
        problems += problems_in(entry, probe)
    draws = merged(main)
    complete = {name: of for name, of in draws.items() if published.is_complete(name)}
    return {
        "text": text_of(protocol, datasets),
        "probe": probe,
        "datasets": entries,
        "mean": mean_entry(draws),
        "complete_mean": mean_entry(complete) if complete.keys() != draws.keys() else None,
    }


def text_of(protocol: str, datasets: dict[str, Dataset]) -> str:
    """What is embedded, in words."""
    if protocol not in ("event", PAPER):
        return PROTOCOLS[protocol].text
    by_place: dict[str, list[str]] = {}
    for label, dataset in datasets.items():
        by_place.setdefault(dataset.event, []).append(label)
    return "; ".join(f"{', '.join(labels)}: {PROTOCOLS[f'event-{at}'].text}" for at, labels in by_place.items())


def problems_in(dataset: Results, probe: str) -> list[str]:
    """Tasks and classes that could not be measured, each with its reason."""
    found = []
    for entry in dataset["tasks"]:
        where = f"{dataset['label']}, {entry['task']}"
        if entry["problem"]:
            found.append(f"{where}: not measurable with the probe {probe}: {entry['problem']}")
        else:
            found += [f"{where}: {name} is left out: {why}" for name, why in entry["left_out"].items()]
    return found


def data_in_words(dataset: Dataset) -> Results:
    """What the table says of a dataset as a whole."""
    grouped = f"{len(np.unique(dataset.groups))} {dataset.group_word}s, each on one side of every split"
    if dataset.is_ungrouped:  # its own note says so, and how many rows: nothing here may say otherwise
        grouped = f"not every row tells its {dataset.group_word}: rows of one may lie on both sides of a split"
    copies = f"a sound that is in two groups ({COPY}) is left out of the second"
    return {
        "title": dataset.title,
        "revision": dataset.revision,
        "rows": len(dataset.groups),
        "preprocessing": dataset.preprocessing,
        "notes": [f"{grouped}; {copies}", *dataset.notes],
    }


def keep_best(results: Results, config: Config) -> str:
    """Copy the student with the highest mAP into --out: the names in a run folder move on to other weights."""
    mean = next(iter(results["protocols"].values()))["mean"]
    if mean is None:
        return "No checkpoint is the best: no binary task was measured."
    best = max(models_of(results, STUDENT), key=lambda name: mean["models"][name]["metrics"]["ap"]["value"])
    source = student_files(config)[best]
    with atomic_write(config.out / checkpoint.BEST) as f:
        f.write(Path(source).read_bytes())
    return (
        f"best.pt is a copy of {source}. It was chosen on these recordings, so its own numbers are a little too high."
    )


def main(config: Config) -> int:
    require_inputs(config)
    demo.prepare(config.teacher)
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # convolutions alone default to TF32, which is not float32
    problems: list[str] = []
    datasets = load_datasets(config.dataset, problems)
    models, facts = load_models(config)
    sections = {
        protocol: measure_protocol(protocol, datasets, models, config, problems)
        for protocol in dict.fromkeys(config.protocol)
    }
    if not any(not entry["problem"] for s in sections.values() for d in s["datasets"] for entry in d["tasks"]):
        raise UserError(f"nothing can be measured: {'; '.join(problems)}")
    results = {
        "config": asdict(config),
        "code": git_revision(),
        "models": facts,
        "method": [],
        "problems": list(dict.fromkeys(problems)),  # each protocol meets the same ones
        "data": [data_in_words(dataset) for dataset in datasets.values()],
        "protocols": sections,
    }

    if config.every_checkpoint:
        results["method"].append(keep_best(results, config))
    write_json(config.out / "results.json", results)
    names = write_report(results, config.out)
    print(f"wrote results.json, {', '.join(names)} to {config.out}\n\n{one_screen(results)}", end="")
    return 1 if problems else 0


if __name__ == "__main__":
    cli.run(main, PRESETS, __doc__)
