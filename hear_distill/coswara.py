"""Coswara: coughs of 2,635 people, with what they told about themselves; four tasks.

in:   szzs1693/coswara-data (columns audio, audio_type, participant_id, covid_status, gender, age ...); or a folder
out:  Dataset of the coughs (cough-heavy and cough-shallow), folds by participant

Whether somebody smokes is in the table of the official release (combined_data.csv, columns id and smoker), and not in
the columns of the hub's copy that we know of. Put that file beside local Parquet files, and the task is there.

r rows, one per cough recording
"""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow

from hear_distill.hub_files import by_hand, fetch_parquet
from hear_distill.tabular import ParquetRows, counted, find_files, find_one, find_parquet, opened, read_csv, revision_of
from hear_distill.tasks import Dataset, DatasetError, Task

NAME = "coswara"
HUB = "szzs1693/coswara-data"
COUGHS = ("cough-heavy", "cough-shallow")
OTHER_SOUNDS = (
    *("breathing-deep", "breathing-shallow", "counting-fast", "counting-normal"),
    *("vowel-a", "vowel-e", "vowel-o"),
)
# Values of each column by what they mean: True, False, or None for an answer that the task does not ask about.
ANSWERS: dict[str, dict[str, bool | None]] = {
    "covid": {
        **dict.fromkeys(("positive_mild", "positive_moderate", "positive_asymp"), True),
        "healthy": False,
        **dict.fromkeys(
            ("no_resp_illness_exposed", "resp_illness_not_identified", "recovered_full", "under_validation"), None
        ),
    },
    "sex": {"male": True, "female": False, "other": None},
    "smoking": {"y": True, "yes": True, "true": True, "n": False, "no": False, "false": False},
}
COLUMNS = {
    "covid": ("covid_status",),
    "sex": ("gender", "sex"),
    "smoking": ("smoker", "smoking", "smoking_status"),
    "age": ("age",),
}
OFFICIAL = "combined_data.csv"
OFFICIAL_COLUMNS = {"covid": "covid_status", "sex": "g", "smoking": "smoker", "age": "a"}
FETCH_OFFICIAL = f"curl -LO https://raw.githubusercontent.com/iiscleap/Coswara-Data/master/{OFFICIAL}"
MAX_AGE = 120


def load(place: Path | None) -> Dataset:
    """The dataset from the hub (None), a folder or a Parquet file. Raises DatasetError."""
    if place is None:
        files, revision = fetch_parquet(HUB, NAME)
        official = None
    else:
        files = find_parquet(place)
        official = find_one(find_files(place), OFFICIAL) if place.is_dir() else None
        revision = revision_of([*files, *([official] if official else [])])
    sounds = [path for path in files if _has_audio(path)]
    if not sounds:
        raise DatasetError(f"no Parquet file with a column audio in {place or HUB}{by_hand(HUB, NAME)}")
    rows = ParquetRows(sounds)
    kept, notes, problems = _coughs(rows)
    people = rows.text("participant_id")
    answers = {task: _answers(task, rows, people, official) for task in COLUMNS}
    tasks = {}
    for task, values in answers.items():
        if values is None:
            hint = f"; it is in the official table: {FETCH_OFFICIAL}" if official is None else f", nor in {official}"
            problems[task] = f"no column {' or '.join(COLUMNS[task])}{hint}"
            continue
        tasks[task] = _task(task, [values[i] for i in kept], notes, problems)
    nameless = sum(not people[i] for i in kept)
    if nameless:
        raise DatasetError(f"{nameless} coughs of Coswara name no participant_id; expected one in every row")
    return Dataset(
        name=NAME,
        title="Coswara, coughs, folds by participant",
        revision=revision,
        event="centre",
        group_word="participant",
        groups=np.array([people[i] for i in kept], dtype=str),
        tasks=tasks,
        read=lambda: rows.read(np.array(kept, dtype=int)),
        notes=notes,
        problems=problems,
    )


def _has_audio(path: Path) -> bool:
    """The other configurations of the dataset have none."""
    with opened(path) as file:
        return "audio" in file.schema_arrow.names and pyarrow.types.is_struct(file.schema_arrow.field("audio").type)


def _coughs(rows: ParquetRows) -> tuple[list[int], list[str], dict[str, str]]:
    """Positions of the coughs, each once; notes about other sounds, problems of unknown ones."""
    kinds, people = [kind.lower() for kind in rows.text("audio_type")], rows.text("participant_id")
    first: dict[tuple[str, str], int] = {}
    for position, (kind, person) in enumerate(zip(kinds, people, strict=True)):
        if kind in COUGHS:
            first.setdefault((person, kind), position)
    again = sum(kind in COUGHS for kind in kinds) - len(first)
    unknown = Counter(kind for kind in kinds if kind not in (*COUGHS, *OTHER_SOUNDS))
    notes = [f"other sounds than coughs: {counted(Counter(kind for kind in kinds if kind in OTHER_SOUNDS))}"]
    if again:
        notes.append(f"{again} coughs are there again, of the same participant and kind, and are left out")
    problems = {f"audio_type {kind!r}": f"unknown; its {count} rows are left out" for kind, count in unknown.items()}
    return sorted(first.values()), notes, problems


def _answers(task: str, rows: ParquetRows, people: list[str], official: Path | None) -> list[str] | None:
    """[rows of the files] what each participant answered, from the rows themselves or from the official table."""
    column = next((name for name in COLUMNS[task] if name in rows.names), None)
    if column:
        return rows.text(column)
    if official is None:
        return None
    table = read_csv(official, ["id"])
    name = OFFICIAL_COLUMNS[task]
    if not table or name not in table[0]:
        return None
    by_person = {row["id"]: row.get(name, "") for row in table}
    return [by_person.get(person, "") for person in people]


def _task(task: str, values: list[str], notes: list[str], problems: dict[str, str]) -> Task:
    """A task from the answers [r]. Those that do not take part are counted in the notes, unknown ones in problems."""
    if task == "age":
        ages = np.array([float(value) if _is_number(value) else np.nan for value in values])
        takes_part = (ages >= 0) & (ages <= MAX_AGE)
        if not takes_part.all():
            notes.append(f"age: {int((~takes_part).sum())} rows without an age between 0 and {MAX_AGE}")
        return Task(kind="regression", labels=ages, takes_part=takes_part)
    meaning = ANSWERS[task]
    found = [value.lower() for value in values]
    unasked = Counter(value for value in found if value == "" or (value in meaning and meaning[value] is None))
    unknown = Counter(value for value in found if value and value not in meaning)
    if unasked:
        notes.append(f"{task}: rows that do not take part: {counted(unasked)}")
    for value, count in unknown.items():
        expected = ", ".join(meaning)
        problems[f"{task} {value!r}"] = f"unknown; its {count} rows do not take part; expected one of {expected}"
    return Task(
        kind="binary",
        labels=np.array([meaning.get(value) is True for value in found], dtype=bool),
        takes_part=np.array([meaning.get(value) is not None for value in found], dtype=bool),
    )


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdecimal()
