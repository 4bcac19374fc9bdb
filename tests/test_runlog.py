"""Run logs: what a resumed run keeps, what a heartbeat costs, and that every process ends when it is told to."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from lake_tools import ROOT, environment

from hear_distill import runlog
from hear_distill.runlog import Heartbeat, Metrics, git_revision, read_heartbeat, read_metrics, write_config

SECONDS_TO_LEAVE = 5.0  # for a process that waits for nothing else


def lines_of(run: Path) -> list[dict]:
    """metrics.jsonl as another program would read it: every line whole, no NaN."""
    text = (run / "metrics.jsonl").read_text()
    assert text == "" or text.endswith("\n")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


@contextmanager
def metrics_of(run: Path, last_step: int) -> Iterator[Metrics]:
    """The metrics of a run that is resumed at `last_step`, closed afterwards as the end of its process would."""
    metrics = Metrics(run, last_step)
    yield metrics
    metrics.file.close()


def test_metrics_are_on_the_disk_line_by_line_while_the_run_goes_on(tmp_path):
    before = time.time()
    with metrics_of(tmp_path, last_step=0) as metrics:
        metrics.log(5, loss=0.25, lr=1e-3)
        assert len(lines_of(tmp_path)) == 1
        metrics.log(10, loss=0.125)
        first, second = lines_of(tmp_path)
    assert (first["step"], first["loss"], first["lr"]) == (5, 0.25, 1e-3)
    assert (second["step"], second["loss"]) == (10, 0.125)
    assert before <= first["time"] <= second["time"] <= time.time()


def test_a_resumed_run_drops_the_lines_after_its_checkpoint_and_continues(tmp_path):
    with metrics_of(tmp_path, last_step=0) as metrics:
        for step in (5, 10, 15, 20):
            metrics.log(step, loss=1 / step)
    with metrics_of(tmp_path, last_step=12) as metrics:
        metrics.log(15, loss=7.0)
    assert [(line["step"], line["loss"]) for line in lines_of(tmp_path)] == [(5, 0.2), (10, 0.1), (15, 7.0)]


def test_both_lines_of_the_step_of_the_checkpoint_are_kept(tmp_path):
    with metrics_of(tmp_path, last_step=0) as metrics:
        metrics.log(10, loss=0.5)
        metrics.log(10, anchor_mse=0.25)
    with metrics_of(tmp_path, last_step=10):
        pass
    assert [sorted(line) for line in lines_of(tmp_path)] == [["loss", "step", "time"], ["anchor_mse", "step", "time"]]


@pytest.mark.parametrize("cut", ['{"step": 10, "lo', '{"step": 10, "loss": 3.0}'], ids=["half", "all but the newline"])
def test_a_last_line_that_a_kill_cut_short_is_dropped(tmp_path, cut):
    with metrics_of(tmp_path, last_step=0) as metrics:
        metrics.log(5, loss=0.2)
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write(cut)
    assert [line["step"] for line in read_metrics(tmp_path)] == [5]
    with metrics_of(tmp_path, last_step=99) as metrics:
        metrics.log(15, loss=0.1)
    assert [line["step"] for line in lines_of(tmp_path)] == [5, 15]


def test_a_new_run_has_no_metrics(tmp_path):
    assert read_metrics(tmp_path) == []
    with metrics_of(tmp_path / "new", last_step=0):
        assert lines_of(tmp_path / "new") == []


def test_numbers_that_are_not_finite_become_null(tmp_path):
    with metrics_of(tmp_path, last_step=0) as metrics:
        metrics.log(1, a=float("nan"), b=float("inf"), c=float("-inf"), d=-2.5)
    (line,) = lines_of(tmp_path)
    assert [line[name] for name in "abcd"] == [None, None, None, -2.5]


def test_the_configuration_is_written_with_what_was_resolved_and_the_revision_of_the_code(tmp_path):
    @dataclass
    class Config:
        out: Path = Path("runs/x")
        revision: str | None = None

    write_config(tmp_path, Config(), revision="abc123", teacher="small")
    written = json.loads((tmp_path / "config.json").read_text())
    assert written == {"out": "runs/x", "revision": "abc123", "teacher": "small", "code": git_revision()}


def test_a_heartbeat_is_written_at_once_then_at_most_every_two_seconds_unless_forced(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(runlog.time, "monotonic", lambda: now[0])
    heartbeat = Heartbeat(tmp_path / "beat.json", "stream")
    seen = []
    for progress, seconds in enumerate((0, 0.5, 1.0, 0.4, 0.2, 1.9, 0.2)):
        now[0] += seconds
        heartbeat.beat(progress, clips=10 * progress)
        seen.append(read_heartbeat(tmp_path / "beat.json")["progress"])
    assert seen == [0, 0, 0, 0, 4, 4, 6]
    heartbeat.beat(7, force=True, clips=1)
    last = read_heartbeat(tmp_path / "beat.json")
    assert (last["stage"], last["pid"], last["progress"], last["clips"]) == ("stream", os.getpid(), 7, 1)


def test_reading_a_heartbeat_that_is_not_there_gives_nothing(tmp_path):
    assert read_heartbeat(tmp_path / "beat.json") == {}


def test_reading_a_heartbeat_that_is_deleted_at_this_moment_gives_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda path: True)
    assert read_heartbeat(tmp_path / "beat.json") == {}


def test_a_number_that_is_not_finite_does_not_stop_a_heartbeat(tmp_path):
    Heartbeat(tmp_path / "beat.json", "train").beat(1, loss=float("nan"))
    assert read_heartbeat(tmp_path / "beat.json")["loss"] is None


WAITING = """
import sys
from hear_distill.runlog import StopRequest

