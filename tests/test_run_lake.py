"""The supervisor: it keeps a lake filled within its cap, and whatever ends it, nothing of it is left running.

Most tests give it a stand-in for the trainer (dry_trainer.py) that needs no torch; the first one runs the real stages.
"""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from lake_tools import (
    ROOT,
    STREAMER,
    DiskWatch,
    add_shard,
    environment,
    make_lake,
    totals_in,
    write_source,
)
from poisoned_streamer import POISONED_STREAMER, write_poisoned_source

from hear_distill.files import GIB, MIB, UserError
from hear_distill.lake import Lake
from hear_distill.teacher import save_stand_in

SUPERVISOR = ROOT / "datalake" / "run_lake.py"
DRY_TRAINER = Path(__file__).parent / "dry_trainer.py"
RECORD_BYTES, END_BYTES = 66_560, 1_024  # of a shard, from datalake/README.md
SHARD_CLIPS, VAL_CLIPS = 10, 8
SECONDS_TO_LEAVE = 30.0  # for all children, however the supervisor ended; half of END_S
DRY = """
import sys
from pathlib import Path
from train_tools import load_stage
from hear_distill import children, cli

stage = load_stage(Path(sys.argv.pop(1)))
stage.TRAINER, stage.STREAMER = Path(sys.argv.pop(1)), Path(sys.argv.pop(1))
children.BACKOFF_S = 0.1
children.TROUBLES = {code: (trouble, 0.5) for code, (trouble, _) in children.TROUBLES.items()}
cli.run(stage.main, stage.PRESETS, stage.__doc__, check=stage.check)
"""


