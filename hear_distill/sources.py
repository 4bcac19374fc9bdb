"""Where recordings come from: a list of tars, made once, and a stream of each from any byte.

in:   the name of a source: a folder, an fsspec URL, or a dataset on the Hugging Face hub
out:  Source: its tars, its revision, and open(tar, offset)
"""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from hear_distill.files import UserError
from hear_distill.remote import UrlSource
from hear_distill.tars import Stream, Tar, TarBroken, listing_revision


class Source(Protocol):
    """A list of tars that stays the same as long as `revision` does."""

    revision: str

    @property
    def tars(self) -> list[Tar]:
        """All tars, by name. The first look may ask the network."""

    def open(self, tar: Tar, offset: int, look: Callable[[], None]) -> AbstractContextManager[Stream]:
        """A stream of the tar's bytes from `offset` on.

        `look` is called, in the caller's thread, every so often while a read waits; what it raises ends the wait.
        Raises (here or from a read) TarBroken if this tar has gone, UserError if the user must do something.
        """


def find_source(text: str, revision: str | None = None) -> Source:
    """The source that `text` names: a folder, an fsspec URL, or a dataset `org/name[@revision]` on the hub.

    `revision` is that of a lake that exists: a hub dataset keeps to it, whatever was added since, and is not listed
    again. Raises UserError if there is no such source.
    """
    dataset = text.removeprefix("hf://datasets/")
    if dataset == text and "://" in text:
        return UrlSource(text)
    if not Path(text).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", dataset):
        from hear_distill.hub import HubSource  # late: it reads HF_ENDPOINT and the like when it is imported

        return HubSource(dataset, revision)
    return FolderSource(Path(text))


class FolderSource:
    """A local folder of tars."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise UserError(
                f"no folder {folder} to read tars from; expected --source to be a folder of WebDataset tars; "
                f"to see it run without data: python datalake/run_lake.py demo"
            )
        self.tars = [Tar(path.name, path.stat().st_size) for path in sorted(folder.glob("*.tar"))]
        if not self.tars:
            raise UserError(
                f"no *.tar in {folder}; expected tars of <key>.audio.mp3 and <key>.metadata.json; "
                f"to see it run without data: python datalake/run_lake.py demo"
            )
        self.revision = listing_revision(self.tars)

    def open(self, tar: Tar, offset: int, look: Callable[[], None] = lambda: None) -> AbstractContextManager[Stream]:
        """As in Source. Raises UserError if all tars have gone: a source that is not there is not a broken one."""
        try:
            stream = (self.folder / tar.name).open("rb")
        except (FileNotFoundError, PermissionError) as e:
            if not any(self.folder.glob("*.tar")):
                raise UserError(
                    f"{self.folder} held tars and holds none now; is it still mounted? "
                    f"Then run the same command again, which goes on where it stopped"
                ) from e
            raise TarBroken(f"cannot be opened: {e.strerror}") from e
        stream.seek(offset)
        return stream
