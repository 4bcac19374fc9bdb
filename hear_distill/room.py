"""The smallest lake for a trainer: what must lie in it at the same time, or trainer and streamers wait for each other.

in:   a lake, and what the trainer keeps in flight
out:  nothing, or a refusal with the sum
"""

from hear_distill.data import AHEAD_CLIPS
from hear_distill.files import UserError, gib
from hear_distill.lake import Lake
from hear_distill.shards import shard_bytes


def in_flight(
    shard_clips: int, val_clips: int, workers: int, open_shards: int, interval: int, target_clips: int
) -> dict[str, int]:
    """Clips that must fit under the cap at the same time, by reason; `interval` is between two checkpoints.

    The clips that the targets are measured on must be ready before the first step, when no others are in flight.
    """
    needs = {
        f"{workers} workers, one shard each": workers * shard_clips,
        f"{open_shards} open shards": open_shards * shard_clips,
        f"2 checkpoint intervals of {interval} clips": 2 * interval,
        f"2 validation sets of {val_clips} clips": 2 * val_clips,
    }
    missing = target_clips - open_shards * shard_clips - 2 * interval
    if missing > 0:
        needs["the rest of --target-clips"] = missing
    return needs


def shards_of_ranks(open_shards: int, shard_clips: int, num_ranks: int) -> int:
    """Shards that the ranks on a lake hold. Of several, none may wait for room that another one reads ahead in."""
    return open_shards if num_ranks == 1 else num_ranks * (open_shards + -(-AHEAD_CLIPS // shard_clips))


def refuse_small_cap(lake: Lake, open_shards: int, interval: int, target_clips: int, num_ranks: int = 1) -> None:
    """Raise UserError if the cap of the lake is below what is in flight."""
    shard_clips, val_clips, workers = (int(lake.setting(name)) for name in ("shard_clips", "val_clips", "max_workers"))
    num_open = shards_of_ranks(open_shards, shard_clips, num_ranks)
    needs = in_flight(shard_clips, val_clips, workers, num_open, interval, target_clips)
    needed_bytes = shard_bytes(sum(needs.values()))
    if lake.cap_bytes() < needed_bytes:
        terms = " + ".join(f"{name} ({gib(shard_bytes(clips))})" for name, clips in needs.items())
        raise UserError(
            f"the cap of {gib(lake.cap_bytes())} is too small: {terms} = {gib(needed_bytes)} must fit; raise --cap-gb, "
            f"or lower --save-every, --open-shards, --target-clips or the number of workers"
        )
