"""fp32: the float32 values themselves, little-endian. Lossless: a residual is spent and left at zero."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from paramserver.encoding.base import Bytes, Float32, register
from paramserver.encoding.member import CompiledEncoding


@register
class Fp32(CompiledEncoding):
    """4 bytes an element, no scales. decode gives values + residual as float32 adds them."""

    name: ClassVar[str] = "fp32"
    kind: ClassVar[int] = 0
    lossless: ClassVar[bool] = True
    bits: ClassVar[float] = 32

    def frame_bytes(self, elements: int) -> int:
        return 4 * elements

    def _encode(self, values: Float32, frame: Bytes, residual: Float32 | None, seed: int) -> None:
        from paramserver.encoding import kernels

        if residual is None:
            frame[:] = values.view(np.uint8)
        else:
            kernels.encode_fp32(values, residual, frame)

    def encode_delta(self, weights: Float32, published: Float32, frame: Bytes, scratch: Float32) -> int:
        from paramserver.encoding import kernels

        kernels.delta_fp32(self._checked_delta(weights, published, frame), published, frame)
        return frame.size

    def _check(self, frame: Bytes, elements: int) -> None:
        from paramserver.encoding import kernels

        if kernels.largest_bits32(frame, elements) >= 0x7F800000:
            raise self._not_finite()
