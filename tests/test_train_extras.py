"""What a training run does on request only: numbered checkpoints, a quick probe, Weights & Biases.

Small runs of the real stage, as in test_train.py.
"""

import json
import signal
import sys

import pytest
import torch
from test_quick_probe import write_table
from test_train import assert_same_end, refusal_of, story_of

from hear_distill import checkpoint


def numbered(run) -> list[str]:
    return sorted(path.name for path in run.out.glob("step-*"))


def test_the_newest_few_checkpoints_stay_under_their_numbers_also_when_the_run_is_killed(training, unbroken):
    run = training(keep=2)
    assert [run.run(crash_at="checkpoint-numbered").code for _ in range(2)] == [-signal.SIGKILL] * 2
    assert numbered(run) == ["step-000006.pt"]  # the second time it dies as it is taken up
    assert run.run().code == 0
    assert_same_end(run, unbroken[0])
    last = checkpoint.load(run.out / "latest.pt")["step"]
    before = checkpoint.load(run.out / "previous.pt")["step"]
    assert numbered(run) == [f"step-{before:06d}.pt", f"step-{last:06d}.pt"]
    assert (run.out / numbered(run)[1]).samefile(run.out / "latest.pt")


def test_a_number_that_a_kill_prevented_is_given_when_the_run_is_taken_up(training):
    run = training(keep=5, schedule__total_samples=24)
    run.run(crash_at="checkpoint-renamed")
    assert numbered(run) == []
    assert run.run().code == 0
    assert numbered(run) == ["step-000006.pt"]


def test_no_checkpoint_is_numbered_unless_asked_for(unbroken):
    assert numbered(unbroken[0]) == []


def test_a_run_of_another_format_is_not_taken_up(training):
    run = training(schedule__total_samples=8)
    assert run.run().code == 0
    state = checkpoint.load(run.out / "latest.pt")
    del state["sha256"], state["format"]
    torch.save({**state, "sha256": checkpoint.digest(state)}, run.out / "latest.pt")
    refusal = refusal_of(run)
    assert "latest.pt is of format none, this version of the project reads 1" in refusal and "another --out" in refusal


def test_each_validation_comes_with_a_probe_of_the_table(training, tmp_path):
    run = training(schedule__total_samples=48, probe_table=write_table(tmp_path / "t.parquet"))
    ended = run.run()
    assert ended.code == 0 and "quick probe: 30 rows of" in ended.said and "probe_map 0." in ended.said
    found = [line for line in story_of(run.out) if "anchor_mse" in line]
    assert len(found) == 2 and all(0 < line["probe_map"] <= 1 for line in found)


def test_a_table_that_is_not_there_ends_the_run_before_its_first_step(training, tmp_path):
    run = training(probe_table=tmp_path / "nowhere.parquet")
    assert "nowhere.parquet is no file; name a table" in refusal_of(run)
    assert not (run.out / "latest.pt").exists()


def tell_a_stand_in(stage) -> None:
    """A client of Weights & Biases that writes down the steps that it is told of."""
    from test_journal import Client

    client = sys.modules["wandb"] = Client()
    client.__spec__ = object()
    finish = client.finish

    def finish_and_print() -> None:
        finish()
        print("told " + json.dumps([client.asked[0]["id"], [step for step, _ in client.told]]))

    client.finish = finish_and_print


def test_a_run_tells_wandb_of_every_line_under_its_own_id_and_goes_on_in_it(training):
    run = training(schedule__total_samples=24).but(wandb=True)
    ids = []
    for total in (24, 48):
        ended = run.but(schedule__total_samples=total).run(edit=tell_a_stand_in)
        assert ended.code == 0, ended.said
        told = json.loads(ended.said.split("told ")[1].splitlines()[0])
        ids.append(told[0])
        first = 0 if total == 24 else 6
        assert told[1] == [line["step"] for line in story_of(run.out) if line["step"] > first]
    assert ids[0] == ids[1] == checkpoint.load(run.out / "latest.pt")["run"]


def without_wandb(stage) -> None:
    import hear_distill.journal

    hear_distill.journal.importlib.util.find_spec = lambda name: None


def test_wandb_that_is_not_installed_ends_the_run_at_once(training):
    run = training(wandb=True)
    ended = run.run(edit=without_wandb)
    assert ended.code == 2 and ended.said.endswith("pip install wandb\n")
    assert not (run.out / "metrics.jsonl").exists()


@pytest.mark.parametrize("flags", [{"keep": -1}])
def test_flags_that_make_no_sense_are_refused(training, flags):
    assert "--keep must be 0 or more" in refusal_of(training(**flags))
