"""Labelled tables and windows."""

import io

import numpy as np
import pyarrow
import pytest
import soundfile
from pyarrow import parquet

from hear_distill.synthetic import write_table
from hear_distill.tasks import TableError, load_table, windows


def windows_one_by_one(samples: list[int]) -> list[list[int]]:
    if len(samples) <= 32_000:
        return [samples + [0] * (32_000 - len(samples))]
    cut = []
    for second in range(len(samples)):
        if 16_000 * second + 32_000 >= len(samples):
            cut.append(samples[-32_000:])
            return cut
        cut.append(samples[16_000 * second : 16_000 * second + 32_000])


@pytest.mark.parametrize("num_samples", [1, 31_999, 32_000, 32_001, 47_999, 48_000, 48_001, 64_000, 100_007])
def test_windows_begin_every_second_and_the_last_one_ends_with_the_recording(num_samples):
    samples = np.random.default_rng(0).integers(-32768, 32768, num_samples).astype(np.int16)

    found = windows(samples)

    assert found.dtype == np.int16
    assert found.tolist() == windows_one_by_one(samples.tolist())


def write(path, num_rows=4, **columns):
    """A table whose columns are replaced by those given, or left out if they are None."""
    everything = {
        "audio": [{"bytes": b"sound %d" % row, "path": f"{row}.flac"} for row in range(num_rows)],
        "label": ["cough", "sneeze"] * (num_rows // 2),
        "group": [f"person {row // 2}" for row in range(num_rows)],
        "fold": [1 + row // 2 for row in range(num_rows)],
    } | columns
    table = pyarrow.table({name: values for name, values in everything.items() if values is not None})
    path.parent.mkdir(exist_ok=True)
    parquet.write_table(table, path)
    return path


def test_a_table_is_read_as_it_was_written(tmp_path):
    table = load_table(write(tmp_path / "odd [name] *" / "t.parquet", label=[3, 5, 5, 3], extra=list("abcd")))

    assert table.name == "t.parquet"
    assert table.audio == [b"sound 0", b"sound 1", b"sound 2", b"sound 3"]
    assert table.groups.tolist() == ["person 0", "person 0", "person 1", "person 1"]
    assert table.folds.tolist() == ["1", "1", "2", "2"]
    tasks = {name: is_positive.tolist() for name, is_positive in table.tasks().items()}
    assert tasks == {"3": [True, False, False, True], "5": [False, True, True, False]}


def test_a_column_of_type_audio_is_read_without_being_decoded(tmp_path):
    write_table(tmp_path / "t.parquet", num_per_label=10, seed=0)
    table = load_table(tmp_path / "t.parquet")

    assert b'"_type": "Audio"' in parquet.read_schema(tmp_path / "t.parquet").metadata[b"huggingface"]
    assert len(table.audio) == 70
    assert all(soundfile.info(io.BytesIO(data)).format == "FLAC" for data in table.audio)


def test_a_table_without_folds_and_a_row_without_audio_are_fine(tmp_path):
    audio = [{"bytes": None, "path": "elsewhere.flac"}, None, {"bytes": b"x", "path": None}, {"bytes": b"", "path": ""}]
    table = load_table(write(tmp_path / "t.parquet", fold=None, audio=audio))

    assert table.folds is None
    assert table.audio == [None, None, b"x", b""]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"group": None}, r"no column group; found audio, label, fold; expected columns audio"),
        ({"audio": None, "label": None}, r"no column audio or label; found group, fold"),
        ({"label": ["cough", None, "sneeze", None]}, r"column label of .* is empty in 2 of 4 rows"),
        ({"fold": [1, 1, None, 2]}, r"column fold of .* is empty in 1 of 4 rows"),
        (
            {"label": [["cough"], ["cough", "sneeze"], [], []]},
            r"column label of .* is list.* expected one text or number",
        ),
        ({"audio": ["0.flac", "1.flac", "2.flac", "3.flac"]}, r"column audio of .* is string, expected a struct"),
        ({"num_rows": 0, "audio": pyarrow.array([], pyarrow.struct([("bytes", pyarrow.binary())]))}, r"has no rows"),
        ({"fold": [1, 1, 1, 1]}, r"has one fold only"),
    ],
)
def test_a_table_of_another_shape_is_refused_with_what_was_found(tmp_path, columns, message):
    with pytest.raises(TableError, match=message):
        load_table(write(tmp_path / "t.parquet", **columns))


def test_a_group_in_two_folds_is_refused_by_name(tmp_path):
    path = write(tmp_path / "t.parquet", num_rows=8, fold=[1, 1, 2, 2, 3, 1, 4, 4])
    with pytest.raises(
        TableError, match=r"1 groups of t\.parquet are in more than one fold, such as person 2 in 1 and 3"
    ):
        load_table(path)


def test_a_missing_file_or_one_that_is_no_parquet_names_the_next_step(tmp_path):
    with pytest.raises(TableError, match=r"no table at .*absent.parquet[\s\S]*--table TABLE.parquet[\s\S]*make demo"):
        load_table(tmp_path / "absent.parquet")
    (tmp_path / "text.parquet").write_text("audio,label,group\n" * 10)
    with pytest.raises(TableError, match=r"text.parquet cannot be read as Parquet .* with --table"):
        load_table(tmp_path / "text.parquet")
