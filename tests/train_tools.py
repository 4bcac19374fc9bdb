"""Training runs for tests: the real stage, each run in a process of its own that can be killed, and what it trained on.

A run is forked from a server that has torch loaded already, which saves the seconds that importing it takes; what runs
is the stage's own file, from the parsing of its flags to its exit code.

out:  <out>/ of the stage, and beside it <out>.log (stdout and stderr) and <out>.trained (which sounds, in which order);
      <out>.1.log and <out>.1.trained of rank 1
"""

import hashlib
import importlib.util
import json
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from lake_tools import ROOT, clips_on_disk

from hear_distill import cli
from hear_distill.lake import Lake

TRAINER = ROOT / "distill_hear_vit_s_canon2d.py"
TIMEOUT_S = 120.0
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["hear_distill.teacher", "torch.utils.tensorboard", "matplotlib.pyplot", "tyro"])
TINY = {
    **{"--device": "cpu", "--chunk-size": 2, "--open-shards": 3, "--save-every": 24, "--log-every": 8},
    **{"--schedule.total-samples": 4000, "--schedule.warmup-samples": 8, "--schedule.decay-samples": 0},
    **{"--schedule.peak": 3e-3, "--target-clips": 16},
    **{"--loss.relational": 0.5, "--loss.contrastive": 0.5},
    **{"--model.width": 24, "--model.heads": 2, "--model.blocks": 1, "--model.mlp-width": 24},
}
SMALL_SHARDS = ("--shard-clips", 10, "--open-tars", 2, "--val-clips", 8, "--val-fraction", 0.05)  # of the streamer

Edit = Callable[[ModuleType], None]


def load_stage(path: Path) -> ModuleType:
    """A stage as a module, without running it."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    stage = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stage)
    return stage


def end_runs() -> None:
    """Kill the runs that a test has left behind; joblib's workers are children of this process too, but not ours."""
    for process in multiprocessing.active_children():
        if isinstance(process, FORKS.Process):
            process.kill()
            process.join()


@dataclass(frozen=True)
class Ended:
    """A run that is over."""

    code: int
    """exit code, or the negative number of the signal that killed it"""
    said: str
    """stdout and stderr"""


@dataclass(frozen=True)
class Training:
    """A run folder, the lake it learns from, and the flags that differ from TINY."""

    out: Path
    lake: Path
    teacher: Path
    flags: dict[str, Any] = field(default_factory=dict)
    is_drawn: bool = False
    """also draw the curves at the end, a second of each run"""
    environment: dict[str, str] = field(default_factory=dict)
    """for a process that is one of several ranks"""

    def but(self, **flags: Any) -> "Training":
        """The same with other flags; dots and dashes are underlines here, as in model__width and save_every."""
        names = {name: "--" + name.replace("__", ".").replace("_", "-") for name in flags}
        return replace(self, flags=self.flags | {names[name]: value for name, value in flags.items()})

    def start(self, crash_at: str | None = None, edit: Edit | None = None) -> multiprocessing.Process:
        """Begin or resume; `edit` may change the module of the stage before it runs."""
        flags = {"--lake": self.lake, "--out": self.out, "--teacher": self.teacher, **TINY, **self.flags}
        argv: list[str] = []
        for name, value in flags.items():
            values = value if isinstance(value, tuple) else () if value is True else (value,)
            argv += [name, *map(str, values)]
        process = FORKS.Process(target=_train, args=(argv, self, crash_at, edit))
        process.start()
        return process

    def run(self, crash_at: str | None = None, edit: Edit | None = None) -> Ended:
        """Begin or resume, to the end."""
        return self.end_of(self.start(crash_at, edit))

    def end_of(self, process: multiprocessing.Process) -> Ended:
        """Wait for a run that `start` began; a hang is a failure."""
        process.join(TIMEOUT_S)
        if process.exitcode is None:
            process.kill()
            raise AssertionError(f"still running after {TIMEOUT_S} s: {self.said()[-1000:]}")
        return Ended(process.exitcode, self.said())

    def said(self) -> str:
        """Stdout and stderr of the last run so far."""
        return _text(self.beside("log"))

    def beside(self, what: str) -> Path:
        """A file of this rank beside the run folder."""
        rank = self.environment.get("RANK", "0")
        return self.out.with_suffix(f".{what}" if rank == "0" else f".{rank}.{what}")

    def trained(self) -> list[str]:
        """Hashes of the sounds of the surviving history: a run that resumes undoes what came after its checkpoint."""
        history: list[list[str]] = []
        for line in _text(self.beside("trained")).splitlines():
            entry = json.loads(line)
            if isinstance(entry, int):
                assert entry <= len(history), "resumed at a step that was never reached"
                del history[entry:]
            else:
                history.append(entry)
        return [sound for step in history for sound in step]


def set_cap(lake: Path, num_bytes: int) -> None:
    """Change the cap of a lake."""
    ledger = Lake.open(lake)
    ledger.db.execute("UPDATE settings SET value = ? WHERE name = 'cap_bytes'", (str(num_bytes),))
    ledger.close()


def sounds_in(lake: Path) -> Counter[str]:
    """Hashes of the train clips of a lake, read from its files without the ledger."""
    return Counter(_hash(clip.samples) for clip in clips_on_disk(lake) if clip.folder == "shards")


def _text(path: Path) -> str:
    """Of a file that may not be there yet."""
    return path.read_text() if path.exists() else ""


def _hash(samples: bytes) -> str:
    return hashlib.sha256(samples).hexdigest()[:16]


def _train(argv: list[str], training: Training, crash_at: str | None, edit: Edit | None) -> None:
    """In the forked process: what `python distill_hear_vit_s_canon2d.py ARGV` does, with a witness."""
    os.environ |= training.environment
    log = os.open(training.beside("log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if crash_at:
        os.environ["HEAR_CRASH_AT"] = crash_at
    stage = load_stage(TRAINER)
    _witness(stage, training.beside("trained"))
    if not training.is_drawn:
        stage.draw_curves = lambda out: None
    if edit:
        edit(stage)
    sys.argv = [str(TRAINER), *argv]
    cli.run(stage.main, stage.PRESETS, stage.__doc__, check=stage.check)


def _witness(stage: ModuleType, path: Path) -> None:
    """Append to `path` where a run begins, and the sounds of each step, as they were when they were learned from."""
    train, learn_from, finish_step = stage.train, stage.learn_from, stage.finish_step
    fed: list[str] = []

    def note(entry: int | list[str]) -> None:
        with path.open("a") as f:
            f.write(json.dumps(entry) + "\n")

    def train_and_note(run: Any, stop: Any) -> str:
        note(run.learning.step)
        return train(run, stop)

    def listen(run: Any, batch: Any) -> None:
        if not run.feed.num_pending:
            fed.clear()
        fed.extend(_hash(row.tobytes()) for row in batch.samples)
        learn_from(run, batch)

    def finish_and_note(run: Any) -> Any:
        terms = finish_step(run)
        note(fed)
        return terms

    stage.train, stage.learn_from, stage.finish_step = train_and_note, listen, finish_and_note
