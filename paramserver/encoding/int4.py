"""int4: codes of -7 to 7 times one scale a tile, the tile's largest magnitude / 7 rounded up to a bfloat16.

decode(frame) + new residual equals values + residual exactly, with rounding to nearest.
"""

from __future__ import annotations

from typing import ClassVar

from paramserver.encoding.base import register
from paramserver.encoding.member import TiledEncoding


@register
class Int4(TiledEncoding):
    """Half a byte an element and 2 bytes a tile."""

    name: ClassVar[str] = "int4"
    kind: ClassVar[int] = 3
    lossless: ClassVar[bool] = False
    bits: ClassVar[float] = 4
    places: ClassVar[int] = 2
    has_stochastic_rounding: ClassVar[bool] = True
