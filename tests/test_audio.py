"""Any recording becomes 16 kHz mono int16 without a seam, a wrap or a loss; the cutting rule is the published one.

n samples   c channels
"""

import numpy as np
import pytest
from lake_tools import encoded, noise
from reference.chunker import decode_in_one_shot, starts_by_the_book

from hear_distill import audio
from hear_distill.audio import DecodeError, clip_starts, decode

RATES = (8_000, 22_050, 44_100, 96_000)
LAYOUTS = [("WAV", 1), ("WAV", 6), ("FLAC", 2), ("FLAC", 6), ("OGG", 2), ("OGG", 4), ("MP3", 1), ("MP3", 2)]
CASES = [
    (file_format, channels, rate)
    for file_format, channels in LAYOUTS
    for rate in RATES
    if file_format != "MP3" or rate <= 48_000  # MP3 knows no higher rate
]


def sine(hz: int, rate: int, seconds: float, level: float) -> np.ndarray:
    """[n]"""
    return level * np.sin(2 * np.pi * hz * np.arange(round(rate * seconds)) / rate)


def strongest(samples: np.ndarray) -> tuple[int, float]:
    """[n] int16 at 16 kHz -> frequency in Hz and amplitude of its strongest sine, from one second in the middle."""
    second = samples[4_000:20_000] / 32_768
    spectrum = np.abs(np.fft.rfft(second)) / 8_000  # a bin is 1 Hz, so a whole number of Hz does not leak
    return int(spectrum.argmax()), float(spectrum.max())


@pytest.mark.parametrize(
    ("num_samples", "starts"),
    [
        (31_999, []),
        (32_000, [0]),
        (47_999, [0]),
        (48_000, [0, 16_000]),
        (63_999, [0, 31_999]),
        (64_000, [0, 32_000]),
        (80_000, [0, 32_000, 48_000]),
    ],
)
def test_clips_begin_where_the_published_rule_says(num_samples, starts):
    assert clip_starts(num_samples) == starts


def test_the_rule_agrees_with_a_walk_through_the_recording():
    lengths = [*range(0, 200_000, 977), *range(63_990, 64_010), *range(79_990, 80_010)]
    assert [clip_starts(n) for n in lengths] == [starts_by_the_book(n) for n in lengths]


@pytest.mark.parametrize(("file_format", "channels", "rate"), CASES)
def test_a_sine_keeps_its_length_frequency_and_level(file_format, channels, rate):
    levels = 0.1 * np.arange(1, channels + 1)
    frames = np.stack([sine(1_234, rate, 1.7, level) for level in levels], axis=1)  # [n, c]
    samples = decode(encoded(frames, rate, file_format))

    assert samples.dtype == np.int16
    assert abs(len(samples) - 1.7 * 16_000) <= 4
    hz, level = strongest(samples)
    assert hz == 1_234
    assert level == pytest.approx(levels.mean(), rel=0.001 if file_format in ("WAV", "FLAC") else 0.03)


@pytest.mark.parametrize("file_format", ["WAV", "FLAC"])
def test_what_was_16_khz_and_16_bits_comes_back_unchanged(file_format):
    samples = np.r_[np.array([-32_768, 32_767, -32_767, -1, 0, 1], np.int16), noise(40_000, 2)]
    np.testing.assert_array_equal(decode(encoded(samples, file_format=file_format)), samples)


def test_channels_of_opposite_phase_cancel():
    left = noise(40_000, 1) // 2
    assert not decode(encoded(np.stack([left, -left], axis=1))).any()


def test_sound_above_the_new_half_rate_is_not_folded_down():
    samples = decode(encoded(sine(11_000, 44_100, 1.7, 0.8), 44_100))
    assert strongest(samples)[1] < 0.8 / 1_000  # -60 dB


@pytest.mark.parametrize(("rate", "channels"), [(16_000, 1), (44_100, 2), (22_050, 6)])
def test_blocks_leave_no_seam(monkeypatch, rate, channels):
    monkeypatch.setattr(audio, "BLOCK_FRAMES", 4_099)  # a prime: blocks end nowhere near a whole output sample
    frames = np.stack([noise(150_000, rate, channel) // 2 for channel in range(channels)], axis=1)  # [n, c]
    recording = encoded(frames, rate, "FLAC")
    assert np.abs(decode(recording).astype(int) - decode_in_one_shot(recording)).max() <= 1


def test_a_recording_of_whole_blocks_is_not_cut_short_and_not_repeated(monkeypatch):
    monkeypatch.setattr(audio, "BLOCK_FRAMES", 5_000)
    recording = encoded(noise(20_000, 3))
    np.testing.assert_array_equal(decode(recording), decode_in_one_shot(recording))


@pytest.mark.parametrize("rate", [16_000, 48_000])
def test_full_scale_does_not_wrap(rate):
    half_period = 100 * rate // 16_000
    square = np.tile(np.repeat(np.array([32_767, -32_768], np.int16), half_period), 100)  # resampling overshoots
    halves = decode(encoded(square, rate)).reshape(100, 2, 100)[1:-1, :, 5:-5]  # away from the edges
    assert (halves[:, 0] > 20_000).all()
    assert (halves[:, 1] < -20_000).all()


def test_floats_beyond_full_scale_are_clipped():
    samples = decode(encoded(np.repeat([3.0, -3.0], 20_000), subtype="FLOAT"))
    assert (samples[10_000], samples[30_000]) == (32_767, -32_768)


def test_a_truncated_mp3_gives_what_is_there():
    recording = encoded(noise(64_000, 5) // 4, file_format="MP3")
    whole, half = decode(recording), decode(recording[: len(recording) // 2])
    assert 0.4 < len(half) / len(whole) < 0.6
    assert np.abs(half[2_000:20_000].astype(int) - whole[2_000:20_000]).max() <= 1


@pytest.mark.parametrize(
    ("recording", "reason"),
    [
        (b"", "undecodable"),
        (b"<html>404 Not Found</html>" * 50, "undecodable"),
        (np.random.default_rng(1).bytes(20_000), "undecodable"),
        (encoded(noise(40_000, 1), file_format="FLAC")[:30], "undecodable"),
        (encoded(noise(0, 1)), "empty"),
        (encoded(np.r_[sine(440, 16_000, 2, 0.5), np.nan], subtype="FLOAT"), "not finite"),
        (encoded(np.r_[np.inf, sine(440, 16_000, 2, 0.5)], subtype="FLOAT"), "not finite"),
    ],
    ids=["nothing", "a web page", "random bytes", "half a header", "no samples", "a NaN", "an infinity"],
)
def test_what_cannot_be_used_is_refused_with_its_reason(recording, reason):
    with pytest.raises(DecodeError) as refusal:
        decode(recording)
    assert refusal.value.reason == reason


@pytest.mark.parametrize("rate", [0, 1, 3_999, 384_001, 2**31 - 1, 2**32 - 1])
def test_an_absurd_rate_in_the_header_is_refused_before_it_costs_memory(rate):
    recording = bytearray(encoded(noise(40_000, 1)))
    recording[24:28] = rate.to_bytes(4, "little")
    with pytest.raises(DecodeError, match="undecodable"):
        decode(bytes(recording))


def test_a_nan_far_behind_the_first_block_is_found(monkeypatch):
    monkeypatch.setattr(audio, "BLOCK_FRAMES", 1_000)
    samples = sine(440, 16_000, 2, 0.5)
    samples[30_500] = np.nan
    with pytest.raises(DecodeError, match="not finite"):
        decode(encoded(samples, subtype="FLOAT"))
