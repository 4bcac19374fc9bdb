"""doctor and --dry-run: what must change is found, nothing secret is said, and the arithmetic is the trainer's."""

import re
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_server import HubServer
from lake_tools import ROOT, make_lake, write_source
from train_tools import load_stage, set_cap

from hear_distill import doctor, plan
from hear_distill.doctor import Finding
from hear_distill.files import GIB, MIB, UserError, write_json
from hear_distill.plan import Rate, Run
from hear_distill.shards import shard_bytes
from hear_distill.teacher import save_stand_in

SUPERVISOR = ROOT / "datalake" / "run_lake.py"
TOKEN = "hf_thisIsTheSecretOfTheUser"
ASK_THE_HUB = """
import os, sys
from hear_distill import doctor
for token in ("", "hf_ofSomebodyElse", sys.argv[1]):
    os.environ["HF_TOKEN"] = token
    print(*doctor.teacher("google/hear"), sep="|")
for source in ("laion/small", "laion/nowhere"):
    print(*doctor.source(source), sep="|")
"""


@pytest.fixture
def run(tmp_path) -> Run:
    """A run with round numbers."""
    return Run(
        **{"lake": tmp_path / "lake", "out": tmp_path / "run", "source": "somewhere", "max_workers": 4},
        **{"cap_bytes": 10 * GIB, "floor_bytes": 2 * GIB, "streamer": {"shard_clips": 1000, "val_clips": 500}},
        trainer={
            **{
                "open_shards": 8,
                "save_every": 2560,
                "chunk_size": 64,
                "chunks": 2,
                "target_clips": 1000,
                "controller": "off",
            },
            "schedule": {"total_samples": 128_000},
            **{"device": "cuda", "teacher": str(tmp_path)},
        },
    )


def one(findings: object) -> Finding:
    (finding,) = findings
    return finding


# ---- the machine ----


@pytest.mark.parametrize(
    ("text", "grade", "expected"),
    [
        ("numpy=={numpy}\npsutil=={psutil}\n-e .\n", "ok", "all 2 as pinned"),
        ("numpy==1.0\npsutil=={psutil}\n", "could", "numpy {numpy} instead of 1.0"),
        ("numpy=={numpy}\nno-such-package==1.0\n", "MUST", "not installed: no-such-package"),
    ],
)
def test_packages_are_compared_with_the_pinned_ones(tmp_path, text, grade, expected):
    from importlib.metadata import version

    found = {name: version(name) for name in ("numpy", "psutil")}
    path = tmp_path / "requirements.txt"
    path.write_text(text.format(**found))
    finding = doctor.packages(path)
    assert finding.grade == grade and expected.format(**found) in finding.text
    assert grade == "ok" or f"pip install -r {path}" in finding.text


@pytest.mark.parametrize(("name", "value"), [("RLIMIT_NOFILE", 256), ("RLIMIT_FSIZE", GIB)])
def test_a_limit_that_is_too_low_must_change(monkeypatch, name, value):
    good = resource.RLIM_INFINITY
    low = getattr(resource, name)
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda kind: (value if kind == low else good, good))
    musts = [finding for finding in doctor.limits() if finding.grade == "MUST"]
    assert "ulimit" in one(musts).text
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda kind: (good, good))
    assert one(doctor.limits()).grade == "ok"


@pytest.mark.parametrize(("free_gib", "grade"), [(13, "MUST"), (14, "ok")])
def test_room_is_asked_for_cap_floor_and_checkpoints_together_where_they_share_a_disk(
    run, monkeypatch, free_gib, grade
):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=free_gib * GIB))
    monkeypatch.setenv("HF_HOME", str(run.lake))
    finding = one(doctor.room(replace(run, cap_bytes=11 * GIB)))  # 11 + 2 + checkpoints of 0.97
    assert finding.grade == grade and "cap and the floor of the lake and checkpoints" in finding.text


def test_what_the_lake_holds_already_needs_no_more_room(run, monkeypatch):
    run.lake.mkdir()
    write_json(run.lake / "status.json", {"used_bytes": 10 * GIB})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=3 * GIB))
    assert {finding.grade for finding in doctor.room(run)} == {"ok"}


@pytest.mark.parametrize(("kind", "grade"), [("ext4", "ok"), ("nfs4", "MUST"), ("fuse.sshfs", "MUST"), ("xfs", "ok")])
def test_a_lake_on_a_network_disk_is_refused(tmp_path, monkeypatch, kind, grade):
    mounts = [SimpleNamespace(mountpoint="/", fstype="overlay"), SimpleNamespace(mountpoint=tmp_path, fstype=kind)]
    mounts = [SimpleNamespace(mountpoint=str(mount.mountpoint), fstype=mount.fstype) for mount in mounts]
    monkeypatch.setattr(doctor.psutil, "disk_partitions", lambda all: mounts)
    finding = doctor.kind_of_disk(tmp_path / "not" / "yet" / "there")
    assert finding.grade == grade and kind in finding.text


