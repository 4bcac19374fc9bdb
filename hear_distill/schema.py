"""What stands in a ledger: its tables, and the records that cross its border.

Clips are the unit of every count, bytes of every size; a shard has one id and up to two parts (train, and one kind of
validation), each a row of its own once the shard is finished.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

TABLES = """
CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS tars (
    position INTEGER PRIMARY KEY,                -- in the seeded permutation
    name TEXT NOT NULL UNIQUE,
    num_bytes INTEGER NOT NULL,
    state TEXT NOT NULL DEFAULT 'waiting' CHECK (state IN ('waiting', 'open', 'done', 'broken')),
    offset INTEGER NOT NULL DEFAULT 0,           -- the cursor: first byte of a recording,
    next_clip INTEGER NOT NULL DEFAULT 0,        -- and the next clip of that recording
    owner TEXT,
    problem TEXT,
    num_outages INTEGER NOT NULL DEFAULT 0,      -- how often a worker gave up on it; such tars are taken last
    keys BLOB NOT NULL DEFAULT x''                -- 8 bytes of hash for each recording behind the cursor, while open
) STRICT;
CREATE INDEX IF NOT EXISTS tars_by_state ON tars (state, owner);
CREATE TABLE IF NOT EXISTS shards (
    id INTEGER NOT NULL,
    split TEXT NOT NULL CHECK (split IN ('train', 'anchor', 'recent')),
    state TEXT NOT NULL CHECK (state IN ('writing', 'ready', 'leased', 'retiring', 'quarantined')),
    owner TEXT,                                  -- of the process that writes or trains
    run TEXT,                                    -- training history that leased it last
    num_bytes INTEGER NOT NULL,                  -- while writing: reserved for all parts of this id
    num_clips INTEGER NOT NULL DEFAULT 0,
    sha256 TEXT,
    covered BLOB,                                -- a bit per clip: trained on in the newest durable checkpoint
    num_covered INTEGER NOT NULL DEFAULT 0,
    num_uses INTEGER NOT NULL DEFAULT 0,         -- whole passes that the newest checkpoint contains, besides `covered`
    num_safe_uses INTEGER NOT NULL DEFAULT 0,    -- the same of the checkpoint before: with one, a shard can make room
    num_read INTEGER NOT NULL DEFAULT 0,         -- handed to the trainer so far; a report, no authority
    problem TEXT,
    PRIMARY KEY (id, split)
) STRICT;
CREATE INDEX IF NOT EXISTS shards_in_turn ON shards (state, split, num_uses, id);
CREATE TABLE IF NOT EXISTS anchor_groups (
    name TEXT PRIMARY KEY                        -- a recording or a video, in hexadecimal: keys may be no valid text
) STRICT;
CREATE TABLE IF NOT EXISTS statistics (
    id INTEGER PRIMARY KEY,                      -- of the shard; kept when it is retired, about 500 bytes each
    time REAL NOT NULL,                          -- unix seconds of its publication
    content TEXT NOT NULL                        -- JSON, see the streamer
) STRICT;
CREATE TABLE IF NOT EXISTS suspects (
    tar TEXT NOT NULL,
    offset INTEGER NOT NULL,                     -- of a recording that was being decoded when its worker died
    key TEXT NOT NULL,                           -- of the recording, as JSON: keys may be no valid text
    num_deaths INTEGER NOT NULL,                 -- in a row; a decoding that ends takes the row away
    PRIMARY KEY (tar, offset)
) STRICT;
CREATE TABLE IF NOT EXISTS totals (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS sums (                -- over the rows of shards, see SUMS
    split TEXT NOT NULL,
    state TEXT NOT NULL,
    num_shards INTEGER NOT NULL,
    num_bytes INTEGER NOT NULL,
    num_spare_bytes INTEGER NOT NULL,
    num_clips INTEGER NOT NULL,
    num_trained INTEGER NOT NULL,
    num_trained_again INTEGER NOT NULL,
    num_unread INTEGER NOT NULL,
    PRIMARY KEY (split, state)
) STRICT, WITHOUT ROWID;
"""
SCHEMA_VERSION = 2  # one more with each change above: a ledger of another version is refused
TRAIN, ANCHOR, RECENT = "train", "anchor", "recent"

# Columns of `sums`, each with what one shard adds to it. No question about a whole lake reads its shards one by one.
SUMS = {
    "num_shards": "1",
    "num_bytes": "{row}.num_bytes",
    # What makes room where it is needed: shards that nobody holds, with a whole pass in the second-newest checkpoint.
    "num_spare_bytes": "CASE WHEN {row}.num_safe_uses > 0 THEN {row}.num_bytes ELSE 0 END",
    "num_clips": "{row}.num_clips",
    # Used for the first time, and later uses.
    "num_trained": "CASE WHEN {row}.num_uses THEN {row}.num_clips ELSE {row}.num_covered END",
    "num_trained_again": (
        "CASE WHEN {row}.num_uses THEN ({row}.num_uses - 1) * {row}.num_clips + {row}.num_covered ELSE 0 END"
    ),
    "num_unread": "CASE WHEN {row}.num_uses THEN 0 ELSE {row}.num_clips - {row}.num_read END",
}
SUMS_OF_SHARDS = "SELECT split, state, {} FROM shards GROUP BY split, state".format(
    ", ".join(f"sum({share.format(row='shards')})" for share in SUMS.values())
)


def _add_to_sums(row: str, sign: str) -> str:
    """The statement of a trigger that adds a row, OLD or NEW, to the sums, or takes it off."""
    shares = ", ".join(f"{sign}({share.format(row=row)})" for share in SUMS.values())
    added = ", ".join(f"{name} = {name} + excluded.{name}" for name in SUMS)
    return (
        f"INSERT INTO sums VALUES ({row}.split, {row}.state, {shares}) ON CONFLICT (split, state) DO UPDATE SET {added}"
    )


# The sums are kept by the ledger itself, in the transaction of whatever changes a shard: no statement can forget them.
SCHEMA = (
    *TABLES.strip().rstrip(";").split(";\n"),
    f"CREATE TRIGGER IF NOT EXISTS sum_added AFTER INSERT ON shards BEGIN {_add_to_sums('NEW', '+')}; END",
    f"CREATE TRIGGER IF NOT EXISTS sum_gone AFTER DELETE ON shards BEGIN {_add_to_sums('OLD', '-')}; END",
    "CREATE TRIGGER IF NOT EXISTS sum_changed AFTER UPDATE ON shards"
    f" BEGIN {_add_to_sums('OLD', '-')}; {_add_to_sums('NEW', '+')}; END",
)


@dataclass(frozen=True)
class Identity:
    """What makes two lakes the same lake. A run that disagrees in any field is refused."""

    source: str
    revision: str
    seed: int
    clip_samples: int
    shard_clips: int
    val_fraction: float
    """share of the recordings that is held out by hash, as `recent` validation"""
    val_clips: int
    """size of each of the two validation sets, `anchor` and `recent`"""
    num_nodes: int = 1
    node_rank: int = 0


@dataclass(frozen=True)
class Cursor:
    """Where reading stands in one source tar."""

    position: int
    name: str
    num_bytes: int
    offset: int
    next_clip: int
    state: str = "open"
    problem: str | None = None
    keys: bytes = b""
    """of the recordings behind it, 8 bytes each: a key that comes again is not another recording"""


@dataclass(frozen=True)
class Part:
    """One file of a finished shard."""

    split: str
    num_clips: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Shard:
    """A finished shard as a trainer sees it. `covered` holds a bit per clip, least significant first, of the pass after
    `num_uses` whole ones."""

    id: int
    split: str
    path: Path
    num_clips: int
    sha256: str
    covered: bytes
    num_uses: int


@dataclass(frozen=True)
class Books:
    """Where every clip that was ever cut is now. `cut` is counted on its own; the others must add up to it.

    `trained` counts a clip once, however often it is used; every later use of one is in `trained_again`, which is
    outside the sum. A shard with a whole pass behind it is all `trained`, whether it is leased or ready.
    """

    cut: int
    ready: int
    leased: int
    trained: int
    validation: int
    retired_validation: int
    quarantined: int
    trained_again: int

    def __str__(self) -> str:
        cut, *parts, again = asdict(self).items()
        text = f"{cut[1]} clips cut = " + " + ".join(f"{count} {name.replace('_', ' ')}" for name, count in parts)
        return f"{text}; {again[1]} trained again" if again[1] else text

    def balance(self) -> int:
        """Clips that are unaccounted for; 0 unless something is wrong."""
        parts = (self.ready, self.leased, self.trained, self.validation, self.retired_validation, self.quarantined)
        return self.cut - sum(parts)
