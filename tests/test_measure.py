"""Whole measurements of embeddings whose answer is known."""

import json

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from hear_distill import measure as module
from hear_distill.bootstrap import NUM_DRAWS
from hear_distill.measure import PROBES, mean_entry, measure, merged
from hear_distill.probes import Leak
from hear_distill.splits import Rows
from hear_distill.tasks import Task

PEOPLE = 40
GROUPS = np.array([f"person {i // 3:02}" for i in range(3 * PEOPLE)])
EVERYONE = np.ones(len(GROUPS), dtype=bool)
IS_TEST = (np.arange(PEOPLE) % 5 < 2).repeat(3)
ILL = np.random.default_rng(0).permutation(np.arange(PEOPLE) % 2 == 0).repeat(3)
DIAGNOSIS = np.where(ILL, np.where(np.arange(3 * PEOPLE) % 2, "asthma", "COPD"), "healthy")
AGE = np.random.default_rng(1).permutation(PEOPLE).repeat(3) + 20.0
TASKS = {
    "ill": Task(kind="binary", labels=ILL, takes_part=EVERYONE),
    "diagnosis": Task(kind="multiclass", labels=DIAGNOSIS, takes_part=EVERYONE),
    "age": Task(kind="regression", labels=AGE, takes_part=EVERYONE),
}
KNOWING = np.stack([DIAGNOSIS == "asthma", DIAGNOSIS == "COPD", DIAGNOSIS == "healthy", AGE / 30], axis=1) * [
    1,
    5,
    2,
    7,
]
IGNORANT = np.random.default_rng(2).normal(size=(3 * PEOPLE, 5))
OFFICIAL = Rows(groups=GROUPS, is_test=IS_TEST)


@pytest.fixture(scope="module")
def official() -> module.Measured:
    return measure(TASKS, OFFICIAL, {"student": IGNORANT, "teacher": KNOWING}, "logistic", 0)


def metrics_of(measured: module.Measured, task: str, model: str) -> dict:
    entry = next(entry for entry in measured.entries if entry["task"] == task)
    return {name: found["value"] for name, found in entry["models"][model]["metrics"].items()}


def test_an_embedder_that_knows_everything_scores_one(official):
    assert set(metrics_of(official, "ill", "teacher").values()) == {1.0}
    assert set(metrics_of(official, "diagnosis", "teacher").values()) == {1.0}
    found = metrics_of(official, "age", "teacher")
    assert found["mae"] < 0.1 and found["pearson"] > 0.999 and found["spearman"] > 0.99


def test_an_embedder_that_knows_nothing_scores_chance():
    """AUROC over several draws of noise; one alone is as wide as its interval."""
    noise = {f"draw {i}": np.random.default_rng(i).normal(size=(3 * PEOPLE, 3)) for i in range(12)}
    tasks = {"ill": TASKS["ill"]}
    measured = measure(tasks, OFFICIAL, noise, "logistic", 0)
    aurocs = [metrics_of(measured, "ill", model)["auroc"] for model in noise]
    assert np.mean(aurocs) == pytest.approx(0.5, abs=3 * np.std(aurocs, ddof=1) / 12**0.5)
    assert np.std(aurocs) < 0.2


def test_the_numbers_are_those_of_scikit_learn_on_the_scored_rows(official):
    fit = module.fit_of("binary", "logistic", 0)
    probe = fit(IGNORANT[~IS_TEST], ILL[~IS_TEST], GROUPS[~IS_TEST])
    scores = probe.decision_function(IGNORANT[IS_TEST])
    found = metrics_of(official, "ill", "student")
    assert found["ap"] == pytest.approx(average_precision_score(ILL[IS_TEST], scores))
    assert found["auroc"] == pytest.approx(roc_auc_score(ILL[IS_TEST], scores))
    assert found["f1"] == pytest.approx(f1_score(ILL[IS_TEST], scores > 0))


