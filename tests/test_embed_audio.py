"""The table of embeddings: its rows, and that a kill, a change or a broken file costs nothing else.

n samples   w windows   D width of an embedding
"""

import json
import runpy
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from lake_tools import ROOT, TIMEOUT_S
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pyarrow import parquet

from hear_distill import checkpoint
from hear_distill.audio import decode, windows
from hear_distill.files import MIB
from hear_distill.frontend import MelPcen
from hear_distill.locks import alone
from hear_distill.student import Student, StudentConfig, load_student

SCRIPT = ROOT / "embed_audio.py"
STAGE = runpy.run_path(str(SCRIPT), run_name="stage")
TINY = StudentConfig(width=24, blocks=1, heads=3, mlp_width=24, embedding_width=8)

Rows = dict[tuple[str, float], list[float]]  # (path, start_s) -> embedding


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), seed=0)


def save_model(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    return checkpoint.save(folder, {"student_config": asdict(TINY), "student": Student(TINY).state_dict()})


def sound(seconds: float, seed: int, rate: int = 16_000) -> np.ndarray:
    """[n] float32 noise whose level wanders, so that no window is like another."""
    rng = np.random.default_rng(seed)
    num_samples = round(seconds * rate)
    return (
        (0.3 * rng.standard_normal(num_samples) * rng.uniform(0.1, 1, num_samples // 800 + 1).repeat(800)[:num_samples])
        .clip(-1, 1)
        .astype(np.float32)
    )


@pytest.fixture
def folder(tmp_path) -> Path:
    """Five recordings in all sorts of files, at three depths, and what is none."""
    folder = tmp_path / "recordings"
    (folder / "ward 3" / "night").mkdir(parents=True)
    (folder / ".trash").mkdir()
    soundfile.write(folder / "b.WAV", sound(5.3, 1), 16_000)
    soundfile.write(folder / "a.flac", np.stack([sound(3, 2, 44_100), sound(3, 3, 44_100)], axis=1), 44_100)
    soundfile.write(folder / "ward 3" / "cough.ogg", sound(0.4, 4), 16_000)
    soundfile.write(folder / "ward 3" / "night" / "husten-ä.mp3", sound(2.5, 5, 22_050), 22_050)
    soundfile.write(folder / "ward 3" / "c.aiff", sound(2, 6, 8_000), 8_000)
    for name in ("._b.wav", ".trash/b.wav", "notes.txt", "README"):
        (folder / name).write_bytes(b"no sound")
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    """The command, in this process: (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        captured = capsys.readouterr()
        return end.value.code or 0, captured.out, captured.err

    return call


def rows_in(path: Path) -> Rows:
    """Raises AssertionError if a row is there twice."""
    listed = parquet.read_table(path).to_pylist()
    rows = {(row["path"], row["start_s"]): row["embedding"] for row in listed}
    assert len(rows) == len(listed)
    return rows


def rows_by_the_book(folder: Path, model: Path, names: Sequence[str]) -> Rows:
    """Every recording decoded as one array, cut by the evaluation's rule, one window at a time."""
    student, front_end, rows = load_student(model), MelPcen(), {}
    for name in names:
        samples = decode((folder / name).read_bytes())
        starts = [*range(0, max(len(samples) - 32_000, 0), 16_000), max(len(samples) - 32_000, 0)]
        for start, window in zip(starts, windows(samples), strict=True):
            with torch.no_grad():
                audio = torch.from_numpy(window / np.float32(32_768))[None]
                rows[name, start / 16_000] = student(front_end(audio))[0].tolist()
    return rows


def assert_same(found: Rows, expected: Rows) -> None:
    assert found.keys() == expected.keys()
    for key, embedding in expected.items():
        np.testing.assert_allclose(found[key], embedding, rtol=1e-4, atol=2e-5, err_msg=str(key))


NAMES = ("a.flac", "b.WAV", "ward 3/c.aiff", "ward 3/cough.ogg", "ward 3/night/husten-ä.mp3")


@pytest.mark.parametrize("batch_size", [1, 4])
def test_there_is_one_row_for_each_window_of_the_evaluation_whatever_shares_its_batch(
    run, folder, model, tmp_path, batch_size
):
    out = tmp_path / "new" / "table.parquet"
    code, stdout, _ = run(folder, "--model", model, "--out", out, "--batch-size", batch_size)
    assert code == 0
    assert "2 with a dot first" not in stdout and "1 with a dot first" in stdout and "1 .txt" in stdout
    expected = rows_by_the_book(folder, model, NAMES)
    assert sorted({start for name, start in expected if name == "b.WAV"}) == [0, 1, 2, 3, 3.3]
    assert_same(rows_in(out), expected)
    assert parquet.read_schema(out).field("embedding").type == STAGE["SCHEMA"].field("embedding").type
    assert [path.name for path in out.parent.iterdir()] == ["table.parquet"]


def test_windows_of_different_recordings_differ_and_repeat_for_the_same_one(run, folder, model, tmp_path):
    shutil.copy(folder / "b.WAV", folder / "copy.wav")
    run(folder, "--model", model, "--out", tmp_path / "t.parquet", "--batch-size", 3)
    rows = rows_in(tmp_path / "t.parquet")
    np.testing.assert_allclose(rows["copy.wav", 1.0], rows["b.WAV", 1.0], rtol=1e-4, atol=2e-5)
    assert np.abs(np.subtract(rows["b.WAV", 0.0], rows["b.WAV", 1.0])).max() > 1e-3


@given(st.lists(st.integers(0, 50_000), max_size=6), st.sampled_from([1, 4_321, 16_000, 32_000]))
def test_windows_out_of_blocks_are_those_of_the_whole_recording(lengths, hop):
    if hop == 1:
        lengths = [length % 300 + 16_000 for length in lengths[:2]]  # tens of thousands of windows would take long
    whole = np.random.default_rng(sum(lengths)).integers(-9, 9, sum(lengths), dtype=np.int16)
    blocks = np.split(whole, np.cumsum(lengths)[:-1]) if lengths else []
    last = max(len(whole) - 32_000, 0)
    padded = np.pad(whole, (0, max(32_000 - len(whole), 0)))
    found = list(STAGE["windows_in"](blocks, hop))
    assert [start for start, _ in found] == [*range(0, last, hop), last]
    assert all(np.array_equal(window, padded[start : start + 32_000]) for start, window in found)


# ---- a kill, and what changes between two runs ----


def processes_of(folder: Path, model: Path, out: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, str(SCRIPT), str(folder), "--model", str(model), "--out", str(out)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def long_folder(tmp_path) -> Path:
    """1,560 windows in 40 recordings: three parts and a bit."""
    folder = tmp_path / "long"
    folder.mkdir()
    for i in range(40):
        soundfile.write(folder / f"{i:02d}.wav", sound(40, i), 16_000)
    return folder


def test_a_killed_run_goes_on_where_it_stopped_and_ends_as_an_unbroken_one(run, long_folder, model, tmp_path):
    whole, out = tmp_path / "whole.parquet", tmp_path / "killed.parquet"
    assert run(long_folder, "--model", model, "--out", whole)[0] == 0

    with processes_of(long_folder, model, out) as process:
        give_up = time.monotonic() + TIMEOUT_S
        while not list(tmp_path.glob("killed.parquet.parts/*.parquet")) and process.poll() is None:
            assert time.monotonic() < give_up
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and not out.exists()
    parts = sorted(tmp_path.glob("killed.parquet.parts/*.parquet"))
    num_before = len({name for part in parts for name, _ in rows_in(part)})
    assert 0 < num_before < 40

    code, stdout, _ = run(long_folder, "--model", model, "--out", out)
    assert code == 0 and f"40 recordings in {long_folder}, {num_before} of them embedded before" in stdout
    assert_same(rows_in(out), rows_in(whole))
    assert not parts[0].parent.exists()


def test_a_kill_after_the_table_was_written_doubles_no_row(run, folder, model, tmp_path, monkeypatch):
    out = tmp_path / "t.parquet"
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(folder, "--model", model, "--out", out)[0] == "interrupted"
    before = rows_in(out)
    assert list(tmp_path.glob("t.parquet.parts/*.parquet"))
    soundfile.write(folder / "z.wav", sound(3, 9), 16_000)  # so that the table is written again
    assert run(folder, "--model", model, "--out", out)[0] == 0
    after = rows_in(out)
    assert {key: after[key] for key in before} == before and {name for name, _ in after.keys() - before} == {"z.wav"}
    assert not list(tmp_path.glob("t.parquet.*"))


def test_parts_of_a_killed_run_are_never_overwritten_though_its_table_is_gone(
    run, folder, model, tmp_path, monkeypatch
):
    out, late = tmp_path / "t.parquet", folder / "z.wav"
    run(folder, "--model", model, "--out", out)
    soundfile.write(late, sound(3, 9), 16_000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        run(folder, "--model", model, "--out", out)
    out.unlink()
    assert run(folder, "--model", model, "--out", out)[0] == 0
    assert_same(rows_in(out), rows_by_the_book(folder, model, [*NAMES, "z.wav"]))


def test_a_second_run_adds_does_again_and_drops_what_changed_and_computes_nothing_else(run, folder, model, tmp_path):
    out = tmp_path / "t.parquet"
    run(folder, "--model", model, "--out", out)
    before = rows_in(out)
    soundfile.write(folder / "new.wav", sound(4, 7), 16_000)
    soundfile.write(folder / "b.WAV", sound(5.3, 8), 16_000)  # of the same size
    (folder / "ward 3" / "c.aiff").unlink()

    code, stdout, _ = run(folder, "--model", model, "--out", out)
    assert code == 0 and "5 recordings" in stdout and "3 of them embedded before" in stdout
    names = ("a.flac", "b.WAV", "new.wav", "ward 3/cough.ogg", "ward 3/night/husten-ä.mp3")
    after = rows_in(out)
    assert_same(after, rows_by_the_book(folder, model, names))
    assert after["a.flac", 1.0] == before["a.flac", 1.0] and after["b.WAV", 1.0] != before["b.WAV", 1.0]


def test_a_run_with_nothing_to_do_leaves_the_table_alone(run, folder, model, tmp_path):
    out = tmp_path / "t.parquet"
    run(folder, "--model", model, "--out", out)
    before = out.stat()
    code, stdout, _ = run(folder, "--model", model, "--out", out)
    assert code == 0 and "5 of them embedded before" in stdout
    assert (out.stat().st_ino, out.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_two_processes_do_not_write_one_table(run, folder, model, tmp_path):
    out = tmp_path / "t.parquet"
    with alone(tmp_path / "t.parquet.parts" / "lock", "nobody holds it yet"):
        code, _, stderr = run(folder, "--model", model, "--out", out)
    assert code == 2 and f"another process is writing {out}" in stderr and not out.exists()


def test_parts_of_another_model_are_refused_with_the_folder_to_delete(run, folder, model, tmp_path, monkeypatch):
    out = tmp_path / "t.parquet"
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        run(folder, "--model", model, "--out", out)
    out.unlink()
    code, _, stderr = run(folder, "--model", save_model(tmp_path / "other", seed=1), "--out", out)
    assert code == 2 and "is of another model" in stderr and f"or delete {out}.parts\n" in stderr


def test_a_full_disk_is_named_and_what_was_embedded_is_not_lost(run, folder, model, small_disk):
    disk, _ = small_disk
    out, filler = disk / "t.parquet", disk / "filler"
    run(folder, "--model", model, "--out", out)
    before = rows_in(out)
    with pytest.raises(OSError, match="No space left"), filler.open("wb") as f:
        f.write(bytes(64 * MIB))
    soundfile.write(folder / "long.wav", sound(400, 9), 16_000)
    code, _, stderr = run(folder, "--model", model, "--out", out)
    assert code == 73 and "the disk is full" in stderr and stderr.splitlines()[-1].startswith("error: ")
    assert rows_in(out) == before
    filler.unlink()
    assert run(folder, "--model", model, "--out", out)[0] == 0
    assert len(rows_in(out)) == len(before) + 399


# ---- files that cannot be read, and mistakes ----


def test_unreadable_files_are_named_and_counted_by_reason_and_the_others_are_written(run, folder, model, tmp_path):
    (folder / "text.wav").write_text("no sound at all")
    (folder / "phone.m4a").write_bytes(b"\0\0\0\x20ftypM4A " + bytes(100))
    (folder / "torn.flac").write_bytes((folder / "a.flac").read_bytes()[:60_000])
    soundfile.write(folder / "empty.wav", np.zeros(0, np.float32), 16_000)
    (folder / "link.wav").symlink_to("nowhere.wav")
    out = tmp_path / "t.parquet"
    code, _, stderr = run(folder, "--model", model, "--out", out)
    assert code == 1
    assert "unreadable: 3 undecodable, 1 empty, 1 cannot be read" in stderr
    assert all(f"unreadable: {name}: " in stderr for name in ("text.wav", "phone.m4a", "torn.flac", "empty.wav"))
    assert_same(rows_in(out), rows_by_the_book(folder, model, NAMES))

    for name in ("text.wav", "phone.m4a", "torn.flac", "empty.wav", "link.wav"):
        (folder / name).unlink()
    assert run(folder, "--model", model, "--out", out)[0] == 0


def test_windows_of_a_recording_that_breaks_off_neither_stay_nor_move_those_of_its_neighbours(
    run, folder, model, tmp_path
):
    soundfile.write(tmp_path / "long.flac", sound(20, 11), 16_000)
    (folder / "aa.flac").write_bytes((tmp_path / "long.flac").read_bytes()[:-50_000])
    with pytest.raises(soundfile.SoundFileError):
        soundfile.read(folder / "aa.flac")
    code, _, stderr = run(folder, "--model", model, "--out", tmp_path / "t.parquet", "--batch-size", 4)
    assert code == 1 and "unreadable: aa.flac: undecodable" in stderr
    assert_same(rows_in(tmp_path / "t.parquet"), rows_by_the_book(folder, model, NAMES))


def test_a_file_larger_than_memory_should_hold_is_refused_before_it_is_read(monkeypatch, folder):
    monkeypatch.setitem(STAGE["read_bytes"].__globals__, "MAX_FILE_BYTES", 1000)
    with pytest.raises(STAGE["DecodeError"], match="too large"):
        STAGE["read_bytes"](folder / "b.WAV")


def test_a_name_that_is_no_text_is_spelled_out_and_found_again(run, folder, model, tmp_path):
    raw = b"caf\xe9.wav"
    soundfile.write(tmp_path / "plain.wav", sound(2, 12), 16_000)
    shutil.move(tmp_path / "plain.wav", folder.as_posix().encode() + b"/" + raw)
    assert run(folder, "--model", model, "--out", tmp_path / "t.parquet")[0] == 0
    assert ("caf\\xe9.wav", 0.0) in rows_in(tmp_path / "t.parquet")
    assert "6 of them embedded before" in run(folder, "--model", model, "--out", tmp_path / "t.parquet")[1]


def test_the_demo_makes_its_recordings_and_asks_for_its_student(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, stderr = run("demo")
    assert code == 2 and "no checkpoint at demo/run/best.pt" in stderr
    assert len(list((tmp_path / "demo" / "recordings").glob("cough-*.flac"))) == 6


def contents(folder: Path) -> Iterator[tuple[Path, bytes]]:
    return ((path, path.read_bytes()) for path in sorted(folder.rglob("*")) if path.is_file())


def test_mistakes_are_one_line_and_nothing_is_written(run, folder, model, tmp_path):
    (tmp_path / "silent").mkdir()
    (tmp_path / "silent" / "notes.txt").write_text("no sound")
    (tmp_path / "other.parquet").write_text("no table")
    parquet.write_table(STAGE["pyarrow"].table({"path": ["a"]}), tmp_path / "strange.parquet")
    run(folder, "--model", model, "--out", tmp_path / "t.parquet")
    other_model = save_model(tmp_path / "other", seed=1)
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(folder / "b.WAV", tmp_path / "elsewhere")
    before = dict(contents(tmp_path))

    def refused(*arguments: object) -> str:
        code, stdout, stderr = run(*arguments)
        assert (code, stdout, stderr.count("\n")) == (2, "", 1) and stderr.startswith("error: ")
        assert dict(contents(tmp_path)) == before
        return stderr

    new = ["--out", tmp_path / "new.parquet"]
    assert "no sound in" in refused(tmp_path / "silent", "--model", model, *new)
    assert "no folder" in refused(folder / "b.WAV", "--model", model, *new)
    assert f"no checkpoint at {tmp_path}/none.pt" in refused(folder, "--model", tmp_path / "none.pt", *new)
    assert "is a folder; name a file" in refused(folder, "--model", model, "--out", tmp_path)
    assert "nothing can be written beside" in refused(folder, "--model", model, "--out", folder / "b.WAV" / "t.parquet")
    assert "nothing can be written beside" in refused(folder, "--model", model, "--out", "/proc/t.parquet")
    assert "is no table of this command" in refused(folder, "--model", model, "--out", tmp_path / "other.parquet")
    assert "is no table of this command" in refused(folder, "--model", model, "--out", tmp_path / "strange.parquet")
    table = ["--out", tmp_path / "t.parquet"]
    assert "t.parquet is of another model" in refused(folder, "--model", other_model, *table)
    assert "t.parquet is of another folder" in refused(tmp_path / "elsewhere", "--model", model, *table)
    assert "is of another hop_s: 1.0, not 0.5" in refused(folder, "--model", model, *table, "--hop-s", "0.5")


def test_where_nothing_can_be_read_an_older_table_stays(run, folder, model, tmp_path):
    out = tmp_path / "t.parquet"
    run(folder, "--model", model, "--out", out)
    before = out.read_bytes()
    for name in NAMES:
        (folder / name).write_text("overwritten")
    code, _, stderr = run(folder, "--model", model, "--out", out)
    assert code == 2 and "no file could be read" in stderr and "unreadable: 5 undecodable" in stderr
    assert out.read_bytes() == before


ONLY = """
import sys, runpy
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {refused!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Refuse())
sys.argv = {argv!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def base_distributions() -> set[str]:
    """Names of all that `pip install .` brings, without an extra: the dependencies, theirs, and so on."""
    todo = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    found: set[str] = set()
    while todo:
        requirement = Requirement(todo.pop())
        name = canonicalize_name(requirement.name)
        if name not in found and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            found.add(name)
            todo += metadata.requires(name) or []
    return found


def test_the_base_installation_is_enough(folder, model, tmp_path):
    base = base_distributions()
    assert {"torch", "pyarrow", "soxr"} <= base and {"scikit-learn", "transformers", "matplotlib"}.isdisjoint(base)
    homes = metadata.packages_distributions().items()
    refused = {name for name, owners in homes if base.isdisjoint(canonicalize_name(owner) for owner in owners)}
    refused.discard("hear_distill")
    argv = [str(SCRIPT), str(folder), "--model", str(model), "--out", str(tmp_path / "t.parquet")]
    code = ONLY.format(refused=refused, argv=argv)
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr.count("Error")) == (0, 0), ended.stderr
    assert json.loads(parquet.read_schema(tmp_path / "t.parquet").metadata[b"hear_distill"])["files"].keys() == {*NAMES}
