"""What a lake looks like: for programs in status.json, for people as one live line or as a table.

in:   the ledger, the heartbeats of the children, and what only the supervisor knows
out:  <lake>/status.json, replaced whole every two seconds; lines on the terminal
"""

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from hear_distill.files import gib, write_json
from hear_distill.lake import Lake
from hear_distill.locks import is_locked
from hear_distill.runlog import read_heartbeat

LOCK = "supervisor.lock"  # held by the one supervisor of a lake while it lives
STATUS_S = 2.0
ACTIVITIES = ("reading", "decoding", "cutting", "writing")  # of a streamer; reading is the network, or the disk
SAY_S = 10.0  # between status lines where there is no terminal to overwrite one on


@dataclass(frozen=True, kw_only=True)
class Control:
    """What only the supervisor knows. Everything else that is shown stands in the ledger or in a heartbeat."""

    is_filling: bool
    has_disk: bool
    """the lake's disk has more free room than the floor"""
    times_full: int
    times_restarted: int
    workers: int
    """streamers that run"""


class Rates:
    """Clips per second into and out of the lake, with a memory of about ten looks."""

    def __init__(self) -> None:
        self.smooth: dict[str, float] = {}
        self.seen: tuple[float, int, int] | None = None

    def look(self, lake: Lake) -> dict[str, float]:
        """Called every two seconds: `in` and `out`, once there were two looks."""
        cut = lake.totals()["cut"]
        books = lake.books()
        read = cut - books.validation - books.retired_validation - lake.unread_clips()
        now = time.monotonic()
        if self.seen:
            seconds = now - self.seen[0]
            for name, count in (("in", cut - self.seen[1]), ("out", read - self.seen[2])):
                self.smooth[name] = 0.9 * self.smooth.get(name, count / seconds) + 0.1 * count / seconds
        self.seen = (now, cut, read)
        return self.smooth


def status_of(lake: Lake, out: Path, control: Control, rates: dict[str, float]) -> dict[str, Any]:
    """What status.json holds; `out` is the run folder of the trainer."""
    totals = lake.totals()
    return {
        "time": time.time(),
        "pid": os.getpid(),
        **asdict(control),
        "used_bytes": lake.used_bytes(),
        "cap_bytes": lake.cap_bytes(),
        "unread_clips": lake.unread_clips(),
        "clips_per_s": rates,
        "tars": lake.tar_states(),
        "books": asdict(lake.books()),
        "recordings": totals["recordings"],
        "skipped": {k.removeprefix("skipped: "): v for k, v in totals.items() if k.startswith("skipped: ")},
        "trainer": read_heartbeat(out / "progress.json"),
    }


def line_of(status: dict[str, Any]) -> str:
    """One line for people."""
    fullness = status["used_bytes"] / status["cap_bytes"]
    trainer, rates = status["trainer"], status["clips_per_s"]
    loss = f", loss {trainer['loss']:.4g}" if trainer.get("loss") is not None else ""
    state = "filling" if status["is_filling"] else "draining"
    if not status["has_disk"]:
        state = "stopped: the disk is below its floor"
    waiting = ", waiting for data" if trainer.get("is_waiting") else ""
    return (
        f"lake [{'#' * round(20 * fullness):<20}] {status['unread_clips']} unread clips, "
        f"{state}, {status['workers']} streamers, "
        f"in {rates.get('in', 0):.0f}/s, out {rates.get('out', 0):.0f}/s; "
        f"step {trainer.get('step', 0)} of {trainer.get('steps', '?')}{loss}{waiting}"
    )


class Display:
    """Writes status.json, and one line that stays in place on a terminal or comes every ten seconds elsewhere."""

    def __init__(self, lake: Lake, out: Path) -> None:
        self.lake, self.out, self.rates = lake, out, Rates()
        self.next_status = self.next_line = 0.0

    def show(self, control: Control) -> None:
        """Called every turn; does something every two seconds."""
        now = time.monotonic()
        if now < self.next_status:
            return
        self.next_status = now + STATUS_S
        status = status_of(self.lake, self.out, control, self.rates.look(self.lake))
        write_json(self.lake.root / "status.json", status)
        if sys.stdout.isatty():
            print(f"\r\x1b[K{line_of(status)}", end="", flush=True)
        elif now >= self.next_line:
            self.next_line = now + SAY_S
            print(line_of(status))


def worker_lines(root: Path) -> list[str]:
    """What each living streamer says of its last shard."""
    lines = []
    for path in sorted((root / "heartbeats").glob("stream-*.json")):
        beat = read_heartbeat(path)
        if "clips_per_s" in beat and psutil.pid_exists(beat["pid"]):
            shares = ", ".join(f"{beat[name]:.0%} {name}" for name in ACTIVITIES if name in beat)
            lines.append(f"streamer    {beat['pid']}: {beat['clips']} clips, {beat['clips_per_s']:.0f}/s; {shares}")
    return lines


def show_status(root: Path) -> int:
    """The table of a lake, whether or not it is running. Exit code 1 if no supervisor runs it."""
    lake = Lake.open(root)
    path = root / "status.json"
    status = json.loads(path.read_text()) if path.exists() else {}
    is_running = is_locked(root / LOCK)
    print(f"lake        {root}: {'running' if is_running else 'not running'}")
    print(f"reservoir   {lake.unread_clips()} unread clips, {gib(lake.used_bytes())} of {gib(lake.cap_bytes())}")
    print("tars        " + ", ".join(f"{count} {state}" for state, count in lake.tar_states().items()))
    print(f"books       {lake.books()}")
    totals = lake.totals()
    skips = [f"{n} {k.removeprefix('skipped: ')}" for k, n in totals.items() if k.startswith("skipped: ")]
    print(f"recordings  {totals['recordings']} read; skipped: {', '.join(skips) or 'none'}")
    for line in worker_lines(root):
        print(line)
    if is_running and status:
        print(f"now         {line_of(status)}")
        print(f"history     full {status['times_full']} times, started again {status['times_restarted']} times")
    return 0 if is_running else 1


def check_lake(root: Path) -> int:
    """What ledger and folders say differently; exit code 1 if they do."""
    lake = Lake.open(root)
    found = lake.disagreements()
    print("\n".join(found) if found else f"{root}: ledger and folders agree; {lake.books()}")
    return 1 if found else 0
