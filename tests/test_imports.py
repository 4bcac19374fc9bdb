"""Who imports whom: imports point down only, stages never meet in Python, and torch is loaded where it is needed."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from lake_tools import ROOT

# What each module of the package may import from the package. A new edge is a decision: make it here as well.
ALLOWED = {
    "__init__": set(),
    "agreement": set(),
    "audio": {"mp3"},
    "augment": set(),
    "backup": {"files"},
    "bootstrap": set(),
    "checkpoint": {"files"},
    "children": {"files", "runlog"},
    "circor": {"tabular", "tasks"},
    "cli": {"files", "runlog"},
    "control": set(),
    "coswara": {"hub_files", "tabular", "tasks"},
    "critical_lr": set(),
    "cutter": {"audio", "drift", "schema", "shards", "sources", "tars"},
    "data": {"audio", "files", "lake", "lengths", "locks", "schema", "shards"},
    "demo": {"synthetic", "teacher"},
    "doctor": {"demo", "files", "hub", "plan", "remote", "runlog", "shards", "sources", "teacher"},
    "drift": set(),
    "embedders": {"checkpoint", "files", "frontend", "student", "teacher"},
    "embedding": {"audio", "frontend"},
    "embedding_cache": {"files"},
    "ensemble": {"probes"},
    "eval_datasets": {"circor", "coswara", "flusense", "fsd50k", "icbhi", "tabular", "tasks"},
    "evaluation_pictures": {"evaluation_report", "files", "measure"},
    "evaluation_report": {"bootstrap", "measure", "published"},
    "feed": {"augment", "data", "frontend", "lake", "locks", "ranks", "runlog", "sample", "shares"},
    "files": set(),
    "fit": {"files", "frontend", "learning", "objective", "ranks", "teacher"},
    "flusense": {"audio", "hub_files", "tabular", "tasks"},
    "frontend": set(),
    "fsd50k": {"hub_files", "tabular", "tasks"},
    "guard": {"audio", "lake", "locks", "tars"},
    "hear_module": {"audio", "frontend", "protocols", "student"},
    "hear_s": {"files"},
    "history": {"files"},
    "hub": {"files", "remote", "tars"},
    "hub_files": {"tasks"},
    "icbhi": {"tabular", "tasks"},
    "journal": {"files", "runlog"},
    "keeping": {"checkpoint", "feed", "files", "lake", "learning", "ranks"},
    "lake": {"files", "ledger", "schema"},
    "launch": {"nodes", "ranks", "runlog"},
    "learning": {
        *("files", "noise_scale", "objective", "pace", "schedule", "student"),
        *("targets", "teacher", "watch", "weight_ema"),
    },
    "ledger": {"files", "locks", "schema"},
    "lengths": {"audio", "schedule", "shards"},
    "locks": {"files"},
    "losses": set(),
    "measure": {"bootstrap", "ensemble", "metrics", "neighbours", "paper_probe", "probes", "splits", "tasks"},
    "metrics": set(),
    "model_card": {"files"},
    "mp3": set(),
    "neighbours": {"probes"},
    "nodes": set(),
    "noise_scale": set(),
    "objective": {"losses", "ranks", "student", "targets", "teacher"},
    "onnx_files": {"files", "frontend", "onnx_graph", "student"},
    "onnx_graph": {"frontend", "student"},
    "pace": {"critical_lr", "noise_scale", "ranks", "schedule"},
    "paper_probe": {"metrics", "probes"},
    "plan": {"audio", "files", "room", "runlog", "schedule", "shards", "status", "synthetic"},
    "plots": {"files", "runlog"},
    "pretrained": {"files"},
    "probes": {"files", "metrics"},
    "protocols": {"audio", "embedders", "files", "frontend"},
    "published": set(),
    "quick_probe": {"audio", "eval_datasets", "metrics", "probes", "splits", "tasks"},
    "ranks": {"files", "runlog"},
    "rebuild": {"audio", "backup", "files", "lake", "schema", "shards", "sources"},
    "release": {"files"},
    "remote": {"files", "tars"},
    "repair": {"backup", "files", "lake", "locks", "rebuild", "shards"},
    "room": {"data", "files", "lake", "shards"},
    "runlog": {"files"},
    "sample": {"audio", "lake", "schema", "shards"},
    "schedule": set(),
    "schema": set(),
    "shards": {"audio"},
    "shares": {"files"},
    "sources": {"files", "hub", "remote", "tars"},
    "splits": {"probes", "tasks"},
    "status": {"drift", "files", "history", "lake", "locks", "runlog", "schema"},
    "stop": {"files", "lake", "locks", "runlog", "status"},
    "student": {"checkpoint", "embedding", "pretrained"},
    "synthetic": {"files"},
    "tabular": {"tasks"},
    "targets": set(),
    "tars": {"files"},
    "tasks": {"audio", "files"},
    "teacher": {"files"},
    "validation": {
        *("agreement", "augment", "data", "drift", "lake", "quick_probe", "schema", "student", "targets", "teacher"),
    },
    "watch": set(),
    "weight_ema": set(),
}
# The only imports inside a function: what only some runs need and all would pay for.
LATE = {
    ("__init__", "importlib"),
    ("demo", "hear_distill.teacher"),
    *(("doctor", name) for name in ("torch", "huggingface_hub", "huggingface_hub.errors")),
    *(("doctor", name) for name in ("hear_distill.hub", "hear_distill.teacher")),
    *(("history", name) for name in ("matplotlib.dates", "matplotlib.figure")),
    ("journal", "wandb"),
    ("plots", "matplotlib.figure"),
    ("sources", "hear_distill.hub"),
    ("synthetic", "pyarrow"),
    ("targets", "sklearn.cluster"),
    ("validation", "hear_distill.quick_probe"),
}
STAGES = ["stream_laion_audio_clips", "distill_hear_vit_s_canon2d", "run_lake"]
STAGES += ["evaluate_distilled_hear", "benchmark_student_vs_hear", "export_student"]
STAGES += ["evaluate_distilled_hear", "benchmark_student_vs_hear", "embed_audio"]
WITHOUT_TORCH = (
    "files",
    "locks",
    "mp3",
    "audio",
    "tars",
    "sources",
    "remote",
    "cutter",
    "drift",
    "shards",
    "schema",
    "ledger",
    "lake",
    "sample",
    "lengths",
    "room",
    "shares",
    "nodes",
    "data",
    "runlog",
    "embedding_cache",
    *("status", "history", "stop", "backup", "repair", "rebuild", "plan", "doctor"),
    "cli",
    "children",
    "control",
    "guard",
    "demo",
    "synthetic",
)
HEAVY = ("torch", "torchaudio", "transformers", "huggingface_hub", "datasets", "matplotlib")


def source_files() -> list[Path]:
    """Every Python file of the repository."""
    folders = (".", "datalake", "hear_distill", "tests", "tests/reference", "benchmarks", "experiments", "examples")
    return [path for folder in folders for path in sorted((ROOT / folder).glob("*.py"))]


def package_files() -> dict[str, Path]:
    """The modules of the package by name."""
    return {path.stem: path for path in (ROOT / "hear_distill").glob("*.py")}


def imports_in(tree: ast.AST) -> set[str]:
    """Full names of what a file imports: `from a.b import c` gives both a.b and a.b.c, as c may be a module."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_a_module_of_the_package_imports_no_more_of_the_package_than_the_table_says():
    modules = package_files()
    assert modules.keys() == ALLOWED.keys()
    found = {}
    for name, path in modules.items():
        imported = {full.split(".")[1] for full in imports_in(ast.parse(path.read_text())) if "hear_distill." in full}
        found[name] = imported & modules.keys()
    assert found == ALLOWED


