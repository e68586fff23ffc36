"""int8: codes of -127 to 127 times one scale a tile, the tile's largest magnitude / 127 rounded up to a bfloat16.

decode(frame) + new residual equals values + residual exactly, with rounding to nearest. Only where a scale is at its
upper limit of 2**120 are codes clamped, which leaves the rest of values near float32's largest in the residual.
"""

from __future__ import annotations

from typing import ClassVar

from paramserver.encoding.base import register
from paramserver.encoding.member import TiledEncoding


@register
class Int8(TiledEncoding):
    """One byte an element and 2 bytes a tile."""

    name: ClassVar[str] = "int8"
    kind: ClassVar[int] = 2
    lossless: ClassVar[bool] = False
    bits: ClassVar[float] = 8
    places: ClassVar[int] = 1
    has_stochastic_rounding: ClassVar[bool] = True
