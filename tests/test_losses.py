"""The distillation loss against loops in float64. B = 7 clips, E = 24: odd sizes, student far from teacher."""

from dataclasses import asdict

import numpy as np
import pytest
import torch

from hear_distill import losses
from hear_distill.losses import LossWeights, References, distill_loss, patch_share
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


@pytest.mark.parametrize(
    "weights", [{"mse": -1.0}, {"mse": 0.0, "relational": 0.0, "contrastive": 0.0}, {"patch": float("nan")}]
)
def test_negative_or_missing_weights_are_refused(weights):
    with pytest.raises(ValueError, match="loss weights must not be negative"):
        LossWeights(**weights)


# ------------------------------------------------------------------------------------ terms with a value for each clip

ALL = LossWeights(mse=0.3, relational=5.0, contrastive=0.7, prototype=1.9, patch=0.45)


def at_cosine(row: np.ndarray, cosine: float, length: float) -> np.ndarray:
    """[E] -> a vector of that length and cosine to `row`."""
    along = row / np.linalg.norm(row)
    across = np.roll(along, 1) - np.dot(np.roll(along, 1), along) * along
    return length * (cosine * along + (1 - cosine**2) ** 0.5 * across / np.linalg.norm(across))


def references(seed: int, teacher: torch.Tensor) -> References:
    """11 rows of a queue, some of them near-duplicates of clips 1 and 4, and 5 prototypes; none of length 1."""
    rng = np.random.default_rng(100 + seed)
    queue, t = rng.normal(0.3, 1.0, (11, 24)) * rng.uniform(0.3, 4.0, (11, 1)), teacher.double().numpy()
    queue[2], queue[3], queue[7] = 1.7 * t[1], at_cosine(t[4], 0.983, 0.6), at_cosine(t[4], 0.977, 2.0)
    prototypes = rng.normal(0.2, 1.0, (5, 24)) * rng.uniform(0.3, 4.0, (5, 1))
    return References(queue=torch.tensor(queue).to(teacher), prototypes=torch.tensor(prototypes).to(teacher))


