"""Distil HeAR into a ViT-S with Canon2D layers.

in:   the shards of a lake (from stream_laion_audio_clips.py, kept coming by datalake/run_lake.py); HeAR, frozen
out:  <out>/{config.json, latest.pt, previous.pt, best.pt, metrics.jsonl, tensorboard/, progress.json, loss.png, lock}
cost: on a GPU not measured; the demo 82 s on two cores, streamers included

    python distill_hear_vit_s_canon2d.py --lake lake        # the recommended run, on a GPU
    python distill_hear_vit_s_canon2d.py paper              # the published losses, weights and batch
    python distill_hear_vit_s_canon2d.py demo               # CPU, minutes, no network

B clips in a batch   n clips of a validation set   E = 512 HeAR embedding
"""

import dataclasses
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from hear_distill import checkpoint, cli, demo
from hear_distill.agreement import agreement
from hear_distill.data import Batch, Drawing, LakeReader, ordinary_memory, read_validation
from hear_distill.files import UserError, gib
from hear_distill.frontend import MelPcen
from hear_distill.lake import Lake
from hear_distill.locks import Owner, alone
from hear_distill.losses import LossWeights, distill_loss
from hear_distill.plots import draw_losses
from hear_distill.runlog import Heartbeat, Metrics, StopRequest, write_config
from hear_distill.schema import ANCHOR, RECENT
from hear_distill.shards import shard_bytes
from hear_distill.student import SIZES, Student, StudentConfig
from hear_distill.teacher import Teacher, load_teacher

PUBLISHED_WEIGHTS = LossWeights()


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of the trainer. --out remembers the model; the rest may change when a run is resumed."""

    lake: Path = Path("lake")
    """the lake to train from"""
    out: Path = Path("runs/hear-vit-s")
    """run folder"""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on with the run in --out, if there is one; never: refuse to (for a run without the supervisor,
    which resumes a trainer that crashed)"""
    teacher: str = "google/hear-pytorch"
    """hub id or local folder of HeAR"""
    teacher_revision: str | None = None
    """commit of the teacher on the hub; none = the newest, resolved once and written to config.json"""
    device: Literal["cuda", "cpu"] = "cuda"
    """cpu is for the demo and for debugging"""
    steps: int = 50_000
    """optimiser steps of the whole run"""
    batch_size: int = 512
    """clips in one step"""
    lr: float = 5e-4
    """peak learning rate of AdamW"""
    warmup_steps: int = 500
    """steps from zero to the peak"""
    decay_steps: int = 10_000
    """steps from the peak to zero, at the end"""
    weight_decay: float = 0.05
    """of matrices; norms, biases and Canon kernels have none"""
    open_shards: int = 8
    """shards that a batch is drawn from"""
    consume: Literal["once", "reuse"] = "once"
    """once: each clip is trained on once, then its shard goes; reuse: shards are kept, pass after pass, until the lake
    wants room for new ones (for small sources, and for one trainer on a lake)"""
    save_every: int = 200
    """steps between checkpoints, each with a validation; the lake must hold the clips of two such intervals"""
    log_every: int = 20
    """steps between log lines"""
    seed: int = 0
    """of the initial weights and of the order of the clips"""
    model: StudentConfig = SIZES["small"]
    loss: LossWeights = PUBLISHED_WEIGHTS

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size, self.open_shards, self.save_every, self.log_every) < 1:
            raise ValueError("--steps, --batch-size, --open-shards, --save-every and --log-every must be at least 1")
        if self.batch_size < 2:
            raise ValueError("--batch-size must be at least 2: two of the three losses compare clips with each other")
        if not 0 <= self.warmup_steps + self.decay_steps <= self.steps:
            raise ValueError(
                f"--warmup-steps {self.warmup_steps} + --decay-steps {self.decay_steps} exceed --steps {self.steps}"
            )
        if self.save_every % self.log_every:
            raise ValueError(f"--save-every {self.save_every} must be a multiple of --log-every {self.log_every}")

    def lr_at(self, step: int) -> float:
        """Learning rate of optimiser step `step`, 0-based: warm up, hold, decay to zero."""
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        cool = min(1.0, (self.steps - step) / max(1, self.decay_steps))
        return self.lr * warm * cool


