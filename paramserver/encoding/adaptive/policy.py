"""Which segments of a worker's step get how many bits: state and decision, apart from the encoding.

The error that may be left is measured against a moving average of what there was to send in a step, over all blocks:
a quiet step sends little, a loud one much. Where a thin wire grants a step fewer bytes, more is left, up to a bound.
The first updates of a model are sent finely: they shape what every later one is measured by, and a few coarse ones
cost more loss than all that come after. A segment that is skipped keeps everything in the residual, so it gets louder;
one that was skipped `longest_wait` times in turn goes out whatever it costs, or its residual could grow too old for the
weights that it was meant for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from paramserver.encoding.adaptive.constants import LEVELS, SEGMENT, SIGN, SKIP, segments_of
from paramserver.encoding.adaptive.member import DEFAULT_ERROR, DEFAULT_ERROR_LIMIT, Adaptive, Levels, Losses
from paramserver.encoding.adaptive.planning import choose
from paramserver.encoding.base import Bytes, EncodingOptions, Float32

LONGEST_WAIT = 16
MEMORY = 0.9  # of the moving average at the next step


class Part(NamedTuple):
    """A block's update to be: values (n,) and the residual (n,) that they are added to. Both C-contiguous."""

    values: Float32
    residual: Float32


@dataclass(frozen=True)
class Plan:
    """What one step sends. Blocks that are not in `levels` send nothing: `hold` keeps them for later.

    Encode or hold every block of the step once, with the arrays that were planned with, unchanged.
    """

    encoding: Adaptive
    levels: Mapping[int, Levels]
    total: float  # sum of squares of what there was to send
    left: float  # of what stays behind, as estimated
    wanted_bytes: int  # of the frames, had there been no byte limit

    def frame_bytes(self, block: int, elements: int) -> int:
        """What the block's frame takes."""
        return self.encoding.bytes_at(self.levels[block], elements)

    def encode(self, block: int, part: Part, frame: Bytes) -> int:
        """Encode a block into a frame of `frame_bytes`; the residual keeps the rest."""
        return self.encoding.encode_levels(self.levels[block], part.values, frame, part.residual)

    def hold(self, part: Part) -> None:
        """Keep all of a block in its residual."""
        np.add(part.residual, part.values, out=part.residual)


class BitPolicy:
    """A worker's choice of bits. Used from one thread; one an incarnation and job.

    Args:
        elements: of every block that is pushed by this policy.
        tile: of the scales.
        error: the root of the share of the squares that may stay behind.
        error_limit: the same where bytes are limited: that much may stay behind, and no more.
        longest_wait: so many times in turn a segment may be skipped; 0 never.
        settling_updates: of the model, over which what may stay behind grows from nothing to these bounds.
    """

    def __init__(
        self,
        elements: Mapping[int, int],
        tile: int,
        error: float = DEFAULT_ERROR,
        error_limit: float = DEFAULT_ERROR_LIMIT,
        longest_wait: int = LONGEST_WAIT,
        settling_updates: int = 0,
    ) -> None:
        if not 0 < error < 1:
            raise ValueError(f"error {error} is not between 0 and 1")
        if not error <= error_limit < 1:
            raise ValueError(f"error_limit {error_limit} is not between error {error} and 1")
        if longest_wait < 0:
            raise ValueError(f"longest_wait {longest_wait} is negative")
        self.encoding = Adaptive(EncodingOptions(tile=tile))
        self._error, self._error_limit = error, error_limit
        self._longest_wait = longest_wait
        self._settling_updates = settling_updates
        self._average: float | None = None
        self._skipped: dict[int, npt.NDArray[np.int64]] = {}
        first = 0
        for block, size in sorted(elements.items()):
            # Each begins at another count, so that those that nobody chooses do not all go out at once.
            places = np.arange(first, first + segments_of(size))
            self._skipped[block] = places % (longest_wait + 1)
            first += len(places)

    def plan(self, parts: Mapping[int, Part], byte_limit: int | None = None, updates: int = 0) -> Plan:
        """Decide what a step sends of these blocks; counts as one round for each of their segments.

        `updates` is how many the model has seen, of all workers.
        `byte_limit` is for all frames together. Beyond it go segments that have waited long enough, and as many bytes
        as it takes to leave no more than `error_limit` allows. Nothing is encoded yet, and no array changes. Values
        that are not finite are planned at int8, and are refused as ever.
        """
        blocks = sorted(parts)
        losses = [self.encoding.losses(*parts[block]) for block in blocks]
        found = np.concatenate(losses) if losses else np.zeros((0, LEVELS))
        counts = np.concatenate([_counts(parts[block].values.size) for block in blocks] or [np.zeros(0, np.int64)])
        skipped = np.concatenate([self._skipped[block] for block in blocks] or [np.zeros(0, np.int64)])
        energy = found[:, SKIP]
        lowest = np.where((skipped >= self._longest_wait) & (energy > 0), SIGN, SKIP).astype(np.uint8)
        total = float(energy[np.isfinite(energy)].sum())
        settled = min(1.0, (updates + 1) / self._settling_updates) if self._settling_updates else 1.0
        usual = settled**2 * self._follow(total)
        budget = self._error**2 * usual
        choice = choose(found, counts, self.encoding.tile, lowest, budget)
        wanted = choice.frame_bytes + _level_bytes(choice.levels, losses)
        if byte_limit is not None and wanted > byte_limit:
            # The level bytes are few; a block that goes out for the first segment of it pays for all of them.
            limit = max(0, byte_limit - len(found))
            most_left = self._error_limit**2 * usual
            choice = choose(found, counts, self.encoding.tile, lowest, budget, limit, most_left)
        chosen: dict[int, Levels] = {}
        first = 0
        for block, rows in zip(blocks, losses, strict=True):
            levels = choice.levels[first : first + len(rows)]
            is_waiting = (levels == SKIP) & (energy[first : first + len(rows)] > 0)
            self._skipped[block] = np.where(is_waiting, self._skipped[block] + 1, 0)
            if levels.any():
                chosen[block] = levels
            first += len(rows)
        return Plan(self.encoding, chosen, total, choice.left, wanted)

    def _follow(self, total: float) -> float:
        """The moving average, this step's total in it."""
        before = total if self._average is None else self._average
        self._average = MEMORY * before + (1 - MEMORY) * total
        return self._average


def _counts(elements: int) -> npt.NDArray[np.int64]:
    """How many elements each segment has."""
    return np.minimum(SEGMENT, elements - SEGMENT * np.arange(segments_of(elements)))


def _level_bytes(levels: Levels, losses: Sequence[Losses]) -> int:
    """A byte a segment of each block of which something is sent."""
    total, first = 0, 0
    for rows in losses:
        total += len(rows) if levels[first : first + len(rows)].any() else 0
        first += len(rows)
    return total
