"""Small sources, lakes and processes for the tests of the lake side. Nothing here needs torch.

out:  source tars of noise (every 2 s of it differs from every other), stages as subprocesses, what stands in a lake
      and what must be true of it

    from lake_tools import write_source, stream, clips_on_disk     # pytest puts tests/ on the path

n samples   c channels
"""

import hashlib
import io
import json
import os
import sqlite3
import subprocess
import sys
import tarfile
import threading
import time
import wave
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import wait
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
from reference.chunker import Clips

from hear_distill.data import Batch, Drawing, LakeReader
from hear_distill.files import write_json
from hear_distill.lake import Lake
from hear_distill.locks import Owner
from hear_distill.schema import Identity, Part
from hear_distill.shards import Clip, shard_bytes, write_shard

ROOT = Path(__file__).parent.parent
STREAMER = ROOT / "stream_laion_audio_clips.py"
TIMEOUT_S = 180.0  # of a hang; with ten other programs on two cores, a minute was too short once

# ---- sources ----


def noise(num_samples: int, *address: int) -> np.ndarray:
    """[n] int16, different for every address."""
    return np.random.default_rng(address).integers(-20_000, 20_000, num_samples, dtype=np.int16)


def encoded(samples: np.ndarray, rate: int = 16_000, file_format: str = "WAV", subtype: str | None = None) -> bytes:
    """[n] or [n, c] -> a file of that format."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=file_format, subtype=subtype)
    return buffer.getvalue()


def members_of(key: str, audio: bytes, suffix: str = "wav", **metadata: Any) -> list[tuple[str, bytes]]:
    """The two members of one recording, named as the dataset names them."""
    metadata = {"caption": f"sound of {key}", **metadata}
    return [(f"{key}.audio.{suffix}", audio), (f"{key}.metadata.json", json.dumps(metadata).encode())]


def tar_of(members: Iterable[tuple[str, bytes]], tar_format: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar of these (name, content), in this order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """The same, as a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_of(members))


def write_source(folder: Path, num_tars: int, recordings_per_tar: int, seed: int = 0) -> Path:
    """Tars `source-<i>.tar` of WAV recordings of 0.5 to 9 s at 16 kHz; two neighbours are segments of one video."""
    for number in range(num_tars):
        members = []
        for index in range(recordings_per_tar):
            num_samples = int(np.random.default_rng([seed, number, index]).integers(8_000, 144_000))
            audio = encoded(noise(num_samples, seed, number, index))
            title = f"video {number}-{index // 2}"
            members += members_of(f"rec-{number}-{index:03d}", audio, title=title, start_time_ms=15_000 * (index % 2))
        write_tar(folder / f"source-{number}.tar", members)
    return folder


# ---- lakes ----


def make_lake(root: Path, tars: dict[str, int] | None = None, cap_clips: int = 1_000, **identity: Any) -> Lake:
    """An empty lake with room for `cap_clips` clips in 100 files; `identity` overrides single fields of it."""
    fields = {
        **{"source": "somewhere", "revision": "r1", "seed": 7, "clip_samples": 32_000},
        **{"shard_clips": 10, "val_fraction": 0.1, "val_clips": 20, **identity},
    }
    limits = {
        "cap_bytes": shard_bytes(cap_clips) + 99 * shard_bytes(0),
        "reservation_bytes": shard_bytes(fields["shard_clips"]) + shard_bytes(0),
        "max_workers": 2,
    }
    return Lake.create(root, Identity(**fields), tars or {"a.tar": 100}, **limits)


def make_clips(num_clips: int, *address: int) -> list[Clip]:
    """Clips of noise, different for every address."""
    return [
        Clip("a.tar", f"key {address}", 32_000 * i, 2.0 * num_clips + 0.125, f"clip {i}", noise(32_000, *address, i))
        for i in range(num_clips)
    ]


def totals_in(ledger: Path) -> dict[str, int]:
    """The totals in the file of a ledger, or of its backup."""
    with closing(sqlite3.connect(ledger)) as db:
        return dict(db.execute("SELECT name, value FROM totals").fetchall())


def add_shard(lake: Lake, num_clips: int, split: str = "train", owner: str = "nobody") -> int:
    """Cut, write and publish a shard of noise as a worker would; returns its id."""
    shard_id = lake.begin_shard(owner, shard_bytes(num_clips), split)
    sha256 = write_shard(lake.path(shard_id, split, ".tar.part"), make_clips(num_clips, shard_id))
    lake.publish(shard_id, [Part(split, num_clips, shard_bytes(num_clips), sha256)], [], Counter())
    return shard_id


