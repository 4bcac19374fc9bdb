"""The front end and the student as graphs of plain matrix products, and their way into ONNX files.

in:   a Student
out:  modules that `torch.onnx.export` can take with any batch and any length: waveform or spectrogram in, embedding out

B clips   n samples   K blocks of half a second   T = 50 K frames, 100 a second   R = 48 K rows   M = 128 mel bands
S = 400 samples of a frame   F = 201 frequency bins   D width of the embedding

`frontend.MelPcen` has a fast Fourier transform, which not every runtime has, and a loop over blocks, whose number is
not known here. Both are linear, so both become matrices. Its constants are used, not written down a second time.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hear_distill.frontend import (
    BIAS,
    BLOCK_FRAMES,
    BLOCK_SAMPLES,
    CLIP_SAMPLES,
    FLOOR,
    FRAME_SAMPLES,
    GAIN,
    HOP_SAMPLES,
    NUM_MELS,
    MelPcen,
)
from hear_distill.student import Student

MIN_BLOCKS = CLIP_SAMPLES // BLOCK_SAMPLES
# A block keeps 0.96^50 = 0.13 of what came before it. After 32 blocks 4e-29 is left, which no float32 sum with the
# floor of 1e-8 can hold: energies stay below 1e5. So a sum over 32 blocks is the whole recurrence.
CARRY_BLOCKS = 32
EPSILON = 1e-8  # of the stretching


def transform_matrix(window: Tensor) -> Tensor:
    """[S] -> [S, 2 F]: frame @ matrix is the real part of the windowed frame's spectrum, then minus the imaginary one.

    The angle is reduced by whole turns while it is an integer, so that the cosines are right to the last bit.
    """
    turns = torch.outer(torch.arange(FRAME_SAMPLES), torch.arange(FRAME_SAMPLES // 2 + 1)) % FRAME_SAMPLES  # [S, F]
    angle = turns.double() * (2 * math.pi / FRAME_SAMPLES)
    return (window.double()[:, None] * torch.cat([angle.cos(), angle.sin()], dim=1)).float()


class PlainMelPcen(nn.Module):
    """What `MelPcen` computes, without a transform and without a loop. Float32 in every model, float16 ones too.

    It never adds 1e-8 to anything, but 1 to what was divided by that: the exporter's optimiser takes x + 1e-8 for x.
    """

    def __init__(self) -> None:
        super().__init__()
        frontend = MelPcen()
        block_decay = float(frontend.decay[-1].double())  # what is left of a mean after one block
        constants = {
            "transform": transform_matrix(torch.hann_window(FRAME_SAMPLES, dtype=torch.float64)),  # [S, 2 F]
            "mel": torch.cat([frontend.mel, frontend.mel]),  # [2 F, M]: real and imaginary parts add up as powers
            "smoother": frontend.smoother,
            "decay": frontend.decay,
            "resize": frontend.resize,
            "carry": block_decay ** torch.arange(CARRY_BLOCKS - 1, -1, -1, dtype=torch.float64),
        }
        for name, value in constants.items():
            self.register_buffer(name, value.float(), persistent=False)

    def forward(self, audio: Tensor) -> Tensor:
        """[B, n] -> [B, 1, R, M]"""
        energy = self.mel_energy(audio)  # [B, K, 50, M]
        within = self.smoother @ energy  # [B, K, 50, M], as if nothing had come before each block
        mean = within + self.decay * self.carried(energy[:, 0, :1], within[:, :-1, -1])[:, :, None]
        pcen = (energy * (FLOOR**-GAIN * (mean / FLOOR + 1).pow(-GAIN)) + BIAS).sqrt() - BIAS**0.5
        return (self.resize @ pcen).flatten(1, 2).unsqueeze(1)  # [B, 1, R, M]

    def mel_energy(self, audio: Tensor) -> Tensor:
        """[B, n] -> [B, K, 50, M]; zeros, stretching and frames as `frontend.frames_of` has them."""
        num_blocks = torch.sym_max(MIN_BLOCKS, (audio.shape[1] + BLOCK_SAMPLES - 1) // BLOCK_SAMPLES)
        audio = F.pad(audio, (0, num_blocks * BLOCK_SAMPLES - audio.shape[1]))  # [B, 160 T]
        low, high = audio.amin(dim=1, keepdim=True), audio.amax(dim=1, keepdim=True)  # [B, 1]
        audio = (audio - low) * (2 / EPSILON / ((high - low) / EPSILON + 1)) - 1
        hops = F.pad(audio, (0, 2 * HOP_SAMPLES)).unflatten(1, (-1, HOP_SAMPLES))  # [B, T + 2, 160]
        frames = torch.cat([hops[:, :-2], hops[:, 1:-1], hops[:, 2:, : FRAME_SAMPLES - 2 * HOP_SAMPLES]], dim=2)
        spectrum = frames @ self.transform  # [B, T, 2 F]
        energy = (spectrum * spectrum) @ self.mel  # [B, T, M]
        return energy.unflatten(1, (num_blocks, BLOCK_FRAMES))

    def carried(self, first: Tensor, ends: Tensor) -> Tensor:
        """[B, 1, M] energy of the first frame, [B, K - 1, M] ends of blocks 0 to K - 2 -> [B, K, M] carry into each.

        carry[0] = first, carry[k] = ends[k-1] + 0.96^50 carry[k-1], unrolled: one sum of CARRY_BLOCKS terms.
        """
        history = torch.cat([first, ends], dim=1).transpose(1, 2)  # [B, M, K]
        history = F.pad(history, (CARRY_BLOCKS - 1, 0)).flatten(0, 1).unsqueeze(1)  # [B M, 1, K + 31]
        return F.conv1d(history, self.carry[None, None]).unflatten(0, (-1, NUM_MELS)).squeeze(2).transpose(1, 2)


class Encoder(nn.Module):
    """The student's trunk for a file: float32 in and out, whatever it computes in; the mean over tokens in float32."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, spectrogram: Tensor) -> Tensor:
        """[B, 1, R, M] -> [B, D]"""
        tokens = self.student.tokens(spectrogram.to(self.student.patch.weight.dtype))  # [B, N, D]
        return tokens.float().mean(dim=1)
