"""A training step: how many clips a second, where the time goes, and how near that comes to what the device can do.

in:   nothing; a lake of noise and models with random weights are made here
out:  a table, and as the last line of stdout JSON
cost: 78 s on a busy CPU; the full size was not finished there in ten minutes, and on a GPU it was not measured

    python benchmarks/train_step.py                                        # the demo's sizes, on a CPU
    python benchmarks/train_step.py --size full --device cuda              # the published sizes
    python benchmarks/train_step.py --size full --chunk 4 --steps 1        # the published sizes, on a CPU

It is the trainer's own step: its reader, front end, teacher, losses of `best`, controller off, optimiser, average, in
the precision that the trainer has on the device: bfloat16 and compiled on a GPU, float32 and eager on a CPU.

    FLOPs of a clip    forward pass of the teacher + 3 x forward pass of student and patch head: two per multiply-add
                       in matrices, attention and Canon kernels, a backward pass counted as two forward passes
    mfu_of_measured    clips per second x FLOPs of a clip / FLOP/s of a product of two square matrices of noise in the
                       step's own precision, on the same device in the same run: 8192^3 in bfloat16 on a GPU, 1024^3 in
                       float32 on a CPU
    vs_eager_fp32      clips per second / those of the same step in float32 without TF32 and without compiling; on a CPU
                       that is the very same, so the number only shows how far this machine lets numbers be trusted
    shares             of the time of steps in which the device is waited for around each part. student: with losses
                       and the norms of each chunk's gradient. optimiser: with noise scale, clipping, average and queue

All take turns, and each number is the median over the turns.
"""

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from noise_lake import make_lake
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hear_distill.data import Drawing, ordinary_memory
from hear_distill.feed import Feed, View, pinned_memory
from hear_distill.fit import random_objective
from hear_distill.frontend import MelPcen
from hear_distill.learning import Learning
from hear_distill.locks import Owner
from hear_distill.objective import LossConfig
from hear_distill.pace import Pace
from hear_distill.runlog import StopRequest
from hear_distill.schedule import Control, Schedule
from hear_distill.student import SIZES, StudentConfig
from hear_distill.teacher import Teacher, load_teacher, random_teacher, save_stand_in

SEED = 0
ROUNDS, WARM_UP_STEPS = 5, 3
NUM_OPEN = 4
PAD_SHARE = 0.15
PRODUCTS = {"cuda": (8192, torch.bfloat16), "cpu": (1024, torch.float32)}  # width of the matrices
PRODUCT_REPEATS = 10
PARTS = ("data_wait", "frontend", "teacher", "student", "optimiser")


@dataclass(frozen=True, kw_only=True)
class Size:
    """What is trained, and from what."""

    student: StudentConfig
    has_hear: bool
    """HeAR's architecture as the teacher, or the demo's stand-in"""
    chunk: int
    queue_rows: int
    steps: int
    """of each turn"""
    shard_clips: int


FULL = Size(student=SIZES["small"], has_hear=True, chunk=256, queue_rows=16_384, steps=20, shard_clips=1000)
DEMO = StudentConfig(width=96, blocks=4, heads=3, mlp_width=384)
SMALL = Size(student=DEMO, has_hear=False, chunk=8, queue_rows=256, steps=10, shard_clips=64)


def make_teacher(size: Size, folder: Path, device: torch.device, is_plain: bool) -> Teacher:
    """With random weights; as the trainer has it on this device, or plain."""
    teacher = random_teacher(SEED) if size.has_hear else load_teacher(save_stand_in(folder / "teacher", SEED))
    teacher.to(device)
    if device.type == "cuda" and not is_plain:
        teacher.to(torch.bfloat16)
        teacher.model.compile(dynamic=False)
    return teacher


