"""Shards that are used again: whole passes, in the surviving history as well, and room for new ones where it is wanted.

The walk is that of tests/test_books.py, with more that can happen and a larger model.
"""

import signal
from collections import Counter
from dataclasses import dataclass, field

import pytest
from lake_tools import (
    PLAY_TRAINER,
    add_shard,
    batches_of,
    die,
    filled_lake,
    hash_of,
    make_clips,
    make_lake,
    newest_checkpoint,
    run_python,
)
from test_books import MOST_CLIPS, RESERVED, Entry, Trainer, Walk, bits
from train_tools import Training

from hear_distill.data import Batch
from hear_distill.lake import Lake, LakeFull
from hear_distill.locks import Owner
from hear_distill.shards import shard_bytes
from hear_distill.teacher import save_stand_in

SIZES = (7, 10, 1, 9, 8, 13)
TOY_SIZES = (7, 10, 4, 9, 12)
KILLED = -signal.SIGKILL


def passes_of(batches: list[Batch]) -> dict[int, list[list[int]]]:
    """By shard, its clips in the order in which they were handed out, cut into passes; the last may be unfinished."""
    clips: dict[int, list[int]] = {}
    for batch in batches:
        for shard, clip in batch.ids:
            clips.setdefault(shard, []).append(clip)
    sizes = {shard: max(found) + 1 for shard, found in clips.items()}
    return {i: [found[at : at + sizes[i]] for at in range(0, len(found), sizes[i])] for i, found in clips.items()}


def assert_whole_passes(batches: list[Batch], sizes: tuple[int, ...] = SIZES) -> None:
    """Each pass over a shard but the last takes each of its clips once, and the last none twice."""
    for shard, passes in passes_of(batches).items():
        assert all(sorted(clips) == list(range(sizes[shard])) for clips in passes[:-1]), shard
        assert len(set(passes[-1])) == len(passes[-1])


@pytest.mark.parametrize("sizes", [SIZES, (20,), (5, 5, 5)])
@pytest.mark.parametrize(("num_open", "batch_size"), [(1, 1), (3, 6), (99, 15)])
def test_a_drained_lake_is_gone_over_again_each_clip_once_a_pass(tmp_path, reader_of, sizes, num_open, batch_size):
    lake = filled_lake(tmp_path, *sizes)
    reader = reader_of(lake, num_open=num_open, batch_size=batch_size, reuse=True)
    count = 5 * sum(sizes) // batch_size
    batches = batches_of(reader, count)
    assert len(batches) == count and not reader.is_starved
    assert_whole_passes(batches, sizes)
    if num_open == 99:
        uses = [len(passes) for passes in passes_of(batches).values()]
        assert len(uses) == len(sizes) and max(uses) - min(uses) <= 1
    reader.record_checkpoint()
    books = lake.books()
    assert (books.trained, books.trained_again, books.balance()) == (sum(sizes), count * batch_size - sum(sizes), 0)
    assert lake.ready("train") == [], "nobody wants room, so nothing is given back"


def test_less_than_a_batch_in_all_is_no_batch_however_often_it_may_be_used(tmp_path, reader_of):
    reader = reader_of(filled_lake(tmp_path, 7, 8), batch_size=16, reuse=True)
    assert (reader.next_batch(), reader.is_drained(), reader.num_unread()) == (None, True, 15)


