"""The checkpoints of a run: whether one that is found may be gone on with, and what is saved, by which rank.

in:   the run folder, what must not change in a run, and its parts after a whole step
out:  <out>/latest.pt and its other names, from rank 0; and in the ledger of each lake that it is durable
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hear_distill import checkpoint
from hear_distill.feed import Feed
from hear_distill.files import UserError
from hear_distill.lake import Lake
from hear_distill.learning import Learning
from hear_distill.ranks import Ranks

Remembered = Mapping[str, Mapping[str, Any]]  # settings by name, by what they belong to


def refuse_another(out: Path, asked: Remembered, state: Mapping[str, Any], lake: Lake) -> None:
    """Raise UserError unless the run in `out` is one with these settings, and has learned from this lake."""
    for what, kept in state["remembered"].items():
        differing = [name for name in asked[what] if kept.get(name) != asked[what][name]]
        if differing:
            raise UserError(f"{out} holds a {what} with another {', '.join(differing)}; choose another --out")
    if lake.setting("id") not in state["reader"]["lakes"]:
        raise UserError(
            f"{out} learned from another lake than {lake.root}, whose shard numbers mean other clips; "
            f"name that lake with --lake, or choose another --out"
        )


@dataclass
class Keeper:
    """What is saved of one run, and when."""

    out: Path
    num_kept: int
    """checkpoints that stay under a number of their own, beside the newest two and the best"""
    run: str
    """id of the run"""
    remembered: Remembered
    ranks: Ranks
    best: float = float("inf")
    """lowest validation MSE so far, and its step"""
    best_step: int = 0
    is_whole: bool = False
    """whether all parts of the state belong to the same step"""
    saves_here: int = 0
    """checkpoints made at the present step"""

    def take_up(self, state: Mapping[str, Any], path: Path) -> None:
        """Go on from this checkpoint. A kill may have come between latest.pt and its other names."""
        self.best, self.best_step = state["best"], state["best_step"]
        if self.ranks.is_first and path.name == checkpoint.LATEST:
            self._name(state["step"], is_best=self.best_step == state["step"])

    def note(self, step: int, mse: float) -> bool:
        """Whether this is the lowest validation MSE so far."""
        is_best = mse < self.best
        if is_best:
            self.best, self.best_step = mse, step
        return is_best

    def begin_step(self) -> None:
        """From now on the parts of the state change, one after another."""
        self.is_whole = False

    def finish_step(self) -> None:
        """They belong together again."""
        self.is_whole, self.saves_here = True, 0

    def save(self, learning: Learning, feed: Feed, is_best: bool = False) -> None:
        """Write a checkpoint that is read back before it counts, then let the ledgers retire what two of them cover."""
        read = feed.state()
        learning.settle()
        if self.ranks.is_first:
            facts = {"run": self.run, "remembered": self.remembered, "best": self.best, "best_step": self.best_step}
            checkpoint.save(self.out, {**facts, "reader": read, **learning.state_dict()})
            self._name(learning.step, is_best)
        self.ranks.meet()  # it is durable
        feed.reader.record_checkpoint()
        self.saves_here += 1

    def _name(self, step: int, is_best: bool) -> None:
        """Give latest.pt its other names."""
        if is_best:
            checkpoint.keep_as_best(self.out)
        checkpoint.keep_numbered(self.out, step, self.num_kept)
