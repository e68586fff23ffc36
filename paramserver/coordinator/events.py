"""What happened to a job, in order and in words: the last of it, for people."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

MOST_EVENTS = 200  # kept; what came before them is only counted


class Events:
    """Args:
    stored: what `rows` of an earlier coordinator returned.
    forgotten: events before those.
    """

    def __init__(self, stored: Iterable[Mapping[str, Any]] = (), forgotten: int = 0) -> None:
        self._rows: deque[dict[str, Any]] = deque((dict(row) for row in stored), maxlen=MOST_EVENTS)
        self.forgotten = forgotten

    def note(self, seconds: float, text: str) -> None:
        """`seconds` since the job's turn came."""
        self.forgotten += len(self._rows) == MOST_EVENTS
        self._rows.append({"seconds": round(seconds, 3), "text": text})

    def rows(self) -> list[dict[str, Any]]:
        """The oldest first."""
        return [dict(row) for row in self._rows]
