"""The shard format, read back with readers that are not ours: tarfile, wave, a byte offset, the webdataset library."""

import dataclasses
import hashlib
import io
import json
import os
import re
import tarfile
import wave

import numpy as np
import pytest
from lake_tools import make_clips

from hear_distill.shards import (
    Clip,
    ShardBroken,
    num_clips_of,
    read_clips,
    read_infos,
    shard_bytes,
    verify_shard,
    write_shard,
)

CLIPS = make_clips(5, 1)


@pytest.fixture
def shard(tmp_path):
    """(path, sha256) of a shard of CLIPS."""
    path = tmp_path / "00000001.tar"
    return path, write_shard(path, CLIPS)


def test_tarfile_and_wave_read_what_was_written(shard):
    with tarfile.open(shard[0]) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    assert list(members) == [name for clip in CLIPS for name in (f"{clip.id}.wav", f"{clip.id}.json")]
    for clip in CLIPS:
        with wave.open(io.BytesIO(members[f"{clip.id}.wav"])) as file:
            assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 16_000)
            assert file.readframes(file.getnframes()) == clip.samples.tobytes()
        info = json.loads(members[f"{clip.id}.json"])
        assert info == {
            **{"id": clip.id, "tar": clip.tar, "key": clip.key, "start": clip.start},
            **{"source_s": clip.source_s, "caption": clip.caption},
        }


def test_the_samples_of_clip_i_begin_at_byte_66560_i_plus_556(shard):
    content = shard[0].read_bytes()
    for i, clip in enumerate(CLIPS):
        assert content[66_560 * i + 556 :][:64_000] == clip.samples.tobytes()
        assert not any(content[66_560 * i + 64_556 :][:468]), "the rest of the last block is zeros in any tar"
    assert len(content) == shard_bytes(len(CLIPS)) == 5 * 66_560 + 1_024
    assert not any(content[5 * 66_560 :])