def patch_tokens(seed: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """[7, 6, 9] prediction and target."""
    rng = np.random.default_rng(200 + seed)
    target = rng.normal(0.1, 1.0, (7, 6, 9))
    return torch.tensor(0.6 * target + rng.normal(0, 0.5, (7, 6, 9)), dtype=dtype), torch.tensor(target, dtype=dtype)


def expected_per_clip(seed: int) -> dict[str, list[float]]:
    student, teacher = embeddings(seed)
    against, tokens = references(seed, teacher), [x.double().numpy() for x in patch_tokens(seed)]
    s, t, q, c = (x.double().numpy() for x in (student, teacher, against.queue, against.prototypes))
    contrastive, num_left_out = by_the_book.contrastive_to_queue(s, t, q, 0.07)
    assert num_left_out == 2
    return {
        "mse": [by_the_book.mse(s[i : i + 1], t[i : i + 1]) for i in range(7)],
        "relational": by_the_book.relational_to_queue(s, t, q),
        "contrastive": contrastive,
        "prototype": by_the_book.prototype(s, t, c, 0.1),
        "patch": by_the_book.patch(*tokens),
    }


@pytest.mark.parametrize("seed", [0, 1])
def test_each_term_of_each_clip_is_the_sum_over_queue_prototypes_or_tokens(seed):
    student, teacher = embeddings(seed)
    against = references(seed, teacher)
    found = {
        "mse": losses.mse(student, teacher),
        "relational": losses.relational(student, teacher, against.queue),
        "contrastive": losses.contrastive(student, teacher, against.queue),
        "prototype": losses.prototype(student, teacher, against.prototypes),
        "patch": losses.patch(*patch_tokens(seed)),
    }
    for name, expected in expected_per_clip(seed).items():
        assert found[name].tolist() == pytest.approx(expected, rel=2e-5, abs=1e-6), name


def test_the_loss_is_the_weighted_sum_of_the_means_over_clips():
    student, teacher = embeddings(2)
    expected = {name: float(np.mean(values)) for name, values in expected_per_clip(2).items()}
    expected["loss"] = sum(weight * expected[name] for name, weight in asdict(ALL).items())
    expected["cosine"] = by_the_book.cosine(student.double().numpy(), teacher.double().numpy())
    found = distill_loss(student, teacher, ALL, references=references(2, teacher), patches=patch_tokens(2))
    assert {name: term.item() for name, term in found.items()} == pytest.approx(expected, rel=2e-5)


def test_prototypes_go_with_the_published_form_as_well():
    student, teacher = embeddings(3)
    prototypes = references(3, teacher).prototypes
    found = distill_loss(student, teacher, LossWeights(prototype=2.0), references=References(prototypes=prototypes))
    published = distill_loss(student, teacher, LossWeights())["loss"].item()
    expected = published + 2.0 * np.mean(expected_per_clip(3)["prototype"])
    assert found["loss"].item() == pytest.approx(expected, rel=1e-5)


def test_a_term_of_weight_zero_has_no_part_in_the_loss_even_where_it_is_not_finite():
    student, teacher = embeddings(3)
    predicted, target = patch_tokens(3)
    terms = distill_loss(student, teacher, LossWeights(), patches=(predicted / 0, target))
    assert torch.equal(terms["loss"], distill_loss(student, teacher, LossWeights())["loss"])
    assert not terms["patch"].isfinite()


def test_the_loss_of_a_batch_is_the_mean_of_its_clips_alone_with_the_same_references():
    student, teacher = embeddings(4, torch.float64)
    against, (predicted, target) = references(4, teacher), patch_tokens(4, torch.float64)
    whole = distill_loss(student, teacher, ALL, references=against, patches=(predicted, target))
    alone = [
        distill_loss(student[[i]], teacher[[i]], ALL, references=against, patches=(predicted[[i]], target[[i]]))
        for i in range(7)
    ]
    for name, term in whole.items():
        torch.testing.assert_close(torch.stack([terms[name] for terms in alone]).mean(), term)


def test_accumulating_over_chunks_gives_the_gradient_of_the_whole():
    teacher = embeddings(5, torch.float64)[1]
    against, targets = references(5, teacher), patch_tokens(5, torch.float64)[1]
    inputs = torch.randn(7, 6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gradients = []
    for chunks in ([7], [4, 1, 2]):
        torch.manual_seed(1)
        to_embedding, to_patches = torch.nn.Linear(54, 24).double(), torch.nn.Linear(9, 9).double()
        for clips in torch.arange(7).split(chunks):
            x = inputs[clips]
            tokens = to_patches(x)
            student, patches = to_embedding(tokens.flatten(1)), (tokens, targets[clips])
            terms = distill_loss(student, teacher[clips], ALL, references=against, patches=patches)
            (terms["loss"] * len(clips) / 7).backward()
        gradients.append([p.grad for p in (*to_embedding.parameters(), *to_patches.parameters())])
    assert all(gradient.any() for gradient in gradients[0])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["loss", "relational", "contrastive", "prototype"])
def test_the_gradient_against_references_agrees_with_finite_differences(name):
    student, teacher = embeddings(6, torch.float64)
    against, tokens = references(6, teacher), patch_tokens(6, torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: distill_loss(x, teacher, ALL, references=against, patches=tokens)[name],
        student.requires_grad_(),
        eps=1e-6,
        atol=1e-7,
    )


def test_no_gradient_reaches_queue_prototypes_or_the_teachers_tokens():
    student, teacher = (x.requires_grad_() for x in embeddings(7))
    predicted, target = (x.requires_grad_() for x in patch_tokens(7))
    against = references(7, teacher.detach())
    against.queue.requires_grad_(), against.prototypes.requires_grad_()
    distill_loss(student, teacher, ALL, references=against, patches=(predicted, target))["loss"].backward()
    assert student.grad.abs().min() > 0 and predicted.grad.abs().min() > 0
    assert [x.grad for x in (teacher, target, against.queue, against.prototypes)] == [None] * 4


def test_a_queue_of_nothing_but_the_same_sound_leaves_nothing_to_be_told_from():
    student, teacher = embeddings(8)
    student.requires_grad_()
    values = losses.contrastive(student[:1], teacher[:1], 3 * teacher[:1].repeat(4, 1))
    values.sum().backward()
    assert values.tolist() == [0] and student.grad.isfinite().all()


def test_autocast_around_the_loss_changes_nothing_against_references_either():
    student, teacher = embeddings(9)
    kept = {"references": references(9, teacher), "patches": patch_tokens(9)}
    outside = distill_loss(student, teacher, ALL, **kept)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = distill_loss(student, teacher, ALL, **kept)
    assert all(torch.equal(outside[name], inside[name]) for name in outside)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"references": References(queue=torch.rand(9, 23))}, r"the queue must be rows of 24 .* got \[9, 23\]"),
        ({"references": References(queue=torch.rand(0, 24))}, r"the queue must be rows of 24 .* got \[0, 24\]"),
        ({"references": References(prototypes=torch.rand(9, 24).double())}, r"prototypes must be .* torch.float64"),
        ({"patches": (torch.rand(7, 6, 9), torch.rand(7, 6, 8))}, r"must both be \[7, N, P\], got \[7, 6, 9\]"),
        ({"patches": (torch.rand(5, 6, 9), torch.rand(5, 6, 9))}, r"must both be \[7, N, P\], got \[5, 6, 9\]"),
        ({"patches": (torch.rand(7, 6, 9).half(), torch.rand(7, 6, 9))}, "patch loss needs float32, got torch.float16"),
    ],
    ids=["another width", "an empty queue", "another precision", "other tokens", "other clips", "half tokens"],
)
def test_references_and_tokens_that_do_not_fit_are_refused(kept, message):
    with pytest.raises(ValueError, match=message):
        distill_loss(*embeddings(0), WEIGHTS, **kept)


@pytest.mark.parametrize("name", ["prototype", "patch"])
def test_a_weight_for_a_term_without_its_input_is_refused(name):
    with pytest.raises(ValueError, match=f"the {name} term has weight 0.5, but no {name} input was given"):
        distill_loss(*embeddings(0), LossWeights(**{name: 0.5}))


def test_the_patch_term_keeps_its_weight_for_four_fifths_and_fades_to_nothing():
    assert [patch_share(x) for x in (0, 0.5, 0.8, 0.85, 0.9, 1.0)] == pytest.approx([1, 1, 1, 0.75, 0.5, 0])
    assert patch_share(1.01) == 0
