"""The results of an evaluation as tables, pictures and one screen of text; a pure function of one dict.

results = {
    "probe": "logistic",          # one of PROBES of hear_distill/measure.py
    "protocol": "windows",        # how recordings became embeddings; "squeeze" stands beside whole-clip columns
    "method": [text],             # sentences under the tables: windows, preprocessing
    "models": {"student": {"is_stand_in": False, ...}, "teacher": {...}, ...},   # others are baselines
    "datasets": [{
        "name": "fsd50k", "title": "FSD50K", "notes": [text],
        "split": text,            # "official test part", "five folds by recording"
        "tasks": [entry],         # Measured.entries of hear_distill/measure.py
        "mean": entry of mean_entry, or None,
    }],
    "mean": entry of mean_entry over several datasets, its tasks called 'fsd50k/Cough', or None,
}

entry = {
    "task": "Cough", "kind": "binary", "problem": None,   # or text, and then nothing below
    "rows": 900, "scored_rows": 900, "groups": 300, "classes": [], "left_out": {},
    "positives": 120, "positive_groups": 60, "share_of_positives": 0.13,             # binary alone
    "models": {"student": {
        "metrics": {"ap": {"value": 0.8, "low": 0.7, "high": 0.9}, "auroc": ..., "f1 COPD": ...},
        "seed_std": {"ap": 0.01} or None,
        "neighbours": 0.7 or None,                        # AP, or accuracy of several classes, without training
        "curve": {"recall": [...], "precision": [...]},   # binary
        "confusion": [[...]],                             # several classes: rows are actual ones
        "f1_over_folds": {"mean": 0.8, "std": 0.1, "folds": 5} or None,   # several classes: one for each name
    }},
    "primary": "ap", "retained_percent": {"value": 97.0, "low": 94.0, "high": 99.0} or None,
    "above_chance_percent": like it,
}
"""

from collections.abc import Mapping, Sequence

from hear_distill.bootstrap import NUM_DRAWS
from hear_distill.measure import PAPER, STUDENT, TEACHER, Results
from hear_distill.published import columns_beside, published_ap, published_f1, published_mean_ap

NOT_MEASURED = "not measured"
PUBLISHED_F1 = "HeAR-s F1 (ensemble)"
TITLES = {
    "ap": "AP",
    "auroc": "AUROC",
    "auroc_by_group": "AUROC by group",
    "balanced_accuracy": "balanced accuracy",
    "accuracy": "accuracy",
    "f1": "F1",
    "macro_f1": "macro F1",
    "mae": "MAE",
    "pearson": "Pearson",
    "spearman": "Spearman",
}
INTERVALS = (
    f"In brackets the 95 % interval over {NUM_DRAWS} draws of groups, the same for all models; retained is the "
    f"student's value in percent of the teacher's, draw by draw. Published columns were measured by others on their "
    f"windows and splits. Neighbours: the vote of the 10 nearest rows of other groups, nothing trained."
)
PROBE_SAYS = {
    "logistic": "L2 logistic regression on standardised embeddings",
    "svm": "linear support vector machine on standardised embeddings",
    "knn": "nearest neighbours on standardised embeddings",
    "mlp": "a network of one hidden layer on standardised embeddings",
    "ensemble": "mean probability of logistic regression, linear SVM, nearest neighbours and a small network",
    PAPER: "the probe of HeAR's authors: SGD with log loss, no standardisation, AUROC chooses among 50 strengths",
}


def model_name(results: Results, model: str) -> str:
    """What every table and picture calls it: nobody shall take a stand-in for HeAR."""
    return f"stand-in {model}" if results["models"][model].get("is_stand_in") else model


def models_of(results: Results) -> list[str]:
    """The teacher, baselines, and the student last, beside what it retains."""
    others = [model for model in results["models"] if model not in (STUDENT, TEACHER)]
    return [m for m in (TEACHER, *others, STUDENT) if m in results["models"]]


def cell(value: Mapping[str, float] | None, digits: int = 3) -> str:
    """'0.842 [0.801, 0.880]'"""
    if value is None:
        return NOT_MEASURED
    return "{value:.{d}f} [{low:.{d}f}, {high:.{d}f}]".format(**value, d=digits)


def number(value: float | None) -> str:
    """'0.842', and a dash for what was not published."""
    return "-" if value is None else f"{value:.3f}"


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table, its head first, that can be read as it is."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return [
        f"| {' | '.join([row[0].ljust(widths[0]), *(t.rjust(w) for t, w in zip(row[1:], widths[1:], strict=True))])} |"
        for row in (table[0], rule, *table[1:])
    ]


