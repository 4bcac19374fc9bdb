"""Damaged tars: whatever stands in them, no crash, no hang, no exception but ours, and what came before is not touched.

The cases run in batches in a process of their own, as a decoder may take its process with it. A case is a number that
says which bytes of a healthy tar are damaged and how. The encoders never write the same file twice, so that tar is kept
beside the log, and a failure can be had again:

    cd tests && python test_fuzz.py <folder>/healthy.tar 1234 1235      # case 1234, as pytest names the folder
"""

import hashlib
import io
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import soundfile
from lake_tools import environment, members_of, noise, tar_of

from hear_distill.audio import DecodeError, clips_in, decode_blocks
from hear_distill.tars import Tar, TarBroken, read_recordings

HERE = Path(__file__)
BATCH = 100
BATCH_TIMEOUT_S = 240
REASONS = {"undecodable", "empty", "not finite", "absurd length"}
FORMATS = [
    # suffix, rate, channels, options of soundfile.write
    ("mp3", 16_000, 1, {"bitrate_mode": "VARIABLE", "compression_level": 0.5}),
    ("mp3", 44_100, 2, {"bitrate_mode": "CONSTANT", "compression_level": 0.5}),
    ("wav", 22_050, 2, {}),
    ("flac", 16_000, 1, {}),
    ("ogg", 24_000, 1, {}),
    ("mp3", 22_050, 1, {"bitrate_mode": "VARIABLE", "compression_level": 0.7}),
    ("wav", 16_000, 1, {"subtype": "FLOAT"}),
]
EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


class Found(NamedTuple):
    """One recording as it came out of a tar."""

    key: str
    offset: int
    end: int
    caption: object
    clips: tuple[tuple[int, str], ...]
    """start and hash of each; empty if it could not be decoded"""


# ---- the tar, and what is done to it ----


