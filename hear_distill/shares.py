"""Which rank reads which of the open shards: what a checkpoint says of them, and how they are dealt anew.

in:   shares: for each rank on a lake, what its reader says of the shards that it has leased
out:  shares, for as many ranks as there are now

A rank that comes back as one of as many gets its own share, in its own order. For another number of ranks, or when one
of them has nothing left to read, the shards are dealt anew, the fullest first, each to the rank that has least. Shards
are not split: each clip is read by the one rank that has leased its shard.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hear_distill.files import UserError

Share = dict[str, Any]
"""coverage, uses and num_clips, each by shard; as `LakeReader.state` has them, in the order of the leases"""
PARTS = ("coverage", "uses", "num_clips")


def refuse_overlap(lakes: Iterable[Mapping[str, str]]) -> None:
    """Raise UserError if lakes, given by their settings, hold the same clips of one source."""
    by_id = {settings["id"]: settings for settings in lakes}
    parts: dict[str, set[tuple[str, ...]]] = {}
    for settings in by_id.values():
        whole = tuple(settings[name] for name in ("revision", "seed", "num_nodes"))
        its_parts = parts.setdefault(settings["source"], set())
        if any(other[:-1] != whole or other[-1] == settings["node_rank"] for other in its_parts):
            raise UserError(
                f"the lakes of the ranks hold the same clips of {settings['source']}; make one lake for each machine "
                f"with run_lake.py --num-nodes N --node-rank R, of the same revision and seed"
            )
        its_parts.add((*whole, settings["node_rank"]))


def num_untrained(share: Share) -> int:
    """Clips that no step of this pass contains."""
    return sum(_untrained_by_shard(share).values())


def _untrained_by_shard(share: Share) -> dict[int, int]:
    """By shard: its clips less the bits of its coverage."""
    covered = {shard_id: int.from_bytes(bits, "little").bit_count() for shard_id, bits in share["coverage"].items()}
    return {shard_id: share["num_clips"][shard_id] - count for shard_id, count in covered.items()}


def taken_up(shares: Sequence[Share], num_ranks: int) -> list[Share]:
    """The shares with which so many ranks go on: as they were if they are as many, else dealt anew."""
    return list(shares) if len(shares) == num_ranks else dealt(shares, num_ranks)


def dealt(shares: Sequence[Share], num_ranks: int) -> list[Share]:
    """The same shards, so that each of so many ranks has about as many clips to read."""
    union = {part: {i: value for share in shares for i, value in share[part].items()} for part in PARTS}
    untrained = _untrained_by_shard(union)
    rank_of, num_dealt = {}, [0] * num_ranks
    for shard_id in sorted(untrained, key=lambda shard_id: (-untrained[shard_id], shard_id)):
        rank = rank_of[shard_id] = num_dealt.index(min(num_dealt))
        num_dealt[rank] += untrained[shard_id]
    return [
        {part: {i: value for i, value in union[part].items() if rank_of[i] == rank} for part in PARTS}
        for rank in range(num_ranks)
    ]
