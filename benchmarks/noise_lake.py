"""A lake of white noise that is ready to be read to its end, for the benchmarks of this folder."""

from collections import Counter
from pathlib import Path

import numpy as np

from hear_distill.audio import CLIP_SAMPLES
from hear_distill.lake import Lake
from hear_distill.schema import TRAIN, Identity, Part
from hear_distill.shards import Clip, shard_bytes, write_shard

RECORDING_CLIPS = 5  # a recording of the dataset lasts 10 s, so it gives 5 clips


def make_lake(root: Path, num_shards: int, shard_clips: int) -> Lake:
    """Train shards of `shard_clips` clips each, and a source without any more of them."""
    identity = Identity("noise", "none", 0, CLIP_SAMPLES, shard_clips, 0.0, 0)
    limits = {"cap_bytes": 2**40, "reservation_bytes": shard_bytes(shard_clips), "max_workers": 1}
    lake = Lake.create(root, identity, {"noise.tar": 1}, **limits)
    lake.db.execute("UPDATE tars SET state = 'done'")
    for number in range(num_shards):
        noise = np.random.default_rng(number).integers(-20_000, 20_000, (shard_clips, CLIP_SAMPLES), np.int16)
        clips = [
            Clip("noise.tar", f"{number}-{i // RECORDING_CLIPS}", i % RECORDING_CLIPS * CLIP_SAMPLES, 10.0, "", samples)
            for i, samples in enumerate(noise)
        ]
        shard_id = lake.begin_shard("benchmark", shard_bytes(shard_clips))
        digest = write_shard(lake.path(shard_id, TRAIN, ".tar.part"), clips)
        lake.publish(shard_id, [Part(TRAIN, shard_clips, shard_bytes(shard_clips), digest)], [], Counter())
    return lake
