"""Recordings come out of a tar from any offset, grouped by key; damage is reported, never taken for the end."""

import io
import json
import tarfile
from collections.abc import Iterator

import pytest
from lake_tools import members_of, tar_of, write_tar

from hear_distill import tars
from hear_distill.files import UserError
from hear_distill.sources import FolderSource
from hear_distill.tars import Recording, Tar, TarBroken, read_recordings

LONG = "a folder whose name is longer than the hundred bytes that a plain header has room for, " * 2


def read(content: bytes, offset: int = 0, num_bytes: int | None = None) -> Iterator[Recording]:
    """The recordings of a tar with this content, which should have `num_bytes`, from byte `offset` on."""
    return read_recordings(io.BytesIO(content[offset:]), Tar("t.tar", num_bytes or len(content)), offset)


def read_until_broken(content: bytes, num_bytes: int | None = None) -> tuple[list[Recording], bool]:
    """The recordings that were yielded, and whether TarBroken came after them."""
    found = []
    try:
        for recording in read(content, 0, num_bytes):
            found.append(recording)
    except TarBroken:
        return found, True
    return found, False


def pairs(*keys: str) -> list[tuple[str, bytes]]:
    """Audio and metadata of each key, all of different lengths."""
    contents = ((key, bytes([65 + i]) * (700 * i + 100)) for i, key in enumerate(keys))
    return [member for key, audio in contents for member in members_of(key, audio, "mp3", size=len(audio))]


WHOLE = tar_of(pairs("first", "second", "third", "fourth"))
RECORDINGS = list(read(WHOLE))


@pytest.mark.parametrize(
    "content",
    [
        WHOLE,
        tar_of(pairs("короткое имя", LONG + "/a", "b", LONG + "/c", "d"), tarfile.PAX_FORMAT),
        tar_of(pairs("a", LONG + "/b", LONG + "/c", "d"), tarfile.GNU_FORMAT),
    ],
    ids=["ustar", "pax headers", "gnu long names"],
)
def test_reading_from_any_recording_gives_the_rest_of_the_tar(content):
    whole = list(read(content))
    assert [recording.metadata["size"] for recording in whole] == [len(recording.audio) for recording in whole]
    assert len(whole) >= 4
    for i, recording in enumerate(whole):
        assert list(read(content, recording.offset)) == whole[i:]
        assert recording.end == (whole[i + 1].offset if i + 1 < len(whole) else len(content))
    assert list(read(content, len(content))) == []


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ("a.audio.mp3 a.metadata.json", [("a", b"0", 1)]),
        ("a.mp3 a.json a.mp3 a.json", [("a", b"0", 1), ("a", b"2", 3)]),
        ("a.metadata.json a.audio.mp3", [("a", b"1", 0)]),
        ("v1.2/a.b.mp3 v1.2/a.json v1.3/a.json", [("v1.2/a", b"0", 1), ("v1.3/a", b"", 2)]),
        ("a.MP3 a.txt a.JSON", [("a", b"0", 2)]),
        ("a.flac a.json a.wav", [("a", b"2", 1)]),
        ("a.ogg b.opus a.json", [("a", b"0", None), ("b", b"1", None), ("a", b"", 2)]),
        ("a.jpg README readme", [("a", b"", None), ("README", b"", None), ("readme", b"", None)]),
    ],
    ids=[
        "pair",
        "named twice",
        "metadata first",
        "dots in folders",
        "other members",
        "the last audio wins",
        "torn apart",
        "no audio",
    ],
)
def test_members_with_one_key_in_a_row_are_one_recording(names, found):
    members = [(name, str(i).encode()) for i, name in enumerate(names.split())]
    members = [(name, b'{"n": %s}' % text if "json" in name.lower() else text) for name, text in members]
    recordings = list(read(tar_of(members)))
    assert [(r.key, r.audio, r.metadata.get("n")) for r in recordings] == found
    assert [r.problem for r in recordings] == [None if audio else "no audio member" for _, audio, _ in found]


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        (b'{"caption": "a cou', "bad JSON"),
        (b"\xff\xfe", "bad JSON"),
        (b"", "bad JSON"),
        (b"[" * 100_000, "bad JSON"),
        (b'["a list"]', None),
        (b"null", None),
    ],
    ids=["cut short", "not text", "nothing", "nested too deep", "a list", "null"],
)
def test_unusable_metadata_is_a_problem_of_its_own_recording_only(metadata, problem):
    for members in ([("a.mp3", b"A"), ("a.json", metadata)], [("a.json", metadata), ("a.mp3", b"A")]):
        first, second = read(tar_of([*members, *pairs("b")]))
        assert (first.problem, first.metadata) == (problem, {})
        assert (second.key, second.problem) == ("b", None)


