"""What the compiled members share: the checks of their arrays, and one decoder that switches on `kind`.

The kernels, and with them numba, are imported with the first frame: a command that only reads a job starts fast.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import numpy as np

from paramserver.encoding import frames
from paramserver.encoding.base import Bytes, Encoding, EncodingError, Float32

_NO_RESIDUAL = np.empty(0, np.float32)


class CompiledEncoding(Encoding):
    """A member whose work is done by compiled kernels. They release the GIL."""

    def encode(self, values: Float32, frame: Bytes, residual: Float32 | None = None, seed: int = 0) -> int:
        values = frames.input_values(values)
        frames.output_frame(frame, self.frame_bytes(values.size))
        if residual is not None:
            frames.expect_float32(residual, "residual", values.size)
        self._encode(values, frame, residual, seed)
        return frame.size

    @abstractmethod
    def _encode(self, values: Float32, frame: Bytes, residual: Float32 | None, seed: int) -> None:
        """`encode` of arrays that were checked; values are read-only."""

    def _checked_delta(self, weights: Float32, published: Float32, frame: Bytes) -> Float32:
        """The weights, read-only, when all three are what an `encode_delta` in one pass may get."""
        weights = frames.input_values(weights)
        frames.expect_float32(published, "published", weights.size)
        frames.output_frame(frame, self.frame_bytes(weights.size))
        return weights

    def sized(self, frame: Bytes, elements: int) -> Bytes:
        return frames.sized(frame, self.frame_bytes(elements), elements, self.identifier)

    def decode(self, frame: Bytes, out: Float32) -> None:
        from paramserver.encoding import kernels

        frames.expect_float32(out, "out")
        kernels.decode(self.kind, self.tile, self.sized(frame, out.size), out, False)

    def decode_add(self, frame: Bytes, out: Float32) -> None:
        from paramserver.encoding import kernels

        frames.expect_float32(out, "out")
        kernels.decode(self.kind, self.tile, self.sized(frame, out.size), out, True)

    def check(self, frame: Bytes, elements: int) -> None:
        self._check(self.sized(frame, elements), elements)

    @abstractmethod
    def _check(self, frame: Bytes, elements: int) -> None:
        """`check` of a frame that has the right size."""

    def _not_finite(self) -> EncodingError:
        return EncodingError("not-finite", f"a frame of {self.identifier} that holds NaN, infinity or an overflow")


class TiledEncoding(CompiledEncoding):
    """A member with a scale for each tile and a code for each element: encoding/tiled has its kernels.

    Those are called encode_NAME, delta_NAME, and encode_NAME_stochastic where there is stochastic rounding.
    """

    places: ClassVar[int]  # codes a byte
    has_signed_scales: ClassVar[bool] = False

    @property
    def identifier(self) -> str:
        return f"{self.name}/{self.tile}"

    def frame_bytes(self, elements: int) -> int:
        runs, rest = divmod(elements, frames.RUN)
        codes = runs * -(-frames.RUN // self.places) + -(-rest // self.places)
        return 2 * self._tiles(elements) + codes

    def _tiles(self, elements: int) -> int:
        return -(-elements // self.tile)

    def _encode(self, values: Float32, frame: Bytes, residual: Float32 | None, seed: int) -> None:
        from paramserver.encoding.tiled import kernels

        suffix = "_stochastic" if self.options.rounding == "stochastic" else ""
        kernel = getattr(kernels, f"encode_{self.name}{suffix}")
        kernel(self.tile, values, _NO_RESIDUAL if residual is None else residual, frame, seed % 2**63)

    def encode_delta(self, weights: Float32, published: Float32, frame: Bytes, scratch: Float32) -> int:
        from paramserver.encoding.tiled import kernels

        if self.options.rounding == "stochastic":  # no job publishes so: its errors average out, but are larger
            return super().encode_delta(weights, published, frame, scratch)
        weights = self._checked_delta(weights, published, frame)
        getattr(kernels, f"delta_{self.name}")(self.tile, weights, published, frame)
        return frame.size

    def _check(self, frame: Bytes, elements: int) -> None:
        from paramserver.encoding.scales import kernels

        if not kernels.are_scales(frame, 0, self._tiles(elements), self.has_signed_scales):
            raise self._not_finite()


def warm_up(encoding: Encoding, of_deltas: bool = False) -> None:
    """Compile, or load from the disk cache, all that the encoding needs: the first frame then pays nothing.

    `of_deltas`: whoever encodes publishes deltas, and nothing else.
    """
    values, residual, out = np.zeros(3, np.float32), np.zeros(3, np.float32), np.zeros(3, np.float32)
    frame = np.empty(encoding.frame_bytes(3), np.uint8)
    if of_deltas:
        frame = frame[: encoding.encode_delta(values, out, frame, residual)]
    else:
        encoding.encode(values, frame)
        frame = frame[: encoding.encode(values, frame, residual)]
    encoding.check(frames.readable(frame), 3)
    encoding.decode(frame, out)
    encoding.decode_add(frame, out)
