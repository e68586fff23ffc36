"""What a tile's scale is and what is stored for an element, for each tiled encoding: docs/encodings.md.

All of them see a block as tiles (t, tile), the last one filled up with zeros, and one scale a tile (t, 1).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from paramserver.encoding.on_torch import scales as scaling


class Member(ABC):
    """One tiled encoding: `places` codes a byte, each below `base`; `filler` is the stored code of zero."""

    places: ClassVar[int]
    base: ClassVar[int]
    filler: ClassVar[int]

    @abstractmethod
    def scales(self, tiles: Tensor, largest: Tensor, counts: Tensor) -> Tensor:
        """The scale (t, 1) of each tile, of its largest magnitude (t, 1) and its number of real elements (t, 1)."""

    @abstractmethod
    def store(self, tiles: Tensor, scales: Tensor) -> Tensor:
        """The stored codes (t, tile) uint8."""

    @abstractmethod
    def levels(self, stored: Tensor) -> Tensor:
        """Stored codes of any shape as float32: what a scale is multiplied by."""


class Integer(Member):
    """Codes of `low` to `high`, stored with `filler` added."""

    low: ClassVar[int]
    high: ClassVar[int]

    def store(self, tiles: Tensor, scales: Tensor) -> Tensor:
        return (self._codes(tiles, scales) + self.filler).to(torch.uint8)

    def levels(self, stored: Tensor) -> Tensor:
        return (stored.to(torch.int32) - self.filler).to(torch.float32)

    def _codes(self, tiles: Tensor, scales: Tensor) -> Tensor:
        """Value x (1 / scale), rounded half to even, held in [low, high]: int32."""
        return (tiles * scaling.inverses(scales)).round_().clamp_(self.low, self.high).to(torch.int32)


class Int8(Integer):
    """-127..127 in two's complement times largest magnitude / 127."""

    places, base, filler = 1, 256, 0
    low, high = -127, 127

    def scales(self, tiles: Tensor, largest: Tensor, counts: Tensor) -> Tensor:
        return scaling.of_largest(largest, 127)

    def store(self, tiles: Tensor, scales: Tensor) -> Tensor:
        return self._codes(tiles, scales).to(torch.int8).view(torch.uint8)

    def levels(self, stored: Tensor) -> Tensor:
        return stored.view(torch.int8).to(torch.float32)


class Int4(Integer):
    """-7..7 times largest magnitude / 7."""

    places, base, filler = 2, 16, 8
    low, high = -7, 7

    def scales(self, tiles: Tensor, largest: Tensor, counts: Tensor) -> Tensor:
        return scaling.of_largest(largest, 7)


class Int2(Integer):
    """-2..1 times the value of largest magnitude / -2; of two with different signs the positive one counts."""

    places, base, filler = 4, 4, 2
    low, high = -2, 1

    def scales(self, tiles: Tensor, largest: Tensor, counts: Tensor) -> Tensor:
        scales = scaling.of_largest(largest, 2)
        is_positive = (tiles.amax(dim=1, keepdim=True) == largest) & (largest > 0)
        return torch.where(is_positive, -scales, scales)


class Ternary(Integer):
    """-1..1 times the mean magnitude of the values beyond 3/4 of the mean magnitude."""

    places, base, filler = 5, 3, 1
    low, high = -1, 1

    def scales(self, tiles: Tensor, largest: Tensor, counts: Tensor) -> Tensor:
        magnitudes = tiles.abs()
        is_large = magnitudes > scaling.means(magnitudes, counts) * 0.75
        number = is_large.sum(dim=1, keepdim=True).clamp(min=1).to(torch.float32)  # none in a tile of zeros
        return scaling.of_mean(scaling.means(magnitudes.masked_fill(~is_large, 0), number))


class Sign(Member):
    """The sign, one bit, times the mean magnitude."""

    places, base, filler = 8, 2, 0

    def scales(self, tiles: Tensor, largest: Tensor, counts: Tensor) -> Tensor:
        return scaling.of_mean(scaling.means(tiles.abs(), counts))

    def store(self, tiles: Tensor, scales: Tensor) -> Tensor:
        return (tiles < 0).to(torch.uint8)

    def levels(self, stored: Tensor) -> Tensor:
        return 1 - 2 * stored.to(torch.float32)


class Fp4(Member):
    """Sign and E2M1: the magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6 times largest magnitude / 6."""

    places, base, filler = 2, 16, 0

    def scales(self, tiles: Tensor, largest: Tensor, counts: Tensor) -> Tensor:
        return scaling.of_largest(largest, 6)

    def store(self, tiles: Tensor, scales: Tensor) -> Tensor:
        scaled = tiles * scaling.inverses(scales)
        magnitude = scaled.abs()
        # Half-way goes to the even code, so every second bound belongs to the code above it.
        code = (magnitude > 0.25).to(torch.uint8)
        for bound in (1.25, 2.5, 5.0):
            code += magnitude > bound
        for bound in (0.75, 1.75, 3.5):
            code += magnitude >= bound
        return code + 8 * ((scaled < 0) & (code > 0)).to(torch.uint8)

    def levels(self, stored: Tensor) -> Tensor:
        code = stored.to(torch.int32)
        magnitude = code & 7
        # From code 2 on: (2 + last bit) << (exponent - 1), counted in halves.
        halves = torch.where(magnitude < 2, magnitude, (2 + (code & 1)) << ((magnitude >> 1) - 1).clamp(min=0))
        return torch.where(code < 8, halves, -halves).to(torch.float32) * 0.5


MEMBERS: dict[str, Member] = {
    "int8": Int8(),
    "int4": Int4(),
    "fp4": Fp4(),
    "int2": Int2(),
    "ternary": Ternary(),
    "sign": Sign(),
}
