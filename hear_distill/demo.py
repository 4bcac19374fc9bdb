"""What the demo needs and no stranger has: recordings, in tars and plain, a teacher, a labelled table. Made if missing.

in:   nothing: no network, no account
out:  demo/source/*.tar, demo/teacher/, demo/events.parquet, demo/recordings/*.flac; the same bytes wherever the
      libraries are the same
"""

import shutil
from pathlib import Path

from hear_distill.synthetic import write_recordings, write_source, write_table

DEMO = Path("demo")
SOURCE = DEMO / "source"
TEACHER = DEMO / "teacher"
TABLE = DEMO / "events.parquet"
RECORDINGS = DEMO / "recordings"
SEED = 0
NUM_TARS = 12
RECORDINGS_PER_TAR = 120  # about 3,900 clips in all: more than twice what the demo's lake can hold
ROWS_PER_LABEL = 60
RECORDINGS_PER_LABEL = 6


def prepare(path: str | Path) -> None:
    """Make `path` if it is one of the demo's own inputs and is not there; any other path is left alone."""
    path = Path(path)
    if path == SOURCE and not path.exists():
        print(f"making {NUM_TARS} tars of synthetic recordings in {path}")
        write_source(path, NUM_TARS, RECORDINGS_PER_TAR, SEED)
    if path == TABLE and not path.exists():
        print(f"making {path}, a table of labelled synthetic sounds")
        write_table(path, ROWS_PER_LABEL, SEED)
    if path == RECORDINGS and not path.exists():
        print(f"making {path}, a folder of synthetic recordings")
        write_recordings(path, RECORDINGS_PER_LABEL, SEED)
    if path == TEACHER and not path.exists():
        from hear_distill.teacher import save_stand_in  # torch and transformers, which the streamers must not load

        print(f"making {path}, a stand-in teacher: HeAR's architecture, small, with random weights")
        building = path.with_name(path.name + ".tmp")
        shutil.rmtree(building, ignore_errors=True)  # what a killed run left
        save_stand_in(building, SEED)
        building.rename(path)
