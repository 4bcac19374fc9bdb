"""The command line: what is accepted, what one line says about everything else, and which flags each stage has."""

import io
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from lake_tools import ROOT

from hear_distill import cli
from hear_distill.files import UserError

STREAMER = "stream_laion_audio_clips.py"
TRAINER = "distill_hear_vit_s_canon2d.py"
SUPERVISOR = "datalake/run_lake.py"
EVALUATION = "evaluate_distilled_hear.py"
BENCHMARK = "benchmark_student_vs_hear.py"
EXPORT = "export_student.py"
EMBED = "embed_audio.py"
FLAGS = {
    STREAMER: {
        *("source", "lake", "cap-gb", "shard-clips", "open-tars"),
        *("val-fraction", "val-clips", "max-workers", "seed"),
        *("min-rms-db", "keep-short", "caption-weight", "num-nodes", "node-rank"),
    },
    SUPERVISOR: {
        *("lake", "source", "out", "cap-gb", "disk-floor-gb", "on-event"),
        *("min-workers", "max-workers", "recipe", "stream-args", "train-args"),
        *("gpus", "num-nodes", "node-rank", "rendezvous"),
        *("dry-run", "json", "deep", "repair"),
    },
    TRAINER: {
        *("lake", "out", "resume", "teacher", "teacher-revision", "teacher-precision", "target-clips", "device"),
        *("chunk-size", "chunks", "controller", "warmup", "weight-decay", "pad-share", "open-shards", "consume"),
        *("save-every", "keep", "log-every", "probe-table", "wandb", "lengths", "seed"),
        *("model.width", "model.blocks", "model.heads", "model.mlp-width", "model.embedding-width"),
        *("model.canon", "model.canon-kernel", "model.canon-dims", "model.positions"),
        *("loss.mse", "loss.relational", "loss.contrastive", "loss.prototype", "loss.patch"),
        "loss.negatives",
        *("schedule.shape", "schedule.peak", "schedule.total-samples"),
        *("schedule.warmup-samples", "schedule.decay-samples"),
    },
    EVALUATION: {
        *("checkpoint", "every-checkpoint", "output", "teacher", "baseline", "dataset", "protocol", "probe"),
        *("out", "cache", "device", "batch-size", "workers", "seed"),
    },
    BENCHMARK: {
        *("checkpoint", "size", "teacher", "batch-sizes", "threads", "repeats", "limit-s", "device", "out"),
    },
    EXPORT: {"checkpoint", "out", "results", "audio", "push", "yes"},
    EMBED: {"model", "out", "hop-s", "batch-size", "device"},  # and FOLDER, which has no name
}
WORDS = {
    STREAMER: "laion | demo (none means laion)",
    SUPERVISOR: "best | paper | demo | doctor | status | stop | plot | fsck (none means best)",
    TRAINER: "best | paper | demo | plot (none means best)",
    EVALUATION: "real | demo (none means real)",
    BENCHMARK: "full | demo (none means full)",
    EXPORT: "real | demo | push (none means real)",
    EMBED: "embed | demo (none means embed)",
}


@dataclass(frozen=True, kw_only=True)
class Inner:
    """Of the inside."""

    depth: int = 3
    """how deep"""


@dataclass(frozen=True, kw_only=True)
class Toy:
    """Flags of a stage that writes its configuration into a file."""

    out: Path = Path("toy.txt")
    """the file"""
    num_rounds: int = 7
    """how many times"""
    colour: Literal["red", "green"] = "red"
    """of the paint"""
    note: str = ""
    """a remark"""
    inner: Inner = field(default_factory=Inner)

    def __post_init__(self) -> None:
        if self.num_rounds > 100 and self.colour == "green":
            raise ValueError(f"--num-rounds {self.num_rounds} is more than 100, too many for --colour green")


TOY_PRESETS = {"plain": Toy(), "bright": Toy(num_rounds=40, colour="green")}


def ended(command: Callable[[], object], encoding: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command, on a terminal of that encoding."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding, write_through=True) for _ in range(2))
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as end:
        command()
    return end.value.code or 0, out.buffer.getvalue().decode(encoding), err.buffer.getvalue().decode(encoding)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Run a toy stage in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def work(config: Toy) -> None:
        config.out.write_text(repr(config))

    def count(config: Toy) -> int:
        print(f"counted to {config.num_rounds}")
        return 1

    def run(*arguments: str, main=work, check=None, encoding="utf-8") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["toy.py", *arguments])
        description = "What the toy is for."
        return ended(lambda: cli.run(main, TOY_PRESETS, description, {"count": count}, check), encoding)

    return run


