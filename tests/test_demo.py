"""What the demo makes for itself: once, in its own three places, and nowhere else."""

import os
from pathlib import Path

import pytest

from hear_distill import demo


@pytest.fixture(autouse=True)
def small_demo_in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "NUM_TARS", 2)
    monkeypatch.setattr(demo, "RECORDINGS_PER_TAR", 3)
    monkeypatch.setattr(demo, "ROWS_PER_LABEL", 10)
    monkeypatch.setattr(demo, "RECORDINGS_PER_LABEL", 2)


def contents() -> dict[str, tuple[int, bytes]]:
    """Time of change and bytes of every file below the working folder."""
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in Path().rglob("*") if p.is_file()}


INPUTS = {
    demo.SOURCE: "demo/source",
    demo.TABLE: "demo/events.parquet",
    demo.TEACHER: "demo/teacher",
    demo.RECORDINGS: "demo/recordings",
}


def test_the_inputs_of_the_demo_stand_where_the_documents_say():
    assert {str(path) for path in INPUTS} == set(INPUTS.values())


@pytest.mark.parametrize("path", INPUTS, ids=str)
def test_an_input_of_the_demo_is_made_where_it_is_missing_and_nothing_else_is(path, capsys):
    demo.prepare(str(path))
    assert path.exists()
    assert contents() and all(name.startswith(INPUTS[path]) for name in contents())
    assert str(path) in capsys.readouterr().out


@pytest.mark.parametrize("path", INPUTS, ids=str)
def test_preparing_a_second_time_changes_nothing_and_says_nothing(path, capsys):
    demo.prepare(path)
    before = contents()
    capsys.readouterr()
    demo.prepare(path)
    assert contents() == before
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("path", INPUTS, ids=str)
def test_the_same_bytes_are_made_again_in_another_folder(path, tmp_path, monkeypatch):
    demo.prepare(path)
    first = {name: content for name, (_, content) in contents().items()}
    (tmp_path / "again").mkdir()
    monkeypatch.chdir(tmp_path / "again")
    demo.prepare(path)
    assert {name: content for name, (_, content) in contents().items()} == first


@pytest.mark.parametrize("path", ["google/hear-pytorch", "elsewhere/source", "demo", "demo/lake", "lake", "demo/sourc"])
def test_any_other_path_is_left_alone(path):
    demo.prepare(path)
    assert list(Path().iterdir()) == []


def test_what_the_user_put_in_the_place_of_an_input_is_left_alone():
    demo.SOURCE.mkdir(parents=True)
    (demo.SOURCE / "mine.tar").write_bytes(b"mine")
    demo.prepare(demo.SOURCE)
    assert [p.read_bytes() for p in demo.SOURCE.iterdir()] == [b"mine"]


def disk_full(*_) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("path", [demo.SOURCE, demo.TABLE], ids=str)
def test_a_source_or_table_that_was_not_finished_does_not_stand_there_as_if_it_were(path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(os, "fsync", disk_full)
        demo.prepare(path)
    assert not path.exists()
    demo.prepare(path)
    assert path.exists()


def test_a_teacher_that_was_not_finished_does_not_stand_there_as_if_it_were(monkeypatch):
    from transformers import ViTModel

    def half(model: ViTModel, folder: Path, **_) -> None:
        Path(folder).mkdir(parents=True)
        (Path(folder) / "config.json").write_text("{")
        disk_full()

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(ViTModel, "save_pretrained", half)
        demo.prepare(demo.TEACHER)
    assert not demo.TEACHER.exists()
