"""FluSense: sounds of waiting rooms and of AudioSet videos, cut into labelled intervals; seven labels are our tasks.

in:   vtsouval/flusense (columns audio, label: one row per interval); or a folder; or such a table with a column group
out:  Dataset: folds by recording, which is the group or, where there is none, read from the name of the sound file

A folder may hold Parquet files, or the official release: sound files and their TextGrids (praat) of the same stem.
From these an interval of less than 2 s is widened to 2 s of the sound around it; the hub's copy has only the interval.

r rows, one per interval
"""

import re
from collections import Counter
from pathlib import Path

import numpy as np

from hear_distill.audio import CLIP_SAMPLES, SAMPLE_RATE
from hear_distill.hub_files import by_hand, fetch_parquet
from hear_distill.tabular import (
    ParquetRows,
    counted,
    find_files,
    find_parquet,
    read_sounds,
    revision_of,
    sounds_in,
)
from hear_distill.tasks import Dataset, DatasetError, one_against_the_rest

NAME = "flusense"
HUB = "vtsouval/flusense"
TITLE = "FluSense, folds by recording"
TASKS = {
    "Breathing": "breathe",
    "Cough": "cough",
    "Gasp": "gasp",
    "Sneeze": "sneeze",
    "Sniffle": "sniffle",
    "Speech": "speech",
    "Throat-clearing": "throat-clearing",
}
OTHERS = ("etc", "silence", "hiccup", "vomit", "burp", "wheeze", "snore")  # negatives of every task
VIDEO = re.compile(r"([\w-]{11})(?:[_\-. ].*)?", re.ASCII)  # a YouTube id, alone or before more
NO_VIDEO = re.compile(
    rf"(?:{'|'.join((*TASKS.values(), *OTHERS))}|audio|clip|file|row|sample|train)[_\-. ]?\d|\d{{11}}"
)
MIN_ROWS_PER_RECORDING = 2  # on average; the dataset has ten. Fewer, and what looks like an id is none
CLIP_S = CLIP_SAMPLES / SAMPLE_RATE
INTERVAL = re.compile(r'xmin\s*=\s*([\d.eE+-]+)\s*xmax\s*=\s*([\d.eE+-]+)\s*text\s*=\s*"((?:[^"]|"")*)"')


def load(place: Path | None) -> Dataset:
    """The dataset from the hub (None), a folder or a Parquet file. Raises DatasetError."""
    if place is None:
        files, revision = fetch_parquet(HUB, NAME)
        return _of_parquet(files, revision)
    files = find_parquet(place)
    return _of_parquet(files, revision_of(files)) if files else _of_text_grids(place)


def _of_parquet(files: list[Path], revision: str) -> Dataset:
    rows = ParquetRows(files)
    labels = [text.strip().lower() for text in rows.text("label")]
    kept, notes, problems = _known(labels)
    # A table that names its groups is believed; the hub's copy has no such column.
    are_named = "group" in rows.names
    recordings = rows.text("group") if are_named else [recording_of(path) for path in rows.paths()]
    groups, ungrouped = _groups([recordings[i] for i in kept], are_named)
    if ungrouped:
        notes.append(f"ungrouped: leakage possible; {ungrouped} rows do not tell the recording that they were cut from")
    return _dataset(
        np.array([labels[i] for i in kept], dtype=str),
        revision=revision,
        groups=groups,
        is_ungrouped=ungrouped > 0,
        read=lambda: rows.read(np.array(kept, dtype=int)),
        notes=notes,
        problems=problems,
    )