def test_an_oversized_member_is_not_read_and_harms_no_other(monkeypatch):
    monkeypatch.setattr(tars, "MAX_MEMBER_BYTES", 1_000)
    content = tar_of([("a.mp3", bytes(1_000)), ("b.mp3", bytes(1_001)), ("b.json", b'{"n": 1}'), ("c.mp3", b"C")])
    assert [(r.key, len(r.audio), r.problem) for r in read(content)] == [
        ("a", 1_000, None),
        ("b", 0, "oversized member"),
        ("c", 1, None),
    ]
    monkeypatch.setattr(tars, "MAX_JSON_BYTES", 7)
    assert [(r.metadata, r.problem) for r in read(content)][1:2] == [({}, "oversized member")]
    content = tar_of([("a.mp3", bytes(1_000)), ("a.json", b'{"n": 1}')])
    assert [r.problem for r in read(content)] == ["oversized member"], "metadata has a limit of its own"


@pytest.mark.parametrize("is_length_known", [True, False], ids=["shorter than listed", "listed as short as it is"])
@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_a_truncated_tar_gives_what_came_before_and_is_broken(is_length_known, shift):
    end_of_members = WHOLE.rindex(b"}") // 512 * 512 + 512
    for cut in range(512 + shift, end_of_members, 512):
        found, is_broken = read_until_broken(WHOLE[:cut], len(WHOLE) if is_length_known else None)
        assert is_broken, f"cut at {cut}"
        assert found == RECORDINGS[: len(found)]
        assert len(found) >= sum(recording.end + 512 <= cut for recording in RECORDINGS)


