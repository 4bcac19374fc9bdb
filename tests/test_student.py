"""The student against transformers' ViT and literal loops over the grid, and its promises about place and length.

B clips   H x W patch grid   N tokens   C channels   D width
"""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

from hear_distill import checkpoint
from hear_distill.checkpoint import CheckpointError
from hear_distill.student import SIZES, Canon1d, Canon2d, Student, StudentConfig, load_student

SMALLEST = StudentConfig(width=24, blocks=2, heads=3, mlp_width=40, embedding_width=10)
NO_CANON = replace(SMALLEST, canon="none")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def spectrogram(batch: int = 2, rows: int = 192) -> Tensor:
    return torch.rand(batch, 1, rows, 128).square() * 3


@torch.no_grad()
def roughened(student: Student) -> Student:
    """At the start biases are 0, norms are 1 and branches are faint, which would hide mix-ups: add noise to all."""
    for parameter in student.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return student.eval()


def num_parameters(config: StudentConfig) -> dict[str, int]:
    with torch.device("meta"):
        student = Student(config)
    sizes = {name: parameter.numel() for name, parameter in student.named_parameters()}
    canon = sum(size for name, size in sizes.items() if "canon" in name)
    projection = sum(size for name, size in sizes.items() if name.startswith("projection."))
    return {"trunk": sum(sizes.values()) - canon - projection, "canon": canon, "projection": projection}


# ----------------------------------------------------------------------------------------------- the network as a whole


def as_vit(student: Student) -> ViTModel:
    """transformers' ViT with the weights of `student`; its class token stays unused."""
    config = student.config
    vit = ViTModel(
        ViTConfig(
            image_size=(192, 128),
            num_channels=1,
            hidden_size=config.width,
            num_hidden_layers=config.blocks,
            num_attention_heads=config.heads,
            intermediate_size=config.mlp_width,
            layer_norm_eps=1e-6,
            hidden_act="gelu",
        )
    ).eval()
    pairs = [(vit.layernorm, student.norm)]
    for layer, block in zip(vit.layers, student.blocks, strict=True):
        pairs += [(layer.layernorm_before, block.norm1), (layer.layernorm_after, block.norm2)]
        pairs += [(layer.attention.o_proj, block.out), (layer.mlp.fc1, block.fc1), (layer.mlp.fc2, block.fc2)]
        for i, name in enumerate(("q_proj", "k_proj", "v_proj")):
            rows = slice(i * config.width, (i + 1) * config.width)
            third = nn.Linear(config.width, config.width)
            third.load_state_dict({"weight": block.qkv.weight[rows], "bias": block.qkv.bias[rows]})
            pairs.append((getattr(layer.attention, name), third))
    for theirs, ours in pairs:
        theirs.load_state_dict(ours.state_dict())
    patch = vit.embeddings.patch_embeddings.projection
    patch.load_state_dict({"weight": student.patch.weight.view_as(patch.weight), "bias": student.patch.bias})
    return vit


@torch.no_grad()
def test_without_canon_the_tokens_are_those_of_a_vit_with_the_same_weights():
    student = roughened(Student(replace(SIZES["tiny"], blocks=3, canon="none", positions="learned")))
    vit = as_vit(student)
    x = spectrogram()

    expected = vit.embeddings.patch_embeddings(x) + student.positions.flatten(1, 2)
    for layer in vit.layers:
        expected = layer(expected)
    expected = vit.layernorm(expected)  # [B, N, D]

    torch.testing.assert_close(student.tokens(x), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(student(x), expected.sum(dim=1) / 96, atol=1e-5, rtol=0)


def test_canon_stands_after_the_norms_on_q_k_v_together_and_before_the_gelu():
    """One block, written out with the Canon layers as plain calls in the order of the paper."""
    student = roughened(Student(replace(SMALLEST, blocks=1)))
    block, x = student.blocks[0], torch.randn(2, 96, 24)

    q, k, v = block.canon_b(block.qkv(block.canon_a(block.norm1(x)))).split(24, dim=-1)
    heads = []
    for i in range(3):
        part = slice(8 * i, 8 * i + 8)
        attention = torch.softmax(q[..., part] @ k[..., part].mT / 8**0.5, dim=-1)  # [B, N, N]
        heads.append(attention @ v[..., part])
    after_attention = x + block.out(torch.cat(heads, dim=-1))
    hidden = block.canon_d(block.fc1(block.canon_c(block.norm2(after_attention))))
    expected = after_attention + block.fc2(hidden * (1 + torch.erf(hidden / 2**0.5)) / 2)

    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("canon", ["a", "bd", "abcd", "none", ""])
def test_only_the_named_places_have_canon_layers(canon):
    names = Student(replace(SMALLEST, canon=canon)).state_dict()
    places = {name.split(".")[2] for name in names if "canon" in name}
    assert places == {f"canon_{place}" for place in canon if canon != "none"}


def test_the_projection_is_an_affine_map_to_the_width_of_the_teacher():
    student = Student(SMALLEST)
    embedding = torch.randn(5, 24)
    expected = (
        embedding.numpy() @ student.projection.weight.detach().numpy().T + student.projection.bias.detach().numpy()
    )
    np.testing.assert_allclose(student.project(embedding).detach().numpy(), expected, atol=1e-6)


# -------------------------------------------------------------------------------------------------------- Canon layers


def canon_by_the_book(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """[H, W, C], [C, k, k] -> [H, W, C]: every patch plus the weighted sum of its neighbours, zeros outside."""
    height, width, channels = x.shape
    reach = weight.shape[-1] // 2
    y = x.copy()
    for row in range(height):
        for column in range(width):
            for c in range(channels):
                for i in range(-reach, reach + 1):
                    for j in range(-reach, reach + 1):
                        if 0 <= row + i < height and 0 <= column + j < width:
                            y[row, column, c] += weight[c, i + reach, j + reach] * x[row + i, column + j, c]
    return y


@pytest.mark.parametrize(("rows", "kernel"), [(12, 3), (3, 3), (5, 5)])
def test_canon2d_is_the_literal_sum_over_the_patch_grid(rows, kernel):
    layer, x = Canon2d(4, kernel).double(), torch.randn(2, rows * 8, 4, dtype=torch.float64)
    weight = layer.conv.weight.detach()[:, 0].numpy()
    expected = np.stack([canon_by_the_book(clip.reshape(rows, 8, 4), weight).reshape(-1, 4) for clip in x.numpy()])
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, atol=1e-12)


def test_canon1d_is_the_literal_sum_over_the_token_sequence():
    layer, x = Canon1d(4, 3).double(), torch.randn(1, 24, 4, dtype=torch.float64)
    as_column = np.zeros((4, 3, 3))
    as_column[:, :, 1] = layer.conv.weight.detach()[:, 0].numpy()
    expected = canon_by_the_book(x.numpy().reshape(24, 1, 4), as_column).reshape(1, 24, 4)
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, atol=1e-12)


