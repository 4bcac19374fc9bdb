"""The average of the weights against one made of every step's weights, in float64."""

import numpy as np
import pytest
import torch
from torch import nn

from hear_distill.weight_ema import WeightEma, ema_decay


def student(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    with torch.no_grad():
        model[1].running_mean.uniform_(-1, 1)
    return model


def test_the_average_is_the_sum_of_all_weights_each_halved_once_per_half_life():
    half_life, batches = 90.0, [10, 10, 40, 5, 60, 60, 100, 200, 200, 300, 7]
    ema = WeightEma(student(99), half_life)
    seen, history = 0, [student(99)]
    for index, batch in enumerate(batches):
        seen += batch
        history.append(student(index))
        ema.update(history[-1], seen, batch)

    keeps, seen = [], 0
    for batch in batches:
        seen += batch
        keeps.append(2.0 ** (-batch / min(half_life, seen / 10)))
    shares = [(1 - keep) * float(np.prod(keeps[i + 1 :])) for i, keep in enumerate(keeps)]
    shares = [float(np.prod(keeps)), *shares]
    assert sum(shares) == pytest.approx(1)
    for name, found in ema.model.named_parameters():
        expected = sum(
            share * dict(model.named_parameters())[name].detach().double().numpy()
            for share, model in zip(shares, history, strict=True)
        )
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_buffers_are_the_newest_ones():
    ema, newest = WeightEma(student(0), 1e9), student(1)
    ema.update(newest, 1000, 1)
    assert torch.equal(ema.model[1].running_mean, newest[1].running_mean)
    assert not torch.equal(ema.model[0].weight, newest[0].weight)


@pytest.mark.parametrize("batch", [1, 16, 100])
def test_after_a_run_the_first_half_of_it_has_a_share_below_one_percent(batch):
    kept = np.prod([ema_decay(seen, batch, 1e12) for seen in range(5000 + batch, 10_001, batch)])
    assert 0.005 < kept < 0.01


def test_a_half_life_below_a_tenth_of_the_run_is_kept_whatever_the_batch():
    assert ema_decay(10_000, 50, 200.0) ** 4 == pytest.approx(0.5)
    assert ema_decay(10_000, 200, 200.0) == pytest.approx(0.5)
    assert ema_decay(1000, 100, 200.0) == pytest.approx(0.5)  # a tenth of 1000 is less than 200


def test_the_average_has_the_form_of_a_student_learns_nothing_itself_and_leaves_the_student_alone():
    model = student(3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ema = WeightEma(model, 10.0)
    ema.update(student(4), 100, 10)
    assert ema.model.state_dict().keys() == before.keys()
    assert not any(p.requires_grad for p in ema.model.parameters()) and not ema.model.training
    assert all(p.requires_grad for p in model.parameters()) and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="above 0 samples, got 0"):
        WeightEma(model, 0)
