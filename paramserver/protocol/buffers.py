"""Buffers of frames, used again: large fresh ones pay a page fault every 4 KiB.

A buffer is free only when its update is answered *and* the transport has let go of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from paramserver.protocol.transport import Sending

Bytes = npt.NDArray[np.uint8]

MAX_LINGERING = 256


class BufferPool:
    """Frame buffers by size. Used from one thread."""

    def __init__(self) -> None:
        self._free: defaultdict[int, list[Bytes]] = defaultdict(list)
        self._lingering: list[tuple[list[Bytes], list[Sending]]] = []

    def take(self, size: int) -> Bytes:
        """A buffer (size,) with whatever content; the caller owns it until `give`."""
        if self._lingering and not self._free[size]:
            self._sweep()
        free = self._free[size]
        return free.pop() if free else np.empty(size, np.uint8)

    def give(self, buffers: Iterable[Bytes], sendings: Iterable[Sending]) -> None:
        """Give answered buffers back; they are handed out again once every sending is done."""
        waiting = [sending for sending in sendings if not sending.done]
        if waiting:
            self._lingering.append((list(buffers), waiting))
            # The transport keeps what it still reads alive, so forgetting a buffer is always safe.
            del self._lingering[:-MAX_LINGERING]
        else:
            for buffer in buffers:
                self._free[buffer.size].append(buffer)

    def _sweep(self) -> None:
        lingering, self._lingering = self._lingering, []
        for buffers, sendings in lingering:
            self.give(buffers, sendings)
