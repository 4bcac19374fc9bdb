"""The sound of the experiments, held in memory: recordings, endless views of them, and a labelled table to probe with.

in:   a folder of WebDataset tars (<key>.audio.*, <key>.metadata.json with a caption); a Parquet table with folds
out:  spectrograms that teacher and student see; numbers that a linear probe reads from their embeddings

A view is 2 s from a random place of a random recording, half of them mixed with another: a few hundred recordings are
too few to learn from as they are. View i of a seed is the same in every process.

n samples at 16 kHz   B views   r rows of a table, w windows   D width of an embedding   K words
"""

import hashlib
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hear_distill.audio import CLIP_SAMPLES, decode, windows
from hear_distill.eval_datasets import load_dataset
from hear_distill.frontend import MelPcen
from hear_distill.probes import average_precision, choose_and_fit
from hear_distill.tasks import labels_of

MIX_SHARE = 0.5
MIX_DB = 6.0  # the second recording is at most so much louder or quieter
MIN_WORD_COUNT = 8  # recordings that a word must caption, to be worth learning; it has two letters or more
STOP_WORDS = frozenset({"a", "of", "the", "and", "person", "speaking"})
HELD_OUT_SHARE = 0.2
PART = 64  # windows embedded at a time

Embed = Callable[[Tensor], Tensor]  # [B, 1, 192, 128] -> [B, D]


@dataclass(frozen=True)
class Recording:
    """One recording of the source."""

    key: str
    samples: np.ndarray
    """[n] int16, 2 s at least: shorter ones are completed with zeros"""
    words: frozenset[str]
    """of its caption"""


def read_source(folder: Path) -> list[Recording]:
    """All recordings of all tars, by key. Raises ValueError for a folder without any."""
    found: list[Recording] = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}
        audio = {name.split(".")[0]: data for name, data in members.items() if ".audio." in name}
        for key, data in audio.items():
            caption = json.loads(members[f"{key}.metadata.json"])["caption"]
            samples = decode(data)
            samples = np.pad(samples, (0, max(0, CLIP_SAMPLES - len(samples))))
            found.append(Recording(key, samples, frozenset(caption.lower().replace(":", " ").split()) - STOP_WORDS))
    if not found:
        raise ValueError(f"no recordings in the tars of {folder}; expected <key>.audio.mp3 and <key>.metadata.json")
    return sorted(found, key=lambda recording: recording.key)


def group_of(key: str) -> str:
    """What must stay on one side of a split. Takes of one recording differ in a last part of one letter only.

    >>> group_of("esc10-1-187207-A"), group_of("fsdd-theo-007")
    ('esc10-1-187207', 'fsdd-theo-007')
    """
    head, _, last = key.rpartition("-")
    return head if head and len(last) == 1 and last.isalpha() else key


def split(recordings: Sequence[Recording], seed: int) -> tuple[list[Recording], list[Recording]]:
    """To learn from, and held out: a function of the group of each recording alone."""

    def is_held_out(recording: Recording) -> bool:
        text = f"held out {seed} {group_of(recording.key)}"
        score = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) / 2**64
        return score < HELD_OUT_SHARE

    return [r for r in recordings if not is_held_out(r)], [r for r in recordings if is_held_out(r)]


def vocabulary(recordings: Iterable[Recording]) -> list[str]:
    """Words that caption enough recordings, in alphabetical order."""
    counts = Counter(word for recording in recordings for word in recording.words)
    return sorted(word for word, count in counts.items() if count >= MIN_WORD_COUNT and len(word) > 1)


def view(recordings: Sequence[Recording], seed: int, index: int) -> tuple[np.ndarray, frozenset[str]]:
    """View `index` of a seed: [32000] float32 of full scale 1, and the words that caption what is in it."""
    rng = np.random.default_rng([seed, index])
    sound, words = _crop(recordings, rng)
    if rng.random() < MIX_SHARE:
        other, more = _crop(recordings, rng)
        level, other_level = (np.sqrt(np.mean(x**2, dtype=np.float64)) for x in (sound, other))
        gain = 10 ** (rng.uniform(-MIX_DB, MIX_DB) / 20)
        if level > 0 and other_level > 0:
            sound = sound + np.float32(gain * level / other_level) * other
            words = words | more
    return sound, words


