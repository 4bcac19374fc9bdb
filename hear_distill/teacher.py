"""The frozen teacher: HeAR from the hub or a folder, a small stand-in for demos, random weights for benchmarks.

in:   google/hear-pytorch (1.2 GB, gated), any other model of its kind, or a folder with config.json, model.safetensors
out:  Teacher, which maps the spectrogram of a 2 s clip to the 512-d embedding that the student learns

B clips   192 x 128 = time x mel   E = 512 embedding   N = 96 patches, 12 x 8   P = 1024 width of a token
H x 8 patches of a clip of another length
"""

import hashlib
import json
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from huggingface_hub import get_token, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of the client underneath: a broken connection reaches us as that
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import ViTConfig, ViTModel
from transformers.utils import logging

from hear_distill.files import UserError

logging.disable_progress_bar()  # of reading weights from the disk; downloads keep theirs
HEAR = "google/hear-pytorch"
PATCH, GRID_COLUMNS = 16, 8  # of HeAR: 12 x 8 patches of 16 x 16
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
MIN_COSINE = 0.999  # between centred embeddings in float32 and bfloat16
EXPECTED_FILES = f"a teacher is a folder with {CONFIG_FILE} and {WEIGHTS_FILE}, never a pickle"

# The published configuration; facts without which the loaded network is not HeAR's kind are checked in `check_config`.
HEAR_CONFIG: dict[str, Any] = {
    "image_size": (192, 128),
    "patch_size": 16,
    "num_channels": 1,
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "hidden_act": "gelu_fast",
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "layer_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "qkv_bias": True,
    "encoder_stride": 16,
    "pooler_output_size": 512,
    "pooler_act": "linear",
}
STAND_IN_CONFIG: dict[str, Any] = HEAR_CONFIG | {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "initializer_range": 0.12,
    "stand_in": True,
}


class TeacherError(UserError):
    """The teacher cannot be had, or is not what the student is made for."""


