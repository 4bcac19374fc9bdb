"""One tar in, clips out: what is kept, what is passed over and counted, and where the cursor stands behind them."""

import gc
import json
import math
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from lake_tools import encoded, members_of, noise, tar_of
from reference.chunker import starts_by_the_book

from hear_distill import cutter
from hear_distill.cutter import Draft, Keep, Reader, parse_weights
from hear_distill.runlog import Stopped
from hear_distill.schema import Cursor
from hear_distill.sources import FolderSource


def reader_of(
    folder: Path,
    content: bytes,
    keep: Keep = Keep(),  # noqa: B008 (frozen)
    cursor: Cursor | None = None,
    look: Callable[[], None] = lambda: None,
) -> Reader:
    """A reader of a tar with this content, from its beginning or from a cursor."""
    folder.mkdir(exist_ok=True)
    (folder / "a.tar").write_bytes(content)
    cursor = cursor or Cursor(0, "a.tar", len(content), 0, 0)
    return Reader(FolderSource(folder), cursor, keep, look)


def cut_all(reader: Reader, room: int = 1_000) -> Draft:
    """Everything, at most `room` clips at a time."""
    draft = Draft()
    while reader.advance(draft, room, lambda group: "train"):
        pass
    return draft


def starts(draft: Draft) -> dict[str, list[int]]:
    """First samples of the clips of each recording, in the order of cutting."""
    found: dict[str, list[int]] = {}
    for clip in draft.clips["train"]:
        found.setdefault(clip.key, []).append(clip.start)
    return found


def tar_of_lengths(**num_samples: int) -> bytes:
    """A tar with a recording of noise for each key."""
    members = (members_of(key, encoded(noise(count, i))) for i, (key, count) in enumerate(num_samples.items()))
    return tar_of([member for pair in members for member in pair])


# ---- the cursor ----


@pytest.mark.parametrize("room", [1, 3, 7])
def test_a_reader_that_goes_on_from_any_cursor_cuts_the_rest_and_nothing_twice(tmp_path, room):
    content = tar_of_lengths(a=116_000, b=31_999, c=320_000, d=64_000)
    whole = [(c.id, c.samples.tobytes()) for c in cut_all(reader_of(tmp_path, content)).clips["train"]]
    reader, draft = reader_of(tmp_path, content), Draft()
    cursors = [(0, reader.to_publish())]
    while reader.advance(draft, room, lambda group: "train"):
        cursors.append((draft.num_clips(), reader.to_publish()))
    assert len(cursors) > 4
    assert len(whole) == 3 + 1 + 10 + 2, "116,000 samples earn a clip that is flush with the end"
    for num_cut, cursor in cursors:
        rest = cut_all(reader_of(tmp_path, content, cursor=cursor), room).clips["train"]
        assert [(clip.id, clip.samples.tobytes()) for clip in rest] == whole[num_cut:]


def test_a_recording_that_two_shards_share_is_counted_once(tmp_path):
    content = tar_of_lengths(a=320_000, b=64_000)
    reader, first = reader_of(tmp_path, content), Draft()
    reader.advance(first, 4, lambda group: "train")
    second = cut_all(reader_of(tmp_path, content, cursor=reader.to_publish()))
    assert (first.counts["recordings"], second.counts["recordings"]) == (1, 1)
    assert (first.heard_s, second.heard_s) == (20.0, 4.0)


def test_a_stop_while_a_recording_is_decoded_leaves_the_cursor_before_it(tmp_path):
    looks = []

    def look() -> None:
        looks.append(1)
        if len(looks) > 2:
            raise Stopped

    content = tar_of_lengths(a=64_000, b=64_000, c=64_000)
    reader, draft = reader_of(tmp_path, content, look=look), Draft()
    with pytest.raises(Stopped):
        while reader.advance(draft, 100, lambda group: "train"):
            pass
    assert draft.num_clips() > 0
    rest = cut_all(reader_of(tmp_path, content, cursor=reader.to_publish()))
    both = [clip.id for clip in draft.clips["train"] + rest.clips["train"]]
    assert both == [clip.id for clip in cut_all(reader_of(tmp_path, content)).clips["train"]]
    assert draft.counts["recordings"] + rest.counts["recordings"] == 3


def test_a_recording_too_long_to_hold_gives_the_same_clips(tmp_path, monkeypatch):
    content = tar_of_lengths(a=200_000, long=1_000_000, b=50_000)
    held = cut_all(reader_of(tmp_path, content))
    monkeypatch.setattr(cutter, "HELD_SAMPLES", 300_000)
    streamed = cut_all(reader_of(tmp_path, content), room=5)
    clips = [[(c.id, c.source_s, c.samples.tobytes()) for c in draft.clips["train"]] for draft in (held, streamed)]
    assert clips[0] == clips[1]
    assert starts(held)["long"] == starts_by_the_book(1_000_000)


