"""The critical rate on parabolas whose Hessian is known, and its promise to leave everything as it was."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hear_distill import critical_lr
from hear_distill.critical_lr import CriticalRate, next_direction, peak_rate, probe, under_ceiling

SIZE = 7


class Parabola:
    """L = (theta - centre)' H (theta - centre) / 2, theta cut into two parameters of different shape, in float64."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        turn = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))[0]
        self.hessian = turn @ np.diag(np.geomspace(0.05, 8.0, SIZE)) @ turn.T
        self.centre = rng.normal(0.5, 2.0, SIZE)
        start = rng.normal(-1.0, 1.0, SIZE)
        self.parameters = [nn.Parameter(torch.tensor(part)) for part in (start[:4].reshape(2, 2), start[4:])]

    def theta(self) -> np.ndarray:
        return np.concatenate([p.detach().numpy().ravel() for p in self.parameters])

    def value(self, theta: np.ndarray) -> float:
        return float((theta - self.centre) @ self.hessian @ (theta - self.centre)) / 2

    def gradient(self) -> np.ndarray:
        return self.hessian @ (self.theta() - self.centre)

    def loss(self) -> Tensor:
        return torch.tensor(self.value(self.theta()), dtype=torch.float64)

    def set_gradient(self, gradient: np.ndarray) -> None:
        self.parameters[0].grad = torch.tensor(gradient[:4].reshape(2, 2))
        self.parameters[1].grad = torch.tensor(gradient[4:])


def adamw(parabola: Parabola, *, fused: bool = True) -> torch.optim.AdamW:
    """One group with weight decay and one without, a few steps old."""
    first, second = parabola.parameters
    groups = [{"params": [first], "weight_decay": 0.3}, {"params": [second], "weight_decay": 0.0, "eps": 0.1}]
    optimizer = torch.optim.AdamW(groups, lr=0.02, betas=(0.8, 0.95), fused=fused)
    rng = np.random.default_rng(5)
    for _ in range(4):
        parabola.set_gradient(parabola.gradient() + rng.normal(0, 1, SIZE))
        optimizer.step()
    parabola.set_gradient(parabola.gradient() + rng.normal(0, 1, SIZE))
    return optimizer


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("is_first_step", [True, False])
def test_the_direction_is_that_of_the_next_step_of_the_real_optimiser(fused, is_first_step):
    parabola = Parabola()
    optimizer = adamw(parabola, fused=fused)
    if is_first_step:
        optimizer.state.clear()
    direction = np.concatenate([d.numpy().ravel() for d in next_direction(optimizer)])
    before = parabola.theta()
    optimizer.step()
    np.testing.assert_allclose(direction, (before - parabola.theta()) / 0.02, rtol=1e-6)


def test_slope_and_curvature_are_those_of_the_known_hessian_and_the_loss_is_back_at_the_critical_rate():
    parabola = Parabola()
    optimizer = adamw(parabola)
    direction = np.concatenate([d.numpy().ravel() for d in next_direction(optimizer)])
    slope, curvature = parabola.gradient() @ direction, direction @ parabola.hessian @ direction

    for distance in (1e-3, 0.1, 3.0):  # exact on a parabola, however far it looks
        found = probe(optimizer, parabola.loss, distance).tolist()
        assert found == pytest.approx([slope, curvature], rel=1e-5)

    theta, here = parabola.theta(), parabola.value(parabola.theta())
    critical = 2 * found[0] / found[1]
    assert parabola.value(theta - critical * direction) == pytest.approx(here, rel=1e-6)
    line = np.linspace(0.0, 1.5 * critical, 3001)
    lowest = line[np.argmin([parabola.value(theta - rate * direction) for rate in line])]
    assert lowest == pytest.approx(peak_rate(critical), rel=1e-3)


def test_a_probe_looks_at_three_places_on_the_way_of_the_optimiser():
    parabola = Parabola()
    optimizer = adamw(parabola)
    theta = parabola.theta()
    direction = np.concatenate([d.numpy().ravel() for d in next_direction(optimizer)])
    places = []

    def loss() -> Tensor:
        assert not torch.is_grad_enabled()
        places.append(parabola.theta())
        return parabola.loss()

    probe(optimizer, loss, 0.25)
    np.testing.assert_allclose(places, [theta, theta - 0.25 * direction, theta - 0.5 * direction], rtol=1e-12)


