"""The benchmark: what it counts is right, what it times is timed in turn, and its last line is for programs."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from lake_tools import ROOT
from torch.utils.flop_counter import FlopCounterMode

from hear_distill import checkpoint
from hear_distill.student import SIZES, Student, StudentConfig
from hear_distill.teacher import Teacher, load_teacher, save_stand_in

SCRIPT = ROOT / "benchmark_student_vs_hear.py"
TINY = {"width": 64, "blocks": 2, "heads": 2, "mlp_width": 128}


def load_stage():
    spec = importlib.util.spec_from_file_location("benchmark_student_vs_hear", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


benchmark = load_stage()


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory) -> Teacher:
    folder = tmp_path_factory.mktemp("teacher")
    save_stand_in(folder, seed=3)
    return load_teacher(folder)


def run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPT, *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=100)


def test_the_last_line_is_json_that_agrees_with_the_file_of_every_round(tmp_path, stand_in):
    torch.manual_seed(0)
    student = Student(StudentConfig(**TINY))
    checkpoint.save(tmp_path / "run", {"student_config": {**vars(student.config)}, "student": student.state_dict()})
    answer = run(
        *("--checkpoint", tmp_path / "run" / "latest.pt", "--teacher", stand_in.name, "--batch-sizes", 2, 3),
        *("--threads", 1, "--repeats", 4, "--out", tmp_path / "speed"),
    )
    assert answer.returncode == 0, answer.stderr
    last = json.loads(answer.stdout.splitlines()[-1])
    record = json.loads((tmp_path / "speed" / "speed.json").read_text())
    for cell in record["cells"]:
        student_s, teacher_s = (np.array(cell["seconds"][name]) for name in ("student", "teacher"))  # [rounds, 2]
        assert student_s.shape == teacher_s.shape == (4, 2)
        ratios = {
            f"speedup_fp32_batch{cell['batch']}": np.median(teacher_s[:, 1] / student_s[:, 1]),
            f"speedup_end_to_end_batch{cell['batch']}": np.median(teacher_s.sum(1) / student_s.sum(1)),
        }
        for name, ratio in ratios.items():
            assert last[name] == pytest.approx(ratio, abs=1e-4)
    first = np.array(record["cells"][0]["seconds"]["teacher"])
    assert last["teacher_ms"] == pytest.approx(1000 * np.median(first[:, 1]), abs=1e-4)
    assert (last["batch"], last["threads"], last["device"]) == (2, 1, "cpu")
    assert "stand-in teacher" in last["teacher"] and "stand-in teacher" in answer.stdout.splitlines()[1]
    assert (tmp_path / "speed" / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_the_models_run_in_turn_and_each_stage_gets_what_the_one_before_it_made():
    calls = []

    def stage(name):
        return lambda value: calls.append((name, value)) or f"{value}>{name}"

    pipelines = {"a": [stage("a1"), stage("a2")], "b": [stage("b1"), stage("b2")]}
    rounds = benchmark.time_in_turn(pipelines, "sound", lambda: None, repeats=2, limit_s=100)
    one_round = [("a1", "sound"), ("a2", "sound>a1"), ("b1", "sound"), ("b2", "sound>b1")]
    assert calls == one_round * 3  # one of them to warm up
    assert {name: [len(times) for times in rounds[name]] for name in rounds} == {"a": [2, 2], "b": [2, 2]}


def test_a_slow_cell_ends_early_but_not_before_the_third_round():
    rounds = benchmark.time_in_turn({"a": [lambda value: value]}, 0, lambda: None, repeats=50, limit_s=0)
    assert len(rounds["a"]) == 3


def test_median_and_tenths_agree_with_numpy():
    values = list(np.random.default_rng(1).gamma(2, size=17))
    assert list(benchmark.spread(values)) == pytest.approx(np.percentile(values, [50, 10, 90]))


@pytest.mark.parametrize(
    "config", [SIZES["small"], StudentConfig(**TINY, canon="bd", canon_kernel=5), StudentConfig(**TINY, canon_dims=1)]
)
def test_the_flops_of_the_student_are_those_that_torch_counts(config):
    with torch.device("meta"):
        student, spectrogram = Student(config).eval(), torch.empty(1, 1, 192, 128)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        student(spectrogram)
    assert benchmark.student_flops(config) == pytest.approx(counter.get_total_flops(), rel=0.001)


def test_the_flops_of_the_teacher_are_those_that_torch_counts(stand_in):
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        stand_in(torch.rand(1, 1, 192, 128))
    assert benchmark.teacher_flops(stand_in) == pytest.approx(counter.get_total_flops(), rel=0.001)


def test_the_sound_is_pink_different_in_each_row_and_the_same_every_time():
    sound = benchmark.pink_noise(3, seed=5)
    power = torch.fft.rfft(sound.double()).abs().square()  # [3, 16001]
    low, high = power[:, 100:200].mean(1), power[:, 10_000:10_100].mean(1)
    assert ((low / high) > 30).all()  # 1 / f: a hundred times lower, a hundred times stronger, but for chance
    assert sound.abs().amax(1).tolist() == [1, 1, 1]
    assert not torch.equal(sound[0], sound[1])
    assert torch.equal(sound, benchmark.pink_noise(3, seed=5))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--repeats", "1"], "--repeats must be at least 2"),
        (["--batch-sizes", "0"], "at least 1"),
        (["--size", "huge"], "invalid choice 'huge'"),
        (["--checkpoint", "nowhere.pt"], "no checkpoint at nowhere.pt"),
        pytest.param(
            ["--device", "cuda"],
            "torch finds no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="GPU"),
        ),
    ],
)
def test_a_mistake_is_answered_with_one_line_and_exit_2(arguments, words):
    answer = run(*arguments)
    assert answer.returncode == 2
    assert answer.stdout == "" and answer.stderr.startswith("error: ") and answer.stderr.count("\n") == 1
    assert words in answer.stderr