PRESETS = {
    "best": Config(),
    # The published rate follows the gradient noise; until noise_scale.py exists, this preset holds it constant.
    "paper": Config(
        out=Path("runs/paper"), steps=200_000, batch_size=128, lr=3e-4, warmup_steps=0, decay_steps=0, save_every=1000
    ),
    "demo": Config(
        lake=demo.DEMO / "lake",
        out=demo.DEMO / "run",
        teacher=str(demo.TEACHER),
        device="cpu",
        steps=200,
        batch_size=16,
        lr=2e-3,
        warmup_steps=10,
        decay_steps=40,
        open_shards=4,
        save_every=20,
        log_every=5,
        model=StudentConfig(width=96, blocks=4, heads=3, mlp_width=384),
    ),
}
BETAS = (0.9, 0.98)  # of AdamW; the second below PyTorch's 0.999, whose memory of a thousand steps lags in a short run
MAX_GRAD_NORM = 1.0
MAX_SKIPPED_IN_A_ROW = 3  # non-finite gradients; one can be bad luck, three are a diverged run
WAIT_S = 0.2
SAY_STARVED_EVERY_S = 60.0


@dataclass
class Run:
    """Everything that lives from the first step to the last."""

    config: Config
    id: str
    step: int
    best: float
    """lowest validation MSE so far"""
    best_step: int
    """where that was"""
    teacher: Teacher
    student: Student
    frontend: MelPcen
    optimizer: torch.optim.Optimizer
    lake: Lake
    owner: Owner
    reader: LakeReader
    metrics: Metrics
    board: SummaryWriter
    heartbeat: Heartbeat
    anchor: np.ndarray
    """[n, 32000] int16, read once: it never changes"""
    skipped: Tensor = field(default_factory=lambda: torch.zeros(()))
    """scalar, on the device: steps whose gradient was not finite"""
    logged: dict[str, float] = field(default_factory=dict)
    """the values of the last log point, for the heartbeat"""
    timed_from: tuple[int, float] = (0, 0.0)
    """the step, and the monotonic time, from which clips per second are counted"""
    turns: int = 0
    """of the loop, waiting ones too: what the supervisor watches"""
    waited_s: float = 0.0
    """for data, since this process began"""
    saves_here: int = 0
    """checkpoints made at the present step"""
    fetched: torch.cuda.Event | None = None
    """when the GPU has the last batch, whose buffer the reader may then fill anew"""


def make_optimizer(student: Student, config: Config) -> torch.optim.AdamW:
    """AdamW that decays matrices only; a decayed Canon kernel would be drawn towards doing nothing."""
    decayed = [p for name, p in student.named_parameters() if p.ndim == 2 and "canon" not in name]
    others = [p for name, p in student.named_parameters() if p.ndim != 2 or "canon" in name]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=BETAS, fused=True)


