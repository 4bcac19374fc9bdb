"""Between two log points a step never waits for the GPU: it reads no number of it, and what it sends goes by itself.

On a CPU nothing waits, so what would make a GPU wait is forbidden by name: numbers that leave the device, shapes that
depend on them, and copies to it that are waited for. Those of torch's own code are from the device to itself.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from lake_tools import ROOT
from torch.utils._python_dispatch import TorchDispatchMode

from hear_distill.feed import View
from hear_distill.fit import random_objective
from hear_distill.frontend import MelPcen
from hear_distill.learning import Learning
from hear_distill.objective import LossConfig, measure
from hear_distill.pace import Pace
from hear_distill.schedule import Control, Schedule
from hear_distill.student import StudentConfig
from hear_distill.teacher import load_teacher

CPU = torch.device("cpu")
MODEL = StudentConfig(width=24, heads=2, blocks=1, mlp_width=24)
BEST = LossConfig(patch=0.5)
PAPER = LossConfig(negatives="batch")
READERS = ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__float__", "__int__", "__index__", "__array__")
# What the reading of a number, a shape that depends on numbers, and a comparison of whole tensors come down to.
OPERATORS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "linalg_eigh")


class Waited(AssertionError):
    """What would have waited."""


class Operators(TorchDispatchMode):
    """Raises for an operator that makes the host wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name.startswith(OPERATORS):
            raise Waited(name)
        if name.startswith("index") and any(i is not None and i.dtype == torch.bool for i in _indices(args)):
            raise Waited(f"{name} by a mask")
        return func(*args, **(kwargs or {}))


def _indices(arguments: tuple) -> list:
    """Tensors by which an operator is told where; index_copy_ and its kind take no masks."""
    return arguments[1] if len(arguments) > 1 and isinstance(arguments[1], list | tuple) else []


@contextmanager
def no_waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Raises Waited at whatever would wait for a GPU."""
    to, from_list = torch.Tensor.to, torch.Tensor.__getitem__

    def forbidden(name):
        def read(*_, **__):
            raise Waited(name)

        return read

    def copy(tensor, *arguments, non_blocking=False, **options):
        target = options.get("device", arguments[0] if arguments else None)
        is_ours = Path(sys._getframe(1).f_code.co_filename).parent in (ROOT / "hear_distill", ROOT / "tests")
        if is_ours and isinstance(target, torch.device | str) and not non_blocking:
            raise Waited("a copy to the device")
        return to(tensor, *arguments, non_blocking=non_blocking, **options)

    def index(tensor, place):
        if any(isinstance(part, list | np.ndarray) for part in (place if isinstance(place, tuple) else (place,))):
            raise Waited("a list as an index, which is copied to the device")
        return from_list(tensor, place)

    with monkeypatch.context() as patched, Operators():
        for name in READERS:
            patched.setattr(torch.Tensor, name, forbidden(name))
        patched.setattr(torch.Tensor, "to", copy)
        patched.setattr(torch.Tensor, "__getitem__", index)
        yield


@pytest.fixture
def run(teacher):
    """Some steps of learning from int16 clips, as the trainer takes them: (learning, how to take a step)."""

    def begin(loss: LossConfig, controller: str, has_known: bool):
        frozen = load_teacher(teacher)
        control = Control(schedule=Schedule(warmup_samples=8, total_samples=1000), chunk_samples=4)
        learning = Learning(frozen, MODEL, loss, Pace(control, controller, False, CPU), 0.05, seed=0)
        view = View(MelPcen(), CPU, seed=0, pad_share=0.5)
        ids = [(1, clip) for clip in range(18)]  # then a chunk with two of them, then none
        learning.objective = random_objective(frozen, loss, 30, CPU)
        if has_known:
            learning.start_with(measure(frozen, loss, [(ids, view(clips_of(ids), ids))], seed=0))

        def step() -> None:
            for chunk in range(learning.begin_step().num_chunks):
                ids = [(1, 4 * (2 * learning.step + chunk) + i) for i in range(4)]
                learning.add(view(clips_of(ids), ids), ids)
            learning.finish_step()

        return learning, step

    return begin


def clips_of(ids) -> np.ndarray:
    """[B, 32000] int16 noise, another for each clip."""
    return np.stack([np.random.default_rng(i).integers(-9000, 9000, 32_000, np.int16) for i in ids])


@pytest.mark.parametrize("has_known", [False, True], ids=["targets asked for", "targets known"])
@pytest.mark.parametrize("controller", ["off", "seesaw", "batch", "ema-batch"])
@pytest.mark.parametrize("loss", [BEST, PAPER], ids=["best", "paper"])
def test_a_step_between_two_log_points_does_not_wait_for_the_device(run, monkeypatch, loss, controller, has_known):
    learning, step = run(loss, controller, has_known)
    for _ in range(5):
        with no_waits(monkeypatch):
            step()
    assert learning.samples == 40


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.item(),
        float,
        lambda x: bool(x > 0),
        lambda x: x.cpu(),
        lambda x: x.expand(3).tolist(),
        lambda x: x.expand(3)[x.expand(3) > 0],
        lambda x: torch.nonzero(x.expand(3)),
        lambda x: x.expand(3)[[0, 1]],
        lambda x: x.to(CPU),
        lambda x: torch.equal(x, x),
        np.asarray,
        lambda x: torch.where(x.expand(3) > 0),
    ],
)
def test_what_waits_is_noticed(monkeypatch, wait):
    x = torch.ones(())
    with pytest.raises(Waited), no_waits(monkeypatch):
        wait(x)
