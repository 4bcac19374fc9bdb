"""A stream over a network that drops gives the bytes of the tar, each once, or says why it cannot."""

import re
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from lake_tools import encoded, members_of, noise, tar_of

from hear_distill import remote
from hear_distill.files import UserError
from hear_distill.remote import Dropped, RemoteStream, Unreachable, UrlSource, patiently
from hear_distill.runlog import Stopped
from hear_distill.sources import find_source
from hear_distill.tars import TarBroken, read_recordings

CONTENT = noise(500_000, 1).tobytes()  # a million bytes


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Failures are followed by another attempt at once."""
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.0)


class Network:
    """Connections that end as scripted: after some bytes, by an exception or as if the tar were over."""

    def __init__(self, *script: tuple[int, Exception | None]) -> None:
        self.script = list(script)
        self.asked: list[int] = []
        self.num_sent = 0

    def connect(self, offset: int) -> Generator[bytes, None, None]:
        self.asked.append(offset)
        num_bytes, error = self.script.pop(0) if self.script else (len(CONTENT), None)
        for i in range(offset, min(offset + num_bytes, len(CONTENT)), 10_000):
            chunk = CONTENT[i : min(i + 10_000, offset + num_bytes)]
            self.num_sent += len(chunk)
            yield chunk
        if error:
            raise error


def read_all(stream: RemoteStream, size: int = 64_000) -> bytes:
    with closing(stream):
        return b"".join(iter(lambda: stream.read(size), b""))


def stream_of(network: Network, offset: int = 0, end: int = len(CONTENT), look=lambda: None) -> RemoteStream:
    return RemoteStream("a.tar", network.connect, offset, end, look)


def fetchers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("fetch")]


@pytest.mark.parametrize("size", [1_000, 64_000, 2_000_000])
@pytest.mark.parametrize("offset", [0, 1, 512_345, len(CONTENT)])
def test_a_whole_connection_is_one_request_for_the_rest(offset, size):
    network = Network()
    assert read_all(stream_of(network, offset), size) == CONTENT[offset:]
    assert network.asked == ([offset] if offset < len(CONTENT) else [])


def test_each_connection_begins_at_the_byte_where_the_last_one_ended(capfd):
    network = Network((0, Dropped("reset")), (123_456, Dropped("reset")), (1, None), (300_000, Dropped("503")))
    assert read_all(stream_of(network, 1_000)) == CONTENT[1_000:]
    assert network.asked == [1_000, 1_000, 124_456, 124_457, 424_457]
    assert network.num_sent == len(CONTENT) - 1_000, "nothing is fetched twice"
    warnings = capfd.readouterr().err
    assert "the connection ended 875543 bytes early" in warnings
    assert warnings.count("trying again") == 4


def test_failures_in_a_row_end_it_with_the_last_error_and_progress_forgives_them():
    forgiven = [(0, Dropped("early"))] * (remote.MAX_FAILURES - 2) + [(10, Dropped("late"))]
    assert read_all(stream_of(Network(*forgiven, *forgiven))) == CONTENT
    stream = stream_of(Network((5_000, None), *[(0, Dropped(f"number {i}")) for i in range(50)]))
    assert stream.read(64_000) == CONTENT[:5_000], "what came before is good"
    for _ in range(2):
        with pytest.raises(
            Unreachable, match=f"{remote.MAX_FAILURES} attempts in a row.*number 10.*same command again"
        ):
            stream.read(64_000)
    assert Unreachable.exit_code == 75


@pytest.mark.parametrize("error", [TarBroken("404"), UserError("accept the terms"), RuntimeError("a bug")])
def test_what_is_not_a_dropped_connection_is_raised_where_the_bytes_are_read(error):
    stream = stream_of(Network((20_000, error)))
    assert stream.read(10_000) + stream.read(10_000) == CONTENT[:20_000]
    with pytest.raises(type(error), match=str(error)):
        stream.read(1)


def test_a_tar_longer_than_it_was_listed_is_broken():
    stream = stream_of(Network(), end=55_000)
    with pytest.raises(TarBroken, match="longer than the 55000 bytes"):
        read_all(stream)


def test_no_more_is_fetched_ahead_than_the_limit(monkeypatch):
    monkeypatch.setattr(remote, "AHEAD_BYTES", 5 * remote.CHUNK_BYTES)
    network = Network()
    stream = stream_of(network)
    stream.read(1)
    time.sleep(0.3)
    assert network.num_sent == (1 + 5 + 1) * 10_000, "the one in hand, five in the queue, one about to enter it"
    assert read_all(stream) == CONTENT[1:]


def test_a_reader_that_waits_looks_up_and_may_leave():
    is_released = threading.Event()

    def stalled(offset: int) -> Iterator[bytes]:
        is_released.wait(10)
        yield CONTENT[offset:]

    looks = []

    def look() -> None:
        looks.append(time.monotonic())
        if len(looks) == 3:
            raise Stopped

    stream = RemoteStream("a.tar", stalled, 0, len(CONTENT), look)
    with pytest.raises(Stopped):
        stream.read(1)
    is_released.set()
    assert read_all(stream) == CONTENT, "and may come back"


def test_a_closed_stream_ends_its_connection_and_its_thread():
    before = len(fetchers())
    is_over = threading.Event()

    def endless(offset: int) -> Generator[bytes, None, None]:
        try:
            while True:
                yield bytes(100)
        finally:
            is_over.set()

    stream = RemoteStream("a.tar", endless, 0, 2**60, lambda: None)
    stream.read(10)
    assert len(fetchers()) == before + 1
    stream.close()
    assert is_over.wait(5)
    for thread in fetchers():
        thread.join(5)
    assert len(fetchers()) == before


def test_a_stream_closed_while_it_waits_to_try_again_does_not_wait_on(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 60.0)
    stream = stream_of(Network(*[(0, Dropped("refused"))] * 20))
    time.sleep(0.1)
    stream.close()
    for thread in fetchers():
        thread.join(5)
        assert not thread.is_alive()


def test_waits_double_up_to_a_limit_and_never_undercut_what_the_server_asks(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 1.0)
    for failures, longest in [(1, 1.0), (2, 2.0), (5, 16.0), (11, 120.0)]:
        waits = [remote.wait_s(failures, 0) for _ in range(200)]
        assert longest / 2 <= min(waits) < 0.6 * longest < 0.9 * longest < max(waits) <= longest
    asked = [remote.wait_s(3, 30) for _ in range(200)]
    assert min(asked) >= 30 and max(asked) <= 31 and max(asked) - min(asked) > 0.5, "with jitter of their own"


def test_a_question_is_asked_again_until_it_is_answered_or_too_often():
    answers = iter([Dropped("503"), Dropped("429", wait_s=7), "yes"])
    waits = []

    def attempt() -> str:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert patiently("hub", attempt, waits.append) == "yes"
    assert waits == [0.0, 7.0]
    answers = iter([Dropped("down")] * 50)
    with pytest.raises(Unreachable, match="down"):
        patiently("hub", attempt, waits.append)
    assert len(waits) == 2 + remote.MAX_FAILURES - 1


# ---- fsspec ----


@pytest.fixture(params=["file", "memory"])
def url(request, tmp_path) -> Iterator[str]:
    """Two tars, in folders, behind an fsspec URL."""
    url = f"file://{tmp_path}/source" if request.param == "file" else f"memory://{tmp_path.name}"
    for name in ("b.tar", "deeper/a.tar", "notes.txt"):
        content = tar_of(members_of(name[0], encoded(noise(40_000, ord(name[0])))))
        with fsspec.open(f"{url}/{name}", "wb", auto_mkdir=True) as file:
            file.write(content)
    yield url
    if request.param == "memory":
        fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)


def test_an_fsspec_url_lists_its_tars_and_reads_them_from_any_byte(url):
    source = UrlSource(url)
    assert [tar.name for tar in source.tars] == ["b.tar", "deeper/a.tar"]
    for tar, key in zip(source.tars, "bd", strict=True):
        with source.open(tar, 0, lambda: None) as stream:
            (recording,) = read_recordings(stream, tar, 0)
        assert recording.key == key and len(recording.audio) == 80_044
        with source.open(tar, 700, lambda: None) as stream:
            rest = b"".join(iter(lambda: stream.read(1_000), b""))
        with fsspec.open(f"{url}/{tar.name}") as file:
            assert rest == file.read()[700:]
    assert UrlSource(url).revision == source.revision
    with fsspec.open(f"{url}/c.tar", "wb") as file:
        file.write(b"more")
    assert UrlSource(url).revision != source.revision


def test_a_tar_that_has_gone_from_its_url_is_broken(url):
    source = UrlSource(url)
    files, root = fsspec.core.url_to_fs(url)
    files.rm(f"{root}/b.tar")
    with source.open(source.tars[0], 0, lambda: None) as stream, pytest.raises(TarBroken, match="no longer there"):
        stream.read(1)


class Moody(MemoryFileSystem):
    """Like the drivers that talk HTTP: no lengths in a listing, and errors of their library's own."""

    class ConnectionLost(Exception):
        pass

    protocol = "moody"
    moods: ClassVar[list[str]] = []

    def find(self, *args, **kwargs):
        if "listing" in self.moods:
            raise self.ConnectionLost("no listing")
        return {name: {**info, "size": None} for name, info in super().find(*args, **kwargs).items()}

    def size(self, path):
        return None if "length" in self.moods else super().size(path)

    def _open(self, *args, **kwargs):
        if self.moods:
            raise self.ConnectionLost(self.moods.pop())
        return super()._open(*args, **kwargs)


