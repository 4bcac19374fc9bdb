"""The trainer's state: whatever the recipe, a run that is killed and resumed ends as if it had not been.

The lake is made by the real streamer, the student and the teacher are small, every run is the real stage.
"""

import json
import shutil
import signal
import time

import pytest
import torch
from test_train import assert_same_end, story_of, without_check

from hear_distill import checkpoint
from hear_distill.lake import Lake
from hear_distill.plots import draw_curves
from hear_distill.student import load_student

# Longer steps than TINY's, so that there are warm-up, looks at the noise, and the rest of the run.
RECIPES = {
    "as published": {
        **{"loss__negatives": "batch", "loss__patch": 0.0, "pad_share": 0.0},
        **{"controller": "ema-batch", "schedule__shape": "constant"},
    },
    "seesaw over a cosine": {"controller": "seesaw", "schedule__shape": "cosine", "schedule__total_samples": 72},
    "critical": {"warmup": "critical", "schedule__warmup_samples": 64},
    "three chunks": {"chunks": 3},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_of_any_recipe_killed_twice_ends_as_if_it_had_not_been(training, tmp_path, recipe):
    broken = training(**RECIPES[recipe])
    whole_folder = tmp_path / "whole"
    whole_folder.mkdir()
    whole = type(broken)(whole_folder / "run", whole_folder / "lake", broken.teacher, broken.flags)
    broken.lake.rename(whole.lake)
    shutil.copytree(whole.lake, broken.lake)
    assert whole.run().code == 0
    assert [broken.run(crash_at="checkpoint-recorded").code for _ in range(2)] == [-signal.SIGKILL] * 2
    assert broken.run().code == 0
    assert_same_end(broken, whole)


def break_at_step_7(stage) -> None:
    losses_of = stage.Learning.losses_of

    def fail(learning, spectrogram, targets):
        if learning.step == 7 and learning.chunks:
            raise RuntimeError("out of memory, say")
        return losses_of(learning, spectrogram, targets)

    stage.Learning.losses_of = fail


def test_a_run_that_breaks_in_the_middle_of_a_step_keeps_the_steps_before_it(training, unbroken):
    broken = training()
    ended = broken.run(edit=break_at_step_7)
    assert ended.code == 1 and "out of memory, say" in ended.said
    assert checkpoint.load(broken.out / "latest.pt")["step"] == 7
    assert broken.run().code == 0
    assert_same_end(broken, unbroken[0])


def forget_the_sample(stage) -> None:
    """A teacher whose own answers are far off, after the first look: what is learned can only come from that."""
    from hear_distill import objective

    embed, measure = objective.embed, stage.measure

    def measure_then_spoil(*arguments):
        state = measure(*arguments)
        objective.embed = lambda *a: tuple(x + 1e6 if x is not None else None for x in embed(*a))
        return state

    stage.measure = measure_then_spoil


def test_the_first_clips_are_trained_on_with_the_very_targets_that_were_measured(training):
    """All clips of the lake are in the sample here, so the teacher's later answers are seen in validation only."""
    first = training(target_clips=4000, schedule__total_samples=24, loss__patch=0.0, save_every=1000, log_every=4)
    assert first.run(edit=forget_the_sample).code == 0
    errors = [line["mse"] for line in story_of(first.out) if "mse" in line]
    assert len(errors) == 6 and max(errors) < 10


def test_what_waits_for_its_clips_in_a_checkpoint_shrinks_to_nothing_as_they_are_trained(training):
    run = training(target_clips=4000, schedule__total_samples=24, save_every=8)
    assert run.run().code == 0
    older, newer = (checkpoint.load(run.out / f"{name}.pt")["objective"] for name in ("previous", "latest"))
    assert len(older["known_ids"]) - len(newer["known_ids"]) == 8
    assert len(newer["known"]) == len(newer["known_ids"]) == len(newer["queue"]["rows"]) - 24


def test_what_users_load_is_the_average_of_the_weights_in_the_teachers_own_unit(training):
    run = training(schedule__total_samples=40)
    run.run()
    path = run.out / "latest.pt"
    state, student = checkpoint.load(path), load_student(path)
    assert not torch.equal(state["ema"]["patch.weight"], state["learner"]["student.patch.weight"])
    assert torch.equal(student.patch.weight, state["ema"]["patch.weight"])
    embedding = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    standardised = embedding @ state["ema"]["projection.weight"].T + state["ema"]["projection.bias"]
    statistics = state["objective"]["statistics"]
    expected = standardised * statistics["scale"] + statistics["mean"]
    torch.testing.assert_close(student.project(embedding), expected)
    assert expected.std() > 0.05


def test_a_run_says_how_it_goes_on_whole_and_on_padded_clips(training):
    run = training(schedule__total_samples=24)
    run.run()
    (last,) = [line for line in story_of(run.out) if "anchor_mse" in line]
    for name in ("anchor", "anchor_padded", "recent"):
        assert -5 < last[f"{name}_explained_variance"] < 1 and 0 <= last[f"{name}_cka"] <= 1
    assert last["anchor_padded_mse"] != last["anchor_mse"]


@pytest.mark.parametrize("flag", [{"pad_share": 0.5}, {"loss__negatives": "batch"}, {"seed": 3}], ids=str)
def test_what_a_run_remembers_is_not_changed_when_it_goes_on(training, flag):
    first = training(schedule__total_samples=8)
    assert first.run().code == 0
    ended = first.but(**flag).run()
    (name,) = (name.split("__")[-1] for name in flag)
    assert ended.code == 2 and f"with another {name}" in ended.said


def test_a_starved_run_that_is_stopped_in_the_middle_of_a_step_loses_no_clip(training):
    """With steps as long as the rest of the lake, data ends between two chunks; the source itself has not ended."""
    run = training(chunks=5, save_every=1000, log_every=1000, chunk_size=4)
    keep_source_open(run.lake)
    process = run.start(edit=without_check)
    end = time.monotonic() + 60
    while "waiting for data" not in run.said():
        assert process.exitcode is None and time.monotonic() < end, run.said()
        time.sleep(0.05)
    process.terminate()
    assert run.end_of(process).code == 0
    ledger = Lake.open(run.lake)
    step = checkpoint.load(run.out / "latest.pt")["step"]
    assert step > 0 and ledger.books().trained == 20 * step and ledger.books().balance() == 0
    ledger.db.execute("UPDATE tars SET state = 'done'")
    ledger.close()
    ended = run.run()
    assert ended.code == 0 and "drained" in ended.said
    assert len(set(run.trained())) == len(run.trained()) == 20 * step


def keep_source_open(lake) -> None:
    ledger = Lake.open(lake)
    ledger.db.execute("UPDATE tars SET state = 'open' WHERE position = 0")
    ledger.close()


def test_plot_draws_a_run_that_has_ended_as_often_as_asked(training):
    run = training(schedule__total_samples=24)
    run.run()
    assert not (run.out / "loss.png").exists()
    draw_curves(run.out)
    assert (run.out / "loss.png").read_bytes().startswith(b"\x89PNG")
    (run.out / "metrics.jsonl").write_text(json.dumps({"step": 1, "samples": 4, "loss": None}) + "\n")
    draw_curves(run.out)
