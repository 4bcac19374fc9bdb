"""The reader hands out each clip of a lake once, in an order that a resumed trainer repeats.

B clips in a batch
"""

import os
import threading
from collections import Counter
from concurrent.futures import wait
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from lake_tools import add_shard, batches_of, die, filled_lake, ids_of, make_clips, make_lake, run_python

from hear_distill.data import read_validation
from hear_distill.shards import ShardBroken, verify_shard

SIZES = (7, 10, 1, 9, 8, 13)
ALL = Counter((shard, clip) for shard, num_clips in enumerate(SIZES) for clip in range(num_clips))


@pytest.mark.parametrize("num_open", [1, 3, 99])
@pytest.mark.parametrize("batch_size", [1, 6, 16])  # 16 is more than the longest shard has
def test_each_clip_of_a_lake_is_handed_out_once(tmp_path, reader_of, num_open, batch_size):
    reader = reader_of(filled_lake(tmp_path, *SIZES), num_open=num_open, batch_size=batch_size)
    batches = batches_of(reader)
    assert {len(batch.ids) for batch in batches} == {batch_size}
    assert len(batches) == 48 // batch_size
    assert not ids_of(batches) - ALL
    assert reader.num_unread() == 48 % batch_size
    assert reader.is_drained()


def test_a_row_holds_the_samples_of_its_clip(tmp_path, reader_of):
    reader = reader_of(filled_lake(tmp_path, *SIZES), batch_size=6)
    written = [make_clips(num_clips, shard) for shard, num_clips in enumerate(SIZES)]
    for batch in batches_of(reader):
        assert (batch.samples.dtype, batch.samples.shape) == (np.int16, (6, 32_000))
        for row, (shard, clip) in zip(batch.samples, batch.ids, strict=True):
            np.testing.assert_array_equal(row, written[shard][clip].samples)


def test_clips_of_a_batch_come_from_several_open_shards_and_from_no_others(tmp_path, reader_of):
    lake = filled_lake(tmp_path, *[40] * 6)
    batch = reader_of(lake, num_open=4, batch_size=32, ahead_clips=0).next_batch()
    assert Counter(shard for shard, _ in batch.ids).keys() == {0, 1, 2, 3}
    assert [shard.id for shard in lake.ready("train")] == [4, 5]
    assert any(np.diff([clip for shard, clip in batch.ids if shard == 0]) > 1), "drawn at random, not from the front"


def test_the_draw_depends_on_the_seed_and_on_the_number_of_the_batch(tmp_path, reader_of):
    draws = {}
    for name, seed, number in (("a", 5, 0), ("again", 5, 0), ("other seed", 6, 0), ("other number", 5, 1)):
        state = {"num_batches": number, "coverage": {}, "uses": {}}
        draws[name] = reader_of(filled_lake(tmp_path / name, 20), seed=seed, batch_size=9, state=state).next_batch().ids
    assert draws.pop("again") == draws["a"]
    assert len(set(map(tuple, draws.values()))) == 3


@pytest.mark.parametrize("num_before", [0, 1, 3, 5])
@pytest.mark.parametrize("ahead_clips", [(0, 0), (99, 99), (0, 99), (7, 0)])
def test_a_killed_and_resumed_reader_goes_on_as_the_unbroken_one(tmp_path, reader_of, num_before, ahead_clips):
    """And as one that reads nothing ahead: what was leased ahead is in no checkpoint."""
    lake = filled_lake(tmp_path / "unbroken", *SIZES)
    unbroken = [batch.ids for batch in batches_of(reader_of(lake, batch_size=6, ahead_clips=0))]

    lake = filled_lake(tmp_path / "broken", *SIZES)
    first = reader_of(lake, batch_size=6, ahead_clips=ahead_clips[0])
    head = [batch.ids for batch in batches_of(first, num_before)]
    state = first.state()
    assert state["num_batches"] == num_before
    first.record_checkpoint()
    batches_of(first, 2)  # after the checkpoint: lost with the process
    first.next_batch()  # handed out, but not even trained on
    die(first)
    second = reader_of(lake, batch_size=6, ahead_clips=ahead_clips[1], state=state)
    assert head + [batch.ids for batch in batches_of(second)] == unbroken


