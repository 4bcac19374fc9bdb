"""What all tests share: one thread each, for them and their children; two that share a core wait for each other."""

import os
import subprocess

os.environ["OMP_NUM_THREADS"] = "1"

import shutil
from pathlib import Path

import pytest
from lake_tools import stream, write_source
from train_tools import SMALL_SHARDS, Training

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


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    return write_source(tmp_path_factory.mktemp("source"), num_tars=3, recordings_per_tar=14)


@pytest.fixture(scope="session")
def full_lake(tmp_path_factory, source) -> Path:
    """The whole source, cut; never trained from, only copied."""
    lake = tmp_path_factory.mktemp("lake")
    assert stream(source, lake, *SMALL_SHARDS).returncode == 0
    return lake


@pytest.fixture(scope="session")
def teacher(tmp_path_factory) -> Path:
    from hear_distill.teacher import save_stand_in  # transformers, which most tests do not need

    return save_stand_in(tmp_path_factory.mktemp("teacher"), seed=0)


@pytest.fixture
def training(tmp_path, full_lake, teacher):
    """Begin a training of its own on a copy of the lake; keyword arguments are flags that differ from TINY."""

    def begin(**flags) -> Training:
        shutil.copytree(full_lake, tmp_path / "lake")
        return Training(tmp_path / "run", tmp_path / "lake", teacher).but(**flags)

    return begin


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory, full_lake, teacher):
    """A run that nothing disturbed, until the lake was drained, and how it ended."""
    folder = tmp_path_factory.mktemp("unbroken")
    shutil.copytree(full_lake, folder / "lake")
    whole = Training(folder / "run", folder / "lake", teacher, is_drawn=True)
    return whole, whole.run()
