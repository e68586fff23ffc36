"""fp4: sign and E2M1 (0, 0.5, 1, 1.5, 2, 3, 4, 6) times one scale a tile, the tile's largest magnitude / 6 rounded up.

Finer than int4 near zero, coarser near a tile's largest magnitude. The element is that of the OCP Microscaling
formats, version 1.0; its scale is a bfloat16 as everywhere here, not the power of two of MXFP4.
decode(frame) + new residual equals values + residual exactly, with rounding to nearest.
"""

from __future__ import annotations

from typing import ClassVar

from paramserver.encoding.base import register
from paramserver.encoding.member import TiledEncoding


@register
class Fp4(TiledEncoding):
    """Half a byte an element and 2 bytes a tile."""

    name: ClassVar[str] = "fp4"
    kind: ClassVar[int] = 4
    lossless: ClassVar[bool] = False
    bits: ClassVar[float] = 4
    places: ClassVar[int] = 2
    has_stochastic_rounding: ClassVar[bool] = True
