"""The quick probe: a good embedding has a high mAP, a deaf one has chance, and it looks at few rows."""

import io

import numpy as np
import pyarrow
import pytest
import soundfile
import torch
from pyarrow import parquet
from sklearn.metrics import average_precision_score

from hear_distill import quick_probe
from hear_distill.quick_probe import QuickProbe, spread_rows
from hear_distill.tasks import DatasetError


def tone(hz: float, seconds: float, seed: int) -> bytes:
    """A quiet tone in noise, as FLAC."""
    time_s = np.arange(round(16_000 * seconds)) / 16_000
    noise = np.random.default_rng(seed).normal(0, 0.03, len(time_s))
    buffer = io.BytesIO()
    soundfile.write(buffer, 0.1 * np.sin(2 * np.pi * hz * time_s) + noise, 16_000, format="FLAC")
    return buffer.getvalue()


HZ = {"low": 200, "middle": 1000, "high": 5000}


def write_table(path, num_rows=30, **columns):
    """Three labels in turn, groups of two rows, recordings of 1.5 to 6 s."""
    labels = [list(HZ)[row % 3] for row in range(num_rows)]
    everything = {
        "audio": [
            {"bytes": tone(HZ[label], 1.5 + row % 4 * 1.5, row), "path": None} for row, label in enumerate(labels)
        ],
        "label": labels,
        "group": [row // 2 for row in range(num_rows)],
    } | columns
    parquet.write_table(pyarrow.table(everything), path)
    return path


def spectrum(samples: np.ndarray) -> torch.Tensor:
    """[w, 32000] -> [w, 40], in which the tones are told apart."""
    power = np.abs(np.fft.rfft(samples.astype(float)))[:, :16_000].reshape(len(samples), 40, 400).mean(axis=2)
    return torch.from_numpy(np.log(power))


def deaf(samples: np.ndarray) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(samples), 5, generator=generator)


def test_an_embedding_that_tells_the_labels_apart_has_an_map_of_one_and_a_deaf_one_has_chance(tmp_path, capsys):
    probe = QuickProbe(write_table(tmp_path / "t.parquet"))
    assert probe.measure(spectrum) == pytest.approx(1, abs=1e-6)
    assert 0.2 < probe.measure(deaf) < 0.6
    assert "quick probe: 30 rows of" in (said := capsys.readouterr().out) and said.endswith("3 labels\n")


def test_a_recording_has_the_mean_of_its_windows_and_no_probe_scores_a_group_that_it_has_seen(tmp_path, monkeypatch):
    """Against scikit-learn's AP of scores that name the row: what is fitted is looked at on the way."""
    seen, path = [], write_table(tmp_path / "t.parquet", fold=[row // 2 % 3 for row in range(30)])

    class Witness:
        def __init__(self, features, is_positive, _):
            seen.append(features[:, 0])

        def decision_function(self, features):
            assert not set(features[:, 0]) & set(seen[-1])
            return np.sin(features[:, 0])

    monkeypatch.setattr(quick_probe, "fit", Witness)
    probe = QuickProbe(path)
    loudness = [np.abs(window.astype(float)).mean() for window in probe.samples]
    found = probe.measure(lambda part: torch.tensor([[np.abs(x.astype(float)).mean()] for x in part]))
    rows, taken = [], 0
    for row in range(30):
        count = 1 if 1.5 + row % 4 * 1.5 <= 2 else quick_probe.NUM_WINDOWS
        rows.append(np.mean(loudness[taken : taken + count]))
        taken += count
    assert taken == len(loudness)
    expected = [average_precision_score([r % 3 == i for r in range(30)], np.sin(rows)) for i in range(3)]
    assert found == pytest.approx(np.mean(expected))
    assert len(seen) == 9 and all(len(part) == 20 for part in seen)


def test_windows_are_spread_over_a_recording(tmp_path):
    probe = QuickProbe(write_table(tmp_path / "t.parquet"))
    sound = soundfile.read(io.BytesIO(tone(HZ["low"], 6.0, 3)), dtype="int16")[0]
    first, last = probe.samples[probe.owners == 3]
    assert np.array_equal(first, sound[:32_000]) and np.array_equal(last, sound[-32_000:])


def test_rows_are_few_as_many_of_each_label_as_there_are_and_the_same_each_time(monkeypatch):
    labels = np.array(["often"] * 900 + ["now and then"] * 150 + ["rare"] * 7)
    rows = spread_rows(labels)
    assert {str(name): int((labels[rows] == name).sum()) for name in np.unique(labels)} == {
        **{"often": 243, "now and then": 150, "rare": 7}
    }
    assert len(rows) == quick_probe.NUM_ROWS == len(set(rows.tolist()))
    assert rows[:243].max() - rows[:243].min() > 600, "not the first ones of the table"
    assert np.array_equal(rows, spread_rows(labels))
    assert spread_rows(labels[:5]).tolist() == [0, 1, 2, 3, 4]


def test_rows_without_sound_are_left_out_and_told_of(tmp_path, capsys):
    audio = [{"bytes": tone(HZ[list(HZ)[row % 3]], 2, row), "path": None} for row in range(30)]
    audio[4] = {"bytes": b"no audio", "path": None}
    probe = QuickProbe(write_table(tmp_path / "t.parquet", audio=audio))
    assert "30 rows of" in (said := capsys.readouterr().out) and "1 of them unreadable" in said
    assert len(probe.plans[0].groups) == len(probe.samples) == 29
    assert probe.measure(spectrum) > 0.95


def test_a_table_that_is_mostly_broken_or_has_no_label_to_measure_is_refused(tmp_path):
    broken = [{"bytes": b"no audio", "path": None}] * 30
    with pytest.raises(DatasetError, match="30 of 30 rows"):
        QuickProbe(write_table(tmp_path / "t.parquet", audio=broken))
    with pytest.raises(DatasetError, match=r"no label of .* can be probed, such as .*groups"):
        QuickProbe(write_table(tmp_path / "u.parquet", group=["one"] * 30))


def test_an_embedding_that_is_not_finite_has_no_map(tmp_path):
    probe = QuickProbe(write_table(tmp_path / "t.parquet"))
    assert np.isnan(probe.measure(lambda part: spectrum(part) / 0))
