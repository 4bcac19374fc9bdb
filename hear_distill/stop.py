"""Ask the supervisor of a lake to leave in good order, and wait until it is gone.

in:   <lake>/status.json, which names its process, and the lock that it holds
out:  SIGTERM: the streamers publish what they have cut, the trainer saves a checkpoint, then all leave
"""

import os
import signal
import time
from contextlib import closing
from pathlib import Path

import psutil

from hear_distill.files import UserError
from hear_distill.lake import Lake
from hear_distill.locks import is_locked
from hear_distill.runlog import StopRequest, read_heartbeat
from hear_distill.status import LOCK

LOOK_S = 0.2
PATIENCE_S = 180.0  # a supervisor kills what has not left after a minute, and waits as long for that


def supervisor_of(root: Path) -> psutil.Process:
    """The process that holds the lake. Raises UserError if nobody does, or if it cannot be told who."""
    with closing(Lake.open(root)):
        pass
    if not is_locked(root / LOCK):
        raise UserError(f"no supervisor runs {root}; to look at it: python datalake/run_lake.py status --lake {root}")
    pid = read_heartbeat(root / "status.json").get("pid", -1)
    try:  # an old number may be another process by now: ours has the lock open, and no other does for long
        process = psutil.Process(pid)
        if str((root / LOCK).resolve()) in {file.path for file in process.open_files()}:
            return process
    except psutil.AccessDenied:
        raise UserError(f"the supervisor of {root} is process {pid} of another user; stop it as that user") from None
    except (psutil.NoSuchProcess, ValueError):
        pass  # told below
    raise UserError(f"a supervisor of {root} has only just started; run the same command again in half a minute")


def stop(root: Path) -> int:
    """`stop`: exit code 0 once the supervisor is gone. Raises UserError if there is none, or if it does not go."""
    process, request = supervisor_of(root), StopRequest()
    process.send_signal(signal.SIGTERM)
    print(f"asked process {process.pid} to leave; the streamers publish, the trainer saves (Ctrl-C: stop waiting)")
    end = time.monotonic() + PATIENCE_S
    while is_locked(root / LOCK):
        if request:
            print("not waiting any longer; it goes on leaving")
            return os.EX_TEMPFAIL
        if time.monotonic() > end:
            raise UserError(f"process {process.pid} has not left after {PATIENCE_S:.0f} s; look at {root / 'logs'}")
        request.wait(LOOK_S)
    with closing(Lake.open(root)) as lake:
        print(f"{root} is stopped: {lake.unread_clips()} unread clips; {lake.books()}")
    return 0
