"""Finished shards in, shuffled batches out; and the account of which clips were trained on.

in:   shards that the ledger leases to this trainer
out:  Batch(samples [B, 32000] int16, ids); coverage: a bit per clip, for the checkpoint

Each batch is drawn without replacement from the unread clips of several open shards. The draw depends on the seed, the
number of the batch and what is open, so a trainer that resumes from a checkpoint draws what it would have drawn.

One thread reads ahead, so that a step waits neither for a hash nor for a disk. It leases, checks, draws and reads, with
a connection to the ledger of its own: from what a batch is drawn depends on which shards passed their check, so the
four belong together. The account belongs to the caller's thread alone. A shard enters it together with the first batch
that was drawn while it was open; until then no checkpoint knows of it, and a resumed run leases it anew. So it makes no
difference to any draw, or to any checkpoint, how far ahead the thread is.

With `reuse`, shards are kept until the lake wants room for new ones. When their undrawn clips are fewer than a batch,
and no other shard can be leased, the batch takes these clips and goes on in a new pass over the least-used shards. So
each pass over a shard takes each of its clips once, in the surviving history as well, whatever was killed. Which shards
go when the lake wants room depends on the moment, and so do the draws after it.

With `sizes` besides 1, some batches hold longer sounds: clips that follow each other in a recording, side by side.

B clips in a batch   k clips of a sound
"""

import os
import sys
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hear_distill import lengths
from hear_distill.audio import CLIP_SAMPLES
from hear_distill.files import UserError
from hear_distill.lake import Lake
from hear_distill.locks import Owner
from hear_distill.schema import RECENT, TRAIN, Shard
from hear_distill.shards import ShardBroken, read_clips, read_infos, verify_shard

NOTHING_READ: dict[str, Any] = {"num_batches": 0, "coverage": {}, "uses": {}, "num_clips": {}}  # state of a new history
AHEAD_CLIPS = 1_024  # hides the check of a shard of 1,000 clips, 0.1 s at most, from a GPU that takes 6,000 clips/s


@dataclass(frozen=True)
class Batch:
    """B clips and where they stand."""

    samples: np.ndarray
    """[B, 32000] int16"""
    ids: list[tuple[int, int]]
    """(shard, clip) of each row"""
    clips_per_sound: int = 1
    """k; rows 0 to k - 1 are the first sound, and so on"""
    num_broken_up: int = 0
    """clips of sounds that were to be longer, of which this batch took some as single clips"""


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """What is drawn and how."""

    run: str
    """training history that the leases belong to"""
    seed: int
    num_open: int
    """shards that a batch is drawn from; more, if these hold too little"""
    batch_size: int
    ahead_clips: int = AHEAD_CLIPS
    """clips that are read before they are asked for, rounded up to whole batches; 0 reads when asked"""
    reuse: bool = False
    """keep shards and go over them again; for one trainer on a lake"""
    sizes: tuple[int, ...] = (1,)
    """k that batches may have; each must divide `batch_size`"""
    batches_per_size: int = 1
    """in a row that have the same k, if there are enough such sounds"""
    rank: int = 0
    """of this process among those that train the same model: each draws in an order of its own"""


@dataclass(frozen=True)
class Draw:
    """What the thread hands over: a batch, or none, and what it opened for it."""

    samples: np.ndarray
    """[B, 32000] int16, not filled if there is no batch"""
    ids: list[tuple[int, int]]
    """(shard, clip) of each row; empty if the open shards hold too little and no other is ready"""
    num_old: int
    """rows before the passes that begin in this batch; all rows, if none does"""
    begun: list[int]
    """shards of which a new pass begins"""
    opened: list[Shard]
    clips_per_sound: int = 1
    num_broken_up: int = 0


def trained_clips(shard: Shard) -> np.ndarray:
    """[clips] bool: what the ledger says was trained on when the shard was leased."""
    bits = np.unpackbits(np.frombuffer(shard.covered, np.uint8), bitorder="little")[: shard.num_clips].astype(bool)
    return np.pad(bits, (0, shard.num_clips - len(bits)))


