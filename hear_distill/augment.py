"""Short events: some clips are cut and padded with zeros, as the teacher's callers pad what is shorter than 2 s.

in:   the samples of a batch on any device, before the front end, and the ids of its clips
out:  the samples with silence after the cut, and which clips were cut; teacher and student see the same

B clips   L = 32,000 samples
"""

import hashlib
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

SAMPLE_RATE = 16_000
SHORTEST_S = 0.3


def cut_short(samples: Tensor, clip_ids: Sequence[Hashable], *, seed: int, share: float) -> tuple[Tensor, Tensor]:
    """[B, L] -> the same samples [B, L] with zeros after the cut, and [B] bool: which clips were cut.

    A clip is cut with probability `share`, to a length that is uniform from 0.3 s up to, and not including, its own.
    Whether and where is a function of (seed, id of the clip) alone: the same in any batch, on any rank, after any
    resumption. The ids are plain values, such as the (shard, clip) pairs of a batch; their repr is what counts.

    Raises ValueError for clips without an id, clips no longer than 0.3 s, or a share that is none.
    """
    length = samples.shape[1]
    shortest = round(SHORTEST_S * SAMPLE_RATE)
    if len(clip_ids) != len(samples) or length <= shortest or not 0 <= share <= 1:
        raise ValueError(
            f"expected an id for each clip, clips of more than {shortest} samples and a share from 0 to 1, "
            f"got {len(clip_ids)} ids, samples {list(samples.shape)} and {share}"
        )
    kept = [_kept_samples(clip_id, seed, share, shortest, length) for clip_id in clip_ids]
    kept = torch.tensor(kept, dtype=torch.int32).to(samples.device, non_blocking=True)  # [B]
    is_kept = torch.arange(length, device=samples.device) < kept[:, None]  # [B, L]
    return samples.masked_fill(~is_kept, 0), kept < length


def _kept_samples(clip_id: Hashable, seed: int, share: float, shortest: int, length: int) -> int:
    """How many samples of a clip stay: all, or a uniform draw from `shortest` up to `length` - 1."""
    draw = hashlib.blake2b(f"cut {seed} {clip_id!r}".encode(), digest_size=16).digest()
    if int.from_bytes(draw[:8]) >= share * 2**64:
        return length
    return shortest + int.from_bytes(draw[8:]) * (length - shortest) // 2**64
