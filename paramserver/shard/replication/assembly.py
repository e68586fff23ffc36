"""Pieces of a line in their order, each byte once: the transport may lose, repeat, and let one overtake another."""

from __future__ import annotations

from collections.abc import Iterator

from paramserver.protocol.messages import Replicate

MOST_AHEAD = 16  # pieces that are kept until what they have overtaken is here; more are lost, and asked for again


class Assembly:
    """Of one line."""

    def __init__(self) -> None:
        self.received = 0
        """Bytes, without a gap."""
        self._ahead: dict[int, tuple[Replicate, bytes]] = {}  # by their place

    def go_back(self, at: int) -> None:
        """What came from this place on is not there: it must come again."""
        self.received = at
        self._ahead.clear()

    def take(self, piece: Replicate, frame: memoryview) -> Iterator[tuple[Replicate, memoryview]]:
        """Those that follow now what is here. `frame` is read during the iteration only."""
        if piece.at > self.received and len(self._ahead) < MOST_AHEAD:
            self._ahead[piece.at] = piece, bytes(frame)
        if piece.at != self.received:
            return
        self.received += len(frame)
        yield piece, frame
        while (ahead := self._ahead.pop(self.received, None)) is not None:
            self.received += len(ahead[1])
            yield ahead[0], memoryview(ahead[1])
        for at in [at for at in self._ahead if at < self.received]:
            del self._ahead[at]
