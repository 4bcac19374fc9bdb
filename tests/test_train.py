"""The trainer: every clip once, whatever kills it; what it leaves behind; and what it refuses.

The lake is made by the real streamer, the student and the teacher are small, every run is the real stage.
"""

import fcntl
import functools
import hashlib
import json
import math
import random
import signal
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lake_tools import stream
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from train_tools import SMALL_SHARDS, Training, end_runs, set_cap, sounds_in

from hear_distill import checkpoint
from hear_distill.files import GIB
from hear_distill.lake import Lake
from hear_distill.runlog import git_revision
from hear_distill.student import Student, StudentConfig
from hear_distill.teacher import save_stand_in

RECORD_BYTES, END_BYTES = 66_560, 1_024  # of a shard, from datalake/README.md
NOT_THE_STORY = {"time", "clips_per_s", "waited_s"}  # of a metrics line: they tell of the machine


@pytest.fixture(autouse=True)
def nothing_goes_on_after_the_test():
    yield
    end_runs()


def story_of(run: Path) -> list[dict]:
    """metrics.jsonl, less what depends on the machine."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in NOT_THE_STORY} for line in lines]


def assert_in_order(lake: Path, num_trained: int) -> None:
    """The books balance and say what was trained; ledger and folders agree."""
    ledger = Lake.open(lake)
    books, found = ledger.books(), ledger.disagreements()
    ledger.close()
    assert (books.balance(), books.trained, found) == (0, num_trained, [])


def assert_same_end(broken: Training, whole: Training) -> None:
    """Bit for bit the same state, the same metrics, the same sounds in the same order, books in order."""
    a, b = (checkpoint.load(training.out / "latest.pt") for training in (broken, whole))
    assert a.keys() == b.keys() >= {"step", "student", "learner", "ema", "optimizer", "objective", "pace", "watch"}
    differing = [name for name in b if checkpoint.digest(a[name]) != checkpoint.digest(b[name])]
    assert set(differing) <= {"run", "sha256"}  # a name that chance gave, and the digest of all
    assert story_of(broken.out) == story_of(whole.out)
    assert broken.trained() == whole.trained()
    assert_in_order(broken.lake, len(whole.trained()))


def wait_for(is_so, seconds: float = 60.0) -> None:
    """Until the condition holds; a hang is a failure."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


# ---- an unbroken run ----


def test_every_clip_of_the_lake_is_trained_on_once_but_for_a_remainder_that_is_reported(unbroken, full_lake):
    whole, ended = unbroken
    in_lake, trained = sounds_in(full_lake), Counter(whole.trained())
    left_over = in_lake - trained
    assert ended.code == 0
    assert len(in_lake) == in_lake.total() > 60  # no sound twice, so a sound names its clip
    assert not trained - in_lake and max(trained.values()) == 1
    assert left_over.total() == in_lake.total() % 4 > 0
    assert f"the lake is drained, {left_over.total()} clips are left over" in ended.said
    assert_in_order(whole.lake, trained.total())


def test_the_loss_falls_and_so_does_the_error_on_held_out_clips(unbroken):
    story = story_of(unbroken[0].out)
    for name in ("loss", "anchor_mse", "recent_mse"):
        values = [line[name] for line in story if name in line]
        assert len(values) >= 3 and values[-1] < 0.8 * values[0], name


def test_config_says_which_code_and_which_teacher(unbroken):
    whole, _ = unbroken
    config = json.loads((whole.out / "config.json").read_text())
    assert config["code"] == git_revision()
    assert config["teacher_revision"] == revision_of(whole.teacher)
    assert (config["chunk_size"], config["model"]["width"], config["lake"]) == (2, 24, str(whole.lake))


def board_of(training: Training) -> EventAccumulator:
    """What TensorBoard would show."""
    return EventAccumulator(str(training.out / "tensorboard")).Reload()


def test_tensorboard_shows_what_metrics_say(unbroken):
    whole, _ = unbroken
    board = board_of(whole)
    story = story_of(whole.out)
    for name in ("loss", "mse", "grad_norm", "anchor_mse", "recent_centred_cosine"):
        points = [(event.step, pytest.approx(event.value, rel=1e-6)) for event in board.Scalars(name)]
        assert [(line["step"], line[name]) for line in story if name in line] == points


def test_the_curves_are_drawn(unbroken):
    image = (unbroken[0].out / "loss.png").read_bytes()
    assert image.startswith(b"\x89PNG\r\n\x1a\n") and image.endswith(b"IEND\xaeB`\x82")


def test_best_is_the_checkpoint_with_the_lowest_error_on_the_anchor(unbroken):
    whole, _ = unbroken
    errors = {line["step"]: line["anchor_mse"] for line in story_of(whole.out) if "anchor_mse" in line}
    assert checkpoint.load(whole.out / "best.pt")["step"] == min(errors, key=errors.get)


