"""Killed at any point between two durable operations, twice in a row, or at any moment: nothing is lost or done twice.

The streamer is the real one; the trainer is `lake_tools.play_trainer`, which has everything of a trainer but the model.
The points inside the saving of a checkpoint are those of tests/test_checkpoint.py.
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
    environment,
    hash_of,
    make_clips,
    make_lake,
    newest_checkpoint,
    run_python,
    stream,
    stream_command,
    write_source,
)
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


@pytest.mark.parametrize("point", STREAMER_POINTS)
def test_a_streamer_killed_twice_at_one_point_cuts_each_clip_once(source, expected, begun, tmp_path, point):
    lake = shutil.copytree(begun, tmp_path / "lake")
    deaths = [stream(source, lake, *FLAGS, crash_at=point).returncode for _ in range(2)]
    assert deaths == [KILLED] * 2
    assert Lake.open(lake).books().balance() == 0
    assert stream(source, lake, *FLAGS).returncode == 0
    assert_streamed(lake, expected)


def test_a_streamer_killed_at_each_point_in_turn_while_it_cuts_the_anchor_cuts_one_anchor(source, expected, tmp_path):
    lake = tmp_path / "lake"
    points = ["shard-reserved", "shard-written", "shard-synced", "shard-renamed", "shard-ready"]
    assert [stream(source, lake, *FLAGS, crash_at=point).returncode for point in points] == [KILLED] * 5
    assert [shard.num_clips for shard in Lake.open(lake).ready("anchor")] == [5]
    assert stream(source, lake, *FLAGS).returncode == 0
    assert_streamed(lake, expected)


# ---- the trainer ----


SIZES = (7, 10, 4, 9, 12)
BROKEN = 1  # one of the shards


@pytest.fixture
def filled(tmp_path) -> Lake:
    """A lake whose source is finished, with five train shards, one of them broken."""
    lake = make_lake(tmp_path / "lake")
    lake.db.execute("UPDATE tars SET state = 'done'")
    for num_clips in SIZES:
        add_shard(lake, num_clips)
    lake.path(BROKEN, "train").write_bytes(b"not a shard")
    return lake


def assert_trained(lake: Lake, out: Path) -> None:
    """In the surviving history, each clip that is not in the broken shard was trained on once."""
    clips = [clip for i, size in enumerate(SIZES) if i != BROKEN for clip in make_clips(size, i)]
    assert Counter(newest_checkpoint(out)["history"]) == Counter(hash_of(clip.samples.tobytes()) for clip in clips)
    lake.sweep()
    assert_in_order(lake.root)
    assert (lake.books().trained, lake.books().quarantined) == (len(clips), SIZES[BROKEN])


@pytest.mark.parametrize("point", TRAINER_POINTS)
def test_a_trainer_killed_twice_at_one_point_trains_on_each_clip_once(filled, tmp_path, point):
    deaths = [run_python(PLAY_TRAINER, filled.root, tmp_path, crash_at=point).returncode for _ in range(2)]
    assert deaths == [KILLED, KILLED if point != "shard-quarantined" else 0]  # it breaks only once
    assert filled.books().balance() == 0
    assert run_python(PLAY_TRAINER, filled.root, tmp_path).returncode == 0
    assert_trained(filled, tmp_path)


@pytest.mark.parametrize("point", ["checkpoint-recorded", "shard-unlinked", "shard-retired"])
def test_a_trainer_whose_newest_checkpoint_was_damaged_as_well_trains_on_each_clip_once(filled, tmp_path, point):
    for _ in range(2):
        assert run_python(PLAY_TRAINER, filled.root, tmp_path, crash_at=point).returncode == KILLED
        (tmp_path / "latest.json").write_text('{"history": [')
    assert run_python(PLAY_TRAINER, filled.root, tmp_path).returncode == 0
    assert_trained(filled, tmp_path)


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
