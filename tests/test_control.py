"""The control of the streamers against a simulated lake: hours of it in simulated time, nothing sleeps.

The simulation knows nothing of the law but its answer. Workers take time to start, finish whole shards at a rate that
varies from shard to shard, and reserve room before they fill it; the trainer takes what it wants while there is any,
and gives room back at its checkpoints only.
"""

import math
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pytest

from hear_distill.control import Law, Look, Rate, rate_of_worker

STEP_S = 0.5
HOUR_S = 3600.0
SHARD_CLIPS = 1_000
CLIPS_IN_60_GIB = 60 * 2**30 // 66_560


@dataclass
class Worker:
    """A simulated streamer."""

    ready_s: float
    """when its process has started"""
    speed: float
    """clips per second, of this shard"""
    clips: float = 0.0
    """of the shard that it fills"""


@dataclass
class World:
    """A lake, streamers and a trainer, stepped through simulated time."""

    demand: float
    """clips per second that the trainer would take"""
    rate: float = 300.0
    """of one worker, on average"""
    max_workers: int = 4
    cap_clips: float = CLIPS_IN_60_GIB
    noise: float = 0.1
    """standard deviation of a worker's speed from shard to shard, as a share"""
    start_up_s: float = 4.0
    shard_clips: float = SHARD_CLIPS
    save_s: float = 60.0
    """between checkpoints; the room of a clip comes back two of them later"""
    report_s: float = 3.0
    """between the trainer's reports of what it was handed"""
    pause: tuple[float, float] = (math.inf, 0.0)
    """every so often the trainer validates for so long"""
    is_reachable: bool = True
    time_s: float = 0.0
    unread: float = 0.0
    handed_out: float = 0.0
    reported: float = 0.0
    held: list[float] = field(default_factory=lambda: [0.0, 0.0])
    """trained clips that no checkpoint, or only the newest, covers"""
    waited_s: float = 0.0
    is_waiting: bool = False
    workers: list[Worker] = field(default_factory=list)
    statistics: list[dict] = field(default_factory=list)
    worker_rate: float | None = None
    wanted: list[int] = field(default_factory=list)
    """the law's answers, one for each step"""
    present: list[int] = field(default_factory=list)
    highest_clips: float = 0.0

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(5)
        self.law = Law(1, self.max_workers, self.cap_clips)

    def used(self) -> float:
        return self.unread + sum(self.held) + len(self.workers) * self.shard_clips

    def has_room(self) -> bool:
        return self.used() + self.shard_clips <= self.cap_clips

    def run(self, seconds: float, **changes: object) -> "World":
        for name, value in changes.items():
            setattr(self, name, value)
        for _ in range(round(seconds / STEP_S)):
            self.step()
        return self

    def step(self) -> None:
        self.time_s += STEP_S
        self._train()
        look = Look(
            time_s=self.time_s,
            unread=round(self.unread + self.handed_out - self.reported),
            handed_out=round(self.reported),
            worker_rate=self.worker_rate,
            has_room=self.has_room(),
            has_disk=True,
            is_waiting=self.is_waiting,
            num_useful=self.max_workers,
        )
        wanted = self.law.workers_wanted(look)
        while self.is_reachable and len(self.workers) < wanted and self.has_room():
            self.workers.append(Worker(self.time_s + self.start_up_s, self._speed()))
        is_finishing = self.law.mode == "full" and not look.has_room
        while len(self.workers) > wanted and not is_finishing:
            self._publish(self.workers.pop())
        self._cut()
        self.wanted.append(wanted)
        self.present.append(len(self.workers))
        self.highest_clips = max(self.highest_clips, self.used())

    def _train(self) -> None:
        pause_every_s, pause_s = self.pause
        if self.time_s % self.save_s < STEP_S or (self.is_waiting and not self.has_room()):
            self.held = [self.held[1], 0.0]
        if self.demand == 0 or self.time_s % pause_every_s < pause_s:
            return
        taken = min(self.unread, self.demand * STEP_S)
        self.is_waiting = taken < self.demand * STEP_S
        self.waited_s += STEP_S * (1 - taken / (self.demand * STEP_S))
        self.unread -= taken
        self.handed_out += taken
        self.held[1] += taken
        if self.time_s % self.report_s < STEP_S or self.is_waiting:
            self.reported = self.handed_out

    def _cut(self) -> None:
        for worker in list(self.workers):
            if not self.is_reachable:
                self._publish(worker)
                self.workers.remove(worker)
            elif self.time_s >= worker.ready_s:
                worker.clips += worker.speed * STEP_S
                if worker.clips >= self.shard_clips:
                    excess, worker.clips = worker.clips - self.shard_clips, self.shard_clips
                    self._publish(worker)
                    self.workers.remove(worker)
                    if self.has_room():
                        self.workers.append(Worker(self.time_s, self._speed(), excess))

    def _speed(self) -> float:
        return self.rate / max(0.2, self.rng.normal(1.0, self.noise))

    def _publish(self, worker: Worker) -> None:
        self.unread += worker.clips
        if worker.clips:
            self.statistics.append({"clips": worker.clips, "clock_s": {"decoding": worker.clips / worker.speed}})
            self.worker_rate = rate_of_worker(self.statistics[-64:])

    def share_waited(self) -> float:
        return self.waited_s / self.time_s


