"""The launcher of ranks: who starts them, how they end, and what their exit codes become. Real processes."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from lake_tools import ROOT, environment
from test_run_lake import House, children_of, end_of, house, source, use_the_real_trainer, wait_for  # noqa: F401

from hear_distill import checkpoint
from hear_distill.files import GIB
from hear_distill.launch import exit_code
from hear_distill.ranks import RANK_LOST
from hear_distill.runlog import SUPERVISOR_FD

SECONDS_TO_LEAVE = 10.0
RANK = r"""
import os, sys, time
from pathlib import Path
from hear_distill.runlog import StopRequest

stop, folder, code = StopRequest(), Path(sys.argv[1]), int(sys.argv[2])
names = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
words = " ".join(os.environ[name] for name in names)
(folder / (os.environ["RANK"] + ".tmp")).write_text(f"{os.getpid()} {words}")
(folder / (os.environ["RANK"] + ".tmp")).rename(folder / (os.environ["RANK"] + ".txt"))
end = time.monotonic() + 60
while not stop and code < 0 and time.monotonic() < end:
    time.sleep(0.02)
if code >= 0 and os.environ["RANK"] == "1":
    sys.exit(code)
if code >= 0:
    time.sleep(60)
if not stop:
    sys.exit("nobody asked this rank to leave")
os.write(1, f"rank {os.environ['RANK']} leaves in good order\n".encode())  # whole, as two ranks share this pipe
"""


@pytest.fixture
def launch(tmp_path):
    """Start a launcher of toy ranks, which stay until they are asked to leave, or of which one leaves with a code."""
    (tmp_path / "rank.py").write_text(RANK)
    processes = []

    def start(*flags: object, code: int = -1, **options) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "hear_distill.launch", *map(str, flags), str(tmp_path / "rank.py")]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        words = {"env": environment(), "cwd": ROOT, "start_new_session": True} | options
        processes.append(subprocess.Popen([*command, str(tmp_path), str(code)], **pipes, **words))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def rank_words(folder: Path, num_ranks: int) -> list[list[int]]:
    """Process and environment of each rank, once all run."""
    paths = [folder / f"{rank}.txt" for rank in range(num_ranks)]
    wait_for(lambda: all(path.exists() for path in paths))
    return [[int(word) for word in path.read_text().split()] for path in paths]


def assert_gone(pids: list[int], began: float) -> None:
    """None of these processes is left in time."""
    wait_for(lambda: not any(map(psutil.pid_exists, pids)), SECONDS_TO_LEAVE - (time.monotonic() - began))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ranks_that_are_asked_to_leave_do_so_in_good_order_and_that_is_a_success(launch, tmp_path, number):
    process = launch("--gpus", 2)
    words = rank_words(tmp_path, 2)
    assert [rank[1:] for rank in words] == [[0, 0, 0, 2, 2], [1, 1, 0, 2, 2]]
    os.killpg(process.pid, number)  # as a terminal does
    code, out, _ = end_of(process)
    assert code == 0 and sorted(out.splitlines()) == [f"rank {rank} leaves in good order" for rank in range(2)]


@pytest.mark.parametrize("code", [2, os.EX_TEMPFAIL])
def test_what_one_rank_ends_with_ends_all_and_reaches_the_supervisor(launch, tmp_path, code):
    process = launch("--gpus", 2, code=code)
    words = rank_words(tmp_path, 2)
    assert end_of(process)[0] == code
    assert not any(psutil.pid_exists(rank[0]) for rank in words)


def test_the_exit_code_is_that_of_the_rank_that_began_it():
    lost = RANK_LOST
    assert exit_code([lost, -signal.SIGTERM, 73, 1]) == 73
    assert exit_code([-signal.SIGKILL, lost]) == 128 + 9
    assert exit_code([lost, lost]) == lost
    assert exit_code([-signal.SIGKILL, 2]) == 2  # the first was killed because it did not leave


@pytest.mark.parametrize("flags", [("--gpus", 0), ("--gpus", 2, "--num-nodes", 2)], ids=["no rank", "nowhere to meet"])
def test_a_launch_that_cannot_work_is_refused_in_one_line(launch, flags):
    code, _, err = end_of(launch(*flags))
    assert code == 2 and "error: --" in err and "Traceback" not in err


def test_a_launch_of_nothing_is_refused():
    command = [sys.executable, "-m", "hear_distill.launch", "--gpus", "1"]
    pipes = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    done = subprocess.run(command, env=environment(), cwd=ROOT, check=False, **pipes)
    assert done.returncode == 2 and "no script to start" in done.stderr


def test_ranks_of_a_killed_launcher_end_by_themselves(launch, tmp_path):
    process = launch("--gpus", 2)
    words, began = rank_words(tmp_path, 2), time.monotonic()
    process.kill()
    assert_gone([rank[0] for rank in words], began)


def test_launcher_and_ranks_end_when_the_pipe_of_the_supervisor_closes(launch, tmp_path):
    reader, writer = os.pipe()
    process = launch("--gpus", 2, pass_fds=(reader,), env=environment() | {SUPERVISOR_FD: str(reader)})
    os.close(reader)
    words, began = rank_words(tmp_path, 2), time.monotonic()
    os.close(writer)
    assert_gone([rank[0] for rank in words], began)
    assert end_of(process)[0] == 1


def free_port() -> int:
    """Of this machine, chosen by the operating system."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def test_two_machines_meet_at_the_rendezvous_in_the_order_of_their_numbers(launch, tmp_path):
    flags = ["--num-nodes", 2, "--rendezvous", f"localhost:{free_port()}"]
    processes = [launch("--gpus", gpus, "--node-rank", node, *flags) for node, gpus in ((1, 1), (0, 1))]
    words = rank_words(tmp_path, 2)
    assert [rank[1:] for rank in words] == [[0, 0, 0, 2, 1], [1, 0, 1, 2, 1]]
    for process in processes:
        process.terminate()
    assert [end_of(process)[0] for process in processes] == [0, 0]


# ---- under the supervisor ----


def is_running(process: psutil.Process) -> bool:
    """Not gone, and not only waiting for its parent to look."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_supervisor_with_two_ranks_is_killed_and_run_again_and_trains_all(house):  # noqa: F811
    use_the_real_trainer(house)
    house.cap_bytes = GIB // 5
    process = house.start("--gpus", "2", dry=False)
    wait_for((house.root / "run" / "latest.pt").exists, 180)
    family = psutil.Process(process.pid).children(recursive=True)
    (launcher,) = children_of(process, "distill_hear_vit_s_canon2d.py")
    assert len(launcher.children()) == 2
    process.kill()
    process.wait()
    wait_for(lambda: not any(is_running(child) for child in family))  # within ten seconds where nothing else runs
    first = checkpoint.load(house.root / "run" / "latest.pt")["samples"]
    code, out, err = end_of(house.start("--gpus", "2", dry=False), seconds=240)
    assert code == 0, err
    assert "hear_distill.launch --gpus 2" in out and "the lake is drained" in out
    books = house.ledger(lambda lake: lake.books())
    state = checkpoint.load(house.root / "run" / "latest.pt")
    assert books.balance() == 0 and books.trained == state["samples"] > first
    assert books.ready + books.leased < 20
