"""The score without training, against a loop over rows."""

import numpy as np
import pytest

from hear_distill import neighbours
from hear_distill.neighbours import neighbour_accuracy, neighbour_votes
from hear_distill.probes import Leak, masks_of


def rows(num_rows: int = 70) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    groups = rng.permutation(num_rows) // 3
    classes = rng.integers(3, size=num_rows)
    return rng.normal(size=(num_rows, 4)) + 1.5 * np.eye(4)[classes], classes, groups


def votes_by_the_book(features, classes, groups, asked) -> list[list[float]]:
    """One row after another, one neighbour after another."""
    found = []
    for i in range(len(features)):
        others = [j for j in asked(i) if groups[j] != groups[i]]
        cosine = {
            j: features[i] @ features[j] / np.linalg.norm(features[i]) / np.linalg.norm(features[j]) for j in others
        }
        nearest = sorted(others, key=cosine.get, reverse=True)[:10]
        votes = [sum(np.exp(cosine[j] / 0.07) for j in nearest if classes[j] == kind) for kind in range(3)]
        found.append([vote / sum(votes) for vote in votes])
    return found


def test_votes_are_those_of_the_ten_most_similar_rows_of_other_groups(monkeypatch):
    monkeypatch.setattr(neighbours, "BLOCK_ROWS", 16)  # so that 70 rows are several blocks, the last not a whole one
    features, classes, groups = rows()
    expected = votes_by_the_book(features, classes, groups, lambda _: range(70))
    np.testing.assert_allclose(neighbour_votes(features, classes, groups), expected, atol=1e-12)
    right = (np.argmax(expected, axis=1) == classes).mean()
    assert neighbour_accuracy(features, classes, groups) == pytest.approx(right)


def test_rows_of_a_split_ask_those_outside_of_their_mask_alone():
    features, classes, groups = rows()
    folds = groups % 3
    expected = votes_by_the_book(features, classes, groups, lambda i: np.flatnonzero(folds != folds[i]))
    np.testing.assert_allclose(neighbour_votes(features, classes, groups, masks_of(folds)), expected, atol=1e-12)
    official = neighbour_votes(features, classes, groups, [folds == 1])
    np.testing.assert_allclose(official[folds == 1], np.array(expected)[folds == 1], atol=1e-12)
    assert np.isnan(official[folds != 1]).all()


def test_a_copy_in_the_same_group_does_not_help():
    """Every row has a twin of its group and nothing else like it."""
    rng = np.random.default_rng(0)
    features, classes, groups = rng.normal(size=(200, 30)).repeat(2, axis=0), rng.integers(4, size=200).repeat(2), None
    groups = np.arange(400) // 2
    assert neighbour_accuracy(features, classes, groups) < 0.4
    assert neighbour_accuracy(features, classes, np.arange(400)) > 0.9  # a leak would show


def test_groups_on_both_sides_broken_embeddings_and_too_few_rows_are_refused():
    features, classes, groups = rows()
    with pytest.raises(Leak, match="groups are on both sides"):
        neighbour_votes(features, classes, groups, masks_of(np.arange(70) % 3))
    with pytest.raises(ValueError, match="a row has 9 rows of other groups to ask, at least 10 needed"):
        neighbour_votes(features[:10], classes[:10], np.arange(10))
    features[3] = 0
    features[4, 1] = np.nan
    with pytest.raises(ValueError, match="2 of 70 embeddings are zero or not finite"):
        neighbour_votes(features, classes, groups)