def make_learning(size: Size, teacher: Teacher, device: torch.device, is_plain: bool) -> Learning:
    """The trainer's, in the middle of a run, as the trainer has it on this device, or plain."""
    control = Control(schedule=Schedule(), chunk_samples=size.chunk)
    loss = LossConfig(relational=0.0, contrastive=0.0, patch=0.5)
    learning = Learning(teacher, size.student, loss, Pace(control, "off", False, device), 0.05, SEED)
    learning.objective = random_objective(teacher, loss, size.queue_rows, device)
    if device.type == "cuda" and is_plain:
        learning.is_bfloat16 = False
    elif device.type == "cuda":
        learning.learner.compile(dynamic=False)
    return learning


def take_step(feed: Feed, learning: Learning, stop: StopRequest) -> None:
    """As in the loop of the trainer."""
    for _ in range(learning.begin_step().num_chunks):
        batch = feed.next(stop, lambda: time.sleep(0.001))
        if batch is None:
            raise SystemExit("asked to stop")
        learning.add(feed.spectrogram(batch), feed.names(batch.ids))
    learning.finish_step()
    feed.mark_trained(learning.ids())


def flops_per_clip(learning: Learning, device: torch.device) -> dict[str, int]:
    """Of teacher and student, by the formula above; counted as torch runs one clip."""

    def count(module: nn.Module, spectrogram: Tensor) -> int:
        # The fused attention of a CPU is unknown to the counter.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            module(spectrogram)
        return counter.get_total_flops()

    spectrogram = torch.rand(1, 1, 192, 128, device=device)
    return {"teacher": count(learning.teacher, spectrogram), "student": 3 * count(learning.learner, spectrogram)}


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Until the device has done it, from when it had done all before it."""
    wait_for(device)
    start = time.perf_counter()
    work()
    wait_for(device)
    return time.perf_counter() - start


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def product_of(device: torch.device) -> tuple[Callable[[], object], int]:
    """A product of matrices of noise, and its FLOPs; zeros would be multiplied faster than data ever is."""
    width, precision = PRODUCTS[device.type]
    a, b = torch.randn(2, width, width, device=device).to(precision)
    return lambda: a @ b, 2 * width**3


class Stopwatch:
    """Seconds by part of a step. From `watch` on, the parts of these two are waited for and timed."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: Counter[str] = Counter()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed_function(*arguments: Any) -> Any:
            found = []
            self.seconds[name] += seconds_of(lambda: found.append(function(*arguments)), self.device)
            return found[0]

        return timed_function

    def watch(self, feed: Feed, learning: Learning) -> None:
        feed.next = self.timed("data_wait", feed.next)
        feed.spectrogram = self.timed("frontend", feed.spectrogram)
        learning.objective.targets_of = self.timed("teacher", learning.objective.targets_of)
        learning.add = self.timed("teacher and student", learning.add)
        learning.finish_step = self.timed("optimiser", learning.finish_step)

    def parts(self) -> dict[str, float]:
        """Seconds of each of PARTS."""
        student = self.seconds["teacher and student"] - self.seconds["teacher"]
        return {name: student if name == "student" else self.seconds[name] for name in PARTS}


def measure(size: Size, folder: Path, device: torch.device) -> dict[str, Any]:
    """Everything that is timed."""
    lake = make_lake(folder / "lake", 2 * NUM_OPEN, size.shard_clips)
    owner = Owner(lake.root, "train")
    drawing = Drawing(run="benchmark", seed=SEED, num_open=NUM_OPEN, batch_size=size.chunk, reuse=True)
    view, stop = View(MelPcen().to(device), device, SEED, PAD_SHARE), StopRequest()
    feed = Feed(lake, owner, drawing, view, allocate=pinned_memory if device.type == "cuda" else ordinary_memory)
    try:
        plain = make_learning(size, make_teacher(size, folder, device, is_plain=True), device, is_plain=True)
        flops = flops_per_clip(plain, device)
        ours = make_learning(size, make_teacher(size, folder, device, is_plain=False), device, is_plain=False)
        return {"flops": flops, **time_in_turn(size, feed, ours, plain, stop)}
    finally:
        feed.reader.close()
        owner.release()
        lake.close()


