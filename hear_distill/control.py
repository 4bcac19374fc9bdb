"""How many streamers should run now: the published control of a reservoir, as arithmetic alone.

in:   what the supervisor sees every few seconds: a clock, unread clips, clips handed out, room, disk, speed of a worker
out:  a number of workers

Unread clips are the level. `full` is the level at which the cap left no room the last time; before the first time, it
is what fits under the cap.

    no room       stop all; start again when half of the clips are read                      (level <= 0.5 full)
    urgent        all workers, from a quarter of the level, or a trainer that waits, up to half
    filling       consumption x HEADROOM / rate of a worker, rounded up:   the level rises, slowly
    coasting      consumption / rate of a worker, rounded down:            the level falls, more slowly still

It fills up to 0.9 and coasts down to 0.5, so that the lake seldom becomes full, and one worker comes or goes where all
would stop and start. With r clips/s of a worker, numbers that differ by one take at least 1.6 full / r seconds from 0.9
to 0.5 and back, however fast the consumer: with r = 300 and the 900,000 clips of 60 GiB, 1.5 changes an hour at most.

In between, the number stays unless the rates are outside of a dead band for DWELL_S, and then moves to the edge of it.
It knows neither processes nor SQLite: tests/test_control.py runs hours of it in a second.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

HEADROOM = 1.10  # as published: a tenth more than is consumed
RESTART_AT = 0.5  # of `full`, as published
COAST_AT = 0.9
URGENT_AT = 0.25
DEAD_BAND = 0.06  # of the number that the rates ask for, up and down; below HEADROOM, so that a lake still fills
DWELL_S = 80.0  # that the rates must be outside of the dead band: half a minute without steps is no change in demand
MEMORY_S = 20.0  # of the consumption; with the dwell time, a step in demand is answered within three minutes
PATIENCE_S = 10.0  # a trainer reports what it was handed every few seconds
DISK_PAUSE_S = 60.0  # without streamers, once the disk was too full

Mode = Literal["urgent", "filling", "coasting", "full", "no disk"]


@dataclass(frozen=True, kw_only=True)
class Look:
    """What is to be seen now."""

    time_s: float
    """of a monotonic clock"""
    unread: int
    """clips that no trainer was handed"""
    handed_out: int
    """clips that a trainer was ever handed; may fall when one dies, since it is handed them again"""
    worker_rate: float | None
    """clips per second of one worker at work; None if none has finished a shard yet"""
    has_room: bool
    """whether another shard fits under the cap"""
    has_disk: bool
    """whether the disk is above its floor"""
    is_waiting: bool
    """whether the trainer waits for data"""
    num_useful: int
    """workers that have something to do, those that run included"""


class Rate:
    """Of a counter, per second, forgetting exponentially; the first seconds are averaged evenly.

    A counter that moves in jumps is measured from jump to jump, so the rate does not depend on how long ago the last
    one was; one that stands still for longer than PATIENCE_S is believed.
    """

    def __init__(self, memory_s: float) -> None:
        self.memory_s = memory_s
        self.last: tuple[float, int] | None = None
        self.seen_s = 0.0
        self.per_s = 0.0

    def update(self, time_s: float, count: int) -> float:
        """The rate, after one more look. A counter that fell begins anew."""
        if self.last is None:
            self.last = (time_s, count)
        elapsed_s, change = time_s - self.last[0], count - self.last[1]
        if elapsed_s > 0 and (change or elapsed_s > PATIENCE_S):
            self.seen_s += elapsed_s
            share = max(1 - math.exp(-elapsed_s / self.memory_s), elapsed_s / self.seen_s)
            self.per_s += share * (max(0, change) / elapsed_s - self.per_s)
            self.last = (time_s, count)
        return self.per_s


def rate_of_worker(statistics: Iterable[Mapping[str, Any]]) -> float | None:
    """Clips per second of one worker, from what the ledger keeps of the newest shards; None if it keeps none.

    Each shard tells how long its worker was busy with it. So neither the start of a process, nor the moments at which
    shards happen to be finished, nor the number of workers has a part in it.
    """
    shards = [(shard["clips"], sum(shard["clock_s"].values())) for shard in statistics]
    seconds = sum(busy_s for _, busy_s in shards)
    return sum(clips for clips, _ in shards) / seconds if seconds > 0 else None


@dataclass
class Law:
    """The control, and what it must remember."""

    min_workers: int
    """while the lake is not full"""
    max_workers: int
    full: float
    """clips; to begin with, what fits under the cap"""
    mode: Mode = "urgent"
    num_workers: int = 0
    """the last answer, before `num_useful` limits it"""
    times_full: int = 0
    times_restarted: int = 0
    consumption: Rate = field(default_factory=lambda: Rate(MEMORY_S))
    outside_since: float | None = None
    """when the rates left the dead band"""
    no_disk_until: float = -math.inf

    @property
    def is_filling(self) -> bool:
        """Whether the lake is not full, nor was since half of it was read."""
        return self.mode != "full"

    def workers_wanted(self, look: Look) -> int:
        """One decision. In mode `full` the answer is 0: who runs may finish the shard that is reserved."""
        consumption = self.consumption.update(look.time_s, look.handed_out)
        before = self.mode
        self.mode = self._next_mode(look)
        if self.mode in ("full", "no disk"):
            self.num_workers = 0
        elif self.mode == "urgent" or not look.worker_rate:
            self.num_workers = self.max_workers
        else:
            self._follow(consumption / look.worker_rate, look.time_s, is_new=self.mode != before)
        return min(self.num_workers, look.num_useful)

    def _next_mode(self, look: Look) -> Mode:
        """From the level alone; counts how often the lake was full."""
        if not look.has_disk:
            self.no_disk_until = look.time_s + DISK_PAUSE_S
        if look.time_s < self.no_disk_until:
            return "no disk"
        if self.mode == "full":
            self.full = max(self.full, look.unread)  # the last shards are still being finished
            is_over = look.has_room and (look.unread <= RESTART_AT * self.full or look.is_waiting)
            self.times_restarted += is_over
            if not is_over:
                return "full"
        elif not look.has_room:
            self.times_full += 1
            self.full = look.unread
            return "full"
        level = look.unread / max(1.0, self.full)
        if look.is_waiting or level <= URGENT_AT or (self.mode == "urgent" and level < RESTART_AT):
            return "urgent"
        if level >= COAST_AT or (self.mode == "coasting" and level > RESTART_AT):
            return "coasting"
        return "filling"

    def _follow(self, needed: float, time_s: float, is_new: bool) -> None:
        """Bring the number into the dead band: at once in a new mode, else when it was outside for DWELL_S.

        `needed` is consumption by rate of a worker.
        """

        def rounded(factor: float) -> int:
            number = math.floor(factor * needed) if self.mode == "coasting" else math.ceil(factor * HEADROOM * needed)
            return min(self.max_workers, max(self.min_workers, number))

        fewest, most = rounded(1 - DEAD_BAND), rounded(1 + DEAD_BAND)
        if is_new and self.mode == "coasting":
            most = rounded(1.0)  # one too many would not let the level fall
        nearest = min(most, max(fewest, self.num_workers))
        if nearest == self.num_workers:
            self.outside_since = None
            return
        if self.outside_since is None:
            self.outside_since = time_s
        if is_new or time_s - self.outside_since >= DWELL_S:
            self.num_workers = nearest
            self.outside_since = None
