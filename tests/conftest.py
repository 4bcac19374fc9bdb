"""What all tests share: one thread each, for them and their children; two that share a core wait for each other."""

import os
import subprocess

os.environ["OMP_NUM_THREADS"] = "1"

import pytest

from hear_distill.data import Drawing, LakeReader
from hear_distill.files import MIB
from hear_distill.lake import Lake
from hear_distill.locks import Owner


@pytest.fixture
def reader_of():
    """Makes a LakeReader in the role of a process of its own; all are closed at the end."""
    owners, readers = [], []

    def make(lake: Lake, **options) -> LakeReader:
        owners.append(Owner(lake.root, "train"))
        given = {name: options.pop(name) for name in ("state", "allocate") if name in options}
        drawing = Drawing(**{"run": "run", "seed": 1, "num_open": 3, "batch_size": 1, **options})
        readers.append(LakeReader(lake, owners[-1], drawing, **given))
        return readers[-1]

    yield make
    for reader in readers:
        reader.close()
    for owner in owners:
        owner.release()


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs, and a call that gives it another size; skips where mounting is refused."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(num_bytes: int, *options: str) -> "subprocess.CompletedProcess[str]":
        command = ["mount", "-t", "tmpfs", "-o", ",".join([*options, f"size={num_bytes}"]), "small", str(disk)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    mounted = mount(4 * MIB)
    if mounted.returncode:
        pytest.skip(f"mounting is refused: {mounted.stderr.strip()}")
    yield disk, lambda num_bytes: mount(num_bytes, "remount").check_returncode()
    subprocess.run(["umount", "--lazy", str(disk)], check=True)
