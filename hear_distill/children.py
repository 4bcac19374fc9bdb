"""The processes of a supervisor: started, watched and ended, their logs and crashes, and what a user runs on events.

in:   commands
out:  one log for each child, of bounded size

Every child inherits the read end of a pipe that the supervisor holds open, and watches it (hear_distill/runlog.py): so
it ends when the supervisor does, however that ends. Whoever a child started carries the same mark in its environment,
in whatever session it is: it is found, and ended, when the child has ended.
"""

import os
import shutil
import signal
import subprocess
import time
import uuid
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from hear_distill.files import MIB, DiskFull, UserError
from hear_distill.runlog import LAUNCHER_PID, LOST_A_RANK, SUPERVISOR_FD, read_heartbeat

FAMILY = "HEAR_FAMILY"  # in the environment of a child, and of all that it starts
LAST_WORDS_BYTES = 4_096
LOG_BYTES = 8 * MIB
LOGS_KEPT = 3  # besides the one that is written
HOOK_S = 60.0  # for a command of the user's
HOOKS_AT_ONCE = 4
TIMED_OUT = (124, 137)  # what timeout(1) ends with
LOOK_S = 0.5  # at a child that only answers
HOUR_S = 3600.0
CRASHES_PER_HOUR = 3
DECODER_CRASHES_PER_HOUR = 30  # of streamers while they decoded: three for each recording that kills its decoder
BACKOFF_S = 5.0  # after the first crash within an hour, doubled with each
TROUBLES = {os.EX_TEMPFAIL: ("outage", 300.0), DiskFull.exit_code: ("disk-full", 60.0)}
"""By exit code of a child: what is no crash but waited for, and seconds between attempts."""