class Teacher(nn.Module):
    """A frozen ViT in eval mode, for good: `train()` does not change it.

    Attributes:
        name: hub id or folder, as given.
        revision: hub commit, or "sha256:" and the hash of the weights file, or the seed of random weights.
        is_stand_in: not the real HeAR, so that every table can say so.
    """

    def __init__(self, model: ViTModel, *, name: str, revision: str, is_stand_in: bool) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.name = name
        self.revision = revision
        self.is_stand_in = is_stand_in
        # transformers' own takes the 96 positions for a square grid, and raises.
        model.embeddings.interpolate_pos_encoding = MethodType(stretched_positions, model.embeddings)
        self.eval()

    def train(self, mode: bool = True) -> "Teacher":
        return super().train(False)

    @torch.no_grad()
    def forward(self, spectrogram: Tensor) -> Tensor:
        """[B, 1, 192, 128] -> [B, E], linear pooling of the class token, not normalised."""
        return self.model(spectrogram.to(self.model.dtype)).pooler_output

    @torch.no_grad()
    def embed_any_length(self, spectrogram: Tensor) -> Tensor:
        """[B, 1, 16 H, 128] -> [B, E]. HeAR was made for H = 12: for any other it works outside what it was trained on.

        Raises ValueError unless the rows are a positive multiple of 16: transformers would drop the rest of them.
        """
        rows = spectrogram.shape[2]
        if rows == 0 or rows % PATCH:
            raise ValueError(f"the spectrogram has {rows} rows, expected a positive multiple of {PATCH}")
        spectrogram = spectrogram.to(self.model.dtype)
        return self.model(spectrogram, interpolate_pos_encoding=True).pooler_output

    @torch.no_grad()
    def embed_with_patches(self, spectrogram: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 1, 192, 128] -> [B, E] as a plain call gives it, and [B, N, P] patch tokens, of the same forward pass.

        They are the last layer's, after its norm and without the class token, in the order of the student's tokens.
        """
        output = self.model(spectrogram.to(self.model.dtype))
        return output.pooler_output, output.last_hidden_state[:, 1:]  # [B, E], [B, N, P]


def stretched_positions(embeddings: nn.Module, tokens: Tensor, height: int, width: int) -> Tensor:
    """[1, 1 + H * 8, P] of [1, 97, P]: the learned grid of positions [12, 8], linear along time; as learned for H = 12.

    The class token keeps its own. Called by transformers as a method, with its arguments, where its own would be.
    """
    learned = embeddings.position_embeddings
    grid = learned[:, 1:].unflatten(1, (-1, GRID_COLUMNS)).permute(0, 3, 1, 2)  # [1, P, 12, 8]
    grid = interpolate(grid, size=(height // PATCH, GRID_COLUMNS), mode="bilinear")  # [1, P, H, 8]
    return torch.cat([learned[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def load_teacher(name_or_folder: str | Path, *, revision: str | None = None, device: str = "cpu") -> Teacher:
    """The teacher in float32.

    Args:
        name_or_folder: a folder if there is one of this name, else an id on the hub. A name in the hub's cache needs no
            network.
        revision: commit, branch or tag on the hub; for a folder, the hash that its weights must have. None takes the
            newest, and `.revision` of the result says which it was.

    Raises:
        TeacherError: no access, no such model, a revision that is not the one asked for, or a model of another kind.
    """
    name = str(name_or_folder)
    is_local = Path(name).is_dir()
    folder = Path(name) if is_local else download(name, revision)
    model, config = load_vit(folder)
    found = weights_hash(folder) if is_local else folder.name  # the hub's cache names a snapshot by its commit
    if is_local and revision not in (None, found):
        raise TeacherError(f"{name} holds other weights: expected {revision}, found {found}")
    teacher = Teacher(model, name=name, revision=found, is_stand_in=config.get("stand_in", False))
    return teacher.to(device)


def to_bfloat16(teacher: Teacher, spectrogram: Tensor) -> None:
    """Turn the weights to bfloat16, if the embeddings of these clips [B, 1, 192, 128] stay what they are.

    Compared by the mean cosine after the mean of the float32 embeddings is taken off: a large common part hides errors.

    Raises:
        TeacherError: fewer than two clips to compare, or the precision is not enough.
    """
    if len(spectrogram) < 2:
        raise TeacherError(
            "bfloat16 cannot be checked: expected two clips or more in the anchor validation, "
            f"found {len(spectrogram)}; --teacher-precision fp32 needs no check"
        )
    exact = teacher(spectrogram)  # [B, E]
    teacher.to(torch.bfloat16)
    mean = exact.mean(dim=0)
    cosine = float(nn.functional.cosine_similarity(teacher(spectrogram).float() - mean, exact - mean).mean())
    if not cosine >= MIN_COSINE:
        raise TeacherError(
            f"the teacher in bfloat16 agrees with float32 to a cosine of {cosine:.5f}, expected {MIN_COSINE} or more; "
            f"run again with --teacher-precision fp32"
        )


def random_teacher(seed: int) -> Teacher:
    """HeAR's full architecture, 303 M parameters, with random weights: as fast as HeAR, and knows nothing."""
    return Teacher(_random_vit(HEAR_CONFIG, seed), name="random weights", revision=f"seed {seed}", is_stand_in=True)


def save_stand_in(folder: Path, seed: int) -> Path:
    """Write a small random teacher of HeAR's kind, marked as a stand-in, for runs without network and account.

    Its weights are six times as large as a ViT's at the start, which spreads the embeddings of different sounds, and
    over more directions: there is more to learn. tests/test_teacher.py says how far and how many.
    """
    _random_vit(STAND_IN_CONFIG, seed).save_pretrained(folder)
    return folder