def _crop(recordings: Sequence[Recording], rng: np.random.Generator) -> tuple[np.ndarray, frozenset[str]]:
    recording = recordings[rng.integers(len(recordings))]
    start = rng.integers(len(recording.samples) - CLIP_SAMPLES + 1)
    return recording.samples[start : start + CLIP_SAMPLES].astype(np.float32) / 32768, recording.words


def views(recordings: Sequence[Recording], seed: int, indices: Iterable[int]) -> tuple[Tensor, list[frozenset[str]]]:
    """[B, 32000] float32, and the words of each."""
    found = [view(recordings, seed, index) for index in indices]
    return torch.from_numpy(np.stack([sound for sound, _ in found])), [words for _, words in found]


def whole_clips(recordings: Iterable[Recording]) -> Tensor:
    """[B, 32000] float32: every recording as it is, in windows of 2 s, a new one each second."""
    parts = np.concatenate([windows(recording.samples) for recording in recordings])
    return torch.from_numpy(parts).float() / 32768


class Probe:
    """A table and its test fold: what a linear probe of the other folds reads there from an embedding."""

    def __init__(self, path: Path, test_fold: str, every: int = 1) -> None:
        """Reads the table at `path`, and of each row one window in `every`. Raises ValueError if it lacks the fold."""
        table = load_dataset(f"table={path}")
        folds = table.splits["folds"].parts if "folds" in table.splits else np.array([""])
        if test_fold not in folds:
            raise ValueError(f"{path} has no fold {test_fold!r}; expected a column fold that holds it")
        self.labels, self.groups, self.is_test = labels_of(table), table.groups, folds == test_fold
        audio = {row: data for (row,), data in table.read()}
        cut = [windows(decode(audio[row]))[::every] for row in range(len(folds))]
        self.row_of_window = torch.from_numpy(np.repeat(np.arange(len(cut)), [len(part) for part in cut]))  # [w]
        self.spectrograms = spectrograms(torch.from_numpy(np.concatenate(cut)).float() / 32768)  # [w, 1, 192, 128]

    def test_spectrograms(self) -> Tensor:
        """[B, 1, 192, 128] of the windows of the test fold."""
        return self.spectrograms[torch.from_numpy(self.is_test)[self.row_of_window]]

    def embeddings(self, embed: Embed) -> np.ndarray:
        """[r, D]: the mean over the windows of each row."""
        found = embed_all(embed, self.spectrograms).double()  # [w, D]
        sums = found.new_zeros(len(self.labels), found.shape[1]).index_add_(0, self.row_of_window, found)
        return (sums / torch.bincount(self.row_of_window)[:, None]).numpy()

    def measure(self, embed: Embed, seed: int = 0) -> dict[str, float]:
        """`map`: mean average precision over the labels; `accuracy`: share whose own label has the highest score."""
        features = self.embeddings(embed)
        train, test = ~self.is_test, self.is_test
        names = np.unique(self.labels)
        scores, precisions = [], []
        for name in names:
            is_positive = self.labels == name
            fitted = choose_and_fit(features[train], is_positive[train], self.groups[train], seed)
            scores.append(fitted.decision_function(features[test]))
            once = np.ones((1, int(test.sum())), dtype=int)
            precisions.append(average_precision(is_positive[test], scores[-1], once).item())
        is_right = names[np.argmax(scores, axis=0)] == self.labels[test]
        return {"map": float(np.mean(precisions)), "accuracy": float(is_right.mean())}


def spectrograms(samples: Tensor) -> Tensor:
    """[B, 32000] float32 -> [B, 1, 192, 128]"""
    frontend = MelPcen()
    return torch.cat([frontend(part) for part in samples.split(PART)])


@torch.no_grad()
def embed_all(embed: Embed, spectrogram: Tensor) -> Tensor:
    """[B, 1, 192, 128] -> [B, D], part by part."""
    return torch.cat([embed(part) for part in spectrogram.split(PART)])


def effective_rank(embeddings: Tensor) -> float:
    """[n, D] -> `entropy_rank` of the eigenvalues of the centred covariance."""
    centred = embeddings.double() - embeddings.double().mean(dim=0)
    return entropy_rank(torch.linalg.svdvals(centred).square())


def entropy_rank(eigenvalues: Tensor) -> float:
    """[D] -> exp of the entropy of p, p = eigenvalues over their sum (Roy and Vetterli 2007).

    From 1, all on a line, to their number, alike in all directions.
    """
    p = eigenvalues[eigenvalues > 0] / eigenvalues.sum()
    return float(torch.exp(-(p * p.log()).sum()))
