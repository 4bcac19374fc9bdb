"""Start a stage on several GPUs, or on several machines, by torchrun; and end with whoever started us, in good order.

in:   python -m hear_distill.launch --gpus N [--num-nodes M --node-rank R --rendezvous HOST:PORT] SCRIPT ARGUMENTS
out:  the ranks; their stdout and stderr are ours. Exit code: that of the rank that failed first of its own, else 0

Plain torchrun passes no open file on to its ranks, so none of them would see the supervisor's pipe close; it gives them
30 s to leave, which a checkpoint may not keep to; and whatever exit code a rank had becomes 1. So: when the pipe closes
this process ends at once, which its ranks see (hear_distill/runlog.py); SIGTERM is handed on to them, and waited for.
"""

import argparse
import logging
import os
import signal
import sys
import threading
import uuid
from contextlib import suppress

import psutil
from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from hear_distill.nodes import Nodes
from hear_distill.ranks import RANK_LOST
from hear_distill.runlog import LAUNCHER_PID, SUPERVISOR_FD

RENDEZVOUS_S = 480  # for all machines to come; a supervisor takes ten minutes without progress for a hang
KILLED = 128  # added to the number of a signal, as shells do


def launch_config(gpus: int, num_nodes: int, node_rank: int, rendezvous: str) -> LaunchConfig:
    """With one machine the operating system chooses the port. No restarts: the supervisor decides about those."""
    several = {"rdzv_backend": "static", "rdzv_endpoint": rendezvous, "run_id": "hear"}
    alone = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": uuid.uuid4().hex}
    return LaunchConfig(
        min_nodes=num_nodes,
        max_nodes=num_nodes,
        nproc_per_node=gpus,
        max_restarts=0,
        rdzv_configs={"rank": node_rank, "timeout": RENDEZVOUS_S},
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
        signals_to_handle="SIGQUIT",  # the others are ours
        **(several if num_nodes > 1 else alone),
    )


def hand_on_signals() -> None:
    """SIGTERM and Ctrl-C go to the ranks, which then leave by themselves; they have sessions of their own.

    By a thread, as the main one may be deep in torch, waiting for other machines.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)

    def listen() -> None:
        while number := os.read(reader, 1)[0]:
            ranks = psutil.Process().children()
            if not ranks:
                os._exit(KILLED + number)
            for rank in ranks:
                with suppress(psutil.NoSuchProcess):  # it has just left
                    rank.send_signal(number)

    threading.Thread(target=listen, daemon=True).start()


def end_with_supervisor() -> None:
    """End when the supervisor's pipe closes. The ranks have no pipe: they are told whom to watch instead."""
    os.environ[LAUNCHER_PID] = str(os.getpid())
    pipe = os.environ.pop(SUPERVISOR_FD, None)

    def watch() -> None:
        os.read(int(pipe), 1)
        os._exit(1)

    if pipe is not None:
        threading.Thread(target=watch, daemon=True).start()


def exit_code(codes: list[int]) -> int:
    """Of ranks that failed (a negative one is a signal): what the first said of its own, not what followed from it.

    A rank that does not leave within half a minute of another's end is killed, so a signal tells less than a code.
    """
    own = [code for code in codes if code not in (RANK_LOST, -signal.SIGTERM)]
    first = next((code for code in own if code > 0), next(iter(own), codes[0]))
    return first if first >= 0 else KILLED - first


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, required=True, help="ranks on this machine")
    parser.add_argument("--num-nodes", type=int, default=1)
    parser.add_argument("--node-rank", type=int, default=0)
    parser.add_argument("--rendezvous", default="", help="HOST:PORT of machine 0")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    try:
        Nodes(given.gpus, given.num_nodes, given.node_rank, given.rendezvous).refuse()
    except ValueError as e:
        parser.error(str(e))
    if not given.command:
        parser.error("no script to start; run_lake.py --dry-run prints a whole command")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the ranks say what is wrong, and we
    hand_on_signals()
    end_with_supervisor()
    try:
        config = launch_config(given.gpus, given.num_nodes, given.node_rank, given.rendezvous)
        elastic_launch(config, sys.executable)(*given.command)
    except ChildFailedError as e:
        for rank, failure in e.failures.items():
            if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:
                print(f"rank {rank} was killed by signal {-failure.exitcode}", file=sys.stderr)
        return exit_code([failure.exitcode for failure in e.failures.values()])
    except DistError as e:
        print(f"error: the machines did not meet at {given.rendezvous}: {str(e).splitlines()[0]}", file=sys.stderr)
        return os.EX_TEMPFAIL
    return 0


if __name__ == "__main__":
    sys.exit(main())
