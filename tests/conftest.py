"""What all tests share: one thread each, for them and their children; two that share a core wait for each other."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import pytest

from hear_distill.data import Drawing, LakeReader
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
