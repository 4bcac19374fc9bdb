"""Keep a lake filled and a student learning from it: start, watch and end the streamers and the trainer.

in:   a source of tars, a disk budget
out:  <lake>/{status.json, history.jsonl, ledger.backup.sqlite}, <lake>/logs/, and what the children write
cost: one connection to the ledger and two looks a second; not measured

    python datalake/run_lake.py --source DIR --lake lake    # Ctrl-C ends it in good order; run it again to go on
    python datalake/run_lake.py demo                        # two cores, minutes, no network
    python datalake/run_lake.py doctor --lake lake          # is this machine fit for it? Also: --dry-run, the plan
    python datalake/run_lake.py status --lake lake          # from another terminal
    python datalake/run_lake.py stop --lake lake            # in good order, from there; run it again to go on
    python datalake/run_lake.py plot --lake lake            # the last hours or days, in lake/history.png
    python datalake/run_lake.py fsck --lake lake            # do ledger and folders agree? --deep, --repair

Streamers run until the lake is full and then leave; they are started again when half of it is read. A child that
crashes is started again, a few times an hour. The children end when this process does, however it ends.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import psutil

from hear_distill import backup, cli, demo, doctor, history, plan, repair, status, stop
from hear_distill.files import GIB, UserError, gib
from hear_distill.lake import Lake
from hear_distill.locks import alone
from hear_distill.runlog import SUPERVISOR_FD, StopRequest, read_heartbeat


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
    """GiB that must stay free on the lake's disk; below it no streamer runs"""
    max_workers: int = 4
    """streamers at the same time, one core each"""
    recipe: Literal["best", "paper", "demo"] = "best"
    """preset of the trainer; demo is also the streamers'"""
    stream_args: str = ""
    """more for each streamer, in quotes: --stream-args "--shard-clips 2000" """
    train_args: str = ""
    """more for the trainer, in quotes: --train-args "--steps 1000 --seed 1" """
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
        if self.cap_gb <= 0:
            raise ValueError(f"--cap-gb must be positive, got {self.cap_gb}")
        for name in ("stream_args", "train_args"):
            try:
                shlex.split(getattr(self, name))
            except ValueError as e:
                raise ValueError(f"--{name.replace('_', '-')} is not a command line: {e}") from e


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
RESTART_AT_UNREAD = 0.5  # of the clips that were unread when the lake was last full, as published
POLL_S = 0.5
END_S = 60.0  # for a child to leave in good order; a checkpoint on a slow disk fits
HANG_S = 600.0  # without progress; loading the teacher and compiling take minutes
CRASHES_PER_HOUR = 3
OUTAGE_S = 300.0  # between attempts on a source that cannot be reached
BACKOFF_S = 5.0  # after the first crash, doubled with each


@dataclass
class Child:
    """A process of ours, started again when it crashes."""

    name: str
    command: list[str]
    log: Path
    process: psutil.Popen
    heartbeat: Path
    last_progress: tuple[int, float] = (-1, 0.0)
    """the counter, and when it last changed on our own monotonic clock"""

    def is_hung(self) -> bool:
        """Whether the progress counter has stood still for HANG_S."""
        progress = read_heartbeat(self.heartbeat).get("progress", -1)
        if progress != self.last_progress[0] or not self.last_progress[1]:
            self.last_progress = (progress, time.monotonic())
        return time.monotonic() - self.last_progress[1] > HANG_S

    def last_words(self) -> str:
        """The last line of its log, for people."""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"


@dataclass
class Supervisor:
    """The state of the control loop. Everything else is in the ledger, so a restarted supervisor knows as much."""

    config: Config
    lake: Lake
    pipe: int
    """read end that every child inherits; we hold the other, which closes when we die"""
    workers: list[Child] = field(default_factory=list)
    trainer: Child | None = None
    is_filling: bool = True
    unread_when_full: int = 0
    times_full: int = 0
    times_restarted: int = 0
    crashes: deque[float] = field(default_factory=deque)
    start_after: float = 0.0
    """monotonic time before which nothing is started again"""


def say(message: str) -> None:
    """A line for people, on a fresh line where the status line stays in place."""
    print(f"\r\x1b[K{message}" if sys.stdout.isatty() else message)