def test_what_was_drawn_but_not_trained_on_is_in_no_checkpoint(tmp_path, reader_of):
    lake = filled_lake(tmp_path, 8)
    first = reader_of(lake, batch_size=3)
    trained, drawn = first.next_batch(), first.next_batch()
    first.mark_trained(trained.ids)
    first.record_checkpoint()
    state = first.state()
    die(first)
    second = reader_of(lake, state=state)
    assert second.num_unread() == 5
    assert not ids_of([drawn]) - ids_of(batches_of(second))
    assert lake.books().trained == 3


def test_a_trainer_that_leaves_loses_nothing_that_was_not_trained_on(tmp_path, reader_of):
    lake = filled_lake(tmp_path, 8, 8)
    first = reader_of(lake, batch_size=5)
    trained = batches_of(first, 1)
    first.record_checkpoint()
    first.next_batch()
    first.close()
    other = batches_of(reader_of(lake, run="another run"))
    assert ids_of(trained + other) == Counter((shard, clip) for shard in (0, 1) for clip in range(8))


def test_a_shard_is_let_go_after_the_second_checkpoint_that_covers_it(tmp_path, reader_of):
    lake = filled_lake(tmp_path, 4, 40)
    reader = reader_of(lake)
    while not reader.holds_trained_shards():
        batches_of(reader, 1)
    reader.record_checkpoint()
    assert list(reader.coverage()) == [0, 1]
    reader.record_checkpoint()
    assert list(reader.coverage()) == [1]
    assert (lake.totals()["trained"], reader.holds_trained_shards()) == (4, False)


def test_a_file_is_open_from_its_lease_to_its_last_clip(tmp_path, reader_of):
    def open_shards() -> list[str]:
        links = (path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink())
        return sorted(path.name for path in links if path.parent == tmp_path / "shards")

    reader = reader_of(filled_lake(tmp_path, 3, 3, 3, 3), ahead_clips=0)
    assert open_shards() == []
    batches_of(reader, 1)
    assert open_shards() == [f"{i:08d}.tar" for i in range(3)]
    batches_of(reader)
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
    batches = batches_of(reader)
    assert ids_of(batches) == Counter({clip: 1 for clip in ALL if clip[0] != 1})
    assert (lake.books().quarantined, lake.books().balance(), reader.is_drained()) == (10, 0, True)
    assert "shard 1 is quarantined" in capsys.readouterr().err
    assert lake.disagreements() == []


def test_a_shard_that_broke_while_the_trainer_was_away_is_quarantined_less_what_was_trained(tmp_path, reader_of):
    lake = filled_lake(tmp_path, 8, 8)
    first = reader_of(lake, batch_size=5)
    batches_of(first, 1)
    first.record_checkpoint()
    state = first.state()
    die(first)
    os.truncate(lake.path(0, "train"), 1_000)
    second = reader_of(lake, state=state)
    assert set(ids_of(batches_of(second))) <= {(1, clip) for clip in range(8)}
    second.record_checkpoint()
    books = lake.books()
    assert (books.balance(), books.quarantined + books.trained) == (0, 16)


def test_a_starved_reader_goes_on_when_a_shard_arrives(tmp_path, reader_of):
    lake = make_lake(tmp_path)  # its tar is not read to the end
    reader = reader_of(lake, batch_size=4)
    assert (reader.next_batch(), reader.is_drained()) == (None, False)
    add_shard(lake, 3)
    assert (reader.next_batch(), reader.num_unread(), reader.is_drained()) == (None, 3, False)
    add_shard(lake, 3)
    assert len(reader.next_batch().ids) == 4


def test_two_readers_share_a_lake_without_sharing_a_clip(tmp_path, reader_of):
    lake = filled_lake(tmp_path, *SIZES)
    readers = [reader_of(lake, run=run, num_open=1) for run in ("one", "two")]
    batches = []
    while any(found := [batches_of(reader, 2) for reader in readers]):
        batches += chain(*found)
    assert ids_of(batches) == ALL


