"""The streamer's promise, written out: every clip of a folder of tars, read front to back in one process.

Shares no code with the package: tarfile in its random-access mode, soundfile and soxr in one shot each, the cutting
rule as a loop. Recordings that cannot be used are left out, not reported.

n samples   c channels
"""

import io
import json
import tarfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import soundfile
import soxr

Clips = dict[tuple[str, str, int], bytes]
"""(tar, key, first sample) -> PCM16, 64,000 bytes"""


def starts_by_the_book(num_samples: int) -> list[int]:
    """Walk in steps of two seconds; a second or more that is left over earns a last clip, flush with the end."""
    starts = []
    position = 0
    while num_samples - position >= 32_000:
        starts.append(position)
        position += 32_000
    if starts and num_samples - position >= 16_000:
        starts.append(num_samples - 32_000)
    return starts


def decode_in_one_shot(data: bytes) -> np.ndarray:
    """A whole file -> [n] int16, 16 kHz, mono. Raises soundfile.SoundFileError if it is not audio."""
    frames, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)  # [n, c]
    mono = soxr.resample(frames.mean(axis=1), rate, 16_000, quality="HQ")  # [n] at 16 kHz
    return np.clip(np.round(mono.astype(np.float64) * 2**15), -(2**15), 2**15 - 1).astype(np.int16)


def clips_of(source: Path) -> Clips:
    """Every clip that a streamer must make of the tars in this folder."""
    clips: Clips = {}
    for path in sorted(source.glob("*.tar")):
        recordings: dict[str, dict[str, bytes]] = defaultdict(dict)
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                folder, _, base = member.name.rpartition("/")
                key = f"{folder}/{base.split('.')[0]}" if folder else base.split(".")[0]
                recordings[key][base.split(".")[-1]] = tar.extractfile(member).read()
        for key, members in recordings.items():
            clips |= _clips_of_recording(path.name, key, members)
    return clips


def _clips_of_recording(tar: str, key: str, members: dict[str, bytes]) -> Clips:
    audio = next((members[suffix] for suffix in ("wav", "flac", "ogg", "mp3") if suffix in members), None)
    if audio is None or not _is_json(members.get("json", b"{}")):
        return {}
    try:
        samples = decode_in_one_shot(audio)
    except soundfile.SoundFileError:
        return {}
    return {(tar, key, start): samples[start : start + 32_000].tobytes() for start in starts_by_the_book(len(samples))}


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
