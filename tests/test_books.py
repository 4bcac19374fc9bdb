"""What a lake says of itself; then a random walk over all that can happen to it, beside a model that knows no SQL.

After every step: the books are the model's and balance, the cap holds to the byte, and ledger and folders agree.
"""

import os
import random
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import pytest
from lake_tools import add_shard, make_lake

from hear_distill.lake import Lake, LakeFull
from hear_distill.locks import Owner
from hear_distill.schema import Part
from hear_distill.shards import shard_bytes

MOST_CLIPS = 9  # in one part: more than a byte of coverage
RESERVED = 2 * shard_bytes(MOST_CLIPS)


def test_a_lake_is_drained_when_nothing_more_can_be_leased_now_or_later(tmp_path):
    lake = make_lake(tmp_path)
    (cursor,) = lake.take_tars("worker", 1)
    assert not lake.is_drained(), "a tar is open"
    shard_id = lake.begin_shard("worker", shard_bytes(1))
    other = lake.begin_shard("other", shard_bytes(1))
    lake.publish(shard_id, [], [replace(cursor, state="broken")], Counter())
    assert not lake.is_drained(), "another worker is writing"
    lake.abandon(other)
    assert lake.is_drained()
    add_shard(lake, 2)
    add_shard(lake, 2, "recent")
    assert not lake.is_drained(), "a shard is ready"
    lake.lease("trainer", "run")
    assert lake.is_drained()


def test_the_anchor_is_there_once_it_is_finished_or_when_none_is_wanted(tmp_path):
    lake = make_lake(tmp_path / "with")
    shard_id = lake.begin_shard("worker", shard_bytes(1), "anchor")
    assert not lake.has_anchor()
    lake.abandon(shard_id)
    add_shard(lake, 2, "anchor")
    assert lake.has_anchor()
    assert make_lake(tmp_path / "without", val_clips=0).has_anchor()


def test_the_books_are_those_of_one_moment_whatever_is_published_while_they_are_read(tmp_path, monkeypatch):
    lake, other = make_lake(tmp_path), Lake.open(tmp_path)
    add_shard(lake, 3)
    totals = lake.totals

    def while_something_comes() -> Counter[str]:
        found = totals()
        add_shard(other, 5)
        return found

    monkeypatch.setattr(lake, "totals", while_something_comes)
    assert (lake.books().cut, lake.books().ready, lake.books().balance()) == (3, 8, 0)
    assert other.books().cut == 3 + 3 * 5
    other.close()


def test_the_books_are_read_without_waiting_for_whoever_writes(tmp_path):
    lake, other = make_lake(tmp_path), Lake.open(tmp_path)
    lake.db.execute("PRAGMA busy_timeout = 100")  # ms; a wait fails here
    add_shard(lake, 3)
    with other.transaction():
        other.db.execute("UPDATE totals SET value = 99")
        assert lake.books().cut == 3
    other.close()


def test_disagreements_of_ledger_and_folders_are_named(tmp_path):
    lake = make_lake(tmp_path)
    ids = [add_shard(lake, 2, split) for split in ("train", "train", "recent", "train")]
    owner = Owner(tmp_path, "stream")
    writing = lake.begin_shard(owner.id, shard_bytes(2))
    lake.path(writing, "train", ".tar.part").write_bytes(b"a living worker's")
    assert lake.disagreements() == []

    missing, truncated = lake.path(ids[0], "train"), lake.path(ids[2], "recent")
    extra = lake.path(99, "recent")
    missing.unlink()
    os.truncate(truncated, 1_000)
    extra.write_bytes(b"whose?")
    lake.db.execute("UPDATE totals SET value = value + 3 WHERE name = 'cut'")
    assert sorted(lake.disagreements()) == sorted(
        [
            f"{missing} is in the ledger, but there is no such file",
            f"{truncated} has 1000 bytes, the ledger says {shard_bytes(2)}",
            f"{extra} is on the disk, but not in the ledger",
            "the books are off by 3 clips",
        ]
    )
    owner.release()


def test_a_running_sum_that_is_wrong_is_a_disagreement(tmp_path):
    lake = make_lake(tmp_path)
    add_shard(lake, 2)
    lake.db.execute("UPDATE sums SET num_unread = 3 WHERE state = 'ready'")
    (found,) = lake.disagreements()
    assert found.startswith("the sums of ready train shards are (1, ") and lake.unread_clips() == 3


