"""The clips of a training run, chunk by chunk: from the lake onto the device, as the spectrograms that both models see.

in:   batches of int16 clips from a LakeReader
out:  spectrograms on the device

B clips of a chunk   k clips of a sound
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hear_distill.augment import cut_short
from hear_distill.data import Batch, LakeReader
from hear_distill.frontend import MelPcen
from hear_distill.runlog import StopRequest

ClipId = tuple[int, int]  # (shard, clip)


def pinned_memory(shape: tuple[int, int]) -> np.ndarray:
    """[B, 32000] int16, not filled; the GPU fetches it by itself while we go on."""
    return torch.empty(shape, dtype=torch.int16, pin_memory=True).numpy()


@dataclass
class View:
    """How a run sees its clips: front end, and which of them it cuts short."""

    frontend: MelPcen
    device: torch.device
    seed: int
    pad_share: float
    fetched: torch.cuda.Event | None = None
    """when the GPU has the last samples, whose buffer may then be filled anew"""

    def __call__(self, samples: np.ndarray, ids: Sequence[ClipId]) -> Tensor:
        """[B, 32000] int16 -> [B, 1, 192, 128]; int16 crosses the bus, the rest happens on the device."""
        audio, _ = cut_short(self._fetch(samples), ids, seed=self.seed, share=self.pad_share)
        return self.frontend(audio)

    def long(self, samples: np.ndarray, clips_per_sound: int) -> tuple[Tensor, Tensor]:
        """[B, 32000] int16 -> whole sounds [B / k, 1, 192 k, 128], and their windows [B, 1, 192, 128]; none is cut."""
        audio = self._fetch(samples)
        return self.frontend(audio.view(len(audio) // clips_per_sound, -1)), self.frontend(audio)

    def _fetch(self, samples: np.ndarray) -> Tensor:
        """[B, 32000] int16 -> the same as float, on the device."""
        audio = torch.from_numpy(samples).to(self.device, non_blocking=True)  # [B, 32000] int16
        self.fetched = torch.cuda.current_stream().record_event() if audio.is_cuda else None
        return audio.float() / 32768

    def wait_for_copy(self) -> None:
        """The GPU is at the last chunk then, so it has work while we prepare the next."""
        if self.fetched:
            self.fetched.synchronize()


class Feed:
    """Chunks in the order in which the reader draws them, and patience while there are none."""

    def __init__(self, reader: LakeReader, view: View) -> None:
        self.reader, self.view = reader, view
        self.num_pending = 0
        """clips that were handed out for a step that is not whole yet"""
        self.waited_s = 0.0
        """for data, since this process began"""
        self.num_long = self.num_broken_up = 0
        """clips of longer sounds, and clips that were to be part of one, since these were last taken"""

    def next(self, stop: StopRequest, on_wait: Callable[[], None]) -> Batch | None:
        """The next chunk; None when the lake is drained or we should stop.

        `on_wait` is called, again and again, while the lake is starved. A step that has begun is finished before a stop
        if there is data for it.
        """
        self.view.wait_for_copy()
        began = time.monotonic()
        batch = None
        while batch is None and not (stop and not self.num_pending):
            batch = self.reader.next_batch()
            if batch is None and (stop or self.reader.is_drained()):
                break
            if batch is None:
                on_wait()
        self.waited_s += time.monotonic() - began
        return batch

    def spectrogram(self, batch: Batch) -> Tensor:
        """[B, 1, 192, 128] of a chunk that the present step learns from."""
        self.num_pending += len(batch.ids)
        self.num_broken_up += batch.num_broken_up
        return self.view(batch.samples, batch.ids)

    def long_spectrograms(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What `View.long` makes of a chunk of longer sounds."""
        self.num_pending += len(batch.ids)
        self.num_long += len(batch.ids)
        return self.view.long(batch.samples, batch.clips_per_sound)

    def take_length_counts(self) -> dict[str, int]:
        """Since the last call: clips that were learned from in longer sounds, and clips of sounds that were broken up
        for want of enough of one length."""
        counts = {"long_clips": self.num_long, "broken_up_clips": self.num_broken_up}
        self.num_long = self.num_broken_up = 0
        return counts

    def mark_trained(self, ids: Sequence[ClipId]) -> None:
        """The step is whole; these were its clips."""
        self.reader.mark_trained(ids)
        self.num_pending = 0

    def num_left(self) -> int:
        """Clips of open shards that no step has seen."""
        return self.reader.num_unread() + self.num_pending
