"""Keep a lake filled and a student learning from it: start, watch and end the streamers and the trainer.

in:   a source of tars, a disk budget
out:  <lake>/{status.json, history.jsonl, ledger.backup.sqlite}, <lake>/logs/, and what the children write
cost: one connection to the ledger and two looks a second; not measured

    python datalake/run_lake.py --source DIR --lake lake    # Ctrl-C ends it in good order; run it again to go on
    python datalake/run_lake.py --gpus 4 --lake lake        # by torchrun; several machines: datalake/README.md
    python datalake/run_lake.py demo                        # two cores, minutes, no network
    python datalake/run_lake.py doctor --lake lake          # is this machine fit for it? Also: --dry-run, the plan
    python datalake/run_lake.py status --lake lake          # from another terminal
    python datalake/run_lake.py stop --lake lake            # in good order, from there; run it again to go on
    python datalake/run_lake.py plot --lake lake            # the last hours or days, in lake/history.png
    python datalake/run_lake.py fsck --lake lake            # do ledger and folders agree? --deep, --repair

As many streamers run as the trainer needs, none while the lake is full (hear_distill/control.py). A child that crashes
or hangs is started again, a few times an hour; a full disk and a network that is down are waited for. The children end
when this process does, however it ends. --on-event runs a command of yours when something happens.
"""

import json
import os
import shlex
import signal
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hear_distill import backup, cli, demo, doctor, history, plan, repair, status, stop
from hear_distill.children import TROUBLES, Child, Hook, Restarts, answer_of, end_children, rotate, start_child
from hear_distill.control import Law, Look, rate_of_worker
from hear_distill.drift import warnings_of
from hear_distill.files import GIB, UserError, free_bytes, gib, is_disk_full
from hear_distill.lake import Lake
from hear_distill.locks import alone
from hear_distill.nodes import Nodes
from hear_distill.runlog import Stopped, StopRequest, progress_file, read_heartbeat


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of the supervisor."""

    lake: Path = Path("lake")
    """folder of the lake, on a local disk"""
    source: str = "laion/LAION-Audio-300M"
    """dataset org/name[@revision] on the Hugging Face hub, fsspec URL, or folder of WebDataset tars"""
    out: Path = Path("runs/hear-vit-s")
    """run folder of the trainer"""
    cap_gb: float = 60.0
    """hard limit, in GiB, on all shards of the lake together"""
    disk_floor_gb: float = 20.0
    """GiB that must stay free on the disks of --lake, --out and HF_HOME; below it no streamer runs"""
    min_workers: int = 1
    """streamers that run at least, while the lake is not full"""
    max_workers: int = 4
    """streamers at the same time, one core each"""
    gpus: int = 1
    """GPUs of this machine that train together"""
    num_nodes: int = 1
    """machines that train together, each with a lake of its own, a disjoint part of the source"""
    node_rank: int = 0
    """which of these machines this one is, from 0; machine 0 writes the checkpoints"""
    rendezvous: str = ""
    """HOST:PORT at which machine 0 can be reached by all; the same on all machines"""
    recipe: Literal["best", "paper", "demo"] = "best"
    """preset of the trainer; demo is also the streamers'"""
    stream_args: str = ""
    """more for each streamer, in quotes: --stream-args "--shard-clips 2000" """
    train_args: str = ""
    """more for the trainer, in quotes: --train-args "--schedule.peak 3e-4 --seed 1" """
    on_event: str = ""
    """shell command for events; HEAR_EVENT, HEAR_MESSAGE and HEAR_LAKE tell it what happened"""
    dry_run: bool = False
    """print the plan with its arithmetic and start nothing"""
    json: bool = False
    """of `status`: one JSON object on one line instead of the table"""
    deep: bool = False
    """of `fsck`: compute the hash of every shard as well"""
    repair: bool = False
    """of `fsck`: put right what disagrees, and make a ledger that is lost or damaged again"""

    def __post_init__(self) -> None:
        if self.max_workers < 1:
            raise ValueError(f"--max-workers must be at least 1, got {self.max_workers}")
        if not 1 <= self.min_workers <= self.max_workers:
            raise ValueError(f"--min-workers must be 1 to --max-workers {self.max_workers}, got {self.min_workers}")
        if self.cap_gb <= 0:
            raise ValueError(f"--cap-gb must be positive, got {self.cap_gb}")
        self.nodes().refuse()
        for name in ("stream_args", "train_args"):
            try:
                shlex.split(getattr(self, name))
            except ValueError as e:
                raise ValueError(f"--{name.replace('_', '-')} is not a command line: {e}") from e

    def nodes(self) -> Nodes:
        """On what the trainer runs."""
        return Nodes(self.gpus, self.num_nodes, self.node_rank, self.rendezvous)


