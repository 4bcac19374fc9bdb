"""Embed the recordings of a folder: one row for each window of 2 s.

in:   FOLDER with sound files at any depth (WAV, FLAC, MP3, OGG, Opus, AIFF); a student: checkpoint, release or hub id
out:  <out>, Parquet with path (below FOLDER), start_s, embedding (list of float32); <out>.parts/ until it is done
cost: a second for each 10 windows on one thread of a busy CPU (the published ViT-S, 60 recordings of ESC-10 in 34 s),
      0.8 GiB of memory, and 1.5 kB a row; on a GPU not measured

    python embed_audio.py RECORDINGS --model runs/hear-vit-s/best.pt --out embeddings.parquet
    python embed_audio.py demo                          # the demo's student on synthetic sounds, after `make demo`

The same command again goes on where a killed one stopped, and later adds what is new in the folder, does again what
has changed, and drops what is gone. An unreadable file is named, counted, and tried again the next time; the exit code
is then 1. It needs the base installation only: pip install . without an extra.

n samples at 16 kHz   w windows of a recording   B windows in a batch   D width of an embedding
"""

import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow
import torch
from pyarrow import compute, parquet
from tqdm import tqdm
from tyro.conf import Positional

from hear_distill import checkpoint, cli, demo, frontend
from hear_distill.audio import CLIP_SAMPLES, SAMPLE_RATE, DecodeError, decode_blocks
from hear_distill.files import GIB, UserError, atomic_write, is_disk_full, make_folder
from hear_distill.frontend import MelPcen
from hear_distill.locks import alone
from hear_distill.student import Student


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of this stage."""

    folder: Positional[Path] = Path("recordings")
    """where the recordings are, at any depth"""
    model: str = "runs/hear-vit-s/best.pt"
    """checkpoint of the trainer, folder of export_student.py, or id on the hub"""
    out: Path = Path("embeddings.parquet")
    """table to write; one that this command wrote from the same folder and model is brought up to date"""
    hop_s: float = 1.0
    """seconds from one window to the next, at most 2, so that no sound is left out"""
    batch_size: int = 16
    """windows in one forward"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where the student runs"""

    def __post_init__(self) -> None:
        if not 1 <= round(self.hop_s * SAMPLE_RATE) <= CLIP_SAMPLES:
            raise ValueError(f"--hop-s must be above 0 and at most {CLIP_SAMPLES // SAMPLE_RATE}, got {self.hop_s}")
        if self.batch_size < 1:
            raise ValueError(f"--batch-size must be at least 1, got {self.batch_size}")


PRESETS = {
    "embed": Config(),
    "demo": Config(
        folder=demo.RECORDINGS, model=str(demo.DEMO / "run" / checkpoint.BEST), out=demo.DEMO / "embeddings.parquet"
    ),
}
SOUNDS = {".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aif", ".aiff", ".aifc", ".au", ".caf", ".w64"}
# Sound that libsndfile does not know. Phones record it: it is tried and named, not left out without a word.
FOREIGN = {".m4a", ".mp4", ".aac", ".amr", ".3gp", ".wma", ".webm", ".mka"}
MAX_FILE_BYTES = 4 * GIB  # one file is held in memory; WAV ends here, too
CONVERT = "ffmpeg -i FILE FILE.flac converts most of what is no WAV, FLAC, MP3, OGG, Opus or AIFF"
PART_WINDOWS = 512  # in whole recordings, that a kill can take: a minute of work on one core
PROGRESS_S = {True: 0.5, False: 60.0}  # by whether somebody watches
PARTS = ".parts"
FOOTER = b"hear_distill"  # key of the table's metadata
SCHEMA = pyarrow.schema(
    [("path", pyarrow.string()), ("start_s", pyarrow.float64()), ("embedding", pyarrow.list_(pyarrow.float32()))]
)


class File(NamedTuple):
    """A sound file as it was found."""

    path: str
    """below the folder, with slashes, as the system wants it"""
    stamp: tuple[int, int]
    """bytes, and when it was changed in ns: a file that has another stamp is another recording"""

    @property
    def name(self) -> str:
        """`path` as text for the table, where a byte that is no UTF-8 is spelled out."""
        return os.fsencode(self.path).decode(errors="backslashreplace")


