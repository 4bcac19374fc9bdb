"""Cut the recordings of a source into 2 s clips, in shards, in the lake.

in:   tars of a source (--source): a dataset on the Hugging Face hub, an fsspec URL, or a folder
out:  <lake>/shards/*.tar, <lake>/val/*.tar, and the ledger that knows them; any number of these run side by side
cost: one core each; memory and clips per second: benchmarks/stream.py

    python stream_laion_audio_clips.py --lake lake                   # the published dataset, until the lake is full
    python stream_laion_audio_clips.py --source DIR --lake lake     # WebDataset tars in a folder
    python stream_laion_audio_clips.py demo                          # synthetic recordings into demo/lake

Killed at any moment and started again, it leaves every clip of the source in exactly one finished shard.
"""

import json
import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from hear_distill import cli, demo
from hear_distill.audio import CLIP_SAMPLES
from hear_distill.cutter import Draft, Keep, Reader, parse_weights, split_of
from hear_distill.files import GIB, UserError, gib
from hear_distill.guard import Guard
from hear_distill.lake import Lake, LakeFull
from hear_distill.locks import Owner
from hear_distill.remote import Unreachable
from hear_distill.runlog import Heartbeat, Stopped, StopRequest
from hear_distill.schema import ANCHOR, RECENT, TRAIN, Identity, Part
from hear_distill.shards import shard_bytes, write_shard
from hear_distill.sources import Source, find_source


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of the streamer. A lake keeps its first source, seed, shard size and validation; others are refused."""

    source: str = "laion/LAION-Audio-300M"
    """dataset org/name[@revision] on the Hugging Face hub, fsspec URL, or folder of WebDataset tars"""
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
    num_nodes: int = 1
    """machines that share the source, each with a lake of its own"""
    node_rank: int = 0
    """which of them this is, from 0"""
    seed: int = 0
    """of the order of the tars, the split, the mixing and the thinning"""
    min_rms_db: float | None = None
    """drop clips whose level, in dB of full scale, is below this; -60 drops silence"""
    keep_short: bool = False
    """keep recordings of 0.3 to 2 s, padded with zeros at the end as HeAR has it, instead of dropping them"""
    caption_weight: tuple[str, ...] = ()
    """PATTERN=W ...: keep a recording whose caption matches with probability W; the first pattern that matches counts,
    in any case; what matches none is kept: "cough|sneez|breath=1" ".=0.1" """

    def __post_init__(self) -> None:
        if min(self.shard_clips, self.open_tars) < 1 or self.val_clips < 0:
            raise ValueError("--shard-clips and --open-tars must be at least 1, --val-clips at least 0")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"--val-fraction must be in [0, 1), got {self.val_fraction}")
        if not 0 <= self.node_rank < self.num_nodes:
            raise ValueError(f"--node-rank must be from 0 to {self.num_nodes - 1}, got {self.node_rank}")
        if self.val_fraction and not self.val_clips:
            raise ValueError(f"--val-fraction {self.val_fraction} needs --val-clips above 0")
        try:
            self.keep()
        except ValueError as e:
            raise ValueError(f"--caption-weight {e}") from e

    def keep(self) -> Keep:
        """Which recordings and clips are wanted."""
        return Keep(self.seed, self.min_rms_db, self.keep_short, parse_weights(self.caption_weight))


PRESETS = {
    "laion": Config(),
    "demo": Config(
        source=str(demo.SOURCE), lake=demo.DEMO / "lake", cap_gb=0.09, shard_clips=64, val_fraction=0.03, val_clips=64
    ),
}
ANCHOR_TARS = 64  # heads of this many tars, spread by the permutation, make up the anchor validation
ANCHOR_WAIT_S = 1.0
MAX_RECORDINGS = 10_000  # for one shard, however few of them are kept: a killed worker reads no more than that again
BROKEN_LIMIT = 100  # unreadable recordings among the first 200 that stop a worker: the source is not what it should be
BROKEN_WINDOW = 200
BROKEN_TARS = 10  # without one recording
UNREADABLE = (
    *("undecodable", "empty", "not finite", "absurd length"),
    *("no audio member", "oversized member", "bad JSON"),
)


class SourceBroken(UserError):
    """Too much of the source cannot be read: going on would train on the rest as if nothing had happened."""


class Worker:
    """Reads tars, mixes their recordings and fills one shard after another."""

    def __init__(self, config: Config, source: Source, lake: Lake, owner: Owner, stop: StopRequest) -> None:
        self.config, self.source, self.lake, self.owner, self.stop = config, source, lake, owner, stop
        self.keep, self.guard = config.keep(), Guard(lake, owner)
        self.readers: list[Reader] = []
        self.counts: Counter[str] = Counter()
        self.failure: Unreachable | None = None
        self.num_looks = 0
        self.speed: dict[str, float] = {}
        """of the last shard: clips per second, and the share of the time by activity"""
        self.heartbeat = Heartbeat(lake.root / "heartbeats" / f"stream-{os.getpid()}.json", "stream")
        self.progress = tqdm(unit="clip", desc=owner.id, disable=None)  # None: only on a terminal

    def look(self) -> None:
        """Called every so often while something takes long: raises Stopped if asked to leave, else says we live."""
        self.stop.look()
        self.num_looks += 1
        self.beat()

    def beat(self, force: bool = False) -> None:
        """Progress for the supervisor, speed for `status`."""
        progress = self.counts["recordings"] + self.num_looks
        self.heartbeat.beat(progress, force, clips=self.counts["cut"], **self.speed)

    def open_tars(self, count: int) -> None:
        """Take cursors until `count` tars are open, or no more are free."""
        if len(self.readers) >= count:
            return
        cursors = self.lake.take_tars(self.owner.id, count - len(self.readers))
        self.readers += [Reader(self.source, cursor, self.keep, self.look, self.guard) for cursor in cursors]

    def advance(self, reader: Reader, draft: Draft, room: int, split: Callable[[str], str]) -> bool:
        """`Reader.advance`, and a look at how it goes. Raises Stopped, Unreachable, SourceBroken."""
        self.look()
        try:
            has_more = reader.advance(draft, room, split)
        except Unreachable:
            self.lake.note_outage(reader.cursor.position)
            raise
        self.check_source(draft.counts)
        return has_more

    def fill(self, shard_id: int) -> Draft:
        """Draw recordings from the open tars at random until the shard is full, the tars are done, or a stop."""
        draft, rng = Draft(), np.random.default_rng([self.config.seed, shard_id])
        anchor_groups = self.lake.anchor_groups()
        # No recording fills a shard alone, as long as others are open.
        share = -(-self.config.shard_clips // self.config.open_tars)

        def split(group: str) -> str:
            return RECENT if group in anchor_groups else split_of(group, self.config.seed, self.config.val_fraction)

        try:
            self.open_tars(self.config.open_tars)
            while self.readers and (room := self.config.shard_clips - draft.num_clips()) > 0:
                chosen = int(rng.integers(len(self.readers)))
                if not self.advance(self.readers[chosen], draft, min(room, share), split):
                    self.readers.pop(chosen)
                    self.open_tars(self.config.open_tars)
                if draft.counts["recordings"] >= MAX_RECORDINGS:
                    break
        except Stopped:
            pass  # what is cut by now is a short shard
        except Unreachable as e:
            self.failure = e  # the same, and then this worker leaves
        draft.open_tars = len(self.readers)
        draft.wanted_tars = min(self.config.open_tars, self.lake.num_sound_tars())
        return draft

    def fill_anchor(self) -> Draft:
        """Take the heads of many tars, an equal share of clips from each, all for the anchor validation.

        Raises Stopped, Unreachable: half an anchor would stay half for the lake's whole life.
        """
        draft = Draft()
        self.open_tars(ANCHOR_TARS)
        share = -(-self.config.val_clips // max(1, len(self.readers)))
        for reader in self.readers:
            target = min(self.config.val_clips, draft.num_clips() + share)
            while (room := target - draft.num_clips()) > 0:
                if not self.advance(reader, draft, room, lambda group: ANCHOR):
                    break
            reader.close()  # one connection at a time
        self.readers.clear()  # other workers may take these tars as soon as the cursors are published
        return draft

    def check_source(self, counts: Counter[str]) -> None:
        """Raise SourceBroken if most of the first recordings that this worker saw, or all tars, could not be read."""
        seen = self.counts + counts
        num_broken = sum(seen[f"skipped: {reason}"] for reason in UNREADABLE)
        if seen["broken tars"] >= BROKEN_TARS and not seen["recordings"]:
            found = f"none of the first {seen['broken tars']} tars"
        elif seen["recordings"] <= BROKEN_WINDOW and num_broken > BROKEN_LIMIT:
            found = f"only {seen['recordings'] - num_broken} of the first {seen['recordings']} recordings"
        else:
            return
        raise SourceBroken(f"{found} of {self.config.source} can be read: {report(seen)}; look at the source")

    def write(self, shard_id: int, draft: Draft, anchor_groups: Iterable[str]) -> None:
        """Permute the clips, write the parts and publish them with the cursors."""
        rng, parts = np.random.default_rng([self.config.seed, shard_id, 1]), []
        with draft.timed("writing"):
            for split, clips in draft.clips.items():
                if clips:
                    order = rng.permutation(len(clips))
                    sha256 = write_shard(self.lake.path(shard_id, split, ".tar.part"), [clips[i] for i in order])
                    parts.append(Part(split, len(clips), shard_bytes(len(clips)), sha256))
        self.lake.publish(shard_id, parts, draft.cursors(), draft.counts, anchor_groups, draft.statistics())
        self.lake.retire_recent(self.config.val_clips)

    def tell(self, shard_id: int, draft: Draft) -> None:
        """What was published: for people, and in the heartbeat."""
        self.counts += draft.counts + Counter(cut=draft.num_clips())
        self.progress.update(draft.num_clips())
        if self.progress.disable:
            print(f"{self.owner.id}: shard {shard_id}, {draft.num_clips()} clips; {report(self.counts)}")
        seconds = max(1e-9, draft.clock_s.total())
        self.speed = {"clips_per_s": draft.num_clips() / seconds}
        self.speed |= {activity: spent / seconds for activity, spent in draft.clock_s.items()}
        self.beat(force=True)

    def one_shard(self, is_anchor: bool) -> bool:
        """Reserve, fill and publish one shard. False if there is nothing left for this worker, or it was stopped."""
        num_clips = self.config.val_clips if is_anchor else self.config.shard_clips
        split = ANCHOR if is_anchor else TRAIN
        shard_id = self.lake.begin_shard(self.owner.id, reservation_bytes(num_clips), split)
        if shard_id is None:  # another worker cuts the anchor; until it is known, any clip might belong to it
            self.stop.wait(ANCHOR_WAIT_S)
            self.look()
            self.lake.sweep()
            return True
        try:
            draft = self.fill_anchor() if is_anchor else self.fill(shard_id)
            self.write(shard_id, draft, anchor_groups=draft.groups if is_anchor else ())
        except (UserError, Stopped, OSError, sqlite3.Error):  # a full disk is one of the last two
            self.lake.abandon(shard_id)  # unless it was published before
            raise
        self.tell(shard_id, draft)
        if self.failure:
            raise self.failure
        if is_anchor:
            self.lake.free_tars(self.owner.id)
        self.stop.look()
        return bool(draft.readers)

    def close(self) -> None:
        """Give everything back: connections, cursors, the lock."""
        for reader in self.readers:
            reader.close()
        self.lake.free_tars(self.owner.id)
        self.owner.release()
        self.heartbeat.path.unlink(missing_ok=True)


def report(counts: Counter[str]) -> str:
    """'1200 recordings, 3100 clips; skipped: 12 too short, 1 undecodable'"""
    skipped = [f"{n} {name.removeprefix('skipped: ')}" for name, n in counts.items() if name.startswith("skipped")]
    broken = f"; {counts['broken tars']} broken tars" if counts["broken tars"] else ""
    return f"{counts['recordings']} recordings, {counts['cut']} clips; skipped: {', '.join(skipped) or 'none'}{broken}"


def join_lake(config: Config) -> tuple[Source, Lake]:
    """The source, and the lake of this configuration: made, or joined if it is there and the same."""
    demo.prepare(config.source)
    cap_bytes = round(config.cap_gb * GIB)
    needed_bytes = reservation_bytes(config.val_clips) + reservation_bytes(config.shard_clips)
    if cap_bytes < needed_bytes:
        raise UserError(
            f"a cap of {gib(cap_bytes)} is too small for one shard of {config.shard_clips} clips and the anchor of "
            f"{config.val_clips}, {gib(needed_bytes)} together; raise --cap-gb"
        )
    known = Lake.find(config.lake)
    source = find_source(config.source, known.setting("revision") if known else None)
    identity = Identity(
        source=config.source,
        revision=source.revision,
        seed=config.seed,
        clip_samples=CLIP_SAMPLES,
        shard_clips=config.shard_clips,
        val_fraction=config.val_fraction,
        val_clips=config.val_clips,
        num_nodes=config.num_nodes,
        node_rank=config.node_rank,
    )
    lake = Lake.create(
        config.lake,
        identity,
        {} if known else {tar.name: tar.num_bytes for tar in source.tars},
        cap_bytes=cap_bytes,
        reservation_bytes=reservation_bytes(config.shard_clips),
        max_workers=config.max_workers,
        keep=json.dumps([config.min_rms_db, config.keep_short, config.caption_weight]),
    )
    return source, lake


def reservation_bytes(num_clips: int) -> int:
    """What a shard of so many clips may take, however they fall on its two parts: each part has an end of its own."""
    return shard_bytes(num_clips) + shard_bytes(0)


def check(config: Config) -> None:
    """Make or join the lake, and nothing else: refuses a source that is not there and a lake that is another one."""
    join_lake(config)


def main(config: Config) -> None:
    source, lake = join_lake(config)
    stop = StopRequest()  # before, while the source is listed, there is nothing in hand: a signal ends it at once
    worker = Worker(config, source, lake, Owner(lake.root, "stream"), stop)
    lake.sweep()
    reason = "no tar is left to read"
    with closing(worker):
        try:
            while worker.one_shard(is_anchor=not lake.has_anchor()):
                pass
        except Stopped:
            reason = "asked to stop"
        except LakeFull as e:
            reason = f"the lake is full: {e}"
    used = f"{gib(lake.used_bytes())} of {gib(lake.cap_bytes())} used"
    print(f"{worker.owner.id}: {reason}; {report(worker.counts)}; {used}")


if __name__ == "__main__":
    cli.run(main, PRESETS, __doc__, check=check)