PRESETS = {
    "best": Config(),
    "paper": Config(recipe="paper", out=Path("runs/paper")),
    "demo": Config(
        lake=demo.DEMO / "lake",
        source=str(demo.SOURCE),
        out=demo.DEMO / "run",
        cap_gb=0.09,
        disk_floor_gb=1.0,
        max_workers=2,
        recipe="demo",
    ),
}
ROOT = Path(__file__).resolve().parents[1]
STREAMER = ROOT / "stream_laion_audio_clips.py"
TRAINER = ROOT / "distill_hear_vit_s_canon2d.py"
POLL_S = 0.5
END_S = 60.0  # for a child to leave in good order; a checkpoint on a slow disk fits
HANG_S = 600.0  # without progress; loading the teacher and compiling take minutes
HOOK_END_S = 5.0  # for the user's command, when we end
RATE_SHARDS = 64  # the newest, whose work tells what a streamer delivers


@dataclass
class Supervisor:
    """The state of the loop. Everything else is in the ledger, so a restarted supervisor knows as much."""

    config: Config
    lake: Lake
    pipe: int
    """read end that every child inherits; we hold the other, which closes when we die"""
    law: Law
    hook: Hook
    restarts: Restarts
    workers: list[Child] = field(default_factory=list)
    trainer: Child | None = None
    num_decoder_deaths: int = 0
    """of those in the ledger, how many belong to crashes that were booked"""
    drifting: set[str] = field(default_factory=set)
    """statistics that were beyond their threshold at the last look"""
    worker_rate: float | None = None
    """clips per second of one streamer, as of `rate_clips`"""
    rate_clips: int = -1
    """clips cut when `worker_rate` was computed"""


def supervisor_of(config: Config, pipe: int) -> Supervisor:
    """At the start of a run, on the lake that the streamer's check has made or joined."""
    lake = Lake.open(config.lake)
    clip_bytes = int(lake.setting("reservation_bytes")) / int(lake.setting("shard_clips"))
    law = Law(config.min_workers, config.max_workers, full=lake.cap_bytes() / clip_bytes)
    hook = Hook(config.on_event, config.lake, say)
    lake.sweep()
    restarts, num_deaths = Restarts(hook, say), lake.totals()["decoder deaths"]
    return Supervisor(config, lake, pipe, law, hook, restarts, num_decoder_deaths=num_deaths)


def say(message: str) -> None:
    """A line for people, on a fresh line where the status line stays in place."""
    print(f"\r\x1b[K{message}" if sys.stdout.isatty() else message)


def command_of(script: Path, config: Config) -> list[str]:
    """The command line of a child; ours come last, so they win over the handed-on arguments."""
    if script == STREAMER:
        word = "demo" if config.recipe == "demo" else "laion"
        more = config.stream_args
        ours = ["--source", config.source, "--cap-gb", config.cap_gb, "--max-workers", config.max_workers]
        ours += config.nodes().part_of_source()
    else:
        word, more, ours = config.recipe, config.train_args, ["--out", config.out]
    return [sys.executable, str(script), word, *shlex.split(more), "--lake", str(config.lake), *map(str, ours)]


def started(script: Path, config: Config) -> list[str]:
    """The command line with which a child is started; with several ranks, `command_of` alone can only answer."""
    command = command_of(script, config)
    return config.nodes().launched(command) if script == TRAINER else command


def check_children(config: Config, look: Callable[[], None] = lambda: None) -> None:
    """Let each child check its arguments, the source, the lake and the cap before anything starts. Raises UserError."""
    demo.prepare(config.source)
    for script in (STREAMER, TRAINER):
        ask(script, config, "--check", look=look)


