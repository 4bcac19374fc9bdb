"""HeAR-s against a construction of its own: wrapped as the first implementation wraps, counted out in float64.

B clips   H x W = 12 x 8 patch grid   N = 97 tokens   D width   C channels
"""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hear_distill.hear_s import HearS, HearSError, load_hear_s

# ---- the reference: its module tree gives the names that stand in a file, nobody types them ----


class Shifted(nn.Module):
    """Canon on the grid, written as its sum: out[r, c] = in[r, c] + bias + sum over 16 taps, zeros outside."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 4, groups=channels)  # holds the numbers; its forward is not called
        self._fallback = nn.Module()
        self._fallback.conv = nn.Conv1d(channels, channels, 4, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]"""
        out = x.clone()
        for row in range(12):
            for column in range(8):
                total = self.conv.bias.expand(len(x), -1).clone()  # [B, C]
                for down in range(-1, 3):  # one patch before, two after, on both axes
                    for right in range(-1, 3):
                        if 0 <= row + down < 12 and 0 <= column + right < 8:
                            patch = x[:, 1 + 8 * (row + down) + column + right]  # [B, C]
                            total += self.conv.weight[:, 0, down + 1, right + 1] * patch
                out[:, 1 + 8 * row + column] += total
        return out


class Before(nn.Module):
    """A layer whose input is mixed."""

    def __init__(self, channels: int, module: nn.Module) -> None:
        super().__init__()
        self.canon, self.module = Shifted(channels), module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(self.canon(x))


class After(nn.Module):
    """fc1, whose output is mixed."""

    def __init__(self, fc1: nn.Linear) -> None:
        super().__init__()
        self.fc1, self.canon = fc1, Shifted(fc1.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.canon(self.fc1(x))


class Attention(nn.Module):
    """One head after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(384, 1152)
        self.proj = nn.Sequential(nn.Linear(384, 384), Shifted(384))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split(384, dim=2)
        heads = []
        for head in range(6):
            part = slice(64 * head, 64 * head + 64)
            weights = torch.exp(q[..., part] @ k[..., part].transpose(1, 2) / 8)  # [B, N, N]
            heads.append(weights / weights.sum(dim=2, keepdim=True) @ v[..., part])
        return self.proj(torch.cat(heads, dim=2))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = After(nn.Linear(384, 1536)), nn.Linear(1536, 384)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        return self.fc2(0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2))))


class Wrapped(nn.Module):
    """Whatever it is, under the name `block`."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Module()
        self.block.norm1, self.block.norm2 = nn.LayerNorm(384), nn.LayerNorm(384)
        self.block.attn, self.block.mlp = Before(384, Attention()), Before(384, Mlp())

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.block.attn(normed(self.block.norm1, x))
        return x + self.block.mlp(normed(self.block.norm2, x))


def normed(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """By mean and variance, with timm's 1e-6."""
    centred = x - x.mean(dim=2, keepdim=True)
    return centred / (centred.square().mean(dim=2, keepdim=True) + 1e-6).sqrt() * norm.weight + norm.bias


class Reference(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 384))
        self.pos_embed = nn.Parameter(torch.zeros(1, 97, 384))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(1, 384, 16, 16)
        self.blocks = nn.Sequential(*(Wrapped() for _ in range(12)))
        self.fc_norm = nn.LayerNorm(384)

    def forward(self, image: Tensor) -> Tensor:
        """[B, 1, 192, 128] -> [B, D]"""
        tokens = [self.cls_token.expand(len(image), 1, -1)]
        kernel = self.patch_embed.proj.weight.reshape(384, 256)
        for row in range(12):
            for column in range(8):
                patch = image[:, 0, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16].reshape(-1, 1, 256)
                tokens.append(patch @ kernel.T + self.patch_embed.proj.bias)
        return self.blocks(torch.cat(tokens, dim=1) + self.pos_embed)[:, 0]


@pytest.fixture(scope="module")
def reference() -> Reference:
    """Every tensor is noise: at the start biases and the class token are nearly nothing, which would hide mix-ups."""
    generator = torch.Generator().manual_seed(0)
    model = Reference().eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(("norm" in name and name.endswith("weight")) + 0.06 * noise)
    return model


@pytest.fixture(scope="module")
def projection() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(384, 512)


@pytest.fixture(scope="module")
def safetensors_file(tmp_path_factory, reference) -> Path:
    path = tmp_path_factory.mktemp("hear-s") / "model.safetensors"
    save_file({f"vision.{name}": tensor for name, tensor in reference.state_dict().items()}, path)
    return path


def trainer_state(reference: Reference, projection: nn.Linear) -> dict[str, object]:
    """What the first implementation's trainer saves."""
    arguments = {"out": Path("checkpoints/hear_vit_s"), "canon_2d": True, "canon_causal": False, "lr": 3e-5}
    entries = {"optim": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 3e-5}]}, "scaler": {}}
    entries |= {"step": 3, "lr_gns_state": {"factor": 1.0}, "args": arguments}
    return {"student": reference.state_dict(), "proj": projection.state_dict(), **entries}


@torch.no_grad()
def test_outputs_are_those_of_an_independent_construction(reference, safetensors_file):
    image = 3 * torch.rand(2, 1, 192, 128, generator=torch.Generator().manual_seed(2)).square()
    expected = reference.double()(image.double())  # [2, 384]
    reference.float()
    model, _ = load_hear_s(safetensors_file)
    assert (expected[0] - expected[1]).abs().max() > 0.1
    torch.testing.assert_close(model(image).double(), expected, rtol=1e-4, atol=1e-4)


