"""How fast a run learns: learning rate and batch of each step, from schedule, controller, noise and critical rate.

in:   squared norms of the gradients of each step's chunks; now and then three losses along the optimiser's direction
out:  the Plan of the next step, and numbers for the log; the noise batch is measured whatever the controller

With `--warmup critical` the peak of the schedule is only where the warm-up heads for at first. During the warm-up the
rate at which a held-out batch gains nothing is measured, and half of it becomes the peak; then it is frozen. From then
on the same is measured for the batch that is trained on, and the rate stays below 0.8 of it.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from hear_distill.critical_lr import NUM_KEPT, CriticalRate, peak_rate, under_ceiling
from hear_distill.noise_scale import NoiseScale
from hear_distill.ranks import ALONE, Ranks
from hear_distill.schedule import CONTROLLERS, Control, Plan

NOISE_HALF_LIFE = 44_000  # clips; as published: 0.99 a measurement, one each 5 steps of 128 clips
FIRST_LOOK = 0.1  # of the peak: how far the first probe steps; later ones find their own distance

ControllerName = Literal["off", "ema-batch", "batch", "seesaw"]
Probe = Callable[[], Tensor]


def is_passed(before: int, after: int, every: int) -> bool:
    """Whether a multiple of `every` lies above `before` and not above `after`: counts of samples, in steps of any."""
    return before // every < after // every


class Pace:
    """The state of it. Waits for the device in `look` and `probe` only."""

    def __init__(
        self,
        control: Control,
        controller: ControllerName,
        is_critical: bool,
        device: torch.device,
        ranks: Ranks = ALONE,
    ) -> None:
        """All ranks are given the same numbers, so all make the same plans; the control is of all ranks together."""
        self.control, self.controller, self.is_critical = control, CONTROLLERS[controller], is_critical
        self.ranks = ranks
        self.noise = NoiseScale(NOISE_HALF_LIFE, device)
        self.noise_batch = math.nan
        """when last looked at; controllers see this, so that they never wait for the device"""
        self.state: dict[str, float] = {}
        peak = control.schedule.peak
        self.held_out, self.training = CriticalRate(FIRST_LOOK * peak), CriticalRate(FIRST_LOOK * peak)
        self.has_warned = False

    def is_warm(self, samples: int) -> bool:
        """Whether the warm-up is over."""
        return samples >= self.control.schedule.warmup_samples

    def plan(self, samples: int) -> Plan:
        """The next step after that many samples; the same again if it is asked for again."""
        plan, self.state = self.controller(self.control, self.state, samples, self.noise_batch)
        if not self.is_critical:
            return plan
        peak = peak_rate(self.held_out.value()[0])
        if math.isnan(peak) and self.is_warm(samples) and not self.has_warned:
            self.has_warned = True
            print(
                f"WARNING: {len(self.held_out.probes)} looks in the warm-up gave no critical rate; --schedule.peak "
                f"{self.control.schedule.peak:g} stays the peak"
            )
        factor = 1.0 if math.isnan(peak) else peak / self.control.schedule.peak
        return plan._replace(rate=under_ceiling(factor * plan.rate, self.training.value()[0]))

    def wants_probe(self, samples: int, num_chunks: int) -> bool:
        """Whether this step should look for the critical rate: NUM_KEPT times in the warm-up, then once in a while."""
        after = samples + num_chunks * self.control.chunk_samples
        warmup, check = self.control.schedule.warmup_samples, self.control.check_samples
        every = check if self.is_warm(samples) else max(1, warmup // NUM_KEPT)
        return self.is_critical and is_passed(samples, after, every)

    def probe(self, samples: int, optimizer: torch.optim.AdamW, held_out: Probe, training: Probe) -> None:
        """Look once along the next step's direction: at a held-out batch in the warm-up, else at this step's own."""
        if self.is_warm(samples):
            self.training.probe(optimizer, training)
        else:
            self.held_out.probe(optimizer, held_out)

    def measure(self, chunk_squared: Tensor, mean_squared: Tensor) -> None:
        """What `ChunkGradients.finish` (of all ranks) and, before clipping, `squared_norms` returned."""
        self.noise.update(chunk_squared, mean_squared, self.control.chunk_samples // self.ranks.size)

    def look(self) -> dict[str, float]:
        """The numbers for a log point. Waits; the controllers work with these until the next call."""
        values = self.noise.values()
        self.noise_batch = self.ranks.share(values["noise_batch"])
        if self.is_critical:
            values["critical_rate"], values["critical_rate_error"] = self.held_out.value()
            values["critical_rate_of_training"] = self.training.value()[0]
        return values

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {
            "noise": self.noise.state_dict(),
            "noise_batch": self.noise_batch,
            "controller": dict(self.state),
            "held_out": self.held_out.state_dict(),
            "training": self.training.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self.noise.load_state_dict(state["noise"])
        self.noise_batch, self.state = state["noise_batch"], dict(state["controller"])
        self.held_out.load_state_dict(state["held_out"])
        self.training.load_state_dict(state["training"])
