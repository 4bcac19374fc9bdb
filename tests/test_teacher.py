"""The teacher: what is loaded is what was saved, all else is refused, and every failure at the hub has a way out."""

import copy
import hashlib
import json
import os
import re
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import ViTConfig, ViTModel

from hear_distill.frontend import MelPcen
from hear_distill.student import Student, StudentConfig
from hear_distill.teacher import HEAR_CONFIG, TeacherError, load_teacher, random_teacher, save_stand_in, to_bfloat16

SMALLEST = HEAR_CONFIG | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_ThisIsTheSecretToken"


def save_vit(folder: Path, **changes: object) -> ViTModel:
    torch.manual_seed(0)
    model = ViTModel(ViTConfig(**{**SMALLEST, "initializer_range": 0.3, **changes})).eval()
    for parameter in model.parameters():  # biases start at 0, which hides a lost one
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


def edit_weights(folder: Path, **changes: Tensor | None) -> None:
    """Replace, add or (None) drop weights of the file."""
    path = folder / "model.safetensors"
    weights = {name.replace(".", "__"): weight for name, weight in load_file(path).items()} | changes
    save_file({name.replace("__", "."): weight for name, weight in weights.items() if weight is not None}, path)


def spectrogram(batch: int = 3) -> Tensor:
    return torch.rand(batch, 1, 192, 128, generator=torch.Generator().manual_seed(1)).square() * 3


# ------------------------------------------------------------------------------------------------------- from a folder


@torch.no_grad()
def test_the_embedding_is_the_plain_linear_map_of_the_last_class_token(tmp_path):
    model = save_vit(tmp_path)
    class_token = model(spectrogram()).last_hidden_state[:, 0].double()
    expected = class_token @ model.pooler.dense.weight.double().T + model.pooler.dense.bias.double()
    found = load_teacher(tmp_path)(spectrogram())
    assert found.shape == (3, 512)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_patch_tokens_are_the_last_layers_without_the_class_token_and_come_with_the_embedding_in_one_pass(tmp_path):
    model = save_vit(tmp_path)
    tokens = model.embeddings(spectrogram())
    for layer in model.layers:
        tokens = layer(tokens)
    expected = model.layernorm(tokens)  # [B, 1 + N, P], the class token first

    teacher, passes = load_teacher(tmp_path), []
    teacher.model.register_forward_hook(lambda *_: passes.append(1))
    embedding, patches = teacher.embed_with_patches(spectrogram().requires_grad_())

    assert patches.shape == (3, 96, 32) and not patches.requires_grad and not embedding.requires_grad
    torch.testing.assert_close(patches, expected[:, 1:])
    assert passes == [1]
    assert torch.equal(embedding, teacher(spectrogram()))


@torch.no_grad()
def test_patch_tokens_stand_in_the_order_of_the_students(tmp_path):
    """Noise in one patch, row 5 and column 2 of the 12 x 8 grid, changes the token that the student has for it most."""
    save_vit(tmp_path, num_hidden_layers=1, initializer_range=0.02)
    student = Student(StudentConfig(width=24, blocks=1, heads=3, mlp_width=40, canon="none"))
    changed = spectrogram(1)
    changed[:, :, 80:96, 32:48] += 5 * torch.rand(16, 16, generator=torch.Generator().manual_seed(2))
    teacher = load_teacher(tmp_path)
    for tokens in (lambda x: teacher.embed_with_patches(x)[1], student.tokens):
        assert (tokens(changed) - tokens(spectrogram(1))).norm(dim=2).argmax() == 5 * 8 + 2


def test_a_folder_is_named_by_the_hash_of_its_weights(tmp_path):
    save_vit(tmp_path)
    teacher = load_teacher(tmp_path)
    assert teacher.name == str(tmp_path)
    assert teacher.revision == "sha256:" + hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert not teacher.is_stand_in

    load_teacher(tmp_path, revision=teacher.revision)
    edit_weights(tmp_path, layernorm__bias=torch.zeros(32))
    with pytest.raises(TeacherError, match=f"holds other weights: expected {teacher.revision}, found sha256:"):
        load_teacher(tmp_path, revision=teacher.revision)