def as_markdown(results: Results) -> str:
    """table.md"""
    lines = [f"# {title(results)}", "", conclusion(results), ""]
    for dataset in results["datasets"]:
        lines += [f"## {dataset['title']}", "", f"Split: {dataset['split']}.", ""]
        for section in (precision_table, binary_table, class_table, quantity_table):
            rows = section(results, dataset)
            lines += [*aligned(rows), ""] if len(rows) > 1 else []
        lines += [f"Not measurable: {e['task']}, {e['problem']}." for e in dataset["tasks"] if e["problem"]]
        for entry in _measured(dataset):
            lines += [f"Left out of {entry['task']}: {name}, {why}." for name, why in entry["left_out"].items()]
        lines += [*dataset["notes"], ""]
    if results["mean"]:
        lines += ["## All together", "", *aligned(mean_table(results)), ""]
    return "\n".join([*lines, f"Probe: {PROBE_SAYS[results['probe']]}.", INTERVALS, *results["method"]]) + "\n"


def _measured(dataset: Results, kind: str | None = None) -> list[Results]:
    return [entry for entry in dataset["tasks"] if not entry["problem"] and kind in (None, entry["kind"])]


def precision_table(results: Results, dataset: Results) -> list[list[str]]:
    """AP of the binary tasks, published columns first where there are any."""
    entries, models = _measured(dataset, "binary"), models_of(results)
    columns = columns_beside(results["protocol"])
    if not any(published_ap(dataset["name"], entry["task"]) for entry in entries):
        columns = ()
    names = [f"{model_name(results, model)} AP" for model in models]
    table = [["task", "positives", "groups", *columns, *names, "retained %"]]
    for entry in entries:
        known = published_ap(dataset["name"], entry["task"])
        counts = [str(entry["positives"]), str(entry["positive_groups"])]
        values = [cell(entry["models"][model]["metrics"]["ap"]) for model in models]
        share = cell(entry["retained_percent"], 1)
        table.append([entry["task"], *counts, *(number(known.get(c)) for c in columns), *values, share])
    if dataset["mean"]:
        known = published_mean_ap([(dataset["name"], task) for task in dataset["mean"]["tasks"]])
        table.append(_mean_row(results, dataset["mean"], ["", ""], [number(known.get(c)) for c in columns]))
    return table


def _mean_row(results: Results, mean: Results, counts: list[str], known: list[str]) -> list[str]:
    values = [cell(mean["models"][model]["ap"]) for model in models_of(results)]
    return [f"mAP, {len(mean['tasks'])} tasks", *counts, *known, *values, cell(mean["retained_percent"], 1)]


def mean_table(results: Results) -> list[list[str]]:
    """mAP over several datasets, beside the published means of just these tasks."""
    means = [mean for mean in (results["mean"], results["complete_mean"]) if mean]
    published = [published_mean_ap([tuple(task.split("/", 1)) for task in mean["tasks"]]) for mean in means]
    columns = columns_beside(results["protocol"]) if any(published) else ()
    names = [f"{model_name(results, model)} mAP" for model in models_of(results)]
    table = [["", *columns, *names, "retained %"]]
    for mean, known in zip(means, published, strict=True):
        table.append(_mean_row(results, mean, [], [number(known.get(column)) for column in columns]))
    return table


def binary_table(results: Results, dataset: Results) -> list[list[str]]:
    """What AP does not say: a row for each binary task and model."""
    metrics = ["auroc", "balanced_accuracy", "f1", *(["auroc_by_group"] if results["probe"] == PAPER else [])]
    head = ["F1 over folds", PUBLISHED_F1, "neighbours AP", "AP between seeds", "AUROC above chance kept %"]
    table = [["task", "model", *(TITLES[name] for name in metrics), *head]]
    for entry in _measured(dataset, "binary"):
        for model in models_of(results):
            of_model = entry["models"][model]
            known = published_f1(dataset["name"], entry["task"])
            table.append(
                [
                    *(entry["task"], model_name(results, model)),
                    *(cell(of_model["metrics"].get(name)) for name in metrics),
                    *(over_folds(of_model["f1_over_folds"]), over_folds(known._asdict() if known else None)),
                    *(number(of_model["neighbours"]), between_seeds(of_model, "ap")),
                    cell(entry["above_chance_percent"], 1) if model == STUDENT else "",
                ]
            )
    return table


def over_folds(value: Mapping[str, float] | None) -> str:
    """'0.888 (0.058)': mean and standard deviation, as the published table of lungs and heart prints them."""
    return "-" if value is None else f"{value['mean']:.3f} ({value['std']:.3f})"


