"""int2: codes of -2, -1, 0, 1 times one scale a tile: the value of largest magnitude / -2, so that it gets the code -2.

All four codes are used, since the scale carries a sign; a value of the other sign reaches half of the largest magnitude
at most, and the rest of it stays in the residual.
"""

from __future__ import annotations

from typing import ClassVar

from paramserver.encoding.base import register
from paramserver.encoding.member import TiledEncoding


@register
class Int2(TiledEncoding):
    """A quarter of a byte an element and 2 bytes a tile."""

    name: ClassVar[str] = "int2"
    kind: ClassVar[int] = 5
    lossless: ClassVar[bool] = False
    bits: ClassVar[float] = 2
    places: ClassVar[int] = 4
    has_signed_scales: ClassVar[bool] = True
    has_stochastic_rounding: ClassVar[bool] = True
