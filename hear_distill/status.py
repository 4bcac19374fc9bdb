"""What a lake looks like: for programs in status.json, for people as one live line or as a table.

in:   the ledger, the heartbeats of the children, and what only the supervisor knows
out:  <lake>/status.json, replaced whole every two seconds; <lake>/history.jsonl; lines on the terminal
cost: a few sums over the ledger; no tar is opened, and no folder is listed that grows with the lake

A supervisor is healthy if `problems_of` finds nothing; `status` exits with 0 then, 3 if not, 1 if none runs.
"""

import errno
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from hear_distill import drift, history
from hear_distill.files import gib, write_json
from hear_distill.lake import Lake
from hear_distill.locks import is_locked
from hear_distill.runlog import finite_or_null, progress_file, read_heartbeat
from hear_distill.schema import Books

LOCK = "supervisor.lock"  # held by the one supervisor of a lake while it lives
STATUS_S = 2.0
SAY_S = 10.0  # between status lines where there is no terminal to overwrite one on
ACTIVITIES = ("reading", "decoding", "cutting", "writing")  # of a streamer; reading is the network, or the disk
BAR = 30  # characters
NOT_RUNNING, UNHEALTHY = 1, 3  # exit codes; 2 is a mistake of the user

# What counts as unhealthy, besides a disk below its floor and books that do not balance.
SILENT_S = 30.0  # for status.json: the supervisor itself hangs
TRAINER_SILENT_S = 600.0  # loading the teacher and compiling take minutes
WAITING_SHARE = 0.1  # of the last ten minutes, once the lake has run that long: the trainer lacks data


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
    crashes: int
    """of children, within the last hour"""
    paused_s: float
    """until children are started again, after a crash or an outage of the source; 0 if they may be now"""


def ledger_part(lake: Lake) -> dict[str, Any]:
    """What the ledger says, as plain numbers."""
    totals = lake.totals()
    return {
        "used_bytes": lake.used_bytes(),
        "cap_bytes": lake.cap_bytes(),
        "unread_clips": lake.unread_clips(),
        "tars": lake.tar_states(),
        "books": asdict(lake.books()),
        "recordings": totals["recordings"],
        "skipped": {k.removeprefix("skipped: "): v for k, v in totals.items() if k.startswith("skipped: ")},
        "settings": lake.settings(),
    }


def num_read(status: dict[str, Any]) -> int:
    """Clips that were ever handed to a trainer."""
    books = status["books"]
    return books["cut"] - books["validation"] - books["retired_validation"] - status["unread_clips"]


def problems_of(status: dict[str, Any], age_s: float) -> list[str]:
    """What is wrong with a lake that runs, one line each; `age_s` is how old its status is."""
    trainer, found = status["trainer"], []
    if age_s > SILENT_S:
        found.append(f"the supervisor has said nothing for {age_s:.0f} s: it hangs, or its disk does")
    if not status["has_disk"]:
        found.append("the disk is below its floor (--disk-floor-gb): no streamer runs")
    if status["crashes"]:
        found.append(f"{status['crashes']} crashes of children within the last hour: look at {status['logs']}")
    if status["paused_s"] > 0:
        found.append(f"nothing is started for {status['paused_s']:.0f} s, after a crash or an outage of the source")
    silent_s = min(status["running_s"], status["time"] - trainer.get("time", 0))
    if silent_s > TRAINER_SILENT_S:
        found.append(f"the trainer has said nothing for {silent_s:.0f} s: look at {status['logs']}/train.log")
    share = status["waiting_share"] or 0.0
    if share > WAITING_SHARE and status["running_s"] > history.WINDOW_S:
        found.append(f"the trainer waited for data {share:.0%} of the last ten minutes")
    if unaccounted := Books(**status["books"]).balance():
        found.append(f"the books are off by {unaccounted} clips: stop, then fsck")
    return found + status["drift_warnings"]


