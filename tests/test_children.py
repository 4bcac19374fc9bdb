"""The children of a supervisor: nobody outlives his time, logs stay small, and a user's command holds nobody up."""

import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
from lake_tools import start_python

from hear_distill import children
from hear_distill.children import Child, Hook, Restarts, end_children, rotate, start_child
from hear_distill.files import UserError

SECONDS = 30.0
STAY = "import time; print('stays', flush=True); time.sleep(600)"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {STAY}"
# Starts what its argument says in a session of its own, as torchrun starts its ranks, writes down its id, then crashes.
PARENT = """
import subprocess, sys
process = subprocess.Popen([sys.executable, "-c", sys.argv[1]], start_new_session=True)
print(process.pid, flush=True)
sys.exit(3)
"""
# A supervisor, its child, and that one's child, which keep the pipe; each writes down its id.
SUPERVISOR = """
import os, sys, time
from pathlib import Path
from hear_distill.children import start_child
folder = Path(sys.argv[1])
code = '''
import os, subprocess, sys
from pathlib import Path
from hear_distill.runlog import SUPERVISOR_FD, StopRequest
stop, folder, depth = StopRequest(), Path(sys.argv[1]), int(sys.argv[2])
if depth:
    again = [sys.executable, "-c", sys.argv[3], sys.argv[1], str(depth - 1), sys.argv[3]]
    subprocess.Popen(again, pass_fds=[int(os.environ[SUPERVISOR_FD])], start_new_session=True)
(folder / f"{depth}.pid").write_text(str(os.getpid()))
stop.wait(600)
'''
reader, writer = os.pipe()
command = [sys.executable, "-c", code, str(folder), "1", code]
start_child("child", command, folder / "logs" / "child.log", reader, lambda pid: folder / "beat.json", 1)
print("started", flush=True)
time.sleep(600)
"""


def wait_for(is_so) -> None:
    """Until the condition holds; a hang is a failure."""
    end = time.monotonic() + SECONDS
    while not is_so():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.fixture
def begin(tmp_path):
    """Start Python code as a child, wait until it has said something; what is left of it ends with the test."""
    started: list[Child] = []
    reader, writer = os.pipe()

    def start(code: str, *arguments: str) -> Child:
        name = f"child-{len(started)}"
        command, log = [sys.executable, "-c", code, *arguments], tmp_path / "logs" / f"{name}.log"
        child = start_child(name, command, log, reader, lambda pid: tmp_path / f"{pid}.json", 1)
        started.append(child)
        wait_for(child.log.read_text)
        return child

    yield start
    for child in started:
        child.kill()
        child.process.wait()
    os.close(reader)
    os.close(writer)


# ---- ends ----


def test_what_a_child_that_crashed_has_left_behind_in_another_session_is_killed(begin):
    bystander, parent = begin(STAY), begin(PARENT, STUBBORN)
    grandchild = psutil.Process(int(parent.last_words().split()[-1]))
    wait_for(lambda: parent.poll() is not None)
    assert parent.poll() == 3
    wait_for(lambda: not grandchild.is_running() or grandchild.status() == psutil.STATUS_ZOMBIE)
    assert bystander.poll() is None


def test_a_child_that_is_killed_takes_what_it_started_with_it(begin):
    parent = begin(PARENT.replace("sys.exit(3)", STAY), STUBBORN)
    grandchild = psutil.Process(int(parent.log.read_text().split()[0]))
    parent.kill()
    wait_for(lambda: parent.poll() is not None)
    wait_for(lambda: not grandchild.is_running() or grandchild.status() == psutil.STATUS_ZOMBIE)


def test_children_that_are_asked_to_leave_do_and_one_that_does_not_is_killed(begin):
    good, stubborn = begin(STAY), begin(STUBBORN)
    end_children([good, stubborn], seconds=1.0)
    assert (good.poll(), stubborn.poll()) == (-signal.SIGTERM, -signal.SIGKILL)


def test_children_are_killed_at_once_when_the_wait_for_them_is_interrupted(begin, monkeypatch):
    stubborn, calls = begin(STUBBORN), []

    def interrupt(processes, timeout):
        calls.append(timeout)
        if len(calls) == 1:
            sys.exit("interrupted twice")

    monkeypatch.setattr(children.psutil, "wait_procs", interrupt)
    with pytest.raises(SystemExit):
        end_children([stubborn], seconds=600.0)
    assert stubborn.process.wait(SECONDS) == -signal.SIGKILL


def test_a_child_and_its_own_child_end_when_their_supervisor_is_killed(tmp_path):
    supervisor = start_python(SUPERVISOR, tmp_path)
    wait_for(lambda: len(list(tmp_path.glob("*.pid"))) == 2 and all(p.read_text() for p in tmp_path.glob("*.pid")))
    family = [psutil.Process(int(path.read_text())) for path in tmp_path.glob("*.pid")]
    supervisor.kill()
    supervisor.communicate()
    _, alive = psutil.wait_procs(family, timeout=10.0)
    assert alive == []


# ---- logs ----


def test_a_log_that_has_become_large_is_moved_aside_the_last_ones_are_kept_and_its_writer_goes_on(tmp_path):
    log = tmp_path / "train.log"
    with log.open("ab", buffering=0) as f:
        for number in range(6):
            f.write(f"{number}".encode() * 100)
            rotate(log, limit_bytes=99, num_kept=3)
            rotate(log, limit_bytes=99, num_kept=3)  # nothing to do
        f.write(b"end")
    names = sorted(tmp_path.iterdir())
    assert [path.name for path in names] == ["train.log", "train.log.1", "train.log.2", "train.log.3"]
    assert [path.read_bytes()[:3] for path in names] == [b"end", b"555", b"444", b"333"]


