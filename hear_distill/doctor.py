"""Is this machine fit for a run of a week? One line for each check, with what to change.

in:   the machine, and the run that somebody wants to start
out:  lines `ok`, `could` (it runs, but slower or less safely) and `MUST` (it will not run); no secret is ever printed
cost: half a minute: 128 MiB written and read, a second of decoding, two questions to the hub
"""

import importlib.metadata
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

from hear_distill import demo
from hear_distill.files import GIB, MIB, UserError, gib
from hear_distill.plan import Rate, Run, decode_rate, needed_rate
from hear_distill.remote import Dropped
from hear_distill.runlog import read_heartbeat
from hear_distill.shards import RECORD_BYTES
from hear_distill.sources import find_source

REQUIREMENTS = Path(__file__).parents[1] / "requirements.txt"
NETWORK_DISKS = ("nfs", "cifs", "smb", "ceph", "lustre", "glusterfs", "fuse.sshfs", "9p", "beegfs", "gpfs")
PROBE_BYTES = 128 * MIB
CHECKPOINT_BYTES = 4 * 21_600_000 * 12  # newest, previous, best and the one being written; weights and two moments
TEACHER_BYTES = 1_213 * 10**6
SHM_BYTES = GIB  # for NCCL, with more than one GPU; containers often begin with 64 MiB
OPEN_FILES = 1024
QUESTION_S = 10.0


class Finding(NamedTuple):
    """What one check found. The text of one that is not `ok` ends with what to change."""

    grade: str
    name: str
    text: str


def examine(run: Run) -> int:
    """`doctor`: print every finding as it comes. Exit code 1 if something must change."""
    must = False
    for finding in findings(run):
        must |= finding.grade == "MUST"
        print(f"{finding.grade:<6}{finding.name:<10}{' '.join(finding.text.split())}")
    print("something must change before this runs" if must else "fit to run")
    return int(must)


def findings(run: Run) -> Iterator[Finding]:
    """All checks, cheap ones first."""
    yield packages(REQUIREMENTS)
    yield from limits()
    yield shared_memory(Path("/dev/shm"))
    yield from room(run)
    yield kind_of_disk(run.lake)
    gpu_name, gpu_finding = gpu(run.trainer["device"], run.gpus)
    yield gpu_finding
    needed = needed_rate(run.out, gpu_name, run.gpus)
    yield disk_speed(run.lake, needed)
    yield cores(run, needed, decode_rate(), len(os.sched_getaffinity(0)))
    yield teacher(run.trainer["teacher"])
    yield source(run.source)


# ---- software ----


def packages(requirements: Path) -> Finding:
    """Python, before 3.11 of which nothing here can be imported, and the installed versions against the pinned ones."""
    python = f"Python {'.'.join(map(str, sys.version_info[:3]))}"
    if not requirements.exists():
        return Finding("could", "packages", f"no {requirements} to compare with; run from a checkout to know")
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)", requirements.read_text(), re.MULTILINE))
    missing, other = [], []
    for name, version in pinned.items():
        try:
            found = importlib.metadata.version(name).split("+")[0]
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
            continue
        if found != version:
            other.append(f"{name} {found} instead of {version}")
    remedy = f"pip install -r {requirements}"
    if missing:
        return Finding("MUST", "packages", f"{python}, not installed: {', '.join(missing)}; {remedy}")
    if other:
        return Finding("could", "packages", f"{python}, not the tested versions: {', '.join(other)}; {remedy}")
    return Finding("ok", "packages", f"{python}, all {len(pinned)} as pinned")


def gpu(device: str, num_wanted: int = 1) -> tuple[str, Finding]:
    """(name of the GPU, what was found); the name is empty where there is none."""
    if device == "cpu":
        return "", Finding("ok", "gpu", "none needed: --device cpu")
    import torch  # heavy, and only the doctor needs it here

    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=False, timeout=60)
        seen = answer.stdout.strip().splitlines() if answer.returncode == 0 else []
    except FileNotFoundError:
        seen = []
    if torch.cuda.is_available():
        name, num_found = torch.cuda.get_device_name(0), torch.cuda.device_count()
        if num_found < num_wanted:
            remedy = "lower --gpus, or look at CUDA_VISIBLE_DEVICES"
            return name, Finding("MUST", "gpu", f"--gpus {num_wanted}, but torch finds {num_found}; {remedy}")
        return name, Finding("ok", "gpu", f"{'; '.join(seen) or name}; torch {torch.__version__} uses it")
    if seen:
        remedy = f"update the driver to one for CUDA {torch.version.cuda}, or install another torch"
        return "", Finding("MUST", "gpu", f"{'; '.join(seen)}, but torch {torch.__version__} cannot use it; {remedy}")
    remedy = "run on a machine with one, or try: python datalake/run_lake.py demo"
    return "", Finding("MUST", "gpu", f"no NVIDIA GPU, or no driver; {remedy}")


