"""The ESC-10 baselines: features of known sounds, refusals, and on the real table the published accuracies."""

import io
import os
import runpy
from pathlib import Path

import numpy as np
import pytest
import soundfile
from lake_tools import ROOT
from lookalikes import audio_column, sound, write_parquet

from hear_distill.probes import Leak

ESC10 = Path(os.environ.get("ESC10_TABLE", "esc10.parquet"))  # a file at the root, as in NOTES.md


@pytest.fixture(scope="module")
def script() -> dict:
    return runpy.run_path(str(ROOT / "experiments" / "esc10_baselines.py"), run_name="script")


def flac(samples: np.ndarray, rate_hz: int = 44_100) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate_hz, format="FLAC")
    return buffer.getvalue()


def test_the_rate_of_crossings_is_twice_the_frequency_and_steady_sounds_do_not_vary(script):
    time_s = np.arange(44_100) / 44_100
    tone = 0.5 * np.sin(2 * np.pi * 1000 * time_s + 0.1)
    swept = 0.5 * np.sin(2 * np.pi * (500 + 3000 * time_s) * time_s)
    steady, moving = script["features_of"]([flac(tone), flac(swept)])
    assert len(steady) == 26
    assert steady[24] == pytest.approx(2 * 1000 / 44_100, rel=0.02)
    assert steady[25] < 0.002 < moving[25]
    assert steady[12:24].mean() < 0.5 * moving[12:24].mean()


def test_loudness_alone_does_not_change_a_feature(script):
    """The 0th coefficient, which holds it, is left out."""
    noise = np.random.default_rng(0).normal(0, 0.1, 44_100)
    quiet, loud = script["features_of"]([flac(0.25 * noise), flac(noise)])
    np.testing.assert_allclose(quiet, loud, rtol=0.02, atol=0.1)


def test_stereo_is_mixed_and_another_rate_is_refused(script):
    noise = np.random.default_rng(0).normal(0, 0.1, 44_100)
    both, one = script["features_of"]([flac(np.stack([noise, noise], axis=1)), flac(noise)])
    np.testing.assert_allclose(both, one, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="a recording at 16000 Hz, expected 44100"):
        script["features_of"]([flac(noise, 16_000)])


def test_a_table_without_folds_is_refused_and_so_are_folds_with_a_leak(script, tmp_path):
    rows = {"label": list("abab"), "group": list("0123")}
    write_parquet(tmp_path / "t.parquet", {"audio": audio_column([sound(0)] * 4, [None] * 4), **rows})
    with pytest.raises(ValueError, match=r"t\.parquet has no column fold"):
        script["read_table"](tmp_path / "t.parquet")
    with pytest.raises(Leak, match="2 of 2 groups are on both sides"):
        script["accuracies"](np.zeros((4, 26)), *map(np.array, (list("abab"), list("aabb"), list("1212"))))


def test_a_table_is_read_with_its_labels_in_the_order_of_its_rows(script, tmp_path):
    noise = [flac(np.random.default_rng(i).normal(0, 0.1, 8_820)) for i in range(4)]
    rows = {"label": list("baab"), "group": list("0123"), "fold": [1, 2, 1, 2]}
    write_parquet(tmp_path / "t.parquet", {"audio": audio_column(noise, [None] * 4), **rows})
    features, labels, groups, folds = script["read_table"](tmp_path / "t.parquet")
    np.testing.assert_array_equal(features, script["features_of"](noise))
    assert ["".join(column) for column in (labels, groups, folds)] == ["baab", "0123", "1212"]


@pytest.mark.slow
@pytest.mark.skipif(not ESC10.is_file(), reason="ESC-10 is not here; name its table in ESC10_TABLE")
def test_the_published_accuracies_are_met_within_their_spread_between_folds(script):
    found = script["accuracies"](*script["read_table"](ESC10))
    for name, published in script["PUBLISHED"].items():
        assert np.mean(found[name]) == pytest.approx(published, abs=np.std(found[name], ddof=1)), name
