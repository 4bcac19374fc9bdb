"""The mel-PCEN front end against published figures and against a literal float64 version.

The figures come from an unmodified copy of the published front end, computed twice (NumPy float64 and torch).
"""

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from hear_distill import audio
from hear_distill.frontend import CLIP_SAMPLES, MelPcen, frames_of, num_rows
from tests.reference import mel_pcen as by_the_book

FRONT_END = MelPcen()


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On a busy machine, threads that wait for one another cost more than this arithmetic."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def lcg_noise() -> np.ndarray:
    """[32000]: white noise that any language reproduces, s <- (1103515245 s + 12345) mod 2^31."""
    state, samples = 12345, []
    for _ in range(CLIP_SAMPLES):
        state = (1103515245 * state + 12345) % 2**31
        samples.append(state / 2**30 - 1)
    return np.array(samples)


TIME_S = np.arange(CLIP_SAMPLES) / 16_000
SINE = np.sin(2 * np.pi * 1000 * TIME_S)
LCG = lcg_noise()

# signal -> E max, E sum | out mean, std, max, row and band of the maximum, out[95, 40], out[191, 127]
PUBLISHED = {
    "zeros": (0 * TIME_S, 9478.61, 1.99707e6, 0.043819, 0.293056, 5.539239, (191, 5), 0, 2.239215),
    "constant": (0 * TIME_S + 0.7, 9478.61, 1.99707e6, 0.043819, 0.293056, 5.539239, (191, 5), 0, 2.239215),
    "sine": (SINE, 6291.48, 2.98854e6, 0.058574, 0.302290, 5.063037, (191, 42), 0, 1.409067),
    "sine first": (SINE * (TIME_S < 1), 6291.48, 1.48854e6, 0.039231, 0.262908, 5.063037, (95, 42), 3.955994, 0),
    "sine last": (SINE * (TIME_S >= 1), 6291.48, 1.49999e6, 0.065683, 0.375863, 6.773368, (95, 44), 3.955994, 1.393382),
    "impulse": (1.0 * (TIME_S == 1), 9478.61, 1.99756e6, 0.066273, 0.372717, 5.539084, (191, 5), 2.564693, 1.943688),
    "ramp": (np.linspace(-1, 1, 32_000), 9340.54, 663870, 0.045904, 0.281108, 5.531379, (191, 5), 0.002970, 2.239234),
    "noise": (LCG, 889.282, 1.96214e6, 0.600309, 0.359139, 3.136244, (5, 7), 1.480461, 0.594866),
    "louder noise, offset": (
        50 * LCG - 7,
        889.282,
        1.96214e6,
        0.600309,
        0.359139,
        3.136244,
        (5, 7),
        1.480461,
        0.594866,
    ),
    "short noise": (LCG[:16_000], 766.631, 981880, 0.302486, 0.401652, 3.136244, (5, 7), 0.075479, 0),
}


def clip(samples: np.ndarray) -> torch.Tensor:
    """[n] -> [1, n] float32"""
    return torch.from_numpy(samples).float()[None]


def image(samples: np.ndarray) -> np.ndarray:
    """[n] -> [R, 128] by the module."""
    return FRONT_END(clip(samples))[0, 0].numpy()


