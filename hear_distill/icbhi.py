"""ICBHI 2017: 920 lung recordings of 126 patients, with their breathing cycles; the task is the patient's diagnosis.

in:   the official folder: <patient>_<index>_<place>_<mode>_<device>.wav with .txt, ICBHI_Challenge_diagnosis.txt (or
      patient_diagnosis.csv) and ICBHI_challenge_train_test.txt
out:  Dataset: one row per annotated cycle; folds by patient, and the official 60/40 split

The official split is by recording, not by patient as is often said: patients 156 and 218 are on both sides. Their
training recordings are left out of that split, and the test part stays what it is. One recording is listed with
another device than it has on the disk, so names are compared without the device.

r rows, one per cycle
"""

import re
from collections import Counter
from pathlib import Path

import numpy as np

from hear_distill.tabular import (
    counted,
    find_files,
    find_one,
    read_fields,
    read_pairs,
    read_sounds,
    revision_of,
    sounds_in,
)
from hear_distill.tasks import GROUPED, NEITHER, TEST, TRAIN, Dataset, DatasetError, Split, Task

NAME = "icbhi"
SITE = "https://bhichallenge.med.auth.gr/sites/default/files/ICBHI_final_database"
DIAGNOSES, SPLIT = "ICBHI_Challenge_diagnosis.txt", "ICBHI_challenge_train_test.txt"
DOWNLOAD = (
    f"\n  fetch it:  mkdir -p data/icbhi && cd data/icbhi && for f in ICBHI_final_database.zip {DIAGNOSES} {SPLIT}; "
    f"do curl -LO {SITE}/$f; done && unzip ICBHI_final_database.zip"
    f"\n  then:      python evaluate_distilled_hear.py --dataset icbhi=data/icbhi"
)
RECORDING = re.compile(r"(\d{3}_\w+?_(?:Tc|Al|Ar|Pl|Pr|Ll|Lr)_(?:sc|mc))_\w+", re.IGNORECASE)  # without its device
CLASSES = ("Healthy", "COPD", "URTI", "Bronchiectasis", "Pneumonia", "Bronchiolitis")
TOO_FEW = ("Asthma", "LRTI")  # one patient and two: not in any published table
BAND_HZ = (50.0, 2000.0)  # where lung sounds are; what the published table was made with is not known
TORN_PATIENTS = frozenset({"156", "218"})  # on both sides of the official split


def load(place: Path | None) -> Dataset:
    """The dataset from its official folder. Raises DatasetError, with the command that fetches it."""
    if place is None or not place.is_dir():
        found = "it is not on the hub" if place is None else f"no folder {place}"
        raise DatasetError(f"ICBHI 2017: {found}; expected its official folder as --dataset icbhi=FOLDER{DOWNLOAD}")
    files = find_files(place)
    sounds = {stem: path for stem, path in sounds_in(files).items() if RECORDING.fullmatch(stem)}
    diagnoses = find_one(files, DIAGNOSES, "patient_diagnosis.csv", "patient_diagnosis.txt")
    if not sounds or diagnoses is None:
        raise DatasetError(
            f"{place} has {len(sounds)} recordings named as 101_1b1_Al_sc_Meditron.wav and "
            f"{'a' if diagnoses else 'no'} file {DIAGNOSES}{DOWNLOAD}"
        )
    split = find_one(files, SPLIT)
    notes: list[str] = []
    spans, rows, recordings = _cycles(sounds, files, notes)
    labels, takes_part, problems = _diagnoses(read_pairs(diagnoses), recordings, notes)
    patients = np.array([name[:3] for name in recordings], dtype=str)
    splits = {}
    if split is None:
        notes.append(f"no official split: curl -LO {SITE}/{SPLIT}")
    else:
        splits["official"] = _official(read_pairs(split), recordings, patients, notes)
    annotations = [path for stem in sounds for path in files.get(f"{stem}.txt".lower(), [])]
    return Dataset(
        name=NAME,
        title="ICBHI 2017, diagnosis of the patient, one row per breathing cycle",
        revision=revision_of([*sounds.values(), *annotations, diagnoses, *([split] if split else [])]),
        event="centre",
        group_word="patient",
        groups=patients,
        tasks={"diagnosis": Task(kind="multiclass", labels=labels, takes_part=takes_part)},
        read=lambda: read_sounds(list(sounds.values()), rows),
        splits=splits,
        split_names=(GROUPED, *splits),
        band_hz=BAND_HZ,
        spans_s=np.array(spans).reshape(-1, 2),
        cut="cut to the annotated breathing cycle",
        notes=notes,
        problems=problems,
    )


