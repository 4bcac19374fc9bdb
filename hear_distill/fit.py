"""Chunks that fit into the memory of the GPU: found out before the first step, by halving what does not.

in:   the chunk that was asked for, and a way to make what learns, of its own weights, for a chunk of any size
out:  the chunk to train with; the batch stays what it was, as more chunks make it up

The rehearsal is two whole steps on noise, by the code of a run's own steps. It has weights, moments, average, queue and
noise scale of its own, and leaves the random numbers as they were: a run that was rehearsed is the run that was not.

B clips of a chunk   E embedding   P width of the teacher's tokens   M rows of the queue   K prototypes
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from hear_distill.files import UserError
from hear_distill.frontend import CLIP_SAMPLES, NUM_MELS, num_rows
from hear_distill.learning import Learning
from hear_distill.objective import NUM_PROTOTYPES, LossConfig, Objective
from hear_distill.ranks import ALONE, Ranks
from hear_distill.teacher import Teacher

DEVICES = ("cuda",)  # that say when their memory ends; where a computer's own memory ends, so does the process
NUM_STEPS = 2  # the moments of the optimiser are made in the first and are there in the second


def chunk_that_fits(
    chunk_size: int,
    loss: LossConfig,
    device: torch.device,
    rehearse: Callable[[int], None],
    sizes: Sequence[int] = (1,),
    ranks: Ranks = ALONE,
) -> int:
    """`chunk_size` or the largest of its halves for which `rehearse` does not run out of memory; said if it is a half.

    Elsewhere than on DEVICES nothing is tried. A chunk holds two sounds or more, and whole ones, of each of `sizes`, in
    clips. Each rank tries by itself, and all take the smallest answer.

    Raises:
        UserError: a chunk that does not fit may not be halved, as it is part of the loss, or cannot be.
    """
    size = chunk_size
    while device.type in DEVICES and not _fits(size, rehearse):
        found = f"a chunk of {size} clips does not fit into the memory of the GPU"
        if loss.negatives == "batch":
            raise UserError(
                f"{found}, and --loss.negatives batch compares the clips of a chunk with each other, so a smaller one "
                f"is another loss; choose it by --chunk-size (and --chunks), or take --loss.negatives queue"
            )
        if size % 2 or any(size // 2 % clips or size // 2 < 2 * clips for clips in sizes):
            raise UserError(
                f"{found}, and cannot be halved (it must hold two whole sounds, of {2 * max(sizes)} s); choose another "
                f"--chunk-size, or a smaller --model, or look with nvidia-smi who else uses that memory"
            )
        size //= 2
    size = min(ranks.gather(size))
    if size < chunk_size:
        which = "the" if ranks.size == 1 else "every"
        print(
            f"a chunk of {chunk_size} clips does not fit into the memory of {which} GPU; "
            f"{chunk_size // size} times as many chunks of {size} make the same batch"
        )
    return size


def _fits(size: int, rehearse: Callable[[int], None]) -> bool:
    """Whether that goes well; what it took is given back."""
    is_enough = True
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        try:
            rehearse(size)
        except torch.OutOfMemoryError:
            is_enough = False  # and no more here: until this block is left, the traceback holds all tensors
    gc.collect()
    torch.cuda.empty_cache()
    return is_enough


def rehearse_steps(learning: Learning, size: int, queue_rows: int) -> None:
    """Two steps of a new `learning` on noise, in chunks of `size` clips. If a run looks for the critical rate now and
    then, both do: such a step keeps all of its chunks, and looks in float32.

    With several ranks, each rehearses alone: one whose memory ends must not leave the others waiting for it.
    """
    device = learning.device
    generator = torch.Generator(device).manual_seed(0)
    learning.objective = random_objective(learning.teacher, learning.loss, queue_rows, device)
    shape = (size, 1, num_rows(CLIP_SAMPLES), NUM_MELS)
    learning.held_out = torch.rand(shape, generator=generator, device=device)
    for step in range(NUM_STEPS):
        num_chunks = learning.begin_step().num_chunks
        learning.wants_probe = learning.pace.is_critical
        for chunk in range(num_chunks):
            spectrogram = torch.rand(shape, generator=generator, device=device)  # [B, 1, 192, 128]
            learning.add(spectrogram, [(step, chunk * size + clip) for clip in range(size)])
        learning.finish_step()
    if device.type == "cuda":
        torch.cuda.synchronize()  # so that nothing is still to come


def random_objective(teacher: Teacher, config: LossConfig, queue_rows: int, device: torch.device) -> Objective:
    """Targets that no clip was asked for, of the sizes of a run's own: statistics, queue and prototypes are noise."""
    width, token_width = teacher.model.config.pooler_output_size, teacher.model.config.hidden_size
    generator = torch.Generator().manual_seed(0)
    one = torch.ones(())
    statistics = {"mean": torch.zeros(width), "scale": one, "components": torch.eye(width)}  # [E], [], [E, E]
    patches = {"mean": torch.zeros(token_width), "scale": one, "limit": 100 * one}  # [P], [], []
    state: dict[str, Any] = {
        "statistics": statistics,
        "patches": patches if config.patch > 0 else None,
        "queue": None,
        "prototypes": None,
        "weights": asdict(config.weights()),
        "known_ids": torch.empty(0, 2, dtype=torch.int64),
        "known": torch.empty(0, width),  # [0, E]
    }
    if config.negatives == "queue":
        state["queue"] = {"rows": torch.randn(queue_rows, width, generator=generator), "oldest": 0}  # [M, E]
    if config.prototype > 0:
        state["prototypes"] = torch.randn(NUM_PROTOTYPES, width, generator=generator)  # [K, E]
    return Objective(teacher, config, state, device)
