"""What fp32, bf16 and int8 share: the checks of their arrays, and one compiled decoder that switches on `kind`.

The kernels, and with them numba, are imported with the first frame: a command that only reads a job starts fast.
"""

from __future__ import annotations

from abc import abstractmethod

import numpy as np

from paramserver.encoding.base import Bytes, Encoding, EncodingError, Float32
from paramserver.encoding.frames import expect_float32, input_values, output_frame, readable, sized


class CompiledEncoding(Encoding):
    """A member whose work is done by paramserver.encoding.kernels. They release the GIL."""

    def encode(self, values: Float32, frame: Bytes, residual: Float32 | None = None, seed: int = 0) -> int:
        values = input_values(values)
        output_frame(frame, self.frame_bytes(values.size))
        if residual is None:
            self._encode_plain(values, frame)
        else:
            expect_float32(residual, "residual", values.size)
            self._encode(values, frame, residual)
        return frame.size

    @abstractmethod
    def _encode(self, values: Float32, frame: Bytes, residual: Float32) -> None:
        """`encode` of arrays that were checked; values are read-only."""

    def _encode_plain(self, values: Float32, frame: Bytes) -> None:
        """The same without a residual."""
        self._encode(values, frame, np.zeros(values.size, np.float32))

    def decode(self, frame: Bytes, out: Float32) -> None:
        from paramserver.encoding import kernels

        expect_float32(out, "out")
        checked = sized(frame, self.frame_bytes(out.size), self._takes(out.size))
        kernels.decode(self.kind, self.tile, checked, out)

    def decode_add(self, frame: Bytes, out: Float32) -> None:
        from paramserver.encoding import kernels

        expect_float32(out, "out")
        checked = sized(frame, self.frame_bytes(out.size), self._takes(out.size))
        kernels.decode_add(self.kind, self.tile, checked, out)

    def check(self, frame: Bytes, elements: int) -> None:
        checked = sized(frame, self.frame_bytes(elements), self._takes(elements))
        if not self._is_finite(checked, elements):
            raise EncodingError("not-finite", f"a frame of {self.identifier} that holds NaN, infinity or an overflow")

    @abstractmethod
    def _is_finite(self, frame: Bytes, elements: int) -> bool:
        """Whether every value of the frame, which has the right size, decodes to a finite float32."""

    def _takes(self, elements: int) -> str:
        return f"a block of {elements} elements in {self.identifier}"


def warm_up(encoding: Encoding) -> None:
    """Compile, or load from the disk cache, all that the encoding needs: the first frame then pays nothing."""
    values, residual, out = np.zeros(3, np.float32), np.zeros(3, np.float32), np.empty(3, np.float32)
    frame = np.empty(encoding.frame_bytes(3), np.uint8)
    encoding.encode(values, frame)
    encoding.encode(values, frame, residual)
    encoding.check(readable(frame), 3)
    encoding.decode(frame, out)
    encoding.decode_add(frame, out)
