"""Files that travel in pieces over the control plane: one on its way at a time, the next when it is stored.

No I/O and no clock. A piece without an answer is sent again, and an answer may say less than the last one did: a
coordinator that came back begins where its file ends.
"""

from __future__ import annotations

from math import inf

PIECE_BYTES = 4 * 2**20
AGAIN_SECONDS = 2.0  # without an answer


class Upload:
    """Bytes that go out. Not for use by several threads at a time."""

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)
        self.stored = 0
        self._due_at = 0.0

    @property
    def total(self) -> int:
        return len(self._data)

    @property
    def is_complete(self) -> bool:
        return self.stored >= self.total

    @property
    def due_at(self) -> float:
        """When the next piece is due; infinite where nothing is left."""
        return inf if self.is_complete else self._due_at

    def due(self, now: float) -> tuple[int, memoryview] | None:
        """(offset, bytes) of the piece that is to be sent now, or None."""
        if now < self.due_at:
            return None
        self._due_at = now + AGAIN_SECONDS
        return self.stored, self._data[self.stored : self.stored + PIECE_BYTES]

    def heard(self, stored: int) -> None:
        """The answer: so many bytes are stored, from the start on."""
        if stored <= self.total:
            self.stored = stored
            self._due_at = 0.0


class Download:
    """Bytes that come in, asked for piece by piece."""

    def __init__(self) -> None:
        self.data = bytearray()
        self._total: int | None = None
        self._due_at = 0.0

    @property
    def is_complete(self) -> bool:
        return self._total is not None and len(self.data) >= self._total

    def due(self, now: float) -> int | None:
        """The offset to ask for now, or None."""
        if self.is_complete or now < self._due_at:
            return None
        self._due_at = now + AGAIN_SECONDS
        return len(self.data)

    def heard(self, offset: int, total: int, piece: memoryview) -> None:
        """An answer; one that was overtaken changes nothing."""
        if self.is_complete or offset != len(self.data) or offset + len(piece) > total:
            return
        self._total = total
        self.data += piece
        self._due_at = 0.0


class Incoming:
    """A file as its receiver sees it: how much of it is there."""

    def __init__(self) -> None:
        self.stored = 0
        self.total: int | None = None

    @property
    def is_complete(self) -> bool:
        return self.total is not None and self.stored == self.total

    def takes(self, offset: int, total: int, size: int) -> bool:
        """Whether this piece is the next one; then it counts as stored."""
        if self.total not in (None, total) or offset != self.stored or not 0 < size <= total - offset:
            return False
        self.total = total
        self.stored += size
        return True
