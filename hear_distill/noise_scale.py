"""The gradient noise batch: how many clips a step can use before more of them stop helping.

in:   the gradients of two or more equal, disjoint chunks of a step, computed anyway
out:  B_noise = tr(S) / |G|^2 with a standard error, in SGD's geometry and in Adam's; NaN until it means something

G the mean gradient   S the covariance of one clip's gradient   P = 1 / (sqrt(v_hat) + eps), Adam's preconditioner
K chunks of b clips   B = K b clips in the step   axis of 2: (plain, preconditioned)

From McCandlish et al. (arXiv 1812.06162, appendix A.1). A squared norm over n clips has mean |G|^2 + tr(S) / n, so two
sizes b < B give two equations. The published run took |g|^2 over its largest batch for |G|^2 and left the tr(S) / n in:
that ratio cannot pass B, whatever the noise is (tests/test_noise_scale.py shows both). The equations need a loss that
is a mean over clips; one that compares the clips of a chunk with each other has another G at every b.

    chunks = ChunkGradients(optimizer)
    for part in parts:
        loss_of(part).backward()
        chunks.add()
    squared = chunks.finish()                                         # .grad is now the mean over all parts
    noise.update(squared, squared_norms(optimizer), chunk_samples=b)  # before clipping

With several ranks: average .grad over them before `squared_norms`, and gather `squared` along its last axis.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

MIN_STEPS = 20  # the published run trusted no smaller number of measurements either
MIN_ERRORS = 2.0  # standard errors between |G|^2 and zero before a ratio with |G|^2 below the line is shown
PART_ELEMENTS = 2**22  # of the temporary in which gradients are preconditioned: 16 MiB of float32


class ChunkGradients:
    """Adds up the gradients of the backward passes of one step and keeps each one's squared norms. One per step.

    Costs one more buffer of the size of the gradient, and never waits for the device.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        """Begins a step: clears .grad, as what is left of the last step would count as the first chunk's."""
        optimizer.zero_grad(set_to_none=True)
        self.optimizer = optimizer
        self.parameters: list[Tensor] = []
        self.total: list[Tensor] = []
        self.squared: list[Tensor] = []

    def add(self) -> None:
        """Take the gradient of one chunk, after its backward pass.

        Raises:
            ValueError: the chunk gave a gradient to other parameters than the first one did.
        """
        self.squared.append(squared_norms(self.optimizer))
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        gradients = [p.grad for p in parameters]
        if not self.total:
            self.parameters, self.total = parameters, gradients
        elif [id(p) for p in parameters] != [id(p) for p in self.parameters]:
            raise ValueError(
                f"chunk {len(self.squared)} gave a gradient to {len(parameters)} parameters, chunk 1 to "
                f"{len(self.parameters)} others; every chunk of a step must use the same ones"
            )
        else:
            torch._foreach_add_(self.total, gradients)
        for p in parameters:
            p.grad = None  # so that the next pass does not add to it, and its gradient is its own

    def finish(self) -> Tensor:
        """Leave the mean gradient of the chunks in .grad. Returns their squared norms [2, K], for NoiseScale.update."""
        torch._foreach_div_(self.total, len(self.squared))
        for p, gradient in zip(self.parameters, self.total, strict=True):
            p.grad = gradient
        return torch.stack(self.squared, dim=1)  # [2, K]


def squared_norms(optimizer: torch.optim.Optimizer) -> Tensor:
    """[2] float64: |g|^2 and |P g|^2 of the gradient that lies in .grad; the second is NaN before Adam's first step.

    v_hat is that of the steps so far, so it has not seen this gradient and does not bias it. The parameters of a group
    are taken to have made the same number of steps. Norms are summed in float32 per tensor, in float64 over tensors.
    """
    plain, preconditioned = [], []
    for group in optimizer.param_groups:
        parameters = [p for p in group["params"] if p.grad is not None]
        for part in _parts(parameters):
            gradients = [p.grad for p in part]
            plain += torch._foreach_norm(gradients, 2, dtype=torch.float32)
            states = [optimizer.state.get(p) for p in part]
            if not all(states):
                preconditioned.append(torch.full_like(plain[-1], torch.nan))
                continue
            step = states[0]["step"].to(gradients[0].device, non_blocking=True)
            v_hat_over_v = 1 / (1 - group["betas"][1] ** step.double())
            scaled = torch._foreach_sqrt([state["exp_avg_sq"] for state in states])
            torch._foreach_mul_(scaled, v_hat_over_v.sqrt().float())
            torch._foreach_add_(scaled, group["eps"])
            torch._foreach_reciprocal_(scaled)
            torch._foreach_mul_(scaled, gradients)
            preconditioned += torch._foreach_norm(scaled, 2, dtype=torch.float32)
    return torch.stack([torch.stack(norms).double().square().sum() for norms in (plain, preconditioned)])


