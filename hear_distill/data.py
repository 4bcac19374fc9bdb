"""Finished shards in, shuffled batches out; and the account of which clips were trained on.

in:   shards that the ledger leases to this trainer
out:  Batch(samples [B, 32000] int16, ids); coverage: a bit per clip, for the checkpoint

Each batch is drawn without replacement from the unread clips of several open shards. The draw depends on the seed, the
number of the batch and what is open, so a trainer that resumes from a checkpoint draws what it would have drawn.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hear_distill.audio import CLIP_SAMPLES
from hear_distill.files import UserError
from hear_distill.lake import Lake
from hear_distill.locks import Owner
from hear_distill.schema import RECENT, Shard
from hear_distill.shards import ShardBroken, read_clips, verify_shard


@dataclass(frozen=True)
class Batch:
    """B clips and where they stand."""

    samples: np.ndarray
    """[B, 32000] int16"""
    ids: list[tuple[int, int]]
    """(shard, clip) of each row"""


class OpenShard:
    """A leased shard: its file while clips are unread, and two bits per clip, handed out and trained on."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        bits = np.unpackbits(np.frombuffer(shard.covered, np.uint8), bitorder="little")[: shard.num_clips].astype(bool)
        self.is_trained = np.zeros(shard.num_clips, bool)
        self.is_trained[: len(bits)] = bits
        self.is_read = self.is_trained.copy()
        self.fd = os.open(shard.path, os.O_RDONLY)

    def unread(self) -> np.ndarray:
        """Indices of the clips that no batch has held yet, ascending."""
        return np.flatnonzero(~self.is_read)

    def hand_out(self, clips: Sequence[int]) -> None:
        """Note that a batch holds these clips; after the last unread one the file is given back."""
        self.is_read[clips] = True
        if self.is_read.all():
            self.close()

    def coverage(self) -> bytes:
        """`is_trained`, a bit per clip, least significant first."""
        return np.packbits(self.is_trained, bitorder="little").tobytes()

    def close(self) -> None:
        """Give the file back; the account stays until the ledger has retired the shard."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class LakeReader:
    """Draws batches across several open shards of one lake, each clip once."""

    def __init__(
        self, lake: Lake, owner: Owner, *, run: str, seed: int, num_open: int, state: Mapping[str, Any] | None = None
    ) -> None:
        """`state` is what `state()` returned when the surviving checkpoint was made; None begins a new history."""
        self.lake, self.owner, self.run, self.seed, self.num_open = lake, owner, run, seed, num_open
        state = state or {"num_batches": 0, "coverage": {}}
        self.num_batches: int = state["num_batches"]
        self.shards: dict[int, OpenShard] = {}  # leased and not yet retired, in the order of their leases
        for shard in lake.begin_run(owner.id, run, state["coverage"]):
            self._open(shard)

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold to go on from here: plain numbers and bytes."""
        return {"num_batches": self.num_batches, "coverage": self.coverage()}

    def coverage(self) -> dict[int, bytes]:
        """Trained clips of every shard that is not retired yet, in the order of the leases."""
        return {shard_id: shard.coverage() for shard_id, shard in self.shards.items()}

    def next_batch(self, batch_size: int) -> Batch | None:
        """`batch_size` clips; None if the open shards hold fewer and no other is ready now."""
        self._open_more(batch_size)
        unread = {shard_id: shard.unread() for shard_id, shard in self.shards.items() if shard.fd >= 0}
        ends = np.cumsum([len(clips) for clips in unread.values()])
        if not unread or ends[-1] < batch_size:
            return None
        rng = np.random.default_rng([self.seed, self.num_batches])
        drawn = np.sort(rng.choice(ends[-1], batch_size, replace=False))  # positions in all unread clips, end to end
        samples = np.empty((batch_size, CLIP_SAMPLES), np.int16)  # [B, 32000]
        ids: list[tuple[int, int]] = []
        for (shard_id, clips), end in zip(unread.items(), ends, strict=True):
            chosen = clips[drawn[(drawn >= end - len(clips)) & (drawn < end)] - (end - len(clips))].tolist()
            read_clips(self.shards[shard_id].fd, chosen, samples[len(ids) : len(ids) + len(chosen)])
            self.shards[shard_id].hand_out(chosen)
            ids += [(shard_id, clip) for clip in chosen]
        self.num_batches += 1
        return Batch(samples, ids)

    def _open_more(self, batch_size: int) -> None:
        """Lease ready shards until `num_open` have unread clips, and these are enough for a batch."""
        while sum(shard.fd >= 0 for shard in self.shards.values()) < self.num_open or self.num_unread() < batch_size:
            shard = self.lake.lease(self.owner.id, self.run)
            if shard is None:
                return
            self._open(shard)

    def _open(self, shard: Shard) -> None:
        """Check a shard against its hash, once per lease, then open it; what fails is quarantined and counted."""
        try:
            verify_shard(shard.path, shard.num_clips, shard.sha256)
        except ShardBroken as e:
            print(f"WARNING: shard {shard.id} is quarantined: {e}", file=sys.stderr)
            self.lake.quarantine(shard.id, shard.split, str(e))
            return
        opened = self.shards[shard.id] = OpenShard(shard)
        opened.hand_out([])

    def mark_trained(self, ids: Sequence[tuple[int, int]]) -> None:
        """These clips were part of an optimiser step."""
        for shard_id, clip in ids:
            self.shards[shard_id].is_trained[clip] = True

    def record_checkpoint(self) -> None:
        """Tell the ledger that a checkpoint with the present coverage is durable, and let go of what it retired."""
        for shard_id in self.lake.record_checkpoint(self.owner.id, self.coverage()):
            if shard_id in self.shards:
                self.shards.pop(shard_id).close()

    def report(self) -> None:
        """Let the supervisor see how far the open shards are read."""
        self.lake.report_read({shard_id: int(shard.is_read.sum()) for shard_id, shard in self.shards.items()})

    def holds_trained_shards(self) -> bool:
        """Whether checkpoints would free room in the lake."""
        return any(shard.is_trained.all() for shard in self.shards.values())

    def num_unread(self) -> int:
        """Clips of open shards that no batch has held: fewer than a batch when the source is drained."""
        return sum(int((~shard.is_read).sum()) for shard in self.shards.values())

    def is_drained(self) -> bool:
        """Whether no shard can be leased any more, now or later."""
        return self.lake.is_drained()

    def close(self) -> None:
        """Leave in good order: what the newest checkpoint does not cover is ready for the next trainer."""
        for shard in self.shards.values():
            shard.close()
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
