"""A ledger that is lost or damaged, made again from its backup and from the shards' own JSON.

in:   <lake>/ledger.backup.sqlite, or else status.json and the source's list of tars; the shards
out:  <lake>/ledger.sqlite; the old one stays as ledger.damaged-<n>.sqlite

The backup is at most an hour old, and of the very end if the supervisor left in good order: then nothing is lost, and
what follows is about the others. A shard that came since becomes ready, its hash computed anew. One that went since is
counted as trained, which is why it went. What the trainer has read of the shards that are there stands in its
checkpoint. So:

* No clip that stands in a file of the lake is cut again: their recordings are noted as read in the cursors, which begin
  where the backup left them.
* No clip that the surviving checkpoint contains is trained on again, but for shards that were cut *and* retired since
  the backup, of which nothing is left; their recordings are cut again. The report says how many shards that may be.
* Of a recording that was cut in part since the backup, the rest is never cut: one for each tar that was open at most.
* The counts of recordings and skips miss what came since the backup; recordings that are passed over because their
  clips are there count as duplicate keys.

If **the backup is gone as well**, the identity of the lake comes from status.json and the list of tars from the source.
Then the first promise holds still, and the second does not: all that was ever retired is cut again, and the anchor
validation keeps its recordings apart, but not other segments of the same videos.
"""

import hashlib
import json
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing, suppress
from dataclasses import fields
from pathlib import Path

from hear_distill.audio import SAMPLE_RATE, clip_starts
from hear_distill.backup import BACKUP, LEDGER, damage_of
from hear_distill.files import UserError, fsync_folder, make_folder
from hear_distill.lake import Lake
from hear_distill.schema import ANCHOR, RECENT, TRAIN, Identity
from hear_distill.shards import ClipInfo, ShardBroken, read_infos
from hear_distill.sources import find_source

REBUILDING = "rebuilding"
IDS_SKIPPED = 1_000_000  # no id is used again: a checkpoint may name shards that nobody else remembers
Say = Callable[[str], None]
Infos = dict[tuple[int, str], list[ClipInfo]]
"""what the clips of a file say of themselves, by its number and folder"""


def rebuild(root: Path, say: Say) -> None:
    """Make the ledger again, beside the old one, then put it in its place. Killed at any line, run it again."""
    place = root / REBUILDING
    for old in place.glob("ledger.sqlite*"):
        old.unlink()
    lake = from_backup(root, place, say) or from_source(root, place, say)
    with closing(lake):
        adopt(lake, root, say)
        lake.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        lake.db.execute("PRAGMA journal_mode = DELETE")  # one file, which can be renamed
    number = next(n for n in range(1, 10_000) if not (root / f"ledger.damaged-{n}.sqlite").exists())
    for suffix in ("", "-wal", "-shm"):  # the ledger first: without it, what is left of it is believed by nobody
        with suppress(FileNotFoundError):
            (root / (LEDGER + suffix)).rename(root / f"ledger.damaged-{number}.sqlite{suffix}")
    fsync_folder(root)
    (place / LEDGER).rename(root / LEDGER)
    fsync_folder(root)
    for folder in ("shards", "val", "owners", "quarantine"):
        make_folder(root / folder)
        if (place / folder).is_dir():
            (place / folder).rmdir()
    (place / "create.lock").unlink(missing_ok=True)
    place.rmdir()


def from_backup(root: Path, place: Path, say: Say) -> Lake | None:
    """The backup, in `place`; None if it is not whole."""
    damage = damage_of(root / BACKUP)
    if damage:
        say(f"{root / BACKUP} is {damage}")
        return None
    make_folder(place)
    with closing(sqlite3.connect(root / BACKUP)) as source, closing(sqlite3.connect(place / LEDGER)) as target:
        source.backup(target)
    lake = Lake.open(place)
    say(f"the backup is whole: it knows {lake.books()}")
    return lake


def from_source(root: Path, place: Path, say: Say) -> Lake:
    """A new ledger in `place`, of the lake that status.json tells of. Raises UserError if nothing does."""
    path = root / "status.json"
    said = json.loads(path.read_text()).get("settings", {}) if path.exists() else {}
    if not said:
        raise UserError(
            f"neither {BACKUP} nor status.json of {root} tells which lake this was, so its shards cannot be used: "
            f"delete the folder, or move it away, and start another lake; the trained models in --out stay good"
        )
    identity = Identity(**{field.name: field.type(said[field.name]) for field in fields(Identity)})
    source = find_source(identity.source, identity.revision)
    if source.revision != identity.revision:
        raise UserError(
            f"{identity.source} is at revision {source.revision} now, the lake was cut from {identity.revision}; "
            f"bring that back, or start another lake"
        )
    limits = {name: said[name] for name in ("cap_bytes", "reservation_bytes", "max_workers", "keep") if name in said}
    lake = Lake.create(place, identity, {tar.name: tar.num_bytes for tar in source.tars}, **limits)
    lake.db.execute("UPDATE settings SET value = ? WHERE name = 'id'", (said["id"],))
    lake.db.execute("INSERT OR REPLACE INTO totals VALUES ('next_shard_id', 0)")
    say("the ledger begins anew: what was trained and retired before is not known, and is cut again")
    return lake


