"""Everything that an evaluation can compare, in one form: a front end, and a model that reads its image.

in:   a spec: `logmel`, `mfcc`, `run/best.pt`, `run/best.pt:projection`, or a hub id or folder of HeAR's layout
out:  Embedder: [B, n] sound -> image -> [B, W] embedding, and a fingerprint of everything that decides the numbers

B recordings of one length   n samples at 16 kHz, in [-1, 1]   W width of the embedding
T frames, one every 10 ms   C numbers in one frame
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
import torchaudio
from torch import Tensor, nn
from torch.nn.functional import avg_pool1d, interpolate, pad

from hear_distill import checkpoint, frontend
from hear_distill.files import UserError
from hear_distill.frontend import CLIP_ROWS, CLIP_SAMPLES, FRAME_SAMPLES, HOP_SAMPLES, MelPcen
from hear_distill.student import load_student
from hear_distill.teacher import HEAR_CONFIG, load_teacher

OUTPUTS = ("trunk", "projection")  # of a student; the first is what a spec without a colon means
BASELINE_VERSION = 1  # raise it with any change of a baseline that shows in its numbers
NUM_MELS, NUM_COEFFICIENTS = 64, 20
FFT_SAMPLES = 1024  # bins of 15.6 Hz, so that none of the 64 bands is empty


class FrontEnd(Protocol):
    """What an image is made with. It has no parameters, so one instance serves all embedders of its class."""

    def __call__(self, audio: Tensor) -> Tensor:
        """[B, n] -> [B, ...], of the length that it has."""

    def squeezed(self, audio: Tensor) -> Tensor:
        """[B, n] -> [B, ...] as of a recording of 2 s: its frames are resized to 192 along time."""


@dataclass(frozen=True, kw_only=True)
class Embedder:
    """One way to turn sound into numbers, frozen."""

    name: str
    """the spec, as given"""
    width: int
    """W"""
    fingerprint: str
    """equal for two embedders only if their embeddings are; what lies in a cache is found by it"""
    is_stand_in: bool
    """a teacher which is not the real HeAR; for a student this says nothing"""
    device: str
    """where front end and model are"""
    frontend: FrontEnd
    """[B, n] -> image"""
    model: Callable[[Tensor], Tensor]
    """image -> [B, W]; images of recordings of any length, if they are of one length"""


def load_embedder(spec: str, device: str = "cpu") -> Embedder:
    """The embedder that a spec names: a baseline, else a file or what ends in .pt, which is a student, else a teacher.

    Raises:
        CheckpointError: no student of this project's architecture is in the file, or more than plain tensors.
        TeacherError: no such folder, no access, or a model of another kind.
        UserError: a student has no such output.
    """
    if spec in BASELINES:
        return _baseline(spec, device)
    if _is_student(spec):
        return _student(spec, Path(spec), OUTPUTS[0], device)
    path, _, output = spec.rpartition(":")
    if _is_student(path):
        if output not in OUTPUTS:
            raise UserError(f"{spec}: a student has the outputs {' and '.join(OUTPUTS)}, found {output!r}")
        return _student(spec, Path(path), output, device)
    return _teacher(spec, device)


def _is_student(path: str) -> bool:
    return path.endswith(".pt") or Path(path).is_file()


def _fingerprint(device: str, **facts: object) -> str:
    """One line of JSON. The kind of device counts: convolutions on a GPU may round to ten bits."""
    return json.dumps({**facts, "device": torch.device(device).type, "precision": "float32"}, sort_keys=True)


def _student(spec: str, path: Path, output: str, device: str) -> Embedder:
    student = load_student(path).requires_grad_(False)
    config = asdict(student.config)
    weights = checkpoint.digest(dict(student.state_dict()))
    return Embedder(
        name=spec,
        width=student.config.width if output == "trunk" else student.config.embedding_width,
        fingerprint=_fingerprint(
            device, kind="student", weights=weights, config=config, output=output, mel_pcen=frontend.VERSION
        ),
        is_stand_in=False,
        device=device,
        frontend=MelPcen().to(device),
        model=(student if output == "trunk" else nn.Sequential(student, student.projection)).to(device),
    )


def _teacher(spec: str, device: str) -> Embedder:
    teacher = load_teacher(spec, device=device)
    # Not the whole config: it names the folder and the version of transformers, and these change no number.
    config = {field: getattr(teacher.model.config, field) for field in HEAR_CONFIG}
    return Embedder(
        name=spec,
        width=config["pooler_output_size"],
        fingerprint=_fingerprint(
            device, kind="teacher", revision=teacher.revision, config=config, mel_pcen=frontend.VERSION
        ),
        is_stand_in=teacher.is_stand_in,
        device=device,
        frontend=MelPcen().to(device),
        model=teacher.embed_any_length,
    )


def _baseline(spec: str, device: str) -> Embedder:
    front_end = BASELINES[spec]().to(device)
    return Embedder(
        name=spec,
        width=front_end.width,
        fingerprint=_fingerprint(
            device, kind="baseline", name=spec, version=BASELINE_VERSION, torchaudio=torchaudio.__version__
        ),
        is_stand_in=False,
        device=device,
        frontend=front_end,
        model=nn.Identity(),
    )


class Baseline(nn.Module):
    """Mean and standard deviation over time of what a frame of 25 ms holds, one every 10 ms. Nothing is learned.

    Frames are centred on multiples of 10 ms; beyond both ends of the recording lie zeros. All frames are made at once,
    about 0.6 MB for each second.
    """

    width: int

    def frames(self, audio: Tensor) -> Tensor:
        """[B, n] -> [B, C, T], T = n / 160 rounded down, and one"""
        raise NotImplementedError

    def forward(self, audio: Tensor) -> Tensor:
        """[B, n] -> [B, 2 C]: the means, then the deviations (divided by T, so that one frame has 0)."""
        return _mean_and_deviation(self.frames(audio))

    def squeezed(self, audio: Tensor) -> Tensor:
        """[B, n] -> [B, 2 C] of frames that were resized to 192 as HeAR's are; below 2 s, zeros are appended first."""
        audio = pad(audio, (0, max(0, CLIP_SAMPLES - audio.shape[1])))
        return _mean_and_deviation(interpolate(self.frames(audio), CLIP_ROWS, mode="linear"))


