"""HeAR-s, the first distilled HeAR, for inference: what its published checkpoints hold, and nothing that they might.

in:   a .safetensors file or a folder with model.safetensors, or a .pt of the first implementation's trainer
out:  a model, [B, 1, 192, 128] -> [B, D], and a report that names every tensor of the file and what became of it

Written from a description of the architecture, and of the names in a file that follow from it. It is a ViT-S/16 with
Canon at A, B, C and D, and differs from this project's student in these ways: the embedding is the class token, which
no Canon layer mixes and no norm follows; Canon is 4 x 4 with a bias, so the kernel hangs over by one more patch at the
end of each axis; B mixes the output of attention, after its projection. With the tensors that are never used, such a
file holds 22,140,288 numbers, which is what the card of HeAR-s1.1 says; its files themselves were not at hand.

B clips   H x W = 12 x 8 patch grid (time x mel)   N = 97 tokens, the class token first   D = 384 width   C channels
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PosixPath
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from hear_distill.files import UserError

WIDTH, BLOCKS, HEADS, MLP_WIDTH, EMBEDDING_WIDTH = 384, 12, 6, 1536, 512
GRID, PATCH = (12, 8), 16
KERNEL = 4
LAYER_NORM_EPS = 1e-6  # timm's, for vision transformers
ANCHOR = "patch_embed.proj.weight"  # each file has one tensor of this name, behind the prefix that all of them share
PROJECTION = "proj."  # no prefix: it is a model of its own

# Our name of each tensor: the file's, behind the prefix. The wrappers of the first implementation stand in its names:
# `block` around a block, `module` around what Canon precedes, 0 and 1 for a layer and the Canon that follows it.
OUTSIDE = {
    "class_token": "cls_token",
    "positions": "pos_embed",
    "patch.weight": "patch_embed.proj.weight",
    "patch.bias": "patch_embed.proj.bias",
}
IN_A_BLOCK = {
    "norm1": "norm1",
    "canon_a": "attn.canon.conv",
    "qkv": "attn.module.qkv",
    "out": "attn.module.proj.0",
    "canon_b": "attn.module.proj.1.conv",
    "norm2": "norm2",
    "canon_c": "mlp.canon.conv",
    "fc1": "mlp.module.fc1.fc1",
    "canon_d": "mlp.module.fc1.canon.conv",
    "fc2": "mlp.module.fc2",
}
UNUSED = {
    r"fc_norm\.(weight|bias)": "a norm after average pooling, which is not what the embedding is",
    r"blocks\.\d+\.block\..*\._fallback\.(conv\.)?(weight|bias)": "a Canon layer for images that are no 12 x 8 grid",
}
TRAINING_STATE = {"args", "optim", "scaler", "step", "lr_gns_state", "optimizer_mode_state", "auto_warmup_state"}
SILENT_OPTIONS = ("canon_causal",)  # of the first implementation: they change the outputs, and no name and no shape
# Its .pt files hold the command line, with paths in it. Building a path touches no file.
PATHS = [(PosixPath, "pathlib.PosixPath"), (PosixPath, "pathlib._local.PosixPath")]


class HearSError(UserError):
    """A file that is no HeAR-s checkpoint, or one with something in it that this module does not know."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What became of the file. Together `used` and `ignored` are everything that is in it."""

    used: dict[str, str]
    """name in the file -> parameter of the model"""
    ignored: dict[str, str]
    """name in the file -> the reason"""