@dataclass
class Recording:
    """What is known of a file while its windows are on their way through the student."""

    file: File
    starts_s: list[float] = field(default_factory=list)
    embeddings: list[np.ndarray] = field(default_factory=list)
    """[D] each, in the order of the windows"""


Embed = Callable[[Sequence[np.ndarray]], np.ndarray]  # B windows [32000] int16 -> [B, D] float32


def sound_files(folder: Path) -> tuple[list[File], Counter[str]]:
    """The sound files below `folder`, sorted by folder and name, and how many others were left alone, by ending.

    Names that begin with a dot are left alone, too: on a stick, macOS puts a `._cough.wav` beside each cough.wav.
    Raises UserError: no such folder, a part of it cannot be listed, or no sound in it.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; say python embed_audio.py FOLDER --model CHECKPOINT --out TABLE.parquet")
    files, others = [], Counter()

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be listed ({error.strerror}); make it readable or move it away")

    for here, folders, names in os.walk(folder, onerror=refuse):
        others["link to a folder"] += sum(os.path.islink(os.path.join(here, name)) for name in folders)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path, suffix = Path(here, name), Path(name).suffix.lower()
            status = path.stat() if path.exists() else path.lstat()  # a link to nothing fails where it is read
            if name.startswith("."):
                others["with a dot first"] += 1
            elif suffix not in SOUNDS | FOREIGN or not (path.is_file() or path.is_symlink()):
                others[suffix or "without an ending"] += 1
            else:
                files.append(File(path.relative_to(folder).as_posix(), (status.st_size, status.st_mtime_ns)))
    others = +others
    if not files:
        raise UserError(
            f"no sound in {folder}: found {listed(others) or 'nothing'}, expected {' '.join(sorted(SOUNDS))}"
        )
    return files, others


def listed(counts: Counter[str]) -> str:
    """'2 .txt, 1 .csv'"""
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())


def load_embed(config: Config) -> tuple[Embed, dict[str, Any]]:
    """The student as a function, and the identity of a table: whatever decides its numbers, and of what folder."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch finds no GPU here; use --device cpu")
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # convolutions alone default to TF32, which is not float32
    student = Student.from_pretrained(config.model)
    identity = {
        "folder": str(config.folder.resolve()),
        "model": checkpoint.digest(dict(student.state_dict())),
        "front_end": frontend.VERSION,
        "hop_s": config.hop_s,
    }
    return embedder(student.to(config.device), config.device), identity


def embedder(student: Student, device: str) -> Embed:
    """Windows in, trunk embeddings out."""
    front_end = MelPcen().to(device)

    @torch.inference_mode()
    def embed(windows: Sequence[np.ndarray]) -> np.ndarray:
        audio = torch.from_numpy(np.stack(windows)).to(device).float()  # [B, 32000]; each is normalised: no scaling
        return student(front_end(audio)).cpu().numpy()  # [B, D]

    return embed


def windows_in(blocks: Iterable[np.ndarray], hop: int) -> Iterator[tuple[int, np.ndarray]]:
    """Blocks [n] int16 of a recording -> (start, window [32000]): one every `hop` samples, the last flush with the end.

    The windows are those of the evaluation if `hop` is 1 s. They hold every sample; a recording of less than 2 s gives
    one, completed with zeros at its end. Held are a block and two windows, however long the recording is.
    """
    held, first, start = np.zeros(0, np.int16), 0, 0  # `first` is where `held` begins in the recording
    for block in blocks:
        held = np.concatenate([held, block])
        while first + len(held) > start + CLIP_SAMPLES:
            yield start, held[start - first : start - first + CLIP_SAMPLES]
            start += hop
        keep = max(first, start - hop)  # the last window may begin anywhere behind the one before
        held, first = held[keep - first :], keep
    last = max(first + len(held) - CLIP_SAMPLES, 0)
    tail = held[last - first :]
    yield last, np.pad(tail, (0, CLIP_SAMPLES - len(tail)))


