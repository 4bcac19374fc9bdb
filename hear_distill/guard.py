"""A recording that kills the process that decodes it, three times in a row, is not decoded a fourth time.

in:   what a worker is about to decode
out:  a note in the worker's own lock file, which the kernel keeps when the process dies; `Lake.sweep` counts it

A decoder is C code that reads what strangers wrote: it may crash, or take all memory, or hang until the supervisor
kills it. The note costs two small writes for each decoding, 11 us together; a row in the ledger would cost 4 ms
(measured on an idle two-core machine with a solid-state disk, tests/test_guard.py does not time it).
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from hear_distill.audio import DecodeError
from hear_distill.lake import Lake
from hear_distill.locks import Owner
from hear_distill.tars import Recording

MAX_DEATHS = 3


class Guard:
    """What one worker notes, and what is known of the tars that it reads."""

    def __init__(self, lake: Lake, owner: Owner) -> None:
        self.lake, self.owner = lake, owner
        self.suspects: dict[str, dict[int, int]] = {}

    def open_tar(self, tar: str) -> None:
        """Look up what is known of a tar; nobody else reads it as long as this worker holds its cursor."""
        self.suspects[tar] = self.lake.suspects(tar)

    def is_poison(self, tar: str, recording: Recording) -> bool:
        """Whether this recording has killed too many workers."""
        num_deaths = self.suspects[tar].get(recording.offset, 0)
        if num_deaths < MAX_DEATHS:
            return False
        print(
            f"WARNING: {recording.key} of {tar} killed its decoder {num_deaths} times and is passed over",
            file=sys.stderr,
        )
        return True

    @contextmanager
    def decoding(self, tar: str, recording: Recording) -> Iterator[None]:
        """While this lasts, the death of the process is held against the recording. One that is refused is acquitted.

        One that comes to a good end is not: a long recording is decoded in several blocks, the first of which may be
        harmless each time. `acquit` tells when the last of them is over.
        """
        self.owner.note(json.dumps([tar, recording.offset, recording.key]))
        try:
            try:
                yield
            finally:
                self.owner.note("")
        except DecodeError:
            self.acquit(tar, recording)
            raise

    def acquit(self, tar: str, recording: Recording) -> None:
        """This recording was decoded as far as anybody wants it, or refused, and the process lives."""
        if self.suspects[tar].pop(recording.offset, 0):
            self.lake.acquit(tar, recording.offset)
