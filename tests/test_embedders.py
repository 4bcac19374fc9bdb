"""Embedders: what a spec names and gives, what its fingerprint tells apart, and the baselines by the book."""

import json
import pickle
from dataclasses import asdict, replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from hear_distill import checkpoint, embedders, frontend
from hear_distill.checkpoint import CheckpointError
from hear_distill.embedders import load_embedder, zero_crossing_rate
from hear_distill.files import UserError
from hear_distill.student import Student, StudentConfig, load_student
from hear_distill.teacher import TeacherError, load_teacher

TINY = StudentConfig(width=24, heads=2, blocks=1, mlp_width=32)


def save_student(folder: Path, seed: int = 0, config: StudentConfig = TINY) -> Path:
    torch.manual_seed(seed)
    return checkpoint.save(folder, {"student_config": asdict(config), "student": Student(config).state_dict()})


def sound(num_samples: int = 32_000, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """[batch, num_samples]: noise that grows and gets darker."""
    rng = np.random.default_rng(seed)
    samples = rng.normal(0, 0.1, (batch, num_samples)) * np.linspace(0.1, 1, num_samples)
    return torch.from_numpy(samples + np.roll(samples, 1, axis=1) * np.linspace(0, 0.9, num_samples)).float()


def embed(embedder: embedders.Embedder, audio: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return embedder.model(embedder.frontend(audio))


# --------------------------------------------------------------------------------------------------------------- specs


def test_a_checkpoint_gives_its_trunk_or_on_request_its_projection(tmp_path):
    path = save_student(tmp_path)
    student = load_student(path)
    with torch.inference_mode():
        trunk = student(frontend.MelPcen()(sound()))
        expected = {"": trunk, ":trunk": trunk, ":projection": student.project(trunk)}

    for suffix, embedding in expected.items():
        embedder = load_embedder(f"{path}{suffix}")
        assert embedder.name == f"{path}{suffix}"
        assert embedder.width == embedding.shape[1] and not embedder.is_stand_in
        assert torch.equal(embed(embedder, sound()), embedding)
    assert expected[""].shape[1] == 24 and expected[":projection"].shape[1] == 512


def test_a_colon_in_a_folders_name_is_no_output(tmp_path):
    path = save_student(tmp_path / "lr:3e-4")
    assert load_embedder(str(path)).width == 24
    assert load_embedder(f"{path}:projection").width == 512


def test_a_folder_of_hears_layout_gives_the_pooled_embedding_and_says_that_it_is_a_stand_in(teacher):
    embedder = load_embedder(str(teacher))

    assert (embedder.width, embedder.is_stand_in) == (512, True)
    expected = load_teacher(teacher)(frontend.MelPcen()(sound()))
    torch.testing.assert_close(embed(embedder, sound()), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("absent.pt", CheckpointError, "no checkpoint at .*absent.pt"),
        ("absent.pt:projection", CheckpointError, "no checkpoint at .*absent.pt;"),
        ("latest.pt:class-token", UserError, "outputs trunk and projection, found 'class-token'"),
        ("empty", TeacherError, r"config\.json cannot be read"),
        ("text.txt", CheckpointError, "text.txt is refused"),
    ],
)
def test_a_spec_that_names_nothing_of_its_kind_is_refused(tmp_path, spec, error, message):
    save_student(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("no weights")
    with pytest.raises(error, match=message):
        load_embedder(str(tmp_path / spec))


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path):
    state = {"student_config": asdict(replace(TINY, width=48)), "student": Student(TINY).state_dict()}
    path = checkpoint.save(tmp_path, state)
    with pytest.raises(CheckpointError, match=r"holds no student of this architecture .*size mismatch"):
        load_embedder(str(path))


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("write", [pickle.dump, torch.save], ids=["pickle", "torch.save"])
@pytest.mark.parametrize("name", ["model.pt", "model.bin"])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, write, name):
    with (tmp_path / name).open("wb") as f:
        write({"sha256": "0" * 64, "student": Bomb(tmp_path / "the code ran")}, f)
    with pytest.raises(CheckpointError, match=r"refused .* nothing in it was run"):
        load_embedder(f"{tmp_path / name}:projection")
    assert not (tmp_path / "the code ran").exists()


# -------------------------------------------------------------------------------------------------------- fingerprints


def test_the_fingerprint_of_the_same_weights_is_the_same_wherever_they_lie(tmp_path):
    first, second = save_student(tmp_path / "a"), save_student(tmp_path / "b")
    assert load_embedder(str(first)).fingerprint == load_embedder(str(second)).fingerprint
    assert str(tmp_path) not in load_embedder(str(first)).fingerprint


def test_whatever_changes_the_numbers_of_a_student_changes_its_fingerprint(tmp_path, monkeypatch):
    path = save_student(tmp_path / "a")
    others = [load_embedder(spec).fingerprint for spec in (str(path), f"{path}:projection")]
    others.append(load_embedder(str(save_student(tmp_path / "b", seed=1))).fingerprint)
    same_weights = replace(TINY, heads=3)  # of the same shapes
    others.append(load_embedder(str(save_student(tmp_path / "c", config=same_weights))).fingerprint)
    monkeypatch.setattr(frontend, "VERSION", frontend.VERSION + 1)
    others.append(load_embedder(str(path)).fingerprint)
    assert len(set(others)) == 5


def test_whatever_changes_the_numbers_of_a_teacher_changes_its_fingerprint(tmp_path, teacher, monkeypatch):
    plain = load_embedder(str(teacher)).fingerprint
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((teacher / name).read_bytes())
    assert load_embedder(str(tmp_path)).fingerprint == plain

    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 1e-3}))
    assert load_embedder(str(tmp_path)).fingerprint != plain
    monkeypatch.setattr(frontend, "VERSION", frontend.VERSION + 1)
    assert load_embedder(str(teacher)).fingerprint != plain


