"""One open source tar in, 2 s clips out: into the draft of a shard, and the cursor moves behind them.

in:   the recordings of a tar from its cursor on, and a rule which of them to keep
out:  Draft: clips by part (train, anchor, recent), counts of what was passed over, statistics

n samples at 16 kHz
"""

import hashlib
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Protocol

import numpy as np

from hear_distill.audio import (
    CLIP_SAMPLES,
    SAMPLE_RATE,
    DecodeError,
    band_levels_db,
    clip_starts,
    clips_in,
    decode_blocks,
    rms_db,
)
from hear_distill.drift import Moments
from hear_distill.schema import ANCHOR, RECENT, TRAIN, Cursor
from hear_distill.shards import Clip, recording_hash
from hear_distill.sources import Source
from hear_distill.tars import Recording, Stream, Tar, TarBroken, read_recordings

MIN_SHORT_SAMPLES = int(0.3 * SAMPLE_RATE)  # of `keep_short`: the shortest cough that is worth two seconds
HELD_SAMPLES = 15 * 60 * SAMPLE_RATE  # 29 MB for each open tar; a longer recording is decoded twice rather than held
LEVELS_DB = range(-96, 1, 6)  # edges of the histogram of clip levels; 16 bits end at -96
KEY_BYTES = 8


def uniform(*address: object) -> float:
    """A number in [0, 1) that depends on the address alone: the same in every run, shard and worker."""
    text = "\0".join(map(str, address)).encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") / 2**64


def group_of(recording: Recording) -> str:
    """What must stay on one side of the split: the video, where the metadata says that this is a segment of one."""
    is_segment = "start_time_ms" in recording.metadata and recording.metadata.get("title")
    return str(recording.metadata["title"]) if is_segment else recording.key


def split_of(group: str, seed: int, val_fraction: float) -> str:
    """`recent` or `train` for every clip of a group, forever: clips of one recording overlap, any finer split leaks."""
    return RECENT if uniform(seed, group) < val_fraction else TRAIN


def caption_of(recording: Recording) -> str:
    """What the metadata says is to be heard."""
    return str(recording.metadata.get("caption") or "")


@dataclass(frozen=True)
class Keep:
    """Which recordings and clips are wanted. Draws are by hash of the recording, so a choice can be repeated."""

    seed: int = 0
    min_rms_db: float | None = None
    """level of a clip in dB of full scale; None keeps silence"""
    keep_short: bool = False
    weights: tuple[tuple[re.Pattern[str], float], ...] = ()
    """the first pattern that is found in the caption gives the probability; 1 if none is"""

    def is_thinned(self, tar: str, recording: Recording) -> bool:
        """Whether the draw goes against this recording."""
        caption = caption_of(recording)
        weight = next((weight for pattern, weight in self.weights if pattern.search(caption)), 1.0)
        return uniform("thin", self.seed, tar, recording.key) >= weight

    def is_silent(self, level_db: float) -> bool:
        """Whether a clip of this level is dropped."""
        return self.min_rms_db is not None and level_db < self.min_rms_db

    def shortest(self) -> int:
        """Samples that a recording must have."""
        return MIN_SHORT_SAMPLES if self.keep_short else CLIP_SAMPLES


def parse_weights(texts: tuple[str, ...]) -> tuple[tuple[re.Pattern[str], float], ...]:
    """('cough|sneez=1', '.=0.1') -> patterns, in any case, with probabilities. Raises ValueError."""
    parsed = []
    for text in texts:
        pattern, _, weight = text.rpartition("=")
        try:
            parsed.append((re.compile(pattern, re.IGNORECASE), float(weight)))
        except (ValueError, re.error) as e:
            raise ValueError(f"{text!r} is not PATTERN=W: {e}") from e
        if not pattern or not 0 <= parsed[-1][1] <= 1:
            raise ValueError(f"{text!r} is not PATTERN=W with W from 0 to 1")
    return tuple(parsed)


