"""What the supervisor decides each turn: whom to start, when to fill again, when to wait, when to give up on a child.

It runs in this process on a lake made by hand, and starts nothing.
"""

import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from lake_tools import ROOT, add_shard, make_lake
from train_tools import load_stage, set_cap

from hear_distill.files import GIB
from hear_distill.runlog import Heartbeat


@pytest.fixture(scope="session")
def stage():
    return load_stage(ROOT / "datalake" / "run_lake.py")


@pytest.fixture
def supervisor(stage, tmp_path, monkeypatch, request):
    """A supervisor of four streamers that starts nothing: `started` lists what it would have started."""
    fields = {"val_clips": 0, "num_tars": 9, **getattr(request, "param", {})}
    tars = {f"{i}.tar": 100 for i in range(fields["num_tars"])}
    lake = make_lake(tmp_path / "lake", tars, shard_clips=10, val_clips=fields["val_clips"])
    config = stage.Config(lake=tmp_path / "lake", out=tmp_path / "run", max_workers=4, disk_floor_gb=1.0)
    supervisor = stage.Supervisor(config, lake, pipe=-1)
    supervisor.started, supervisor.killed, supervisor.signalled = [], [], []

    def start(_, script: Path, name: str) -> object:
        supervisor.started.append(name)
        return child(name)

    def child(name: str, code: int | None = None) -> object:
        process = SimpleNamespace(
            poll=lambda: code,
            pid=0,
            kill=lambda: supervisor.killed.append(name),
            send_signal=lambda number: supervisor.signalled.append((name, number)),
        )
        (tmp_path / f"{name}.log").write_text("last words\n")
        return stage.Child(name, [], tmp_path / f"{name}.log", process, tmp_path / f"{name}.json")

    supervisor.child = child
    monkeypatch.setattr(stage, "start", start)
    yield supervisor
    lake.close()


def test_all_streamers_are_started_on_a_lake_with_room_and_tars(stage, supervisor):
    assert stage.control(supervisor)
    assert supervisor.started == ["train", "stream-0", "stream-1", "stream-2", "stream-3"]


@pytest.mark.parametrize(
    ("supervisor", "expected"),
    [({"val_clips": 20}, ["train", "stream-0"]), ({"num_tars": 2}, ["train", "stream-0", "stream-1"])],
    ids=["anchor not cut", "two tars"],
    indirect=["supervisor"],
)
def test_no_more_streamers_are_started_than_have_something_to_do(stage, supervisor, expected):
    assert stage.control(supervisor)
    assert supervisor.started == expected


@pytest.mark.parametrize("num_running", [0, 1, 2, 3, 4])
def test_below_the_disk_floor_no_streamer_is_started_and_those_that_run_are_asked_to_leave(
    stage, supervisor, monkeypatch, num_running
):
    supervisor.workers = [supervisor.child(f"stream-{i}") for i in range(num_running)]
    monkeypatch.setattr(stage.shutil, "disk_usage", lambda _: SimpleNamespace(free=GIB - 1))
    assert stage.control(supervisor)
    assert supervisor.started == ["train"]
    assert supervisor.signalled == [(f"stream-{i}", signal.SIGTERM) for i in range(num_running)]


def test_no_streamer_is_started_where_there_is_no_room_for_a_shard(stage, supervisor):
    set_cap(supervisor.lake.root, 1000)
    supervisor.workers = [supervisor.child("stream-2")]
    assert stage.control(supervisor)
    assert supervisor.started == ["train"]


def full_lake_with_room_again(stage, supervisor) -> None:
    """Ten unread clips in a lake that was full of them, and then got room for another shard."""
    add_shard(supervisor.lake, 10)
    cap_bytes = supervisor.lake.cap_bytes()
    set_cap(supervisor.lake.root, supervisor.lake.used_bytes())
    assert stage.control(supervisor)
    set_cap(supervisor.lake.root, cap_bytes)
    assert stage.control(supervisor)
    assert supervisor.started == ["train"] and not supervisor.is_filling


def test_a_lake_that_was_full_is_filled_again_when_half_of_it_is_read_and_no_earlier(stage, supervisor):
    full_lake_with_room_again(stage, supervisor)
    for unread, num_started in ((6, 1), (5, 5)):
        supervisor.lake.db.execute("UPDATE shards SET num_read = ?", (10 - unread,))
        assert stage.control(supervisor)
        assert len(supervisor.started) == num_started