def test_the_report_tells_what_is_left_to_read(tmp_path, reader_of):
    lake = filled_lake(tmp_path, 8, 8)
    reader = reader_of(lake, num_open=1, batch_size=3)
    batches_of(reader, 1)
    reader.next_batch()
    assert lake.unread_clips() == 16
    reader.report()
    assert lake.unread_clips() == 10


# ---- reading ahead ----


def test_what_was_read_ahead_is_in_no_account_and_in_no_report(tmp_path, reader_of):
    lake = filled_lake(tmp_path, 8, 8, 8, 8)
    reader = reader_of(lake, num_open=1, batch_size=4, ahead_clips=99)
    batches_of(reader, 1)
    wait(reader.ahead)
    reader.record_checkpoint()
    reader.report()
    assert lake.ready("train") == [], "all are leased ahead"
    assert (list(reader.coverage()), reader.num_unread()) == ([0], 4)
    assert (lake.books().trained, lake.unread_clips()) == (4, 28)
    reader.close()
    assert [shard.id for shard in lake.ready("train")] == [0, 1, 2, 3]
    assert lake.unread_clips() == 28


def test_a_shard_that_another_run_covered_in_part_keeps_that_while_it_is_leased_ahead(tmp_path, reader_of):
    lake = filled_lake(tmp_path, 4, 8)
    _, other = (lake.lease("other", "other run") for _ in range(2))
    lake.record_checkpoint("other", {other.id: b"\x0f"})
    lake.release("other")
    reader = reader_of(lake, num_open=1, ahead_clips=99)
    batches_of(reader, 1)
    wait(reader.ahead)
    reader.record_checkpoint()
    assert lake.books().trained == 5
    assert ids_of(batches_of(reader)) <= Counter([(0, i) for i in range(4)] + [(1, i) for i in range(4, 8)])


def test_batches_that_were_read_ahead_need_no_file_and_an_error_beyond_them_is_raised_by_every_call(
    tmp_path, reader_of
):
    lake = filled_lake(tmp_path, 40)
    reader = reader_of(lake, batch_size=4, ahead_clips=8)
    ids = [reader.next_batch().ids]
    wait(reader.ahead)
    os.truncate(lake.path(0, "train"), 0)
    written = make_clips(40, 0)
    for _ in range(2):
        batch = reader.next_batch()
        ids.append(batch.ids)
        np.testing.assert_array_equal(batch.samples, [written[clip].samples for _, clip in batch.ids])
    for _ in range(3):
        with pytest.raises(ShardBroken, match="ends inside clip"):
            reader.next_batch()
    assert (reader.num_batches, reader.num_unread()) == (3, 28)
    reader.close()
    assert lake.unread_clips() == 40


def test_an_error_of_the_thread_is_the_callers_and_no_later_batch_hides_it(tmp_path, reader_of, monkeypatch):
    errors = [OSError("the disk was gone for a moment")]

    def fail_once(*arguments) -> None:
        if errors:
            raise errors.pop()
        return verify_shard(*arguments)

    monkeypatch.setattr("hear_distill.data.verify_shard", fail_once)
    reader = reader_of(filled_lake(tmp_path, 8, 8, 8), ahead_clips=8)
    for _ in range(2):
        with pytest.raises(OSError, match="for a moment"):
            reader.next_batch()
        wait(reader.ahead)
    assert reader.num_batches == 0


@pytest.mark.parametrize(("batch_size", "ahead_clips", "num_buffers"), [(4, 0, 1), (4, 8, 3), (4, 9, 4), (4, 1, 2)])
def test_a_batch_stays_as_it_is_until_the_next_is_asked_for_and_its_buffer_is_used_again(
    tmp_path, reader_of, batch_size, ahead_clips, num_buffers
):
    buffers = []

    def allocate(shape: tuple[int, int]) -> np.ndarray:
        buffers.append(np.zeros(shape, np.int16))
        return buffers[-1]

    lake = filled_lake(tmp_path, 40)
    reader = reader_of(lake, batch_size=batch_size, ahead_clips=ahead_clips, allocate=allocate)
    written, used = make_clips(40, 0), Counter()
    while (batch := reader.next_batch()) is not None:
        wait(reader.ahead)
        np.testing.assert_array_equal(batch.samples, [written[clip].samples for _, clip in batch.ids])
        used.update(i for i, buffer in enumerate(buffers) if batch.samples is buffer)
    assert used.total() == 10 and len(used) == len(buffers) == num_buffers


