"""The ledger: each row of the state table, the cap, owners that die, and checkpoints that come back.

What a lake says of itself, and a random walk over all that can happen to it, are in test_books.py.
"""

import signal
import sqlite3
from collections import Counter
from dataclasses import replace
from itertools import chain

import pytest
from lake_tools import add_shard, make_lake, start_python

from hear_distill.files import UserError
from hear_distill.lake import Lake, LakeFull, permuted
from hear_distill.locks import Owner
from hear_distill.schema import Part
from hear_distill.shards import shard_bytes

DEAD = "stream-00000000"  # nobody holds its lock
TARS = {f"{name}.tar": 100 for name in "abcdefgh"}

WORKER = """
import sys
from pathlib import Path
from hear_distill.lake import Lake
from hear_distill.locks import Owner
lake = Lake.open(Path(sys.argv[1]))
owner = Owner(lake.root, "stream")
shard_id = lake.begin_shard(owner.id, 1_000)
lake.path(shard_id, "train", ".tar.part").write_bytes(b"half")
lake.take_tars(owner.id, 3)
print("at work", flush=True)
sys.stdin.read()
"""
TAKER = """
import sys
from pathlib import Path
from hear_distill.lake import Lake
from hear_distill.locks import Owner
lake = Lake.open(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
taken = []
while cursors := lake.take_tars(sys.argv[2], 2):
    taken += [cursor.name for cursor in cursors]
while shard := lake.lease(sys.argv[2], sys.argv[2]):
    taken.append(shard.id)
print(*taken)
"""
JOINER = """
import sys
from pathlib import Path
from lake_tools import make_lake
print("ready", flush=True)
sys.stdin.readline()
lake = make_lake(Path(sys.argv[1]), {"a.tar": 1, "b.tar": 2})
print(len(lake.take_tars(sys.argv[2], 1)))
"""


def states(lake: Lake) -> Counter[str]:
    """Number of parts in each state."""
    return Counter(row["state"] for row in lake.db.execute("SELECT state FROM shards"))


def files(lake: Lake) -> list[str]:
    """Everything that stands in the two folders of shards."""
    return sorted(path.name for folder in ("shards", "val") for path in (lake.root / folder).iterdir())


def together(code: str, *arguments: list[object]) -> list[list[str]]:
    """Run the code once per list of arguments, all released at the same moment; the words that each printed."""
    processes = [start_python(code, *words) for words in arguments]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate()[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes)
    return outputs


# ---- identity ----


def test_a_lake_is_joined_with_all_it_holds_by_a_run_that_agrees(tmp_path):
    lake = make_lake(tmp_path, TARS)
    lake.take_tars("worker", 3)
    add_shard(lake, 4)
    again = make_lake(tmp_path, TARS, cap_clips=7)
    assert again.tar_states() == {"waiting": 5, "open": 3, "free": 5}
    assert [shard.num_clips for shard in again.ready("train")] == [4]
    assert lake.cap_bytes() == again.cap_bytes() == shard_bytes(7) + 99 * shard_bytes(0)


@pytest.mark.parametrize(
    "other",
    [
        *({"source": "elsewhere"}, {"revision": "r2"}, {"seed": 8}, {"clip_samples": 16_000}, {"shard_clips": 11}),
        *({"val_fraction": 0.2}, {"val_clips": 21}, {"num_nodes": 2}, {"node_rank": 1}),
    ],
    ids=lambda other: next(iter(other)),
)
def test_a_run_that_disagrees_in_one_field_is_refused_and_changes_nothing(tmp_path, other):
    lake = make_lake(tmp_path, TARS)
    before = list(map(tuple, lake.db.execute("SELECT * FROM settings")))
    with pytest.raises(UserError, match=f"another one.*{next(iter(other))}.*choose another --lake"):
        make_lake(tmp_path, TARS, cap_clips=1, **other)
    assert list(map(tuple, lake.db.execute("SELECT * FROM settings"))) == before


