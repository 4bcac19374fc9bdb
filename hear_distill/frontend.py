"""Sound in, mel-PCEN image out: what HeAR and the student see.

in:   [B, n] float32, mono, 16 kHz, at any gain and offset
out:  [B, 1, R, M] float32, never negative; 2 s of sound give R = 192 rows, low bands first, or, squeezed, any length

B clips   n samples   T frames, 100 a second   F = 201 frequency bins   M = 128 mel bands   R = 24/25 T rows
S = 400 samples of a frame   K = 50 frames of a block, which become 48 rows

The formulas are those of `preprocess_audio` in github.com/Google-Health/hear, with one choice: minimum and maximum are
taken per clip, not over the batch, so that a clip never depends on its batch mates (equal to the original on one clip).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

VERSION = 1  # stands in the key of every stored embedding: raise it with any change that shows in the numbers
CLIP_SAMPLES = 32_000  # 2 s; shorter sound is padded to this
HOP_SAMPLES = 160  # 10 ms
FRAME_SAMPLES = 400  # 25 ms
BLOCK_FRAMES, BLOCK_ROWS = 50, 48  # half a second, 3 rows of patches
BLOCK_SAMPLES = BLOCK_FRAMES * HOP_SAMPLES
CLIP_ROWS = CLIP_SAMPLES // BLOCK_SAMPLES * BLOCK_ROWS  # 192
NUM_MELS = 128
NYQUIST_HZ = 8_000
SMOOTHING, GAIN, BIAS, FLOOR = 0.04, 0.8, 2.0, 1e-8  # of PCEN, arXiv 1607.05666; its root is 2


def num_blocks(num_samples: int) -> int:
    """Blocks of half a second in a clip once zeros were appended: four at least, and whole ones only."""
    if num_samples < 1:
        raise ValueError(f"found {num_samples} samples, expected at least one: drop empty recordings before this call")
    return max(CLIP_SAMPLES // BLOCK_SAMPLES, -(-num_samples // BLOCK_SAMPLES))


def num_rows(num_samples: int) -> int:
    """Rows R of the image of a clip.

    >>> num_rows(1), num_rows(32_000), num_rows(32_001)
    (192, 192, 240)
    """
    return num_blocks(num_samples) * BLOCK_ROWS


@contextmanager
def exact_float32(device_type: str) -> Iterator[None]:
    """No autocast, TF32 or bfloat16 in matmuls, whatever the caller has set; that comes back afterwards.

    PCEN divides by means down to 1e-8, where short mantissas show. The settings belong to the process, not to the
    thread: matmuls of other threads are exact for that time, too.
    """
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def frames_of(audio: Tensor) -> Tensor:
    """[B, n] -> [B, T, S]: zeros up to whole blocks, each clip stretched to [-1, 1], 240 zeros for the last frames.

    The first zeros take part in the stretching and the last do not, as in the original. The frames are a view.
    """
    num_samples = audio.shape[1]
    audio = pad(audio, (0, num_blocks(num_samples) * BLOCK_SAMPLES - num_samples))  # [B, 160 T]
    return frames_without_blocks(audio)


def frames_without_blocks(audio: Tensor) -> Tensor:
    """[B, n] -> [B, T, S]: as published for a recording of any length of 2 s or more, T = n / 160, rounded up."""
    num_samples = audio.shape[1]
    low = audio.amin(dim=1, keepdim=True)  # [B, 1]
    high = audio.amax(dim=1, keepdim=True)  # [B, 1]
    audio = (audio - low).mul_(2 / (high - low + 1e-8)).sub_(1)  # in place on the difference, never on the input
    num_frames = -(-num_samples // HOP_SAMPLES)
    audio = pad(audio, (0, (num_frames - 1) * HOP_SAMPLES + FRAME_SAMPLES - num_samples))  # [B, 160 T + 240]
    return audio.unfold(1, FRAME_SAMPLES, HOP_SAMPLES)  # [B, T, S]


def triangles(position: Tensor, num_centres: int) -> Tensor:
    """[P] -> [P, C]: how much of centre 0, 1, ... lies at each position; 1 on the centre, 0 from a distance of 1."""
    return (1 - (position[:, None] - torch.arange(num_centres)).abs()).clamp_min(0)


def mel_matrix() -> Tensor:
    """[F, M] HTK filters: height 1, evenly spaced and linear in mel.

    Bands 0, 3, 6 and 13 fall between two bins of 40 Hz and are always 0, in the original as well.
    """
    hz = torch.linspace(0, NYQUIST_HZ, FRAME_SAMPLES // 2 + 1, dtype=torch.float64)  # [F]
    mel = 2595 * torch.log10(1 + hz / 700)
    return triangles((NUM_MELS + 1) * mel / mel[-1] - 1, NUM_MELS)  # [F, M]; 0 Hz lies at -1, 8 kHz at 128


class MelPcen(nn.Module):
    """The front end. No parameters, nothing in the state_dict; constants are made once and move with `.to(device)`.

    A NaN spoils the whole clip that holds it and no other: checking is the caller's business.
    """

    def __init__(self) -> None:
        super().__init__()
        frame = torch.arange(BLOCK_FRAMES, dtype=torch.float64)  # [K]
        row = torch.arange(BLOCK_ROWS, dtype=torch.float64)
        keep = 1 - SMOOTHING
        constants = {
            "window": torch.hann_window(FRAME_SAMPLES, dtype=torch.float64),  # [S]
            "mel": mel_matrix(),  # [F, M]
            "smoother": (SMOOTHING * keep ** (frame[:, None] - frame)).tril(),  # [K, K]
            "decay": keep ** (frame[:, None] + 1),  # [K, 1]
            # Bilinear, pixel centres aligned: row i lies at frame 25 i / 24 + 1/48, so no block needs its neighbour.
            "resize": triangles((row + 0.5) * BLOCK_FRAMES / BLOCK_ROWS - 0.5, BLOCK_FRAMES),  # [48, K]
        }
        for name, value in constants.items():
            self.register_buffer(name, value.float(), persistent=False)

    def forward(self, audio: Tensor) -> Tensor:
        """[B, n] -> [B, 1, R, M]"""
        self._check(audio)
        with exact_float32(audio.device.type):
            rows = [self.resize @ pcen for pcen in self.pcen_blocks(frames_of(audio))]  # each [B, 48, M]
        return torch.cat(rows, dim=1).unsqueeze(1)  # [B, 1, R, M]

    def squeezed(self, audio: Tensor) -> Tensor:
        """[B, n] -> [B, 1, 192, M]: the frames of a recording of any length, resized to the rows of a clip of 2 s.

        What the first implementation did with whole recordings: bilinear and without a filter against aliasing, so of a
        long recording it sees two frames in each step and none of those between. For 2 s or less it is `forward`.
        """
        self._check(audio)
        audio = pad(audio, (0, max(0, CLIP_SAMPLES - audio.shape[1])))
        with exact_float32(audio.device.type):
            pcen = torch.cat(self.pcen_blocks(frames_without_blocks(audio)), dim=1)  # [B, T, M]
        return interpolate(pcen.unsqueeze(1), (CLIP_ROWS, NUM_MELS), mode="bilinear")

    def pcen_blocks(self, frames: Tensor) -> list[Tensor]:
        """[B, T, S] -> blocks of [B, K, M] which together are T long; only the last may be shorter than the others.

        The mean of PCEN is m[t] = 0.04 e[t] + 0.96 m[t-1], and m = e in the first frame. Unrolled over a block that
        follows the mean c: m[t] = sum over k <= t of 0.04 * 0.96^(t-k) e[k] + 0.96^(t+1) c, one matmul and a carry.
        Everything else is done in the same blocks, so that memory stays small and a CPU works inside its cache.
        """
        mean = self.mel_energy(frames[:, :1])  # [B, 1, M]
        blocks = []
        for block in frames.split(BLOCK_FRAMES, dim=1):
            energy = self.mel_energy(block)  # [B, K, M]
            length = energy.shape[1]
            mean = torch.addcmul(self.smoother[:length, :length] @ energy, self.decay[:length], mean[:, -1:])
            blocks.append((energy * (FLOOR + mean).pow(-GAIN) + BIAS).sqrt() - BIAS**0.5)
        return blocks

    def mel_energy(self, frames: Tensor) -> Tensor:
        """[B, T, S] -> [B, T, M]"""
        spectrum = torch.fft.rfft(frames * self.window)  # [B, T, F]
        power = torch.addcmul(spectrum.real.square(), spectrum.imag, spectrum.imag)  # no root, unlike abs().square()
        return power @ self.mel  # [B, T, M]

    def _check(self, audio: Tensor) -> None:
        if audio.ndim != 2 or audio.numel() == 0:
            raise ValueError(
                f"audio has shape {tuple(audio.shape)}, expected [clips, samples] with at least one of each\n"
                f"  for a single clip: pass audio[None]"
            )
        if audio.dtype != torch.float32:
            raise ValueError(
                f"audio is {audio.dtype}, expected torch.float32\n"
                f"  to convert: audio.float(); no scaling is needed, each clip is normalised"
            )
        if self.window.dtype != torch.float32:
            raise ValueError(
                f"this front end was cast to {self.window.dtype}, it computes in torch.float32 only\n"
                f"  to repair: make a new MelPcen() and keep it out of .half(), .bfloat16() and .double()"
            )