def test_a_lake_that_was_made_before_there_were_running_sums_gets_them_when_it_is_joined(tmp_path):
    lake = make_lake(tmp_path)
    for num_clips in (2, 3):
        add_shard(lake, num_clips)
    add_shard(lake, 4, "anchor")
    lake.lease("trainer", "run")
    lake.record_checkpoint("trainer", {0: b"\1"})
    before = (lake.books(), lake.used_bytes(), lake.unread_clips())
    assert (before[0].trained, before[2]) == (1, 4)
    for name in ("sum_added", "sum_gone", "sum_changed"):
        lake.db.execute(f"DROP TRIGGER {name}")
    lake.db.execute("DROP TABLE sums")
    again = make_lake(tmp_path)
    assert (again.books(), again.used_bytes(), again.unread_clips()) == before
    add_shard(again, 5)
    make_lake(tmp_path)
    assert (again.books().cut, again.disagreements()) == (14, [])


def test_what_a_dead_worker_left_is_a_disagreement_until_it_is_swept(tmp_path):
    lake = make_lake(tmp_path)
    path = lake.path(lake.begin_shard("stream-dead", shard_bytes(2)), "recent", ".tar.part")
    path.write_bytes(b"half")
    assert lake.disagreements() == [f"{path} is on the disk, but not in the ledger"]
    lake.sweep()
    assert lake.disagreements() == []


@pytest.mark.parametrize("name", [".DS_Store", "notes.txt", "00000007.tar.tmp"])
def test_a_foreign_file_is_a_disagreement_and_not_a_crash(tmp_path, name):
    lake = make_lake(tmp_path)
    (tmp_path / "shards" / name).touch()
    assert lake.disagreements() == [f"{tmp_path / 'shards' / name} is on the disk, but not in the ledger"]


def test_the_books_name_each_place_once(tmp_path):
    lake = make_lake(tmp_path)
    ids = [add_shard(lake, num_clips) for num_clips in (1, 2, 4, 8)]
    add_shard(lake, 16, "anchor")
    add_shard(lake, 32, "recent")
    lake.retire_recent(0)
    for _ in range(3):
        lake.lease("trainer", "run")
    lake.record_checkpoint("trainer", {ids[0]: b"\1", ids[1]: b"\1"})
    lake.record_checkpoint("trainer", {ids[0]: b"\1", ids[1]: b"\1"})
    lake.quarantine(ids[2], "train", "broken")
    assert asdict(lake.books()) == {
        **{"cut": 63, "ready": 8, "leased": 1, "trained": 2, "validation": 16},
        **{"retired_validation": 32, "quarantined": 4, "trained_again": 0},
    }


def test_no_question_of_the_control_loop_reads_all_shards_or_lists_their_folders(tmp_path, monkeypatch):
    lake = make_lake(tmp_path)
    for split in ("anchor", "train", "train", "recent"):
        add_shard(lake, 2, split)
    statements, listed = [], []
    iterdir = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: listed.append(path.name) or iterdir(path))
    lake.db.set_trace_callback(statements.append)
    lake.has_room(), lake.unread_clips(), lake.has_anchor(), lake.tar_states(), lake.used_bytes(), lake.wants_room()
    lake.totals(), lake.books(), lake.is_drained(), lake.statistics(50, 50), lake.sweep()
    lake.lease("trainer", "run"), lake.begin_shard("worker", 1)
    lake.db.set_trace_callback(None)
    assert len(statements) > 30 and listed == ["owners"]
    for statement in statements:
        if statement.startswith(("SELECT", "UPDATE", "INSERT", "DELETE")):
            plan = [row["detail"] for row in lake.db.execute(f"EXPLAIN QUERY PLAN {statement}")]
            assert not any(detail.startswith("SCAN shards") for detail in plan), (statement, plan)
    reading_all = "EXPLAIN QUERY PLAN SELECT sum(num_bytes) FROM shards"
    assert lake.db.execute(reading_all).fetchone()["detail"].startswith("SCAN shards"), "else this test sees nothing"


# ---- the walk ----


@dataclass
class Entry:
    """One part of one shard, as the model sees it."""

    split: str
    num_clips: int
    state: str = "ready"
    owner: str = ""
    run: str = ""
    covered: frozenset[int] = frozenset()


