"""The distillation loss: be near the teacher, be arranged like it, be nearest to your own teacher.

in:   embeddings of the same clips by student and teacher, float32, what they are compared with, and the weights
out:  a dict of scalars; "loss" is their weighted sum and has the gradient

B clips   E embedding   M teacher embeddings of earlier clips, the queue   K prototypes   N tokens   P teacher's token

The relational and the contrastive term have two forms. Against the queue (as with images in SEED, arXiv 2101.04731) the
loss of a clip is a function of this clip and the queue alone: the loss of a batch is the mean of those of its clips, so
accumulating over chunks gives the gradient of the whole, and the noise of the gradient has a scale. Within the batch,
the published form, neither holds. Standardise the embeddings first (hear_distill/targets.py): HeAR's share a large
common part, which makes all clips similar until their mean is taken off.
"""

import math
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 0.07  # of the contrastive term, published
PROTOTYPE_TEMPERATURE = 0.1  # of the discriminative loss in arXiv 2210.15631, as far as we know
SAME_SOUND = 0.98  # cosine from which two clips are one sound to the teacher: silence, hum, the clip itself
PATCH_DECAY = 0.2  # share of a run, its last, over which the patch term fades


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Shares of the terms; the defaults are the published ones."""

    mse: float = 1.0
    """of being near the teacher's embedding"""
    relational: float = 0.5
    """of clips being as similar to each other as the teacher finds them"""
    contrastive: float = 0.5
    """of being nearest to one's own teacher embedding among many"""
    prototype: float = 0.0
    """of being spread over prototypes of the teacher's embeddings as the teacher is"""
    patch: float = 0.0
    """of the student's tokens predicting the teacher's; fades over the last fifth of a run"""

    def __post_init__(self) -> None:
        weights = {field.name: getattr(self, field.name) for field in fields(LossWeights)}  # of a subclass, too
        if not all(0 <= weight < math.inf for weight in weights.values()) or max(weights.values()) == 0:
            raise ValueError(f"loss weights must not be negative, nor all zero, nor infinite, got {weights}")


@dataclass(frozen=True, kw_only=True)
class References:
    """What clips are compared with beside the teacher's embedding of the same clip; standardised as that is."""

    queue: Tensor | None = None
    """[M, E] teacher embeddings of earlier clips; None: the other clips of the batch instead, as published"""
    prototypes: Tensor | None = None
    """[K, E] centres of teacher embeddings, for the prototype term"""


IN_BATCH = References()


def distill_loss(
    student: Tensor,
    teacher: Tensor,
    weights: LossWeights,
    temperature: float = TEMPERATURE,
    references: References = IN_BATCH,
    patches: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Tensor]:
    """[B, E], [B, E] -> scalars loss, mse, relational, contrastive, cosine; prototype and patch where they have inputs.

    Each term is the function of its name below, averaged over clips. `cosine` is the mean of student . teacher as unit
    vectors, to look at; it has no gradient. No gradient reaches the teacher, the queue or the prototypes.

    Args:
        temperature: of the contrastive term.
        patches: [B, N, P] each, the student's prediction of the teacher's tokens, and those, standardised.

    Raises:
        ValueError: shapes that do not fit, fewer than two clips without a queue, a weight above 0 for a term whose
            input is missing, or a reduced precision: bfloat16 keeps 8 bits of a cosine, and the contrastive term
            divides it by 0.07.
    """
    queue, prototypes = references.queue, references.prototypes
    _check_embeddings(student, teacher, references)
    _check_patches(len(student), patches)
    for name, found in (("prototype", prototypes), ("patch", patches)):
        if found is None and getattr(weights, name) > 0:
            raise ValueError(f"the {name} term has weight {getattr(weights, name)}, but no {name} input was given")

    with torch.autocast(student.device.type, enabled=False):  # it would cast the similarities to bfloat16 again
        terms = {"mse": mse(student, teacher).mean()}
        if queue is None:
            terms["relational"] = relational_in_batch(student, teacher)
            terms["contrastive"] = contrastive_in_batch(student, teacher, temperature)
        else:
            terms["relational"] = relational(student, teacher, queue).mean()
            terms["contrastive"] = contrastive(student, teacher, queue, temperature).mean()
        if prototypes is not None:
            terms["prototype"] = prototype(student, teacher, prototypes).mean()
        if patches is not None:
            terms["patch"] = patch(*patches).mean()
        loss = sum(weight * terms[name] for name, weight in asdict(weights).items() if weight > 0)
        cosine = (_unit(student) * _unit(teacher)).sum(dim=1).mean().detach()
    return {"loss": loss, **terms, "cosine": cosine}


# ------------------------------------------------------------------------------------ terms with a value for each clip


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """[B, E], [B, E] -> [B]: mean over E of (student - teacher)^2. Of standardised targets: the share unexplained."""
    return (student - teacher.detach()).square().mean(dim=1)


def relational(student: Tensor, teacher: Tensor, queue: Tensor) -> Tensor:
    """[B, E], [B, E], [M, E] -> [B]: mean over the queue of (s . q - t . q)^2, all of them unit vectors.

    The published term compares s_i . s_j with t_i . t_j; here the student of the other clip is replaced by the teacher
    that it is to become. It is (s - t)' A (s - t) with A the mean of q q': an error in direction that weighs most along
    the axes on which sounds differ most. Near-duplicates stay: to be as close to them as the teacher is the aim.
    """
    s, t, q = _unit(student), _unit(teacher.detach()), _unit(queue.detach())
    return ((s - t) @ q.T).square().mean(dim=1)  # [B, M] inside