def test_a_bare_command_is_the_first_preset(toy):
    assert toy() == (0, "", "")
    assert Path("toy.txt").read_text() == repr(TOY_PRESETS["plain"])


def test_a_flag_overrides_a_single_field_of_the_preset_that_the_word_names(toy):
    assert toy("bright", "--note", "loud", "--inner.depth", "5") == (0, "", "")
    expected = Toy(num_rounds=40, colour="green", note="loud", inner=Inner(depth=5))
    assert Path("toy.txt").read_text() == repr(expected)


def test_an_action_runs_instead_of_the_stage_and_its_result_is_the_exit_code(toy, tmp_path):
    assert toy("count", "--num-rounds", "3") == (1, "counted to 3\n", "")
    assert list(tmp_path.iterdir()) == []


@dataclass(frozen=True)
class Several:
    """Flags of which one holds several values."""

    name: tuple[str, ...] = ("old",)
    """of a thing"""
    size: int = 1
    """of it"""


def test_a_flag_of_several_values_may_repeat_and_replaces_its_default(tmp_path, monkeypatch):
    found = []
    for flags in ("", "--name a --size 2 --name=b=c", "--name a b", "--name a --name b --size 3"):
        monkeypatch.setattr(sys, "argv", ["toy.py", *flags.split()])
        ended(lambda: cli.run(found.append, {"only": Several()}, "Toy."), "utf-8")
    assert found == [Several(), Several(("a", "b=c"), 2), Several(("a", "b")), Several(("a", "b"), 3)]


MISTAKES = {
    "mistyped word": (["brihgt"], ["'brihgt'", "plain, bright, count", "none means plain"]),
    "second word": (["bright", "plain"], ["plain"]),
    "mistyped flag": (["--num-round", "4"], ["--num-round", "did you mean --num-rounds?"]),
    "unlike any flag": (["--zzz"], ["--zzz"]),
    "wrong type": (["--num-rounds", "many"], ["--num-rounds", "'many'"]),
    "wrong choice": (["--colour", "blue"], ["--colour", "blue", "red", "green"]),
    "missing value": (["--num-rounds"], ["--num-rounds"]),
    "impossible combination": (["--num-rounds", "200", "--colour", "green"], ["--num-rounds 200", "--colour green"]),
    "nested wrong type": (["--inner.depth", "1.5"], ["--inner.depth", "'1.5'"]),
    "a value that looks like a rule": (["--num-rounds", "-----x"], ["--num-rounds"]),
    "a value with a rule inside": (["--num-rounds", "x-----y"], ["'x-----y'"]),
}


@pytest.mark.parametrize("columns", ["40", "200"], ids=["narrow terminal", "wide terminal"])
@pytest.mark.parametrize(("arguments", "expected"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2_and_nothing_is_written(
    toy, tmp_path, monkeypatch, arguments, expected, columns
):
    monkeypatch.setenv("COLUMNS", columns)
    code, out, err = toy(*arguments)
    assert (code, out) == (2, "")
    assert re.fullmatch(r"error: [^\n│╭─]+\n", err)
    assert [text for text in expected if text not in err] == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("encoding", ["ascii", "iso8859-1"])
def test_a_mistake_reads_the_same_where_a_terminal_has_no_box_characters(toy, encoding):
    for arguments, _ in MISTAKES.values():
        assert toy(*arguments, encoding=encoding) == toy(*arguments)


def test_help_shows_the_docstring_the_words_and_every_flag_with_its_help_and_its_default(toy, tmp_path):
    code, out, err = toy("bright", "--help")
    assert (code, err) == (0, "")
    expected = ["What the toy is for.", "plain | bright | count (none means plain)", "the defaults below are of bright"]
    expected += ["--out", "the file", "--num-rounds", "how many times (default: 40)"]
    expected += ["--colour", "of the paint (default: green)", "--inner.depth", "how deep (default: 3)"]
    assert [text for text in expected if text not in out] == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["--check"], ["bright", "--check"], ["count", "--check"]])
def test_check_runs_neither_the_stage_nor_an_action(toy, tmp_path, arguments):
    assert toy(*arguments) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_check_still_refuses_a_mistake_and_asks_the_stage_about_the_disk(toy):
    def refuse(config: Toy) -> None:
        raise UserError(f"{config.out} is in the way")

    assert toy("--check", "--colour", "blue")[0] == 2
    assert toy("--check", check=refuse) == (2, "", "error: toy.txt is in the way\n")
    assert toy(check=refuse) == (0, "", "")


def test_check_asks_the_stage_nothing_when_only_an_action_was_asked_for(toy):
    def refuse(config: Toy) -> None:
        raise UserError("never asked")

    assert toy("count", "--check", check=refuse) == (0, "", "")


