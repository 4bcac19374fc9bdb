"""What an evaluation dataset is: recordings, groups, tasks, prescribed splits. And the windows of a recording.

in:   what a loader (fsd50k, flusense, coswara, icbhi, circor, eval_datasets) found in files
out:  Dataset: labels and groups at once, sounds one by one; no group is on both sides of a split

n samples at 16 kHz   w windows   r rows, each of which is one example   f files
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow
from pyarrow import parquet
from scipy import signal

from hear_distill.audio import CLIP_SAMPLES, SAMPLE_RATE, DecodeError, decode, to_int16
from hear_distill.files import UserError

HOP_SAMPLES = SAMPLE_RATE  # 1 s: neighbouring windows share half of their sound
LAYOUT = "expected columns audio {bytes, path}, label, group and perhaps fold"
TRAIN, TEST, NEITHER = "train", "test", ""  # parts of a holdout
GROUPED = "grouped"  # the split that nobody prescribes: folds over groups, dealt by whoever probes
NUM_FOLDS = 5  # of that split
FILTER_ORDER = 4  # of the Butterworth band-pass; run forwards and backwards, which doubles it and shifts nothing
NO_AUDIO = "no audio"
COPY = "copy of a sound in another group"

Reader = Callable[[], Iterator[tuple[Sequence[int], bytes | None]]]
"""One file after the other, [f]: the rows that are cut from it, and its compressed bytes; None where it is missing"""


class DatasetError(UserError):
    """A dataset that cannot be had, or cannot be evaluated as it is."""


class TableError(DatasetError):
    """A table that cannot be evaluated as it is."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One question about each row."""

    kind: Literal["binary", "multiclass", "regression"]
    labels: np.ndarray
    """[r] bool, text or float; anything where the row does not take part"""
    takes_part: np.ndarray
    """[r] bool: the row has an answer"""
    metric: Literal["ap", "f1", "mae"]
    positive: str = ""
    """what True means; empty unless binary"""

    def classes(self) -> dict[str, np.ndarray]:
        """[r] bool of each class that a probe must have seen and must be tested on; of a regression, who answered."""
        if self.kind == "regression":
            return {"a number": self.takes_part}
        if self.kind == "binary":
            return {self.positive: self.labels & self.takes_part, "the rest": ~self.labels & self.takes_part}
        return {str(name): (self.labels == name) & self.takes_part for name in np.unique(self.labels[self.takes_part])}


