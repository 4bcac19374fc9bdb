"""Checkpoints that are whole or absent, know their own hash, and run no code when they are read.

in:   a dict of tensors, numbers, text, bytes, lists, tuples and dicts, at any depth
out:  <folder>/latest.pt, <folder>/previous.pt (the one before it) and, on request, <folder>/best.pt and the newest few
      as <folder>/step-<number>.pt

Entry "sha256" of the saved dict is the digest of all its other entries: it proves the file whole and names it. Entry
"format" is a number; a file with another one than ours is refused.
"""

import hashlib
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hear_distill.files import DiskFull, UserError, crash_point, fsync_folder, is_disk_full, make_folder

LATEST = "latest.pt"
PREVIOUS = "previous.pt"
BEST = "best.pt"
NUMBERED = re.compile(r"step-(\d+)\.pt")
# To be raised with any change after which older checkpoints can no longer be resumed and loaded as they were: an entry
# that is new, gone, or means something else. Files from before there was a number have none.
FORMAT = 1
ROOM_WAIT_S = 300.0  # on a full disk; a supervisor takes no progress for ten minutes for a hang
ROOM_RETRY_S = 2.0
SCALARS = (bool, int, float, str, type(None))


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or not of this project. The text is one line: found, and what to do."""


class OtherFormat(CheckpointError):
    """A whole checkpoint of another version of this project."""


def save(folder: Path, state: dict[str, Any]) -> Path:
    """Write `state` as <folder>/latest.pt; the checkpoint that stood there becomes previous.pt.

    Once they exist, neither name is ever absent and each is a whole file: the new one is on the disk and has been read
    back before any name moves, and a latest.pt that has lost its hash since is not kept. One writer per folder.

    Raises:
        CheckpointError: what was read back is not what was written; the names still stand for the old files.
        DiskFull: there was no room for ROOM_WAIT_S; the same holds.
        TypeError: a value that cannot be read back without running code; the text says where in `state` it is.
    """
    make_folder(folder)
    latest, new = folder / LATEST, folder / (LATEST + ".tmp")
    plain = {name: _plain(value, name) for name, value in state.items() if name != "sha256"} | {"format": FORMAT}
    _write_when_there_is_room(new, {**plain, "sha256": digest(plain)})
    load(new)
    crash_point("checkpoint-written")

    if latest.exists():
        _keep_as_previous(folder)
    crash_point("checkpoint-kept-previous")

    new.replace(latest)
    fsync_folder(folder)
    crash_point("checkpoint-renamed")
    return latest


def _write_when_there_is_room(path: Path, state: dict[str, Any]) -> None:
    """Write and fsync. On a full disk, say so once, leave nothing there, and try again for ROOM_WAIT_S."""
    give_up_at = None
    while True:
        try:
            with path.open("wb") as f:
                torch.save(state, f)
                f.flush()
                os.fsync(f.fileno())
            break
        except (OSError, RuntimeError) as e:
            if not is_disk_full(e):
                raise
            path.unlink(missing_ok=True)
            if give_up_at is None:
                give_up_at = time.monotonic() + ROOM_WAIT_S
                print(f"WARNING: no room for a checkpoint: the disk of {path.parent} is full", file=sys.stderr)
            if time.monotonic() >= give_up_at:
                raise DiskFull(
                    f"no room for a checkpoint in {path.parent} for {ROOM_WAIT_S:.0f} s; the last good one stands: "
                    f"delete something on that disk, then run the same command again"
                ) from e
        time.sleep(ROOM_RETRY_S)
    if give_up_at is not None:
        print("there is room again: the checkpoint is written", file=sys.stderr)


def keep_as_best(folder: Path) -> Path:
    """Give <folder>/latest.pt the second name best.pt. Both share the bytes; the next `save` leaves best.pt alone."""
    _link_over(folder / LATEST, folder / BEST)
    return folder / BEST


def keep_numbered(folder: Path, step: int, num_kept: int) -> None:
    """Give latest.pt, of this step, the further name step-<step>.pt; of such names the newest `num_kept` stay.

    Names of later steps go as well: they are of a history that was lost with its checkpoint. Does nothing for 0.
    """
    if num_kept == 0:
        return
    _link_over(folder / LATEST, folder / f"step-{step:06d}.pt")
    crash_point("checkpoint-numbered")
    numbered = {int(found[1]): path for path in folder.iterdir() if (found := NUMBERED.fullmatch(path.name))}
    kept = sorted(number for number in numbered if number <= step)[-num_kept:]
    for number, path in numbered.items():
        if number not in kept:
            path.unlink()
    fsync_folder(folder)


def load(path: Path) -> dict[str, Any]:
    """The dict that `save` wrote, with its "sha256" and "format", tensors on the CPU.

    Raises:
        CheckpointError: no such file, truncated, altered, a file of another program, or a pickle with code in it.
        OtherFormat: nothing is wrong with it, but its format is not ours.
    """
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}; name a .pt file that the trainer wrote")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # flipping bits of one small file made torch raise 12 different exceptions, all meaning this
        raise CheckpointError(
            f"{path} is refused ({type(e).__name__}): it is truncated, damaged, or holds more than plain tensors, "
            f"numbers and text; nothing in it was run. {_advice(path)}"
        ) from e
    if not isinstance(state, dict) or "sha256" not in state:
        raise CheckpointError(f"{path} was not written by this project: it has no entry sha256. {_advice(path)}")
    try:
        found = digest({name: value for name, value in state.items() if name != "sha256"})
    except (TypeError, RuntimeError) as e:  # a type that `save` never writes, a list inside itself, an absurd shape
        raise CheckpointError(f"{path} holds what the trainer never writes: {e}. {_advice(path)}") from e
    if found != state["sha256"]:
        raise CheckpointError(
            f"{path} is damaged: its content hashes to {found[:12]}, its sha256 says {state['sha256']!s:.12}. "
            f"{_advice(path)}"
        )
    if state.get("format") != FORMAT:
        raise OtherFormat(
            f"{path} is of format {state.get('format', 'none')}, this version of the project reads {FORMAT}; use the "
            f"version that wrote it (entry code of the config.json beside it), or begin a new run in another --out"
        )
    return state


def load_newest(folder: Path) -> tuple[dict[str, Any], Path] | None:
    """The newest whole checkpoint of `folder` and its path; None if the folder has none yet.

    A damaged latest.pt is reported on stderr and previous.pt is taken. Raises CheckpointError if both are damaged, and
    OtherFormat at once: a run of another version is nothing to go back in.
    """
    latest, previous = folder / LATEST, folder / PREVIOUS
    if not latest.exists() and not previous.exists():
        return None
    try:
        return load(latest), latest
    except OtherFormat:
        raise
    except CheckpointError as e:
        problem = str(e)
    try:
        state = load(previous)
    except CheckpointError as e:
        raise CheckpointError(f"no whole checkpoint in {folder}: {problem} Nor is there one before it: {e}") from e
    print(f"WARNING: {problem}\nWARNING: going back to the checkpoint before it, {previous}", file=sys.stderr)
    return state, previous


def digest(value: Any) -> str:
    """SHA-256 of a nested value, equal for equal content: dict keys in any order, tensors with any strides."""
    sha = hashlib.sha256()
    _feed(sha.update, value)
    return sha.hexdigest()


def _feed(update: Callable[..., None], value: Any) -> None:
    """Hand `value` to the hash. Every item starts with its type and length, so no two values give the same bytes."""
    if type(value) is Tensor:
        update(f"tensor {value.dtype} {tuple(value.shape)} {value.requires_grad}\n".encode())
        update(value.contiguous().flatten().view(torch.uint8).numpy())  # NumPy has no bfloat16, so as bytes
    elif type(value) is dict:
        update(f"dict {len(value)}\n".encode())
        for key in sorted(value, key=repr):
            _feed(update, key)
            _feed(update, value[key])
    elif type(value) in (list, tuple):
        update(f"{type(value).__name__} {len(value)}\n".encode())
        for item in value:
            _feed(update, item)
    elif type(value) is bytes:
        update(f"bytes {len(value)}\n".encode())
        update(value)
    elif type(value) in SCALARS:
        update(f"{value!r}\n".encode())  # 1, 1.0, True and '1' are all written differently
    else:
        raise TypeError(f"{type(value).__name__} is not a plain value")


def _plain(value: Any, where: str) -> Any:
    """`value` in built-in containers with detached CPU tensors. `where` is its place in the state, for the error."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, Mapping):  # a module's state_dict is an OrderedDict with unhashed metadata hanging on it
        return {key: _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(item, f"{where}[{i}]") for i, item in enumerate(value))
    if type(value) is not bytes and type(value) not in SCALARS:
        raise TypeError(
            f"{where} is a {type(value).__name__}; a checkpoint holds plain values only, so convert it first"
        )
    return value


def _keep_as_previous(folder: Path) -> None:
    """Link latest.pt as previous.pt, unless it was damaged since: previous.pt is then the one that the run resumed."""
    try:
        load(folder / LATEST)
    except CheckpointError as e:
        print(f"WARNING: not kept as {PREVIOUS}: {e}", file=sys.stderr)
    else:
        _link_over(folder / LATEST, folder / PREVIOUS)


def _link_over(source: Path, target: Path) -> None:
    """Make `target` a second name of `source` in one step, so that `target` is the old file or the new one."""
    tmp = target.with_name(target.name + ".tmp")
    tmp.unlink(missing_ok=True)
    os.link(source, tmp)
    tmp.replace(target)
    tmp.unlink(missing_ok=True)  # rename does nothing if both already name the same file
    fsync_folder(target.parent)


def _advice(path: Path) -> str:
    """What to do about a bad file: the one before it if it stands beside it."""
    previous = path.with_name(PREVIOUS)
    return f"Use {previous}" if path != previous and previous.is_file() else "Use another .pt file of the same run"
