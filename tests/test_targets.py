"""Target statistics against NumPy and loops, the queue against a deque, and what makes the student a drop-in.

n = 60 clips   E = 12 embedding   M queue
"""

from collections import deque

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hear_distill import checkpoint
from hear_distill.targets import (
    PatchStatistics,
    TargetStatistics,
    TeacherQueue,
    explained_variance,
    fold,
    make_prototypes,
    measure_patches,
    measure_targets,
)


def teacher_embeddings(seed: int = 0, offset: float = 3.0) -> Tensor:
    """[60, 12] with a large common part, and very different variances along axes that are not the coordinates."""
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(rng.normal(size=(12, 12)))[0]
    rows = rng.normal(size=(60, 12)) * np.geomspace(5.0, 0.05, 12) @ rotation
    return torch.tensor(rows + offset * rng.uniform(0.5, 1.5, 12), dtype=torch.float32)


# ---------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("offset", [3.0, 1000.0])
def test_targets_are_centred_and_divided_by_the_root_of_the_mean_eigenvalue(offset):
    embeddings = teacher_embeddings(0, offset)
    rows = embeddings.double().numpy()
    eigenvalues = np.linalg.eigvalsh(np.cov(rows.T, bias=True))
    statistics = measure_targets(embeddings)
    assert statistics.scale.item() == pytest.approx(np.sqrt(eigenvalues.mean()), rel=1e-6)
    np.testing.assert_allclose(
        statistics.standardise(embeddings.double()).numpy(),
        (rows - rows.mean(axis=0)) / np.sqrt(eigenvalues.mean()),
        atol=1e-7 * offset,
    )
    assert statistics.standardise(embeddings).dtype == torch.float32


def test_the_mse_of_the_best_constant_is_one_and_of_any_student_the_share_not_explained():
    embeddings = teacher_embeddings()
    statistics = measure_targets(embeddings)
    target = statistics.standardise(embeddings)
    assert target.square().mean().item() == pytest.approx(1, rel=1e-5)
    student = 0.7 * target + 0.2 * torch.randn(target.shape, generator=torch.Generator().manual_seed(0))
    explained = explained_variance(student, target, statistics, bands=(12,))[12]
    assert explained.item() == pytest.approx(1 - (student - target).square().mean().item(), rel=1e-5)


def test_components_of_the_faintest_axes_are_found_beside_loud_ones():
    """Variances from 25 to 1e-6: the last ones are below what float32 resolves of the first."""
    rng = np.random.default_rng(3)
    rotation = np.linalg.qr(rng.normal(size=(12, 12)))[0]
    rows = torch.tensor(rng.normal(size=(60, 12)) * np.geomspace(5.0, 1e-3, 12) @ rotation)
    components = measure_targets(rows).components.double().numpy()
    centred = rows.numpy() - rows.numpy().mean(axis=0)
    deviations = np.linalg.svd(centred, compute_uv=False) / 60**0.5
    np.testing.assert_allclose((centred @ components.T).std(axis=0), deviations, rtol=1e-3)


def test_restoring_undoes_standardising():
    embeddings = teacher_embeddings()
    statistics = measure_targets(embeddings[:40])
    torch.testing.assert_close(statistics.restore(statistics.standardise(embeddings)), embeddings)


def test_statistics_come_back_from_a_checkpoint(tmp_path):
    targets = measure_targets(teacher_embeddings())
    patches = measure_patches(torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0)))
    state = {"targets": targets.state_dict(), "patches": patches.state_dict()}
    loaded = checkpoint.load(checkpoint.save(tmp_path, state))
    again = TargetStatistics(**loaded["targets"]).state_dict() | PatchStatistics(**loaded["patches"]).state_dict()
    expected = targets.state_dict() | patches.state_dict()
    assert expected.keys() == {"mean", "scale", "components", "limit"}
    assert all(torch.equal(again[name], value) for name, value in expected.items())


