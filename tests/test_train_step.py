"""The benchmark of a training step: what it counts is right, parts are the step's, its last line is for programs."""

import importlib.util
import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from lake_tools import ROOT

from hear_distill.objective import Learner
from hear_distill.student import SIZES, Student
from hear_distill.teacher import HEAR_CONFIG, Teacher, ViTConfig, ViTModel, load_teacher

SCRIPT = ROOT / "benchmarks" / "train_step.py"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(SCRIPT.parent)  # where Python looks when it runs the script
        spec = importlib.util.spec_from_file_location("train_step", SCRIPT)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


def vit_flops(width: int, mlp_width: int, blocks: int, tokens: int) -> int:
    """Two per multiply-add of one clip: 96 patches of 256 pixels, then blocks of four square matrices, two of the MLP,
    and the two products of attention."""
    matrices = 4 * width * width + 2 * width * mlp_width
    return 2 * 96 * 256 * width + blocks * (2 * tokens * matrices + 2 * 2 * tokens * tokens * width)


def test_the_flops_of_a_step_are_one_pass_of_the_teacher_and_three_of_the_student(benchmark, teacher):
    frozen = load_teacher(teacher)
    size = benchmark.SMALL
    found = benchmark.flops_per_clip(benchmark.make_learning(size, frozen, CPU, is_plain=True), CPU)
    pooler = 2 * 128 * 512
    assert found["teacher"] == pytest.approx(vit_flops(128, 512, 4, 97) + pooler, rel=0.002)
    canon = 2 * 9 * 96 * (96 + 3 * 96 + 96 + 384) * 4
    heads = 2 * 96 * 512 + 96 * 2 * 96 * 128  # projection, and the patch head on each token
    assert found["student"] == pytest.approx(3 * (vit_flops(96, 384, 4, 96) + canon + heads), rel=0.002)


def test_the_published_sizes_take_about_73_gflop_a_clip(benchmark):
    """By hand in the literature: 59.56 of a ViT-L, 3 x 4.31 of a ViT-S; Canon and heads come on top."""
    with torch.device("meta"):
        vit = Teacher(ViTModel(ViTConfig(**HEAR_CONFIG)), name="", revision="", is_stand_in=True)
        learner = Learner(Student(SIZES["small"]), 1024)
    found = benchmark.flops_per_clip(SimpleNamespace(teacher=vit, learner=learner), torch.device("meta"))
    assert found["teacher"] == pytest.approx(59.56e9, rel=0.003)
    canon, patch_head = 2 * 9 * 96 * (1 + 3 + 1 + 4) * 384 * 12, 2 * 96 * 384 * 1024
    assert found["student"] == pytest.approx(3 * (4.31e9 + canon + patch_head), rel=0.02)


def test_the_time_of_a_part_is_that_of_its_calls_and_the_students_is_without_the_teachers(benchmark):
    watch = benchmark.Stopwatch(CPU)

    def nap(ms):
        return lambda *_: time.sleep(ms / 1000)

    feed = SimpleNamespace(next=nap(2), spectrogram=nap(6))
    learning = SimpleNamespace(objective=SimpleNamespace(targets_of=nap(20)), finish_step=nap(4))
    learning.add = lambda *_: (learning.objective.targets_of(), time.sleep(0.01))
    watch.watch(feed, learning)
    for _ in range(3):
        feed.next(), feed.spectrogram(), learning.add(), learning.finish_step()
    parts = watch.parts()
    least = {"data_wait": 0.006, "frontend": 0.018, "teacher": 0.06, "student": 0.03, "optimiser": 0.012}
    assert list(parts) == list(benchmark.PARTS) and all(parts[name] >= least[name] for name in least)
    assert parts["student"] + parts["teacher"] == watch.seconds["teacher and student"]


def test_the_last_line_is_json_whose_numbers_belong_together():
    command = [sys.executable, SCRIPT, "--chunk", "2", "--steps", "1"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert answer.returncode == 0, answer.stderr
    last = json.loads(answer.stdout.splitlines()[-1])
    shares = [last[f"{name}_share"] for name in ("data_wait", "frontend", "teacher", "student", "optimiser")]
    assert 0.5 < sum(shares) <= 1.001 and min(shares) >= 0 and min(shares[1:]) > 0
    assert last["achieved_tflop_per_s"] == pytest.approx(last["clips_per_s"] * last["gflop_per_clip"] / 1000, abs=2e-4)
    assert last["mfu_of_measured"] > 0 and last["vs_eager_fp32"] > 0
    assert (last["product"], last["batch"], last["device"]) == ("1024^3 float32", 4, "cpu")


@pytest.mark.parametrize(("argument", "words"), [("--chunk=0", "at least 1"), ("--steps=-1", "at least 1")])
def test_a_number_that_means_nothing_is_refused(argument, words):
    answer = subprocess.run(
        [sys.executable, SCRIPT, argument], capture_output=True, text=True, check=False, timeout=100
    )
    assert answer.returncode == 2 and words in answer.stderr
