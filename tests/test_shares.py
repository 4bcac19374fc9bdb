"""How open shards are dealt to ranks: none is lost, none is given twice, nobody has much more to read than others."""

import numpy as np
import pytest

from hear_distill.files import UserError
from hear_distill.shares import dealt, num_untrained, refuse_overlap, taken_up

LAKE = {"id": "a", "source": "sounds", "revision": "r1", "seed": "0", "num_nodes": "2", "node_rank": "0"}


def share_of(**num_untrained_by_shard: int) -> dict:
    """Shards s<id>=n of 20 clips, of which n are not trained; odd ones had a pass before."""
    share = {"coverage": {}, "uses": {}, "num_clips": {}}
    for name, count in num_untrained_by_shard.items():
        shard = int(name[1:])
        share["coverage"][shard] = np.packbits(np.arange(20) >= count, bitorder="little").tobytes()
        share["num_clips"][shard] = 20
        share["uses"] |= {shard: 1} if shard % 2 else {}
    return share


def test_unread_clips_are_counted_past_the_padding_of_the_bits():
    assert num_untrained(share_of(s3=20, s4=1, s9=0)) == 21


def test_as_many_ranks_as_before_get_their_own_shares_again():
    shares = [share_of(s5=3, s1=20), share_of(s2=7)]
    again = taken_up(shares, 2)
    assert again == shares and list(again[0]["coverage"]) == [5, 1]


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_every_shard_is_dealt_to_one_rank_with_all_that_is_known_of_it(num_ranks):
    shares = [share_of(s5=3, s1=20, s8=0), share_of(s2=7, s3=11)]
    hands = dealt(shares, num_ranks)
    assert len(hands) == num_ranks
    for part in ("coverage", "uses", "num_clips"):
        union = shares[0][part] | shares[1][part]
        assert sum(len(hand[part]) for hand in hands) == len(union)
        assert {i: value for hand in hands for i, value in hand[part].items()} == union


def test_what_one_rank_has_left_is_dealt_to_those_that_have_nothing():
    hands = dealt([share_of(s1=20, s2=20, s3=12, s4=9), share_of(s6=0), share_of()], 3)
    assert sorted(num_untrained(hand) for hand in hands) == [20, 20, 21]


def test_shards_of_a_rank_stay_in_the_order_of_their_leases():
    (hand,) = dealt([share_of(s7=1, s2=20), share_of(s5=9)], 1)
    assert list(hand["coverage"]) == [7, 2, 5]


@pytest.mark.parametrize(
    ("change", "is_disjoint"),
    [
        ({}, True),  # several ranks on one lake
        ({"id": "b", "node_rank": "1"}, True),
        ({"id": "b", "source": "others"}, True),
        ({"id": "b"}, False),
        ({"id": "b", "node_rank": "1", "seed": "1"}, False),
        ({"id": "b", "node_rank": "1", "num_nodes": "3"}, False),
    ],
    ids=["one lake", "other part", "other source", "same part", "other order", "other number of parts"],
)
def test_lakes_with_the_same_clips_are_refused(change, is_disjoint):
    lakes = [LAKE, LAKE | change]
    if is_disjoint:
        return refuse_overlap(lakes)
    with pytest.raises(UserError, match="--num-nodes N --node-rank R"):
        refuse_overlap(lakes)