def _cycles(
    sounds: dict[str, Path], files: dict[str, list[Path]], notes: list[str]
) -> tuple[list[tuple[float, float]], list[range], list[str]]:
    """Begin and end of every cycle in seconds, the rows of each sound, and the recording of each row."""
    spans: list[tuple[float, float]] = []
    rows, recordings, bare = [], [], 0
    for stem in sounds:
        path = find_one(files, f"{stem}.txt")
        first = len(spans)
        for begin, end, _crackles, _wheezes in read_fields(path, 4) if path else []:
            spans.append((float(begin), float(end)))
        bare += first == len(spans)
        rows.append(range(first, len(spans)))
        recordings += [stem] * (len(spans) - first)
    if bare:
        notes.append(f"{bare} recordings have no annotated cycle and are left out")
    return spans, rows, recordings


def _diagnoses(
    of_patient: dict[str, str], recordings: list[str], notes: list[str]
) -> tuple[np.ndarray, np.ndarray, dict[str, str]]:
    """Labels [r], which rows take part [r], and the problems."""
    labels = [of_patient.get(name[:3], "") for name in recordings]
    patients = {name[:3]: label for name, label in zip(recordings, labels, strict=True)}
    rare = Counter(label for label in patients.values() if label in TOO_FEW)
    unknown = Counter(label for label in patients.values() if label not in (*CLASSES, *TOO_FEW))
    if rare:
        notes.append(f"diagnoses of too few patients, left out: {counted(rare)}")
    problems = {
        f"diagnosis {label!r}": f"unknown; its {count} patients do not take part; expected one of {', '.join(CLASSES)}"
        for label, count in unknown.items()
    }
    return np.array(labels, dtype=str), np.isin(labels, CLASSES), problems


def _official(parts_of: dict[str, str], recordings: list[str], patients: np.ndarray, notes: list[str]) -> Split:
    """The official split [r], without the training recordings of the two patients that it tears."""
    known = {}
    for name, part in parts_of.items():
        match = RECORDING.fullmatch(name)
        if not match or part not in (TRAIN, TEST):
            raise DatasetError(f"{SPLIT} has {name!r} as {part!r}; expected a recording, and train or test")
        known[match[1].lower()] = part
    parts = [known.get(RECORDING.fullmatch(name)[1].lower(), NEITHER) for name in recordings]
    tested = {patient for patient, part in zip(patients, parts, strict=True) if part == TEST}
    torn = TORN_PATIENTS & tested
    is_left_out = [p in torn and part == TRAIN for p, part in zip(patients, parts, strict=True)]
    if any(is_left_out):
        names = {name for name, out in zip(recordings, is_left_out, strict=True) if out}
        notes.append(
            f"official split: {len(names)} training recordings of the patients {' and '.join(sorted(torn))} are left "
            f"out of it, as other recordings of theirs are in its test part"
        )
    unlisted = len({name for name, part in zip(recordings, parts, strict=True) if part == NEITHER})
    if unlisted:
        notes.append(f"official split: {unlisted} recordings are not listed in {SPLIT}")
    parts = [NEITHER if out else part for part, out in zip(parts, is_left_out, strict=True)]
    return Split(kind="holdout", parts=np.array(parts, dtype=str))
