"""The module that the HEAR benchmark loads: attributes, shapes, times, and what the embeddings are means of."""

import numpy as np
import pytest
import torch
from test_embedders import save_student

from hear_distill import hear_module
from hear_distill.checkpoint import CheckpointError
from hear_distill.embedders import load_embedder
from hear_distill.frontend import MelPcen
from hear_distill.hear_module import get_scene_embeddings, get_timestamp_embeddings, load_model
from hear_distill.protocols import embed
from hear_distill.student import load_student


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_student(tmp_path_factory.mktemp("student"))


def sounds(num_sounds: int, num_samples: int) -> torch.Tensor:
    """Noise of a growing level, whole 16 bits, so that it can be handed on as such."""
    rng = np.random.default_rng(num_samples)
    levels = np.linspace(100, 3_000, num_samples) * (1 + np.arange(num_sounds)[:, None])
    return (
        torch.from_numpy((rng.normal(size=(num_sounds, num_samples)) * levels).clip(-32_768, 32_767).round()) / 32_768
    )


def test_the_model_has_what_the_benchmark_asks_for(path):
    model = load_model(str(path))
    assert isinstance(model, torch.nn.Module) and not model.training
    assert (model.sample_rate, model.scene_embedding_size, model.timestamp_embedding_size) == (16_000, 24, 24)
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*absent\.pt"):
        load_model(str(path.with_name("absent.pt")))


@pytest.mark.parametrize("num_samples", [1, 20_000, 32_000, 75_000])
def test_a_scene_is_the_evaluators_protocol_windows(path, monkeypatch, num_samples):
    monkeypatch.setattr(hear_module, "WINDOWS_PER_CALL", 2)  # parts of several sounds, and windows of several calls
    audio = sounds(3, num_samples)
    rows = enumerate((audio * 32_768).numpy().astype(np.int16))
    embedder = load_embedder(str(path))
    expected = embed([embedder], "windows", rows, 3)[embedder.name]

    found = get_scene_embeddings(audio, load_model(str(path)))

    assert found.shape == (3, 24) and found.dtype == torch.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("num_samples", "num_times"), [(1, 1), (20_000, 7), (32_000, 12), (50_000, 19)])
def test_a_timestamp_is_the_mean_of_the_eight_tokens_of_that_time(path, num_samples, num_times):
    audio = sounds(2, num_samples).float()
    tokens = load_student(path).tokens(MelPcen()(audio))  # [2, N, 24]
    expected = [[sum(sound[8 * t + mel] for mel in range(8)) / 8 for t in range(num_times)] for sound in tokens]

    found, times = get_timestamp_embeddings(audio, load_model(str(path)))

    assert found.shape == (2, num_times, 24) and times.shape == (2, num_times)
    torch.testing.assert_close(found, torch.stack([torch.stack(rows) for rows in expected]), atol=1e-5, rtol=1e-5)


def test_times_are_in_milliseconds_and_in_the_middle_of_the_sound_that_they_stand_for(path):
    _, times = get_timestamp_embeddings(sounds(2, 50_000), load_model(str(path)))
    # 16 of 24/25 * 100 rows a second; the first 16 are bilinear at frames 25 i / 24 + 1 / 48, of which each is centred
    # 12.5 ms after 10 ms times its number.
    middles = [np.mean([10 * (25 * i / 24 + 1 / 48) + 12.5 for i in range(16 * t, 16 * t + 16)]) for t in range(19)]
    np.testing.assert_allclose(times, [middles, middles], atol=1e-3)


def test_a_click_shows_most_in_the_embedding_of_its_time(path):
    quiet = 1e-3 * sounds(1, 64_000)
    model = load_model(str(path))
    quiet[0, [0, 1]] = torch.tensor([0.9, -0.9], dtype=quiet.dtype)  # the same range, so the same normalisation
    clicked = quiet.clone()
    clicked[0, 40_000] = 0.5
    plain, times = get_timestamp_embeddings(quiet, model)
    changed, _ = get_timestamp_embeddings(clicked, model)
    nearest = int((times[0] - 2_500).abs().argmin())
    assert int((changed - plain)[0].norm(dim=1).argmax()) == nearest


def test_sounds_longer_than_a_chunk_go_on_without_a_gap_in_time(path):
    audio = sounds(1, 31 * 16_000)
    model = load_model(str(path))
    found, times = get_timestamp_embeddings(audio, model)
    assert found.shape == (1, 186, 24)
    np.testing.assert_allclose(np.diff(times[0]), 1000 / 6, atol=0.01)
    first, _ = get_timestamp_embeddings(audio[:, :480_000], model)
    second, _ = get_timestamp_embeddings(audio[:, 480_000:], model)
    torch.testing.assert_close(found, torch.cat([first, second], dim=1), atol=1e-5, rtol=1e-5)


def test_embeddings_of_sounds_together_are_those_of_each_alone(path, monkeypatch):
    model, audio = load_model(str(path)), sounds(3, 40_000)
    together = get_scene_embeddings(audio, model), *get_timestamp_embeddings(audio, model)
    monkeypatch.setattr(hear_module, "WINDOWS_PER_CALL", 1)
    apart = get_scene_embeddings(audio, model), *get_timestamp_embeddings(audio, model)
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "audio", [torch.zeros(32_000), torch.zeros(0, 5), torch.zeros(2, 0), torch.zeros(1, 9, dtype=torch.int16)]
)
def test_anything_but_sounds_by_samples_is_refused(path, audio):
    model = load_model(str(path))
    for function in (get_scene_embeddings, get_timestamp_embeddings):
        with pytest.raises(ValueError, match=r"expected floats \[sounds, samples\]"):
            function(audio, model)