def _parts(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """The parameters in order, in lists of at most PART_ELEMENTS numbers each, or of one parameter."""
    part: list[Tensor] = []
    num_elements = 0
    for p in parameters:
        if part and num_elements + p.numel() > PART_ELEMENTS:
            yield part
            part, num_elements = [], 0
        part.append(p)
        num_elements += p.numel()
    if part:
        yield part


class NoiseScale:
    """tr(S) and |G|^2, each smoothed by itself; the ratio comes last, as a mean of ratios is not the ratio of means.

    The smoothing forgets half in `half_life_samples` clips, however many steps they make, so its memory survives a
    change of the batch. No weight is given to a start value (as Adam's bias correction). Nothing but `values` waits for
    the device.
    """

    def __init__(self, half_life_samples: float, device: torch.device | str = "cpu") -> None:
        if not half_life_samples > 0:
            raise ValueError(f"the half-life must be above 0 samples, got {half_life_samples}")
        self.half_life_samples = half_life_samples
        zeros = torch.zeros(2, dtype=torch.float64, device=device)
        self.steps = zeros
        """[2] finite measurements so far"""
        self.weight = zeros
        """[2] of all measurements together; grows to 1"""
        self.concentration = zeros
        """[2] sum of the squares of the measurements' shares of the mean: 1 / (number of them that count)"""
        self.mean = zeros[:, None].expand(2, 2).clone()
        """[2, (tr(S), |G|^2)]"""
        self.covariance = self.mean[:, :, None].expand(2, 2, 2).clone()
        """[2, 2, 2] of single measurements around `mean`"""

    def update(self, chunk_squared: Tensor, mean_squared: Tensor, chunk_samples: int) -> None:
        """One step: squared norms of its chunks' gradients [2, K], of their mean [2], and the clips in one chunk.

        A measurement that is not finite is left out, as such a step is by the optimiser.

        Raises:
            ValueError: fewer than two chunks; one size cannot tell noise from signal.
        """
        num_chunks = chunk_squared.shape[1]
        if num_chunks < 2:
            raise ValueError(f"the noise scale needs two chunks or more in a step, got {num_chunks}; halve the chunks")
        small, large = chunk_squared.double().mean(dim=1), mean_squared.double()  # [2], [2]
        b, batch = chunk_samples, num_chunks * chunk_samples
        trace = (small - large) / (1 / b - 1 / batch)
        signal = (batch * large - b * small) / (batch - b)
        found = torch.stack([trace, signal], dim=1)  # [2, 2]

        is_finite = found.isfinite().all(dim=1)
        forget = 0.5 ** (batch / self.half_life_samples)
        weight = torch.where(is_finite, forget * self.weight + (1 - forget), self.weight)
        share = torch.where(is_finite, (1 - forget) / weight, 0.0)  # of the new measurement in the new mean
        away = torch.where(is_finite[:, None], found - self.mean, 0.0)
        self.steps = self.steps + is_finite
        self.weight = weight
        self.concentration = (1 - share).square() * self.concentration + share.square()
        self.mean = self.mean + share[:, None] * away
        spread = self.covariance + share[:, None, None] * away[:, :, None] * away[:, None, :]  # [2, 2, 2]
        self.covariance = (1 - share)[:, None, None] * spread

    def values(self) -> dict[str, float]:
        """The noise batch in clips, its standard error, tr(S) and |G|^2, and the same of Adam's geometry. Waits.

        NaN stands for a ratio that means nothing yet: fewer than MIN_STEPS measurements, or |G|^2 within MIN_ERRORS
        standard errors of zero. The errors take measurements for independent; tr(S) and |G|^2 that move within the
        half-life make them too large. Noise far below b may come out negative.
        """
        scale = self.concentration / (1 - self.concentration)  # variance of the mean per (biased) variance of one
        errors = self.covariance * scale[:, None, None]  # [2, 2, 2]
        trace, signal = self.mean.unbind(dim=1)
        ratio = trace / signal
        slope = torch.stack([1 / signal, -ratio / signal], dim=1)  # of the ratio, by tr(S) and by |G|^2
        error = torch.einsum("gi,gij,gj->g", slope, errors, slope).sqrt()
        is_known = (self.steps >= MIN_STEPS) & (signal > MIN_ERRORS * errors[:, 1, 1].sqrt())
        ratio, error = torch.where(is_known, torch.stack([ratio, error]), torch.nan)
        table = torch.stack([ratio, error, trace, signal], dim=1).flatten()  # [8]
        names = ("noise_batch", "noise_batch_error", "noise_trace", "gradient_squared")
        return dict(zip([*names, *(f"adam_{name}" for name in names)], table.tolist(), strict=True))

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs to go on to the bit; the half-life is a setting and not part of it."""
        names = ("steps", "weight", "concentration", "mean", "covariance")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up what `state_dict` gave, on this device."""
        for name, present in self.state_dict().items():
            setattr(self, name, state[name].to(present))
