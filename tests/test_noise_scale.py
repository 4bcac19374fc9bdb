"""The noise scale against gradients of known noise, literal sums in NumPy, and each clip's gradient of a small network.

D numbers in a gradient   T steps   K chunks of b clips   axis of 2: (plain, preconditioned)
"""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hear_distill import noise_scale
from hear_distill.noise_scale import ChunkGradients, NoiseScale, squared_norms

BETAS, EPS, WIDE_EPS = (0.7, 0.9), 0.2, 1.5  # far from the defaults, so that each of them is seen


def both(values: np.ndarray | float) -> Tensor:
    """The same for the plain and the preconditioned geometry: [...] -> [2, ...]"""
    return torch.tensor(np.stack([values, 3.0 * np.asarray(values)]))


def gradients_with_noise(noise_batch: float, num_steps: int, num_chunks: int, samples: int, seed: int) -> np.ndarray:
    """[T, K, D] float32 chunk gradients, each the mean of `samples` clips whose tr(S) / |G|^2 is `noise_batch`."""
    rng = np.random.default_rng(seed)
    size = 8192
    mean = rng.normal(0.0, 1.0, size) * np.linspace(0.2, 3.0, size)
    spread = rng.uniform(0.3, 2.0, size)  # a clip's noise differs from axis to axis, and is unlike the mean
    spread *= math.sqrt(noise_batch * np.sum(mean**2) / np.sum(spread**2))
    noise = rng.standard_normal((num_steps, num_chunks, size), dtype=np.float32)
    noise *= (spread / math.sqrt(samples)).astype(np.float32)
    return noise + mean.astype(np.float32)


def published_noise_batch(chunks: np.ndarray, batch: int) -> float:
    """The first implementation's estimate from two gradients of one batch, [T, 2, D], averaged over time."""
    ratios = []
    for first, second in chunks:
        noise = 0.5 * float(np.sum((first - second) ** 2))
        signal = float(np.sum(((first + second) / 2) ** 2))
        ratios.append(batch * noise / signal)
    return float(np.mean(ratios))


@pytest.mark.parametrize(
    ("true", "published"), [(16, 15.1), (128, 85.3), (512, 170.7), (2048, 227.6), (8192, 248.2)], ids=str
)
def test_two_gradients_of_128_clips_give_the_true_noise_batch_where_the_published_rule_saturates_below_256(
    true, published
):
    num_steps = 200 if true < 8192 else 1500
    chunks = gradients_with_noise(true, num_steps, 2, 128, seed=true)
    noise = NoiseScale(half_life_samples=1e9)
    for step in chunks:
        norms = np.sum(step.astype(np.float64) ** 2, axis=1)  # [K]
        mean = np.sum(step.astype(np.float64).mean(axis=0) ** 2)
        noise.update(both(norms), both(mean), chunk_samples=128)
    values = noise.values()

    assert values["noise_batch"] == pytest.approx(true, rel=0.1)
    assert abs(values["noise_batch"] - true) < 4 * values["noise_batch_error"]
    assert values["adam_noise_batch"] == pytest.approx(values["noise_batch"])
    # The other formula, on the same gradients: 1 / (1 / true + 1 / 256), its limit for T -> infinity.
    assert published_noise_batch(chunks, 128) == pytest.approx(published, rel=0.03)


def records(seed: int, num_steps: int) -> list[tuple[np.ndarray, float, int]]:
    """Chunk norms [K], norm of the mean and b of steps whose batch changes."""
    rng = np.random.default_rng(seed)
    found = []
    for step in range(num_steps):
        samples, num_chunks = (8, 2) if step < num_steps // 2 else (8, 5)
        found.append((rng.uniform(5.0, 9.0, num_chunks), float(rng.uniform(3.0, 5.0)), samples))
    return found


