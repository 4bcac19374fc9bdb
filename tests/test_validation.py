"""Validation on a real lake: both sets, whole and cut short, and what a perfect student has."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hear_distill.drift import Moments, shift_of
from hear_distill.frontend import MelPcen
from hear_distill.lake import Lake
from hear_distill.sample import first_clips, has_sample, num_ready
from hear_distill.shards import read_clips
from hear_distill.targets import measure_targets
from hear_distill.validation import Validation, closeness, embedding_drift

CPU = torch.device("cpu")


class Listener(nn.Module):
    """A teacher that tells mean and spread of four time bands, times a random matrix; keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = torch.randn(8, 20, generator=torch.Generator().manual_seed(0))
        self.heard: list[Tensor] = []

    def forward(self, spectrogram: Tensor) -> Tensor:
        self.heard.append(spectrogram)
        bands = spectrogram.unflatten(2, (4, 48)).flatten(3)  # [B, 1, 4, 48 * 128]
        return torch.cat([bands.mean(dim=3), bands.std(dim=3)], dim=2).squeeze(1) @ self.matrix


class Parrot(nn.Module):
    """A student that says what the teacher says, standardised, plus an error."""

    def __init__(self, statistics, error: float = 0.0) -> None:
        super().__init__()
        self.listener, self.statistics, self.error = Listener(), statistics, error

    def forward(self, spectrogram: Tensor) -> Tensor:
        return self.statistics.standardise(self.listener(spectrogram))

    def project(self, embedding: Tensor) -> Tensor:
        noise = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(1))
        return embedding + self.error * noise


@pytest.fixture
def lake(full_lake):
    ledger = Lake.open(full_lake)
    yield ledger
    ledger.close()


@pytest.fixture
def validation(lake):
    return Validation(lake, Listener(), MelPcen(), CPU)


def statistics_of(validation):
    return measure_targets(validation.teacher(validation.anchor_part(100)))


def test_a_perfect_student_has_one_in_everything_and_an_error_shows_everywhere(validation):
    statistics = statistics_of(validation)
    perfect = validation.measure(Parrot(statistics), statistics)
    assert {name.rsplit("_", 1)[0] for name in perfect if name.endswith("cka")} == {"anchor", "anchor_padded", "recent"}
    assert {
        name for name, value in perfect.items() if value != pytest.approx(0 if name.endswith("mse") else 1)
    } == set()
    worse = validation.measure(Parrot(statistics, error=0.5), statistics)
    assert worse.keys() == perfect.keys()
    assert worse["anchor_mse"] == pytest.approx(0.25, rel=0.5)
    assert all(worse[name] < perfect[name] - 1e-6 for name in worse if not name.endswith("mse"))


def test_the_padded_set_is_the_anchor_with_each_clip_silent_after_its_cut(validation):
    statistics = statistics_of(validation)
    validation.teacher.heard.clear()
    validation.measure(Parrot(statistics), statistics)
    whole, padded, _ = validation.teacher.heard
    assert len(whole) == len(padded) and not torch.equal(whole, padded)
    ends = [image[0, -2:].std() for image in padded]  # two rows at the end: silence is one value in each band
    assert float(np.mean([float(end) for end in ends])) < float(whole[:, 0, -2:].std())


def test_the_teacher_hears_the_anchor_once(validation):
    statistics = statistics_of(validation)
    validation.teacher.heard.clear()
    first = validation.measure(Parrot(statistics), statistics)
    assert len(validation.teacher.heard) == 3
    assert validation.measure(Parrot(statistics), statistics) == first
    assert len(validation.teacher.heard) == 4  # `recent` may be another set


def test_neighbours_are_left_out_where_there_are_too_few_clips():
    rows = torch.randn(10, 20, generator=torch.Generator().manual_seed(0))
    assert "knn_overlap" not in closeness(rows, rows, measure_targets(rows))
    more = torch.cat([rows, -rows])
    assert float(closeness(more, more, measure_targets(more))["knn_overlap"]) == pytest.approx(1)


# ---- the first clips ----


@pytest.mark.parametrize("part", [3, 10, 64])
def test_the_sample_is_the_first_clips_of_the_oldest_shards_whatever_the_parts(lake, part):
    found = {}
    for ids, samples in first_clips(lake, 14, part):
        assert len(ids) == len(samples) <= part
        found |= dict(zip(ids, samples, strict=True))
    shards = lake.ready("train")
    expected = [(shard.id, clip) for shard in shards for clip in range(shard.num_clips)][:14]
    assert list(found) == expected and shards[0].num_clips < 14
    for shard_id, clip in expected:
        with lake.path(shard_id, "train").open("rb") as f:
            samples = np.empty((1, 32_000), np.int16)
            read_clips(f.fileno(), [clip], samples)
        assert np.array_equal(samples[0], found[shard_id, clip])


def test_looking_consumes_nothing(lake):
    before = lake.books(), num_ready(lake)
    assert sum(len(ids) for ids, _ in first_clips(lake, 10**6, 8)) == before[1]
    assert (lake.books(), num_ready(lake)) == before


def test_a_sample_is_there_when_enough_is_ready_or_nothing_more_comes(lake):
    assert has_sample(lake, num_ready(lake)) and has_sample(lake, 10**6)
    lake.db.execute("UPDATE tars SET state = 'open' WHERE position = 0")
    try:
        assert has_sample(lake, num_ready(lake)) and not has_sample(lake, num_ready(lake) + 1)
    finally:
        lake.db.execute("UPDATE tars SET state = 'done' WHERE position = 0")


def test_the_drift_of_embeddings_is_that_of_their_mean_less_chance():
    rng = np.random.default_rng(0)
    same = torch.tensor(rng.normal(0, 1, (400, 64)))
    assert embedding_drift(same) < 0.03
    moved = same + torch.tensor(rng.choice([-0.5, 0.5], 64))
    assert float(embedding_drift(moved)) == pytest.approx(0.5, abs=0.02)
    reference = Moments(10**9, np.zeros(64), 64.0)
    by_definition = shift_of(reference, Moments.of(moved.numpy()), chance=1 / 400)
    assert float(embedding_drift(moved)) == pytest.approx(by_definition)


def test_drift_is_told_of_the_shards_and_of_what_the_teacher_hears(validation):
    statistics = statistics_of(validation)
    assert validation.drift(statistics).keys() == {
        f"drift_{n}" for n in ("level", "bands", "source", "mixing", "length")
    }
    validation.measure(Parrot(statistics), statistics)
    assert 0 <= validation.drift(statistics)["drift_embedding"] < 2
