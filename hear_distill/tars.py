"""A source tar, read from any byte offset, front to back.

in:   a stream of a WebDataset tar (`<key>.audio.mp3` + `<key>.metadata.json`)
out:  Recording(key, offset, end, audio, metadata), in the order of the tar

A recording is the run of members that share a key, which ends at the first dot of the base name, as in WebDataset.
Keys are data and never become paths. Nothing is extracted to disk.
"""

import hashlib
import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from hear_distill.files import MIB

AUDIO_SUFFIXES = ("mp3", "flac", "ogg", "opus", "wav")
MAX_JSON_BYTES = 16 * MIB  # as Python objects it takes ten times as much
MAX_MEMBER_BYTES = 512 * MIB  # a tar header is not to be trusted; two hours of 320 kbit/s MP3 are 275 MiB
READ_BYTES = 128 * 1024  # at a time, from a stream
MAX_PADDING_BYTES = MIB  # zeros that some writers leave behind the end; a download that was never finished has more


class TarBroken(Exception):
    """The rest of a source tar cannot be read. What came before it is good."""


@dataclass(frozen=True)
class Tar:
    """One source tar: its name, relative to the source, and its length."""

    name: str
    num_bytes: int


class Stream(Protocol):
    """Bytes from front to back. A read may give fewer than asked for; none means the end."""

    def read(self, size: int, /) -> bytes: ...


def listing_revision(tars: Iterable[Tar]) -> str:
    """A hash of names and sizes, for sources that have no revisions of their own: it tells when they have changed."""
    listing = "".join(f"{tar.name}\0{tar.num_bytes}\n" for tar in tars)
    return "listing:" + hashlib.sha256(listing.encode(errors="surrogateescape")).hexdigest()[:16]


@dataclass
class Recording:
    """The members of one key. `problem` says in a few words why there is nothing to decode; None if there is."""

    key: str
    offset: int
    """first byte of its first member's header, from the start of the tar"""
    end: int = 0
    """where the next recording begins"""
    audio: bytes = b""
    metadata: dict[str, Any] = field(default_factory=dict)
    problem: str | None = "no audio member"


class _Header(tarfile.TarInfo):
    """tarfile takes a damaged or missing header for the end of the archive. Here only a block of zeros is the end."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as e:
            raise TarBroken(f"damaged header: {e}") from e


def read_recordings(stream: Stream, tar: Tar, offset: int) -> Iterator[Recording]:
    """Yield the recordings from byte `offset` on, which `stream` already stands at.

    Raises TarBroken where the tar ends early or turns into something else; all recordings before that were yielded.
    """
    if 0 < offset >= tar.num_bytes:
        return
    recording: Recording | None = None
    names: set[str] = set()  # of its members
    try:
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Header, bufsize=READ_BYTES) as members:
            for member in members:
                key, suffix = _split_name(member.name)
                begin = offset + member.offset
                # A name that comes again begins another recording: one that nobody counted would be lost.
                if recording is None or key != recording.key or member.name in names:
                    if recording is not None:
                        recording.end = begin
                        yield recording
                    recording, names = Recording(key=key, offset=begin), set()
                names.add(member.name)
                if member.isfile():
                    _add_member(recording, suffix, member, members)
            padding = members.fileobj.read(MAX_PADDING_BYTES + 1)
        if len(padding) > MAX_PADDING_BYTES or padding.strip(b"\0"):
            raise TarBroken(f"no header behind byte {offset + members.offset}, and more than padding follows")
    except (tarfile.TarError, EOFError) as e:
        raise TarBroken(f"unreadable after byte {offset if recording is None else recording.offset}: {e}") from e
    if recording is not None:
        recording.end = tar.num_bytes
        yield recording


def _split_name(name: str) -> tuple[str, str]:
    """'a/b.audio.mp3' -> ('a/b', 'mp3')"""
    folder, slash, base = name.rpartition("/")
    stem, _, extensions = base.partition(".")
    return folder + slash + stem, extensions.rpartition(".")[2].lower()


def _add_member(recording: Recording, suffix: str, member: tarfile.TarInfo, members: tarfile.TarFile) -> None:
    """Read the audio or the metadata of `recording`; members of any other kind are passed over."""
    if suffix not in (*AUDIO_SUFFIXES, "json"):
        return
    if member.size > (MAX_JSON_BYTES if suffix == "json" else MAX_MEMBER_BYTES):
        recording.problem = "oversized member"
        return
    content = members.extractfile(member).read()
    if suffix == "json":
        try:
            metadata = json.loads(content)
        except (ValueError, RecursionError):  # a UnicodeDecodeError is a ValueError
            recording.problem = "bad JSON"
            return
        recording.metadata = metadata if isinstance(metadata, dict) else {}
    else:
        recording.audio = content
        if recording.problem == "no audio member":
            recording.problem = None
