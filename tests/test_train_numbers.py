"""The numbers of the trainer: schedule, weight decay, the step that is not taken, what must fit under the cap."""

import math
from types import SimpleNamespace

import pytest
import torch
from lake_tools import make_lake
from torch import nn
from train_tools import TRAINER, load_stage, set_cap

from hear_distill.files import UserError
from hear_distill.student import Student, StudentConfig

RECORD_BYTES, END_BYTES = 66_560, 1_024  # of a shard, from datalake/README.md


@pytest.fixture(scope="session")
def stage():
    return load_stage(TRAINER)


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.2), (1, 0.4), (3, 0.8), (4, 1.0), (5, 1.0), (12, 1.0), (15, 1.0), (16, 0.8), (17, 0.6), (19, 0.2)],
)
def test_the_learning_rate_warms_up_holds_and_decays_as_this_table_says(stage, step, expected):
    config = stage.Config(lr=3e-4, steps=20, warmup_steps=5, decay_steps=5, save_every=20, log_every=20)
    assert math.isclose(config.lr_at(step), 3e-4 * expected)


def test_a_schedule_without_warm_up_and_decay_is_constant(stage):
    config = stage.Config(lr=7e-3, steps=3, warmup_steps=0, decay_steps=0)
    assert [config.lr_at(step) for step in range(3)] == [7e-3] * 3


SMALL = StudentConfig(width=24, heads=2, blocks=2, mlp_width=40, positions="learned")


def test_the_optimiser_decays_the_matrices_and_nothing_else(stage):
    student = Student(SMALL)
    decays = {}
    for group in stage.make_optimizer(student, stage.Config(weight_decay=0.03)).param_groups:
        decays |= {id(parameter): group["weight_decay"] for parameter in group["params"]}
    matrices = {id(module.weight) for module in student.modules() if isinstance(module, nn.Linear)}
    assert decays.keys() == {id(parameter) for parameter in student.parameters()}
    assert {which for which, decay in decays.items() if decay == 0.03} == matrices
    assert set(decays.values()) == {0.03, 0.0}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_changes_neither_weights_nor_moments(stage, bad):
    torch.manual_seed(0)
    layer = nn.Linear(5, 3)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.5, fused=True)

    def step(spoiled: float | None) -> float:
        for parameter in layer.parameters():
            parameter.grad = torch.randn_like(parameter)
        if spoiled is not None:
            layer.weight.grad[1, 2] = spoiled
        norm = nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        return float(stage.step_if_finite(optimizer, norm))

    def everything() -> list[torch.Tensor]:
        moments = [value for state in optimizer.state.values() for value in state.values()]
        return [tensor.detach().clone() for tensor in (*layer.parameters(), *moments)]

    assert [step(None), step(None)] == [0.0, 0.0]
    before = everything()
    assert step(bad) == 1.0
    assert all(map(torch.equal, everything(), before))
    assert step(None) == 0.0
    assert not any(map(torch.equal, everything(), before))


def test_a_cap_without_room_for_what_is_in_flight_is_refused_with_the_sum(stage, tmp_path):
    """2 workers x 10 clips + 3 open shards x 10 + 2 intervals x 6 steps x 4 clips + 2 validation sets x 9 = 116."""
    fields = {"lake": tmp_path, "open_shards": 3, "save_every": 6, "log_every": 2, "batch_size": 4, "device": "cpu"}
    config = stage.Config(**fields)
    make_lake(tmp_path, shard_clips=10, val_clips=9).close()
    for num_bytes, is_enough in ((116 * RECORD_BYTES + END_BYTES, True), (116 * RECORD_BYTES + END_BYTES - 1, False)):
        set_cap(tmp_path, num_bytes)
        if is_enough:
            stage.check(config)
        else:
            with pytest.raises(UserError) as refused:
                stage.check(config)
    # 116 clips of 65 KiB and the end of a file are 7.4 MiB
    expected = ("2 workers", "3 open shards", "6 x 4 clips", "2 validation sets of 9", "= 7.4 MiB", "--cap-gb")
    assert [text for text in expected if text not in str(refused.value)] == []


def test_trainer_and_streamer_agree_on_when_a_lake_is_full(stage, tmp_path, monkeypatch):
    """One byte less than a streamer reserves for ten clips: one end of a file for each of two parts."""
    lake, saves = make_lake(tmp_path, shard_clips=10), []
    set_cap(tmp_path, 10 * RECORD_BYTES + 2 * END_BYTES - 1)
    monkeypatch.setattr(stage, "save", lambda run: saves.append(run) or setattr(run, "saves_here", len(saves)))
    stage.free_room_if_blocked(
        SimpleNamespace(lake=lake, reader=SimpleNamespace(holds_trained_shards=lambda: True), saves_here=0)
    )
    lake.close()
    assert len(saves) == 2