@dataclass
class Draft:
    """A shard in the making. The clips are held in memory, 64 kB each, so that they can be permuted before writing."""

    clips: dict[str, list[Clip]] = field(default_factory=lambda: {TRAIN: [], ANCHOR: [], RECENT: []})
    counts: Counter[str] = field(default_factory=Counter)
    """recordings, those passed over by reason, broken tars"""
    readers: dict[int, "Reader"] = field(default_factory=dict)
    """by position in the permutation: those that were read from"""
    groups: set[str] = field(default_factory=set)
    """recordings and videos that `clips` belong to; those of the anchor are published with it"""
    levels_db: list[float] = field(default_factory=list)
    bands_db: list[np.ndarray] = field(default_factory=list)
    """[7] of each clip"""
    open_tars: int = 0
    """when it was full; 0 for the anchor, which is not mixed"""
    wanted_tars: int = 0
    """to mix it from; more are not open where the source comes to its end"""
    heard_s: float = 0.0
    """length of the recordings that were begun"""
    clock_s: Counter[str] = field(default_factory=Counter)
    """what this worker spent on it, by activity"""

    def num_clips(self) -> int:
        """Clips of all parts together."""
        return sum(map(len, self.clips.values()))

    @contextmanager
    def timed(self, activity: str) -> Iterator[None]:
        """Book the time of a block."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.clock_s[activity] += time.perf_counter() - began

    def cursors(self) -> list[Cursor]:
        """Where its readers stand, to be published with its clips."""
        return [reader.to_publish() for reader in self.readers.values()]

    def statistics(self) -> dict[str, object]:
        """What the ledger keeps of this shard when it is long gone."""
        return {
            "recordings": self.counts["recordings"],
            "clips": self.num_clips(),
            "heard_s": round(self.heard_s, 1),
            "levels_db": np.histogram(np.clip(self.levels_db, LEVELS_DB[0], LEVELS_DB[-1]), LEVELS_DB)[0].tolist(),
            "bands_db": Moments.of(np.array(self.bands_db)).to_json() if self.bands_db else None,
            "tars": Counter(clip.tar for clips in self.clips.values() for clip in clips),
            "open_tars": self.open_tars,
            "wanted_tars": self.wanted_tars,
            "clock_s": {activity: round(seconds, 3) for activity, seconds in self.clock_s.items()},
        }


class _Watched:
    """A stream that looks up before each read: hundreds of megabytes of one member may come without any wait."""

    def __init__(self, stream: Stream, look: Callable[[], None]) -> None:
        self.stream, self.look = stream, look

    def read(self, size: int) -> bytes:
        self.look()
        return self.stream.read(size)


class Guard(Protocol):
    """What remembers a recording that kills its decoder: hear_distill/guard.py."""

    def open_tar(self, tar: str) -> None:
        """This tar is about to be read."""

    def is_poison(self, tar: str, recording: Recording) -> bool:
        """Whether this recording must not be decoded again."""

    def decoding(self, tar: str, recording: Recording) -> AbstractContextManager[None]:
        """The block decodes this recording, or a part of it."""

    def acquit(self, tar: str, recording: Recording) -> None:
        """All of this recording that is wanted was decoded."""


class Reader:
    """One open tar: its cursor, and the recording that a draw may have cut in two."""

    def __init__(
        self, source: Source, cursor: Cursor, keep: Keep, look: Callable[[], None], guard: Guard | None = None
    ) -> None:
        """`look` is called every so often while something takes long; what it raises ends that."""
        self.guard = guard
        if guard:
            guard.open_tar(cursor.name)
        self.cursor, self.keep, self.look = cursor, keep, look
        self.keys = {cursor.keys[i : i + KEY_BYTES] for i in range(0, len(cursor.keys), KEY_BYTES)}
        self.recordings = self._read(source)
        self.recording: Recording | None = None
        self.num_samples = 0  # of `recording`
        self.is_held = True  # `recording`, whole; else it is decoded again, as its clips are asked for
        self.clips: Iterator[tuple[int, np.ndarray]] = iter(())  # of `recording`, that are still to come

    def _read(self, source: Source) -> Iterator[Recording]:
        """The recordings from the cursor on; the tar is opened when the first of them is asked for."""
        tar, offset = Tar(self.cursor.name, self.cursor.num_bytes), self.cursor.offset
        with source.open(tar, offset, self.look) as stream:
            yield from read_recordings(_Watched(stream, self.look), tar, offset)

    def advance(self, draft: Draft, room: int, split: Callable[[str], str]) -> bool:
        """Cut one recording, or `room` clips of it, into the draft. False when the tar is done or broken.

        Args:
            split: from the recording's group to the part that its clips belong to.
        """
        try:
            has_more = self.recording is not None or self._next(draft)
        except TarBroken as e:
            draft.counts["broken tars"] += 1
            print(f"{self.cursor.name} is broken: {e}", file=sys.stderr)
            self.cursor = replace(self.cursor, state="broken", problem=str(e))
            has_more = False
        if self.recording is not None:
            group = group_of(self.recording)
            draft.groups.add(group)
            is_first = self.cursor.next_clip == 0
            with draft.timed("cutting") if self.is_held else self._decoding(draft, self.recording):
                taken = list(islice(self.clips, room))
            with draft.timed("cutting"):
                self._cut(draft, split(group), taken)
            if is_first:  # not before: a stop while it is cut leaves it to whoever cuts it
                draft.counts["recordings"] += 1
                draft.heard_s += self.num_samples / SAMPLE_RATE
        elif not has_more and self.cursor.state == "open":
            self.cursor = replace(self.cursor, state="done", offset=self.cursor.num_bytes, next_clip=0)
        draft.readers[self.cursor.position] = self
        return has_more

    def _next(self, draft: Draft) -> bool:
        """Move to the next recording, or count why it is passed over. False when the tar has no more."""
        with draft.timed("reading"):
            recording = next(self.recordings, None)
        if recording is None:
            return False
        problem = self._problem_with(recording)
        if problem is None:
            try:
                with self._decoding(draft, recording):
                    self._begin(recording)
            except DecodeError as e:
                problem = e.reason
        if problem is not None:
            draft.counts["recordings"] += self.cursor.next_clip == 0
            draft.counts[f"skipped: {problem}"] += 1
            self._pass_by(recording)
        return True

    @contextmanager
    def _decoding(self, draft: Draft, recording: Recording) -> Iterator[None]:
        """Book the time of a block that decodes, and hold the death of the process meanwhile against the recording."""
        noted = self.guard.decoding(self.cursor.name, recording) if self.guard else nullcontext()
        with draft.timed("decoding"), noted:
            yield

    def _problem_with(self, recording: Recording) -> str | None:
        """Why this recording need not even be decoded."""
        if self._key_hash(recording) in self.keys:
            return "duplicate key"
        if recording.problem is None and self.keep.is_thinned(self.cursor.name, recording):
            return "thinned"
        if self.guard and self.guard.is_poison(self.cursor.name, recording):
            return "poison"
        return recording.problem

    def _begin(self, recording: Recording) -> None:
        """Decode a recording, all of it before the first clip is cut. Raises DecodeError, and what `look` raises."""

        def blocks() -> Iterator[np.ndarray]:
            for block in decode_blocks(recording.audio):
                self.look()
                yield block

        held, num_samples = [], 0
        for block in blocks():
            num_samples += len(block)
            if num_samples <= HELD_SAMPLES:
                held.append(block)
        if num_samples < self.keep.shortest():
            raise DecodeError("too short", f"{num_samples} samples, {self.keep.shortest()} are needed")
        self.is_held = num_samples <= HELD_SAMPLES
        clips = clips_in(held if self.is_held else blocks(), min_short=self.keep.shortest())
        self.clips = islice(clips, self.cursor.next_clip, None)
        self.num_samples = num_samples
        self.recording = recording
        self.cursor = replace(self.cursor, offset=recording.offset)

    def _cut(self, draft: Draft, split: str, taken: list[tuple[int, np.ndarray]]) -> None:
        """Move the next clips of the recording into the draft, and the cursor behind the last of them."""
        for start, samples in taken:
            level_db = rms_db(samples)
            if self.keep.is_silent(level_db):
                draft.counts["skipped: silent clips"] += 1
                continue
            draft.levels_db.append(level_db)
            draft.bands_db.append(band_levels_db(samples))
            draft.clips[split].append(
                Clip(
                    tar=self.cursor.name,
                    key=self.recording.key,
                    start=start,
                    source_s=self.num_samples / SAMPLE_RATE,
                    caption=caption_of(self.recording),
                    samples=samples,
                )
            )
        next_clip = self.cursor.next_clip + len(taken)
        if next_clip < len(clip_starts(self.num_samples)):  # none for a short recording, which gave its only clip
            self.cursor = replace(self.cursor, next_clip=next_clip)
        else:
            if self.guard:
                self.guard.acquit(self.cursor.name, self.recording)
            self._pass_by(self.recording)

    def _pass_by(self, recording: Recording) -> None:
        """Move behind a recording: all its clips are cut, or it gives none."""
        self.keys.add(self._key_hash(recording))
        self.cursor = replace(self.cursor, offset=recording.end, next_clip=0)
        self.recording = None

    def _key_hash(self, recording: Recording) -> bytes:
        return bytes.fromhex(recording_hash(self.cursor.name, recording.key))

    def to_publish(self) -> Cursor:
        """The cursor with the keys behind it, which nobody needs once the tar is done."""
        return replace(self.cursor, keys=b"".join(self.keys) if self.cursor.state == "open" else b"")

    def close(self) -> None:
        """End the connection, and let go of a recording that is half cut: the anchor has 64 of them."""
        self.recordings.close()
        self.recording, self.clips = None, iter(())