@pytest.mark.parametrize("num_before", [3, 7, 8, 16, 23, 31])
@pytest.mark.parametrize("ahead_clips", [(0, 99), (99, 0)])
def test_a_reader_that_uses_shards_again_is_killed_and_resumed_and_goes_on_as_the_unbroken_one(
    tmp_path, reader_of, num_before, ahead_clips
):
    lake = filled_lake(tmp_path / "unbroken", *SIZES)
    unbroken = [batch.ids for batch in batches_of(reader_of(lake, batch_size=6, ahead_clips=7, reuse=True), 40)]

    lake = filled_lake(tmp_path / "broken", *SIZES)
    first = reader_of(lake, batch_size=6, ahead_clips=ahead_clips[0], reuse=True)
    head = [batch.ids for batch in batches_of(first, num_before)]
    state = first.state()
    first.record_checkpoint()
    batches_of(first, 13)
    first.record_checkpoint()  # of a checkpoint that turns out damaged
    first.next_batch()
    die(first)
    second = reader_of(lake, batch_size=6, ahead_clips=ahead_clips[1], state=state, reuse=True)
    assert lake.books().trained + lake.books().trained_again == 6 * num_before
    assert head + [batch.ids for batch in batches_of(second, 40 - num_before)] == unbroken


def test_where_the_lake_wants_room_used_shards_are_given_back_and_the_most_used_makes_way(tmp_path, reader_of):
    """Fresh shards come first, and nothing goes that the second-newest checkpoint does not cover."""
    lake = make_lake(tmp_path)
    sizes = (10, 10, 10, 10)
    for num_clips in sizes:
        add_shard(lake, num_clips)
    lake.db.execute("UPDATE settings SET value = ? WHERE name = 'cap_bytes'", (lake.used_bytes(),))
    reader = reader_of(lake, num_open=1, batch_size=5, ahead_clips=0, reuse=True)
    batches = batches_of(reader, 5)
    reader.record_checkpoint()
    with pytest.raises(LakeFull):
        add_shard(lake, 10)
    reader.record_checkpoint()
    assert (lake.has_room(), [shard.id for shard in lake.ready("train")]) == (True, [0, 1, 3])
    assert lake.unread_clips() == 15
    lake.db.execute("UPDATE shards SET num_uses = 2 WHERE id = 1")  # as after another pass
    fresh = add_shard(lake, 10)
    assert lake.used_bytes() == lake.cap_bytes()
    assert [shard.id for shard in lake.ready("train")] == [0, 3, fresh]
    batches += batches_of(reader, 12)
    assert list(dict.fromkeys(shard for batch in batches for shard, _ in batch.ids)) == [0, 1, 2, 3, fresh]
    books = lake.books()
    assert (books.balance(), books.cut, lake.disagreements()) == (0, 50, [])


def test_a_shard_whose_first_pass_only_the_newest_checkpoint_contains_makes_no_room(tmp_path):
    lake = make_lake(tmp_path)
    shard_id = add_shard(lake, 10)
    cap_bytes = lake.used_bytes() + shard_bytes(0)  # one shard in at most two parts
    lake.db.execute("UPDATE settings SET value = ? WHERE name = 'cap_bytes'", (cap_bytes,))
    for is_spare in (False, True):
        lake.lease("trainer", "run")
        lake.record_checkpoint("trainer", {shard_id: b"\1\0"}, {shard_id: 1}, is_kept=True)
        lake.release("trainer")
        assert (lake.has_room(), lake.wants_room()) == (is_spare, not is_spare)
        if not is_spare:
            with pytest.raises(LakeFull):
                add_shard(lake, 10)
    add_shard(lake, 10)
    books = lake.books()
    assert (books.trained, books.trained_again, books.ready, books.balance()) == (10, 1, 10, 0)


def test_a_run_that_ceases_to_reuse_lets_its_shards_go_after_this_pass(tmp_path, reader_of):
    lake = filled_lake(tmp_path, *SIZES)
    first = reader_of(lake, batch_size=6, reuse=True)
    batches = batches_of(first, 20)
    first.record_checkpoint()
    state = first.state()
    first.close()
    second = reader_of(lake, state=state)
    batches += batches_of(second)
    assert_whole_passes(batches)
    for _ in range(2):
        second.record_checkpoint()
    books = lake.books()
    assert (books.trained, books.trained_again) == (48, sum(len(batch.ids) for batch in batches) - 48)
    assert (lake.used_bytes(), second.accounts, books.balance()) == (0, {}, 0)


# ---- killed ----


