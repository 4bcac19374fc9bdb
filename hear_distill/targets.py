"""What the student learns: the teacher's embeddings, standardised, and what is known about them beforehand.

in:   the teacher's embeddings, and patch tokens, of the first clips of a run; nothing is read from a file here
out:  statistics that standardise and restore, a queue and prototypes for the loss, the projection with them folded in

The first clips are embedded once for all of this and then trained on with those very targets: looking consumes nothing.

n clips of a sample   B clips of a batch   E = 512 embedding   D = 384 width of the student
M rows of the queue   K prototypes   N = 96 tokens   P = 1024 width of the teacher's tokens
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BANDS = (16, 64, 512)  # leading principal components of which the explained variance is reported
OUTLIER_SHARE = 0.01  # of tokens, those of the largest norms, which are shortened; ViT-L has few, and they are huge
MAX_ITERATIONS = 100  # of k-means


class TargetStatistics(nn.Module):
    """Mean, one scale and principal components of the teacher's embeddings. `state_dict()` holds the three arguments.

    Standardising takes the mean off and divides by the root of the mean eigenvalue of the covariance, one number for
    all axes (PHI-S, arXiv 2410.01680, without its rotation, which an MSE does not see). Whitening instead would weigh
    axes on which sounds hardly differ as much as the others. The mean square of the sample becomes 1, so that a mean
    squared error is the share of the variance that is not explained.
    """

    def __init__(self, mean: Tensor, scale: Tensor, components: Tensor) -> None:
        """[E], [], [E, E]: components are rows of length 1, that of the largest variance first."""
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)
        self.register_buffer("components", components)

    def standardise(self, embeddings: Tensor) -> Tensor:
        """[..., E] of the teacher -> [..., E] of mean 0 and mean square 1."""
        return (embeddings - self.mean) / self.scale

    def restore(self, standardised: Tensor) -> Tensor:
        """[..., E] -> [..., E], the inverse of `standardise`."""
        return standardised * self.scale + self.mean


def measure_targets(embeddings: Tensor) -> TargetStatistics:
    """[n, E] of the teacher -> their statistics, computed in float64 and kept in float32.

    Raises ValueError for fewer than two clips, embeddings that are not finite, or all alike.
    """
    _check_sample(embeddings, "[n, E]", 2)
    rows = embeddings.double()  # [n, E]
    mean = rows.mean(dim=0)
    covariance = (rows - mean).T @ (rows - mean) / len(rows)  # [E, E]
    scale = _positive_root(covariance.diagonal().mean(), "embeddings")  # the trace is the sum of the eigenvalues
    components = torch.linalg.eigh(covariance).eigenvectors.flip(dims=[1]).T  # eigh gives columns, the smallest first
    return TargetStatistics(mean.float(), scale.float(), components.contiguous().float())


@torch.no_grad()
def fold(projection: nn.Linear, statistics: TargetStatistics) -> nn.Linear:
    """A copy of the projection D -> E whose output is restored: the teacher's own embeddings, for drop-in use."""
    folded = copy.deepcopy(projection)
    scale = statistics.scale.double()
    folded.weight.copy_(projection.weight.double() * scale)
    folded.bias.copy_(projection.bias.double() * scale + statistics.mean)
    return folded


def explained_variance(
    student: Tensor, teacher: Tensor, statistics: TargetStatistics, bands: Sequence[int] = BANDS
) -> dict[int, Tensor]:
    """[n, E], [n, E], standardised -> for each band, the share of the variance along that many leading components.

    1 - (sum of squared errors) / (sum of squares about the mean of these teacher embeddings), both along the leading
    components only: 1 is perfect, 0 no better than that mean. The last band takes all components; on the clips that the
    statistics are of it is 1 - MSE. Padded and whole clips have other means: call it for each set.

    Raises ValueError for fewer than two clips, or a band that is wider than E.
    """
    _check_sample(teacher, "[n, E]", 2)
    if student.shape != teacher.shape or not all(0 < band <= teacher.shape[1] for band in bands):
        raise ValueError(
            f"student and teacher must both be [n, E] and bands from 1 to E, got {list(student.shape)}, "
            f"{list(teacher.shape)} and {list(bands)}"
        )
    axes = statistics.components.double().T  # [E, E], a component in each column
    error = (student.double() - teacher.double()) @ axes  # [n, E]
    spread = (teacher.double() - teacher.double().mean(dim=0)) @ axes
    error, spread = (x.square().sum(dim=0).cumsum(dim=0) for x in (error, spread))  # [E] each, up to each component
    return {band: 1 - error[band - 1] / spread[band - 1] for band in bands}


