"""The ledger of a lake: the disk budget, the cursors into the source, and the life of each shard.

in:   what workers cut and what trainers cover
out:  <lake>/ledger.sqlite, the only shared state; files move only together with it

    <lake>/shards/<id>.tar[.part]   train parts      <lake>/val/<id>.tar[.part]   validation parts
    <lake>/owners/<id>.lock         one per living process      <lake>/quarantine/<id>-<split>.tar   failed its hash

A shard is `writing`, then `ready`, `leased` to a trainer, `retiring` once the second-newest durable checkpoint covers
all its clips, and then only a number in the totals; or `quarantined`. datalake/README.md draws it. A trainer that uses
shards again keeps its leases, pass after pass; where a streamer wants room, it gives those back that had one, and the
most-used go first. Every change of state is one transaction; a file operation stands before or after it so that a kill
between the two is repaired by `sweep` (for dead writers), `begin_run` (for dead trainers) or `finish_retiring`, each of
which may itself be killed.
"""

import fcntl
import hashlib
import json
import os
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hear_distill.files import UserError, crash_point, fsync_folder, make_folder
from hear_distill.ledger import SPARE, Ledger
from hear_distill.schema import (
    ANCHOR,
    RECENT,
    SCHEMA,
    SCHEMA_VERSION,
    SUMS,
    SUMS_OF_SHARDS,
    TRAIN,
    Cursor,
    Identity,
    Part,
    Shard,
)

NO_USES: Mapping[int, int] = MappingProxyType({})


class LakeFull(Exception):
    """The cap leaves no room for another shard now. Workers leave; the supervisor starts them again when there is."""


def permuted(names: Sequence[str], seed: int) -> list[str]:
    """The names in an order that depends on the seed alone: neighbours in the source do not stay neighbours."""
    return sorted(names, key=lambda name: hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=16).digest())