def toy_lake(root) -> Lake:
    """Five shards that fill their lake, whose source has more: each checkpoint may give shards back."""
    lake = make_lake(root)
    for num_clips in TOY_SIZES:
        add_shard(lake, num_clips)
    lake.db.execute("UPDATE settings SET value = ? WHERE name = 'cap_bytes'", (lake.used_bytes(),))
    return lake


@pytest.mark.parametrize("point", ["lease-taken", "checkpoint-recorded", "shard-given-back"])
@pytest.mark.parametrize("is_damaged", [False, True], ids=["", "newest checkpoint damaged"])
def test_a_trainer_killed_twice_at_one_point_makes_whole_passes_in_the_surviving_history(tmp_path, point, is_damaged):
    lake = toy_lake(tmp_path / "lake")
    for _ in range(2):
        assert run_python(PLAY_TRAINER, lake.root, tmp_path, 40, crash_at=point).returncode == KILLED
        if is_damaged and (tmp_path / "latest.json").exists():
            (tmp_path / "latest.json").write_text('{"history": [')
        assert lake.books().balance() == 0
    assert run_python(PLAY_TRAINER, lake.root, tmp_path, 40).returncode == 0
    history = newest_checkpoint(tmp_path)["history"]
    assert len(history) == 200
    place_of = {
        hash_of(made.samples.tobytes()): (shard, clip)
        for shard, num_clips in enumerate(TOY_SIZES)
        for clip, made in enumerate(make_clips(num_clips, shard))
    }
    assert_whole_passes([Batch(None, [place_of[sound] for sound in history])], TOY_SIZES)
    lake.sweep()
    books = lake.books()
    assert (books.trained + books.trained_again, books.balance(), lake.disagreements()) == (200, 0, [])


def test_a_training_that_uses_shards_again_ends_with_its_steps_and_as_if_it_had_not_been_killed(tmp_path):
    teacher = save_stand_in(tmp_path / "teacher", seed=0)
    trainings = []
    for name in ("whole", "broken"):
        filled_lake(tmp_path / name / "lake", *SIZES).close()
        (tmp_path / name / "run").mkdir()
        training = Training(tmp_path / name / "run", tmp_path / name / "lake", teacher)
        trainings.append(training.but(consume="reuse", schedule__total_samples=160))
    whole, broken = trainings
    assert [broken.run(crash_at="checkpoint-recorded").code for _ in range(3)] == [KILLED] * 3
    for training in trainings:
        ended = training.run()
        assert ended.code == 0 and "all clips are done: step 40, 160 of 160 clips" in ended.said
    assert broken.trained() == whole.trained() and len(whole.trained()) == 160
    assert min(Counter(whole.trained()).values()) >= 2 and len(set(whole.trained())) == sum(SIZES)
    lake = Lake.open(broken.lake)
    assert (lake.books().trained, lake.books().trained_again, lake.disagreements()) == (48, 112, [])


ADD_SHARD = """
import sys
from pathlib import Path
from lake_tools import add_shard
from hear_distill.lake import Lake
add_shard(Lake.open(Path(sys.argv[1])), 10, owner="stream-dead")
"""


@pytest.mark.parametrize("point", ["shard-pushed-out", "shard-unlinked", "shard-retired"])
def test_a_streamer_killed_twice_while_it_makes_room_keeps_the_books_and_the_cap(tmp_path, reader_of, point):
    lake = toy_lake(tmp_path)
    reader = reader_of(lake, num_open=1, batch_size=5, reuse=True)
    batches_of(reader, 20)
    for _ in range(2):
        reader.record_checkpoint()
    reader.close()
    used = 100
    for _ in range(2):
        assert run_python(ADD_SHARD, tmp_path, crash_at=point).returncode == KILLED
        lake.sweep()
        lake.finish_retiring()
        books = lake.books()
        assert (books.balance(), books.trained + books.trained_again, lake.disagreements()) == (0, used, [])
        lake.db.execute("UPDATE settings SET value = ? WHERE name = 'cap_bytes'", (lake.used_bytes(),))
    before = len(lake.ready("train"))
    fresh = add_shard(lake, 4)
    assert lake.used_bytes() <= lake.cap_bytes() and before - 1 <= len(lake.ready("train")) <= before
    assert lake.lease("trainer", "another run").id == fresh, "what was never used comes first"


