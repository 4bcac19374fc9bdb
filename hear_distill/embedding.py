"""A waveform as people have it, cut into the windows that the student knows, and their embeddings.

in:   samples [n] or [c, n] of one or two channels, NumPy or torch, at any rate and any length
out:  16 kHz mono windows of 2 s, a new one every hop, and one embedding for each

n samples   c channels   w windows   B windows in a batch   D width of an embedding
"""

from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import soxr
import torch
from torch import Tensor, nn

from hear_distill.audio import CLIP_SAMPLES, MAX_LEVEL, MAX_RATE_HZ, MIN_RATE_HZ, SAMPLE_RATE, downmix, window_starts
from hear_distill.frontend import MelPcen

HOP_S = 1.0  # the evaluation's: neighbouring windows share half of their sound
BATCH_WINDOWS = 16
FULL_SCALE = {("i", 2): 2.0**15, ("i", 4): 2.0**31}  # by kind and bytes of a sample; of floating ones it is 1
MANY = "for several recordings pass a list of them"


class WaveformError(ValueError):
    """What was passed is no waveform that can be embedded. One line: found, expected."""


class Windows(NamedTuple):
    """The windows of one recording."""

    embeddings: np.ndarray
    """[w, D] float32"""
    starts_s: np.ndarray
    """[w] seconds from the beginning of the recording; each window lasts 2 s, the last may be completed with zeros"""


def embed_recordings(model: nn.Module, waveforms: Sequence[Any], sample_rate: float, hop_s: float) -> list[Windows]:
    """The windows of each recording, from `model`, which maps [B, 1, 192, 128] -> [B, D].

    Recordings share batches: a thousand coughs take a thousand / 16 forward passes. All are checked before the first.

    Raises WaveformError, with the place of the recording in the list if there are several.
    """
    hop = hop_samples(hop_s)
    recordings = []
    for i, waveform in enumerate(waveforms):
        try:
            recordings.append(mono_16k(waveform, sample_rate))
        except WaveformError as e:
            raise WaveformError(f"recording {i}: {e}" if len(waveforms) > 1 else str(e)) from None
    if not recordings:
        return []
    starts = [window_starts(len(samples), hop) for samples in recordings]
    views = [
        samples[start : start + CLIP_SAMPLES]
        for samples, of_one in zip(recordings, starts, strict=True)
        for start in of_one
    ]
    bounds = np.cumsum([len(of_one) for of_one in starts])[:-1]
    parts = np.split(embed_views(model, views), bounds)  # each [w, D]
    return [Windows(part, np.array(of_one) / SAMPLE_RATE) for part, of_one in zip(parts, starts, strict=True)]


@torch.inference_mode()
def embed_views(model: nn.Module, views: Sequence[np.ndarray]) -> np.ndarray:
    """Windows of up to 32,000 samples -> [windows, D] float32, in batches. Shorter ones end in zeros."""
    parameter = next(model.parameters())
    frontend = MelPcen().to(parameter.device)
    parts = []
    for first in range(0, len(views), BATCH_WINDOWS):
        batch = views[first : first + BATCH_WINDOWS]
        audio = np.zeros((len(batch), CLIP_SAMPLES), np.float32)  # [B, 32000]
        for row, view in zip(audio, batch, strict=True):
            row[: len(view)] = view
        spectrogram = frontend(torch.from_numpy(audio).to(parameter.device))  # [B, 1, 192, 128]
        parts.append(model(spectrogram.to(parameter.dtype)).float().cpu().numpy())  # [B, D]
    return np.concatenate(parts)


def hop_samples(hop_s: float) -> int:
    """Seconds to samples. Raises WaveformError outside of (0, 2]: a longer hop would leave sound out."""
    if not 1 <= hop_s * SAMPLE_RATE <= CLIP_SAMPLES:
        raise WaveformError(f"hop_s must be above 0 and at most {CLIP_SAMPLES // SAMPLE_RATE}, got {hop_s}")
    return round(hop_s * SAMPLE_RATE)


def mono_16k(waveform: Any, sample_rate: float) -> np.ndarray:
    """[n] or [c, n] at any rate -> [n'] float32 at 16 kHz, the mean of the channels.

    Raises:
        WaveformError: another shape or type, no samples, NaN, infinity or numbers that are no sound, an absurd rate.
    """
    if not isinstance(sample_rate, Real) or not MIN_RATE_HZ <= sample_rate <= MAX_RATE_HZ:
        raise WaveformError(f"sample_rate must be {MIN_RATE_HZ} to {MAX_RATE_HZ} Hz, got {sample_rate!r}")
    frames = as_frames(waveform)  # [n, c]
    low, high = frames.min(), frames.max()  # NaN if there is one
    if not (low >= -MAX_LEVEL and high <= MAX_LEVEL):
        raise WaveformError(f"samples lie between {low} and {high}, expected finite numbers; full scale is 1")
    samples = downmix(frames)  # [n]
    if sample_rate != SAMPLE_RATE:
        samples = soxr.resample(samples, sample_rate, SAMPLE_RATE, quality="HQ")  # [n'], as audio.decode does
    if len(samples) == 0:
        raise WaveformError(f"{len(frames)} samples at {sample_rate} Hz are none at 16 kHz; leave such recordings out")
    return samples


def as_frames(waveform: Any) -> np.ndarray:
    """[n] or [c, n], int16, int32 or floating -> [n, c] float32, where full scale is 1."""
    if isinstance(waveform, Tensor):
        waveform = waveform.detach().cpu()
        waveform = (waveform.float() if waveform.is_floating_point() else waveform).numpy()  # NumPy has no bfloat16
    if not isinstance(waveform, np.ndarray):
        raise WaveformError(f"found a {type(waveform).__name__}, expected a NumPy array or a torch tensor; {MANY}")
    shape = list(waveform.shape)
    if waveform.size == 0:
        raise WaveformError(f"found no samples, shape {shape}; leave empty recordings out")
    if waveform.ndim == 2 and waveform.shape[1] <= 2 < waveform.shape[0]:
        raise WaveformError(f"found shape {shape}, samples first; expected [channels, samples]: pass waveform.T")
    if waveform.ndim not in (1, 2) or (waveform.ndim == 2 and waveform.shape[0] > 2):
        raise WaveformError(f"found shape {shape}, expected [samples], [1, samples] or [2, samples]; {MANY}")
    kind = (waveform.dtype.kind, waveform.dtype.itemsize)
    if kind not in FULL_SCALE and kind[0] != "f":
        raise WaveformError(f"found {waveform.dtype} samples, expected int16, int32 or floating ones (full scale 1)")
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, which the caller refuses
        frames = np.atleast_2d(waveform).T.astype(np.float32)  # [n, c]
    return frames / np.float32(FULL_SCALE.get(kind, 1.0))
