"""Another rate for a sound: exact for any pair of rates, in bounded memory.

In: samples at one rate, read in blocks. Out: samples at another. Knows nothing of files.

Blocks of two seconds go through a real Fourier transform, frequencies that the lower of both rates cannot
hold are taken off, and the transform back has the length of the new rate. Of every block the middle second
is kept. That is the convolution with one kernel, of linear phase, as long as the kernel has faded within
half a second: with a cosine flank between 94 and 100 % of the lower rate's limit, it is below 1e-6 there for
rates from 4 kHz. Whole rates need no common factor: one second has a whole number of samples of either.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

_PASS = 0.94
"""Part of the lower rate's limit up to which nothing is changed."""

Read = Callable[[int, int], NDArray[np.float64]]


def resample(read: Read, frames: int, rate: int, target: int) -> NDArray[np.float32]:
    """A sound at another rate.

    Args:
        read: gives samples (stop - start,) from start to stop, both within 0 and `frames`.
        frames: samples that there are.
        rate: samples per second that they have.
        target: samples per second that are wanted.

    Returns:
        (ceil(frames * target / rate),) float32.
    """
    wanted = -(-frames * target // rate)
    result = np.empty(wanted, np.float32)
    if rate == target:
        for start in range(0, frames, rate):
            result[start : start + rate] = read(start, min(start + rate, frames))
        return result
    margin_s = 0.5
    # Half a second must be whole at both rates; odd ones get margins of a second.
    if rate % 2 or target % 2:
        margin_s = 1.0
    margin, kept = int(rate * margin_s), int(target * margin_s)
    length, new = rate + 2 * margin, target + 2 * kept
    flank = _flank(length, new, length / rate, min(rate, target) / 2)
    for second in range(-(-frames // rate)):
        block = np.zeros(length)
        start = second * rate - margin
        low, high = max(start, 0), min(start + length, frames)
        block[low - start : high - start] = read(low, high)
        spectrum = np.fft.rfft(block)[: flank.size] * flank
        middle = np.fft.irfft(spectrum, new)[kept : kept + target] * (new / length)
        place = second * target
        result[place : place + target] = middle[: wanted - place]
    return result


def _flank(length: int, new: int, seconds: float, limit_hz: float) -> NDArray[np.float64]:
    """What is left of each frequency: (bins,), 1 below the limit, falling to 0 at it."""
    bins = min(length, new) // 2 + 1
    part = np.arange(bins) / seconds / limit_hz
    falling = 0.5 * (1.0 + np.cos(np.pi * (part - _PASS) / (1.0 - _PASS)))
    return np.where(part <= _PASS, 1.0, np.where(part >= 1.0, 0.0, falling))
