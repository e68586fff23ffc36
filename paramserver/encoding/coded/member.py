"""coded: codes of one common step, written in as many bits as their surprise is worth (range coding).

For deltas whose elements differ much in size: most codes are zero and cost a fraction of a bit. The step stands in the
frame; who publishes a shard's deltas gives all blocks the same one, and then bits go where the change is.
A frame has no fixed size. Sources: docs/encodings.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt

from paramserver.encoding.base import Bytes, Encoding, EncodingError, Float32, register
from paramserver.encoding.coded.constants import SEGMENT, STATES
from paramserver.encoding.frames import expect_float32, input_values, output_frame, readable

if TYPE_CHECKING:
    from paramserver.encoding.coded.tables import Tables

STEP_BYTES = 2
RELATIVE_STEP = 2.0  # step / root mean square of what is encoded
DEAD_ZONE = 0.5  # in steps: magnitudes up to here are coded as zero

_SMALLEST_STEP_BITS, _LARGEST_STEP_BITS = 0x0080, 0x7B80  # 2^-126 to 2^120
_NOT_FINITE_BITS = 0x7FC0


def round_step(step: float) -> float:
    """The step that a frame can hold: bfloat16, at least 2^-126 and at most 2^120. Zero where it is zero or less."""
    if not step > 0:
        return 0.0
    step = min(max(step, 2.0**-126), 2.0**120)
    fraction, exponent = math.frexp(step)
    return math.ldexp(round(fraction * 256), exponent - 8)


@register
class Coded(Encoding):
    """About 1.3 bits an element with a step of twice the root mean square; at most a byte an element."""

    name: ClassVar[str] = "coded"
    kind: ClassVar[int] = 10
    lossless: ClassVar[bool] = False
    bits: ClassVar[float] = 1.3
    is_checked_by_decoding: ClassVar[bool] = True
    is_fused: ClassVar[bool] = False

    def frame_bytes(self, elements: int) -> int:
        return STEP_BYTES + _segments(elements) + 4 * STATES + -(-elements // STATES) * STATES

    def encode(self, values: Float32, frame: Bytes, residual: Float32 | None = None, seed: int = 0) -> int:
        """As `Encoding.encode`, with a step of twice the root mean square of values + residual.

        One pass more over memory than `encode_with_step`.
        """
        from paramserver.encoding.coded import kernels

        values = input_values(values)
        other = np.zeros(values.size, np.float32) if residual is None else -residual
        mean = kernels.sum_of_squares(values, input_values(other)) / max(1, values.size)
        return self.encode_with_step(values, frame, residual, round_step(RELATIVE_STEP * math.sqrt(mean)))[0]

    def encode_with_step(
        self, values: Float32, frame: Bytes, residual: Float32 | None, step: float
    ) -> tuple[int, float]:
        """The same with a step of `round_step`: (bytes of the frame, sum of squares of values + residual).

        With a step of zero all stays in the residual.
        """
        from paramserver.encoding.coded import kernels

        values = input_values(values)
        if residual is None:
            residual = np.zeros(values.size, np.float32)
        expect_float32(residual, "residual", values.size)
        return self._encode(values, residual, frame, step, kernels.quantise)

    def publish(self, weights: Float32, published: Float32, frame: Bytes, step: float) -> tuple[int, float]:
        """Encode weights - published (n,), and let `published` become what every replica becomes by this frame.

        (bytes of the frame, sum of squares of the delta). `published` is changed in place, bit for bit as
        `decode_add` of the frame changes it; what the frame does not hold stays in the difference.
        """
        from paramserver.encoding.coded import kernels

        weights = input_values(weights)
        expect_float32(published, "published", weights.size)
        return self._encode(weights, published, frame, step, kernels.quantise_delta)

    def sized(self, frame: Bytes, elements: int) -> Bytes:
        least, most = STEP_BYTES + _segments(elements), self.frame_bytes(elements)
        if not least <= frame.size <= most:
            raise EncodingError(
                "wrong-size",
                f"a frame of {frame.size} bytes, but a block of {elements} elements in {self.identifier} takes "
                f"{least} to {most}",
            )
        return readable(frame)

    def decode(self, frame: Bytes, out: Float32) -> None:
        """As `Encoding.decode`, but the frame need not be checked before: raises EncodingError, `out` unchanged."""
        from paramserver.encoding.coded import kernels

        expect_float32(out, "out")
        codes, step = self._decoded(frame, out.size)
        kernels.spread_codes(codes, step, out)

    def decode_add(self, frame: Bytes, out: Float32) -> None:
        """As `Encoding.decode_add`, but the frame need not be checked before: raises EncodingError, `out` unchanged."""
        from paramserver.encoding.coded import kernels

        expect_float32(out, "out")
        codes, step = self._decoded(frame, out.size)
        kernels.add_codes(codes, step, out)

    def check(self, frame: Bytes, elements: int) -> None:
        """Decodes the frame to see whether it is whole; `decode` and `decode_add` do so by themselves."""
        self._decoded(frame, elements)

    def _encode(
        self, values: Float32, lost: Float32, frame: Bytes, step: float, quantise: Callable[..., float]
    ) -> tuple[int, float]:
        elements = values.size
        output_frame(frame, self.frame_bytes(elements))
        if step != round_step(step):
            raise ValueError(f"step {step} is none that a frame can hold; use round_step")
        codes = np.empty(elements, np.int8)
        squares = quantise(values, lost, np.float32(step), np.float32(DEAD_ZONE), codes)
        if not math.isfinite(squares):
            frame[:STEP_BYTES].view("<u2")[0] = _NOT_FINITE_BITS  # for `check` to find
            frame[STEP_BYTES : STEP_BYTES + _segments(elements)] = 0
            return STEP_BYTES + _segments(elements), squares
        frame[:STEP_BYTES] = np.array([step], "<f4").view(np.uint8)[2:]
        return self._write(codes, frame), squares

    def _write(self, codes: npt.NDArray[np.int8], frame: Bytes) -> int:
        from paramserver.encoding.coded import kernels

        tables = _tables()
        words = np.empty(2 * SEGMENT * _segments(codes.size) + 1, np.uint16)
        chosen = (tables.marks, tables.inverses, (tables.share_limits, tables.excess_limits, tables.spread_limits))
        taken: int = kernels.code(codes, codes.size, chosen, False, words, frame, STEP_BYTES)
        if taken < 0:
            # The classes fit so badly that a byte an element is less.
            taken = kernels.code(codes, codes.size, chosen, True, words, frame, STEP_BYTES)
        return taken

    def _decoded(self, frame: Bytes, elements: int) -> tuple[npt.NDArray[np.int8], np.float32]:
        """Codes (n,) and step of a frame from anywhere. Raises EncodingError."""
        from paramserver.encoding.coded import kernels

        frame = self.sized(frame, elements)
        bits = int(frame[0]) | int(frame[1]) << 8
        is_zero = bits == 0 and not frame[STEP_BYTES:].any()
        if not (is_zero or _SMALLEST_STEP_BITS <= bits <= _LARGEST_STEP_BITS):
            raise EncodingError("not-finite", f"a frame of {self.identifier} whose step has the bits {bits:#06x}")
        codes = np.empty(elements, np.int8)
        if not kernels.decode(frame, STEP_BYTES, elements, _tables().slots, codes):
            raise EncodingError(
                "corrupt-frame",
                f"a frame of {self.identifier} of {frame.size} bytes whose symbols do not end where its bytes do",
            )
        return codes, np.array([bits << 16], np.uint32).view(np.float32)[0]


def _segments(elements: int) -> int:
    return -(-elements // SEGMENT)


def _tables() -> Tables:
    # Made with the first frame: a command that only reads a job needs none.
    from paramserver.encoding.coded.tables import tables

    return tables()
