"""The results of an evaluation as tables and one screen of text; a pure function of one dict.

results = {
    "models": {"teacher": {"role": "teacher", "is_stand_in": False, ...}, "student": {"role": "student", ...}, ...},
    "method": [text],             # sentences under the tables
    "problems": [text],           # what could not be read or measured
    "data": [{"title": "FSD50K", "revision": text, "rows": 900, "preprocessing": text, "notes": [text]}],
    "protocols": {"windows": section, "full": section, ...},   # the first is the main one
}

section = {
    "text": text,                 # how recordings became embeddings
    "probe": "logistic",          # one of PROBES of hear_distill/measure.py
    "datasets": [{
        "name": "fsd50k", "label": "fsd50k", "title": "FSD50K",   # a label is short, and no two have the same
        "split": text,            # "official test part", "five folds by recording"
        "tasks": [entry],         # Measured.entries of hear_distill/measure.py
        "mean": entry of mean_entry, or None,
    }],
    "mean": entry of mean_entry over several datasets, its tasks called 'fsd50k/Cough', or None,
    "complete_mean": like it, over the tasks of which every published column has a value,
}

entry = {
    "task": "Cough", "kind": "binary", "problem": None,   # or text, and then nothing below
    "rows": 900, "scored_rows": 900, "groups": 300, "classes": [], "left_out": {},
    "positives": 120, "positive_groups": 60, "share_of_positives": 0.13,             # binary alone
    "primary": "ap",
    "models": {"student": {
        "metrics": {"ap": {"value": 0.8, "low": 0.7, "high": 0.9}, "auroc": ..., "f1 COPD": ...},
        "retained_percent": {"value": 97.0, "low": 94.0, "high": 99.0} or None,       # of the teacher's primary metric
        "above_chance_percent": like it,
        "seed_std": {"ap": 0.01} or None,
        "neighbours": 0.7 or None,                        # AP, or accuracy of several classes, without training
        "curve": {"recall": [...], "precision": [...]},   # binary
        "confusion": [[...]],                             # several classes: rows are actual ones
        "f1_over_folds": {"mean": 0.8, "std": 0.1, "folds": 5} or None,   # several classes: one for each name
    }},
}

Tables are of a view: all of `results` and, beside it, one section with its `protocol`; `views` makes them.
"""

from collections.abc import Mapping, Sequence

from hear_distill.bootstrap import NUM_DRAWS
from hear_distill.measure import PAPER, TEACHER, Results
from hear_distill.published import columns_beside, published_ap, published_f1, published_mean_ap

NOT_MEASURED = "not measured"
STUDENT = "student"  # a role, and the name of a student that is alone
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


def views(results: Results) -> list[Results]:
    """What the tables are made of: one for each protocol, the main one first."""
    return [{**results, **section, "protocol": name} for name, section in results["protocols"].items()]


def models_of(results: Results, role: str | None = None) -> list[str]:
    """The teacher, baselines, and students last, beside what they retain; or those of one role."""
    order = {TEACHER: 0, "baseline": 1, STUDENT: 2}
    models = sorted(results["models"], key=lambda model: order[results["models"][model]["role"]])
    return [model for model in models if role in (None, results["models"][model]["role"])]


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
    lines = [f"# {title(results)}", "", *(f"{line}\n" for line in conclusions(results))]
    if len(results["protocols"]) > 1:
        lines += ["## Protocols side by side", "", *aligned(protocol_table(results)), ""]
    for view in views(results):
        lines += [f"## Protocol {view['protocol']}", "", f"{view['text']}.", "", f"{PROBE_SAYS[view['probe']]}.", ""]
        for dataset in view["datasets"]:
            lines += _section(view, dataset)
        if view["mean"] and (len(view["datasets"]) > 1 or view["complete_mean"]):
            lines += ["### All together", "", *aligned(mean_table(view)), ""]
    lines += ["## Data", ""]
    for data in results["data"]:
        facts = f"{data['rows']} rows, preprocessing: {data['preprocessing']}, revision {data['revision']}"
        lines += [f"- {data['title']}: {facts}", *(f"  - {note}" for note in data["notes"])]
    if results["problems"]:
        lines += ["", "## Problems", "", *(f"- {problem}" for problem in results["problems"])]
    return "\n".join([*lines, "", "## Method", "", INTERVALS, *results["method"]]) + "\n"


