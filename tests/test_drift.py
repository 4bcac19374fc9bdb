"""Drift: each number by hand, what is exempt, and a source that is sorted by class, read in order and mixed."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lake_tools import encoded, make_lake, members_of, noise, stream, write_tar

from hear_distill.drift import (
    MIN_RECORDINGS,
    THRESHOLDS,
    WINDOW_SHARDS,
    Moments,
    drift_of,
    family_of,
    line_of,
    shift_of,
    stability_index,
    warnings_of,
)
from hear_distill.lake import Lake, permuted

LEVELS = [0] * 8 + [10, 20, 40, 20, 10] + [0] * 3
BANDS = {"count": 100, "mean": [-40.0, -30.0, -35.0], "variance": 300.0}
TARS = {"speech_1.tar": 50, "music_7.tar": 30, "music_8.tar": 20}


def row(**changes: Any) -> dict[str, Any]:
    """What a streamer notes of a shard of 100 clips, with changes."""
    usual = {"recordings": 50, "clips": 100, "levels_db": LEVELS, "bands_db": BANDS, "tars": TARS}
    return {**usual, "open_tars": 3, "wanted_tars": 3, **changes}


def drifted(*rows: dict[str, Any]) -> set[str]:
    """Names of what has drifted from ten ordinary shards to ten such ones; all of it must have been measured."""
    drift = drift_of([row()] * 10 + list(rows) * (10 // len(rows)))
    assert not any(map(math.isnan, drift.values()))
    return {warning.split()[0] for warning in warnings_of(drift)}


# ---- by hand ----


def test_moments_of_parts_add_up_to_those_of_the_whole_whatever_their_sizes():
    values = np.random.default_rng(0).normal([3, -40], [1, 7], (50, 2))
    added = Moments.of(values[:3]) + Moments.of(values[3:4]) + Moments.of(values[4:])
    assert (added.count, added.variance) == (50, pytest.approx(values.var(axis=0).sum()))
    np.testing.assert_allclose(added.mean, values.mean(axis=0))
    again = Moments.from_json(added.to_json())
    assert (again.count, again.variance) == (50, pytest.approx(added.variance, abs=0.01))
    np.testing.assert_allclose(again.mean, added.mean, atol=0.01)


def test_a_shift_is_measured_in_standard_deviations_of_the_reference_less_chance():
    reference = Moments(100, np.array([1.0, 2.0, 3.0]), 25.0)
    moved = Moments(100, np.array([1.0, 5.0, -1.0]), 400.0)
    assert shift_of(reference, moved, 0) == pytest.approx(1.0)  # |(0, 3, -4)| is 5
    assert shift_of(reference, moved, 0.64) == pytest.approx(0.6)
    assert shift_of(reference, reference, 0.1) == 0


def test_samples_of_one_population_have_shifts_and_indices_that_are_taken_off_as_chance():
    rng = np.random.default_rng(1)
    shifts, indices = [], []
    for _ in range(200):
        a, b = rng.normal(0, [1, 5, 3], (150, 3)), rng.normal(0, [1, 5, 3], (300, 3))
        shifts.append([shift_of(Moments.of(a), Moments.of(b), chance) ** 2 for chance in (0, 1 / 150 + 1 / 300)])
        counts = [rng.multinomial(n, [0.1, 0.2, 0.4, 0.2, 0.1]) for n in (150, 300)]
        indices.append([stability_index(*counts, chance) for chance in (0, 1 / 150 + 1 / 300)])
    for with_chance, without in (np.mean(shifts, axis=0), np.mean(indices, axis=0)):
        assert without < 0.5 * with_chance, "the rest is what the cut at zero leaves"
    assert np.mean(shifts, axis=0)[0] == pytest.approx(1 / 150 + 1 / 300, rel=0.2)
    assert np.mean(indices, axis=0)[0] == pytest.approx(4 * (1 / 150 + 1 / 300), rel=0.2)


def test_the_stability_index_is_the_published_sum():
    by_hand = (0.5 - 0.8) * math.log(0.5 / 0.8) + (0.5 - 0.2) * math.log(0.5 / 0.2)
    assert stability_index([8_000, 2_000], [500_000, 500_000], 0) == pytest.approx(by_hand, rel=1e-3)
    assert stability_index([0, 8_000, 0, 2_000], [0, 500_000, 0, 500_000], 0) == pytest.approx(by_hand, rel=1e-3)
    assert 0.9 < stability_index([90, 10, 0], [50, 10, 40], 0) < math.inf, "a bin that only one of them has"


def test_what_is_numbered_through_is_one_family():
    assert family_of("part2/flash_20_snippets_17.tar") == family_of("part10/flash_21_snippets_8.tar")
    assert family_of("speech_1.tar") != family_of("music_1.tar")


# ---- what fires, and what does not ----


def test_the_same_again_has_not_drifted():
    drift = drift_of([row()] * 20)
    assert drift == {"level": 0, "bands": 0, "source": 0, "mixing": 0, "length": 0} and warnings_of(drift) == []


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("level", {"levels_db": LEVELS[4:] + [0] * 4}),
        ("bands", {"bands_db": {**BANDS, "mean": [-50.0, -30.0, -35.0]}}),
        ("mixing", {"tars": {"speech_2.tar": 95, "music_4.tar": 5}}),
        ("length", {"recordings": 20}),
        ("length", {"recordings": 100, "clips": 90}),
    ],
    ids=["louder", "darker", "fewer tars", "longer", "shorter"],
)
def test_each_thing_that_drifts_is_named_and_nothing_else(name, change):
    assert drifted(row(**change)) == {name}


def test_other_tars_of_the_same_families_are_no_drift():
    assert drifted(row(tars={"speech_2.tar": 50, "music_70.tar": 50})) == set()


def test_other_families_are_drift_if_there_were_many_tars_of_each_and_chance_if_there_were_few():
    def reading(family: str) -> list[dict[str, Any]]:
        return [row(tars={f"{family}_{3 * i + j}.tar": 33 + (j == 0) for j in range(3)}) for i in range(10)]

    assert warnings_of(drift_of(reading("speech") + reading("music")))[0].startswith("source has drifted")
    assert drifted(row(tars={"speech_2.tar": 40, "music_4.tar": 30, "music_5.tar": 30})) == set()


def test_too_few_recordings_are_not_measured_and_no_warning():
    few = [row(recordings=MIN_RECORDINGS // 5 - 1)] * 5
    barren = [row(recordings=500, clips=19)] * 5  # nearly all were passed over
    for statistics in ([], [row()], [row()] * 5 + few, few + [row()] * 5, [row()] * 5 + barren):
        drift = drift_of(statistics)
        assert drift.keys() == THRESHOLDS.keys() - {"embedding"}
        assert all(map(math.isnan, drift.values())) and warnings_of(drift) == []
        assert "level not measured, bands not measured" in line_of(drift)


def test_the_tail_of_a_source_an_anchor_and_a_shard_without_clips_are_in_no_window():
    strange = {"levels_db": LEVELS[4:] + [0] * 4, "recordings": 100}
    tail, anchor = row(**strange, open_tars=2), row(**strange, open_tars=0, wanted_tars=0)
    empty = row(clips=0, recordings=7, levels_db=[0] * 16, bands_db=None, tars={})
    drift = drift_of([anchor, *[row()] * 10, *[row()] * 5, empty, *[tail] * 5])
    assert drift["level"] == 0 and warnings_of(drift) == []
    assert all(map(math.isnan, drift_of([row()] * 10 + [tail] * 10).values())), "all of the newest are tail"
    assert drifted(row(**strange)) >= {"level"}, "the same, but mixed"


def test_the_newest_are_compared_with_the_first_and_what_lies_between_does_not_matter(tmp_path):
    lake = make_lake(tmp_path)
    louder = row(levels_db=LEVELS[4:] + [0] * 4)
    contents = [row()] * WINDOW_SHARDS + [louder] * 7 + [row()] * WINDOW_SHARDS
    for i, content in enumerate(contents):
        lake.publish(lake.begin_shard("worker", 1), [], [], Counter(), statistics=content)
        assert [told["id"] for told in lake.statistics(2, 3)] == sorted({*range(i + 1)[:3], *range(i + 1)[-2:]})
    first_and_newest = lake.statistics(WINDOW_SHARDS, WINDOW_SHARDS)
    assert len(first_and_newest) == 2 * WINDOW_SHARDS
    assert drift_of(first_and_newest)["level"] == 0
    for _ in range(WINDOW_SHARDS):
        lake.publish(lake.begin_shard("worker", 1), [], [], Counter(), statistics=louder)
    (warning,) = warnings_of(drift_of(lake.statistics(WINDOW_SHARDS, WINDOW_SHARDS)))
    assert warning.startswith("level has drifted: ") and "0.75 is the limit" in warning


# ---- a source that is sorted by class ----


def write_sorted_source(folder: Path, seed: int) -> Path:
    """Ten tars of 40 recordings, loud and bright ones before quiet and dark ones in the order in which they are read.

    They are named so that the permutation leaves them in this order.
    """
    for number, name in enumerate(permuted([f"sound-{i}.tar" for i in range(10)], seed)):
        members = []
        for index in range(40):
            rng = np.random.default_rng([number, index])
            white = noise(int(rng.integers(32_000, 52_000)), number, index) / 32768
            is_loud = number < 5
            coloured = np.diff(white) if is_loud else np.convolve(white, np.full(16, 1 / 16), "same")
            level = 10 ** (rng.normal(-15 if is_loud else -40, 5) / 20)
            samples = level * coloured / coloured.std() * 32768
            audio = encoded(np.clip(samples, -32768, 32767).astype(np.int16))
            members += members_of(f"rec-{number}-{index}", audio)
        write_tar(folder / name, members)
    return folder


def warned_at_any_moment(lake: Path) -> set[str]:
    """What drifted, looked at after each shard."""
    statistics = Lake.open(lake).statistics(1_000)
    assert 2 * WINDOW_SHARDS > len(statistics) > 10, "else the windows are not these"
    drifts = [drift_of(statistics[: i + 1]) for i in range(len(statistics))]
    assert sum(not math.isnan(drift["level"]) for drift in drifts) >= 3, "else it says nothing"
    return {warning.split()[0] for drift in drifts for warning in warnings_of(drift)}


def test_a_sorted_source_drifts_if_it_is_read_in_order_and_does_not_if_it_is_permuted_and_mixed(tmp_path):
    flags = ["--shard-clips", 20, "--val-clips", 20, "--val-fraction", 0.01, "--cap-gb", 1]
    source = write_sorted_source(tmp_path / "source", seed=0)
    assert stream(source, tmp_path / "in order", *flags, "--open-tars", 1).returncode == 0
    assert {"level", "bands"} <= warned_at_any_moment(tmp_path / "in order")

    assert stream(source, tmp_path / "mixed", *flags, "--seed", 1).returncode == 0
    assert warned_at_any_moment(tmp_path / "mixed") == set()
    rows = Lake.open(tmp_path / "mixed").statistics(1_000)
    assert [row["open_tars"] for row in rows[:2]] == [0, 8] and {row["wanted_tars"] for row in rows[1:]} == {8}
    assert rows[-1]["open_tars"] < 8, "the tail is told"
