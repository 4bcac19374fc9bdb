"""Small look-alikes of the evaluation datasets, in the layouts of the real ones; and what tests ask of a Dataset.

Labels, names and traps are those of the real ones (columns, blanks, patients on both sides); the sounds are noise.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow
import soundfile
from pyarrow import parquet

from hear_distill.tasks import Dataset

VOCABULARY = (
    *("Breathing", "Chuckle_and_chortle", "Cough", "Gasp", "Giggle", "Human_voice", "Laughter"),
    *("Male_speech_and_man_speaking", "Respiratory_sounds", "Sneeze", "Speech", "Speech_synthesizer", "Guitar"),
)
FSD50K_LABELS = (
    "Cough,Respiratory_sounds",
    "Sneeze,Respiratory_sounds",
    "Breathing,Respiratory_sounds",
    "Giggle,Laughter,Human_voice",
    "Male_speech_and_man_speaking,Speech,Human_voice",
    "Speech_synthesizer",
    "Guitar",
)
# As the copy on the hub words them: candidates among them, commas inside, parts of words.
FSD50K_TEXTS = (
    "The sounds of Cough",
    "The sounds of Sneeze and Cough drops",
    "The sounds of Breathing",
    "The sounds of Giggle",
    "The sounds of Male speech, man speaking and Babbling",
    "The sounds of Speech synthesizer",
    "The sounds of Guitar",
)
VIDEOS = ("-05BfY5CzE0", "0Lq8wmvGBi0", "a_b-c_d-e_f", "zYxWvUtSrQp", "1cough2_3-4", "QQQQQQQQQQQ")
FLUSENSE_LABELS = (
    *("cough ", " cough", "Cough\t", "speech", " speech", "etc", "etc  ", "breathe", " ", "sneeze"),
    *("gasp", "sniffle", "throat-clearing", "silence", "hiccup", "burp"),
)


def sound(seed: int, seconds: float = 0.25, rate: int = 16_000, kind: str = "FLAC") -> bytes:
    """Noise, another for each seed."""
    samples = np.random.default_rng(seed).uniform(-0.5, 0.5, round(seconds * rate))
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind)
    return buffer.getvalue()


def write_parquet(
    path: Path, columns: Mapping[str, Sequence], classes: Mapping[str, Sequence[str]] | None = None
) -> Path:
    """`columns` as `datasets` writes them, in row groups of three; `classes` are the names of ClassLabel columns."""
    features: dict = {name: {"dtype": "string", "_type": "Value"} for name in columns}
    features["audio"] = {"_type": "Audio"}
    features |= {name: {"names": list(names), "_type": "ClassLabel"} for name, names in (classes or {}).items()}
    table = pyarrow.table(dict(columns))
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path, row_group_size=3)
    return path


def audio_column(sounds: Sequence[bytes | None], paths: Sequence[str | None]) -> list[dict]:
    return [{"bytes": data, "path": path} for data, path in zip(sounds, paths, strict=True)]


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def fsd50k_clips() -> list[dict]:
    """70 clips: id, labels, part (train, val, eval), uploader; uploaders of dev and eval differ."""
    clips = []
    for i in range(70):
        part = ("train", "train", "val", "eval", "train")[i % 5]
        uploader = f"{'eval' if part == 'eval' else 'dev'} person {i // 10}"
        clips.append({"id": 1000 + i, "kind": i % 7, "part": part, "uploader": uploader})
    return clips


def write_fsd50k_labels(labels: Path, metadata: Path, *, unknown: str = "", twice: bool = False) -> None:
    """dev.csv, eval.csv, vocabulary.csv, and who uploaded what. `unknown` is one more label of the first clip."""
    clips = fsd50k_clips()
    rows = {"dev": [], "eval": []}
    for clip in clips:
        text = FSD50K_LABELS[clip["kind"]] + (f",{unknown}" if unknown and clip is clips[0] else "")
        row = {"fname": clip["id"], "labels": text, "mids": "/m/0"}
        if clip["part"] == "eval":
            rows["eval"].append(row)
        else:
            rows["dev"].append({**row, "split": clip["part"]})
    if twice:
        rows["eval"].append({key: rows["dev"][0][key] for key in ("fname", "labels", "mids")})
    for part, some in rows.items():
        write_csv(labels / f"{part}.csv", some)
    (labels / "vocabulary.csv").write_text("".join(f"{i},{label},/m/{i}\n" for i, label in enumerate(VOCABULARY)))
    metadata.mkdir(parents=True, exist_ok=True)
    for part in ("dev", "eval"):
        some = {
            str(c["id"]): {"title": "x", "uploader": c["uploader"]}
            for c in clips
            if (c["part"] == "eval") == (part == "eval")
        }
        (metadata / f"{part}_clips_info_FSD50K.json").write_text(json.dumps(some))


def write_fsd50k_hub(folder: Path) -> tuple[Path, Path]:
    """The copy with the audio, whose splits are others, and the one with the labels, which lacks one of the clips."""
    clips = [*fsd50k_clips(), {"id": 999_999, "kind": 0}]
    for split, some in {"train": clips[:40], "validation": clips[40:50], "test": clips[50:]}.items():
        write_parquet(
            folder / "audio" / "data" / f"{split}-00000-of-00001.parquet",
            {
                "index": [f"/data/fsd50k/{clip['id']}.flac" for clip in some],
                "datasetname": ["fsd50k"] * len(some),
                "audio": audio_column([sound(clip["id"]) for clip in some], [f"{clip['id']}.flac" for clip in some]),
                "audio_len": [0.25] * len(some),
                "text": [FSD50K_TEXTS[clip["kind"]] for clip in some],
                "raw_text": [[FSD50K_TEXTS[clip["kind"]]] for clip in some],
            },
        )
    write_fsd50k_labels(folder / "labels" / "labels", folder / "labels" / "metadata")
    return folder / "audio", folder / "labels"


def write_fsd50k_archives(folder: Path, **labels) -> Path:
    """The official archives, unpacked."""
    for clip in fsd50k_clips():
        home = folder / f"FSD50K.{'eval' if clip['part'] == 'eval' else 'dev'}_audio"
        home.mkdir(parents=True, exist_ok=True)
        (home / f"{clip['id']}.wav").write_bytes(sound(clip["id"], rate=44_100, kind="WAV"))
    write_fsd50k_labels(folder / "FSD50K.ground_truth", folder / "FSD50K.metadata", **labels)
    return folder


def flusense_rows(num_rows: int = 96) -> list[tuple[str, str, bytes]]:
    """(raw label, name of the sound, sound): sixteen kinds of labels in each of six videos."""
    per_video = num_rows // len(VIDEOS)
    return [
        (FLUSENSE_LABELS[i % len(FLUSENSE_LABELS)], f"{VIDEOS[i // per_video]}_30.000_{i % per_video}.wav", sound(i))
        for i in range(num_rows)
    ]


def write_flusense(
    path: Path,
    rows: Sequence[tuple[str, str | None, bytes]],
    as_classes: bool = False,
    groups: Sequence[str] | None = None,
) -> Path:
    labels, names, sounds = zip(*rows, strict=True)
    classes = {"label": sorted(set(labels))} if as_classes else {}
    column = [classes["label"].index(label) for label in labels] if as_classes else list(labels)
    more = {"group": list(groups)} if groups else {}
    return write_parquet(path, {"audio": audio_column(sounds, names), "label": column, **more}, classes)


def write_text_grid(path: Path, intervals: Sequence[tuple[float, float, str]]) -> None:
    """As praat writes it."""
    end = intervals[-1][1]
    lines = [
        'File type = "ooTextFile"',
        'Object class = "TextGrid"',
        "",
        "xmin = 0",
        f"xmax = {end}",
        "tiers? <exists>",
    ]
    lines += ["size = 1", "item []:", "    item [1]:", '        class = "IntervalTier"', '        name = "words"']
    lines += ["        xmin = 0", f"        xmax = {end}", f"        intervals: size = {len(intervals)}"]
    for i, (begin, stop, label) in enumerate(intervals, 1):
        lines += [f"        intervals [{i}]:", f"            xmin = {begin} ", f"            xmax = {stop} "]
        lines += [f'            text = "{label}" ']
    path.write_text("\n".join(lines) + "\n")


COSWARA_STATUS = (
    "healthy",
    "positive_mild",
    "healthy",
    "positive_asymp",
    "recovered_full",
    "healthy",
    "positive_moderate",
)


def write_coswara(path: Path, *, without: Sequence[str] = (), **replaced: Sequence) -> Path:
    """14 participants with three sounds each; `replaced` columns are given by participant."""
    people = [f"person{i:022d}" for i in range(14)]
    kinds = ("cough-heavy", "breathing-deep", "cough-shallow")
    of_people = {
        "covid_status": [COSWARA_STATUS[i % 7] for i in range(14)],
        "age": [20 + i for i in range(13)] + [None],
        "gender": [("male", "female", "female")[i % 3] for i in range(13)] + ["other"],
        **replaced,
    }
    rows = [(person, kind) for person in range(14) for kind in kinds]
    columns = {
        "participant_id": [people[person] for person, _ in rows],
        "audio_type": [kind for _, kind in rows],
        "audio": audio_column([sound(i) for i in range(len(rows))], [f"{kind}.wav" for _, kind in rows]),
        "quality_score": [2] * len(rows),
        **{name: [values[person] for person, _ in rows] for name, values in of_people.items()},
    }
    return write_parquet(path, {name: values for name, values in columns.items() if name not in without})


ICBHI_PATIENTS = {
    **{str(110 + i): ("Healthy", "COPD")[i % 2] for i in range(14)},
    **{"156": "COPD", "218": "COPD", "226": "Pneumonia", "103": "Asthma", "108": "LRTI"},
}


def write_icbhi(folder: Path, diagnosis: str = "ICBHI_Challenge_diagnosis.txt", more_split: str = "") -> Path:
    """The official archive and the two files beside it: two recordings a patient, three cycles each."""
    home = folder / "ICBHI_final_database"
    home.mkdir(parents=True)
    split = []
    for patient in ICBHI_PATIENTS:
        for index in (1, 2):
            name = f"{patient}_{index}b1_{'Al' if index == 1 else 'Tc'}_{'sc' if index == 1 else 'mc'}_Meditron"
            is_renamed = patient == "226" and index == 1
            stem = name.replace("Meditron", "LittC2SE") if is_renamed else name
            (home / f"{stem}.wav").write_bytes(sound(int(patient) * 10 + index, 3.0, 4000, "WAV"))
            (home / f"{stem}.txt").write_text("0.036\t0.579\t0\t0\n0.579\t2.45\t1\t0\n2.45\t2.893\t0\t1\n")
            is_test = index == 2 if patient in ("156", "218") else int(patient) % 3 == 0
            split.append(f"{name}\t{'test' if is_test else 'train'}\n")
    separator = "," if diagnosis.endswith(".csv") else "\t"
    (folder / diagnosis).write_text(
        "".join(f"{patient}{separator}{label}\n" for patient, label in ICBHI_PATIENTS.items())
    )
    (folder / "ICBHI_challenge_train_test.txt").write_text("".join(split) + more_split)
    (folder / "filename_format.txt").write_text("1. Patient number\n")
    return folder


def write_circor(folder: Path, murmur_of_first: str = "Present") -> Path:
    """PhysioNet's folder: 14 patients, the last of which is the third, come again; one murmur is unknown."""
    home = folder / "training_data"
    home.mkdir(parents=True)
    rows = []
    for i in range(14):
        patient = 50_000 + i
        murmur = ("Present", "Absent", "Absent")[i % 3] if i < 13 else "Absent"
        murmur = murmur_of_first if i == 0 else "Unknown" if i == 4 else murmur
        other = {2: 50_013, 13: 50_002}.get(i, "")
        rows.append({"Patient ID": patient, "Recording locations:": "AV+MV", "Murmur": murmur})
        rows[-1] |= {
            "Murmur locations": "AV" if murmur == "Present" else "",
            "Additional ID": f"{other}.0" if other else "",
        }
        for place in ("AV", "MV_1", "MV_2") if i == 1 else ("AV", "Phc"):
            stem = f"{patient}_{place}"
            (home / f"{stem}.wav").write_bytes(sound(patient + len(place) * 7 + ord(place[-1]), 3.0, 4000, "WAV"))
            (home / f"{stem}.hea").write_text(f"{stem} 1 4000 12000\n")
            states = [(0, 0.5, 0), (0.5, 1.0, 1), (1.0, 1.5, 2), (1.5, 2.25, 3), (2.25, 3, 0)]
            lines = [f"{begin}\t{end}\t{state if i != 5 else 0}\n" for begin, end, state in states]
            (home / f"{stem}.tsv").write_text("".join(lines))
    write_csv(folder / "training_data.csv", rows)
    return folder


def positives(dataset: Dataset, task: str) -> np.ndarray:
    """Rows that are positive and take part."""
    found = dataset.tasks[task]
    return np.flatnonzero(found.labels & found.takes_part)


def sounds_of(dataset: Dataset) -> list:
    """What recordings() gives, in the order of the rows; each row once."""
    found = dict(dataset.recordings())
    assert sorted(found) == list(range(len(dataset.groups)))
    return [found[row] for row in range(len(dataset.groups))]
