"""Patience with peers that send what no honest process does: each has a little, and is ignored for a while after.

A leaky bucket a peer. No I/O, no clock; memory for MOST_PEERS, of which the oldest are forgotten first.
"""

from __future__ import annotations

from paramserver.protocol.messages import RefusalCode

BURST = 200  # refusals that a peer may earn at once ...
REFUSALS_A_SECOND = 20.0  # ... and how fast they are forgiven
IGNORE_SECONDS = 10.0
MOST_PEERS = 4096

# What a process of ours never earns by being late, early, or a stranger to a process that was restarted.
HOSTILE: frozenset[RefusalCode] = frozenset({"malformed", "not-served", "wrong-version", "wrong-key"})

Who = bytes  # a connection, or a key where keys are used: it cannot begin anew by reconnecting


class Patience:
    """Call from one thread only; `now` in monotonic seconds."""

    def __init__(self) -> None:
        self._levels: dict[Who, tuple[float, float]] = {}  # refusals that are not forgiven, and when that was so
        self._ignored: dict[Who, float] = {}  # until when

    def wears_out(self, who: Who, now: float) -> bool:
        """Note a hostile message; True where it was the last straw: the peer is ignored from now on."""
        level, at = self._levels.pop(who, (0.0, now))
        level = max(0.0, level - (now - at) * REFUSALS_A_SECOND) + 1.0
        if level < BURST:
            self._levels[who] = level, now
            _forget_oldest(self._levels)
            return False
        self._ignored[who] = now + IGNORE_SECONDS
        _forget_oldest(self._ignored)
        return True

    def is_ignored(self, who: Who, now: float) -> bool:
        if not self._ignored or (until := self._ignored.get(who)) is None:
            return False
        if now < until:
            return True
        del self._ignored[who]
        return False

    def __bool__(self) -> bool:
        """Whether anybody is ignored: where not, nobody need be asked about."""
        return bool(self._ignored)


def _forget_oldest(peers: dict[Who, tuple[float, float]] | dict[Who, float]) -> None:
    if len(peers) > MOST_PEERS:
        del peers[next(iter(peers))]
