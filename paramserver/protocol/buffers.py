"""Buffers of frames, used again: large fresh ones pay a page fault every 4 KiB.

A buffer is free only when its update is answered *and* the transport has let go of it. Where the receiver
shares memory with us, the buffer is a piece of that.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from paramserver.protocol.transport import Bytes, FrameMemory, Sending

MAX_LINGERING = 256
PLACED_BYTES = 4 * 2**10  # smaller frames are copied when they are sent, which is cheaper than keeping book of them


class BufferPool:
    """Frame buffers by size. Used from one thread."""

    def __init__(self) -> None:
        self._free: defaultdict[int, list[Bytes]] = defaultdict(list)
        self._lingering: list[tuple[list[Bytes], list[Sending]]] = []
        self._placed: dict[int, tuple[Bytes, FrameMemory]] = {}  # by the buffer's id
        self._trimmed: dict[int, tuple[Bytes, Bytes]] = {}  # by the view's id: the view and its whole buffer

    def take(self, size: int, memory: FrameMemory | None = None) -> Bytes:
        """A buffer (size,) with whatever content, in `memory` where it has room; the caller owns it until `give`."""
        if memory is not None and size >= PLACED_BYTES and (placed := memory.place(size)) is not None:
            self._placed[id(placed)] = placed, memory
            return placed
        if self._lingering and not self._free[size]:
            self._sweep()
        free = self._free[size]
        return free.pop() if free else np.empty(size, np.uint8)

    def trim(self, buffer: Bytes, size: int) -> Bytes:
        """The first `size` bytes of a buffer that was taken: send this view, and give it back in the buffer's place."""
        if size == buffer.size:
            return buffer
        view = buffer[:size]
        self._trimmed[id(view)] = view, buffer
        return view

    def give(self, buffers: Iterable[Bytes], sendings: Iterable[Sending]) -> None:
        """Give answered buffers back; they are handed out again once every sending is done."""
        waiting = [sending for sending in sendings if not sending.done]
        if waiting:
            self._lingering.append((list(buffers), waiting))
            # The transport keeps what it still reads alive, so forgetting a buffer is always safe.
            del self._lingering[:-MAX_LINGERING]
        else:
            for given in buffers:
                _, buffer = self._trimmed.pop(id(given), (given, given))
                if self._placed and (found := self._placed.pop(id(buffer), None)) is not None:
                    found[1].free(buffer)
                else:
                    self._free[buffer.size].append(buffer)

    def _sweep(self) -> None:
        lingering, self._lingering = self._lingering, []
        for buffers, sendings in lingering:
            self.give(buffers, sendings)
