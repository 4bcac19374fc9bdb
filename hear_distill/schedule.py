"""Learning rate and batch of the next step: schedules in samples, and controllers that may move what they say.

in:   samples (clips) seen so far, and the noise batch last measured, NaN while unknown
out:  a Plan: the learning rate, and how many chunks the step adds up

A step's batch is num_chunks x chunk_samples clips, so a batch grows by accumulation, and chunks keep their shape.
A controller is a function (control, state, samples, noise_batch) -> (Plan, state). Its state is a dict of numbers for
the checkpoint, {} at first. To add one, write the function and enter it in CONTROLLERS.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

PUBLISHED_LIMITS = (0.1, 1.0)  # of the factor of ema_batch, from the first implementation
NUM_AGREEING = 3  # checks in a row that must ask for twice the batch
MAX_REMAP = 4.0  # of the rate, however much the batch grew: the square root holds for small ratios only


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate over samples, from a linear warm-up on: the same for every batch."""

    shape: Literal["constant", "wsd", "cosine"] = "wsd"
    """constant: hold the peak; wsd: hold it, then fall linearly to zero; cosine: fall to zero along half a wave"""
    peak: float = 5e-4
    """highest learning rate of AdamW, reached after the warm-up"""
    total_samples: int = 25_600_000
    """clips of the whole run"""
    warmup_samples: int = 0
    """clips from rate zero to the peak"""
    decay_samples: int = 0
    """clips from the peak to zero at the end of wsd"""

    def __post_init__(self) -> None:
        if not self.peak > 0:
            raise ValueError(f"the peak of the schedule must be above 0, got {self.peak}")
        if min(self.warmup_samples, self.decay_samples) < 0 or self.total_samples < 1:
            raise ValueError("warmup_samples and decay_samples must not be negative, total_samples must be at least 1")
        if self.warmup_samples + self.decay_samples > self.total_samples:
            raise ValueError(
                f"warmup_samples {self.warmup_samples} + decay_samples {self.decay_samples} exceed total_samples "
                f"{self.total_samples}"
            )
        if self.decay_samples and self.shape != "wsd":
            raise ValueError(f"decay_samples {self.decay_samples} has no meaning for {self.shape}; set it to 0")

    def rate_at(self, samples: float) -> float:
        """Learning rate after that many samples."""
        warm = min(1.0, samples / self.warmup_samples) if self.warmup_samples else 1.0
        return self.peak * warm * self.left_at(samples)

    def left_at(self, samples: float) -> float:
        """What the decay has left of the peak, from 1 down to 0; the warm-up does not count."""
        return COOLING[self.shape](self, samples)


def _hold(schedule: Schedule, samples: float) -> float:
    return 1.0


def _fall_at_the_end(schedule: Schedule, samples: float) -> float:
    return min(1.0, max(0.0, (schedule.total_samples - samples) / max(1, schedule.decay_samples)))


def _fall_along_half_a_wave(schedule: Schedule, samples: float) -> float:
    way = max(1, schedule.total_samples - schedule.warmup_samples)
    gone = min(1.0, max(0.0, (samples - schedule.warmup_samples) / way))
    return (1 + math.cos(math.pi * gone)) / 2


COOLING: dict[str, Callable[[Schedule, float], float]] = {
    "constant": _hold,
    "wsd": _fall_at_the_end,
    "cosine": _fall_along_half_a_wave,
}


class Plan(NamedTuple):
    """What the next step shall do."""

    rate: float
    """learning rate"""
    num_chunks: int
    """backward passes that are added up"""


@dataclass(frozen=True, kw_only=True)
class Control:
    """What every controller starts from."""

    schedule: Schedule
    chunk_samples: int
    """clips of one backward pass, over all ranks"""
    base_chunks: int = 2
    """chunks of the first step: the batch at which the peak was tuned; two or more, so that noise can be measured"""
    max_chunks: int = 32
    """chunks that no controller passes"""
    exponent: float = 1.0
    """of ema_batch: 1 is linear, as published, 0.5 the square root"""
    check_samples: int = 6400
    """clips between two looks at the noise batch: 50 steps of 128, as published; it must be measured as often"""

    def __post_init__(self) -> None:
        if self.chunk_samples < 1 or self.base_chunks < 1 or self.check_samples < 1:
            raise ValueError("chunk_samples, base_chunks and check_samples must be at least 1")
        if self.max_chunks < self.base_chunks:
            raise ValueError(f"max_chunks {self.max_chunks} must not be below base_chunks {self.base_chunks}")
        if not 0.5 <= self.exponent <= 1:
            raise ValueError(f"exponent must lie between 0.5 (square root) and 1 (linear), got {self.exponent}")


