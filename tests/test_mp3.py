"""An MP3 is read to its end whatever its tag says, and the rest of the bytes is left as it is.

The MP3s are LAME's, by way of soundfile: 16 kHz is version 2, 48 kHz version 1 of the format.
"""

import io
import struct

import numpy as np
import pytest
import soundfile
from lake_tools import encoded, noise
from reference.chunker import decode_in_one_shot

from hear_distill import audio, mp3
from hear_distill.audio import DecodeError, decode

DELAY = 576  # samples that LAME puts in front; its tag says so. By chance a frame of version 2 is as long
ALL_RATES = (8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000)


def sound(num_samples: int, hz: int = 440) -> np.ndarray:
    """[n] int16: a third is loud noise, which takes many bits; the rest is a quiet sine that grows, and takes few."""
    time = np.arange(num_samples - num_samples // 3)
    sine = time / len(time) * 2_000 * np.sin(2 * np.pi * hz / 16_000 * time)
    return np.r_[noise(num_samples // 3, hz), sine.astype(np.int16)]


def lame(samples: np.ndarray, rate: int, mode: str = "VARIABLE", level: float = 0.5) -> bytes:
    """[n] or [n, c] -> an MP3 with a tag."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="MP3", bitrate_mode=mode, compression_level=level)
    return buffer.getvalue()


def split_tag(recording: bytes) -> tuple[bytes, bytes]:
    """The first frame, which is the tag, and the rest. What LAME writes into a tag ends before byte 190."""
    cut = recording.index(recording[:2], 190)
    assert b"Xing" in recording[:cut] or b"Info" in recording[:cut]
    return recording[:cut], recording[cut:]


def saying(recording: bytes, num_frames: int | None) -> bytes:
    """The recording with another number of frames in its tag, or with none."""
    tag, sound_frames = split_tag(recording)
    place = max(tag.find(b"Xing"), tag.find(b"Info"))
    flags = 0x0F if num_frames is not None else 0x0E
    return tag[: place + 4] + struct.pack(">II", flags, num_frames or 0) + tag[place + 12 :] + sound_frames


def assert_same_behind_delay(found: np.ndarray, expected: np.ndarray, delay: int, edge: int = 0) -> None:
    """`found` holds all of `expected` behind `delay` samples, and less than three frames of silence after it.

    `edge` samples at both ends may differ: a resampler hears there what the tag has trimmed.
    """
    assert len(expected) + delay <= len(found) <= len(expected) + delay + 3 * 576
    difference = found[delay : delay + len(expected)].astype(int) - expected
    assert np.abs(difference[edge : len(expected) - edge]).max() <= 1


@pytest.fixture(scope="module")
def recording() -> bytes:
    """12 s of 16 kHz mono of variable rate, with a good tag."""
    return lame(sound(192_000), 16_000)


@pytest.mark.parametrize("mode", ["VARIABLE", "CONSTANT"])
@pytest.mark.parametrize(("rate", "channels"), [(16_000, 1), (48_000, 2)])
def test_an_mp3_without_a_tag_is_read_to_its_end(mode, rate, channels):
    frames = np.stack([sound(12 * rate), -sound(12 * rate) // 3][:channels], axis=1)  # [n, c]
    tagged = lame(frames, rate, mode)
    expected = decode(tagged)
    assert len(expected) == 12 * 16_000
    assert_same_behind_delay(
        decode(split_tag(tagged)[1]), expected, DELAY * 16_000 // rate, edge=0 if rate == 16_000 else 300
    )


@pytest.mark.parametrize("num_said", [0, 1, 100, None])
def test_a_tag_that_says_too_little_hides_nothing(recording, num_said):
    assert_same_behind_delay(decode(saying(recording, num_said)), decode(recording), DELAY)


@pytest.mark.parametrize("num_said", [1_000_000, 2**32 - 1])
def test_a_tag_that_says_too_much_adds_nothing_but_the_padding_of_the_last_frame(recording, num_said):
    assert_same_behind_delay(decode(saying(recording, num_said)), decode(recording), 0)


@pytest.mark.parametrize("is_behind_checksum", [False, True])
@pytest.mark.parametrize("num_said", [1, 100, 336])  # the last is true
def test_a_tag_in_a_frame_with_a_checksum_hides_nothing(recording, num_said, is_behind_checksum):
    tag, frames = split_tag(saying(recording, num_said))
    header = bytes([tag[0], tag[1] & 0xFE, *tag[2:4]])
    tag = header + (b"\1\2" + tag[4:-2] if is_behind_checksum else tag[4:])
    assert_same_behind_delay(decode(tag + frames), decode(recording), DELAY)


def test_a_tag_of_fraunhofer_is_not_taken_for_sound(recording):
    frames = split_tag(recording)[1]
    tag = frames[:4] + bytes(32) + b"VBRI" + bytes(26)
    tag = tag.ljust(mp3.frame_bytes(frames[:4]), b"\0")
    np.testing.assert_array_equal(decode(tag + frames), decode(frames))


def test_of_two_mp3s_in_one_file_both_are_heard(recording):
    second = lame(sound(96_000, 1_500), 16_000)
    both = decode(recording + second)
    assert len(both) >= 192_000 + 96_000
    spectrum = np.abs(np.fft.rfft(both[-34_000:-18_000].astype(float)))  # a bin is 1 Hz
    assert spectrum.argmax() == 1_500
    np.testing.assert_array_equal(both[DELAY:190_000], decode(recording)[: 190_000 - DELAY])


@pytest.mark.parametrize("junk", [bytes(5_000), b"\xff" * 5_000, b"<html>" * 300, b"\xff\xfb\x90", bytes(1)], ids=len)
def test_junk_between_frames_costs_nothing(recording, junk):
    second_frame = mp3.frame_bytes(recording[:4])
    for cut in (second_frame, second_frame + mp3.frame_bytes(recording[second_frame : second_frame + 4])):
        np.testing.assert_array_equal(decode(recording[:cut] + junk + recording[cut:]), decode(recording))


def test_a_damaged_header_costs_its_frame_and_little_around_it(recording):
    place = recording.index(recording[:2], len(recording) // 2)
    whole, damaged = decode(recording), decode(recording[:place] + b"\0" + recording[place + 1 :])
    np.testing.assert_array_equal(damaged[:50_000], whole[:50_000])
    difference = damaged[70_000:191_000].astype(int) - whole[70_000 + 576 : 191_000 + 576]
    assert np.abs(difference).max() <= 1


def id3(num_bytes: int, footer: bool = False) -> bytes:
    """An ID3v2.4 tag with that many bytes of nothing in it."""
    size = bytes([num_bytes >> shift & 127 for shift in (21, 14, 7, 0)])
    head = b"\x04\x00" + (b"\x10" if footer else b"\x00") + size
    return b"ID3" + head + bytes(num_bytes) + (b"3DI" + head if footer else b"")


@pytest.mark.parametrize("front", [id3(100), id3(400_000), id3(300, footer=True), id3(200) + id3(3_000)], ids=len)
@pytest.mark.parametrize("is_tagged", [True, False])
def test_what_a_player_shows_about_a_recording_is_not_heard(recording, front, is_tagged):
    frames = recording if is_tagged else split_tag(recording)[1]
    behind = b"TAG" + b"title".ljust(125, b"\0")
    np.testing.assert_array_equal(decode(front + frames + behind), decode(frames))


@pytest.mark.parametrize(("rate", "channels"), [(16_000, 1), (44_100, 2)])
@pytest.mark.parametrize("is_tagged", [True, False])
def test_blocks_of_a_variable_bit_rate_leave_no_seam(monkeypatch, rate, channels, is_tagged):
    """A frame borrows bits from those before it: a decoder that seeks between two blocks has lost them."""
    tagged = lame(np.stack([sound(200_000)] * channels, axis=1), rate)
    frames = tagged if is_tagged else split_tag(tagged)[1]
    expected = decode_in_one_shot(frames) if is_tagged else decode(frames)
    monkeypatch.setattr(audio, "BLOCK_VALUES", 4_099)
    assert np.abs(decode(frames).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("rate", ALL_RATES)
@pytest.mark.parametrize(("mode", "level"), [("CONSTANT", 0.0), ("CONSTANT", 0.5), ("VARIABLE", 0.3)])
def test_as_many_frames_are_found_as_the_encoder_says_it_wrote(rate, mode, level):
    tag, frames = split_tag(lame(sound(30_000), rate, mode, level))
    place = max(tag.find(b"Xing"), tag.find(b"Info"))
    (num_written,) = struct.unpack(">I", tag[place + 8 : place + 12])
    assert mp3.find_frames(frames, 0, frames[:4]) == ([(0, len(frames))], num_written)
    (_, end), *more = mp3.find_frames(frames[:-1], 0, frames[:4])[0]
    assert more == [] and frames[end : end + 2] == frames[:2]  # the last frame, which is cut, is left out
    assert mp3.read_tag(tag) == (True, num_written)
    assert mp3.read_tag(mp3.write_tag(frames[:4], 12_345)) == (True, 12_345)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"ID3",
        b"\xff\xfb",
        b"RIFF",
        id3(10),
        b"ID3\x04\x00\x00\x7f\x7f\x7f\x7f",
        b"\xff\xfb\x90\xc4" + bytes(3_000),
    ],
    ids=["nothing", "half an ID3", "half a header", "half a WAV", "ID3 alone", "ID3 beyond the end", "one frame"],
)
def test_what_is_no_mp3_is_left_as_it_is(data):
    assert mp3.made_whole(data) is data


@pytest.mark.parametrize("file_format", ["WAV", "FLAC", "OGG"])
def test_other_formats_are_left_as_they_are(file_format):
    recording = encoded(noise(20_000, 1), file_format=file_format)
    assert mp3.made_whole(recording) is recording


def test_an_mp3_with_a_good_tag_is_not_copied(recording):
    assert mp3.made_whole(recording) is recording


def test_an_mp3_that_was_rewritten_is_whole(recording):
    rewritten = mp3.made_whole(split_tag(recording)[1])
    assert mp3.made_whole(rewritten) is rewritten


@pytest.mark.parametrize("is_tagged", [True, False])
def test_an_mp3_cut_at_any_byte_gives_what_is_there_or_is_refused(recording, is_tagged):
    frames = recording if is_tagged else split_tag(recording)[1]
    whole = decode(frames)
    for num_bytes in [*range(0, 700, 7), *range(5_000, 5_200)]:
        try:
            samples = decode(frames[:num_bytes])
        except DecodeError as e:
            assert num_bytes < 1_000, e
            continue
        num_same = len(samples) - 1_200
        assert num_same <= 0 or np.abs(samples[:num_same].astype(int) - whole[:num_same]).max() <= 1
