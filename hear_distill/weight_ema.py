"""A moving average of the student's weights, to be evaluated and exported in place of the weights of one step.

in:   the student after each step, and the clips seen so far
out:  `model`, a copy of the student that holds the average

The half-life is in samples, so it does not change when the batch does. It is at most a tenth of the samples seen, so
the average forgets the random start without a correction: what is older than half of the run so far has a share of
2^-6.9 = 0.8 % at most.
"""

import copy

import torch
from torch import Tensor, nn

MAX_SHARE_OF_RUN = 0.1  # of the samples seen, that the half-life may be


def ema_decay(samples_seen: int, batch: int, half_life_samples: float) -> float:
    """What the old average keeps in a step of `batch` clips, after which `samples_seen` have been seen."""
    return 0.5 ** (batch / min(half_life_samples, MAX_SHARE_OF_RUN * samples_seen))


class WeightEma:
    """The average; `model.state_dict()` is its state for a checkpoint, and loads as a student does."""

    def __init__(self, student: nn.Module, half_life_samples: float) -> None:
        if not half_life_samples > 0:
            raise ValueError(f"the half-life must be above 0 samples, got {half_life_samples}")
        self.half_life_samples = half_life_samples
        self.model = copy.deepcopy(student).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, student: nn.Module, samples_seen: int, batch: int, is_taken: Tensor | float = 1.0) -> None:
        """Take in the weights after a step of `batch` clips; buffers are copied, as they are counts and constants.

        A step that was not taken (`is_taken` is 0, on the device) leaves the average as it is. Waits for no device.
        """
        new = (1 - ema_decay(samples_seen, batch, self.half_life_samples)) * is_taken
        averages = list(self.model.parameters())
        away = torch._foreach_sub(list(student.parameters()), averages)
        torch._foreach_mul_(away, new)
        torch._foreach_add_(averages, away)
        for average, present in zip(self.model.buffers(), student.buffers(), strict=True):
            average.copy_(present)
