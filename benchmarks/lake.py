"""What a lake costs its supervisor, small and large: to start on it, and one turn of the control loop.

in:   nothing; two lakes are made in a temporary folder, rows and empty files, 5,000 source tars each
out:  a table, and as the last line of stdout the same as JSON; medians in milliseconds
cost: a quarter of a minute, and 100,000 inodes for as long

    python benchmarks/lake.py
    python benchmarks/lake.py --small 100 --large 1000

The two lakes take turns, so that a busy machine slows both alike. Starting is what happens in the supervisor and in a
streamer's `--check`. A turn is the supervisor's own, without children: a quiet one, of two a second, and a busy one, in
which a shard has come, a child has died, and status.json, the history and the drift are due. `step_ratio` is that of
busy turns.
"""

import argparse
import io
import json
import math
import runpy
import tempfile
import time
from collections.abc import Callable
from contextlib import closing, redirect_stdout
from pathlib import Path
from statistics import median
from typing import Any

from hear_distill.lake import Lake
from hear_distill.schema import Identity
from hear_distill.status import Display

SUPERVISOR = Path(__file__).parents[1] / "datalake" / "run_lake.py"
NUM_TARS, OPEN_TARS = 5_000, 32
SHARD_CLIPS, SHARD_BYTES = 1_000, 66_562_048
NUM_LEASED, NUM_VALIDATION = 8, 4
WARM_UP, REPEATS = 2, 15
IDENTITY = Identity(
    source="somewhere",
    revision="1",
    seed=0,
    clip_samples=32_000,
    shard_clips=SHARD_CLIPS,
    val_fraction=0.002,
    val_clips=2_048,
)


def state_of(shard_id: int, num_shards: int) -> tuple[str, str]:
    """Split and state: one anchor, a few recent ones, a few that are leased, the rest ready."""
    if shard_id == 0:
        return "anchor", "ready"
    if shard_id >= num_shards - NUM_VALIDATION:
        return "recent", "ready"
    return "train", "leased" if shard_id <= NUM_LEASED else "ready"