def bursts(num_samples: int, seed: int = 0) -> np.ndarray:
    """[num_samples] noise whose colour, offset and level change every 0.23 s, so that no two blocks are alike."""
    rng = np.random.default_rng(seed)
    pieces = []
    for _ in range(-(-num_samples // 3_680)):
        white = rng.normal(size=3_680)
        pieces.append(10 ** rng.uniform(-3, 0) * np.convolve(white, rng.normal(size=5), "same") + rng.normal(0, 0.05))
    return np.concatenate(pieces)[:num_samples]


@pytest.mark.parametrize("name", PUBLISHED)
def test_energies_and_images_match_the_published_figures(name):
    samples, energy_max, energy_sum, mean, std, maximum, argmax, middle, corner = PUBLISHED[name]
    energy = FRONT_END.mel_energy(frames_of(clip(samples)))[0].double().numpy()
    out = image(samples).astype(np.float64)

    assert energy.max() == pytest.approx(energy_max, rel=1e-4)
    assert energy.sum() == pytest.approx(energy_sum, rel=1e-4)
    assert out.shape == (192, 128)
    assert np.unravel_index(out.argmax(), out.shape) == argmax
    found = [out.mean(), out.std(), out.max(), out[95, 40], out[191, 127]]
    np.testing.assert_allclose(found, [mean, std, maximum, middle, corner], rtol=0, atol=1e-4)


def test_first_and_last_values_of_noise_match_the_published_figures():
    np.testing.assert_allclose(LCG[[0, 1, 2, -1]], [0.3103081, -0.39037135, 0.34992127, -0.10329933], atol=1e-8)
    energy = FRONT_END.mel_energy(frames_of(clip(LCG)))[0].numpy()
    np.testing.assert_allclose(energy[0, :4], [0, 4.8904051, 26.58939728, 0], rtol=1e-4)
    np.testing.assert_allclose(image(LCG)[0, :4], [0, 0.42345016, 0.56871307, 0], atol=1e-5)
    np.testing.assert_allclose(image(LCG)[191, 125:], [0.27969155, 0.58032225, 0.59486601], atol=1e-5)


def test_mel_matrix_matches_the_published_values_and_the_two_slopes():
    mel = FRONT_END.mel.double().numpy()
    assert np.count_nonzero(mel) == 394
    assert mel.sum() == pytest.approx(197.36998653566354, abs=1e-5)
    np.testing.assert_allclose(mel[[1, 1, 25, 25], [1, 2, 44, 45]], [0.155351, 0.844649, 0.57849, 0.42151], atol=1e-5)
    top = [0.08163, 0.32539, 0.568, 0.80947, 0.9502, 0.71099, 0.47289, 0.2359]
    np.testing.assert_allclose(mel[192:200, 127], top, atol=1e-5)
    np.testing.assert_allclose(mel, by_the_book.mel_matrix(), atol=1e-6)


def test_bands_between_two_frequency_bins_are_exactly_zero():
    silent = np.flatnonzero((image(bursts(32_000)) == 0).all(axis=0))
    assert silent.tolist() == [0, 3, 6, 13]


@pytest.mark.parametrize("num_samples", [1, 400, 20_001, 32_000, 32_001, 64_000, 116_800])
def test_any_length_matches_the_literal_version(num_samples):
    samples = bursts(num_samples, seed=num_samples)
    expected = by_the_book.mel_pcen(samples)
    assert expected.shape == (num_rows(num_samples), 128)
    np.testing.assert_allclose(image(samples), expected, rtol=0, atol=2e-4)


def test_the_published_loop_agrees_with_the_literal_version():
    samples = np.stack([bursts(32_000, seed) for seed in range(3)])
    found = by_the_book.step_loop_mel_pcen(torch.from_numpy(samples).float())[:, 0]
    expected = np.stack([by_the_book.mel_pcen(row) for row in samples])
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)


def test_pcen_in_blocks_equals_the_recurrence_across_every_block_boundary():
    levels = np.repeat([1.0, 0.003, 0.2, 0.01, 0.7, 0.001], 8_000)  # a new level in each block of 50 frames
    samples = levels * np.random.default_rng(1).normal(size=48_000)
    energy = FRONT_END.mel_energy(frames_of(clip(samples)))[0].double().numpy()
    expected = by_the_book.resize(by_the_book.pcen(energy))
    np.testing.assert_allclose(image(samples), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("num_blocks", [1, 4, 15])
def test_the_resize_is_bilinear_interpolation_at_every_length(num_blocks):
    frames = torch.rand(3, num_blocks, 50, 128)
    found = (FRONT_END.resize @ frames).flatten(1, 2)
    flat = frames.double().flatten(1, 2)[:, None]  # float64: interpolate loses the position of late rows in float32
    expected = functional.interpolate(flat, (48 * num_blocks, 128), mode="bilinear", align_corners=False)[:, 0].float()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("num_samples", "rows"),
    [(1, 192), (32_000, 192), (32_001, 240), (40_000, 240), (64_000, 384), (116_800, 720)],
)
def test_num_rows_is_48_for_each_half_second_begun_and_192_at_least(num_samples, rows):
    assert num_rows(num_samples) == rows
    assert FRONT_END(torch.rand(2, num_samples)).shape == (2, 1, rows, 128)


def test_a_clip_does_not_depend_on_its_batch_mates():
    quiet, loud = clip(0.01 * bursts(32_000, 2) + 0.3), 100 * torch.randn(5, 32_000)
    together = FRONT_END(torch.cat([loud[:2], quiet, loud[2:]]))
    torch.testing.assert_close(together[2:3], FRONT_END(quiet), rtol=0, atol=1e-5)


def test_a_nan_spoils_its_own_clip_only():
    batch = clip(bursts(32_000)).repeat(3, 1)
    batch[1, 17_000] = torch.nan
    spoiled = FRONT_END(batch).isnan().flatten(1)
    assert spoiled.all(dim=1).tolist() == [False, True, False]
    assert spoiled.any(dim=1).tolist() == [False, True, False]


def test_gain_and_offset_do_not_show():
    samples = bursts(32_000, 3)
    np.testing.assert_allclose(image(-0.5 + 20 * samples), image(samples), rtol=0, atol=2e-4)


def test_samples_in_the_int16_range_give_the_image_of_samples_below_one():
    pcm = np.random.default_rng(4).integers(-9_000, 25_000, 32_000)
    np.testing.assert_allclose(image(pcm / 32_768), image(pcm), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("num_samples", "padded"), [(5_000, 32_000), (33_000, 40_000)])
def test_padding_comes_before_the_normalisation(num_samples, padded):
    samples = 3 + bursts(num_samples, 5)  # so far from zero that the padding is the minimum
    explicit = np.concatenate([samples, np.zeros(padded - num_samples)])
    np.testing.assert_array_equal(image(samples), image(explicit))


@pytest.mark.parametrize("num_samples", [20_000, 32_000, 40_000])
def test_the_input_is_not_mutated(num_samples):
    batch = clip(bursts(num_samples))
    before = batch.clone()
    FRONT_END(batch)
    assert torch.equal(batch, before)


def test_autocast_of_the_caller_changes_nothing():
    batch = clip(bursts(32_000))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = FRONT_END(batch)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, FRONT_END(batch))


