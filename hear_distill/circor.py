"""CirCor DigiScope: heart sounds of children, from up to five places of the chest; is there a murmur?

in:   the official folder of PhysioNet, version 1.0.3: training_data.csv, and in training_data/ the recordings
      <patient>_<place>[_<n>].wav with .tsv
out:  Dataset: one row per recording, with the murmur of the patient; folds by patient

Patients who came to both campaigns have two numbers (column Additional ID) and are one group here.

r rows, one per recording
"""

import re
from collections import Counter
from pathlib import Path

import numpy as np

from hear_distill.tabular import find_files, find_one, read_csv, read_fields, read_sounds, revision_of, sounds_in
from hear_distill.tasks import Dataset, DatasetError, Task

NAME = "circor"
DOWNLOAD = (
    "\n  fetch it:  wget -r -N -c -np -P data https://physionet.org/files/circor-heart-sound/1.0.3/"
    "\n  then:      python evaluate_distilled_hear.py --dataset circor=data/physionet.org/files"
)
RECORDING = re.compile(r"(\d+)_(?:AV|PV|TV|MV|Phc)(?:_\d+)?")
MURMUR = {"Present": True, "Absent": False, "Unknown": None}
BAND_HZ = (25.0, 400.0)  # where heart sounds and murmurs are; what the published table was made with is not known


def load(place: Path | None) -> Dataset:
    """The dataset from its official folder. Raises DatasetError, with the command that fetches it."""
    if place is None or not place.is_dir():
        found = "it is not on the hub" if place is None else f"no folder {place}"
        raise DatasetError(
            f"CirCor DigiScope: {found}; expected its official folder as --dataset circor=FOLDER{DOWNLOAD}"
        )
    files = find_files(place)
    table = find_one(files, "training_data.csv")
    sounds = {stem: path for stem, path in sounds_in(files).items() if RECORDING.fullmatch(stem)}
    if table is None or not sounds:
        raise DatasetError(
            f"{place} has {'a' if table else 'no'} training_data.csv and {len(sounds)} recordings{DOWNLOAD}"
        )
    patients = {number(row["Patient ID"]): row for row in read_csv(table, ["Patient ID", "Murmur", "Additional ID"])}
    numbers = [RECORDING.fullmatch(stem)[1] for stem in sounds]
    murmurs = [patients.get(patient, {}).get("Murmur", "") for patient in numbers]
    unknown = Counter(murmur for murmur in murmurs if murmur not in MURMUR)
    notes = [f"recordings of patients whose murmur is Unknown: {murmurs.count('Unknown')}"]
    segments = {stem: find_one(files, f"{stem}.tsv") for stem in sounds}
    spans = [annotated(path) for path in segments.values()]
    if spans.count(None):
        notes.append(f"recordings without annotated cycles, taken whole: {spans.count(None)}")
    same = one_number(patients)
    return Dataset(
        name=NAME,
        title="CirCor DigiScope, murmur of the patient, one row per recording",
        revision=revision_of([table, *sounds.values(), *(path for path in segments.values() if path)]),
        event="centre",
        group_word="patient",
        groups=np.array([same.get(patient, patient) for patient in numbers], dtype=str),
        tasks={
            "murmur": Task(
                kind="binary",
                labels=np.array([MURMUR.get(murmur) is True for murmur in murmurs], dtype=bool),
                takes_part=np.array([MURMUR.get(murmur) is not None for murmur in murmurs], dtype=bool),
            )
        },
        read=lambda: read_sounds(list(sounds.values()), [[row] for row in range(len(sounds))]),
        band_hz=BAND_HZ,
        spans_s=np.array([span or (0.0, np.inf) for span in spans]),
        cut="cut to the span of the annotated heart cycles",
        notes=notes,
        problems={
            f"murmur {value!r}": f"unknown; its {count} recordings do not take part; expected {', '.join(MURMUR)}"
            for value, count in unknown.items()
        },
    )


def number(text: str) -> str:
    """'85119.0' and '85119' are one patient: a column with gaps comes as decimals."""
    return text.removesuffix(".0") if text != "nan" else ""


def one_number(patients: dict[str, dict[str, str]]) -> dict[str, str]:
    """The smaller of the two numbers of a patient, by either."""
    same = {}
    for patient, row in patients.items():
        other = number(row["Additional ID"])
        if other:
            same[patient] = same[other] = min(patient, other, key=int)
    return same


def annotated(path: Path | None) -> tuple[float, float] | None:
    """From the begin of the first annotated state to the end of the last, in seconds; None if there is none.

    Lines of begin, end and state: 1 to 4 are S1, systole, S2 and diastole, 0 is not annotated.
    """
    lines = read_fields(path, 3) if path else []
    states = [(float(begin), float(end)) for begin, end, state in lines if state != "0"]
    return (min(states)[0], max(end for _, end in states)) if states else None
