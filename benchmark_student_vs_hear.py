"""Time the student against HeAR: the same sound, in one process, turn by turn.

in:   nothing, as random weights take as long as trained ones; or a checkpoint, and HeAR or a folder like it
out:  a table, and its JSON as the last line of stdout; with --out also <out>/speed.json (every round) and speed.png
cost: about 5 minutes on two busy cores, most of it HeAR at batch 16; the demo 1 minute; 2.4 GiB of memory

    python benchmark_student_vs_hear.py                             # the published sizes, on this CPU
    python benchmark_student_vs_hear.py demo                        # the same, one clip at a time and a few rounds
    python benchmark_student_vs_hear.py --checkpoint runs/hear-vit-s/best.pt --teacher google/hear-pytorch

B clips in a batch   n = 32,000 samples of one clip   N tokens   D width   M width inside the MLP   L blocks

A pipeline is two stages, the front end and then a model; end to end is both. In a round each pipeline runs once, so
that a slow moment of the machine meets both models, and a speed-up is the median of the ratios within the rounds.
The student is timed without its projection, which serves the loss and drop-in use: the 384-d embedding is the product.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hear_distill import cli
from hear_distill.audio import CLIP_SAMPLES, SAMPLE_RATE
from hear_distill.demo import DEMO
from hear_distill.files import MIB, UserError, atomic_write, write_json
from hear_distill.frontend import MelPcen
from hear_distill.student import GRID_COLUMNS, GRID_ROWS, PATCH, SIZES, Student, StudentConfig, load_student
from hear_distill.teacher import Teacher, load_teacher, random_teacher


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of the benchmark."""

    checkpoint: Path | None = None
    """student to time; without one, a student with random weights"""
    size: Literal[tuple(SIZES)] = "small"
    """of the student with random weights"""
    teacher: str = "random"
    """hub id or folder of HeAR, or random: HeAR's architecture with random weights"""
    batch_sizes: tuple[int, ...] = (1, 16)
    """clips in a batch; each is timed with each of --threads"""
    threads: tuple[int, ...] = tuple(sorted({1, torch.get_num_threads()}))
    """threads of the CPU; a GPU is timed with the first of them"""
    repeats: int = 20
    """rounds of each cell of the table"""
    limit_s: float = 20.0
    """a cell that takes longer ends before its last round, but not before the third"""
    device: Literal["cpu", "cuda"] = "cpu"
    """of both models and the front end"""
    out: Path | None = None
    """folder for speed.json and speed.png"""

    def __post_init__(self) -> None:
        if not self.batch_sizes or not self.threads or min(*self.batch_sizes, *self.threads) < 1:
            raise ValueError("--batch-sizes and --threads each take one or more numbers, all at least 1")
        if self.repeats < 2:
            raise ValueError(f"--repeats must be at least 2, got {self.repeats}: one round has no spread")
        if self.checkpoint is not None and self.size != "small":
            raise ValueError(f"--size {self.size} is for random weights; {self.checkpoint} has a size of its own")


PRESETS = {"full": Config(), "demo": Config(batch_sizes=(1,), repeats=5, out=DEMO / "speed")}
SEED = 0
CLIP_S = CLIP_SAMPLES / SAMPLE_RATE
WARM_UP_ROUNDS = 1
MIN_ROUNDS = 3
STUDENT, TEACHER = "student", "teacher"
INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_vnni", "amx_tile")  # what float32 and int8 kernels gain most from
PATCHES = GRID_ROWS * GRID_COLUMNS
COLUMNS = f"{'threads':>7} {'batch':>5} {'rounds':>6}  {'':27}"
STATISTICS = f"{'median':>9} {'p10':>9} {'p90':>9} {'ms/clip':>9} {'clips/s':>8} {'x real time':>11}"

Stage = Callable[[Any], Any]
Rounds = dict[str, list[list[float]]]  # of each pipeline: one list per round, the seconds of each stage


class Spread(NamedTuple):
    """Median, and the values that a tenth of the rounds stay below and above."""

    median: float
    p10: float
    p90: float


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is timed, in numbers that do not depend on the machine."""

    name: str
    weights: str
    """where they are from"""
    parameters: int
    weights_mib: float
    """size of a file with these parameters as float32"""
    flops_per_clip: int


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One number of threads and one batch size: every round of both pipelines."""

    threads: int
    batch: int
    seconds: Rounds

    def rows(self) -> dict[str, list[float]]:
        """Seconds per batch, by what was timed. The front end has two values per round, one from each pipeline."""
        rows = {"front end": [times[0] for rounds in self.seconds.values() for times in rounds]}
        rows |= {name: [times[1] for times in rounds] for name, rounds in self.seconds.items()}
        return rows | {f"{name}, end to end": [sum(times) for times in rounds] for name, rounds in self.seconds.items()}

    def speedups(self) -> dict[str, Spread]:
        """How many times faster the student is, round by round, as a model and end to end."""
        rows = self.rows()
        return {
            key: spread([slow / fast for slow, fast in zip(rows[TEACHER + kind], rows[STUDENT + kind], strict=True)])
            for key, kind in (("model", ""), ("end_to_end", ", end to end"))
        }


