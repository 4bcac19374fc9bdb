"""The examples, as a reader would run them."""

import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from lake_tools import ROOT
from pyarrow import parquet
from sklearn.metrics import roc_auc_score

from hear_distill import checkpoint
from hear_distill.student import Student, StudentConfig
from hear_distill.synthetic import generator, recording

SMALL = StudentConfig(width=192, blocks=1, heads=3, mlp_width=192, embedding_width=8)
COUGH_S = 14.0


def python(script: str, *arguments: object) -> str:
    """Runs to the end without a complaint; stdout."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def write_sounds(folder: Path, num_per_label: int, seed: int) -> None:
    """Recordings of 2 s, each of a voice of its own, and labels.csv: easy ones, as an untrained student hears them."""
    folder.mkdir()
    lines = ["path,label"]
    for label in ("cough", "noise", "tone"):
        for i in range(num_per_label):
            rng = generator(seed, label, i)
            soundfile.write(folder / f"{label}-{i}.wav", recording(label, 16_000, 2, rng, rng), 16_000)
            lines.append(f"{label}-{i}.wav,{label}")
    (folder / "labels.csv").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> Path:
    """Embeddings of labelled sounds, of other voices, and of a night of half a minute in which one cough is heard."""
    root = tmp_path_factory.mktemp("cough")
    torch.manual_seed(0)
    checkpoint.save(root, {"student_config": asdict(SMALL), "student": Student(SMALL).state_dict()})
    write_sounds(root / "labelled", num_per_label=30, seed=1)
    write_sounds(root / "others", num_per_label=12, seed=2)
    rng = generator(3, "night", 0)
    night, cough = recording("noise", 16_000, 30, rng, rng), recording("cough", 16_000, 2, rng, rng)
    night *= 0.002 / night.std()
    night[round(COUGH_S * 16_000) :][: len(cough)] += 0.05 * cough / cough.std()
    (root / "ward").mkdir()
    soundfile.write(root / "ward" / "night.wav", night, 16_000)
    for folder in ("labelled", "others", "ward"):
        python("embed_audio.py", root / folder, "--model", root / "latest.pt", "--out", root / f"{folder}.parquet")
    return root


@pytest.fixture(scope="module")
def detector(tables) -> Path:
    path = tables / "cough.npz"
    python("examples/cough_detector.py", "fit", tables / "labelled.parquet", tables / "labelled" / "labels.csv", path)
    return path


def test_the_cough_detector_hears_voices_that_it_was_not_fitted_on(tables, detector):
    rows = parquet.read_table(tables / "others.parquet").to_pydict()
    with np.load(detector, allow_pickle=False) as file:
        scores = np.array(rows["embedding"]) @ file["weights"] + file["bias"]
    assert roc_auc_score([path.startswith("cough") for path in rows["path"]], scores) > 0.95


def test_the_cough_detector_finds_the_cough_in_a_night_and_draws_it(tables, detector, tmp_path):
    said = python(
        "examples/cough_detector.py", "score", detector, tables / "ward.parquet", "night.wav", tmp_path / "night.png"
    )
    begin_s = float(re.fullmatch(r"night\.wav: most like a cough from ([\d.]+) s on \([+-].+\)\n", said)[1])
    assert abs(begin_s - COUGH_S) <= 1  # of the windows that hear it
    assert (tmp_path / "night.png").read_bytes().startswith(b"\x89PNG")


def test_the_cough_detector_says_what_it_does_not_find(tables, detector, tmp_path):
    command = [sys.executable, ROOT / "examples" / "cough_detector.py", "score", detector, tables / "ward.parquet"]
    ended = subprocess.run([*command, "day.wav", tmp_path / "day.png"], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (1, f"{tables}/ward.parquet has no recording day.wav\n")
    assert list(tmp_path.iterdir()) == []