def line_of(status: dict[str, Any]) -> str:
    """One line for people."""
    fullness = status["used_bytes"] / status["cap_bytes"]
    trainer, rates = status["trainer"], status["clips_per_s"]
    loss = f", loss {trainer['loss']:.4g}" if trainer.get("loss") is not None else ""
    waiting = ", waiting for data" if trainer.get("is_waiting") else ""
    return (
        f"lake [{'#' * round(20 * fullness):<20}] {status['unread_clips']} unread clips, "
        f"{state_of(status)}, {status['workers']} streamers, "
        f"in {rates.get('in') or 0:.0f}/s, out {rates.get('out') or 0:.0f}/s; "
        f"step {trainer.get('step', 0)} of {trainer.get('steps', '?')}{loss}{waiting}"
    )


def state_of(status: dict[str, Any]) -> str:
    """What the streamers are about."""
    if not status["has_disk"]:
        return "stopped: the disk is below its floor"
    return "filling" if status["is_filling"] else "draining"


class Display:
    """Writes status.json and the history, and one line that stays in place on a terminal or comes now and then."""

    def __init__(self, lake: Lake, out: Path, node: int = 0) -> None:
        """`out` is the run folder of the trainer, `node` the number of this machine among those that train together."""
        self.lake, self.progress = lake, out / progress_file(node)
        self.recent, self.started = history.Recent(), time.monotonic()
        self.drift: dict[str, float] = {}  # a number per statistic, NaN where there is too little to measure
        self.next_status = self.next_line = self.next_history = 0.0
        self.is_disk_full = False

    def show(self, control: Control) -> None:
        """Called every turn; does something every two seconds."""
        now = time.monotonic()
        if now < self.next_status:
            return
        self.next_status = now + STATUS_S
        if now >= self.next_history:
            self.drift = drift.drift_of(self.lake.statistics(drift.WINDOW_SHARDS, drift.WINDOW_SHARDS))
        status = self.status_of(now, control)
        self.write(now, status)
        if sys.stdout.isatty():
            print(f"\r\x1b[K{line_of(status)}", end="", flush=True)
        elif now >= self.next_line:
            self.next_line = now + SAY_S
            print(line_of(status))

    def status_of(self, now_s: float, control: Control) -> dict[str, Any]:
        """What status.json holds."""
        status = {
            **{"time": time.time(), "pid": os.getpid(), "running_s": now_s - self.started},
            **{**asdict(control), "logs": str(self.lake.root / "logs"), **ledger_part(self.lake)},
            "trainer": finite_or_null(read_heartbeat(self.progress)),
            **{"drift": finite_or_null(self.drift), "drift_warnings": drift.warnings_of(self.drift)},
        }
        self.recent.look(now_s, status["trainer"], **{"in": status["books"]["cut"], "out": num_read(status)})
        return status | self.recent.summary(status)

    def write(self, now_s: float, status: dict[str, Any]) -> None:
        """status.json, and every half minute a line of history. A full disk must not end what could make room on it."""
        try:
            write_json(self.lake.root / "status.json", status)
            if now_s >= self.next_history:
                self.next_history = now_s + history.EVERY_S
                history.append(self.lake.root, status, self.recent.per_s("waited", history.EVERY_S))
        except OSError as e:
            if e.errno != errno.ENOSPC:
                raise
            if not self.is_disk_full:
                print(f"WARNING: the disk of {self.lake.root} is full: status.json is not written", file=sys.stderr)
            self.is_disk_full = True
        else:
            self.is_disk_full = False


def streamers(root: Path) -> list[dict[str, Any]]:
    """The heartbeats of all living streamers."""
    beats = [read_heartbeat(path) for path in sorted((root / "heartbeats").glob("stream-*.json"))]
    return [beat for beat in beats if beat and psutil.pid_exists(beat["pid"])]


def worker_lines(root: Path) -> list[str]:
    """What each living streamer says of its last shard."""
    lines = []
    for beat in streamers(root):
        if "clips_per_s" in beat:
            shares = ", ".join(f"{beat[name]:.0%} {name}" for name in ACTIVITIES if name in beat)
            lines.append(f"streamer    {beat['pid']}: {beat['clips']} clips, {beat['clips_per_s']:.0f}/s; {shares}")
    return lines


