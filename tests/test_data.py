"""The reader hands out each clip of a lake once, in an order that a resumed trainer repeats.

B clips in a batch
"""

import os
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from lake_tools import add_shard, make_clips, make_lake

from hear_distill.data import Batch, LakeReader, read_validation
from hear_distill.lake import Lake
from hear_distill.locks import Owner


@pytest.fixture
def reader_of():
    """Makes a LakeReader in the role of a process of its own; all are closed at the end."""
    owners, readers = [], []

    def make(lake: Lake, **options) -> LakeReader:
        owners.append(Owner(lake.root, "train"))
        readers.append(LakeReader(lake, owners[-1], **{"run": "run", "seed": 1, "num_open": 3, **options}))
        return readers[-1]

    yield make
    for reader in readers:
        reader.close()
    for owner in owners:
        owner.release()


def filled_lake(root: Path, *sizes: int) -> Lake:
    """A lake whose source is finished, with train shards of so many clips, ids from 0."""
    lake = make_lake(root)
    lake.db.execute("UPDATE tars SET state = 'done'")
    for num_clips in sizes:
        add_shard(lake, num_clips)
    return lake


def batches_of(reader: LakeReader, batch_size: int, count: int = 10_000) -> list[Batch]:
    """Up to `count` batches, each marked as trained."""
    batches = []
    while len(batches) < count and (batch := reader.next_batch(batch_size)) is not None:
        reader.mark_trained(batch.ids)
        batches.append(batch)
    return batches


def die(reader: LakeReader) -> None:
    """Drop the lock as a kill would; nothing is given back."""
    reader.owner.file.close()


def ids_of(batches: list[Batch]) -> Counter[tuple[int, int]]:
    """How often each (shard, clip) was handed out."""
    return Counter(clip for batch in batches for clip in batch.ids)


SIZES = (7, 10, 1, 9, 8, 13)
ALL = Counter((shard, clip) for shard, num_clips in enumerate(SIZES) for clip in range(num_clips))


@pytest.mark.parametrize("num_open", [1, 3, 99])
@pytest.mark.parametrize("batch_size", [1, 6, 16])  # 16 is more than the longest shard has
def test_each_clip_of_a_lake_is_handed_out_once(tmp_path, reader_of, num_open, batch_size):
    reader = reader_of(filled_lake(tmp_path, *SIZES), num_open=num_open)
    batches = batches_of(reader, batch_size)
    assert {len(batch.ids) for batch in batches} == {batch_size}
    assert len(batches) == 48 // batch_size
    assert not ids_of(batches) - ALL
    assert reader.num_unread() == 48 % batch_size
    assert reader.is_drained()


def test_a_row_holds_the_samples_of_its_clip(tmp_path, reader_of):
    reader = reader_of(filled_lake(tmp_path, *SIZES))
    written = [make_clips(num_clips, shard) for shard, num_clips in enumerate(SIZES)]
    for batch in batches_of(reader, 6):
        assert (batch.samples.dtype, batch.samples.shape) == (np.int16, (6, 32_000))
        for row, (shard, clip) in zip(batch.samples, batch.ids, strict=True):
            np.testing.assert_array_equal(row, written[shard][clip].samples)


def test_clips_of_a_batch_come_from_several_open_shards_and_from_no_others(tmp_path, reader_of):
    lake = filled_lake(tmp_path, *[40] * 6)
    batch = reader_of(lake, num_open=4).next_batch(32)
    assert Counter(shard for shard, _ in batch.ids).keys() == {0, 1, 2, 3}
    assert [shard.id for shard in lake.ready("train")] == [4, 5]
    assert any(np.diff([clip for shard, clip in batch.ids if shard == 0]) > 1), "drawn at random, not from the front"


