"""Embeddings of waveforms as people have them: any rate, length, type and number of channels; anything else refused."""

import numpy as np
import pytest
import soxr
import torch

from hear_distill import MelPcen, Student, StudentConfig
from hear_distill.audio import windows
from hear_distill.embedding import BATCH_WINDOWS, WaveformError, window_starts

RATE = 16_000
WIDTH = 24


@pytest.fixture(scope="module")
def student() -> Student:
    torch.manual_seed(0)
    return Student(StudentConfig(width=WIDTH, blocks=1, heads=2, mlp_width=48)).eval()


def sound(num_samples: int, seed: int = 0) -> np.ndarray:
    """[n] float32: noise that grows louder and darker, so that no window is like another."""
    noise = np.random.default_rng(seed).standard_normal(num_samples)
    return (0.1 * np.linspace(0.1, 1, num_samples) * np.convolve(noise, [1, 0.5, 0.2], "same")).astype(np.float32)


@torch.inference_mode()
def by_the_evaluation(student: Student, samples: np.ndarray) -> np.ndarray:
    """[n] at 16 kHz -> [w, D]: the windows of the evaluation, one by one."""
    frontend = MelPcen()
    return np.stack([student(frontend(torch.from_numpy(window)[None]))[0].numpy() for window in windows(samples)])


@pytest.mark.parametrize("num_samples", [1, 400, 31_999, 32_000, 32_001, 48_000, 100_123])
def test_an_embedding_is_the_mean_over_the_windows_of_the_evaluation(student, num_samples):
    samples = sound(num_samples)
    expected = by_the_evaluation(student, samples)
    found = student.embed_windows(samples, RATE)
    np.testing.assert_allclose(found.embeddings, expected, atol=1e-5)
    assert found.embeddings.dtype == np.float32
    np.testing.assert_allclose(student.embed(samples, RATE), expected.mean(axis=0), atol=1e-5)


def test_windows_start_where_they_say_in_seconds_and_hold_every_sample(student):
    assert student.embed_windows(sound(40_000), RATE).starts_s.tolist() == [0, 0.5]
    assert student.embed_windows(sound(72_000), RATE, hop_s=2).starts_s.tolist() == [0, 2, 2.5]
    for num_samples, hop in ((32_001, 16_000), (100_000, 32_000), (5, 1), (64_000, 7)):
        starts = window_starts(num_samples, hop)
        covered = {sample for start in starts for sample in range(start, start + 32_000)}
        assert covered >= set(range(num_samples)) and starts == sorted(set(starts))
        assert max(starts) + 32_000 == max(num_samples, 32_000)


def test_a_list_gives_a_row_for_each_and_none_depends_on_the_others(student):
    many = [sound(20_000 + 15_000 * i, seed=i) for i in range(6)]
    rows = student.embed(many, RATE)
    assert sum(len(windows(one)) for one in many) > BATCH_WINDOWS >= len(many)  # windows of one are in two batches
    np.testing.assert_allclose(rows, [student.embed(one, RATE) for one in many], atol=1e-5)
    found = student.embed_windows(tuple(many), RATE)
    assert [len(one.starts_s) for one in found] == [len(windows(one)) for one in many]
    assert student.embed(many[:1], RATE).shape == (1, WIDTH)
    assert student.embed([], RATE).shape == (0, WIDTH) and student.embed_windows([], RATE) == []


def test_types_and_libraries_make_no_difference(student):
    whole = np.round(sound(30_000) * 32768).astype(np.int16)
    expected = student.embed(whole, RATE)
    floats = whole.astype(np.float64) / 32768
    same = [floats, floats.astype(np.float32), torch.from_numpy(whole), torch.from_numpy(floats).requires_grad_()]
    same += [whole.astype(np.int32) * 65536, whole[None], floats[::-1].copy()[::-1], whole.astype(">i2")]
    for waveform in same:
        np.testing.assert_allclose(student.embed(waveform, RATE), expected, atol=1e-5)
    half = student.embed(torch.from_numpy(floats).bfloat16(), RATE)
    np.testing.assert_allclose(half, expected, atol=0.1)


