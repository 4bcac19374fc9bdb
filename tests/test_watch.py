"""What goes wrong in steps is counted: exactly, on the device, through a resume."""

import pytest
import torch

from hear_distill.watch import StepWatch


def watched(losses, bad=(), num_clips=8) -> StepWatch:
    watch = StepWatch("cpu")
    for index, loss in enumerate(losses):
        watch.update(torch.tensor(float(loss)), torch.tensor(float(index in bad)), num_clips)
    return watch


def noisy(num_steps: int) -> list[float]:
    return (2 + 0.1 * torch.randn(num_steps, generator=torch.Generator().manual_seed(0))).tolist()


def test_skipped_steps_and_their_clips_are_counted_and_the_longest_row_is_told_once():
    watch = watched([1.0] * 12, bad={1, 3, 4, 5, 9})
    assert watch.counts() == {"skipped_steps": 5, "skipped_clips": 40, "loss_spikes": 0}
    assert [watch.take_longest(), watch.take_longest()] == [3, 0]


def test_a_row_that_reaches_over_a_log_point_is_not_cut_in_two():
    watch = watched([1.0, 1.0], bad={0, 1})
    assert watch.take_longest() == 2
    watch.update(torch.tensor(1.0), torch.tensor(1.0), 8)
    assert watch.take_longest() == 3


def test_a_loss_far_above_those_of_late_is_a_spike_and_noise_and_a_fall_are_none():
    assert watched(noisy(400)).counts()["loss_spikes"] == 0
    assert watched([*noisy(400), 4.0, 2.0, 3.5]).counts()["loss_spikes"] == 2
    assert watched([*noisy(400), 0.1]).counts()["loss_spikes"] == 0
    assert watched([10 / (1 + step) for step in range(400)]).counts()["loss_spikes"] == 0


def test_the_loss_of_a_skipped_step_is_no_spike_and_moves_no_mean():
    quiet, disturbed = (
        watched(noisy(400)),
        watched([*noisy(400)[:200], float("nan"), 1e9, *noisy(400)[200:]], bad={200, 201}),
    )
    assert disturbed.counts()["loss_spikes"] == 0
    assert float(disturbed.mean) == pytest.approx(float(quiet.mean)) and disturbed.variance.isfinite()


def test_a_resumed_watch_goes_on_to_the_bit():
    losses = [*noisy(90), 7.0, *noisy(30)]
    whole, first = watched(losses, bad={5, 80}), watched(losses[:70], bad={5})
    resumed = StepWatch("cpu")
    resumed.load_state_dict(first.state_dict())
    for index, loss in enumerate(losses[70:], start=70):
        resumed.update(torch.tensor(loss), torch.tensor(float(index == 80)), 8)
    assert whole.counts() == resumed.counts() and whole.counts()["loss_spikes"] == 1
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())