# ---- machine ----


def limits() -> Iterator[Finding]:
    """What the shell allows a process."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files != resource.RLIM_INFINITY and files < OPEN_FILES:
        yield Finding("MUST", "ulimits", f"{files} open files, {OPEN_FILES} are needed; ulimit -n 4096")
    size = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if size != resource.RLIM_INFINITY and size < 8 * GIB:
        yield Finding("MUST", "ulimits", f"files of at most {gib(size)}; ulimit -f unlimited")
    if files == resource.RLIM_INFINITY or files >= OPEN_FILES:
        yield Finding("ok", "ulimits", f"{'any number of' if files == resource.RLIM_INFINITY else files} open files")


def shared_memory(folder: Path) -> Finding:
    """Of the machine, or of the container."""
    if not folder.is_dir():
        return Finding("could", "shm", f"no {folder}; several GPUs need it: docker run --shm-size 8g")
    total = shutil.disk_usage(folder).total
    if total < SHM_BYTES:
        return Finding("could", "shm", f"{gib(total)}, several GPUs need {gib(SHM_BYTES)}: docker run --shm-size 8g")
    return Finding("ok", "shm", gib(total))


def existing(path: Path) -> Path:
    """The nearest folder above `path` that is there: what will hold it."""
    path = path.resolve()
    return path if path.is_dir() else existing(path.parent)


def room(run: Run) -> Iterator[Finding]:
    """Free room on every disk that is written to, against all that will be written to it."""
    in_lake = sum(path.stat().st_size for path in run.lake.glob("ledger.sqlite*"))
    used = read_heartbeat(run.lake / "status.json").get("used_bytes", in_lake)
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    is_remote = not Path(run.trainer["teacher"]).is_dir()
    plans = [
        (run.lake, max(0, run.cap_bytes - used) + run.floor_bytes, "the cap and the floor of the lake"),
        (run.out, CHECKPOINT_BYTES, "checkpoints"),
        (home, TEACHER_BYTES * is_remote, "the teacher's weights"),
    ]
    plans = [plan for plan in plans if plan[1]]
    disks: dict[int, list[tuple[Path, int, str]]] = {}
    for path, num_bytes, reason in plans:
        disks.setdefault(os.stat(existing(path)).st_dev, []).append((path, num_bytes, reason))
    for parts in disks.values():
        free = shutil.disk_usage(existing(parts[0][0])).free
        needed = sum(num_bytes for _, num_bytes, _ in parts)
        text = f"{gib(free)} free, {gib(needed)} needed for {' and '.join(reason for _, _, reason in parts)}"
        if free < needed:
            yield Finding("MUST", "room", f"{text}, below {parts[0][0]}; lower --cap-gb, or use another disk")
        else:
            yield Finding("ok", "room", text)


def kind_of_disk(lake: Path) -> Finding:
    """A lake needs flock and SQLite's write-ahead log, which no network file system keeps its word about."""
    folder = existing(lake)
    mounts = [p for p in psutil.disk_partitions(all=True) if folder.is_relative_to(p.mountpoint)]
    kind = max(mounts, key=lambda p: len(p.mountpoint)).fstype if mounts else "unknown"
    if kind.startswith(NETWORK_DISKS):
        return Finding("MUST", "disk", f"{lake} is on {kind}, a network file system; give a --lake on a local disk")
    return Finding("ok", "disk", f"{lake} is on {kind}")


