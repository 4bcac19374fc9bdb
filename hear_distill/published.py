"""Published results, to stand beside ours.

Source: HeAR paper (arXiv 2403.02522) for TRILL, FRILL, BigSSL-CAP12, HeAR and CLAP; release notes of HeAR-s for HeAR-s
and for both models on whole clips. Linear probes, average precision per task and its mean; F1 of an ensemble of probes
for lungs and heart. They were measured by others, on their copies of the data, with their windows and splits: beside
ours they show the order of magnitude, and a difference of a few hundredths shows nothing.

A whole clip ("full") is a recording whose spectrogram was squeezed to 192 frames, so it compares with `squeeze` only.
"""

from collections.abc import Mapping
from typing import NamedTuple

PAPER = ("TRILL", "FRILL", "BigSSL-CAP12", "HeAR", "CLAP (48k)")
TWO_SECONDS = ("HeAR-s",)
WHOLE_CLIP = ("HeAR-s full", "HeAR full")
COLUMNS = (*PAPER, *TWO_SECONDS, *WHOLE_CLIP)
SQUEEZE = "squeeze"  # the clip protocol of the whole-clip columns

# Task: one value per name of COLUMNS; HeAR-s was not evaluated on Respiratory sounds.
FSD50K = {
    "Breathing": (0.301, 0.336, 0.365, 0.434, 0.467, 0.285, 0.278, 0.278),
    "Cough": (0.450, 0.452, 0.658, 0.621, 0.751, 0.665, 0.475, 0.477),
    "Laughter": (0.438, 0.425, 0.673, 0.680, 0.715, 0.603, 0.551, 0.550),
    "Respiratory sounds": (0.539, 0.535, 0.629, 0.670, 0.702, None, None, None),
    "Sneeze": (0.361, 0.448, 0.570, 0.650, 0.912, 0.647, 0.559, 0.515),
    "Speech": (0.430, 0.418, 0.567, 0.534, 0.599, 0.700, 0.663, 0.663),
}
FLUSENSE = {
    "Breathing": (0.147, 0.233, 0.357, 0.336, 0.371, 0.366, 0.306, 0.307),
    "Cough": (0.903, 0.892, 0.954, 0.974, 0.963, 0.909, 0.913, 0.913),
    "Gasp": (0.466, 0.587, 0.653, 0.608, 0.701, 0.521, 0.541, 0.542),
    "Sneeze": (0.648, 0.661, 0.810, 0.788, 0.825, 0.756, 0.733, 0.734),
    "Sniffle": (0.718, 0.667, 0.720, 0.852, 0.841, 0.816, 0.836, 0.836),
    "Speech": (0.949, 0.949, 0.983, 0.972, 0.973, 0.911, 0.932, 0.899),
    "Throat-clearing": (0.070, 0.099, 0.035, 0.436, 0.169, 0.310, 0.4207, 0.417),
}
AP: Mapping[str, Mapping[str, tuple[float | None, ...]]] = {"fsd50k": FSD50K, "flusense": FLUSENSE}
# As published. The tasks above give the same means, but for HeAR-s on whole clips: 0.601, not 0.595.
MEAN_AP = (0.494, 0.516, 0.613, 0.658, 0.691, 0.624, 0.595, 0.594)
# Of the release notes. The columns give 95.0 % over the twelve tasks that HeAR-s was evaluated on (0.624 of 0.657), and
# 90.5 % for HeAR itself on whole clips (0.594 of 0.657).
STATED_RETAINED_PERCENT = 95.3
STATED_WHOLE_CLIP_PERCENT = 90.3


class MeanAndDeviation(NamedTuple):
    """F1 over folds."""

    mean: float
    std: float


DIAGNOSIS_F1 = {
    "icbhi": {
        "Healthy": MeanAndDeviation(0.536, 0.076),
        "COPD": MeanAndDeviation(0.888, 0.058),
        "URTI": MeanAndDeviation(0.179, 0.127),
        "Bronchiectasis": MeanAndDeviation(0.529, 0.211),
        "Pneumonia": MeanAndDeviation(0.722, 0.208),
        "Bronchiolitis": MeanAndDeviation(0.622, 0.166),
    },
    "circor": {"Murmur": MeanAndDeviation(0.582, 0.017)},
}
# FluSense writes 'breathe' where the paper's table has Breathing.
SAME_TASK = {"breathe": "breathing", "breath": "breathing", "heart murmur": "murmur", "healthy lungs": "healthy"}


def plain(name: str) -> str:
    """One spelling: 'Respiratory_sounds' and 'respiratory sounds' are one task, and so are breathe and Breathing."""
    spelled = name.strip().lower().replace("_", " ").replace("-", " ")
    return SAME_TASK.get(spelled, spelled)


def columns_beside(protocol: str) -> tuple[str, ...]:
    """The published columns that a clip protocol of ours may stand beside; those of the paper always."""
    return (*PAPER, *(WHOLE_CLIP if protocol == SQUEEZE else TWO_SECONDS))


def published_ap(dataset: str, task: str) -> dict[str, float | None]:
    """Column -> AP; empty for a dataset or task of which nothing is published."""
    for name, values in AP.get(plain(dataset), {}).items():
        if plain(name) == plain(task):
            return dict(zip(COLUMNS, values, strict=True))
    return {}


def is_complete(name: str) -> bool:
    """Whether every column has a task ('fsd50k/Cough'): HeAR-s was not evaluated on Respiratory sounds."""
    found = published_ap(*name.split("/", 1))
    return bool(found) and None not in found.values()


def published_f1(dataset: str, diagnosis: str) -> MeanAndDeviation | None:
    """F1 of HeAR-s with an ensemble of probes."""
    for name, value in DIAGNOSIS_F1.get(plain(dataset), {}).items():
        if plain(name) == plain(diagnosis):
            return value
    return None


def published_mean_ap(tasks: list[tuple[str, str]]) -> dict[str, float | None]:
    """Column -> the mean of the published APs of these tasks, each (dataset, name), so that like stands beside like.

    None where a column lacks one of them; empty where nothing is published for one of them.
    """
    found = [published_ap(*task) for task in tasks]
    if not found or not all(found):
        return {}
    columns: dict[str, float | None] = {}
    for column in COLUMNS:
        values = [of_task[column] for of_task in found]
        columns[column] = None if None in values else sum(v for v in values if v is not None) / len(values)
    return columns
