"""Compressed bytes in, 16 kHz mono int16 samples out; and where the 2 s clips of a recording begin.

No torch here: a streamer process holds numpy (24 MiB), not torch (525 MiB).
n samples at 16 kHz   c channels
"""

import io
from collections.abc import Iterator

import numpy as np
import soundfile
import soxr

SAMPLE_RATE = 16_000
CLIP_SAMPLES = 32_000  # 2 s: the only length that HeAR takes
MIN_RATE_HZ, MAX_RATE_HZ = 4_000, 384_000  # a header is not to be trusted: at 1 Hz, 300 kB become gigabytes
BLOCK_FRAMES = 1 << 20  # decoding unit; bounds the float32 copy of a two-hour recording to about 8 MiB


class DecodeError(Exception):
    """A recording that cannot be used. `reason` is one of a few words that are counted, the text is for people."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


def clip_starts(num_samples: int, min_tail: int = SAMPLE_RATE) -> list[int]:
    """Start samples of the clips cut from one recording.

    Clips lie back to back. If `min_tail` or more samples remain after the last one, a final clip is taken flush with
    the end of the recording, overlapping its neighbour, so no clip is ever padded.

    Args:
        num_samples: length of the recording at 16 kHz.
        min_tail: shortest remainder, in samples, that earns the overlapping clip.

    Returns:
        Ascending starts, each <= num_samples - 32,000; empty if the recording is shorter than one clip.

    >>> clip_starts(80_000)
    [0, 32000, 48000]
    """
    last_start = num_samples - CLIP_SAMPLES
    starts = list(range(0, last_start + 1, CLIP_SAMPLES))
    if starts and last_start - starts[-1] >= min_tail:
        starts.append(last_start)
    return starts


def downmix(frames: np.ndarray) -> np.ndarray:
    """[n, c] -> [n], the mean of the channels. Stereo is added by hand: `mean(axis=1)` costs as much as decoding."""
    if frames.shape[1] == 1:
        return frames[:, 0]
    if frames.shape[1] == 2:
        return (frames[:, 0] + frames[:, 1]) * np.float32(0.5)
    return frames.mean(axis=1, dtype=np.float32)


def to_int16(samples: np.ndarray) -> np.ndarray:
    """Float in [-1, 1) to int16, rounded; louder samples are clipped. What was 16 bits before comes back unchanged."""
    return np.clip(np.rint(samples * 32768.0), -32768, 32767).astype(np.int16)


def decode(data: bytes) -> np.ndarray:
    """MP3, FLAC, OGG or WAV bytes -> [n] int16, mono, 16 kHz.

    Reads in blocks until the decoder gives no more. An MP3 of variable bit rate without a Xing tag may end early there:
    libsndfile stops at its own estimate of the length.

    Raises:
        DecodeError: reason `undecodable` (not audio, broken, or of an absurd rate), `empty` (no samples), `not finite`
            (NaN or infinity).
    """
    try:
        blocks = list(_resampled_blocks(data))
    except soundfile.SoundFileError as e:
        raise DecodeError("undecodable", str(e)) from e
    samples = np.concatenate(blocks) if blocks else np.empty(0, np.int16)
    if len(samples) == 0:
        raise DecodeError("empty", "the file holds no samples")
    return samples


def _resampled_blocks(data: bytes) -> Iterator[np.ndarray]:
    """Yield [n] int16 at 16 kHz, block by block. A stateful resampler: no seam between blocks."""
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        if not MIN_RATE_HZ <= file.samplerate <= MAX_RATE_HZ:
            raise DecodeError("undecodable", f"a sample rate of {file.samplerate} Hz")
        resampler = soxr.ResampleStream(file.samplerate, SAMPLE_RATE, num_channels=1, dtype="float32", quality="HQ")
        is_last = False
        while not is_last:
            frames = file.read(BLOCK_FRAMES, dtype="float32", always_2d=True)  # [n, c]
            is_last = len(frames) < BLOCK_FRAMES
            mono = downmix(frames)  # [n]
            if not np.isfinite(mono).all():
                raise DecodeError("not finite", "the recording holds NaN or infinite samples")
            yield to_int16(resampler.resample_chunk(mono, last=is_last))