def _of_text_grids(folder: Path) -> Dataset:
    found = find_files(folder)
    grids = [path for paths in found.values() for path in paths if path.suffix.lower() == ".textgrid"]
    sounds = sounds_in(found)
    if not grids or not sounds:
        raise DatasetError(
            f"{folder} has {len(grids)} TextGrids and {len(sounds)} sounds; expected Parquet files, or the official "
            f"annotations (git clone https://github.com/Forsad/FluSense-data) with the sounds that its README links to"
            f"{by_hand(HUB, NAME)}"
        )
    labels, spans, recordings, rows_of = [], [], [], []
    for grid in grids:
        intervals = read_text_grid(grid)
        rows_of.append(range(len(labels), len(labels) + len(intervals)))
        labels += [label for _, _, label in intervals]
        spans += [widened(begin, end, intervals[-1][1]) for begin, end, _ in intervals]
        recordings += [recording_of(grid.name) or grid.stem] * len(intervals)
    kept, notes, problems = _known(labels)
    row_at = {position: row for row, position in enumerate(kept)}
    paths = [sounds.get(grid.stem) for grid in grids]
    rows = [[row_at[i] for i in some if i in row_at] for some in rows_of]
    return _dataset(
        np.array([labels[i] for i in kept], dtype=str),
        revision=revision_of([*grids, *(path for path in paths if path)]),
        groups=np.array([recordings[i] for i in kept], dtype=str),
        spans_s=np.array([spans[i] for i in kept]),
        cut="cut to the annotated interval, widened to 2 s of its recording if shorter",
        read=lambda: read_sounds(paths, rows),
        notes=notes,
        problems=problems,
    )


def _dataset(labels: np.ndarray, **found) -> Dataset:
    everyone = np.ones(len(labels), bool)
    return Dataset(
        name=NAME,
        title=TITLE,
        event="centre",
        group_word="recording",
        tasks=one_against_the_rest(labels, everyone, TASKS),
        **found,
    )


def _known(labels: list[str]) -> tuple[list[int], list[str], dict[str, str]]:
    """Positions of the rows with a label that we know, notes about blank ones, problems of unknown ones.

    An unknown label may be a positive one, misspelt: its rows are no negatives either.
    """
    known = {*TASKS.values(), *OTHERS}
    kept = [i for i, label in enumerate(labels) if label in known]
    unknown = Counter(label for label in labels if label and label not in known)
    notes = [f"{labels.count('')} intervals without a label are left out"] if "" in labels else []
    problems = {
        f"label {label!r}": f"unknown; its {count} rows are left out; expected one of {', '.join(sorted(known))}"
        for label, count in unknown.items()
    }
    if unknown:
        notes.append(f"unknown labels: {counted(unknown)}")
    return kept, notes, problems


def recording_of(path: str) -> str:
    """The YouTube id in the name of a sound file, or in that of its folder; empty if neither has one.

    Ids have 11 letters, digits, - and _; names such as cough_00012 are no ids.
    """
    for name in (Path(path).stem, Path(path).parent.name):
        match = VIDEO.fullmatch(name)
        if match and not NO_VIDEO.match(name):
            return match[1]
    return ""


def _groups(recordings: list[str], are_named: bool) -> tuple[np.ndarray, int]:
    """[r] groups, and the number of rows that stand alone because nobody knows their recording.

    Ids that hardly repeat are no recordings, whatever they look like: unless a column names them, no row is trusted.
    """
    told = [recording for recording in recordings if recording]
    if not are_named and len(told) < MIN_ROWS_PER_RECORDING * len(set(told)):
        recordings = [""] * len(recordings)
    groups = [recording or f"row {row}" for row, recording in enumerate(recordings)]
    return np.array(groups, dtype=str), recordings.count("")


def read_text_grid(path: Path) -> list[tuple[float, float, str]]:
    """(begin, end, label) of each interval, in seconds, in order; the label stripped and in lower case."""
    data = path.read_bytes()
    text = data.decode("utf-16") if data[:2] in (b"\xff\xfe", b"\xfe\xff") else data.decode("utf-8-sig")
    found = [(float(begin), float(end), label.strip().lower()) for begin, end, label in INTERVAL.findall(text)]
    if not found:
        raise DatasetError(f"{path} has no intervals; expected a TextGrid of praat in its long form")
    return sorted(found)


def widened(begin: float, end: float, whole: float) -> tuple[float, float]:
    """An interval in seconds, or 2 s around its middle if it is shorter, moved inside the recording [0, whole]."""
    if end - begin >= CLIP_S:
        return begin, end
    start = min(max(0.0, (begin + end - CLIP_S) / 2), max(0.0, whole - CLIP_S))
    return start, min(start + CLIP_S, whole)
