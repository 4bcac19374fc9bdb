"""fsck: what it finds, what it puts right, and what a lake still promises when its ledger was made again."""

import json
import os
import shutil
import sqlite3
from collections import Counter
from pathlib import Path

import pytest
from lake_tools import (
    add_shard,
    assert_in_order,
    batches_of,
    clips_on_disk,
    die,
    encoded,
    filled_lake,
    ids_of,
    make_clips,
    make_lake,
    members_of,
    noise,
    stream,
    write_source,
    write_tar,
)
from reference.chunker import Clips, clips_of

from hear_distill import backup, rebuild, repair
from hear_distill.backup import Backups, back_up, damage_of
from hear_distill.files import GIB, UserError, write_json
from hear_distill.lake import Lake
from hear_distill.locks import Owner
from hear_distill.schema import Part
from hear_distill.shards import shard_bytes, write_shard

SHARD_CLIPS = 8
FLAGS = ("--shard-clips", SHARD_CLIPS, "--val-clips", 50, "--val-fraction", 0.05, "--open-tars", 3)  # no recent retires


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Four tars of short recordings, and one of long ones, which no shard holds whole."""
    folder = write_source(tmp_path_factory.mktemp("source"), num_tars=4, recordings_per_tar=12)
    long = [member for i in range(3) for member in members_of(f"long-{i}", encoded(noise(16_000 * 50, i)))]
    write_tar(folder / "long.tar", long)
    return folder


@pytest.fixture(scope="module")
def expected(source) -> Clips:
    return clips_of(source)


def cut(source: Path, lake: Path, num_shards: int) -> None:
    """Stream until the lake has no room for another shard of so many, or the source ends."""
    ended = stream(source, lake, *FLAGS, "--cap-gb", num_shards * shard_bytes(SHARD_CLIPS + 2) / GIB)
    assert ended.returncode == 0, ended.stderr


def places(root: Path) -> set[tuple[str, str, int]]:
    """Where the clips in the files of a lake were cut; none is there twice."""
    counts = Counter(clip.place for clip in clips_on_disk(root))
    assert set(counts.values()) <= {1}
    return set(counts)


def train(root: Path, num_shards: int) -> None:
    """Lease so many shards, oldest first, and let two checkpoints cover them: they are retired."""
    lake = Lake.open(root)
    coverage = {}
    for _ in range(num_shards):
        shard = lake.lease("trainer", "run")
        coverage[shard.id] = bytes([255] * (shard.num_clips // 8)) + bytes([2 ** (shard.num_clips % 8) - 1])
    lake.record_checkpoint("trainer", coverage)
    assert len(lake.record_checkpoint("trainer", coverage)) == num_shards
    lake.release("trainer")
    lake.close()


def lose(root: Path, how: str) -> None:
    """Take the ledger away, or spoil it."""
    for path in root.glob("ledger.sqlite*"):
        if how == "lost":
            path.unlink()
        elif path.name == "ledger.sqlite":
            path.write_bytes(b"\0" * 100 + os.urandom(path.stat().st_size - 100))


# ---- a ledger that is gone ----


@pytest.mark.parametrize("how", ["lost", "damaged"])
def test_with_the_backup_each_clip_is_cut_once_and_what_was_trained_is_not_cut_again(
    source, expected, tmp_path, how, capsys
):
    root = tmp_path / "lake"
    cut(source, root, 11)
    back_up(root)
    before = places(root)
    train(root, 2)  # shards of which the backup says that they are ready
    trained = before - places(root)
    cut(source, root, 18)
    assert len(trained) > 4 and places(root) - before, "nothing came or went since the backup"

    lose(root, how)
    assert repair.check(root, is_deep=False) == 1 and "fsck --repair" in capsys.readouterr().out
    assert repair.repair(root, is_deep=True) == 0
    said = capsys.readouterr().out
    lake = Lake.open(root)  # its cap is the backup's, until a streamer sets it anew
    assert lake.disagreements() == [] and lake.books().trained == len(trained)
    lake.close()

    cut(source, root, 1000)
    found = places(root)
    assert found.isdisjoint(trained), "clips that were trained on are cut again"
    missing = expected.keys() - found - trained
    (line,) = [line for line in said.splitlines() if "cut in part" in line]
    num_lost = int(line.split("at most ")[1].split()[0])
    assert 0 < len(missing) == num_lost, "the report is exact where no clip is silent"
    assert len({place[:2] for place in missing}) <= 3, "more than one recording of each open tar"
    begun = {place[:2] for place in found}
    assert all(place[:2] in begun for place in missing), "a recording is lost that was not begun"
    assert_in_order(root)
    assert repair.check(root, is_deep=True) == 0


def test_without_the_backup_no_clip_that_is_there_is_cut_again(source, expected, tmp_path, capsys):
    root = tmp_path / "lake"
    cut(source, root, 14)
    train(root, 2)
    lake, there = Lake.open(root), places(root)
    settings, anchor = lake.settings(), {shard.id for shard in lake.ready("anchor")}
    groups = lake.anchor_groups()
    write_json(root / "status.json", {"settings": settings})
    lake.close()

    lose(root, "lost")
    with pytest.raises(UserError, match=r"fsck --repair"):
        Lake.open(root)
    assert repair.repair(root, is_deep=False) == 0
    assert "cut again" in capsys.readouterr().out
    lake = assert_in_order(root)
    assert lake.settings() == settings, "a trainer would take it for another lake"
    assert {shard.id for shard in lake.ready("anchor")} == anchor and lake.anchor_groups()
    assert len(lake.anchor_groups()) >= len(groups)  # keys of recordings, where the videos are not known
    lake.close()

    cut(source, root, 1000)
    assert places(root) >= there
    assert len(places(root)) > len(there) + SHARD_CLIPS
    assert places(root) <= expected.keys()
    assert_in_order(root)


def test_a_trainer_goes_on_after_a_repair_and_gets_each_clip_once(tmp_path, reader_of, capsys):
    lake = filled_lake(tmp_path, 6, 6, 6)
    back_up(tmp_path)
    for _ in range(2):
        add_shard(lake, 6)
    reader = reader_of(lake, batch_size=4, num_open=2)
    batches = batches_of(reader, 4)
    state = reader.state()
    reader.record_checkpoint()
    die(reader)
    lose(tmp_path, "lost")
    assert repair.repair(tmp_path, is_deep=False) == 0

    again = reader_of(Lake.open(tmp_path), batch_size=1, state=state)
    counts = ids_of([*batches, *batches_of(again)])
    assert len(counts) == 30 and set(counts.values()) == {1}


def test_no_number_of_a_shard_is_given_again(tmp_path, capsys):
    lake = filled_lake(tmp_path, 3)
    back_up(tmp_path)
    gone = [add_shard(lake, 2) for _ in range(3)]
    lake.close()
    for shard_id in gone:  # cut, trained and retired since the backup
        (tmp_path / "shards" / f"{shard_id:08d}.tar").unlink()
    lose(tmp_path, "lost")
    assert repair.repair(tmp_path, is_deep=False) == 0
    lake = Lake.open(tmp_path)
    assert lake.begin_shard("worker", 1_000) > max(gone)


def test_a_shard_that_was_being_written_when_the_backup_was_made_stays(tmp_path, capsys):
    lake = filled_lake(tmp_path, 3)
    shard_id = lake.begin_shard("worker", shard_bytes(2))
    unfinished = lake.begin_shard("worker", shard_bytes(2))
    back_up(tmp_path)
    for number in (shard_id, unfinished):
        sha256 = write_shard(lake.path(number, "train", ".tar.part"), make_clips(2, number))
    lake.publish(shard_id, [Part("train", 2, shard_bytes(2), sha256)], [], Counter())
    lake.close()
    lose(tmp_path, "lost")
    assert repair.repair(tmp_path, is_deep=True) == 0
    books = assert_in_order(tmp_path).books()
    assert (books.cut, books.ready) == (5, 5)


def test_what_is_gone_is_counted_as_trained_and_what_is_quarantined_as_that(tmp_path, capsys):
    lake = filled_lake(tmp_path, 1, 2, 4)
    recent = add_shard(lake, 8, "recent")
    back_up(tmp_path)
    lake.quarantine(1, "train", "broken")
    lake.path(0, "train").unlink()
    lake.path(recent, "recent").unlink()
    lake.close()
    lose(tmp_path, "damaged")
    assert repair.repair(tmp_path, is_deep=False) == 0
    books = assert_in_order(tmp_path).books()
    assert (books.trained, books.quarantined, books.ready, books.retired_validation) == (1, 2, 4, 8)


def test_without_anything_that_names_the_lake_a_repair_is_refused_and_changes_nothing(tmp_path):
    filled_lake(tmp_path, 3).close()
    lose(tmp_path, "lost")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"neither ledger\.backup\.sqlite nor status\.json"):
        repair.repair(tmp_path, is_deep=False)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_a_source_that_has_changed_is_refused(source, tmp_path):
    lake = make_lake(tmp_path / "lake", source=str(source), revision="another")
    add_shard(lake, 2)
    write_json(tmp_path / "lake" / "status.json", {"settings": lake.settings()})
    lake.close()
    lose(tmp_path / "lake", "lost")
    with pytest.raises(UserError, match="was cut from another"):
        repair.repair(tmp_path / "lake", is_deep=False)


def test_a_repair_that_is_killed_between_two_renames_can_be_run_again(tmp_path, monkeypatch, capsys):
    lake = filled_lake(tmp_path / "damaged", 3)
    back_up(lake.root)
    add_shard(lake, 2)
    lake.close()
    lose(lake.root, "damaged")
    num_renames, rename = 0, Path.rename
    while True:
        root = shutil.copytree(tmp_path / "damaged", tmp_path / f"lake-{num_renames}")
        left = num_renames

        def rename_until_killed(path: Path, target: Path) -> Path:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return rename(path, target)

        try:
            with monkeypatch.context() as patched:
                patched.setattr(rebuild.Path, "rename", rename_until_killed)
                repair.repair(root, is_deep=False)
            break
        except KeyboardInterrupt:
            assert repair.repair(root, is_deep=True) == 0
            assert assert_in_order(root).books().ready == 5
            assert not (root / "rebuilding").exists() and list(root.glob("ledger.damaged-1.sqlite"))
            num_renames += 1
    assert num_renames == 4, "the old ledger goes with its two companions, if any; the new one comes"


def test_a_lake_is_not_made_over_shards_whose_ledger_is_lost(tmp_path):
    filled_lake(tmp_path, 3).close()
    lose(tmp_path, "lost")
    with pytest.raises(UserError, match=r"its ledger is lost.*fsck --repair"):
        make_lake(tmp_path)


def test_a_ledger_that_is_none_is_one_line_with_the_way_out(tmp_path):
    filled_lake(tmp_path, 3).close()
    lose(tmp_path, "damaged")
    with pytest.raises(UserError, match=r"is damaged \(file is not a database\).*fsck --repair"):
        Lake.open(tmp_path)


# ---- a ledger that is whole ----


def test_deep_finds_a_single_changed_byte_and_a_shallow_look_does_not(tmp_path, capsys):
    lake = filled_lake(tmp_path, 3, 3)
    path = lake.path(1, "train")
    with path.open("r+b") as f:
        f.seek(70_000)
        f.write(b"?")
    assert repair.check(tmp_path, is_deep=False) == 0
    assert repair.check(tmp_path, is_deep=True) == 1
    assert f"{path}: sha256" in capsys.readouterr().out


def test_what_is_not_as_the_ledger_says_is_quarantined_and_what_it_does_not_know_is_put_aside(tmp_path, capsys):
    lake = filled_lake(tmp_path, 1, 2, 4, 8)
    lake.path(0, "train").unlink()
    os.truncate(lake.path(1, "train"), 1000)
    with lake.path(2, "train").open("r+b") as f:
        f.write(b"?")
    stranger = tmp_path / "val" / "00000099.tar"
    stranger.write_bytes(b"whose?")
    lake.db.execute("UPDATE totals SET value = value + 3 WHERE name = 'cut'")
    lake.close()
    assert repair.repair(tmp_path, is_deep=True) == 0
    books = assert_in_order(tmp_path).books()
    assert (books.ready, books.quarantined, books.cut) == (8, 7, 15)
    assert (tmp_path / "aside" / "val-00000099.tar").read_bytes() == b"whose?"
    assert repair.check(tmp_path, is_deep=True) == 0
    said = capsys.readouterr().out
    assert "off by 3 clips" in said and "00000000.tar" in said and "agree" in said


def test_a_repair_of_a_lake_that_is_well_changes_nothing(tmp_path, capsys):
    lake = filled_lake(tmp_path, 3, 3)
    lake.lease("trainer", "run")
    lake.release("trainer")
    before = [tuple(row) for row in lake.db.execute("SELECT * FROM shards").fetchall()]
    assert repair.repair(tmp_path, is_deep=True) == 0
    assert [tuple(row) for row in lake.db.execute("SELECT * FROM shards").fetchall()] == before
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.parametrize("role", ["stream", "train"])
def test_a_lake_that_somebody_works_on_is_not_repaired(tmp_path, role):
    filled_lake(tmp_path, 3).close()
    owner = Owner(tmp_path, role)
    with pytest.raises(UserError, match=f"{owner.id} works on .*; stop it"):
        repair.repair(tmp_path, is_deep=False)
    owner.release()
    assert repair.repair(tmp_path, is_deep=False) == 0


# ---- the backup ----


def test_a_backup_is_made_at_once_and_then_every_hour(tmp_path, monkeypatch):
    lake, now = filled_lake(tmp_path, 3), [1000.0]
    monkeypatch.setattr(backup.time, "monotonic", lambda: now[0])
    backups, seen = Backups(tmp_path), []
    for now[0] in (1000.0, 1001.0, 4599.0, 4601.0):
        backups.look()
        with sqlite3.connect(tmp_path / "ledger.backup.sqlite") as db:
            seen.append(db.execute("SELECT count(*) FROM shards").fetchone()[0])
        db.close()
        add_shard(lake, 1)
    assert seen == [1, 1, 1, 4]


def test_a_backup_holds_whole_transactions_only_while_others_write(tmp_path):
    lake = filled_lake(tmp_path, 3)
    with lake.transaction():
        lake.db.execute("UPDATE totals SET value = 99 WHERE name = 'cut'")
        back_up(tmp_path)
    with sqlite3.connect(tmp_path / "ledger.backup.sqlite") as db:
        assert db.execute("SELECT value FROM totals WHERE name = 'cut'").fetchone() == (3,)
    db.close()
    assert damage_of(tmp_path / "ledger.backup.sqlite") is None
    assert not list(tmp_path.glob("*.tmp"))


def test_a_damaged_ledger_does_not_replace_its_backup(tmp_path):
    lake = filled_lake(tmp_path, *[1] * 40)
    back_up(tmp_path)
    good = (tmp_path / "ledger.backup.sqlite").read_bytes()
    lake.close()
    with (tmp_path / "ledger.sqlite").open("r+b") as f:  # the header stays: SQLite opens it
        f.seek(4096)
        f.write(os.urandom(8 * 4096))
    assert damage_of(tmp_path / "ledger.sqlite").startswith("damaged")
    with pytest.raises((UserError, sqlite3.DatabaseError)):
        back_up(tmp_path)
    assert (tmp_path / "ledger.backup.sqlite").read_bytes() == good
    assert json.dumps(damage_of(tmp_path / "nothing.sqlite")) == '"lost"'
