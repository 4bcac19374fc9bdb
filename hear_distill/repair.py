"""Ledger and folders: do they agree, and how a ledger that is lost or damaged is made again.

in:   <lake>/ledger.sqlite, its backup, status.json, the shards themselves
out:  what disagrees, one line each; with `repair`, a lake that can go on, and what that cost

A ledger that is **whole** is believed. Where a file is not what it says, the shard is quarantined; a file that it does
not know is moved to <lake>/aside/.

A ledger that is **lost or damaged** is kept, and made again: hear_distill/rebuild.py says what can be promised then.

Nothing of this runs beside a supervisor, a streamer or a trainer.
"""

from contextlib import closing
from pathlib import Path

from hear_distill.backup import BACKUP, LEDGER, damage_of
from hear_distill.files import UserError, fsync_folder, make_folder
from hear_distill.lake import Lake
from hear_distill.locks import is_locked
from hear_distill.rebuild import rebuild
from hear_distill.shards import ShardBroken, verify_shard

# ---- looking ----


def check(root: Path, is_deep: bool) -> int:
    """`fsck`: what ledger and folders say differently; exit code 1 if they do. `is_deep` computes every hash."""
    require(root)
    damage = damage_of(root / LEDGER)
    if damage:
        print(f"{root / LEDGER} is {damage}; to make it again: python datalake/run_lake.py fsck --repair --lake {root}")
        return 1
    with closing(Lake.open(root)) as lake:
        found = lake.disagreements() + (broken_shards(lake) if is_deep else [])
        hashes = ", hashes too" if is_deep else ""
        print("\n".join(found) if found else f"{root}: ledger and folders agree{hashes}; {lake.books()}")
    return 1 if found else 0


def broken_shards(lake: Lake) -> list[str]:
    """Files whose hash or length is not the ledger's. A shard that is retired while we look is left out."""
    return [f"{lake.path(shard_id, split)}: {problem}" for shard_id, split, problem in _broken(lake, is_deep=True)]


def _broken(lake: Lake, is_deep: bool) -> list[tuple[int, str, str]]:
    """(id, split, problem) of finished shards that are not what the ledger says; length alone unless `is_deep`."""
    is_there = "SELECT id, split, num_clips, num_bytes, sha256 FROM shards WHERE state IN ('ready', 'leased')"
    found = []
    for row in lake.db.execute(is_there).fetchall():
        path = lake.path(row["id"], row["split"])
        try:
            if is_deep:
                verify_shard(path, row["num_clips"], row["sha256"])
            elif not path.exists() or path.stat().st_size != row["num_bytes"]:
                raise ShardBroken("missing" if not path.exists() else f"{path.stat().st_size} bytes")
        except (ShardBroken, FileNotFoundError) as e:
            again = lake.db.execute(f"{is_there} AND id = ? AND split = ?", (row["id"], row["split"])).fetchone()
            if again is not None:
                found.append((row["id"], row["split"], str(e)))
    return found


# ---- repairing ----


def require(root: Path) -> None:
    """Raise UserError if there is no lake, not even the remains of one."""
    if not any((root / name).exists() for name in (LEDGER, BACKUP, "shards")):
        Lake.open(root)  # says so


def refuse_while_used(root: Path) -> None:
    """Raise UserError if a process works on this lake. The caller holds the supervisor's lock."""
    owners = root / "owners"
    for lock in sorted(owners.iterdir()) if owners.is_dir() else []:
        if is_locked(lock):
            raise UserError(f"{lock.stem} works on {root}; stop it, then run the same command again")


def repair(root: Path, is_deep: bool) -> int:
    """`fsck --repair`: put right what `check` finds. The caller holds the supervisor's lock. Exit code 0."""
    refuse_while_used(root)
    said: list[str] = []
    damage = damage_of(root / LEDGER)
    if damage:
        said.append(f"{root / LEDGER} is {damage}")
        rebuild(root, said.append)
    with closing(Lake.open(root)) as lake:
        lake.sweep()
        lake.finish_retiring()
        for shard_id, split, problem in _broken(lake, is_deep):
            said.append(f"{lake.path(shard_id, split)} is not what the ledger says ({problem}): quarantined")
            lake.quarantine(shard_id, split, problem)
        put_aside(lake, said)
        balance_books(lake, said)
        left = lake.disagreements()
        said.append(f"{root}: ledger and folders agree; {lake.books()}" if not left else "\n".join(left))
    print("\n".join(said))
    return 1 if left else 0


def put_aside(lake: Lake, said: list[str]) -> None:
    """Move what the ledger does not know out of the folders of shards. It is never deleted here."""
    known = {lake.path(row["id"], row["split"]) for row in lake.db.execute("SELECT id, split FROM shards").fetchall()}
    for folder in ("shards", "val"):
        for path in sorted((lake.root / folder).iterdir()):
            if path not in known:
                make_folder(lake.root / "aside")
                target = lake.root / "aside" / f"{folder}-{path.name}"
                path.rename(target)
                said.append(f"{path} is not in the ledger: moved to {target}; delete it once you have looked")
        fsync_folder(lake.root / folder)


def balance_books(lake: Lake, said: list[str]) -> None:
    """Let `cut` be what is accounted for; every other number is a sum over rows that were just checked."""
    if unaccounted := lake.books().balance():
        lake.db.execute("UPDATE totals SET value = value - ? WHERE name = 'cut'", (unaccounted,))
        said.append(f"the books were off by {unaccounted} clips: the count of clips cut is corrected")