def test_the_draw_depends_on_the_seed_and_on_the_number_of_the_batch(tmp_path, reader_of):
    draws = {}
    for name, seed, number in (("a", 5, 0), ("again", 5, 0), ("other seed", 6, 0), ("other number", 5, 1)):
        reader = reader_of(filled_lake(tmp_path / name, 20), seed=seed, state={"num_batches": number, "coverage": {}})
        draws[name] = reader.next_batch(9).ids
    assert draws.pop("again") == draws["a"]
    assert len(set(map(tuple, draws.values()))) == 3


@pytest.mark.parametrize("num_before", [0, 1, 3, 5])
def test_a_killed_and_resumed_reader_goes_on_as_the_unbroken_one(tmp_path, reader_of, num_before):
    unbroken = [batch.ids for batch in batches_of(reader_of(filled_lake(tmp_path / "unbroken", *SIZES)), 6)]

    lake = filled_lake(tmp_path / "broken", *SIZES)
    first = reader_of(lake)
    head = [batch.ids for batch in batches_of(first, 6, num_before)]
    state = first.state()
    assert state["num_batches"] == num_before
    first.record_checkpoint()
    batches_of(first, 6, 2)  # after the checkpoint: lost with the process
    first.next_batch(6)  # handed out, but not even trained on
    die(first)
    second = reader_of(lake, state=state)
    assert head + [batch.ids for batch in batches_of(second, 6)] == unbroken


def test_what_was_drawn_but_not_trained_on_is_in_no_checkpoint(tmp_path, reader_of):
    lake = filled_lake(tmp_path, 8)
    first = reader_of(lake)
    trained, drawn = first.next_batch(3), first.next_batch(3)
    first.mark_trained(trained.ids)
    first.record_checkpoint()
    state = first.state()
    die(first)
    second = reader_of(lake, state=state)
    assert second.num_unread() == 5
    assert not ids_of([drawn]) - ids_of(batches_of(second, 1))
    assert lake.books().trained == 3


def test_a_trainer_that_leaves_loses_nothing_that_was_not_trained_on(tmp_path, reader_of):
    lake = filled_lake(tmp_path, 8, 8)
    first = reader_of(lake)
    trained = batches_of(first, 5, 1)
    first.record_checkpoint()
    first.next_batch(5)
    first.close()
    other = batches_of(reader_of(lake, run="another run"), 1)
    assert ids_of(trained + other) == Counter((shard, clip) for shard in (0, 1) for clip in range(8))


def test_a_shard_is_let_go_after_the_second_checkpoint_that_covers_it(tmp_path, reader_of):
    lake = filled_lake(tmp_path, 4, 40)
    reader = reader_of(lake)
    while not reader.holds_trained_shards():
        batches_of(reader, 1, 1)
    reader.record_checkpoint()
    assert list(reader.coverage()) == [0, 1]
    reader.record_checkpoint()
    assert list(reader.coverage()) == [1]
    assert (lake.totals()["trained"], reader.holds_trained_shards()) == (4, False)


def test_a_file_is_open_from_its_lease_to_its_last_clip(tmp_path, reader_of):
    def open_shards() -> list[str]:
        links = (path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink())
        return sorted(path.name for path in links if path.parent == tmp_path / "shards")

    reader = reader_of(filled_lake(tmp_path, 3, 3, 3, 3))
    assert open_shards() == []
    batches_of(reader, 2, 1)
    assert open_shards() == [f"{i:08d}.tar" for i in range(3)]
    batches_of(reader, 1)
    assert open_shards() == []
    state = reader.state()
    die(reader)
    reader_of(reader.lake, state=state)
    assert open_shards() == [], "nothing is left to read in them"