def by_the_book(steps: list[tuple[np.ndarray, float, int]], half_life: float) -> dict[str, float]:
    """Weights by age in clips, then weighted means and NumPy's covariance with reliability weights."""
    traces, signals, weights = [], [], []
    for index, (norms, mean, b) in enumerate(steps):
        batch = len(norms) * b
        traces.append((norms.mean() - mean) / (1 / b - 1 / batch))
        signals.append((batch * mean - b * norms.mean()) / (batch - b))
        younger = sum(len(later) * size for later, _, size in steps[index + 1 :])
        weights.append((1 - 0.5 ** (batch / half_life)) * 0.5 ** (younger / half_life))
    shares = np.array(weights) / sum(weights)
    trace, signal = float(shares @ traces), float(shares @ signals)
    errors = np.cov(traces, signals, aweights=shares) * np.sum(shares**2)
    ratio = trace / signal
    variance = ratio**2 * (
        errors[0, 0] / trace**2 + errors[1, 1] / signal**2 - 2 * errors[0, 1] / (trace * signal)
    )  # of a ratio of two correlated means
    names = ("noise_batch", "noise_batch_error", "noise_trace", "gradient_squared")
    return dict(zip(names, (ratio, math.sqrt(variance), trace, signal), strict=True))


def test_numerator_and_denominator_are_means_with_a_half_life_in_samples_through_a_change_of_the_batch():
    steps = records(0, 60)
    noise = NoiseScale(half_life_samples=300.0)
    for norms, mean, b in steps:
        noise.update(both(norms), both(mean), b)
    found = noise.values()
    expected = by_the_book(steps, 300.0)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-9)
    assert found["adam_noise_trace"] == pytest.approx(3 * expected["noise_trace"])
    assert found["adam_noise_batch_error"] == pytest.approx(expected["noise_batch_error"])


def test_the_standard_error_is_the_scatter_of_repeated_runs():
    rng = np.random.default_rng(7)
    mean, spread = rng.normal(0, 1, 60), rng.uniform(0.5, 4.0, 60)
    found = []
    for _ in range(80):
        noise = NoiseScale(half_life_samples=16 * 50.0)
        chunks = mean + spread / math.sqrt(4) * rng.standard_normal((60, 4, 60))  # [T, K, D], 4 clips each
        for step in chunks:
            noise.update(both(np.sum(step**2, axis=1)), both(np.sum(step.mean(axis=0) ** 2)), chunk_samples=4)
        values = noise.values()
        found.append((values["noise_batch"], values["noise_batch_error"]))
    estimates, errors = np.array(found).T
    assert errors.mean() == pytest.approx(estimates.std(ddof=1), rel=0.25)  # 80 runs know their scatter to 8 %
    assert np.sum(spread**2) / np.sum(mean**2) == pytest.approx(estimates.mean(), rel=0.05)


def test_no_ratio_is_shown_before_twenty_steps_nor_while_the_gradient_is_within_two_errors_of_zero():
    clear, lost = NoiseScale(1e6), NoiseScale(1e6)
    shown = []
    for step in range(40):
        wobble = 0.1 * (-1) ** step
        clear.update(both(np.array([5.0, 6.0])), both(4.0 + wobble), 8)
        # |G|^2 comes out at 5 - 16 wobble x 10 / 8: between -19.8 and 20.2, with a mean of 0.2 and an error of 3.2
        lost.update(both(np.array([8.0, 8.0])), both(4.1 + 100 * wobble), 8)
        shown.append(math.isfinite(clear.values()["noise_batch"]))
    assert shown == [False] * 19 + [True] * 21
    values = lost.values()
    assert values["gradient_squared"] == pytest.approx(0.2, rel=1e-3)
    assert {name for name, value in values.items() if math.isnan(value)} == {
        "noise_batch",
        "noise_batch_error",
        "adam_noise_batch",
        "adam_noise_batch_error",
    }


def test_nothing_is_known_before_the_first_step():
    assert math.isnan(NoiseScale(100.0).values()["noise_batch"])


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_step_that_is_not_finite_changes_nothing(bad):
    steps = records(1, 30)
    broken, whole = NoiseScale(500.0), NoiseScale(500.0)
    broken.update(both(np.array([bad, 2.0])), both(bad), 8)
    for norms, mean, b in steps:
        whole.update(both(norms), both(mean), b)
        broken.update(both(norms), both(mean), b)
        broken.update(both(np.array([1.0, bad])), both(1.0), 8)
    assert broken.values() == whole.values()
    assert math.isfinite(whole.values()["noise_batch"])


def test_one_geometry_is_measured_while_the_other_is_not_known():
    noise = NoiseScale(500.0)
    for norms, mean, b in records(2, 40):
        noise.update(torch.stack([torch.tensor(norms), torch.full((len(norms),), torch.nan)]), both(mean), b)
    values = noise.values()
    assert math.isfinite(values["noise_batch"]) and math.isnan(values["adam_noise_batch"])


