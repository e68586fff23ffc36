"""What the compiled members share: the checks of their arrays, and one decoder that switches on `kind`.

The kernels, and with them numba, are imported with the first frame: a command that only reads a job starts fast.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from paramserver.encoding import frames
from paramserver.encoding.base import Bytes, Encoding, EncodingError, EncodingOptions, Float32

if TYPE_CHECKING:
    from paramserver.encoding.compiled import Function

_NO_RESIDUAL = np.empty(0, np.float32)
MOST_SIZES = 4096  # elements of a block whose frame's size is remembered; a layout has a few


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
        frames.expect_float32(out, "out")
        self._decode_kernel(self.kind, self.tile, self.sized(frame, out.size), out, False)

    def decode_add(self, frame: Bytes, out: Float32) -> None:
        frames.expect_float32(out, "out")
        self._decode_kernel(self.kind, self.tile, self.sized(frame, out.size), out, True)

    @cached_property
    def _decode_kernel(self) -> Function:
        from paramserver.encoding import kernels

        return kernels.decode

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

    def __init__(self, options: EncodingOptions) -> None:
        super().__init__(options)
        self._identifier = f"{self.name}/{self.tile}"
        self._sizes: dict[int, int] = {}  # bytes of a frame, by elements

    @property
    def identifier(self) -> str:
        return self._identifier

    def frame_bytes(self, elements: int) -> int:
        size = self._sizes.get(elements)
        if size is None:
            runs, rest = divmod(elements, frames.RUN)
            size = 2 * self._tiles(elements) + runs * -(-frames.RUN // self.places) + -(-rest // self.places)
            if len(self._sizes) < MOST_SIZES:
                self._sizes[elements] = size
        return size

    def _tiles(self, elements: int) -> int:
        return -(-elements // self.tile)

    def _encode(self, values: Float32, frame: Bytes, residual: Float32 | None, seed: int) -> None:
        self._encode_kernel(self.tile, values, _NO_RESIDUAL if residual is None else residual, frame, seed % 2**63)

    def encode_delta(self, weights: Float32, published: Float32, frame: Bytes, scratch: Float32) -> int:
        if self.options.rounding == "stochastic":  # no job publishes so: its errors average out, but are larger
            return super().encode_delta(weights, published, frame, scratch)
        self._delta_kernel(self.tile, self._checked_delta(weights, published, frame), published, frame)
        return frame.size

    def _check(self, frame: Bytes, elements: int) -> None:
        if not self._scales_kernel(frame, 0, self._tiles(elements), self.has_signed_scales):
            raise self._not_finite()

    # Looked up once: a look at a module and a name made of two cost more than a kernel's call.

    @cached_property
    def _encode_kernel(self) -> Function:
        from paramserver.encoding.tiled import kernels

        suffix = "_stochastic" if self.options.rounding == "stochastic" else ""
        kernel: Function = getattr(kernels, f"encode_{self.name}{suffix}")
        return kernel

    @cached_property
    def _delta_kernel(self) -> Function:
        from paramserver.encoding.tiled import kernels

        kernel: Function = getattr(kernels, f"delta_{self.name}")
        return kernel

    @cached_property
    def _scales_kernel(self) -> Function:
        from paramserver.encoding.scales import kernels

        return kernels.are_scales


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