def _section(view: Results, dataset: Results) -> list[str]:
    """The tables of one dataset, and what is not in them."""
    lines = [f"### {dataset['title']}", "", f"Split: {dataset['split']}.", ""]
    for table in (precision_table, binary_table, class_table, quantity_table):
        rows = table(view, dataset)
        lines += [*aligned(rows), ""] if len(rows) > 1 else []
    lines += [f"Not measurable: {e['task']}, {e['problem']}.\n" for e in dataset["tasks"] if e["problem"]]
    for entry in _measured(dataset):
        lines += [f"Left out of {entry['task']}: {name}, {why}.\n" for name, why in entry["left_out"].items()]
    return lines


def _measured(dataset: Results, kind: str | None = None) -> list[Results]:
    return [entry for entry in dataset["tasks"] if not entry["problem"] and kind in (None, entry["kind"])]


def protocol_table(results: Results) -> list[list[str]]:
    """The main metric of each task by protocol and model, without intervals: what the rule for long ones changes."""
    models = models_of(results)
    all_views = views(results)
    table = [["", *(f"{model_name(results, model)}, {view['protocol']}" for view in all_views for model in models)]]
    values: dict[str, list[str]] = {}
    for place, view in enumerate(all_views):
        found = {
            f"{dataset['label']}: {entry['task']}, {TITLES[entry['primary']]}": (entry["primary"], entry["models"])
            for dataset in view["datasets"]
            for entry in _measured(dataset)
        }
        if view["mean"]:
            found[f"mAP, {len(view['mean']['tasks'])} tasks"] = ("ap", view["mean"]["models"])
        for label, (metric, of_models) in found.items():
            row = values.setdefault(label, ["-"] * len(models) * len(all_views))
            first = place * len(models)
            row[first : first + len(models)] = [number(of_models[m]["metrics"][metric]["value"]) for m in models]
    return [*table, *([label, *row] for label, row in values.items())]


def _model_heads(results: Results, metric: str) -> list[str]:
    """The heads of a table's columns: a metric of every model, and after a student's what it retains."""
    heads = []
    for model in models_of(results):
        heads.append(f"{model_name(results, model)} {metric}")
        if results["models"][model]["role"] == STUDENT:
            heads.append(_retained_head(results, model))
    return heads


def _retained_head(results: Results, model: str) -> str:
    return "retained %" if len(models_of(results, STUDENT)) == 1 else f"{model} retained %"


def _model_cells(results: Results, models: Mapping[str, Results], metric: str) -> list[str]:
    """The cells under those heads."""
    cells = []
    for model in models_of(results):
        cells.append(cell(models[model]["metrics"][metric]))
        if results["models"][model]["role"] == STUDENT:
            cells.append(cell(models[model]["retained_percent"], 1))
    return cells


def precision_table(results: Results, dataset: Results) -> list[list[str]]:
    """AP of the binary tasks, published columns first where there are any."""
    entries = _measured(dataset, "binary")
    columns = columns_beside(results["protocol"])
    if not any(published_ap(dataset["name"], entry["task"]) for entry in entries):
        columns = ()
    table = [["task", "positives", "groups", *columns, *_model_heads(results, "AP")]]
    for entry in entries:
        known = published_ap(dataset["name"], entry["task"])
        counts = [str(entry["positives"]), str(entry["positive_groups"])]
        published = (number(known.get(column)) for column in columns)
        table.append([entry["task"], *counts, *published, *_model_cells(results, entry["models"], "ap")])
    if dataset["mean"]:
        known = published_mean_ap([(dataset["name"], task) for task in dataset["mean"]["tasks"]])
        table.append(_mean_row(results, dataset["mean"], ["", ""], [number(known.get(c)) for c in columns]))
    return table


