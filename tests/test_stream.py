"""The streamer as its users run it: each clip of the source ends in exactly one finished shard, and nothing else does.

The straight chunker in tests/reference says what must be there; tarfile and wave read what is there.
"""

import signal
import subprocess
import time
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from lake_tools import (
    TIMEOUT_S,
    FoundClip,
    assert_exactly_once,
    assert_in_order,
    clips_on_disk,
    encoded,
    environment,
    members_of,
    noise,
    start_python,
    stream,
    stream_command,
    tar_of,
    write_source,
    write_tar,
)
from reference.chunker import Clips, clips_of

from hear_distill.lake import Lake
from hear_distill.runlog import read_heartbeat
from hear_distill.shards import shard_bytes

MIXED = ("--val-clips", 40, "--val-fraction", 0.15, "--open-tars", 3, "--cap-gb", 0.2)
FLAGS = ("--shard-clips", 8, *MIXED)
CUT_THE_ANCHOR = """
import sys
from pathlib import Path
from hear_distill.lake import Lake
from hear_distill.locks import Owner
lake = Lake.open(Path(sys.argv[1]))
owner = Owner(lake.root, "stream")
lake.begin_shard(owner.id, 1_000, "anchor")
print("at work", flush=True)
sys.stdin.read()
"""
ALL_TRAIN = ("--shard-clips", 8, "--val-clips", 0, "--val-fraction", 0, "--cap-gb", 0.2)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Seven tars, about 200 clips; one of them longer than three shards, some stereo, compressed, or at other rates."""
    folder = write_source(tmp_path_factory.mktemp("source"), num_tars=6, recordings_per_tar=8)
    stereo = np.stack([noise(44_100 * 5, 1), noise(44_100 * 5, 2)], axis=1)  # [n, 2]
    various = [
        *members_of("long", encoded(noise(16_000 * 60, 3))),
        *members_of("stereo", encoded(stereo, 44_100, "FLAC"), "flac"),
        *members_of("compressed", encoded(noise(48_000 * 7, 4) // 4, 48_000, "MP3"), "mp3"),
        *members_of("narrow", encoded(noise(8_000 * 4, 5), 8_000, "OGG"), "ogg"),
        ("untitled.wav", encoded(noise(70_000, 6))),
    ]
    write_tar(folder / "various.tar", various)
    return folder


@pytest.fixture(scope="module")
def expected(source) -> Clips:
    return clips_of(source)


@pytest.fixture(scope="module")
def streamed(source, tmp_path_factory) -> Path:
    """A lake that one worker filled from `source`, to the end."""
    lake = tmp_path_factory.mktemp("streamed") / "lake"
    assert stream(source, lake, *FLAGS).returncode == 0
    return lake


def video_of(clip: FoundClip) -> str:
    """What may not be torn apart: of `write_source`, the two neighbours that share a title; else the recording."""
    key = clip.info["key"]
    return f"{key[:-3]}{int(key[-3:]) // 2}" if key.startswith("rec-") else key


def clips_by_shard(root: Path) -> dict[str, list[FoundClip]]:
    """The train shards of a lake."""
    shards = defaultdict(list)
    for clip in clips_on_disk(root):
        if clip.folder == "shards":
            shards[clip.shard].append(clip)
    return shards


# ---- exactly once ----


def test_each_clip_of_the_source_is_in_exactly_one_shard(streamed, expected):
    assert_exactly_once(clips_on_disk(streamed), expected)
    assert assert_in_order(streamed).tar_states() == {"done": 7}


def test_three_workers_side_by_side_share_the_source_out(source, expected, tmp_path):
    command = stream_command(source, tmp_path / "lake", *FLAGS)
    workers = [subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [worker.communicate()[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0, 0], outputs
    assert_exactly_once(clips_on_disk(tmp_path / "lake"), expected)
    lake = assert_in_order(tmp_path / "lake")
    assert [shard.num_clips for shard in lake.ready("anchor")] == [40]


def test_a_clip_knows_where_it_comes_from(streamed):
    infos = {clip.place: clip.info for clip in clips_on_disk(streamed)}
    assert len({info["id"] for info in infos.values()}) == len(infos)
    assert infos["various.tar", "stereo", 48_000]["source_s"] == 5.0
    assert infos["various.tar", "long", 640_000]["caption"] == "sound of long"
    assert infos["various.tar", "untitled", 0]["caption"] == ""


def test_nodes_take_disjoint_parts_of_the_source_and_leave_nothing_out(source, expected, tmp_path):
    found = []
    for rank in range(3):
        lake = tmp_path / f"lake-{rank}"
        assert stream(source, lake, *FLAGS, "--num-nodes", 3, "--node-rank", rank).returncode == 0
        found += clips_on_disk(lake)
    assert_exactly_once(found, expected)
    refused = stream(source, tmp_path / "lake-0", *FLAGS, "--num-nodes", 3, "--node-rank", 1)
    assert refused.returncode == 2 and "is another one" in refused.stderr


# ---- the split ----


def test_no_recording_and_no_video_is_on_both_sides_of_the_split(streamed):
    sides = defaultdict(set)
    for clip in clips_on_disk(streamed):
        sides[video_of(clip)].add(clip.folder)
    assert Counter(len(side) for side in sides.values()).keys() == {1}
    assert Counter(next(iter(side)) for side in sides.values()).keys() == {"shards", "val"}


def test_the_anchor_is_cut_from_the_heads_of_all_tars(streamed):
    lake = Lake.open(streamed)
    (anchor,) = lake.ready("anchor")
    clips = [clip for clip in clips_on_disk(streamed) if (clip.folder, clip.shard) == ("val", anchor.path.name)]
    assert len(clips) == 40
    assert {clip.info["tar"] for clip in clips} == {*(f"source-{i}.tar" for i in range(6)), "various.tar"}
    assert all(clip.info["key"] == "long" or clip.info["key"][-3:] < "005" for clip in clips)


def test_the_split_is_the_same_whatever_the_shard_size_and_the_order(source, streamed, tmp_path):
    assert stream(source, tmp_path / "other", "--shard-clips", 21, *MIXED, "--open-tars", 1).returncode == 0
    held_out = [
        {clip.place for clip in clips_on_disk(root) if clip.folder == "val"} for root in (streamed, tmp_path / "other")
    ]
    assert held_out[0] == held_out[1]


def test_the_seed_decides_all_and_nothing_else_does(source, streamed, tmp_path):
    content = []
    for name, seed in (("again", 0), ("other", 1)):
        assert stream(source, tmp_path / name, *FLAGS, "--seed", seed).returncode == 0
        content.append([(clip.shard, clip.place) for clip in clips_on_disk(tmp_path / name)])
    assert content[0] == [(clip.shard, clip.place) for clip in clips_on_disk(streamed)]
    assert content[0] != content[1]


def test_a_shard_mixes_its_open_tars_and_the_clips_of_a_recording_are_scattered_in_it(source, tmp_path):
    flags = ("--shard-clips", 40, "--val-clips", 0, "--val-fraction", 0, "--open-tars", 5, "--cap-gb", 0.2)
    assert stream(source, tmp_path / "lake", *flags).returncode == 0
    *full, last = clips_by_shard(tmp_path / "lake").values()
    assert {len(clips) for clips in full} == {40} and len(last) <= 40
    for clips in full:
        assert len({clip.info["tar"] for clip in clips}) >= 3
        pairs = Counter(first.info["key"] == second.info["key"] for first, second in pairwise(clips))
        assert pairs[True] < pairs[False], "in the order of cutting most neighbours are of one recording"


def test_nobody_cuts_train_clips_while_the_anchor_is_being_cut(source, expected, tmp_path):
    assert stream(source, tmp_path / "lake", *FLAGS, "--check").returncode == 0
    other = start_python(CUT_THE_ANCHOR, tmp_path / "lake")
    command = stream_command(source, tmp_path / "lake", *FLAGS)
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as worker:
        time.sleep(1.5)
        assert (worker.poll(), clips_on_disk(tmp_path / "lake")) == (None, [])
        other.kill()
        other.communicate()
        assert "40 clips" in worker.stdout.readline(), "then it is cut by the one that waited"
        worker.communicate()
    assert_exactly_once(clips_on_disk(tmp_path / "lake"), expected)
    assert_in_order(tmp_path / "lake")


def test_recordings_longer_than_a_shard_take_turns(tmp_path):
    for i in range(4):
        write_tar(tmp_path / "source" / f"{i}.tar", members_of(f"long-{i}", encoded(noise(16_000 * 60, i))))
    assert stream(tmp_path / "source", tmp_path / "lake", *ALL_TRAIN, "--open-tars", 4).returncode == 0
    shards = list(clips_by_shard(tmp_path / "lake").values())
    assert len(shards) == 4 * 30 / 8
    for clips in shards[:8]:
        assert len({clip.info["key"] for clip in clips}) > 1, "a draw takes a fourth of a shard"


# ---- what to keep ----


def test_what_a_shard_holds_is_told_in_the_ledger_for_ever(streamed):
    lake = Lake.open(streamed)
    told = {row["id"]: row for row in lake.statistics(1_000)}
    found = defaultdict(list)
    for clip in clips_on_disk(streamed):
        found[int(clip.shard[:8])].append(clip)
    assert sum(row["clips"] for row in told.values()) == lake.books().cut
    assert len(found) > 10
    for shard_id, clips in found.items():
        assert told[shard_id]["clips"] == len(clips)
        assert told[shard_id]["tars"] == Counter(clip.info["tar"] for clip in clips)
        assert sum(told[shard_id]["levels_db"]) == len(clips)
    assert sum(row["recordings"] for row in told.values()) == lake.totals()["recordings"] == 6 * 8 + 5
    assert [row["id"] for row in lake.statistics(3)] == sorted(told)[-3:]


def test_what_is_kept_can_be_chosen_and_is_counted(tmp_path):
    silence = np.concatenate([noise(32_000, 1), np.zeros(32_000, np.int16)])
    members = members_of("half-silent", encoded(silence)) + members_of("cough", encoded(noise(8_000, 2)))
    members += [m for i in range(20) for m in members_of(f"music-{i}", encoded(noise(32_000, 3, i)))]
    write_tar(tmp_path / "source" / "a.tar", members)
    flags = ("--min-rms-db", -60, "--keep-short", "--caption-weight", "music=0.5", "^sound=1")
    worker = stream(tmp_path / "source", tmp_path / "lake", *ALL_TRAIN, *flags)
    assert worker.returncode == 0, worker.stderr
    kept = Counter(clip.info["key"][:5] for clip in clips_on_disk(tmp_path / "lake"))
    totals = assert_in_order(tmp_path / "lake").totals()
    assert (kept["half-"], kept["cough"], totals["skipped: silent clips"]) == (1, 1, 1)
    assert 0 < kept["music"] < 20 and kept["music"] + totals["skipped: thinned"] == 20
    assert f"{totals['skipped: thinned']} thinned" in worker.stdout

    again = stream(tmp_path / "source", tmp_path / "lake", *ALL_TRAIN)
    assert again.returncode == 0
    assert "WARNING: keep of" in again.stderr, "a lake whose mixture changes says so"


# ---- stopping and going on ----


def test_a_full_lake_ends_the_worker_keeps_its_validation_and_room_lets_the_next_go_on(source, expected, tmp_path):
    flags = ("--shard-clips", 8, *MIXED, "--cap-gb", (shard_bytes(120) + 8_192) / 2**30)
    found, ends, kept = [], [], set()
    while not ends or "the lake is full" in ends[-1]:
        worker = stream(source, tmp_path / "lake", *flags)
        assert worker.returncode == 0, worker.stderr
        ends.append(worker.stdout.splitlines()[-1])
        lake = assert_in_order(tmp_path / "lake")
        found += [clip for clip in clips_on_disk(tmp_path / "lake") if clip.folder == "shards"]
        validation = {(shard.id, shard.sha256) for split in ("anchor", "recent") for shard in lake.ready(split)}
        assert kept <= validation, "validation shrank because the lake was full, or begun again"
        kept = validation
        while shard := lake.lease("trainer", "run"):
            for _ in range(2):
                lake.record_checkpoint("trainer", {shard.id: ((1 << shard.num_clips) - 1).to_bytes(1, "little")})
    assert len(ends) > 2
    assert lake.totals()["recordings"] == 6 * 8 + 5, "one that two shards share is counted once"
    validation = [clip for clip in clips_on_disk(tmp_path / "lake") if clip.folder == "val"]
    assert_exactly_once(found + validation, expected)


@pytest.fixture(scope="module")
def slow_source(tmp_path_factory) -> Path:
    """Two tars that take seconds to decode: 80 recordings of 60 s."""
    folder = tmp_path_factory.mktemp("slow")
    audio = encoded(np.tile(noise(44_100 * 6, 1) // 8, 10), 44_100, "MP3")
    for tar in range(2):
        write_tar(folder / f"{tar}.tar", [m for i in range(40) for m in members_of(f"{tar}-{i}", audio, "mp3")])
    return folder


def wait_for_looks(root: Path, count: int) -> None:
    """Until the one worker of a lake has looked up so often since now: about forty times while it decodes a minute."""
    (path,) = (root / "heartbeats").glob("stream-*.json")
    first, end = read_heartbeat(path)["progress"], time.monotonic() + TIMEOUT_S
    while read_heartbeat(path)["progress"] < first + count:
        assert time.monotonic() < end, "it does not move"
        time.sleep(0.02)


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_that_is_asked_to_stop_commits_a_short_shard_within_seconds(slow_source, tmp_path, signal_number):
    flags = ("--shard-clips", 2_000, "--val-clips", 30, "--cap-gb", 0.2)
    command = stream_command(slow_source, tmp_path / "lake", *flags)
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as worker:
        assert "30 clips" in worker.stdout.readline()  # the anchor
        wait_for_looks(tmp_path / "lake", 200)
        worker.send_signal(signal_number)
        asked = time.monotonic()
        *_, last = worker.communicate()[0].splitlines()
        assert time.monotonic() - asked < 5
    assert worker.returncode == 0
    assert "asked to stop" in last
    lake = assert_in_order(tmp_path / "lake")
    assert 0 < lake.books().ready < 2_000
    assert lake.tar_states()["free"] == 2


def test_a_worker_stopped_while_it_cuts_the_anchor_leaves_no_half_of_one(slow_source, tmp_path):
    command = stream_command(slow_source, tmp_path / "lake", "--val-clips", 2_000, "--shard-clips", 10, "--cap-gb", 0.2)
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as worker:
        while not list((tmp_path / "lake" / "owners").glob("*.lock")):
            time.sleep(0.02)
        time.sleep(0.5)
        worker.terminate()
        worker.communicate()
    assert worker.returncode == 0
    lake = assert_in_order(tmp_path / "lake")
    assert (lake.books().cut, lake.has_anchor(), lake.used_bytes()) == (0, False, 0)


# ---- what cannot be read ----


def test_what_cannot_be_read_is_counted_by_reason_and_nothing_else_is_lost(tmp_path):
    good = [encoded(noise(70_000, i)) for i in range(6)]
    broken = [
        *members_of("random", np.random.default_rng(1).bytes(9_000), "mp3"),
        *members_of("page", b"<html>404</html>" * 99, "mp3"),
        *members_of("no-samples", encoded(noise(0, 1))),
        *members_of("nan", encoded(np.r_[np.zeros(40_000), np.nan], subtype="FLOAT")),
        *members_of("short", encoded(noise(31_999, 1))),
        *members_of("none", b"", "txt"),
        ("bad.wav", good[0]),
        ("bad.json", b"{"),
    ]
    fine = [m for i in range(4) for m in members_of(f"good-{i}", good[i])]
    write_tar(tmp_path / "source" / "a.tar", fine[:4] + broken[:6] + fine[4:6] + broken[6:] + fine[6:])
    whole = tar_of(members_of("good-4", good[4]) + members_of("good-5", good[5]))
    (tmp_path / "source" / "truncated.tar").write_bytes(whole[: len(whole) * 2 // 3])
    (tmp_path / "source" / "page.tar").write_bytes(b"<html>404</html>" * 99)
    (tmp_path / "source" / "nothing.tar").touch()

    worker = stream(tmp_path / "source", tmp_path / "lake", *ALL_TRAIN)
    assert worker.returncode == 0, worker.stderr
    lake = assert_in_order(tmp_path / "lake")
    skipped = {name.removeprefix("skipped: "): count for name, count in lake.totals().items() if "skipped" in name}
    assert skipped == {
        **{"undecodable": 2, "empty": 1, "not finite": 1, "too short": 1},
        **{"no audio member": 1, "bad JSON": 1},
    }
    assert (lake.totals()["recordings"], lake.totals()["broken tars"]) == (12, 3)
    assert lake.tar_states() == {"done": 1, "broken": 3}
    found = {clip.place for clip in clips_on_disk(tmp_path / "lake")}
    places = [("a.tar", f"good-{i}") for i in range(4)] + [("truncated.tar", "good-4")]
    assert found == {(*place, start) for place in places for start in (0, 32_000)}
    assert "2 undecodable" in worker.stdout and "3 broken tars" in worker.stdout
    assert worker.stderr.count(".tar is broken") == 3, "each is named once"


@pytest.mark.parametrize("flags", [ALL_TRAIN, FLAGS], ids=["train", "anchor"])
@pytest.mark.parametrize("num_broken", [100, 101])
def test_a_source_that_is_mostly_unreadable_stops_the_worker(tmp_path, flags, num_broken):
    members = [(f"{i}.mp3", b"no audio" * 9) for i in range(num_broken)]
    members += [(f"{i}.wav", encoded(noise(8_000, 1))) for i in range(num_broken, 300)]  # readable, if too short
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.tar").write_bytes(tar_of(members))
    worker = stream(tmp_path / "source", tmp_path / "lake", *flags)
    lake = assert_in_order(tmp_path / "lake")
    if num_broken == 100:
        assert (worker.returncode, lake.tar_states()) == (0, {"done": 1})
    else:
        assert worker.returncode == 2
        assert worker.stderr.startswith("error: only 0 of the first 101 recordings")
        assert len(worker.stderr.splitlines()) == 1
        assert (lake.tar_states()["free"], lake.used_bytes(), lake.totals()["recordings"]) == (1, 0, 0)


@pytest.mark.parametrize("flags", [ALL_TRAIN, FLAGS], ids=["train", "anchor"])
def test_a_source_of_which_no_tar_can_be_read_stops_the_worker(tmp_path, flags):
    (tmp_path / "source").mkdir()
    for i in range(12):
        (tmp_path / "source" / f"{i}.tar").write_bytes(b"<html>404</html>" * 99)
    worker = stream(tmp_path / "source", tmp_path / "lake", *flags)
    assert worker.returncode == 2
    assert worker.stderr.splitlines()[-1].startswith("error: none of the first 10 tars of")
    lake = assert_in_order(tmp_path / "lake")
    assert (lake.tar_states()["free"], lake.used_bytes()) == (12, 0)


# ---- refusals ----


@pytest.mark.parametrize(
    ("folder", "flags", "problem"),
    [
        ("missing", (), "no folder"),
        ("empty", (), "no *.tar in"),
        ("good", ("--shard-clip", 8), "--shard-clip"),
        ("good", ("--shard-clips", "many"), "many"),
        ("good", ("--shard-clips", 0), "--shard-clips"),
        ("good", ("--val-fraction", 1), "--val-fraction"),
        ("good", ("--cap-gb", 0.001), "--cap-gb"),
        ("good", ("--node-rank", 1), "--node-rank must be from 0 to 0"),
        ("good", ("--caption-weight", "cough"), "--caption-weight 'cough' is not PATTERN=W"),
        ("good", ("--min-rms-db", "loud"), "loud"),
    ],
)
def test_what_the_user_can_put_right_is_one_line_and_leaves_no_lake(tmp_path, folder, flags, problem):
    (tmp_path / "empty").mkdir()
    write_source(tmp_path / "good", 1, 1)
    worker = stream(tmp_path / folder, tmp_path / "lake", *flags)
    assert (worker.returncode, worker.stdout) == (2, "")
    assert len(worker.stderr.splitlines()) == 1
    assert problem in worker.stderr
    assert not (tmp_path / "lake").exists()


@pytest.mark.parametrize(
    "flags", [("--seed", 1), ("--shard-clips", 9), ("--val-clips", 41)], ids=lambda flags: flags[0]
)
def test_a_lake_of_other_settings_is_refused_and_left_as_it_was(source, streamed, flags):
    before = clips_on_disk(streamed)
    worker = stream(source, streamed, *FLAGS, *flags)
    assert (worker.returncode, len(worker.stderr.splitlines())) == (2, 1)
    assert "is another one" in worker.stderr
    assert clips_on_disk(streamed) == before


def test_check_makes_the_lake_and_nothing_else(tmp_path):
    write_source(tmp_path / "source", 2, 2)
    worker = stream(tmp_path / "source", tmp_path / "lake", *FLAGS, "--check")
    assert (worker.returncode, worker.stderr) == (0, "")
    lake = assert_in_order(tmp_path / "lake")
    assert lake.tar_states() == {"waiting": 2, "free": 2}
    files = {path.name for path in (tmp_path / "lake").rglob("*") if path.is_file()}
    assert files <= {"ledger.sqlite", "ledger.sqlite-wal", "ledger.sqlite-shm", "create.lock"}