def test_labels_of_the_test_part_do_not_touch_the_probe():
    swapped = np.where(IS_TEST, ~ILL, ILL)
    tasks = {"ill": Task(kind="binary", labels=swapped, takes_part=EVERYONE)}
    found = metrics_of(measure(tasks, OFFICIAL, {"student": KNOWING}, "logistic", 0), "ill", "student")
    assert found["auroc"] == 0  # a probe that had seen them would not be as wrong as this


def test_shares_counts_and_confusion_are_in_the_entry(official):
    ill, diagnosis, age = official.entries
    assert (ill["scored_rows"], ill["rows"], ill["groups"]) == (48, 120, 16)
    assert ill["positives"] == ILL[IS_TEST].sum() == 3 * ill["positive_groups"]
    ap = metrics_of(official, "ill", "student")["ap"]
    of_student, of_teacher = ill["models"]["student"], ill["models"]["teacher"]
    assert of_student["retained_percent"]["value"] == pytest.approx(100 * ap)
    auroc = metrics_of(official, "ill", "student")["auroc"]
    assert of_student["above_chance_percent"]["value"] == pytest.approx(100 * (auroc - 0.5) / 0.5)
    assert of_teacher["retained_percent"] is of_teacher["above_chance_percent"] is None
    assert diagnosis["classes"] == ["COPD", "asthma", "healthy"]
    counts = [(DIAGNOSIS[IS_TEST] == name).sum() for name in diagnosis["classes"]]
    assert diagnosis["models"]["teacher"]["confusion"] == np.diag(counts).tolist()
    assert np.sum(diagnosis["models"]["student"]["confusion"], axis=1).tolist() == counts
    assert age["primary"] == "spearman" and age["models"]["student"]["above_chance_percent"] is None
    assert ill["models"]["student"]["seed_std"] is None  # nothing is random
    json.dumps(official.entries, allow_nan=False)


def test_a_task_that_cannot_be_measured_does_not_stop_the_others():
    rare = Task(kind="binary", labels=np.arange(3 * PEOPLE) < 3, takes_part=EVERYONE)
    measured = measure({"rare": rare, "ill": TASKS["ill"]}, OFFICIAL, {"student": KNOWING}, "logistic", 0)
    assert measured.entries[0]["problem"] == "groups that hold this label in the test part: 1, at least 2 needed"
    assert measured.entries[1]["problem"] is None and set(measured.draws) == {"ill"}
    nothing = measure({"rare": rare}, OFFICIAL, {"student": KNOWING}, "logistic", 0)
    assert len(nothing.entries) == 1 and mean_entry(nothing.draws) is None


def test_a_recording_in_train_and_test_stops_the_measurement():
    torn = IS_TEST.copy()
    torn[4] = ~torn[4]
    with pytest.raises(Leak, match="such as person 01"):
        measure(TASKS, Rows(groups=GROUPS, is_test=torn), {"student": KNOWING}, "logistic", 0)


def test_our_own_folds_are_averaged_over_five_seeds_with_their_spread(monkeypatch):
    monkeypatch.setattr(module, "fit_of", lambda kind, probe, seed: Dealt(seed).fit)
    tasks = {"ill": TASKS["ill"], "diagnosis": TASKS["diagnosis"]}

    measured = measure(tasks, Rows(groups=GROUPS), {"student": IGNORANT}, "logistic", 7)

    ill = measured.entries[0]["models"]["student"]
    aps = [average_precision_score(ILL, IGNORANT[:, seed - 7]) for seed in range(7, 12)]
    assert ill["metrics"]["ap"]["value"] == pytest.approx(np.mean(aps))
    assert ill["seed_std"]["ap"] == pytest.approx(np.std(aps, ddof=1)) and ill["seed_std"]["ap"] > 0.01
    assert ill["f1_over_folds"]["folds"] == 25
    by_class = measured.entries[1]["models"]["student"]["f1_over_folds"]
    assert set(by_class) == {"COPD", "asthma", "healthy"}


