"""Chunks that fit: halved until they do, never where that would change the run, and nothing of the run is touched.

There is no GPU here: the memory of the CPU is said to end, and does so at the size of a chunk that each test sets.
"""

import dataclasses
import json
import signal
import weakref
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from test_train import assert_in_order, assert_same_end, story_of
from train_tools import TRAINER, load_stage, sounds_in

from hear_distill import fit
from hear_distill.fit import chunk_that_fits, rehearse_steps
from hear_distill.lake import Lake
from hear_distill.learning import Learning
from hear_distill.objective import LossConfig
from hear_distill.pace import Pace
from hear_distill.schedule import Control, Schedule
from hear_distill.student import StudentConfig
from hear_distill.teacher import load_teacher

CPU = torch.device("cpu")
MODEL = StudentConfig(width=24, heads=2, blocks=1, mlp_width=24)
ALL = LossConfig(patch=0.5, prototype=0.5)
QUEUE, BATCH = LossConfig(), LossConfig(negatives="batch")


@pytest.fixture
def cpu_memory_ends(monkeypatch):
    monkeypatch.setattr(fit, "DEVICES", ("cpu",))


def memory_for(num_clips: int, tried: list[int]):
    """A rehearsal that runs out of memory above so many clips."""

    def rehearse(size: int) -> None:
        tried.append(size)
        if size > num_clips:
            raise torch.OutOfMemoryError(f"no room for {size}")

    return rehearse


@pytest.mark.parametrize(("room", "expected"), [(96, 96), (95, 48), (24, 24), (23, 12), (6, 6)])
def test_a_chunk_is_halved_until_it_fits_and_that_is_said_once(cpu_memory_ends, capsys, room, expected):
    tried: list[int] = []
    assert chunk_that_fits(96, QUEUE, CPU, memory_for(room, tried)) == expected
    assert tried == [size for size in (96, 48, 24, 12, 6) if size >= expected]
    said = capsys.readouterr().out.splitlines()
    factor = 96 // expected
    assert len(said) == (factor > 1)
    assert all(f"{factor} times as many chunks of {expected} make the same batch" in line for line in said)


@pytest.mark.parametrize(("asked", "left"), [(96, 3), (25, 25), (16, 2), (2, 2), (3, 3)])
def test_a_chunk_that_is_odd_or_the_least_is_refused_with_one_line(cpu_memory_ends, asked, left):
    tried: list[int] = []
    with pytest.raises(fit.UserError, match=f"a chunk of {left} clips does not fit.*--chunk-size") as refused:
        chunk_that_fits(asked, QUEUE, CPU, memory_for(1, tried))
    assert "\n" not in str(refused.value) and tried[-1] == left


def test_a_chunk_whose_clips_are_each_others_negatives_is_never_halved(cpu_memory_ends):
    tried: list[int] = []
    with pytest.raises(fit.UserError, match="negatives batch compares the clips of a chunk") as refused:
        chunk_that_fits(64, BATCH, CPU, memory_for(63, tried))
    assert tried == [64]
    assert [flag for flag in ("--chunk-size", "--loss.negatives batch") if flag not in str(refused.value)] == []
    assert chunk_that_fits(64, BATCH, CPU, memory_for(64, tried)) == 64


def test_a_chunk_is_halved_as_long_as_it_holds_two_whole_sounds_of_each_length(cpu_memory_ends):
    tried: list[int] = []
    with pytest.raises(fit.UserError, match=r"a chunk of 12 clips does not fit.*two whole sounds, of 12 s"):
        chunk_that_fits(48, QUEUE, CPU, memory_for(1, tried), sizes=(1, 2, 6))
    assert tried == [48, 24, 12]
    assert chunk_that_fits(48, QUEUE, CPU, memory_for(23, tried), sizes=(1, 6)) == 12
    with pytest.raises(fit.UserError, match="a chunk of 24 clips"):
        chunk_that_fits(24, QUEUE, CPU, memory_for(1, tried), sizes=(1, 8))