def _mean_and_deviation(frames: Tensor) -> Tensor:
    """[B, C, T] -> [B, 2 C]"""
    return torch.cat([frames.mean(dim=2), frames.std(dim=2, correction=0)], dim=1)


def _mel_options() -> dict[str, object]:
    """Of both baselines, for torchaudio; HTK mel bands of height 1 from 0 Hz to 8 kHz are its defaults."""
    return {
        "n_fft": FFT_SAMPLES,
        "win_length": FRAME_SAMPLES,
        "hop_length": HOP_SAMPLES,
        "n_mels": NUM_MELS,
        "pad_mode": "constant",
    }


class LogMel(Baseline):
    """ln(power in each of 64 mel bands + 1e-6)."""

    width = 2 * NUM_MELS

    def __init__(self) -> None:
        super().__init__()
        self.mel = torchaudio.transforms.MelSpectrogram(**_mel_options())  # 16 kHz is its default

    def frames(self, audio: Tensor) -> Tensor:
        """[B, n] -> [B, 64, T]"""
        return torch.log(self.mel(audio) + 1e-6)


class Mfcc(Baseline):
    """20 cepstral coefficients of those log-mel bands, of them the first for the level, and the zero-crossing rate.

    After the baseline of the ESC datasets (Piczak 2015), which is mean and deviation of MFCC and zero-crossing rate.
    """

    width = 2 * (NUM_COEFFICIENTS + 1)

    def __init__(self) -> None:
        super().__init__()
        # log_mels: in decibels, torchaudio would cut at 80 below the maximum of the whole batch.
        self.mfcc = torchaudio.transforms.MFCC(n_mfcc=NUM_COEFFICIENTS, log_mels=True, melkwargs=_mel_options())

    def frames(self, audio: Tensor) -> Tensor:
        """[B, n] -> [B, 21, T]"""
        return torch.cat([self.mfcc(audio), zero_crossing_rate(audio)], dim=1)


def zero_crossing_rate(audio: Tensor) -> Tensor:
    """[B, n] -> [B, 1, T]: the share of neighbours within a frame of which one is negative and the other is not."""
    is_negative = pad(audio, (FRAME_SAMPLES // 2, FRAME_SAMPLES // 2)) < 0  # [B, n + 400]
    crosses = (is_negative[:, 1:] != is_negative[:, :-1]).float()  # [B, n + 399]
    return avg_pool1d(crosses.unsqueeze(1), FRAME_SAMPLES - 1, HOP_SAMPLES)  # [B, 1, T]


BASELINES: dict[str, type[Baseline]] = {"logmel": LogMel, "mfcc": Mfcc}
