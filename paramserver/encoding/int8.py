"""int8: codes of -127 to 127 times one scale a tile, the tile's largest magnitude / 127.

The scale is rounded up to 12 mantissa bits, so that no code passes 127 and code x scale is exact in
float32; decode(frame) + new residual then equals values + residual exactly. A tile of zeros has scale 0.
A scale is at least 2**-126: smaller parts of a value stay in the residual. It is at most (2 - 2**-11) * 2**120,
and only there are codes clamped, which leaves the rest of values near the end of float32's range in the residual.
"""

from __future__ import annotations

from typing import ClassVar

from paramserver.encoding.base import Bytes, Float32, register
from paramserver.encoding.member import CompiledEncoding


@register
class Int8(CompiledEncoding):
    """One byte an element and 4 bytes a tile."""

    name: ClassVar[str] = "int8"
    kind: ClassVar[int] = 2
    lossless: ClassVar[bool] = False
    bits: ClassVar[float] = 8

    @property
    def identifier(self) -> str:
        return f"{self.name}/{self.tile}"

    def frame_bytes(self, elements: int) -> int:
        return 4 * self._tiles(elements) + elements

    def _tiles(self, elements: int) -> int:
        return -(-elements // self.tile)

    def _encode(self, values: Float32, frame: Bytes, residual: Float32) -> None:
        from paramserver.encoding import kernels

        kernels.encode_int8(self.tile, values, residual, frame)

    def _is_finite(self, frame: Bytes, elements: int) -> bool:
        from paramserver.encoding import kernels

        # Codes are finite by nature; above this limit a scale times -128 would not be.
        return bool(kernels.largest_bits32(frame, self._tiles(elements)) <= kernels.LARGEST_SCALE_BITS)
