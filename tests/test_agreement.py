"""Overlap of neighbours and CKA against loops over clips."""

import numpy as np
import pytest
import torch
from torch import Tensor

from hear_distill.agreement import agreement, knn_overlap, linear_cka
from tests.reference import agreement as by_the_book


def embeddings(noise: float) -> tuple[Tensor, Tensor]:
    """[31, 5] student and [31, 8] teacher of the same clips: other widths, offsets, and lengths of the rows."""
    rng = np.random.default_rng(0)
    teacher = rng.normal(0.3, 1.0, (31, 8)) * np.geomspace(3, 0.3, 8)
    student = teacher @ rng.normal(size=(8, 5)) + noise * rng.normal(size=(31, 5)) + 0.4
    return torch.tensor(student * rng.uniform(0.3, 3.0, (31, 1))), torch.tensor(teacher)


@pytest.mark.parametrize("num_neighbours", [1, 4, 10])
@pytest.mark.parametrize("noise", [0.1, 3.0])
def test_neighbours_are_counted_as_in_a_loop_over_clips(num_neighbours, noise):
    student, teacher = embeddings(noise)
    expected = by_the_book.knn_overlap(student.numpy(), teacher.numpy(), num_neighbours)
    assert 0 < expected < 1
    assert knn_overlap(student, teacher, num_neighbours).item() == pytest.approx(expected)


def test_ten_neighbours_are_the_default():
    student, teacher = embeddings(1.0)
    assert knn_overlap(student, teacher).item() == knn_overlap(student, teacher, 10).item()


@pytest.mark.parametrize("noise", [0.1, 3.0])
def test_cka_is_that_of_the_kernels_of_clips(noise):
    student, teacher = embeddings(noise)
    expected = by_the_book.linear_cka(student.numpy(), teacher.numpy())
    assert linear_cka(student.float(), teacher.float()).item() == pytest.approx(expected, rel=1e-5)


def test_a_rotated_and_scaled_teacher_agrees_with_itself_and_a_shifted_one_in_cka():
    teacher = embeddings(0.1)[1]
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    assert knn_overlap(2.5 * teacher @ rotation, teacher).item() == pytest.approx(1)
    assert linear_cka(2.5 * teacher @ rotation + 7, teacher).item() == pytest.approx(1)


def test_too_few_clips_are_refused():
    student, teacher = embeddings(0.1)
    with pytest.raises(ValueError, match="the same clips, more than 10, got 10 and 10"):
        knn_overlap(student[:10], teacher[:10])
    with pytest.raises(ValueError, match="the same clips, more than 10, got 31 and 30"):
        knn_overlap(student, teacher[:30])
    for num_student, num_teacher in ((1, 1), (31, 30)):
        with pytest.raises(ValueError, match=f"the same clips, two or more, got {num_student} and {num_teacher}"):
            linear_cka(student[:num_student], teacher[:num_teacher])


def test_agreement_is_measured_from_the_mean_of_the_teacher():
    rng = np.random.default_rng(3)
    teacher = rng.normal(5.0, 2.0, (7, 4))
    student = 0.5 * teacher + rng.normal(2.0, 1.0, (7, 4))
    found = agreement(torch.from_numpy(student), torch.from_numpy(teacher))
    errors = spread = 0.0
    cosines = []
    for ours, theirs in zip(student, teacher, strict=True):
        a, b = ours - teacher.mean(0), theirs - teacher.mean(0)
        errors += ((ours - theirs) ** 2).sum()
        spread += (b**2).sum()
        cosines.append(a @ b / np.sqrt((a @ a) * (b @ b)))
    expected = {"mse": errors / 28, "explained_variance": 1 - errors / spread, "centred_cosine": np.mean(cosines)}
    assert {name: float(value) for name, value in found.items()} == pytest.approx(expected)
    mean = torch.from_numpy(teacher).mean(0).expand(7, 4)
    assert {name: float(value) for name, value in agreement(mean, torch.from_numpy(teacher)).items()} == pytest.approx(
        {"mse": spread / 28, "explained_variance": 0.0, "centred_cosine": 0.0}
    )
