"""A recording that kills its decoder is passed over after three deaths; nothing else is lost, nobody else is blamed."""

import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from lake_tools import (
    assert_exactly_once,
    assert_in_order,
    clips_on_disk,
    encoded,
    make_lake,
    members_of,
    noise,
    run,
    write_tar,
)
from poisoned_streamer import POISONED_STREAMER, write_poisoned_source
from reference.chunker import clips_of

from hear_distill import cutter
from hear_distill.audio import DecodeError
from hear_distill.cutter import Draft, Keep, Reader
from hear_distill.guard import MAX_DEATHS, Guard
from hear_distill.lake import Lake
from hear_distill.locks import Owner
from hear_distill.schema import Cursor
from hear_distill.sources import FolderSource
from hear_distill.tars import Recording

FLAGS = ("--shard-clips", 6, "--val-clips", 0, "--val-fraction", 0, "--cap-gb", 0.2, "--open-tars", 2)


def harmless(source: Path, keys: set[str]) -> dict:
    """Clips that must be there: those of all other recordings."""
    return {place: samples for place, samples in clips_of(source).items() if place[1] not in keys}


def stream_poisoned(source: Path, lake: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, POISONED_STREAMER, "--source", source, "--lake", lake, *FLAGS]
    return run(list(map(str, command)))


def test_a_recording_that_killed_three_workers_is_passed_over_and_every_other_clip_is_cut_once(tmp_path):
    source = write_poisoned_source(tmp_path / "source", {1: (3,)})
    for _ in range(MAX_DEATHS):
        assert stream_poisoned(source, tmp_path / "lake").returncode == -signal.SIGSEGV
    last = stream_poisoned(source, tmp_path / "lake")
    assert last.returncode == 0, last.stderr
    assert "WARNING: rec-1-3 of 1.tar killed its decoder 3 times and is passed over" in last.stderr
    assert_exactly_once(clips_on_disk(tmp_path / "lake"), harmless(source, {"rec-1-3"}))
    totals = assert_in_order(tmp_path / "lake").totals()
    assert (totals["skipped: poison"], totals["decoder deaths"], totals["recordings"]) == (1, 3, 18)


def test_a_long_recording_that_kills_three_workers_at_its_second_decoding_gives_what_it_gave_and_no_more(tmp_path):
    source = write_poisoned_source(tmp_path / "source", {}, long={1: 3})
    for _ in range(MAX_DEATHS):
        assert stream_poisoned(source, tmp_path / "lake").returncode == -signal.SIGSEGV
    last = stream_poisoned(source, tmp_path / "lake")
    assert last.returncode == 0, last.stderr
    assert "WARNING: rec-1-3 of 1.tar killed its decoder 3 times and is passed over" in last.stderr
    found, all_clips = clips_on_disk(tmp_path / "lake"), clips_of(source)
    given = sorted(clip.place for clip in found if clip.place[1] == "rec-1-3")
    assert given == [("1.tar", "rec-1-3", 32_000 * i) for i in range(len(given))] and len(given) <= 2
    assert_exactly_once(found, harmless(source, {"rec-1-3"}) | {place: all_clips[place] for place in given})
    totals = assert_in_order(tmp_path / "lake").totals()
    assert (totals["skipped: poison"], totals["decoder deaths"], totals["recordings"]) == (1, 3, 18)


# ---- in one process ----


@pytest.fixture
def lake(tmp_path):
    lake = make_lake(tmp_path / "lake")
    yield lake
    lake.close()


RECORDING = Recording(key='odd "key"\nin two lines \udcff', offset=1536)


def die_at(lake: Lake, recording: Recording = RECORDING) -> None:
    """A worker drops dead while it decodes this, and another one finds its lock."""
    owner = Owner(lake.root, "stream")
    owner.note(json.dumps(["a.tar", recording.offset, recording.key]))
    owner.file.close()
    lake.sweep()


@pytest.fixture
def living(lake):
    """Make the guard of a worker that lives, with a.tar open."""
    owners = []

    def make() -> Guard:
        owners.append(Owner(lake.root, "stream"))
        guard = Guard(lake, owners[-1])
        guard.open_tar("a.tar")
        return guard

    yield make
    for owner in owners:
        owner.release()


def decode(guard: Guard, error: type[Exception] | None = None) -> None:
    """A part of it, or none."""
    with guard.decoding("a.tar", RECORDING):
        if error:
            raise error("undecodable", "") if error is DecodeError else error


def test_the_third_death_in_a_row_makes_a_recording_poison_and_no_other(lake, living):
    for num_deaths in range(1, 4):
        assert not living().is_poison("a.tar", RECORDING)
        die_at(lake)
        assert lake.suspects("a.tar") == {1536: num_deaths}
    assert living().is_poison("a.tar", RECORDING)
    assert not living().is_poison("a.tar", Recording(key=RECORDING.key, offset=2048))
    assert lake.suspects("b.tar") == {} and lake.totals()["decoder deaths"] == 3


@pytest.mark.parametrize("error", [None, DecodeError], ids=["decoded", "refused"])
def test_a_recording_that_is_decoded_or_refused_at_last_is_no_longer_suspected(lake, living, error):
    die_at(lake)
    guard = living()
    try:
        decode(guard, error)
        assert lake.suspects("a.tar") == {1536: 1}, "more of it may come"
        guard.acquit("a.tar", RECORDING)
    except DecodeError:
        assert error
    assert lake.suspects("a.tar") == {}


@pytest.mark.parametrize("held_samples", [1_000_000, 100_000], ids=["held", "decoded twice"])
def test_a_reader_acquits_a_suspect_when_its_last_clip_is_cut_and_no_earlier(
    lake, living, tmp_path, monkeypatch, held_samples
):
    monkeypatch.setattr(cutter, "HELD_SAMPLES", held_samples)
    write_tar(tmp_path / "source" / "a.tar", members_of("a", encoded(noise(300_000))))
    die_at(lake, Recording(key="a", offset=0))
    guard, num_bytes = living(), (tmp_path / "source" / "a.tar").stat().st_size
    reader = Reader(FolderSource(tmp_path / "source"), Cursor(0, "a.tar", num_bytes, 0, 0), Keep(), lambda: None, guard)
    draft, suspects = Draft(), []
    while reader.advance(draft, 4, lambda group: "train"):
        suspects.append(lake.suspects("a.tar"))
    assert draft.num_clips() == 9 and suspects == [{0: 1}, {0: 1}, {}]


def test_a_worker_that_is_asked_to_leave_in_the_middle_acquits_nobody_and_blames_nobody(lake, living):
    die_at(lake)
    guard = living()
    with pytest.raises(InterruptedError):
        decode(guard, InterruptedError)
    guard.owner.release()
    lake.sweep()
    assert lake.suspects("a.tar") == {1536: 1} and lake.totals()["decoder deaths"] == 1


def test_a_worker_that_dies_between_two_recordings_blames_nobody(lake, living):
    guard = living()
    decode(guard)
    guard.owner.file.close()
    lake.sweep()
    assert lake.suspects("a.tar") == {} and lake.totals() == Counter()


@pytest.mark.parametrize("content", [b"", b"\0" * 4096, b'["a.tar", 15', b"[1]\n", b"7\n", b'["a.tar", {}, "k"]\n'])
def test_a_lock_that_a_power_cut_has_spoilt_is_swept_all_the_same(lake, content):
    path = lake.root / "owners" / "stream-00000000.lock"
    path.write_bytes(content)
    lake.sweep()
    assert not path.exists() and lake.totals() == Counter()
