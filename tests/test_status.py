"""What a lake shows of itself: table, JSON, exit code, the history and its picture; and how it is stopped."""

import errno
import json
import math
import os
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from lake_tools import add_shard, make_lake, start_python

from hear_distill import history, status, stop
from hear_distill.files import UserError
from hear_distill.lake import Lake
from hear_distill.runlog import Heartbeat

CONTROL = status.Control(
    is_filling=True, has_disk=True, times_full=2, times_restarted=1, workers=3, crashes=0, paused_s=0.0
)
SUPERVISOR = """
import sys, time
from pathlib import Path
from hear_distill import status
from hear_distill.lake import Lake
from hear_distill.locks import alone
from hear_distill.runlog import StopRequest
root, stop = Path(sys.argv[1]), StopRequest()
with alone(root / status.LOCK, "held"):
    if sys.argv[2] == "shown":
        control = status.Control(is_filling=True, has_disk=sys.argv[3] == "disk", times_full=2, times_restarted=1,
                                 workers=3, crashes=0, paused_s=0.0)
        status.Display(Lake.open(root), root / "run").show(control)
    print("running", flush=True)
    stop.wait(60)
"""


@pytest.fixture
def lake(tmp_path):
    lake = make_lake(tmp_path / "lake", {"a.tar": 100, "b.tar": 100})
    add_shard(lake, 6)
    yield lake
    lake.close()


@pytest.fixture
def supervisor_of(lake):
    """Starts a process that holds the lake as a supervisor does; all end with the test."""
    processes = []

    def start(*words: str):
        processes.append(start_python(SUPERVISOR, lake.root, *words, "", ""))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def healthy(**changes: object) -> dict:
    """A status in which nothing is wrong, but for `changes`; those of the control and the trainer by prefix."""
    whole = {
        **{"time": 10_000.0, "running_s": 5_000.0, "logs": "logs", "waiting_share": 0.004, "drift_warnings": []},
        **vars(CONTROL),
        "trainer": {"time": 9_990.0, "step": 5, "steps": 10},
        "books": {"cut": 10, "ready": 4, "leased": 3, "trained": 2, "validation": 1, "retired_validation": 0},
    }
    whole["books"] |= {"quarantined": 0, "trained_again": 5}
    for name, value in changes.items():
        outer, _, inner = name.partition("__")
        whole[outer] = {**whole[outer], inner: value} if inner else value
    return whole


# ---- health ----


def test_nothing_is_wrong_with_a_healthy_lake():
    assert status.problems_of(healthy(), age_s=2.0) == []


@pytest.mark.parametrize(
    ("changes", "age_s", "expected"),
    [
        ({}, 31.0, "the supervisor has said nothing for 31 s"),
        ({"has_disk": False}, 1.0, "below its floor"),
        ({"crashes": 2}, 1.0, "2 crashes of children within the last hour"),
        ({"paused_s": 299.0}, 1.0, "nothing is started for 299 s"),
        ({"trainer__time": 9_399.0}, 1.0, "the trainer has said nothing for 601 s"),
        ({"trainer": {}}, 1.0, "the trainer has said nothing for 5000 s"),
        ({"waiting_share": 0.11}, 1.0, "waited for data 11%"),
        ({"books__cut": 13}, 1.0, "off by 3 clips"),
        ({"drift_warnings": ["level has drifted"]}, 1.0, "level has drifted"),
    ],
)
def test_each_thing_that_can_be_wrong_is_one_line(changes, age_s, expected):
    (problem,) = status.problems_of(healthy(**changes), age_s)
    assert expected in problem and "\n" not in problem


@pytest.mark.parametrize("changes", [{"trainer": {}}, {"waiting_share": 0.9}, {"waiting_share": None}])
def test_a_lake_that_has_just_started_is_not_ill_because_the_trainer_still_loads_or_waits(changes):
    assert status.problems_of(healthy(running_s=590.0, **changes), age_s=1.0) == []


