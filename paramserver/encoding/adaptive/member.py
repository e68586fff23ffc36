"""adaptive: each segment of 2,048 elements in as many bits as it deserves, from none to eight.

Which segment deserves what is decided over all blocks of a worker: policy.py. `encode` alone decides within the
block that it is given. A frame has no fixed size.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from paramserver.encoding import frames
from paramserver.encoding.adaptive.constants import INT8, LEVELS, SEGMENT, SKIP, level_bytes, segments_of
from paramserver.encoding.adaptive.planning import choose
from paramserver.encoding.base import Bytes, Encoding, EncodingError, EncodingOptions, Float32, register

DEFAULT_ERROR = 0.6
DEFAULT_ERROR_LIMIT = 0.8  # where the wire is the bottleneck

Levels = npt.NDArray[np.uint8]
Losses = npt.NDArray[np.float64]


@register
class Adaptive(Encoding):
    """A byte a segment and what its level takes, with scales of `tile` elements. See adaptive/constants.py."""

    name: ClassVar[str] = "adaptive"
    kind: ClassVar[int] = 9
    lossless: ClassVar[bool] = False
    bits: ClassVar[float] = 1.6

    def __init__(self, options: EncodingOptions) -> None:
        if options.tile > SEGMENT:
            raise EncodingError("unknown-encoding", f"tile {options.tile} is more than adaptive takes: 8 to {SEGMENT}")
        super().__init__(options)

    @property
    def identifier(self) -> str:
        return f"{self.name}/{self.tile}"

    def frame_bytes(self, elements: int) -> int:
        whole, rest = divmod(elements, SEGMENT)
        codes = whole * level_bytes(INT8, SEGMENT, self.tile) + level_bytes(INT8, rest, self.tile)
        return segments_of(elements) + codes

    def encode(self, values: Float32, frame: Bytes, residual: Float32 | None = None, seed: int = 0) -> int:
        """As `Encoding.encode`, leaving at most DEFAULT_ERROR^2 of the sum of squares of values + residual."""
        if residual is None:
            residual = np.zeros(frames.input_values(values).size, np.float32)
        losses = self.losses(values, residual)
        counts = np.minimum(SEGMENT, values.size - SEGMENT * np.arange(len(losses)))
        lowest = np.full(len(losses), SKIP, np.uint8)
        budget = DEFAULT_ERROR**2 * float(losses[:, SKIP].sum())
        frames.output_frame(frame, self.frame_bytes(values.size))
        levels = choose(losses, counts, self.tile, lowest, budget).levels
        return self.encode_levels(levels, values, frame[: self.bytes_at(levels, values.size)], residual)

    def losses(self, values: Float32, residual: Float32) -> Losses:
        """What each level would leave of values + residual (n,), by segment: sums of squares (segments, LEVELS)."""
        from paramserver.encoding.adaptive import kernels

        values = frames.input_values(values)
        frames.expect_float32(residual, "residual", values.size)
        losses = np.zeros((segments_of(values.size), LEVELS), np.float64)
        kernels.measure(self.tile, values, residual, losses)
        return losses

    def bytes_at(self, levels: Levels, elements: int) -> int:
        """What a frame takes at these levels (segments,)."""
        if not len(levels):
            return 0
        histogram = np.bincount(levels[:-1], minlength=LEVELS)
        whole = sum(int(count) * level_bytes(level, SEGMENT, self.tile) for level, count in enumerate(histogram))
        return len(levels) + whole + level_bytes(int(levels[-1]), elements - SEGMENT * (len(levels) - 1), self.tile)

    def encode_levels(self, levels: Levels, values: Float32, frame: Bytes, residual: Float32) -> int:
        """As `Encoding.encode`, at the given levels (segments,), into a frame of `bytes_at` them; that many."""
        from paramserver.encoding.adaptive import kernels

        values = frames.input_values(values)
        frames.expect_float32(residual, "residual", values.size)
        if levels.shape != (segments_of(values.size),) or levels.max(initial=0) >= LEVELS:
            raise ValueError(f"levels of shape {levels.shape}: a block of {values.size} elements needs one a segment")
        frames.output_frame(frame, self.bytes_at(levels, values.size))
        taken: int = kernels.encode(self.tile, np.ascontiguousarray(levels, np.uint8), values, residual, frame)
        return taken

    def sized(self, frame: Bytes, elements: int) -> Bytes:
        from paramserver.encoding.adaptive import kernels

        checked, least = frames.readable(frame), segments_of(elements)
        what = f"a block of {elements} elements in {self.identifier}"
        if frame.size < least:
            raise EncodingError("wrong-size", f"a frame of {frame.size} bytes, but {what} takes at least {least}")
        size = int(kernels.frame_size(checked, elements, self.tile))
        if size < 0:
            raise EncodingError("corrupt-frame", f"a frame of {self.identifier} with a level above {LEVELS - 1}")
        return frames.sized(checked, size, elements, self.identifier)

    def decode(self, frame: Bytes, out: Float32) -> None:
        from paramserver.encoding.adaptive import kernels

        frames.expect_float32(out, "out")
        kernels.decode(self.tile, self.sized(frame, out.size), out, False)

    def decode_add(self, frame: Bytes, out: Float32) -> None:
        from paramserver.encoding.adaptive import kernels

        frames.expect_float32(out, "out")
        kernels.decode(self.tile, self.sized(frame, out.size), out, True)

    def check(self, frame: Bytes, elements: int) -> None:
        from paramserver.encoding.adaptive import kernels

        wrong_scales, wrong_codes = kernels.faults(self.tile, self.sized(frame, elements), elements)
        if wrong_scales:
            raise EncodingError("not-finite", f"a frame of {self.identifier} that holds NaN, infinity or an overflow")
        if wrong_codes:
            raise EncodingError("corrupt-frame", f"a frame of {self.identifier} with bytes that are no five trits")