class OpenShard:
    """The thread's side of a leased shard: its file, while it holds clips that are in no batch of this pass yet."""

    def __init__(self, shard: Shard, units: lengths.Units) -> None:
        """`units`: its clips that are to be drawn together."""
        self.path, self.num_uses, self.units = shard.path, shard.num_uses, units
        self.is_drawn = trained_clips(shard)
        self.fd = os.open(shard.path, os.O_RDONLY)
        self.close_if_drawn()

    def close_if_drawn(self) -> None:
        """Give the file back if it holds nothing more to draw."""
        if self.is_drawn.all():
            self.close()

    def close(self) -> None:
        """Give the file back."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def begin_pass(self) -> None:
        """Every clip may be drawn once more."""
        self.num_uses += 1
        self.is_drawn[:] = False
        self.fd = os.open(self.path, os.O_RDONLY)

    def read(self, clips: Sequence[int], out: np.ndarray) -> None:
        """Clips that no batch of this pass has held -> `out` [len(clips), 32000] int16."""
        read_clips(self.fd, clips, out)
        self.is_drawn[clips] = True
        self.close_if_drawn()


class Drawer:
    """Leases, checks, draws and reads. Made, used and closed in the one thread that its connection belongs to."""

    def __init__(self, root: Path, owner: str, drawing: Drawing, num_drawn: int) -> None:
        self.lake, self.owner, self.drawing, self.num_drawn = Lake.open(root), owner, drawing, num_drawn
        self.shards: dict[int, OpenShard] = {}  # in the order of their leases
        self.opened: list[Shard] = []  # that no Draw has told of yet

    def draw(self, samples: np.ndarray) -> Draw:
        """Fill `samples` [B, 32000] int16 with the next batch, if there is one."""
        self._lease_more()
        num_held = sum(len(shard.is_drawn) for shard in self.shards.values()) if self.drawing.reuse else 0
        ids, num_old, begun, size, num_broken_up = [], 0, [], 1, 0
        if max(self._num_undrawn(), num_held) >= len(samples):
            if self.drawing.sizes == (1,):
                ids, num_old, begun = self._read_batch(samples)
            else:
                ids, num_old, begun, size, num_broken_up = self._read_sounds(samples)
        if not self.drawing.reuse:
            self.shards = {shard_id: shard for shard_id, shard in self.shards.items() if shard.fd >= 0}
        opened, self.opened = self.opened, []
        return Draw(samples, ids, num_old, begun, opened, size, num_broken_up)

    def _num_undrawn(self) -> int:
        return sum(int((~shard.is_drawn).sum()) for shard in self.shards.values())

    def _is_enough(self, num_clips: int) -> bool:
        """Whether `num_open` shards have undrawn clips, and in all `num_clips`."""
        num_open = sum(shard.fd >= 0 for shard in self.shards.values())
        return num_open >= self.drawing.num_open and self._num_undrawn() >= num_clips

    def _lease_more(self) -> None:
        """Lease ready shards until `num_open` have undrawn clips, and these are enough for a batch."""
        while not self._is_enough(self.drawing.batch_size):
            shard = self.lake.lease(self.owner, self.drawing.run)
            if shard is None:
                return
            if self.open(shard):
                self.opened.append(shard)

    def open(self, shard: Shard) -> bool:
        """Check a shard against its hash, once per lease, then open it; what fails is quarantined and counted.

        Returns whether it is what the ledger says.
        """
        try:
            verify_shard(shard.path, shard.num_clips, shard.sha256)
        except ShardBroken as e:
            print(f"WARNING: shard {shard.id} is quarantined: {e}", file=sys.stderr)
            self.lake.quarantine(shard.id, shard.split, str(e))
            return False
        sizes, units = self.drawing.sizes, {}
        if sizes != (1,):
            units = lengths.divide(read_infos(shard.path), sizes, self.drawing.seed, shard.id)
        self.shards[shard.id] = OpenShard(shard, units)
        return True

    def _read_sounds(self, samples: np.ndarray) -> tuple[list[tuple[int, int]], int, list[int], int, int]:
        """As `_read_batch`, of sounds of one length; then clips per sound, and clips of sounds that were broken up.

        A batch for which no length has enough is of single clips, and breaks up what else would be left over.
        """
        seed, supply = self.drawing.seed, self._intact()
        index = self.num_drawn // self.drawing.batches_per_size
        size = lengths.choose(lengths.num_clips(supply), len(samples), seed, index)
        if size is None:
            ids, num_old, begun = self._read_batch(samples)
            num_left = 0 if begun else lengths.num_in_longer(self._intact())
            return ids, num_old, begun, 1, lengths.num_in_longer(supply) - num_left
        ids: list[tuple[int, int]] = []
        for shard_id, clips in lengths.pick(supply, size, len(samples), np.random.default_rng([seed, self.num_drawn])):
            self.shards[shard_id].read(clips, samples[len(ids) : len(ids) + size])
            ids += [(shard_id, clip) for clip in clips]
        self.num_drawn += 1
        return ids, len(ids), [], size, 0

    def _intact(self) -> dict[int, lengths.Units]:
        """What each open shard still has of each length, in the order of the leases."""
        return {i: lengths.intact(s.units, s.is_drawn) for i, s in self.shards.items() if s.fd >= 0}

    def _read_batch(self, samples: np.ndarray) -> tuple[list[tuple[int, int]], int, list[int]]:
        """What is left of this pass, if that is too little, and then some of the next: `ids`, `num_old`, `begun`.

        The draw is addressed by the number of the batch. Where two passes meet, a batch may hold a clip twice.
        """
        rng = np.random.default_rng([self.drawing.seed, self.num_drawn, self.drawing.rank])
        num_old = min(self._num_undrawn(), len(samples))
        ids = self._read_drawn(rng, samples[:num_old]) if num_old else []
        begun = []
        if num_old < len(samples):
            begun = self._begin_pass(len(samples) - num_old)
            ids += self._read_drawn(rng, samples[num_old:])
        self.num_drawn += 1
        return ids, num_old, begun

    def _begin_pass(self, num_clips: int) -> list[int]:
        """Go over the least-used shards again: `num_open` of them, or more if these hold less than `num_clips`."""
        begun = []
        for shard_id, shard in sorted(self.shards.items(), key=lambda item: item[1].num_uses):
            if not self._is_enough(num_clips):
                shard.begin_pass()
                begun.append(shard_id)
        return begun

    def _read_drawn(self, rng: np.random.Generator, samples: np.ndarray) -> list[tuple[int, int]]:
        """Draw from all undrawn clips alike; the rows are in the order of the leases, then of the clips."""
        undrawn = {i: np.flatnonzero(~shard.is_drawn) for i, shard in self.shards.items() if shard.fd >= 0}
        ends = np.cumsum([len(clips) for clips in undrawn.values()])
        drawn = np.sort(rng.choice(ends[-1], len(samples), replace=False))  # positions in all undrawn clips, end to end
        ids: list[tuple[int, int]] = []
        for (shard_id, clips), end in zip(undrawn.items(), ends, strict=True):
            chosen = clips[drawn[(drawn >= end - len(clips)) & (drawn < end)] - (end - len(clips))].tolist()
            self.shards[shard_id].read(chosen, samples[len(ids) : len(ids) + len(chosen)])
            ids += [(shard_id, clip) for clip in chosen]
        return ids

    def let_go(self, uses: Mapping[int, int]) -> list[int]:
        """Forget those of these shards that are drawn to the end of this pass (whole passes before it by shard)."""
        found = [(i, self.shards[i]) for i in uses if i in self.shards]
        gone = [i for i, shard in found if shard.num_uses == uses[i] and shard.fd < 0]
        for shard_id in gone:
            del self.shards[shard_id]
        return gone

    def close(self) -> None:
        """Give all files and the connection back; the leases stay."""
        for shard in self.shards.values():
            shard.close()
        self.lake.close()


class Account:
    """The caller's side of a leased shard, kept while it is leased: two bits per clip, and whole passes."""

    def __init__(self, shard: Shard) -> None:
        self.num_uses = self.num_reads = shard.num_uses
        """whole passes before those that `is_trained` and `is_read` tell of"""
        self.is_trained = trained_clips(shard)
        self.is_read = self.is_trained.copy()
        """a batch with the clip was handed out"""

    def begin_pass(self) -> None:
        """All clips of this pass were handed out, the next ones belong to a new pass."""
        assert self.is_read.all(), "a pass was left before its end"
        self.num_reads += 1
        self.is_read[:] = False
        self._end_pass()

    def train(self, clip: int) -> None:
        """An optimiser step contains this clip."""
        assert not self.is_trained[clip], "trained twice in one pass"
        self.is_trained[clip] = True
        self._end_pass()

    def _end_pass(self) -> None:
        """Once all of a pass is trained, and the next has begun, the bits are about the next."""
        if self.num_uses < self.num_reads and self.is_trained.all():
            self.num_uses += 1
            self.is_trained[:] = False

    def num_read(self) -> int:
        """Clips that were handed out at least once."""
        return len(self.is_read) if self.num_reads else int(self.is_read.sum())

    def coverage(self) -> bytes:
        """`is_trained`, a bit per clip, least significant first."""
        return np.packbits(self.is_trained, bitorder="little").tobytes()


