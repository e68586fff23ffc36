"""topk: the `density` of the elements that is largest in magnitude, as int8 with their places; the others are zero.

Aji and Heafield 2017, arXiv 1704.05021. What is not sent stays in the residual, all of it. An offset takes 12 bits:
where an element lies in its run of 2,048.
"""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np

from paramserver.encoding import frames
from paramserver.encoding.base import Bytes, EncodingError, Float32, register
from paramserver.encoding.member import CompiledEncoding


@register
class TopK(CompiledEncoding):
    """20 bits a kept element, 2 bytes a tile of kept elements and 2 bytes a run. A frame tells how many it keeps."""

    name: ClassVar[str] = "topk"
    kind: ClassVar[int] = 8
    lossless: ClassVar[bool] = False
    bits: ClassVar[float] = 0.2  # an element, at the usual density of 1%

    @property
    def identifier(self) -> str:
        return f"{self.name}/{self.tile}"

    def kept(self, elements: int) -> int:
        """How many elements of a block this encoder keeps."""
        return min(elements, max(1, math.ceil(self.options.density * elements)))

    def frame_bytes(self, elements: int) -> int:
        """What the encoder's frames take; those of a peer with another density have another size."""
        return self._size(elements, self.kept(elements))

    def _size(self, elements: int, kept: int) -> int:
        return 2 * _runs(elements) + kept + -(-kept // 2) + 2 * -(-kept // self.tile) + kept

    def _encode(self, values: Float32, frame: Bytes, residual: Float32 | None, seed: int) -> None:
        from paramserver.encoding.sparse import kernels

        totals = np.zeros(values.size, np.float32) if residual is None else residual
        kernels.encode_topk(self.kept(values.size), self.tile, values, totals, frame)

    def sized(self, frame: Bytes, elements: int) -> Bytes:
        checked, counts_bytes = frames.readable(frame), 2 * _runs(elements)
        if frame.size < counts_bytes:
            what = f"a block of {elements} elements in {self.identifier}"
            raise EncodingError(
                "wrong-size", f"a frame of {frame.size} bytes, but {what} takes {counts_bytes} at least"
            )
        kept = _kept(checked, elements)
        return frames.sized(checked, self._size(elements, kept), elements, f"{self.identifier} that keeps {kept}")

    def _check(self, frame: Bytes, elements: int) -> None:
        from paramserver.encoding.scales import kernels as scales
        from paramserver.encoding.sparse import kernels

        kept = _kept(frame, elements)
        if (elements and not kept) or not kernels.are_places(frame, elements, kept):
            raise EncodingError(
                "corrupt-frame",
                f"a frame of {self.identifier} whose kept elements are none, not ascending, or outside their runs",
            )
        position = 2 * _runs(elements) + kept + -(-kept // 2)
        if not scales.are_scales(frame, position, -(-kept // self.tile), False):
            raise self._not_finite()


def _runs(elements: int) -> int:
    return -(-elements // frames.RUN)


def _kept(frame: Bytes, elements: int) -> int:
    """How many elements a frame says that it keeps."""
    return int(frame[: 2 * _runs(elements)].view("<u2").sum(dtype=np.int64))
