"""The part of a run that learns: what one step does, and all that must survive it.

in:   spectrograms of the chunks of a step, with the ids of their clips; the frozen teacher
out:  the terms of the loss; the state for a checkpoint, and in it the student as users load it

    plan = learning.begin_step()
    for spectrogram, ids in (plan.num_chunks of them):
        learning.add(spectrogram, ids)
    terms = learning.finish_step()

Nothing here waits for the device, but for a look for the critical rate, and for the balance of the weights, once.

B clips of a chunk   K chunks of a step
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hear_distill.files import UserError
from hear_distill.noise_scale import ChunkGradients, squared_norms
from hear_distill.objective import ClipId, Learner, LossConfig, Objective, Targets
from hear_distill.pace import Pace, is_passed
from hear_distill.schedule import Plan
from hear_distill.student import Student, StudentConfig
from hear_distill.targets import fold
from hear_distill.teacher import Teacher
from hear_distill.watch import StepWatch
from hear_distill.weight_ema import WeightEma

BETAS = (0.9, 0.98)  # of AdamW; the second below PyTorch's 0.999, whose memory of a thousand steps lags in a short run
MAX_GRAD_NORM = 1.0
EMA_HALF_LIFE = 700_000  # clips; 0.9995 a step of 512


@dataclass(frozen=True)
class Chunk:
    """One backward pass of a step."""

    ids: Sequence[ClipId]
    spectrogram: Tensor | None
    """[B, 1, 192, 128]; None, and targets without patches, unless the step looks for the critical rate: they are 0.5 MB
    a clip, and a step may have many chunks"""
    targets: Targets
    terms: dict[str, Tensor]
    """without gradient"""


def make_optimizer(learner: nn.Module, rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices only; a decayed Canon kernel would be drawn towards doing nothing."""
    decayed = [p for name, p in learner.named_parameters() if p.ndim == 2 and "canon" not in name]
    others = [p for name, p in learner.named_parameters() if p.ndim != 2 or "canon" in name]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=BETAS, fused=True)


def step_if_finite(optimizer: torch.optim.Optimizer, grad_norm: Tensor) -> Tensor:
    """One optimiser step, unless the gradient is not finite; decided on the device, so nothing waits for it.

    A fused AdamW leaves parameters and moments alone where `found_inf` is 1. Returns that number.
    """
    is_bad = (~torch.isfinite(grad_norm)).float()
    optimizer.found_inf = is_bad
    optimizer.step()
    return is_bad


