"""ternary: codes of -1, 0, 1 times one scale a tile, the mean of the magnitudes beyond 3/4 of the mean magnitude.

Li and Liu 2016, arXiv 1605.04711, eq. 6, with 0.75 for 0.7; codes are rounded to the nearest, which for normal values
draws the line between 0 and 1 at the same place. Five codes a byte.
"""

from __future__ import annotations

from typing import ClassVar

from paramserver.encoding.base import Bytes, EncodingError, register
from paramserver.encoding.member import TiledEncoding

_BYTES = 3**5


@register
class Ternary(TiledEncoding):
    """A fifth of a byte an element and 2 bytes a tile."""

    name: ClassVar[str] = "ternary"
    kind: ClassVar[int] = 6
    lossless: ClassVar[bool] = False
    bits: ClassVar[float] = 1.6
    places: ClassVar[int] = 5

    def _check(self, frame: Bytes, elements: int) -> None:
        from paramserver.encoding.packing import kernels

        super()._check(frame, elements)
        largest = int(kernels.largest_byte(frame, 2 * self._tiles(elements)))
        if largest >= _BYTES:
            raise EncodingError(
                "corrupt-frame", f"a byte {largest} in a frame of {self.identifier}, allowed are 0..242"
            )
