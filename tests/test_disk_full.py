"""A full disk: streamers and trainer say so, lose nothing, and go on when there is room again.

Some of these mount a small tmpfs, for which one must be root; the others make the calls of a full disk fail.
"""

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
from lake_tools import (
    add_shard,
    assert_exactly_once,
    assert_in_order,
    clips_on_disk,
    make_lake,
    run_python,
    stream,
    write_source,
)
from reference.chunker import clips_of

from hear_distill.files import MIB, DiskFull, is_disk_full

FLAGS = ("--shard-clips", 8, "--val-clips", 0, "--val-fraction", 0, "--cap-gb", 0.2, "--open-tars", 2)
# The streamer on a disk that is full for a moment: the call that its first argument names fails once, the third time.
FULL_FOR_A_MOMENT = """
import errno, runpy, sys
from lake_tools import STREAMER
from hear_distill import files, lake, runlog, shards

what, calls = sys.argv.pop(1), []

def failing(real):
    def call(*arguments, **more):
        calls.append(what)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device", "somewhere")
        return real(*arguments, **more)
    return call

module, name = {"write": (shards, "write_shard"), "fsync": (lake, "_fsync_file"), "beat": (runlog, "write_json")}[what]
setattr(module, name, failing(getattr(module, name)))
sys.argv[0] = str(STREAMER)
runpy.run_path(str(STREAMER), run_name="__main__")
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """About 100 clips, 6 MiB."""
    return write_source(tmp_path_factory.mktemp("source"), num_tars=3, recordings_per_tar=14)


def test_a_streamer_on_a_full_disk_says_so_leaves_nothing_half_done_and_goes_on_when_there_is_room(source, small_disk):
    disk, resize = small_disk
    full = stream(source, disk / "lake", *FLAGS)
    assert (full.returncode, full.stderr.count("\n")) == (DiskFull.exit_code, 1), full.stderr
    assert "the disk is full" in full.stderr
    assert assert_in_order(disk / "lake").books().cut > 20
    assert list(disk.rglob("*.part")) == []
    resize(64 * MIB)
    assert stream(source, disk / "lake", *FLAGS).returncode == 0
    assert_exactly_once(clips_on_disk(disk / "lake"), clips_of(source))


@pytest.mark.parametrize("what", ["fsync", *(pytest.param(what, marks=pytest.mark.slow) for what in ("write", "beat"))])
def test_wherever_a_streamer_meets_the_full_disk_no_clip_is_lost_or_cut_twice(source, tmp_path, what):
    arguments = ["--source", source, "--lake", tmp_path / "lake", *FLAGS]
    full = run_python(FULL_FOR_A_MOMENT, what, *arguments)
    assert full.returncode == DiskFull.exit_code, full.stderr
    assert "No space left on device" in full.stderr and "Traceback" not in full.stderr
    assert list(tmp_path.rglob("*.part")) == []
    assert_in_order(tmp_path / "lake")
    assert stream(source, tmp_path / "lake", *FLAGS).returncode == 0
    assert_exactly_once(clips_on_disk(tmp_path / "lake"), clips_of(source))


def test_a_shard_that_is_published_cannot_be_abandoned(tmp_path):
    lake = make_lake(tmp_path)
    shard_id = add_shard(lake, 3)
    lake.abandon(shard_id)
    assert lake.disagreements() == [] and lake.books().ready == 3


def test_a_ledger_that_cannot_grow_keeps_what_it_holds_and_can_be_used_again(small_disk):
    disk, resize = small_disk
    lake = make_lake(disk / "lake")
    lake.db.execute("CREATE TABLE ballast (content BLOB)")
    fill(disk)
    with pytest.raises(Exception, match="full") as error, lake.transaction():
        lake.db.execute("INSERT INTO ballast VALUES (zeroblob(3000000))")
    assert is_disk_full(error.value)
    resize(64 * MIB)
    add_shard(lake, 3)
    assert lake.books().ready == 3 and lake.disagreements() == []
    lake.close()


def fill(disk: Path) -> Path:
    """Leave not one page free."""
    path = disk / "ballast"
    with path.open("wb", buffering=0) as f:
        while True:
            try:
                f.write(bytes(4096))
            except OSError as e:
                assert e.errno == errno.ENOSPC
                return path


# ---- checkpoints ----


@pytest.fixture
def checkpoint(monkeypatch):
    from hear_distill import checkpoint  # loads torch

    monkeypatch.setattr(checkpoint, "ROOM_RETRY_S", 0.01)
    return checkpoint


def full_for(times: int, real: Callable[..., None]) -> Callable[..., None]:
    """A call that fails so often, as torch.save does on a full disk: after some bytes, and not with an OSError."""
    left = [times]

    def call(state: object, f: object) -> None:
        if left[0] > 0:
            left[0] -= 1
            f.write(b"some")
            try:
                raise OSError(errno.ENOSPC, "No space left on device")
            finally:
                raise RuntimeError("unexpected pos 704 vs 598")
        real(state, f)

    return call


def test_a_checkpoint_on_a_full_disk_waits_for_room_says_so_once_and_keeps_the_last_one(
    checkpoint, tmp_path, monkeypatch, capsys
):
    checkpoint.save(tmp_path, {"step": 1})
    monkeypatch.setattr(checkpoint.torch, "save", full_for(3, checkpoint.torch.save))
    checkpoint.save(tmp_path, {"step": 2})
    assert capsys.readouterr().err.count("WARNING: no room for a checkpoint") == 1
    assert [checkpoint.load(tmp_path / name)["step"] for name in ("latest.pt", "previous.pt")] == [2, 1]


def test_a_checkpoint_that_finds_no_room_for_long_ends_the_trainer_and_the_last_one_stands(
    checkpoint, tmp_path, monkeypatch
):
    checkpoint.save(tmp_path, {"step": 1})
    monkeypatch.setattr(checkpoint, "ROOM_WAIT_S", 0.1)
    monkeypatch.setattr(checkpoint.torch, "save", full_for(10_000, checkpoint.torch.save))
    with pytest.raises(DiskFull, match="the last good one stands"):
        checkpoint.save(tmp_path, {"step": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["latest.pt"]
    assert checkpoint.load(tmp_path / "latest.pt")["step"] == 1


def test_a_checkpoint_on_a_disk_that_is_really_full_is_written_when_there_is_room(
    checkpoint, small_disk, monkeypatch, capsys
):
    disk, resize = small_disk
    checkpoint.save(disk, {"step": 1})
    fill(disk)
    monkeypatch.setattr(checkpoint.time, "sleep", lambda _: resize(64 * MIB))
    checkpoint.save(disk, {"step": 2, "weight": checkpoint.torch.ones(100_000)})
    assert "no room for a checkpoint" in capsys.readouterr().err
    assert checkpoint.load(disk / "latest.pt")["step"] == 2
    assert checkpoint.load(disk / "previous.pt")["step"] == 1


def test_an_error_that_is_no_full_disk_is_raised_as_it_is(checkpoint, tmp_path, monkeypatch):
    def broken(*_: object) -> None:
        raise RuntimeError("no space for you")

    monkeypatch.setattr(checkpoint.torch, "save", broken)
    with pytest.raises(RuntimeError, match="no space for you"):
        checkpoint.save(tmp_path, {"step": 1})
    assert not is_disk_full(OSError(errno.EACCES, "Permission denied"))
