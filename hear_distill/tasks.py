"""Labelled tables for evaluation, and the windows that a recording is cut into before it is embedded.

in:   a Parquet file with columns audio {bytes, path}, label, group and perhaps fold
out:  Table: every row's compressed audio, label and group; no group is in two folds

n samples at 16 kHz   w windows   r rows
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
from pyarrow import parquet

from hear_distill.audio import CLIP_SAMPLES, SAMPLE_RATE
from hear_distill.files import UserError

HOP_SAMPLES = SAMPLE_RATE  # 1 s: neighbouring windows share half of their sound
LAYOUT = "expected columns audio {bytes, path}, label, group and perhaps fold"


class TableError(UserError):
    """A table that cannot be evaluated as it is."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Recordings with one label each.

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
