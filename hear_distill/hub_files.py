"""Files of a dataset on the Hugging Face hub, at a commit that is recorded.

in:   org/name, patterns of its files; HF_TOKEN, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE of the environment
out:  the folder of a snapshot, whose name is the commit
"""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import get_token, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,  # of the client underneath: a broken connection reaches us as that
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hear_distill.tasks import DatasetError

CONVERTED = "refs/convert/parquet"  # the branch in which the hub itself keeps a dataset that is not Parquet as Parquet


def fetch(name: str, patterns: Sequence[str], dataset: str, revision: str | None = None) -> tuple[Path, str]:
    """The snapshot of a hub dataset with the files of these patterns, and its commit. Only what is missing is fetched.

    Args:
        dataset: the word after --dataset, for messages.
        revision: commit, branch or tag; None takes the newest, or without network the one in the cache.

    Raises:
        DatasetError: no access, no such dataset, no such file; with the command that fetches it by hand.
    """
    try:
        folder = snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=list(patterns))
    except (HTTPError, LocalEntryNotFoundError) as e:
        raise DatasetError(explain(e, name, revision) + by_hand(name, dataset, patterns)) from e
    return Path(folder), Path(folder).name


def fetch_parquet(name: str, dataset: str, patterns: Sequence[str] = ("*.parquet",)) -> tuple[list[Path], str]:
    """The Parquet files of a dataset and their commit. Where it has none, those that the hub made of it.

    Raises:
        DatasetError: as `fetch`, or neither the dataset nor its conversion has Parquet files of these patterns.
    """
    for revision in (None, CONVERTED):
        folder, commit = fetch(name, patterns, dataset, revision)
        files = sorted(folder.rglob("*.parquet")) if folder.is_dir() else []
        if files:
            return files, f"{name}@{commit}"
    raise DatasetError(f"{name} on the hub has no file {' or '.join(patterns)}{by_hand(name, dataset, patterns)}")


def by_hand(name: str, dataset: str, patterns: Sequence[str] = ("*.parquet",)) -> str:
    """The commands for somebody who has the files elsewhere, or fetches them on another machine."""
    included = " ".join(f"--include '{pattern}'" for pattern in patterns)
    return (
        f"\n  fetch it elsewhere:  hf download {name} --repo-type dataset {included} --local-dir data/{dataset}"
        f"\n  then:                python evaluate_distilled_hear.py --dataset {dataset}=data/{dataset}"
    )


def explain(error: Exception, name: str, revision: str | None) -> str:
    """What went wrong at the hub, and the way out. Quotes no text of the hub, which may repeat what it was sent."""
    page = f"https://huggingface.co/datasets/{name}"
    if not isinstance(error, HfHubHTTPError):
        reason = type(error.__cause__ or error).__name__
        return (
            f"the hub cannot be reached ({reason}), and the dataset {name} is not in its cache on this machine, "
            f"or not all of it"
        )
    status = f"HTTP {error.response.status_code}, {'a' if get_token() else 'no'} token was sent"
    if isinstance(error, RevisionNotFoundError) and revision == CONVERTED:
        return f"the dataset {name} has no Parquet files, and the hub has made none of it ({status})"
    if isinstance(error, RevisionNotFoundError):
        return f"the dataset {name} has no revision {revision} ({status}); see {page}/tree/main"
    if isinstance(error, GatedRepoError):
        return (
            f"the dataset {name} is gated, and its terms were not accepted by this account ({status})\n"
            f"  accept the terms, once, signed in:  {page}\n"
            f"  put a token of that account into .env:  HF_TOKEN=..."
        )
    if isinstance(error, RepositoryNotFoundError):
        return f"no dataset {name} on the hub that this account may see ({status})"
    return f"the hub refuses to send the dataset {name} ({status})"
