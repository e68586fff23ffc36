"""What will be done to a cluster, when, and to whom: declared before anything starts, and the same for the same seed.

No I/O and no clock. Faults are spread over the time evenly and moved a little, their order is shuffled; what is drawn
for one fault depends on the seed and the declaration only.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "kill-worker",
    "kill-shard",
    "kill-coordinator",
    "restart-coordinator",
    "stop-worker",
    "stop-shard",
    "stop-coordinator",
    "cut-worker-shard",
    "cut-worker-coordinator",
    "cut-shard-coordinator",
    "cut-shard-shard",
    "full-disk",
]

# How often each kind comes, beside the others of its group.
STALLING: Mapping[Kind, int] = {"kill-shard": 5, "stop-shard": 4, "full-disk": 3, "cut-shard-shard": 3}
"""No worker gets an answer of that shard while they last."""
OTHERS: Mapping[Kind, int] = {
    "kill-worker": 10,
    "stop-worker": 9,
    "cut-worker-shard": 8,
    "cut-worker-coordinator": 5,
    "cut-shard-coordinator": 5,
    "kill-coordinator": 4,
    "stop-coordinator": 4,
    "restart-coordinator": 3,
}

# Seconds that a fault lasts, shortest and longest. Where it is longer than a session the member is given up.
SECONDS: Mapping[Kind, tuple[float, float]] = {
    "stop-worker": (0.5, 5.0),
    "stop-shard": (0.5, 4.0),
    "stop-coordinator": (0.5, 5.0),
    # At least a second: two heartbeats, so that even a silent one keeps something back.
    "cut-worker-shard": (1.0, 4.0),
    "cut-worker-coordinator": (1.0, 5.0),
    "cut-shard-coordinator": (1.0, 2.0),
    "cut-shard-shard": (1.0, 3.0),
    "full-disk": (0.5, 2.5),
}

FIRST_SHARE, LAST_SHARE = 0.03, 0.93  # of the time, in which faults fire: none before training, none after it
JITTER = 0.3  # of the distance between two faults


class ScheduleError(ValueError):
    """A declaration that cannot be carried out. The text says why and what can."""


@dataclass(frozen=True)
class Planned:
    """One fault. `seconds` is how long it lasts, 0 for a death; a cut has a second end, `other`.

    `is_silent`: a cut drops what is sent, as a broken cable does, instead of closing connections.
    """

    number: int
    at_seconds: float  # after training began
    kind: Kind
    target: str
    other: str = ""
    seconds: float = 0.0
    is_silent: bool = False

    def __str__(self) -> str:
        ends = f"{self.target} | {self.other}" if self.other else self.target
        lasting = f" for {self.seconds:.1f} s" if self.seconds else ""
        return f"{self.kind} {ends}{lasting}{', silently' if self.is_silent else ''}"


@dataclass(frozen=True)
class Declaration:
    """What is asked for. `stalls` of the faults, at most, stall a shard."""

    seed: int
    seconds: float
    shards: int
    workers: int
    faults: int
    stalls: int
    has_backups: bool = False

    def __post_init__(self) -> None:
        for name in ("shards", "workers", "faults"):
            if getattr(self, name) < 1:
                raise ScheduleError(f"{name}: found {getattr(self, name)}, at least 1 is needed")
        if not 0 <= self.stalls <= self.faults:
            raise ScheduleError(f"stalls: found {self.stalls}, from 0 to the {self.faults} faults are allowed")

    def mix(self) -> dict[Kind, int]:
        """How many faults of each kind there are."""
        stalling = {kind: share for kind, share in STALLING.items() if kind != "cut-shard-shard" or self._has_links}
        counts = _apportion(stalling, self.stalls) | _apportion(OTHERS, self.faults - self.stalls)
        return {kind: count for kind, count in counts.items() if count}

    @property
    def _has_links(self) -> bool:
        """Whether shards talk to each other."""
        return self.has_backups and self.shards > 1


def make_schedule(declaration: Declaration) -> tuple[Planned, ...]:
    """The faults in the order of their times."""
    draw = random.Random(f"chaos {declaration.seed}")
    kinds = [kind for kind, count in declaration.mix().items() for _ in range(count)]
    draw.shuffle(kinds)
    first, last = FIRST_SHARE * declaration.seconds, LAST_SHARE * declaration.seconds
    distance = (last - first) / len(kinds)
    targets = _Targets(declaration, draw)
    planned = []
    for number, kind in enumerate(kinds):
        at = first + distance * (number + 0.5 + JITTER * draw.uniform(-1, 1))
        shortest, longest = SECONDS.get(kind, (0.0, 0.0))
        target, other = targets.of(kind)
        seconds = round(draw.uniform(shortest, longest), 2)
        is_silent = kind.startswith("cut-") and draw.random() < 0.5
        planned.append(Planned(number, round(at, 2), kind, target, other, seconds, is_silent))
    return tuple(planned)


class _Targets:
    """Who is hit: the members of a role in turn, in an order that is drawn anew each round."""

    def __init__(self, declaration: Declaration, draw: random.Random) -> None:
        self._draw = draw
        self._names = {
            "worker": [f"worker-{number}" for number in range(declaration.workers)],
            "shard": [f"shard-{number}" for number in range(declaration.shards)],
            "coordinator": ["coordinator"],
        }
        self._left: dict[tuple[str, str], list[str]] = {}

    def of(self, kind: Kind) -> tuple[str, str]:
        if kind == "full-disk":
            return self._next(kind, "shard"), ""
        verb, *roles = kind.split("-")
        ends = [self._next(f"{kind} {place}", role) for place, role in enumerate(roles)]
        if verb != "cut":
            return ends[0], ""
        if ends[0] == ends[1]:  # a shard has no link to itself
            ends[1] = self._draw.choice([name for name in self._names[roles[1]] if name != ends[0]])
        return ends[0], ends[1]

    def _next(self, purpose: str, role: str) -> str:
        left = self._left.setdefault((purpose, role), [])
        if not left:
            left += self._names[role]
            self._draw.shuffle(left)
        return left.pop()


def _apportion(shares: Mapping[Kind, int], total: int) -> dict[Kind, int]:
    """Whole numbers in proportion to the shares, by largest remainders; ties go to the one that comes first."""
    whole = sum(shares.values())
    exact = {kind: total * share / whole for kind, share in shares.items()}
    counts = {kind: int(value) for kind, value in exact.items()}
    by_remainder = sorted(exact, key=lambda kind: counts[kind] - exact[kind])
    for kind in by_remainder[: total - sum(counts.values())]:
        counts[kind] += 1
    return counts


def count_kinds(planned: Sequence[Planned]) -> dict[str, int]:
    return dict(Counter(fault.kind for fault in planned))
