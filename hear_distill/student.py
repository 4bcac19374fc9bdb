"""The student: a vision transformer whose only sense of place is Canon layers.

in:   the spectrogram that HeAR sees too, of any length in time
out:  one embedding per clip (the product), one per patch, and the projection into HeAR's space

B clips   T spectrogram rows (time)   H x W = T/16 x 8 patch grid (time x mel)   N = H * W tokens, 96 for 2 s
D width   C channels of one Canon layer   M width inside the MLP   E = 512 HeAR embedding   k Canon kernel
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hear_distill import checkpoint, pretrained
from hear_distill.checkpoint import CheckpointError
from hear_distill.embedding import HOP_S, Windows, embed_recordings
from hear_distill.pretrained import PretrainedError

PATCH = 16
GRID_ROWS = 12  # of a 2 s clip
GRID_COLUMNS = 8
MEL_BANDS = PATCH * GRID_COLUMNS
LAYER_NORM_EPS = 1e-6  # HeAR's


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """The architecture. A checkpoint carries it as a dict; the defaults are the ViT-S of the published run."""

    width: int = 384
    """of a token, and of the trunk's embedding"""
    blocks: int = 12
    """transformer blocks, one behind the other"""
    heads: int = 6
    """attention heads; they share the width"""
    mlp_width: int = 1536
    """hidden width of the MLP in each block"""
    embedding_width: int = 512
    """width of the projection, that of the teacher's embedding"""
    canon: str = "abcd"
    """places of the Canon layers: a before attention, b on q, k and v, c before the MLP, d inside it; or none"""
    canon_kernel: int = 3
    """patches that one Canon layer spans on each axis; odd, so that it stays centred"""
    canon_dims: Literal[1, 2] = 2
    """2: over the time x mel grid, 1: along the token sequence"""
    positions: Literal["none", "learned"] = "none"
    """learned: a position embedding as well, an ablation; Canon makes it unnecessary"""

    def __post_init__(self) -> None:
        for field in ("width", "blocks", "heads", "mlp_width", "embedding_width", "canon_kernel"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, got width {self.width} and heads {self.heads}")
        if self.canon != "none" and "".join(c for c in "abcd" if c in self.canon) != self.canon:
            raise ValueError(f"canon must be some of the letters abcd in this order, or none; got {self.canon!r}")
        if self.canon_kernel % 2 == 0:
            raise ValueError(f"canon_kernel must be odd to stay centred on the patch, got {self.canon_kernel}")
        if self.canon_dims not in (1, 2):
            raise ValueError(f"canon_dims must be 1 or 2, got {self.canon_dims}")
        if self.positions not in ("none", "learned"):
            raise ValueError(f"positions must be none or learned, got {self.positions!r}")


# deep-thin and shallow-wide keep heads of 64 and have the parameters of small within 1 %: comparing the three compares
# shapes.
SIZES = {
    "tiny": StudentConfig(width=192, blocks=12, heads=3, mlp_width=768),
    "small": StudentConfig(),
    "base": StudentConfig(width=768, blocks=12, heads=12, mlp_width=3072),
    "deep-thin": StudentConfig(width=256, blocks=27, heads=4, mlp_width=1024),
    "shallow-wide": StudentConfig(width=512, blocks=7, heads=8, mlp_width=1920),
}


class Canon2d(nn.Module):
    """Depthwise k x k mixing of neighbouring patches, added to its input; zeros beyond the border.

    Source: Canon layers (Physics of Language Models 4.1, arXiv 2512.17351, eq. 4.1), moved from a line to a grid: no
    bias, no activation, PyTorch's default initialisation U(-1/k, 1/k), which the paper found to matter. The zeros are
    what tells a patch where the border is, and so where it stands.
    """

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]"""
        # Tokens lie in memory as a channels-last image does: these views copy nothing, and neither does the way back.
        grid = x.unflatten(1, (-1, GRID_COLUMNS)).permute(0, 3, 1, 2)  # [B, C, H, W]
        return x + self.conv(grid).permute(0, 2, 3, 1).flatten(1, 2)


class Canon1d(nn.Module):
    """Depthwise mixing of k tokens in sequence, where each row of patches runs on into the next: an ablation."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]"""
        return x + self.conv(x.transpose(1, 2)).transpose(1, 2)


def canon_layer(config: StudentConfig, place: str, channels: int) -> nn.Module:
    """The Canon layer of one place of a block, or a pass-through if `config.canon` leaves the place out."""
    if config.canon == "none" or place not in config.canon:
        return nn.Identity()
    return (Canon2d if config.canon_dims == 2 else Canon1d)(channels, config.canon_kernel)


class Block(nn.Module):
    """Pre-norm transformer block. Canon acts inside the two branches, never on the residual stream."""

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        width, mlp_width = config.width, config.mlp_width
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.canon_a = canon_layer(config, "a", width)
        self.qkv = nn.Linear(width, 3 * width)
        self.canon_b = canon_layer(config, "b", 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.canon_c = canon_layer(config, "c", width)
        self.fc1 = nn.Linear(width, mlp_width)
        self.canon_d = canon_layer(config, "d", mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]"""
        x = x + self.attention(self.canon_a(self.norm1(x)))
        return x + self.fc2(F.gelu(self.canon_d(self.fc1(self.canon_c(self.norm2(x))))))

    def attention(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]"""
        qkv = self.canon_b(self.qkv(x))  # [B, N, 3 D]
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, heads, N, D / heads]
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2))  # [B, N, D]


