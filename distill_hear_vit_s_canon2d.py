"""Distil HeAR into a ViT-S with Canon2D layers.

in:   the shards of a lake (from stream_laion_audio_clips.py, kept coming by datalake/run_lake.py); HeAR, frozen
out:  <out>/{config.json, latest.pt, previous.pt, best.pt, metrics.jsonl, tensorboard/, progress.json, loss.png, lock},
      with --keep also step-<number>.pt
cost: on a GPU not measured; the demo about a minute on two cores, streamers included

    python distill_hear_vit_s_canon2d.py --lake lake        # the recommended run, on a GPU
    python distill_hear_vit_s_canon2d.py paper              # the published losses, weights and batch
    python distill_hear_vit_s_canon2d.py demo               # CPU, minutes, no network
    python distill_hear_vit_s_canon2d.py plot --out RUN     # draw the curves of a run, also of one that is going on

A step adds up the gradients of some equal chunks of clips; the noise between them is measured. "Samples" are clips.

B clips of a chunk   n clips of a sample or a validation set   E = 512 HeAR embedding
"""

import dataclasses
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from hear_distill import checkpoint, cli, demo, lengths
from hear_distill.critical_lr import NUM_KEPT
from hear_distill.data import Batch, Drawing, LakeReader, ordinary_memory
from hear_distill.feed import Feed, View, pinned_memory
from hear_distill.files import UserError
from hear_distill.fit import chunk_that_fits, rehearse_steps
from hear_distill.frontend import MelPcen
from hear_distill.journal import Journal, require_wandb
from hear_distill.lake import Lake
from hear_distill.learning import Learning
from hear_distill.locks import Owner, alone
from hear_distill.objective import LossConfig, measure
from hear_distill.pace import ControllerName, Pace
from hear_distill.plots import draw_curves
from hear_distill.room import refuse_small_cap
from hear_distill.runlog import StopRequest, write_config
from hear_distill.sample import first_clips, has_sample, num_ready
from hear_distill.schedule import Control, Schedule
from hear_distill.student import SIZES, StudentConfig
from hear_distill.teacher import Teacher, load_teacher, to_bfloat16
from hear_distill.validation import Validation

