"""The length study: clips, lengths, which probe is asked, and a run on sounds whose answer is known."""

import json
import runpy
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from lake_tools import ROOT
from lookalikes import audio_column, sound, write_parquet

from hear_distill import checkpoint
from hear_distill.probes import NotMeasurable
from hear_distill.splits import Rows, plan_of
from hear_distill.student import Student, StudentConfig
from hear_distill.tasks import Task


@pytest.fixture(scope="module")
def script() -> dict:
    return runpy.run_path(str(ROOT / "experiments" / "length_study.py"), run_name="script")


@pytest.mark.parametrize(
    ("peak_s", "length_s", "begin_s"), [(2.5, 1, 2.0), (2.5, 4, 0.5), (0.25, 1, 0), (4.75, 2, 3), (1.0, 5, 0)]
)
def test_a_clip_of_any_length_holds_the_loudest_moment_and_lies_inside_the_recording(script, peak_s, length_s, begin_s):
    samples = np.ones(80_000, dtype=np.int16)
    samples[round(peak_s * 16_000)] = 30_000
    clip = script["clip_around_peak"](samples, length_s * 16_000)
    assert len(clip) == length_s * 16_000 and clip.max() == 30_000
    assert abs(np.argmax(clip) - (peak_s - begin_s) * 16_000) <= 800  # half of the 50 ms that are compared


def test_lengths_that_most_recordings_do_not_have_are_not_measured(script):
    assert script["lengths_that_fit"]([16_000, 80_000, 80_000], [1, 2, 5, 6]) == [1, 2, 5]


def test_a_probe_fitted_at_two_seconds_is_asked_about_another_length_and_sees_none_of_its_test_rows(script):
    rng = np.random.default_rng(0)
    groups, is_positive = np.arange(60).astype(str), np.arange(60) % 3 == 0
    is_test = np.arange(60) >= 40
    task = Task(kind="binary", labels=is_positive, takes_part=np.ones(60, dtype=bool))
    plan = plan_of(task, Rows(groups=groups, is_test=is_test), 0)
    known = is_positive[:, None] + rng.normal(0, 0.2, (60, 2))
    here = script["score"](plan, known, known, 0)
    assert (here > 0).tolist() == is_positive[is_test].tolist()
    np.testing.assert_allclose(script["score"](plan, known, known.copy(), 0), here)
    assert (script["score"](plan, known, -known + 1, 0) > 0).tolist() == (~is_positive[is_test]).tolist()
    spoilt = np.where(is_test[:, None], -known, known)
    np.testing.assert_allclose(script["score"](plan, spoilt, known, 0), here)


def test_a_table_of_three_seconds_gives_a_number_for_each_length_model_and_mode(script, tmp_path):
    torch.manual_seed(0)
    for name, changes in {"canon": {}, "positions": {"canon": "none", "positions": "learned"}}.items():
        config = StudentConfig(width=24, blocks=1, heads=3, mlp_width=48, **changes)
        checkpoint.save(tmp_path / name, {"student_config": asdict(config), "student": Student(config).state_dict()})
    rows = 24
    columns = {
        "label": ["a", "b"] * (rows // 2),
        "group": [str(i) for i in range(rows)],
        "fold": [1 + i // 12 for i in range(rows)],
    }
    sounds = [sound(i, seconds=2.5 if i == 3 else 3.2) for i in range(rows)]
    write_parquet(tmp_path / "t.parquet", {"audio": audio_column(sounds, [None] * rows), **columns})
    students = tuple(f"{name}={tmp_path / name / 'latest.pt'}" for name in ("canon", "positions"))
    config = script["Config"](
        dataset=f"table={tmp_path / 't.parquet'}", checkpoint=students, out=tmp_path / "out", test_fold="2"
    )

    script["main"](config)

    found = json.loads((tmp_path / "out" / "length_study.json").read_text())
    assert found["lengths"] == [1, 2, 3] and "Not measured, as most recordings are shorter: 4, 5" in found["about"]
    assert "23 of 24 recordings, those of 3 s or more" in found["about"] and "fold 2" in found["about"]
    for of_models in found["modes"].values():
        assert of_models.keys() == {"canon", "positions"}
        assert all(of_lengths.keys() == {"1", "2", "3"} for of_lengths in of_models.values())
    fitted, refitted = (found["modes"][mode]["canon"] for mode in ("fitted", "refitted"))
    assert fitted["2"] == refitted["2"] and fitted["3"] != refitted["3"]
    assert Path(tmp_path / "out" / "length_study.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="has no fold '9'"):
        script["main"](script["Config"](**{**vars(config), "test_fold": "9"}))


def test_a_dataset_without_a_task_to_measure_is_refused(script, tmp_path):
    rows = {"label": list("ab"), "group": list("12")}
    write_parquet(tmp_path / "t.parquet", {"audio": audio_column([sound(0, 2.5), sound(1, 2.5)], [None] * 2), **rows})
    config = script["Config"](dataset=f"table={tmp_path / 't.parquet'}", checkpoint=("a=b.pt",), out=tmp_path / "out")
    with pytest.raises(NotMeasurable, match="no task of t"):
        script["main"](config)