def test_a_shard_that_arrives_while_a_starved_reader_looks_is_handed_out_before_the_lake_counts_as_drained(
    tmp_path, reader_of
):
    lake = filled_lake(tmp_path)
    reader, looks = reader_of(lake, batch_size=4, ahead_clips=20), []
    lease = reader.drawer.lake.lease

    def lease_late(*arguments) -> object:
        looks.append(arguments)
        if len(looks) == 3:
            add_shard(reader.drawer.lake, 4)
        return lease(*arguments)

    reader.drawer.lake.lease = lease_late
    batch = reader.next_batch()
    assert batch is not None and len(batch.ids) == 4
    assert (reader.next_batch(), reader.is_drained()) == (None, True)


def test_a_starved_reader_leases_nothing_until_it_is_asked_again(tmp_path, reader_of):
    lake = filled_lake(tmp_path)
    reader = reader_of(lake, ahead_clips=20)
    for _ in range(2):
        assert reader.next_batch() is None
        assert all(future.done() for future in reader.ahead)
    add_shard(lake, 4)
    assert (len(lake.ready("train")), reader.is_drained()) == (1, False)
    assert len(batches_of(reader)) == 4


def test_a_full_lake_gives_room_after_two_checkpoints_and_the_reader_goes_on(tmp_path, reader_of):
    """The lake waits for room, the reader for a shard: neither may hold back what the other needs."""
    lake = make_lake(tmp_path, cap_clips=30)
    for _ in range(3):
        add_shard(lake, 10)
    lake.db.execute("UPDATE settings SET value = ? WHERE name = 'cap_bytes'", (lake.used_bytes(),))
    reader = reader_of(lake, num_open=1, batch_size=4, ahead_clips=99)
    assert len(batches_of(reader)) == 7
    assert (lake.has_room(), reader.holds_trained_shards(), reader.is_drained()) == (False, True, False)
    for _ in range(2):
        reader.record_checkpoint()
    assert lake.has_room()
    add_shard(lake, 10)
    assert len(batches_of(reader)) == 3, "the new ten, and two that were left over"


def test_no_thread_and_no_file_outlives_close_whatever_was_read_ahead(tmp_path, reader_of):
    before = (set(threading.enumerate()), sorted(os.listdir("/proc/self/fd")))
    lake = filled_lake(tmp_path, *SIZES)
    reader = reader_of(lake, batch_size=2, ahead_clips=20)
    reader.next_batch()
    assert any(thread.name.startswith("reader") for thread in threading.enumerate())
    reader.close()
    reader.close()
    reader.owner.release()
    lake.close()
    assert (set(threading.enumerate()), sorted(os.listdir("/proc/self/fd"))) == before


LEAVE = """
import os, sys
from pathlib import Path
from hear_distill.data import Drawing, LakeReader
from hear_distill.lake import Lake
from hear_distill.locks import Owner

lake = Lake.open(Path(sys.argv[1]))
owner = Owner(lake.root, "train")
reader = LakeReader(lake, owner, Drawing(run="run", seed=1, num_open=2, batch_size=2, ahead_clips=8))
reader.mark_trained(reader.next_batch().ids)
child = os.fork() if sys.argv[2] == "fork" else -1
if child == 0:
    sys.exit(0)
if child > 0 and os.waitpid(child, 0)[1]:
    sys.exit("the child did not leave in good order")
if sys.argv[2] == "error":
    raise SystemExit(3)
print(reader.next_batch().ids != [])
"""


@pytest.mark.parametrize(("how", "code"), [("exit", 0), ("error", 3), ("fork", 0)])
def test_a_process_that_forks_or_leaves_without_a_word_ends_and_loses_nothing(tmp_path, reader_of, how, code):
    lake = filled_lake(tmp_path, *SIZES)
    ended = run_python(LEAVE, tmp_path, how)
    assert (ended.returncode, ended.stderr, ended.stdout) == (code, "", "True\n" if code == 0 else "")
    assert ids_of(batches_of(reader_of(lake))) == ALL


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