@dataclass
class Trainer:
    """A run and the process that is at it."""

    run: str
    owner: Owner
    trained: dict[int, frozenset[int]] = field(default_factory=dict)
    """clips by shard, for every shard it holds"""
    newest: dict[int, frozenset[int]] = field(default_factory=dict)
    previous: dict[int, frozenset[int]] = field(default_factory=dict)


def bits(clips: frozenset[int]) -> bytes:
    """A bit per clip, as a checkpoint holds them."""
    return sum(1 << clip for clip in clips).to_bytes(-(-MOST_CLIPS // 8), "little")


class Walk:
    """The lake, the model, and the things that can happen to both."""

    entry_type, trainer_type = Entry, Trainer

    def __init__(self, lake: Lake, seed: int) -> None:
        self.lake, self.rng = lake, random.Random(seed)
        self.entries: dict[tuple[int, str], Entry] = {}
        self.writing: dict[int, bool] = {}
        """id -> whether its worker lives"""
        self.totals: Counter[str] = Counter()
        self.worker = Owner(lake.root, "stream")
        self.trainers = [self.trainer_type(run, Owner(lake.root, "train")) for run in ("one", "two")]
        self.num_full = 0

    # ---- what can happen ----

    def worker_begins(self) -> None:
        is_full = self.used_bytes() + RESERVED > self.lake.cap_bytes()
        is_alive = self.rng.random() < 0.7
        try:
            shard_id = self.lake.begin_shard(self.worker.id if is_alive else "stream-dead", RESERVED)
        except LakeFull:
            assert is_full
            self.num_full += 1
            return
        assert not is_full
        self.writing[shard_id] = is_alive

    def worker_publishes(self) -> None:
        shard_id = next((i for i, is_alive in self.writing.items() if is_alive), None)
        if shard_id is None:
            return
        del self.writing[shard_id]
        splits = self.rng.choice([["train"], ["train"], ["train", "recent"], ["recent"], ["anchor"], []])
        parts = []
        for split in splits:
            num_clips = self.rng.randint(1, MOST_CLIPS)
            with self.lake.path(shard_id, split, ".tar.part").open("wb") as f:
                f.truncate(shard_bytes(num_clips))
            parts.append(Part(split, num_clips, shard_bytes(num_clips), "hash"))
            self.entries[shard_id, split] = self.entry_type(split, num_clips)
            self.totals["cut"] += num_clips
        self.lake.publish(shard_id, parts, [], Counter())

    def worker_abandons(self) -> None:
        if self.writing:
            shard_id = next(iter(self.writing))
            del self.writing[shard_id]
            self.lake.abandon(shard_id)

    def sweep(self) -> None:
        self.writing = {i: is_alive for i, is_alive in self.writing.items() if is_alive}
        self.lake.sweep()

    def retire_recent(self) -> None:
        keep = self.rng.randint(0, MOST_CLIPS)
        self.lake.retire_recent(keep)
        for key in sorted(self.entries, reverse=True):
            if key[1] == "recent":
                keep -= self.entries[key].num_clips
                if keep + self.entries[key].num_clips <= 0:
                    self.totals["retired_validation"] += self.entries.pop(key).num_clips

    def lease(self) -> None:
        trainer = self.rng.choice(self.trainers)
        ready = sorted(i for (i, split), entry in self.entries.items() if split == "train" and entry.state == "ready")
        shard = self.lake.lease(trainer.owner.id, trainer.run)
        assert (shard.id if shard else None) == (ready[0] if ready else None)
        if shard:
            entry = self.entries[shard.id, "train"]
            assert int.from_bytes(shard.covered, "little") == int.from_bytes(bits(entry.covered), "little")
            entry.state, entry.owner, entry.run = "leased", trainer.owner.id, trainer.run
            trainer.trained[shard.id] = entry.covered

    def checkpoint(self) -> None:
        trainer = self.rng.choice(self.trainers)
        for shard_id, clips in trainer.trained.items():
            everything = range(self.entries[shard_id, "train"].num_clips)
            more = everything if self.rng.random() < 0.5 else self.rng.sample(everything, len(everything) // 2)
            trainer.trained[shard_id] = clips | frozenset(more)
        gone = self.lake.record_checkpoint(trainer.owner.id, {i: bits(clips) for i, clips in trainer.trained.items()})
        trainer.previous, trainer.newest = trainer.newest, dict(trainer.trained)
        for shard_id in list(trainer.trained):
            entry = self.entries[shard_id, "train"]
            if len(entry.covered) == entry.num_clips:
                assert shard_id in gone
                self.totals["trained"] += entry.num_clips
                del self.entries[shard_id, "train"], trainer.trained[shard_id]
            else:
                entry.covered = trainer.trained[shard_id]

    def trainer_dies_and_resumes(self) -> None:
        trainer = self.rng.choice(self.trainers)
        trainer.owner.file.close()  # as a kill would: the kernel drops the lock
        trainer.owner = Owner(self.lake.root, "train")
        if self.rng.random() < 0.3:
            trainer.newest = trainer.previous
        shards = self.lake.begin_run(trainer.owner.id, trainer.run, {i: bits(c) for i, c in trainer.newest.items()})
        living = {trainer.owner.id for trainer in self.trainers}
        for entry in self.entries.values():
            if entry.run and entry.state in ("ready", "leased") and entry.owner not in living:
                entry.covered = frozenset() if entry.run == trainer.run else entry.covered
                entry.state, entry.owner = "ready", ""
        trainer.trained = {}
        for shard_id, covered in trainer.newest.items():
            entry = self.entries.get((shard_id, "train"))
            if entry and entry.state == "ready":
                entry.state, entry.owner, entry.run, entry.covered = "leased", trainer.owner.id, trainer.run, covered
                trainer.trained[shard_id] = covered
        assert [shard.id for shard in shards] == list(trainer.trained)

    def trainer_leaves(self) -> None:
        trainer = self.rng.choice(self.trainers)
        self.lake.release(trainer.owner.id)
        for shard_id in trainer.trained:
            entry = self.entries[shard_id, "train"]
            entry.state, entry.owner = "ready", ""
        trainer.trained = {}

    def shard_is_found_broken(self) -> None:
        trainer = self.rng.choice(self.trainers)
        if trainer.trained:
            shard_id = next(iter(trainer.trained))
            self.lake.quarantine(shard_id, "train", "broken")
            self.entries[shard_id, "train"].state = "quarantined"
            del trainer.trained[shard_id]

    # ---- what must be true ----

    def used_bytes(self) -> int:
        """By the model: what is written, and what is reserved."""
        return sum(shard_bytes(entry.num_clips) for entry in self.entries.values()) + RESERVED * len(self.writing)

    def books(self) -> dict[str, int]:
        """By the model."""
        books = Counter(cut=self.totals["cut"], retired_validation=self.totals["retired_validation"])
        books += Counter(trained=self.totals["trained"])
        for entry in self.entries.values():
            place = "validation" if entry.split != "train" else entry.state
            books[place] += entry.num_clips - len(entry.covered)
            books["trained"] += len(entry.covered)
        names = ("cut", "ready", "leased", "trained", "validation", "retired_validation", "quarantined")
        return {name: books[name] for name in (*names, "trained_again")}

    def check(self) -> None:
        """Ledger, folders and model agree."""
        books = self.lake.books()
        assert (asdict(books), books.balance()) == (self.books(), 0)
        assert self.lake.used_bytes() == self.used_bytes() <= self.lake.cap_bytes()
        assert self.lake.disagreements() == []


@pytest.fixture
def walk(tmp_path, request):
    """A walk over a lake with room for sixteen of the longest parts."""
    walk = Walk(make_lake(tmp_path, cap_clips=16 * MOST_CLIPS), request.param)
    yield walk
    for owner in (walk.worker, *(trainer.owner for trainer in walk.trainers)):
        owner.release()


@pytest.mark.parametrize("walk", range(6), indirect=True)
def test_the_books_balance_and_the_cap_holds_whatever_happens(walk):
    often = [walk.worker_begins, walk.worker_begins, walk.worker_publishes, walk.lease, walk.checkpoint]
    rare = [walk.worker_abandons, walk.sweep, walk.retire_recent, walk.trainer_dies_and_resumes, walk.trainer_leaves]
    for step in range(200):
        walk.rng.choice([*often * 4, *rare])()
        if step % 50 == 49:  # rarely, because what is quarantined takes up room for ever
            walk.shard_is_found_broken()
        walk.check()
    assert walk.num_full and walk.totals["trained"] and walk.totals["retired_validation"], "the walk saw too little"