@dataclass
class Child:
    """A process of ours."""

    name: str
    log: Path
    process: psutil.Popen
    heartbeat: Path
    family: str
    """the mark of this process and of all that it starts"""
    is_asked: bool = False
    """whether it was asked to leave"""
    last_progress: tuple[int, float] = (-1, 0.0)
    """the counter, and when it last changed on our own monotonic clock"""
    num_log_bytes: int = 0
    """of the log that `new_warnings` has seen"""

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs. What it left behind is killed."""
        code = self.process.poll()
        if code is not None:
            kill_family(self.family)
        return code

    def kind(self) -> str:
        """'stream' or 'train'."""
        return self.name.partition("-")[0]

    def ask(self) -> None:
        """Ask it, once, to finish what it has in hand and leave."""
        if not self.is_asked and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.is_asked = True

    def kill(self) -> None:
        """End it now, and all that it started."""
        if self.process.poll() is None:
            self.process.kill()
        kill_family(self.family)

    def is_hung(self, limit_s: float) -> bool:
        """Whether the progress counter has stood still for so long."""
        progress = read_heartbeat(self.heartbeat).get("progress", -1)
        if progress != self.last_progress[0] or not self.last_progress[1]:
            self.last_progress = (progress, time.monotonic())
        return time.monotonic() - self.last_progress[1] > limit_s

    def last_words(self, beginning: str = "") -> str:
        """The last line of its log, or the last that begins so: libraries may say more after what is wrong."""
        with self.log.open("rb") as f:
            f.seek(max(0, self.log.stat().st_size - LAST_WORDS_BYTES))
            lines = f.read().decode(errors="replace").strip().splitlines()
        lines = [line for line in lines if not line.startswith(LOST_A_RANK)]  # another rank says why
        lines = [line for line in lines if line.startswith(beginning)] or lines
        return lines[-1] if lines else "it said nothing"

    def new_warnings(self) -> list[str]:
        """Lines of its log that begin with WARNING, since the last look."""
        if self.log.stat().st_size < self.num_log_bytes:
            self.num_log_bytes = 0  # it was rotated
        with self.log.open("rb") as f:
            f.seek(self.num_log_bytes)
            whole, newline, _ = f.read().rpartition(b"\n")
        self.num_log_bytes += len(whole + newline)
        return [line for line in whole.decode(errors="replace").splitlines() if line.startswith("WARNING")]


def start_child(
    name: str, command: Sequence[str], log: Path, pipe: int, heartbeat: Callable[[int], Path], num_threads: int
) -> Child:
    """Start a child in a session of its own: Ctrl-C reaches us alone, and we end the children in good order.

    `pipe` is the read end that it watches; `heartbeat` gives the file that it will write, from its process id.
    """
    log.parent.mkdir(exist_ok=True)
    family = uuid.uuid4().hex
    with log.open("ab") as f:
        begin = f.tell()
        process = psutil.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=f,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(pipe,),
            env={**os.environ, SUPERVISOR_FD: str(pipe), FAMILY: family, "OMP_NUM_THREADS": str(num_threads)},
        )
    return Child(name, log, process, heartbeat(process.pid), family, num_log_bytes=begin)


def answer_of(command: Sequence[str], environment: Mapping[str, str], look: Callable[[], None]) -> tuple[int, str]:
    """Exit code and stderr of a child that only answers; `environment` adds to ours.

    It may ask a hub that is down for minutes; `look` is called meanwhile. What that raises ends it, and our end does.
    """
    said = None
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    env = {**os.environ, **environment, LAUNCHER_PID: str(os.getpid())}
    with subprocess.Popen(list(command), **pipes, text=True, start_new_session=True, env=env) as child:
        try:
            while said is None:
                look()
                with suppress(subprocess.TimeoutExpired):
                    _, said = child.communicate(timeout=LOOK_S)
        except BaseException:
            child.kill()
            raise
    return child.returncode, said


def kill_family(family: str) -> None:
    """Kill every process that carries this mark. Looks at all processes, some milliseconds; not for every turn."""
    for process in psutil.process_iter():
        try:
            if process.environ().get(FAMILY) == family:
                process.kill()
        except (psutil.NoSuchProcess, psutil.AccessDenied):  # it has just ended, or is somebody else's
            continue


def end_children(children: Iterable[Child], seconds: float) -> None:
    """Ask every child to leave, wait so long, then end what is left. Interrupted, it ends them at once."""
    children = list(children)
    try:
        for child in children:
            child.ask()
        psutil.wait_procs([child.process for child in children], timeout=seconds)
    finally:
        for child in children:
            child.kill()
        psutil.wait_procs([child.process for child in children], timeout=seconds)


def rotate(log: Path, limit_bytes: int = LOG_BYTES, num_kept: int = LOGS_KEPT) -> None:
    """Move what is in a log that has become large to <log>.1, the one before to <log>.2, and so on.

    Its writer appends and keeps its file, so the content is copied and cut off; what comes between the two is lost.
    """
    if not log.exists() or log.stat().st_size <= limit_bytes:
        return
    names = [log, *(log.with_name(f"{log.name}.{i}") for i in range(1, num_kept + 1))]
    for older, newer in zip(names[:1:-1], names[-2:0:-1], strict=True):
        if newer.exists():
            newer.replace(older)
    shutil.copyfile(log, names[1])
    os.truncate(log, 0)


class Hook:
    """The user's shell command for events, told by HEAR_EVENT, HEAR_MESSAGE and HEAR_LAKE. Nobody waits for it."""

    def __init__(self, command: str, lake: Path, say: Callable[[str], None]) -> None:
        self.command, self.lake, self.say = command, lake, say
        self.running: list[tuple[str, psutil.Popen]] = []

    def send(self, event: str, message: str) -> None:
        """Start the command, if there is one. While several still run, it is not started, and that is said."""
        if not self.command:
            return
        self.look()
        if len(self.running) >= HOOKS_AT_ONCE:
            self.say(f"--on-event: {HOOKS_AT_ONCE} commands still run, none was started for {event}: {message}")
            return
        told = {"HEAR_EVENT": event, "HEAR_MESSAGE": message, "HEAR_LAKE": str(self.lake)}
        process = psutil.Popen(  # timeout ends it, and what it started, even if we are no more
            ["timeout", "--kill-after=5", f"{HOOK_S}", "sh", "-c", self.command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, **told},
        )
        self.running.append((event, process))

    def look(self) -> None:
        """Forget commands that have ended, and tell of those that failed or took too long."""
        for event, process in self.running:
            if code := process.poll():
                why = f"took more than {HOOK_S:.0f} s" if code in TIMED_OUT else f"ended with code {code}"
                self.say(f"--on-event: the command for {event} {why}")
        self.running = [(event, process) for event, process in self.running if process.poll() is None]

    def close(self, seconds: float) -> None:
        """Give the commands so long, then end them."""
        try:
            psutil.wait_procs([process for _, process in self.running], timeout=seconds)
        finally:
            self.look()
            for event, process in self.running:
                self.say(f"--on-event: the command for {event} is ended with us")
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


