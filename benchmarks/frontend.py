"""The mel-PCEN front end against the published one, which walks through the frames one by one.

in:   nothing; clips of pink noise are made here
out:  a table of medians, and as the last line of stdout JSON, whose ratios are medians of those of single turns
cost: seconds

    python benchmarks/frontend.py
    python benchmarks/frontend.py --batch 512 --device cuda

B clips   T frames   S = 400 samples of a frame
"""

import argparse
import json
import runpy
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from hear_distill.frontend import BLOCK_FRAMES, CLIP_SAMPLES, MelPcen, frames_of

# The slow version lives with the tests, which are not part of the installed package.
REFERENCE = Path(__file__).parents[1] / "tests" / "reference" / "mel_pcen.py"
WARM_UP, REPEATS = 3, 21
MAX_DIFFERENCE = 1e-3  # between two float32 versions of an image that reaches 7


def pink_noise(num_clips: int) -> Tensor:
    """[B, 32000], power falling with 1 / frequency as in most recordings; zeros would flatter the memory."""
    white = torch.randn(num_clips, CLIP_SAMPLES, generator=torch.Generator().manual_seed(0))
    spectrum = torch.fft.rfft(white)  # [B, 16001]
    return torch.fft.irfft(spectrum / torch.arange(1, spectrum.shape[1] + 1).sqrt(), n=CLIP_SAMPLES)  # [B, 32000]


def transform(frames: Tensor, window: Tensor) -> None:
    """[B, T, S]: window and FFT alone, in the blocks in which the front end does them."""
    for block in frames.split(BLOCK_FRAMES, dim=1):
        torch.fft.rfft(block * window)


def in_turn(candidates: dict[str, Callable[[], object]], device: str) -> dict[str, list[float]]:
    """Milliseconds of each candidate, turn by turn: a slow moment of the machine meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(WARM_UP + REPEATS):
        for name, candidate in candidates.items():
            start = time.perf_counter()
            candidate()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: values[WARM_UP:] for name, values in times.items()}


@torch.inference_mode()
def main(batch: int, device: str) -> None:
    step_loop = runpy.run_path(str(REFERENCE))["step_loop_mel_pcen"]
    front_end = MelPcen().to(device)
    audio = pink_noise(batch).to(device)  # [B, 32000]
    frames = frames_of(audio)  # [B, T, S]

    difference = (front_end(audio) - step_loop(audio)).abs().max().item()
    if not difference <= MAX_DIFFERENCE:
        raise SystemExit(
            f"the two front ends differ by {difference:.2g}, expected at most {MAX_DIFFERENCE}\n"
            f"  to find out which is wrong: python -m pytest tests/test_frontend.py"
        )
    times = in_turn(
        {
            "ours": lambda: front_end(audio),
            "transform": lambda: transform(frames, front_end.window),
            "step_loop": lambda: step_loop(audio),
        },
        device,
    )
    ms = {name: median(values) for name, values in times.items()}

    def ratio(above: str, below: str) -> float:
        return round(median(a / b for a, b in zip(times[above], times[below], strict=True)), 3)

    threads = torch.get_num_threads()
    print(
        f"{batch} clips of 2 s on {device}, {threads} threads, median of {REPEATS}, images differ by {difference:.1g}"
    )
    for name, label in [("ours", "ours"), ("transform", "of it window and FFT"), ("step_loop", "frame by frame")]:
        print(f"{label:20}{ms[name]:9.2f} ms{1000 * batch / ms[name]:10.0f} clips/s")
    result = {
        "vs_step_loop": ratio("step_loop", "ours"),
        "stft_share": ratio("transform", "ours"),
        "ms_ours": round(ms["ours"], 3),
        "ms_step_loop": round(ms["step_loop"], 3),
        "batch": batch,
        "device": device,
        "threads": threads,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64, help="clips of 2 s per call (default 64)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default cpu")
    arguments = parser.parse_args()
    if arguments.batch < 1:
        parser.error(f"--batch is {arguments.batch}, expected at least 1")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, but torch finds no GPU: use --device cpu")
    main(arguments.batch, arguments.device)
