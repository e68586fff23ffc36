"""How a step is cut into messages: small enough that both ways work at once, large enough that heads cost little.

A fine cut holds one full block; on a fast link a coarse one spares each side's work for a message.
"""

from __future__ import annotations

from collections.abc import Sequence

from paramserver.encoding import Encoding
from paramserver.protocol.framing import CUT_BYTES, batches_by_bytes
from paramserver.protocol.layout import Block

FP32_BYTES = 4
COARSE = 4  # a coarse message holds so many full blocks at the most
LONGEST_MESSAGE_SECONDS = 0.01  # on the wire: longer ones leave the other way idle at a step's ends

Cuts = list[tuple[int, ...]]  # the blocks of each message


def cut(blocks: Sequence[Block], encodings: Sequence[Encoding], grain: int) -> Cuts:
    """Cut one shard's blocks into messages of at most `grain` full blocks at full precision, which an answer may have.

    `encodings` (all blocks of the layout,) are those of the pushes: a message of theirs is no larger than CUT_BYTES.
    """
    whole = [FP32_BYTES * block.elements for block in blocks]
    encoded = [encodings[block.index].frame_bytes(block.elements) for block in blocks]
    sizes = [max(size / grain, frame) for size, frame in zip(whole, encoded, strict=True)]
    return [tuple(blocks[position].index for position in part) for part in batches_by_bytes(map(int, sizes), CUT_BYTES)]


class Cutting:
    """The cuts of one shard's blocks."""

    def __init__(self, blocks: Sequence[Block], encodings: Sequence[Encoding]) -> None:
        self._fine, self._coarse = cut(blocks, encodings, 1), cut(blocks, encodings, COARSE)
        frame = {block.index: encodings[block.index].frame_bytes(block.elements) for block in blocks}
        self._coarse_bytes = max((sum(frame[index] for index in part) for part in self._coarse), default=0)

    def at(self, bytes_a_second: float) -> Cuts:
        """The cut for a link of this speed, as it was last seen; 0 where nobody knows."""
        return self._coarse if bytes_a_second * LONGEST_MESSAGE_SECONDS >= self._coarse_bytes else self._fine
