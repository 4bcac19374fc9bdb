"""Whether what streams in now is still what streamed in at first: one number for each thing that may drift.

in:   statistics of shards, as streamers note them in the ledger
out:  drift_of: name -> number, NaN where there is too little to tell; warnings_of: what is beyond its threshold

The reference is the first shards of the lake, the current window the newest; up to fifty each, and never the same
ones. Each number is the size of an effect, not its significance: among thousands of recordings any difference is
significant, and few matter. What chance alone gives among as many recordings is taken off.

A shard that was cut while fewer tars were open than were wanted is in neither: at the end of a source no other is left
to open, and what comes out of the last ones is bound to be unlike the rest. Nor is the anchor, which is no draw of the
stream but the heads of many tars.

b bins or families   D components: octave bands, or those of an embedding
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

WINDOW_SHARDS = 50
MIN_RECORDINGS = 100  # in each window; with fewer, chance comes near the thresholds
PSEUDO_COUNT = 0.5  # in every bin: one that only one window has would be infinitely surprising

# What lies above has drifted. A stability index of 0.25 is called a major shift where units are independent (credit
# scoring). Here they come out of tars that have an order of their own: eight tars side by side give up to 0.5, the same
# tars, sorted by class and read one after another, 1.5 to 2.4 (0.87 h of real sound in shards of 16 to 64 clips, the
# largest value on the way). There the bands reach 0.35 and 0.7 to 0.8; half a standard deviation is a medium effect
# (Cohen 1988). The others are factors of two.
THRESHOLDS = {"level": 0.75, "bands": 0.5, "source": 0.75, "mixing": 0.5, "length": 1.0, "embedding": 0.5}
MEANING = {
    "level": "the clips are louder or quieter (stability index)",
    "bands": "the clips sound brighter, darker, louder or quieter (standard deviations of a clip)",
    "source": "other families of tars are read (stability index)",
    "mixing": "a shard is mixed from fewer tars (share that is missing)",
    "length": "a recording gives more or fewer clips (factors of two)",
    "embedding": "the teacher hears something else (standard deviations of a clip)",
}


@dataclass(frozen=True)
class Moments:
    """Mean and variance of some vectors; of two samples together by `+`."""

    count: int
    mean: np.ndarray
    """[D]"""
    variance: float
    """mean squared distance from the mean: the trace of the covariance"""

    @classmethod
    def of(cls, values: np.ndarray) -> Self:
        """[n, D], n >= 1, in float64."""
        values = np.asarray(values, np.float64)
        mean = values.mean(axis=0)
        return cls(len(values), mean, float(((values - mean) ** 2).sum(axis=1).mean()))

    def __add__(self, other: "Moments") -> "Moments":
        count = self.count + other.count
        mean = (self.count * self.mean + other.count * other.mean) / count
        squares = self.count * (self.variance + float(((self.mean - mean) ** 2).sum()))
        squares += other.count * (other.variance + float(((other.mean - mean) ** 2).sum()))
        return Moments(count, mean, squares / count)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, with two decimals: for levels in dB."""
        return {"count": self.count, "mean": self.mean.round(2).tolist(), "variance": round(self.variance, 2)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Back from `to_json`."""
        return cls(content["count"], np.array(content["mean"]), content["variance"])


def shift_of(reference: Moments, current: Moments, chance: float) -> float:
    """How far the mean has moved, in standard deviations (over all components) of a vector of the reference.

    Args:
        chance: 1 / (independent vectors in the reference) + 1 / (those in the current window); the square of the shift
            that two samples of one and the same population show is that on average.

    For the teacher's embeddings the trainer computes it on standardised ones (hear_distill/validation.py).
    """
    squared = float(((current.mean - reference.mean) ** 2).sum()) / max(reference.variance, 1e-12)
    return math.sqrt(max(0.0, squared - chance))


def stability_index(reference: Sequence[int], current: Sequence[int], chance: float) -> float:
    """[b] and [b] counts -> sum of (q - p) ln(q / p) over the bins that are not empty in both, less chance.

    Two samples of one population have an index of `(b - 1) * chance` on average; `chance` as in `shift_of`.
    """
    counts = np.array([reference, current], np.float64)  # [2, b]
    counts = counts[:, counts.sum(axis=0) > 0] + PSEUDO_COUNT
    p, q = counts / counts.sum(axis=1, keepdims=True)
    index = float(((q - p) * np.log(q / p)).sum())
    return max(0.0, index - (counts.shape[1] - 1) * chance)


def family_of(tar: str) -> str:
    """'flash_20_snippets_7.tar' -> 'flash_#_snippets_#.tar': what is numbered through is one family."""
    return re.sub(r"\d+", "#", tar)


def effective_tars(row: Mapping[str, Any]) -> float:
    """How many tars of equal shares would mix a shard as well: e to the entropy of the shares."""
    shares = np.array(list(row["tars"].values())) / row["clips"]
    return float(np.exp(-(shares * np.log(shares)).sum()))


@dataclass(frozen=True)
class Window:
    """Shards that are looked at together."""

    rows: list[Mapping[str, Any]]

    @classmethod
    def of(cls, statistics: Sequence[Mapping[str, Any]]) -> Self:
        """Those that hold clips and were mixed from as many tars as wanted; of an anchor none are wanted."""
        stream = [row for row in statistics if row["clips"] and row.get("wanted_tars")]  # older lakes do not tell
        return cls([row for row in stream if row["open_tars"] >= row["wanted_tars"]])

    def num_recordings(self) -> int:
        """Independent pieces; clips of one recording are not. A recording that gave no clip is none."""
        return sum(min(row["recordings"], row["clips"]) for row in self.rows)

    def levels(self) -> np.ndarray:
        """[b] clips by level."""
        return np.sum([row["levels_db"] for row in self.rows], axis=0)

    def bands(self) -> Moments:
        """Of the levels of all clips in octave bands."""
        first, *rest = (Moments.from_json(row["bands_db"]) for row in self.rows)
        return sum(rest, first)

    def tars(self) -> Counter[str]:
        """Clips by tar."""
        return sum((Counter(row["tars"]) for row in self.rows), Counter())

    def num_tars_mixed(self) -> float:
        """Effective number of tars in a shard, on average."""
        return float(np.mean([effective_tars(row) for row in self.rows]))

    def clips_per_recording(self) -> float:
        """Clips that a recording gives on average, those that are passed over included."""
        return sum(row["clips"] for row in self.rows) / sum(row["recordings"] for row in self.rows)


def drift_of(statistics: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """One number per name in THRESHOLDS but `embedding`; 0 is no drift, NaN is not measured: too few recordings.

    Args:
        statistics: `Ledger.statistics(WINDOW_SHARDS, WINDOW_SHARDS)`: the first and the newest shards. While there are
            fewer than twice as many, the older half is the reference.
    """
    size = min(WINDOW_SHARDS, len(statistics) // 2)
    reference, current = Window.of(statistics[:size]), Window.of(statistics[len(statistics) - size :])
    if min(reference.num_recordings(), current.num_recordings()) < MIN_RECORDINGS:
        return {name: math.nan for name in THRESHOLDS if name != "embedding"}
    chance = 1 / reference.num_recordings() + 1 / current.num_recordings()
    return {
        "level": stability_index(reference.levels(), current.levels(), chance),
        "bands": shift_of(reference.bands(), current.bands(), chance),
        "source": source_drift(reference.tars(), current.tars()),
        "mixing": max(0.0, 1 - current.num_tars_mixed() / reference.num_tars_mixed()),
        "length": abs(math.log2(current.clips_per_recording() / reference.clips_per_recording())),
    }


def source_drift(reference: Counter[str], current: Counter[str]) -> float:
    """Stability index of the families, from clips by tar. It is tars that are drawn, not clips: few are much chance."""
    families = sorted({family_of(tar) for tar in reference | current})
    counts = []
    for clips in (reference, current):
        by_family: Counter[str] = Counter()
        for tar, count in clips.items():
            by_family[family_of(tar)] += count
        counts.append([by_family[family] for family in families])
    return stability_index(*counts, chance=1 / len(reference) + 1 / len(current))


def warnings_of(drift: Mapping[str, float]) -> list[str]:
    """A line for each number that is beyond its threshold; NaN never is."""
    return [
        f"{name} has drifted: {value:.2f}, {THRESHOLDS[name]} is the limit; {MEANING[name]}"
        for name, value in drift.items()
        if value > THRESHOLDS[name]
    ]


def line_of(drift: Mapping[str, float]) -> str:
    """For `status`: 'level 0.02, bands not measured'."""
    return ", ".join(f"{name} {'not measured' if math.isnan(v) else f'{v:.2f}'}" for name, v in drift.items())