def test_the_smallest_chunk_of_all_ranks_is_taken_and_said_also_by_a_rank_whose_own_is_larger(cpu_memory_ends, capsys):
    ranks = SimpleNamespace(size=3, gather=lambda size: [size, 24, 48])
    assert chunk_that_fits(96, QUEUE, CPU, memory_for(96, []), ranks=ranks) == 24
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and "every GPU; 4 times as many chunks of 24 " in said[0]


def test_on_a_cpu_nothing_is_tried():
    tried: list[int] = []
    assert chunk_that_fits(64, QUEUE, CPU, memory_for(1, tried)) == 64
    assert tried == []


def test_what_breaks_for_another_reason_is_not_taken_for_a_lack_of_memory(cpu_memory_ends):
    def rehearse(size: int) -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        chunk_that_fits(64, QUEUE, CPU, rehearse)


def test_what_a_rehearsal_held_is_free_before_the_next_and_its_random_numbers_are_given_back(cpu_memory_ends):
    held: list[weakref.ref] = []

    def rehearse(size: int) -> None:
        assert [kept() for kept in held] == [None] * len(held)
        activations = torch.rand(size)
        activations.myself = activations  # as a module and its hooks do, so that counting references is not enough
        held.append(weakref.ref(activations))
        if size > 16:
            raise torch.OutOfMemoryError

    before = torch.get_rng_state()
    assert chunk_that_fits(64, QUEUE, CPU, rehearse) == 16
    assert len(held) == 3 and held[-1]() is None
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("is_critical", [False, True])
@pytest.mark.parametrize("loss", [ALL, BATCH], ids=["all", "batch"])
def test_a_rehearsal_is_two_steps_of_any_recipe_by_the_code_of_a_run(teacher, capsys, loss, is_critical):
    frozen = load_teacher(teacher)
    before = {name: value.clone() for name, value in frozen.state_dict().items()}
    control = Control(schedule=Schedule(warmup_samples=640, total_samples=1000), chunk_samples=6)  # no look is due
    learning = Learning(frozen, MODEL, loss, Pace(control, "off", is_critical, CPU), 0.05, seed=0)
    started = {name: value.clone() for name, value in learning.learner.state_dict().items()}
    rehearse_steps(learning, 6, queue_rows=40)
    assert learning.watch.counts()["skipped_steps"] == 0 and learning.samples == 24
    assert [name for name, value in learning.learner.state_dict().items() if torch.equal(value, started[name])] == []
    assert len(learning.pace.held_out.probes) + len(learning.pace.training.probes) == 2 * is_critical
    assert learning.objective.queue is None or learning.objective.queue.rows.shape == (40, 512)
    assert all(torch.equal(value, before[name]) for name, value in frozen.state_dict().items())
    assert capsys.readouterr().out == ""


# ---- whole runs ----


def limit(stage, num_clips: int) -> None:
    """A GPU whose memory ends above so many clips in one backward pass."""
    fit.DEVICES = ("cpu",)
    losses_of = stage.Learning.losses_of

    def losses_or_no_memory(learning, spectrogram, targets):
        if len(spectrogram) > num_clips:
            raise torch.OutOfMemoryError(f"no room for {len(spectrogram)} clips")
        return losses_of(learning, spectrogram, targets)

    stage.Learning.losses_of = losses_or_no_memory


def large_gpu(stage) -> None:
    limit(stage, 1000)


def small_gpu(stage) -> None:
    limit(stage, 3)


def test_a_run_that_was_rehearsed_ends_bit_identical_to_one_that_was_not(training, unbroken):
    rehearsed = training()
    assert rehearsed.run(crash_at="checkpoint-recorded", edit=large_gpu).code == -signal.SIGKILL
    ended = rehearsed.run(edit=large_gpu)
    assert ended.code == 0 and "does not fit" not in ended.said
    assert_same_end(rehearsed, unbroken[0])


def test_a_run_that_finds_less_memory_when_it_resumes_keeps_its_batch_and_loses_no_clip(training, full_lake):
    run = training(chunk_size=4)
    assert run.run(crash_at="checkpoint-recorded").code == -signal.SIGKILL
    ended = run.run(edit=small_gpu)
    assert ended.code == 0 and "resuming" in ended.said
    assert ended.said.count("does not fit") == 1 and "2 times as many chunks of 2 " in ended.said
    config = json.loads((run.out / "config.json").read_text())
    assert (config["chunk_size"], config["chunks"]) == (2, 4)
    batches = [line["batch_size"] for line in story_of(run.out) if "batch_size" in line]
    assert len(batches) > 6 and set(batches) == {8}
    in_lake, trained = sounds_in(full_lake), Counter(run.trained())
    assert max(trained.values()) == 1 and not trained - in_lake
    assert (in_lake - trained).total() == in_lake.total() % 8
    assert_in_order(run.lake, trained.total())


