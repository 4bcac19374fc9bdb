"""Stored embeddings: found by everything that decided them, and never used if a bit is wrong."""

import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hear_distill import embedding_cache
from hear_distill.embedding_cache import describe, load, path_of, store, through_cache

FACTS = {
    "fingerprint": "weights 1",
    "protocol": "windows: 2 s",
    "dataset": "FluSense",
    "revision": "abc",
    "preprocessing": "soxr HQ",
    "num_rows": 3,
}
DESCRIPTION = describe(**FACTS)
EMBEDDINGS = np.array([[0.1, -2.0], [np.nan, np.nan], [1e-300, 3.0]])


def test_embeddings_come_back_to_the_bit_with_the_rows_that_were_not_seen(tmp_path):
    path = store(tmp_path / "new folder", DESCRIPTION, EMBEDDINGS)
    found = load(tmp_path / "new folder", DESCRIPTION)
    assert found.dtype == np.float64
    assert found.tobytes() == EMBEDDINGS.tobytes()
    assert list((tmp_path / "new folder").iterdir()) == [path]


def test_nothing_there_is_nothing_to_warn_of(tmp_path, capsys):
    assert load(tmp_path / "absent", DESCRIPTION) is None
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("field", FACTS)
def test_embeddings_of_another_description_are_not_found(tmp_path, field):
    store(tmp_path, DESCRIPTION, EMBEDDINGS)
    other = describe(**{**FACTS, field: 4 if field == "num_rows" else "another"})
    assert load(tmp_path, other) is None
    assert load(tmp_path, describe(**dict(reversed(FACTS.items())))) is not None


def test_texts_that_run_into_one_another_are_told_apart(tmp_path):
    store(tmp_path, describe(**{**FACTS, "dataset": "a", "revision": "bc"}), EMBEDDINGS)
    assert load(tmp_path, describe(**{**FACTS, "dataset": "ab", "revision": "c"})) is None


def test_a_file_under_the_name_of_another_description_is_not_used_and_that_is_said(tmp_path, capsys):
    other = describe(**{**FACTS, "fingerprint": "weights 2"})
    store(tmp_path, other, EMBEDDINGS).rename(path_of(tmp_path, DESCRIPTION))
    assert load(tmp_path, DESCRIPTION) is None
    assert "it holds something else" in capsys.readouterr().err


def test_no_flipped_bit_and_no_cut_is_taken_for_the_embeddings(tmp_path, capsys):
    path = store(tmp_path, DESCRIPTION, EMBEDDINGS)
    whole = path.read_bytes()
    damaged = [whole[:length] for length in range(0, len(whole), 7)]
    damaged += [whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :] for i in range(len(whole))]
    num_refused = 0
    for content in damaged:
        path.write_bytes(content)
        found = load(tmp_path, DESCRIPTION)
        num_refused += found is None
        assert found is None or found.tobytes() == EMBEDDINGS.tobytes()
        assert (found is None) == ("the embeddings are computed again" in capsys.readouterr().err)
    assert num_refused > 0.9 * len(damaged)  # a space in the header may become another one


def test_a_file_of_another_program_is_not_used(tmp_path, capsys):
    save_file({"embeddings": EMBEDDINGS}, path_of(tmp_path, DESCRIPTION))
    assert load(tmp_path, DESCRIPTION) is None
    assert "it holds something else: None" in capsys.readouterr().err
    save_file({"weights": EMBEDDINGS}, path_of(tmp_path, DESCRIPTION), metadata={"description": DESCRIPTION})
    assert load(tmp_path, DESCRIPTION) is None
    assert "damaged or not of this project" in capsys.readouterr().err


def test_numbers_that_were_changed_by_hand_are_not_used(tmp_path, capsys):
    path = store(tmp_path, DESCRIPTION, EMBEDDINGS)
    texts = {"description": DESCRIPTION, "sha256": embedding_cache._digest(EMBEDDINGS)}
    save_file({"embeddings": np.ascontiguousarray(load_file(path)["embeddings"].T)}, path, metadata=texts)
    assert load(tmp_path, DESCRIPTION) is None
    assert "not those that were written" in capsys.readouterr().err


def test_only_what_is_missing_or_damaged_is_computed_in_one_call_and_then_stored(tmp_path):
    descriptions = {name: describe(**{**FACTS, "fingerprint": name}) for name in ("a", "b", "c")}
    store(tmp_path, descriptions["b"], EMBEDDINGS)
    store(tmp_path, descriptions["c"], EMBEDDINGS).write_bytes(b"damaged")
    asked = []

    def compute(names):
        asked.append(list(names))
        return {name: EMBEDDINGS + ord(name) for name in names}

    for _ in range(2):
        found = through_cache(tmp_path, descriptions, compute)
        assert list(found) == ["a", "b", "c"]
        np.testing.assert_array_equal(found["a"], EMBEDDINGS + 97)
        np.testing.assert_array_equal(found["b"], EMBEDDINGS)
        np.testing.assert_array_equal(found["c"], EMBEDDINGS + 99)
    assert asked == [["a", "c"]]


def test_an_interrupt_while_writing_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = store(tmp_path, DESCRIPTION, EMBEDDINGS)

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store(tmp_path, DESCRIPTION, EMBEDDINGS + 1)
    assert load(tmp_path, DESCRIPTION).tobytes() == EMBEDDINGS.tobytes()
    assert list(tmp_path.iterdir()) == [path]


def _store_often(folder: Path) -> None:
    for _ in range(30):
        store(folder, DESCRIPTION, EMBEDDINGS)


def test_processes_that_write_the_same_do_not_disturb_one_another(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_store_often, args=(tmp_path,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert load(tmp_path, DESCRIPTION).tobytes() == EMBEDDINGS.tobytes()
    assert list(tmp_path.iterdir()) == [path_of(tmp_path, DESCRIPTION)]


@pytest.mark.parametrize("embeddings", [np.zeros(3), np.zeros((3, 2), np.float32)])
def test_what_is_no_table_of_embeddings_is_not_stored(tmp_path, embeddings):
    with pytest.raises(ValueError, match=r"expected \[rows, W\] float64"):
        store(tmp_path, DESCRIPTION, embeddings)


def test_a_description_is_readable_and_holds_every_fact():
    assert json.loads(DESCRIPTION) == FACTS
