"""Rows of evaluation datasets in files: Parquet with a column of audio, CSV, folders of sounds.

in:   Parquet files as the hub has them, with or without `datasets`' schema; CSV and tab-separated text; sound files
out:  columns as text at once, without the audio; the audio one file at a time

pyarrow reads Parquet, not `datasets`, which would decode the audio with a library of its own and copies all of it.

r rows over all files, in the order of the files
"""

import csv
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow
from pyarrow import parquet

from hear_distill.tasks import DatasetError

BATCH_ROWS = 16  # of audio that are held at once; a row group's bytes are on top
EDGE_BYTES = 16 * 1024  # of a large file that its hash looks at, at either end: FSD50K has 34 GB of sound
NUMBERED = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.parquet")  # how `datasets` names the files of one split
SECONDS = re.compile(r"\d+(\.\d*)?([eE][+-]?\d+)?")
SOUNDS = (".wav", ".flac", ".ogg", ".mp3")


class ParquetRows:
    """The rows of some Parquet files as one table. Audio is read when it is asked for, a few rows at a time."""

    def __init__(self, files: Sequence[Path]) -> None:
        """Raises DatasetError: no Parquet, no column audio {bytes}, or one of a numbered set of files is missing."""
        assert files, "callers know where they looked"
        require_all_numbered(files)
        self.files = list(files)
        self.counts: list[int] = []
        names: set[str] | None = None
        for path in self.files:
            with opened(path) as file:
                schema = file.schema_arrow
                self.counts.append(file.metadata.num_rows)
            kind = schema.field("audio").type if "audio" in schema.names else None
            if kind is None or not pyarrow.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
                raise DatasetError(
                    f"{path} has no column audio with bytes in it; found {', '.join(schema.names)}"
                    + (f", audio as {kind}" if kind else "")
                )
            self.has_paths = kind.get_field_index("path") >= 0
            names = {*schema.names} if names is None else names & {*schema.names}
        self.names = names or set()

    def __len__(self) -> int:
        return sum(self.counts)

    def text(self, column: str) -> list[str]:
        """[r] stripped text, empty for null; numbers as text, a ClassLabel by name. Raises DatasetError if absent."""
        if column not in self.names:
            raise DatasetError(f"no column {column} in {self.files[0]}; found {', '.join(sorted(self.names))}")
        values: list[str] = []
        for path in self.files:
            with opened(path) as file:
                found = file.read(columns=[column])[column]
                classes = class_names(file.schema_arrow, column)
            if classes and pyarrow.types.is_integer(found.type):
                values += ["" if i is None or i < 0 else classes[i].strip() for i in found.to_pylist()]
                continue
            try:
                values += [(value or "").strip() for value in found.cast(pyarrow.string()).to_pylist()]
            except pyarrow.ArrowNotImplementedError as e:
                raise DatasetError(
                    f"column {column} of {path} is {found.type}, expected one text or number a row"
                ) from e
        return values

    def paths(self) -> list[str]:
        """[r] names of the sound files, empty where there is none."""
        if not self.has_paths:
            return [""] * len(self)
        found: list[str] = []
        for path in self.files:
            with opened(path) as file:
                structs = file.read(columns=["audio.path"])["audio"].to_pylist()
            found += [(struct or {}).get("path") or "" for struct in structs]
        return found

    def read(self, kept: np.ndarray) -> Iterator[tuple[list[int], bytes | None]]:
        """A Reader of the rows `kept`, [rows of the dataset] positions in these files, ascending."""
        row_of = {int(position): row for row, position in enumerate(kept)}
        position = 0
        for path in self.files:
            with opened(path) as file:
                for value in audio_bytes(file):
                    if position in row_of:
                        yield [row_of[position]], value
                    position += 1


def opened(path: Path) -> parquet.ParquetFile:
    """Raises DatasetError unless it is a Parquet file."""
    try:
        return parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as e:
        raise DatasetError(f"{path} cannot be read as Parquet ({e}); fetch it again, or name another file") from e


def audio_bytes(file: parquet.ParquetFile) -> Iterator[bytes | None]:
    """The sound of every row. One row group is held at a time: over several, iter_batches holds them all."""
    for group in range(file.num_row_groups):
        for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=["audio.bytes"]):
            for struct in batch.column("audio"):
                yield (struct.as_py() or {}).get("bytes") or None


def class_names(schema: pyarrow.Schema, column: str) -> list[str]:
    """The names that `datasets` stored for a column of class numbers; none for another column."""
    info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    feature = info.get("info", {}).get("features", {}).get(column)
    return feature["names"] if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" else []