@pytest.mark.parametrize(("dims", "reached"), [(2, [2, 3, 4, 10, 11, 12, 18, 19, 20]), (1, [10, 11, 12])])
def test_a_patch_reaches_its_neighbours_on_the_grid_or_along_the_sequence(dims, reached):
    x = torch.zeros(1, 96, 24)
    x[0, 11] = 1  # row 1, column 3
    y = Student(replace(SMALLEST, canon_dims=dims)).blocks[0].canon_a(x)
    assert y[0].any(dim=1).nonzero().flatten().tolist() == reached


def test_canon2d_copies_no_tokens():
    layer, seen = Canon2d(16, 3), []
    layer.conv.register_forward_hook(lambda _, inputs, output: seen.extend([inputs[0], output]))
    x = torch.randn(2, 96, 16)
    layer(x)
    into, out_of = seen
    assert into.data_ptr() == x.data_ptr()
    assert into.shape == (2, 16, 12, 8)
    assert into.is_contiguous(memory_format=torch.channels_last)
    assert out_of.is_contiguous(memory_format=torch.channels_last)  # so the way back to [B, N, C] is a view, too


@pytest.mark.parametrize(
    ("layer", "bound"), [(Canon2d(400, 3), 1 / 3), (Canon2d(400, 5), 1 / 5), (Canon1d(900, 3), 3**-0.5)]
)
def test_canon_kernels_start_uniform_with_variance_one_third_in_all(layer, bound):
    weight = layer.conv.weight
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)
    assert weight[0].numel() * weight.var().item() == pytest.approx(1 / 3, rel=0.06)
    assert layer.conv.bias is None


def test_inside_a_student_canon_kernels_keep_their_own_start_and_linear_layers_that_of_a_vit():
    student = Student(replace(SIZES["small"], blocks=1))
    for name, weight in student.blocks.named_parameters():
        if "canon" in name:
            assert weight.std().item() == pytest.approx(3**-1.5, rel=0.03), name
        elif weight.ndim == 2:
            assert weight.std().item() == pytest.approx(0.02, rel=0.03), name
        elif "norm" not in name:
            assert not weight.any(), name


# ----------------------------------------------------------------------------------------------------- place and length


@torch.no_grad()
def tokens_after_swapping_patches(config: StudentConfig) -> tuple[Tensor, Tensor]:
    """Tokens of shuffled patches, and the shuffled tokens of the patches: equal if the student cannot see places."""
    student = roughened(Student(config))
    x = torch.randn(2, 96, config.width)
    order = torch.randperm(96)
    return student.blocks(x[:, order]), student.blocks(x)[:, order]


def test_without_canon_and_positions_the_blocks_cannot_see_where_a_patch_stands():
    torch.testing.assert_close(*tokens_after_swapping_patches(NO_CANON))


@pytest.mark.parametrize("place", "abcd")
@pytest.mark.parametrize("dims", [1, 2])
def test_any_single_canon_layer_lets_the_blocks_see_where_a_patch_stands(place, dims):
    found, expected = tokens_after_swapping_patches(replace(SMALLEST, canon=place, canon_dims=dims))
    assert (found - expected).abs().max() > 0.01


