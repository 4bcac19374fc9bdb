"""Compressed bytes in, 16 kHz mono int16 samples out; and where the 2 s clips of a recording begin.

No torch here: a streamer process holds numpy (24 MiB), not torch (525 MiB).
n samples at 16 kHz   c channels
"""

import io
import math
from collections.abc import Iterable, Iterator

import numpy as np
import soundfile
import soxr

from hear_distill import mp3

SAMPLE_RATE = 16_000
CLIP_SAMPLES = 32_000  # 2 s: the only length that HeAR takes
MIN_RATE_HZ, MAX_RATE_HZ = 4_000, 384_000  # a header is not to be trusted: at 1 Hz, 300 kB become gigabytes
WINDOW_HOP_SAMPLES = SAMPLE_RATE  # of the evaluation, 1 s: neighbouring windows share half of their sound
MAX_LEVEL = 1e6  # of full scale; a float WAV may hold anything, and sums of 1e38 are infinite
MAX_HOURS = 24  # of one recording; a FLAC of silence of 512 MiB is weeks long
BAND_FRAMES, BAND_FRAME_SAMPLES = 4, 1024  # of a clip, in 30 us; what these miss, the next clips have
BAND_BINS = np.array([4, 8, 16, 32, 64, 128, 256])  # of 15.6 Hz, where the octaves from 62.5 Hz to 8 kHz begin
BAND_WINDOW = np.hanning(BAND_FRAME_SAMPLES).astype(np.float32)
BAND_SCALE = 2 / (BAND_FRAMES * BAND_FRAME_SAMPLES * float(BAND_WINDOW @ BAND_WINDOW) * 32768**2)  # Parseval
MIN_BAND_POWER = 1e-10  # of full scale; far below what 16 bits can hold
BLOCK_VALUES = 1 << 16  # decoded at a time, over all channels; libsndfile writes zeros where a block is too long


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


def window_starts(num_samples: int, hop: int) -> list[int]:
    """Starts of windows of 2 s that together hold every sample, one every `hop` samples, the last flush with the end.

    >>> window_starts(80_000, 16_000), window_starts(32_001, 16_000), window_starts(5, 16_000)
    ([0, 16000, 32000, 48000], [0, 1], [0])
    """
    last = max(num_samples - CLIP_SAMPLES, 0)
    return [*range(0, last, hop), last]


def windows(samples: np.ndarray) -> np.ndarray:
    """[n] -> [w, 32000]: windows of 2 s, a new one every second, which together hold every sample.

    The last window ends with the recording, so it may overlap its neighbour by more than a second, and a recording of
    2 s or more is never padded. A shorter one gives one window, completed with zeros at its end.
    """
    starts = window_starts(len(samples), WINDOW_HOP_SAMPLES)
    padded = np.pad(samples, (0, max(CLIP_SAMPLES - len(samples), 0)))
    return np.stack([padded[start : start + CLIP_SAMPLES] for start in starts])


def downmix(frames: np.ndarray) -> np.ndarray:
    """[n, c] -> [n], the mean of the channels. Stereo is added by hand: `mean(axis=1)` costs as much as decoding."""
    if frames.shape[1] == 1:
        return frames[:, 0]
    if frames.shape[1] == 2:
        return (frames[:, 0] + frames[:, 1]) * np.float32(0.5)
    return frames.mean(axis=1, dtype=np.float32)


def to_int16(samples: np.ndarray) -> np.ndarray:
    """Float in [-1, 1) to int16, rounded; louder samples are clipped. What was 16 bits before comes back unchanged."""
    scaled = samples * 32768.0
    return np.clip(np.rint(scaled, out=scaled), -32768, 32767, out=scaled).astype(np.int16)


class _ForwardFile(soundfile.SoundFile):
    """Reads from front to back and never seeks.

    soundfile seeks after every read to where it already is, and there the MP3 decoder starts without the bits that
    earlier frames have left for this one: at a variable bit rate, every block began with a burst of noise.
    """

    def seekable(self) -> bool:
        return False


def decode_blocks(data: bytes) -> Iterator[np.ndarray]:
    """MP3, FLAC, OGG or WAV bytes -> blocks of [n] int16, mono, 16 kHz, without a seam between them.

    A recording may last for hours: held are one block and, of an MP3 that `mp3.made_whole` must rewrite, a second copy.

    Raises:
        DecodeError: reason `undecodable` (not audio, broken, or of an absurd rate), `empty` (no samples), `not finite`
            (NaN, infinity or numbers that are no sound), `absurd length` (more than 24 hours). It may come after blocks
            that are good.
    """
    num_samples = 0
    try:
        for block in _resampled_blocks(mp3.made_whole(data)):
            num_samples += len(block)
            if num_samples > MAX_HOURS * 3600 * SAMPLE_RATE:
                raise DecodeError("absurd length", f"more than {MAX_HOURS} hours")
            if len(block) > 0:
                yield block
    except soundfile.SoundFileError as e:
        raise DecodeError("undecodable", str(e)) from e
    if num_samples == 0:
        raise DecodeError("empty", "the file holds no samples")