def disk_speed(lake: Path, needed: Rate | None) -> Finding:
    """Write and read back a file beside the lake. Reading may come from the kernel's memory, as it will in a run."""
    folder, block = existing(lake), os.urandom(8 * MIB)
    if shutil.disk_usage(folder).free < 2 * PROBE_BYTES:
        return Finding("MUST", "speed", f"less than {gib(2 * PROBE_BYTES)} free in {folder}; make room")
    path = folder / f".doctor-{os.getpid()}"
    try:
        began = time.perf_counter()
        with path.open("wb") as f:
            for _ in range(PROBE_BYTES // len(block)):
                f.write(block)
            f.flush()
            os.fsync(f.fileno())
        write_s = time.perf_counter() - began
        with path.open("rb") as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            began = time.perf_counter()
            while f.read(len(block)):
                pass
        read_s = time.perf_counter() - began
    except PermissionError:
        return Finding("MUST", "speed", f"{folder} cannot be written to; give another --lake")
    finally:
        path.unlink(missing_ok=True)
    speeds = [PROBE_BYTES / seconds / MIB for seconds in (write_s, read_s)]
    text = f"{folder}: writes {speeds[0]:,.0f} MiB/s, reads {speeds[1]:,.0f} MiB/s"
    if needed is None:
        return Finding("ok", "speed", text)
    each = needed.clips_per_s * RECORD_BYTES / MIB
    if min(speeds) < 2 * each:  # both at once, on one disk
        return Finding(
            "could", "speed", f"{text}; {each:,.0f} of each at once for {needed}: put --lake on a faster disk"
        )
    return Finding("ok", "speed", f"{text}; {each:,.0f} of each needed")


def cores(run: Run, needed: Rate | None, per_core: Rate, num_cores: int) -> Finding:
    """Enough to decode what the GPUs take, and one more for each rank of the trainer."""
    text = f"{num_cores} cores, {per_core}"
    if needed is None:
        return Finding("ok", "cores", f"{text}; not known what the trainer takes: it logs clips_per_s once it runs")
    wanted = -(-int(needed.clips_per_s) // max(1, int(per_core.clips_per_s)))
    text += f"; {needed} need {wanted} for streamers and {run.gpus} for the trainer"
    if wanted + run.gpus > num_cores:
        share = max(0.0, 1 - max(0, num_cores - run.gpus) * per_core.clips_per_s / needed.clips_per_s)
        return Finding("could", "cores", f"{text}: the trainer will wait {share:.0%} of the time; use more cores")
    if wanted > run.max_workers:
        return Finding("could", "cores", f"{text}, --max-workers is {run.max_workers}; raise it to {wanted}")
    return Finding("ok", "cores", text)


# ---- the outside ----


def teacher(name: str) -> Finding:
    """Whether the teacher is here, or the hub would send it to this account."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled

    from hear_distill.teacher import WEIGHTS_FILE, TeacherError, check_config, explain  # torch, transformers

    if Path(name) == demo.TEACHER:
        return Finding("ok", "teacher", "the demo makes its own")
    if Path(name).is_dir():
        try:
            check_config(Path(name))
        except TeacherError as e:
            return Finding("MUST", "teacher", str(e))
        return Finding("ok", "teacher", f"the folder {name}")
    try:
        if isinstance(try_to_load_from_cache(name, WEIGHTS_FILE), str):
            return Finding("ok", "teacher", f"{name} is in the cache")
        get_hf_file_metadata(hf_hub_url(name, WEIGHTS_FILE), timeout=QUESTION_S)
    except OfflineModeIsEnabled:
        return Finding("MUST", "teacher", f"{name} is not in the cache, and HF_HUB_OFFLINE is set; unset it")
    except (HTTPError, HFValidationError) as e:
        return Finding("MUST", "teacher", explain(e, name, None))
    return Finding("ok", "teacher", f"{name}: the hub would send it to this account")


def source(name: str) -> Finding:
    """Whether it answers, once: a run is more patient."""
    try:
        if Path(name) == demo.SOURCE:
            return Finding("ok", "source", "the demo makes its own")
        dataset, _, revision = name.removeprefix("hf://datasets/").partition("@")
        if "://" in dataset or Path(name).exists() or dataset.count("/") != 1:
            return Finding("ok", "source", f"{name}: {len(find_source(name).tars)} tars")
        from huggingface_hub import HfApi

        from hear_distill.hub import explained

        with explained(dataset):
            sha = HfApi().dataset_info(dataset, revision=revision or None, timeout=QUESTION_S).sha
        return Finding("ok", "source", f"{dataset} answers, at revision {sha[:12]}")
    except (UserError, Dropped) as e:
        return Finding("MUST", "source", f"{e}; try again when that is put right")