def test_no_module_imports_one_that_imports_it():
    def below(name: str, path: tuple[str, ...] = ()) -> None:
        assert name not in path, " -> ".join((*path, name))
        for other in ALLOWED[name]:
            below(other, (*path, name))

    for name in ALLOWED:
        below(name)


def test_a_module_of_the_package_imports_at_the_top_only():
    late = set()
    for name, path in package_files().items():
        functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
        for node in (node for function in functions for node in ast.walk(function)):
            if isinstance(node, ast.ImportFrom):
                late.add((name, node.module))
            elif isinstance(node, ast.Import):
                late |= {(name, alias.name) for alias in node.names}
    assert late == LATE


def test_stages_never_import_one_another():
    found = {path.stem for path in source_files() if path.stem in STAGES}
    assert found <= set(STAGES) and len(found) >= 3
    for path in source_files():
        if "tests" not in path.parts:
            first = {full.split(".")[0] for full in imports_in(ast.parse(path.read_text()))}
            assert first.isdisjoint({*STAGES, "datalake", "tests"}), path


def test_nobody_edits_the_module_search_path():
    pattern = re.compile(r"sys\.path\b(?!_)|\bsite\.addsitedir|PYTHONPATH")
    here = Path(__file__)
    assert [path for path in source_files() if path != here and pattern.search(path.read_text())] == []


def modules_after(code: str) -> set[str]:
    """What a fresh interpreter has loaded after it ran the code, by full name."""
    report = "\nimport sys; print(*sys.modules)"
    command = [sys.executable, "-c", code + report]
    return set(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split())


def test_importing_the_package_imports_nothing_else():
    added = modules_after("import hear_distill") - modules_after("pass")
    assert {name for name in added if name.split(".")[0] not in sys.stdlib_module_names} == {"hear_distill"}


@pytest.mark.parametrize("name", ["Student", "StudentConfig", "MelPcen", "load_student"])
def test_the_package_gives_what_users_need_at_first_use(name):
    import hear_distill

    assert getattr(hear_distill, name).__name__ == name
    assert name in hear_distill.__all__


def test_the_package_has_nothing_else():
    with pytest.raises(ImportError, match="Studnet"):
        from hear_distill import Studnet  # noqa: F401
    import hear_distill

    assert set(hear_distill.__all__) == {"Student", "StudentConfig", "MelPcen", "load_student"}


def test_what_only_moves_bytes_loads_neither_torch_nor_another_heavy_library():
    loaded = modules_after("".join(f"import hear_distill.{name}\n" for name in WITHOUT_TORCH))
    assert "hear_distill" in loaded and "numpy" in loaded
    assert {name.split(".")[0] for name in loaded}.isdisjoint(HEAVY)


@pytest.mark.parametrize("script", ["stream_laion_audio_clips.py", "datalake/run_lake.py"])
def test_a_streamer_and_the_supervisor_load_neither_torch_nor_another_heavy_library(script):
    loaded = modules_after(f"import runpy; runpy.run_path({script!r}, run_name='stage')")
    assert "tyro" in loaded
    assert {name.split(".")[0] for name in loaded}.isdisjoint(HEAVY)