stop = StopRequest()
print("waiting", flush=True)
stop.wait(60)
print("asked" if stop else "not asked", flush=True)
sys.exit(0)
"""
STUBBORN = """
import time
from hear_distill import runlog

runlog.SECONDS_TO_END = 0.5
stop = runlog.StopRequest()
print("waiting", flush=True)
time.sleep(60)
"""
NOT_LISTENING = """
import sys, time
from dataclasses import dataclass
from hear_distill import cli

@dataclass(frozen=True)
class Config: ...

def list_the_source(config):
    print("waiting", flush=True)
    time.sleep(60)

sys.argv = ["stage"]
cli.run(list_the_source, {"best": Config()}, "")
"""
# Whoever asks a child something, as run_lake.py does before it starts anything.
ASKING = """
import runpy, sys
from pathlib import Path

stage = runpy.run_path(sys.argv[1])
print("waiting", flush=True)
stage["ask"](Path(sys.argv[2]), stage["Config"]())
"""


@pytest.fixture
def start():
    """Start Python code that says `waiting` once it is ready; whatever is left of it ends with the test."""
    processes = []

    def begin(code: str, *arguments: object, **options) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", code, *map(str, arguments)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
        processes.append(process)
        assert process.stdout.readline() == "waiting\n"
        return process

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


def end_of(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    """Exit code, stdout and stderr, within seconds."""
    out, err = process.communicate(timeout=SECONDS_TO_LEAVE)
    return process.returncode, out, err


def test_a_process_that_nobody_asked_to_stop_waits_as_long_as_it_said(start):
    process = start(WAITING.replace("60", "1.0"))
    begin = time.monotonic()
    assert end_of(process) == (0, "not asked\n", "")
    assert time.monotonic() - begin > 0.9


def test_sigterm_asks_to_stop(start):
    process = start(WAITING)
    process.send_signal(signal.SIGTERM)
    assert end_of(process) == (0, "asked\n", "")


def test_the_first_sigint_asks_to_stop_and_says_so(start):
    process = start(WAITING)
    process.send_signal(signal.SIGINT)
    code, out, err = end_of(process)
    assert (code, out) == (0, "asked\n")
    assert "press Ctrl-C again" in err and len(err.splitlines()) == 1


def test_a_second_sigint_ends_the_process_at_once(start):
    process = start(STUBBORN)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    code, _, err = end_of(process)
    assert code == 1 and "interrupted twice" in err and "Traceback" not in err


def with_pipe(start, code: str) -> tuple["subprocess.Popen[str]", int]:
    """A process that watches a pipe of ours, and the end that we hold."""
    reader, writer = os.pipe()
    process = start(code, pass_fds=(reader,), env={**os.environ, runlog.SUPERVISOR_FD: str(reader)})
    os.close(reader)
    return process, writer


def test_the_closing_of_the_supervisors_pipe_asks_to_stop(start):
    process, writer = with_pipe(start, WAITING)
    time.sleep(0.3)
    assert process.poll() is None
    os.close(writer)
    assert end_of(process) == (0, "asked\n", "")


def test_a_child_that_does_not_leave_when_the_pipe_closed_is_ended(start):
    process, writer = with_pipe(start, STUBBORN)
    os.close(writer)
    assert end_of(process)[0] == 1


def test_a_child_that_does_not_listen_yet_ends_at_once_when_the_pipe_closes(start):
    process, writer = with_pipe(start, NOT_LISTENING)
    os.close(writer)
    assert end_of(process)[0] == 1


def test_whoever_is_only_asked_ends_with_the_one_that_asks(start, tmp_path):
    (tmp_path / "stream.py").write_text(NOT_LISTENING.replace('"waiting"', '"asked", file=open("asked", "w")'))
    supervisor = ROOT / "datalake" / "run_lake.py"
    process = start(ASKING, supervisor, tmp_path / "stream.py", env=environment(), cwd=tmp_path)
    end = time.monotonic() + 60
    while not (tmp_path / "asked").exists():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    (child,) = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    end = time.monotonic() + SECONDS_TO_LEAVE
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end, "it was left behind"
        time.sleep(0.02)


def test_the_revision_is_the_commit_and_says_when_files_differ(tmp_path, monkeypatch):
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false")
        command = ["git", *identity, *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    monkeypatch.setattr(runlog, "__file__", str(tmp_path / "runlog.py"))
    assert git_revision() == "not a git checkout"
    git("init", "--quiet")
    assert git_revision() == "not a git checkout"  # no commit yet: nothing to name
    (tmp_path / "a.txt").write_text("one")
    git("add", "a.txt")
    git("commit", "--quiet", "-m", "first")
    assert git_revision() == git("rev-parse", "HEAD")
    (tmp_path / "a.txt").write_text("two")
    assert git_revision() == git("rev-parse", "HEAD") + "-dirty"


def test_the_revision_never_raises_where_git_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_revision() == "git is not installed"