def look_at(root: Path) -> dict[str, Any]:
    """Everything that is known of a lake now, whether or not it is running. Raises UserError if there is none."""
    lake, path = Lake.open(root), root / "status.json"
    said = json.loads(path.read_text()) if path.exists() else {}
    is_running = is_locked(root / LOCK)
    is_known = is_running and bool(said) and psutil.pid_exists(said["pid"])  # else it starts, or is gone
    status = {
        **(said if is_known else {"trainer": said.get("trainer", {})}),
        **{"lake": str(root), "is_running": is_running, "is_starting": is_running and not is_known},
        **{**ledger_part(lake), "streamers": streamers(root)},
    }
    lake.close()
    status["problems"] = problems_of(status, time.time() - said["time"]) if is_known else []
    return status


def show(root: Path, as_json: bool) -> int:
    """`status`: a table, or one line of JSON. Exit code 0 running and healthy, 1 not running, 3 unhealthy."""
    status = look_at(root)
    print(json.dumps(status, allow_nan=False) if as_json else "\n".join(table_of(root, status)))
    if not status["is_running"]:
        return NOT_RUNNING
    return UNHEALTHY if status["problems"] else 0


def table_of(root: Path, status: dict[str, Any]) -> list[str]:
    """The lines of the table."""
    full = status["used_bytes"] / status["cap_bytes"]
    running = "starting" if status["is_starting"] else "running" if status["is_running"] else "not running"
    skips = [f"{count} {reason}" for reason, count in status["skipped"].items()]
    lines = [
        f"lake        {status['lake']}: {running}",
        f"reservoir   [{'#' * round(BAR * full):-<{BAR}}] {full:.0%} of {gib(status['cap_bytes'])}; "
        f"{status['unread_clips']} unread clips",
        *(live_lines(status) if "running_s" in status else []),
        *worker_lines(root),
        *trainer_lines(status),
        f"tars        {', '.join(f'{count} {state}' for state, count in status['tars'].items())}",
        f"recordings  {status['recordings']} read; skipped: {', '.join(skips) or 'none'}",
        f"books       {Books(**status['books'])}{skipped_part(status)}",
    ]
    if "running_s" in status:
        lines += [f"health      {problem}" for problem in status["problems"] or ["good"]]
    return lines


def live_lines(status: dict[str, Any]) -> list[str]:
    """What only a running supervisor can tell."""
    rates = status["clips_per_s"]
    measured = ", ".join(f"{name} {value:.2f}" for name, value in status["drift"].items() if value is not None)
    return [
        f"flow        in {number(rates['in'])} clips/s, out {number(rates['out'])} clips/s; "
        f"{duration(status['stock_s'])} of data in stock",
        f"streamers   {status['workers']}, {state_of(status)}; full {status['times_full']} times, "
        f"started again {status['times_restarted']} times; {status['crashes']} crashes within an hour",
        f"drift       {measured or 'not measured'}",
    ]


def trainer_lines(status: dict[str, Any]) -> list[str]:
    """How far the student is; nothing before the first heartbeat."""
    trainer = status["trainer"]
    if not trainer:
        return []
    loss = "" if trainer.get("loss") is None else f", loss {trainer['loss']:.4g}"
    line = f"trainer     step {trainer.get('step', 0)} of {trainer.get('steps') or '?'}{loss}"
    if "running_s" in status:
        share = status["waiting_share"]
        waiting = ", waits for data now" if trainer.get("is_waiting") else ""
        line += f"; waited for data {'?' if share is None else f'{share:.1%}'} of the last ten minutes{waiting}"
        line += f"; done in {duration(status['eta_s'])}"
    return [line]


def skipped_part(status: dict[str, Any]) -> str:
    """The ledger books the clips of a step that was skipped as trained: they are used, and not drawn again."""
    num_skipped = status["trainer"].get("skipped_clips") or 0
    return f"; of the trained, {num_skipped:.0f} were in steps that were skipped as not finite" if num_skipped else ""


def number(value: float | None) -> str:
    """Whole, or a question mark if it is not known."""
    return "?" if value is None else f"{value:.0f}"


def duration(seconds: float | None) -> str:
    """For people, in the unit that fits; a question mark if it is not known."""
    if seconds is None:
        return "?"
    for unit, length in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
