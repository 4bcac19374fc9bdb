"""What the supervisor decides each turn: whom to start, when to fill again, when to wait, when to give up on a child.

It runs in this process on a lake made by hand, and starts nothing.
"""

import errno
import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from lake_tools import ROOT, add_shard, make_lake
from train_tools import load_stage, set_cap

from hear_distill.children import Child
from hear_distill.files import UserError
from hear_distill.runlog import Heartbeat


class FakeChild(Child):
    """A child that has no process: it ends when `code` is set."""

    def __init__(self, *fields: object, code: int | None, **more: object) -> None:
        super().__init__(*fields, **more)
        self.code, self.is_killed = code, False

    def poll(self) -> int | None:
        return self.code

    def ask(self) -> None:
        self.is_asked = True

    def kill(self) -> None:
        self.is_killed = True


@pytest.fixture(scope="session")
def stage():
    return load_stage(ROOT / "datalake" / "run_lake.py")


@pytest.fixture
def supervisor(stage, tmp_path, monkeypatch, request):
    """A supervisor of four streamers that starts nothing: `started` lists what it would have started."""
    fields = {"val_clips": 0, "num_tars": 9, **getattr(request, "param", {})}
    tars = {f"{i}.tar": 100 for i in range(fields["num_tars"])}
    lake = make_lake(tmp_path / "lake", tars, shard_clips=10, val_clips=fields["val_clips"])
    config = stage.Config(lake=tmp_path / "lake", out=tmp_path / "run", max_workers=4, disk_floor_gb=0.0)
    supervisor = stage.supervisor_of(config, pipe=-1)
    supervisor.started = []

    def start(_, script: Path, name: str) -> FakeChild:
        supervisor.started.append(name)
        return child(name)

    def child(name: str, code: int | None = None) -> FakeChild:
        (tmp_path / f"{name}.log").write_text("last words\n")
        return FakeChild(name, tmp_path / f"{name}.log", None, tmp_path / f"{name}.json", family="", code=code)

    supervisor.child = child
    monkeypatch.setattr(stage, "start", start)
    yield supervisor
    supervisor.lake.close()
    lake.close()


def at_work(supervisor, num_workers: int) -> None:
    """So many streamers run."""
    supervisor.workers = [supervisor.child(f"stream-{i}") for i in range(num_workers)]


def asked(supervisor) -> list[str]:
    """The streamers that were asked to leave."""
    return [child.name for child in supervisor.workers if child.is_asked]


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
    at_work(supervisor, num_running)
    monkeypatch.setattr(stage, "free_bytes", lambda _: -1)
    assert stage.control(supervisor)
    assert supervisor.started == ["train"]
    assert asked(supervisor) == [f"stream-{i}" for i in range(num_running)]


@pytest.mark.parametrize("below", ["lake", "run", "cache"])
def test_the_disks_of_the_lake_the_run_and_the_cache_each_have_the_floor_and_the_one_below_it_is_named_once(
    stage, supervisor, monkeypatch, tmp_path, capsys, below
):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(stage, "free_bytes", lambda folder: -1 if folder.name == below else 1)
    for _ in range(3):
        assert stage.control(supervisor)
    assert supervisor.started == ["train"]
    said = capsys.readouterr().out
    assert said.count("no streamers: less than") == 1 and f"{tmp_path / below}\n" in said


def test_no_streamer_is_started_where_there_is_no_room_and_one_that_runs_may_finish_its_shard(stage, supervisor):
    set_cap(supervisor.lake.root, 1000)
    at_work(supervisor, 1)
    assert stage.control(supervisor)
    assert supervisor.started == ["train"] and asked(supervisor) == []


def test_the_speed_of_a_streamer_is_read_again_when_a_shard_has_come_and_not_before(stage, supervisor, monkeypatch):
    reads, statistics = [], supervisor.lake.statistics
    monkeypatch.setattr(supervisor.lake, "statistics", lambda count: reads.append(count) or statistics(count))
    rates = []
    for num_shards, busy_s in ((0, 0), (1, 2.0), (2, 8.0)):
        if num_shards:
            content = json.dumps({"clips": 10, "clock_s": {"decoding": busy_s}})
            shard_id = add_shard(supervisor.lake, 10)
            supervisor.lake.db.execute("INSERT INTO statistics VALUES (?, 0.0, ?)", (shard_id, content))
        for _ in range(3):
            rates.append(stage.look_at(supervisor).worker_rate)
        assert len(reads) == num_shards + 1
    assert rates == [None] * 3 + [5.0] * 3 + [2.0] * 3


