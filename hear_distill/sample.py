"""The first clips of a run, looked at before anything is leased: looking consumes nothing.

in:   the ready train shards of a lake
out:  clips in parts, with the ids under which a trainer will draw them

The oldest shards come first, as in leasing, so a run draws these clips among its first ones.
"""

import os
from collections.abc import Iterator

import numpy as np

from hear_distill.audio import CLIP_SAMPLES
from hear_distill.lake import Lake
from hear_distill.schema import TRAIN
from hear_distill.shards import ShardBroken, read_clips, verify_shard


def has_sample(lake: Lake, num_clips: int) -> bool:
    """Whether that many clips are ready, or no more will come than there are."""
    states = lake.tar_states()
    is_all = not (states["waiting"] or states["open"])
    return is_all or num_ready(lake) >= num_clips


def num_ready(lake: Lake) -> int:
    """Clips of the train shards that nobody holds."""
    return sum(shard.num_clips for shard in lake.ready(TRAIN))


def first_clips(lake: Lake, num_clips: int, part: int) -> Iterator[tuple[list[tuple[int, int]], np.ndarray]]:
    """(shard, clip) ids and samples [n, 32000] int16, n <= part, of the first `num_clips` clips, or of all.

    A shard that fails its hash is left out: the reader will find the same, quarantine it and say so.
    """
    missing = num_clips
    for shard in lake.ready(TRAIN):
        if not missing:
            return
        try:
            verify_shard(shard.path, shard.num_clips, shard.sha256)
        except ShardBroken:
            continue
        num_taken = min(missing, shard.num_clips)
        missing -= num_taken
        fd = os.open(shard.path, os.O_RDONLY)
        try:
            for begin in range(0, num_taken, part):
                clips = range(begin, min(begin + part, num_taken))
                samples = np.empty((len(clips), CLIP_SAMPLES), np.int16)  # [n, 32000]
                read_clips(fd, clips, samples)
                yield [(shard.id, clip) for clip in clips], samples
        finally:
            os.close(fd)
