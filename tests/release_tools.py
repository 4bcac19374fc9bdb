"""Small students as people get them: a checkpoint, a released folder, and a process that has a hub of its own."""

import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from hub_server import HubServer
from lake_tools import ROOT
from safetensors.torch import save_file

from hear_distill import checkpoint
from hear_distill.files import write_json
from hear_distill.student import Student, StudentConfig

SMALL = StudentConfig(width=24, blocks=1, heads=2, mlp_width=48)


def small_student(config: StudentConfig = SMALL) -> Student:
    """Random weights, always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return Student(config).eval()


def write_checkpoint(folder: Path, config: StudentConfig = SMALL) -> Path:
    """As the trainer writes it, and the configuration of its run."""
    state = {"student_config": asdict(config), "student": small_student(config).state_dict()}
    path = checkpoint.save(folder, {**state, "samples": 51_200, "teacher_revision": "sha256:0123"})
    run = {"teacher": "demo/teacher", "teacher_revision": "sha256:0123", "is_stand_in": True, "seed": 0}
    write_json(folder / "config.json", run)
    return path


def write_folder(folder: Path, **changes: object) -> Path:
    """The two files that make a student; `changes` are entries of the configuration."""
    folder.mkdir()
    save_file(small_student().state_dict(), folder / "model.safetensors")
    config = {"model_type": "hear-distill-student", "format": 1, "architecture": asdict(SMALL)}
    write_json(folder / "config.json", {**config, **changes})
    return folder


def run_python(
    *command: object, hub: HubServer | None = None, home: Path | None = None, token: str | None = None, **variables: str
) -> "subprocess.CompletedProcess[str]":
    """In a process of its own, as the address of the hub is read when huggingface_hub is imported."""
    environment = hub.environment(home, token) if hub else dict(os.environ)
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_XET": "1", **variables}
    arguments = [sys.executable, *map(str, command)]
    return subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