@pytest.mark.parametrize("filling", [b"\xff", b"\0", b"A"])
def test_a_damaged_header_is_never_the_end(filling):
    with tarfile.open(fileobj=io.BytesIO(WHOLE)) as tar:
        offsets = [member.offset for member in tar]
    for i, offset in enumerate(offsets):
        found, is_broken = read_until_broken(WHOLE[:offset] + filling * 512 + WHOLE[offset + 512 :])
        assert is_broken, f"member {i}"
        assert found == RECORDINGS[: max(0, i - 1) // 2]


@pytest.mark.parametrize("num_blocks", range(1, 22))
def test_no_length_of_a_good_tar_is_taken_for_damage(num_blocks):
    content = tar_of([("a.mp3", b"A"), ("b.mp3", bytes(512 * num_blocks))])
    assert [recording.key for recording in read(content)] == ["a", "b"]


@pytest.mark.parametrize("num_blocks", [2, 3, 128, 2048])
def test_padding_at_the_end_may_have_any_length(num_blocks):
    content = WHOLE.rstrip(b"\0")
    content += bytes(-len(content) % 512 + 512 * num_blocks)
    assert [recording.key for recording in read(content)] == [recording.key for recording in RECORDINGS]


def test_a_tar_whose_rest_was_reserved_but_never_written_is_broken():
    for cut in (RECORDINGS[2].offset, RECORDINGS[2].offset + 600):
        found, is_broken = read_until_broken(WHOLE[:cut] + bytes(3 * 2**20))
        assert is_broken
        assert found[:1] == RECORDINGS[:1]


def test_what_is_no_tar_at_all_is_broken():
    for content in (b"<html>404</html>" * 100, b"\x1f\x8b" + bytes(20_000), b"short"):
        assert read_until_broken(content) == ([], True)


def test_a_tar_of_no_bytes_is_broken():
    with pytest.raises(TarBroken):
        list(read_recordings(io.BytesIO(), Tar("t.tar", 0), 0))


def test_a_tar_without_members_is_whole():
    assert read_until_broken(tar_of([])) == ([], False)


def test_keys_never_become_paths_and_links_are_not_followed(tmp_path, monkeypatch):
    secret = tmp_path / "secret"
    secret.write_bytes(b"not to be read")
    monkeypatch.chdir(tmp_path)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("../../etc/x.mp3", f"{tmp_path}/y.mp3"):
            member = tarfile.TarInfo(name)
            member.size = 1
            tar.addfile(member, io.BytesIO(b"A"))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            member = tarfile.TarInfo(f"type {kind.decode()}.mp3")
            member.type, member.linkname = kind, str(secret)
            tar.addfile(member)
    found = [(r.key, r.audio) for r in read(buffer.getvalue())]
    assert found == [("../../etc/x", b"A"), (f"{tmp_path}/y", b"A"), *((f"type {i}", b"") for i in (2, 1, 6))]
    assert list(tmp_path.iterdir()) == [secret]


def test_names_that_are_not_utf8_stay_apart_and_fit_into_json():
    names = ["\udcff\udcfe.mp3", "\udcff\udcfd.mp3", "gr\udcfc\udcdfe.mp3"]
    keys = [recording.key for recording in read(tar_of([(name, b"A") for name in names]))]
    assert keys == [name.removesuffix(".mp3") for name in names]
    assert json.loads(json.dumps(keys)) == keys


# ---- the folder ----


def test_a_folder_lists_its_tars_and_opens_them_at_any_byte(tmp_path):
    for name in ("b", "a"):
        write_tar(tmp_path / f"{name}.tar", pairs(name, name + name))
    (tmp_path / "notes.txt").write_text("not a tar")
    source = FolderSource(tmp_path)
    assert [tar.name for tar in source.tars] == ["a.tar", "b.tar"]
    tar = source.tars[1]
    with source.open(tar, 0) as stream:
        first, second = read_recordings(stream, tar, 0)
    with source.open(tar, second.offset) as stream:
        assert list(read_recordings(stream, tar, second.offset)) == [second]
    assert (first.key, second.key) == ("b", "bb")


def test_the_revision_tells_when_the_folder_has_changed(tmp_path):
    write_tar(tmp_path / "a.tar", pairs("a"))
    write_tar(tmp_path / "b.tar", pairs("a", "b"))
    revision = FolderSource(tmp_path).revision
    assert FolderSource(tmp_path).revision == revision
    (tmp_path / "b.tar").rename(tmp_path / "c.tar")
    renamed = FolderSource(tmp_path).revision
    write_tar(tmp_path / "c.tar", pairs(*"abcdefghijklmnopqrst"))
    assert len({revision, renamed, FolderSource(tmp_path).revision}) == 3


def test_a_tar_that_went_away_is_broken_but_a_source_that_went_away_stops_the_worker(tmp_path):
    for name in "ab":
        write_tar(tmp_path / f"{name}.tar", pairs(name))
    source = FolderSource(tmp_path)
    (tmp_path / "a.tar").unlink()
    with pytest.raises(TarBroken, match="No such file"):
        source.open(source.tars[0], 0)
    (tmp_path / "b.tar").unlink()
    with pytest.raises(UserError, match="holds none now; is it still mounted"):
        source.open(source.tars[0], 0)


@pytest.mark.parametrize(("folder", "found"), [("missing", "no folder"), ("", "no \\*.tar in")])
def test_a_folder_without_tars_is_refused_with_the_next_command(tmp_path, folder, found):
    with pytest.raises(UserError, match=f"{found}.*expected.*python datalake/run_lake.py demo"):
        FolderSource(tmp_path / folder)
