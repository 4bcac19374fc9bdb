"""Evaluation datasets: tables of anyone's, what all have in common, and what may be wrong with any of them."""

import gc
import tracemalloc

import numpy as np
import pyarrow
import pytest
from lookalikes import audio_column, positives, sound, sounds_of, write_parquet

from hear_distill.audio import decode
from hear_distill.eval_datasets import load_dataset
from hear_distill.tasks import NO_AUDIO, DatasetError, band_passed


def write_labelled(path, **columns):
    everything = {
        "audio": audio_column([sound(i) for i in range(12)], [f"{i}.flac" for i in range(12)]),
        "label": ["cough", "sneeze"] * 6,
        "group": [f"person {i // 2}" for i in range(12)],
    } | columns
    return write_parquet(path, {name: values for name, values in everything.items() if values is not None})


def test_a_table_of_anyones_gives_one_task_per_label_and_its_folds(tmp_path):
    path = write_labelled(tmp_path / "t.parquet", fold=[i // 4 for i in range(12)])
    dataset = load_dataset(f"table={path}")

    assert {task: positives(dataset, task).tolist() for task in dataset.tasks} == {
        "cough": [0, 2, 4, 6, 8, 10],
        "sneeze": [1, 3, 5, 7, 9, 11],
    }
    assert dataset.split_names == ("folds",) and dataset.splits["folds"].parts.tolist() == list("000011112222")
    assert np.array_equal(sounds_of(dataset)[7], decode(sound(7)))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"group": None}, r"has no column group; found audio, label; expected columns audio"),
        ({"audio": None}, r"has no column audio with bytes in it; found label, group"),
        ({"audio": [f"{i}.wav" for i in range(12)]}, r"has no column audio with bytes .* audio as string"),
        ({"label": ["cough", None, " "] * 4}, r"column label of .* is empty in 8 of 12 rows; fill it"),
        ({"label": [["cough"]] * 12}, r"column label of .* is list.* expected one text or number"),
        ({"fold": [0, 1] * 6}, r"6 groups of t.parquet .* split folds, such as person 0 in 0 and 1: .* trained on"),
        ({"fold": [1] * 12}, r"the split folds of t.parquet has the parts 1; expected two folds or more"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused_with_what_was_found(tmp_path, columns, message):
    path = write_labelled(tmp_path / "t.parquet", **columns)
    with pytest.raises(DatasetError, match=message):
        load_dataset(f"table={path}")


def test_a_sound_that_cannot_be_read_is_named_and_the_others_are_given(tmp_path):
    sounds = [sound(0), b"no sound", None, b"", *[sound(i) for i in range(4, 12)]]
    path = write_labelled(tmp_path / "t.parquet", audio=audio_column(sounds, [None] * 12))
    found = sounds_of(load_dataset(f"table={path}"))

    assert [samples for samples in found if isinstance(samples, str)] == ["undecodable", NO_AUDIO, NO_AUDIO]
    assert sum(len(samples) == 4000 for samples in found) == 9


def test_the_same_sound_in_a_second_group_is_left_out_and_within_a_group_it_is_not(tmp_path):
    sounds = [sound(i) for i in range(12)]
    sounds[1], sounds[11] = sounds[0], sounds[2]  # rows 0 and 1 are one person's, 2 and 11 are not
    path = write_labelled(tmp_path / "t.parquet", audio=audio_column(sounds, [None] * 12))
    found = sounds_of(load_dataset(f"table={path}"))

    assert {row: samples for row, samples in enumerate(found) if isinstance(samples, str)} == {
        11: "copy of a sound in another group"
    }


def test_the_revision_changes_with_the_files_and_not_with_their_place(tmp_path):
    first = load_dataset(f"table={write_labelled(tmp_path / 'a' / 't.parquet')}").revision
    moved = load_dataset(f"table={write_labelled(tmp_path / 'b' / 't.parquet')}").revision
    labels = load_dataset(
        f"table={write_labelled(tmp_path / 'c' / 't.parquet', label=['sneeze', 'cough'] * 6)}"
    ).revision
    sounds = [sound(i + 1) for i in range(12)]
    other = write_labelled(tmp_path / "d" / "t.parquet", audio=audio_column(sounds, [f"{i}.flac" for i in range(12)]))

    assert first == moved
    assert len({first, labels, load_dataset(f"table={other}").revision}) == 3


def test_sounds_are_read_one_after_the_other_and_never_all_at_once(tmp_path):
    num_rows, sound_bytes = 60, 1 << 20
    noise = np.random.default_rng(0)
    sounds = [noise.bytes(sound_bytes) for _ in range(num_rows)]
    columns = {"audio": audio_column(sounds, [None] * num_rows), "label": ["a"] * num_rows}
    path = write_parquet(tmp_path / "t.parquet", {**columns, "group": [str(i) for i in range(num_rows)]})
    del sounds, columns
    gc.collect()
    dataset = load_dataset(f"table={path}")
    tracemalloc.start()
    try:
        reasons, arrow_bytes, before = [], 0, pyarrow.total_allocated_bytes()
        for _, found in dataset.recordings():
            reasons.append(found)
            arrow_bytes = max(arrow_bytes, pyarrow.total_allocated_bytes() - before)
        _, python_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert reasons == ["undecodable"] * num_rows
    assert python_bytes < 10 * sound_bytes
    assert arrow_bytes < 20 * sound_bytes  # of 60; a row group has three


def test_a_numbered_set_of_files_with_a_gap_is_refused(tmp_path):
    for number in (0, 2):
        write_labelled(tmp_path / f"train-{number:05d}-of-00003.parquet")
    with pytest.raises(DatasetError, match=r"train-\*.parquet: found 2 of 3 files; fetch the others"):
        load_dataset(f"table={tmp_path}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fsd50k", r"neither Parquet files nor sounds in .*\n  fetch it elsewhere:  hf download CLAPv2/FSD50K"),
        ("flusense", r"has 0 TextGrids and 0 sounds; [\s\S]*hf download vtsouval/flusense"),
        ("coswara", r"no Parquet file with a column audio in .*\n  fetch it elsewhere:  hf download szzs1693/coswara"),
        ("icbhi", r"has 0 recordings named as .* and no file ICBHI_Challenge_diagnosis.txt\n  fetch it:  mkdir"),
        ("circor", r"has no training_data.csv and 0 recordings\n  fetch it:  wget"),
        ("table", r"no Parquet file in .*; expected columns audio"),
    ],
)
def test_a_folder_that_holds_something_else_is_answered_with_what_was_looked_for(tmp_path, name, message):
    (tmp_path / "README.md").write_text("nothing\n")
    with pytest.raises(DatasetError, match=message):
        load_dataset(f"{name}={tmp_path}")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "fsd",
            r"no dataset 'fsd'; expected one of fsd50k, flusense, coswara, icbhi, circor, table, or one of them=PATH",
        ),
        ("fsd50k=", r"--dataset fsd50k= names no place"),
        ("flusense=nowhere", r"no folder or file nowhere; --dataset flusense without a place takes it from the hub"),
        ("table", r"--dataset table=FILE.parquet: no file named"),
        ("icbhi", r"ICBHI 2017: it is not on the hub; [\s\S]* curl -LO https://bhichallenge.med.auth.gr/"),
        ("icbhi=nowhere", r"ICBHI 2017: no folder nowhere; [\s\S]*unzip ICBHI_final_database.zip"),
        (
            "circor",
            r"CirCor DigiScope: it is not on the hub; [\s\S]*wget -r -N -c -np .*physionet.org/files/circor-heart",
        ),
    ],
)
def test_a_dataset_that_is_not_there_is_answered_with_what_to_do(spec, message):
    with pytest.raises(DatasetError, match=message):
        load_dataset(spec)


def test_a_band_pass_keeps_its_band_in_its_place_and_removes_the_rest():
    time = np.arange(32_000) / 16_000
    inside, below, above = (0.2 * np.sin(2 * np.pi * hz * time) for hz in (200, 5, 2000))
    samples = np.rint((inside + below + above) * 32768).astype(np.int16)

    filtered = band_passed(samples, (25.0, 400.0)) / 32768

    middle = slice(8_000, 24_000)
    assert np.abs(filtered[middle] - inside[middle]).max() < 0.002
    assert band_passed(samples[:1], (25.0, 400.0)).shape == (1,)
