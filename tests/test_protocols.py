"""Protocols: which samples are cut, and that every embedder gets them, alone or in a batch, each in its own row."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_embedders import save_student

from hear_distill.embedders import Embedder, load_embedder
from hear_distill.files import UserError
from hear_distill.frontend import MelPcen
from hear_distill.protocols import PROTOCOLS, embed, peak_start
from hear_distill.student import load_student
from hear_distill.teacher import load_teacher

RATE = 16_000
LENGTHS = {0: 1, 1: 9_000, 2: 32_000, 3: 40_001, 4: 31 * RATE, 5: 65 * RATE, 6: 40_001, 8: 48_000}  # row 7 is missing


def noise(num_samples: int, seed: int) -> np.ndarray:
    """int16 of changing level and colour; the seed shows in both."""
    rng = np.random.default_rng(seed)
    white = rng.normal(0, 2_000, num_samples) * (1.2 + np.sin(np.arange(num_samples) / 7_000 + seed))
    return (white + 0.3 * seed * np.roll(white, 1) / 8).astype(np.int16)


RECORDINGS = {row: noise(length, row) for row, length in LENGTHS.items()}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory, teacher) -> dict[str, Embedder]:
    path = save_student(tmp_path_factory.mktemp("student"))
    specs = {"trunk": str(path), "projection": f"{path}:projection", "teacher": str(teacher), "mfcc": "mfcc"}
    return {name: replace(load_embedder(spec), name=name) for name, spec in specs.items()}


# ----------------------------------------------------------------------------------------------- which samples are cut


def starts_of(protocol: str, num_samples: int) -> tuple[list[int], list[int]]:
    """Where the pieces begin and how long they are, read from samples that count up from 1; 0 is padding."""
    pieces = PROTOCOLS[protocol].cut(np.arange(1, num_samples + 1))
    for piece in pieces:
        counted = piece[piece > 0]
        assert counted.tolist() == list(range(counted[0], counted[0] + len(counted)))
        assert not piece[len(counted) :].any()
    return [int(piece[0]) - 1 for piece in pieces], [len(piece) for piece in pieces]


@pytest.mark.parametrize(
    ("protocol", "num_samples", "starts", "lengths"),
    [
        ("event-centre", 1, [0], [32_000]),
        ("event-centre", 31_999, [0], [32_000]),
        ("event-centre", 32_001, [0], [32_000]),
        ("event-centre", 40_001, [4_000], [32_000]),
        ("event-centre", 31 * RATE, [232_000], [32_000]),
        ("event-peak", 20_000, [0], [32_000]),
        ("event-peak", 40_000, [8_000], [32_000]),  # numbers that count up are loudest at the end
        ("windows", 20_000, [0], [32_000]),
        ("windows", 32_001, [0, 1], [32_000] * 2),
        ("windows", 70_000, [0, 16_000, 32_000, 38_000], [32_000] * 4),
        ("windows", 31 * RATE, [16_000 * s for s in range(30)], [32_000] * 30),
        ("full", 7, [0], [7]),
        ("full", 480_000, [0], [480_000]),
        ("full", 480_001, [0, 480_000], [480_000, 1]),
        ("full", 31 * RATE, [0, 480_000], [480_000, 16_000]),
        ("full", 65 * RATE, [0, 480_000, 960_000], [480_000, 480_000, 80_000]),
        ("squeeze", 65 * RATE, [0], [65 * RATE]),
    ],
)
def test_pieces_begin_where_one_counts_that_they_do(protocol, num_samples, starts, lengths):
    assert starts_of(protocol, num_samples) == (starts, lengths)


def peak_by_the_book(samples: list[int]) -> int:
    best, best_power = 0, -1.0
    for start in range(0, max(len(samples) - 800, 0) + 1, 160):
        frame = samples[start : start + 800]
        power = sum(value * value for value in frame)
        if power > best_power:
            best, best_power = start, power
    middle = best + 400
    return max(0, min(middle - 16_000, len(samples) - 32_000))


@pytest.mark.parametrize(("num_samples", "seed"), [(300, 1), (33_000, 2), (90_123, 3), (90_123, 4)])
def test_the_peak_is_where_the_mean_square_of_50_ms_is_largest(num_samples, seed):
    samples = noise(num_samples, seed)
    assert peak_start(samples) == peak_by_the_book(samples.tolist())


def test_a_click_lies_in_the_middle_of_its_window_and_at_the_ends_the_window_stays_inside():
    for click, start in [(50_000, 34_000), (3_000, 0), (99_999, 68_000)]:
        samples = np.zeros(100_000, np.int16)
        samples[click] = -32_768
        assert abs(peak_start(samples) - start) <= 560  # half of 50 ms, and a hop
    assert peak_start(np.full(50_000, -32_768, np.int16)) == 0  # the first, if all are equal


def test_a_loud_stretch_wins_over_one_louder_sample():
    samples = np.zeros(200_000, np.int16)
    samples[40_000] = 20_000
    samples[150_000:150_800] = 2_000
    assert abs(peak_start(samples) - (150_400 - 16_000)) <= 160


# ---------------------------------------------------------------------------------------------------------- embeddings


def as_audio(samples: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(samples.astype(np.float32) / 32_768)[None]


@torch.inference_mode()
def one_by_one(protocol: str, samples: np.ndarray, embedder: Embedder) -> np.ndarray:
    """The embedding by a plain call for each piece, and a weighted sum by hand."""
    total, length = 0.0, 0
    for piece in PROTOCOLS[protocol].cut(samples):
        audio = as_audio(piece)
        image = embedder.frontend.squeezed(audio) if protocol == "squeeze" else embedder.frontend(audio)
        total = total + len(piece) * embedder.model(image)[0].double().numpy()
        length += len(piece)
    return total / length


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_embeddings_of_a_batch_are_those_of_one_piece_at_a_time_and_rows_without_sound_are_nan(loaded, protocol):
    shuffled = [(row, RECORDINGS[row]) for row in (5, 2, 0, 8, 6, 1, 4, 3)]

    found = embed(list(loaded.values()), protocol, iter(shuffled), 9, batch_size=3)

    assert found.keys() == loaded.keys()
    for name, embedder in loaded.items():
        assert found[name].shape == (9, embedder.width) and found[name].dtype == np.float64
        assert np.isnan(found[name][7]).all()
        for row, samples in RECORDINGS.items():
            expected = one_by_one(protocol, samples, embedder)
            np.testing.assert_allclose(found[name][row], expected, rtol=1e-3, atol=1e-4)


def test_the_batch_size_moves_embeddings_by_rounding_only(loaded):
    few = [(row, RECORDINGS[row]) for row in (0, 8, 3, 6)]
    results = [embed([loaded["teacher"]], "windows", few, 9, batch_size=size) for size in (1, 2, 500)]
    for other in results[1:]:
        np.testing.assert_allclose(other["teacher"], results[0]["teacher"], atol=1e-5)


def test_the_full_recording_goes_through_the_student_at_its_own_length(loaded, tmp_path):
    samples = noise(100_000, 3)
    student = load_student(save_student(tmp_path))
    completed = np.concatenate([samples, np.zeros(4_000, np.int16)])  # 13 half seconds
    with torch.inference_mode():
        image = MelPcen()(as_audio(completed))
        expected = student.tokens(image)[0].mean(dim=0)
    assert image.shape == (1, 1, 13 * 48, 128)
    found = embed([loaded["trunk"]], "full", [(0, samples)], 1)["trunk"][0]
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_of_exactly_two_seconds_every_protocol_gives_the_plain_embedding(loaded, teacher, protocol):
    samples = RECORDINGS[2]
    with torch.inference_mode():
        expected = load_teacher(teacher)(MelPcen()(as_audio(samples)))[0]
    found = embed([loaded["teacher"]], protocol, [(0, samples)], 1)["teacher"][0]
    np.testing.assert_allclose(found, expected, atol=2e-4)


class Counting(torch.nn.Module):
    """Notes how many images came at once, and how large they were."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """[B, 1, R, 128] -> [B, 2]"""
        self.seen.append(tuple(image.shape))
        return torch.stack([image.mean(dim=(1, 2, 3)), image.std(dim=(1, 2, 3))], dim=1)


def test_recordings_of_like_length_share_a_forward_and_none_holds_more_than_a_batch(loaded):
    model = Counting()
    embedder = replace(loaded["trunk"], name="counting", width=2, model=model)
    lengths = [33_000, 36_000, 40_000, 39_999, 60_000, 34_567, 400_000, 400_000]  # 240 rows for all but three
    embed([embedder], "full", [(row, noise(length, row)) for row, length in enumerate(lengths)], 8, batch_size=4)
    once = [(1, 1, 240, 128), (1, 1, 384, 128), (1, 1, 2_400, 128), (1, 1, 2_400, 128), (4, 1, 240, 128)]
    assert sorted(model.seen) == once  # 25 s is more sound than 4 windows of 2 s: one at a time

    model.seen.clear()
    embed([embedder], "windows", [(0, RECORDINGS[5])], 1, batch_size=4)
    assert [shape[0] for shape in model.seen] == [4] * 16


def test_a_recording_is_drawn_once_and_the_image_made_once_for_all_embedders_of_one_front_end(loaded, monkeypatch):
    calls = []
    plain = MelPcen.forward
    monkeypatch.setattr(MelPcen, "forward", lambda self, audio: calls.append(len(audio)) or plain(self, audio))
    embed([loaded[name] for name in ("trunk", "projection", "teacher")], "windows", iter([(0, RECORDINGS[8])]), 1)
    assert calls == [2]


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("recordings", "message"),
    [
        ([(0, np.zeros(0, np.int16))], r"row 0 is int16 of shape \(0,\), expected \[samples\] int16, at least one"),
        ([(1, np.zeros(9, np.float32))], r"row 1 is float32 of shape \(9,\)"),
        ([(1, np.zeros((2, 9), np.int16))], r"row 1 is int16 of shape \(2, 9\)"),
        ([(2, RECORDINGS[1])], "row 2 came twice, or is none of 2"),
        ([(-1, RECORDINGS[1])], "row -1 came twice, or is none of 2"),
        ([(0, RECORDINGS[1]), (0, RECORDINGS[1])], "row 0 came twice"),
    ],
)
def test_what_is_no_recording_is_refused_by_its_row(loaded, recordings, message):
    with pytest.raises(ValueError, match=message):
        embed([loaded["mfcc"]], "full", recordings, 2)


def test_an_unknown_protocol_a_name_twice_and_a_batch_of_none_are_refused(loaded):
    with pytest.raises(ValueError, match="unknown protocol 'event', expected one of event-peak, event-centre, windows"):
        embed([loaded["mfcc"]], "event", [], 1)
    with pytest.raises(ValueError, match="names of their own"):
        embed([loaded["mfcc"]] * 2, "full", [], 1)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        embed([loaded["mfcc"]], "full", [], 1, batch_size=0)


def test_a_model_that_gives_nan_for_sound_is_refused_so_that_nan_means_not_seen(loaded):
    broken = replace(loaded["mfcc"], model=lambda image: image / 0 * 0)
    with pytest.raises(UserError, match="embeddings of mfcc are not finite"):
        embed([broken], "full", [(0, RECORDINGS[1])], 2)


def test_no_recordings_give_rows_of_nan_only(loaded):
    found = embed([loaded["mfcc"]], "windows", [], 3)["mfcc"]
    assert found.shape == (3, loaded["mfcc"].width) and np.isnan(found).all()


def test_protocols_have_texts_of_their_own():
    assert len({protocol.text for protocol in PROTOCOLS.values()}) == len(PROTOCOLS)
