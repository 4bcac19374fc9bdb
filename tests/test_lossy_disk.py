"""The disk of tests/lossy_disk.py loses what was not fsynced, all of it, and nothing else."""

import signal
import sys
from pathlib import Path

import pytest
from lake_tools import run
from lossy_disk import on_lossy_disk

CRASH = """
import os, sys
from pathlib import Path
from hear_distill.files import crash_point, fsync_folder
folder = Path(sys.argv[1])

def write(name, text, mode="w", is_synced=True):
    with open(folder / name, mode) as f:
        f.write(text)
        f.flush()
        if is_synced:
            os.fsync(f.fileno())

{act}
os.environ["HEAR_CRASH_AT"] = "shard-ready"
crash_point("shard-ready")
"""


def after(folder: Path, act: str, lost: str) -> dict[str, str]:
    """What stands below `folder` once `act` was done and the power went: the content of each file by name."""
    command = [sys.executable, "-c", CRASH.format(act=act), str(folder)]
    process = run(on_lossy_disk(command, folder, lost))
    assert process.returncode == -signal.SIGKILL, process.stderr
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with one file that has been on the disk for long."""
    (tmp_path / "old").write_text("old")
    return tmp_path


ACTS = {  # what was done -> what stands if everything is lost, and if contents are lost and names are not
    "nothing": ("pass", {"old": "old"}, {"old": "old"}),
    "made, nothing synced": ("write('new', 'new', is_synced=False)", {"old": "old"}, {"old": "old", "new": ""}),
    "made, content synced": ("write('new', 'new')", {"old": "old"}, {"old": "old", "new": "new"}),
    "made, folder synced": (
        "write('new', 'new', is_synced=False)\nfsync_folder(folder)",
        *[{"old": "old", "new": ""}] * 2,
    ),
    "made, both synced": ("write('new', 'new')\nfsync_folder(folder)", *[{"old": "old", "new": "new"}] * 2),
    "made, synced half way": (
        "write('new', 'a')\nwrite('new', 'b', 'a', is_synced=False)\nfsync_folder(folder)",
        *[{"old": "old", "new": "a"}] * 2,
    ),
    "overwritten": ("write('old', 'new', is_synced=False)", {"old": "old"}, {"old": ""}),
    "overwritten, content synced": ("write('old', 'new')", *[{"old": "new"}] * 2),
    "appended": ("write('old', 'er', 'a', is_synced=False)", *[{"old": "old"}] * 2),
    "renamed": ("(folder / 'old').rename(folder / 'new')", {"old": "old"}, {"new": "old"}),
    "renamed, folder synced": ("(folder / 'old').rename(folder / 'new')\nfsync_folder(folder)", *[{"new": "old"}] * 2),
    "replaced": ("write('new', 'new')\nos.replace(folder / 'new', folder / 'old')", {"old": "old"}, {"old": "new"}),
    "replaced, only the folder synced": (
        "write('new', 'new', is_synced=False)\nos.replace(folder / 'new', folder / 'old')\nfsync_folder(folder)",
        *[{"old": ""}] * 2,
    ),
    "linked": ("os.link(folder / 'old', folder / 'new')", {"old": "old"}, {"old": "old", "new": "old"}),
    "deleted": ("(folder / 'old').unlink()", {"old": "old"}, {}),
    "deleted, folder synced": ("(folder / 'old').unlink()\nfsync_folder(folder)", {}, {}),
    "deleted, and others made": (
        "(folder / 'old').unlink()\nfor i in range(5): write(f'new {i}', 'new')",
        {"old": "old"},
        {f"new {i}": "new" for i in range(5)},
    ),
    "moved, only the folder it left synced": (
        "(folder / 'sub').mkdir()\nfsync_folder(folder)\n(folder / 'old').rename(folder / 'sub' / 'old')\n"
        "fsync_folder(folder)",
        {},
        {"sub/old": "old"},
    ),
    "made in a new folder that its own folder does not know": (
        "(folder / 'sub').mkdir()\nwrite('sub/new', 'new')\nfsync_folder(folder / 'sub')",
        {"old": "old"},
        {"old": "old", "sub/new": "new"},
    ),
    "a ledger": (
        "write('ledger.sqlite-wal', 'commit', is_synced=False)",
        *[{"old": "old", "ledger.sqlite-wal": "commit"}] * 2,
    ),
}


@pytest.mark.parametrize("act", ACTS)
def test_what_was_not_synced_is_lost_and_what_was_stays(folder, act):
    code, expected, _ = ACTS[act]
    assert after(folder, code, "everything") == expected


@pytest.mark.parametrize("act", ACTS)
def test_contents_that_were_not_synced_are_lost_and_names_stay(folder, act):
    code, _, expected = ACTS[act]
    assert after(folder, code, "contents") == expected


def test_a_process_that_ends_well_loses_nothing(folder):
    code = "import sys; from pathlib import Path; Path(sys.argv[1], 'new').write_text('new')"
    assert run(on_lossy_disk([sys.executable, "-c", code, str(folder)], folder, "everything")).returncode == 0
    assert (folder / "new").read_text() == "new"
