"""Clips cut short: zeros after the cut and nothing else, by a draw that belongs to the clip.

B clips   L = 32,000 samples
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from hear_distill.augment import cut_short

IDS = [(shard, clip) for shard in (3, 7) for clip in range(1000)]


def samples(num_clips: int) -> Tensor:
    """[B, L] int16, none of them zero."""
    noise = torch.randint(1, 30_000, (num_clips, 32_000), generator=torch.Generator().manual_seed(0))
    return noise.to(torch.int16)


def kept_of(ids: list[tuple[int, int]], seed: int, share: float) -> np.ndarray:
    """[B]: how many samples of each clip stay, seen from outside."""
    return cut_short(torch.ones(len(ids), 32_000, dtype=torch.int16), ids, seed=seed, share=share)[0].sum(dim=1).numpy()


@pytest.mark.parametrize("dtype", [torch.int16, torch.float32])
def test_a_cut_clip_is_its_beginning_and_then_zeros_and_all_others_are_untouched(dtype):
    whole = samples(64).to(dtype)
    before = whole.clone()
    found, is_cut = cut_short(whole, IDS[:64], seed=1, share=0.5)
    assert found.dtype == dtype and is_cut.dtype == torch.bool and 10 < is_cut.sum() < 54
    for clip, original, flag in zip(found, before, is_cut, strict=True):
        kept = int((clip != 0).sum())
        assert torch.equal(clip[:kept], original[:kept]) and not clip[kept:].any()
        assert flag == (kept < 32_000)
    assert torch.equal(whole, before), "the caller's samples changed"


def test_the_share_of_cut_clips_is_that_asked_for_and_lengths_are_uniform_from_300_ms_to_2_s():
    kept = kept_of(IDS, seed=0, share=0.15)
    cut = kept[kept < 32_000]
    assert abs(len(cut) / 2000 - 0.15) < 4 * (0.15 * 0.85 / 2000) ** 0.5
    lengths = kept_of(IDS, seed=0, share=1.0)
    assert lengths.min() >= 4800 and lengths.max() < 32_000
    quantiles = np.quantile(lengths, [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(quantiles, np.linspace(4800, 32_000, 5), atol=4 * 27_200 * 0.5 / 2000**0.5)


def test_no_clip_is_cut_at_a_share_of_zero_and_every_clip_at_one():
    assert (kept_of(IDS, seed=0, share=0.0) == 32_000).all()
    assert (kept_of(IDS, seed=0, share=1.0) < 32_000).all()


def test_a_cut_belongs_to_the_clip_and_the_seed_and_not_to_the_batch():
    kept = kept_of(IDS[:300], seed=5, share=0.5)
    order = np.random.default_rng(0).permutation(300)
    assert (kept_of([IDS[i] for i in order], seed=5, share=0.5) == kept[order]).all()
    assert (kept_of(IDS[100:103], seed=5, share=0.5) == kept[100:103]).all()
    assert (kept_of(IDS[:300], seed=6, share=0.5) != kept).mean() > 0.5
    assert (kept_of(IDS[1000:1300], seed=5, share=0.5) != kept).mean() > 0.5


def test_a_run_is_resumed_with_the_cuts_it_was_begun_with():
    """The numbers are those of the first version; others would give half-trained runs other clips."""
    assert kept_of(IDS[:6], seed=5, share=1.0).tolist() == [8021, 14310, 23785, 21316, 6622, 30245]
    assert kept_of(IDS[:6], seed=5, share=0.5).tolist() == [32_000, 32_000, 32_000, 21_316, 32_000, 30_245]


@pytest.mark.parametrize(
    ("num_samples", "num_ids", "share"), [(32_000, 2, 0.15), (4800, 3, 0.15), (32_000, 3, 1.5), (32_000, 3, -0.1)]
)
def test_clips_that_cannot_be_cut_are_refused(num_samples, num_ids, share):
    with pytest.raises(ValueError, match="expected an id for each clip, clips of more than 4800 samples and a share"):
        cut_short(torch.zeros(3, num_samples), IDS[:num_ids], seed=0, share=share)