def test_the_teacher_is_frozen_and_stays_in_eval_mode(tmp_path):
    save_vit(tmp_path, hidden_dropout_prob=0.5)
    teacher = load_teacher(tmp_path)
    wrapped = torch.nn.ModuleList([teacher]).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in wrapped.parameters())
    assert not teacher(spectrogram().requires_grad_()).requires_grad
    assert torch.equal(teacher(spectrogram()), teacher(spectrogram()))


OLD_NAMES = {
    r"^layers\.(\d+)\.attention\.q_proj": r"encoder.layer.\1.attention.attention.query",
    r"^layers\.(\d+)\.attention\.k_proj": r"encoder.layer.\1.attention.attention.key",
    r"^layers\.(\d+)\.attention\.v_proj": r"encoder.layer.\1.attention.attention.value",
    r"^layers\.(\d+)\.attention\.o_proj": r"encoder.layer.\1.attention.output.dense",
    r"^layers\.(\d+)\.mlp\.fc1": r"encoder.layer.\1.intermediate.dense",
    r"^layers\.(\d+)\.mlp\.fc2": r"encoder.layer.\1.output.dense",
    r"^layers\.(\d+)\.": r"encoder.layer.\1.",
}


@pytest.mark.parametrize("are_old", [True, False], ids=["names of 2025, as published", "names of transformers 5"])
def test_weights_load_under_the_names_of_either_transformers(tmp_path, are_old):
    model = save_vit(tmp_path)
    weights = {}
    for name, weight in model.state_dict().items():
        for pattern, old in OLD_NAMES.items() if are_old else ():
            name = re.sub(pattern, old, name)  # noqa: PLW2901
        weights[name] = weight.clone()
    assert ("encoder.layer.1.attention.attention.query.weight" in weights) is are_old
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})

    loaded = load_teacher(tmp_path).model.state_dict()

    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(loaded[name], weight) for name, weight in model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hidden_size": 64, "pooler_output_size": None, "pooler_act": "tanh"},
            "pooler_output_size is 64, expected 512; pooler_act is 'tanh', expected 'linear'",
        ),
        ({"image_size": (128, 192)}, r"image_size is \[128, 192\], expected \[192, 128\]"),
        ({"num_channels": 3}, "num_channels is 3, expected 1"),
    ],
    ids=["the pooler of transformers before 4.50", "mel before time", "colour"],
)
def test_a_vit_of_another_kind_is_refused(tmp_path, changes, message):
    save_vit(tmp_path, **changes)
    with pytest.raises(TeacherError, match=f"config.json is no teacher of HeAR's kind: {message}"):
        load_teacher(tmp_path)


def test_a_network_that_is_no_vit_is_refused(tmp_path):
    save_vit(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "deit"}))
    with pytest.raises(TeacherError, match="model_type is 'deit', expected 'vit'"):
        load_teacher(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layernorm__bias": None}, "1 missing_keys, such as layernorm.bias"),
        ({"head__weight": torch.zeros(3)}, "1 unexpected_keys, such as head.weight"),
        ({"pooler__dense__weight": torch.zeros(32, 32)}, "1 mismatched_keys, such as .*pooler.dense.weight.*"),
    ],
    ids=["missing", "left over", "of another shape"],
)
def test_weights_that_do_not_fit_are_refused_not_drawn_at_random(tmp_path, changes, message):
    save_vit(tmp_path)
    edit_weights(tmp_path, **changes)
    with pytest.raises(TeacherError, match=f"do not fit its config.json: {message}; expected an exact match"):
        load_teacher(tmp_path)