State = dict[str, float]
Controller = Callable[[Control, State, int, float], tuple[Plan, State]]


def off(control: Control, state: State, samples: int, noise_batch: float) -> tuple[Plan, State]:
    """The schedule alone."""
    return _plan(control, samples, control.base_chunks), state


def ema_batch(control: Control, state: State, samples: int, noise_batch: float) -> tuple[Plan, State]:
    """The published rule: rate = schedule x (reference / noise batch)^exponent, within PUBLISHED_LIMITS.

    The reference is the first noise batch known after the warm-up, so the factor starts at 1. The published code took
    the batch instead, and a biased estimate that cannot pass twice the batch.
    """
    state = {"factor": 1.0, "reference": math.nan, "checked_at": -math.inf, **state}
    if noise_batch > 0 and _is_time_to_look(control, state, samples):
        reference = noise_batch if math.isnan(state["reference"]) else state["reference"]
        low, high = PUBLISHED_LIMITS
        factor = min(high, max(low, (reference / noise_batch) ** control.exponent))
        state |= {"factor": factor, "reference": reference, "checked_at": samples}
    return _plan(control, samples, control.base_chunks, state["factor"]), state


def batch(control: Control, state: State, samples: int, noise_batch: float) -> tuple[Plan, State]:
    """The batch follows the noise batch, upwards only: it doubles after NUM_AGREEING checks in a row that ask for it.

    The goal is the noise batch itself, where a run takes twice the fewest steps and twice the fewest samples possible
    (arXiv 1812.06162). The rate is the schedule's, mapped to the batch by the square root, Adam's rule below the noise
    batch (arXiv 2205.10287): at the first batch nothing is changed.
    """
    base = control.base_chunks * control.chunk_samples
    state = {"batch_samples": base, "agreeing": 0, "checked_at": -math.inf, **state}
    if _is_time_to_look(control, state, samples):
        doubled = 2 * state["batch_samples"]
        agreeing = state["agreeing"] + 1 if noise_batch >= doubled else 0
        if agreeing >= NUM_AGREEING and doubled <= control.max_chunks * control.chunk_samples:
            state |= {"batch_samples": doubled}
            agreeing = 0
        state |= {"agreeing": agreeing, "checked_at": samples}
    # In clips, not in chunks, as a resumed run may have chunks of another size.
    num_chunks = max(control.base_chunks, round(state["batch_samples"] / control.chunk_samples))
    return _plan(control, samples, num_chunks, min(MAX_REMAP, math.sqrt(num_chunks / control.base_chunks))), state


def seesaw(control: Control, state: State, samples: int, noise_batch: float) -> tuple[Plan, State]:
    """Where the schedule has cut the rate by a, cut it by sqrt(a) and take a times the batch (arXiv 2510.14717).

    The batch grows by whole chunks. The rate is the schedule's times the square root of what the batch has in fact
    grown by, so rate / sqrt(batch) is exactly the schedule's at any time, also where max_chunks ends the growth.
    """
    left = max(control.schedule.left_at(samples), control.base_chunks / control.max_chunks)
    num_chunks = math.floor(control.base_chunks / left + 1e-9)  # 1e-9: 1 / (1 / 3) may fall short of 3
    return _plan(control, samples, num_chunks, math.sqrt(num_chunks / control.base_chunks)), state


CONTROLLERS: dict[str, Controller] = {"off": off, "ema-batch": ema_batch, "batch": batch, "seesaw": seesaw}
MAX_GROWTH = 16  # of the batch, by a controller that makes it grow


def max_growth(controller: str) -> int:
    """Times the first batch that this controller may ask for."""
    return MAX_GROWTH if controller in ("batch", "seesaw") else 1


def _is_time_to_look(control: Control, state: State, samples: int) -> bool:
    """After the warm-up, and check_samples after the last look."""
    return samples >= max(control.schedule.warmup_samples, state["checked_at"] + control.check_samples)


def _plan(control: Control, samples: int, num_chunks: int, factor: float = 1.0) -> Plan:
    """The schedule's rate in the middle of the step, times `factor`.

    In the middle neither the first step nor the last has rate zero, and a line has the same sum for every batch.
    """
    middle = samples + num_chunks * control.chunk_samples / 2
    return Plan(factor * control.schedule.rate_at(middle), num_chunks)
