"""A student comes back from a folder, from the hub and from a checkpoint as it was; anything else is one line."""

import json
import re
from dataclasses import asdict, replace

import pytest
import torch
from hub_faults import server_error
from hub_server import HubServer
from release_tools import SMALL, run_python, small_student, write_checkpoint, write_folder
from safetensors.torch import save_file

from hear_distill import Student
from hear_distill.checkpoint import CheckpointError
from hear_distill.pretrained import PretrainedError


def assert_same(student: Student) -> None:
    """As `small_student`, weights and all."""
    expected = small_student()
    assert student.config == SMALL and not student.training
    image = torch.rand(2, 1, 192, 128)
    assert torch.equal(student.project(student(image)), expected.project(expected(image)))


def test_a_student_comes_back_from_its_folder(tmp_path):
    assert_same(Student.from_pretrained(write_folder(tmp_path / "model")))
    assert_same(Student.from_pretrained(str(tmp_path / "model")))


def test_a_student_comes_back_from_a_checkpoint_of_the_trainer(tmp_path):
    assert_same(Student.from_pretrained(write_checkpoint(tmp_path)))


def broken(what: str, folder) -> None:
    """Spoil one thing about a released student."""
    weights = folder / "model.safetensors"
    if what == "no weights":
        weights.unlink()
    elif what == "damaged weights":
        weights.write_bytes(weights.read_bytes()[:-7])
    elif what == "no configuration":
        (folder / "config.json").unlink()
    elif what == "no JSON":
        (folder / "config.json").write_bytes(b"\xff{")
    elif what == "other weights":
        save_file({"norm.weight": torch.zeros(3)}, weights)
    elif what == "a run":
        (folder / "config.json").write_text("{}")
        (folder / "best.pt").touch()


BROKEN = {
    "no weights": "has no model.safetensors; expected config.json and model.safetensors",
    "damaged weights": "model.safetensors is damaged .* SHA256SUMS",
    "no configuration": "config.json cannot be read",
    "no JSON": "config.json cannot be read",
    "other weights": "do not fit its configuration: .*Missing key",
    "a run": "to load a run's checkpoint, name the file: .*best.pt",
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_folder_that_holds_no_whole_student_is_refused_in_one_line(tmp_path, what):
    folder = write_folder(tmp_path / "model")
    broken(what, folder)
    with pytest.raises(PretrainedError, match=BROKEN[what]) as e:
        Student.from_pretrained(folder)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "vit"}, "something else than a released student"),
        ({"format": 2}, "has format 2, this version of hear-distill reads 1"),
        ({"architecture": asdict(SMALL) | {"depth": 3}}, "do not fit its configuration: .*depth"),
        ({"architecture": asdict(replace(SMALL, width=48))}, "do not fit its configuration: .*size mismatch"),
        ({"architecture": asdict(SMALL) | {"heads": 5}}, "width 24 and heads 5"),
    ],
)
def test_a_configuration_of_something_else_is_refused(tmp_path, changes, message):
    with pytest.raises(PretrainedError, match=message):
        Student.from_pretrained(write_folder(tmp_path / "model", **changes))


def test_what_is_no_place_of_a_student_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*nothing\.pt"):
        Student.from_pretrained(tmp_path / "nothing.pt")
    (tmp_path / "file").touch()
    with pytest.raises(PretrainedError, match="is a file, expected a folder"):
        Student.from_pretrained(tmp_path / "file")
    with pytest.raises(PretrainedError, match=r"no folder .* and no id on the hub either"):
        Student.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(PretrainedError, match="is a folder, which has no revision main"):
        Student.from_pretrained(write_folder(tmp_path / "model"), revision="main")


ASK = """
import sys
from hear_distill import Student
from hear_distill.files import UserError
for name, revision in zip(sys.argv[1::2], sys.argv[2::2]):
    try:
        student = Student.from_pretrained(name, revision=revision or None)
        print("loaded", float(student.project(student.patch.weight.new_ones(1, 24)).detach().double().sum()))
    except UserError as e:
        print("refused", e)
"""


def test_a_student_comes_from_the_hub_once_at_a_revision_and_no_pickle_is_fetched(tmp_path):
    folder = write_folder(tmp_path / "model")
    (folder / "pytorch_model.bin").write_bytes(b"code")
    (folder / "SHA256SUMS").write_text("")
    with HubServer({}, models={"org/student": folder}, gated={"org/student": ["hf_good"]}) as hub:
        questions = ["org/student", "", "org/student", hub.sha("org/student", "models"), "org/student", "v9"]
        done = run_python("-c", ASK, *questions, hub=hub, home=tmp_path / "home", token="hf_good")
        fetched = sorted(hub.bytes_sent)
        strangers = run_python(
            "-c", ASK, "org/student", "", "org/nobody", "", hub=hub, home=tmp_path / "other", token="hf_bad"
        )
        hub.inject(server_error(500), kind="info", times=None)
        hub.inject(server_error(500), kind="resolve", times=None)
        cached = run_python("-c", ASK, "org/student", "", hub=hub, home=tmp_path / "home", HF_HUB_OFFLINE="1")
        offline = run_python("-c", ASK, "org/student", "", hub=hub, home=tmp_path / "none", HF_HUB_OFFLINE="1")
    expected = small_student()
    value = float(expected.project(torch.ones(1, 24)).detach().double().sum())
    lines = done.stdout.splitlines()
    assert lines[:2] == [f"loaded {value}"] * 2, done.stderr
    assert lines[2].startswith("refused org/student has no revision v9")
    assert fetched == ["config.json", "model.safetensors"]
    gated, unknown = strangers.stdout.splitlines()
    assert gated.startswith("refused org/student is gated") and "no folder org/nobody here" in unknown
    assert cached.stdout == f"loaded {value}\n"
    assert re.fullmatch(
        r"refused the hub does not send org/student \(.*\), and it is not in the cache .*\n", offline.stdout
    )


def test_embedding_takes_the_base_installation_and_no_more():
    """What only the extras bring is not loaded, let alone needed."""
    code = """
import json, sys
import numpy as np
from hear_distill import Student, StudentConfig
Student(StudentConfig(width=8, blocks=1, heads=1, mlp_width=8)).eval().embed(np.ones(9), 8000)
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""
    loaded = set(json.loads(run_python("-c", code).stdout))
    extras = {"onnx", "onnxruntime", "onnxscript", "transformers", "torchaudio", "pyarrow", "sklearn", "scipy"}
    assert {"torch", "soxr", "safetensors"} <= loaded and loaded.isdisjoint(extras | {"datasets", "matplotlib"})
