"""What each evaluation dataset says of its rows: from look-alikes in the official layouts, with the traps of each."""

import lookalikes
import numpy as np
import pytest
from lookalikes import VIDEOS, positives, sound, sounds_of

from hear_distill.audio import decode
from hear_distill.eval_datasets import load_dataset
from hear_distill.flusense import recording_of
from hear_distill.probes import NotMeasurable
from hear_distill.splits import Rows, plan_of
from hear_distill.tasks import GROUPED, TEST, TRAIN, DatasetError, band_passed

# FSD50K


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    return lookalikes.write_fsd50k_archives(tmp_path_factory.mktemp("fsd50k"))


def test_fsd50k_is_fitted_on_train_and_val_and_tested_on_eval_with_uploaders_as_groups(archives):
    dataset = load_dataset(f"fsd50k={archives}")

    clips = sorted(lookalikes.fsd50k_clips(), key=lambda clip: clip["part"] == "eval")  # as the folders are read
    assert dataset.split_names == ("official",) and dataset.event == "peak" and not dataset.is_ungrouped
    assert dataset.splits["official"].parts.tolist() == [TEST if c["part"] == "eval" else TRAIN for c in clips]
    assert dataset.groups.tolist() == [c["uploader"] for c in clips]
    assert dataset.problems == {} and dataset.notes == []
    assert [len(samples) for samples in sounds_of(dataset)] == [4000] * 70


def test_fsd50k_labels_are_whole_names_and_classes_include_what_is_a_kind_of_them(archives):
    dataset = load_dataset(f"fsd50k={archives}")

    clips = sorted(lookalikes.fsd50k_clips(), key=lambda clip: clip["part"] == "eval")
    kinds = np.array([clip["kind"] for clip in clips])
    expected = {
        "Breathing": [2],
        "Cough": [0],
        "Laughter": [3],  # a giggle
        "Respiratory sounds": [0, 1, 2],
        "Sneeze": [1],
        "Speech": [4],  # a man's; not 5, a synthesizer
    }
    for task, right in expected.items():
        assert positives(dataset, task).tolist() == np.flatnonzero(np.isin(kinds, right)).tolist(), task
        assert dataset.tasks[task].takes_part.all()


def test_fsd50k_labels_that_are_not_propagated_upwards_are_noticed(tmp_path):
    folder = lookalikes.write_fsd50k_archives(tmp_path)
    dev = folder / "FSD50K.ground_truth" / "dev.csv"
    dev.write_text(dev.read_text().replace('"Cough,Respiratory_sounds"', "Cough"))

    dataset = load_dataset(f"fsd50k={folder}")

    assert (
        "8 clips, such as 1000, have a label that is a kind of Respiratory_sounds"
        in dataset.problems["Respiratory sounds"]
    )
    assert "Respiratory sounds" not in dataset.tasks and len(positives(dataset, "Cough")) == 10


def test_an_unknown_fsd50k_label_is_named_counted_and_its_clip_is_no_negative(tmp_path):
    dataset = load_dataset(f"fsd50k={lookalikes.write_fsd50k_archives(tmp_path, unknown='Caugh')}")

    assert dataset.problems == {"label 'Caugh'": "not in vocabulary.csv; the 1 clips that have it are left out"}
    assert [task.takes_part.sum() for task in dataset.tasks.values()] == [69] * 6


def test_a_clip_in_dev_and_eval_is_refused(tmp_path):
    folder = lookalikes.write_fsd50k_archives(tmp_path, twice=True)
    with pytest.raises(DatasetError, match=r"clip 1000 of FSD50K is in dev.csv and in eval.csv"):
        load_dataset(f"fsd50k={folder}")


def test_an_uploader_in_dev_and_eval_is_refused(tmp_path):
    folder = lookalikes.write_fsd50k_archives(tmp_path)
    info = folder / "FSD50K.metadata" / "eval_clips_info_FSD50K.json"
    info.write_text(info.read_text().replace("eval person 3", "dev person 3"))
    with pytest.raises(
        DatasetError, match=r"1 uploaders of fsd50k .* split official, such as dev person 3 in test and tr"
    ):
        load_dataset(f"fsd50k={folder}")