def test_a_driver_with_errors_of_its_own_is_tried_again_or_told_in_words(monkeypatch, tmp_path):
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.001)
    fsspec.register_implementation("moody", Moody, clobber=True)
    content = tar_of(members_of("a", encoded(noise(40_000, 1))))
    with fsspec.open(f"moody://{tmp_path.name}/a.tar", "wb", auto_mkdir=True) as file:
        file.write(content)
    source = UrlSource(f"moody://{tmp_path.name}")
    assert [tar.num_bytes for tar in source.tars] == [len(content)]
    Moody.moods += ["reset", "503"]
    with source.open(source.tars[0], 0, lambda: None) as stream:
        assert b"".join(iter(lambda: stream.read(10_000), b"")) == content
    assert Moody.moods == []
    for mood, said in [("listing", "cannot be listed: ConnectionLost"), ("length", "does not tell the length")]:
        Moody.moods[:] = [mood]
        with pytest.raises(UserError, match=said):
            UrlSource(f"moody://{tmp_path.name}")
    Moody.moods.clear()


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("gibberish://bucket/folder", "Protocol not known: gibberish"),
        ("s3://bucket/folder", "s3fs"),
        ("memory://there-is-nothing-here", "no *.tar below"),
    ],
)
def test_a_url_that_gives_no_tars_is_refused_with_what_is_missing(url, found):
    with pytest.raises(UserError, match=re.escape(found)):
        UrlSource(url)


def test_a_url_is_a_source_of_the_streamer(url):
    assert [tar.name for tar in find_source(url).tars] == ["b.tar", "deeper/a.tar"]