def ask(script: Path, config: Config, *more: str, look: Callable[[], None] = lambda: None) -> None:
    """Run a child that only answers; `look` is called meanwhile. Raises UserError with what it says if it refuses."""
    code, said = answer_of([*command_of(script, config), *more], config.nodes().environment(), look)
    if code:
        raise UserError(f"{script.name}: {said.strip().removeprefix('error: ') or f'exit code {code}'}")


def run_of(config: Config) -> plan.Run:
    """What would be started. Raises UserError if a child refuses its arguments."""
    with tempfile.TemporaryDirectory() as folder:
        files = {script: Path(folder) / f"{script.stem}.json" for script in (STREAMER, TRAINER)}
        for script, file in files.items():
            ask(script, config, "--write-config", str(file))
        streamer, trainer = (json.loads(file.read_text()) for file in files.values())
    return plan.Run(
        **{"lake": config.lake, "out": config.out, "source": config.source, "max_workers": config.max_workers},
        **{"cap_bytes": round(config.cap_gb * GIB), "floor_bytes": round(config.disk_floor_gb * GIB)},
        **{"streamer": streamer, "trainer": trainer, "gpus": config.gpus, "num_nodes": config.num_nodes},
    )


def show_plan(config: Config) -> None:
    """`--dry-run`."""
    run = run_of(config)
    gpu_name, _ = doctor.gpu(run.trainer["device"], run.gpus)
    needed = doctor.needed_rate(run.out, gpu_name, run.gpus)
    print("\n".join(plan.lines_of(run, needed, doctor.decode_rate())))
    print_commands(config)


def print_commands(config: Config) -> None:
    """What is started, for people to repeat."""
    for script in (STREAMER, TRAINER):
        print("$ " + shlex.join(["python", *started(script, config)[1:]]))


def start(supervisor: Supervisor, script: Path, name: str) -> Child:
    """Start a streamer or the trainer."""
    config = supervisor.config
    return start_child(
        name,
        started(script, config),
        log=config.lake / "logs" / f"{name}.log",
        pipe=supervisor.pipe,
        heartbeat=lambda pid: heartbeat_of(script, config, pid),
        num_threads=num_threads(script, config),
    )


def heartbeat_of(script: Path, config: Config, pid: int) -> Path:
    """The file in which a child says how far it is."""
    return progress_of(config) if script == TRAINER else config.lake / "heartbeats" / f"stream-{pid}.json"


def progress_of(config: Config) -> Path:
    """The trainer's heartbeat."""
    return config.out / progress_file(config.node_rank)


