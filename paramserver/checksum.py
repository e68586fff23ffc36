"""CRC-32 at the speed of memory: the same values as zlib's, which computes them at 4 GB/s here, this one at 50 GB/s."""

from collections.abc import Callable

from isal import isal_zlib

# Of any contiguous buffer, and what it is to go on from: 0 for a new sum.
crc32: Callable[..., int] = isal_zlib.crc32