def test_a_streamer_that_still_runs_when_a_full_lake_has_room_again_is_asked_to_leave(stage, supervisor):
    cap_bytes = supervisor.lake.cap_bytes()
    at_work(supervisor, 2)
    add_shard(supervisor.lake, 10)
    set_cap(supervisor.lake.root, supervisor.lake.used_bytes())
    assert stage.control(supervisor) and asked(supervisor) == []
    set_cap(supervisor.lake.root, cap_bytes)
    assert stage.control(supervisor) and asked(supervisor) == ["stream-0", "stream-1"]


def test_surplus_streamers_are_asked_to_leave_the_newest_first_and_nobody_takes_their_place(stage, supervisor):
    at_work(supervisor, 4)
    supervisor.law.workers_wanted = lambda look: 2
    for _ in range(2):
        assert stage.control(supervisor)
        assert asked(supervisor) == ["stream-2", "stream-3"] and supervisor.started == ["train"]


def test_a_streamer_that_is_leaving_is_not_one_of_those_that_are_wanted(stage, supervisor):
    at_work(supervisor, 4)
    supervisor.workers[1].is_asked = True
    supervisor.law.workers_wanted = lambda look: 3
    assert stage.control(supervisor)
    assert asked(supervisor) == ["stream-1"] and supervisor.started == ["train"]


def full_lake_with_room_again(stage, supervisor) -> None:
    """Ten unread clips in a lake that was full of them, and then got room for another shard."""
    add_shard(supervisor.lake, 10)
    cap_bytes = supervisor.lake.cap_bytes()
    set_cap(supervisor.lake.root, supervisor.lake.used_bytes())
    assert stage.control(supervisor)
    set_cap(supervisor.lake.root, cap_bytes)
    assert stage.control(supervisor)
    assert supervisor.started == ["train"] and not supervisor.law.is_filling


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
        supervisor.restarts.start_after.clear()
        assert stage.control(supervisor)
        pauses.append(supervisor.restarts.start_after["train"] - time.monotonic())
    assert "train" not in supervisor.started and pauses == pytest.approx([5, 10, 20], abs=0.5)


def test_a_trainer_that_crashed_keeps_no_streamer_from_its_work_and_the_other_way_round(stage, supervisor):
    supervisor.trainer = supervisor.child("train", code=-9)
    assert stage.control(supervisor)
    assert supervisor.started == ["stream-0", "stream-1", "stream-2", "stream-3"]
    supervisor.workers[0].code = 75
    supervisor.restarts.start_after["train"] = 0.0
    assert stage.control(supervisor)
    assert supervisor.started[4:] == ["train"]


def test_a_streamer_that_was_asked_to_leave_while_it_was_starting_has_not_crashed(stage, supervisor, monkeypatch):
    at_work(supervisor, 1)
    monkeypatch.setattr(stage, "free_bytes", lambda _: -1)
    assert stage.control(supervisor)
    assert asked(supervisor) == ["stream-0"]
    supervisor.workers[0].code = -signal.SIGTERM
    assert stage.control(supervisor)
    assert supervisor.workers == [] and not supervisor.restarts.crashes[False]


@pytest.mark.parametrize(("code", "pause_s"), [(75, 300), (73, 60)], ids=["outage", "disk full"])
def test_what_passes_by_itself_is_waited_for_however_often_and_said_once(stage, supervisor, capsys, code, pause_s):
    for _ in range(12):
        supervisor.workers = [supervisor.child("stream-0", code=code)]
        supervisor.restarts.start_after.clear()
        assert stage.control(supervisor)
        assert supervisor.restarts.start_after["stream"] - time.monotonic() == pytest.approx(pause_s, abs=1)
    assert supervisor.started == ["train"] and not supervisor.restarts.crashes[False]
    assert capsys.readouterr().out.count(f"stream-0: last words; trying again every {pause_s} s\n") == 1
    add_shard(supervisor.lake, 3)
    assert stage.control(supervisor)
    assert "it is over" in capsys.readouterr().out and not supervisor.restarts.troubles


@pytest.mark.parametrize("num_allowed", [3, 30])
def test_crashes_while_decoding_are_allowed_more_often_than_others(stage, supervisor, num_allowed):
    for i in range(num_allowed + 1):
        if num_allowed == 30:
            supervisor.lake.db.execute("INSERT OR REPLACE INTO totals VALUES ('decoder deaths', ?)", (i + 1,))
        supervisor.workers = [supervisor.child("stream-0", code=-11)]
        if i < num_allowed:
            assert stage.control(supervisor)
    with pytest.raises(UserError, match=f"{num_allowed + 1} crashes.* within an hour, {num_allowed} are allowed"):
        stage.control(supervisor)