class FoundClip(NamedTuple):
    """A clip in a finished file of a lake, read with tarfile and wave."""

    folder: str
    """shards or val"""
    shard: str
    """name of the file"""
    info: dict[str, Any]
    """its JSON member"""
    samples: bytes
    """PCM16, 64,000 bytes"""

    @property
    def place(self) -> tuple[str, str, int]:
        """(tar, key, first sample): where it was cut."""
        return self.info["tar"], self.info["key"], self.info["start"]


def clips_on_disk(root: Path) -> list[FoundClip]:
    """Every clip of every finished file of a lake, whatever the ledger says of it."""
    found = []
    for folder in ("shards", "val"):
        for path in sorted((root / folder).glob("*.tar")):
            with tarfile.open(path) as tar:
                contents = [tar.extractfile(member).read() for member in tar]
            for wav, info in zip(contents[::2], contents[1::2], strict=True):
                with wave.open(io.BytesIO(wav)) as file:
                    samples = file.readframes(file.getnframes())
                found.append(FoundClip(folder, path.name, json.loads(info), samples))
    return found


def assert_exactly_once(found: list[FoundClip], expected: Clips) -> None:
    """The same clips, each once, and the same samples; an MP3 decoder may round a sample either way."""
    assert Counter(clip.place for clip in found) == Counter(expected.keys())
    for clip in found:
        difference = np.frombuffer(clip.samples, "<i2").astype(int) - np.frombuffer(expected[clip.place], "<i2")
        assert np.abs(difference).max() <= 1, clip.place


def assert_in_order(root: Path) -> Lake:
    """The books balance, ledger and folders agree, nobody holds anything. Returns the lake."""
    lake = Lake.open(root)
    assert lake.disagreements() == []
    assert lake.books().balance() == 0
    assert lake.used_bytes() <= lake.cap_bytes()
    states = lake.tar_states()
    assert states["free"] == states["waiting"] + states["open"], "a tar is held by somebody"
    assert [path.name for path in (root / "owners").iterdir()] == []
    return lake


class DiskWatch(threading.Thread):
    """Looks every 10 ms at how many bytes of audio a lake holds, finished or not, until it is told to stop."""

    def __init__(self, lake: Path) -> None:
        super().__init__(daemon=True)
        self.folders, self.highest, self.looks, self.is_done = (lake / "shards", lake / "val"), 0, 0, False

    def look(self) -> int:
        sizes: dict[int, int] = {}  # by inode: a file that is renamed during the look has two names in it
        for folder in self.folders:
            for entry in os.scandir(folder) if folder.exists() else ():
                try:
                    sizes[entry.inode()] = entry.stat().st_size
                except FileNotFoundError:
                    continue
        return sum(sizes.values())

    def run(self) -> None:
        while not self.is_done:
            # A look takes time, in which one file may go and another come: it counts if the next one sees as much.
            self.highest = max(self.highest, min(self.look(), self.look()))
            self.looks += 1
            time.sleep(0.01)

    def end(self) -> None:
        """Look no more."""
        self.is_done = True
        self.join()


# ---- readers ----


def filled_lake(root: Path, *sizes: int) -> Lake:
    """A lake whose source is finished, with train shards of so many clips, ids from 0."""
    lake = make_lake(root)
    lake.db.execute("UPDATE tars SET state = 'done'")
    for num_clips in sizes:
        add_shard(lake, num_clips)
    return lake


def batches_of(reader: LakeReader, count: int = 10_000) -> list[Batch]:
    """Up to `count` batches, each marked as trained; copies, as the reader fills its buffers again."""
    batches = []
    while len(batches) < count and (batch := reader.next_batch()) is not None:
        reader.mark_trained(batch.ids)
        batches.append(replace(batch, samples=batch.samples.copy()))
    return batches


def die(reader: LakeReader) -> None:
    """Drop the lock and do nothing more, as after a kill; nothing is given back."""
    wait(reader.ahead)
    reader.owner.file.close()


def ids_of(batches: list[Batch]) -> Counter[tuple[int, int]]:
    """How often each (shard, clip) was handed out."""
    return Counter(clip for batch in batches for clip in batch.ids)


# ---- processes ----