def test_the_gain_makes_no_difference_and_the_waveform_is_left_as_it_was(student):
    samples = sound(50_000)
    before = samples.copy()
    np.testing.assert_allclose(student.embed(samples * 300, RATE), student.embed(samples, RATE), atol=2e-4)
    assert np.array_equal(samples, before)


def test_two_channels_are_averaged(student):
    left, right = sound(40_000, seed=1), sound(40_000, seed=2)
    expected = student.embed((left + right) / 2, RATE)
    np.testing.assert_allclose(student.embed(np.stack([left, right]), RATE), expected, atol=1e-5)
    assert np.abs(student.embed(left, RATE) - expected).max() > 1e-3


@pytest.mark.parametrize("rate", [8_000, 44_100, 48_000.0])
def test_other_rates_are_resampled(student, rate):
    samples = soxr.resample(sound(60_000), RATE, 7_000, quality="VHQ")  # below 3.5 kHz: every rate can hold it
    there = soxr.resample(samples, 7_000, rate, quality="VHQ")
    here = soxr.resample(samples, 7_000, RATE, quality="VHQ")
    found, expected = student.embed(there, rate), student.embed(here, RATE)
    unlike = student.embed(there, RATE)
    assert np.abs(found - expected).max() < 0.1 * np.abs(unlike - expected).max()
    starts = student.embed_windows(there, rate).starts_s
    assert starts.tolist() == pytest.approx(student.embed_windows(here, RATE).starts_s.tolist(), abs=1e-3)


REFUSED = {
    "no samples": (np.zeros(0), RATE, "no samples"),
    "no samples in two channels": (np.zeros((2, 0)), RATE, "no samples"),
    "NaN": (np.array([0.1, np.nan, 0.2]), RATE, "finite"),
    "infinity": (torch.tensor([0.1, float("inf")]), RATE, "finite"),
    "beyond float32": (np.array([0.1, 1e300]), RATE, "finite"),
    "samples first": (np.zeros((32_000, 2)), RATE, "pass waveform.T"),
    "one channel, samples first": (np.zeros((32_000, 1)), RATE, "pass waveform.T"),
    "a batch as one array": (np.zeros((8, 32_000)), RATE, "for several recordings pass a list"),
    "three axes": (np.zeros((1, 1, 32_000)), RATE, "for several recordings pass a list"),
    "a number": (np.float32(0.5), RATE, "float32, expected a NumPy array"),
    "an array without axes": (np.array(0.5), RATE, r"found shape \[\]"),
    "bytes": (np.zeros(100, np.uint8), RATE, "found uint8"),
    "whole numbers of unknown scale": (torch.zeros(100, dtype=torch.long), RATE, "found int64"),
    "a list of numbers": ([0.1, 0.2], RATE, "recording 0: found a float"),
    "a name of a file": ("cough.wav", RATE, "found a str"),
    "rate in kHz": (np.zeros(100), 16, "sample_rate must be 4000 to 384000 Hz, got 16"),
    "rate is NaN": (np.zeros(100), float("nan"), "sample_rate"),
    "rate as text": (np.zeros(100), "16000", "sample_rate"),
    "no sample left at 16 kHz": (np.zeros(1), 384_000, "none at 16 kHz"),
    "the second of two": ([np.zeros(100), np.zeros(0)], RATE, "recording 1: found no samples"),
}


@pytest.mark.parametrize(("waveform", "rate", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_waveform_is_refused_in_one_line(student, waveform, rate, message):
    for call in (student.embed, student.embed_windows):
        with pytest.raises(WaveformError, match=message) as e:
            call(waveform, rate)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("hop_s", [0, -1, 2.1, 1e-9, float("nan")])
def test_a_hop_that_leaves_sound_out_or_never_ends_is_refused(student, hop_s):
    with pytest.raises(ValueError, match="hop_s"):
        student.embed_windows(sound(100), RATE, hop_s=hop_s)


def test_a_student_in_bfloat16_embeds_and_gives_float32(student):
    other = Student(student.config)
    other.load_state_dict(student.state_dict())
    embedding = other.bfloat16().embed(sound(32_000), RATE)
    assert embedding.dtype == np.float32
    np.testing.assert_allclose(embedding, student.embed(sound(32_000), RATE), atol=0.1)