def test_a_disk_on_which_not_even_the_ledger_can_grow_is_said_once_and_waited_for(
    stage, supervisor, monkeypatch, capsys
):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    display = SimpleNamespace(show=full)
    for _ in range(3):
        assert stage.turn(supervisor, display)
    assert capsys.readouterr().out.count("the disk is full") == 1
    monkeypatch.setattr(stage, "decide", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stage.turn(supervisor, display)


def test_warnings_of_the_trainer_are_passed_on(stage, supervisor, capsys):
    assert stage.control(supervisor)
    with supervisor.trainer.log.open("a") as f:
        f.write("step 3\nWARNING: latest.pt is damaged\nWARN")
    for _ in range(2):
        assert stage.control(supervisor)
    assert [line for line in capsys.readouterr().out.splitlines() if "WARN" in line] == [
        "train: WARNING: latest.pt is damaged"
    ]


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
    assert supervisor.trainer.is_killed and not slow.is_killed


def test_the_status_line_shows_a_loss_that_was_not_finite(stage):
    trainer = {"step": 7, "steps": 9, "loss": None}
    status = {"used_bytes": 1, "cap_bytes": 2, "unread_clips": 3, "is_filling": True, "workers": 1}
    status["has_disk"] = True
    assert "step 7 of 9" in stage.status.line_of({**status, "clips_per_s": {}, "trainer": trainer})


@pytest.mark.parametrize("word", ["paper", "demo"])
def test_more_arguments_for_the_trainer_leave_the_preset_that_the_word_named(stage, word):
    _, config = stage.cli.parse(stage.main, stage.PRESETS, [word, "--train-args=--seed 5"], "", {})
    assert stage.command_of(stage.TRAINER, config)[2] == word


def test_the_trainer_of_one_gpu_is_started_without_a_launcher_and_that_of_several_machines_with_its_place(stage):
    def started(*flags: str) -> list[list[str]]:
        _, config = stage.cli.parse(stage.main, stage.PRESETS, flags, "", {})
        return [stage.started(script, config) for script in (stage.TRAINER, stage.STREAMER)]

    trainer, streamer = started()
    assert trainer[1] == str(stage.TRAINER) and "--num-nodes" not in trainer + streamer
    place = ["--num-nodes", "3", "--node-rank", "2"]
    trainer_there, streamer_there = started("--gpus", "4", *place, "--rendezvous", "a:29500")
    launcher = ["-m", "hear_distill.launch", "--gpus", "4", *place, "--rendezvous", "a:29500"]
    assert trainer_there[1:] == [*launcher, *trainer[1:]]
    assert streamer_there == [*streamer, *place]


def test_the_heartbeat_of_another_machine_has_a_name_of_its_own(stage):
    flags = ["--num-nodes", "2", "--node-rank", "1", "--rendezvous", "a:29500"]
    _, config = stage.cli.parse(stage.main, stage.PRESETS, flags, "", {})
    assert stage.heartbeat_of(stage.TRAINER, config, 7) == config.out / "progress-1.json"


def test_what_begins_to_drift_is_said_once_and_the_users_command_is_told(stage, supervisor, monkeypatch, capsys):
    sent = []
    monkeypatch.setattr(supervisor.hook, "send", lambda *event: sent.append(event))
    for warnings in (
        ["level has drifted: 0.8"],
        ["level has drifted: 0.9", "bands has drifted: 0.6"],
        [],
        ["level ..."],
    ):
        stage.tell_drift(supervisor, warnings)
    said = ["level has drifted: 0.8", "bands has drifted: 0.6", "level ..."]
    assert sent == [("drift", message) for message in said]
    assert [message in capsys.readouterr().out for message in said[:1]] == [True]


def test_what_a_cluster_says_of_ranks_does_not_reach_a_trainer_of_one_gpu(stage, tmp_path, monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "8")
    with stage.alone_on(tmp_path / "lake"), pytest.raises(UserError, match="another supervisor"):
        stage.main(stage.Config(lake=tmp_path / "lake"))
    assert os.environ["WORLD_SIZE"] == os.environ["LOCAL_WORLD_SIZE"] == "1"