def matmul_precisions() -> tuple[str, str]:
    return torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision


@pytest.fixture
def short_mantissas():
    torch.set_float32_matmul_precision("medium")
    yield matmul_precisions()
    torch.set_float32_matmul_precision("highest")


def test_short_mantissas_are_off_inside_and_come_back_even_after_an_interrupt(monkeypatch, short_mantissas):
    def interrupted_rfft(frames):
        inside.append(matmul_precisions())
        raise KeyboardInterrupt

    inside: list[tuple[str, str]] = []
    monkeypatch.setattr(torch.fft, "rfft", interrupted_rfft)
    with pytest.raises(KeyboardInterrupt):
        FRONT_END(torch.rand(1, 32_000))
    assert inside == [("ieee", "ieee")]
    assert matmul_precisions() == short_mantissas == ("tf32", "bf16")


def test_there_is_nothing_to_train_or_to_save():
    assert list(MelPcen().parameters()) == []
    assert MelPcen().state_dict() == {}


def test_constants_are_made_once_and_move_with_the_module():
    module = MelPcen()
    before = {name: buffer.data_ptr() for name, buffer in module.named_buffers()}
    module(torch.rand(2, 64_000))
    assert {name: buffer.data_ptr() for name, buffer in module.named_buffers()} == before
    assert {buffer.device.type for buffer in module.to("meta").buffers()} == {"meta"}
    assert not [value for value in vars(module).values() if isinstance(value, torch.Tensor)]


