"""How well a shard mixes its source: the entropy of the labels in a shard, reading 1 or 8 tars side by side.

in:   a folder of WebDataset tars whose captions are labels; best sorted by class, the hardest case
out:  a table, and as the last line of stdout the same as JSON; entropies in bits
cost: two passes over the source

    python benchmarks/mixing.py --source DIR

The label is the caption up to its first colon. The ceiling is that of shards filled from all recordings of the source
in random order; the last shards of a source are not counted, as few tars are left to mix by then.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from statistics import mean

import numpy as np

from hear_distill.lake import Lake
from hear_distill.shards import ClipInfo, read_infos

STREAMER = Path(__file__).parents[1] / "stream_laion_audio_clips.py"
SHARD_CLIPS = 64
OPEN_TARS = (1, 8)


def entropy_bits(labels: Counter[str]) -> float:
    """-sum p log2 p"""
    share = np.array(list(labels.values())) / labels.total()
    return float(-(share * np.log2(share)).sum())


def label_of(info: ClipInfo) -> str:
    """'speech: hello' -> 'speech'"""
    return info.caption.split(":")[0]


def shards_of(source: str, lake: Path, open_tars: int) -> list[list[ClipInfo]]:
    """Stream the whole source; what is in each train shard, in the order of cutting."""
    command = [sys.executable, str(STREAMER), "--source", source, "--lake", str(lake), "--val-fraction", "0"]
    command += ["--shard-clips", str(SHARD_CLIPS), "--open-tars", str(open_tars), "--val-clips", "0"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return [read_infos(shard.path) for shard in Lake.open(lake).ready("train")]


def shuffled(shards: list[list[ClipInfo]]) -> list[list[ClipInfo]]:
    """The same clips in shards of the same size, filled from all recordings in random order."""
    recordings: dict[tuple[str, str], list[ClipInfo]] = {}
    for info in (info for shard in shards for info in shard):
        recordings.setdefault((info.tar, info.key), []).append(info)
    order = np.random.default_rng(0).permutation(len(recordings))
    clips = [info for i in order for info in list(recordings.values())[i]]
    return [clips[i : i + SHARD_CLIPS] for i in range(0, len(clips), SHARD_CLIPS)]


def mean_bits(shards: list[list[ClipInfo]]) -> float:
    """Mean entropy of the labels in a full shard, the last few left out."""
    counted = [shard for shard in shards if len(shard) == SHARD_CLIPS][: -max(OPEN_TARS)]
    return round(mean(entropy_bits(Counter(map(label_of, shard))) for shard in counted), 3)


def main(source: str) -> None:
    result: dict[str, float] = {}
    for open_tars in OPEN_TARS:
        with tempfile.TemporaryDirectory() as folder:
            shards = shards_of(source, Path(folder) / "lake", open_tars)
        result[f"bits_k{open_tars}"] = mean_bits(shards)
    result["bits_shuffled"] = mean_bits(shuffled(shards))
    result["bits_whole"] = round(entropy_bits(Counter(label_of(info) for shard in shards for info in shard)), 3)
    for name, bits in result.items():
        print(f"{name:14} {bits:.2f}")
    print(json.dumps(result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="folder of tars")
    main(parser.parse_args().source)
