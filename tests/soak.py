"""Thirty minutes of bad luck: the whole lake on real recordings, its streamers and its trainer killed again and again.

in:   a folder of WebDataset tars
out:  the books at the end, line by line what should be and what is; exit code 1 if a clip was lost or came twice
cost: --minutes, and the time of decoding the source once

    python tests/soak.py --source DIR --minutes 30 [--folder soak]

The source is looped: each tar stands in it many times under different names, so its clips have different ids. Every 20
to 60 s a streamer or the trainer gets a SIGKILL, and now and then the supervisor itself. A tar that was read to its end
must have given as many clips as a straight loop over its recordings does; the checkpoint must have learned from as many
as the books say.
"""

import argparse
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
from lake_tools import ROOT
from reference.chunker import starts_by_the_book

from hear_distill import checkpoint
from hear_distill.audio import decode
from hear_distill.lake import Lake
from hear_distill.sources import FolderSource
from hear_distill.tars import read_recordings

SUPERVISOR = ROOT / "datalake" / "run_lake.py"
COPIES = 60
VICTIMS = {"supervisor": 1, "stream_laion_audio_clips": 10, "distill_hear_vit_s_canon2d": 9}  # with their weights
PATIENCE_S = 60.0  # for a streamer to appear
# The real command refuses to go on after a few crashes an hour, as it should; here they are the point.
PATIENT = f"""
import runpy, sys
from hear_distill import children
children.CRASHES_PER_HOUR = children.DECODER_CRASHES_PER_HOUR = 10**6
children.BACKOFF_S = 0.0
sys.argv[0] = {str(SUPERVISOR)!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def loop(source: Path, folder: Path) -> None:
    """COPIES of every tar of the source, as links."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in source.glob("*.tar"):
        for copy in range(COPIES):
            (folder / f"{path.stem}-{copy:03d}.tar").symlink_to(path.resolve())


def start(folder: Path, train_args: str) -> subprocess.Popen:
    """The supervisor, in a session of its own."""
    command = [sys.executable, "-c", PATIENT, "demo", "--source", str(folder / "source"), "--out", str(folder / "run")]
    command += ["--lake", str(folder / "lake"), "--train-args", train_args]
    with (folder / "supervisor.log").open("a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, cwd=folder)


def name_of(process: psutil.Process) -> str | None:
    """The stage that a process runs; `supervisor` if none, None if it has just ended."""
    try:
        return next((Path(word).stem for word in process.cmdline() if word.endswith(".py")), "supervisor")
    except psutil.NoSuchProcess:  # a zombie as well
        return None


def kill_one(supervisor: subprocess.Popen, rng: random.Random) -> str:
    """SIGKILL to the supervisor, a streamer or the trainer; returns to whom.

    While the lake is full there is no streamer, so one is waited for, and killed up to two seconds into its work.
    """
    wanted, end = rng.choices(list(VICTIMS), list(VICTIMS.values()))[0], time.monotonic() + PATIENCE_S
    while time.monotonic() < end and supervisor.poll() is None:
        process = psutil.Process(supervisor.pid)
        victims = [p for p in (process, *process.children()) if name_of(p) == wanted]
        if victims:
            victim = rng.choice(victims)
            time.sleep(rng.uniform(0.0, 2.0))
            if name_of(victim) == wanted:  # it may have left by itself
                victim.kill()
                return wanted
        time.sleep(0.05)
    return "nobody"


def soak(folder: Path, minutes: float, train_args: str) -> Counter[str]:
    """Run and kill until the time is over, then end in good order. Returns the kills by name."""
    rng, kills = random.Random(0), Counter()
    supervisor, end = start(folder, train_args), time.monotonic() + 60 * minutes
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(left, rng.uniform(20, 60)))
        if supervisor.poll() is None and time.monotonic() < end:
            kills[kill_one(supervisor, rng)] += 1
        if supervisor.poll() is not None or not psutil.pid_exists(supervisor.pid):
            time.sleep(12)  # its children see the closed pipe and leave
            supervisor = start(folder, train_args)
        print(f"{dict(kills)}; {Lake.open(folder / 'lake').books()}", flush=True)
    supervisor.send_signal(signal.SIGTERM)
    supervisor.wait(120)
    return kills


def clips_by_tar(source: Path) -> dict[str, int]:
    """What each tar must give, without lake, workers or cursors."""
    folder, counts = FolderSource(source), {}
    for tar in folder.tars:
        with folder.open(tar, 0) as stream:
            lengths = [len(decode(recording.audio)) for recording in read_recordings(stream, tar, 0)]
        counts[tar.name.removesuffix(".tar")] = sum(len(starts_by_the_book(length)) for length in lengths)
    return counts


def settle(source: Path, folder: Path) -> list[str]:
    """What is not as it should be, when everything has ended; empty if all is well."""
    lake = Lake.open(folder / "lake")
    lake.sweep()
    problems, books = lake.disagreements(), lake.books()
    expected = clips_by_tar(source)
    cut = sum((Counter(row["tars"]) for row in lake.statistics(10**9)), Counter())
    for row in lake.db.execute("SELECT name, state FROM tars WHERE state IN ('done', 'broken')").fetchall():
        should = expected[row["name"].rpartition("-")[0]]
        if cut[row["name"]] != should:
            problems.append(f"{row['name']} gave {cut[row['name']]} clips, it holds {should}")
    if cut.total() != books.cut:
        problems.append(f"the statistics tell of {cut.total()} clips, the books of {books.cut}")
    state, path = checkpoint.load_newest(folder / "run")
    trained = state["samples"]
    if trained != books.trained:
        problems.append(f"{path} has learned from {trained} clips, the books say {books.trained}")
    print(f"{state['step']} steps; {books}; tars: {dict(lake.tar_states())}")
    return problems


def main(source: Path, minutes: float, folder: Path, train_args: str) -> int:
    shutil.rmtree(folder, ignore_errors=True)
    loop(source, folder / "source")
    kills = soak(folder, minutes, train_args)
    problems = settle(source, folder)
    print("\n".join(problems) or f"{kills.total()} kills ({dict(kills)}): no clip was lost, and none came twice")
    return 1 if problems else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--folder", type=Path, default=Path("soak"))
    parser.add_argument("--train-args", default="--schedule.total-samples 100000000 --schedule.decay-samples 0")
    arguments = parser.parse_args()
    sys.exit(main(arguments.source, arguments.minutes, arguments.folder.resolve(), arguments.train_args))
