"""What a training run tells: the same numbers to programs, to TensorBoard and to people, and that it is alive.

in:   numbers by name
out:  <out>/metrics.jsonl, <out>/tensorboard/ and lines on stdout, of one rank, and a run at Weights & Biases if asked;
      a heartbeat, of one rank of each machine
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from hear_distill.files import UserError
from hear_distill.runlog import Heartbeat, Metrics, progress_file

WANDB_PROJECT = "hear_distill"
SAID = (  # to people
    *("samples", "loss", "explained_variance", "grad_norm", "lr", "noise_batch", "clips_per_s"),
    *("anchor_explained_variance", "anchor_padded_explained_variance", "recent_explained_variance"),
    *("anchor_knn_overlap", "recent_knn_overlap", "probe_map"),
)


def require_wandb() -> None:
    """Raise UserError if the client of Weights & Biases is not installed."""
    if importlib.util.find_spec("wandb") is None:
        raise UserError("--wandb, but wandb is not installed: pip install wandb")


def open_wandb(out: Path, run_id: str) -> Any:
    """The run at Weights & Biases with the id of ours: begun, or gone on with. Its files lie in <out>/wandb.

    Raises UserError where there is no account and WANDB_MODE is not offline.
    """
    import wandb

    config = json.loads((out / "config.json").read_text())
    try:
        return wandb.init(
            **{"project": WANDB_PROJECT, "id": run_id, "name": out.name, "resume": "allow", "dir": str(out)},
            **{"config": config, "settings": wandb.Settings(console="off")},  # what we print stays here
        )
    except wandb.Error as e:
        raise UserError(f"--wandb: no run at Weights & Biases ({e}); wandb login, or set WANDB_MODE=offline") from e


class Pulse:
    """Of a rank that tells nothing but that it is alive, and that only if there is a file for it."""

    def __init__(self, heartbeat: Path | None) -> None:
        self.heartbeat = Heartbeat(heartbeat, "train") if heartbeat else None
        self.num_beats = 0
        self.last: dict[str, float] = {}
        """values of the last step that was told of"""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Nothing: another rank has the same."""

    def log_step(self, step: int, values: dict[str, float]) -> None:
        """For the heartbeat alone."""
        self.last = values

    def beat(self, **values: Any) -> None:
        """We are alive, and doing something; cheap enough to call at every step."""
        self.num_beats += 1
        if self.heartbeat:
            self.heartbeat.beat(self.num_beats, **self.last | values)

    def close(self) -> None:
        """Nothing is open."""


class Journal(Pulse):
    """Of a run that goes on after `step`: what earlier processes told of later steps is forgotten."""

    def __init__(self, out: Path, step: int, wandb_id: str | None = None) -> None:
        """`wandb_id`: id of the run at Weights & Biases; None sends nothing there."""
        super().__init__(out / progress_file(0))
        self.wandb = open_wandb(out, wandb_id) if wandb_id else None
        self.metrics = Metrics(out, last_step=step)
        self.board = SummaryWriter(out / "tensorboard", purge_step=step + 1)

    def log(self, step: int, values: dict[str, float]) -> None:
        """One line for programs, the same numbers for TensorBoard, and the first of them for people.

        Steps that a killed process told Weights & Biases of are not taken there a second time; they are the same.
        """
        self.metrics.log(step, **values)
        if self.wandb:
            self.wandb.log(values, step=step)
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        print(f"step {step}  " + "  ".join(f"{name} {values[name]:.5g}" for name in SAID if name in values))

    def log_step(self, step: int, values: dict[str, float]) -> None:
        """The same for a training step, whose values the heartbeat repeats; says so if the loss has jumped."""
        num_spikes = values["loss_spikes"] - self.last.get("loss_spikes", values["loss_spikes"])
        if num_spikes:
            print(f"WARNING: the loss jumped at {num_spikes:.0f} of the steps up to {step}")
        super().log_step(step, values)
        self.log(step, values)

    def close(self) -> None:
        """Everything is on its way to the disk."""
        self.metrics.close()
        self.board.close()
        if self.wandb:
            self.wandb.finish()