def test_the_speed_of_the_disk_is_measured_and_nothing_stays_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "PROBE_BYTES", 8 * MIB)
    assert doctor.disk_speed(tmp_path / "lake", Rate(1.0, "a snail")).grade == "ok"
    assert doctor.disk_speed(tmp_path / "lake", Rate(1e9, "a dream")).grade == "could"
    assert list(tmp_path.iterdir()) == []


def test_shared_memory_of_a_container_is_too_small_for_several_gpus(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(total=64 * MIB))
    assert doctor.shared_memory(Path("/dev")).grade == "could"
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(total=8 * GIB))
    assert doctor.shared_memory(Path("/dev")).grade == "ok"


def fake_gpu(monkeypatch, smi: str | None, is_available: bool, count: int = 1) -> None:
    import torch

    def run_smi(*_: object, **__: object) -> SimpleNamespace:
        if smi is None:
            raise FileNotFoundError
        return SimpleNamespace(returncode=0, stdout=smi)

    monkeypatch.setattr(doctor.subprocess, "run", run_smi)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: is_available)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(("count", "grade"), [(2, "ok"), (1, "MUST")])
def test_each_rank_needs_a_gpu(monkeypatch, count, grade):
    fake_gpu(monkeypatch, "NVIDIA H200, 580.1, 143771 MiB\n", True, count)
    _, finding = doctor.gpu("cuda", 2)
    assert finding.grade == grade and (grade == "ok" or "--gpus 2, but torch finds 1" in finding.text)


@pytest.mark.parametrize(
    ("smi", "is_available", "device", "grade", "expected"),
    [
        ("NVIDIA H200, 580.1, 143771 MiB\n", True, "cuda", "ok", "580.1"),
        ("NVIDIA H200, 450.1, 143771 MiB\n", False, "cuda", "MUST", "update the driver"),
        (None, False, "cuda", "MUST", "no NVIDIA GPU"),
        (None, False, "cpu", "ok", "none needed"),
    ],
    ids=["good", "old driver", "none", "not wanted"],
)
def test_a_gpu_that_torch_cannot_use_must_change(monkeypatch, smi, is_available, device, grade, expected):
    fake_gpu(monkeypatch, smi, is_available)
    name, finding = doctor.gpu(device)
    assert finding.grade == grade and expected in finding.text and bool(name) == is_available


@pytest.mark.parametrize(
    ("needed", "num_cores", "max_workers", "grade", "expected"),
    [
        (1_000, 5, 4, "ok", "4 for streamers and 1"),
        (1_000, 4, 4, "could", "wait 25% of the time"),
        (1_000, 8, 3, "could", "--max-workers is 3; raise it to 4"),
        (None, 1, 1, "ok", "not known what the trainer takes"),
    ],
)
def test_cores_are_compared_with_the_decoding_that_the_gpu_needs(run, needed, num_cores, max_workers, grade, expected):
    rate = Rate(needed, "said so") if needed else None
    finding = doctor.cores(replace(run, max_workers=max_workers), rate, Rate(250.0, "measured"), num_cores)
    assert finding.grade == grade and expected in finding.text


def test_each_rank_of_the_trainer_has_a_core_besides_those_that_decode(run):
    needed, per_core = Rate(1_000, "said so"), Rate(250.0, "measured")
    found = [doctor.cores(replace(run, max_workers=4, gpus=3), needed, per_core, num_cores) for num_cores in (7, 6, 2)]
    assert [finding.grade for finding in found] == ["ok", "could", "could"]
    assert "4 for streamers and 3" in found[0].text
    assert "wait 25% of the time" in found[1].text and "wait 100% of the time" in found[2].text


# ---- the outside ----