def test_a_stop_while_a_long_recording_is_cut_leaves_it_uncounted(tmp_path, monkeypatch):
    monkeypatch.setattr(cutter, "HELD_SAMPLES", 300_000)
    looks_left = [1_000]

    def look() -> None:
        looks_left[0] -= 1
        if looks_left[0] == 0:
            raise Stopped

    reader, draft = reader_of(tmp_path, tar_of_lengths(long=1_000_000), look=look), Draft()
    assert reader._next(draft)
    looks_left[0] = 1  # of the second decoding
    with pytest.raises(Stopped):
        reader.advance(draft, 3, lambda group: "train")
    rest = cut_all(reader_of(tmp_path, tar_of_lengths(long=1_000_000), cursor=reader.to_publish()))
    assert draft.num_clips() == 0 and starts(rest)["long"] == starts_by_the_book(1_000_000)
    assert (draft.counts["recordings"] + rest.counts["recordings"], draft.heard_s + rest.heard_s) == (1, 62.5)


def test_the_time_of_both_decodings_of_a_long_recording_is_booked_as_decoding(tmp_path, monkeypatch):
    content, now_s, num_blocks, decode_blocks = tar_of_lengths(long=1_000_000), [0.0], [], cutter.decode_blocks

    def slow(audio: bytes) -> Iterator[np.ndarray]:
        """A second for every block, on a clock that nothing else moves."""
        for block in decode_blocks(audio):
            now_s[0] += 1.0
            num_blocks.append(1)
            yield block

    monkeypatch.setattr(cutter, "decode_blocks", slow)
    monkeypatch.setattr(cutter.time, "perf_counter", lambda: now_s[0])
    for held_samples, num_decodings in ((2_000_000, 1), (300_000, 2)):
        monkeypatch.setattr(cutter, "HELD_SAMPLES", held_samples)
        num_blocks.clear()
        draft = cut_all(reader_of(tmp_path, content), room=5)
        assert len(num_blocks) == num_decodings * len(list(decode_blocks(encoded(noise(1_000_000, 0)))))
        assert draft.clock_s == {"reading": 0.0, "decoding": len(num_blocks), "cutting": 0.0}


def test_a_look_comes_with_every_piece_that_is_read(tmp_path):
    looks = []
    reader = reader_of(tmp_path, tar_of_lengths(a=3_200_000), look=lambda: looks.append(1))  # 6.4 MB
    next(reader.recordings)
    assert len(looks) >= 6_400_000 // (128 * 1024)


def test_a_closed_reader_holds_no_sound(tmp_path):
    reader = reader_of(tmp_path, tar_of_lengths(a=3_200_000, b=64_000))
    tracemalloc.start()
    draft = Draft()
    assert reader.advance(draft, 2, lambda group: "anchor")
    cursor = reader.to_publish()
    before, _ = tracemalloc.get_traced_memory()
    reader.close()
    gc.collect()
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert before - after > 2 * 6_400_000 - 1_000_000, "compressed and decoded"
    assert reader.to_publish() == cursor and draft.num_clips() == 2


# ---- what is passed over ----


def test_a_key_that_comes_again_in_its_tar_is_another_recording_to_nobody(tmp_path):
    audio = [encoded(noise(64_000, i)) for i in range(4)]
    content = tar_of([m for key, a in zip("abca", audio, strict=True) for m in members_of(key, a)])
    draft = cut_all(reader_of(tmp_path, content))
    assert starts(draft) == {key: [0, 32_000] for key in "abc"}
    assert draft.counts == {"recordings": 4, "skipped: duplicate key": 1}
    ids = Counter(clip.id for clip in draft.clips["train"])
    assert set(ids.values()) == {1}

    neighbours = tar_of([m for a in audio[:2] for m in members_of("a", a)])
    draft = cut_all(reader_of(tmp_path, neighbours))
    assert draft.counts == {"recordings": 2, "skipped: duplicate key": 1}, "also right behind the first"
    assert [clip.samples[0] for clip in draft.clips["train"]] == [noise(64_000, 0)[0], noise(64_000, 0)[32_000]]

    reader, draft = reader_of(tmp_path, content), Draft()
    for _ in range(2):
        reader.advance(draft, 100, lambda group: "train")
    rest = cut_all(reader_of(tmp_path, content, cursor=reader.to_publish()))
    assert starts(rest) == {"c": [0, 32_000]}, "the key is remembered across a restart"
    assert reader.to_publish().keys and rest.cursors()[0].keys == b"", "and forgotten when the tar is done"


def test_short_recordings_are_kept_with_zeros_behind_them_if_asked_for(tmp_path):
    content = tar_of_lengths(tiny=4_799, short=4_800, almost=31_999, whole=32_000)
    assert cut_all(reader_of(tmp_path, content)).counts == {"recordings": 4, "skipped: too short": 3}

    draft = cut_all(reader_of(tmp_path, content, Keep(keep_short=True)))
    assert draft.counts == {"recordings": 4, "skipped: too short": 1}
    short, almost, whole = draft.clips["train"]
    assert (short.key, almost.key, whole.key) == ("short", "almost", "whole")
    assert (short.source_s, almost.source_s) == (0.3, 31_999 / 16_000)
    np.testing.assert_array_equal(short.samples, np.r_[noise(4_800, 1), np.zeros(27_200, np.int16)])
    np.testing.assert_array_equal(almost.samples, np.r_[noise(31_999, 2), np.int16(0)])


