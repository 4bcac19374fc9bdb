"""Sounds that are longer than a clip: which clips of a shard are put together again, and which length a batch has.

in:   the JSON of the clips of a shard; the lengths that are asked for, as clips per sound (1 is a clip of 2 s)
out:  units, the groups of clips that are one sound; nothing is kept: the same shard and seed give the same units

The clips of a recording stand in one shard, in any order, unless the shard was full in the middle of the recording. A
shard is divided into units when it is opened, before anything is drawn from it: were clips drawn one by one from where
long sounds are to come from, there would soon be no two left that follow each other.

k clips of a sound   u units
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from hear_distill.audio import CLIP_SAMPLES
from hear_distill.schedule import max_growth
from hear_distill.shards import ClipInfo

CLIP_S = 2
PURPOSE = 1  # of a random number, beside seed and index

Units = dict[int, np.ndarray]  # k -> [u, k] clips of a shard, in the order of time


def runs_of(infos: Sequence[ClipInfo]) -> list[list[int]]:
    """Clips that follow each other without gap or overlap in one recording, as long as they do; each clip once."""
    places = {info.id: place for place, info in enumerate(infos)}
    next_ids = [f"{info.id.rpartition('-')[0]}-{info.start + CLIP_SAMPLES}" for info in infos]
    following = {place: places[next_id] for place, next_id in enumerate(next_ids) if next_id in places}
    runs = []
    for first in sorted(set(places.values()) - set(following.values())):
        runs.append([first])
        while runs[-1][-1] in following:
            runs[-1].append(following[runs[-1][-1]])
    return runs


def divide(infos: Sequence[ClipInfo], sizes: Sequence[int], seed: int, shard_id: int) -> Units:
    """The units of a shard with k > 1; all other clips are single.

    Every run is cut into sizes that are drawn so that, where runs are long, each size gets equally many clips.
    """
    rng = np.random.default_rng([seed, shard_id, PURPOSE])
    units: dict[int, list[list[int]]] = {size: [] for size in sizes if size > 1}
    for run in runs_of(infos):
        begin = 0
        while begin < len(run):
            fitting = np.array([size for size in sizes if size <= len(run) - begin])
            size = int(rng.choice(fitting, p=1 / fitting / (1 / fitting).sum()))
            if size > 1:
                units[size].append(run[begin : begin + size])
            begin += size
    return {size: np.array(found, dtype=int).reshape(-1, size) for size, found in units.items()}


def intact(units: Units, is_drawn: np.ndarray) -> Units:
    """The units of which no clip was drawn yet and, as k = 1, all other undrawn clips."""
    whole = {size: found[~is_drawn[found].any(axis=1)] for size, found in units.items()}
    is_single = ~is_drawn
    for found in whole.values():
        is_single[found] = False
    return {1: np.flatnonzero(is_single)[:, None], **whole}


def num_clips(supply: Mapping[int, Units]) -> dict[int, int]:
    """k -> clips in its units of all shards."""
    sizes = {size for units in supply.values() for size in units}
    return {size: sum(units[size].size for units in supply.values()) for size in sorted(sizes)}


def num_in_longer(supply: Mapping[int, Units]) -> int:
    """Clips in units of k > 1."""
    return sum(count for size, count in num_clips(supply).items() if size > 1)


def choose(counts: Mapping[int, int], needed: int, seed: int, index: int) -> int | None:
    """k of a batch of `needed` clips, by the clips there are of each, so that all run out together; None if none has
    enough. The same `index` gives the same k, unless the counts differ much."""
    enough = {size: count for size, count in counts.items() if count >= needed}
    if not enough:
        return None
    ends = np.cumsum(list(enough.values()))
    draw = np.random.default_rng([seed, index, PURPOSE]).uniform() * ends[-1]
    return list(enough)[int(np.searchsorted(ends, draw, side="right"))]


def pick(
    supply: Mapping[int, Units], size: int, needed: int, rng: np.random.Generator
) -> Iterator[tuple[int, list[int]]]:
    """(shard, clips of one unit): units of this size, `needed` clips in all, drawn from all of them alike."""
    places = [(shard_id, unit) for shard_id, units in supply.items() for unit in units[size]]
    for place in np.sort(rng.choice(len(places), needed // size, replace=False)):
        shard_id, unit = places[place]
        yield shard_id, unit.tolist()


def check(seconds: Sequence[int], chunk_size: int, controller: str) -> None:
    """Raise ValueError for lengths that no training can have."""
    if CLIP_S not in seconds or len(set(seconds)) < len(seconds):
        raise ValueError(f"--lengths must hold {CLIP_S}, and none twice, got {' '.join(map(str, seconds))}")
    for length in seconds:
        if length < CLIP_S or length % CLIP_S or chunk_size % (length // CLIP_S) or chunk_size < length:
            raise ValueError(
                f"--lengths {length}: expected an even number of seconds, of which --chunk-size, {chunk_size} clips, "
                f"holds two or more, and a whole number"
            )
    if len(seconds) > 1 and max_growth(controller) > 1:
        raise ValueError(f"--controller {controller} makes steps of other numbers of chunks: take --lengths {CLIP_S}")


def sizes_of(seconds: Sequence[int]) -> tuple[int, ...]:
    """Clips per sound, ascending."""
    return tuple(sorted(length // CLIP_S for length in seconds))