@pytest.mark.parametrize("damage", ["flipped bit", "cut short", "missing"])
def test_a_broken_shard_is_quarantined_when_it_is_leased_and_the_rest_goes_on(tmp_path, reader_of, damage, capsys):
    lake = filled_lake(tmp_path, *SIZES)
    path = lake.path(1, "train")
    content = bytearray(path.read_bytes())
    content[300_000] ^= 1
    path.unlink()
    if damage != "missing":
        path.write_bytes(content if damage == "flipped bit" else content[:-600])

    reader = reader_of(lake)
    batches = batches_of(reader, 1)
    assert ids_of(batches) == Counter({clip: 1 for clip in ALL if clip[0] != 1})
    assert (lake.books().quarantined, lake.books().balance(), reader.is_drained()) == (10, 0, True)
    assert "shard 1 is quarantined" in capsys.readouterr().err
    assert lake.disagreements() == []


def test_a_shard_that_broke_while_the_trainer_was_away_is_quarantined_less_what_was_trained(tmp_path, reader_of):
    lake = filled_lake(tmp_path, 8, 8)
    first = reader_of(lake)
    batches_of(first, 5, 1)
    first.record_checkpoint()
    state = first.state()
    die(first)
    os.truncate(lake.path(0, "train"), 1_000)
    second = reader_of(lake, state=state)
    assert set(ids_of(batches_of(second, 1))) <= {(1, clip) for clip in range(8)}
    second.record_checkpoint()
    books = lake.books()
    assert (books.balance(), books.quarantined + books.trained) == (0, 16)


def test_a_starved_reader_goes_on_when_a_shard_arrives(tmp_path, reader_of):
    lake = make_lake(tmp_path)  # its tar is not read to the end
    reader = reader_of(lake)
    assert (reader.next_batch(4), reader.is_drained()) == (None, False)
    add_shard(lake, 3)
    assert (reader.next_batch(4), reader.num_unread(), reader.is_drained()) == (None, 3, False)
    add_shard(lake, 3)
    assert len(reader.next_batch(4).ids) == 4


def test_two_readers_share_a_lake_without_sharing_a_clip(tmp_path, reader_of):
    lake = filled_lake(tmp_path, *SIZES)
    readers = [reader_of(lake, run=run, num_open=1) for run in ("one", "two")]
    batches = []
    while any(found := [batches_of(reader, 1, 2) for reader in readers]):
        batches += chain(*found)
    assert ids_of(batches) == ALL


def test_the_report_tells_what_is_left_to_read(tmp_path, reader_of):
    lake = filled_lake(tmp_path, 8, 8)
    reader = reader_of(lake, num_open=1)
    batches_of(reader, 3, 1)
    reader.next_batch(3)
    assert lake.unread_clips() == 16
    reader.report()
    assert lake.unread_clips() == 10


# ---- validation ----


@pytest.mark.parametrize(("num_clips", "num_found"), [(0, 0), (3, 3), (5, 5), (7, 7), (99, 9)])
def test_validation_is_the_first_clips_oldest_shard_first(tmp_path, num_clips, num_found):
    lake = filled_lake(tmp_path, 4)
    ids = [add_shard(lake, size, split) for size, split in ((5, "recent"), (2, "anchor"), (4, "recent"))]
    everything = [clip.samples for shard, size in ((ids[0], 5), (ids[2], 4)) for clip in make_clips(size, shard)]
    found = read_validation(lake, "recent", num_clips)
    np.testing.assert_array_equal(found, np.array(everything[:num_clips]).reshape(-1, 32_000))
    assert len(found) == num_found
    assert [shard.id for shard in lake.ready("recent")] == [ids[0], ids[2]], "looking does not consume"


def test_a_validation_shard_that_retires_while_it_is_looked_at_is_left_out(tmp_path, monkeypatch):
    lake = make_lake(tmp_path)
    ids = [add_shard(lake, 3, "recent") for _ in range(2)]
    listed = lake.ready("recent")
    lake.retire_recent(3)
    monkeypatch.setattr(lake, "ready", lambda split: listed)
    expected = np.array([clip.samples for clip in make_clips(3, ids[1])])
    np.testing.assert_array_equal(read_validation(lake, "recent", 6), expected)
