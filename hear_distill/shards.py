"""The shard: a USTAR WebDataset tar of fixed stride, written whole and read without a tar parser.

in:   clips (16 kHz mono int16, 32,000 samples each) with what is known about them
out:  <id>.tar: per clip `<clip id>.wav` (RIFF PCM16) and `<clip id>.json` (padded with spaces to 1,024 bytes)

One record is 66,560 bytes: 512 header + 64,044 WAV padded to 64,512, then 512 header + 1,024 JSON.
The samples of clip i begin at byte 66,560 i + 556. Any WebDataset reader can open the file as well.
"""

import functools
import hashlib
import io
import json
import os
import struct
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hear_distill.audio import CLIP_SAMPLES, SAMPLE_RATE

BLOCK = tarfile.BLOCKSIZE  # 512
NAME_BYTES = 100  # of a header
PCM_BYTES = 2 * CLIP_SAMPLES
WAV_HEADER = struct.pack(
    "<4sI4s4sIHHIIHH4sI",
    *(b"RIFF", 36 + PCM_BYTES, b"WAVE", b"fmt ", 16),
    *(1, 1, SAMPLE_RATE, 2 * SAMPLE_RATE, 2, 16),  # PCM, mono, rate, bytes per second, bytes per frame, bits
    *(b"data", PCM_BYTES),
)
WAV_BYTES = len(WAV_HEADER) + PCM_BYTES
JSON_BYTES = 1_024
RECORD_BYTES = BLOCK + -(-WAV_BYTES // BLOCK) * BLOCK + BLOCK + JSON_BYTES
PCM_OFFSET = BLOCK + len(WAV_HEADER)
END_BYTES = 2 * BLOCK  # end of archive: two zero blocks, no further padding
assert (RECORD_BYTES, PCM_OFFSET) == (66_560, 556)


class ShardBroken(Exception):
    """A shard is not what its ledger row says: wrong length, wrong hash, or not in our format."""


@dataclass(frozen=True)
class Clip:
    """Two seconds of sound and where they come from."""

    tar: str
    key: str
    start: int
    """first sample, at 16 kHz, in the recording"""
    source_s: float
    """duration of the whole recording"""
    caption: str
    samples: np.ndarray
    """[32000] int16"""

    @property
    def id(self) -> str:
        """Short hash of (tar, key), then the start sample: unique in the source, safe as a file name."""
        return f"{recording_hash(self.tar, self.key)}-{self.start}"


@dataclass(frozen=True)
class ClipInfo:
    """The JSON member of a clip."""

    id: str
    tar: str
    key: str
    start: int
    source_s: float
    caption: str


def recording_hash(tar: str, key: str) -> str:
    """16 hexadecimal digits. Among 300 million recordings two collide with a probability of 0.24 %."""
    return hashlib.blake2b(f"{tar}\0{key}".encode(errors="surrogatepass"), digest_size=8).hexdigest()


def shard_bytes(num_clips: int) -> int:
    """Length of a shard file, known before it is written."""
    return num_clips * RECORD_BYTES + END_BYTES


def write_shard(path: Path, clips: Sequence[Clip]) -> str:
    """Write a whole shard to `path` (not yet durable: the ledger's publish does that) and return its sha256."""
    digest = hashlib.sha256()
    with path.open("wb") as f:
        for clip in clips:
            record = _record(clip)
            digest.update(record)
            f.write(record)
        digest.update(bytes(END_BYTES))
        f.write(bytes(END_BYTES))
    return digest.hexdigest()


def _record(clip: Clip) -> bytes:
    """The four parts of one clip, 66,560 bytes."""
    assert clip.samples.dtype == np.int16 and clip.samples.shape == (CLIP_SAMPLES,)
    clip_id = clip.id
    info = ClipInfo(clip_id, clip.tar, clip.key, clip.start, round(clip.source_s, 3), clip.caption)
    wav = WAV_HEADER + clip.samples.astype("<i2", copy=False).tobytes()
    padding = bytes(-WAV_BYTES % BLOCK)
    return b"".join(
        (_header(f"{clip_id}.wav", WAV_BYTES), wav, padding, _header(f"{clip_id}.json", JSON_BYTES), _json(info))
    )


def _header(name: str, num_bytes: int) -> bytes:
    """A USTAR header with no time, owner or other trace of when and where: the same clips make the same bytes."""
    blank, blank_sum = _blank_header(num_bytes)
    name_bytes = name.encode("ascii")
    checksum = b"%06o\0 " % (blank_sum + sum(name_bytes))
    return name_bytes.ljust(NAME_BYTES, b"\0") + blank[NAME_BYTES:148] + checksum + blank[156:]


@functools.cache
def _blank_header(num_bytes: int) -> tuple[bytes, int]:
    """A header without a name, and the sum of its bytes. Filling it in is six times as fast as tarfile is."""
    member = tarfile.TarInfo()
    member.size = num_bytes
    header = member.tobuf(tarfile.USTAR_FORMAT)
    return header, int(header[148:156].rstrip(b"\0 "), 8)


def _json(info: ClipInfo) -> bytes:
    """1,024 bytes of ASCII JSON, padded with spaces; the caption, then the key, then the tar are cut until it fits."""
    fields = dict(vars(info))
    text = json.dumps(fields)
    for name in ("caption", "key", "tar"):
        while (excess := len(text) - JSON_BYTES) > 0 and fields[name]:
            kept = min(JSON_BYTES, len(fields[name]) - max(1, excess // 12))  # a character is 1 to 12 bytes of JSON
            fields[name] = fields[name][:kept]
            text = json.dumps(fields)
    return text.encode().ljust(JSON_BYTES)


def num_clips_of(num_bytes: int) -> int:
    """Clips in a shard file of this length. Raises ShardBroken if no shard has it."""
    num_clips, rest = divmod(num_bytes - END_BYTES, RECORD_BYTES)
    if rest or num_clips < 1:
        raise ShardBroken(f"{num_bytes} bytes; expected a multiple of {RECORD_BYTES} plus {END_BYTES}")
    return num_clips


def read_clips(fd: int, indices: Sequence[int], out: np.ndarray) -> None:
    """Read clips `indices` of the open shard into `out` [len(indices), 32000] int16, without a copy in between."""
    for row, index in zip(out, indices, strict=True):
        if os.preadv(fd, [row.data], index * RECORD_BYTES + PCM_OFFSET) != PCM_BYTES:
            raise ShardBroken(f"ends inside clip {index}")


def read_infos(path: Path) -> list[ClipInfo]:
    """The JSON of every clip, in order."""
    num_clips = num_clips_of(path.stat().st_size)
    with path.open("rb") as f:
        return [_read_info(f, index) for index in range(num_clips)]


def _read_info(f: io.BufferedReader, index: int) -> ClipInfo:
    f.seek((index + 1) * RECORD_BYTES - JSON_BYTES)
    return ClipInfo(**json.loads(f.read(JSON_BYTES)))


def verify_shard(path: Path, num_clips: int, sha256: str) -> None:
    """Compare a shard's length and hash with the ledger's. Raises ShardBroken with what was found."""
    if not path.exists():
        raise ShardBroken(f"{path.name} is missing")
    if path.stat().st_size != shard_bytes(num_clips):
        raise ShardBroken(f"{path.stat().st_size} bytes; expected {shard_bytes(num_clips)} for {num_clips} clips")
    with path.open("rb") as f:
        found = hashlib.file_digest(f, "sha256").hexdigest()
    if found != sha256:
        raise ShardBroken(f"sha256 {found[:16]}...; expected {sha256[:16]}...")