# ---- broken runs ----


@pytest.mark.parametrize(
    "point",
    [
        *("checkpoint-written", "checkpoint-kept-previous", "checkpoint-renamed", "checkpoint-recorded"),
        *("shard-unlinked", "shard-retired", "lease-taken"),
    ],
)
def test_a_run_killed_twice_at_the_same_point_ends_as_if_it_had_not_been(training, unbroken, point):
    broken = training()
    assert [broken.run(crash_at=point).code for _ in range(2)] == [-signal.SIGKILL] * 2
    assert broken.run().code == 0
    assert_same_end(broken, unbroken[0])


def test_a_run_that_is_asked_to_stop_saves_where_it_is_and_ends_as_if_it_had_not_been(training, unbroken):
    broken = training()
    process = broken.start()
    wait_for(lambda: "step 8 " in broken.said())
    process.terminate()
    ended = broken.end_of(process)
    assert ended.code == 0 and "asked to stop" in ended.said
    step = checkpoint.load(broken.out / "latest.pt")["step"]
    assert 8 <= step == len(broken.trained()) / 4
    assert_in_order(broken.lake, 4 * step)
    assert broken.run().code == 0
    assert_same_end(broken, unbroken[0])


def slowly(stage) -> None:
    """A tenth of a second per step, so that a run is never over before it is killed."""
    finish_step = stage.finish_step
    stage.finish_step = lambda run: time.sleep(0.1) or finish_step(run)


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(training, unbroken):
    broken, rng = training(), random.Random(0)
    codes = []
    for _ in range(12):
        process = broken.start(edit=slowly)
        process.join(rng.uniform(0.1, 1.5))
        process.kill()
        codes.append(broken.end_of(process).code)
    assert codes.count(-signal.SIGKILL) >= 3
    assert broken.run().code == 0
    assert_same_end(broken, unbroken[0])


