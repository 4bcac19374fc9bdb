"""What an evaluation dataset is: recordings, groups, tasks, prescribed splits.

in:   what a loader (fsd50k, flusense, coswara, icbhi, circor, eval_datasets) found in files
out:  Dataset: labels and groups at once, sounds one by one; no group is on both sides of a split

n samples at 16 kHz   r rows, each of which is one example   f files
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from scipy import signal

from hear_distill.audio import SAMPLE_RATE, DecodeError, decode, to_int16
from hear_distill.files import UserError

LAYOUT = "expected columns audio {bytes, path}, label, group and perhaps fold"
TRAIN, TEST, NEITHER = "train", "test", ""  # parts of a holdout
GROUPED = "grouped"  # the split that nobody prescribes: folds over groups, dealt by whoever probes
FILTER_ORDER = 4  # of the Butterworth band-pass; run forwards and backwards, which doubles it and shifts nothing
NO_AUDIO = "no audio"
COPY = "copy of a sound in another group"

Reader = Callable[[], Iterator[tuple[Sequence[int], bytes | None]]]
"""One file after the other, [f]: the rows that are cut from it, and its compressed bytes; None where it is missing"""


class DatasetError(UserError):
    """A dataset that cannot be had, or cannot be evaluated as it is."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One question about each row."""

    kind: Literal["binary", "multiclass", "regression"]
    labels: np.ndarray
    """[r] bool, text or float; anything where the row does not take part"""
    takes_part: np.ndarray
    """[r] bool: the row has an answer"""


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
    split_names: tuple[str, ...] = (GROUPED,)
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
    """what is wrong with the input, by task or by label: the exit code is to tell. Such tasks are not in `tasks`; what
    has too few groups is found where it is measured"""

    def __post_init__(self) -> None:
        if len(self.groups) == 0:
            raise DatasetError(f"{self.name} has no rows that can be used; {'; '.join(self.notes) or self.title}")
        columns = [*(task.labels for task in self.tasks.values()), *(task.takes_part for task in self.tasks.values())]
        columns += [split.parts for split in self.splits.values()] + ([] if self.spans_s is None else [self.spans_s])
        assert all(len(column) == len(self.groups) for column in columns), "columns of different lengths"
        assert {*self.split_names} <= {GROUPED, *self.splits}
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
    return {title: Task(kind="binary", labels=labels == label, takes_part=takes_part) for title, label in names.items()}


def labels_of(dataset: Dataset) -> np.ndarray:
    """[r] text: what `one_against_the_rest` made the tasks of."""
    labels = np.empty(len(dataset.groups), dtype=object)
    for title, task in dataset.tasks.items():
        labels[task.labels] = title
    return labels.astype(str)
