"""A block as its shard holds it: weights, optimiser state, version, watermarks."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from paramserver.encoding import aligned_zeros
from paramserver.encoding.base import Bytes, Encoding, Float32
from paramserver.protocol.buffers import BufferPool
from paramserver.protocol.layout import Block
from paramserver.protocol.transport import FrameMemory
from paramserver.shard.journal.states import Arrays, BlockState
from paramserver.shard.watermarks import Watermarks

if TYPE_CHECKING:
    from paramserver.shard.optimizers import Optimizer


class HeldBlock:
    """One block on its shard. `version` counts applied updates; with fresh pulls it is also the edition.

    The arrays are owned by the shard's one thread and change in place.
    """

    __slots__ = ("_first_values", "elements", "group", "index", "marks", "state", "version", "weights")

    def __init__(self, block: Block, optimizer: Optimizer) -> None:
        self.index = block.index
        self.elements = block.elements
        self.group = block.group
        self.weights: Float32 = aligned_zeros(block.elements)  # (elements,)
        self.state = optimizer.state(block.elements)  # `slots` arrays of (elements,)
        self.version = 0
        self.marks = Watermarks()
        self._first_values = b""

    @property
    def is_initialised(self) -> bool:
        return bool(self._first_values)

    def initialise(self, values: Bytes) -> bool:
        """Take the first values; False where other ones were taken before. Idempotent by a hash of the bytes."""
        digest = hashlib.blake2b(values.data, digest_size=16).digest()
        if self._first_values:
            return digest == self._first_values
        self.weights[:] = values.view(np.float32) if values.ctypes.data % 4 == 0 else values.copy().view(np.float32)
        self._first_values = digest
        return True

    def kept(self, arrays: Arrays) -> BlockState:
        """What a restart needs; the arrays themselves, not copies, are added to `arrays`."""
        arrays[f"{self.index}.weights"] = self.weights
        for slot, values in enumerate(self.state):
            arrays[f"{self.index}.state{slot}"] = values
        return BlockState(self.index, self.version, self.marks.as_dict(), self._first_values.hex())

    def restore(self, state: BlockState, arrays: Arrays) -> None:
        """Become what was kept; arrays are copied."""
        self.weights[:] = arrays[f"{self.index}.weights"]
        for slot, values in enumerate(self.state):
            values[:] = arrays[f"{self.index}.state{slot}"]
        self.version, self.marks = state.version, Watermarks(state.marks)
        self._first_values = bytes.fromhex(state.first_values)

    def snapshot(self, encoding: Encoding, pool: BufferPool, memory: FrameMemory | None = None) -> Bytes:
        """The weights as they are now, encoded into a buffer of the pool; give it back when it is sent.

        The copy is needed: a transport still reads the buffer while the next update changes the weights.
        """
        frame = pool.take(encoding.frame_bytes(self.elements), memory)
        encoding.encode(self.weights, frame)
        return frame