def test_what_the_arguments_mean_can_be_had_as_json_without_running_anything(toy, tmp_path):
    assert toy("bright", "--write-config", "toy.json", "--inner.depth", "5") == (0, "", "")
    expected = {"out": "toy.txt", "num_rounds": 40, "colour": "green", "note": "", "inner": {"depth": 5}}
    assert json.loads(Path("toy.json").read_text()) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["toy.json"]
    assert toy("--write-config") == (2, "", "error: --write-config needs a file\n")


def test_a_value_that_ends_like_a_flag_for_children_is_an_ordinary_value(toy):
    assert toy("--note", "no-args", "--num-rounds", "3") == (0, "", "")
    assert Path("toy.txt").read_text() == repr(Toy(note="no-args", num_rounds=3))


def test_a_user_error_of_the_stage_is_one_line_however_it_was_written(toy):
    def fail(config: Toy) -> None:
        raise UserError("no lake here\n  to fill it:   this way\n\n  or:   that way\n")

    assert toy(main=fail) == (2, "", "error: no lake here; to fill it: this way; or: that way\n")


def test_a_bug_keeps_its_traceback_and_exit_code_1(tmp_path):
    script = tmp_path / "buggy.py"
    script.write_text(
        "from dataclasses import dataclass\n"
        "from hear_distill import cli\n"
        "@dataclass(frozen=True)\n"
        "class Config:\n"
        "    size: int = 1\n"
        "def main(config):\n"
        "    return {}[config.size]\n"
        "cli.run(main, {'only': Config()}, 'A stage with a bug.')\n"
    )
    process = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr.startswith("Traceback") and "return {}[config.size]" in process.stderr
    assert process.stderr.endswith("KeyError: 1\n")


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """Run a real stage in an empty folder, as its script does: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "119")

    def run(script: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        return ended(lambda: runpy.run_path(str(ROOT / script), run_name="__main__"), "utf-8")

    return run


def flags_in(text: str) -> dict[str, str]:
    """What --help says of each flag; a long one has its text on the next line."""
    return dict(re.findall(r"│ --([a-z][a-z.-]*) (?:\S+|\[.*?\]\])?(?: *│\n│)? +(\S.*?) +│", text))


@pytest.mark.parametrize("script", FLAGS)
def test_the_flags_and_the_words_of_a_stage_are_these(stage, script):
    code, out, err = stage(script, "--help")
    assert (code, err) == (0, "")
    assert flags_in(out).keys() == FLAGS[script]
    assert f"first word: {WORDS[script]}" in out


def test_every_flag_of_a_stage_has_a_text_besides_its_default(stage):
    texts = {(script, *item) for script in FLAGS for item in flags_in(stage(script, "--help")[1]).items()}
    assert sorted(flag for _, flag, text in texts if text.startswith("(default")) == []


@pytest.mark.parametrize("script", FLAGS)
def test_help_of_a_stage_begins_with_its_docstring(stage, script):
    docstring = (ROOT / script).read_text().split('"""')[1]
    assert stage(script, "--help")[1].startswith(docstring)


def test_help_shows_the_defaults_of_the_preset_that_the_word_names(stage):
    bare, demo = (flags_in(stage(TRAINER, *word, "--help")[1]) for word in ([], ["demo"]))
    assert "(default: 8)" in bare["open-shards"] and "(default: 4)" in demo["open-shards"]
    name = "schedule.total-samples"
    assert "(default: 25600000)" in bare[name] and "(default: 3200)" in demo[name]
    assert "(default: cuda)" in bare["device"] and "(default: cpu)" in demo["device"]


