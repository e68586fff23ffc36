"""Choosing levels: the error that a byte saves decides, until the error is within its budget.

Where bytes are short, until they are spent; but there is a bound on the error that this may leave.
"""

from __future__ import annotations

from math import inf
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from paramserver.encoding.adaptive.constants import INT8, LEVELS, SKIP, level_bytes

Counts = npt.NDArray[np.int64]
Levels = npt.NDArray[np.uint8]
Losses = npt.NDArray[np.float64]


class Choice(NamedTuple):
    """Levels (segments,), the bytes that they take without level bytes, and the sum of squares that they leave."""

    levels: Levels
    frame_bytes: int
    left: float


def choose(
    losses: Losses,
    counts: Counts,
    tile: int,
    lowest: Levels,
    budget: float,
    byte_limit: int | None = None,
    most_left: float = inf,
) -> Choice:
    """The levels whose losses (segments, LEVELS) come down to `budget` in the fewest bytes, or as near as these allow.

    Greedy over the lower convex hulls of all segments, which is best but for the last step. `counts` (segments,) are
    elements. `lowest` (segments,) are levels that a segment gets in any case, whatever the bytes. No more than
    `most_left` (at least `budget`) is left, whatever the bytes. A segment whose loss is not finite gets int8: its
    frame will be refused, as that of any encoding.
    """
    from paramserver.encoding.adaptive import kernels

    is_finite = np.isfinite(losses[:, SKIP])
    levels = np.where(is_finite, lowest, INT8).astype(np.uint8)
    losses = np.where(is_finite[:, None], losses, 0.0)
    saved = np.zeros((len(losses), LEVELS - 1))
    cost, reached = np.zeros(saved.shape, np.int64), np.zeros(saved.shape, np.uint8)
    kernels.improve(losses, counts, tile, levels, saved, cost, reached)
    segments, steps = np.nonzero(saved)
    saved, cost, reached = saved[segments, steps], cost[segments, steps], reached[segments, steps]
    # Stable: equal segments are taken in their order, so that every machine finds the same levels.
    order = np.argsort(-saved / np.maximum(cost, 1), kind="stable")
    present = float(losses[np.arange(len(losses)), levels].sum())
    given = np.flatnonzero(levels)
    fixed = sum(level_bytes(int(levels[segment]), int(counts[segment]), tile) for segment in given)
    left = present - np.cumsum(saved[order])  # after each step
    spent = fixed + np.cumsum(cost[order])

    def steps_to(wanted: float) -> int:
        return 0 if present <= wanted else 1 + int(np.searchsorted(-left, -wanted))

    taken = steps_to(budget)
    if byte_limit is not None:
        taken = min(taken, max(steps_to(most_left), int(np.searchsorted(spent, byte_limit, side="right"))))
    taken = min(taken, order.size)
    # A segment's later steps come later in the order and lead to higher levels.
    np.maximum.at(levels, segments[order[:taken]], reached[order[:taken]])
    if not taken:
        return Choice(levels, fixed, present)
    return Choice(levels, int(spent[taken - 1]), max(0.0, float(left[taken - 1])))