def child_with_log(tmp_path: Path, text: str) -> Child:
    """A child that only has a log."""
    log = tmp_path / "child.log"
    log.write_text(text)
    return Child("stream-3", log, None, tmp_path / "beat.json", "")


def test_the_last_words_are_the_last_line_of_however_long_a_log(tmp_path):
    assert child_with_log(tmp_path, "first\n" * 9_999 + "last\n\n").last_words() == "last"
    assert child_with_log(tmp_path, "").last_words() == "it said nothing"


def test_what_is_wrong_is_found_before_what_libraries_say_at_the_end(tmp_path):
    child = child_with_log(tmp_path, "error: no token\n[rank0]: process group has NOT been destroyed\n")
    assert child.last_words("error: ") == "error: no token"
    assert child_with_log(tmp_path, "usage: x\n").last_words("error: ") == "usage: x"


def test_each_warning_is_found_once_and_whole_also_after_its_log_was_moved_aside(tmp_path):
    child = child_with_log(tmp_path, "WARNING: a\nstep 1\nWARN")
    assert child.new_warnings() == ["WARNING: a"]
    with child.log.open("a") as f:
        f.write("ING: b\n")
    assert child.new_warnings() == ["WARNING: b"] and child.new_warnings() == []
    child.log.write_text("WARNING: c\n")
    assert child.new_warnings() == ["WARNING: c"]


# ---- the user's command ----


@pytest.fixture
def hook(tmp_path):
    """Make a hook; `hook.said` collects what it says."""
    made = []

    def make(command: str) -> Hook:
        said: list[str] = []
        hook = Hook(command, tmp_path / "lake", said.append)
        hook.said = said
        made.append(hook)
        return hook

    yield make
    for hook in made:
        hook.close(0.0)


def test_the_users_command_is_told_what_happened_whatever_is_in_the_message(hook, tmp_path):
    told = hook(f'printf "%s|%s|%s" "$HEAR_EVENT" "$HEAR_MESSAGE" "$HEAR_LAKE" > {tmp_path}/told')
    told.send("outage", 'train: "$(touch oops)"; rm `x`\n')
    told.close(SECONDS)
    assert (tmp_path / "told").read_text() == f'outage|train: "$(touch oops)"; rm `x`\n|{tmp_path / "lake"}'
    assert told.said == []


def test_nobody_waits_for_the_users_command_and_when_too_many_run_that_is_said(hook):
    slow = hook("sleep 600")
    begin = time.monotonic()
    for _ in range(children.HOOKS_AT_ONCE + 1):
        slow.send("drift", "bands")
    assert time.monotonic() - begin < SECONDS
    (said,) = slow.said
    assert "none was started for drift: bands" in said
    processes = [process for _, process in slow.running]
    slow.close(0.0)
    assert [process.poll() for process in processes] == [-signal.SIGKILL] * children.HOOKS_AT_ONCE


def test_a_command_that_fails_or_takes_too_long_is_named(hook, monkeypatch):
    failing = hook("exit 7")
    failing.send("stop", "finished")
    failing.close(SECONDS)
    assert failing.said == ["--on-event: the command for stop ended with code 7"]
    monkeypatch.setattr(children, "HOOK_S", 0.2)
    slow = hook("sleep 600")
    slow.send("stop", "finished")
    slow.close(SECONDS)
    assert slow.said == ["--on-event: the command for stop took more than 0 s"]


def test_a_trouble_and_a_crash_loop_run_the_users_command_and_a_trouble_that_lasts_runs_it_once(tmp_path):
    sent, child = [], child_with_log(tmp_path, "error: gone\n")
    hook = Hook("", tmp_path, lambda _: None)
    hook.send = lambda *event: sent.append(event)
    restarts = Restarts(hook, lambda _: None)
    for num_cut in (5, 6, 6):  # others still cut
        restarts.wait_out(child, os.EX_TEMPFAIL, num_cut)
    assert [event for event, _ in sent] == ["outage"] and not restarts.may_start("stream")
    restarts.end_troubles(6)
    assert restarts.troubles
    restarts.end_troubles(7)
    assert not restarts.troubles
    for _ in range(children.CRASHES_PER_HOUR):
        restarts.book_crash(child, -11, is_decoder=False)
    with pytest.raises(UserError, match="4 crashes within an hour"):
        restarts.book_crash(child, -11, is_decoder=False)
    assert [event for event, _ in sent] == ["outage", "crash-loop"]


def test_without_a_command_an_event_starts_nothing(hook, monkeypatch):
    monkeypatch.setattr(children.psutil, "Popen", lambda *_, **__: pytest.fail("started"))
    hook("").send("stop", "finished")


def test_a_child_hears_of_no_other_pipe_and_no_secret_is_on_its_command_line(begin, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    code = "import os; print(sorted(int(n) for n in os.listdir('/proc/self/fd')), flush=True); " + STAY
    child = begin(code)
    wait_for(lambda: "stays" in child.log.read_text())
    fds = child.log.read_text().splitlines()[0]
    assert len(fds.split(",")) == 5  # 0 to 2, the pipe, and the folder that is being listed
    assert "secret" not in " ".join(child.process.cmdline())
