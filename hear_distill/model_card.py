"""The README.md of a released student: what it is, how well it was measured to do, what it is not for.

in:   plain facts, of which every missing one is said to be missing
out:  Markdown with the metadata that the hub reads
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hear_distill.files import UserError

HEAR = "google/hear-pytorch"
DATASET = "laion/LAION-Audio-300M"
TERMS = "https://developers.google.com/health-ai-developer-foundations/terms"
STAND_IN_WARNING = (
    "> **This student learned from a stand-in, not from HeAR.** The stand-in has HeAR's architecture, small, and "
    "random weights. These files show that the software works; the embeddings mean nothing."
)


class ResultsError(UserError):
    """A results.json that is not of this student."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """What the card tells."""

    title: str
    width: int
    """of the embedding"""
    num_parameters: int
    """of the trunk, without the projection"""
    teacher: str
    """its name; empty if it is not recorded, and then nobody knows whether it was HeAR"""
    teacher_revision: str
    is_stand_in: bool
    """not the real HeAR"""
    code: str
    """commit"""
    samples: int
    """clips that it learned from"""
    sound: str
    """what the ONNX files were compared on"""
    parity: Mapping[str, Mapping[str, Any]]
    """by file, as `onnx_files.parity` gives it"""
    results: Mapping[str, Any] | None
    """of the evaluation"""

    def text(self) -> str:
        """The whole file."""
        parts = [self.metadata(), f"# {self.title}", *([STAND_IN_WARNING] if self.is_stand_in else [])]
        parts += [self.what_it_is(), self.use(), self.files(), self.quality(), self.limits(), self.licence()]
        return "\n\n".join(parts) + "\n"

    def metadata(self) -> str:
        """The block at the top. Strings are written as JSON, which is YAML as well and needs no care for colons."""
        facts: dict[str, Any] = {
            "license": "other",
            "license_name": "health-ai-developer-foundations",
            "license_link": TERMS,
            "library_name": "hear-distill",
            "pipeline_tag": "feature-extraction",
            "tags": ["audio", "health-acoustics", "distillation", "onnx"],
            "datasets": [DATASET],
        }
        if self.teacher and not self.is_stand_in:
            facts["base_model"] = HEAR
        if self.results:
            facts["model-index"] = [{"name": self.title, "results": self.index()}]
        return "\n".join(["---", *(f"{name}: {json.dumps(value)}" for name, value in facts.items()), "---"])

    def index(self) -> list[dict[str, Any]]:
        """Metrics as the hub shows them: average precision of each task that could be measured, and their mean."""
        table = self.results["table"]["name"]
        task = {"type": "audio-classification", "name": "linear probe"}
        rows = [(entry["task"], entry["ap"]) for entry in self.results["tasks"] if not entry["problem"]]
        rows.append(("mean", self.results["mean"]["ap"]))
        return [
            {
                "task": task,
                "dataset": {"name": f"{table}: {name}", "type": table},
                "metrics": [{"type": "average_precision", "value": round(ap["student"]["value"], 4)}],
            }
            for name, ap in rows
        ]

    def what_it_is(self) -> str:
        """Where it comes from."""
        known = f"{self.teacher} at revision {self.teacher_revision}"
        teacher = known if self.teacher else "a teacher that is not recorded"
        stand_in = ", a stand-in for HeAR" if self.is_stand_in else ""
        return (
            f"A small network that turns 2 seconds of sound into an embedding of {self.width} numbers, from which "
            f"health-related sounds such as coughs and breaths can be told apart with few labelled examples. It has "
            f"{self.num_parameters / 1e6:.1f} million parameters and takes sound of any length.\n\n"
            f"It was distilled from {teacher}{stand_in}, on {self.samples:,} clips, with the code of commit "
            f"{self.code}."
        )

    def use(self) -> str:
        """Python and ONNX."""
        return f"""## Use

```python
from hear_distill import Student

model = Student.from_pretrained("this folder, or its id on the hub")
embedding = model.embed(waveform, sample_rate)  # [n] or [channels, n], any rate, any length -> [{self.width}]
embeddings, starts_s = model.embed_windows(waveform, sample_rate)  # one for each window of 2 s
```