BEST_LOSS = LossConfig(patch=0.5, weighting="balanced")
BEST_SCHEDULE = Schedule(warmup_samples=256_000, decay_samples=5_120_000)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of the trainer. --out remembers model, loss, --seed and --pad-share; the rest may change in between."""

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
    teacher_precision: Literal["auto", "bf16", "fp32"] = "auto"
    """of its weights; bf16 is checked against fp32 at the start; auto: bf16 on a GPU, fp32 on a CPU"""
    target_clips: int = 16_384
    """first clips of a run, embedded once for the statistics of the targets and the queue, then trained on"""
    device: Literal["cuda", "cpu"] = "cuda"
    """cpu is for the demo and for debugging"""
    chunk_size: int = 256
    """clips in one backward pass; halved at the start, with twice the chunks, until they fit into the GPU"""
    chunks: int = 2
    """chunks in one step, at first; two or more, so that the noise of the gradient can be measured"""
    controller: ControllerName = "off"
    """what moves rate and batch beside the schedule: ema-batch (published: the rate falls as the noise grows), batch
    (the batch follows the noise), seesaw (half of the decay becomes batch)"""
    warmup: Literal["linear", "critical"] = "linear"
    """critical: replace --schedule.peak by what is measured in the warm-up, and keep the rate stable afterwards"""
    weight_decay: float = 0.05
    """of matrices; norms, biases and Canon kernels have none"""
    pad_share: float = 0.15
    """share of clips that are cut to 0.3 to 2 s and padded with zeros, as short events are"""
    open_shards: int = 8
    """shards that a batch is drawn from"""
    consume: Literal["once", "reuse"] = "once"
    """once: each clip is trained on once, then its shard goes; reuse: shards are kept, pass after pass, until the lake
    wants room for new ones (for small sources, and for one trainer on a lake)"""
    save_every: int = 102_400
    """clips between checkpoints, each with a validation; the lake must hold two such intervals"""
    lengths: tuple[int, ...] = (2,)
    """seconds; with `2 4 8`, where a recording is long enough, clips are put together again: each chunk is of one
    length, and the target is the mean of the teacher's over the clips"""
    keep: int = 0
    """newest checkpoints that stay as step-<number>.pt, beside latest.pt, previous.pt and best.pt; about 260 MB each"""
    log_every: int = 10_240
    """clips between log lines"""
    probe_table: Path | None = None
    """labelled recordings, laid out as the evaluator's; a quick probe on some of them goes with each validation"""
    wandb: bool = False
    """send the numbers to Weights & Biases as well; WANDB_MODE=offline keeps them in --out"""
    seed: int = 0
    """of the initial weights, of the order of the clips and of their cuts"""
    model: StudentConfig = SIZES["small"]
    loss: LossConfig = BEST_LOSS
    schedule: Schedule = BEST_SCHEDULE

    def __post_init__(self) -> None:
        if min(self.open_shards, self.save_every, self.log_every) < 1:
            raise ValueError("--open-shards, --save-every and --log-every must be at least 1")
        if min(self.chunk_size, self.chunks, self.target_clips) < 2:
            raise ValueError("--chunk-size, --chunks and --target-clips must be at least 2: they are compared")
        lengths.check(self.lengths, self.chunk_size, self.controller)
        if self.keep < 0:
            raise ValueError(f"--keep must be 0 or more, got {self.keep}")
        if not 0 <= self.pad_share <= 1:
            raise ValueError(f"--pad-share must be between 0 and 1, got {self.pad_share}")
        if self.save_every % self.log_every:
            raise ValueError(f"--save-every {self.save_every} must be a multiple of --log-every {self.log_every}")
        if self.warmup == "critical" and self.schedule.warmup_samples < NUM_KEPT * self.batch_size():
            raise ValueError(
                f"--warmup critical looks {NUM_KEPT} times in the warm-up, so --schedule.warmup-samples must be at "
                f"least {NUM_KEPT * self.batch_size()}, got {self.schedule.warmup_samples}"
            )

    def batch_size(self) -> int:
        """Clips of the first step, and of all unless a controller changes it."""
        return self.chunk_size * self.chunks

    def largest_batch(self) -> int:
        """Clips of the largest step that the controller may ask for."""
        return self.batch_size() * (MAX_GROWTH if self.controller in ("batch", "seesaw") else 1)

    def control(self) -> Control:
        """What the controller starts from; the noise that it looks at is new at each log point only."""
        return Control(
            schedule=self.schedule,
            chunk_samples=self.chunk_size,
            base_chunks=self.chunks,
            max_chunks=MAX_GROWTH * self.chunks,
            check_samples=max(Control.check_samples, self.log_every),
        )


PRESETS = {
    "best": Config(),
    "paper": Config(
        out=Path("runs/paper"),
        chunk_size=64,
        controller="ema-batch",
        pad_share=0.0,
        save_every=128_000,
        log_every=2_560,
        loss=LossConfig(negatives="batch"),
        schedule=Schedule(shape="constant", peak=3e-4),
    ),
    "demo": Config(
        lake=demo.DEMO / "lake",
        out=demo.DEMO / "run",
        teacher=str(demo.TEACHER),
        target_clips=256,
        device="cpu",
        chunk_size=8,
        open_shards=4,
        save_every=320,
        log_every=80,
        model=StudentConfig(width=96, blocks=4, heads=3, mlp_width=384),
        schedule=Schedule(peak=2e-3, total_samples=3200, warmup_samples=160, decay_samples=640),
    ),
}
MAX_GROWTH = 16  # of the batch, by a controller
MAX_SKIPPED_IN_A_ROW = 3  # non-finite gradients; one can be bad luck, three are a diverged run
PRECISION_CLIPS = 256  # of the anchor, on which bfloat16 is checked
WAIT_S = 0.2
SAY_STARVED_EVERY_S = 60.0


@dataclass
class Run:
    """Everything that lives from the first step to the last."""

    config: Config
    id: str
    learning: Learning
    validation: Validation
    lake: Lake
    owner: Owner
    feed: Feed
    journal: Journal
    best: float = float("inf")
    """lowest validation MSE so far, and its step"""
    best_step: int = 0
    covered: dict[str, Any] = field(default_factory=dict)
    """state of the reader after the last whole step"""
    is_whole: bool = False
    """whether all parts of the state belong to the same step"""
    timed_from: tuple[int, float] = (0, 0.0)
    """the samples, and the monotonic time, from which clips per second are counted"""
    say_at: float = 0.0
    """monotonic time of the next line about waiting"""
    saves_here: int = 0
    """checkpoints made at the present step"""


