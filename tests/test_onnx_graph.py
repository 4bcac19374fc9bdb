"""The front end as plain matrix products is the front end: against NumPy's transform, a loop, and the original."""

import numpy as np
import pytest
import torch

from hear_distill.frontend import MelPcen
from hear_distill.onnx_graph import Encoder, PlainMelPcen, transform_matrix
from hear_distill.student import Student, StudentConfig


def test_the_matrix_is_the_transform_of_a_windowed_frame():
    frames = np.random.default_rng(0).standard_normal((5, 400))
    window = np.hanning(401)[:-1]  # periodic
    expected = np.fft.rfft(frames * window)
    found = frames @ transform_matrix(torch.hann_window(400, dtype=torch.float64)).double().numpy()
    np.testing.assert_allclose(found[:, :201], expected.real, atol=1e-5)
    np.testing.assert_allclose(found[:, 201:], -expected.imag, atol=1e-5)


@pytest.mark.parametrize("num_blocks", [1, 2, 5, 70])
def test_the_carry_of_the_smoother_is_that_of_the_recurrence(num_blocks):
    energy = np.random.default_rng(1).exponential(size=(2, num_blocks * 50, 128)) ** 8  # loud moments among quiet ones
    means, mean = [], energy[:, 0]
    for t in range(num_blocks * 50):
        if t % 50 == 0:
            means.append(mean)
        mean = 0.04 * energy[:, t] + 0.96 * mean
    plain = PlainMelPcen()
    blocks = torch.from_numpy(energy).float().unflatten(1, (num_blocks, 50))  # [2, K, 50, 128]
    within = plain.smoother @ blocks
    found = plain.carried(blocks[:, 0, :1], within[:, :-1, -1])
    assert found.shape == (2, num_blocks, 128)
    np.testing.assert_allclose(found, np.stack(means, axis=1), rtol=2e-5)


SIGNALS = {
    "noise": lambda n: torch.randn(2, n),
    "out of silence": lambda n: torch.randn(2, n) * torch.linspace(0, 1, n) ** 3,
    "into silence": lambda n: torch.cat([torch.randn(2, n // 2), torch.zeros(2, n - n // 2)], dim=1),
    "one loud sample": lambda n: torch.nn.functional.one_hot(torch.tensor([n // 3, n - 1]), n).float(),
    "silence": lambda n: torch.zeros(2, n),
    "hardly a sound": lambda n: 1e-7 * torch.randn(2, n),
    "an offset": lambda n: 5 + torch.randn(2, n),
}


@pytest.mark.parametrize("num_samples", [1, 700, 32_000, 32_001, 600_000])
@pytest.mark.parametrize("signal", SIGNALS)
def test_the_plain_front_end_is_the_front_end(signal, num_samples):
    torch.manual_seed(0)
    audio = SIGNALS[signal](num_samples)
    expected, found = MelPcen()(audio), PlainMelPcen()(audio)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)  # float32 near silence, of values up to 7
    assert (found - expected).abs().mean() < 3e-5


def test_the_front_end_has_nothing_in_the_state_of_a_model():
    assert PlainMelPcen().state_dict() == {} and not list(PlainMelPcen().parameters())


def test_the_encoder_is_the_trunk_in_float32_whatever_it_computes_in():
    torch.manual_seed(0)
    student = Student(StudentConfig(width=24, blocks=1, heads=2, mlp_width=48)).eval()
    image = 2 * torch.rand(3, 1, 240, 128)
    assert torch.equal(Encoder(student)(image), student(image))
    found = Encoder(student.bfloat16())(image)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, student.float()(image), atol=0.1, rtol=0)
