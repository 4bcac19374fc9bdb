"""Cut the recordings of a source into 2 s clips, in shards, in the lake.

in:   tars of a source (--source, a folder of WebDataset tars)
out:  <lake>/shards/*.tar, <lake>/val/*.tar, and the ledger that knows them; any number of these run side by side
cost: one core each; memory and clips per second not measured yet

    python stream_laion_audio_clips.py --source DIR --lake lake     # until the source ends or the lake is full
    python stream_laion_audio_clips.py demo                          # synthetic recordings into demo/lake

Killed at any moment and started again, it leaves every clip of the source in exactly one finished shard.
"""

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from hear_distill import cli, demo
from hear_distill.audio import CLIP_SAMPLES, SAMPLE_RATE, DecodeError, clip_starts, decode
from hear_distill.files import GIB, UserError, gib
from hear_distill.lake import Lake, LakeFull
from hear_distill.locks import Owner
from hear_distill.runlog import Heartbeat, StopRequest
from hear_distill.schema import ANCHOR, RECENT, TRAIN, Cursor, Identity, Part
from hear_distill.shards import Clip, shard_bytes, write_shard
from hear_distill.sources import FolderSource, Recording, Tar, TarBroken, read_recordings


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of the streamer. A lake keeps its first source, seed, shard size and validation; others are refused."""

    source: str = "laion/LAION-Audio-300M"
    """folder of WebDataset tars"""
    lake: Path = Path("lake")
    """folder of the lake; made if it is not there, joined if it is the same one"""
    cap_gb: float = 60.0
    """hard limit, in GiB, on all shards of the lake together"""
    shard_clips: int = 1000
    """clips in a full shard, train and validation part together"""
    open_tars: int = 8
    """tars that this worker reads side by side and mixes"""
    val_fraction: float = 0.002
    """share of the recordings held out as `recent` validation"""
    val_clips: int = 2048
    """size of each of the two validation sets, `anchor` and `recent`"""
    max_workers: int = 1
    """how many of these may run side by side; the trainer refuses a cap without room for a shard of each"""
    seed: int = 0
    """of the order of the tars, the split and the mixing"""

    def __post_init__(self) -> None:
        if min(self.shard_clips, self.open_tars) < 1 or self.val_clips < 0:
            raise ValueError("--shard-clips and --open-tars must be at least 1, --val-clips at least 0")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"--val-fraction must be in [0, 1), got {self.val_fraction}")
        if self.val_fraction and not self.val_clips:
            raise ValueError(f"--val-fraction {self.val_fraction} needs --val-clips above 0")


PRESETS = {
    "laion": Config(),
    "demo": Config(
        source=str(demo.SOURCE), lake=demo.DEMO / "lake", cap_gb=0.09, shard_clips=64, val_fraction=0.03, val_clips=64
    ),
}
ANCHOR_TARS = 64  # heads of this many tars, spread by the permutation, make up the anchor validation
ANCHOR_WAIT_S = 1.0
BROKEN_LIMIT = 100  # unreadable recordings among the first 200 that stop a worker: the source is not what it should be
BROKEN_WINDOW = 200
UNREADABLE = ("undecodable", "empty", "not finite", "no audio member", "oversized member", "bad JSON")


class SourceBroken(UserError):
    """Too much of the source cannot be read: going on would train on the rest as if nothing had happened."""


@dataclass
class Reader:
    """One open tar of this worker: where it stands, and the recording that a full shard may have cut in two."""

    cursor: Cursor
    recordings: Iterator[Recording]
    recording: Recording | None = None
    samples: np.ndarray = field(default_factory=lambda: np.empty(0, np.int16))
    """[n] int16 of `recording`"""


@dataclass
class Draft:
    """A shard in the making. The clips are held in memory, 64 kB each, so that they can be permuted before writing."""

    clips: dict[str, list[Clip]] = field(default_factory=lambda: {TRAIN: [], ANCHOR: [], RECENT: []})
    counts: Counter[str] = field(default_factory=Counter)
    cursors: dict[int, Cursor] = field(default_factory=dict)
    groups: set[str] = field(default_factory=set)
    """what `clips` belong to; kept for the anchor only"""

    def num_clips(self) -> int:
        """Clips of all parts together."""
        return sum(map(len, self.clips.values()))


def group_of(recording: Recording) -> str:
    """What must stay on one side of the split: the video, where the metadata says that this is a segment of one."""
    is_segment = "start_time_ms" in recording.metadata and recording.metadata.get("title")
    return str(recording.metadata["title"]) if is_segment else recording.key


def split_of(group: str, seed: int, val_fraction: float) -> str:
    """`recent` or `train` for every clip of a group, forever: clips of one recording overlap, any finer split leaks."""
    digest = hashlib.blake2b(f"{seed}\0{group}".encode(errors="surrogatepass"), digest_size=8).digest()
    return RECENT if int.from_bytes(digest, "big") / 2**64 < val_fraction else TRAIN


def next_recording(reader: Reader, counts: Counter[str]) -> bool:
    """Move to the next recording, or count why it is passed over. False when the tar has no more."""
    recording = next(reader.recordings, None)
    if recording is None:
        return False
    counts["recordings"] += reader.cursor.next_clip == 0  # else it was counted when its first clips were cut
    problem = recording.problem
    if problem is None:
        try:
            reader.samples = decode(recording.audio)
            problem = "shorter than a clip" if len(reader.samples) < CLIP_SAMPLES else None
        except DecodeError as e:
            problem = e.reason
    if problem is None:
        reader.recording = recording
        reader.cursor = replace(reader.cursor, offset=recording.offset)
    else:
        counts[f"skipped: {problem}"] += 1
        reader.cursor = replace(reader.cursor, offset=recording.end, next_clip=0)
    return True


def cut(reader: Reader, draft: Draft, split: str, room: int) -> None:
    """Move up to `room` clips of the reader's recording into the draft, and the cursor behind the last of them."""
    recording, first = reader.recording, reader.cursor.next_clip
    starts = clip_starts(len(reader.samples))
    draft.clips[split] += [
        Clip(
            tar=reader.cursor.name,
            key=recording.key,
            start=start,
            source_s=len(reader.samples) / SAMPLE_RATE,
            caption=str(recording.metadata.get("caption") or ""),
            samples=reader.samples[start : start + CLIP_SAMPLES].copy(),  # a view would keep the whole recording
        )
        for start in starts[first : first + room]
    ]
    if first + room < len(starts):
        reader.cursor = replace(reader.cursor, next_clip=first + room)
    else:
        reader.cursor = replace(reader.cursor, offset=recording.end, next_clip=0)
        reader.recording = None


