"""Any recording becomes 16 kHz mono int16 without a seam, a wrap or a loss; the cutting rule is the published one.

n samples   c channels
"""

import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lake_tools import encoded, noise, run_python
from reference.chunker import decode_in_one_shot, starts_by_the_book

from hear_distill import audio
from hear_distill.audio import DecodeError, band_levels_db, clip_starts, clips_in, decode, decode_blocks, rms_db

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


@pytest.mark.parametrize(
    ("file_format", "rate", "channels"),
    [
        ("FLAC", 16_000, 1),
        ("FLAC", 44_100, 2),
        ("FLAC", 22_050, 6),
        ("OGG", 44_100, 2),
        ("MP3", 16_000, 1),
        ("MP3", 44_100, 2),
    ],
)
def test_blocks_leave_no_seam(monkeypatch, file_format, rate, channels):
    monkeypatch.setattr(audio, "BLOCK_VALUES", 4_099)  # a prime: blocks end nowhere near a whole output sample
    frames = np.stack([noise(150_000, rate, channel) // 2 for channel in range(channels)], axis=1)  # [n, c]
    recording = encoded(frames, rate, file_format)
    assert np.abs(decode(recording).astype(int) - decode_in_one_shot(recording)).max() <= 1


def test_a_block_holds_no_more_the_more_channels_there_are(monkeypatch):
    monkeypatch.setattr(audio, "BLOCK_VALUES", 6_000)
    wide = encoded(np.stack([noise(20_000, channel) for channel in range(60)], axis=1))
    lengths = [len(block) for block in decode_blocks(wide)]
    assert sum(lengths) == 20_000 and max(lengths) <= 200  # 100 frames, and what the resampler held back


def test_a_recording_of_whole_blocks_is_not_cut_short_and_not_repeated(monkeypatch):
    monkeypatch.setattr(audio, "BLOCK_VALUES", 5_000)
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
        (encoded(np.full((40_000, 2), 3e38), subtype="FLOAT"), "not finite"),
        (encoded(np.tile([3e38, -3e38], 20_000), rate=44_100, subtype="FLOAT"), "not finite"),
    ],
    ids=[
        "nothing",
        "a web page",
        "random bytes",
        "half a header",
        "no samples",
        "a NaN",
        "an infinity",
        "a huge sum",
        "a huge wave",
    ],
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
    monkeypatch.setattr(audio, "BLOCK_VALUES", 1_000)
    samples = sine(440, 16_000, 2, 0.5)
    samples[30_500] = np.nan
    with pytest.raises(DecodeError, match="not finite"):
        decode(encoded(samples, subtype="FLOAT"))


def test_a_recording_that_never_ends_is_refused_after_what_is_allowed(monkeypatch):
    monkeypatch.setattr(audio, "MAX_HOURS", 0.001)  # 57,600 samples
    monkeypatch.setattr(audio, "BLOCK_VALUES", 10_000)
    blocks = decode_blocks(encoded(np.zeros(70_000, np.int16), file_format="FLAC"))
    allowed = []
    with pytest.raises(DecodeError) as refusal:
        allowed.extend(blocks)
        allowed += list(blocks)
    assert refusal.value.reason == "absurd length"
    assert 47_600 < sum(map(len, allowed)) <= 57_600


def test_a_recording_of_just_the_allowed_length_is_whole(monkeypatch):
    monkeypatch.setattr(audio, "MAX_HOURS", 0.001)
    assert len(decode(encoded(noise(57_600, 1), file_format="FLAC"))) == 57_600


LONG_RECORDING = """
import io, resource
import numpy as np, soundfile
from hear_distill.audio import clips_in, decode_blocks
minute = np.random.default_rng(1).integers(-100, 100, 480_000, dtype=np.int16)
buffer = io.BytesIO()
with soundfile.SoundFile(buffer, "w", 8_000, 1, format="FLAC") as file:
    for _ in range(120):
        file.write(minute)
data = buffer.getvalue()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
num_clips = sum(1 for _ in clips_in(decode_blocks(data)))
print(num_clips, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_two_hours_cost_no_more_memory_than_a_few_blocks():
    done = run_python(LONG_RECORDING)
    assert done.returncode == 0, done.stderr
    num_clips, added_mib = map(int, done.stdout.split())
    assert num_clips == 3_600
    assert added_mib < 100  # the whole would be 220 MiB


# ---- clips from blocks ----


def in_blocks(samples: np.ndarray, sizes: list[int]) -> Iterator[np.ndarray]:
    """[n] in pieces of these sizes, and the rest as one."""
    for size in sizes:
        yield samples[:size]
        samples = samples[size:]
    yield samples


def assert_clips_are(clips: list[tuple[int, np.ndarray]], samples: np.ndarray) -> None:
    """These are the clips of `samples` [n] that the rule names."""
    assert [start for start, _ in clips] == clip_starts(len(samples))
    for start, clip in clips:
        np.testing.assert_array_equal(clip, samples[start : start + 32_000], strict=True)


BORDERS = [
    border + step for border in (0, 16_000, 32_000, 48_000, 64_000, 80_000, 96_000) for step in (-2, -1, 0, 1, 2)
]


@pytest.mark.parametrize("num_samples", [n for n in BORDERS if n >= 0])
@pytest.mark.parametrize("sizes", [[], [1] * 40, [31_999, 1, 1], [16_000] * 9, [32_000] * 3, [63_999]], ids=str)
def test_clips_from_blocks_are_those_of_the_rule_around_every_border(num_samples, sizes):
    samples = noise(num_samples, num_samples)
    assert_clips_are(list(clips_in(in_blocks(samples, sizes))), samples)


@settings(deadline=None, max_examples=60)
@given(num_samples=st.integers(0, 200_000), sizes=st.lists(st.integers(0, 70_000), max_size=12))
def test_clips_from_blocks_are_those_of_the_rule_for_blocks_of_any_size(num_samples, sizes):
    samples = noise(num_samples, 5)
    assert_clips_are(list(clips_in(in_blocks(samples, sizes))), samples)


def test_a_clip_comes_out_as_soon_as_it_is_whole():
    samples = noise(70_000, 6)
    taken = []

    def blocks() -> Iterator[np.ndarray]:
        for begin in range(0, 70_000, 10_000):
            taken.append(begin)
            yield samples[begin : begin + 10_000]

    start, _ = next(clips_in(blocks()))
    assert (start, taken[-1]) == (0, 30_000)


@pytest.mark.parametrize("num_samples", [31_000, 48_000, 64_000, 80_000])
def test_a_clip_keeps_nothing_else_alive_and_changes_no_more(num_samples):
    samples = noise(num_samples, 7)
    block = samples.copy()
    clips = []
    for start, clip in clips_in(in_blocks(block, [40_000]), min_short=1):
        clips.append((start, clip.copy()))
        assert clip.base is None and clip.nbytes == 64_000
        clip[:] = 0  # nor does the next clip depend on this one
    np.testing.assert_array_equal(block, samples)
    for start, clip in clips:
        expected = samples[start : start + 32_000]
        np.testing.assert_array_equal(clip[: len(expected)], expected)


@pytest.mark.parametrize(
    ("num_samples", "min_short", "is_given"),
    [
        (0, 0, False),
        (0, 1, False),
        (1, 0, True),
        (1, 1, True),
        (7_999, 8_000, False),
        (8_000, 8_000, True),
        (31_999, 8_000, True),
        (31_999, None, False),
        (8_000, None, False),
    ],
)
def test_a_short_recording_gives_one_padded_clip_if_it_is_asked_for(num_samples, min_short, is_given):
    samples = noise(num_samples, 8)
    clips = list(clips_in(in_blocks(samples, [1_000]), min_short))
    assert len(clips) == is_given
    for start, clip in clips:
        assert start == 0
        np.testing.assert_array_equal(clip, np.pad(samples, (0, 32_000 - num_samples)), strict=True)


@pytest.mark.parametrize("num_samples", [32_000, 47_999, 48_000, 64_000])
def test_a_recording_with_a_whole_clip_is_cut_the_same_whether_short_ones_are_asked_for_or_not(num_samples):
    samples = noise(num_samples, 9)
    assert_clips_are(list(clips_in([samples], min_short=1)), samples)


# ---- level ----


def level_by_the_book(samples: np.ndarray) -> float:
    """[n] int16 -> dB, in whole numbers of Python until the last step."""
    return 10 * math.log10(sum(int(sample) ** 2 for sample in samples) / (len(samples) * 2**30))


@pytest.mark.parametrize(
    ("samples", "level_db"),
    [
        (np.full(32_000, -32_768, np.int16), 0.0),
        (np.round(32_767 * np.sin(np.arange(32_000) * math.pi / 80)).astype(np.int16), -3.0106),
        (np.r_[np.zeros(31_999, np.int16), np.int16(1)], -135.3605),
    ],
    ids=["square", "sine", "one bit once"],
)
def test_the_level_is_relative_to_full_scale(samples, level_db):
    assert rms_db(samples) == pytest.approx(level_db, abs=1e-4)
    assert rms_db(samples) == pytest.approx(level_by_the_book(samples), abs=1e-12)


def test_digital_silence_has_a_level_of_minus_infinity():
    assert rms_db(np.zeros(32_000, np.int16)) == -math.inf


def test_the_level_of_any_clip_is_exact():
    for scale in (1, 30, 1_000, 32_000):
        samples = (noise(32_000, scale) // (20_000 / scale)).astype(np.int16)
        assert rms_db(samples) == pytest.approx(level_by_the_book(samples), abs=1e-12)


@pytest.mark.parametrize("band", range(7))
def test_a_tone_stands_in_the_octave_it_belongs_to_with_its_level(band):
    tone = sine(int(1.5 * 62.5 * 2**band), 16_000, 2, level=0.5)
    levels = band_levels_db(np.rint(32768 * tone).astype(np.int16))
    assert levels[band] == pytest.approx(20 * math.log10(0.5) - 3.01, abs=0.1)
    assert np.delete(levels, band).max() < -35


def test_the_octaves_of_noise_add_up_to_its_level_less_what_lies_below_them():
    samples = noise(32_000, 5)
    power = 10 ** (band_levels_db(samples) / 10)
    assert 10 * math.log10(power.sum()) == pytest.approx(rms_db(samples), abs=0.3)
    np.testing.assert_allclose(np.diff(10 * np.log10(power))[2:], 3.01, atol=1), "twice as wide, twice the power"
    assert band_levels_db(samples // 10) == pytest.approx(band_levels_db(samples) - 20, abs=0.1)


def test_digital_silence_has_the_lowest_level_in_every_octave():
    assert band_levels_db(np.zeros(32_000, np.int16)) == pytest.approx(-100)