def decode(data: bytes) -> np.ndarray:
    """The whole recording, [n] int16; raises DecodeError as `decode_blocks` does. An hour is 110 MiB."""
    return np.concatenate(list(decode_blocks(data)))


def clips_in(blocks: Iterable[np.ndarray], min_short: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
    """Cut the clips that `clip_starts` names out of a recording that comes in blocks of any sizes.

    Args:
        blocks: [n] int16 each, as from `decode_blocks`.
        min_short: if given, a recording of at least so many samples, and at least one, that is too short for a clip
            gives one all the same, padded with zeros at the end.

    Yields:
        (start, samples [32000] int16), ascending; each array is a copy, so that a clip does not keep a block alive.
    """
    held = np.zeros(2 * CLIP_SAMPLES, np.int16)  # the clip before, then the one that fills up
    before, filling = held[:CLIP_SAMPLES], held[CLIP_SAMPLES:]
    num_samples = 0
    for block in blocks:
        assert block.dtype == np.int16, "floats would be cut to zeros without a word"
        taken = 0
        while taken < len(block):
            num_filled = num_samples % CLIP_SAMPLES
            piece = block[taken : taken + CLIP_SAMPLES - num_filled]
            filling[num_filled : num_filled + len(piece)] = piece
            taken += len(piece)
            num_samples += len(piece)
            if num_samples % CLIP_SAMPLES == 0:
                before[:] = filling
                yield num_samples - CLIP_SAMPLES, before.copy()
    tail = num_samples % CLIP_SAMPLES
    if num_samples > CLIP_SAMPLES and tail >= SAMPLE_RATE:
        yield num_samples - CLIP_SAMPLES, held[tail : tail + CLIP_SAMPLES].copy()
    elif min_short is not None and max(1, min_short) <= num_samples < CLIP_SAMPLES:
        yield 0, filling.copy()  # zeros to begin with


def rms_db(samples: np.ndarray) -> float:
    """Level of one clip, [n] int16, in dB re full scale: 0 for a square wave of full scale, -3.01 for a sine.

    Digital silence is -inf. float64 holds every square of int16 and the sum of 2^23 of them exactly.
    """
    values = samples.astype(np.float64)
    energy = float(values @ values)
    return 10 * math.log10(energy / len(samples) / 32768**2) if energy > 0 else -math.inf


def band_levels_db(samples: np.ndarray) -> np.ndarray:
    """[32000] int16 -> [7] levels in the octaves from 62.5 Hz to 8 kHz, in dB as `rms_db`, but -100 for silence.

    From four frames that are spread over the clip.
    """
    frames = samples.reshape(BAND_FRAMES, -1)[:, :BAND_FRAME_SAMPLES] * BAND_WINDOW  # [4, 1024]
    spectrum = np.fft.rfft(frames)  # [4, 513]
    energy = (spectrum.real**2 + spectrum.imag**2).sum(axis=0)[:-1]  # [512]
    return 10 * np.log10(np.add.reduceat(energy, BAND_BINS) * BAND_SCALE + MIN_BAND_POWER)


def _resampled_blocks(data: bytes) -> Iterator[np.ndarray]:
    """Yield [n] int16 at 16 kHz, block by block. A stateful resampler: no seam between blocks."""
    with _ForwardFile(io.BytesIO(data)) as file:
        if not MIN_RATE_HZ <= file.samplerate <= MAX_RATE_HZ:
            raise DecodeError("undecodable", f"a sample rate of {file.samplerate} Hz")
        resampler = soxr.ResampleStream(file.samplerate, SAMPLE_RATE, num_channels=1, dtype="float32", quality="HQ")
        num_frames = max(1, BLOCK_VALUES // file.channels)
        is_last = False
        while not is_last:
            frames = file.read(num_frames, dtype="float32", always_2d=True)  # [n, c]
            is_last = len(frames) == 0  # a short block is not the end: a decoder may stop where a stream changes
            low, high = frames.min(initial=0.0), frames.max(initial=0.0)  # NaN if there is one
            if not (low >= -MAX_LEVEL and high <= MAX_LEVEL):
                raise DecodeError("not finite", f"samples between {low} and {high}; full scale is 1")
            yield to_int16(resampler.resample_chunk(downmix(frames), last=is_last))