def num_threads(script: Path, config: Config) -> int:
    """One for a streamer, for each rank of the trainer its share of the other cores: threads on one core wait.

    With two threads on two busy cores, a step of the demo took six times as long as with one.
    """
    return 1 if script == STREAMER else max(1, (len(os.sched_getaffinity(0)) - config.max_workers) // config.gpus)


def reap(supervisor: Supervisor, child: Child) -> int | None:
    """The exit code of a child that has ended, booked if it was a crash; None while it runs. Kills one that hangs.

    Raises UserError if the child said that the user must act, or if children crash too often.
    """
    if child.is_hung(HANG_S):
        say(f"{child.name} made no progress for {HANG_S:.0f} s: killed")
        child.kill()
    code = child.poll()
    if code is None:
        return None
    if child is not supervisor.trainer:
        child.heartbeat.unlink(missing_ok=True)
    supervisor.lake.sweep()
    if code == 2:
        raise UserError(f"{child.name}: {child.last_words('error: ').removeprefix('error: ')}")
    totals = supervisor.lake.totals()
    if code in TROUBLES:  # a network that is down for a night must not end a run of a week
        supervisor.restarts.wait_out(child, code, totals["cut"])
    elif code not in (0, -signal.SIGTERM):  # asked to leave before it could listen, a child ends by the signal itself
        is_decoder = child is not supervisor.trainer and totals["decoder deaths"] > supervisor.num_decoder_deaths
        supervisor.num_decoder_deaths += is_decoder  # one each: a sweep finds all that died since the last
        supervisor.restarts.book_crash(child, code, is_decoder)
    return code


def disks_below_floor(config: Config) -> list[Path]:
    """Folders of this run whose disks have less free room than the floor."""
    cache = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()  # of the teacher
    floor_bytes = config.disk_floor_gb * GIB
    return [folder for folder in (config.lake, config.out, cache) if free_bytes(folder) < floor_bytes]


def has_disk(config: Config) -> bool:
    """Whether all disks of this run are above the floor."""
    return not disks_below_floor(config)


def worker_rate(supervisor: Supervisor, num_cut: int) -> float | None:
    """Of the newest shards, read again only when others have come: their JSON costs more than all else in a turn."""
    if num_cut != supervisor.rate_clips:
        supervisor.worker_rate = rate_of_worker(supervisor.lake.statistics(RATE_SHARDS))
        supervisor.rate_clips = num_cut
    return supervisor.worker_rate


def look_at(supervisor: Supervisor) -> Look:
    """What the law needs to know."""
    lake, unread, books = supervisor.lake, supervisor.lake.unread_clips(), supervisor.lake.books()
    trainer = read_heartbeat(progress_of(supervisor.config)) if supervisor.trainer else {}
    num_useful = len(supervisor.workers) + lake.tar_states()["free"]
    return Look(
        time_s=time.monotonic(),
        unread=unread,
        handed_out=books.cut - books.validation - books.retired_validation - books.quarantined - unread,
        worker_rate=worker_rate(supervisor, books.cut),
        has_room=lake.has_room(),
        has_disk=has_disk(supervisor.config),
        is_waiting=bool(trainer.get("is_waiting")),
        # One alone cuts the anchor validation, which takes the heads of many tars.
        num_useful=num_useful if lake.has_anchor() else min(1, num_useful),
    )


def decide(supervisor: Supervisor) -> tuple[int, bool]:
    """How many streamers are wanted, and whether more than those may finish what they have reserved."""
    law, lake, look = supervisor.law, supervisor.lake, look_at(supervisor)
    before = law.mode
    wanted = law.workers_wanted(look)
    if law.mode != before:
        if law.mode == "full":
            say(f"the lake is full: {look.unread} unread clips, {gib(lake.used_bytes())} of {gib(lake.cap_bytes())}")
        elif law.mode == "no disk":
            folders = ", ".join(map(str, disks_below_floor(supervisor.config)))
            floor = f"--disk-floor-gb {supervisor.config.disk_floor_gb}"
            problem = f"no streamers: less than {floor} is free on the disk of {folders}"
            supervisor.restarts.begin_trouble("disk-full", problem, lake.totals()["cut"])
        elif before == "full":
            reason = "the trainer waits" if look.is_waiting else "half of the lake is read"
            say(f"{reason}: {look.unread} unread clips are left; the streamers start again")
    return wanted, law.mode == "full" and not look.has_room


def adjust(supervisor: Supervisor, num_wanted: int, may_finish: bool) -> None:
    """Ask surplus streamers to leave, the newest first, each with a short shard; or start what is missing."""
    staying = [child for child in supervisor.workers if not child.is_asked]
    for child in [] if may_finish else staying[num_wanted:]:
        child.ask()
    if not supervisor.restarts.may_start("stream"):
        return
    taken = {child.name for child in supervisor.workers}
    free_names = [n for n in (f"stream-{i}" for i in range(supervisor.config.max_workers)) if n not in taken]
    for name in free_names[: max(0, num_wanted - len(taken))]:
        supervisor.workers.append(start(supervisor, STREAMER, name))


def control(supervisor: Supervisor) -> bool:
    """One turn of the loop. False when the trainer is done."""
    for child in (*supervisor.workers, *([supervisor.trainer] if supervisor.trainer else [])):
        rotate(child.log)
    for line in supervisor.trainer.new_warnings() if supervisor.trainer else ():
        say(f"train: {line}")  # a checkpoint that lost its hash, a disk that is full
    supervisor.workers = [child for child in supervisor.workers if reap(supervisor, child) is None]
    code = reap(supervisor, supervisor.trainer) if supervisor.trainer else None
    if code is not None:
        words, supervisor.trainer = supervisor.trainer.last_words(), None
        if code == 0:
            say(f"train: {words}")
            return False
    supervisor.restarts.end_troubles(supervisor.lake.totals()["cut"])
    if supervisor.trainer is None and supervisor.restarts.may_start("train"):
        supervisor.trainer = start(supervisor, TRAINER, "train")
    adjust(supervisor, *decide(supervisor))
    supervisor.hook.look()
    return True


def tell_drift(supervisor: Supervisor, warnings: list[str]) -> None:
    """Say once what begins to drift, and run the user's command."""
    drifting = {warning.split()[0] for warning in warnings}
    for warning in warnings:
        if warning.split()[0] not in supervisor.drifting:
            say(f"WARNING: {warning}")
            supervisor.hook.send("drift", warning)
    supervisor.drifting = drifting


def turn(supervisor: Supervisor, display: status.Display) -> bool:
    """One turn, and a look. A full disk, on which not even the ledger can grow, is said and waited for."""
    try:
        if not control(supervisor):
            return False
        display.show(control_of(supervisor))
        tell_drift(supervisor, warnings_of(display.drift))
    except (OSError, sqlite3.Error) as e:
        if not is_disk_full(e):
            raise
        problem = f"the disk is full: {e}; trying again until there is room"
        supervisor.restarts.begin_trouble("disk-full", problem, supervisor.lake.totals()["cut"])
    return True


def end(supervisor: Supervisor, reason: str) -> None:
    """Ask every child to leave, wait, then make it leave; interrupted, at once. Then the user's command is told."""
    try:
        end_children([*supervisor.workers, *([supervisor.trainer] if supervisor.trainer else [])], END_S)
    finally:
        supervisor.hook.send("stop", reason)
        supervisor.hook.close(HOOK_END_S)
    try:
        supervisor.lake.sweep()
    except sqlite3.OperationalError as e:
        if not is_disk_full(e):
            raise
        say("the disk is full; what the streamers left is swept when the lake is run again")


def control_of(supervisor: Supervisor) -> status.Control:
    """What only this process knows, for those who look."""
    return status.Control(
        is_filling=supervisor.law.is_filling,
        has_disk=has_disk(supervisor.config),
        times_full=supervisor.law.times_full,
        times_restarted=supervisor.law.times_restarted,
        workers=len(supervisor.workers),
        crashes=supervisor.restarts.num_crashes(),
        paused_s=supervisor.restarts.paused_s(),
    )


def alone_on(lake: Path) -> AbstractContextManager[None]:
    """Hold the lake for this supervisor. Raises UserError if another has it."""
    refusal = f"another supervisor runs {lake}; look at it with: python datalake/run_lake.py status --lake {lake}"
    return alone(lake / status.LOCK, refusal)


def check(config: Config) -> None:
    """`--check`, which must not change the cap of a lake that is running."""
    with alone_on(config.lake):
        check_children(config)


def main(config: Config) -> None:
    if config.dry_run:
        return show_plan(config)
    stop_request = StopRequest()
    os.environ |= config.nodes().environment()  # some clusters set these, for launchers of their own
    with alone_on(config.lake):
        try:
            check_children(config, stop_request.look)
        except Stopped:
            return say("stopped before anything was started")
        reader, writer = os.pipe()  # `writer` closes with this process, however it ends
        supervisor, reason = supervisor_of(config, reader), "failed"
        print_commands(config)
        display = status.Display(supervisor.lake, config.out, config.node_rank)
        backups = backup.Backups(config.lake)
        try:
            while not stop_request and turn(supervisor, display):
                backups.look()
                stop_request.wait(POLL_S)
            reason = "stopped" if stop_request else "finished"
        except UserError as e:
            reason = str(e)
            raise
        finally:
            end(supervisor, reason)
            os.close(writer)
        backups.close()
    say(f"{reason}: the lake was full {supervisor.law.times_full} times; {supervisor.lake.books()}")


def fsck(config: Config) -> int:
    """`fsck`; a repair needs the lake for itself."""
    if not config.repair:
        return repair.check(config.lake, config.deep)
    repair.require(config.lake)
    with alone_on(config.lake):
        return repair.repair(config.lake, config.deep)


ACTIONS = {
    "doctor": lambda config: doctor.examine(run_of(config)),
    "status": lambda config: status.show(config.lake, config.json),
    "stop": lambda config: stop.stop(config.lake),
    "plot": lambda config: print(history.draw(config.lake)),
    "fsck": fsck,
}
FLAGS_OF = {"dry_run": tuple(PRESETS), "json": ("status",), "deep": ("fsck",), "repair": ("fsck",)}

if __name__ == "__main__":
    cli.run(main, PRESETS, __doc__, ACTIONS, check, FLAGS_OF)
