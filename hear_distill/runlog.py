"""What a process tells others: its configuration, its metrics, its heartbeat; and that it ends with its supervisor.

in:   dataclasses and numbers
out:  <run>/config.json, <run>/metrics.jsonl, heartbeat files (replaced whole)
"""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hear_distill.files import atomic_write, write_json

HEARTBEAT_S = 2.0
SUPERVISOR_FD = "HEAR_SUPERVISOR_FD"  # read end of a pipe that the supervisor holds open while it lives
LOOK_UP_S = 0.05  # how late a sleeping process notices that it should stop
LAUNCHER_PID = "HEAR_LAUNCHER_PID"  # of the parent of a process without a pipe: of a rank (torchrun passes none on)
LOST_A_RANK = "leaving, as another rank has ended"  # begins what ranks say that only follow another one
SECONDS_TO_END = 8.0  # from the closed pipe to the hard end; a checkpoint fits


def git_revision() -> str:
    """Commit of this checkout, `-dirty` if files differ from it, or `not a git checkout`."""
    here = Path(__file__).parent
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
        described = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "git is not installed"
    return described.stdout.strip() if described.returncode == 0 else "not a git checkout"


def write_config(run: Path, config: Any, **resolved: Any) -> None:
    """Write <run>/config.json: every field of the dataclass, what was resolved at run time, and the code's revision."""
    write_json(run / "config.json", {**dataclasses.asdict(config), **resolved, "code": git_revision()})


class Metrics:
    """One JSON line per log point in <run>/metrics.jsonl.

    A resumed run continues after `last_step`: later lines belong to a history that its checkpoint does not know, and
    are dropped, so the file always tells the story of the surviving model.
    """

    def __init__(self, run: Path, last_step: int) -> None:
        self.path = run / "metrics.jsonl"
        kept = [line for line in read_metrics(run) if line["step"] <= last_step]
        with atomic_write(self.path) as f:
            f.writelines(json.dumps(line).encode() + b"\n" for line in kept)
        self.file = self.path.open("a")

    def log(self, step: int, **values: float) -> None:
        """Append one line; a value that is not finite is written as null."""
        line = {"step": step, "time": time.time(), **finite_or_null(values)}
        self.file.write(json.dumps(line, allow_nan=False) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Every line is on its way to the disk already."""
        self.file.close()


def finite_or_null(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity; other programs read null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of <run>/metrics.jsonl. A last line that a kill cut short is left out; it was never complete."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


class Heartbeat:
    """A small JSON file, replaced at most every two seconds.

    `progress` only grows. The supervisor watches that number on its own monotonic clock; it never compares clocks.
    """

    def __init__(self, path: Path, stage: str) -> None:
        self.path = path
        self.fixed = {"stage": stage, "pid": os.getpid()}
        self.next_write = 0.0

    def beat(self, progress: int, force: bool = False, **values: Any) -> None:
        """Say how far this process has come; cheap enough to call in a loop."""
        if force or time.monotonic() >= self.next_write:
            write_json(self.path, {**self.fixed, "progress": progress, "time": time.time(), **finite_or_null(values)})
            self.next_write = time.monotonic() + HEARTBEAT_S


def progress_file(node: int) -> str:
    """In a run folder, the trainer's heartbeat for the supervisor of this machine; machines may share the folder."""
    return f"progress-{node}.json" if node else "progress.json"


def read_heartbeat(path: Path) -> dict[str, Any]:
    """The last heartbeat, or an empty dictionary if there was none yet."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:  # none yet, or its process has just left
        return {}


class Stopped(Exception):
    """This process was asked to leave. Raised where a wait or a long computation must not go on."""


def when_alone(react: Callable[[], None]) -> None:
    """Call `react`, in a thread, once whoever started this process has ended: a supervisor or a launcher."""

    def watch() -> None:
        if SUPERVISOR_FD in os.environ:
            os.read(int(os.environ[SUPERVISOR_FD]), 1)  # nobody ever writes: the last holder of the other end is gone
        else:
            while os.getppid() == int(os.environ[LAUNCHER_PID]):  # whoever loses its parent gets another
                time.sleep(LOOK_UP_S)
        react()

    if SUPERVISOR_FD in os.environ or LAUNCHER_PID in os.environ:
        threading.Thread(target=watch, daemon=True).start()


def end_when_alone() -> None:
    """Before there is a StopRequest nothing is in hand: a process that is left alone ends, whatever it waits for."""
    when_alone(lambda: None if StopRequest.is_made else os._exit(1))


class StopRequest:
    """True once SIGTERM or SIGINT arrived, or once the supervisor's pipe closed: finish what is in hand, then leave.

    A plain flag, because the lock inside a threading.Event may be held by the very code that a signal interrupts.
    """

    is_made = False
    """whether this process has one"""

    def __init__(self) -> None:
        self.is_set = False
        signal.signal(signal.SIGTERM, self._on_terminate)
        signal.signal(signal.SIGINT, self._on_interrupt)
        StopRequest.is_made = True
        when_alone(self._end)

    def __bool__(self) -> bool:
        return self.is_set

    def look(self) -> None:
        """Raise Stopped if asked to stop."""
        if self.is_set:
            raise Stopped

    def wait(self, seconds: float) -> None:
        """Sleep, but not on when asked to stop."""
        end = time.monotonic() + seconds
        while not self.is_set and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, LOOK_UP_S))

    def _on_terminate(self, *_: Any) -> None:
        self.is_set = True

    def _on_interrupt(self, *_: Any) -> None:
        if self.is_set:
            sys.exit("interrupted twice: leaving at once")
        os.write(2, b"interrupted: finishing what is in hand (press Ctrl-C again to leave at once)\n")
        self.is_set = True

    def _end(self) -> None:
        self.is_set = True
        time.sleep(SECONDS_TO_END)
        os._exit(1)
