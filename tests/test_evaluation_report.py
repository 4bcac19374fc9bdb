"""Tables, the last screen and the pictures, from results that were measured here."""

import copy

import numpy as np
import pytest
from PIL import Image

from hear_distill.evaluation_pictures import colour_of, pictures, write_report
from hear_distill.evaluation_report import (
    NOT_MEASURED,
    aligned,
    as_markdown,
    conclusions,
    models_of,
    one_screen,
    over_folds,
)
from hear_distill.measure import Results, mean_entry, measure, merged
from hear_distill.splits import Rows
from hear_distill.tasks import Task

PEOPLE = 30
DIAGNOSIS = np.random.default_rng(0).permutation(["COPD", "URTI", "healthy"] * 10).repeat(2)
EVERYONE = np.ones(2 * PEOPLE, dtype=bool)
ROWS = Rows(groups=np.arange(PEOPLE).repeat(2).astype(str), folds=(np.arange(PEOPLE) % 2).repeat(2))
FEATURES = np.stack([name == DIAGNOSIS for name in ("COPD", "URTI", "healthy")], axis=1) * 1.0


@pytest.fixture(scope="module")
def results() -> Results:
    """FluSense with two published tasks, and a table of our own with all kinds and a task that is too rare."""
    rng = np.random.default_rng(0)
    embeddings = {
        "student": FEATURES + rng.normal(0, 1.0, FEATURES.shape),
        "teacher": FEATURES + rng.normal(0, 0.4, FEATURES.shape),
        "logmel": FEATURES + rng.normal(0, 2.0, FEATURES.shape),
    }
    coughs = {
        "Cough": Task(kind="binary", labels=DIAGNOSIS == "COPD", takes_part=EVERYONE),
        "breathe": Task(kind="binary", labels=DIAGNOSIS == "URTI", takes_part=EVERYONE),
    }
    lungs = {
        "diagnosis": Task(kind="multiclass", labels=DIAGNOSIS, takes_part=EVERYONE),
        "age": Task(kind="regression", labels=FEATURES @ [20, 40, 60] + np.arange(60) % 7, takes_part=EVERYONE),
        "rare": Task(kind="binary", labels=np.arange(2 * PEOPLE) < 2, takes_part=EVERYONE),
    }

    found = {
        "flusense": measure(coughs, ROWS, embeddings, "logistic", 0),
        "icbhi": measure(lungs, ROWS, embeddings, "logistic", 0),
    }
    datasets = [
        {
            "name": name,
            "label": name,
            "title": title,
            "split": "two folds by person",
            "tasks": found[name].entries,
            "mean": mean_entry(found[name].draws),
        }
        for name, title in (("flusense", "FluSense"), ("icbhi", "ICBHI 2017"))
    ]
    roles = {"student": "student", "teacher": "teacher", "logmel": "baseline"}
    about = {"rows": 60, "preprocessing": "none", "revision": "r", "notes": ["3 rows were unreadable."]}
    section = {"text": "Windows of 2 s, one every second", "probe": "logistic", "datasets": datasets}
    return {
        "method": ["All in float32."],
        "problems": ["icbhi, rare: not measurable"],
        "data": [{"title": dataset["title"], **about} for dataset in datasets],
        "models": {name: {"role": roles[name], "is_stand_in": False} for name in embeddings},
        "protocols": {"windows": {**section, "mean": mean_entry(merged(found)), "complete_mean": None}},
    }


def main_section(results: Results) -> Results:
    return next(iter(results["protocols"].values()))


def with_section(results: Results, name: str = "windows", **changes: object) -> Results:
    """The same with another main section, alone."""
    return {**results, "protocols": {name: {**main_section(results), **changes}}}