@pytest.mark.parametrize(
    ("words", "code", "state", "said"),
    [
        (None, 1, "not running", []),
        (("shown", "disk"), 0, "running", ["health      good", "3, filling; full 2 times", "not measured"]),
        (("shown", "full"), 3, "running", ["health      the disk is below its floor"]),
        (("silent", ""), 0, "starting", []),
    ],
    ids=["nobody", "healthy", "unhealthy", "starting"],
)
def test_the_exit_code_of_status_tells_health_and_the_json_says_the_same(
    lake, supervisor_of, capsys, words, code, state, said
):
    if words:
        supervisor_of(*words)
    assert status.show(lake.root, as_json=False) == code
    table = capsys.readouterr().out
    assert f"{lake.root}: {state}\n" in table and "6 unread clips" in table
    assert [text for text in said if text not in table] == []
    assert status.show(lake.root, as_json=True) == code
    out = capsys.readouterr().out
    answer = json.loads(out)
    assert out.count("\n") == 1 and answer["is_running"] == (words is not None)
    assert answer["unread_clips"] == 6 and bool(answer["problems"]) == (code == 3)


def test_what_a_dead_supervisor_said_last_is_not_taken_for_the_present(lake, supervisor_of, capsys):
    process = supervisor_of("shown", "disk")
    process.kill()
    process.wait()
    path = lake.root / "status.json"  # its number belongs to another process by now
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pid": os.getpid()}))
    add_shard(lake, 4)
    assert status.show(lake.root, as_json=False) == 1
    table = capsys.readouterr().out
    assert "10 unread clips" in table and "clips/s" not in table and "health" not in table


def test_the_table_shows_the_reservoir_as_a_bar_and_the_skips_by_reason(lake, capsys):
    lake.db.execute("INSERT INTO totals VALUES ('skipped: too short', 7), ('recordings', 9)")
    lake.db.execute("UPDATE settings SET value = ? WHERE name = 'cap_bytes'", (str(4 * lake.used_bytes()),))
    status.show(lake.root, as_json=False)
    table = capsys.readouterr().out
    assert f"[{'#' * 8}{'-' * 22}] 25% of" in table and "9 read; skipped: 7 too short" in table


def test_the_books_tell_of_clips_in_skipped_steps_where_there_are_any(lake):
    found = {"status.json": None}
    for num_skipped in (None, 0.0, 24.0):
        found[num_skipped] = status.look_at(lake.root) | {"trainer": {"skipped_clips": num_skipped}}
    lines = {
        n: next(x for x in status.table_of(lake.root, found[n]) if x.startswith("books")) for n in (None, 0.0, 24.0)
    }
    assert lines[None] == lines[0.0] and "not finite" not in lines[0.0]
    assert lines[24.0] == lines[0.0] + "; of the trained, 24 were in steps that were skipped as not finite"


def test_looking_opens_no_tar_and_lists_no_folder_that_grows_with_the_lake(lake, monkeypatch, capsys):
    for folder in ("shards", "val", "quarantine"):
        (lake.root / folder).rename(lake.root / f"{folder}-moved-away")
    assert status.show(lake.root, as_json=True) == 1
    status.Display(lake, lake.root / "run").show(CONTROL)


# ---- what is measured ----


def looked(*looks: tuple[float, dict, int]) -> history.Recent:
    """After looks at (seconds, trainer, clips read)."""
    recent = history.Recent()
    for now_s, trainer, read in looks:
        recent.look(now_s, {"time": time.time(), **trainer}, out=read, **{"in": 2 * read})
    return recent