def test_damaged_or_incomplete_folders_are_refused(tmp_path):
    save_vit(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(TeacherError, match=r"model\.safetensors is damaged"):
        load_teacher(tmp_path)

    weights.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(TeacherError, match=r"has no model\.safetensors"):
        load_teacher(tmp_path)

    config.write_text("{")
    with pytest.raises(TeacherError, match=r"config\.json cannot be read"):
        load_teacher(tmp_path)
    config.unlink()
    with pytest.raises(TeacherError, match=r"config\.json cannot be read"):
        load_teacher(tmp_path)


def test_a_missing_folder_is_named_without_asking_the_hub(tmp_path):
    with pytest.raises(TeacherError, match=r"no folder .*/nothing, and no id on the hub either.*\n.*make demo"):
        load_teacher(tmp_path / "nothing")


def stretched_by_the_book(positions: np.ndarray, rows: int) -> np.ndarray:
    """[1 + 96, P] -> [1 + 8 rows, P]: token by token, linear along time, pixel centres aligned, held at the ends."""
    stretched = [positions[0]]
    for row in range(rows):
        place = min(max((row + 0.5) * 12 / rows - 0.5, 0), 11)
        below = int(place)
        above = min(below + 1, 11)
        for column in range(8):
            low, high = positions[1 + 8 * below + column], positions[1 + 8 * above + column]
            stretched.append((1 - place + below) * low + (place - below) * high)
    return np.array(stretched)


@torch.no_grad()
@pytest.mark.parametrize("rows", [3, 12, 15, 37])
def test_any_length_gives_what_a_vit_of_that_length_with_stretched_positions_gives(tmp_path, rows):
    model = save_vit(tmp_path)
    other = ViTModel(ViTConfig(**SMALLEST | {"image_size": (16 * rows, 128)})).eval()
    weights = model.state_dict()
    positions = stretched_by_the_book(weights["embeddings.position_embeddings"][0].double().numpy(), rows)
    weights["embeddings.position_embeddings"] = torch.from_numpy(positions).float()[None]
    other.load_state_dict(weights)
    image = torch.rand(2, 1, 16 * rows, 128, generator=torch.Generator().manual_seed(rows)) * 3

    found = load_teacher(tmp_path).embed_any_length(image)

    torch.testing.assert_close(found, other(image).pooler_output, atol=1e-5, rtol=1e-5)


def test_two_seconds_give_the_same_at_any_length_as_in_a_plain_call_also_of_a_copy(tmp_path):
    save_vit(tmp_path)
    teacher = load_teacher(tmp_path)
    plain = teacher(spectrogram())
    torch.testing.assert_close(teacher.embed_any_length(spectrogram()), plain, atol=1e-6, rtol=1e-6)

    copied = copy.deepcopy(teacher)
    copied.model.embeddings.position_embeddings.data.mul_(-1)
    changed = copied.embed_any_length(spectrogram())
    torch.testing.assert_close(changed, copied(spectrogram()), atol=1e-6, rtol=1e-6)
    assert (changed - plain).abs().max() > 0.01


@pytest.mark.parametrize("rows", [0, 15, 200])
def test_rows_that_fill_no_patches_are_refused_at_any_length(tmp_path, rows):
    save_vit(tmp_path)
    with pytest.raises(ValueError, match=f"has {rows} rows, expected a positive multiple of 16"):
        load_teacher(tmp_path).embed_any_length(torch.zeros(1, 1, rows, 128))


# ----------------------------------------------------------------------------------------- stand-in and random weights


def test_a_random_teacher_has_the_parameters_of_hear():
    with torch.device("meta"):
        teacher = random_teacher(0)
    assert sum(parameter.numel() for parameter in teacher.parameters()) == 303_199_744
    assert teacher.is_stand_in


def test_a_random_teacher_is_a_function_of_its_seed(monkeypatch):
    monkeypatch.setattr("hear_distill.teacher.HEAR_CONFIG", SMALLEST)
    weights = [random_teacher(seed).model.pooler.dense.weight for seed in (7, 7, 8)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert random_teacher(7).revision == "seed 7"


def test_a_stand_in_is_a_function_of_its_seed_and_marked_as_one(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    teachers = [load_teacher(save_stand_in(tmp_path / str(i), seed)) for i, seed in enumerate((7, 7, 8))]
    assert torch.equal(torch.rand(3), expected), "making a stand-in moved the caller's random numbers"

    assert teachers[0].revision == teachers[1].revision != teachers[2].revision
    assert all(teacher.is_stand_in for teacher in teachers)


def test_a_stand_in_computes_as_hear_does(tmp_path):
    model = load_teacher(save_stand_in(tmp_path, 7)).model
    x = torch.linspace(-4, 4, 41)
    expected = 0.5 * x * (1 + torch.tanh(0.7978845608 * x * (1 + 0.044715 * x * x)))
    torch.testing.assert_close(model.layers[0].mlp.activation_fn(x), expected)
    assert model.layernorm.eps == model.layers[3].layernorm_after.eps == 1e-6
    assert model.embeddings.position_embeddings.shape == (1, 1 + 12 * 8, 128)


def sounds() -> Tensor:
    """[32, 32000]: pink noise, tones, clicks and silence with a hum, eight of each, all different."""
    generator = torch.Generator().manual_seed(3)
    time_s = torch.arange(32_000) / 16_000
    white = torch.randn(8, 32_000, generator=generator)
    slope = torch.arange(16_001).clamp_min(1) ** -torch.linspace(0.2, 0.8, 8)[:, None]
    pink = torch.fft.irfft(torch.fft.rfft(white) * slope)
    hz = 100 * 1.8 ** torch.arange(8.0)
    tones = torch.sin(2 * torch.pi * hz[:, None] * time_s)
    clicks = torch.zeros(8, 32_000)
    for i in range(8):
        clicks[i, 400 * i :: 700 + 1800 * i] = 1
    hum = torch.sin(2 * torch.pi * 50 * time_s) * (time_s < torch.linspace(0.1, 1.9, 8)[:, None])
    return torch.cat([pink / pink.std(), tones, clicks, hum])


@pytest.mark.parametrize("seed", [0, 1])
def test_a_stand_in_tells_sounds_apart(tmp_path, seed):
    embeddings = load_teacher(save_stand_in(tmp_path, seed))(MelPcen()(sounds())).double()  # [32, E]
    unit = embeddings / embeddings.norm(dim=1, keepdim=True)
    cosine = unit @ unit.T
    assert (cosine.sum() - 32) / (32 * 31) < 0.9
    share = torch.linalg.svdvals(embeddings - embeddings.mean(dim=0)) ** 2
    share = share / share.sum()
    effective_rank = torch.exp(-(share * share.clamp_min(1e-30).log()).sum())
    assert effective_rank > 6


# --------------------------------------------------------------------------------------------------------- from the hub


class Hub(BaseHTTPRequestHandler):
    """The part of the hub that a download of two files needs. Repeats the sender's token in its error messages."""

    files: Path

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def answer(self) -> None:
        name = "/".join(self.path.removeprefix("/api/models").split("/")[1:3])
        if name == "stop/now":  # from this answer on, connections are refused
            self.server.shutdown()
            self.server.server_close()
        if name in ("missing/model", "stop/now"):
            self.refuse(404, "RepoNotFound")
        elif name == "dropped/model":
            self.close_connection = True  # no answer at all
        elif name == "badtoken/model":
            self.refuse(401, None)
        elif "no-such-branch" in self.path:
            self.refuse(404, "RevisionNotFound")
        elif "/tree/" in self.path:
            names = ["config.json", "model.safetensors", "pytorch_model.bin"]
            if name == "pickle/model":
                names.remove("model.safetensors")
            self.send([{"type": "file", "path": name, "size": 1, "oid": name} for name in names])
        elif self.path.startswith("/api/"):
            self.send({"id": name, "sha": COMMIT, "siblings": []})
        elif name == "google/hear-pytorch":  # the hub shows anybody what a gated model consists of
            self.refuse(403, "GatedRepo")
        elif name == "anonymous/model":
            self.refuse(401, "GatedRepo")
        else:
            self.send_bytes((self.files / self.path.split("/")[-1]).read_bytes())

    def refuse(self, status: int, code: str | None) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", f"you sent {self.headers['Authorization']}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send(self, value: object) -> None:
        self.send_bytes(json.dumps(value).encode())

    def send_bytes(self, data: bytes) -> None:
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


ASK = """
import json, sys
from hear_distill.teacher import TeacherError, load_teacher
for name, revision in json.loads(sys.argv[1]):
    try:
        teacher = load_teacher(name, revision=revision)
        largest = teacher.model.pooler.dense.weight.max().item()
        print(json.dumps([teacher.name, teacher.revision, teacher.is_stand_in, largest]))
    except TeacherError as e:
        print(json.dumps(str(e)))
"""
QUESTIONS = {
    "gated": ("google/hear-pytorch", None),
    "gated, unknown account": ("anonymous/model", None),
    "missing": ("missing/model", None),
    "unknown token": ("badtoken/model", None),
    "unknown revision": ("public/model", "no-such-branch"),
    "pickle only": ("pickle/model", None),
    "dropped": ("dropped/model", None),
    "public": ("public/model", None),
    "stop": ("stop/now", None),
    "public, cached": ("public/model", None),
    "offline": ("other/model", None),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Answers to QUESTIONS from a process whose hub is `Hub` on this machine, until it stops."""
    Hub.files = save_stand_in(tmp_path_factory.mktemp("hub"), 7)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}).start()
    try:
        done = subprocess.run(
            [sys.executable, "-c", ASK, json.dumps(list(QUESTIONS.values()))],
            env={
                **{
                    name: value
                    for name, value in os.environ.items()
                    if not re.match("HF_|HUGGING|.*proxy$", name, re.I)
                },
                "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
                "HF_HOME": str(tmp_path_factory.mktemp("cache")),
                "HF_TOKEN": TOKEN,
                "OMP_NUM_THREADS": "1",
            },
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr
    return dict(zip(QUESTIONS, map(json.loads, done.stdout.splitlines()), strict=True))


def test_the_revision_of_a_model_on_the_hub_is_its_commit_and_its_weights_are_those_served(answers):
    expected = load_teacher(Hub.files).model.pooler.dense.weight.max().item()
    assert answers["public"] == ["public/model", COMMIT, True, expected]


def test_a_model_in_the_cache_loads_without_network_as_the_same_revision(answers):
    assert answers["public, cached"] == answers["public"]


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (
            "gated",
            r"google/hear-pytorch is gated, .* \(HTTP 403, a token was sent\)\n.*https://huggingface\.co/google/hear-",
        ),
        ("gated, unknown account", r"anonymous/model is gated, .* \(HTTP 401, .*//huggingface\.co/anonymous/model\n"),
        ("missing", r"no folder missing/model, and no model of this name on the hub .*HTTP 404"),
        ("unknown token", r"refuses to send badtoken/model \(HTTP 401"),
        ("unknown revision", r"public/model has no revision no-such-branch .*/commits/main"),
        ("pickle only", r"has no model\.safetensors; .* never a pickle"),
        ("dropped", r"cannot be reached \(RemoteProtocolError\), and dropped/model is not in its cache"),
        ("offline", r"cannot be reached \(ConnectError\), and other/model is not in its cache"),
    ],
)
def test_a_failure_at_the_hub_is_explained(answers, question, message):
    assert re.match(".*" + message, answers[question], re.DOTALL)
    if question not in ("unknown revision", "pickle only"):
        assert answers[question].endswith("make demo")
    if "gated" in question:
        assert ".env:  HF_TOKEN=" in answers[question]


def test_the_token_is_in_no_message(answers):
    assert TOKEN not in json.dumps(answers)


def test_bfloat16_is_taken_where_it_agrees_and_refused_with_the_flag_where_it_does_not(tmp_path, monkeypatch):
    folder = save_stand_in(tmp_path / "teacher", seed=0)
    images = torch.rand(6, 1, 192, 128, generator=torch.Generator().manual_seed(0)).cumsum(dim=2)
    teacher = load_teacher(folder)
    exact = teacher(images)
    monkeypatch.setattr("hear_distill.teacher.MIN_COSINE", 0.9)
    to_bfloat16(teacher, images)
    assert teacher(images).dtype == teacher.embed_with_patches(images)[1].dtype == torch.bfloat16
    away = (teacher(images).float() - exact).norm() / (exact - exact.mean(dim=0)).norm()
    assert 1e-4 < away < 0.5
    monkeypatch.setattr("hear_distill.teacher.MIN_COSINE", 0.9999999)
    with pytest.raises(TeacherError, match="--teacher-precision fp32"):
        to_bfloat16(load_teacher(folder), images)
    with pytest.raises(TeacherError, match="found 1"):
        to_bfloat16(load_teacher(folder), images[:1])