class Dealt:
    """A probe that repeats one column of the embedding: another one for each seed."""

    def __init__(self, seed: int) -> None:
        self.column = seed - 7

    def fit(self, *_: np.ndarray) -> "Dealt":
        return self

    def decision_function(self, features: np.ndarray) -> np.ndarray:
        return features[:, self.column]


def test_f1_over_folds_is_the_mean_of_each_folds_own(monkeypatch):
    monkeypatch.setattr(module, "fit_of", lambda kind, probe, seed: Dealt(7).fit)
    folds = (np.arange(PEOPLE) % 4).repeat(3)
    measured = measure({"ill": TASKS["ill"]}, Rows(groups=GROUPS, folds=folds), {"student": IGNORANT}, "logistic", 0)
    found = measured.entries[0]["models"]["student"]["f1_over_folds"]
    by_fold = [f1_score(ILL[folds == fold], IGNORANT[folds == fold, 0] > 0) for fold in range(4)]
    assert found == {"mean": pytest.approx(np.mean(by_fold)), "std": pytest.approx(np.std(by_fold, ddof=1)), "folds": 4}


def test_the_number_of_workers_does_not_change_a_number(official):
    alone = measure({"ill": TASKS["ill"]}, OFFICIAL, {"student": IGNORANT}, "logistic", 0)
    beside = measure({"ill": TASKS["ill"]}, OFFICIAL, {"student": IGNORANT}, "logistic", 0, workers=2)
    assert alone.entries == beside.entries
    assert alone.entries[0]["models"]["student"]["seed_std"] is None


def test_the_paper_protocol_scores_people_too_and_names_what_is_too_rare_for_it():
    few = Task(
        kind="binary", labels=np.isin(GROUPS, ["person 00", "person 01", "person 02", "person 03"]), takes_part=EVERYONE
    )
    is_test = (np.arange(PEOPLE) % 2 == 0).repeat(3)
    tasks = {"ill": TASKS["ill"], "few": few}
    measured = measure(tasks, Rows(groups=GROUPS, is_test=is_test), {"student": KNOWING}, "paper", 0)
    assert metrics_of(measured, "ill", "student")["auroc_by_group"] == 1
    assert measured.entries[1]["problem"] == "groups that hold this label in the training part: 2, at least 5 needed"
    assert set(PROBES) == {"logistic", "svm", "knn", "mlp", "ensemble", "paper"}


def test_a_mean_over_datasets_is_the_mean_of_their_tasks_draw_by_draw():
    rng = np.random.default_rng(0)
    names = ("ap", "auroc", "balanced_accuracy", "f1")
    made = [
        {m: {n: rng.uniform(0.6, 0.9, 1 + NUM_DRAWS) for n in names} for m in ("student", "teacher")} for _ in "abc"
    ]
    first = module.Measured(entries=[], draws={"Cough": made[0], "Speech": made[1]})
    found = mean_entry(merged({"fsd50k": first, "flusense": module.Measured(entries=[], draws={"Cough": made[2]})}))
    assert found["tasks"] == ["fsd50k/Cough", "fsd50k/Speech", "flusense/Cough"]
    student, teacher = (np.mean([of[model]["ap"] for of in made], axis=0) for model in ("student", "teacher"))
    assert found["models"]["student"]["metrics"]["ap"]["value"] == pytest.approx(student[0])
    assert found["models"]["student"]["metrics"]["ap"]["low"] == pytest.approx(np.percentile(student[1:], 2.5))
    retained = found["models"]["student"]["retained_percent"]
    assert retained["high"] == pytest.approx(np.percentile(100 * student[1:] / teacher[1:], 97.5))


def test_only_groups_that_are_scored_are_drawn():
    plans = [module.plan_of(TASKS["ill"], OFFICIAL, 0)]
    weights = module._weights(plans, GROUPS, 0)
    assert (weights[:, ~IS_TEST] == 0).all() and (weights[:, IS_TEST].sum(axis=1) == IS_TEST.sum()).all()
