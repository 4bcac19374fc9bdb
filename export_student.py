"""Make a student ready for other people: weights, ONNX files, a model card, checksums; and put it on the hub.

in:   a checkpoint of the trainer; for the card its run's config.json beside it, and a results.json of the evaluation
out:  <out>/{model.safetensors, config.json, README.md, SHA256SUMS} and <out>/onnx/*.onnx, all of it or nothing
cost: 65 s of CPU time and 385 MiB of disk for the published size; needs the extra `export` of this package

    python export_student.py                                                # runs/hear-vit-s/best.pt -> release/
    python export_student.py --results results/hear-vit-s/results.json --audio RECORDINGS/
    python export_student.py push --push ORG/NAME                           # what would go to the hub; --yes sends it
    python export_student.py demo                                           # the demo's student, no network

Before anything is in its place, every ONNX file is compared with PyTorch: on recordings (--audio), else on synthetic
sounds. A float32 file that differs stops the export; a smaller one that does is written, and the card says so.

B clips in a batch   n samples of one
"""

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file

from hear_distill import checkpoint, cli, demo, onnx_files
from hear_distill.audio import CLIP_SAMPLES, SAMPLE_RATE, DecodeError, decode
from hear_distill.files import UserError, atomic_write, make_folder, write_json
from hear_distill.model_card import Card, read_results
from hear_distill.pretrained import CONFIG_FILE, FORMAT, MODEL_TYPE, WEIGHTS_FILE
from hear_distill.release import building, require_replaceable, sha256, upload
from hear_distill.runlog import git_revision
from hear_distill.student import Student, load_student
from hear_distill.synthetic import SOUNDS, generator, recording


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of the export."""

    checkpoint: Path = Path("runs/hear-vit-s/best.pt")
    """student to export"""
    out: Path = Path("release")
    """folder of the files; an earlier export there is replaced, anything else is not"""
    results: Path | None = None
    """results.json of evaluate_distilled_hear.py for this checkpoint; without it the card says: not measured"""
    audio: Path | None = None
    """recording, or folder of recordings, that the ONNX files are compared on; without it synthetic sounds"""
    push: str = ""
    """ORG/NAME on the hub: show what would be uploaded there, and with --yes upload it"""
    yes: bool = False
    """upload"""

    def __post_init__(self) -> None:
        if self.yes and not self.push:
            raise ValueError("--yes needs --push ORG/NAME")


PRESETS = {
    "real": Config(),
    "demo": Config(checkpoint=demo.DEMO / "run" / "latest.pt", out=demo.DEMO / "release"),
}
SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
MAX_CLIPS = 64  # that the files are compared on; a few minutes of sound
LONG_SAMPLES, SHORT_SAMPLES = 5 * SAMPLE_RATE + 123, 12_345  # lengths that nothing divides
NUM_SYNTHETIC = 3  # of each sound
SEED = 0


def facts_of(config: Config) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What is known about the student besides its weights, and the results of the evaluation.

    The teacher is told by the run's config.json. Raises UserError if that or --results is of another student.
    """
    state, digest = checkpoint.load(config.checkpoint), sha256(config.checkpoint)
    results = read_results(config.results, digest) if config.results else None
    revision = str(state.get("teacher_revision", ""))
    facts = {"teacher": "", "teacher_revision": revision, "is_stand_in": False}
    beside = config.checkpoint.with_name(CONFIG_FILE)
    if beside.is_file():
        run = json.loads(beside.read_text())
        if run.get("teacher_revision") != revision:
            raise UserError(f"{beside} is of a run with another teacher than {config.checkpoint}; put its own there")
        name = Path(run["teacher"])
        facts |= {"teacher": name.name if name.is_absolute() else str(name), "is_stand_in": run["is_stand_in"]}
    else:
        print(f"WARNING: no {beside}, the configuration of the run: the card will not name the teacher")
    facts |= {"samples": int(state.get("samples", 0)), "checkpoint_sha256": digest, "code": git_revision()}
    return facts, results


def sounds(audio: Path | None) -> tuple[list[np.ndarray], str]:
    """Batches [B, n] float32 to compare on, of three lengths, and in words what they are.

    Raises UserError if `audio` holds nothing that can be read, or less than two clips.
    """
    if audio is None:
        clips = [synthetic_clip(label, i) for label in SOUNDS for i in range(NUM_SYNTHETIC)]
        name = f"{len(clips)} synthetic clips of 2 s"
    else:
        clips = clips_of(audio)
        name = f"{len(clips)} clips of 2 s of {audio.name}"
    joined = np.concatenate(clips)
    size = onnx_files.PARITY_BATCH
    batches = [np.stack(clips[first : first + size]) for first in range(0, len(clips), size)]  # each [B, 32000]
    batches += [np.resize(joined, LONG_SAMPLES)[None], np.resize(joined, SHORT_SAMPLES)[None]]  # each [1, n]
    return batches, f"{name}, one of 5 s and one of 0.8 s"