def test_a_folder_without_a_lake_is_refused_with_the_next_command(tmp_path):
    with pytest.raises(UserError, match=r"no lake at .*python datalake/run_lake\.py"):
        Lake.open(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_ledger_of_another_version_is_refused(tmp_path):
    make_lake(tmp_path).db.execute("PRAGMA user_version = 0")  # that of ledgers before versions were counted
    with pytest.raises(UserError, match=r"has version 0, expected 2: .*another --lake"):
        Lake.open(tmp_path)


def test_many_processes_can_make_one_lake_at_the_same_moment(tmp_path):
    taken = together(JOINER, *([tmp_path / "lake", f"worker-{i}"] for i in range(4)))
    assert sorted(taken) == [["0"], ["0"], ["1"], ["1"]]


def test_the_order_of_the_tars_depends_on_the_seed_and_not_on_the_listing():
    names = sorted(TARS)
    assert permuted(names, 1) == permuted(names[::-1], 1) != permuted(names, 2)
    assert sorted(permuted(names, 1)) == names != permuted(names, 1)


def test_nodes_share_the_tars_out(tmp_path):
    lakes = [make_lake(tmp_path / str(rank), TARS, num_nodes=3, node_rank=rank) for rank in range(3)]
    parts = [[cursor.name for cursor in lake.take_tars("worker", 9)] for lake in lakes]
    assert sorted(chain(*parts)) == sorted(TARS)
    assert sorted(map(len, parts)) == [2, 3, 3]


# ---- writing ----


def test_begun_tars_are_taken_first_then_the_order_of_the_permutation(tmp_path):
    lake = make_lake(tmp_path, TARS)
    order = permuted(list(TARS), 7)
    assert [cursor.name for cursor in lake.take_tars("one", 3)] == order[:3]
    lake.free_tars("one")
    assert [cursor.name for cursor in lake.take_tars("two", 4)] == order[:4]
    assert [cursor.name for cursor in lake.take_tars("three", 9)] == order[4:]
    assert lake.take_tars("four", 1) == []


def test_clips_and_cursors_move_together(tmp_path):
    lake = make_lake(tmp_path, TARS)
    first, second = lake.take_tars("worker", 2)
    shard_id = lake.begin_shard("worker", shard_bytes(5))
    for split, num_clips in (("train", 3), ("recent", 2)):
        lake.path(shard_id, split, ".tar.part").write_bytes(bytes(num_clips))
    parts = [Part("train", 3, 3, "hash of train"), Part("recent", 2, 2, "hash of recent")]
    moved = replace(first, offset=40, next_clip=2)
    done = replace(second, offset=100, state="done")

    impossible = replace(second, state="no such state")
    with pytest.raises(sqlite3.IntegrityError):
        lake.publish(shard_id, parts, [moved, impossible], Counter(recordings=9))
    assert (states(lake), lake.books().cut, lake.totals()["recordings"]) == ({"writing": 1}, 0, 0)

    for part in parts:  # the failed attempt has renamed them
        lake.path(shard_id, part.split).rename(lake.path(shard_id, part.split, ".tar.part"))
    lake.publish(shard_id, parts, [moved, done], Counter(recordings=4))
    assert (states(lake), lake.books().cut, lake.totals()["recordings"]) == ({"ready": 2}, 5, 4)
    assert [(s.id, s.path.parent.name, s.num_clips, s.sha256) for s in lake.ready("train") + lake.ready("recent")] == [
        (shard_id, "shards", 3, "hash of train"),
        (shard_id, "val", 2, "hash of recent"),
    ]
    lake.free_tars("worker")
    assert lake.take_tars("other", 9)[0] == moved
    assert lake.tar_states()["done"] == 1


def test_a_shard_without_clips_still_moves_the_cursors(tmp_path):
    lake = make_lake(tmp_path)
    (cursor,) = lake.take_tars("worker", 1)
    shard_id = lake.begin_shard("worker", shard_bytes(5))
    lake.publish(shard_id, [], [replace(cursor, offset=100, state="done")], Counter({"skipped: empty": 3}))
    assert (lake.tar_states(), lake.used_bytes(), files(lake)) == ({"done": 1}, 0, [])
    assert lake.totals()["skipped: empty"] == 3


def test_parts_that_exceed_their_reservation_are_our_own_mistake_and_not_published(tmp_path):
    lake = make_lake(tmp_path)
    shard_id = lake.begin_shard("worker", shard_bytes(5))
    lake.path(shard_id, "train", ".tar.part").touch()
    with pytest.raises(AssertionError, match="reservation"):
        lake.publish(shard_id, [Part("train", 6, shard_bytes(6), "hash")], [], Counter())
    assert (lake.used_bytes(), lake.books().cut) == (shard_bytes(5), 0)


def test_there_is_one_anchor_and_it_remembers_what_it_was_cut_from(tmp_path):
    lake = make_lake(tmp_path)
    shard_id = lake.begin_shard(DEAD, shard_bytes(5), "anchor")
    assert lake.begin_shard("other", shard_bytes(5), "anchor") is None
    lake.sweep()
    shard_id = lake.begin_shard("worker", shard_bytes(5), "anchor")
    lake.path(shard_id, "anchor", ".tar.part").touch()
    groups = {"rec-1", "Видео 😷", "\udcff\udcfe"}
    lake.publish(shard_id, [Part("anchor", 5, shard_bytes(5), "hash")], [], Counter(), groups)
    assert lake.begin_shard("other", shard_bytes(5), "anchor") is None
    assert Lake.open(tmp_path).anchor_groups() == groups


@pytest.mark.parametrize("left", [[], [".tar.part"], [".tar"]], ids=["nothing", "part", "renamed"])
def test_what_a_dead_worker_left_is_undone(tmp_path, left):
    lake = make_lake(tmp_path, TARS)
    kept = add_shard(lake, 2)
    used, cursors = lake.used_bytes(), lake.take_tars(DEAD, 2)
    shard_id = lake.begin_shard(DEAD, shard_bytes(10))
    for suffix in left:
        lake.path(shard_id, "train", suffix).write_bytes(b"unfinished")
        lake.path(shard_id, "recent", suffix).write_bytes(b"unfinished")
    assert lake.used_bytes() == used + shard_bytes(10)
    lake.sweep()
    lake.sweep()
    assert (lake.used_bytes(), files(lake), states(lake)) == (used, [f"{kept:08d}.tar"], {"ready": 1})
    assert lake.take_tars("worker", 2) == cursors
    assert lake.disagreements() == []


def test_a_living_worker_keeps_what_it_holds_until_it_is_killed(tmp_path):
    lake = make_lake(tmp_path, TARS)
    worker = start_python(WORKER, tmp_path)
    lake.sweep()
    assert (lake.used_bytes(), files(lake), lake.tar_states()["free"]) == (1_000, ["00000000.tar.part"], 5)
    worker.send_signal(signal.SIGKILL)
    worker.communicate()
    lake.sweep()
    assert (lake.used_bytes(), files(lake), lake.tar_states()["free"]) == (0, [], 8)


def test_an_owner_lives_until_it_is_released(tmp_path):
    lake = make_lake(tmp_path)
    owner, other = Owner(tmp_path, "stream"), Owner(tmp_path, "stream")
    assert owner.id != other.id
    assert (lake.is_alive(owner.id), lake.is_alive(DEAD), lake.is_alive(None)) == (True, False, False)
    owner.release()
    assert (lake.is_alive(owner.id), lake.is_alive(other.id)) == (False, True)
    other.release()


def test_the_locks_of_the_dead_are_swept_and_those_of_the_living_stay(tmp_path):
    lake = make_lake(tmp_path)
    living, dead = Owner(tmp_path, "stream"), Owner(tmp_path, "train")
    dead.file.close()
    lake.sweep()
    assert list((tmp_path / "owners").iterdir()) == [living.path]
    assert lake.is_alive(living.id)
    living.release()


def test_an_abandoned_shard_gives_its_reservation_back(tmp_path):
    lake = make_lake(tmp_path, cap_clips=10)
    lake.abandon(lake.begin_shard("worker", shard_bytes(10)))
    assert lake.used_bytes() == 0
    assert lake.begin_shard("worker", shard_bytes(10)) == 1, "an id is never used twice"


def test_the_last_byte_under_the_cap_can_be_used_and_no_more(tmp_path):
    lake = make_lake(tmp_path)
    lake.begin_shard("worker", lake.cap_bytes() - 7)
    with pytest.raises(LakeFull, match="8 more needed"):
        lake.begin_shard("worker", 8)
    lake.begin_shard("worker", 7)
    assert lake.used_bytes() == lake.cap_bytes()


def test_there_is_room_as_long_as_a_whole_reservation_fits(tmp_path):
    lake = make_lake(tmp_path, cap_clips=20)
    reservation = shard_bytes(10) + shard_bytes(0)
    lake.begin_shard("worker", lake.cap_bytes() - reservation)
    assert lake.has_room()
    lake.begin_shard("worker", 1)
    assert not lake.has_room()


# ---- training ----


def test_no_tar_and_no_shard_is_ever_given_to_two(tmp_path):
    lake = make_lake(tmp_path, {f"{i}.tar": 1 for i in range(30)})
    ids = [add_shard(lake, 1) for _ in range(20)]
    taken = together(TAKER, *([tmp_path, name] for name in ("one", "two", "three")))
    assert sorted(chain(*taken)) == sorted([f"{i}.tar" for i in range(30)] + list(map(str, ids)))


def test_leases_go_from_the_oldest_shard_to_the_newest_and_leave_validation_alone(tmp_path):
    lake = make_lake(tmp_path)
    add_shard(lake, 2, "anchor")
    ids = [add_shard(lake, 2) for _ in range(3)]
    add_shard(lake, 2, "recent")
    assert [lake.lease("trainer", "run").id for _ in range(3)] == ids
    assert lake.lease("trainer", "run") is None


def test_a_shard_goes_only_when_the_second_newest_checkpoint_covers_it(tmp_path):
    lake = make_lake(tmp_path)
    whole, half = add_shard(lake, 3), add_shard(lake, 3)
    for _ in range(2):
        lake.lease("trainer", "run")
    assert lake.record_checkpoint("trainer", {whole: b"\7", half: b"\3"}) == []
    assert (states(lake), lake.books().trained) == ({"leased": 2}, 5)
    assert lake.record_checkpoint("trainer", {whole: b"\7", half: b"\7"}) == [whole]
    assert (states(lake), lake.books().trained, files(lake)) == ({"leased": 1}, 6, [f"{half:08d}.tar"])
    assert lake.record_checkpoint("trainer", {half: b"\7"}) == [half]
    assert (lake.used_bytes(), lake.totals()["trained"], files(lake)) == (0, 6, [])


def test_a_checkpoint_says_nothing_of_the_shards_of_others(tmp_path):
    lake = make_lake(tmp_path)
    mine, theirs = add_shard(lake, 2), add_shard(lake, 2)
    lake.lease("me", "run")
    lake.lease("they", "other run")
    for _ in range(3):
        lake.record_checkpoint("me", {theirs: b"\3"})
    assert (lake.books().trained, lake.books().leased, states(lake)) == (0, 4, {"leased": 2})
    assert mine != theirs


def test_retiring_a_validation_part_does_not_touch_the_train_part_of_the_same_id(tmp_path):
    lake = make_lake(tmp_path)
    shard_id = lake.begin_shard("worker", shard_bytes(4))
    for split in ("train", "recent"):
        lake.path(shard_id, split, ".tar.part").write_bytes(b"12")
    lake.publish(shard_id, [Part("train", 2, 2, ""), Part("recent", 2, 2, "")], [], Counter())
    lake.lease("trainer", "run")
    lake.db.execute("UPDATE shards SET state = 'retiring' WHERE split = 'recent'")  # its streamer was killed here
    assert lake.record_checkpoint("trainer", {shard_id: b"\1"}) == []
    assert (states(lake), [path.name for path in (tmp_path / "shards").iterdir()]) == ({"leased": 1}, ["00000000.tar"])
    assert (lake.books().leased, lake.books().trained, lake.books().retired_validation) == (1, 1, 2)


def test_what_a_killed_trainer_left_retiring_is_finished_by_the_next(tmp_path):
    lake = make_lake(tmp_path)
    add_shard(lake, 3)
    lake.lease(DEAD, "run")
    lake.record_checkpoint(DEAD, {0: b"\7"})
    lake.db.execute("UPDATE shards SET state = 'retiring'")
    assert lake.begin_run("next", "run", {0: b"\7"}) == []
    assert (lake.totals()["trained"], files(lake), lake.used_bytes()) == (3, [], 0)


def test_two_that_finish_the_same_retirement_count_it_once(tmp_path, monkeypatch):
    lake, other = make_lake(tmp_path), Lake.open(tmp_path)
    add_shard(lake, 3, "recent")
    lake.db.execute("UPDATE shards SET state = 'retiring'")
    monkeypatch.setattr(lake, "_fsync_folders", other.finish_retiring)  # between the unlinking and the counting
    lake.finish_retiring()
    assert (lake.books().retired_validation, lake.books().balance()) == (3, 0)


@pytest.mark.parametrize("survivor", ["newest", "previous"])
def test_after_a_death_exactly_the_clips_that_the_surviving_checkpoint_lacks_come_back(tmp_path, survivor):
    lake = make_lake(tmp_path)
    ids = [add_shard(lake, 4) for _ in range(5)]
    for _ in range(4):
        lake.lease(DEAD, "run")
    coverage = {
        "previous": {ids[1]: b"\3", ids[0]: b"\x0f", ids[2]: b"\0"},
        "newest": {ids[1]: b"\x0b", ids[0]: b"\x0f", ids[2]: b"\x0f", ids[3]: b"\4"},
    }
    lake.record_checkpoint(DEAD, coverage["previous"])
    lake.record_checkpoint(DEAD, coverage["newest"])  # retires the first shard

    owner = Owner(tmp_path, "train")
    shards = lake.begin_run(owner.id, "run", coverage[survivor])
    expected = [(i, covered) for i, covered in coverage[survivor].items() if i != ids[0]]  # in the order of the leases
    assert [(shard.id, shard.covered) for shard in shards] == expected
    back = [(shard.id, shard.covered) for shard in lake.ready("train")]
    assert back == [(i, b"") for i in ids[1:] if i not in coverage[survivor]]
    uncovered = 16 - sum(int.from_bytes(shard.covered, "little").bit_count() for shard in shards)
    assert lake.unread_clips() == uncovered == lake.books().ready + lake.books().leased
    owner.release()


def test_a_dead_trainers_shards_go_to_another_run_less_what_it_had_covered(tmp_path):
    lake = make_lake(tmp_path)
    ids = [add_shard(lake, 4) for _ in range(2)]
    living = Owner(tmp_path, "train")
    lake.lease(DEAD, "dead run")
    lake.lease(living.id, "living run")
    lake.record_checkpoint(DEAD, {ids[0]: b"\5"})
    assert lake.begin_run("me", "my run", {}) == []
    assert lake.lease("me", "my run").covered == b"\5"
    assert lake.lease("me", "my run") is None, "the other shard belongs to a living trainer"
    living.release()


def test_a_trainer_that_leaves_gives_its_shards_back(tmp_path):
    lake = make_lake(tmp_path)
    ids = [add_shard(lake, 4) for _ in range(2)]
    lake.lease("trainer", "run")
    lake.record_checkpoint("trainer", {ids[0]: b"\1"})
    lake.release("trainer")
    assert [(shard.id, shard.covered) for shard in lake.ready("train")] == [(ids[0], b"\1"), (ids[1], b"")]


def test_unread_clips_are_those_that_will_still_be_handed_out(tmp_path):
    lake = make_lake(tmp_path)
    ids = [add_shard(lake, 8), add_shard(lake, 8)]
    add_shard(lake, 5, "recent")
    lake.lease("trainer", "run")
    assert lake.unread_clips() == 16
    lake.record_checkpoint("trainer", {ids[0]: b"\7"})
    lake.report_read({ids[0]: 6})
    assert lake.unread_clips() == 10
    lake.release("trainer")
    assert lake.unread_clips() == 13, "handed out, but in no checkpoint"


def test_a_quarantined_shard_is_moved_aside_and_counted_less_what_was_trained(tmp_path):
    lake = make_lake(tmp_path)
    ids = [add_shard(lake, 4) for _ in range(2)]
    lake.lease("trainer", "run")
    lake.record_checkpoint("trainer", {ids[0]: b"\3"})
    lake.quarantine(ids[0], "train", "sha256 is wrong")
    books = lake.books()
    assert (books.quarantined, books.trained, books.ready, books.balance()) == (2, 2, 4, 0)
    assert [path.name for path in (tmp_path / "quarantine").iterdir()] == [f"{ids[0]:08d}-train.tar"]
    assert lake.begin_run("other", "run", {ids[0]: b"\3"}) == []
    assert lake.lease("other", "run").id == ids[1]
    assert lake.disagreements() == []


def test_a_quarantined_file_that_is_missing_is_no_obstacle(tmp_path):
    lake = make_lake(tmp_path)
    shard_id = add_shard(lake, 4)
    lake.path(shard_id, "train").unlink()
    lake.quarantine(shard_id, "train", "missing")
    assert (lake.books().quarantined, lake.disagreements()) == (4, [])


def test_the_oldest_recent_validation_goes_and_the_anchor_stays(tmp_path):
    lake = make_lake(tmp_path)
    add_shard(lake, 6, "anchor")
    ids = [add_shard(lake, num_clips, "recent") for num_clips in (2, 3, 4)]
    train = add_shard(lake, 5)
    for num_clips_to_keep, num_gone in ((9, 0), (8, 0), (7, 1), (5, 1), (4, 2), (3, 2), (1, 2)):
        lake.retire_recent(num_clips_to_keep)
        assert [shard.id for shard in lake.ready("recent")] == ids[num_gone:]
    assert (lake.books().validation, lake.books().retired_validation) == (10, 5)
    assert ([shard.id for shard in lake.ready("train")], lake.has_anchor(), lake.disagreements()) == ([train], True, [])


def test_a_full_lake_makes_room_with_train_shards_and_never_with_validation(tmp_path):
    lake = make_lake(tmp_path, cap_clips=60)
    lake.db.execute("UPDATE settings SET value = ? WHERE name = 'cap_bytes'", (str(6 * shard_bytes(10)),))
    add_shard(lake, 10, "anchor")
    add_shard(lake, 10, "recent")
    for i in range(4):
        add_shard(lake, 10)
        lake.lease("trainer", "run")
        for _ in range(2):
            lake.record_checkpoint("trainer", {i + 2: b"\xff\x03"}, is_kept=True)
        lake.give_back("trainer", [i + 2])
    assert lake.used_bytes() == lake.cap_bytes()
    held = [lake.ready(split) for split in ("anchor", "recent")]
    for _ in range(4):
        lake.begin_shard("worker", shard_bytes(10))
    with pytest.raises(LakeFull):
        lake.begin_shard("worker", 1)
    again = Lake.open(tmp_path)
    assert [again.ready(split) for split in ("anchor", "recent")] == held
    assert (again.ready("train"), again.books().validation, [shards[0].path.exists() for shards in held]) == (
        *([], 20),
        [True, True],
    )