class Student(nn.Module):
    """The Canon ViT. Linear layers of the blocks start as a ViT's do, from a normal of deviation 0.02 without bias."""

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        self.config = config
        self.patch = nn.Linear(PATCH * PATCH, config.width)
        self.positions = None
        if config.positions == "learned":
            self.positions = nn.Parameter(torch.empty(1, GRID_ROWS, GRID_COLUMNS, config.width))
            nn.init.trunc_normal_(self.positions, std=0.02)
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.blocks)))
        self.norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.projection = nn.Linear(config.width, config.embedding_width)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, spectrogram: Tensor) -> Tensor:
        """[B, 1, T, 128] -> [B, D], the trunk embedding of each clip: the mean of its tokens."""
        return self.tokens(spectrogram).mean(dim=1)

    def tokens(self, spectrogram: Tensor) -> Tensor:
        """[B, 1, T, 128] -> [B, N, D], one normalised token per patch, in rows of 8: time is the slow axis.

        Raises ValueError unless T is a positive multiple of 16; a clip of 2 s has 192 rows.
        """
        shape = tuple(spectrogram.shape)
        if len(shape) != 4 or shape[1] != 1 or shape[2] == 0 or shape[2] % PATCH or shape[3] != MEL_BANDS:
            raise ValueError(
                f"spectrogram must be [B, 1, a positive multiple of {PATCH}, {MEL_BANDS}], got {list(shape)}"
            )
        patches = spectrogram.unflatten(3, (GRID_COLUMNS, PATCH)).unflatten(2, (-1, PATCH))  # [B, 1, H, 16, W, 16]
        x = self.patch(patches.squeeze(1).transpose(2, 3).flatten(3))  # [B, H, W, D]
        if self.positions is not None:
            x = x + self.positions_for(x.shape[1])
        return self.norm(self.blocks(x.flatten(1, 2)))  # [B, N, D]

    def positions_for(self, rows: int) -> Tensor:
        """[1, rows, W, D]: the learned grid, stretched along time; for 12 rows exactly as learned."""
        grid = self.positions.permute(0, 3, 1, 2)  # [1, D, 12, W]
        return F.interpolate(grid, size=(rows, GRID_COLUMNS), mode="bilinear").permute(0, 2, 3, 1)

    def project(self, embedding: Tensor) -> Tensor:
        """[B, D] -> [B, E], where the teacher's embeddings lie. It is linear, so it may also follow an average."""
        return self.projection(embedding)

    @classmethod
    def from_pretrained(cls, name: str | Path, *, revision: str | None = None) -> "Student":
        """A released student, in eval mode, on the CPU.

        Args:
            name: a folder that export_student.py wrote, an id on the hub, or a checkpoint of the trainer, a *.pt file.
            revision: commit, branch or tag on the hub; None takes the newest.

        Raises PretrainedError or, for a *.pt file, CheckpointError, both with the way out in one line.
        """
        if Path(name).suffix == ".pt":
            return load_student(Path(name))
        config, weights = pretrained.load(name, revision)
        try:
            student = cls(StudentConfig(**config))
            student.load_state_dict(weights)
        except (TypeError, ValueError, RuntimeError) as e:
            found = " ".join(str(e).split())  # torch lists every differing weight on a line of its own
            raise PretrainedError(f"the weights of {name} do not fit its configuration: {found:.200}") from e
        return student.eval()

    def embed(self, waveform: Any, sample_rate: float) -> np.ndarray:
        """One embedding [D] float32 of a recording of any length, or [k, D] of a list of k recordings.

        It is the mean over windows of 2 s, one every second: what the evaluation measures. The gain does not matter.

        Args:
            waveform: [n] or [c, n] samples of one or two channels, which are averaged; NumPy or torch; floating, int16
                or int32. [n, c] is refused, and so is [k, n]: several recordings are a list.
            sample_rate: Hz, of all of them.

        Raises WaveformError, a ValueError, for what is no such waveform, is empty, or holds NaN.
        """
        is_many = isinstance(waveform, (list, tuple))
        found = embed_recordings(self, waveform if is_many else [waveform], sample_rate, HOP_S)
        means = [windows.embeddings.mean(axis=0) for windows in found]  # each [D]
        return (np.stack(means) if means else np.zeros((0, self.config.width), np.float32)) if is_many else means[0]

    def embed_windows(self, waveform: Any, sample_rate: float, *, hop_s: float = HOP_S) -> Windows | list[Windows]:
        """Embeddings [w, D] of the windows of 2 s of a recording, and where each starts in seconds; of a list, a list.

        A window begins every `hop_s` seconds, and one at the end, so that no sound is left out. Otherwise as `embed`.
        """
        is_many = isinstance(waveform, (list, tuple))
        found = embed_recordings(self, waveform if is_many else [waveform], sample_rate, hop_s)
        return found if is_many else found[0]


def load_student(path: Path) -> Student:
    """The student of a training checkpoint, in eval mode, on the CPU. Raises CheckpointError for any other file."""
    state = checkpoint.load(path)
    try:
        student = Student(StudentConfig(**state["student_config"]))
        student.load_state_dict(state["student"])
    except (KeyError, TypeError, ValueError, RuntimeError) as e:
        found = " ".join(str(e).split())  # torch lists every differing weight on a line of its own
        raise CheckpointError(
            f"{path} holds no student of this architecture ({type(e).__name__}: {found:.200}); "
            f"name a checkpoint of distill_hear_vit_s_canon2d.py"
        ) from e
    return student.eval()
