"""Killed at any point between two durable operations, twice in a row, or at any moment: nothing is lost or done twice.

The streamer is the real one; the trainer is `lake_tools.play_trainer`, which has everything of a trainer but the model.
The points inside the saving of a checkpoint are those of tests/test_checkpoint.py. At each point the process dies three
times over: alone, and together with a disk that loses what was not fsynced, in either of two ways (lossy_disk.py).
"""

import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from lake_tools import (
    PLAY_TRAINER,
    TIMEOUT_S,
    add_shard,
    assert_exactly_once,
    assert_in_order,
    clips_on_disk,
    encoded,
    environment,
    hash_of,
    make_clips,
    make_lake,
    members_of,
    newest_checkpoint,
    noise,
    run,
    run_python,
    stream,
    stream_command,
    write_source,
    write_tar,
)
from lossy_disk import LOST, on_lossy_disk
from reference.chunker import Clips, clips_of

from hear_distill.files import CRASH_POINTS
from hear_distill.lake import Lake

STREAMER_POINTS = [
    *("shard-reserved", "shard-written", "shard-synced", "shard-renamed-one", "shard-renamed", "shard-ready"),
    *("shard-unlinked", "shard-retired"),  # of `recent` validation that makes room for newer
]
TRAINER_POINTS = ["lease-taken", "checkpoint-recorded", "shard-unlinked", "shard-retired", "shard-quarantined"]
FLAGS = ("--shard-clips", 6, "--val-clips", 5, "--val-fraction", 0.3, "--open-tars", 2, "--cap-gb", 0.1)
KILLED = -signal.SIGKILL
each_loss = pytest.mark.parametrize("lost", LOST)


def test_every_crash_point_is_tested_somewhere():
    others = ("test_checkpoint.py", "test_reuse.py")  # not imported: the first needs torch
    texts = [Path(__file__).with_name(name).read_text() for name in others]
    elsewhere = {point for point in CRASH_POINTS for text in texts if f'"{point}"' in text}
    assert {*STREAMER_POINTS, *TRAINER_POINTS, *elsewhere} == CRASH_POINTS.keys()


# ---- the streamer ----


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_source(tmp_path_factory.mktemp("source"), num_tars=3, recordings_per_tar=6)


@pytest.fixture(scope="module")
def expected(source) -> Clips:
    return clips_of(source)


@pytest.fixture(scope="module")
def begun(source, tmp_path_factory) -> Path:
    """A lake whose worker died after the anchor and one more shard."""
    lake = tmp_path_factory.mktemp("begun") / "lake"
    assert [stream(source, lake, *FLAGS, crash_at="shard-ready").returncode for _ in range(2)] == [KILLED] * 2
    return lake


def assert_streamed(root: Path, expected: Clips) -> None:
    """Each clip was cut once and is on the disk, unless it was validation that made room for newer."""
    lake = assert_in_order(root)
    found = clips_on_disk(root)
    gone = Counter(expected.keys()) - Counter(clip.place for clip in found)
    assert_exactly_once(found, {place: samples for place, samples in expected.items() if place not in gone})
    assert (lake.books().cut, lake.books().retired_validation) == (len(expected), gone.total())
    assert lake.tar_states().keys() == {"done"}


@each_loss
@pytest.mark.parametrize("point", STREAMER_POINTS)
def test_a_streamer_killed_twice_at_one_point_cuts_each_clip_once(source, expected, begun, tmp_path, point, lost):
    lake = shutil.copytree(begun, tmp_path / "lake")
    command = on_lossy_disk(stream_command(source, lake, *FLAGS), tmp_path, lost)
    assert [run(command, crash_at=point).returncode for _ in range(2)] == [KILLED] * 2
    assert Lake.open(lake).books().balance() == 0
    assert stream(source, lake, *FLAGS).returncode == 0
    assert_streamed(lake, expected)


@each_loss
def test_a_streamer_killed_at_each_point_in_turn_while_it_cuts_the_anchor_cuts_one_anchor(
    source, expected, tmp_path, lost
):
    lake = tmp_path / "folder" / "lake"
    points = ["shard-written", "shard-synced", "shard-renamed", "shard-reserved", "shard-ready"]  # reserved: just swept
    command = on_lossy_disk(stream_command(source, lake, *FLAGS), tmp_path, lost)
    assert [run(command, crash_at=point).returncode for point in points] == [KILLED] * 5
    assert [shard.num_clips for shard in Lake.open(lake).ready("anchor")] == [5]
    assert stream(source, lake, *FLAGS).returncode == 0
    assert_streamed(lake, expected)


# ---- the trainer ----


SIZES = (7, 10, 4, 9, 12)
BROKEN = 1  # one of the shards
NOT_A_SHARD = b"not a shard"


@pytest.fixture
def filled(tmp_path) -> Lake:
    """A lake whose source is finished, with five train shards, one of them broken."""
    lake = make_lake(tmp_path / "lake")
    lake.db.execute("UPDATE tars SET state = 'done'")
    for num_clips in SIZES:
        add_shard(lake, num_clips)
    lake.path(BROKEN, "train").write_bytes(NOT_A_SHARD)
    return lake


