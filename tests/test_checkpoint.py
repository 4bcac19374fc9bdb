"""Checkpoints survive kills and damage, keep every bit, and never run code."""

import os
import pickle
import random
import signal
from collections import OrderedDict
from collections.abc import Callable, Mapping
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from lossy_disk import LOST, LossyDisk

from hear_distill import checkpoint
from hear_distill.checkpoint import CheckpointError

CRASH_POINTS = ["checkpoint-written", "checkpoint-kept-previous", "checkpoint-renamed"]


def some_state(step: int) -> dict[str, Any]:
    """One of every kind of value that a trainer saves; another value of `step` gives other tensors."""
    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(step))
    return {
        "step": step,
        "student": OrderedDict(weight=weight, transposed=weight.T, half=weight.bfloat16(), empty=weight[:0]),
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}, 1: {}}, "param_groups": [{"betas": (0.9, 0.98)}]},
        "counters": [torch.tensor(2**40 + step), torch.tensor([True, False, True]), None, -0.0, float("nan")],
        "clips_read": b"\x00\xff\n",
        "note": "Schnarchen\n\N{SLEEPING FACE}",
    }


def rendered(value: Any) -> Any:
    """`value` with its leaves as text, so that == means equal to the bit: NaN equals itself, -0.0 is not 0.0."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), repr(value.tolist())
    if isinstance(value, Mapping):
        return {key: rendered(item) for key, item in value.items() if key not in ("sha256", "format")}
    if isinstance(value, list | tuple):
        return type(value)(map(rendered, value))
    return repr(value)


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << (position % 8)
    path.write_bytes(data)


def test_what_was_saved_is_loaded_to_the_bit(tmp_path):
    path = checkpoint.save(tmp_path / "new" / "run", some_state(1))
    assert path == tmp_path / "new" / "run" / "latest.pt"
    assert rendered(checkpoint.load(path)) == rendered(some_state(1))


def test_a_loaded_checkpoint_can_be_saved_again_and_keeps_its_name(tmp_path):
    first = checkpoint.load(checkpoint.save(tmp_path, some_state(1)))
    second = checkpoint.load(checkpoint.save(tmp_path, first))
    assert first["sha256"] == second["sha256"] != checkpoint.load(checkpoint.save(tmp_path, some_state(2)))["sha256"]


def test_values_that_differ_in_anything_have_different_digests():
    zeros = torch.zeros(2, 3)
    counting = torch.arange(6.0).reshape(2, 3)
    values = [
        *(1, 1.0, True, "1", b"1", b"2", None, "None", 0.0, -0.0, float("nan"), float("inf")),
        *([], {}, (), [[]], [1, 2], (1, 2), [[1, 2]], [[1], 2], ["ab", "c"], ["a", "bc"], ["a\nstr 'b'"], ["a", "b"]),
        *(
            [1, 23],
            [12, 3],
            [b"a", b"bbytes 1\nc"],
            [b"abytes 1\nb", b"c"],
            [b"abytes\nb", b"c"],
            [b"a", b"bbytes\nc"],
            {1: 2},
            {"1": 2},
            {"a": 1, "b": 2},
            {"a": 2, "b": 1},
            ["a", 1, "b", 2],
        ),
        *(zeros, zeros.T, zeros.flatten(), zeros.int(), zeros.half(), zeros.bfloat16(), zeros[:0], zeros[0, 0]),
        *(counting, counting.T, counting.flip(0), [counting[0], counting[1]], counting.clone().requires_grad_()),
        *(torch.tensor(1), torch.tensor([1]), torch.tensor(True), torch.tensor(1, dtype=torch.uint8)),
    ]
    digests = [checkpoint.digest(value) for value in values]
    assert len(set(digests)) == len(values)


def test_the_digest_ignores_key_order_and_memory_layout():
    tensor = torch.arange(12.0).reshape(3, 4)
    strided = torch.stack([tensor, -tensor], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    assert checkpoint.digest({"b": tensor, 7: [float("nan")], "a": 1}) == checkpoint.digest(
        {"a": 1, "b": strided, 7: [float("nan")]}
    )


def test_a_flipped_bit_anywhere_is_refused_or_changes_nothing(tmp_path):
    path = checkpoint.save(tmp_path, some_state(1))
    whole, expected = path.read_bytes(), rendered(some_state(1))
    num_refused = 0
    for position in random.Random(1).sample(range(len(whole)), 200):
        path.write_bytes(whole)
        flip(path, position)
        try:
            assert rendered(checkpoint.load(path)) == expected, f"byte {position}"
        except CheckpointError as e:
            assert "\n" not in str(e)
            num_refused += 1
    assert num_refused > 20


@pytest.mark.parametrize("name", ["weight", "half"])
def test_a_flipped_bit_in_a_weight_is_named_as_damage(tmp_path, name):
    state = some_state(1)
    path = checkpoint.save(tmp_path, state)
    payload = state["student"][name].view(torch.uint8).numpy().tobytes()
    flip(path, path.read_bytes().index(payload) + 5)
    with pytest.raises(CheckpointError, match=r"latest\.pt is damaged: its content hashes to [0-9a-f]{12}, its sha256"):
        checkpoint.load(path)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path, share):
    path = checkpoint.save(tmp_path, some_state(1))
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(CheckpointError, match=r"latest\.pt is refused .* truncated, damaged"):
        checkpoint.load(path)


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("write", [pickle.dump, torch.save], ids=["pickle", "torch.save"])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, write):
    proof, path = tmp_path / "the code ran", tmp_path / "latest.pt"
    with path.open("wb") as f:
        write({"step": 1, "sha256": "0" * 64, "student": Bomb(proof)}, f)
    with pytest.raises(CheckpointError, match=r"refused .* nothing in it was run"):
        checkpoint.load(path)
    assert not proof.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": torch.zeros(2)}, "has no entry sha256"),
        ([torch.zeros(2)], "has no entry sha256"),
        ({"sha256": 7, "step": 1}, "its sha256 says 7"),
        ({"sha256": "0" * 64, "model": torch.nn.Parameter(torch.zeros(2))}, "never writes: Parameter is not a plain"),
    ],
    ids=["no hash", "a list", "a strange hash", "a module's parameter"],
)
def test_files_of_other_programs_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(tmp_path / "model.pt")


def test_a_list_inside_itself_is_refused(tmp_path):
    endless: list[Any] = []
    endless.append(endless)
    torch.save({"sha256": "0" * 64, "step": endless}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="never writes: maximum recursion"):
        checkpoint.load(tmp_path / "model.pt")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*/latest\.pt"):
        checkpoint.load(tmp_path / "latest.pt")


def test_a_value_that_is_not_plain_is_refused_by_its_place_and_spoils_nothing(tmp_path):
    checkpoint.save(tmp_path, some_state(1))
    with pytest.raises(TypeError, match=r"config\['data'\]\[1\] is a PosixPath"):
        checkpoint.save(tmp_path, {"config": {"data": [1, tmp_path]}})
    assert checkpoint.load(tmp_path / "latest.pt")["step"] == 1


def test_the_checkpoint_before_the_newest_is_kept_and_nothing_else(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, some_state(step))
    found = {path.name: checkpoint.load(path)["step"] for path in tmp_path.iterdir()}
    assert found == {"latest.pt": 3, "previous.pt": 2}


def test_the_best_checkpoint_stays_until_another_is_better(tmp_path):
    for step, is_best in ((1, True), (2, False), (3, True), (4, False), (5, False)):
        checkpoint.save(tmp_path, some_state(step))
        if is_best:
            assert checkpoint.keep_as_best(tmp_path) == tmp_path / "best.pt"
    assert checkpoint.load(tmp_path / "best.pt")["step"] == 3


def test_bytes_are_on_the_disk_before_a_name_moves_and_names_before_save_returns(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, some_state(1))
    events = []
    fsync, replace, link = os.fsync, os.replace, os.link
    names = lambda *paths: " ".join(Path(path).name for path in paths)  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(names(os.readlink(f"/proc/self/fd/{fd}"))), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(names(a, b)), replace(a, b)))
    monkeypatch.setattr(os, "link", lambda a, b: (events.append(names(a, b)), link(a, b)))
    checkpoint.save(tmp_path, some_state(2))
    assert events == [
        "latest.pt.tmp",
        *("latest.pt previous.pt.tmp", "previous.pt.tmp previous.pt", tmp_path.name),
        *("latest.pt.tmp latest.pt", tmp_path.name),
    ]


def test_a_file_that_does_not_read_back_never_becomes_the_newest(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, some_state(1))
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda state, f: save({**state, "step": 99}, f))
    with pytest.raises(CheckpointError, match=r"latest\.pt\.tmp is damaged"):
        checkpoint.save(tmp_path, some_state(2))
    assert checkpoint.load_newest(tmp_path)[0]["step"] == 1


def saved_and_killed(folder: Path, step: int, point: str, lost: str) -> None:
    """Save in a child that is killed at `point`."""
    killed_at(point, lost, folder, lambda: checkpoint.save(folder, some_state(step)))


def killed_at(point: str, lost: str, folder: Path, work: Callable[[], None]) -> None:
    """Work in a child that is killed at `point`. A fork, because importing torch again costs seconds."""

    def until_killed() -> None:
        os.environ["HEAR_CRASH_AT"] = point
        if lost != "nothing":
            LossyDisk(folder.parent, lost).install()
        work()

    child = get_context("fork").Process(target=until_killed)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("lost", LOST)
@pytest.mark.parametrize("num_before", [0, 1, 2])
@pytest.mark.parametrize("point", CRASH_POINTS)
def test_a_kill_at_any_point_twice_in_a_row_leaves_the_newest_whole_checkpoint(tmp_path, point, num_before, lost):
    run = tmp_path / "run"
    for step in range(1, num_before + 1):
        checkpoint.save(run, some_state(step))
    for step in (8, 9):
        saved_and_killed(run, step, point, lost)
        newest = step if point == "checkpoint-renamed" else num_before
        found = checkpoint.load_newest(run)
        if newest == 0:
            assert found is None
        else:
            state, path = found
            assert path.name == "latest.pt"
            assert rendered(state) == rendered(some_state(newest))
        if num_before == 2:
            assert checkpoint.load(run / "previous.pt")["step"] <= newest

    checkpoint.save(run, some_state(10))
    assert checkpoint.load_newest(run)[0]["step"] == 10
    assert not list(run.glob("*.tmp"))


def test_leftovers_of_a_killed_save_are_overwritten(tmp_path):
    checkpoint.save(tmp_path, some_state(1))
    for name in ("latest.pt.tmp", "previous.pt.tmp", "best.pt.tmp"):
        (tmp_path / name).write_bytes(b"half a checkpoint")
    checkpoint.save(tmp_path, some_state(2))
    checkpoint.keep_as_best(tmp_path)
    found = {path.name: checkpoint.load(path)["step"] for path in tmp_path.iterdir()}
    assert found == {"latest.pt": 2, "previous.pt": 1, "best.pt": 2}


@pytest.mark.parametrize("is_missing", [False, True], ids=["damaged", "missing"])
def test_a_lost_newest_gives_way_to_the_one_before_it_loudly(tmp_path, capsys, is_missing):
    for step in (1, 2):
        checkpoint.save(tmp_path, some_state(step))
    (tmp_path / "latest.pt").unlink()
    if not is_missing:
        (tmp_path / "latest.pt").write_bytes(b"half a checkpoint")
    state, path = checkpoint.load_newest(tmp_path)
    assert (state["step"], path.name) == (1, "previous.pt")
    warning = capsys.readouterr().err
    assert warning.count("WARNING") == 2
    assert str(tmp_path / "latest.pt") in warning and str(tmp_path / "previous.pt") in warning


def test_a_damaged_newest_is_never_kept_as_the_one_before(tmp_path, capsys):
    for step in (1, 2):
        checkpoint.save(tmp_path, some_state(step))
    flip(tmp_path / "latest.pt", (tmp_path / "latest.pt").stat().st_size // 2)
    with pytest.raises(CheckpointError):
        checkpoint.load(tmp_path / "latest.pt")
    checkpoint.save(tmp_path, some_state(3))
    assert checkpoint.load(tmp_path / "previous.pt")["step"] == 1
    assert "not kept as previous.pt" in capsys.readouterr().err


def test_a_folder_without_a_whole_checkpoint_is_an_error_and_an_empty_one_is_not(tmp_path):
    assert checkpoint.load_newest(tmp_path) is None
    assert checkpoint.load_newest(tmp_path / "missing") is None
    for name in ("latest.pt", "previous.pt"):
        (tmp_path / name).write_bytes(b"half a checkpoint")
    with pytest.raises(
        CheckpointError, match=r"no whole checkpoint in .*latest\.pt is refused.*previous\.pt is refused"
    ):
        checkpoint.load_newest(tmp_path)


# ---- the numbered ones ----


def steps_of(folder: Path) -> dict[str, int]:
    return {path.name: checkpoint.load(path)["step"] for path in folder.iterdir()}


def saved_with_number(folder: Path, step: int, num_kept: int = 3) -> None:
    checkpoint.save(folder, some_state(step))
    checkpoint.keep_numbered(folder, step, num_kept)


def test_the_newest_few_stay_under_their_numbers_and_none_if_none_is_asked_for(tmp_path):
    for step in (7, 80, 900, 1_000_000, 1_000_003):
        saved_with_number(tmp_path, step)
    fixed = {"latest.pt": 1_000_003, "previous.pt": 1_000_000}
    kept = {"step-000900.pt": 900, "step-1000000.pt": 1_000_000, "step-1000003.pt": 1_000_003}
    assert steps_of(tmp_path) == fixed | kept
    saved_with_number(tmp_path, 1_000_004, num_kept=0)
    assert steps_of(tmp_path).keys() == fixed.keys() | kept.keys()
    saved_with_number(tmp_path, 1_000_005, num_kept=1)
    assert steps_of(tmp_path).keys() == {*fixed, "step-1000005.pt"}


def test_numbers_of_a_history_that_was_lost_go_and_other_files_stay(tmp_path):
    for step in (1, 2, 3):
        saved_with_number(tmp_path, step)
    checkpoint.save(tmp_path, some_state(2))  # gone on from step 1
    (tmp_path / "step-000001.pt.mine").write_bytes(b"a user's own")
    checkpoint.keep_numbered(tmp_path, 2, 3)
    (tmp_path / "step-000001.pt.mine").unlink()
    assert steps_of(tmp_path) == {"latest.pt": 2, "previous.pt": 3, "step-000001.pt": 1, "step-000002.pt": 2}


@pytest.mark.parametrize("lost", LOST)
@pytest.mark.parametrize("point", ["checkpoint-renamed", "checkpoint-numbered"])
def test_a_kill_as_a_number_is_given_leaves_whole_files_and_the_next_one_tidies_up(tmp_path, point, lost):
    run = tmp_path / "run"
    for step in (1, 2, 3):
        saved_with_number(run, step)
    for step in (4, 5):
        killed_at(point, lost, run, lambda step=step: saved_with_number(run, step))
        found = {name: step for name, step in steps_of(run).items() if name.startswith("step")}
        assert all(name == f"step-{step:06d}.pt" for name, step in found.items()) and len(found) >= 3
        checkpoint.keep_numbered(run, step, 3)  # as a run does that is taken up
        newest = [f"step-{number:06d}.pt" for number in range(step - 2, step + 1)]
        assert sorted(name for name in steps_of(run) if name.startswith("step")) == newest


# ---- the format ----


def rewritten(path: Path, **entries: Any) -> None:
    """The same checkpoint, whole, with other entries; None leaves one out."""
    state = checkpoint.load(path) | entries
    state = {name: value for name, value in state.items() if value is not None and name != "sha256"}
    torch.save({**state, "sha256": checkpoint.digest(state)}, path)


@pytest.mark.parametrize(("number", "said"), [(None, "none"), (0, "0"), (checkpoint.FORMAT + 1, "2"), ("1", "1")])
def test_another_format_is_one_line_that_names_both_and_no_run_goes_on_from_the_one_before(tmp_path, number, said):
    for step in (1, 2):
        checkpoint.save(tmp_path, some_state(step))
    rewritten(tmp_path / "latest.pt", format=number)
    for refused in (lambda: checkpoint.load(tmp_path / "latest.pt"), lambda: checkpoint.load_newest(tmp_path)):
        with pytest.raises(CheckpointError, match=rf"latest\.pt is of format {said}, .* reads 1; use") as error:
            refused()
        assert "\n" not in str(error.value)


def test_a_checkpoint_that_is_saved_again_gets_our_format(tmp_path):
    checkpoint.save(tmp_path, some_state(1) | {"format": 99})
    assert checkpoint.load(tmp_path / "latest.pt")["format"] == checkpoint.FORMAT
