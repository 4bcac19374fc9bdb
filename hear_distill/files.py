"""Files that are whole or absent, and the named points at which a test may kill the process.

in:   a path and a body that writes to it
out:  the old file or the whole new one, never a part; durable once the call returned
"""

import errno
import json
import os
import shutil
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

GIB = 2**30
MIB = 2**20


class UserError(Exception):
    """Something the user can put right. The message says what was found, what was expected and the next command.

    Every stage prints it as it is, without a traceback, and exits with `exit_code`.
    """

    exit_code = 2


class DiskFull(UserError):
    """There is no room left on a disk. Whoever deletes something need not run the command again: a supervisor does."""

    exit_code = os.EX_CANTCREAT  # 73


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or what led to it, says that a disk is full; torch and SQLite do so in words of their own."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if isinstance(error, sqlite3.OperationalError) and getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_FULL:
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def naming_full_disk() -> Iterator[None]:
    """Raise DiskFull in place of whatever a body raises because a disk is full."""
    try:
        yield
    except (OSError, RuntimeError, sqlite3.Error) as e:
        if not is_disk_full(e):
            raise
        where = f" ({e.filename})" if isinstance(e, OSError) and e.filename else ""
        raise DiskFull(
            f"the disk is full{where}: {e}; delete something, then run the same command again, which goes on where it "
            f"stopped; datalake/run_lake.py does so by itself"
        ) from e


def free_bytes(folder: Path) -> int:
    """Of the disk that holds `folder`, or will once it is made."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


# Each name stands between two durable operations. `HEAR_CRASH_AT=<name>` kills the process there, as a power cut would
# for a single process; tests/test_crash_points.py enumerates this table, so a new point is tested by being named.
CRASH_POINTS = {
    "shard-reserved": "bytes are reserved in the ledger, no file exists yet",
    "shard-written": "the .part files are complete but not fsynced",
    "shard-synced": "the .part files are durable, none renamed",
    "shard-renamed-one": "with a validation part: that one is renamed, the train part is not",
    "shard-renamed": "the parts stand under their final names, the ledger says writing",
    "shard-ready": "the ledger says ready and the cursors have moved",
    "shard-pushed-out": "a shard that was used is retiring to make room for a new one, its file stands",
    "lease-taken": "the ledger says leased, the trainer has read nothing",
    "checkpoint-written": "the new checkpoint is durable under its temporary name",
    "checkpoint-kept-previous": "the last checkpoint also stands under the name previous.pt",
    "checkpoint-renamed": "the new checkpoint is latest.pt, the ledger has not heard of it",
    "checkpoint-numbered": "the new checkpoint also stands under its number, the oldest numbered one is still there",
    "checkpoint-recorded": "the ledger knows the new checkpoint; covered shards are retiring, their files stand",
    "shard-given-back": "a shard that was used is ready again, the trainer that used it goes on",
    "shard-quarantined": "the ledger says quarantined, the file has not moved",
    "shard-unlinked": "the file of a retiring shard is gone, the ledger still says retiring",
    "shard-retired": "the ledger has counted the shard and forgotten it",
}


def crash_point(name: str) -> None:
    """Die here, without clean-up, if the environment asks for it. Costs one dictionary look-up otherwise."""
    assert name in CRASH_POINTS, f"{name} is not in CRASH_POINTS"
    if os.environ.get("HEAR_CRASH_AT") == name:
        os.kill(os.getpid(), signal.SIGKILL)


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` durable: a rename survives a power cut only after this."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folder(folder: Path) -> None:
    """Make `folder`, and its parents, unless they are there. Each new name is durable before anything is put under it.

    A plain mkdir is not: a power cut may take the new folder away with all that was fsynced inside it.
    """
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        fsync_folder(folder.parent)


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open `path` for writing so that readers see the old file or the whole new one, never a part.

    The bytes go to `<path>.tmp`, are fsynced, then renamed over `path`, and the folder is fsynced. If the body raises,
    the temporary file is removed and `path` is left as it was. One writer per path: that is the caller's job.
    """
    make_folder(path.parent)
    tmp = path.with_name(path.name + ".tmp")
    try:
        with tmp.open("wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        tmp.replace(path)
        fsync_folder(path.parent)
    finally:
        tmp.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` whole with `value` as indented JSON. NaN and infinity are refused: other readers choke on them."""
    with atomic_write(path) as f:
        f.write((json.dumps(value, indent=1, allow_nan=False, default=_path_as_text) + "\n").encode())


def _path_as_text(value: Any) -> str:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no place in JSON")


def gib(num_bytes: float) -> str:
    """For messages: '1.25 GiB', or MiB below a tenth of one."""
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / MIB:.1f} MiB"