def time_in_turn(size: Size, feed: Feed, ours: Learning, plain: Learning, stop: StopRequest) -> dict[str, Any]:
    """Clips per second of both, FLOP/s of the product, turn by turn; then seconds of the parts of our step."""
    device, clips = ours.device, 2 * size.chunk
    product, product_flops = product_of(device)
    few = max(1, size.steps // 5)  # of the plain step, which a GPU takes many times as long for

    def clips_per_s(learning: Learning, steps: int) -> float:
        return steps * clips / seconds_of(lambda: [take_step(feed, learning, stop) for _ in range(steps)], device)

    clips_per_s(plain, 1)
    clips_per_s(ours, WARM_UP_STEPS)
    rounds = []
    for _ in range(ROUNDS):
        products = [product_flops / seconds_of(product, device) for _ in range(PRODUCT_REPEATS)]
        rounds.append((clips_per_s(ours, size.steps), clips_per_s(plain, few), median(products)))
    stopwatch = Stopwatch(device)
    stopwatch.watch(feed, ours)
    watched_s = seconds_of(lambda: [take_step(feed, ours, stop) for _ in range(size.steps)], device)
    return {"rounds": rounds, "parts": stopwatch.parts(), "watched_s": watched_s, "watched_clips": size.steps * clips}


def report(found: dict[str, Any], size: Size, device: torch.device) -> dict[str, Any]:
    """Print the table; returns what the last line of stdout says."""
    flops = found["flops"]
    per_clip = sum(flops.values())
    width, precision = PRODUCTS[device.type]
    clips_per_s, _, product = (median(values) for values in zip(*found["rounds"], strict=True))
    mfu = {name: found["watched_clips"] * flops[name] / found["parts"][name] / product for name in flops}
    result = {
        "clips_per_s": round(clips_per_s, 1),
        "mfu_of_measured": round(median(ours * per_clip / product for ours, _, product in found["rounds"]), 3),
        **{f"{name}_share": round(found["parts"][name] / found["watched_s"], 4) for name in PARTS},
        "vs_eager_fp32": round(median(ours / plain for ours, plain, _ in found["rounds"]), 3),
        **{f"{name}_mfu": round(value, 3) for name, value in mfu.items()},
        "gflop_per_clip": round(per_clip / 1e9, 3),
        "achieved_tflop_per_s": round(clips_per_s * per_clip / 1e12, 4),
        "product_tflop_per_s": round(product / 1e12, 4),
        "product": f"{width}^3 {str(precision).removeprefix('torch.')}",
        "chunk": size.chunk,
        "batch": 2 * size.chunk,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
    }
    print(f"{result['batch']} clips a step in 2 chunks on {result['device']}, {result['threads']} threads, ", end="")
    print(f"{result['gflop_per_clip']} GFLOP a clip, of which {flops['teacher'] / per_clip:.0%} are the teacher's")
    print(f"{clips_per_s:10.1f} clips/s, {result['achieved_tflop_per_s']} TFLOP/s, ", end="")
    print(f"{result['mfu_of_measured']:.0%} of the {result['product_tflop_per_s']} of {result['product']}")
    for name in PARTS:
        print(f"{result[f'{name}_share']:10.1%} {name.replace('_', ' ')}")
    print(f"{result['vs_eager_fp32']:10.2f} times as fast as eager float32")
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["small", "full"], default="small", help="default small, the demo's")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default cpu")
    parser.add_argument("--chunk", type=int, help="clips of one backward pass (default 8, full: 256)")
    parser.add_argument("--steps", type=int, help="of each turn (default 10, full: 20)")
    arguments = parser.parse_args()
    chosen = FULL if arguments.size == "full" else SMALL
    chunk = chosen.chunk if arguments.chunk is None else arguments.chunk
    steps = chosen.steps if arguments.steps is None else arguments.steps
    if min(chunk, steps) < 1:
        parser.error("--chunk and --steps must be at least 1")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, but torch finds no GPU: use --device cpu")
    asked = replace(chosen, chunk=chunk, steps=steps)
    with tempfile.TemporaryDirectory() as temporary:
        timed = measure(asked, Path(temporary), torch.device(arguments.device))
    print(json.dumps(report(timed, asked, torch.device(arguments.device))))