@pytest.mark.parametrize("config", [SMALLEST, NO_CANON, replace(SMALLEST, canon_dims=1)])
def test_no_position_encoding_leaves_no_trace_in_the_checkpoint(config):
    assert not [name for name in Student(config).state_dict() if "pos" in name]


@pytest.mark.parametrize("rows", [16, 192, 240])
@pytest.mark.parametrize("config", [SMALLEST, replace(SMALLEST, positions="learned")], ids=["none", "learned"])
def test_any_number_of_patch_rows_gives_eight_tokens_each(config, rows):
    student = Student(config).eval()
    x = spectrogram(2, rows)
    assert student.tokens(x).shape == (2, 8 * rows // 16, 24)
    assert student(x).shape == (2, 24)


def test_learned_positions_are_stretched_along_time_only():
    student = Student(replace(NO_CANON, positions="learned"))
    learned = student.positions.detach()[0].double().numpy()  # [12, 8, D]
    found = student.positions_for(20).detach()[0].numpy()
    for row in range(20):
        place = min(max((row + 0.5) * 12 / 20 - 0.5, 0), 11)
        below = int(place)
        above = min(below + 1, 11)
        expected = learned[below] + (place - below) * (learned[above] - learned[below])
        np.testing.assert_allclose(found[row], expected, atol=1e-6)
    assert torch.equal(student.positions_for(12), student.positions)


@pytest.mark.parametrize("shape", [(2, 192, 128), (2, 2, 192, 128), (2, 1, 200, 128), (2, 1, 192, 64), (2, 1, 0, 128)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"must be \[B, 1, a positive multiple of 16, 128\], got \[2"):
        Student(SMALLEST)(torch.zeros(shape))


@pytest.mark.parametrize("config", [SMALLEST, replace(SMALLEST, canon_dims=1, positions="learned")])
def test_a_gradient_reaches_every_parameter(config):
    student = Student(config)
    student.project(student(spectrogram())).square().sum().backward()
    assert not [name for name, parameter in student.named_parameters() if not parameter.grad.any()]


# ---------------------------------------------------------------------------------------------- configuration and files


def test_the_small_student_has_the_parameters_counted_by_hand():
    assert num_parameters(SIZES["small"]) == {"trunk": 21_393_024, "canon": 373_248, "projection": 197_120}


@pytest.mark.parametrize("name", ["deep-thin", "shallow-wide"])
def test_the_other_shapes_are_as_large_as_small_and_have_heads_of_64(name):
    small, other = num_parameters(SIZES["small"]), num_parameters(SIZES[name])
    assert SIZES[name].width == 64 * SIZES[name].heads
    assert other["trunk"] == pytest.approx(small["trunk"], rel=0.01)
    assert sum(other.values()) == pytest.approx(sum(small.values()), rel=0.01)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 100}, "width must be a multiple of heads, got width 100 and heads 6"),
        ({"blocks": 0}, "blocks must be at least 1, got 0"),
        ({"canon_kernel": 4}, "canon_kernel must be odd"),
        ({"canon_kernel": -1}, "canon_kernel must be at least 1"),
        ({"canon": "abe"}, "canon must be some of the letters abcd"),
        ({"canon": "ba"}, "in this order"),
        ({"canon": "aa"}, "got 'aa'"),
        ({"canon_dims": 3}, "canon_dims must be 1 or 2, got 3"),
        ({"positions": "rope"}, "positions must be none or learned, got 'rope'"),
    ],
)
def test_impossible_configurations_are_refused_in_one_line(fields, message):
    with pytest.raises(ValueError, match=message) as e:
        StudentConfig(**fields)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("config", [SMALLEST, replace(SMALLEST, canon="b", canon_kernel=5, positions="learned")])
def test_a_student_comes_back_from_its_checkpoint(tmp_path, config):
    student = Student(config)
    path = checkpoint.save(tmp_path, {"student_config": asdict(config), "student": student.state_dict(), "step": 3})
    loaded = load_student(path)
    assert loaded.config == config
    assert not loaded.training
    x = spectrogram()
    assert torch.equal(loaded.project(loaded(x)), student.eval().project(student(x)))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"student": {}}, "KeyError: 'student_config'"),
        ({"student_config": asdict(SMALLEST)}, "KeyError: 'student'"),
        ({"student_config": {"depth": 12}, "student": {}}, "unexpected keyword argument 'depth'"),
        (
            {"student_config": asdict(replace(SMALLEST, width=48)), "student": Student(SMALLEST).state_dict()},
            "size mismatch",
        ),
        ({"student_config": asdict(NO_CANON), "student": Student(SMALLEST).state_dict()}, "Unexpected key.*canon_a"),
    ],
    ids=["no configuration", "no weights", "an unknown field", "another width", "canon layers too many"],
)
def test_a_checkpoint_of_another_architecture_is_refused_in_one_line(tmp_path, state, message):
    path = checkpoint.save(tmp_path, state)
    with pytest.raises(CheckpointError, match=f"latest.pt holds no student of this architecture .*{message}") as e:
        load_student(path)
    assert "\n" not in str(e.value)
