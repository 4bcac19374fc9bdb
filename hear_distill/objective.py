"""What a chunk of clips teaches: the teacher's targets, standardised, and the losses of the student against them.

in:   spectrograms of a chunk with the ids of its clips, the frozen teacher, and the learner's answer
out:  the terms of the loss; and the state of all this for the checkpoint: plain tensors and numbers

A run begins with `measure`: its first clips are embedded once. Mean, scale, components, queue and prototypes come from
these embeddings, and each of them is the target of its clip when that is drawn. Looking at a clip consumes nothing.

B clips of a chunk   n clips of the sample   E = 512 embedding   N = 96 tokens   P = 1024 width of the teacher's tokens
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hear_distill.losses import (
    LossWeights,
    References,
    distill_loss,
    patch_share,
)
from hear_distill.ranks import ALONE, Ranks
from hear_distill.student import Student
from hear_distill.targets import (
    PatchStatistics,
    TargetStatistics,
    TeacherQueue,
    make_prototypes,
    measure_patches,
    measure_targets,
)
from hear_distill.teacher import Teacher

NUM_PROTOTYPES = 512
PATCH_CLIPS = 512  # of the sample, from which the tokens' statistics are: 49,152 tokens

ClipId = tuple[int, ...]  # (shard, clip), or with several lakes (lake, shard, clip)


@dataclass(frozen=True, kw_only=True)
class LossConfig(LossWeights):
    """The weights of the terms, and what clips are compared with. --out remembers it."""

    negatives: Literal["queue", "batch"] = "queue"
    """of the relational and the contrastive term: teacher embeddings of earlier clips, or, as published, the other
    clips of the chunk"""

    def weights(self) -> LossWeights:
        """The weights alone."""
        return LossWeights(**{field.name: getattr(self, field.name) for field in fields(LossWeights)})


class Learner(nn.Module):
    """What is trained: the student and, if its tokens are to predict the teacher's, the linear layer that does so.

    One module with one forward pass, as a compiler wants it.
    """

    def __init__(self, student: Student, token_width: int | None) -> None:
        super().__init__()
        self.student = student
        self.patch_head = nn.Linear(student.config.width, token_width) if token_width else None

    def forward(self, spectrogram: Tensor) -> tuple[Tensor, Tensor | None]:
        """[B, 1, 192, 128] -> [B, E], standardised, and [B, N, P] or None"""
        tokens = self.student.tokens(spectrogram)  # [B, N, D]
        predicted = self.student.project(tokens.mean(dim=1))  # [B, E]
        return predicted, self.patch_head(tokens) if self.patch_head is not None else None


@dataclass(frozen=True)
class Targets:
    """What the teacher says of B clips, standardised."""

    embedding: Tensor
    """[B, E]"""
    patches: Tensor | None
    """[B, N, P]"""

    def joined(self, clips_per_sound: int) -> "Targets":
        """Of sounds of k clips: the mean of the embeddings [B / k, E], the tokens one after another [B / k, k N, P].

        The mean of what is standardised is the standardised mean.
        """
        shape = (-1, clips_per_sound)
        patches = self.patches.unflatten(0, shape).flatten(1, 2) if self.patches is not None else None
        return Targets(self.embedding.unflatten(0, shape).mean(dim=1), patches)


@torch.no_grad()
def measure(
    teacher: Teacher,
    config: LossConfig,
    sample: Iterable[tuple[Sequence[ClipId], Tensor]],
    seed: int,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Embed the first clips of a run: ids and spectrograms [B, 1, 192, 128], part by part -> the state of an Objective.

    Each rank embeds its own part of the sample; all get the same state, of all parts. Raises ValueError for a sample
    that is too small, or one that the teacher finds all alike.
    """
    ids, embeddings, tokens = embed_sample(teacher, config, sample, PATCH_CLIPS // ranks.size)
    if ranks.size == 1:
        return measured(config, ids, embeddings, tokens, seed)
    parts = ranks.collect((ids, [e.cpu() for e in embeddings], [t.cpu() for t in tokens]))
    state = None
    if parts is not None:
        device = next(teacher.parameters()).device
        ids, embeddings, tokens = ([item for part in parts for item in part[i]] for i in range(3))
        state = measured(config, ids, [e.to(device) for e in embeddings], [t.to(device) for t in tokens], seed)
    return ranks.share(_on_cpu(state))


def embed_sample(
    teacher: Teacher, config: LossConfig, sample: Iterable[tuple[Sequence[ClipId], Tensor]], num_patch_clips: int
) -> tuple[list[ClipId], list[Tensor], list[Tensor]]:
    """Ids; embeddings [B, E], part by part; tokens [B, N, P] of about the first `num_patch_clips`, if they are used."""
    ids: list[ClipId] = []
    embeddings, tokens = [], []
    for part_ids, spectrogram in sample:
        needs_tokens = config.patch > 0 and len(ids) < num_patch_clips
        embedding, patches = embed(teacher, spectrogram, needs_tokens)
        ids += part_ids
        embeddings.append(embedding)
        tokens += [patches] if patches is not None else []
    return ids, embeddings, tokens


def measured(
    config: LossConfig, ids: Sequence[ClipId], embeddings: Sequence[Tensor], tokens: Sequence[Tensor], seed: int
) -> dict[str, Any]:
    """The state of an Objective from what `embed_sample` found."""
    raw = torch.cat(embeddings)  # [n, E]
    statistics = measure_targets(raw)
    known = statistics.standardise(raw)
    return {
        "statistics": statistics.state_dict(),
        "patches": measure_patches(torch.cat(tokens)[:PATCH_CLIPS]).state_dict() if tokens else None,
        "queue": TeacherQueue(known).state_dict() if config.negatives == "queue" else None,
        "prototypes": make_prototypes(known, NUM_PROTOTYPES, seed) if config.prototype > 0 else None,
        "weights": asdict(config.weights()),
        "known_ids": torch.tensor(ids, dtype=torch.int64),  # [n, 2 or 3]
        "known": known,
    }


def _on_cpu(value: Any) -> Any:
    """A nested state with its tensors on the CPU."""
    if isinstance(value, Mapping):
        return {name: _on_cpu(item) for name, item in value.items()}
    return value.cpu() if isinstance(value, Tensor) else value


def embed(teacher: Teacher, spectrogram: Tensor, with_patches: bool) -> tuple[Tensor, Tensor | None]:
    """[B, 1, 192, 128] -> [B, E] and [B, N, P] or None, float32, in the teacher's own unit."""
    if not with_patches:
        return teacher(spectrogram).float(), None
    embedding, patches = teacher.embed_with_patches(spectrogram)
    return embedding.float(), patches.float()


class Objective:
    """Targets and losses of a run. `state` is what `measure`, or `state_dict` of an earlier process, returned."""

    def __init__(self, teacher: Teacher, config: LossConfig, state: Mapping[str, Any], device: torch.device) -> None:
        def module(kind: type[nn.Module], arguments: Mapping[str, Tensor] | None) -> Any:
            return kind(**arguments).to(device) if arguments else None

        self.teacher, self.config = teacher, config
        self.statistics: TargetStatistics = module(TargetStatistics, state["statistics"])
        self.patches: PatchStatistics | None = module(PatchStatistics, state["patches"])
        queue = state["queue"]
        self.queue = TeacherQueue(queue["rows"].to(device), queue["oldest"]) if queue else None
        self.prototypes = state["prototypes"].to(device) if state["prototypes"] is not None else None
        self.weights = LossWeights(**state["weights"])
        self.known = state["known"].to(device)  # [n, E], standardised
        self.known_rows: dict[ClipId, int] = {tuple(i): row for row, i in enumerate(state["known_ids"].tolist())}

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint, with the targets that wait for their clips to be drawn."""
        rows = torch.tensor(list(self.known_rows.values()), dtype=torch.int64, device=self.known.device)
        return {
            "statistics": self.statistics.state_dict(),
            "patches": self.patches.state_dict() if self.patches else None,
            "queue": self.queue.state_dict() if self.queue else None,
            "prototypes": self.prototypes,
            "weights": asdict(self.weights),
            "known_ids": torch.tensor(list(self.known_rows), dtype=torch.int64),
            "known": self.known[rows],
        }

    @torch.no_grad()
    def targets_of(self, spectrogram: Tensor, ids: Sequence[ClipId] = ()) -> Targets:
        """[B, 1, 192, 128] -> what the teacher says. A clip of the sample gets the very embedding measured then."""
        places = [(place, self.known_rows[i]) for place, i in enumerate(ids) if i in self.known_rows]
        # Without non_blocking, and where a list is an index, the copy would wait for all that the GPU has been given.
        at, rows = torch.tensor(places, dtype=torch.int64).reshape(-1, 2).T.to(self.known.device, non_blocking=True)
        if len(places) == len(spectrogram) and self.patches is None:
            return Targets(self.known[rows], None)
        embedding, patches = embed(self.teacher, spectrogram, self.patches is not None)
        embedding = self.statistics.standardise(embedding)  # [B, E]
        if places:
            embedding = embedding.index_copy(0, at, self.known[rows])
        return Targets(embedding, self.patches.standardise(patches) if self.patches else None)

    def losses_of(
        self, learner: nn.Module, spectrogram: Tensor, targets: Targets, progress: float
    ) -> dict[str, Tensor]:
        """[B, 1, 192, 128] and its targets -> the terms: scalars, of which `loss` has the gradient.

        `progress`, from 0 to 1, is how much of the run is done; `explained_variance` is 1 - mse.

        Float32 from the embedding on, whatever precision the learner computes in.
        """
        predicted, patches = learner(spectrogram)
        predicted = predicted.float()  # [B, E]
        terms = distill_loss(
            predicted,
            targets.embedding,
            replace(self.weights, patch=self.weights.patch * patch_share(progress)),
            references=References(queue=self.queue.rows if self.queue else None, prototypes=self.prototypes),
            patches=(patches.float(), targets.patches) if patches is not None else None,
        )
        terms["explained_variance"] = 1 - terms["mse"].detach()
        return terms

    def finish_step(self, embeddings: Tensor, ids: Iterable[ClipId], is_taken: Tensor) -> None:
        """After the optimiser step: [n, E], of all ranks, enter the queue if the step was taken; what was known of
        `ids`, the clips of this rank, has been used."""
        if self.queue:
            self.queue.push(embeddings, is_taken)
        for i in ids:
            self.known_rows.pop(i, None)

    def forget_all_but(self, waiting: Sequence[Collection[ClipId]]) -> None:
        """Keep the targets that are in all of these: what each rank has not used yet."""
        self.known_rows = {i: row for i, row in self.known_rows.items() if all(i in ids for ids in waiting)}
