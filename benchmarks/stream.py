"""The streamer against the decoder it is built on, and against one ffmpeg process for each recording; on one core.

in:   a folder of WebDataset tars with real recordings
out:  a table, and as the last line of stdout the same as JSON
cost: about a minute for an hour of recordings

    python benchmarks/stream.py --source DIR

ours    tar bytes to finished, hashed, fsynced shards: the streamer's own worker, in this process
bare    soundfile from memory and soxr HQ of one channel, of the same bytes; nothing is cut, kept or written
ffmpeg  a process for each recording, MP3 in and 16 kHz PCM out through pipes, as the first implementation does it

They take turns in this process, pinned to one core. Peak memory is that of a streamer of its own with its default
shards, its anchor and eight open tars.
"""

import argparse
import io
import json
import os
import resource
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing, redirect_stdout
from pathlib import Path
from statistics import median

import soundfile
import soxr

from hear_distill.locks import Owner
from hear_distill.runlog import StopRequest
from hear_distill.sources import FolderSource
from hear_distill.tars import read_recordings

STREAMER = Path(__file__).parents[1] / "stream_laion_audio_clips.py"
ROUNDS = 3
FFMPEG_RECORDINGS = 30  # in each round; a fifth of a second each
FFMPEG = ["ffmpeg", "-loglevel", "error", "-i", "pipe:0", "-f", "s16le", "-ac", "1", "-ar", "16000", "pipe:1"]
COPIES = 3  # of the source, for the memory: the anchor alone takes 2,048 clips


def recordings_of(source: str) -> list[bytes]:
    """The compressed bytes of every recording."""
    folder, audio = FolderSource(Path(source)), []
    for tar in folder.tars:
        with folder.open(tar, 0) as stream:
            audio += [recording.audio for recording in read_recordings(stream, tar, 0) if recording.problem is None]
    return audio


def stream(source: str) -> tuple[float, int]:
    """Cut the whole source into shards of a lake that is thrown away. Returns seconds from first to last, and clips."""
    stage = runpy.run_path(str(STREAMER))
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        config = stage["Config"](source=source, lake=Path(folder), val_clips=0, val_fraction=0.0)
        opened, lake = stage["join_lake"](config)
        with closing(stage["Worker"](config, opened, lake, Owner(lake.root, "stream"), StopRequest())) as worker:
            began = time.perf_counter()
            while worker.one_shard(is_anchor=False):
                pass
            spent_s = time.perf_counter() - began
        return spent_s, lake.books().cut


def decode_bare(audio: list[bytes]) -> None:
    """The floor: what decoding and resampling cost by themselves."""
    for data in audio:
        frames, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)  # [n, c]
        soxr.resample(frames[:, 0], rate, 16_000, quality="HQ")


def decode_with_ffmpeg(audio: list[bytes]) -> None:
    """A process for each recording."""
    for data in audio:
        subprocess.run(FFMPEG, input=data, stdout=subprocess.DEVNULL, check=True)


def seconds(action: Callable[[], object]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def peak_rss_mb(source: str) -> float:
    """Largest resident size, in MB of 10^6 bytes, of a streamer with its default shards."""
    with tempfile.TemporaryDirectory() as folder:
        for copy in range(COPIES):
            for path in Path(source).glob("*.tar"):
                (Path(folder) / f"{copy}-{path.name}").symlink_to(path.resolve())
        command = [sys.executable, str(STREAMER), "--source", folder, "--lake", f"{folder}/lake"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6


def main(source: str) -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    rss_mb = peak_rss_mb(source)  # before any other child, as the system keeps one maximum for all
    audio = recordings_of(source)
    sample = audio[:: max(1, len(audio) // FFMPEG_RECORDINGS)][:FFMPEG_RECORDINGS]
    _, num_clips = stream(source)  # warms the caches
    rounds = [
        {
            "ours": stream(source)[0] / len(audio),
            "bare": seconds(lambda: decode_bare(audio)) / len(audio),
            "ffmpeg": seconds(lambda: decode_with_ffmpeg(sample)) / len(sample),
        }
        for _ in range(ROUNDS)
    ]
    for name in rounds[0]:
        print(f"{name:8} {1000 * median(r[name] for r in rounds):8.2f} ms per recording")
    result = {
        "clips_per_s_per_core": round(num_clips / len(audio) / median(r["ours"] for r in rounds), 1),
        "vs_bare_decode": round(median(r["bare"] / r["ours"] for r in rounds), 3),
        "vs_ffmpeg_per_file": round(median(r["ffmpeg"] / r["ours"] for r in rounds), 1),
        "peak_rss_mb": round(rss_mb),
        "recordings": len(audio),
        "clips": num_clips,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="folder of tars")
    main(parser.parse_args().source)
