"""How close the student is to the teacher on clips that no training sees.

in:   the validation shards of a lake, the teacher, a student whose output is standardised; perhaps a labelled table
out:  numbers by name; 1 is perfect in all of them but mse, where 0 is

n clips of a set   E = 512 embedding
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hear_distill.agreement import NUM_NEIGHBOURS, agreement, knn_overlap, linear_cka
from hear_distill.augment import cut_short
from hear_distill.data import read_validation
from hear_distill.drift import WINDOW_SHARDS, drift_of
from hear_distill.lake import Lake
from hear_distill.schema import ANCHOR, RECENT
from hear_distill.student import Student
from hear_distill.targets import BANDS, TargetStatistics, explained_variance
from hear_distill.teacher import Teacher

PART = 256  # clips at a time
CUT_SEED = 0  # not the run's: every run is measured on the same short events


class Validation:
    """The two held-out sets. `anchor` never changes: it is read and embedded once, also with every clip cut short."""

    def __init__(
        self, lake: Lake, teacher: Teacher, frontend: nn.Module, device: torch.device, probe_table: Path | None = None
    ) -> None:
        """`probe_table`: also probe these labelled recordings; DatasetError if that is not possible."""
        self.lake, self.teacher, self.frontend, self.device = lake, teacher, frontend, device
        self.num_clips = int(lake.setting("val_clips"))
        self.anchor = np.empty((0, 0), np.int16)
        self.anchor_targets: dict[str, Tensor] = {}
        self.recent_target: Tensor | None = None
        self.quick_probe = None
        if probe_table is not None:
            from hear_distill.quick_probe import QuickProbe  # scikit-learn and pyarrow, which other runs do not need

            self.quick_probe = QuickProbe(probe_table)

    def anchor_part(self, num_clips: int) -> Tensor:
        """[n, 1, 192, 128] of the first clips of the anchor; fewer if it has fewer."""
        self._read_anchor()
        return self._spectrogram(self.anchor[:num_clips], is_cut=False)

    def _read_anchor(self) -> None:
        if len(self.anchor) == 0:
            self.anchor = read_validation(self.lake, ANCHOR, self.num_clips)

    @torch.no_grad()
    def measure(self, student: Student, statistics: TargetStatistics) -> dict[str, float]:
        """All numbers of `closeness`, as `anchor_...`, `anchor_padded_...` (every clip cut short) and `recent_...`.

        A set of fewer than two clips gives none. `probe_map` comes with them if there is a table to probe. Waits for
        the device.
        """
        self._read_anchor()
        values: dict[str, float] = {}
        if self.quick_probe:
            values["probe_map"] = self.quick_probe.measure(lambda part: student(self._spectrogram(part, is_cut=False)))
        for name, samples, is_cut in (
            ("anchor", self.anchor, False),
            ("anchor_padded", self.anchor, True),
            ("recent", read_validation(self.lake, RECENT, self.num_clips), False),
        ):
            if len(samples) < 2:
                continue
            predicted, target = self._embed(name, samples, is_cut, student)
            found = closeness(predicted, statistics.standardise(target), statistics)
            values |= {f"{name}_{metric}": float(value) for metric, value in found.items()}
            if name == RECENT:
                self.recent_target = target
        return values

    def drift(self, statistics: TargetStatistics) -> dict[str, float]:
        """`drift_...`: what streams in now against what did at first; `drift_embedding` of the last measured set."""
        values = drift_of(self.lake.statistics(WINDOW_SHARDS, WINDOW_SHARDS))
        if self.recent_target is not None:
            values["embedding"] = float(embedding_drift(statistics.standardise(self.recent_target)))
        return {f"drift_{name}": value for name, value in values.items()}

    def _embed(self, name: str, samples: np.ndarray, is_cut: bool, student: Student) -> tuple[Tensor, Tensor]:
        """[n, 32000] int16 -> the student's standardised embeddings [n, E], and the teacher's own [n, E]."""
        predicted, target = [], []
        for begin in range(0, len(samples), PART):
            spectrogram = self._spectrogram(samples[begin : begin + PART], is_cut)
            predicted.append(student.project(student(spectrogram)))
            if name not in self.anchor_targets:
                target.append(self.teacher(spectrogram).float())
        if name == RECENT:
            return torch.cat(predicted), torch.cat(target)
        if target:
            self.anchor_targets[name] = torch.cat(target)
        return torch.cat(predicted), self.anchor_targets[name]

    def _spectrogram(self, samples: np.ndarray, is_cut: bool) -> Tensor:
        """[n, 32000] int16 -> [n, 1, 192, 128]"""
        audio = torch.from_numpy(samples).to(self.device).float() / 32768
        if is_cut:
            ids: list[Any] = [row.tobytes() for row in samples]  # by content: any part of the set is cut alike
            audio, _ = cut_short(audio, ids, seed=CUT_SEED, share=1.0)
        return self.frontend(audio)


def embedding_drift(recent: Tensor) -> Tensor:
    """[n, E] standardised by the first clips of the run -> how far their mean has moved, in standard deviations.

    As `drift.shift_of` has it, of a reference of mean 0 and variance E; what chance alone gives is taken off.
    """
    return (recent.mean(dim=0).square().mean() - 1 / len(recent)).clamp_min(0).sqrt()


def closeness(student: Tensor, teacher: Tensor, statistics: TargetStatistics) -> dict[str, Tensor]:
    """[n, E], [n, E], standardised -> mse, explained variance (all, and by leading components), centred cosine,
    neighbours in common, CKA."""
    student, teacher = student.double(), teacher.double()
    values = agreement(student, teacher)
    bands = [band for band in BANDS if band < teacher.shape[1]]
    explained = explained_variance(student, teacher, statistics, bands)
    values |= {f"explained_variance_{band}": value for band, value in explained.items()}
    if len(teacher) > NUM_NEIGHBOURS:
        values["knn_overlap"] = knn_overlap(student, teacher)
    return values | {"cka": linear_cka(student, teacher)}
