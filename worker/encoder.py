"""A step's gradients become frames here: what rounding lost stays in the residuals, and goes out with the next step.

Blocks whose encoding is `adaptive` are planned together: bits go where they save most, and a block may be held back
whole. All others are encoded one by one, as they are sent.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from paramserver.encoding import Encoding, make_encoding
from paramserver.encoding.adaptive import Adaptive, BitPolicy, Part, Plan
from paramserver.protocol.buffers import BufferPool
from paramserver.protocol.layout import Layout
from paramserver.protocol.transport import Bytes, FrameMemory
from worker.replica import BlockGradients
from worker.residual import ResidualStore

Float32 = npt.NDArray[np.float32]

FULL_PRECISION = make_encoding("fp32")


class UpdateEncoder:
    """Encodes the updates of one worker. Used from one thread.

    Args:
        encodings: of every block (blocks,).
        error: for `adaptive`: the root of the share of the squares that may stay behind.
    """

    def __init__(self, layout: Layout, encodings: Sequence[Encoding], pool: BufferPool, error: float) -> None:
        self.residuals = ResidualStore(layout)
        self._encodings = encodings
        self._pool = pool
        self._encoded = 0  # frames: the seed of the next one's rounding
        planned = {
            block.index: block.elements for block in layout.blocks if isinstance(encodings[block.index], Adaptive)
        }
        tile = next((encodings[block].tile for block in planned), 64)
        self._policy = BitPolicy(planned, tile, error) if planned else None
        self._planned = planned.keys()
        self._plan: Plan | None = None

    def encoding(self, block: int) -> Encoding:
        return self._encodings[block]

    def plan(self, gradients: BlockGradients, byte_limit: int | None = None) -> None:
        """Decide what this step sends. Call once a step, before its blocks are encoded.

        A block that sends nothing is held: its gradient is in its residual when this returns.
        """
        self._plan = None
        if self._policy is None:
            return
        parts = {
            block: Part(gradients[block], self.residuals.of(block)) for block in self._planned if block in gradients
        }
        self._plan = self._policy.plan(parts, byte_limit)
        for block, part in parts.items():
            if block not in self._plan.levels:
                self._plan.hold(part)

    def sends(self, block: int) -> bool:
        """Whether the plan sends an update of this block; those that no plan is for always go."""
        return block not in self._planned or (self._plan is not None and block in self._plan.levels)

    def encode(self, block: int, values: Float32, memory: FrameMemory | None) -> Bytes:
        """The frame of values (elements,) and the block's residual, which keeps the rest: the pool's, in `memory`."""
        encoding = self._encodings[block]
        if block in self._planned:
            assert self._plan is not None  # `sends` said so
            frame = self._pool.take(self._plan.frame_bytes(block, values.size), memory)
            self._plan.encode(block, Part(values, self.residuals.of(block)), frame)
            return frame
        # A lossless encoding needs a residual only where a refused update was taken back.
        residual = self.residuals.find(block) if encoding.lossless else self.residuals.of(block)
        frame = self._pool.take(encoding.frame_bytes(values.size), memory)
        self._encoded += 1
        return self._pool.trim(frame, encoding.encode(values, frame, residual, seed=self._encoded))

    def encode_whole(self, values: Float32, memory: FrameMemory | None) -> Bytes:
        """The frame of values (elements,) at full precision."""
        frame = self._pool.take(FULL_PRECISION.frame_bytes(values.size), memory)
        FULL_PRECISION.encode(values, frame)
        return frame