def test_a_resumed_estimate_goes_on_to_the_bit():
    steps = records(3, 50)
    whole, head, tail = NoiseScale(200.0), NoiseScale(200.0), NoiseScale(200.0)
    for norms, mean, b in steps:
        whole.update(both(norms), both(mean), b)
    for norms, mean, b in steps[:31]:
        head.update(both(norms), both(mean), b)
    tail.load_state_dict(head.state_dict())
    for norms, mean, b in steps[31:]:
        tail.update(both(norms), both(mean), b)
    assert tail.values() == whole.values()


def test_one_chunk_and_no_half_life_are_refused():
    with pytest.raises(ValueError, match="two chunks or more in a step, got 1"):
        NoiseScale(10.0).update(torch.ones(2, 1), torch.ones(2), 8)
    with pytest.raises(ValueError, match="above 0 samples, got 0"):
        NoiseScale(0)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def adam(model: nn.Sequential, *, fused: bool = True) -> torch.optim.AdamW:
    """Two groups with different eps, as the trainer has two with different decay; the rate moves nothing here."""
    groups = [{"params": model[0].parameters(), "eps": EPS}, {"params": model[2].parameters(), "eps": WIDE_EPS}]
    return torch.optim.AdamW(groups, lr=0.0, betas=BETAS, fused=fused)