def require_all_numbered(files: Iterable[Path]) -> None:
    """Raise DatasetError if one of train-00000-of-00009.parquet and so on is not there: a part looks like a whole."""
    found: dict[tuple[str, int], set[int]] = {}
    for path in files:
        if match := NUMBERED.fullmatch(path.name):
            found.setdefault((f"{path.parent}/{match[1]}", int(match[3])), set()).add(int(match[2]))
    for (name, number), present in found.items():
        if len(present) < number:
            raise DatasetError(f"{name}-*.parquet: found {len(present)} of {number} files; fetch the others")


def find_parquet(place: Path) -> list[Path]:
    """A file, or all of a folder, by name."""
    return [place] if place.is_file() else sorted(place.rglob("*.parquet"))


def find_files(folder: Path) -> dict[str, list[Path]]:
    """All files below a folder by lower-case name: the official archives are not of one mind about capitals."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            found.setdefault(path.name.lower(), []).append(path)
    return found


def find_one(files: Mapping[str, list[Path]], *names: str) -> Path | None:
    """The file of one of these names, the first name first. Raises DatasetError if there are two of one name."""
    for name in names:
        paths = files.get(name.lower(), [])
        if len(paths) > 1:
            raise DatasetError(f"{len(paths)} files {name}: {' and '.join(map(str, paths))}; keep one")
        if paths:
            return paths[0]
    return None


def sounds_in(files: Mapping[str, list[Path]]) -> dict[str, Path]:
    """Sound files by stem. Raises DatasetError if two have one stem."""
    paths = [path for group in files.values() for path in group if path.suffix.lower() in SOUNDS]
    stems = Counter(path.stem for path in paths)
    twice = [stem for stem, count in stems.items() if count > 1]
    if twice:
        raise DatasetError(f"{len(twice)} sound files are there twice, such as {twice[0]}; keep one of each")
    return {path.stem: path for path in paths}


def read_sounds(
    paths: Sequence[Path | None], rows: Sequence[Sequence[int]]
) -> Iterator[tuple[Sequence[int], bytes | None]]:
    """A Reader of sound files, each with the rows that are cut from it, if any; None for one that is missing."""
    for path, some in zip(paths, rows, strict=True):
        if some:
            yield some, None if path is None else path.read_bytes()


def read_text(path: Path) -> str:
    """Text in UTF-8, without its byte-order mark. Raises DatasetError if it is none."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise DatasetError(f"{path} is not text in UTF-8 ({e.reason} at byte {e.start}); fetch it again") from e


def read_fields(path: Path, num_fields: int) -> list[list[str]]:
    """Lines of fields between blanks or tabs, the first two of them seconds: begin and end. Empty lines are nothing."""
    rows = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        words = line.split()
        if words and not (len(words) == num_fields and all(SECONDS.fullmatch(word) for word in words[:2])):
            raise DatasetError(
                f"line {number} of {path} is {line!r}; expected {num_fields} fields, begin and end first"
            )
        rows += [words] if words else []
    return rows


def read_csv(path: Path, needed: Sequence[str]) -> list[dict[str, str]]:
    """Rows of a CSV file with a header, values stripped. Raises DatasetError naming the columns that are missing."""
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    found = [name.strip() for name in reader.fieldnames or []]
    missing = [name for name in needed if name not in found]
    if missing:
        raise DatasetError(f"{path} has no column {' or '.join(missing)}; found {', '.join(found) or 'nothing'}")
    return [{str(k).strip(): (v or "").strip() for k, v in row.items() if isinstance(v, str | None)} for row in reader]


def read_pairs(path: Path) -> dict[str, str]:
    """A file of two columns without a header, by tab, comma or blanks, as a dictionary."""
    pairs = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        words = re.split(r"[\t, ]+", line.strip())
        if words == [""]:
            continue
        if len(words) != 2:
            raise DatasetError(f"line {number} of {path} has {len(words)} words, expected two: {line!r}")
        pairs[words[0]] = words[1]
    return pairs


def revision_of(files: Iterable[Path]) -> str:
    """A hash over names, sizes and bytes of local files; of a large file only its two ends."""
    digest = hashlib.sha256()
    for path in sorted(files, key=lambda path: (path.name, str(path))):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode(errors="surrogateescape"))
        with path.open("rb") as file:
            digest.update(file.read(EDGE_BYTES))
            file.seek(max(EDGE_BYTES, size - EDGE_BYTES))
            digest.update(file.read(EDGE_BYTES))
    return "files:" + digest.hexdigest()[:16]


def counted(what: Counter[str]) -> str:
    """'etc 3, silence 1', the most frequent first."""
    return ", ".join(f"{name or '(blank)'} {count}" for name, count in what.most_common())
