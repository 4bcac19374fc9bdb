"""A disk that loses what was not fsynced: a process on it that kills itself leaves what a power cut may leave.

in:   a folder, what is lost, and a Python command line
out:  the folder as it may stand after the power cut; the process died by SIGKILL, or nothing was lost

    python tests/lossy_disk.py everything lake stream_laion_audio_clips.py --source DIR --lake lake
    python tests/lossy_disk.py contents lake -c 'print("as Python takes it")'

Two extremes of what a disk does between two fsyncs; a real one lies between them:

    everything   the content of a file is that of its last fsync, or nothing; the names in a folder are those of the
                 folder's last fsync, whatever was made, renamed or deleted since
    contents     names reach the disk at once, contents do not: a file whose first bytes are no longer those of its
                 last fsync is empty, what was appended is gone

What stands in the folder at the start is on the disk. SQLite's files are left alone: it calls fsync in C, unseen here,
and with synchronous = FULL a commit is durable. One process at a time, and no folder is renamed.
"""

import os
import runpy
import shutil
import signal
import stat
import sys
from collections.abc import Sequence
from pathlib import Path

LOST = ("nothing", "everything", "contents")
OF_SQLITE = "ledger.sqlite"  # also its -wal and -shm; closing any of them here would drop the locks that SQLite holds


class LossyDisk:
    """What is durable below a folder, by inode: the names in each folder and the content of each file."""

    def __init__(self, root: Path, lost: str) -> None:
        assert lost in LOST[1:], lost
        self.root, self.lost = root.resolve(), lost
        self.names: dict[int, dict[str, int]] = {}
        """inode of a folder -> the inode of each name in it"""
        self.contents: dict[int, bytes] = {}
        self.kept_open: dict[int, int] = {}
        """inode -> a descriptor: as long as it is open, no new file gets the number of a deleted one"""
        for folder, _, files in os.walk(self.root):
            self._sync_folder(Path(folder))
            for name in files:
                if not name.startswith(OF_SQLITE):
                    self._sync_file(Path(folder, name))

    def install(self) -> None:
        """Watch this process: each fsync makes durable, and its own SIGKILL, as `files.crash_point` sends it, loses."""
        fsync, kill = os.fsync, os.kill

        def watched_fsync(fd: int) -> None:
            fsync(fd)
            path = Path(os.readlink(f"/proc/self/fd/{fd}"))
            if path.is_relative_to(self.root):
                if stat.S_ISDIR(os.fstat(fd).st_mode):
                    self._sync_folder(path)
                else:
                    self._sync_file(Path(f"/proc/self/fd/{fd}"))

        def watched_kill(pid: int, signal_number: int) -> None:
            if (pid, signal_number) == (os.getpid(), signal.SIGKILL):
                self.lose()
            kill(pid, signal_number)

        os.fsync, os.kill = watched_fsync, watched_kill

    def _inode(self, path: Path) -> int:
        inode = path.stat().st_ino
        if inode not in self.kept_open:
            self.kept_open[inode] = os.open(path, os.O_RDONLY)
        return inode

    def _sync_folder(self, folder: Path) -> None:
        names = [name for name in os.listdir(folder) if not name.startswith(OF_SQLITE)]
        self.names[self._inode(folder)] = {name: self._inode(folder / name) for name in names}

    def _sync_file(self, path: Path) -> None:
        self.contents[self._inode(path)] = path.read_bytes()

    def lose(self) -> None:
        """Do to the folder what the power cut does."""
        if self.lost == "everything":
            self._restore(self.root, self.names[self._inode(self.root)])
        else:
            for path in self.root.rglob("*"):
                if path.is_file() and not path.name.startswith(OF_SQLITE):
                    durable = self.contents.get(path.stat().st_ino, b"")
                    path.write_bytes(durable if path.read_bytes().startswith(durable) else b"")

    def _restore(self, folder: Path, names: dict[str, int]) -> None:
        """Put these names back into `folder`, each with its durable content, and take all others away."""
        for path in list(folder.iterdir()):
            if not path.name.startswith(OF_SQLITE) and names.get(path.name) != path.stat().st_ino:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name, inode in names.items():
            if stat.S_ISDIR(os.fstat(self.kept_open[inode]).st_mode):
                (folder / name).mkdir(exist_ok=True)
                self._restore(folder / name, self.names.get(inode, {}))
            else:
                (folder / name).write_bytes(self.contents.get(inode, b""))


def on_lossy_disk(command: Sequence[str], folder: Path, lost: str) -> list[str]:
    """The command line of Python, `command`, so that it loses what it did not fsync below `folder` when it crashes."""
    python, *arguments = command
    return list(command) if lost == "nothing" else [python, __file__, lost, str(folder), *arguments]


def main(lost: str, folder: str, *arguments: str) -> None:
    """Run a script, or code after -c, as Python itself would."""
    LossyDisk(Path(folder), lost).install()
    if arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = list(arguments)
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