def contrastive(student: Tensor, teacher: Tensor, queue: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """[B, E], [B, E], [M, E] -> [B]: -log of the share of one's own teacher among it and the queue, for the student.

    With unit vectors, -log(e(s . t) / (e(s . t) + sum over q of e(s . q))), e(x) = exp(x / temperature). A q with
    t . q > 0.98 is left out: it is the same sound, or the clip itself from when the queue was filled, and no negative.
    """
    s, t, q = _unit(student), _unit(teacher.detach()), _unit(queue.detach())
    own = (s * t).sum(dim=1, keepdim=True)  # [B, 1]
    others = (s @ q.T).masked_fill(t @ q.T > SAME_SOUND, -math.inf)  # [B, M]
    logits = torch.cat([own, others], dim=1) / temperature  # [B, 1 + M]
    return logits.logsumexp(dim=1) - logits[:, 0]


def prototype(
    student: Tensor, teacher: Tensor, prototypes: Tensor, temperature: float = PROTOTYPE_TEMPERATURE
) -> Tensor:
    """[B, E], [B, E], [K, E] -> [B]: KL(teacher || student) of their distributions over the prototypes.

    A distribution is the softmax of the cosines to the prototypes over the temperature: the discriminative loss of
    arXiv 2210.15631, whose prototypes are HuBERT's codewords. HeAR has none, so ours are centres of its embeddings.
    """
    s, t, c = _unit(student), _unit(teacher.detach()), _unit(prototypes.detach())
    log_s, log_t = (F.log_softmax(x @ c.T / temperature, dim=1) for x in (s, t))  # [B, K] each
    return F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(dim=1)


def patch(predicted: Tensor, target: Tensor) -> Tensor:
    """[B, N, P], [B, N, P] -> [B]: mean over tokens and channels of (predicted - target)^2."""
    return (predicted - target.detach()).square().mean(dim=(1, 2))


def patch_share(progress: float) -> float:
    """Factor of the patch weight when `progress`, from 0 to 1, of a run is done: 1, then linearly to 0 at the end."""
    return min(1.0, max(0.0, (1 - progress) / PATCH_DECAY))


# ------------------------------------------------------------------------------------- the published terms, of a batch


def relational_in_batch(student: Tensor, teacher: Tensor) -> Tensor:
    """[B, E], [B, E] -> scalar: mean over i != j of (s_i . s_j - t_i . t_j)^2, with unit vectors."""
    s, t = _unit(student), _unit(teacher.detach())
    gap = (s @ s.T - t @ t.T).triu(diagonal=1)  # [B, B], each pair of clips once
    return gap.square().sum() / (len(s) * (len(s) - 1) / 2)


def contrastive_in_batch(student: Tensor, teacher: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """[B, E], [B, E] -> scalar: mean over i of (c(s_i . t_j / temperature) + c(t_i . s_j / temperature)) / 2.

    c is the cross entropy of a row of logits, j running, whose answer is its own index; s and t are unit vectors.
    """
    logits = _unit(student) @ _unit(teacher.detach()).T / temperature  # [B, B]
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


# -------------------------------------------------------------------------------------------------------------- helpers


def _unit(rows: Tensor) -> Tensor:
    """[n, E] -> [n, E], each row of length 1; a row of zeros stays one."""
    return F.normalize(rows)


def _check_embeddings(student: Tensor, teacher: Tensor, references: References) -> None:
    """Raise ValueError unless clips and references are float32 of one width, and are enough."""
    least = 2 if references.queue is None else 1
    if student.shape != teacher.shape or student.ndim != 2 or len(student) < least:
        raise ValueError(
            f"student and teacher must both be [B, E] with B >= {least}, "
            f"got {list(student.shape)} and {list(teacher.shape)}"
        )
    if student.dtype not in (torch.float32, torch.float64) or student.dtype != teacher.dtype:
        raise ValueError(f"the loss needs float32, got {student.dtype} and {teacher.dtype}; call .float() on both")
    for name, rows in (("queue", references.queue), ("prototypes", references.prototypes)):
        if rows is None:
            continue
        if rows.ndim != 2 or rows.shape[1] != student.shape[1] or rows.dtype != student.dtype or len(rows) == 0:
            raise ValueError(
                f"the {name} must be rows of {student.shape[1]} in {student.dtype}, got {list(rows.shape)} {rows.dtype}"
            )


def _check_patches(num_clips: int, patches: tuple[Tensor, Tensor] | None) -> None:
    """Raise ValueError unless both sides are float32 of the same shape, and of as many clips as the embeddings."""
    if patches is None:
        return
    predicted, target = patches
    if predicted.shape != target.shape or predicted.ndim != 3 or len(predicted) != num_clips:
        raise ValueError(
            f"patches must both be [{num_clips}, N, P], got {list(predicted.shape)} and {list(target.shape)}"
        )
    if predicted.dtype not in (torch.float32, torch.float64) or predicted.dtype != target.dtype:
        raise ValueError(
            f"the patch loss needs float32, got {predicted.dtype} and {target.dtype}; call .float() on both"
        )