STAGE_MISTAKES = {
    "streamer, word": (STREAMER, ["dmo"], "laion, demo"),
    "streamer, flag": (STREAMER, ["--shard-clip", "4"], "--shard-clips"),
    "streamer, type": (STREAMER, ["--cap-gb", "much"], "--cap-gb"),
    "streamer, impossible": (STREAMER, ["--val-fraction", "1.5"], "--val-fraction must be in [0, 1), got 1.5"),
    "streamer, no source": (STREAMER, ["--source", "nowhere"], "no folder nowhere"),
    "supervisor, word": (SUPERVISOR, ["stats"], "status"),
    "supervisor, flag": (SUPERVISOR, ["--cap", "4"], "--cap-gb"),
    "supervisor, type": (SUPERVISOR, ["--max-workers", "2.5"], "--max-workers"),
    "supervisor, impossible": (SUPERVISOR, ["--max-workers", "0"], "--max-workers must be at least 1, got 0"),
    "supervisor, no gpus": (SUPERVISOR, ["--gpus", "0"], "--gpus and --num-nodes must be at least 1"),
    "supervisor, alone of two": (SUPERVISOR, ["--num-nodes", "2"], "--num-nodes 2 needs --rendezvous HOST:PORT"),
    "supervisor, no port": (SUPERVISOR, ["--num-nodes", "2", "--rendezvous", "here"], "HOST:PORT, got 'here'"),
    "supervisor, third of two": (
        SUPERVISOR,
        ["--num-nodes", "2", "--node-rank", "2"],
        "must be from 0 to 1",
    ),
    "supervisor, meets nobody": (SUPERVISOR, ["--rendezvous", "a:1"], "--rendezvous is for --num-nodes 2 or more"),
    "supervisor, too many at least": (SUPERVISOR, ["--min-workers", "5"], "--min-workers must be 1 to --max-workers 4"),
    "status, no lake": (SUPERVISOR, ["status"], "no lake at lake"),
    "fsck, no lake": (SUPERVISOR, ["fsck", "--lake", "nowhere"], "no lake at nowhere"),
    "fsck --repair, no lake": (SUPERVISOR, ["fsck", "--repair", "--lake", "nowhere"], "no lake at nowhere"),
    "stop, no lake": (SUPERVISOR, ["stop"], "no lake at lake"),
    "plot, no lake": (SUPERVISOR, ["plot"], "lake/history.jsonl holds nothing to draw yet"),
    "repair without fsck": (
        SUPERVISOR,
        ["--source", "nowhere", "--repair"],
        "--repair means nothing to best; it belongs to: fsck",
    ),
    "json without status": (SUPERVISOR, ["fsck", "--json"], "--json means nothing to fsck; it belongs to: status"),
    "dry run of fsck": (SUPERVISOR, ["fsck", "--dry-run"], "--dry-run means nothing to fsck; it belongs to: best"),
    "trainer, word": (TRAINER, ["papr"], "best, paper, demo"),
    "trainer, flag": (TRAINER, ["--model.widht", "4"], "--model.width"),
    "trainer, type": (TRAINER, ["--chunks", "1e3"], "--chunks"),
    "trainer, choice": (TRAINER, ["--device", "gpu"], "cuda"),
    "trainer, impossible": (
        TRAINER,
        ["demo", "--schedule.total-samples", "799"],
        "warmup_samples 160 + decay_samples 640 exceed total_samples 799",
    ),
    "trainer, impossible model": (TRAINER, ["--model.heads", "5"], "width 384 and heads 5"),
    "trainer, one chunk": (TRAINER, ["--chunks", "1"], "--chunks and --target-clips must be at least 2"),
    "trainer, short critical warm-up": (TRAINER, ["demo", "--warmup", "critical"], "at least 256, got 160"),
    "trainer, nothing to plot": (TRAINER, ["plot"], "no run in runs/hear-vit-s"),
    "embed, no folder": (EMBED, ["nowhere"], "no folder nowhere"),
    "embed, no default folder": (EMBED, [], "no folder recordings"),
    "embed, two folders": (EMBED, [".", "nowhere"], "nowhere"),
    "embed, no sound": (EMBED, ["."], "no sound in .: found nothing"),
    "embed, a gap": (EMBED, [".", "--hop-s", "2.1"], "--hop-s must be above 0 and at most 2, got 2.1"),
    "embed, flag": (EMBED, [".", "--modle", "m.pt"], "did you mean --model?"),
    "trainer, missing value": (TRAINER, ["--out"], "--out"),
    "export, word": (EXPORT, ["pusch"], "real, demo, push"),
    "export, no checkpoint": (EXPORT, [], "no checkpoint at runs/hear-vit-s/best.pt"),
    "export, yes to nothing": (EXPORT, ["--yes"], "--yes needs --push ORG/NAME"),
    "export, push to nowhere": (EXPORT, ["push"], "push needs --push ORG/NAME"),
    "export, push of nothing": (EXPORT, ["push", "--push", "org/name"], "release is no release: it has no SHA256SUMS"),
}


@pytest.mark.parametrize(("script", "arguments", "expected"), STAGE_MISTAKES.values(), ids=STAGE_MISTAKES)
def test_a_stage_answers_a_mistake_with_one_line_and_writes_nothing(stage, tmp_path, script, arguments, expected):
    code, out, err = stage(script, *arguments)
    assert (code, out) == (2, "")
    assert re.fullmatch(r"error: [^\n]+\n", err) and expected in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["--stream-args", "--train-args"])
def test_the_supervisor_takes_flags_for_its_children_as_its_help_spells_them(stage, flag):
    assert stage(SUPERVISOR, flag, "--steps 4 --seed 1", "--help")[0] == 0
    assert stage(SUPERVISOR, "status", flag, "--steps 4 --seed 1")[2].startswith("error: no lake at lake")