def test_rates_are_those_of_the_last_minute_and_the_eta_follows_from_the_steps():
    looks = [(t, {"step": t // 2, "steps": 1000}, 100 * min(t, 540) + 400 * max(0, t - 540)) for t in range(0, 602, 2)]
    recent = looked(*looks)
    shown = recent.summary({"unread_clips": 8_000, "trainer": {"step": 300, "steps": 1000}})
    assert shown["clips_per_s"] == {"in": pytest.approx(800), "out": pytest.approx(400)}
    assert shown["stock_s"] == pytest.approx(20) and shown["eta_s"] == pytest.approx(1400)


def test_what_is_not_known_yet_is_none_and_not_zero():
    shown = looked((0, {}, 0)).summary({"unread_clips": 5, "trainer": {}})
    assert shown == {
        **{"clips_per_s": {"in": None, "out": None}, "stock_s": None},
        **{"waiting_share": None, "eta_s": None},
    }


def test_the_share_of_waiting_counts_a_wait_that_is_not_over_and_forgets_no_trainer_before():
    steps = [(t, {"waited_s": 100.0}, 0) for t in (0, 10)]  # what it waited before we came is not counted
    steps += [(20, {"waited_s": 105.0}, 0)]  # 5 s, told when they were over
    steps += [(t, {"waited_s": 105.0, "is_waiting": True}, 0) for t in (30, 40)]  # 20 s, as seen
    assert looked(*steps).per_s("waited", 600) == pytest.approx(25 / 40)
    steps += [(50, {"waited_s": 124.0}, 0)]  # the trainer knows better than we: 19 s
    assert looked(*steps).per_s("waited", 600) == pytest.approx(24 / 50)
    steps += [(60, {"waited_s": 3.0}, 0)]  # another trainer
    assert looked(*steps).per_s("waited", 600) == pytest.approx(27 / 60)


def test_a_trainer_that_is_dead_does_not_wait():
    dead = {"time": time.time() - 100, "is_waiting": True}
    assert looked((0, dead, 0), (10, dead, 0)).per_s("waited", 600) == 0


def test_a_full_disk_does_not_end_the_supervisor_and_is_said_once(lake, monkeypatch, capsys):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    now = [100.0]
    monkeypatch.setattr(status, "write_json", full)
    monkeypatch.setattr(status.time, "monotonic", lambda: now[0])
    display = status.Display(lake, lake.root / "run")
    for now[0] in (100.0, 103.0, 106.0):
        display.show(CONTROL)
    assert capsys.readouterr().err.count("is full") == 1
    monkeypatch.setattr(status, "write_json", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    now[0] = 110.0
    with pytest.raises(OSError, match="broken"):
        display.show(CONTROL)


# ---- history ----


def shown(lake: Lake, looks: list[float], monkeypatch, **trainer: object) -> None:
    """Let a supervisor show the lake at these seconds."""
    now = [0.0]
    with monkeypatch.context() as patched:
        patched.setattr(status.time, "monotonic", lambda: now[0])
        patched.setattr(status.drift, "drift_of", lambda _: {"level": 0.125, "bands": math.nan})
        display = status.Display(lake, lake.root / "run")
        for now[0] in looks:
            Heartbeat(lake.root / "run" / "progress.json", "train").beat(1, **trainer)
            display.show(CONTROL)


def test_a_line_of_history_is_written_every_half_minute(lake, monkeypatch):
    shown(lake, [1_000.0 + t for t in range(0, 95, 1)], monkeypatch, step=7, loss=0.123456789, steps=9)
    lines = history.read(lake.root)
    assert len(lines) == 4
    line = lines[-1]
    assert (line["workers"], line["step"], line["loss"], line["in"]) == (3, 7, 0.12346, 0.0)
    assert line["drift"] == {"level": 0.125, "bands": None} and line["used_bytes"] == lake.used_bytes()
    assert all(later["time"] >= earlier["time"] for earlier, later in pairwise(lines))


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_a_line_that_was_cut_short_goes_when_the_next_one_comes(lake, monkeypatch, kept):
    shown(lake, [1_000.0 + 40 * i for i in range(kept)], monkeypatch)
    path = lake.root / "history.jsonl"
    with path.open("a") as f:
        f.write('{"time": 1.5, "used_')
    shown(lake, [2_000.0, 2_040.0], monkeypatch)
    assert len(history.read(lake.root)) == kept + 2


def test_thinning_keeps_the_mean_the_peaks_and_the_gaps():
    times = np.concatenate([np.arange(0, 30_000, 30.0), np.arange(90_000, 120_000, 30.0)])
    values = np.random.default_rng(1).random(len(times))
    values[[7, 1_200]] = 50.0, np.nan
    at, (mean, low, high) = history.thinned(times, values, most=100)
    drawn = ~np.isnan(mean)
    assert len(at) <= 103 and np.nanmax(high) == 50.0 and np.nanmin(low) == np.nanmin(values)
    assert mean[drawn][1:].mean() == pytest.approx(np.nanmean(values), rel=0.1)
    (gap,) = np.flatnonzero(~drawn)
    assert at[gap - 1] < 30_000 and at[gap + 1] >= 90_000


def test_a_short_history_is_drawn_as_it_is():
    at, (mean, low, high) = history.thinned(np.array([1.0, 2.0, 3.0]), np.array([5.0, np.nan, 7.0]))
    assert at.tolist() == [1, 3] and mean.tolist() == low.tolist() == high.tolist() == [5, 7]


@pytest.mark.parametrize("num_lines", [2, 5_000])
def test_the_picture_shows_a_curve_for_everything_that_was_measured(tmp_path, num_lines, monkeypatch):
    def line(i: int) -> str:
        fields = {"used_bytes": 2**30, "cap_bytes": 2**31, "unread_clips": 5, "in": None if i == 0 else 9.5, "out": 8.0}
        fields |= {"workers": 2, "waiting_share": 0.01, "step": i, "loss": None, "drift": {"level": 0.1}}
        return json.dumps({"time": 1e9 + 30 * i, **fields})

    (tmp_path / "history.jsonl").write_text("".join(line(i) + "\n" for i in range(num_lines)))
    labels, draw_curve = [], history.draw_curve
    monkeypatch.setattr(
        history, "draw_curve", lambda axes, label, *a: (labels.append(label), draw_curve(axes, label, *a))
    )
    assert history.draw(tmp_path).read_bytes().startswith(b"\x89PNG")
    assert labels == ["cap", "used", "into the lake", "out of it", "streamers", "waiting", "level"]


def test_without_history_there_is_nothing_to_draw_and_one_line_says_so(tmp_path):
    with pytest.raises(UserError, match="holds nothing to draw yet"):
        history.draw(tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---- stop ----


def test_stop_asks_the_supervisor_to_leave_and_waits_until_it_has(lake, supervisor_of, capsys, monkeypatch):
    monkeypatch.setattr(stop, "StopRequest", Patient)
    process = supervisor_of("shown", "disk")
    assert stop.stop(lake.root) == 0
    assert process.wait(timeout=10) == 0, "it was killed"
    assert "is stopped: 6 unread clips" in capsys.readouterr().out


def test_stop_says_so_when_the_supervisor_does_not_leave(lake, supervisor_of, monkeypatch, capsys):
    monkeypatch.setattr(stop, "StopRequest", Patient)
    monkeypatch.setattr(stop, "PATIENCE_S", 0.1)
    process = supervisor_of("shown", "disk")
    monkeypatch.setattr(stop.psutil.Process, "send_signal", lambda *_: None)
    with pytest.raises(UserError, match=f"process {process.pid} has not left after 0 s"):
        stop.stop(lake.root)


def test_stop_refuses_where_nothing_runs_and_where_it_cannot_tell_who(lake, supervisor_of):
    with pytest.raises(UserError, match=r"no supervisor runs .* status --lake"):
        stop.stop(lake.root)
    stranger = start_python("import sys; print('x', flush=True); sys.stdin.read()")
    (lake.root / "status.json").write_text(json.dumps({"pid": stranger.pid}))
    supervisor_of("silent")
    with pytest.raises(UserError, match="only just started"):
        stop.stop(lake.root)
    assert stranger.poll() is None, "a process was signalled that is not ours"
    stranger.communicate()


class Patient:
    """A StopRequest that nobody makes, without handlers that would stay in this process."""

    def __bool__(self) -> bool:
        return False

    def wait(self, seconds: float) -> None:
        time.sleep(min(seconds, 0.02))


def test_a_lake_that_is_not_there_is_no_lake_to_look_at(tmp_path):
    for look in (lambda root: status.show(root, as_json=True), stop.stop):
        with pytest.raises(UserError, match="no lake at"):
            look(Path(tmp_path / "nowhere"))
    assert list(tmp_path.iterdir()) == []
