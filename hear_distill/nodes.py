"""Ranks and machines as the supervisor sees them: which combinations can work, and how their trainer is started.

in:   GPUs of this machine, number of machines, which one this is, where they meet
out:  a refusal, or the beginning of a command line; the environment in which a single process checks for all ranks
"""

import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Nodes:
    """One trainer on several GPUs, or on several machines."""

    gpus: int
    num_nodes: int
    node_rank: int
    rendezvous: str

    def refuse(self) -> None:
        """Raise ValueError for what cannot work."""
        if min(self.gpus, self.num_nodes) < 1:
            raise ValueError(f"--gpus and --num-nodes must be at least 1, got {self.gpus} and {self.num_nodes}")
        if not 0 <= self.node_rank < self.num_nodes:
            raise ValueError(f"--node-rank must be from 0 to {self.num_nodes - 1}, got {self.node_rank}")
        host, _, port = self.rendezvous.rpartition(":")
        if self.num_nodes > 1 and not (host and port.isdigit()):
            raise ValueError(f"--num-nodes {self.num_nodes} needs --rendezvous HOST:PORT, got {self.rendezvous!r}")
        if self.num_nodes == 1 and self.rendezvous:
            raise ValueError("--rendezvous is for --num-nodes 2 or more")

    def launched(self, command: list[str]) -> list[str]:
        """The command line of a script, started as several ranks if there are several; the first word is Python."""
        if self.gpus * self.num_nodes == 1:
            return command
        nodes = ["--num-nodes", self.num_nodes, "--node-rank", self.node_rank, "--rendezvous", self.rendezvous]
        more = map(str, nodes if self.num_nodes > 1 else ())
        return [sys.executable, "-m", "hear_distill.launch", "--gpus", str(self.gpus), *more, *command[1:]]

    def environment(self) -> dict[str, str]:
        """For a process that only checks what the ranks would do: torchrun's words, as far as they are known before."""
        return {"WORLD_SIZE": str(self.gpus * self.num_nodes), "LOCAL_WORLD_SIZE": str(self.gpus)}

    def part_of_source(self) -> list[str]:
        """For the streamers: this machine's part, disjoint from those of the others."""
        return ["--num-nodes", str(self.num_nodes), "--node-rank", str(self.node_rank)] if self.num_nodes > 1 else []
