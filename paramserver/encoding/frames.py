"""What every member checks of its arrays before compiled code, which trusts sizes and types, gets them.

A wrong array here is the caller's fault and raises TypeError or ValueError; a wrong frame is the peer's
and raises EncodingError.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np

from paramserver.encoding.base import Bytes, EncodingError, Float32

_Array = TypeVar("_Array", Bytes, Float32)

RUN = 2048  # elements whose codes are packed together; encoding/memory/kernels.py has the same


_FLOAT32, _BYTE = np.dtype(np.float32), np.dtype(np.uint8)


def readable(frame: Bytes) -> Bytes:
    """A read-only view: kernels are compiled for read-only frames alone, so that there is one variant of each."""
    # A frame of a transport is read-only already, and looking is all that a call should cost beside a small block.
    if _is_read_only(frame, _BYTE):
        return frame
    _expect(frame, _BYTE, "frame")
    return _read_only(frame)


def sized(frame: Bytes, size: int, elements: int, identifier: str) -> Bytes:
    """The same for the frame of a block, which must have `size` bytes. Raises EncodingError("wrong-size")."""
    if frame.size != size:
        what = f"a block of {elements} elements in {identifier}"
        raise EncodingError("wrong-size", f"a frame of {frame.size} bytes, but {what} takes {size}")
    return readable(frame)


def expect_float32(array: Float32, name: str, size: int | None = None) -> None:
    """Raise unless the array is flat, C-contiguous, writable float32 (of `size` elements, where given)."""
    # Right arrays are the rule: what is wrong with others is looked for afterwards.
    flags_are_right = array.dtype is _FLOAT32 and array.ndim == 1 and array.flags.carray
    if flags_are_right and (size is None or array.size == size):
        return
    _expect(array, _FLOAT32, name)
    if size is not None and array.size != size:
        raise ValueError(f"{name} has {array.size} elements, it must have {size}")
    if not array.flags.writeable:
        raise ValueError(f"{name} is read-only; hand in a writable array")


def input_values(values: Float32) -> Float32:
    """Values to encode, as the one variant that kernels are compiled for: read-only, C-contiguous, aligned."""
    if _is_read_only(values, _FLOAT32):
        return values
    _expect(values, _FLOAT32, "values")
    return _read_only(values)


def output_frame(frame: Bytes, size: int) -> None:
    """Raise unless the frame is a writable uint8 array of `size` bytes."""
    if frame.dtype is _BYTE and frame.ndim == 1 and frame.size == size and frame.flags.carray:
        return
    _expect(frame, _BYTE, "frame")
    if frame.size != size or not frame.flags.writeable:
        state = "writable" if frame.flags.writeable else "read-only"
        raise ValueError(f"frame is {state} and has {frame.size} bytes; it must be writable and have {size}")


def _is_read_only(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]], dtype: np.dtype[np.generic]) -> bool:
    """Whether a kernel may get it as it is; False also for what is wrong with it."""
    if array.dtype is not dtype or array.ndim != 1:
        return False
    flags = array.flags
    return not flags.writeable and flags.c_contiguous and flags.aligned


def _read_only(array: _Array) -> _Array:
    if not array.flags.writeable:
        return array
    view = array.view()
    view.flags.writeable = False
    return view


def _expect(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]], dtype: np.dtype[np.generic], name: str) -> None:
    flags = array.flags
    if array.dtype != dtype or array.ndim != 1 or not flags.c_contiguous or not flags.aligned:
        raise TypeError(
            f"{name} is {array.dtype} of shape {array.shape} (contiguous: {flags.c_contiguous}, aligned: "
            f"{flags.aligned}); it must be a flat, contiguous, aligned {dtype} array"
        )