def test_a_missing_label_file_is_named_and_a_missing_column_as_well(tmp_path):
    folder = lookalikes.write_fsd50k_archives(tmp_path)
    (folder / "FSD50K.ground_truth" / "eval.csv").write_text("fname,mids\n1,/m/0\n")
    with pytest.raises(DatasetError, match=r"eval.csv has no column labels; found fname, mids"):
        load_dataset(f"fsd50k={folder}")
    (folder / "FSD50K.ground_truth" / "eval.csv").unlink()
    with pytest.raises(
        DatasetError, match=r"no eval.csv among the labels of FSD50K\n  fetch it elsewhere:  hf download"
    ):
        load_dataset(f"fsd50k={folder}")


# FluSense


def test_flusense_labels_lose_blanks_and_capitals_and_rows_of_one_video_are_one_group(tmp_path):
    rows = lookalikes.flusense_rows()
    dataset = load_dataset(f"flusense={lookalikes.write_flusense(tmp_path / 'train.parquet', rows)}")

    kept = [(label, name) for label, name, _ in rows if label.strip()]
    expected = [decode(data) for label, _, data in rows if label.strip()]
    assert all(np.array_equal(one, other) for one, other in zip(sounds_of(dataset), expected, strict=True))
    assert dataset.groups.tolist() == [name[:11] for _, name in kept]
    assert set(dataset.groups) == set(VIDEOS)
    for task, label in (("Cough", "cough"), ("Speech", "speech"), ("Sneeze", "sneeze"), ("Breathing", "breathe")):
        assert positives(dataset, task).tolist() == [
            i for i, (raw, _) in enumerate(kept) if raw.strip().lower() == label
        ]
    assert dataset.notes == ["6 intervals without a label are left out"]
    assert dataset.problems == {} and not dataset.is_ungrouped


def test_flusense_labels_may_be_numbers_of_classes(tmp_path):
    rows = lookalikes.flusense_rows()
    text = load_dataset(f"flusense={lookalikes.write_flusense(tmp_path / 'a.parquet', rows)}")
    numbers = load_dataset(f"flusense={lookalikes.write_flusense(tmp_path / 'b.parquet', rows, as_classes=True)}")

    assert {task: positives(text, task).tolist() for task in text.tasks} == {
        task: positives(numbers, task).tolist() for task in numbers.tasks
    }


def test_a_flusense_table_that_names_its_groups_is_grouped_by_them_even_if_they_hardly_repeat(tmp_path):
    rows = [(label, f"cough_{i:05}.wav", data) for i, (label, _, data) in enumerate(lookalikes.flusense_rows())]
    groups = [f"speaker {i // 2}" if i else "" for i in range(len(rows))]
    dataset = load_dataset(f"flusense={lookalikes.write_flusense(tmp_path / 'a.parquet', rows, groups=groups)}")
    named = {str(group) for group in dataset.groups if str(group).startswith("speaker")}
    assert len(named) > len(dataset.groups) / 2 - 2 and dataset.groups[1] == "speaker 0"
    assert dataset.is_ungrouped and any("1 rows do not tell" in note for note in dataset.notes)


@pytest.mark.parametrize(
    "name",
    [lambda i: None, lambda i: f"cough_{i:05d}.wav", lambda i: f"{i:011d}.wav", lambda i: f"{i:03d}aBcDeFgH_1.wav"],
    ids=["no names", "labels and numbers", "numbers", "never the same twice"],
)
def test_flusense_rows_that_name_no_recording_are_marked(tmp_path, name):
    rows = [(label, name(i), data) for i, (label, _, data) in enumerate(lookalikes.flusense_rows())]
    dataset = load_dataset(f"flusense={lookalikes.write_flusense(tmp_path / 'train.parquet', rows)}")

    assert dataset.is_ungrouped
    assert any(note.startswith("ungrouped: leakage possible; 90 rows") for note in dataset.notes)
    assert len(set(dataset.groups)) == 90


