"""Folders as repositories of the hub in hub_server.py: their revisions, what a listing says, spans of their files."""

import hashlib
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

CHUNK_BYTES = 64 * 1024
RANGE = re.compile(r"bytes=(\d*)-(\d*)")


@dataclass(frozen=True)
class File:
    num_bytes: int
    sha256: str
    modified_ns: int


class Repo:
    """A folder and every listing that it was seen with, by the sha of that listing.

    What lies below `refs/` is not in main: `refs/convert/parquet` is the branch of that name, as the hub makes one of
    a dataset that is not Parquet. Its paths keep that prefix here, which they do not have on the hub.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ValueError(f"no folder {folder} to make a repository of")
        self.folder = folder
        self.listings: dict[str, dict[str, File]] = {}
        self._digests: dict[tuple[str, int, int], str] = {}
        self._lock = threading.Lock()
        self.main()

    def main(self) -> str:
        """The sha of the folder as it is now."""
        return self._sha_of([path for path in self.folder.rglob("*") if not path.is_relative_to(self.folder / "refs")])

    def commit_of(self, revision: str) -> str:
        """The sha of a branch, as it is now; any other revision is taken for a sha."""
        if revision == "main":
            return self.main()
        is_branch = revision.startswith("refs/") and (self.folder / revision).is_dir()
        return self._sha_of(list((self.folder / revision).rglob("*"))) if is_branch else revision

    def _sha_of(self, paths: list[Path]) -> str:
        with self._lock:
            files = sorted(path for path in paths if path.is_file())
            listing = {path.relative_to(self.folder).as_posix(): self._look(path) for path in files}
            text = "".join(f"{name}\0{file.num_bytes}\0{file.sha256}\n" for name, file in listing.items())
            sha = hashlib.sha1(text.encode()).hexdigest()
            self.listings.setdefault(sha, listing)
            return sha

    def _look(self, path: Path) -> File:
        stat = path.stat()
        key = (str(path), stat.st_size, stat.st_mtime_ns)
        if key not in self._digests:
            with path.open("rb") as stream:
                self._digests[key] = hashlib.file_digest(stream, "sha256").hexdigest()
        return File(stat.st_size, self._digests[key], stat.st_mtime_ns)


def read_span(path: Path, span: range) -> Iterator[bytes]:
    """The bytes of a file in chunks. It is open during each read only: who stops early leaves nothing open."""
    for start in range(span.start, span.stop, CHUNK_BYTES):
        with path.open("rb") as stream:
            stream.seek(start)
            chunk = stream.read(min(CHUNK_BYTES, span.stop - start))
        yield chunk


def span_of(header: str | None, num_bytes: int) -> range | None:
    """The bytes that a Range header asks for: empty where the file has none of them, None where it is to be ignored."""
    match = RANGE.fullmatch(header or "")
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:
        return range(max(0, num_bytes - int(last)), num_bytes)
    if last and int(last) < int(first):
        return None
    return range(int(first), min(num_bytes, int(last) + 1) if last else num_bytes)


def rows_of(listing: Mapping[str, File]) -> dict[str, dict]:
    """What tree and paths-info tell of each file and of each folder on the way to it, by path, in order."""
    rows = {}
    for path, file in listing.items():
        lfs = {"oid": file.sha256, "size": file.num_bytes, "pointerSize": 134}
        rows[path] = {"type": "file", "path": path, "size": file.num_bytes, "oid": file.sha256[:40], "lfs": lfs}
        for parent in list(Path(path).parents)[:-1]:
            oid = hashlib.sha1(str(parent).encode()).hexdigest()
            rows[str(parent)] = {"type": "directory", "path": str(parent), "size": 0, "oid": oid}
    return dict(sorted(rows.items()))
