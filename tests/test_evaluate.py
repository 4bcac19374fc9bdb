"""The evaluator: as a command on a tiny table, and its parts on models whose embedding is known."""

import hashlib
import io
import json
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import soundfile
import torch
from pyarrow import parquet
from torch import nn

import evaluate_distilled_hear as evaluate
from hear_distill import checkpoint, cli, probes
from hear_distill.files import UserError
from hear_distill.frontend import MelPcen
from hear_distill.student import Student, StudentConfig
from hear_distill.tasks import Table
from hear_distill.teacher import save_stand_in

SCRIPT = Path(evaluate.__file__)


def flac(seconds: float, hz: float, seed: int) -> bytes:
    """A tone in noise."""
    rng = np.random.default_rng(seed)
    time_s = np.arange(round(16_000 * seconds)) / 16_000
    buffer = io.BytesIO()
    soundfile.write(buffer, 0.1 * np.sin(hz * time_s) + rng.normal(0, 0.03, len(time_s)), 16_000, format="FLAC")
    return buffer.getvalue()


def write_tiny_table(path: Path) -> None:
    """19 rows in 10 groups and 2 folds: two labels, one with a single group, and a row that is no audio."""
    rows = [(f"tone {1 + i % 2}", i // 2, flac(1 + i / 8, 900 + 1500 * (i % 2), seed=i)) for i in range(16)]
    rows += [("rare", 8, flac(2, 5000, seed=16)), ("rare", 8, flac(2, 5000, seed=17)), ("tone 1", 9, b"no audio")]
    columns = {
        "audio": [{"bytes": data, "path": None} for _, _, data in rows],
        "label": [label for label, _, _ in rows],
        "group": [group for _, group, _ in rows],
        "fold": [group % 2 for _, group, _ in rows],
    }
    parquet.write_table(pyarrow.table(columns), path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A table, a student and a stand-in teacher, all tiny and untrained."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_tiny_table(folder / "tiny.parquet")
    config = StudentConfig(width=24, blocks=1, heads=3, mlp_width=48)
    torch.manual_seed(0)
    checkpoint.save(folder, {"student_config": asdict(config), "student": Student(config).state_dict()})
    save_stand_in(folder / "teacher", seed=0)
    return folder


@pytest.fixture(scope="module")
def finished(folder) -> subprocess.CompletedProcess[str]:
    flags = "--checkpoint latest.pt --teacher teacher --table tiny.parquet --out out --device cpu --batch-size 7"
    return subprocess.run(
        [sys.executable, SCRIPT, *flags.split()], cwd=folder, capture_output=True, text=True, check=False
    )


def test_the_command_writes_its_three_files_and_says_by_its_exit_code_that_a_label_is_too_rare(folder, finished):
    assert finished.returncode == 1, finished.stderr
    assert sorted(path.name for path in (folder / "out").iterdir()) == [
        "results.json",
        "student_vs_teacher.png",
        "table.md",
    ]
    assert (folder / "out" / "table.md").read_text() in finished.stdout
    assert (folder / "out" / "student_vs_teacher.png").read_bytes().startswith(b"\x89PNG")


def test_results_json_names_what_was_compared_and_holds_every_number(folder, finished):
    results = json.loads((folder / "out" / "results.json").read_text())

    assert results["student"]["sha256"] == hashlib.sha256((folder / "latest.pt").read_bytes()).hexdigest()
    assert results["table"]["sha256"] == hashlib.sha256((folder / "tiny.parquet").read_bytes()).hexdigest()
    weights = hashlib.sha256((folder / "teacher" / "model.safetensors").read_bytes()).hexdigest()
    assert results["teacher"] == {"name": "teacher", "revision": f"sha256:{weights}", "is_stand_in": True}
    assert results["config"]["seed"] == 0 and results["config"]["table"] == "tiny.parquet"
    assert (results["table"]["rows"], results["table"]["unreadable"]) == (19, {"undecodable": 1})

    tasks = {task["task"]: task for task in results["tasks"]}
    assert {name: (task["positives"], task["groups"]) for name, task in tasks.items()} == {
        "rare": (2, 1),
        "tone 1": (8, 8),
        "tone 2": (8, 8),
    }
    assert "groups that hold this label: 1" in tasks["rare"]["problem"] and tasks["rare"]["ap"] == {}
    for model in ("student", "teacher"):
        values = [tasks[name]["ap"][model]["value"] for name in ("tone 1", "tone 2")]
        assert results["mean"]["ap"][model]["value"] == pytest.approx(np.mean(values))
    ap, retained = results["mean"]["ap"], results["mean"]["retained_percent"]
    assert retained["value"] == pytest.approx(100 * ap["student"]["value"] / ap["teacher"]["value"])
    assert retained["low"] <= retained["high"]


def test_nobody_can_take_the_stand_in_for_hear(folder, finished):
    text = (folder / "out" / "table.md").read_text()
    heading, _, header, *_ = text.splitlines()
    assert "stand-in teacher" in heading and "stand-in teacher AP" in header
    assert "] of the stand-in teacher's mAP (" in text.splitlines()[-1]


def test_a_row_that_cannot_be_measured_or_read_is_named_in_the_report(folder, finished):
    text = (folder / "out" / "table.md").read_text()
    assert "Not measurable: rare, groups that hold this label: 1, at least 2 needed." in text
    assert "Left out of 19 rows: undecodable: 1." in text


class MeanAndSpread(nn.Module):
    """Two numbers per window, neither of them linear in the sound."""

    def forward(self, spectrogram: torch.Tensor) -> torch.Tensor:
        """[B, 1, 192, 128] -> [B, 2]"""
        return torch.stack([spectrogram.mean(dim=(1, 2, 3)), spectrogram.std(dim=(1, 2, 3))], dim=1)


def table_of(audio: list[bytes]) -> Table:
    names = np.array([str(row) for row in range(len(audio))])
    return Table(name="t", audio=audio, labels=names, groups=names, folds=None)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_an_embedding_is_the_mean_of_the_windows_of_its_own_row_and_broken_rows_are_counted(batch_size):
    seconds = [2.0, 4.5, 0.3, 3.0]
    sounds = [flac(length, 700 * (1 + i), seed=i) for i, length in enumerate(seconds)]
    expected = []
    for data in sounds:
        samples = torch.tensor(soundfile.read(io.BytesIO(data), dtype="float32")[0])
        last = max(0, len(samples) - 32_000)
        cut = [samples[start : start + 32_000] for start in sorted({*range(0, last, 16_000), last})]
        spectrograms = torch.cat([MelPcen()(window[None]) for window in cut])
        expected.append(MeanAndSpread()(spectrograms).mean(dim=0).numpy())

    table = table_of([sounds[0], b"", sounds[1], b"broken" * 99, sounds[2], sounds[3]])
    config = evaluate.Config(device="cpu", batch_size=batch_size)
    embeddings, is_read, unreadable = evaluate.embed(table, {"student": MeanAndSpread()}, config)

    assert is_read.tolist() == [True, False, True, False, True, True]
    assert unreadable == Counter({"undecodable": 2})
    np.testing.assert_allclose(embeddings["student"], expected, rtol=1e-4)


def test_a_table_that_is_mostly_unreadable_stops_the_evaluation():
    table = table_of([flac(2, 700, seed=0), b"", b"1", b"2"])
    with pytest.raises(UserError, match=r"3 of 4 rows of t are unreadable \(undecodable: 3\); expected WAV"):
        evaluate.embed(table, {"student": MeanAndSpread()}, evaluate.Config(device="cpu"))


def test_a_model_that_gives_nan_stops_the_evaluation():
    broken = nn.Sequential(MeanAndSpread(), nn.Linear(2, 2))
    nn.init.constant_(broken[1].weight, float("nan"))
    with pytest.raises(UserError, match="embeddings of the student are not finite"):
        evaluate.embed(table_of([flac(2, 700, seed=0)]), {"student": broken}, evaluate.Config(device="cpu"))


@pytest.fixture
def one_penalty(monkeypatch) -> None:
    """Choosing among six is tested elsewhere and takes seconds."""
    monkeypatch.setattr(probes, "PENALTIES", (0.1,))


def measured(embeddings: dict[str, np.ndarray]) -> dict:
    """Results on 60 rows, two labels, 30 groups; the first feature of an embedding should tell the labels apart."""
    groups = np.arange(60) // 2
    labels = np.where(np.arange(60) % 3 == 0, "cough", "sneeze")
    table = Table(name="t", audio=[], labels=labels, groups=groups.astype(str), folds=(groups % 3).astype(str))
    results = evaluate.measure(table, np.ones(60, dtype=bool), embeddings, seed=0)
    return {"student": {}, "teacher": {"is_stand_in": False} if "teacher" in embeddings else None, **results}


def features(noise: float) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.normal(0, noise, (60, 3)) + np.where(np.arange(60) % 3 == 0, 1, 0)[:, None] * [1, 0, 0]


def test_a_student_like_its_teacher_keeps_exactly_all_with_an_interval_of_no_width(one_penalty):
    results = measured({"student": features(1.0), "teacher": features(1.0)})

    for entry in (*results["tasks"], results["mean"]):
        assert entry["retained_percent"] == {"value": 100.0, "low": 100.0, "high": 100.0}
        assert entry["ap"]["student"]["low"] < entry["ap"]["student"]["value"] < entry["ap"]["student"]["high"]


def test_the_interval_of_what_is_kept_is_paired_and_so_narrower_than_of_two_separate_draws(one_penalty):
    results = measured({"student": features(1.0) + [0.1, 0, -0.1] * features(0.5)[::-1], "teacher": features(1.0)})
    kept, ap = results["mean"]["retained_percent"], results["mean"]["ap"]
    relative = [(ap[model]["high"] - ap[model]["low"]) / ap[model]["value"] for model in ("student", "teacher")]

    assert 0 < kept["high"] - kept["low"] < 0.5 * 100 * np.hypot(*relative)


def test_a_worse_student_keeps_less_and_the_closing_line_says_how_much(one_penalty):
    results = measured({"student": features(2.0), "teacher": features(0.4)})
    ap = results["mean"]["ap"]
    student, teacher = ap["student"]["value"], ap["teacher"]["value"]

    assert results["mean"]["retained_percent"]["high"] < 100
    assert evaluate.conclusion(results).startswith(f"the student keeps {100 * student / teacher:.1f} % [")
    assert evaluate.conclusion(results).endswith(f"] of the teacher's mAP ({student:.3f} of {teacher:.3f})")


def test_without_a_teacher_its_columns_say_not_measured(one_penalty):
    results = measured({"student": features(1.0)})
    results["table"] = {"name": "t", "unreadable": {}}
    rows = [line for line in evaluate.as_text(results).splitlines() if line.startswith(("| cough", "| mAP"))]

    assert len(rows) == 2
    for row in rows:
        *_, teacher, student, kept, _ = [text.strip() for text in row.split("|")]
        assert (teacher, kept) == ("not measured", "not measured") and student[0] in "01"


def test_a_table_in_which_nothing_can_be_measured_is_refused():
    table = table_of([b""] * 3)
    with pytest.raises(UserError, match=r"no label can be measured \(0: groups that hold this label: 1,"):
        evaluate.measure(table, np.ones(3, dtype=bool), {"student": np.ones((3, 2))}, seed=0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--no-such-flag", "1"], "no-such-flag"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["evaluate"], "unknown word 'evaluate'"),
        (["--device", "cpu"], "python datalake/run_lake.py demo"),
        (["--device", "cpu", "--checkpoint", "LATEST"], "no table at data/table.parquet"),
    ],
)
def test_a_mistake_is_answered_in_one_line_and_exit_code_2(folder, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    flags = [str(folder / "latest.pt") if flag == "LATEST" else flag for flag in flags]
    monkeypatch.setattr(sys, "argv", ["evaluate_distilled_hear.py", *flags])
    with pytest.raises(SystemExit) as exit_:
        cli.run(evaluate.main, evaluate.PRESETS, evaluate.__doc__)

    printed = capsys.readouterr().err
    assert exit_.value.code == 2
    assert message in printed and printed.startswith("error: ") and printed.count("\n") == 1


def test_a_damaged_checkpoint_is_refused_before_anything_is_embedded(folder, tmp_path):
    path = tmp_path / "latest.pt"
    path.write_bytes((folder / "latest.pt").read_bytes()[:-100])
    config = replace(
        evaluate.Config(), checkpoint=path, table=folder / "tiny.parquet", teacher="none", device="cpu", out=tmp_path
    )
    with pytest.raises(UserError, match=r"latest.pt is refused"):
        evaluate.main(config)
    assert list(tmp_path.iterdir()) == [path]