@dataclass(frozen=True, kw_only=True)
class Split:
    """Who is trained on and who is tested on, as the dataset prescribes it."""

    kind: Literal["holdout", "folds"]
    parts: np.ndarray
    """[r] text: of a holdout TRAIN, TEST or NEITHER, else the name of the fold, or NEITHER"""

    @property
    def names(self) -> list[str]:
        """The parts that hold rows, sorted."""
        return sorted({str(part) for part in self.parts} - {NEITHER})


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Labelled sounds. A row is one example; several may be cut from one file.

    A group is what must not lie on both sides of a split: a person, or a recording that several rows were cut from.

    Raises:
        DatasetError: no rows, or a prescribed split that tears a group or is no split.
    """

    name: str
    title: str
    revision: str
    """hub commits, or a hash of the local files: with `name` and `preprocessing` all that decides the sounds"""
    event: Literal["peak", "centre"]
    """where the one 2 s window of the protocol `event` lies"""
    group_word: str
    """what a group is: patient, recording, uploader"""
    groups: np.ndarray
    """[r] text"""
    tasks: dict[str, Task]
    read: Reader
    is_ungrouped: bool = False
    """some rows name no recording or person: results are to be marked 'ungrouped: leakage possible'"""
    splits: dict[str, Split] = field(default_factory=dict)
    """those that the dataset prescribes, by name"""
    protocols: tuple[str, ...] = (GROUPED,)
    """names of the splits to report, the main one first; GROUPED for folds over the groups"""
    band_hz: tuple[float, float] | None = None
    """band-pass over the whole file, before rows are cut from it"""
    spans_s: np.ndarray | None = None
    """[r, 2] begin and end of the row in its file; None where a row is a whole file"""
    cut: str = ""
    """what the spans are, in words"""
    notes: list[str] = field(default_factory=list)
    """what was left out and counted, and what a reader of the results must know"""
    problems: dict[str, str] = field(default_factory=dict)
    """what is wrong with the input, by task or by label: the exit code is to tell. Such tasks are not in `tasks`"""

    def __post_init__(self) -> None:
        if len(self.groups) == 0:
            raise DatasetError(f"{self.name} has no rows that can be used; {'; '.join(self.notes) or self.title}")
        columns = [*(task.labels for task in self.tasks.values()), *(task.takes_part for task in self.tasks.values())]
        columns += [split.parts for split in self.splits.values()] + ([] if self.spans_s is None else [self.spans_s])
        assert all(len(column) == len(self.groups) for column in columns), "columns of different lengths"
        assert {*self.protocols} <= {GROUPED, *self.splits}
        for name, split in self.splits.items():
            refuse_torn_groups(self.name, name, self.groups, split, self.group_word)

    @property
    def preprocessing(self) -> str:
        """What is done to a sound before it is embedded: part of what its tasks mean."""
        steps = []
        if self.band_hz:
            low, high = self.band_hz
            steps.append(
                f"band-pass {low:g} to {high:g} Hz (Butterworth of order {FILTER_ORDER}, forwards and backwards)"
            )
        return "; ".join(steps + ([self.cut] if self.cut else [])) or "none"

    def problems_of(self, protocol: str) -> dict[str, str]:
        """`problems`, and the tasks and classes with too few groups for a split.

        The key of a class is 'task: class'. With GROUPED or prescribed folds a class needs as many groups as there are
        folds; in a holdout two to train on, which the choice of a penalty takes, and one to be tested on.
        """
        found = dict(self.problems)
        for name, task in self.tasks.items():
            for label, is_in in task.classes().items():
                reason = self._shortage(is_in, protocol)
                if reason:
                    found[f"{name}: {label}" if task.kind == "multiclass" else name] = f"{label}: {reason}"
        return found

    def _shortage(self, is_in: np.ndarray, protocol: str) -> str:
        """What a class lacks, in words; nothing if it can be measured."""
        split = self.splits.get(protocol)
        if split is None:
            needs = [(np.ones(len(is_in), bool), "", NUM_FOLDS)]
        elif split.kind == "folds":
            needs = [(split.parts != NEITHER, "", len(split.names))]
        else:
            needs = [(split.parts == TRAIN, " to train on", 2), (split.parts == TEST, " to be tested on", 1)]
        for where, words, needed in needs:
            found = len(np.unique(self.groups[is_in & where]))
            if found < needed:
                return f"in {found} {self.group_word}s{words}, expected {needed} or more"
        return ""

    def recordings(self) -> Iterator[tuple[int, np.ndarray | str]]:
        """Every row once, in the order of the files: (row, samples [n] int16 at 16 kHz, or why there are none).

        One file is held at a time. The same compressed bytes in a second group are left out, with the reason COPY:
        a probe could be tested on what it was trained on.
        """
        homes: dict[bytes, str] = {}
        for rows, data in self.read():
            if data is None:
                yield from ((row, NO_AUDIO) for row in rows)
                continue
            group = str(self.groups[rows[0]])
            if homes.setdefault(hashlib.blake2b(data, digest_size=16).digest(), group) != group:
                yield from ((row, COPY) for row in rows)
                continue
            try:
                samples = decode(data)
            except DecodeError as e:
                yield from ((row, e.reason) for row in rows)
                continue
            if self.band_hz:
                samples = band_passed(samples, self.band_hz)
            for row in rows:
                part = samples if self.spans_s is None else span_of(samples, *self.spans_s[row])
                yield row, part if len(part) else "empty cut"


def refuse_torn_groups(dataset: str, name: str, groups: np.ndarray, split: Split, group_word: str) -> None:
    """Raise DatasetError if a group is in two parts of a split, or if there are fewer than two parts."""
    homes = defaultdict(set)
    for group, part in zip(groups, split.parts, strict=True):
        homes[str(group)].add(str(part))
    torn = {group: sorted(found - {NEITHER}) for group, found in homes.items() if len(found - {NEITHER}) > 1}
    if torn:
        group, found = next(iter(torn.items()))
        raise DatasetError(
            f"{len(torn)} {group_word}s of {dataset} are in more than one part of the split {name}, such as {group} in "
            f"{' and '.join(found)}: a probe would be tested on what it was trained on; put each into one part"
        )
    if len(split.names) < 2 or (split.kind == "holdout" and split.names != [TEST, TRAIN]):
        raise DatasetError(
            f"the split {name} of {dataset} has the parts {', '.join(split.names) or 'none'}; expected "
            f"{'train and test' if split.kind == 'holdout' else 'two folds or more'}"
        )


def band_passed(samples: np.ndarray, band_hz: tuple[float, float]) -> np.ndarray:
    """[n] int16 -> [n] int16, without a shift in time."""
    sections = signal.butter(FILTER_ORDER, band_hz, "bandpass", fs=SAMPLE_RATE, output="sos")
    padding = min(SAMPLE_RATE, len(samples) - 1)  # 1 s: the low edge rings for long
    return to_int16(signal.sosfiltfilt(sections, samples / 32768, padlen=padding))


def span_of(samples: np.ndarray, begin_s: float, end_s: float) -> np.ndarray:
    """[n] -> [n of the span], as far as it lies in the recording."""
    begin, end = (round(min(max(0.0, second * SAMPLE_RATE), len(samples))) for second in (begin_s, end_s))
    return samples[begin:end]


def one_against_the_rest(labels: np.ndarray, takes_part: np.ndarray, names: Mapping[str, str]) -> dict[str, Task]:
    """A binary task, scored by AP, for each (title, label) of `names`; labels [r] text."""
    return {
        title: Task(kind="binary", labels=labels == label, takes_part=takes_part, metric="ap", positive=label)
        for title, label in names.items()
    }


@dataclass(frozen=True, kw_only=True)
class Table:
    """Recordings with one label each, all held in memory: what the stage reads until it takes a Dataset.

    A group is what must not lie on both sides of a split: a person, or a recording that several rows were cut from.
    """

    name: str
    audio: list[bytes | None]
    """compressed, as in the file; None where the file has none"""
    labels: np.ndarray
    """[r] text"""
    groups: np.ndarray
    """[r] text"""
    folds: np.ndarray | None
    """[r] text, if the table prescribes them"""

    def __post_init__(self) -> None:
        if len(self.labels) == 0:
            raise TableError(f"{self.name} has no rows; {LAYOUT}, one row per recording")
        if self.folds is not None:
            self._check_folds(self.folds)

    def _check_folds(self, folds: np.ndarray) -> None:
        homes = defaultdict(set)
        for group, fold in zip(self.groups, folds, strict=True):
            homes[group].add(fold)
        torn = {group: sorted(found) for group, found in homes.items() if len(found) > 1}
        if torn:
            group, found = next(iter(torn.items()))
            raise TableError(
                f"{len(torn)} groups of {self.name} are in more than one fold, such as {group} in "
                f"{' and '.join(found)}: a probe would be tested on groups that it was trained on; put each group into "
                f"one fold, or leave out the column fold"
            )
        if len(set(folds)) < 2:
            raise TableError(f"{self.name} has one fold only, expected two or more, or no column fold at all")

    def tasks(self) -> dict[str, np.ndarray]:
        """Label -> [r] bool, one against the rest."""
        return {str(label): self.labels == label for label in np.unique(self.labels)}


def load_table(path: Path) -> Table:
    """Read a table. Audio stays as it is in the file: a recording that cannot be decoded is found where it is embedded.

    pyarrow reads it, not `datasets`, which uses pyarrow too but copies the file into its cache, takes brackets in a
    path for a pattern, fails on a table without rows, and needs torchcodec to look at a column of type Audio.

    Raises:
        TableError: no such file, not Parquet, a missing column, a column of another type or with nulls, no rows, or a
            group in two folds.
    """
    if not path.is_file():
        raise TableError(
            f"no table at {path}; {LAYOUT}\n"
            f"  to name one:       python evaluate_distilled_hear.py --table TABLE.parquet\n"
            f"  to see it at work: make demo"
        )
    try:
        with parquet.ParquetFile(path) as file:
            found = file.schema_arrow.names
            arrow = file.read(columns=[name for name in ("audio", "label", "group", "fold") if name in found])
    except (pyarrow.ArrowException, OSError) as e:
        raise TableError(f"{path} cannot be read as Parquet ({e}); name another file with --table") from e
    missing = [name for name in ("audio", "label", "group") if name not in found]
    if missing:
        raise TableError(f"{path} has no column {' or '.join(missing)}; found {', '.join(found)}; {LAYOUT}")
    return Table(
        name=path.name,
        audio=_audio(arrow, path),
        labels=_text(arrow, "label", path),
        groups=_text(arrow, "group", path),
        folds=_text(arrow, "fold", path) if "fold" in found else None,
    )


def _audio(arrow: pyarrow.Table, path: Path) -> list[bytes | None]:
    """The compressed file of each row. Its name, which the struct holds too, is not needed."""
    kind = arrow.schema.field("audio").type
    if not pyarrow.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        raise TableError(f"column audio of {path} is {kind}, expected a struct with bytes: the files, compressed")
    return [None if value is None else value["bytes"] for value in arrow["audio"].to_pylist()]


def _text(arrow: pyarrow.Table, name: str, path: Path) -> np.ndarray:
    """[r] text: numbers and text, whichever the file has."""
    column = arrow[name]
    if column.null_count:
        raise TableError(f"column {name} of {path} is empty in {column.null_count} of {len(column)} rows; fill it")
    try:
        return np.array(column.cast(pyarrow.string()).to_pylist(), dtype=str)
    except pyarrow.ArrowNotImplementedError as e:
        raise TableError(f"column {name} of {path} is {column.type}, expected one text or number in each row") from e


def windows(samples: np.ndarray) -> np.ndarray:
    """[n] -> [w, 32000]: windows of 2 s, a new one every second, which together hold every sample.

    The last window ends with the recording, so it may overlap its neighbour by more than a second, and a recording of
    2 s or more is never padded. A shorter one gives one window, completed with zeros at its end.
    """
    last = max(len(samples) - CLIP_SAMPLES, 0)
    starts = [*range(0, last, HOP_SAMPLES), last]
    padded = np.pad(samples, (0, max(CLIP_SAMPLES - len(samples), 0)))
    return np.stack([padded[start : start + CLIP_SAMPLES] for start in starts])
