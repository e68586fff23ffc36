"""The one step of a shard's published deltas, and what it follows.

All blocks share it: a block that moves little costs little, one that moves much gets its change through. It follows
the root mean square of the deltas, smoothed, over the elements of all blocks. A pure function of the deltas that
were published, so a replayed journal finds the same steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from paramserver.encoding.base import Bytes, EncodingOptions, Float32
from paramserver.encoding.coded.member import RELATIVE_STEP, Coded, round_step
from paramserver.encoding.frames import input_values

MEMORY = 0.5  # of the mean square of a block's deltas at its next delta
FINER = 16  # times as fine is the step of a last delta: the usual one leaves up to half a step, which here is 8 codes


class Moved(NamedTuple):
    """How much a block moves: elements, and the smoothed sum of squares of its deltas."""

    elements: int
    squares: float


class StepPolicy:
    """Used from the thread that publishes. One a shard and job.

    Args:
        relative: the step over the root mean square of the deltas.
        state: of an earlier policy, to go on from.
    """

    def __init__(self, relative: float = RELATIVE_STEP, state: Mapping[int, Moved] | None = None) -> None:
        if not (math.isfinite(relative) and relative > 0):
            raise ValueError(f"relative step {relative} is not a positive number")
        self._relative = relative
        self._coded = Coded(EncodingOptions())
        self._moved = dict(state or {})

    def publish(self, block: int, weights: Float32, published: Float32, frame: Bytes, is_last: bool = False) -> int:
        """Encode a block's delta into `frame` (frame_bytes(n),) and move `published`; the bytes that it takes.

        See `Coded.publish`. A block's first delta, and one after all stood still, is measured before it
        is encoded, others while they are. `is_last`: no delta will follow that could bring what this one leaves, so it
        is FINER, and is no measure of those that do.
        """
        step = self.step()
        if step == 0.0 or block not in self._moved:
            from paramserver.encoding.coded import kernels

            self._follow(block, weights.size, kernels.sum_of_squares(input_values(weights), input_values(published)))
            step = self.step()
        if is_last:
            return self._coded.publish(weights, published, frame, round_step(step / FINER))[0]
        taken, squares = self._coded.publish(weights, published, frame, step)
        self._follow(block, weights.size, squares)
        return taken

    def _follow(self, block: int, elements: int, squares: float) -> None:
        if math.isfinite(squares):  # else the frame is one that every worker refuses, and the job fails
            before = self._moved.get(block, Moved(elements, squares))
            self._moved[block] = Moved(elements, MEMORY * before.squares + (1 - MEMORY) * squares)

    def step(self) -> float:
        """The present step; zero while nothing has moved."""
        elements = sum(moved.elements for moved in self._moved.values())
        squares = math.fsum(moved.squares for moved in self._moved.values())
        return round_step(self._relative * math.sqrt(squares / elements)) if elements else 0.0

    def forget(self, block: int) -> None:
        """A block that is placed elsewhere now."""
        self._moved.pop(block, None)

    def state(self) -> dict[int, Moved]:
        """What a snapshot must hold for the steps to go on as they would."""
        return dict(self._moved)


def warm_up() -> None:
    """Compile, or load from the disk cache, all that publishing calls; `encoding.warm_up` does so for the rest."""
    weights, frame = np.ones(3, np.float32), np.empty(Coded(EncodingOptions()).frame_bytes(3), np.uint8)
    StepPolicy().publish(0, weights, np.zeros(3, np.float32), frame)