def assert_trained(lake: Lake, out: Path) -> None:
    """In the surviving history, each clip that is not in the broken shard was trained on once."""
    clips = [clip for i, size in enumerate(SIZES) if i != BROKEN for clip in make_clips(size, i)]
    assert Counter(newest_checkpoint(out)["history"]) == Counter(hash_of(clip.samples.tobytes()) for clip in clips)
    lake.sweep()
    assert_in_order(lake.root)
    assert (lake.books().trained, lake.books().quarantined) == (len(clips), SIZES[BROKEN])
    assert [path.read_bytes() for path in (lake.root / "quarantine").iterdir()] == [NOT_A_SHARD]


def play_until(point: str, lost: str, lake: Lake, out: Path) -> int:
    """Train until `point`, or to the end: the exit status."""
    command = [sys.executable, "-c", PLAY_TRAINER, str(lake.root), str(out)]
    return run(on_lossy_disk(command, lake.root.parent, lost), crash_at=point).returncode


@each_loss
@pytest.mark.parametrize("point", TRAINER_POINTS)
def test_a_trainer_killed_twice_at_one_point_trains_on_each_clip_once(filled, tmp_path, point, lost):
    out = tmp_path / "runs" / "toy"
    deaths = [play_until(point, lost, filled, out) for _ in range(2)]
    assert deaths == [KILLED, KILLED if point != "shard-quarantined" else 0]  # it breaks only once
    assert filled.books().balance() == 0
    assert run_python(PLAY_TRAINER, filled.root, out).returncode == 0
    assert_trained(filled, out)


@each_loss
@pytest.mark.parametrize("point", ["checkpoint-recorded", "shard-unlinked", "shard-retired"])
def test_a_trainer_whose_newest_checkpoint_was_damaged_as_well_trains_on_each_clip_once(filled, tmp_path, point, lost):
    out = tmp_path / "runs" / "toy"
    for _ in range(2):
        assert play_until(point, lost, filled, out) == KILLED
        (out / "latest.json").write_text('{"history": [')
    assert run_python(PLAY_TRAINER, filled.root, out).returncode == 0
    assert_trained(filled, out)


# ---- any moment ----


@pytest.mark.parametrize(
    ("num_kills", "seed"), [(12, 1), pytest.param(30, 2, marks=pytest.mark.slow)], ids=["12 kills", "30 kills"]
)
def test_streamer_and_trainer_killed_at_random_moments_lose_nothing_and_repeat_nothing(tmp_path, num_kills, seed):
    source, root = write_source(tmp_path / "source", 2 * num_kills, 8), tmp_path / "lake"
    flags = ("--shard-clips", 5, "--val-clips", 0, "--val-fraction", 0, "--open-tars", 3, "--cap-gb", 0.2)
    assert stream(source, root, *flags, "--check").returncode == 0
    lake, rng = Lake.open(root), random.Random(seed)
    commands = (
        stream_command(source, root, *flags),
        [sys.executable, "-c", PLAY_TRAINER, str(root), str(tmp_path)],
    )
    for _ in range(num_kills):
        begun = lake.totals()["next_shard_id"] + rng.randint(1, 6)
        processes = [start(command) for command in commands]
        while lake.totals()["next_shard_id"] < begun:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        for process in processes:
            process.kill()
        assert [process.wait() for process in processes] == [KILLED, KILLED]
        assert lake.books().balance() == 0
    assert newest_checkpoint(tmp_path)["history"], "the trainer was at work as well"

    assert [process.wait(TIMEOUT_S) for process in [start(command) for command in commands]] == [0, 0]
    trained = Counter(hash_of(samples) for samples in clips_of(source).values())
    assert Counter(newest_checkpoint(tmp_path)["history"]) == trained
    lake.sweep()
    assert assert_in_order(root).books().trained == trained.total()


def start(command: list[str]) -> "subprocess.Popen[bytes]":
    """Let it run, unheard."""
    return subprocess.Popen(
        command, cwd=Path(__file__).parent, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


@pytest.mark.slow
def test_two_workers_side_by_side_killed_one_at_a_time_cut_each_clip_once(tmp_path):
    source, root, rng = write_source(tmp_path / "source", 16, 50), tmp_path / "lake", random.Random(4)
    for number in range(4):  # 100 clips in a row: a worker is killed inside it, and the other goes on or takes it over
        long = members_of(f"long-{number}", encoded(noise(200 * 16_000, 9, number)))
        write_tar(source / f"long-{number}.tar", long)
    flags = ("--shard-clips", 2, "--val-clips", 8, "--val-fraction", 0.1, "--open-tars", 3, "--max-workers", 2)
    command = stream_command(source, root, *flags, "--cap-gb", 1)
    workers, num_cut_short = [start(command), start(command)], 0
    for _ in range(30):
        victim = workers.pop(rng.randrange(2))
        while not (root / "heartbeats" / f"stream-{victim.pid}.json").exists():  # until it reads
            assert victim.poll() is None, "the source ended before the last kill: make it longer"
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        victim.kill()
        assert victim.wait() == KILLED
        lake = Lake.open(root)
        assert lake.books().balance() == 0
        num_cut_short += any(row["next_clip"] for row in lake.db.execute("SELECT next_clip FROM tars"))
        lake.close()
        workers.append(start(command))
    assert num_cut_short > 10, "most kills should find a recording that a full shard cut in two"
    assert [worker.wait(TIMEOUT_S) for worker in workers] == [0, 0]
    assert_streamed(root, clips_of(source))
