"""A released student: the folder or the repository on the hub that holds its configuration and its weights.

in:   a folder with config.json and model.safetensors, as export_student.py writes it, or an id on the hub
out:  the architecture as a dict, and the weights by name; nothing in the files is ever run
"""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of the client underneath: a broken connection reaches us as that
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hear_distill.files import UserError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
MODEL_TYPE = "hear-distill-student"
FORMAT = 1  # raise it when config.json or the names of the weights change their meaning


class PretrainedError(UserError):
    """A released student that is missing, damaged, or not of this project."""


def load(name_or_folder: str | Path, revision: str | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The fields of the architecture and the weights.

    Args:
        name_or_folder: a folder if there is one of this name, else an id on the hub.
        revision: commit, branch or tag on the hub; a folder has none.

    Raises:
        PretrainedError: not to be had, or not what export_student.py writes.
    """
    name = str(name_or_folder)
    is_local = Path(name).is_dir()
    if is_local and revision is not None:
        raise PretrainedError(f"{name} is a folder, which has no revision {revision}")
    if not is_local and Path(name).exists():
        raise PretrainedError(f"{name} is a file, expected a folder, an id on the hub, or a checkpoint named *.pt")
    folder = Path(name) if is_local else download(name, revision)
    config = read_config(folder)
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise PretrainedError(f"{folder} has no {WEIGHTS_FILE}; {_advice(folder)}")
    try:
        return config["architecture"], load_file(path)
    except SafetensorError as e:
        raise PretrainedError(f"{path} is damaged ({e}); compare it with SHA256SUMS, and fetch it again") from e


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a released student. Raises PretrainedError for any other."""
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text())
    except (FileNotFoundError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise PretrainedError(f"{path} cannot be read ({type(e).__name__}); {_advice(folder)}") from e
    if not isinstance(config, dict) or config.get("model_type") != MODEL_TYPE:
        raise PretrainedError(f"{path} is of something else than a released student; {_advice(folder)}")
    if config.get("format") != FORMAT or not isinstance(config.get("architecture"), dict):
        raise PretrainedError(
            f"{path} has format {config.get('format')!r}, this version of hear-distill reads {FORMAT}; "
            f"install the version of hear-distill that the model card names"
        )
    return config


def _advice(folder: Path) -> str:
    """The way out, which for the folder of a training run is its checkpoint."""
    checkpoints = sorted(folder.glob("*.pt"))
    if checkpoints:
        return f"to load a run's checkpoint, name the file: {checkpoints[0]}"
    return f"expected {CONFIG_FILE} and {WEIGHTS_FILE}, as export_student.py writes them"


def download(name: str, revision: str | None) -> Path:
    """The hub's cached copy of the two files, fetched if they are not there. Never a pickle."""
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))
    except HFValidationError as e:
        raise PretrainedError(f"no folder {name} here, and no id on the hub either (those look like org/name)") from e
    except RevisionNotFoundError as e:
        raise PretrainedError(f"{name} has no revision {revision} on the hub") from e
    except GatedRepoError as e:
        raise PretrainedError(
            f"{name} is gated: accept its terms on its page, and set HF_TOKEN to a token of yours"
        ) from e
    except RepositoryNotFoundError as e:
        raise PretrainedError(
            f"no folder {name} here, and no model of this name on the hub that this account may see; "
            f"if it is private, set HF_TOKEN"
        ) from e
    except (HTTPError, LocalEntryNotFoundError) as e:
        status = f"HTTP {e.response.status_code}" if isinstance(e, HfHubHTTPError) else type(e.__cause__ or e).__name__
        raise PretrainedError(f"the hub does not send {name} ({status}), and it is not in the cache (HF_HOME)") from e