def synthetic_clip(label: str, index: int) -> np.ndarray:
    """[32000] float32"""
    rng, voice = (generator(SEED, f"export {purpose} {label}", index) for purpose in ("sound", "voice"))
    return recording(label, SAMPLE_RATE, CLIP_SAMPLES / SAMPLE_RATE, rng, voice)


def clips_of(audio: Path) -> list[np.ndarray]:
    """Up to 64 clips [32000] float32, as many from each recording; short ones end in zeros."""
    paths = sorted(path for path in audio.rglob("*") if path.suffix.lower() in SUFFIXES) if audio.is_dir() else [audio]
    if not audio.exists() or not paths:
        raise UserError(f"no recordings at {audio}; name a file or a folder with {', '.join(SUFFIXES)} for --audio")
    clips, unreadable = [], Counter()
    for path in paths:
        try:
            samples = decode(path.read_bytes())
        except DecodeError as e:
            unreadable[e.reason] += 1
            continue
        samples = np.pad(samples, (0, max(0, CLIP_SAMPLES - len(samples)))).astype(np.float32) / 32768
        whole = len(samples) // CLIP_SAMPLES
        clips += list(samples[: whole * CLIP_SAMPLES].reshape(whole, -1)[: max(1, MAX_CLIPS // len(paths))])
        if len(clips) >= MAX_CLIPS:
            break
    if unreadable:
        print(f"WARNING: {unreadable.total()} of {len(paths)} recordings cannot be read: {dict(unreadable)}")
    if len(clips) < 2:
        raise UserError(f"{audio} gives {len(clips)} clips of 2 s that can be read, expected two or more; name others")
    return clips[:MAX_CLIPS]


def compare(student: Student, folder: Path, batches: list[np.ndarray]) -> dict[str, dict[str, Any]]:
    """The parity of every ONNX file, printed. Raises UserError if one in float32 is not the student."""
    parity = onnx_files.parity(student, folder, batches)
    for name, found in parity.items():
        verdict = "" if found["passed"] else "   WARNING: below the limit; the card says so"
        print(f"  {name:20} error {found['max_relative_error']:.1e}   cosine {found['cosine']:.5f}{verdict}")
    wrong = [name for name in parity if not name.endswith(("_fp16.onnx", "_int8.onnx")) and not parity[name]["passed"]]
    if wrong:
        raise UserError(
            f"{wrong[0]} differs from PyTorch by {parity[wrong[0]]['max_relative_error']:.1e}, expected at most "
            f"{onnx_files.MAX_RELATIVE_ERROR['fp32']:.0e}; nothing was written: install what requirements.txt pins"
        )
    return parity


def save(student: Student, folder: Path) -> None:
    """The weights and the seven graphs."""
    save_file({name: value.contiguous() for name, value in student.state_dict().items()}, folder / WEIGHTS_FILE)
    make_folder(folder / "onnx")
    onnx_files.export(student, folder / "onnx")


def describe(student: Student, card: Card, digest: str, folder: Path) -> None:
    """config.json for programs and README.md for people."""
    told = ("teacher", "teacher_revision", "is_stand_in", "samples", "code")
    values = {
        **{"model_type": MODEL_TYPE, "format": FORMAT, "architecture": asdict(student.config)},
        **{"sample_rate": SAMPLE_RATE, "window_samples": CLIP_SAMPLES, "checkpoint_sha256": digest},
        **{name: getattr(card, name) for name in told},
        "onnx": {"compared_on": card.sound, "files": card.parity},
    }
    write_json(folder / CONFIG_FILE, values)
    with atomic_write(folder / "README.md") as f:
        f.write(card.text().encode())


def title(config: Config) -> str:
    """Of the card."""
    return config.push.rpartition("/")[2] or "HeAR distilled into a ViT with Canon layers"


def push(config: Config) -> None:
    """Upload what an earlier call has exported."""
    if not config.push:
        raise UserError("push needs --push ORG/NAME")
    upload(config.out, config.push, yes=config.yes)


def main(config: Config) -> None:
    require_replaceable(config.out)
    student = load_student(config.checkpoint)
    facts, results = facts_of(config)
    batches, sound = sounds(config.audio)
    print(f"exporting {config.checkpoint} to {config.out}, to be compared with PyTorch on {sound}")
    with building(config.out) as folder:
        save(student, folder)
        parity = compare(student, folder / "onnx", batches)
        digest = facts.pop("checkpoint_sha256")
        trunk = sum(value.numel() for name, value in student.named_parameters() if not name.startswith("projection"))
        shape = {"width": student.config.width, "num_parameters": trunk}
        card = Card(title=title(config), sound=sound, parity=parity, results=results, **shape, **facts)
        describe(student, card, digest, folder)
    print(f"wrote {config.out}; to use it: Student.from_pretrained({str(config.out)!r})")
    if config.push:
        push(config)


if __name__ == "__main__":
    cli.run(main, PRESETS, __doc__, {"push": push})
