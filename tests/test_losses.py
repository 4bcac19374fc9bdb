"""The distillation loss against double loops in float64. B = 7 clips, E = 24: odd sizes, student far from teacher."""

import numpy as np
import pytest
import torch

from hear_distill.losses import LossWeights, agreement, distill_loss
from tests.reference import losses as by_the_book

WEIGHTS = LossWeights(mse=0.3, relational=5.0, contrastive=0.7)


def embeddings(seed: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """[7, 24] student and teacher: related, so that the right pairs stand out, but different in scale and offset."""
    rng = np.random.default_rng(seed)
    teacher = rng.normal(0.4, 1.0, (7, 24))
    student = 0.5 * teacher + rng.normal(-0.2, 0.8, (7, 24)) * rng.uniform(0.2, 3.0, (7, 1))
    return torch.tensor(student, dtype=dtype), torch.tensor(teacher, dtype=dtype)


@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_term_is_the_published_sum_over_clips(seed, temperature):
    student, teacher = embeddings(seed)
    s, t = student.double().numpy(), teacher.double().numpy()
    expected = {
        "mse": by_the_book.mse(s, t),
        "relational": by_the_book.relational(s, t),
        "contrastive": by_the_book.contrastive(s, t, temperature),
        "cosine": by_the_book.cosine(s, t),
    }
    expected["loss"] = 0.3 * expected["mse"] + 5.0 * expected["relational"] + 0.7 * expected["contrastive"]

    found = {name: term.item() for name, term in distill_loss(student, teacher, WEIGHTS, temperature).items()}

    assert found == pytest.approx(expected, rel=1e-5)


def test_the_default_temperature_and_weights_are_the_published_ones():
    student, teacher = embeddings(2)
    s, t = student.double().numpy(), teacher.double().numpy()
    expected = by_the_book.mse(s, t) + 0.5 * by_the_book.relational(s, t) + 0.5 * by_the_book.contrastive(s, t, 0.07)
    assert distill_loss(student, teacher, LossWeights())["loss"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["loss", "mse", "relational", "contrastive"])
def test_the_gradient_agrees_with_finite_differences(name):
    student, teacher = (x[:4, :6] for x in embeddings(3, torch.float64))
    assert torch.autograd.gradcheck(
        lambda x: distill_loss(x, teacher, WEIGHTS)[name], student.requires_grad_(), eps=1e-6, atol=1e-7
    )


def test_no_gradient_reaches_the_teacher_or_leaves_the_cosine():
    student, teacher = (x.requires_grad_() for x in embeddings(4))
    terms = distill_loss(student, teacher, WEIGHTS)
    terms["loss"].backward()
    assert student.grad.abs().min() > 0
    assert teacher.grad is None
    assert not terms["cosine"].requires_grad


def test_a_zero_student_has_similarity_zero_to_all_and_a_finite_gradient():
    student, teacher = torch.zeros(7, 24, requires_grad=True), embeddings(5)[1]
    terms = distill_loss(student, teacher, WEIGHTS)
    terms["loss"].backward()
    assert student.grad.isfinite().all()
    t = by_the_book.unit(teacher.double().numpy())
    pairs = [float(np.dot(t[i], t[j])) ** 2 for i in range(7) for j in range(7) if i != j]
    assert terms["relational"].item() == pytest.approx(np.mean(pairs), rel=1e-5)


def test_autocast_around_the_loss_changes_nothing():
    student, teacher = embeddings(6)
    outside = distill_loss(student, teacher, WEIGHTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = distill_loss(student, teacher, WEIGHTS)
    assert all(torch.equal(outside[name], inside[name]) for name in outside)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (torch.rand(1, 24), torch.rand(1, 24), r"B >= 2, got \[1, 24\]"),
        (torch.rand(7, 24), torch.rand(6, 24), r"got \[7, 24\] and \[6, 24\]"),
        (torch.rand(2, 7, 24), torch.rand(2, 7, 24), r"must both be \[B, E\]"),
        (torch.rand(7, 24).bfloat16(), torch.rand(7, 24), r"needs float32, got torch.bfloat16 and torch.float32"),
        (torch.rand(7, 24), torch.rand(7, 24).half(), r"call .float\(\) on both"),
    ],
    ids=["one clip", "different batches", "tokens", "bfloat16 student", "half teacher"],
)
def test_what_cannot_be_compared_is_refused(student, teacher, message):
    with pytest.raises(ValueError, match=message):
        distill_loss(student, teacher, WEIGHTS)


@pytest.mark.parametrize("weights", [{"mse": -1.0}, {"mse": 0.0, "relational": 0.0, "contrastive": 0.0}])
def test_negative_or_missing_weights_are_refused(weights):
    with pytest.raises(ValueError, match="loss weights must not be negative"):
        LossWeights(**weights)


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
