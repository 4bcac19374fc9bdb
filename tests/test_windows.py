"""Windows of a recording."""

import numpy as np
import pytest

from hear_distill.audio import windows


def windows_one_by_one(samples: list[int]) -> list[list[int]]:
    if len(samples) <= 32_000:
        return [samples + [0] * (32_000 - len(samples))]
    cut = []
    for second in range(len(samples)):
        if 16_000 * second + 32_000 >= len(samples):
            cut.append(samples[-32_000:])
            return cut
        cut.append(samples[16_000 * second : 16_000 * second + 32_000])


@pytest.mark.parametrize("num_samples", [1, 31_999, 32_000, 32_001, 47_999, 48_000, 48_001, 64_000, 100_007])
def test_windows_begin_every_second_and_the_last_one_ends_with_the_recording(num_samples):
    samples = np.random.default_rng(0).integers(-32768, 32768, num_samples).astype(np.int16)

    found = windows(samples)

    assert found.dtype == np.int16
    assert found.tolist() == windows_one_by_one(samples.tolist())
