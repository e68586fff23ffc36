"""The interface of a low-resolution encoding, and the register of the family.

An encoding turns n float32 values into one frame of bytes and back. It is stateless: the residual
(what rounding lost, error feedback) is kept by whoever encodes and handed in. One file a member.

Wire size, in bytes, is `frame_bytes(n)`; a frame is [float32 scales, one a tile] + [codes].
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from paramserver.protocol.messages import RefusalCode

Float32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

DEFAULT_TILE = 64


class EncodingError(ValueError):
    """A frame that is no encoding of the block. `code` is the refusal's name: "wrong-size" or "not-finite"."""

    def __init__(self, code: RefusalCode, detail: str) -> None:
        super().__init__(detail)
        self.code: RefusalCode = code


class Encoding(ABC):
    """One member of the family at one tile size. Thread-safe: it holds no state."""

    name: ClassVar[str]
    kind: ClassVar[int]  # what the compiled kernels switch on
    lossless: ClassVar[bool]

    def __init__(self, tile: int = DEFAULT_TILE) -> None:
        self.tile = tile

    @property
    def identifier(self) -> str:
        """What travels: "int8/64"; members without scales have no tile: "fp32"."""
        return self.name

    @abstractmethod
    def frame_bytes(self, elements: int) -> int:
        """Bytes of the frame for a block of so many elements."""

    @abstractmethod
    def encode(self, values: Float32, frame: Bytes, residual: Float32 | None = None) -> None:
        """Encode `values` (n,) + `residual` (n,) into `frame` (frame_bytes(n),) in one pass.

        `residual` is changed in place to what the frame does not hold: values + residual - decode(frame).
        `values` is not changed. All three are C-contiguous and may not overlap. Values must be finite.
        """

    @abstractmethod
    def decode(self, frame: Bytes, out: Float32) -> None:
        """Decode a checked frame into `out` (n,)."""

    @abstractmethod
    def check(self, frame: Bytes, elements: int) -> None:
        """Raise EncodingError unless the frame is well-formed, of the right size, and finite throughout."""


_FAMILY: dict[str, type[Encoding]] = {}


def register(member: type[Encoding]) -> type[Encoding]:
    """Class decorator: make an encoding known by its name."""
    _FAMILY[member.name] = member
    return member


def encoding_names() -> list[str]:
    return sorted(_FAMILY)


def make_encoding(name: str, tile: int = DEFAULT_TILE) -> Encoding:
    """The encoding of that name and tile. Raises EncodingError naming the nearest known one."""
    member = _FAMILY.get(name)
    if member is None:
        near = difflib.get_close_matches(name, _FAMILY, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise EncodingError(
            "unknown-encoding", f"unknown encoding {name!r}{hint} (known: {', '.join(encoding_names())})"
        )
    if not (8 <= tile <= 2**16 and tile & (tile - 1) == 0):
        raise EncodingError("unknown-encoding", f"tile {tile} is not a power of two from 8 to 65536")
    return member(tile)


def parse_encoding(identifier: str) -> Encoding:
    """The encoding that an identifier such as "int8/64" names. Raises EncodingError."""
    name, slash, tile = identifier.partition("/")
    if slash and not tile.isdecimal():
        raise EncodingError("unknown-encoding", f"{identifier!r} is no encoding identifier, such as 'int8/64'")
    encoding = make_encoding(name, int(tile) if slash else DEFAULT_TILE)
    if encoding.identifier != identifier:
        raise EncodingError("unknown-encoding", f"{identifier!r} should be written {encoding.identifier!r}")
    return encoding