def read_bytes(path: Path) -> bytes:
    """A whole file. Raises DecodeError where it cannot be had."""
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise DecodeError("too large", f"{size / GIB:.1f} GiB, at most {MAX_FILE_BYTES // GIB}; cut it into pieces")
        return path.read_bytes()
    except OSError as e:
        raise DecodeError("cannot be read", e.strerror) from e


def parts_of(config: Config, files: Sequence[File], embed: Embed, failed: Counter[str]) -> Iterator[list[Recording]]:
    """All files that can be read, with their embeddings, some at a time. The others are named and counted by reason.

    Windows of several files share a batch. A file is embedded to its end or not at all.
    """
    hop = round(config.hop_s * SAMPLE_RATE)
    part: list[Recording] = []
    waiting: list[tuple[Recording, np.ndarray]] = []
    with tqdm(
        total=sum(file.stamp[0] for file in files),
        unit="B",
        disable=not files,
        unit_scale=True,
        mininterval=PROGRESS_S[sys.stderr.isatty()],
    ) as progress:
        for number, file in enumerate(files, start=1):
            recording = Recording(file)
            try:
                for start, window in windows_in(decode_blocks(read_bytes(config.folder / file.path)), hop):
                    recording.starts_s.append(start / SAMPLE_RATE)
                    waiting.append((recording, window))
                    if len(waiting) == config.batch_size:
                        embed_waiting(waiting, embed)
                part.append(recording)
            except DecodeError as e:
                failed[e.reason] += 1
                tqdm.write(f"unreadable: {file.name}: {e}", file=sys.stderr)
            progress.set_postfix_str(f"{number}/{len(files)} files, {failed.total()} unreadable", refresh=False)
            progress.update(file.stamp[0])
            if sum(len(recording.starts_s) for recording in part) >= PART_WINDOWS:
                embed_waiting(waiting, embed)
                yield part
                part = []
        embed_waiting(waiting, embed)
        if part:
            yield part


def embed_waiting(waiting: list[tuple[Recording, np.ndarray]], embed: Embed) -> None:
    """Hand every waiting window to the student, and what comes out to its recording. None waits afterwards."""
    if waiting:
        embeddings = embed([window for _, window in waiting])  # [B, D]
        for (recording, _), embedding in zip(waiting, embeddings, strict=True):
            recording.embeddings.append(embedding)
    waiting.clear()


def write_part(path: Path, identity: dict[str, Any], part: Sequence[Recording]) -> None:
    """A table of these recordings, whole or absent. Its footer says which files it knows, and of what model."""
    embeddings = np.stack([embedding for recording in part for embedding in recording.embeddings])  # [rows, D]
    offsets = pyarrow.array(np.arange(len(embeddings) + 1, dtype=np.int32) * embeddings.shape[1])
    columns = {
        "path": pyarrow.array([recording.file.name for recording in part for _ in recording.starts_s]),
        "start_s": pyarrow.array([start_s for recording in part for start_s in recording.starts_s], pyarrow.float64()),
        "embedding": pyarrow.ListArray.from_arrays(offsets, pyarrow.array(embeddings.ravel(), pyarrow.float32())),
    }
    write_table(
        path, identity, {recording.file.name: recording.file.stamp for recording in part}, [pyarrow.table(columns)]
    )


def write_table(path: Path, identity: dict[str, Any], stamps: dict[str, Any], tables: Iterable[pyarrow.Table]) -> None:
    """Write the rows of all tables, with the footer, as one file that is whole or absent."""
    footer = {FOOTER: json.dumps({"identity": identity, "files": stamps}).encode()}
    schema = SCHEMA.with_metadata(footer)
    with atomic_write(path) as f, parquet.ParquetWriter(f, schema, use_dictionary=["path"]) as writer:
        for table in tables:
            writer.write_table(table.cast(schema))


