"""Several processes that train one model: who they are, what they tell one another, and the gradient they share.

in:   torchrun's environment: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, GROUP_RANK, MASTER_ADDR, MASTER_PORT
out:  the same values and tensors on all ranks; with one process, whatever was given

Two groups, as there are two kinds of waiting. Words go over gloo, where a rank may wait for days, say for data; when a
process ends, its connections break, and the others know at once. Tensors of a step go between GPUs by NCCL, whose
watchdog takes ten minutes of silence for a fault. So no rank may begin a chunk before all have said that they will.

The ranks call the same methods in the same order; each method is a meeting of all. R ranks
"""

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hear_distill.files import UserError
from hear_distill.runlog import LOST_A_RANK

RANK_LOST = os.EX_PROTOCOL  # 76: what a process ends with because another rank has; that one says why
PATIENCE = timedelta(days=30)  # of those who wait for words; only the end of a process is a fault

T = TypeVar("T")


def world_size() -> int:
    """Ranks in all, as torchrun says, or whoever only checks what it would start."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Ranks of this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size())))


def refuse_missing_gpus(device: str) -> None:
    """Raise UserError if the ranks of this machine have no GPU each."""
    if device != "cuda":
        return
    if not torch.cuda.is_available():
        raise UserError("--device cuda, but torch finds no GPU; for a CPU: python distill_hear_vit_s_canon2d.py demo")
    if local_world_size() > torch.cuda.device_count():
        raise UserError(
            f"{local_world_size()} GPUs are wanted on this machine, but torch finds {torch.cuda.device_count()}; "
            f"lower --gpus of run_lake.py, or look at CUDA_VISIBLE_DEVICES"
        )


@dataclass(frozen=True)
class Ranks:
    """This process among its likes. A `Ranks()` is alone: its methods hand back what they are given."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    node: int = 0
    """which machine, counted from 0"""
    tensors: Any = None
    """the process group of the tensors of a step; words go over the default group"""

    @classmethod
    def join(cls, device: str) -> Self:
        """Meet the others that torchrun started; alone without torchrun. Raises UserError where that cannot work."""
        if world_size() == 1:
            return cls()
        if "RANK" not in os.environ:
            raise UserError(f"WORLD_SIZE is {world_size()}, but there is no RANK; start with torchrun, or unset it")
        rank, local_rank, node = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK", "GROUP_RANK"))
        refuse_missing_gpus(device)
        if device == "cuda":
            torch.cuda.set_device(local_rank)
        dist.init_process_group("gloo", timeout=PATIENCE)
        tensors = dist.group.WORLD
        if device == "cuda":
            tensors = dist.new_group(backend="nccl", device_id=torch.device("cuda", local_rank))
        return cls(rank, world_size(), local_rank, node, tensors)

    @property
    def is_first(self) -> bool:
        """Whether this rank writes what there is one of: checkpoints, metrics, the run folder."""
        return self.rank == 0

    @property
    def speaks(self) -> bool:
        """Whether this rank tells people and the supervisor of its machine how things are."""
        return self.local_rank == 0

    # ---- words ----

    def tell(self, numbers: Sequence[int]) -> list[list[int]]:
        """Integers, as many from each rank -> those of all ranks. The cheapest of the words, for every chunk."""
        if self.size == 1:
            return [list(numbers)]
        mine = torch.tensor(numbers, dtype=torch.int64)
        all_of_them = [torch.empty_like(mine) for _ in range(self.size)]
        self._call(dist.all_gather, all_of_them, mine)
        return [theirs.tolist() for theirs in all_of_them]

    def meet(self) -> None:
        """Go on only when all have come here."""
        self.tell([0])

    def gather(self, value: T) -> list[T]:
        """A plain value -> those of all ranks."""
        values = [value] * self.size
        if self.size > 1:
            self._call(dist.all_gather_object, values, value)
        return values

    def collect(self, value: T) -> list[T] | None:
        """A plain value, tensors on the CPU included -> those of all ranks, on rank 0; None on the others."""
        values = [value] * self.size if self.is_first else None
        if self.size > 1:
            self._call(dist.gather_object, value, values)
        return values

    def share(self, value: T) -> T:
        """Rank 0's value."""
        values = [value]
        if self.size > 1:
            self._call(dist.broadcast_object_list, values)
        return values[0]

    # ---- tensors ----

    @torch.no_grad()
    def average(self, tensors: Iterable[Tensor]) -> None:
        """Put the mean over the ranks in the place of each; not finite on one rank, not finite on all. One message."""
        if self.size > 1:
            tensors = list(tensors)
            flat = torch.cat([tensor.flatten() for tensor in tensors])
            self._call(dist.all_reduce, flat, group=self.tensors)
            _unflatten(flat / self.size, tensors)

    @torch.no_grad()
    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Put rank 0's in the place of each."""
        if self.size > 1:
            tensors = list(tensors)
            _unflatten(self._of_first(tensors), tensors)

    @torch.no_grad()
    def are_equal(self, tensors: Iterable[Tensor]) -> bool:
        """Whether all ranks hold the same, to the bit."""
        if self.size == 1:
            return True
        tensors = list(tensors)
        is_equal = torch.equal(self._of_first(tensors), torch.cat([tensor.flatten() for tensor in tensors]))
        return all(equal for (equal,) in self.tell([is_equal]))

    @torch.no_grad()
    def stack(self, rows: Tensor) -> Tensor:
        """[n, ...] -> [R n, ...]: the rows of all ranks, in their order."""
        if self.size == 1:
            return rows
        rows = rows.contiguous()
        parts = [torch.empty_like(rows) for _ in range(self.size)]
        self._call(dist.all_gather, parts, rows, group=self.tensors)
        return torch.cat(parts)

    def _of_first(self, tensors: Sequence[Tensor]) -> Tensor:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        self._call(dist.broadcast, flat, src=0, group=self.tensors)
        return flat

    def _call(self, collective: Any, *arguments: Any, **options: Any) -> None:
        """A connection that breaks is the end of another rank; that is told, and this process ends as by a kill:
        a GPU may be in the middle of a message that never comes, and no good order could wait for it."""
        try:
            collective(*arguments, **options)
        except RuntimeError as e:  # what gloo and NCCL raise, of no class of its own
            print(f"{LOST_A_RANK} (this is rank {self.rank}): {str(e).splitlines()[0]}", file=sys.stderr)
            sys.stderr.flush()
            os._exit(RANK_LOST)

    def leave(self) -> None:
        """In good order, when all are done."""
        if self.size > 1:
            self.meet()
            dist.destroy_process_group()


def _unflatten(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


ALONE = Ranks()