def clips(seed: int, num_clips: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(num_clips, 5, generator=generator) * torch.tensor([0.3, 1.0, 2.0, 0.1, 5.0])
    return inputs, torch.randn(num_clips, 3, generator=generator) + 2.0


def gradient_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> list[np.ndarray]:
    """float64 gradient of the mean loss, one array per parameter; leaves .grad alone."""
    loss = (model(inputs) - targets).square().mean()
    return [g.double().numpy() for g in torch.autograd.grad(loss, list(model.parameters()))]


def preconditioners(history: list[list[np.ndarray]]) -> list[np.ndarray]:
    """1 / (sqrt(v_hat) + eps) by Adam's recurrence, from the gradients of all steps so far."""
    found = []
    for index, eps in enumerate([EPS, EPS, WIDE_EPS, WIDE_EPS]):
        v = np.zeros_like(history[0][index])
        for gradients in history:
            v = BETAS[1] * v + (1 - BETAS[1]) * gradients[index] ** 2
        found.append(1 / (np.sqrt(v / (1 - BETAS[1] ** len(history))) + eps))
    return found


def squares(gradients: list[np.ndarray], scales: list[np.ndarray]) -> list[float]:
    """|g|^2 and |P g|^2, one number at a time."""
    plain = sum(float(x) ** 2 for g in gradients for x in g.ravel())
    scaled = sum(
        float(x * s) ** 2
        for g, scale in zip(gradients, scales, strict=True)
        for x, s in zip(g.ravel(), scale.ravel(), strict=True)
    )
    return [plain, scaled]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("part_elements", [2**22, 8])
def test_every_chunk_gives_the_norms_of_its_own_gradient_and_the_step_gets_their_mean(
    fused, part_elements, monkeypatch
):
    monkeypatch.setattr(noise_scale, "PART_ELEMENTS", part_elements)
    model = network()
    optimizer = adam(model, fused=fused)
    history = []
    for seed in range(3):
        inputs, targets = clips(seed, 6)
        history.append(gradient_of(model, inputs, targets))
        for p, g in zip(model.parameters(), history[-1], strict=True):
            p.grad = torch.tensor(g).float()
        optimizer.step()

    inputs, targets = clips(9, 12)
    chunks = ChunkGradients(optimizer)
    for first in (0, 4, 8):
        (model(inputs[first : first + 4]) - targets[first : first + 4]).square().mean().backward()
        chunks.add()
    squared = chunks.finish()

    scales = preconditioners(history)
    own = [gradient_of(model, inputs[i : i + 4], targets[i : i + 4]) for i in (0, 4, 8)]
    expected = np.array([squares(gradient, scales) for gradient in own]).T  # [2, K]
    np.testing.assert_allclose(squared.numpy(), expected, rtol=1e-5)
    mean = gradient_of(model, inputs, targets)
    np.testing.assert_allclose(squared_norms(optimizer).numpy(), squares(mean, scales), rtol=1e-5)
    for p, gradient in zip(model.parameters(), mean, strict=True):
        np.testing.assert_allclose(p.grad.numpy(), gradient, rtol=1e-4, atol=1e-6)


def test_before_the_first_step_of_adam_the_preconditioned_norm_is_unknown():
    model = network()
    optimizer = adam(model)
    model(clips(0, 2)[0]).sum().backward()
    plain, preconditioned = squared_norms(optimizer).tolist()
    assert plain > 0 and math.isnan(preconditioned)
    assert len(optimizer.state) == 0


def test_a_gradient_left_over_from_the_last_step_is_not_counted():
    model = network()
    optimizer = adam(model)
    inputs, targets = clips(4, 6)
    for p in model.parameters():
        p.grad = torch.full_like(p, 100.0)
    chunks = ChunkGradients(optimizer)
    (model(inputs) - targets).square().mean().backward()
    chunks.add()
    expected = sum(np.sum(g**2) for g in gradient_of(model, inputs, targets))
    assert chunks.finish()[0, 0].item() == pytest.approx(expected, rel=1e-5)


def test_chunks_that_use_different_parameters_are_refused_and_a_parameter_that_none_uses_is_left_out():
    model = network()
    chunks = ChunkGradients(adam(model))
    inputs = clips(5, 2)[0]
    for _ in range(2):
        model[0](inputs).sum().backward()
        chunks.add()
    assert chunks.finish().shape == (2, 2)
    assert model[0].weight.grad is not None and model[2].weight.grad is None

    chunks = ChunkGradients(adam(model))
    model[0](inputs).sum().backward()
    chunks.add()
    model(inputs).sum().backward()
    with pytest.raises(ValueError, match="chunk 2 gave a gradient to 4 parameters, chunk 1 to 2 others"):
        chunks.add()


def test_half_precision_gradients_are_squared_in_float32():
    weight = nn.Parameter(torch.zeros(4096, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([weight], lr=0.0)
    weight.grad = torch.full_like(weight, 0.3)
    value = float(torch.tensor(0.3, dtype=torch.bfloat16))
    assert squared_norms(optimizer)[0].item() == pytest.approx(4096 * value**2, rel=1e-5)


def test_the_noise_of_a_real_network_is_that_of_all_its_clips_one_by_one():
    model = network()
    optimizer = adam(model)
    inputs, targets = clips(11, 48)
    history = [gradient_of(model, *clips(12, 6))]
    for p, g in zip(model.parameters(), history[0], strict=True):
        p.grad = torch.tensor(g).float()
    optimizer.step()
    scales = preconditioners(history)
    rows = [gradient_of(model, inputs[i : i + 1], targets[i : i + 1]) for i in range(48)]
    plain = np.stack([np.concatenate([g.ravel() for g in row]) for row in rows])  # [48, D]
    scale = np.concatenate([s.ravel() for s in scales])
    expected = {}
    for name, found in {"noise_batch": plain, "adam_noise_batch": plain * scale}.items():
        mean = found.mean(axis=0)
        expected[name] = float(np.mean(np.sum((found - mean) ** 2, axis=1)) / np.sum(mean**2))

    noise, rng = NoiseScale(half_life_samples=1e6), np.random.default_rng(0)
    for _ in range(600):
        chunks = ChunkGradients(optimizer)
        for drawn in rng.integers(0, 48, (3, 4)):  # with replacement, so that clips are independent
            (model(inputs[drawn]) - targets[drawn]).square().mean().backward()
            chunks.add()
        squared = chunks.finish()
        noise.update(squared, squared_norms(optimizer), chunk_samples=4)
    found = noise.values()
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=0.1)
    assert expected["adam_noise_batch"] != pytest.approx(expected["noise_batch"], rel=0.3)


def test_measuring_never_waits_for_the_device():
    """Tensors of the meta device have no values: asking for one, as `.item()` or an `if` does, raises."""
    model = network().to("meta")
    optimizer = adam(model)
    for p in model.parameters():
        optimizer.state[p] = {"step": torch.zeros((), device="meta"), "exp_avg_sq": torch.zeros_like(p)}
    noise = NoiseScale(100.0, device="meta")
    chunks = ChunkGradients(optimizer)
    for _ in range(2):
        model(torch.zeros(4, 5, device="meta")).sum().backward()
        chunks.add()
    noise.update(chunks.finish(), squared_norms(optimizer), chunk_samples=4)
    with pytest.raises(RuntimeError, match="meta"):
        noise.values()
