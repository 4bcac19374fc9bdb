"""What of a recording is embedded, and how the pieces become one embedding.

in:   recordings, each of them decoded once for all embedders, and the name of a protocol
out:  one embedding per recording and embedder: the mean over the pieces, weighted by their length

n samples of a recording   p pieces of it   B images of one shape in a batch   W width of an embedding
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from hear_distill.audio import CLIP_SAMPLES, SAMPLE_RATE, windows
from hear_distill.embedders import Embedder
from hear_distill.files import UserError
from hear_distill.frontend import CLIP_ROWS, NUM_MELS

PEAK_SAMPLES, PEAK_HOP_SAMPLES = 800, 160  # 50 ms, one every 10 ms
CHUNK_SAMPLES = 30 * SAMPLE_RATE  # the longest forward; FSD50K, whose clips are no longer, is never cut
FULL_SCALE = 32768


class Protocol(NamedTuple):
    """How a recording [n] int16 with n > 0 becomes pieces, p arrays, and these images."""

    cut: Callable[[np.ndarray], Sequence[np.ndarray]]
    text: str
    """what decides the numbers, for tables and for the key of a cache: a changed rule is a changed text"""
    is_squeezed: bool = False
    """each piece is resized to the image of a clip of 2 s"""


def peak_middle(samples: np.ndarray) -> int:
    """The sample in the middle of the loudest 50 ms.

    Loudest is the largest mean square of 50 ms, of which one begins every 10 ms; the first, if several are equal. Sums
    are of integers, so that this is the same on every machine.
    """
    energy = np.concatenate([[0], np.cumsum(samples.astype(np.int64) ** 2)])  # [n + 1]; 2^63 is 97 hours of full scale
    starts = np.arange(0, max(len(samples) - PEAK_SAMPLES, 0) + 1, PEAK_HOP_SAMPLES)
    ends = np.minimum(starts + PEAK_SAMPLES, len(samples))
    return int(starts[np.argmax(energy[ends] - energy[starts])]) + PEAK_SAMPLES // 2


def peak_start(samples: np.ndarray) -> int:
    """Where the window of 2 s begins that has the loudest 50 ms in its middle, as far as the recording allows."""
    return _inside(peak_middle(samples) - CLIP_SAMPLES // 2, samples)


def centre_start(samples: np.ndarray) -> int:
    """Where the middle 2 s begin; of an odd number of samples too many, the smaller half goes before."""
    return _inside((len(samples) - CLIP_SAMPLES) // 2, samples)


def _inside(start: int, samples: np.ndarray) -> int:
    """The nearest start of a window that lies inside the recording."""
    return min(max(start, 0), max(len(samples) - CLIP_SAMPLES, 0))


def one_window(samples: np.ndarray, start: int) -> list[np.ndarray]:
    """[n] -> one piece [32000], completed with zeros at its end."""
    piece = samples[start : start + CLIP_SAMPLES]
    return [np.pad(piece, (0, CLIP_SAMPLES - len(piece)))]


def chunks(samples: np.ndarray) -> list[np.ndarray]:
    """[n] -> pieces of 30 s, back to back, and what is left."""
    return [samples[start : start + CHUNK_SAMPLES] for start in range(0, len(samples), CHUNK_SAMPLES)]


PROTOCOLS = {
    "event-peak": Protocol(
        lambda samples: one_window(samples, peak_start(samples)),
        "one window of 2 s around the loudest 50 ms (one begins every 10 ms), inside the recording; zeros at the end "
        "of a shorter one",
    ),
    "event-centre": Protocol(
        lambda samples: one_window(samples, centre_start(samples)),
        "the middle 2 s; zeros at the end of a shorter recording",
    ),
    "windows": Protocol(windows, "2 s, one every second, the last flush with the end; an embedding is their mean"),
    "full": Protocol(
        chunks,
        "the whole recording in one forward, at its own length; of more than 30 s, the mean of chunks of 30 s and the "
        "rest, weighted by length; HeAR's grid of positions is stretched linearly along time",
    ),
    "squeeze": Protocol(
        lambda samples: [samples],
        "the frames of the whole recording, resized bilinearly to the 192 of a clip of 2 s",
        is_squeezed=True,
    ),
}


@dataclass
class _Group:
    """Embedders that share a front end: an image is made once for all, and waits for others of its shape.

    Waiting are less than `batch_size` clips of 2 s, or as much in longer images, for each of the at most 57 lengths
    that a piece of 30 s may have. A baseline's images are its embeddings, and all of one shape.
    """

    embedders: list[Embedder]
    batch_size: int
    is_squeezed: bool
    totals: dict[str, np.ndarray]
    """[rows, W] by embedder: what of each row was embedded, times its length"""
    waiting: dict[tuple[int, ...], list[tuple[int, int, Tensor]]] = field(default_factory=lambda: defaultdict(list))
    """row, length and image, by the shape of the image"""

    def add(self, row: int, pieces: Sequence[np.ndarray]) -> None:
        """Make the images of p pieces of one row. Those of one length are made together."""
        of_length = defaultdict(list)
        for piece in pieces:
            of_length[len(piece)].append(piece)
        for length, alike in of_length.items():
            per_call = max(1, self.batch_size * CLIP_SAMPLES // length)
            for first in range(0, len(alike), per_call):
                for image in self.images(alike[first : first + per_call]):
                    self.wait(row, length, image)

    def images(self, pieces: Sequence[np.ndarray]) -> Tensor:
        """B pieces [n] int16 of one length -> [B, ...]"""
        one = self.embedders[0]
        audio = torch.from_numpy(np.stack(pieces)).to(one.device).float() / FULL_SCALE  # [B, n], as the trainer does
        return one.frontend.squeezed(audio) if self.is_squeezed else one.frontend(audio)

    def wait(self, row: int, length: int, image: Tensor) -> None:
        """Embed all images of this shape once they are as large as a batch of windows of 2 s."""
        alike = self.waiting[tuple(image.shape)]
        alike.append((row, length, image))
        num_windows = max(1, image.numel() // (CLIP_ROWS * NUM_MELS))
        if len(alike) * num_windows >= self.batch_size:
            self.embed(self.waiting.pop(tuple(image.shape)))

    def embed(self, alike: Sequence[tuple[int, int, Tensor]]) -> None:
        """Add B embeddings to the totals of their rows."""
        rows, lengths, images = zip(*alike, strict=True)
        batch = torch.stack(images)  # [B, ...]
        for embedder in self.embedders:
            embeddings = embedder.model(batch).double().cpu().numpy()  # [B, W]
            np.add.at(self.totals[embedder.name], list(rows), np.array(lengths)[:, None] * embeddings)

    def finish(self) -> None:
        """Embed what still waits."""
        while self.waiting:
            self.embed(self.waiting.popitem()[1])


@torch.inference_mode()
def embed(
    embedders: Sequence[Embedder],
    protocol: str,
    recordings: Iterable[tuple[int, np.ndarray]],
    num_rows: int,
    *,
    batch_size: int = 64,
) -> dict[str, np.ndarray]:
    """Embed recordings as they come: none is held longer than its images.

    Args:
        recordings: (row, samples [n] int16 at 16 kHz), in any order, each row once at most.
        num_rows: of the result; rows that no recording has stay NaN.
        batch_size: clips of 2 s in one forward, or as much sound in longer ones; it moves numbers by rounding only.

    Returns:
        [num_rows, W] float64 by the embedder's name.

    Raises:
        ValueError: two embedders of one name, an unknown protocol, a row that is none or was seen, samples that are no
            sound of this kind.
        UserError: an embedding is not finite.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol {protocol!r}, expected one of {', '.join(PROTOCOLS)}")
    if len({embedder.name for embedder in embedders}) < len(embedders):
        raise ValueError(f"embedders need names of their own, got {[embedder.name for embedder in embedders]}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    cut, _, is_squeezed = PROTOCOLS[protocol]
    totals = {embedder.name: np.zeros((num_rows, embedder.width)) for embedder in embedders}
    sharing: dict[tuple[type, str], list[Embedder]] = defaultdict(list)
    for embedder in embedders:
        sharing[type(embedder.frontend), embedder.device].append(embedder)
    groups = [_Group(members, batch_size, is_squeezed, totals) for members in sharing.values()]

    lengths = np.zeros(num_rows, dtype=np.int64)  # of all pieces; 0 where nothing was seen
    for row, samples in tqdm(recordings, desc=f"embedding, {protocol}", total=num_rows, unit="row", disable=None):
        _check(row, samples, lengths)
        pieces = cut(samples)
        lengths[row] = sum(map(len, pieces))
        for group in groups:
            group.add(row, pieces)
    for group in groups:
        group.finish()
    is_seen = lengths > 0
    return {name: _means(name, total, lengths, is_seen) for name, total in totals.items()}


def _check(row: int, samples: np.ndarray, lengths: np.ndarray) -> None:
    if not 0 <= row < len(lengths) or lengths[row]:
        raise ValueError(f"row {row} came twice, or is none of {len(lengths)}; every row has one recording at most")
    if samples.ndim != 1 or samples.dtype != np.int16 or len(samples) == 0:
        raise ValueError(
            f"row {row} is {samples.dtype} of shape {samples.shape}, expected [samples] int16, at least one; "
            f"leave out what cannot be decoded, and count it"
        )


def _means(name: str, total: np.ndarray, lengths: np.ndarray, is_seen: np.ndarray) -> np.ndarray:
    """[num_rows, W] -> the same, divided by the lengths [num_rows]; NaN where nothing was seen, and nowhere else."""
    means = np.full_like(total, np.nan)
    means[is_seen] = total[is_seen] / lengths[is_seen, None]
    if not np.isfinite(means[is_seen]).all():
        raise UserError(f"embeddings of {name} are not finite; its weights are broken, name another one")
    return means