def changes(numbers: list[int]) -> int:
    """How often the answer was another one than half a second before."""
    return sum(a != b for a, b in pairwise(numbers))


def changes_in_an_hour(world: World, after_s: float = HOUR_S) -> float:
    """Of the answer, once the lake has been filled for the first time."""
    begin = round(after_s / STEP_S)
    return changes(world.wanted[begin:]) / ((world.time_s - after_s) / HOUR_S)


STEADY = {
    "four workers": {},
    "sixteen workers and a disk for them": {"max_workers": 16, "cap_clips": 2 * CLIPS_IN_60_GIB},
    "eight fast workers": {"max_workers": 8, "rate": 500.0},
    "one worker": {"max_workers": 1, "rate": 100.0},
    "slow shards": {"rate": 10.0, "cap_clips": CLIPS_IN_60_GIB / 10},
    "slow starts": {"start_up_s": 60.0},
    "a noisy rate": {"noise": 0.5},
    "short validations": {"pause": (15.0, 3.0)},
    "long validations": {"pause": (600.0, 30.0), "report_s": 8.0},
}


def steady(share: float, **more: object) -> World:
    """Four hours of a trainer that takes this share of what all workers can deliver."""
    world = World(demand=0.0, **more)
    world.demand = share * world.max_workers * world.rate
    return world.run(4 * HOUR_S)


@pytest.mark.parametrize("more", STEADY.values(), ids=STEADY)
def test_at_80_percent_of_what_the_workers_deliver_the_trainer_hardly_waits_and_the_workers_hardly_change(more):
    world = steady(0.8, **more)
    assert world.share_waited() <= 0.01
    assert changes_in_an_hour(world) <= 4
    assert world.highest_clips <= world.cap_clips


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.66, 0.95])
def test_so_it_is_at_other_shares(share):
    world = steady(share)
    assert world.share_waited() <= 0.01 and changes_in_an_hour(world) <= 4


def test_a_lake_thirty_times_as_small_feeds_its_trainer_as_well():
    """Two gibibytes, 25 seconds of data: the workers change more often, as they must."""
    world = steady(0.8, cap_clips=CLIPS_IN_60_GIB / 30, save_s=3.0)
    assert world.share_waited() <= 0.01
    assert changes_in_an_hour(world) <= 60
    assert world.highest_clips <= world.cap_clips


@pytest.mark.parametrize("level", [0.3, 0.7], ids=["filling", "well filled"])
@pytest.mark.parametrize(("before", "after"), [(300, 960), (960, 300), (500, 700), (1100, 100), (0, 960)])
def test_three_minutes_after_a_step_in_demand_the_workers_suit_it_and_stay(before, after, level):
    world = World(demand=before, save_s=10.0)
    world.law.mode, world.unread = "filling", level * world.cap_clips
    world.run(300.0).run(180.0, demand=after)
    settled, needed = world.wanted[-1], after / world.rate
    assert max(1, math.floor(needed)) <= settled <= max(1, min(4, math.ceil(1.17 * needed)))
    settling = world.wanted[-round(180.0 / STEP_S) :]
    assert changes(settling) <= 3
    level_then = world.unread / world.law.full
    world.run(120.0)
    stays = world.wanted[-round(120.0 / STEP_S) :]
    assert set(stays) == {settled} or level_then < 0.25 or level_then > 0.85


def test_a_consumer_faster_than_all_workers_gets_all_of_them_all_the_time():
    world = World(demand=3_000.0).run(2 * HOUR_S)
    assert set(world.wanted) == {4}
    assert world.handed_out > 0.97 * 4 * world.rate * world.time_s


def test_an_outage_is_followed_by_all_workers_until_half_is_filled_and_the_trainer_waits_for_no_more_than_it_must():
    world = World(demand=800.0).run(2 * HOUR_S)
    stock_s = world.unread / world.demand
    waited_before, unread_before = world.waited_s, world.unread
    world.run(900.0, is_reachable=False)
    assert world.waited_s - waited_before == pytest.approx(max(0.0, 900.0 - stock_s), abs=5.0)
    assert world.unread < unread_before and world.wanted[-1] == 4
    begin = len(world.wanted)
    world.run(HOUR_S, is_reachable=True)
    assert world.unread > 0.4 * world.law.full
    assert changes(world.wanted[begin:]) <= 2


