"""Publishing without error feedback: the product never does it, and what it costs is one of the questions."""

from __future__ import annotations

import numpy as np

from paramserver.encoding.base import Float32
from paramserver.encoding.coded import Coded
from paramserver.shard.block import HeldBlock
from paramserver.shard.publishing import PublishedBlock, PublishedDeltas


class ForgetfulDeltas(PublishedDeltas):
    """A delta is of what the weights moved since the last edition, not of what the replica lacks: rounding adds up."""

    def begin(self, block: HeldBlock) -> None:
        if block.index not in self._replicas:
            self._before: dict[int, Float32] = getattr(self, "_before", {})
            self._before[block.index] = block.weights.copy()
        super().begin(block)

    def _publish(self, block: HeldBlock, replica: PublishedBlock, is_last: bool = False) -> None:
        encoding, before = self._encodings[block.index], self._before[block.index]
        assert not isinstance(encoding, Coded)  # its step is chosen from what the replica lacks
        frame = np.empty(encoding.frame_bytes(block.elements), np.uint8)
        written = encoding.encode(block.weights - before, frame)
        encoding.decode_add(frame[:written], replica.values)
        replica.append(frame[:written].copy(), block.version, log_limit=4 * block.elements)
        before[:] = block.weights