def _random_vit(config: dict[str, Any], seed: int) -> ViTModel:
    """A ViT with seeded weights. The caller's random numbers go on as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ViTModel(ViTConfig(**config))


def weights_hash(folder: Path) -> str:
    """The revision of a folder: it changes whenever the weights do."""
    with (folder / WEIGHTS_FILE).open("rb") as f:
        return f"sha256:{hashlib.file_digest(f, 'sha256').hexdigest()}"


def download(name: str, revision: str | None) -> Path:
    """The hub's cached copy of the two files of a model, fetched if they are not there. Its name is the commit.

    Only these two, and from then on a folder: given a hub id, `from_pretrained` may fall back to pytorch_model.bin, a
    pickle, and then asks the hub, in a background thread, to convert it.
    """
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))
    except (HTTPError, LocalEntryNotFoundError, HFValidationError) as e:
        raise TeacherError(explain(e, name, revision)) from e


def explain(error: Exception, name: str, revision: str | None) -> str:
    """What went wrong at the hub, and the way out. Quotes no text of the hub, which may repeat what it was sent."""
    demo = "  or try everything without network and account:  make demo"
    if isinstance(error, HFValidationError):
        return f"no folder {name}, and no id on the hub either (those look like {HEAR})\n{demo}"
    if not isinstance(error, HfHubHTTPError):
        reason = type(error.__cause__ or error).__name__
        return (
            f"the hub cannot be reached ({reason}), and {name} is not in its cache on this machine\n"
            f"  load it once with network; then it stays in the cache (HF_HOME)\n{demo}"
        )
    status = f"HTTP {error.response.status_code}, {'a' if get_token() else 'no'} token was sent"
    if isinstance(error, RevisionNotFoundError):
        return f"{name} has no revision {revision} ({status}); see https://huggingface.co/{name}/commits/main"
    if isinstance(error, GatedRepoError):
        found = f"{name} is gated, and its terms were not accepted by this account"
    elif isinstance(error, RepositoryNotFoundError):
        found = f"no folder {name}, and no model of this name on the hub that this account may see"
    else:
        found = f"the hub refuses to send {name}"
    return (
        f"{found} ({status})\n"
        f"  accept the terms, once, signed in:  https://huggingface.co/{name}\n"
        f"  put a token of that account, one that may read gated models, into .env:  HF_TOKEN=...\n{demo}"
    )


def load_vit(folder: Path) -> tuple[ViTModel, dict[str, Any]]:
    """The network of `folder` and its config.json. Raises TeacherError unless every weight came from the file."""
    config = check_config(folder)
    if not (folder / WEIGHTS_FILE).is_file():
        raise TeacherError(f"{folder} has no {WEIGHTS_FILE}; {EXPECTED_FILES}")
    try:
        # Weights of another shape are let through here, to be refused below in our words.
        model, report = ViTModel.from_pretrained(
            folder, use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True
        )
    except SafetensorError as e:
        raise TeacherError(f"{folder / WEIGHTS_FILE} is damaged: {e}\n  delete the folder and fetch it again") from e
    wrong = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
    if wrong:
        found = "; ".join(f"{len(names)} {kind}, such as {names[0]}" for kind, names in wrong.items())
        raise TeacherError(f"the weights of {folder} do not fit its {CONFIG_FILE}: {found}; expected an exact match")
    return model.float(), config  # transformers 5 keeps the precision of the file, 4 does not


def check_config(folder: Path) -> dict[str, Any]:
    """The config.json of `folder`. Raises TeacherError unless it describes a ViT with HeAR's input and output."""
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError) as e:
        raise TeacherError(f"{path} cannot be read ({e}); {EXPECTED_FILES}") from e
    # None of these is transformers' default, so a file that does not state one means something else by it.
    fields = ("image_size", "num_channels", "pooler_output_size", "pooler_act")
    expected = {"model_type": "vit", **{field: HEAR_CONFIG[field] for field in fields}, "image_size": [192, 128]}
    wrong = [
        f"{field} is {config.get(field)!r}, expected {value!r}"
        for field, value in expected.items()
        if config.get(field) != value
    ]
    if wrong:
        raise TeacherError(f"{path} is no teacher of HeAR's kind: {'; '.join(wrong)}")
    return config
