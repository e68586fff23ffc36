"""A step's gradients become frames here: what rounding lost stays in the residuals, and goes out with the next step.

Blocks whose encoding is `adaptive` are planned together: bits go where they save most, and a block may be held back
whole. All others are encoded one by one, as they are sent. A block whose gradient is on a device is encoded there, and
only its frame is copied to the host; what a device cannot encode takes the way through the host.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from paramserver.encoding import Encoding, make_encoding, on_torch
from paramserver.encoding.adaptive import DEFAULT_ERROR_LIMIT, Adaptive, BitPolicy, Part, Plan
from paramserver.encoding.layers import settling_encoding
from paramserver.process import log
from paramserver.protocol.buffers import BufferPool
from paramserver.protocol.layout import Layout
from paramserver.protocol.transport import Bytes, FrameMemory
from worker.replica import BlockGradients, why_on_host
from worker.residual import ResidualStore

Float32 = npt.NDArray[np.float32]

FULL_PRECISION = make_encoding("fp32")


class UpdateEncoder:
    """Encodes the updates of one worker. Used from one thread.

    Args:
        encodings: of every block (blocks,).
        error: for `adaptive`: the root of the share of the squares that may stay behind.
        devices: of the blocks whose gradients stay on one (`Replica.devices`). Where the encoding is none that a
            device can do, the block is encoded on the host: decided here, for good, and logged.
        error_limit: what may stay behind where bytes are limited.
        settling_updates: of the model, over which both grow to their size, and other encodings of 4 bits and less give
            way to int8.
    """

    def __init__(
        self,
        layout: Layout,
        encodings: Sequence[Encoding],
        pool: BufferPool,
        error: float,
        devices: Mapping[int, torch.device] | None = None,
        error_limit: float = DEFAULT_ERROR_LIMIT,
        settling_updates: int = 0,
    ) -> None:
        self._devices = _encoding_devices(layout, encodings, devices or {})
        self.residuals = ResidualStore(layout, self._devices)
        self._encodings = encodings
        self._settling = tuple(map(settling_encoding, encodings))  # of the first updates
        self._settling_updates = settling_updates
        self._is_settling = False
        self._pool = pool
        self._encoded = 0  # frames: the seed of the next one's rounding
        planned = {
            block.index: block.elements for block in layout.blocks if isinstance(encodings[block.index], Adaptive)
        }
        tile = next((encodings[block].tile for block in planned), 64)
        self._policy = (
            BitPolicy(planned, tile, error, error_limit, settling_updates=settling_updates) if planned else None
        )
        self._planned = planned.keys()
        self._plan: Plan | None = None

    def encoding(self, block: int) -> Encoding:
        """Of the step that is planned."""
        return (self._settling if self._is_settling else self._encodings)[block]

    def plan(self, gradients: BlockGradients, byte_limit: int | None = None, updates: int = 0) -> None:
        """Decide what this step sends. Call once a step, before its blocks are encoded.

        A block that sends nothing is held: its gradient is in its residual when this returns. `updates` is how many
        the model has seen, of all workers.
        """
        self._plan = None
        self._is_settling = updates < self._settling_updates
        if self._policy is None:
            return
        parts = {
            block: Part(gradients[block], self._residual_here(block)) for block in self._planned if block in gradients
        }
        self._plan = self._policy.plan(parts, byte_limit, updates)
        for block, part in parts.items():
            if block not in self._plan.levels:
                self._plan.hold(part)

    def sends(self, block: int) -> bool:
        """Whether the plan sends an update of this block; those that no plan is for always go."""
        return block not in self._planned or (self._plan is not None and block in self._plan.levels)

    def encode(self, block: int, gradients: BlockGradients, memory: FrameMemory | None) -> Bytes:
        """The frame of a block's gradient and residual, which keeps the rest: a buffer of the pool, in `memory`."""
        encoding = self.encoding(block)
        if block in self._planned:
            assert self._plan is not None  # `sends` said so
            values = gradients[block]
            frame = self._pool.take(self._plan.frame_bytes(block, values.size), memory)
            self._plan.encode(block, Part(values, self._residual_here(block)), frame)
            return frame
        self._encoded += 1
        # A lossless encoding needs a residual only where a refused update was taken back. It is where the block is
        # encoded, for the store has the same devices.
        residual = self.residuals.find(block) if encoding.lossless else self.residuals.of(block)
        if block in self._devices:
            encoded = on_torch.encode(encoding, gradients.on_device(block), cast("Tensor | None", residual))
            return self._fetch(encoded, memory)
        values = gradients[block]
        frame = self._pool.take(encoding.frame_bytes(values.size), memory)
        size = encoding.encode(values, frame, cast("Float32 | None", residual), seed=self._encoded)
        return self._pool.trim(frame, size)

    def encode_residual(self, block: int, memory: FrameMemory | None) -> Bytes:
        """The frame of a block's residual at full precision. The residual stays as it is."""
        residual = self.residuals.of(block)
        if isinstance(residual, Tensor):
            return self._fetch(on_torch.encode(FULL_PRECISION, residual), memory)
        return self.encode_whole(residual, memory)

    def encode_whole(self, values: Float32, memory: FrameMemory | None) -> Bytes:
        """The frame of values (elements,) at full precision."""
        frame = self._pool.take(FULL_PRECISION.frame_bytes(values.size), memory)
        FULL_PRECISION.encode(values, frame)
        return frame

    def _fetch(self, encoded: Tensor, memory: FrameMemory | None) -> Bytes:
        """A frame (bytes,) that a device has made, in a buffer of the pool. Waits for the device."""
        frame = self._pool.take(encoded.numel(), memory)
        torch.from_numpy(frame).copy_(encoded)
        return frame

    def _residual_here(self, block: int) -> Float32:
        """The residual of a block that is encoded on the host."""
        return cast("Float32", self.residuals.of(block))  # the store has the same devices


def _encoding_devices(
    layout: Layout, encodings: Sequence[Encoding], devices: Mapping[int, torch.device]
) -> dict[int, torch.device]:
    """Those of `devices` whose blocks are encoded there. What bars the others is one event in the log."""
    reasons = {block: why_on_host(encodings[block]) for block in devices}
    barred = [block for block, reason in reasons.items() if reason is not None]
    if barred:
        log(
            "pushed-through-host",
            parameters=_joined(layout.blocks[block].parameter for block in barred),
            device=_joined(str(devices[block]) for block in barred),
            reason=_joined(str(reasons[block]) for block in barred),
        )
    return {block: device for block, device in devices.items() if reasons[block] is None}


def _joined(words: Iterable[str]) -> str:
    """Each of them once, in their order."""
    return ", ".join(dict.fromkeys(words))