# ---- the walk ----


@dataclass
class UsedEntry(Entry):
    """With whole passes: in the newest checkpoint, and in the one before."""

    num_uses: int = 0
    num_safe_uses: int = 0

    def is_whole(self) -> bool:
        return len(self.covered) == self.num_clips

    def all_uses(self) -> int:
        """Of single clips."""
        return self.num_uses * self.num_clips + len(self.covered)


@dataclass
class UsingTrainer(Trainer):
    """And whole passes of every shard it holds."""

    uses: dict[int, int] = field(default_factory=dict)
    newest_uses: dict[int, int] = field(default_factory=dict)
    previous_uses: dict[int, int] = field(default_factory=dict)


class UsingWalk(Walk):
    """The walk of trainers that use shards again."""

    entries: dict[tuple[int, str], UsedEntry]
    entry_type = UsedEntry
    trainer_type = UsingTrainer
    num_pushed_out = 0

    def worker_begins(self) -> None:
        missing = self.used_bytes() + RESERVED - self.lake.cap_bytes()
        spare = [k for k, e in self.entries.items() if k[1] == "train" and e.state == "ready" and e.num_safe_uses]
        if 0 < missing <= sum(shard_bytes(self.entries[key].num_clips) for key in spare):
            for key in sorted(spare, key=lambda key: (-self.entries[key].num_uses, key)):
                if missing > 0:
                    entry = self.entries.pop(key)
                    missing -= shard_bytes(entry.num_clips)
                    self.totals["trained"] += entry.num_clips
                    self.totals["trained_again"] += entry.all_uses() - entry.num_clips
                    self.num_pushed_out += 1
        super().worker_begins()

    def lease(self) -> None:
        trainer = self.rng.choice(self.trainers)
        ready = [(e.num_uses, i) for (i, split), e in self.entries.items() if split == "train" and e.state == "ready"]
        shard = self.lake.lease(trainer.owner.id, trainer.run)
        assert (shard and (shard.num_uses, shard.id)) == min(ready, default=None)
        if shard:
            entry = self.entries[shard.id, "train"]
            entry.state, entry.owner, entry.run = "leased", trainer.owner.id, trainer.run
            entry.num_safe_uses = entry.num_uses
            trainer.trained[shard.id], trainer.uses[shard.id] = entry.covered, entry.num_uses

    def checkpoint(self) -> None:
        trainer = self.rng.choice(self.trainers)
        for shard_id, clips in trainer.trained.items():
            everything = range(self.entries[shard_id, "train"].num_clips)
            if len(clips) == len(everything) and self.rng.random() < 0.5:
                trainer.uses[shard_id] += self.rng.randint(1, 2)
                trainer.trained[shard_id] = frozenset()
            more = everything if self.rng.random() < 0.6 else self.rng.sample(everything, len(everything) // 2)
            trainer.trained[shard_id] |= frozenset(more)
        coverage = {i: bits(clips) for i, clips in trainer.trained.items()}
        uses = {i: trainer.uses[i] for i in coverage if trainer.uses[i]}
        assert self.lake.record_checkpoint(trainer.owner.id, coverage, uses, is_kept=True) == []
        trainer.previous, trainer.newest = trainer.newest, dict(trainer.trained)
        trainer.previous_uses, trainer.newest_uses = trainer.newest_uses, dict(trainer.uses)
        for shard_id, clips in trainer.trained.items():
            entry = self.entries[shard_id, "train"]
            entry.num_safe_uses = entry.num_uses + entry.is_whole()
            entry.num_uses, entry.covered = trainer.uses[shard_id], clips
        self.give_back(trainer)

    def give_back(self, trainer: UsingTrainer) -> None:
        spare = {i for i in trainer.trained if self.entries[i, "train"].num_safe_uses}
        assert self.lake.spare(trainer.owner.id) == spare
        given = [i for i in sorted(spare) if self.entries[i, "train"].is_whole() and self.rng.random() < 0.7]
        self.lake.give_back(trainer.owner.id, given)
        for shard_id in given:
            entry = self.entries[shard_id, "train"]
            entry.state, entry.owner, entry.covered = "ready", "", frozenset()
            entry.num_uses = entry.num_safe_uses = entry.num_uses + 1
            del trainer.trained[shard_id]

    def trainer_dies_and_resumes(self) -> None:
        trainer = self.rng.choice(self.trainers)
        held = {i for i in trainer.trained if self.entries[i, "train"].state == "leased"}
        trainer.owner.file.close()  # as a kill would: the kernel drops the lock
        trainer.owner = Owner(self.lake.root, "train")
        if self.rng.random() < 0.3:
            trainer.newest, trainer.newest_uses = trainer.previous, trainer.previous_uses
        coverage = {i: bits(clips) for i, clips in trainer.newest.items()}
        shards = self.lake.begin_run(trainer.owner.id, trainer.run, coverage, trainer.newest_uses)
        living = {trainer.owner.id for trainer in self.trainers}
        for entry in self.entries.values():
            if entry.run and entry.state in ("ready", "leased") and entry.owner not in living:
                if entry.run == trainer.run:
                    entry.covered, entry.num_uses = frozenset(), entry.num_safe_uses
                entry.state, entry.owner = "ready", ""
        trainer.trained, trainer.uses = {}, {}
        for shard_id, covered in trainer.newest.items():
            entry, uses = self.entries.get((shard_id, "train")), trainer.newest_uses[shard_id]
            if not entry or entry.state != "ready":
                continue
            is_over = entry.run != trainer.run or len(covered) == entry.num_clips
            if entry.num_uses > uses and is_over and shard_id not in held:
                continue
            entry.state, entry.owner, entry.run = "leased", trainer.owner.id, trainer.run
            entry.covered, entry.num_uses = covered, uses
            trainer.trained[shard_id], trainer.uses[shard_id] = covered, uses
        found = [(shard.id, shard.num_uses) for shard in shards]
        assert found == [(i, trainer.uses[i]) for i in trainer.trained]

    def books(self) -> dict[str, int]:
        books = Counter(super().books())
        books["trained_again"] = self.totals["trained_again"]
        for (_, split), entry in self.entries.items():
            if split == "train" and entry.num_uses:
                books[entry.state] -= entry.num_clips - len(entry.covered)
                books["trained"] += entry.num_clips - len(entry.covered)
                books["trained_again"] += entry.all_uses() - entry.num_clips
        return dict(books)


@pytest.fixture
def walk(tmp_path, request):
    """A walk over a lake with room for sixteen of the longest parts."""
    walk = UsingWalk(make_lake(tmp_path, cap_clips=16 * MOST_CLIPS), request.param)
    yield walk
    for owner in (walk.worker, *(trainer.owner for trainer in walk.trainers)):
        owner.release()


@pytest.mark.parametrize("walk", range(6), indirect=True)
def test_the_books_balance_and_the_cap_holds_whatever_is_used_again(walk):
    often = [walk.worker_begins, walk.worker_begins, walk.worker_publishes, walk.lease, walk.checkpoint]
    rare = [walk.worker_abandons, walk.sweep, walk.retire_recent, walk.trainer_dies_and_resumes, walk.trainer_leaves]
    for step in range(300):
        walk.rng.choice([*often * 3, *rare])()
        if step % 100 == 99:
            walk.shard_is_found_broken()
        walk.check()
    assert walk.num_pushed_out and walk.totals["trained_again"], "the walk saw too little"