def test_a_folded_projection_gives_the_embeddings_of_the_teacher():
    statistics = measure_targets(teacher_embeddings())
    torch.manual_seed(0)
    projection, x = nn.Linear(7, 12), torch.randn(5, 7)
    before = [parameter.clone() for parameter in projection.parameters()]
    folded = fold(projection, statistics)
    torch.testing.assert_close(folded(x), statistics.restore(projection(x)))
    assert all(torch.equal(old, new) for old, new in zip(before, projection.parameters(), strict=True))


def test_explained_variance_of_a_band_counts_its_leading_components_only():
    """Components by a singular value decomposition of other clips than those that are judged, then loops."""
    sample, judged = teacher_embeddings().double(), teacher_embeddings(0).double()[:25] * 1.2
    statistics = measure_targets(sample.float())
    teacher = statistics.standardise(judged)
    noise = torch.randn(25, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    student = 0.8 * teacher + noise * torch.linspace(0.1, 0.9, 12)

    axes = np.linalg.svd(sample.numpy() - sample.numpy().mean(axis=0))[2]
    t, s = teacher.numpy(), student.numpy()
    found = explained_variance(student, teacher, statistics, bands=range(1, 13))
    assert list(found) == list(range(1, 13))
    for band in range(1, 13):
        errors, spreads = 0.0, 0.0
        for clip in range(25):
            for axis in axes[:band]:
                errors += float(np.dot(s[clip] - t[clip], axis)) ** 2
                spreads += float(np.dot(t[clip] - t.mean(axis=0), axis)) ** 2
        assert found[band].item() == pytest.approx(1 - errors / spreads, abs=1e-5), band


def test_a_constant_student_explains_nothing_of_clips_with_a_mean_of_their_own():
    statistics = measure_targets(teacher_embeddings())
    padded = statistics.standardise(teacher_embeddings(1)[:20])
    constant = padded.mean(dim=0).expand(20, 12)
    assert constant.abs().max() > 0.5
    found = explained_variance(constant, padded, statistics, bands=(4, 12))
    assert [value.item() for value in found.values()] == pytest.approx([0, 0], abs=1e-5)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.rand(1, 12), r"expected finite \[n, E\] with at least 2 rows, got \[1, 12\]"),
        (torch.rand(3, 4, 12), r"got \[3, 4, 12\]"),
        (torch.full((5, 12), float("nan")), "or not finite"),
        (torch.full((5, 12), 0.5), "the embeddings of all clips are alike"),
    ],
    ids=["one clip", "tokens", "not numbers", "all alike"],
)
def test_clips_that_give_no_statistics_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        measure_targets(rows)


@pytest.mark.parametrize("bands", [(13,), (0,)])
def test_a_band_that_there_is_not_is_refused(bands):
    statistics = measure_targets(teacher_embeddings())
    with pytest.raises(ValueError, match="bands from 1 to E"):
        explained_variance(torch.rand(5, 12), torch.rand(5, 12), statistics, bands)


# --------------------------------------------------------------------------------------------------------------- queue


@pytest.mark.parametrize("sizes", [[3, 3, 3, 3], [1, 6, 2], [7, 5], [4, 19, 3]], ids=str)
def test_a_queue_holds_the_latest_rows_in_unchanging_memory(sizes):
    first = torch.arange(14.0).reshape(7, 2)
    queue, expected, value = TeacherQueue(first), deque(first.tolist(), maxlen=7), 100.0
    memory = queue.rows.data_ptr()
    for size in sizes:
        rows = value + torch.arange(2.0 * size).reshape(size, 2)
        value += 2 * size
        queue.push(rows)
        expected.extend(rows.tolist())
        assert torch.roll(queue.rows, -queue.oldest, dims=0).tolist() == list(expected)
    assert queue.rows.data_ptr() == memory
    assert first.tolist() == torch.arange(14.0).reshape(7, 2).tolist(), "the caller's rows changed"