def between_seeds(of_model: Results, metric: str) -> str:
    """'± 0.004', a dash where nothing is random."""
    return "-" if of_model["seed_std"] is None else f"± {of_model['seed_std'][metric]:.3f}"


def class_table(results: Results, dataset: Results) -> list[list[str]]:
    """F1 of each class against the rest, and of all of them, beside the published ones."""
    models = models_of(results)
    table = [["diagnosis", PUBLISHED_F1]]
    for model in models:
        name = model_name(results, model)
        table[0] += [f"{name} F1 over folds", f"{name} F1, pooled"]
    table[0].append("retained %")
    for entry in _measured(dataset, "multiclass"):
        for name in entry["classes"]:
            known = published_f1(dataset["name"], name)
            row = [f"{entry['task']}: {name}", over_folds(known._asdict() if known else None)]
            for model in models:
                of_model = entry["models"][model]
                row += [over_folds(of_model["f1_over_folds"][name]), cell(of_model["metrics"][f"f1 {name}"])]
            table.append([*row, ""])
        for metric in ("macro_f1", "balanced_accuracy", "accuracy"):
            row = [f"{entry['task']}: {TITLES[metric]}", "-"]
            for model in models:
                row += ["", cell(entry["models"][model]["metrics"][metric])]
            table.append([*row, cell(entry["retained_percent"], 1) if metric == entry["primary"] else ""])
    return table


def quantity_table(results: Results, dataset: Results) -> list[list[str]]:
    """Ridge regression: a row for each task and model."""
    metrics = ("mae", "pearson", "spearman")
    table = [["quantity", "model", *(TITLES[name] for name in metrics), "retained % of Spearman"]]
    for entry in _measured(dataset, "regression"):
        for model in models_of(results):
            share = cell(entry["retained_percent"], 1) if model == STUDENT else ""
            values = (cell(entry["models"][model]["metrics"][name]) for name in metrics)
            table.append([entry["task"], model_name(results, model), *values, share])
    return table


def title(results: Results) -> str:
    """The head of table and pictures."""
    against = f" and the {model_name(results, TEACHER)}" if TEACHER in results["models"] else ""
    return f"Probes of the student{against} on {', '.join(dataset['title'] for dataset in results['datasets'])}"


def conclusion(results: Results) -> str:
    """'the student keeps 97.1 % [94.0, 99.8] of the teacher's mAP (0.842 of 0.867)'"""
    mean = results["mean"]
    if mean is None:
        return "no binary task was measured, so there is no mAP"
    student = mean["models"][STUDENT]["ap"]
    if mean["retained_percent"] is None:
        return f"the student has an mAP of {cell(student)}; what it keeps of a teacher was not measured"
    share = "{value:.1f} % [{low:.1f}, {high:.1f}]".format(**mean["retained_percent"])
    values = f"{student['value']:.3f} of {mean['models'][TEACHER]['ap']['value']:.3f}"
    return f"the student keeps {share} of the {model_name(results, TEACHER)}'s mAP ({values})"


def one_screen(results: Results) -> str:
    """What is printed at the end: a line for each dataset's mAP and for each other task, then the result in words.

    Only the student has its interval here, so that a line fits on a terminal.
    """
    models = models_of(results)
    table = [["", *(model_name(results, model) for model in models), "retained %"]]

    def add(label: str, of_models: Mapping[str, Mapping[str, float]], retained: Mapping[str, float] | None) -> None:
        values = (cell(of_models[m]) if m == STUDENT else number(of_models[m]["value"]) for m in models)
        table.append([label, *values, cell(retained, 1)])

    for dataset in results["datasets"]:
        mean = dataset["mean"]
        if mean:
            of_models = {model: of["ap"] for model, of in mean["models"].items()}
            add(f"{dataset['title']}: mAP, {len(mean['tasks'])} tasks", of_models, mean["retained_percent"])
        for entry in _measured(dataset):
            if entry["kind"] != "binary":
                of_models = {model: of["metrics"][entry["primary"]] for model, of in entry["models"].items()}
                label = f"{dataset['title']}: {entry['task']}, {TITLES[entry['primary']]}"
                add(label, of_models, entry["retained_percent"])
    num_problems = sum(bool(entry["problem"]) for dataset in results["datasets"] for entry in dataset["tasks"])
    lines = [*aligned(table), ""]
    if num_problems:
        lines.append(f"{num_problems} {'task' if num_problems == 1 else 'tasks'} not measurable; table.md says why")
    return "\n".join([*lines, conclusion(results)]) + "\n"