# the library leaves files to the collector
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_webdataset_library_reads_it(shard):
    webdataset = pytest.importorskip("webdataset")
    samples = list(webdataset.WebDataset(str(shard[0]), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [clip.id for clip in CLIPS]
    assert [sample["wav"][44:] for sample in samples] == [clip.samples.tobytes() for clip in CLIPS]
    assert [json.loads(sample["json"])["start"] for sample in samples] == [clip.start for clip in CLIPS]


def test_the_returned_hash_is_that_of_the_file(shard):
    assert shard[1] == hashlib.sha256(shard[0].read_bytes()).hexdigest()


def test_the_same_clips_make_the_same_bytes(shard, tmp_path):
    assert write_shard(tmp_path / "again.tar", make_clips(5, 1)) == shard[1]
    assert write_shard(tmp_path / "other.tar", CLIPS[::-1]) != shard[1]


def test_nothing_in_a_header_tells_when_where_or_by_whom(shard):
    with tarfile.open(shard[0]) as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar} == {(0, 0, 0, "", "", 0o644)}


@pytest.mark.parametrize(
    "caption",
    [
        *("", "plain", "x" * 5_000, '"\\' * 900, "\x00\x1b\n" * 700, "咳嗽声" * 800, "😷🤧" * 500),
        *("\ud83d" * 700, "é\udcff" * 600, "a" * 850 + "😷" * 30),
    ],
    ids=["empty", "plain", "long", "escapes", "control", "Chinese", "emoji", "lone surrogates", "bytes", "at the edge"],
)
def test_any_caption_fits_and_stays_valid_json(tmp_path, caption):
    write_shard(tmp_path / "s.tar", [dataclasses.replace(CLIPS[0], caption=caption)])
    content = (tmp_path / "s.tar").read_bytes()[66_560 - 1_024 : 66_560]
    info = json.loads(content.decode("ascii"))
    assert caption.startswith(info["caption"])
    assert len(content.rstrip()) > 1_024 - 12 or info["caption"] == caption, "cut shorter than needed"
    assert (info["tar"], info["key"], info["start"]) == (CLIPS[0].tar, CLIPS[0].key, CLIPS[0].start)


def test_a_key_that_does_not_fit_is_cut_after_the_caption_and_the_id_never(tmp_path):
    clip = dataclasses.replace(CLIPS[1], key="ключ" * 2_000, tar="t" * 3_000, caption="gone")
    write_shard(tmp_path / "s.tar", [clip])
    (info,) = read_infos(tmp_path / "s.tar")
    assert (info.id, info.start, info.caption) == (clip.id, clip.start, "")
    assert clip.key.startswith(info.key)
    assert clip.tar.startswith(info.tar)
    assert len(info.tar) > 500


def test_clip_ids_are_safe_names_and_differ_by_tar_key_and_start():
    names = [("a", "b/c"), ("a", "b/d"), ("ab", "/c"), ("a\0b", "c"), ("..", "../../etc/passwd"), ("a", "\udcff")]
    clips = [Clip(tar, key, start, 2.0, "", CLIPS[0].samples) for tar, key in names for start in (0, 32_000)]
    assert len({clip.id for clip in clips} | {clip.id for clip in CLIPS}) == len(clips) + len(CLIPS)
    assert all(re.fullmatch(r"[0-9a-f]{16}-\d+", clip.id) for clip in clips)


def test_infos_come_back_in_order(shard):
    assert [(info.id, info.start, info.caption) for info in read_infos(shard[0])] == [
        (clip.id, clip.start, clip.caption) for clip in CLIPS
    ]


@pytest.mark.parametrize("indices", [[3], [4, 0, 2], [], range(5)])
def test_clips_are_read_into_place_in_the_asked_order(shard, indices):
    out = np.full((len(indices), 32_000), -7, np.int16)
    with shard[0].open("rb") as f:
        read_clips(f.fileno(), indices, out)
    np.testing.assert_array_equal(out, np.array([CLIPS[i].samples for i in indices]).reshape(-1, 32_000))


def test_a_shard_that_ends_inside_a_clip_is_not_read_as_if_it_were_whole(shard):
    os.truncate(shard[0], 2 * 66_560 + 30_000)
    with shard[0].open("rb") as f, pytest.raises(ShardBroken, match="inside clip 2"):
        read_clips(f.fileno(), [1, 2], np.empty((2, 32_000), np.int16))


def test_a_whole_shard_is_accepted(shard):
    verify_shard(shard[0], 5, shard[1])


@pytest.mark.parametrize("position", [0, 556, 3 * 66_560 + 30_000, 5 * 66_560 - 1, 5 * 66_560 + 1_023])
def test_one_flipped_bit_is_found(shard, position):
    content = bytearray(shard[0].read_bytes())
    content[position] ^= 1
    shard[0].write_bytes(content)
    with pytest.raises(ShardBroken, match="sha256"):
        verify_shard(shard[0], 5, shard[1])


@pytest.mark.parametrize("num_bytes", [0, 5 * 66_560 + 1_023, 5 * 66_560 + 1_025, 4 * 66_560 + 1_024])
def test_another_length_is_found(shard, num_bytes):
    os.truncate(shard[0], num_bytes)
    with pytest.raises(ShardBroken, match=f"{num_bytes} bytes; expected 333824 for 5 clips"):
        verify_shard(shard[0], 5, shard[1])


def test_a_missing_shard_is_found(shard):
    shard[0].unlink()
    with pytest.raises(ShardBroken, match="missing"):
        verify_shard(shard[0], 5, shard[1])


def test_the_number_of_clips_follows_from_the_length_or_is_refused():
    assert [num_clips_of(shard_bytes(n)) for n in (1, 2, 1_000)] == [1, 2, 1_000]
    for num_bytes in (0, 1_024, 66_560, shard_bytes(3) - 1, shard_bytes(3) + 512):
        with pytest.raises(ShardBroken, match="expected a multiple of 66560"):
            num_clips_of(num_bytes)