def test_baselines_have_fingerprints_of_their_own_with_the_version_and_the_kind_of_device(monkeypatch):
    found = [load_embedder(name).fingerprint for name in ("logmel", "mfcc")]
    found.append(load_embedder("mfcc", "meta").fingerprint)
    monkeypatch.setattr(embedders, "BASELINE_VERSION", embedders.BASELINE_VERSION + 1)
    found.append(load_embedder("mfcc").fingerprint)
    assert len(set(found)) == 4


# ----------------------------------------------------------------------------------------------------------- baselines


def hz_of(mel: float) -> float:
    return 700 * (10 ** (mel / 2595) - 1)


@cache
def mel_filters() -> np.ndarray:
    """[513, 64]: HTK triangles of height 1, linear in Hz, bin by bin."""
    edges = [hz_of(2595 * np.log10(1 + 8000 / 700) * i / 65) for i in range(66)]
    filters = np.zeros((513, 64))
    for k in range(513):
        hz = k * 16_000 / 1024
        for m in range(64):
            left, centre, right = edges[m : m + 3]
            filters[k, m] = max(0, min((hz - left) / (centre - left), (right - hz) / (right - centre)))
    return filters


def log_mel_by_the_book(samples: np.ndarray) -> np.ndarray:
    """[n] -> [T, 64]: a frame of 400 samples around each multiple of 160, alone."""
    window = np.array([0.5 - 0.5 * np.cos(2 * np.pi * i / 400) for i in range(400)])
    padded = np.concatenate([np.zeros(200), samples, np.zeros(200)])
    rows = []
    for t in range(len(samples) // 160 + 1):
        power = np.abs(np.fft.rfft(padded[160 * t : 160 * t + 400] * window, 1024)) ** 2
        rows.append(np.log(power @ mel_filters() + 1e-6))
    return np.array(rows)


def cosines(log_mel: np.ndarray) -> np.ndarray:
    """[T, 64] -> [T, 20]: the orthonormal DCT-II, summed term by term."""
    out = np.zeros((len(log_mel), 20))
    for c in range(20):
        for m in range(64):
            out[:, c] += log_mel[:, m] * np.cos(np.pi * c * (2 * m + 1) / 128)
        out[:, c] *= np.sqrt((1 if c == 0 else 2) / 64)
    return out


def crossings(samples: np.ndarray) -> np.ndarray:
    """[n] -> [T, 1], counted neighbour by neighbour."""
    padded = [0.0] * 200 + samples.tolist() + [0.0] * 200
    rates = []
    for t in range(len(samples) // 160 + 1):
        frame = padded[160 * t : 160 * t + 400]
        rates.append([sum((a < 0) != (b < 0) for a, b in pairwise(frame)) / 399])
    return np.array(rates)


BY_THE_BOOK = {
    "logmel": log_mel_by_the_book,
    "mfcc": lambda samples: np.concatenate([cosines(log_mel_by_the_book(samples)), crossings(samples)], axis=1),
}


@pytest.mark.parametrize("num_samples", [1, 159, 1_600, 12_345])
@pytest.mark.parametrize("name", BY_THE_BOOK)
def test_a_baseline_is_mean_and_deviation_over_time_of_its_recipe(name, num_samples):
    audio = sound(num_samples)
    frames = BY_THE_BOOK[name](audio[0].double().numpy())
    expected = np.concatenate([frames.mean(axis=0), np.sqrt(((frames - frames.mean(axis=0)) ** 2).mean(axis=0))])

    embedder = load_embedder(name)
    found = embed(embedder, audio)

    assert found.shape == (1, embedder.width)
    np.testing.assert_allclose(found[0], expected, rtol=1e-3, atol=2e-3)


def test_the_zero_crossing_rate_of_a_tone_is_two_per_period():
    audio = torch.sin(2 * torch.pi * 1000 * torch.arange(16_000) / 16_000 + 0.1)[None]
    rates = zero_crossing_rate(audio)[0, 0]
    assert rates.shape == (101,)
    torch.testing.assert_close(rates[2:-2], torch.full((97,), 1 / 8), atol=1 / 399, rtol=0)


@pytest.mark.parametrize("name", ["logmel", "mfcc"])
def test_a_baseline_of_a_recording_does_not_depend_on_its_batch_mates(name):
    embedder = load_embedder(name)
    batch = torch.cat([1e-4 * sound(seed=1), sound(seed=2), 5 * sound(seed=3)])
    alone = torch.cat([embed(embedder, row[None]) for row in batch])
    torch.testing.assert_close(embed(embedder, batch), alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["logmel", "mfcc"])
def test_a_squeezed_baseline_is_that_of_frames_resized_to_192(name):
    audio = sound(50_000)
    frames = BY_THE_BOOK[name](audio[0].double().numpy())
    places = np.clip((np.arange(192) + 0.5) * len(frames) / 192 - 0.5, 0, len(frames) - 1)
    squeezed = np.array([[np.interp(place, np.arange(len(frames)), column) for column in frames.T] for place in places])
    expected = np.concatenate([squeezed.mean(axis=0), squeezed.std(axis=0)])

    embedder = load_embedder(name)
    np.testing.assert_allclose(embedder.frontend.squeezed(audio)[0], expected, rtol=1e-3, atol=2e-3)
    short = torch.cat([sound(9_000), torch.zeros(1, 23_000)], dim=1)
    assert torch.equal(embedder.frontend.squeezed(sound(9_000)), embedder.frontend.squeezed(short))