def look(time_s: float = 0.0, unread: int = 500, **more: object) -> Look:
    """Of a lake of 1,000 clips with room and disk, at rest."""
    seen = {"handed_out": 0, "worker_rate": 10.0, "has_room": True, "has_disk": True, "is_waiting": False}
    return Look(**{"time_s": time_s, "unread": unread, "num_useful": 4, **seen, **more})


def test_a_full_lake_stops_all_workers_and_half_of_what_was_unread_then_starts_them_again():
    law = Law(1, 4, 1_000)
    assert law.workers_wanted(look(0, 0)) == 4
    assert law.workers_wanted(look(1, 700, has_room=False)) == 0 and law.mode == "full"
    assert law.workers_wanted(look(2, 800, has_room=False)) == 0  # the last shards came in
    assert law.workers_wanted(look(3, 401)) == 0
    assert law.workers_wanted(look(4, 400, has_room=False)) == 0
    assert (law.times_full, law.times_restarted, law.is_filling) == (1, 0, False)
    assert law.workers_wanted(look(5, 400)) > 0
    assert (law.times_full, law.times_restarted, law.is_filling) == (1, 1, True)


def test_a_full_lake_whose_trainer_waits_for_more_than_is_unread_is_filled_again():
    law = Law(1, 4, 1_000)
    law.workers_wanted(look(0, 700, has_room=False))
    assert law.workers_wanted(look(1, 690)) == 0
    assert law.workers_wanted(look(2, 690, is_waiting=True)) == 4


@pytest.mark.parametrize(("needed", "filling", "coasting"), [(2.9, 4, 2), (3.05, 4, 3), (3.2, 4, 3), (0.5, 1, 1)])
def test_while_it_fills_the_workers_deliver_more_than_is_consumed_and_while_it_coasts_no_more(
    needed, filling, coasting
):
    law, answers = Law(1, 4, 1_000), {}
    for second in range(700):
        unread = min(950, 300 + second)
        law.workers_wanted(look(second, unread, handed_out=round(10 * needed * second)))
        answers[law.mode] = law.num_workers
    assert (answers["filling"], answers["coasting"]) == (filling, coasting)


@pytest.mark.parametrize("min_workers", [1, 2, 3])
def test_a_lake_that_is_not_full_has_at_least_the_fewest_workers(min_workers):
    law = Law(min_workers, 4, 1_000)
    for second in range(300):
        wanted = law.workers_wanted(look(second, 600))  # nobody consumes
    assert wanted == min_workers


@pytest.mark.parametrize("num_useful", [0, 1, 3])
def test_no_more_workers_are_wanted_than_have_something_to_do(num_useful):
    assert Law(2, 4, 1_000).workers_wanted(look(0, 0, num_useful=num_useful)) == num_useful


def test_a_disk_below_its_floor_has_no_workers_for_a_minute_at_least():
    law = Law(1, 4, 1_000)
    answers = [law.workers_wanted(look(second, 0, has_disk=second != 10)) for second in range(100)]
    assert answers == [4] * 10 + [0] * 60 + [4] * 30


def test_the_rate_of_a_counter_forgets_and_takes_a_fall_for_a_new_beginning():
    rate = Rate(memory_s=20.0)
    rate.update(0.0, 0)
    assert rate.update(2.0, 20) == pytest.approx(10.0)
    for second in range(3, 200):
        per_s = rate.update(second, 20 + 50 * (second - 2))
    assert per_s == pytest.approx(50.0, rel=0.01)
    after_fall = rate.update(200, 0)
    assert 40 < after_fall < per_s
    assert rate.update(200, 10**9) == after_fall  # no time has passed


def test_the_rate_of_a_counter_that_jumps_is_steady_and_one_that_stands_still_comes_to_nothing():
    rate = Rate(memory_s=20.0)
    seen = [rate.update(0.5 * i, 1_000 * (i // 10)) for i in range(400)]  # 1,000 every five seconds
    assert seen[50:] == pytest.approx([200.0] * 350)
    for i in range(400, 800):
        rate.update(0.5 * i, 39_000)
    assert rate.per_s < 0.02


def test_the_rate_of_a_worker_is_that_of_all_its_shards_together():
    shards = [{"clips": 100, "clock_s": {"reading": 1.0, "decoding": 3.0}}, {"clips": 20, "clock_s": {"reading": 2.0}}]
    assert rate_of_worker(shards) == pytest.approx(120 / 6)
    assert rate_of_worker([]) is None and rate_of_worker([{"clips": 0, "clock_s": {}}]) is None
