"""The arithmetic of a run before it starts: what the cap holds, what must be in flight, how long things take.

in:   the configurations of the supervisor and its children, and two rates, measured or estimated
out:  lines for people
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hear_distill import room
from hear_distill.audio import CLIP_SAMPLES, decode_blocks
from hear_distill.files import UserError, gib
from hear_distill.runlog import read_heartbeat
from hear_distill.schedule import max_growth
from hear_distill.shards import RECORD_BYTES, shard_bytes
from hear_distill.status import duration
from hear_distill.synthetic import encoded, recording

# What the trainer is expected to take, teacher included: estimated from published throughputs of ViT-L and ViT-S on
# these GPUs, at 60 % and 35 to 40 % of their peak in bfloat16. Not measured.
GPU_CLIPS_PER_S = {"H200": 5_800.0, "A6000": 1_180.0}
DECODE_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that somebody wants to start."""

    lake: Path
    out: Path
    source: str
    cap_bytes: int
    floor_bytes: int
    max_workers: int
    streamer: Mapping[str, Any]
    """every field of its Config"""
    trainer: Mapping[str, Any]
    gpus: int = 1
    """of this machine"""
    num_nodes: int = 1

    def batch(self) -> int:
        """Clips of a step, as long as no controller changes it."""
        return self.trainer["chunks"] * self.trainer["chunk_size"] * self.gpus * self.num_nodes

    def largest_batch(self) -> int:
        """Clips of the largest step that the controller may ask for."""
        return self.batch() * max_growth(self.trainer["controller"])


@dataclass(frozen=True)
class Rate:
    """Clips per second, and where the number comes from."""

    clips_per_s: float
    origin: str

    def __str__(self) -> str:
        return f"{self.clips_per_s:,.0f} clips/s ({self.origin})"


def in_flight(run: Run) -> dict[str, int]:
    """Clips that must fit under the cap at the same time, by reason. The trainer refuses a cap below their sum."""
    shard_clips, val_clips = run.streamer["shard_clips"], run.streamer["val_clips"]
    open_shards = room.shards_of_ranks(run.trainer["open_shards"], shard_clips, run.gpus)
    needs = [max(run.trainer["save_every"], run.largest_batch()), run.trainer["target_clips"]]  # of all lakes
    interval, target_clips = (-(-clips // run.num_nodes) for clips in needs)
    return room.in_flight(shard_clips, val_clips, run.max_workers, open_shards, interval, target_clips)


def lines_of(run: Run, needed: Rate | None, per_worker: Rate) -> list[str]:
    """The plan. Raises UserError if the cap is below what must be in flight.

    Args:
        needed: what the trainer takes; None if nobody knows.
        per_worker: what one streamer cuts.
    """
    shard_clips = run.streamer["shard_clips"]
    needs = in_flight(run)
    sum_clips = sum(needs.values())
    cap_clips = run.cap_bytes // RECORD_BYTES
    lines = [
        f"cap         {gib(run.cap_bytes)} = {cap_clips:,} clips of {RECORD_BYTES:,} bytes, "
        f"{run.cap_bytes // shard_bytes(shard_clips):,} shards of {shard_clips:,}; "
        f"{gib(run.floor_bytes)} more stay free",
        "in flight   clips that must fit at the same time:",
        *(f"            {count:>12,}  {reason}" for reason, count in needs.items()),
        f"            {sum_clips:>12,}  in all, {gib(shard_bytes(sum_clips))} of {gib(run.cap_bytes)}",
    ]
    if shard_bytes(sum_clips) > run.cap_bytes:
        raise UserError(
            f"a cap of {gib(run.cap_bytes)} is too small for the {gib(shard_bytes(sum_clips))} that must be in flight: "
            f"{' + '.join(needs)}; raise --cap-gb, or lower --save-every, --open-shards, --target-clips "
            f"or the number of workers"
        )
    stock = cap_clips - 2 * run.streamer["val_clips"]
    filling = Rate(run.max_workers * per_worker.clips_per_s, f"{run.max_workers} x {per_worker}")
    clips = run.trainer["schedule"]["total_samples"]
    lines += [f"filling     {filling}: full after {duration(stock / filling.clips_per_s)} if nothing is read"]
    training = f"training    {-(-clips // run.batch()):,} steps x {run.batch():,} = {clips:,} clips"
    if needed is None:
        return [*lines, f"stock       {stock:,} clips; not known how long they last", f"{training}; not known how long"]
    slower = min(needed.clips_per_s, filling.clips_per_s) * run.num_nodes
    share = max(0.0, 1 - filling.clips_per_s / needed.clips_per_s)
    lines += [
        f"stock       {stock:,} clips: {duration(stock / needed.clips_per_s)} at {needed}",
        f"{training}: {duration(clips / slower)}, of which the trainer waits {share:.0%} for data",
    ]
    return lines


# ---- rates ----


def needed_rate(out: Path, gpu_name: str, gpus: int = 1) -> Rate | None:
    """Clips per second that so many GPUs take from this lake: as one of the run's did when it was measured, or as is
    expected of one of this name; None if unknown."""
    measured = read_heartbeat(out / "progress.json").get("clips_per_s")
    if measured:
        num_ranks = read_heartbeat(out / "config.json").get("num_ranks", 1)
        return Rate(gpus * measured / num_ranks, f"measured by {out}, {num_ranks} GPU{'s' if num_ranks > 1 else ''}")
    for name, clips_per_s in GPU_CLIPS_PER_S.items():
        if name in gpu_name:
            return Rate(gpus * clips_per_s, f"estimated for {f'{gpus} x ' if gpus > 1 else ''}{name}, not measured")
    return None


def decode_rate() -> Rate:
    """What one core decodes and resamples, in 2 s clips: 10 s of synthetic MP3 at 48 kHz, stereo, over and over."""
    mono = recording("vowel", 48_000, 10.0, np.random.default_rng(0), np.random.default_rng(1))
    data = encoded(np.stack([mono, mono[::-1]], axis=1), 48_000, "MP3")
    for block in decode_blocks(data):  # the first time loads libraries
        del block
    num_samples, began = 0, time.process_time()
    while (spent := time.process_time() - began) < DECODE_S:
        num_samples += sum(map(len, decode_blocks(data)))
    return Rate(num_samples / CLIP_SAMPLES / spent, "one core, stereo MP3 at 48 kHz, measured just now")