@pytest.mark.parametrize(
    ("path", "recording"),
    [
        ("-05BfY5CzE0_30.000_40.000.wav", "-05BfY5CzE0"),
        ("flusense/-05BfY5CzE0.wav", "-05BfY5CzE0"),
        ("audio/a_b-c_d-e_f/cough_3.wav", "a_b-c_d-e_f"),
        ("cough_00012.wav", ""),
        ("abcdefghijklmnop.wav", ""),
        ("", ""),
    ],
)
def test_a_recording_is_told_by_the_video_in_its_name(path, recording):
    assert recording_of(path) == recording


def test_an_unknown_flusense_label_is_named_counted_and_left_out(tmp_path):
    rows = [*lookalikes.flusense_rows(), *[("caugh", f"{VIDEOS[0]}_9.wav", sound(500 + i)) for i in range(3)]]
    dataset = load_dataset(f"flusense={lookalikes.write_flusense(tmp_path / 'train.parquet', rows)}")

    assert list(dataset.problems) == ["label 'caugh'"]
    assert dataset.problems["label 'caugh'"].startswith(
        "unknown; its 3 rows are left out; expected one of breathe, burp"
    )
    assert len(dataset.groups) == 90


def test_flusense_text_grids_give_two_seconds_around_a_short_event_and_long_ones_as_they_are(tmp_path):
    grids = {VIDEOS[0]: [(0, 0.4, "cough "), (0.4, 4, "etc"), (4, 4.5, "sneeze"), (4.5, 6, "")]}
    grids[VIDEOS[1]] = [(0, 0.5, "Speech"), (0.5, 1, "gasp")]
    samples = {}
    for seed, (video, intervals) in enumerate(grids.items()):
        data = sound(seed, intervals[-1][1], kind="WAV")
        samples[video] = decode(data)
        (tmp_path / f"{video}.wav").write_bytes(data)
        lookalikes.write_text_grid(tmp_path / f"{video}.TextGrid", intervals)

    dataset = load_dataset(f"flusense={tmp_path}")

    first, second = samples[VIDEOS[0]], samples[VIDEOS[1]]
    found = sounds_of(dataset)
    expected = [first[:32000], first[6400:64000], first[52000:84000], second, second]
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))
    assert dataset.groups.tolist() == [VIDEOS[0]] * 3 + [VIDEOS[1]] * 2
    assert positives(dataset, "Cough").tolist() == [0] and positives(dataset, "Gasp").tolist() == [4]
    assert "widened to 2 s" in dataset.preprocessing and "1 intervals without a label are left out" in dataset.notes


# Coswara


def test_coswara_has_the_coughs_and_asks_each_task_of_those_who_answered(tmp_path):
    dataset = load_dataset(f"coswara={lookalikes.write_coswara(tmp_path / 'audio.parquet')}")

    person = np.repeat(np.arange(14), 2)
    assert dataset.groups.tolist() == [f"person{i:022d}" for i in person]
    assert positives(dataset, "covid").tolist() == np.flatnonzero(np.isin(person % 7, [1, 3, 6])).tolist()
    assert (~dataset.tasks["covid"].takes_part).tolist() == (person % 7 == 4).tolist()
    assert positives(dataset, "sex").tolist() == np.flatnonzero((person % 3 == 0) & (person < 13)).tolist()
    assert dataset.tasks["sex"].takes_part.tolist() == (person < 13).tolist()
    age = dataset.tasks["age"]
    assert age.kind == "regression" and age.labels[age.takes_part].tolist() == (20.0 + person[person < 13]).tolist()
    assert "covid: rows that do not take part: recovered_full 4" in dataset.notes
    assert "other sounds than coughs: breathing-deep 14" in dataset.notes


def test_who_smokes_comes_from_the_official_table_beside_the_files(tmp_path):
    lookalikes.write_coswara(tmp_path / "audio.parquet")
    assert "curl -LO" in load_dataset(f"coswara={tmp_path}").problems["smoking"]

    rows = [{"id": f"person{i:022d}", "a": 1, "smoker": ("y", "n", "")[i % 3]} for i in range(14)]
    lookalikes.write_csv(tmp_path / "combined_data.csv", rows)
    dataset = load_dataset(f"coswara={tmp_path}")

    person = np.repeat(np.arange(14), 2)
    assert dataset.problems == {}
    assert positives(dataset, "smoking").tolist() == np.flatnonzero(person % 3 == 0).tolist()
    assert dataset.tasks["smoking"].takes_part.tolist() == (person % 3 != 2).tolist()


