"""FSD50K: 51,197 Freesound clips with labels from 200 classes of the AudioSet ontology; six of them are our tasks.

in:   audio from CLAPv2/FSD50K, labels from Fhrozen/FSD50k, joined by Freesound id; or a folder
out:  Dataset: fitted on the official dev set (train and val), tested on the official eval set

Why these two: CLAPv2/FSD50K is the copy with lossless audio in Parquet (FLAC 48 kHz), but instead of labels it has
sentences, made of the ground truth and of the annotators' candidates as well: 'Speech synthesizer' holds the word
Speech, 'Male speech, man speaking' a comma, and some labels are not in the ground truth. Fhrozen/FSD50k has the
official label files. The sentences are not read here, and neither are the splits of that copy.

A folder may be that of the official archives (FSD50K.dev_audio and so on), a clone of Fhrozen/FSD50k, or one of
Parquet files; labels that are not in it come from the hub.

r rows, one per clip
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hear_distill.hub_files import by_hand, fetch, fetch_parquet
from hear_distill.tabular import (
    ParquetRows,
    find_files,
    find_one,
    find_parquet,
    read_csv,
    read_sounds,
    read_text,
    revision_of,
    sounds_in,
)
from hear_distill.tasks import TEST, TRAIN, Dataset, DatasetError, Split, Task

NAME = "fsd50k"
AUDIO, LABELS = "CLAPv2/FSD50K", "Fhrozen/FSD50k"
LABEL_FILES = ("labels/*.csv", "metadata/*clips_info*.json")  # the rest of that repository is 34 GB of WAV
TASKS = {
    "Breathing": "Breathing",
    "Cough": "Cough",
    "Laughter": "Laughter",
    "Respiratory sounds": "Respiratory_sounds",
    "Sneeze": "Sneeze",
    "Speech": "Speech",
}
# In the ground truth a clip of a class also has the names of what that class is a kind of.
PARENTS = {
    **dict.fromkeys(("Breathing", "Cough", "Sneeze", "Gasp"), "Respiratory_sounds"),
    **dict.fromkeys(("Giggle", "Chuckle_and_chortle"), "Laughter"),
    **dict.fromkeys(
        ("Male_speech_and_man_speaking", "Female_speech_and_woman_speaking", "Child_speech_and_kid_speaking"), "Speech"
    ),
}
MAX_ORPHAN_SHARE = 0.01  # of the clips of a task that have a child's name and not its own: above it, other labels
FREESOUND_ID = re.compile(r"(?:^|\D)(\d+)(?:\.\w+)?$")
ID_COLUMNS = ("index", "fname", "id")


@dataclass(frozen=True)
class Truth:
    """The official label files, by Freesound id."""

    labels: dict[str, set[str]]
    parts: dict[str, str]
    vocabulary: set[str]
    uploaders: dict[str, str]
    """empty where the metadata is not there"""
    revision: str


def load(place: Path | None) -> Dataset:
    """The dataset from the hub (None), a folder or a Parquet file. Raises DatasetError."""
    if place is None:
        files, revision = fetch_parquet(AUDIO, NAME)
        local: dict[str, list[Path]] = {}
    else:
        files = find_parquet(place)
        local = find_files(place) if place.is_dir() else {}
    if files:
        ids, read = _parquet_clips(files)
    else:
        sounds = sounds_in(local)
        if not sounds:
            raise DatasetError(f"neither Parquet files nor sounds in {place}{by_hand(AUDIO, NAME)}")
        ids, read, files = list(sounds), _folder_reader(list(sounds.values())), list(sounds.values())
    if place is not None:
        revision = revision_of(files)
    return _assemble(ids, read, _ground_truth(local), revision)


def _parquet_clips(files: list[Path]) -> tuple[list[str], Callable]:
    """The Freesound id of each row, empty where there is none, and a reader of some of them."""
    rows = ParquetRows(files)
    column = next((name for name in ID_COLUMNS if name in rows.names), None)
    found = [FREESOUND_ID.search(text) for text in (rows.text(column) if column else rows.paths())]
    return [match[1] if match else "" for match in found], rows.read


def _folder_reader(paths: list[Path]) -> Callable:
    """As ParquetRows.read, of sound files."""

    def read(kept: np.ndarray) -> Iterator:
        return read_sounds([paths[i] for i in kept], [[row] for row in range(len(kept))])

    return read


def _ground_truth(local: dict[str, list[Path]]) -> Truth:
    """From dev.csv, eval.csv and vocabulary.csv of a folder, or of the hub if the folder has none of them."""
    names = ("dev.csv", "eval.csv", "vocabulary.csv")
    revision = ""
    if not any(name in local for name in names):
        folder, commit = fetch(LABELS, LABEL_FILES, NAME)
        local, revision = find_files(folder), f"{LABELS}@{commit}"
    found = {name: find_one(local, name) for name in names}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        raise DatasetError(
            f"no {' and no '.join(missing)} among the labels of FSD50K{by_hand(LABELS, NAME, LABEL_FILES)}"
        )
    info = [find_one(local, f"{part}_clips_info_fsd50k.json") for part in ("dev", "eval")]
    labels, parts = {}, {}
    for name, part in (("dev.csv", TRAIN), ("eval.csv", TEST)):
        for row in read_csv(found[name], ["fname", "labels"]):
            if row["fname"] in parts:
                where = "in dev.csv and in eval.csv" if parts[row["fname"]] != part else f"twice in {name}"
                raise DatasetError(
                    f"clip {row['fname']} of FSD50K is {where}: a probe would be tested on what it knows"
                )
            labels[row["fname"]] = {label.strip() for label in row["labels"].split(",")}
            parts[row["fname"]] = part
    uploaders = {}
    for path in info if None not in info else []:
        uploaders |= {key: str(value["uploader"]) for key, value in json.loads(read_text(path)).items()}
    lines = [line.split(",") for line in read_text(found["vocabulary.csv"]).splitlines()]  # number, label, mid
    vocabulary = {line[1].strip() for line in lines if len(line) > 1}
    used = [path for path in (*found.values(), *info) if path]
    return Truth(labels, parts, vocabulary, uploaders, revision or revision_of(used))


def _assemble(ids: list[str], read: Callable, truth: Truth, revision: str) -> Dataset:
    """Join sounds and labels; count what has no partner."""
    first = {clip: position for position, clip in reversed(list(enumerate(ids)))}
    kept = np.array(sorted(position for clip, position in first.items() if clip in truth.parts), dtype=int)
    clips = [ids[position] for position in kept]
    left_out = {
        "rows name no Freesound id": ids.count(""),
        "sounds are in neither dev.csv nor eval.csv": sum(clip not in truth.parts for clip in first if clip),
        "sounds are further copies of a clip": len(ids) - ids.count("") - len([clip for clip in first if clip]),
        "labelled clips have no sound here": len(truth.parts) - len(clips),
    }
    notes = [f"{count} {what}" for what, count in left_out.items() if count]
    tasks, problems = _tasks(clips, truth)
    without = sum(clip not in truth.uploaders for clip in clips)
    if without:
        notes.append(f"{without} clips name no uploader: folds inside the training part may share one")
    return Dataset(
        name=NAME,
        title="FSD50K, official labels, dev to fit and eval to test",
        revision=f"{revision} + {truth.revision}",
        event="peak",
        group_word="uploader" if not without else "clip",
        groups=np.array([truth.uploaders.get(clip, f"clip {clip}") for clip in clips], dtype=str),
        tasks=tasks,
        read=lambda: read(kept),
        splits={"official": Split(kind="holdout", parts=np.array([truth.parts[clip] for clip in clips], dtype=str))},
        split_names=("official",),
        notes=notes,
        problems=problems,
    )


def _tasks(clips: list[str], truth: Truth) -> tuple[dict[str, Task], dict[str, str]]:
    """The tasks over these clips [r], and what is wrong with labels or tasks. Unknown labels may be misspelt ones."""
    unknown = Counter(label for clip in clips for label in truth.labels[clip] - truth.vocabulary)
    takes_part = np.array([truth.labels[clip] <= truth.vocabulary for clip in clips], dtype=bool)
    problems = {
        f"label {label!r}": f"not in vocabulary.csv; the {count} clips that have it are left out"
        for label, count in unknown.items()
    }
    tasks = {}
    for title, label in TASKS.items():
        if label not in truth.vocabulary:
            problems[title] = f"{label} is not in vocabulary.csv"
            continue
        orphans = [
            clip for clip in clips if label not in truth.labels[clip] and _is_child_of(label, truth.labels[clip])
        ]
        num_positives = sum(label in truth.labels[clip] for clip in clips)
        if len(orphans) > MAX_ORPHAN_SHARE * (num_positives + len(orphans)):
            problems[title] = (
                f"{len(orphans)} clips, such as {orphans[0]}, have a label that is a kind of {label}, and not {label}: "
                f"these are not the labels of the ground truth, which are propagated upwards"
            )
            continue
        is_positive = np.array([label in truth.labels[clip] for clip in clips], dtype=bool)
        tasks[title] = Task(kind="binary", labels=is_positive, takes_part=takes_part)
    return tasks, problems


def _is_child_of(label: str, labels: set[str]) -> bool:
    return any(PARENTS.get(other) == label for other in labels)