def test_every_tensor_of_the_file_is_used_once_or_ignored_for_a_reason(reference, safetensors_file):
    model, report = load_hear_s(safetensors_file.parent)
    names = {f"vision.{name}" for name in reference.state_dict()}
    assert report.used.keys() | report.ignored.keys() == names and report.used.keys().isdisjoint(report.ignored)
    assert sorted(report.used.values()) == sorted(model.state_dict())
    assert {name.split(".")[1] for name in report.ignored} == {"fc_norm", "blocks"}
    assert all("fc_norm" in name or "_fallback" in name for name in report.ignored) and all(report.ignored.values())


def test_a_file_without_projection_holds_as_many_numbers_as_the_published_one(reference):
    assert sum(tensor.numel() for tensor in reference.state_dict().values()) == 22_140_288  # the card of HeAR-s1.1


@torch.no_grad()
def test_a_checkpoint_of_the_first_trainer_loads_with_its_projection(tmp_path, reference, projection, safetensors_file):
    path = tmp_path / "ckpt_final.pt"
    torch.save(trainer_state(reference, projection), path)
    model, report = load_hear_s(path)
    image = torch.rand(1, 1, 192, 128)
    embedding = load_hear_s(safetensors_file)[0](image)
    assert torch.equal(model(image), embedding)
    torch.testing.assert_close(model.project(embedding), projection(embedding))
    assert {"optim", "scaler", "step", "lr_gns_state", "args", "student.fc_norm.bias"} <= report.ignored.keys()
    assert {"proj.weight", "proj.bias"} <= report.used.keys()


def test_what_the_file_cannot_do_is_refused(safetensors_file):
    model, _ = load_hear_s(safetensors_file)
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match="without the projection"):
        model.project(torch.zeros(1, 384))
    with pytest.raises(ValueError, match=r"must be \[B, 1, 192, 128\].*got \[1, 1, 240, 128\]"):
        model(torch.zeros(1, 1, 240, 128))


CANON = "blocks.3.block.attn.canon.conv.weight"
CHANGES = {
    "a tensor more": (lambda t: t | {"norm.weight": torch.ones(384)}, "unknown norm.weight"),
    "no Canon": (lambda t: {n: v for n, v in t.items() if n != CANON}, f"missing {CANON}"),
    "Canon along the sequence": (lambda t: t | {CANON: torch.ones(384, 1, 4)}, r"is torch.float32 \[384, 1, 4\]"),
    "integers": (lambda t: t | {CANON: torch.ones(384, 1, 4, 4, dtype=torch.int8)}, "is torch.int8"),
    "another net": (lambda t: {"conv.weight": torch.ones(3)}, "0 tensors are called patch_embed.proj.weight"),
    "two nets": (lambda t: t | {f"ema.{n}": v.clone() for n, v in t.items()}, "2 tensors are called"),
    "half a projection": (lambda t: t | {"proj.weight": torch.ones(512, 384)}, "missing proj.bias"),
    "a norm of another net": (lambda t: t | {"ema.fc_norm.bias": torch.ones(384)}, "unknown ema.fc_norm.bias"),
}


@pytest.mark.parametrize(("change", "expected"), CHANGES.values(), ids=CHANGES)
def test_anything_unexpected_is_refused(tmp_path, reference, change, expected):
    save_file(change(dict(reference.state_dict())), tmp_path / "model.safetensors")
    with pytest.raises(HearSError, match=expected):
        load_hear_s(tmp_path)


def test_options_that_leave_no_trace_in_the_tensors_are_refused(tmp_path, reference, projection, safetensors_file):
    state = trainer_state(reference, projection)
    state["args"]["canon_causal"] = True
    torch.save(state, tmp_path / "ckpt_final.pt")
    with pytest.raises(HearSError, match="canon_causal"):
        load_hear_s(tmp_path / "ckpt_final.pt")
    (tmp_path / "model.safetensors").symlink_to(safetensors_file)
    (tmp_path / "config.json").write_text(json.dumps({"canon_causal": True}))
    with pytest.raises(HearSError, match="canon_causal"):
        load_hear_s(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"canon_causal": False}))
    assert isinstance(load_hear_s(tmp_path)[0], HearS)


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.marker,))


def test_files_that_are_none_are_refused_and_nothing_in_them_is_run(tmp_path, reference, projection):
    state = trainer_state(reference, projection)
    for name, value in {
        "code.pt": {**state, "args": Payload(tmp_path / "ran")},
        "more.pt": {**state, "discriminator": {}},
        "less.pt": {"proj": {}},
    }.items():
        torch.save(value, tmp_path / name)
    (tmp_path / "torn.safetensors").write_bytes(b"\x80" * 100)
    messages = {
        "code.pt": "nothing in it was run",
        "more.pt": "no HeAR-s has: discriminator",
        "less.pt": "no entry student",
    }
    for name, message in {**messages, "torn.safetensors": "damaged", "none.pt": "no HeAR-s checkpoint at"}.items():
        with pytest.raises(HearSError, match=message):
            load_hear_s(tmp_path / name)
    assert not (tmp_path / "ran").exists()