def test_a_queue_goes_on_from_its_checkpoint_as_if_never_stopped(tmp_path):
    generator = torch.Generator().manual_seed(0)
    queue = TeacherQueue(torch.randn(7, 3, generator=generator))
    queue.push(torch.randn(4, 3, generator=generator))
    state = queue.state_dict()
    path = checkpoint.save(tmp_path, {"queue": state})
    later = torch.randn(5, 3, generator=generator, requires_grad=True)
    queue.push(later)
    assert not torch.equal(state["rows"], queue.rows), "the state moved on with the queue"
    resumed = TeacherQueue(**checkpoint.load(path)["queue"])
    resumed.push(later)
    assert torch.equal(resumed.rows, queue.rows) and resumed.oldest == queue.oldest == 2
    assert not queue.rows.requires_grad


def test_rows_of_another_width_are_refused_by_a_queue():
    with pytest.raises(ValueError, match=r"rows must be \[B, 3\], got \[2, 1\]"):
        TeacherQueue(torch.rand(7, 3)).push(torch.rand(2, 1))
    with pytest.raises(ValueError, match="at least 1 rows"):
        TeacherQueue(torch.rand(0, 3))


# ---------------------------------------------------------------------------------------------------------- prototypes


def crowds() -> tuple[Tensor, Tensor]:
    """[4, 12] directions, and [80, 12] rows about them, of lengths from 0.1 to 10."""
    rng = np.random.default_rng(0)
    directions = np.linalg.qr(rng.normal(size=(12, 12)))[0][:4]
    rows = np.repeat(directions, [40, 25, 10, 5], axis=0) + rng.normal(0, 0.03, (80, 12))
    rows *= np.geomspace(0.1, 10, 80)[rng.permutation(80), None]
    return torch.tensor(directions, dtype=torch.float32), torch.tensor(rows, dtype=torch.float32)


def test_prototypes_are_unit_vectors_in_the_middle_of_crowds_however_long_their_rows():
    directions, rows = crowds()
    prototypes = make_prototypes(rows, 4, seed=0)
    assert prototypes.dtype == torch.float32
    torch.testing.assert_close(prototypes.norm(dim=1), torch.ones(4))
    cosines = directions @ prototypes.T  # [4, 4]
    assert cosines.max(dim=1).values.min() > 0.99
    assert sorted(cosines.argmax(dim=1).tolist()) == [0, 1, 2, 3]


def test_prototypes_are_a_function_of_their_seed():
    rows = crowds()[1]
    first, same, other = (make_prototypes(rows, 9, seed) for seed in (3, 3, 4))
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_more_prototypes_than_clips_are_refused():
    with pytest.raises(ValueError, match="at least 61 rows"):
        make_prototypes(teacher_embeddings(), 61, seed=0)


# -------------------------------------------------------------------------------------------------------- patch tokens


def tokens_with_outliers() -> Tensor:
    """[25, 8, 6]: 200 tokens, one of them a hundred times as long as the others."""
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(25, 8, 6)) * np.geomspace(2, 0.5, 6) + rng.uniform(1, 3, 6)
    tokens[3, 5] *= 100
    return torch.tensor(tokens, dtype=torch.float32)


def test_patch_targets_are_centred_shortened_and_of_mean_square_one():
    tokens = tokens_with_outliers()
    statistics = measure_patches(tokens)
    rows = tokens.double().numpy().reshape(200, 6)
    centred = rows - rows.mean(axis=0)
    lengths = [float(np.sqrt(sum(value**2 for value in row))) for row in centred]
    limit = np.quantile(lengths, 0.99)
    short = np.array(
        [row if length <= limit else row * limit / length for row, length in zip(centred, lengths, strict=True)]
    )
    expected = (short / np.sqrt((short**2).mean())).reshape(25, 8, 6)
    found = statistics.standardise(tokens)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
    assert found.square().mean().item() == pytest.approx(1, rel=1e-5)
    assert (np.array(lengths) > limit).sum() == 2


def test_a_token_at_the_mean_is_zero_and_not_a_division_by_zero():
    statistics = measure_patches(tokens_with_outliers())
    assert statistics.standardise(statistics.mean.expand(2, 3, 6)).tolist() == torch.zeros(2, 3, 6).tolist()


def test_patch_tokens_that_are_all_alike_are_refused():
    with pytest.raises(ValueError, match="the patch tokens of all clips are alike"):
        measure_patches(torch.full((4, 8, 6), 0.5))