def remembered(config: Config) -> dict[str, dict[str, Any]]:
    """What must not change in the life of a run, by what it belongs to."""
    run = {"seed": config.seed, "pad_share": config.pad_share}
    return {"student": dataclasses.asdict(config.model), "loss": dataclasses.asdict(config.loss), "run": run}


def refuse_another(config: Config, state: dict[str, Any], lake: Lake) -> None:
    """Raise UserError unless the run in --out may go on, and with this model, this loss and this lake."""
    if config.resume == "never":
        raise UserError(f"{config.out} holds a run, and --resume never; choose another --out")
    asked = remembered(config)
    for what, kept in state["remembered"].items():
        differing = [name for name in asked[what] if kept.get(name) != asked[what][name]]
        if differing:
            raise UserError(f"{config.out} holds a {what} with another {', '.join(differing)}; choose another --out")
    if state["lake"] != lake.setting("id"):
        raise UserError(
            f"{config.out} learned from another lake than {config.lake}, whose shard numbers mean other clips; "
            f"name that lake with --lake, or choose another --out"
        )


def new_learning(config: Config, teacher: Teacher) -> Learning:
    """Before its first step, compiled on a GPU."""
    pace = Pace(config.control(), config.controller, config.warmup == "critical", torch.device(config.device))
    learning = Learning(teacher, config.model, config.loss, pace, config.weight_decay, config.seed)
    if config.device == "cuda":
        learning.learner.compile(dynamic=False)
    return learning