def network() -> tuple[nn.Module, torch.optim.AdamW, Tensor]:
    """A float32 network after three steps, with a gradient, as it stands in a training loop; and inputs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.05, fused=True)
    inputs = torch.randn(20, 6)
    for _ in range(3):
        (model(inputs) - 3).square().mean().backward()
        optimizer.step()
    optimizer.zero_grad()
    (model(inputs) - 3).square().mean().backward()
    return model, optimizer, inputs


def everything(model: nn.Module, optimizer: torch.optim.AdamW) -> list[Tensor]:
    state = [value for per_parameter in optimizer.state.values() for value in per_parameter.values()]
    gradients = [p.grad for p in model.parameters()]
    return [tensor.clone() for tensor in [*model.state_dict().values(), *gradients, *state]]


def test_a_probe_leaves_parameters_gradients_and_optimiser_to_the_bit():
    model, optimizer, _ = network()
    held_out = torch.randn(20, 6)
    before, groups = everything(model, optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"])
    for distance in (1e-7, 1e-3, 1e4):
        found = probe(optimizer, lambda: (model(held_out) - 3).square().mean(), distance)
        assert found.isfinite().all()
    after = everything(model, optimizer)
    assert len(after) == len(before) == 4 + 4 + 12
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert optimizer.state_dict()["param_groups"] == groups


def test_a_first_probe_leaves_the_optimiser_without_state():
    model, optimizer, inputs = network()
    optimizer.state.clear()
    probe(optimizer, lambda: model(inputs).square().mean(), 1e-3)
    assert len(optimizer.state) == 0


def test_a_loss_that_raises_half_way_leaves_the_parameters_to_the_bit():
    model, optimizer, inputs = network()
    before, calls = everything(model, optimizer), []

    def loss() -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return model(inputs).square().mean()

    with pytest.raises(KeyboardInterrupt):
        probe(optimizer, loss, 0.1)
    assert all(torch.equal(a, b) for a, b in zip(everything(model, optimizer), before, strict=True))


SCALE = 1e6  # an eps so large, without momentum, turns AdamW into SGD with gradients divided by it


def noisy_probes(num_probes: int, batch: int) -> tuple[CriticalRate, list[float], float]:
    """Probes along gradients of `batch` clips; the ratio of each; twice the best rate of noisy SGD, from the paper."""
    parabola = Parabola(seed=3)
    optimizer = torch.optim.AdamW(parabola.parameters, lr=0.1, betas=(0.0, 0.0), eps=SCALE, weight_decay=0.0)
    gradient, hessian = parabola.gradient(), parabola.hessian
    spread = np.linspace(5.0, 40.0, SIZE)  # of one clip's gradient, by axis
    noise_batch = np.sum(np.diag(hessian) * spread**2) / (gradient @ hessian @ gradient)
    best = (gradient @ gradient) / (gradient @ hessian @ gradient) / (1 + noise_batch / batch)
    rng, rate, ratios = np.random.default_rng(1), CriticalRate(distance=0.01 * SCALE), []
    for _ in range(num_probes):
        parabola.set_gradient(gradient + rng.normal(0.0, spread) / math.sqrt(batch))
        rate.probe(optimizer, parabola.loss)
        slope, curvature = rate.probes[-1]
        ratios.append(2 * slope / curvature / SCALE)
    return rate, ratios, 2 * best


def test_averaged_apart_slope_and_curvature_give_twice_the_best_rate_for_noisy_gradients(monkeypatch):
    monkeypatch.setattr(critical_lr, "NUM_KEPT", 4000)
    rate, ratios, expected = noisy_probes(4000, batch=4)
    critical, error = (value / SCALE for value in rate.value())
    assert critical == pytest.approx(expected, rel=0.04)
    assert abs(critical - expected) < 3 * error < 0.1 * expected
    assert np.mean(ratios) > 1.1 * expected  # what a mean of ratios would have said


def test_the_standard_error_is_the_scatter_of_repeated_measurements(monkeypatch):
    monkeypatch.setattr(critical_lr, "NUM_KEPT", 2400)
    rate = noisy_probes(2400, batch=8)[0]
    single = CriticalRate(1.0)
    found = []
    for first in range(0, 2400, 60):
        single.probes = rate.probes[first : first + 60]
        found.append(single.value())
    rates, errors = np.array(found).T
    assert np.mean(errors) == pytest.approx(np.std(rates, ddof=1), rel=0.3)  # 40 measurements: 11 %


def test_only_the_newest_sixteen_probes_count():
    rate = noisy_probes(30, batch=1000)[0]
    assert len(rate.probes) == 16


def with_probes(probes: list[list[float]]) -> CriticalRate:
    rate = CriticalRate(1.0)
    rate.load_state_dict({"distance": 1.0, "probes": probes})
    return rate


@pytest.mark.parametrize(
    "probes",
    [
        [],
        [[3.0, 2.0]] * 3,
        [[3.0, 2.0], [-3.0, 2.1], [3.0, 1.9], [-2.9, 2.0]],
        [[3.0, 2.0], [3.1, -2.1], [2.9, 1.9], [3.0, -1.5]],
        [[-3.0, 2.0], [-3.1, 2.1], [-2.9, 1.9], [-3.0, 2.0]],
        [[3.0, -2.0], [3.1, -2.1], [2.9, -1.9], [3.0, -2.0]],
    ],
    ids=["none", "three", "slope unclear", "bend unclear", "uphill", "bent downwards"],
)
def test_the_critical_rate_is_not_a_number_until_slope_and_bend_are_clear(probes):
    assert all(math.isnan(value) for value in with_probes(probes).value())


def test_four_clear_probes_are_enough():
    critical, error = with_probes([[3.0, 2.0], [3.1, 2.1], [2.9, 1.9], [3.0, 2.4]]).value()
    assert critical == pytest.approx(2 * 12.0 / 8.4)
    assert 0 < error < critical


@pytest.mark.parametrize(
    ("slope", "curvature", "expected"),
    [(3.0, 2.0, 1.5), (30.0, 2.0, 4.0), (0.1, 2.0, 0.25), (-1.0, 2.0, 0.25), (1.0, -2.0, 4.0), (1.0, 0.0, 4.0)],
)
def test_the_next_probe_looks_at_the_lowest_point_but_no_more_than_four_times_nearer_or_farther(
    slope, curvature, expected
):
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    parameter.grad = torch.ones_like(parameter)  # so that the first direction of Adam is 1
    optimizer = torch.optim.AdamW([parameter], eps=0.0)
    rate = CriticalRate(distance=1.0)
    rate.probe(optimizer, lambda: slope * parameter.sum() + curvature * parameter.square().sum() / 2)
    assert rate.probes == [pytest.approx([slope, curvature])]
    assert rate.distance == pytest.approx(expected)


def test_a_probe_that_falls_off_is_left_out_and_the_next_one_is_nearer():
    parameter = nn.Parameter(torch.ones(1))
    parameter.grad = torch.ones_like(parameter)
    rate = CriticalRate(distance=2.0)
    rate.probe(torch.optim.AdamW([parameter]), lambda: parameter.log().sum())  # of 1, -1, -3
    assert (rate.probes, rate.distance) == ([], 0.5)


def test_a_resumed_measurement_goes_on_to_the_bit():
    parabola = Parabola()
    optimizer = adamw(parabola)
    whole, head, tail = (CriticalRate(0.3) for _ in range(3))
    for measured in [whole] * 7 + [head] * 3:
        measured.probe(optimizer, parabola.loss)
    tail.load_state_dict(head.state_dict())
    for _ in range(4):
        tail.probe(optimizer, parabola.loss)
    assert tail.state_dict() == whole.state_dict()
    assert tail.value() == whole.value()
    with pytest.raises(ValueError, match="above 0, got 0"):
        CriticalRate(0)


def test_the_ceiling_is_eight_tenths_of_the_training_batchs_critical_rate_and_holds_once_that_is_known():
    assert under_ceiling(1.0, 2.0) == 1.0
    assert under_ceiling(1.0, 1.0) == 0.8
    assert under_ceiling(1.0, math.nan) == 1.0
    assert math.isnan(peak_rate(math.nan))


def test_the_training_batchs_critical_rate_is_above_the_held_out_one():
    """Its gradient is the direction itself, noise and all, so the slope is steeper along it: it measures stability."""
    parabola = Parabola(seed=4)
    optimizer = torch.optim.AdamW(parabola.parameters, lr=0.1, betas=(0.0, 0.0), eps=SCALE, weight_decay=0.0)
    rng, held_out, training = np.random.default_rng(2), CriticalRate(0.05 * SCALE), CriticalRate(0.05 * SCALE)
    clean = parabola.gradient()
    for _ in range(16):
        noise = rng.normal(0.0, 4.0, SIZE)
        parabola.set_gradient(clean + noise)
        held_out.probe(optimizer, parabola.loss)
        training.probe(optimizer, lambda noise=noise: parabola.loss() + float(noise @ parabola.theta()))
    assert training.value()[0] > 1.3 * held_out.value()[0]
