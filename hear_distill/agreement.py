"""How alike two spaces of embeddings are, whatever their units: for validation, not for training.

in:   embeddings of the same clips by student and teacher; standardised, as a common mean makes all cosines large
out:  scalars from 0 to 1

n clips   D, E widths of the two spaces, which need not be equal
"""

import torch.nn.functional as F
from torch import Tensor

NUM_NEIGHBOURS = 10


def knn_overlap(student: Tensor, teacher: Tensor, num_neighbours: int = NUM_NEIGHBOURS) -> Tensor:
    """[n, D], [n, E] -> scalar: the share of a clip's nearest others in one space that are so in the other as well.

    Nearest by cosine; averaged over clips. Clips that are drawn alike by chance share num_neighbours / (n - 1).
    Raises ValueError unless there are more clips than neighbours.
    """
    if len(student) != len(teacher) or len(teacher) <= num_neighbours:
        raise ValueError(
            f"expected embeddings of the same clips, more than {num_neighbours}, got {len(student)} and {len(teacher)}"
        )
    is_near = []
    for rows in (student, teacher):
        unit = F.normalize(rows.double())
        cosine = (unit @ unit.T).fill_diagonal_(-2)  # [n, n]; nobody is a neighbour of itself
        nearest = cosine.topk(num_neighbours, dim=1).indices  # [n, k]
        is_near.append(cosine.new_zeros(cosine.shape).scatter_(1, nearest, 1))  # [n, n]
    return (is_near[0] * is_near[1]).sum(dim=1).mean() / num_neighbours


def linear_cka(student: Tensor, teacher: Tensor) -> Tensor:
    """[n, D], [n, E] -> scalar: linear centred kernel alignment (arXiv 1905.00414).

    |S'T|^2 / (|S'S| |T'T|) in Frobenius norms, columns centred: 1 for the same space up to rotation, scale and offset.
    Raises ValueError unless both have the same two clips or more.
    """
    if len(student) != len(teacher) or len(teacher) < 2:
        raise ValueError(f"expected embeddings of the same clips, two or more, got {len(student)} and {len(teacher)}")
    s, t = (rows.double() - rows.double().mean(dim=0) for rows in (student, teacher))
    return (s.T @ t).square().sum() / ((s.T @ s).norm() * (t.T @ t).norm())


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
