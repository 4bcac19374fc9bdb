"""The distillation loss, as published: be near the teacher, be arranged like it, be nearest to your own teacher.

in:   embeddings of the same clips by student and teacher, float32, and the three weights
out:  a dict of scalars; "loss" is their weighted sum and has the gradient; and how well the two agree

B clips   n clips of a validation set   E embedding
"""

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Shares of the three terms; the defaults are the published ones."""

    mse: float = 1.0
    """of being near the teacher's embedding"""
    relational: float = 0.5
    """of clips being as similar to each other as the teacher finds them"""
    contrastive: float = 0.5
    """of being nearest to one's own teacher embedding in the batch"""

    def __post_init__(self) -> None:
        weights = asdict(self)
        if min(weights.values()) < 0 or max(weights.values()) == 0:
            raise ValueError(f"loss weights must not be negative, nor all zero, got {weights}")


def distill_loss(
    student: Tensor, teacher: Tensor, weights: LossWeights, temperature: float = 0.07
) -> dict[str, Tensor]:
    """[B, E], [B, E] -> scalars loss, mse, relational, contrastive, cosine.

    With unit vectors s and t of the rows, and c the cross entropy of a row of logits whose answer is its own index:
        mse          mean over B x E of (student - teacher)^2
        relational   mean over i != j of (s_i . s_j - t_i . t_j)^2
        contrastive  mean over i of (c(s_i . t_j / temperature) + c(t_i . s_j / temperature)) / 2, j running
        cosine       mean over i of s_i . t_i, to look at; it has no gradient
    The last three terms compare clips of one batch, so their value depends on B. No gradient reaches the teacher.

    Raises:
        ValueError: shapes that differ, fewer than two clips, or a reduced precision: bfloat16 keeps 8 bits of a cosine,
            and the contrastive term divides it by 0.07.
    """
    if student.shape != teacher.shape or student.ndim != 2 or len(student) < 2:
        raise ValueError(
            f"student and teacher must both be [B, E] with B >= 2, got {list(student.shape)} and {list(teacher.shape)}"
        )
    if student.dtype not in (torch.float32, torch.float64) or student.dtype != teacher.dtype:
        raise ValueError(f"the loss needs float32, got {student.dtype} and {teacher.dtype}; call .float() on both")

    teacher = teacher.detach()
    with torch.autocast(student.device.type, enabled=False):  # it would cast the similarities to bfloat16 again
        s, t = F.normalize(student), F.normalize(teacher)
        num_pairs = len(s) * (len(s) - 1) / 2
        gap = (s @ s.T - t @ t.T).triu(diagonal=1)  # [B, B], each pair of clips once
        logits = s @ t.T / temperature  # [B, B]
        own = torch.arange(len(s), device=s.device)
        terms = {
            "mse": F.mse_loss(student, teacher),
            "relational": gap.square().sum() / num_pairs,
            "contrastive": (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2,
        }
        loss = sum(weight * terms[name] for name, weight in asdict(weights).items())
    return {"loss": loss, **terms, "cosine": (s * t).sum(dim=1).mean().detach()}


def agreement(student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
    """[n, E], [n, E] -> scalars mse, explained_variance, centred_cosine; 1 is perfect in the last two.

    Both are measured from the teacher's mean over the n clips, so a student that only knows this mean has 0.
    """
    mse = (student - teacher).square().mean()
    centred = teacher - teacher.mean(dim=0)
    return {
        "mse": mse,
        "explained_variance": 1 - mse / centred.square().mean(),
        "centred_cosine": F.cosine_similarity(student - teacher.mean(dim=0), centred).mean(),
    }