@pytest.mark.parametrize("controller", ["off", "ema-batch", "batch", "seesaw"])
def test_the_batch_and_the_largest_that_a_controller_may_ask_for_stay_as_they_were(
    teacher, cpu_memory_ends, monkeypatch, controller
):
    stage = load_stage(TRAINER)
    config = stage.Config(device="cpu", chunk_size=48, chunks=3, controller=controller, model=MODEL, target_clips=20)
    monkeypatch.setattr(stage.Learning, "losses_of", stage.Learning.losses_of)  # to be put back
    limit(stage, 12)
    smaller = stage.fitted(config, load_teacher(teacher))
    assert (smaller.chunk_size, smaller.chunks) == (12, 12)
    assert smaller.batch_size() == config.batch_size() and smaller.largest_batch() == config.largest_batch()
    before, after = config.control(), smaller.control()
    assert after.max_chunks * after.chunk_samples == before.max_chunks * before.chunk_samples == 16 * 144
    assert after.base_chunks * after.chunk_samples == before.base_chunks * before.chunk_samples
    assert dataclasses.replace(smaller, chunk_size=48, chunks=3) == config


@pytest.mark.parametrize(("warmup", "num_chunks"), [("linear", {2}), ("critical", {6, 12, 24})])
def test_a_rehearsal_has_as_many_chunks_as_a_step_only_where_a_step_keeps_them_all(
    teacher, cpu_memory_ends, monkeypatch, warmup, num_chunks
):
    stage, found = load_stage(TRAINER), []
    config = stage.Config(device="cpu", chunk_size=16, chunks=6, warmup=warmup, model=MODEL, target_clips=20)
    monkeypatch.setattr(stage.Learning, "losses_of", stage.Learning.losses_of)  # to be put back
    limit(stage, 4)
    rehearse = stage.rehearse_steps
    monkeypatch.setattr(
        stage,
        "rehearse_steps",
        lambda learning, *rest: (
            found.append((learning.pace.control.chunk_samples, learning.pace.control.base_chunks)),
            rehearse(learning, *rest),
        ),
    )
    stage.fitted(config, load_teacher(teacher))
    assert [size for size, _ in found] == [16, 8, 4] and {chunks for _, chunks in found} == num_chunks


def test_a_run_of_longer_sounds_that_do_not_fit_is_refused_in_our_words(teacher, cpu_memory_ends, monkeypatch):
    stage = load_stage(TRAINER)
    config = stage.Config(device="cpu", chunk_size=8, lengths=(2, 8), model=MODEL, target_clips=20)
    monkeypatch.setattr(stage.Learning, "losses_of", stage.Learning.losses_of)  # to be put back
    limit(stage, 4)
    with pytest.raises(fit.UserError, match="two whole sounds, of 8 s"):
        stage.fitted(config, load_teacher(teacher))


def test_a_run_whose_chunk_is_its_loss_is_refused_before_it_touches_the_lake(training):
    run = training(loss__negatives="batch", loss__patch=0.0, chunk_size=4)
    ended = run.run(edit=small_gpu)
    assert ended.code == 2 and ended.said.startswith("error: ") and "--loss.negatives batch" in ended.said
    lake = Lake.open(run.lake)
    assert not lake.db.execute("SELECT 1 FROM shards WHERE state = 'leased'").fetchall()
    lake.close()


# ---- other refusals that come before anything is loaded ----


def test_a_table_to_probe_that_is_not_there_is_refused_by_check(tmp_path):
    stage = load_stage(TRAINER)
    config = stage.Config(device="cpu", lake=tmp_path, probe_table=tmp_path / "none.parquet")
    with pytest.raises(fit.UserError, match=r"--probe-table .*none.parquet is no file"):
        stage.check(config)