def cap_for(num_clips: int) -> int:
    """Bytes of this many clips in files of ten."""
    return num_clips * RECORD_BYTES + (num_clips // SHARD_CLIPS + 1) * END_BYTES


@dataclass
class House:
    """A source, a lake and a run folder, and the supervisors that were started on them."""

    source: Path
    root: Path
    cap_bytes: int = cap_for(80)
    stream_args: str = f"--shard-clips {SHARD_CLIPS} --open-tars 2 --val-clips {VAL_CLIPS} --val-fraction 0.05"
    train_args: str = "--pause-s 0.05"
    streamer: Path = STREAMER
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def lake(self) -> Path:
        return self.root / "lake"

    def start(self, *more: str, dry: bool = True, crash_at: str | None = None) -> "subprocess.Popen[str]":
        """Start a supervisor, in a session of its own as a terminal would."""
        script = ["-c", DRY, str(SUPERVISOR), str(DRY_TRAINER), str(self.streamer)] if dry else [str(SUPERVISOR)]
        flags = {"--lake": self.lake, "--source": self.source, "--out": self.root / "run", "--disk-floor-gb": 0}
        flags |= {"--cap-gb": self.cap_bytes / GIB, "--max-workers": 2}
        flags |= {"--stream-args": self.stream_args, "--train-args": self.train_args}
        process = subprocess.Popen(
            [sys.executable, *script, *(str(word) for flag in flags.items() for word in flag), *more],
            cwd=Path(__file__).parent,
            env=environment(crash_at),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.processes.append(process)
        return process

    def status(self, word: str = "status") -> "subprocess.CompletedProcess[str]":
        """Look at the lake as a user would."""
        command = [sys.executable, str(SUPERVISOR), word, "--lake", str(self.lake)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    def ledger(self, look: Callable[[Lake], object]) -> object:
        """Look at the ledger."""
        ledger = Lake.open(self.lake)
        try:
            return look(ledger)
        finally:
            ledger.close()

    def num_clips_trained(self) -> int:
        """So far, from the books; 0 before there is a lake."""
        try:
            return self.ledger(lambda ledger: ledger.books().trained)
        except UserError:
            return 0


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    return write_source(tmp_path_factory.mktemp("source"), num_tars=4, recordings_per_tar=28)


@pytest.fixture
def house(source, tmp_path):
    """A house whose processes all end with the test, also those that a bug left behind."""
    house = House(source, tmp_path)
    yield house
    for process in house.processes:
        process.kill()
        process.communicate()
    for process in psutil.process_iter(["cmdline"]):
        if str(tmp_path) in " ".join(process.info["cmdline"] or []):
            process.kill()


def children_of(process: "subprocess.Popen[str]", script: str) -> list[psutil.Process]:
    """The running children of a supervisor that run this script, --check excepted."""
    found, own_command = [], psutil.Process(process.pid).cmdline()  # which a child shows until it has become another
    for child in psutil.Process(process.pid).children():
        try:
            command = child.cmdline()
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
        is_script = any(word.endswith(script) for word in command) and command != own_command
        if is_script and "--check" not in command:
            found.append(child)
    return found


def wait_for(is_so: Callable[[], object], seconds: float = 60.0) -> None:
    """Until the condition holds; a hang is a failure."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def end_of(process: "subprocess.Popen[str]", seconds: float = 90.0) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def assert_finished(house: House) -> None:
    """Everything is cut and trained but for less than a batch, and ledger and folders agree."""
    books, unread, free = house.ledger(lambda lake: (lake.books(), lake.unread_clips(), lake.tar_states()["free"]))
    assert books.balance() == 0
    assert books.trained > 200 and books.trained + unread == books.cut - books.validation - books.retired_validation
    assert free == books.quarantined == 0 and books.ready + books.leased == unread < 4
    fsck = house.status("fsck")
    assert fsck.returncode == 0 and "agree" in fsck.stdout


# ---- the whole ----


def use_the_real_trainer(house: House) -> None:
    """Flags for a student and a teacher that two busy cores can train."""
    teacher = save_stand_in(house.root / "teacher", seed=0)
    house.train_args = (
        f"--device cpu --teacher {teacher} --chunk-size 2 --target-clips 8 --open-shards 2 --save-every 8"
        " --log-every 4 --schedule.total-samples 4000 --schedule.warmup-samples 0 --schedule.decay-samples 0"
        " --model.width 24 --model.heads 2 --model.blocks 1 --model.mlp-width 24"
    )


def test_a_lake_fills_and_drains_and_fills_again_within_its_cap_until_the_source_ends(house):
    use_the_real_trainer(house)
    watch = DiskWatch(house.lake)
    watch.start()
    code, out, err = end_of(house.start(dry=False), seconds=180)
    watch.end()
    assert (code, err) == (0, ""), out
    # How often depends on who is faster, streamers or trainer; once is enough here, the next test has a slow trainer.
    assert "the lake is full" in out and "the streamers start again" in out
    assert 0.8 * house.cap_bytes < watch.highest <= house.cap_bytes and watch.looks > 100
    assert_finished(house)
    status = json.loads((house.lake / "status.json").read_text())
    assert status["cap_bytes"] == house.cap_bytes and status["times_full"] >= 1 and status["trainer"]["step"] > 20


def stops_of(looks: list[tuple[int, int, int]]) -> list[tuple[int, int]]:
    """(streamers, clips cut, clips unread), in turn -> (highest level before, clips cut meanwhile) of each time without
    a streamer that ended with no more than half unread of that level.
    """
    stops, highest, cuts = [], 0, []
    for num_streamers, cut, unread in looks:
        highest = max(highest, unread)
        if num_streamers == 0 and highest:
            cuts.append(cut)
        elif cuts:
            if unread <= highest / 2:
                stops.append((highest, cuts[-1] - cuts[0]))
                highest = 0
            cuts = []
    return stops


def test_a_full_lake_has_no_streamer_until_half_of_it_is_read_and_is_filled_again_and_so_again(house):
    house.source, house.cap_bytes = write_source(house.root / "source", 10, 28), cap_for(200)
    house.train_args = "--pause-s 0.25 --save-every 6"  # a hundredth of the streamers' speed
    process, looks = house.start(), []

    def look() -> bool:
        assert process.poll() is None, "the source has ended"
        num_streamers = len(children_of(process, "stream_laion_audio_clips.py"))
        try:
            looks.append((num_streamers, *house.ledger(lambda lake: (lake.books().cut, lake.unread_clips()))))
        except UserError:  # there is no lake yet
            return False
        return len(stops_of(looks)) == 2

    wait_for(look, seconds=180.0)
    process.terminate()
    code, out, err = end_of(process)
    assert (code, err) == (0, ""), out
    assert all(highest > 80 and num_cut == 0 for highest, num_cut in stops_of(looks))
    said = re.findall("the lake is full|the streamers start again", out)
    assert said[:4] == ["the lake is full", "the streamers start again"] * 2, out


def test_the_cap_holds_at_every_moment_under_load(house):
    house.train_args = "--pause-s 0 --batch-size 8 --save-every 2"
    watch = DiskWatch(house.lake)
    watch.start()
    code, out, err = end_of(house.start("--max-workers", "3", "--min-workers", "3"))
    watch.end()
    assert (code, err) == (0, ""), out
    assert 0.5 * house.cap_bytes < watch.highest <= house.cap_bytes and watch.looks > 100


# ---- ends ----


def running(house: House, dry: bool = True) -> "subprocess.Popen[str]":
    """A supervisor in full swing: a trainer that has trained, and at least one streamer at work."""
    process = house.start(dry=dry)
    wait_for(lambda: house.num_clips_trained() > 20 and children_of(process, "stream_laion_audio_clips.py"))
    assert len(children_of(process, "dry_trainer.py" if dry else "distill_hear_vit_s_canon2d.py")) == 1
    return process


def family(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    """All living descendants."""
    return psutil.Process(process.pid).children(recursive=True)


@pytest.mark.parametrize("way", ["Ctrl-C", "SIGTERM"])
def test_a_supervisor_that_is_asked_to_stop_leaves_nobody_behind_and_goes_on_when_run_again(house, way):
    process = running(house)
    children, begin = family(process), time.monotonic()
    if way == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the whole group
    else:
        process.terminate()
    code, out, _ = end_of(process)
    assert code == 0 and "stopped" in out
    assert time.monotonic() - begin < SECONDS_TO_LEAVE
    assert not any(child.is_running() for child in children)
    trained = house.num_clips_trained()
    assert trained > 20 and house.status("fsck").returncode == 0

    code, out, err = end_of(house.start())
    assert (code, err) == (0, "") and "finished" in out
    assert_finished(house)


@pytest.mark.parametrize("dry", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["dry", "real trainer"])
def test_the_children_of_a_killed_supervisor_end_by_themselves_and_it_goes_on_when_run_again(house, dry):
    if not dry:
        use_the_real_trainer(house)
    process = running(house, dry)
    children = family(process)
    process.kill()
    _, alive = psutil.wait_procs(children, timeout=SECONDS_TO_LEAVE)
    assert alive == []
    assert house.status("fsck").returncode == 0
    assert end_of(house.start(dry=dry), seconds=180)[0] == 0
    assert_finished(house)


@pytest.mark.parametrize("script", ["stream_laion_audio_clips.py", "dry_trainer.py"])
def test_a_killed_child_is_started_again_and_the_run_completes(house, script):
    house.train_args = "--pause-s 0.15"  # the second kill must not come when all is done
    process = running(house)

    def kill_one() -> bool:
        """A streamer may leave by itself between two looks, as the lake is full now and then."""
        with suppress(IndexError, psutil.NoSuchProcess):
            victim = children_of(process, script)[0]
            victim.kill()
            wait_for(lambda: not victim.is_running())
            return True
        return False

    for _ in range(2):
        wait_for(kill_one)
        time.sleep(0.5)
    code, out, err = end_of(process)
    assert (code, err) == (0, ""), out
    assert "ended with code -9" in out and "crash 2 within an hour" in out
    assert_finished(house)


def test_a_supervisor_that_is_interrupted_twice_leaves_at_once_and_leaves_nobody_behind(house):
    house.train_args = "--stubborn"
    process = running(house)
    children = family(process)
    os.killpg(process.pid, signal.SIGINT)
    wait_for(lambda: not children_of(process, "stream_laion_audio_clips.py"))
    time.sleep(0.5)
    assert process.poll() is None and len(children_of(process, "dry_trainer.py")) == 1
    os.killpg(process.pid, signal.SIGINT)
    code, _, err = end_of(process, SECONDS_TO_LEAVE)
    assert code == 1 and "interrupted twice" in err and "Traceback" not in err
    assert not any(child.is_running() for child in children)
    assert house.status("fsck").returncode == 0


@pytest.mark.slow  # ten seconds of waiting
def test_a_child_of_a_killed_supervisor_that_does_not_listen_ends_all_the_same(house):
    house.train_args = "--stubborn"
    process = running(house)
    children = family(process)
    process.kill()
    _, left = psutil.wait_procs(children, timeout=SECONDS_TO_LEAVE)
    assert [process for process in left if process.status() != psutil.STATUS_ZOMBIE] == []  # init may take its time


@pytest.mark.slow  # starts a streamer twelve times; tests/test_guard.py does without a supervisor
def test_a_recording_that_kills_its_decoder_is_passed_over_and_the_run_completes(tmp_path, house):
    house.source = write_poisoned_source(tmp_path / "source", {0: (2,), 1: (0, 5)})
    house.streamer = POISONED_STREAMER
    house.stream_args = "--shard-clips 6 --open-tars 2 --val-clips 0 --val-fraction 0"
    house.train_args = "--batch-size 1"
    code, out, err = end_of(house.start())
    assert (code, err) == (0, ""), out
    assert out.count("ended with code -11 while it decoded") == 9
    totals, books = house.ledger(lambda lake: (lake.totals(), lake.books()))
    assert totals["skipped: poison"] == 3 and books.trained == books.cut == (18 - 3) * 3
    assert "3 poison" in house.status().stdout


def test_on_a_full_disk_the_supervisor_says_so_once_and_goes_on_when_there_is_room(house, small_disk):
    disk, resize = small_disk
    house.root, events = disk, disk.parent / "events"
    house.train_args = "--pause-s 0.5"
    process = house.start("--on-event", f'echo "$HEAR_EVENT: $HEAR_MESSAGE" >> {events}')
    wait_for(lambda: events.exists() and "disk-full" in events.read_text())
    time.sleep(2.0)
    assert process.poll() is None
    resize(64 * MIB)
    process.terminate()
    code, out, err = end_of(process)
    assert (code, err) == (0, ""), out
    house.train_args = "--pause-s 0"
    assert end_of(house.start())[0] == 0
    assert_finished(house)
    told = events.read_text().splitlines()
    assert [line.split(":")[0] for line in told] == ["disk-full", "stop"]


def test_a_child_that_crashes_again_and_again_is_given_up_with_one_line(house):
    events = house.root / "events"
    process = house.start("--on-event", f'echo "$HEAR_EVENT: $HEAR_MESSAGE" >> {events}', crash_at="shard-reserved")
    code, _, err = end_of(process)
    assert code == 2
    told = sorted(events.read_text().splitlines())
    assert [line.split(":")[0] for line in told] == ["crash-loop", "stop"] and "4 crashes" in told[1]
    assert re.fullmatch(r"error: 4 crashes within an hour, 3 are allowed[^\n]*stream-\d\.log[^\n]*\n", err)
    assert psutil.pid_exists(process.pid) is False
    assert house.status("fsck").returncode == 0


@pytest.mark.slow  # loads torch three times
def test_a_trainer_whose_newest_checkpoint_is_damaged_goes_back_to_the_one_before_and_the_supervisor_says_so(house):
    use_the_real_trainer(house)
    process = running(house, dry=False)
    wait_for((house.root / "run" / "previous.pt").exists)
    process.terminate()
    assert end_of(process)[0] == 0
    latest = house.root / "run" / "latest.pt"
    damaged = bytearray(latest.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    latest.write_bytes(damaged)
    code, out, err = end_of(house.start(dry=False), seconds=180)
    assert (code, err) == (0, "")
    assert re.search(r"train: WARNING: [^\n]*latest\.pt", out) and "going back to the checkpoint before it" in out
    assert_finished(house)


# ---- refusals ----


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"stream_args": "--shard-clip 3"}, "stream_laion_audio_clips.py: Unrecognized options: --shard-clip"),
        ({"train_args": "--batch-size many"}, "dry_trainer.py: Error parsing --batch-size"),
        ({"train_args": "papre"}, "dry_trainer.py: Unrecognized options: papre"),
        ({"source": Path("nowhere")}, "no folder nowhere"),
    ],
    ids=["streamer flag", "trainer type", "trainer word", "source"],
)
def test_wrong_arguments_for_a_child_are_refused_before_anything_starts(house, arguments, expected):
    for name, value in arguments.items():
        setattr(house, name, value)
    code, out, err = end_of(house.start())
    assert (code, out) == (2, "")
    assert re.fullmatch(r"error: [^\n]+\n", err) and expected in err
    assert not (house.lake / "logs").exists() and not list(house.lake.rglob("*.tar*"))


def test_an_open_quote_in_the_arguments_for_a_child_is_refused(house):
    house.stream_args = "--source 'my folder"
    code, out, err = end_of(house.start())
    assert (code, out) == (2, "")
    assert re.fullmatch(r"error: [^\n]*--stream-args[^\n]*\n", err)


def test_ctrl_c_while_the_arguments_are_checked_is_no_error(house):
    process = house.start()
    wait_for(lambda: family(process))
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    code, out, err = end_of(process)
    assert code == 0 and "Traceback" not in out + err
    assert not (house.lake / "logs").exists() and not list(house.lake.rglob("*.tar*"))


def test_what_a_child_says_the_user_must_put_right_ends_the_supervisor_with_that_line(house):
    (house.root / "run").mkdir()
    with (house.root / "run" / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        code, _, err = end_of(house.start())
    assert code == 2 and re.fullmatch(r"error: train: [^\n]+ is being trained by another process\n", err)
    assert house.status("fsck").returncode == 0


# ---- looking ----


def test_status_and_a_second_supervisor_tell_whether_one_is_running(house):
    house.train_args = "--pause-s 0.5"  # each look takes seconds on a busy machine
    process = running(house)
    status = house.status()
    assert status.returncode == 0 and f"{house.lake}: running" in status.stdout
    for word in ("unread clips", "books", "trained", "recordings", "streamers", "full"):
        assert word in status.stdout

    code, _, err = end_of(house.start())
    assert code == 2 and re.fullmatch(r"error: another supervisor runs [^\n]+ status --lake [^\n]+\n", err)
    assert process.poll() is None and house.ledger(Lake.cap_bytes) == house.cap_bytes

    children, stop = family(process), house.status("stop")
    assert stop.returncode == 0 and f"{house.lake} is stopped" in stop.stdout
    assert end_of(process)[0] == 0 and not any(child.is_running() for child in children)
    assert (house.lake / "history.jsonl").read_text().endswith("\n")
    assert totals_in(house.lake / "ledger.backup.sqlite") == house.ledger(Lake.totals)
    status = house.status()
    assert status.returncode == 1 and f"{house.lake}: not running" in status.stdout
    assert str(house.num_clips_trained()) in status.stdout


def test_a_check_leaves_the_lake_that_somebody_else_runs_alone(house):
    process = running(house)
    code, _, err = end_of(house.start("--cap-gb", "1", "--max-workers", "3", "--check"))
    assert code == 2 and "another supervisor runs" in err and process.poll() is None
    assert house.ledger(Lake.cap_bytes) == house.cap_bytes


def test_fsck_names_what_is_wrong_and_says_so_with_its_exit_code(house):
    lake = make_lake(house.lake, shard_clips=10)
    add_shard(lake, 3)
    lake.close()
    assert house.status("fsck").returncode == 0
    (shard,) = (house.lake / "shards").iterdir()
    shard.unlink()
    fsck = house.status("fsck")
    assert fsck.returncode == 1 and shard.name in fsck.stdout