def damage(path: Path) -> None:
    """Invert a block in the middle, as a bad disk would; `path` keeps its length."""
    content = bytearray(path.read_bytes())
    middle = slice(len(content) // 2, len(content) // 2 + 512)  # of a checkpoint, single bytes may be padding
    content[middle] = bytes(255 - byte for byte in content[middle])
    path.unlink()  # previous.pt and best.pt may be other names of the same bytes
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_passed_over_loudly_and_no_clip_is_lost(training, unbroken):
    broken = training()
    for _ in range(2):
        broken.run(crash_at="checkpoint-recorded")
    damage(broken.out / "latest.pt")
    ended = broken.run()
    assert ended.code == 0
    assert "WARNING" in ended.said and "latest.pt" in ended.said and "previous.pt" in ended.said
    assert "resuming" in ended.said and "at step 6" in ended.said
    assert_same_end(broken, unbroken[0])


def test_a_run_whose_checkpoints_are_both_damaged_is_not_begun_anew_in_silence(training):
    broken = training()
    for _ in range(2):
        broken.run(crash_at="checkpoint-recorded")
    for name in ("latest.pt", "previous.pt"):
        damage(broken.out / name)
    before = (broken.out / "latest.pt").read_bytes()
    refusal = refusal_of(broken)
    assert "no whole checkpoint" in refusal and "latest.pt" in refusal and "previous.pt" in refusal
    assert (broken.out / "latest.pt").read_bytes() == before


@pytest.mark.parametrize("point", ["checkpoint-renamed", "checkpoint-recorded"])
def test_the_best_checkpoint_is_not_lost_when_the_run_is_killed_as_it_is_made(training, point):
    broken = training(schedule__total_samples=24)
    broken.run(crash_at=point)
    assert broken.run().code == 0
    assert checkpoint.load(broken.out / "best.pt")["step"] == 6


def test_each_step_is_taken_at_the_rate_of_the_schedule(training):
    """The last of four steps of decay, from the optimiser's own state."""
    ended = training(
        schedule__total_samples=24, schedule__warmup_samples=8, schedule__decay_samples=16, schedule__peak=4e-3
    )
    assert ended.run().code == 0
    groups = checkpoint.load(ended.out / "latest.pt")["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == [5e-4, 5e-4]  # the schedule's in the middle of the step
    logged = {line["step"]: line["lr"] for line in story_of(ended.out) if "lr" in line}
    assert logged == {2: 3e-3, 4: 2.5e-3, 6: 5e-4}


def test_a_finished_run_stays_as_it_is_when_it_is_run_again(training):
    done = training(schedule__total_samples=24)
    first = done.run()
    assert first.code == 0 and "all clips are done: step 6, 24 of 24 clips" in first.said
    before = (done.out / "latest.pt").read_bytes()
    again = done.run()
    assert again.code == 0 and "all clips are done" in again.said
    assert (done.out / "latest.pt").read_bytes() == before
    assert len(done.trained()) == 24
    assert_in_order(done.lake, 24)


def test_a_batch_larger_than_the_open_shards_is_drawn_from_more_of_them(training, full_lake):
    wide = training(open_shards=1, chunk_size=8)
    ended = wide.run()
    assert ended.code == 0 and "drained" in ended.said
    assert len(wide.trained()) == sounds_in(full_lake).total() // 16 * 16


def test_a_damaged_shard_is_left_out_and_counted(training, full_lake):
    broken = training()
    path = sorted((broken.lake / "shards").glob("*.tar"))[2]
    damage(path)
    num_lost = path.stat().st_size // RECORD_BYTES
    ended = broken.run()
    assert ended.code == 0
    trained = Counter(broken.trained())
    assert not trained - sounds_in(full_lake) and max(trained.values()) == 1
    assert trained.total() == (sounds_in(full_lake).total() - num_lost) // 4 * 4
    assert_in_order(broken.lake, trained.total())
    assert [p.name.split("-")[0] for p in (broken.lake / "quarantine").iterdir()] == [path.stem]


def flushing_at_once(stage) -> None:
    """Let TensorBoard's file keep up with the run, as it does in runs of more than two minutes."""
    import hear_distill.journal as journal

    journal.SummaryWriter = functools.partial(journal.SummaryWriter, flush_secs=0)


def test_tensorboard_forgets_the_steps_that_a_killed_run_lost(training):
    broken = training(schedule__total_samples=24)
    broken.run(crash_at="checkpoint-written", edit=flushing_at_once)
    assert [event.step for event in board_of(broken).Scalars("loss")] == [2, 4, 6]
    assert broken.run().code == 0
    assert [event.step for event in board_of(broken).Scalars("loss")] == [2, 4, 6]


def test_the_student_begins_with_the_weights_of_its_seed(training):
    beginner = training(schedule__total_samples=4, schedule__warmup_samples=0, schedule__peak=1e-30, seed=5)
    assert beginner.run().code == 0
    torch.manual_seed(5)
    expected = Student(StudentConfig(width=24, heads=2, blocks=1, mlp_width=24)).state_dict()
    found = checkpoint.load(beginner.out / "latest.pt")["learner"]
    for name, value in expected.items():  # the one step moved a bias of zero by 1e-30
        torch.testing.assert_close(found[f"student.{name}"], value, rtol=0, atol=1e-20)


# ---- a lake that is filled while it is read ----


def test_a_starved_trainer_gives_the_room_of_trained_shards_back_and_goes_on(small_lake, full_lake):
    """Nothing is saved here but for want of room, so each new shard that is cut shows that room was given back."""
    starved, fill = small_lake
    process = starved.start(edit=without_check)
    while process.exitcode is None and "no tar is left" not in fill():
        wait_for(lambda: process.exitcode is not None or has_room(starved.lake))
    ended = starved.end_of(process)
    in_source, trained = sounds_in(full_lake), Counter(starved.trained())
    assert ended.code == 0 and "drained" in ended.said
    assert not trained - in_source and max(trained.values()) == 1
    assert (in_source - trained).total() == in_source.total() % 4
    assert_in_order(starved.lake, trained.total())


def test_a_starved_trainer_tells_how_far_it_has_read(small_lake):
    """Or the supervisor, which waits until half of the lake is read, and the trainer wait for each other."""
    starved, _ = small_lake
    set_cap(starved.lake, 10**9)
    process = starved.start(edit=without_check)
    wait_for(lambda: len(starved.trained()) >= 20)
    time.sleep(3)
    ledger = Lake.open(starved.lake)
    unread = ledger.unread_clips()
    ledger.close()
    process.terminate()
    assert starved.end_of(process).code == 0
    assert unread < 4


@pytest.fixture
def small_lake(tmp_path, source, teacher):
    """A lake that is full with a part of the source, a training that saves only when it must, and how to fill up."""
    cap = ("--cap-gb", (50 * RECORD_BYTES + 8 * END_BYTES) / GIB)

    def fill() -> str:
        return stream(source, tmp_path / "lake", *SMALL_SHARDS, *cap).stdout

    assert "the lake is full" in fill()
    training = Training(tmp_path / "run", tmp_path / "lake", teacher)
    return training.but(save_every=4000, log_every=4000, open_shards=1), fill


def without_check(stage) -> None:
    """Let a run begin on a lake that is too small for it, to get at once where a large one gets in hours."""
    stage.check = lambda config: None


def has_room(lake: Path) -> bool:
    """Whether another shard of ten clips, in two parts, could be cut now."""
    ledger = Lake.open(lake)
    free = ledger.cap_bytes() - ledger.used_bytes()
    ledger.close()
    return free >= 10 * RECORD_BYTES + 2 * END_BYTES


# ---- refusals ----


def refusal_of(training: Training) -> str:
    """What a run that must not begin says."""
    ended = training.run()
    errors = [line for line in ended.said.splitlines() if line.startswith("error: ")]
    assert ended.code == 2 and len(errors) == 1 and ended.said.endswith(errors[0] + "\n")
    assert "Traceback" not in ended.said
    return errors[0]


def test_another_model_in_the_same_folder_is_refused(training):
    first = training(schedule__total_samples=24)
    first.run()
    before = (first.out / "latest.pt").read_bytes()
    refusal = refusal_of(first.but(model__canon="ab", model__width=48))
    assert "canon" in refusal and "width" in refusal and "heads" not in refusal and "--out" in refusal
    assert (first.out / "latest.pt").read_bytes() == before


@pytest.mark.parametrize("is_revision_given", [False, True])
def test_another_teacher_in_the_same_folder_is_refused(training, tmp_path, is_revision_given):
    first = training(schedule__total_samples=24)
    first.run()
    other = save_stand_in(tmp_path / "other teacher", seed=1)
    second = replace(first, teacher=other).but(schedule__total_samples=48)
    assert "teacher" in refusal_of(second.but(teacher_revision=revision_of(other)) if is_revision_given else second)


def revision_of(teacher: Path) -> str:
    """What stands for a commit where the teacher is a folder."""
    return f"sha256:{hashlib.sha256((teacher / 'model.safetensors').read_bytes()).hexdigest()}"


def test_a_run_is_not_taken_up_where_that_is_forbidden(training):
    first = training(schedule__total_samples=24, resume="never")
    assert first.run().code == 0
    refusal = refusal_of(first.but(schedule__total_samples=48))
    assert "--resume never" in refusal and "another --out" in refusal


def test_a_second_trainer_in_the_same_folder_is_refused(training):
    second = training()
    second.out.mkdir()
    with (second.out / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "another process" in refusal_of(second)
    assert not (second.out / "latest.pt").exists()


def test_a_missing_lake_is_refused_with_the_command_that_makes_one(tmp_path, teacher):
    refusal = refusal_of(Training(tmp_path / "run", tmp_path / "nowhere", teacher))
    assert str(tmp_path / "nowhere") in refusal and "run_lake.py --source DIR --lake" in refusal


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_refused_and_nothing_runs_on_the_cpu_instead(training):
    refusal = refusal_of(training(device="cuda"))
    assert "--device cuda" in refusal and "demo" in refusal


# ---- gradients that are not finite ----


def spoil(stage, steps: set[int]) -> None:
    """Make the gradient of these steps not finite, and let the heartbeat beat at every step."""
    losses_of = stage.Learning.losses_of

    def spoiled(learning, spectrogram, targets):
        losses = losses_of(learning, spectrogram, targets)
        if learning.step not in steps:
            return losses
        return {name: term * math.nan for name, term in losses.items()}

    stage.Learning.losses_of = spoiled
    import hear_distill.runlog

    hear_distill.runlog.HEARTBEAT_S = 0.0


def spoil_steps_9_10_11(stage) -> None:
    spoil(stage, {9, 10, 11})


def spoil_step_7(stage) -> None:
    spoil(stage, {7})


def test_three_bad_gradients_in_a_row_stop_the_run_and_name_the_last_good_checkpoint(training):
    diverged = training()
    ended = diverged.run(edit=spoil_steps_9_10_11)
    last_line = ended.said.splitlines()[-1]
    assert ended.code == 2 and last_line.startswith("error: ")
    assert "not finite" in last_line and str(diverged.out / "latest.pt") in last_line
    state = checkpoint.load(diverged.out / "latest.pt")
    assert state["step"] == 6 and all(tensor.isfinite().all() for tensor in state["student"].values())
    assert_in_order(diverged.lake, 24)


def test_a_single_bad_gradient_is_passed_over(training):
    lucky = training(schedule__total_samples=48)
    ended = lucky.run(edit=spoil_step_7)
    assert ended.code == 0 and "all clips are done" in ended.said
    by_step = {line["step"]: line["loss"] for line in story_of(lucky.out) if "loss" in line}
    assert by_step[8] is None and all(loss is not None for step, loss in by_step.items() if step != 8)


def test_steps_that_were_passed_over_are_counted_through_a_resume(training):
    first = training(schedule__total_samples=32)
    first.run(edit=spoil_step_7)
    first.but(schedule__total_samples=40).run()
    counted = {line["step"]: line["skipped_steps"] for line in story_of(first.out) if "skipped_steps" in line}
    assert counted == {2: 0, 4: 0, 6: 0, 8: 1, 10: 1}