def fitted(config: Config, teacher: Teacher) -> Config:
    """The same batch in chunks that fit into the memory of the GPU."""

    def rehearse(size: int) -> None:
        smaller = dataclasses.replace(config, chunk_size=size, chunks=2)
        rehearse_steps(new_learning(smaller, teacher), size, config.target_clips)

    size = chunk_that_fits(config.chunk_size, config.loss, torch.device(config.device), rehearse)
    return dataclasses.replace(config, chunk_size=size, chunks=config.chunks * config.chunk_size // size)


def open_run(config: Config) -> Run:
    """Begin a run, or take it up where its newest whole checkpoint left it."""
    device = torch.device(config.device)
    lake = Lake.open(config.lake)
    state, path = checkpoint.load_newest(config.out) or (None, None)
    if state:
        refuse_another(config, state, lake)
    revision = config.teacher_revision or (state["teacher_revision"] if state else None)
    teacher = load_teacher(config.teacher, revision=revision, device=device)
    if state and teacher.revision != state["teacher_revision"]:
        raise UserError(f"{config.out} learned from another teacher, {state['teacher_revision']}; choose another --out")
    if config.device == "cuda":
        teacher.model.compile(dynamic=False)
    config = fitted(config, teacher)
    run_id = state["run"] if state else uuid.uuid4().hex
    write_config(config.out, config, teacher_revision=teacher.revision, run_id=run_id, is_stand_in=teacher.is_stand_in)

    learning = new_learning(config, teacher)
    if state:
        learning.load_state_dict(state)
        print(f"resuming {config.out} at step {learning.step}, {learning.samples} clips")
        if state["best_step"] == learning.step and path.name == checkpoint.LATEST:
            checkpoint.keep_as_best(config.out)  # a kill may have come between the two names
        if path.name == checkpoint.LATEST:
            checkpoint.keep_numbered(config.out, learning.step, config.keep)

    owner, view = Owner(lake.root, "train"), View(MelPcen().to(device), device, config.seed, config.pad_share)
    drawing = Drawing(
        **{"run": run_id, "seed": config.seed, "num_open": config.open_shards},
        **{"batch_size": config.chunk_size, "reuse": config.consume == "reuse"},
        **{"sizes": lengths.sizes_of(config.lengths), "batches_per_size": config.chunks},
    )
    allocate = pinned_memory if config.device == "cuda" else ordinary_memory
    reader = LakeReader(lake, owner, drawing, state["reader"] if state else None, allocate)
    return Run(
        **{"config": config, "id": run_id, "learning": learning, "lake": lake, "owner": owner},
        validation=Validation(lake, teacher, view.frontend, device, config.probe_table),
        feed=Feed(reader, view),
        journal=Journal(config.out, learning.step, run_id if config.wandb else None),
        **({name: state[name] for name in ("best", "best_step")} if state else {}),
    )


def begin(run: Run, stop: StopRequest) -> bool:
    """What comes before the first step: the teacher's precision and, in a new run, a look at the first clips.

    Returns False if asked to stop before that was done, or if there are no clips.
    """
    config, learning = run.config, run.learning
    is_new = learning.objective is None
    while is_new and not has_sample(run.lake, config.target_clips) and not stop:
        wait(run, stop, f"{config.target_clips} clips for --target-clips are not ready")
    if stop or (is_new and num_ready(run.lake) < 2):
        return False
    if config.teacher_precision == "bf16" or (config.teacher_precision == "auto" and config.device == "cuda"):
        to_bfloat16(learning.teacher, run.validation.anchor_part(PRECISION_CLIPS))
    if config.warmup == "critical":
        learning.held_out = run.validation.anchor_part(config.chunk_size)
    if is_new:
        clips = first_clips(run.lake, config.target_clips, config.chunk_size)
        sample = ((ids, run.feed.view(samples, ids)) for ids, samples in clips)
        learning.start_with(measure(learning.teacher, config.loss, sample, config.seed))
    run.covered, run.is_whole = run.feed.reader.state(), True
    return True


def train(run: Run, stop: StopRequest) -> str:
    """The loop. Returns why it ended, for people."""
    config, learning = run.config, run.learning
    if not begin(run, stop):
        return leave(run, stop)
    run.timed_from = (learning.samples, time.monotonic())
    while not learning.is_done():
        for _ in range(learning.begin_step().num_chunks):
            batch = run.feed.next(stop, lambda: wait(run, stop, "no shard is ready"))
            if batch is None:
                return leave(run, stop)
            beat(run, is_waiting=False)
            learn_from(run, batch)
        terms = finish_step(run)

        if learning.has_passed(config.log_every):
            stop_if_diverged(run)  # waits for the device to finish the step
            log_step(run, terms)
        if learning.has_passed(config.save_every):
            validate_and_save(run)
            run.timed_from = (learning.samples, time.monotonic())
    return "all clips are done"


def learn_from(run: Run, batch: Batch) -> None:
    """One chunk of a step."""
    if batch.clips_per_sound == 1:
        run.learning.add(run.feed.spectrogram(batch), batch.ids)
    else:
        whole, windows = run.feed.long_spectrograms(batch)
        run.learning.add(whole, batch.ids, windows)


def finish_step(run: Run) -> dict[str, Tensor]:
    """The optimiser step of the chunks, and the book of their clips. Returns the terms of the loss."""
    run.is_whole = False
    terms = run.learning.finish_step()
    run.feed.mark_trained(run.learning.ids())
    run.covered, run.saves_here = run.feed.reader.state(), 0
    run.is_whole = True
    return terms


def leave(run: Run, stop: StopRequest) -> str:
    """Save before the last step. Returns why, for people; raises UserError if there was nothing to learn from."""
    if stop:
        if run.is_whole:
            save(run)
        return "asked to stop"
    num_left = run.feed.num_left()
    if run.learning.step == 0:
        raise UserError(
            f"the source has ended with {num_left} clips to train on, less than a batch of {run.config.batch_size()}; "
            f"lower --chunk-size, or make another lake with more sound, or with smaller validation sets (--val-clips)"
        )
    validate_and_save(run)
    return f"the lake is drained, {num_left} clips are left over"


def wait(run: Run, stop: StopRequest, reason: str) -> None:
    """A moment without data."""
    beat(run, is_waiting=True)
    run.feed.reader.report()
    free_room_if_blocked(run)
    if time.monotonic() > run.say_at:
        print(f"waiting for data: {reason} in {run.config.lake}; is datalake/run_lake.py running?")
        run.say_at = time.monotonic() + SAY_STARVED_EVERY_S
    stop.wait(WAIT_S)


def beat(run: Run, is_waiting: bool) -> None:
    """Tell the supervisor how far we are. Steps still to come are counted at the first batch."""
    learning = run.learning
    missing = run.config.schedule.total_samples - learning.samples
    steps = learning.step + max(0, -(-missing // run.config.batch_size()))
    run.journal.beat(step=learning.step, steps=steps, is_waiting=is_waiting)


def free_room_if_blocked(run: Run) -> None:
    """Checkpoint at once if the lake is full of shards that only a checkpoint can release.

    Otherwise lake and trainer would wait for each other. Twice, because a shard goes when the second-newest checkpoint
    covers it.
    """
    while not run.lake.has_room() and run.feed.reader.holds_trained_shards() and run.saves_here < 2:
        save(run)


def stop_if_diverged(run: Run) -> None:
    """Raise UserError, naming the last good checkpoint, if too many gradients in a row were not finite."""
    num_bad = run.learning.watch.take_longest()
    if num_bad >= MAX_SKIPPED_IN_A_ROW:
        latest = run.config.out / checkpoint.LATEST
        resume = f"the last good checkpoint is {latest}: " if latest.exists() else ""
        raise UserError(
            f"{num_bad} gradients in a row before step {run.learning.step} were not finite, expected finite ones; "
            f"{resume}run again with a lower --schedule.peak"
        )


def log_step(run: Run, terms: dict[str, Tensor]) -> None:
    """What the last step was like, and how fast the steps since the last log point or save were."""
    learning, now, (samples, began) = run.learning, time.monotonic(), run.timed_from
    run.timed_from = (learning.samples, now)
    values = {
        "samples": learning.samples,
        **{name: float(term) for name, term in terms.items()},
        **learning.watch.counts(),
        **learning.pace.look(),
        "lr": learning.plan.rate,
        "batch_size": learning.batch_size(),
        "clips_per_s": (learning.samples - samples) / (now - began),
        "waited_s": run.feed.waited_s,
    }
    if len(run.config.lengths) > 1:
        values |= run.feed.take_length_counts()
    run.journal.log_step(learning.step, values)
    run.feed.reader.report()


def validate_and_save(run: Run) -> None:
    """Validation on both held-out sets, then a checkpoint, kept as best.pt if its anchor MSE is the lowest so far."""
    learning = run.learning
    statistics = learning.objective.statistics
    values = run.validation.measure(learning.ema.model, statistics)
    run.journal.log(learning.step, {"samples": learning.samples, **values, **run.validation.drift(statistics)})
    is_best = values.get("anchor_mse", float("inf")) < run.best
    if is_best:
        run.best, run.best_step = values["anchor_mse"], learning.step
    save(run, is_best)


def save(run: Run, is_best: bool = False) -> None:
    """Write a checkpoint that is read back before it counts, then let the ledger retire what two of them cover."""
    state = {
        "run": run.id,
        "best": run.best,
        "best_step": run.best_step,
        "reader": run.covered,
        "remembered": remembered(run.config),
        "lake": run.lake.setting("id"),
        **run.learning.state_dict(),
    }
    checkpoint.save(run.config.out, state)
    if is_best:
        checkpoint.keep_as_best(run.config.out)
    checkpoint.keep_numbered(run.config.out, run.learning.step, run.config.keep)
    run.feed.reader.record_checkpoint()
    run.saves_here += 1


def check(config: Config) -> None:
    """Refuse a device that is not there, and a cap smaller than what must be in flight, with the sum."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch finds no GPU; for a CPU: python distill_hear_vit_s_canon2d.py demo")
    if config.wandb:
        require_wandb()
    if (config.lake / "ledger.sqlite").exists():
        interval = max(config.save_every, config.largest_batch())
        refuse_small_cap(Lake.open(config.lake), config.open_shards, interval, config.target_clips)


def main(config: Config) -> None:
    demo.prepare(config.teacher)
    stop = StopRequest()
    with alone(config.out / "lock", f"{config.out} is being trained by another process; choose another --out"):
        check(config)
        run = open_run(config)
        try:
            reason = train(run, stop)
        except Exception as e:
            if not isinstance(e, UserError) and run.is_whole:  # whatever broke, the steps before it are good
                save(run)
            raise
        finally:
            run.feed.reader.close()
            run.owner.release()
            run.journal.close()
    draw_curves(config.out)
    print(
        f"{reason}: step {run.learning.step}, {run.learning.samples} of {config.schedule.total_samples} clips, "
        f"waited {run.feed.waited_s:.0f} s for data; {config.out}/latest.pt"
    )


if __name__ == "__main__":
    cli.run(main, PRESETS, __doc__, actions={"plot": lambda config: draw_curves(config.out)}, check=check)