def environment(crash_at: str | None = None) -> dict[str, str]:
    """This process's environment, less what steers a stage, plus the point at which to crash."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HEAR_")}
    return clean | ({"HEAR_CRASH_AT": crash_at} if crash_at else {})


def stream_command(source: Path, lake: Path, *flags: object) -> list[str]:
    """The command line of the streamer."""
    return [sys.executable, str(STREAMER), "--source", str(source), "--lake", str(lake), *map(str, flags)]


def stream(source: Path, lake: Path, *flags: object, crash_at: str | None = None) -> "subprocess.CompletedProcess[str]":
    """Run the streamer to its end."""
    command = stream_command(source, lake, *flags)
    return run(command, crash_at=crash_at)


def run_python(code: str, *arguments: object, crash_at: str | None = None) -> "subprocess.CompletedProcess[str]":
    """Run Python code, which may import this file, in a process of its own."""
    return run([sys.executable, "-c", code, *map(str, arguments)], crash_at=crash_at)


def run(command: Sequence[str], crash_at: str | None = None) -> "subprocess.CompletedProcess[str]":
    """Run a command with tests/ as working folder; a hang is a failure, not a wait."""
    return subprocess.run(
        command,
        cwd=Path(__file__).parent,
        env=environment(crash_at),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def start_python(code: str, *arguments: object) -> "subprocess.Popen[str]":
    """Start Python code and return once it printed a line; it reads its standard input, for it to wait on."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=Path(__file__).parent,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    process.stdout.readline()
    return process


# ---- a trainer ----


def play_trainer(root: Path, out: Path, batch_size: int, reuse_batches: int = 0) -> None:
    """A trainer without a model, until the lake is drained: it writes down the hash of each clip that it was given.

    With `reuse_batches` it uses shards again, and stops after so many batches in all.

    <out>/latest.json holds that history and the state of the reader, replaced whole every second batch; previous.json
    is the one before it, taken up if latest.json is damaged.
    """
    lake, owner, saved = Lake.open(root), Owner(root, "train"), newest_checkpoint(out)
    history, state = (saved["history"], saved["reader"]) if saved else ([], None)

    def save(reader: LakeReader) -> None:
        if (last := read_checkpoint(out / "latest.json")) is not None:
            write_checkpoint(out / "previous.json", last)
        write_checkpoint(out / "latest.json", {"history": history, "reader": reader.state()})
        reader.record_checkpoint()

    for size in (batch_size,) if reuse_batches else (batch_size, 1):  # then the remainder
        drawing = Drawing(run="toy", seed=3, num_open=3, batch_size=size, reuse=reuse_batches > 0)
        reader = LakeReader(lake, owner, drawing, state)
        while not (reuse_batches and reader.num_batches >= reuse_batches):
            batch = reader.next_batch()
            if batch is None and reader.is_drained():
                break
            if batch is None:
                time.sleep(0.02)
                continue
            reader.mark_trained(batch.ids)
            history += [hash_of(samples.tobytes()) for samples in batch.samples]
            if reader.num_batches % 2 == 0:
                save(reader)
        for _ in range(2):
            save(reader)
        state = reader.state()
        reader.close()


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """As JSON, whole or absent."""
    coverage = {shard_id: covered.hex() for shard_id, covered in state["reader"]["coverage"].items()}
    write_json(path, {**state, "reader": {**state["reader"], "coverage": coverage}})  # numbers become text as keys


def read_checkpoint(path: Path) -> dict[str, Any] | None:
    """What `write_checkpoint` wrote; None if it is not there or damaged."""
    try:
        state = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    coverage = {int(shard_id): bytes.fromhex(covered) for shard_id, covered in state["reader"]["coverage"].items()}
    uses = {int(shard_id): count for shard_id, count in state["reader"]["uses"].items()}
    return {**state, "reader": {**state["reader"], "coverage": coverage, "uses": uses}}


def newest_checkpoint(out: Path) -> dict[str, Any] | None:
    """The one that survives."""
    return read_checkpoint(out / "latest.json") or read_checkpoint(out / "previous.json")


def hash_of(samples: bytes) -> str:
    """Names a clip by its sound."""
    return hashlib.blake2b(samples, digest_size=8).hexdigest()


PLAY_TRAINER = """
import sys
from pathlib import Path
from lake_tools import play_trainer
play_trainer(Path(sys.argv[1]), Path(sys.argv[2]), 5, *map(int, sys.argv[3:]))
"""
