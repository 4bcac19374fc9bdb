"""The clips of a training run, chunk by chunk: from the lake onto the device, as the spectrograms that both models see.

in:   batches of int16 clips from a LakeReader, one in each rank
out:  spectrograms on the device; the part of a checkpoint that says which clips of which lake were trained on

Before each chunk, while the device is still at the one before it, every rank gets its batch and tells the others how
things are with it. All see the same, so all decide the same: learn from the chunk, wait, save, stop, or deal the open
shards anew. A batch that was fetched is kept until all have one.

B clips of a chunk   k clips of a sound
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hear_distill import sample
from hear_distill.augment import cut_short
from hear_distill.data import NOTHING_READ, Batch, Drawing, LakeReader, ordinary_memory
from hear_distill.frontend import MelPcen
from hear_distill.lake import Lake
from hear_distill.locks import Owner
from hear_distill.ranks import ALONE, Ranks
from hear_distill.runlog import StopRequest
from hear_distill.shares import PARTS, Share, dealt, num_untrained, refuse_overlap, taken_up

ClipId = tuple[int, int]  # (shard, clip)
Name = tuple[int, int, int]  # (number of the lake in this run, shard, clip): lakes number their shards alike


def pinned_memory(shape: tuple[int, int]) -> np.ndarray:
    """[B, 32000] int16, not filled; the GPU fetches it by itself while we go on."""
    return torch.empty(shape, dtype=torch.int16, pin_memory=True).numpy()


@dataclass
class View:
    """How a run sees its clips: front end, and which of them it cuts short."""

    frontend: MelPcen
    device: torch.device
    seed: int
    pad_share: float
    fetched: torch.cuda.Event | None = None
    """when the GPU has the last samples, whose buffer may then be filled anew"""

    def __call__(self, samples: np.ndarray, ids: Sequence[ClipId]) -> Tensor:
        """[B, 32000] int16 -> [B, 1, 192, 128]; int16 crosses the bus, the rest happens on the device."""
        audio, _ = cut_short(self._fetch(samples), ids, seed=self.seed, share=self.pad_share)
        return self.frontend(audio)

    def long(self, samples: np.ndarray, clips_per_sound: int) -> tuple[Tensor, Tensor]:
        """[B, 32000] int16 -> whole sounds [B / k, 1, 192 k, 128], and their windows [B, 1, 192, 128]; none is cut."""
        audio = self._fetch(samples)
        return self.frontend(audio.view(len(audio) // clips_per_sound, -1)), self.frontend(audio)

    def _fetch(self, samples: np.ndarray) -> Tensor:
        """[B, 32000] int16 -> the same as float, on the device."""
        audio = torch.from_numpy(samples).to(self.device, non_blocking=True)  # [B, 32000] int16
        self.fetched = torch.cuda.current_stream().record_event() if audio.is_cuda else None
        return audio.float() / 32768

    def wait_for_copy(self) -> None:
        """The GPU is at the last chunk then, so it has work while we prepare the next."""
        if self.fetched:
            self.fetched.synchronize()


@dataclass(frozen=True)
class Standing:
    """How things are with one rank, as numbers that it tells the others."""

    is_ready: int
    """it has a batch"""
    must_stop: int
    """it was asked to"""
    is_dry: int
    """it has no batch and can lease no shard, now or later"""
    lacks_room: int
    """it has no batch, and its lake is full"""
    holds_trained: int
    """checkpoints would make room in its lake"""


class Feed:
    """Chunks in the order in which the reader draws them, and patience while there are none."""

    def __init__(
        self,
        lake: Lake,
        owner: Owner,
        drawing: Drawing,
        view: View,
        ranks: Ranks = ALONE,
        state: dict[str, Any] | None = None,
        allocate: Callable[[tuple[int, int]], np.ndarray] = ordinary_memory,
    ) -> None:
        """`state` is what `state()` returned when the surviving checkpoint was made; None begins a new history."""
        self.lake, self.owner, self.view, self.ranks, self.allocate = lake, owner, view, ranks, allocate
        self.drawing = replace(drawing, rank=ranks.rank)
        state = state or {"num_batches": 0, "lakes": {}}
        settings = ranks.gather(lake.settings())
        refuse_overlap(settings)
        self.lake_of_rank = [its_settings["id"] for its_settings in settings]
        self.left_alone = {name: shares for name, shares in state["lakes"].items() if name not in self.lake_of_rank}
        """of lakes that nobody reads in this process; a later one may"""
        self.lakes: list[str] = list(dict.fromkeys([*state["lakes"], *self.lake_of_rank]))
        self.mates = [rank for rank, name in enumerate(self.lake_of_rank) if name == self.lake_of_rank[ranks.rank]]
        """ranks that read this lake"""
        self.place = self.mates.index(ranks.rank)
        self.number = self.lakes.index(self.lake_of_rank[ranks.rank])
        self.held: Batch | None = None
        """fetched, while others have none"""
        self.standings = ranks.size * [Standing(0, 0, 0, 0, 0)]
        """of all ranks, when they last met"""
        self.num_pending = 0
        """clips that were handed out for a step that is not whole yet"""
        self.waited_s = 0.0
        """for data, since this process began"""
        self.num_long, self.num_broken_up = state.get("lengths", (0, 0))
        """clips of longer sounds, and clips that were to be part of one, since these were last taken"""
        self.covered_lengths = (self.num_long, self.num_broken_up)
        """of whole steps"""
        shares = state["lakes"].get(self.lakes[self.number], [])
        self._open(taken_up(shares, len(self.mates))[self.place], state["num_batches"])

    def _open(self, share: Share, num_batches: int) -> None:
        """Lease these shards; nobody leases others before all have done so."""
        state = {**NOTHING_READ, **share, "num_batches": num_batches}
        self.reader = LakeReader(self.lake, self.owner, self.drawing, state, self.allocate)
        self.covered = self.reader.state()
        """of this rank, after the last whole step"""
        self.ranks.meet()

    # ---- the first clips ----

    def has_sample(self, num_clips: int, stop: StopRequest) -> bool | None:
        """Whether the first clips of a run, so many in all, can be looked at; None if they never can, or if we should
        stop."""
        here = self._share_of(num_clips)
        numbers = self.ranks.tell([bool(stop), sample.has_sample(self.lake, here), sample.num_ready(self.lake)])
        must_stop, has_all, counts = zip(*numbers, strict=True)
        if any(must_stop) or (all(has_all) and min(counts) < 2):
            return None
        return all(has_all)

    def sample(self, num_clips: int) -> Iterator[tuple[list[Name], Tensor]]:
        """This rank's part of them: names and spectrograms [B, 1, 192, 128]."""
        clips = sample.first_clips(self.lake, self._share_of(num_clips), self.drawing.batch_size)
        for ids, samples in islice(clips, self.place, None, len(self.mates)):
            yield self.names(ids), self.view(samples, ids)

    def _share_of(self, num_clips: int) -> int:
        """What this lake gives to so many clips of all lakes."""
        return -(-num_clips * len(self.mates) // self.ranks.size)

    # ---- chunks ----

    def next(self, stop: StopRequest, on_wait: Callable[[], None]) -> Batch | None:
        """The next chunk; None when a lake is drained or we should stop, which `standings` tell.

        `on_wait` is called, again and again, while a lake is starved. A step that has begun is finished before a stop
        if there is data for it. All ranks get a chunk, or none does.
        """
        self.view.wait_for_copy()
        began = time.monotonic()
        while True:
            self._look(stop)
            is_ready = all(standing.is_ready for standing in self.standings)
            if self.is_stopping() and not (is_ready and self.num_pending):
                break
            if is_ready or any(standing.is_dry for standing in self.standings):
                break
            on_wait()
        self.waited_s += time.monotonic() - began
        if not is_ready or (self.is_stopping() and not self.num_pending):
            return None
        batch, self.held = self.held, None
        return batch

    def _look(self, stop: StopRequest) -> None:
        """Fetch a batch, if there is none yet, and meet the others."""
        if self.held is None and not (stop and not self.num_pending):
            self.held = self.reader.next_batch()
        is_short = self.held is None
        mine = Standing(
            is_ready=not is_short,
            must_stop=bool(stop),
            is_dry=is_short and self.reader.is_drained(),
            lacks_room=is_short and not self.lake.has_room(),
            holds_trained=self.reader.holds_trained_shards(),
        )
        self.standings = [Standing(*numbers) for numbers in self.ranks.tell(list(vars(mine).values()))]

    def is_stopping(self) -> bool:
        """Whether a rank was asked to stop, so that all do."""
        return any(standing.must_stop for standing in self.standings)

    def is_short(self) -> bool:
        """Whether a rank on this lake waits for data."""
        return not all(self.standings[rank].is_ready for rank in self.mates)

    def must_save(self) -> bool:
        """Whether a lake is full of shards that only a checkpoint can release, while one of its ranks waits."""
        standings = list(zip(self.lake_of_rank, self.standings, strict=True))
        short = {name for name, standing in standings if standing.lacks_room}
        return any(standing.holds_trained for name, standing in standings if name in short)

    def spectrogram(self, batch: Batch) -> Tensor:
        """[B, 1, 192, 128] of a chunk that the present step learns from."""
        self.num_pending += len(batch.ids)
        self.num_broken_up += batch.num_broken_up
        return self.view(batch.samples, batch.ids)

    def long_spectrograms(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What `View.long` makes of a chunk of longer sounds."""
        self.num_pending += len(batch.ids)
        self.num_long += len(batch.ids)
        return self.view.long(batch.samples, batch.clips_per_sound)

    def take_length_counts(self) -> dict[str, int]:
        """Since the last call: clips that were learned from in longer sounds, and clips of sounds that were broken up
        for want of enough of one length."""
        counts = {"long_clips": self.num_long, "broken_up_clips": self.num_broken_up}
        self.num_long = self.num_broken_up = 0
        self.covered_lengths = (0, 0)
        return counts

    def names(self, ids: Sequence[ClipId]) -> list[Name]:
        """What tells these clips from those of other lakes."""
        return [(self.number, shard, clip) for shard, clip in ids]

    def mark_trained(self, names: Sequence[Name]) -> None:
        """The step is whole; these were its clips, of this rank."""
        self.reader.mark_trained([(shard, clip) for _, shard, clip in names])
        self.num_pending, self.covered = 0, self.reader.state()
        self.covered_lengths = (self.num_long, self.num_broken_up)

    # ---- books ----

    def state(self) -> dict[str, Any]:
        """For the checkpoint: of each lake, the share of each rank that reads it, after the last whole step."""
        read = self._by_lake({part: self.covered[part] for part in PARTS})
        return {
            "num_batches": self.covered["num_batches"],
            "lengths": self.covered_lengths,
            "lakes": {name: read[name] if name in read else self.left_alone[name] for name in self.lakes},
        }

    def _by_lake(self, share: Share) -> dict[str, list[Share]]:
        """The shares of all ranks, by the lake that they read."""
        shares: dict[str, list[Share]] = {}
        for name, its_share in zip(self.lake_of_rank, self.ranks.gather(share), strict=True):
            shares.setdefault(name, []).append(its_share)
        return shares

    def better_deal(self, num_clips: int) -> Share | None:
        """This rank's share if the shards of lakes with a dry rank are dealt anew, so that none of their ranks has
        less than `num_clips`; None if that is not possible. On all ranks or on none.

        What others have leased since the last whole step is dealt as well: of a small lake, that may be all there is.
        """
        lakes = self.state()["lakes"]
        dry = {self.lake_of_rank[rank] for rank, standing in enumerate(self.standings) if standing.is_dry}
        ahead = self._by_lake(self.reader.ahead_state(self.covered["coverage"]))
        deals = {name: lakes[name] for name in lakes if name not in dry}
        deals |= {name: dealt([*lakes[name], *ahead[name]], len(lakes[name])) for name in dry}
        if any(num_untrained(share) < num_clips for name in dry for share in deals[name]):
            return None
        return deals[self.lakes[self.number]][self.place]

    def take(self, share: Share) -> None:
        """Go on with this share, from the last whole step, which a checkpoint contains."""
        num_batches = self.covered["num_batches"]
        self.reader.close()
        self.held, self.num_pending = None, 0
        self.ranks.meet()
        self._open(share, num_batches)

    def num_left(self) -> int:
        """Clips of all lakes that no step has seen: of shards that are open, or ready while another rank is dry."""
        num_ready = self.reader.num_ready() if self.place == 0 else 0
        held = self.num_pending + (len(self.held.ids) if self.held else 0)
        mine = self.reader.num_unread() + held + num_untrained(self.reader.ahead_state())
        return sum(count for (count,) in self.ranks.tell([mine + num_ready]))
