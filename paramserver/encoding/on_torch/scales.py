"""The scales of tiles: docs/encodings.md, "Rounding, written out".

Every operation is a float32 or integer operation of its own, so that each device gives the same bits. No tensor
is divided by a Python number: on a GPU torch multiplies by the number's reciprocal instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paramserver.encoding.on_torch.packing import bits_of, float32_of

LANES = 64  # of a sum

MAGNITUDE = 0x7FFFFFFF
INFINITY = 0x7F800000  # magnitudes from here on are infinite or NaN
_SMALLEST = 0x00800000  # 2**-126
_LARGEST = 0x7B800000  # 2**120
_TAIL = 0xFFFF  # what bfloat16 has no room for


def of_largest(magnitudes: Tensor, limit: int) -> Tensor:
    """Largest magnitudes / limit as scales: rounded up to bfloat16, so that no code passes the limit."""
    bits = bits_of(magnitudes / torch.full_like(magnitudes, limit))
    return _held_in_range((bits + _TAIL) & ~_TAIL, magnitudes == 0)


def of_mean(means: Tensor) -> Tensor:
    """Mean magnitudes as scales: rounded to nearest, half to even."""
    return _held_in_range(nearest_upper_half(bits_of(means)), means == 0)


def nearest_upper_half(bits: Tensor) -> Tensor:
    """Bits of magnitudes rounded to bfloat16, half to even, their lower halves zero."""
    return (bits + (0x7FFF + (bits >> 16 & 1))) & ~_TAIL


def _held_in_range(bits: Tensor, is_zero: Tensor) -> Tensor:
    return float32_of(bits.clamp(_SMALLEST, _LARGEST).masked_fill(is_zero, 0))


def inverses(scales: Tensor) -> Tensor:
    """1 / scale, and 0 for 0."""
    return (torch.ones_like(scales) / scales).masked_fill(scales == 0, 0)


def means(tiles: Tensor, counts: Tensor) -> Tensor:
    """The means (t, 1) of tiles (t, tile) of magnitudes, by counts (t, 1): over lanes first, then halving."""
    count, tile = tiles.shape
    width = min(tile, LANES)
    lanes = tiles.view(count, tile // width, width)
    total = lanes[:, 0]
    for turn in range(1, tile // width):
        total = total + lanes[:, turn]
    while width > 1:
        width //= 2
        total = total[:, :width] + total[:, width:]
    return (total / counts).clamp(max=2.0**120)