def open_run(config: Config) -> Run:
    """Begin a run, or take it up where its newest whole checkpoint left it."""
    device = torch.device(config.device)
    lake = Lake.open(config.lake)
    found = checkpoint.load_newest(config.out)
    if found and config.resume == "never":
        raise UserError(f"{config.out} holds a run, and --resume never; choose another --out")
    beginning = {"run": uuid.uuid4().hex, "step": 0, "best": float("inf"), "best_step": 0, "skipped_steps": 0}
    state: dict[str, Any] = found[0] if found else beginning
    model = dataclasses.asdict(config.model)
    if found and state["student_config"] != model:
        differing = [name for name in model if state["student_config"].get(name) != model[name]]
        raise UserError(f"{config.out} holds a student with another {', '.join(differing)}; choose another --out")

    if found and state["lake"] != lake.setting("id"):
        raise UserError(
            f"{config.out} learned from another lake than {config.lake}, whose shard numbers mean other clips; "
            f"name that lake with --lake, or choose another --out"
        )
    teacher = load_teacher(
        config.teacher, revision=config.teacher_revision or state.get("teacher_revision"), device=device
    )
    if found and teacher.revision != state["teacher_revision"]:
        raise UserError(f"{config.out} learned from another teacher, {state['teacher_revision']}; choose another --out")
    torch.manual_seed(config.seed)
    student = Student(config.model).to(device)
    optimizer = make_optimizer(student, config)
    if found:
        student.load_state_dict(state["student"])
        optimizer.load_state_dict(state["optimizer"])
        print(f"resuming {config.out} at step {state['step']} of {config.steps}")
        if state["best_step"] == state["step"] and found[1].name == checkpoint.LATEST:
            checkpoint.keep_as_best(config.out)  # a kill may have come between the two names
    write_config(
        config.out, config, teacher_revision=teacher.revision, run_id=state["run"], is_stand_in=teacher.is_stand_in
    )

    owner = Owner(lake.root, "train")
    allocate = pinned_memory if config.device == "cuda" else ordinary_memory
    drawing = Drawing(
        **{"run": state["run"], "seed": config.seed, "num_open": config.open_shards},
        **{"batch_size": config.batch_size, "reuse": config.consume == "reuse"},
    )
    return Run(
        config=config,
        id=state["run"],
        step=state["step"],
        best=state["best"],
        best_step=state["best_step"],
        teacher=teacher,
        student=student,
        frontend=MelPcen().to(device),
        optimizer=optimizer,
        lake=lake,
        owner=owner,
        reader=LakeReader(lake, owner, drawing, state.get("reader"), allocate),
        metrics=Metrics(config.out, last_step=state["step"]),
        board=SummaryWriter(config.out / "tensorboard", purge_step=state["step"] + 1),
        heartbeat=Heartbeat(config.out / "progress.json", "train"),
        anchor=np.empty((0, 0), np.int16),
        skipped=torch.tensor(float(state["skipped_steps"]), device=device),
    )


def pinned_memory(shape: tuple[int, int]) -> np.ndarray:
    """[B, 32000] int16, not filled; the GPU fetches it by itself while we go on."""
    return torch.empty(shape, dtype=torch.int16, pin_memory=True).numpy()


def spectrogram_of(run: Run, samples: np.ndarray) -> Tensor:
    """[B, 32000] int16 -> [B, 1, 192, 128]; int16 crosses the bus, the front end runs on the device."""
    audio = torch.from_numpy(samples).to(run.config.device, non_blocking=True)  # [B, 32000] int16
    run.fetched = torch.cuda.current_stream().record_event() if audio.is_cuda else None
    return run.frontend(audio.float() / 32768)


def losses_of(run: Run, spectrogram: Tensor) -> dict[str, Tensor]:
    """[B, 1, 192, 128] -> the terms of the loss, and `loss`, their weighted sum."""
    with torch.no_grad():
        target = run.teacher(spectrogram)  # [B, E]
    predicted = run.student.project(run.student(spectrogram))  # [B, E]
    return distill_loss(predicted.float(), target.float(), run.config.loss)


def step_if_finite(optimizer: torch.optim.Optimizer, grad_norm: Tensor) -> Tensor:
    """One optimiser step, unless the gradient is not finite; decided on the device, so nothing waits for it.

    A fused AdamW leaves parameters and moments alone where `found_inf` is 1. Returns that number.
    """
    is_bad = (~torch.isfinite(grad_norm)).float()
    optimizer.found_inf = is_bad
    optimizer.step()
    return is_bad


def train(run: Run, stop: StopRequest) -> str:
    """The loop. Returns why it ended, for people."""
    config = run.config
    skipped_in_a_row, longest = torch.zeros(2, device=config.device)
    run.timed_from = (run.step, time.monotonic())
    while run.step < config.steps:
        batch = next_batch(run, stop)
        if batch is None:
            return leave(run, stop)
        for group in run.optimizer.param_groups:
            group["lr"] = config.lr_at(run.step)

        terms = losses_of(run, spectrogram_of(run, batch.samples))
        terms["loss"].backward()
        terms = {name: term.detach() for name, term in terms.items()}
        terms["grad_norm"] = nn.utils.clip_grad_norm_(run.student.parameters(), MAX_GRAD_NORM)
        is_bad = step_if_finite(run.optimizer, terms["grad_norm"])
        run.skipped, skipped_in_a_row = run.skipped + is_bad, (skipped_in_a_row + 1) * is_bad
        longest = torch.maximum(longest, skipped_in_a_row)
        run.optimizer.zero_grad(set_to_none=True)
        run.reader.mark_trained(batch.ids)
        run.step, run.saves_here = run.step + 1, 0

        if run.step % config.log_every == 0 or run.step == config.steps:
            stop_if_diverged(run, int(longest))  # waits for the device to finish the step
            longest = torch.zeros_like(longest)
            log_step(run, terms)
        if run.step % config.save_every == 0 or run.step == config.steps:
            validate_and_save(run)
            run.timed_from = (run.step, time.monotonic())
    return "all steps are done"