def _mean_row(results: Results, mean: Results, counts: list[str], known: list[str]) -> list[str]:
    return [f"mAP, {len(mean['tasks'])} tasks", *counts, *known, *_model_cells(results, mean["models"], "ap")]


def mean_table(results: Results) -> list[list[str]]:
    """mAP over several datasets, beside the published means of just these tasks."""
    means = [mean for mean in (results["mean"], results["complete_mean"]) if mean]
    published = [published_mean_ap([tuple(task.split("/", 1)) for task in mean["tasks"]]) for mean in means]
    columns = columns_beside(results["protocol"]) if any(published) else ()
    table = [["", *columns, *_model_heads(results, "mAP")]]
    for mean, known in zip(means, published, strict=True):
        table.append(_mean_row(results, mean, [], [number(known.get(column)) for column in columns]))
    return table


def binary_table(results: Results, dataset: Results) -> list[list[str]]:
    """What AP does not say: a row for each binary task and model."""
    metrics = ["auroc", "balanced_accuracy", "f1", *(["auroc_by_group"] if results["probe"] == PAPER else [])]
    entries = _measured(dataset, "binary")
    beside = [PUBLISHED_F1] if any(published_f1(dataset["name"], entry["task"]) for entry in entries) else []
    head = ["F1 over folds", *beside, "neighbours AP", "AP between seeds", "AUROC above chance kept %"]
    table = [["task", "model", *(TITLES[name] for name in metrics), *head]]
    for entry in entries:
        for model in models_of(results):
            of_model = entry["models"][model]
            known = published_f1(dataset["name"], entry["task"])
            table.append(
                [
                    *(entry["task"], model_name(results, model)),
                    *(cell(of_model["metrics"].get(name)) for name in metrics),
                    over_folds(of_model["f1_over_folds"]),
                    *([over_folds(known._asdict() if known else None)] if beside else []),
                    *(number(of_model["neighbours"]), between_seeds(of_model, "ap")),
                    cell(of_model["above_chance_percent"], 1) if is_student(results, model) else "",
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
    students = models_of(results, STUDENT)
    table = [["diagnosis", PUBLISHED_F1]]
    for model in models:
        name = model_name(results, model)
        table[0] += [f"{name} F1 over folds", f"{name} F1, pooled"]
    table[0] += [_retained_head(results, model) for model in students]
    for entry in _measured(dataset, "multiclass"):
        for name in entry["classes"]:
            known = published_f1(dataset["name"], name)
            row = [f"{entry['task']}: {name}", over_folds(known._asdict() if known else None)]
            for model in models:
                of_model = entry["models"][model]
                row += [over_folds(of_model["f1_over_folds"][name]), cell(of_model["metrics"][f"f1 {name}"])]
            table.append([*row, *[""] * len(students)])
        for metric in ("macro_f1", "balanced_accuracy", "accuracy"):
            row = [f"{entry['task']}: {TITLES[metric]}", "-"]
            for model in models:
                row += ["", cell(entry["models"][model]["metrics"][metric])]
            is_primary = metric == entry["primary"]
            shares = [cell(entry["models"][model]["retained_percent"], 1) if is_primary else "" for model in students]
            table.append([*row, *shares])
        for model in models:
            score = number(entry["models"][model]["neighbours"])
            table.append([f"{entry['task']}: accuracy of neighbours, {model_name(results, model)}", "-", score])
            table[-1] += [""] * (len(table[0]) - len(table[-1]))
    return table


def quantity_table(results: Results, dataset: Results) -> list[list[str]]:
    """Ridge regression: a row for each task and model."""
    metrics = ("mae", "pearson", "spearman")
    table = [["quantity", "model", *(TITLES[name] for name in metrics), "retained % of Spearman"]]
    for entry in _measured(dataset, "regression"):
        for model in models_of(results):
            share = cell(entry["models"][model]["retained_percent"], 1) if is_student(results, model) else ""
            values = (cell(entry["models"][model]["metrics"][name]) for name in metrics)
            table.append([entry["task"], model_name(results, model), *values, share])
    return table


def is_student(results: Results, model: str) -> bool:
    """Beside a baseline, what is kept of the teacher is not shown."""
    return results["models"][model]["role"] == STUDENT


def title(results: Results) -> str:
    """The head of table and pictures."""
    students = models_of(results, STUDENT)
    names = "the student" if students == [STUDENT] else f"{len(students)} students"
    against = f" and the {model_name(results, TEACHER)}" if TEACHER in results["models"] else ""
    return f"Probes of {names}{against} on {', '.join(data['title'] for data in results['data'])}"


def conclusions(results: Results) -> list[str]:
    """'the student keeps 97.1 % [94.0, 99.8] of the teacher's mAP (0.842 of 0.867)', a line for each student."""
    mean = views(results)[0]["mean"]
    if mean is None:
        return ["no binary task was measured, so there is no mAP"]
    lines = []
    for model in models_of(results, STUDENT):
        name = "the student" if model == STUDENT else model
        ap, share = (mean["models"][model][key] for key in ("metrics", "retained_percent"))
        if share is None:
            lines.append(f"{name} has an mAP of {cell(ap['ap'])}; what it keeps of a teacher was not measured")
            continue
        teacher = mean["models"][TEACHER]["metrics"]["ap"]["value"]
        values = f"{ap['ap']['value']:.3f} of {teacher:.3f}"
        kept = "{value:.1f} % [{low:.1f}, {high:.1f}]".format(**share)
        lines.append(f"{name} keeps {kept} of the {model_name(results, TEACHER)}'s mAP ({values})")
    return lines


def one_screen(results: Results) -> str:
    """What is printed at the end: a line for each dataset's mAP and for each other task, then the result in words.

    All of the main protocol; of the others the mAP. Only a student that is alone has its interval here, so that a line
    fits on a terminal.
    """
    models, students = models_of(results), models_of(results, STUDENT)
    heads = [_retained_head(results, student) for student in students]
    table = [["", *(model_name(results, model) for model in models), *heads]]

    def add(label: str, of_models: Mapping[str, Results], metric: str) -> None:
        alone = len(students) == 1
        found = {model: of_models[model]["metrics"][metric] for model in models}
        values = (cell(found[m]) if alone and m in students else number(found[m]["value"]) for m in models)
        kept = [of_models[student]["retained_percent"] for student in students]
        shares = [cell(share, 1) if alone or not share else f"{share['value']:.1f}" for share in kept]
        table.append([label, *values, *shares])

    main, *others = views(results)
    for dataset in main["datasets"]:
        if dataset["mean"]:
            tasks = f"mAP, {len(dataset['mean']['tasks'])} tasks"
            add(f"{dataset['label']}: {tasks}", dataset["mean"]["models"], "ap")
        for entry in _measured(dataset):
            if entry["kind"] != "binary":
                add(
                    f"{dataset['label']}: {entry['task']}, {TITLES[entry['primary']]}",
                    entry["models"],
                    entry["primary"],
                )
    for view in others:
        if view["mean"]:
            add(f"mAP of all, {view['protocol']}", view["mean"]["models"], "ap")
    lines = [*aligned(table), ""]
    if results["problems"]:
        count = len(results["problems"])
        lines.append(f"{count} {'problem' if count == 1 else 'problems'}; table.md names them all")
    return "\n".join([*lines, *conclusions(results)]) + "\n"