def command_of(script: Path, config: Config) -> list[str]:
    """The command line of a child; ours come last, so they win over the handed-on arguments."""
    if script == STREAMER:
        word = "demo" if config.recipe == "demo" else "laion"
        more = config.stream_args
        ours = ["--source", config.source, "--cap-gb", config.cap_gb, "--max-workers", config.max_workers]
    else:
        word, more, ours = config.recipe, config.train_args, ["--out", config.out]
    return [sys.executable, str(script), word, *shlex.split(more), "--lake", str(config.lake), *map(str, ours)]


def check_children(config: Config) -> None:
    """Let each child check its arguments, the source, the lake and the cap before anything starts. Raises UserError."""
    demo.prepare(config.source)
    for script in (STREAMER, TRAINER):
        ask(script, config, "--check")


def ask(script: Path, config: Config, *more: str) -> None:
    """Run a child that only answers. Raises UserError with what it says if it refuses."""
    command = [*command_of(script, config), *more]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, start_new_session=True)
    if answer.returncode:
        message = answer.stderr.strip().removeprefix("error: ") or f"exit code {answer.returncode}"
        raise UserError(f"{script.name}: {message}")


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
        **{"streamer": streamer, "trainer": trainer},
    )


def show_plan(config: Config) -> None:
    """`--dry-run`."""
    run = run_of(config)
    gpu_name, _ = doctor.gpu(run.trainer["device"])
    print("\n".join(plan.lines_of(run, doctor.needed_rate(run.out, gpu_name), doctor.decode_rate())))
    print_commands(config)


def print_commands(config: Config) -> None:
    """What is started, for people to repeat."""
    for script in (STREAMER, TRAINER):
        print("$ " + shlex.join(["python", *command_of(script, config)[1:]]))


def start(supervisor: Supervisor, script: Path, name: str) -> Child:
    """Start a child in a session of its own: Ctrl-C reaches us alone, and we end the children in good order."""
    config = supervisor.config
    command, log = command_of(script, config), config.lake / "logs" / f"{name}.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("a") as f:
        process = psutil.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=f,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(supervisor.pipe,),
            env={
                **os.environ,
                SUPERVISOR_FD: str(supervisor.pipe),
                "OMP_NUM_THREADS": str(num_threads(script, config)),
            },
        )
    is_trainer = script == TRAINER
    heartbeat = (
        config.out / "progress.json" if is_trainer else config.lake / "heartbeats" / f"stream-{process.pid}.json"
    )
    return Child(name, command, log, process, heartbeat)


def num_threads(script: Path, config: Config) -> int:
    """One for a streamer, the cores that are left for the trainer: threads that share a core wait for each other.

    With two threads on two busy cores, a step of the demo took six times as long as with one.
    """
    return 1 if script == STREAMER else max(1, len(os.sched_getaffinity(0)) - config.max_workers)


def reap(supervisor: Supervisor, child: Child) -> int | None:
    """The exit code of a child that has ended, booked if it was a crash; None while it runs. Kills one that hangs.

    Raises UserError if the child said that the user must act, or if children crash too often.
    """
    if child.is_hung():
        say(f"{child.name} made no progress for {HANG_S:.0f} s: killed")
        child.process.kill()
    code = child.process.poll()
    if code is None:
        return None
    if child is not supervisor.trainer:
        child.heartbeat.unlink(missing_ok=True)
    supervisor.lake.sweep()
    if code == 2:
        raise UserError(f"{child.name}: {child.last_words().removeprefix('error: ')}")
    if code == os.EX_TEMPFAIL:  # a network that is down for a night must not end a run of a week
        say(f"{child.name}: {child.last_words().removeprefix('error: ')}; trying again in {OUTAGE_S:.0f} s")
        supervisor.start_after = time.monotonic() + OUTAGE_S
    elif code not in (0, -signal.SIGTERM):  # asked to leave before it could listen, a child ends by the signal itself
        book_crash(supervisor, child, code)
    return code


def book_crash(supervisor: Supervisor, child: Child, code: int) -> None:
    """Count a crash and choose when to start again. Raises UserError if there were too many in the last hour."""
    now = time.monotonic()
    supervisor.crashes.append(now)
    while now - supervisor.crashes[0] > 3600:
        supervisor.crashes.popleft()
    num_crashes = len(supervisor.crashes)
    say(f"{child.name} ended with code {code} ({child.last_words()}); crash {num_crashes} within an hour")
    if num_crashes > CRASHES_PER_HOUR:
        raise UserError(
            f"{num_crashes} crashes within an hour, {CRASHES_PER_HOUR} are allowed; the last was {child.name}: "
            f"{child.last_words()}; look at {child.log}, then run the same command again"
        )
    supervisor.start_after = now + BACKOFF_S * 2 ** (num_crashes - 1)


