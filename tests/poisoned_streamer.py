"""The streamer with a decoder that dies of some recordings, as C code may: those whose sound holds POISON.

python tests/poisoned_streamer.py --source DIR --lake lake
"""

import os
import runpy
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
from lake_tools import STREAMER, encoded, members_of, noise, write_tar

from hear_distill import cutter

POISONED_STREAMER = Path(__file__)
POISON, LATE_POISON = b"of this sound decoders die", b"and of this when they hear it twice"
LONG_S, HELD_S = 20, 10  # of a recording that is decoded twice, and the limit of those that are not
decode_blocks = cutter.decode_blocks
heard: Counter[bytes] = Counter()


def decode_or_die(audio: bytes) -> Iterator[np.ndarray]:
    """As the real one, for all other recordings."""
    if POISON in audio:
        os.kill(os.getpid(), signal.SIGSEGV)
    heard[audio] += 1
    for i, block in enumerate(decode_blocks(audio)):
        if i and heard[audio] > 1 and LATE_POISON in audio:  # behind the first clips
            os.kill(os.getpid(), signal.SIGSEGV)
        yield block


def poisoned(samples: bytes, poison: bytes) -> bytes:
    """A WAV file with `poison` in its sound."""
    return samples[:200] + poison + samples[200 + len(poison) :]


def write_poisoned_source(
    folder: Path, poison: dict[int, tuple[int, ...]], long: Mapping[int, int] = MappingProxyType({})
) -> Path:
    """Tars of six recordings of 5 s; those at `poison[tar]` kill the decoder of tests/poisoned_streamer.py.

    The one at `long[tar]` has 20 s, and kills it behind its first two clips when it is decoded again.
    """
    for tar in range(3):
        members = []
        for index in range(6):
            audio = encoded(noise(80_000, tar, index))
            if index in poison.get(tar, ()):
                audio = poisoned(audio, POISON)
            elif index == long.get(tar):
                audio = poisoned(encoded(noise(16_000 * LONG_S, tar, index)), LATE_POISON)
            members += members_of(f"rec-{tar}-{index}", audio)
        write_tar(folder / f"{tar}.tar", members)
    return folder


if __name__ == "__main__":
    cutter.decode_blocks = decode_or_die
    cutter.HELD_SAMPLES = 16_000 * HELD_S
    sys.argv[0] = str(STREAMER)
    runpy.run_path(str(STREAMER), run_name="__main__")