def test_the_teacher_and_the_source_are_asked_for_at_the_hub_and_no_token_is_ever_shown(tmp_path):
    model = save_stand_in(tmp_path / "model", seed=0)
    source = write_source(tmp_path / "source", num_tars=1, recordings_per_tar=1)
    gated = {"google/hear": [TOKEN]}
    with HubServer({"laion/small": source}, {"google/hear": model}, gated) as hub:
        environment = {**hub.environment(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-c", ASK_THE_HUB, TOKEN]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert ended.returncode == 0, ended.stderr
    found = re.findall(r"^(ok|MUST)\|(teacher|source)\|(.*)", ended.stdout, re.MULTILINE)
    assert [grade for grade, *_ in found] == ["MUST", "MUST", "ok", "ok", "MUST"]
    assert "accept the terms" in ended.stdout and "hf_" not in ended.stdout + ended.stderr


def test_a_teacher_and_a_source_in_folders_are_looked_at(tmp_path):
    teacher = save_stand_in(tmp_path / "teacher", seed=0)
    source = write_source(tmp_path / "source", num_tars=2, recordings_per_tar=1)
    assert doctor.teacher(str(teacher)).grade == "ok"
    assert doctor.source(str(source)) == Finding("ok", "source", f"{source}: 2 tars")
    (teacher / "config.json").write_text("{}")
    assert doctor.teacher(str(teacher)).grade == "MUST"
    assert doctor.source(str(tmp_path / "nowhere")).grade == "MUST"


@pytest.mark.parametrize(("grades", "code"), [(["ok", "could"], 0), (["ok", "MUST", "ok"], 1)])
def test_the_exit_code_says_whether_something_must_change_and_each_finding_is_one_line(
    run, monkeypatch, capsys, grades, code
):
    found = [Finding(grade, "thing", "found\n  this; do that") for grade in grades]
    monkeypatch.setattr(doctor, "findings", lambda _: iter(found))
    assert doctor.examine(run) == code
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(grades) + 1 and "found this; do that" in lines[0]


# ---- rates ----


def test_what_the_run_has_measured_goes_before_what_is_estimated_of_its_gpu(tmp_path):
    assert plan.needed_rate(tmp_path, "NVIDIA H200").clips_per_s == 5_800
    assert "not measured" in str(plan.needed_rate(tmp_path, "NVIDIA RTX A6000"))
    assert plan.needed_rate(tmp_path, "NVIDIA T4") is None
    write_json(tmp_path / "progress.json", {"clips_per_s": 77.0})
    assert plan.needed_rate(tmp_path, "NVIDIA H200").clips_per_s == 77
    write_json(tmp_path / "config.json", {"num_ranks": 7})
    assert plan.needed_rate(tmp_path, "NVIDIA H200", gpus=3).clips_per_s == 33


def test_the_decoding_rate_is_that_of_two_second_clips(monkeypatch):
    monkeypatch.setattr(plan, "DECODE_S", 0.05)
    blocks, clock = [], iter([0.0, 0.02, 0.04, 0.06])
    decode = plan.decode_blocks
    monkeypatch.setattr(plan, "decode_blocks", lambda data: blocks.append(sum(map(len, decode(data)))) or iter([]))
    monkeypatch.setattr(plan.time, "process_time", lambda: next(clock))
    assert plan.decode_rate().clips_per_s == 0  # our stand-in hands nothing on
    assert len(blocks) == 3 and all(abs(count - 160_000) < 2_000 for count in blocks)  # 10 s, each time whole
    monkeypatch.undo()
    monkeypatch.setattr(plan, "DECODE_S", 0.05)
    assert 10 < plan.decode_rate().clips_per_s < 100_000


# ---- the plan ----


def test_the_plan_adds_up(run):
    lines = plan.lines_of(run, Rate(2_000.0, "measured"), Rate(250.0, "one core"))
    text = "\n".join(lines)
    cap_clips = 10 * GIB // 66_560
    for expected in (
        f"{cap_clips:,} clips",
        "4,000  4 workers",
        "8,000  8 open shards",
        "5,120  2 checkpoint intervals of 2560 clips",
        "1,000  2 validation sets of 500",
        "18,120  in all",
        f"stock       {cap_clips - 1_000:,} clips: 80 s at 2,000 clips/s (measured)",
        "1,000 clips/s (4 x 250 clips/s (one core)): full after 2.7 min",
        "1,000 steps x 128 = 128,000 clips: 2.1 min, of which the trainer waits 50% for data",
    ):
        assert expected in text
    assert "not known how long" in "\n".join(plan.lines_of(run, None, Rate(250.0, "one core")))


@pytest.mark.parametrize("controller", ["off", "seesaw"])  # seesaw may take 16 times the batch
def test_the_plan_refuses_a_cap_exactly_where_the_trainer_does(run, controller):
    trainer = load_stage(ROOT / "distill_hear_vit_s_canon2d.py")
    make_lake(run.lake, shard_clips=1000, val_clips=500).close()
    config = trainer.Config(
        lake=run.lake,
        device="cpu",
        open_shards=8,
        save_every=2560,
        log_every=1280,
        chunk_size=64,
        chunks=2,
        target_clips=1000,
        controller=controller,
    )
    run = replace(run, max_workers=2, trainer={**run.trainer, "controller": controller})
    needed = shard_bytes(sum(plan.in_flight(run).values()))
    for cap_bytes, is_enough in ((needed, True), (needed - 1, False)):
        set_cap(run.lake, cap_bytes)
        planned = replace(run, cap_bytes=cap_bytes)
        if is_enough:
            trainer.check(config)
            plan.lines_of(planned, None, Rate(1.0, ""))
            continue
        with pytest.raises(UserError, match="too small"):
            trainer.check(config)
        with pytest.raises(UserError, match="too small"):
            plan.lines_of(planned, None, Rate(1.0, ""))


def test_a_dry_run_prints_the_plan_and_starts_and_makes_nothing(tmp_path):
    flags = ["--dry-run", "--max-workers", "2", "--train-args", "--save-every 640", "--cap-gb", "0.2"]
    command = [sys.executable, SUPERVISOR, "demo", *flags]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "1,280  2 checkpoint intervals of 640 clips" in ended.stdout and "\n$ python" in ended.stdout
    assert list(tmp_path.iterdir()) == []