`embed` is the mean over windows of 2 s, one every second. The ONNX graphs instead take sound as one piece: give them
windows of 32,000 samples, 16 kHz, mono, to get the same."""

    def files(self) -> str:
        """The table of the ONNX files with their parity."""
        lines = [
            "## Files",
            "",
            "`model.safetensors` and `config.json` are the source of truth, in float32; `projection.*` in it maps the "
            "embedding into the teacher's space. `onnx/model*.onnx` take `waveform` [batch, samples] and give "
            "`embedding`; `onnx/encoder*.onnx` take `spectrogram` [batch, 1, rows, 128], which `onnx/frontend.onnx` "
            "makes. The front end is float32 in all of them. `SHA256SUMS` has the hash of every file.",
            "",
            f"Compared with PyTorch in float32, on {self.sound}:",
            "",
            "| file | largest relative error | mean centred cosine | |",
            "| --- | ---: | ---: | --- |",
        ]
        for name, of_file in self.parity.items():
            verdict = "" if of_file["passed"] else "**below the limit: do not use it without a test of your own**"
            error, cosine = of_file["max_relative_error"], of_file["cosine"]
            lines.append(f"| onnx/{name} | {error:.1e} | {cosine:.5f} | {verdict} |")
        int8 = (
            "In the int8 files all clips of a batch share the scale of the activations: where the embedding of a clip "
            "shall not depend on the others, give them one at a time."
        )
        lines += ["", int8]
        return "\n".join(lines)

    def quality(self) -> str:
        """What results.json says."""
        if not self.results:
            return "## Quality\n\nNot measured: no results of the evaluation were given when these files were made."
        lines = ["## Quality", "", f"Linear probes on {self.results['table']['name']}; in brackets 95 % intervals.", ""]
        lines += ["| task | average precision |", "| --- | ---: |"]
        entries = [*self.results["tasks"], {"task": "mean", "problem": None, **self.results["mean"]}]
        for entry in entries:
            value = entry["problem"] or "{value:.3f} [{low:.3f}, {high:.3f}]".format(**entry["ap"]["student"])
            lines.append(f"| {entry['task']} | {value} |")
        kept = self.results["mean"].get("retained_percent")
        if kept:
            whose = "the stand-in's" if self.results["teacher"]["is_stand_in"] else "the teacher's"
            lines += ["", "It keeps {value:.1f} % [{low:.1f}, {high:.1f}] of ".format(**kept) + f"{whose} mean."]
        return "\n".join(lines)

    def limits(self) -> str:
        """Intended use, and what it is not."""
        return f"""## Intended use and limits

For research: a starting point for telling health-related sounds apart with a classifier of your own, on data of your
own, which has to be tested there. **It is not a diagnostic, and no medical device**; it has not been evaluated on
patients, and no decision about a person's health may rest on it.

It learned from {DATASET}, clips of public videos: clinics, infants, most languages and
cheap microphones are likely to be rare in it. Sound is downmixed and resampled to 16 kHz; loudness is normalised away.
What the teacher confuses, the student confuses. Recordings of people are personal data: running on the device keeps
them there."""

    def licence(self) -> str:
        """Terms."""
        return f"""## Licence

HeAR comes under the [terms of Google's Health AI Developer Foundations]({TERMS}),
which very likely extend to models distilled from it: read them before you use these weights or pass them on. The code
of hear-distill is under the MIT licence."""


def read_results(path: Path, checkpoint_sha256: str) -> dict[str, Any]:
    """The results.json of evaluate_distilled_hear.py. Raises ResultsError if it is none, or of another checkpoint."""
    try:
        results = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise ResultsError(f"{path} cannot be read ({e}); name a results.json of evaluate_distilled_hear.py") from e
    try:
        found = results["student"]["sha256"]
        _ = results["table"]["name"], results["mean"]["ap"]["student"]["value"], results["teacher"]
        _ = [entry["problem"] or entry["ap"]["student"]["value"] for entry in results["tasks"]]
    except (KeyError, TypeError) as e:
        raise ResultsError(f"{path} is no results.json of evaluate_distilled_hear.py: no entry {e}") from e
    if found != checkpoint_sha256:
        raise ResultsError(
            f"{path} is of another checkpoint, {found:.12}, than {checkpoint_sha256:.12}; evaluate this one first: "
            f"python evaluate_distilled_hear.py --checkpoint CHECKPOINT"
        )
    return results
