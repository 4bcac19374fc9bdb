"""One small distillation in memory, with the trainer's own learning, losses, pace and measures: no lake, one thread.

in:   an Arm (what is different), a learning rate, a seed; and Material, which all runs share
out:  numbers of the student after it saw every clip of the pool once, measured on recordings that no run learns from

The teacher is asked once for every clip; runs take what it said from memory. Seeds differ in the weights to begin with
and in the order of the clips, not in the clips.

n clips of the pool   B clips of a chunk   m held-out clips   E = 512 embedding   P width of the teacher's tokens
"""

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from sounds import Probe, embed_all, read_source, spectrograms, split, views, whole_clips
from torch import Tensor

from hear_distill.augment import cut_short
from hear_distill.learning import Learning
from hear_distill.objective import LossConfig, measure
from hear_distill.pace import ControllerName, Pace
from hear_distill.schedule import Control, Schedule
from hear_distill.student import Canon2d, Student, StudentConfig
from hear_distill.teacher import Teacher, load_teacher
from hear_distill.validation import closeness

CHUNK, CHUNKS = 8, 2
TARGET_CLIPS = 2048  # from which the statistics, the queue and the prototypes are
WARMUP, DECAY = 0.05, 0.2  # of a run
LOOK_EVERY = 160  # clips between two looks at the noise
WEIGHT_DECAY = 0.05
PAD_SHARE = 0.15
SPLIT_SEED = CUT_SEED = VIEW_SEED = 0
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What is different from the recipe that the experiments start from."""

    name: str
    question: str
    """the group of the table that it stands in"""
    against: str = "best"
    """the arm that it is compared with, seed by seed"""
    model: Mapping[str, Any] = field(default_factory=dict)
    """changes of the StudentConfig"""
    loss: Mapping[str, Any] = field(default_factory=dict)
    """changes of the LossConfig"""
    pad_share: float = PAD_SHARE
    controller: ControllerName = "off"
    is_circular: bool = False
    """the Canon layers see the other end of the grid beyond its border, in place of zeros"""


STUDENT = {"width": 48, "blocks": 12, "heads": 3, "mlp_width": 192}
LOSS = {"relational": 0.0, "contrastive": 0.0, "patch": 0.5}


class RecordedTeacher:
    """Stands in for a Teacher: answers from memory, by the content of a clip. Raises KeyError for any other clip."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher, self.revision = teacher, teacher.revision
        self.model = SimpleNamespace(config=teacher.model.config)
        self.rows: dict[bytes, int] = {}
        self.embeddings: list[Tensor] = []
        self.patches: list[Tensor] = []

    def record(self, spectrogram: Tensor, part: int = 64) -> None:
        """[n, 1, 192, 128] float16: ask the teacher about those clips that are new."""
        keys = [_key(clip) for clip in spectrogram]
        new = [place for place, key in enumerate(keys) if key not in self.rows]
        for begin in range(0, len(new), part):
            places = new[begin : begin + part]
            embedding, patches = self.teacher.embed_with_patches(spectrogram[places].float())
            for row, place in enumerate(places):
                self.rows[keys[place]] = len(self.embeddings)
                self.embeddings.append(embedding[row].clone())
                self.patches.append(patches[row].half())

    def __call__(self, spectrogram: Tensor) -> Tensor:
        """[B, 1, 192, 128] -> [B, E]"""
        return torch.stack([self.embeddings[row] for row in self._rows(spectrogram)])

    def embed_with_patches(self, spectrogram: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 1, 192, 128] -> [B, E], [B, N, P]"""
        rows = self._rows(spectrogram)
        return torch.stack([self.embeddings[i] for i in rows]), torch.stack([self.patches[i] for i in rows]).float()

    def _rows(self, spectrogram: Tensor) -> list[int]:
        return [self.rows[_key(clip)] for clip in spectrogram.half()]


def _key(clip: Tensor) -> bytes:
    return hashlib.blake2b(clip.numpy().tobytes(), digest_size=16).digest()


@dataclass(frozen=True)
class Material:
    """What all runs share."""

    teacher: RecordedTeacher
    pools: Mapping[float, Tensor]
    """by share of clips that are cut short: [n, 1, 192, 128] float16"""
    held_out: Mapping[str, Tensor]
    """whole and padded (every clip cut short): [m, 1, 192, 128]"""
    probe: Probe | None


def make_material(
    source: Path, teacher: Teacher, num_clips: int, pad_shares: Sequence[float], probe: Probe | None
) -> Material:
    """Read the source, cut `num_clips` views for the pool, and ask the teacher about all of it."""
    learned_from, held_out = split(read_source(source), SPLIT_SEED)
    samples, _ = views(learned_from, VIEW_SEED, range(num_clips))  # [n, 32000]
    pools = {share: spectrograms(_cut(samples, share)).half() for share in sorted(set(pad_shares))}
    clips = whole_clips(held_out)  # [m, 32000]
    measured = {"whole": spectrograms(clips), "padded": spectrograms(_cut(clips, 1.0))}
    recorded = RecordedTeacher(teacher)
    for spectrogram in (*pools.values(), *measured.values()):
        recorded.record(spectrogram.half())
    print(f"{len(learned_from)} recordings to learn from, {len(held_out)} held out, {len(clips)} clips of those")
    return Material(recorded, pools, {name: value.half().float() for name, value in measured.items()}, probe)


def _cut(samples: Tensor, share: float) -> Tensor:
    return cut_short(samples, [(0, index) for index in range(len(samples))], seed=CUT_SEED, share=share)[0]


def make_circular(student: Student) -> None:
    """Let the grid of every Canon layer run on at its other end. With no border, no token can tell where it stands."""
    for module in student.modules():
        if isinstance(module, Canon2d):
            module.conv.padding_mode = "circular"


def new_learning(teacher: RecordedTeacher, arm: Arm, rate: float, seed: int, num_clips: int) -> Learning:
    """The trainer's state before its first step."""
    whole_steps = CHUNK * CHUNKS
    schedule = Schedule(
        peak=rate,
        total_samples=num_clips,
        warmup_samples=round(WARMUP * num_clips / whole_steps) * whole_steps,
        decay_samples=round(DECAY * num_clips),
    )
    control = Control(
        schedule=schedule, chunk_samples=CHUNK, base_chunks=CHUNKS, max_chunks=16 * CHUNKS, check_samples=LOOK_EVERY
    )
    model, loss = StudentConfig(**(STUDENT | dict(arm.model))), LossConfig(**(LOSS | dict(arm.loss)))
    pace = Pace(control, arm.controller, False, CPU)
    learning = Learning(teacher, model, loss, pace, WEIGHT_DECAY, seed)  # type: ignore[arg-type]
    if arm.is_circular:
        make_circular(learning.learner.student)
        make_circular(learning.ema.model)
    return learning


