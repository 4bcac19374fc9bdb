"""Who is alive, and who is alone: locks that the kernel drops when their process ends, however it ends.

No clocks, and no process ids that could be reused. Local disks only: flock is not safe on a network file system.
"""

import fcntl
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hear_distill.files import UserError, make_folder


@contextmanager
def alone(lock: Path, refusal: str) -> Iterator[None]:
    """Hold `lock` while the body runs; the kernel drops it if the process dies. Raises UserError(refusal) if held."""
    make_folder(lock.parent)
    with lock.open("w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(refusal) from None
        yield


def is_locked(lock: Path) -> bool:
    """Whether a living process holds `lock`. Looking never keeps anybody from taking it for longer than the look."""
    try:
        with lock.open() as f:
            fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


class Owner:
    """This process, as the ledger knows it: alive exactly as long as it holds the lock on <lake>/owners/<id>.lock."""

    def __init__(self, root: Path, role: str) -> None:
        self.id = f"{role}-{uuid.uuid4().hex[:8]}"
        self.path = root / "owners" / f"{self.id}.lock"
        make_folder(self.path.parent)
        while True:  # until the lock is on it, `sweep` may take the new file for a dead owner's and delete it
            self.file = self.path.open("w")
            fcntl.flock(self.file, fcntl.LOCK_EX)
            if self.path.exists():
                return
            self.file.close()

    def note(self, text: str) -> None:
        """What this process is at, one line of text; whoever finds it dead may read it. A few microseconds.

        It outlives the process, not the machine: after a power cut the file may hold anything.
        """
        os.pwrite(self.file.fileno(), f"{text}\n".encode(), 0)  # one write, and nothing to cut off: never half a note

    def release(self) -> None:
        """Leave in good order. Death has the same effect, later: the kernel drops the lock."""
        self.path.unlink(missing_ok=True)
        self.file.close()
