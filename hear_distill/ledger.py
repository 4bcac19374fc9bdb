"""What a ledger says: a connection to it, and every question that changes nothing.

in:   <lake>/ledger.sqlite, and for `disagreements` the folders beside it
out:  counts, settings, the books; hear_distill/lake.py is what changes them
"""

import json
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from hear_distill.files import UserError
from hear_distill.locks import is_locked
from hear_distill.schema import SCHEMA_VERSION, SUMS_OF_SHARDS, TRAIN, Books, Shard

LOCK_WAIT_S = 60.0
SPARE = "split = 'train' AND state = 'ready'"  # of `num_spare_bytes`
REPAIR = "python datalake/run_lake.py fsck --repair --lake"


class Ledger:
    """One connection to a ledger. Open it in the process that uses it: no connection may cross a fork."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.db = sqlite3.connect(root / "ledger.sqlite", timeout=LOCK_WAIT_S, isolation_level=None)
        self.db.row_factory = sqlite3.Row
        self.db.execute("PRAGMA journal_mode = WAL")
        self.db.execute("PRAGMA synchronous = FULL")

    @classmethod
    def open(cls, root: Path) -> Self:
        """An existing lake. Raises UserError if there is none."""
        lake = cls.find(root)
        if lake is None:
            cls.refuse_orphans(root)
            raise UserError(f"no lake at {root}; to make one: python datalake/run_lake.py --source DIR --lake {root}")
        return lake

    @classmethod
    def find(cls, root: Path) -> Self | None:
        """The lake at `root`, or None if there is none yet. Raises UserError if the file is no ledger of this code."""
        try:
            lake = cls(root) if (root / "ledger.sqlite").exists() else None
        except sqlite3.OperationalError:  # the disk, or a lock
            raise
        except sqlite3.DatabaseError as e:
            raise UserError(f"the ledger of {root} is damaged ({e}); to make it again: {REPAIR} {root}") from e
        if lake is None or not lake.db.execute("SELECT 1 FROM sqlite_master WHERE name = 'totals'").fetchone():
            return None
        (version,) = lake.db.execute("PRAGMA user_version").fetchone()
        if version != SCHEMA_VERSION:
            raise UserError(
                f"the ledger of {root} has version {version}, expected {SCHEMA_VERSION}: other code than this "
                f"made it; go on with that one, choose another --lake or, if nothing was trained from it yet, delete it"
            )
        return lake

    @staticmethod
    def refuse_orphans(root: Path) -> None:
        """Raise UserError if there are shards without a ledger: a new one would write over them, beyond the cap."""
        if any((root / "shards").glob("*.tar")) or any((root / "val").glob("*.tar")):
            raise UserError(f"{root} has shards, but its ledger is lost; to make it again: {REPAIR} {root}")

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing, and alone: the write lock is taken at the start, so what was read stays true."""
        self.db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.db.execute("COMMIT")
        except BaseException:
            if self.db.in_transaction:  # SQLite rolls back by itself where the disk is full
                self.db.execute("ROLLBACK")
            raise

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """What is read within belongs together. It waits for no writer, and none waits for it."""
        self.db.execute("BEGIN")
        try:
            yield
        finally:
            if self.db.in_transaction:
                self.db.execute("ROLLBACK")

    def close(self) -> None:
        """Close the connection; the ledger stays."""
        self.db.close()

    def path(self, shard_id: int, split: str, suffix: str = ".tar") -> Path:
        """Where a part stands: .tar when finished, .tar.part while its one worker writes it."""
        return self.root / ("shards" if split == TRAIN else "val") / f"{shard_id:08d}{suffix}"

    def is_alive(self, owner: str | None) -> bool:
        """Whether the process of this id still holds its lock. No clocks, and no process id that could be reused."""
        return owner is not None and is_locked(self.root / "owners" / f"{owner}.lock")

    def statistics(self, num_newest: int, num_first: int = 0) -> list[dict[str, Any]]:
        """What was noted of the first and of the newest shards, each once, by id; with `time` (unix seconds)."""
        rows = self.db.execute(
            "SELECT * FROM statistics WHERE id IN (SELECT id FROM statistics ORDER BY id LIMIT ?)"
            " OR id IN (SELECT id FROM statistics ORDER BY id DESC LIMIT ?) ORDER BY id",
            (num_first, num_newest),
        ).fetchall()
        return [{"id": row["id"], "time": row["time"], **json.loads(row["content"])} for row in rows]

    def totals(self) -> Counter[str]:
        """Everything that is only counted: clips cut and trained, recordings, skips by reason."""
        return Counter(dict(self.db.execute("SELECT name, value FROM totals").fetchall()))

    def setting(self, name: str) -> str:
        """A field of the lake's identity, one of its limits, or `id`, which no other lake has."""
        return self.db.execute("SELECT value FROM settings WHERE name = ?", (name,)).fetchone()["value"]

    def settings(self) -> dict[str, str]:
        """The lake's whole identity, its limits and its `id`."""
        return dict(self.db.execute("SELECT name, value FROM settings").fetchall())

    def cap_bytes(self) -> int:
        """The hard limit on `used_bytes`."""
        return int(self.setting("cap_bytes"))

    def used_bytes(self) -> int:
        """Bytes that are written or reserved: never above the cap."""
        return self._sum("num_bytes", "1")

    def has_room(self) -> bool:
        """Whether another shard could be begun now; spare ones would make way for it."""
        needed = self.used_bytes() - self._sum("num_spare_bytes", SPARE) + int(self.setting("reservation_bytes"))
        return needed <= self.cap_bytes()

    def wants_room(self) -> bool:
        """Whether there is more to cut, and no room for it."""
        states = self.tar_states()
        return bool(states["waiting"] or states["open"]) and not self.has_room()

    def unread_clips(self) -> int:
        """Train clips that no trainer has ever been handed: the level of the reservoir."""
        return self._sum("num_unread", "split = 'train' AND state IN ('ready', 'leased')")

    def _sum(self, columns: str, condition: str) -> int:
        """Over shards of these splits and states; see SUMS."""
        return self.db.execute(f"SELECT coalesce(sum({columns}), 0) FROM sums WHERE {condition}").fetchone()[0]

    def tar_states(self) -> Counter[str]:
        """Source tars by state; `free` counts those that a new worker could take."""
        states = Counter(dict(self.db.execute("SELECT state, count(*) FROM tars GROUP BY state").fetchall()))
        free = "SELECT count(*) FROM tars WHERE owner IS NULL AND state IN ('waiting', 'open')"
        return states + Counter(free=self.db.execute(free).fetchone()[0])

    def num_sound_tars(self) -> int:
        """Tars of the source that are not known to be broken."""
        states = self.tar_states()
        return states["waiting"] + states["open"] + states["done"]

    def is_drained(self) -> bool:
        """Whether no train shard will come any more: all tars are read, none is being written and none is ready."""
        states = self.tar_states()
        is_coming = self._sum("num_shards", "state = 'writing' OR (state = 'ready' AND split = 'train')")
        return not (states["waiting"] or states["open"] or is_coming)

    def anchor_groups(self) -> set[str]:
        """Recordings, or videos, with clips in the anchor validation."""
        rows = self.db.execute("SELECT name FROM anchor_groups").fetchall()
        return {bytes.fromhex(row["name"]).decode(errors="surrogatepass") for row in rows}

    def has_anchor(self) -> bool:
        """Whether the anchor validation is finished, or none is wanted."""
        is_finished = self._sum("num_shards", "split = 'anchor' AND state = 'ready'") > 0
        return is_finished or int(self.setting("val_clips")) == 0

    def ready(self, split: str) -> list[Shard]:
        """Finished shards of one split that nobody holds, oldest first."""
        return self._shards("split = ? AND state = 'ready'", split)

    def leased(self, owner: str) -> list[Shard]:
        """Shards that this trainer holds."""
        return self._shards("owner = ? AND state = 'leased'", owner)

    def _shards(self, condition: str, *values: object) -> list[Shard]:
        rows = self.db.execute(f"SELECT * FROM shards WHERE {condition} ORDER BY id", values).fetchall()
        return [
            Shard(
                *(r["id"], r["split"], self.path(r["id"], r["split"]), r["num_clips"]),
                *(r["sha256"], r["covered"] or b"", r["num_uses"]),
            )
            for r in rows
        ]

    def books(self) -> Books:
        """Where every clip is, at one moment."""
        untrained = "num_clips - num_trained"
        with self.snapshot():
            totals = self.totals()
            return Books(
                cut=totals["cut"],
                ready=self._sum(untrained, "split = 'train' AND state = 'ready'"),
                leased=self._sum(untrained, "split = 'train' AND state IN ('leased', 'retiring')"),
                trained=self._sum("num_trained", "split = 'train'") + totals["trained"],
                trained_again=self._sum("num_trained_again", "split = 'train'") + totals["trained again"],
                validation=self._sum("num_clips", "split != 'train' AND state IN ('ready', 'retiring')"),
                retired_validation=totals["retired validation"],
                quarantined=self._sum(untrained, "state = 'quarantined'"),
            )

    def disagreements(self) -> list[str]:
        """What ledger and folders say differently, and books that are wrong; empty if all is well.

        Shards that a living worker is writing are left out: their files come and go.
        """
        found = [f"the books are off by {self.books().balance()} clips"] if self.books().balance() else []
        with self.transaction():  # nothing is published, leased or retired while we look
            found += self._wrong_sums()
            rows = self.db.execute("SELECT * FROM shards WHERE state != 'quarantined'").fetchall()
            files = _sizes(self.root / "shards") | _sizes(self.root / "val")
        expected = {self.path(r["id"], r["split"]): r["num_bytes"] for r in rows if r["state"] in ("ready", "leased")}
        writing = {f"{r['id']:08d}" for r in rows if r["state"] == "writing" and self.is_alive(r["owner"])}
        retiring = {f"{r['id']:08d}" for r in rows if r["state"] == "retiring"}
        for path, num_bytes in expected.items():
            if path not in files:
                found.append(f"{path} is in the ledger, but there is no such file")
            elif files[path] != num_bytes:
                found.append(f"{path} has {files[path]} bytes, the ledger says {num_bytes}")
        for path in files.keys() - expected.keys():
            if path.name.split(".")[0] not in writing | retiring:
                found.append(f"{path} is on the disk, but not in the ledger")
        return found

    def _wrong_sums(self) -> list[str]:
        """Running sums that are not what the shards add up to."""
        by_hand = {(row["state"], row["split"]): tuple(row)[2:] for row in self.db.execute(SUMS_OF_SHARDS)}
        rows = {(row["state"], row["split"]): tuple(row)[2:] for row in self.db.execute("SELECT * FROM sums")}
        kept = {name: sums for name, sums in rows.items() if any(sums)}
        wrong = sorted(name for name in by_hand.keys() | kept.keys() if by_hand.get(name) != kept.get(name))
        return [f"the sums of {' '.join(name)} shards are {kept.get(name)}, not {by_hand.get(name)}" for name in wrong]


def _sizes(folder: Path) -> dict[Path, int]:
    """Bytes of each file; one that goes while we look is left out."""
    sizes = {}
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            sizes[path] = path.stat().st_size
    return sizes
