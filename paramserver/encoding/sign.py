"""sign: codes of -1 and 1 times one scale a tile, the mean magnitude (Seide et al. 2014; arXiv 1901.09847).

Every element moves by the scale, whatever its size, so it needs a residual more than the others do; decode(frame) +
new residual equals values + residual within float32's rounding.
"""

from __future__ import annotations

from typing import ClassVar

from paramserver.encoding.base import register
from paramserver.encoding.member import TiledEncoding


@register
class Sign(TiledEncoding):
    """One bit an element and 2 bytes a tile."""

    name: ClassVar[str] = "sign"
    kind: ClassVar[int] = 7
    lossless: ClassVar[bool] = False
    bits: ClassVar[float] = 1
    places: ClassVar[int] = 8
