"""Our reader against the webdataset library: the same shards to the same batches, turn by turn in one process.

in:   nothing; a small lake of noise is made in a temporary folder
out:  a table, and as the last line of stdout the same as JSON
cost: about 20 s, 270 MB in the temporary folder

    python benchmarks/loader.py
    python benchmarks/loader.py --rounds 15

The hot path is what is left once the shards are open: draw, read, hand over. Leases and hashes are in all_clips_per_s,
and in what a trainer waits for a batch, read ahead or read when asked for, with steps as short as a fast GPU's.
Everything comes from the page cache; of a disk, this says nothing.

B clips in a batch
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from hashlib import file_digest
from pathlib import Path
from statistics import mean, median

import numpy as np
import webdataset
from noise_lake import make_lake

from hear_distill.audio import CLIP_SAMPLES
from hear_distill.data import AHEAD_CLIPS, Drawing, LakeReader
from hear_distill.lake import Lake
from hear_distill.locks import Owner
from hear_distill.schema import TRAIN
from hear_distill.shards import WAV_HEADER, read_infos

NUM_SHARDS, SHARD_CLIPS = 8, 512
NUM_CLIPS = NUM_SHARDS * SHARD_CLIPS
BATCH = 128
NUM_OPEN = 4
BUFFER_CLIPS = 1_000  # of webdataset's shuffling, as its documentation has it
STEP_S = BATCH / 4_000  # of a GPU that takes 4,000 clips/s
WARM_UP = 1

Batches = Iterable[tuple[np.ndarray, list[str]]]  # samples [B, 32000] int16, clip ids


class Ours:
    """Our reader on a lake, used once; its leases go back untrained, so the next round finds the lake as it was."""

    def __init__(self, lake: Lake, num_open: int, ahead_clips: int) -> None:
        self.owner = Owner(lake.root, "train")
        drawing = Drawing(run="run", seed=0, num_open=num_open, batch_size=BATCH, ahead_clips=ahead_clips)
        self.reader = LakeReader(lake, self.owner, drawing)

    def __enter__(self) -> LakeReader:
        return self.reader

    def __exit__(self, *_: object) -> None:
        self.reader.close()
        self.owner.release()


def hot_path(lake: Lake) -> float:
    """Clips per second once all shards are open; the thread does nothing ahead, so all its work is in the time."""
    with Ours(lake, NUM_SHARDS, ahead_clips=0) as reader:
        reader.next_batch()  # opens and checks them
        start, num_clips = time.perf_counter(), 0
        while (batch := reader.next_batch()) is not None:
            num_clips += len(batch.ids)
        return num_clips / (time.perf_counter() - start)


def with_leases_and_hashes(lake: Lake) -> float:
    """Clips per second from nothing open to the last batch."""
    start, num_clips = time.perf_counter(), 0
    with Ours(lake, NUM_OPEN, AHEAD_CLIPS) as reader:
        while (batch := reader.next_batch()) is not None:
            num_clips += len(batch.ids)
        return num_clips / (time.perf_counter() - start)


def theirs(paths: list[str]) -> Batches:
    """The same clips through webdataset: only the members we need, no parsing of the WAV header, its own shuffling."""

    def decode(sample: dict) -> tuple[np.ndarray, str]:
        return np.frombuffer(sample["wav"], np.int16, offset=len(WAV_HEADER)), sample["__key__"]

    pipeline = webdataset.WebDataset(
        paths, shardshuffle=len(paths), select_files=lambda name: name.endswith(".wav"), seed=0
    )
    batches = pipeline.map(decode).shuffle(BUFFER_CLIPS, seed=0).batched(BATCH, collation_fn=None)
    for batch in batches:
        samples, keys = zip(*batch, strict=True)
        yield np.stack(samples), list(keys)


def webdataset_path(paths: list[str]) -> float:
    """Clips per second; opening a shard costs it no hash, so all of it is hot."""
    start, num_clips = time.perf_counter(), 0
    for _, keys in theirs(paths):
        num_clips += len(keys)
    return num_clips / (time.perf_counter() - start)


def hashing(paths: list[str]) -> float:
    """Microseconds per clip."""
    start = time.perf_counter()
    for path in paths:
        with open(path, "rb") as f:
            file_digest(f, "sha256")
    return 1e6 * (time.perf_counter() - start) / NUM_CLIPS


def waits_ms(lake: Lake, ahead_clips: int) -> list[float]:
    """What a trainer waits for each batch but the first, whose shards nobody could open before."""
    waits = []
    with Ours(lake, NUM_OPEN, ahead_clips) as reader:
        while True:
            start = time.perf_counter()
            if reader.next_batch() is None:
                return waits[1:]
            waits.append(1000 * (time.perf_counter() - start))
            time.sleep(STEP_S)


def our_batches(lake: Lake, ids: dict[tuple[int, int], str]) -> Batches:
    """Every batch of the lake, as the trainer gets it."""
    with Ours(lake, NUM_OPEN, AHEAD_CLIPS) as reader:
        while (batch := reader.next_batch()) is not None:
            yield batch.samples, [ids[place] for place in batch.ids]


def recordings_in(batches: list[list[str]]) -> float:
    """Distinct recordings in a whole batch, on average; a clip id ends with its first sample."""
    return mean(len({key.rsplit("-", 1)[0] for key in keys}) for keys in batches if len(keys) == BATCH)


def check_and_mix(lake: Lake, paths: list[str]) -> dict[str, float]:
    """Distinct recordings in a batch. Stops if the two give different sounds for a clip, or a clip twice."""
    ids = {(shard, i): info.id for shard in range(NUM_SHARDS) for i, info in enumerate(read_infos(Path(paths[shard])))}
    sums, keys = [], {}
    for name, batches in (("ours", our_batches(lake, ids)), ("webdataset", theirs(paths))):
        found, keys[name] = {}, []
        for samples, batch_keys in batches:
            found |= dict(zip(batch_keys, samples.astype(np.int64) @ np.arange(CLIP_SAMPLES), strict=True))
            keys[name].append(batch_keys)
        sums.append(found)
    if sums[0] != sums[1] or sorted(sums[0]) != sorted(ids.values()):
        raise SystemExit(
            f"of {NUM_CLIPS} clips the two read {len(sums[0])} and {len(sums[1])}, and not the same sounds\n"
            f"  to find out which is wrong: python -m pytest tests/test_data.py tests/test_shards.py"
        )
    shuffled = np.random.default_rng(0).permutation(list(ids.values())).tolist()
    keys["shuffled"] = [shuffled[at : at + BATCH] for at in range(0, NUM_CLIPS, BATCH)]
    return {f"recordings_{name}": round(recordings_in(batches), 1) for name, batches in keys.items()}


def in_turns(candidates: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """The median of each. They take turns, so that a busy machine slows all of them alike."""
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(WARM_UP + rounds):
        for name, candidate in candidates.items():
            found[name].append(candidate())
    return {name: median(values[WARM_UP:]) for name, values in found.items()}


def main(rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        lake = make_lake(Path(folder) / "lake", NUM_SHARDS, SHARD_CLIPS)
        paths = [str(shard.path) for shard in lake.ready(TRAIN)]
        mixing = check_and_mix(lake, paths)
        candidates = {
            "ours": lambda: hot_path(lake),
            "webdataset": lambda: webdataset_path(paths),
            "all": lambda: with_leases_and_hashes(lake),
            "hash": lambda: hashing(paths),
        }
        found = in_turns(candidates, rounds)
        ahead, asked = waits_ms(lake, AHEAD_CLIPS), waits_ms(lake, 0)
        lake.close()

    print(f"{NUM_CLIPS} clips in {NUM_SHARDS} shards, batches of {BATCH}, median of {rounds} rounds")
    print(f"ours, hot path       {found['ours']:9.0f} clips/s")
    print(f"ours, with hashes    {found['all']:9.0f} clips/s, of which a hash takes {found['hash']:.1f} us per clip")
    print(f"webdataset           {found['webdataset']:9.0f} clips/s")
    print(f"a trainer with steps of {1000 * STEP_S:.0f} ms waits for a batch")
    for name, waits in (("read ahead", ahead), ("read when asked for", asked)):
        print(f"{name:20}{mean(waits):10.2f} ms, {max(waits):.1f} ms at most")
    print(f"distinct recordings in a batch: {mixing}")
    result = {
        "clips_per_s": round(found["ours"]),
        "vs_webdataset": round(found["ours"] / found["webdataset"], 2),
        "all_clips_per_s": round(found["all"]),
        "all_vs_webdataset": round(found["all"] / found["webdataset"], 2),
        "hash_cost_us_per_clip": round(found["hash"], 2),
        "wait_ms_ahead": round(mean(ahead), 3),
        "wait_ms_ahead_worst": round(max(ahead), 2),
        "wait_ms_asked": round(mean(asked), 3),
        "wait_ms_asked_worst": round(max(asked), 2),
        **mixing,
        "batch": BATCH,
        "cores": len(os.sched_getaffinity(0)),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="turns of each (default 7)")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds is {arguments.rounds}, expected at least 1")
    main(arguments.rounds)
