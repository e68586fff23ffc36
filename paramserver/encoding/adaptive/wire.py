"""How many bytes a step may push where the wire is what a worker waits for."""

from __future__ import annotations

import math


class WireLimit:
    """As many bytes as the wire carries while the step computes, or as come in anyway.

    The wire is taken to be as fast out as in, and to carry both ways at once: the larger of both tells its rate, and
    what goes out beside a larger pull costs no time. The rate is the best seen lately: an exchange may be slow for
    other reasons, but is never faster than the wire.
    """

    def __init__(self, remembered: int = 16) -> None:
        self._remembered = remembered
        self._rates: list[float] = []  # bytes a second, newest last
        self._pull_bytes = 0.0  # of an exchange, lately

    def observe(self, push_bytes: int, pull_bytes: int, exchange_seconds: float) -> None:
        """Take in one exchange: from its first byte sent to its last answer."""
        if exchange_seconds > 0:
            self._rates = [*self._rates, max(push_bytes, pull_bytes) / exchange_seconds][-self._remembered :]
            # A mean: by chance one exchange brings two deltas and the next one none.
            self._pull_bytes += (pull_bytes - self._pull_bytes) / min(len(self._rates), self._remembered // 2)

    def bytes(
        self, compute_seconds: float, lag_versions: float = 0.0, usual_lag_versions: float = math.inf
    ) -> int | None:
        """The limit for the next step, which computes for so long; None before any exchange was seen.

        `lag_versions` is how stale the worker's updates arrive; where that is more than usual, the limit is lower
        in the same proportion.
        """
        if not self._rates:
            return None
        allowed = max(max(self._rates) * compute_seconds, self._pull_bytes)
        is_late = lag_versions > usual_lag_versions
        return int(allowed * usual_lag_versions / lag_versions) if is_late else int(allowed)
