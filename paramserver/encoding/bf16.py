"""bf16: the upper half of a float32, rounded to nearest, half to even.

What would round up to infinity becomes the largest finite value, so that finite input gives a finite
frame. decode(frame) + new residual equals values + residual exactly.
"""

from __future__ import annotations

from typing import ClassVar

from paramserver.encoding.base import Bytes, Float32, register
from paramserver.encoding.member import CompiledEncoding


@register
class Bf16(CompiledEncoding):
    """2 bytes an element, no scales, 8 significant bits."""

    name: ClassVar[str] = "bf16"
    kind: ClassVar[int] = 1
    lossless: ClassVar[bool] = False
    bits: ClassVar[float] = 16

    def frame_bytes(self, elements: int) -> int:
        return 2 * elements

    def _encode(self, values: Float32, frame: Bytes, residual: Float32 | None, seed: int) -> None:
        from paramserver.encoding import kernels

        if residual is None:
            kernels.encode_bf16_plain(values, frame)
        else:
            kernels.encode_bf16(values, residual, frame)

    def encode_delta(self, weights: Float32, published: Float32, frame: Bytes, scratch: Float32) -> int:
        from paramserver.encoding import kernels

        kernels.delta_bf16(self._checked_delta(weights, published, frame), published, frame)
        return frame.size

    def _check(self, frame: Bytes, elements: int) -> None:
        from paramserver.encoding import kernels

        if kernels.largest_bits16(frame, elements) >= 0x7F80:
            raise self._not_finite()
