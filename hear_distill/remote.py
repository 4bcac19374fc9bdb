"""Tars behind a network that drops: read ahead in a thread, reconnect at the byte, wait longer after each failure.

in:   connect(offset), which yields the bytes of one connection; or an fsspec URL
out:  a stream that ends where the tar does; at most AHEAD_BYTES of it are fetched and not yet read

A connection that ends early, stalls or is refused for now is followed by another from the very byte where it ended. So
one tar is one sequential request as long as nothing goes wrong.
"""

import os
import queue
import random
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, closing
from typing import Any, TypeVar

import fsspec

from hear_distill.files import MIB, UserError
from hear_distill.tars import Stream, Tar, TarBroken, listing_revision

T = TypeVar("T")
AHEAD_BYTES = 4 * MIB  # a second or two of decoding; eight open tars hold 32 MiB
CHUNK_BYTES = 64 * 1024  # the most that a connection yields at once
LOOK_S = 0.05  # how late a waiting reader notices that it should stop
MAX_FAILURES = 12  # in a row, about seven minutes: then the worker leaves, and its supervisor tries again later
FIRST_WAIT_S, MAX_WAIT_S = 1.0, 120.0
LONGEST_WAIT_S = 3600.0  # that a server may ask for


class Dropped(Exception):
    """This attempt failed, another may succeed. `wait_s` is how long the server asks us to wait, 0 if it does not."""

    def __init__(self, message: str, wait_s: float = 0.0) -> None:
        super().__init__(message)
        self.wait_s = wait_s


class Unreachable(UserError):
    """The source failed many times in a row. Nothing is wrong with the command: later it may work."""

    exit_code = os.EX_TEMPFAIL  # 75


Connect = Callable[[int], Generator[bytes, None, None]]
"""From a byte offset to the bytes of one connection; raises Dropped, TarBroken or UserError"""


def wait_s(num_failures: int, asked_s: float) -> float:
    """Pause before the next attempt: what the server asks for, or twice as long after each failure; with jitter.

    Jitter on both: workers that were refused together must not come back together.
    """
    own = min(MAX_WAIT_S, FIRST_WAIT_S * 2 ** (num_failures - 1))
    return asked_s + random.uniform(0, FIRST_WAIT_S) if asked_s else own * random.uniform(0.5, 1.0)


def give_up_if_hopeless(name: str, num_failures: int, error: Dropped) -> None:
    """Raise Unreachable after the last attempt, or if the server asks for a wait that nobody should sit through."""
    if num_failures >= MAX_FAILURES or error.wait_s > LONGEST_WAIT_S:
        asked = f", and asks us to wait for {error.wait_s:.0f} s" if error.wait_s else ""
        raise Unreachable(
            f"{name}: {num_failures} attempts in a row failed, the last with: {error}{asked}; "
            f"look at the network, then run the same command again, which goes on where it stopped"
        ) from error


def patiently(name: str, attempt: Callable[[], T], pause: Callable[[float], Any]) -> T:
    """What `attempt` returns, tried again with `pause(seconds)` between while it raises Dropped. Raises Unreachable."""
    num_failures = 0
    while True:
        try:
            return attempt()
        except Dropped as e:
            num_failures += 1
            give_up_if_hopeless(name, num_failures, e)
            pause(warn(name, num_failures, e))


def warn(name: str, num_failures: int, error: Dropped) -> float:
    """Tell what failed and when it is tried again; returns that wait in seconds."""
    seconds = wait_s(num_failures, error.wait_s)
    counted = f"failure {num_failures} in a row, {MAX_FAILURES} end it"
    print(f"WARNING: {name}: {error}; trying again in {seconds:.0f} s ({counted})", file=sys.stderr)
    return seconds


