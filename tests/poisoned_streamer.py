"""The streamer with a decoder that dies of some recordings, as C code may: those whose sound holds POISON.

python tests/poisoned_streamer.py --source DIR --lake lake
"""

import os
import runpy
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from lake_tools import STREAMER, encoded, members_of, noise, write_tar

from hear_distill import cutter

POISONED_STREAMER = Path(__file__)
POISON = b"of this sound decoders die"
decode_blocks = cutter.decode_blocks


def decode_or_die(audio: bytes) -> Iterator[np.ndarray]:
    """As the real one, for all other recordings."""
    if POISON in audio:
        os.kill(os.getpid(), signal.SIGSEGV)
    return decode_blocks(audio)


def poisoned(samples: bytes) -> bytes:
    """A WAV file with POISON in its sound."""
    return samples[:200] + POISON + samples[200 + len(POISON) :]


def write_poisoned_source(folder: Path, poison: dict[int, tuple[int, ...]]) -> Path:
    """Tars of six recordings of 5 s; those at `poison[tar]` kill the decoder of tests/poisoned_streamer.py."""
    for tar in range(3):
        members = []
        for index in range(6):
            audio = encoded(noise(80_000, tar, index))
            members += members_of(f"rec-{tar}-{index}", poisoned(audio) if index in poison.get(tar, ()) else audio)
        write_tar(folder / f"{tar}.tar", members)
    return folder


if __name__ == "__main__":
    cutter.decode_blocks = decode_or_die
    sys.argv[0] = str(STREAMER)
    runpy.run_path(str(STREAMER), run_name="__main__")