def statistics_of(shard_id: int) -> str:
    """A row of the size that a streamer writes."""
    return json.dumps(
        {
            "recordings": 200 + shard_id % 7,
            "clips": SHARD_CLIPS,
            "heard_s": 2000.0,
            "levels_db": [0, 0, 0, 0, 0, 0, 1, 9, 60, 190, 300, 240, 130, 60, 10, shard_id % 5],
            "bands_db": {
                "count": SHARD_CLIPS,
                "mean": [-41.5, -38.2, -36.1, -35.9, -38, -42.7, -50],
                "variance": 610.5,
            },
            "tars": {f"family_{shard_id % 3}_{i}.tar": SHARD_CLIPS // 8 for i in range(8)},
            "open_tars": 8,
            "wanted_tars": 8,
            "clock_s": {"reading": 1.5, "decoding": 11.25, "cutting": 0.5, "writing": 0.125},
        }
    )


def make_lake(root: Path, num_shards: int) -> None:
    """A lake of so many shards: their rows, and an empty file for each."""
    tars = {f"family_{i % 20}_{i}.tar": 5_000_000_000 for i in range(NUM_TARS)}
    limits = {"cap_bytes": 2 * num_shards * SHARD_BYTES, "reservation_bytes": SHARD_BYTES, "max_workers": 4}
    with closing(Lake.create(root, IDENTITY, tars, **limits)) as lake, lake.transaction():
        done = (NUM_TARS // 2, NUM_TARS // 2 + OPEN_TARS)
        lake.db.execute("UPDATE tars SET state = 'done' WHERE position < ?", done[:1])
        lake.db.execute("UPDATE tars SET state = 'open' WHERE position BETWEEN ? AND ?", done)
        rows = [
            (i, *state_of(i, num_shards), "dead" if i and i <= NUM_LEASED else None, SHARD_BYTES, SHARD_CLIPS)
            for i in range(num_shards)
        ]
        columns = "id, split, state, owner, num_bytes, num_clips"
        lake.db.executemany(f"INSERT INTO shards ({columns}) VALUES (?, ?, ?, ?, ?, ?)", rows)
        notes = [(i, 1.7e9 + i, statistics_of(i)) for i in range(num_shards)]
        lake.db.executemany("INSERT INTO statistics VALUES (?, ?, ?)", notes)
        totals = [("cut", num_shards * SHARD_CLIPS), ("recordings", 200 * num_shards), ("next_shard_id", num_shards)]
        lake.db.executemany("INSERT INTO totals VALUES (?, ?)", totals)
        for shard_id, split, *_ in rows:
            lake.path(shard_id, split).touch()


def start(root: Path) -> None:
    """Join the lake as a streamer does, open it as the supervisor does, and put right what the dead left."""
    with closing(Lake.create(root, IDENTITY, {})), closing(Lake.open(root)) as lake:
        lake.sweep()
        lake.is_drained()


class Loop:
    """The loop of the supervisor of a lake, one turn at a time. It starts nothing."""

    def __init__(self, stage: dict[str, Any], root: Path) -> None:
        self.turn = stage["turn"]
        self.supervisor = stage["supervisor_of"](stage["Config"](lake=root, out=root / "run", disk_floor_gb=0), -1)
        never = time.monotonic() + 86_400
        self.supervisor.restarts.start_after |= {"stream": never, "train": never}
        self.lake = self.supervisor.lake
        self.display = Display(self.lake, root / "run")

    def quiet_turn(self) -> None:
        """Nothing is new, and nothing due."""
        self.display.next_status = math.inf
        self.turn(self.supervisor, self.display)

    def busy_turn(self) -> None:
        """Everything at once."""
        self.display.next_status = self.display.next_history = 0.0
        self.supervisor.rate_clips = -1
        self.lake.sweep()
        self.turn(self.supervisor, self.display)


def median_ms(candidates: dict[int, Callable[[], None]]) -> dict[int, float]:
    """Milliseconds of each candidate, which take turns."""
    times: dict[int, list[float]] = {name: [] for name in candidates}
    for _ in range(WARM_UP + REPEATS):
        for name, candidate in candidates.items():
            begun = time.perf_counter()
            candidate()
            times[name].append(1000 * (time.perf_counter() - begun))
    return {name: median(values[WARM_UP:]) for name, values in times.items()}


def main(small: int, large: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        roots = {size: Path(folder) / str(size) for size in (small, large)}
        for size, root in roots.items():
            make_lake(root, size)
        starting = median_ms({size: lambda root=root: start(root) for size, root in roots.items()})
        stage = runpy.run_path(str(SUPERVISOR))
        loops = {size: Loop(stage, root) for size, root in roots.items()}
        with redirect_stdout(io.StringIO()):  # the status lines
            quiet = median_ms({size: loop.quiet_turn for size, loop in loops.items()})
            busy = median_ms({size: loop.busy_turn for size, loop in loops.items()})
        for size, loop in loops.items():
            lake = loop.lake
            expected = ((size - 1 - NUM_VALIDATION) * SHARD_CLIPS, size * SHARD_BYTES, 0)
            found = (lake.unread_clips(), lake.used_bytes(), lake.books().balance())
            if found != expected:
                raise SystemExit(f"the ledger of {size} shards says {found}, expected {expected}")
            lake.close()
    result = {"startup_ratio": round(starting[large] / starting[small], 3)}
    result |= {"step_ratio": round(busy[large] / busy[small], 3), "quiet_ratio": round(quiet[large] / quiet[small], 3)}
    for size in (small, large):
        turns = f"busy turn {busy[size]:.2f} ms, quiet turn {quiet[size]:.2f} ms"
        print(f"{size:7} shards: start {starting[size]:.2f} ms, {turns}")
        for name, values in (("startup", starting), ("step", busy), ("quiet", quiet)):
            result[f"{name}_ms_{size}"] = round(values[size], 3)
    print(json.dumps(result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", type=int, default=1_000, help="shards (default 1000)")
    parser.add_argument("--large", type=int, default=100_000, help="shards (default 100000)")
    arguments = parser.parse_args()
    if not 2 * (NUM_LEASED + NUM_VALIDATION) <= arguments.small < arguments.large:
        parser.error(f"--small must be at least {2 * (NUM_LEASED + NUM_VALIDATION)} and below --large")
    main(arguments.small, arguments.large)