class Lake(Ledger):
    """Everything that happens to a lake."""

    @classmethod
    def create(cls, root: Path, identity: Identity, tars: Mapping[str, int], **limits: int | str) -> "Lake":
        """Make the lake, or join it if it is there and is the same one.

        Args:
            tars: length in bytes by name, of the whole source; this node takes its part of the permutation.
            limits: what may change from run to run: `cap_bytes` of `used_bytes`, `reservation_bytes` of one shard with
                all its parts, `max_workers`, the streamers that may run side by side, and `keep`, what they keep.
        """
        if cls.find(root) is None:
            cls.refuse_orphans(root)
        for folder in ("shards", "val", "owners", "quarantine"):
            make_folder(root / folder)
        with (root / "create.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # SQLite does not wait when two processes make a file's WAL at once
            lake = cls(root)
        wanted = {name: str(value) for name, value in asdict(identity).items()}
        with lake.transaction():
            for statement in SCHEMA:
                lake.db.execute(statement)
            if lake.db.execute("SELECT 1 FROM sums").fetchone() is None:  # a lake that was made before there were any
                lake.db.execute(f"INSERT INTO sums {SUMS_OF_SHARDS}")
            settings = dict(lake.db.execute("SELECT name, value FROM settings").fetchall())
            found = {name: settings[name] for name in wanted if name in settings}
            if not found:
                order = permuted(list(tars), identity.seed)[identity.node_rank :: identity.num_nodes]
                lake.db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
                lake.db.executemany("INSERT INTO settings VALUES (?, ?)", [*wanted.items(), ("id", uuid.uuid4().hex)])
                rows = [(position, name, tars[name]) for position, name in enumerate(order)]
                lake.db.executemany("INSERT INTO tars (position, name, num_bytes) VALUES (?, ?, ?)", rows)
            elif found != wanted:
                differing = {k: f"{found.get(k)} (asked for: {wanted[k]})" for k in wanted if found.get(k) != wanted[k]}
                raise UserError(
                    f"the lake {root} is another one: {differing}; choose another --lake or the same settings, "
                    f"or, if nothing was trained from it yet, delete it"
                )
            for name, value in limits.items():
                if settings.get(name, str(value)) != str(value):
                    print(f"WARNING: {name} of {root} changes from {settings[name]} to {value}", file=sys.stderr)
                lake.db.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", (name, str(value)))
        return lake

    # ---- owners ----

    def sweep(self) -> None:
        """Put right what dead workers left: their unfinished files and reservations go, their cursors are free."""
        with self.transaction():
            for row in self.db.execute("SELECT id, split, owner FROM shards WHERE state = 'writing'").fetchall():
                if not self.is_alive(row["owner"]):
                    self._forget_unfinished(row["id"])
            for row in self.db.execute("SELECT DISTINCT owner FROM tars WHERE owner IS NOT NULL").fetchall():
                if not self.is_alive(row["owner"]):
                    self.free_tars(row["owner"])
            for lock in (self.root / "owners").iterdir():
                # Under its own lock, so nobody alive can hold it; in the transaction, so nobody else looks meanwhile.
                with suppress(BlockingIOError, FileNotFoundError), lock.open() as f:
                    fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    self._suspect(f.readline())
                    lock.unlink()
        self._move_quarantined()

    def _suspect(self, note: str) -> None:
        """Count a death against the recording that a dead worker's note names, if it was decoding one."""
        try:
            tar, offset, key = json.loads(note)
            tar, offset = str(tar), int(offset)
        except (ValueError, TypeError):  # no note, or one from before a power cut
            return
        self.db.execute(
            "INSERT INTO suspects VALUES (?, ?, ?, 1)"
            " ON CONFLICT (tar, offset) DO UPDATE SET num_deaths = num_deaths + 1",
            (tar, offset, json.dumps(key)),
        )
        self._add("decoder deaths", 1)

    def suspects(self, tar: str) -> dict[int, int]:
        """Recordings of this tar, by offset, at whose decoding workers died; how many in a row."""
        return dict(self.db.execute("SELECT offset, num_deaths FROM suspects WHERE tar = ?", (tar,)).fetchall())

    def acquit(self, tar: str, offset: int) -> None:
        """This recording was decoded, or refused, and its worker lives."""
        self.db.execute("DELETE FROM suspects WHERE tar = ? AND offset = ?", (tar, offset))

    def _forget_unfinished(self, shard_id: int) -> None:
        """Delete a shard under either name, then its reservation. The cursors never moved, so it will be cut again."""
        for folder in ("shards", "val"):
            for suffix in (".tar", ".tar.part"):
                (self.root / folder / f"{shard_id:08d}{suffix}").unlink(missing_ok=True)
            fsync_folder(self.root / folder)
        self.db.execute("DELETE FROM shards WHERE id = ? AND state = 'writing'", (shard_id,))

    # ---- writing ----

    def take_tars(self, owner: str, count: int) -> list[Cursor]:
        """Up to `count` cursors that nobody holds, in the order of the permutation; those that failed come last."""
        with self.transaction():
            rows = self.db.execute(
                "SELECT * FROM tars WHERE owner IS NULL AND state IN ('open', 'waiting')"
                " ORDER BY num_outages, position LIMIT ?",
                (count,),
            ).fetchall()
            for row in rows:
                self.db.execute(
                    "UPDATE tars SET owner = ?, state = 'open' WHERE position = ?", (owner, row["position"])
                )
        fields = ("position", "name", "num_bytes", "offset", "next_clip", "keys")
        return [Cursor(**{name: row[name] for name in fields}) for row in rows]

    def note_outage(self, position: int) -> None:
        """A worker gave up on this tar for now: others come first, so it does not stop the rest of the source."""
        self.db.execute("UPDATE tars SET num_outages = num_outages + 1 WHERE position = ?", (position,))

    def free_tars(self, owner: str) -> None:
        """Give all cursors of `owner` back, where they stood at its last finished shard."""
        self.db.execute("UPDATE tars SET owner = NULL WHERE owner = ?", (owner,))

    def begin_shard(self, owner: str, num_bytes: int, split: str = TRAIN) -> int | None:
        """Reserve `num_bytes` under the cap: the new shard's id, or None if the anchor is begun. Raises LakeFull.

        Where there is no room, spare shards make it, the most-used first: those that nobody holds, and that have a
        whole pass in the second-newest checkpoint.
        """
        self._push_out(num_bytes)
        with self.transaction():
            if split == ANCHOR and self._sum("num_shards", "split = 'anchor'"):
                return None
            if self.used_bytes() + num_bytes > self.cap_bytes():
                raise LakeFull(f"{self.used_bytes()} of {self.cap_bytes()} bytes are in use, {num_bytes} more needed")
            shard_id = self._add("next_shard_id", 1) - 1
            self.db.execute(
                "INSERT INTO shards (id, split, state, owner, num_bytes) VALUES (?, ?, 'writing', ?, ?)",
                (shard_id, split, owner, num_bytes),
            )
        crash_point("shard-reserved")
        return shard_id

    def _push_out(self, num_bytes: int) -> None:
        """Retire spare shards until `num_bytes` fit; none if even all of them would not be enough."""
        with self.transaction():
            missing = self.used_bytes() + num_bytes - self.cap_bytes()
            if not 0 < missing <= self._sum("num_spare_bytes", SPARE):
                return
            rows = self.db.execute(
                f"SELECT id, num_bytes FROM shards WHERE {SPARE} AND num_safe_uses > 0 ORDER BY num_uses DESC, id"
            )
            for row in rows.fetchall():
                if missing > 0:
                    missing -= row["num_bytes"]
                    self._retire(row["id"])
        crash_point("shard-pushed-out")
        self.finish_retiring()

    def _retire(self, shard_id: int, split: str = TRAIN) -> None:
        self.db.execute("UPDATE shards SET state = 'retiring' WHERE id = ? AND split = ?", (shard_id, split))

    def publish(
        self,
        shard_id: int,
        parts: Sequence[Part],
        cursors: Sequence[Cursor],
        counts: Counter[str],
        anchor_groups: Iterable[str] = (),
        statistics: Mapping[str, Any] | None = None,
    ) -> None:
        """Finish a shard whose parts are written as .tar.part: make them durable, name them, and move the cursors.

        Clips and cursors change in one transaction, so each clip of the source is in exactly one finished shard. An
        empty list of parts is allowed: recordings that gave no clip have been read all the same. `anchor_groups` are
        the recordings and videos that must never be trained on, here or later. `statistics` (JSON) outlive the shard.
        """
        crash_point("shard-written")
        for part in parts:
            _fsync_file(self.path(shard_id, part.split, ".tar.part"))
        crash_point("shard-synced")
        for i, part in enumerate(sorted(parts, key=lambda part: part.split == TRAIN)):
            if i == 1:
                crash_point("shard-renamed-one")
            self.path(shard_id, part.split, ".tar.part").rename(self.path(shard_id, part.split))
        self._fsync_folders()
        crash_point("shard-renamed")
        with self.transaction():
            (row,) = self.db.execute(
                "DELETE FROM shards WHERE id = ? AND state = 'writing' RETURNING num_bytes", (shard_id,)
            ).fetchall()
            assert sum(part.num_bytes for part in parts) <= row["num_bytes"], "the parts exceed their reservation"
            for part in parts:
                self.db.execute(
                    "INSERT INTO shards (id, split, state, num_bytes, num_clips, sha256)"
                    " VALUES (?, ?, 'ready', ?, ?, ?)",
                    (shard_id, part.split, part.num_bytes, part.num_clips, part.sha256),
                )
            for cursor in cursors:
                self.db.execute(
                    "UPDATE tars SET offset = ?, next_clip = ?, state = ?, problem = ?, keys = ? WHERE position = ?",
                    (cursor.offset, cursor.next_clip, cursor.state, cursor.problem, cursor.keys, cursor.position),
                )
            groups = [(group.encode(errors="surrogatepass").hex(),) for group in anchor_groups]
            self.db.executemany("INSERT OR IGNORE INTO anchor_groups VALUES (?)", groups)
            if statistics:
                row = (shard_id, time.time(), json.dumps(statistics))
                self.db.execute("INSERT INTO statistics VALUES (?, ?, ?)", row)
            for name, count in (counts + Counter({"cut": sum(part.num_clips for part in parts)})).items():
                self._add(name, count)
        crash_point("shard-ready")

    def _add(self, name: str, count: int) -> int:
        """Add to a total and return its new value."""
        return self.db.execute(
            "INSERT INTO totals VALUES (?, ?)"
            " ON CONFLICT (name) DO UPDATE SET value = value + excluded.value RETURNING value",
            (name, count),
        ).fetchone()["value"]

    def _fsync_folders(self) -> None:
        fsync_folder(self.root / "shards")
        fsync_folder(self.root / "val")

    def abandon(self, shard_id: int) -> None:
        """Give a reservation back before anything was published from it."""
        with self.transaction():
            if self.db.execute("SELECT 1 FROM shards WHERE id = ? AND state = 'writing'", (shard_id,)).fetchone():
                self._forget_unfinished(shard_id)

    # ---- training ----

    def begin_run(
        self, owner: str, run: str, coverage: Mapping[int, bytes], uses: Mapping[int, int] = NO_USES
    ) -> list[Shard]:
        """Take up a training history: what its surviving checkpoint covers stays covered, all else is ready again.

        Shards that `coverage` names are leased to `owner`, in its order, and returned; the clips that the checkpoint
        does not contain are the ones to read. Other shards of this run go back. So do the shards of dead trainers of
        other runs, less what their newest durable checkpoint covered. `uses` holds the whole passes of each shard
        before the one that `coverage` tells of, where there are any. A shard that the checkpoint covers, and that was
        given back or retired since, is not taken up again.
        """
        self.finish_retiring()
        taken_from_the_dead = set()
        with self.transaction():
            for row in self.db.execute(
                "SELECT * FROM shards WHERE run IS NOT NULL AND state IN ('ready', 'leased')"
            ).fetchall():
                if self.is_alive(row["owner"]):
                    continue
                is_ours = row["run"] == run
                if is_ours and row["state"] == "leased":
                    taken_from_the_dead.add(row["id"])
                covered, num_uses = (None, row["num_safe_uses"]) if is_ours else (row["covered"], row["num_uses"])
                self._set_coverage(row["id"], covered, num_uses)
                self.db.execute(
                    "UPDATE shards SET state = 'ready', owner = NULL WHERE id = ? AND split = 'train'", (row["id"],)
                )
            for shard_id, covered in coverage.items():
                num_uses = uses.get(shard_id, 0)
                row = self.db.execute(
                    "SELECT * FROM shards WHERE id = ? AND split = 'train' AND state = 'ready'", (shard_id,)
                ).fetchone()
                if row is None:
                    continue
                is_over = row["run"] != run or _num_bits(covered) == row["num_clips"]
                if row["num_uses"] > num_uses and is_over and shard_id not in taken_from_the_dead:
                    continue  # it was given back, or somebody else is at a later pass
                self._set_coverage(shard_id, covered, num_uses)
                self._lease(shard_id, owner, run)
            return [s for i in coverage for s in self._shards("id = ? AND owner = ? AND state = 'leased'", i, owner)]

    def lease(self, owner: str, run: str) -> Shard | None:
        """The oldest of the least-used ready train shards, now this trainer's alone; None if there is none."""
        with self.transaction():
            row = self.db.execute(
                "SELECT id FROM shards WHERE state = 'ready' AND split = 'train' ORDER BY num_uses, id LIMIT 1"
            ).fetchone()
            if row is None:
                return None
            self._lease(row["id"], owner, run)
            self.db.execute("UPDATE shards SET num_safe_uses = num_uses WHERE id = ? AND split = 'train'", (row["id"],))
            (shard,) = self._shards("id = ? AND split = 'train'", row["id"])
        crash_point("lease-taken")
        return shard

    def _lease(self, shard_id: int, owner: str, run: str) -> None:
        self.db.execute(
            "UPDATE shards SET state = 'leased', owner = ?, run = ?, num_read = num_covered"
            " WHERE id = ? AND split = 'train'",
            (owner, run, shard_id),
        )

    def _set_coverage(self, shard_id: int, covered: bytes | None, num_uses: int) -> None:
        num_covered = _num_bits(covered or b"")
        self.db.execute(
            "UPDATE shards SET covered = ?, num_covered = ?, num_read = ?, num_uses = ?"
            " WHERE id = ? AND split = 'train'",
            (covered, num_covered, num_covered, num_uses, shard_id),
        )

    def report_read(self, num_read: Mapping[int, int]) -> None:
        """How many clips of each leased shard were handed out: the supervisor sees consumption between checkpoints."""
        with self.transaction():
            self.db.executemany(
                "UPDATE shards SET num_read = ? WHERE id = ? AND split = 'train' AND state = 'leased'",
                [(count, shard_id) for shard_id, count in num_read.items()],
            )

    def record_checkpoint(
        self, owner: str, coverage: Mapping[int, bytes], uses: Mapping[int, int] = NO_USES, is_kept: bool = False
    ) -> list[int]:
        """Book a checkpoint that is durable and was read back. Returns the train shards that are gone with it.

        A shard goes when the second-newest checkpoint covers it: should the newest turn out damaged, the one before
        still accounts for every clip. Leases that `coverage` does not name stay as they are: the trainer reads ahead.
        With `is_kept` none goes. `uses` as in `begin_run`.
        """
        with self.transaction():
            leased = "SELECT * FROM shards WHERE state = 'leased' AND owner = ?"
            rows = [row for row in self.db.execute(leased, (owner,)).fetchall() if row["id"] in coverage]
            for row in rows:
                self._set_coverage(row["id"], coverage[row["id"]], uses.get(row["id"], 0))
                safe = row["num_uses"] + (row["num_covered"] == row["num_clips"])
                self.db.execute(
                    "UPDATE shards SET num_safe_uses = ? WHERE id = ? AND split = 'train'", (safe, row["id"])
                )
            covered_twice = [row["id"] for row in rows if row["num_covered"] == row["num_clips"] and not is_kept]
            for shard_id in covered_twice:
                self._retire(shard_id)
        crash_point("checkpoint-recorded")
        self.finish_retiring()
        return covered_twice

    def give_back(self, owner: str, shard_ids: Iterable[int]) -> None:
        """These shards, whose pass is over, are ready for the next, or to make room."""
        with self.transaction():
            for shard_id in shard_ids:
                self.db.execute(
                    "UPDATE shards SET state = 'ready', owner = NULL, covered = NULL, num_covered = 0, num_read = 0,"
                    " num_uses = num_uses + 1, num_safe_uses = num_uses + 1"
                    " WHERE id = ? AND split = 'train' AND owner = ? AND num_covered = num_clips",
                    (shard_id, owner),
                )
        crash_point("shard-given-back")

    def spare(self, owner: str) -> set[int]:
        """Leases of which the second-newest checkpoint contains a whole pass."""
        rows = self.db.execute("SELECT id FROM shards WHERE state = 'leased' AND owner = ? AND num_safe_uses", (owner,))
        return {row["id"] for row in rows.fetchall()}

    def finish_retiring(self) -> None:
        """Delete the files of retiring shards, then turn their rows into totals; also after a kill in between."""
        trained, again = (SUMS[name].format(row="shards") for name in ("num_trained", "num_trained_again"))
        rows = self.db.execute(
            f"SELECT id, split, num_clips, {trained} AS trained, {again} AS again FROM shards WHERE state = 'retiring'"
        ).fetchall()
        for row in rows:
            self.path(row["id"], row["split"]).unlink(missing_ok=True)
        if rows:
            self._fsync_folders()
            crash_point("shard-unlinked")
        with self.transaction():
            for row in rows:
                gone = self.db.execute(
                    "DELETE FROM shards WHERE id = ? AND split = ? AND state = 'retiring'", (row["id"], row["split"])
                ).rowcount
                if row["split"] == TRAIN:
                    self._add("trained", gone * row["trained"])
                    self._add("trained again", gone * row["again"])
                else:
                    self._add("retired validation", gone * row["num_clips"])
        if rows:
            crash_point("shard-retired")

    def release(self, owner: str) -> None:
        """Give the leases of a trainer that leaves in good order back, less what its newest checkpoint covers."""
        self.db.execute(
            "UPDATE shards SET state = 'ready', owner = NULL, num_read = num_covered"
            " WHERE state = 'leased' AND owner = ?",
            (owner,),
        )

    def quarantine(self, shard_id: int, split: str, problem: str) -> None:
        """Move a shard that is not what the ledger says aside; its clips are counted as lost, not trained on."""
        with self.transaction():
            self.db.execute(
                "UPDATE shards SET state = 'quarantined', owner = NULL, problem = ? WHERE id = ? AND split = ?",
                (problem, shard_id, split),
            )
        crash_point("shard-quarantined")
        self._move_quarantined()

    def _move_quarantined(self) -> None:
        """Put quarantined files aside. Whoever has looked at one may delete it: its room under the cap comes back."""
        for row in self.db.execute("SELECT id, split FROM shards WHERE state = 'quarantined'").fetchall():
            path = self.path(row["id"], row["split"])
            aside = self.root / "quarantine" / f"{row['id']:08d}-{row['split']}.tar"
            if path.exists():
                fsync_folder(path.rename(aside).parent)  # the new name first: at no time is there neither
                self._fsync_folders()
            elif not aside.exists():
                self.db.execute("UPDATE shards SET num_bytes = 0 WHERE id = ? AND split = ?", (row["id"], row["split"]))

    def retire_recent(self, num_clips_to_keep: int) -> None:
        """Let the oldest `recent` validation shards go as long as `num_clips_to_keep` clips stay: it never shrinks."""
        with self.transaction():
            rows = self.db.execute(
                "SELECT id, num_clips FROM shards WHERE split = ? AND state = 'ready' ORDER BY id DESC", (RECENT,)
            ).fetchall()
            kept = 0
            for row in rows:
                if kept >= num_clips_to_keep:
                    self._retire(row["id"], RECENT)
                kept += row["num_clips"]
        self.finish_retiring()


def _num_bits(covered: bytes) -> int:
    return int.from_bytes(covered, "little").bit_count()


def _fsync_file(path: Path) -> None:
    with path.open("rb") as f:
        os.fsync(f.fileno())