def ordinary_memory(shape: tuple[int, int]) -> np.ndarray:
    """[B, 32000] int16, not filled."""
    return np.empty(shape, np.int16)


class LakeReader:
    """Batches across several open shards of one lake, each clip once, read ahead by a thread of its own."""

    def __init__(
        self,
        lake: Lake,
        owner: Owner,
        drawing: Drawing,
        state: Mapping[str, Any] | None = None,
        allocate: Callable[[tuple[int, int]], np.ndarray] = ordinary_memory,
    ) -> None:
        """`state` is what `state()` returned when the surviving checkpoint was made; None begins a new history.

        `allocate` gives a buffer [B, 32000] int16; a few batches live in memory, each buffer is used again and again.
        """
        self.lake, self.owner, self.drawing = lake, owner, drawing
        state = state or NOTHING_READ
        self.num_batches: int = state["num_batches"]
        num_buffers = 1 + -(-drawing.ahead_clips // drawing.batch_size)
        self.free = [allocate((drawing.batch_size, CLIP_SAMPLES)) for _ in range(num_buffers)]
        self.ahead: deque[Future[Draw]] = deque()
        self.is_starved = self.is_closed = False
        leased = lake.begin_run(owner.id, drawing.run, state["coverage"], state["uses"])
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reader")
        self.drawer = self.thread.submit(Drawer, lake.root, owner.id, drawing, self.num_batches).result()
        # Shards that are leased, in the order of their leases.
        self.accounts = {s.id: Account(s) for s in leased if self.thread.submit(self.drawer.open, s).result()}

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold to go on from here: plain numbers and bytes."""
        num_clips = {shard_id: len(account.is_trained) for shard_id, account in self.accounts.items()}
        return {
            **{"num_batches": self.num_batches, "coverage": self.coverage(), "uses": self.uses()},
            "num_clips": num_clips,
        }

    def coverage(self) -> dict[int, bytes]:
        """Trained clips, in this pass, of every shard that is leased, in the order of the leases."""
        return {shard_id: account.coverage() for shard_id, account in self.accounts.items()}

    def uses(self) -> dict[int, int]:
        """Whole passes before this one, of the shards that had any."""
        return {shard_id: account.num_uses for shard_id, account in self.accounts.items() if account.num_uses}

    def next_batch(self) -> Batch | None:
        """The next batch, or None if the open shards hold too little for one and no other is ready now.

        Its samples stay as they are until the next call: then their buffer is filled anew. An error of the thread is
        raised here, and again by every later call. After None the thread rests, so nothing that arrives between None
        and a look at `is_drained` is leased unseen; the next call tries once more.
        """
        for _ in range(1 if self.is_starved else len(self.free)):
            self.ahead.append(self.thread.submit(self.drawer.draw, self.free.pop()))
        while self.ahead:
            draw = self.ahead[0].result()
            self.ahead.popleft()
            self.free.append(draw.samples)
            self.accounts |= {shard.id: Account(shard) for shard in draw.opened}
            self.is_starved = not draw.ids
            if draw.ids:
                self._mark_read(draw.ids[: draw.num_old])
                for shard_id in draw.begun:
                    self.accounts[shard_id].begin_pass()
                self._mark_read(draw.ids[draw.num_old :])
                self.num_batches += 1
                return Batch(draw.samples, draw.ids, draw.clips_per_sound, draw.num_broken_up)
        return None

    def _mark_read(self, ids: Sequence[tuple[int, int]]) -> None:
        for shard_id, clip in ids:
            self.accounts[shard_id].is_read[clip] = True

    def mark_trained(self, ids: Sequence[tuple[int, int]]) -> None:
        """These clips were part of an optimiser step; batches come in the order in which they were handed out."""
        for shard_id, clip in ids:
            self.accounts[shard_id].train(clip)

    def record_checkpoint(self) -> None:
        """Tell the ledger that a checkpoint with the present coverage is durable, and let go of what it retired.

        With `reuse` nothing is retired here; shards that are between two passes go back if the lake wants room.
        """
        reuse = self.drawing.reuse
        for shard_id in self.lake.record_checkpoint(self.owner.id, self.coverage(), self.uses(), is_kept=reuse):
            del self.accounts[shard_id]
        if reuse and self.lake.wants_room():
            spare = self.lake.spare(self.owner.id)
            uses = {i: a.num_uses for i, a in self.accounts.items() if i in spare and a.is_trained.all()}
            gone = self.thread.submit(self.drawer.let_go, uses).result()
            self.lake.give_back(self.owner.id, gone)
            for shard_id in gone:
                del self.accounts[shard_id]

    def report(self) -> None:
        """Let the supervisor see how far the open shards are read."""
        self.lake.report_read({shard_id: account.num_read() for shard_id, account in self.accounts.items()})

    def holds_trained_shards(self) -> bool:
        """Whether checkpoints would free room in the lake."""
        return any(account.is_trained.all() for account in self.accounts.values())

    def num_unread(self) -> int:
        """Clips of open shards that no batch of this pass has held: fewer than a batch when the source is drained."""
        return sum(int((~account.is_read).sum()) for account in self.accounts.values())

    def num_ready(self) -> int:
        """Clips of shards that nobody has leased, and that were not trained on."""
        return sum(int((~trained_clips(shard)).sum()) for shard in self.lake.ready(TRAIN))

    def ahead_state(self, known: Collection[int] | None = None) -> dict[str, Any]:
        """As `state`, of the other shards that are leased: than `known`, or than those of batches handed out so far."""
        known = self.accounts if known is None else known
        shards = [shard for shard in self.lake.leased(self.owner.id) if shard.id not in known]
        return {
            "coverage": {shard.id: np.packbits(trained_clips(shard), bitorder="little").tobytes() for shard in shards},
            "uses": {shard.id: shard.num_uses for shard in shards if shard.num_uses},
            "num_clips": {shard.id: shard.num_clips for shard in shards},
        }

    def is_drained(self) -> bool:
        """Whether no shard can be leased any more, now or later; meant for the moment after a batch that was None."""
        return self.lake.is_drained()

    def close(self) -> None:
        """Leave in good order: what the newest checkpoint does not cover is ready for the next trainer.

        What was read ahead is dropped, the thread ends, and only then the leases go back.
        """
        if self.is_closed:
            return
        self.is_closed = True
        for future in self.ahead:
            future.cancel()
        self.thread.submit(self.drawer.close).result()
        self.thread.shutdown()
        self.lake.release(self.owner.id)


def read_validation(lake: Lake, split: str, num_clips: int) -> np.ndarray:
    """The first `num_clips` clips of a validation split, or all if there are fewer: [n, 32000] int16."""
    parts = []
    for shard in lake.ready(split):
        missing = min(shard.num_clips, num_clips - sum(map(len, parts)))
        if missing < 1:
            break
        samples = np.empty((missing, CLIP_SAMPLES), np.int16)  # [n, 32000]
        try:
            verify_shard(shard.path, shard.num_clips, shard.sha256)
            fd = os.open(shard.path, os.O_RDONLY)
        except (ShardBroken, FileNotFoundError) as e:
            if split == RECENT and not shard.path.exists():  # it retired since the ledger was asked
                continue
            raise UserError(
                f"validation shard {shard.path} is not what the ledger says: {e}; "
                f"to see all such: python datalake/run_lake.py fsck --lake {lake.root}"
            ) from e
        try:
            read_clips(fd, range(missing), samples)
        finally:
            os.close(fd)
        parts.append(samples)
    return np.concatenate(parts) if parts else np.empty((0, CLIP_SAMPLES), np.int16)
