"""Float32 arrays that kernels pass over fast: their elements begin where vectors load and store whole cache lines.

numpy's own large arrays begin 16 bytes after a page: every vector of 64 bytes then lies on two lines, which costs
decode + momentum a third of its time. And arrays that are worked on together had better not begin at the same
place of a page, because loads and stores whose addresses agree in their low 12 bits wait for each other.
"""

from __future__ import annotations

import numpy as np

from paramserver.encoding.base import Float32

_LINE_BYTES = 64
_PAGE_BYTES = 4096
_APART_BYTES = 20 * _LINE_BYTES  # no whole fraction of a page


def aligned_zeros(elements: int, place: int = 0) -> Float32:
    """Zeros (elements,), owned by the caller. Arrays that one kernel works on get a `place` each: 0, 1, 2."""
    bytes_ = 4 * elements
    buffer = np.zeros(bytes_ + _PAGE_BYTES, np.uint8)
    first = (place * _APART_BYTES - buffer.ctypes.data) % _PAGE_BYTES
    return buffer[first : first + bytes_].view(np.float32)