class RemoteStream:
    """Bytes `offset` to `end` of one tar, over as many connections as it takes."""

    def __init__(self, name: str, connect: Connect, offset: int, end: int, look: Callable[[], None]) -> None:
        self.name, self.connect, self.look = name, connect, look
        self.position, self.end = offset, end
        self.num_failures = 0
        self.rest = b""
        self.is_closed = threading.Event()
        self.chunks: queue.Queue[bytes | Exception] = queue.Queue(AHEAD_BYTES // CHUNK_BYTES)
        threading.Thread(target=self._run, daemon=True, name=f"fetch {name}").start()

    def read(self, size: int) -> bytes:
        """The next bytes, `size` at most; none at the end. Raises what the fetching thread or `look` raised."""
        while not self.rest:
            try:
                chunk = self.chunks.get(timeout=LOOK_S)
            except queue.Empty:
                self.look()
                continue
            if isinstance(chunk, Exception):
                self._put(chunk)  # it will be raised again, should somebody ask again
                raise chunk
            if not chunk:
                self._put(chunk)
                return b""
            self.rest = chunk
        out, self.rest = self.rest[:size], self.rest[size:]
        return out

    def close(self) -> None:
        """End the connection; its thread notices at its next chunk or time-out, and nobody waits for it."""
        self.is_closed.set()

    def _run(self) -> None:
        """The thread: all bytes, then b"" as the end, or the exception that ended it."""
        try:
            while self.position < self.end and not self.is_closed.is_set():
                self._fetch()
            self._put(b"")
        except Exception as e:  # not hidden: it is raised where the bytes are read
            self._put(e)

    def _fetch(self) -> None:
        """One connection, and the wait after it if it failed."""
        try:
            with closing(self.connect(self.position)) as chunks:
                for chunk in chunks:
                    self.position += len(chunk)
                    if self.position > self.end:
                        raise TarBroken(f"is longer than the {self.end} bytes that were listed")
                    if not self._put(chunk):
                        return
                    self.num_failures = 0
            if self.position < self.end:
                raise Dropped(f"the connection ended {self.end - self.position} bytes early")
        except Dropped as e:
            self.num_failures += 1
            give_up_if_hopeless(self.name, self.num_failures, e)
            self.is_closed.wait(warn(self.name, self.num_failures, e))

    def _put(self, chunk: bytes | Exception) -> bool:
        """Hand a chunk over, waiting while enough is fetched ahead. False once nobody wants it any more."""
        while not self.is_closed.is_set():
            try:
                self.chunks.put(chunk, timeout=LOOK_S)
                return True
            except queue.Full:
                continue
        return False


class UrlSource:
    """Tars below an fsspec URL, such as s3://bucket/folder: whatever fsspec has a driver for."""

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            self.files, self.root = fsspec.core.url_to_fs(url)
            found = self.files.find(self.root, detail=True)
        except (ImportError, ValueError) as e:
            raise UserError(f"{url} cannot be opened: {e}; install that driver, or give another --source") from e
        except Exception as e:  # a driver raises what its library does: they have no class in common
            raise UserError(
                f"{url} cannot be listed: {type(e).__name__}: {e}; look at the address and your access to it"
            ) from e
        root = self.root.rstrip("/") + "/"
        infos = {path.removeprefix(root): info for path, info in found.items() if path.endswith(".tar")}
        self.tars = [Tar(name, self._size(infos[name])) for name in sorted(infos)]
        if not self.tars:
            raise UserError(f"no *.tar below {url}; expected tars of <key>.audio.mp3 and <key>.metadata.json")
        self.revision = listing_revision(self.tars)

    def _size(self, info: dict[str, Any]) -> int:
        """Length in bytes; a listing over HTTP does not tell it."""
        size = info["size"] if info["size"] is not None else self.files.size(info["name"])
        if size is None:
            raise UserError(f"{self.url} does not tell the length of {info['name']}; copy the tars to a folder")
        return size

    def open(self, tar: Tar, offset: int, look: Callable[[], None]) -> AbstractContextManager[Stream]:
        """As in Source."""
        return closing(RemoteStream(tar.name, lambda at: self._connect(tar, at), offset, tar.num_bytes, look))

    def _connect(self, tar: Tar, offset: int) -> Generator[bytes, None, None]:
        try:
            with self.files.open(f"{self.root.rstrip('/')}/{tar.name}", "rb", block_size=AHEAD_BYTES) as file:
                file.seek(offset)
                while chunk := file.read(CHUNK_BYTES):
                    yield chunk
        except FileNotFoundError as e:
            raise TarBroken("is no longer there") from e
        except PermissionError as e:
            raise UserError(f"{self.url}: access to {tar.name} is refused ({e}); look at your credentials") from e
        except Exception as e:  # see above; a mistake of ours is told as well, after the last attempt
            raise Dropped(f"{type(e).__name__}: {e}") from e