def spread(values: Sequence[float]) -> Spread:
    """Of two or more values, with linear interpolation between neighbours."""
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return Spread(tenths[4], tenths[0], tenths[8])


def pink_noise(num_clips: int, seed: int) -> Tensor:
    """[B, n] float32 in [-1, 1], a different sound in each row, its power falling as 1 / frequency.

    Zeros would not do: a GPU multiplies them faster than it will ever multiply sound.
    """
    rng = np.random.default_rng(seed)
    bins = np.arange(CLIP_SAMPLES // 2 + 1)
    spectrum = rng.standard_normal((num_clips, len(bins), 2)) @ [1, 1j]
    sound = np.fft.irfft(spectrum / np.sqrt(np.maximum(bins, 1)))
    return torch.from_numpy(sound / np.abs(sound).max(axis=1, keepdims=True)).float()


def time_in_turn(
    pipelines: Mapping[str, Sequence[Stage]], first: Any, wait: Callable[[], None], repeats: int, limit_s: float
) -> Rounds:
    """Run each pipeline once per round, in the order given, each stage on what the stage before it made.

    Args:
        first: what the first stage of every pipeline is given.
        wait: returns when the device has done all it was asked to.
        limit_s: seconds after which no round begins, except to reach `MIN_ROUNDS`.
    """
    rounds: Rounds = {name: [] for name in pipelines}
    end = time.perf_counter() + limit_s
    for done in range(-WARM_UP_ROUNDS, repeats):
        if done >= MIN_ROUNDS and time.perf_counter() > end:
            break
        for name, stages in pipelines.items():
            value, times = first, []
            for stage in stages:
                start = time.perf_counter()
                value = stage(value)
                wait()
                times.append(time.perf_counter() - start)
            if done >= 0:
                rounds[name].append(times)
    return rounds


def encoder_flops(width: int, mlp_width: int, blocks: int, tokens: int) -> int:
    """Of one clip, two per multiply-add: per block 2 N (4 D^2 + 2 D M) in matrices, 24 N D^2 if M = 4 D, and 4 N^2 D in
    attention; and the patches. Norms, softmax, activations and biases are left out: well under 1 % of the whole."""
    matrices = 2 * tokens * (4 * width**2 + 2 * width * mlp_width)
    attention = 4 * tokens**2 * width
    return blocks * (matrices + attention) + 2 * PATCHES * PATCH**2 * width


def student_flops(config: StudentConfig) -> int:
    """The encoder and its Canon layers, 2 k^2 per token and channel (2 k along a line); without the projection."""
    channels = {"a": config.width, "b": 3 * config.width, "c": config.width, "d": config.mlp_width}
    places = "" if config.canon == "none" else config.canon
    canon = 2 * config.canon_kernel**config.canon_dims * PATCHES * sum(channels[place] for place in places)
    return encoder_flops(config.width, config.mlp_width, config.blocks, PATCHES) + config.blocks * canon


def teacher_flops(teacher: Teacher) -> int:
    """The encoder, which has one token more for the class, and the pooling layer on that token."""
    config = teacher.model.config
    encoder = encoder_flops(config.hidden_size, config.intermediate_size, config.num_hidden_layers, PATCHES + 1)
    return encoder + 2 * config.hidden_size * config.pooler_output_size


def describe(module: nn.Module, name: str, weights: str, flops_per_clip: int) -> Model:
    """Count the parameters of what is timed."""
    parameters = sum(p.numel() for p in module.parameters())
    return Model(
        name=name,
        weights=weights,
        parameters=parameters,
        weights_mib=4 * parameters / MIB,
        flops_per_clip=flops_per_clip,
    )


def build_student(config: Config) -> tuple[Student, Model]:
    """The student less its projection, on the device."""
    torch.manual_seed(SEED)
    student = load_student(config.checkpoint) if config.checkpoint else Student(SIZES[config.size]).eval()
    student.projection = nn.Identity()  # else its weights would be counted, though they are not used
    weights = str(config.checkpoint) if config.checkpoint else "random weights"
    return student.to(config.device), describe(student, STUDENT, weights, student_flops(student.config))


def build_teacher(config: Config) -> tuple[Teacher, Model]:
    """HeAR, or what stands in for it, on the device."""
    if config.teacher == "random":
        teacher, weights = random_teacher(SEED).to(config.device), "random weights, a stand-in teacher"
    else:
        teacher = load_teacher(config.teacher, device=config.device)
        weights = f"{'stand-in teacher ' if teacher.is_stand_in else ''}{teacher.name} at {teacher.revision:.19}"
    return teacher, describe(teacher, TEACHER, weights, teacher_flops(teacher))


def proc_values(path: str) -> dict[str, str]:
    """The `name: value` lines of a file that Linux makes up, the last of each name; empty on another system."""
    if platform.system() != "Linux":
        return {}
    lines = (line.partition(":") for line in Path(path).read_text().splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


def describe_machine(config: Config) -> dict[str, Any]:
    """What the times depend on besides the models."""
    cpu = proc_values("/proc/cpuinfo")
    flags = cpu.get("flags", "").split()
    return {
        "cpu": cpu.get("model name", platform.machine()),
        "instruction_sets": {name: name in flags for name in INSTRUCTION_SETS} if flags else None,
        "gpu": torch.cuda.get_device_name() if config.device == "cuda" else None,
        "torch": torch.__version__,
        "precision": "float32, eager",
    }


def peak_mib(device: str) -> float | None:
    """Most memory held so far: on a GPU what torch allocated there, else what was resident of this process, if known.

    Linux alone keeps this for a program by itself: what getrusage reports begins at the peak of the parent process.
    """
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / MIB
    peak = proc_values("/proc/self/status").get("VmHWM")
    return None if peak is None else float(peak.removesuffix("kB")) / 1024


def print_header(models: Sequence[Model], machine: Mapping[str, Any]) -> None:
    """What is compared, and where."""
    for model in models:
        print(
            f"{model.name:8} {model.parameters / 1e6:7.2f} M parameters {model.weights_mib:7.1f} MiB as float32 "
            f"{model.flops_per_clip / 1e9:6.2f} GFLOP per clip   {model.weights}"
        )
    student, teacher = models
    size, work = teacher.parameters / student.parameters, teacher.flops_per_clip / student.flops_per_clip
    print(f"{'ratio':8} {size:7.2f} {'':34} {work:6.2f}")
    sets = machine["instruction_sets"]
    found = ", ".join(name if has else f"no {name}" for name, has in sets.items()) if sets else "flags not known"
    place = f"{machine['gpu']}, {machine['cpu']}" if machine["gpu"] else f"{machine['cpu']} ({found})"
    print(f"{'machine':8} {place}; torch {machine['torch']}, {machine['precision']}")
    print(f"\n{COLUMNS}{STATISTICS}   (ms per batch; one clip is {CLIP_S:g} s)")


def print_cell(cell: Cell) -> None:
    """One line per thing timed, and the speed-ups."""
    start = f"{cell.threads:7} {cell.batch:5} {len(cell.seconds[STUDENT]):6}"
    for name, seconds in cell.rows().items():
        ms = [1000 * value for value in spread(seconds)]
        ms_per_clip = ms[0] / cell.batch
        clips_per_s = 1000 / ms_per_clip
        print(
            f"{start:20}  {name:27}{ms[0]:9.2f} {ms[1]:9.2f} {ms[2]:9.2f} "
            f"{ms_per_clip:9.2f} {clips_per_s:8.1f} {CLIP_S * clips_per_s:11.1f}"
        )
        start = ""
    for kind, ratio in cell.speedups().items():
        name = f"{TEACHER} / {STUDENT}" + (", end to end" if kind == "end_to_end" else "")
        print(f"{'':22}{name:27}{ratio.median:7.2f} x {ratio.p10:7.2f} x {ratio.p90:7.2f} x")


def print_peaks(peaks: Mapping[str, float | None], device: str) -> None:
    """The most memory held at two moments: before HeAR was loaded, and at the end."""
    kind = "memory that torch allocated on the GPU" if device == "cuda" else "resident memory of this process"
    sizes = (f"{'not known' if mib is None else f'{mib:.0f} MiB'} with {what}" for what, mib in peaks.items())
    print(f"\npeak {kind}: {', '.join(sizes)} loaded and run")


def chart_title(models: Sequence[Model], machine: Mapping[str, Any]) -> str:
    """Two lines: what was timed, and where."""
    timed = "; ".join(f"{model.name} {model.parameters / 1e6:.0f} M, {model.weights}" for model in models)
    return f"{timed}\n{machine['gpu'] or machine['cpu']}, {machine['precision']}, torch {machine['torch']}"


def headline(cells: Sequence[Cell], models: Sequence[Model], device: str) -> dict[str, Any]:
    """The last line of stdout: speed-ups at the first number of threads, times of the first cell."""
    first = cells[0]
    ms = {name: 1000 * spread(seconds).median for name, seconds in first.rows().items()}
    values: dict[str, Any] = {}
    for cell in cells:
        if cell.threads == first.threads:
            speedups = cell.speedups()
            values[f"speedup_fp32_batch{cell.batch}"] = speedups["model"].median
            values[f"speedup_end_to_end_batch{cell.batch}"] = speedups["end_to_end"].median
    values |= {"student_ms": ms[STUDENT], "teacher_ms": ms[TEACHER], "front_end_ms": ms["front end"]}
    values = {name: round(value, 4) for name, value in values.items()}
    student, teacher = models
    values |= {"batch": first.batch, "threads": first.threads, "rounds": len(first.seconds[STUDENT])}
    return values | {"student": student.weights, "teacher": teacher.weights, "device": device}


def plot(cells: Sequence[Cell], title: str, path: Path) -> None:
    """Bars of the median ms per clip, front end first and then the model; a line from p10 to p90 of both together."""
    from matplotlib.figure import Figure  # half a second that a run without --out need not wait

    colours = {STUDENT: "#0b7a75", TEACHER: "#8d99ae"}
    figure = Figure(figsize=(9, 1.4 + 1.1 * len(cells)), layout="constrained")
    axes = figure.add_subplot()
    longest = 0.0
    for i, cell in enumerate(cells):
        rows = cell.rows()
        for name, y in ((STUDENT, i - 0.2), (TEACHER, i + 0.2)):
            whole = Spread(*(1000 * value / cell.batch for value in spread(rows[f"{name}, end to end"])))
            ahead = 1000 * spread([times[0] for times in cell.seconds[name]]).median / cell.batch
            is_first = i == 0
            axes.barh(y, ahead, 0.36, color="#e9a03b", label="front end" if is_first and name == STUDENT else None)
            axes.barh(y, whole.median - ahead, 0.36, left=ahead, color=colours[name], label=name if is_first else None)
            axes.plot([whole.p10, whole.p90], [y, y], color="black", linewidth=1.2)
            faster = f"   {cell.speedups()['end_to_end'].median:.1f} x faster" if name == STUDENT else ""
            axes.annotate(
                f"{whole.median:.1f} ms{faster}", (whole.p90, y), (5, 0), textcoords="offset points", va="center"
            )
            longest = max(longest, whole.p90)
    axes.set_yticks(range(len(cells)), [f"batch {cell.batch}\n{cell.threads} threads" for cell in cells])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * longest)
    axes.set_xlabel(f"ms per clip of {CLIP_S:g} s, end to end (median; line: p10 to p90)")
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    with atomic_write(path) as f:
        figure.savefig(f, format="png", dpi=150)


def main(config: Config) -> None:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda, but torch finds no GPU here; use --device cpu, or a build of torch for your GPU"
        )
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # convolutions alone default to TF32, which is not float32
    wait = torch.cuda.synchronize if config.device == "cuda" else (lambda: None)
    sound = pink_noise(max(config.batch_sizes), SEED).to(config.device)
    front_end = MelPcen().to(config.device)

    student, student_model = build_student(config)
    with torch.inference_mode():
        student(front_end(sound))
    peaks = {STUDENT: peak_mib(config.device)}
    teacher, teacher_model = build_teacher(config)
    models, machine = (student_model, teacher_model), describe_machine(config)
    print_header(models, machine)

    pipelines, cells = {STUDENT: (front_end, student), TEACHER: (front_end, teacher)}, []
    for threads in config.threads if config.device == "cpu" else config.threads[:1]:
        torch.set_num_threads(threads)
        for batch in config.batch_sizes:
            with torch.inference_mode():
                rounds = time_in_turn(pipelines, sound[:batch], wait, config.repeats, config.limit_s)
            cells.append(Cell(threads=threads, batch=batch, seconds=rounds))
            print_cell(cells[-1])
    peaks[f"{STUDENT} and {TEACHER}"] = peak_mib(config.device)
    print_peaks(peaks, config.device)

    summary = headline(cells, models, config.device)
    if config.out:
        record = {**summary, "config": asdict(config), "machine": machine, "peak_mib": peaks}
        record |= {"models": [asdict(model) for model in models], "cells": [asdict(cell) for cell in cells]}
        write_json(config.out / "speed.json", record)
        plot(cells, chart_title(models, machine), config.out / "speed.png")
        print(f"wrote {config.out}/speed.json and {config.out}/speed.png")
    print(json.dumps(summary))


if __name__ == "__main__":
    cli.run(main, PRESETS, __doc__)