def healthy_tar() -> bytes:
    """One recording of each kind, 2.2 to 3.6 s, noise and silence; the last MP3 comes without its tag."""
    members = []
    for number, (suffix, rate, channels, options) in enumerate(FORMATS):
        frames = noise((22 + 2 * number) * rate // 10 * channels, number).reshape(-1, channels) // 2
        frames[len(frames) // 2 :] //= 100
        buffer = io.BytesIO()
        soundfile.write(buffer, frames, rate, format=suffix.upper(), **options)
        content = buffer.getvalue()
        if (suffix, rate) == ("mp3", 22_050):
            content = content[content.index(content[:2], 190) :]
        members += members_of(f"folder/recording-{number}", content, suffix)
    return tar_of(members)


def flip(data: bytearray, rng: np.random.Generator) -> None:
    """A few bytes change."""
    for place in rng.integers(len(data), size=rng.integers(1, 20)):
        data[place] ^= int(rng.integers(1, 256))


def cut(data: bytearray, rng: np.random.Generator) -> None:
    """A range is missing, or all from one byte on."""
    begin = int(rng.integers(len(data)))
    del data[begin : begin + int(rng.integers(1, 5_000)) if rng.random() < 0.7 else None]


def insert(data: bytearray, rng: np.random.Generator) -> None:
    """Zeros, ones or noise come in between."""
    place, num_bytes = int(rng.integers(len(data) + 1)), int(rng.integers(1, 5_000))
    data[place:place] = [bytes(num_bytes), b"\xff" * num_bytes, rng.bytes(num_bytes)][rng.integers(3)]


def duplicate(data: bytearray, rng: np.random.Generator) -> None:
    """A range stands at another place as well, in between or on top of what was there."""
    begin, place = rng.integers(len(data), size=2)
    copied = data[begin : begin + int(rng.integers(1, 20_000))]
    data[place : place + (len(copied) if rng.random() < 0.5 else 0)] = copied


def spoil_header(data: bytearray, rng: np.random.Generator) -> None:
    """A number near the beginning of a member's content changes: sizes, rates, channels, counts."""
    starts = [place + 512 for place in tar_headers(data)]
    width = int(rng.choice([1, 2, 4]))
    place = int(rng.choice(starts)) + int(rng.integers(80))
    value = EXTREMES[rng.integers(len(EXTREMES))] if rng.random() < 0.6 else int(rng.integers(1 << 32))
    order = "little" if rng.random() < 0.6 else "big"
    data[place : place + width] = (value % (1 << 8 * width)).to_bytes(width, order)


def spoil_frame(data: bytearray, rng: np.random.Generator) -> None:
    """The header of some MP3 frames changes: version, rate, channels, length."""
    places = [place for place in range(len(data) - 4) if data[place] == 0xFF and data[place + 1] & 0xE0 == 0xE0]
    for place in rng.choice(places, size=rng.integers(1, 6)):
        data[place + int(rng.integers(1, 4))] ^= 1 << int(rng.integers(8))


def spoil_tar_header(data: bytearray, rng: np.random.Generator) -> None:
    """A member's size, kind or name changes, and the checksum with it, so that tarfile believes it."""
    start = int(rng.choice(tar_headers(data)))
    header = data[start : start + 512]
    choice = rng.integers(3)
    if choice == 0:
        size = int(rng.choice([0, 1, 511, 513, 30_000, 1 << 24, (1 << 33) - 1]))
        header[124:136] = b"%011o\0" % size if rng.random() < 0.8 else b"\xff" * 12  # or -1 in base 256
    elif choice == 1:
        header[156] = int(rng.choice([*b"0123457xgLKS", 0, 0xFF]))
    else:
        header[int(rng.integers(100))] = int(rng.integers(256))
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    data[start : start + 512] = header


def tar_headers(data: bytes) -> list[int]:
    """Where the headers of the members are."""
    return [place - 257 for place in range(257, len(data), 512) if data[place : place + 5] == b"ustar"]


DAMAGES: list[Callable[[bytearray, np.random.Generator], None]] = [
    *(flip, cut, insert, duplicate, spoil_header, spoil_header, spoil_frame, spoil_tar_header)
]


def damaged(healthy: bytes, case: int) -> bytes:
    """The tar of this case. One damage in most of them, up to three in others."""
    rng = np.random.default_rng([17, case])
    data = bytearray(healthy)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if data and tar_headers(data):
            DAMAGES[rng.integers(len(DAMAGES))](data, rng)
    return bytes(data)


# ---- reading it as a streamer does ----


def clips_of(audio: bytes) -> tuple[tuple[int, str], ...]:
    """Start and hash of every clip; none if the recording is refused."""
    clips = []
    try:
        for start, samples in clips_in(decode_blocks(audio), min_short=8_000):
            assert samples.shape == (32_000,) and samples.dtype == np.int16
            clips.append((start, hashlib.blake2b(samples.tobytes(), digest_size=8).hexdigest()))
    except DecodeError as e:
        assert e.reason in REASONS, e.reason
        return ()
    return tuple(clips)


def read_all(data: bytes) -> tuple[list[Found], bool]:
    """All that comes out of a tar, and whether it broke off."""
    found = []
    try:
        for recording in read_recordings(io.BytesIO(data), Tar("a.tar", len(data)), 0):
            clips = clips_of(recording.audio) if recording.problem is None else ()
            caption = recording.metadata.get("caption")
            found.append(Found(recording.key, recording.offset, recording.end, caption, clips))
    except TarBroken:
        return found, True
    return found, False


def check(tar: bytes, healthy_tar: bytes, healthy: list[Found]) -> bool:
    """Assert what must hold of a damaged tar. True if the damage shows."""
    found, is_broken = read_all(tar)
    num_same = next((i for i, (a, b) in enumerate(zip(tar, healthy_tar, strict=False)) if a != b), len(tar))
    # a recording is known to be over when the header of the next one has been read
    untouched = [recording for recording in healthy[:-1] if recording.end + 512 <= num_same]
    assert found[: len(untouched)] == untouched, f"{len(untouched)} recordings before byte {num_same} have changed"
    assert all(a.end == b.offset for a, b in pairwise(found)), "a cursor could not resume"
    return is_broken or found != healthy


def run_cases(path: Path, first: int, last: int) -> None:
    """Run the cases from `first` to before `last` on the tar there; prints the number of each before it runs."""
    healthy_tar = path.read_bytes()
    healthy, is_broken = read_all(healthy_tar)
    assert not is_broken and [len(recording.clips) for recording in healthy] == [1, 1, 1, 1, 2, 2, 2], healthy
    num_damaged = 0
    for case in range(first, last):
        print(case, flush=True)
        num_damaged += check(damaged(healthy_tar, case), healthy_tar, healthy)
    assert num_damaged > 0.5 * (last - first), f"the damage shows in only {num_damaged} of {last - first} cases"


# ---- the tests ----


@pytest.fixture(scope="module")
def tar_path(tmp_path_factory) -> Path:
    """The healthy tar, in a folder of this module's own."""
    path = tmp_path_factory.mktemp("fuzz") / "healthy.tar"
    path.write_bytes(healthy_tar())
    return path


def run_batch(path: Path, first: int, last: int) -> None:
    """Run these cases in a process of their own and name the one that it failed, died or hung in."""
    log, errors = path.with_name(f"{first}.log"), path.with_name(f"{first}.err")
    command = [sys.executable, "-W", "error", str(HERE), str(path), str(first), str(last)]
    with log.open("wb") as out, errors.open("wb") as err:
        try:
            done = subprocess.run(
                command, stdout=out, stderr=err, env=environment(), timeout=BATCH_TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired:
            pytest.fail(f"no end after {BATCH_TIMEOUT_S} s, in case {log.read_text().split()[-1:]} of {path}")
    if done.returncode != 0:
        tail = errors.read_bytes()[-3_000:].decode(errors="replace")
        pytest.fail(f"exit status {done.returncode} in case {log.read_text().split()[-1:]} of {path}:\n{tail}")


def test_sixty_damaged_tars_neither_crash_nor_hang_nor_change_what_came_before(tar_path):
    run_batch(tar_path, 0, 60)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 2_000, BATCH))
def test_two_thousand_damaged_tars_neither_crash_nor_hang_nor_change_what_came_before(tar_path, first):
    run_batch(tar_path, first, first + BATCH)


def test_a_case_is_the_same_every_time_and_differs_from_the_next(tar_path):
    healthy = tar_path.read_bytes()
    assert damaged(healthy, 3) == damaged(healthy, 3)
    assert len({damaged(healthy, case) for case in range(20)}) == 20


if __name__ == "__main__":
    run_cases(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