def test_a_missing_column_costs_coswara_one_task_and_an_unknown_answer_its_rows(tmp_path):
    genders = ["male", "female"] * 6 + ["man", "man"]
    path = lookalikes.write_coswara(tmp_path / "audio.parquet", without=["age"], gender=genders)
    dataset = load_dataset(f"coswara={path}")

    assert dataset.problems["age"].startswith("no column age")
    assert dataset.problems["sex 'man'"].startswith(
        "unknown; its 4 rows do not take part; expected one of male, female"
    )
    assert set(dataset.tasks) == {"covid", "sex"} and dataset.tasks["sex"].takes_part.sum() == 24


def test_the_same_cough_in_two_files_is_taken_once(tmp_path):
    for name in ("audio", "default"):
        lookalikes.write_coswara(tmp_path / name / "train.parquet")
    dataset = load_dataset(f"coswara={tmp_path}")

    assert len(dataset.groups) == 28
    assert "28 coughs are there again, of the same participant and kind, and are left out" in dataset.notes


def test_a_regression_needs_as_many_groups_that_answered_as_there_are_folds(tmp_path):
    ages = [20, 21, 22, 23] + [None] * 10
    dataset = load_dataset(f"coswara={lookalikes.write_coswara(tmp_path / 'audio.parquet', age=ages)}")

    with pytest.raises(NotMeasurable, match="4 groups with 4 values, at least 5 of each needed"):
        plan_of(dataset.tasks["age"], Rows(groups=dataset.groups), 0)


# ICBHI


@pytest.mark.parametrize("diagnosis", ["ICBHI_Challenge_diagnosis.txt", "patient_diagnosis.csv"])
def test_icbhi_rows_are_cycles_with_the_diagnosis_of_their_patient(tmp_path, diagnosis):
    dataset = load_dataset(f"icbhi={lookalikes.write_icbhi(tmp_path / 'icbhi', diagnosis)}")

    patients = sorted(lookalikes.ICBHI_PATIENTS)
    task = dataset.tasks["diagnosis"]
    assert dataset.groups.tolist() == [patient for patient in patients for _ in range(6)]
    assert task.labels.tolist() == [lookalikes.ICBHI_PATIENTS[patient] for patient in dataset.groups]
    assert task.takes_part.tolist() == [label not in ("Asthma", "LRTI") for label in task.labels]
    plan = plan_of(task, Rows(groups=dataset.groups), 0)
    assert plan.left_out == {"Pneumonia": "groups that hold this label: 1, at least 5 needed"}
    assert dataset.split_names == (GROUPED, "official")


def test_icbhi_sounds_are_filtered_as_a_whole_and_then_cut(tmp_path):
    folder = lookalikes.write_icbhi(tmp_path / "icbhi")
    dataset = load_dataset(f"icbhi={folder}")

    found = sounds_of(dataset)
    first = sorted(folder.rglob("*.wav"))[0]
    whole = band_passed(decode(first.read_bytes()), (50.0, 2000.0))
    expected = [whole[576:9264], whole[9264:39200], whole[39200:46288]]
    assert all(np.array_equal(one, other) for one, other in zip(found[:3], expected, strict=True))
    assert dataset.preprocessing.startswith("band-pass 50 to 2000 Hz") and "breathing cycle" in dataset.preprocessing


def test_the_official_icbhi_split_loses_the_training_recordings_of_the_two_patients_it_tears(tmp_path):
    dataset = load_dataset(f"icbhi={lookalikes.write_icbhi(tmp_path / 'icbhi')}")

    parts = dataset.splits["official"].parts.reshape(-1, 3)[:, 0]  # of each recording
    patients = dataset.groups.reshape(-1, 3)[:, 0]
    for patient in set(patients):
        expected = ["", TEST] if patient in ("156", "218") else [TEST if int(patient) % 3 == 0 else TRAIN] * 2
        assert parts[patients == patient].tolist() == expected, patient
    assert any("2 training recordings of the patients 156 and 218 are left out" in note for note in dataset.notes)


