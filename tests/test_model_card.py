"""The card says what is known, says of the rest that it is not, and hides no bad number."""

import json
from dataclasses import replace

import pytest
import yaml

from hear_distill.model_card import Card, ResultsError, read_results

RESULTS = {
    "student": {"checkpoint": "best.pt", "sha256": "ab" * 32},
    "teacher": {"name": "google/hear-pytorch", "revision": "0" * 40, "is_stand_in": False},
    "table": {"name": "fsd50k: events.parquet", "sha256": "0" * 64},
    "tasks": [
        {"task": "cough", "problem": None, "ap": {"student": {"value": 0.71234, "low": 0.65, "high": 0.77}}},
        {"task": 'rare: "x"', "problem": "two groups only", "ap": {}},
    ],
    "mean": {
        "num_tasks": 1,
        "ap": {"student": {"value": 0.6789, "low": 0.6, "high": 0.74}},
        "retained_percent": {"value": 96.54, "low": 93, "high": 99},
    },
}
GOOD = {"max_relative_error": 2e-6, "cosine": 0.99999, "passed": True}
CARD = Card(
    title="hear-s",
    width=384,
    num_parameters=21_500_000,
    teacher="google/hear-pytorch",
    teacher_revision="0123abc",
    is_stand_in=False,
    code="fedcba",
    samples=25_600_000,
    sound="48 clips",
    parity={"model.onnx": GOOD, "model_int8.onnx": {**GOOD, "cosine": 0.98123, "passed": False}},
    results=RESULTS,
)


def metadata(card: Card) -> dict:
    """The block between the dashes, as any reader of YAML sees it."""
    head, block, _ = card.text().split("---\n", 2)
    assert head == ""
    return yaml.safe_load(block)


def test_the_metadata_names_the_base_model_the_data_the_terms_and_the_metrics():
    found = metadata(CARD)
    assert found["base_model"] == "google/hear-pytorch" and found["datasets"] == ["laion/LAION-Audio-300M"]
    assert (found["license"], found["license_name"]) == ("other", "health-ai-developer-foundations")
    assert found["license_link"].endswith("/health-ai-developer-foundations/terms")
    (model,) = found["model-index"]
    assert [(row["dataset"]["name"], row["metrics"][0]["value"]) for row in model["results"]] == [
        ("fsd50k: events.parquet: cough", 0.7123),
        ("fsd50k: events.parquet: mean", 0.6789),
    ]


def test_the_text_has_every_number_of_the_results_and_what_could_not_be_measured():
    text = CARD.text()
    assert "| cough | 0.712 [0.650, 0.770] |" in text and '| rare: "x" | two groups only |' in text
    assert "| mean | 0.679 [0.600, 0.740] |" in text and "It keeps 96.5 % [93.0, 99.0] of the teacher's mean." in text
    assert all(
        fact in text for fact in ("google/hear-pytorch at revision 0123abc", "25,600,000 clips", "fedcba", "21.5 m")
    )


def test_it_says_what_it_is_not_for_and_under_which_terms():
    text = CARD.text()
    assert "not a diagnostic" in text and "Intended use and limits" in text and "very likely extend" in text


def test_a_file_below_its_limit_is_said_to_be():
    good, bad = (line for line in CARD.text().splitlines() if line.startswith("| onnx/"))
    assert "below the limit" not in good
    assert "0.98123" in bad and "below the limit" in bad


def test_a_stand_in_is_said_at_the_top_and_is_no_base_model():
    card = replace(CARD, teacher="demo/teacher", is_stand_in=True, results=None)
    title_and_next = card.text().split("# hear-s\n\n")[1]
    assert title_and_next.startswith("> **This student learned from a stand-in, not from HeAR.**")
    assert "demo/teacher at revision 0123abc, a stand-in for HeAR" in card.text()
    assert "base_model" not in metadata(card)
    assert "stand-in" not in CARD.text()


def test_what_is_not_known_is_not_claimed():
    card = replace(CARD, teacher="", results=None)
    assert "base_model" not in metadata(card) and "model-index" not in metadata(card)
    assert "a teacher that is not recorded" in card.text() and "Not measured" in card.text()
    without_teacher = {**RESULTS, "teacher": None, "mean": {**RESULTS["mean"], "retained_percent": None}}
    assert "It keeps" not in replace(CARD, results=without_teacher).text()


def test_results_are_read_if_they_are_of_this_checkpoint(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(RESULTS))
    assert read_results(path, "ab" * 32) == RESULTS
    with pytest.raises(ResultsError, match="is of another checkpoint, abababababab, than cdcdcdcdcdcd"):
        read_results(path, "cd" * 32)


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps({**RESULTS, "mean": {}}), "\udcff"])
def test_what_is_no_results_file_is_refused_in_one_line(tmp_path, text):
    path = tmp_path / "results.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ResultsError, match=r"results\.json of evaluate_distilled_hear\.py") as e:
        read_results(path, "ab" * 32)
    assert "\n" not in str(e.value)
    with pytest.raises(ResultsError, match="cannot be read"):
        read_results(tmp_path / "nothing.json", "ab" * 32)
