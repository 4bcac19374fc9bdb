"""A stand-in for the trainer: leases, reads, checkpoints and stops as it does, but learns nothing and needs no torch.

in:   the shards of a lake
out:  <out>/state.json (its checkpoint), <out>/progress.json
"""

import json
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from hear_distill import cli
from hear_distill.data import Drawing, LakeReader
from hear_distill.files import write_json
from hear_distill.lake import Lake
from hear_distill.locks import Owner, alone
from hear_distill.runlog import Heartbeat, StopRequest


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of the stand-in."""

    lake: Path = Path("lake")
    """the lake to read"""
    out: Path = Path("run")
    """run folder"""
    batch_size: int = 4
    """clips in one step"""
    save_every: int = 3
    """steps between checkpoints"""
    pause_s: float = 0.05
    """seconds that a step takes"""
    stubborn: bool = False
    """go on when asked to leave"""


def save(config: Config, reader: LakeReader, run: str, step: int) -> None:
    """A checkpoint, then the ledger hears of it."""
    state = reader.state()
    coverage = {str(shard_id): bits.hex() for shard_id, bits in state["coverage"].items()}
    write_json(config.out / "state.json", {"run": run, "step": step, **state, "coverage": coverage})
    reader.record_checkpoint()


def load(config: Config) -> dict:
    """The last checkpoint, or the beginning of a run."""
    path = config.out / "state.json"
    if not path.exists():
        return {"run": uuid.uuid4().hex, "step": 0, "num_batches": 0, "coverage": {}, "uses": {}}
    state = json.loads(path.read_text())
    return state | {"coverage": {int(shard_id): bytes.fromhex(bits) for shard_id, bits in state["coverage"].items()}}


def main(config: Config) -> None:
    stop = StopRequest()
    with alone(config.out / "lock", f"{config.out} is being trained by another process"):
        state, lake = load(config), Lake.open(config.lake)
        run, step, owner = state["run"], state["step"], Owner(lake.root, "train")
        drawing = Drawing(run=run, seed=0, num_open=2, batch_size=config.batch_size)
        reader = LakeReader(lake, owner, drawing, state)
        heartbeat, turns, num_saves = Heartbeat(config.out / "progress.json", "train"), 0, 0
        while not stop or config.stubborn:
            turns += 1
            batch = reader.next_batch()
            heartbeat.beat(turns, step=step, steps=0, is_waiting=batch is None)
            if batch is not None:
                reader.mark_trained(batch.ids)
                step, num_saves = step + 1, 0
                if step % config.save_every == 0:
                    save(config, reader, run, step)
            elif reader.is_drained():
                break
            elif reader.holds_trained_shards() and num_saves < 2:
                save(config, reader, run, step)
                num_saves += 1
            reader.report()
            time.sleep(config.pause_s) if config.stubborn else stop.wait(config.pause_s)
        save(config, reader, run, step)
        reader.close()
        owner.release()
    print(f"left at step {step}")


if __name__ == "__main__":
    cli.run(main, {"best": Config()}, __doc__)
