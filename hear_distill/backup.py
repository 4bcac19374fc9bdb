"""The copy of a ledger, of every hour and of the end, and whether a ledger is whole.

in:   <lake>/ledger.sqlite
out:  <lake>/ledger.backup.sqlite, whole or the one before
"""

import os
import sqlite3
import sys
import time
from contextlib import closing
from pathlib import Path

from hear_distill.files import UserError, fsync_folder

LEDGER = "ledger.sqlite"
BACKUP = "ledger.backup.sqlite"
EVERY_S = 3600.0
RETRY_S = 300.0  # on a full disk


class Backups:
    """Makes one at once, then every hour, and one of the end."""

    def __init__(self, root: Path) -> None:
        self.root, self.next = root, 0.0

    def look(self) -> None:
        """Called every turn of the supervisor. Raises UserError if the ledger is damaged: nothing good comes then."""
        if time.monotonic() < self.next:
            return
        self.next = time.monotonic() + EVERY_S
        try:
            back_up(self.root)
        except sqlite3.OperationalError as e:
            if "full" not in str(e):
                raise
            print(f"WARNING: the disk is full, the ledger of {self.root} is not backed up", file=sys.stderr)
            self.next = time.monotonic() + RETRY_S

    def close(self) -> None:
        """When all children have left in good order: nothing is lost with a ledger that is lost until the next run."""
        self.next = 0.0
        self.look()


def back_up(root: Path) -> None:
    """Copy the ledger to <lake>/ledger.backup.sqlite, whole or not at all, while others write to it.

    Raises UserError, and keeps the backup there is, if the ledger is damaged.
    """
    tmp = root / (BACKUP + ".tmp")
    tmp.unlink(missing_ok=True)
    with closing(sqlite3.connect(root / LEDGER)) as source, closing(sqlite3.connect(tmp)) as target:
        source.backup(target)
    if damage := damage_of(tmp):
        tmp.unlink()
        raise UserError(
            f"{root / LEDGER} is {damage}; its backup is whole: python datalake/run_lake.py fsck --repair --lake {root}"
        )
    with tmp.open("rb") as f:
        os.fsync(f.fileno())
    tmp.replace(root / BACKUP)
    fsync_folder(root)


def damage_of(path: Path) -> str | None:
    """What is wrong with a ledger: None if it is whole, 'lost', or what SQLite says."""
    if not path.exists():
        return "lost"
    try:
        with closing(sqlite3.connect(path)) as db:
            (answer,) = db.execute("PRAGMA integrity_check(1)").fetchone()
            tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    except sqlite3.DatabaseError as e:
        return f"damaged: {e}"
    if answer != "ok":
        return f"damaged: {' '.join(answer.split())}"
    return None if {"settings", "tars", "shards", "totals"} <= tables else "lost: the file holds no lake"