class Restarts:
    """When the children of each kind may be started again, and when they have crashed too often."""

    def __init__(self, hook: Hook, say: Callable[[str], None]) -> None:
        self.hook, self.say = hook, say
        self.start_after: defaultdict[str, float] = defaultdict(float)
        """by kind: monotonic time before which none is started"""
        self.troubles: dict[str, int] = {}
        """what is waited for, with the clips that were cut when it was last seen"""
        self.crashes: defaultdict[bool, deque[float]] = defaultdict(deque)
        """monotonic times within the last hour, by whether a recording may be to blame"""

    def may_start(self, kind: str) -> bool:
        """Whether nothing speaks against a new child of this kind."""
        return time.monotonic() >= self.start_after[kind]

    def paused_s(self) -> float:
        """Seconds until children of every kind may be started; 0 if they may be now."""
        return max(0.0, *(after - time.monotonic() for after in self.start_after.values())) if self.start_after else 0.0

    def num_crashes(self) -> int:
        """Of all kinds, within the last hour."""
        return sum(time.monotonic() - crash < HOUR_S for crashes in self.crashes.values() for crash in crashes)

    def begin_trouble(self, trouble: str, message: str, num_cut: int) -> None:
        """Something that will pass: say it once, and run the user's command."""
        if trouble not in self.troubles:
            self.say(message)
            self.hook.send(trouble, message)
        self.troubles[trouble] = num_cut

    def end_troubles(self, num_cut: int) -> None:
        """What was waited for is over when clips are cut again."""
        for trouble in [trouble for trouble, num_then in self.troubles.items() if num_cut > num_then]:
            self.say(f"{trouble}: it is over, clips are cut again")
            del self.troubles[trouble]

    def wait_out(self, child: Child, code: int, num_cut: int) -> None:
        """A child left because of something that will pass."""
        trouble, seconds = TROUBLES[code]
        message = (
            f"{child.name}: {child.last_words('error: ').removeprefix('error: ')}; trying again every {seconds:.0f} s"
        )
        self.begin_trouble(trouble, message, num_cut)
        self.start_after[child.kind()] = time.monotonic() + seconds

    def book_crash(self, child: Child, code: int, is_decoder: bool) -> None:
        """Count a crash and choose when to start again. Raises UserError if there were too many in the last hour.

        Recordings that kill their decoder are passed over after three deaths each, so those are allowed more often.
        """
        now, crashes = time.monotonic(), self.crashes[is_decoder]
        limit, doing = (DECODER_CRASHES_PER_HOUR, " while it decoded") if is_decoder else (CRASHES_PER_HOUR, "")
        crashes.append(now)
        while now - crashes[0] > HOUR_S:
            crashes.popleft()
        words = child.last_words()
        self.say(f"{child.name} ended with code {code}{doing} ({words}); crash {len(crashes)} within an hour")
        if len(crashes) > limit:
            problem = (
                f"{len(crashes)} crashes{doing} within an hour, {limit} are allowed; the last was {child.name}: "
                f"{words}; look at {child.log}, then run the same command again"
            )
            self.hook.send("crash-loop", problem)
            raise UserError(problem)
        pause_s = BACKOFF_S if is_decoder else BACKOFF_S * 2 ** (len(crashes) - 1)
        self.start_after[child.kind()] = now + pause_s