def test_a_lake_that_was_full_is_filled_again_when_the_trainer_waits_for_more_than_is_unread(stage, supervisor):
    """Less than a batch is left: it would never be half read, and both would wait for ever."""
    full_lake_with_room_again(stage, supervisor)
    Heartbeat(supervisor.config.out / "progress.json", "train").beat(5, is_waiting=True)
    assert stage.control(supervisor)
    assert len(supervisor.started) == 5


def test_a_crashed_child_is_started_again_after_a_pause_that_doubles(stage, supervisor):
    pauses = []
    for _ in range(3):
        supervisor.trainer = supervisor.child("train", code=-9)
        supervisor.start_after = 0.0
        assert stage.control(supervisor)
        pauses.append(supervisor.start_after - time.monotonic())
    assert supervisor.started == [] and pauses == pytest.approx([5, 10, 20], abs=0.5)


def test_a_streamer_that_was_asked_to_leave_while_it_was_starting_has_not_crashed(stage, supervisor, monkeypatch):
    supervisor.workers = [supervisor.child("stream-0")]
    monkeypatch.setattr(stage.shutil, "disk_usage", lambda _: SimpleNamespace(free=GIB - 1))
    assert stage.control(supervisor)
    assert supervisor.signalled == [("stream-0", signal.SIGTERM)]
    supervisor.workers[0].process.poll = lambda: -signal.SIGTERM
    assert stage.control(supervisor)
    assert supervisor.workers == [] and not supervisor.crashes


def test_a_source_that_cannot_be_reached_is_tried_again_later_however_often(stage, supervisor, capsys):
    for _ in range(3 * stage.CRASHES_PER_HOUR):
        supervisor.workers = [supervisor.child("stream-0", code=75)]
        supervisor.start_after = 0.0
        assert stage.control(supervisor)
        assert supervisor.start_after - time.monotonic() == pytest.approx(stage.OUTAGE_S, abs=1)
    assert supervisor.started == [] and not supervisor.crashes
    assert "stream-0: last words; trying again in 300 s" in capsys.readouterr().out


def test_the_status_tells_what_each_living_streamer_spends_its_time_on(stage, supervisor):
    beats = supervisor.lake.root / "heartbeats"
    speed = {"clips_per_s": 312.4, "reading": 0.04, "decoding": 0.88, "writing": 0.08}
    Heartbeat(beats / "stream-1.json", "stream").beat(5, clips=7_000, **speed)
    Heartbeat(beats / "stream-2.json", "stream").beat(5, clips=0)  # has not finished a shard yet
    dead = Heartbeat(beats / "stream-3.json", "stream")
    dead.fixed["pid"] = 2**22 + 1  # above the kernel's largest
    dead.beat(5, clips=1, **speed)
    (line,) = stage.status.worker_lines(supervisor.lake.root)
    assert line.endswith("7000 clips, 312/s; 4% reading, 88% decoding, 8% writing")


def test_a_child_that_makes_no_progress_is_killed_and_one_that_does_is_not(stage, supervisor, monkeypatch):
    monkeypatch.setattr(stage, "HANG_S", 0.3)
    supervisor.trainer, slow = supervisor.child("train"), supervisor.child("stream-0")
    supervisor.workers = [slow]
    end = time.monotonic() + 0.6
    while time.monotonic() < end:
        Heartbeat(slow.heartbeat, "stream").beat(int(1000 * time.monotonic()))
        Heartbeat(supervisor.trainer.heartbeat, "train").beat(7)
        assert stage.control(supervisor)
        time.sleep(0.02)
    assert "train" in supervisor.killed and "stream-0" not in supervisor.killed


def test_the_status_line_shows_a_loss_that_was_not_finite(stage):
    trainer = {"step": 7, "steps": 9, "loss": None}
    status = {"used_bytes": 1, "cap_bytes": 2, "unread_clips": 3, "is_filling": True, "workers": 1}
    status["has_disk"] = True
    assert "step 7 of 9" in stage.status.line_of({**status, "clips_per_s": {}, "trainer": trainer})


@pytest.mark.parametrize("word", ["paper", "demo"])
def test_more_arguments_for_the_trainer_leave_the_preset_that_the_word_named(stage, word):
    _, config = stage.cli.parse(stage.main, stage.PRESETS, [word, "--train-args=--seed 5"], "", {})
    assert stage.command_of(stage.TRAINER, config)[2] == word
