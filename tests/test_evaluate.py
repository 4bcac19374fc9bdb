"""The evaluator: as a command on tiny tables and look-alikes of real datasets."""

import io
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import lookalikes
import numpy as np
import pyarrow
import pytest
import soundfile
import torch
from pyarrow import parquet

import evaluate_distilled_hear as evaluate
from hear_distill import checkpoint, cli, ensemble, measure, splits
from hear_distill.files import UserError
from hear_distill.probes import Family, logistic_path
from hear_distill.student import Student, StudentConfig
from hear_distill.tasks import COPY
from hear_distill.teacher import TeacherError, save_stand_in

SCRIPT = Path(evaluate.__file__)
TIMEOUT_S = 250


def flac(seconds: float, hz: float, seed: int) -> bytes:
    """A tone in noise."""
    rng = np.random.default_rng(seed)
    time_s = np.arange(round(16_000 * seconds)) / 16_000
    buffer = io.BytesIO()
    soundfile.write(buffer, 0.1 * np.sin(hz * time_s) + rng.normal(0, 0.03, len(time_s)), 16_000, format="FLAC")
    return buffer.getvalue()


def write_tiny_table(path: Path) -> None:
    """20 rows in 11 groups and 2 folds: two labels, one in a single group, a row that is no audio, and a copy."""
    rows = [(f"tone {1 + i % 2}", i // 2, flac(1 + i / 8, 900 + 1500 * (i % 2), seed=i)) for i in range(16)]
    rows += [("rare", 8, flac(2, 5000, seed=16)), ("rare", 8, flac(2, 5000, seed=17)), ("tone 1", 9, b"no audio")]
    rows += [("tone 1", 10, rows[0][2])]
    columns = {
        "audio": [{"bytes": data, "path": None} for _, _, data in rows],
        "label": [label for label, _, _ in rows],
        "group": [group for _, group, _ in rows],
        "fold": [group % 2 for _, group, _ in rows],
    }
    parquet.write_table(pyarrow.table(columns), path)


def save_student(folder: Path, seed: int) -> None:
    config = StudentConfig(width=24, blocks=1, heads=3, mlp_width=48)
    torch.manual_seed(seed)
    checkpoint.save(folder, {"student_config": asdict(config), "student": Student(config).state_dict()})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A table, two students and a stand-in teacher, all tiny and untrained."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_tiny_table(folder / "tiny.parquet")
    save_student(folder, seed=1)
    save_student(folder, seed=0)  # the first is previous.pt now
    save_stand_in(folder / "teacher", seed=0)
    return folder


@pytest.fixture(scope="module")
def finished(folder) -> subprocess.CompletedProcess[str]:
    flags = "--checkpoint latest.pt --teacher teacher --dataset table=tiny.parquet --dataset table=absent.parquet "
    flags += "--baseline logmel --baseline=mfcc --protocol squeeze --protocol event --out out --cache cache"
    flags += " --device cpu --batch-size 7 --workers 1"
    return subprocess.run(
        [sys.executable, SCRIPT, *flags.split()],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )


@pytest.fixture(scope="module")
def results(folder, finished) -> dict:
    assert finished.returncode == 1, finished.stderr
    return json.loads((folder / "out" / "results.json").read_text())


def test_the_command_writes_its_files_and_prints_one_screen(folder, finished, results):
    names = {path.name for path in (folder / "out").iterdir()}
    pictures = {"student_vs_teacher.png", "precision_recall.png", "protocols.png"}
    assert names == {"results.json", "table.md", *pictures}
    assert all((folder / "out" / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    screen = finished.stdout.split("\n\n", 1)[1].splitlines()
    assert len(screen) <= 24 and screen[-1].startswith("the student keeps ")
    assert any(line.startswith("| tiny.parquet: mAP, 2 tasks") for line in screen)


def test_every_embedder_is_a_column_under_every_protocol(folder, results):
    assert list(results["protocols"]) == ["squeeze", "event"]
    for section in results["protocols"].values():
        [dataset] = section["datasets"]
        [rare, *tones] = dataset["tasks"]
        assert all(entry["models"].keys() == {"student", "teacher", "logmel", "mfcc"} for entry in tones)
        assert "groups that hold this label: 1" in rare["problem"] and "models" not in rare
        for model, found in section["mean"]["models"].items():
            values = [entry["models"][model]["metrics"]["ap"]["value"] for entry in tones]
            assert found["metrics"]["ap"]["value"] == pytest.approx(np.mean(values))
        of = section["mean"]["models"]
        share = 100 * of["student"]["metrics"]["ap"]["value"] / of["teacher"]["metrics"]["ap"]["value"]
        assert of["student"]["retained_percent"]["value"] == pytest.approx(share)
    one, other = (section["datasets"][0]["tasks"] for section in results["protocols"].values())
    assert all(one[1]["models"][model] != other[1]["models"][model] for model in one[1]["models"])
    text = (folder / "out" / "table.md").read_text()
    assert "## Protocols side by side" in text and "student, squeeze" in text and "stand-in teacher, event" in text


def test_results_json_names_what_was_compared(results):
    models = results["models"]
    assert {name: facts["role"] for name, facts in models.items()} == {
        "student": "student",
        "teacher": "teacher",
        "logmel": "baseline",
        "mfcc": "baseline",
    }
    assert models["teacher"]["is_stand_in"] and models["student"]["spec"] == "latest.pt:trunk"
    assert '"weights"' in models["student"]["fingerprint"] and "sha256:" in models["teacher"]["fingerprint"]
    assert results["config"]["seed"] == 0 and results["config"]["dataset"][0] == "table=tiny.parquet"
    assert results["data"][0]["revision"].startswith("files:") and results["data"][0]["rows"] == 20
    assert results["protocols"]["event"]["text"].startswith("tiny.parquet: one window of 2 s around the loudest")


def test_bad_input_is_named_and_counted_and_the_rest_is_measured(folder, results):
    unread, missing = f"2 of 20 rows are left out (undecodable: 1, {COPY}: 1), such as 18, 19", "no file absent.parquet"
    problems = results["problems"]
    assert len(problems) == 3
    assert missing in problems[0] and unread in problems[1]
    assert problems[2].startswith("tiny.parquet, rare: not measurable with the probe logistic: groups that hold this")
    text = (folder / "out" / "table.md").read_text().split("## Problems")[1]
    assert all(f"- {problem}\n" in text for problem in problems)


def test_nobody_can_take_the_stand_in_for_hear(folder, finished, results):
    text = (folder / "out" / "table.md").read_text()
    for shown in (text, finished.stdout.split("\n\n", 1)[1]):
        assert "stand-in teacher" in shown
        assert "teacher" not in shown.replace("stand-in teacher", "").replace("teacher's, draw by draw", "")


def config_of(folder: Path, **changes: object) -> evaluate.Config:
    """One protocol of one table, without a teacher, from the cache of the command if it holds it."""
    given = {"checkpoint": (str(folder / "latest.pt"),), "teacher": "none", "device": "cpu", "workers": 1}
    given |= {"dataset": (f"table={folder / 'tiny.parquet'}",), "protocol": ("event",), "out": folder / "again"}
    return evaluate.Config(**(given | {"cache": folder / "cache"} | changes))


def test_a_second_run_embeds_nothing_and_says_the_same(folder, results, capsys):
    assert evaluate.main(config_of(folder, teacher=str(folder / "teacher"))) == 1

    assert "embedding" not in capsys.readouterr().out
    again = json.loads((folder / "again" / "results.json").read_text())
    first = results["protocols"]["event"]["datasets"][0]["tasks"]
    for entry, other in zip(again["protocols"]["event"]["datasets"][0]["tasks"], first, strict=True):
        for model, found in entry.get("models", {}).items():
            assert found == other["models"][model]
    assert again["problems"] == results["problems"][1:]  # why rows were not read is found again


def test_another_protocol_or_other_weights_are_not_taken_from_the_cache(folder, results, capsys):
    evaluate.main(config_of(folder, checkpoint=(str(folder / "previous.pt"),)))
    assert "event-peak: student\n" in capsys.readouterr().out
    evaluate.main(config_of(folder, output="projection"))
    assert "event-peak: student\n" in capsys.readouterr().out


def test_all_checkpoints_of_a_run_are_scored_and_the_best_is_copied(folder, tmp_path, capsys):
    (tmp_path / "best.pt").write_bytes((folder / "latest.pt").read_bytes())
    (tmp_path / "old.pt").write_bytes((folder / "previous.pt").read_bytes())
    (tmp_path / "same.pt").write_bytes((folder / "latest.pt").read_bytes())
    out = tmp_path / "out"

    assert evaluate.main(config_of(folder, checkpoint=(), every_checkpoint=tmp_path, out=out)) == 1

    assert "same has the weights of another checkpoint" in capsys.readouterr().out
    found = json.loads((out / "results.json").read_text())
    models = found["protocols"]["event"]["mean"]["models"]
    assert models.keys() == {"best", "old"}
    best = max(models, key=lambda name: models[name]["metrics"]["ap"]["value"])
    assert models["best"]["metrics"]["ap"] != models["old"]["metrics"]["ap"]
    assert (out / "best.pt").read_bytes() == (tmp_path / f"{best}.pt").read_bytes()
    assert "chosen on these recordings" in found["method"][0]


def test_the_paper_protocol_is_the_event_window_under_the_probe_of_the_authors(folder, monkeypatch):
    asked = []

    def recorded(tasks, rows, embeddings, probe, seed, workers):
        asked.append((probe, embeddings["student"]))
        return measure.measure(tasks, rows, embeddings, "logistic", seed, workers)

    monkeypatch.setattr(evaluate, "measure", recorded)
    evaluate.main(config_of(folder, protocol=("event", "paper"), probe="knn"))
    assert [probe for probe, _ in asked] == ["knn", "paper"]
    np.testing.assert_array_equal(asked[0][1], asked[1][1])


def test_a_teacher_that_is_not_to_be_had_is_one_line_unless_it_was_asked_for(folder, monkeypatch, capsys):
    load = evaluate.load_embedder

    def unreachable(spec: str, device: str) -> object:
        if spec in (evaluate.HEAR, "some/teacher"):
            raise TeacherError("the hub cannot be reached\n  do something about it")
        return load(spec, device)

    monkeypatch.setattr(evaluate, "load_embedder", unreachable)
    assert evaluate.main(config_of(folder, teacher="auto")) == 1
    printed = capsys.readouterr().out
    assert "the teacher is not measured: the hub cannot be reached\n" in printed
    assert "what it keeps of a teacher was not measured" in printed
    with pytest.raises(TeacherError):
        evaluate.main(config_of(folder, teacher="some/teacher"))


def test_look_alikes_of_real_datasets_go_through_side_by_side(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(ensemble.FAMILIES, "logistic", Family(logistic_path, (0.1,)))  # the search is tested elsewhere
    monkeypatch.setattr(splits, "SEEDS", 2)
    monkeypatch.setattr(measure, "SEEDS", 2)
    icbhi, circor = lookalikes.write_icbhi(tmp_path / "icbhi"), lookalikes.write_circor(tmp_path / "circor")
    specs = (f"icbhi={icbhi}", f"circor={circor}")
    evaluate.main(config_of(folder, dataset=specs, out=tmp_path, cache=tmp_path / "cache"))

    found = json.loads((tmp_path / "results.json").read_text())
    [grouped, official, heart] = found["protocols"]["event"]["datasets"]
    assert [d["label"] for d in (grouped, official, heart)] == ["icbhi", "icbhi, official", "circor"]
    assert grouped["split"].startswith("5 folds of our own over patients") and "test part" in official["split"]
    assert found["protocols"]["event"]["mean"]["tasks"] == ["circor/murmur"]
    assert found["data"][1]["preprocessing"].startswith("band-pass 25 to 400 Hz")
    text = (tmp_path / "table.md").read_text()
    assert "0.888 (0.058)" in text and "0.582 (0.017)" in text  # published, for COPD and murmur
    assert any("Pneumonia is left out" in problem for problem in found["problems"])
    assert (tmp_path / "confusion.png").is_file()


def test_rows_that_tell_no_recording_are_not_said_to_be_on_one_side_of_a_split(tmp_path):
    sounds = [lookalikes.sound(i) for i in range(4)]
    columns = {"audio": lookalikes.audio_column(sounds, [f"{i}.wav" for i in range(4)])}
    path = lookalikes.write_parquet(tmp_path / "f.parquet", columns | {"label": ["cough", "etc"] * 2})
    notes = evaluate.data_in_words(evaluate.load_dataset(f"flusense={path}"))["notes"]
    assert "rows of one may lie on both sides" in notes[0] and "each on one side" not in "".join(notes)
    assert any("ungrouped: leakage possible; 4 rows" in note for note in notes)


@pytest.mark.parametrize(
    ("checkpoints", "names"),
    [
        (["a/latest.pt"], ["student"]),
        (["mine=a/latest.pt"], ["mine"]),
        (["a/one.pt", "b/two.pt"], ["one", "two"]),
        (["a/one.pt", "b/one.pt"], ["a/one.pt", "b/one.pt"]),
        (["old=a/one.pt", "b/one.pt"], ["old", "b/one.pt"]),
        (["a/k=3.pt"], ["student"]),
        ([], ["student"]),
    ],
)
def test_students_are_named_so_that_no_two_columns_have_one_name(checkpoints, names):
    assert list(evaluate.student_files(evaluate.Config(checkpoint=tuple(checkpoints)))) == names


def test_a_column_that_would_be_called_like_another_is_refused():
    with pytest.raises(UserError, match="two columns would be called teacher; name them"):
        evaluate.student_files(evaluate.Config(checkpoint=("teacher=a.pt", "b.pt")))


def test_a_run_folder_stands_for_its_best_checkpoint_or_its_newest(folder, tmp_path):
    assert evaluate.in_run(str(folder)) == str(folder / "latest.pt")
    (tmp_path / "best.pt").touch()
    assert evaluate.in_run(str(tmp_path)) == str(tmp_path / "best.pt")
    assert evaluate.in_run("google/hear-pytorch") == "google/hear-pytorch"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--no-such-flag", "1"], "no-such-flag"),
        (["--batch-size", "0"], "--batch-size and --workers must be at least 1"),
        (["evaluate"], "unknown word 'evaluate'"),
        (["--protocol", "clip"], "clip"),
        (["--device", "cpu"], "python datalake/run_lake.py demo"),
        (["--device", "cpu", "--checkpoint", "LATEST", "--dataset", "table=no.parquet"], "no file no.parquet"),
        (["--device", "cpu", "--checkpoint", "LATEST", "--dataset", "esc"], "no dataset 'esc'; expected one of fsd50k"),
        (["--device", "cpu", "--every-checkpoint", "empty"], "no checkpoint (*.pt) in empty"),
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


def test_a_table_of_which_most_is_unreadable_leaves_nothing_to_measure(folder, tmp_path):
    audio = [{"bytes": b"%d" % i, "path": None} for i in range(3)] + [{"bytes": flac(2, 700, seed=0), "path": None}]
    parquet.write_table(pyarrow.table({"audio": audio, "label": list("abab"), "group": list("1234")}), tmp_path / "t")
    config = config_of(folder, dataset=(f"table={tmp_path / 't'}",), out=tmp_path / "out", cache=tmp_path)
    with pytest.raises(UserError, match=r"t: 3 of 4 rows are unreadable \(undecodable: 3\); expected WAV"):
        evaluate.main(config)
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_refused_before_anything_is_embedded(folder, tmp_path):
    path = tmp_path / "latest.pt"
    path.write_bytes((folder / "latest.pt").read_bytes()[:-100])
    config = replace(config_of(folder), checkpoint=(str(path),), out=tmp_path, cache=tmp_path / "cache")
    with pytest.raises(UserError, match=r"latest.pt is refused"):
        evaluate.main(config)
    assert list(tmp_path.iterdir()) == [path]
