"""The numbers of the trainer: schedule, weight decay, the step that is not taken, what must fit under the cap."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from lake_tools import make_lake
from torch import nn
from train_tools import TRAINER, load_stage, set_cap

from hear_distill.feed import Feed
from hear_distill.files import UserError
from hear_distill.learning import make_optimizer, step_if_finite
from hear_distill.ranks import ALONE
from hear_distill.student import Student, StudentConfig

RECORD_BYTES, END_BYTES = 66_560, 1_024  # of a shard, from datalake/README.md


@pytest.fixture(scope="session")
def stage():
    return load_stage(TRAINER)


SMALL = StudentConfig(width=24, heads=2, blocks=2, mlp_width=40, positions="learned")


def test_the_optimiser_decays_the_matrices_and_nothing_else():
    student = Student(SMALL)
    decays = {}
    for group in make_optimizer(student, 0.1, 0.03).param_groups:
        decays |= {id(parameter): group["weight_decay"] for parameter in group["params"]}
    matrices = {id(module.weight) for module in student.modules() if isinstance(module, nn.Linear)}
    assert decays.keys() == {id(parameter) for parameter in student.parameters()}
    assert {which for which, decay in decays.items() if decay == 0.03} == matrices
    assert set(decays.values()) == {0.03, 0.0}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_changes_neither_weights_nor_moments(bad):
    torch.manual_seed(0)
    layer = nn.Linear(5, 3)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.5, fused=True)

    def step(spoiled: float | None) -> float:
        for parameter in layer.parameters():
            parameter.grad = torch.randn_like(parameter)
        if spoiled is not None:
            layer.weight.grad[1, 2] = spoiled
        norm = nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        return float(step_if_finite(optimizer, norm))

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
    """2 workers x 10 clips + 3 open shards x 10 + 2 intervals x 24 clips + 2 validation sets x 9 = 116."""
    fields = {"lake": tmp_path, "open_shards": 3, "save_every": 24, "log_every": 8, "chunk_size": 2, "device": "cpu"}
    config = stage.Config(**fields, target_clips=30 + 48)
    make_lake(tmp_path, shard_clips=10, val_clips=9).close()
    for num_bytes, is_enough in ((116 * RECORD_BYTES + END_BYTES, True), (116 * RECORD_BYTES + END_BYTES - 1, False)):
        set_cap(tmp_path, num_bytes)
        if is_enough:
            stage.check(config)
        else:
            with pytest.raises(UserError) as refused:
                stage.check(config)
    with pytest.raises(UserError, match="the rest of --target-clips"):
        stage.check(dataclasses.replace(config, target_clips=30 + 48 + 1))
    # 116 clips of 65 KiB and the end of a file are 7.4 MiB
    expected = (
        "2 workers",
        "3 open shards",
        "intervals of 24 clips",
        "2 validation sets of 9",
        "= 7.4 MiB",
        "--cap-gb",
    )
    assert [text for text in expected if text not in str(refused.value)] == []


def test_a_lake_is_full_for_the_trainer_when_it_is_for_a_streamer(tmp_path):
    """A streamer reserves ten clips, and one end of a file for each of two parts; a byte less is too little."""
    lake = make_lake(tmp_path, shard_clips=10)
    for missing in (0, 1):
        set_cap(tmp_path, 10 * RECORD_BYTES + 2 * END_BYTES - missing)
        feed = Feed.__new__(Feed)  # of which the test needs no more than this
        feed.held, feed.num_pending, feed.lake, feed.ranks = None, 0, lake, ALONE
        feed.reader = SimpleNamespace(
            next_batch=lambda: None, is_drained=lambda: False, holds_trained_shards=lambda: True
        )
        feed.lake_of_rank = ["this"]
        feed._look(stop=False)
        assert feed.must_save() == (missing == 1)
    lake.close()