def update_filling(supervisor: Supervisor) -> None:
    """Fill until the cap leaves no room for a shard, then not again before half of the clips are read."""
    lake = supervisor.lake
    has_room, unread = lake.has_room(), lake.unread_clips()
    if supervisor.is_filling and not has_room and not supervisor.workers:
        supervisor.is_filling = False
        supervisor.unread_when_full = unread
        supervisor.times_full += 1
        say(f"the lake is full: {unread} unread clips, {gib(lake.used_bytes())} of {gib(lake.cap_bytes())}")
        return
    is_half_read = unread <= RESTART_AT_UNREAD * supervisor.unread_when_full
    is_starved = read_heartbeat(supervisor.config.out / "progress.json").get("is_waiting", False)
    if not supervisor.is_filling and has_room and (is_half_read or is_starved):
        supervisor.is_filling = True
        supervisor.times_restarted += 1
        reason = "half of the lake is read" if is_half_read else "the trainer waits"
        say(f"{reason}: {unread} unread clips are left; the streamers start again")


def has_disk(config: Config) -> bool:
    """Whether the lake's disk has more free room than the floor."""
    return shutil.disk_usage(config.lake).free >= config.disk_floor_gb * GIB


def num_workers_wanted(supervisor: Supervisor) -> int:
    """How many streamers should run now. One alone cuts the anchor validation, which takes the heads of many tars."""
    config, lake = supervisor.config, supervisor.lake
    if not supervisor.is_filling or not has_disk(config) or not lake.has_room():
        return 0
    if not lake.has_anchor():
        return 1
    return min(config.max_workers, len(supervisor.workers) + lake.tar_states()["free"])


def control(supervisor: Supervisor) -> bool:
    """One turn of the loop. False when the trainer is done."""
    supervisor.workers = [child for child in supervisor.workers if reap(supervisor, child) is None]
    code = reap(supervisor, supervisor.trainer) if supervisor.trainer else None
    if code is not None:
        words, supervisor.trainer = supervisor.trainer.last_words(), None
        if code == 0:
            say(f"train: {words}")
            return False
    update_filling(supervisor)
    if not has_disk(supervisor.config):
        for child in supervisor.workers:
            child.process.send_signal(signal.SIGTERM)  # it publishes what it has cut, and leaves
    if time.monotonic() >= supervisor.start_after:
        if supervisor.trainer is None:
            supervisor.trainer = start(supervisor, TRAINER, "train")
        taken = {child.name for child in supervisor.workers}
        free_names = [n for n in (f"stream-{i}" for i in range(supervisor.config.max_workers)) if n not in taken]
        for name in free_names[: max(0, num_workers_wanted(supervisor) - len(taken))]:
            supervisor.workers.append(start(supervisor, STREAMER, name))
    return True


def end(supervisor: Supervisor) -> None:
    """Ask every child to leave, wait, then make it leave."""
    children = [*supervisor.workers, *([supervisor.trainer] if supervisor.trainer else [])]
    for child in children:
        if child.process.is_running():
            child.process.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs([child.process for child in children], timeout=END_S)
    for process in alive:
        process.kill()
    psutil.wait_procs(alive, timeout=END_S)
    supervisor.lake.sweep()


def control_of(supervisor: Supervisor) -> status.Control:
    """What only this process knows, for those who look."""
    return status.Control(
        is_filling=supervisor.is_filling,
        has_disk=has_disk(supervisor.config),
        times_full=supervisor.times_full,
        times_restarted=supervisor.times_restarted,
        workers=len(supervisor.workers),
        crashes=sum(time.monotonic() - crash < 3600 for crash in supervisor.crashes),
        paused_s=max(0.0, supervisor.start_after - time.monotonic()),
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
    with alone_on(config.lake):
        check_children(config)
        reader, writer = os.pipe()  # `writer` closes with this process, however it ends
        supervisor = Supervisor(config, Lake.open(config.lake), reader)
        supervisor.lake.sweep()
        print_commands(config)
        display, backups = status.Display(supervisor.lake, config.out), backup.Backups(config.lake)
        try:
            while not stop_request and control(supervisor):
                display.show(control_of(supervisor))
                backups.look()
                stop_request.wait(POLL_S)
        finally:
            end(supervisor)
            os.close(writer)
    books = supervisor.lake.books()
    say(f"{'stopped' if stop_request else 'finished'}: the lake was full {supervisor.times_full} times; {books}")


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
