"""How long exchanges take beside computation, and how late updates arrive: what the bytes of a step follow."""

from __future__ import annotations

from math import inf

from paramserver.encoding.adaptive import WireLimit
from worker.counters import Counters

MEMORY = 0.9  # of the version lag of late; the usual lag forgets ten times as slowly
LATE = 2.0  # times the usual lag: from there on updates arrive late
SEEN_SECONDS = 1e-3  # an exchange that was waited for no longer may have ended at any time before
CONVINCING = 3  # exchanges, before they are found to be slow
REMEMBERED = 8  # exchanges that means are over: by chance one brings two deltas, and the next one none


class Mean:
    """Of the last values, the older ones less and less."""

    def __init__(self) -> None:
        self.value = 0.0
        self.count = 0

    def add(self, value: float) -> None:
        self.count += 1
        self.value += (value - self.value) / min(self.count, REMEMBERED)


class Pace:
    """Watches one exchange after another. Used from one thread, with the exchange's own clock."""

    def __init__(self, blocks: int) -> None:
        self._wire = WireLimit()
        self._speed = 0.0
        self._began: float | None = None  # of the exchange under way
        self._computing_seconds = inf
        self._bytes = 0, 0  # pushed and pulled when it began
        self._seconds, self._computing, self._pushed, self._pulled = Mean(), Mean(), Mean(), Mean()
        self._is_slow = self._is_pull_slow = False
        self._versions = [0] * blocks  # after the worker's last update of each block
        self._lag = self._usual_lag = 0.0  # updates of others between two of its own

    @property
    def bytes_a_second(self) -> float:
        """Both ways together, over the last exchange that was seen to its end; 0 before."""
        return self._speed

    @property
    def is_pull_slow(self) -> bool:
        """Whether exchanges take longer than the computation, and for what they bring rather than what they push."""
        return self._is_pull_slow

    @property
    def updates(self) -> int:
        """How many updates the model had seen, of all workers, when one of this worker was applied last."""
        return int(max(self._versions))

    def byte_limit(self, computing_seconds: float) -> int | None:
        """What the next step may push, in bytes; None where the wire is no bottleneck."""
        late = LATE * self._usual_lag if self._usual_lag else inf
        # A short exchange tells how long an answer takes, not what the wire could carry.
        if computing_seconds == inf or not (self._is_slow or self._lag > late):
            return None
        return self._wire.bytes(computing_seconds, self._lag, late)

    def begin(self, now: float, counters: Counters, computing_seconds: float) -> None:
        """An exchange begins."""
        self._began, self._computing_seconds = now, computing_seconds
        self._bytes = counters.push_bytes, counters.pull_bytes

    def end(self, now: float, counters: Counters, waited_seconds: float) -> None:
        """Everything of it is answered, after the last wait for it took so long."""
        if self._began is None:
            return
        seconds = now - self._began
        pushed, pulled = counters.push_bytes - self._bytes[0], counters.pull_bytes - self._bytes[1]
        is_seen = waited_seconds >= SEEN_SECONDS
        if is_seen:
            self._wire.observe(pushed, pulled, seconds)
            self._speed = (pushed + pulled) / max(seconds, SEEN_SECONDS)
        if is_seen or 2 * seconds < self._computing_seconds < inf:
            self._judge(seconds, pushed, pulled)
        self._began = None

    def _judge(self, seconds: float, pushed: int, pulled: int) -> None:
        """Find exchanges slow, or no longer so.

        What is slow gets half as much to carry at the least, so it is over where twice that would be quick.
        """
        if self._computing_seconds == inf:
            return
        self._seconds.add(seconds)
        self._computing.add(self._computing_seconds)
        self._pushed.add(pushed)
        self._pulled.add(pulled)
        if self._seconds.count < CONVINCING:
            return
        is_long = self._seconds.value > self._computing.value
        is_short = 2 * self._seconds.value < self._computing.value
        self._is_slow = not is_short if self._is_slow else is_long
        if self._is_pull_slow:
            self._is_pull_slow = not is_short and 2 * self._pulled.value >= self._pushed.value
        else:
            self._is_pull_slow = is_long and self._pulled.value > self._pushed.value

    def saw_version(self, block: int, version: int) -> None:
        """An update of the block was applied as its `version`."""
        before = self._versions[block]
        self._versions[block] = version
        if before:
            lag = float(max(0, version - before - 1))
            self._lag += (1 - MEMORY) * (lag - self._lag)
            self._usual_lag += (1 - MEMORY) / 10 * (lag - self._usual_lag)
