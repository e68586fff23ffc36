"""Staleness, counted for every applied block update: exact up to 31 versions, in powers of two beyond."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Bucket i holds stalenesses from LOWER_EDGES[i] up to, not including, LOWER_EDGES[i + 1].
LOWER_EDGES: tuple[int, ...] = (*range(32), *(2**power for power in range(5, 21)))


def bucket_of(staleness: int) -> int:
    """The bucket of a staleness in versions; the last one is open."""
    if staleness < 32:
        return staleness
    return min(32 + staleness.bit_length() - 6, len(LOWER_EDGES) - 1)


class StalenessHistogram:
    """Counts of one worker at one group. `add` is on the shard's hot path."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts: list[int] = []
        self.total = 0

    def add(self, staleness: int) -> None:
        bucket = bucket_of(staleness)
        if bucket >= len(self.counts):
            self.counts.extend([0] * (bucket + 1 - len(self.counts)))
        self.counts[bucket] += 1
        self.total += staleness


@dataclass(frozen=True)
class StalenessSummary:
    """In versions. Percentiles and max are lower edges of their bucket, so exact below 32."""

    updates: int
    mean: float
    p50: int
    p95: int
    max: int
    histogram: dict[int, int]  # lower edge -> updates, empty buckets left out


def add_counts(rows: Sequence[Sequence[int]]) -> list[int]:
    """The sum of histograms of different lengths."""
    length = max((len(row) for row in rows), default=0)
    return [sum(row[i] for row in rows if i < len(row)) for i in range(length)]


def summarise(counts: Sequence[int], total: int) -> StalenessSummary:
    """Summary of bucket counts and of the sum of all stalenesses."""
    updates = sum(counts)
    filled = [bucket for bucket, count in enumerate(counts) if count]

    def percentile(share: float) -> int:
        seen = 0
        for bucket in filled:
            seen += counts[bucket]
            if seen >= share * updates:
                return LOWER_EDGES[bucket]
        return 0

    return StalenessSummary(
        updates=updates,
        mean=total / updates if updates else 0.0,
        p50=percentile(0.5),
        p95=percentile(0.95),
        max=LOWER_EDGES[filled[-1]] if filled else 0,
        histogram={LOWER_EDGES[bucket]: counts[bucket] for bucket in filled},
    )
