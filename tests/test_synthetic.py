"""The synthetic recordings: in the dataset's layout, the same every time, to be told apart by more than loudness."""

import io
import json
import re
import tarfile
from itertools import pairwise

import numpy as np
import pytest
import soundfile
from pyarrow import parquet

from hear_distill import synthetic
from hear_distill.audio import decode

RATE = 16_000


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic") / "source"
    synthetic.write_source(folder, num_tars=3, recordings_per_tar=12, seed=7)
    return folder


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("synthetic") / "events.parquet"
    synthetic.write_table(path, num_per_label=15, seed=7)
    return path


def members(folder) -> list[tuple[str, str, bytes]]:
    found = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            found += [(path.name, member.name, tar.extractfile(member).read()) for member in tar]
    return found


def test_the_same_arguments_make_the_same_bytes_and_another_seed_makes_others(source, tmp_path):
    for name, seed in (("again", 7), ("other", 8)):
        synthetic.write_source(tmp_path / name, num_tars=3, recordings_per_tar=12, seed=seed)
    assert members(tmp_path / "again") == members(source)
    other_audio = {data for _, name, data in members(tmp_path / "other") if name.endswith("mp3")}
    assert not other_audio & {data for _, _, data in members(source)}


def test_a_recording_does_not_depend_on_how_many_others_are_made(source, tmp_path):
    synthetic.write_source(tmp_path / "fewer", num_tars=1, recordings_per_tar=12, seed=7)
    assert members(tmp_path / "fewer") == members(source)[:24]


def test_tars_and_members_are_laid_out_like_the_dataset_s(source):
    names = [path.name for path in source.glob("*.tar")]
    numbers = sorted(int(re.fullmatch(r"flash_20_random_snippets_(\d+)\.tar", name)[1]) for name in names)
    assert numbers == [0, 2, 3]  # with a gap
    found = members(source)
    for (_, mp3, _), (_, text, data) in zip(found[::2], found[1::2], strict=True):
        assert mp3.removesuffix(".audio.mp3") == text.removesuffix(".metadata.json")
        assert "." not in mp3.removesuffix(".audio.mp3")
        metadata = json.loads(data)
        assert {"caption", "segment_filename", "duration_ms", "start_time_ms", "title", "like_count"} <= metadata.keys()
    assert len({name for _, name, _ in found}) == len(found)


def test_every_recording_decodes_to_sound_of_its_stated_length(source):
    found, seconds = members(source), []
    for (_, _, mp3), (_, _, text) in zip(found[::2], found[1::2], strict=True):
        samples = decode(mp3).astype(float) / 32768
        stated_s = json.loads(text)["duration_ms"] / 1000
        assert stated_s <= len(samples) / RATE < stated_s + 0.2  # an encoder pads
        assert np.abs(samples).max() < 0.999
        assert 10 ** (-46 / 20) < samples.std() < 10 ** (-20 / 20)
        seconds.append(stated_s)
    assert 0.5 <= min(seconds) < 2 < 8 < max(seconds) <= 12


def test_a_source_that_is_there_is_left_alone_and_another_one_is_refused(source):
    before = {path: path.stat().st_mtime_ns for path in source.iterdir()}
    synthetic.write_source(source, num_tars=3, recordings_per_tar=12, seed=7)
    assert {path: path.stat().st_mtime_ns for path in source.iterdir()} == before
    with pytest.raises(ValueError, match="something else"):
        synthetic.write_source(source, num_tars=3, recordings_per_tar=12, seed=8)


def test_interrupted_writing_leaves_no_folder(tmp_path, monkeypatch):
    whole = synthetic.write_tar

    def interrupted(path, position, *rest):
        if position == 1:
            raise KeyboardInterrupt
        whole(path, position, *rest)

    monkeypatch.setattr(synthetic, "write_tar", interrupted)
    with pytest.raises(KeyboardInterrupt):
        synthetic.write_source(tmp_path / "source", num_tars=2, recordings_per_tar=3, seed=0)
    assert list(tmp_path.iterdir()) == []


def test_no_group_of_the_table_is_in_two_folds_and_every_fold_has_every_label(table):
    rows = parquet.read_table(table, columns=["label", "group", "fold"]).to_pylist()
    assert len(rows) == 15 * len(synthetic.SOUNDS)
    assert len({(row["group"], row["fold"]) for row in rows}) == len({row["group"] for row in rows})
    assert {(row["label"], row["fold"]) for row in rows} == {(s, f) for s in synthetic.SOUNDS for f in range(1, 6)}


def band_levels(samples: np.ndarray) -> np.ndarray:
    """[n] -> [16] level in dB of 16 bands, evenly spaced in log frequency, without the overall level."""
    power = np.abs(np.fft.rfft(samples)) ** 2
    edges = np.geomspace(60, 7900, 17) / (RATE / 2) * len(power)
    levels = np.log10([power[int(a) : int(b) + 1].mean() + 1e-12 for a, b in pairwise(edges)])
    return levels - levels.mean()


def nearest_centroid_accuracy(features: np.ndarray, labels: np.ndarray, folds: np.ndarray) -> float:
    """Share of rows whose own label's mean over the other folds is the nearest."""
    num_right = 0
    for fold in np.unique(folds):
        train, test = folds != fold, folds == fold
        names = np.unique(labels)
        means = np.stack([features[train & (labels == name)].mean(axis=0) for name in names])  # [labels, D]
        distance = ((features[test][:, None] - means) ** 2).sum(axis=2)  # [rows, labels]
        num_right += (names[distance.argmin(axis=1)] == labels[test]).sum()
    return num_right / len(labels)


def test_the_sounds_differ_in_their_spectrum_and_not_in_their_loudness(table):
    rows = parquet.read_table(table).to_pylist()
    sounds = [soundfile.read(io.BytesIO(row["audio"]["bytes"]))[0] for row in rows]
    labels, folds = (np.array([row[name] for row in rows]) for name in ("label", "fold"))
    spectrum = np.stack([band_levels(sound) for sound in sounds])
    loudness = np.log10([[sound.std()] for sound in sounds])
    chance = 1 / len(synthetic.SOUNDS)
    assert 3 * chance < nearest_centroid_accuracy(spectrum, labels, folds) < 0.95
    assert nearest_centroid_accuracy(loudness, labels, folds) < 2 * chance


def test_a_table_too_small_for_five_folds_of_two_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 10"):
        synthetic.write_table(tmp_path / "small.parquet", num_per_label=9, seed=0)
    assert list(tmp_path.iterdir()) == []