def advance(reader: Reader, draft: Draft, room: int, split: Callable[[str], str]) -> bool:
    """Cut one recording, or what fits of it, into the draft. False when the reader's tar is done or broken.

    Args:
        split: from the recording's group to the part that its clips belong to.
    """
    try:
        has_more = reader.recording is not None or next_recording(reader, draft.counts)
    except TarBroken as e:
        draft.counts["broken tars"] += 1
        print(f"{reader.cursor.name} is broken: {e}", file=sys.stderr)
        reader.cursor = replace(reader.cursor, state="broken", problem=str(e))
        has_more = False
    if reader.recording is not None:
        group = group_of(reader.recording)
        draft.groups.add(group)
        cut(reader, draft, split(group), room)
    elif not has_more and reader.cursor.state == "open":
        reader.cursor = replace(reader.cursor, state="done", offset=reader.cursor.num_bytes, next_clip=0)
    draft.cursors[reader.cursor.position] = reader.cursor
    return has_more


class Worker:
    """Reads tars, mixes their recordings and fills one shard after another."""

    def __init__(self, config: Config, source: FolderSource, lake: Lake, owner: Owner, stop: StopRequest) -> None:
        self.config, self.source, self.lake, self.owner, self.stop = config, source, lake, owner, stop
        self.readers: list[Reader] = []
        self.counts: Counter[str] = Counter()
        self.num_waits = 0
        self.heartbeat = Heartbeat(lake.root / "heartbeats" / f"stream-{os.getpid()}.json", "stream")
        self.progress = tqdm(unit="clip", desc=owner.id, disable=None)  # None: only on a terminal

    def open_tars(self, count: int) -> None:
        """Take cursors until `count` tars are open, or no more are free."""
        if len(self.readers) >= count:
            return
        for cursor in self.lake.take_tars(self.owner.id, count - len(self.readers)):
            self.readers.append(Reader(cursor, self._read(cursor)))

    def _read(self, cursor: Cursor) -> Iterator[Recording]:
        """The recordings from the cursor on; the tar is opened when the first of them is asked for."""
        tar = Tar(cursor.name, cursor.num_bytes)
        with self.source.open(tar, cursor.offset) as stream:
            yield from read_recordings(stream, tar, cursor.offset)

    def fill(self, shard_id: int) -> Draft:
        """Draw recordings from the open tars at random until the shard is full, the tars are done, or a stop."""
        draft, rng = Draft(), np.random.default_rng([self.config.seed, shard_id])
        anchor_groups = self.lake.anchor_groups()

        def split(group: str) -> str:
            return RECENT if group in anchor_groups else split_of(group, self.config.seed, self.config.val_fraction)

        self.open_tars(self.config.open_tars)
        while self.readers and (room := self.config.shard_clips - draft.num_clips()) > 0 and not self.stop:
            chosen = int(rng.integers(len(self.readers)))
            if not self.advance(self.readers[chosen], draft, room, split):
                self.readers.pop(chosen)
                self.open_tars(self.config.open_tars)
        return draft

    def fill_anchor(self) -> Draft:
        """Take the heads of many tars, an equal share of clips from each, all for the anchor validation."""
        draft = Draft()
        self.open_tars(ANCHOR_TARS)
        share = -(-self.config.val_clips // max(1, len(self.readers)))
        for reader in self.readers:
            target = min(self.config.val_clips, draft.num_clips() + share)
            while (room := target - draft.num_clips()) > 0 and not self.stop:
                if not self.advance(reader, draft, room, lambda group: ANCHOR):
                    break
        self.readers.clear()  # other workers may take these tars as soon as the cursors are published
        return draft

    def advance(self, reader: Reader, draft: Draft, room: int, split: Callable[[str], str]) -> bool:
        """`advance`, and after each recording a look at how it goes."""
        has_more = advance(reader, draft, room, split)
        self.check_source(draft.counts)
        self.heartbeat.beat(self.counts["recordings"] + draft.counts["recordings"], clips=self.counts["cut"])
        return has_more

    def check_source(self, counts: Counter[str]) -> None:
        """Raise SourceBroken if most of the first recordings that this worker saw could not be read."""
        seen = self.counts + counts
        num_broken = sum(seen[f"skipped: {reason}"] for reason in UNREADABLE)
        if seen["recordings"] <= BROKEN_WINDOW and num_broken > BROKEN_LIMIT:
            raise SourceBroken(
                f"{num_broken} of the first {seen['recordings']} recordings of {self.config.source} cannot be read: "
                f"{report(seen)}; look at the source, nothing was written from them"
            )

    def write(self, shard_id: int, draft: Draft, anchor_groups: Iterable[str]) -> None:
        """Permute the clips, write the parts and publish them with the cursors."""
        rng, parts = np.random.default_rng([self.config.seed, shard_id, 1]), []
        for split, clips in draft.clips.items():
            if clips:
                order = rng.permutation(len(clips))
                sha256 = write_shard(self.lake.path(shard_id, split, ".tar.part"), [clips[i] for i in order])
                parts.append(Part(split, len(clips), shard_bytes(len(clips)), sha256))
        self.lake.publish(shard_id, parts, list(draft.cursors.values()), draft.counts, anchor_groups)
        self.lake.retire_recent(self.config.val_clips)
        self.counts += draft.counts + Counter(cut=draft.num_clips())
        self.progress.update(draft.num_clips())
        if self.progress.disable:
            print(f"{self.owner.id}: shard {shard_id}, {draft.num_clips()} clips; {report(self.counts)}")
        self.heartbeat.beat(self.counts["recordings"], force=True, clips=self.counts["cut"])

    def one_shard(self, is_anchor: bool) -> bool:
        """Reserve, fill and publish one shard. False if there is nothing left for this worker, or it was stopped."""
        num_clips = self.config.val_clips if is_anchor else self.config.shard_clips
        split = ANCHOR if is_anchor else TRAIN
        shard_id = self.lake.begin_shard(self.owner.id, reservation_bytes(num_clips), split)
        if shard_id is None:  # another worker cuts the anchor; until it is known, any clip might belong to it
            self.stop.wait(ANCHOR_WAIT_S)
            self.num_waits += 1
            self.heartbeat.beat(self.num_waits)
            self.lake.sweep()
            return not self.stop
        try:
            draft = self.fill_anchor() if is_anchor else self.fill(shard_id)
        except SourceBroken:
            self.lake.abandon(shard_id)
            raise
        if is_anchor and self.stop:  # half an anchor would stay half for the lake's whole life
            self.lake.abandon(shard_id)
            return False
        self.write(shard_id, draft, anchor_groups=draft.groups if is_anchor else ())
        if is_anchor:
            self.lake.free_tars(self.owner.id)
        return bool(draft.cursors) and not self.stop


def report(counts: Counter[str]) -> str:
    """'1200 recordings, 3100 clips; skipped: 12 shorter than a clip, 1 undecodable'"""
    skipped = [f"{n} {name.removeprefix('skipped: ')}" for name, n in counts.items() if name.startswith("skipped")]
    broken = f"; {counts['broken tars']} broken tars" if counts["broken tars"] else ""
    return f"{counts['recordings']} recordings, {counts['cut']} clips; skipped: {', '.join(skipped) or 'none'}{broken}"


def join_lake(config: Config) -> tuple[FolderSource, Lake]:
    """The source, and the lake of this configuration: made, or joined if it is there and the same."""
    demo.prepare(config.source)
    source = FolderSource(Path(config.source))
    identity = Identity(
        source=config.source,
        revision=source.revision,
        seed=config.seed,
        clip_samples=CLIP_SAMPLES,
        shard_clips=config.shard_clips,
        val_fraction=config.val_fraction,
        val_clips=config.val_clips,
    )
    tars = {tar.name: tar.num_bytes for tar in source.tars}
    cap_bytes = round(config.cap_gb * GIB)
    needed_bytes = reservation_bytes(config.val_clips) + reservation_bytes(config.shard_clips)
    if cap_bytes < needed_bytes:
        raise UserError(
            f"a cap of {gib(cap_bytes)} is too small for one shard of {config.shard_clips} clips and the anchor of "
            f"{config.val_clips}, {gib(needed_bytes)} together; raise --cap-gb"
        )
    lake = Lake.create(
        config.lake,
        identity,
        tars,
        cap_bytes=cap_bytes,
        reservation_bytes=reservation_bytes(config.shard_clips),
        max_workers=config.max_workers,
    )
    return source, lake


def reservation_bytes(num_clips: int) -> int:
    """What a shard of so many clips may take, however they fall on its two parts: each part has an end of its own."""
    return shard_bytes(num_clips) + shard_bytes(0)


def check(config: Config) -> None:
    """Make or join the lake, and nothing else: refuses a source that is not there and a lake that is another one."""
    join_lake(config)


def main(config: Config) -> None:
    stop = StopRequest()
    source, lake = join_lake(config)
    owner = Owner(lake.root, "stream")
    worker = Worker(config, source, lake, owner, stop)
    lake.sweep()
    try:
        while worker.one_shard(is_anchor=not lake.has_anchor()):
            pass
        reason = "asked to stop" if stop else "no tar is left to read"
    except LakeFull as e:
        reason = f"the lake is full: {e}"
    finally:
        lake.free_tars(owner.id)
        owner.release()
        worker.heartbeat.path.unlink(missing_ok=True)
    print(f"{owner.id}: {reason}; {report(worker.counts)}; {gib(lake.used_bytes())} of {gib(lake.cap_bytes())} used")


if __name__ == "__main__":
    cli.run(main, PRESETS, __doc__, check=check)