def learn(learning: Learning, pool: Tensor, seed: int) -> None:
    """Show the pool [n, 1, 192, 128] once, in the order of the seed; a step that grew beyond its end begins anew."""
    order = np.random.default_rng(seed).permutation(len(pool)).tolist()

    def chunk(begin: int) -> tuple[Tensor, list[tuple[int, int]]]:
        chosen = [order[place % len(order)] for place in range(begin, begin + CHUNK)]
        return pool[chosen].float(), [(0, i) for i in chosen]

    sample = [chunk(begin) for begin in range(0, min(TARGET_CLIPS, len(pool)), CHUNK)]
    learning.start_with(measure(learning.teacher, learning.loss, ((ids, x) for x, ids in sample), seed))
    while not learning.is_done():
        for number in range(learning.begin_step().num_chunks):
            learning.add(*chunk(learning.samples + number * CHUNK))
        learning.finish_step()
        if learning.has_passed(LOOK_EVERY):
            learning.pace.look()


def describe(learning: Learning, material: Material) -> dict[str, float]:
    """How close the averaged student is on each held-out set, and what a probe reads from its trunk."""
    student, statistics = learning.ema.model, learning.objective.statistics
    values: dict[str, float] = {}
    for name, spectrogram in material.held_out.items():
        predicted = embed_all(lambda x: student.project(student(x)), spectrogram)
        target = statistics.standardise(embed_all(material.teacher, spectrogram))
        found = closeness(predicted, target, statistics)
        values |= {f"{name}_{metric}": float(value) for metric, value in found.items()}
    if material.probe:
        values |= {f"probe_{name}": value for name, value in material.probe.measure(student).items()}
    return values


def run(material: Material, arm: Arm, rate: float, seed: int) -> dict[str, Any]:
    """One run. CPU seconds are those of this process, so it must be the only thing that the process does."""
    torch.set_num_threads(1)
    began = time.process_time()
    pool = material.pools[arm.pad_share]
    learning = new_learning(material.teacher, arm, rate, seed, len(pool))
    learn(learning, pool, seed)
    values = describe(learning, material)
    noise_batch = learning.pace.look()["noise_batch"]
    return {
        "arm": arm.name,
        "rate": rate,
        "seed": seed,
        "cpu_s": round(time.process_time() - began, 1),
        "steps": learning.step,
        "parameters": sum(p.numel() for p in learning.learner.student.parameters()),
        "noise_batch": None if math.isnan(noise_batch) else noise_batch,
        "skipped": int(learning.watch.take_longest()),
        **values,
    }


def load(teacher: Path) -> Teacher:
    """The teacher on the CPU, in float32, with one thread."""
    torch.set_num_threads(1)
    return load_teacher(teacher)