def leave(run: Run, stop: StopRequest) -> str:
    """Save before the last step. Returns why, for people; raises UserError if there was nothing to learn from."""
    num_unread = run.reader.num_unread()
    if stop:
        save(run)
        return "asked to stop"
    if run.step == 0:
        raise UserError(
            f"the source has ended with {num_unread} clips to train on, less than a batch of {run.config.batch_size}; "
            f"lower --batch-size, or make another lake with more sound, or with smaller validation sets (--val-clips)"
        )
    validate_and_save(run)
    return f"the lake is drained, {num_unread} clips are left over"


def next_batch(run: Run, stop: StopRequest) -> Batch | None:
    """The next batch. Waits while the lake is starved; None when it is drained or we should stop."""
    if run.fetched:
        run.fetched.synchronize()  # it is at the last step then, so it has work while we prepare the next
    begin, say_at = time.monotonic(), time.monotonic() + SAY_STARVED_EVERY_S
    while not stop:
        run.turns += 1
        batch = run.reader.next_batch()
        is_waiting = batch is None
        run.heartbeat.beat(run.turns, **run.logged, step=run.step, steps=run.config.steps, is_waiting=is_waiting)
        if not is_waiting or run.reader.is_drained():
            return batch
        run.reader.report()
        free_room_if_blocked(run)
        if time.monotonic() > say_at:
            print(f"waiting for data: no shard is ready in {run.config.lake}; is datalake/run_lake.py running?")
            say_at += SAY_STARVED_EVERY_S
        stop.wait(WAIT_S)
        run.waited_s += time.monotonic() - begin
        begin = time.monotonic()
    return None


def free_room_if_blocked(run: Run) -> None:
    """Checkpoint at once if the lake is full of shards that only a checkpoint can release.

    Otherwise lake and trainer would wait for each other. Twice, because a shard goes when the second-newest checkpoint
    covers it.
    """
    while not run.lake.has_room() and run.reader.holds_trained_shards() and run.saves_here < 2:
        save(run)


def floats(terms: dict[str, Tensor]) -> dict[str, float]:
    """Wait for the device and fetch every term."""
    return {name: float(term) for name, term in terms.items()}


def stop_if_diverged(run: Run, num_bad: int) -> None:
    """Raise UserError, naming the last good checkpoint, if too many gradients in a row were not finite."""
    if num_bad >= MAX_SKIPPED_IN_A_ROW:
        latest = run.config.out / checkpoint.LATEST
        resume = f"the last good checkpoint is {latest}: " if latest.exists() else ""
        raise UserError(
            f"{num_bad} gradients in a row before step {run.step} were not finite, expected finite ones; "
            f"{resume}run again with a lower --lr"
        )


def log_step(run: Run, terms: dict[str, Tensor]) -> None:
    """What the last step was like, and how fast the steps since the last log point or save were."""
    step, began = run.timed_from
    run.timed_from = (run.step, time.monotonic())
    run.logged = {
        **floats(terms),
        "skipped_steps": float(run.skipped),
        "lr": run.config.lr_at(run.step - 1),
        "clips_per_s": (run.step - step) * run.config.batch_size / (time.monotonic() - began),
        "waited_s": run.waited_s,
    }
    log(run, **run.logged)
    run.reader.report()


def log(run: Run, **values: float) -> None:
    """One line for programs, the same numbers for TensorBoard, and a short line for people."""
    run.metrics.log(run.step, **values)
    for name, value in values.items():
        run.board.add_scalar(name, value, run.step)
    print(f"step {run.step}/{run.config.steps}  " + "  ".join(f"{name} {value:.4g}" for name, value in values.items()))


