"""Embeddings on the disk, found by everything that decided their numbers.

in:   a description: fingerprint of the embedder, protocol, data set, its revision, what was done to its sound
out:  <folder>/<hash of the description>.safetensors: [rows, W] float64, the description, a hash of the numbers

rows recordings of a data set, NaN where one was not embedded   W width of an embedding
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from hear_distill.files import atomic_write

EMBEDDINGS, DESCRIPTION, DIGEST = "embeddings", "description", "sha256"  # a tensor and two texts in each file


def describe(*, fingerprint: str, protocol: str, dataset: str, revision: str, preprocessing: str, num_rows: int) -> str:
    """One line of JSON with all of it, from which a file is found and by which it is recognised.

    Args:
        fingerprint: of the embedder.
        protocol: its text, not its name alone: a rule that changed is another rule.
        preprocessing: what was done to the recordings before: decoder, resampler, the seed and size of a subset.
    """
    facts = {
        "fingerprint": fingerprint,
        "protocol": protocol,
        "dataset": dataset,
        "revision": revision,
        "preprocessing": preprocessing,
        "num_rows": num_rows,
    }
    return json.dumps(facts, sort_keys=True)


def path_of(folder: Path, description: str) -> Path:
    """The file of a description, which is there or not."""
    return folder / f"{hashlib.sha256(description.encode()).hexdigest()}.safetensors"


def store(folder: Path, description: str, embeddings: np.ndarray) -> Path:
    """Write [rows, W] float64. Several processes may write the same: one of the files, whole, is what remains."""
    if embeddings.ndim != 2 or embeddings.dtype != np.float64:
        raise ValueError(f"embeddings are {embeddings.dtype} of shape {embeddings.shape}, expected [rows, W] float64")
    path = path_of(folder, description)
    texts = {DESCRIPTION: description, DIGEST: _digest(embeddings)}
    own = path.with_name(f"{path.name}.{os.getpid()}")  # atomic_write allows one writer per name
    with atomic_write(own) as f:
        f.write(save({EMBEDDINGS: np.ascontiguousarray(embeddings)}, metadata=texts))
    own.replace(path)
    return path


def load(folder: Path, description: str) -> np.ndarray | None:
    """What `store` wrote under this description, or None, which stderr explains if the file is there all the same."""
    path = path_of(folder, description)
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            texts = file.metadata() or {}
            embeddings = file.get_tensor(EMBEDDINGS)
    except SafetensorError as e:
        return _unusable(path, f"it is damaged or not of this project ({e})")
    if texts.get(DESCRIPTION) != description:
        return _unusable(path, f"it holds something else: {texts.get(DESCRIPTION)}")
    if texts.get(DIGEST) != _digest(embeddings):
        return _unusable(path, "its numbers are not those that were written")
    return embeddings


def through_cache(
    folder: Path, descriptions: Mapping[str, str], compute: Callable[[list[str]], Mapping[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """[rows, W] by name: read where a file is there, else computed, all in one call, and stored.

    Args:
        descriptions: by the name of the embedder.
        compute: gets the names that are missing; it is not called if there are none.
    """
    found = {name: load(folder, description) for name, description in descriptions.items()}
    missing = [name for name, embeddings in found.items() if embeddings is None]
    if missing:
        for name, embeddings in compute(missing).items():
            store(folder, descriptions[name], embeddings)
            found[name] = embeddings
    return found


def _digest(embeddings: np.ndarray) -> str:
    """Of shape, type and bytes."""
    sha = hashlib.sha256(f"{embeddings.dtype} {embeddings.shape}\n".encode())
    sha.update(np.ascontiguousarray(embeddings))
    return sha.hexdigest()


def _unusable(path: Path, reason: str) -> None:
    print(f"WARNING: {path} is not used, the embeddings are computed again: {reason}", file=sys.stderr)