class TeacherQueue:
    """The latest M teacher embeddings, standardised, for the losses: first in, first out.

    Push after an optimiser step and not before, so that all chunks of a step are compared with the same rows. Under DDP
    every rank pushes the same rows, those of all ranks in their order: gathering them is the caller's part.
    """

    def __init__(self, rows: Tensor, oldest: int = 0) -> None:
        """[M, E] rows to begin with, and the place of the oldest of them. M never changes."""
        _check_sample(rows, "[M, E]", 1)
        self.rows = rows.detach().clone()
        self.oldest = oldest

    def push(self, rows: Tensor, is_taken: Tensor | bool = True) -> None:
        """[B, E]: takes the places of the B oldest rows; of more than M only the last M stay. Waits for no device.

        After a step that was not taken (a scalar, 1 or 0, on the device) the B oldest rows stay, for another round.
        """
        if rows.ndim != 2 or rows.shape[1] != self.rows.shape[1]:
            raise ValueError(f"rows must be [B, {self.rows.shape[1]}], got {list(rows.shape)}")
        num_rows = len(self.rows)
        rows = rows.detach()[-num_rows:]
        places = (self.oldest + torch.arange(len(rows), device=self.rows.device)) % num_rows
        if is_taken is not True:
            rows = torch.where(is_taken > 0, rows.to(self.rows), self.rows[places])
        self.rows.index_copy_(0, places, rows.to(self.rows))
        self.oldest = (self.oldest + len(rows)) % num_rows

    def state_dict(self) -> dict[str, Any]:
        """The arguments of a queue that goes on from here: TeacherQueue(**state)."""
        return {"rows": self.rows.clone(), "oldest": self.oldest}


def make_prototypes(standardised: Tensor, num_prototypes: int, seed: int) -> Tensor:
    """[n, E] -> [K, E]: centres of the directions of the embeddings, by k-means, themselves of length 1.

    The same for the same embeddings and seed. Raises ValueError for fewer embeddings than prototypes.
    """
    from sklearn.cluster import KMeans

    _check_sample(standardised, "[n, E]", num_prototypes)
    directions = F.normalize(standardised.float()).cpu().numpy()  # [n, E]
    centres = (
        KMeans(num_prototypes, n_init=1, max_iter=MAX_ITERATIONS, random_state=seed).fit(directions).cluster_centers_
    )  # [K, E]
    return F.normalize(torch.from_numpy(centres)).to(standardised)


class PatchStatistics(nn.Module):
    """Mean, one scale and a largest norm of the teacher's patch tokens. `state_dict()` holds the three arguments.

    A few tokens of a large ViT have norms far above all others (arXiv 2309.16588) and say little about their patch.
    They keep their direction and are shortened, else they would be most of a squared error.
    """

    def __init__(self, mean: Tensor, scale: Tensor, limit: Tensor) -> None:
        """[P], [], []: the limit is the largest distance from the mean, in the teacher's unit."""
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)
        self.register_buffer("limit", limit)

    def standardise(self, tokens: Tensor) -> Tensor:
        """[..., P] of the teacher -> [..., P]; no token is longer than limit / scale."""
        return _shorten(tokens - self.mean, self.limit) / self.scale


def measure_patches(tokens: Tensor) -> PatchStatistics:
    """[n, N, P] of the teacher -> their statistics, so that the sample, standardised, has a mean square of 1.

    A few hundred clips do: each has 96 tokens, and 512 clips are 192 MiB. Computed in float64, kept in float32. Raises
    ValueError for tokens that are not finite, or all alike.
    """
    rows = tokens.flatten(0, -2)  # [n * N, P]
    _check_sample(rows, "[n, N, P] or [n * N, P]", 2)
    rows = rows.double()
    mean = rows.mean(dim=0)
    limit = (rows - mean).norm(dim=1).quantile(1 - OUTLIER_SHARE)
    scale = _positive_root(_shorten(rows - mean, limit).square().mean(), "patch tokens")
    return PatchStatistics(mean.float(), scale.float(), limit.float())


def _shorten(rows: Tensor, limit: Tensor) -> Tensor:
    """[..., P] -> [..., P], none longer than the limit."""
    return rows * (limit / rows.norm(dim=-1, keepdim=True)).clamp_max(1)


def _positive_root(mean_square: Tensor, what: str) -> Tensor:
    """The root, a scale to divide by. Raises ValueError for zero."""
    if not mean_square > 0:
        raise ValueError(f"the {what} of all clips are alike, so they cannot be standardised: is the teacher broken?")
    return mean_square.sqrt()


def _check_sample(rows: Tensor, shape: str, least: int) -> None:
    """Raise ValueError unless these are at least so many finite rows."""
    if rows.ndim != 2 or len(rows) < least or not rows.isfinite().all():
        raise ValueError(f"expected finite {shape} with at least {least} rows, got {list(rows.shape)}, or not finite")
