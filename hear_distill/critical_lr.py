"""The critical learning rate: the step along the optimiser's direction after which a batch is no better than before.

in:   an AdamW with gradients in .grad, and a loss of one fixed batch, to be computed three times per probe
out:  the critical rate with a standard error, in units of the learning rate; parameters and optimiser as they were

theta parameters   d what the optimiser would subtract per unit of rate   G the gradient and H the Hessian of that loss

On the parabola L(theta - r d) = L - r G.d + r^2 d'Hd / 2 the loss is back at L at r = 2 G.d / d'Hd, and lowest at half
of that. Which batch the loss is of decides what the number says. A held-out batch: half the critical rate is the best
single step, noise and preconditioner counted in. The batch whose gradient lies in .grad: beyond it the step overshoots
(2 / critical sharpness, arXiv 2601.16979), so it is a ceiling for stability. Both are greedy: they look one step ahead,
which makes them good for choosing a peak and for a ceiling, and too eager as a schedule.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

PEAK_SHARE = 0.5  # of the held-out critical rate: the lowest point of the parabola
CEILING_SHARE = 0.8  # of the training batch's critical rate
NUM_KEPT = 16  # probes that are averaged, the newest ones: curvature grows during a warm-up
MIN_PROBES = 4
MIN_ERRORS = 2.0  # standard errors between zero and both averages
MAX_CHANGE = 4.0  # of the probing distance, from one probe to the next


@torch.no_grad()
def next_direction(optimizer: torch.optim.AdamW) -> list[Tensor]:
    """d: what the next step subtracts per unit of learning rate, one tensor for each parameter with a gradient.

    AdamW (arXiv 1711.05101, algorithm 2) as PyTorch steps it: m_hat / (sqrt(v_hat) + eps) + weight_decay x theta, with
    the moments as they will be when they have seen the gradient. Neither they nor the parameters are touched.
    """
    directions = []
    for group in optimizer.param_groups:
        assert not group["amsgrad"] and not group["maximize"], "neither is used here, and both change the direction"
        beta1, beta2 = group["betas"]
        for p in (p for p in group["params"] if p.grad is not None):
            state = optimizer.state.get(p) or {"step": torch.zeros(()), "exp_avg": 0.0, "exp_avg_sq": 0.0}
            step = state["step"].to(p.device).double() + 1
            m = beta1 * state["exp_avg"] + (1 - beta1) * p.grad
            v = beta2 * state["exp_avg_sq"] + (1 - beta2) * p.grad.square()
            adam = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + group["eps"])
            directions.append(adam + group["weight_decay"] * p)
    return directions


@torch.no_grad()
def probe(optimizer: torch.optim.AdamW, loss_of: Callable[[], Tensor], distance: float) -> Tensor:
    """[2] float64: G.d and d'Hd, from the loss here, at rate `distance` and at twice that; exact on a parabola.

    `loss_of` must give the same number for the same parameters: one batch, no dropout. The nearer the look, the more
    of the bend is lost in the rounding of a float32 loss. The parameters come back to the bit, by copy, also if it
    raises. Uses two more buffers of the size of the parameters while it runs.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    direction = next_direction(optimizer)
    before = [p.clone() for p in parameters]
    losses = [loss_of().double()]
    try:
        for _ in range(2):
            torch._foreach_sub_(parameters, direction, alpha=distance)
            losses.append(loss_of().double())
    finally:
        torch._foreach_copy_(parameters, before)
    here, near, far = losses
    return torch.stack([(3 * here - 4 * near + far) / (2 * distance), (here - 2 * near + far) / distance**2])


class CriticalRate:
    """Probes and their average: slope and curvature apart, as the noise of d biases a mean of their ratios."""

    def __init__(self, distance: float) -> None:
        """`distance`: the rate at which the first probe looks; later ones look near the parabola's lowest point."""
        if not distance > 0:
            raise ValueError(f"the first probe needs a distance above 0, got {distance}")
        self.distance = distance
        self.probes: list[list[float]] = []
        """[slope G.d, curvature d'Hd] of the newest NUM_KEPT"""

    def probe(self, optimizer: torch.optim.AdamW, loss_of: Callable[[], Tensor]) -> None:
        """Look once more, and set the distance of the next look. Waits for the device.

        A look so far away that the loss is not finite says nothing about slope or bend here: the next one is nearer.
        """
        slope, curvature = probe(optimizer, loss_of, self.distance).tolist()
        if not math.isfinite(slope + curvature):
            self.distance /= MAX_CHANGE
            return
        self.probes = [*self.probes, [slope, curvature]][-NUM_KEPT:]
        lowest = slope / curvature if curvature > 0 else math.inf  # no bend: nothing to see this near
        self.distance = min(MAX_CHANGE * self.distance, max(self.distance / MAX_CHANGE, lowest))

    def value(self) -> tuple[float, float]:
        """The critical learning rate and its standard error.

        NaN, NaN until there are MIN_PROBES, and both averages are more than MIN_ERRORS standard errors above zero.
        """
        if len(self.probes) < MIN_PROBES:
            return math.nan, math.nan
        probes = np.array(self.probes)  # [n, 2]
        slope, curvature = probes.mean(axis=0)
        errors = np.cov(probes, rowvar=False) / len(probes)  # [2, 2]
        if slope <= MIN_ERRORS * math.sqrt(errors[0, 0]) or curvature <= MIN_ERRORS * math.sqrt(errors[1, 1]):
            return math.nan, math.nan
        by = np.array([2 / curvature, -2 * slope / curvature**2])  # of the ratio, by slope and by curvature
        return float(2 * slope / curvature), float(np.sqrt(by @ errors @ by))

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"distance": self.distance, "probes": self.probes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self.distance, self.probes = state["distance"], state["probes"]


def peak_rate(held_out_critical: float) -> float:
    """The learning rate to warm up to: the best single step for a held-out batch. NaN stays NaN."""
    return PEAK_SHARE * held_out_critical


def under_ceiling(rate: float, training_critical: float) -> float:
    """`rate`, lowered to CEILING_SHARE of the training batch's critical rate; as it is while that is unknown (NaN)."""
    return rate if math.isnan(training_critical) else min(rate, CEILING_SHARE * training_critical)
