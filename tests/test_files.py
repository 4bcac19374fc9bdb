"""Files are whole or absent, and crash points kill where they are asked to."""

import json
import signal
import sys

import numpy as np
import pytest
from lake_tools import run, run_python
from lossy_disk import on_lossy_disk

from hear_distill.files import CRASH_POINTS, atomic_write, gib, write_json

WRITE_AND_DIE = """
import os, signal, sys
from pathlib import Path
from hear_distill.files import atomic_write
with atomic_write(Path(sys.argv[1])) as f:
    f.write(b"half of the new")
    f.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""
MAKE_AND_DIE = """
import os, signal, sys
from pathlib import Path
from hear_distill.files import write_json
from hear_distill.locks import Owner, alone
from lake_tools import make_lake
folder = Path(sys.argv[1]) / "new" / "deep"
lock = alone(folder / "lock", "held")
{make}
os.kill(os.getpid(), signal.SIGKILL)
"""
PASS_POINTS = """
from hear_distill.files import CRASH_POINTS, crash_point
for name in CRASH_POINTS:
    print(name, flush=True)
    crash_point(name)
"""


def test_an_exception_while_writing_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "latest.json"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as f:
        f.write(b"half of the new")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_kill_while_writing_leaves_the_old_file_and_the_next_write_replaces_it(tmp_path):
    path = tmp_path / "latest.json"
    path.write_bytes(b"old")
    assert run_python(WRITE_AND_DIE, path).returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    with atomic_write(path) as f:
        f.write(b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_readers_see_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "deep" / "folder" / "file"
    with atomic_write(path) as f:
        f.write(b"first")
        assert not path.exists()
    with atomic_write(path) as f:
        f.write(b"second")
        f.flush()
        assert path.read_bytes() == b"first"
    assert path.read_bytes() == b"second"


@pytest.mark.parametrize(
    ("make", "made"),
    [
        ("write_json(folder / 'run' / 'config.json', 1)", ["run/config.json"]),
        ("lock.__enter__()", ["."]),
        ("owner = Owner(folder, 'train')", ["owners"]),
        ("make_lake(folder)", ["shards", "val", "owners", "quarantine"]),
    ],
)
def test_a_new_folder_survives_a_power_cut_and_so_does_what_is_made_durable_in_it_later(tmp_path, make, made):
    command = [sys.executable, "-c", MAKE_AND_DIE.format(make=make), str(tmp_path)]
    assert run(on_lossy_disk(command, tmp_path, "everything")).returncode == -signal.SIGKILL
    assert [name for name in made if not (tmp_path / "new" / "deep" / name).exists()] == []


@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), np.float64("nan"), np.float32("nan"), {1}], ids=repr)
def test_json_that_other_readers_refuse_is_not_written(tmp_path, bad):
    path = tmp_path / "status.json"
    write_json(path, {"loss": 0.5, "path": tmp_path})
    with pytest.raises((ValueError, TypeError)):
        write_json(path, {"loss": bad})
    assert json.loads(path.read_text()) == {"loss": 0.5, "path": str(tmp_path)}


@pytest.mark.parametrize("name", ["shard-reserved", "shard-renamed", "shard-retired"])
def test_a_crash_point_kills_at_its_name_and_nowhere_before(name):
    died = run_python(PASS_POINTS, crash_at=name)
    passed = list(CRASH_POINTS)[: list(CRASH_POINTS).index(name) + 1]
    assert (died.returncode, died.stdout.split()) == (-signal.SIGKILL, passed)


def test_without_being_asked_no_crash_point_kills():
    whole = run_python(PASS_POINTS)
    assert (whole.returncode, whole.stdout.split()) == (0, list(CRASH_POINTS))


def test_an_unknown_crash_point_is_our_own_mistake_and_found_at_once():
    died = run_python("from hear_distill.files import crash_point; crash_point('shard-renamd')")
    assert died.returncode == 1
    assert "shard-renamd is not in CRASH_POINTS" in died.stderr


@pytest.mark.parametrize(("num_bytes", "text"), [(3 * 2**29, "1.50 GiB"), (96 * 2**20, "96.0 MiB"), (0, "0.0 MiB")])
def test_sizes_are_said_in_binary_units(num_bytes, text):
    assert gib(num_bytes) == text