class Canon(nn.Conv2d):
    """Depthwise 4 x 4 mixing of patches with a bias, added to its input. The class token passes unchanged."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, KERNEL, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]"""
        patches = x[:, 1:].unflatten(1, GRID).permute(0, 3, 1, 2)  # [B, C, H, W]
        before, after = (KERNEL - 1) // 2, KERNEL // 2
        mixed = super().forward(F.pad(patches, (before, after, before, after)))
        return x + F.pad(mixed.permute(0, 2, 3, 1).flatten(1, 2), (0, 0, 1, 0))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, eps=LAYER_NORM_EPS)
        self.canon_a = Canon(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.canon_b = Canon(WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH, eps=LAYER_NORM_EPS)
        self.canon_c = Canon(WIDTH)
        self.fc1 = nn.Linear(WIDTH, MLP_WIDTH)
        self.canon_d = Canon(MLP_WIDTH)
        self.fc2 = nn.Linear(MLP_WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]"""
        qkv = self.qkv(self.canon_a(self.norm1(x)))  # [B, N, 3 D]
        q, k, v = qkv.unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # each [B, heads, N, D / heads]
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # [B, N, D]
        x = x + self.canon_b(self.out(mixed))
        return x + self.fc2(F.gelu(self.canon_d(self.fc1(self.canon_c(self.norm2(x))))))


class HearS(nn.Module):
    """The model. `projection` is None where the file has none; HeAR-s1.1 is published without."""

    def __init__(self, has_projection: bool) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, WIDTH, PATCH, stride=PATCH)
        self.class_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.zeros(1, 1 + GRID[0] * GRID[1], WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.projection = nn.Linear(WIDTH, EMBEDDING_WIDTH) if has_projection else None

    def forward(self, spectrogram: Tensor) -> Tensor:
        """[B, 1, 192, 128] -> [B, D], the class token. The images are MelPcen's, of clips of 2 s."""
        if spectrogram.shape[1:] != (1, GRID[0] * PATCH, GRID[1] * PATCH):
            raise ValueError(f"spectrogram must be [B, 1, 192, 128], as of 2 s of sound, got {list(spectrogram.shape)}")
        patches = self.patch(spectrogram).flatten(2).transpose(1, 2)  # [B, H * W, D]
        x = torch.cat([self.class_token.expand(len(patches), -1, -1), patches], dim=1) + self.positions  # [B, N, D]
        return self.blocks(x)[:, 0]  # [B, D]

    def project(self, embedding: Tensor) -> Tensor:
        """[B, D] -> [B, 512], where HeAR's embeddings lie. Raises ValueError if the file had no projection."""
        if self.projection is None:
            raise ValueError("this checkpoint was published without the projection to HeAR's 512 dimensions")
        return self.projection(embedding)


def load_hear_s(path: Path) -> tuple[HearS, Report]:
    """The model, in eval mode on the CPU with frozen weights, and what became of each tensor. Runs no code of the file.

    Raises:
        HearSError: missing, damaged, of another architecture, or with anything in it that is not known.
    """
    tensors, ignored = read_tensors(path)
    prefix = find_prefix(path, tensors)
    model = HearS(has_projection=PROJECTION + "weight" in tensors)
    names = names_in(prefix, has_projection=model.projection is not None)
    ignored |= unused(prefix, tensors)
    refuse_differences(path, {name: tensors[name] for name in tensors if name not in ignored}, names, model)
    model.load_state_dict({ours: tensors[theirs].float() for theirs, ours in names.items()})
    return model.eval().requires_grad_(False), Report(used=names, ignored=ignored)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of the file by name, and what else is in it that needs no look, with the reason."""
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise HearSError(f"no HeAR-s checkpoint at {file}; name a .safetensors file, its folder, or a .pt file")
    if file.suffix == ".safetensors":
        try:
            tensors = load_file(file)
        except SafetensorError as e:
            raise HearSError(f"{file} is damaged or no safetensors file ({e}); fetch it again") from e
        config = file.with_name("config.json")
        refuse_silent_options(file, json.loads(config.read_text()) if config.is_file() else {})
        return tensors, {}
    return training_tensors(file)


def training_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Of a checkpoint of the first implementation's trainer: the student's and the projection's tensors."""
    try:
        with torch.serialization.safe_globals(PATHS):
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises a dozen different ones for a damaged file, all meaning this
        raise HearSError(
            f"{file} is refused ({type(e).__name__}): it is damaged, or holds more than tensors, numbers, text and "
            f"paths; nothing in it was run"
        ) from e
    if not isinstance(state, dict) or not isinstance(state.get("student"), dict):
        raise HearSError(f"{file} is no HeAR-s: it has no entry student")
    refuse_silent_options(file, state.get("args") or {})
    ignored = {name: "the training's, not the model's" for name in state.keys() & TRAINING_STATE}
    unknown = state.keys() - ignored.keys() - {"student", "proj"}
    if unknown:
        raise HearSError(f"{file} has entries that no HeAR-s has: {some(unknown)}")
    projection = {PROJECTION + name: tensor for name, tensor in (state.get("proj") or {}).items()}
    return {f"student.{name}": tensor for name, tensor in state["student"].items()} | projection, ignored


def refuse_silent_options(file: Path, options: dict[str, Any]) -> None:
    """Raise HearSError for an architecture that looks like the published one and computes something else."""
    for name in SILENT_OPTIONS:
        if options.get(name):
            raise HearSError(
                f"{file} was made with {name}, which no published HeAR-s was; this module does not know it"
            )


def find_prefix(path: Path, tensors: dict[str, Tensor]) -> str:
    """What stands before every name of the vision transformer; nothing, `student.`, or what a hub class put there."""
    found = [name.removesuffix(ANCHOR) for name in tensors if name == ANCHOR or name.endswith("." + ANCHOR)]
    if len(found) != 1:
        raise HearSError(f"{path} is no HeAR-s: {len(found)} tensors are called {ANCHOR}, expected one")
    return found[0]


def names_in(prefix: str, has_projection: bool) -> dict[str, str]:
    """Name in the file -> parameter of the model, for all parameters."""
    names = {prefix + theirs: ours for ours, theirs in OUTSIDE.items()}
    for kind in ("weight", "bias"):
        for block in range(BLOCKS):
            for ours, theirs in IN_A_BLOCK.items():
                names[f"{prefix}blocks.{block}.block.{theirs}.{kind}"] = f"blocks.{block}.{ours}.{kind}"
        if has_projection:
            names[PROJECTION + kind] = f"projection.{kind}"
    return names


def unused(prefix: str, tensors: dict[str, Tensor]) -> dict[str, str]:
    """The tensors that the architecture carries along and never uses, with the reason."""
    return {
        name: reason
        for name in tensors
        for pattern, reason in UNUSED.items()
        if name.startswith(prefix) and re.fullmatch(pattern, name.removeprefix(prefix))
    }


def refuse_differences(path: Path, tensors: dict[str, Tensor], names: dict[str, str], model: HearS) -> None:
    """Raise HearSError unless these tensors are exactly the model's, and of its shapes."""
    unknown, missing = tensors.keys() - names.keys(), names.keys() - tensors.keys()
    if unknown or missing:
        differences = [f"{word} {some(found)}" for word, found in (("unknown", unknown), ("missing", missing)) if found]
        raise HearSError(f"{path} is no HeAR-s of the published architecture: {'; '.join(differences)}")
    state = model.state_dict()
    wrong = [
        f"{theirs} is {found.dtype} {list(found.shape)}, expected float {list(state[ours].shape)}"
        for theirs, ours in names.items()
        if (found := tensors[theirs]).shape != state[ours].shape or not found.is_floating_point()
    ]
    if wrong:
        raise HearSError(f"{path} is no HeAR-s of the published size: {some(wrong)}")


def some(names: Iterable[str]) -> str:
    """The first three, and how many there are."""
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