def adopt(lake: Lake, root: Path, say: Say) -> None:
    """Bring a ledger of earlier up to what stands in the folders of `root`, in one transaction."""
    for folder in ("shards", "val"):
        make_folder(root / folder)
        for part in (root / folder).glob("*.tar.part"):
            part.unlink()  # never published, so no cursor has moved for it
    files = {(int(p.stem), p.parent.name): p for folder in ("shards", "val") for p in _numbered(root / folder)}
    with lake.transaction():
        next_id = lake.totals()["next_shard_id"]
        lake.db.execute("DELETE FROM shards WHERE state = 'writing'")
        lake.db.execute("UPDATE tars SET owner = NULL")
        num_gone = book_gone(lake, root, files.keys())
        known = {(row["id"], _folder(row["split"])) for row in lake.db.execute("SELECT id, split FROM shards")}
        new = {place: path for place, path in sorted(files.items()) if place not in known}
        infos = add_rows(lake, new, say)
        mark_as_read(lake, infos, say)
        highest = max([next_id - 1, *(shard_id for shard_id, _ in infos)])
        num_cut = lake.totals()["cut"] + sum(map(len, infos.values()))
        totals = [("cut", num_cut), ("next_shard_id", highest + 1 + IDS_SKIPPED)]
        lake.db.executemany("INSERT OR REPLACE INTO totals VALUES (?, ?)", totals)
    say(f"{num_gone} shards have gone since: counted as trained, as retired validation, or as quarantined")
    num_unknown = highest + 1 - next_id - len({shard_id for shard_id, _ in infos if shard_id >= next_id})
    say(
        f"{len(infos)} shards are new; {num_unknown} of the shards begun since have left no file, "
        f"nor have any after number {highest}: what was cut and retired among them is cut again"
    )


def _numbered(folder: Path) -> Iterable[Path]:
    """Finished shards, by the form of their names."""
    return (path for path in folder.glob("*.tar") if path.stem.isdecimal() and len(path.stem) >= 8)


def _folder(split: str) -> str:
    return "shards" if split == TRAIN else "val"


def book_gone(lake: Lake, root: Path, there: Iterable[tuple[int, str]]) -> int:
    """Book rows without a file: quarantined since, or retired, which `finish_retiring` will count. Returns how many."""
    there, gone = set(there), 0
    for row in lake.db.execute("SELECT * FROM shards WHERE state IN ('ready', 'leased')").fetchall():
        if (row["id"], _folder(row["split"])) in there:
            continue
        gone += 1
        is_aside = (root / "quarantine" / f"{row['id']:08d}-{row['split']}.tar").exists()
        covered = row["num_covered"] if row["num_uses"] or is_aside else row["num_clips"]
        lake.db.execute(
            "UPDATE shards SET state = ?, owner = NULL, num_covered = ? WHERE id = ? AND split = ?",
            ("quarantined" if is_aside else "retiring", covered, row["id"], row["split"]),
        )
    return gone


def add_rows(lake: Lake, new: Mapping[tuple[int, str], Path], say: Say) -> Infos:
    """Make the shards of these files ready. Returns what they say of their clips; what is no shard stays unknown."""
    has_anchor = lake.db.execute("SELECT 1 FROM shards WHERE split = 'anchor'").fetchone() is not None
    wants_anchor = not has_anchor and int(lake.setting("val_clips")) > 0
    first = min(new, default=None)  # the anchor is cut before anything else
    infos = {}
    for (shard_id, folder), path in new.items():
        try:
            found = read_infos(path)
        except (ShardBroken, ValueError, TypeError) as e:
            say(f"{path} is no shard ({e})")
            continue
        is_anchor = wants_anchor and folder == "val" and (shard_id, folder) == first
        split = TRAIN if folder == "shards" else ANCHOR if is_anchor else RECENT
        with path.open("rb") as f:
            sha256 = hashlib.file_digest(f, "sha256").hexdigest()
        lake.db.execute(
            "INSERT INTO shards (id, split, state, num_bytes, num_clips, sha256) VALUES (?, ?, 'ready', ?, ?, ?)",
            (shard_id, split, path.stat().st_size, len(found), sha256),
        )
        if is_anchor:
            groups = {(info.key.encode(errors="surrogatepass").hex(),) for info in found}
            lake.db.executemany("INSERT OR IGNORE INTO anchor_groups VALUES (?)", groups)
        infos[shard_id, folder] = found
    return infos


def mark_as_read(lake: Lake, infos: Infos, say: Say) -> None:
    """Let the cursors pass over the recordings of these clips, whole; say how many clips are lost with that."""
    keys: dict[str, set[bytes]] = defaultdict(set)
    last: dict[str, tuple[int, float]] = {}
    for info in (info for found in infos.values() for info in found):
        recording = info.id.split("-")[0]
        keys[info.tar].add(bytes.fromhex(recording))
        last[recording] = max(last.get(recording, (-1, 0.0)), (info.start, info.source_s))
    for name, hashes in keys.items():
        row = lake.db.execute("SELECT * FROM tars WHERE substr(name, 1, ?) = ?", (len(name), name)).fetchone()
        if row is None:
            say(f"WARNING: clips of {name}, a tar that is not in the source; its cursor cannot be moved")
        elif row["state"] in ("waiting", "open"):
            lake.db.execute(
                "UPDATE tars SET state = 'open', keys = ? WHERE position = ?",
                (row["keys"] + b"".join(sorted(hashes)), row["position"]),
            )
    slack = SAMPLE_RATE // 1000 + 1  # durations are kept to the millisecond
    rests = Counter(
        {
            name: sum(start > reached + slack for start in clip_starts(round(seconds * SAMPLE_RATE)))
            for name, (reached, seconds) in last.items()
        }
    )
    num_begun = sum(rest > 0 for rest in rests.values())
    say(f"{num_begun} recordings were cut in part; at most {rests.total()} clips of them are never cut")
