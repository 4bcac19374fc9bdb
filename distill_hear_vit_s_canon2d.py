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
Under torchrun every rank does this, and one of them writes <out> (hear_distill/ranks.py; run_lake.py --gpus N).

B clips of a chunk   n clips of a sample or a validation set   E = 512 HeAR embedding
"""

import dataclasses
import os
import time
import uuid
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from hear_distill import checkpoint, cli, demo, lengths
from hear_distill.critical_lr import NUM_KEPT
from hear_distill.data import Batch, Drawing, ordinary_memory
from hear_distill.feed import Feed, View, pinned_memory
from hear_distill.files import UserError
from hear_distill.fit import chunk_that_fits, rehearse_steps
from hear_distill.frontend import MelPcen
from hear_distill.journal import Journal, Pulse, require_wandb
from hear_distill.keeping import Keeper, refuse_another
from hear_distill.lake import Lake
from hear_distill.learning import Learning
from hear_distill.locks import Owner, alone
from hear_distill.objective import LossConfig, measure
from hear_distill.pace import ControllerName, Pace
from hear_distill.plots import draw_curves
from hear_distill.ranks import ALONE, Ranks, local_world_size, refuse_missing_gpus, world_size
from hear_distill.room import refuse_small_cap
from hear_distill.runlog import StopRequest, progress_file, write_config
from hear_distill.schedule import MAX_GROWTH, Control, Schedule, max_growth
from hear_distill.student import SIZES, StudentConfig
from hear_distill.teacher import Teacher, load_teacher, to_bfloat16
from hear_distill.validation import Validation

BEST_LOSS = LossConfig(relational=0.0, contrastive=0.0, patch=0.5)  # what won the ablations in NOTES.md
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
    """clips in one backward pass of one GPU; halved at the start, with twice the chunks, until they fit into it"""
    chunks: int = 2
    """chunks of each GPU in one step, at first; two or more in all, as the noise is measured between them"""
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
        if min(self.chunk_size, self.chunks * world_size(), self.target_clips) < 2 or self.chunks < 1:
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
        """Clips of the first step on all ranks together, and of all steps unless a controller changes it."""
        return self.chunk_size * self.chunks * world_size()

    def largest_batch(self) -> int:
        """Clips of the largest step that the controller may ask for."""
        return self.batch_size() * max_growth(self.controller)

    def control(self) -> Control:
        """What the controller starts from; the noise that it looks at is new at each log point only."""
        return Control(
            schedule=self.schedule,
            chunk_samples=self.chunk_size * world_size(),
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
MAX_SKIPPED_IN_A_ROW = 3  # non-finite gradients; one can be bad luck, three are a diverged run
PRECISION_CLIPS = 256  # of the anchor, on which bfloat16 is checked
WAIT_S = 0.2
SAY_STARVED_EVERY_S = 60.0


@dataclass
class Run:
    """Everything that lives from the first step to the last."""

    config: Config
    ranks: Ranks
    learning: Learning
    validation: Validation
    lake: Lake
    owner: Owner
    feed: Feed
    journal: Pulse
    keeper: Keeper
    timed_from: tuple[int, float] = (0, 0.0)
    """the samples, and the monotonic time, from which clips per second are counted"""
    say_at: float = 0.0
    """monotonic time of the next line about waiting"""


def remembered(config: Config) -> dict[str, dict[str, Any]]:
    """What must not change in the life of a run, by what it belongs to."""
    run = {"seed": config.seed, "pad_share": config.pad_share}
    return {"student": dataclasses.asdict(config.model), "loss": dataclasses.asdict(config.loss), "run": run}


def new_learning(config: Config, teacher: Teacher, ranks: Ranks = ALONE) -> Learning:
    """Before its first step, compiled on a GPU."""
    pace = Pace(config.control(), config.controller, config.warmup == "critical", torch.device(config.device), ranks)
    learning = Learning(teacher, config.model, config.loss, pace, config.weight_decay, config.seed)
    if config.device == "cuda":
        learning.learner.compile(dynamic=False)
    return learning


def fitted(config: Config, teacher: Teacher, ranks: Ranks = ALONE) -> Config:
    """The same batch in chunks that fit into the memory of every rank's GPU; each tries by itself."""

    def rehearse(size: int) -> None:
        num_chunks = config.chunks * config.chunk_size // size if config.warmup == "critical" else 2
        smaller = dataclasses.replace(config, chunk_size=size, chunks=max(2, num_chunks))
        rehearse_steps(new_learning(smaller, teacher), size, config.target_clips)

    device, sizes = torch.device(config.device), lengths.sizes_of(config.lengths)
    size = chunk_that_fits(config.chunk_size, config.loss, device, rehearse, sizes, ranks)
    return dataclasses.replace(config, chunk_size=size, chunks=config.chunks * config.chunk_size // size)


def open_run(config: Config, ranks: Ranks) -> Run:
    """Begin a run, or take it up where its newest whole checkpoint left it; only the first rank needs to have one."""
    device = torch.device(config.device)
    lake = Lake.open(config.lake)
    state, path = ranks.share((checkpoint.load_newest(config.out) if ranks.is_first else None) or (None, None))
    if state:
        if config.resume == "never":
            raise UserError(f"{config.out} holds a run, and --resume never; choose another --out")
        refuse_another(config.out, remembered(config), state, lake)
    revision = config.teacher_revision or (state["teacher_revision"] if state else None)
    teacher = load_teacher(config.teacher, revision=revision, device=device)
    if state and teacher.revision != state["teacher_revision"]:
        raise UserError(f"{config.out} learned from another teacher, {state['teacher_revision']}; choose another --out")
    if config.device == "cuda":
        teacher.model.compile(dynamic=False)
    config = fitted(config, teacher, ranks)
    if len(set(ranks.gather(teacher.revision))) > 1:
        raise UserError(f"the ranks found different revisions of {config.teacher}; name one with --teacher-revision")
    run_id = ranks.share(state["run"] if state else uuid.uuid4().hex)
    if ranks.is_first:
        facts = {"teacher_revision": teacher.revision, "is_stand_in": teacher.is_stand_in, "run_id": run_id}
        write_config(config.out, config, **facts, num_ranks=ranks.size)

    learning = new_learning(config, teacher, ranks)
    keeper = Keeper(config.out, config.keep, run_id, remembered(config), ranks)
    if state:
        learning.load_state_dict(state)
        keeper.take_up(state, path)
        print(f"resuming {config.out} at step {learning.step}, {learning.samples} clips")

    owner, view = Owner(lake.root, "train"), View(MelPcen().to(device), device, config.seed, config.pad_share)
    drawing = Drawing(
        **{"run": run_id, "seed": config.seed, "num_open": config.open_shards},
        **{"batch_size": config.chunk_size, "reuse": config.consume == "reuse"},
        **{"sizes": lengths.sizes_of(config.lengths), "batches_per_size": config.chunks},
    )
    allocate = pinned_memory if config.device == "cuda" else ordinary_memory
    wandb_id = run_id if config.wandb else None
    pulse = config.out / progress_file(ranks.node) if ranks.speaks else None
    return Run(
        **{"config": config, "ranks": ranks, "learning": learning, "lake": lake, "owner": owner, "keeper": keeper},
        validation=Validation(lake, teacher, view.frontend, device, config.probe_table if ranks.is_first else None),
        feed=Feed(lake, owner, drawing, view, ranks, state["reader"] if state else None, allocate),
        journal=Journal(config.out, learning.step, wandb_id) if ranks.is_first else Pulse(pulse),
    )


def begin(run: Run, stop: StopRequest) -> bool:
    """What comes before the first step: the teacher's precision and, in a new run, a look at the first clips.

    Returns False if asked to stop before that was done, or if there are no clips.
    """
    config, learning = run.config, run.learning
    is_new = learning.objective is None
    while is_new and not (has_sample := run.feed.has_sample(config.target_clips, stop)):
        if has_sample is None:
            return False
        wait(run, stop, f"{config.target_clips} clips for --target-clips are not ready")
    if config.teacher_precision == "bf16" or (config.teacher_precision == "auto" and config.device == "cuda"):
        to_bfloat16(learning.teacher, run.validation.anchor_part(PRECISION_CLIPS))
    if config.warmup == "critical":
        learning.hold_out(run.validation.anchor_part(config.chunk_size))
    if is_new:
        sample = run.feed.sample(config.target_clips)
        learning.start_with(measure(learning.teacher, config.loss, sample, config.seed, run.ranks))
    run.keeper.finish_step()
    return True


def train(run: Run, stop: StopRequest) -> str:
    """The loop. Returns why it ended, for people."""
    config, learning = run.config, run.learning
    if not begin(run, stop):
        return leave(run, any(run.ranks.gather(bool(stop))))
    run.timed_from = (learning.samples, time.monotonic())
    while not learning.is_done():
        if not learn_chunks(run, stop):
            if not run.feed.is_stopping() and deal_anew(run):
                continue
            return leave(run, run.feed.is_stopping())
        terms = finish_step(run)

        if learning.has_passed(config.log_every):
            stop_if_diverged(run)  # waits for the device to finish the step
            log_step(run, terms)
        if learning.has_passed(config.save_every):
            validate_and_save(run)
            run.timed_from = (learning.samples, time.monotonic())
    return "all clips are done"


def learn_chunks(run: Run, stop: StopRequest) -> bool:
    """All chunks of a step. False if there is not a chunk for every rank, now or later, or if all should stop."""
    for _ in range(run.learning.begin_step().num_chunks):
        batch = run.feed.next(stop, lambda: wait(run, stop, "no shard is ready"))
        if batch is None:
            return False
        beat(run, is_waiting=False)
        learn_from(run, batch)
    return True


def learn_from(run: Run, batch: Batch) -> None:
    """One chunk of a step."""
    names = run.feed.names(batch.ids)
    if batch.clips_per_sound == 1:
        run.learning.add(run.feed.spectrogram(batch), names)
    else:
        whole, windows = run.feed.long_spectrograms(batch)
        run.learning.add(whole, names, windows)


def finish_step(run: Run) -> dict[str, Tensor]:
    """The optimiser step of the chunks, and the book of their clips. Returns the terms of the loss."""
    run.keeper.begin_step()
    terms = run.learning.finish_step()
    run.feed.mark_trained(run.learning.ids())
    run.keeper.finish_step()
    return terms


def deal_anew(run: Run) -> bool:
    """A rank has run dry: give it shards of others, and begin the step again, if that makes a whole step."""
    share = run.feed.better_deal(run.learning.plan.num_chunks * run.config.chunk_size)
    if share is None:
        return False
    run.keeper.save(run.learning, run.feed)
    run.feed.take(share)
    print(f"step {run.learning.step}: a rank has run dry, and what the others had left is dealt anew")
    return True


def leave(run: Run, is_stopping: bool) -> str:
    """Save before the last step. Returns why, for people; raises UserError if there was nothing to learn from."""
    if is_stopping:
        if run.keeper.is_whole:
            run.keeper.save(run.learning, run.feed)
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
    """A moment without data.

    If the lake is full of shards that only a checkpoint can release, lake and trainer would wait for each other: save,
    and twice, because a shard goes when the second-newest checkpoint covers it.
    """
    beat(run, is_waiting=run.feed.is_short())
    run.feed.reader.report()
    if run.feed.must_save() and run.keeper.saves_here < 2:
        return run.keeper.save(run.learning, run.feed)
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
    learning, is_best = run.learning, False
    if run.ranks.is_first:
        statistics = learning.objective.statistics
        values = run.validation.measure(learning.ema.model, statistics)
        run.journal.log(learning.step, {"samples": learning.samples, **values, **run.validation.drift(statistics)})
        is_best = run.keeper.note(learning.step, values.get("anchor_mse", float("inf")))
    run.keeper.save(learning, run.feed, is_best)


def check(config: Config) -> None:
    """Refuse a device that is not there, and a cap smaller than what must be in flight, with the sum."""
    refuse_missing_gpus(config.device)
    num_local, num_ranks = local_world_size(), world_size()
    if config.consume == "reuse" and num_local > 1:
        raise UserError(f"--consume reuse is for one GPU on a lake, and there are {num_local} ranks on this machine")
    if config.wandb:
        require_wandb()
    if config.probe_table is not None and not config.probe_table.is_file():
        raise UserError(f"--probe-table {config.probe_table} is no file; name a table of recordings and their labels")
    if len(config.lengths) > 1 and num_ranks > 1:
        raise UserError(f"--lengths is for one GPU, and there are {num_ranks} ranks; leave it out")
    if (config.lake / "ledger.sqlite").exists():
        needs = [max(config.save_every, config.largest_batch()), config.target_clips]  # of all lakes
        in_lake = [-(-clips * num_local // num_ranks) for clips in needs]
        refuse_small_cap(Lake.open(config.lake), config.open_shards, *in_lake, num_ranks=num_local)


def main(config: Config) -> None:
    stop, ranks = StopRequest(), Ranks.join(config.device)
    if ranks.is_first:
        demo.prepare(config.teacher)
    if not ranks.speaks:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # warnings, on stderr, are still heard
    ranks.meet()
    refusal = f"{config.out} is being trained by another process; choose another --out"
    with alone(config.out / "lock", refusal) if ranks.is_first else nullcontext():
        check(config)
        Pulse(
            config.out / progress_file(ranks.node) if ranks.speaks else None
        ).beat()  # all are here, however long it took
        run = open_run(config, ranks)
        try:
            reason = train(run, stop)
        except Exception as e:  # whatever broke, the steps before it are good; but one rank cannot save without others
            if not isinstance(e, UserError) and run.keeper.is_whole and ranks.size == 1:
                run.keeper.save(run.learning, run.feed)
            raise
        finally:
            run.feed.reader.close()
            run.owner.release()
            run.journal.close()
        ranks.leave()
    if ranks.is_first:
        draw_curves(config.out)
    print(
        f"{reason}: step {run.learning.step}, {run.learning.samples} of {config.schedule.total_samples} clips, "
        f"waited {run.feed.waited_s:.0f} s for data; {config.out}/latest.pt"
    )


if __name__ == "__main__":
    cli.run(main, PRESETS, __doc__, actions={"plot": lambda config: draw_curves(config.out)}, check=check)