def test_another_patient_on_both_sides_of_the_icbhi_split_is_refused(tmp_path):
    folder = lookalikes.write_icbhi(tmp_path / "icbhi")
    split = folder / "ICBHI_challenge_train_test.txt"
    split.write_text(split.read_text().replace("110_1b1_Al_sc_Meditron\ttrain", "110_1b1_Al_sc_Meditron\ttest"))
    with pytest.raises(DatasetError, match=r"1 patients of icbhi .* split official, such as 110 in test and train"):
        load_dataset(f"icbhi={folder}")


@pytest.mark.parametrize("line", ["0.1 0.9 0", "0.1 end 0 0", "\xff"])
def test_an_annotation_that_is_none_is_named_with_its_line(tmp_path, line):
    folder = lookalikes.write_icbhi(tmp_path / "icbhi")
    next(folder.rglob("110_1b1*.txt")).write_bytes(b"0.0 0.1 0 0\n" + line.encode("latin-1") + b"\n")
    with pytest.raises(DatasetError, match=r"(line 2 of .*110_1b1.* expected 4 fields|110_1b1.* is not text in UTF-8)"):
        load_dataset(f"icbhi={folder}")


def test_an_icbhi_recording_without_cycles_is_counted_and_the_others_are_read(tmp_path):
    folder = lookalikes.write_icbhi(tmp_path / "icbhi")
    next(folder.rglob("110_1b1*.txt")).unlink()
    dataset = load_dataset(f"icbhi={folder}")

    assert "1 recordings have no annotated cycle and are left out" in dataset.notes
    assert len(sounds_of(dataset)) == 6 * len(lookalikes.ICBHI_PATIENTS) - 3


def test_icbhi_without_its_split_has_the_grouped_protocol_and_says_how_to_fetch_the_file(tmp_path):
    folder = lookalikes.write_icbhi(tmp_path / "icbhi")
    (folder / "ICBHI_challenge_train_test.txt").unlink()
    dataset = load_dataset(f"icbhi={folder}")

    assert dataset.split_names == (GROUPED,)
    assert any(note.startswith("no official split: curl -LO https://bhichallenge") for note in dataset.notes)


# CirCor


def test_circor_murmurs_are_those_of_the_patient_and_two_numbers_of_one_patient_are_one_group(tmp_path):
    dataset = load_dataset(f"circor={lookalikes.write_circor(tmp_path / 'circor')}")

    numbers = [50_000 + i for i in range(14) for _ in range(3 if i == 1 else 2)]
    assert dataset.groups.tolist() == [str(50_002 if number == 50_013 else number) for number in numbers]
    present = [i for i, number in enumerate(numbers) if number in (50_000, 50_003, 50_006, 50_009, 50_012)]
    assert positives(dataset, "murmur").tolist() == present
    assert (~dataset.tasks["murmur"].takes_part).nonzero()[0].tolist() == [
        i for i, n in enumerate(numbers) if n == 50_004
    ]
    assert plan_of(dataset.tasks["murmur"], Rows(groups=dataset.groups), 0).kind == "binary"


def test_circor_sounds_are_the_annotated_span_or_whole_without_annotation(tmp_path):
    dataset = load_dataset(f"circor={lookalikes.write_circor(tmp_path / 'circor')}")

    lengths = [len(samples) for samples in sounds_of(dataset)]
    assert [i for i, length in enumerate(lengths) if length != 28_000] == [11, 12]  # of patient 50005
    assert lengths[11] == 48_000 and "recordings without annotated cycles, taken whole: 2" in dataset.notes
    assert dataset.preprocessing.startswith("band-pass 25 to 400 Hz")


def test_an_unknown_murmur_is_named(tmp_path):
    dataset = load_dataset(f"circor={lookalikes.write_circor(tmp_path / 'circor', murmur_of_first='Presnt')}")

    expected = "unknown; its 2 recordings do not take part; expected Present, Absent, Unknown"
    assert dataset.problems == {"murmur 'Presnt'": expected}
    with pytest.raises(NotMeasurable, match="groups that hold this label: 4, at least 5 needed"):
        plan_of(dataset.tasks["murmur"], Rows(groups=dataset.groups), 0)
