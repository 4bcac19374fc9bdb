"""A release is whole or absent, proves itself, replaces nothing of others, and goes to the hub only when told."""

import hashlib
import re
import subprocess

import pytest
from hub_server import HubServer
from hub_uploads import Uploads
from release_tools import run_python, write_folder

from hear_distill.release import ReleaseError, building, upload, verify


@pytest.fixture
def release(tmp_path):
    """A folder with small and large files."""
    with building(tmp_path / "release") as folder:
        write_folder(folder / "inner")
        for path in (folder / "inner").iterdir():
            path.rename(folder / path.name)
        (folder / "inner").rmdir()
        (folder / "README.md").write_text("---\nlicense: other\n---\n# A student\n")
        (folder / "onnx").mkdir()
        (folder / "onnx" / "model.onnx").write_bytes(bytes(range(256)) * 50)
    return tmp_path / "release"


FILES = ["README.md", "config.json", "model.safetensors", "onnx/model.onnx"]


def contents(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_sums_are_those_of_sha256sum_and_name_every_file(release):
    lines = (release / "SHA256SUMS").read_text().splitlines()
    assert lines == [f"{hashlib.sha256((release / name).read_bytes()).hexdigest()}  {name}" for name in FILES]
    subprocess.run(["sha256sum", "--check", "--quiet", "--strict", "SHA256SUMS"], cwd=release, check=True)
    assert verify(release) == [*FILES, "SHA256SUMS"]


def test_what_fails_half_way_leaves_the_earlier_release_and_nothing_else(release):
    before = contents(release.parent)
    with pytest.raises(KeyboardInterrupt), building(release) as folder:
        (folder / "README.md").write_text("half")
        raise KeyboardInterrupt
    assert contents(release.parent) == before


def test_a_new_release_takes_the_place_of_the_earlier_one_whatever_a_killed_one_left(release):
    leftover = release.with_name("release.tmp")
    leftover.mkdir()
    (leftover / "old").write_text("left")
    with building(release) as folder:
        (folder / "only").write_text("new")
    assert contents(release.parent).keys() == {"release/only", "release/SHA256SUMS"}


def spoil(what: str, folder) -> None:
    if what == "a file of somebody":
        (folder / "notes.txt").write_text("mine")
    elif what == "a changed file":
        (folder / "README.md").write_text("edited by hand")
    elif what == "a missing file":
        (folder / "config.json").unlink()
    elif what == "no sums":
        (folder / "SHA256SUMS").unlink()


SPOILT = {
    "a file of somebody": "such as notes.txt",
    "a changed file": "README.md is not as SHA256SUMS has it",
    "a missing file": "such as config.json",
    "no sums": "it has no SHA256SUMS",
}


@pytest.mark.parametrize("what", SPOILT)
def test_what_is_no_release_is_neither_replaced_nor_uploaded(release, what):
    spoil(what, release)
    before = contents(release)
    with pytest.raises(ReleaseError, match=f"{SPOILT[what]}.*; it is not replaced"), building(release):
        pytest.fail("it began")
    with pytest.raises(ReleaseError, match=SPOILT[what]):
        upload(release, "org/student", yes=True)
    assert contents(release) == before


def test_what_comes_into_the_place_meanwhile_is_not_replaced(tmp_path):
    with pytest.raises(ReleaseError, match="not replaced"), building(tmp_path / "release") as folder:
        (folder / "new").touch()
        (tmp_path / "release").mkdir()
        (tmp_path / "release" / "mine").touch()
    assert contents(tmp_path).keys() == {"release/mine"}


def push(hub: HubServer, release, home, *flags: str, token: str | None = "hf_writer", to: str = "org/student"):
    return run_python(
        "export_student.py", "push", "--out", release, "--push", to, *flags, hub=hub, home=home, token=token
    )


def test_the_hub_gets_a_private_model_from_which_the_student_comes_back(release, tmp_path):
    uploads = Uploads(tmp_path / "hub", writers=["hf_writer"])
    with HubServer({}, uploads=uploads) as hub:
        shown = push(hub, release, tmp_path / "home")
        assert shown.returncode == 2 and hub.requests == []
        assert all(f" MiB  {name}\n" in shown.stdout for name in FILES) and "org/student" in shown.stdout
        assert shown.stderr.startswith("error: nothing was uploaded; to upload") and "--yes" in shown.stderr

        sent = push(hub, release, tmp_path / "home", "--yes")
        assert sent.returncode == 0, sent.stderr
        assert "uploaded 5 files" in sent.stdout
        assert contents(uploads.root / "org--student") == contents(release)
        assert uploads.visibility == {"org/student": "private"}
        assert [sorted(names) for names in uploads.commits] == [sorted([*FILES, "SHA256SUMS"])]
        assert all("hf_writer" not in text for text in (sent.stdout, sent.stderr))
        uploaded = [request for request in hub.requests if request.kind == "upload"]
        assert len(uploaded) == 2 and all(request.token is None for request in uploaded)

        again = push(hub, release, tmp_path / "home", "--yes")
        assert again.returncode == 0, again.stderr
        code = "from hear_distill import Student; print(Student.from_pretrained('org/student').config.width)"
        assert run_python("-c", code, hub=hub, home=tmp_path / "reader").stdout == "24\n"


@pytest.mark.parametrize(
    ("token", "to", "message"),
    [
        ("hf_reader", "org/student", r"the hub refuses org/student \(HTTP 403\); HF_TOKEN"),
        (None, "org/student", r"the hub refuses org/student \(HTTP 401\); HF_TOKEN|no token"),
        ("hf_writer", "no/such/name", "is no name on the hub, expected ORG/NAME"),
    ],
)
def test_a_hub_that_does_not_take_it_is_told_in_one_line(release, tmp_path, token, to, message):
    with HubServer({}, uploads=Uploads(tmp_path / "hub", writers=["hf_writer"])) as hub:
        done = push(hub, release, tmp_path / "home", "--yes", token=token, to=to)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert re.search(message, done.stderr), done.stderr
