"""The mel-PCEN front end twice more: literally in NumPy, and in torch as it was published. Both are slow on purpose.

n samples   N padded samples   T = N / 160 frames   F = 201 bins   M = 128 bands   R = 24/25 T rows   B clips
"""

from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional


@cache
def mel_matrix() -> np.ndarray:
    """[F, M] float64: every triangle from its two slopes, bin by bin."""
    edges = [i * 2595 * np.log10(1 + 8000 / 700) / 129 for i in range(130)]  # mel
    weights = np.zeros((201, 128))
    for k in range(1, 201):  # bin 0 stays 0
        mel = 2595 * np.log10(1 + 40 * k / 700)
        for m in range(128):
            left, centre, right = edges[m : m + 3]
            rising = (mel - left) / (centre - left)
            falling = (right - mel) / (right - centre)
            weights[k, m] = max(0.0, min(rising, falling))
    return weights


def mel_energy(audio: np.ndarray) -> np.ndarray:
    """[n] -> [T, M] float64."""
    num_samples = 32_000
    while num_samples < len(audio):
        num_samples += 8_000
    x = np.concatenate([np.asarray(audio, np.float64), np.zeros(num_samples - len(audio))])  # [N]
    x = x - x.min()
    x = x / (x.max() + 1e-8)
    x = np.concatenate([2 * x - 1, np.zeros(240)])  # [N + 240]
    window = np.array([0.5 - 0.5 * np.cos(2 * np.pi * i / 400) for i in range(400)])
    energy = np.empty((num_samples // 160, 128))
    for t in range(len(energy)):
        power = np.abs(np.fft.rfft(x[160 * t : 160 * t + 400] * window)) ** 2  # [F]
        energy[t] = power @ mel_matrix()
    return energy


def pcen(energy: np.ndarray) -> np.ndarray:
    """[T, M] -> [T, M] float64, the recurrence frame by frame."""
    mean = energy[0]
    out = np.empty_like(energy)
    for t in range(len(energy)):
        if t > 0:
            mean = 0.04 * energy[t] + 0.96 * mean
        out[t] = np.sqrt(energy[t] / (1e-8 + mean) ** 0.8 + 2) - np.sqrt(2)
    return out


def resize(frames: np.ndarray) -> np.ndarray:
    """[T, M] -> [R, M]: bilinear, pixel centres aligned, row by row."""
    num_frames = len(frames)
    num_rows = num_frames * 24 // 25
    rows = np.empty((num_rows, frames.shape[1]))
    for i in range(num_rows):
        position = (i + 0.5) * num_frames / num_rows - 0.5
        below = int(np.floor(position))
        above = min(below + 1, num_frames - 1)
        rows[i] = (1 - (position - below)) * frames[below] + (position - below) * frames[above]
    return rows


def mel_pcen(audio: np.ndarray) -> np.ndarray:
    """[n] -> [R, M] float64, one clip."""
    return resize(pcen(mel_energy(audio)))


def step_loop_mel_pcen(audio: Tensor) -> Tensor:
    """[B, 32000] -> [B, 1, 192, M] float32, with the loop of the published front end: one step per frame.

    Each step multiplies by two scaled 128 x 128 identities, as published. Here the mel matrix is made once and clips
    are normalised one by one; there it is made in each call, and the batch is normalised as a whole.
    """
    low, high = audio.amin(1, keepdim=True), audio.amax(1, keepdim=True)
    x = functional.pad(2 * (audio - low) / (high - low + 1e-8) - 1, (0, 240))  # [B, 32240]
    window = torch.hann_window(400, device=audio.device)
    power = torch.fft.rfft(x.unfold(1, 400, 160) * window).abs().square()  # [B, T, F]
    energy = power @ torch.from_numpy(mel_matrix()).float().to(audio.device)  # [B, T, M]

    identity = torch.eye(128, device=audio.device)
    means = [energy[:, 0]]
    for t in range(1, energy.shape[1]):
        means.append(energy[:, t] @ (0.04 * identity) + means[-1] @ (0.96 * identity))
    mean = torch.stack(means, dim=1)  # [B, T, M]

    out = (energy / (1e-8 + mean) ** 0.8 + 2) ** 0.5 - 2**0.5
    return functional.interpolate(out[:, None], (192, 128), mode="bilinear", align_corners=False)  # [B, 1, 192, M]
