"""The export: every file computes what the student computes, at any batch and length, and the folder says all of it."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import soundfile
import torch
from lake_tools import ROOT
from release_tools import SMALL, run_python, small_student, write_checkpoint
from test_model_card import RESULTS
from train_tools import load_stage

from hear_distill import MelPcen, Student, onnx_files
from hear_distill.files import UserError
from hear_distill.onnx_files import compared, open_session
from hear_distill.release import sha256, verify

CONFIG = replace(SMALL, positions="learned")  # the harder one: its grid is stretched to the length


@pytest.fixture(scope="module")
def stage():
    return load_stage(ROOT / "export_student.py")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The stage, run as people run it; the folder, and what it said."""
    folder = tmp_path_factory.mktemp("export")
    checkpoint = write_checkpoint(folder / "run", CONFIG)
    (folder / "audio" / "inner").mkdir(parents=True)
    noise = np.random.default_rng(0).standard_normal((60_000, 2)) * 0.1
    soundfile.write(folder / "audio" / "inner" / "a.flac", noise * np.linspace(0, 1, 60_000)[:, None], 22_050)
    soundfile.write(folder / "audio" / "b.WAV", noise[:9_000], 16_000, format="WAV")
    (folder / "audio" / "broken.mp3").write_bytes(b"no sound")
    results = {**RESULTS, "student": {"sha256": sha256(checkpoint)}}
    (folder / "results.json").write_text(json.dumps(results))
    flags = ["--checkpoint", checkpoint, "--out", folder / "release", "--audio", folder / "audio"]
    done = run_python(
        ROOT / "export_student.py", *flags, "--results", folder / "results.json", "--push", "org/hear-tiny"
    )
    assert (folder / "release").is_dir(), done.stderr
    return folder / "release", done


def test_it_tells_what_it_compared_and_uploads_nothing_unasked(finished):
    _, done = finished
    assert "on 2 clips of 2 s of audio, one of 5 s and one of 0.8 s" in done.stdout
    assert "1 of 3 recordings cannot be read: {'undecodable': 1}" in done.stdout
    assert len(re.findall(r"^  \w+\.onnx +error \d\.\de[+-]\d\d   cosine \d\.\d{5}", done.stdout, re.M)) == 6
    assert done.returncode == 2 and re.fullmatch(r"error: nothing was uploaded; to upload [^\n]*\n", done.stderr)