def test_silent_clips_are_dropped_one_by_one_if_asked_for_and_do_not_move_the_others(tmp_path):
    loud, faint = noise(32_000, 1), (noise(32_000, 2) // 4_000).astype(np.int16)  # about -5 and -77 dB
    samples = np.concatenate([loud, np.zeros(32_000, np.int16), faint, loud])
    content = tar_of(members_of("a", encoded(samples)))
    expected = {None: [0, 32_000, 64_000, 96_000], -90.0: [0, 64_000, 96_000], -60.0: [0, 96_000]}
    for floor_db, kept in expected.items():
        draft = cut_all(reader_of(tmp_path, content, Keep(min_rms_db=floor_db)), room=1)
        assert starts(draft) == {"a": kept}
        assert draft.counts["skipped: silent clips"] == 4 - len(kept)


def test_captions_are_weighted_by_the_first_pattern_that_is_found(tmp_path):
    captions = ["A dry COUGH", "Music with a cough", "music", "a dog", "", None]
    members = [m for i, c in enumerate(captions) for m in members_of(f"r{i}", encoded(noise(32_000, i)), caption=c)]
    for weights, kept in [
        (("cough=1", "music=0"), "0 1 3 4 5"),
        (("music=0", "cough=1"), "0 3 4 5"),
        (("^a =1", ".=0"), "0 3 4 5"),
        (("=0",), None),
    ]:
        if kept is None:
            with pytest.raises(ValueError, match="is not PATTERN=W"):
                parse_weights(weights)
            continue
        draft = cut_all(reader_of(tmp_path, tar_of(members), Keep(weights=parse_weights(weights))))
        assert list(starts(draft)) == [f"r{i}" for i in kept.split()]
        assert draft.counts["skipped: thinned"] == len(captions) - len(kept.split())


def test_thinning_is_a_draw_of_the_recording_that_every_run_repeats(tmp_path):
    content = tar_of([m for i in range(300) for m in members_of(f"r{i}", encoded(noise(32_000, 1)))])
    kept = {}
    for seed, weight in [(0, 0.3), (0, 0.6), (1, 0.3)]:
        keep = Keep(seed, weights=parse_weights((f"sound={weight}",)))
        runs = [set(starts(cut_all(reader_of(tmp_path, content, keep)))) for _ in range(2)]
        assert runs[0] == runs[1]
        kept[seed, weight] = runs[0]
        assert abs(len(runs[0]) - 300 * weight) < 4 * math.sqrt(300 * weight * (1 - weight))
    assert kept[0, 0.3] < kept[0, 0.6], "a larger weight only adds"
    assert kept[0, 0.3] != kept[1, 0.3]


@pytest.mark.parametrize("text", ["cough", "cough=", "cough=2", "cough=-1", "(=1", "cough=nan", "=0.5"])
def test_a_weight_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match=r"is not PATTERN=W"):
        parse_weights((text,))


# ---- statistics ----


def test_the_statistics_of_a_shard_add_up(tmp_path):
    tone = (32_767 * np.sin(2 * np.pi * 440 * np.arange(32_000) / 16_000)).astype(np.int16)  # -3 dB
    quiet = tone // 100  # -43 dB
    samples = np.concatenate([tone, quiet, quiet, np.zeros(32_000, np.int16)])
    draft = cut_all(reader_of(tmp_path, tar_of(members_of("a", encoded(samples)) + members_of("b", encoded(tone)))))
    statistics = draft.statistics()
    assert (statistics["recordings"], statistics["clips"], statistics["heard_s"]) == (2, 5, 10.0)
    levels = statistics["levels_db"]
    assert (len(levels), sum(levels)) == (16, 5)
    assert (levels[0], levels[-1], levels[(96 - 43) // 6]) == (1, 2, 2), "digital silence stands in the lowest bin"
    assert statistics["tars"] == {"a.tar": 5}
    bands = statistics["bands_db"]
    assert (bands["count"], len(bands["mean"])) == (5, 7)
    assert max(bands["mean"]) == bands["mean"][2] == pytest.approx((2 * -3 + 2 * -43 - 100) / 5, abs=0.2)  # 440 Hz
    assert (statistics["open_tars"], statistics["wanted_tars"]) == (0, 0), "nobody has mixed it"
    assert json.loads(json.dumps(statistics)) == statistics
    assert statistics["clock_s"].keys() == {"reading", "decoding", "cutting"}


def test_a_shard_without_clips_has_statistics_as_well():
    statistics = Draft().statistics()
    assert (statistics["clips"], statistics["bands_db"], sum(statistics["levels_db"])) == (0, None, 0)
