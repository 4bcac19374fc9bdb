"""What a lake was like: over the last minutes in memory, over days in a line every half minute, and a picture.

in:   status, from the supervisor
out:  <lake>/history.jsonl (0.3 kB a line, 0.9 MB a day), <lake>/history.png
"""

import json
import os
import time
from collections import deque
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from hear_distill.files import GIB, UserError, atomic_write

EVERY_S = 30.0
FLOW_S = 60.0  # rates in and out: over a minute, as clips arrive a shard at a time
WINDOW_S = 600.0  # share of waiting, and steps per second
FRESH_S = 30.0  # a heartbeat that is older tells of nobody
FILE = "history.jsonl"
PICTURE = "history.png"
MAX_POINTS = 1_500  # more than a picture has columns for a curve; longer histories are averaged to this
GAP_POINTS = 4.0  # a curve breaks where the next point is this many usual distances away: nobody was there


class Recent:
    """What changed over the last minutes: counters as they were at each look, seconds on a monotonic clock."""

    def __init__(self) -> None:
        self.looks: deque[tuple[float, dict[str, float]]] = deque()
        self.said_s: float | None = None
        self.sure_s = self.unsure_s = 0.0

    def look(self, now_s: float, trainer: dict[str, Any], **counters: float) -> None:
        """Note the counters, and how long the trainer has waited for data."""
        since_s = now_s - self.looks[-1][0] if self.looks else 0.0
        waited_s = self._waited_s(since_s, trainer)
        self.looks.append((now_s, {**counters, "step": trainer.get("step", 0), "waited": waited_s}))
        while now_s - self.looks[0][0] > WINDOW_S:
            self.looks.popleft()

    def _waited_s(self, since_s: float, trainer: dict[str, Any]) -> float:
        """Seconds of waiting in all. A trainer tells of a wait when it is over; until then, our looks count."""
        said_s = trainer.get("waited_s") or 0.0
        if self.said_s is None:  # what was before we came is not ours to count
            self.said_s = said_s
        if said_s != self.said_s:
            self.sure_s += said_s - self.said_s if said_s > self.said_s else said_s  # a new trainer begins at zero
            self.said_s, self.unsure_s = said_s, 0.0
        elif trainer.get("is_waiting") and time.time() - trainer["time"] < FRESH_S:
            self.unsure_s += since_s
        return self.sure_s + self.unsure_s

    def per_s(self, name: str, window_s: float) -> float | None:
        """Growth of a counter over the last `window_s`; None before the second look, or if it went back."""
        now_s, last = self.looks[-1]
        then_s, first = next(look for look in self.looks if now_s - look[0] <= window_s)
        return (last[name] - first[name]) / (now_s - then_s) if now_s > then_s and last[name] >= first[name] else None

    def summary(self, status: dict[str, Any]) -> dict[str, Any]:
        """Rates, the share of waiting, and what follows from them for the stock and the end."""
        rates = {name: self.per_s(name, FLOW_S) for name in ("in", "out")}
        share, steps_per_s = self.per_s("waited", WINDOW_S), self.per_s("step", WINDOW_S)
        steps_left = (status["trainer"].get("steps") or 0) - status["trainer"].get("step", 0)
        return {
            "clips_per_s": rates,
            "stock_s": status["unread_clips"] / rates["out"] if rates["out"] else None,
            "waiting_share": None if share is None else min(1.0, share),
            "eta_s": steps_left / steps_per_s if steps_per_s and steps_left >= 0 else None,
        }


def line_of(status: dict[str, Any], waiting_share: float | None) -> dict[str, Any]:
    """What is kept of a status; `waiting_share` is the trainer's since the last line."""
    trainer = status["trainer"]
    return {
        "time": round(status["time"], 1),
        **{name: status[name] for name in ("used_bytes", "cap_bytes", "unread_clips")},
        **{name: _short(value) for name, value in status["clips_per_s"].items()},
        "workers": status["workers"],
        "waiting_share": None if waiting_share is None else _short(min(1.0, waiting_share)),
        "step": trainer.get("step"),
        "loss": _short(trainer.get("loss")),
        "drift": {name: _short(value) for name, value in status["drift"].items()},
    }


def _short(value: float | None) -> float | None:
    """Five digits are enough for a picture."""
    return None if value is None else float(f"{value:.5g}")


def append(root: Path, status: dict[str, Any], waiting_share: float | None) -> None:
    """Add a line. What a kill or a full disk left of an unfinished one goes first."""
    with (root / FILE).open("ab+") as f:
        cut_unfinished_line(f.fileno())
        f.write(json.dumps(line_of(status, waiting_share), allow_nan=False).encode() + b"\n")


def cut_unfinished_line(fd: int) -> None:
    """Let the file end with its last whole line."""
    end = os.fstat(fd).st_size
    tail = os.pread(fd, 4096, max(0, end - 4096))  # longer than any line
    if tail and not tail.endswith(b"\n"):
        os.ftruncate(fd, end - len(tail) + tail.rfind(b"\n") + 1)


