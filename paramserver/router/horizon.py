"""How many leases a worker may keep: a horizon of work at its own speed, but never more than its fair share.

The horizon lets training go on while the coordinator is away. The share makes all workers end together: near
the end nobody sits on a heap while others idle.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

LEASE_HORIZON_SECONDS = 60.0
FIRST_LEASES = 2  # before a worker's speed is known: one to work on, one to go on with
_MEMORY_SECONDS = 10.0  # how fast an older measurement fades


class Speed:
    """A worker's speed in leases a second, as a fading mean over the time in which it held leases."""

    def __init__(self) -> None:
        self._leases = 0.0
        self._seconds = 0.0
        self._at: float | None = None

    @property
    def leases_a_second(self) -> float | None:
        """None until a lease was done."""
        return self._leases / self._seconds if self._leases and self._seconds else None

    def observe(self, done: int, is_holding: bool, now: float) -> None:
        """So many leases were done since the last call; `is_holding`: the worker has more to do."""
        if self._at is not None:
            elapsed = max(0.0, now - self._at)
            fade = math.exp(-elapsed / _MEMORY_SECONDS)
            self._leases = self._leases * fade + done
            self._seconds = self._seconds * fade + elapsed
        self._at = now if is_holding else None


def fair_hold(
    worker: str,
    left: int,
    speeds: Mapping[str, float | None],
    horizon_seconds: float = LEASE_HORIZON_SECONDS,
) -> int:
    """How many leases `worker` may hold when `left` are not done. `speeds` has an entry for every worker.

    At least 1, at least 2 while there are two for everybody, at most `horizon_seconds` of work.
    """
    known = [speed for speed in speeds.values() if speed]
    guess = sum(known) / len(known) if known else 1.0
    total = sum(speed or guess for speed in speeds.values())
    own = speeds[worker]
    share = math.ceil(left * (own or guess) / total)
    least = 2 if left >= 2 * len(speeds) else 1
    wish = FIRST_LEASES if own is None else max(FIRST_LEASES, math.ceil(own * horizon_seconds))
    return min(wish, max(least, share))