def test_the_release_is_whole_and_the_student_comes_back_from_it(finished):
    folder, _ = finished
    parts = [f"onnx/{part}{end}.onnx" for part in ("encoder", "model") for end in ("", "_fp16", "_int8")]
    expected = {"README.md", "SHA256SUMS", "config.json", "model.safetensors", "onnx/frontend.onnx", *parts}
    assert set(verify(folder)) == expected
    loaded, original = Student.from_pretrained(folder), small_student(CONFIG)
    assert loaded.config == CONFIG
    assert all(torch.equal(value, original.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_config_and_card_have_the_facts_of_the_run_the_metrics_and_the_parity(finished):
    folder, _ = finished
    config, card = json.loads((folder / "config.json").read_text()), (folder / "README.md").read_text()
    assert (config["teacher"], config["is_stand_in"], config["samples"]) == ("demo/teacher", True, 51_200)
    assert config["onnx"]["files"].keys() == {path.name for path in (folder / "onnx").iterdir()} - {"frontend.onnx"}
    assert config["onnx"]["files"]["model.onnx"]["max_relative_error"] < 1e-4
    assert "# hear-tiny" in card and "a stand-in, not from HeAR" in card and "| cough | 0.712" in card
    assert "on 2 clips of 2 s of audio" in card


@torch.inference_mode()
def torch_embedding(audio: np.ndarray) -> np.ndarray:
    return small_student(CONFIG)(MelPcen()(torch.from_numpy(audio))).numpy()


@pytest.mark.parametrize(("batch", "num_samples"), [(1, 1), (1, 32_000), (3, 32_001), (2, 100_123), (1, 400_000)])
def test_a_model_takes_any_batch_of_any_length(finished, batch, num_samples):
    folder, _ = finished
    audio = np.random.default_rng(num_samples).standard_normal((batch, num_samples)).astype(np.float32)
    audio *= np.linspace(0, 1, num_samples, dtype=np.float32) ** 2
    expected = torch_embedding(audio)
    for ending, limit in (("", 1e-4), ("_fp16", 1e-2), ("_int8", 0.3)):
        (found,) = open_session(folder / "onnx" / f"model{ending}.onnx").run(["embedding"], {"waveform": audio})
        assert found.dtype == np.float32 and found.shape == expected.shape
        assert np.abs(found - expected).max() <= limit * np.abs(expected).max()


def test_silence_and_a_clip_that_ends_in_it_are_numbers_in_every_model(finished):
    """1e-8 lost anywhere, by an optimiser or in half precision, is a division by zero here."""
    folder, _ = finished
    audio = np.zeros((3, 32_000), np.float32)
    audio[1, :999], audio[2] = np.sin(np.arange(999)), 0.25
    expected = torch_embedding(audio)
    for ending, limit in (("", 1e-4), ("_fp16", 1e-2), ("_int8", 0.3)):
        (found,) = open_session(folder / "onnx" / f"model{ending}.onnx").run(None, {"waveform": audio})
        assert np.abs(found - expected).max() <= limit * np.abs(expected).max()


def test_front_end_and_encoder_one_after_the_other_are_the_model(finished):
    folder, _ = finished
    audio = np.random.default_rng(3).standard_normal((2, 40_000)).astype(np.float32)
    (image,) = open_session(folder / "onnx" / "frontend.onnx").run(["spectrogram"], {"waveform": audio})
    assert image.shape == (2, 1, 240, 128)
    for ending in ("", "_fp16", "_int8"):
        (apart,) = open_session(folder / "onnx" / f"encoder{ending}.onnx").run(None, {"spectrogram": image})
        (whole,) = open_session(folder / "onnx" / f"model{ending}.onnx").run(None, {"waveform": audio})
        np.testing.assert_allclose(apart, whole, atol=2e-3)


def weights_of(path: Path) -> dict[str, np.ndarray]:
    """The arrays in a graph that are large enough to be weights."""
    tensors = onnx.load(path).graph.initializer
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in tensors if np.prod(tensor.dims) >= 500}


def test_only_the_encoder_is_made_smaller(finished):
    folder, _ = finished
    for ending, kinds in (("", {"float32"}), ("_fp16", {"float16"}), ("_int8", {"uint8", "float32"})):
        weights = weights_of(folder / "onnx" / f"model{ending}.onnx")
        in_front = {name: value for name, value in weights.items() if name.startswith("frontend/")}
        assert {value.shape for value in in_front.values()} >= {(400, 402), (402, 128), (50, 50), (48, 50)}
        assert {str(value.dtype) for value in in_front.values()} == {"float32"}
        behind = {name: value for name, value in weights.items() if name not in in_front}
        assert {str(value.dtype) for value in behind.values()} == kinds
        if ending == "_int8":  # what is left in float32: the depthwise kernels and the positions
            matrices = {value.shape for value in behind.values() if value.dtype == np.uint8}
            assert matrices >= {(256, 24), (24, 72), (24, 24), (24, 48), (48, 24)}


def test_a_graph_is_made_of_standard_operators_and_tells_nothing_of_the_machine(finished):
    folder, _ = finished
    for path in (folder / "onnx").iterdir():
        model = onnx.load(path)
        assert [(one.domain, one.version) for one in model.opset_import] == [("", onnx_files.OPSET)]
        assert {node.op_type for node in model.graph.node}.isdisjoint({"Loop", "Scan", "If", "STFT", "DFT"})
        names = {value.name: [dim.dim_param for dim in value.type.tensor_type.shape.dim] for value in model.graph.input}
        assert names in ({"waveform": ["batch", "samples"]}, {"spectrogram": ["batch", "", "16*patch_rows", ""]})
        content = path.read_bytes()
        assert not any(text in content for text in (b"/home", b"site-packages", str(ROOT).encode(), b".py"))


def test_a_part_of_each_comparison_is_what_it_says():
    expected = np.array([[1.0, 2.0], [3.0, -4.0], [0.5, 1.0]])
    assert compared(expected, expected) == (0, pytest.approx(1))
    error, _ = compared(expected, expected + np.array([[0, 0], [0, 0.4], [0, 0]]))
    assert error == pytest.approx(0.1)
    shifted = 100 + np.random.default_rng(0).standard_normal((50, 8))
    noisy = shifted + np.random.default_rng(1).standard_normal((50, 8))
    assert compared(shifted, noisy)[1] < 0.9  # plain cosines are above 0.999 here
    assert np.isnan(compared(expected, expected * np.nan)[0])


@pytest.mark.parametrize("value", [2e-4, float("nan")], ids=["too far", "not a number"])
def test_a_float32_file_that_differs_stops_the_export_and_nothing_is_written(stage, tmp_path, monkeypatch, value):
    path = write_checkpoint(tmp_path / "run")
    monkeypatch.setattr(stage, "save", lambda student, folder: (folder / "onnx").mkdir())
    names = ("model.onnx", "model_int8.onnx")
    found = {name: {"max_relative_error": value, "cosine": 1.0, "passed": False} for name in names}
    monkeypatch.setattr(onnx_files, "parity", lambda *_: found)
    with pytest.raises(UserError, match=r"model\.onnx differs from PyTorch by .*nothing was written"):
        stage.main(stage.Config(checkpoint=path, out=tmp_path / "out"))
    assert [child.name for child in tmp_path.iterdir()] == ["run"]


def test_a_small_file_below_its_limit_is_written_and_said(stage, tmp_path, monkeypatch, capsys):
    path = write_checkpoint(tmp_path / "run")
    monkeypatch.setattr(stage, "save", lambda student, folder: (folder / "onnx").mkdir())
    found = {"model_int8.onnx": {"max_relative_error": 0.5, "cosine": 0.9, "passed": False}}
    monkeypatch.setattr(onnx_files, "parity", lambda *_: found)
    stage.main(stage.Config(checkpoint=path, out=tmp_path / "out"))
    assert "model_int8.onnx      error 5.0e-01   cosine 0.90000   WARNING: below the limit" in capsys.readouterr().out
    assert "below the limit" in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["onnx"]["files"] == found


def test_what_does_not_belong_together_is_refused_before_anything_is_exported(stage, tmp_path, monkeypatch):
    path = write_checkpoint(tmp_path / "run")
    monkeypatch.setattr(stage, "save", lambda *_: pytest.fail("it began"))
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    (tmp_path / "empty").mkdir()
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "run", other)
    run = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**run, "teacher_revision": "sha256:4567"}))
    mistakes = {
        "is of another checkpoint": {"results": tmp_path / "results.json"},
        "it is not replaced": {"out": tmp_path / "mine"},
        "no recordings at": {"audio": tmp_path / "empty"},
        "gives 0 clips of 2 s": {"audio": tmp_path / "results.json"},
        "of a run with another teacher": {"checkpoint": other / path.name},
    }
    for message, changes in mistakes.items():
        with pytest.raises(UserError, match=message):
            stage.main(stage.Config(**{"checkpoint": path, "out": tmp_path / "out", **changes}))


def test_without_recordings_synthetic_ones_are_compared_and_it_says_so(stage):
    batches, name = stage.sounds(None)
    assert name == "21 synthetic clips of 2 s, one of 5 s and one of 0.8 s"
    assert [batch.shape for batch in batches] == [(16, 32_000), (5, 32_000), (1, 80_123), (1, 12_345)]
    assert all(batch.dtype == np.float32 and np.abs(batch).max() > 0 for batch in batches)
    assert len({row.tobytes() for batch in batches[:2] for row in batch}) == 21


def test_without_the_configuration_of_its_run_the_teacher_is_not_named(stage, tmp_path, capsys):
    path = write_checkpoint(tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()
    facts, results = stage.facts_of(stage.Config(checkpoint=path))
    assert facts["teacher"] == "" and results is None and facts["checkpoint_sha256"] == sha256(path)
    assert "the card will not name the teacher" in capsys.readouterr().out