def stamps_in(path: Path, identity: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """The files whose rows a table holds. Raises UserError: not a table of this command, or one of something else."""
    other = f"name another --out, or delete {path.parent if path.parent.suffix == PARTS else path}"
    try:
        footer = (parquet.read_schema(path).metadata or {}).get(FOOTER)
    except (pyarrow.ArrowException, OSError) as e:
        raise UserError(f"{path} is there and is no table of this command ({e}); {other}") from e
    if footer is None:
        raise UserError(f"{path} is there and is no table of this command; {other}")
    found = json.loads(footer)
    for name, value in identity.items():
        if found["identity"].get(name) != value:
            raise UserError(
                f"{path} is of another {name}: {found['identity'].get(name)!s:.60}, not {value!s:.60}; {other}"
            )
    return {name: tuple(stamp) for name, stamp in found["files"].items()}


def usable_rows(sources: Sequence[Path], identity: dict[str, Any], files: Sequence[File]) -> dict[Path, dict[str, Any]]:
    """Of each source, the files that are as they were when it was written. A file is taken from one source only."""
    stamps, taken = {file.name: file.stamp for file in files}, set()
    usable: dict[Path, dict[str, Any]] = {}
    for path in sources:
        usable[path] = {
            name: stamp
            for name, stamp in stamps_in(path, identity).items()
            if stamps.get(name) == stamp and name not in taken
        }
        taken |= usable[path].keys()
    return usable


def rows_of(usable: dict[Path, dict[str, Any]]) -> Iterator[pyarrow.Table]:
    """The rows of the files of each source, a row group at a time."""
    for path, stamps in usable.items():
        names = pyarrow.array(list(stamps), pyarrow.string())
        with parquet.ParquetFile(path) as source:
            for group in range(source.num_row_groups):
                table = source.read_row_group(group)
                kept = table.filter(compute.is_in(table["path"], value_set=names))
                if len(kept) > 0:
                    yield kept


def parts_folder(out: Path) -> Path:
    """Where the rows are until the table is written."""
    return out.with_name(out.name + PARTS)


def prepare(config: Config) -> tuple[list[File], Embed, dict[str, Any]]:
    """Everything that can be wrong before the first recording is read. Raises UserError; nothing is written by then.

    Returns the files, the student, and the identity of the table.
    """
    if config.out.is_dir():
        raise UserError(f"--out {config.out} is a folder; name a file, such as {config.out / 'embeddings.parquet'}")
    demo.prepare(config.folder)
    files, others = sound_files(config.folder)
    embed, identity = load_embed(config)
    if config.out.exists():
        stamps_in(config.out, identity)
    try:
        make_folder(parts_folder(config.out))
    except OSError as e:
        if is_disk_full(e):
            raise
        raise UserError(f"nothing can be written beside {config.out} ({e.strerror}); name another place: --out") from e
    if others:
        print(f"left alone in {config.folder}: {listed(others)}")
    return files, embed, identity


def merge(out: Path, identity: dict[str, Any], usable: dict[Path, dict[str, Any]]) -> None:
    """All usable rows into `out`, unless it is all of them. Raises UserError if there are none."""
    stamps = {name: stamp for of_source in usable.values() for name, stamp in of_source.items()}
    if not stamps:
        raise UserError(f"no file could be read, so {out} is left as it is; {CONVERT}")
    if not out.exists() or stamps != stamps_in(out, identity):
        write_table(out, identity, stamps, rows_of(usable))
    print(f"{out}: {parquet.read_metadata(out).num_rows} windows of {len(stamps)} recordings")


def main(config: Config) -> int:
    files, embed, identity = prepare(config)
    parts, failed = parts_folder(config.out), Counter()
    with alone(parts / "lock", f"another process is writing {config.out}; wait for it, or name another --out"):
        sources = [config.out] * config.out.exists() + sorted(parts.glob("*.parquet"))
        done = {name for stamps in usable_rows(sources, identity, files).values() for name in stamps}
        todo = [file for file in files if file.name not in done]
        print(f"{len(files)} recordings in {config.folder}, {len(done)} of them embedded before")

        first = 1 + max((int(path.stem) for path in parts.glob("*.parquet")), default=-1)
        for number, part in enumerate(parts_of(config, todo, embed, failed), start=first):
            sources.append(parts / f"{number:06d}.parquet")
            write_part(sources[-1], identity, part)
        if failed:
            print(f"unreadable: {listed(failed)}", file=sys.stderr)
        merge(config.out, identity, usable_rows(sources, identity, files))
        shutil.rmtree(parts)
    return 1 if failed else 0


if __name__ == "__main__":
    cli.run(main, PRESETS, __doc__)