class LargestStorage(TorchDispatchMode):
    """Records the bytes of the largest tensor that any operation returned."""

    num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = out if isinstance(out, (tuple, list)) else [out]
        self.num_bytes = max([self.num_bytes, *(t.untyped_storage().nbytes() for t in tensors)])
        return out


def test_no_intermediate_outgrows_a_minute_of_audio():
    minute = torch.rand(1, 960_000)
    with LargestStorage() as largest:
        out = FRONT_END(minute)
    assert out.shape == (1, 1, 5_760, 128)
    assert largest.num_bytes <= 4 * (960_000 + 240)  # 6,000 x 6,000 weights would be 144 MB


@pytest.mark.parametrize("shape", [(32_000,), (2, 1, 32_000), (0, 32_000), (2, 0)])
def test_anything_but_clips_by_samples_is_refused(shape):
    with pytest.raises(ValueError, match=r"expected \[clips, samples\] with at least one of each"):
        FRONT_END(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.int16, torch.float16, torch.bfloat16, torch.float64])
def test_other_types_than_float32_are_refused_with_the_way_to_convert(dtype):
    with pytest.raises(ValueError, match=r"(?s)expected torch.float32.*audio\.float\(\)"):
        FRONT_END(torch.zeros(1, 32_000, dtype=dtype))


def test_a_front_end_cast_to_another_type_is_refused():
    with pytest.raises(ValueError, match=r"cast to torch.bfloat16"):
        MelPcen().bfloat16()(torch.rand(1, 32_000))


def test_no_samples_have_no_rows():
    with pytest.raises(ValueError, match="found 0 samples"):
        num_rows(0)


def test_a_clip_of_the_audio_module_fills_the_shortest_image_without_padding():
    assert audio.CLIP_SAMPLES == CLIP_SAMPLES


def squeezed_by_the_book(samples: np.ndarray) -> np.ndarray:
    """[n] -> [192, 128] float64: every row of the resize from the two frames that it lies between."""
    x = np.concatenate([samples, np.zeros(max(0, 32_000 - len(samples)))])
    x = 2 * (x - x.min()) / (x.max() - x.min() + 1e-8) - 1
    num_frames = (len(x) + 159) // 160
    x = np.concatenate([x, np.zeros((num_frames - 1) * 160 + 400 - len(x))])
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    power = [np.abs(np.fft.rfft(x[160 * t : 160 * t + 400] * window)) ** 2 for t in range(num_frames)]
    frames = by_the_book.pcen(np.array(power) @ by_the_book.mel_matrix())
    rows = []
    for i in range(192):
        position = min(max((i + 0.5) * num_frames / 192 - 0.5, 0), num_frames - 1)
        below = int(position)
        above = min(below + 1, num_frames - 1)
        rows.append((1 - position + below) * frames[below] + (position - below) * frames[above])
    return np.array(rows)


@pytest.mark.parametrize("num_samples", [1, 20_001, 32_000, 32_001, 39_999, 40_000, 160_123])
def test_a_squeezed_recording_is_that_of_the_first_implementation_row_by_row(num_samples):
    samples = 0.3 + bursts(num_samples, seed=num_samples)  # an offset shows zeros that take part in the normalisation
    found = FRONT_END.squeezed(clip(samples))
    assert found.shape == (1, 1, 192, 128) and found.dtype == torch.float32
    np.testing.assert_allclose(found[0, 0], squeezed_by_the_book(samples), rtol=0, atol=3e-4)


@pytest.mark.parametrize("num_samples", [5_000, 32_000])
def test_of_two_seconds_or_less_the_squeezed_image_is_the_plain_one(num_samples):
    samples = bursts(num_samples, 6)
    np.testing.assert_allclose(FRONT_END.squeezed(clip(samples))[0, 0], image(samples), rtol=0, atol=1e-4)


def test_squeezing_refuses_what_the_plain_call_refuses():
    with pytest.raises(ValueError, match=r"expected \[clips, samples\]"):
        FRONT_END.squeezed(torch.zeros(32_000))
    with pytest.raises(ValueError, match=r"expected torch.float32"):
        FRONT_END.squeezed(torch.zeros(1, 32_000, dtype=torch.float64))