def validate_and_save(run: Run) -> None:
    """Validation on both held-out sets, then a checkpoint, kept as best.pt if its anchor MSE is the lowest so far."""
    values = validate(run)
    if values:
        log(run, **values)
    mse = values.get("anchor_mse", float("inf"))
    is_best = mse < run.best
    if is_best:
        run.best, run.best_step = mse, run.step
    save(run, is_best)


@torch.no_grad()
def validate(run: Run) -> dict[str, float]:
    """MSE, cosine and explained variance on the anchor and the recent set; an empty set gives no numbers."""
    num_clips = int(run.lake.setting("val_clips"))
    if len(run.anchor) == 0:
        run.anchor = read_validation(run.lake, ANCHOR, num_clips)
    values: dict[str, float] = {}
    for name, samples in ((ANCHOR, run.anchor), (RECENT, read_validation(run.lake, RECENT, num_clips))):
        if len(samples) >= 2:
            values |= {f"{name}_{metric}": value for metric, value in floats(agreement_on(run, samples)).items()}
    return values


def agreement_on(run: Run, samples: np.ndarray) -> dict[str, Tensor]:
    """[n, 32000] int16 -> how close the student is to the teacher; 1 is perfect explained variance and cosine."""
    predicted, target = [], []
    for part in np.array_split(samples, -(-len(samples) // run.config.batch_size)):
        spectrogram = spectrogram_of(run, part)
        predicted.append(run.student.project(run.student(spectrogram)).double())
        target.append(run.teacher(spectrogram).double())
    return agreement(torch.cat(predicted), torch.cat(target))


def save(run: Run, is_best: bool = False) -> None:
    """Write a checkpoint that is read back before it counts, then let the ledger retire what two of them cover."""
    state = {
        "run": run.id,
        "step": run.step,
        "best": run.best,
        "best_step": run.best_step,
        "skipped_steps": int(run.skipped),
        "student_config": dataclasses.asdict(run.config.model),
        "student": run.student.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "reader": run.reader.state(),
        "teacher_revision": run.teacher.revision,
        "lake": run.lake.setting("id"),
    }
    checkpoint.save(run.config.out, state)
    if is_best:
        checkpoint.keep_as_best(run.config.out)
    run.reader.record_checkpoint()
    run.saves_here += 1


def check(config: Config) -> None:
    """Refuse a device that is not there, and a cap smaller than what must be in flight, with the sum."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch finds no GPU; for a CPU: python distill_hear_vit_s_canon2d.py demo")
    if not (config.lake / "ledger.sqlite").exists():
        return
    lake = Lake.open(config.lake)
    shard_clips, val_clips = int(lake.setting("shard_clips")), int(lake.setting("val_clips"))
    workers = int(lake.setting("max_workers"))
    needs = {
        f"{workers} workers, one shard each": workers * shard_clips,
        f"{config.open_shards} open shards": config.open_shards * shard_clips,
        f"2 checkpoint intervals of {config.save_every} x {config.batch_size} clips": 2
        * config.save_every
        * config.batch_size,
        f"2 validation sets of {val_clips} clips": 2 * val_clips,
    }
    needed_bytes = shard_bytes(sum(needs.values()))
    if lake.cap_bytes() < needed_bytes:
        terms = " + ".join(f"{name} ({gib(shard_bytes(clips))})" for name, clips in needs.items())
        raise UserError(
            f"the cap of {gib(lake.cap_bytes())} is too small: {terms} = {gib(needed_bytes)} must fit; "
            f"raise --cap-gb, or lower --save-every, --open-shards or the number of workers"
        )


def main(config: Config) -> None:
    demo.prepare(config.teacher)
    stop = StopRequest()
    refusal = f"{config.out} is being trained by another process; wait for it or choose another --out"
    with alone(config.out / "lock", refusal):
        check(config)
        run = open_run(config)
        try:
            reason = train(run, stop)
        finally:
            run.reader.close()
            run.owner.release()
            run.metrics.close()
            run.board.close()
    draw_losses(config.out)
    print(f"{reason}: step {run.step} of {config.steps}, waited {run.waited_s:.0f} s for data; {config.out}/latest.pt")


if __name__ == "__main__":
    cli.run(main, PRESETS, __doc__, check=check)