def cells_of(text: str, head: str) -> list[list[str]]:
    """The rows of all tables that begin with this cell."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return [row for row in rows if row[0] == head]


def test_the_published_columns_stand_beside_ours(results):
    text = as_markdown(results)
    head, cough, breathing = cells_of(text, "task")[0], cells_of(text, "Cough")[0], cells_of(text, "breathe")[0]
    assert head[3:9] == ["TRILL", "FRILL", "BigSSL-CAP12", "HeAR", "CLAP (48k)", "HeAR-s"]
    assert head[9:] == ["teacher AP", "logmel AP", "student AP", "retained %"]
    assert cough[3:9] == ["0.903", "0.892", "0.954", "0.974", "0.963", "0.909"]
    assert breathing[6] == "0.336"
    entry = main_section(results)["datasets"][0]["tasks"][0]
    found = entry["models"]["student"]["metrics"]["ap"]
    assert cough[11] == f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
    assert cough[12].startswith(f"{entry['models']['student']['retained_percent']['value']:.1f} [")
    assert cough[1:3] == ["20", "10"]
    mean = cells_of(text, "mAP, 2 tasks")[0]
    assert mean[6] == f"{(0.974 + 0.336) / 2:.3f}"


def test_hear_s_has_a_mean_over_the_tasks_that_it_was_evaluated_on(results):
    mean = main_section(results)["mean"]
    both = {**mean, "tasks": ["flusense/Cough", "fsd50k/Respiratory sounds"]}
    fsd50k = with_section(results, mean=both, complete_mean={**mean, "tasks": ["flusense/Cough"]})
    lines = as_markdown(fsd50k).split("## All together")[1]
    assert cells_of(lines, "mAP, 2 tasks")[0][4:7] == [f"{(0.974 + 0.670) / 2:.3f}", f"{(0.963 + 0.702) / 2:.3f}", "-"]
    assert cells_of(lines, "mAP, 1 tasks")[0][4:7] == ["0.974", "0.963", "0.909"]


def test_whole_clip_columns_appear_under_squeeze_only(results):
    assert "HeAR-s full" not in as_markdown(results)
    squeezed = cells_of(as_markdown(with_section(results, "squeeze")), "task")[0]
    assert squeezed[8:10] == ["HeAR-s full", "HeAR full"] and "HeAR-s" not in squeezed


def test_diagnoses_stand_beside_the_published_f1_over_folds(results):
    row = cells_of(as_markdown(results), "diagnosis: COPD")[0]
    of_student = main_section(results)["datasets"][1]["tasks"][0]["models"]["student"]
    assert row[1] == "0.888 (0.058)"
    assert row[6] == over_folds(of_student["f1_over_folds"]["COPD"])
    assert row[7].startswith(f"{of_student['metrics']['f1 COPD']['value']:.3f} [")


def test_what_is_kept_above_chance_stands_beside_students_alone(results):
    rows = {row[1]: row for row in cells_of(as_markdown(results), "Cough") if row[1] in results["models"]}
    kept = main_section(results)["datasets"][0]["tasks"][0]["models"]["student"]["above_chance_percent"]
    assert rows["student"][-1].startswith(f"{kept['value']:.1f} [")
    assert rows["teacher"][-1] == rows["logmel"][-1] == ""


def test_every_model_and_metric_of_a_quantity_is_printed(results):
    rows = cells_of(as_markdown(results), "age")
    assert [row[1] for row in rows] == ["teacher", "logmel", "student"]
    mae = main_section(results)["datasets"][1]["tasks"][1]["models"]["logmel"]["metrics"]["mae"]["value"]
    assert rows[1][2].startswith(f"{mae:.3f} [")


def test_what_was_not_measurable_and_what_was_left_out_is_said(results):
    text = as_markdown(results)
    assert "Not measurable: rare, groups that hold this label: 1, at least 2 needed." in text
    assert "3 rows were unreadable." in text and "Windows of 2 s, one every second." in text
    assert "1 problem; table.md names them all" in one_screen(results)
    assert "- icbhi, rare: not measurable" in text.split("## Problems")[1]


def test_a_stand_in_is_never_called_the_teacher(results):
    stand_in = copy.deepcopy(results)
    stand_in["models"]["teacher"]["is_stand_in"] = True
    for text in (as_markdown(stand_in), one_screen(stand_in)):
        assert "stand-in teacher" in text
        assert "teacher" not in text.replace("stand-in teacher", "").replace("teacher's, draw by draw", "")
    labels = [text.get_text() for text in pictures(stand_in)["student_vs_teacher.png"].legends[0].get_texts()]
    assert "stand-in teacher" in labels and "teacher" not in labels


def test_without_a_teacher_what_is_retained_is_not_measured(results):
    alone = copy.deepcopy(results)
    del alone["models"]["teacher"]
    section = main_section(alone)
    for entry in (*(entry for dataset in section["datasets"] for entry in dataset["tasks"]), section["mean"]):
        entry.get("models", {}).pop("teacher", None)
        for of_model in entry.get("models", {}).values():
            of_model |= {"retained_percent": None, "above_chance_percent": None}
    for dataset in section["datasets"]:
        dataset["mean"] = None
    assert cells_of(as_markdown(alone), "Cough")[0][-1] == NOT_MEASURED
    assert conclusions(alone)[0].endswith("what it keeps of a teacher was not measured")
    assert models_of(alone) == ["logmel", "student"] and len(pictures(alone)) == 3


def test_two_students_and_two_protocols_stand_side_by_side(results):
    twins = copy.deepcopy(results)
    section = main_section(twins)
    twins["models"] |= {"run 2": {"role": "student", "is_stand_in": False}}
    of_entries = [entry for dataset in section["datasets"] for entry in dataset["tasks"] if not entry["problem"]]
    for entry in (
        *of_entries,
        *(dataset["mean"] for dataset in section["datasets"] if dataset["mean"]),
        section["mean"],
    ):
        entry["models"]["run 2"] = entry["models"]["logmel"]
    twins["protocols"]["full"] = copy.deepcopy(section)
    changed = twins["protocols"]["full"]["datasets"][0]["tasks"][0]["models"]["run 2"]["metrics"]["ap"]
    changed["value"] = 0.125

    text = as_markdown(twins)

    assert cells_of(text, "Cough")[0][10:] and cells_of(text, "task")[0][9:] == [
        *("teacher AP", "logmel AP", "student AP", "student retained %", "run 2 AP", "run 2 retained %")
    ]
    side_by_side = text.split("## Protocols side by side")[1].split("## Protocol windows")[0]
    heads = cells_of(side_by_side, "")[0][1:]
    assert heads[3:5] == ["run 2, windows", "teacher, full"] and len(heads) == 8
    [cough] = cells_of(side_by_side, "flusense: Cough, AP")
    logmel = of_entries[0]["models"]["logmel"]["metrics"]["ap"]["value"]
    assert cough[4] == f"{logmel:.3f}" and cough[8] == "0.125"
    assert [line.split(" keeps ")[0] for line in conclusions(twins)] == ["the student", "run 2"]
    assert "mAP of all, full" in one_screen(twins)
    bars = pictures(twins)["protocols.png"].axes[0].containers
    means = [section["mean"]["models"][model]["metrics"]["ap"]["value"] for model in models_of(twins)]
    assert [[bar.get_height() for bar in of_model] for of_model in bars] == [[mean, mean] for mean in means]


def test_results_without_a_binary_task_have_no_mean(results):
    lungs = with_section(results, datasets=main_section(results)["datasets"][1:], mean=None)
    assert conclusions(lungs)[0] == "no binary task was measured, so there is no mAP"
    assert "All together" not in as_markdown(lungs) and set(pictures(lungs)) == {
        "student_vs_teacher.png",
        "confusion.png",
    }


def test_the_last_screen_fits_on_one(results):
    lines = one_screen(results).splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 110
    assert conclusions(results) == lines[-1:]
    mean = main_section(results)["mean"]
    assert lines[-1].startswith(f"the student keeps {mean['models']['student']['retained_percent']['value']:.1f} % [")
    assert any(line.startswith("| icbhi: diagnosis, macro F1") for line in lines)


def test_columns_of_a_table_are_aligned():
    assert aligned([["a", "long head"], ["longer", "1"]]) == [
        "| a      | long head |",
        "| ------ | --------: |",
        "| longer |         1 |",
    ]


def test_bars_are_as_long_as_the_values_and_their_lines_as_the_intervals(results):
    axes = pictures(results)["student_vs_teacher.png"].axes[0]
    by_model = dict(zip(models_of(results), axes.containers, strict=True))
    cough = main_section(results)["datasets"][0]["tasks"][0]
    for model, bars in by_model.items():
        assert bars[0].get_width() == cough["models"][model]["metrics"]["ap"]["value"]
        assert bars[-1].get_width() == main_section(results)["mean"]["models"][model]["metrics"]["ap"]["value"]
    first = cough["models"]["teacher"]["metrics"]["ap"]
    assert list(axes.lines[0].get_xdata()) == [first["low"], first["high"]]


def test_a_curve_is_drawn_for_every_model_and_a_matrix_shows_counts(results):
    figures = pictures(results)
    panel = figures["precision_recall.png"].axes[0]
    cough = main_section(results)["datasets"][0]["tasks"][0]
    np.testing.assert_array_equal(panel.lines[2].get_ydata(), cough["models"]["student"]["curve"]["precision"])
    assert panel.lines[3].get_ydata()[0] == cough["share_of_positives"]
    matrix = main_section(results)["datasets"][1]["tasks"][0]["models"]["teacher"]["confusion"]
    shown = [int(text.get_text()) for text in figures["confusion.png"].axes[0].texts]
    assert shown == np.ravel(matrix).tolist()


def test_models_have_colours_of_their_own(results):
    assert len({colour_of(results, model) for model in models_of(results)}) == 3


def test_the_files_are_written_and_named(results, tmp_path):
    names = write_report(results, tmp_path)
    assert sorted(names) == sorted(path.name for path in tmp_path.iterdir())
    assert set(names) == {"table.md", "student_vs_teacher.png", "precision_recall.png", "confusion.png"}
    assert (tmp_path / "table.md").read_text() == as_markdown(results)
    for name in names[1:]:
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 500 and len(picture.getcolors(2**20)) > 20
