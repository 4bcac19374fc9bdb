"""What goes wrong in training steps: gradients that are not finite, losses that jump. Counted on the device.

in:   the loss of each step, and whether its gradient was not finite; both stay on the device
out:  counts for a log point, which is where the device is waited for
"""

import torch
from torch import Tensor

SPIKE_DEVIATIONS = 6.0  # of the losses of late, above their mean
HALF_LIFE_STEPS = 100
MIN_STEPS = 50  # before a loss can be called a spike: the first ones fall fast


class StepWatch:
    """Counts since the run began, and a smoothed mean and variance of the loss. Nothing but reading a count waits."""

    def __init__(self, device: torch.device | str) -> None:
        zeros = torch.zeros(8, dtype=torch.float64, device=device)
        self.skipped_steps, self.skipped_clips, self.in_a_row, self.longest = zeros[:4].unbind()
        self.spikes, self.steps, self.mean, self.variance = zeros[4:].unbind()

    def update(self, loss: Tensor, is_bad: Tensor, num_clips: int) -> None:
        """One step: its loss, 1 if it was skipped as its gradient was not finite and else 0, and the clips in it.

        A skipped step is no spike, and its loss enters no mean.
        """
        bad, loss = is_bad.double(), loss.detach().double()
        self.skipped_steps = self.skipped_steps + bad
        self.skipped_clips = self.skipped_clips + num_clips * bad
        self.in_a_row = (self.in_a_row + 1) * bad
        self.longest = torch.maximum(self.longest, self.in_a_row)

        is_seen = (bad == 0) & loss.isfinite()
        away = torch.where(is_seen, loss - self.mean, 0.0)
        is_known = self.steps >= MIN_STEPS
        self.spikes = self.spikes + (is_known & (away > SPIKE_DEVIATIONS * self.variance.sqrt()))
        self.steps = self.steps + is_seen
        # The plain mean at first, which no start value biases, then a smoothed one.
        share = torch.maximum(1 / self.steps.clamp_min(1), torch.full_like(loss, 1 - 0.5 ** (1 / HALF_LIFE_STEPS)))
        share = torch.where(is_seen, share, 0.0)
        self.mean = self.mean + share * away
        self.variance = (1 - share) * (self.variance + share * away.square())

    def take_longest(self) -> int:
        """The most steps in a row that were skipped since the last call. Waits."""
        longest = int(self.longest)
        self.longest = torch.zeros_like(self.longest)
        return longest

    def counts(self) -> dict[str, float]:
        """Skipped steps, clips of skipped steps, spikes of the loss. Waits."""
        counts = {"skipped_steps": self.skipped_steps, "skipped_clips": self.skipped_clips, "loss_spikes": self.spikes}
        return {name: float(count) for name, count in counts.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs to go on to the bit."""
        return {name: value.clone() for name, value in vars(self).items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up what `state_dict` gave, on this device."""
        for name, present in self.state_dict().items():
            setattr(self, name, state[name].to(present))