class Learning:
    """Learner, average of its weights, optimiser, targets and pace. A new one needs `start_with` before its steps."""

    def __init__(
        self, teacher: Teacher, model: StudentConfig, loss: LossConfig, pace: Pace, weight_decay: float, seed: int
    ) -> None:
        self.teacher, self.model, self.loss, self.pace = teacher, model, loss, pace
        self.device, self.ranks = pace.noise.mean.device, pace.ranks
        torch.manual_seed(seed)
        token_width = teacher.model.config.hidden_size if loss.patch > 0 else None
        self.learner = Learner(Student(model), token_width).to(self.device)
        self.ranks.copy_first(self.learner.parameters())
        self.ema = WeightEma(self.learner.student, EMA_HALF_LIFE)
        self.optimizer = make_optimizer(self.learner, pace.control.schedule.peak, weight_decay)
        self.watch = StepWatch(self.device)
        self.objective: Objective | None = None
        self.step = self.samples = 0
        self.is_bfloat16 = self.device.type == "cuda"
        """whether the learner computes in bfloat16 where autocast has it so; its weights are float32"""
        self.held_out: Tensor | None = None
        """[B, 1, 192, 128] that no step sees, for the critical rate"""

    def hold_out(self, spectrogram: Tensor) -> None:
        """[B, 1, 192, 128] for the critical rate. Raises UserError for fewer than two clips."""
        if len(spectrogram) < 2:
            raise UserError(
                f"--warmup critical needs two clips or more in the anchor validation of the lake, found "
                f"{len(spectrogram)}; take --warmup linear, or make a lake with --val-clips"
            )
        self.held_out = spectrogram

    def is_done(self) -> bool:
        """Whether all clips of the schedule were seen."""
        return self.samples >= self.pace.control.schedule.total_samples

    def has_passed(self, every: int) -> bool:
        """Whether the last step passed a multiple of `every` clips, or is the last of all."""
        return self.is_done() or is_passed(self.samples - self.batch_size(), self.samples, every)

    def start_with(self, state: dict[str, Any]) -> None:
        """Take the targets that `measure` found in the first clips of the run."""
        self.objective = Objective(self.teacher, self.loss, state, self.device)
        print(f"the targets are standardised by {len(state['known'])} clips")

    def begin_step(self) -> Plan:
        """What this step shall be; forgets the chunks of one that was broken off."""
        self.plan = self.pace.plan(self.samples)
        self.gradients = ChunkGradients(self.optimizer)
        self.chunks: list[Chunk] = []
        self.wants_probe = self.pace.wants_probe(self.samples, self.plan.num_chunks)
        return self.plan

    def add(self, spectrogram: Tensor, ids: Sequence[ClipId], windows: Tensor | None = None) -> None:
        """Forward and backward pass of one chunk, [B, 1, 192, 128].

        Of sounds of k clips: [B / k, 1, 192 k, 128], and `windows` [B, 1, 192, 128] for the teacher. Measured targets
        are not used then, as the clips may have been cut short for them.
        """
        if windows is None:
            targets = self.objective.targets_of(spectrogram, ids)
        else:
            targets = self.objective.targets_of(windows).joined(len(windows) // len(spectrogram))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.is_bfloat16):
            terms = self.losses_of(spectrogram, targets)
        terms["loss"].backward()
        self.gradients.add()
        terms = {name: term.detach() for name, term in terms.items()}
        if not self.wants_probe:
            spectrogram, targets = None, Targets(targets.embedding, None)
        self.chunks.append(Chunk(ids, spectrogram, targets, terms))

    def losses_of(self, spectrogram: Tensor, targets: Targets) -> dict[str, Tensor]:
        """[B, 1, 192, 128] -> the losses at this moment of the run."""
        progress = self.samples / self.pace.control.schedule.total_samples
        return self.objective.losses_of(self.learner, spectrogram, targets, progress)

    def finish_step(self) -> dict[str, Tensor]:
        """The optimiser step of the chunks that were added. Returns the terms, means over them, on the device.

        A step whose gradient is not finite changes neither weights nor moments, average, queue or noise; it is counted.
        """
        squared = self.gradients.finish()  # [2, K]
        self.ranks.average(p.grad for p in self.learner.parameters() if p.grad is not None)
        if all(len(chunk.ids) == len(chunk.targets.embedding) for chunk in self.chunks):  # else they are other samples
            self.pace.measure(self.ranks.stack(squared.T).T, squared_norms(self.optimizer))
        grad_norm = nn.utils.clip_grad_norm_(self.learner.parameters(), MAX_GRAD_NORM)
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.rate
        if self.wants_probe:
            self._probe()
        is_bad = step_if_finite(self.optimizer, grad_norm)

        num_clips = self.batch_size()
        self.step, self.samples = self.step + 1, self.samples + num_clips
        self.ema.update(self.learner.student, self.samples, num_clips, 1 - is_bad)
        self.objective.finish_step(self._embeddings(), self.ids(), 1 - is_bad)
        terms = {
            name: torch.stack([chunk.terms[name] for chunk in self.chunks]).mean() for name in self.chunks[0].terms
        }
        self.ranks.average(terms.values())
        self.watch.update(terms["loss"], is_bad, num_clips)
        return {**terms, "grad_norm": grad_norm}

    def _embeddings(self) -> Tensor:
        """[n, E] of what the teacher said of the clips of this step, on all ranks, in their order."""
        return self.ranks.stack(torch.cat([chunk.targets.embedding for chunk in self.chunks]))

    def ids(self) -> list[ClipId]:
        """The clips of this step that this rank has seen."""
        return [i for chunk in self.chunks for i in chunk.ids]

    def batch_size(self) -> int:
        """Clips of this step, on all ranks, when it is whole."""
        return self.plan.num_chunks * self.pace.control.chunk_samples

    def _probe(self) -> None:
        """Look for the critical rate; in float32, as a bfloat16 loss would round the bend away."""

        spectrogram = self.held_out
        targets = self.objective.targets_of(spectrogram) if not self.pace.is_warm(self.samples) else None

        def held_out() -> Tensor:
            return over_ranks(self.losses_of(spectrogram, targets)["loss"])

        def training() -> Tensor:
            losses = [self.losses_of(chunk.spectrogram, chunk.targets)["loss"] for chunk in self.chunks]
            return over_ranks(torch.stack(losses).mean())

        def over_ranks(loss: Tensor) -> Tensor:
            self.ranks.average([loss])
            return loss

        self.pace.probe(self.samples, self.optimizer, held_out, training)

    def settle(self) -> None:
        """What all ranks do before the first of them asks for `state_dict`.

        Targets whose clips any rank has trained on are forgotten. Raises UserError if the weights have come apart.
        """
        self.objective.forget_all_but(self.ranks.gather(set(self.objective.known_rows)))
        if not self.ranks.are_equal(self.learner.parameters()):
            raise UserError(
                f"after step {self.step} the ranks have different weights, which should be the same to the bit: are "
                f"their GPUs, or their versions of torch, of different kinds? The last checkpoint is from before that"
            )

    def _parts(self) -> dict[str, Any]:
        """What has a state of its own, by its name in a checkpoint."""
        names = ("learner", "optimizer", "pace", "watch")
        return {name: getattr(self, name) for name in names} | {"ema": self.ema.model}

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint. `student` is what users load: the average, in the teacher's own unit."""
        ema = {name: value.cpu() for name, value in self.ema.model.state_dict().items()}
        folded = fold(self.ema.model.projection, self.objective.statistics).state_dict()
        return {
            "step": self.step,
            "samples": self.samples,
            "student_config": asdict(self.model),
            "teacher_revision": self.teacher.revision,
            "student": ema | {f"projection.{name}": value for name, value in folded.items()},
            "objective": self.objective.state_dict(),
            **{name: part.state_dict() for name, part in self._parts().items()},
            "ema": ema,  # the same tensors once more, which torch.save writes once
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self.step, self.samples = state["step"], state["samples"]
        self.objective = Objective(self.teacher, self.loss, state["objective"], self.device)
        decays = [group["weight_decay"] for group in self.optimizer.param_groups]
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        for group, decay in zip(self.optimizer.param_groups, decays, strict=True):
            group["weight_decay"] = decay  # a setting of this process, which the optimiser's own state would undo