def read(root: Path) -> list[dict[str, Any]]:
    """All whole lines, oldest first. Raises UserError if there are not two."""
    path = root / FILE
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    if len(lines) < 2:
        raise UserError(
            f"{path} holds nothing to draw yet; a supervisor writes a line into it every {EVERY_S:.0f} s: "
            f"python datalake/run_lake.py --lake {root}"
        )
    return [json.loads(line) for line in lines]


def curve(lines: Sequence[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Times in unix seconds and values of one name, NaN where it is not known; `drift.level` looks inside."""
    outer, _, inner = name.partition(".")
    values = [line.get(outer) if not inner else line.get(outer, {}).get(inner) for line in lines]
    times = np.array([line["time"] for line in lines], float)
    return times, np.array([np.nan if value is None else value for value in values], float)


def thinned(times: np.ndarray, values: np.ndarray, most: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """[n], [n] -> times [m], and mean, lowest and highest [3, m] of at most `most` equal spans of time, gaps besides.

    Where nobody looked, a NaN stands in between: a curve must not bridge that.
    """
    known = ~np.isnan(values)
    times, values = times[known], values[known]
    rows = np.stack([values] * 3)  # [3, n]
    if len(times) > most:
        spans = np.minimum(((times - times[0]) / (times[-1] - times[0]) * most).astype(int), most - 1)
        starts = np.flatnonzero(np.diff(spans, prepend=-1))
        counts = np.diff(starts, append=len(times))
        means = [np.add.reduceat(x, starts) / counts for x in (times, values)]
        times = means[0]
        rows = np.stack([means[1], np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)])  # [3, m]
    if len(times) < 3:
        return times, rows
    steps = np.diff(times)
    gaps = np.flatnonzero(steps > GAP_POINTS * np.median(steps)) + 1
    return np.insert(times, gaps, times[gaps - 1]), np.insert(rows, gaps, np.nan, axis=1)


def panels(lines: Sequence[dict[str, Any]]) -> list[tuple[str, str, dict[str, str], float]]:
    """(title, unit, {name of a curve: label}, factor) from top to bottom."""
    drift = sorted({name for line in lines for name in line.get("drift", {})})
    return [
        ("reservoir", "GiB", {"cap_bytes": "cap", "used_bytes": "used"}, 1 / GIB),
        ("rates", "clips/s", {"in": "into the lake", "out": "out of it"}, 1),
        ("streamers", "running", {"workers": "streamers"}, 1),
        ("trainer waits for data", "% of the time", {"waiting_share": "waiting"}, 100),
        ("drift, against the first shards", "see datalake/README.md", {f"drift.{name}": name for name in drift}, 1),
    ]


def draw(root: Path) -> Path:
    """`plot`: history.jsonl -> history.png. Raises UserError if there is too little to draw."""
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter  # heavy, and only needed here
    from matplotlib.figure import Figure  # no pyplot: nothing here needs a display

    lines = read(root)
    figure = Figure(figsize=(12, 11), layout="constrained")
    all_axes = figure.subplots(5, 1, sharex=True)
    for axes, (title, unit, names, factor) in zip(all_axes, panels(lines), strict=True):
        for name, label in names.items():
            draw_curve(axes, label, factor, *thinned(*curve(lines, name)))
        if axes.lines:
            axes.set_ylim(bottom=min(0.0, *(np.nanmin(line.get_ydata()) for line in axes.lines)))
            if len(axes.lines) > 1:
                axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize="small")
        else:
            axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", color="0.5")
        axes.set_title(title, loc="left", fontsize="medium")
        axes.set_ylabel(unit)
        axes.grid(alpha=0.3)
    locator = AutoDateLocator()
    all_axes[-1].xaxis.set_major_locator(locator)
    all_axes[-1].xaxis.set_major_formatter(ConciseDateFormatter(locator))
    all_axes[-1].set_xlabel("time (UTC)")
    last = lines[-1]
    loss = "" if last.get("loss") is None else f", loss {last['loss']:.4g}"
    figure.suptitle(f"{root}, at the end: step {last.get('step') or 0:,}{loss}")
    with atomic_write(root / PICTURE) as f:
        figure.savefig(f, format="png", dpi=110)
    return root / PICTURE


def draw_curve(axes: Any, label: str, factor: float, times: np.ndarray, rows: np.ndarray) -> None:
    """A line through the means, a band from lowest to highest; nothing if nothing is known."""
    if not len(times):
        return
    dates = [datetime.fromtimestamp(t, UTC) for t in times]
    style = {"color": "0.6", "linestyle": "--"} if label == "cap" else {"marker": "." if len(times) < 60 else ""}
    (line,) = axes.plot(dates, factor * rows[0], label=label, linewidth=1.2, **style)
    axes.fill_between(dates, factor * rows[1], factor * rows[2], color=line.get_color(), alpha=0.2, linewidth=0)
