"""A released student: a folder that is whole or absent, that can prove itself, and that goes to the hub when asked.

in:   the files that a stage writes into a folder of its own
out:  the folder under its name, with SHA256SUMS of every other file; a repository on the hub with the same files
"""

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled

from hear_distill.files import MIB, UserError, atomic_write, fsync_folder, make_folder

SUMS_FILE = "SHA256SUMS"


class ReleaseError(UserError):
    """A folder that is no whole release, or a hub that does not take it."""


def sha256(path: Path) -> str:
    """Of the file, as `sha256sum` prints it."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def files_in(folder: Path) -> list[str]:
    """Every file below `folder` by its relative name, in order, without SHA256SUMS."""
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return [name for name in found if name != SUMS_FILE]


@contextmanager
def building(folder: Path) -> Iterator[Path]:
    """A new folder to write a release into. If the body ends well, it gets SHA256SUMS and takes the place of `folder`.

    An earlier release that stands there is replaced. If the body raises, it stays, and nothing is left of the new one.

    Raises:
        ReleaseError: there is something else at that place.
    """
    require_replaceable(folder)
    new = folder.with_name(folder.name + ".tmp")
    if new.exists():  # a killed run left it
        shutil.rmtree(new)
    make_folder(new)
    try:
        yield new
        sums = "".join(f"{sha256(new / name)}  {name}\n" for name in files_in(new))
        with atomic_write(new / SUMS_FILE) as f:
            f.write(sums.encode())
        require_replaceable(folder)  # once more: the body takes minutes
        if folder.exists():
            shutil.rmtree(folder)
        new.rename(folder)
        fsync_folder(folder.parent)
    finally:
        if new.exists():
            shutil.rmtree(new)


def require_replaceable(folder: Path) -> None:
    """Raise ReleaseError unless `folder` is absent, empty, or a whole release: nobody's own files are deleted."""
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists():
        try:
            verify(folder)
        except ReleaseError as e:
            raise ReleaseError(f"{e}; it is not replaced: choose another --out, or delete it yourself") from None


def verify(folder: Path) -> list[str]:
    """The names of the files of a release, SHA256SUMS last. Raises ReleaseError unless each is as it was written."""
    path = folder / SUMS_FILE
    if not path.is_file():
        raise ReleaseError(f"{folder} is no release: it has no {SUMS_FILE}, which export_student.py writes last")
    expected = dict(reversed(line.split("  ", 1)) for line in path.read_text().splitlines())
    found = files_in(folder)
    strange = sorted(expected.keys() ^ set(found))
    if strange:
        raise ReleaseError(f"{folder} has more or fewer files than its {SUMS_FILE} names, such as {strange[0]}")
    changed = [name for name in found if sha256(folder / name) != expected[name]]
    if changed:
        raise ReleaseError(f"{folder / changed[0]} is not as {SUMS_FILE} has it")
    return [*found, SUMS_FILE]


def upload(folder: Path, repository: str, *, yes: bool) -> None:
    """Show what would go to the hub and, with `yes`, send it as one commit. A new repository is private.

    Raises:
        ReleaseError: no `yes`, no whole release, or the hub does not take it.
    """
    names = verify(folder)
    sizes = {name: (folder / name).stat().st_size for name in names}
    print(f"to https://huggingface.co/{repository}, a model; where there is none yet, a private one:")
    for name, num_bytes in sizes.items():
        print(f"  {num_bytes / MIB:8.2f} MiB  {name}")
    if not yes:
        raise ReleaseError(
            f"nothing was uploaded; to upload these {sum(sizes.values()) / MIB:.0f} MiB: "
            f"python export_student.py push --out {folder} --push {repository} --yes"
        )
    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        commit = api.upload_folder(
            folder_path=folder, repo_id=repository, allow_patterns=names, commit_message="A student of HeAR"
        )
    except HFValidationError as e:
        raise ReleaseError(f"{repository!r} is no name on the hub, expected ORG/NAME") from e
    except OfflineModeIsEnabled as e:
        raise ReleaseError("HF_HUB_OFFLINE is set; unset it to upload") from e
    except HfHubHTTPError as e:
        raise ReleaseError(
            f"the hub refuses {repository} (HTTP {e.response.status_code}); "
            f"HF_TOKEN must be a token that may write there"
        ) from e
    except HTTPError as e:
        raise ReleaseError(f"the hub cannot be reached ({type(e).__name__}); run the same command again") from e
    print(f"uploaded {len(names)} files: {commit.commit_url}")
