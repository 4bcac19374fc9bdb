"""A student as a model of the HEAR benchmark, by the convention of hearbenchmark.com/hear-api.html.

in:   [S, n] in [-1, 1], mono, 16 kHz, of any length from one sample on
out:  scenes [S, D]: mean over windows of 2 s, one every second; timestamps [S, t, D], one every 166.7 ms

heareval is given the name of this module, hear_distill.hear_module, and a checkpoint of the trainer as its model.

S sounds of one length   n samples   D width of the trunk   w windows   t timestamps   H rows of 8 patches
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from hear_distill.audio import CLIP_SAMPLES, SAMPLE_RATE
from hear_distill.frontend import BLOCK_FRAMES, BLOCK_ROWS, FRAME_SAMPLES, HOP_SAMPLES, MelPcen
from hear_distill.protocols import CHUNK_SAMPLES, PROTOCOLS
from hear_distill.student import GRID_COLUMNS, PATCH, Student, load_student

WINDOWS_PER_CALL = 64
MS_PER_SAMPLE = 1000 / SAMPLE_RATE
TIMESTAMP_MS = PATCH * BLOCK_FRAMES / BLOCK_ROWS * HOP_SAMPLES * MS_PER_SAMPLE  # of 16 rows, 16.7 frames: 166.7 ms
# The middle of a row of patches; a frame is 25 ms long, but the next begins after 10: its middle lies 7.5 ms later.
FIRST_TIMESTAMP_MS = TIMESTAMP_MS / 2 + (FRAME_SAMPLES - HOP_SAMPLES) / 2 * MS_PER_SAMPLE  # 90.8 ms


class HearModel(nn.Module):
    """What HEAR asks of a model: a torch module with these three attributes."""

    sample_rate = SAMPLE_RATE

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student
        self.frontend = MelPcen()
        self.scene_embedding_size = self.timestamp_embedding_size = student.config.width

    def forward(self, audio: Tensor) -> Tensor:
        """[S, n] -> [S, H, D], a mean over the mel axis for each row of patches; their mean is the trunk embedding."""
        tokens = self.student.tokens(self.frontend(audio))  # [S, 8 H, D]
        return tokens.unflatten(1, (-1, GRID_COLUMNS)).mean(dim=2)


def load_model(model_file_path: str = "runs/hear-vit-s/best.pt") -> HearModel:
    """The student of a training checkpoint, in eval mode, on the CPU. Raises CheckpointError for any other file."""
    return HearModel(load_student(Path(model_file_path))).eval()


@torch.no_grad()
def get_scene_embeddings(audio: Tensor, model: HearModel) -> Tensor:
    """[S, n] -> [S, D] float32, on the device of the model.

    By the protocol `windows`, on which the evaluator reports, too: the student was trained on 2 s.
    """
    cut = PROTOCOLS["windows"].cut
    scenes = []
    for sounds in _few_at_a_time(audio):
        pieces = torch.from_numpy(np.stack([cut(sound) for sound in sounds.numpy()]))  # [S, w, 32000]
        calls = pieces.flatten(0, 1).split(WINDOWS_PER_CALL)
        embeddings = torch.cat([model(call.to(_device(model))).mean(dim=1) for call in calls])  # [S * w, D]
        scenes.append(embeddings.unflatten(0, pieces.shape[:2]).mean(dim=1))
    return torch.cat(scenes)


@torch.no_grad()
def get_timestamp_embeddings(audio: Tensor, model: HearModel) -> tuple[Tensor, Tensor]:
    """[S, n] -> [S, t, D] float32 and their times [S, t] in ms, on the device of the model.

    One for each row of patches whose middle lies within the sound, the first of all in any case; HEAR suggests a hop of
    50 ms, and a patch is 166.7 ms long. Each sees the 30 s around it: longer sounds are embedded in chunks, back to
    back, which are normalised each by itself.
    """
    embeddings = []
    for sounds in _few_at_a_time(audio):
        rows = [model(chunk.to(_device(model))) for chunk in sounds.split(CHUNK_SAMPLES, dim=1)]
        embeddings.append(torch.cat(rows, dim=1))  # [S, H, D]
    times = FIRST_TIMESTAMP_MS + TIMESTAMP_MS * torch.arange(embeddings[0].shape[1])  # [H]
    num_within = max(1, int((times < audio.shape[1] * MS_PER_SAMPLE).sum()))
    times = times[:num_within].repeat(len(audio), 1).to(_device(model))  # [S, t]
    return torch.cat(embeddings)[:, :num_within], times


def _few_at_a_time(audio: Tensor) -> tuple[Tensor, ...]:
    """[S, n] -> parts of it on the CPU, float32, of about as much sound as a call takes, one sound at least."""
    if audio.ndim != 2 or audio.numel() == 0 or not audio.is_floating_point():
        raise ValueError(
            f"audio is {audio.dtype} of shape {tuple(audio.shape)}, expected floats [sounds, samples] in [-1, 1], "
            f"at least one of each; for a single sound pass audio[None]"
        )
    return audio.detach().float().cpu().split(max(1, WINDOWS_PER_CALL * CLIP_SAMPLES // audio.shape[1]))


def _device(model: HearModel) -> torch.device:
    """Where its weights are: users move it after it was loaded."""
    return model.student.patch.weight.device
